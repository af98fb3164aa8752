"""The event engine finds the spikes that stepping finds: every geometry, block, tile and job, whatever changes."""

import copy
import gc
import tracemalloc
import weakref
from contextlib import contextmanager
from unittest import mock

import pytest
import torch
from helpers.conversions import assert_same_spikes, conversions, propagate_levels
from helpers.golden import FILES, NAMES, golden_steps, read, spiking_network
from helpers.random_chains import MANY, SOME, TIE
from helpers.random_graphs import Clock, make_exact, round_half_up
from helpers.shared_networks import IMAGENET, images_of, trained
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

import quartz_plugin
from quartz_plugin import TTFSNeuron, engines
from quartz_plugin.costs.counts import source_levels
from quartz_plugin.engines.convolutions import convolutions_of
from quartz_plugin.engines.event import constants as event_constants
from quartz_plugin.engines.event import deliver
from quartz_plugin.engines.event.plan import PLANS, plan_of
from quartz_plugin.engines.stepped import walk_layer
from quartz_plugin.graph import ConvertedGraph
from quartz_plugin.graph.synapses import unit_shapes
from quartz_plugin.graph.topology import Topology
from quartz_plugin.lightning import ResNet20

pytest.importorskip("numba")

SMALL = {"VISIT": 10**9, "FEW_SPIKES": 10**9, "WEIGHT_BYTES": 1, "TILE_BYTES": 1, "EVENT_BYTES": 1}
"""Every row of every block of 16 channels by itself, an image at a time; neurons beyond the borders as well."""

LARGE = {"VISIT": 0, "FEW_SPIKES": 0, "MANY_SPIKES": 0, "RUN_VECTORS": 100, "TILE_BYTES": 16 * 1024}
"""Blocks of all channels, kinds of spikes for each place, rows advanced whether spikes come or not."""

OPTIONS = {
    "paper": quartz_plugin.PAPER,
    "early": {"hold": False},
    "early, silent": {"hold": False, "rectifier": "silent"},
    "held": {},
    "held, silent": {"rectifier": "silent"},
}


@pytest.fixture(autouse=True)
def _fresh():
    PLANS.clear()


@contextmanager
def engine_with(**constants):
    """Plans made in here are made with these constants, and no others."""
    PLANS.clear()
    with mock.patch.multiple(event_constants, **constants):
        yield
    PLANS.clear()


def plans(snn):
    return plan_of(snn.graph).layers


def fixed_point(*shape):
    """Images whose pixels are multiples of 2**-8, 0 and 1 among them."""
    images = round_half_up(torch.rand(shape) * 2**8) / 2**8
    images[torch.rand(shape) < 0.1] = 0.0
    images[torch.rand(shape) < 0.1] = 1.0
    return images


def converted(ann, images, t_max, **options):
    """The network with fixed-point weights, in float64."""
    ann(images)
    return make_exact(quartz_plugin.convert(ann.eval(), images, t_max, **{"percentile": 70, **options}))


def assert_events_are_steps(snn, images):
    """Both engines give the same spikes."""
    found, stepped = (snn.run(images, engine=engine) for engine in ("event", "stepped"))
    assert_same_spikes(found.spike_steps, stepped.spike_steps)
    assert torch.equal(found.logits, stepped.logits)


# ------------------------------------------------------------------------------------------------ random graphs

CONSTANTS = st.fixed_dictionaries(
    {
        "VISIT": st.sampled_from([0, 12, 10**9]),
        "FEW_SPIKES": st.sampled_from([0, 2, 10**9]),
        "MANY_SPIKES": st.sampled_from([0, 4, 10**9]),
        "RUN_VECTORS": st.sampled_from([1, 12, 100]),
        "WEIGHT_BYTES": st.sampled_from([1, 500, 4000]),
        "TILE_BYTES": st.sampled_from([1, 600, 2000]),
        "EVENT_BYTES": st.sampled_from([1, 3000]),
        "FEW_LEVELS": st.sampled_from([0, 4, 128]),
        "FEW_CHANNELS": st.sampled_from([0, 16]),
    }
)


@MANY
@given(conversions(exact=True), CONSTANTS)
def test_on_fixed_point_weights_blocks_tiles_and_jobs_of_any_size_give_what_the_clock_says(conversion, constants):
    net, snn = conversion
    clock = Clock(snn, net.images)
    with engine_with(**constants):
        assert_same_spikes(snn.run(net.images, engine="event").spike_steps, clock.spike_steps)


def convolved(convolution, levels, size):
    """What torch says the convolution gives, `size` its places: ``[B, outputs, H, W]``."""
    weight, groups = convolution.weight.double(), convolution.groups
    image = levels.reshape(len(levels), *convolution.source_shape)
    image = image[:, convolution.first_input : convolution.first_input + convolution.inputs]
    top, left = convolution.padding
    options = {"stride": convolution.stride, "dilation": convolution.dilation, "groups": groups}
    if convolution.transposed:
        weight = weight.unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1)
        out = F.pad(F.conv_transpose2d(image, weight, **options), (0, 9, 0, 9))[:, :, top:, left:]
    else:
        out = F.conv2d(F.pad(image, (left, 50, top, 50)), weight, **options)
    return out[:, :, : size[0], : size[1]]


