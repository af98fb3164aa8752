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
from quartz_plugin.engines.event.constants import CHANNEL_BITS, CHANNEL_MASK, LANES
from quartz_plugin.engines.event.vectors import (
    add_arriving,
    add_weights,
    advance,
    any_over,
    as_pointers,
    count_changed,
    round_to_levels,
)

compiled = compiled_with(constants, vectors)
inlined = njit(nogil=True, forceinline=True)
"""For what runs for each row and level, where a call would cost more than what it does."""


@compiled
def list_spikes(
    levels: Any, image: int, first_channel: int, channels: int, at: int, first_row: int, listed: Any
) -> int:
    """List the spikes of some images from `image` on, row after row, from place `at` on; returns the next place.

    `levels` is ``[B, H, W, C]``. Row y of an image is row ``first_row + y`` of the list.
    """
    listed_level, listed_place, row_start = listed.level, listed.place, listed.row_start
    for b in range(listed.images):
        for y in range(levels.shape[1]):
            of_row = 2 * (b * listed.rows + first_row + y)
            row_start[of_row] = at
            for x in range(levels.shape[2]):
                for channel in range(channels):
                    level: Any = np.int32(levels[image + b, y, x, first_channel + channel])
                    listed_level[at] = level
                    listed_place[at] = (x << CHANNEL_BITS) | channel
                    # A place is kept only where there is a spike; without a branch, since spikes are unpredictable.
                    at += level > 0
            row_start[of_row + 1] = at
    return at


@compiled
def sort_by_level(listed: Any, stops: Any, spikes: Any) -> None:
    """Sort each row's spikes by level, falling (a counting sort), into `spikes`.

    Levels set in `stops` count as levels that occur.
    """
    listed_level, listed_place, row_start = listed.level, listed.place, listed.row_start
    by_level, ranked, distinct, starts = spikes.place, spikes.ranked, spikes.distinct, spikes.starts
    rows, ranks = spikes.rows, spikes.ranks
    levels = len(stops)
    occurs, place = np.empty(levels, np.bool_), np.zeros(levels, np.int64)
    for b in range(spikes.images):
        first_row, first_rank = b * rows, b * ranks
        occurs[:] = stops
        for row in range(first_row, first_row + rows):
            for index in range(row_start[2 * row], row_start[2 * row + 1]):
                occurs[listed_level[index]] = True
        rank = 0
        for level in range(levels - 1, 0, -1):
            if occurs[level]:
                ranked[first_rank + rank] = level
                rank += 1
        distinct[b] = rank
        for row in range(first_row, first_row + rows):
            begin, end = row_start[2 * row], row_start[2 * row + 1]
            for index in range(begin, end):
                place[listed_level[index]] += 1
            at = begin
            for k in range(rank):
                level = ranked[first_rank + k]
                starts[row * ranks + k] = at
                count, place[level] = place[level], at
                at += count
            starts[row * ranks + rank] = at
            for index in range(begin, end):
                level = listed_level[index]
                by_level[place[level]] = listed_place[index]
                place[level] += 1
            for k in range(rank):
                place[ranked[first_rank + k]] = 0


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
    """Tables of a convolution for the weights of a block (see Synapses)."""

    start: int
    input_stride: int
    column: int
    channel_at: int
    per_group: int


