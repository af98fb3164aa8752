"""Loops in vectors of LANES numbers, as instructions of LLVM: arrays do not live in registers in numba.

Their arrays are pointers, those of :func:`as_pointers`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from quartz_plugin.engines.event.constants import (
    GROUP,
    LANES,
    MOST_VECTORS,
    REGISTERS,
    UNIT_BITS,
    UNIT_MASK,
    USUAL_RUNS,
)


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
def deliver(typing_context: Any, i: Any, weights: Any, spikes: Any, runs: Any, vectors: Any, span: Any) -> Any:
    """Add the weights of spikes, one after the other, to the currents that each of them reaches.

    Of a spike ``weight << 32 | neuron`` and run r: ``i[neuron + runs[2 r]:] += weights[weight + runs[2 r + 1]:]``, so
    many vectors; 0 of them: one number. ``span`` is the first and last spike and the first and last run.
    """

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        vectors_, span_ = args[4:]
        kernel = _Kernel(context, builder, signature, args)
        first, last, first_run, last_run = cgutils.unpack_tuple(builder, span_, 4)

        def add_run(width: int, at: Any, start: Any) -> None:
            if width == 0:
                place, weight = builder.gep(args[0], [at]), builder.gep(args[1], [start])
                builder.store(builder.fadd(builder.load(place), builder.load(weight)), place)
            for k in range(width):
                place, align = kernel.vector(0, at, k)
                weight, _ = kernel.vector(1, start, k)
                total = builder.fadd(builder.load(place, align=align), builder.load(weight, align=align))
                builder.store(total, place, align=align)

        def add_runs(width: int) -> None:
            count = builder.sub(last_run, first_run)
            with builder.if_else(builder.icmp_signed("==", count, ir.Constant(count.type, USUAL_RUNS))) as (
                usual,
                other,
            ):
                with usual:
                    # Places in registers, where those of other runs are read anew for each spike.
                    runs = [
                        kernel.places(builder.add(first_run, ir.Constant(count.type, each)))
                        for each in range(USUAL_RUNS)
                    ]
                    with kernel.loop(first, last) as spike:
                        to, of = kernel.spike(spike)
                        for run_at, run_start in runs:
                            add_run(width, builder.add(to, run_at), builder.add(of, run_start))
                with other, kernel.loop(first, last) as spike:
                    to, of = kernel.spike(spike)
                    with kernel.loop(first_run, last_run) as run:
                        add_run(width, *kernel.run(run, to, of))

        _switch(builder, vectors_, range(MOST_VECTORS + 1), add_runs)
        return context.get_dummy_value()

    four = types.UniTuple(types.intp, 4)
    return types.void(i, weights, spikes, runs, types.intp, four), generate


@intrinsic
def collect(typing_context: Any, i: Any, weights: Any, spikes: Any, runs: Any, vectors: Any, span: Any) -> Any:
    """Do what :func:`deliver` does where all spikes come from one place: currents stay in registers meanwhile."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        vectors_, span_ = args[4:]
        kernel = _Kernel(context, builder, signature, args)
        first, last, first_run, last_run = cgutils.unpack_tuple(builder, span_, 4)
        one, two = (ir.Constant(first.type, number) for number in (1, 2))

        def add_runs(width: int) -> None:
            with kernel.loop(first_run, last_run) as run:
                at, _ = kernel.run(run, kernel.spike(first)[0], first)
                places = [kernel.vector(0, at, k) for k in range(width)]
                zero = ir.Constant(places[0][0].type.pointee, [0.0] * LANES)
                # Two sums, for each addition waits for the one before.
                totals = [cgutils.alloca_once_value(builder, builder.load(p, align=align)) for p, align in places]
                others = [cgutils.alloca_once_value(builder, zero) for _ in places]

                def add(spike: Any, sums: Any) -> None:
                    _, start = kernel.run(run, spike, kernel.spike(spike)[1])
                    for k, total in enumerate(sums):
                        weight, align = kernel.vector(1, start, k)
                        builder.store(builder.fadd(builder.load(total), builder.load(weight, align=align)), total)

                pairs_end = builder.sub(last, builder.and_(builder.sub(last, first), one))
                with cgutils.for_range_slice(builder, first, pairs_end, two) as (spike, _):
                    add(spike, totals)
                    add(builder.add(spike, one), others)
                with builder.if_then(builder.icmp_signed("<", pairs_end, last)):
                    add(pairs_end, totals)
                for (place, align), total, other in zip(places, totals, others, strict=True):
                    builder.store(builder.fadd(builder.load(total), builder.load(other)), place, align=align)

        _switch(builder, vectors_, range(1, REGISTERS + 1), add_runs)
        return context.get_dummy_value()

    four = types.UniTuple(types.intp, 4)
    return types.void(i, weights, spikes, runs, types.intp, four), generate


class _Kernel:
    """Addresses in the arrays ``(i, weights, spikes, runs)`` of what delivers spikes."""

    def __init__(self, context: Any, builder: Any, signature: Any, args: Any) -> None:
        self.context, self.builder, self.types, self.args = context, builder, signature.args, args
        self.index = context.get_value_type(types.intp)

    @contextmanager
    def loop(self, start: Any, stop: Any) -> Iterator[Any]:
        """Count from start up to stop."""
        with cgutils.for_range_slice(self.builder, start, stop, ir.Constant(self.index, 1)) as (index, _):
            yield index

    def spike(self, number: Any) -> Any:
        """Where a spike's currents and weights start."""
        spike = self.builder.load(self.builder.gep(self.args[2], [number]))
        mask, bits = (ir.Constant(spike.type, value) for value in (UNIT_MASK, UNIT_BITS))
        return self.builder.and_(spike, mask), self.builder.lshr(spike, bits)

    def places(self, number: Any) -> Any:
        """Where a run's currents and weights start, behind those of a spike."""
        place = self.builder.shl(number, ir.Constant(self.index, 1))
        behind = self.builder.or_(place, ir.Constant(self.index, 1))
        return [self.builder.load(self.builder.gep(self.args[3], [each])) for each in (place, behind)]

    def run(self, number: Any, to: Any, of: Any) -> Any:
        """Where a run's do, of a spike whose currents and weights start there."""
        return [self.builder.add(*each) for each in zip((to, of), self.places(number), strict=True)]

    def vector(self, array: int, start: Any, number: int) -> Any:
        """Pointer to a vector of currents or weights, and its alignment."""
        offset = self.builder.add(start, ir.Constant(self.index, number * LANES))
        return _vector_at(self.context, self.builder, self.types[array], self.args[array], offset)


