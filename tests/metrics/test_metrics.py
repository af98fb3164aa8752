"""Metrics and operation counts, judged by counting one spike and one synapse at a time."""

import copy
import pickle

import pytest
import torch
from helpers.random_chains import chains
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy

import quartz_plugin
from quartz_plugin.costs import (
    HOROWITZ_FLOAT32,
    HOROWITZ_INT8,
    LOIHI,
    EnergyProfile,
    InferenceCounts,
    ann_costs,
    neuron_count,
    paper_profile,
    synaptic_operations,
)
from quartz_plugin.costs.counts import merged_operations, source_levels
from quartz_plugin.figures import FIGURES
from quartz_plugin.graph.synapses import fan_out, probed_fan_out, synapse_counts, unit_shapes
from quartz_plugin.metrics import (
    Agreement,
    ANNOperations,
    DecisionLatency,
    EarlySpikeRate,
    EnergyEstimate,
    MemoryAccesses,
    NeuronEvents,
    QuartzOperations,
    SpikeCount,
    SpikesPerNeuron,
    SynapticOperations,
    agreement,
    train_counts,
)
from quartz_plugin.operators.modules import Permute, Reshape, Slice
from quartz_plugin.operators.relation import Relation


@pytest.fixture
def small():
    """A network small enough to count by hand, its options and images."""
    ann = nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3))
    return ann, torch.rand(40, 5)


def counted_one_by_one(graph, result):
    """Synaptic operations of each image: every spike, every entry of the composed map with weights of 1."""
    levels = source_levels(graph, result)
    totals = {}
    for layer in graph.layers:
        (source,) = layer.projection.sources
        shape = levels[source].shape[1:]
        ones = copy.deepcopy(graph)
        for parameter in ones.module.parameters():
            parameter.data.fill_(1.0)
        twin = next(other for other in ones.layers if other.name == layer.name)
        (twin_source,) = twin.projection.sources
        dtype = next((p.dtype for p in ones.module.parameters()), torch.float32)
        totals[layer.name] = []
        for image in levels[source]:
            total = 0
            for unit in (image.flatten() >= 0).nonzero().flatten().tolist():
                spike = torch.zeros(1, shape.numel(), dtype=dtype)
                spike[0, unit] = 1
                total += int((twin.projection({twin_source: spike.view(1, *shape)}) > 0).sum())
            totals[layer.name].append(total)
    return totals


@given(chain=chains(), rectifier=st.sampled_from(["spike", "silent"]), t_max=st.integers(2, 9))
def test_synops_equal_a_count_of_each_spike_and_each_synapse(chain, rectifier, t_max):
    snn = chain.convert(t_max, rectifier=rectifier)
    result = snn.run(chain.images)
    counted = synaptic_operations(snn.graph, result)
    assert {name: counts.tolist() for name, counts in counted.items()} == counted_one_by_one(snn.graph, result)


@pytest.mark.parametrize(
    "modules",
    [
        [nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2), nn.AvgPool2d(3, stride=2, padding=1), nn.Conv2d(6, 5, 2)],
        [nn.ZeroPad2d((1, 0, 2, 1)), nn.Conv2d(4, 4, 3, dilation=2, groups=4), nn.AdaptiveAvgPool2d(3)],
        [nn.Conv2d(4, 3, 3, padding="same"), nn.AvgPool2d(2, ceil_mode=True), nn.Flatten(), nn.Linear(48, 7)],
        [nn.Conv2d(4, 3, 3, padding=1, padding_mode="circular"), nn.Conv2d(3, 2, 1, stride=3), nn.Flatten()],
        [nn.Flatten(), nn.Unflatten(1, (4, 7, 7)), nn.Conv2d(4, 2, 5)],
        [nn.Flatten(2), nn.Conv1d(4, 3, 4, stride=3), nn.AvgPool1d(2)],
        [Permute((0, 3, 1, 2)), nn.Flatten(), nn.Unflatten(1, (14, 14)), nn.Conv1d(14, 3, 4, stride=3)],
        [Permute((0, 2, 3, 1)), Reshape((2, 98)), Slice(1, 0, 1), nn.Flatten(), nn.Linear(98, 2)],
        [nn.Conv2d(4, 4, (3,) * 2, padding=(1,), dilation=[1]), nn.AvgPool2d([2], []), nn.AdaptiveAvgPool2d((None, 2))],
    ],
    ids=lambda modules: "-".join(type(module).__name__ for module in modules),
)
def test_fan_out_of_composed_maps_is_that_of_probing_every_unit(modules):
    ann = nn.Sequential(*modules)
    snn = quartz_plugin.convert(ann, torch.rand(8, 4, 7, 7))
    (layer,) = snn.graph.layers
    shapes = unit_shapes(snn.graph)
    assert shapes[layer.projection.sources[0]] == (4, 7, 7)
    (counts,), (probed,) = fan_out(layer.projection, shapes).values(), probed_fan_out(layer.projection, shapes).values()
    assert torch.equal(counts, probed)
    assert counts.shape == (4, 7, 7)


