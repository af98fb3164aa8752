"""Operation counts, judged by counting spikes, synapses, windows and neurons one at a time."""

from importlib.util import find_spec
from unittest import mock

import pytest
import torch
from helpers.conversions import conversions
from helpers.one_by_one import OneByOne, as_lists, changes_on_the_clock
from helpers.random_chains import SOME, chains
from helpers.random_graphs import make_exact
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

import quartz_plugin
from quartz_plugin.costs import COUNTS, InferenceCounts, neuron_count, synaptic_operations
from quartz_plugin.costs import spikes as spike_counting
from quartz_plugin.costs.counts import (
    changes_step_by_step,
    merged_operations,
    quartz_operations,
    source_levels,
)
from quartz_plugin.costs.spikes import early_spike_counts, spike_counts, sums_of_steps, zero_spike_counts
from quartz_plugin.engines.event import count_changes

FEW = settings(SOME, max_examples=max(1, settings().max_examples // 2))

EVENTS = ("bias_events", "readout_events", "rectifier_events", "hold_events")


def active_updates(snn, result):
    """Layer -> for each image, the steps of each neuron in which it may hear or say something.

    From the first step of its input window, or the earliest spike of its sources where that is before, until it has
    fired or is switched off.
    """
    judge, counts = OneByOne(snn, result), {}
    for layer in snn.graph.layers:
        p, node = layer.neuron.p, judge.layers[layer.name]
        never = p.readout + (2 if p.rectifier is None else 1) * (p.t_max - 1)
        arrivals = [
            [step + judge.delay(node.args[0], source) for step in judge.first_steps(source)]
            for source in judge.behind(node)[1]
        ]
        counts[layer.name] = []
        for image, steps in enumerate(result.spike_steps[layer.name].unsqueeze(-1).flatten(1).tolist()):
            start = min([p.readout - p.input_window, *(arrival[image] for arrival in arrivals)])
            ends = [step if step >= 0 else never for step in steps]
            counts[layer.name].append(sum(len(range(start, end + 1)) for end in ends))
    return counts


@SOME
@given(conversions(exact=True))
def test_each_spike_counts_at_each_synapse_and_window_that_it_reaches(conversion):
    net, snn = conversion
    result = snn.run(net.images)
    counts, judge = InferenceCounts(snn.graph, result), OneByOne(snn, result)
    assert as_lists(counts["synops"]) == judge.synops()
    assert as_lists(counts["synops_factored"]) == judge.synops_factored()
    pooled = [sum(of_image) for of_image in zip(*judge.windows().values(), strict=True)] or [0] * len(net.images)
    assert sum(counts["pool_events"].values()).tolist() == pooled
    assert as_lists(counts["spikes"]) == {
        name: [sum(step >= 0 for step in image) for image in steps.unsqueeze(-1).flatten(1).tolist()]
        for name, steps in result.spike_steps.items()
    }


@given(chains(), st.sampled_from(["spike", "silent"]), st.integers(2, 9))
def test_factored_operations_of_a_chain_are_those_of_each_map_that_software_runs(chain, rectifier, t_max):
    snn = chain.convert(t_max, rectifier=rectifier)
    result = snn.run(chain.images)
    counted = InferenceCounts(snn.graph, result)["synops_factored"]
    assert as_lists(counted) == OneByOne(snn, result).synops_factored()


@SOME
@given(conversions(exact=True), st.booleans())
def test_spikes_are_counted_one_by_one_with_and_without_numba(conversion, compiled):
    net, snn = conversion
    with mock.patch.object(spike_counting, "find_spec", find_spec if compiled else lambda name: None):
        result = snn.run(net.images)
        found = {
            count.__name__: as_lists(count(result))
            for count in (spike_counts, zero_spike_counts, early_spike_counts, sums_of_steps)
        }
    for name, steps in result.spike_steps.items():
        images = [image.flatten().tolist() for image in steps]
        window = result.windows[name]
        assert found["spike_counts"][name] == [sum(step >= 0 for step in image) for image in images]
        assert found["zero_spike_counts"][name] == [image.count(window.end) for image in images]
        assert found["sums_of_steps"][name] == [sum(image) for image in images]
        if name != "input":
            assert found["early_spike_counts"][name] == [
                sum(0 <= step < window.start for step in image) for image in images
            ]
    assert "input" not in found["early_spike_counts"]


@SOME
@given(conversions(exact=True))
def test_merged_operations_are_the_changes_of_current_on_the_global_clock(conversion):
    net, snn = conversion
    result = snn.run(net.images)
    expected = as_lists(changes_on_the_clock(snn, net.images))
    assert as_lists(merged_operations(snn.graph, result)) == expected
    levels = source_levels(snn.graph, result)
    stepped = {
        layer.name: changes_step_by_step(layer, {node: levels[node] for node in layer.projection.sources}).tolist()
        for layer in snn.graph.layers
    }
    assert stepped == expected


@pytest.mark.parametrize("exact_bias", [-1.0, -1.125, -1.5, 1.25])
def test_bias_spikes_before_and_after_the_window_change_currents_until_the_last_step_alone(exact_bias):
    """Of biases below -1, the spike comes when a rectified neuron is done."""
    ann = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))
    images = torch.rand(20, 4)
    snn = make_exact(quartz_plugin.convert(ann, images, 9, **quartz_plugin.PAPER))
    snn.graph.layers[1].neuron.bias.fill_(exact_bias)
    result = snn.run(images)
    expected = changes_on_the_clock(snn, images)
    levels = source_levels(snn.graph, result)
    by_event = count_changes(snn.graph, levels)
    for layer in snn.graph.layers:
        stepped = changes_step_by_step(layer, {node: levels[node] for node in layer.projection.sources})
        assert torch.equal(stepped, expected[layer.name]), layer.name
        assert torch.equal(by_event[layer.name], stepped), layer.name


