"""The figures of a network, one row each: name, words for consoles, axis of pictures, unit, and which way is better.

Metrics, CSV and JSON files, console tables and pictures call a figure by the same name and read its words here.
Names are what files hold, so that files written before stay readable.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

Better = Literal["higher", "lower"]


@dataclass(frozen=True)
class Figure:
    """A figure: how it is called, in which unit it stands in files, and how it is shown.

    Attributes
    ----------
    name : str
        Its key in metrics, CSV and JSON files.
    label : str
        Its row in console tables.
    axis : str
        Its axis in pictures, without the unit.
    unit : str
        The unit of its values, as files hold them; empty for counts and shares.
    shown_unit : str
        The unit in which it is shown.
    factor : float
        Value in `unit` times this is the value in `shown_unit`.
    form : str
        How the shown value is formatted.
    better : "higher", "lower" or None
        Which way is better; None where neither is.

    Examples
    --------
    >>> FIGURES["accuracy"].text(0.984), FIGURES["energy_loihi"].text(30.41e-6)
    ('98.40 %', '30.41 uJ')
    >>> FIGURES["energy_loihi"].axis_label, FIGURES["energy_loihi"].higher_is_better
    ('energy an inference, Loihi 1 (uJ)', False)
    """

    name: str
    label: str
    axis: str
    unit: str = ""
    shown_unit: str = ""
    factor: float = 1.0
    form: str = ",.1f"
    better: Better | None = "lower"

    def text(self, value: float) -> str:
        """Return a value with its unit, as console tables show it."""
        return f"{value * self.factor:{self.form}} {self.shown_unit}".strip()

    @property
    def axis_label(self) -> str:
        """The axis of values in `shown_unit`."""
        return f"{self.axis} ({self.shown_unit})" if self.shown_unit else self.axis

    @property
    def raw_axis_label(self) -> str:
        """The axis of values as they are, in `unit`."""
        return f"{self.axis} ({self.unit})" if self.unit else self.axis

    @property
    def higher_is_better(self) -> bool | None:
        """True where a higher figure is better, as torchmetrics has it; None where neither is."""
        return None if self.better is None else self.better == "higher"


def _share(name: str, label: str, better: Better = "higher") -> Figure:
    return Figure(name, label, label, shown_unit="%", factor=100.0, form=",.2f", better=better)


def _count(name: str, label: str, axis: str = "", form: str = ",.1f", better: Better | None = "lower") -> Figure:
    return Figure(name, label, axis or f"{label} of an inference", form=form, better=better)


def _energy(name: str, label: str, axis: str) -> Figure:
    return Figure(name, f"energy: {label}", f"energy an inference, {axis}", "J", "uJ", 1e6, ",.4g")


def _relative_energy(name: str, label: str, axis: str) -> Figure:
    """Energy as the paper has it, in additions of one bit."""
    axis = f"energy an inference in 1-bit additions, {axis}"
    return Figure(name, f"energy: {label}", axis, "", "M", 1e-6, ",.4g")


_ROWS = (
    _share("accuracy", "accuracy"),
    _share("agreement", "agreement with the ANN"),
    _count("gained", "SNN correct, ANN wrong", "images, SNN correct, ANN wrong", ",.0f", better="higher"),
    _count("lost", "SNN wrong, ANN correct", "images, SNN wrong, ANN correct", ",.0f"),
    _share("ties", "ties of first output spikes", better="lower"),
    _share("accuracy_membrane", "accuracy from output membrane potentials"),
    _share("early_spike_rate", "early spikes", better="lower"),
    _count("early_spikes", "number of early spikes"),
    _count("t_max", "T", "T_max", "g", better=None),
    _count("steps", "steps of an inference", "steps an inference"),
    _count("decision_steps", "steps until the first output spike", "steps until the first output spike"),
    _count("spikes", "spikes, input included", "spikes an inference, the input's included"),
    _count("zero_spikes", "spikes encoding zero", "spikes an inference that encode zero"),
    _count("spikes_per_neuron", "spikes per neuron, without the input", "spikes per neuron", ",.3f"),
    _count("synops", "synaptic operations: spikes x synapses", "synaptic operations an inference (spikes x synapses)"),
    _count("macs", "multiplications", "multiplications an inference", ",.0f"),
    _count("nonzero_macs", "multiplications of inputs that are not zero", form=",.0f"),
    _count(
        "graded_synops", "synaptic operations: on graded inputs (multiplications)", "multiplications of graded inputs"
    ),
    _count(
        "synops_factored",
        "synaptic operations: linear maps one after the other",
        "synaptic operations an inference (maps in a row)",
    ),
    _count("first_layer_macs", "multiplications of the first layer, on the image"),
    _count(
        "synops_merged",
        "synaptic operations: merged, as the paper counts",
        "synaptic operations an inference (merged)",
    ),
    _count("bias_events", "bias events"),
    _count("readout_events", "readout events"),
    _count("rectifier_events", "rectifier events"),
    _count("hold_events", "hold events"),
    _count("pool_events", "max-pool events"),
    _count("neuron_updates", "neuron updates: neurons x steps"),
    _count("active_updates", "updates of neurons that have not fired"),
    _count("inactive_updates", "updates of neurons that have fired"),
    _count("operations", "operations: merged + 2 N T", "operations an inference (merged + 2 N T)"),
    _count(
        "operations_strict",
        "operations: spikes x synapses + 2 N T",
        "operations an inference (spikes x synapses + 2 N T)",
    ),
    _count("memory_reads", "memory reads: merged + 4 N T, the ANN's 2 a MAC", "memory reads (merged + 4 N T)"),
    _count("memory_reads_strict", "memory reads: spikes x synapses + 4 N T"),
    _count("memory_writes", "memory writes: merged + N T", "memory writes (merged + N T)"),
    _count("memory_writes_strict", "memory writes: spikes x synapses + N T"),
    _energy("energy_loihi", "Loihi 1's, of synapses and neurons", "Loihi 1"),
    _energy("energy_45nm_float32", "45 nm, float32 arithmetic", "45 nm, float32 arithmetic"),
    _energy("energy_45nm_int8", "45 nm, 8-bit arithmetic", "45 nm, 8-bit arithmetic"),
    _relative_energy("energy_paper", "the paper's, relative", "of merged + 2 N T operations"),
    _relative_energy(
        "energy_paper_strict", "the paper's, of spikes x synapses", "of spikes x synapses + 2 N T operations"
    ),
    _count("images", "test images", "images", ",.0f", better=None),
    _count("cost_images", "test images whose costs are counted", "images", ",.0f", better=None),
)

FIGURES = MappingProxyType({figure.name: figure for figure in _ROWS})
"""Name of a figure -> the figure; in the order of console tables."""

SUMMARY = ("accuracy", "steps", "spikes_per_neuron", "synops", "energy_45nm_int8")
"""The figures that most people want: console tables begin with them."""

SWEEP_OPTIONS = (
    "t_max",
    "percentile",
    "output_percentile",
    "granularity",
    "calibration_method",
    "hold",
    "bias",
    "rectifier",
)
"""The options of conversion that stand in every row of a sweep's CSV file, in its order."""

