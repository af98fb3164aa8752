"""The integer engine, judged by the stepped one, with torch's int8 operators and without them."""

import copy

import pytest
import torch
from helpers.conversions import assert_same_spikes
from torch import nn
from torch.nn import functional as F

import quartz_plugin
from quartz_plugin.costs.counts import synaptic_operations
from quartz_plugin.costs.spikes import spike_counts, zero_spike_counts
from quartz_plugin.engines.integer import maps, without_integer_operators
from quartz_plugin.engines.integer.maps import IntegerMap, max_pool, rows_fit
from quartz_plugin.operators.linear_map import Convolution
from quartz_plugin.operators.table import WEIGHTED

needs_operators = pytest.mark.skipif(not maps.operators_work(), reason="this torch has no int8 operators for this CPU")


class Net(nn.Module):
    """A stem and a head around a body, whose result is rectified."""

    def __init__(self, body, channels=8, rank=2):
        super().__init__()
        conv = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[rank]
        self.stem, self.body, self.head = conv(2, channels, 3, padding=1), body, nn.LazyLinear(5)

    def forward(self, x):
        return self.head(self.body(self.stem(x).relu()).relu().flatten(1))


class Residual(nn.Module):
    def __init__(self, scale=1.0, channels=8):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.scale = scale

    def forward(self, x):
        return self.conv(x) + self.scale * x


class TwoPaths(nn.Module):
    """Two convolutions, and levels of two layers with different windows and scales."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.third = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)

    def forward(self, x):
        y = self.first(x).relu()
        return self.second(y) + self.third(x) + 0.5 * x + y


class OfColumns(nn.Module):
    """Weights for each column, and a convolution behind them."""

    def __init__(self):
        super().__init__()
        self.weight, self.conv = nn.Parameter(torch.rand(8) - 0.3), nn.Conv2d(8, 6, 3)

    def forward(self, x):
        return self.conv(x * self.weight)


class Doubled(nn.Module):
    """Values that are added to themselves, behind synapses and in front of them."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(8, 8, 3), nn.Conv2d(8, 6, 1)

    def forward(self, x):
        y = self.first(x + x)
        z = (y + y).relu()
        return self.second(z + z + z)


class Bottleneck(nn.Module):
    """A linear bottleneck, with a residual around it."""

    def __init__(self):
        super().__init__()
        self.expand, self.depthwise = nn.Conv2d(8, 24, 1), nn.Conv2d(24, 24, 3, padding=1, groups=24)
        self.project, self.next = nn.Conv2d(24, 8, 1), nn.Conv2d(8, 12, 1)

    def forward(self, x):
        return self.next(x + self.project(self.depthwise(self.expand(x).relu()).relu()))


class Joined(nn.Module):
    def __init__(self):
        super().__init__()
        self.left, self.right, self.behind = nn.Conv2d(8, 4, 1), nn.Conv2d(8, 6, 3, padding=1), nn.Conv2d(18, 7, 3)

    def forward(self, x):
        return self.behind(torch.cat([self.left(x).relu(), x, 3 * self.right(x).relu()], 1))


BODIES = {
    "plain": lambda: nn.Conv2d(8, 12, 3),
    "padded on one side": lambda: nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(8, 12, 3, stride=2)),
    "strided": lambda: nn.Conv2d(8, 12, (3, 2), stride=(2, 3), padding=(1, 0)),
    "dilated": lambda: nn.Conv2d(8, 12, 3, dilation=2, padding=2),
    "grouped": lambda: nn.Conv2d(8, 12, 3, groups=4),
    "depthwise": lambda: nn.Conv2d(8, 16, 3, groups=8),
    "transposed": lambda: nn.ConvTranspose2d(8, 6, 3, stride=2),
    "max pooling": lambda: nn.Sequential(nn.MaxPool2d(2), nn.Conv2d(8, 9, 2)),
    "max pooling with borders": lambda: nn.Sequential(nn.MaxPool2d(3, 2, 1, ceil_mode=True), nn.Conv2d(8, 9, 2)),
    "adaptive max pooling": lambda: nn.Sequential(nn.AdaptiveMaxPool2d(3), nn.Conv2d(8, 9, 2)),
    "average pooling": lambda: nn.Sequential(nn.AvgPool2d(2), nn.Conv2d(8, 9, 2)),
    "average behind": lambda: nn.Sequential(nn.Conv2d(8, 9, 3), nn.AvgPool2d(2)),
    "same": lambda: nn.Conv2d(8, 12, 3, padding="same"),
    "residual": lambda: Residual(),
    "residual, weighed": lambda: Residual(-0.75),
    "two paths": lambda: TwoPaths(),
    "weights of columns": lambda: OfColumns(),
    "doubled": lambda: Doubled(),
    "bottleneck": lambda: Bottleneck(),
    "joined": lambda: Joined(),
    "shuffled": lambda: nn.Sequential(nn.PixelUnshuffle(2), nn.Conv2d(32, 8, 1), nn.PixelShuffle(2)),
    "upsampled": lambda: nn.Sequential(nn.Upsample(scale_factor=2), nn.Conv2d(8, 8, 3, padding=1)),
    "linear over columns": lambda: nn.Linear(8, 6),
    "linear over columns in front": lambda: nn.Sequential(nn.Linear(8, 6), nn.Conv2d(8, 5, 3)),
}
OPTIONS = [
    {},
    {"granularity": "channel"},
    {"rectifier": "silent", "linear": "pair"},
    {"layers": {"input": {"t_max": 31}, "stem": {"t_max": 5}}},
    {"first_layer": "dense"},
]


