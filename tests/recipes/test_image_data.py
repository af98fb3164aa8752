"""Folders of images and CIFAR-10: which image goes where, what the network sees of it, and what goes wrong."""

import gc
import json
import random
import shutil
import warnings
import zlib
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers.paths import SHARED
from torch import nn
from torch.nn import functional as F

pytest.importorskip("lightning", reason="needs the extra recipes")

import lightning
import torchvision
from PIL import Image
from torch.utils.data import DataLoader

from quartz_plugin.convert.images import evenly
from quartz_plugin.lightning import CIFAR10Data, FolderData, MNISTData, demo
from quartz_plugin.lightning.data import (
    CIFAR10_CLASSES,
    Images,
    Seeded,
    ShareSampler,
    UnreadableImageError,
    open_image,
    seed_of,
)
from quartz_plugin.lightning.data import module as data_module

PARTS = ("train", "validation", "test")
RESTS_OF_TRAIN = {"train/cat": 20, "train/dog": 20}


def noise(name, width, height):
    """Pixels that differ from image to image, the same every time."""
    generator = np.random.default_rng(zlib.crc32(str(name).encode()))
    return generator.integers(0, 256, (height, width, 3), np.uint8)


def draw(root, counts, width=14, height=12):
    """Draw so many images into each folder of `root`; some more folders may be empty."""
    for name, count in counts.items():
        (root / name).mkdir(parents=True)
        for number in range(count):
            relative = f"{name}/{number:03}.png"
            Image.fromarray(noise(relative, width, height)).save(root / relative)
    return str(root)


def folder_data(root, **options):
    """FolderData of small images."""
    return FolderData(**{"root": str(root), "size": 8, "resize": 8, "batch_size": 4, **options})


def parts_of(data):
    """Part -> [(path within root, class)]."""
    data.setup()
    root = Path(data.root)
    return {
        name: [(Path(path).relative_to(root).as_posix(), label) for path, label in data._parts[name].samples]
        for name in PARTS
    }


def class_counts(samples):
    return dict(Counter(label for _, label in samples))


def images_of(loader, epoch=None):
    if epoch is not None:
        loader.sampler.set_epoch(epoch)
    return torch.cat([images for images, _ in loader])


@pytest.fixture
def alone(tmp_path):
    """Root of three classes with 20 images each."""
    return draw(tmp_path / "alone", {"ant": 20, "bee": 20, "cat": 20})


@pytest.fixture
def two_splits(tmp_path):
    """Root with train and val."""
    return draw(tmp_path / "splits", {**RESTS_OF_TRAIN, "val/cat": 5, "val/dog": 3})


