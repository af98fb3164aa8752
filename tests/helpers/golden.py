"""The authors' own numbers (shared/golden), and the network that they are of."""

import functools

import numpy as np
import torch

from helpers.mnist import paper_network
from helpers.paths import SHARED
from quartz_plugin import SpikingNetwork
from quartz_plugin.coding import window_length
from quartz_plugin.config import ConversionConfig
from quartz_plugin.convert.check import check
from quartz_plugin.convert.emit import emit
from quartz_plugin.convert.fold import fold
from quartz_plugin.convert.rescale import rescale
from quartz_plugin.convert.schedule import schedule
from quartz_plugin.convert.trace import trace
from quartz_plugin.convert.traced import CalibratedNetwork, Scales

FILES = ["p99_t4", "p99_t16", "p99.9_t4", "p99.9_t16"]
LAYERS = ["if1", "if2", "if3", "if4"]
SYNAPSES = dict(zip(LAYERS, ["conv1", "conv2", "conv3", "fc1"], strict=True))
NAMES = dict(zip(LAYERS, ["1", "4", "7", "output"], strict=True))
"""Names of the spiking layers in the converted network: the paths of the ReLUs."""


@functools.cache
def read(file, images=64):
    """Golden arrays of a file, by name; those over images for the first few alone."""
    with np.load(SHARED / "golden" / f"quartz_mnist_{file}.npz") as data:
        arrays = {key: torch.from_numpy(data[key]) for key in data.files}
    return {key: value[:images] if value.shape[:1] == (64,) else value for key, value in arrays.items()}


def golden_steps(golden, layer, readout):
    """Golden spike times on a clock on which this layer is read out at `readout`; golden counts t from S less."""
    times = golden[f"{layer}_first_spike_time"].long()
    assert (times >= 0).all()
    return times + readout - window_length(int(golden["t_max"]))


def levels_of(values, t_max):
    """Levels of decoded values, early ones (above 1) too, or of pixels: halves round up."""
    return (values.double() * window_length(t_max) + 0.5).floor()


def spiking_network(golden, dtype=torch.float32):
    """The golden network through the stages of conversion, calibration left out: its weights are normalised."""
    ann = paper_network()
    paths = dict(zip([0, 3, 6, 10], SYNAPSES.values(), strict=True))
    ann.load_state_dict(
        {f"{n}.{part}": golden[f"{name}_{part}"] for n, name in paths.items() for part in ("weight", "bias")}
    )
    ann = ann.to(dtype).eval()
    t_max = int(golden["t_max"])
    network = check(fold(trace(ann, golden["input"][:1].to(dtype)), None))
    layers = [str(node.target) for node in network.layers()]
    scales, windows = Scales(dict.fromkeys(layers, torch.ones(()))), dict.fromkeys([*layers, "input"], t_max - 1)
    config = ConversionConfig(t_max, hold=False, rectifier="spike", bias="spike")
    calibrated = CalibratedNetwork(network, scales, windows, config)
    scaled = rescale(calibrated)
    return SpikingNetwork(emit(calibrated, scaled, schedule(scaled, t_max - 1, "spike")))