def _switch(builder: Any, number: Any, cases: Iterable[int], write: Callable[[int], None]) -> None:
    """Code of its own for each case."""
    done = builder.append_basic_block("done")
    switch = builder.switch(number, done)
    for case in cases:
        block = builder.append_basic_block(f"case_{case}")
        switch.add_case(ir.Constant(number.type, case), block)
        builder.position_at_end(block)
        write(case)
        builder.branch(done)
    builder.position_at_end(done)


@intrinsic
def advance(typing_context: Any, v: Any, i: Any, at: Any, steps: Any, theta: Any) -> Any:
    """``v[at:] += steps * i[at:]``, GROUP vectors; bits of the membranes that are then at the threshold."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        v_, i_, at_, steps_, theta_ = args
        vector = ir.VectorType(context.get_data_type(signature.args[0].dtype), LANES)
        all_steps, all_theta = _everywhere(builder, vector, steps_), _everywhere(builder, vector, theta_)
        over = []
        for k in range(GROUP):
            offset = builder.add(at_, ir.Constant(at_.type, k * LANES))
            membrane, align = _vector_at(context, builder, signature.args[0], v_, offset)
            current, _ = _vector_at(context, builder, signature.args[1], i_, offset)
            change = builder.fmul(all_steps, builder.load(current, align=align))
            total = builder.fadd(builder.load(membrane, align=align), change)
            builder.store(total, membrane, align=align)
            over.append(builder.fcmp_ordered(">=", total, all_theta))
        while len(over) > 1:
            lanes = ir.Constant(
                ir.VectorType(ir.IntType(32), 2 * over[0].type.count), list(range(2 * over[0].type.count))
            )
            over = [builder.shuffle_vector(*pair, lanes) for pair in zip(over[::2], over[1::2], strict=True)]
        return builder.zext(builder.bitcast(over[0], ir.IntType(GROUP * LANES)), context.get_value_type(types.int64))

    return types.int64(v, i, types.intp, v.dtype, v.dtype), generate


@intrinsic
def pointer_at(typing_context: Any, pointer: Any, place: Any) -> Any:
    """Return the pointer to the numbers from a place on."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.gep(args[0], [args[1]])

    return pointer(pointer, types.intp), generate


@intrinsic
def lowest_bit(typing_context: Any, mask: Any) -> Any:
    """Place of the lowest bit that is set, of a mask other than 0."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.cttz(args[0], ir.Constant(ir.IntType(1), 1))

    return types.int64(types.int64), generate


@intrinsic
def round_to_levels(typing_context: Any, levels: Any, v: Any, at: Any, vectors: Any, lowest: Any, highest: Any) -> Any:
    """``levels[at:] = clip(floor(v[at:] + 1/2), lowest, highest)``, so many vectors."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        levels_, v_, at_, vectors_, lowest_, highest_ = args
        number = context.get_data_type(signature.args[0].dtype)
        vector = ir.VectorType(number, LANES)
        half = _everywhere(builder, vector, ir.Constant(number, 0.5))
        low, high = _everywhere(builder, vector, lowest_), _everywhere(builder, vector, highest_)
        name = f"llvm.floor.v{LANES}f{8 * context.get_abi_sizeof(number)}"
        floor = cgutils.get_or_insert_function(builder.module, ir.FunctionType(vector, [vector]), name)
        with cgutils.for_range(builder, vectors_) as loop:
            offset = builder.add(at_, builder.mul(loop.index, ir.Constant(loop.index.type, LANES)))
            membrane, align = _vector_at(context, builder, signature.args[1], v_, offset)
            level, _ = _vector_at(context, builder, signature.args[0], levels_, offset)
            rounded = builder.call(floor, [builder.fadd(builder.load(membrane, align=align), half)])
            rounded = builder.select(builder.fcmp_ordered(">", rounded, low), rounded, low)
            rounded = builder.select(builder.fcmp_ordered("<", rounded, high), rounded, high)
            builder.store(rounded, level, align=align)
        return context.get_dummy_value()

    return types.void(levels, v, types.intp, types.intp, v.dtype, v.dtype), generate


@intrinsic
def copy(typing_context: Any, to: Any, at: Any, values: Any, start: Any, vectors: Any) -> Any:
    """``to[at:] = values[start:]``, so many vectors."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        to_, at_, values_, start_, vectors_ = args
        with cgutils.for_range(builder, vectors_) as loop:
            offset = builder.mul(loop.index, ir.Constant(loop.index.type, LANES))
            value, align = _vector_at(context, builder, signature.args[2], values_, builder.add(start_, offset))
            place, _ = _vector_at(context, builder, signature.args[0], to_, builder.add(at_, offset))
            builder.store(builder.load(value, align=align), place, align=align)
        return context.get_dummy_value()

    return types.void(to, types.intp, values, types.intp, types.intp), generate


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
