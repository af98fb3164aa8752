"""Max pooling of signed values: neurons of its own, which encode values from a lowest one on."""

import copy
import math

import pytest
import torch
from helpers.conversions import assert_same_spikes, engines_of
from helpers.one_by_one import OneByOne, as_lists
from helpers.random_graphs import Clock, assert_the_clock_agrees, make_exact
from torch import nn
from torch.nn import functional as F

import quartz_plugin
from quartz_plugin import ConversionError
from quartz_plugin.costs import InferenceCounts
from quartz_plugin.training import restored, structure_of

images = torch.rand(24, 3, 12, 12, generator=torch.Generator().manual_seed(1))


def max_pool_same(x, kernel, stride):
    """TensorFlow's "SAME" padding, as timm and others write it."""
    pads = [max((math.ceil(size / stride) - 1) * stride + kernel - size, 0) for size in x.shape[:1:-1]]
    x = F.pad(x, [each for pad in pads for each in (pad // 2, pad - pad // 2)], value=-float("inf"))
    return F.max_pool2d(x, kernel, stride)


class PreActivation(nn.Module):
    """The stem and a block of a pre-activation ResNet, whose stream is pooled before any ReLU."""

    def __init__(self):
        super().__init__()
        self.stem, self.last = nn.Conv2d(3, 6, 3, padding=1), nn.Linear(6, 4)
        self.norms = nn.ModuleList(nn.BatchNorm2d(6) for _ in range(3))
        self.convs = nn.ModuleList(nn.Conv2d(6, 6, 3, padding=1, bias=False) for _ in range(2))

    def forward(self, x):
        x = F.max_pool2d(self.stem(x), 3, 2, 1)
        out = self.convs[0](F.relu(self.norms[0](x)))
        x = x + self.convs[1](F.relu(self.norms[1](out)))
        return self.last(F.relu(self.norms[2](x)).mean((2, 3)))


class Xception(nn.Module):
    """A block whose separable convolutions end in a pool, beside a strided shortcut."""

    def __init__(self):
        super().__init__()
        self.stem, self.depthwise = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 6, 3, padding=1, groups=6)
        self.pointwise, self.norm, self.pool = nn.Conv2d(6, 8, 1), nn.BatchNorm2d(8), nn.MaxPool2d(3, 2, 1)
        self.skip, self.skip_norm, self.last = nn.Conv2d(6, 8, 1, 2), nn.BatchNorm2d(8), nn.Linear(8, 4)

    def forward(self, x):
        x = F.relu(self.stem(x))
        out = self.pool(self.norm(self.pointwise(self.depthwise(x))))
        x = F.relu(out + self.skip_norm(self.skip(x)))
        return self.last(x.amax((2, 3)))


class NASNet(nn.Module):
    """A cell that pools one signed value twice, with same padding, beside other branches."""

    def __init__(self):
        super().__init__()
        self.stem, self.last = nn.Conv2d(3, 6, 3, padding=1), nn.Linear(18, 4)
        self.norm, self.conv = nn.BatchNorm2d(6), nn.Conv2d(6, 6, 5, 2, 2)

    def forward(self, x):
        x = self.norm(self.stem(x))
        one = max_pool_same(x, 3, 2) + self.conv(F.relu(x))
        two = max_pool_same(max_pool_same(x, 3, 1), 4, 2)
        return self.last(F.relu(torch.cat([one, two, F.avg_pool2d(x, 2)], 1)).mean((2, 3)))


class Morphology(nn.Module):
    """Closing and opening: largest and smallest values of signed ones, of which the last are padded with 0 behind."""

    def __init__(self):
        super().__init__()
        self.stem, self.behind, self.last = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3, padding=1), nn.Linear(100, 4)

    def forward(self, x):
        x = self.stem(x)
        x = -F.max_pool2d(-F.max_pool2d(x, 3, 1), 2, 1)
        return self.last(self.behind(x[:, :, :5, :5]).flatten(1)) + x.amin((2, 3)) - x.min(3)[0].max(2).values


class Sequence(nn.Module):
    """Global pools over a sequence, a volume and a vector's rows, and a pool that is the output."""

    def __init__(self):
        super().__init__()
        self.line, self.cube = nn.Conv1d(3, 4, 5, 2), nn.Conv3d(1, 4, 3)

    def forward(self, x):
        line = F.adaptive_max_pool1d(self.line(x.flatten(2)), 5)
        cube = F.max_pool3d(self.cube(x.unsqueeze(1)), (1, 3, 3)).flatten(2)
        return torch.max(torch.cat([line, cube], 2), 2)[0]


NETWORKS = {kind.__name__: kind for kind in (PreActivation, Xception, NASNet, Morphology, Sequence)}


def network(name):
    torch.manual_seed(7)
    ann = NETWORKS[name]()
    for module in ann.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight, 0.5, 0.7)
            nn.init.normal_(module.bias, 0.2, 0.3)
    ann.train()
    with torch.no_grad():
        for _ in range(3):
            ann(images)
    return ann.eval()


