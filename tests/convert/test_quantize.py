"""Conversion with weight_bits: weights on a grid, and engines that agree bit for bit."""

import math

import pytest
import torch
from helpers.conversions import LINEAR, PERCENTILES, T_MAXIMA, assert_same_spikes, engines_of
from helpers.one_by_one import AVERAGES
from helpers.paths import SHARED
from helpers.random_chains import MANY, NEURONS
from helpers.random_graphs import own_windows, pools_mixed_scales, random_nets
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import quartz_plugin
from quartz_plugin import ConversionError
from quartz_plugin.config import ConversionConfig
from quartz_plugin.convert.pipeline import calibrate_network
from quartz_plugin.convert.quantize import quantize
from quartz_plugin.convert.rescale import rescale
from quartz_plugin.convert.run import Run
from quartz_plugin.engines.integer import without_integer_operators
from quartz_plugin.operators.modules import OneToOne
from quartz_plugin.operators.table import WEIGHTED


@st.composite
def quantized(draw):
    """A random network on fixed-point weights, any options."""
    net = draw(random_nets())
    options = {**draw(NEURONS), "linear": draw(LINEAR), "percentile": draw(PERCENTILES)}
    options |= {
        "weight_bits": draw(st.sampled_from([2, 4, 8, 8])),
        "granularity": draw(st.sampled_from(["layer"] * 3 + ["channel"])),
        "weight_granularity": draw(st.sampled_from([None, "layer", "channel"])),
    }
    # With a long window few types hold a membrane, and the network moves to float64.
    t_max = draw(st.one_of(T_MAXIMA, T_MAXIMA, st.just(65)))
    if draw(st.booleans()) and has_dense_first_layer(net):
        options["first_layer"] = "dense"
    try:
        snn = net.convert(t_max, **options)
        if draw(st.booleans()):
            own = own_windows(draw, snn)
            if "first_layer" in options:
                # No spikes encode the image.
                own.pop("input", None)
            snn = net.convert(t_max, **options, layers=own)
    except ConversionError as refusal:
        if not (pools_mixed_scales(net, refusal) or "no fixed weights add up" in str(refusal)):
            raise
        return net, None
    return net, snn


def has_dense_first_layer(net):
    """Check whether one layer and its ReLU stand between the image and all the rest."""
    try:
        net.convert(4, first_layer="dense")
    except ConversionError as refusal:
        if 'first_layer="dense" needs one convolution' not in str(refusal):
            raise
        return False
    return True


@MANY
@given(quantized())
def test_all_engines_agree_bit_for_bit(conversion):
    net, snn = conversion
    if snn is None:
        return
    results = [snn.run(net.images, engine=engine) for engine in engines_of(snn)]
    if snn.graph.hold:
        assert results[-1].engine == "integer"
        with without_integer_operators():
            results.append(snn.run(net.images, engine="integer"))
    for other in results[1:]:
        assert_same_spikes(other.spike_steps, results[0].spike_steps)
        assert torch.equal(other.logits, results[0].logits)
        assert torch.equal(other.membrane, results[0].membrane)


@pytest.mark.parametrize("granularity", ["layer", "channel"])
@pytest.mark.parametrize("bits", [2, 5, 8, 16])
def test_weights_are_whole_numbers_of_so_many_bits_on_a_binary_grid(bits, granularity):
    torch.manual_seed(1)
    ann = nn.Sequential(nn.Conv2d(2, 5, 3), nn.ReLU(), nn.AvgPool2d(3), nn.Flatten(), nn.Linear(20, 4))
    images = torch.rand(20, 2, 8, 8)
    snn = quartz_plugin.convert(ann, images, weight_bits=bits, granularity=granularity)
    plain = quartz_plugin.convert(ann, images, granularity=granularity)
    compared = 0
    for (path, module), other in zip(snn.graph_module.named_modules(), plain.graph_module.modules(), strict=True):
        assert not isinstance(module, AVERAGES) or module.divisor_override == 1
        if not isinstance(module, (*WEIGHTED, OneToOne)):
            continue
        rows = module.weight.double() if granularity == "channel" else module.weight.double().unsqueeze(0)
        for row, original in zip(rows, other.weight.double().reshape(rows.shape), strict=True):
            grid = 2.0 ** -math.floor(math.log2((2 ** (bits - 1) - 1) / row.abs().max()))
            # The largest rounded weight may allow a grid twice as fine.
            assert torch.equal(row / grid, (row / grid).round())
            assert (row / grid).abs().max() <= 2 ** (bits - 1) - 1
            if path == "0":
                assert ((row - original).abs() <= grid).all()
                compared += 1
    assert compared == (5 if granularity == "channel" else 1)
    assert snn.graph.settings["weight_bits"] == bits


