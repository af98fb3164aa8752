"""Results of simulations as data: pickled, saved, copied, sent by workers."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

import quartz_plugin
from quartz_plugin.engines import SimulationResult
from quartz_plugin.hardware import InferenceCounts


def network(**options):
    ann = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    return quartz_plugin.convert(ann, torch.rand(32, 4), 8, **options)


def saved(result):
    file = io.BytesIO()
    torch.save(result, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


COPIES = {
    "pickle": lambda result: pickle.loads(pickle.dumps(result)),
    "torch.save": saved,
    "deepcopy": copy.deepcopy,
    "copy": copy.copy,
}


def assert_alike(found, result):
    assert type(found) is SimulationResult
    assert torch.equal(found.logits, result.logits)
    assert torch.equal(found.membrane, result.membrane)
    assert list(found.spike_steps) == list(result.spike_steps)
    assert all(torch.equal(steps, result.spike_steps[name]) for name, steps in found.spike_steps.items())
    assert (found.windows, found.n_steps, found.engine) == (result.windows, result.n_steps, result.engine)
    assert (found.signed_output, found.task, found.network) == (result.signed_output, result.task, result.network)
    assert torch.equal(found.decision_steps, result.decision_steps)
    assert not found.logits.requires_grad


@pytest.mark.parametrize("way", COPIES)
@pytest.mark.parametrize(("engine", "learns"), [("analytic", False), ("analytic", True), ("stepped", True)])
def test_a_copy_is_the_same_without_network_and_gradients(way, engine, learns):
    snn = network().requires_grad_(learns)
    result = snn.run(torch.rand(5, 4), engine)
    counts = InferenceCounts(snn, result)["synops"]
    assert result.logits.requires_grad is learns
    found = COPIES[way](result)
    assert_alike(found, result)
    assert result.logits.requires_grad is learns
    assert torch.equal(InferenceCounts(snn, found)["synops"]["1"], counts["1"])
    if way != "copy":
        found.spike_steps["1"].fill_(-1)
        assert int(result.spike_steps["1"].min()) >= 0


class Results(Dataset):
    """A result for each batch of images."""

    def __init__(self, snn, images):
        self.snn, self.images = snn, images

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return self.snn.run(self.images[index])


@pytest.mark.parametrize("learns", [False, True])
def test_workers_send_results(learns):
    snn, images = network().requires_grad_(learns), torch.rand(3, 5, 4)
    loader = DataLoader(Results(snn, images), batch_size=None, num_workers=1, timeout=60)
    for found, each in zip(loader, images, strict=True):
        assert_alike(found, snn.run(each))