# T of a layer is half the steps of its two windows, of what it hears and its own: 4 and 3, 3 and 5, 5 and 6.
OWN_WINDOWS = {"input": {"t_max": 4}, "m1": {"t_max": 3}, "output": {"t_max": 6}}
OWN_T_MAX = {"m1": 3.5, "relu": 4, "output": 5.5}

EVERY_NEURON = pytest.mark.parametrize(
    "options",
    [
        {},
        {"hold": False},
        {"rectifier": "silent"},
        {"hold": False, "rectifier": "silent"},
        quartz_plugin.PAPER,
        {"layers": OWN_WINDOWS},
        {"layers": {"m1": {"t_max": 8}}, "rectifier": "silent", "hold": False},
    ],
    ids=lambda options: ", ".join(f"{key}={value}" for key, value in options.items()) or "held",
)


class Small(nn.Module):
    """Pools, pads, skips and ends signed; some biases are 0."""

    def __init__(self):
        super().__init__()
        self.m0, self.m2, self.m5 = nn.Conv2d(1, 3, 3, padding=1), nn.Conv2d(3, 3, 3, padding=1), nn.Linear(12, 4)
        self.m1, self.m4 = nn.ReLU(), nn.MaxPool2d(3, 2, 1)
        with torch.no_grad():
            self.m0.bias.copy_(torch.tensor([0.1, 0.0, 0.2]))
            self.m2.bias.zero_()
            self.m5.bias.copy_(torch.tensor([0.3, 0.0, -0.1, 0.1]))

    def forward(self, x):
        x = self.m1(self.m0(x))
        x = F.relu(x + self.m2(x))
        return self.m5(self.m4(x).flatten(1))


NEURONS = {"m1": 48, "relu": 48, "output": 4}
BIASED = {"m1": 32, "relu": 0, "output": 3}


@pytest.fixture
def images():
    images = torch.rand(6, 1, 4, 4)
    images[0] = 0.0
    images[1] = 1.0
    return images