@SOME
@given(conversions())
def test_convolutions_of_a_layer_give_the_current_of_its_synapses(conversion):
    _, snn = conversion
    graph = snn.double().graph
    shapes = unit_shapes(graph)
    for layer in graph.layers:
        convolutions = convolutions_of(layer, shapes)
        assert (convolutions is None) == (plans(snn)[layer.name] is None)
        if convolutions is None:
            continue
        values = {
            source: torch.randint(0, 20, (2, *shapes[source]), dtype=torch.float64)
            for source in layer.projection.sources
        }
        expected = layer.projection(values)
        for node in layer.projection.nodes:
            values[node] = propagate_levels(graph.module, node, values)
        whole = expected.reshape(2, expected.shape[1], *[1] * max(0, 4 - expected.dim()), *expected.shape[2:])
        total = torch.zeros_like(whole)
        by_name = {node.name: node for node in values}
        for each in convolutions:
            channels = slice(each.first_output, each.first_output + each.outputs)
            total[:, channels] += convolved(each, values[by_name[each.source]], whole.shape[2:])
        torch.testing.assert_close(total, whole, rtol=1e-9, atol=1e-9)


# ------------------------------------------------------------------------------------------------------ geometry


class Residual(nn.Module):
    """Values meet the map of their neighbours before they are rectified."""

    def __init__(self, channels, more=False):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.more = nn.Conv2d(channels, channels, 1) if more else None

    def forward(self, x):
        if self.more is not None:
            return self.conv(x) + x + F.relu(self.more(x))
        return self.conv(x) + x


class Shortcut(nn.Module):
    """A residual block of half the places and twice the channels: the short way takes every second place."""

    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, 2 * channels, 3, stride=2, padding=1)
        self.channels = channels

    def forward(self, x):
        short = self.channels // 2
        return self.conv(x) + F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, short, self.channels - short))


