"""Largest and smallest values while a network is traced: bounds, maxima of two and over dimensions, absolute values.

``max(a, b) = a + relu(b - a)``, ``min(a, b) = a - relu(a - b)`` and ``|d| = relu(d) + relu(-d)``: neurons encode the
ReLU, and the sum is part of the synapses that follow.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

from quartz_plugin.operators.constants import scaled, shifted
from quartz_plugin.operators.modules import Add, Permute
from quartz_plugin.operators.selection import broadcast, reshaped
from quartz_plugin.operators.tracing import BATCH, Append, Build, Refusal, Value, unit_dim

NEVER_NEGATIVE = "never_negative"
"""Key of a traced node's ``meta``: True where its values are rectified, or put together of such without a sign."""


class Largest(NamedTuple):
    """Largest or smallest values along a dimension; their places are not known."""

    values: Value
    indices: None = None


def build_maximum(append: Append, input: Any, other: Any) -> Value:
    """Let neurons encode by how much one of two is larger."""
    if not isinstance(input, Value):
        input, other = other, input
    if not isinstance(other, Value):
        return _at_least(append, input, other)
    first, second = broadcast(append, [input, other])
    return append(Add(), first, append(nn.ReLU(), append(Add(), second, scaled(append, first, -1.0))))


def build_minimum(append: Append, input: Any, other: Any) -> Value:
    """Let neurons encode by how much one of two is larger, and take it from that one."""
    if not isinstance(input, Value):
        input, other = other, input
    if not isinstance(other, Value):
        return _at_most(append, input, other)
    first, second = broadcast(append, [input, other])
    larger = append(nn.ReLU(), append(Add(), first, scaled(append, second, -1.0)))
    return append(Add(), first, scaled(append, larger, -1.0))


def build_clamp(append: Append, input: Value, min: Any = None, max: Any = None) -> Value:
    """Let clipped neurons stand for a clamp by constants, shifted where its lower bound is not 0."""
    if isinstance(min, Value) or isinstance(max, Value):
        input = input if min is None else build_maximum(append, input, min)
        return input if max is None else build_minimum(append, input, max)
    if min is None or max is None:
        return _at_most(append, input, max) if min is None else _at_least(append, input, min)
    lower, upper = _number(min), _number(max)
    if lower is None or upper is None:
        return _at_most(append, _at_least(append, input, min), max)
    if lower >= upper:
        raise Refusal(f"it clips at {lower} and {upper}, and so leaves no values; clip below the upper bound")
    return shifted(append, append(nn.Hardtanh(0.0, upper - lower), shifted(append, input, -lower)), lower)


def build_least(append: Append, input: Value, min: Any) -> Value:
    """Let neurons stand for a lower bound."""
    return build_clamp(append, input, min)


def build_most(append: Append, input: Value, max: Any) -> Value:
    """Let clipped neurons stand for an upper bound."""
    return build_clamp(append, input, None, max)


def _at_least(append: Append, value: Value, bound: Any) -> Value:
    return shifted(append, append(nn.ReLU(), shifted(append, value, -bound)), bound)


def _at_most(append: Append, value: Value, bound: Any) -> Value:
    number = _number(bound)
    if number is not None and number > 0 and value.node.meta.get(NEVER_NEGATIVE):
        return append(nn.Hardtanh(0.0, number), value)
    below = append(nn.ReLU(), shifted(append, scaled(append, value, -1.0), bound))
    return shifted(append, scaled(append, below, -1.0), bound)


def _number(bound: Any) -> float | None:
    """A bound that is one number; None for a tensor of several."""
    if isinstance(bound, Tensor):
        return float(bound) if bound.numel() == 1 else None
    return float(bound)


def build_absolute(append: Append, input: Value) -> Value:
    """Let two layers of neurons encode a value's two signs."""
    positive = append(nn.ReLU(), input)
    return append(Add(), positive, append(nn.ReLU(), scaled(append, input, -1.0)))


def build_largest(append: Append, input: Value, dim: Any = (), keepdim: bool = False) -> Value:
    """Let the first spike along dimensions pass."""
    rank, dims = input.tensor.dim(), [dim] if isinstance(dim, int) else list(dim)
    if not dims:
        raise Refusal(BATCH)
    pooled = sorted(unit_dim(each, input) for each in dims)
    kept = [each for each in range(1, rank) if each not in pooled]
    sample = input.tensor.shape[1:]
    shape = [1 if 1 + place in pooled else size for place, size in enumerate(sample)]
    if kept + pooled != list(range(1, rank)):
        input = append(Permute((0, *kept, *pooled)), input)
    if (len(kept), len(pooled)) == (1, 2):
        largest = append(nn.AdaptiveMaxPool2d(1), input)
    else:
        rows = (math.prod(sample[each - 1] for each in kept), math.prod(sample[each - 1] for each in pooled))
        largest = append(nn.AdaptiveMaxPool1d(1), reshaped(append, input, rows))
    wanted = shape if keepdim else [size for place, size in enumerate(sample) if 1 + place in kept]
    return reshaped(append, largest, wanted)


def build_smallest(append: Append, input: Value, dim: Any = (), keepdim: bool = False) -> Value:
    """Smallest values along dimensions: the largest of the negated values, negated."""
    return scaled(append, build_largest(append, scaled(append, input, -1.0), dim, keepdim), -1.0)


def _build_extreme(of_two: Build, along: Build) -> Build:
    """Largest or smallest values along a dimension, or of two tensors."""

    def build(append: Append, input: Any, dim: Any = None, keepdim: bool = False, *, other: Any = None) -> Any:
        second = dim if other is None else other
        if isinstance(second, Value | Tensor) or not isinstance(input, Value):
            return of_two(append, input, second)
        if dim is None:
            raise Refusal(BATCH)
        return Largest(along(append, input, operator.index(dim), keepdim))

    return build


build_max = _build_extreme(build_maximum, build_largest)
build_min = _build_extreme(build_minimum, build_smallest)


def build_attribute(append: Append, input: Any, name: str) -> Any:
    """Values of a maximum or minimum along a dimension; the units of a tensor in another order."""
    if isinstance(input, Largest) and name == "values":
        return input.values
    if isinstance(input, Value) and name == "mT":
        return append(Permute(_last_two_swapped(input.tensor.shape)), input)
    raise Refusal(f"its attribute {name!r} is no tensor that is known here; use functions of torch")


def _last_two_swapped(shape: Sequence[int]) -> list[int]:
    *others, before, last = range(len(shape))
    if not others:
        raise Refusal(BATCH)
    return [*others, last, before]


__all__ = [
    "NEVER_NEGATIVE",
    "Largest",
    "build_absolute",
    "build_attribute",
    "build_clamp",
    "build_largest",
    "build_least",
    "build_max",
    "build_maximum",
    "build_min",
    "build_minimum",
    "build_most",
    "build_smallest",
]
