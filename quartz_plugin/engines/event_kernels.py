"""Compiled loops of the event engine (numba): sort spikes by level, let them arrive, advance the membranes between.

A tile of neurons (some rows of a channel block) keeps its currents and membranes in the first-level cache. Arrays
do not live in registers in numba, so the innermost loops are written in vectors of LANES numbers.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from quartz_plugin.compiled import compiled
from quartz_plugin.engines import event as _event

LANES = 8
"""That of the engine. Written out, for numba keeps machine code as long as this file is the same."""

if LANES != _event.LANES:
    raise AssertionError(f"the event engine lays its tables out for {_event.LANES} lanes, its kernels for {LANES}")

_CHANNEL_BITS = 32
_CHANNEL_MASK = (1 << _CHANNEL_BITS) - 1
"""A spike is noted as ``x << 32 | channel``."""

REGISTERS = 8
"""Vectors of currents that are in registers together."""


def _vector_at(context: Any, builder: Any, array_type: Any, array: Any, index: Any) -> tuple[Any, int]:
    """Pointer to a vector in a contiguous array, and the alignment of its numbers."""
    number = context.get_data_type(array_type.dtype)
    data = context.make_array(array_type)(context, builder, array).data
    pointer = builder.bitcast(builder.gep(data, [index]), ir.VectorType(number, LANES).as_pointer())
    return pointer, context.get_abi_sizeof(number)


def _everywhere(builder: Any, vector: Any, number: Any) -> Any:
    """Vector of one number."""
    undefined = ir.Constant(vector, ir.Undefined)
    first = builder.insert_element(undefined, number, ir.Constant(ir.IntType(32), 0))
    return builder.shuffle_vector(first, undefined, ir.Constant(ir.VectorType(ir.IntType(32), LANES), [0] * LANES))


@intrinsic
def _at(typing_context: Any, array: Any, index: Any) -> Any:
    """``array[index]`` of a flat array, for an index that is known not to be negative."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        data = context.make_array(signature.args[0])(context, builder, args[0]).data
        return builder.load(builder.gep(data, [args[1]]))

    return array.dtype(array, types.intp), generate


@intrinsic
def _deliver(
    typing_context: Any,
    i: Any,
    at: Any,
    weights: Any,
    start: Any,
    input_stride: Any,
    spikes: Any,
    first: Any,
    last: Any,
    pairs: Any,
    first_pair: Any,
    last_pair: Any,
    vectors: Any,
) -> Any:
    """Add the weights of some spikes of one place to a run of currents in each of some rows.

    For each pair (place of a row, place of a kernel row, number of the row) of ``pairs`` and each spike:
    ``i[at + row:] += weights[start + kernel row + channel * input_stride:]``, so many vectors. Currents stay in
    registers while the spikes go by.
    """

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        i_, at_, weights_, start_, stride_, spikes_, first_, last_, pairs_, first_pair_, last_pair_, vectors_ = args
        of_pairs = context.make_array(signature.args[8])(context, builder, pairs_).data
        of_spikes = context.make_array(signature.args[5])(context, builder, spikes_).data
        index_type = vectors_.type
        mask = ir.Constant(index_type, _CHANNEL_MASK)

        def add_chunk(width: int, to: Any, of: Any) -> None:
            places = [
                _vector_at(context, builder, signature.args[0], i_, builder.add(to, ir.Constant(to.type, k * LANES)))
                for k in range(width)
            ]
            totals = [cgutils.alloca_once_value(builder, builder.load(place, align=align)) for place, align in places]
            with cgutils.for_range_slice(builder, first_, last_, ir.Constant(index_type, 1)) as (spike, _):
                channel = builder.and_(builder.load(builder.gep(of_spikes, [spike])), mask)
                row = builder.add(of, builder.mul(channel, stride_))
                for k, total in enumerate(totals):
                    offset = builder.add(row, ir.Constant(row.type, k * LANES))
                    weight, align = _vector_at(context, builder, signature.args[2], weights_, offset)
                    builder.store(builder.fadd(builder.load(total), builder.load(weight, align=align)), total)
            for (place, align), total in zip(places, totals, strict=True):
                builder.store(builder.load(total), place, align=align)

        def moved(place: Any, vectors_before: Any) -> Any:
            return builder.add(place, builder.mul(vectors_before, ir.Constant(index_type, LANES)))

        with cgutils.for_range_slice(builder, first_pair_, last_pair_, ir.Constant(index_type, 1)) as (pair, _):
            place = builder.mul(pair, ir.Constant(index_type, 3))
            to = builder.add(at_, builder.load(builder.gep(of_pairs, [place])))
            place = builder.add(place, ir.Constant(index_type, 1))
            of = builder.add(start_, builder.load(builder.gep(of_pairs, [place])))
            many = ir.Constant(index_type, REGISTERS)
            whole = builder.udiv(vectors_, many)
            with cgutils.for_range(builder, whole) as loop:
                before = builder.mul(loop.index, many)
                add_chunk(REGISTERS, moved(to, before), moved(of, before))
            before = builder.mul(whole, many)
            to, of = moved(to, before), moved(of, before)
            # What is left, each number of vectors in code of its own: its totals stay in registers, too.
            done = builder.append_basic_block("done")
            switch = builder.switch(builder.sub(vectors_, before), done)
            for width in range(1, REGISTERS):
                block = builder.append_basic_block(f"left_{width}")
                switch.add_case(ir.Constant(index_type, width), block)
                builder.position_at_end(block)
                add_chunk(width, to, of)
                builder.branch(done)
            builder.position_at_end(done)
        return context.get_dummy_value()

    intp = types.intp
    return types.void(i, intp, weights, intp, intp, spikes, intp, intp, pairs, intp, intp, intp), generate