class Joined(nn.Module):
    """Every way in which two paths meet."""

    def __init__(self):
        super().__init__()
        self.wide, self.narrow = nn.Conv2d(4, 6, 3, padding=1), nn.Conv2d(4, 6, 1, groups=2)
        self.up, self.last = nn.ConvTranspose2d(6, 4, 3, stride=2, padding=1, output_padding=1), nn.Linear(64, 3)

    def forward(self, x):
        shuffled = x.view(-1, 2, 2, 8, 8).transpose(1, 2).reshape(-1, 4, 8, 8)
        y = self.wide(x) + self.narrow(shuffled) + torch.cat([x[:, :3], shuffled[:, 1:]], 1)
        y = F.relu(y)
        y = self.up(F.pad(y[:, :, ::2, ::4], (1, 1))) + F.interpolate(F.avg_pool2d(x, 2), size=(8, 8))
        return self.last(torch.cat([y.mean(3), y.mean(2)], 1).flatten(1))


def test_fan_out_of_paths_that_meet_is_that_of_probing_every_unit():
    snn = quartz_plugin.convert(Joined(), torch.rand(8, 4, 8, 8))
    shapes = unit_shapes(snn.graph)
    for layer in snn.graph.layers:
        counts = fan_out(layer.projection, shapes, most_probed=0)
        probed = probed_fan_out(layer.projection, shapes)
        assert counts.keys() == probed.keys()
        for source in counts:
            assert torch.equal(counts[source], probed[source]), (layer.name, source)


@pytest.mark.parametrize(
    "modules",
    [
        [nn.PixelShuffle(2), nn.Conv2d(1, 3, 3)],
        [nn.Conv2d(4, 8, 3, groups=2), nn.Conv2d(8, 8, 1), nn.PixelShuffle(2), nn.Conv2d(2, 2, 3, groups=2)],
        [nn.PixelUnshuffle(3), nn.Conv2d(36, 2, 2, padding=1), nn.Flatten(), nn.Linear(18, 2)],
        [nn.Linear(6, 5), nn.Flatten(2), nn.Conv1d(4, 8, 3, stride=2, padding=1), nn.Flatten()],
        [nn.Flatten(), nn.Unflatten(1, (24, 6)), nn.Linear(6, 2), nn.Linear(2, 7)],
    ],
    ids=lambda modules: "-".join(type(module).__name__ for module in modules),
)
def test_maps_between_channels_and_space_are_counted_without_probes(modules):
    snn = quartz_plugin.convert(nn.Sequential(*modules), torch.rand(8, 4, 6, 6))
    (layer,), shapes = snn.graph.layers, unit_shapes(snn.graph)
    (counts,) = fan_out(layer.projection, shapes, most_probed=0).values()
    (probed,) = probed_fan_out(layer.projection, shapes).values()
    assert torch.equal(counts, probed)
    (total,) = (composed for composed, _ in synapse_counts(snn.graph, most_probed=0).values())
    assert total == int(probed.sum())


class Residual(nn.Module):
    """Sums in a row without neurons on the way, of so many blocks."""

    def __init__(self, blocks, features=4, shift=False):
        super().__init__()
        self.head, self.shift = nn.Conv2d(1, features, 3, padding=1), shift
        self.inner = nn.ModuleList([nn.Conv2d(features, features, 3, padding=1) for _ in range(blocks)])
        self.outer = nn.ModuleList([nn.Conv2d(features, features, 1) for _ in range(blocks)])
        self.tail = nn.Sequential(nn.Conv2d(features, 4, 1), nn.PixelShuffle(2), nn.Conv2d(1, 1, 3))

    def forward(self, x):
        x = skip = self.head(x)
        for index, (inner, outer) in enumerate(zip(self.inner, self.outer, strict=True)):
            # Every other block has no neurons: its paths double those behind it.
            y = inner(x) if index % 2 else F.relu(inner(x))
            x = (torch.roll(x, 1, 3) if self.shift else x) + outer(y) * 0.1
        return self.tail(x + skip)


@pytest.mark.parametrize("shift", [False, True])
def test_synapses_of_long_residual_sums_are_those_of_probing_every_unit(shift):
    graph = quartz_plugin.convert(Residual(6, shift=shift), torch.rand(4, 1, 5, 5)).graph
    shapes, counts = unit_shapes(graph), synapse_counts(graph, most_probed=0)
    for layer in graph.layers:
        probed = probed_fan_out(layer.projection, shapes)
        counted = fan_out(layer.projection, shapes, most_probed=0)
        assert all(torch.equal(counted[source], probed[source]) for source in probed)
        assert counts[layer.name][0] == sum(int(count.sum()) for count in probed.values())


def test_counting_takes_work_for_each_node_and_not_for_each_path(monkeypatch):
    """24 blocks without neurons are 4096 paths; each kind of map is composed once for each kind of relation."""
    composed = []
    relate = Relation.slide
    monkeypatch.setattr(Relation, "slide", lambda *args, **named: composed.append(args[1]) or relate(*args, **named))
    graph = quartz_plugin.convert(Residual(24), torch.rand(4, 1, 5, 5)).graph
    composed.clear()
    assert None not in synapse_counts(graph, most_probed=0).values()
    assert len(composed) < 300


