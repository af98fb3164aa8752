"""Delivery of a batch's spikes to a range of channels: they are sorted and given to a kernel, some images at a time."""

from __future__ import annotations

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
    direct = plan.direct if plan.direct_convolution is None else plan.direct._replace(levels=batch.direct)
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


class _Batch(NamedTuple):
    """Levels of a batch's sources, and how their spikes are sorted.

    Attributes
    ----------
    levels : list of array
        Of the sources of each convolution, ``[B, H, W, C]``.
    direct : array
        Of the source of the direct convolution, flat.
    stops : array or None
        For each level, whether it is looked at anyway; None: there are too many levels for that, and for buckets.
    ranks : int
        Up to so many levels of a tile are looked at.
    images_together : int
        Images whose sorted spikes fit into a cache.
    """

    levels: list[Array]
    direct: Array
    stops: Array | None
    ranks: int
    images_together: int


def _batch_of(plan: ChannelPlan, source_levels: list[Array]) -> _Batch:
    levels = [
        level.reshape(len(level), *c.source_shape[1:], c.source_shape[0])
        for level, c in zip(source_levels, plan.convolutions, strict=False)
    ]
    looks_at_all, bias_stops = plan.direct_convolution is not None, plan.bias.stops
    direct = source_levels[-1].reshape(-1) if looks_at_all else plan.direct.levels
    top = max([int(level.max()) for level in source_levels if level.size] + [*bias_stops[:1], 0])
    stops = None
    if looks_at_all or top * max(1, plan.routes.class_count) <= constants.MOST_BUCKETS:
        stops = np.full(top + 1, looks_at_all)
        stops[bias_stops] = True
    units = sum(level[0].size for level in levels)
    ranks = min(top, units + (top if looks_at_all else len(bias_stops)))
    bytes_of_starts = 8 * plan.routes.tile_count * ranks * (plan.routes.class_count + 2)
    # Weights of several blocks come from afar for each job, as spikes of many images do.
    room = constants.EVENT_BYTES * (1 if plan.tiles.outputs <= plan.tiles.block_size else 8)
    images_together = max(1, room // max(1, 16 * units + bytes_of_starts))
    return _Batch(levels, direct, stops, ranks, images_together)


def _sorted_spikes(plan: ChannelPlan, batch: _Batch, images: range) -> SortedSpikes:
    from quartz_plugin.engines.event.kernels import list_spikes, sort_spikes

    rows = sum(len(images) * level.shape[1] for level in batch.levels)
    most = 1 + len(images) * sum(level[0].size for level in batch.levels)
    listed = ListedSpikes(len(images), np.empty(most, np.int64), np.zeros(rows + 1, np.int64))
    count = row = 0
    for term, level in enumerate(batch.levels):
        count = list_spikes(level, images.start, term, count, row, listed, plan.routes)
        row += len(images) * level.shape[1]
    routes, level_of, stops, ranks = plan.routes, np.arange(0), batch.stops, batch.ranks
    if stops is None:
        level_of, stops = _occurring_levels(listed, count, plan.bias.stops)
        ranks = len(stops) - 1
    else:
        level_of = np.arange(len(stops))
    tiles = len(images) * routes.tile_count
    spikes = SortedSpikes(
        images=len(images),
        tiles=routes.tile_count,
        classes=routes.class_count,
        lazy=routes.lazy,
        spikes=np.empty(1 + count * plan.most_tiles, np.int64),
        ranks=ranks,
        ranked=np.empty(tiles * ranks + 1, np.int64),
        distinct=np.empty(tiles, np.int64),
        starts=np.empty(tiles * (ranks * routes.class_count + 1) + routes.class_count, np.int64),
        touched=np.empty(tiles * ranks + 1 if routes.lazy else 0, np.int64),
    )
    sort_spikes(listed, routes, level_of, stops, spikes)
    return spikes


def _occurring_levels(listed: ListedSpikes, count: int, bias_stops: Array) -> tuple[Array, Array]:
    """Levels that occur, rising, behind a 0, and which of them are looked at anyway; they are listed by their place."""
    spikes = listed.spikes[:count]
    level = spikes >> constants.UNIT_BITS
    level_of = np.unique(np.concatenate([np.zeros(1, np.int64), level, bias_stops]))
    spikes += (np.searchsorted(level_of, level) - level) << constants.UNIT_BITS
    return level_of, np.isin(level_of, bias_stops)
