"""Operations that only move spikes: reshaping, slicing, joining, padding, upsampling, delays."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from quartz_plugin.neuron import AxonalDelay
from quartz_plugin.operators.constants import shifted
from quartz_plugin.operators.gains import Moved
from quartz_plugin.operators.linear_map import Terms, same_terms
from quartz_plugin.operators.modules import Concatenate, Permute, Reshape, Slice
from quartz_plugin.operators.relation import Relation
from quartz_plugin.operators.row import Operator, Relate, Role, Rows, changes_no_relation
from quartz_plugin.operators.selection import picked, reshaped, selected
from quartz_plugin.operators.settings import MOST, Settings, listed, whole
from quartz_plugin.operators.tracing import BATCH, Append, Build, Refusal, Value, build_module, call, unit_dim

_ROUTE = "routes spikes (where it mixes the batch with a sample's units: refused)"


def route(settings: Settings | None, relate: Relate | None, **facets: Any) -> Operator:
    """A row of a module that only moves spikes; behind a map that weighs it is stepped unless it has a form."""
    given: dict[str, Any] = {"role": Role.ROUTE, "how": _ROUTE, "form": None, "gain": Moved()} | facets
    return Operator(settings=settings, relate=relate, **given)


# Other shapes


def _flattens_batch(flatten: Any) -> str | None:
    return None if flatten.start_dim != 0 else "it flattens the batch; use start_dim=1"


def _unflattens_batch(unflatten: Any) -> str | None:
    return "it unflattens the batch; use dim=1" if unflatten.dim == 0 else None


def _spell_flatten(module: Any, shape: Sequence[int]) -> nn.Module:
    module.start_dim %= len(shape)
    # Left open at the end, so that it is one module whatever is in front.
    module.end_dim = module.end_dim % len(shape)
    module.end_dim = -1 if module.end_dim == len(shape) - 1 else module.end_dim
    flatten: nn.Module = module
    return flatten


def _spell_unflatten(module: Any, shape: Sequence[int]) -> nn.Module:
    module.dim %= len(shape)
    unflatten: nn.Module = module
    return unflatten


def _reshaped_by(module: Any) -> Callable[[Sequence[int]], Sequence[int]]:
    return lambda shape: list(module(torch.empty(1, *shape, device="meta")).shape[1:])


def _relate_flatten(relation: Relation, module: Any, place: int, shapes: Sequence[Sequence[int]]) -> None:
    relation.flatten(_reshaped_by(module))


def _relate_reshape(relation: Relation, module: Any, place: int, shapes: Sequence[Sequence[int]]) -> None:
    relation.reshape(_reshaped_by(module))


def _flattened_terms(module: Any, inputs: list[Terms], shape: torch.Size, flattened: bool) -> Terms | None:
    # The units stay as they are: a linear layer behind it is a convolution with a kernel of their whole size.
    return inputs[0] if len(shape) == 1 else None


def _build_reshape(target: Any) -> Build:
    def build(append: Append, input: Value, *args: Any, **kwargs: Any) -> Value:
        # contiguous() is dropped, so a view may have to copy here.
        like = {"view": "reshape", "view_as": "reshape_as"}.get(target, target) if isinstance(target, str) else target
        args = tuple(arg.tensor if isinstance(arg, Value) else arg for arg in args)
        out = call(like, input.tensor, *args, **kwargs)
        if out.dim() == 0 or len(out) != len(input.tensor):
            raise Refusal(BATCH)
        if out.shape == input.tensor.shape:
            return input
        flattens = out.dim() == 2 and input.tensor.dim() > 2
        return append(nn.Flatten() if flattens else Reshape(out.shape[1:]), input)

    return build


_RESHAPES: tuple[Any, ...] = (
    *(torch.flatten, "flatten", torch.reshape, "reshape", torch.unflatten, "unflatten"),
    *(torch.squeeze, "squeeze", torch.unsqueeze, "unsqueeze", "view", "view_as", "reshape_as"),
)

_SHAPES: Rows = {
    nn.Flatten: route(
        {"start_dim": whole(1), "end_dim": whole(-MOST)},
        _relate_flatten,
        refusal=_flattens_batch,
        spell=_spell_flatten,
        form=_flattened_terms,
    ),
    nn.Unflatten: route(
        {"dim": whole(-MOST), "unflattened_size": listed(-1)},
        _relate_reshape,
        refusal=_unflattens_batch,
        spell=_spell_unflatten,
    ),
    Reshape: route(
        {"shape": listed(1)}, _relate_reshape, functions={_build_reshape(target): [target] for target in _RESHAPES}
    ),
}


# Other orders


def _build_permutation(target: Any) -> Build:
    def build(append: Append, input: Value, *args: Any, **kwargs: Any) -> Value:
        # The sizes of a tensor shaped like the order of its dimensions are their new order.
        order = torch.empty(tuple(range(1, input.tensor.dim() + 1)), device="meta")
        dims = [size - 1 for size in call(target, order, *args, **kwargs).shape]
        if dims[0] != 0:
            raise Refusal(BATCH)
        return append(Permute(dims), input)

    return build


def _relate_permutation(relation: Relation, module: Any, place: int, shapes: Sequence[Sequence[int]]) -> None:
    relation.permute([dim - 1 for dim in module.dims[1:]])


def _relate_shuffle(relation: Relation, module: Any, place: int, shapes: Sequence[Sequence[int]]) -> None:
    relation.rank()
    order = module(torch.arange(relation.size(0), dtype=torch.float32).view(1, -1, 1, 1)).flatten().long()
    relation.along(0, lambda m: m[:, order])


def _relate_pixel_shuffle(relation: Relation, module: Any, place: int, shapes: Sequence[Sequence[int]]) -> None:
    (channels, height, width), factor = shapes[0], module.upscale_factor
    relation.reshape(lambda _: (channels // factor**2, factor, factor, height, width))
    relation.permute([0, 3, 1, 4, 2])
    relation.reshape(lambda _: (channels // factor**2, height * factor, width * factor))


def _relate_pixel_unshuffle(relation: Relation, module: Any, place: int, shapes: Sequence[Sequence[int]]) -> None:
    (channels, height, width), factor = shapes[0], module.downscale_factor
    relation.reshape(lambda _: (channels, height // factor, factor, width // factor, factor))
    relation.permute([0, 2, 4, 1, 3])
    relation.reshape(lambda _: (channels * factor**2, height // factor, width // factor))


_PERMUTATIONS = (
    *(torch.permute, "permute", torch.transpose, "transpose", torch.swapaxes, "swapaxes"),
    *(torch.swapdims, "swapdims", torch.movedim, "movedim", torch.moveaxis, "moveaxis"),
)

_ORDERS: Rows = {
    Permute: route(
        {"dims": listed(0)},
        _relate_permutation,
        functions={_build_permutation(target): [target] for target in _PERMUTATIONS},
    ),
    nn.PixelShuffle: route(
        {"upscale_factor": whole(1)},
        _relate_pixel_shuffle,
        functions={build_module(nn.PixelShuffle): [F.pixel_shuffle]},
    ),
    nn.PixelUnshuffle: route(
        {"downscale_factor": whole(1)},
        _relate_pixel_unshuffle,
        functions={build_module(nn.PixelUnshuffle): [F.pixel_unshuffle]},
    ),
    nn.ChannelShuffle: route(
        {"groups": whole(1)}, _relate_shuffle, functions={build_module(nn.ChannelShuffle): [F.channel_shuffle]}
    ),
}


# Parts, and parts side by side


def _build_pieces(target: Any) -> Build:
    def build(append: Append, input: Value, sections: Any = None, dim: int = 0, **named: Any) -> list[Value]:
        dim = unit_dim(dim, input)
        if sections is None:
            # torch calls it chunks, split_size or split_size_or_sections.
            (sections,) = named.values()
        pieces, start = [], 0
        for piece in call(target, input.tensor, sections, dim):
            pieces.append(append(Slice(dim, start, start + piece.shape[dim]), input))
            start += piece.shape[dim]
        return pieces

    return build


def _build_narrow(append: Append, input: Value, dim: int, start: int, length: int) -> Value:
    return append(Slice(unit_dim(dim, input), start, start + length), input)


def _build_getitem(append: Append, input: Value, index: Any) -> Value:
    index = list(index) if isinstance(index, tuple) else [index]
    if any(isinstance(part, Value) for part in index):
        raise Refusal("it picks units by the values of activations; slices, numbers and constant places are routed")
    if any(isinstance(part, list | Tensor) for part in index):
        return _pick(append, input, index)
    rank, used = input.tensor.dim(), sum(part is not None and part is not Ellipsis for part in index)
    if Ellipsis not in index:
        index.append(Ellipsis)
    place = index.index(Ellipsis)
    index[place : place + 1] = [slice(None)] * (rank - used)
    if not index or not _is_whole(index[0]):
        raise Refusal(BATCH)
    value, dim = input, 0
    for part in index:
        if part is None:
            continue
        if dim > 0:
            size = value.tensor.shape[dim]
            if isinstance(part, int):
                part = slice(part % size, part % size + 1)
            taken = range(*part.indices(size))
            if taken != range(size):
                value = append(Slice(dim, taken.start, taken.stop, taken.step), value)
        dim += 1
    shape = input.tensor[tuple(index)].shape
    return reshaped(append, value, shape[1:])


def _is_whole(part: Any) -> bool:
    """Check whether a part of an index takes all of a dimension, of whatever size."""
    if not isinstance(part, slice):
        return False
    start, stop, step = part.start, part.stop, part.step
    return start in (None, 0) and step in (None, 1) and (stop is None or stop >= MOST)


def _pick(append: Append, input: Value, index: list[Any]) -> Value:
    """Units at constant places, given as a list or a tensor."""
    if not _is_whole(index[0]) and index[0] is not Ellipsis:
        raise Refusal(BATCH)
    places = [torch.as_tensor(part).cpu() if isinstance(part, list | Tensor) else part for part in index]
    *before, last = places
    along_one = all(isinstance(part, slice) and part == slice(None) for part in before)
    if along_one and isinstance(last, Tensor) and last.dim() == 1:
        chosen = last.nonzero().flatten() if last.dtype == torch.bool else last
        return selected(append, input, len(before), chosen)
    if input.tensor[tuple(places)].shape[:1] != input.tensor.shape[:1]:
        raise Refusal(BATCH)
    return picked(append, input, lambda units: units[tuple(places)])


def _build_picked_number(append: Append, input: Value, dim: int, index: int) -> Value:
    whole_dims = [slice(None)] * unit_dim(dim, input)
    return _build_getitem(append, input, (*whole_dims, index))


def _build_unbinding(append: Append, input: Value, dim: int = 0) -> list[Value]:
    size = input.tensor.shape[unit_dim(dim, input)]
    return [_build_picked_number(append, input, dim, index) for index in range(size)]


def _relate_slice(relation: Relation, module: Any, place: int, shapes: Sequence[Sequence[int]]) -> None:
    relation.along(module.dim - 1, lambda m: m[:, module.start : module.stop : module.step])


def _build_concatenation(append: Append, tensors: Sequence[Any], dim: int = 0) -> Value:
    values = [value for value in tensors if isinstance(value, Value)]
    dim = unit_dim(dim, values[0])
    if len(values) < len(tensors):
        return _beside_constants(append, tensors, dim)
    return values[0] if len(values) == 1 else append(Concatenate(dim), *values)


def _beside_constants(append: Append, tensors: Sequence[Any], dim: int) -> Value:
    """Zeros take a constant's place, and a bias is the constant there."""
    values: list[Value] = []
    whole: list[Tensor] = []
    before = 0
    like = next(value.tensor for value in tensors if isinstance(value, Value))
    for each in tensors:
        if isinstance(each, Value):
            values.append(_padded(append, each, dim, before, 0))
            whole.append(torch.zeros_like(each.tensor))
            before = 0
            continue
        if not isinstance(each, Tensor):
            raise Refusal(f"it puts {type(each).__name__} beside activations, which is no tensor")
        # A constant for one image is one for each.
        whole.append(each.detach().to(like).expand(len(like), *each.shape[1:]))
        if values:
            values[-1] = _padded(append, values[-1], dim, 0, each.shape[dim])
        else:
            before += each.shape[dim]
    joined = values[0] if len(values) == 1 else append(Concatenate(dim), *values)
    return shifted(append, joined, torch.cat(whole, dim))