class SideBySide(nn.Module):
    """Linear outputs side by side, perhaps with what they listen to added."""

    def __init__(self, channels, add=False, groups=1):
        super().__init__()
        self.left = nn.Conv2d(channels, channels // 2, 3, padding=1, groups=groups)
        self.right = nn.Conv2d(channels, channels // 2, 1)
        self.add = add

    def forward(self, x):
        both = torch.cat([self.left(x), self.right(x)], 1)
        return both + x if self.add else both


class SideBySideWeighed(nn.Module):
    """A linear map, one channel at a time, of linear outputs side by side."""

    def __init__(self, channels, behind):
        super().__init__()
        self.both, self.behind = SideBySide(channels), behind

    def forward(self, x):
        return self.behind(self.both(x))


def chain(*modules):
    return nn.Sequential(*modules)


MAPS = {
    "padding": (4, lambda: nn.Conv2d(4, 5, 3, padding=1)),
    "no padding": (4, lambda: nn.Conv2d(4, 5, 3)),
    "stride 2": (4, lambda: nn.Conv2d(4, 5, 3, stride=2, padding=1)),
    "stride 3, padding 2": (4, lambda: nn.Conv2d(4, 5, (3, 4), stride=3, padding=2)),
    "asymmetric kernel": (4, lambda: nn.Conv2d(4, 6, (1, 5), stride=(2, 1), padding=(0, 2))),
    "padding same, even kernel": (4, lambda: nn.Conv2d(4, 5, (2, 4), padding="same")),
    "dilation 2": (4, lambda: nn.Conv2d(4, 5, 3, dilation=2, padding=2)),
    "dilation 3, stride 2": (4, lambda: nn.Conv2d(4, 5, 2, dilation=3, stride=2, padding=1)),
    "dilation 2, stride 4": (4, lambda: nn.Conv2d(4, 5, 2, dilation=2, stride=4, padding=2)),
    "groups": (4, lambda: nn.Conv2d(4, 6, 3, groups=2, padding=1)),
    "groups, stride 2": (6, lambda: nn.Conv2d(6, 9, 3, groups=3, stride=2, padding=1)),
    "depthwise": (4, lambda: nn.Conv2d(4, 4, 3, groups=4, padding=1)),
    "depthwise, dilation 2, stride 2": (4, lambda: nn.Conv2d(4, 4, 3, groups=4, dilation=2, stride=2, padding=2)),
    "channel multiplier": (4, lambda: nn.Conv2d(4, 8, 3, groups=4)),
    "transposed": (4, lambda: nn.ConvTranspose2d(4, 5, 3, stride=2, padding=1, output_padding=1)),
    "transposed, dilation 2": (4, lambda: nn.ConvTranspose2d(4, 3, 2, dilation=2)),
    "transposed, grouped": (
        4,
        lambda: nn.ConvTranspose2d(4, 6, 3, stride=3, dilation=2, groups=2, padding=2, output_padding=2),
    ),
    "transposed, depthwise": (4, lambda: nn.ConvTranspose2d(4, 4, (2, 3), stride=(1, 2), groups=4, padding=(1, 0))),
    "linear": (4, lambda: chain(nn.Flatten(), nn.Linear(128, 20))),
    "average and conv": (4, lambda: chain(nn.AvgPool2d(2), nn.Conv2d(4, 5, 3, padding=1))),
    "average and linear": (4, lambda: chain(nn.AvgPool2d((2, 1), (1, 1)), nn.Flatten(), nn.Linear(112, 9))),
    "padded average and pointwise": (4, lambda: chain(nn.AvgPool2d(2, 1, padding=1), nn.Conv2d(4, 5, 1))),
    "mean and linear": (4, lambda: chain(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 9))),
    "adaptive average": (4, lambda: chain(nn.AdaptiveAvgPool2d((4, 2)), nn.Conv2d(4, 5, 2))),
    "average alone": (4, lambda: chain(nn.AvgPool2d(2))),
    "pointwise and conv": (4, lambda: chain(nn.Conv2d(4, 3, 1), nn.Conv2d(3, 5, 3, padding=1))),
    "conv and pointwise": (4, lambda: chain(nn.Conv2d(4, 3, 3, padding=1, stride=2), nn.Conv2d(3, 5, 1))),
    "conv and conv": (4, lambda: chain(nn.Conv2d(4, 3, 2), nn.Conv2d(3, 5, 2, stride=2))),
    "strided conv and dilated conv": (
        4,
        lambda: chain(nn.Conv2d(4, 3, 2, (2, 1)), nn.Conv2d(3, 5, 2, dilation=(2, 1))),
    ),
    "depthwise and pointwise": (4, lambda: chain(nn.Conv2d(4, 4, 3, groups=4), nn.Conv2d(4, 6, 1))),
    "conv and depthwise": (4, lambda: chain(nn.Conv2d(4, 3, 2), nn.Conv2d(3, 3, 2, groups=3))),
    "grouped and grouped": (4, lambda: chain(nn.Conv2d(4, 6, 2, groups=2), nn.Conv2d(6, 6, 2, groups=3))),
    "pointwise and transposed": (4, lambda: chain(nn.Conv2d(4, 3, 1), nn.ConvTranspose2d(3, 5, 2, stride=2))),
    "transposed and pointwise": (4, lambda: chain(nn.ConvTranspose2d(4, 3, 2, stride=2), nn.Conv2d(3, 5, 1))),
    "conv and linear": (4, lambda: chain(nn.Conv2d(4, 3, 3), nn.Flatten(), nn.Linear(36, 9))),
    "residual": (8, lambda: Residual(8)),
    "residual of 12": (12, lambda: Residual(12)),
    "residual of three": (16, lambda: Residual(16, more=True)),
    "shortcut": (4, lambda: Shortcut(4)),
    "shortcut of 8": (8, lambda: Shortcut(8)),
    "side by side": (4, lambda: SideBySide(4)),
    "side by side, grouped": (8, lambda: SideBySide(8, groups=4)),
    "side by side and added": (16, lambda: SideBySide(16, add=True)),
    "side by side and conv": (4, lambda: SideBySideWeighed(4, nn.Conv2d(4, 5, 1))),
    "side by side and depthwise": (4, lambda: SideBySideWeighed(4, nn.Conv2d(4, 4, 1, groups=4))),
    "wide": (4, lambda: nn.Conv2d(4, 40, 3, padding=1)),
    "wide groups": (8, lambda: nn.Conv2d(8, 40, 3, groups=4)),
    "wide depthwise": (40, lambda: nn.Conv2d(40, 40, 3, groups=40)),
    "wide residual": (40, lambda: Residual(40)),
}
"""Channels that the map listens to, and the map."""


def network(name, **options):
    """A network with the map between two layers, and images of it."""
    channels, make = MAPS[name]
    torch.manual_seed(1)
    ann = nn.Sequential(nn.Conv2d(2, channels, 1), nn.ReLU(), make(), nn.ReLU(), nn.Flatten(), nn.LazyLinear(3))
    images = fixed_point(3, 2, 8, 4)
    ann(images)
    with torch.no_grad():
        for module in ann.modules():
            if isinstance(module, nn.Conv2d | nn.ConvTranspose2d | nn.Linear):
                module.weight.mul_(3)
    return ann, images


def assert_exact(name, t_max, options):
    """Both engines agree on the network with this map; returns how many of the map's neurons fire early."""
    ann, images = network(name)
    early = 0
    for option in options:
        snn = converted(ann, images, t_max, **OPTIONS[option])
        assert None not in plans(snn).values()
        stepped = snn.run(images, engine="stepped")
        early += int(stepped.early["3"].sum())
        for constants in (LARGE, SMALL):
            with engine_with(**constants):
                assert_same_spikes(snn.run(images, engine="event").spike_steps, stepped.spike_steps)
    return early


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize("name", MAPS)
def test_every_geometry_is_planned_and_exact(name):
    assert_exact(name, 2, ["paper"])
    assert assert_exact(name, 5, ["paper", "early", "held, silent"]) > 0
    assert assert_exact(name, 16, ["early, silent"]) > 0


LONG = ["stride 3, padding 2", "groups", "depthwise", "transposed", "conv and conv", "residual", "side by side", "wide"]


@pytest.mark.parametrize("name", LONG)
def test_long_windows_are_exact(name):
    assert assert_exact(name, 130, ["paper", "early, silent", "held"]) > 0


@pytest.mark.parametrize("constants", [LARGE, SMALL], ids=["large", "small"])
@pytest.mark.parametrize("name", ["padding", "groups", "depthwise", "transposed", "residual", "side by side", "linear"])
def test_fixed_point_weights_are_exact_in_float32(name, constants):
    ann, images = network(name)
    snn = converted(ann, images, 16, hold=False)
    stepped = snn.run(images, engine="stepped").spike_steps
    with engine_with(**constants):
        result = snn.float().run(images, engine="event")
    assert result.logits.dtype == torch.float32
    assert_same_spikes(result.spike_steps, stepped)


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("t_max", [5, 16])
def test_sequences_are_exact(option, t_max):
    ann = nn.Sequential(
        nn.Conv1d(3, 4, 3, padding=1), nn.ReLU(),
        nn.Conv1d(4, 6, 4, stride=2, padding=2, groups=2), nn.ReLU(),
        nn.ConvTranspose1d(6, 4, 3, stride=2, dilation=2, output_padding=1), nn.ReLU(),
        nn.AvgPool1d(2), nn.Conv1d(4, 4, 2, dilation=3, groups=4), nn.ReLU(),
        nn.Flatten(), nn.LazyLinear(3),
    )  # fmt: skip
    images = fixed_point(3, 3, 12)
    snn = converted(ann, images, t_max, **OPTIONS[option])
    assert None not in plans(snn).values()
    for constants in (LARGE, SMALL):
        with engine_with(**constants):
            assert_events_are_steps(snn, images)


@pytest.mark.parametrize(
    ("name", "ranges"),
    [
        ("padding", [(0, 5)]),
        ("side by side", [(0, 2), (2, 2)]),
        ("side by side and added", [(0, 8), (8, 8)]),
        ("shortcut", [(0, 8)]),
        ("side by side and conv", [(0, 5)]),
    ],
)
def test_channels_that_listen_to_others_have_plans_of_their_own(name, ranges):
    ann, images = network(name)
    snn = converted(ann, images, 5)
    with engine_with(**LARGE):
        assert [(plan.tiles.first_output, plan.tiles.outputs) for plan in plans(snn)["3"].ranges] == ranges


@pytest.mark.parametrize(
    ("name", "t_max", "direct"),
    [
        ("residual", 16, True),
        ("residual of three", 16, True),
        ("wide residual", 16, True),
        ("side by side and added", 16, True),
        ("shortcut of 8", 16, True),
        ("residual of 12", 16, False),
        ("residual", 130, False),
        ("padding", 16, False),
    ],
)
def test_spikes_that_are_added_as_they_come_are_direct_where_whole_vectors_are(name, t_max, direct):
    ann, images = network(name)
    snn = converted(ann, images, t_max)
    with engine_with(**LARGE):
        assert any(plan.direct_convolution is not None for plan in plans(snn)["3"].ranges) == direct


def test_the_weights_of_many_channels_stand_in_blocks():
    ann, images = network("wide residual")
    snn = converted(ann, images, 5)
    with engine_with(**SMALL):
        (plan,) = plans(snn)["3"].ranges
        assert (plan.tiles.block_size, plan.tiles.tile_rows, plan.tiles.outputs) == (16, 1, 40)
    with engine_with(**LARGE):
        (plan,) = plans(snn)["3"].ranges
        assert (plan.tiles.block_size, plan.tiles.tile_rows) == (40, 6)


# ------------------------------------------------------------------------------------- what is no convolution


class Sliced(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 6, 3)

    def forward(self, x):
        return self.conv(x)[:, 1:4]


NO_CONVOLUTIONS = {
    "reflected": lambda: chain(nn.Conv2d(4, 3, 2), nn.Conv2d(3, 5, 3, padding=1, padding_mode="reflect")),
    "padded in between": lambda: chain(nn.Conv2d(4, 3, 3, padding=1), nn.Conv2d(3, 5, 3, padding=1)),
    "part of a linear output": Sliced,
    "linear behind a turn": lambda: chain(nn.Conv2d(4, 3, 2), nn.Flatten(2), nn.Conv1d(3, 4, 2)),
}


def no_convolution(name):
    """A network with such a map between two layers, and images of it."""
    ann = nn.Sequential(
        nn.Conv2d(2, 4, 1), nn.ReLU(), NO_CONVOLUTIONS[name](), nn.ReLU(), nn.Flatten(), nn.LazyLinear(3)
    )
    return ann, fixed_point(3, 2, 8, 4)


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("name", NO_CONVOLUTIONS)
def test_what_is_no_convolution_of_spikes_is_stepped(name, option):
    ann, images = no_convolution(name)
    snn = converted(ann, images, 6, **OPTIONS[option])
    assert [layer for layer, plan in plans(snn).items() if plan is None] == ["3"]
    assert_events_are_steps(snn, images)


# ------------------------------------------------------------------------------------ real networks and numbers


@pytest.mark.shared
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("file", FILES)
def test_events_reproduce_all_golden_layers_from_the_images_on(file, dtype):
    golden = read(file)
    snn = spiking_network(golden, dtype)
    result = snn.run(golden["input"].to(dtype), engine="event")
    assert None not in plans(snn).values()
    for layer, name in NAMES.items():
        expected = golden_steps(golden, layer, snn.windows[name].start)
        assert torch.equal(result.spike_steps[name].long(), expected), layer
    torch.testing.assert_close(result.logits.float(), golden["output_decoded"])


def assert_each_layer_steps_so_but_for_ties(snn, images):
    """On the spikes that the event engine found before it, each layer steps to those that it found itself."""
    result = snn.run(images, engine="event")
    levels = source_levels(snn.graph, result)
    differing = neurons = 0
    for layer in snn.graph.layers:
        found, p = result.spike_steps[layer.name], layer.neuron.p
        steps, margin = torch.full_like(found, -1), torch.full(found.shape, torch.inf)
        for step, spikes, state in walk_layer(layer, {source: levels[source] for source in layer.projection.sources}):
            steps[spikes != 0] = step
            if not p.hold or step >= p.clock.readout:
                margin = torch.minimum(margin, (state.v - p.clock.threshold).abs())
        apart = steps != found
        assert bool((margin[apart] < TIE).all()), layer.name
        differing, neurons = differing + int(apart.sum()), neurons + apart.numel()
    assert differing <= neurons / 10_000
    return neurons


@pytest.mark.shared
@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("t_max", [4, 16, 64])
def test_the_papers_network_fires_as_it_steps_but_for_ties(mnist_ann, mnist_train, mnist_test, t_max, option):
    snn = quartz_plugin.convert(mnist_ann, mnist_train[0][:500], t_max, percentile=99, **OPTIONS[option])
    assert None not in plans(snn).values()
    images = mnist_test[0][:100]
    assert assert_each_layer_steps_so_but_for_ties(snn, images) == 100 * 4_354


@pytest.mark.shared
def test_resnet20_fires_as_it_steps_but_for_ties():
    ann = trained(ResNet20(), "cifar10_resnet20.safetensors")
    images = images_of("cifar10/train", 54, 32)[0]
    snn = quartz_plugin.convert(ann, images[:50], 16, hold=False, preprocessing=IMAGENET)
    assert None not in plans(snn).values()
    assert assert_each_layer_steps_so_but_for_ties(snn, images[50:]) == 4 * 188_426


def test_windows_of_thousands_of_steps_are_exact():
    ann, images = nn.Sequential(nn.Linear(4, 9), nn.ReLU(), nn.Linear(9, 3)), fixed_point(20, 4)
    for rectifier in ("spike", "silent"):
        snn = converted(ann, images, 5000, rectifier=rectifier, percentile=100)
        analytic = snn.run(images, engine="analytic").spike_steps
        assert len(analytic["1"].unique()) > 30
        assert_same_spikes(snn.run(images, engine="event").spike_steps, analytic)
    assert_events_are_steps(converted(ann, images, 1500, hold=False), images)


# ------------------------------------------------------------------------------- the plan follows the network


class TestPlan:
    @pytest.fixture
    def images(self):
        return fixed_point(5, 2, 6, 6)

    @pytest.fixture
    def snn(self, images):
        ann = nn.Sequential(
            nn.Conv2d(2, 3, 3), nn.ReLU(), nn.AvgPool2d(2, padding=1), nn.Conv2d(3, 4, 1), nn.ReLU(),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3),
        )  # fmt: skip
        with torch.no_grad():
            for index in (0, 3):
                ann[index].weight.mul_(3)
                ann[index].bias.fill_(0.05)
        snn = converted(ann, images, 9, hold=False)
        assert_events_are_steps(snn, images)
        return snn

    @pytest.fixture
    def follows(self, snn, images):
        """Whether a change of the network matters, and both engines see it."""
        before = snn.run(images, engine="stepped").spike_steps

        def judge(layer):
            assert not torch.equal(snn.run(images, engine="stepped").spike_steps[layer], before[layer])
            assert_events_are_steps(snn, images)

        return judge

    def test_is_kept_while_nothing_changes(self, snn, images):
        plan = plan_of(snn.graph)
        snn.run(images, engine="event")
        assert plan_of(snn.graph) is plan

    def test_follows_weights_changed_in_place(self, snn, follows):
        with torch.no_grad():
            snn.graph_module.get_submodule("0").weight.mul_(2)
        follows("1")

    def test_follows_a_state_that_is_loaded(self, snn, follows):
        snn.load_state_dict({name: value * 2 for name, value in snn.state_dict().items()})
        follows("1")

    def test_follows_another_parameter(self, snn, follows):
        module = snn.graph_module.get_submodule("3")
        module.weight = nn.Parameter(-module.weight, requires_grad=False)
        follows("4")

    def test_follows_an_optimiser(self, snn, images, follows):
        weight = snn.graph_module.get_submodule("0").weight.requires_grad_(True)
        weight.grad = torch.ones_like(weight)
        torch.optim.SGD([weight], lr=0.5).step()
        weight.requires_grad_(False)
        follows("1")

    def test_follows_weights_changed_behind_autograds_back(self, snn, follows):
        snn.graph_module.get_submodule("0").weight.data.mul_(2)
        follows("1")

    def test_follows_other_data_of_a_parameter(self, snn, follows):
        weight = snn.graph_module.get_submodule("0").weight
        weight.data = weight.data * 2
        follows("1")

    def test_follows_a_bias(self, snn, follows):
        with torch.no_grad():
            snn.graph.layers[0].neuron.bias.add_(0.5)
        follows("1")

    def test_follows_a_bias_put_in_the_place_of_another(self, snn, follows):
        neuron = snn.graph.layers[1].neuron
        neuron.bias = nn.Parameter(neuron.bias + 0.5, requires_grad=False)
        follows("4")

    def test_follows_a_padding(self, snn, images):
        snn.graph_module.get_submodule("0").padding = (0, 0)
        assert_events_are_steps(snn, images)
        snn.graph_module.get_submodule("0").padding = (2, 2)
        assert_events_are_steps(snn, images)

    def test_follows_one_weight_among_many(self):
        snn = quartz_plugin.convert(nn.Linear(784, 2000), torch.rand(20, 784), 256, hold=False)
        weight, image = next(p for p in snn.parameters() if p.dim() == 2), torch.rand(1, 784)
        before = snn.run(image, engine="event").spike_steps["output"]
        weight.data[27, 5] += 1.0
        after = snn.run(image, engine="event").spike_steps["output"]
        assert (before != after).nonzero().tolist() == [[0, 27]]

    def test_follows_a_stride(self, snn, images):
        module = snn.graph_module.get_submodule("2")
        module.stride = 1
        assert_events_are_steps(snn, images)
        assert snn.run(images, engine="event").spike_steps["4"].shape == (5, 4, 5, 5)

    @pytest.mark.parametrize(("name", "value"), [("count_include_pad", False), ("divisor_override", 1)])
    def test_follows_what_a_module_does_not_print(self, snn, follows, name, value):
        setattr(snn.graph_module.get_submodule("2"), name, value)
        follows("4")

    def test_follows_another_neuron(self, snn, follows):
        neuron = snn.graph.layers[0].neuron
        held = TTFSNeuron(9, 1, hold=True, bias=neuron.bias, init_hidden=True)
        snn.graph_module.set_submodule("1", held)
        follows("1")

    def test_follows_an_edge_moved_in_the_graph(self, snn, follows):
        (node,) = (node for node in snn.graph_module.graph.nodes if node.target == "2")
        node.replace_all_uses_with(node.args[0])
        snn.graph_module.graph.erase_node(node)
        snn.graph_module.recompile()
        follows("4")

    def test_of_a_copy_is_its_own(self, snn, images):
        other = copy.deepcopy(snn)
        with torch.no_grad():
            other.graph_module.get_submodule("0").weight.mul_(2)
        before = snn.run(images, engine="event").spike_steps
        assert_events_are_steps(other, images)
        assert not torch.equal(other.run(images, engine="event").spike_steps["1"], before["1"])
        assert_same_spikes(snn.run(images, engine="event").spike_steps, before)

    @pytest.mark.parametrize("first", [torch.float32, torch.float64])
    def test_follows_the_type(self, snn, images, first):
        for dtype in (first, torch.float64, torch.float32):
            snn.to(dtype)
            assert snn.run(images, engine="event").logits.dtype == dtype
            assert_events_are_steps(snn, images)

    def test_dies_with_its_network(self, images):
        snn = quartz_plugin.convert(nn.Sequential(nn.Flatten(), nn.Linear(72, 3)), images, 4, hold=False)
        snn.run(images, engine="event")
        module = weakref.ref(snn.graph_module)
        del snn
        gc.collect()
        assert module() is None


