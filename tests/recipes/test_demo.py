"""The demo images: drawn once, whole, and always the same."""

import shutil
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("lightning", reason="needs the extra recipes")

from PIL import Image

from quartz_plugin.lightning import demo
from quartz_plugin.lightning.demo import CLASSES, demo_folder, draw


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    cache = tmp_path_factory.mktemp("cache")
    demo_folder(cache)
    return cache


@pytest.fixture(scope="module")
def folder(cache):
    return cache / "quartz_plugin" / "demo-1"


@pytest.fixture
def few(monkeypatch):
    """A folder of 20 images, where it matters only that some are drawn."""
    monkeypatch.setattr(demo, "SPLITS", {"train": 1, "val": 1})


def pixels(image):
    return np.asarray(image).tobytes()


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_ten_classes_in_two_splits(folder):
    assert len(CLASSES) == 10
    assert list(CLASSES) == sorted(CLASSES)
    assert names(folder) == ["train", "val"]
    for split, count in ("train", 80), ("val", 20):
        assert names(folder / split) == list(CLASSES)
        for label in CLASSES:
            assert names(folder / split / label) == [f"{number:04}.png" for number in range(count)]


def test_images_are_small_rgb_and_no_two_alike(folder):
    seen = set()
    for path in folder.glob("*/*/*.png"):
        with Image.open(path) as image:
            assert (image.format, image.mode, image.size) == ("PNG", "RGB", (64, 64))
            seen.add(pixels(image))
    assert len(seen) == 1000


@pytest.mark.parametrize(("split", "label", "number"), [("train", "checkerboard", 0), ("val", "star", 19)])
def test_an_image_is_the_same_drawn_again(folder, tmp_path, split, label, number):
    seed = [demo.SEED, ["train", "val"].index(split), CLASSES.index(label), number]
    draw(label, np.random.default_rng(seed)).save(tmp_path / "again.png")
    assert (folder / split / label / f"{number:04}.png").read_bytes() == (tmp_path / "again.png").read_bytes()


@pytest.mark.parametrize("label", CLASSES)
def test_both_colours_show(label):
    for seed in range(20):
        assert np.asarray(draw(label, np.random.default_rng(seed))).std((0, 1)).max() > 12


def test_unknown_class():
    with pytest.raises(ValueError, match="no class 'house', only checkerboard, cross"):
        draw("house", np.random.default_rng(0))


def test_drawn_once_and_nothing_left_beside_it(cache, folder, monkeypatch):
    monkeypatch.setattr(demo, "draw", None)
    assert demo_folder(cache) == folder
    assert names(folder.parent) == ["demo-1"]


def test_where_the_cache_is(few, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert demo_folder() == tmp_path / "xdg" / "quartz_plugin" / "demo-1"
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setattr(Path, "home", lambda: tmp_path / "home")
    assert demo_folder() == tmp_path / "home" / ".cache" / "quartz_plugin" / "demo-1"


@pytest.mark.parametrize("failure", [KeyboardInterrupt, OSError])
def test_a_failure_leaves_nothing_behind(tmp_path, monkeypatch, failure):
    def failing(label, generator):
        if label == CLASSES[1]:
            raise failure
        return draw(label, generator)

    monkeypatch.setattr(demo, "draw", failing)
    with pytest.raises(failure):
        demo_folder(tmp_path)
    assert names(tmp_path / "quartz_plugin") == []


def test_a_failed_rename_is_not_hidden(few, tmp_path, monkeypatch):
    def refuse(self, target):
        raise PermissionError("not here")

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(PermissionError, match="not here"):
        demo_folder(tmp_path)
    assert names(tmp_path / "quartz_plugin") == []


def test_a_folder_drawn_meanwhile_is_kept(few, tmp_path, monkeypatch):
    theirs = demo_folder(tmp_path / "theirs")
    target = tmp_path / "ours" / "quartz_plugin" / "demo-1"

    def overtaken(label, generator):
        if not target.exists():
            shutil.copytree(theirs, target)
            (target / "theirs").touch()
        return draw(label, generator)

    monkeypatch.setattr(demo, "draw", overtaken)
    assert demo_folder(tmp_path / "ours") == target
    assert names(target) == ["theirs", "train", "val"]
    assert names(target.parent) == ["demo-1"]


def test_a_damaged_folder_is_refused(few, tmp_path):
    folder = demo_folder(tmp_path)
    (folder / "val" / "star" / "0000.png").unlink()
    with pytest.raises(ValueError, match=r"demo-1 holds 19 images of 20: remove it"):
        demo_folder(tmp_path)
    shutil.rmtree(folder)
    folder.mkdir()
    with pytest.raises(ValueError, match=r"demo-1 holds 0 images of 20: remove it"):
        demo_folder(tmp_path)