def test_composed_and_factored_synapses_of_a_bottleneck():
    ann = nn.Sequential(
        nn.Conv2d(1, 8, 1), nn.ReLU(), nn.Conv2d(8, 2, 1), nn.Conv2d(2, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(72, 2)
    )
    counts = synapse_counts(quartz_plugin.convert(ann, torch.rand(8, 1, 5, 5)).graph)
    assert counts == {"1": (200, 200), "4": (9 * 9 * 64, 25 * 16 + 9 * 9 * 16), "output": (144, 144)}


@given(chain=chains(), t_max=st.integers(2, 9), paper=st.booleans())
def test_merged_operations_equal_a_count_on_the_global_clock(chain, t_max, paper):
    """All layers stepped together, every neuron's current compared with the step before."""
    snn = chain.convert(t_max, **(quartz_plugin.PAPER if paper else {"rectifier": "silent"}))
    result = snn.run(chain.images)
    merged = merged_operations(snn.graph, result)
    graph = snn.graph
    net = copy.deepcopy(graph.module)
    spikes = quartz_plugin.encode(chain.images.to(graph.dtype), t_max, snn.n_steps, silent_zeros=snn.graph.silent)
    before, changes = {}, {layer.name: 0 for layer in graph.layers}
    for step, train in enumerate(spikes):
        net(train)
        for layer in graph.layers:
            current = net.get_submodule(layer.name)._hidden.i
            changed = (current - before.get(layer.name, torch.zeros_like(current))).abs() > 1e-6
            if step <= layer.neuron.p.last_step:
                changes[layer.name] = changes[layer.name] + changed.flatten(1).sum(1)
            before[layer.name] = current
    for name, counts in merged.items():
        # Sums in another order can move a change across 1e-6.
        assert (counts - changes[name]).abs().max() <= 1 + 0.001 * counts.max(), name


def test_spike_counts_tell_zeros_and_silence_apart(small):
    ann, images = small
    loud, silent = (quartz_plugin.convert(ann, images, 4, rectifier=r) for r in ("spike", "silent"))
    counts = {}
    for name, snn in (("loud", loud), ("silent", silent)):
        metric = SpikeCount(snn)
        for part in images.split(7):
            metric.update(snn.run(part))
        counts[name] = {key: float(value) for key, value in metric.compute().items()}
    hidden = loud.run(images).levels("1")
    nonzero = float((hidden != 0).sum()) / len(images)
    assert counts["loud"]["spikes/1"] == 4
    assert counts["loud"]["zero_spikes/1"] == pytest.approx(4 - nonzero)
    assert counts["silent"]["spikes/1"] == pytest.approx(nonzero)
    assert counts["silent"]["zero_spikes/1"] == counts["silent"]["zero_spikes/input"] == 0
    assert 0 < nonzero < 4
    assert counts["loud"]["spikes"] == pytest.approx(sum(counts["loud"][f"spikes/{n}"] for n in loud.windows))


def test_early_spike_rate_counts_spikes_before_readout(small):
    ann, images = small
    snn = quartz_plugin.convert(ann, images, 16, hold=False, percentile=50)
    result = snn.run(images)
    metric = EarlySpikeRate(snn)
    metric.update(result)
    before = sum(int(((s >= 0) & (s < result.windows[n].start)).sum()) for n, s in result.spike_steps.items())
    spikes = sum(int((s >= 0).sum()) for n, s in result.spike_steps.items() if n != "input")
    assert before > 0
    assert float(metric.compute()["early_spike_rate"]) == pytest.approx(before / spikes)


def test_decision_latency_is_the_first_output_spike_counted_from_one(small):
    ann, images = small
    snn = quartz_plugin.convert(ann, images, 8)
    result = snn.run(images)
    metric = DecisionLatency()
    metric.update(result)
    steps = result.spike_steps["output"].clone()
    steps[steps < 0] = snn.n_steps - 1
    assert float(metric.compute()) == pytest.approx(float(steps.amin(1).double().mean()) + 1)


def test_agreement_takes_the_smallest_class_of_a_tie_and_refuses_other_shapes():
    metric = Agreement()
    metric.update(torch.tensor([[1.0, 1.0, 0.0]]), torch.tensor([[5.0, 0.0, 0.0]]))
    metric.update(torch.tensor([[0.0, 1.0, 1.0]]), torch.tensor([[0.0, 0.0, 9.0]]))
    assert float(metric.compute()) == 0.5
    with pytest.raises(ValueError, match=r"\[B, classes\]"):
        agreement(torch.zeros(2, 3), torch.zeros(2, 4))


def test_synaptic_operations_refuse_another_kind(small):
    ann, images = small
    with pytest.raises(ValueError, match=r"synapse.*merged.*spikes"):
        SynapticOperations(quartz_plugin.convert(ann, images), kind="spikes")


def test_metrics_work_in_a_collection_and_batches_add_up_to_the_whole(small):
    ann, images = small
    snn = quartz_plugin.convert(ann, images, 8, rectifier="silent")
    labels = torch.randint(3, (len(images),))

    def collection():
        return MetricCollection(
            {
                "accuracy": MulticlassAccuracy(3, average="micro"),
                "agreement": Agreement(),
                "spikes": SpikeCount(snn),
                "early": EarlySpikeRate(snn),
                "synops": SynapticOperations(snn),
                "merged": SynapticOperations(snn, kind="merged"),
                "operations": QuartzOperations(snn),
                "latency": DecisionLatency(),
            },
            compute_groups=False,
        )

    def updated(metrics, size):
        for x, y in zip(images.split(size), labels.split(size), strict=True):
            result = snn.run(x)
            metrics.update(result=result, preds=result.logits, target=y, reference=ann(x))
        return {name: float(value) for name, value in metrics.compute().items()}

    whole = updated(collection(), len(images))
    assert updated(collection(), 9) == pytest.approx(whole)
    clone = collection().clone(prefix="test_")
    assert updated(clone, 9)["test_synops"] == pytest.approx(whole["synops"])
    clone.reset()
    assert updated(clone, 5)["test_spikes"] == pytest.approx(whole["spikes"])
    assert whole["operations"] == pytest.approx(whole["synops_merged"] + 2 * 7 * 8)


def test_a_metric_survives_pickling(small):
    ann, images = small
    snn = quartz_plugin.convert(ann, images, 8)
    metric = SpikeCount(snn)
    metric.update(snn.run(images))
    assert pickle.loads(pickle.dumps(metric)).compute() == metric.compute()


@pytest.mark.shared
@pytest.mark.parametrize("t_max", [4, 16])
def test_forced_zeros_cost_every_synapse_of_the_paper_network(mnist_ann, mnist_train, mnist_test, t_max):
    images = mnist_test[0][:100]
    forced, silent = (
        quartz_plugin.convert(mnist_ann, mnist_train[0][:1000], t_max, percentile=99, rectifier=r)
        for r in ("spike", "silent")
    )
    synops = sum(synaptic_operations(forced.graph, forced.run(images)).values())
    assert synops.tolist() == [225_840] * 100
    saved = sum(synaptic_operations(silent.graph, silent.run(images)).values())
    assert int(saved.max()) < 225_840
    assert 0.2 < float(saved.double().mean()) / 225_840 < 0.45
    assert neuron_count(forced.graph) == 4354


@pytest.mark.parametrize("rectifier", ["spike", "silent"])
def test_the_border_that_padding_adds_in_front_of_a_pool_sends_no_spikes(rectifier):
    ann = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.ZeroPad2d(2), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(32, 3))
    snn = quartz_plugin.convert(ann, torch.rand(20, 1, 6, 6), 6, rectifier=rectifier)
    images = torch.rand(3, 1, 6, 6)
    net, passed = snn.to_snntorch(), 0
    net[3].register_forward_hook(lambda module, inputs, spikes: counts.append(spikes.flatten(1).sum(1)))
    counts = []
    for spikes in quartz_plugin.encode(images, 6, snn.n_steps, silent_zeros=rectifier == "silent"):
        net(spikes)
    passed = sum(counts)
    counted = synaptic_operations(snn.graph, snn.run(images))["output"]
    assert counted.tolist() == (3 * passed).long().tolist()