def test_with_16_bits_the_logits_are_nearly_those_of_free_weights():
    torch.manual_seed(2)
    ann = nn.Sequential(nn.Conv1d(2, 6, 3), nn.ReLU(), nn.AvgPool1d(3), nn.Flatten(), nn.Linear(18, 3))
    images = torch.rand(50, 2, 11)
    logits = [quartz_plugin.convert(ann, images, 1000, weight_bits=bits)(images) for bits in (16, None)]
    assert (logits[0] - logits[1]).abs().max() < 0.01 * logits[1].abs().max()


def test_a_network_that_float32_cannot_hold_is_made_in_float64():
    torch.manual_seed(3)
    wide = nn.Sequential(nn.Linear(3000, 20), nn.ReLU(), nn.Linear(20, 3))
    assert quartz_plugin.convert(wide, torch.rand(8, 3000), 64, weight_bits=16).graph.dtype == torch.float64
    small = nn.Sequential(nn.Linear(10, 20), nn.ReLU(), nn.Linear(20, 3))
    assert quartz_plugin.convert(small, torch.rand(8, 10), 8, weight_bits=8).graph.dtype == torch.float32


def test_a_dense_first_layer_computes_in_the_type_of_the_network_behind_it(tmp_path):
    torch.manual_seed(7)
    ann = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3), nn.ReLU(), nn.Flatten(), nn.Linear(3200, 5)
    )
    images = torch.rand(8, 3, 12, 12)
    snn = quartz_plugin.convert(ann, images, 64, weight_bits=16, first_layer="dense")
    assert snn.graph.dtype == torch.float64
    assert {tensor.dtype for tensor in snn.dense_stem.state_dict().values()} == {torch.float64}
    expected = snn.run(images, engine="stepped")
    for engine in engines_of(snn):
        assert_same_spikes(snn.run(images, engine=engine).spike_steps, expected.spike_steps)
    snn.save(tmp_path / "snn.safetensors")
    assert torch.equal(quartz_plugin.load(tmp_path / "snn.safetensors")(images), snn(images))


def test_quantize_leaves_the_network_that_it_is_given_as_it_is():
    torch.manual_seed(8)
    ann = nn.Sequential(nn.Linear(3000, 20), nn.ReLU(), nn.Linear(20, 3))
    config = ConversionConfig(t_max=64, weight_bits=16)
    calibrated = calibrate_network(ann, torch.rand(8, 3000), config, Run())
    scaled = rescale(calibrated)
    weights = {path: module.weight.clone() for path, module in scaled.modules.items()}
    biases = [layer.bias.clone() for layer in scaled.layers.values()]
    on_grids = quantize(scaled, calibrated)
    assert {module.weight.dtype for module in on_grids.modules.values()} == {torch.float64}
    for path, weight in weights.items():
        assert torch.equal(scaled.modules[path].weight, weight)
        assert scaled.modules[path].weight.dtype == weight.dtype == torch.float32
        assert not torch.equal(on_grids.modules[path].weight.float(), weight)
    assert all(torch.equal(layer.bias, bias) for layer, bias in zip(scaled.layers.values(), biases, strict=True))


@pytest.mark.parametrize(
    "average",
    [nn.AdaptiveAvgPool2d(1), nn.AdaptiveAvgPool2d((2, 3)), nn.AvgPool2d(2, 1, padding=1, count_include_pad=False)],
    ids=str,
)
def test_averages_are_sums_whose_share_is_in_the_weights_that_follow(average):
    torch.manual_seed(4)
    body = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), average, nn.Flatten())
    images = torch.rand(30, 1, 6, 6)
    ann = nn.Sequential(body, nn.Linear(body(images).shape[1], 3))
    snn = quartz_plugin.convert(ann, images, 2000, percentile=100, weight_bits=16)
    assert (snn(images) - ann(images)).abs().max() < 0.02 * ann(images).abs().max()


@pytest.mark.parametrize("size", [1e-4, 1e-11, 1e-20, 0.0])
def test_a_channel_that_is_nearly_dead_widens_nothing(size):
    torch.manual_seed(6)
    ann, images = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)), torch.rand(20, 6)
    with torch.no_grad():
        ann[2].weight[1] *= size
        ann[2].bias[1] *= size
    snn = quartz_plugin.convert(ann, images, weight_bits=8, granularity="channel")
    expected = snn.run(images, engine="stepped")
    for engine in engines_of(snn):
        assert_same_spikes(snn.run(images, engine=engine).spike_steps, expected.spike_steps)
    plain = quartz_plugin.convert(ann, images, granularity="channel")
    assert (snn(images) - plain(images)).abs().max() <= 2 * snn.graph.output_scale / 15


