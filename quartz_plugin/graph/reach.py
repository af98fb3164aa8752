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
    """What may arrive at the units of a value, float64 tensors ``[1, ...]``.

    Attributes
    ----------
    positive, negative : Tensor
        The most that positive, and that negative, contributions add up to.
    places : Tensor
        Binary places behind the point.
    """

    positive: Tensor
    negative: Tensor
    places: Tensor

    @property
    def bits(self) -> Tensor:
        """Bits that hold every sum; -inf where nothing arrives."""
        return torch.log2(torch.maximum(self.positive, self.negative)) + self.places


def of_spikes(shape: Sequence[int], level: float) -> Reach:
    """Reach of spikes up to this level, of units of a shape."""
    nothing = torch.zeros(1, *shape, dtype=torch.float64)
    return Reach(nothing + level, nothing, nothing)


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
    module = copy.deepcopy(module).double().cpu()
    if not is_weighted(module):
        positive = module(*(each.positive for each in inputs))
        negative = module(*(each.negative for each in inputs))
        places = [each.places for each in inputs]
        if isinstance(module, Add):
            return Reach(positive, negative, torch.stack(torch.broadcast_tensors(*places)).amax(0))
        if moves_spikes(module, places[0].shape[1:]):
            return Reach(positive, negative, module(*places))
        return Reach(positive, negative, torch.full_like(positive, max(float(each.max()) for each in places)))
    (value,) = inputs
    weight = module.weight.detach().clone()
    module.weight.requires_grad_(False).copy_(weight.clamp(min=0))
    positive, negative = module(value.positive), module(value.negative)
    module.weight.copy_((-weight).clamp(min=0))
    positive, negative = positive + module(value.negative), negative + module(value.positive)
    in_use = places_in_use(weight)
    if isinstance(module, OneToOne):
        return Reach(positive, negative, (value.places + in_use).expand_as(positive))
    rows = row_shape(module)
    in_use = in_use.max() if rows is None else in_use.flatten(1).amax(1).reshape(rows)
    return Reach(positive, negative, (in_use + value.places.max()).expand_as(positive))


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
    """Binary places behind the point that each float64 number has; fewer than any other for 0, a multiple of all.

    Examples
    --------
    >>> places_in_use(torch.tensor([0.75, 0.0, 3.0, 8.0], dtype=torch.float64))
    tensor([  2., -64.,   0.,  -3.], dtype=torch.float64)
    """
    mantissa, exponent = torch.frexp(values)
    whole = (mantissa * 2.0**53).long()
    lowest = torch.log2((whole & -whole).double())
    return torch.where(values == 0, OF_ZERO, 53 - exponent - lowest)


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
        positive = step.module.pool(levels.positive)
        return Reach(positive, torch.zeros_like(positive), torch.zeros_like(positive))

    def at_neurons(self, step: Step) -> Reach:
        """Reach of a layer's spikes."""
        assert isinstance(step.module, TTFSNeuron)
        shape = self.topology.shapes[step.node.name]
        return of_spikes(shape, step.module.clock.window)