@intrinsic
def _advance(typing_context: Any, v: Any, i: Any, at: Any, vectors: Any, steps: Any, theta: Any) -> Any:
    """``v[at:] += steps * i[at:]``, so many vectors; whether any membrane is then at the threshold."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        v_, i_, at_, vectors_, steps_, theta_ = args
        vector = ir.VectorType(context.get_data_type(signature.args[0].dtype), LANES)
        lanes = ir.VectorType(ir.IntType(1), LANES)
        all_steps, all_theta = _everywhere(builder, vector, steps_), _everywhere(builder, vector, theta_)
        over = cgutils.alloca_once_value(builder, ir.Constant(lanes, [0] * LANES))
        with cgutils.for_range(builder, vectors_) as loop:
            offset = builder.add(at_, builder.mul(loop.index, ir.Constant(loop.index.type, LANES)))
            membrane, align = _vector_at(context, builder, signature.args[0], v_, offset)
            current, _ = _vector_at(context, builder, signature.args[1], i_, offset)
            change = builder.fmul(all_steps, builder.load(current, align=align))
            total = builder.fadd(builder.load(membrane, align=align), change)
            builder.store(total, membrane, align=align)
            builder.store(builder.or_(builder.load(over), builder.fcmp_ordered(">=", total, all_theta)), over)
        mask = builder.bitcast(builder.load(over), ir.IntType(LANES))
        return builder.icmp_unsigned("!=", mask, ir.Constant(mask.type, 0))

    return types.boolean(v, i, types.intp, types.intp, v.dtype, v.dtype), generate


@intrinsic
def _any_over(typing_context: Any, v: Any, at: Any, theta: Any) -> Any:
    """Whether any membrane in the vector at this place is at the threshold."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        v_, at_, theta_ = args
        vector = ir.VectorType(context.get_data_type(signature.args[0].dtype), LANES)
        membrane, align = _vector_at(context, builder, signature.args[0], v_, at_)
        over = builder.fcmp_ordered(">=", builder.load(membrane, align=align), _everywhere(builder, vector, theta_))
        mask = builder.bitcast(over, ir.IntType(LANES))
        return builder.icmp_unsigned("!=", mask, ir.Constant(mask.type, 0))

    return types.boolean(v, types.intp, v.dtype), generate


