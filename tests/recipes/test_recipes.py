"""The image recipes, from fit to a picture, on small images of their own; what goes wrong, and what is cut off."""

import contextlib
import csv
import json
import os
import random
import re
import runpy
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from helpers.paths import ROOT
from helpers.photos import folder_of_photos
from safetensors.torch import load_file, save_file

pytest.importorskip("lightning", reason="needs the extra recipes")

from helpers.paths import SHARED

import quartz_plugin
from quartz_plugin.figures import FIGURES, SUMMARY, SWEEP_COLUMNS
from quartz_plugin.lightning import FolderData, ImageClassifier
from quartz_plugin.lightning.build import build
from quartz_plugin.lightning.checkpoints import load_checkpoint
from quartz_plugin.lightning.console import one_line as in_one_line
from quartz_plugin.lightning.modules import EvaluatedClassifier
from quartz_plugin.lightning.options import OPTIONS_OF
from quartz_plugin.lightning.records import rows_of_sweep, spiking_figures
from quartz_plugin.metrics import decision_latency

CONFIGS = ROOT / "recipes" / "configs"

# Dropout, batch norm, and slow enough to be killed in time.
NETWORK = """
import time
from torch import nn

class Small(nn.Sequential):
    def __init__(self, classes, pause=0.0):
        super().__init__(
            nn.Conv2d(3, 8, 3, 2), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.2), nn.AdaptiveAvgPool2d(4),
            nn.Flatten(), nn.Linear(128, classes),
        )
        self.pause = pause

    def forward(self, x):
        if self.training:
            time.sleep(self.pause)
        return super().forward(x)
"""


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """A folder of 3 classes x 25 images of 20 x 20, which differ in their colour."""
    return folder_of_photos(tmp_path_factory.mktemp("images") / "photos", 25, 20)


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A working directory with a network of the user's own in it."""
    (tmp_path / "mine.py").write_text(NETWORK)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    sys.modules.pop("mine", None)
    return tmp_path


def small(images):
    return (
        f"--data.root={images}", "--data.size=16", "--data.resize=20", "--data.batch_size=8", "--model.arch=mine.Small",
        "--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false", "--trainer.logger=false",
        "--trainer.accelerator=cpu",
    )  # fmt: skip


def recipe(name, *arguments):
    """Run a recipe in this process; what it prints goes to capsys."""
    before = sys.argv
    sys.argv = [f"{name}.py", *map(str, arguments)]
    try:
        runpy.run_path(str(ROOT / "recipes" / f"{name}.py"), run_name="__main__")
    finally:
        sys.argv = before
        os.environ.pop("PL_GLOBAL_SEED", None)


def rows_of(path):
    return list(csv.DictReader(Path(path).read_text().splitlines()))