def pooled_layers(snn):
    return sorted(snn.graph.shifts)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"granularity": "channel"},
        {"linear": "pair"},
        {"hold": False},
        {"rectifier": "silent", "weight_bits": 8},
        {"calibration_method": "least_squares"},
    ],
    ids=str,
)
@pytest.mark.parametrize("name", NETWORKS)
@torch.no_grad()
def test_networks_give_what_the_ann_gives(name, options, tmp_path):
    ann = network(name)
    before, wanted = copy.deepcopy(ann.state_dict()), ann(images)
    fine = quartz_plugin.convert(ann, images, 2049, percentile=100, **options)
    tolerance = 0.1 if "calibration_method" in options or "weight_bits" in options else 0.02
    if options.get("hold", True):
        assert (fine(images) - wanted).abs().max() < tolerance * wanted.abs().max()
    assert pooled_layers(fine)
    assert all(torch.equal(tensor, before[key]) for key, tensor in ann.state_dict().items())

    few = quartz_plugin.convert(ann, images, 7, **options)
    few.save(tmp_path / "net.snn")
    again = quartz_plugin.load(tmp_path / "net.snn")
    assert torch.equal(again(images), few(images))
    assert {name: shift.tolist() for name, shift in again.graph.shifts.items()} == {
        name: shift.tolist() for name, shift in few.graph.shifts.items()
    }
    exact = make_exact(few)
    stepped = exact.run(images[:3], engine="stepped")
    assert_the_clock_agrees(exact, images[:3], stepped.spike_steps)
    for engine in engines_of(exact):
        assert_same_spikes(exact.run(images[:3], engine=engine).spike_steps, stepped.spike_steps)
    assert_same_spikes(stepped.spike_steps, Clock(exact, images[:3]).spike_steps)


class Nested(nn.Module):
    """Pools of one value, of one another, and of what cannot be negative."""

    def __init__(self):
        super().__init__()
        self.stem, self.last = nn.Conv2d(3, 4, 3), nn.Conv2d(16, 3, 1)

    def forward(self, x):
        x = self.stem(x)
        first = F.max_pool2d(x, 5, 1, 2)
        second = F.max_pool2d(F.pad(first, [2, 2, 2, 2], value=-torch.inf), 5, 1)
        sums = F.max_pool2d(F.pad(x.relu() + x.abs(), [1] * 4, value=-1e9), 3, 1)
        return self.last(torch.cat([first, second, F.max_pool2d(x, 3, 1, 1), sums], 1))


@torch.no_grad()
def test_pools_share_neurons_and_need_none_behind_spikes():
    ann = Nested().double().eval()
    snn = quartz_plugin.convert(ann, images.double(), 1 << 20, percentile=100)
    torch.testing.assert_close(snn(images), ann(images.double()), rtol=0, atol=2e-4)
    layers = [layer.name for layer in snn.graph.layers]
    assert sorted(layers) == ["abs", "abs_3", "max_pool2d_3_neurons", "max_pool2d_neurons", "output", "relu"]
    assert pooled_layers(snn) == ["max_pool2d_neurons"]


@torch.no_grad()
def test_a_pool_is_moved_where_it_can_be():
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ConstantPad2d((0, 1, 0, 1), -math.inf), nn.MaxPool2d(2)
    )
    ann = nn.Sequential(*net, nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(100, 3)).eval()
    snn = quartz_plugin.convert(ann, images, 1 << 20, percentile=100)
    torch.testing.assert_close(snn(images), ann(images), rtol=0, atol=1e-4)
    assert [layer.name for layer in snn.graph.layers] == ["5", "output"]
    assert not any(isinstance(module, nn.ConstantPad2d) and module.value for module in snn.graph_module.modules())


