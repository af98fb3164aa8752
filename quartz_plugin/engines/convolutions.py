"""The synapses of a layer as convolutions from the spikes of its sources, linear maps in a row composed to one.

What stands between two layers of spikes is first routing (which can be done on levels as well as on spikes), then
linear maps; the table of operators has each one's form, see :mod:`quartz_plugin.operators.linear_map`.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import fx

from quartz_plugin.graph import Layer
from quartz_plugin.operators.linear_map import Convolution, Pair, Shape3, Terms, as_image, pair
from quartz_plugin.operators.table import moves_spikes, row_of

MOST_TERMS = 1024
"""Convolutions of a layer, up to which it is seen as such; beyond, it is stepped."""


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
    values: dict[fx.Node, Terms] = {}
    if not all(1 <= len(shapes[node]) <= 3 for node in (*layer.projection.sources, *layer.projection.nodes)):
        return None
    for node in layer.projection.nodes:
        if node.op != "call_module":
            return None
        sources = [arg for arg in node.args if isinstance(arg, fx.Node)]
        if not sources or not all(source in routed or source in values for source in sources):
            return None
        each = module.get_submodule(str(node.target))
        if routed.issuperset(sources) and moves_spikes(each, shapes[sources[0]]):
            routed.add(node)
            continue
        row = row_of(each)
        inputs = [values[s] if s in values else Terms.of_spikes(s.name, shapes[s]) for s in sources]
        flattened = any(value.shape != as_image(shapes[s]) for s, value in zip(sources, inputs, strict=True))
        value = None if row is None or row.form is None else row.form(each, inputs, shapes[node], flattened)
        if value is None or len(value.terms) > MOST_TERMS:
            return None
        values[node] = value
    target = layer.projection.target
    if target in routed:
        return Terms.of_spikes(target.name, shapes[target]).terms
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


__all__ = [
    "Convolution",
    "Pair",
    "Shape3",
    "as_image",
    "channel_ranges",
    "convolutions_of",
    "pair",
    "reached",
    "rows_as_channels",
]
