"""The networks of the recipes by name, their weights, and what goes wrong with them."""

import sys
import urllib.error

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

pytest.importorskip("lightning", reason="needs the extra recipes")

import torchvision

import quartz_plugin
from quartz_plugin.hardware import ann_costs
from quartz_plugin.hardware.operations import neuron_count
from quartz_plugin.lightning.networks import NETWORKS, ResNet20, build, load_weights, vgg_cifar10

SIZES = {
    "quartz_mnist": (1, 28, 28),
    "vgg_cifar10": (3, 32, 32),
    "vgg11_bn_cifar10": (3, 32, 32),
    "resnet20": (3, 32, 32),
    "mobilenet_v1": (3, 128, 128),
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
    assert own == {**dict.fromkeys(NETWORKS, 10), "mobilenet_v1": 1000}


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