def test_the_range_goes_from_the_lowest_to_the_highest_pooled_value():
    ann = nn.Sequential(nn.Conv2d(1, 2, 1), nn.MaxPool2d(2), nn.Conv2d(2, 1, 1)).eval()
    with torch.no_grad():
        ann[0].weight.copy_(torch.tensor([4.0, -8.0]).view(2, 1, 1, 1))
        ann[0].bias.copy_(torch.tensor([-3.0, 1.0]))
    # Of each window the largest and the smallest value count, for the one sign and the other.
    pixels = torch.tensor([[0.0, 0.5], [0.25, 0.25]]), torch.tensor([[1.0, 1.0], [1.0, 0.75]])
    calibration = torch.stack(pixels).unsqueeze(1)
    by_channel = quartz_plugin.convert(ann, calibration, 9, percentile=100, granularity="channel")
    assert by_channel.graph.shifts["1_neurons"].flatten().tolist() == [-1.0, -5.0]
    assert by_channel.graph.scales["1_neurons"].flatten().tolist() == [2.0, 6.0]
    snn = quartz_plugin.convert(ann, calibration, 9, percentile=100)
    assert (float(snn.graph.shifts["1_neurons"]), float(snn.graph.scales["1_neurons"])) == (-5.0, 6.0)
    # Steps of 6/8; a value below the lowest is clipped.
    levels = snn.run(calibration, engine="stepped").levels("1_neurons")
    values = torch.stack([4 * calibration[:, 0] - 3, 1 - 8 * calibration[:, 0]], 1)
    assert torch.equal(levels, ((values + 5) * 8 / 6 + 0.5).floor().clamp(0, 8).int())
    assert levels.min() == 0
    assert float(values.min()) < -5


def test_a_layers_own_options_go_for_the_neurons():
    ann = network("PreActivation")
    options = {"max_pool2d_neurons": {"t_max": 33, "percentile": 90.0, "granularity": "channel"}}
    snn, usual = (quartz_plugin.convert(ann, images, 9, layers=layers) for layers in (options, None))
    assert snn.windows["max_pool2d_neurons"].length == 32
    assert snn.graph.scales["max_pool2d_neurons"].shape == (6, 1, 1)
    assert bool((snn.graph.scales["max_pool2d_neurons"] < usual.graph.scales["max_pool2d_neurons"]).all())


@torch.no_grad()
def test_the_first_layer_may_compute_on_the_image():
    ann = nn.Sequential(
        nn.Conv2d(3, 5, 3, bias=False), nn.MaxPool2d(2), nn.Conv2d(5, 3, 3, padding=1), nn.ReLU(), nn.Flatten()
    )
    for granularity in ("layer", "channel"):
        snn = quartz_plugin.convert(
            ann, images, 1 << 16, percentile=100, first_layer="dense", granularity=granularity, preprocessing=(0.5, 0.5)
        )
        torch.testing.assert_close(snn(images), ann((images - 0.5) / 0.5), rtol=0, atol=1e-3)
        assert [layer.name for layer in snn.graph.layers] == ["3"]
    rows = nn.Sequential(nn.Flatten(1, 2), nn.Linear(12, 4), nn.MaxPool1d(2), nn.Flatten(), nn.Linear(72, 3))
    message = r"first_layer=\"dense\": the channels of '2_neurons' are no outputs of the first layer"
    with pytest.raises(ConversionError, match=message):
        quartz_plugin.convert(rows[1:], images.flatten(1, 2), first_layer="dense", granularity="channel")


@torch.no_grad()
def test_verify_compares_with_the_values_themselves():
    ann = network("NASNet")
    snn = quartz_plugin.convert(ann, images, 2049, percentile=100)
    verified = quartz_plugin.verify(ann, snn, images)
    (layer,) = (each for each in verified.layers if each.layer == "max_pool2d_neurons")
    # The input's rounding and its own, in steps.
    assert layer.worst < 2
    assert layer.saturated == 0
    assert verified.agreement == 1


@torch.no_grad()
def test_a_trained_network_keeps_the_neurons():
    ann = network("PreActivation")
    net = quartz_plugin.prepare_qat(ann, images, 33, calibration_method="percentile", percentile=100)
    assert (net.eval()(images) - ann(images)).abs().max() < 0.1 * ann(images).abs().max()
    with torch.enable_grad():
        net.train()
        optimizer = torch.optim.Adam(net.parameters(), 1e-3)
        for _ in range(3):
            optimizer.zero_grad()
            net(images).square().sum().backward()
            optimizer.step()
    snn = net.eval().to_spiking()
    torch.testing.assert_close(snn(images), net(images), rtol=0, atol=1e-5)
    assert "max_pool2d_neurons" in [layer.name for layer in snn.graph.layers]


@torch.no_grad()
def test_a_trained_network_is_restored(tmp_path):
    ann = network("NASNet")
    net = quartz_plugin.prepare_qat(ann, images, 17, granularity="channel").eval()
    again = restored(ann, structure_of(net), None)
    again.load_state_dict(net.state_dict())
    assert torch.equal(again.eval()(images), net(images))


@pytest.mark.parametrize("name", NETWORKS)
def test_other_libraries_step_the_same_spikes(name):
    snn = make_exact(quartz_plugin.convert(network(name), images, 5))
    wanted = snn.run(images[:2]).spike_steps[snn.graph.layers[-1].name]
    spikes = quartz_plugin.encode(images[:2].double(), 5, snn.n_steps)
    for_snntorch, for_norse, state = snn.to_snntorch(), snn.to_norse(), None
    for step, now in enumerate(spikes):
        first = for_snntorch(now)
        second, state = for_norse(now, state)
        assert torch.equal(first > 0, wanted == step)
        assert torch.equal(second > 0, wanted == step)


