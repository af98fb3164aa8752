"""Networks with several inputs, signed inputs and ranges of their own."""

import copy
from importlib.util import find_spec

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import quartz_plugin
import quartz_plugin.plot
from quartz_plugin.inputs import Input, Inputs


class Siamese(nn.Module):
    """Two images through one stem, and their difference through another layer."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten())
        self.last = nn.Sequential(nn.Linear(64, 6), nn.ReLU(), nn.Linear(6, 2))

    def forward(self, left, right):
        return self.last(self.stem(left) - self.stem(right))


class Fused(nn.Module):
    """An image and a vector of a sensor's."""

    def __init__(self):
        super().__init__()
        self.image = nn.Sequential(
            nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
        )
        self.last = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3))

    def forward(self, image, sensor, scale=None):
        x = torch.cat([self.image(image), sensor], 1)
        return self.last(x if scale is None else x * scale)


def agrees(ann, snn, *inputs, most=2e-2):
    with torch.no_grad():
        wanted = ann.eval()(*inputs)
    given = snn(*inputs)
    assert float((given - wanted).abs().max()) < most * float(wanted.abs().max())
    given_as_one = snn.run(inputs if len(inputs) > 1 else inputs[0])
    assert torch.equal(given_as_one.logits, given)
    return given_as_one


def engines_agree(snn, inputs):
    steps = snn.run(inputs, engine="stepped").spike_steps
    for engine in ("analytic", "event"):
        if engine == "event":
            pytest.importorskip("numba")
        for name, found in snn.run(inputs, engine=engine).spike_steps.items():
            assert float((found != steps[name]).float().mean()) <= 1e-3, (engine, name)


def test_two_images_through_one_stem(tmp_path):
    ann, left, right = Siamese(), torch.rand(40, 1, 6, 6), torch.rand(40, 1, 6, 6)
    snn = quartz_plugin.convert(ann, (left, right), 2049, percentile=100)
    result = agrees(ann, snn, left, right)
    assert result.spike_steps["input"].shape == (40, 72)
    assert torch.equal(snn.run({"right": right, "left": left}).logits, result.logits)
    snn.save(tmp_path / "net.snn")
    again = quartz_plugin.load(tmp_path / "net.snn")
    assert torch.equal(again(left, right), result.logits)
    assert torch.equal(copy.deepcopy(snn)(left, right), result.logits)
    engines_agree(quartz_plugin.convert(ann, (left, right), 9), (left[:5], right[:5]))


@pytest.mark.parametrize(
    "batches",
    [
        lambda x, y: [(x[:20], y[:20]), (x[20:], y[20:])],
        lambda x, y: [((x, y), torch.zeros(40))],
        lambda x, y: [(x, y, torch.zeros(40))],
        lambda x, y: ({"image": x[:7], "sensor": y[:7], "label": 3} for _ in range(2)),
    ],
)
def test_calibration_is_given_in_batches(batches):
    ann, image, sensor = Fused().eval(), torch.rand(40, 2, 5, 5), torch.rand(40, 5)
    snn = quartz_plugin.convert(ann, batches(image, sensor), 2049, percentile=100)
    agrees(ann, snn, image[:7], sensor[:7], most=5e-2)


def test_each_input_has_its_range_and_preprocessing():
    ann, image, sensor = Fused().eval(), torch.rand(60, 2, 5, 5), torch.randn(60, 5).clamp(-3, 3) * 4
    ranges = [None, (-12, 12)]
    snn = quartz_plugin.convert(ann, (image, sensor), 4097, percentile=100, input_range=ranges)
    agrees(ann, snn, image, sensor)
    mean, std = torch.tensor([0.5, 0.4]), torch.tensor([0.2, 0.3])
    snn = quartz_plugin.convert(
        ann, (image, sensor), 4097, percentile=100, input_range=ranges, preprocessing=[(mean, std), None]
    )
    normalised = (image - mean.view(2, 1, 1)) / std.view(2, 1, 1)
    with torch.no_grad():
        wanted = ann(normalised, sensor)
    assert float((snn(image, sensor) - wanted).abs().max()) < 2e-2 * float(wanted.abs().max())
    assert quartz_plugin.verify(ann, snn, (image, sensor)).agreement is not None
    assert snn.graph.config == quartz_plugin.ConversionConfig.from_dict(snn.graph.config.to_dict())


