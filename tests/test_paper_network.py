"""The paper's MNIST network on all 10,000 test images: the accuracies that must hold."""

import pytest
import torch

import quartz_plugin

pytestmark = [pytest.mark.shared, pytest.mark.slow]


def accuracy(snn, images, labels):
    """Share of images classified right, in batches."""
    right = [snn(x).argmax(1) == y for x, y in zip(images.split(500), labels.split(500), strict=True)]
    return float(torch.cat(right).double().mean())


@pytest.mark.parametrize(("t_max", "at_least"), [(4, 0.981), (8, 0.989), (16, 0.990), (32, 0.991)])
def test_the_papers_neuron_reaches_the_papers_accuracy(mnist_ann, mnist_train, mnist_test, t_max, at_least):
    """Percentile 99 of the first 10,000 training images."""
    snn = quartz_plugin.convert(
        mnist_ann, mnist_train[0][:10_000], t_max, percentile=99, output_percentile=99, **quartz_plugin.PAPER
    )
    assert accuracy(snn, *mnist_test) >= at_least


def test_held_neurons_reach_the_ann_at_many_steps(mnist_ann, mnist_train, mnist_test):
    ann = accuracy(mnist_ann, *mnist_test)
    snn = quartz_plugin.convert(mnist_ann, mnist_train[0][:10_000], 256, percentile=99.99)
    assert ann == pytest.approx(0.9923)
    assert accuracy(snn, *mnist_test) == pytest.approx(ann, abs=0.0015)
