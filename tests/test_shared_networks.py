"""Trained residual and concatenating networks of ../shared: figures within wide bounds, exports stepped by hand."""

import pytest
import torch
import torchvision
from helpers.random_chains import first_spikes, input_train
from helpers.shared_networks import IMAGENET, images_of, trained
from torchvision.transforms import v2

import quartz_plugin
from quartz_plugin.costs.counts import source_levels
from quartz_plugin.engines.integer import maps
from quartz_plugin.engines.stepped import step_layer
from quartz_plugin.lightning import EfficientNetLite0, MobileNetV1, ResNet20

pytestmark = pytest.mark.shared


@pytest.fixture(scope="module")
def resnet20():
    return trained(ResNet20(), "cifar10_resnet20.safetensors")


@pytest.fixture(scope="module")
def cifar10_train():
    return images_of("cifar10/train", 200, 32)[0]


def accuracies(ann, snn, images, labels, preprocessing):
    with torch.no_grad():
        answer = ann(v2.Normalize(*preprocessing)(images)).argmax(1)
    return float((answer == labels).float().mean()), float((snn(images).argmax(1) == labels).float().mean())


def test_resnet20_keeps_its_accuracy_at_64_levels(resnet20, cifar10_train):
    snn = quartz_plugin.convert(resnet20, cifar10_train, 64, preprocessing=IMAGENET)
    ann, spiking = accuracies(resnet20, snn, *images_of("cifar10/test", 200, 32), IMAGENET)
    assert ann > 0.85
    assert spiking >= ann - 0.03
    assert [row["readout"] // 63 for row in snn.report if row.get("readout")] == list(range(1, 21))
    assert quartz_plugin.verify(resnet20, snn, cifar10_train[:20]).agreement >= 0.9


@pytest.mark.parametrize("options", [{}, {"rectifier": "silent", "linear": "pair"}, quartz_plugin.PAPER], ids=str)
def test_resnet20_exported_and_stepped_by_hand_gives_the_same_spike_steps(resnet20, cifar10_train, options):
    snn = quartz_plugin.convert(resnet20, cifar10_train[:50], 4, preprocessing=IMAGENET, **options).double()
    images = cifar10_train[50:52]
    steps = snn.run(images, engine="stepped").spike_steps["output"]
    train = input_train(snn, images)
    net = snn.to_snntorch()
    assert torch.equal(first_spikes([net(spikes) for spikes in train]), steps)
    net, state, outputs = snn.to_norse(), None, []
    for spikes in train:
        out, state = net(spikes, state)
        outputs.append(out)
    assert torch.equal(first_spikes(outputs), steps)


def test_resnet20_stepped_equals_analytic_layer_by_layer_but_for_ties(resnet20, cifar10_train):
    snn = quartz_plugin.convert(resnet20, cifar10_train[:50], 16, preprocessing=IMAGENET)
    graph, images = snn.graph, cifar10_train[50:54]
    result = snn.run(images, engine="analytic")
    levels = source_levels(graph, result)
    differing = neurons = 0
    for layer in graph.layers:
        steps = step_layer(layer, {source: levels[source] for source in layer.projection.sources})
        apart = (steps - result.spike_steps[layer.name]).abs()
        assert int(apart.max()) <= 1, layer.name
        differing, neurons = differing + int(apart.sum()), neurons + steps.numel()
    assert neurons == 4 * 188_426
    assert differing <= neurons / 10_000


@pytest.mark.slow
def test_squeezenet_keeps_its_accuracy_at_64_levels():
    ann = trained(torchvision.models.squeezenet1_0(), "imagenet_squeezenet1_0.safetensors")
    snn = quartz_plugin.convert(
        ann,
        images_of("imagenet/train", 100, 227)[0],
        64,
        percentile=99.99,
        granularity="channel",
        layers={"input": {"t_max": 256}, "output": {"t_max": 256}},
        preprocessing=IMAGENET,
    )
    images, _ = images_of("imagenet/val", 80, 227)
    assert quartz_plugin.verify(ann, snn, images).agreement >= 0.75


@pytest.mark.slow
def test_mobilenet_v1_approaches_the_ann_with_t_max():
    ann = trained(MobileNetV1(), "imagenet_mobilenet_v1_025_128.safetensors")
    preprocessing = ((0.5,) * 3, (0.5,) * 3)
    calibration, images = images_of("imagenet/train", 200, 128)[0], images_of("imagenet/val", 100, 128)[0]
    agreements = [
        quartz_plugin.verify(
            ann, quartz_plugin.convert(ann, calibration, t, preprocessing=preprocessing), images
        ).agreement
        for t in (16, 64, 1024)
    ]
    assert agreements == sorted(agreements)
    assert agreements[-1] >= 0.85


@pytest.mark.parametrize("options", [{}, {"hold": False}, {"hold": False, "rectifier": "silent"}], ids=str)
def test_resnet20_in_8_bits_spikes_alike_in_all_engines(resnet20, cifar10_train, options):
    snn = quartz_plugin.convert(resnet20, cifar10_train[:50], 16, preprocessing=IMAGENET, weight_bits=8, **options)
    images = cifar10_train[50:58]
    expected = snn.run(images, engine="stepped").spike_steps
    for engine in ("event", "analytic") if snn.graph.hold else ("event",):
        for name, steps in snn.run(images, engine=engine).spike_steps.items():
            assert torch.equal(steps, expected[name]), (engine, name)


def test_efficientnet_lite0_in_8_bits_spikes_alike_in_all_engines_and_keeps_its_decisions():
    ann = trained(EfficientNetLite0(), "imagenet_efficientnet_lite0.safetensors")
    preprocessing = ((127 / 255,) * 3, (128 / 255,) * 3)
    images, labels = images_of("imagenet/train", 60, 224)
    grids = {"weight_bits": 8, "weight_granularity": "channel"}
    snn = quartz_plugin.convert(ann, images[:40], 128, preprocessing=preprocessing, linear="pair", **grids)
    assert snn.graph.dtype == torch.float32
    ann_accuracy, accuracy = accuracies(ann, snn, images[40:], labels[40:], preprocessing)
    assert ann_accuracy >= 0.7
    assert accuracy >= ann_accuracy - 0.15
    few = images[40:42]
    results = [snn.run(few, engine=engine) for engine in ("integer", "analytic")]
    for name, steps in results[0].spike_steps.items():
        assert torch.equal(steps, results[1].spike_steps[name]), name
    assert snn.run(few).engine == ("integer" if maps.operators_work() else "analytic")
