"""Files: what is saved comes back; what is damaged is one ValueError; nothing in a file is ever run."""

import copy
import json
import os
import pickle
import struct

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from random_chains import NEURONS, SCALES, SOME, chains, first_spikes, input_train, t_maxima
from safetensors import safe_open
from safetensors.torch import save, save_file
from torch import nn

import quartz_plugin
from quartz_plugin import ConversionError
from quartz_plugin.io import FORMAT


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


def contents(path):
    with safe_open(path, framework="pt") as file:
        header = json.loads(file.metadata()[FORMAT])
        return header, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def rewrite(path, header, tensors):
    save_file(tensors, path, metadata={FORMAT: json.dumps(header)})


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


class Joined(nn.Module):
    """A network with every class of module that joins or routes."""

    def __init__(self):
        super().__init__()
        self.conv, self.side, self.fc = nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(2, 4, 1), nn.Linear(8, 3)

    def forward(self, x):
        x = self.conv(x).relu() + self.side(x)
        x = torch.cat([x, 2 * x[:, ::2]], 1).relu().view(-1, 2, 3, 4, 4).transpose(1, 2)
        x = nn.functional.interpolate(x.reshape(-1, 6, 4, 4), scale_factor=2)
        return self.fc(nn.functional.pad(x, (0, 0, 0, 0, 1, 1)).mean((2, 3)))


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