# -------------------------------------------------------------------------------------------- batches and threads


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("constants", [LARGE, SMALL], ids=["large", "small"])
@pytest.mark.parametrize("count", [1, 2, 7])
def test_two_threads_find_what_one_finds(count, constants):
    ann, images = network("residual")
    images = fixed_point(count, *images.shape[1:])
    snn = converted(ann, images, 9, hold=False)
    with (
        engine_with(**constants, WORTH_THREADS=0),
        mock.patch.object(deliver, "run_jobs", wraps=deliver.run_jobs) as parallel,
    ):
        two = snn.run(images, engine="event").spike_steps
        assert {call.args[1] for call in parallel.call_args_list} == {min(2, count)}
        jobs = max(len(call.args[0]) for call in parallel.call_args_list)
        assert jobs == (count if constants is SMALL else min(2, count))
        torch.set_num_threads(1)
        assert_same_spikes(snn.run(images, engine="event").spike_steps, two)
    assert_same_spikes(snn.run(images, engine="stepped").spike_steps, two)


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize(
    ("name", "count", "worth", "expected"),
    [
        ("residual", 3, 0, (2, 1)),
        ("residual", 3, 10**9, (1, 2)),
        ("residual", 1, 0, (1, 2)),
        # What is stepped wants torch's threads.
        ("padded in between", 3, 0, (2, 2)),
    ],
    ids=["worth it", "few synapses", "one image", "partly stepped"],
)
def test_kernels_take_several_threads_where_images_share_them(name, count, worth, expected):
    ann, images = no_convolution(name) if name in NO_CONVOLUTIONS else network(name)
    snn = converted(ann, images, 9, hold=False)
    taken = set()

    def noted(jobs, threads):
        taken.add((threads, torch.get_num_threads()))
        raise MemoryError

    with engine_with(WORTH_THREADS=worth), mock.patch.object(deliver, "run_jobs", noted), pytest.raises(MemoryError):
        snn.run(images[:1].expand(count, *images.shape[1:]), engine="event")
    assert taken == {expected}
    assert torch.get_num_threads() == 2


