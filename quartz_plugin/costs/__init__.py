"""Costs of an inference: operation counts and energy, of spiking networks and of ANNs."""

from quartz_plugin.costs.ann import ann_costs
from quartz_plugin.costs.counts import COUNTS, InferenceCounts, neuron_count, synaptic_operations
from quartz_plugin.costs.energy import (
    HOROWITZ_FLOAT32,
    HOROWITZ_INT8,
    LOIHI,
    EnergyProfile,
    paper_profile,
)
from quartz_plugin.costs.profiler import OperationCounts, count_operations

__all__ = [
    "COUNTS",
    "HOROWITZ_FLOAT32",
    "HOROWITZ_INT8",
    "LOIHI",
    "EnergyProfile",
    "InferenceCounts",
    "OperationCounts",
    "ann_costs",
    "count_operations",
    "neuron_count",
    "paper_profile",
    "synaptic_operations",
]
