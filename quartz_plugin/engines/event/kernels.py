"""Compiled loops of the event engine (numba): list and sort spikes, let them arrive, advance the membranes between.

A tile of neurons (some rows of a channel block) keeps its currents and membranes in the first-level cache. Arrays
of records are taken out of them where loops begin: numba counts who holds an array each time that a record gives it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numba import njit
from numba.extending import overload

from quartz_plugin.compiled import compiled_with
from quartz_plugin.engines.event import constants, vectors
from quartz_plugin.engines.event.constants import CHANNEL_BITS, CHANNEL_MASK, LANES
from quartz_plugin.engines.event.vectors import (
    add_arriving,
    add_weights,
    advance,
    any_over,
    at_index,
    count_changed,
    round_to_levels,
)

compiled = compiled_with(constants, vectors)
inlined = njit(nogil=True, inline="always")


@compiled
def list_spikes(
    levels: Any, image: int, first_channel: int, channels: int, at: int, first_row: int, listed: Any
) -> int:
    """List the spikes of some images from `image` on, row after row, from place `at` on; returns the next place.

    `levels` is ``[B, H, W, C]``. Spikes of row y of image b stand from ``row_start[b, first_row + y, 0]`` to
    ``row_start[b, first_row + y, 1]``.
    """
    listed_level, listed_place, row_start = listed
    for b in range(len(row_start)):
        for y in range(levels.shape[1]):
            row_start[b, first_row + y, 0] = at
            for x in range(levels.shape[2]):
                for channel in range(channels):
                    level: Any = np.int32(levels[image + b, y, x, first_channel + channel])
                    listed_level[at] = level
                    listed_place[at] = (x << CHANNEL_BITS) | channel
                    # A place is kept only where there is a spike; without a branch, since spikes are unpredictable.
                    at += level > 0
            row_start[b, first_row + y, 1] = at
    return at


@compiled
def sort_by_level(listed: Any, stops: Any, spikes: Any) -> None:
    """Sort each row's spikes by level, falling (a counting sort), into `spikes`.

    Levels set in `stops` count as levels that occur.
    """
    listed_level, listed_place, row_start = listed
    by_level, ranked, distinct, starts = spikes.place, spikes.ranked, spikes.distinct, spikes.starts
    images, rows, _ = row_start.shape
    levels = len(stops)
    occurs, place = np.empty(levels, np.bool_), np.zeros(levels, np.int64)
    for b in range(images):
        occurs[:] = stops
        for row in range(rows):
            for index in range(row_start[b, row, 0], row_start[b, row, 1]):
                occurs[listed_level[index]] = True
        rank = 0
        for level in range(levels - 1, 0, -1):
            if occurs[level]:
                ranked[b, rank] = level
                rank += 1
        distinct[b] = rank
        for row in range(rows):
            begin, end = row_start[b, row, 0], row_start[b, row, 1]
            for index in range(begin, end):
                place[listed_level[index]] += 1
            at = begin
            for k in range(rank):
                level = ranked[b, k]
                starts[b, row, k] = at
                count, place[level] = place[level], at
                at += count
            starts[b, row, rank] = at
            for index in range(begin, end):
                level = listed_level[index]
                by_level[place[level]] = listed_place[index]
                place[level] += 1
            for k in range(rank):
                place[ranked[b, k]] = 0


class _Tile(NamedTuple):
    """A tile: of which image (of the batch, of the job), in which block (its channels), from which row on."""

    image: int
    own_image: int
    block: int
    channels: int
    number: int
    first_row: int
    rows: int


class _Term(NamedTuple):
    """Where a convolution's weights start in a block, and its other tables (see Synapses)."""

    start: int
    input_stride: int
    column: int
    channel_at: int
    per_group: int


class _Membranes(NamedTuple):
    """Neurons of a tile that fire: currents, level up to which membranes have advanced, early spikes."""

    i: Any
    since: Any
    next_spike: Any
    v: Any
    fired: Any
    fired_level: Any
    theta: Any
    window: int


class _Currents(NamedTuple):
    """Neurons of a tile whose changes are counted: currents, level since which they are so, those before."""

    i: Any
    since: Any
    next_spike: Any
    before: Any
    least: Any


