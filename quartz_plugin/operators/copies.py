"""Operations that route spikes, or copies of them, to places known beforehand: expanding, repeating, flipping."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from quartz_plugin.operators.linear_map import LinearMap, Shape3, as_convolution
from quartz_plugin.operators.modules import Expand, Select, sample_dim
from quartz_plugin.operators.relation import NoProductError, Relation
from quartz_plugin.operators.routing import route
from quartz_plugin.operators.row import Rows
from quartz_plugin.operators.selection import broadcast, expanded, picked, selected
from quartz_plugin.operators.settings import MOST, listed, whole
from quartz_plugin.operators.tracing import BATCH, Append, Build, Refusal, Value, call, unit_dim

MOST_RELATED = 2**26
"""Entries of the relation of one dimension's places, up to which it is written down; beyond, units are probed."""

# Copies along dimensions of size 1


def _build_expansion(target: Any) -> Build:
    def build(append: Append, input: Value, *args: Any, **kwargs: Any) -> Value:
        others = [arg.tensor if isinstance(arg, Value) else arg for arg in args]
        others_named = {name: arg.tensor if isinstance(arg, Value) else arg for name, arg in kwargs.items()}
        return expanded(append, input, call(target, input.tensor, *others, **others_named).shape)

    return build


def _build_broadcast(append: Append, *tensors: Value) -> list[Value]:
    if not all(isinstance(each, Value) for each in tensors):
        raise Refusal("it broadcasts a constant with activations; compute with both, and torch broadcasts them")
    return broadcast(append, tensors)


def _relate_expansion(relation: Relation, module: Any, place: int, shapes: Sequence[Sequence[int]]) -> None:
    relation.rank()
    for dim, (own, size) in enumerate(zip(shapes[0], module.shape, strict=True)):
        if own != size:
            relation.along(dim, lambda m, size=size: m.expand(-1, size))  # type: ignore[misc]


