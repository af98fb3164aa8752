"""The synapses of a layer as convolutions from the spikes it listens to, linear maps in a row composed to one.

Every value is seen as ``[C, H, W]``: a vector has ``H = W = 1``, a sequence ``H = 1``. What stands between two
layers of spikes is first routing (which can be done on levels as well as on spikes), then linear maps; a linear
map on ``[C, H, W]`` is a convolution, a pooling average a depthwise one, and two in a row are one convolution
where no zero padding of the second reaches into the map of the first.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from quartz_plugin.graph import Layer
from quartz_plugin.neuron import AxonalDelay
from quartz_plugin.operators.modules import (
    AVERAGES,
    PADDING_MODES,
    Add,
    Concatenate,
    Mean,
    OneToOne,
    Permute,
    Reshape,
    Slice,
    per_dimension,
    rank_of,
)

MOST_TERMS = 1024
"""Convolutions of a layer, up to which it is seen as such; beyond, it is stepped."""

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
        As in ``nn.Conv2d``; padding at the top and the left (the output's size says what there is at the other end).
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
        """Whether every position is for itself."""
        return (self.kernel, self.stride, self.padding, self.transposed) == ((1, 1), (1, 1), (0, 0), False)

    @property
    def depthwise(self) -> bool:
        """Whether every channel is for itself."""
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


def channel_ranges(convolutions: list[Convolution], channels: int) -> list[tuple[int, int, list[Convolution]]]:
    """Split the output's channels where a convolution begins or ends: first, last, and those that reach them all."""
    ends = {end for c in convolutions for end in (c.first_output, c.first_output + c.outputs)}
    bounds = sorted({0, channels} | ends)
    return [
        (
            first,
            last,
            [
                c.narrowed(first, last)
                for c in convolutions
                if c.first_output <= first and last <= c.first_output + c.outputs
            ],
        )
        for first, last in itertools.pairwise(bounds)
    ]


ROUTING = (
    *(nn.Flatten, nn.Unflatten, Reshape, Permute, Slice, Concatenate, AxonalDelay, nn.Identity),
    *(nn.PixelShuffle, nn.PixelUnshuffle, nn.ChannelShuffle, nn.UpsamplingNearest2d),
)
"""Modules that only move spikes, whatever their options."""


def is_routing(module: nn.Module, shape: torch.Size) -> bool:
    """Whether a module between two layers only moves spikes (of units of this shape), so that it may move levels."""
    if isinstance(module, nn.AdaptiveAvgPool1d | nn.AdaptiveAvgPool2d):
        rank = rank_of(module)
        return per_dimension(module.output_size, rank) == tuple(shape[-rank:])
    if isinstance(module, nn.Upsample):
        return module.mode in ("nearest", "nearest-exact")
    if type(module) in PADDING_MODES:
        return getattr(module, "value", 0) == 0
    return isinstance(module, ROUTING)


def convolutions_of(layer: Layer, shapes: Mapping[fx.Node, torch.Size]) -> list[Convolution] | None:
    """The layer's synapses as convolutions of routed levels; None where there is no such form.

    Parameters
    ----------
    layer : Layer
        The layer.
    shapes : dict
        Shape of every node's value, as :func:`quartz_plugin.graph.synapses.unit_shapes` gives.
    """
    module = layer.projection.module
    routed = set(layer.projection.sources)
    values: dict[fx.Node, _Sum] = {}
    if not all(1 <= len(shapes[node]) <= 3 for node in (*layer.projection.sources, *layer.projection.nodes)):
        return None
    for node in layer.projection.nodes:
        if node.op != "call_module":
            return None
        sources = [arg for arg in node.args if isinstance(arg, fx.Node)]
        if not sources or not all(source in routed or source in values for source in sources):
            return None
        each = module.get_submodule(str(node.target))
        if routed.issuperset(sources) and is_routing(each, shapes[sources[0]]):
            routed.add(node)
            continue
        inputs = [values[s] if s in values else _Sum.of_spikes(s, shapes[s]) for s in sources]
        flattened = any(value.shape != as_image(shapes[s]) for s, value in zip(sources, inputs, strict=True))
        value = _through_flattened(each, inputs) if flattened else _through(each, inputs, shapes[node])
        if value is None or len(value.terms) > MOST_TERMS:
            return None
        values[node] = value
    target = layer.projection.target
    if target in routed:
        return _Sum.of_spikes(target, shapes[target]).terms
    return values[target].terms if values[target].shape == as_image(shapes[target]) else None