@pytest.fixture(scope="module")
def trained(images, tmp_path_factory):
    """The folder runs of a network that was fitted and swept once."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "mine.py").write_text(NETWORK)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(sys, "path", list(sys.path))
        sys.modules.pop("mine", None)
        recipe("imagenet", "fit", "--trainer.max_epochs=3", "--model.lr=0.1", *small(images))
        ann = ("--model.weights=runs/imagenet/best.ckpt", *small(images))
        recipe("imagenet", "sweep", "--t_max=[3]", "--hold=[true]", "--rectifier=[spike]", "--bias=[synapse]",
               "--calibration_method=[percentile, least_squares+tune+output]", "--tuning_passes=1", *ann)  # fmt: skip
    return folder / "runs"


def test_training_for_few_steps_from_an_ann_to_a_picture(images, here, capsys, trained):
    common = small(images)
    shutil.copytree(trained, "runs")
    ann = "--model.weights=runs/imagenet/best.ckpt"
    few = ("--trainer.default_root_dir=runs/few", "--model.lr=0.02", ann, *common)
    windows = '--t_max={"default": 3, "input": 16}'
    recipe("imagenet", "fit", "--trainer.max_epochs=1", "--mixup=0.25", windows, *few)
    recipe("imagenet", "fit", "--trainer.max_epochs=2", "--ckpt_path=runs/few/last.ckpt", *few)
    said = capsys.readouterr().out
    assert "wrote runs/few/snn.safetensors" in said
    # The run that was gone on with is as it was.
    last = torch.load("runs/few/last.ckpt", weights_only=True)
    assert last["epoch"] == 1
    told = last["spikes"]
    assert told["t_max"] == {"input": 16, "2": 3, "output": 3}
    assert told["distillation"] == 0.5
    assert told["mixup"] == 0.25
    spikes = quartz_plugin.load("runs/few/snn.safetensors")
    assert [window.length + 1 for window in spikes.windows.values()] == [16, 3, 3]
    assert spikes.graph.settings["class_names"] == ["ant", "bee", "cow"]

    checkpoint = "--ckpt_path=runs/few/best.ckpt"
    # Converted once more from its checkpoint, with another rectifier: the same values.
    recipe(
        "imagenet",
        "convert",
        "--ckpt_path=runs/few/best.ckpt",
        "--rectifier=silent",
        "--output=silent.safetensors",
        *few,
    )
    pixels = torch.rand(4, 3, 16, 16)
    silent = quartz_plugin.load("silent.safetensors")
    assert silent.graph.silent
    assert torch.equal(silent(pixels), spikes(pixels))
    assert "windows and scales as trained\nan inference takes 22 steps" in capsys.readouterr().out
    with pytest.raises(SystemExit, match=r"windows of its own.*leave t_max out"):
        recipe("imagenet", "convert", checkpoint, "--t_max=9", *few)
    for option, message in (
        ("--t_max=16", "leave t_max out"),
        ("--percentile=50", "leave percentile out"),
        ("--first_layer=dense", 'give first_layer="spiking"'),
        ('--layers={"network.2": {"t_max": 9}}', "leave t_max out"),
    ):
        with pytest.raises(SystemExit, match=message):
            recipe("imagenet", "convert", checkpoint, option, *few)
    with pytest.raises(SystemExit, match="trained for spikes, no ANN's: give it as --ckpt_path"):
        recipe("imagenet", "fit", "--t_max=4", "--model.weights=runs/few/best.ckpt", *common)

    recipe("imagenet", "test", checkpoint, "--snn=runs/few/snn.safetensors", *few)
    in_training, _, spiking = json.loads(Path("runs/few/test.json").read_text())
    assert spiking["network"] == "SNN, T = 3 (input 16)"
    assert spiking["accuracy"] == in_training["accuracy"]
    assert spiking["agreement"] == 1.0
    assert 0 <= spiking["accuracy_membrane"] <= 1

    methods = [row["calibration_method"] for row in rows_of("runs/imagenet/sweep.csv")]
    assert methods == ["percentile", "least_squares+tune+output"]
    few_steps = '["runs/few/test.json"]'
    recipe("imagenet", "figures", f"--trained={few_steps}", f"--calibrated={few_steps}", *common)
    assert Path("runs/imagenet/error_steps.png").read_bytes().startswith(b"\x89PNG")


def test_a_checkpoint_of_a_version_without_mixup_is_read(images, here, trained):
    common = small(images)
    shutil.copytree(trained, "runs")
    few = ("--trainer.default_root_dir=runs/few", "--model.weights=runs/imagenet/best.ckpt", *common)
    recipe("imagenet", "fit", "--trainer.max_epochs=1", "--t_max=3", *few)
    checkpoint = torch.load("runs/few/last.ckpt", weights_only=True)
    del checkpoint["spikes"]["mixup"]
    torch.save(checkpoint, "older.ckpt")
    recipe("imagenet", "fit", "--trainer.max_epochs=2", "--ckpt_path=older.ckpt", *few)
    assert torch.load("runs/few/last.ckpt", weights_only=True)["spikes"]["mixup"] == 0.0


def test_the_best_ann_has_the_least_loss_and_the_best_network_of_spikes_is_the_most_accurate(
    images, here, trained, monkeypatch
):
    common = small(images)
    shutil.copytree(trained, "runs")

    def less_loss_and_less_accuracy(self, batch, batch_idx):
        falling = 1 / (1 + self.current_epoch)
        self.log_dict({"val_loss": falling, "val_accuracy": falling})

    monkeypatch.setattr(EvaluatedClassifier, "validation_step", less_loss_and_less_accuracy)
    ann = "--model.weights=runs/imagenet/best.ckpt"
    for options, best in ((("--t_max=3",), 0), ((), 2)):
        recipe("imagenet", "fit", "--trainer.max_epochs=3", "--trainer.default_root_dir=here", ann, *options, *common)
        assert torch.load("here/best.ckpt", weights_only=True)["epoch"] == best
        assert torch.load("here/last.ckpt", weights_only=True)["epoch"] == 2


def test_steps_are_spent_and_a_first_layer_counted_from_the_command_line(images, here, capsys, trained):
    common = small(images)
    shutil.copytree(trained, "runs")
    ann = "--model.weights=runs/imagenet/best.ckpt"
    recipe("imagenet", "convert", "--total_steps=20", "--calibration_method=least_squares", ann, *common)
    assert '--t_max \'{"input":' in capsys.readouterr().out
    assert quartz_plugin.load("runs/imagenet/snn.safetensors").n_steps <= 20
    recipe("imagenet", "convert", "--first_layer=dense", ann, *common)
    recipe("imagenet", "test", "--snn=runs/imagenet/snn.safetensors", "--all_figures=true", ann, *common)
    assert "multiplications of the first layer, on the image" in capsys.readouterr().out
    *_, spiking = json.loads(Path("runs/imagenet/test.json").read_text())
    assert spiking["first_layer_macs"] == 8 * 7 * 7 * 27


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("convert", "--calibration_method=fastest"), "calibration_method must be one of"),
        (("convert", '--t_max={"input": 4}'), "t_max names no window for the layer"),
        (("convert", "--total_steps=40", "--t_max=4"), "leave out --t_max, or --total_steps"),
        (("fit", "--t_max=4", "--distillation=2"), "distillation is a share from 0 to 1"),
        (("fit", "--t_max=4", "--mixup=2"), "mixup is a share from 0 to 1"),
        (("fit", "--t_max=4", "--mixup=0.2", "--distillation=0"), "--mixup mixes images where an ANN teaches"),
        (("fit", "--mixup=0.2"), "--mixup mixes images where an ANN teaches"),
        (("fit", "--mixup=0.2", "--ckpt_path=runs/imagenet/last.ckpt"), "leave --mixup out beside --ckpt_path"),
        (("fit", "--t_max=1"), "t_max must be a whole number of at least 2"),
        (("fit", "--t_max=4", "--ckpt_path=runs/imagenet/last.ckpt"), "is of an ANN: to train from it with t_max"),
        (("figures", "--trained=[nobody.json]"), "no file nobody.json: test writes test.json"),
        (("figures", "--calibrated=[others.json]"), "the sweep is of 15 images, and --calibrated of {3.0}"),
    ],
)
def test_what_goes_wrong_for_few_steps_ends_in_one_line(images, here, capsys, trained, arguments, message):
    common = small(images)
    shutil.copytree(trained, "runs")
    Path("others.json").write_text('[{"t_max": 4, "images": 3.0}]')
    with pytest.raises(SystemExit) as stop:
        recipe("imagenet", *arguments, "--model.weights=runs/imagenet/best.ckpt", *common)
    (line,) = str(stop.value.code).splitlines()
    assert message in line


def test_from_fit_to_a_picture(images, here, capsys):
    common = small(images)
    recipe("imagenet", "fit", "--trainer.max_epochs=4", "--model.lr=0.1", *common)
    trained = torch.load("runs/imagenet/best.ckpt", weights_only=True)
    assert trained["fitted_on"] == "the images of photos"
    checkpoint = "--ckpt_path=runs/imagenet/best.ckpt"

    capsys.readouterr()
    recipe("imagenet", "convert", checkpoint, "--t_max=32", '--layers={"input": {"t_max": 64}}', *common)
    said = capsys.readouterr().out
    assert "top-1 agreement with the ANN" in said
    assert "wrote runs/imagenet/snn.safetensors" in said
    snn = quartz_plugin.load("runs/imagenet/snn.safetensors")
    assert snn.graph.settings["class_names"] == ["ant", "bee", "cow"]
    assert snn.windows["input"].length == 63
    assert snn.graph.settings["preprocessing"][1] == pytest.approx([0.229, 0.224, 0.225])

    recipe("imagenet", "test", checkpoint, "--snn=runs/imagenet/snn.safetensors", "--model.cost_images=7", *common)
    said = capsys.readouterr().out
    assert "15 test images, mean; costs: of 7 of them" in said
    ann, _, spiking = json.loads(Path("runs/imagenet/test.json").read_text())
    assert [ann["network"], spiking["network"]] == ["ANN", "SNN, T = 32 (input 64)"]
    assert (ann["images"], ann["cost_images"], spiking["images"], spiking["cost_images"]) == (15, 7, 15, 7)
    assert ann["accuracy"] > 0.6
    assert spiking["agreement"] > 0.6
    gained = round(15 * (spiking["accuracy"] - ann["accuracy"]))
    assert spiking["gained"] - spiking["lost"] == gained
    rows = rows_of("runs/imagenet/test.csv")
    assert [float(row["accuracy"]) for row in rows] == [ann["accuracy"], ann["accuracy"], spiking["accuracy"]]

    # What the file says of the test images is what calling the network says.
    data = FolderData(str(images), size=16, resize=20)
    data.setup()
    batch = torch.stack([image for image, _ in data._parts["test"]])
    labels = torch.tensor([label for _, label in data._parts["test"]])
    assert spiking["accuracy"] == pytest.approx(float((snn(batch).argmax(1) == labels).float().mean()))
    network, _ = build("mine.Small", 3)
    network.load_state_dict(
        {name.removeprefix("network."): v for name, v in trained["state_dict"].items() if name.startswith("network.")}
    )
    mean, std = (torch.tensor(v).view(-1, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    assert ann["accuracy"] == pytest.approx(
        float((network.eval()((batch - mean) / std).argmax(1) == labels).float().mean())
    )

    # Neither the data nor the network is needed to classify a file.
    file = images / "bee" / "03.png"
    recipe("imagenet", "predict", "--snn=runs/imagenet/snn.safetensors", f"--images=[{file}]", "--data.size=16",
           "--data.resize=20")  # fmt: skip
    said = capsys.readouterr().out
    result = snn.run(data.read(str(file)).unsqueeze(0))
    assert f"decided at step {int(decision_latency(result))} of {snn.n_steps}" in said
    assert ("ant", "bee", "cow")[int(result.logits.argmax())] in said.splitlines()[3]
    assert Path("runs/imagenet/03_raster.png").read_bytes().startswith(b"\x89PNG")

    recipe("imagenet", "sweep", checkpoint, "--t_max=[2,8]", "--hold=[true]", "--rectifier=[spike]", *common)
    small_t, large_t = rows_of("runs/imagenet/sweep.csv")
    assert float(large_t["agreement"]) >= float(small_t["agreement"])
    for picture in Path("runs/imagenet").glob("error_*.png"):
        picture.unlink()
    recipe("imagenet", "figures")
    assert len(list(Path("runs/imagenet").glob("error_*.png"))) == 6
    assert "ANN" in capsys.readouterr().out


def test_a_converted_file_holds_how_its_images_are_prepared(images, here, capsys, trained):
    ann = f"--model.weights={trained / 'imagenet' / 'best.ckpt'}"
    recipe("imagenet", "convert", "--t_max=8", "--output=snn.safetensors", ann, *small(images))
    snn = quartz_plugin.load("snn.safetensors")
    assert snn.graph.settings["image_preparation"] == {"color": "rgb", "size": 16, "resize": 20}
    file = images / "cow" / "04.png"
    pixels = FolderData(str(images), size=16, resize=20).read(str(file)).unsqueeze(0)
    capsys.readouterr()
    # Nothing but the file and an image; options of another size change nothing, as another recipe does not.
    for name, *more in (("imagenet",), ("imagenet", "--data.size=19"), ("mnist",), ("cifar10",)):
        recipe(name, "predict", "--snn=snn.safetensors", f"--images={file}", *more)
        said = capsys.readouterr().out
        assert f"decided at step {int(decision_latency(snn.run(pixels)))} of {snn.n_steps}" in said
        assert ("ant", "bee", "cow")[int(snn(pixels).argmax())] in said.splitlines()[3]
    # Older files hold nothing of it: the option is needed.
    del snn.graph.settings["image_preparation"]
    snn.save("older.safetensors")
    assert "--data.size 16" in stopped_by("imagenet", "predict", "--snn=older.safetensors", f"--images={file}")
    recipe("imagenet", "predict", "--snn=older.safetensors", f"--images={file}", "--data.size=16", "--data.resize=20")
    assert said.splitlines()[3] in capsys.readouterr().out


@pytest.mark.parametrize(
    ("held", "says"),
    [
        (5, "its preparation of images is 5"),
        ({"size": 16}, "its preparation of images is {'size': 16}"),
        (
            {"color": "rgb", "size": 16, "resize": 8},
            "size must be at least 1 and at most resize, got size 16, resize 8",
        ),
        ({"color": "rgb", "size": True, "resize": 8}, "got size True, resize 8"),
        (
            {"color": "rgb", "size": 16, "resize": 10**9},
            "resize 1000000000 makes images of more than 67,108,864 pixels",
        ),
        ({"color": "\x1bred", "size": 16, "resize": 16}, r'color must be "rgb" or "grey", got'),
    ],
)
def test_an_odd_preparation_of_images_in_a_network_file_is_named(images, here, held, says):
    snn = quartz_plugin.convert(build("mine.Small", 3)[0], torch.rand(8, 3, 16, 16))
    snn.graph.settings["image_preparation"] = held
    snn.save("odd.safetensors")
    line = stopped_by("imagenet", "predict", "--snn=odd.safetensors", f"--images={images / 'ant' / '00.png'}")
    assert "odd.safetensors is damaged: " in line
    assert says in line


def test_tables_begin_with_what_most_people_want_and_files_hold_the_rest(images, here, capsys, trained):
    ann = f"--model.weights={trained / 'imagenet' / 'best.ckpt'}"
    recipe("imagenet", "convert", "--t_max=8", ann, *small(images))
    said = capsys.readouterr().out
    assert "layer   " not in said
    assert "(--all_figures true prints every layer; convert.csv holds them)" in said
    layers = {row["module"]: row for row in rows_of("runs/imagenet/convert.csv")}
    assert float(layers["2"]["mean"]) > 0
    assert float(layers["output"]["neurons"]) == 3
    recipe("imagenet", "convert", "--t_max=8", "--all_figures=true", ann, *small(images))
    said = capsys.readouterr().out
    assert "saturated" in said
    assert "folded into 0" in said

    test = ("imagenet", "test", "--snn=runs/imagenet/snn.safetensors", ann, *small(images))
    recipe(*test)
    *_, short = capsys.readouterr().out.partition("test images, mean")
    recipe(*test, "--all_figures=true")
    *_, whole = capsys.readouterr().out.partition("test images, mean")
    rows = [line.partition("  ")[0] for line in short.splitlines()[2:] if not line.startswith(("wrote", "("))]
    assert rows == [FIGURES[name].label for name in SUMMARY]
    assert [line.partition("  ")[0] for line in whole.splitlines()[2:7]] == rows
    assert "SNN correct, ANN wrong" in whole
    *_, spiking = json.loads(Path("runs/imagenet/test.json").read_text())
    assert set(spiking) > {"gained", "lost", "zero_spikes", "hold_events"}


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("imagenet", "fit"), "--data.root demo"),
        (("imagenet", "fit", "--data.root=nowhere"), "no folder nowhere: give --data.root a folder with train/CLASS"),
        (("cifar10", "convert", "--data.root=IMAGES", "--t_maxx=3"), "unrecognized arguments: --t_maxx=3"),
        (("cifar10", "convrt"), "invalid choice: 'convrt'"),
        (("imagenet", "fit", "--data.batch_size=few"), "Expected a <class 'int'>. Got value: few"),
        (("imagenet", "fit", "--data.root=IMAGES", "--model.arch=vit_b_16", "--data.size=224"), "(LayerNorm)"),
        (("imagenet", "fit", "--data.root=IMAGES", "--model.arch=resnet19"), "did you mean resnet18"),
        (("imagenet", "convert", "--data.root=IMAGES"), "the network is untrained"),
        (("imagenet", "convert", "--data.root=IMAGES", "--model.arch=mine.Small", "--model.weights=of_5.safetensors"),
         "another number of classes than the data (3), so 6.bias, 6.weight are untrained: fit first"),
        (("imagenet", "test", "--data.root=IMAGES", "--model.arch=mine.Small", "--snn=of_5_snn.safetensors",
          "--data.size=16", "--data.resize=20"), "the network has 5 outputs, the data 3 classes"),
        (("imagenet", "test", "--data.root=IMAGES", "--snn=of_5_snn.safetensors", "--data.size=20"), "--data.size 16"),
        (("imagenet", "test", "--data.root=IMAGES", "--ckpt_path=none.ckpt"), "no checkpoint none.ckpt"),
        (("imagenet", "fit", "--data.root=IMAGES", "--ckpt_path=none.ckpt"), "no checkpoint none.ckpt"),
        (("imagenet", "fit", "--data.root=IMAGES", "--model.arch=mine.Small", "--ckpt_path=mine.py", "--data.size=16"),
         "not a readable checkpoint"),
        (("imagenet", "fit", "--data.root=IMAGES", "--model.arch=mine.Small", "--model.arch_arguments={'classes': 2}",
          "--data.size=16"), "the network has 2 outputs, the data 3 classes"),
        (("imagenet", "fit", "--data.root=."), "holds folders, not images of a class"),
        (("imagenet", "test", "--data.root=other", "--model.arch=mine.Small", "--snn=of_abd.safetensors",
          "--data.size=16"), "made for other classes than the data has (first difference: cow, dog)"),
        (("imagenet", "test", "--data.root=IMAGES", "--output=a.txt"), "must end in .json or .csv"),
        (("imagenet", "predict", "--snn=of_5_snn.safetensors", "--images=[none.png]"), "no image none.png"),
        (("imagenet", "predict", "--snn=of_5_snn.safetensors", "--images=[mine.py]"), "cannot read the image mine.py"),
        (("imagenet", "figures"), "no sweep"),
        (("imagenet", "fit", "--trainer.strategy=ddq"), "invalid strategy name"),
    ],
)  # fmt: skip
def test_what_a_user_can_mend_ends_in_one_line(images, here, arguments, says):
    network, _ = build("mine.Small", 5)
    save_file(network.state_dict(), "of_5.safetensors")
    torch.manual_seed(0)
    quartz_plugin.convert(network, torch.rand(8, 3, 16, 16)).save("of_5_snn.safetensors")
    snn = quartz_plugin.convert(build("mine.Small", 3)[0], torch.rand(8, 3, 16, 16))
    snn.graph.settings["class_names"] = ["ant", "bee", "cow"]
    snn.save("of_abd.safetensors")
    for name, source in (("ant", "ant"), ("bee", "bee"), ("dog", "cow")):
        shutil.copytree(images / source, f"other/{name}")
    with pytest.raises(SystemExit) as stopped:
        recipe(*(str(argument).replace("IMAGES", str(images)) for argument in arguments))
    (line,) = str(stopped.value).splitlines()
    assert line.startswith("error: ")
    assert says in line
    assert not list(here.glob("runs/**/*.ckpt"))
    assert not list(here.glob("runs/**/*.safetensors"))


@pytest.mark.parametrize("workers", [0, 1])
def test_an_unreadable_image_ends_in_one_line_and_leaves_the_old_file(images, here, workers):
    shutil.copytree(images, "spoilt")
    recipe("imagenet", "fit", "--trainer.max_epochs=1", *small("spoilt"))
    checkpoint = "--ckpt_path=runs/imagenet/last.ckpt"
    recipe("imagenet", "convert", checkpoint, "--verify_images=0", *small("spoilt"))
    before = Path("runs/imagenet/snn.safetensors").read_bytes()
    data = FolderData("spoilt", size=16, resize=20)
    data.setup()
    broken = Path(data._calibration().samples[5][0])
    broken.write_bytes(broken.read_bytes()[:60])
    with pytest.raises(SystemExit) as stopped:
        recipe("imagenet", "convert", checkpoint, "--t_max=8", f"--data.num_workers={workers}", *small("spoilt"))
    (line,) = str(stopped.value).splitlines()
    assert str(broken) in line
    assert "remove it or replace it" in line
    assert Path("runs/imagenet/snn.safetensors").read_bytes() == before


def test_a_failed_write_leaves_the_old_file_and_one_line(images, here, monkeypatch):
    recipe("imagenet", "fit", "--trainer.max_epochs=1", *small(images))
    convert = ("imagenet", "convert", "--ckpt_path=runs/imagenet/last.ckpt", "--verify_images=0", *small(images))
    recipe(*convert)
    before = Path("runs/imagenet/snn.safetensors").read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        with pytest.raises(SystemExit) as stopped:
            recipe(*convert, "--t_max=4")
    assert len(str(stopped.value).splitlines()) == 1
    assert "No space left" in str(stopped.value)
    assert Path("runs/imagenet/snn.safetensors").read_bytes() == before
    assert [path.name for path in Path("runs/imagenet").glob("*snn*")] == ["snn.safetensors"]


def test_weights_of_other_classes_serve_to_fit_from(images, here):
    network, _ = build("mine.Small", 5)
    save_file(network.state_dict(), "of_5.safetensors")
    model = ImageClassifier("mine.Small", "of_5.safetensors", classes=3)
    assert model.fitted_on is None
    assert torch.equal(model.network[0].weight, network[0].weight)
    recipe("imagenet", "fit", "--trainer.max_epochs=1", "--model.weights=of_5.safetensors", *small(images))
    recipe("imagenet", "convert", "--ckpt_path=runs/imagenet/last.ckpt", "--verify_images=0", *small(images))
    assert quartz_plugin.load("runs/imagenet/snn.safetensors").graph.settings["fitted_on"] == "the images of photos"


def test_a_part_of_the_test_images_is_of_all_classes(images):
    data = FolderData(str(images), size=16, resize=20)
    data.setup()
    labels = [label for _, label in data._parts["test"]]
    assert set(labels[:8]) == {0, 1, 2}
    assert sorted(labels) == [0] * 5 + [1] * 5 + [2] * 5
    again = FolderData(str(images), size=16, resize=20)
    again.setup()
    assert again._parts["test"].samples == data._parts["test"].samples


def test_fewer_images_than_processes_are_refused_in_all_of_them(images):
    class FakeTrainer:
        global_rank, world_size = 0, 16

    data = FolderData(str(images), size=16, resize=20)
    data.setup()
    data.trainer = FakeTrainer()
    with pytest.raises(ValueError, match="16 processes cannot share out 15 images"):
        data.test_dataloader()


def test_figures_draws_the_latest_sweep_alone(images, here, capsys):
    for seed in (1, 2):
        torch.manual_seed(seed)
        save_file(build("mine.Small", 3)[0].state_dict(), "w.safetensors")
        recipe("imagenet", "sweep", "--model.weights=w.safetensors", "--t_max=[4]", "--hold=[true]",
               "--rectifier=[spike]", *small(images))  # fmt: skip
    assert len(rows_of("runs/imagenet/sweep.csv")) == 2
    capsys.readouterr()
    recipe("imagenet", "figures")
    assert "1 rows of other networks, images or layers are left out" in capsys.readouterr().out


def test_the_learning_rate_rises_and_falls_whatever_the_number_of_epochs(images, here):
    import lightning

    class Rates(lightning.Callback):
        def __init__(self):
            self.seen = []

        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            self.seen.append(module.optimizers().param_groups[0]["lr"])

    for length in ({"max_epochs": 1}, {"max_epochs": -1, "max_steps": 20}, {"max_epochs": 5}):
        rates = Rates()
        trainer = lightning.Trainer(
            **length, logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
            callbacks=[rates], accelerator="cpu",
        )  # fmt: skip
        trainer.fit(ImageClassifier("mine.Small", classes=3, lr=0.1), FolderData(str(images), 16, 20, batch_size=8))
        top = rates.seen.index(max(rates.seen))
        assert 0 < top < len(rates.seen) / 2
        assert max(rates.seen) > 0.08
        assert rates.seen[-1] < 0.05 * max(rates.seen) + 0.02
        assert rates.seen[: top + 1] == sorted(rates.seen[: top + 1])
        assert rates.seen[top:] == sorted(rates.seen[top:], reverse=True)


# Files that others wrote, or that were spoilt.


def stopped_by(*arguments):
    """The one line that a recipe ends in."""
    with pytest.raises(SystemExit) as stopped:
        recipe(*arguments)
    (line,) = str(stopped.value.code).splitlines()
    assert line.startswith("error: ")
    assert line.isprintable()
    return line


def spoil(state, *path, value=None):
    """Put a value into nested dictionaries and lists, or take out what is there."""
    *before, last = path
    for key in before:
        state = state[key]
    if value is None:
        del state[last]
    else:
        state[last] = value


FEW = {"distillation": 0.5, "relative_lr": 0.1, "input_shape": [3, 16, 16], "scales": {}, "t_max": {}}

SPOILT = [
    (("state_dict",), None, "is not a readable checkpoint of Lightning's (it holds no state_dict)"),
    (("state_dict",), {5: torch.ones(1)}, "is not a readable checkpoint of Lightning's (it holds no state_dict)"),
    (("state_dict", "network.0.bias"), None, "1 missing (network.0.bias)"),
    (("state_dict", "network.0.bias"), "text", "1 missing (network.0.bias)"),
    (("state_dict", "network.9.bias"), torch.ones(2), "1 unexpected (network.9.bias)"),
    (("state_dict", "network.0.bias"), torch.ones(9), "1 of another shape (network.0.bias [9] for [8])"),
    (("state_dict", "network.0.bias"), torch.ones(8).char(), "(network.0.bias torch.int8 for torch.float32)"),
    (("class_names",), 5, "is damaged: its class names are no list of texts, but 5"),
    (("class_names",), {"ant": 0}, "is damaged: its class names are no list of texts"),
    (("class_names",), ["ant", "bee", 7], "is damaged: its class names are no list of texts"),
    (("spikes",), 5, "is a checkpoint of another network"),
    (("spikes",), {}, "is a checkpoint of another network"),
    (("spikes",), FEW | {"input_shape": [3, 10**5, 10**5]}, "it has values of [3, 100000, 100000]"),
    (("spikes",), FEW | {"scales": {"2": [10**9]}}, "it has values of [1000000000]"),
    (("spikes",), FEW | {"scales": {"2": 5}}, "is a checkpoint of another network"),
    (("spikes",), FEW | {"relative_lr": "text"}, "its relative_lr is 'text'"),
    (("spikes",), FEW | {"mixup": 2}, "its mixup is 2"),
]  # fmt: skip

NO_RUN = [
    (("optimizer_states",), None, "holds no run that could go on (optimizer_states): give it as --model.weights"),
    (("lr_schedulers",), 5, "holds no run that could go on (lr_schedulers)"),
    (("loops",), None, "holds no run that could go on (loops)"),
    (("epoch",), "text", "holds no run that could go on (epoch)"),
    (("global_step",), -1, "holds no run that could go on (its counters)"),
    (("loops", "fit_loop", "epoch_progress", "current", "ready"), 10**30, "(its counters)"),
    (("loops", "fit_loop", "epoch_progress", "current"), None, "(KeyError: 'current')"),
    (("loops", "fit_loop"), {}, "holds no run that could go on (its counters)"),
    (("loops", "fit_loop"), None, "holds no run that could go on (its counters)"),
    (("loops", "fit_loop", "epoch_progress"), None, "holds no run that could go on (its counters)"),
    (("pytorch-lightning_version",), "text", "is damaged, or of another run or version"),
    (("pytorch-lightning_version",), None, "is damaged, or of another run or version"),
    (("optimizer_states", 0, "state", 0), "text", "is damaged, or of another run or version"),
    (("optimizer_states", 0, "param_groups", 0, "dampening"), 10**30, "(OverflowError"),
    (("optimizer_states", 0, "param_groups", 0, "lr"), float("nan"), "(its learning rates)"),
    (("lr_schedulers", 0), "text", "is damaged, or of another run or version"),
    (("callbacks",), [], "holds no run that could go on (callbacks)"),
    (("callbacks", "ModelCheckpoint", "best_model_path"), 5, "(its best checkpoint)"),
    (("callbacks", "ModelCheckpoint", "best_model_score"), "text", "(its best checkpoint)"),
]  # fmt: skip


def one_line(read, *arguments):
    """The line by which a file is refused; as the command line prints it."""
    with pytest.raises(ValueError) as raised:  # noqa: PT011
        read(*arguments)
    return in_one_line(raised.value)


@pytest.mark.parametrize(("path", "value", "says"), SPOILT)
def test_spoilt_checkpoints_are_refused_in_one_line(here, trained, path, value, says):
    checkpoint = torch.load(trained / "imagenet" / "last.ckpt", weights_only=True)
    spoil(checkpoint, *path, value=value)
    torch.save(checkpoint, "spoilt.ckpt")
    line = one_line(load_checkpoint, ImageClassifier("mine.Small", classes=3), "spoilt.ckpt")
    assert says in line
    assert line.startswith("spoilt.ckpt is ")
    assert line.isprintable()


# Each runs a command up to its first batch: a few here, all in CI.
FIRST_FEW = 5


@pytest.mark.parametrize(
    ("path", "value", "says"),
    [
        pytest.param(*case, marks=[pytest.mark.slow] * (number >= FIRST_FEW))
        for number, case in enumerate([SPOILT[0], SPOILT[7], *NO_RUN])
    ],
)
def test_fit_goes_on_from_no_spoilt_checkpoint(images, here, trained, path, value, says):
    checkpoint = torch.load(trained / "imagenet" / "last.ckpt", weights_only=True)
    if len(path) > 1 and path[1] == "ModelCheckpoint":
        path = (path[0], next(name for name in checkpoint["callbacks"] if "val_loss" in name), *path[2:])
    spoil(checkpoint, *path, value=value)
    torch.save(checkpoint, "spoilt.ckpt")
    line = stopped_by("imagenet", "fit", "--ckpt_path=spoilt.ckpt", "--trainer.max_epochs=4", *small(images))
    assert says in line
    assert "spoilt.ckpt" in line
    assert not list(here.glob("runs/**/*.ckpt"))


def test_checkpoints_of_others_are_weights_not_runs(images, here, trained, capsys):
    """As another program's Lightning module, or a plain loop, writes them."""
    checkpoint = torch.load(trained / "imagenet" / "best.ckpt", weights_only=True)
    state = {name.removeprefix("network."): value for name, value in checkpoint["state_dict"].items()}
    theirs = {f"model.{name}": value for name, value in state.items()}
    torch.save(
        {"state_dict": {**theirs, "loss.weight": torch.ones(3)}, "pytorch-lightning_version": "2.0.0"}, "pl.ckpt"
    )
    torch.save({"net": {f"module.{name}": value for name, value in state.items()}, "acc": 70.0, "epoch": 9}, "loop.pth")
    torch.save(state, "plain.pt")
    for name, says in (
        ("pl.ckpt", "or, if another program wrote it, give it as --model.weights ("),
        ("loop.pth", "it holds no state_dict): give weights that fit did not write as --model.weights"),
        ("plain.pt", "it holds no state_dict): give weights that fit did not write as --model.weights"),
    ):
        for command in ("fit", "convert"):
            assert says in stopped_by("imagenet", command, f"--ckpt_path={name}", *small(images))
        options = (f"--model.weights={name}", "--verify_images=0", f"--output={name}.safetensors", *small(images))
        recipe("imagenet", "convert", *options)
    files = [load_file(f"{name}.safetensors") for name in ("pl.ckpt", "loop.pth", "plain.pt")]
    for name, value in files[0].items():
        assert torch.equal(files[1][name], value)
        assert torch.equal(files[2][name], value)


