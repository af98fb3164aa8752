"""Pictures of spikes, of activations beside the ANN's, of accuracy against cost, and of costs by layer.

Needs matplotlib (extra ``plot``).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from itertools import cycle
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from quartz_plugin.coding import NO_SPIKE, Window
from quartz_plugin.costs.counts import source_levels
from quartz_plugin.engines.result import SimulationResult
from quartz_plugin.engines.stepped import walk_layer
from quartz_plugin.graph import INPUT
from quartz_plugin.network import SpikingNetwork
from quartz_plugin.precision import exact_arithmetic
from quartz_plugin.tables import printable
from quartz_plugin.verification import values_side_by_side

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis

Values = npt.NDArray[np.float64]

EXCITING, INHIBITING, NEUTRAL, MARK = "#0072b2", "#d55e00", "#555555", "#009e73"
ZERO, EARLY = "#bbbbbb", INHIBITING
PALETTE = (EXCITING, INHIBITING, MARK, "#cc79a7", "#e69f00", "#56b4e9", "#000000")
"""Okabe and Ito's colours, for what has no colour of its own."""
PUBLISHED = ("#222222", "#8a7460", "#5f7a94")
"""Dark and nearly grey: what others published, beside our own colours."""

POINTS = 200_000
"""At most so many units are counted in one panel of :func:`activations`."""

OPTIONS = ("calibration_method", "hold", "bias", "rectifier", "percentile", "output_percentile", "granularity")
"""Columns of a sweep that are options of ``convert``: :func:`error_curves` draws a line for each combination."""

COLUMNS: dict[str, tuple[str, float]] = {
    "t_max": ("T_max", 1.0),
    "steps": ("steps an inference", 1.0),
    "decision_steps": ("steps until the first output spike", 1.0),
    "spikes": ("spikes an inference, the input's included", 1.0),
    "zero_spikes": ("spikes an inference that say zero", 1.0),
    "synops": ("synaptic operations an inference (spikes x synapses)", 1.0),
    "synops_merged": ("synaptic operations an inference (merged)", 1.0),
    "operations": ("operations an inference (merged + 2 N T)", 1.0),
    "operations_strict": ("operations an inference (spikes x synapses + 2 N T)", 1.0),
    "energy_loihi": ("energy an inference, Loihi 1 (uJ)", 1e6),
    "energy_45nm_float32": ("energy an inference, 45 nm, float32 arithmetic (uJ)", 1e6),
    "energy_45nm_int8": ("energy an inference, 45 nm, 8-bit arithmetic (uJ)", 1e6),
    "energy_paper": ("energy an inference, relative, of merged + 2 N T operations", 1.0),
    "energy_paper_strict": ("energy an inference, relative, of spikes x synapses + 2 N T operations", 1.0),
}
"""Column of a sweep -> what its axis is called, and what its values are multiplied by."""


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
    many = len(result.spike_steps) > 10
    between = ",  " if many else "\n"
    ax = _own(ax, 8, 0.4 * len(result.spike_steps) if many else 5.5)
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
    """When each layer's units fire, all images of the batch together: a bar a step, the windows shaded.

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
        axes = list(_pyplot().subplots(len(names), 1, sharex=True, figsize=size, layout="constrained")[1])
    _check_axes(axes, names)
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
        _plain_ticks(ax.yaxis, (1.0,), most=3)
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


def activations(
    ann: nn.Module,
    snn: SpikingNetwork,
    images: Tensor,
    axes: Sequence[Axes] | None = None,
    *,
    panels: int = 12,
) -> Sequence[Axes]:
    """What the ANN's units say against what the spiking network's say, both in the ANN's units, a panel a layer.

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
        grid = _pyplot().subplots(rows, columns, figsize=size, layout="constrained", squeeze=False)[1].flatten()
        for ax in grid[len(names) :]:
            ax.remove()
        axes = list(grid[: len(names)])
    _check_axes(axes, names)
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


