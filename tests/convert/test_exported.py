"""Capture through torch.export: the network that torch.fx sees, and networks that torch.fx cannot trace."""

import re
import sys

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import quartz_plugin
from quartz_plugin import ConversionError
from quartz_plugin.convert.exported import exported
from quartz_plugin.convert.trace import trace

images = torch.rand(40, 3, 8, 8, generator=torch.Generator().manual_seed(3))


@pytest.fixture
def through_export(monkeypatch):
    """Let networks be captured by torch.export alone."""
    monkeypatch.setattr(
        sys.modules[trace.__module__],
        "capture",
        lambda root, name, tracer: exported(root, tuple(each[:2] for each in tracer.inputs[0])),
    )


class Net(nn.Module):
    """A small network with layers of all kinds for a forward to call."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.act, self.pool = nn.ReLU(), nn.MaxPool2d(2)
        self.block = nn.Sequential(nn.Conv2d(8, 8, 3, padding="same", groups=2), nn.ReLU6(), nn.Dropout(0.3))
        self.up, self.back = nn.Upsample(scale_factor=2), nn.ConvTranspose2d(8, 8, 2, 2)
        self.last = nn.Linear(8, 4)
        self.weights = torch.rand(4, 4) - 0.3
        self.norm.running_mean.uniform_(-0.2, 0.2)
        self.norm.running_var.uniform_(0.5, 2)

    def head(self, x):
        return self.last(x.mean((2, 3)))


def net_of(forward):
    return type("Own", (Net,), {"forward": forward})().eval()


def _layers(self, x):
    x = self.act(self.norm(self.conv(x)))
    return self.head(self.act(x + self.block(x)))


def _functions(self, x):
    x = F.relu(F.conv2d(x, self.conv.weight, self.conv.bias, padding=1), inplace=True)
    x = F.batch_norm(x, self.norm.running_mean, self.norm.running_var, self.norm.weight, self.norm.bias)
    x = F.relu6(F.conv2d(F.pad(x, (1, 1, 1, 1)), self.block[0].weight, None, 2, groups=2))
    return F.linear(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1), self.last.weight).relu() @ self.weights


def _pools(self, x):
    x = F.max_pool2d(self.conv(x), 3, 2, 1).relu()
    return self.head(F.avg_pool2d(F.adaptive_max_pool2d(x, (3, 3)), 2, 1, ceil_mode=True))


def _moves(self, x):
    x = self.conv(x).relu()
    one, other = x.chunk(2, 1)
    x = torch.cat([one[:, :, 1:-1, ::2], 0.5 * other[..., 1:-1, ::2].clone()], dim=1).transpose(2, 3)
    x = x.permute(0, 2, 3, 1).reshape(x.size(0), 8, -1).roll(1, 1).unsqueeze(1).squeeze(1)
    return self.last(torch.stack([x[:, 0], x[:, 3]], 1).sum(1)[:, :8])


def _upsamples(self, x):
    x = self.pool(self.conv(x).relu())
    return self.head((self.up(x) - self.back(x) / 2).clamp(0, 0.4) + F.interpolate(x, scale_factor=2))


def _in_place(self, x):
    x = self.conv(x)
    x += 0.1
    kept = x.clone()
    x.relu_()
    x *= 2
    x -= kept
    return self.head(x.clamp_(min=0))


FORWARDS = [_layers, _functions, _pools, _moves, _upsamples, _in_place]


def layers_of(snn):
    """Path and scale of each layer, and its spikes."""
    result = snn.run(images[:5])
    return {layer.name: (snn.graph.scales[layer.name], result.spike_steps[layer.name]) for layer in snn.graph.layers}


def assert_same_network(one, other):
    one, other = layers_of(one), layers_of(other)
    assert list(one) == list(other)
    for name, (scale, steps) in one.items():
        assert torch.equal(torch.as_tensor(scale), torch.as_tensor(other[name][0])), name
        assert torch.equal(steps, other[name][1]), name


class TestSameAsFx:
    @pytest.mark.parametrize("forward", FORWARDS, ids=lambda forward: forward.__name__)
    def test_layers_scales_and_spikes(self, forward, request):
        ann = net_of(forward)
        expected = quartz_plugin.convert(ann, images, 16)
        request.getfixturevalue("through_export")
        found = quartz_plugin.convert(ann, images, 16)
        if forward is _in_place:
            # A method that torch.fx knows by its name is a function to torch.export.
            assert [name.rstrip("_") for name in layers_of(expected)] == [name.rstrip("_") for name in layers_of(found)]
            assert torch.equal(found(images), expected(images))
        else:
            assert_same_network(found, expected)

    def test_batch_norms_are_folded(self, through_export):
        report = {row["module"]: row["became"] for row in quartz_plugin.convert(net_of(_layers), images).report}
        assert report["norm"] == "folded into conv"

    def test_twin_in_training_keeps_its_batch_norms(self, through_export):
        net = quartz_plugin.prepare_qat(net_of(_layers), images, 8)
        assert any(isinstance(module, nn.BatchNorm2d) for module in net.modules())


def _length(self, x):
    x = self.conv(x).relu()
    return self.last(x.view(len(x), 8, -1).mean(-1))


def _is_tensor(self, x):
    if not isinstance(x, torch.Tensor):
        raise TypeError("no tensor")
    return self.head(self.conv(x).relu())


def _checks_values(self, x):
    if torch.is_floating_point(x):
        x = self.conv(x).relu()
    return self.head(x)


def _numpy(self, x):
    x = self.conv(x).relu().mean((2, 3))
    return self.last(torch.from_numpy(x.numpy()))


def _in_contexts(self, x):
    assert isinstance(x, torch.Tensor)
    with torch.autocast("cpu", enabled=False):
        x = self.conv(x).relu()
        kept = x + 1
        with torch.set_grad_enabled(True):
            x = x + kept.clamp(0, 1.2)
    return self.head(x)


class TestWhatFxCannotTrace:
    @pytest.mark.parametrize(
        "forward", [_length, _in_contexts, _is_tensor, _checks_values, _numpy], ids=lambda each: each.__name__
    )
    def test_is_captured_by_export(self, forward):
        ann = net_of(forward)
        with torch.no_grad():
            wanted = ann(images)
        snn = quartz_plugin.convert(ann, images, 2000, percentile=100)
        assert (snn(images) - wanted).abs().max() < 0.01 * wanted.abs().max()
        assert (snn(images[:1]) - wanted[:1]).abs().max() < 0.01 * wanted.abs().max()
        assert snn.graph.layers[0].name == "relu"
        assert quartz_plugin.verify(ann, snn, images[:10]).agreement > 0.9

    def test_keeps_the_rules_of_the_user(self):
        class Own(nn.Module):
            def forward(self, x):
                return x.exp() * 0

        ann = net_of(_is_tensor)
        ann.conv = nn.Sequential(ann.conv, Own())
        with pytest.raises(ConversionError, match=r"'conv\.1\.exp' \(exp\)"):
            quartz_plugin.convert(ann, images)
        expected = quartz_plugin.convert(net_of(_is_tensor), images)
        with pytest.raises(ConversionError, match="a registered rule is not the module it stands for"):
            quartz_plugin.convert(ann, images, rules={Own: lambda module: nn.Identity()})
        Own.forward = lambda self, x: x.exp().log()
        found = quartz_plugin.convert(ann, images, rules={Own: lambda module: nn.Identity()})
        torch.testing.assert_close(found(images), expected(images))

    def test_is_refused_with_the_module_and_the_users_line(self):
        def forward(self, x):
            assert isinstance(x, torch.Tensor)
            return self.head(self.conv(x).cos())

        with pytest.raises(ConversionError) as caught:
            quartz_plugin.convert(net_of(forward), images)
        assert re.search(
            r"^cannot convert 'cos' \(cos\): .* \(test_exported\.py, line \d+: return self\.head\(self\.conv\(x\)\.cos",
            str(caught.value),
        ), str(caught.value)

    def test_names_the_module_that_calls(self):
        def forward(self, x):
            assert isinstance(x, torch.Tensor)
            return self.head(self.block(self.conv(x)))

        ann = net_of(forward)
        ann.block[1] = nn.ELU()
        with pytest.raises(ConversionError, match=r"^cannot convert 'block\.1' \(elu\): it is not a ReLU"):
            quartz_plugin.convert(ann, images)

    def test_that_export_cannot_capture_either_is_refused_as_torch_fx_does(self):
        def forward(self, x):
            return self.head(self.conv(x).relu() if x.sum() > 0 else self.conv(x))

        with pytest.raises(ConversionError, match=r"^torch\.fx cannot trace Own: .* values of tensors.*line \d+"):
            quartz_plugin.convert(net_of(forward), images)

    def test_that_depends_on_the_size_of_the_batch_or_is_random_is_refused(self, capfd):
        for change in (lambda x: x if x.shape[0] > 1 else 2 * x, lambda x: x + torch.rand(8, 1, 1)):

            def forward(self, x, change=change):
                assert isinstance(x, torch.Tensor)
                return self.head(change(self.conv(x).relu()))

            with pytest.raises(
                ConversionError, match=r"^Own, captured by torch\.export, computes something else for one"
            ):
                quartz_plugin.convert(net_of(forward), images)

        def forward(self, x):
            assert not torch.isnan(x).any()
            return self.head(self.conv(x).relu())

        with pytest.raises(ConversionError, match=r"values of tensors.*line \d+: assert not torch\.isnan"):
            quartz_plugin.convert(net_of(forward), images)
        assert capfd.readouterr() == ("", "")


class TestExportedPrograms:
    @pytest.mark.parametrize("batch", ["one image", "eight images", "open"])
    @pytest.mark.parametrize("given", ["program", "its module", "core operations"])
    @pytest.mark.parametrize("forward", [_layers, _moves], ids=lambda forward: forward.__name__)
    def test_are_taken_directly(self, forward, given, batch):
        ann = net_of(forward)
        example = images[:1] if batch == "one image" else images[:8]
        shapes = ({0: torch.export.Dim.DYNAMIC},) if batch == "open" else None
        program = torch.export.export(ann, (example,), dynamic_shapes=shapes)
        if given == "core operations":
            program = program.run_decompositions()
        taken = program.module() if given == "its module" else program
        expected, found = (quartz_plugin.convert(each, images, 16) for each in (ann, taken))
        assert [layer.name for layer in found.graph.layers] == [layer.name for layer in expected.graph.layers]
        assert torch.equal(found(images), expected(images))
        check = quartz_plugin.verify(taken, found, images[:20])
        assert check.agreement == quartz_plugin.verify(ann, expected, images[:20]).agreement
        quartz_plugin.check_convertible(taken, images)

    def test_are_left_as_they_are(self):
        program = torch.export.export(net_of(_layers), (images[:1],))
        module = program.module()
        code, wanted = module.code, module(images[:1])
        quartz_plugin.convert(module, images)
        assert module.code == code
        assert torch.equal(module(images[:1]), wanted)

    def test_are_trained_and_allocated(self):
        program = torch.export.export(net_of(_layers), (images[:1],))
        net = quartz_plugin.prepare_qat(program, images, 8)
        assert net.to_spiking()(images).isfinite().all()
        assert quartz_plugin.allocate_steps(program, images, 60, choices=(4, 8))

    def test_are_refused_with_the_module_and_the_users_line(self):
        class Block(nn.Module):
            def forward(self, x):
                return F.gelu(x)

        ann = net_of(_layers)
        ann.block[1] = Block()
        program = torch.export.export(ann, (images[:1],))
        line = r"'block\.1\.gelu' \(gelu\): it is not a ReLU.*\(test_exported\.py, line \d+: return F\.gelu\(x\)\)$"
        with pytest.raises(ConversionError, match=line):
            quartz_plugin.convert(program, images)


def test_a_graph_module_of_torch_fx_is_taken():
    ann = net_of(_layers)
    assert_same_network(*(quartz_plugin.convert(each, images, 16) for each in (ann, torch.fx.symbolic_trace(ann))))