def test_damaged_checkpoints_end_in_one_line_whatever_is_wrong(trained, here):
    whole = (trained / "imagenet" / "last.ckpt").read_bytes()
    draw = random.Random(0)
    model = ImageClassifier("mine.Small", classes=3)
    for number in range(60):
        data = bytearray(whole)
        if number % 3 == 0:
            del data[draw.randrange(len(data)) :]
        elif number % 3 == 1:
            data = bytearray(draw.randbytes(draw.randrange(300)))
        else:
            for _ in range(draw.randrange(1, 40)):
                data[draw.randrange(len(data))] = draw.randrange(256)
        Path("spoilt.ckpt").write_bytes(data)
        with contextlib.suppress(ValueError):
            load_checkpoint(model, "spoilt.ckpt")  # Nothing else is raised.


def test_class_names_of_odd_types_in_a_network_file_are_named(images, here, trained):
    snn = quartz_plugin.convert(build("mine.Small", 3)[0], torch.rand(8, 3, 16, 16))
    for names in (5, ["ant", "bee", 7], {"ant": 1}):
        snn.graph.settings["class_names"] = names
        snn.save("odd.safetensors")
        for command in (("test",), ("predict", f"--images=[{images / 'ant' / '00.png'}]")):
            line = stopped_by("imagenet", *command, "--snn=odd.safetensors", *small(images))
            assert "odd.safetensors is damaged: its class names are no list of texts" in line


