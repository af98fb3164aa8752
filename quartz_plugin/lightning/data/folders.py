"""Images in folders, one folder for each class."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms import v2

from quartz_plugin.convert.images import evenly
from quartz_plugin.lightning.data.images import Images, Sample
from quartz_plugin.lightning.data.listing import has_images, image_files, samples_of, split_evenly, subfolders
from quartz_plugin.lightning.data.module import TEST_SHARE, ClassificationData
from quartz_plugin.lightning.data.preparation import ImagePreparation
from quartz_plugin.lightning.demo import demo_folder

_LAYOUT = (
    "give --data.root a folder with train/CLASS/*.jpg and val/CLASS/*.jpg, or one with CLASS/*.jpg, "
    "or --data.root demo, which draws 1,000 images"
)


class FolderData(ClassificationData):
    """Images in folders, one folder for each class, as float RGB in [0, 1]; normalising is the network's part.

    `root` holds ``train/CLASS/*`` and ``val/CLASS/*`` (tested on; with a ``test/CLASS/*`` as well, ``val`` is for
    validation), or ``CLASS/*`` alone, of which a fifth is set aside for testing, always the same. Classes are those of
    the training folders. Where nothing else is for validation, a part of the training images is.

    Parameters
    ----------
    root : str, optional
        Folder of the images; "demo" draws 1,000 small ones of 10 classes.
    size : int, optional
        Height and width of what the network sees; by default what the configuration of timm's or Hugging Face's network
        names, else 224, and 64 for the demo.
    resize : int, optional
        The shorter side before the central size x size pixels are taken; default 8/7 of size.
    batch_size : int
        Images in a batch, of each process.
    validation_share : float
        Share of the training images set aside for validation.
    calibration_images : int
        Training images that conversion takes its percentiles from, evenly over classes, at most.
    augment : Literal['crop', 'shift', 'none']
        Training images: "crop" (random size and place, mirrored), "shift" (by an eighth, mirrored) or "none".
    crop_share : float
        Smallest share of an image that a random crop shows.
    cache : bool
        Keep decoded images in memory.
    num_workers : int, optional
        Processes that load data; null for up to 8 where a GPU computes, and none on a CPU.
    """

    def __init__(
        self,
        root: str | None = None,
        size: int | None = None,
        resize: int | None = None,
        batch_size: int = 64,
        validation_share: float = 0.1,
        calibration_images: int = 1000,
        augment: Literal["crop", "shift", "none"] = "crop",
        crop_share: float = 0.25,
        cache: bool = False,
        num_workers: int | None = None,
    ) -> None:
        super().__init__(batch_size, calibration_images, num_workers)
        if not 0.0 < validation_share < 1.0:
            raise ValueError(f"validation_share must lie between 0 and 1, got {validation_share}")
        if augment not in ("crop", "shift", "none"):
            raise ValueError(f'augment must be "crop", "shift" or "none", got {augment!r}')
        if not 0.0 < crop_share <= 1.0:
            raise ValueError(f"crop_share must lie between 0 and 1, got {crop_share}")
        self.root = root
        self._given_sizes = size, resize
        self._choose_sizes(224)
        self.validation_share = validation_share
        self.augment = augment
        self.crop_share = crop_share
        self.cache = cache
        self.source = "no data" if root is None else f"the images of {Path(root).name}"
        self._names: list[str] | None = None
        self._calibrating: Images | None = None

    def _choose_sizes(self, default: int) -> None:
        size, resize = self._given_sizes
        self.size = size if size is not None else 64 if self.root == "demo" else default
        self.resize = resize if resize is not None else 64 if self.root == "demo" else round(self.size * 8 / 7)
        if not 0 < self.size <= self.resize:
            raise ValueError(f"size must be at least 1 and at most resize, got size {self.size}, resize {self.resize}")

    def suggest_size(self, size: int) -> None:
        """Take the size that a network expects, where none was given; before ``setup``.

        Parameters
        ----------
        size : int
            Height and width.

        Raises
        ------
        ValueError
            If it is larger than `resize`.
        """
        self._choose_sizes(size)

    @property
    def class_names(self) -> Sequence[str]:  # type: ignore[override]
        """Names of the training folders, in order, or what ``classes.json`` ([[folder, name], ...]) calls them."""
        if self.root is None:
            return ()
        if self._names is None:
            self._names = self._find_class_names()
        return self._names

    def setup(self, stage: str | None = None) -> None:
        """List the images and split them, once; raises where there are none."""
        if self._parts:
            return
        parts = self._find_parts()
        for name, samples in parts.items():
            if not samples:
                raise ValueError(f"{self.root} has no image for {name}")
        augmented, plain = self._augmentation(), self._plain()
        # A part of them, as --trainer.limit_test_batches takes, is then of all classes.
        for name, seed in (("validation", 0), ("test", 1)):
            order = np.random.default_rng(seed).permutation(len(parts[name]))
            parts[name] = [parts[name][index] for index in order]
        chosen = evenly(len(parts["train"]), self.calibration_images)
        self._calibrating = Images([parts["train"][index] for index in chosen], plain, self.cache, self.resize)
        self._parts = {
            name: Images(samples, augmented if name == "train" else plain, self.cache, self.resize)
            for name, samples in parts.items()
        }

    @property
    def preparation(self) -> ImagePreparation:
        """Photographs are resized, and their centre is taken."""
        return ImagePreparation("rgb", self.size, self.resize)

    @property
    def decodes_files(self) -> bool:  # type: ignore[override]
        """True where images are decoded again and again: unless they are kept in memory."""
        return not self.cache

    def _calibration(self) -> Any:
        self.ready()
        return self._calibrating

    def _plain(self) -> Callable[[Tensor], Tensor]:
        return self.preparation

    def _augmentation(self) -> Callable[[Tensor], Tensor]:
        if self.augment == "none":
            return self._plain()
        if self.augment == "crop":
            steps = [v2.RandomResizedCrop(self.size, scale=(self.crop_share, 1.0))]
        else:
            steps = [
                v2.Resize(self.resize),
                v2.CenterCrop(self.size),
                v2.RandomCrop(self.size, padding=self.size // 8, padding_mode="reflect"),
            ]
        steps += [v2.RandomHorizontalFlip(), v2.ToDtype(torch.float32, scale=True)]
        return v2.Compose(steps)  # type: ignore[no-any-return]

    def _folder(self) -> Path:
        if self.root is None:
            raise ValueError(f"no images: {_LAYOUT}")
        if self.root == "demo":
            return demo_folder()
        if not Path(self.root).is_dir():
            raise FileNotFoundError(f"no folder {self.root}: {_LAYOUT}")
        return Path(self.root)

    def _class_folders(self) -> tuple[Path, list[str]]:
        """Place of the folders of training images, and their names; raises where there are none."""
        folder = self._folder()
        parent = folder / "train" if (folder / "train").is_dir() else folder
        names = subfolders(parent)
        if not names:
            raise ValueError(f"{parent} has no folder of a class in it: {_LAYOUT}")
        if parent == folder:
            for name in names:
                if subfolders(folder / name) and not image_files(folder / name):
                    raise ValueError(f"{folder / name} holds folders, not images of a class: {_LAYOUT}")
            # The folders of train are the classes, whatever is in them; here a folder may lie about for other reasons.
            names = [name for name in names if has_images(folder / name)] or names
        return parent, names

    def _find_class_names(self) -> list[str]:
        _, names = self._class_folders()
        described = self._folder() / "classes.json"
        try:
            pairs = json.loads(described.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return names
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{described} is not a list of [folder, name]: {error}") from error
        pairs = list(pairs.items()) if isinstance(pairs, dict) else pairs
        if not isinstance(pairs, list) or not all(_is_pair(pair) for pair in pairs):
            raise ValueError(f"{described} is not a list of [folder, name], both texts")
        meaning = dict(pairs)
        return [meaning.get(name, name) for name in names]

    def _find_parts(self) -> dict[str, list[Sample]]:
        folder = self._folder()
        parent, names = self._class_folders()
        samples = samples_of(parent, names)
        if parent == folder:
            rest, test = split_evenly(samples, TEST_SHARE)
            train, validation = split_evenly(rest, self.validation_share)
            return {"train": train, "validation": validation, "test": test}
        # ImageNet's own test folder holds images without labels.
        has = {name: (folder / name).is_dir() and bool(subfolders(folder / name)) for name in ("val", "test")}
        if has["val"] and has["test"]:
            parts = {"train": samples, "validation": samples_of(folder / "val", names)}
        else:
            train, validation = split_evenly(samples, self.validation_share)
            parts = {"train": train, "validation": validation}
        tested = next((name for name in ("test", "val") if has[name]), None)
        if tested is None:
            raise FileNotFoundError(f"{folder} has a folder train, but neither val nor test: {_LAYOUT}")
        return {**parts, "test": samples_of(folder / tested, names)}


def _is_pair(value: Any) -> bool:
    return isinstance(value, list | tuple) and len(value) == 2 and all(isinstance(text, str) for text in value)
