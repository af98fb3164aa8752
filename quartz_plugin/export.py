"""Exporters: the converted network as modules of snnTorch's and of Norse's kind."""

from __future__ import annotations

import copy
from collections import OrderedDict

from torch import nn

from quartz_plugin.graph import ConvertedGraph, check_chain, module_nodes, unique_name
from quartz_plugin.neuron import AxonalDelay, FirstSpikeMaxPool, TTFSNeuron, reset


def to_snntorch(graph: ConvertedGraph) -> nn.Module:
    """Return an independent nn.Sequential whose neurons keep their state (``init_hidden=True``)."""
    net = nn.Sequential(OrderedDict(_in_order(graph)))
    reset(net)
    return net


def to_norse(graph: ConvertedGraph) -> nn.Module:
    """Return an independent :class:`norse.torch.SequentialState` of the network."""
    # Ours first: where Norse is missing, it says what to install.
    from quartz_plugin.norse import TTFSCell  # isort: skip
    from norse.torch import SequentialState  # isort: skip

    def with_state_outside(module: nn.Module) -> nn.Module:
        if isinstance(module, TTFSNeuron):
            return TTFSCell(module.p).to(device=graph.device)
        if isinstance(module, FirstSpikeMaxPool):
            return FirstSpikeMaxPool(module.pool)
        if isinstance(module, AxonalDelay):
            return AxonalDelay(module.steps)
        return module

    net: nn.Module = SequentialState(*(with_state_outside(module) for _, module in _in_order(graph)))
    return net


def _in_order(graph: ConvertedGraph) -> list[tuple[str, nn.Module]]:
    """Copies of the modules of a chain, named by their paths with "_" for "."."""
    check_chain(graph)
    copies: dict[str, nn.Module] = {}
    for node, module in module_nodes(graph.module):
        copies[unique_name(str(node.target).replace(".", "_"), copies)] = copy.deepcopy(module)
    return list(copies.items())
