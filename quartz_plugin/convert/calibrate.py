"""Stage 4, calibrate: the value of each layer that the spiking network will call 1."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, fx

from quartz_plugin.coding import check_unit_interval
from quartz_plugin.config import ConversionConfig, LayerConfig, Shifts
from quartz_plugin.convert.traced import TracedNetwork
from quartz_plugin.functional import fake_quantize
from quartz_plugin.operators.table import ConversionError, Role, ceiling_of
from quartz_plugin.task import by_output, number_or_tensor

Calibration = Tensor | Iterable[Any]
CHUNK_VALUES = 1 << 20
"""Input values that are computed with at a time: 64 images of 3 x 73 x 73, 6 of 3 x 224 x 224."""


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
        largest = values.amax(dim=1).double().cpu()
        if not bool(torch.isfinite(largest).all()):
            raise ValueError("values contain NaN or infinity")
        self.largest = torch.maximum(self.largest, largest)
        self._cover(float(self.largest.max()))
        if self.top_octave is None:
            self.zeros += values.shape[1]
            return
        # The bits of a float, exponent before mantissa, are its octave and its place in it.
        bits = values.to(torch.float32).contiguous().view(torch.int32) >> (23 - self.bins_per_octave.bit_length() + 1)
        lowest = (self.top_octave - self.OCTAVES + 1 + 126) * self.bins_per_octave
        bins = bits.sub_(lowest - 1).clamp_(min=0)  # 0 for what is too small to be counted
        width = self.counts.shape[1] + 1
        if channels > 1:
            bins += torch.arange(0, channels * width, width, dtype=torch.int32, device=values.device).unsqueeze(1)
        counts = torch.bincount(bins.flatten(), minlength=channels * width).view(channels, width).cpu()
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
        index = torch.arange(self.counts.shape[1])
        values = self._value(index, torch.full(index.shape, 0.5, dtype=torch.float64))
        counts = self.counts.double()
        least = torch.full_like(self.largest, float("inf"))
        found = self.largest.clone()
        for power in range(50):
            scale = (self.largest * 0.942**power).clamp(min=1e-300).unsqueeze(1)
            lost = ((fake_quantize(values, scale, window) - values).square() * counts).sum(dim=1)
            found = torch.where(lost < least, scale.squeeze(1), found)
            least = torch.minimum(lost, least)
        return torch.where(self.largest > 0, found, self.largest)

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


def calibrate(
    draft: TracedNetwork,
    images: Iterable[Tensor],
    config: ConversionConfig,
    own: Mapping[str, LayerConfig],
    windows: Mapping[str, int],
    known: Mapping[str, Tensor] | None = None,
    progress: Callable[[int], None] | None = None,
    distributed: bool = False,
) -> dict[str, Tensor]:
    """Scales: percentiles of what each ReLU and the output (its size) give on the calibration images.

    With ``config.method.scale`` "least_squares", of the layers without a percentile of their own, the scale at which
    rounding loses least. A regression's outputs have a scale and a shift each, which is put into the draft.

    Activations are counted as they come; memory is that of the network and one chunk of images.

    Parameters
    ----------
    draft : TracedNetwork
        The folded network, unscaled.
    images : iterable of Tensor
        Chunks ``[n, ...]`` of raw training images; see :func:`chunks`.
    config : ConversionConfig
        Percentiles, granularity, method and task.
    own : dict
        Path of a layer -> its own options.
    windows : dict
        Path of a layer -> steps of its window.
    known : dict, optional
        Path of a layer -> its scale, where it has been learned.
    progress : callable, optional
        Called with the number of images seen so far.
    distributed : bool
        Add up the counts of all processes of torch.distributed; each then gets the same scales.

    Returns
    -------
    dict
        Path -> float64 scale, 0-dimensional or ``[C, 1, ...]``; both halves of a pair have the same. A layer that is 0
        on all images has its upper bound, or else the scale of its sources; it is among ``draft.silent``.

    Raises
    ------
    ConversionError
        If a layer gives NaN or infinity.
    ValueError
        If there are no images, or all of them are 0.
    """
    scales = dict(known or {})
    nothing, least_squares = LayerConfig(), config.method.scale == "least_squares"
    if scales.keys() >= {str(node.target) for node in draft.layers()}:
        return scales
    by_channel = {
        str(node.target): (own.get(str(node.target), nothing).granularity or config.granularity) == "channel"
        for node in draft.layers()
        if draft.role_at(node) is Role.RECTIFIER
    }
    together = raise_on_all_ranks if distributed else nullcontext
    output: RangeSketch | None = None
    if config.task == "regression" and str(draft.last.target) not in scales:
        # The output for a grey image: the same in all processes, and as a rule in the midst of the values.
        grey = torch.full((1, *draft.input_shape), 0.5, dtype=draft.dtype, device=draft.device)
        output = RangeSketch(by_output(draft.output(grey).double()).mean(dim=1).cpu())
    with together():
        seen, brightest, sketches = _observe(draft, images, by_channel, scales, output, progress)
    if distributed:
        seen, brightest, sketches = _of_all_processes(seen, brightest, sketches)
    if seen == 0:
        raise ValueError("calibration is empty: give at least one batch of training images")
    if brightest == 0.0:
        raise ValueError("calibration is all zero: give training images, with values in [0, 1]")

    for node in draft.layers():
        path = str(node.target)
        if path not in sketches:
            continue
        sketch, own_percentile = sketches[path], own.get(path, nothing).percentile
        shape, ceiling = draft.shape_at(node), ceiling_of(draft.module_at(node))
        if isinstance(sketch, RangeSketch):
            signed = draft.role_at(node) is not Role.RECTIFIER
            found = sketch.range(own_percentile or config.output_percentile, signed, config.output_shifts)
            scale, shift = (along_channels(each, shape) for each in found)
            scales[path] = scale if ceiling is None else scale.clamp(max=ceiling)
            draft.output_shift = number_or_tensor(shift)
            continue
        is_output = node is draft.last
        if least_squares and own_percentile is None and not is_output:
            scale = sketch.least_squares(windows[path])
        else:
            scale = sketch.quantile(own_percentile or (config.output_percentile if is_output else config.percentile))
        # A channel seldom active has a percentile of 0: its largest value then; a dead one takes the layer's.
        scale = torch.where(scale > 0, scale, sketch.largest)
        scale = torch.where(scale > 0, scale, scale.max())
        if float(scale.max()) == 0.0:
            draft.silent.add(path)
            scale = torch.full_like(scale, _scale_in_front(draft, node, scales) if ceiling is None else ceiling)
        if ceiling is not None:
            scale = scale.clamp(max=ceiling)
        scales[path] = along_channels(scale, shape)
        if path in draft.pairs:
            scales[draft.pairs[path]] = scales[path].clone()
    return scales


def _scale_in_front(draft: TracedNetwork, node: fx.Node, scales: Mapping[str, Tensor]) -> float:
    """Largest scale of what a layer listens to: that of one which shows none of its own."""
    found, pending = 0.0, list(node.all_input_nodes)
    while pending:
        source = pending.pop()
        if source.op == "placeholder":
            found = max(found, float(draft.input_scale.max()))
        elif str(source.target) in scales:
            found = max(found, float(scales[str(source.target)].max()))
        else:
            pending.extend(source.all_input_nodes)
    return found


def _observe(
    draft: TracedNetwork,
    images: Iterable[Tensor],
    by_channel: Mapping[str, bool],
    known: Mapping[str, Tensor],
    output: RangeSketch | None,
    progress: Callable[[int], None] | None,
) -> tuple[int, float, dict[str, QuantileSketch | RangeSketch]]:
    """Number of images, their largest value, and a sketch of each layer's values; the output's may be given."""
    # Both halves of a pair are scaled by the size of the signed value that they split.
    lower_halves = set(draft.pairs.values())
    watched = {
        node.all_input_nodes[0] if str(node.target) in draft.pairs else node: node
        for node in draft.layers()
        if str(node.target) not in lower_halves and str(node.target) not in known
    }
    last = draft.last
    sketches: dict[str, QuantileSketch | RangeSketch] = {}
    for node in watched.values():
        if node is last and output is not None:
            sketches[str(node.target)] = output
            continue
        per_channel = node is not last and by_channel.get(str(node.target), False)
        channels = draft.shape_at(node)[0] if per_channel else 1
        sketches[str(node.target)] = QuantileSketch(channels, 64 if per_channel else 512)
    seen, brightest = 0, 0.0
    for chunk in images:
        brightest = max(brightest, float(chunk.max()))
        for node, value in draft.run(chunk):
            if node in watched:
                path = str(watched[node].target)
                sketch = sketches[path]
                try:
                    if isinstance(sketch, RangeSketch):
                        sketch.update(by_output(value))
                        continue
                    values = value if watched[node] is node and node is not last else value.abs()
                    values = by_output(values) if len(sketch.zeros) > 1 else values.reshape(1, -1)
                    sketch.update(values.float())
                except ValueError as error:
                    raise ConversionError(f"{path!r} gives NaN or infinity on the calibration images") from error
        seen += len(chunk)
        if progress is not None:
            progress(seen)
    return seen, brightest, sketches


def along_channels(values: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Values ``[channels]``, or one, as they broadcast to one sample of this shape."""
    return values.reshape(()) if len(values) == 1 else values.view(-1, *[1] * (len(shape) - 1))