def converted(t_max=5, **options):
    torch.manual_seed(2)
    return quartz_plugin.convert(Small(), torch.rand(60, 1, 4, 4), t_max, percentile=90, **options)


@EVERY_NEURON
def test_events_at_the_neurons_are_one_for_each_that_has_them(options, images):
    snn = converted(**options)
    counts = InferenceCounts(snn.graph, snn.run(images))
    hold = 2 if options.get("hold", True) else 0
    # A bias that is said by a spike has one even to say 0.
    biased = {"m1": 48, "relu": 0, "output": 4} if options.get("bias") == "spike" else BIASED
    expected = {
        "bias_events": biased,
        "readout_events": NEURONS,
        "rectifier_events": NEURONS | {"output": 0},
        "hold_events": {name: hold * neurons for name, neurons in NEURONS.items()},
        "neuron_updates": {name: neurons * snn.n_steps for name, neurons in NEURONS.items()},
    }
    for name, by_layer in expected.items():
        assert as_lists(counts[name]) == {layer: [each] * len(images) for layer, each in by_layer.items()}, name
    # Every unit of the pool is in one window at the border's corner, in two or four within.
    fired = (counts.result.spike_steps["relu"] >= 0).long()
    windows = torch.tensor([[1, 2, 1, 1], [2, 4, 2, 2], [1, 2, 1, 1], [1, 2, 1, 1]])
    pooled = (fired * windows).sum((1, 2, 3)).tolist()
    assert as_lists(counts["pool_events"]) == {"m1": [0] * 6, "relu": [0] * 6, "output": pooled}


@EVERY_NEURON
def test_a_neuron_is_active_from_its_first_spike_on_until_it_has_fired(options, images):
    snn = converted(**options)
    result = snn.run(images)
    counts, expected = InferenceCounts(snn.graph, result), active_updates(snn, result)
    assert as_lists(counts["active_updates"]) == expected
    assert as_lists(counts["inactive_updates"]) == {
        layer: [NEURONS[layer] * result.n_steps - active for active in each] for layer, each in expected.items()
    }


def test_neurons_that_hear_early_spikes_are_active_from_then_on(images):
    """The input window of the layer begins at step 4, and of one image a spike comes at step 1."""
    snn = converted(hold=False)
    result = snn.run(images[:2])
    result.spike_steps["m1"].fill_(6)
    result.spike_steps["m1"][1, 0, 0, 0] = 1
    result.spike_steps["relu"].fill_(9)
    result.spike_steps["relu"][:, 0, 0, :2] = torch.tensor([4, 6])
    counted = InferenceCounts(snn.graph, result)["active_updates"]
    assert counted["relu"].tolist() == [1 + 3 + 46 * 6, 4 + 6 + 46 * 9]


class Pools(nn.Module):
    """Pools in a row, over a branch and the image side by side; two layers hear the second."""

    def __init__(self):
        super().__init__()
        self.stem, self.head = nn.Conv2d(1, 2, 1), nn.Linear(2 * 2 * 3 * 2, 3)
        self.left, self.right = nn.Conv2d(3, 2, 1), nn.Conv2d(3, 2, 1)
        self.first, self.second = nn.MaxPool2d(3, 2, 1), nn.MaxPool2d(2, 1)

    def forward(self, x):
        x = self.second(self.first(torch.cat([self.stem(x).relu(), x], 1)))
        return self.head(torch.cat([self.left(x).relu(), self.right(x).relu()], 1).flatten(1))


@pytest.mark.parametrize("rectifier", ["spike", "silent"])
def test_pools_in_a_row_count_once_with_the_first_layer_that_hears_them(rectifier):
    images = torch.rand(20, 1, 6, 8)
    snn = quartz_plugin.convert(Pools(), images, 5, percentile=100, rectifier=rectifier)
    result = snn.run(images[:4])
    pooled = [sum(of_image) for of_image in zip(*OneByOne(snn, result).windows().values(), strict=True)]
    assert len(OneByOne(snn, result).windows()) == 2
    counted = as_lists(InferenceCounts(snn.graph, result)["pool_events"])
    assert counted == dict.fromkeys(("relu", "relu_3", "output"), [0] * 4) | {"relu_2": pooled}


