"""Metrics and operation counts, judged by counting one spike and one synapse at a time."""

import copy
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from random_chains import chains
from torch import nn
from torch.nn import functional as F
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy

import quartz_plugin
from quartz_plugin.hardware.operations import (
    merged_operations,
    neuron_count,
    source_levels,
    synaptic_operations,
)
from quartz_plugin.metrics import (
    Agreement,
    DecisionLatency,
    EarlySpikeRate,
    QuartzOperations,
    SpikeCount,
    SynapticOperations,
    agreement,
)
from quartz_plugin.synapses import fan_out, probed_fan_out, synapse_counts, unit_shapes


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
    ],
    ids=lambda modules: "-".join(type(module).__name__ for module in modules),
)
def test_fan_out_of_composed_maps_is_that_of_probing_every_unit(modules):
    ann = nn.Sequential(*modules)
    snn = quartz_plugin.convert(ann, torch.rand(8, 4, 7, 7))
    (layer,) = snn.graph.layers
    shapes = {layer.projection.sources[0]: torch.Size((4, 7, 7))}
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
        counts = fan_out(layer.projection, shapes, most_probes=0)
        probed = probed_fan_out(layer.projection, shapes)
        assert counts.keys() == probed.keys()
        for source in counts:
            assert torch.equal(counts[source], probed[source]), (layer.name, source)


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
    assert counts["loud"]["spikes_1"] == 4
    assert counts["loud"]["zero_spikes_1"] == pytest.approx(4 - nonzero)
    assert counts["silent"]["spikes_1"] == pytest.approx(nonzero)
    assert counts["silent"]["zero_spikes_1"] == counts["silent"]["zero_spikes_input"] == 0
    assert 0 < nonzero < 4
    assert counts["loud"]["spikes"] == pytest.approx(sum(counts["loud"][f"spikes_{n}"] for n in loud.windows))


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