def test_names_of_classes_and_files_are_printed_without_control_characters(images, here, trained, capsys):
    shutil.copytree(images, "photos")
    Path("photos/ant").rename("photos/a\x1b[31mnt")
    snn = quartz_plugin.convert(build("mine.Small", 3)[0], torch.rand(8, 3, 16, 16))
    snn.graph.settings["class_names"] = ["a\x1b[31mnt", "b\nee", "c\u202eow"]
    snn.save("snn.safetensors")
    picture = Path("photos/a\x1b[31mnt/\x1b]0;title.png")
    shutil.copy(images / "ant" / "00.png", picture)
    recipe("imagenet", "predict", "--snn=snn.safetensors", f"--images=[{json.dumps(str(picture))}]", *small(images))
    said = capsys.readouterr().out
    assert all(sign.isprintable() or sign == "\n" for sign in said), said
    assert r"a\x1b[31mnt" in said
    assert "b ee" in said
    assert r"c\u202eow" in said
    line = stopped_by("imagenet", "test", "--snn=snn.safetensors", *small("photos"))
    assert "first difference: b ee, bee" in line


HEADER = ("network", "ann_accuracy", "images", "t_max", "calibration_method", *SWEEP_COLUMNS)


def sweep_file(cells=(), header=HEADER, rows=2, end="\n"):
    """A sweep's file of ones, but for some cells (row, column, text)."""
    table = [dict.fromkeys(header, "1") | {"t_max": "4", "calibration_method": "percentile"} for _ in range(rows)]
    for row, column, text in cells:
        table[row][column] = text
    lines = [",".join(header), *(",".join(row[name] for name in header) for row in table)]
    return "\n".join(lines) + end


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (sweep_file([(1, "accuracy", "good")]), "line 3: 'good' in column accuracy; mend or remove the line"),
        (sweep_file([(1, "accuracy", "1.5")]), "line 3: '1.5' in column accuracy"),
        (sweep_file([(0, "spikes", "inf")]), "line 2: 'inf' in column spikes"),
        (sweep_file([(0, "spikes", "9" * 5000)]), f"line 2: '{'9' * 40}' in column spikes"),
        (sweep_file([(0, "spikes", "1e999")]), "line 2: '1e999' in column spikes"),
        (sweep_file([(0, "spikes", "True")]), "line 2: 'True' in column spikes"),
        (sweep_file([(0, "spikes", "1_000")]), "line 2: '1_000' in column spikes"),
        (sweep_file([(0, "t_max", "four")]), "line 2: 'four' in column t_max"),
        (sweep_file([(0, "t_max", "1")]), "line 2: '1' in column t_max"),
        (sweep_file([(0, "ann_accuracy", "\x1b[31m")]), r"line 2: '\x1b[31m' in column ann_accuracy"),
        (sweep_file([(0, "calibration_method", "magic")]), "line 2: 'magic' in column calibration_method"),
        (sweep_file() + "1,2\n", "line 4: not as many cells as columns; mend or remove it"),
        (sweep_file() + ",".join("1" * 99) + "\n", "line 4: not as many cells as columns"),
        ("a,b\n1,2\n", "is no file of a sweep (its columns are missing)"),
        ("", "is no file of a sweep (its columns are missing)"),
        ("\0\0\n", "is no file of a sweep"),
        ("\ud800".encode("utf-8", "surrogatepass"), "is no file of a sweep; give another --output"),
        ("x" * 200_000, "is no file of a sweep; give another --output"),
    ],
    ids=lambda value: None if isinstance(value, bytes) or len(value) > 60 else value,
)
def test_odd_files_of_sweeps_are_named_in_one_line(tmp_path, text, says):
    path = tmp_path / "sweep.csv"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    line = one_line(rows_of_sweep, path)
    assert says in line
    assert line.startswith(str(path))
    assert line.isprintable()


