"""Networks of timm and Hugging Face by name: made, given weights, trained, converted; the images that they expect."""

import contextlib
import importlib.util
import io
import json
import os
import runpy
import shutil
import sys
from pathlib import Path

import pytest
import torch
from helpers.paths import ROOT
from helpers.photos import folder_of_photos
from safetensors.torch import load_file, save_file

pytest.importorskip("lightning", reason="needs the extra recipes")

import quartz_plugin
from quartz_plugin.lightning import FolderData, ImageClassifier
from quartz_plugin.lightning.build import build
from quartz_plugin.lightning.zoos import IMAGENET

needs_timm = pytest.mark.skipif(importlib.util.find_spec("timm") is None, reason="needs timm (extra zoos)")
needs_transformers = pytest.mark.skipif(
    importlib.util.find_spec("transformers") is None, reason="needs transformers (extra zoos)"
)


@pytest.fixture
def offline(monkeypatch):
    """A hub that cannot be reached."""
    constants = pytest.importorskip("huggingface_hub").constants
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder as Hugging Face's networks are kept in, with a small ResNet of 5 classes, in half precision."""
    transformers = pytest.importorskip("transformers")
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    config = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=5
    )
    with contextlib.redirect_stderr(io.StringIO()):
        transformers.ResNetForImageClassification(config).half().save_pretrained("tiny")
    return tmp_path / "tiny"


def describe_images(folder, **held):
    """Write what a network expects its images to be."""
    held = {"image_processor_type": "ConvNextImageProcessor", **held}
    (folder / "preprocessor_config.json").write_text(json.dumps(held))


def refused(*arguments, **keywords):
    """The one line that ends the making of a network."""
    with pytest.raises((FileNotFoundError, ValueError)) as raised:
        build(*arguments, **keywords)
    assert "\n" not in str(raised.value)
    assert len(str(raised.value)) < 900
    return str(raised.value)


@pytest.mark.parametrize(("arch", "package"), [("timm:resnet18", "timm"), ("hf:resnet", "transformers")])
def test_a_missing_package_is_named_with_what_installs_it(arch, package, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=rf"^{arch} needs {package}: pip install 'quartz_plugin\[zoos\]'$"):
        build(arch, 3)


@needs_timm
class TestTimm:
    def test_by_name_with_classes_and_arguments(self):
        network, fresh = build("timm:test_resnet", 7, arguments={"drop_rate": 0.25})
        assert (network.fc.out_features, network.drop_rate, fresh) == (7, 0.25, [])
        assert build("timm:test_resnet", 7, arguments={"num_classes": 3})[0].fc.out_features == 3
        assert build("timm:test_resnet")[0].fc.out_features == 1000

    def test_what_is_no_network_ends_in_one_line(self):
        assert "no network is called 'resnet10'; did you mean resnet" in refused("timm:resnet10", 3)
        assert "no network is called 'zzqqxx'. There are" in refused("timm:zzqqxx", 3)
        assert "Invalid pretrained tag (best)" in refused("timm:test_resnet.best", 3)
        assert "no network is called ''" in refused("timm:")
        line = refused("timm:test_resnet", 3, arguments={"colour": "red"})
        assert line.startswith("timm:test_resnet cannot be made with {'num_classes': 3, 'colour': 'red'} (TypeError")

    @pytest.mark.usefixtures("offline")
    def test_published_weights_out_of_reach_end_in_one_line(self):
        line = refused("timm:test_resnet.r160_in1k", 3, "DEFAULT")
        assert line.startswith("timm:test_resnet.r160_in1k has no published weights within reach (")
        assert line.endswith("give --model.weights a file instead")

    def test_published_weights_of_other_classes_leave_the_head_fresh(self, monkeypatch):
        timm = pytest.importorskip("timm")
        make = timm.create_model
        torch.manual_seed(0)
        published = make("test_resnet")
        monkeypatch.setattr(
            timm, "create_model", lambda name, pretrained, **more: published if pretrained else make(name, **more)
        )
        network, fresh = build("timm:test_resnet", 3, "DEFAULT")
        assert sorted(fresh) == ["fc.bias", "fc.weight"]
        assert torch.equal(network.layer1[0].conv1.weight, published.layer1[0].conv1.weight)
        assert build("timm:test_resnet", 1000, "DEFAULT")[1] == []

    def test_stored_weights(self, tmp_path):
        source, _ = build("timm:test_resnet", 4)
        save_file(source.state_dict(), tmp_path / "w.safetensors")
        network, fresh = build("timm:test_resnet", 4, str(tmp_path / "w.safetensors"))
        assert fresh == []
        assert torch.equal(network.fc.weight, source.fc.weight)
        with pytest.raises(FileNotFoundError, match=r"no weights file none.pt"):
            build("timm:test_resnet", 4, "none.pt")

    def test_images_are_as_the_network_expects_them_unless_the_user_asks_otherwise(self):
        arch = "timm:tf_mobilenetv3_small_minimal_100.in1k"
        classifier = ImageClassifier(arch, classes=3)
        assert (classifier.preprocessing, classifier.image_size) == (([0.5] * 3, [0.5] * 3), 224)
        given = ImageClassifier(arch, classes=3, mean=[0.1, 0.2, 0.3])
        assert given.preprocessing == ([0.1, 0.2, 0.3], [0.5] * 3)
        assert ImageClassifier(arch, classes=3, mean=[], std=[]).preprocessing is None
        assert ImageClassifier("timm:test_resnet", classes=3).image_size == 160
        # Others are ImageNet's, as ever.
        other = ImageClassifier("resnet20", classes=3)
        assert (other.preprocessing, other.image_size) == (([*IMAGENET.mean], [*IMAGENET.std]), None)


