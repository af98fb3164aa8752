"""Quartz for snnTorch and Norse: trained ReLU networks as spiking networks whose neurons fire at most once."""

from quartz_plugin.coding import decode, encode
from quartz_plugin.neuron import AxonalDelay, FirstSpikeMaxPool, TTFSNeuron, reset

__all__ = ["AxonalDelay", "FirstSpikeMaxPool", "TTFSNeuron", "decode", "encode", "reset"]
