"""Operation counts: synaptic operations in the strict sense, and as the paper merges them.

``synops`` counts spikes times weight synapses: each spike that a synapse delivers. ``synops_merged`` counts, as
the paper does, the steps in which a neuron's current changes: spikes that arrive together count once.
Neither counts rectifier or hold; bias and readout enter the merged count where they change the current.

References
----------
G. Lenz, G. Orchard, S. Sheik, "Ultra-low-power Image Classification on Neuromorphic Hardware",
arXiv:2309.16795, section 4.
"""

from __future__ import annotations

import torch
from torch import Tensor, fx

from quartz_plugin.engines.result import SimulationResult
from quartz_plugin.engines.stepped import walk_layer
from quartz_plugin.graph import INPUT, ConvertedGraph, carry, is_spike_source
from quartz_plugin.neuron import FirstSpikeMaxPool
from quartz_plugin.synapses import FanOut, fan_outs

SILENT = -1
"""Level of a source that sends no spike; no spike ever says it."""

_CHANGE = 1e-6


def source_levels(graph: ConvertedGraph, result: SimulationResult) -> dict[fx.Node, Tensor]:
    """Levels (float32) that every node emits, pools included; :data:`SILENT` where no spike comes."""
    result.check_recorded()
    levels: dict[fx.Node, Tensor] = {}
    names = {layer.node: layer.name for layer in graph.layers}

    def at(node: fx.Node) -> Tensor:
        if node not in levels:
            # Shifted, so that the border a padding adds is silent.
            routed = carry(graph.module, node, {s: at(s) - SILENT for s in node.all_input_nodes})
            levels[node] = routed + SILENT
        return levels[node]

    for node in graph.module.graph.nodes:
        if not is_spike_source(graph.module, node):
            continue
        if node.op == "placeholder" or node in names:
            name = names.get(node, INPUT)
            levels[node] = result.windows[name].levels_at(result.spike_steps[name], SILENT).to(graph.dtype)
            continue
        module = graph.module.get_submodule(str(node.target))
        source = at(node.all_input_nodes[0])
        assert isinstance(module, FirstSpikeMaxPool)
        levels[node] = module.pool(source)
    return levels


def synaptic_operations(
    graph: ConvertedGraph, result: SimulationResult, fan_out: FanOut | None = None
) -> dict[str, Tensor]:
    """``synops``: spikes times the weight synapses that carry them, layer by layer.

    Parameters
    ----------
    graph : ConvertedGraph
        The network (``snn.graph``).
    result : SimulationResult
        A simulation of it with ``record=True``.
    fan_out : dict, optional
        What :func:`fan_outs` gives, where it is at hand from a simulation before.

    Returns
    -------
    dict
        Layer -> int64 ``[B]``: operations of each inference at the synapses into that layer. A synapse is an
        entry of the composed map, borders exact; spikes that say zero are counted like all others.

    Examples
    --------
    >>> import torch, quartz_plugin
    >>> from torch import nn
    >>> ann = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    >>> snn = quartz_plugin.convert(ann, torch.rand(32, 4))
    >>> operations = synaptic_operations(snn.graph, snn.run(torch.rand(2, 4)))
    >>> {layer: counts.tolist() for layer, counts in operations.items()}
    {'1': [32, 32], 'output': [24, 24]}
    """
    levels = {node.name: value for node, value in source_levels(graph, result).items()}
    fan_out = fan_outs(graph) if fan_out is None else fan_out

    def delivered(source: str, counts: Tensor) -> Tensor:
        return ((levels[source] != SILENT).flatten(1) * counts.flatten().to(levels[source].device)).sum(dim=1)

    return {
        layer: torch.stack([delivered(source, counts) for source, counts in by_source.items()]).sum(dim=0)
        for layer, by_source in fan_out.items()
    }


def merged_operations(graph: ConvertedGraph, result: SimulationResult) -> dict[str, Tensor]:
    """``synops_merged``, the paper's count: neuron-steps in which the current changes by more than 1e-6.

    Parameters and returns are those of :func:`synaptic_operations`. The layers are stepped once more, on the
    spikes that `result` holds.
    """
    levels = source_levels(graph, result)
    operations = {}
    with torch.no_grad():
        for layer in graph.layers:
            sources = {source: levels[source] for source in layer.projection.sources}
            bias_comes_later = layer.neuron.p.bias_code == "spike"
            current: Tensor | None = None
            changes = torch.zeros(len(result.logits), dtype=torch.int64, device=result.logits.device)
            for step, _, state in walk_layer(layer, sources):
                change = state.i if current is None else state.i - current
                changes = changes + (change.abs() > _CHANGE).flatten(1).sum(dim=1)
                current = state.i
                if step == layer.neuron.clock.readout and not bias_comes_later:
                    break
            operations[layer.name] = changes
    return operations


def quartz_operations(merged: Tensor, neurons: int, t_max: int) -> Tensor:
    """Operations in the paper's sense: ``synops_merged + 2 N T``, N ReLU outputs and logits.

    Examples
    --------
    >>> quartz_operations(torch.tensor(1000), neurons=10, t_max=16)
    tensor(1320)
    """
    return merged + 2 * neurons * t_max


def neuron_count(graph: ConvertedGraph) -> int:
    """``N``: ReLU outputs and logits."""
    return sum(int(row["neurons"]) for row in graph.report if row.get("neurons"))


__all__ = [
    "SILENT",
    "merged_operations",
    "neuron_count",
    "quartz_operations",
    "source_levels",
    "synaptic_operations",
]