def _expansion_as_map(module: Any, shape: Shape3, out_shape: torch.Size) -> LinearMap | None:
    channels = shape[0]
    if out_shape[0] != channels:
        if math.prod(shape) != 1 or math.prod(out_shape) != out_shape[0]:
            return None
        return LinearMap(weight=torch.ones(out_shape[0], 1, 1, 1, dtype=torch.float64))
    if len(out_shape) not in (2, 3):
        return None
    # Each unit of size 1 along a dimension is spread over it; where there is its size already, it stays.
    rows, columns = ((1, *out_shape[1:]) if len(out_shape) == 2 else out_shape[1:])[-2:]
    kernel = (rows // shape[1], columns // shape[2])
    if any(own not in (1, size) for own, size in zip(shape[1:], (rows, columns), strict=True)):
        return None
    weight = torch.ones(channels, 1, *kernel, dtype=torch.float64)
    return LinearMap(weight=weight, groups=channels, transposed=True)


# Places of a dimension


def _build_repetition(append: Append, input: Value, *sizes: Any, **named: Any) -> Value:
    given = [*sizes, *named.values()]
    counts = list(given[0]) if isinstance(given[0], tuple | list) else given
    return _repeated(append, input, counts)


def _build_tiles(append: Append, input: Value, *sizes: Any, **named: Any) -> Value:
    given = [*sizes, *named.values()]
    counts = list(given[0]) if isinstance(given[0], tuple | list) else given
    return _repeated(append, input, [1] * (input.tensor.dim() - len(counts)) + counts)


def _repeated(append: Append, input: Value, counts: list[int]) -> Value:
    if len(counts) != input.tensor.dim() or counts[0] != 1:
        raise Refusal(BATCH)
    shape = [count if size == 1 else size for count, size in zip(counts, input.tensor.shape, strict=True)]
    value = expanded(append, input, [len(input.tensor), *shape[1:]])
    for dim, (count, size) in enumerate(zip(counts, input.tensor.shape, strict=True)):
        if dim > 0 and size > 1:
            value = selected(append, value, dim, list(range(size)) * count)
    return value


def _build_interleaved(append: Append, input: Value, repeats: Any, dim: Any = None, output_size: Any = None) -> Value:
    if dim is None or isinstance(repeats, Value):
        raise Refusal(BATCH if dim is None else "it repeats units as often as activations are large; give a number")
    dim = unit_dim(dim, input)
    return selected(append, input, dim, torch.arange(input.tensor.shape[dim]).repeat_interleave(_indices(repeats)))


def _build_flip(append: Append, input: Value, *dims: Any, **named: Any) -> Value:
    given = [*dims, *named.values()]
    for dim in given[0] if isinstance(given[0], tuple | list) else given:
        dim = unit_dim(dim, input)
        input = selected(append, input, dim, range(input.tensor.shape[dim] - 1, -1, -1))
    return input


def _build_patches(
    append: Append, input: Value, kernel_size: Any, dilation: Any = 1, padding: Any = 0, stride: Any = 1
) -> Value:
    if input.tensor.dim() != 4:
        raise Refusal(BATCH)
    rows, columns = padding if isinstance(padding, tuple | list) else (padding, padding)
    if rows or columns:
        input = append(nn.ZeroPad2d((columns, columns, rows, rows)), input)
    return picked(
        append, input, lambda units: F.unfold(units.double(), kernel_size, dilation, 0, stride).round().long()
    )


def _build_unfold(append: Append, module: Any, input: Value) -> Value:
    return _build_patches(append, input, module.kernel_size, module.dilation, module.padding, module.stride)


def _build_selection(append: Append, input: Value, dim: int, index: Any) -> Value:
    return selected(append, input, unit_dim(dim, input), _indices(index))


def _build_gathering(target: Any) -> Build:
    def build(append: Append, input: Value, *args: Any, **kwargs: Any) -> Value:
        names = ("dim", "index") if "gather" in str(target) else ("indices", "dim")
        given = dict(zip(names, args, strict=False)) | kwargs
        (name,) = {"index", "indices"} & given.keys()
        index, dim = _indices(given[name]), unit_dim(given["dim"], input)
        if index.dim() != input.tensor.dim() or not bool((index == index[:1]).all()):
            raise Refusal("its places differ from image to image of a batch")
        take = torch.gather if name == "index" else torch.take_along_dim
        return picked(append, input, lambda units: take(units, dim=dim, **{name: index[:1]}))

    return build


def _indices(index: Any) -> Any:
    if isinstance(index, Value):
        raise Refusal("it picks units by the values of activations, and spikes have fixed ways; use constant places")
    return index.detach().cpu() if isinstance(index, Tensor) else index


def _relate_selection(relation: Relation, module: Any, place: int, shapes: Sequence[Sequence[int]]) -> None:
    dim = module.dim - 1
    relation.rank()
    if relation.size(dim) * max(relation.size(dim), len(module.indices)) > MOST_RELATED:
        raise NoProductError
    relation.along(dim, lambda m: m[:, list(module.indices)])


# Other places of the same units


class Roll(nn.Module):
    """Moves units along dimensions, and those that leave at the end back to the front.

    Parameters
    ----------
    shifts, dims : sequence of int
        By how many places, and along which dimensions, each 1 or more.

    Examples
    --------
    >>> Roll([1], [1])(torch.tensor([[1.0, 2.0, 3.0]]))
    tensor([[3., 1., 2.]])
    """

    def __init__(self, shifts: Sequence[int], dims: Sequence[int]) -> None:
        super().__init__()
        self.shifts, self.dims = tuple(shifts), tuple(map(sample_dim, dims))
        if len(self.shifts) != len(self.dims):
            raise ValueError(f"a roll needs a shift for each dimension, got {shifts} and {dims}")

    def forward(self, x: Tensor) -> Tensor:
        """Roll."""
        return x.roll(self.shifts, self.dims)

    def extra_repr(self) -> str:
        """Show shifts and dimensions."""
        return f"shifts={self.shifts}, dims={self.dims}"


def _build_roll(append: Append, input: Value, shifts: Any, dims: Any = ()) -> Value:
    shifts, dims = (tuple(each) if isinstance(each, tuple | list) else (each,) for each in (shifts, dims))
    if not dims:
        # Torch flattens the batch with the rest.
        raise Refusal(BATCH)
    return append(Roll(shifts, [unit_dim(dim, input) for dim in dims]), input)


def _relate_roll(relation: Relation, module: Any, place: int, shapes: Sequence[Sequence[int]]) -> None:
    for shift, dim in zip(module.shifts, module.dims, strict=True):
        relation.along(dim - 1, partial(torch.roll, shifts=shift, dims=1))


_ROLLS: Rows = {
    Roll: route(
        {"shifts": listed(-MOST), "dims": listed(1)}, _relate_roll, functions={_build_roll: [torch.roll, "roll"]}
    )
}


_COPIES = "routes spikes, or copies of them, to places that are known beforehand (by activations: refused)"

ROWS: Rows = {
    **_ROLLS,
    Expand: route(
        {"shape": listed(1)},
        _relate_expansion,
        functions={
            **{_build_expansion(target): [target] for target in ("expand", "expand_as", torch.broadcast_to)},
            _build_expansion("broadcast_to"): ["broadcast_to"],
            _build_broadcast: [torch.broadcast_tensors],
        },
        how=_COPIES,
        form=as_convolution(_expansion_as_map),
    ),
    nn.Unfold: route(None, None, gain=None, how=_COPIES, build=_build_unfold),
    Select: route(
        {"dim": whole(1), "indices": listed(0)},
        _relate_selection,
        functions={
            _build_repetition: ["repeat"],
            _build_tiles: [torch.tile, "tile"],
            _build_interleaved: [torch.repeat_interleave, "repeat_interleave"],
            _build_patches: [F.unfold],
            _build_flip: [torch.flip, "flip"],
            _build_selection: [torch.index_select, "index_select"],
            **{_build_gathering(target): [target] for target in (torch.gather, "gather")},
            **{_build_gathering(target): [target] for target in (torch.take_along_dim, "take_along_dim")},
        },
        how=_COPIES,
    ),
}

__all__ = ["ROWS"]
