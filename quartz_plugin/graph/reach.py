"""The most that may arrive at the units of a network, and the bits that whole numbers need to hold it.

A sum of some of the inputs of a unit, in any order, is never above what its positive ones add up to, nor below what its
negative ones do. Where every input is a whole multiple of :math:`2^{-k}`, a type of ``b`` bits holds all such sums if
the larger of the two is below :math:`2^{b - k}`.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from quartz_plugin.graph.topology import Topology
from quartz_plugin.graph.walk import LevelWalk, Step
from quartz_plugin.neuron import FirstSpikeMaxPool, TTFSNeuron
from quartz_plugin.operators.modules import Add, OneToOne
from quartz_plugin.operators.table import moves_spikes, weights_of

EXACT_BITS = {torch.float32: 24, torch.float64: 53}
"""Bits of the whole numbers that each type holds without a gap."""

ROUNDING_WINDOWS = 4
"""Windows that a membrane's bits have room for besides what arrives: two it climbs by, and half a unit is added."""

OF_ZERO = -64.0
"""Places of zero."""


class Reach(NamedTuple):
    """What may arrive at the units of a value; float64 tensors that are broadcastable to ``[1, *shape]``.

    Attributes
    ----------
    positive, negative : Tensor
        The most that positive, and that negative, contributions add up to.
    places : Tensor
        Binary places behind the point.
    shape : tuple of int
        The value's, without the batch.
    """

    positive: Tensor
    negative: Tensor
    places: Tensor
    shape: tuple[int, ...]

    @property
    def bits(self) -> Tensor:
        """Bits that hold every sum; -inf where nothing arrives."""
        return torch.log2(torch.maximum(self.positive, self.negative)) + self.places

    def largest_membrane(self, up: Tensor, down: Tensor, window: int) -> Tensor:
        """The most that membranes may be on their way, a bias adding so much to either side, and what rounds them."""
        return torch.maximum(self.positive + up, self.negative + down) + ROUNDING_WINDOWS * (window + 1)


def of_spikes(shape: Sequence[int], level: float) -> Reach:
    """Reach of spikes up to this level, of units of a shape."""
    nothing = torch.zeros([1] * (1 + len(shape)), dtype=torch.float64)
    return Reach(nothing + level, nothing, nothing, tuple(shape))


@torch.no_grad()
def behind(module: Any, inputs: Sequence[Reach]) -> Reach:
    """What may arrive behind a module without a bias.

    Examples
    --------
    >>> module = nn.Linear(2, 1, bias=False)
    >>> _ = module.weight.data.copy_(torch.tensor([[0.5, -0.75]]))
    >>> reach = behind(module, [of_spikes((2,), 15)])
    >>> float(reach.positive), float(reach.negative), float(reach.places)
    (7.5, 11.25, 2.0)
    """
    if isinstance(module, Add):
        return _summed(inputs)
    if not is_weighted(module):
        return _routed(copy.deepcopy(module).double().cpu(), inputs)
    (value,) = inputs
    weight = module.weight.detach().cpu()
    if isinstance(module, OneToOne):
        weight = weight.reshape([1] * (1 + len(value.shape) - weight.dim()) + list(weight.shape))
        up, down = weight.clamp(min=0).double(), (-weight).clamp(min=0).double()
        positive, negative = up * value.positive + down * value.negative, up * value.negative + down * value.positive
        return Reach(positive, negative, value.places + places_in_use(weight), value.shape)
    rows = row_shape(module)
    in_use = places_in_use(weight)
    if rows is None or not isinstance(module, BY_ROWS):
        return _probed(copy.deepcopy(module).double().cpu(), value, in_use.max() + value.places.max())
    shape = _shape_behind(module, value.shape)
    of_rows = [1] * (1 + len(shape) - len(rows)) + list(rows)
    positive, negative = (each.view(of_rows) for each in _row_sums(module, weight, value))
    places = in_use.flatten(1).amax(1).view(of_rows) + value.places.max()
    return Reach(positive, negative, places, shape)


BY_ROWS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
"""Modules each of whose outputs adds up one row of weights, or part of it at a border."""


def _shape_behind(module: Any, shape: tuple[int, ...]) -> tuple[int, ...]:
    if isinstance(module, nn.Linear):
        return (*shape[:-1], module.out_features)
    with torch.device("meta"):
        like = type(module)(1, 1, module.kernel_size, module.stride, module.padding, module.dilation, bias=False)
        return (module.out_channels, *like(torch.empty(1, 1, *shape[1:])).shape[2:])


