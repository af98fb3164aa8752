"""Networks as people have them: segmentation, point clouds, sequences, actors, detectors, other libraries' models."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import quartz_plugin
from quartz_plugin.structure import flattened


def leaves_of(value):
    return list(flattened(value, lambda each: isinstance(each, torch.Tensor))[1].values())


def block(inputs, outputs, kernel=3):
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)
    )


class UNet(nn.Module):
    """Padding to the skip's size, as the usual implementation has it."""

    def __init__(self, mode="nearest"):
        super().__init__()
        self.mode = mode
        self.down, self.deep, self.up, self.last = block(3, 6), block(6, 8), block(14, 6), nn.Conv2d(6, 4, 1)

    def forward(self, x):
        assert x.dim() == 4
        skip = self.down(x)
        x = self.deep(F.max_pool2d(skip, 2))
        x = F.interpolate(x, scale_factor=2, mode=self.mode)
        high, wide = skip.size(2) - x.size(2), skip.size(3) - x.size(3)
        x = F.pad(x, [wide // 2, wide - wide // 2, high // 2, high - high // 2])
        return F.interpolate(
            self.last(self.up(torch.cat([skip, x], dim=1))), size=(24, 20), mode="bilinear", align_corners=False
        )


class PointNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv1d(3, 16, 1), nn.BatchNorm1d(16), nn.ReLU(), nn.Conv1d(16, 24, 1), nn.ReLU()
        )
        self.head = nn.Sequential(nn.Linear(24, 12), nn.ReLU(), nn.Linear(12, 5))

    def forward(self, points):
        x = self.features(points)
        x = torch.max(x, 2, keepdim=True)[0].view(-1, 24)
        return F.log_softmax(self.head(x), dim=1)


class TCN(nn.Module):
    """Causal dilated convolutions of a sequence: padded on both sides, then chomped."""

    def __init__(self):
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv1d(i, 8, 3, padding=2 * d, dilation=d) for i, d in ((4, 1), (8, 2), (8, 4)))
        self.shortcut, self.last = nn.Conv1d(4, 8, 1), nn.Linear(8, 3)

    def forward(self, x):
        out = x
        for conv in self.convs:
            padding = conv.padding[0]
            out = F.relu(conv(out)[:, :, :-padding].contiguous())
        return self.last(F.relu(out + self.shortcut(x))[:, :, -1])


class DuelingDQN(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(4, 6, 4, 2), nn.ReLU(), nn.Conv2d(6, 8, 3), nn.ReLU(), nn.Flatten())
        self.value = nn.Sequential(nn.Linear(72, 8), nn.ReLU(), nn.Linear(8, 1))
        self.advantage = nn.Sequential(nn.Linear(72, 8), nn.ReLU(), nn.Linear(8, 6))

    def forward(self, x):
        x = self.stem(x)
        value, advantage = self.value(x), self.advantage(x)
        return value + advantage - advantage.mean(1, keepdim=True)


class ActorCritic(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.actor, self.critic = nn.Linear(8, 16), nn.Linear(16, 2), nn.Linear(16, 1)

    def forward(self, observation):
        hidden = torch.relu(self.body(observation))
        return 2.0 * torch.tanh(self.actor(hidden)), self.critic(hidden).squeeze(-1)


class Detector(nn.Module):
    """Class scores and boxes at every place of two levels."""

    def __init__(self):
        super().__init__()
        self.stem, self.deeper = block(3, 8), nn.Sequential(nn.MaxPool2d(2), block(8, 8))
        self.scores, self.boxes = nn.Conv2d(8, 2 * 3, 1), nn.Conv2d(8, 2 * 4, 1)

    def forward(self, x):
        levels = [self.stem(x)]
        levels.append(self.deeper(levels[0]))
        scores = [self.scores(f).permute(0, 2, 3, 1).reshape(x.shape[0], -1, 3) for f in levels]
        boxes = [self.boxes(f).permute(0, 2, 3, 1).reshape(x.shape[0], -1, 4) for f in levels]
        return {"scores": torch.cat(scores, 1).sigmoid(), "boxes": torch.cat(boxes, 1)}


NETWORKS = {
    "U-Net": (UNet, (3, 10, 11), {}),
    "PointNet": (PointNet, (3, 20), {}),
    "TCN": (TCN, (4, 12), {}),
    "dueling DQN": (DuelingDQN, (4, 12, 12), {"task": "regression"}),
    "actor and critic": (ActorCritic, (8,), {"task": {"1": "regression"}, "input_range": (-2, 2)}),
    "detector": (Detector, (3, 8, 8), {"task": {"boxes": "regression"}}),
}


def lively(net, images):
    """A network in eval mode whose batch norms have statistics of images."""
    net.train()
    with torch.no_grad():
        for _ in range(3):
            net(images)
    return net.eval()


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_give_what_the_ann_gives(name, tmp_path):
    kind, shape, options = NETWORKS[name]
    images = torch.rand(24, *shape)
    if "input_range" in options:
        images = images * 4 - 2
    ann = lively(kind(), images)
    before = copy.deepcopy(ann.state_dict())
    snn = quartz_plugin.convert(ann, images, 2049, percentile=100, **options)
    with torch.no_grad():
        wanted = leaves_of(ann(images))
    given = leaves_of(snn(images))
    for one, other in zip(given, wanted, strict=True):
        assert one.shape == other.shape
        assert float((one - other).abs().max()) < 0.02 * float(other.abs().max())
    assert all(torch.equal(tensor, before[key]) for key, tensor in ann.state_dict().items())
    few = quartz_plugin.convert(ann, images, 7, **options)
    steps = few.run(images[:3], engine="stepped").spike_steps
    for layer, found in few.run(images[:3]).spike_steps.items():
        assert float((found != steps[layer]).float().mean()) < 2e-3, layer
    few.save(tmp_path / "net.snn")
    again = quartz_plugin.load(tmp_path / "net.snn")
    for one, other in zip(leaves_of(again(images)), leaves_of(few(images)), strict=True):
        assert torch.equal(one, other)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fcn_resnet50", "deeplabv3_resnet50"])
def test_segmentation_networks_of_torchvision(name):
    segmentation = pytest.importorskip("torchvision.models.segmentation")
    ann = getattr(segmentation, name)(weights=None, weights_backbone=None, num_classes=5, aux_loss=True)
    images = torch.rand(3, 3, 64, 64)
    ann = lively(ann, images)
    snn = quartz_plugin.convert(ann, images, 32769, percentile=100)
    with torch.no_grad():
        wanted = ann(images)
    given = snn(images)
    assert list(given) == list(wanted) == ["out", "aux"]
    for key in wanted:
        assert float((given[key] - wanted[key]).abs().max()) < 0.1 * float(wanted[key].abs().max())
    assert any(row["became"].endswith("by the host") for row in snn.report if row["operation"] == "interpolate")


def test_a_resnet_of_hugging_face_returns_its_own_class():
    transformers = pytest.importorskip("transformers")
    config = transformers.ResNetConfig(
        num_channels=3, embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=4
    )
    images = torch.rand(8, 3, 32, 32)
    ann = lively(transformers.ResNetForImageClassification(config), images)
    snn = quartz_plugin.convert(ann, images, 4097, percentile=100, example_input=images[:1])
    with torch.no_grad():
        wanted = ann(images)
    given = snn(images)
    assert type(given) is type(wanted)
    assert float((given.logits - wanted.logits).abs().max()) < 0.05 * float(wanted.logits.abs().max())
