"""Records of flat arrays that the kernels take."""

from __future__ import annotations

from typing import Any, NamedTuple, TypeAlias

import numpy as np

Array: TypeAlias = np.ndarray[Any, Any]


class Tiles(NamedTuple):
    """Division of the neurons of a range of channels into blocks of channels, and of those into tiles of rows.

    A neuron's place in its tile is ``first + row * row_length + x * block_size + channel``.

    Attributes
    ----------
    height, width : int
        Rows of neurons, and places in a row.
    first_output, outputs : int
        Channels before the range, and of it.
    block_size, tile_rows : int
        Channels of a block; rows of a tile.
    first, row_length : int
        Lost lanes before the first neuron; all lanes of a row.
    lanes : int
        Lanes from the first neuron of a row on that are looked at: its neurons, in whole groups of vectors.
    size : int
        All lanes of a tile.
    """

    height: int
    width: int
    first_output: int
    outputs: int
    block_size: int
    tile_rows: int
    first: int
    row_length: int
    lanes: int
    size: int


class Routes(NamedTuple):
    """Tables that spikes are sorted by: which kind each is, and where its neurons and its weights start.

    Spikes of a kind reach neurons in the same way. A spike's kind is the sum of those of its row and of its unit in
    the row, and so is the place of its first neuron; a row's less than 0, or a unit's so low: it reaches none.

    Attributes
    ----------
    term_count : int
        Convolutions.
    terms : array
        Flat ``[term_count, 5]``: height of the source, its first channel and how many, and where its units and its
        rows (in each tile) start in the following tables.
    class_count, tile_count : int
        Kinds of spikes; tiles of a block.
    lazy : bool
        Many rows of neurons are reached by no spike of a level.
    row_class, row_at, row_mask : array
        Of each row, in each tile; the mask has a bit for each row of neurons that is reached.
    unit_class, unit_place : array
        Of each unit of a row; ``weight << 32 | neuron``, where its weights start in a block's, and its neurons.
    """

    term_count: int
    terms: Array
    class_count: int
    tile_count: int
    lazy: bool
    row_class: Array
    row_at: Array
    row_mask: Array
    unit_class: Array
    unit_place: Array


class Synapses(NamedTuple):
    """Weights as they are walked, and the runs of neighbouring neurons that each kind of spike reaches.

    Attributes
    ----------
    weights : array
        Of all blocks, flat; `block_length` of each.
    block_length : int
        Weights of a block.
    class_block : array
        Of each kind of spikes: the block that they reach; less than 0: all.
    class_groups : array
        Of each kind, where its groups start.
    groups : array
        Flat ``[.., 4]``: first and last of runs of one length, their vectors (0: a single neuron), and whether all
        spikes come from one place.
    runs : array
        Flat ``[.., 2]``: place of the first neuron, and of its weight, behind those of the spike.
    """

    weights: Array
    block_length: int
    class_block: Array
    class_groups: Array
    groups: Array
    runs: Array


class Direct(NamedTuple):
    """Synapses one to one, between neighbours in vectors, whose spikes are looked for at every level.

    Attributes
    ----------
    levels : array
        Of their sources, flat ``[B, H, W, C]``.
    weights : array
        Laid out as a row of a tile, for each block.
    row : int
        Places in a row that are looked at together; 0 where there are no such synapses.
    channels, first : int
        Channels of the source, and those before the first that is looked at.
    """

    levels: Array
    weights: Array
    row: int
    channels: int
    first: int


class Bias(NamedTuple):
    """Biases: synapses from units of a level of their own.

    Attributes
    ----------
    amount, level : array
        Weight of each neuron's, and its level, laid out as the tiles are; one row where all are alike.
    stops : array
        Levels above 0 that occur, falling.
    stop_count : int
        How many.
    row_length, block_length : int
        From row to row (0 where all are alike) and from block to block.
    late : bool
        Some come after readout.
    """

    amount: Array
    level: Array
    stops: Array
    stop_count: int
    row_length: int
    block_length: int
    late: bool


class Neurons(NamedTuple):
    """Windows and threshold of a layer's neurons.

    Attributes
    ----------
    window : int
        Steps of the window in which they fire.
    theta : float
        Threshold before readout.
    lowest, no_spike_level : int
        Level of the last step at which they may fire, and that which stands for no spike.
    last_level : int
        Level of a bias spike at their last step.
    """

    window: int
    theta: float
    lowest: int
    no_spike_level: int
    last_level: int


class ListedSpikes(NamedTuple):
    """Spikes of some images, row after row.

    Attributes
    ----------
    images : int
        How many.
    spikes : array
        ``(level * classes + kind) << 32 | unit`` of each, the kind that of its unit.
    start : array
        For each convolution, image and row, where its spikes start; and where the last end.
    """

    images: int
    spikes: Array
    start: Array


class SortedSpikes(NamedTuple):
    """Spikes that reach a tile, by level, falling, and by kind.

    Attributes
    ----------
    images, tiles, classes : int
        How many.
    lazy : bool
        `touched` is known.
    spikes : array
        ``weight << 32 | neuron``: where its weights start in a block's, and its neurons in the tile.
    ranks : int
        Up to so many levels of a tile.
    ranked, distinct : array
        Flat ``[images, tiles, ranks]``: levels that occur or are looked at anyway, falling; ``[images, tiles]``: how
        many.
    starts : array
        Flat ``[images, tiles, ranks * classes + 1]``: where the spikes of a rank and a kind start.
    touched : array
        Flat ``[images, tiles, ranks]``, if `lazy`: a bit for each row of neurons that is reached.
    """

    images: int
    tiles: int
    classes: int
    lazy: bool
    spikes: Array
    ranks: int
    ranked: Array
    distinct: Array
    starts: Array
    touched: Array
