"""Tracing: what a forward asks of shapes is answered, and refusals name the cause, the module and what to do."""

import json
import math
import re
import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import quartz_plugin
from quartz_plugin import ConversionError

images = torch.rand(50, 4, generator=torch.Generator().manual_seed(2))


def net_of(forward, **attributes):
    """A network of this forward with two linear layers, `fc` and `last`, and further attributes."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.last = nn.Linear(4, 4), nn.Linear(4, 2)
            nn.init.uniform_(self.fc.bias, 0.2, 0.4)
            for name, value in attributes.items():
                setattr(self, name, value)

    Net.forward = forward
    return Net().eval()


def assert_converts(ann, given=images):
    snn = quartz_plugin.convert(ann, given, 2000, percentile=100)
    with torch.no_grad():
        wanted = ann(given)
    assert (snn(given) - wanted).abs().max() < 0.01 * wanted.abs().max()
    return snn


def message_of(ann, given=images):
    with pytest.raises(ConversionError) as caught:
        quartz_plugin.convert(ann, given)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def _loops(self, x):
    for _ in range(x.shape[1] - 2):
        x = self.fc(x).relu()
    return self.last(x)


def _asserts(self, x):
    assert x.size(1) == 4
    assert x.dim() == len(x.shape) == 2
    assert not x.is_cuda
    assert x.dtype in (torch.float32, torch.float64)
    if self.fc(x).shape[-1] != 4:
        raise ValueError("wrong shape")
    return self.last(self.fc(x).relu())


def _pieces(self, x):
    return self.last(torch.cat([2 * piece.relu() for piece in self.fc(x).chunk(2, 1)], 1))


def _numbers(self, x):
    width = int(x.shape[1] / 2)
    return self.last(F.pad(self.fc(x).relu()[:, :width], (0, 4 - width))) * float(x.shape[1])


def _optional(self, x, mask=None, rectify=True, gain=2):
    x = self.fc(x)
    if mask is not None:
        x = x * mask
    return self.last((x.relu() if rectify else x) * gain)


def _same_padding(self, x):
    """TensorFlow's: as much as the last window needs."""
    x = self.fc(x).relu()
    steps = math.ceil(x.size()[-1] / 3)
    missing = max((steps - 1) * 3 + 3 - x.size(-1), 0)
    torch._assert(missing == 2, "padding")
    x = F.avg_pool1d(F.pad(x[:, None], (missing // 2, missing - missing // 2)), 3).flatten(1)
    return self.last(torch.cat([x, x], 1))


def _unpacks(self, x):
    if x.dim() == 1 or x.ndim != 2 or x.is_cuda or x.requires_grad or x.device.type == "meta":
        raise ValueError("wrong input")
    batch, width = x.shape
    return self.last(self.fc(x).relu().view(batch, width // 2, 2).reshape(x.size(0), int(np.prod(x.shape[1:]))))


def _makes_constants(self, x):
    x = self.fc(x).relu()
    weights = torch.ones(x.shape[1], device=x.device, dtype=x.dtype) * 2
    return self.last(x * weights + torch.zeros(x.size(0), x.size(1)) + torch.arange(x.shape[-1]))


def _compares(self, x):
    rectified = self.fc(x).relu()
    assert rectified.shape == x.shape
    assert rectified.shape[1:] == x.size()[1:]
    return self.last(rectified + x if rectified.size() == x.size() else x)


def _checkpoints(self, x):
    return self.last(checkpoint(lambda x: self.fc(x).relu(), x, use_reentrant=False))


def _sizes_as_a_tensor(self, x):
    """As exporters of ONNX write it."""
    x = self.fc(x).relu()
    sizes = torch.cat([torch.tensor(x.shape)[:1], torch.tensor([2, 2])])
    x = torch.reshape(x, torch.Size(sizes))
    assert x.dim() == 3
    return self.last(x[[slice(None), slice(0, 2)]].flatten(1))


@torch.fx.wrap
def largest_of(pair):
    return pair[0] if isinstance(pair, tuple) else pair


@torch.fx.wrap
def width_of(x):
    return x.shape[1]


def _wrapped_functions(self, x):
    x = self.fc(x).relu()
    return self.last(torch.cat([largest_of(torch.max(x, 1, keepdim=True)) for _ in range(width_of(x))], 1))


class TestShapes:
    @pytest.mark.parametrize(
        "forward",
        [
            *(_loops, _asserts, _pieces, _numbers, _optional, _same_padding, _unpacks, _makes_constants, _compares),
            *(_checkpoints, _sizes_as_a_tensor, _wrapped_functions),
        ],
    )
    def test_are_known(self, forward):
        assert_converts(net_of(forward))

    def test_of_a_batch_are_not(self):
        ann = net_of(lambda self, x: self.last(self.fc(x).relu() if x.shape[0] > 1 else x))
        assert re.search(r"cannot trace Net: its forward must not branch on the size of the batch", message_of(ann))
        ann = net_of(lambda self, x: self.last(sum(list(self.fc(x)))))
        assert re.search(r"must not iterate over the size of the batch", message_of(ann))

    @pytest.mark.parametrize("sizes", [(1, 2, 2), (1, -1, 2), [1, 2, -1]])
    def test_of_one_image_alone_are_those_of_any(self, sizes):
        def forward(self, x):
            x = torch.cat([self.fc(x).relu().view(sizes), torch.ones(1, 1, 2)], 1).reshape(1, 6)
            return self.last(x[:, :4] + x[:, 2:])

        ann = net_of(forward)
        snn = quartz_plugin.convert(ann, images, 2000, percentile=100)
        with torch.no_grad():
            wanted = torch.cat([ann(image[None]) for image in images])
        assert (snn(images) - wanted).abs().max() < 0.01 * wanted.abs().max()

    def test_that_put_several_images_into_one_are_refused(self):
        message = message_of(net_of(lambda self, x: self.last(self.fc(x).relu()).reshape(1, -1, 2)))
        assert "it mixes the batch with the units of a sample" in message

    @pytest.mark.parametrize("ask", [bool, int, float, lambda x: int(x.argmax()), lambda x: x.shape[0] if x > 1 else 2])
    def test_tell_nothing_of_values(self, ask):
        ann = net_of(lambda self, x: self.last(self.fc(x) * ask(x.mean())))
        message = message_of(ann)
        assert re.search(r"cannot trace Net: its forward must not .* the values of tensors; write it", message), message


def _branches(self, x):
    return self.last(self.fc(x) if x.sum() > 0 else x)


class TestBlame:
    @pytest.mark.parametrize(
        "attribute",
        [
            nn.ModuleList([nn.Linear(4, 4)]),
            nn.ModuleDict({"a": nn.GELU()}),
            nn.ParameterList([nn.Parameter(torch.ones(1))]),
            nn.CrossEntropyLoss(),
            nn.GELU(),
        ],
        ids=lambda module: type(module).__name__,
    )
    def test_is_not_on_modules_that_are_not_called(self, attribute):
        message = message_of(net_of(_branches, other=attribute))
        assert re.search(r"^torch\.fx cannot trace Net: .*must not branch on the values of tensors", message), message
        assert "other" not in message

    def test_is_on_the_module_that_was_called_before_tracing_failed(self):
        ann = net_of(lambda self, x: self.last(x if self.other(x).sum() > 0 else -x), other=nn.GELU())
        assert message_of(ann).startswith("cannot convert 'other' (GELU): it is not a ReLU")

    def test_is_on_the_settings_that_change(self):
        def forward(self, x):
            one = self.pool(x)
            self.pool.padding = 1
            other = self.pool(x)
            self.pool.padding = 0
            return self.head((one + other[:, :, 1:-1]).flatten(1))

        ann = net_of(forward, pool=nn.AvgPool1d(3, 1), head=nn.Linear(4, 2))
        message = message_of(ann, torch.rand(20, 1, 6))
        assert re.search(r"'pool' \(AvgPool1d\): its padding changes during forward, from \S+ to 1", message), message

    def test_is_on_the_settings_that_end_as_others(self):
        def forward(self, x):
            self.pool.stride = (1,)
            out = self.head(self.pool(x).flatten(1))
            self.pool.stride = (2,)
            return out

        ann = net_of(forward, pool=nn.AvgPool1d(3), head=nn.Linear(4, 2))
        message = message_of(ann, torch.rand(20, 1, 6))
        assert re.search(r"'pool' \(AvgPool1d\): its stride changes during forward", message), message

    def test_is_on_the_settings_that_the_batch_decides(self):
        def forward(self, x):
            self.pool.stride = (x.shape[0],)
            return self.head(self.pool(x).flatten(1))

        ann = net_of(forward, pool=nn.AvgPool1d(3), head=nn.Linear(1, 2))
        message = message_of(ann, torch.rand(20, 1, 6))
        assert re.search(r"'pool' \(AvgPool1d\): its stride is set in forward; call", message), message

    def test_is_not_on_the_settings_that_shapes_decide(self):
        def pooled(self, x):
            self.pool.kernel_size = x.shape[2:]
            return self.last(self.fc(self.pool(x).flatten(1)).relu())

        assert_converts(net_of(pooled, pool=nn.AvgPool1d(3), fc=nn.Linear(1, 4)), torch.rand(20, 1, 6))

    def test_is_on_quantised_modules_with_their_home(self):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ann = torch.ao.quantization.quantize_dynamic(net_of(_loops), {nn.Linear})
        message = message_of(ann)
        assert re.search(r"'fc' \(torch\.ao\.nn\.quantized\S*\.Linear\): it holds quantised", message), message

    def test_is_not_on_the_values_for_what_else_fails(self):
        ann = net_of(lambda self, x: self.last(x if json.dumps(x) else self.fc(x)))
        message = message_of(ann)
        assert re.search(r"torch\.fx cannot trace Net: .*; write its forward with", message), message
        assert "values" not in message


class TestUnused:
    @pytest.mark.parametrize(
        "operation",
        [
            F.gelu,
            nn.Sequential(nn.Linear(4, 3), nn.GELU(), nn.LayerNorm(3)),
            lambda x: (x.sigmoid() * x).sum() + torch.linalg.norm(x),
            lambda x: torch._assert((x.relu() >= 0).all(), "negative"),
            torch.sigmoid,
        ],
    )
    def test_results_are_not_computed(self, operation):
        def forward(self, x):
            x = self.fc(x)
            (self.other if isinstance(operation, nn.Module) else operation)(x)
            return self.last(x.relu())

        snn = assert_converts(net_of(forward, other=operation if isinstance(operation, nn.Module) else None))
        assert len(snn.report) == 4

    def test_results_may_be_changes(self):
        def forward(self, x):
            x = self.fc(x)
            x.relu_()
            x.add_(1)
            F.relu(x, inplace=True)
            return self.last(x)

        assert_converts(net_of(forward))

    @pytest.mark.parametrize(
        ("change", "name"),
        [
            (lambda x: x.sigmoid_(), "sigmoid_"),
            (lambda x: torch.sigmoid(x, out=x), "sigmoid"),
            (lambda x: F.elu(x, inplace=True), "elu"),
            (lambda x: x.view(-1, 2, 2).tanh_(), "tanh_"),
            (nn.GELU, ""),
        ],
    )
    def test_results_that_change_a_tensor_are_refused_by_name(self, change, name):
        def forward(self, x):
            x = self.fc(x).relu()
            change(x)
            return self.last(x)

        if name:
            assert re.search(rf"cannot convert '{name}' \({name}\): ", message_of(net_of(forward)))
        else:
            assert_converts(net_of(forward))


class TestWhatEndsANetwork:
    ENDS = (
        lambda x: x.softmax(1),
        lambda x: F.log_softmax(x, dim=1),
        lambda x: F.softmax(x, 1).squeeze(),
        lambda x: torch.sigmoid(x).view(-1, 4, 1),
        lambda x: F.dropout(x.softmax(1), training=False).argmax(1),
    )

    @pytest.mark.parametrize("end", ENDS)
    def test_is_computed_by_the_host(self, end):
        ann = net_of(lambda self, x: end(self.fc(x)))
        snn = quartz_plugin.convert(ann, images, 4096, percentile=100)
        wanted = ann.eval()(images)
        given = snn(images)
        assert given.shape == wanted.shape
        if wanted.is_floating_point():
            assert float((given - wanted).detach().abs().max()) < 2e-3
        else:
            assert float((given == wanted).float().mean()) > 0.9
        assert any("by the host" in str(row["became"]) for row in snn.report)

    @pytest.mark.parametrize("end", ENDS)
    def test_may_not_be_left_out_inside(self, end):
        message = message_of(net_of(lambda self, x: self.last(end(self.fc(x)).flatten(1))))
        assert "leave it out:" not in message
        assert re.search(r"train the network without it|train the network with nn\.ReLU", message), message

    def test_nor_where_something_else_uses_it_too(self):
        def forward(self, x):
            shares = self.fc(x).softmax(1)
            return self.last(shares) + shares[:, :2]

        assert "train the network without it" in message_of(net_of(forward))


NAMES = ("in", "None", "lambda", "graph", "code", "meta", "recompile", 'a"b', "a'b", "a b", "a\\b", "a\nb", "é", "in_")


class TestNames:
    @pytest.mark.parametrize("name", NAMES)
    def test_of_any_kind_are_converted_trained_saved_and_exported(self, name, tmp_path):
        block = nn.Sequential()
        block.add_module(name, nn.Linear(4, 4))
        ann = nn.Sequential()
        ann.add_module(name, nn.Linear(4, 4))
        ann.add_module("relu", nn.ReLU())
        ann.add_module("block", block)
        ann.add_module(name + "_relu", nn.ReLU())
        ann.add_module("last", nn.Linear(4, 2))
        snn = assert_converts(ann)
        snn.save(tmp_path / "net.snn")
        assert torch.equal(quartz_plugin.load(tmp_path / "net.snn")(images), snn(images))
        coarse = quartz_plugin.convert(ann, images, 16)
        net = coarse.to_snntorch()
        spikes = torch.stack([net(step) for step in quartz_plugin.encode(images, 16, coarse.n_steps)])
        torch.testing.assert_close(coarse.decode(spikes), coarse.run(images, engine="stepped").logits)
        assert quartz_plugin.verify(ann, snn, images).agreement > 0.9
        assert quartz_plugin.prepare_qat(ann, images, 4).to_spiking()(images).isfinite().all()
        assert all(row["module"].isprintable() for row in snn.report)

    def test_that_would_meet_stay_apart(self):
        ann = nn.Sequential()
        for name in ("in", "in_", "graph", "graph_"):
            ann.add_module(name, nn.Linear(4, 4))
        snn = assert_converts(ann)
        assert len({row["module"] for row in snn.report}) == len(snn.report) >= 4