def reached(convolution: Convolution, dim: int, at: int, size: int) -> list[tuple[int, int]]:
    """Outputs (of `size`) along a dimension of space that an input reaches, each with the place in the kernel."""
    stride, padding, dilation = (of[dim] for of in (convolution.stride, convolution.padding, convolution.dilation))
    found = []
    for k in range(convolution.kernel[dim]):
        if convolution.transposed:
            output, rest = at * stride - padding + k * dilation, 0
        else:
            output, rest = divmod(at + padding - k * dilation, stride)
        if rest == 0 and 0 <= output < size:
            found.append((output, k))
    return found


def rows_as_channels(convolution: Convolution, width: int) -> Convolution:
    """The same synapses with the units of a row as channels of one place, channels fastest (a Toeplitz matrix)."""
    channels, height, columns = convolution.source_shape
    shape = (columns * channels, height, 1)
    if convolution.pointwise and convolution.depthwise and columns == width:
        weight = convolution.weight.repeat(width, 1, 1, 1)
        return replace(convolution, source_shape=shape, weight=weight, groups=len(weight))
    dense = convolution.dense_weight()
    outputs, inputs, kernel_rows, _ = dense.shape
    weight = dense.new_zeros(width, outputs, columns, inputs, kernel_rows, 1)
    for x in range(columns):
        for column, k in reached(convolution, 1, x, width):
            weight[column, :, x, :, :, 0] = dense[..., k]
    weight = weight.flatten(2, 3).flatten(0, 1)
    return replace(
        convolution,
        source_shape=shape,
        weight=weight,
        stride=(convolution.stride[0], 1),
        padding=(convolution.padding[0], 0),
        dilation=(convolution.dilation[0], 1),
        groups=1,
    )


@dataclass(frozen=True)
class _Sum:
    """A value on the way: a sum of convolutions of levels, of this shape.

    Behind a Flatten it keeps the shape that it had before, which is then not that of the value itself.
    """

    shape: Shape3
    terms: list[Convolution]

    @classmethod
    def of_spikes(cls, node: fx.Node, shape: torch.Size) -> _Sum:
        """Spikes as they are: a weight of 1 for each channel."""
        own = as_image(shape)
        return cls(
            own, [Convolution(source=node.name, source_shape=own, weight=torch.ones(own[0], 1, 1, 1), groups=own[0])]
        )


def as_image(shape: torch.Size | tuple[int, ...]) -> Shape3:
    """A sample's shape as ``[C, H, W]``."""
    channels, *spatial = shape if len(shape) else (1,)
    height, width = [*[1] * (2 - len(spatial)), *spatial] if len(spatial) <= 2 else (1, math.prod(spatial))
    return channels, height, width


def pair(value: Any, rank: int = 2, other: int = 1) -> Pair:
    """A module's number or tuple for each of `rank` dimensions, as (of height, of width); `other` without height."""
    values = per_dimension(value, rank)
    return (other, values[0]) if rank == 1 else (values[0], values[1])


def _through_flattened(module: nn.Module, inputs: list[_Sum]) -> _Sum | None:
    """Carry sums of which some are flattened through one more module; None where it tells their units apart."""
    first = inputs[0]
    if isinstance(module, Add):
        alike = all(value.shape == first.shape for value in inputs)
        return _Sum(first.shape, [term for value in inputs for term in value.terms]) if alike else None
    if isinstance(module, AxonalDelay | nn.Flatten):
        return first
    if isinstance(module, nn.Linear):
        return _through(module, inputs, torch.Size([module.out_features]))
    return None


