"""What keeps training quick: gradients are stored as the values are, and the teacher keeps no value twice."""

import copy

import pytest
import torch
from torch import nn

import quartz_plugin
from quartz_plugin.convert.refine.distance import relative_feature_mse
from quartz_plugin.training import DistillationLoss


class Net(nn.Module):
    """A sum that is rectified, and read once more without."""

    def __init__(self):
        super().__init__()
        self.one, self.two, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.relus = nn.ModuleList([nn.ReLU(), nn.ReLU6(), nn.ReLU()])
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        x = self.one(x)
        y = self.relus[1](self.norm(self.two(self.relus[0](x))))
        return self.head(self.relus[2](y + x).mean((2, 3)))


@pytest.fixture
def images():
    return torch.rand(6, 3, 9, 9)


def test_gradients_are_stored_with_channels_last_where_values_are(images):
    net = quartz_plugin.prepare_qat(Net().eval(), images, t_max=4).to(memory_format=torch.channels_last)
    teacher = DistillationLoss(net).to(memory_format=torch.channels_last)
    seen = {}
    for name in ("norm", "one", "two"):
        module = net.network.get_submodule(name)
        module.register_full_backward_hook(lambda _, __, gradients, name=name: seen.update({name: gradients[0]}))
    stored_last = images.contiguous(memory_format=torch.channels_last)
    teacher(net, stored_last, torch.randint(0, 4, (6,)), alpha=0.5).backward()
    assert set(seen) == {"norm", "one", "two"}
    for name, gradient in seen.items():
        assert gradient.is_contiguous(memory_format=torch.channels_last), name
        assert bool(gradient.any())


def test_distances_and_their_gradients_are_those_of_the_definition():
    given = {name: torch.randn(4, 3, 5, 5, dtype=torch.float64, requires_grad=True) for name in "ab"}
    wanted = {"a": torch.rand(4, 3, 5, 5, dtype=torch.float64), "b": torch.zeros(4, 3, 5, 5, dtype=torch.float64)}
    shares = [(given[n] - wanted[n]).square().mean() / wanted[n].square().mean() for n in "a"] + [torch.zeros(())]
    expected = torch.stack(shares).mean()
    (gradient,) = torch.autograd.grad(expected, given["a"])
    found = relative_feature_mse(given, {name: value.clone() for name, value in wanted.items()})
    found.backward()
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(given["a"].grad, gradient)
    assert not given["b"].grad.any()


def test_the_teacher_gives_what_the_ann_gives(images):
    ann = Net().eval()
    ann.norm.running_mean.uniform_(-1, 1)
    teacher = DistillationLoss(quartz_plugin.prepare_qat(ann, images, t_max=4))
    torch.testing.assert_close(teacher.ann_outputs(images), ann(images), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(copy.deepcopy(teacher).ann_outputs(images), ann(images), rtol=1e-4, atol=1e-5)
    in_place = {path for path, module in teacher.network.named_modules() if getattr(module, "inplace", False)}
    # The first ReLU's input is read by the sum as well.
    assert in_place == {"relus.1", "relus.2"}