@pytest.mark.parametrize("command", ["figures", "sweep"])
def test_an_odd_cell_of_a_sweeps_file_ends_in_one_line_and_leaves_it(images, here, trained, command):
    path = here / "runs" / "imagenet" / "sweep.csv"
    path.parent.mkdir(parents=True)
    path.write_text(sweep_file([(1, "accuracy", "good")]))
    before = path.read_bytes()
    line = stopped_by("imagenet", command, f"--model.weights={trained / 'imagenet' / 'best.ckpt'}", *small(images))
    assert "sweep.csv, line 3: 'good' in column accuracy; mend or remove the line" in line
    assert path.read_bytes() == before


def test_a_sweeps_file_with_only_a_header_has_no_row(images, here, trained):
    path = here / "runs" / "imagenet" / "sweep.csv"
    path.parent.mkdir(parents=True)
    for end in ("", "\n", "\r\n"):
        path.write_bytes(sweep_file(rows=0, end=end).encode())
        assert rows_of_sweep(path) == []
    assert "sweep.csv has no whole row" in stopped_by("imagenet", "figures")
    options = ("--t_max=[3]", "--hold=[true]", "--rectifier=[spike]", "--bias=[synapse]")
    recipe("imagenet", "sweep", f"--model.weights={trained / 'imagenet' / 'best.ckpt'}", *options, *small(images))
    assert [row["t_max"] for row in rows_of(path)] == ["3"]