@needs_transformers
class TestHuggingFace:
    def test_a_folder_with_random_and_with_its_own_weights(self, folder):
        stored = load_file(folder / "model.safetensors")
        network, fresh = build("hf:tiny", 5, "DEFAULT")
        assert fresh == []
        for name, value in network.network.state_dict().items():
            assert value.dtype == (torch.int64 if name.endswith("num_batches_tracked") else torch.float32)
            assert torch.equal(value, stored[name].to(value.dtype))
        assert network.eval()(torch.rand(2, 3, 32, 32)).shape == (2, 5)
        random, fresh = build(f"hf:{folder}", 5)
        assert fresh == []
        assert not torch.equal(random.network.classifier[1].weight, network.network.classifier[1].weight)
        assert build("hf:tiny")[0].network.classifier[1].out_features == 5

    @pytest.mark.parametrize("weights", ["DEFAULT", "tiny/model.safetensors"])
    def test_weights_of_other_classes_leave_the_head_fresh(self, folder, weights, capfd):
        network, fresh = build("hf:tiny", 3, weights)
        assert sorted(fresh) == ["classifier.1.bias", "classifier.1.weight"]
        stored = load_file(folder / "model.safetensors")["resnet.embedder.embedder.convolution.weight"]
        assert torch.equal(network.network.resnet.embedder.embedder.convolution.weight, stored.float())
        assert capfd.readouterr() == ("", "")

    def test_an_architecture_with_arguments(self):
        options = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"}
        network, fresh = build("hf:resnet", 4, arguments=options)
        assert network.eval()(torch.rand(1, 3, 32, 32)).shape == (1, 4)
        assert fresh == []
        assert build("hf:resnet", arguments={**options, "num_labels": 6})[0].network.classifier[1].out_features == 6
        assert "its configuration has no colour" in refused("hf:resnet", arguments={"colour": "red"})
        assert "hf:resnet cannot be made with {'depths': 'x'} (" in refused("hf:resnet", arguments={"depths": "x"})
        assert "has no weights of its own: give --model.weights a file" in refused("hf:resnet", 4, "DEFAULT")

    @pytest.mark.usefixtures("offline")
    def test_what_is_no_network_ends_in_one_line(self, folder):
        assert "no network is called 'resnt'; did you mean resnet" in refused("hf:resnt")
        assert "no network is called 'zzqqxx'. There are folders" in refused("hf:zzqqxx")
        assert refused("hf:./nowhere/resnet") == "hf:./nowhere/resnet: no folder ./nowhere/resnet"
        line = refused("hf:nobody/resnet", 3, "DEFAULT")
        assert line.startswith(
            "hf:nobody/resnet: no such folder, and not on Hugging Face's hub within reach nor in its"
        )
        assert line.endswith("give hf:FOLDER with a config.json")
        assert "its configuration has no colour" in refused("hf:tiny", arguments={"colour": "red"})
        (folder / "config.json").write_text("{")
        assert "hf:tiny: cannot read tiny/config.json" in refused("hf:tiny")
        (folder / "config.json").write_text('{"model_type": "bert"}')
        assert "hf:tiny is of the type 'bert', which classifies no images" in refused("hf:tiny")
        (folder / "config.json").unlink()
        assert refused("hf:tiny") == "hf:tiny: no config.json in tiny"

    def test_weights_of_another_network_and_those_that_are_not_there_end_in_one_line(self, folder):
        line = refused("hf:tiny", 5, "DEFAULT", {"depths": [1, 2]})
        assert "its model.safetensors holds the weights of another network: " in line
        state = load_file(folder / "model.safetensors")
        (folder / "model.safetensors").unlink()
        torch.save(state, folder / "pytorch_model.bin")
        assert "hf:tiny has no model.safetensors within reach" in refused("hf:tiny", 5, "DEFAULT")
        network, fresh = build("hf:tiny", 5, "tiny/pytorch_model.bin")
        assert fresh == []
        assert torch.equal(network.network.classifier[1].weight, state["classifier.1.weight"].float())

    def test_no_code_of_a_folder_is_run(self, folder):
        config = json.loads((folder / "config.json").read_text())
        auto = {"AutoConfig": "own.Config", "AutoModelForImageClassification": "own.Model"}
        (folder / "config.json").write_text(json.dumps({**config, "model_type": "own", "auto_map": auto}))
        (folder / "own.py").write_text("import pathlib\npathlib.Path('ran').touch()\nclass Config: pass\n")
        assert "hf:tiny: cannot read tiny/config.json" in refused("hf:tiny")
        assert not Path("ran").exists()

    @pytest.mark.parametrize(
        ("held", "expected", "size"),
        [
            (None, (IMAGENET.mean, IMAGENET.std), None),
            ({"image_mean": [0.1, 0.2, 0.3], "image_std": [1, 1, 2], "size": {"shortest_edge": 48}},
             ((0.1, 0.2, 0.3), (1, 1, 2)), 48),
            ({"image_mean": [0.5] * 3, "image_std": [0.25] * 3, "do_normalize": False, "size": 40}, None, 40),
            ({"image_mean": [51.0] * 3, "image_std": [102.0] * 3, "do_rescale": False}, ((0.2,) * 3, (0.4,) * 3), 384),
            ({"image_mean": [0.0] * 3, "image_std": [1.0] * 3, "rescale_factor": 1 / 127.5, "size": 30},
             ((0.0,) * 3, (0.5,) * 3), 30),
            ({"image_processor_type": "MobileNetV1ImageProcessor", "image_mean": [0.5] * 3, "image_std": [0.5] * 3,
              "size": {"shortest_edge": 64}, "crop_size": {"height": 56, "width": 56}}, ((0.5,) * 3, (0.5,) * 3), 56),
        ],
        ids=["none", "mean and std", "as they are", "of 0 to 255", "of 0 to 2", "cut out"],
    )  # fmt: skip
    def test_images_are_as_the_folder_describes_them(self, folder, held, expected, size):
        if held is not None:
            describe_images(folder, **held)
        classifier = ImageClassifier("hf:tiny", classes=5)
        assert classifier.image_size == size
        if expected is None:
            assert classifier.preprocessing is None
        else:
            for ours, wanted in zip(classifier.preprocessing, expected, strict=True):
                assert ours == pytest.approx(wanted)
        given = ImageClassifier("hf:tiny", classes=5, mean=[0.1, 0.2, 0.3], std=[1, 1, 1])
        assert given.preprocessing == ([0.1, 0.2, 0.3], [1, 1, 1])

    def test_images_are_those_of_the_image_processor_itself(self, folder):
        transformers = pytest.importorskip("transformers")
        describe_images(
            folder, image_mean=[0.1, 0.2, 0.3], image_std=[0.5, 1, 2], size={"shortest_edge": 384}, rescale_factor=0.01
        )
        pixels = torch.randint(0, 256, (1, 3, 384, 384), dtype=torch.uint8)
        wanted = transformers.AutoImageProcessor.from_pretrained("tiny")(list(pixels), return_tensors="pt")
        ours = ImageClassifier("hf:tiny", classes=5).normalize(pixels / 255)
        assert torch.allclose(ours, wanted["pixel_values"], atol=1e-5)

    def test_images_that_are_no_rgb_and_descriptions_that_are_none_end_in_one_line(self, folder):
        describe_images(folder, image_processor_type="MobileViTImageProcessor")
        assert "takes images as BGR" in refused("hf:tiny")
        (folder / "preprocessor_config.json").write_text('{"image_processor_type": "Nobodys"}')
        assert "hf:tiny: cannot read its preprocessor_config.json" in refused("hf:tiny")


