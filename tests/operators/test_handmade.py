"""Hand-made networks against their ANNs: sums that broadcast, copies, constants beside activations, extremes."""

import pytest
import torch
from helpers.conversions import assert_same_spikes
from helpers.one_by_one import OneByOne, as_lists
from helpers.random_graphs import make_exact
from torch import nn
from torch.nn import functional as F

import quartz_plugin
from quartz_plugin.costs import InferenceCounts
from quartz_plugin.graph.synapses import fan_out, probed_fan_out, unit_shapes


class Dueling(nn.Module):
    """State value and advantages, as in a dueling Q network."""

    def __init__(self):
        super().__init__()
        self.first, self.value, self.advantage = nn.Linear(6, 8), nn.Linear(8, 1), nn.Linear(8, 4)

    def forward(self, x):
        x = self.first(x).relu()
        advantage = self.advantage(x)
        return self.value(x) + advantage - advantage.mean(1, keepdim=True)


class Gated(nn.Module):
    """A sum of a map and one number a channel, as of squeeze and excite with a sum."""

    def __init__(self):
        super().__init__()
        self.conv, self.gate, self.last = nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(4, 4, 1), nn.Linear(4, 3)

    def forward(self, x):
        x = self.conv(x).relu()
        x = (self.gate(x.mean((2, 3), keepdim=True)) + x).relu()
        return self.last(x.mean((2, 3)))


class Tokens(nn.Module):
    """A class token in front, and positions on top."""

    def __init__(self):
        super().__init__()
        self.conv, self.mix, self.last = nn.Conv2d(2, 5, 2, stride=2), nn.Linear(5, 5), nn.Linear(5, 3)
        self.token, self.position = nn.Parameter(torch.randn(1, 1, 5)), nn.Parameter(torch.randn(1, 10, 5))

    def forward(self, x):
        x = self.conv(x).relu().flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.size(0), -1, -1), x], 1) + self.position
        x = (self.mix(x).relu() + x.mean(1, keepdim=True)).relu()
        return self.last(x[:, 0] + x[:, [3, 1, 3]].sum(1))


class Mirrored(nn.Module):
    """Features of an image and of its mirror image, side by side."""

    def __init__(self):
        super().__init__()
        self.conv, self.last = nn.Conv2d(2, 3, 3), nn.Linear(24, 3)

    def forward(self, x):
        x = torch.cat([self.conv(x).relu(), self.conv(x.flip(3)).relu()], 1)
        x = x.mean(3).repeat_interleave(2, 1)[:, ::2]
        return self.last(x.flatten(1) + x.movedim(1, 2).flatten(1))


class PointNet(nn.Module):
    """Features of each point, and the largest of each."""

    def __init__(self):
        super().__init__()
        self.each, self.whole, self.last = nn.Conv1d(3, 8, 1), nn.Conv1d(16, 6, 1), nn.Linear(6, 3)

    def forward(self, x):
        x = self.each(x).relu()
        x = torch.cat([x, torch.max(x, 2, keepdim=True)[0].expand_as(x)], 1)
        return self.last(self.whole(x).amax(dim=-1).relu())


class Compared(nn.Module):
    """Two halves of a sample by the same layer, and how they differ."""

    def __init__(self):
        super().__init__()
        self.embed, self.last = nn.Linear(4, 6), nn.Linear(18, 2)

    def forward(self, x):
        one, other = self.embed(x[:, :4]), self.embed(x[:, 4:])
        larger, smaller = torch.maximum(one, other), torch.minimum(one, other)
        bounded = torch.clamp_max(one.relu(), 0.25) + other.clamp(-0.125, 0.25)
        return self.last(torch.cat([(one - other).abs(), larger - smaller, bounded], 1))