def test_of_a_sweeps_file_whole_rows_are_taken_as_spreadsheets_write_them_too(here):
    path = here / "sweep.csv"
    path.write_text(sweep_file([(1, "decision_steps", "nan")]))
    assert [row["t_max"] for row in rows_of_sweep(path)] == [4, 4]
    path.write_bytes(b"\xef\xbb\xbf" + sweep_file().replace("\n", "\r\n").encode())
    assert [row["accuracy"] for row in rows_of_sweep(path)] == [1, 1]
    path.write_text(sweep_file([(1, "accuracy", "0.")], end=""))  # Cut off while it was written.
    assert len(rows_of_sweep(path)) == 1
    path.write_text(sweep_file([(1, "ties", "")]))  # Of a version without.
    assert len(rows_of_sweep(path)) == 1


WHOLE = {"network": "SNN, T = 4", "t_max": 4.0, "accuracy": 0.5, "images": 15.0, "steps": 12.0}


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("[" * 10**5, "is not a file that test wrote"),
        ("\x00", "is not a file that test wrote"),
        (b"\xff\xfe", "is not a file that test wrote"),
        ("5", "is not a file that test wrote (no list of networks and their figures)"),
        ('["t_max"]', "is not a file that test wrote (no list of networks and their figures)"),
        ('{"t_max": 4}', "is not a file that test wrote (no list of networks and their figures)"),
        ("[]", "holds the figures of no spiking network"),
        ([{name: value for name, value in WHOLE.items() if name != "images"}], "(null as a network's images)"),
        ([WHOLE | {"images": [15]}], "([15] as a network's images)"),
        ([WHOLE | {"images": 0}], "(0 as a network's images)"),
        ([WHOLE | {"accuracy": "good"}], '("good" as a network\'s accuracy)'),
        ([WHOLE | {"accuracy": 2}], "(2 as a network's accuracy)"),
        ([WHOLE | {"t_max": True}], "(true as a network's t_max)"),
        ([WHOLE | {"steps": float("inf")}], "(no number as a network's steps)"),
        ([WHOLE | {"steps": 10**400}], "(no number as a network's steps)"),
        ([WHOLE | {"st\x1beps": {}}], r"(no number as a network's st\x1beps)"),
    ],
    ids=str,
)
def test_odd_files_of_figures_are_named_in_one_line(tmp_path, content, says):
    path = tmp_path / "odd.json"
    content = content if isinstance(content, str | bytes) else json.dumps(content)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    line = one_line(spiking_figures, str(path))
    assert says in line
    assert line.startswith(str(path))
    assert line.isprintable()


