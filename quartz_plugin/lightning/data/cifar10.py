"""CIFAR-10: torchvision's files, or folders of images."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torchvision

from quartz_plugin.lightning.data.folders import FolderData
from quartz_plugin.lightning.data.images import Sample
from quartz_plugin.lightning.data.listing import split_evenly, subfolders
from quartz_plugin.lightning.data.module import only_process

_CIFAR10_FOLDER = "cifar-10-batches-py"
CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


class CIFAR10Data(FolderData):
    """CIFAR-10, 32 x 32: as torchvision stores it (downloaded unless it is there), or as folders of images.

    Parameters
    ----------
    root : str, optional
        Folder with cifar-10-batches-py in it, or to download that into; or a folder as FolderData takes it,
        with train, val and test; "demo" draws 1,000 small images of 10 classes.
    size : int
        Height and width of what the network sees.
    resize : int
        The shorter side before the central size x size pixels are taken.
    batch_size : int
        Images in a batch, of each process.
    augment : Literal['crop', 'shift', 'none']
        Training images: "shift" (by an eighth, mirrored), "crop" (random size and place, mirrored) or "none".
    cache : bool
        Keep decoded images in memory.
    **options
        Those of FolderData.
    """

    def __init__(
        self,
        root: str | None = None,
        size: int = 32,
        resize: int = 32,
        batch_size: int = 128,
        augment: Literal["crop", "shift", "none"] = "shift",
        cache: bool = True,
        **options: Any,
    ) -> None:
        super().__init__(root, size, resize, batch_size, augment=augment, cache=cache, **options)

    def prepare_data(self) -> None:
        """Download CIFAR-10 where it is not there."""
        if self._stored() and not (Path(str(self.root)) / _CIFAR10_FOLDER).is_dir():
            _torchvision_cifar10(str(self.root), train=True, download=only_process())

    def _stored(self) -> bool:
        """Return whether it is, or is to become, torchvision's files, not folders of images."""
        if self.root is None or self.root == "demo":
            return False
        if not Path(self.root).is_dir():
            return True
        folders = set(subfolders(Path(self.root)))
        return _CIFAR10_FOLDER in folders or folders <= {"MNIST"}

    def _find_class_names(self) -> list[str]:
        return list(CIFAR10_CLASSES) if self._stored() else super()._find_class_names()

    def _find_parts(self) -> dict[str, list[Sample]]:
        if not self._stored():
            return super()._find_parts()
        train, validation = split_evenly(_torchvision_cifar10(str(self.root), train=True), self.validation_share)
        return {"train": train, "validation": validation, "test": _torchvision_cifar10(str(self.root), train=False)}


def _torchvision_cifar10(root: str, train: bool, download: bool = False) -> list[Sample]:
    try:
        dataset = torchvision.datasets.CIFAR10(root, train=train, download=download)
    except (RuntimeError, OSError) as error:
        raise FileNotFoundError(
            f"no CIFAR-10 under {Path(root) / _CIFAR10_FOLDER}, and it could not be downloaded; put it there, "
            "or give --data.root a folder with train/CLASS/*.png, val and test, or --data.root demo"
        ) from error
    pixels = torch.from_numpy(dataset.data).permute(0, 3, 1, 2)
    order = np.argsort(dataset.targets, kind="stable")  # Splits and samples are even over what is sorted by class.
    return [(pixels[index], int(dataset.targets[index])) for index in order]