@pytest.mark.parametrize("shape", [(6,), (2, 5, 5)])
@pytest.mark.parametrize("by_channel", [False, True])
def test_a_signed_input_has_two_units_a_value(shape, by_channel, tmp_path):
    first = nn.Linear(6, 8) if len(shape) == 1 else nn.Conv2d(2, 4, 3)
    ann = nn.Sequential(first, nn.ReLU(), nn.Flatten(), nn.LazyLinear(3))
    values = torch.randn(80, *shape)
    ann(values)
    largest = values.abs().amax([dim for dim in range(values.dim()) if dim != 1])
    ends = (-largest, largest) if by_channel else (-float(largest.max()), float(largest.max()))
    snn = quartz_plugin.convert(ann, values, 4097, percentile=100, input_range=ends)
    result = agrees(ann, snn, values)
    assert result.spike_steps["input"].shape == (80, 2, *shape)
    silent = quartz_plugin.convert(ann, values, 64, input_range=ends, rectifier="silent")
    spikes = silent.run(values).spike_steps["input"] != -1
    assert not (spikes[:, 0] & spikes[:, 1]).any()
    zero = silent.run(torch.zeros(1, *shape)).spike_steps["input"]
    assert (zero == -1).all()
    engines_agree(quartz_plugin.convert(ann, values, 9, input_range=ends), values[:5])
    snn.save(tmp_path / "net.snn")
    assert torch.equal(quartz_plugin.load(tmp_path / "net.snn")(values), result.logits)


def test_a_wide_range_of_no_sign():
    ann, values = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)), torch.rand(50, 4) * 255
    snn = quartz_plugin.convert(ann, values, 4097, percentile=100, input_range=(0, 255))
    assert agrees(ann, snn, values).spike_steps["input"].shape == (50, 4)


def test_values_outside_are_refused_or_clamped():
    ann, values = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)), torch.randn(50, 4).clamp(-1, 1)
    snn = quartz_plugin.convert(ann, values, 16, input_range=(-1, 1))
    with pytest.raises(ValueError, match=r"images must have values from -1 to 1, got .* or clamp_inputs=True"):
        snn(values * 2)
    clamped = quartz_plugin.convert(ann, values * 3, 16, input_range=(-1, 1), clamp_inputs=True)
    assert torch.equal(clamped(values * 2), clamped((values * 2).clamp(-1, 1)))
    with pytest.raises(ValueError, match="NaN"):
        clamped(values * float("nan"))
    unit = quartz_plugin.convert(ann, values, 16, clamp_inputs=True)
    assert torch.equal(unit(values * 2), unit((values * 2).clamp(0, 1)))


def test_an_input_of_one_number_an_image():
    class Timed(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 2)

        def forward(self, x, t):
            return self.b(self.a(x).relu() + t[:, None])

    ann, inputs = Timed().eval(), (torch.rand(30, 4), torch.rand(30))
    agrees(ann, quartz_plugin.convert(ann, inputs, 4097, percentile=100), *inputs)


def test_networks_of_several_inputs_are_stepped_by_hand():
    ann, left, right = Siamese().eval(), torch.rand(3, 1, 6, 6), torch.rand(3, 1, 6, 6)
    snn = quartz_plugin.convert(ann, (left, right), 6)
    net = snn.to_snntorch()
    spikes = [net(step) for step in quartz_plugin.encode(snn.values_to_encode((left, right)), 6, snn.n_steps)]
    assert torch.equal(snn.decode(torch.stack(spikes)), snn(left, right))


