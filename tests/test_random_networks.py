"""The generators of random networks themselves, and their judges: that they draw what they should and can object."""

import re

import pytest
import torch
from helpers.random_graphs import Clock, assert_the_ann_agrees, assert_the_clock_agrees, random_nets
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

import quartz_plugin

# What must occur among the lines and modules of 900 drawn networks.
DRAWN = {
    "ReLU as a module": r"ReLU\(",
    "ReLU as a function": r"F\.relu\(",
    "ReLU as a method": r"\.relu_?\(\)",
    "clamped": r"clamp\(",
    "ReLU6": r"ReLU6\(|relu6",
    "in place": r"inplace=True|relu_\(\)|add_\(|iadd",
    "sums": r" \+ v|\.add\(|torch\.add\(",
    "differences": r"a - b",
    "constants": r"Constant|\* 0\.5|\+ 0\.25",
    "broadcasting sums": r"a \+ b",
    "copies": r"expand\(|expand_as\(|repeat\(|tile\(|repeat_interleave\(",
    "other orders": r"flip\(|movedim\(|index_select\(",
    "pixel shuffles": r"pixel_(un)?shuffle\(",
    "patches": r"F\.unfold\(",
    "constants beside values": r"\.value\.expand\(",
    "absolute values": r"a\.abs\(\)",
    "the larger and smaller of two": r"torch\.m(ax|in)imum\(",
    "bounds": r"clamp_max\(|a\.clamp\(-",
    "maxima over dimensions": r"amax\(|\.max\(2\)|torch\.max\(",
    "smallest values": r"amin\(|\.min\(",
    "borders below all": r"value=-float",
    "large negative borders": r"value=-1e9",
    "concatenations": r"torch\.cat",
    "chunks": r"\.chunk\(",
    "max pooling": r"MaxPool",
    "adaptive max pooling": r"AdaptiveMaxPool",
    "average pooling": r"AvgPool2d|avg_pool2d",
    "means": r"\.mean\(",
    "cumulative sums": r"cumsum\(",
    "rolls": r"roll\(",
    "slices": r"\[:, 1:\]|\[:, ::2\]|\[\.\.\., 1:\]",
    "shapes": r"reshape\(|unflatten|flatten\(|permute|transpose",
    "padding": r"F\.pad\(|ZeroPad|ConstantPad|ReflectionPad|ReplicationPad",
    "upsampling": r"F\.interpolate",
    "interpolation": r"bilinear.*bicubic|bicubic|bilinear",
    "grouped convolutions": r"groups=[2-9]",
    "strided convolutions": r"Conv2d\(.*stride=\(2",
    "dilated convolutions": r"dilation=\(2",
    "transposed convolutions": r"ConvTranspose",
    "convolutions of sequences": r"Conv1d\(",
    "linear layers": r"Linear\(",
    "batch norm": r"BatchNorm",
    "weights that are computed": r"Parametrized",
    "preprocessing": r"preprocessing \(",
    "vectors": r"input \(\d+,\)",
    "float64": r"torch\.float64",
}
FEW = settings(max_examples=3, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large], deadline=None)


@pytest.mark.slow
def test_every_kind_of_operation_is_drawn():
    drawn = []

    @settings(FEW, max_examples=900, derandomize=True, database=None)
    @given(random_nets())
    def draw(net):
        drawn.append(f"{net!r}\n{net.ann}\n{net_dtype(net)}")
        with torch.no_grad():
            value = net.ann.eval()(net.calibration.to(net_dtype(net)))
        assert value.isfinite().all()
        assert all(str(line) in repr(net) for line in net.ann.lines)

    draw()
    assert [name for name, pattern in DRAWN.items() if not any(re.search(pattern, text) for text in drawn)] == []


def net_dtype(net):
    """Type of a drawn network's weights."""
    return next(net.ann.parameters()).dtype


@settings(FEW, max_examples=30, derandomize=True, database=None)
@given(random_nets(exact=True))
def test_exact_images_stand_on_a_grid(net):
    assert torch.equal(net.images * 2**8, (net.images * 2**8).round())
    assert net.images.min() >= 0
    assert net.images.max() <= 1


@pytest.fixture
def snn():
    """One neuron for each of two inputs' differences, at T = 5."""
    ann = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 1))
    with torch.no_grad():
        ann[0].weight.copy_(torch.tensor([[1.0, -1.0], [-1.0, 1.0]]))
        ann[0].bias.zero_()
        ann[2].weight.fill_(0.5)
        ann[2].bias.zero_()
    return quartz_plugin.convert(ann, torch.tensor([[1.0, 0.0], [0.0, 1.0]]), t_max=5, percentile=100)


def test_the_clock_steps_what_can_be_counted_by_hand(snn):
    # Inputs 1 and 1/4 fire at steps 0 and 3; the drive 3/4 fires a step after readout (4), its opposite at the end.
    clock = Clock(snn, torch.tensor([[1.0, 0.25]]))
    hidden = snn.graph.layers[0].name
    assert clock.spike_steps["input"].tolist() == [[0, 3]]
    assert clock.spike_steps[hidden].tolist() == [[5, 8]]


@pytest.mark.parametrize("shift", [-1, 1])
def test_the_clock_objects_to_one_spike_of_another_step(snn, shift):
    images = torch.tensor([[1.0, 0.25], [0.5, 0.0]])
    steps = snn.run(images, engine="stepped").spike_steps
    assert_the_clock_agrees(snn, images, steps)
    name = snn.graph.layers[0].name
    wrong = steps | {name: steps[name].clone()}
    wrong[name][0, 0] += shift
    with pytest.raises(AssertionError, match=f"{name}: 1 of 4 neurons fire at another step"):
        assert_the_clock_agrees(snn, images, wrong)


def simulated(net, t_max):
    """The spiking network of a random one, and the steps of its spikes; None where it is refused."""
    try:
        snn = net.convert(t_max)
    except quartz_plugin.ConversionError:
        return None
    return snn, snn.run(net.images.to(net_dtype(net)), engine="stepped").spike_steps


@settings(FEW)
@given(random_nets(), st.integers(3, 8))
def test_the_ann_objects_to_one_spike_of_another_level(net, t_max):
    if (found := simulated(net, t_max)) is None or not assert_the_ann_agrees(net, *found):
        return
    snn, steps = found
    name = snn.graph.layers[-1].name
    wrong = steps | {name: torch.where(steps[name] > steps[name].min(), steps[name].min(), steps[name] + 2)}
    with pytest.raises(AssertionError):
        assert_the_ann_agrees(net, snn, wrong)


def test_the_ann_judges_most_networks():
    judged = []

    @settings(FEW, max_examples=30, derandomize=True, database=None)
    @given(random_nets(), st.integers(3, 8))
    def judge(net, t_max):
        if (found := simulated(net, t_max)) is not None:
            judged.append(assert_the_ann_agrees(net, *found))

    judge()
    assert len(judged) > 20
    assert sum(judged) > len(judged) / 2
