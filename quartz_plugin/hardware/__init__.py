"""What an inference costs: operation counts, energy, and the chip it would need."""

from quartz_plugin.hardware.ann import ann_costs
from quartz_plugin.hardware.counter import OperationCounts, count_operations
from quartz_plugin.hardware.energy import (
    HOROWITZ_FLOAT32,
    HOROWITZ_INT8,
    LOIHI,
    EnergyProfile,
    paper_profile,
)
from quartz_plugin.hardware.loihi import LOIHI_1, LoihiChip, LoihiEstimate, LoihiMapping, map_to_loihi
from quartz_plugin.hardware.operations import COUNTS, InferenceCounts, neuron_count, synaptic_operations

__all__ = [
    "COUNTS",
    "HOROWITZ_FLOAT32",
    "HOROWITZ_INT8",
    "LOIHI",
    "LOIHI_1",
    "EnergyProfile",
    "InferenceCounts",
    "LoihiChip",
    "LoihiEstimate",
    "LoihiMapping",
    "OperationCounts",
    "ann_costs",
    "count_operations",
    "map_to_loihi",
    "neuron_count",
    "paper_profile",
    "synaptic_operations",
]
