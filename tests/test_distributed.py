"""Calibration shared by several processes gives the network that one process makes of all images."""

import tempfile
from pathlib import Path

import pytest
import torch
from torch import nn

import quartz_plugin


def network():
    torch.manual_seed(3)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 5), nn.ReLU(), nn.Linear(5, 3))


def images():
    return torch.rand(90, 1, 6, 6, generator=torch.Generator().manual_seed(4)) ** torch.linspace(1, 8, 90).view(
        -1, 1, 1, 1
    )


OPTIONS = {"percentile": 97, "granularity": "channel", "t_max": 8}


def calibrate(rank, folder, shares):
    """One process: converts with its share of the images and saves what it got."""
    torch.set_num_threads(1)
    store = torch.distributed.FileStore(f"{folder}/store", len(shares))
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=len(shares))
    snn = quartz_plugin.convert(network(), images()[shares[rank]], distributed=True, **OPTIONS)
    snn.save(f"{folder}/{rank}.safetensors")
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("shares", [(slice(0, 10), slice(10, 90))], ids=["10 and 80"])
def test_two_processes_get_the_network_of_one(shares):
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(calibrate, args=(folder, shares), nprocs=len(shares))
        parts = [quartz_plugin.load(Path(folder) / f"{rank}.safetensors") for rank in range(len(shares))]
    whole = quartz_plugin.convert(network(), images(), **OPTIONS)
    alone = quartz_plugin.convert(network(), images()[shares[0]], **OPTIONS)
    for part in parts:
        for name, scale in whole.graph.scales.items():
            assert torch.equal(part.graph.scales[name], scale), name
        for name, tensor in whole.graph_module.state_dict().items():
            assert torch.equal(part.graph_module.state_dict()[name], tensor), name
    assert any(not torch.equal(alone.graph.scales[name], scale) for name, scale in whole.graph.scales.items())


def fail_in_one(rank, folder):
    """Process 1 has no images; both must say so, and neither wait."""
    torch.set_num_threads(1)
    store = torch.distributed.FileStore(f"{folder}/store", 2)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
    share = images()[:10] if rank == 0 else images()[:0]
    with pytest.raises(ValueError, match="calibration is empty" if rank else "process 1 could not calibrate.*is empty"):
        quartz_plugin.convert(network(), share, distributed=True)
    torch.distributed.destroy_process_group()


def test_an_error_in_one_process_is_one_in_all():
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(fail_in_one, args=(folder,), nprocs=2)


def test_without_a_process_group_it_says_what_is_missing():
    with pytest.raises(ValueError, match="init_process_group in every process first"):
        quartz_plugin.convert(network(), images(), distributed=True)
