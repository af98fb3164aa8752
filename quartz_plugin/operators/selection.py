"""Units copied and picked while a network is traced: what broadcasting, repeating and indexing have in common."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from quartz_plugin.operators.modules import Expand, Reshape, Select
from quartz_plugin.operators.tracing import BATCH, Append, Refusal, Value


def expanded(append: Append, value: Value, shape: Sequence[int]) -> Value:
    """Let a value be copied along its dimensions of size 1 to this shape, the batch included."""
    if len(shape) != value.tensor.dim() or shape[0] != len(value.tensor):
        raise Refusal(BATCH)
    return value if tuple(shape) == tuple(value.tensor.shape) else append(Expand(shape[1:]), value)


def reshaped(append: Append, value: Value, shape: Sequence[int]) -> Value:
    """Let a value have this shape, without the batch; one that has it stays as it is."""
    return value if tuple(value.tensor.shape[1:]) == tuple(shape) else append(Reshape(tuple(shape)), value)


def broadcast(append: Append, values: Sequence[Value]) -> list[Value]:
    """Let values have one shape, each copied along its dimensions of size 1."""
    shape = torch.broadcast_shapes(*(value.tensor.shape for value in values))
    return [expanded(append, value, shape) for value in values]


def selected(append: Append, value: Value, dim: int, indices: Sequence[int] | Tensor) -> Value:
    """Take the units at these places of a dimension; places may be counted from the end."""
    size = value.tensor.shape[dim]
    places = [place % size for place in torch.as_tensor(indices).flatten().tolist()]
    return value if places == list(range(size)) else append(Select(dim, places), value)


def picked(append: Append, value: Value, pick: Callable[[Tensor], Tensor]) -> Value:
    """Take the units that `pick` takes of a batch of one sample, at places that it knows."""
    sample = value.tensor.shape[1:]
    places = pick(torch.arange(math.prod(sample)).view(1, *sample))
    if places.dim() == 0 or len(places) != 1:
        raise Refusal(BATCH)
    flat = value if len(sample) == 1 else append(nn.Flatten(), value)
    taken = selected(append, flat, 1, places)
    return reshaped(append, taken, places.shape[1:])


__all__ = ["broadcast", "expanded", "picked", "reshaped", "selected"]
