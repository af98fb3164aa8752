"""Every classification model of torchvision: 43 are ReLU networks and convert exactly, 37 are refused by name."""

import copy
import sys
from collections import Counter
from unittest import mock

import pytest
import torch
from helpers.conversions import propagate_levels
from helpers.random_chains import assert_equal_but_for_ties, fired_levels, near_a_half, round_half_up
from torch import nn
from torch.nn import functional as F

import quartz_plugin
from quartz_plugin import ConversionError, FirstSpikeMaxPool, TTFSNeuron
from quartz_plugin.convert.exported import exported
from quartz_plugin.convert.trace import trace
from quartz_plugin.engines.stepped import step_layer

pytest.importorskip("torchvision")
from torchvision import models
from torchvision.models import regnet

CONVERTED = [
    "alexnet",
    *[f"vgg{depth}{norm}" for depth in (11, 13, 16, 19) for norm in ("", "_bn")],
    *[f"resnet{depth}" for depth in (18, 34, 50, 101, 152)],
    *["resnext50_32x4d", "resnext101_32x8d", "resnext101_64x4d", "wide_resnet50_2", "wide_resnet101_2"],
    *["squeezenet1_0", "squeezenet1_1"],
    *[f"densenet{depth}" for depth in (121, 161, 169, 201)],
    *["googlenet", "inception_v3", "mobilenet_v2"],
    *[f"mnasnet{width}" for width in ("0_5", "0_75", "1_0", "1_3")],
    *[f"shufflenet_v2_x{width}" for width in ("0_5", "1_0", "1_5", "2_0")],
    *[f"regnet_x_{flops}" for flops in ("400mf", "800mf", "1_6gf", "3_2gf", "8gf", "16gf", "32gf")],
]
TRANSFORMING = ["googlenet", "inception_v3"]
"""Their published weights come with ``transform_input=True``: the input is normalised once more, inside."""

REFUSED = {
    **{f"convnext_{size}": ("features.0.1.layer_norm", "layer_norm") for size in ("tiny", "small", "base", "large")},
    **{f"efficientnet_b{number}": ("features.0.2", "SiLU") for number in range(8)},
    **{f"efficientnet_v2_{size}": ("features.0.2", "SiLU") for size in "sml"},
    "maxvit_t": ("stem.0.2", "GELU"),
    **{f"mobilenet_v3_{size}": ("features.0.2", "Hardswish") for size in ("small", "large")},
    **{
        f"regnet_y_{flops}": ("trunk_output.block1.block1-0.f.se.scale_activation", "Sigmoid")
        for flops in ("400mf", "800mf", "1_6gf", "3_2gf", "8gf", "16gf", "32gf", "128gf")
    },
    **{f"swin_{size}": ("features.0.2", "LayerNorm") for size in "tsb"},
    **{f"swin_v2_{size}": ("features.0.2", "LayerNorm") for size in "tsb"},
    **{
        f"vit_{size}": ("encoder.layers.encoder_layer_0.ln_1", "LayerNorm")
        for size in ("b_16", "b_32", "l_16", "l_32", "h_14")
    },
}
"""Model -> the first module that stands in the way, and its class (the function's name where it calls one)."""

LARGE = {
    *[name for name in CONVERTED if name.startswith("vgg")],
    *["resnet101", "resnet152", "resnext101_32x8d", "resnext101_64x4d", "wide_resnet50_2", "wide_resnet101_2"],
    *["densenet121", "densenet161", "densenet169", "densenet201"],
    *["alexnet", "inception_v3", "resnext50_32x4d"],
    *["regnet_x_3_2gf", "regnet_x_8gf", "regnet_x_16gf", "regnet_x_32gf"],
}


def marked(name, **options):
    return pytest.param(name, options, id="-".join([name, *options]), marks=[pytest.mark.slow] * (name in LARGE))


