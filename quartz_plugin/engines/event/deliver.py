"""Delivery of a batch's spikes to a range of channels: they are sorted and given to a kernel, some images at a time."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from quartz_plugin.engines.event import constants
from quartz_plugin.engines.event.constants import LEAST_CHANGE
from quartz_plugin.engines.event.plan import ChannelPlan
from quartz_plugin.engines.event.records import Array, ListedSpikes, SortedSpikes


def fire_range(plan: ChannelPlan, source_levels: list[Array], out: Array, threads: int) -> None:
    """Write the levels of the range's neurons into ``out [B, H, W, C]``, given those of each of the plan's sources."""
    from quartz_plugin.engines.event.kernels import fire

    _in_jobs(plan, source_levels, out.reshape(len(out), *plan.spatial, plan.channels), fire, plan.neurons, threads)


def count_changes_in_range(plan: ChannelPlan, source_levels: list[Array], changes: Array, threads: int) -> None:
    """Add to ``changes [B]`` the neuron-steps of the range in which currents change."""
    from quartz_plugin.engines.event.kernels import count_changes

    _in_jobs(plan, source_levels, changes, count_changes, (plan.neurons.last_level, LEAST_CHANGE), threads)


def _in_jobs(
    plan: ChannelPlan, source_levels: list[Array], result: Array, kernel: Any, options: tuple[Any, ...], threads: int
) -> None:
    """Let a kernel add to ``result [B, ...]`` what the sources' spikes do."""
    if len(result) == 0:
        return
    batch = _batch_of(plan, source_levels)
    images = min(batch.images_together, -(-len(result) // threads))
    jobs = [
        partial(_run_job, plan, batch, range(start, min(start + images, len(result))), result, kernel, options)
        for start in range(0, len(result), images)
    ]
    run_jobs(jobs, threads)


def _run_job(
    plan: ChannelPlan, batch: _Batch, images: range, result: Array, kernel: Any, options: tuple[Any, ...]
) -> None:
    spikes = _sorted_spikes(plan, batch, images)
    direct = plan.direct if plan.direct_convolution is None else plan.direct._replace(levels=batch.direct.reshape(-1))
    kernel(result, images.start, plan.tiles, plan.synapses, direct, plan.bias, spikes, options)


def run_jobs(jobs: Sequence[Callable[[], None]], threads: int) -> None:
    """Run all jobs, several threads sharing them."""
    if threads == 1 or len(jobs) == 1:
        for job in jobs:
            job()
        return
    with ThreadPoolExecutor(threads) as pool:
        for done in [pool.submit(job) for job in jobs]:
            done.result()


class _Scratch(threading.local):
    """Memory of a thread that jobs use one after the other: to ask the system for it anew takes longer than to sort."""

    def __init__(self) -> None:
        self.arrays: dict[str, Array] = {}

    def take(self, name: str, size: int) -> Array:
        """Numbers of any value, int64, where those of this name were before."""
        if size > constants.KEPT_NUMBERS:
            return np.empty(size, np.int64)
        if name not in self.arrays or len(self.arrays[name]) < size:
            self.arrays[name] = np.empty(size, np.int64)
        return self.arrays[name][:size]


_SCRATCH = _Scratch()


class _Batch(NamedTuple):
    """Levels of a batch's sources, and how many images go together.

    Attributes
    ----------
    levels : list of array
        Of the sources of each convolution, ``[B, H, W, C]``.
    direct : array
        Of the source of the direct convolution, ``[B, units]``.
    images_together : int
        Images whose sorted spikes fit into a cache.
    """

    levels: list[Array]
    direct: Array
    images_together: int


def _batch_of(plan: ChannelPlan, source_levels: list[Array]) -> _Batch:
    levels = [
        level.reshape(len(level), *c.source_shape[1:], c.source_shape[0])
        for level, c in zip(source_levels, plan.convolutions, strict=False)
    ]
    direct = source_levels[-1] if plan.direct_convolution is not None else np.zeros((len(source_levels[0]), 0))
    units, window = sum(level[0].size for level in levels), plan.neurons.window
    bytes_of_starts = 8 * plan.routes.tile_count * min(units, window) * (plan.routes.class_count + 2)
    # Weights of several blocks come from afar for each job, as spikes of many images do.
    room = constants.EVENT_BYTES * (1 if plan.tiles.outputs <= plan.tiles.block_size else 8)
    images_together = max(1, room // max(1, 16 * units + bytes_of_starts))
    return _Batch(levels, direct.reshape(len(direct), -1), images_together)


def _sorted_spikes(plan: ChannelPlan, batch: _Batch, images: range) -> SortedSpikes:
    from quartz_plugin.engines.event.kernels import list_spikes, sort_spikes

    routes, bias_stops, own = plan.routes, plan.bias.stops, slice(images.start, images.stop)
    top = max([int(level[own].max()) for level in (*batch.levels, batch.direct) if level.size] + [*bias_stops[:1], 0])
    rows = sum(len(images) * level.shape[1] for level in batch.levels)
    most = 1 + len(images) * sum(level[0].size for level in batch.levels)
    listed = ListedSpikes(len(images), _SCRATCH.take("listed", most), _SCRATCH.take("rows", rows + 1))
    listed.start[0] = 0
    count = row = 0
    for term, level in enumerate(batch.levels):
        count = list_spikes(level, images.start, term, count, row, listed, routes)
        row += len(images) * level.shape[1]
    if plan.direct_convolution is not None:
        level_of, stops = np.arange(top + 1), np.ones(top + 1, np.bool_)
    elif top * routes.class_count <= constants.MOST_BUCKETS:
        level_of, stops = np.arange(top + 1), np.zeros(top + 1, np.bool_)
        stops[bias_stops] = True
    else:
        level_of, stops = _occurring_levels(listed, count, routes.class_count, bias_stops)
    ranks = min(len(stops) - 1, most + (top if plan.direct_convolution is not None else len(bias_stops)))
    tiles = len(images) * routes.tile_count
    spikes = SortedSpikes(
        images=len(images),
        tiles=routes.tile_count,
        classes=routes.class_count,
        lazy=routes.lazy,
        spikes=_SCRATCH.take("spikes", 1 + count * plan.most_tiles),
        ranks=ranks,
        ranked=_SCRATCH.take("ranked", tiles * ranks + 1),
        distinct=_SCRATCH.take("distinct", tiles),
        starts=_SCRATCH.take("starts", tiles * (ranks * routes.class_count + 1) + routes.class_count),
        touched=_SCRATCH.take("touched", tiles * ranks + 1 if routes.lazy else 0),
    )
    sort_spikes(listed, routes, level_of, stops, spikes)
    return spikes


def _occurring_levels(listed: ListedSpikes, count: int, classes: int, bias_stops: Array) -> tuple[Array, Array]:
    """Levels that occur, rising, behind a 0, and which of them are looked at anyway; they are listed by their place."""
    spikes = listed.spikes[:count]
    level = (spikes >> constants.UNIT_BITS) // classes
    level_of = np.unique(np.concatenate([np.zeros(1, np.int64), level, bias_stops]))
    spikes += ((np.searchsorted(level_of, level) - level) * classes) << constants.UNIT_BITS
    return level_of, np.isin(level_of, bias_stops)