@contextmanager
def raise_on_all_ranks() -> Iterator[None]:
    """Let an error in one process of torch.distributed be one in all: none waits for another that has gone."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        raise ValueError("distributed=True needs torch.distributed: call init_process_group in every process first")
    own: Exception | None = None
    try:
        yield
    except Exception as error:
        own = error
    errors: list[str | None] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(errors, None if own is None else f"{type(own).__name__}: {own}")
    if own is not None:
        raise own
    for rank, message in enumerate(errors):
        if message is not None:
            raise ValueError(f"process {rank} could not calibrate: {message}")


def _of_all_processes(
    seen: int, brightest: float, sketches: dict[str, QuantileSketch | RangeSketch]
) -> tuple[int, float, dict[str, QuantileSketch | RangeSketch]]:
    gathered: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(gathered, (seen, brightest, sketches))
    for path, sketch in gathered[0][2].items():
        for _, _, others in gathered[1:]:
            sketch.merge(others[path])
    return sum(entry[0] for entry in gathered), max(entry[1] for entry in gathered), gathered[0][2]


def chunks(calibration: Calibration, size: int | None = None) -> Iterator[Tensor]:
    """Yield checked chunks of images from a tensor, or from batches of images or (images, labels).

    A chunk has at most `size` images, by default as many as :func:`chunk_size` allows.

    Raises
    ------
    TypeError
        If `calibration` is neither.
    ValueError
        If a value lies outside [0, 1] or is NaN, or shapes differ.
    """
    if isinstance(calibration, Tensor):
        batches: Iterable[Any] = [calibration]
    elif isinstance(calibration, Iterable) and not isinstance(calibration, str | bytes | dict):
        batches = calibration
    else:
        raise TypeError(
            "calibration must be a Tensor [N, ...] or an iterable of batches (images, or (images, labels)), "
            f"got {type(calibration).__name__}"
        )
    shape = None
    for batch in batches:
        images = batch[0] if isinstance(batch, tuple | list) and len(batch) > 0 else batch
        images = check_unit_interval(images, "calibration")
        if images.dim() < 2:
            raise ValueError(f"calibration images must have a batch dimension, [N, ...], got {list(images.shape)}")
        shape = shape or images.shape[1:]
        if images.shape[1:] != shape:
            raise ValueError(f"calibration images differ in shape: {list(shape)} and {list(images.shape[1:])}")
        yield from (chunk for chunk in images.split(size or chunk_size(images)) if len(chunk))


def chunk_size(images: Tensor) -> int:
    """How many of these images are computed with at a time: at most 64, fewer where they are large.

    Examples
    --------
    >>> chunk_size(torch.zeros(1000, 1, 28, 28)), chunk_size(torch.zeros(1000, 3, 224, 224))
    (64, 6)
    """
    return min(64, max(1, CHUNK_VALUES // max(1, images[:1].numel())))


def evenly(count: int, wanted: int) -> list[int]:
    """At most `wanted` indices below `count`, evenly spread.

    Examples
    --------
    >>> evenly(10, 4), evenly(2, 4)
    ([1, 3, 6, 8], [0, 1])
    """
    wanted = min(count, wanted)
    return [(2 * index + 1) * count // (2 * wanted) for index in range(wanted)]


def evenly_of(images: Tensor, most: int) -> Tensor:
    """At most so many of these images, evenly spread; one at least, where there are any.

    Examples
    --------
    >>> evenly_of(torch.arange(10), 4), evenly_of(torch.arange(2), 4)
    (tensor([1, 3, 6, 8]), tensor([0, 1]))
    """
    most = max(1, most)
    return images if len(images) <= most else images[evenly(len(images), most)]


def peek(images: Iterator[Tensor]) -> tuple[Tensor | None, Iterator[Tensor]]:
    """Return the first chunk (None where there is none), and the chunks with it in front."""
    first = next(images, None)
    return first, images if first is None else itertools.chain([first], images)


def _shifted(counts: Tensor, bins: int) -> tuple[Tensor, Tensor]:
    """Move counts down by some bins; also what falls off the lower end, for each channel."""
    bins = min(bins, counts.shape[1])
    moved = torch.zeros_like(counts)
    moved[:, : counts.shape[1] - bins] = counts[:, bins:]
    return moved, counts[:, :bins].sum(dim=1)
