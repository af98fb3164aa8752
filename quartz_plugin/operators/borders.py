"""Operations that route copies of spikes, or none, into new places: upsampling and borders."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from quartz_plugin.operators.constants import shifted
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

BELOW_ALL = -1e4
"""Numbers from here down are no values of a network: who pads with them wants a max pool to leave them out."""

_PADS: dict[str, tuple[Any, ...]] = {
    "constant": (nn.ZeroPad1d, nn.ZeroPad2d, nn.ZeroPad3d),
    "reflect": (nn.ReflectionPad1d, nn.ReflectionPad2d),
    "replicate": (nn.ReplicationPad1d, nn.ReplicationPad2d),
    "circular": (nn.CircularPad1d, nn.CircularPad2d),
}
"""Mode of ``torch.nn.functional.pad`` -> the modules that pad one dimension, two, ... in it."""
_WITH_VALUE = (nn.ConstantPad1d, nn.ConstantPad2d, nn.ConstantPad3d)


def _padding_of(mode: str, pads: tuple[int, ...], dims: int) -> nn.Module:
    """The module that pads as many dimensions as `pads` names, of an input of so many, in torch's mode."""
    rank = len(pads) // 2
    if rank >= dims or rank > len(_PADS.get(mode, ())) or rank == 0:
        raise Refusal(f"it pads {rank} dimensions with mode={mode!r}; padding of units of a sample is routed")
    module: nn.Module = _PADS[mode][rank - 1](pads)
    return module


def is_below_all(module: Any) -> bool:
    """Check whether a module pads with a value below all others, minus infinity as a rule."""
    return isinstance(module, _WITH_VALUE) and module.value <= BELOW_ALL


def as_silent(module: nn.Module) -> nn.Module:
    """Let a module that pads with a value below all others pad with silent units; any other is left as it is."""
    if not is_below_all(module):
        return module
    border: Any = module
    return _PADS["constant"][len(border.padding) // 2 - 1](border.padding)  # type: ignore[no-any-return]


def _pads_with_no_number(pad: Any) -> str | None:
    value = getattr(pad, "value", 0)
    return None if value < math.inf else f"it pads with {value}, which no neuron encodes; pad with a number"


def _build_constant_pad(append: Append, pad: Any, input: Value) -> Value:
    """Let silent units and a constant stand for a border of a number; one below all stays for the max pool behind."""
    if pad.value == 0 or is_below_all(pad):
        return append(pad, input)
    padded = append(_PADS["constant"][len(pad.padding) // 2 - 1](pad.padding), input)
    border = F.pad(torch.zeros_like(input.tensor[:1]), pad.padding, value=pad.value)
    return shifted(append, padded, border)


def _build_pad(
    append: Append, input: Value, pad: Sequence[int], mode: str = "constant", value: float | None = None
) -> Value:
    while mode == "constant" and len(pad) > 2 and not any(pad[-2:]):
        pad = pad[:-2]
    padding = _padding_of(mode, tuple(pad), input.tensor.dim())
    if not value:
        return append(padding, input)
    constant: nn.Module = _WITH_VALUE[len(pad) // 2 - 1](tuple(pad), float(value))  # type: ignore[arg-type]
    if (reason := _pads_with_no_number(constant)) is not None:
        raise Refusal(reason)
    return _build_constant_pad(append, constant, input)


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
        if getattr(module, "value", 0) != 0:
            spelled: nn.Module = module
            return spelled
        # torch takes any of them for any number of dimensions.
        return _padding_of(mode, module.padding, len(shape)).train(module.training)

    def relate(relation: Relation, module: Any, place: int, shapes: Sequence[Sequence[int]]) -> None:
        for index in range(len(module.padding) // 2):
            pads = module.padding[2 * index : 2 * index + 2]
            relation.slide(relation.rank() - 1 - index, F.pad, pads, mode=mode)

    constant = mode == "constant"
    silent = "silent units at the border; numbers other than 0 become part of the neurons' bias, and -inf of the max "
    silent += "pool behind it (in front of anything else: refused)"
    return route(
        {"padding": listed(-MOST, 2 * rank), **({"value": ZERO} if with_value else {})},
        relate,
        how=silent if constant else "routes copies of spikes to the border",
        refusal=_pads_with_no_number,
        build=_build_constant_pad if with_value else None,
        functions={_build_pad: [F.pad]} if constant and rank == 1 and not with_value else {},
        spell=spell,
        gain=Moved(_pad_with_edges) if constant else Moved(),
    )


_BORDERS: Rows = {
    **{kind: _pad(mode, 1 + place) for mode, kinds in _PADS.items() for place, kind in enumerate(kinds)},
    **{kind: _pad("constant", 1 + place, with_value=True) for place, kind in enumerate(_WITH_VALUE)},
}

ROWS: Rows = _UPSAMPLES | _BORDERS

__all__ = ["BELOW_ALL", "ROWS", "as_silent", "is_below_all"]
