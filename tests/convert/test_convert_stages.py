"""The stages of conversion, one by one."""

import copy

import numpy as np
import pytest
import torch
from helpers.random_chains import SOME, normalise
from hypothesis import given
from hypothesis import strategies as st
from torch import fx, nn

import quartz_plugin
from quartz_plugin.coding import NeuronClock
from quartz_plugin.convert.check import check
from quartz_plugin.convert.fold import fold
from quartz_plugin.convert.images import chunks, peek
from quartz_plugin.convert.rescale import ScaledLayer, ScaledNetwork
from quartz_plugin.convert.schedule import schedule
from quartz_plugin.convert.sketches import QuantileSketch
from quartz_plugin.convert.trace import trace
from quartz_plugin.layout import as_stored
from quartz_plugin.operators.table import OPERATORS, REASONS, Role
from quartz_plugin.task import by_output


def randomise(norm):
    with torch.no_grad():
        norm.running_mean.normal_(0, 0.5)
        norm.running_var.uniform_(0.2, 3)
        if norm.affine:
            norm.weight.normal_(0.5, 1)
            norm.bias.normal_(0, 0.5)
    return norm


def sketch_of(*parts, channels=1, bins=512):
    sketch = QuantileSketch(channels, bins)
    for part in parts:
        sketch.update(part if part.dim() == 2 else part.unsqueeze(0))
    return sketch


def assert_same_sketch(one, other):
    assert one.top_octave == other.top_octave
    assert torch.equal(one.counts, other.counts)
    assert torch.equal(one.zeros, other.zeros)
    assert torch.equal(one.largest, other.largest)


