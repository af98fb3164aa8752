"""Pictures: what one neuron does, and the spikes of all layers. Needs matplotlib (extra ``plot``)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from quartz_plugin.coding import NO_SPIKE
from quartz_plugin.engines.result import SimulationResult
from quartz_plugin.engines.stepped import walk_layer
from quartz_plugin.hardware.operations import source_levels
from quartz_plugin.network import SpikingNetwork

if TYPE_CHECKING:
    from matplotlib.axes import Axes

EXCITING, INHIBITING, NEUTRAL, MARK = "#0072b2", "#d55e00", "#555555", "#009e73"


def chronogram(
    snn: SpikingNetwork,
    image: Tensor,
    layer: str | None = None,
    neuron: int | None = None,
    axes: Sequence[Axes] | None = None,
) -> Sequence[Axes]:
    """One neuron over its whole inference: input spikes, current, membrane, threshold, readout, rectifier.

    Parameters
    ----------
    snn : SpikingNetwork
        The network.
    image : Tensor
        One input, ``[...]`` or ``[1, ...]``.
    layer : str, optional
        Name of a spiking layer; the first by default.
    neuron : int, optional
        Index into the flattened layer; by default one that says about one half.
    axes : three Axes, optional
        Where to draw: input spikes, current, membrane.

    Returns
    -------
    three Axes

    Raises
    ------
    ValueError
        For a layer the network does not have, or an index outside it.
    """
    graph = snn.graph
    names = [each.name for each in graph.layers]
    layer = names[0] if layer is None else layer
    if layer not in names:
        raise ValueError(f"layer must be one of {names}, got {layer!r}")
    image = image if image.dim() == len(graph.input_shape) + 1 else image.unsqueeze(0)
    result = snn.run(image[:1], engine="stepped")
    steps = result.spike_steps[layer].flatten()
    if neuron is None:
        halfway = result.windows[layer].step_of(result.windows[layer].length // 2)
        neuron = int((steps - halfway).abs().argmin())
    if not 0 <= neuron < len(steps):
        raise ValueError(f"layer {layer!r} has {len(steps)} neurons, no neuron {neuron}")

    chosen = graph.layers[names.index(layer)]
    levels = {s: v for s, v in source_levels(graph, result).items() if s in chosen.projection.sources}
    clock = chosen.neuron.clock
    times, current, membrane = [], [], []
    for step, _, state in walk_layer(chosen, levels):
        times.append(step)
        current.append(float(state.i.flatten()[neuron]))
        membrane.append(float(state.v.flatten()[neuron]))

    if axes is None:
        axes = _pyplot().subplots(
            3, 1, sharex=True, figsize=(7, 5.5), height_ratios=(1.4, 1, 1.6), layout="constrained"
        )[1]
    spikes_ax, current_ax, membrane_ax = axes
    row = zeros = 0
    for source in chosen.projection.sources:
        weights = _weights_onto(chosen.projection, source, levels, neuron)
        zeros += int(((weights != 0) & (levels[source].flatten() == 0)).sum())
        arriving = (weights != 0) & (levels[source].flatten() > 0)
        order = weights[arriving].argsort()
        when = [clock.readout - int(level) for level in levels[source].flatten()[arriving][order]]
        for step, weight in zip(when, weights[arriving][order].tolist(), strict=True):
            spikes_ax.plot(step, row, "|", color=EXCITING if weight > 0 else INHIBITING, markersize=6, mew=1.5)
            row += 1
    spikes_ax.set(ylabel="input spikes\n(blue: excite,\norange: inhibit)", yticks=[], ylim=(-1, max(row, 1)))
    if zeros:
        note = f"{zeros} spikes\nthat say 0"
        spikes_ax.text(clock.readout, 0.02, note, transform=spikes_ax.get_xaxis_transform(), fontsize=8)
    current_ax.step(times, current, where="post", color=NEUTRAL)
    current_ax.set(ylabel="current i")
    membrane_ax.step(times, membrane, where="post", color=NEUTRAL)
    membrane_ax.axhline(clock.threshold, color=INHIBITING, linestyle="--", linewidth=1)
    membrane_ax.text(times[0], clock.threshold, " threshold", color=INHIBITING, va="bottom", fontsize=8)
    fired = int(steps[neuron])
    if fired != NO_SPIKE:
        membrane_ax.plot(fired, membrane[times.index(fired)], "o", color=MARK)
        level = result.windows[layer].level_at(fired)
        membrane_ax.annotate(
            f"spike: {level}/{clock.window}", (fired, membrane[times.index(fired)]), color=MARK, fontsize=8,
            xytext=(6, -12), textcoords="offset points",
        )  # fmt: skip
    membrane_ax.set(ylabel="membrane v", xlabel="step")
    events = [(clock.readout, "readout")]
    if chosen.neuron.p.rectifier is not None:
        events.append((clock.rectify, "rectifier"))
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
        for step, _ in events:
            ax.axvline(step, color=NEUTRAL, linestyle=":", linewidth=1)
    for step, name in events:
        spikes_ax.text(step, 1.0, name, transform=spikes_ax.get_xaxis_transform(), ha="center", va="bottom", fontsize=8)
    spikes_ax.set_title(f"layer {layer}, neuron {neuron}", loc="left", fontsize=10, pad=16)
    return axes


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
        At most so many units of a layer are drawn, evenly picked; labels tell how many there are.

    Returns
    -------
    Axes
    """
    if ax is None:
        ax = _pyplot().subplots(figsize=(8, 5.5), layout="constrained")[1]
    base, ticks, labels = 0.0, [], []
    gap = neurons * 0.15
    for name, all_steps in result.spike_steps.items():
        steps = all_steps[image].flatten().cpu()
        picked = torch.linspace(0, len(steps) - 1, min(len(steps), neurons)).long()
        height = neurons * (0.25 + 0.75 * len(picked) / neurons)
        window = result.windows[name]
        end = window.end + (window.length if name == result.output and result.signed_output else 0)
        ax.axvspan(
            window.start,
            end,
            *_fraction(base, height, result, neurons, gap),
            color="#000000",
            alpha=0.05,
            lw=0,
        )
        position = base + (torch.arange(len(picked)) + 0.5) / len(picked) * height
        fired = steps[picked] != NO_SPIKE
        zero = steps[picked] == window.end
        early = fired & (steps[picked] < window.start)
        plain = fired & ~early & ~zero
        size = max(14.0, min(40.0, 900 / len(picked)))
        for chosen, color in ((zero & ~early, "#bbbbbb"), (plain, EXCITING), (early, INHIBITING)):
            ax.scatter(steps[picked][chosen], position[chosen], s=size, marker="|", color=color, linewidths=1.0)
        ticks.append(base + height / 2)
        spikes, units = int((steps != NO_SPIKE).sum()), len(steps)
        labels.append(f"{name if name in ('input', result.output) else f'layer {name}'}\n{spikes:,} of {units:,}")
        base += height + gap
    ax.set(
        yticks=ticks, xlabel="step", ylim=(-gap / 2, base - gap / 2), xlim=(-1, result.n_steps),
        title="a tick is a spike: blue a value, grey a zero, orange an early one",
    )  # fmt: skip
    ax.set_yticklabels(labels, fontsize=8)
    ax.title.set_fontsize(10)
    ax.spines[["top", "right"]].set_visible(False)
    return ax


def _fraction(base: float, height: float, result: SimulationResult, neurons: int, gap: float) -> tuple[float, float]:
    """Lower and upper end of a layer's band, as shares of the axis."""
    heights = [
        neurons * (0.25 + 0.75 * min(steps[0].numel(), neurons) / neurons) for steps in result.spike_steps.values()
    ]
    total = sum(heights) + gap * len(heights)
    return (base + gap / 2) / total, (base + height + gap / 2) / total


def _weights_onto(projection: Any, source: Any, levels: dict[Any, Tensor], neuron: int) -> Tensor:
    """Weights from every unit of a source onto one neuron: the projection is linear, so its gradient is these."""
    with torch.enable_grad():
        inputs = {s: torch.zeros_like(v, requires_grad=s is source) for s, v in levels.items()}
        projection(inputs).flatten()[neuron].backward()
    gradient = inputs[source].grad
    assert gradient is not None
    return gradient.flatten()


def _pyplot() -> Any:
    try:
        from matplotlib import pyplot
    except ImportError as error:
        raise ImportError("quartz_plugin.plot needs matplotlib: pip install 'quartz_plugin[plot]'") from error
    return pyplot
