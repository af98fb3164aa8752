"""The analytic engine's two walks: with gradients the plain closed form, without them in fewer passes over memory."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import quartz_plugin
from quartz_plugin.engines.analytic import _PREPARED
from quartz_plugin.engines.pools import largest_of_tiles, tile_of


class Residual(nn.Module):
    """Sums of a convolution and a shortcut, of three paths, of paths that are added twice; norms in front of ReLUs."""

    def __init__(self):
        super().__init__()
        self.stem, self.one, self.two = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 1)
        self.norm, self.pool, self.head = nn.BatchNorm2d(8), nn.MaxPool2d(2), nn.Linear(8 * 9, 4)

    def forward(self, x):
        x = self.pool(F.relu(self.stem(x)))
        y = F.relu(self.one(x) + 0.5 * x)
        z = F.relu(self.two(y) + y + x)
        z = F.relu(self.norm(torch.cat([y, z], 1)[:, 4:12]) + 0.1)
        return self.head((z + z + y).flatten(1))


@pytest.fixture
def images():
    return torch.rand(5, 3, 7, 7)


@pytest.fixture
def snn(images):
    ann = Residual().eval()
    ann.norm.running_mean.uniform_(0, 0.3), ann.norm.running_var.uniform_(0.5, 2)
    return quartz_plugin.convert(ann, images, t_max=16)


def on_a_grid(snn, places):
    for tensor in [*snn.graph.module.parameters()]:
        tensor.data = (tensor.data * 2**places).round() / 2**places
    return snn


@pytest.mark.parametrize("places", [0, 1, 6])
@pytest.mark.parametrize("granularity", ["layer", "channel"])
def test_both_walks_give_the_stepped_engines_spikes(images, places, granularity):
    ann = Residual().eval()
    snn = on_a_grid(quartz_plugin.convert(ann, images, t_max=16, granularity=granularity), places)
    stepped = snn.run(images, engine="stepped")
    overwriting = snn.run(images, engine="analytic")
    plain = snn.run(images.clone().requires_grad_(), engine="analytic")
    for result in (overwriting, plain):
        assert torch.equal(result.logits, stepped.logits)
        assert result.logits.is_contiguous()
        for name, steps in result.spike_steps.items():
            assert torch.equal(steps, stepped.spike_steps[name]), name
            assert steps.is_contiguous()
    assert plain.logits.requires_grad
    assert not overwriting.logits.requires_grad


def test_nothing_that_is_given_or_kept_is_overwritten(snn, images):
    before = images.clone()
    first = snn.run(images, engine="analytic")
    kept = {name: steps.clone() for name, steps in first.spike_steps.items()}
    second = snn.run(images, engine="analytic")
    assert torch.equal(images, before)
    for name, steps in second.spike_steps.items():
        assert torch.equal(steps, kept[name])
        assert torch.equal(first.spike_steps[name], kept[name])


def test_biases_and_weights_of_one_to_one_enter_with_sums_and_edits_are_seen(snn, images):
    prepared = _PREPARED.of(snn.graph)
    assert prepared.weights
    assert prepared.halved
    assert prepared.biases
    node = next(iter(prepared.weights))
    module = snn.graph.module.get_submodule(str(node.target))
    before = snn.run(images, engine="analytic").logits
    module.weight.data.mul_(-3)
    after = snn.run(images, engine="analytic")
    assert not torch.equal(after.logits, before)
    stepped = on_a_grid(snn, 5).run(images, engine="stepped")
    assert torch.equal(snn.run(images, engine="analytic").logits, stepped.logits)
    for layer in snn.graph.layers[:-1]:
        if layer.neuron.bias is not None:
            layer.neuron.bias.data.add_(0.5)
    assert torch.equal(snn.run(images, engine="analytic").logits, snn.run(images, engine="stepped").logits)


def test_integer_weights_whose_sums_float32_just_holds_are_not_rounded_by_the_half():
    ann = nn.Sequential(nn.Linear(4096, 64), nn.ReLU(), nn.Linear(64, 1))
    snn = quartz_plugin.convert(ann, torch.rand(9, 4096), t_max=2)
    synapses, neuron = snn.graph.module.get_submodule("0"), snn.graph.module.get_submodule("1")
    # A sum goes up to where float32 has no halves, and comes back.
    weight = torch.zeros(64, 4096)
    weight[:, 0], weight[:, -1] = 2.0**23 + 1, -(2.0**23 + 1)
    synapses.weight.data, neuron.bias.data = weight, torch.zeros(64)
    images = torch.ones(32, 4096)
    stepped, analytic = (snn.run(images, engine=engine).spike_steps for engine in ("stepped", "analytic"))
    assert torch.equal(stepped["1"], analytic["1"])


class Viewed(nn.Module):
    """A user's module, which asks for memory in torch's own order."""

    def forward(self, x):
        return x.view(len(x), -1).view(x.shape)


def test_a_users_module_in_an_edited_graph_gets_values_in_torchs_own_order(images):
    ann = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(36, 3))
    snn = quartz_plugin.convert(ann, images, t_max=8)
    wanted = snn.run(images, engine="analytic").logits
    module = snn.graph.module
    node = next(node for node in module.graph.nodes if str(node.target) == "1")
    module.add_submodule("viewed", Viewed())
    with module.graph.inserting_after(node):
        viewed = module.graph.call_module("viewed", (node,))
    node.replace_all_uses_with(viewed, delete_user_cb=lambda user: user is not viewed)
    module.recompile()
    assert torch.equal(snn.run(images, engine="analytic").logits, wanted)


@pytest.mark.parametrize("shape", [(2, 3, 8, 8), (1, 1, 9, 7), (2, 20, 6, 6)])
@pytest.mark.parametrize("size", [(2, 2), (3, 2), (1, 1)])
def test_tiles_are_pooled_as_torch_pools_them(shape, size):
    levels, pool = torch.randint(0, 16, shape).float(), nn.MaxPool2d(size, size, (0, 0), (1, 1))
    assert tile_of(pool) == size
    for each in (levels, levels.contiguous(memory_format=torch.channels_last)):
        assert torch.equal(largest_of_tiles(each, *size), F.max_pool2d(each, size))


def test_other_pools_are_left_to_torch():
    for pool in (
        nn.MaxPool2d((3, 3), (2, 2), (0, 0), (1, 1)),
        nn.MaxPool2d((2, 2), (2, 2), (1, 1), (1, 1)),
        nn.MaxPool2d((2, 2), (2, 2), (0, 0), (2, 2)),
        nn.MaxPool2d((2, 2), (2, 2), (0, 0), (1, 1), ceil_mode=True),
        nn.AvgPool2d((2, 2), (2, 2)),
    ):
        assert tile_of(pool) is None
