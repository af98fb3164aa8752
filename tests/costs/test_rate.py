"""The rate-coded network, against loops written by hand in snnTorch and spikes counted one at a time."""

import copy

import pytest
import snntorch
import torch
from helpers.one_by_one import OneByOne, as_lists
from torch import nn
from torch.nn import functional as F

import quartz_plugin
from quartz_plugin import AxonalDelay
from quartz_plugin.costs import HOROWITZ_FLOAT32, InferenceCounts, ann_costs, count_operations
from quartz_plugin.costs.rate import RateCodedNetwork

STEPS = 12


@pytest.fixture
def images():
    images = torch.rand(3, 1, 8, 8)
    images[images < 0.2] = 0.0
    return images


def cnn(pool=True):
    """A small CNN with borders, strides and a bias that is 0."""
    torch.manual_seed(3)
    ann = nn.Sequential(
        *(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2) if pool else nn.Identity()),
        *(nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2), nn.ReLU(), nn.Flatten(), nn.Linear(24 if pool else 96, 3)),
    )
    with torch.no_grad():
        ann[0].bias[1] = 0.0
        ann[3].weight.mul_(2)
    return ann.eval()


def converted(ann, images=None, **options):
    calibration = torch.rand(60, 1, 8, 8) if images is None else images
    return quartz_plugin.convert(ann, calibration, 16, **options)


class Loop(nn.Module):
    """The same CNN as an author of snnTorch writes it, with the weights and biases of a converted network."""

    def __init__(self, snn):
        super().__init__()
        weights, biases = (
            {
                name.split(".")[0]: value.clone()
                for name, value in snn.graph_module.state_dict().items()
                if name.endswith(end)
            }
            for end in (".weight", ".bias")
        )
        self.conv1 = nn.Conv2d(1, 4, 3, padding=1)
        self.conv2 = nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2)
        self.fc = nn.Linear(24, 3)
        with torch.no_grad():
            for module, path, neurons in ((self.conv1, "0", "1"), (self.conv2, "3", "4"), (self.fc, "6", "output")):
                module.weight.copy_(weights[path])
                module.bias.copy_(biases[neurons].flatten())
        self.pool = nn.MaxPool2d(2)
        self.lif1 = snntorch.Leaky(beta=1.0, reset_mechanism="subtract")
        self.lif2 = snntorch.Leaky(beta=1.0, reset_mechanism="subtract")

    def forward(self, x, steps):
        mem1, mem2 = self.lif1.init_leaky(), self.lif2.init_leaky()
        spk1_rec, spk2_rec, out_rec = [], [], []
        for _ in range(steps):
            spk1, mem1 = self.lif1(self.conv1(x), mem1)
            spk2, mem2 = self.lif2(self.conv2(self.pool(spk1)), mem2)
            spk1_rec.append(spk1)
            spk2_rec.append(spk2)
            out_rec.append(self.fc(spk2.flatten(1)))
        return torch.stack(spk1_rec), torch.stack(spk2_rec), torch.stack(out_rec)


def recorded(rate, images, steps, kinds):
    """Result of a run, and what the modules of these paths gave at each step."""
    given = {path: [] for path in kinds}
    hooks = [
        rate.net.get_submodule(path).register_forward_hook(lambda m, x, out, path=path: given[path].append(out))
        for path in kinds
    ]
    result = rate.run(images, steps)
    for hook in hooks:
        hook.remove()
    return result, {path: torch.stack(each) for path, each in given.items()}


# ---------------------------------------------------------------------------------- the loop of an author


def test_it_spikes_step_by_step_as_a_loop_of_snntorch_does(images):
    snn = converted(cnn())
    rate, loop = RateCodedNetwork(snn), Loop(snn)
    with torch.no_grad():
        first, second, out = loop(images, STEPS)
    result, given = recorded(rate, images, STEPS, ["1", "4", "output"])
    assert torch.equal(given["1"], first)
    assert torch.equal(given["4"], second)
    assert 0 < first.mean() < 1
    assert 0 < second.mean() < 1
    torch.testing.assert_close(given["output"], out)
    scale = snn.graph.output_scale
    torch.testing.assert_close(result.logits, out.mean(0) * scale)
    for steps in (1, 2, 7):
        torch.testing.assert_close(rate(images, steps), out[:steps].mean(0) * scale)
        counts = rate.run(images, steps).counts["spikes"]
        assert as_lists(counts) == as_lists(
            {"1": first[:steps].sum((0, 2, 3, 4)).long(), "4": second[:steps].sum((0, 2, 3, 4)).long()}
        )
    assert result.n_steps == STEPS