SWEEP_COLUMNS = (
    "accuracy",
    "accuracy_membrane",
    "agreement",
    "gained",
    "lost",
    "ties",
    "early_spike_rate",
    "spikes",
    "zero_spikes",
    "spikes_per_neuron",
    "synops",
    "synops_factored",
    "synops_merged",
    "operations",
    "operations_strict",
    "memory_reads",
    "memory_writes",
    "energy_loihi",
    "energy_45nm_float32",
    "energy_45nm_int8",
    "energy_paper",
    "energy_paper_strict",
    "decision_steps",
    "steps",
)
"""The figures of a sweep's CSV file, in its order."""

SWEEP_PRINTED = ("accuracy", "gained", "lost", "ties", "early_spike_rate", "spikes", "synops", "operations", "steps")
"""The figures that a sweep prints."""


def figure_of(name: str) -> Figure:
    """Return the figure of this name; one that is not in the table is called by its name.

    Examples
    --------
    >>> figure_of("synops").axis_label, figure_of("area").axis_label
    ('synaptic operations an inference (spikes x synapses)', 'area')
    """
    return FIGURES.get(name) or Figure(name, name, name, better=None)


def labels(names: Iterable[str]) -> Mapping[str, str]:
    """Return name of a figure -> its row in console tables."""
    return {name: figure_of(name).label for name in names}


__all__ = ["FIGURES", "SUMMARY", "SWEEP_COLUMNS", "SWEEP_OPTIONS", "SWEEP_PRINTED", "Figure", "figure_of", "labels"]
