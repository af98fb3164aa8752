"""One neuron over its whole inference."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from quartz_plugin.coding import NO_SPIKE, Window
from quartz_plugin.costs.counts import source_levels
from quartz_plugin.engines.stepped import walk_layer
from quartz_plugin.graph import Layer
from quartz_plugin.network import SpikingNetwork
from quartz_plugin.plot.style import EXCITING, INHIBITING, MARK, NEUTRAL, pyplot

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass(frozen=True)
class _Trace:
    """One neuron's state after each step, and what it receives."""

    name: str
    layer: Layer
    neuron: int
    steps: list[int]
    current: list[float]
    membrane: list[float]
    levels: Mapping[Any, Tensor]
    fired: int
    window: Window


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
        Index into the flattened layer; by default one that encodes about one half.
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
    trace = _record(snn, image, layer, neuron)
    if axes is None:
        axes = pyplot().subplots(
            3, 1, sharex=True, figsize=(7, 5.5), height_ratios=(1.4, 1, 1.6), layout="constrained"
        )[1]
    spikes_ax, current_ax, membrane_ax = axes
    _draw_inputs(trace, spikes_ax)
    current_ax.step(trace.steps, trace.current, where="post", color=NEUTRAL)
    current_ax.set(ylabel="current i")
    _draw_membrane(trace, membrane_ax)
    _mark_events(trace, axes)
    spikes_ax.set_title(f"layer {trace.name}, neuron {trace.neuron}", loc="left", fontsize=10, pad=16)
    return axes


def _record(snn: SpikingNetwork, image: Tensor, name: str | None, neuron: int | None) -> _Trace:
    """Step the layer of a neuron, and keep the neuron's current and membrane."""
    graph = snn.graph
    names = [each.name for each in graph.layers]
    name = names[0] if name is None else name
    if name not in names:
        raise ValueError(f"layer must be one of {names}, got {name!r}")
    if isinstance(image, Tensor):
        image = image[:1] if image.dim() == len(graph.image_shape) + 1 else image.unsqueeze(0)
    result = snn.run(image, engine="stepped")
    steps, window = result.spike_steps[name].flatten(), result.windows[name]
    if neuron is None:
        neuron = int((steps - window.step_of(window.length // 2)).abs().argmin())
    if not 0 <= neuron < len(steps):
        raise ValueError(f"layer {name!r} has {len(steps)} neurons, no neuron {neuron}")
    layer = graph.layers[names.index(name)]
    levels = {s: v for s, v in source_levels(graph, result).items() if s in layer.projection.sources}
    states = [
        (step, float(state.i.flatten()[neuron]), float(state.v.flatten()[neuron]))
        for step, _, state in walk_layer(layer, levels)
    ]
    times, current, membrane = (list(column) for column in zip(*states, strict=True))
    return _Trace(name, layer, neuron, times, current, membrane, levels, int(steps[neuron]), window)


def _draw_inputs(trace: _Trace, ax: Axes) -> None:
    """A tick for each spike that arrives, heaviest weight on top; spikes encoding zero are only counted."""
    readout = trace.layer.neuron.clock.readout
    row = zeros = 0
    for source in trace.layer.projection.sources:
        weights = _weights_onto(trace.layer.projection, source, trace.levels, trace.neuron)
        levels = trace.levels[source].flatten()
        zeros += int(((weights != 0) & (levels == 0)).sum())
        arriving = (weights != 0) & (levels > 0)
        order = weights[arriving].argsort()
        for level, weight in zip(levels[arriving][order].tolist(), weights[arriving][order].tolist(), strict=True):
            color = EXCITING if weight > 0 else INHIBITING
            ax.plot(readout - int(level), row, "|", color=color, markersize=6, mew=1.5)
            row += 1
    ax.set(ylabel="input spikes\n(blue: excite,\norange: inhibit)", yticks=[], ylim=(-1, max(row, 1)))
    if zeros:
        ax.text(readout, 0.02, f"{zeros} spikes\nencoding 0", transform=ax.get_xaxis_transform(), fontsize=8)


def _draw_membrane(trace: _Trace, ax: Axes) -> None:
    """The membrane, its threshold, and the spike with its level."""
    clock = trace.layer.neuron.clock
    ax.step(trace.steps, trace.membrane, where="post", color=NEUTRAL)
    ax.axhline(clock.threshold, color=INHIBITING, linestyle="--", linewidth=1)
    ax.text(trace.steps[0], clock.threshold, " threshold", color=INHIBITING, va="bottom", fontsize=8)
    if trace.fired != NO_SPIKE:
        spike = trace.fired, trace.membrane[trace.steps.index(trace.fired)]
        ax.plot(*spike, "o", color=MARK)
        ax.annotate(
            f"spike: {trace.window.level_at(trace.fired)}/{clock.window}", spike, color=MARK, fontsize=8,
            xytext=(6, -12), textcoords="offset points",
        )  # fmt: skip
    ax.set(ylabel="membrane v", xlabel="step")


def _mark_events(trace: _Trace, axes: Sequence[Axes]) -> None:
    """Readout and rectifier, across all axes."""
    neuron = trace.layer.neuron
    events = [(neuron.clock.readout, "readout")]
    if neuron.p.rectifier is not None:
        events.append((neuron.clock.rectify, "rectifier"))
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
        for step, _ in events:
            ax.axvline(step, color=NEUTRAL, linestyle=":", linewidth=1)
    top = axes[0]
    for step, name in events:
        top.text(step, 1.0, name, transform=top.get_xaxis_transform(), ha="center", va="bottom", fontsize=8)


def _weights_onto(projection: Any, source: Any, levels: Mapping[Any, Tensor], neuron: int) -> Tensor:
    """Weights from every unit of a source onto one neuron: the projection is linear, so its gradient is these."""
    with torch.enable_grad():
        inputs = {s: torch.zeros_like(v, requires_grad=s is source) for s, v in levels.items()}
        projection(inputs).flatten()[neuron].backward()
    gradient = inputs[source].grad
    assert gradient is not None
    return gradient.flatten()