@FEW
@given(conversions(exact=True), st.data())
def test_active_and_inactive_updates_are_all_updates_and_batches_their_images(conversion, data):
    net, snn = conversion
    result = snn.run(net.images)
    counts = InferenceCounts(snn.graph, result)
    chosen = data.draw(st.integers(0, len(net.images) - 1))
    alone = InferenceCounts(snn.graph, snn.run(net.images[chosen : chosen + 1]))
    for name in COUNTS:
        for layer, count in counts[name].items():
            assert count.dtype == torch.int64, name
            assert count.shape == (len(net.images),), name
            assert count[chosen : chosen + 1].equal(alone[name][layer]), (name, layer)
    for layer in snn.graph.layers:
        active, inactive = (counts[f"{kind}active_updates"][layer.name] for kind in ("", "in"))
        assert torch.equal(active + inactive, counts["neuron_updates"][layer.name])
    assert as_lists(counts["active_updates"]) == active_updates(snn, result)


@pytest.mark.parametrize("own", [False, True], ids=["windows alike", "windows of their own"])
def test_operations_and_memory_accesses_are_the_papers_formulas_layer_by_layer(images, own):
    snn = converted(5, layers=OWN_WINDOWS) if own else converted(5)
    counts = InferenceCounts(snn.graph, snn.run(images))
    for layer, neurons in NEURONS.items():
        steps = neurons * (OWN_T_MAX[layer] if own else 5)
        merged, strict = counts["synops_merged"][layer], counts["synops"][layer]
        assert (merged > 0).all()
        assert (strict > merged).any()
        assert (counts["operations"][layer] - merged == 2 * steps).all(), layer
        assert (counts["operations_strict"][layer] - strict == 2 * steps).all(), layer
        assert (counts["memory_reads"][layer] - merged == 4 * steps).all(), layer
        assert (counts["memory_writes"][layer] - merged == steps).all(), layer


def test_a_half_operation_is_none():
    assert quartz_operations(torch.tensor(10), neurons=3, t_max=2.5, of_neurons=1) == 17
    assert quartz_operations(torch.tensor(10), neurons=3, t_max=2.5) == 25


def test_spikes_that_say_zero_or_come_early_are_counted_as_such(images):
    snn = converted(hold=False)
    result = snn.run(images)
    counts = InferenceCounts(snn.graph, result)
    # The readout is at 4, 8 and 12; the input says 0 at 4, the others four steps behind their readout.
    for number, (layer, steps) in enumerate(result.spike_steps.items()):
        image_by_image = [image.flatten().tolist() for image in steps]
        zeros = [sum(step == 4 * (number + 1) for step in image) for image in image_by_image]
        assert counts["zero_spikes"][layer].tolist() == zeros
        if layer == "input":
            assert layer not in counts["early_spikes"]
            continue
        early = [sum(0 <= step < 4 * number for step in image) for image in image_by_image]
        assert counts["early_spikes"][layer].tolist() == early
    assert sum(counts["early_spikes"].values()).sum() > 0
    assert counts["zero_spikes"]["input"].tolist()[:2] == [16, 0]
    quiet = InferenceCounts(snn.graph, converted(rectifier="silent").run(images))
    assert all(count.sum() == 0 for layer, count in quiet["zero_spikes"].items() if layer != "output")


def test_no_synapse_of_a_converted_network_multiplies(images):
    snn = converted()
    assert sum(InferenceCounts(snn.graph, snn.run(images))["graded_synops"].values()).tolist() == [0] * len(images)