def test_figures_without_images_end_in_one_line(here, trained):
    shutil.copytree(trained, "runs")
    for row, says in (
        ({name: value for name, value in WHOLE.items() if name != "images"}, "odd.json is not a file that test wrote"),
        (WHOLE | {"images": 14.0}, "the sweep is of 15 images, and --trained of {14.0}"),
    ):
        Path("odd.json").write_text(json.dumps([row]))
        assert says in stopped_by("imagenet", "figures", "--trained=[odd.json]")
    Path("odd.json").write_text(json.dumps([WHOLE]))
    recipe("imagenet", "figures", "--trained=[odd.json]")


@pytest.mark.parametrize(
    "content",
    [b"trainer: [", b"\xff\xfe\x00", b"!!python/object/apply:os.system ['touch ran']", b"model: {arch: [1, 2]}",
     b"- 1\n", b"trainer: {max_epochs: !!python/name:os.system }", b"[" * 3000, b"a: &a [*a]"],
    ids=range(8),
)  # fmt: skip
def test_odd_configs_end_in_one_line_and_run_nothing(images, here, content):
    Path("odd.yaml").write_bytes(content)
    line = stopped_by("imagenet", "fit", "--config=odd.yaml", *small(images))
    assert len(line) < 1000
    assert not Path("ran").exists()


def test_an_image_that_is_gone_ends_in_one_line_from_a_worker_too(images, here, trained, monkeypatch):
    monkeypatch.setattr(torch.utils.data._utils, "MP_STATUS_CHECK_INTERVAL", 0.5)
    shutil.copytree(images, "photos")
    for path in Path("photos").rglob("*.png"):
        path.unlink()
        path.symlink_to("gone")
    ann = f"--model.weights={trained / 'imagenet' / 'best.ckpt'}"
    for workers in (0, 1):
        line = stopped_by("imagenet", "convert", f"--data.num_workers={workers}", ann, *small("photos"))
        assert re.fullmatch(r"error: no image photos/\w+/\d\d.png", line)


def command(name, *arguments):
    return [sys.executable, str(ROOT / "recipes" / f"{name}.py"), *map(str, arguments)]


@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_weights_of_the_unbroken_one(images, here):
    epochs = 6
    fit = ("fit", f"--trainer.max_epochs={epochs}", "--model.arch_arguments={'pause': 0.1}", *small(images))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}

    def run(folder, *more, wait=True):
        arguments = command("imagenet", *fit, f"--trainer.default_root_dir={folder}", *more)
        process = subprocess.Popen(arguments, cwd=here, env=environment, stderr=subprocess.PIPE, text=True)
        if wait:
            _, said = process.communicate(timeout=200)
            assert process.returncode == 0, said
            assert "quartz_plugin" not in said  # No warning of ours.
        return process

    run("whole")
    killed = run("cut", wait=False)
    last = here / "cut" / "last.ckpt"
    deadline = time.monotonic() + 200
    while not last.exists():
        assert killed.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.005)
    time.sleep(0.3)  # Into the next epoch.
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    reached = torch.load(last, weights_only=True)["epoch"] + 1
    assert reached < epochs, "it was not killed in time"
    run("cut", f"--ckpt_path={last}")
    whole, resumed = (torch.load(here / name / "last.ckpt", weights_only=True) for name in ("whole", "cut"))
    assert whole["epoch"] == resumed["epoch"] == epochs - 1
    for name, value in whole["state_dict"].items():
        torch.testing.assert_close(resumed["state_dict"][name], value, rtol=0, atol=1e-6, msg=name)


