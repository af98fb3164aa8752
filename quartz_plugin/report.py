"""The report: what became of every module of the ANN."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from quartz_plugin.tables import format_table


class Report(Sequence[dict[str, Any]]):
    """One row for each module, in the order of the network; prints as a table.

    Each row has ``module`` (path in the ANN), ``operation``, ``became``, ``exact``, and for spiking layers
    ``neurons``, ``scale`` (what the value 1 stands for; the largest, where it differs by channel),
    ``readout`` (global step), ``window`` (steps), ``delay`` (steps, the longest on its inputs), ``synapses`` (into
    it, entries of the composed maps) and ``synapses_factored`` (of the same maps as the chains they are computed
    as; shared chains stand with the first layer).
    """

    COLUMNS = (
        "module",
        "operation",
        "became",
        "exact",
        "neurons",
        "scale",
        "readout",
        "window",
        "delay",
        "synapses",
        "synapses_factored",
    )

    def __init__(self, rows: Sequence[dict[str, Any]]) -> None:
        self._rows = list(rows)

    def __getitem__(self, index: Any) -> Any:
        """Return one row (a dict), or several."""
        return self._rows[index]

    def __len__(self) -> int:
        return len(self._rows)

    def __str__(self) -> str:
        rows = [[row.get(column) for column in self.COLUMNS] for row in self._rows]
        return f"{format_table(self.COLUMNS, rows)}\n{self.totals()}"

    def totals(self) -> str:
        """Neurons and synapses of the whole network, in one line."""
        layers = [row for row in self._rows if row.get("neurons") is not None]
        neurons = sum(row["neurons"] for row in layers)
        counts = [(row.get("synapses"), row.get("synapses_factored")) for row in layers]
        if any(None in pair for pair in counts):
            return f"{len(layers)} layers, {neurons:,} neurons"
        composed, factored = (sum(kind) for kind in zip(*counts, strict=True))
        return (
            f"{len(layers)} layers, {neurons:,} neurons, {composed:,} synapses"
            f" ({factored:,} where linear maps in a row are computed one after the other)"
        )

    __repr__ = __str__
