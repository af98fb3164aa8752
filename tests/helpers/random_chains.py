"""Random chains of layers for hypothesis, and readers of converted networks that the tests trust.

What is expected is written here once more and apart from the package: levels by rounding, drives by walking
the emitted graph, the ANN computing with rounded activations.
"""

import copy
import math
from dataclasses import dataclass, field

import numpy as np
import torch
from hypothesis import Phase, assume, settings
from hypothesis import strategies as st
from torch import nn

import quartz_plugin
from quartz_plugin import AxonalDelay, FirstSpikeMaxPool, TTFSNeuron

_QUICK_TO_FAIL = [Phase.explicit, Phase.reuse, Phase.generate, Phase.shrink]  # Explaining takes minutes.
MANY = settings(max_examples=2 * settings().max_examples, phases=_QUICK_TO_FAIL)
"""Twice the profile's number of examples: on networks this small they take milliseconds."""
SOME = settings(phases=_QUICK_TO_FAIL)

TIE = 1e-4
"""Two engines may differ where a drive is this close to a half."""


@dataclass
class Chain:
    """A random network with images for it.

    ``relus`` holds, for each ReLU, the pads and max pools between it and the linear map before it, and that
    map's shape: its neurons stand in front of the pools, and of the pads or behind them.
    """

    ann: nn.Module
    input_shape: tuple[int, ...]
    calibration: torch.Tensor
    images: torch.Tensor
    preprocessing: tuple | None
    ends: str
    relus: list[tuple[nn.ReLU, list[nn.Module], tuple[int, ...]]] = field(default_factory=list)

    def convert(self, t_max, **options):
        return quartz_plugin.convert(self.ann, self.calibration, t_max, preprocessing=self.preprocessing, **options)

    def _repr_pretty_(self, printer, cycle):
        printer.text(repr(self))

    def __repr__(self):
        return (
            f"Chain(input {self.input_shape}, {len(self.images)} images, ends in {self.ends}, "
            f"preprocessing {self.preprocessing}, {next(self.ann.parameters()).dtype}, {self.ann})"
        )


def spelled(pick, value, rank):
    """A setting, `value` along each of `rank` dimensions of space, in one of the ways in which torch takes it."""
    return pick(value, value, (value,), [value], (value,) * rank, [value] * rank, np.int64(value))


def spelled_kernel(pick, value, rank):
    """The same of a convolution's kernel, of which torch wants the size along each dimension."""
    return pick(value, value, (value,) * rank, [value] * rank, np.int64(value))


def spelled_stride(pick, rank):
    """The stride of a pooling: as wide as its windows, or 1 or 2."""
    return pick(None, [], (), *(spelled(pick, value, rank) for value in (1, 2)))


def shape_behind(module, shape):
    """Shape that a module makes of a shape (no batch), or None where it does not fit."""
    try:
        with torch.no_grad():
            out = copy.deepcopy(module).eval().float()(torch.zeros(1, *shape))
    except (RuntimeError, ValueError):
        return None
    # Max pooling of padding alone, as dilation makes it, is -inf in the ANN already.
    return tuple(out.shape[1:]) if out.numel() > 0 and bool(out.isfinite().all()) else None


