"""The networks of the recipes by name, their weights, and what goes wrong with them."""

import argparse
import collections
import contextlib
import copy
import random
import re
import sys
import urllib.error
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

pytest.importorskip("lightning", reason="needs the extra recipes")

import torchvision

import quartz_plugin
from quartz_plugin.costs import ann_costs
from quartz_plugin.costs.counts import neuron_count
from quartz_plugin.lightning.build import build
from quartz_plugin.lightning.networks import NETWORKS, ResNet20, vgg_cifar10
from quartz_plugin.lightning.notes import UNKNOWN_DATA, class_names_of
from quartz_plugin.lightning.weights import fill, load_weights, read_dataset_name

SIZES = {
    "quartz_mnist": (1, 28, 28),
    "vgg_cifar10": (3, 32, 32),
    "vgg11_bn_cifar10": (3, 32, 32),
    "resnet20": (3, 32, 32),
    "mobilenet_v1": (3, 128, 128),
    "efficientnet_lite0": (3, 224, 224),
}

MINE = """
from torch import nn

class Classes(nn.Linear):
    def __init__(self, classes=4, width=5):
        super().__init__(width, classes)

class NumClasses(nn.Linear):
    def __init__(self, num_classes=4, width=5):
        super().__init__(width, num_classes)

class Fixed(nn.Linear):
    def __init__(self, width=5):
        super().__init__(width, 4)

def made(classes=4):
    return Classes(classes)

def no_module():
    return 3

def no_module_of_classes(classes):
    return [classes]

number = 5
"""


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """A module of networks in the working directory."""
    (tmp_path / "my_own_networks.py").write_text(MINE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield tmp_path
    sys.modules.pop("my_own_networks", None)


class Plain(nn.Module):
    """A small network with a head."""

    def __init__(self, classes=4, width=6, heads=1):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(3, width), nn.BatchNorm1d(width), nn.ReLU())
        self.heads = nn.ModuleList(nn.Linear(width, classes) for _ in range(heads))

    def forward(self, x):
        return sum(head(self.body(x)) for head in self.heads)


def copy_of(network):
    return {name: value.clone() for name, value in network.state_dict().items()}


def test_the_sizes_are_of_all_networks():
    assert set(SIZES) == set(NETWORKS)


@pytest.mark.parametrize("name", NETWORKS)
def test_each_network_has_as_many_outputs_as_it_is_asked_for(name):
    network, fresh = build(name, classes=7)
    assert fresh == []
    with torch.no_grad():
        logits = network.eval()(torch.rand(1, *SIZES[name]))
    assert logits.shape == (1, 7)
    assert logits.isfinite().all()


def test_without_a_number_of_classes_a_network_keeps_its_own():
    own = {name: list(build(name)[0].state_dict().values())[-1].shape[0] for name in NETWORKS}
    assert own == {**dict.fromkeys(NETWORKS, 10), "mobilenet_v1": 1000, "efficientnet_lite0": 1000}


def test_arguments_reach_the_constructor_and_win_over_the_number_of_classes():
    assert build("mobilenet_v1", 7, arguments={"width": 0.5})[0].classifier.in_features == 512
    assert build("resnet20", 7, arguments={"classes": 3})[0].linear.out_features == 3
    arguments = {"dropout": 0.25}
    network, _ = build("squeezenet1_1", 7, arguments=arguments)
    assert (network.classifier[0].p, network.classifier[1].out_channels) == (0.25, 7)
    assert arguments == {"dropout": 0.25}


@pytest.mark.parametrize("name", ["squeezenet1_1", "shufflenet_v2_x0_5"])
def test_networks_of_torchvision_go_by_their_names(name):
    network, fresh = build(name, classes=7)
    assert isinstance(network, type(torchvision.models.get_model(name)))
    assert fresh == []
    with torch.no_grad():
        assert network.eval()(torch.rand(1, 3, 64, 64)).shape == (1, 7)