@intrinsic
def _say(typing_context: Any, said: Any, v: Any, vectors: Any, lowest: Any, highest: Any) -> Any:
    """``said = clip(floor(v + 1/2), lowest, highest)``, so many vectors."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        said_, v_, vectors_, lowest_, highest_ = args
        number = context.get_data_type(signature.args[0].dtype)
        vector = ir.VectorType(number, LANES)
        half = _everywhere(builder, vector, ir.Constant(number, 0.5))
        low, high = _everywhere(builder, vector, lowest_), _everywhere(builder, vector, highest_)
        name = f"llvm.floor.v{LANES}f{8 * context.get_abi_sizeof(number)}"
        floor = cgutils.get_or_insert_function(builder.module, ir.FunctionType(vector, [vector]), name)
        with cgutils.for_range(builder, vectors_) as loop:
            offset = builder.mul(loop.index, ir.Constant(loop.index.type, LANES))
            membrane, align = _vector_at(context, builder, signature.args[1], v_, offset)
            level, _ = _vector_at(context, builder, signature.args[0], said_, offset)
            rounded = builder.call(floor, [builder.fadd(builder.load(membrane, align=align), half)])
            rounded = builder.select(builder.fcmp_ordered(">", rounded, low), rounded, low)
            rounded = builder.select(builder.fcmp_ordered("<", rounded, high), rounded, high)
            builder.store(rounded, level, align=align)
        return context.get_dummy_value()

    return types.void(said, v, types.intp, v.dtype, v.dtype), generate


@intrinsic
def _add_arriving(
    typing_context: Any,
    i: Any,
    at: Any,
    amounts: Any,
    start: Any,
    levels: Any,
    levels_start: Any,
    vectors: Any,
    level: Any,
) -> Any:
    """``i[at:] += amounts[start:]`` where ``levels[levels_start:]`` is this level, so many vectors."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        i_, at_, amounts_, start_, levels_, levels_start_, vectors_, level_ = args
        vector = ir.VectorType(context.get_data_type(signature.args[0].dtype), LANES)
        now, nothing = _everywhere(builder, vector, level_), ir.Constant(vector, [0.0] * LANES)
        with cgutils.for_range(builder, vectors_) as loop:
            offset = builder.mul(loop.index, ir.Constant(loop.index.type, LANES))
            current, align = _vector_at(context, builder, signature.args[0], i_, builder.add(at_, offset))
            amount, _ = _vector_at(context, builder, signature.args[2], amounts_, builder.add(start_, offset))
            when, _ = _vector_at(context, builder, signature.args[4], levels_, builder.add(levels_start_, offset))
            arrives = builder.fcmp_ordered("==", builder.load(when, align=align), now)
            change = builder.select(arrives, builder.load(amount, align=align), nothing)
            builder.store(builder.fadd(builder.load(current, align=align), change), current, align=align)
        return context.get_dummy_value()

    intp = types.intp
    return types.void(i, intp, amounts, intp, levels, intp, intp, i.dtype), generate