def nets(rank=2):
    torch.manual_seed(0)
    return torch.rand(30, 2, *[8] * rank)


def check(snn, images):
    """All engines that hold allows agree bit for bit; returns what the integers gave."""
    expected = snn.run(images, engine="stepped")
    result = snn.run(images, engine="integer")
    with without_integer_operators():
        plain = snn.run(images, engine="integer")
    assert not any("int8" in each for each in plain.arithmetic.values())
    for each in (result, plain, snn.run(images, engine="analytic")):
        assert_same_spikes(each.spike_steps, expected.spike_steps)
        assert torch.equal(each.logits, expected.logits)
        assert torch.equal(each.membrane, expected.membrane)
    alone = snn.run(images, engine="integer", record=False)
    assert torch.equal(alone.logits, expected.logits)
    assert list(alone.spike_steps) == [result.output]
    return result


@pytest.mark.parametrize("t_max", [16, 129, 256])
@pytest.mark.parametrize("body", BODIES)
def test_integers_spike_as_the_stepped_engine(body, t_max):
    images = nets()
    ann = Net(BODIES[body]())
    ann(images)
    result = check(quartz_plugin.convert(ann, images, t_max, weight_bits=8), images[:9])
    assert set(result.arithmetic) == set(result.windows) - {"input"}


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("body", ["plain", "residual", "residual, weighed", "two paths", "bottleneck", "joined"])
def test_integers_spike_as_the_stepped_engine_with_any_options(body, options):
    images = nets()
    ann = Net(BODIES[body]())
    ann(images)
    if "layers" in options:
        stem = next(
            row["module"] for row in quartz_plugin.convert(ann, images).report if row["became"] == "spiking layer"
        )
        options = {"layers": {"input": {"t_max": 31}, stem: {"t_max": 5}}}
    check(quartz_plugin.convert(ann, images, 16, weight_bits=8, **options), images[:9])


@pytest.mark.parametrize("rank", [1, 3])
def test_sequences_and_volumes(rank):
    images = nets(rank)
    conv = nn.Conv1d(8, 6, 3, stride=2, padding=1) if rank == 1 else nn.Conv3d(8, 6, 3)
    ann = Net(conv, rank=rank)
    ann(images)
    check(quartz_plugin.convert(ann, images, 16, weight_bits=8), images[:5])


@needs_operators
def test_what_is_added_up_in_int8_is_known_of_each_layer():
    images = nets()
    ann = Net(nn.Sequential(nn.Conv2d(8, 8, 3), nn.ReLU(), nn.ConvTranspose2d(8, 6, 3)))
    ann(images)
    snn = quartz_plugin.convert(ann, images, 16, weight_bits=8)
    found = list(snn.run(images, engine="integer").arithmetic.values())
    assert found == ["int8", "int8", "float32", "int8"]
    assert snn.run(images, engine="analytic").arithmetic == {}


@needs_operators
@pytest.mark.parametrize("granularity", ["layer", "channel"])
def test_residuals_and_bottlenecks_are_added_up_in_int8(granularity):
    images = nets()
    for body in (Residual(), Bottleneck(), Joined()):
        ann = Net(body)
        ann(images)
        snn = quartz_plugin.convert(ann, images, 16, weight_bits=8, linear="pair", granularity=granularity)
        found = snn.run(images, engine="integer").arithmetic.values()
        assert all("int8" in each for each in found)