def test_results_without_all_spikes_are_refused_in_one_line(small):
    ann, images = small
    snn = quartz_plugin.convert(ann, images, 8)
    result = snn.run(images, record=False)
    for metric in (SpikeCount(snn), EarlySpikeRate(snn), SynapticOperations(snn), QuartzOperations(snn)):
        with pytest.raises(ValueError, match="record=True"):
            metric.update(result)


# ---------------------------------------------------------------------- every counting metric, and its pure counts

EVENTS = ["bias_events", "readout_events", "rectifier_events", "hold_events", "pool_events"]
COUNTING = {
    "synops": (SynapticOperations, {}, ["synops"]),
    "factored": (SynapticOperations, {"kind": "factored"}, ["synops_factored"]),
    "merged": (SynapticOperations, {"kind": "merged"}, ["synops_merged"]),
    "operations": (QuartzOperations, {}, ["operations", "operations_strict"]),
    "memory": (MemoryAccesses, {}, ["memory_reads", "memory_writes", "memory_reads_strict", "memory_writes_strict"]),
    "events": (
        NeuronEvents,
        {},
        [*EVENTS, "neuron_updates", "active_updates"],
    ),
}
BY_LAYER = {
    **{name: lambda snn, c=c, options=options: c(snn, **options) for name, (c, options, _) in COUNTING.items()},
    "spikes": SpikeCount,
    "spikes a neuron": SpikesPerNeuron,
    "early": EarlySpikeRate,
    "energy": lambda snn: EnergyEstimate(snn, HOROWITZ_INT8),
    "energy on Loihi": lambda snn: EnergyEstimate(snn, LOIHI),
    "energy, paper": lambda snn: EnergyEstimate(snn, paper_profile(snn.t_max)),
}
every_metric = pytest.mark.parametrize("name", BY_LAYER)