def model_on_meta(name, **options):
    """The untrained model without memory for its weights."""
    if name in TRANSFORMING:
        options["init_weights"] = False
    block_params = regnet.BlockParams.from_init_params

    def computed_on_cpu(*args, **kwargs):
        with torch.device("cpu"):
            return block_params(*args, **kwargs)

    # RegNet's builder computes its widths with tensors.
    with mock.patch.object(regnet.BlockParams, "from_init_params", computed_on_cpu), torch.device("meta"):
        return models.get_model(name, weights=None, **options).eval()


def images_for(name, count):
    """Random images in [0, 1] that differ in brightness, contrast and coarse structure, as photographs do."""
    size = {"inception_v3": 75, "alexnet": 64}.get(name, 48)
    coarse = F.interpolate(torch.rand(count, 3, 4, 4), (size, size), mode="bicubic")
    contrast = torch.rand(count, 1, 1, 1) + 0.5
    return (coarse * contrast + 0.2 * torch.rand(count, 3, size, size) - 0.1).clamp(0, 1)


@torch.no_grad()
def randomised_model(name, images, **options):
    """The model with random weights, and batch-norm statistics around those of these images.

    So no layer is silent or saturated, however deep the network is.
    """
    ann = model_on_meta(name, num_classes=10, **options).to_empty(device="cpu")
    norms = [module for module in ann.modules() if isinstance(module, nn.BatchNorm2d)]
    for module in ann.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(module.weight)
            if module.bias is not None:
                module.bias.normal_(0, 0.1)
    for norm in norms:
        norm.reset_running_stats()
        norm.weight.uniform_(0.6, 1.4)
        norm.weight[::5] *= -1
        norm.weight[1::16] = 0.0
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
    assert_few((levels.double() != expected), name)


def assert_few(different, name):
    assert different.sum() <= max(1, different.numel() / 10_000), f"{name}: {int(different.sum())} neurons differ"


@torch.no_grad()
def assert_the_model_says_it(ann, snn, images, engine):
    """The model itself, every ReLU rounding and clipping by the report's scales, says what every layer says.

    Each ReLU hands on what the spikes recorded there say, so that every layer is judged on the spikes it got. The
    model computes in float64, so that all there is to tolerate is the float32 of the spiking network.
    """
    result = snn.run(images, engine=engine)
    scales = {row["module"]: row["scale"] for row in snn.report if row["became"] == "spiking layer"}
    pending, calls, running = dict(scales), Counter(), []

    def say(path, rectified):
        calls[path] += 1
        layer = path if calls[path] == 1 else f"{path}_{calls[path]}"
        levels, length, scale = result.levels(layer), result.windows[layer].length, pending.pop(layer)
        assert_rounds(levels, rectified * (length / scale), 0, length, layer)
        assert 0.1 < (levels > 0).float().mean() < 0.9, f"{layer} is dead, or never silent"
        assert (levels == length).float().mean() < 0.1, f"{layer} is saturated"
        return levels.double() * (scale / length)

    def relu(x, inplace=False):
        path, module = running[-1]
        said = say(path if isinstance(module, nn.ReLU) else f"{path}.relu".lstrip("."), x.clamp(min=0))
        return x.copy_(said) if inplace else said

    def hardtanh(x, min_val, max_val, inplace):
        path, module = running[-1]
        assert isinstance(module, nn.ReLU6)
        said = say(path, x.clamp(0, 6))
        return x.copy_(said) if inplace else said

    def leave(module, inputs, output):
        running.pop()

    ann = copy.deepcopy(ann).double()
    for path, module in ann.named_modules():
        # nn.ReLU calls F.relu, as blocks without a module for it do: who calls tells the name.
        module.register_forward_pre_hook(lambda module, inputs, path=path: running.append((path, module)))
        module.register_forward_hook(leave)
    length, levels = snn.t_max - 1, result.levels("input")
    assert_rounds(levels, images.double() * length, 0, length, "input")
    with mock.patch.object(F, "relu", relu), mock.patch.object(F, "hardtanh", hardtanh):
        logits = ann(levels.double() / length)
    assert not pending, f"layers that the model has no ReLU for: {list(pending)}"

    (output,) = (row for row in snn.report if row["became"] == "output layer")
    name, scale, length = output["module"], output["scale"], result.windows[output["module"]].length
    levels = result.levels(name)
    assert_rounds(levels, logits * (length / scale), -length, length, name)
    torch.testing.assert_close(result.logits.double(), levels.double() * (scale / length))
    assert set(result.windows) == {"input", *scales, name}


