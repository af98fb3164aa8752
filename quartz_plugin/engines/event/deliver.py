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
        Up to so many levels of an image are looked at.
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
    if looks_at_all or top <= constants.MOST_BUCKETS:
        stops = np.full(top + 1, looks_at_all)
        stops[bias_stops] = True
    units = sum(level[0].size for level in levels)
    ranks = min(top, units + (top if looks_at_all else len(bias_stops)))
    bytes_of_starts = 0 if stops is None else 8 * plan.rows * (ranks + 1)
    images_together = max(1, constants.EVENT_BYTES // max(1, 20 * units + bytes_of_starts))
    return _Batch(levels, direct, stops, ranks, images_together)


def _sorted_spikes(plan: ChannelPlan, batch: _Batch, images: range) -> SortedSpikes:
    from quartz_plugin.engines.event.kernels import list_spikes, sort_by_level

    most = 1 + len(images) * sum(level[0].size for level in batch.levels)
    row_start = np.zeros(2 * len(images) * plan.rows, np.int64)
    listed = ListedSpikes(len(images), plan.rows, np.empty(most, np.int32), np.empty(most, np.int64), row_start)
    count = first_row = 0
    for level, convolution in zip(batch.levels, plan.convolutions, strict=True):
        count = list_spikes(level, images.start, convolution.first_input, convolution.inputs, count, first_row, listed)
        first_row += level.shape[1]
    if batch.stops is None:
        return _sorted_by_occurring_levels(listed, count, plan.bias.stops)
    spikes = SortedSpikes(
        images=len(images),
        rows=plan.rows,
        place=np.empty(most, np.int64),
        row_start=row_start,
        ranks=batch.ranks + 1,
        ranked=np.empty(len(images) * (batch.ranks + 1), np.int64),
        distinct=np.empty(len(images), np.int64),
        has_starts=True,
        starts=np.empty(len(images) * plan.rows * (batch.ranks + 1), np.int64),
        level=listed.level[:0],
    )
    sort_by_level(listed, batch.stops, spikes)
    return spikes


def _sorted_by_occurring_levels(listed: ListedSpikes, count: int, stops: Array) -> SortedSpikes:
    """Sort each row's spikes by level, falling, in memory that grows with the spikes alone."""
    level, place = listed.level[:count], listed.place[:count]
    first, behind = listed.row_start.reshape(-1, 2).T
    by_place = np.argsort(first, kind="stable")
    counts = (behind - first)[by_place]
    order = np.lexsort((-level, np.repeat(np.arange(len(counts)), counts)))
    image_of = np.repeat(by_place // max(1, listed.rows), counts)
    occurring = [np.unique(np.concatenate([level[image_of == image], stops]))[::-1] for image in range(listed.images)]
    distinct = np.array([len(levels) for levels in occurring], np.int64)
    ranked = np.zeros((listed.images, 1 + max(distinct, default=0)), np.int64)
    for own, levels in zip(ranked, occurring, strict=True):
        own[: len(levels)] = levels
    return SortedSpikes(
        images=listed.images,
        rows=listed.rows,
        place=place[order],
        row_start=listed.row_start,
        ranks=ranked.shape[1],
        ranked=ranked.reshape(-1),
        distinct=distinct,
        has_starts=False,
        starts=np.empty(0, np.int64),
        level=level[order],
    )
