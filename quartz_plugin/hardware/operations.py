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

import copy
import math

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from quartz_plugin.engines.result import SimulationResult
from quartz_plugin.engines.stepped import walk_layer
from quartz_plugin.graph import INPUT, ConvertedGraph, Projection, carry, is_spike_source
from quartz_plugin.neuron import FirstSpikeMaxPool
from quartz_plugin.structure import OneToOne

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


FanOut = dict[str, dict[str, Tensor]]
"""Layer -> name of a source node -> number of synapses of each source unit into that layer."""


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
    >>> ann = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    >>> snn = quartz_plugin.convert(ann, torch.rand(32, 4))
    >>> operations = synaptic_operations(snn.graph, snn.run(torch.rand(2, 4)))
    >>> {layer: counts.tolist() for layer, counts in operations.items()}
    {'1': [32, 32], 'output': [24, 24]}
    """
    levels = {node.name: value for node, value in source_levels(graph, result).items()}
    fan_out = fan_outs(graph, result) if fan_out is None else fan_out

    def delivered(source: str, counts: Tensor) -> Tensor:
        return ((levels[source] != SILENT).flatten(1) * counts.flatten().to(levels[source].device)).sum(dim=1)

    return {
        layer: torch.stack([delivered(source, counts) for source, counts in by_source.items()]).sum(dim=0)
        for layer, by_source in fan_out.items()
    }


def fan_outs(graph: ConvertedGraph, result: SimulationResult) -> FanOut:
    """:func:`fan_out` of every layer; `result` tells the shapes."""
    shapes = {source: levels.shape[1:] for source, levels in source_levels(graph, result).items()}
    counts = {
        layer.name: fan_out(layer.projection, {source: shapes[source] for source in layer.projection.sources})
        for layer in graph.layers
    }
    return {layer: {source.name: count for source, count in by.items()} for layer, by in counts.items()}


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


def fan_out(projection: Projection, shapes: dict[fx.Node, torch.Size]) -> dict[fx.Node, Tensor]:
    """How many neurons each source unit reaches: its weight synapses, an entry of the composed map each.

    Parameters
    ----------
    projection : Projection
        The synapses of a layer.
    shapes : dict
        Shape of each source, without the batch.

    Returns
    -------
    dict
        Source -> int64, of the source's shape.
    """
    if len(projection.sources) == 1 and all(len(node.all_input_nodes) == 1 for node in projection.nodes):
        source = projection.sources[0]
        counts = _separable_fan_out(list(projection.submodules()), shapes[source])
        if counts is not None:
            return {source: counts}
    return probed_fan_out(projection, shapes)


def probed_fan_out(
    projection: Projection, shapes: dict[fx.Node, torch.Size], chunk: int = 256
) -> dict[fx.Node, Tensor]:
    """:func:`fan_out` by sending a spike from each unit through synapses of weight 1; exact, and slow."""
    ones = copy.deepcopy(projection.module).cpu()
    for parameter in ones.parameters():
        parameter.data = torch.ones_like(parameter, dtype=torch.float64)
    probe = Projection(ones, projection.sources, projection.nodes, projection.target)
    counts = {}
    for source, shape in shapes.items():
        units = math.prod(shape)
        reached = []
        for start in range(0, units, chunk):
            stop = min(start + chunk, units)
            spikes = torch.zeros(stop - start, units, dtype=torch.float64)
            spikes[torch.arange(stop - start), torch.arange(start, stop)] = 1.0
            inputs = {other: torch.zeros(stop - start, *shapes[other], dtype=torch.float64) for other in shapes}
            inputs[source] = spikes.view(-1, *shape)
            with torch.no_grad():
                reached.append((probe(inputs) > 0).flatten(1).sum(dim=1))
        counts[source] = torch.cat(reached).view(shape)
    return counts


def _separable_fan_out(modules: list[nn.Module], shape: torch.Size) -> Tensor | None:
    """Fan-out of a chain, dimension by dimension; None where a module mixes dimensions.

    Who reaches whom is a relation, and for convolutions and pools a product of one relation for each
    dimension; so is the composition of such, each dimension by itself. Exact, with borders and overlaps.
    """
    relations: list[Tensor] | None = None
    inner = torch.Size(shape)
    for index, module in enumerate(modules):
        if relations is None and isinstance(module, nn.Flatten | nn.Unflatten):
            inner = module(torch.empty(1, *inner, device="meta")).shape[1:]
            continue
        if isinstance(module, OneToOne):
            continue
        if relations is None:
            if isinstance(module, nn.Linear):
                # Every feature reaches every neuron; an identity of its size might not fit into memory.
                full = torch.ones(inner[-1], 1).expand(-1, module.out_features)
                relations = [*(torch.eye(size) for size in inner[:-1]), full]
                continue
            relations = [torch.eye(size) for size in inner]
        if isinstance(module, nn.Flatten | nn.Unflatten):
            rest = [later for later in modules[index + 1 :] if not isinstance(later, OneToOne | nn.Flatten)]
            if rest:
                if not isinstance(rest[0], nn.Linear):
                    return None
                reaches_any = [relation.amax(dim=1, keepdim=True) for relation in relations]
                relations = [*reaches_any[:-1], reaches_any[-1].expand(-1, rest[0].out_features)]
                if rest[1:]:
                    return None
            break
        composed = _compose(module, relations)
        if composed is None:
            return None
        relations = composed
    if relations is None:
        return torch.ones(shape, dtype=torch.int64)
    counts = torch.ones((), dtype=torch.int64)
    for relation in relations:
        counts = counts.unsqueeze(-1) * relation.sum(dim=1).long()
    return counts.view(shape)


def _compose(module: nn.Module, relations: list[Tensor]) -> list[Tensor] | None:
    """Relations behind one more module: 1 where a source coordinate reaches an output coordinate."""
    if isinstance(module, nn.Linear):
        full = relations[-1].amax(dim=1, keepdim=True).expand(-1, module.out_features)
        return [*relations[:-1], full]
    spatial = relations[1:]
    if isinstance(module, nn.Conv1d | nn.Conv2d):
        inputs, outputs = module.in_channels // module.groups, module.out_channels // module.groups
        channels = torch.block_diag(*[torch.ones(inputs, outputs)] * module.groups)
        behind = [_convolved(relation, module, dim) for dim, relation in enumerate(spatial)]
        return [(relations[0] @ channels > 0).float(), *behind]
    if isinstance(module, nn.AvgPool1d | nn.AvgPool2d):
        return [relations[0], *(_pooled(relation, module, dim) for dim, relation in enumerate(spatial))]
    if isinstance(module, nn.AdaptiveAvgPool1d | nn.AdaptiveAvgPool2d):
        sizes = (
            module.output_size if isinstance(module.output_size, tuple | list) else [module.output_size] * len(spatial)
        )
        return [
            relations[0],
            *(
                (F.adaptive_avg_pool1d(relation.unsqueeze(1), size or relation.shape[1]).squeeze(1) > 0).float()
                for relation, size in zip(spatial, sizes, strict=True)
            ),
        ]
    if isinstance(module, nn.ZeroPad1d | nn.ZeroPad2d):
        # torch counts paddings from the last dimension backwards.
        pads = [module.padding[2 * dim : 2 * dim + 2] for dim in range(len(spatial))][::-1]
        return [relations[0], *(F.pad(relation, pad) for relation, pad in zip(spatial, pads, strict=True))]
    return None


def _convolved(relation: Tensor, module: nn.Conv1d | nn.Conv2d, dim: int) -> Tensor:
    before, after = module._reversed_padding_repeated_twice[-2 * dim - 2 :][:2]
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    padded = F.pad(relation.unsqueeze(1), (before, after), mode=mode)
    kernel = torch.ones(1, 1, module.kernel_size[dim])
    return (F.conv1d(padded, kernel, stride=module.stride[dim], dilation=module.dilation[dim]).squeeze(1) > 0).float()


def _pooled(relation: Tensor, module: nn.AvgPool1d | nn.AvgPool2d, dim: int) -> Tensor:
    def of(value: int | tuple[int, ...]) -> int:
        return value[dim] if isinstance(value, tuple) else value

    pooled = F.avg_pool1d(
        relation.unsqueeze(1), of(module.kernel_size), of(module.stride), of(module.padding), module.ceil_mode
    )
    return (pooled.squeeze(1) > 0).float()


__all__ = [
    "SILENT",
    "FanOut",
    "fan_out",
    "fan_outs",
    "merged_operations",
    "neuron_count",
    "probed_fan_out",
    "quartz_operations",
    "source_levels",
    "synaptic_operations",
]
