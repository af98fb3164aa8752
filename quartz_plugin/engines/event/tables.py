"""Tables of where the spikes of convolutions go, and their weights as they are walked."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from quartz_plugin.engines.convolutions import Convolution, reached
from quartz_plugin.engines.event import constants
from quartz_plugin.engines.event.constants import LANES
from quartz_plugin.engines.event.records import Array, Synapses, Tiles


def padded(length: int) -> int:
    """Length rounded up to whole vectors."""
    return -(-length // LANES) * LANES


def tiles_of(
    convolutions: list[Convolution], first_output: int, outputs: int, spatial: tuple[int, int], itemsize: int
) -> Tiles:
    """Division of the neurons of `outputs` channels: weights of a block and neurons of a tile stay in caches."""
    height, width = spatial
    block_size = _block_size(outputs, convolutions, itemsize)
    row_length = padded(width * block_size + LANES - 1)
    tile_rows = min(height, max(1, constants.TILE_BYTES // (2 * itemsize * row_length)))
    return Tiles(height, width, first_output, outputs, block_size, tile_rows, row_length)


def _block_size(outputs: int, convolutions: list[Convolution], itemsize: int) -> int:
    """Channels in a block: all, or as many as have weights that fit; groups are not divided."""
    per_channel = sum(c.weight[0].numel() for c in convolutions) * itemsize
    if per_channel * outputs <= constants.WEIGHT_BYTES or any(c.groups > 1 for c in convolutions):
        return outputs
    fitting = max(2 * LANES, constants.WEIGHT_BYTES // per_channel // LANES * LANES)
    blocks = -(-outputs // fitting)
    return padded(-(-outputs // blocks))


def synapses_of(convolutions: list[Convolution], tiles: Tiles, dtype: torch.dtype) -> Synapses:
    """Weights and tables of these convolutions."""
    tables = _Tables(tiles)
    packed = [tables.add(convolution) for convolution in convolutions]
    blocks = -(-tiles.outputs // tiles.block_size)
    weights = torch.cat(packed, 1) if packed else torch.zeros(blocks, 0)
    # Vectors may be read past the last run.
    flat = torch.cat([weights.to(dtype).flatten(), torch.zeros(LANES, dtype=dtype)]).numpy()
    return tables.synapses(flat, weights.shape[1])


class _Tables:
    """Builds tables, one convolution after the other."""

    def __init__(self, tiles: Tiles) -> None:
        self.tiles = tiles
        self.rows = self.weight_start = 0
        self.terms: list[list[int]] = []
        self.reach: list[int] = []
        self.reach_row: list[int] = []
        self.reach_pair: list[int] = [0]
        self.pairs: list[tuple[int, int, int]] = []
        self.column: list[int] = []
        self.runs: list[tuple[int, int, int]] = []
        self.channel_at: list[int] = []

    def add(self, convolution: Convolution) -> Tensor:
        """Enter one convolution; returns its weights as they are walked, ``[blocks, length]``."""
        outputs = self.tiles.outputs
        classes = _classes(convolution)
        size = self.tiles.block_size if convolution.groups == 1 else outputs // convolution.groups
        starts = np.cumsum([0] + [_run_length(len(members), size) for members in classes])
        run_length = int(starts[-1])
        kernel_rows = convolution.kernel[0]
        self.terms.append(
            [
                self.rows,
                self.weight_start,
                kernel_rows * run_length,
                len(self.column),
                len(self.channel_at),
                len(self.reach),
                0 if convolution.groups == 1 else size,
            ]
        )
        self.rows += convolution.source_shape[1]
        self._add_rows(convolution, run_length)
        self._add_columns(convolution, classes, starts, size)
        per_group = convolution.inputs // convolution.groups
        self.channel_at += [(c // per_group) * size if convolution.groups > 1 else 0 for c in range(convolution.inputs)]
        packed = _packed(convolution.weight, convolution.groups, classes, starts, size, outputs)
        self.weight_start += packed.shape[1]
        return packed

    def _add_rows(self, convolution: Convolution, run_length: int) -> None:
        tile_rows = self.tiles.tile_rows
        tables: list[dict[int, list[tuple[int, int, int]]]] = [{} for _ in range(-(-self.tiles.height // tile_rows))]
        for y in range(convolution.source_shape[1]):
            for row, k in reached(convolution, 0, y, self.tiles.height):
                tile = row // tile_rows
                own = row - tile * tile_rows
                pair = (own * self.tiles.row_length, k * run_length, own)
                tables[tile].setdefault(y, []).append(pair)
        for table in tables:
            self.reach.append(len(self.reach_row))
            for y, pairs in table.items():
                self.reach_row.append(y)
                self.pairs += pairs
                self.reach_pair.append(len(self.pairs))
        self.reach.append(len(self.reach_row))

    def _add_columns(self, convolution: Convolution, classes: list[list[int]], starts: Array, size: int) -> None:
        place = {k: (index, at) for index, members in enumerate(classes) for at, k in enumerate(members)}
        for x in range(convolution.source_shape[2]):
            self.column.append(len(self.runs))
            by_class: dict[int, list[tuple[int, int]]] = {}
            for column, k in reached(convolution, 1, x, self.tiles.width):
                index, at = place[k]
                by_class.setdefault(index, []).append((column, at))
            for index, members in by_class.items():
                column, at = min(members)
                first = column * self.tiles.block_size
                self.runs.append((first, int(starts[index]) + at * size, padded(len(members) * size) // LANES))
        self.column.append(len(self.runs))

    def synapses(self, weights: Array, block_length: int) -> Synapses:
        """All tables, int64, and the weights."""
        return Synapses(
            weights=weights,
            block_length=block_length,
            term_count=len(self.terms),
            terms=np.array(self.terms, np.int64).flatten(),
            reach=np.array(self.reach, np.int64),
            reach_row=np.array(self.reach_row, np.int64),
            reach_pair=np.array(self.reach_pair, np.int64),
            pairs=np.array(self.pairs, np.int64).flatten(),
            column=np.array(self.column, np.int64),
            runs=np.array(self.runs, np.int64).flatten(),
            channel_at=np.array(self.channel_at, np.int64),
        )


def _run_length(places: int, size: int) -> int:
    """Length of a run of weights for so many places; what is read behind its end must be zeros.

    At a border it is read from a place within, in whole vectors, which then end behind the end of the run.
    """
    whole = places == 1 or size % LANES == 0
    return padded(places * size + (0 if whole else LANES - 1))


def _classes(convolution: Convolution) -> list[list[int]]:
    """Kernel columns in lists: those of a list reach neighbouring outputs, from left to right."""
    kernel, stride, dilation = convolution.kernel[1], convolution.stride[1], convolution.dilation[1]
    if convolution.groups > 1 or (dilation > 1 if convolution.transposed else stride % dilation):
        return [[k] for k in range(kernel)]
    if convolution.transposed:
        return [list(range(kernel))]
    step = stride // dilation
    return [list(reversed(range(first, kernel, step))) for first in range(min(step, kernel))]


def _packed(weight: Tensor, groups: int, classes: list[list[int]], starts: Array, size: int, outputs: int) -> Tensor:
    """Weights ``[blocks, inputs * KH * run length]``: for an input channel and kernel row, the runs side by side."""
    kernel_rows = weight.shape[2]
    if groups > 1:
        # [groups, outputs, inputs, KH, KW] -> [1, groups * inputs, KH, KW, outputs]
        walked = weight.unflatten(0, (groups, size)).permute(0, 2, 3, 4, 1).flatten(0, 1).unsqueeze(0)
    else:
        blocks = -(-outputs // size)
        whole = torch.nn.functional.pad(weight, (0, 0, 0, 0, 0, 0, 0, blocks * size - outputs))
        walked = whole.unflatten(0, (blocks, size)).permute(0, 2, 3, 4, 1)
    packed = walked.new_zeros(walked.shape[0], walked.shape[1], kernel_rows, int(starts[-1]))
    for members, start in zip(classes, starts[:-1], strict=True):
        runs = walked[:, :, :, members].flatten(3)
        packed[..., start : start + runs.shape[-1]] = runs
    flat: Tensor = packed.flatten(1)
    return flat
