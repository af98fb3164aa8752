"""Tables of where the spikes of convolutions go, and their weights as they are walked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from quartz_plugin.engines.convolutions import Convolution
from quartz_plugin.engines.event import constants
from quartz_plugin.engines.event.constants import GROUP, LANES, MOST_VECTORS, REGISTERS, UNIT_BITS
from quartz_plugin.engines.event.reach import (
    ANYWHERE,
    Columns,
    Rows,
    Run,
    cheaper_columns,
    cheaper_rows,
    is_by_place,
    kernel_columns,
    padded,
    run_starts,
    shape_of,
)
from quartz_plugin.engines.event.records import Array, Routes, Synapses, Tiles

NOWHERE = -(2**62)
"""Kind of spikes that reach nothing: lower than any level makes up for."""


class Layout(NamedTuple):
    """Places of a range's neurons, and how the columns and rows of each of its convolutions reach them."""

    tiles: Tiles
    columns: list[Columns]
    rows: list[Rows]


def layout_of(
    convolutions: list[Convolution],
    first_output: int,
    outputs: int,
    spatial: tuple[int, int],
    itemsize: int,
    window: int,
) -> Layout:
    """Division of the neurons of `outputs` channels: weights of a block and neurons of a tile stay in caches."""
    height, width = spatial
    block_size = _block_size(outputs, convolutions, itemsize)
    columns = [cheaper_columns(c, spatial, group_size(c, block_size), block_size, window) for c in convolutions]
    left = padded(max([each.left for each in columns], default=0) * block_size)
    right = max([each.right for each in columns], default=0) * block_size
    lanes = padded(width * block_size, GROUP * LANES)
    row_length = padded(left + max(lanes, width * block_size + right + LANES - 1))
    tile_rows = min(height, 62, max(1, constants.TILE_BYTES // (2 * itemsize * row_length)))
    rows = [cheaper_rows(c, own, height, tile_rows, window) for c, own in zip(convolutions, columns, strict=True)]
    above, below = (max([getattr(each, side) for each in rows], default=0) for side in ("above", "below"))
    tiles = Tiles(
        height, width, first_output, outputs, block_size, tile_rows,
        first=above * row_length + left, row_length=row_length, lanes=lanes,
        size=(above + tile_rows + below) * row_length,
    )  # fmt: skip
    return Layout(tiles, columns, rows)


def group_size(convolution: Convolution, block_size: int) -> int:
    """Output channels that one spike reaches at a place."""
    return block_size if convolution.groups == 1 else convolution.outputs // convolution.groups


def _block_size(outputs: int, convolutions: list[Convolution], itemsize: int) -> int:
    """Channels in a block: all, or as many as have weights that fit; groups are not divided."""
    # Channels that no synapse reaches have none.
    per_channel = max(1, sum(c.weight[0].numel() for c in convolutions)) * itemsize
    widest = max((c.kernel[1] for c in convolutions), default=1)
    most = constants.RUN_VECTORS * LANES // widest
    if (outputs <= most and per_channel * outputs <= constants.WEIGHT_BYTES) or any(
        c.groups > 1 and not c.depthwise for c in convolutions
    ):
        return outputs
    room = constants.WEIGHT_BYTES * (2 if widest == 1 else 1)
    fitting = max(constants.LEAST_CHANNELS, min(room // per_channel, most) // LANES * LANES)
    blocks = -(-outputs // fitting)
    return padded(-(-outputs // blocks))


class Tables(NamedTuple):
    """All that the kernels take of convolutions."""

    routes: Routes
    synapses: Synapses


def tables_of(convolutions: list[Convolution], layout: Layout, window: int, dtype: torch.dtype) -> Tables:
    """Weights and tables of these convolutions."""
    builder = _Builder(layout.tiles, window)
    packed = [builder.add(*each) for each in zip(convolutions, layout.columns, layout.rows, strict=True)]
    weights = torch.cat(packed, 1) if packed else torch.zeros(builder.blocks, 0)
    # Vectors may be read past the last run.
    flat = torch.cat([weights.to(dtype).flatten(), torch.zeros(LANES, dtype=dtype)]).numpy()
    spikes_of_a_row = max((c.source_shape[0] * c.source_shape[2] / 2 for c in convolutions), default=0)
    lazy = builder.tile_count * layout.tiles.tile_rows > 1 and spikes_of_a_row < constants.FEW_SPIKES * window
    return Tables(builder.routes(lazy), builder.synapses(flat, weights.shape[1]))


class _Builder:
    """Builds tables, one convolution after the other."""

    def __init__(self, tiles: Tiles, window: int) -> None:
        self.tiles, self.window = tiles, window
        self.blocks = -(-tiles.outputs // tiles.block_size)
        self.tile_count = -(-tiles.height // tiles.tile_rows)
        self.weight_start = 0
        self.terms: list[list[int]] = []
        self.rows: list[tuple[int, int, int]] = []
        self.unit_class: list[Array] = []
        self.unit_place: list[Array] = []
        self.unit_count = 0
        self.class_block: list[int] = []
        self.class_groups: list[int] = [0]
        self.groups: list[tuple[int, int, int, int]] = []
        self.runs: list[tuple[int, int]] = []

    def add(self, convolution: Convolution, columns: Columns, rows_reached: Rows) -> Tensor:
        """Enter one convolution; returns its weights as they are walked, ``[blocks, length]``."""
        size = group_size(convolution, self.tiles.block_size)
        height = convolution.source_shape[1]
        self.terms.append([height, convolution.first_input, convolution.inputs, self.unit_count, len(self.rows)])
        divided = convolution.groups > 1 and self.blocks > 1
        channel_kinds = self.blocks if divided else 1
        first_class = len(self.class_block)
        by_place = is_by_place(convolution, self.window)
        row_kinds, rows = self._kinds_of(rows_reached, by_place)
        column_kinds: dict[tuple[int, tuple[Run, ...]], int] = {}
        shapes = [(x if by_place else 0, shape_of(runs)) for x, runs in enumerate(columns.runs)]
        for x, shape in shapes:
            if shape:
                column_kinds.setdefault((x, shape), len(column_kinds))
        per_row = len(column_kinds) * channel_kinds
        by_tile = [[kind for kind, _, _ in rows[first : first + height]] for first in range(0, len(rows), height)]
        for kind, at, mask in rows:
            self.rows.append((-1 if kind < 0 else first_class + kind * per_row, at, mask))
        kind_at = [(column_kinds[shape] * channel_kinds if shape[1] else ANYWHERE) for shape in shapes]
        neuron_at = [self.tiles.first + min((run.at for run in runs), default=0) for runs in columns.runs]
        single = convolution.groups > 1 and size == 1
        for kind, (_, pairs) in enumerate(row_kinds):
            row_is_alone = all(tile.count(kind) <= 1 for tile in by_tile)
            for column in column_kinds:
                alone = convolution.groups == 1 and row_is_alone and shapes.count(column) == 1
                for block in range(channel_kinds):
                    self.class_block.append(block if divided else -1)
                    self._add_class(pairs, column[1], columns.run_length, single, alone)

        packed = _packed(convolution, size, self.blocks, self.tiles.block_size, columns.run_length)
        stride = convolution.kernel[0] * columns.run_length
        self._add_units(convolution, size, stride, np.array(kind_at), np.array(neuron_at))
        self.weight_start += packed.shape[1]
        return packed

    def _kinds_of(
        self, rows_reached: Rows, by_place: bool
    ) -> tuple[dict[tuple[int, tuple[tuple[int, int], ...]], int], list[tuple[int, int, int]]]:
        """Kinds of rows, each with its (row, kernel row), and for each row of each tile its kind, place and mask."""
        kinds: dict[tuple[int, tuple[tuple[int, int], ...]], int] = {}
        rows = []
        for y, pairs in ((y, pairs) for of_tile in rows_reached.pairs for y, pairs in enumerate(of_tile)):
            if not pairs:
                rows.append((-1, 0, 0))
                continue
            top = pairs[0][0]
            alike = (y if by_place else 0, tuple((row - top, k) for row, k in pairs))
            mask = sum(1 << row for row, _ in pairs if 0 <= row < self.tiles.tile_rows)
            rows.append((kinds.setdefault(alike, len(kinds)), top * self.tiles.row_length, mask))
        return kinds, rows

    def _add_class(
        self, rows: Sequence[tuple[int, int]], columns: Sequence[Run], run_length: int, single: bool, alone: bool
    ) -> None:
        """Enter a kind of spikes: its runs, those of one length together.

        `single`: a run is one neuron; `alone`: all spikes come from one place.
        """
        by_vectors: dict[int, list[tuple[int, int]]] = {}
        most = REGISTERS if alone else MOST_VECTORS
        for row, k in rows:
            for run in columns:
                parts = -(-run.vectors // most)
                for part in range(parts):
                    first, last = (run.vectors * each // parts for each in (part, part + 1))
                    at = row * self.tiles.row_length + run.at + first * LANES
                    by_vectors.setdefault(0 if single else last - first, []).append(
                        (at, k * run_length + run.weight + first * LANES)
                    )
        for vectors, runs in by_vectors.items():
            self.groups.append((len(self.runs), len(self.runs) + len(runs), vectors, int(alone)))
            self.runs += runs
        self.class_groups.append(len(self.groups))

    def _add_units(self, convolution: Convolution, size: int, stride: int, kind: Array, neuron: Array) -> None:
        """Enter each unit of a row: its kind, its first neuron, its weights; of columns there are the first two."""
        channel = np.arange(convolution.inputs)
        block, at = np.zeros_like(channel), np.zeros_like(channel)
        if convolution.groups > 1:
            of_group = convolution.inputs // convolution.groups
            block, at = np.divmod(channel // of_group * size, self.tiles.block_size)
            channel = channel - block * (self.tiles.block_size // size * of_group)
        kinds = kind[:, None] + (block if self.blocks > 1 else 0)
        self.unit_class.append(np.where(kinds < ANYWHERE, np.broadcast_to(kinds, (len(kind), len(channel))), NOWHERE))
        weight = self.weight_start + channel * stride
        self.unit_place.append((weight << UNIT_BITS) | (neuron[:, None] + at))
        self.unit_count += len(kind) * len(channel)

    def routes(self, lazy: bool) -> Routes:
        """Tables that spikes are sorted by."""
        rows = np.array(self.rows, np.int64).reshape(-1, 3).T.copy()
        nothing = np.zeros(0, np.int64)
        return Routes(
            term_count=len(self.terms),
            terms=np.array(self.terms, np.int64).flatten(),
            class_count=len(self.class_block),
            tile_count=self.tile_count,
            lazy=lazy,
            row_class=rows[0],
            row_at=rows[1],
            row_mask=rows[2],
            unit_class=np.concatenate([nothing, *(each.flatten() for each in self.unit_class)]),
            unit_place=np.concatenate([nothing, *(each.flatten() for each in self.unit_place)]),
        )

    def synapses(self, weights: Array, block_length: int) -> Synapses:
        """Tables that spikes are delivered by, and the weights."""
        return Synapses(
            weights=weights,
            block_length=block_length,
            class_block=np.array(self.class_block, np.int64),
            class_groups=np.array(self.class_groups, np.int64),
            groups=np.array(self.groups, np.int64).flatten(),
            runs=np.array(self.runs, np.int64).flatten(),
        )


def _packed(convolution: Convolution, size: int, blocks: int, block_size: int, run_length: int) -> Tensor:
    """Weights ``[blocks, inputs * KH * run length]``: for an input channel and kernel row, the runs side by side."""
    weight, groups, classes = convolution.weight, convolution.groups, kernel_columns(convolution)
    starts = run_starts(classes, size)
    if groups > 1:
        # [groups, outputs, inputs, KH, KW] -> [blocks, groups * inputs, KH, KW, outputs]
        of_block = block_size // size
        walked = weight.unflatten(0, (groups, size)).permute(0, 2, 3, 4, 1)
        walked = torch.nn.functional.pad(walked, (0, 0) * 4 + (0, blocks * of_block - groups))
        walked = walked.unflatten(0, (blocks, of_block)).flatten(1, 2)
    else:
        whole = torch.nn.functional.pad(weight, (0, 0, 0, 0, 0, 0, 0, blocks * size - len(weight)))
        walked = whole.unflatten(0, (blocks, size)).permute(0, 2, 3, 4, 1)
    packed = walked.new_zeros(walked.shape[0], walked.shape[1], weight.shape[2], run_length)
    for members, start in zip(classes, starts[:-1], strict=True):
        runs = walked[:, :, :, members].flatten(3)
        packed[..., start : start + runs.shape[-1]] = runs
    flat: Tensor = packed.flatten(1)
    return flat