def _through(module: nn.Module, inputs: list[_Sum], shape: torch.Size) -> _Sum | None:
    """Carry sums through one more module; None where that is no convolution."""
    first = inputs[0]
    if isinstance(module, AxonalDelay):
        return first
    if isinstance(module, Add):
        return _Sum(first.shape, [term for value in inputs for term in value.terms])
    if isinstance(module, Concatenate) and module.dim == 1 and len({value.shape[1:] for value in inputs}) == 1:
        terms, channels = [], 0
        for value in inputs:
            terms += [replace(term, first_output=term.first_output + channels) for term in value.terms]
            channels += value.shape[0]
        return _Sum((channels, *first.shape[1:]), terms)
    if isinstance(module, nn.Flatten):
        # The units stay as they are: a linear layer behind it is a convolution with a kernel of their whole size.
        return first if len(shape) == 1 else None
    second = _of_module(module, first.shape, shape)
    if second is None:
        return None
    out_shape = as_image(shape)
    terms = []
    for term in first.terms:
        composed = _composed(term, first.shape, second, out_shape)
        if composed is None:
            return None
        terms.append(composed)
    return _Sum(out_shape, terms)


def _of_module(module: Any, shape: Shape3, out_shape: torch.Size) -> LinearMap | None:
    channels, height, width = shape
    if isinstance(module, OneToOne):
        weight = module.weight.detach()
        by_channel = weight.dim() == len(out_shape) and weight.numel() == weight.shape[0] == channels
        if weight.numel() != 1 and not by_channel:
            return None
        return LinearMap(weight=weight.reshape(-1, 1, 1, 1).expand(channels, 1, 1, 1), groups=channels)
    if isinstance(module, nn.Linear):
        weight = module.weight.detach()
        if len(out_shape) != 1 or weight.shape[1] != math.prod(shape):
            return None
        return LinearMap(weight=weight.view(-1, channels, height, width))
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.ConvTranspose1d | nn.ConvTranspose2d):
        return _of_convolution(module) if len(out_shape) == 1 + rank_of(module) else None
    if isinstance(module, AVERAGES):
        return _of_average(module, shape, out_shape)
    return None


def _of_convolution(module: Any) -> LinearMap | None:
    if module.padding_mode != "zeros":
        return None
    weight, groups = module.weight.detach(), int(module.groups)
    transposed = isinstance(module, nn.ConvTranspose1d | nn.ConvTranspose2d)
    if transposed:
        # Theirs is [inputs, outputs / groups, ...].
        weight = weight.unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1)
        padding = pair(module.padding, weight.dim() - 2, 0)
    elif isinstance(module.padding, str):
        # "same" or "valid": counted from the last dimension backwards, left and right of each.
        both = module._reversed_padding_repeated_twice
        padding = (both[2] if len(both) > 2 else 0, both[0])
    else:
        padding = pair(module.padding, weight.dim() - 2, 0)
    rank = weight.dim() - 2
    if rank == 1:
        weight = weight.unsqueeze(2)
    stride, dilation = pair(module.stride, rank, 1), pair(module.dilation, rank, 1)
    return LinearMap(
        weight=weight, stride=stride, padding=padding, dilation=dilation, groups=groups, transposed=transposed
    )


def _of_average(module: Any, shape: Shape3, out_shape: torch.Size) -> LinearMap | None:
    channels, height, width = shape
    if isinstance(module, Mean):
        if 1 in module.dims or math.prod(out_shape) != channels:
            return None
        kernel, stride, padding = (height, width), (1, 1), (0, 0)
    elif len(out_shape) != 1 + rank_of(module):
        return None
    elif isinstance(module, nn.AdaptiveAvgPool1d | nn.AdaptiveAvgPool2d):
        rows, columns = as_image(out_shape)[1:]
        if height % rows or width % columns:
            return None
        kernel = stride = (height // rows, width // columns)
        padding = (0, 0)
    else:
        rank = rank_of(module)
        kernel, padding = pair(module.kernel_size, rank, 1), pair(module.padding, rank, 0)
        stride = pair(module.stride, rank, 1)
        if module.ceil_mode or (padding != (0, 0) and not module.count_include_pad):
            return None
    divisor = getattr(module, "divisor_override", None) or math.prod(kernel)
    weight = torch.full((channels, 1, *kernel), 1.0 / divisor, dtype=torch.float64)
    return LinearMap(weight=weight, stride=stride, padding=padding, groups=channels)


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
    """Whether the zeros that pad the map between the two are what `first` would compute there: nothing."""
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
