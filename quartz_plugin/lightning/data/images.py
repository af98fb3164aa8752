"""Image files: decoded into pixels, whatever they are called, and refused by name where they cannot be."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from PIL.TiffImagePlugin import BITSPERSAMPLE, PHOTOMETRIC_INTERPRETATION
from torch import Tensor
from torch.utils.data import Dataset

from quartz_plugin.tables import printable

PHOTOGRAPHS = ("JPEG", "PNG", "TIFF", "WEBP", "BMP", "PPM", "GIF")
"""Pillow's formats that images are opened in, whatever a file is called: some others start programs."""

MOST_PIXELS = 1 << 26
"""Pixels that an image may have, in its file and resized: 200 MB as RGB."""

Sample = tuple[str | Tensor, int]
"""Path of an image file, or its pixels, uint8 ``[3, H, W]``; and its class."""


class UnreadableImageError(ValueError):
    """An image file that cannot be decoded; one line, even when it comes out of a worker with its traceback."""

    def __init__(self, message: str) -> None:
        super().__init__(message.strip().splitlines()[-1].removeprefix(f"{__name__}.{type(self).__name__}: "))


class Images(Dataset[Any]):
    """Images and their classes, decoded as they are asked for.

    Parameters
    ----------
    samples : sequence of (path or pixels, class)
        See :data:`Sample`.
    transform : callable
        From uint8 pixels ``[3, H, W]`` to what the network sees.
    cache : bool
        Keep decoded pixels.
    resize : int, optional
        What `transform` resizes the shorter side to, if it does.
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        transform: Callable[[Tensor], Tensor],
        cache: bool = False,
        resize: int | None = None,
    ) -> None:
        self.samples, self.transform, self.resize = samples, transform, resize
        self.cache: dict[int, Tensor] | None = {} if cache else None

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        source, label = self.samples[index]
        pixels = None if self.cache is None else self.cache.get(index)
        if pixels is None:
            pixels = source if isinstance(source, Tensor) else pixels_of(source, self.resize)
            if self.cache is not None:
                self.cache[index] = pixels
        return self.transform(pixels), label


def open_image(path: str, resize: int | None = None) -> Any:
    """Open and decode an image file with Pillow, RGB or grey, 8 bits.

    Parameters
    ----------
    path : str
        A file in one of :data:`PHOTOGRAPHS`, whatever it is called.
    resize : int, optional
        What its shorter side is going to be resized to.

    Raises
    ------
    FileNotFoundError, UnreadableImageError
        If it is not there, no image, has more than :data:`MOST_PIXELS` or would have them when it is resized, or holds
        values without a defined range (float32, int32).
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"no image {printable(path)}")
    try:
        with warnings.catch_warnings():
            # Pillow's remarks about metadata and palettes of single files, but for the one about their size.
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path, formats=PHOTOGRAPHS) as image:
                _check_pixels(image.size, resize)
                return _eight_bits(image)
    except Exception as error:
        reason = printable(error)
        if isinstance(error, UnidentifiedImageError):
            reason = f"it is none of {', '.join(PHOTOGRAPHS)}"
        elif isinstance(error, Image.DecompressionBombWarning | Image.DecompressionBombError):
            reason = f"more than {min(MOST_PIXELS, Image.MAX_IMAGE_PIXELS or MOST_PIXELS):,} pixels"
        raise UnreadableImageError(
            f"cannot read the image {printable(path)} ({reason}): remove it or replace it"
        ) from error


def _check_pixels(size: tuple[int, int], resize: int | None) -> None:
    """Raise ValueError for an image that would take too much memory, before it is decoded."""
    shorter, longer = sorted(size)
    if shorter * longer > MOST_PIXELS:
        raise ValueError(f"{size[0]} x {size[1]} pixels, of at most {MOST_PIXELS:,}")
    if resize is not None and resize * resize * longer > MOST_PIXELS * shorter:
        raise ValueError(
            f"{size[0]} x {size[1]} pixels, which would be more than {MOST_PIXELS:,} where the shorter side is {resize}"
        )


def _eight_bits(image: Any) -> Any:
    """Return an opened image as RGB, or as grey where it has more than 8 bits, whose whole range becomes 0 to 255."""
    if image.mode != "F" and not image.mode.startswith("I"):
        image.load()
        return _rgb(image)
    tags = image.tag_v2 if image.format == "TIFF" else {}
    # Of a PNG or PPM, these 32 bits hold 16.
    if image.mode == "F" or (tags and image.mode == "I"):
        kind = "floating-point numbers" if image.mode == "F" else "integers with a sign or of 32 bits"
        raise ValueError(f"its values are {kind}, of which no range is defined: save it with 8 or 16 bits")
    # Pillow would clip at 255.
    highest = 2 ** tags[BITSPERSAMPLE][0] - 1 if tags else 65535
    values = np.asarray(image).clip(0, highest).astype(np.uint32)
    if tags.get(PHOTOMETRIC_INTERPRETATION) == 0:  # White is zero.
        np.subtract(highest, values, out=values)
    values *= 255
    values += highest // 2
    values //= highest
    return Image.fromarray(values.astype(np.uint8))


def _rgb(image: Any) -> Any:
    """Without the copy that Pillow makes of what is RGB already."""
    return image if image.mode == "RGB" else image.convert("RGB")


def pixels_of(path: str, resize: int | None = None) -> Tensor:
    """Pixels of an image file, uint8 ``[3, H, W]``; copied strip by strip, since photographs are large."""
    image = _rgb(open_image(path, resize))
    width, height = image.size
    pixels = torch.empty(3, height, width, dtype=torch.uint8)
    rows = max(1, (1 << 20) // width)
    for top in range(0, height, rows):
        strip = np.array(image.crop((0, top, width, min(top + rows, height))))
        pixels[:, top : top + rows] = torch.from_numpy(strip).permute(2, 0, 1)
    return pixels
