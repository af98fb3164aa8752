"""Neurons that the spikes of a convolution reach: which rows and columns, exactly or with some beyond the borders."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from quartz_plugin.engines.convolutions import Convolution, reached
from quartz_plugin.engines.event import constants
from quartz_plugin.engines.event.constants import LANES

ANYWHERE = 2**40
"""More places than any layer has."""


def padded(length: int, to: int = LANES) -> int:
    """Length rounded up to whole vectors."""
    return -(-length // to) * to


class Run(NamedTuple):
    """Neighbouring neurons that a spike reaches: place of the first in its row, of its weight, and vectors."""

    at: int
    weight: int
    vectors: int


@dataclass(frozen=True)
class Columns:
    """Runs of neurons that spikes of each column of a convolution's source reach, kernel row by kernel row.

    Neurons beyond the borders may be among them, so that many columns are alike: `left` and `right` places more.
    """

    runs: list[list[Run]]
    run_length: int
    left: int
    right: int

    @property
    def vectors(self) -> float:
        """Vectors of a column, on average."""
        return sum(run.vectors for runs in self.runs for run in runs) / max(1, len(self.runs))

    @property
    def kinds(self) -> int:
        """Columns that are not alike."""
        return len({shape_of(runs) for runs in self.runs})


def shape_of(runs: Sequence[Run]) -> tuple[Run, ...]:
    """Runs as seen from the first neuron that they reach."""
    first = min((run.at for run in runs), default=0)
    return tuple(run._replace(at=run.at - first) for run in runs)


def columns_of(convolution: Convolution, width: int, size: int, step: int, beyond: bool) -> Columns:
    """Columns of a convolution: `size` weights of a kernel column, `step` neurons from place to place."""
    classes = kernel_columns(convolution)
    starts = run_starts(classes, size)
    place = {k: (index, at) for index, members in enumerate(classes) for at, k in enumerate(members)}
    runs, columns = [], [0, width - 1]
    for x in range(convolution.source_shape[2]):
        by_class: dict[int, list[tuple[int, int]]] = {}
        for column, k in reached(convolution, 1, x, ANYWHERE if beyond else width, -ANYWHERE if beyond else 0):
            index, at = place[k]
            by_class.setdefault(index, []).append((column, at))
        own = []
        for index, members in by_class.items():
            column, at = min(members)
            columns += [column, max(members)[0]]
            own.append(Run(column * step, starts[index] + at * size, padded(len(members) * size) // LANES))
        runs.append(own)
    return Columns(runs, starts[-1], -min(columns), max(columns) - (width - 1))


@dataclass(frozen=True)
class Rows:
    """Pairs (row of neurons, kernel row) that spikes of each row of a convolution's source reach, for each tile.

    Rows beyond a tile may be among them, so that many are alike: `above` and `below` more.
    """

    pairs: list[list[list[tuple[int, int]]]]
    above: int
    below: int

    @property
    def count(self) -> int:
        """Pairs of all rows."""
        return sum(len(pairs) for of_tile in self.pairs for pairs in of_tile)

    @property
    def kinds(self) -> int:
        """Rows that are not alike, of all tiles."""
        return sum(len({tuple(k for _, k in pairs) for pairs in of_tile if pairs}) for of_tile in self.pairs)


def rows_of(convolution: Convolution, height: int, tile_rows: int, beyond: bool) -> Rows:
    """Rows of a convolution, those of neurons counted in their tile."""
    pairs, above, below = [], 0, 0
    for first in range(0, height, tile_rows):
        last = min(first + tile_rows, height)
        of_tile = []
        for y in range(convolution.source_shape[1]):
            own = reached(convolution, 0, y, last, first)
            if own and beyond:
                own = reached(convolution, 0, y, ANYWHERE, -ANYWHERE)
            of_tile.append(sorted((row - first, k) for row, k in own))
            above = max([above, *(-row for row, _ in of_tile[-1])])
            below = max([below, *(row + 1 - tile_rows for row, _ in of_tile[-1])])
        pairs.append(of_tile)
    return Rows(pairs, above, below)


def cheaper_rows(convolution: Convolution, columns: Columns, height: int, tile_rows: int, window: int) -> Rows:
    """Rows that are all alike but for neurons beyond the tile, unless exact ones cost less vectors and time."""
    exact, alike = (rows_of(convolution, height, tile_rows, beyond) for beyond in (False, True))
    spikes = convolution.inputs * convolution.source_shape[2] / 2
    saved = spikes * columns.vectors * (alike.count - exact.count)
    visits = min(window, spikes) * columns.kinds * (exact.kinds - alike.kinds)
    return exact if saved > constants.VISIT * visits or is_by_place(convolution, window) else alike


def is_by_place(convolution: Convolution, window: int) -> bool:
    """True where so many spikes of a level come from each of few places that each is a kind of its own."""
    _, height, width = convolution.source_shape
    few = height * width <= constants.FEW_PLACES and convolution.groups == 1
    return few and convolution.inputs / 2 >= constants.MANY_SPIKES * window


def cheaper_columns(convolution: Convolution, spatial: tuple[int, int], size: int, step: int, window: int) -> Columns:
    """Columns that are all alike but for neurons beyond the borders, unless exact ones cost less vectors and time."""
    exact, alike = (columns_of(convolution, spatial[1], size, step, beyond) for beyond in (False, True))
    channels, height, width = convolution.source_shape
    rows = [reached(convolution, 0, y, spatial[0]) for y in range(height)]
    spikes = channels * height * width / 2
    saved = spikes * (alike.vectors - exact.vectors) * sum(map(len, rows)) / max(1, height)
    visits = min(window, spikes) * len({len(row) for row in rows}) * (exact.kinds - alike.kinds)
    return exact if saved > constants.VISIT * visits else alike


def run_starts(classes: list[list[int]], size: int) -> list[int]:
    """Where the run of each class of kernel columns starts in a kernel row, and where the last ends."""
    starts = [0]
    for members in classes:
        starts.append(starts[-1] + _run_length(len(members), size))
    return starts


def _run_length(places: int, size: int) -> int:
    """Length of a run of weights for so many places; what is read behind its end must be zeros.

    At a border it is read from a place within, in whole vectors, which then end behind the end of the run.
    """
    whole = places == 1 or size % LANES == 0
    return padded(places * size + (0 if whole else LANES - 1))


def kernel_columns(convolution: Convolution) -> list[list[int]]:
    """Kernel columns in lists: those of a list reach neighbouring outputs, from left to right."""
    kernel, stride, dilation = convolution.kernel[1], convolution.stride[1], convolution.dilation[1]
    if convolution.groups > 1 or (dilation > 1 if convolution.transposed else stride % dilation):
        return [[k] for k in range(kernel)]
    if convolution.transposed:
        return [list(range(kernel))]
    step = stride // dilation
    return [list(reversed(range(first, kernel, step))) for first in range(min(step, kernel))]
