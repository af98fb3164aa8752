"""recipes/benchmark.py runs and writes what it says; nothing here judges a time."""

import csv
import runpy
import sys
from importlib.util import find_spec

import pytest
import torch
from helpers.paths import ROOT, SHARED
from torch import nn
from torch.utils.data import TensorDataset

pytest.importorskip("lightning", reason="needs the extra recipes")

from quartz_plugin.lightning import MNISTData, vgg11_bn_cifar10
from quartz_plugin.lightning.benchmark import Benchmark, run_benchmark
from quartz_plugin.lightning.benchmark import run as benchmark_run
from quartz_plugin.lightning.benchmark.setup import normalise, set_up

RECIPE = ROOT / "recipes" / "benchmark.py"
ENGINES = {
    "ANN",
    "ANN, channels-last",
    "integer, logits alone",
    "integer, all spikes",
    "integer, all metrics",
    "ANN in int8, integer's operators",
    "analytic, logits alone",
    "analytic, all spikes",
    "event, paper's neuron, logits alone",
    "event, all spikes",
    "analytic, all metrics",
    "event, all metrics",
    "event, hold off",
    "stepped",
    "to_snntorch() in a loop",
}


def run(folder, **options):
    """Rows of a short run."""
    paths = {"csv": str(folder / "new" / "b.csv"), "plot": str(folder / "new" / "b.png")}
    options = {"t_max": 4, "batch_size": 4, "repeats": 1, **options}
    run_benchmark(Benchmark(**options, **paths))
    assert (folder / "new" / "b.png").read_bytes().startswith(b"\x89PNG")
    return list(csv.DictReader((folder / "new" / "b.csv").open()))


def expected():
    return ENGINES if find_spec("numba") else {name for name in ENGINES if not name.startswith("event")}


def test_one_row_for_each_contender_and_a_picture(tmp_path, capsys):
    rows = run(tmp_path, t_max=[4, 8])
    assert {row["what"] for row in rows if row["t_max"] == "4"} == expected()
    assert {row["what"] for row in rows if row["t_max"] == "8"} == expected()
    (rate,) = (row for row in rows if row["what"].startswith("rate code"))
    assert rate["t_max"] == "16"
    for row in rows:
        assert float(row["times_ann"]) == pytest.approx(float(row["ms"]) / float(row["ann_ms"]))
        anns = [float(each["ms"]) for each in rows if each["what"].startswith("ANN") and "int8" not in each["what"]]
        assert float(row["ann_ms"]) in anns
        assert (row["images"], row["batch"]) == ("random weights, random images", "4")
    heading, settings, *_ = capsys.readouterr().out.splitlines()
    assert heading == "the paper's MNIST network: random weights, random images, percentile 99 of them"
    assert settings.startswith(f"batch 4, 1 thread(s), medians of 1, torch {torch.__version__}, ")


@pytest.mark.shared
def test_all_contenders_answer_alike_on_real_digits(tmp_path):
    rows = run(tmp_path, t_max=64, batch_size=20, data=str(SHARED))
    assert {row["images"] for row in rows} == {"trained weights, real images"}
    assert {float(row["right_percent"]) for row in rows} == {100.0}


@pytest.mark.shared
def test_a_test_with_and_without_metrics_is_timed(tmp_path, capsys, monkeypatch):
    digits = MNISTData(batch_size=4)
    digits._parts["test"] = TensorDataset(torch.rand(6, 1, 28, 28), torch.zeros(6, dtype=torch.long))
    monkeypatch.setattr(digits, "setup", lambda stage=None: None)
    monkeypatch.setattr(benchmark_run, "recipes_data", lambda *given: digits)
    run(tmp_path, data=str(SHARED), test_pass=True)
    heading, _, hold, paper = capsys.readouterr().out.splitlines()[-6:-2]
    assert heading.startswith("test of 6 images, batch 4")
    assert [line.split()[:2] for line in (hold, paper)] == [["hold", "4"], ["paper", "4"]]
    assert all(float(cell) > 0 for line in (hold, paper) for cell in line.split()[2:])


@pytest.mark.slow
def test_slow_contenders_run_where_asked_for_and_memory_is_measured(tmp_path, capsys):
    rows = run(tmp_path, networks=["resnet20"], batch_size=2, slow=True, memory=True)
    assert {row["what"] for row in rows} == expected()
    memory = {row["what"]: float(row["memory_mb"]) for row in rows}
    assert memory["ANN"] == 0.0
    rows = run(tmp_path, networks=["resnet20"], batch_size=2)
    assert "to_snntorch() in a loop" not in {row["what"] for row in rows}
    assert "left out: stepped at T = 4 (--slow true)" in capsys.readouterr().out


def test_batch_norms_take_their_statistics_from_the_images():
    setup = set_up("resnet20", None, 4, 4, 0)
    inputs = normalise(setup.network, setup.images)
    norm, conv = setup.ann.bn1, setup.ann.conv1
    assert torch.allclose(norm.running_mean, conv(inputs).mean((0, 2, 3)), atol=1e-5)
    assert norm.momentum == 0.1
    assert not norm.training


def test_vgg11_has_the_neurons_it_says():
    ann, neurons = vgg11_bn_cifar10().eval(), []
    for module in ann:
        if isinstance(module, nn.ReLU):
            module.register_forward_hook(lambda _, __, out: neurons.append(out.numel()))
    logits = ann(torch.rand(1, 3, 32, 32))
    assert sum(neurons) + logits.numel() == 159_754


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--networks", "lenet"), "no network is called 'lenet'; there are mnist, vgg11, resnet20, squeezenet"),
        (("--data", "nowhere"), "no folder nowhere"),
        (("--data", "."), "no folder MNIST/raw"),
        (("--t_max", "1"), "t_max must be"),
        (("--repeats", "0"), "repeats must be at least 1, got 0"),
        (("--test_pass", "true"), "--test_pass true tests on real images: give --data"),
    ],
    ids=["network", "folder", "folder inside", "t_max", "repeats", "test"],
)
def test_what_a_user_can_mend_ends_in_one_line(tmp_path, monkeypatch, arguments, says):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["benchmark.py", *arguments])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(RECIPE), run_name="__main__")
    (line,) = str(stopped.value).splitlines()
    assert line.startswith("error: ")
    assert says in line
    assert not list(tmp_path.iterdir())


def test_chosen_engines_alone(tmp_path):
    rows = run(tmp_path, engines=["integer"])
    assert {row["what"] for row in rows} == {name for name in ENGINES if "integer" in name or name.startswith("ANN")}
    with pytest.raises(ValueError, match="no engine is called 'events'; there are analytic, integer, event, stepped"):
        run(tmp_path, engines="events")