@intrinsic
def _changed(typing_context: Any, i: Any, before: Any, at: Any, neurons: Any, least: Any) -> Any:
    """Count the currents, of so many from a place on, that differ by more than `least` from `before`, then the same."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        i_, before_, at_, neurons_, least_ = args
        number = context.get_data_type(signature.args[0].dtype)
        vector, byte = ir.VectorType(number, LANES), ir.IntType(LANES)
        all_least = _everywhere(builder, vector, least_)
        index = neurons_.type
        name = f"llvm.fabs.v{LANES}f{8 * context.get_abi_sizeof(number)}"
        magnitude = cgutils.get_or_insert_function(builder.module, ir.FunctionType(vector, [vector]), name)
        lanes = ir.Constant(index, LANES)
        count = cgutils.alloca_once_value(builder, ir.Constant(index, 0))

        def changed_at(behind: Any) -> Any:
            """Which lanes of a vector have changed, as bits."""
            offset = builder.add(at_, behind)
            now, align = _vector_at(context, builder, signature.args[0], i_, offset)
            then, _ = _vector_at(context, builder, signature.args[1], before_, offset)
            current = builder.load(now, align=align)
            change = builder.call(magnitude, [builder.fsub(current, builder.load(then, align=align))])
            builder.store(current, then, align=align)
            return builder.bitcast(builder.fcmp_ordered(">", change, all_least), byte)

        def add(mask: Any) -> None:
            builder.store(builder.add(builder.load(count), builder.zext(builder.ctpop(mask), index)), count)

        whole = builder.udiv(neurons_, lanes)
        with cgutils.for_range(builder, whole) as loop:
            add(changed_at(builder.mul(loop.index, lanes)))
        left = builder.urem(neurons_, lanes)
        with builder.if_then(builder.icmp_unsigned("!=", left, ir.Constant(index, 0))):
            low = builder.sub(builder.shl(ir.Constant(byte, 1), builder.trunc(left, byte)), ir.Constant(byte, 1))
            add(builder.and_(changed_at(builder.mul(whole, lanes)), low))
        return builder.load(count)

    return types.intp(i, before, types.intp, types.intp, i.dtype), generate


@compiled
def collect(
    levels: Any,
    image: int,
    images: int,
    first_channel: int,
    channels: int,
    at: int,
    first_row: int,
    event_level: Any,
    event: Any,
    row_start: Any,
) -> int:
    """List the spikes of `images` images from `image` on, row after row, from place `at` on; returns the next place.

    `levels` is ``[B, H, W, C]``. Spikes of row y of image b stand from ``row_start[b, first_row + y, 0]`` to
    ``row_start[b, first_row + y, 1]``.
    """
    for b in range(images):
        for y in range(levels.shape[1]):
            row_start[b, first_row + y, 0] = at
            for x in range(levels.shape[2]):
                for channel in range(channels):
                    level: Any = np.int32(levels[image + b, y, x, first_channel + channel])
                    event_level[at] = level
                    event[at] = (x << _CHANNEL_BITS) | channel
                    # A place is kept only where there is a spike; without a branch, since spikes are unpredictable.
                    at += level > 0
            row_start[b, first_row + y, 1] = at
    return at


@compiled
def sort_by_level(
    event_level: Any,
    event: Any,
    row_start: Any,
    stops: Any,
    by_level: Any,
    starts: Any,
    ranked: Any,
    distinct: Any,
) -> None:
    """Sort each row's spikes by level, falling (a counting sort).

    ``ranked[b]`` lists the levels that occur in image b, and those set in `stops`; the spikes of rank k in a row
    stand from ``starts[b, row, k]`` to ``starts[b, row, k + 1]``.
    """
    images, rows, _ = row_start.shape
    levels = len(stops)
    occurs, place = np.empty(levels, np.bool_), np.zeros(levels, np.int64)
    for b in range(images):
        occurs[:] = stops
        for row in range(rows):
            for index in range(row_start[b, row, 0], row_start[b, row, 1]):
                occurs[event_level[index]] = True
        rank = 0
        for level in range(levels - 1, 0, -1):
            if occurs[level]:
                ranked[b, rank] = level
                rank += 1
        distinct[b] = rank
        for row in range(rows):
            begin, end = row_start[b, row, 0], row_start[b, row, 1]
            for index in range(begin, end):
                place[event_level[index]] += 1
            at = begin
            for k in range(rank):
                level = ranked[b, k]
                starts[b, row, k] = at
                count, place[level] = place[level], at
                at += count
            starts[b, row, rank] = at
            for index in range(begin, end):
                level = event_level[index]
                by_level[place[level]] = event[index]
                place[level] += 1
            for k in range(rank):
                place[ranked[b, k]] = 0


@compiled
def _note_early(
    v: Any,
    i: Any,
    start: int,
    length: int,
    last: int,
    level: int,
    theta: Any,
    window: int,
    fired: Any,
    fired_level: Any,
    early: int,
) -> int:
    """List who of a row has crossed the threshold on the way from level `last` to `level`, and when.

    Returns how many have fired early so far.
    """
    steps = last - level
    for at in range(start, start + length, LANES):
        if not _any_over(v, at, theta):
            continue
        for neuron in range(at, at + LANES):
            if v[neuron] >= theta:
                before = v[neuron] - steps * i[neuron]
                step = 1
                while step < steps and before + step * i[neuron] < theta:
                    step += 1
                fired[early], fired_level[early] = neuron, window + 1 + last - step
                early += 1
                v[neuron] = -np.inf
    return early


@compiled
def _changed_from_readout(
    i: Any,
    start: int,
    width: int,
    block_size: int,
    channels: int,
    bias_level: Any,
    bias_start: int,
    late: bool,
    last_level: int,
    least: Any,
) -> int:
    """Count the currents of a row that readout sets to another value, and the late bias spikes that then set them.

    Bias spikes behind `last_level`, that of the neurons' last step, come when they are done.
    """
    count, one = 0, i.dtype.type(1)
    for x in range(width):
        for neuron in range(x * block_size, x * block_size + channels):
            if late and bias_level[bias_start + neuron] < 0:
                count += (bias_level[bias_start + neuron] >= last_level) + (abs(i[start + neuron]) > least)
            else:
                count += abs(one - i[start + neuron]) > least
    return count


@compiled
def fire(
    out: Any,
    image: int,
    images: int,
    first_output: int,
    outputs: int,
    block_size: int,
    tile_rows: int,
    row_length: int,
    weights: Any,
    block_length: int,
    terms: Any,
    reach: Any,
    reach_row: Any,
    reach_pair: Any,
    pairs: Any,
    column: Any,
    runs: Any,
    channel_at: Any,
    by_level: Any,
    every_start: Any,
    row_start: Any,
    level_of: Any,
    ranked: Any,
    distinct: Any,
    direct: Any,
    direct_weights: Any,
    direct_row: int,
    direct_channels: int,
    direct_first: int,
    bias: Any,
    bias_level: Any,
    bias_stops: Any,
    bias_row_length: int,
    bias_block_length: int,
    late: bool,
    window: int,
    theta: float,
    lowest: int,
    unsaid: int,
    last_level: int,
    changes: Any,
    least_change: float,
) -> None:
    """Let the spikes of some images arrive at all neurons of a range of channels, and say the neurons' levels.

    ``out`` is ``[B, H, W, C]``. A neuron of an output that does not fire says `unsaid`. Unless `changes` is empty,
    nobody says anything: to ``changes[b]`` are added the neuron-steps in which a current changes by more than
    `least_change`, readout included.
    The tables are those of :class:`quartz_plugin.engines.event.Plan`. Without ``every_start``, the levels of the
    spikes in `by_level`, `level_of`, tell where those of a level end.
    """
    height, width = out.shape[1], out.shape[2]
    size = tile_rows * row_length
    vectors = size // LANES
    i, v = np.zeros(size, weights.dtype), np.zeros(size, weights.dtype)
    said = np.empty(size, weights.dtype)
    since = np.zeros(tile_rows, np.int64)
    fired, fired_level = np.empty(size, np.int64), np.empty(size, np.int64)
    counting = len(changes) > 0
    before, least = np.empty(size if counting else 0, weights.dtype), weights.dtype.type(least_change)
    every_channel = out.shape[3]
    flat = out.reshape(-1)
    stops, image_starts = every_start.shape[2], every_start.shape[1] * every_start.shape[2]
    starts = every_start.reshape(-1)
    numbered = len(starts) > 0
    reached_spike = np.empty(0 if numbered else row_start.shape[1], np.int64)
    number = weights.dtype.type
    threshold = number(theta)
    row_vectors, row_neurons = row_length // LANES, width * block_size
    for block in range((outputs + block_size - 1) // block_size):
        channels = min(block_size, outputs - block * block_size)
        block_weights = block * block_length
        bias_start = block * bias_block_length
        first_channel = block * block_size
        for b in range(images):
            for tile in range((height + tile_rows - 1) // tile_rows):
                first_row = tile * tile_rows
                rows = min(tile_rows, height - first_row)
                i[:] = 0
                before[:] = 0
                early = 0
                if not counting:
                    v[:] = -np.inf
                    for row in range(rows):
                        v[row * row_length : row * row_length + row_neurons] = 0
                since[:] = ranked[b, 0] if distinct[b] else 0
                next_bias = 0
                if not numbered:
                    reached_spike[:] = row_start[b, :, 0]
                for k in range(distinct[b]):
                    level, first_start = ranked[b, k], b * image_starts + k
                    biased = next_bias < len(bias_stops) and bias_stops[next_bias] == level
                    next_bias += biased
                    if biased or direct_row:
                        for row in range(rows):
                            if since[row] > level:
                                if counting:
                                    changes[image + b] += _changed(i, before, row * row_length, row_neurons, least)
                                elif _advance(
                                    v, i, row * row_length, row_vectors, number(since[row] - level), threshold
                                ):
                                    early = _note_early(
                                        v, i, row * row_length, row_length, since[row], level, threshold, window,
                                        fired, fired_level, early,
                                    )  # fmt: skip
                                since[row] = level
                    if biased:
                        for row in range(rows):
                            place = bias_start + (first_row + row) * bias_row_length
                            _add_arriving(
                                i,
                                row * row_length,
                                bias,
                                place,
                                bias_level,
                                place,
                                row_length // LANES,
                                weights.dtype.type(level),
                            )
                    if direct_row:
                        for row in range(rows):
                            for x in range(0, width, direct_row):
                                _add_arriving(
                                    i,
                                    row * row_length + x * block_size,
                                    direct_weights,
                                    block * row_length,
                                    direct,
                                    (((image + b) * height + first_row + row) * width + x) * direct_channels
                                    + direct_first
                                    + first_channel,
                                    direct_row * channels // LANES,
                                    weights.dtype.type(level),
                                )
                    for term in range(len(terms)):
                        inputs_row, start = terms[term, 0], block_weights + terms[term, 1]
                        input_stride, columns, first_tile = terms[term, 2], terms[term, 3], terms[term, 5]
                        channel_table, per_group = terms[term, 4], terms[term, 6]
                        for reached in range(_at(reach, first_tile + tile), _at(reach, first_tile + tile + 1)):
                            input_row = inputs_row + _at(reach_row, reached)
                            if numbered:
                                place = first_start + input_row * stops
                                begin, end = _at(starts, place), _at(starts, place + 1)
                            else:
                                begin = end = reached_spike[input_row]
                                while end < row_start[b, input_row, 1] and level_of[end] == level:
                                    end += 1
                                reached_spike[input_row] = end
                            if begin == end:
                                continue
                            first_pair, last_pair = _at(reach_pair, reached), _at(reach_pair, reached + 1)
                            for pair in range(first_pair, last_pair):
                                row = _at(pairs, 3 * pair + 2)
                                if _at(since, row) > level:
                                    if counting:
                                        changes[image + b] += _changed(i, before, row * row_length, row_neurons, least)
                                    elif _advance(
                                        v, i, row * row_length, row_vectors, number(since[row] - level), threshold
                                    ):
                                        early = _note_early(
                                            v, i, row * row_length, row_length, since[row], level, threshold, window,
                                            fired, fired_level, early,
                                        )  # fmt: skip
                                    since[row] = level
                            while begin < end:
                                # Spikes of one place reach the same neurons, those of several groups do not.
                                x = _at(by_level, begin) >> _CHANNEL_BITS
                                stop = begin + 1
                                at = 0
                                if per_group:
                                    channel = _at(by_level, begin) & _CHANNEL_MASK
                                    at = channel_at[channel_table + channel]
                                    if per_group == 1:
                                        # Depthwise: one weight for each neuron that is reached.
                                        for run in range(_at(column, columns + x), _at(column, columns + x + 1)):
                                            of = start + channel * input_stride + _at(runs, 3 * run + 1)
                                            for pair in range(first_pair, last_pair):
                                                i[at + _at(runs, 3 * run) + pairs[3 * pair]] += weights[
                                                    of + pairs[3 * pair + 1]
                                                ]
                                        begin = stop
                                        continue
                                else:
                                    while stop < end and _at(by_level, stop) >> _CHANNEL_BITS == x:
                                        stop += 1
                                for run in range(_at(column, columns + x), _at(column, columns + x + 1)):
                                    _deliver(
                                        i,
                                        at + _at(runs, 3 * run),
                                        weights,
                                        start + _at(runs, 3 * run + 1),
                                        input_stride,
                                        by_level,
                                        begin,
                                        stop,
                                        pairs,
                                        first_pair,
                                        last_pair,
                                        _at(runs, 3 * run + 2),
                                    )
                                begin = stop
                if counting:
                    for row in range(rows):
                        changes[image + b] += _changed(i, before, row * row_length, row_neurons, least)
                        if channels == block_size and not late:
                            # All become 1.
                            before[row * row_length : (row + 1) * row_length] = 1
                            changes[image + b] += _changed(i, before, row * row_length, row_neurons, least)
                            continue
                        place = bias_start + (first_row + row) * bias_row_length
                        changes[image + b] += _changed_from_readout(
                            i, row * row_length, width, block_size, channels, bias_level, place, late, last_level, least
                        )
                    continue
                for row in range(rows):
                    crossed = since[row] > 0 and _advance(
                        v, i, row * row_length, row_vectors, number(since[row]), threshold
                    )
                    if crossed:
                        early = _note_early(
                            v, i, row * row_length, row_length, since[row], 0, threshold, window,
                            fired, fired_level, early,
                        )  # fmt: skip
                if late:
                    # A negative bias is a spike after readout, until which nothing pulls.
                    for row in range(rows):
                        place = bias_start + (first_row + row) * bias_row_length
                        for neuron in range(row_length):
                            v[row * row_length + neuron] += min(bias_level[place + neuron], 0)
                _say(said, v, vectors, weights.dtype.type(lowest), weights.dtype.type(window))
                if lowest < 0:
                    for neuron in range(size):
                        if v[neuron] < lowest - weights.dtype.type(0.5):
                            said[neuron] = unsaid
                for spike in range(early):
                    said[fired[spike]] = fired_level[spike]
                for row in range(rows):
                    neuron = row * row_length
                    to = (((image + b) * height + first_row + row) * width) * every_channel
                    to += first_output + first_channel
                    if outputs == block_size == every_channel:
                        flat[to : to + width * block_size] = said[neuron : neuron + width * block_size]
                    else:
                        for _ in range(width):
                            flat[to : to + channels] = said[neuron : neuron + channels]
                            to += every_channel
                            neuron += block_size
