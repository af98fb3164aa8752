"""One spelling for the settings of modules, which torch takes in many."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from quartz_plugin.coding import plain
from quartz_plugin.operators.modules import per_dimension
from quartz_plugin.operators.tracing import Refusal

_ALONG_SPACE = ("kernel_size", "stride", "padding", "dilation", "output_padding", "output_size")


def spell_plainly(module: nn.Module) -> None:
    """Let settings be Python's own numbers, and of torch's modules, tuples."""
    settings = vars(module)
    for name, value in settings.items():
        if not isinstance(value, dict):
            settings[name] = plain(value)
    if not type(module).__module__.startswith("torch.nn"):
        return
    for name, value in settings.items():
        if not name.startswith("_"):
            settings[name] = _as_tuples(value)


def _as_tuples(value: Any) -> Any:
    return tuple(map(_as_tuples, value)) if isinstance(value, tuple | list) else value


def spell_space(rank: int) -> Callable[[Any, Sequence[int]], nn.Module]:
    """Let a convolution or pool have a setting for each of `rank` dimensions of space, and none left open."""

    def spell(module: Any, shape: Sequence[int]) -> nn.Module:
        settings = vars(module)
        if settings.get("stride") in (None, ()) and "stride" in settings:
            settings["stride"] = settings["kernel_size"]
        for name in _ALONG_SPACE:
            # "same" and "valid" stay as they are: "same" may pad unevenly, which no numbers can express.
            if name in settings and not isinstance(settings[name], str):
                settings[name] = per_dimension(settings[name], rank)
        if "output_size" in settings:
            sizes = zip(settings["output_size"], shape[-rank:], strict=True)
            settings["output_size"] = tuple(own if size is None else size for size, own in sizes)
        if "_reversed_padding_repeated_twice" in settings:
            # From the last dimension on; torch's own lacks some where it was given one number for all of them.
            pads = [pad for both in reversed(_left_and_right(settings, rank)) for pad in both]
            if settings["padding_mode"] != "zeros" and list(settings["_reversed_padding_repeated_twice"]) != pads:
                raise Refusal(
                    f'torch pads it unevenly (padding="same", padding_mode={settings["padding_mode"]!r}), since its '
                    f"dilation has one entry for {rank} dimensions; give dilation={settings['dilation']}"
                )
            settings["_reversed_padding_repeated_twice"] = pads
        spelled: nn.Module = module
        return spelled

    return spell


def _left_and_right(settings: dict[str, Any], rank: int) -> list[tuple[int, int]]:
    """Padding of a convolution on both sides of each dimension."""
    padding = settings["padding"]
    if padding == "valid":
        return [(0, 0)] * rank
    if padding == "same":
        totals = [gap * (size - 1) for size, gap in zip(settings["kernel_size"], settings["dilation"], strict=True)]
        return [(total // 2, total - total // 2) for total in totals]
    return [(pad, pad) for pad in padding]


__all__ = ["spell_plainly", "spell_space"]