@pytest.fixture
def pooled():
    """A network with a pool and maps in a row, and images."""
    ann = nn.Sequential(
        *(nn.Conv2d(1, 3, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.AvgPool2d(2, 1), nn.Conv2d(3, 4, 2), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(4, 3)),
    )
    images = torch.rand(25, 1, 6, 6)
    return quartz_plugin.convert(ann, images, 6, hold=False, percentile=80, rectifier="silent"), images


def updated(metric, snn, images, size):
    for part in images.split(size):
        metric.update(snn.run(part))
    return metric


@pytest.mark.parametrize("name", COUNTING)
def test_a_counting_metric_gives_the_means_of_the_pure_counts_in_total_and_by_layer(pooled, name):
    snn, images = pooled
    kind, options, quantities = COUNTING[name]
    values = updated(kind(snn, **options), snn, images, 7).compute()
    counts = InferenceCounts(snn.graph, snn.run(images))
    expected = {}
    for quantity in quantities:
        expected[quantity] = sum(sum(count.tolist()) for count in counts[quantity].values()) / len(images)
        for layer in ("1", "5", "output"):
            expected[f"{quantity}/{layer}"] = sum(counts[quantity][layer].tolist()) / len(images)
    assert {key: float(value) for key, value in values.items()} == pytest.approx(expected)
    assert sum(expected.values()) > 0
    assert all(value.dtype == torch.float64 for value in values.values())


@every_metric
def test_batches_of_any_size_add_up_and_a_reset_forgets_them(pooled, name):
    snn, images = pooled
    metric = BY_LAYER[name](snn)
    whole = updated(metric, snn, images, 25).compute()
    metric.reset()
    assert updated(metric, snn, images, 4).compute() == whole
    assert pickle.loads(pickle.dumps(metric)).compute() == whole
    clone = metric.clone()
    assert updated(clone, snn, images[:3], 2).compute() != whole
    assert metric.compute() == whole
    metric.reset()
    # What forward gives is of its batch, and the batch is added.
    assert metric(snn.run(images[:5])) == updated(BY_LAYER[name](snn), snn, images[:5], 5).compute()
    metric(snn.run(images[5:]))
    assert metric.compute() == whole


@every_metric
def test_plot_draws_a_bar_for_each_layer(pooled, name):
    pyplot = pytest.importorskip("matplotlib.pyplot")
    snn, images = pooled
    metric = updated(BY_LAYER[name](snn), snn, images, 25)
    values = metric.compute()
    figure, axes = metric.plot()
    quantity = next(iter(values))
    layers = [label.get_text() for label in axes.get_yticklabels()]
    assert layers in (["input", "1", "5", "output"], ["1", "5", "output"])
    widths = [bar.get_width() for bar in axes.patches]
    assert widths == pytest.approx([float(values[f"{quantity}/{layer}"]) for layer in layers])
    assert axes.figure is figure
    assert axes.get_xlabel() == FIGURES[quantity].raw_axis_label
    _, given = pyplot.subplots()
    assert metric.plot({key: 2 * value for key, value in values.items()}, ax=given)[1] is given
    assert [bar.get_width() for bar in given.patches] == pytest.approx([2 * width for width in widths])
    pyplot.close("all")


def test_spikes_a_neuron_leave_the_input_out_of_the_whole(pooled):
    snn, images = pooled
    values = updated(SpikesPerNeuron(snn), snn, images, 10).compute()
    result = snn.run(images)
    neurons = {"input": 36, "1": 108, "5": 4, "output": 3}
    spikes = {name: int((steps >= 0).sum()) / len(images) for name, steps in result.spike_steps.items()}
    own = sum(spikes[name] for name in ("1", "5", "output")) / (108 + 4 + 3)
    assert 0 < own < 1
    assert float(values["spikes_per_neuron"]) == pytest.approx(own)
    for name, count in neurons.items():
        assert float(values[f"spikes_per_neuron/{name}"]) == pytest.approx(spikes[name] / count)


def test_energy_is_each_count_times_its_cost_in_total_and_by_layer(pooled):
    snn, images = pooled
    profile = EnergyProfile("mine", "made up", spiking={"spikes": 2.0, "synops": 3.0, "active_updates": 0.5})
    values = updated(EnergyEstimate(snn, profile), snn, images, 6).compute()
    counts = InferenceCounts(snn.graph, snn.run(images))
    expected = {"energy_mine/input": 2.0 * float(counts["spikes"]["input"].double().mean())}
    for layer in ("1", "5", "output"):
        each = 2.0 * counts["spikes"][layer] + 3.0 * counts["synops"][layer] + 0.5 * counts["active_updates"][layer]
        expected[f"energy_mine/{layer}"] = float(each.mean())
    expected["energy_mine"] = sum(expected.values())
    assert {name: float(value) for name, value in values.items()} == pytest.approx(expected)


def test_everything_stands_in_one_collection(small):
    ann, images = small
    snn = quartz_plugin.convert(ann, images, 8, rectifier="silent")

    def collection():
        metrics = {name: make(snn) for name, make in BY_LAYER.items() if name != "merged"}
        return MetricCollection({**metrics, "agreement": Agreement(), "latency": DecisionLatency()})

    def whole(metrics, size):
        for part in images.split(size):
            result = snn.run(part)
            metrics.update(result=result, preds=result.logits, reference=ann(part))
        return {name: float(value) for name, value in metrics.compute().items()}

    expected = whole(collection(), 40)
    counts = InferenceCounts(snn.graph, snn.run(images)).mean()
    shared = counts.keys() & expected.keys()
    assert len(shared) > 30
    assert {name: expected[name] for name in shared} == pytest.approx({name: counts[name] for name in shared})
    both = HOROWITZ_INT8.energy(counts), LOIHI.energy(counts)
    assert (expected["energy_45nm_int8"], expected["energy_loihi"]) == pytest.approx(both)
    parts = collection()
    assert whole(parts, 9) == pytest.approx(expected)
    clone = parts.clone(prefix="test_")
    clone.reset()
    assert whole(clone, 7) == pytest.approx({f"test_{name}": value for name, value in expected.items()})
    assert {k: float(v) for k, v in pickle.loads(pickle.dumps(parts)).compute().items()} == pytest.approx(expected)


def test_a_metric_counts_the_results_of_a_network_that_is_then_edited(pooled):
    snn, images = pooled
    metric = SynapticOperations(snn)
    before = updated(metric, snn, images, 25).compute()["synops/output"]
    metric.reset()
    snn.graph_module.get_submodule("7").weight.data *= 2
    snn.graph_module.set_submodule("7", nn.Linear(4, 6, bias=False))
    snn.graph.layers[-1].neuron.bias = None
    assert updated(metric, snn, images, 25).compute()["synops/output"] == 2 * before


# ------------------------------------------------------------------------------------- networks of others


def loop_of_snntorch(steps=12):
    """Spike trains of a hand-written loop, as its author records them."""
    snntorch = pytest.importorskip("snntorch")
    fc1, lif1 = nn.Linear(5, 7), snntorch.Leaky(beta=0.9)
    fc2, lif2 = nn.Linear(7, 3), snntorch.Leaky(beta=0.9)
    nn.init.uniform_(fc1.weight, 0, 1)
    mem1, mem2, first, second = lif1.init_leaky(), lif2.init_leaky(), [], []
    images = torch.rand(4, 5)
    with torch.no_grad():
        for _ in range(steps):
            spk1, mem1 = lif1(fc1(images), mem1)
            spk2, mem2 = lif2(fc2(spk1), mem2)
            first.append(spk1)
            second.append(spk2)
    return {"lif1": torch.stack(first), "lif2": torch.stack(second)}


def test_spikes_of_an_snntorch_loop_are_counted_from_their_trains():
    trains = loop_of_snntorch()
    count, each = SpikeCount(["lif1", "lif2"]), SpikesPerNeuron(iter(["lif1", "lif2"]))
    for part in (slice(0, 1), slice(1, 4)):
        count.update({name: train[:, part] for name, train in trains.items()})
        each.update({name: train[:, part] for name, train in trains.items()})
    by_hand = {
        name: sum(int(spike) for step in train for image in step for spike in image) for name, train in trains.items()
    }
    assert by_hand["lif1"] > 20
    assert {name: float(value) for name, value in count.compute().items()} == pytest.approx(
        {"spikes": sum(by_hand.values()) / 4, "spikes/lif1": by_hand["lif1"] / 4, "spikes/lif2": by_hand["lif2"] / 4}
    )
    assert float(each.compute()["spikes_per_neuron"]) == pytest.approx(sum(by_hand.values()) / 4 / 10)
    assert float(each.compute()["spikes_per_neuron/lif1"]) == pytest.approx(by_hand["lif1"] / 4 / 7)


def test_a_spike_is_whatever_is_not_zero_and_images_are_of_any_shape():
    train = torch.zeros(3, 2, 4, 5, 5)
    train[0, 1, 2, 3, 4], train[2, 1, 0, 0, 0], train[1, 0, 0, 0, 0] = -0.5, 2.0, 1.0
    assert train_counts({"conv": train})["conv"].tolist() == [1, 2]
    assert train_counts({"one": torch.ones(3, 2)})["one"].tolist() == [3, 3]
    assert train_counts({"bool": train > 0})["bool"].tolist() == [1, 1]


@pytest.mark.parametrize("metric", [SpikeCount, SpikesPerNeuron])
def test_trains_that_cannot_be_counted_are_refused_and_nothing_is_added(metric):
    of_two = metric(["lif1", "lif2"])
    of_two.update({"lif1": torch.ones(2, 3, 4), "lif2": torch.ones(2, 3, 1)})
    before = of_two.compute()
    with pytest.raises(ValueError, match=r"no spikes of \['lif2'\]: give a train for each of \['lif1', 'lif2'\]"):
        of_two.update({"lif1": torch.ones(2, 3, 4)})
    with pytest.raises(ValueError, match=r"the spikes of 'lif2' must be \[steps, B, ...\], got \[2\]"):
        of_two.update({"lif1": torch.ones(2, 3, 4), "lif2": torch.ones(2)})
    assert of_two.compute() == before
    with pytest.raises(TypeError, match="SpikingNetwork or several names of layers, got 'lif1'"):
        metric("lif1")


@pytest.mark.parametrize("metric", [SpikeCount, SpikesPerNeuron, EarlySpikeRate, SynapticOperations])
def test_the_result_of_a_network_with_other_layers_is_refused(metric, small):
    ann, images = small
    other = nn.Sequential(nn.Flatten(), nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3))
    counting = metric(quartz_plugin.convert(ann, images))
    with pytest.raises((ValueError, KeyError)):
        counting.update(quartz_plugin.convert(other, images).run(images))


