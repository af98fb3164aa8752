"""Figures of networks side by side, as the command line prints them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

from quartz_plugin.figures import FIGURES, SUMMARY
from quartz_plugin.hardware import LoihiEstimate
from quartz_plugin.tables import format_table

Figures = Mapping[str, float]
"""Name of a figure -> its value, mean over images."""


def _synops(of: Figures) -> str | None:
    """Synaptic operations, in their place the multiplications of an ANN."""
    return f"{FIGURES['macs'].text(of['macs'])} MACs" if "macs" in of else _text("synops", of)


def _factored(of: Figures) -> str | None:
    """Operations of linear maps in a row; None where there are none in a row."""
    return None if of.get("synops_factored") == of.get("synops") else _text("synops_factored", of)


def _text(name: str, of: Figures) -> str | None:
    return FIGURES[name].text(of[name]) if name in of else None


_CELLS: dict[str, Callable[[Figures], str | None]] = {"synops": _synops, "synops_factored": _factored}
"""Rows that are more than one figure's value."""

_ELSEWHERE = {
    "early_spikes",
    "t_max",
    "macs",
    "nonzero_macs",
    "neuron_updates",
    "active_updates",
    "inactive_updates",
    "images",
    "cost_images",
}
"""Figures without a row: they stand in the head of the table, in other rows, or in files alone."""

TABLE_ROWS = (*SUMMARY, *(name for name in FIGURES if name not in {*SUMMARY, *_ELSEWHERE}))
"""Figures of the whole table; the summary comes first."""


def side_by_side(figures: Mapping[str, Figures], all_figures: bool = False) -> str:
    """Return the table of networks side by side: the summary, or all figures; rows that none has are left out.

    Examples
    --------
    >>> print(side_by_side({"ANN": {"images": 100.0, "macs": 56.0}, "SNN": {"accuracy": 0.5, "synops": 40.0}}))
    100 test images, mean of each           ANN      SNN
    --------------------------------------  -------  -------
    accuracy                                -        50.00 %
    synaptic operations: spikes x synapses  56 MACs  40.0
    """
    names = TABLE_ROWS if all_figures else SUMMARY
    cells = {name: [_CELLS.get(name, partial(_text, name))(of) for of in figures.values()] for name in names}
    rows = [[FIGURES[name].label, *row] for name, row in cells.items() if any(cell is not None for cell in row)]
    images, counted = (max(of.get(name, 0.0) for of in figures.values()) for name in ("images", "cost_images"))
    what = "mean of each" if counted in (0.0, images) else f"mean; costs: of {counted:,.0f} of them"
    return format_table([f"{images:,.0f} test images, {what}", *figures], rows)


def ann_columns(ann: Figures) -> dict[str, Figures]:
    """Return the ANN's column, and that of an engine which leaves out inputs that are zero."""
    skipping = {**ann, "macs": ann["nonzero_macs"], "memory_reads": 2 * ann["nonzero_macs"]}
    for name in ann:
        if name.startswith("energy_"):
            skipping[name] = ann[name] * ann["nonzero_macs"] / ann["macs"]
    return {"ANN": ann, "ANN, zeros skipped": skipping}


@dataclass(frozen=True)
class Measured:
    """A measurement on a chip; SI units, None where it was not."""

    steps: int
    latency: float
    cores: int | None = None
    core_energy: float | None = None


def loihi_table(estimates: Mapping[int, tuple[int, LoihiEstimate]], measured: Mapping[int, Measured]) -> str:
    """Return the table of estimates by T (cores, estimate), beside what was measured."""

    def pair(estimated: str, value: float | None, form: Callable[[float], str]) -> str:
        return estimated if value is None else f"{estimated} ({form(value)})"

    def scaled(scale: float) -> Callable[[float], str]:
        return lambda value: f"{scale * value:.3g}"

    rows = []
    for t_max, (cores, found) in estimates.items():
        known = measured.get(t_max)
        of = {name: getattr(known, name, None) for name in ("cores", "steps", "latency", "core_energy")}
        rows.append(
            [
                str(t_max),
                pair(str(cores), of["cores"], str),
                pair(str(found.steps), of["steps"], str),
                pair(f"{1e3 * found.latency:.2f}", of["latency"], scaled(1e3)),
                f"{1e6 * found.step_time:.1f}",
                pair(f"{1e6 * found.core_energy:.1f}", of["core_energy"], scaled(1e6)),
                f"{1e6 * found.total_energy:.0f}",
                f"{1e6 * found.energy_delay_product:.2f}",
                f"{found.throughput:.0f}, {found.pipelined_throughput:.0f}",
            ]
        )
    header = [
        "T", "cores", "steps", "latency, ms", "a step, us", "energy in the cores, uJ", "in all, uJ", "EDP, uJs",
        "images/s, pipelined",
    ]  # fmt: skip
    title = "Loihi 1, estimated" + (" (in brackets: measured by the paper's authors)" if measured else "")
    return f"{title}\n{format_table(header, rows)}"