def test_networks_of_ones_own_are_found_in_the_working_directory(mine):
    for name, classes, outputs in (
        ("Classes", 7, 7),
        ("Classes", None, 4),
        ("NumClasses", 7, 7),
        ("NumClasses", None, 4),
        ("Fixed", 7, 4),
        ("made", 7, 7),
    ):
        network, fresh = build(f"my_own_networks.{name}", classes)
        assert (network.in_features, network.out_features, fresh) == (5, outputs, [])
    assert build("my_own_networks.NumClasses", 7, arguments={"width": 2})[0].weight.shape == (7, 2)
    save_file({"weight": torch.full((4, 5), 2.0), "bias": torch.zeros(4)}, mine / "w.safetensors")
    network, fresh = build("my_own_networks.Classes", weights="w.safetensors")
    assert fresh == []
    assert network(torch.ones(1, 5)).tolist() == [[10.0] * 4]
    assert set(build("my_own_networks.Classes", 7, weights="w.safetensors")[1]) == {"weight", "bias"}


def test_a_package_within_the_working_directory_and_an_installed_one_are_found(mine):
    (mine / "my_own_package").mkdir()
    (mine / "my_own_package" / "networks.py").write_text(MINE)
    assert build("my_own_package.networks.Classes", 7)[0].out_features == 7
    assert isinstance(build("quartz_plugin.lightning.networks.ResNet20", 7)[0], ResNet20)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("resnet21", "no network is called 'resnet21'; did you mean resnet20"),
        ("mobilenetv1", "did you mean mobilenet_v1"),
        ("vgg_cifar", "did you mean vgg_cifar10"),
        ("squeezenet", "did you mean squeezenet1_"),
        ("zzqqxx", "no network is called 'zzqqxx'"),
        ("fasterrcnn_resnet50_fpn", "no network is called"),
        ("my_own_networks.Nothing", "cannot import my_own_networks.Nothing"),
        ("no_such_module.Network", "cannot import no_such_module.Network: No module named 'no_such_module'"),
        ("my_own_networks.no_module", "my_own_networks.no_module makes a int, not a torch.nn.Module"),
        ("my_own_networks.no_module_of_classes", "makes a list, not a torch.nn.Module"),
    ],
)
@pytest.mark.usefixtures("mine")
def test_what_is_no_network_is_refused_in_one_line(name, says):
    with pytest.raises(ValueError, match=says) as raised:
        build(name, classes=3)
    assert "\n" not in str(raised.value)


def test_an_unknown_name_comes_with_those_there_are_and_a_guess_only_if_it_is_near():
    with pytest.raises(ValueError, match=r"There are quartz_mnist, vgg_cifar10, .* your own class$") as raised:
        build("zzqqxx")
    assert "did you mean" not in str(raised.value)


def test_the_line_about_an_unknown_name_is_punctuated():
    with pytest.raises(ValueError, match=r"'zzqqxx'[.;:?] There are"):
        build("zzqqxx")


@pytest.mark.parametrize("name", ["my_own_networks.number", "./my_own_networks.Classes", "../my_own_networks.Classes"])
@pytest.mark.usefixtures("mine")
def test_what_cannot_be_called_or_imported_is_refused_too(name):
    with pytest.raises(ValueError, match=r"my_own_networks"):
        build(name, classes=3)


@pytest.mark.parametrize("name", ["resnet20", "squeezenet1_1", "my_own_networks.Classes"])
@pytest.mark.usefixtures("mine")
def test_arguments_that_do_not_fit_are_named(name):
    with pytest.raises(ValueError, match=rf"^{name} cannot be made with .*'colour': 'red'.*colour") as raised:
        build(name, 3, arguments={"colour": "red"})
    assert "\n" not in str(raised.value)


# Weights.


@pytest.fixture(params=["safetensors", "pt"])
def stored(request, tmp_path):
    """Writes a state dict, in either form."""

    def write(state, name="w"):
        path = tmp_path / f"{name}.{request.param}"
        if request.param == "pt":
            torch.save(state, path)
        else:
            save_file(state, path)
        return path

    return write