@torch.no_grad()
def assert_stepped_equals_analytic(snn, images):
    """Stepped on the spikes that the analytic engine found in front of it, every layer spikes as it found.

    A differing neuron's drive, in float64, is near a half.
    """
    graph, result = snn.graph, snn.run(images, engine="analytic")
    module, values, stepped = copy.deepcopy(graph.module).double(), {}, []
    layers = {layer.node: layer for layer in graph.layers}
    for node in graph.module.graph.nodes:
        target = module.get_submodule(node.target) if node.op == "call_module" else None
        if node.op == "placeholder":
            values[node] = result.levels("input").double()
        elif isinstance(target, FirstSpikeMaxPool):
            values[node] = target.pool(values[node.all_input_nodes[0]])
        elif isinstance(target, TTFSNeuron):
            layer = layers[node]
            steps = step_layer(layer, {source: values[source].float() for source in layer.projection.sources})
            expected = result.spike_steps[layer.name]
            bias = 0.0 if target.bias is None else target.bias * target.clock.input_window
            drive = values[node.all_input_nodes[0]] + bias
            assert_few(steps != expected, layer.name)
            assert near_a_half(drive)[steps != expected].all(), layer.name
            levels = fired_levels(graph, layer.name, steps)
            assert_equal_but_for_ties(levels, result.levels(layer.name), drive, layer.name)
            stepped.append(layer.name)
            values[node] = result.levels(layer.name).double()
        elif node.op != "output":
            values[node] = propagate_levels(module, node, values)
    assert stepped == [name for name in result.windows if name != "input"]


def test_the_lists_name_every_model():
    assert len(CONVERTED) == 43
    assert len(REFUSED) == 37
    assert sorted([*CONVERTED, *REFUSED]) == sorted(models.list_models(module=models))


@pytest.mark.parametrize(
    ("name", "options"),
    [marked(name) for name in CONVERTED] + [marked(name, transform_input=True) for name in TRANSFORMING],
)
def test_a_converted_model_rounds_and_clips_what_the_model_computes(name, options):
    images = images_for(name, 8)
    ann = randomised_model(name, images, **options)
    snn = quartz_plugin.convert(ann, images, t_max=16)
    assert_the_model_says_it(ann, snn, images_for(name, 2), "analytic")


@pytest.mark.parametrize(
    ("name", "options"),
    [
        marked(name)
        for name in (
            "alexnet", "resnet18", "squeezenet1_1", "densenet121", "googlenet", "inception_v3", "mobilenet_v2",
            "mnasnet0_5", "shufflenet_v2_x0_5", "regnet_x_400mf", "vgg11_bn",
        )
    ],
)  # fmt: skip
def test_stepped_through_time_a_model_spikes_as_by_the_closed_form(name, options):
    images = images_for(name, 8)
    snn = quartz_plugin.convert(randomised_model(name, images, **options), images, t_max=6)
    assert_stepped_equals_analytic(snn, images[:1])


@pytest.mark.parametrize(
    ("name", "options"),
    [marked(name) for name in ("mobilenet_v2", "mnasnet0_5", "shufflenet_v2_x0_5", "densenet121")],
)
def test_with_pairs_of_neurons_a_model_computes_what_it_did(name, options):
    images = images_for(name, 8)
    ann = randomised_model(name, images, **options)
    # As many steps as it takes for rounding to vanish: what is left would be a mistake.
    snn = quartz_plugin.convert(ann, images, t_max=1 << 16, percentile=100, linear="pair")
    halves = [row for row in snn.report if row["operation"].startswith(("positive half", "negative half"))]
    assert len(halves) >= 20
    with torch.no_grad():
        wanted = ann(images)
    torch.testing.assert_close(snn(images), wanted, rtol=0, atol=2e-3 * float(wanted.abs().max()))
    assert_stepped_equals_analytic(quartz_plugin.convert(ann, images, t_max=4, linear="pair"), images[:1])


