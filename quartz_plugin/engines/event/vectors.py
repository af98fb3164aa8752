"""Loops in vectors of LANES numbers, as instructions of LLVM: arrays do not live in registers in numba.

Their arrays are pointers, those of :func:`as_pointers`.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from quartz_plugin.engines.event.constants import CHANNEL_MASK, LANES, REGISTERS


@intrinsic
def as_pointers(typing_context: Any, record: Any) -> Any:
    """Return the record with pointers to the numbers of its flat arrays in their place.

    numba counts who holds an array each time that a record gives it; pointers cost nothing, and are read and written
    as arrays are. Who calls must hold the arrays meanwhile.
    """
    fields = [types.CPointer(field.dtype) if isinstance(field, types.Array) else field for field in record]

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        values = [
            context.make_array(field)(context, builder, value).data if isinstance(field, types.Array) else value
            for field, value in zip(record, cgutils.unpack_tuple(builder, args[0], len(fields)), strict=True)
        ]
        return context.make_tuple(builder, signature.return_type, values)

    return types.NamedTuple(fields, record.instance_class)(record), generate


def _vector_at(context: Any, builder: Any, pointer_type: Any, pointer: Any, index: Any) -> tuple[Any, int]:
    """Pointer to a vector of numbers from an index on, and the alignment of its numbers."""
    number = context.get_data_type(pointer_type.dtype)
    place = builder.bitcast(builder.gep(pointer, [index]), ir.VectorType(number, LANES).as_pointer())
    return place, context.get_abi_sizeof(number)


def _everywhere(builder: Any, vector: Any, number: Any) -> Any:
    """Vector of one number."""
    undefined = ir.Constant(vector, ir.Undefined)
    first = builder.insert_element(undefined, number, ir.Constant(ir.IntType(32), 0))
    return builder.shuffle_vector(first, undefined, ir.Constant(ir.VectorType(ir.IntType(32), LANES), [0] * LANES))


@intrinsic
def add_weights(typing_context: Any, i: Any, weights: Any, spikes: Any, pairs: Any, run: Any, span: Any) -> Any:
    """Add the weights of some spikes of one place to a run of currents in each of some rows.

    For each pair (place of a row, place of a kernel row, number of the row) of ``pairs`` and each spike:
    ``i[at + row:] += weights[start + kernel row + channel * input_stride:]``, so many vectors. Currents stay in
    registers while the spikes go by. ``run`` is ``(at, start, vectors, input_stride)``, ``span`` the first and last
    spike and the first and last pair.
    """

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        i_, weights_, spikes_, pairs_, run_, span_ = args
        at_, start_, vectors_, stride_ = cgutils.unpack_tuple(builder, run_, 4)
        first_, last_, first_pair_, last_pair_ = cgutils.unpack_tuple(builder, span_, 4)
        index_type = vectors_.type
        mask = ir.Constant(index_type, CHANNEL_MASK)

        def add_chunk(width: int, to: Any, of: Any) -> None:
            places = [
                _vector_at(context, builder, signature.args[0], i_, builder.add(to, ir.Constant(to.type, k * LANES)))
                for k in range(width)
            ]
            totals = [cgutils.alloca_once_value(builder, builder.load(place, align=align)) for place, align in places]
            with cgutils.for_range_slice(builder, first_, last_, ir.Constant(index_type, 1)) as (spike, _):
                channel = builder.and_(builder.load(builder.gep(spikes_, [spike])), mask)
                row = builder.add(of, builder.mul(channel, stride_))
                for k, total in enumerate(totals):
                    offset = builder.add(row, ir.Constant(row.type, k * LANES))
                    weight, align = _vector_at(context, builder, signature.args[1], weights_, offset)
                    builder.store(builder.fadd(builder.load(total), builder.load(weight, align=align)), total)
            for (place, align), total in zip(places, totals, strict=True):
                builder.store(builder.load(total), place, align=align)

        def moved(place: Any, vectors_before: Any) -> Any:
            return builder.add(place, builder.mul(vectors_before, ir.Constant(index_type, LANES)))

        with cgutils.for_range_slice(builder, first_pair_, last_pair_, ir.Constant(index_type, 1)) as (pair, _):
            place = builder.mul(pair, ir.Constant(index_type, 3))
            to = builder.add(at_, builder.load(builder.gep(pairs_, [place])))
            place = builder.add(place, ir.Constant(index_type, 1))
            of = builder.add(start_, builder.load(builder.gep(pairs_, [place])))
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

    four = types.UniTuple(types.intp, 4)
    return types.void(i, weights, spikes, pairs, four, four), generate


@intrinsic
def advance(typing_context: Any, v: Any, i: Any, at: Any, vectors: Any, steps: Any, theta: Any) -> Any:
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
def any_over(typing_context: Any, v: Any, at: Any, theta: Any) -> Any:
    """True where any membrane in the vector at this place is at the threshold."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        v_, at_, theta_ = args
        vector = ir.VectorType(context.get_data_type(signature.args[0].dtype), LANES)
        membrane, align = _vector_at(context, builder, signature.args[0], v_, at_)
        over = builder.fcmp_ordered(">=", builder.load(membrane, align=align), _everywhere(builder, vector, theta_))
        mask = builder.bitcast(over, ir.IntType(LANES))
        return builder.icmp_unsigned("!=", mask, ir.Constant(mask.type, 0))

    return types.boolean(v, types.intp, v.dtype), generate


