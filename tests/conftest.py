"""What the test files share: hypothesis profiles, real data where there is some, seeds."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings
from safetensors.torch import load_file
from torch import nn

SHARED = Path(__file__).parents[2] / "shared"

torch.set_num_threads(1)  # On networks this small, threads only wait for each other.

# Drawing a network takes as long as the machine is busy; that is no fault of a test.
PATIENT = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}
settings.register_profile("ci", max_examples=20, derandomize=True, **PATIENT)
settings.register_profile("thorough", max_examples=500, **PATIENT)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


def pytest_collection_modifyitems(items):
    """Tests marked `shared` need the data beside the checkout."""
    if (SHARED / "golden").exists():
        return
    skip = pytest.mark.skip(reason=f"{SHARED} is not there (real data, trained weights, golden numbers)")
    for item in items:
        if "shared" in item.keywords:
            item.add_marker(skip)


class Seeds:
    """Seeds each test before its fixtures, examples in docstrings too (a conftest's own hooks see its folder only)."""

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_setup(self):
        torch.manual_seed(0)


def pytest_configure(config):
    config.pluginmanager.register(Seeds())


@pytest.fixture(scope="session")
def mnist_weights():
    """State dict of the paper's MNIST network."""
    return load_file(SHARED / "data" / "weights" / "mnist_convnet.safetensors")


def paper_network():
    """The paper's MNIST network, untrained; its keys are those of ../shared."""
    return nn.Sequential(
        nn.Conv2d(1, 6, 5),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(6, 12, 5),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(12, 120, 4),
        nn.ReLU(),
        nn.Dropout(),
        nn.Flatten(),
        nn.Linear(120, 10),
    )


@pytest.fixture(scope="session")
def mnist_ann(mnist_weights):
    """The paper's MNIST network, trained, in eval mode. Tests must not modify it."""
    ann = paper_network()
    ann.load_state_dict(mnist_weights)
    return ann.eval()


def read_mnist(split):
    """Images float32 [N, 1, 28, 28] in [0, 1] and labels int64 of "train" or "t10k", from the idx files."""
    raw = SHARED / "data" / "MNIST" / "raw"
    images = np.fromfile(raw / f"{split}-images-idx3-ubyte", np.uint8, offset=16)
    labels = np.fromfile(raw / f"{split}-labels-idx1-ubyte", np.uint8, offset=8)
    images = images.reshape(len(labels), 1, 28, 28).astype(np.float32) / 255
    return torch.from_numpy(images), torch.from_numpy(labels.astype(np.int64))


@pytest.fixture(scope="session")
def mnist_train():
    """The 60,000 training images and their labels."""
    return read_mnist("train")


@pytest.fixture(scope="session")
def mnist_test():
    """The 10,000 test images and their labels."""
    return read_mnist("t10k")
