"""Several processes find what one does: the network that all images calibrate, and what metrics compute."""

import tempfile
from pathlib import Path

import pytest
import torch
from torch import nn

import quartz_plugin
from quartz_plugin import metrics
from quartz_plugin.costs import LOIHI, paper_profile


def network():
    torch.manual_seed(3)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 5), nn.ReLU(), nn.Linear(5, 3))


def images():
    return torch.rand(90, 1, 6, 6, generator=torch.Generator().manual_seed(4)) ** torch.linspace(1, 8, 90).view(
        -1, 1, 1, 1
    )


OPTIONS = {"percentile": 97, "granularity": "channel", "t_max": 8}
ESTIMATES = {"task": "regression", "output_percentile": 95}


def every_metric(snn):
    """One of each metric, and the arguments of its update, made from a result and its images."""
    named = {
        "spikes": metrics.SpikeCount(snn),
        "spikes of names": metrics.SpikesPerNeuron(["input", "1", "4", "output"]),
        "spikes a neuron": metrics.SpikesPerNeuron(snn),
        "early": metrics.EarlySpikeRate(snn),
        **{kind: metrics.SynapticOperations(snn, kind) for kind in ("synapse", "factored", "merged")},
        "operations": metrics.QuartzOperations(snn),
        "events": metrics.NeuronEvents(snn),
        "memory": metrics.MemoryAccesses(snn),
        "latency": metrics.DecisionLatency(),
        "energy": metrics.EnergyEstimate(snn, LOIHI),
        "energy of the paper": metrics.EnergyEstimate(snn, paper_profile(snn.t_max)),
    }
    updates = {name: lambda result, _: (result,) for name in named}
    named |= {"agreement": metrics.Agreement(), "ann": metrics.ANNOperations(network().eval(), images())}
    updates["agreement"] = lambda result, x: (result.logits, x.flatten(1)[:, :3])
    updates["ann"] = lambda _, x: (x,)
    return {name: (metric, updates[name]) for name, metric in named.items()}


def computed(snn, x):
    """What each metric computes after these images, in batches of 7; in several processes, after everybody's."""
    values = {}
    results = [(snn.run(part), part) for part in x.split(7) if len(part)]
    for name, (metric, arguments) in every_metric(snn).items():
        for result, part in results:
            metric.update(*arguments(result, part))
        value = metric.compute()
        values[name] = value if isinstance(value, dict) else {name: value}
    return values


def spiking():
    """It has early spikes and silence."""
    return quartz_plugin.convert(network(), images(), 24, percentile=80, hold=False, rectifier="silent")


SHARES = {"10 and 80": (slice(0, 10), slice(10, 90)), "none and all": (slice(0, 0), slice(0, 90))}


def work(rank, folder):
    """One process: converts with its share of the images, measures its share, and saves what it got."""
    torch.set_num_threads(1)
    store = torch.distributed.FileStore(f"{folder}/store", 2)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
    share = SHARES["10 and 80"][rank]
    quartz_plugin.convert(network(), images()[share], distributed=True, **OPTIONS).save(f"{folder}/{rank}.safetensors")
    estimator = quartz_plugin.convert(network(), images()[share], distributed=True, **OPTIONS, **ESTIMATES)
    estimator.save(f"{folder}/{rank}_estimator.safetensors")
    values = {name: computed(spiking(), images()[shares[rank]]) for name, shares in SHARES.items()}
    torch.save(values, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def of_two():
    """Networks and metrics of two processes; starting them takes far longer than what they do."""
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(work, args=(folder,), nprocs=2)
        yield [
            (
                quartz_plugin.load(Path(folder) / f"{rank}.safetensors"),
                torch.load(f"{folder}/{rank}.pt"),
                quartz_plugin.load(Path(folder) / f"{rank}_estimator.safetensors"),
            )
            for rank in (0, 1)
        ]


def test_two_processes_get_the_network_of_one(of_two):
    whole = quartz_plugin.convert(network(), images(), **OPTIONS)
    alone = quartz_plugin.convert(network(), images()[SHARES["10 and 80"][0]], **OPTIONS)
    for part, *_ in of_two:
        for name, scale in whole.graph.scales.items():
            assert torch.equal(part.graph.scales[name], scale), name
        for name, tensor in whole.graph_module.state_dict().items():
            assert torch.equal(part.graph_module.state_dict()[name], tensor), name
    assert any(not torch.equal(alone.graph.scales[name], scale) for name, scale in whole.graph.scales.items())


def test_two_processes_get_the_ranges_that_one_gives_a_regression(of_two):
    whole = quartz_plugin.convert(network(), images(), **OPTIONS, **ESTIMATES).graph
    for *_, part in of_two:
        assert torch.equal(part.graph.output_scale, whole.output_scale)
        assert torch.equal(part.graph.output_shift, whole.output_shift)
        for name, tensor in whole.module.state_dict().items():
            assert torch.equal(part.graph_module.state_dict()[name], tensor), name


def test_metrics_of_two_processes_are_those_of_one(of_two):
    whole, alone = computed(spiking(), images()), computed(spiking(), images()[10:])
    for _, part, _ in of_two:
        for shares in SHARES:
            for name, values in whole.items():
                assert part[shares][name] == values, (shares, name)
    # One process's images alone would have told something else, of every metric.
    assert [name for name in whole if whole[name] == alone[name]] == []
    tested = {type(metric).__name__ for metric, _ in every_metric(spiking()).values()}
    assert tested == {name for name in metrics.__all__ if name[0].isupper()}


def fail_in_one(rank, folder):
    """Process 1 has no images; both must say so, and neither wait."""
    torch.set_num_threads(1)
    store = torch.distributed.FileStore(f"{folder}/store", 2)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
    share = images()[:10] if rank == 0 else images()[:0]
    with pytest.raises(ValueError, match="calibration is empty" if rank else "process 1 could not calibrate.*is empty"):
        quartz_plugin.convert(network(), share, distributed=True)
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_an_error_in_one_process_is_one_in_all():
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(fail_in_one, args=(folder,), nprocs=2)


def test_without_a_process_group_it_says_what_is_missing():
    with pytest.raises(ValueError, match="init_process_group in every process first"):
        quartz_plugin.convert(network(), images(), distributed=True)