@needs_operators
def test_weights_that_are_large_multiples_and_zeros_are_added_up_in_int8():
    ann, images = nn.Sequential(nn.Linear(3, 2, bias=False), nn.ReLU(), nn.Linear(2, 2)), torch.rand(20, 3)
    snn = quartz_plugin.convert(ann, images, weight_bits=8)
    weight = snn.graph_module.get_submodule("0").weight
    weight.data.copy_(torch.tensor([[0.0, 1000.0, -200.0], [0.0, 0.0, 0.0]]))
    assert set(check(snn, images).arithmetic.values()) == {"int8"}


def test_linear_maps_in_a_row_are_exact_in_float64():
    images = nets()
    ann = Net(nn.Sequential(*[nn.Conv2d(8, 8, 1) for _ in range(4)]))
    ann(images)
    snn = quartz_plugin.convert(ann, images, 16, weight_bits=8)
    assert snn.graph.dtype == torch.float64
    result = check(snn, images[:5])
    assert result.logits.dtype == torch.float64
    assert any("float64" in each for each in result.arithmetic.values())


@pytest.mark.parametrize("task", ["classification", "regression"])
@pytest.mark.parametrize("last", [nn.Identity(), nn.ReLU()], ids=str)
def test_outputs_of_every_kind(last, task):
    torch.manual_seed(1)
    ann, images = nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 4), last), torch.rand(40, 6)
    check(quartz_plugin.convert(ann, images, 16, weight_bits=8, task=task), images)


def test_auto_takes_integers_where_they_are_exact():
    images = nets()
    ann = Net(nn.Conv2d(8, 8, 3))
    ann(images)
    convert = lambda **options: quartz_plugin.convert(ann, images, **{"t_max": 16, "weight_bits": 8, **options})  # noqa: E731
    expected = "integer" if maps.operators_work() else "analytic"
    assert convert().run(images).engine == expected
    assert convert(weight_bits=None).run(images).engine == "analytic"
    assert convert(t_max=300).run(images).engine == "analytic"
    assert convert(hold=False).run(images).engine == "event"
    snn = convert()
    assert torch.equal(snn(images), snn.run(images, engine="stepped").logits)
    with without_integer_operators():
        assert snn.run(images).engine == "analytic"
    assert snn.run(images.clone().requires_grad_()).engine == "analytic"
    for parameter in snn.parameters():
        parameter.requires_grad_(True)
    assert snn.run(images).engine == "analytic"
    with torch.no_grad():
        assert snn.run(images).engine == expected
    with torch.inference_mode():
        assert torch.equal(snn.run(images, engine="integer").logits, snn.run(images, engine="analytic").logits)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hold": False}, r"neurons that may fire early.*convert with hold=True; or use engine=\"stepped\""),
        ({"t_max": 257}, "a window of 256 steps is longer than 255: convert with t_max up to 256"),
        ({"weight_bits": None}, r"holds 24: convert with weight_bits up to 8; or use engine=\"analytic\""),
    ],
    ids=str,
)
def test_what_has_no_exact_form_in_integers_is_refused(options, message):
    torch.manual_seed(0)
    ann, images = nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 4)), torch.rand(40, 6)
    snn = quartz_plugin.convert(ann, images, **{"t_max": 16, "weight_bits": 8, **options})
    with pytest.raises(ValueError, match=f'engine="integer" cannot be exact here: .*{message}'):
        snn.run(images, engine="integer")


class Halves(nn.Linear):
    """A module that a user has put into a converted network."""


def test_a_module_of_the_users_in_a_converted_network_is_refused():
    torch.manual_seed(0)
    snn = quartz_plugin.convert(nn.Linear(6, 3), torch.rand(40, 6), weight_bits=8)
    (name,) = (name for name, module in snn.graph_module.named_children() if isinstance(module, nn.Linear))
    own = Halves(6, 3, bias=False)
    own.load_state_dict(snn.graph_module.get_submodule(name).state_dict())
    setattr(snn.graph_module, name, own.requires_grad_(False))
    images = torch.rand(5, 6)
    with pytest.raises(ValueError, match=r"\(Halves\) is no module of the table of operators"):
        snn.run(images, engine="integer")
    assert torch.equal(snn(images), snn.run(images, engine="stepped").logits)


def test_gradients_are_refused():
    torch.manual_seed(0)
    snn = quartz_plugin.convert(nn.Linear(6, 3), torch.rand(40, 6), weight_bits=8)
    with pytest.raises(ValueError, match='engine="integer" gives no gradients; use engine="analytic"'):
        snn.run(torch.rand(2, 6).requires_grad_(), engine="integer")


