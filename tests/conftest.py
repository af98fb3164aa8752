"""What the test files share: hypothesis profiles, real data where there is some, seeds."""

import os

import pytest
import torch
from helpers.mnist import paper_network, read_mnist
from helpers.paths import SHARED
from hypothesis import HealthCheck, settings
from safetensors.torch import load_file

torch.set_num_threads(1)  # On networks this small, threads only wait for each other.

# Drawing a network takes as long as the machine is busy; that is no fault of a test.
PATIENT = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}
settings.register_profile("ci", max_examples=20, derandomize=True, **PATIENT)
settings.register_profile("thorough", max_examples=500, **PATIENT)
settings.register_profile("nightly", max_examples=100, derandomize=False, print_blob=True, **PATIENT)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Mark tests of random networks as `property`; those marked `shared` need the data beside the checkout."""
    for item in items:
        if getattr(getattr(item, "obj", None), "is_hypothesis_test", False):
            item.add_marker("property")
    if (SHARED / "golden").exists():
        return
    skip = pytest.mark.skip(reason=f"{SHARED} is not there (real data, trained weights, golden numbers)")
    for item in items:
        if "shared" in item.keywords:
            item.add_marker(skip)


class Seeds:
    """Seeds each test before its fixtures, examples in docstrings too (a conftest's own hooks see its folder only).

    What a file makes when it is imported depends on no other file.
    """

    def pytest_collectstart(self):
        torch.manual_seed(0)

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_setup(self):
        torch.manual_seed(0)


def pytest_configure(config):
    config.pluginmanager.register(Seeds())


@pytest.fixture(scope="session")
def mnist_weights():
    """State dict of the paper's MNIST network."""
    return load_file(SHARED / "data" / "weights" / "mnist_convnet.safetensors")


@pytest.fixture(scope="session")
def mnist_ann(mnist_weights):
    """The paper's MNIST network, trained, in eval mode. Tests must not modify it."""
    ann = paper_network()
    ann.load_state_dict(mnist_weights)
    return ann.eval()


@pytest.fixture(scope="session")
def mnist_train():
    """The 60,000 training images and their labels."""
    return read_mnist("train")


@pytest.fixture(scope="session")
def mnist_test():
    """The 10,000 test images and their labels."""
    return read_mnist("t10k")
