"""Sizes that the event engine's tables are laid out for, and bounds that it decides by."""

LANES = 8
"""Numbers in a vector; runs of weights are padded with zeros to a multiple of it, rows of neurons with lost lanes."""

UNIT_BITS = 32
UNIT_MASK = (1 << UNIT_BITS) - 1
"""Two numbers of a spike are noted as one: ``level << 32 | unit``, and ``weight << 32 | neuron``."""

LINE = 64
"""Bytes of a line of the caches."""

REGISTERS = 6
"""Vectors of currents that are in registers together, twice."""

MOST_VECTORS = 12
"""Vectors of a run of weights; longer ones are divided."""

RUN_VECTORS = 12
"""Vectors of a run of weights that blocks of channels are made for."""

USUAL_RUNS = 3
"""Runs of a spike that there is code of its own for."""

GROUP = 4
"""Vectors of membranes that are compared with the threshold together."""

WEIGHT_BYTES = 320 * 1024
"""Weights of one block of channels: they stay in the second-level cache while images go by."""

TILE_BYTES = 48 * 1024
"""Currents and membranes of one tile: they are at home in the first-level cache."""

EVENT_BYTES = 2 * 1024 * 1024
"""Sorted spikes of the images that go through a layer together."""

KEPT_NUMBERS = 2**19
"""Up to so many numbers of each kind are kept by a thread for the next images."""

FEW_LEVELS = 24
"""Below so many steps in a window, spikes that come one to one are looked for at every level, without sorting."""

MOST_BUCKETS = 2**14
"""Up to so high a level, spikes are sorted by a bucket for each; beyond, memory must not grow with the window."""

VISIT = 100
"""Vectors of weights that are added in the time that a kind of spikes of a level takes beside them."""

FEW_PLACES, MANY_SPIKES = 16, 4
"""In a source of so few places, and above so many spikes of a place and a level, each place is a kind of its own."""

FEW_SPIKES = 2
"""Below so many spikes of a row and a level, rows of neurons are advanced only where spikes come."""

FEW_CHANNELS = 16
"""Below so many channels, pooling is done by whole pictures."""

WORTH_THREADS = 10**8
"""Synapses of a batch from which on several threads share its images."""

LEAST_CHANGE = 1e-6
"""A current that changes by less has not changed: sums of floats leave as much."""

LEAST_CHANNELS = 16
"""Channels of a block at least."""