def error_curves(
    rows: Sequence[Mapping[str, Any]],
    x: str = "t_max",
    ax: Axes | None = None,
    *,
    ann_accuracy: float | None = None,
    published: Mapping[str, Sequence[Mapping[str, Any]]] | None = None,
) -> Axes:
    """Error against what it costs: a line for each combination of the options that vary, a point a row.

    Both axes are logarithmic where all values allow it; an error of 0 stands at the foot of the axis. Where `x` is
    not ``t_max``, the number at a point is its T.

    Parameters
    ----------
    rows : sequence of mappings
        A sweep's: from ``csv.DictReader`` or from memory, with the columns `x` and ``accuracy`` (a share), and
        ``t_max`` and :data:`OPTIONS` as far as there are any. Rows without a value in either column are left out.
    x : str
        A column of numbers: ``t_max``, ``operations``, ``synops``, ``energy_loihi`` (joules), or any other.
    ax : Axes, optional
        Where to draw.
    ann_accuracy : float, optional
        Accuracy of the ANN, a share; its error becomes a dashed line.
    published : dict, optional
        Name of a publication -> its rows, of the same columns in the same units: ``t_max`` in steps, ``accuracy`` as
        a share, and whatever else it tells, such as ``operations`` an inference or ``energy_loihi`` in joules. Each
        becomes one dotted line with stars, its options unread. A row without ``t_max`` is the publication's own ANN:
        a thin dotted line across. Rows without a value in `x` are left out, and so is a publication, its ANN
        included, of which no point remains.

    Returns
    -------
    Axes

    Raises
    ------
    ValueError
        If there are no rows, a column is missing or not of numbers, or an accuracy lies outside [0, 1].
    """
    if not rows:
        raise ValueError("there are no rows to draw")
    usable = [
        (row, value, accuracy)
        for row in rows
        if (value := _number(row, x)) is not None and (accuracy := _number(row, "accuracy")) is not None
    ]
    if not usable:
        absent = [column for column in (x, "accuracy") if all(_number(row, column) is None for row in rows)]
        wanted = " and ".join(map(repr, absent or (x, "accuracy")))
        raise ValueError(f"no row has a value in {wanted}; columns are {list(rows[0])}")
    name, factor = COLUMNS.get(x, (x, 1.0))
    # An option on the axis leaves T to tell the lines apart; a cost on the axis follows from T.
    options = [option for option in (*OPTIONS, *(["t_max"] if x in OPTIONS else [])) if option != x]
    along_t = x not in ("t_max", *OPTIONS)
    varying = [option for option in options if len({_text(row, option) for row, *_ in usable}) > 1]
    lines: dict[tuple[str, ...], list[tuple[float, float, float]]] = {}
    for row, value, accuracy in usable:
        t_max = (_number(row, "t_max") or 0.0) if along_t else 0.0
        line = lines.setdefault(tuple(_text(row, option) for option in varying), [])
        line.append((t_max, value * factor, _error(accuracy)))

    theirs: dict[str, list[tuple[float, float, float]]] = {}
    their_anns: dict[str, list[float]] = {}
    for publication, its_rows in (published or {}).items():
        points, anns = _published_points(its_rows, x, factor)
        if points:
            theirs[publication], their_anns[publication] = points, anns

    place: dict[str, Any] = {} if ax is not None else {"loc": "lower left", "bbox_to_anchor": (0, 1), "ncols": 2}
    ax = _own(ax, 6.5, 4.6)
    # Lines may lie on each other: dashes and open markers let the lower one show, corners keep its numbers apart.
    corners = cycle((("left", "bottom"), ("right", "top"), ("left", "top"), ("right", "bottom")))
    styles = zip(cycle(PALETTE), cycle("os^Dv"), cycle(("-", "--", "-.")), strict=False)
    for (values, points), (color, marker, dashes) in zip(lines.items(), styles, strict=False):
        label = ", ".join(filter(None, map(_said, varying, values))) or "spiking network"
        _error_curve(
            ax, points, next(corners), label=label, color=color,
            marker=marker, linestyle=dashes, markersize=5, markerfacecolor="none",
        )  # fmt: skip
    drawn = [point for points in (*lines.values(), *theirs.values()) for point in points]
    errors = [error for *_, error in drawn]
    if ann_accuracy is not None:
        errors.append(_error(ann_accuracy))
        ax.axhline(errors[-1], color=NEUTRAL, linestyle="--", linewidth=1, label=f"ANN, {errors[-1]:.3g} %")
    # Colours and markers have other periods: none comes with the same partner soon.
    for (publication, points), color, marker in zip(theirs.items(), cycle(PUBLISHED), cycle("*PdX"), strict=False):
        # Filled, they lie below our open markers, which they would hide.
        _error_curve(
            ax, points, next(corners), label=publication, color=color,
            marker=marker, linestyle=":", markersize=8, zorder=1.9,
        )  # fmt: skip
        for error in their_anns[publication]:
            errors.append(error)
            label = f"{publication}, ANN, {error:.3g} %"
            ax.axhline(error, color=color, linestyle=":", linewidth=0.8, zorder=1.9, label=label)
    _log_scale(ax.set_yscale, ax.yaxis, errors)
    places = sorted({value for _, value, _ in drawn})
    if x == "t_max":
        ax.set_xscale("log", base=2)
        ax.set_xticks(places, labels=[_short(t_max) for t_max in places])
        ax.minorticks_off()
    else:
        _log_scale(ax.set_xscale, ax.xaxis, places)
    ax.set_xlabel(name, fontsize=9)
    ax.set_ylabel("error (%)", fontsize=9)
    ax.tick_params(which="both", labelsize=8)
    numbered = any(t_max for t_max, *_ in drawn)
    ax.legend(
        fontsize=8, title_fontsize=8, frameon=False, title="numbers at the points: T_max" if numbered else None,
        alignment="left", **place,
    )  # fmt: skip
    ax.spines[["top", "right"]].set_visible(False)
    return ax


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
    _plain_ticks(ax.xaxis, (1.0,))
    return ax


