"""The report: what became of every module of the ANN."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from quartz_plugin.tables import format_table


class Report(Sequence[dict[str, Any]]):
    """One row for each module, in the order of the network; prints as a table.

    A row is a dict of

    - ``module``: path in the ANN; "output" is the output layer;
    - ``operation``: the module's class, or the function;
    - ``became``: part of the spiking network that it is now. "synapses": weights between layers; "routing": spikes
      pass on unchanged, to other places; "first-spike max pooling"; "spiking layer", "output layer": neurons;
      "folded into ...": multiplied into the weights of another module; "dropped": nothing in eval mode. The words,
      by operation, are those of ``quartz_plugin/operators/OPERATORS.md``;
    - ``exact``: "exact" where this is what the ANN computes, but for the rounding of values to levels and the
      clipping at the scale; else what may differ ("exact but for early spikes");

    and for spiking layers

    - ``neurons``: their number;
    - ``scale``: value of the ANN that a spike at once encodes (the largest, where it differs by channel);
    - ``readout``: global step at which the window of their spikes begins;
    - ``window``: its length in steps;
    - ``delay``: the longest axonal delay on their inputs, in steps;
    - ``synapses``: synapses into the layer, entries of the composed maps;
    - ``synapses_factored``: those of the same maps computed one after the other; shared chains stand with the first
      layer.
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