def as_pixels(image):
    """Back to whole numbers, [H, W, 3]."""
    return (image * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()


# Which image goes where.


@pytest.mark.parametrize(
    ("folders", "expected", "tested"),
    [
        ({**RESTS_OF_TRAIN, "val/cat": 5, "val/dog": 3}, [(15, 15), (5, 5), (5, 3)], "val/"),
        ({**RESTS_OF_TRAIN, "test/cat": 5, "test/dog": 3}, [(15, 15), (5, 5), (5, 3)], "test/"),
        (
            {**RESTS_OF_TRAIN, "val/cat": 5, "val/dog": 3, "test/cat": 1, "test/dog": 2},
            [(20, 20), (5, 3), (1, 2)],
            "test/",
        ),
        ({"cat": 20, "dog": 20}, [(12, 12), (4, 4), (4, 4)], ""),
    ],
    ids=["train and val", "train and test", "all three", "classes alone"],
)
def test_each_image_goes_to_one_part_and_each_class_alike_every_time(tmp_path, folders, expected, tested, monkeypatch):
    root = draw(tmp_path / "images", folders)
    parts = parts_of(folder_data(root, validation_share=0.25))
    for name, (cats, dogs) in zip(PARTS, expected, strict=True):
        assert class_counts(parts[name]) == {0: cats, 1: dogs}
    everything = [path for part in parts.values() for path, _ in part]
    assert len(everything) == len(set(everything)) == sum(folders.values())
    assert all(label == ("cat", "dog").index(path.split("/")[-2]) for part in parts.values() for path, label in part)
    assert all(path.startswith(tested) for path, _ in parts["test"])
    assert not tested or not any(path.startswith(tested) for path, _ in parts["train"] + parts["validation"])
    torch.manual_seed(5)
    monkeypatch.setenv("PL_GLOBAL_SEED", "5")
    assert parts_of(folder_data(root, validation_share=0.25)) == parts


def test_the_test_images_are_the_same_whatever_the_validation_share(alone):
    few, many = (parts_of(folder_data(alone, validation_share=share)) for share in (0.1, 0.5))
    assert few["test"] == many["test"]
    assert len(few["validation"]) < len(many["validation"])


def test_classes_of_different_sizes_are_split_in_proportion(tmp_path):
    sizes = {"a": 7, "b": 13, "c": 41, "d": 1}
    parts = parts_of(folder_data(draw(tmp_path / "images", sizes), validation_share=0.25))
    for label, size in enumerate(sizes.values()):
        of_test, of_validation = (class_counts(parts[name]).get(label, 0) for name in ("test", "validation"))
        assert abs(of_test - 0.2 * size) <= 1
        assert abs(of_validation - 0.25 * (size - of_test)) <= 1


def test_classes_are_those_of_the_training_folders_where_val_has_not_all(tmp_path):
    root = draw(
        tmp_path / "images",
        {"train/ant": 4, "train/bee": 4, "train/cat": 4, "train/empty": 0, "val/bee": 0, "val/cat": 3},
    )
    data = folder_data(root)
    assert parts_of(data)["test"] == [(f"val/cat/{number:03}.png", 2) for number in range(3)]
    assert list(data.class_names) == ["ant", "bee", "cat", "empty"]
    assert data.classes == 4


def test_files_that_are_no_images_and_hidden_folders_are_left_out(tmp_path):
    root = Path(draw(tmp_path / "images", {"train/ant": 9, "train/.cache": 2, "val/ant": 1, "val/.bee": 2}))
    for name in ("ant/.gitkeep", "ant/readme.txt", "list.csv"):
        (root / "val" / name).touch()
    for suffix in ("JPG", "jpeg", "webp"):
        Image.fromarray(noise(suffix, 12, 12)).save(root / "val" / "ant" / f"photo.{suffix}")
    data = folder_data(root)
    tested = [path for path, _ in parts_of(data)["test"]]
    assert tested == [f"val/ant/{name}" for name in ("000.png", "photo.JPG", "photo.jpeg", "photo.webp")]
    assert list(data.class_names) == ["ant"]
    assert images_of(data.test_dataloader()).shape == (4, 3, 8, 8)


def test_evenly_takes_what_there_is_and_no_index_twice():
    for count in range(12):
        for wanted in range(15):
            chosen = evenly(count, wanted)
            assert len(set(chosen)) == len(chosen) == min(count, wanted)
            assert chosen == sorted(chosen)
            assert set(chosen) <= set(range(count))
    assert evenly(1000, 2) == [250, 750]


def test_names_come_from_classes_json_in_the_order_of_the_folders(two_splits):
    data = folder_data(two_splits)
    Path(two_splits, "classes.json").write_text(json.dumps([["dog", "a good dog"], ["emu", "none"], ["cat", "a cat"]]))
    assert list(data.class_names) == ["a cat", "a good dog"]
    Path(two_splits, "classes.json").write_text(json.dumps([["dog", "a good dog"]]))
    assert list(folder_data(two_splits).class_names) == ["cat", "a good dog"]
    Path(two_splits, "classes.json").unlink()
    assert list(folder_data(two_splits).class_names) == ["cat", "dog"]


@pytest.mark.parametrize("content", ["no json", "5", '["cat", "dog"]', "[1, 2]"])
def test_a_classes_json_of_another_form_is_named(two_splits, content):
    path = Path(two_splits, "classes.json")
    path.write_text(content)
    with pytest.raises(ValueError, match=r"not a list of \[folder, name\]") as raised:
        _ = folder_data(two_splits).class_names
    assert str(path) in str(raised.value)
    assert "\n" not in str(raised.value)


def test_without_a_root_there_are_no_names_and_the_source_says_so(two_splits):
    assert (folder_data(two_splits).source, FolderData().source) == ("the images of splits", "no data")
    assert (FolderData().class_names, FolderData().classes) == ((), 0)


# What goes wrong.


@pytest.mark.parametrize(
    ("folders", "error", "says"),
    [
        (None, FileNotFoundError, ["no folder", "images", "--data.root", "train/CLASS/*.jpg"]),
        ({"train/cat": 5}, FileNotFoundError, ["neither val nor test", "--data.root"]),
        ({"train/cat": 5, "val/cow": 1, "val/cat": 1}, ValueError, ["val", "cow", "the 1 training folders"]),
        ({"train/cat": 5, "val/cat": 1, "test/cow": 1}, ValueError, ["test", "cow", "the 1 training folders"]),
        (
            {"train/cat": 5, **{f"val/cow{number}": 1 for number in range(7)}},
            ValueError,
            ["cow0, cow1, cow2, cow3, cow4 ..."],
        ),
        ({"train/cat": 5, "val/cat": 0}, ValueError, ["no image for test"]),
        ({"train/cat": 5, "val/cat": 0, "test/cat": 1}, ValueError, ["no image for validation"]),
        ({"train/cat": 0, "val/cat": 5}, ValueError, ["no image for train"]),
        ({"cat": 0, "dog": 0}, ValueError, ["no image for train"]),
        ({"cat": 1}, ValueError, ["no image for train"]),
    ],
    ids=[
        "missing",
        "train alone",
        "val more",
        "test more",
        "many more",
        "no test",
        "no val",
        "no train",
        "none",
        "one",
    ],
)
def test_folders_that_do_not_fit_are_named_in_one_line(tmp_path, folders, error, says):
    root = tmp_path / "images"
    if folders is not None:
        draw(root, folders)
    with pytest.raises(error) as raised:
        folder_data(root).setup()
    for part in [str(root), *says]:
        assert part in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("use", ["setup", "calibration_dataloader"])
def test_without_a_root_the_error_says_what_to_give(use):
    with pytest.raises(ValueError, match=r"^no images: give --data.root a folder .* or --data.root demo.*images$"):
        getattr(FolderData(), use)()


@pytest.mark.parametrize("folders", [["train", "val"], ["."]], ids=["train", "root"])
def test_class_names_of_an_empty_folder_say_what_to_give(tmp_path, folders):
    for name in folders:
        (tmp_path / "images" / name).mkdir(parents=True)
    with pytest.raises(ValueError, match=r"has no folder of a class in it: give --data.root"):
        _ = folder_data(tmp_path / "images").class_names


@pytest.mark.parametrize("folders", [["train", "val"], ["."]], ids=["train", "root"])
def test_an_empty_folder_says_what_to_give(tmp_path, folders):
    for name in folders:
        (tmp_path / "images" / name).mkdir(parents=True)
    with pytest.raises(ValueError, match=r"--data.root"):
        folder_data(tmp_path / "images").setup()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"calibration_images": 0}, "calibration_images must be at least 1, got 0"),
        ({"num_workers": -1}, "num_workers must be at least 0, got -1"),
        ({"validation_share": 0.0}, "validation_share must lie between 0 and 1, got 0.0"),
        ({"validation_share": 1.0}, "validation_share must lie between 0 and 1, got 1.0"),
        ({"crop_share": 0.0}, "crop_share must lie between 0 and 1, got 0.0"),
        ({"crop_share": 1.5}, "crop_share must lie between 0 and 1, got 1.5"),
        ({"size": 0}, "size 0, resize 0"),
        ({"size": 9, "resize": 8}, "size must be at least 1 and at most resize, got size 9, resize 8"),
    ],
)
@pytest.mark.parametrize("kind", [FolderData, CIFAR10Data])
def test_options_out_of_range_are_refused(kind, options, says):
    if kind is CIFAR10Data and options == {"size": 0}:
        options = {"size": 0, "resize": 0}
    with pytest.raises(ValueError, match=says):
        kind(**options)


@pytest.mark.parametrize(
    ("content", "num_workers"), [(b"", 0), (b"no image", 0), ("truncated", 0), ("truncated", 1)], ids=str
)
def test_an_unreadable_image_is_named_in_one_line_from_a_worker_too(two_splits, content, num_workers, monkeypatch):
    path = Path(two_splits, "val", "dog", "001.png")
    path.write_bytes(path.read_bytes()[:100] if content == "truncated" else content)
    # A worker that has failed is waited for so long, when its loader goes.
    monkeypatch.setattr(torch.utils.data._utils, "MP_STATUS_CHECK_INTERVAL", 0.5)

    def error():
        data = folder_data(two_splits, num_workers=num_workers)
        data.setup()
        try:
            images_of(data.test_dataloader())
        except UnreadableImageError as error:
            return str(error)

    message = error()
    gc.collect()
    assert message.startswith(f"cannot read the image {path} (")
    assert message.endswith("): remove it or replace it")
    assert "\n" not in message


def test_a_single_image_that_is_not_there_or_no_image_is_named(tmp_path):
    (tmp_path / "text.png").write_text("text")
    for data in (FolderData(), CIFAR10Data(), MNISTData()):
        with pytest.raises(FileNotFoundError, match=r"no image .*nowhere.png"):
            data.read(str(tmp_path / "nowhere.png"))
        with pytest.raises(UnreadableImageError, match=r"cannot read the image .*text.png"):
            data.read(str(tmp_path / "text.png"))
    with pytest.raises(FileNotFoundError, match="no image"):
        open_image(str(tmp_path))


# Files that are no photographs, too large, or of values without a range.


def refused(path, **options):
    """The one line by which an image is refused."""
    with pytest.raises(UnreadableImageError) as raised:
        FolderData(**{"size": 8, "resize": 8, **options}).read(str(path))
    (line,) = str(raised.value).splitlines()
    assert line.startswith(f"cannot read the image {path} (")
    assert line.endswith("): remove it or replace it")
    return line