def test_means_are_over_images_in_total_and_by_layer(images):
    snn = converted()
    counts = InferenceCounts(snn.graph, snn.run(images))
    means = counts.mean()
    assert list(counts) == list(COUNTS)
    for name in COUNTS:
        for layer, count in counts[name].items():
            assert means[f"{name}/{layer}"] == pytest.approx(sum(count.tolist()) / len(images))
        assert means[name] == pytest.approx(sum(means[f"{name}/{layer}"] for layer in counts[name]))
    assert counts.mean("synops") == {
        name: means[name] for name in ("synops", "synops/m1", "synops/relu", "synops/output")
    }


def test_an_empty_batch_counts_nothing():
    snn = converted()
    counts = InferenceCounts(snn.graph, snn.run(torch.zeros(0, 1, 4, 4)))
    for name in COUNTS:
        assert all(count.shape == (0,) and count.dtype == torch.int64 for count in counts[name].values()), name


def test_unknown_counts_and_results_without_spikes_are_refused(images):
    snn = converted()
    counts = InferenceCounts(snn.graph, snn.run(images))
    with pytest.raises(ValueError, match=r"no count is called 'sinops'; there are spikes.*memory_writes"):
        counts["sinops"]
    with pytest.raises(ValueError, match="no count is called 'sinops'"):
        counts.mean("spikes", "sinops")
    with pytest.raises(ValueError, match="record=True"):
        InferenceCounts(snn.graph, snn.run(images, record=False))


class TestEdits:
    """Counts are kept for all who ask, and found anew where something is another."""

    def test_a_spike_taken_away_in_place_is_counted_no_more(self, images):
        snn = converted()
        result = snn.run(images)
        before = as_lists(InferenceCounts(snn.graph, result)["synops"])
        # A unit of m1 within reaches 9 places of 3 channels; its own neuron is one of them.
        result.spike_steps["m1"][2, 0, 1, 2] = -1
        counts = InferenceCounts(snn.graph, result)
        assert counts["spikes"]["m1"].tolist() == [48, 48, 47, 48, 48, 48]
        assert before["relu"][2] - counts["synops"]["relu"][2] == 27
        assert [a == b for a, b in zip(before["relu"], counts["synops"]["relu"].tolist(), strict=True)].count(True) == 5
        assert counts["synops"]["m1"].tolist() == before["m1"]
        assert counts.sums(["spikes", "synops"], ["m1"]).tolist() == [[287], [sum(before["m1"])]]

    def test_spikes_put_in_the_place_of_others_are_counted_each_time(self, images):
        snn = converted()
        result = snn.run(images)
        original = result.spike_steps["m1"]
        for lost in range(20):
            result.spike_steps["m1"] = original.masked_fill(torch.arange(48).view(3, 4, 4) < lost, -1)
            counted = InferenceCounts(snn.graph, result)["spikes"]["m1"]
            assert counted.tolist() == [48 - lost] * len(images)

    def test_spikes_edited_in_inference_mode_are_counted_anew(self, images):
        snn = converted()
        with torch.inference_mode():
            result = snn.run(images)
            assert InferenceCounts(snn.graph, result)["spikes"]["m1"].tolist() == [48] * 6
            result.spike_steps["m1"][:, 0] = -1
            assert InferenceCounts(snn.graph, result)["spikes"]["m1"].tolist() == [32] * 6

    def test_an_edited_structure_has_its_own_synapses(self, images):
        snn = converted()
        before = InferenceCounts(snn.graph, snn.run(images))["synops"]["relu"]
        conv = snn.graph_module.m2
        snn.graph_module.m2 = nn.Conv2d(3, 3, 1, bias=False)
        snn.graph_module.m2.weight.data = conv.weight.data[:, :, 1:2, 1:2]
        result = snn.run(images)
        counts = InferenceCounts(snn.graph, result)
        assert (before == 3 * 3 * 10 * 10).all()
        assert (counts["synops"]["relu"] == 3 * 3 * 16).all()
        assert as_lists(counts["synops"]) == OneByOne(snn, result).synops()

    def test_a_branch_that_is_cut_off_has_no_synapses(self, images):
        snn = converted()
        whole = InferenceCounts(snn.graph, snn.run(images))
        assert whole["synops"]["relu"].tolist() == [900] * 6
        nodes = {node.name: node for node in snn.graph_module.graph.nodes}
        nodes["add"].replace_all_uses_with(nodes["add_gain"])
        for name in ("add", "m2"):
            snn.graph_module.graph.erase_node(nodes[name])
        snn.graph_module.recompile()
        counts = InferenceCounts(snn.graph, snn.run(images))
        assert counts["synops"]["relu"].tolist() == [48] * 6
        assert counts["synops_factored"]["relu"].tolist() == [48] * 6

    def test_a_bias_that_is_edited_is_counted_in_the_next_result(self, images):
        snn = converted()
        assert InferenceCounts(snn.graph, snn.run(images))["bias_events"]["m1"].tolist() == [32] * 6
        snn.graph.layers[0].neuron.bias[1] = 0.5
        assert InferenceCounts(snn.graph, snn.run(images))["bias_events"]["m1"].tolist() == [48] * 6

    def test_two_networks_count_the_same_result_each_with_its_own_synapses(self, images):
        snn, pruned = converted(), converted()
        pruned.graph_module.m2 = nn.Conv2d(3, 3, 3, padding=1, groups=3, bias=False)
        result = snn.run(images)
        assert synaptic_operations(snn.graph, result)["relu"].tolist() == [900] * 6
        assert synaptic_operations(pruned.graph, result)["relu"].tolist() == [300] * 6
        assert synaptic_operations(snn.graph, result)["relu"].tolist() == [900] * 6


