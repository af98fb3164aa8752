"""Colours, axes and numbers that all pictures share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis

EXCITING, INHIBITING, NEUTRAL, MARK = "#0072b2", "#d55e00", "#555555", "#009e73"
ZERO, EARLY = "#bbbbbb", INHIBITING
PALETTE = (EXCITING, INHIBITING, MARK, "#cc79a7", "#e69f00", "#56b4e9", "#000000")
"""Okabe and Ito's colours, for what has no colour of its own."""
PUBLISHED = ("#222222", "#8a7460", "#5f7a94")
"""Dark and nearly grey: what others published, beside our own colours."""


def pyplot() -> Any:
    """Return matplotlib's pyplot; ImportError that names the extra where it is not installed."""
    try:
        from matplotlib import pyplot
    except ImportError as error:
        raise ImportError("quartz_plugin.plot needs matplotlib: pip install 'quartz_plugin[plot]'") from error
    return pyplot


def own_axes(ax: Axes | None, width: float, height: float) -> Axes:
    """Return the given axes, or those of a new figure of this size in inches."""
    if ax is not None:
        return ax
    new: Axes = pyplot().subplots(figsize=(width, height), layout="constrained")[1]
    return new


def check_axes(axes: Sequence[Axes], names: Sequence[str]) -> None:
    """Raise ValueError where there is not an axis for each name."""
    if len(axes) != len(names):
        raise ValueError(f"axes must be {len(names)}, one for each of {list(names)}, got {len(axes)}")


def log_scale(set_scale: Callable[..., None], axis: Axis, values: Sequence[float]) -> None:
    """A log axis with plain numbers; where there are zeros, linear from 0 to the smallest positive value."""
    positive = [value for value in values if value > 0]
    if len(positive) == len(values):
        set_scale("log")
        plain_ticks(axis, (1.0, 2.0, 5.0))
        return
    from matplotlib.ticker import FixedLocator, LogLocator

    lowest, highest = min(positive, default=1.0), max(positive, default=1.0)
    set_scale("symlog", linthresh=lowest)
    ticks = LogLocator(subs=(1.0, 2.0, 5.0)).tick_values(lowest, highest)
    axis.set_major_locator(FixedLocator([0.0, *(float(tick) for tick in ticks if tick >= lowest)]))
    axis.set_major_formatter(short_number)


def plain_ticks(axis: Axis, subs: Sequence[float], most: int | None = None) -> None:
    """Plain numbers at these multiples of the powers of ten of a log axis."""
    from matplotlib.ticker import LogLocator, NullLocator

    axis.set_major_locator(LogLocator(subs=subs, numticks=most))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(short_number)


def short_number(value: float, _position: float | None = None) -> str:
    """A number on an axis: 0.5, 200, 20 k, 7 M."""
    from matplotlib.ticker import EngFormatter

    return EngFormatter()(value) if abs(value) >= 1000 else f"{value:g}"
