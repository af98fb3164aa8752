"""Quartz for snnTorch and Norse: trained ReLU networks as spiking networks whose neurons fire at most once."""

from quartz_plugin.activation import TTFSActivation
from quartz_plugin.coding import decode, encode
from quartz_plugin.config import PAPER, ConversionConfig, LayerConfig, Override
from quartz_plugin.convert import ConversionError, check_convertible, convert, register_rule, unregister_rule
from quartz_plugin.convert.allocation import allocate_steps
from quartz_plugin.engines import SimulationResult
from quartz_plugin.network import SpikingNetwork, load
from quartz_plugin.neuron import AxonalDelay, FirstSpikeMaxPool, TTFSNeuron, reset
from quartz_plugin.task import decide
from quartz_plugin.training import DistillationLoss, TrainableNetwork, prepare_qat
from quartz_plugin.training import Teacher as Teacher  # earlier names, which warn
from quartz_plugin.training import prepare as prepare
from quartz_plugin.verification import Verification, verify

__version__ = "0.1.0"

__all__ = [
    "PAPER",
    "AxonalDelay",
    "ConversionConfig",
    "ConversionError",
    "DistillationLoss",
    "FirstSpikeMaxPool",
    "LayerConfig",
    "Override",
    "SimulationResult",
    "SpikingNetwork",
    "TTFSActivation",
    "TTFSNeuron",
    "TrainableNetwork",
    "Verification",
    "allocate_steps",
    "check_convertible",
    "convert",
    "decide",
    "decode",
    "encode",
    "load",
    "prepare_qat",
    "register_rule",
    "reset",
    "unregister_rule",
    "verify",
]