@pytest.mark.slow
def test_two_processes_convert_test_and_sweep_as_one(images, here):
    network, _ = build("mine.Small", 3)
    save_file(network.state_dict(), "w.safetensors")
    common = [*small(images), "--model.weights=w.safetensors", "--model.cost_images=7", "--data.batch_size=4"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    for folder, processes in (("one", 1), ("two", 2)):
        distributed = [f"--trainer.devices={processes}", *["--trainer.strategy=ddp"] * (processes > 1)]
        for name, *options in (
            ("convert", "--t_max=8", "--granularity=channel", "--percentile=97"),
            ("test", f"--snn={folder}/snn.safetensors"),
            ("sweep", "--t_max=[4]", "--hold=[false]", "--rectifier=[silent]"),
        ):
            arguments = command(
                "imagenet", name, *common, *options, *distributed, f"--trainer.default_root_dir={folder}"
            )
            done = subprocess.run(arguments, cwd=here, env=environment, capture_output=True, text=True, timeout=250)
            assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-2000:]
            if name == "convert":
                assert done.stdout.count("wrote ") == 1
    one, two = (load_file(f"{folder}/snn.safetensors") for folder in ("one", "two"))
    assert one.keys() == two.keys()
    for key, value in one.items():
        assert torch.equal(two[key], value), key
    one, two = (json.loads(Path(folder, "test.json").read_text()) for folder in ("one", "two"))
    assert one[0]["images"] == 15  # Which two processes cannot halve.
    assert two == one
    one, two = (Path(folder, "sweep.csv").read_text() for folder in ("one", "two"))
    assert two == one


def keys_of(text):
    """Keys of a YAML file, dotted, each with the line before it."""
    found, path, before = {}, [], ""
    for line in text.splitlines():
        stripped = line.strip()
        if stripped and not stripped.startswith("#"):
            depth = (len(line) - len(line.lstrip())) // 2
            path[depth:] = [stripped.partition(":")[0]]
            found[".".join(path)] = before.strip()
        before = line
    return found


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_configs_have_every_key_of_model_and_data_each_with_a_comment(path, capsys, monkeypatch, here):
    text = path.read_text()
    for key, before in keys_of(text).items():
        assert before.startswith("#") or key in ("trainer", "model", "data"), key
    if path.stem == "convert_squeezenet":
        with pytest.raises(SystemExit):
            recipe("imagenet", "convert", f"--config={path}", "--print_config")
        assert yaml.safe_load(capsys.readouterr().out)["layers"]["features.3.squeeze_activation"] == {"t_max": 128}
        return
    name = {"demo": "imagenet"}.get(path.stem, path.stem.partition("_")[0])
    with pytest.raises(SystemExit) as stopped:
        recipe(name, "fit", f"--config={path}", "--print_config")
    assert not stopped.value.code
    known = yaml.safe_load(capsys.readouterr().out)
    given = yaml.safe_load(text)
    linked = {"classes"} if name != "mnist" else set()
    for part in ("model", "data"):
        assert set(given[part]) == set(known[part]) - linked, part


@pytest.mark.parametrize("name", ["mnist", "cifar10", "imagenet"])
def test_the_recipe_without_a_file_is_its_config(name, capsys, here):
    with pytest.raises(SystemExit):
        recipe(name, "fit", "--print_config")
    known, given = yaml.safe_load(capsys.readouterr().out), yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())
    for part in ("model", "data", "trainer"):
        for key, value in given[part].items():
            # Lightning's own default of precision is None, which is 32-true.
            assert (known[part][key] or "32-true" if key == "precision" else known[part][key]) == value, (part, key)


@pytest.mark.parametrize(
    ("name", "words"),
    [("mnist", "MNIST with the network of the Quartz paper"), ("imagenet", "ImageNet, or any images in folders")],
)
def test_help_begins_with_what_the_recipe_is(name, words, capsys, here):
    with pytest.raises(SystemExit) as stopped:
        recipe(name, "--help")
    assert not stopped.value.code
    shown = " ".join(capsys.readouterr().out.split())
    assert words in shown
    assert "Lightning Trainer" not in shown


@pytest.mark.parametrize("name", ["mnist", "cifar10", "imagenet"])
@pytest.mark.parametrize(
    "subcommand", ["fit", "validate", "convert", "test", "predict", "run", "sweep", "figures", "costs"]
)
def test_help_tells_every_option(name, subcommand, capsys, here):
    with pytest.raises(SystemExit) as stopped:
        recipe(name, subcommand, "--help")
    assert not stopped.value.code
    said = capsys.readouterr().out
    assert "Not used" not in said
    # A command's own options, the network's and the data's stand before the trainer's.
    of_trainer = said.index("--trainer.default_root_dir")
    assert of_trainer > said.index("--model.lr") > said.index("  -h, --help")
    assert of_trainer > said.index("--data.num_workers")
    if subcommand in OPTIONS_OF:
        assert said.index("--model.lr") > max(said.index(f"  --{name} ") for name in OPTIONS_OF[subcommand])
    blocks = re.findall(r"^  (--\S+)(.*?)(?=^  --|^\S|^$)", said, re.MULTILINE | re.DOTALL)
    ours = {name: " ".join(text.split()) for name, text in blocks if not name.startswith("--trainer")}
    assert len(ours) > 8
    for name, text in ours.items():
        told, _, _ = text.partition("(type:")
        # The first word is what the option takes.
        assert len(told.split()) > 2, (name, text)


@pytest.mark.shared
@pytest.mark.slow
def test_trained_resnet20_loses_little_on_cifar10(here, capsys):
    weights = SHARED / "data" / "weights" / "cifar10_resnet20.safetensors"
    common = (
        f"--config={CONFIGS / 'cifar10_resnet20.yaml'}", f"--data.root={SHARED / 'data' / 'cifar10'}",
        f"--model.weights={weights}", "--trainer.logger=false", "--trainer.enable_progress_bar=false",
        "--model.cost_images=4", "--data.batch_size=100",
    )  # fmt: skip
    recipe("cifar10", "convert", "--t_max=32", "--verify_images=0", *common)
    recipe("cifar10", "test", "--snn=runs/cifar10_resnet20/snn.safetensors", "--trainer.limit_test_batches=5", *common)
    ann, _, spiking = json.loads(Path("runs/cifar10_resnet20/test.json").read_text())
    assert ann["images"] == 500
    assert ann["accuracy"] > 0.87
    assert spiking["accuracy"] > ann["accuracy"] - 0.04
