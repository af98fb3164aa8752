"""Operations that route copies of spikes, or none, into new places: upsampling and borders."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from quartz_plugin.operators.gains import Moved
from quartz_plugin.operators.interpolation import interpolating
from quartz_plugin.operators.modules import per_dimension
from quartz_plugin.operators.relation import Relation
from quartz_plugin.operators.routing import route
from quartz_plugin.operators.row import Operator, Role, Rows
from quartz_plugin.operators.settings import FLAG_OR_NONE, MOST, SCALE_FACTOR, SIZE, ZERO, listed, one_of
from quartz_plugin.operators.tracing import Append, Refusal, Value

# Copies


_NEAREST = ("nearest", "nearest-exact")


def _build_interpolation(
    append: Append,
    input: Value,
    size: Any = None,
    scale_factor: Any = None,
    mode: str = "nearest",
    align_corners: bool | None = None,
    recompute_scale_factor: bool | None = None,
    antialias: bool = False,
) -> Value:
    if recompute_scale_factor:
        size, scale_factor = F.interpolate(input.tensor, None, scale_factor).shape[2:], None
    scale_factor = tuple(scale_factor) if isinstance(scale_factor, list) else scale_factor
    upsample = nn.Upsample(size, scale_factor, mode, align_corners)
    if antialias:
        return append(interpolating(upsample, input.tensor.shape, antialias), input)
    return append(upsample, input)


def _spell_upsample(module: Any, shape: Sequence[int]) -> nn.Module:
    if module.mode not in _NEAREST:
        return interpolating(module, shape)
    rank = len(shape) - 2
    if module.recompute_scale_factor:
        module.size = tuple(module(torch.empty(*shape, device="meta")).shape[2:])
        module.scale_factor = module.recompute_scale_factor = None
    if module.size is not None:
        module.size = per_dimension(module.size, rank)
    if module.scale_factor is not None:
        module.scale_factor = tuple(map(float, per_dimension(module.scale_factor, rank)))
    upsample: nn.Module = module
    return upsample


def _relate_upsample(relation: Relation, module: Any, place: int, shapes: Sequence[Sequence[int]]) -> None:
    rank = relation.rank() - 1
    for dim in range(rank):
        size, factor = (per_dimension(value, rank)[dim] for value in (module.size, module.scale_factor))
        anew = None if factor is None else module.recompute_scale_factor
        relation.slide(1 + dim, F.interpolate, size, factor, mode=module.mode, recompute_scale_factor=anew)


_COPIES = {"how": "routes copies of spikes; in modes but nearest synapses of fixed weights (with weight_bits: refused)"}

_UPSAMPLES: Rows = {
    nn.Upsample: route(
        {
            "size": SIZE,
            "scale_factor": SCALE_FACTOR,
            "mode": one_of(*_NEAREST),
            "recompute_scale_factor": FLAG_OR_NONE,
        },
        _relate_upsample,
        functions={_build_interpolation: [F.interpolate]},
        spell=_spell_upsample,
        **_COPIES,
    ),
    nn.UpsamplingNearest2d: route(
        {"size": SIZE, "scale_factor": SCALE_FACTOR}, _relate_upsample, spell=_spell_upsample, **_COPIES
    ),
    nn.UpsamplingBilinear2d: Operator(
        role=Role.SYNAPSE, how=_COPIES["how"], spell=_spell_upsample, settings=None, relate=None, form=None, gain=None
    ),
}


# Borders

_PADDED_BY_A_CONSTANT = "it pads with a constant other than 0, which no spike encodes; pad with 0"

_PADS: dict[str, tuple[Any, ...]] = {
    "constant": (nn.ZeroPad1d, nn.ZeroPad2d, nn.ZeroPad3d),
    "reflect": (nn.ReflectionPad1d, nn.ReflectionPad2d),
    "replicate": (nn.ReplicationPad1d, nn.ReplicationPad2d),
    "circular": (nn.CircularPad1d, nn.CircularPad2d),
}
"""Mode of ``torch.nn.functional.pad`` -> the modules that pad one dimension, two, ... in it."""


def _padding_of(mode: str, pads: tuple[int, ...], dims: int) -> nn.Module:
    """The module that pads as many dimensions as `pads` names, of an input of so many, in torch's mode."""
    rank = len(pads) // 2
    if rank >= dims or rank > len(_PADS.get(mode, ())) or rank == 0:
        raise Refusal(f"it pads {rank} dimensions with mode={mode!r}; padding of units of a sample is routed")
    module: nn.Module = _PADS[mode][rank - 1](pads)
    return module


def _pads_with_a_constant(pad: Any) -> str | None:
    return None if getattr(pad, "value", 0) == 0 else _PADDED_BY_A_CONSTANT


def _build_pad(
    append: Append, input: Value, pad: Sequence[int], mode: str = "constant", value: float | None = None
) -> Value:
    if value:
        raise Refusal(_PADDED_BY_A_CONSTANT)
    while len(pad) > 2 and not any(pad[-2:]):
        pad = pad[:-2]
    return append(_padding_of(mode, tuple(pad), input.tensor.dim()), input)


def _pad_with_edges(module: Any, gains: list[Tensor]) -> Tensor:
    """Pad (or crop) the last dimensions by their edges: nothing spikes in a border, so its gain may be any."""
    (full,), padding = gains, module.padding
    # torch counts paddings from the last dimension backwards.
    for place in range(len(padding) // 2):
        dim, size = full.dim() - 1 - place, full.shape[full.dim() - 1 - place]
        index = torch.arange(-padding[2 * place], size + padding[2 * place + 1]).clamp(0, size - 1)
        full = full.index_select(dim, index)
    return full


def _pad(mode: str, rank: int, with_value: bool = False) -> Operator:
    def spell(module: Any, shape: Sequence[int]) -> nn.Module:
        if _pads_with_a_constant(module) is not None:
            spelled: nn.Module = module
            return spelled
        # torch takes any of them for any number of dimensions.
        return _padding_of(mode, module.padding, len(shape)).train(module.training)

    def relate(relation: Relation, module: Any, place: int, shapes: Sequence[Sequence[int]]) -> None:
        for index in range(len(module.padding) // 2):
            pads = module.padding[2 * index : 2 * index + 2]
            relation.slide(relation.rank() - 1 - index, F.pad, pads, mode=mode)

    constant = mode == "constant"
    silent = "silent units at the border (constants other than 0: refused)"
    return route(
        {"padding": listed(-MOST, 2 * rank), **({"value": ZERO} if with_value else {})},
        relate,
        how=silent if constant else "routes copies of spikes to the border",
        refusal=_pads_with_a_constant,
        functions={_build_pad: [F.pad]} if constant and rank == 1 and not with_value else {},
        spell=spell,
        gain=Moved(_pad_with_edges) if constant else Moved(),
    )


_BORDERS: Rows = {
    **{kind: _pad(mode, 1 + place) for mode, kinds in _PADS.items() for place, kind in enumerate(kinds)},
    nn.ConstantPad1d: _pad("constant", 1, with_value=True),
    nn.ConstantPad2d: _pad("constant", 2, with_value=True),
}

ROWS: Rows = _UPSAMPLES | _BORDERS

__all__ = ["ROWS"]
