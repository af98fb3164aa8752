"""Pictures of spikes, of activations beside the ANN's, of accuracy against cost, and of costs by layer.

Needs matplotlib (extra ``plot``).
"""

from quartz_plugin.plot.bars import cores_per_layer, counts_per_layer, energy_delay_bars
from quartz_plugin.plot.errors import OPTIONS, error_curves
from quartz_plugin.plot.neuron import chronogram
from quartz_plugin.plot.spikes import raster, spike_time_histograms
from quartz_plugin.plot.style import EARLY, EXCITING, INHIBITING, MARK, NEUTRAL, PALETTE, PUBLISHED, ZERO
from quartz_plugin.plot.values import activations

__all__ = [
    "EARLY",
    "EXCITING",
    "INHIBITING",
    "MARK",
    "NEUTRAL",
    "OPTIONS",
    "PALETTE",
    "PUBLISHED",
    "ZERO",
    "activations",
    "chronogram",
    "cores_per_layer",
    "counts_per_layer",
    "energy_delay_bars",
    "error_curves",
    "raster",
    "spike_time_histograms",
]
