"""Activations of the ANN beside those of the spiking network."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from quartz_plugin.network import SpikingNetwork
from quartz_plugin.plot.style import INHIBITING, NEUTRAL, check_axes, pyplot
from quartz_plugin.precision import exact_arithmetic
from quartz_plugin.verification import values_side_by_side

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Values = npt.NDArray[np.float64]

POINTS = 200_000
"""At most so many units are counted in one panel of :func:`activations`."""


def activations(
    ann: nn.Module,
    snn: SpikingNetwork,
    images: Tensor,
    axes: Sequence[Axes] | None = None,
    *,
    panels: int = 12,
) -> Sequence[Axes]:
    """Activations of the spiking network against the ANN's, both in the ANN's units, a panel a layer.

    Colour is the number of units, on a log scale that all panels share. Units on the diagonal agree; the dashed
    line, where values lie above it, is the value 1 that held neurons clip at (two lines: the lowest and the highest
    of the channels).

    Parameters
    ----------
    ann : nn.Module
        The network that was converted; not modified.
    snn : SpikingNetwork
        What became of it.
    images : Tensor
        ``[B, ...]``, raw values in [0, 1].
    axes : sequence of Axes, optional
        Where to draw: one for each spiking layer, or `panels` where there are more layers.
    panels : int
        At most so many layers are drawn, evenly picked, the first and the output among them; at least 2.

    Returns
    -------
    sequence of Axes

    Raises
    ------
    ValueError
        If the images do not fit the network, `ann` is another network, the number of axes does not match, or
        `panels` is below 2.
    """
    if panels < 2:
        raise ValueError(f"panels must be at least 2, the first layer and the output, got {panels}")
    layers = [layer.name for layer in snn.graph.layers]
    picked = torch.linspace(0, len(layers) - 1, min(panels, len(layers))).round().long()
    names = [layers[index] for index in picked]
    values = _paired_values(ann, snn, images, names)
    own = axes is None
    if axes is None:
        columns = min(4, len(names))
        rows = math.ceil(len(names) / columns)
        size = (2.3 * columns + 0.8, 2.4 * rows)
        grid = pyplot().subplots(rows, columns, figsize=size, layout="constrained", squeeze=False)[1].flatten()
        for ax in grid[len(names) :]:
            ax.remove()
        axes = list(grid[: len(names)])
    check_axes(axes, names)
    from matplotlib.colors import LogNorm

    norm = LogNorm(1.0, 10.0)
    for ax, (name, (exact, spiking)) in zip(axes, values.items(), strict=True):
        scale = snn.graph.scales[name]
        lowest, highest = float(scale.min()), float(scale.max())
        unit = lowest / snn.windows[name].length if lowest == highest else None
        counts, across, up = np.histogram2d(exact, spiking, _bins(exact, spiking, unit))
        norm.vmax = max(norm.vmax, counts.max())
        mesh = ax.pcolormesh(across, up, np.ma.masked_equal(counts.T, 0), cmap="viridis_r", norm=norm, rasterized=True)
        ax.axline((0, 0), slope=1, color=NEUTRAL, linewidth=0.8)
        low, high = min(across[0], up[0]), max(across[-1], up[-1])
        for sign, furthest in ((1, exact.max()), (-1, -exact.min())):
            for one in {lowest, highest} if furthest > lowest else ():
                ax.axhline(sign * one, color=INHIBITING, linestyle="--", linewidth=0.8)
                ax.text(low, sign * one, f"value {sign}", color=INHIBITING, va="bottom", fontsize=7)
        margin = 0.02 * (high - low)
        limits = low - margin, high + margin
        ax.set(xlim=limits, ylim=limits, aspect="equal")
        ax.set_title(name if name == layers[-1] else f"layer {name}", fontsize=9)
        ax.set_xlabel("ANN", fontsize=8)
        ax.set_ylabel("SNN", fontsize=8)
        ax.locator_params(nbins=4)
        ax.tick_params(labelsize=7)
        ax.spines[["top", "right"]].set_visible(False)
    if own:
        bar = axes[0].figure.colorbar(mesh, ax=axes, aspect=40, pad=0.02)
        bar.set_label("units", fontsize=8)
        bar.ax.tick_params(labelsize=7)
    return axes


@exact_arithmetic()
def _paired_values(
    ann: nn.Module, snn: SpikingNetwork, images: Tensor, names: Collection[str]
) -> dict[str, tuple[Values, Values]]:
    """Layer -> values of its units in the ANN and in the spiking network, at most `POINTS`, evenly picked."""
    found: dict[str, list[Tensor]] = {name: [] for name in names}
    seen = dict.fromkeys(names, 0)
    for name, value, result in values_side_by_side(ann, snn, images):
        if name is None or name not in found:
            continue
        spiking = result.levels(name) * (snn.graph.scales[name].to(value) / result.windows[name].length)
        units = value[0].numel()
        stride = math.ceil(len(images) * units / POINTS)
        # A stride that shares a factor with the layer's shape would meet the same columns or channels for ever.
        while math.gcd(stride, units) > 1:
            stride += 1
        pairs = torch.stack([value.double(), spiking.double()]).flatten(1)
        found[name].append(pairs[:, -seen[name] * units % stride :: stride].cpu())
        seen[name] += len(value)
    return {name: tuple(torch.cat(pairs, 1).numpy()) for name, pairs in found.items()}


def _bins(exact: Values, spiking: Values, unit: float | None) -> tuple[Values, Values]:
    """Bin edges over the ANN's and the spiking network's values: a bin a level, where levels are alike and few."""
    low, high = min(exact.min(), spiking.min()), max(exact.max(), spiking.max())
    plain = np.linspace(low, high if high > low else low + 1.0, 61)
    if unit is None or (high - low) / unit > 60:
        return plain, plain
    levels = np.arange(round(spiking.min() / unit), round(spiking.max() / unit) + 2)
    return plain, (levels - 0.5) * unit