class UNet(nn.Module):
    """Down and, by interpolation, up again beside a skip."""

    def __init__(self):
        super().__init__()
        self.down, self.deep, self.up = nn.Conv2d(2, 3, 3, padding=1), nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(7, 2, 1)
        self.last, self.upsample = nn.Linear(40, 3), nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True)

    def forward(self, x):
        skip = self.down(x).relu()
        deep = self.deep(F.max_pool2d(skip, 2)).relu()
        whole = F.interpolate(deep.mean((2, 3), keepdim=True), deep.shape[2:], mode="bilinear")
        x = self.up(torch.cat([self.upsample(deep + whole), skip], 1)).relu()
        return self.last(F.interpolate(x, size=(4, 5), mode="bicubic").relu().flatten(1))


class Video(nn.Module):
    """Convolutions and pools over time and space."""

    def __init__(self):
        super().__init__()
        self.first, self.norm = nn.Conv3d(1, 3, (2, 3, 3), padding=(0, 1, 1)), nn.BatchNorm3d(3)
        self.second, self.pool, self.last = nn.Conv3d(3, 4, 2, groups=1), nn.MaxPool3d((1, 2, 2)), nn.Linear(4, 3)

    def forward(self, x):
        x = self.pool(self.norm(self.first(x)).relu())
        return self.last(F.adaptive_avg_pool3d(self.second(x).relu(), 1).flatten(1))


NETWORKS = {
    "video": (Video, (1, 3, 6, 6)),
    "unet": (UNet, (2, 6, 6)),
    "points": (PointNet, (3, 7)),
    "compared": (Compared, (8,)),
    "dueling": (Dueling, (6,)),
    "gated": (Gated, (2, 6, 6)),
    "tokens": (Tokens, (2, 6, 6)),
}
NETWORKS["mirrored"] = (Mirrored, (2, 6, 6))


@pytest.fixture(params=NETWORKS)
def network(request):
    torch.manual_seed(1)
    kind, shape = NETWORKS[request.param]
    return kind().double().eval(), torch.rand(40, *shape)


def test_have_the_values_of_their_ann(network):
    ann, images = network
    snn = quartz_plugin.convert(ann, images, t_max=1 << 20, percentile=100)
    torch.testing.assert_close(snn(images), ann(images.double()).detach(), rtol=0, atol=1e-4)


@pytest.mark.parametrize("options", [{}, {"hold": False}, {"linear": "pair"}, {"weight_bits": 8}], ids=str)
def test_spike_and_count_alike_in_every_engine(network, options, tmp_path):
    ann, images = network
    if "weight_bits" in options and isinstance(ann, UNet):
        with pytest.raises(quartz_plugin.ConversionError, match=r"with weight_bits.*no fixed weights"):
            quartz_plugin.convert(ann, images, t_max=9, **options)
        return
    snn = quartz_plugin.convert(ann, images, t_max=9, **options)
    snn = snn if "weight_bits" in options else make_exact(snn)
    stepped = snn.run(images[:3], engine="stepped")
    for engine in ("event", *(["analytic"] if options.get("hold", True) else [])):
        assert_same_spikes(snn.run(images[:3], engine=engine).spike_steps, stepped.spike_steps)
    judge, counted = OneByOne(snn, stepped), InferenceCounts(snn, stepped)
    assert as_lists(counted["synops"]) == judge.synops()
    assert as_lists(counted["synops_factored"]) == judge.synops_factored()
    shapes = unit_shapes(snn.graph)
    for layer in snn.graph.layers:
        found, probed = fan_out(layer.projection, shapes), probed_fan_out(layer.projection, shapes)
        assert all(torch.equal(found[source], probed[source]) for source in probed)
    snn.save(tmp_path / "snn.safetensors")
    assert torch.equal(quartz_plugin.load(tmp_path / "snn.safetensors")(images), snn(images))


def test_a_smaller_operand_costs_a_synapse_for_each_place_it_reaches():
    torch.manual_seed(1)
    snn = quartz_plugin.convert(Gated(), torch.rand(40, 2, 6, 6))
    assert [(row["operation"], row["became"]) for row in snn.report if row["module"].startswith("add")] == [
        ("add", "routing"),
        ("add", "synapses"),
    ]
    counts = {row["module"]: row["synapses"] for row in snn.report if row.get("synapses")}
    # Each of 36 places of 4 channels reaches all 36 of all 4 by way of the gate.
    assert counts["relu_2"] == 144 * 144