class _Membranes(NamedTuple):
    """Neurons of a tile that fire: currents, level up to which membranes have advanced, early spikes, levels."""

    i: Any
    since: Any
    next_spike: Any
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
    next_spike: Any
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
    number, size = synapses.weights.dtype.type, tiles.tile_rows * tiles.row_length
    state = _Membranes(
        np.zeros(size, number),
        np.zeros(tiles.tile_rows, np.int64),
        np.zeros(spikes.rows, np.int64),
        np.zeros(size, number),
        np.zeros(size, np.int64),
        np.zeros(size, np.int64),
        np.zeros(size, number),
        number(neurons.theta),
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
    number, size = synapses.weights.dtype.type, tiles.tile_rows * tiles.row_length
    last_level, least_change = readout
    state = _Currents(
        np.zeros(size, number),
        np.zeros(tiles.tile_rows, np.int64),
        np.zeros(spikes.rows, np.int64),
        np.zeros(size, number),
        number(1),
        number(least_change),
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
                size = tiles.tile_rows * tiles.row_length
                round_to_levels(levels, v, size // LANES, neurons.lowest, neurons.window)
                if neurons.lowest < 0:
                    for neuron in range(size):
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
    row_length = tiles.row_length
    for block in range((tiles.outputs + tiles.block_size - 1) // tiles.block_size):
        for b in range(spikes.images):
            for number in range((tiles.height + tiles.tile_rows - 1) // tiles.tile_rows):
                tile = _tile_of(tiles, first_image, b, block, number)
                _begin(state, tile, tiles, spikes)
                _fill(state.before, 0, tiles.tile_rows * row_length, 0)
                count = _arrive(state, tile, tiles, synapses, direct, bias, spikes)
                for row in range(tile.rows):
                    count = _count_row(state, tiles, row, 0, count)
                    if tile.channels == tiles.block_size and not bias.late:
                        # All become 1.
                        _fill(state.before, row * row_length, (row + 1) * row_length, 1)
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


@compiled
def _fill(values: Any, start: int, stop: int, value: Any) -> None:
    for index in range(start, stop):
        values[index] = value


@compiled
def _begin(state: Any, tile: Any, tiles: Any, spikes: Any) -> None:
    """Start a tile: nothing has arrived."""
    b = tile.own_image
    _fill(state.i, 0, tiles.tile_rows * tiles.row_length, 0)
    _fill(state.since, 0, tiles.tile_rows, spikes.ranked[b * spikes.ranks] if spikes.distinct[b] else 0)
    if not spikes.has_starts:
        for row in range(spikes.rows):
            state.next_spike[row] = spikes.row_start[2 * (b * spikes.rows + row)]


@compiled
def _begin_membranes(v: Any, tile: Any, tiles: Any) -> None:
    """Set membranes to 0, and those of lost lanes and rows so that they do not fire."""
    _fill(v, 0, tiles.tile_rows * tiles.row_length, -np.inf)
    for row in range(tile.rows):
        start = row * tiles.row_length
        _fill(v, start, start + tiles.width * tiles.block_size, 0)


@inlined
def _advance_row(state: Any, tiles: Any, row: int, level: int, early: int) -> int:
    """Advance the membranes of a row to a level; returns how many of the tile have fired early so far."""
    row_length, last = tiles.row_length, state.since[row]
    if advance(state.v, state.i, row * row_length, row_length // LANES, last - level, state.theta):
        early = _note_early(state, row * row_length, row_length, last, level, early)
    state.since[row] = level
    return early


@compiled
def _note_early(state: Any, start: int, length: int, last: int, level: int, early: int) -> int:
    """List the neurons of a row that have crossed the threshold on the way from level `last` to `level`, and when."""
    i, v, theta = state.i, state.v, state.theta
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
                state.fired[early], state.fired_level[early] = neuron, state.window + 1 + last - step
                early += 1
                v[neuron] = -np.inf
    return early


@inlined
def _count_row(state: Any, tiles: Any, row: int, level: int, changes: int) -> Any:
    """Add to `changes` how many currents of a row have changed since it was looked at."""
    state.since[row] = level
    neurons = tiles.width * tiles.block_size
    return changes + count_changed(state.i, state.before, row * tiles.row_length, neurons, state.least)


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
    found, next_bias, b, since = 0, 0, tile.own_image, state.since
    for k in range(spikes.distinct[b]):
        level = spikes.ranked[b * spikes.ranks + k]
        biased = next_bias < bias.stop_count and bias.stops[next_bias] == level
        next_bias += biased
        if biased or direct.row:
            for row in range(tile.rows):
                if since[row] > level:
                    found = _settle(state, tiles, row, level, found)
        if biased:
            _add_bias(state.i, tile, tiles, bias, level)
        if direct.row:
            _add_direct(state.i, tile, tiles, direct, level)
        for number in range(synapses.term_count):
            inputs_row, term, first_tile = _term_of(synapses, number, tile.block)
            first_row = b * spikes.rows + inputs_row
            for reached in range(
                synapses.reach[first_tile + tile.number], synapses.reach[first_tile + tile.number + 1]
            ):
                begin, end = _spikes_of(state, spikes, first_row + synapses.reach_row[reached], k, level)
                if begin == end:
                    continue
                first_pair, last_pair = synapses.reach_pair[reached], synapses.reach_pair[reached + 1]
                for pair in range(first_pair, last_pair):
                    row = synapses.pairs[3 * pair + 2]
                    if since[row] > level:
                        found = _settle(state, tiles, row, level, found)
                _deliver(state.i, synapses, term, spikes.place, (begin, end), (first_pair, last_pair))
    return found


@inlined
def _term_of(synapses: Any, number: int, block: int) -> Any:
    """Of a convolution: the row of its first spikes, its tables, and where its tiles start in ``reach``."""
    terms, at = synapses.terms, 7 * number
    start = block * synapses.block_length + terms[at + 1]
    return terms[at], _Term(start, terms[at + 2], terms[at + 3], terms[at + 4], terms[at + 6]), terms[at + 5]


@inlined
def _spikes_of(state: Any, spikes: Any, row: int, k: int, level: int) -> Any:
    """Begin and end of the spikes of a row (of all images) and a level; `k` is the level's rank."""
    if spikes.has_starts:
        place = row * spikes.ranks + k
        return spikes.starts[place], spikes.starts[place + 1]
    of_image = row % spikes.rows
    begin = end = state.next_spike[of_image]
    while end < spikes.row_start[2 * row + 1] and spikes.level[end] == level:
        end += 1
    state.next_spike[of_image] = end
    return begin, end


@inlined
def _deliver(i: Any, synapses: Any, term: Any, places: Any, spikes: Any, span: Any) -> None:
    """Deliver the spikes of a row and a level to the currents that they reach in some rows of a tile."""
    begin, end = spikes
    first_pair, last_pair = span
    weights, pairs, column, runs = synapses.weights, synapses.pairs, synapses.column, synapses.runs
    while begin < end:
        # Spikes of one place reach the same neurons, those of several groups do not.
        x = places[begin] >> CHANNEL_BITS
        stop = begin + 1
        at = 0
        if term.per_group:
            channel = places[begin] & CHANNEL_MASK
            at = synapses.channel_at[term.channel_at + channel]
            if term.per_group == 1:
                # Depthwise: one weight for each neuron that is reached.
                for run in range(column[term.column + x], column[term.column + x + 1]):
                    to, of = at + runs[3 * run], term.start + channel * term.input_stride + runs[3 * run + 1]
                    for pair in range(first_pair, last_pair):
                        i[to + pairs[3 * pair]] += weights[of + pairs[3 * pair + 1]]
                begin = stop
                continue
        else:
            while stop < end and places[stop] >> CHANNEL_BITS == x:
                stop += 1
        for run in range(column[term.column + x], column[term.column + x + 1]):
            where = (at + runs[3 * run], term.start + runs[3 * run + 1], runs[3 * run + 2], term.input_stride)
            add_weights(i, weights, places, pairs, where, (begin, stop, first_pair, last_pair))
        begin = stop


@compiled
def _add_bias(i: Any, tile: Any, tiles: Any, bias: Any, level: int) -> None:
    """Let the biases of a level arrive."""
    for row in range(tile.rows):
        place = tile.block * bias.block_length + (tile.first_row + row) * bias.row_length
        places = (row * tiles.row_length, place, place)
        add_arriving(i, bias.amount, bias.level, places, tiles.row_length // LANES, level)


@compiled
def _add_direct(i: Any, tile: Any, tiles: Any, direct: Any, level: int) -> None:
    """Let the spikes of a level that go one to one arrive."""
    start = tile.block * tiles.row_length
    first_channel = direct.first + tile.block * tiles.block_size
    for row in range(tile.rows):
        in_source = (tile.image * tiles.height + tile.first_row + row) * tiles.width
        for x in range(0, tiles.width, direct.row):
            at = row * tiles.row_length + x * tiles.block_size
            places = (at, start, (in_source + x) * direct.channels + first_channel)
            add_arriving(i, direct.weights, direct.levels, places, direct.row * tile.channels // LANES, level)


@compiled
def _add_late_bias(v: Any, tile: Any, tiles: Any, bias: Any) -> None:
    """A negative bias is a spike after readout, until which nothing pulls."""
    for row in range(tile.rows):
        place = tile.block * bias.block_length + (tile.first_row + row) * bias.row_length
        for neuron in range(tiles.row_length):
            v[row * tiles.row_length + neuron] += min(bias.level[place + neuron], 0)


@compiled
def _write(output: Any, levels: Any, tile: Any, tiles: Any) -> None:
    """Copy a tile's levels to their places in the output."""
    for row in range(tile.rows):
        neuron = row * tiles.row_length
        to = ((tile.image * tiles.height + tile.first_row + row) * tiles.width) * output.channels
        to += tiles.first_output + tile.block * tiles.block_size
        whole = tiles.outputs == tiles.block_size == output.channels
        length = tiles.width * output.channels if whole else tile.channels
        for _ in range(1 if whole else tiles.width):
            for k in range(length):
                output.levels[to + k] = levels[neuron + k]
            to += output.channels
            neuron += tiles.block_size


@compiled
def _count_changed_by_readout(state: Any, tile: Any, tiles: Any, bias: Any, row: int, last_level: int) -> int:
    """Count the currents of a row that readout sets to another value, and the late bias spikes that then set them.

    Bias spikes behind `last_level`, that of the neurons' last step, come when they are done.
    """
    i, least, one, start, count = state.i, state.least, state.one, row * tiles.row_length, 0
    of_row = tile.block * bias.block_length + (tile.first_row + row) * bias.row_length
    for x in range(tiles.width):
        for neuron in range(x * tiles.block_size, x * tiles.block_size + tile.channels):
            if bias.late and bias.level[of_row + neuron] < 0:
                count += (bias.level[of_row + neuron] >= last_level) + (abs(i[start + neuron]) > least)
            else:
                count += abs(one - i[start + neuron]) > least
    return count