def test_weights_of_the_same_network_are_loaded_whole(stored):
    source, _ = build("resnet20", 7)
    source.bn1.running_mean.uniform_()
    path = stored(source.state_dict())
    for network, fresh in (build("resnet20", 7, str(path)), (other := ResNet20(7), load_weights(other, path))):
        assert fresh == []
        for name, value in source.state_dict().items():
            assert torch.equal(network.state_dict()[name], value)


@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("classes", [1, 9])
def test_of_another_number_of_classes_all_but_the_heads_are_loaded(stored, heads, classes):
    source, target = Plain(4, heads=heads), Plain(classes, heads=heads)
    source.body[1].running_var.uniform_(1, 2)
    before = copy_of(target)
    fresh = load_weights(target, stored(source.state_dict()))
    assert sorted(fresh) == sorted(f"heads.{head}.{kind}" for head in range(heads) for kind in ("bias", "weight"))
    for name, value in target.state_dict().items():
        assert value.isfinite().all()
        assert torch.equal(value, before[name] if name in fresh else source.state_dict()[name])
        if name not in fresh and value.ndim > 1:
            assert not torch.equal(value, before[name])
    assert target.eval()(torch.rand(2, 3)).shape == (2, classes)


def test_weights_of_another_number_of_classes_by_name(stored):
    source, _ = build("vgg_cifar10", 10)
    path = stored(source.state_dict())
    network, fresh = build("vgg_cifar10", 3, str(path))
    assert sorted(fresh) == ["31.bias", "31.weight"]
    assert torch.equal(network[0].weight, source[0].weight)
    head = network[31].weight
    assert head.shape == (3, 256)
    assert 0 < float(head.detach().std()) < 1
    assert network.eval()(torch.rand(1, 3, 32, 32)).isfinite().all()


@pytest.mark.parametrize(
    "state",
    [
        Plain(4, width=7).state_dict(),
        Plain(4, heads=2).state_dict(),
        Plain(9, heads=2).state_dict(),
        {name: value for name, value in Plain(4).state_dict().items() if name != "body.0.bias"},
        {name: value for name, value in Plain(9).state_dict().items() if name != "body.0.bias"},
        nn.Linear(3, 4).state_dict(),
        {},
    ],
    ids=["width", "more heads", "more of others", "one missing", "one missing of others", "names", "nothing"],
)
def test_weights_of_another_network_are_refused_in_one_line(stored, state):
    path = stored(state)
    with pytest.raises(ValueError, match=f"^{path} holds the weights of another network: ") as raised:
        load_weights(Plain(4), path)
    assert "\n" not in str(raised.value)
    assert len(str(raised.value)) < len(str(path)) + 350


def test_heads_of_different_numbers_of_classes_are_another_network(stored):
    source = Plain(4, heads=2)
    source.heads[1] = nn.Linear(6, 5)
    with pytest.raises(ValueError, match="another network"):
        load_weights(Plain(9, heads=2), stored(source.state_dict()))


def test_a_number_in_the_place_of_a_vector_is_another_network(stored):
    state = {**nn.Linear(2, 3).state_dict(), "bias": torch.tensor(1.0)}
    with pytest.raises(ValueError, match="another network"):
        load_weights(nn.Linear(2, 3), stored(state))


def test_files_that_are_not_there_or_hold_no_weights_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no weights file .*nowhere.pt"):
        build("resnet20", weights=str(tmp_path / "nowhere.pt"))
    with pytest.raises(FileNotFoundError, match=r"no weights file .*nowhere.pt"):
        build("squeezenet1_1", weights=str(tmp_path / "nowhere.pt"))
    with pytest.raises(FileNotFoundError, match="no weights file DEFAULT"):
        build("resnet20", weights="DEFAULT")
    torch.save([torch.rand(3)], tmp_path / "list.pt")
    (tmp_path / "text.pt").write_text("text")
    (tmp_path / "text.safetensors").write_text("text")
    for name in ("list.pt", "text.pt", "text.safetensors"):
        with pytest.raises(ValueError, match=f"{name} is not a readable file of weights"):
            load_weights(Plain(), tmp_path / name)


