"""Calibration images: checked, in chunks, and some of them evenly spread."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor

from quartz_plugin.coding import check_unit_interval

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
