"""Results of a benchmark: a heading, a table, a CSV file and a picture."""

from __future__ import annotations

import itertools
import platform
import statistics
from collections.abc import Mapping, Sequence
from csv import DictWriter
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from quartz_plugin.lightning.benchmark.contenders import CHANNELS_LAST, CONTENDERS, RATE
from quartz_plugin.lightning.benchmark.measure import Row
from quartz_plugin.lightning.benchmark.setup import Setup
from quartz_plugin.plot.style import pyplot
from quartz_plugin.tables import format_table

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def heading(
    setup: Setup,
    threads: int,
    repeats: int,
    percentile: float,
    root: Path | None,
    left_out: Mapping[int, Mapping[str, str]],
) -> str:
    """Describe network, machine and calibration, and what was left out."""
    calibrated = "them" if root is None else f"{len(setup.calibration)} training images"
    lines = [
        f"{setup.network.title}: {setup.origin}, percentile {percentile:g} of {calibrated}",
        f"batch {len(setup.images)}, {threads} thread(s), medians of {repeats}, torch {torch.__version__}, {_cpu()}",
    ]
    for what in CONTENDERS:
        times = [t for t in left_out if what in left_out[t]]
        if times:
            lines.append(f"left out: {what} at T = {', '.join(map(str, times))} ({left_out[times[0]][what]})")
    return "\n".join(lines)


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def table(rows: Sequence[Row]) -> str:
    """Return a table: the ANN in both layouts, at its median over all T, then what was timed beside it."""
    lines: list[list[object]] = []
    for layout in ("ANN", CHANNELS_LAST):
        anns = [row for row in rows if row.what == layout]
        ms, times = (
            round(statistics.median(each), 2) for each in zip(*((r.ms, r.times_ann) for r in anns), strict=True)
        )
        lines.append([layout, None, ms, times, anns[0].right_percent, anns[0].memory_mb])
    columns: dict[str, list[object]] = {
        "what": [], "T": [], "ms": [], "x ANN": [], "right %": [], "MB above ANN": [],
    }  # fmt: skip
    lines += [
        [row.what, row.t_max, round(row.ms, 2), round(row.times_ann, 2), row.right_percent, row.memory_mb]
        for row in rows
        if row.what not in ("ANN", CHANNELS_LAST)
    ]
    for line in lines:
        for cells, cell in zip(columns.values(), line, strict=True):
            cells.append(round(cell) if cells is columns["MB above ANN"] and isinstance(cell, float) else cell)
    shown = {name: cells for name, cells in columns.items() if any(cell is not None for cell in cells)}
    return format_table(list(shown), list(zip(*shown.values(), strict=True)))


def write(rows: Sequence[Row], csv: Path, plot: Path) -> None:
    """Write all rows to a CSV file, and draw them."""
    for path in (csv, plot):
        path.parent.mkdir(parents=True, exist_ok=True)
    with csv.open("w", newline="") as file:
        writer = DictWriter(file, list(asdict(rows[0])))
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)
    by_network = {name: list(group) for name, group in itertools.groupby(rows, lambda row: row.network)}
    pyplot()
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.5 * len(by_network) + 3.5, 4.5), layout="constrained")
    panels = figure.subplots(1, len(by_network), sharey=True, squeeze=False)[0]
    for ax, own in zip(panels, by_network.values(), strict=True):
        draw(own, ax)
    drawn = {label: line for ax in panels for line, label in zip(*ax.get_legend_handles_labels(), strict=True)}
    figure.legend(drawn.values(), drawn.keys(), loc="outside right center", fontsize=8, frameon=False)
    figure.savefig(plot, dpi=150)


COLORS = (
    *("#0072b2", "#56b4e9", "#004466"),
    *("#882255", "#cc6699", "#661100", "#999933"),
    *("#d55e00", "#e69f00", "#7f3300", "#cc79a7", "#555555", "#009e73", "#000000"),
)

MARKERS = ("o", "o", "P", "h", "h", "p", "1", "s", "s", "X", "D", "^", "v", "*")


def draw(rows: Sequence[Row], ax: Axes) -> Axes:
    """Time against T for one network, one line per contender."""
    times = sorted({row.t_max for row in rows})
    ax.axhline(1, color="#999999", linestyle=":", linewidth=1)
    for (what, color), marker in zip(zip([*CONTENDERS, RATE], COLORS, strict=True), MARKERS, strict=True):
        own = [row for row in rows if row.what == what]
        if own:
            ax.plot(
                [row.t_max for row in own], [row.times_ann for row in own], marker=marker, color=color, label=what,
                markersize=9 if what == RATE else 4.5, linestyle="none" if what == RATE else "-",
            )  # fmt: skip
    first = rows[0]
    ax.set(xscale="log", yscale="log", xlabel="T (levels of a value)", ylabel="time (x the ANN's forward pass)")
    ax.set_xticks(times, labels=[str(t) for t in times])
    ax.minorticks_off()
    ax.yaxis.set_major_locator(_decimal_ticks())
    ax.yaxis.set_major_formatter("{x:g}")
    ax.label_outer()
    ax.grid(axis="y", linewidth=0.4, alpha=0.6)
    ax.spines[["top", "right"]].set_visible(False)
    ax.set_title(f"{first.network}, batch {first.batch}, {first.threads} thread(s)", loc="left", fontsize=10)
    return ax


def _decimal_ticks() -> Any:
    from matplotlib.ticker import LogLocator

    return LogLocator(subs=(1, 2, 5))