@pytest.mark.parametrize("linear", ["compose", "pair"])
@pytest.mark.parametrize("name", NETWORKS)
def test_operations_are_counted(name, linear):
    snn = make_exact(quartz_plugin.convert(network(name), images, 5, linear=linear))
    result = snn.run(images[:2], engine="stepped")
    judge, counted = OneByOne(snn, result), InferenceCounts(snn, result)
    assert as_lists(counted["synops"]) == judge.synops()
    assert as_lists(counted["synops_factored"]) == judge.synops_factored()


@pytest.mark.parametrize("method", ["search", "bias_correction", "least_squares+distill"])
@torch.no_grad()
def test_calibration_methods_see_the_neurons(method):
    ann = network("PreActivation")
    snn = quartz_plugin.convert(ann, images, 33, calibration_method=method, tuning_passes=2, tuning_rate=1e-5)
    wanted = ann(images)
    assert (snn(images) - wanted).abs().mean() < 0.1 * wanted.abs().mean()
    steps = make_exact(snn).run(images[:3], engine="stepped").spike_steps
    assert_same_spikes(snn.run(images[:3], engine="analytic").spike_steps, steps)


@pytest.mark.parametrize(
    ("tensor", "words"),
    [
        (torch.tensor(math.inf, dtype=torch.float64), "not finite"),
        (torch.zeros(7, 1, 1), "does not fit"),
        (torch.zeros((), dtype=torch.int64), "no floating-point type"),
    ],
)
def test_a_damaged_shift_is_not_saved(tensor, words, tmp_path):
    snn = quartz_plugin.convert(network("PreActivation"), images, 5)
    snn.graph.shifts["max_pool2d_neurons"] = tensor
    with pytest.raises(ValueError, match=words):
        snn.save(tmp_path / "net.snn")


def test_values_below_all_are_left_out_and_numbers_are_not():
    for value in (-math.inf, torch.finfo(torch.float32).min, -1e4, -0.5, 0.0, 0.75):
        ann = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ConstantPad2d(1, value), nn.MaxPool2d(3, padding=1), nn.Flatten())
        ann = nn.Sequential(*ann, nn.LazyLinear(3)).eval()
        with torch.no_grad():
            wanted = ann(images)
        snn = quartz_plugin.convert(ann, images, 1 << 18, percentile=100)
        torch.testing.assert_close(snn(images), wanted, rtol=0, atol=1e-4)


def test_bias_spikes_that_cannot_encode_the_lowest_value_are_refused():
    torch.manual_seed(0)
    ann = nn.Sequential(
        nn.Conv2d(2, 6, 3), nn.MaxPool2d(2), nn.Conv2d(6, 4, 2), nn.ReLU(), nn.Flatten(), nn.LazyLinear(3)
    )
    images = torch.rand(20, 2, 6, 6)
    ann(images)
    ann[0].bias.data.add_(3.0)
    with pytest.raises(quartz_plugin.ConversionError, match=r"pools signed values.*give bias=\"synapse\""):
        quartz_plugin.convert(ann, images, 64, **quartz_plugin.PAPER)
    quartz_plugin.convert(ann, images, 64, **(quartz_plugin.PAPER | {"bias": "synapse"}))


def test_the_report_names_clamped_bias_spikes():
    ann, images = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)), torch.rand(20, 6)
    settings = dict(t_max=64, percentile=100, **quartz_plugin.PAPER)
    assert not any("clamped" in row["exact"] for row in quartz_plugin.convert(ann, images, **settings).report)
    ann[0].bias.data.fill_(-9.0)
    ann[0].weight.data.abs_().mul_(8)
    rows = {row["module"]: row["exact"] for row in quartz_plugin.convert(ann, images, **settings).report}
    assert rows["1"] == "exact but for early spikes; biases above 1.5 are clamped"


def test_verify_compares_outputs_in_the_ann_s_units():
    ann, images = (
        nn.Sequential(nn.Conv2d(2, 6, 3), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(24, 3)),
        torch.rand(20, 2, 6, 6),
    )
    ann[3].bias.data.add_(100.0)
    snn = quartz_plugin.convert(ann, images, 4097, percentile=100, task="regression")
    errors = [float(each) for each in (snn(images) - ann(images)).abs().mean(0)]
    assert [each.mean for each in quartz_plugin.verify(ann, snn, images).errors] == pytest.approx(errors, rel=1e-3)