@pytest.mark.parametrize("name", REFUSED)
def test_the_first_module_in_the_way_is_named(name):
    path, operation = REFUSED[name]
    with pytest.raises(ConversionError) as error:
        quartz_plugin.convert(model_on_meta(name), torch.rand(1, 3, 224, 224))
    assert str(error.value).startswith(f"cannot convert {path!r} ({operation}): it ")


@pytest.mark.parametrize(
    ("name", "options"), [marked(name) for name in ("densenet121", "googlenet", "shufflenet_v2_x0_5")]
)
def test_a_saved_and_a_copied_model_say_the_same(name, options, tmp_path):
    images = images_for(name, 4)
    snn = quartz_plugin.convert(randomised_model(name, images, **options), images)
    expected = snn.run(images)
    snn.save(tmp_path / "network.safetensors")
    for other in (quartz_plugin.load(tmp_path / "network.safetensors"), copy.deepcopy(snn)):
        assert other.report[:] == snn.report[:]
        result = other.run(images)
        assert torch.equal(result.logits, expected.logits)
        for layer, steps in expected.spike_steps.items():
            assert torch.equal(result.spike_steps[layer], steps), layer
        with torch.no_grad():
            for parameter in other.parameters():
                parameter.zero_()
    assert torch.equal(snn(images), expected.logits)


def test_the_model_is_left_as_it_was():
    images = images_for("googlenet", 4)
    ann = randomised_model("googlenet", images, transform_input=True)
    expected = quartz_plugin.convert(ann, images)(images)
    # In training it would update statistics, drop units, and return its auxiliary heads too.
    ann.train()
    ann.inception4a.eval()
    ann.fc.requires_grad_(False)
    weights = copy.deepcopy(ann.state_dict())
    training = {path: module.training for path, module in ann.named_modules()}
    trainable = {path: parameter.requires_grad for path, parameter in ann.named_parameters()}

    assert torch.equal(quartz_plugin.convert(ann, images)(images), expected)

    assert ann.state_dict().keys() == weights.keys()
    assert all(torch.equal(tensor, weights[path]) for path, tensor in ann.state_dict().items())
    assert {path: module.training for path, module in ann.named_modules()} == training
    assert {path: parameter.requires_grad for path, parameter in ann.named_parameters()} == trainable
    assert all(parameter.grad is None for parameter in ann.parameters())


THROUGH_EXPORT = {"resnet18", "squeezenet1_1", "mnasnet0_5", "shufflenet_v2_x0_5"}
"""Models that are captured through torch.export in the short run too."""


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name not in THROUGH_EXPORT)) for name in CONVERTED]
)
def test_captured_by_export_they_are_the_same_networks(name, monkeypatch):
    torch.manual_seed(0)
    images = images_for(name, 4)
    ann = randomised_model(name, images)
    one = quartz_plugin.convert(ann, images, 16)
    monkeypatch.setattr(
        sys.modules[trace.__module__],
        "capture",
        lambda root, name, tracer: exported(root, tuple(each[:2] for each in tracer.inputs[0])),
    )
    other = quartz_plugin.convert(ann, images, 16)
    assert [layer.name for layer in one.graph.layers] == [layer.name for layer in other.graph.layers]
    for layer, scale in one.graph.scales.items():
        torch.testing.assert_close(other.graph.scales[layer], scale, rtol=0, atol=0)
    expected, found = one.run(images), other.run(images)
    for layer, steps in expected.spike_steps.items():
        assert torch.equal(found.spike_steps[layer], steps), layer
    left_out = {"dropped", "folded into the synapses that follow"}
    rows, others = ([row for row in snn.report if row["became"] not in left_out] for snn in (one, other))
    assert [(row["module"], row["became"]) for row in rows] == [(row["module"], row["became"]) for row in others]
