"""Files: what is saved comes back; what is damaged is one ValueError; nothing in a file is ever run."""

import copy
import json
import os
import pickle
import re
import struct
from collections import Counter

import numpy as np
import pytest
import torch
from helpers.damaged_files import Branches, Joined, base_files, contents, damaged, judge, rewrite
from helpers.random_chains import NEURONS, SCALES, SOME, chains, first_spikes, input_train, t_maxima
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save, save_file
from torch import nn
from torch.nn import functional as F

import quartz_plugin
from quartz_plugin import AxonalDelay, ConversionError, TTFSNeuron
from quartz_plugin.costs import InferenceCounts
from quartz_plugin.functional import TTFSParameters
from quartz_plugin.graph.files import FORMAT
from quartz_plugin.graph.synapses import fan_out, probed_fan_out, unit_shapes


@pytest.fixture
def snn():
    ann = nn.Sequential(
        nn.Conv2d(1, 3, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.AvgPool2d(2, stride=1),
        nn.Flatten(),
        nn.Linear(12, 4),
        nn.ReLU(),
        nn.Linear(4, 2),
    )
    return quartz_plugin.convert(ann, torch.rand(20, 1, 6, 6), t_max=6, preprocessing=(0.3, 0.2))


@pytest.fixture
def path(tmp_path):
    return tmp_path / "network.quartz"


def assert_same_spikes(one, other, images):
    for engine in ("stepped", "analytic") if one.graph.hold else ("stepped",):
        a, b = one.run(images, engine=engine), other.run(images, engine=engine)
        assert a.spike_steps.keys() == b.spike_steps.keys()
        assert all(torch.equal(steps, b.spike_steps[name]) for name, steps in a.spike_steps.items())
        assert torch.equal(a.logits, b.logits)
        assert (a.windows, a.n_steps) == (b.windows, b.n_steps)


def refusal(path):
    """Message of the one ValueError that loading raises."""
    with pytest.raises(ValueError, match=r"\S") as caught:
        quartz_plugin.load(path)
    assert not isinstance(caught.value, ConversionError)
    message = str(caught.value)
    assert str(path) in message
    assert "\n" not in message
    return message


class TestRoundTrip:
    @SOME
    @given(chains(), t_maxima(), NEURONS, SCALES)
    def test_gives_back_the_same_network(self, tmp_path_factory, chain, t_max, neuron, scales):
        path = tmp_path_factory.mktemp("io") / "snn"
        snn = chain.convert(t_max, **neuron, **scales)
        snn.save(path)
        loaded = quartz_plugin.load(path)
        assert_same_spikes(loaded, snn, chain.images)
        assert loaded.report[:] == snn.report[:]
        assert str(loaded.report) == str(snn.report)
        assert loaded.graph.settings == snn.graph.settings
        assert (loaded.n_steps, loaded.t_max, loaded.windows) == (snn.n_steps, snn.t_max, snn.windows)
        assert loaded.graph.input_shape == snn.graph.input_shape
        assert loaded.graph.output_scale == snn.graph.output_scale
        assert loaded.graph.dtype == snn.graph.dtype
        assert loaded.graph.scales.keys() == snn.graph.scales.keys()
        assert all(torch.equal(scale, snn.graph.scales[name]) for name, scale in loaded.graph.scales.items())
        states = loaded.state_dict(), snn.state_dict()
        assert states[0].keys() == states[1].keys()
        assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
        assert not any(parameter.requires_grad for parameter in loaded.parameters())

    @SOME
    @given(chains(), st.integers(2, 6), NEURONS)
    def test_a_loaded_network_exports_and_saves_alike(self, tmp_path_factory, chain, t_max, neuron):
        path = tmp_path_factory.mktemp("io") / "snn"
        snn = chain.convert(t_max, **neuron)
        snn.save(path)
        first = path.read_bytes()
        loaded = quartz_plugin.load(path)
        loaded.save(path)
        assert path.read_bytes() == first
        result = snn.run(chain.images, engine="stepped")
        net = loaded.to_snntorch()
        steps = first_spikes([net(spikes) for spikes in input_train(snn, chain.images)])
        assert torch.equal(steps, result.spike_steps[result.output])

    def test_names_like_the_input_and_one_another_survive(self, path):
        class Named(nn.Module):
            def __init__(self):
                super().__init__()
                self.input, self.output, self.a_b = nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 5)
                self.a = nn.ModuleDict({"b": nn.ReLU(), "c d-e": nn.Linear(5, 3)})

            def forward(self, x):
                x = self.a["b"](self.a_b(self.output(self.input(x))))
                return self.a["c d-e"](x)

        images = torch.rand(30, 4)
        snn = quartz_plugin.convert(Named(), images)
        snn.save(path)
        assert_same_spikes(quartz_plugin.load(path), snn, images)

    @pytest.mark.parametrize("name", ["conv__1", "3x3+relu", "a/b", "relu!", "größe", "a'b", "a-b c", "0"])
    def test_a_name_that_can_be_converted_can_be_saved_and_loaded(self, path, name):
        ann = nn.Sequential()
        ann.add_module(name, nn.Linear(4, 5))
        ann.add_module(f"{name}relu", nn.ReLU())
        ann.add_module("last", nn.Linear(5, 2))
        with torch.no_grad():
            ann[0].bias.add_(0.5)
        images = torch.rand(30, 4)
        snn = quartz_plugin.convert(ann, images)
        snn.save(path)
        assert_same_spikes(quartz_plugin.load(path), snn, images)

    def test_trained_networks_keep_what_they_learned(self, snn, path):
        with torch.no_grad():
            for parameter in snn.parameters():
                parameter.mul_(1.25)
        snn.save(path)
        assert_same_spikes(quartz_plugin.load(path), snn, torch.rand(5, 1, 6, 6))

    def test_saving_in_the_middle_of_an_inference_saves_no_state(self, snn, path):
        snn.save(path)
        before = path.read_bytes()
        snn.graph_module(torch.ones(2, 1, 6, 6))
        snn.save(path)
        assert path.read_bytes() == before

    def test_verify_takes_a_loaded_network(self, path):
        ann, images = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)), torch.rand(20, 4)
        snn = quartz_plugin.convert(ann, images)
        snn.save(path)
        expected = str(quartz_plugin.verify(ann, snn, images))
        assert str(quartz_plugin.verify(ann, quartz_plugin.load(path), images)) == expected

    def test_takes_str_and_path(self, snn, path):
        snn.save(str(path))
        assert quartz_plugin.load(str(path)).n_steps == quartz_plugin.load(path).n_steps == snn.n_steps


