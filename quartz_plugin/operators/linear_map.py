"""Linear maps between images as convolutions, and sums of such; two in a row are composed to one.

Every value is seen as ``[C, H, W]``: a vector has ``H = W = 1``, a sequence ``H = 1``. A linear map on ``[C, H, W]``
is a convolution, a pooling average a depthwise one, and two in a row are one convolution where no zero padding of the
second reaches into the map of the first.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from quartz_plugin.operators.modules import per_dimension

FEW_WEIGHTS, MOST_GROWTH = 2**25, 256
"""Weights that two maps in a row may always compose to, and how many times those of the second else."""

Shape3 = tuple[int, int, int]
Pair = tuple[int, int]


@dataclass(frozen=True, kw_only=True)
class LinearMap:
    """A convolution without a bias.

    Attributes
    ----------
    weight : Tensor
        ``[outputs, inputs / groups, KH, KW]``.
    stride, padding, dilation : tuple of int
        As in ``nn.Conv2d``; padding at the top and the left (at the other end the output's size decides).
    groups : int
        As in ``nn.Conv2d``.
    transposed : bool
        The weights spread each input over the output, as in ``nn.ConvTranspose2d``.
    """

    weight: Tensor
    stride: Pair = (1, 1)
    padding: Pair = (0, 0)
    dilation: Pair = (1, 1)
    groups: int = 1
    transposed: bool = False

    @property
    def outputs(self) -> int:
        """Output channels."""
        return self.weight.shape[0]

    @property
    def inputs(self) -> int:
        """Input channels."""
        return self.weight.shape[1] * self.groups

    @property
    def kernel(self) -> Pair:
        """Kernel size."""
        return self.weight.shape[2], self.weight.shape[3]

    @property
    def pointwise(self) -> bool:
        """Every position is for itself."""
        return (self.kernel, self.stride, self.padding, self.transposed) == ((1, 1), (1, 1), (0, 0), False)

    @property
    def depthwise(self) -> bool:
        """Every channel is for itself."""
        return self.groups == self.inputs == self.outputs

    def dense_weight(self) -> Tensor:
        """Weights ``[outputs, inputs, KH, KW]``, 0 between groups."""
        if self.groups == 1:
            return self.weight
        dense = self.weight.new_zeros(self.outputs, self.inputs, *self.kernel)
        outputs, inputs = self.outputs // self.groups, self.weight.shape[1]
        for group in range(self.groups):
            rows, columns = slice(group * outputs, (group + 1) * outputs), slice(group * inputs, (group + 1) * inputs)
            dense[rows, columns] = self.weight[rows]
        return dense


@dataclass(frozen=True, kw_only=True)
class Convolution(LinearMap):
    """Synapses from the spikes of one node, or the channels of it from `first_input` on.

    Attributes
    ----------
    source : str
        Name of the node whose levels are convolved.
    source_shape : tuple of int
        Its shape as ``[C, H, W]``.
    first_input, first_output : int
        Channels that come before.
    """

    source: str
    source_shape: Shape3
    first_input: int = 0
    first_output: int = 0

    def behind(self, channels: int) -> Convolution:
        """The same behind so many other output channels."""
        return replace(self, first_output=self.first_output + channels)

    def narrowed(self, first: int, last: int) -> Convolution:
        """The synapses into the output channels from `first` up to, and without, `last`."""
        start, stop = first - self.first_output, last - self.first_output
        if self.groups == 1 or (start, stop) == (0, self.outputs):
            return replace(self, weight=self.weight[start:stop], first_output=first)
        if self.depthwise:
            channels = self.first_input + start
            return replace(
                self, weight=self.weight[start:stop], groups=stop - start, first_input=channels, first_output=first
            )
        return replace(self, weight=self.dense_weight()[start:stop], groups=1, first_output=first)


@dataclass(frozen=True)
class Terms:
    """A value between spikes and neurons: a sum of convolutions of levels, of this shape.

    Behind a Flatten it keeps the shape that it had before, which is then not that of the value itself.
    """

    shape: Shape3
    terms: list[Convolution]

    @classmethod
    def of_spikes(cls, source: str, shape: Sequence[int]) -> Terms:
        """Spikes as they are: a weight of 1 for each channel."""
        own = as_image(shape)
        return cls(
            own, [Convolution(source=source, source_shape=own, weight=torch.ones(own[0], 1, 1, 1), groups=own[0])]
        )


Form = Callable[[Any, list[Terms], torch.Size, bool], Terms | None]
"""``form(module, inputs, shape, flattened)``: the terms of a module's value, which is of this shape, by its inputs'.

Some inputs may be flattened: of the shape that they had before. None where it is no sum of convolutions.
"""


def as_convolution(
    of_module: Callable[[Any, Shape3, torch.Size], LinearMap | None], takes_flattened: bool = False
) -> Form:
    """Form of a module with one input that is a linear map: ``of_module(module, shape of the input, shape)``."""

    def form(module: Any, inputs: list[Terms], shape: torch.Size, flattened: bool) -> Terms | None:
        (first,) = inputs
        second = None if flattened and not takes_flattened else of_module(module, first.shape, shape)
        if second is None:
            return None
        out_shape = as_image(shape)
        terms = []
        for term in first.terms:
            composed = _composed(term, first.shape, second, out_shape)
            if composed is None:
                return None
            terms.append(composed)
        return Terms(out_shape, terms)

    return form


def sum_of_terms(module: Any, inputs: list[Terms], shape: torch.Size, flattened: bool) -> Terms | None:
    """Form of a sum."""
    first = inputs[0]
    if any(value.shape != first.shape for value in inputs):
        return None
    return Terms(first.shape, [term for value in inputs for term in value.terms])


def same_terms(module: Any, inputs: list[Terms], shape: torch.Size, flattened: bool) -> Terms | None:
    """Form of a module that leaves its value as it is."""
    return inputs[0]


def as_image(shape: Sequence[int]) -> Shape3:
    """A sample's shape as ``[C, H, W]``."""
    channels, *spatial = shape if len(shape) else (1,)
    height, width = [*[1] * (2 - len(spatial)), *spatial] if len(spatial) <= 2 else (1, math.prod(spatial))
    return channels, height, width


def pair(value: Any, rank: int = 2, other: int = 1) -> Pair:
    """A module's number or tuple for each of `rank` dimensions, as (of height, of width); `other` without height."""
    values = per_dimension(value, rank)
    return (other, values[0]) if rank == 1 else (values[0], values[1])


def _composed(first: Convolution, middle: Shape3, second: LinearMap, out_shape: Shape3) -> Convolution | None:
    """One convolution that does what `first` (into channels of a tensor of shape `middle`) and `second` do."""
    weight = second.weight
    inner = slice(first.first_output, first.first_output + first.outputs)
    whole = (first.first_output, first.outputs) == (0, middle[0])
    as_second = replace(
        first,
        stride=second.stride,
        padding=second.padding,
        dilation=second.dilation,
        transposed=second.transposed,
    )
    gain = first.weight.double().flatten() if first.pointwise and first.depthwise else None
    if gain is not None and (whole or second.groups == 1 or second.depthwise):
        # What comes first only weighs channels.
        if whole and bool((gain == 1).all()):
            scaled = weight
        elif second.depthwise:
            scaled = weight[inner].double() * gain.view(-1, 1, 1, 1)
        elif second.groups == 1:
            scaled = weight[:, inner].double() * gain.view(1, -1, 1, 1)
        else:
            by_group = weight.double().unflatten(0, (second.groups, -1))
            scaled = (by_group * gain.view(second.groups, 1, -1, 1, 1)).flatten(0, 1)
        return replace(
            as_second,
            weight=scaled,
            groups=first.outputs if second.depthwise else second.groups,
            first_output=first.first_output if second.depthwise else 0,
        )
    if second.pointwise and second.depthwise:
        scaled = first.weight.double() * weight[inner].double().view(-1, 1, 1, 1)
        return replace(first, weight=scaled)
    composed = math.prod(_composed_size(first, second, dim) for dim in (0, 1))
    of_first = first.outputs * first.inputs * math.prod(first.kernel)
    if max(of_first, second.outputs * first.inputs * composed) > max(FEW_WEIGHTS, MOST_GROWTH * second.weight.numel()):
        return None
    left = first.dense_weight().double()
    second_dense = second.dense_weight().double()[:, inner]
    if second.pointwise:
        mixed = torch.einsum("om,mihw->oihw", second_dense[:, :, 0, 0], left)
        return replace(first, weight=mixed, groups=1, first_output=0)
    if first.pointwise:
        mixed = torch.einsum("omhw,mi->oihw", second_dense, left[:, :, 0, 0])
        return replace(as_second, weight=mixed, groups=1, first_output=0)
    if first.transposed or second.transposed or not _borders_agree(first, middle, second, out_shape):
        return None
    rows, columns = (_spread(first, second, dim) for dim in (0, 1))
    mixed = torch.einsum("ompq,mikl,hpk,wql->oihw", second_dense, left, rows, columns)
    return replace(
        first,
        weight=mixed,
        stride=(first.stride[0] * second.stride[0], first.stride[1] * second.stride[1]),
        padding=tuple(first.padding[d] + first.stride[d] * second.padding[d] for d in (0, 1)),  # type: ignore[arg-type]
        dilation=(1, 1),
        groups=1,
        first_output=0,
    )


def _composed_size(first: Convolution, second: LinearMap, dim: int) -> int:
    """Size of the composed kernel along a dimension."""
    step = second.dilation[dim] * first.stride[dim]
    return (second.kernel[dim] - 1) * step + (first.kernel[dim] - 1) * first.dilation[dim] + 1


def _spread(first: Convolution, second: LinearMap, dim: int) -> Tensor:
    """``[composed, of second, of first]``: 1 where two places in the kernels meet at one in the composed kernel."""
    of_first, of_second = first.kernel[dim], second.kernel[dim]
    step = second.dilation[dim] * first.stride[dim]
    spread = torch.zeros(_composed_size(first, second, dim), of_second, of_first, dtype=torch.float64)
    for p in range(of_second):
        for k in range(of_first):
            spread[p * step + k * first.dilation[dim], p, k] = 1
    return spread


def _borders_agree(first: Convolution, middle: Shape3, second: LinearMap, out_shape: Shape3) -> bool:
    """Check whether the zeros that pad the map between the two are what `first` would compute there: nothing."""
    for dim in (0, 1):
        size, last = middle[1 + dim], out_shape[1 + dim] - 1
        reach = (first.kernel[dim] - 1) * first.dilation[dim] - first.padding[dim]
        before = second.padding[dim] > 0
        farthest = last * second.stride[dim] - second.padding[dim]
        farthest += (second.kernel[dim] - 1) * second.dilation[dim]
        if before and reach - first.stride[dim] >= 0:
            return False
        if farthest >= size and size * first.stride[dim] - first.padding[dim] < first.source_shape[1 + dim]:
            return False
    return True


__all__ = [
    "Convolution",
    "Form",
    "LinearMap",
    "Pair",
    "Shape3",
    "Terms",
    "as_convolution",
    "as_image",
    "pair",
    "same_terms",
    "sum_of_terms",
]