# The recipes.


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """A folder of 3 classes x 10 images of 40 x 40, which differ in their colour."""
    return folder_of_photos(tmp_path_factory.mktemp("images") / "photos", 10, 40)


def recipe(command, images, arch, *arguments):
    """Run the recipe for images in this process."""
    before = sys.argv
    sys.argv = [
        "imagenet.py", command, f"--data.root={images}", "--data.batch_size=8", f"--model.arch={arch}",
        "--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false", "--trainer.logger=false",
        "--trainer.accelerator=cpu", *arguments,
    ]  # fmt: skip
    try:
        runpy.run_path(str(ROOT / "recipes" / "imagenet.py"), run_name="__main__")
    finally:
        sys.argv = before
        os.environ.pop("PL_GLOBAL_SEED", None)


def fitted_converted_and_tested(images, arch, *arguments):
    """Run fit, convert and test; returns the figures and the converted network."""
    recipe("fit", images, arch, "--trainer.max_epochs=6", "--model.lr=0.02", *arguments)
    trained = ("--ckpt_path=runs/imagenet/best.ckpt", *arguments)
    recipe("convert", images, arch, "--t_max=64", "--verify_images=4", *trained)
    recipe("test", images, arch, "--snn=runs/imagenet/snn.safetensors", *trained)
    return json.loads(Path("runs/imagenet/test.json").read_text()), quartz_plugin.load("runs/imagenet/snn.safetensors")


