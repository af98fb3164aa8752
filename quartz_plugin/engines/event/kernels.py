"""Compiled loops of the event engine (numba): list and sort spikes, let them arrive, advance the membranes between.

A tile of neurons (some rows of a channel block) keeps its currents and membranes in the first-level cache. What
Python calls holds the arrays; what it calls in turn has pointers to them (see :func:`as_pointers`).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numba import njit
from numba.extending import overload

from quartz_plugin.compiled import compiled_with
from quartz_plugin.engines.event import constants, vectors
from quartz_plugin.engines.event.constants import GROUP, LANES, LINE, UNIT_BITS, UNIT_MASK
from quartz_plugin.engines.event.vectors import (
    add_arriving,
    advance,
    as_pointers,
    collect,
    copy,
    count_changed,
    deliver,
    lowest_bit,
    pointer_at,
    round_to_levels,
)

compiled = compiled_with(constants, vectors)
inlined = njit(nogil=True, forceinline=True)
"""For what runs for each row and level, where a call would cost more than what it does."""


@compiled
def list_spikes(levels: Any, image: int, term: int, at: int, row: int, listed: Any, routes: Any) -> int:
    """List the spikes of some images from `image` on, row after row; returns where the next are listed.

    `levels` is ``[B, rows, columns, C]``, the source of this term. `at` is where the first spike is listed, `row`
    where its row's start is.
    """
    size = levels.shape[2] * levels.shape[3]
    source = _Source(levels[image : image + listed.images].reshape(-1), levels.shape[1], size, levels.shape[3])
    count: int = _list_rows(source, term, at, row, listed, routes)
    return count


@compiled
def _list_rows(held: Any, term: int, at: int, row: int, held_list: Any, held_routes: Any) -> int:
    source, listed, routes = as_pointers(held), as_pointers(held_list), as_pointers(held_routes)
    channels, unit_at, classes = routes.terms[5 * term + 2], routes.terms[5 * term + 3], routes.class_count
    for place in range(0, listed.images * source.rows * source.row_length, source.row_length):
        listed.start[row] = at
        row += 1
        unit = unit_at
        for first in range(place, place + source.row_length, source.channels):
            first += routes.terms[5 * term + 1]
            for index in range(first, first + channels):
                level: Any = np.int64(source.levels[index])
                key = level * classes + routes.unit_class[unit]
                listed.spikes[at] = (key << UNIT_BITS) | unit
                # A place is kept only where there is a spike; without a branch, since spikes are unpredictable.
                at += key >= classes
                unit += 1
    listed.start[row] = at
    return at


class _Source(NamedTuple):
    """Levels of the source of a convolution, flat; rows of an image, units of a row and of a place."""

    levels: Any
    rows: int
    row_length: int
    channels: int


@compiled
def sort_spikes(listed: Any, routes: Any, level_of: Any, stops: Any, spikes: Any) -> None:
    """Sort the spikes that reach each tile by level, falling, and kind (a counting sort), into `spikes`.

    Listed levels are places in `level_of`; those set in `stops` count as levels that occur.
    """
    count = np.zeros(len(stops) * routes.class_count, np.int64)
    _sort_tiles(listed, routes, level_of, stops, spikes, count, np.zeros(len(stops), np.int64))


@compiled
def _sort_tiles(
    held_list: Any, held_routes: Any, level_of: Any, stops: Any, held: Any, held_count: Any, held_rank: Any
) -> None:
    listed, routes, spikes = as_pointers(held_list), as_pointers(held_routes), as_pointers(held)
    counts = as_pointers(_Counts(held_count, held_rank))
    count, rank_at = counts.number, counts.rank_at
    classes, keys, at = routes.class_count, len(held_count), 0
    for b in range(listed.images):
        for tile in range(routes.tile_count):
            own = b * routes.tile_count + tile
            first, ranks_at = own * (spikes.ranks * classes + 1), own * spikes.ranks
            _walk_spikes(listed, routes, spikes, (b, tile, ranks_at, -1), count, rank_at)
            rank = 0
            for level in range(len(stops) - 1, 0, -1):
                begin, key = at, level * classes
                for kind in range(classes):
                    spikes.starts[first + rank * classes + kind] = at
                    number, count[key + kind] = count[key + kind], at
                    at += number
                if at > begin or stops[level]:
                    spikes.ranked[ranks_at + rank] = level_of[level]
                    rank_at[level] = rank
                    if routes.lazy:
                        spikes.touched[ranks_at + rank] = 0
                    rank += 1
            spikes.starts[first + rank * classes] = at
            spikes.distinct[own] = rank
            _walk_spikes(listed, routes, spikes, (b, tile, ranks_at, 1), count, rank_at)
            for key in range(keys):
                count[key] = 0


@inlined
def _walk_spikes(listed: Any, routes: Any, spikes: Any, where: Any, count: Any, rank_at: Any) -> None:
    """Count the spikes that reach a tile, or write them to their places, by level and kind.

    `where` is the image, the tile, the first rank of its levels, and above 0 to write.
    """
    b, tile, ranks_at, writes = where
    classes, first_place, lazy = routes.class_count, 0, routes.lazy
    for term in range(routes.term_count):
        height, rows = routes.terms[5 * term], routes.terms[5 * term + 4] + tile * routes.terms[5 * term]
        for y in range(height):
            kind, at, mask = routes.row_class[rows + y], routes.row_at[rows + y], routes.row_mask[rows + y]
            if kind < 0:
                continue
            place = first_place + b * height + y
            for spike in range(listed.start[place], listed.start[place + 1]):
                listed_spike = listed.spikes[spike]
                key = (listed_spike >> UNIT_BITS) + kind
                to = count[key]
                count[key] = to + 1
                if writes > 0:
                    spikes.spikes[to] = at + routes.unit_place[listed_spike & UNIT_MASK]
                    if lazy:
                        spikes.touched[ranks_at + rank_at[key // classes]] |= mask
        first_place += listed.images * height


class _Counts(NamedTuple):
    """Numbers of spikes by level and kind, and the rank of each level."""

    number: Any
    rank_at: Any


@inlined
def _zeros(size: int, like: Any) -> Any:
    """Zeros of a type, the first at the start of a cache line: vectors that lie in two are slow."""
    itemsize = like.itemsize
    whole = np.zeros(size + LINE // itemsize, like.dtype)
    first = -(whole.ctypes.data // itemsize) % (LINE // itemsize)
    return whole[first : first + size]


class _Tile(NamedTuple):
    """A tile: of which image (of the batch, of the job), in which block (its channels), from which row on."""

    image: int
    own_image: int
    block: int
    channels: int
    number: int
    first_row: int
    rows: int


class _Membranes(NamedTuple):
    """Neurons of a tile that fire: currents, level up to which membranes have advanced, early spikes, levels."""

    i: Any
    since: Any
    v: Any
    fired: Any
    fired_level: Any
    levels: Any
    theta: Any
    window: int


class _Currents(NamedTuple):
    """Neurons of a tile whose changes are counted: currents, level since which they are so, those before."""

    i: Any
    since: Any
    before: Any
    one: Any
    least: Any


class _Output(NamedTuple):
    """Levels ``[B, H, W, C]``, flat, and how many channels."""

    levels: Any
    channels: int


@compiled
def fire(
    out: Any, first_image: int, tiles: Any, synapses: Any, direct: Any, bias: Any, spikes: Any, neurons: Any
) -> None:
    """Let the spikes of some images arrive at the neurons of a range of channels; write their levels.

    ``out`` is ``[B, H, W, C]``, `first_image` the first of them there; the other parameters are those of
    :mod:`quartz_plugin.engines.event.records`.
    """
    weights, size = synapses.weights, tiles.size
    state = _Membranes(
        _zeros(size, weights),
        np.zeros(tiles.tile_rows, np.int64),
        _zeros(size, weights),
        np.zeros(size, np.int64),
        np.zeros(size, np.int64),
        _zeros(size, weights),
        weights.dtype.type(neurons.theta),
        neurons.window,
    )
    output = _Output(out.reshape(-1), out.shape[3])
    _fire_blocks(output, first_image, state, tiles, synapses, (direct, bias), spikes, neurons)


@compiled
def count_changes(
    changes: Any, first_image: int, tiles: Any, synapses: Any, direct: Any, bias: Any, spikes: Any, readout: Any
) -> None:
    """Let spikes arrive as :func:`fire` does, and count the neuron-steps in which currents change, readout included.

    They are added to ``changes [B]``. `readout` is ``(last_level, least_change)``.
    """
    weights, size = synapses.weights, tiles.size
    last_level, least_change = readout
    state = _Currents(
        _zeros(size, weights),
        np.zeros(tiles.tile_rows, np.int64),
        _zeros(size, weights),
        weights.dtype.type(1),
        weights.dtype.type(least_change),
    )
    _count_in_blocks(changes, first_image, state, tiles, synapses, (direct, bias), spikes, last_level)


@compiled
def _fire_blocks(
    held_output: Any,
    first_image: int,
    held_state: Any,
    tiles: Any,
    held_synapses: Any,
    others: Any,
    held: Any,
    neurons: Any,
) -> None:
    output, state, synapses, spikes = (
        as_pointers(held_output), as_pointers(held_state), as_pointers(held_synapses), as_pointers(held),
    )  # fmt: skip
    direct, bias = as_pointers(others[0]), as_pointers(others[1])
    v, levels = state.v, state.levels
    for block in range((tiles.outputs + tiles.block_size - 1) // tiles.block_size):
        for b in range(spikes.images):
            for number in range((tiles.height + tiles.tile_rows - 1) // tiles.tile_rows):
                tile = _tile_of(tiles, first_image, b, block, number)
                _begin(state, tile, tiles, spikes)
                _begin_membranes(v, tile, tiles)
                early = _arrive(state, tile, tiles, synapses, direct, bias, spikes)
                for row in range(tile.rows):
                    if state.since[row] > 0:
                        early = _advance_row(state, tiles, row, 0, early)
                if bias.late:
                    _add_late_bias(v, tile, tiles, bias)
                for row in range(tile.rows):
                    start = row * tiles.row_length + tiles.first
                    round_to_levels(levels, v, start, tiles.lanes // LANES, neurons.lowest, neurons.window)
                    if neurons.lowest < 0:
                        for neuron in range(start, start + tiles.lanes):
                            if v[neuron] < neurons.lowest - 0.5:
                                levels[neuron] = neurons.no_spike_level
                for spike in range(early):
                    levels[state.fired[spike]] = state.fired_level[spike]
                _write(output, levels, tile, tiles)


@compiled
def _count_in_blocks(
    changes: Any,
    first_image: int,
    held_state: Any,
    tiles: Any,
    held_synapses: Any,
    others: Any,
    held: Any,
    last_level: int,
) -> None:
    state, synapses, spikes = as_pointers(held_state), as_pointers(held_synapses), as_pointers(held)
    direct, bias = as_pointers(others[0]), as_pointers(others[1])
    for block in range((tiles.outputs + tiles.block_size - 1) // tiles.block_size):
        for b in range(spikes.images):
            for number in range((tiles.height + tiles.tile_rows - 1) // tiles.tile_rows):
                tile = _tile_of(tiles, first_image, b, block, number)
                _begin(state, tile, tiles, spikes)
                _fill(state.before, 0, tiles.size, 0)
                count = _arrive(state, tile, tiles, synapses, direct, bias, spikes)
                for row in range(tile.rows):
                    count = _count_row(state, tiles, row, 0, count)
                    if tile.channels == tiles.block_size and not bias.late:
                        # All become 1.
                        start = row * tiles.row_length + tiles.first
                        _fill(state.before, start, start + tiles.width * tiles.block_size, 1)
                        count = _count_row(state, tiles, row, 0, count)
                    else:
                        count += _count_changed_by_readout(state, tile, tiles, bias, row, last_level)
                changes[tile.image] += count


@compiled
def _tile_of(tiles: Any, first_image: int, b: int, block: int, number: int) -> Any:
    first_row = number * tiles.tile_rows
    channels = min(tiles.block_size, tiles.outputs - block * tiles.block_size)
    rows = min(tiles.tile_rows, tiles.height - first_row)
    return _Tile(first_image + b, b, block, channels, number, first_row, rows)


@inlined
def _fill(values: Any, start: int, stop: int, value: Any) -> None:
    for index in range(start, stop):
        values[index] = value


@compiled
def _begin(state: Any, tile: Any, tiles: Any, spikes: Any) -> None:
    """Start a tile: nothing has arrived."""
    own = tile.own_image * spikes.tiles + tile.number
    _fill(state.i, 0, tiles.size, 0)
    _fill(state.since, 0, tiles.tile_rows, spikes.ranked[own * spikes.ranks] if spikes.distinct[own] else 0)


@compiled
def _begin_membranes(v: Any, tile: Any, tiles: Any) -> None:
    """Set membranes to 0, and those of lost lanes and rows so that they do not fire."""
    _fill(v, 0, tiles.size, -np.inf)
    for row in range(tile.rows):
        start = row * tiles.row_length + tiles.first
        _fill(v, start, start + tiles.width * tiles.block_size, 0)


@inlined
def _advance_row(state: Any, tiles: Any, row: int, level: int, early: int) -> int:
    """Advance the membranes of a row to a level; returns how many of the tile have fired early so far."""
    last, start = state.since[row], row * tiles.row_length + tiles.first
    for at in range(start, start + tiles.lanes, GROUP * LANES):
        over = advance(state.v, state.i, at, last - level, state.theta)
        if over != 0:
            early = _note_early(state, at, over, last, level, early)
    state.since[row] = level
    return early


@inlined
def _note_early(state: Any, at: int, over: int, last: int, level: int, early: int) -> int:
    """List the neurons that have crossed the threshold on the way from level `last` to `level`, and when.

    `over` has a bit for each, `at` is the place of the first.
    """
    i, v, theta = state.i, state.v, state.theta
    steps = last - level
    while over != 0:
        neuron = at + lowest_bit(over)
        over &= over - 1
        before = v[neuron] - steps * i[neuron]
        step = 1
        while step < steps and before + step * i[neuron] < theta:
            step += 1
        state.fired[early], state.fired_level[early] = neuron, state.window + 1 + last - step
        early += 1
        v[neuron] = -np.inf
    return early


@inlined
def _count_row(state: Any, tiles: Any, row: int, level: int, changes: int) -> Any:
    """Add to `changes` how many currents of a row have changed since it was looked at."""
    state.since[row] = level
    start, neurons = row * tiles.row_length + tiles.first, tiles.width * tiles.block_size
    return changes + count_changed(state.i, state.before, start, neurons, state.least)


def _settle(state: Any, tiles: Any, row: int, level: int, found: int) -> int:
    """Do what there is to do before the currents of a row change; `found` and what this has found: by kind of state."""
    raise NotImplementedError("compiled code calls it")


@overload(_settle, strict=False, jit_options={"forceinline": True})
def _settle_by_state(state: Any, tiles: Any, row: int, level: int, found: int) -> Any:
    if state.instance_class is _Membranes:
        return lambda state, tiles, row, level, found: _advance_row(state, tiles, row, level, found)
    return lambda state, tiles, row, level, found: _count_row(state, tiles, row, level, found)


@compiled
def _arrive(state: Any, tile: Any, tiles: Any, synapses: Any, direct: Any, bias: Any, spikes: Any) -> int:
    """Let an image's spikes arrive at a tile, level after level; returns what settling rows has found."""
    found, next_bias, since = 0, 0, state.since
    own, block = tile.own_image * spikes.tiles + tile.number, tile.block
    first = own * (spikes.ranks * spikes.classes + 1)
    weights = pointer_at(synapses.weights, block * synapses.block_length)
    for k in range(spikes.distinct[own]):
        level = spikes.ranked[own * spikes.ranks + k]
        biased = next_bias < bias.stop_count and bias.stops[next_bias] == level
        next_bias += biased
        touched = -1 if biased or direct.row or not spikes.lazy else spikes.touched[own * spikes.ranks + k]
        for row in range(tile.rows):
            if (touched >> row) & 1 and since[row] > level:
                found = _settle(state, tiles, row, level, found)
            if biased:
                _add_bias(state.i, tile, tiles, bias, row, level)
            if direct.row:
                _add_direct(state.i, tile, tiles, direct, row, level)
        for kind in range(spikes.classes):
            at = first + k * spikes.classes + kind
            begin, end = spikes.starts[at], spikes.starts[at + 1]
            if begin < end and (synapses.class_block[kind] < 0 or synapses.class_block[kind] == block):
                _deliver(state.i, synapses, weights, spikes.spikes, kind, (begin, end))
    return found


