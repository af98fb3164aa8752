"""Sketches of values that stream past: their quantiles and ranges, without keeping them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from quartz_plugin.config import Shifts
from quartz_plugin.functional import fake_quantize
from quartz_plugin.layout import as_stored
from quartz_plugin.task import Task


class QuantileSketch:
    """Streaming quantiles of non-negative values: a histogram that is linear within each octave.

    Bins cover the `OCTAVES` octaves below the largest value seen; what is smaller counts as 0. The window
    moves up when larger values arrive, so no range need be known. Two sketches merge exactly.

    Parameters
    ----------
    channels : int
        One histogram for each.
    bins_per_octave : int
        Resolution, a power of two: a bin is at most ``1 / bins_per_octave`` of its value wide, and quantiles
        interpolate in it.

    Examples
    --------
    >>> sketch = QuantileSketch(1, bins_per_octave=512)
    >>> sketch.update(torch.linspace(0, 1, 10001).reshape(1, -1))
    >>> round(float(sketch.quantile(99.0)), 3), float(sketch.quantile(100.0))
    (0.99, 1.0)
    """

    OCTAVES = 16

    def __init__(self, channels: int, bins_per_octave: int) -> None:
        self.bins_per_octave = bins_per_octave
        self.counts = torch.zeros(channels, self.OCTAVES * bins_per_octave, dtype=torch.int64)
        self.zeros = torch.zeros(channels, dtype=torch.int64)
        self.largest = torch.zeros(channels, dtype=torch.float64)
        self.top_octave: int | None = None

    def update(self, values: Tensor) -> None:
        """Count values ``[channels, n]``, all at least 0.

        Raises
        ------
        ValueError
            If one is NaN or infinite.
        """
        channels = self.counts.shape[0]
        if values.numel() == 0:
            return
        # Rounded first: the float next to a double may lie in the octave above.
        values = values.float()
        largest = values.amax(dim=1).double().cpu()
        if not bool(torch.isfinite(largest).all()):
            raise ValueError("values contain NaN or infinity")
        self.largest = torch.maximum(self.largest, largest)
        self._cover(float(self.largest.max()))
        if self.top_octave is None:
            self.zeros += values.shape[1]
            return
        # The bits of a float, exponent before mantissa, are its octave and its place in it.
        bits = values.view(torch.int32) >> (23 - self.bins_per_octave.bit_length() + 1)
        lowest = (self.top_octave - self.OCTAVES + 1 + 126) * self.bins_per_octave
        bins = bits.sub_(lowest - 1).clamp_(min=0)  # 0 for what is too small to be counted
        width = self.counts.shape[1] + 1
        if channels > 1:
            bins += torch.arange(0, channels * width, width, dtype=torch.int32, device=values.device).unsqueeze(1)
        counts = torch.bincount(as_stored(bins), minlength=channels * width).view(channels, width).cpu()
        self.counts += counts[:, 1:]
        self.zeros += counts[:, 0]

    def merge(self, other: QuantileSketch) -> None:
        """Add the counts of another sketch of the same shape, as from another process."""
        if other.counts.shape != self.counts.shape:
            raise ValueError(f"sketches differ in shape: {self.counts.shape} and {other.counts.shape}")
        self.largest = torch.maximum(self.largest, other.largest)
        self._cover(float(self.largest.max()))
        counts, lost = other.counts, torch.zeros_like(other.zeros)
        if self.top_octave is not None and other.top_octave is not None:
            counts, lost = _shifted(counts, (self.top_octave - other.top_octave) * self.bins_per_octave)
        self.counts += counts
        self.zeros += other.zeros + lost

    def quantile(self, percentile: float) -> Tensor:
        """Percentile (0 to 100) of each channel, float64 ``[channels]``; exact at 100."""
        total = self.zeros + self.counts.sum(dim=1)
        if self.top_octave is None or percentile >= 100.0:
            return self.largest.clone()
        rank = total.double() * (percentile / 100.0) - self.zeros
        below = self.counts.cumsum(dim=1).double()
        index = torch.searchsorted(below, rank.unsqueeze(1).clamp(min=0)).clamp(max=self.counts.shape[1] - 1)
        count = self.counts.gather(1, index).double().clamp(min=1)
        into = (rank.unsqueeze(1) - (below.gather(1, index) - count)) / count
        value = self._value(index, into.clamp(0, 1)).squeeze(1)
        value = torch.where(rank <= 0, torch.zeros_like(value), value)
        return torch.minimum(value, self.largest)

    def least_squares(self, window: int) -> Tensor:
        """Scale of each channel at which clipping and rounding to `window` steps loses least, in squares.

        Of 50 scales from the largest value down to a twentieth of it; float64 ``[channels]``.

        Examples
        --------
        >>> sketch = QuantileSketch(1, bins_per_octave=512)
        >>> sketch.update(torch.cat([torch.ones(1, 1000), torch.tensor([[9.0]])], dim=1))
        >>> round(float(sketch.least_squares(window=1)), 1)
        1.0
        """
        if self.top_octave is None:
            return self.largest.clone()
        return _least_squares(self.middles(), self.counts, self.largest, window)

    def middles(self) -> Tensor:
        """Value in the middle of each bin, float64; of bins that exist only once a value is counted."""
        index = torch.arange(self.counts.shape[1] if self.top_octave is not None else 0)
        return self._value(index, torch.full(index.shape, 0.5, dtype=torch.float64)) if len(index) else index.double()

    def _value(self, index: Tensor, into: Tensor) -> Tensor:
        """The value at a place, from 0 to 1, in a bin of this index, float64."""
        assert self.top_octave is not None
        octave = index // self.bins_per_octave + (self.top_octave - self.OCTAVES + 1)
        within = (index % self.bins_per_octave + into) / (2 * self.bins_per_octave) + 0.5
        return torch.ldexp(within, octave.double())

    def _cover(self, largest: float) -> None:
        if largest <= 0.0:
            return
        top = int(torch.frexp(torch.tensor(largest, dtype=torch.float64)).exponent)
        if self.top_octave is None:
            self.top_octave = top
        elif top > self.top_octave:
            self.counts, lost = _shifted(self.counts, (top - self.top_octave) * self.bins_per_octave)
            self.zeros += lost
            self.top_octave = top


class RangeSketch:
    """Streaming quantiles of signed values, those above and below a centre apart; exact at 0 and 100.

    Parameters
    ----------
    centre : Tensor
        A value of each channel's, ``[channels]``, float64: quantiles are the finer the nearer they are to it.

    Examples
    --------
    >>> sketch = RangeSketch(torch.tensor([0.0]))
    >>> sketch.update(torch.linspace(-1, 3, 4001).unsqueeze(0))
    >>> round(float(sketch.quantile(50.0)), 2), float(sketch.quantile(0.0)), float(sketch.quantile(100.0))
    (1.0, -1.0, 3.0)
    """

    def __init__(self, centre: Tensor) -> None:
        self.centre = centre
        self.above, self.below = (QuantileSketch(len(centre), 512) for _ in range(2))
        self.smallest = torch.full_like(centre, float("inf"))
        self.largest = -self.smallest

    def update(self, values: Tensor) -> None:
        """Count values ``[channels, n]``; ValueError if one is NaN or infinite."""
        if values.numel() == 0:
            return
        values = values.double()
        distances = values - self.centre.to(values.device).unsqueeze(1)
        self.above.update(distances.clamp(min=0))
        self.below.update(distances.neg_().clamp_(min=0))
        self.smallest = torch.minimum(self.smallest, values.amin(dim=1).cpu())
        self.largest = torch.maximum(self.largest, values.amax(dim=1).cpu())

    def merge(self, other: RangeSketch) -> None:
        """Add the counts of another sketch with the same centre."""
        self.above.merge(other.above)
        self.below.merge(other.below)
        self.smallest = torch.minimum(self.smallest, other.smallest)
        self.largest = torch.maximum(self.largest, other.largest)

    def quantile(self, percentile: float) -> Tensor:
        """Percentile (0 to 100) of each channel, float64 ``[channels]``."""
        if percentile in (0.0, 100.0):
            return self.largest if percentile else self.smallest
        above, below = self.above.quantile(percentile), self.below.quantile(100.0 - percentile)
        value = self.centre + torch.where(above > 0, above, -below)
        return torch.minimum(torch.maximum(value, self.smallest), self.largest)

    def from_smallest(self, percentile: float | None, window: int) -> tuple[Tensor, Tensor]:
        """Scale and shift of each channel, float64, such that ``shift`` to ``shift + scale`` holds its values.

        The shift is the smallest value. The upper end is a percentile, or, with None, where clipping and rounding to
        `window` steps loses least. A channel that never varies has the scale of the widest.

        Examples
        --------
        >>> sketch = RangeSketch(torch.tensor([0.0], dtype=torch.float64))
        >>> sketch.update(torch.linspace(-1, 3, 4001).unsqueeze(0))
        >>> [float(each) for each in sketch.from_smallest(100.0, window=7)]
        [4.0, -1.0]
        """
        widest = self.largest - self.smallest
        if percentile is None:
            distances = self.centre - self.smallest
            below, above = self.below.middles(), self.above.middles()
            values = torch.cat(
                [part.expand(len(distances), -1) for part in (distances[:, None] - below, distances[:, None] + above)],
                1,
            )
            counts = torch.cat([self.below.counts[:, : len(below)], self.above.counts[:, : len(above)]], 1)
            scale = _least_squares(values, counts, widest, window)
        else:
            scale = self.quantile(percentile) - self.smallest
        scale = torch.where(scale > 0, scale, widest)
        return torch.where(scale > 0, scale, widest.max()), self.smallest

    def range(self, percentile: float, signed: bool, shifts: Shifts) -> tuple[Tensor, Tensor]:
        """Scale and shift of each channel, float64, such that ``shift - scale`` to ``shift + scale`` holds its values.

        A channel that never varies has the size of its value as scale; one that is always 0, that of the largest
        channel.

        Parameters
        ----------
        percentile : float
            As many percent of the values lie below the upper end, and above the lower.
        signed : bool
            Whether values are signed; those from 0 on have no shift.
        shifts : "all", "far" or "none"
            Which channels may have a shift.
        """
        low, high = self.quantile(100.0 - percentile), self.quantile(percentile)
        moved = torch.full_like(low, signed and shifts != "none", dtype=torch.bool)
        if shifts == "far":
            moved &= (low > 0) | (high < 0)
        shift = torch.where(moved, (low + high) / 2, torch.zeros_like(low))
        scale = torch.where(moved, (high - low) / 2, torch.maximum(high, -low if signed else high))
        scale = torch.where(scale > 0, scale, torch.maximum(self.largest.abs(), self.smallest.abs()))
        largest = scale.max()
        return torch.where(scale > 0, scale, largest if largest > 0 else torch.ones_like(largest)), shift


class HeadsSketch:
    """Ranges of several outputs that stand one behind the other: of classes one for all, of values one for each.

    Parameters
    ----------
    shapes : sequence of tuple
        Shape of each output, without the batch.
    tasks : sequence of str
        Meaning of each.
    centre : Tensor
        A value of each unit's, ``[units]``, float64.
    """

    def __init__(self, shapes: Sequence[tuple[int, ...]], tasks: Sequence[Task], centre: Tensor) -> None:
        self.shapes, self.tasks = list(shapes), list(tasks)
        sizes = [math.prod(shape) for shape in shapes]
        self.units = sizes
        self.parts: list[QuantileSketch | RangeSketch] = [
            RangeSketch(middle.reshape(self._outputs(shape), -1).mean(dim=1)) if task == "regression"
            else QuantileSketch(1, 512)
            for shape, task, middle in zip(shapes, tasks, centre.split(sizes), strict=True)
        ]  # fmt: skip

    def update(self, values: Tensor) -> None:
        """Count values ``[units, n]``; ValueError if one is NaN or infinite."""
        for shape, part, own in zip(self.shapes, self.parts, values.split(self.units), strict=True):
            if isinstance(part, RangeSketch):
                part.update(own.reshape(self._outputs(shape), -1))
            else:
                part.update(own.reshape(1, -1).abs().float())

    def merge(self, other: HeadsSketch) -> None:
        """Add the counts of another sketch of the same outputs."""
        for part, its in zip(self.parts, other.parts, strict=True):
            part.merge(its)  # type: ignore[arg-type]

    def range(self, percentile: float, signed: bool, shifts: Shifts) -> tuple[Tensor, Tensor]:
        """Scale and shift of each unit, float64; see :meth:`RangeSketch.range`. An output that is always 0 has 1."""
        scales, middles = [], []
        for part, units in zip(self.parts, self.units, strict=True):
            if isinstance(part, RangeSketch):
                scale, middle = part.range(percentile, signed, shifts)
            else:
                scale = part.quantile(percentile)
                scale = torch.where(scale > 0, scale, part.largest)
                scale, middle = torch.where(scale > 0, scale, 1.0), torch.zeros_like(scale)
            repeats = units // len(scale)
            scales.append(scale.double().repeat_interleave(repeats))
            middles.append(middle.double().repeat_interleave(repeats))
        return torch.cat(scales), torch.cat(middles)

    @staticmethod
    def _outputs(shape: tuple[int, ...]) -> int:
        """Outputs that a regression has a range each for: the entries of its first dimension."""
        return shape[0] if shape else 1


def _least_squares(values: Tensor, counts: Tensor, largest: Tensor, window: int) -> Tensor:
    """Scale of each channel at which rounding values ``[channels or 1, n]``, so often each, to a window loses least."""
    counts = counts.double()
    least = torch.full_like(largest, float("inf"))
    found = largest.clone()
    for power in range(50):
        scale = (largest * 0.942**power).clamp(min=1e-300).unsqueeze(1)
        lost = ((fake_quantize(values, scale, window) - values).square() * counts).sum(dim=1)
        found = torch.where(lost < least, scale.squeeze(1), found)
        least = torch.minimum(lost, least)
    return torch.where(largest > 0, found, largest)


def _shifted(counts: Tensor, bins: int) -> tuple[Tensor, Tensor]:
    """Move counts down by some bins; also what falls off the lower end, for each channel."""
    bins = min(bins, counts.shape[1])
    moved = torch.zeros_like(counts)
    moved[:, : counts.shape[1] - bins] = counts[:, bins:]
    return moved, counts[:, :bins].sum(dim=1)