@pytest.mark.parametrize("name", ["residual", "side by side", "linear", "average and conv"])
def test_one_image_at_a_time_gives_the_spikes_of_the_batch(name):
    ann, images = network(name)
    snn = converted(ann, images, 9, hold=False)
    batch = snn.run(images, engine="event").spike_steps
    for index in range(len(images)):
        for layer, steps in snn.run(images[index : index + 1], engine="event").spike_steps.items():
            assert torch.equal(steps[0], batch[layer][index]), layer


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("option", OPTIONS)
def test_an_empty_batch_gives_no_spikes_of_the_right_shapes(option):
    ann, images = network("side by side and added")
    snn = converted(ann, images, 9, **OPTIONS[option])
    none, some = (snn.run(batch, engine="event") for batch in (images[:0], images))
    assert none.logits.shape == (0, 3)
    for layer, steps in some.spike_steps.items():
        assert none.spike_steps[layer].shape == (0, *steps.shape[1:])
        assert none.spike_steps[layer].dtype == torch.int32


@pytest.mark.parametrize("option", OPTIONS)
def test_not_recording_leaves_the_output_alone(option):
    ann, images = network("residual")
    snn = converted(ann, images, 9, **OPTIONS[option])
    full, short = (snn.run(images, engine="event", record=record) for record in (True, False))
    assert list(short.spike_steps) == [full.output]
    assert torch.equal(short.spike_steps[full.output], full.spike_steps[full.output])
    assert torch.equal(short.logits, full.logits)


