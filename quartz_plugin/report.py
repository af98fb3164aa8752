"""The report: what became of every module of the ANN."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from quartz_plugin.tables import format_table


class Report(Sequence[dict[str, Any]]):
    """One row for each module, in the order of the network; prints as a table.

    Each row has ``module`` (path in the ANN), ``operation``, ``became``, ``exact``, and for spiking layers
    ``neurons``, ``scale`` (what the value 1 stands for; the largest, where it differs by channel),
    ``readout`` (global step), ``window`` (steps), ``delay`` (steps, on its inputs).
    """

    COLUMNS = ("module", "operation", "became", "exact", "neurons", "scale", "readout", "window", "delay")

    def __init__(self, rows: Sequence[dict[str, Any]]) -> None:
        self._rows = list(rows)

    def __getitem__(self, index: Any) -> Any:
        """Return one row (a dict), or several."""
        return self._rows[index]

    def __len__(self) -> int:
        return len(self._rows)

    def __str__(self) -> str:
        rows = [[row.get(column) for column in self.COLUMNS] for row in self._rows]
        return format_table(self.COLUMNS, rows)

    __repr__ = __str__
