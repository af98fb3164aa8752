"""Every classification model of torchvision: 43 are ReLU networks and convert exactly, 37 are refused by name."""

import copy
from collections import Counter
from unittest import mock

import pytest
import torch
from random_chains import assert_equal_but_for_ties, round_half_up
from torch import nn
from torch.nn import functional as F

import quartz_plugin
from quartz_plugin import ConversionError
from quartz_plugin.engines.stepped import step_layer

pytest.importorskip("torchvision")
from torchvision import models
from torchvision.models import regnet

CLASSES = 10


def model_on_meta(name, **options):
    """The untrained model without memory for its weights."""
    block_params = regnet.BlockParams.from_init_params

    def computed_on_cpu(*args, **kwargs):
        with torch.device("cpu"):
            return block_params(*args, **kwargs)

    # RegNet's builder computes its widths with tensors.
    with mock.patch.object(regnet.BlockParams, "from_init_params", computed_on_cpu), torch.device("meta"):
        return models.get_model(name, weights=None, **options).eval()


def blurred_images(count, size):
    """Random images in [0, 1] that differ in brightness, contrast and coarse structure, as photographs do."""
    coarse = F.interpolate(torch.rand(count, 3, 4, 4), (size, size), mode="bicubic")
    contrast = torch.rand(count, 1, 1, 1) + 0.5
    return (coarse * contrast + 0.2 * torch.rand(count, 3, size, size) - 0.1).clamp(0, 1)


@torch.no_grad()
def randomised(ann, images):
    """The model with random weights, and batch-norm statistics near those of these images.

    So every layer is neither silent nor saturated, however deep the network is.
    """
    ann = ann.to_empty(device="cpu")
    norms = [module for module in ann.modules() if isinstance(module, nn.BatchNorm2d)]
    for module in ann.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(module.weight)
            if module.bias is not None:
                module.bias.normal_(0, 0.1)
    for norm in norms:
        norm.reset_running_stats()
        norm.weight.uniform_(0.6, 1.4)
        norm.bias.normal_(0.1, 0.3)
        norm.train()
        norm.momentum = 1.0  # The statistics become those of the one batch.
    ann(images)
    for norm in norms:
        norm.eval()
        norm.running_mean += 0.3 * norm.running_var.sqrt() * torch.randn_like(norm.running_mean)
        norm.running_var *= torch.empty_like(norm.running_var).uniform_(0.6, 1.6)
    return ann


def assert_rounds(levels, drive, lowest, highest, name):
    """At most 1 neuron in 10,000 differs from the rounded and clipped drive, by one level, at a tie."""
    expected = round_half_up(drive).clamp(lowest, highest)
    assert_equal_but_for_ties(levels, expected, drive, name)
    differing = int((levels.double() != expected).sum())
    assert differing <= max(1, levels.numel() / 10_000), f"{name}: {differing} of {levels.numel()} neurons differ"


@torch.no_grad()
def assert_the_model_says_it(ann, snn, images):
    """The untouched model, every ReLU rounding and clipping by the report's scales, says what every layer says.

    Each ReLU hands on what the spikes recorded there say, so that every layer is judged on the spikes it got. The
    model computes in float64: how near a drive is to a half is then known far better than the tolerance, and
    what is left of it is for the float32 of the spiking network alone.
    """
    result = snn.run(images, engine="analytic")
    scales = {row["module"]: row["scale"] for row in snn.report if row["became"] == "spiking layer"}
    ann, calling, calls = copy.deepcopy(ann).double(), [], Counter()

    def say(path, rectified):
        calls[path] += 1
        layer = path if calls[path] == 1 else f"{path}_{calls[path]}"
        levels, length, scale = result.levels(layer), result.windows[layer].length, scales.pop(layer)
        assert_rounds(levels, rectified * (length / scale), 0, length, layer)
        assert 0.1 < (levels > 0).float().mean() < 0.9, f"{layer} is dead, or never silent"
        assert (levels == length).float().mean() < 0.1, f"{layer} is saturated"
        return levels.double() * (scale / length)

    def relu(x, inplace=False):
        path, module = calling[-1]
        said = say(path if isinstance(module, nn.ReLU) else f"{path}.relu".lstrip("."), x.clamp(min=0))
        return x.copy_(said) if inplace else said

    def hardtanh(x, min_val, max_val, inplace):
        (path, module) = calling[-1]
        assert isinstance(module, nn.ReLU6)
        said = say(path, x.clamp(0, 6))
        return x.copy_(said) if inplace else said

    for path, module in ann.named_modules():
        # Whose forward is running: modules call F.relu too, as do blocks without a module for it.
        module.register_forward_pre_hook(lambda module, inputs, path=path: calling.append((path, module)))
        module.register_forward_hook(lambda module, inputs, output: calling.pop() and None)
    drive, length = images.double() * (snn.t_max - 1), snn.t_max - 1
    levels = result.levels("input")
    assert_rounds(levels, drive, 0, length, "input")
    with mock.patch.object(F, "relu", relu), mock.patch.object(F, "hardtanh", hardtanh):
        logits = ann(levels.double() / length)
    assert not scales, f"layers that the model has no ReLU for: {list(scales)}"
    (row,) = (row for row in snn.report if row["became"] == "output layer")
    length = result.windows[row["module"]].length
    drive = logits * (length / row["scale"])
    assert_rounds(result.levels(row["module"]), drive, -length, length, row["module"])
    said = result.levels(row["module"]) * (row["scale"] / length)
    torch.testing.assert_close(result.logits, said, rtol=1e-6, atol=0, check_dtype=False)
    assert [*result.windows] == ["input", *calls_in_order]