def test_formats_that_are_no_photographs_are_not_opened_whatever_they_are_called(tmp_path, monkeypatch):
    from PIL import EpsImagePlugin

    def started(*_, **__):
        raise AssertionError("Ghostscript was started")

    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", started)
    for suffix in ("eps", "ico", "pcx", "tga", "sgi"):
        Image.fromarray(noise(suffix, 8, 8)).save(tmp_path / f"a.{suffix}")
        (tmp_path / f"a.{suffix}").rename(tmp_path / "photo.png")
        assert "it is none of JPEG, PNG, TIFF, WEBP, BMP, PPM, GIF" in refused(tmp_path / "photo.png")


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP", "BMP", "PPM", "GIF"])
def test_photographs_are_opened_whatever_they_are_called(tmp_path, kind):
    Image.new("RGB", (8, 8), (200, 100, 0)).save(tmp_path / "photo.png", format=kind)
    image = FolderData(size=8, resize=8).read(str(tmp_path / "photo.png"))
    assert (image.mean((1, 2)) * 255).tolist() == pytest.approx([200, 100, 0], abs=4)


@pytest.mark.parametrize(
    ("size", "says"),
    [
        ((5000, 1), "5000 x 1 pixels, which would be more than 67,108,864 where the shorter side is 256"),
        ((1, 5000), "1 x 5000 pixels, which would be more than 67,108,864 where the shorter side is 256"),
        ((8193, 8192), "8193 x 8192 pixels, of at most 67,108,864"),
        ((12000, 12000), "more than 67,108,864 pixels"),
    ],
)
def test_images_that_would_take_too_much_memory_are_refused_before_they_are_decoded(tmp_path, size, says, monkeypatch):
    path = tmp_path / "large.png"
    Image.new("1", size).save(path)
    monkeypatch.setattr(Image.Image, "load", lambda *_: pytest.fail("it was decoded"))
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda *_: pytest.fail("it was decoded"))
    assert says in refused(path, size=224, resize=256)
    dataset = Images([(str(path), 0)], lambda pixels: pixels, resize=256)
    with pytest.raises(UnreadableImageError, match=r"large.png"):
        dataset[0]


def test_the_largest_and_the_longest_image_are_read(tmp_path, monkeypatch):
    monkeypatch.setattr("quartz_plugin.lightning.data.images.MOST_PIXELS", 40 * 30)
    Image.fromarray(noise("largest", 40, 30)).save(tmp_path / "largest.png")
    Image.fromarray(noise("longest", 96, 4)).save(tmp_path / "longest.png")  # Resized: 12 x 288, and 1,200 / 12² = 8.3.
    assert np.array_equal(as_pixels(FolderData(size=30, resize=30).read(str(tmp_path / "largest.png"))),
                          noise("largest", 40, 30)[:, 5:35])  # fmt: skip
    assert "96 x 4 pixels, which would be more than 1,200" in refused(tmp_path / "longest.png", size=8, resize=12)
    assert FolderData(size=7, resize=7).read(str(tmp_path / "longest.png")).shape == (3, 7, 7)


def test_a_large_image_is_read_strip_by_strip_as_it_is(tmp_path):
    pixels = noise("strips", 1100, 2000)  # Of 953 rows each.
    Image.fromarray(pixels).save(tmp_path / "large.bmp")
    read = FolderData(size=1100, resize=1100).read(str(tmp_path / "large.bmp"))
    assert np.array_equal(as_pixels(read), pixels[450:1550])


GREYS = np.array([[0.0, 0.25], [0.5, 1.0]])


@pytest.mark.parametrize("kind", ["png", "tif", "pgm"])
@pytest.mark.parametrize("order", ["<", ">"])
def test_16_bits_are_scaled_by_their_whole_range(tmp_path, kind, order):
    values = (GREYS * 65535).round().astype(np.uint16)
    if kind == "pgm":
        (tmp_path / "deep.pgm").write_bytes(b"P5 2 2 65535\n" + values.astype(">u2").tobytes())
    elif kind == "tif":
        tiff(tmp_path / "deep.tif", values, order)
    else:
        Image.fromarray(values).save(tmp_path / "deep.png")
    image = FolderData(size=2, resize=2).read(str(tmp_path / f"deep.{kind}"))
    assert np.allclose(image.numpy(), GREYS, atol=0.5 / 255)


def tiff(path, values, order="<", kind=1, photometric=1, bits=None):
    """A grey TIFF without compression, written by hand: Pillow writes not all there are."""
    raw = values.astype(values.dtype.newbyteorder(order)).tobytes() if isinstance(values, np.ndarray) else values
    bits = bits or 8 * values.dtype.itemsize
    side = 2
    tags = [(256, side), (257, side), (258, bits), (259, 1), (262, photometric), (273, 0), (277, 1), (278, side),
            (279, len(raw)), (339, kind)]  # fmt: skip
    start = 8 + 2 + 12 * len(tags) + 4
    integer = {"<": "little", ">": "big"}[order]

    def number(value, size):
        return int(value).to_bytes(size, integer)

    entries = b"".join(
        number(tag, 2) + number(4, 2) + number(1, 4) + number(start if tag == 273 else value, 4) for tag, value in tags
    )
    head = (b"II*\0" if order == "<" else b"MM\0*") + number(8, 4)
    path.write_bytes(head + number(len(tags), 2) + entries + number(0, 4) + raw)


def test_16_bits_whose_zero_is_white_and_12_bits_are_scaled_too(tmp_path):
    white_is_zero = (65535 - GREYS * 65535).round().astype(np.uint16)
    tiff(tmp_path / "inverted.tif", white_is_zero, photometric=0)
    # Two values of 12 bits in three bytes, a row at a time.
    rows = [(int(a), int(b)) for a, b in (GREYS * 4095).round()]
    packed = b"".join(bytes([a >> 4, (a & 15) << 4 | b >> 8, b & 255]) for a, b in rows)
    tiff(tmp_path / "twelve.tif", packed, bits=12)
    for name in ("inverted", "twelve"):
        image = FolderData(size=2, resize=2).read(str(tmp_path / f"{name}.tif"))
        assert np.allclose(image.numpy(), GREYS, atol=0.5 / 255), name


@pytest.mark.parametrize(
    ("dtype", "kind", "says"),
    [
        (np.float32, 3, "floating-point numbers"),
        (np.int32, 2, "integers with a sign or of 32 bits"),
        (np.uint32, 1, "integers with a sign or of 32 bits"),
        (np.int16, 2, "integers with a sign or of 32 bits"),
    ],
)
def test_values_without_a_range_are_refused_and_the_line_says_what_to_do(tmp_path, dtype, kind, says):
    tiff(tmp_path / "values.tif", (GREYS * 100).astype(dtype), kind=kind)
    line = refused(tmp_path / "values.tif")
    assert f"(its values are {says}, of which no range is defined: save it with 8 or 16 bits)" in line


def test_a_name_with_control_characters_is_printed_without_them(tmp_path):
    path = tmp_path / "a\x1b[31mred\nline.png"
    path.write_text("no image")
    with pytest.raises(UnreadableImageError, match=r"a\\x1b\[31mred line.png") as raised:
        open_image(str(path))
    assert str(raised.value).isprintable()
    with pytest.raises(FileNotFoundError, match=r"no image .*\\x1b\[0m$"):
        open_image(str(tmp_path / "\x1b[0m"))