@inlined
def _deliver(i: Any, synapses: Any, weights: Any, spikes: Any, kind: int, span: Any) -> None:
    """Deliver spikes of one kind to the currents that they reach."""
    for number in range(synapses.class_groups[kind], synapses.class_groups[kind + 1]):
        group = 4 * number
        spikes_and_runs = span[0], span[1], synapses.groups[group], synapses.groups[group + 1]
        if synapses.groups[group + 3]:
            collect(i, weights, spikes, synapses.runs, synapses.groups[group + 2], spikes_and_runs)
        else:
            deliver(i, weights, spikes, synapses.runs, synapses.groups[group + 2], spikes_and_runs)


@compiled
def _add_bias(i: Any, tile: Any, tiles: Any, bias: Any, row: int, level: int) -> None:
    """Let the biases of a level arrive at a row."""
    place = tile.block * bias.block_length + (tile.first_row + row) * bias.row_length
    places = (row * tiles.row_length + tiles.first, place, place)
    add_arriving(i, bias.amount, bias.level, places, tiles.lanes // LANES, level)


@compiled
def _add_direct(i: Any, tile: Any, tiles: Any, direct: Any, row: int, level: int) -> None:
    """Let the spikes of a level that go one to one arrive at a row."""
    start = tile.block * tiles.lanes
    first_channel = direct.first + tile.block * tiles.block_size
    in_source = (tile.image * tiles.height + tile.first_row + row) * tiles.width
    for x in range(0, tiles.width, direct.row):
        at = row * tiles.row_length + tiles.first + x * tiles.block_size
        places = (at, start, (in_source + x) * direct.channels + first_channel)
        add_arriving(i, direct.weights, direct.levels, places, direct.row * tile.channels // LANES, level)


@compiled
def _add_late_bias(v: Any, tile: Any, tiles: Any, bias: Any) -> None:
    """A negative bias is a spike after readout, until which nothing pulls."""
    for row in range(tile.rows):
        place = tile.block * bias.block_length + (tile.first_row + row) * bias.row_length
        for neuron in range(tiles.lanes):
            v[row * tiles.row_length + tiles.first + neuron] += min(bias.level[place + neuron], 0)


@compiled
def _write(output: Any, levels: Any, tile: Any, tiles: Any) -> None:
    """Copy a tile's levels to their places in the output."""
    whole = tiles.outputs == tiles.block_size == output.channels
    length, places = (tiles.width * output.channels, 1) if whole else (tile.channels, tiles.width)
    for row in range(tile.rows):
        neuron = row * tiles.row_length + tiles.first
        to = ((tile.image * tiles.height + tile.first_row + row) * tiles.width) * output.channels
        to += tiles.first_output + tile.block * tiles.block_size
        for _ in range(places):
            copy(output.levels, to, levels, neuron, length // LANES)
            for k in range(length // LANES * LANES, length):
                output.levels[to + k] = levels[neuron + k]
            to += output.channels
            neuron += tiles.block_size


@compiled
def _count_changed_by_readout(state: Any, tile: Any, tiles: Any, bias: Any, row: int, last_level: int) -> int:
    """Count the currents of a row that readout sets to another value, and the late bias spikes that then set them.

    Bias spikes behind `last_level`, that of the neurons' last step, come when they are done.
    """
    i, least, one, start, count = state.i, state.least, state.one, row * tiles.row_length + tiles.first, 0
    of_row = tile.block * bias.block_length + (tile.first_row + row) * bias.row_length
    for x in range(tiles.width):
        for neuron in range(x * tiles.block_size, x * tiles.block_size + tile.channels):
            if bias.late and bias.level[of_row + neuron] < 0:
                count += (bias.level[of_row + neuron] >= last_level) + (abs(i[start + neuron]) > least)
            else:
                count += abs(one - i[start + neuron]) > least
    return count