def test_energy_estimates_say_what_is_wrong_with_a_profile(small):
    ann, images = small
    snn = quartz_plugin.convert(ann, images)
    with pytest.raises(TypeError, match=r"must be an EnergyProfile, got \{'synops': 1\}"):
        EnergyEstimate(snn, {"synops": 1})
    with pytest.raises(ValueError, match="'ann only' has no energies for spiking networks"):
        EnergyEstimate(snn, EnergyProfile("ann only", "", ann={"macs": 1.0}))
    with pytest.raises(ValueError, match=r"no counts are called \['sinops'\]; there are spikes"):
        EnergyEstimate(snn, EnergyProfile("mine", "", spiking={"synops": 1.0, "sinops": 1.0}))
    for profiles in ([], [LOIHI, LOIHI]):
        with pytest.raises(ValueError, match="one, or several of different names"):
            EnergyEstimate(snn, profiles)


def test_one_estimate_of_several_profiles_is_that_of_each(pooled):
    snn, images = pooled
    several = [LOIHI, HOROWITZ_INT8, paper_profile(snn.t_max)]
    estimates = [EnergyEstimate(snn, profile) for profile in (several, *several)]
    for estimate in estimates:
        estimate.update(snn.run(images))
    together, *each = (estimate.compute() for estimate in estimates)
    assert together == {name: energy for of_one in each for name, energy in of_one.items()}


