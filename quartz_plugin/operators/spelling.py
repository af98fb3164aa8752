"""One spelling for the settings of modules, which torch takes in many."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from quartz_plugin.coding import plain
from quartz_plugin.operators.modules import PADDING_MODES, per_dimension, rank_of
from quartz_plugin.operators.table import Refusal, padding_of

_ALONG_SPACE = ("kernel_size", "stride", "padding", "dilation", "output_padding", "output_size")


def spell_out(module: nn.Module, shape: Sequence[int]) -> nn.Module:
    """Write the settings of one of torch's modules, in place, in the one way that all readers know.

    Numbers are Python's own, sequences are tuples with an entry for each dimension of space, and what is left open (a
    stride, an adaptive size, a dimension counted from the end) is filled in. What the module computes is the same.

    Parameters
    ----------
    module : nn.Module
        The module, which is changed; of one that is not torch's own, the numbers alone.
    shape : sequence of int
        Shape of its input, the batch included.

    Returns
    -------
    nn.Module
        The module itself; of one that pads, the one for as many dimensions as it pads.

    Raises
    ------
    Refusal
        If torch computes something that the settings do not tell.

    Examples
    --------
    >>> spell_out(nn.AvgPool2d([2], stride=[], padding=(1,)), (1, 3, 8, 8))
    AvgPool2d(kernel_size=(2, 2), stride=(2, 2), padding=(1, 1))
    >>> spell_out(nn.Flatten(-3), (1, 3, 8, 8))
    Flatten(start_dim=1, end_dim=-1)
    """
    settings = vars(module)
    for name, value in settings.items():
        if not isinstance(value, dict):
            settings[name] = plain(value)
    if not type(module).__module__.startswith("torch.nn"):
        return module
    for name, value in settings.items():
        if not name.startswith("_"):
            settings[name] = _as_tuples(value)
    rank = rank_of(module)
    if rank:
        _spell_out_space(settings, rank, shape)
    elif isinstance(module, nn.Upsample):
        _spell_out_size(module, shape)
    elif type(module) in PADDING_MODES and getattr(module, "value", 0) == 0:
        # torch takes any of them for any number of dimensions.
        return padding_of(PADDING_MODES[type(module)], settings["padding"], len(shape)).train(module.training)
    elif isinstance(module, nn.Flatten):
        module.start_dim %= len(shape)
        # Left open at the end, so that it is one module whatever is in front.
        module.end_dim = module.end_dim % len(shape)
        module.end_dim = -1 if module.end_dim == len(shape) - 1 else module.end_dim
    elif isinstance(module, nn.Unflatten):
        module.dim %= len(shape)  # type: ignore[operator]
    return module


def _as_tuples(value: Any) -> Any:
    return tuple(map(_as_tuples, value)) if isinstance(value, tuple | list) else value


def _spell_out_space(settings: dict[str, Any], rank: int, shape: Sequence[int]) -> None:
    if settings.get("stride") in (None, ()) and "stride" in settings:
        settings["stride"] = settings["kernel_size"]
    for name in _ALONG_SPACE:
        # "same" and "valid" stay as they are: "same" may pad unevenly, which no numbers can tell.
        if name in settings and not isinstance(settings[name], str):
            settings[name] = per_dimension(settings[name], rank)
    if "output_size" in settings:
        sizes = zip(settings["output_size"], shape[-rank:], strict=True)
        settings["output_size"] = tuple(own if size is None else size for size, own in sizes)
    if "_reversed_padding_repeated_twice" in settings:
        # From the last dimension on; torch's own lacks some where it was told one number for all of them.
        pads = [pad for both in reversed(_left_and_right(settings, rank)) for pad in both]
        if settings["padding_mode"] != "zeros" and list(settings["_reversed_padding_repeated_twice"]) != pads:
            raise Refusal(
                f'torch pads it unevenly (padding="same", padding_mode={settings["padding_mode"]!r}), since its '
                f"dilation has one entry for {rank} dimensions; give dilation={settings['dilation']}"
            )
        settings["_reversed_padding_repeated_twice"] = pads


def _left_and_right(settings: dict[str, Any], rank: int) -> list[tuple[int, int]]:
    """What a convolution pads on both sides of each dimension."""
    padding = settings["padding"]
    if padding == "valid":
        return [(0, 0)] * rank
    if padding == "same":
        totals = [gap * (size - 1) for size, gap in zip(settings["kernel_size"], settings["dilation"], strict=True)]
        return [(total // 2, total - total // 2) for total in totals]
    return [(pad, pad) for pad in padding]


def _spell_out_size(upsample: nn.Upsample, shape: Sequence[int]) -> None:
    rank = len(shape) - 2
    if upsample.recompute_scale_factor:
        upsample.size = tuple(upsample(torch.empty(*shape, device="meta")).shape[2:])
        upsample.scale_factor = upsample.recompute_scale_factor = None
    if upsample.size is not None:
        upsample.size = per_dimension(upsample.size, rank)
    if upsample.scale_factor is not None:
        upsample.scale_factor = tuple(map(float, per_dimension(upsample.scale_factor, rank)))


__all__ = ["spell_out"]