def test_images_that_say_nothing_or_all_are_exact():
    ann, images = network("residual")
    for option in OPTIONS.values():
        snn = converted(ann, images, 9, **option)
        assert_events_are_steps(snn, torch.stack([torch.zeros(2, 8, 4), torch.ones(2, 8, 4)]))


def test_images_of_any_layout_are_taken():
    ann, images = network("padding")
    snn = converted(ann, images, 9, hold=False)
    expected = snn.run(images, engine="event").spike_steps
    turned = images.transpose(2, 3).contiguous().transpose(2, 3)
    for other in (images.to(memory_format=torch.channels_last), turned, images.double()):
        assert_same_spikes(snn.run(other, engine="event").spike_steps, expected)


# -------------------------------------------------------------------------------------------- which engine runs


class TestChoice:
    @pytest.fixture
    def images(self):
        return torch.rand(6, 4)

    @pytest.fixture
    def early(self, images):
        return quartz_plugin.convert(nn.Sequential(nn.Linear(4, 3)), images, 6, hold=False)

    @pytest.fixture
    def held(self, images):
        return quartz_plugin.convert(nn.Sequential(nn.Linear(4, 3)), images, 6)

    @pytest.fixture
    def elsewhere(self, early, held, monkeypatch):
        monkeypatch.setattr(ConvertedGraph, "device", property(lambda graph: torch.device("cuda", 0)))

    @pytest.fixture
    def without_numba(self, monkeypatch):
        monkeypatch.setattr(engines, "find_spec", lambda name: None)

    def test_is_by_whether_neurons_are_held(self, early, held, images):
        assert early.run(images).engine == "event"
        assert held.run(images).engine == "analytic"
        assert held.run(images, engine="event").engine == "event"

    @pytest.mark.usefixtures("without_numba")
    def test_without_numba_is_to_step(self, early, held, images):
        assert early.run(images).engine == "stepped"
        assert held.run(images).engine == "analytic"

    @pytest.mark.usefixtures("without_numba")
    def test_without_numba_names_what_to_install(self, early, images):
        with pytest.raises(ImportError, match=r"numba.*quartz_plugin\[fast\]"):
            early.run(images, engine="event")

    @pytest.mark.usefixtures("elsewhere")
    def test_off_the_cpu_names_the_engines_that_can(self, early, held, images):
        with pytest.raises(ValueError, match=r'runs on a CPU.*on cuda:0.*engine="stepped".*snn\.cpu\(\)'):
            early.run(images, engine="event")
        with pytest.raises(ValueError, match=r'runs on a CPU.*on cuda:0.*engine="analytic".*snn\.cpu\(\)'):
            held.run(images, engine="event")

    @pytest.mark.usefixtures("elsewhere")
    def test_off_the_cpu_is_to_step(self, early):
        assert engines._chosen(Topology.of(early.graph), "auto") == "stepped"

    def test_where_weights_want_gradients_is_to_step(self, early, images):
        early.graph_module.get_submodule("0").weight.requires_grad_(True)
        assert early.run(images).engine == "stepped"
        with torch.no_grad():
            assert early.run(images).engine == "event"