class TestQuantileSketch:
    def test_values_count_alike_in_whatever_order_they_are_stored(self):
        values = torch.rand(3, 4, 5, 6)
        stored_last = values.contiguous(memory_format=torch.channels_last)
        one, other = (sketch_of(by_output(each), channels=4, bins=64) for each in (values, stored_last))
        assert_same_sketch(one, other)
        one, other = (sketch_of(as_stored(each)) for each in (values, stored_last))
        assert_same_sketch(one, other)

    @pytest.mark.parametrize("percentile", [1, 25, 50, 90, 99, 99.9])
    @pytest.mark.parametrize(
        "draw",
        [
            lambda values: values.uniform_(),
            lambda values: values.normal_().abs_() * 37.0,
            lambda values: values.log_normal_(0, 1),
            lambda values: values.exponential_() * 1e-6,
        ],
        ids=["uniform", "normal", "lognormal", "tiny"],
    )
    def test_meets_numpy_within_a_bin(self, draw, percentile):
        values = draw(torch.empty(200_000))
        got = float(sketch_of(*values.split(1777)).quantile(percentile))
        assert got == pytest.approx(np.percentile(values.numpy(), percentile), rel=1 / 512)

    @pytest.mark.parametrize("percentile", [10, 50, 69, 71, 90, 99])
    def test_counts_zeros(self, percentile):
        values = torch.rand(100_000)
        values[:70_000] = 0.0
        got = float(sketch_of(values).quantile(percentile))
        assert got == pytest.approx(np.percentile(values.numpy(), percentile), rel=2e-3, abs=1e-12)

    def test_is_exact_at_100(self):
        values = torch.randn(3, 1000).abs()
        assert torch.equal(sketch_of(values, channels=3).quantile(100).float(), values.amax(1))

    def test_keeps_channels_apart(self):
        values = torch.rand(4, 50_000) * torch.tensor([1.0, 10.0, 0.3, 7.0]).view(4, 1)
        got = sketch_of(*values.split(999, dim=1), channels=4, bins=64).quantile(99)
        np.testing.assert_allclose(got, np.percentile(values.numpy(), 99, axis=1), rtol=5e-3)

    def test_takes_a_growing_range(self):
        parts = [torch.rand(10_000) * 4.0**power for power in range(-6, 7)]
        values = torch.cat(parts)
        growing, falling = sketch_of(*parts), sketch_of(*reversed(parts))
        assert_same_sketch(growing, falling)
        for percentile in (50, 90, 99):
            expected = np.percentile(values.numpy(), percentile)
            assert float(growing.quantile(percentile)) == pytest.approx(expected, rel=2e-3)

    @SOME
    @given(st.lists(st.tuples(st.integers(0, 50), st.integers(-30, 30), st.integers(0, 2**16)), min_size=2, max_size=6))
    def test_two_merged_are_one_exactly(self, parts):
        tensors = []
        for count, power, seed in parts:
            generator = torch.Generator().manual_seed(seed)
            values = torch.rand(2, count, generator=generator) * 2.0**power
            tensors.append(torch.where(values > 0.7 * 2.0**power, 0.0, values))
        whole = sketch_of(*tensors, channels=2, bins=32)
        for cut in range(len(tensors) + 1):
            one = sketch_of(*tensors[:cut], channels=2, bins=32)
            one.merge(sketch_of(*tensors[cut:], channels=2, bins=32))
            assert_same_sketch(one, whole)

    def test_merging_leaves_the_other_alone(self):
        one, other = sketch_of(torch.rand(100) * 100), sketch_of(torch.rand(50))
        before = copy.deepcopy(other)
        one.merge(other)
        assert_same_sketch(other, before)

    def test_refuses_to_merge_another_shape(self):
        with pytest.raises(ValueError, match="differ in shape"):
            QuantileSketch(2, 64).merge(QuantileSketch(3, 64))

    def test_counts_every_value_once(self):
        values = torch.cat([torch.rand(1000), torch.zeros(10), torch.rand(100) * 1e-9, torch.full((3,), 2.0**20)])
        sketch = sketch_of(*values.split(100))
        assert int(sketch.counts.sum() + sketch.zeros.sum()) == len(values)

    def test_of_nothing_or_zeros_is_zero(self):
        assert sketch_of(torch.zeros(5)).quantile(50).tolist() == [0.0]
        assert sketch_of(torch.zeros(0)).quantile(100).tolist() == [0.0]

    def test_never_exceeds_the_largest_value(self):
        sketch = sketch_of(torch.full((1000,), 0.7))
        assert float(sketch.quantile(99)) <= 0.7 + 1e-7
        assert float(sketch.quantile(1)) == pytest.approx(0.7, rel=2e-3)


