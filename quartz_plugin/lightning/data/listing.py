"""Listing of image files in folders of classes, and even splits of what is listed."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from torchvision.datasets.folder import IMG_EXTENSIONS

from quartz_plugin.convert.images import evenly
from quartz_plugin.lightning.data.images import Sample
from quartz_plugin.tables import printable


def _left_out(name: str) -> bool:
    """Return whether a file or folder is of the system's or a program's making: hidden (``._x.png``), or a cache."""
    return name.startswith(".") or name in ("__pycache__", "__MACOSX")


def _entries(folder: Path) -> tuple[list[str], list[str]]:
    """Names of a folder's subfolders and image files, sorted; without what is no one's image or class.

    A link to a folder that this one lies in is neither, nor is one to itself. A link to nothing is an image that
    cannot be read.
    """
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


def subfolders(folder: Path) -> list[str]:
    """Return the names of a folder's subfolders that may be classes, sorted."""
    return _entries(folder)[0]


def image_files(folder: Path) -> list[str]:
    """Return the names of a folder's image files, sorted."""
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


def samples_of(folder: Path, names: Sequence[str]) -> list[Sample]:
    """Image files of the folders of these classes, sorted by class; a folder may be empty or missing."""
    there = set(subfolders(folder))
    if unknown := [name for name in sorted(there - set(names)) if has_images(folder / name)]:
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


def has_images(folder: Path) -> bool:
    """Return whether there are images in a folder or one within it."""
    return any(files for _, files in _walk(folder))


def split_evenly(samples: Sequence[Sample], share: float) -> tuple[list[Sample], list[Sample]]:
    """Split samples, sorted by class, into (rest, `share`): spread evenly over them, so each class alike."""
    chosen = set(evenly(len(samples), max(1, round(share * len(samples)))) if samples else ())
    rest = [sample for index, sample in enumerate(samples) if index not in chosen]
    return rest, [samples[index] for index in sorted(chosen)]
