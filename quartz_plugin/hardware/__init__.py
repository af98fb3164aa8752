"""Chips: how a network maps to one, and what it would need there."""

import warnings
from typing import Any

from quartz_plugin import costs
from quartz_plugin.hardware.loihi import LOIHI_1, LoihiChip, LoihiEstimate, LoihiMapping, map_to_loihi

__all__ = ["LOIHI_1", "LoihiChip", "LoihiEstimate", "LoihiMapping", "map_to_loihi"]


def __getattr__(name: str) -> Any:
    """Names that moved to :mod:`quartz_plugin.costs`."""
    if name not in costs.__all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    warnings.warn(f"quartz_plugin.hardware.{name} is now quartz_plugin.costs.{name}", DeprecationWarning, stacklevel=2)
    return getattr(costs, name)
