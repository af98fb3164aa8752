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


def reached(convolution: Convolution, dim: int, at: int, size: int, first: int = 0) -> list[tuple[int, int]]:
    """Outputs, from `first` up to `size`, that an input reaches along a dimension, each with its place in a kernel."""
    stride, padding, dilation = (of[dim] for of in (convolution.stride, convolution.padding, convolution.dilation))
    found = []
    for k in range(convolution.kernel[dim]):
        if convolution.transposed:
            output, rest = at * stride - padding + k * dilation, 0
        else:
            output, rest = divmod(at + padding - k * dilation, stride)
        if rest == 0 and first <= output < size:
            found.append((output, k))
    return found


def places_as_channels(convolution: Convolution) -> Convolution:
    """The synapses into a single place with all places of the source as channels of one, channels fastest."""
    channels, height, width = convolution.source_shape
    dense = convolution.dense_weight()
    weight = dense.new_zeros(convolution.outputs, height, width, channels)
    inputs = slice(convolution.first_input, convolution.first_input + convolution.inputs)
    for y in range(height):
        for x in range(width):
            for _, row in reached(convolution, 0, y, 1):
                for _, column in reached(convolution, 1, x, 1):
                    weight[:, y, x, inputs] += dense[:, :, row, column]
    return replace(
        convolution,
        source_shape=(height * width * channels, 1, 1),
        first_input=0,
        weight=weight.flatten(1)[:, :, None, None],
        stride=(1, 1),
        padding=(0, 0),
        dilation=(1, 1),
        groups=1,
        transposed=False,
    )


__all__ = [
    "Convolution",
    "Pair",
    "Shape3",
    "as_image",
    "channel_ranges",
    "convolutions_of",
    "pair",
    "places_as_channels",
    "reached",
]
