"""Networks of timm and Hugging Face, and from ONNX: as they are, with random weights."""

import pytest
import torch
from torch import nn

import quartz_plugin

images = torch.rand(6, 3, 32, 32, generator=torch.Generator().manual_seed(4))


@torch.no_grad()
def settled(ann, images=images):
    """Set a network's batch norms to the statistics of these images: random weights let values vanish."""
    norms = [module for module in ann.modules() if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d)]
    for norm in norms:
        norm.train()
        norm.momentum = 1.0
    ann(images)
    return ann.eval()


@torch.no_grad()
def assert_right(ann, t_max=32_769):
    """Convert so finely that deep networks do not round much, and compare: within 10 % of the largest output."""
    snn = quartz_plugin.convert(ann, images, t_max, percentile=100)
    wanted = ann(images)
    assert (snn(images) - wanted).abs().max() < 0.1 * wanted.abs().max()
    return snn


class TestTimm:
    @pytest.mark.parametrize(
        ("name", "options"),
        [
            ("tf_efficientnet_lite0", {}),
            ("tf_mobilenetv3_small_minimal_100", {}),
            ("resnet10t", {}),
            pytest.param("vgg11_bn", {}, marks=pytest.mark.slow),
            pytest.param("densenet121", {"memory_efficient": True}, marks=pytest.mark.slow),
            pytest.param("mobilenetv2_100", {}, marks=pytest.mark.slow),
            pytest.param("hrnet_w18_small", {}, marks=pytest.mark.slow),
            pytest.param("resnetv2_18", {}, marks=pytest.mark.slow),
            pytest.param("legacy_xception", {}, marks=pytest.mark.slow),
        ],
    )
    def test_networks_with_relus_alone(self, name, options):
        timm = pytest.importorskip("timm")
        torch.manual_seed(0)
        snn = assert_right(settled(timm.create_model(name, num_classes=10, **options)))
        # Batch norms that timm calls as a function are folded like modules.
        assert not any("bn" in row["module"] and row["became"] == "synapses" for row in snn.report)

    def test_checkpoints(self):
        timm = pytest.importorskip("timm")
        torch.manual_seed(0)
        ann = settled(timm.create_model("resnet10t", num_classes=10))
        expected = quartz_plugin.convert(ann, images)(images)
        ann.set_grad_checkpointing(True)
        assert torch.equal(quartz_plugin.convert(ann, images)(images), expected)


class Logits(nn.Module):
    """The logits of a network of Hugging Face."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, x):
        return self.network(x).logits


class TestHuggingFace:
    @pytest.mark.parametrize("name", ["ResNet", "RegNet", "MobileNetV1", "MobileNetV2"])
    def test_classifiers(self, name):
        transformers = pytest.importorskip("transformers")
        options = {
            "ResNet": {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"},
            "RegNet": {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "x"},
            "MobileNetV1": {"depth_multiplier": 0.25},
            "MobileNetV2": {"depth_multiplier": 0.35},
        }[name]
        if name == "RegNet":
            options["groups_width"] = 4
        torch.manual_seed(0)
        config = getattr(transformers, f"{name}Config")(num_labels=5, **options)
        assert_right(settled(Logits(getattr(transformers, f"{name}ForImageClassification")(config))))


@torch.no_grad()
def test_a_network_from_onnx():
    onnx2torch, onnx = pytest.importorskip("onnx2torch"), pytest.importorskip("onnx")
    make, rng = onnx.helper, torch.Generator().manual_seed(0)
    tensors = {"w": (8, 3, 3, 3), "b": (8,), "g": (8,), "s": (8,), "m": (8,), "v": (8,), "w2": (8, 8, 3, 3)}
    tensors |= {"fw": (4, 16), "fb": (4,)}
    values = {name: torch.rand(shape, generator=rng) - (0.4 if name != "v" else 0) for name, shape in tensors.items()}
    kernel = {"pads": [1, 1, 1, 1], "kernel_shape": [3, 3]}
    graph = make.make_graph(
        [
            make.make_node("Conv", ["x", "w", "b"], ["conv"], **kernel),
            make.make_node("BatchNormalization", ["conv", "g", "s", "m", "v"], ["norm"]),
            make.make_node("Relu", ["norm"], ["relu"]),
            make.make_node("MaxPool", ["relu"], ["pool"], kernel_shape=[2, 2], strides=[2, 2]),
            make.make_node("Conv", ["pool", "w2"], ["conv2"], **kernel),
            make.make_node("Add", ["conv2", "pool"], ["sum"]),
            make.make_node("Relu", ["sum"], ["relu2"]),
            make.make_node("Concat", ["relu2", "pool"], ["both"], axis=1),
            make.make_node("GlobalAveragePool", ["both"], ["mean"]),
            make.make_node("Flatten", ["mean"], ["flat"]),
            make.make_node("Gemm", ["flat", "fw", "fb"], ["y"], transB=1),
        ],
        "network",
        [make.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["N", 3, 32, 32])],
        [make.make_tensor_value_info("y", onnx.TensorProto.FLOAT, ["N", 4])],
        [onnx.numpy_helper.from_array(value.numpy(), name) for name, value in values.items()],
    )
    model = make.make_model(graph, opset_imports=[make.make_opsetid("", 13)])
    snn = assert_right(onnx2torch.convert(model).eval())
    assert [layer.name for layer in snn.graph.layers] == ["Relu", "Relu_1", "output"]