class TestScales:
    """Scales are percentiles of the unscaled ANN's own activations."""

    @pytest.fixture
    def ann(self):
        return nn.Sequential(
            nn.Conv2d(2, 6, 3, padding=1),
            randomise(nn.BatchNorm2d(6)),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(6, 8, 3),
            nn.ReLU(),
            nn.AvgPool2d(2),
            nn.Flatten(),
            nn.Linear(32, 16),
            nn.ReLU(),
            nn.Linear(16, 5),
        ).eval()

    def activations(self, ann, images):
        values = {}
        with torch.no_grad():
            for name, module in ann.named_children():
                images = module(images)
                if isinstance(module, nn.ReLU):
                    values[name] = images.numpy()
        return values | {"output": images.abs().numpy()}

    @pytest.mark.parametrize("percentile", [90, 99, 99.9, 100])
    def test_equal_numpys_percentiles(self, ann, percentile):
        images = torch.rand(1000, 2, 12, 12)
        scales = quartz_plugin.convert(ann, images, percentile=percentile, output_percentile=percentile).graph.scales
        for name, values in self.activations(ann, images).items():
            assert float(scales[name]) == pytest.approx(np.percentile(values, percentile), rel=5e-3), name

    def test_of_channels_equal_numpys_percentiles(self, ann):
        images = torch.rand(1500, 2, 12, 12)
        graph = quartz_plugin.convert(ann, images, percentile=98, granularity="channel").graph
        values = self.activations(ann, images)
        shapes = {name: tuple(scale.shape) for name, scale in graph.scales.items()}
        assert shapes == {"2": (6, 1, 1), "5": (8, 1, 1), "9": (16,), "output": ()}
        for name in ("2", "5", "9"):
            axes = (0, *range(2, values[name].ndim))
            expected = np.percentile(values[name], 98, axis=axes)
            # Rarely active channels have a percentile of 0: there the scale is their largest value.
            largest = values[name].max(axis=axes)
            expected = np.where(expected > 0, expected, np.where(largest > 0, largest, np.nan))
            known = ~np.isnan(expected)
            assert known.sum() > len(known) / 2
            np.testing.assert_allclose(graph.scales[name].flatten()[known], expected[known], rtol=2e-2)
            assert (graph.scales[name] > 0).all()

    def test_the_output_defaults_to_its_largest_size(self, ann):
        images = torch.rand(200, 2, 12, 12)
        snn = quartz_plugin.convert(ann, images)
        largest = self.activations(ann, images)["output"].max()
        assert snn.graph.output_scale == pytest.approx(largest, rel=1e-6)
        assert float(snn.graph.scales["output"]) == pytest.approx(largest, rel=1e-6)

    def test_are_measured_on_the_normalised_input(self, ann):
        images, preprocessing = torch.rand(500, 2, 12, 12), ([0.3, 0.6], [0.2, 0.4])
        scales = quartz_plugin.convert(ann, images, percentile=99, preprocessing=preprocessing).graph.scales
        for name, values in self.activations(ann, normalise(images, preprocessing).float()).items():
            percentile = 100 if name == "output" else 99
            assert float(scales[name]) == pytest.approx(np.percentile(values, percentile), rel=5e-3), name

    def test_a_layer_too_sparse_for_its_percentile_takes_its_largest_value(self):
        ann = nn.Sequential(nn.Linear(1, 1), nn.ReLU(), nn.Linear(1, 1))
        with torch.no_grad():
            ann[0].weight.fill_(1.0)
            ann[0].bias.fill_(-0.5)
        images = torch.full((1000, 1), 0.1)
        images[7] = 0.75
        scale = quartz_plugin.convert(ann, images, percentile=90).graph.scales["1"]
        assert float(scale) == pytest.approx(0.25)


class TestTrace:
    def test_every_node_calls_a_module_of_its_own(self):
        relu = nn.ReLU()
        ann = nn.Sequential(nn.Linear(3, 3), relu, nn.Sequential(nn.Linear(3, 3), relu), nn.Linear(3, 1))
        draft = trace(ann, torch.rand(1, 3))
        modules = [module for _, module in draft.steps()]
        assert len({id(module) for module in modules}) == len(modules) == 5
        assert [row["module"] for row in draft.report.values()] == [str(node.target) for node, _ in draft.steps()]
        assert all(one is not other for one in modules for other in ann.modules())

    def test_records_shapes(self):
        draft = trace(nn.Sequential(nn.Conv2d(1, 3, 3), nn.Flatten()), torch.rand(1, 1, 5, 4))
        assert [node.meta["shape"] for node, _ in draft.steps()] == [(3, 3, 2), (18,)]
        assert draft.input_shape == (1, 5, 4)