def _padded(append: Append, value: Value, dim: int, before: int, behind: int) -> Value:
    if before == behind == 0:
        return value
    kinds: tuple[Any, ...] = (nn.ZeroPad1d, nn.ZeroPad2d, nn.ZeroPad3d)
    rank = value.tensor.dim() - dim
    if rank > len(kinds):
        raise Refusal(f"it puts a constant beside activations {rank} dimensions from the end; 3 are known here")
    return append(kinds[rank - 1]((*[0] * (2 * (rank - 1)), before, behind)), value)


def _build_stack(append: Append, tensors: Sequence[Any], dim: int = 0) -> Value:
    rank = next(value.tensor.dim() for value in tensors if isinstance(value, Value))
    dim, unsqueeze = dim % (rank + 1), _build_reshape("unsqueeze")
    rows = [unsqueeze(append, each, dim) if isinstance(each, Value) else each.unsqueeze(dim) for each in tensors]
    return _build_concatenation(append, rows, dim)


def _build_columns(append: Append, tensors: Sequence[Any]) -> Value:
    return _build_concatenation(append, tensors, 1)


def _relate_concatenation(relation: Relation, module: Any, place: int, shapes: Sequence[Sequence[int]]) -> None:
    before = sum(shape[module.dim - 1] for shape in shapes[:place])
    behind = sum(shape[module.dim - 1] for shape in shapes[place + 1 :])
    relation.along(module.dim - 1, lambda m: F.pad(m, (before, behind)))


