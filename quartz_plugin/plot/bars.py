"""Bars: energy-delay products, cores and counts by layer."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import cycle
from typing import TYPE_CHECKING

from quartz_plugin.plot.style import EXCITING, NEUTRAL, PALETTE, own_axes, plain_ticks, short_number

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def energy_delay_bars(products: Mapping[str, float], ax: Axes | None = None) -> Axes:
    """Energy-delay products as bars on a log axis, in uJs, the first on top.

    Parameters
    ----------
    products : dict
        What is compared -> its energy-delay product in joule-seconds.
    ax : Axes, optional
        Where to draw.

    Returns
    -------
    Axes

    Raises
    ------
    ValueError
        If there is nothing to draw, or a product is not a positive number.
    """
    wrong = {name: value for name, value in products.items() if not 0 < value < math.inf}
    if wrong:
        raise ValueError(f"energy-delay products must be positive, got {wrong}")
    values = {name: 1e6 * value for name, value in products.items()}
    ax = _bars(values, ax, "energy-delay product (uJs)", [EXCITING] * len(values))
    smallest, largest = min(values.values()), max(values.values())
    left = 10.0 ** math.floor(math.log10(smallest / 2))
    ax.set(xscale="log", xlim=(left, largest * (largest / left) ** 0.12))
    plain_ticks(ax.xaxis, (1.0,))
    return ax


def cores_per_layer(
    cores: Mapping[str, int], ax: Axes | None = None, *, binding: Mapping[str, str] | None = None
) -> Axes:
    """Cores that each layer takes as bars, the first layer on top, coloured by the limit that makes it so many.

    Parameters
    ----------
    cores : dict
        Layer -> number of cores.
    ax : Axes, optional
        Where to draw.
    binding : dict, optional
        Layer -> the limit that binds; layers it does not name stay grey.

    Returns
    -------
    Axes

    Raises
    ------
    ValueError
        If there are no layers, or `binding` names one that `cores` does not.
    """
    limits = dict(binding or {})
    unknown = [layer for layer in limits if layer not in cores]
    if unknown:
        raise ValueError(f"binding names layers that cores does not: {unknown}")
    color_of = dict(
        zip(dict.fromkeys(limits[layer] for layer in cores if layer in limits), cycle(PALETTE), strict=False)
    )
    colors = [color_of[limits[layer]] if layer in limits else NEUTRAL for layer in cores]
    ax = _bars(cores, ax, "cores", colors)
    ax.locator_params(axis="x", integer=True)
    if color_of:
        handles = [ax.barh(0, 0, color=color, label=limit) for limit, color in color_of.items()]
        ax.legend(handles=handles, title="what binds", title_fontsize=8, fontsize=8, frameon=False)
    return ax


def counts_per_layer(counts: Mapping[str, float], ax: Axes | None = None, *, quantity: str = "") -> Axes:
    """Any count by layer as bars, the first layer on top, the number at each bar.

    Parameters
    ----------
    counts : dict
        Layer -> its number: spikes, synaptic operations, neurons.
    ax : Axes, optional
        Where to draw.
    quantity : str
        What is counted, for the axis.

    Returns
    -------
    Axes

    Raises
    ------
    ValueError
        If there are no layers.
    """
    return _bars(counts, ax, quantity, [EXCITING] * len(counts))


def _bars(values: Mapping[str, float], ax: Axes | None, label: str, colors: Sequence[str]) -> Axes:
    """Horizontal bars with their numbers, the first on top; a figure of its own grows with them."""
    if not values:
        raise ValueError("there is nothing to draw a bar for")
    ax = own_axes(ax, 6.5, 0.8 + 0.24 * max(3, len(values)))
    drawn = ax.barh(range(len(values)), list(values.values()), height=0.7, color=colors)
    ax.bar_label(drawn, [_digits(value) for value in values.values()], padding=3, fontsize=8)
    ax.set_yticks(range(len(values)), labels=list(values))
    ax.set(ylim=(len(values) - 0.4, -0.6))
    ax.set_xlabel(label, fontsize=9)
    ax.xaxis.set_major_formatter(short_number)
    ax.tick_params(labelsize=8)
    ax.tick_params(axis="y", length=0)
    ax.margins(x=0.12)
    ax.set_xlim(left=0)
    ax.spines[["top", "right"]].set_visible(False)
    return ax


def _digits(value: float) -> str:
    """A number at a bar: three significant digits, and all those before the point."""
    return f"{value:,.0f}" if abs(value) >= 99.5 else f"{value:.3g}"