class TestDamage:
    def test_truncated_anywhere(self, snn, path):
        snn.save(path)
        whole = path.read_bytes()
        header = struct.unpack("<Q", whole[:8])[0]
        lengths = {0, 1, 7, 8, 9, 8 + header // 2, 8 + header - 1, 8 + header, 8 + header + 1, len(whole) - 1}
        for length in lengths | set(range(0, len(whole), 997)):
            path.write_bytes(whole[:length])
            refusal(path)

    def test_something_behind_the_end(self, snn, path):
        snn.save(path)
        path.write_bytes(path.read_bytes() + b"more")
        refusal(path)

    @SOME
    @given(st.binary(max_size=200))
    def test_garbage(self, tmp_path_factory, data):
        path = tmp_path_factory.mktemp("io") / "snn"
        path.write_bytes(data)
        refusal(path)

    def test_a_header_of_absurd_length(self, path):
        path.write_bytes(struct.pack("<Q", 2**60) + b"{}")
        refusal(path)

    def test_foreign_safetensors(self, path):
        save_file({"weight": torch.rand(3)}, path)
        assert "holds no converted network" in refusal(path)
        save_file({"weight": torch.rand(3)}, path, metadata={"format": "pt"})
        assert "holds no converted network" in refusal(path)

    @pytest.mark.parametrize("text", ["", "{", "[]", "3", "null", '"text"', "{}", '{"version": 3}'])
    def test_a_header_that_is_no_network(self, path, text):
        save_file({"weight": torch.rand(3)}, path, metadata={FORMAT: text})
        assert "damaged" in refusal(path)

    @pytest.mark.parametrize("version", [0, 2, 4, "3", None, 1.5])
    def test_another_version(self, snn, path, version):
        snn.save(path)
        header, tensors = contents(path)
        rewrite(path, header | {"version": version}, tensors)
        message = refusal(path)
        assert f"version {version!r}" in message
        assert "reads version 3" in message

    def test_no_file(self, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"no such file: .*absent"):
            quartz_plugin.load(tmp_path / "absent")
        with pytest.raises(FileNotFoundError, match="no such file"):
            quartz_plugin.load(tmp_path)

    def test_any_tensor_missing(self, snn, path):
        snn.save(path)
        header, tensors = contents(path)
        assert len(tensors) >= 9
        for name in tensors:
            rewrite(path, header, {key: value for key, value in tensors.items() if key != name})
            refusal(path)

    def test_a_tensor_too_many(self, snn, path):
        snn.save(path)
        header, tensors = contents(path)
        for name in ("module.9.weight", "scale.nobody", "module.0.bias"):
            rewrite(path, header, tensors | {name: torch.rand(3)})
            refusal(path)

    def test_a_tensor_of_another_shape(self, snn, path):
        snn.save(path)
        header, tensors = contents(path)
        for name in (name for name in tensors if name.endswith("weight")):
            rewrite(path, header, tensors | {name: torch.rand(7, 7)})
            refusal(path)

    @pytest.mark.parametrize("name", ["Sigmoid", "Module", "os.system", "__import__", "", None, 3, ["Linear"]])
    def test_an_unknown_class(self, snn, path, name):
        snn.save(path)
        header, tensors = contents(path)
        header["modules"]["5"]["class"] = name
        rewrite(path, header, tensors)
        refusal(path)

    def test_every_entry_of_the_header_is_needed(self, snn, path):
        snn.save(path)
        header, tensors = contents(path)
        for key in header:
            if key != "format":
                rewrite(path, {k: v for k, v in header.items() if k != key}, tensors)
                refusal(path)
        for module in header["modules"]:
            damaged = copy.deepcopy(header)
            del damaged["modules"][module]
            rewrite(path, damaged, tensors)
            refusal(path)

    @pytest.mark.parametrize("value", [None, -1, "x", [], {}, 1e400, float("nan")])
    @pytest.mark.parametrize("key", ["t_max", "input_shape", "output_scale", "settings", "modules", "nodes"])
    def test_an_entry_of_nonsense_is_refused_at_once(self, snn, path, key, value):
        snn.save(path)
        header, tensors = contents(path)
        rewrite(path, header | {key: value}, tensors)
        refusal(path)

    def test_settings_that_lack_what_running_needs_are_refused_at_once(self, snn, path):
        snn.save(path)
        header, tensors = contents(path)
        del header["settings"]["rectifier"]
        rewrite(path, header, tensors)
        refusal(path)

    def test_a_network_that_listens_to_the_future_or_to_nobody(self, snn, path):
        snn.save(path)
        header, tensors = contents(path)
        for inputs in (["output"], ["nobody"], [], [None], ["input", "input"]):
            damaged = copy.deepcopy(header)
            damaged["nodes"][0]["inputs"] = inputs
            rewrite(path, damaged, tensors)
            refusal(path)

    @SOME
    @given(st.data())
    def test_any_value_of_the_header_replaced_gives_a_network_or_one_value_error(self, tmp_path_factory, data):
        path = tmp_path_factory.mktemp("io") / "snn"
        torch.manual_seed(0)
        ann = nn.Sequential(nn.Conv1d(1, 2, 2), nn.ReLU(), nn.MaxPool1d(2), nn.Flatten(), nn.Linear(4, 2))
        quartz_plugin.convert(ann, torch.rand(20, 1, 5), t_max=4).save(path)
        header, tensors = contents(path)
        place = header
        while True:
            keys = list(place) if isinstance(place, dict) else list(range(len(place)))
            key = data.draw(st.sampled_from(keys))
            if isinstance(place[key], dict | list) and place[key] and data.draw(st.booleans()):
                place = place[key]
                continue
            break
        place[key] = data.draw(st.sampled_from([None, True, 0, -1, 3, 1.5, "x", "TTFSNeuron", [], {}, [1, 2], "5"]))
        rewrite(path, header, tensors)
        try:
            loaded = quartz_plugin.load(path)
        except ValueError as error:
            assert str(path) in str(error)  # noqa: PT017
        else:
            assert loaded.n_steps > 0


class TestNothingIsRun:
    def test_no_pickle_is_written_nor_read(self, snn, path, monkeypatch):
        def forbidden(*args, **kwargs):
            raise AssertionError("unpickled")

        snn.save(path)
        assert path.read_bytes()[8:9] == b"{"
        for module, name in ((pickle, "load"), (pickle, "loads"), (pickle, "Unpickler"), (torch, "load")):
            monkeypatch.setattr(module, name, forbidden)
        assert quartz_plugin.load(path).n_steps == snn.n_steps

    @pytest.mark.parametrize("write", [torch.save, lambda value, path: path.write_bytes(pickle.dumps(value))])
    def test_a_pickle_is_refused_and_not_run(self, tmp_path, path, write):
        class Bomb:
            def __reduce__(self):
                return os.mkdir, (str(tmp_path / "exploded"),)

        write(Bomb(), path)
        refusal(path)
        assert not (tmp_path / "exploded").exists()

    @pytest.mark.parametrize(
        "name",
        [
            'x", exec("import os; os\\x2emkdir(\'{target}\')")) or getattr(self, "x',
            "x)\nimport os\nos\\x2emkdir('{target}')\n#",
            "forward",
            "__class__",
            "_modules",
            "",
            ".",
        ],
    )
    def test_names_of_modules_are_no_code(self, snn, tmp_path, path, name):
        target = tmp_path / "exploded"
        name = name.replace("{target}", str(target).replace(".", "\\x2e"))
        snn.save(path)
        header, tensors = contents(path)
        assert header["modules"]["4"]["class"] == "Flatten"
        header["modules"][name] = header["modules"].pop("4")
        for node in header["nodes"]:
            node["module"] = name if node["module"] == "4" else node["module"]
            node["inputs"] = [name if source == "4" else source for source in node["inputs"]]
        rewrite(path, header, tensors)
        try:
            loaded = quartz_plugin.load(path)
            images = torch.rand(2, 1, 6, 6)
            loaded(images)
            for step in (loaded.graph_module, loaded.to_snntorch()):
                step(images)
        except (ValueError, AttributeError, TypeError, KeyError, SyntaxError, RuntimeError):
            pass
        assert not target.exists()

    def test_a_name_that_would_be_code_is_refused_or_means_what_it_says(self, snn, path):
        snn.save(path)
        header, tensors = contents(path)
        name = 'x", 1 / 0) or getattr(self, "x'
        header["modules"][name] = header["modules"].pop("4")
        for node in header["nodes"]:
            node["module"] = name if node["module"] == "4" else node["module"]
            node["inputs"] = [name if source == "4" else source for source in node["inputs"]]
        rewrite(path, header, tensors)
        try:
            loaded = quartz_plugin.load(path)
        except ValueError as error:
            assert str(path) in str(error)  # noqa: PT017
        else:
            images = torch.rand(2, 1, 6, 6)
            assert torch.equal(loaded.graph_module(images), snn.graph_module(images))


class TestWriting:
    @pytest.mark.parametrize("function", ["replace", "fsync"])
    def test_that_fails_leaves_the_old_file_and_no_temporary(self, snn, path, monkeypatch, function):
        snn.save(path)
        before = path.read_bytes()

        def fail(*args, **kwargs):
            raise OSError("disk full")

        with torch.no_grad():
            snn.graph_module.get_submodule("0").weight.zero_()
        monkeypatch.setattr(os, function, fail)
        with pytest.raises(OSError, match="disk full"):
            snn.save(path)
        monkeypatch.undo()
        assert path.read_bytes() == before
        assert os.listdir(path.parent) == [path.name]

    def test_that_is_interrupted_leaves_nothing(self, snn, path, monkeypatch):
        def interrupt(*args, **kwargs):
            raise KeyboardInterrupt

        monkeypatch.setattr(os, "replace", interrupt)
        with pytest.raises(KeyboardInterrupt):
            snn.save(path)
        assert os.listdir(path.parent) == []

    def test_into_no_folder_is_an_os_error(self, snn, tmp_path):
        with pytest.raises(OSError, match="absent"):
            snn.save(tmp_path / "absent" / "snn")

    def test_of_a_module_put_there_by_hand_is_refused_by_name(self, snn, path):
        snn.save(path)
        before = path.read_bytes()
        snn.graph_module.set_submodule("3", nn.Tanh())
        with pytest.raises(ValueError, match=r"cannot save '3'.*Tanh"):
            snn.save(path)
        assert path.read_bytes() == before
        assert os.listdir(path.parent) == [path.name]

    def test_replaces_an_older_file_as_a_whole(self, snn, path):
        path.write_bytes(b"x" * 1_000_000)
        snn.save(path)
        assert_same_spikes(quartz_plugin.load(path), snn, torch.rand(2, 1, 6, 6))

    def test_obeys_the_umask(self, snn, path):
        mask = os.umask(0o027)
        try:
            snn.save(path)
        finally:
            os.umask(mask)
        assert path.stat().st_mode & 0o777 == 0o640

    def test_the_file_is_safetensors_with_readable_json(self, snn, path):
        snn.save(path)
        header, tensors = contents(path)
        assert header["version"] == 3
        assert header["settings"]["t_max"] == 6
        assert save(tensors)
        assert torch.equal(tensors["module.0.weight"], snn.graph_module.get_submodule("0").weight)


@pytest.mark.parametrize(
    ("kind", "option", "values"),
    [
        ("Permute", "dims", [[1, 0, 2, 3, 4], [0, 1], "abc", [0, 2, 2, 3, 4], None]),
        ("Concatenate", "dim", [0, 9, -1, "x", True]),
        ("Slice", "dim", [0, -1, 7]),
        ("Slice", "step", [0, -1]),
        ("Slice", "start", [-1, 10**30]),
        ("Reshape", "shape", [[5, 5], "abc", [-1, -1], 3]),
        ("Mean", "dims", [[0], [1, 1], [9]]),
        ("Upsample", "mode", ["bilinear", "cubic", 3]),
        ("Upsample", "scale_factor", [[1e6, 1e6], 0, -1, "x"]),
        ("Conv2d", "stride", [[0, 0], [-1, 1]]),
        ("Conv2d", "out_channels", [10**9]),
    ],
)
def test_options_that_no_network_has_are_refused_at_once(tmp_path, kind, option, values):
    path = tmp_path / "snn"
    quartz_plugin.convert(Joined(), torch.rand(20, 2, 4, 4), 4).save(path)
    header, tensors = contents(path)
    found = next(name for name, entry in header["modules"].items() if entry["class"] == kind)
    for value in values:
        damaged = copy.deepcopy(header)
        damaged["modules"][found][option] = value
        rewrite(path, damaged, tensors)
        assert "damaged" in refusal(path), value


def test_missing_delays_foreign_scales_and_rows_are_refused_at_once(tmp_path):
    path = tmp_path / "snn"
    quartz_plugin.convert(Joined(), torch.rand(20, 2, 4, 4), 4).save(path)
    header, tensors = contents(path)
    delay = next(name for name, entry in header["modules"].items() if entry["class"] == "AxonalDelay")
    damaged = copy.deepcopy(header)
    damaged["modules"][delay]["steps"] += 1
    rewrite(path, damaged, tensors)
    assert "windows that end at steps" in refusal(path)
    rewrite(path, header, tensors | {"scale.output": -tensors["scale.output"]})
    assert "a scale is not positive" in refusal(path)
    for report in ([1, 2], [{"module": 3}], [{"module": "x", "neurons": "many"}]):
        rewrite(path, header | {"report": report}, tensors)
        assert "its report is no list of rows" in refusal(path)
    for text in ("[" * 200_000, json.dumps(header).replace(str(header["output_scale"]), "1" + "0" * 400)):
        save_file(tensors, path, metadata={FORMAT: text})
        assert "damaged" in refusal(path)


def test_a_loaded_network_does_not_change_with_its_file(tmp_path):
    path = tmp_path / "snn"
    snn = quartz_plugin.convert(Joined(), torch.rand(20, 2, 4, 4), 4)
    snn.save(path)
    loaded = quartz_plugin.load(path)
    with path.open("r+b") as file:
        size = path.stat().st_size
        file.seek(size // 2)
        file.write(b"\0" * (size - size // 2))
    for name, scale in snn.graph.scales.items():
        assert torch.equal(loaded.graph.scales[name], scale)
    images = torch.rand(3, 2, 4, 4)
    assert torch.equal(loaded(images), snn(images))


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return base_files(tmp_path_factory.mktemp("files"))


def assert_what_loads_runs(files, path, seeds):
    outcomes = Counter(judge(path) for seed in seeds if damaged(seed, files, path))
    assert outcomes["runs"] > sum(outcomes.values()) / 20
    assert outcomes["large"] <= sum(outcomes.values()) / 50


def test_a_file_damaged_at_random_is_refused_in_one_line_or_runs_alike_in_all_engines(files, path):
    assert_what_loads_runs(files, path, range(40))


@pytest.mark.slow
def test_many_files_damaged_at_random_are_refused_in_one_line_or_run_alike_in_all_engines(files, path):
    assert_what_loads_runs(files, path, range(1000, 1400))


def set_settings(kind, **settings):
    """Damage: change settings of the first module of a class; of a pool, those inside."""

    def damage(header, tensors):
        for entry in header["modules"].values():
            own = entry.get("pool", entry)
            if own["class"] == kind:
                own.update(settings)
                return
        raise AssertionError(f"no {kind}")

    return damage


def put_behind(path, *entries):
    """Damage: let modules stand in a row behind one, for all that listened to it."""

    def damage(header, tensors):
        names = [f"new{number}" for number in range(len(entries))]
        for node in header["nodes"]:
            node["inputs"] = [names[-1] if source == path else source for source in node["inputs"]]
        at = 1 + [node["module"] for node in header["nodes"]].index(path) if path != "input" else 0
        for name, before, entry in zip(names, [path, *names], entries, strict=False):
            times = 2 if entry["class"] == "Add" else 1
            header["nodes"].insert(at, {"module": name, "inputs": [before] * times})
            header["modules"][name] = entry
            at += 1

    return damage


def change_tensor(name, change):
    def damage(header, tensors):
        tensors[name] = change(tensors[name])

    return damage


POOL = {"class": "MaxPool2d", "kernel_size": 1, "stride": 1, "padding": 0, "dilation": 1, "ceil_mode": False}
SHIFT = {"class": "ZeroPad2d", "padding": [1, -1, 0, 0]}


@pytest.mark.parametrize(
    ("damage", "why"),
    [
        (set_settings("Conv2d", stride=[0, 1]), "stride=.0, 1., expected a whole number of at least 1, or 2 of them"),
        (set_settings("Conv2d", dilation=[0, 0]), "dilation="),
        (set_settings("Conv2d", padding=[1]), "padding=.1., expected a whole number"),
        (set_settings("Conv2d", padding=[1, 1.0]), "padding="),
        (set_settings("Conv2d", padding=-1), "padding="),
        (set_settings("Conv2d", groups=True), "groups=True"),
        (set_settings("Conv2d", in_channels="1"), "in_channels='1'"),
        (set_settings("Conv2d", padding_mode="constant"), "padding_mode='constant', expected 'zeros' or"),
        (set_settings("Conv2d", kernel_size=[10**5, 10**5]), r"weight is of shape"),
        (set_settings("Conv2d", in_channels=5 * 10**9), "in_channels="),
        (set_settings("Conv2d", padding=[10**6, 10**6], stride=[10**6, 10**6]), "units"),
        (set_settings("Conv2d", bias=True), "unknown setting 'bias'"),
        (set_settings("Linear", out_features=10**9), "weight is of shape"),
        (set_settings("AvgPool2d", stride=0), "stride=0"),
        (set_settings("AvgPool2d", divisor_override=0), "divisor_override=0"),
        (set_settings("AvgPool2d", ceil_mode=1), "ceil_mode=1, expected True or False"),
        (set_settings("MaxPool2d", dilation=0), "dilation=0"),
        (set_settings("MaxPool2d", kernel_size=2, stride=1, padding=4, dilation=13), "of padding alone|does not fit"),
        (set_settings("Flatten", start_dim=0), "start_dim=0"),
        (set_settings("TTFSNeuron", hold=1), "hold=1"),
        (set_settings("TTFSNeuron", hold=False), "of another kind of neuron"),
        (set_settings("TTFSNeuron", rectifier="silent"), "of another kind of neuron"),
        (set_settings("TTFSNeuron", rectifier=None), "of another kind of neuron"),
        (set_settings("TTFSNeuron", rectifier=[]), "rectifier="),
        (set_settings("TTFSNeuron", t_max=6.0), "t_max=6.0"),
        (set_settings("TTFSNeuron", input_window=4), "input_window=4, and the longest window among its sources is 5"),
        (set_settings("TTFSNeuron", readout="5"), "readout='5'"),
        (put_behind("0", POOL), "MaxPool2d"),
        (put_behind("6", {"class": "AdaptiveAvgPool1d", "output_size": 4}), "pools 1-dimensional channels"),
        (
            put_behind("4", {"class": "FirstSpikeMaxPool", "pool": {**POOL, "class": "MaxPool1d"}}),
            "pools 1-dimensional channels",
        ),
        (put_behind("1", {"class": "Add"}), "pools currents"),
        (put_behind("0", {"class": "FirstSpikeMaxPool", "pool": POOL}), "pools currents"),
        (put_behind("1", {"class": "FirstSpikeMaxPool", "pool": {"class": "Add"}}), "'Add'"),
        (put_behind("1", {"class": "FirstSpikeMaxPool", "pool": POOL, "x": 1}), "holds more or less than a pool"),
        (put_behind("1", {"class": "Upsample", "size": None, "scale_factor": 2e4, "mode": "nearest"}), "units"),
        (put_behind("1", {"class": "ZeroPad2d", "padding": [10**5] * 4}), "units"),
        (put_behind("1", {"class": "Slice", "dim": 1, "start": 2, "stop": 2, "step": 1}), "units"),
        (put_behind("5", {"class": "Unflatten", "dim": 0, "unflattened_size": [1, 1]}), "does not fit|mixes the batch"),
        (change_tensor("module.1.bias", lambda t: t.to(torch.int8)), "int8"),
        (change_tensor("module.1.bias", lambda t: t.to(torch.int64)), "int64"),
        (change_tensor("module.1.bias", lambda t: t.double()), "torch.float64, and the network in torch.float32"),
        (change_tensor("module.1.bias", lambda t: t.flatten()), "bias of shape"),
        (change_tensor("module.1.bias", lambda t: t.unsqueeze(0)), "bias of shape"),
        (change_tensor("module.1.bias", lambda t: t[:2]), "bias of shape"),
        (change_tensor("module.0.weight", lambda t: t.half()), "float16"),
        (change_tensor("scale.1", lambda t: t.expand(7)), "the scale of '1' is of shape .7."),
        (change_tensor("scale.1", lambda t: torch.ones((), dtype=torch.int32)), "the scale of '1'"),
        (lambda header, tensors: tensors.update({"x": torch.ones(1)}), "tensors that belong to no module"),
        (lambda header, tensors: tensors.update({"front.x": torch.ones(1)}), "tensors that belong to no module"),
        (lambda header, tensors: header.update(output_shift="0"), "output shift"),
        (lambda header, tensors: header["modules"].update({"a." * 400 + "a": {"class": "Add"}}), "names a module"),
    ],
)
def test_what_conversion_would_not_make_is_refused_by_name(snn, path, damage, why):
    snn.save(path)
    header, tensors = contents(path)
    damage(header, tensors)
    rewrite(path, header, tensors)
    message = refusal(path)
    assert "is damaged" in message
    assert re.search(why, message), message


@pytest.mark.parametrize("settings", [{"output_padding": [5]}, {"padding": "same"}, {"in_channels": 2}])
def test_settings_of_transposed_convolutions_that_torch_refuses_when_it_runs(path, settings):
    ann = nn.Sequential(nn.ConvTranspose1d(1, 1, 3, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(9, 2))
    ann[0].weight.data.abs_()
    ann[0].bias.data.abs_()
    quartz_plugin.convert(ann, torch.rand(20, 1, 4)).save(path)
    header, tensors = contents(path)
    header["modules"]["0"].update(settings)
    rewrite(path, header, tensors)
    refusal(path)


def test_a_thousand_modules_in_a_row_run_in_all_engines(snn, path):
    snn.save(path)
    header, tensors = contents(path)
    put_behind("1", *[SHIFT, {**SHIFT, "padding": [-1, 1, 0, 0]}] * 500)(header, tensors)
    rewrite(path, header, tensors)
    loaded, images = quartz_plugin.load(path), torch.rand(2, 1, 6, 6)
    results = [loaded.run(images, engine=engine) for engine in ("stepped", "event", "analytic")]
    assert all(torch.equal(result.logits, results[0].logits) for result in results)
    counts = InferenceCounts(loaded.graph, results[0])
    assert all(bool((count >= 0).all()) for name in ("synops", "pool_events") for count in counts[name].values())
    net = copy.deepcopy(loaded).to_snntorch()
    spikes = [net(step) for step in quartz_plugin.encode(images, loaded.t_max, loaded.n_steps)]
    assert torch.equal(loaded.decode(torch.stack(spikes)), results[0].logits)


def test_sums_of_sums_run_in_all_engines(path):
    """Thirty doublings are 2^30 paths from the input to the neurons."""
    ann = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    snn = quartz_plugin.convert(ann, torch.rand(20, 3), t_max=4)
    snn.save(path)
    header, tensors = contents(path)
    put_behind("0", *[{"class": "Add"}] * 30)(header, tensors)
    tensors["module.0.weight"] *= 2.0**-30
    rewrite(path, header, tensors)
    assert judge(path) == "runs"


def test_names_and_values_from_a_file_are_printed_without_control_characters(snn, path):
    snn.save(path)
    header, tensors = contents(path)
    evil = "\x1b[2J\x1b]0;owned\x07\u202e"
    for place in (["modules", evil], ["modules", "0", evil], ["modules", "0", "class"], ["t_max"], ["version"]):
        other = copy.deepcopy(header)
        at = other
        for key in place[:-1]:
            at = at[key]
        at[place[-1]] = evil
        rewrite(path, other, tensors)
        message = refusal(path)
        assert message.isprintable()
    for name in (evil, f"module.{evil}", f"scale.{evil}", f"front.{evil}"):
        rewrite(path, header, {**tensors, name: torch.tensor([float("nan")])})
        assert refusal(path).isprintable()
    save_file(tensors, path, metadata={FORMAT: json.dumps(header | {"version": "9" * 10**6})})
    assert len(refusal(path)) < 1000
    header["report"][0]["operation"] = evil
    rewrite(path, header, tensors)
    assert str(quartz_plugin.load(path).report).replace("\n", "").isprintable()


def test_what_could_not_be_read_is_not_written(snn, path):
    """One check stands before writing and behind reading."""
    edits = {
        "float16": lambda net: net.half(),
        "expected a whole number": lambda net: net.graph_module.set_submodule("4", nn.Flatten(0)),
        "of another kind": lambda net: net.graph_module.set_submodule("1", TTFSNeuron(6, readout=5, hold=False)),
        "has a bias": lambda net: net.graph_module.set_submodule("5", nn.Linear(12, 4)),
        "does not fit": lambda net: net.graph_module.set_submodule("5", nn.Linear(13, 4, bias=False)),
        "windows that end": lambda net: net.graph_module.set_submodule("4", AxonalDelay(2)),
        "not JSON serializable": lambda net: net.graph.settings.update(layers=object()),
    }
    for why, edit in edits.items():
        net = copy.deepcopy(snn)
        edit(net)
        with pytest.raises(ValueError, match=why) as caught:
            net.save(path)
        assert "\n" not in str(caught.value)
        assert not path.exists()


def test_an_upsampling_that_computes_its_factor_anew_is_the_same_when_loaded(path):
    up = nn.Upsample(scale_factor=1.25, recompute_scale_factor=True)
    ann = nn.Sequential(nn.Conv2d(1, 2, 1), nn.ReLU(), up, nn.Flatten(), nn.Linear(128, 2))
    ann[0].weight.data.abs_()
    ann[0].bias.data.abs_()
    images = torch.rand(20, 1, 7, 7)
    snn = quartz_plugin.convert(ann, images)
    shapes = unit_shapes(snn.graph)
    projection = snn.graph.layers[-1].projection
    for source, count in fan_out(projection, shapes).items():
        assert torch.equal(count, probed_fan_out(projection, shapes)[source])
    snn.save(path)
    assert_same_spikes(quartz_plugin.load(path), snn, images)


def test_pools_and_branches_come_back(path):
    torch.manual_seed(0)
    ann, images = Branches(), torch.rand(20, 2, 5, 5)
    for module in (ann.a, ann.b, ann.c, ann.d, ann.fc):
        module.bias.data.abs_()
    snn = quartz_plugin.convert(ann, images, t_max=5)
    snn.save(path)
    assert_same_spikes(quartz_plugin.load(path), snn, images)


def whole(kind):
    return {"numpy": np.int64, "torch": torch.tensor}[kind]


@pytest.mark.parametrize("kind", ["numpy", "torch"])
class TestNumbersOfNumpyAndTorch:
    """What is given as one is kept as Python's, and can be saved."""

    def assert_saved(self, path, ann, images, **options):
        snn = quartz_plugin.convert(ann, images, **options)
        snn.save(path)
        loaded = quartz_plugin.load(path)
        assert_same_spikes(loaded, snn, images)
        assert loaded.graph.settings == snn.graph.settings
        return snn

    def test_as_options(self, path, kind):
        number, real = whole(kind), {"numpy": np.float32, "torch": torch.tensor}[kind]
        ann, images = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 2)), torch.rand(30, 4)
        options = {
            "percentile": real(99.5),
            "output_percentile": number(100),
            "weight_bits": number(8),
            "tuning_passes": number(2),
            "tuning_rate": real(0.5),
            "hold": np.bool_(True) if kind == "numpy" else torch.tensor(True),
            "preprocessing": (real(0.5), real(0.25)),
            "layers": {"1": {"percentile": real(50.0), "t_max": number(6)}},
        }
        snn = self.assert_saved(path, ann, images, t_max={"default": number(8), "input": number(4)}, **options)
        assert snn.graph.settings["t_max"] == {"default": 8, "input": 4}
        assert snn.graph.settings["layers"] == {"1": {"percentile": 50.0, "t_max": 6}}
        assert type(snn.graph.settings["percentile"]) is float
        plain = {"percentile": 99.5, "output_percentile": 100, "weight_bits": 8, "preprocessing": (0.5, 0.25)}
        own = {"layers": {"1": {"percentile": 50.0, "t_max": 6}}, "t_max": {"default": 8, "input": 4}}
        assert_same_spikes(snn, quartz_plugin.convert(ann, images, **plain, **own), images)
        self.assert_saved(path, ann, images, t_max=number(5))

    def test_as_settings_of_modules(self, path, kind):
        number = whole(kind)
        two, one = number(2), number(1)
        ann = nn.Sequential(
            nn.Conv2d(1, 4, 3, stride=one if kind == "numpy" else 1, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.AvgPool2d(2), nn.ReLU(), nn.Upsample(scale_factor=2), nn.Hardtanh(0.0, 1.5), nn.PixelShuffle(2),
            nn.Flatten(1), nn.Linear(16, 2),
        )  # fmt: skip
        ann[0].padding, ann[0].groups, ann[0].dilation = (one, number(1)), one, (one, one)
        ann[2].kernel_size, ann[2].stride = two, (two, two)
        ann[3].kernel_size, ann[3].stride, ann[3].padding = (two, two), one, number(0)
        ann[5].scale_factor, ann[6].max_val = np.float64(1.0), np.float32(1.5)
        ann[7].upscale_factor, ann[8].start_dim = two, one
        ann[0].bias.data.abs_()
        self.assert_saved(path, ann, torch.rand(30, 1, 6, 6))

    def test_as_arguments_of_calls(self, path, kind):
        number = whole(kind)

        class Calls(nn.Module):
            def __init__(self):
                super().__init__()
                self.fc = nn.Linear(12, 4)

            def forward(self, x):
                x = F.avg_pool2d(x, number(1)).reshape(-1, number(2), number(8)).transpose(number(1), number(2))
                x = x[:, number(1) : number(7)].flatten(number(1)) * np.float32(0.5)
                return F.pad(self.fc(x).relu(), (number(1), 0))

        self.assert_saved(path, Calls(), torch.rand(30, 1, 4, 4))

    def test_as_parameters_of_neurons(self, kind):
        number = whole(kind)
        hold = np.bool_(True) if kind == "numpy" else torch.tensor(True)
        neuron = TTFSNeuron(number(8), number(2), hold=hold, readout=number(14), input_window=number(7))
        assert type(neuron.p.t_max) is int
        assert neuron.p._replace(spike_grad=None) == TTFSParameters(8, 2, True, readout=14, input_window=7)
        assert json.dumps([neuron.p.hold, neuron.p.readout, AxonalDelay(number(3)).steps]) == "[true, 14, 3]"
        assert len(quartz_plugin.encode(torch.rand(2, 3), number(4), number(6))) == 6

    def test_in_preparing_and_allocating(self, path, kind):
        number = whole(kind)
        ann, images = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 2)), torch.rand(30, 4)
        windows = quartz_plugin.allocate_steps(ann, images, number(40), choices=[number(2), number(4)])
        assert set(map(type, windows.values())) == {int}
        quartz_plugin.prepare_qat(ann, images, number(4)).eval().to_spiking(weight_bits=number(8)).save(path)
        assert quartz_plugin.load(path).graph.settings["weight_bits"] == 8