def test_its_counts_are_those_of_the_loop_while_it_runs(images):
    snn = converted(cnn())
    rate, loop = RateCodedNetwork(snn), Loop(snn)
    counts = rate.run(images, STEPS).counts
    with torch.no_grad(), count_operations(loop) as counted:
        loop(images, STEPS)
    whole = {name: {layer: int(count.sum()) for layer, count in of.items()} for name, of in counts.items()}
    assert whole["spikes"] == {"1": counted.spikes["lif1"], "4": counted.spikes["lif2"]}
    modules = {"1": "conv1", "4": "conv2", "output": "fc"}
    for name in ("synops", "graded_synops"):
        assert whole[name] == {layer: getattr(counted, name)[path] for layer, path in modules.items()}
    assert whole["graded_synops"] == {"1": whole["synops"]["1"], "4": 0, "output": 0}
    assert 0 < whole["synops"]["output"] < whole["synops"]["4"] < whole["synops"]["1"]


def test_what_runs_inside_counts_the_same(images):
    snn = converted(cnn())
    rate = RateCodedNetwork(snn)
    with count_operations(rate) as counted:
        counts = rate.run(images, STEPS).counts
    assert counted.total("synops") == int(sum(counts["synops"].values()).sum())
    assert counted.total("graded_synops") == int(sum(counts["graded_synops"].values()).sum())
    assert counted.total("spikes") == int(sum(counts["spikes"].values()).sum())


@pytest.mark.parametrize("ends", ["pool", "average"])
def test_numbers_that_a_pool_over_the_image_hands_on_multiply_too(ends):
    """No spike comes out of the pool: a synapse behind it multiplies."""
    pool = nn.MaxPool2d(2) if ends == "pool" else nn.AvgPool2d(2)
    ann = nn.Sequential(pool, nn.Conv2d(1, 3, 2), nn.ReLU(), nn.Flatten(), nn.Linear(27, 3))
    counts = RateCodedNetwork(converted(ann)).run(torch.rand(2, 1, 8, 8), STEPS).counts
    assert counts["synops"]["2"].sum() > 0
    assert torch.equal(counts["graded_synops"]["2"], counts["synops"]["2"])
    assert counts["graded_synops"]["output"].tolist() == [0, 0]


# ------------------------------------------------------------------------------------------ one at a time


class Graph(nn.Module):
    """A residual block, a pool that two layers hear, branches that are concatenated, and an average."""

    def __init__(self):
        super().__init__()
        self.stem, self.inner = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.left, self.right = nn.Conv2d(4, 3, 1), nn.Conv2d(4, 2, 3, stride=2, padding=1)
        self.pool, self.head = nn.MaxPool2d(2), nn.Linear(5 * 4, 3)
        with torch.no_grad():
            self.right.bias.zero_()

    def forward(self, x):
        x = F.relu(self.stem(x))
        x = self.pool(F.relu(x + self.inner(x)))
        left, right = F.avg_pool2d(F.relu(self.left(x)), 2), F.relu(self.right(x))
        return self.head(torch.cat([left, right], 1).flatten(1))


def test_on_a_graph_each_spike_of_each_step_counts_at_each_synapse(images):
    snn = converted(Graph())
    rate = RateCodedNetwork(snn)
    layers = ["relu", "relu_2", "relu_3", "relu_4"]
    result, given = recorded(rate, images, STEPS, [*layers, "pool", "output"])
    judge = OneByOne(snn, snn.run(images))
    pixels = next(node for node in judge.fired if node.op == "placeholder")
    emitted = {"input": (images != 0).expand(STEPS, *images.shape)} | {name: each != 0 for name, each in given.items()}
    synops, graded = {}, {}
    for name, node in judge.layers.items():
        synops[name], graded[name] = [0] * len(images), [0] * len(images)
        for source, matrix in judge.synapses(node).items():
            spikes = emitted["input" if source is pixels else str(source.target)]
            for image in range(len(images)):
                delivered = sum(int(matrix[step.flatten()].sum()) for step in spikes[:, image])
                synops[name][image] += delivered
                graded[name][image] += delivered if source is pixels else 0
    assert as_lists(result.counts["synops"]) == synops
    assert as_lists(result.counts["graded_synops"]) == graded
    assert as_lists(result.counts["spikes"]) == {
        name: [int(emitted[name][:, image].sum()) for image in range(len(images))] for name in layers
    }
    # The pool's windows are apart: a spike is in one, and its events stand with the first layer that hears it.
    pooled = [int(emitted["relu_2"][:, image].sum()) for image in range(len(images))]
    nothing = dict.fromkeys(("relu", "relu_2", "relu_4", "output"), [0] * len(images))
    assert as_lists(result.counts["pool_events"]) == {**nothing, "relu_3": pooled}


