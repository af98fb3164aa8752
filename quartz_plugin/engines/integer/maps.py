"""Linear maps from levels in the arithmetic of int8, by operators that torch calls for quantised networks.

Nobody promises these operators: they are looked for, and tried once in a process against sums in float64. Without them
every layer is computed in floating point, as exactly.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from quartz_plugin.engines.pools import largest_of_tiles, tile_of
from quartz_plugin.operators.linear_map import Convolution, Shape3
from quartz_plugin.operators.modules import per_dimension

MOST_LEVEL, MOST_WEIGHT = 255, 127
"""Largest numbers that uint8 levels and int8 weights are (-128 is not used)."""

SIXTEEN_BITS = 2**15 - 1
"""Largest sum of two products, where a CPU adds them up in 16 bits first."""

MOST_SUM = 2**31 - 1

USED = True
"""Whether the operators are used where they work."""


class IntegerMap:
    """A convolution, or a matrix product, of uint8 levels with int8 weights.

    Parameters
    ----------
    convolution : Convolution
        The map; its weights are whole multiples of `grid`, at most 127 of them.
    grid : Tensor
        float64, a power of two for each output channel.
    shape : tuple of int
        The value, ``[C, H, W]``.
    units : tuple of int
        Its shape as its readers know it, of as many units.

    Examples
    --------
    >>> weight = torch.tensor([[0.5, -0.25]]).view(1, 2, 1, 1)
    >>> convolution = Convolution(source="x", source_shape=(2, 1, 1), weight=weight)
    >>> levels = torch.tensor([[3, 2]], dtype=torch.uint8)
    >>> if operators_work():
    ...     in_integers = IntegerMap(convolution, torch.tensor([0.25]).double(), (1, 1, 1), (1,))
    ...     assert in_integers.drive(levels).tolist() == [[1.0]]
    """

    def __init__(self, convolution: Convolution, grid: Tensor, shape: Shape3, units: Sequence[int]) -> None:
        c = convolution
        self.inputs = slice(c.first_input, c.first_input + c.inputs)
        self.all_inputs = (c.first_input, c.inputs) == (0, c.source_shape[0])
        self.source_shape, self.shape, self.units = c.source_shape, shape, tuple(units)
        self.is_product = c.kernel == (1, 1) and c.groups == 1 and c.source_shape[1:] == shape[1:] == (1, 1)
        self.pad, padding = _padding(c, shape)
        whole = (c.weight.detach() / grid.to(c.weight.dtype).view(-1, 1, 1, 1)).to(torch.int8)
        self.scale, self.zero = grid.float(), torch.zeros(len(grid), dtype=torch.int64)
        self.where = [list(c.stride), padding, list(c.dilation), c.groups]
        if self.is_product:
            self.packed = torch.ops.onednn.qlinear_prepack(whole.flatten(1), None)
        else:
            self.packed = torch.ops.onednn.qconv_prepack(whole, self.scale, 1.0, 0, *self.where, None)

    def drive(self, levels: Tensor, bias: Tensor | None = None) -> Tensor:
        """What the map adds up, and a number for each output channel, in float32."""
        return self._call(levels, bias, torch.float32, "none", [])

    def levels(self, levels: Tensor, bias: Tensor | None, window: int) -> Tensor:
        """The same rounded to the nearest whole number and clipped to [0, window], as uint8.

        There must be no ties: the operators round them to even.
        """
        if window == MOST_LEVEL:
            return self._call(levels, bias, torch.uint8, "none", [])
        return self._call(levels, bias, torch.uint8, "hardtanh", [0.0, float(window)])

    def levels_of_sum(self, levels: Tensor, others: Tensor, gain: float, bias: Tensor | None, window: int) -> Tensor:
        """The same with other levels, times a number, added first; overwrites these."""
        total = self._added(levels, others, gain, bias)
        return total if window == MOST_LEVEL else total.clamp_(max=window)

    def adds_to(self, total: Tensor) -> bool:
        """Check whether :meth:`drive_onto` takes a value."""
        return not self.is_product and total.dtype == torch.float32

    def drive_onto(self, levels: Tensor, total: Tensor, bias: Tensor | None) -> Tensor:
        """:meth:`drive` added to a float32 tensor, which may be overwritten."""
        return self._added(levels, total, 1.0, bias)

    def _added(self, levels: Tensor, others: Tensor, gain: float, bias: Tensor | None) -> Tensor:
        """Add to others, times a number, in their type and their memory."""
        others = _as_images(others, self.shape)
        how: tuple[Any, ...] = 1.0, 0, others.dtype, gain, 0, "sum", 1.0, None, [], ""
        total: Tensor = torch.ops.onednn.qconv2d_pointwise.binary(
            *self._arguments(levels), others, bias, *self.where, *how
        )
        return self._as_units(total)

    def _arguments(self, levels: Tensor) -> tuple[Any, ...]:
        if not self.is_product:
            levels = _as_images(levels, self.source_shape)
            if not self.all_inputs:
                levels = levels[:, self.inputs].contiguous(memory_format=torch.channels_last)
            if any(self.pad):
                levels = F.pad(levels, self.pad).contiguous(memory_format=torch.channels_last)
        else:
            levels = levels.reshape(len(levels), -1)
            levels = levels if self.all_inputs else levels[:, self.inputs].contiguous()
        return levels, 1.0, 0, self.packed, self.scale, self.zero

    def _call(
        self, levels: Tensor, bias: Tensor | None, dtype: torch.dtype, follows: str, numbers: list[float]
    ) -> Tensor:
        where = [] if self.is_product else self.where
        operator = torch.ops.onednn.qlinear_pointwise if self.is_product else torch.ops.onednn.qconv_pointwise
        result: Tensor = operator(*self._arguments(levels), bias, *where, 1.0, 0, dtype, follows, numbers, "")
        return self._as_units(result)

    def _as_units(self, result: Tensor) -> Tensor:
        return result if tuple(result.shape[1:]) == self.units else result.reshape(len(result), *self.units)


def has_integer_form(convolution: Convolution) -> bool:
    """Check whether the operators carry out a map of this kind."""
    return not convolution.transposed


def rows_fit(whole: Tensor, level: int) -> bool:
    """Check whether int8 sums of weights ``[outputs, ...]``, whole numbers, times levels up to this are exact here."""
    rows = whole.flatten(1)
    if bool((rows.abs() > MOST_WEIGHT).any()) or level > MOST_LEVEL:
        return False
    if bool((rows.abs().sum(1, dtype=torch.float64) * level > MOST_SUM).any()):
        return False
    if not adds_in_16_bits() or 2 * MOST_WEIGHT * level <= SIXTEEN_BITS:
        return True
    # Which two products are added first is the library's affair.
    pairs = [sign.clamp(min=0).topk(min(2, rows.shape[1]), dim=1).values.sum(1) for sign in (rows, -rows)]
    return not any(bool((pair * level > SIXTEEN_BITS).any()) for pair in pairs)


def max_pool(levels: Tensor, pool: Any) -> Tensor | None:
    """Largest uint8 level in each window; None where there is no operator for it.

    Parameters
    ----------
    levels : Tensor
        ``[B, C, H, W]``, channels-last.
    pool : nn.Module
        The pooling.
    """
    if type(pool) is not torch.nn.MaxPool2d or levels.dim() != 4:
        return None
    if (tile := tile_of(pool)) is not None:
        return largest_of_tiles(levels, *tile)
    if not operators_work():
        return None
    windows = [per_dimension(each, 2) for each in (pool.kernel_size, pool.stride, pool.padding, pool.dilation)]
    found: Tensor = torch.ops.quantized.max_pool2d(levels, *windows, pool.ceil_mode)
    return found


def _as_images(levels: Tensor, shape: Shape3) -> Tensor:
    if tuple(levels.shape[1:]) != shape:
        levels = levels.reshape(len(levels), *shape)
    return levels.contiguous(memory_format=torch.channels_last)


def _padding(c: Convolution, shape: Shape3) -> tuple[list[int], list[int]]:
    """Padding that comes first, as ``F.pad`` takes it, and that of the operator, the same on both sides."""
    ends = []
    for dim in (0, 1):
        reach = (shape[1 + dim] - 1) * c.stride[dim] + (c.kernel[dim] - 1) * c.dilation[dim] + 1
        ends.append(reach - c.source_shape[1 + dim] - c.padding[dim])
    same = all(end <= start and start - end < s for start, end, s in zip(c.padding, ends, c.stride, strict=True))
    if same and min(c.padding) >= 0:
        return [0, 0, 0, 0], list(c.padding)
    return [c.padding[1], ends[1], c.padding[0], ends[0]], [0, 0]


def operators_work() -> bool:
    """Check whether this torch, on this CPU, has the operators, and whether they add up exactly."""
    return USED and _tried()[0]


def adds_in_16_bits() -> bool:
    """Check whether this CPU adds two products up in 16 bits, where large ones saturate."""
    return _tried()[1]


@functools.cache
def _tried() -> tuple[bool, bool]:
    try:
        with torch.inference_mode(False), torch.no_grad():
            if not all(_is_exact(map_, shape, 64, MOST_LEVEL) for map_, shape in _examples()):
                return False, True
            return _pools(), not all(_is_exact(map_, shape, MOST_WEIGHT, MOST_LEVEL) for map_, shape in _examples())
    except (AttributeError, RuntimeError, TypeError, NotImplementedError):
        return False, True


def _examples() -> Iterator[tuple[Convolution, Shape3]]:
    """Convolutions of each kind that a library may have code of its own for."""
    for inputs, outputs, kernel, groups in itertools.product((1, 3, 16, 36), (1, 20, 64), (1, 3, 5), (1, 0)):
        g = inputs if groups == 0 else 1
        o = outputs if groups else inputs
        weight = torch.zeros(o, inputs // g, kernel, kernel)
        shape = (inputs, 6, 7)
        padding = (kernel // 2, kernel // 2)
        yield (
            Convolution(source="", source_shape=shape, weight=weight, padding=padding, groups=g),
            (o, 6, 7),
        )
    yield Convolution(source="", source_shape=(300, 1, 1), weight=torch.zeros(10, 300, 1, 1)), (10, 1, 1)


def _is_exact(example: Convolution, shape: Shape3, weight: int, level: int) -> bool:
    """Compare a map of weights and levels, the largest among them, with its sums in float64."""
    draw = torch.Generator().manual_seed(0)
    whole = torch.randint(-weight, weight + 1, example.weight.shape, generator=draw).double()
    levels = torch.randint(0, level + 1, (3, *example.source_shape), generator=draw)
    # The largest weights and levels side by side; so many that float32 still holds their sum.
    whole.flatten(1)[::3, :64], whole.flatten(1)[1::6, :64] = weight, -weight
    levels[0] = level
    grid = torch.full((len(whole),), 2.0**-6, dtype=torch.float64)
    bias = torch.arange(len(whole)) % 7 + 2.0**-7
    convolution = Convolution(**vars(example) | {"weight": whole * 2.0**-6})
    map_, given = IntegerMap(convolution, grid, shape, shape), levels.to(torch.uint8)
    wanted = F.conv2d(
        levels.double(), convolution.weight, bias.double(), example.stride, example.padding, 1, example.groups
    )
    rounded = wanted.round().clamp(0, 100)
    others = torch.randint(0, 50, wanted.shape, generator=draw)
    if not torch.equal(map_.drive(given, bias).double(), wanted):
        return False
    if not torch.equal(map_.levels(given, bias, 100).double(), rounded):
        return False
    if map_.is_product:
        return True
    summed = map_.levels_of_sum(given, others.to(torch.uint8), 0.75, bias, 100)
    added = map_.drive_onto(given, others * 0.75, bias)
    total = wanted + 0.75 * others
    return torch.equal(summed.double(), total.round().clamp(0, 100)) and torch.equal(added.double(), total)


def _pools() -> bool:
    draw = torch.Generator().manual_seed(0)
    levels = torch.randint(0, 256, (2, 19, 9, 8), generator=draw, dtype=torch.uint8)
    found = torch.ops.quantized.max_pool2d(
        levels.contiguous(memory_format=torch.channels_last), [3, 2], [2, 2], [1, 0], [1, 1], True
    )
    return torch.equal(found.float(), F.max_pool2d(levels.float(), (3, 2), 2, (1, 0), 1, True))


__all__ = [
    "MOST_LEVEL",
    "IntegerMap",
    "adds_in_16_bits",
    "has_integer_form",
    "max_pool",
    "operators_work",
    "rows_fit",
]