class TestFold:
    def test_the_network_still_computes_the_same(self):
        ann = nn.Sequential(
            nn.Identity(),
            randomise(nn.BatchNorm2d(2)),
            nn.Conv2d(2, 4, 3, padding=1),
            randomise(nn.BatchNorm2d(4)),
            nn.MaxPool2d(2),
            nn.ReLU(),
            nn.AvgPool2d(2),
            randomise(nn.BatchNorm2d(4, affine=False)),
            nn.Dropout(0.9),
            nn.Conv2d(4, 4, 1, groups=2, bias=False),
            randomise(nn.BatchNorm2d(4)),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(16, 3, bias=False),
            randomise(nn.BatchNorm1d(3)),
        )
        ann = ann.double().eval()
        draft = fold(trace(ann, torch.rand(1, 2, 8, 8).double()))
        images = torch.rand(20, 2, 8, 8).double()
        torch.testing.assert_close(draft.module(images), ann(images))
        kinds = [type(module) for _, module in draft.steps()]
        assert not {nn.BatchNorm1d, nn.BatchNorm2d, nn.Dropout, nn.Identity} & set(kinds)
        assert kinds.index(nn.ReLU) < kinds.index(nn.MaxPool2d)

    def test_a_batch_norm_of_positive_weights_goes_in_front_of_max_pooling(self):
        norm = randomise(nn.BatchNorm2d(4))
        norm.weight.data.abs_().add_(0.1)
        ann = nn.Sequential(nn.Conv2d(2, 4, 3), nn.MaxPool2d(2), norm, nn.ReLU(), nn.Flatten(), nn.Linear(16, 3)).eval()
        images = torch.rand(20, 2, 6, 6)
        snn = quartz_plugin.convert(ann, images, 1 << 20, percentile=100)
        torch.testing.assert_close(snn(images), ann(images).detach(), rtol=0, atol=1e-4)
        assert snn.report[2]["became"] == "folded into 0"
        norm.weight.data[1] = -0.1
        snn = quartz_plugin.convert(ann, images, 1 << 20, percentile=100)
        torch.testing.assert_close(snn(images), ann(images).detach(), rtol=0, atol=1e-4)
        assert [layer.name for layer in snn.graph.layers] == ["1_neurons", "3", "output"]

    def test_preprocessing_is_put_in_front(self):
        ann = nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(48, 2))
        preprocessing = ([0.3, 0.6], [0.2, 0.4])
        draft = fold(trace(ann.double(), torch.rand(1, 2, 4, 4).double()), preprocessing)
        images = torch.rand(5, 2, 4, 4)
        torch.testing.assert_close(draft.module(images.double()), ann(normalise(images, preprocessing)))

    def test_a_last_relu_goes_behind_what_merely_routes(self):
        ann = nn.Sequential(nn.Conv1d(1, 2, 2), nn.ReLU(), nn.Flatten(), nn.Dropout())
        draft = fold(trace(ann, torch.rand(1, 1, 4)))
        assert [type(module) for _, module in draft.steps()] == [nn.Conv1d, nn.Flatten, nn.ReLU]

    @pytest.mark.parametrize("bias", [True, False])
    @pytest.mark.parametrize("where", ["behind", "in front", "after pooling"])
    def test_batch_norm_is_exact_in_the_spiking_network(self, bias, where):
        norm = randomise(nn.BatchNorm2d(3))
        norm.bias.data += 0.5
        conv = nn.Conv2d(3, 3, 3, padding=1, bias=bias)
        front = {
            "behind": [conv, norm],
            "in front": [norm, conv],
            "after pooling": [conv, nn.AvgPool2d(2, padding=1), norm],
        }[where]
        ann = nn.Sequential(*front, nn.ReLU(), nn.Flatten(), nn.LazyLinear(4)).double().eval()
        images = torch.rand(50, 3, 6, 6)
        wanted = ann(images.double()).detach()
        snn = quartz_plugin.convert(ann, images, 1 << 20, percentile=100)
        torch.testing.assert_close(snn(images), wanted, rtol=0, atol=1e-4)