def check(figures, snn, size):
    ann, *_, spiking = figures
    assert spiking["agreement"] >= 0.8
    assert ann["accuracy"] > 0.5
    assert snn.graph.image_shape == (3, size, size)
    assert snn.graph.settings["image_preparation"]["size"] == size


@needs_timm
def test_fit_convert_and_test_a_network_of_timm(images, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    figures, snn = fitted_converted_and_tested(images, "timm:test_resnet", "--data.size=32")
    check(figures, snn, 32)


@needs_transformers
def test_fit_convert_and_test_a_network_of_hugging_face(images, folder):
    describe_images(folder, image_mean=[0.2, 0.3, 0.4], image_std=[0.5] * 3, size={"shortest_edge": 32})
    figures, snn = fitted_converted_and_tested(images, "hf:tiny")
    # The size and the range of its images are the folder's.
    check(figures, snn, 32)
    data = FolderData(str(images), size=32)
    data.ready()
    batch = torch.stack([data._parts["test"][index][0] for index in range(6)])
    labels = torch.tensor([data._parts["test"][index][1] for index in range(6)])
    network, _ = build("hf:tiny", 3, "runs/imagenet/best.ckpt")
    logits = network.eval()((batch - torch.tensor([0.2, 0.3, 0.4]).view(-1, 1, 1)) / 0.5)
    assert figures[0]["accuracy"] == pytest.approx(float((logits.argmax(1) == labels).float().mean()))
    shutil.rmtree("runs")
    recipe("fit", images, "hf:tiny", "--model.weights=DEFAULT", "--t_max=4", "--trainer.max_epochs=1")
    assert Path("runs/imagenet/snn.safetensors").is_file()


@needs_transformers
def test_a_given_size_and_a_given_resize_win(images, folder):
    describe_images(folder, size={"shortest_edge": 280})
    with pytest.raises(SystemExit, match="size 280, resize 250"):
        recipe("fit", images, "hf:tiny", "--data.resize=250")
    with pytest.raises(SystemExit, match="the network is untrained"):
        recipe("convert", images, "hf:tiny", "--data.size=24", "--data.resize=250")