@pytest.mark.parametrize("rank", [1, 2])
@pytest.mark.parametrize("shape", ["positions", "channels", "one", "none"])
def test_biases_of_every_shape(shape, rank):
    torch.manual_seed(0)
    conv = {1: nn.Conv1d, 2: nn.Conv2d}[rank](2, 6, 3, padding=1)
    ann, images = nn.Sequential(conv, nn.ReLU(), nn.Flatten(), nn.LazyLinear(3)), torch.rand(20, 2, *[6] * rank)
    ann(images)
    snn = quartz_plugin.convert(ann, images, weight_bits=8)
    sizes = {"positions": (*[1] * rank, 6), "channels": (6, *[1] * rank), "one": ()}
    neuron = snn.graph.layers[0].neuron
    if shape == "none":
        neuron.bias = None
    else:
        neuron.bias = nn.Parameter((torch.rand(sizes[shape]) * 16).round() / 16, requires_grad=False)
    check(snn, images)


@pytest.mark.parametrize("engine", ["integer", "analytic"])
def test_what_a_sum_adds_twice_is_not_overwritten(engine):
    images = nets()
    ann = Net(Residual())
    ann(images)
    snn = quartz_plugin.convert(ann, images, 16, weight_bits=8, granularity="channel")
    (total,) = (node for node in snn.graph_module.graph.nodes if str(node.target).endswith("add"))
    conv, gain = total.args
    total.args = (conv, gain, gain)
    snn.graph_module.recompile()
    expected = snn.run(images, engine="stepped")
    assert_same_spikes(snn.run(images, engine=engine).spike_steps, expected.spike_steps)


def test_a_layer_of_one_neuron_with_a_bias_without_dimensions():
    torch.manual_seed(0)
    ann = nn.Sequential(nn.Linear(4, 1), nn.ReLU(), nn.Linear(1, 2))
    with torch.no_grad():
        ann[0].weight.abs_()
        ann[0].bias.abs_()
    snn = quartz_plugin.convert(ann, torch.rand(20, 4), weight_bits=8)
    snn.graph.layers[0].neuron.bias = nn.Parameter(torch.tensor(0.25), requires_grad=False)
    check(snn, torch.rand(9, 4))


@pytest.mark.parametrize("seed", range(3))
def test_large_negative_biases_are_rounded_as_the_stepped_engine_rounds(seed):
    torch.manual_seed(seed)
    ann, images = (
        nn.Sequential(nn.Conv2d(32, 16, 3), nn.ReLU(), nn.Flatten(), nn.LazyLinear(3)),
        torch.rand(40, 32, 6, 6),
    )
    ann(images)
    with torch.no_grad():
        ann[0].weight.abs_()
        ann[0].bias.copy_(-ann[0].weight.flatten(1).sum(1) * torch.linspace(0.3, 0.6, 16))
    for granularity in ("layer", "channel"):
        check(quartz_plugin.convert(ann, images, 128, weight_bits=8, granularity=granularity), images)


@pytest.mark.parametrize("images", [0, 1])
def test_batches_of_none_and_one(images):
    given = nets()
    ann = Net(nn.Sequential(nn.MaxPool2d(2), nn.Conv2d(8, 5, 3)))
    ann(given)
    check(quartz_plugin.convert(ann, given, weight_bits=8), given[:images])


ROUTES = [
    nn.ReflectionPad2d(1),
    nn.ReplicationPad2d(1),
    nn.CircularPad2d(1),
    nn.ChannelShuffle(2),
    nn.Upsample(scale_factor=2, mode="nearest-exact"),
    nn.Unflatten(1, (2, 4)),
]


@pytest.mark.parametrize("route", ROUTES, ids=str)
def test_routing_of_every_kind(route):
    images = nets()
    rest = [nn.Flatten(1, 2)] if isinstance(route, nn.Unflatten) else []
    ann = Net(nn.Sequential(route, *rest, nn.LazyConv2d(5, 3)))
    ann(images)
    check(quartz_plugin.convert(ann, images, 16, weight_bits=8), images[:5])


def test_edited_weights_are_looked_at_anew():
    torch.manual_seed(0)
    ann, images = nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 4)), torch.rand(40, 6)
    snn = quartz_plugin.convert(ann, images, weight_bits=8)
    snn.run(images, engine="integer")
    weight = snn.graph_module.get_submodule("0").weight
    weight.data.mul_(0.5)
    check(snn, images)
    weight.data.add_(1e-7 / 3)
    with pytest.raises(ValueError, match=r"'0' may add up to numbers of \d+ bits, and torch.float32 holds 24"):
        snn.run(images, engine="integer")
    assert snn.run(images).engine == "analytic"


