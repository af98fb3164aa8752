"""Records of flat arrays that the kernels take."""

from __future__ import annotations

from typing import Any, NamedTuple, TypeAlias

import numpy as np

Array: TypeAlias = np.ndarray[Any, Any]


class Tiles(NamedTuple):
    """Division of the neurons of a range of channels into blocks of channels, and of those into tiles of rows.

    A neuron's place in its tile is ``row * row_length + x * block_size + channel``.

    Attributes
    ----------
    height, width : int
        Rows of neurons, and places in a row.
    first_output, outputs : int
        Channels before the range, and of it.
    block_size, tile_rows : int
        Channels of a block; rows of a tile.
    row_length : int
        Lanes of a row: neurons and lost lanes.
    """

    height: int
    width: int
    first_output: int
    outputs: int
    block_size: int
    tile_rows: int
    row_length: int


class Synapses(NamedTuple):
    """Weights as they are walked, and tables of where spikes go.

    A spike at (channel, y, x) reaches pairs of an output row and a kernel row, and in each one or more runs:
    neighbouring neurons, and the weights that belong to them, side by side.

    Attributes
    ----------
    weights : array
        Of all blocks, flat; `block_length` of each.
    block_length : int
        Weights of a block.
    term_count : int
        Convolutions.
    terms : array
        Flat ``[term_count, 7]``: the row of its first spikes, where its weights start in a block, weights of an
        input channel, where it starts in `column`, in `channel_at` and in `reach`, and outputs of a group (0: there is
        one group).
    reach : array
        For each tile of a convolution, where its rows start in `reach_row`.
    reach_row, reach_pair : array
        Rows of spikes that reach a tile, and where their pairs start.
    pairs : array
        Flat ``[.., 3]``: place of an output row in its tile, place of a kernel row in the weights, number of the row.
    column : array
        For each place of spikes in a row, where its runs start.
    runs : array
        Flat ``[.., 3]``: place of the first neuron in its row, of its weight in a kernel row, and how many vectors.
    channel_at : array
        For each input channel, the first output channel of its group.
    """

    weights: Array
    block_length: int
    term_count: int
    terms: Array
    reach: Array
    reach_row: Array
    reach_pair: Array
    pairs: Array
    column: Array
    runs: Array
    channel_at: Array


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
    """Spikes row after row.

    Attributes
    ----------
    images, rows : int
        How many.
    level, place : array
        Of each spike: its level, and ``x << 32 | channel``.
    row_start : array
        Flat ``[images, rows, 2]``: where the spikes of a row start and end.
    """

    images: int
    rows: int
    level: Array
    place: Array
    row_start: Array


class SortedSpikes(NamedTuple):
    """Spikes row after row, those of a row by level, falling.

    Attributes
    ----------
    images, rows : int
        How many.
    place : array
        Of each spike, ``x << 32 | channel``.
    row_start : array
        Flat ``[images, rows, 2]``: where the spikes of a row start and end.
    ranks : int
        Up to so many levels of an image, and one place more.
    ranked, distinct : array
        Flat ``[images, ranks]``: levels of an image that occur or are looked at anyway, falling; ``[images]``: how
        many.
    has_starts : bool
        `starts` holds where the spikes of a level begin; else `level` holds each spike's.
    starts : array
        Flat ``[images, rows, ranks]``: where in a row the spikes of a rank start.
    level : array
        Of each spike.
    """

    images: int
    rows: int
    place: Array
    row_start: Array
    ranks: int
    ranked: Array
    distinct: Array
    has_starts: bool
    starts: Array
    level: Array