class Code:
    """Would run code when it is unpickled."""

    def __reduce__(self):
        return (exec, ("import pathlib; pathlib.Path('ran').touch()",))


def test_no_code_is_run_from_a_file_of_weights(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({**Plain().state_dict(), "code": Code()}, "code.pt")
    with pytest.raises(ValueError, match="not a readable file"):
        load_weights(Plain(), "code.pt")
    assert not (tmp_path / "ran").exists()


# Weights as people have them.


def prefixed(prefix, state):
    return {f"{prefix}{name}": value for name, value in state.items()}


def with_segments(state):
    """As a network saves that has DataParallel and torch.compile within it."""
    return {name.replace("body.", "body.module._orig_mod."): value for name, value in state.items()}


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: prefixed("module.", state),
        lambda state: prefixed("model.", state),
        lambda state: prefixed("_orig_mod.", state),
        lambda state: prefixed("module._orig_mod.", state),
        lambda state: prefixed("_orig_mod.module.", state),
        lambda state: prefixed("net.", state),
        lambda state: prefixed("model.net.module.", state),
        with_segments,
        lambda state: {"n_averaged": torch.tensor(3), **prefixed("module.", state)},
        lambda state: {name: value for name, value in state.items() if "num_batches_tracked" not in name},
    ],
    ids=["module", "model", "_orig_mod", "module._orig_mod", "_orig_mod.module", "net", "three", "within", "averaged",
         "old batch norm"],
)  # fmt: skip
@pytest.mark.parametrize("safetensors", [False, True])
def test_weights_are_found_behind_prefixes(tmp_path, wrap, safetensors):
    source, target = Plain(), Plain()
    source.body[1].running_mean.uniform_()
    state = wrap(copy_of(source))
    path = tmp_path / ("w.safetensors" if safetensors else "w.pt")
    (save_file if safetensors else torch.save)(state, path)
    assert load_weights(target, path) == []
    for name, value in target.state_dict().items():
        assert torch.equal(value, source.state_dict()[name]), name


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: {"model": state},
        lambda state: {"net": prefixed("module.", state), "acc": 91.2, "epoch": 7},
        lambda state: {"state_dict": prefixed("module.", state), "best_acc1": torch.tensor(70.0), "arch": "resnet18"},
        lambda state: {"model_state_dict": state, "optimizer_state_dict": {"state": {0: {"step": torch.tensor(5.0)}}}},
        lambda state: {"state_dict": {**prefixed("model.", state), "loss.weight": torch.ones(4)}, "hparams": {}},
        lambda state: {"model": state, "args": argparse.Namespace(lr=0.1, model="resnet18")},
        lambda state: {"checkpoint": {"model": {"state_dict": state}}},
        lambda state: {"generator": {"0.weight": torch.ones(3, 3)}, "discriminator": state},
        lambda state: {"model": state, "state_dict": copy.deepcopy(state)},
        lambda state: {"model_ema": prefixed("module.", state)},
        lambda state: collections.OrderedDict(state_dict=collections.OrderedDict(state)),
    ],
    ids=["model", "net", "imagenet", "tutorial", "lightning", "torchvision", "nested", "gan", "twice", "ema",
         "ordered"],
)  # fmt: skip
@pytest.mark.parametrize("legacy", [False, True])
def test_weights_are_found_within_checkpoints(tmp_path, wrap, legacy):
    source, target = Plain(), Plain()
    torch.save(wrap(copy_of(source)), tmp_path / "w.pth.tar", _use_new_zipfile_serialization=not legacy)
    assert load_weights(target, tmp_path / "w.pth.tar") == []
    for name, value in target.state_dict().items():
        assert torch.equal(value, source.state_dict()[name]), name


def test_of_another_number_of_classes_behind_a_prefix_all_but_the_head_is_loaded(tmp_path):
    source, target = Plain(4), Plain(9)
    torch.save({"state_dict": prefixed("module.", copy_of(source))}, tmp_path / "w.pt")
    assert sorted(load_weights(target, tmp_path / "w.pt")) == ["heads.0.bias", "heads.0.weight"]
    assert torch.equal(target.body[0].weight, source.body[0].weight)