class _Builder:
    """Collects modules that fit one behind the other."""

    def __init__(self, draw, shape, exact):
        self.draw, self.shape, self.exact = draw, shape, exact
        self.modules, self.relus, self.pools = [], [], []

    @property
    def dims(self):
        return len(self.shape) - 1

    def chance(self, percent=50):
        # The simplest example, to which hypothesis shrinks, takes no option.
        return self.draw(st.integers(0, 99)) >= 100 - percent

    def pick(self, *values):
        return self.draw(st.sampled_from(values))

    def spelled(self, value):
        return spelled(self.pick, value, self.dims)

    def add(self, module):
        shape = shape_behind(module, self.shape)
        if shape is None:
            return False
        self.modules.append(module)
        self.shape = shape
        return True

    def linear_map(self):
        out = self.pick(2, 3, 4, 5, 6, 4)
        if self.dims == 0:
            self.add(nn.Linear(self.shape[0], out, bias=self.chance(70)))
            return
        kind = (nn.Conv1d, nn.Conv2d)[self.dims - 1]
        channels = self.shape[0]
        groups = self.pick(*[g for g in (1, 2, 3, 4) if channels % g == 0 and out % g == 0])
        for _ in range(3):
            padding = self.pick(0, 1, 2, "same", "valid")
            kernel = self.draw(st.integers(1, 3))
            options = {
                "kernel_size": spelled_kernel(self.pick, kernel, self.dims),
                "stride": self.spelled(1 if padding == "same" else self.pick(1, 2)),
                "padding": padding if isinstance(padding, str) else self.spelled(padding),
                "dilation": self.spelled(self.pick(1, 2)) if padding != "same" else (self.pick(1, 2),) * self.dims,
                "groups": groups,
                "bias": self.chance(70),
                "padding_mode": self.pick("zeros", "zeros", "zeros", "reflect", "circular"),
            }
            if self.add(kind(channels, out, **options)):
                return
        self.add(kind(channels, out, 1, groups=groups))

    def norm(self):
        kind = nn.BatchNorm2d if self.dims == 2 else nn.BatchNorm1d
        norm = kind(self.shape[0], affine=self.chance(80))
        with torch.no_grad():
            norm.running_mean.normal_(0, 0.3)
            norm.running_var.uniform_(0.3, 2)
            if norm.affine:
                norm.weight.normal_(1, 0.5)
                norm.bias.normal_(0.2, 0.3)
        self.add(norm)

    def average_pool(self):
        if self.dims == 0:
            return
        kind = (nn.AvgPool1d, nn.AvgPool2d)[self.dims - 1]
        if self.exact:
            stride = spelled_stride(self.pick, self.dims)
            self.add(kind(self.spelled(2), stride=stride, padding=self.spelled(self.pick(0, 1))))
        elif self.chance(30):
            size = self.draw(st.integers(1, min(3, *self.shape[1:])))
            self.add((nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d)[self.dims - 1](size))
        else:
            kernel = self.draw(st.integers(1, 3))
            self.add(
                kind(
                    self.spelled(kernel),
                    stride=spelled_stride(self.pick, self.dims),
                    padding=self.spelled(self.draw(st.integers(0, kernel // 2))),
                    ceil_mode=self.chance(20),
                    count_include_pad=self.chance(),
                )
            )

    def max_pool(self):
        """Max pooling, perhaps behind a pad; returns what was added."""
        before = len(self.modules)
        if self.dims > 0:
            if self.chance(20):
                self.add((nn.ZeroPad1d, nn.ZeroPad2d)[self.dims - 1](self.pick(1, (0, 1) * self.dims)))
            if self.chance(20):
                size = self.draw(st.integers(1, min(3, *self.shape[1:])))
                self.add((nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d)[self.dims - 1](size))
            else:
                kernel = self.draw(st.integers(1, 3))
                self.add(
                    (nn.MaxPool1d, nn.MaxPool2d)[self.dims - 1](
                        self.spelled(kernel),
                        stride=spelled_stride(self.pick, self.dims),
                        padding=self.spelled(self.draw(st.integers(0, kernel // 2))),
                        dilation=self.spelled(self.pick(1, 1, 2)),
                        ceil_mode=self.chance(20),
                    )
                )
        return self.modules[before:]

    def nothing(self):
        self.modules.append(self.pick(nn.Dropout, nn.Identity)())

    def spiking_layer(self, last=False):
        if self.chance(15):
            self.norm()
        self.linear_map()
        if self.chance(20):
            self.linear_map()
        if self.chance(15):
            self.average_pool()
        if self.chance(40):
            self.norm()
        if self.chance(15):
            self.nothing()
        shape = self.shape
        # Behind the last neurons nothing could pool: such a network is refused.
        moved = self.max_pool() if not last and self.chance(20) else []
        relu = nn.ReLU(inplace=self.chance(20))
        self.add(relu)
        self.relus.append((relu, moved, shape))

    def between_layers(self):
        what = self.pick("nothing", "max", "average", "pad")
        if what == "max":
            self.max_pool()
        elif what == "average":
            self.average_pool()
        elif what == "pad" and self.dims > 0:
            self.add((nn.ZeroPad1d, nn.ZeroPad2d)[self.dims - 1](1))
        if self.chance(15):
            self.nothing()
        if self.dims > 0 and self.chance(25):
            self.flatten()

    def flatten(self):
        """Flatten, counted from either end; perhaps with a gain and a shift of each unit behind it."""
        self.add(nn.Flatten(self.pick(1, -len(self.shape))))
        if self.chance(30):
            self.norm()


def _nested(draw, modules):
    """The modules as a Sequential, some neighbours in Sequentials of their own."""
    if len(modules) < 2 or not draw(st.booleans()):
        return nn.Sequential(*modules)
    first = draw(st.integers(0, len(modules) - 1))
    last = draw(st.integers(first + 1, len(modules)))
    return nn.Sequential(*modules[:first], _nested(draw, modules[first:last]), *modules[last:])


@st.composite
def chains(draw, *, exact=False, dtypes=(torch.float32, torch.float64)):
    """Random networks that can be converted, with calibration images on which every layer is alive.

    Parameters
    ----------
    exact : bool
        Average over powers of two only, so that fixed-point weights stay fixed-point.
    dtypes : tuple
        Types of the weights to draw from.
    """
    torch.manual_seed(draw(st.integers(0, 2**16)))
    dims = draw(st.sampled_from([2, 2, 1, 0]))
    size = draw(st.integers(4, 7))
    shape = {
        0: (draw(st.integers(2, 8)),),
        1: (draw(st.integers(1, 3)), size + 3),
        2: (draw(st.integers(1, 3)), size, draw(st.integers(4, 7))),
    }[dims]
    b = _Builder(draw, shape, exact)
    preprocessing = None
    if b.chance(40):
        count = draw(st.sampled_from([1, shape[0]]))
        preprocessing = ((torch.rand(count) * 0.5).tolist(), (torch.rand(count) * 0.4 + 0.2).tolist())
    elif b.chance(15):
        b.max_pool()

    ends = draw(st.sampled_from(["linear", "relu", "relu and pool", "relu and flatten"]))
    depth = draw(st.integers(1, 4))
    for layer in range(depth):
        if layer > 0:
            b.between_layers()
        b.spiking_layer(last=ends != "linear" and layer == depth - 1)
    if ends == "linear":
        b.between_layers()
        if b.dims > 0 and b.chance(70):
            b.add(nn.Flatten())
        b.linear_map()
    elif ends == "relu and pool":
        if b.dims == 0:
            ends = "relu"
        b.average_pool()
        if b.chance(30):
            b.norm()
    if b.dims > 0 and ends == "relu and pool":
        b.flatten()
    elif b.dims > 0 and ends == "relu and flatten":
        b.add(nn.Flatten())

    with torch.no_grad():
        for module in b.modules:
            if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Linear):
                module.weight.mul_(1.5)
                if module.bias is not None:
                    module.bias.add_(0.1)
        first = next(m for m in b.modules if isinstance(m, nn.Conv1d | nn.Conv2d | nn.Linear))
        if first.bias is not None and b.chance(25):
            # Values below their bias: normalised biases above 1, spikes before the clock starts.
            first.weight.abs_().neg_()
            first.bias.uniform_(0.5, 2)
    chain = Chain(
        ann=_nested(draw, b.modules).to(draw(st.sampled_from(dtypes))),
        input_shape=shape,
        calibration=torch.rand(40, *shape),
        images=torch.rand(draw(st.integers(1, 3)), *shape),
        preprocessing=preprocessing,
        ends=ends,
        relus=b.relus,
    )
    chain.images[torch.rand(chain.images.shape) < 0.1] = 0.0
    chain.images[torch.rand(chain.images.shape) < 0.1] = 1.0
    assume(_alive(chain))
    return chain


def t_maxima():
    """From the smallest T on; 33 makes windows of a power of two."""
    return st.one_of(st.integers(2, 9), st.sampled_from([16, 17, 32, 33]))


HELD = st.fixed_dictionaries({"hold": st.just(True), "rectifier": st.sampled_from(["spike", "silent"])})
"""The neurons that the closed form describes."""

NEURONS = st.sampled_from(
    [
        {"hold": hold, "rectifier": rectifier, "bias": bias}
        for bias in ("synapse", "spike")
        for rectifier in ("spike", "silent")
        for hold in (True, False)
        if bias == "synapse" or (rectifier == "spike" and not hold)
    ]
)
"""Every combination that convert takes."""

SCALES = st.fixed_dictionaries(
    {
        "granularity": st.sampled_from(["layer", "channel"]),
        "percentile": st.sampled_from([70, 99, 99.9, 100]),
    }
)


def normalise(images, preprocessing):
    """What the ANN expects, in float64: images, or (images - mean) / std for each channel."""
    images = images.double()
    if preprocessing is None:
        return images
    mean, std = (torch.tensor(v, dtype=torch.float64) for v in preprocessing)
    shape = (-1, *[1] * (images.dim() - 2))
    return (images - mean.view(shape)) / std.view(shape)


def round_half_up(x):
    return torch.floor(x + 0.5)


def _alive(chain):
    active = []
    ann = copy.deepcopy(chain.ann).double().eval()
    relus = [m for m in ann.modules() if isinstance(m, nn.ReLU)]
    for relu in relus:
        relu.register_forward_hook(lambda module, inputs, output: active.append(float(output.max()) > 0.01))
    with torch.no_grad():
        out = ann(normalise(chain.calibration, chain.preprocessing))
    return all(active) and float(out.abs().max()) > 0.01


def fired_levels(graph, name, steps):
    """Levels that the recorded steps of a layer say: none said is 0, of a signed output -S."""
    layers = {layer.name: layer for layer in graph.layers}
    if name == "input":
        length, readout, silent = graph.t_max - 1, 0, 0
    else:
        clock = layers[name].neuron.clock
        length, readout = clock.window, clock.readout
        silent = -length if layers[name].neuron.p.rectifier is None else 0
    return torch.where(steps == -1, silent, readout + length - steps)


def walk(graph, spike_steps):
    """Levels at every node by the recorded spikes, and the drives ``S y`` of every layer on them, in float64.

    Each layer is driven by the spikes recorded in the layers before it, not by its own guess at them.
    """
    module = copy.deepcopy(graph.module).double()
    values, drives = {}, {}
    with torch.no_grad():
        for node in graph.module.graph.nodes:
            if node.op == "placeholder":
                values[node] = fired_levels(graph, "input", spike_steps["input"]).double()
            elif node.op == "call_module":
                (source,) = node.all_input_nodes
                target, value = module.get_submodule(node.target), values[source]
                if isinstance(target, TTFSNeuron):
                    bias = 0.0 if target.bias is None else target.bias * target.clock.input_window
                    drives[node.target] = value + bias
                    values[node] = fired_levels(graph, node.target, spike_steps[node.target]).double()
                elif isinstance(target, FirstSpikeMaxPool):
                    values[node] = target.pool(value)
                elif isinstance(target, AxonalDelay):
                    values[node] = value
                else:
                    values[node] = target(value)
    return values, drives


def near_a_half(drive):
    return (drive - torch.floor(drive) - 0.5).abs() < TIE


def assert_equal_but_for_ties(levels, expected, drive, what=""):
    """Levels are equal, or one apart where the drive lies within 1e-4 of a half."""
    assert levels.shape == expected.shape, f"{what}: {tuple(levels.shape)} and {tuple(expected.shape)}"
    different = levels.double() != expected.double()
    wrong = different & ~near_a_half(drive)
    assert not wrong.any(), (
        f"{what}: {int(wrong.sum())} of {wrong.numel()} neurons differ, e.g. {levels[wrong][0]} for "
        f"{expected[wrong][0]} at a drive of {drive[wrong][0]}"
    )
    assert ((levels.double() - expected.double()).abs() <= 1).all(), what


def assert_closed_form(graph, spike_steps):
    """Every layer says ``clip(floor(S y + 1/2), 0, S)`` of the spikes it got, to -S at a signed output."""
    _, drives = walk(graph, spike_steps)
    for layer in graph.layers:
        length = layer.neuron.clock.window
        lowest = -length if layer.neuron.p.rectifier is None else 0
        expected = round_half_up(drives[layer.name]).clamp(lowest, length)
        levels = fired_levels(graph, layer.name, spike_steps[layer.name])
        assert_equal_but_for_ties(levels, expected, drives[layer.name], layer.name)


def assert_the_ann_agrees(chain, snn, spike_steps):
    """The ANN itself, in float64 with every activation rounded and clipped, says what every layer says.

    The ANN is only hooked. Each ReLU hands on the values that the spikes recorded there say, so that every
    layer is judged on the spikes it got.
    """
    graph, length = snn.graph, snn.t_max - 1
    ann = copy.deepcopy(chain.ann).double().eval()
    names = {module: name for name, module in chain.ann.named_modules()}
    seen = []

    def hook(name, moved, shape):
        def judge(relu, inputs, output):
            levels = fired_levels(graph, name, spike_steps[name]).double()
            padded = tuple(levels.shape[1:]) != shape
            for module in moved:
                if not (padded and isinstance(module, nn.ZeroPad1d | nn.ZeroPad2d)):
                    levels = module(levels)
            levels = levels.reshape(output.shape)
            drive = output * (length / graph.scales[name].double())
            assert_equal_but_for_ties(levels, round_half_up(drive).clamp(0, length), drive, name)
            seen.append(name)
            return levels / length * graph.scales[name].double()

        return judge

    for relu, moved, shape in chain.relus:
        ann.get_submodule(names[relu]).register_forward_hook(hook(names[relu], moved, shape))
    drive = chain.images.double() * length
    levels = fired_levels(graph, "input", spike_steps["input"]).double()
    assert_equal_but_for_ties(levels, round_half_up(drive), drive, "input")
    with torch.no_grad():
        logits = ann(normalise(levels / length, chain.preprocessing))
    layers = [layer.name for layer in graph.layers]
    if layers[-1] not in seen:
        drive = logits * (length / graph.output_scale)
        levels = fired_levels(graph, layers[-1], spike_steps[layers[-1]])
        expected = round_half_up(drive).clamp(-length, length)
        assert_equal_but_for_ties(levels, expected, drive, layers[-1])
        seen.append(layers[-1])
    assert seen == layers


def first_spikes(outputs):
    """Step of the first spike (int32, -1 for none) of trains ``[steps, B, ...]``; asserts there is but one."""
    trains = torch.stack(outputs)
    assert ((trains == 0) | (trains == 1)).all()
    assert (trains.sum(0) <= 1).all(), "a neuron fired twice"
    return torch.where(trains.any(0), trains.argmax(0), -1).to(torch.int32)


def input_train(snn, images):
    """The images as the network's input encoder sends them, ``[n_steps, B, ...]``."""
    return quartz_plugin.encode(images.to(snn.graph.dtype), snn.t_max, snn.n_steps, silent_zeros=snn.graph.silent)


def quantise(snn, bits=8):
    """Round weights and biases of a converted network to multiples of 2**-bits, in place; float64 where needed.

    Exact arithmetic: sums of products fit the mantissa. Two weighted maps in a row (2**-16) or large sums do
    not fit float32's 24 bits, so such a network is made float64.
    """
    needs_double = False
    for layer in snn.graph.layers:
        weighted, largest = 0, 0.0
        for node in layer.projection.nodes:
            module = snn.graph_module.get_submodule(node.target)
            if isinstance(module, nn.Flatten | nn.ZeroPad1d | nn.ZeroPad2d):
                continue
            weighted += 1
            weight = getattr(module, "weight", None)
            if weight is not None:
                weight.data = round_half_up(weight.data * 2**bits) / 2**bits
                largest = float(weight.abs().flatten(1).sum(1).max()) if weight.dim() > 1 else math.inf
        if layer.neuron.bias is not None:
            layer.neuron.bias.copy_(round_half_up(layer.neuron.bias * 2**bits) / 2**bits)
            largest += float(layer.neuron.bias.abs().max())
        needs_double |= weighted > 1 or largest * snn.t_max * 2**bits > 2**22
    if needs_double:
        snn.double()
    return snn
