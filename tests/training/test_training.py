"""Trainable networks: names of earlier versions, one trace a call, and whom a warning points at."""

import copy
import warnings
from unittest import mock

import pytest
import torch
from torch import nn

import quartz_plugin
from quartz_plugin.convert import pipeline
from quartz_plugin.training import qat, restored, structure_of


@pytest.fixture
def images():
    return torch.rand(64, 6, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def ann():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 2))


def with_earlier_names(text):
    return text.replace("input_quantizer", "input_code").replace("output_quantizer", "output_code")


class TestEarlierNames:
    def test_in_state_dicts_are_taken(self, ann, images):
        net = quartz_plugin.prepare_qat(ann, images, 4)
        state = {name: tensor + 0.125 for name, tensor in net.state_dict().items()}
        earlier = {with_earlier_names(name): tensor for name, tensor in state.items()}
        assert earlier.keys() != state.keys()
        net.load_state_dict(earlier)
        assert all(torch.equal(tensor, state[name]) for name, tensor in net.state_dict().items())
        outer = nn.ModuleDict({"network": copy.deepcopy(net)})
        outer.load_state_dict({f"network.{name}": tensor - 0.125 for name, tensor in earlier.items()})
        assert torch.equal(outer["network"].network.output_quantizer.log_scale, net.output_quantizer.log_scale - 0.125)

    @pytest.mark.parametrize("task", ["classification", "regression"])
    def test_in_the_structures_of_checkpoints_are_taken(self, ann, images, task):
        net = quartz_plugin.prepare_qat(ann, images, 4, task=task)
        structure = structure_of(net)
        earlier = structure | {"scales": {with_earlier_names(path): n for path, n in structure["scales"].items()}}
        assert earlier != structure
        again = restored(ann, earlier, None)
        again.load_state_dict({with_earlier_names(name): tensor for name, tensor in net.state_dict().items()})
        assert torch.equal(again.eval()(images), net.eval()(images))

    def test_of_classes_and_functions_warn(self, ann, images):
        with pytest.warns(DeprecationWarning, match="now prepare_qat"):
            net = quartz_plugin.prepare(ann, images, 4)
        assert torch.equal(net(images), quartz_plugin.prepare_qat(ann, images, 4)(images))
        with pytest.warns(DeprecationWarning, match="now activation_quantizers"):
            assert net.codes() == net.activation_quantizers()
        with pytest.warns(DeprecationWarning, match="now DistillationLoss"):
            teacher = quartz_plugin.Teacher(net)
        assert torch.allclose(teacher(images), ann(images))
        labels = torch.zeros(64, dtype=torch.long)
        loss = quartz_plugin.DistillationLoss(net)(net, images, labels, alpha=0.25, progress=0.5)
        assert torch.equal(teacher.loss(net, images, labels, share=0.25, done=0.5), loss)
        assert loss > 0


def test_a_network_is_traced_once_a_call(ann, images):
    def traces(call):
        with (
            mock.patch.object(pipeline, "trace", wraps=pipeline.trace) as one,
            mock.patch.object(qat, "trace", wraps=qat.trace) as other,
        ):
            result = call()
        return one.call_count + other.call_count, result

    assert traces(lambda: quartz_plugin.convert(ann, images, 4))[0] == 1
    count, net = traces(lambda: quartz_plugin.prepare_qat(ann, images, 4))
    assert count == 1
    assert traces(net.to_spiking)[0] == 1
    assert traces(lambda: restored(ann, structure_of(net), None))[0] == 1


def test_warnings_point_at_the_line_that_led_to_them(ann, images):
    with torch.no_grad():
        ann[0].bias.fill_(-100.0)
    for call in (quartz_plugin.convert, quartz_plugin.prepare_qat):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            call(ann, images, 4)
        (only,) = caught
        assert "is 0 on all calibration images" in str(only.message)
        assert only.filename == __file__


def test_rules_may_be_given_for_one_call(images):
    class Doubled(nn.Module):
        def forward(self, x):
            return torch.relu(x) * 2 if x.sum() > 0 else x

    ann = nn.Sequential(nn.Linear(6, 5), Doubled(), nn.Linear(5, 2))
    with pytest.raises(quartz_plugin.ConversionError):
        quartz_plugin.convert(ann, images)
    scaled = nn.Linear(5, 5, bias=False)
    nn.init.eye_(scaled.weight)
    nn.init.constant_(ann[0].bias, 2.0)
    with torch.no_grad():
        scaled.weight.mul_(2)
    rules = {Doubled: lambda module: nn.Sequential(nn.ReLU(), scaled)}
    quartz_plugin.check_convertible(ann, images, rules=rules)
    snn = quartz_plugin.convert(ann, images, 64, rules=rules)
    assert float((snn(images) - ann(images)).detach().abs().max()) < 0.2
    assert quartz_plugin.verify(ann, snn, images, rules=rules).first_wrong is None
    net = quartz_plugin.prepare_qat(ann, images, 64, rules=rules).eval()
    assert torch.allclose(net(images), net.to_spiking()(images), atol=1e-5)
    assert quartz_plugin.allocate_steps(ann, images, 40, rules=rules).keys() == {"input", "1.0", "output"}
    with pytest.raises(quartz_plugin.ConversionError):
        quartz_plugin.convert(ann, images)
