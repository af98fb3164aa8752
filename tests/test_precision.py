"""Modes of the caller (autocast, default type, gradients, inference) change no result."""

from contextlib import ExitStack, contextmanager

import pytest
import torch
from torch import nn

import quartz_plugin
from quartz_plugin.costs import ann_costs
from quartz_plugin.costs.rate import RateCodedNetwork
from quartz_plugin.plot.values import _paired_values


@contextmanager
def default_type(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def coarse_products():
    torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        assert torch.get_float32_matmul_precision() == "medium"
        torch.set_float32_matmul_precision("highest")


MODES = {
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "autocast to float16": lambda: torch.autocast("cpu", torch.float16),
    "default float64": lambda: default_type(torch.float64),
    "default float16": lambda: default_type(torch.float16),
    "default bfloat16": lambda: default_type(torch.bfloat16),
    "no gradients": torch.no_grad,
    "gradients": torch.enable_grad,
    "inference": torch.inference_mode,
    "coarse products": coarse_products,
}


def network():
    torch.manual_seed(0)
    ann = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3))
    return ann, torch.rand(60, 1, 6, 6, generator=torch.Generator().manual_seed(1))


def results(**modes):
    """What all doors give; the network and its images are made under `around`, results under `inside`."""
    with ExitStack() as stack:
        if "around" in modes:
            stack.enter_context(modes["around"]())
        ann, images = network() if "images" not in modes else modes["images"]
        if "inside" in modes:
            stack.enter_context(modes["inside"]())
        found = {}
        for method in ("percentile", "search+bias_correction+output", "least_squares+tune", "percentile+distill"):
            snn = quartz_plugin.convert(ann, images, 6, calibration_method=method, tuning_passes=1)
            found[method] = snn(images)
            found[method, "state"] = torch.cat([p.detach().double().flatten() for p in snn.state_dict().values()])
        plain = quartz_plugin.convert(ann, images, 6, hold=False)
        for engine in ("stepped", "event"):
            found[engine] = plain.run(images, engine=engine).logits
        net = quartz_plugin.prepare_qat(ann, images, 6)
        net.eval().choose_output_range(images, torch.arange(60) % 3)
        found["trained"] = net.to_spiking()(images)
        found["verified"] = str(quartz_plugin.verify(ann, plain, images))
        found["allocated"] = quartz_plugin.allocate_steps(ann, images, 40, choices=(2, 4, 8))
        found["costs"] = ann_costs(ann, images)
        found["rate"] = RateCodedNetwork(plain)(images, 8)
        found["plotted"] = torch.from_numpy(_paired_values(ann, plain, images, ["2"])["2"][0])
        return found


@pytest.fixture(scope="module")
def expected():
    return results()


@pytest.mark.parametrize("mode", sorted(MODES))
def test_of_the_caller_change_nothing(mode, expected):
    found = results(images=network(), inside=MODES[mode])
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        if isinstance(value, torch.Tensor):
            assert found[name].dtype == value.dtype, name
            assert torch.equal(found[name], value), name
        else:
            assert found[name] == value, name


def test_networks_and_images_made_in_inference_mode_are_like_others(expected):
    found = results(around=torch.inference_mode)
    assert all(torch.equal(found[name], value) for name, value in expected.items() if isinstance(value, torch.Tensor))
    with torch.inference_mode():
        ann, images = network()
    snn = quartz_plugin.convert(ann, images, calibration_method="tune", tuning_passes=1)
    assert not any(parameter.is_inference() for parameter in snn.parameters())
