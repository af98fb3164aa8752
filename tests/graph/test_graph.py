"""The converted graph: edited by hand, and what its readers make of that."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import quartz_plugin
from quartz_plugin.operators.modules import OneToOne


@pytest.fixture
def snn():
    ann = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
    return quartz_plugin.convert(ann, torch.rand(50, 4), 8)


def insert(snn, function):
    """Put a function between the last synapses and the output neurons."""
    graph = snn.graph_module.graph
    last = next(node for node in graph.nodes if node.target == "2")
    with graph.inserting_after(last):
        node = graph.call_function(function, (last, 0.5))
    last.replace_all_uses_with(node, delete_user_cb=lambda user: user is not node)
    snn.graph_module.recompile()


def test_a_function_put_in_by_hand_runs_but_is_neither_saved_nor_exported(snn, tmp_path):
    images = torch.rand(5, 4)
    before = snn(images)
    insert(snn, torch.mul)
    assert not torch.equal(snn(images), before)
    for carry in (snn.to_snntorch, snn.to_norse, lambda: snn.save(tmp_path / "snn.safetensors")):
        with pytest.raises(ValueError, match="put what it does into a module"):
            carry()
    assert not list(tmp_path.iterdir())


def test_a_module_put_in_by_hand_is_run_saved_and_exported(snn, tmp_path):
    images = torch.rand(5, 4)
    graph = snn.graph_module.graph
    snn.graph_module.add_submodule("halved", OneToOne(torch.full((3,), 0.5)))
    last = next(node for node in graph.nodes if node.target == "2")
    with graph.inserting_after(last):
        node = graph.call_module("halved", (last,))
    last.replace_all_uses_with(node, delete_user_cb=lambda user: user is not node)
    snn.graph_module.recompile()
    snn.save(tmp_path / "snn.safetensors")
    result = snn.run(images, engine="stepped")
    assert torch.equal(quartz_plugin.load(tmp_path / "snn.safetensors")(images), result.logits)
    net = snn.to_snntorch()
    outputs = torch.stack([net(spikes) for spikes in quartz_plugin.encode(images, 8, snn.n_steps)])
    steps = torch.where(outputs.any(0), outputs.argmax(0), -1)
    assert torch.equal(steps.int(), result.spike_steps["output"])


def test_a_network_in_half_precision_is_refused(snn):
    with pytest.raises(ValueError, match="cannot hold the membrane"):
        snn.half()(torch.rand(1, 4))


def test_an_ann_in_bfloat16_becomes_a_network_in_float32():
    ann = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)).bfloat16()
    snn = quartz_plugin.convert(ann, torch.rand(50, 4), 64)
    assert snn(torch.rand(2, 4)).dtype == torch.float32
    assert next(ann.parameters()).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"linear": "pairs"}, r'linear must be "compose" or "pair"'),
        ({"hold": "no"}, "hold must be True or False"),
        ({"example_input": torch.rand(1, 5)}, "not one of calibration images"),
        ({"example_input": torch.full((1, 4), 2.0)}, "example_input must lie in"),
    ],
)
def test_options_that_cannot_be_meant_are_refused(options, says):
    with pytest.raises(ValueError, match=says):
        quartz_plugin.convert(nn.Linear(4, 3), torch.rand(5, 4), **options)


@pytest.mark.parametrize("name", ["prune", "weight_norm"])
def test_a_network_that_computes_its_weights_is_converted_as_it_computes(name):
    layer, images = nn.Linear(4, 3), torch.rand(5, 4)
    if name == "prune":
        prune.l1_unstructured(layer, "weight", 0.5)
        layer(torch.rand(2, 4))
    else:
        layer = torch.nn.utils.parametrizations.weight_norm(layer)
    plain = nn.Linear(4, 3)
    plain.weight.data, plain.bias.data = layer.weight.detach().clone(), layer.bias.detach().clone()
    snn = quartz_plugin.convert(nn.Sequential(layer), images)
    torch.testing.assert_close(snn(images), quartz_plugin.convert(nn.Sequential(plain), images)(images))


def test_a_network_that_cannot_be_copied_says_what_to_do():
    layer = nn.Linear(4, 3)
    layer.generator = (number for number in range(3))
    with pytest.raises(
        quartz_plugin.ConversionError, match=r"cannot be copied: .*give a network that copy.deepcopy can copy"
    ):
        quartz_plugin.convert(nn.Sequential(layer), torch.rand(5, 4))


def test_a_folder_that_is_not_there_is_named(snn, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no folder .*nowhere to write snn.safetensors into"):
        snn.save(tmp_path / "nowhere" / "snn.safetensors")


def test_weights_that_are_not_finite_are_neither_written_nor_read(snn, tmp_path):
    path = tmp_path / "snn.safetensors"
    snn.save(path)
    with torch.no_grad():
        snn.graph_module.get_submodule("0").weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"0.weight contains NaN"):
        snn.save(path)
    assert torch.isfinite(quartz_plugin.load(path)(torch.rand(2, 4))).all()


class TestAPartThatIsReplaced:
    IMAGES = torch.linspace(0, 1, 20).reshape(5, 4)

    def networks(self, **options):
        first = "1" if "first_layer" in options else "input"
        torch.manual_seed(0)
        ann = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 3))
        return (quartz_plugin.convert(ann, self.IMAGES, t_max, **options) for t_max in (8, {"default": 20, first: 8}))

    def test_is_the_graph_that_runs_and_is_saved(self, tmp_path):
        snn, other = self.networks()
        before = snn(self.IMAGES)
        snn.graph_module = other.graph_module
        assert snn.graph.module is snn.graph_module is other.graph_module
        assert (snn.n_steps, snn.windows) == (other.n_steps, other.windows)
        assert not torch.equal(snn(self.IMAGES), before)
        snn.save(tmp_path / "snn.safetensors")
        loaded = quartz_plugin.load(tmp_path / "snn.safetensors")
        assert torch.equal(loaded(self.IMAGES), snn(self.IMAGES))
        assert all(torch.equal(each, snn.state_dict()[name]) for name, each in loaded.state_dict().items())

    def test_is_the_first_layer_that_runs_and_is_saved(self, tmp_path):
        snn, _ = self.networks(first_layer="dense")
        before = snn(self.IMAGES)
        changed = copy.deepcopy(snn.dense_stem)
        changed.layer.bias.data += 0.5
        snn.dense_stem = changed
        assert not torch.equal(snn(self.IMAGES), before)
        snn.save(tmp_path / "snn.safetensors")
        assert torch.equal(quartz_plugin.load(tmp_path / "snn.safetensors")(self.IMAGES), snn(self.IMAGES))
        snn.dense_stem = None
        assert torch.equal(snn.values_to_encode(self.IMAGES), self.IMAGES)
        assert not any(name.startswith("dense_stem") for name in snn.state_dict())
        snn.save(tmp_path / "snn.safetensors")
        assert quartz_plugin.load(tmp_path / "snn.safetensors").dense_stem is None

    def test_is_all_of_it_where_the_graph_is(self):
        snn, other = self.networks(first_layer="dense")
        snn.graph = other.graph
        assert (snn.graph_module, snn.dense_stem) == (other.graph_module, other.dense_stem)
        assert torch.equal(snn(self.IMAGES), other(self.IMAGES))

    @pytest.mark.parametrize("name", ["graph", "graph_module", "dense_stem"])
    def test_is_refused_where_it_is_of_another_kind(self, name):
        snn, _ = self.networks()
        with pytest.raises(TypeError, match=f"{name} of a SpikingNetwork must be of type .*, got Linear"):
            setattr(snn, name, nn.Linear(4, 3))