@compiled
def _advance_row(state: Any, tiles: Any, row: int, level: int, early: int) -> int:
    """Advance the membranes of a row to a level; returns how many of the tile have fired early so far."""
    i, since, v, row_length = state.i, state.since, state.v, tiles.row_length
    last = since[row]
    if advance(v, i, row * row_length, row_length // LANES, v.dtype.type(last - level), state.theta):
        early = _note_early(state, row * row_length, row_length, last, level, early)
    since[row] = level
    return early


@compiled
def _note_early(state: Any, start: int, length: int, last: int, level: int, early: int) -> int:
    """List the neurons of a row that have crossed the threshold on the way from level `last` to `level`, and when."""
    i, v, fired, fired_level, theta = state.i, state.v, state.fired, state.fired_level, state.theta
    steps = last - level
    for at in range(start, start + length, LANES):
        if not any_over(v, at, theta):
            continue
        for neuron in range(at, at + LANES):
            if v[neuron] >= theta:
                before = v[neuron] - steps * i[neuron]
                step = 1
                while step < steps and before + step * i[neuron] < theta:
                    step += 1
                fired[early], fired_level[early] = neuron, state.window + 1 + last - step
                early += 1
                v[neuron] = -np.inf
    return early


@compiled
def _count_row(state: Any, tiles: Any, row: int, level: int, changes: int) -> Any:
    """Add to `changes` how many currents of a row have changed since it was looked at."""
    state.since[row] = level
    neurons = tiles.width * tiles.block_size
    return changes + count_changed(state.i, state.before, row * tiles.row_length, neurons, state.least)


def _settle(state: Any, tiles: Any, row: int, level: int, found: int) -> int:
    """Do what there is to do before the currents of a row change; `found` and what this has found: by kind of state."""
    raise NotImplementedError("compiled code calls it")


@overload(_settle, strict=False)
def _settle_by_state(state: Any, tiles: Any, row: int, level: int, found: int) -> Any:
    if state.instance_class is _Membranes:
        return lambda state, tiles, row, level, found: _advance_row(state, tiles, row, level, found)
    return lambda state, tiles, row, level, found: _count_row(state, tiles, row, level, found)


@compiled
def _add_bias(i: Any, tile: Any, tiles: Any, bias: Any, level: int) -> None:
    """Let the biases of a level arrive."""
    amounts, levels, row_length = bias.amount, bias.level, tiles.row_length
    for row in range(tile.rows):
        place = tile.block * bias.block_length + (tile.first_row + row) * bias.row_length
        places = (row * row_length, place, place)
        add_arriving(i, amounts, levels, places, row_length // LANES, i.dtype.type(level))


@compiled
def _add_direct(i: Any, tile: Any, tiles: Any, direct: Any, level: int) -> None:
    """Let the spikes of a level that go one to one arrive."""
    levels, weights = direct.levels, direct.weights
    start = tile.block * tiles.row_length
    first_channel = direct.first + tile.block * tiles.block_size
    vectors = direct.row * tile.channels // LANES
    for row in range(tile.rows):
        in_source = ((tile.image * tiles.height + tile.first_row + row) * tiles.width) * direct.channels
        for x in range(0, tiles.width, direct.row):
            at = row * tiles.row_length + x * tiles.block_size
            places = (at, start, in_source + x * direct.channels + first_channel)
            add_arriving(i, weights, levels, places, vectors, i.dtype.type(level))


@inlined
def _deliver(i: Any, synapses: Any, term: Any, by_level: Any, spikes: Any, span: Any) -> None:
    """Deliver the spikes of a row and a level to the currents that they reach in some rows of a tile."""
    weights, pairs, column, runs = synapses.weights, synapses.pairs, synapses.column, synapses.runs
    channel_at = synapses.channel_at
    begin, end = spikes
    first_pair, last_pair = span
    while begin < end:
        # Spikes of one place reach the same neurons, those of several groups do not.
        x = at_index(by_level, begin) >> CHANNEL_BITS
        stop = begin + 1
        at = 0
        if term.per_group:
            channel = at_index(by_level, begin) & CHANNEL_MASK
            at = channel_at[term.channel_at + channel]
            if term.per_group == 1:
                # Depthwise: one weight for each neuron that is reached.
                for run in range(at_index(column, term.column + x), at_index(column, term.column + x + 1)):
                    of = term.start + channel * term.input_stride + at_index(runs, 3 * run + 1)
                    for pair in range(first_pair, last_pair):
                        i[at + at_index(runs, 3 * run) + pairs[3 * pair]] += weights[of + pairs[3 * pair + 1]]
                begin = stop
                continue
        else:
            while stop < end and at_index(by_level, stop) >> CHANNEL_BITS == x:
                stop += 1
        for run in range(at_index(column, term.column + x), at_index(column, term.column + x + 1)):
            place, start, vectors = at_index(runs, 3 * run), at_index(runs, 3 * run + 1), at_index(runs, 3 * run + 2)
            where = (at + place, term.start + start, vectors, term.input_stride)
            add_weights(i, weights, by_level, pairs, where, (begin, stop, first_pair, last_pair))
        begin = stop


@inlined
def _arrive(state: Any, tile: Any, tiles: Any, synapses: Any, direct: Any, bias: Any, spikes: Any) -> int:
    """Let an image's spikes arrive at a tile, level after level; returns what settling rows has found."""
    found, next_bias, b = 0, 0, tile.own_image
    i, since, next_spike = state.i, state.since, state.next_spike
    by_level, row_start, level_of, ranked = spikes.place, spikes.row_start, spikes.level, spikes.ranked
    stops, starts, bias_stops = spikes.starts.shape[2], spikes.starts.reshape(-1), bias.stops
    image_starts, block_weights = spikes.starts.shape[1] * stops, tile.block * synapses.block_length
    terms, reach, reach_row, reach_pair = synapses.terms, synapses.reach, synapses.reach_row, synapses.reach_pair
    pairs, numbered = synapses.pairs, len(starts) > 0
    for k in range(spikes.distinct[b]):
        level, first_start = ranked[b, k], b * image_starts + k
        biased = next_bias < len(bias_stops) and bias_stops[next_bias] == level
        next_bias += biased
        if biased or direct.row:
            for row in range(tile.rows):
                if since[row] > level:
                    found = _settle(state, tiles, row, level, found)
        if biased:
            _add_bias(i, tile, tiles, bias, level)
        if direct.row:
            _add_direct(i, tile, tiles, direct, level)
        for number in range(len(terms)):
            inputs_row, first_tile = terms[number, 0], terms[number, 5] + tile.number
            start, input_stride = block_weights + terms[number, 1], terms[number, 2]
            term = _Term(start, input_stride, terms[number, 3], terms[number, 4], terms[number, 6])
            for reached in range(at_index(reach, first_tile), at_index(reach, first_tile + 1)):
                input_row = inputs_row + at_index(reach_row, reached)
                if numbered:
                    place = first_start + input_row * stops
                    begin, end = at_index(starts, place), at_index(starts, place + 1)
                else:
                    begin = end = next_spike[input_row]
                    while end < row_start[b, input_row, 1] and level_of[end] == level:
                        end += 1
                    next_spike[input_row] = end
                if begin == end:
                    continue
                first_pair, last_pair = at_index(reach_pair, reached), at_index(reach_pair, reached + 1)
                for pair in range(first_pair, last_pair):
                    row = at_index(pairs, 3 * pair + 2)
                    if at_index(since, row) > level:
                        found = _settle(state, tiles, row, level, found)
                _deliver(i, synapses, term, by_level, (begin, end), (first_pair, last_pair))
    return found


@compiled
def _begin(state: Any, tile: Any, spikes: Any) -> None:
    """Start a tile: nothing has arrived."""
    b = tile.own_image
    state.i[:] = 0
    state.since[:] = spikes.ranked[b, 0] if spikes.distinct[b] else 0
    if len(state.next_spike):
        state.next_spike[:] = spikes.row_start[b, :, 0]


@compiled
def _tile_of(tiles: Any, first_image: int, b: int, block: int, number: int) -> Any:
    first_row = number * tiles.tile_rows
    channels = min(tiles.block_size, tiles.outputs - block * tiles.block_size)
    rows = min(tiles.tile_rows, tiles.height - first_row)
    return _Tile(first_image + b, b, block, channels, number, first_row, rows)


@compiled
def fire(
    out: Any, first_image: int, tiles: Any, synapses: Any, direct: Any, bias: Any, spikes: Any, neurons: Any
) -> None:
    """Let the spikes of some images arrive at the neurons of a range of channels; write their levels.

    ``out`` is ``[B, H, W, C]``, `first_image` the first of them there; the other parameters are those of
    :mod:`quartz_plugin.engines.event.records`.
    """
    number = synapses.weights.dtype.type
    size, row_neurons = tiles.tile_rows * tiles.row_length, tiles.width * tiles.block_size
    i, v, levels = np.zeros(size, number), np.zeros(size, number), np.empty(size, number)
    since, fired, fired_level = np.zeros(tiles.tile_rows, np.int64), np.empty(size, np.int64), np.empty(size, np.int64)
    next_spike = np.empty(0 if spikes.starts.size else spikes.row_start.shape[1], np.int64)
    state = _Membranes(i, since, next_spike, v, fired, fired_level, number(neurons.theta), neurons.window)
    for block in range((tiles.outputs + tiles.block_size - 1) // tiles.block_size):
        for b in range(len(spikes.distinct)):
            for tile_number in range((tiles.height + tiles.tile_rows - 1) // tiles.tile_rows):
                tile = _tile_of(tiles, first_image, b, block, tile_number)
                _begin(state, tile, spikes)
                v[:] = -np.inf
                for row in range(tile.rows):
                    v[row * tiles.row_length : row * tiles.row_length + row_neurons] = 0
                early = _arrive(state, tile, tiles, synapses, direct, bias, spikes)
                for row in range(tile.rows):
                    if since[row] > 0:
                        early = _advance_row(state, tiles, row, 0, early)
                if bias.late:
                    _add_late_bias(v, tile, tiles, bias)
                round_to_levels(levels, v, size // LANES, number(neurons.lowest), number(neurons.window))
                if neurons.lowest < 0:
                    for neuron in range(size):
                        if v[neuron] < neurons.lowest - number(0.5):
                            levels[neuron] = neurons.no_spike_level
                for spike in range(early):
                    levels[fired[spike]] = fired_level[spike]
                _write(out, levels, tile, tiles)


@compiled
def _add_late_bias(v: Any, tile: Any, tiles: Any, bias: Any) -> None:
    """A negative bias is a spike after readout, until which nothing pulls."""
    levels = bias.level
    for row in range(tile.rows):
        place = tile.block * bias.block_length + (tile.first_row + row) * bias.row_length
        for neuron in range(tiles.row_length):
            v[row * tiles.row_length + neuron] += min(levels[place + neuron], 0)


@compiled
def _write(out: Any, levels: Any, tile: Any, tiles: Any) -> None:
    """Copy a tile's levels to their places in ``out``."""
    flat, every_channel, width = out.reshape(-1), out.shape[3], tiles.width
    for row in range(tile.rows):
        neuron = row * tiles.row_length
        to = ((tile.image * tiles.height + tile.first_row + row) * width) * every_channel
        to += tiles.first_output + tile.block * tiles.block_size
        if tiles.outputs == tiles.block_size == every_channel:
            flat[to : to + width * every_channel] = levels[neuron : neuron + width * every_channel]
        else:
            for _ in range(width):
                flat[to : to + tile.channels] = levels[neuron : neuron + tile.channels]
                to += every_channel
                neuron += tiles.block_size


@compiled
def count_changes(
    changes: Any, first_image: int, tiles: Any, synapses: Any, direct: Any, bias: Any, spikes: Any, readout: Any
) -> None:
    """Let spikes arrive as :func:`fire` does, and count the neuron-steps in which currents change, readout included.

    They are added to ``changes [B]``. `readout` is ``(last_level, least_change)``.
    """
    number = synapses.weights.dtype.type
    last_level, least_change = readout
    size, row_length = tiles.tile_rows * tiles.row_length, tiles.row_length
    i, before, since = np.zeros(size, number), np.empty(size, number), np.zeros(tiles.tile_rows, np.int64)
    next_spike = np.empty(0 if spikes.starts.size else spikes.row_start.shape[1], np.int64)
    state = _Currents(i, since, next_spike, before, number(least_change))
    for block in range((tiles.outputs + tiles.block_size - 1) // tiles.block_size):
        for b in range(len(spikes.distinct)):
            for tile_number in range((tiles.height + tiles.tile_rows - 1) // tiles.tile_rows):
                tile = _tile_of(tiles, first_image, b, block, tile_number)
                _begin(state, tile, spikes)
                before[:] = 0
                count = _arrive(state, tile, tiles, synapses, direct, bias, spikes)
                for row in range(tile.rows):
                    count = _count_row(state, tiles, row, 0, count)
                    if tile.channels == tiles.block_size and not bias.late:
                        # All become 1.
                        before[row * row_length : (row + 1) * row_length] = 1
                        count = _count_row(state, tiles, row, 0, count)
                    else:
                        count += _count_changed_by_readout(state, tile, tiles, bias, row, last_level)
                changes[tile.image] += count


@compiled
def _count_changed_by_readout(state: Any, tile: Any, tiles: Any, bias: Any, row: int, last_level: int) -> int:
    """Count the currents of a row that readout sets to another value, and the late bias spikes that then set them.

    Bias spikes behind `last_level`, that of the neurons' last step, come when they are done.
    """
    i, least, levels = state.i, state.least, bias.level
    count, one, start = 0, i.dtype.type(1), row * tiles.row_length
    of_row = tile.block * bias.block_length + (tile.first_row + row) * bias.row_length
    for x in range(tiles.width):
        for neuron in range(x * tiles.block_size, x * tiles.block_size + tile.channels):
            if bias.late and levels[of_row + neuron] < 0:
                count += (levels[of_row + neuron] >= last_level) + (abs(i[start + neuron]) > least)
            else:
                count += abs(one - i[start + neuron]) > least
    return count
