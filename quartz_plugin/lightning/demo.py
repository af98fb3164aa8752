"""A small folder of images, drawn on the spot: image recipes can be tried with no data at hand."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Array = NDArray[Any]

SEED = 1
SIZE = 64
OVERSAMPLING = 2  # Smooth edges.
SPLITS = {"train": 80, "val": 20}  # Images of each class.


def demo_folder(cache: Path | None = None) -> Path:
    """Return the folder of the demo images; they are drawn first where it is not there, in a few seconds.

    It holds 1,000 RGB images of 64 x 64 pixels in 10 classes, always the same: ``train/CLASS/0000.png`` (80 of each
    class) and ``val/CLASS/0000.png`` (20 of each). It appears whole or not at all, also where several processes ask
    for it at once.

    Parameters
    ----------
    cache
        Folder that holds (or will hold) ``quartz_plugin/demo-1``; by default ``$XDG_CACHE_HOME``, else ``~/.cache``.

    Raises
    ------
    ValueError
        If the folder is there but does not hold 1,000 images.

    Examples
    --------
    >>> from tempfile import TemporaryDirectory
    >>> with TemporaryDirectory() as cache:
    ...     len(list(demo_folder(Path(cache)).glob("train/star/*.png")))
    80
    """
    cache = cache or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = cache / "quartz_plugin" / "demo-1"
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        # Removed in any case: all that is left in it is what was not moved to its place.
        with tempfile.TemporaryDirectory(prefix=".demo-", dir=folder.parent) as temporary:
            drawn = Path(temporary) / folder.name
            _draw_all(drawn)
            try:
                drawn.rename(folder)
            except OSError:
                if not folder.is_dir():  # Else another process was faster, and its folder is kept.
                    raise
    found, expected = len(list(folder.glob("*/*/*.png"))), sum(SPLITS.values()) * len(CLASSES)
    if found != expected:
        raise ValueError(f"{folder} holds {found:,} images of {expected:,}: remove it, and it is drawn anew")
    return folder


def draw(label: str, generator: np.random.Generator) -> Image.Image:
    """Draw one image of a class, RGB, 64 x 64 pixels; what may vary within the class comes from the generator.

    These are position, size, rotation, the two colours, the fall of the light and a little noise.

    Raises
    ------
    ValueError
        If there is no such class.

    Examples
    --------
    >>> image = draw("star", np.random.default_rng(0))
    >>> image.size, image.mode
    ((64, 64), 'RGB')
    """
    if label not in SHAPES:
        raise ValueError(f"no class {label!r}, only {', '.join(CLASSES)}")
    radius = generator.uniform(13, 26)
    center = generator.uniform(radius, SIZE - radius, 2)
    turn, light = generator.uniform(0, 2 * np.pi, 2)
    ground, figure = generator.uniform(0, 255, (2, 3))
    while np.linalg.norm(ground - figure) < 110:
        ground, figure = generator.uniform(0, 255, (2, 3))

    # Pixels as complex numbers: to turn is to multiply.
    axis = (np.arange(SIZE * OVERSAMPLING) + 0.5) / OVERSAMPLING
    pixels = axis + 1j * axis[:, None]
    inside = SHAPES[label]((pixels - complex(*center)) * np.exp(1j * turn) / radius)
    share = inside.reshape(SIZE, OVERSAMPLING, SIZE, OVERSAMPLING).mean((1, 3))[..., None]

    middle = pixels[::OVERSAMPLING, ::OVERSAMPLING] / SIZE - (0.5 + 0.5j)
    brightness = 1 + 0.4 * (middle * np.exp(1j * light)).real[..., None]
    image = brightness * (ground + share * (figure - ground)) + generator.normal(0, 10, (SIZE, SIZE, 3))
    return Image.fromarray(image.clip(0, 255).astype(np.uint8))


def _draw_all(folder: Path) -> None:
    for s, (split, count) in enumerate(SPLITS.items()):
        for c, label in enumerate(CLASSES):
            (folder / split / label).mkdir(parents=True)
            for number in range(count):
                image = draw(label, np.random.default_rng([SEED, s, c, number]))
                image.save(folder / split / label / f"{number:04}.png")


def _fold(z: Array, corners: int) -> Array:
    """Fold the plane into one sector of a regular figure; the real axis is its axis of symmetry."""
    sector = 2 * np.pi / corners
    folded: Array = np.abs(z) * np.exp(1j * np.abs((np.angle(z) + sector / 2) % sector - sector / 2))
    return folded


def _star(z: Array) -> Any:
    z = _fold(z, 5)
    return z.real + 2.4 * z.imag < 1


# Which points of the complex plane belong to a figure: shapes reach to a radius of about 1, textures go on for ever.
SHAPES: dict[str, Callable[[Array], Any]] = {
    "checkerboard": lambda z: np.sin(5 * z.real) * np.sin(5 * z.imag) > 0,
    "cross": lambda z: (_fold(z, 4).imag < 0.25) & (_fold(z, 4).real < 1),
    "disc": lambda z: abs(z) < 0.9,
    "dots": lambda z: np.cos(7 * z.real) + np.cos(7 * z.imag) > 0.8,
    "ring": lambda z: abs(abs(z) - 0.75) < 0.2,
    "spiral": lambda z: (np.cos(np.angle(z) - 11 * abs(z)) > 0) & (abs(z) < 1.1),
    "square": lambda z: _fold(z, 4).real < 0.75,
    "star": _star,
    "stripes": lambda z: np.sin(7 * z.real) > 0,
    "triangle": lambda z: _fold(z, 3).real < 0.5,
}
CLASSES: tuple[str, ...] = tuple(sorted(SHAPES))