class Skip(nn.Module):
    """A shortcut past a layer: in time to first spike it waits, in rate code it does not."""

    def __init__(self):
        super().__init__()
        self.stem, self.first, self.second = (nn.Linear(n, 6) for n in (64, 6, 6))
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        x = self.stem(x.flatten(1)).relu()
        return self.head(F.relu(self.second(self.first(x).relu()) + x))


def test_a_shortcut_does_not_wait(images):
    snn = converted(Skip())
    assert any(isinstance(module, AxonalDelay) for module in snn.graph_module.modules())
    _, given = recorded(RateCodedNetwork(snn), images, STEPS, ["relu", "relu_2", "relu_3"])
    net, neurons, spikes = snn.graph_module, snntorch.Leaky(beta=1.0, reset_mechanism="subtract"), []
    mem = neurons.init_leaky()
    with torch.no_grad():
        for short, long in zip(given["relu"], given["relu_2"], strict=True):
            out, mem = neurons(net.second(long) + net.add_gain.weight * short + net.relu_3.bias, mem)
            spikes.append(out)
    assert torch.equal(given["relu_3"], torch.stack(spikes))
    assert given["relu"].any()
    assert given["relu_3"].any()


def test_merged_operations_are_the_neuron_steps_in_which_a_current_arrives(images):
    snn = converted(cnn())
    rate = RateCodedNetwork(snn)
    result, given = recorded(rate, images, STEPS, ["0", "3", "6"])
    for layer, path in (("1", "0"), ("4", "3"), ("output", "6")):
        bias = dict(snn.graph_module.named_modules())[layer].bias
        by_hand = ((given[path].abs() > 1e-6) | (bias != 0)).sum(0).flatten(1).sum(1)
        assert torch.equal(result.counts["synops_merged"][layer], by_hand)


def test_neurons_are_updated_and_biased_at_every_step(images):
    counts = RateCodedNetwork(converted(cnn())).run(images, STEPS).counts
    neurons, biased = {"1": 256, "4": 24, "output": 3}, {"1": 192, "4": 24, "output": 3}
    for name, each in (("neuron_updates", neurons), ("active_updates", neurons), ("bias_events", biased)):
        assert as_lists(counts[name]) == {layer: [STEPS * number] * 3 for layer, number in each.items()}, name
    for name, synops in (("operations", "synops_merged"), ("operations_strict", "synops")):
        for layer, number in neurons.items():
            assert torch.equal(counts[name][layer], counts[synops][layer] + STEPS * number)
    for of_layers in counts.values():
        assert all(count.dtype == torch.int64 and count.shape == (3,) for count in of_layers.values())


def test_a_batch_costs_what_its_images_cost(images):
    rate = RateCodedNetwork(converted(cnn()))
    whole = rate.run(images, STEPS)
    for index in range(len(images)):
        alone = rate.run(images[index : index + 1], STEPS)
        torch.testing.assert_close(alone.logits[0], whole.logits[index])
        for name, of_layers in whole.counts.items():
            for layer, count in of_layers.items():
                assert alone.counts[name][layer].tolist() == [count[index]], (name, layer)


def test_its_counts_have_an_energy_beside_those_of_ann_and_quartz(images):
    ann = cnn()
    snn = converted(ann, rectifier="silent")
    rate = RateCodedNetwork(snn).run(images, 64)
    counts = {name: float(sum(of_layers.values()).double().mean()) for name, of_layers in rate.counts.items()}
    energy = HOROWITZ_FLOAT32.energy(counts)
    by_hand = 0.9e-12 * (counts["synops"] + counts["active_updates"]) + 3.7e-12 * counts["graded_synops"]
    assert energy == pytest.approx(by_hand)
    quartz = HOROWITZ_FLOAT32.energy(InferenceCounts(snn.graph, snn.run(images)).mean())
    assert quartz < HOROWITZ_FLOAT32.energy(ann_costs(ann, images), of="ann") < energy


# ------------------------------------------------------------------------------------------- the same ANN


class Residual(nn.Module):
    """A residual block, branches that are concatenated; no max pooling, which takes the fastest of its rates."""

    def __init__(self):
        super().__init__()
        self.stem, self.inner = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.side, self.head = nn.Conv2d(4, 3, 1), nn.Linear(7, 3)

    def forward(self, x):
        x = F.relu(self.stem(x))
        x = F.relu(x + self.inner(x))
        return self.head(torch.cat([x, F.relu(self.side(x))], 1).mean((2, 3)))