class Halved(nn.Module):
    """Not a module that conversion makes: a graph may be edited."""

    def forward(self, x):
        return 0.5 * x


def test_an_edited_graph_with_a_module_of_the_users_own_is_stepped():
    torch.manual_seed(0)
    ann, images = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)), torch.rand(20, 6)
    snn = quartz_plugin.convert(ann, images, 16, hold=False, weight_bits=8)
    module = snn.graph_module
    module.add_submodule("halved", Halved())
    (placeholder,) = (node for node in module.graph.nodes if node.op == "placeholder")
    with module.graph.inserting_after(placeholder):
        halved = module.graph.call_module("halved", (placeholder,))
    placeholder.replace_all_uses_with(halved, delete_user_cb=lambda user: user is not halved)
    module.recompile()
    assert plans(snn)["1"] is None
    assert_events_are_steps(snn, images)


class MeanOfAll(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 5)

    def forward(self, x):
        return self.linear(x.mean((2, 3, 4)))


def test_units_in_more_than_three_dimensions_are_stepped():
    images = torch.rand(10, 3, 2, 2, 2)
    snn = quartz_plugin.convert(MeanOfAll(), images, 16, hold=False)
    assert list(plans(snn).values()) == [None]
    assert torch.equal(snn.run(images).logits, snn.run(images, engine="stepped").logits)


