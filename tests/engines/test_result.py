"""Results of simulations as data: pickled, saved, copied, sent by workers."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

import quartz_plugin
from quartz_plugin.costs import InferenceCounts
from quartz_plugin.engines import SimulationResult


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


# ----------------------------------------------------------------------------------------------- compiled, exported


@pytest.mark.parametrize("backend", ["eager", "aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("hold", [True, False])
def test_a_compiled_network_gives_the_same_values(backend, hold):
    torch._dynamo.reset()
    snn, images = network(hold=hold), torch.rand(5, 4)
    around = nn.Sequential(nn.Sigmoid(), snn, nn.Softmax(1))
    for net in (snn, around):
        expected = net(images)
        compiled = torch.compile(net, backend=backend)
        for _ in range(2):
            torch.testing.assert_close(compiled(images), expected)
    with pytest.raises(ValueError, match="must lie in"):
        torch.compile(snn, backend=backend)(images + 1)


@pytest.mark.parametrize("first_layer", ["spiking", "dense"])
def test_a_held_network_is_exported_for_any_batch(first_layer):
    snn, images = network(first_layer=first_layer), torch.rand(5, 4)
    dynamic = ({0: torch.export.Dim.DYNAMIC},)
    exported = torch.export.export(snn, (images,), strict=False, dynamic_shapes=dynamic).module()
    for batch in (images, torch.rand(1, 4), torch.rand(17, 4)):
        assert torch.equal(exported(batch), snn(batch))
    torch._dynamo.reset()
    assert torch.equal(torch.compile(exported, backend="eager", fullgraph=True)(images), snn(images))


def test_early_spikes_are_not_exported():
    with pytest.raises(ValueError, match=r"torch\.export takes the closed form of held neurons"):
        torch.export.export(network(hold=False), (torch.rand(2, 4),), strict=False)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_weights_may_be_those_of_many_networks_at_once():
    snn, images = network(), torch.rand(5, 4)
    weights = {name: torch.stack([value, -value]) for name, value in snn.state_dict().items()}
    both = torch.func.vmap(lambda own: torch.func.functional_call(snn, own, (images,)))(weights)
    assert torch.equal(both[0], snn(images))
