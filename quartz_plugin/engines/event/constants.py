"""Sizes that the event engine's tables are laid out for, and bounds that it decides by."""

LANES = 8
"""Numbers in a vector; runs of weights are padded with zeros to a multiple of it, rows of neurons with lost lanes."""

REGISTERS = 8
"""Vectors of currents that are in registers together."""

CHANNEL_BITS = 32
CHANNEL_MASK = (1 << CHANNEL_BITS) - 1
"""A spike is noted as ``x << 32 | channel``."""

WEIGHT_BYTES = 256 * 1024
"""Weights of one block of channels: they stay in the second-level cache while images go by."""

TILE_BYTES = 16 * 1024
"""Currents and membranes of one tile: they stay in the first-level cache."""

EVENT_BYTES = 2 * 1024 * 1024
"""Sorted spikes of the images that go through a layer together."""

FEW_LEVELS = 128
"""Up to so many steps in a window, spikes that come one to one are looked for at every level, without sorting."""

MOST_BUCKETS = 2**12
"""Up to so high a level, spikes are sorted by a bucket for each; beyond, memory must not grow with the window."""

SHORT_ROW = 128
"""Up to so many neurons in a row, all spikes of a row of units are delivered to all of it."""

FEW_CHANNELS = 16
"""Below so many channels, pooling is done by whole pictures."""

WORTH_THREADS = 10**8
"""Synapses of a batch from which on several threads share its images."""

LEAST_CHANGE = 1e-6
"""A current that changes by less has not changed: sums of floats leave as much."""
