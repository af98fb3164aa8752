"""Energy of an inference: counts times what each of them costs, as published. A profile is data.

Memory, wires and leakage are in a profile only where its figures contain them; an estimate ranks networks on one
profile, it is no measurement.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal


@dataclass(frozen=True)
class EnergyProfile:
    """Energy of each count of an inference.

    Those at hand, each from published figures: :data:`LOIHI` (Loihi 1), :data:`HOROWITZ_INT8` and
    :data:`HOROWITZ_FLOAT32` (arithmetic alone in 45 nm, with 8-bit weights or in float32), and
    :func:`paper_profile` (relative, arXiv:2309.16795). Their `source` has the figures. Counts of one inference, as
    their means over images, give J an inference.

    Attributes
    ----------
    name : str
        Short, for the name of its figure.
    source : str
        Where the figures come from.
    spiking : mapping
        Name of a count (:class:`~quartz_plugin.costs.counts.InferenceCounts`) -> energy of one, of a spiking
        network.
    ann : mapping
        Name of a count (:func:`~quartz_plugin.costs.ann.ann_costs`) -> energy of one, of an ANN.
    unit : str
        "J", or what relative figures stand for.

    Examples
    --------
    A profile of one's own:

    >>> mine = EnergyProfile("mine", "my chip's manual, table 3", spiking={"synops": 10e-12, "neuron_updates": 20e-12})
    >>> round(mine.energy({"synops": 1000.0, "neuron_updates": 100.0}) * 1e9, 3)
    12.0
    """

    name: str
    source: str
    spiking: Mapping[str, float] = field(default_factory=dict)
    ann: Mapping[str, float] = field(default_factory=dict)
    unit: str = "J"

    def __post_init__(self) -> None:
        for kind in ("spiking", "ann"):
            costs = getattr(self, kind)
            wrong = [n for n, cost in costs.items() if not isinstance(cost, (int, float)) or not 0 <= cost < math.inf]
            if wrong:
                raise ValueError(
                    f"profile {self.name!r}: energies must be numbers of 0 or more, those of {wrong} are not"
                )
            object.__setattr__(self, kind, MappingProxyType(dict(costs)))

    @property
    def figure(self) -> str:
        """Name of the figure that an estimate by this profile is."""
        return f"energy_{self.name}"

    def __reduce__(self) -> Any:
        return type(self), (self.name, self.source, dict(self.spiking), dict(self.ann), self.unit)

    def energy(self, counts: Mapping[str, Any], of: Literal["spiking", "ann"] = "spiking") -> Any:
        """Energy of these counts, in the profile's unit.

        Parameters
        ----------
        counts : mapping
            Name of a count -> how many of it: a number or a tensor. Others than the profile's are left alone.
        of : "spiking" or "ann"
            Of which kind of network.

        Raises
        ------
        ValueError
            If a count of the profile is missing, or the profile has no energies for this kind of network.
        """
        if of not in ("spiking", "ann"):
            raise ValueError(f'of must be "spiking" or "ann", got {of!r}')
        costs = self.ann if of == "ann" else self.spiking
        if not costs:
            raise ValueError(
                f"profile {self.name!r} has no energies for {'an ANN' if of == 'ann' else 'spiking networks'}"
            )
        if missing := [count for count in costs if count not in counts]:
            raise ValueError(f"profile {self.name!r} needs {missing}; given are {sorted(counts)}")
        return sum(cost * counts[count] for count, cost in costs.items())


def add_bits(first: float, second: float) -> float:
    """Relative energy of an addition (arXiv:2309.16795): ``max(b1, b2) + |b1 - b2| / 2``.

    Examples
    --------
    >>> add_bits(4, 32)
    46.0
    """
    return max(first, second) + abs(first - second) / 2


def mac_bits(first: float, second: float) -> float:
    """Relative energy of a multiplication with its addition (arXiv:2309.16795): ``b1 b2``."""
    return first * second


def paper_profile(t_max: int, strict: bool = False) -> EnergyProfile:
    """The paper's relative energy: log2(T)-bit values are added to 32-bit sums, the ANN multiplies 32 by 8 bits.

    Parameters
    ----------
    t_max : int
        ``T``.
    strict : bool
        Of the operations spikes x synapses + 2 N T, in place of the paper's merged ones.

    Examples
    --------
    >>> paper_profile(16).energy({"operations": 10.0})
    460.0
    >>> paper_profile(16).energy({"macs": 10.0}, of="ann")
    2560.0
    """
    operations = "operations_strict" if strict else "operations"
    return EnergyProfile(
        "paper_strict" if strict else "paper",
        "Lenz, Orchard, Sheik, arXiv:2309.16795, section 4",
        spiking={operations: add_bits(math.log2(t_max), 32)},
        ann={"macs": mac_bits(32, 8)},
        unit="1-bit additions",
    )


_LOIHI_SYNAPSE = 23.6e-12

LOIHI = EnergyProfile(
    "loihi",
    "Davies et al., Loihi: a neuromorphic manycore processor with on-chip learning, IEEE Micro 38 (1), 2018, table 2: "
    "23.6 pJ a synaptic operation, 81 and 52 pJ an active and inactive neuron update, 1.7 pJ a spike within a tile",
    spiking={
        "synops": _LOIHI_SYNAPSE,
        "bias_events": _LOIHI_SYNAPSE,
        # The readout weight is split into a coarse and a fine synapse.
        "readout_events": 2 * _LOIHI_SYNAPSE,
        "rectifier_events": _LOIHI_SYNAPSE,
        "hold_events": _LOIHI_SYNAPSE,
        "pool_events": _LOIHI_SYNAPSE,
        "active_updates": 81e-12,
        "inactive_updates": 52e-12,
        "spikes": 1.7e-12,
    },
)
"""Loihi 1, dynamic energy of the cores; no chip's host, no leakage, no hops between tiles."""

_HOROWITZ = "Horowitz, Computing's energy problem (and what we can do about it), ISSCC 2014, figure 1.1.9, 45 nm, 0.9 V"

HOROWITZ_FLOAT32 = EnergyProfile(
    "45nm_float32",
    _HOROWITZ + ": float32 addition 0.9 pJ, multiplication 3.7 pJ",
    spiking={"synops": 0.9e-12, "graded_synops": 3.7e-12, "active_updates": 0.9e-12},
    ann={"macs": 4.6e-12},
)
"""Arithmetic in 45 nm, float32: an addition for a spike at a synapse and for each step of an active membrane; a
multiplication where what arrives is no spike but a number."""

HOROWITZ_INT8 = EnergyProfile(
    "45nm_int8",
    _HOROWITZ + ": 32-bit integer addition 0.1 pJ, 8-bit multiplication 0.2 pJ",
    spiking={"synops": 0.1e-12, "graded_synops": 0.2e-12, "active_updates": 0.1e-12},
    ann={"macs": 0.3e-12},
)
"""Arithmetic in 45 nm with 8-bit weights and activations, 32-bit sums."""

ONLY_CONVERTED = (
    "bias_events",
    "readout_events",
    "rectifier_events",
    "hold_events",
    "pool_events",
    "inactive_updates",
)
"""Counts of profiles that other spiking networks than converted ones have none of, unless they are given."""

__all__ = [
    "HOROWITZ_FLOAT32",
    "HOROWITZ_INT8",
    "LOIHI",
    "ONLY_CONVERTED",
    "EnergyProfile",
    "add_bits",
    "mac_bits",
    "paper_profile",
]