def test_every_counting_metric_refuses_a_result_without_all_spikes(pooled):
    snn, images = pooled
    result = snn.run(images, record=False)
    for name, make in BY_LAYER.items():
        metric = make(snn)
        with pytest.raises(ValueError, match="record=True"):
            metric.update(result)
        assert metric.images == 0, name


def test_operations_of_the_ann_are_its_costs(small):
    ann, images = small
    images[images < 0.3] = 0.0
    metric = ANNOperations(ann, images)
    for part in images.split(9):
        metric.update(part)
    assert {name: float(value) for name, value in metric.compute().items()} == pytest.approx(
        {**ann_costs(ann, images)}
        | {f"memory_reads/{m}": 2.0 * n for m, n in (("0", 20), ("2", 12))}
        | {"memory_writes/0": 4.0, "memory_writes/2": 3.0}
    )


def test_a_lightning_module_logs_what_the_metrics_compute(pooled, tmp_path):
    lightning = pytest.importorskip("lightning")
    snn, images = pooled

    class Testing(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.snn = snn
            self.costs = MetricCollection([SynapticOperations(snn), SpikeCount(snn), EnergyEstimate(snn, LOIHI)])
            self.memory = MemoryAccesses(snn)

        def test_step(self, batch, batch_index):
            result = self.snn.run(batch[0])
            self.costs.update(result)
            self.memory.update(result)

        def on_test_epoch_end(self):
            self.log_dict(self.costs.compute())
            self.log_dict(self.memory.compute())

    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = lightning.Trainer(
        accelerator="cpu", devices=1, enable_model_summary=False, default_root_dir=tmp_path, **quiet
    )
    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(images), batch_size=10)
    (logged,) = trainer.test(Testing(), data, verbose=False)
    counts = InferenceCounts(snn.graph, snn.run(images)).mean()
    for name in ("synops", "synops/1", "spikes", "spikes/input", "zero_spikes", "memory_reads", "memory_writes/output"):
        assert logged[name] == pytest.approx(counts[name], rel=1e-5), name
    assert logged["energy_loihi"] == pytest.approx(LOIHI.energy(counts), rel=1e-5)


# -------------------------------------------------------------------------- the paper's network, real images


def synapses_of(side, kernel, outputs):
    """Synapses of each unit of a square picture into a convolution without padding, by walking the kernel."""
    counts = [[0] * side for _ in range(side)]
    for y in range(side - kernel + 1):
        for x in range(side - kernel + 1):
            for dy in range(kernel):
                for dx in range(kernel):
                    counts[y + dy][x + dx] += outputs
    return counts