def test_what_does_not_fit_is_refused_in_one_line():
    ann, left, right = Siamese(), torch.rand(9, 1, 6, 6), torch.rand(9, 1, 6, 6)
    with pytest.raises(
        quartz_plugin.ConversionError, match=r"forward also takes 'right': calibration must be a tuple of 2 tensors"
    ):
        quartz_plugin.convert(ann, left)
    with pytest.raises(ValueError, match="input_range has 1 entries, and the network takes 2 inputs"):
        quartz_plugin.convert(ann, (left, right), input_range=(-1, 1))
    with pytest.raises(ValueError, match="preprocessing must be a list of 2 pairs"):
        quartz_plugin.convert(ann, (left, right), preprocessing=[(0.5, 0.5)])
    with pytest.raises(quartz_plugin.ConversionError, match='first_layer="dense" computes on one input'):
        quartz_plugin.convert(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)), torch.rand(5, 4) - 0.5,
                              input_range=(-1, 1), first_layer="dense")  # fmt: skip
    snn = quartz_plugin.convert(ann, (left, right), 5)
    with pytest.raises(TypeError, match=r"images must be a tuple of 2 tensors \(left, right\), got Tensor"):
        snn(left)
    with pytest.raises(ValueError, match="one batch size, got"):
        snn(left, right[:3])
    with pytest.raises(ValueError, match=r"images \(right\) must have the shape"):
        snn(left, right[:, :, :5])
    for ends in [(1, 0), (-2, -1), (0, float("nan")), "wide", (1,)]:
        with pytest.raises(ValueError, match="input_range"):
            quartz_plugin.convert(ann, (left, right), input_range=ends)
    quartz_plugin.check_convertible(ann, (left, right))


def test_allocated_and_drawn_with_signed_inputs_but_not_trained():
    ann, values = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)), torch.randn(60, 4).clamp(-2, 2)
    snn = quartz_plugin.convert(ann, values, 9, input_range=(-2, 2))
    assert quartz_plugin.verify(ann, snn, values).agreement > 0.5
    if find_spec("matplotlib"):
        for image in (values[0], values[:1]):
            assert len(quartz_plugin.plot.chronogram(snn, image)) == 3
    with pytest.raises(quartz_plugin.ConversionError, match=r"prepare_qat trains networks of one input in \[0, 1\]"):
        quartz_plugin.prepare_qat(ann, values, 9, input_range=(-2, 2))
    windows = quartz_plugin.allocate_steps(ann, values, steps=60, input_range=(-2, 2))
    assert quartz_plugin.convert(ann, values, windows, input_range=(-2, 2)).n_steps <= 60


@pytest.mark.parametrize(
    "spoilt",
    [
        "words",
        [[["x", [3], [0.0], [1.0]]], False],
        [[["x", [4], [0.0], [float("inf")]]], False],
        [[["x", [4], [1.0], [0.0]]], False],
        [[["x", [4], [0.0, 0.0], [1.0]]], False],
        [[], False],
    ],
)
def test_damaged_inputs_are_refused(spoilt):
    with pytest.raises(ValueError, match="its inputs"):
        Inputs.from_json(spoilt, (4,))


sizes = st.lists(st.integers(1, 3), min_size=1, max_size=3).map(tuple)


@given(st.lists(st.tuples(sizes, st.floats(-4, 0), st.floats(0.5, 4)), min_size=1, max_size=3), st.integers(1, 3))
def test_units_hold_what_they_are_packed_of(parts, batch):
    inputs = Inputs(
        tuple(Input(f"x{i}", shape, (low,), (high,)) for i, (shape, low, high) in enumerate(parts)), clamp=True
    )
    values = tuple(torch.randn(batch, *shape) for shape, _, _ in parts)
    packed = inputs.pack(values if len(values) > 1 else values[0])
    assert packed.shape[1:] == inputs.packed_shape
    assert packed.min() >= 0
    assert packed.max() <= 1
    for (_, low, high), one, other in zip(parts, inputs.unpack(packed), values, strict=True):
        assert torch.allclose(one, other.clamp(low, high), atol=1e-5)
    assert Inputs.from_json(inputs.to_json(), inputs.packed_shape) == inputs
