"""What an inference costs: operation counts, energy, and the chip it would need."""

from quartz_plugin.hardware.energy import (
    HOROWITZ_FLOAT32,
    HOROWITZ_INT8,
    LOIHI,
    EnergyProfile,
    paper_profile,
)
from quartz_plugin.hardware.operations import COUNTS, InferenceCounts, neuron_count, synaptic_operations

__all__ = [
    "COUNTS",
    "HOROWITZ_FLOAT32",
    "HOROWITZ_INT8",
    "LOIHI",
    "EnergyProfile",
    "InferenceCounts",
    "neuron_count",
    "paper_profile",
    "synaptic_operations",
]