class Spread(nn.Module):
    """A transposed map of kernel 1 whose output is wider than its input, beside another."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(2, 8, 3)
        self.one = nn.ConvTranspose2d(8, 8, 1, dilation=2, output_padding=1, groups=8)
        self.other = nn.Conv2d(8, 8, 2, padding=1)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        x = self.stem(x).relu()
        return self.head((self.one(x) + self.other(x)).relu().mean((2, 3)))


def test_a_transposed_map_of_kernel_1_may_widen():
    torch.manual_seed(1)
    images = torch.rand(10, 2, 8, 8)
    for options in ({}, {"hold": False}, {"hold": False, "rectifier": "silent"}):
        snn = quartz_plugin.convert(Spread(), images, 16, weight_bits=8, **options)
        assert_events_are_steps(snn, images)


def test_weights_that_are_no_numbers_are_refused():
    snn = quartz_plugin.convert(nn.Linear(3, 2), torch.rand(5, 3), hold=False)
    with torch.no_grad():
        next(snn.parameters())[0] = float("nan")
    with pytest.raises(ValueError, match="contains NaN or infinity"):
        snn.run(torch.rand(2, 3), engine="event")


class Reshaped(nn.Module):
    """Values of several places, pooled and in another shape, in front of what tells them apart."""

    def __init__(self, way):
        super().__init__()
        self.conv, self.pool, self.way = nn.Conv2d(3, 4, 1), nn.AvgPool2d(2), way
        self.norm, self.head, self.rows = nn.BatchNorm1d(16), nn.Linear(16, 3), nn.Linear(4, 3)
        self.gain = nn.Parameter(torch.rand(16) + 0.5)
        with torch.no_grad():
            self.norm.running_mean.uniform_(0.1, 0.5)
            self.norm.running_var.uniform_(0.5, 2)

    def forward(self, x):
        pooled = self.pool(F.relu(self.conv(x)))
        flat = pooled.flatten(1)
        ways = {
            "as it is": lambda: flat,
            "gain": lambda: flat * self.gain,
            "number": lambda: 0.5 * flat,
            "constant": lambda: flat + self.gain,
            "norm": lambda: self.norm(flat),
            "itself": lambda: flat + flat * 0.5,
            "turned": lambda: flat + pooled.transpose(1, 3).flatten(1),
            "average": lambda: self.rows((flat * self.gain).unflatten(1, (4, 4))).mean(2),
            "places as channels": lambda: F.avg_pool1d(flat, 2),
            "linear": lambda: self.head(flat * self.gain),
            "one place": lambda: self.pool(pooled).flatten(1) * self.gain[:4],
        }
        return ways[self.way]()


WAYS = ["as it is", "gain", "number", "constant", "norm", "itself", "turned", "average", "places as channels", "linear"]


@pytest.mark.parametrize("t_max", [4, 16])
@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("way", [*WAYS, "one place"])
def test_values_of_several_places_in_another_shape_keep_their_places(way, option, t_max):
    ann, images = Reshaped(way).eval(), fixed_point(4, 3, 4, 4)
    snn = make_exact(quartz_plugin.convert(ann, torch.rand(20, 3, 4, 4), t_max, **OPTIONS[option]))
    assert_events_are_steps(snn, images)


def test_pooled_and_flattened_places_have_the_networks_values():
    ann, images = Reshaped("as it is").eval(), torch.rand(50, 3, 4, 4)
    snn = quartz_plugin.convert(ann, images, 16, hold=False)
    wanted = ann(images).detach()
    assert (snn(images) - wanted).abs().max() < 0.1 * wanted.abs().max()


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("name", ["padding", "side by side and conv"])
def test_levels_beyond_the_buckets_are_sorted_by_those_that_occur(name, option):
    ann, images = network(name)
    snn = converted(ann, images, 33, **OPTIONS[option])
    for constants in (SMALL, {}):
        with engine_with(MOST_BUCKETS=3, FEW_LEVELS=0, **constants):
            assert_events_are_steps(snn, images)


@pytest.mark.parametrize("option", OPTIONS)
def test_memory_does_not_grow_with_the_window(option):
    ann = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3))
    images = torch.rand(4, 2, 6, 6)

    def most_bytes(t_max):
        snn = quartz_plugin.convert(ann, images, t_max, **OPTIONS[option])
        snn.run(images, engine="event")
        tracemalloc.start()
        snn.run(images, engine="event")
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return most

    assert most_bytes(2**23) < 1.2 * most_bytes(2**13) < 2**20


def test_a_window_of_any_length_gives_the_spikes_of_the_closed_form():
    ann = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3))
    images = torch.rand(4, 2, 6, 6, dtype=torch.float64)
    snn = quartz_plugin.convert(ann.double(), images, 2**23)
    result = snn.run(images, engine="event")
    assert_same_spikes(result.spike_steps, snn.run(images, engine="analytic").spike_steps)
    for name, window in result.windows.items():
        assert int(result.spike_steps[name].max()) <= window.end + window.length
    wanted = ann(images).detach()
    torch.testing.assert_close(result.logits, wanted, rtol=0, atol=1e-5 * float(wanted.abs().max()))


@pytest.mark.parametrize("option", OPTIONS)
def test_black_images_in_a_long_window_give_what_the_biases_alone_do(option):
    ann = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3))
    snn = converted(ann, torch.rand(4, 2, 6, 6), 33, **OPTIONS[option])
    with engine_with(MOST_BUCKETS=0, FEW_LEVELS=0):
        assert_events_are_steps(snn, torch.zeros(2, 2, 6, 6))


class Shifted(nn.Module):
    """Many neurons that shortcuts alone reach, for the levels of others have a lowest value."""

    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.ConvTranspose2d(1, 2, 2, stride=2, bias=False), nn.Linear(512, 3)

    def forward(self, x):
        return self.head(self.conv(x).clamp(-0.25, 0.5).flatten(1).abs())


@pytest.mark.parametrize("options", [{}, {"hold": False}, {"weight_bits": 8}], ids=str)
def test_many_neurons_that_shortcuts_alone_reach(options):
    torch.manual_seed(0)
    ann, images = Shifted(), torch.rand(20, 1, 8, 8)
    snn = quartz_plugin.convert(ann, images, 5, **options)
    snn = snn if "weight_bits" in options else make_exact(snn)
    expected = snn.run(images, engine="stepped")
    assert_same_spikes(snn.run(images, engine="event").spike_steps, expected.spike_steps)