class Rectified(nn.Sequential):
    """Ends in a ReLU: the output spikes."""

    def __init__(self):
        super().__init__(nn.Flatten(), nn.Linear(64, 10), nn.ReLU(), nn.Linear(10, 5), nn.ReLU())


@pytest.mark.parametrize("options", [{}, {"granularity": "channel"}, quartz_plugin.PAPER, {"linear": "pair"}], ids=str)
@pytest.mark.parametrize("network", [lambda: cnn(pool=False), Residual, Rectified], ids=["chain", "graph", "rectified"])
def test_after_many_steps_it_says_what_the_ann_says(network, options, images):
    # Calibrated on the same images: a rate is at most 1.
    ann = network()
    rate = RateCodedNetwork(converted(ann, images, percentile=100, **options))
    wanted = ann(images)
    errors = [float((rate(images, steps) - wanted).abs().max()) for steps in (8, 400)]
    assert errors[1] < 0.02 * float(wanted.abs().max()) + 0.005
    assert errors[1] < errors[0]


def test_an_output_that_is_rectified_spikes(images):
    snn = converted(Rectified(), percentile=100)
    result, given = recorded(RateCodedNetwork(snn), images, STEPS, ["4"])
    assert set(given["4"].unique().tolist()) == {0.0, 1.0}
    assert result.counts["spikes"]["4"].tolist() == given["4"].sum((0, 2)).tolist()
    torch.testing.assert_close(result.logits, given["4"].mean(0) * snn.graph.output_scale)


def test_each_run_starts_anew_and_the_converted_network_is_as_it_was(images):
    snn = converted(cnn())
    before, logits = {name: value.clone() for name, value in snn.state_dict().items()}, snn(images)
    rate = RateCodedNetwork(snn)
    first = rate(images, 5)
    rate(torch.rand(7, 1, 8, 8), 3)
    assert torch.equal(rate(images, 5), first)
    with pytest.raises(KeyboardInterrupt):
        _interrupted(rate, images)
    assert torch.equal(rate(images, 5), first)
    assert all(torch.equal(value, before[name]) for name, value in snn.state_dict().items())
    assert torch.equal(snn(images), logits)
    assert not first.requires_grad


def _interrupted(rate, images):
    """A run that is stopped in its third step."""
    seen = []

    def stop(module, inputs, out):
        seen.append(out)
        if len(seen) == 3:
            raise KeyboardInterrupt

    hook = rate.net.get_submodule("3").register_forward_hook(stop)
    try:
        rate.run(images, 8)
    finally:
        hook.remove()


def test_it_leaves_nothing_in_snntorchs_list_of_neurons(images):
    before = len(snntorch.SpikingNeuron.instances)
    rate = RateCodedNetwork(converted(cnn()))
    rate(images, 3)
    copy.deepcopy(rate)(images, 3)
    assert len(snntorch.SpikingNeuron.instances) == before


def test_a_copy_says_the_same(images):
    rate = RateCodedNetwork(converted(cnn()))
    wanted = rate(images, 6)
    assert torch.equal(copy.deepcopy(rate)(images, 6), wanted)


def test_moved_to_another_type_it_runs_in_it(images):
    rate = RateCodedNetwork(converted(cnn()))
    wanted = rate(images, 6)
    moved = rate.double()(images, 6)
    assert moved.dtype == torch.float64
    torch.testing.assert_close(moved.float(), wanted)


# ------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    "options", [{"layers": {"1": {"t_max": 8}}}, {"layers": {"input": {"t_max": 31}}}, {"weight_bits": 8}], ids=str
)
def test_weights_that_hold_more_than_the_anns_are_refused(options):
    with pytest.raises(ValueError, match=r"convert without layers=.*and without weight_bits"):
        RateCodedNetwork(converted(cnn(), **options))


def test_what_cannot_be_run_is_refused(images):
    rate = RateCodedNetwork(converted(cnn()))
    for steps in (0, -1):
        with pytest.raises(ValueError, match=f"steps must be at least 1, got {steps}"):
            rate(images, steps)
    with pytest.raises(ValueError, match=r"\[B, 1, 8, 8\], got \[3, 8, 8\]"):
        rate(images[:, 0], 4)
    with pytest.raises(ValueError, match=r"must lie in \[0, 1\]"):
        rate(images * 2, 4)