def test_an_average_over_windows_of_several_sizes_is_refused_by_name():
    torch.manual_seed(1)
    ann = nn.Sequential(nn.Conv2d(1, 2, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(8, 2))
    with pytest.raises(ConversionError, match=r"'2' \(AdaptiveAvgPool2d\) with weight_bits.*no fixed weights add up"):
        quartz_plugin.convert(ann, torch.rand(4, 1, 5, 5), weight_bits=8)


@pytest.mark.parametrize("bits", [1, 17, 8.0, True, "8"])
def test_other_numbers_of_bits_are_refused(bits):
    with pytest.raises(ValueError, match="weight_bits must be a whole number from 2 to 16"):
        quartz_plugin.convert(nn.Linear(2, 2), torch.rand(4, 2), weight_bits=bits)


def test_a_saved_network_keeps_its_grid(tmp_path):
    torch.manual_seed(5)
    ann = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
    images = torch.rand(10, 1, 6, 6)
    snn = quartz_plugin.convert(ann, images, weight_bits=8)
    snn.save(tmp_path / "snn.safetensors")
    loaded = quartz_plugin.load(tmp_path / "snn.safetensors")
    assert torch.equal(loaded(images), snn(images))
    assert loaded.graph.dtype == snn.graph.dtype


@pytest.mark.shared
@pytest.mark.parametrize("options", [{}, {"hold": False}, quartz_plugin.PAPER], ids=str)
def test_the_papers_network_in_8_bits_keeps_its_accuracy_and_engines_agree(mnist_ann, mnist_train, mnist_test, options):
    assert SHARED.exists()
    snn = quartz_plugin.convert(mnist_ann, mnist_train[0][:2000], 16, percentile=99.9, weight_bits=8, **options)
    images, labels = mnist_test[0][:500], mnist_test[1][:500]
    results = [snn.run(images, engine=engine) for engine in engines_of(snn)]
    for other in results[1:]:
        assert_same_spikes(other.spike_steps, results[0].spike_steps)
    assert (results[0].logits.argmax(1) == labels).float().mean() >= 0.975


SUMS = {
    "channels": lambda x: x.sum(1),
    "channels and rows": lambda x: x.sum((1, 2)),
    "channels and columns": lambda x: x.sum((1, 3), keepdim=True),
    "all": lambda x: x.sum((1, 2, 3), keepdim=True),
    "rows": lambda x: x.sum(2),
    "a vector": lambda x: x.flatten(1).sum(-1, keepdim=True),
    "a sequence": lambda x: x.flatten(2).sum(2),
    "blocks": lambda x: x.unflatten(1, (2, 2)).sum((1, 3)),
    "mean of channels": lambda x: x.mean(1),
    "mean of blocks": lambda x: x.unflatten(1, (2, 2)).mean((2, 4)),
}


class Summed(nn.Module):
    def __init__(self, how):
        super().__init__()
        self.conv, self.how, self.head = nn.Conv2d(3, 4, 1), how, nn.LazyLinear(3)

    def forward(self, x):
        return self.head(self.how(self.conv(x).relu()).relu().flatten(1))


@pytest.mark.parametrize("options", [{}, {"hold": False}, {"granularity": "channel"}], ids=str)
@pytest.mark.parametrize("how", SUMS)
def test_sums_and_means_over_any_dimensions_are_sums_of_spikes(how, options):
    ann, images = Summed(SUMS[how]).eval(), torch.rand(30, 3, 4, 4)
    wanted = ann(images).detach()
    snn = quartz_plugin.convert(ann, images, 257, weight_bits=8, percentile=100, **options)
    result = snn.run(images[:10], engine="stepped")
    for engine in engines_of(snn):
        assert_same_spikes(snn.run(images[:10], engine=engine).spike_steps, result.spike_steps)
    assert (result.logits - wanted[:10]).abs().max() < 0.05 * wanted.abs().max()
    averages = [m for m in snn.graph_module.modules() if isinstance(m, AVERAGES)]
    assert all(m.divisor_override == 1 for m in averages)


class Shortcut(nn.Module):
    """A convolution and, of channels of very different sizes, a shortcut around it."""

    def __init__(self):
        super().__init__()
        self.stem, self.conv, self.head = nn.Conv2d(2, 6, 3), nn.Conv2d(6, 6, 3, padding=1), nn.Linear(96, 3)
        with torch.no_grad():
            self.stem.weight[0] *= 1e-3
            self.stem.bias[0] *= 1e-3

    def forward(self, x):
        x = self.stem(x).relu()
        return self.head((self.conv(x) + x).relu().flatten(1))


def test_one_to_one_synapses_have_a_grid_for_each_channel():
    torch.manual_seed(9)
    ann, images = Shortcut(), torch.rand(20, 2, 6, 6)
    fixed, free = (
        quartz_plugin.convert(ann, images, 64, granularity="channel", weight_bits=bits) for bits in (8, None)
    )
    compared = 0
    for module, other in zip(fixed.graph_module.modules(), free.graph_module.modules(), strict=True):
        if isinstance(module, OneToOne):
            assert module.weight.max() > 100 * module.weight.min() > 0
            assert ((module.weight - other.weight).abs() <= other.weight / 60).all()
            compared += 1
    assert compared == 1


@pytest.mark.parametrize("bits", [4, 8])
def test_a_grid_for_each_channel_leaves_the_scales_of_layers_and_rounds_small_channels_less(bits):
    torch.manual_seed(11)
    ann, images = nn.Sequential(nn.Conv2d(2, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(128, 4)), torch.rand(50, 2, 6, 6)
    with torch.no_grad():
        ann[0].weight.mul_(torch.logspace(-1, 0, 8).view(-1, 1, 1, 1))
    options = {"weight_bits": bits, "percentile": 100}
    free = quartz_plugin.convert(ann, images, 16, percentile=100)
    by_layer, by_channel = (
        quartz_plugin.convert(ann, images, 16, **options, weight_granularity=each) for each in ("layer", "channel")
    )
    scales = (snn.graph.scales.values() for snn in (by_layer, by_channel))
    assert all(torch.equal(one, other) for one, other in zip(*scales, strict=True))
    weight, *rounded = (snn.graph_module.get_submodule("0").weight.flatten(1) for snn in (free, by_layer, by_channel))
    errors = [(each - weight).abs().amax(1) for each in rounded]
    assert (errors[1] <= weight.abs().amax(1) / (2 ** (bits - 1) - 1)).all()
    assert errors[1][0] < 0.3 * errors[0][0]
    alike = quartz_plugin.convert(ann, images, 16, **options)
    assert torch.equal(alike(images), by_layer(images))


@pytest.mark.parametrize("granularity", ["layer", "channel"])
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("t_max", [4, 64, 256])
def test_up_to_8_bits_float32_holds_held_neurons(t_max, bits, granularity):
    torch.manual_seed(3)
    ann = nn.Sequential(nn.Linear(4000, 20), nn.ReLU(), nn.Linear(20, 3))
    with torch.no_grad():
        ann[0].weight[3] *= 1e-3
    images = torch.rand(20, 4000)
    snn = quartz_plugin.convert(ann, images, t_max, weight_bits=bits, granularity=granularity)
    assert snn.graph.dtype == torch.float32
    # The most that the inputs of a neuron add up to, in whole numbers, is below 2^24.
    weight, bias = (
        snn.graph_module.get_submodule("0").weight.double(),
        snn.graph_module.get_submodule("1").bias.double(),
    )
    for row, own in zip(weight, bias.flatten(), strict=True):
        places = next(p for p in range(60) if all((x * 2.0**p).frac().eq(0).all() for x in (row, own)))
        up = row.clamp(min=0).sum() + own.clamp(min=0)
        down = (-row).clamp(min=0).sum() + (-own).clamp(min=0)
        assert float(torch.maximum(up, down)) * (t_max - 1) * 2.0**places < 2**24
    for engine in engines_of(snn):
        assert_same_spikes(snn.run(images, engine=engine).spike_steps, snn.run(images, engine="stepped").spike_steps)


class Bottlenecks(nn.Module):
    """Linear maps in a row, some of their channels nearly dead: more bits than float64 has, on the finest grids."""

    def __init__(self, maps):
        super().__init__()
        self.maps = nn.Sequential(*[nn.Conv2d(6, 6, 1, bias=False) for _ in range(maps)])
        self.head = nn.Linear(6, 3)
        with torch.no_grad():
            for module in self.maps:
                module.weight[1] *= 1e-6

    def forward(self, x):
        return self.head(self.maps(x).relu().mean((2, 3)))


@pytest.mark.parametrize("maps", [2, 4, 7])
def test_linear_maps_in_a_row_convert_with_8_bits(maps):
    torch.manual_seed(10)
    ann, images = Bottlenecks(maps), torch.rand(20, 6, 3, 3)
    snn = quartz_plugin.convert(ann, images, 64, weight_bits=8, granularity="channel", percentile=100)
    assert snn.graph.dtype == torch.float64
    expected = snn.run(images, engine="stepped")
    for engine in engines_of(snn):
        assert_same_spikes(snn.run(images, engine=engine).spike_steps, expected.spike_steps)
    wanted = ann(images).detach()
    assert (expected.logits - wanted).abs().max() < 0.2 * wanted.abs().max()
