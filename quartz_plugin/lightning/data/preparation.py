"""Preparation of image files for a network, which a converted file remembers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms import v2

from quartz_plugin.lightning.data.images import MOST_PIXELS, open_image, pixels_of
from quartz_plugin.tables import printable

PREPARATION = "image_preparation"
"""Key of a converted network's settings under which the preparation of its images stands."""

Color = Literal["rgb", "grey"]


@dataclass(frozen=True)
class ImagePreparation:
    """Preparation of image files for a network: resized, their centre cut out, values in [0, 1].

    Attributes
    ----------
    color : "rgb" or "grey"
        "rgb": the shorter side becomes `resize`, then the central `size` x `size` pixels are taken,
        ``[3, size, size]``.
        "grey": the whole image becomes `size` x `size`, ``[1, size, size]``.
    size, resize : int
        Pixels.

    Raises
    ------
    ValueError
        If the sizes are not whole numbers of at least 1, `size` is larger than `resize`, or the image would be too
        large.

    Examples
    --------
    >>> ImagePreparation("rgb", 224, 256)
    ImagePreparation(color='rgb', size=224, resize=256)
    >>> ImagePreparation.from_settings({"image_preparation": {"color": "grey", "size": 28, "resize": 28}}).size
    28
    """

    color: Color
    size: int
    resize: int

    def __post_init__(self) -> None:
        if self.color not in get_args(Color):
            raise ValueError(f'color must be "rgb" or "grey", got {printable(repr(self.color))[:40]}')
        sizes = self.size, self.resize
        if not all(type(each) is int for each in sizes) or not 0 < self.size <= self.resize:
            given = printable(f"size {self.size!r}, resize {self.resize!r}")[:80]
            raise ValueError(f"size must be at least 1 and at most resize, got {given}")
        if self.resize**2 > MOST_PIXELS:
            raise ValueError(f"resize {self.resize} makes images of more than {MOST_PIXELS:,} pixels")

    @staticmethod
    def from_settings(settings: Mapping[str, Any]) -> ImagePreparation | None:
        """Return the preparation that a converted network's settings hold; None where they hold none.

        Raises
        ------
        ValueError
            If what they hold is none.
        """
        held = settings.get(PREPARATION)
        if held is None:
            return None
        if not isinstance(held, dict) or set(held) != {"color", "size", "resize"}:
            raise ValueError(f"its preparation of images is {printable(repr(held))[:80]}")
        return ImagePreparation(**held)

    def to_settings(self) -> dict[str, Any]:
        """Return plain JSON values, as a converted network's settings hold them."""
        return asdict(self)

    def __call__(self, pixels: Tensor) -> Tensor:
        """Prepare uint8 pixels ``[3, H, W]`` of an "rgb" image: float ``[3, size, size]`` in [0, 1]."""
        return self._steps(pixels)

    @cached_property
    def _steps(self) -> Callable[[Tensor], Tensor]:
        return v2.Compose(  # type: ignore[no-any-return]
            [v2.Resize(self.resize), v2.CenterCrop(self.size), v2.ToDtype(torch.float32, scale=True)]
        )

    def read(self, path: str) -> Tensor:
        """Read an image file and prepare it.

        Raises
        ------
        FileNotFoundError, UnreadableImageError
            If it is not there, or no image.
        """
        if self.color == "rgb":
            return self(pixels_of(path, self.resize))
        image = open_image(path).convert("L").resize((self.size, self.size))
        return torch.from_numpy(np.asarray(image, np.float32) / 255).unsqueeze(0)

    def __str__(self) -> str:
        """Describe it in a few words."""
        if self.color == "grey":
            return f"grey, {self.size} x {self.size}"
        return f"shorter side {self.resize}, central {self.size} x {self.size} pixels"
