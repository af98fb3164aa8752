"""Networks from ONNX, as onnx2torch gives them: graphs whose shapes are tensors, some of them for one image alone."""

import io
import warnings

import numpy as np
import pytest
import torch
from helpers.paths import SHARED
from test_networks_people_have import NETWORKS, leaves_of, lively
from torch import nn
from torch.nn import functional as F

import quartz_plugin
from quartz_plugin import ConversionError

onnx2torch = pytest.importorskip("onnx2torch")


class Shuffled(nn.Module):
    """Channel shuffles, splits, padded and sliced maps, a token and a matrix, as exporters write them."""

    def __init__(self):
        super().__init__()
        self.one, self.other = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(3, 8, 1)
        self.token = nn.Parameter(torch.rand(1, 8, 1, 1))
        self.head = nn.Linear(16 * 4, 6)

    def forward(self, x):
        one, other = self.one(x).relu(), F.pad(self.other(x).clamp(0, 1), (1, 1, 0, 0))[:, :, :, 1:-1]
        other = other + self.token.expand(x.shape[0], -1, x.shape[2], x.shape[3])
        both = torch.cat([one, other], 1)
        both = both.reshape(x.shape[0], 2, 8, *x.shape[2:]).transpose(1, 2).reshape(x.shape[0], 16, *x.shape[2:])
        pooled = F.adaptive_avg_pool2d(both, 1) + F.max_pool2d(both.relu(), 2)[:, :, :2, :2]
        scores, gates = self.head(pooled.permute(0, 2, 3, 1).reshape(x.size(0), -1)).split([2, 4], 1)
        weights = torch.arange(8.0).view(4, 2)
        return torch.matmul(gates.relu().unsqueeze(1), weights).squeeze(1) - scores * 2 + scores.abs().sum(1, True)


FROM_TORCH = {name: NETWORKS[name][:2] for name in ("U-Net", "PointNet", "TCN", "dueling DQN", "detector")}
FROM_TORCH["shuffled"] = (Shuffled, (3, 4, 4))


def through_onnx(ann, example, open_batch):
    """The network from ONNX, for any number of images or for one alone."""
    file = io.BytesIO()
    axes = {"x": {0: "batch"}} if open_batch else None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            torch.onnx.export(
                ann, (example,), file, dynamo=False, input_names=["x"], dynamic_axes=axes, opset_version=17
            )
        except Exception as error:  # torch means to leave its exporter that needs no more than onnx behind.
            pytest.skip(f"torch exports no ONNX here: {error}")
        import onnx

        return onnx2torch.convert(onnx.load_model_from_string(file.getvalue())).eval()


@pytest.mark.parametrize("open_batch", [True, False])
@pytest.mark.parametrize("name", FROM_TORCH)
def test_networks_come_through_onnx(name, open_batch):
    kind, shape = FROM_TORCH[name]
    images = torch.rand(12, *shape)
    ann = lively(kind(), images)
    snn = quartz_plugin.convert(through_onnx(ann, images[:1], open_batch), images, 2049, percentile=100)
    with torch.no_grad():
        wanted = leaves_of(ann(images))
    for one, other in zip(leaves_of(snn(images)), wanted, strict=True):
        assert float((one - other).abs().max()) < 0.01 * float(other.abs().max())


@pytest.fixture
def text_direction():
    return onnx2torch.convert(str(SHARED / "data" / "onnx" / "ppocr_text_direction.onnx")).eval()


@pytest.mark.shared
class TestTextDirection:
    PREPROCESSING = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))

    def lines(self):
        images = np.load(SHARED / "data" / "text_lines.npz")["images"][:8]
        return torch.from_numpy(images).permute(0, 3, 1, 2) / 255

    def test_is_refused_for_its_first_activation(self, text_direction):
        with pytest.raises(ConversionError) as caught:
            quartz_plugin.convert(text_direction, self.lines(), preprocessing=self.PREPROCESSING)
        message = str(caught.value)
        assert message.startswith("cannot convert 'Mul@0.mul' (mul): it multiplies two activations, one of them ")
        assert "Hardswish" in message
        assert "nn.ReLU" in message

    def test_is_refused_for_its_gates_without(self, text_direction):
        without_hardswish(text_direction)
        with pytest.raises(ConversionError, match=r"'Mul@1\.mul' \(mul\): .*, one of them a gate"):
            quartz_plugin.convert(text_direction, self.lines(), preprocessing=self.PREPROCESSING)

    @pytest.mark.slow
    @pytest.mark.filterwarnings("ignore:.* is 0 on all calibration images")
    def test_converts_with_relu(self, text_direction):
        without_hardswish(text_direction)
        without_gates(text_direction)
        lines = self.lines()
        options = {"preprocessing": self.PREPROCESSING}
        snn = quartz_plugin.convert(text_direction, lines, 16385, percentile=100, **options)
        with torch.no_grad():
            wanted = text_direction((lines - 0.5) / 0.5)
        assert any(row["operation"] == "softmax" and "by the host" in str(row["became"]) for row in snn.report)
        assert float((snn(lines) - wanted).abs().max()) < 0.02
        few = quartz_plugin.convert(text_direction, lines, 9, **options)
        steps = few.run(lines[:2], engine="stepped").spike_steps
        for engine in ("analytic", "event"):
            for layer, found in few.run(lines[:2], engine=engine).spike_steps.items():
                assert float((found != steps[layer]).float().mean()) < 2e-3, (engine, layer)


def without_hardswish(network):
    """Put ReLUs in the place of ``x * relu6(x + 3) / 6``."""
    for node in list(network.graph.nodes):
        if str(node.target).startswith("Mul@") and str(node.args[1].target).startswith("Clip@"):
            (divided,) = node.users
            with network.graph.inserting_after(divided):
                divided.replace_all_uses_with(network.graph.call_function(torch.relu, (node.args[0],)))
    network.graph.eliminate_dead_code()
    network.recompile()


def without_gates(network):
    """Add rectified gates, in the place of factors that are hard sigmoids."""
    for node in list(network.graph.nodes):
        if str(node.target).startswith("Mul@"):
            value, gate = node.args
            with network.graph.inserting_after(node):
                rectified = network.graph.call_function(torch.relu, (gate.args[0],))
            with network.graph.inserting_after(rectified):
                node.replace_all_uses_with(network.graph.call_function(torch.add, (value, rectified)))
    network.graph.eliminate_dead_code()
    network.recompile()