@intrinsic
def round_to_levels(typing_context: Any, levels: Any, v: Any, vectors: Any, lowest: Any, highest: Any) -> Any:
    """``levels = clip(floor(v + 1/2), lowest, highest)``, so many vectors."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        levels_, v_, vectors_, lowest_, highest_ = args
        number = context.get_data_type(signature.args[0].dtype)
        vector = ir.VectorType(number, LANES)
        half = _everywhere(builder, vector, ir.Constant(number, 0.5))
        low, high = _everywhere(builder, vector, lowest_), _everywhere(builder, vector, highest_)
        name = f"llvm.floor.v{LANES}f{8 * context.get_abi_sizeof(number)}"
        floor = cgutils.get_or_insert_function(builder.module, ir.FunctionType(vector, [vector]), name)
        with cgutils.for_range(builder, vectors_) as loop:
            offset = builder.mul(loop.index, ir.Constant(loop.index.type, LANES))
            membrane, align = _vector_at(context, builder, signature.args[1], v_, offset)
            level, _ = _vector_at(context, builder, signature.args[0], levels_, offset)
            rounded = builder.call(floor, [builder.fadd(builder.load(membrane, align=align), half)])
            rounded = builder.select(builder.fcmp_ordered(">", rounded, low), rounded, low)
            rounded = builder.select(builder.fcmp_ordered("<", rounded, high), rounded, high)
            builder.store(rounded, level, align=align)
        return context.get_dummy_value()

    return types.void(levels, v, types.intp, v.dtype, v.dtype), generate


@intrinsic
def add_arriving(typing_context: Any, i: Any, amounts: Any, levels: Any, places: Any, vectors: Any, level: Any) -> Any:
    """``i[at:] += amounts[start:]`` where ``levels[levels_start:]`` is this level, so many vectors.

    ``places`` are ``(at, start, levels_start)``.
    """

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        i_, amounts_, levels_, places_, vectors_, level_ = args
        at_, start_, levels_start_ = cgutils.unpack_tuple(builder, places_, 3)
        vector = ir.VectorType(context.get_data_type(signature.args[0].dtype), LANES)
        now, nothing = _everywhere(builder, vector, level_), ir.Constant(vector, [0.0] * LANES)
        with cgutils.for_range(builder, vectors_) as loop:
            offset = builder.mul(loop.index, ir.Constant(loop.index.type, LANES))
            current, align = _vector_at(context, builder, signature.args[0], i_, builder.add(at_, offset))
            amount, _ = _vector_at(context, builder, signature.args[1], amounts_, builder.add(start_, offset))
            when, _ = _vector_at(context, builder, signature.args[2], levels_, builder.add(levels_start_, offset))
            arrives = builder.fcmp_ordered("==", builder.load(when, align=align), now)
            change = builder.select(arrives, builder.load(amount, align=align), nothing)
            builder.store(builder.fadd(builder.load(current, align=align), change), current, align=align)
        return context.get_dummy_value()

    return types.void(i, amounts, levels, types.UniTuple(types.intp, 3), types.intp, i.dtype), generate


@intrinsic
def count_changed(typing_context: Any, i: Any, before: Any, at: Any, neurons: Any, least: Any) -> Any:
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
            """Lanes of a vector that have changed, as bits."""
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
