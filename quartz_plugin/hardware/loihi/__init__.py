"""From a converted network to the cores of Loihi 1: an estimate made of published limits and energies.

Every population (input encoder, max pooling, layer) has cores of its own, cut into tiles of rows, columns and
channels (or channels, rows and columns) until each tile keeps the limits of a core. Support neurons, one at each
readout, send bias, readout, rectifier and hold; relay neurons carry delays that are longer than the chip's. At each
step the fullest core updates all its compartments at the time of active ones; synaptic operations take the time of
each population's busiest core, one population after the other. What it leaves out: routing and hops between tiles of
the chip, spike traffic's time, resetting between images, packing of small layers, learning.

References
----------
M. Davies et al., "Loihi: A Neuromorphic Manycore Processor with On-Chip Learning", IEEE Micro 38 (1), 2018.
G. Lenz, G. Orchard, S. Sheik, arXiv:2309.16795.
"""

from quartz_plugin.hardware.loihi.chip import LIMITS, LOIHI_1, LoihiChip
from quartz_plugin.hardware.loihi.layout import map_to_loihi
from quartz_plugin.hardware.loihi.mapping import LoihiEstimate, LoihiMapping, Population

__all__ = ["LIMITS", "LOIHI_1", "LoihiChip", "LoihiEstimate", "LoihiMapping", "Population", "map_to_loihi"]