@pytest.mark.parametrize("name", ["model_ema", "ema_state_dict", "averaged_model"])
def test_of_weights_and_their_running_means_the_weights_are_taken_with_a_warning(tmp_path, name):
    source, mean, target = Plain(), Plain(), Plain()
    torch.save({"model": copy_of(source), name: prefixed("module.", copy_of(mean))}, tmp_path / "w.pt")
    with pytest.warns(UserWarning, match=rf"running means of the weights as well \({name}\)"):
        load_weights(target, tmp_path / "w.pt")
    assert torch.equal(target.body[0].weight, source.body[0].weight)


def test_of_several_networks_that_fit_none_is_taken(tmp_path):
    states = {f"{who}.{name}": value for who in ("student", "teacher") for name, value in copy_of(Plain()).items()}
    states["student.body.0.weight"] = torch.ones(6, 3)
    torch.save({"state_dict": states}, tmp_path / "w.pt")
    target = Plain()
    before = copy_of(target)
    with pytest.raises(ValueError, match=r"holds 2 networks that fit \(state_dict.student, state_dict.teacher\)"):
        load_weights(target, tmp_path / "w.pt")
    assert all(torch.equal(value, before[name]) for name, value in target.state_dict().items())
    # Of another shape, one of them is out of the question.
    states["teacher.body.0.weight"] = torch.ones(6, 5)
    torch.save({"state_dict": states}, tmp_path / "w.pt")
    load_weights(target, tmp_path / "w.pt")
    assert torch.equal(target.body[0].weight, torch.ones(6, 3))


def test_a_part_of_a_network_that_looks_like_the_whole_is_not_taken_for_it(tmp_path):
    inner = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3))
    torch.save(nn.Sequential(nn.Linear(3, 3), inner, nn.Linear(3, 3)).state_dict(), tmp_path / "w.pt")
    with pytest.raises(ValueError, match=r"another network: 4 unexpected \(1.0.weight, 1.0.bias, 1.2.weight, ...\)$"):
        load_weights(nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3)), tmp_path / "w.pt")


def test_what_does_not_fit_is_named_by_its_kind(tmp_path):
    state = copy_of(Plain(heads=4))
    del state["body.0.bias"], state["body.1.running_var"]
    state["body.0.weight"] = torch.ones(6, 5)
    state["body.1.weight"] = torch.ones(6, dtype=torch.int8)
    state["evil\x1b[31m\nname"] = torch.ones(1)
    torch.save({"model": prefixed("module.", state)}, tmp_path / "w.pt")
    target = Plain()
    before = copy_of(target)
    with pytest.raises(ValueError, match="another network: ") as raised:
        load_weights(target, tmp_path / "w.pt")
    line = str(raised.value)
    assert line.isprintable()
    assert "2 missing (body.0.bias, body.1.running_var), " in line
    assert "7 unexpected (heads.1.weight, heads.1.bias, heads.2.weight, ...), " in line
    assert "1 of another shape (body.0.weight [6, 5] for [6, 3]), " in line
    assert line.endswith("1 of another type (body.1.weight torch.int8 for torch.float32)")
    assert all(torch.equal(value, before[name]) for name, value in target.state_dict().items())
    del state["evil\x1b[31m\nname"]
    torch.save({**state, "evil\x1b[31m\nname": torch.ones(1)}, tmp_path / "w.pt")
    with pytest.raises(ValueError, match=r"1 unexpected \(evil\\x1b\[31m name\)"):
        load_weights(Plain(heads=4), tmp_path / "w.pt")


def test_weights_that_are_not_finite_are_refused(tmp_path):
    state = copy_of(Plain())
    state["body.0.weight"][0, 0] = torch.nan
    torch.save(state, tmp_path / "w.pt")
    with pytest.raises(ValueError, match=r"w.pt: body.0.weight contains NaN or infinity"):
        load_weights(Plain(), tmp_path / "w.pt")