def _row_sums(module: Any, weight: Tensor, value: Reach) -> tuple[Tensor, Tensor]:
    """The most that each row of weights adds up, of what is largest in each input channel."""
    channel = -1 if isinstance(module, nn.Linear) else 1
    of_channels = []
    for each in (value.positive, value.negative):
        dims = [dim for dim in range(each.dim()) if dim != channel % each.dim()]
        of_channels.append(each.amax(dims))
    up, down = (each.flatten(2).sum(2, dtype=torch.float64) if each.dim() > 2 else each.double() for each in (
        weight.clamp(min=0), (-weight).clamp(min=0)
    ))  # fmt: skip
    groups = getattr(module, "groups", 1)
    high, low = (
        each.expand(up.shape[1] * groups).view(groups, 1, -1).expand(groups, len(up) // groups, -1).reshape(len(up), -1)
        for each in of_channels
    )
    return (up * high + down * low).sum(1), (up * low + down * high).sum(1)


def _summed(inputs: Sequence[Reach]) -> Reach:
    positive = sum((each.positive for each in inputs[1:]), inputs[0].positive)
    negative = sum((each.negative for each in inputs[1:]), inputs[0].negative)
    places = torch.stack(torch.broadcast_tensors(*(each.places for each in inputs))).amax(0)
    return Reach(positive, negative, places, inputs[0].shape)


def _routed(module: nn.Module, inputs: Sequence[Reach]) -> Reach:
    """Reach behind a module without weights, which moves units or adds them up."""
    moves = moves_spikes(module, inputs[0].shape)
    parts = [[each.positive for each in inputs], [each.negative for each in inputs], [each.places for each in inputs]]
    if moves and all(each.numel() == 1 for part in parts for each in part):
        units = [torch.zeros(1, *value.shape, dtype=torch.float64) for value in inputs]
        shape = tuple(module(*units).shape[1:])
        largest = [torch.stack([each.flatten() for each in part]).max() for part in parts]
        positive, negative, places = (each.view([1] * (1 + len(shape))) for each in largest)
        return Reach(positive, negative, places, shape)
    positives, negatives, places_of = (
        [each.expand(1, *value.shape).contiguous() for each, value in zip(part, inputs, strict=True)] for part in parts
    )
    positive, negative = module(*positives), module(*negatives)
    places = module(*places_of) if moves else torch.stack([each.max() for each in places_of]).max()
    return Reach(positive, negative, places, tuple(positive.shape[1:]))


def _probed(module: Any, value: Reach, places: Tensor) -> Reach:
    """Reach behind any weighted module, whose values are computed with its positive and with its negative weights."""
    high, low = (each.expand(1, *value.shape).contiguous() for each in (value.positive, value.negative))
    weight = module.weight.detach().clone()
    module.weight.requires_grad_(False).copy_(weight.clamp(min=0))
    positive, negative = module(high), module(low)
    module.weight.copy_((-weight).clamp(min=0))
    positive, negative = positive + module(low), negative + module(high)
    return Reach(positive, negative, places, tuple(positive.shape[1:]))


def is_weighted(module: nn.Module | None) -> bool:
    """Check whether a module multiplies by weights of its own."""
    return isinstance(module, OneToOne) or weights_of(module) is not None


def row_shape(module: Any) -> tuple[int, ...] | None:
    """Shape, broadcastable to one sample's units, of one number for each row of weights; None where there is none.

    Examples
    --------
    >>> row_shape(nn.Conv2d(3, 8, 3)), row_shape(nn.ConvTranspose2d(3, 8, 3))
    ((8, 1, 1), None)
    """
    weight = module.weight
    if isinstance(module, OneToOne):
        return (len(weight), *[1] * (weight.dim() - 1)) if weight.dim() else None
    rule = weights_of(module)
    assert rule is not None
    shape = rule.bias_shape(module)
    return shape if rule.output_dim == 0 and math.prod(shape) == len(weight) else None


def places_in_use(values: Tensor) -> Tensor:
    """Binary places behind the point that each number has, as float64; fewer than any other for 0, a multiple of all.

    Examples
    --------
    >>> places_in_use(torch.tensor([0.75, 0.0, 3.0, 8.0]))
    tensor([  2., -64.,   0.,  -3.], dtype=torch.float64)
    """
    bits = torch.finfo(values.dtype).bits
    integers, mantissa, bias = (torch.int32, 23, 127) if bits == 32 else (torch.int64, 52, 1023)
    words = values.abs().contiguous().view(integers)
    whole = (words & (2**mantissa - 1)) | 2**mantissa
    # The lowest bit that is set, as a float, has its place for an exponent.
    lowest = (whole & -whole).to(values.dtype).view(integers) >> mantissa
    places = (mantissa + 2 * bias) - (words >> mantissa) - lowest
    return torch.where(values == 0, OF_ZERO, places.double())


class Reaches(LevelWalk):
    """Finds what may arrive at each node, all spikes at their largest level, when walked by ``each(None)``."""

    def __init__(self, topology: Topology) -> None:
        super().__init__(topology.steps)
        self.topology = topology

    def at_input(self, step: Step) -> Reach:
        """Reach of the input's spikes."""
        return of_spikes(self.topology.graph.input_shape, self.topology.graph.input_window.length)

    def at_synapses(self, step: Step) -> Reach:
        """Reach of what synapses or routing make of theirs."""
        assert step.module is not None
        assert step.arguments is not None
        return behind(step.module, [self.values[argument] for argument in step.arguments])

    def at_pool(self, step: Step) -> Reach:
        """Reach of the first spikes."""
        assert isinstance(step.module, FirstSpikeMaxPool)
        (levels,) = (self.values[source] for source in step.sources)
        return of_spikes(self.topology.shapes[step.node.name], float(levels.positive.max()))

    def at_neurons(self, step: Step) -> Reach:
        """Reach of a layer's spikes."""
        assert isinstance(step.module, TTFSNeuron)
        shape = self.topology.shapes[step.node.name]
        return of_spikes(shape, step.module.clock.window)
