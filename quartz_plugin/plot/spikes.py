"""Spikes of a simulation: every one of one image, and when each layer fires over many images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from quartz_plugin.coding import NO_SPIKE, Window
from quartz_plugin.engines.result import SimulationResult
from quartz_plugin.graph import INPUT
from quartz_plugin.plot.style import EARLY, EXCITING, ZERO, check_axes, own_axes, plain_ticks, pyplot

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def raster(result: SimulationResult, image: int = 0, ax: Axes | None = None, *, neurons: int = 400) -> Axes:
    """Every spike of one inference, all layers above one another, the windows shaded.

    Parameters
    ----------
    result : SimulationResult
        A simulation with ``record=True``.
    image : int
        Index into the batch.
    ax : Axes, optional
        Where to draw.
    neurons : int
        At most so many units of a layer are drawn, evenly picked; labels give how many there are.

    Returns
    -------
    Axes
    """
    many = len(result.spike_steps) > 10
    between = ",  " if many else "\n"
    ax = own_axes(ax, 8, 0.4 * len(result.spike_steps) if many else 5.5)
    base, ticks, labels = 0.0, [], []
    gap = neurons * 0.15
    for name, all_steps in result.spike_steps.items():
        steps = all_steps[image].flatten().cpu()
        picked = torch.linspace(0, len(steps) - 1, min(len(steps), neurons)).long()
        height = neurons * (0.25 + 0.75 * len(picked) / neurons)
        ax.axvspan(
            *_spiking_steps(result, name),
            *_fraction(base, height, result, neurons, gap),
            color="#000000",
            alpha=0.05,
            lw=0,
        )
        position = base + (torch.arange(len(picked)) + 0.5) / len(picked) * height
        size = max(14.0, min(40.0, 900 / len(picked)))
        for color, chosen in _kinds(steps[picked], result.windows[name]).items():
            ax.scatter(steps[picked][chosen], position[chosen], s=size, marker="|", color=color, linewidths=1.0)
        ticks.append(base + height / 2)
        spikes, units = int((steps != NO_SPIKE).sum()), len(steps)
        labels.append(f"{_title(result, name)}{between}{spikes:,} of {units:,}")
        base += height + gap
    ax.set(
        yticks=ticks, xlabel="step", ylim=(-gap / 2, base - gap / 2), xlim=(-1, result.n_steps),
        title="a tick is a spike: blue a value, grey a zero, orange an early one",
    )  # fmt: skip
    ax.set_yticklabels(labels, fontsize=7 if many else 8)
    ax.title.set_fontsize(10)
    ax.spines[["top", "right"]].set_visible(False)
    return ax


def spike_time_histograms(result: SimulationResult, axes: Sequence[Axes] | None = None) -> Sequence[Axes]:
    """Spike times of each layer, all images of the batch together: a bar a step, the windows shaded.

    Counts are on a log axis: zeros outnumber every other step, and early spikes are few. Beside each layer stands
    the share of its units that did not fire.

    Parameters
    ----------
    result : SimulationResult
        A simulation with ``record=True``.
    axes : sequence of Axes, optional
        Where to draw: one for each entry of ``result.spike_steps``, the input's first.

    Returns
    -------
    sequence of Axes

    Raises
    ------
    ValueError
        If only the output was recorded, or the number of axes does not match.
    """
    result.check_recorded()
    names = list(result.spike_steps)
    if axes is None:
        # A deep network is long, too: its steps must not become thinner than a pixel.
        size = (min(16.0, max(8.0, result.n_steps / 30)), max(3.0, 0.9 + 0.62 * len(names)))
        axes = list(pyplot().subplots(len(names), 1, sharex=True, figsize=size, layout="constrained")[1])
    check_axes(axes, names)
    for ax, name in zip(axes, names, strict=True):
        steps, most = result.spike_steps[name].flatten().cpu(), 0
        for color, chosen in _kinds(steps, result.windows[name]).items():
            when, counts = (found.tolist() for found in steps[chosen].unique(return_counts=True))
            ax.bar(when, counts, width=1.0, color=color, linewidth=0)
            most = max(most, *counts, 0)
        first, last = _spiking_steps(result, name)
        ax.axvspan(first - 0.5, last + 0.5, color="#000000", alpha=0.05, lw=0)
        # A single spike needs a bar that is seen, and a layer that is silent an axis.
        ax.set(yscale="log", xlim=(-1, result.n_steps), ylim=(0.5, 2 * max(5, most)))
        plain_ticks(ax.yaxis, (1.0,), most=3)
        ax.tick_params(labelsize=8)
        ax.set_ylabel(_title(result, name), rotation=0, ha="right", va="center", fontsize=8)
        silent = float((steps == NO_SPIKE).double().mean())
        ax.text(1.01, 0.5, f"{100 * silent:.1f} %\nsilent", transform=ax.transAxes, va="center", fontsize=8)
        ax.spines[["top", "right"]].set_visible(False)
    images = len(result.logits)
    axes[0].set_title(
        f"spikes of {images:,} image{'s' if images > 1 else ''}: blue a value, grey a zero, orange an early one",
        fontsize=10,
    )
    axes[-1].set_xlabel("step", fontsize=8)
    return axes


def _title(result: SimulationResult, name: str) -> str:
    return name if name in (INPUT, result.output) else f"layer {name}"


def _spiking_steps(result: SimulationResult, name: str) -> tuple[int, int]:
    """First and last step at which a layer encodes values, the negative ones of a signed output included."""
    window = result.windows[name]
    return window.start, window.end + (window.length if name == result.output and result.signed_output else 0)


def _kinds(steps: Tensor, window: Window) -> dict[str, Tensor]:
    """Colour -> which of these spikes have it: zeros, values, early spikes. No step can hold two kinds."""
    zero = steps == window.end
    early = (steps != NO_SPIKE) & (steps < window.start)
    return {ZERO: zero, EXCITING: (steps != NO_SPIKE) & ~zero & ~early, EARLY: early}


def _fraction(base: float, height: float, result: SimulationResult, neurons: int, gap: float) -> tuple[float, float]:
    """Lower and upper end of a layer's band, as shares of the axis."""
    heights = [
        neurons * (0.25 + 0.75 * min(steps[0].numel(), neurons) / neurons) for steps in result.spike_steps.values()
    ]
    total = sum(heights) + gap * len(heights)
    return (base + gap / 2) / total, (base + height + gap / 2) / total
