"""The shared parts of the recipes: data, modules, command line."""

import csv
import runpy
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from helpers.paths import ROOT, SHARED
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F

pytest.importorskip("lightning", reason="needs the extra recipes")

import lightning

import quartz_plugin
from quartz_plugin.lightning import Classifier, MNISTData, QuartzTrainer, SpikingClassifier, quartz_mnist
from quartz_plugin.lightning.checkpoints import load_checkpoint
from quartz_plugin.lightning.data import DIGITS, FULL_MNIST, random_affine, stratified_split
from quartz_plugin.lightning.modules import check_outputs, warn_if_seen
from quartz_plugin.lightning.notes import UNKNOWN_DATA
from quartz_plugin.lightning.outputs import write_csv
from quartz_plugin.lightning.weights import load_weights, read_dataset_name

# Runs a recipe with sockets that refuse to be opened.
WITHOUT_NETWORK = """
import runpy, socket, sys
def refuse(*args, **kwargs):
    raise RuntimeError("a socket was opened")
socket.socket.__init__ = refuse
socket.create_connection = refuse
socket.getaddrinfo = refuse
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def recipe(*arguments, cwd):
    """Run recipes/mnist.py without a network; its output."""
    return finished(*arguments, cwd=cwd).stdout


def finished(*arguments, cwd):
    """Run recipes/mnist.py without a network; the process, which succeeded."""
    command = [sys.executable, "-c", WITHOUT_NETWORK, str(ROOT / "recipes" / "mnist.py"), *map(str, arguments)]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done


QUICK = ("--trainer.max_epochs=1", "--data.passes=1", "--trainer.limit_test_batches=2", "--data.calibration_images=200")


@pytest.fixture(scope="module")
def after_run(tmp_path_factory):
    """Folder and output of a short `run`."""
    folder = tmp_path_factory.mktemp("run")
    return folder, finished("run", "--t_max=8", "--all_figures=true", *QUICK, cwd=folder)


def test_run_needs_no_option_and_writes_those_that_it_took(tmp_path):
    finished("run", *QUICK, cwd=tmp_path)
    configs = list(tmp_path.glob("runs/**/config.yaml"))
    assert configs
    assert all("t_max: 16\n" in config.read_text() for config in configs)


def test_run_opens_no_socket_and_ends_in_one_table_and_four_pictures(after_run):
    folder, done = after_run
    output = done.stdout
    table = output[output.index("200 test images") :]
    for row in (
        "accuracy",
        "agreement",
        "spikes encoding zero",
        "spikes x synapses",
        "merged",
        "steps of an inference",
        "hold events",
        "memory reads",
        "energy: Loihi 1",
    ):
        assert row in table
    assert "225,840 MACs" in table
    assert "43.0" in table
    for name in ("chronogram.png", "raster.png", "spike_times.png", "activations.png"):
        assert (folder / "runs" / "mnist" / name).read_bytes().startswith(b"\x89PNG")


def test_the_output_is_free_of_advertisement_and_of_other_libraries_deprecations(after_run):
    _, done = after_run
    for line in (done.stdout + done.stderr).splitlines():
        assert "litlogger" not in line
        assert "💡" not in line
        assert "deprecat" not in line.lower(), line
        assert "Warning" not in line, line


def test_run_writes_all_figures_to_files(after_run):
    folder = after_run[0] / "runs" / "mnist"
    rows = list(csv.DictReader((folder / "test.csv").open()))
    assert [row["network"] for row in rows] == ["ANN", "ANN, zeros skipped", "SNN, T = 8", "the same, silent zeros"]
    assert float(rows[2]["synops"]) == 225_840 > float(rows[3]["synops"])


def test_run_logs_to_csv_and_tensorboard_and_keeps_best_and_last(after_run):
    folder = after_run[0] / "runs" / "mnist"
    (log,) = folder.glob("logs/*/metrics.csv")
    columns = next(csv.reader(log.open()))
    assert {"train_loss", "val_accuracy", "accuracy", "agreement", "synops", "zero_spikes", "steps"} <= set(columns)
    assert bool(list(folder.glob("tensorboard/*/events*"))) is (find_spec("tensorboard") is not None)
    assert (folder / "best.ckpt").exists()
    assert (folder / "last.ckpt").exists()
    assert quartz_plugin.load(folder / "snn.safetensors").t_max == 8


def test_run_names_its_network_by_its_windows(tmp_path):
    model = Classifier(nn.Sequential(nn.Flatten(), nn.Linear(784, 9), nn.ReLU(), nn.Linear(9, 10)), 10)
    trainer = QuartzTrainer(
        default_root_dir=str(tmp_path), logger=False, enable_progress_bar=False, enable_model_summary=False,
        max_epochs=1, limit_train_batches=2, limit_val_batches=1, limit_test_batches=1,
    )  # fmt: skip
    trainer.run(model, MNISTData(calibration_images=100), t_max={"default": 3, "output": 5})
    rows = list(csv.DictReader((tmp_path / "test.csv").open()))
    assert rows[2]["network"] == "SNN, T = 3 (output 5)"


@pytest.mark.slow
def test_a_checkpoint_is_converted_and_tested_beside_the_ann(after_run):
    folder = after_run[0]
    checkpoint = folder / "runs" / "mnist" / "best.ckpt"
    output = recipe(
        "convert", f"--ckpt_path={checkpoint}", "--t_max=4", "--hold=false", "--rectifier=silent",
        "--output=small.safetensors", "--verify_images=20", *QUICK, cwd=folder,
    )  # fmt: skip
    assert "top-1 agreement with the ANN" in output
    snn = quartz_plugin.load(folder / "small.safetensors")
    assert (snn.t_max, snn.graph.hold, snn.graph.silent) == (4, False, True)
    assert snn.graph.settings["fitted_on"] == DIGITS
    output = recipe(
        "test", "--snn=small.safetensors", f"--ckpt_path={checkpoint}", "--all_figures=true", *QUICK, cwd=folder
    )
    assert "SNN, T = 4" in output
    assert "agreement with the ANN" in output


@pytest.mark.slow
def test_sweep_writes_one_row_for_each_t_max_and_neuron(after_run):
    folder = after_run[0]
    checkpoint = folder / "runs" / "mnist" / "last.ckpt"
    recipe("sweep", f"--ckpt_path={checkpoint}", "--t_max=[2,3]", "--output=s.csv", *QUICK, cwd=folder)
    rows = list(csv.DictReader((folder / "s.csv").open()))
    assert [row["t_max"] for row in rows] == ["2"] * 5 + ["3"] * 5
    assert {(row["hold"], row["bias"], row["rectifier"]) for row in rows} == {
        ("False", "spike", "spike"),
        ("False", "synapse", "spike"),
        ("False", "synapse", "silent"),
        ("True", "synapse", "spike"),
        ("True", "synapse", "silent"),
    }
    for name in (
        "error_t_max",
        "error_steps",
        "error_operations",
        "error_synops",
        "error_energy",
        "error_energy_paper",
    ):
        assert (folder / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    by_kind = {row["rectifier"]: row for row in rows if row["hold"] == "True" and row["t_max"] == "3"}
    assert by_kind["spike"]["accuracy"] == by_kind["silent"]["accuracy"]
    assert float(by_kind["spike"]["synops"]) == 225_840
    assert float(by_kind["silent"]["synops"]) < 225_840


@pytest.mark.slow
def test_a_sweep_goes_on_where_it_stopped_and_trusts_no_row_of_another_network(tmp_path, capsys):
    path = tmp_path / "resumed.csv"

    def sweep(ann, **options):
        model = Classifier(ann, 10)
        model.fitted_on = DIGITS
        trainer = QuartzTrainer(
            default_root_dir=str(tmp_path), logger=False, enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False, limit_test_batches=1,
        )  # fmt: skip
        data = MNISTData(calibration_images=100)
        trainer.sweep(model, data, t_max=[2, 3], hold=[True], bias=["synapse"], output=str(path), **options)
        told = [line for line in capsys.readouterr().out.splitlines() if " of 4: " in line]
        return [line.endswith("kept") for line in told], list(csv.DictReader(path.open()))

    first, other = (nn.Sequential(nn.Flatten(), nn.Linear(784, 9), nn.ReLU(), nn.Linear(9, 10)) for _ in range(2))
    kept, rows = sweep(first)
    assert kept == [False] * 4
    whole = path.read_text()
    rows[0]["accuracy"] = "0.125"
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows[:2])
    kept, resumed = sweep(first)
    assert kept == [True, True, False, False]
    # What was kept is what stood there, not what a new run gives.
    assert [float(row["accuracy"]) for row in resumed] == [0.125, *(float(row["accuracy"]) for row in rows[1:])]
    assert sweep(first, output_percentile=98.0)[0] == [False] * 4
    assert sweep(first, weight_bits=8)[0] == [False] * 4
    assert sweep(first)[0] == [True] * 4
    assert sweep(first, weight_bits=8)[0] == [True] * 4
    assert sweep(first, resume=False)[0] == [False] * 4
    assert path.read_text() == whole
    assert sweep(other)[0] == [False] * 4
    # A cut-off or empty figure is none; rows of others stay.
    assert len(list(csv.DictReader(path.open()))) == 8
    assert sweep(first)[0] == [True] * 4
    path.write_text(whole[:-3])
    assert sweep(first)[0] == [True, True, True, False]
    emptied = list(csv.DictReader(whole.splitlines()))
    emptied[2]["synops"] = ""
    write_csv(path, emptied)
    assert sweep(first)[0] == [True, True, False, True]
    for other_file in (b"t_max,hold\n2,True\n", b"\xff\xfe\x00"):
        path.write_bytes(other_file)
        with pytest.raises(ValueError, match="no file of a sweep"):
            sweep(first)
        assert path.read_bytes() == other_file


@pytest.mark.slow
def test_costs_sets_ann_rate_code_quartz_and_loihi_side_by_side(after_run):
    folder = after_run[0]
    checkpoint = folder / "runs" / "mnist" / "last.ckpt"
    output = recipe(
        "costs", f"--ckpt_path={checkpoint}", "--t_max=[3]", "--rate_steps=[4]", "--loihi_t_max=[8]",
        "--output=costs/costs.csv", *QUICK, cwd=folder,
    )  # fmt: skip
    rows = {row["network"]: row for row in csv.DictReader((folder / "costs" / "costs.csv").open())}
    assert list(rows) == ["ANN", "ANN, zeros skipped", "rate code, 4 steps", "Quartz, T = 3", "silent zeros, T = 3"]
    assert float(rows["ANN"]["macs"]) == float(rows["Quartz, T = 3"]["synops"]) == 225_840
    assert float(rows["silent zeros, T = 3"]["synops"]) < 225_840
    assert float(rows["rate code, 4 steps"]["graded_synops"]) > 0
    assert rows["ANN"]["steps"] == ""
    assert 0 < float(rows["ANN, zeros skipped"]["macs"]) < 225_840
    for told in ("graded inputs", "11 cores, 1 chip", "estimate", "42 (51)"):
        assert told in output
    for name in ("synops", "energy_delay", "cores"):
        assert (folder / "costs" / f"{name}.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("test", "--snn=nowhere.safetensors"), "no such file: nowhere.safetensors"),
        (("convert", "--ckpt_path=nowhere.ckpt"), "no checkpoint nowhere.ckpt"),
        (("convert", "--model.weights=nowhere.pt"), "no weights file nowhere.pt"),
        (("convert",), "the network is untrained"),
        (("test",), "the network is untrained"),
        (("test", "--ckpt_path=CHECKPOINT_OF_NOTHING"), "not a readable checkpoint"),
        (("convert", "--t_max=1", "--model.weights=WEIGHTS"), "t_max must be a whole number of at least 2"),
        (("convert", "--bias=spike", "--model.weights=WEIGHTS"), "hold=False"),
        (("sweep", "--bias=[spike]", "--hold=[true]", "--model.weights=WEIGHTS"), "there is nothing to convert"),
        (("sweep", "--t_max=[4, 1]"), "t_max must be a whole number of at least 2"),
        (("costs", "--calibration_method=best"), 'leave "output" out'),
        (("costs", '--layers={"input": {"t_max": 32}}'), "leave t_max out of --layers"),
        (("run", "--bias=spike", "--hold=false"), 'rectifier="spike" only'),
    ],
    ids=[
        "snn",
        "checkpoint",
        "weights",
        "untrained",
        "untrained test",
        "junk",
        "t_max",
        "options",
        "sweep",
        "value in a sweep",
        "costs",
        "costs of layers",
        "run",
    ],
)
def test_what_a_user_can_mend_ends_in_one_line(tmp_path, monkeypatch, arguments, says):
    monkeypatch.chdir(tmp_path)
    torch.save(quartz_mnist().state_dict(), tmp_path / "w.pt")
    (tmp_path / "junk.ckpt").write_bytes(b"junk")
    names = {"WEIGHTS": "w.pt", "CHECKPOINT_OF_NOTHING": "junk.ckpt"}
    for name, path in names.items():
        arguments = [argument.replace(name, path) for argument in arguments]
    monkeypatch.setattr(sys, "argv", ["mnist.py", *arguments])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(ROOT / "recipes" / "mnist.py"), run_name="__main__")
    (line,) = str(stopped.value).splitlines()
    assert line.startswith("error: ")
    assert says in line
    assert not list(tmp_path.glob("**/*.safetensors"))


def test_digits_are_real_disjoint_and_split_alike_every_time():
    data, again = MNISTData(), MNISTData(validation_share=0.5)
    data.setup()
    again.setup()
    parts = {name: part.tensors for name, part in data._parts.items()}
    assert [len(parts[name][0]) for name in ("train", "validation", "test")] == [3600, 400, 1000]
    assert parts["test"][1].bincount().tolist() == [100] * 10
    assert torch.equal(parts["test"][0], again._parts["test"].tensors[0])
    seen = {image.numpy().tobytes() for name in ("train", "validation") for image in parts[name][0]}
    assert not any(image.numpy().tobytes() in seen for image in parts["test"][0])
    images = torch.cat([part[0] for part in parts.values()])
    assert (float(images.min()), float(images.max())) == (0.0, 1.0)


def test_calibration_is_on_training_images_alone():
    data = MNISTData(calibration_images=50)
    images = torch.cat([batch[0] for batch in data.calibration_dataloader()])
    assert torch.equal(images, data._parts["train"].tensors[0][:50])


@pytest.mark.shared
def test_the_full_mnist_is_read_from_its_folder():
    data = MNISTData(root=str(SHARED / "data"))
    data.prepare_data()
    data.setup()
    train, validation, test = (data._parts[name] for name in ("train", "validation", "test"))
    assert (len(train) + len(validation), len(test)) == (60_000, 10_000)
    assert abs(len(validation) - 6_000) < 10


def test_a_missing_folder_says_what_to_do(tmp_path, monkeypatch):
    import torchvision

    def no_network(self):
        raise RuntimeError("Error downloading")

    monkeypatch.setattr(torchvision.datasets.MNIST, "download", no_network)
    with pytest.raises(FileNotFoundError, match=r"MNIST.raw.*--data.root"):
        MNISTData(root=str(tmp_path)).prepare_data()


def test_stratified_split_keeps_classes_and_refuses_bad_shares():
    labels = torch.arange(4).repeat_interleave(10)
    rest, part = stratified_split(labels, 0.3, seed=3)
    assert labels[part].bincount().tolist() == [3] * 4
    assert sorted(torch.cat([rest, part]).tolist()) == list(range(40))
    assert torch.equal(part, stratified_split(labels, 0.3, seed=3)[1])
    with pytest.raises(ValueError, match="between 0 and 1"):
        stratified_split(labels, 1.0, seed=0)


def test_random_affine_moves_each_image_a_little_and_stays_in_range():
    images = torch.zeros(20, 1, 28, 28)
    images[:, :, 10:18, 10:18] = 1.0
    moved = random_affine(images)
    assert moved.shape == images.shape
    assert float(moved.min()) >= 0.0
    assert float(moved.max()) <= 1.0 + 1e-6
    assert not torch.equal(moved[0], moved[1])
    ink = moved.sum((1, 2, 3)) / images.sum((1, 2, 3))
    assert ((ink > 0.7) & (ink < 1.4)).all()


def test_the_warning_comes_for_digits_among_the_training_images_only():
    class FakeTrainer:
        datamodule = MNISTData()

    with pytest.warns(UserWarning, match="is of seen images"):
        warn_if_seen(FULL_MNIST, FakeTrainer())
    with pytest.warns(UserWarning, match="nobody knows"):
        warn_if_seen(UNKNOWN_DATA, FakeTrainer())
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_if_seen(DIGITS, FakeTrainer())
        warn_if_seen(None, FakeTrainer())


def test_weights_tell_what_they_were_fitted_on_where_they_know(after_run, tmp_path):
    folder, _ = after_run
    assert read_dataset_name(str(folder / "runs" / "mnist" / "best.ckpt")) == DIGITS
    torch.save(quartz_mnist().state_dict(), tmp_path / "w.pt")
    save_file(quartz_mnist().state_dict(), tmp_path / "w.safetensors")
    for name in ("w.pt", "w.safetensors"):
        assert read_dataset_name(str(tmp_path / name)) == UNKNOWN_DATA


def test_weights_are_loaded_from_safetensors_and_pt_and_refused_from_elsewhere(tmp_path):
    torch.manual_seed(1)
    source, target = quartz_mnist(), quartz_mnist()
    save_file(source.state_dict(), tmp_path / "w.safetensors")
    torch.save(source.state_dict(), tmp_path / "w.pt")
    (tmp_path / "bad.pt").write_bytes(b"no weights")
    torch.save({"__reduce__": Path("x")}, tmp_path / "code.pt")
    torch.save(nn.Linear(2, 2).state_dict(), tmp_path / "other.pt")
    for name in ("w.safetensors", "w.pt"):
        load_weights(target, str(tmp_path / name))
        assert torch.equal(target[0].weight, source[0].weight)
    for name in ("bad.pt", "code.pt"):
        with pytest.raises(ValueError, match="not a readable file of weights"):
            load_weights(target, str(tmp_path / name))
    with pytest.raises(ValueError, match="another network"):
        load_weights(target, str(tmp_path / "other.pt"))
    with pytest.raises(ValueError, match="not a readable checkpoint"):
        load_checkpoint(Classifier(target, 10), str(tmp_path / "w.pt"))


def test_fit_and_test_work_without_the_command_line(tmp_path):
    import lightning

    ann = nn.Sequential(nn.Flatten(), nn.Linear(784, 32), nn.ReLU(), nn.Linear(32, 10))
    model, data = Classifier(ann, 10, lr=1e-2), MNISTData(passes=1)
    trainer = lightning.Trainer(
        max_epochs=2, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=tmp_path,
    )  # fmt: skip
    trainer.fit(model, datamodule=data)
    (ann_figures,) = trainer.test(model, datamodule=data, verbose=False)
    assert ann_figures["accuracy"] > 0.7
    snn = quartz_plugin.convert(ann, data.calibration_dataloader(), 64)
    (figures,) = trainer.test(SpikingClassifier(snn, 10, model.decisions), datamodule=data, verbose=False)
    assert figures["agreement"] > 0.97
    assert figures["steps"] == 4 * 63 + 1
    images, labels = data._parts["test"].tensors
    assert figures["accuracy"] == pytest.approx(float((snn(images).argmax(1) == labels).float().mean()), abs=1e-6)


def test_a_network_of_one_logit_is_tested_by_its_sign(tmp_path):
    ann = nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 1))
    images = torch.rand(60, 3, 2, 2)
    with torch.no_grad():
        ann[3].bias -= ann(images).mean()
    labels = (ann(images) > 0.02).long().squeeze(1)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(images, labels), batch_size=20)
    trainer = lightning.Trainer(
        default_root_dir=tmp_path, logger=False, enable_checkpointing=False, enable_progress_bar=False
    )
    classifier = Classifier(ann, classes=2)
    classifier.log = lambda *_, **__: None
    expected = F.binary_cross_entropy_with_logits(ann(images).squeeze(1), labels.float())
    torch.testing.assert_close(classifier.training_step((images, labels), 0), expected)
    trainer.test(classifier, loader, verbose=False)
    ann_right = (ann(images) > 0).squeeze(1) == labels
    assert classifier.figures["accuracy"] == pytest.approx(float(ann_right.float().mean()))
    snn = quartz_plugin.convert(ann, images, 8, calibration_method="output")
    tested = SpikingClassifier(snn, 2, classifier.decisions)
    trainer.test(tested, loader, verbose=False)
    by_sign = (snn(images) > 0).squeeze(1)
    assert tested.figures["accuracy"] == pytest.approx(float((by_sign == labels).float().mean()))
    assert tested.figures["agreement"] == pytest.approx(quartz_plugin.verify(ann, snn, images).agreement)
    assert tested.figures["gained"] == float((by_sign == labels)[~ann_right].sum())
    with pytest.raises(ValueError, match="the network has 1 outputs, the data 3 classes"):
        check_outputs(ann(images), 3)