def test_damaged_images_are_refused_in_one_line_whatever_is_wrong(tmp_path):
    draw = random.Random(0)
    path, refusals = tmp_path / "damaged.png", []
    for number in range(150):
        kind = draw.choice(["JPEG", "PNG", "TIFF", "WEBP", "BMP", "PPM", "GIF"])
        mode = "RGB" if kind in ("JPEG", "WEBP") else draw.choice(["RGB", "L", "1"])
        Image.fromarray(noise(number, 9, 7)).convert(mode).save(path, format=kind)
        data = bytearray(path.read_bytes())
        match draw.randrange(3):
            case 0:
                del data[draw.randrange(len(data)) :]
            case 1:
                for _ in range(draw.randrange(1, 6)):
                    data[draw.randrange(min(len(data), 64))] = draw.randrange(256)
            case 2:
                data[:] = data[: draw.randrange(16)] + draw.randbytes(draw.randrange(200))
        path.write_bytes(data)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                image = FolderData(size=8, resize=8).read(str(path))
        except UnreadableImageError as error:
            refusals.append(str(error))
        else:
            assert image.shape == (3, 8, 8)
            assert 0 <= float(image.min()) <= float(image.max()) <= 1
    assert 50 < len(refusals) < 150
    assert all(line.isprintable() and str(path) in line for line in refusals)  # And so one line.


# What lies about in folders.


@pytest.mark.parametrize("splits", [True, False], ids=["train and val", "classes alone"])
def test_what_programs_and_systems_leave_behind_are_no_classes_and_no_images(tmp_path, splits):
    root = tmp_path / "images"
    parents = ["train", "val"] if splits else ["."]
    clean = draw(tmp_path / "clean", {f"{parent}/{name}": 10 for parent in parents for name in ("ant", "bee")})
    shutil.copytree(clean, root)
    for parent in (root / name for name in parents):
        for name in ("__pycache__", ".ipynb_checkpoints", "__MACOSX"):
            shutil.copytree(parent / "ant", parent / name)
            shutil.copytree(parent / "ant", parent / "bee" / name)
        for place in (parent / "ant" / "._000.png", parent / "ant" / ".hidden.jpg"):
            place.write_bytes(b"resource fork")
        (parent / "ant" / "folder.png").mkdir()
        (parent / "loop").symlink_to(parent)
        (parent / "itself").symlink_to("itself")
        (parent / "ant" / "up").symlink_to(parent.parent)
        (parent / "ant" / "itself.png").symlink_to("itself.png")
        (parent / "ant" / "here").symlink_to(".")
        (parent / "bee" / "more").mkdir()
        (parent / "bee" / "more" / "round").symlink_to("../more")
    if not splits:
        (root / "empty").mkdir()
        (root / "readme").mkdir()
        (root / "readme" / "notes.txt").touch()
    else:
        (root / "val" / "empty").mkdir()
    data = folder_data(root)
    assert list(data.class_names) == ["ant", "bee"]
    assert parts_of(data) == parts_of(folder_data(clean))


def test_links_to_folders_and_images_elsewhere_are_followed(tmp_path):
    elsewhere = Path(draw(tmp_path / "elsewhere", {"a": 10, "b": 10, "c": 10}))
    root = Path(draw(tmp_path / "images", {"cat": 1}))
    (root / "ant").symlink_to(elsewhere / "a")
    (root / "bee").symlink_to(elsewhere / "b", target_is_directory=True)
    (root / "cat" / "more").symlink_to(elsewhere / "c")
    parts = parts_of(folder_data(root))
    assert sorted(path for part in parts.values() for path, _ in part) == [
        *(f"{folder}/{number:03}.png" for folder in ("ant", "bee") for number in range(10)),
        "cat/000.png",
        *(f"cat/more/{number:03}.png" for number in range(10)),
    ]


def test_links_that_go_round_by_way_of_others_end(tmp_path):
    root = Path(draw(tmp_path / "images", {"ant": 10, "bee": 1, "bee/x": 10, "bee/y": 10}))
    (root / "bee" / "x" / "to_y").symlink_to("../y")
    (root / "bee" / "y" / "to_x").symlink_to("../x")
    found = [path for part in parts_of(folder_data(root)).values() for path, _ in part]
    assert len(found) == len({(root / path).resolve() for path in found}) == 31


def test_an_image_that_is_a_link_to_nothing_is_named(two_splits):
    path = Path(two_splits, "val", "dog", "001.png")
    path.unlink()
    path.symlink_to("gone.png")
    data = folder_data(two_splits)
    data.setup()
    with pytest.raises(FileNotFoundError, match=f"no image {path}"):
        images_of(data.test_dataloader())


def test_folders_within_each_other_however_deep_are_walked(tmp_path):
    root = Path(draw(tmp_path / "images", {"ant": 10, "bee": 10}))
    deep = root / "bee"
    for _ in range(300):
        deep /= "d"
    deep.mkdir(parents=True)
    shutil.copy(root / "bee" / "000.png", deep)
    assert sum(len(part) for part in parts_of(folder_data(root)).values()) == 21


@pytest.mark.parametrize(
    "content", ['["ab", "cd"]', '[["dog", 5]]', '[[["dog"], "a"]]', '{"0": ["dog", "a dog"]}', "[" * 5000, "null"]
)
def test_a_classes_json_of_odd_types_is_named_too(two_splits, content):
    path = Path(two_splits, "classes.json")
    path.write_text(content)
    with pytest.raises(ValueError, match=r"classes.json is not a list of \[folder, name\]") as raised:
        _ = folder_data(two_splits).class_names
    assert "\n" not in str(raised.value)


def test_a_classes_json_may_be_an_object(two_splits):
    Path(two_splits, "classes.json").write_text('{"dog": "ein Hündchen"}', encoding="utf-8")
    assert list(folder_data(two_splits).class_names) == ["cat", "ein Hündchen"]


# What the network sees.


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK"])
def test_images_of_any_mode_come_as_rgb_floats_between_0_and_1(two_splits, mode):
    suffix = "tif" if mode == "CMYK" else "png"
    path = Path(two_splits, "val", "cat", f"zzz.{suffix}")
    colour = (255, 102, 0)
    Image.new("RGB", (16, 10), colour).convert(mode, dither=Image.Dither.NONE).save(path)
    data = folder_data(two_splits, size=6, resize=10)
    data.setup()
    image, label = data._parts["test"][5]
    assert data._parts["test"].samples[5] == (str(path), 0)
    assert (label, image.shape, image.dtype) == (0, (3, 6, 6), torch.float32)
    grey = 1.0 if mode == "1" else 136 / 255  # The luminance of the colour.
    expected = [grey] * 3 if mode in ("1", "L", "LA") else [value / 255 for value in colour]
    assert image.mean((1, 2)).tolist() == pytest.approx(expected, abs=0.02 if mode == "P" else 1e-6)
    assert float(image.std((1, 2)).max()) < 1e-6


def test_transparent_pixels_of_an_rgba_image_keep_their_colour(tmp_path):
    Image.new("RGBA", (8, 8), (10, 20, 30, 0)).save(tmp_path / "clear.png")
    image = FolderData(size=8, resize=8).read(str(tmp_path / "clear.png"))
    assert (image[:, 4, 4] * 255).tolist() == pytest.approx([10, 20, 30])


