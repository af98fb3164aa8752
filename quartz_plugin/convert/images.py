"""Calibration images: checked, in chunks, and some of them evenly spread."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor, nn

from quartz_plugin import checks
from quartz_plugin.coding import check_unit_interval
from quartz_plugin.config import ConversionConfig
from quartz_plugin.graph import INPUT
from quartz_plugin.inputs import UNIT, Input, Inputs, named_inputs, parameter_names
from quartz_plugin.operators.table import ConversionError

Calibration = Tensor | Iterable[Any]
CHUNK_VALUES = 1 << 20
"""Input values that are computed with at a time: 64 images of 3 x 73 x 73, 6 of 3 x 224 x 224."""


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


def inputs_of(
    ann: Any, calibration: Any, example: Any, config: ConversionConfig, what: str = "calibration"
) -> tuple[Inputs, Iterator[Tensor]]:
    """The inputs of a network, and the values of their units, checked, in chunks.

    Parameters
    ----------
    ann : nn.Module
        The network, whose forward has the inputs' names.
    calibration : Tensor or iterable
        As :func:`chunks` takes it; of several inputs a tuple of tensors, or batches of them.
    example : Tensor, tuple of Tensor or None
        One of all inputs, where the forward does not show how many there are.
    config : ConversionConfig
        Ranges of the inputs.
    what : str
        Name of `calibration` in messages.

    Raises
    ------
    TypeError, ValueError
        As :func:`chunks` does, and for tensors that are more or fewer than the inputs.
    """
    ranges = None if config.input_range is None else checks.ranges(config.input_range)
    count = len(example) if isinstance(example, tuple | list) else 1 if ranges is None else len(ranges)
    if count == 1 and isinstance(ann, nn.Module):
        count = max(1, len(parameter_names(ann)))
    if count == 1 and ranges is None and not config.clamp_inputs:
        first, images = peek(chunks(calibration))
        return Inputs((Input(INPUT, () if first is None else tuple(first.shape[1:])),)), images
    if ranges is not None and len(ranges) != count:
        raise ValueError(f"input_range has {len(ranges)} entries, and the network takes {count} inputs")
    names = named_inputs(ann, count)
    batches = _batches(calibration, names, what)
    first_batch = next(batches, None)
    if first_batch is None:
        raise ValueError(f"{what} is empty: give at least one batch of training images")
    parts = [
        Input(name, tuple(values.shape[1:]), *(own or UNIT))
        for name, values, own in zip(names, first_batch, ranges or [None] * count, strict=True)
    ]
    for part in parts:
        if len(part.low) not in (1, *part.shape[:1]):
            raise ValueError(f"input_range has {len(part.low)} channels, and {part.name} is {['N', *part.shape]}")
    inputs = Inputs(tuple(parts), config.clamp_inputs)
    packed = (inputs.pack(batch, what) for batch in itertools.chain([first_batch], batches))
    return inputs, (chunk for each in packed for chunk in each.split(chunk_size(each)) if len(chunk))


def _batches(calibration: Any, names: list[str], what: str) -> Iterator[tuple[Tensor, ...]]:
    """Batches of as many tensors as there are inputs, without labels."""
    count = len(names)
    both = f"({', '.join(names)})"

    def tensors(batch: Any) -> tuple[Tensor, ...]:
        given = batch
        if isinstance(batch, tuple | list) and batch and isinstance(batch[0], tuple | list | dict):
            given = batch[0]
        if isinstance(given, dict):
            given = [given[name] for name in names if name in given]
        elif isinstance(given, Tensor) and count == 1:
            given = [given]
        elif given is batch and isinstance(batch, tuple | list):
            given = batch[:count]
        if not isinstance(given, tuple | list) or len(given) != count or not all(isinstance(g, Tensor) for g in given):
            if count == 1:
                raise TypeError(f"{what} must be a Tensor [N, ...] or batches (images, or (images, labels))")
            raise ConversionError(
                f"forward also takes {names[-1]!r}: {what} must be a tuple of {count} tensors {both}, or batches of "
                f"such tuples or of ({both}, labels)"
            )
        if any(each.dim() < 2 and count == 1 for each in given) or any(each.dim() < 1 for each in given):
            raise ValueError(f"{what} must have a batch dimension, [N, ...], got {[list(g.shape) for g in given]}")
        return tuple(given)

    one = isinstance(calibration, Tensor | dict) or (
        isinstance(calibration, tuple) and len(calibration) == count and all(isinstance(x, Tensor) for x in calibration)
    )
    if not one and (not isinstance(calibration, Iterable) or isinstance(calibration, str | bytes)):
        raise TypeError(
            f"{what} must be a Tensor [N, ...], a tuple of them, or batches, got {type(calibration).__name__}"
        )
    return map(tensors, [calibration] if one else calibration)


def chunk_size(images: Tensor) -> int:
    """Number of these images that are computed with at a time: at most 64, fewer where they are large.

    Examples
    --------
    >>> import torch
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
    >>> import torch
    >>> evenly_of(torch.arange(10), 4), evenly_of(torch.arange(2), 4)
    (tensor([1, 3, 6, 8]), tensor([0, 1]))
    """
    most = max(1, most)
    return images if len(images) <= most else images[evenly(len(images), most)]


def peek(images: Iterator[Tensor]) -> tuple[Tensor | None, Iterator[Tensor]]:
    """Return the first chunk (None where there is none), and the chunks with it in front."""
    first = next(images, None)
    return first, images if first is None else itertools.chain([first], images)


AT_ONCE = 1 << 22
"""Input values that go through the whole network together where all of them are looked at layer by layer."""


def some_of(images: Tensor, most: int) -> Tensor:
    """As many images, evenly spread, as :data:`AT_ONCE` allows, and `most` at most."""
    return evenly_of(images, min(most, AT_ONCE // max(1, images[:1].numel())))