def test_readers_of_spikes_find_the_same_whatever_their_layout_and_see_edits():
    images = nets()
    ann = Net(Residual())
    ann(images)
    snn = quartz_plugin.convert(ann, images, 16, weight_bits=8)
    results = [snn.run(images, engine=engine) for engine in ("integer", "stepped")]
    for count in (spike_counts, zero_spike_counts, lambda result: synaptic_operations(snn, result)):
        counts = [count(result) for result in results]
        assert all(torch.equal(counts[0][name], other) for name, other in counts[1].items())
    memo = results[0].memo()
    assert results[0].memo() is memo
    name = snn.graph.layers[0].name
    results[0].spike_steps[name][0, 1, 2, 3] += 1
    assert results[0].memo() is not memo


def test_a_file_and_a_copy_spike_alike(tmp_path):
    images = nets()
    ann = Net(Residual())
    ann(images)
    snn = quartz_plugin.convert(ann, images, 16, weight_bits=8)
    snn.save(tmp_path / "snn.safetensors")
    expected = snn.run(images, engine="integer")
    for other in (quartz_plugin.load(tmp_path / "snn.safetensors"), copy.deepcopy(snn)):
        assert_same_spikes(other.run(images, engine="integer").spike_steps, expected.spike_steps)


@needs_operators
@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("level", [15, 200, 255])
def test_sums_of_the_largest_weights_and_levels_are_exact_or_refused(level, groups):
    torch.manual_seed(2)
    whole = torch.randint(-127, 128, (8, 16 // groups, 3, 3)).double()
    whole[0], whole[1], whole[2] = 127, -127, 64
    levels = torch.randint(0, level + 1, (4, 16, 6, 6))
    levels[0] = level
    fits = torch.tensor([rows_fit(row, level) for row in whole.unsqueeze(1)])
    assert fits.all() or (maps.adds_in_16_bits() and level > 129)
    weight = whole * 2.0**-6
    convolution = Convolution(source="x", source_shape=(16, 6, 6), weight=weight, padding=(1, 1), groups=groups)
    map_ = IntegerMap(convolution, torch.full((8,), 2.0**-6).double(), (8, 6, 6), (8, 6, 6))
    wanted = F.conv2d(levels.double(), weight, padding=1, groups=groups)
    same = (map_.drive(levels.to(torch.uint8)).double() == wanted).flatten(2).all(2).all(0)
    assert same[fits].all()


def test_weights_that_are_no_int8_are_not_taken_for_such():
    assert rows_fit(torch.tensor([[127.0, -127.0]]), 15)
    assert not rows_fit(torch.tensor([[128.0, 0.0]]), 15)
    assert not rows_fit(torch.tensor([[1.0]]), 256)
    assert not rows_fit(torch.full((1, 70_000), 127.0), 255)


@pytest.mark.parametrize(
    "pool",
    [
        nn.MaxPool2d(2),
        nn.MaxPool2d((2, 4), (2, 4)),
        nn.MaxPool2d(3, 2, 1),
        nn.MaxPool2d(2, dilation=2),
        nn.MaxPool2d([3]),
    ],
    ids=str,
)
@pytest.mark.parametrize("shape", [(3, 5, 8, 8), (2, 8, 9, 12), (1, 1, 7, 7)])
def test_pools_of_levels(pool, shape):
    levels = torch.randint(0, 256, shape, dtype=torch.uint8).contiguous(memory_format=torch.channels_last)
    found = max_pool(levels, pool)
    assert found is not None or not maps.operators_work()
    assert found is None or torch.equal(found.float(), pool(levels.float()))
    assert max_pool(levels, nn.AdaptiveMaxPool2d(2)) is None


def test_steps_of_units_of_every_layout():
    from quartz_plugin.coding import Window
    from quartz_plugin.engines.recorded import recorded_steps

    for shape in ((5,), (3, 7), (2, 4, 4, 4), (2, 3, 300, 400)):
        levels, window = torch.randint(0, 200, shape, dtype=torch.uint8), Window(1000, 200)
        layouts = [levels, levels.contiguous(memory_format=torch.channels_last)] if len(shape) == 4 else [levels]
        for each in layouts:
            steps = window.steps_of(levels)
            assert torch.equal(recorded_steps(each, window, silent=False), steps)
            assert torch.equal(recorded_steps(each, window, silent=True), steps.masked_fill(levels == 0, -1))


def test_the_bits_of_a_network_are_those_of_its_weights():
    torch.manual_seed(0)
    ann, images = nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 4)), torch.rand(40, 6)
    snn = quartz_plugin.convert(ann, images, weight_bits=4)
    weights = [module.weight for module in snn.graph_module.modules() if isinstance(module, WEIGHTED)]
    assert all(len(weight.unique()) <= 15 for weight in weights)
    check(snn, images)
