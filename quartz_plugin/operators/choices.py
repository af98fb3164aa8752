"""Choices by a comparison while a network is traced: ``x * (x > 0)`` and ``torch.where(x > c, x, c)`` are rectifiers.

What is chosen has to be what is compared, so that the choice is the larger or the smaller of the two.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor

from quartz_plugin.operators.extremes import build_maximum, build_minimum
from quartz_plugin.operators.tracing import Append, Build, Comparison, Refusal, Value, call

_OTHERS = (
    "it chooses between other values than those that it compares, by a jump that no neurons encode; write "
    "torch.where(x > c, x, c), torch.maximum or torch.relu"
)


def build_comparison(above: bool) -> Build:
    """Compare two values, of which a choice may take the larger or the smaller."""

    def build(append: Append, input: Any, other: Any) -> Comparison:
        return Comparison(input, other, above, chosen)

    return build


def build_negation(append: Append, input: Any) -> Comparison:
    """Turn a comparison round."""
    if not isinstance(input, Comparison):
        raise Refusal("it negates no comparison of values")
    return Comparison(input.first, input.second, not input.above, chosen)


def build_choice(append: Append, condition: Any, input: Any, other: Any) -> Value:
    """Choose by a comparison."""
    if not isinstance(condition, Comparison):
        raise Refusal("it chooses by a condition that is no comparison of values; write torch.where(x > c, x, c)")
    return chosen(append, condition, input, other)


def build_method_choice(append: Append, input: Any, condition: Any, other: Any) -> Value:
    """Choose by a comparison, as the method of what is kept."""
    return build_choice(append, condition, input, other)


def build_filling(append: Append, input: Any, mask: Any, value: Any) -> Value:
    """Put a constant where a comparison holds."""
    return build_choice(append, mask, value, input)


def build_conversion(target: Any, keep: Build) -> Build:
    """Take a comparison for the numbers 0 and 1, and convert other values as `keep` does."""

    def build(append: Append, input: Any, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(input, Comparison):
            return keep(append, input, *args, **kwargs)
        others = [arg.tensor if isinstance(arg, Value) else arg for arg in args]
        call(target, torch.zeros((), dtype=torch.bool), *others, **kwargs)
        return input

    return build


def chosen(append: Append, by: Comparison, one: Any, other: Any) -> Value:
    """Take `one` where a comparison holds, and `other` where it does not."""
    larger, smaller = (by.first, by.second) if by.above else (by.second, by.first)
    value = next((each for each in (one, other) if isinstance(each, Value)), None)
    if value is None:
        raise Refusal(_OTHERS)
    for first, second, build in ((larger, smaller, build_maximum), (smaller, larger, build_minimum)):
        if _are_same(one, first, value) and _are_same(other, second, value):
            return build(append, one, other)
    raise Refusal(_OTHERS)


def _are_same(one: Any, other: Any, value: Value) -> bool:
    """Check whether two operands are one value of the network, or one constant for each unit of `value`."""
    if isinstance(one, Value) or isinstance(other, Value):
        return isinstance(one, Value) and isinstance(other, Value) and one.node is other.node
    if not all(isinstance(each, int | float | Tensor) for each in (one, other)):
        return False
    first, second = (torch.as_tensor(each, dtype=torch.float64) for each in (one, other))
    try:
        units = torch.broadcast_shapes(first.shape, second.shape, value.tensor.shape)
    except RuntimeError:
        return False
    return units == value.tensor.shape and bool((first == second).all())


COMPARISONS: dict[Build, list[Any]] = {
    build_comparison(above=True): [operator.gt, torch.gt, "gt", operator.ge, torch.ge, "ge"],
    build_comparison(above=False): [operator.lt, torch.lt, "lt", operator.le, torch.le, "le"],
    build_negation: [operator.invert, torch.logical_not, "logical_not", torch.bitwise_not],
    build_choice: [torch.where],
    build_method_choice: ["where"],
    build_filling: [torch.masked_fill, "masked_fill", "masked_fill_"],
}
"""Functions and methods that compare, and that choose by comparisons."""

__all__ = ["COMPARISONS", "build_conversion"]