def paper_synops(steps):
    """Synaptic operations of one image of the paper's MNIST network, each spike at each of its synapses."""

    def pool(picture):
        return [
            [any(picture[2 * y + dy][2 * x + dx] for dy in (0, 1) for dx in (0, 1)) for x in range(len(picture) // 2)]
            for y in range(len(picture) // 2)
        ]

    fired = {name: (each >= 0).tolist() for name, each in steps.items()}
    first, second, third = synapses_of(28, 5, 6), synapses_of(12, 5, 12), synapses_of(4, 4, 120)
    total = 0
    for pictures, synapses in (
        (fired["input"], first),
        (map(pool, fired["1"]), second),
        (map(pool, fired["4"]), third),
    ):
        for picture in pictures:
            for row, of_row in zip(picture, synapses, strict=True):
                total += sum(count for spike, count in zip(row, of_row, strict=True) if spike)
    return total + 10 * sum(unit for channel in fired["7"] for row in channel for unit in row)


@pytest.mark.shared
@pytest.mark.parametrize("t_max", [2, 4, 16])
@pytest.mark.parametrize("hold", [True, False])
def test_forced_zeros_cost_each_multiplication_of_the_ann_for_every_image(
    mnist_ann, mnist_train, mnist_test, t_max, hold
):
    snn = quartz_plugin.convert(mnist_ann, mnist_train[0][:300], t_max, percentile=99, hold=hold)
    counts = InferenceCounts(snn.graph, snn.run(mnist_test[0][:50]))
    assert sum(counts["synops"].values()).tolist() == [225_840] * 50
    assert sum(counts["synops_factored"].values()).tolist() == [225_840] * 50
    spikes = sum(counts["spikes"].values())
    assert spikes.tolist() == [784 + 4354 - int(silent) for silent in 10 - counts["spikes"]["output"]]


@pytest.mark.shared
@pytest.mark.parametrize("hold", [True, False])
def test_silent_zeros_cost_a_synapse_for_each_spike_that_meets_it(mnist_ann, mnist_train, mnist_test, hold):
    snn = quartz_plugin.convert(mnist_ann, mnist_train[0][:300], 8, percentile=99, hold=hold, rectifier="silent")
    result = snn.run(mnist_test[0][:20])
    counted = sum(synaptic_operations(snn.graph, result).values()).tolist()
    by_hand = [paper_synops({name: steps[image] for name, steps in result.spike_steps.items()}) for image in range(20)]
    assert counted == by_hand
    assert max(counted) < 150_000


@pytest.mark.shared
@pytest.mark.parametrize(("t_max", "synops", "firing"), [(4, 64_000, 636), (16, 81_000, 1144)])
def test_silent_zeros_cost_what_the_design_says(mnist_ann, mnist_train, mnist_test, t_max, synops, firing):
    snn = quartz_plugin.convert(
        mnist_ann, mnist_train[0][:10_000], t_max, percentile=99, output_percentile=99, rectifier="silent"
    )
    # Digits get harder towards the end of the test images: 500 from all over them.
    result = snn.run(mnist_test[0][::20])
    metrics = [SynapticOperations(snn), SpikesPerNeuron(snn)]
    for metric in metrics:
        metric.update(result)
    assert neuron_count(snn.graph) == 4354
    assert float(metrics[0].compute()["synops"]) == pytest.approx(synops, rel=0.03)
    assert float(metrics[1].compute()["spikes_per_neuron"]) == pytest.approx(firing / 4354, rel=0.05)


# ------------------------------------------------------------------------------------------- one network a metric


def _network(hold=True, t_max=8, seed=0):
    torch.manual_seed(seed)
    ann = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    return quartz_plugin.convert(ann, torch.rand(32, 4), t_max, hold=hold)


OF_RESULTS = {
    "spikes": SpikeCount,
    "names": lambda snn: SpikeCount(["input", "1", "output"]),
    "spikes a neuron": SpikesPerNeuron,
    "early": EarlySpikeRate,
    "latency": lambda snn: DecisionLatency(),
    "synops": SynapticOperations,
    "energy": lambda snn: EnergyEstimate(snn, HOROWITZ_FLOAT32),
}


@pytest.mark.parametrize("metric", OF_RESULTS)
class TestOneNetwork:
    @pytest.mark.parametrize("other", [{"seed": 1}, {"hold": False}, {"t_max": 9}], ids=str)
    def test_results_of_another_network_are_refused(self, metric, other):
        snn, images = _network(), torch.rand(5, 4)
        first, second = OF_RESULTS[metric](snn), OF_RESULTS[metric](_network(**other))
        first.update(snn.run(images))
        second.update(_network(**other).run(images))
        before = {name: value.clone() for name, value in first.metric_state.items()}
        for refused in (
            lambda: first.update(_network(**other).run(images)),
            lambda: first(_network(**other).run(images)),
            lambda: first.merge_state(second),
        ):
            with pytest.raises(ValueError, match="another network"):
                refused()
            assert all(torch.equal(value, before[name]) for name, value in first.metric_state.items())

    def test_a_network_may_learn_and_be_copied_loaded_and_pickled(self, metric, tmp_path):
        snn, images = _network(), torch.rand(5, 4)
        first = OF_RESULTS[metric](snn)
        snn.save(tmp_path / "net")
        for other in (snn, copy.deepcopy(snn), quartz_plugin.load(tmp_path / "net")):
            first.update(pickle.loads(pickle.dumps(other.run(images))))
        snn.graph_module.get_submodule("0").weight.data.mul_(0.5)
        first.update(snn.run(images))
        first(snn.run(images))
        second = OF_RESULTS[metric](snn)
        second.update(snn.run(images))
        first.merge_state(second)

    def test_a_reset_metric_takes_another(self, metric):
        snn, images = _network(), torch.rand(5, 4)
        first = OF_RESULTS[metric](snn)
        first.update(snn.run(images))
        first.reset()
        assert first.seen.tolist() == [0, 0, 0]


def test_a_copy_that_was_edited_is_another_network():
    snn, images = _network(), torch.rand(5, 4)
    other = copy.deepcopy(snn)
    other.graph_module.get_submodule("0").weight.data.neg_()
    metric = DecisionLatency()
    metric.update(snn.run(images))
    with pytest.raises(ValueError, match=r"^the result is of another network than those before it; reset\(\)"):
        metric.update(other.run(images))
    with pytest.raises(ValueError, match=r"^the result is of another network than the metric; take a metric"):
        SpikeCount(snn).update(other.run(images))


def test_a_metric_that_is_copied_with_its_network_is_that_of_the_copy():
    images = torch.rand(5, 4)
    both = nn.ModuleDict({"snn": _network(), "metric": SynapticOperations(_network())})
    both["metric"] = SynapticOperations(both["snn"], kind="merged")
    other = copy.deepcopy(both)
    other["snn"].graph_module.get_submodule("0").weight.data.neg_()
    result = other["snn"].run(images)
    other["metric"].update(result)
    expected = merged_operations(other["snn"], result)
    assert other["metric"].compute()["synops_merged"] == sum(expected.values()).double().mean()