def _concatenated_terms(module: Any, inputs: list[Terms], shape: torch.Size, flattened: bool) -> Terms | None:
    if flattened or module.dim != 1 or len({value.shape[1:] for value in inputs}) != 1:
        return None
    terms, channels = [], 0
    for value in inputs:
        terms += [term.behind(channels) for term in value.terms]
        channels += value.shape[0]
    return Terms((channels, *inputs[0].shape[1:]), terms)


def _gain_of_part(module: Any, gain: Tensor, place: int, shapes: Sequence[Sequence[int]]) -> Tensor:
    dim = module.dim - 1
    if gain.shape[dim] == 1:
        return gain
    return gain.narrow(dim, sum(shape[dim] for shape in shapes[:place]), shapes[place][dim])


_PARTS: Rows = {
    Slice: route(
        {"dim": whole(1), "start": whole(0), "stop": whole(0), "step": whole(1)},
        _relate_slice,
        functions={
            **{_build_pieces(target): [target] for target in (torch.chunk, "chunk", torch.split, "split")},
            **{_build_pieces(target): [target] for target in (torch.tensor_split, "tensor_split")},
            _build_narrow: [torch.narrow, "narrow"],
            _build_picked_number: [torch.select, "select"],
            _build_unbinding: [torch.unbind, "unbind"],
            _build_getitem: [operator.getitem],
        },
    ),
    Concatenate: route(
        {"dim": whole(1)},
        _relate_concatenation,
        functions={
            _build_concatenation: [torch.cat, torch.concat, torch.concatenate],
            _build_stack: [torch.stack],
            _build_columns: [torch.hstack],
        },
        inputs=range(1, MOST),
        form=_concatenated_terms,
        gain=Moved(before=_gain_of_part),
    ),
}


ROWS: Rows = _SHAPES | _ORDERS | _PARTS


EMITTED: Rows = {
    AxonalDelay: route({"steps": whole(0)}, changes_no_relation, how="spikes arrive later", form=same_terms)
}
"""Rows of modules that conversion alone makes."""

__all__ = ["EMITTED", "ROWS"]
