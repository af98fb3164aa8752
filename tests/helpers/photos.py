"""Folders of small photos."""

import numpy as np
from PIL import Image


def folder_of_photos(folder, count, size):
    """Write 3 classes x `count` images of `size` x `size`, which differ in their colour."""
    draw = np.random.default_rng(0)
    for number, name in enumerate(("ant", "bee", "cow")):
        (folder / name).mkdir(parents=True)
        for index in range(count):
            pixels = draw.integers(0, 120, (size, size, 3))
            pixels[..., number] += 100
            Image.fromarray(pixels.astype(np.uint8)).save(folder / name / f"{index:02}.png")
    return folder