def test_weights_of_the_older_weight_norm_are_translated_by_torch(tmp_path):
    def network(norm):
        return nn.Sequential(norm(nn.Linear(3, 4)), nn.ReLU(), nn.Linear(4, 2))

    with pytest.warns(FutureWarning, match="weight_norm"):
        source = network(torch.nn.utils.weight_norm)
    target = network(torch.nn.utils.parametrizations.weight_norm)
    torch.save({"net": copy_of(source)}, tmp_path / "w.pt")
    assert load_weights(target, tmp_path / "w.pt") == []
    x = torch.rand(5, 3)
    assert torch.allclose(target(x), source(x))
    before = copy_of(target)
    torch.save(
        {"0.weight_g": torch.ones(4, 1), "0.weight_v": torch.ones(4, 3), "0.bias": torch.ones(4)}, tmp_path / "w.pt"
    )
    with pytest.raises(ValueError, match="another network"):
        load_weights(target, tmp_path / "w.pt")
    assert all(torch.equal(value, before[name]) for name, value in target.state_dict().items())


def test_densenets_are_read_as_torchvision_publishes_them():
    source = torchvision.models.DenseNet(4, (1, 1), 8)
    for part in ("norm1", "conv1", "norm2", "conv2"):
        assert any(f"denselayer1.{part}." in name for name in source.state_dict())
    old = {
        re.sub(r"(denselayer1\.)(norm|conv)([12])\.", r"\1\2.\3.", name): value
        for name, value in source.state_dict().items()
    }
    assert "features.denseblock1.denselayer1.norm.1.weight" in old
    target = torchvision.models.DenseNet(4, (1, 1), 8)
    assert fill(target, old, "old") == []
    assert all(torch.equal(value, source.state_dict()[name]) for name, value in target.state_dict().items())


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ({"model": Plain()}, r"it holds a \S*Plain, and code from files is not run: save the network's state_dict\(\)"),
        ([torch.ones(3)], "it holds a list, not a state dict"),
        (torch.ones(3), "it holds a Tensor, not a state dict"),
        (None, "it holds a NoneType, not a state dict"),
        ({"path": Path("x")}, "it holds a pathlib.*, and code from files is not run"),
    ],
    ids=["module", "list", "tensor", "nothing", "path"],
)
def test_what_a_file_holds_instead_of_weights_is_told(tmp_path, content, says):
    torch.save(content, tmp_path / "w.pt")
    with pytest.raises(ValueError, match=rf"w.pt is not a readable file of weights \({says}") as raised:
        load_weights(Plain(), tmp_path / "w.pt")
    assert str(raised.value).isprintable()


def test_dictionaries_that_hold_each_other_end(tmp_path):
    inner = {}
    loop = {"model": inner, "again": inner}
    inner["back"] = loop
    inner.update(copy_of(Plain()))
    torch.save(loop, tmp_path / "w.pt")
    assert load_weights(Plain(), tmp_path / "w.pt") == []


