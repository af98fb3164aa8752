"""The words of tracing: values that a network computes, modules that stand for them, and reasons against them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, fx, nn


class ConversionError(ValueError):
    """The network cannot be converted; the message names the module and what could be done."""


class Refusal(Exception):  # noqa: N818
    """Reason why an operation cannot be converted; tracing adds where it stands."""


@dataclass(frozen=True, eq=False)
class Value:
    """A tensor of the network while it is traced: the node that gives it, and what it is on the example."""

    node: fx.Node
    tensor: Tensor


@dataclass(frozen=True, eq=False)
class Comparison:
    """Which of two operands is larger: no spikes encode that alone, but a choice by it may be a rectifier.

    Attributes
    ----------
    first, second : Value, Tensor or number
        What is compared.
    above : bool
        Whether it holds where `first` is the larger one; where the two are equal, a choice is of equal values.
    choose : callable
        ``choose(append, comparison, one, other)``: take `one` where it holds, and `other` where it does not.
    """

    first: Any
    second: Any
    above: bool
    choose: Callable[..., Value]

    @property
    def tensor(self) -> Tensor:
        """No tensor of the network."""
        raise Refusal(_COMPARED)

    @property
    def node(self) -> fx.Node:
        """No node of the network."""
        raise Refusal(_COMPARED)

    def __mul__(self, other: Any) -> Any:
        """Refuse arithmetic with it."""
        raise Refusal(_COMPARED)


class Append(Protocol):
    """Appends a module to the traced network, called on these values."""

    def __call__(self, module: nn.Module, *inputs: Value) -> Value:
        """Return what the module gives."""


Build = Callable[..., Any]
"""``build(append, *args, **kwargs)``: let modules stand for a call of a function or method.

It gets the call's arguments, with a :class:`Value` for each tensor of the network and constants as they are; returns
the result, or raises :class:`Refusal`.
"""

_COMPARED = (
    "it computes with a comparison of values, a jump that no neurons encode; write x * (x > 0), torch.where(x > c, x, "
    "c) or torch.relu"
)
BATCH = "it mixes the batch with the units of a sample; keep dimension 0 apart"
ATTENTION = "it multiplies activations with each other, and synapses are fixed weights"


def call(target: Any, *args: Any, **kwargs: Any) -> Any:
    """Call a function, or the method of that name of the first argument."""
    if isinstance(target, str):
        return getattr(args[0], target)(*args[1:], **kwargs)
    return target(*args, **kwargs)


def build_module(kind: Callable[..., nn.Module]) -> Build:
    """Stand a module in for a function with the same arguments behind its input."""
    return lambda append, input, *args, **kwargs: append(kind(*args, **kwargs), input)


def unit_dim(dim: int, value: Value) -> int:
    """A dimension of a sample's units, counted from the front, the batch's being 0."""
    dim = dim % value.tensor.dim()
    if dim == 0:
        raise Refusal(BATCH)
    return dim


def constant_for(constant: Any, value: Value) -> Tensor:
    """Return a constant without the batch dimension, as `value`'s type, where it fits one sample of it."""
    if not isinstance(constant, int | float | Tensor):
        raise Refusal(f"it computes with {type(constant).__name__}, which is no number or tensor")
    constant = constant.detach() if isinstance(constant, Tensor) else torch.tensor(constant, dtype=torch.float64)
    sample = value.tensor.shape[1:]
    if 0 < constant.dim() < len(sample):
        # Aligned with the last dimensions; written in full, it cannot be taken for one number a channel.
        constant = constant.reshape((1,) * (len(sample) - constant.dim()) + constant.shape)
    if constant.dim() == value.tensor.dim():
        if not bool((constant == constant[:1]).all()):
            raise Refusal("its constant differs from image to image of a batch")
        constant = constant[0]
    try:
        fits = torch.broadcast_shapes(constant.shape, sample) == sample
    except RuntimeError:
        fits = False
    if not fits or not bool(torch.isfinite(constant).all()):
        raise Refusal(f"its constant, of shape {list(constant.shape)}, does not fit units of shape {list(sample)}")
    fitting: Tensor = constant.to(value.tensor)
    return fitting


__all__ = [
    "ATTENTION",
    "BATCH",
    "Append",
    "Build",
    "Comparison",
    "ConversionError",
    "Refusal",
    "Value",
    "build_module",
    "call",
    "constant_for",
    "unit_dim",
]