def test_pillow_does_not_remark_on_the_palettes_of_single_files(tmp_path):
    image = Image.fromarray(noise("palette", 8, 8)).quantize(4)
    image.save(tmp_path / "palette.png", transparency=bytes([0, 128, 255]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert FolderData(size=8, resize=8).read(str(tmp_path / "palette.png")).shape == (3, 8, 8)


def test_an_image_of_16_bits_is_scaled_not_cut_off(tmp_path):
    Image.fromarray(np.full((8, 8), 100 * 257, np.uint16)).save(tmp_path / "deep.png")
    image = FolderData(size=8, resize=8).read(str(tmp_path / "deep.png"))
    assert float(image.mean()) == pytest.approx(100 / 255, abs=0.01)


@pytest.mark.parametrize(("width", "height"), [(40, 20), (20, 40)])
def test_the_centre_is_taken_of_the_resized_image(tmp_path, width, height):
    pixels = noise("centre", width, height)
    Image.fromarray(pixels).save(tmp_path / "image.png")
    # The shorter side is 20 already, so no pixel changes.
    image = FolderData(size=10, resize=20).read(str(tmp_path / "image.png"))
    top, left = (height - 10) // 2, (width - 10) // 2
    assert np.array_equal(as_pixels(image), pixels[top : top + 10, left : left + 10])
    assert torch.allclose(image * 255, (image * 255).round(), atol=1e-4)


@pytest.mark.parametrize(("width", "height"), [(40, 20), (20, 40), (5, 6), (30, 30)])
def test_the_shorter_side_is_resized_up_or_down(tmp_path, width, height):
    """A gradient along the longer side shows how much of it is seen."""
    longer = max(width, height)
    ramp = np.arange(longer, dtype=np.uint8)[:, None] * np.ones((1, min(width, height)), np.uint8)
    ramp = ramp if height == longer else ramp.T
    Image.fromarray(ramp * 6).save(tmp_path / "ramp.png")
    image = FolderData(size=14, resize=16).read(str(tmp_path / "ramp.png"))[0] * 255 / 6
    assert image.shape == (14, 14)
    profile = image.mean(1 if height == longer else 0)
    scale = min(width, height) / 16
    middle = 0.5 * (longer - 1)
    seen = middle + (torch.arange(14) - 6.5) * scale
    assert profile[3:-3].tolist() == pytest.approx(seen[3:-3].tolist(), abs=0.35)


def test_sizes_by_default_are_those_documented():
    assert (FolderData().size, FolderData().resize) == (224, 256)
    assert (FolderData(size=70).size, FolderData(size=70).resize) == (70, 80)
    assert (FolderData("demo").size, FolderData("demo").resize) == (64, 64)
    assert (CIFAR10Data().size, CIFAR10Data().resize) == (32, 32)


@pytest.mark.parametrize("kind", [FolderData, CIFAR10Data])
def test_an_image_read_is_as_the_test_images_are(two_splits, kind):
    data = kind(root=two_splits, size=9, resize=11)
    data.setup()
    for index, (path, _) in enumerate(data._parts["test"].samples):
        assert torch.equal(data.read(path), data._parts["test"][index][0])
    assert torch.equal(kind(size=9, resize=11).read(path), data.read(path))


def test_calibration_is_on_training_images_as_they_are_evenly_over_classes(alone):
    data = folder_data(alone, calibration_images=6, augment="crop", validation_share=0.25)
    batches = list(data.calibration_dataloader())
    labels = torch.cat([labels for _, labels in batches])
    assert labels.bincount().tolist() == [2, 2, 2]
    images = torch.cat([images for images, _ in batches])
    seen = {data.read(path).numpy().tobytes(): label for path, label in data._parts["train"].samples}
    assert [seen[image.numpy().tobytes()] for image in images] == labels.tolist()
    assert len({image.numpy().tobytes() for image in images}) == 6
    assert torch.equal(images, images_of(data.calibration_dataloader()))
    # As many as there are at most, and evenly chosen of these.
    assert len(folder_data(alone, calibration_images=1000)._calibration()) == 60 - 12 - 5
    assert torch.equal(data.training_images(3), images[[1, 3, 5]])
    assert torch.equal(data.training_images(100), images)


def test_the_demo_is_drawn_where_it_is_asked_for(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(demo, "SPLITS", {"train": 2, "val": 1})
    for kind, size in ((FolderData, 64), (CIFAR10Data, 32)):
        data = kind(root="demo", validation_share=0.5)
        data.prepare_data()
        data.setup()
        assert list(data.class_names) == list(demo.CLASSES)
        assert [len(data._parts[name]) for name in PARTS] == [10, 10, 10]
        assert data.source == "the images of demo"
        (image, _) = data._parts["test"][0]
        assert image.shape == (3, size, size)


# What is random.


@pytest.mark.parametrize("augment", ["crop", "shift"])
def test_augmentation_depends_on_seed_epoch_and_index_alone(alone, augment, monkeypatch):
    monkeypatch.setenv("PL_GLOBAL_SEED", "3")

    def epochs(**options):
        data = folder_data(alone, augment=augment, **options)
        data.setup()
        loader = data.train_dataloader()
        assert isinstance(loader, DataLoader)
        return [images_of(loader, epoch) for epoch in (0, 1)]

    first, second = epochs()
    torch.manual_seed(99)
    torch.rand(7)
    for options in ({"num_workers": 2}, {"batch_size": 11}, {"cache": True}):
        for images, again in zip((first, second), epochs(**options), strict=True):
            assert torch.equal(images[:33], again[:33])

    data = folder_data(alone, augment=augment)
    data.setup()
    seeded = data.train_dataloader().dataset
    image = seeded[3, 0, 5][0]
    assert torch.equal(image, seeded[3, 0, 5][0])
    for other in ((4, 0, 5), (3, 1, 5), (3, 0, 6)):
        assert not torch.equal(image, seeded[other][0])


def test_alike_images_are_augmented_differently():
    seeded = Seeded(Images([(torch.zeros(1), 0)] * 5, lambda pixels: torch.rand(1)))
    assert len(seeded) == 5
    keys = [(seed, epoch, index) for seed in (0, 1) for epoch in (0, 1) for index in range(5)]
    drawn = {key: float(seeded[key][0]) for key in keys}
    assert len(set(drawn.values())) == 20
    assert {key: float(seeded[key][0]) for key in reversed(keys)} == drawn


def test_the_same_image_is_seen_differently_in_each_epoch(alone):
    data = folder_data(alone, augment="shift")
    data.setup()
    seeded = data.train_dataloader().dataset
    seen = {seeded[0, epoch, 0][0].numpy().tobytes() for epoch in range(20)}
    # Of 3 x 3 places, mirrored or not.
    assert 6 < len(seen) <= 18
    assert {seeded[0, epoch, 0][1] for epoch in range(20)} == {0}


def test_augmentation_leaves_the_global_random_states_as_they_were(alone):
    data = folder_data(alone, augment="crop")
    data.setup()
    seeded = data.train_dataloader().dataset
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    assert seeded[0, 0, 1][0].shape == (3, 8, 8)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (random.getstate(), np.random.get_state()[1].tolist()) == states[1:]


def test_a_shift_is_by_an_eighth_at_most_and_mirrored_or_not(tmp_path):
    root = draw(tmp_path / "images", {"cat": 10}, width=16, height=16)
    data = FolderData(root=root, size=16, resize=16, augment="shift")
    data.setup()
    plain = data.read(data._parts["train"].samples[0][0])
    padded = F.pad(plain[None], (2, 2, 2, 2), mode="reflect")[0]
    possible = {}
    for top in range(5):
        for left in range(5):
            crop = padded[:, top : top + 16, left : left + 16]
            possible[crop.numpy().tobytes()] = (top, left, False)
            possible[crop.flip(-1).numpy().tobytes()] = (top, left, True)
    seeded = data.train_dataloader().dataset
    seen = {possible[seeded[0, epoch, 0][0].numpy().tobytes()] for epoch in range(150)}
    assert len(possible) == 50
    assert {top for top, _, _ in seen} == {left for _, left, _ in seen} == set(range(5))
    assert {mirrored for _, _, mirrored in seen} == {True, False}


def test_a_crop_shows_no_less_than_its_share(tmp_path):
    """A horizontal and a vertical gradient tell how much of the image is seen."""
    ramp = np.arange(64, dtype=np.uint8) * 4
    pixels = np.stack([np.tile(ramp, (64, 1)), np.tile(ramp[:, None], (1, 64)), np.zeros((64, 64), np.uint8)], 2)
    for number in range(10):
        (tmp_path / "images" / "cat").mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(tmp_path / "images" / "cat" / f"{number}.png")
    shares = {}
    for crop_share in (0.1, 0.7):
        data = FolderData(root=str(tmp_path / "images"), size=32, augment="crop", crop_share=crop_share)
        data.setup()
        seeded = data.train_dataloader().dataset
        seen = torch.stack([seeded[0, epoch, 0][0] for epoch in range(60)])
        assert seen.shape == (60, 3, 32, 32)
        wide, high = (seen[:, channel].amax((1, 2)) - seen[:, channel].amin((1, 2)) for channel in (0, 1))
        shares[crop_share] = wide * high * (255 / 256) ** 2
        # Mirrored half of the time.
        falling = (seen[:, 0, 0, 0] > seen[:, 0, 0, -1]).float().mean()
        assert 0.25 < float(falling) < 0.75
    assert float(shares[0.7].min()) > 0.6
    assert float(shares[0.1].min()) < 0.3
    assert float(shares[0.1].max()) > 0.6


def test_augment_none_trains_on_images_as_they_are(alone):
    data = folder_data(alone, augment="none")
    data.setup()
    seeded = data.train_dataloader().dataset
    for index, (path, label) in enumerate(data._parts["train"].samples):
        image, given = seeded[0, index, index]
        assert torch.equal(image, data.read(path))
        assert given == label


def test_validation_and_test_images_are_plain_and_in_order_every_time(two_splits):
    data = folder_data(two_splits, augment="crop")
    data.setup()
    for name, loader in (("validation", data.val_dataloader()), ("test", data.test_dataloader())):
        expected = torch.stack([data.read(path) for path, _ in data._parts[name].samples])
        for epoch in (0, 1):
            assert torch.equal(images_of(loader, epoch), expected)


def test_a_cache_gives_the_same_images_and_keeps_them(alone):
    kept, read = (folder_data(alone, augment="crop", cache=cache) for cache in (True, False))
    for data in (kept, read):
        data.setup()
    for name in PARTS:
        assert len(kept._parts[name]) == len(read._parts[name])
        for _ in range(2):
            for index in range(len(kept._parts[name])):
                key = (0, 0, index)
                (image, label), (again, same) = Seeded(kept._parts[name])[key], Seeded(read._parts[name])[key]
                assert torch.equal(image, again)
                assert label == same
    shutil.rmtree(alone)
    assert images_of(kept.test_dataloader()).shape == (12, 3, 8, 8)
    with pytest.raises(FileNotFoundError, match="no image"):
        images_of(read.test_dataloader())


def test_images_take_paths_and_pixels_alike(tmp_path):
    pixels = noise("pixels", 6, 4)
    Image.fromarray(pixels).save(tmp_path / "image.png")
    tensor = torch.from_numpy(pixels).permute(2, 0, 1)
    dataset = Images([(str(tmp_path / "image.png"), 3), (tensor, 4)], lambda image: image)
    assert len(dataset) == 2
    assert (dataset[0][1], dataset[1][1]) == (3, 4)
    assert torch.equal(dataset[0][0], tensor)
    assert torch.equal(dataset[1][0], tensor)


# Who sees which image, and when.


class OnDevice:
    """Stands in for a trainer that computes on some device."""

    global_rank, world_size = 0, 1

    def __init__(self, kind):
        self.strategy = SimpleNamespace(root_device=torch.device(kind))


@pytest.mark.parametrize(
    ("kind", "cores", "options", "workers"),
    [
        ("cuda", 16, {}, 8),
        ("cuda", 4, {}, 4),
        ("cuda", 1, {}, 0),
        ("cuda", 16, {"cache": True}, 0),
        ("cuda", 16, {"num_workers": 3}, 3),
        ("cuda", 16, {"num_workers": 0}, 0),
        ("cpu", 16, {}, 0),
        ("cpu", 16, {"num_workers": 2}, 2),
    ],
)
def test_a_gpu_is_fed_by_workers_and_pinned_memory_and_a_cpu_is_left_alone(
    two_splits, monkeypatch, kind, cores, options, workers
):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(cores)), raising=False)
    monkeypatch.setattr(data_module, "LEAST_FOR_WORKERS", 5)
    data = folder_data(two_splits, **options)
    data.setup()
    data.trainer = OnDevice(kind)
    for loader in (data.train_dataloader(), data.test_dataloader(), data.calibration_dataloader()):
        assert (loader.num_workers, loader.pin_memory) == (workers, kind == "cuda")
    monkeypatch.setattr(data_module, "LEAST_FOR_WORKERS", 10**6)
    assert data.test_dataloader().num_workers == options.get("num_workers", 0)


@pytest.mark.parametrize("processes", [1, 2, 3])
@pytest.mark.parametrize("count", [1, 6, 10, 11])
def test_shares_are_disjoint_and_complete_in_order(count, processes):
    shares = [ShareSampler(range(count), rank, processes) for rank in range(processes)]
    assert sorted(index for share in shares for index in share) == list(range(count))
    assert [len(share) for share in shares] == [len(list(share)) for share in shares]
    assert list(shares[0]) == sorted(shares[0])


@pytest.mark.parametrize("processes", [1, 2, 3])
@pytest.mark.parametrize("count", [1, 6, 10, 11])
def test_shuffled_shares_are_disjoint_and_equally_long(count, processes, monkeypatch):
    monkeypatch.setenv("PL_GLOBAL_SEED", "7")
    shares = [ShareSampler(range(count), rank, processes, shuffle=True) for rank in range(processes)]
    for epoch in (0, 4):
        for share in shares:
            share.set_epoch(epoch)
        keys = [list(share) for share in shares]
        assert {len(share) for share in keys} == {len(share) for share in shares} == {count // processes}
        flat = [key for share in keys for key in share]
        assert {key[:2] for key in flat} <= {(7, epoch)}
        indices = {index for _, _, index in flat}
        assert len(indices) == len(flat) >= count - processes + 1
        assert indices <= set(range(count))


def test_no_image_is_left_out_of_training_in_every_epoch():
    share = [ShareSampler(range(10), rank, 3, shuffle=True) for rank in range(3)]
    left_out = set()
    for epoch in range(20):
        for each in share:
            each.set_epoch(epoch)
        (missing,) = set(range(10)) - {index for each in share for _, _, index in each}
        left_out.add(missing)
    assert len(left_out) > 3


def test_the_training_order_depends_on_the_epoch_and_the_global_seed_alone(monkeypatch):
    def order(seed, epoch):
        monkeypatch.setenv("PL_GLOBAL_SEED", seed) if seed else monkeypatch.delenv("PL_GLOBAL_SEED", raising=False)
        torch.rand(1)
        sampler = ShareSampler(range(50), shuffle=True)
        sampler.set_epoch(epoch)
        assert list(sampler) == list(sampler)
        return tuple(index for _, _, index in sampler)

    orders = {(seed, epoch): order(seed, epoch) for seed in ("0", "1", "2") for epoch in (0, 1, 2)}
    assert len(set(orders.values())) == 9
    assert all(order(*key) == indices for key, indices in orders.items())
    assert order(None, 1) == orders["0", 1]
    assert all(sorted(indices) == list(range(50)) for indices in orders.values())


def test_seeds_of_neighbours_differ():
    seeds = {seed_of(*key) for key in np.ndindex(4, 5, 30)}
    assert len(seeds) == 600
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert seed_of(1, 23) != seed_of(12, 3)


@pytest.mark.parametrize("processes", [2, 3])
def test_processes_of_a_trainer_share_the_images_out(alone, processes):
    test, calibration, train = [], [], []
    for rank in range(processes):
        data = folder_data(alone, calibration_images=7, augment="none")
        data.trainer = SimpleNamespace(global_rank=rank, world_size=processes)
        data.setup()
        test.append(images_of(data.test_dataloader()))
        calibration.append(images_of(data.calibration_dataloader()))
        train.append(images_of(data.train_dataloader()))
    whole = folder_data(alone, calibration_images=7)

    def keys(images):
        return sorted(image.numpy().tobytes() for image in images)

    assert keys(torch.cat(calibration)) == keys(images_of(whole.calibration_dataloader()))
    assert keys(torch.cat(test)) == keys(images_of(whole.test_dataloader()))
    assert len({len(share) for share in train}) == 1
    assert len(set(keys(torch.cat(train)))) == sum(len(share) for share in train)


def test_a_last_small_batch_is_dropped_in_training_alone(alone):
    data = folder_data(alone, batch_size=13, validation_share=0.25)
    data.setup()
    # 36, 12 and 12 images.
    assert [len(images) for images, _ in data.train_dataloader()] == [13, 13]
    assert [len(images) for images, _ in data.test_dataloader()] == [12]
    assert [len(images) for images, _ in data.calibration_dataloader()] == [13, 13, 10]
    small = folder_data(alone, batch_size=100)
    small.setup()
    assert [len(images) for images, _ in small.train_dataloader()] == [43]


class Watcher(lightning.LightningModule):
    """Keeps the images that it is trained on."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(1, 1)
        self.seen = {}

    def training_step(self, batch, index):
        self.seen.setdefault(self.current_epoch, []).append(batch[0])
        return self.layer(batch[0].mean().view(1, 1)).sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


@pytest.mark.filterwarnings("ignore")
def test_lightning_tells_the_epoch_and_leaves_order_and_images_alone(alone, tmp_path, monkeypatch):
    monkeypatch.setenv("PL_GLOBAL_SEED", "11")
    data, model = folder_data(alone), Watcher()
    trainer = lightning.Trainer(
        max_epochs=2, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, limit_val_batches=0, default_root_dir=tmp_path,
    )  # fmt: skip
    trainer.fit(model, datamodule=data)
    beside = folder_data(alone)
    beside.setup()
    for epoch in (0, 1):
        assert torch.equal(torch.cat(model.seen[epoch]), images_of(beside.train_dataloader(), epoch))
    assert not torch.equal(torch.cat(model.seen[0]), torch.cat(model.seen[1]))


# CIFAR-10.


class StandIn:
    """Stands in for torchvision.datasets.CIFAR10, whose files it checks: 60 and 20 random images."""

    downloads = 0

    def __init__(self, root, train=True, download=False):
        folder = Path(root) / "cifar-10-batches-py"
        if not folder.is_dir():
            if not download:
                raise RuntimeError("Dataset not found or corrupted.\nYou can use download=True to download it")
            type(self).downloads += 1
            folder.mkdir(parents=True)
        count = 60 if train else 20
        generator = np.random.default_rng(int(train))
        self.data = generator.integers(0, 256, (count, 32, 32, 3), np.uint8)
        self.targets = generator.permutation(np.arange(count) % 10).tolist()


@pytest.fixture
def stand_in(monkeypatch):
    monkeypatch.setattr(torchvision.datasets, "CIFAR10", StandIn)
    monkeypatch.setattr(StandIn, "downloads", 0)


@pytest.mark.usefixtures("stand_in")
def test_cifar10_of_torchvision_is_split_with_its_classes_and_labels(tmp_path):
    (tmp_path / "cifar-10-batches-py").mkdir()
    data = CIFAR10Data(root=str(tmp_path), validation_share=1 / 3, calibration_images=20, batch_size=7)
    data.prepare_data()
    data.setup()
    assert StandIn.downloads == 0
    assert list(data.class_names) == list(CIFAR10_CLASSES)
    known = {}
    for train in (True, False):
        raw = StandIn(tmp_path, train)
        for index, (pixels, target) in enumerate(zip(raw.data, raw.targets, strict=True)):
            known[pixels.tobytes()] = (train, index, target)

    def origins(dataset):
        found = [known[as_pixels(image).tobytes()] for image, _ in dataset]
        assert [label for _, label in dataset] == [target for _, _, target in found]
        return found

    plain = {name: origins(Images(part.samples, data._plain())) for name, part in data._parts.items()}
    for name, each in (("train", 4), ("validation", 2), ("test", 2)):
        assert Counter(target for _, _, target in plain[name]) == dict.fromkeys(range(10), each)
        assert {train for train, _, _ in plain[name]} == {name != "test"}
    assert not set(plain["train"]) & set(plain["validation"])
    calibration = origins(data._calibration())
    assert set(calibration) <= set(plain["train"])
    assert Counter(target for _, _, target in calibration) == dict.fromkeys(range(10), 2)
    again = CIFAR10Data(root=str(tmp_path), validation_share=1 / 3)
    again.setup()
    assert origins(Images(again._parts["validation"].samples, data._plain())) == plain["validation"]
    assert images_of(data.train_dataloader()).shape == (35, 3, 32, 32)


@pytest.mark.usefixtures("stand_in")
@pytest.mark.parametrize("there", [True, False], ids=["empty folder", "no folder"])
def test_cifar10_is_downloaded_once_where_it_is_not_there(tmp_path, there):
    root = tmp_path / "new"
    if there:
        root.mkdir()
    data = CIFAR10Data(root=str(root))
    assert list(data.class_names) == list(CIFAR10_CLASSES)
    data.prepare_data()
    data.prepare_data()
    data.setup()
    assert StandIn.downloads == 1
    assert [len(data._parts[name]) for name in PARTS] == [54, 6, 20]


@pytest.mark.parametrize("error", [RuntimeError("Dataset not found.\nUse download"), OSError("no network")])
@pytest.mark.parametrize("step", ["prepare_data", "setup", "calibration_dataloader"])
def test_cifar10_that_cannot_be_downloaded_says_what_to_do_in_one_line(tmp_path, monkeypatch, error, step):
    def refuse(*args, **kwargs):
        raise error

    monkeypatch.setattr(torchvision.datasets, "CIFAR10", refuse)
    with pytest.raises(FileNotFoundError, match=r"no CIFAR-10 under .*cifar-10-batches-py.*--data.root demo") as raised:
        getattr(CIFAR10Data(root=str(tmp_path / "new")), step)()
    assert "\n" not in str(raised.value)


def test_cifar10_in_folders_is_read_from_them_and_nothing_is_downloaded(tmp_path, monkeypatch):
    monkeypatch.setattr(torchvision.datasets, "CIFAR10", None)
    root = draw(
        tmp_path / "images", {"train/cat": 4, "train/dog": 4, "val/cat": 1, "val/dog": 1, "test/dog": 2}, 32, 32
    )
    data = CIFAR10Data(root=root, batch_size=2)
    data.prepare_data()
    assert list(data.class_names) == ["cat", "dog"]
    parts = parts_of(data)
    assert [len(parts[name]) for name in PARTS] == [8, 2, 2]
    assert parts["test"] == [("test/dog/000.png", 1), ("test/dog/001.png", 1)]
    assert np.array_equal(as_pixels(data._parts["test"][1][0]), noise("test/dog/001.png", 32, 32))
    assert images_of(data.train_dataloader()).shape == (8, 3, 32, 32)


def test_cifar10_without_a_root_downloads_nothing_and_says_what_to_give(monkeypatch):
    monkeypatch.setattr(torchvision.datasets, "CIFAR10", None)
    data = CIFAR10Data()
    data.prepare_data()
    with pytest.raises(ValueError, match=r"^no images: give --data.root"):
        data.setup()


@pytest.mark.usefixtures("stand_in")
def test_cifar10_may_lie_beside_other_data_of_torchvision(tmp_path):
    for name in ("MNIST/raw", "cifar-10-batches-py"):
        (tmp_path / name).mkdir(parents=True)
    data = CIFAR10Data(root=str(tmp_path))
    assert list(data.class_names) == list(CIFAR10_CLASSES)
    data.setup()
    assert len(data._parts["test"]) == 20


# The data beside the checkout.


@pytest.mark.shared
def test_imagenet_is_read_from_its_folders():
    data = FolderData(root=str(SHARED / "data" / "imagenet"), calibration_images=10, validation_share=0.1)
    parts = parts_of(data)
    assert [len(parts[name]) for name in PARTS] == [900, 100, 1300]
    assert len(class_counts(parts["test"])) == 725
    assert data.classes == len(set(data.class_names)) + 2 == 1000  # Two cranes and two maillots.
    order = json.loads((SHARED / "data" / "imagenet" / "classes.json").read_text())
    assert list(data.class_names) == [name for _, name in order]
    assert all(order[label][0] == path.split("/")[1] for part in parts.values() for path, label in part)
    assert all(path.startswith("train/") for name in ("train", "validation") for path, _ in parts[name])
    calibration = data._calibration()
    assert set(calibration.samples) <= set(data._parts["train"].samples)
    images = images_of(data.calibration_dataloader())
    assert images.shape == (10, 3, 224, 224)
    assert 0.0 <= float(images.min()) < float(images.max()) <= 1.0
    assert torch.equal(data.read(data._parts["test"].samples[7][0]), data._parts["test"][7][0])


@pytest.mark.shared
def test_cifar10_is_read_from_its_folders():
    data = CIFAR10Data(root=str(SHARED / "data" / "cifar10"))
    data.prepare_data()
    parts = parts_of(data)
    assert [len(parts[name]) for name in PARTS] == [20_000, 2_000, 1_000]
    assert list(data.class_names) == list(CIFAR10_CLASSES)
    for name, part in parts.items():
        folder = {"validation": "val"}.get(name, name)
        assert all(path.split("/")[:2] == [folder, CIFAR10_CLASSES[label]] for path, label in part)
    (image, _) = data._parts["test"][0]
    with Image.open(data._parts["test"].samples[0][0]) as file:
        assert np.array_equal(as_pixels(image), np.array(file))
    labels = [label for _, label in data._calibration().samples]
    assert len(labels) == 1000
    of_train = class_counts(parts["train"])
    assert all(abs(count - of_train[label] / 20) <= 1 for label, count in Counter(labels).items())


# MNIST's files.


def idx(values):
    """An idx file's bytes: of images or labels, uint8."""
    sizes = b"".join(size.to_bytes(4, "big") for size in values.shape)
    return bytes([0, 0, 8, values.ndim]) + sizes + values.tobytes()


def mnist(root, images=20, labels=20, side=28, classes=10):
    """MNIST's four files, of few digits."""
    (root / "MNIST" / "raw").mkdir(parents=True)
    for part in ("train", "t10k"):
        pixels = np.full((images, side, side), 51, np.uint8)
        (root / "MNIST" / "raw" / f"{part}-images-idx3-ubyte").write_bytes(idx(pixels))
        digits = np.arange(labels, dtype=np.uint8) % classes
        (root / "MNIST" / "raw" / f"{part}-labels-idx1-ubyte").write_bytes(idx(digits))
    return root


def test_mnist_is_read_from_its_files(tmp_path):
    data = MNISTData(str(mnist(tmp_path)), validation_share=0.5)
    data.ready()
    images, labels = data._parts["test"].tensors
    assert (images.shape, images.unique().tolist()) == ((20, 1, 28, 28), [pytest.approx(0.2)])
    assert labels.tolist() == [*range(10)] * 2


@pytest.mark.parametrize(
    "spoilt",
    [{"labels": 19}, {"side": 27}, {"classes": 11}, {"images": 0, "labels": 0}, "cut", "kind", "noise", "deep"],
)
def test_files_that_are_not_mnists_are_named_in_one_line(tmp_path, spoilt):
    root = mnist(tmp_path, **(spoilt if isinstance(spoilt, dict) else {}))
    path = root / "MNIST" / "raw" / "train-images-idx3-ubyte"
    data = path.read_bytes()
    if isinstance(spoilt, str):
        path.write_bytes(
            {"cut": data[:-5], "kind": b"\0\0\x07" + data[3:], "noise": b"\xff" * 99, "deep": data[:3] + b"\xff"}[
                spoilt
            ]
        )
    with pytest.raises(
        ValueError, match=r"^cannot read MNIST under .*raw \(.*\): put its four idx files there anew$"
    ) as error:
        MNISTData(str(root)).ready()
    assert str(error.value).isprintable()