def test_damaged_files_of_weights_are_refused_in_one_line_whatever_is_wrong(tmp_path):
    draw = random.Random(0)
    refused = 0
    odd = [None, 3, "text", [1], {}, 10**400, float("nan"), torch.ones(2, dtype=torch.int64), torch.tensor(1 + 1j),
           torch.ones(3, 4).to_sparse(), torch.empty(0), (), b"bytes", torch.ones(1).expand(10**9)]  # fmt: skip
    for number in range(200):
        state = dict(copy_of(Plain()))
        path = tmp_path / f"{number}.{draw.choice(['pt', 'ckpt'])}"
        for _ in range(draw.randrange(3)):
            state[draw.choice([*state, "more", 5, ("a", 2), "a\x1bb"])] = draw.choice(odd)
        content = draw.choice([state, {"state_dict": state}, {"model": state, "model_ema": draw.choice(odd)}])
        if any(value is odd[-1] for value in state.values()):
            state = {name: value for name, value in state.items() if value is not odd[-1]}  # Saved whole, it is 4 GB.
            content = state
        torch.save(content, path, _use_new_zipfile_serialization=draw.random() < 0.7)
        if draw.random() < 0.5:
            data = bytearray(path.read_bytes())
            if draw.random() < 0.5:
                del data[draw.randrange(len(data)) :]
            for _ in range(draw.randrange(6)):
                if data:
                    data[draw.randrange(len(data))] = draw.randrange(256)
            path.write_bytes(data)
        target = Plain()
        before = copy_of(target)
        try:
            load_weights(target, path)
        except ValueError as error:
            assert str(error).isprintable(), repr(error)  # noqa: PT017
            assert path.name in str(error)  # noqa: PT017
            assert all(torch.equal(value, before[name]) for name, value in target.state_dict().items())
            refused += 1
        told = UNKNOWN_DATA
        with contextlib.suppress(ValueError):
            told = read_dataset_name(str(path))
        assert told == UNKNOWN_DATA
    assert 60 < refused < 190


@pytest.mark.parametrize("value", [5, ["x"], {}, None, b"x", torch.ones(2)])
def test_notes_of_odd_types_are_no_notes(tmp_path, value):
    torch.save({**copy_of(Plain()), "fitted_on": value}, tmp_path / "w.pt")
    assert read_dataset_name(str(tmp_path / "w.pt")) == UNKNOWN_DATA
    if value is not None:
        with pytest.raises(ValueError, match=r"^its class names are no list of texts, but "):
            class_names_of({"class_names": value if value != ["x"] else ["x", 5]})


def test_an_archive_that_would_become_larger_than_it_is_is_refused(tmp_path):
    torch.save({"weight": torch.zeros(4, 10**6), "bias": torch.zeros(4)}, tmp_path / "w.pt")
    small = zipfile.ZipFile(tmp_path / "small.pt", "w", zipfile.ZIP_DEFLATED)
    with zipfile.ZipFile(tmp_path / "w.pt") as stored, small as packed:
        for entry in stored.infolist():
            packed.writestr(entry.filename, stored.read(entry))
    for read in (read_dataset_name, lambda path: load_weights(nn.Linear(10**6, 4), path)):
        with pytest.raises(ValueError, match=r"small.pt is not a readable file of weights \(.*16,\d\d\d,\d\d\d bytes"):
            read(str(tmp_path / "small.pt"))
        read(str(tmp_path / "w.pt"))


def test_huge_tensors_of_small_files_take_no_memory(tmp_path):
    """A view of one number as 10^12 of them: only its shape is looked at."""
    storage = torch.ones(1)
    state = {**copy_of(Plain()), "body.0.weight": storage.expand(10**6, 10**6)}
    torch.save(state, tmp_path / "w.pt")
    assert (tmp_path / "w.pt").stat().st_size < 10_000
    with pytest.raises(ValueError, match=r"body.0.weight \[1000000, 1000000\] for \[6, 3\]"):
        load_weights(Plain(), tmp_path / "w.pt")


# Published weights; none is downloaded.


@pytest.fixture
def published(monkeypatch):
    """Sets what a download gives: a state dict, or an error."""

    def set_to(result):
        def load(url, *args, **kwargs):
            assert url.startswith("https://download.pytorch.org/")
            if isinstance(result, BaseException):
                raise result
            return result

        monkeypatch.setattr(torch.hub, "load_state_dict_from_url", load)
        monkeypatch.setattr(torchvision.models._api, "load_state_dict_from_url", load)

    return set_to


@pytest.mark.parametrize("weights", ["DEFAULT", "IMAGENET1K_V1"])
def test_published_weights_fill_a_network(published, weights):
    source = torchvision.models.squeezenet1_1()
    published(source.state_dict())
    network, fresh = build("squeezenet1_1", 1000, weights)
    assert fresh == []
    assert all(torch.equal(value, source.state_dict()[name]) for name, value in network.state_dict().items())
    network, fresh = build("squeezenet1_1", 7, weights)
    assert sorted(fresh) == ["classifier.1.bias", "classifier.1.weight"]
    assert torch.equal(network.features[0].weight, source.features[0].weight)
    assert network.classifier[1].weight.shape[0] == 7


