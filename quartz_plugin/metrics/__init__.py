"""torchmetrics classes over pure functions: agreement, spikes, latency, operations.

``update`` takes a :class:`~quartz_plugin.SimulationResult` (``Agreement`` takes predictions); all can stand in one
``MetricCollection``, updated with keywords: ``collection.update(result=result, preds=..., target=...)``.
"""

from quartz_plugin.costs.spikes import early_spike_counts, spike_counts, train_counts, zero_spike_counts
from quartz_plugin.metrics.agreement import Agreement, agreement
from quartz_plugin.metrics.ann import ANNOperations
from quartz_plugin.metrics.energy import EnergyEstimate
from quartz_plugin.metrics.latency import DecisionLatency, decision_latency
from quartz_plugin.metrics.operations import MemoryAccesses, NeuronEvents, QuartzOperations, SynapticOperations
from quartz_plugin.metrics.spikes import EarlySpikeRate, SpikeCount, SpikesPerNeuron

__all__ = [
    "ANNOperations",
    "Agreement",
    "DecisionLatency",
    "EarlySpikeRate",
    "EnergyEstimate",
    "MemoryAccesses",
    "NeuronEvents",
    "QuartzOperations",
    "SpikeCount",
    "SpikesPerNeuron",
    "SynapticOperations",
    "agreement",
    "decision_latency",
    "early_spike_counts",
    "spike_counts",
    "train_counts",
    "zero_spike_counts",
]