def test_neurons_are_relu_outputs_and_logits():
    assert neuron_count(converted().graph) == sum(NEURONS.values())


class Shared(nn.Module):
    """A map that two layers hear, and maps in a row."""

    def __init__(self):
        super().__init__()
        self.stem, self.narrow, self.wide, self.head = (nn.Linear(*s) for s in ((4, 6), (6, 2), (2, 5), (7, 3)))

    def forward(self, x):
        narrow = self.narrow(self.stem(x).relu())
        return self.head(torch.cat([self.wide(narrow).relu(), narrow.relu()], 1))


def test_a_map_that_two_layers_hear_is_computed_once_and_composed_twice():
    images = torch.rand(60, 4)
    snn = quartz_plugin.convert(Shared(), images, 5)
    counts = InferenceCounts(snn.graph, snn.run(images[:1]))
    assert as_lists(counts["synops"]) == {"relu": [24], "relu_2": [6 * 5], "relu_3": [6 * 2], "output": [21]}
    # relu_3 hears what was computed for relu_2.
    gains = 2 * ("relu_3_gain" in dict(snn.graph_module.named_modules()))
    assert as_lists(counts["synops_factored"]) == {"relu": [24], "relu_2": [12 + 10], "relu_3": [gains], "output": [21]}


class Copies(nn.Module):
    """Behind its map, outputs are copied, and of others none is used."""

    def __init__(self, copies):
        super().__init__()
        self.map, self.copies = nn.Linear(4, 3), copies

    def forward(self, x):
        x = self.map(x)
        return torch.cat([x, x], 1).relu() if self.copies else x[:, :1].relu()


@pytest.mark.parametrize(("copies", "composed"), [(True, 4 * 6), (False, 4)])
def test_factored_operations_do_not_depend_on_where_a_maps_outputs_go(copies, composed):
    images = torch.rand(20, 4)
    snn = quartz_plugin.convert(Copies(copies), images, 5)
    counts = InferenceCounts(snn.graph, snn.run(images[:2]))
    assert as_lists(counts["synops"]) == {"relu": [composed] * 2}
    assert as_lists(counts["synops_factored"]) == {"relu": [4 * 3] * 2}