def cores_per_layer(
    cores: Mapping[str, int], ax: Axes | None = None, *, binding: Mapping[str, str] | None = None
) -> Axes:
    """Cores that each layer takes as bars, the first layer on top, coloured by the limit that asks for so many.

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
    ax = _own(ax, 6.5, 0.8 + 0.24 * max(3, len(values)))
    drawn = ax.barh(range(len(values)), list(values.values()), height=0.7, color=colors)
    ax.bar_label(drawn, [_digits(value) for value in values.values()], padding=3, fontsize=8)
    ax.set_yticks(range(len(values)), labels=list(values))
    ax.set(ylim=(len(values) - 0.4, -0.6))
    ax.set_xlabel(label, fontsize=9)
    ax.xaxis.set_major_formatter(_short)
    ax.tick_params(labelsize=8)
    ax.tick_params(axis="y", length=0)
    ax.margins(x=0.12)
    ax.set_xlim(left=0)
    ax.spines[["top", "right"]].set_visible(False)
    return ax


def _published_points(
    rows: Sequence[Mapping[str, Any]], x: str, factor: float
) -> tuple[list[tuple[float, float, float]], list[float]]:
    """A publication's points as (T to write, x, error in %), and the errors of its own ANNs: the rows without T."""
    points, anns = [], []
    for row in rows:
        t_max, value, accuracy = _number(row, "t_max"), _number(row, x), _number(row, "accuracy")
        if accuracy is None:
            continue
        if t_max is None:
            anns.append(_error(accuracy))
        elif value is not None:
            points.append((0.0 if x == "t_max" else t_max, value * factor, _error(accuracy)))
    return points, anns


def _error_curve(
    ax: Axes, points: Sequence[tuple[float, float, float]], corner: tuple[str, str], *, color: str, **look: Any
) -> None:
    """One line through points (T, x, error), by rising T, and the T, where there is one, at this corner of each."""
    from matplotlib.patheffects import withStroke

    points = sorted(points)
    ax.plot([value for _, value, _ in points], [error for *_, error in points], color=color, linewidth=1.3, **look)
    side, edge = corner
    away = 4 if side == "left" else -4, 3 if edge == "bottom" else -3
    for t_max, value, error in points:
        if t_max:
            ax.annotate(
                f"{t_max:g}", (value, error), xytext=away, textcoords="offset points", ha=side, va=edge,
                color=color, fontsize=7, path_effects=[withStroke(linewidth=2, foreground="white")],
            )  # fmt: skip


def _own(ax: Axes | None, width: float, height: float) -> Axes:
    """Return the given axes, or those of a new figure of this size in inches."""
    if ax is not None:
        return ax
    new: Axes = _pyplot().subplots(figsize=(width, height), layout="constrained")[1]
    return new