class TestCheck:
    def checked(self, *layers, shape=(1, 6, 6)):
        return check(fold(trace(nn.Sequential(*layers), torch.rand(1, *shape))))

    def test_gives_signed_values_in_front_of_a_pool_neurons(self):
        draft = self.checked(nn.Conv2d(1, 2, 3), nn.AvgPool2d(2), nn.MaxPool2d(2), nn.Conv2d(2, 1, 1))
        became = {path: row["became"] for path, row in draft.report.items()}
        assert became["2"] == "first-spike max pooling"
        assert became["2_neurons"] == "spiking layer"
        assert became["2_shifted"] == became["2_from_lowest"] == "part of the neurons' bias"

    def test_says_what_each_module_becomes(self):
        draft = self.checked(nn.Conv2d(1, 2, 3), nn.MaxPool2d(2), nn.ReLU(), nn.Flatten(), nn.Linear(8, 2))
        became = {path: row["became"] for path, row in draft.report.items()}
        assert became["0"] == "synapses"
        assert became["1"] == "first-spike max pooling, moved behind the ReLU"
        assert became["2"] == "spiking layer"
        assert became["3"] == "routing"

    def test_takes_max_pooling_of_the_input(self):
        draft = self.checked(nn.MaxPool2d(2), nn.Flatten(), nn.Linear(9, 2))
        assert draft.report["0"]["became"] == "first-spike max pooling"

    def test_every_operator_of_the_table_has_a_role_and_no_reason_to_be_refused(self):
        assert all(isinstance(row.role, Role) for row in OPERATORS.values())
        assert not set(OPERATORS) & set(REASONS)


class TestSchedule:
    def layer(self, bias=None, window=8, input_window=8):
        return ScaledLayer("x", bias, torch.ones(()), True, (1,), window, input_window)

    def chain(self, *layers):
        graph = fx.Graph()
        node, nodes = graph.placeholder("input"), {}
        for number, layer in enumerate(layers):
            node = graph.call_module(f"layer{number}", (node,))
            nodes[node] = layer
        graph.output(node)
        return ScaledNetwork(graph, {}, nodes)

    def test_a_layer_is_read_out_where_its_sources_windows_end(self):
        network = self.chain(*[self.layer(torch.tensor([3.0]))] * 3)
        times = schedule(network, input_window=8)
        assert list(times.clocks.values()) == [NeuronClock(8 * number, 8, 8) for number in (1, 2, 3)]
        assert not times.delays

    @pytest.mark.parametrize(("bias", "lead"), [([0.3, -9.0], 0), ([1.0], 0), ([1.25, 0.0], 2), ([1.5], 4), ([7.0], 4)])
    def test_bias_spikes_before_step_0_push_everything_back(self, bias, lead):
        network = self.chain(self.layer(torch.tensor(bias)), self.layer(torch.tensor([1.5])))
        times = schedule(network, 8, "spike")
        clocks = list(times.clocks.values())
        assert [clock.readout for clock in clocks] == [8 + lead, 16 + lead]
        assert [clock.first_input for clock in clocks] == [lead, 8 + lead]
        assert list(times.delays.values()) == [lead] * (lead > 0)

    def test_paths_that_meet_wait_for_the_longest(self):
        network = self.chain(self.layer(window=4, input_window=8), self.layer(window=6, input_window=4))
        nodes = list(network.graph.nodes)
        with network.graph.inserting_before(nodes[-1]):
            join = network.graph.call_module("join", (nodes[0], nodes[1], nodes[2]))
            last = network.graph.call_module("last", (join,))
        nodes[-1].args = (last,)
        network.layers[last] = self.layer(window=5, input_window=8)
        times = schedule(network, input_window=8)
        assert [clock.readout for clock in times.clocks.values()] == [8, 12, 18]
        assert times.delays == {(join, nodes[0]): 10, (join, nodes[1]): 6}


class TestChunks:
    def test_cover_every_image_once_in_order(self):
        images = torch.rand(150, 3)
        parts = list(chunks(images, size=64))
        assert [len(part) for part in parts] == [64, 64, 22]
        assert torch.equal(torch.cat(parts), images)

    def test_peeking_loses_nothing(self):
        first, rest = peek(iter([1, 2, 3]))
        assert (first, list(rest)) == (1, [1, 2, 3])
        first, rest = peek(iter([]))
        assert (first, list(rest)) == (None, [])