def test_unknown_published_weights_come_with_those_there_are(published):
    published(AssertionError("nothing is to be downloaded"))
    with pytest.raises(
        ValueError, match=r"squeezenet1_1 has the published weights IMAGENET1K_V1.*got 'BEST'"
    ) as raised:
        build("squeezenet1_1", 7, "BEST")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "error", [urllib.error.URLError("no route"), ConnectionResetError("reset"), TimeoutError("late")]
)
def test_a_failed_download_says_what_to_do_in_one_line(published, error):
    published(error)
    with pytest.raises(ValueError, match=r"^could not download https://.*give --model.weights a file") as raised:
        build("squeezenet1_1", weights="DEFAULT")
    assert "\n" not in str(raised.value)


def test_a_cut_off_download_says_what_to_do(published):
    published(RuntimeError('invalid hash value (expected "b8a52dc0", got "e3b0c442")'))
    with pytest.raises(ValueError, match="could not download"):
        build("squeezenet1_1", weights="DEFAULT")


def test_published_weights_come_with_the_options_they_were_trained_with(published):
    sparse = {"init_weights": False}
    published(torchvision.models.googlenet(**sparse).state_dict())
    network, _ = build("googlenet", weights="DEFAULT", arguments=sparse)
    assert network.transform_input == torchvision.models.googlenet(weights="DEFAULT").transform_input is True


# Their sizes.


def convolutions(width):
    """(channels in, channels out, size of the image) of VGG11 for 32 x 32 pixels."""
    channels = [3, *(factor * width for factor in (1, 2, 4, 4, 8, 8, 8, 8))]
    return list(zip(channels, channels[1:], (32, 16, 8, 8, 4, 4, 2, 2), strict=False))


def test_vgg_cifar10_has_the_neurons_and_multiplications_documented_borders_exact():
    # Of a row of 3 weights moved along n pixels, 3 n - 2 meet one.
    by_hand = sum(inputs * outputs * (3 * size - 2) ** 2 for inputs, outputs, size in convolutions(32)) + 256 * 10
    assert round(by_hand / 1e6, 1) == 29.0
    assert sum(outputs * size**2 for _, outputs, size in convolutions(32)) + 10 == 75_786
    costs = ann_costs(vgg_cifar10().eval(), torch.rand(1, 3, 32, 32))
    assert (costs["macs"], costs["memory_writes"]) == (by_hand, 75_786)


def test_vgg_cifar10_converts_and_runs():
    network = vgg_cifar10(7).eval()
    images = torch.rand(4, 3, 32, 32)
    snn = quartz_plugin.convert(network, images, 16)
    with torch.no_grad():
        logits = snn(images[:2])
    assert logits.shape == (2, 7)
    assert logits.isfinite().all()
    assert neuron_count(snn.graph) == 75_786 - 3


def test_vgg11_bn_cifar10_has_the_neurons_documented_and_its_multiplications_with_borders_are():
    linear = 512 * 4096 + 4096 * 4096 + 4096 * 10
    whole, exact = (
        sum(inputs * outputs * one_row(size) ** 2 for inputs, outputs, size in convolutions(64)) + linear
        for one_row in (lambda size: 3 * size, lambda size: 3 * size - 2)
    )
    costs = ann_costs(build("vgg11_bn_cifar10")[0].eval(), torch.rand(1, 3, 32, 32))
    assert (costs["macs"], costs["memory_writes"]) == (exact, 159_754)
    assert (round(whole / 1e6, 1), round(exact / 1e6, 1)) == (171.7, 133.2)


def test_quartz_mnist_has_the_neurons_documented():
    costs = ann_costs(build("quartz_mnist")[0].eval(), torch.rand(1, 1, 28, 28))
    assert (costs["memory_writes"], costs["macs"]) == (4_354, 225_840)