def _check_axes(axes: Sequence[Axes], names: Sequence[str]) -> None:
    if len(axes) != len(names):
        raise ValueError(f"axes must be {len(names)}, one for each of {list(names)}, got {len(axes)}")


def _title(result: SimulationResult, name: str) -> str:
    return name if name in (INPUT, result.output) else f"layer {name}"


def _spiking_steps(result: SimulationResult, name: str) -> tuple[int, int]:
    """First and last step at which a layer says values, the negative ones of a signed output included."""
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


def _weights_onto(projection: Any, source: Any, levels: dict[Any, Tensor], neuron: int) -> Tensor:
    """Weights from every unit of a source onto one neuron: the projection is linear, so its gradient is these."""
    with torch.enable_grad():
        inputs = {s: torch.zeros_like(v, requires_grad=s is source) for s, v in levels.items()}
        projection(inputs).flatten()[neuron].backward()
    gradient = inputs[source].grad
    assert gradient is not None
    return gradient.flatten()


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


def _number(row: Mapping[str, Any], column: str) -> float | None:
    """The number in a column; None where there is none."""
    value = row.get(column)
    if str(value).strip() in ("", "None"):
        return None
    try:
        number = float(str(value) if isinstance(value, bool) else value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        number = math.inf
    if math.isinf(number):
        raise ValueError(f"column {column!r} must hold numbers, got {printable(repr(value))[:80]}")
    return None if math.isnan(number) else number


def _text(row: Mapping[str, Any], column: str) -> str:
    """A column's value, spelled alike whether it comes from a file or from memory."""
    text = str(row.get(column, "")).strip()
    try:
        return f"{float(text):.10g}"
    except ValueError:
        return text.capitalize() if text.lower() in ("true", "false", "none") else text


def _said(option: str, value: str) -> str:
    """An option and its value in words."""
    if value in ("", "None"):
        return ""
    if option == "hold":
        return {"True": "hold", "False": "no hold"}.get(value, f"hold {value}")
    return f"T = {value}" if option == "t_max" else f"{option.replace('_', ' ')} {value}"


def _error(accuracy: float) -> float:
    """Error in %."""
    if not 0 <= accuracy <= 1:
        raise ValueError(f"accuracy must be a share in [0, 1], got {accuracy:g}")
    return 100 - 100 * accuracy


def _log_scale(set_scale: Callable[..., None], axis: Axis, values: Sequence[float]) -> None:
    """A log axis with plain numbers; where there are zeros, linear from 0 to the smallest positive value."""
    positive = [value for value in values if value > 0]
    if len(positive) == len(values):
        set_scale("log")
        _plain_ticks(axis, (1.0, 2.0, 5.0))
        return
    from matplotlib.ticker import FixedLocator, LogLocator

    lowest, highest = min(positive, default=1.0), max(positive, default=1.0)
    set_scale("symlog", linthresh=lowest)
    ticks = LogLocator(subs=(1.0, 2.0, 5.0)).tick_values(lowest, highest)
    axis.set_major_locator(FixedLocator([0.0, *(float(tick) for tick in ticks if tick >= lowest)]))
    axis.set_major_formatter(_short)


def _plain_ticks(axis: Axis, subs: Sequence[float], most: int | None = None) -> None:
    """Plain numbers at these multiples of the powers of ten of a log axis."""
    from matplotlib.ticker import LogLocator, NullLocator

    axis.set_major_locator(LogLocator(subs=subs, numticks=most))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(_short)


def _short(value: float, _position: float | None = None) -> str:
    """A number on an axis: 0.5, 200, 20 k, 7 M."""
    from matplotlib.ticker import EngFormatter

    return EngFormatter()(value) if abs(value) >= 1000 else f"{value:g}"


def _digits(value: float) -> str:
    """A number at a bar: three significant digits, and all those before the point."""
    return f"{value:,.0f}" if abs(value) >= 99.5 else f"{value:.3g}"


def _pyplot() -> Any:
    try:
        from matplotlib import pyplot
    except ImportError as error:
        raise ImportError("quartz_plugin.plot needs matplotlib: pip install 'quartz_plugin[plot]'") from error
    return pyplot
