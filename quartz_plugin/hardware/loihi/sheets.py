"""Sheets of a network: its input, layers and first-spike pools, with all that a tile of their neurons needs."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from quartz_plugin.costs.counts import biased_neurons
from quartz_plugin.engines.convolutions import as_image, convolutions_of
from quartz_plugin.graph import INPUT, Layer, Projection, spike_sources
from quartz_plugin.graph.synapses import pool_relation, with_unit_weights
from quartz_plugin.graph.topology import Topology
from quartz_plugin.graph.walk import Step, Walk, plan_walk
from quartz_plugin.hardware.loihi.axons import InAxons, parts_of_rank, population_at
from quartz_plugin.hardware.loihi.chip import LoihiChip
from quartz_plugin.hardware.loihi.cutting import Axons, Sheet, Size, parts_of
from quartz_plugin.neuron import AxonalDelay, FirstSpikeMaxPool
from quartz_plugin.operators.modules import OneToOne
from quartz_plugin.operators.table import adds, has_weights, moves_spikes, rank_of, weighs


def sheets_of(topology: Topology, shared: bool, chip: LoihiChip) -> Iterator[Sheet]:
    """Yield the sheets of a network in order; `shared`: the neurons of a core share a convolution's weights."""
    ones = with_unit_weights(topology.graph.module)
    delays = _longest_delays(topology)
    for node in topology.spike_sources:
        shape = topology.shapes[node.name]
        relays = shape.numel() * relays_over(delays[node], chip)
        if node.op == "placeholder":
            yield Sheet(INPUT, as_image(tuple(shape)), relays, 0, 0, lambda size: Axons(0, {}), lambda size: 0.0)
        elif node in topology.layer_at:
            yield _of_layer(topology, topology.layer_at[node], ones, relays, shared, chip)
        else:
            yield _of_pool(topology, node, relays, chip)


def relays_over(delay: int, chip: LoihiChip) -> int:
    """Neurons in a row that carry a spike over a delay."""
    return max(0, -(-delay // chip.longest_delay) - 1)


def _longest_delays(topology: Topology) -> dict[fx.Node, int]:
    """For each node that emits spikes, the longest delay on the way to a layer or pooling; shorter ones share it."""
    walk = _Delays(plan_walk(topology.graph.module))
    walk.run(None)
    return walk.longest


class _Delays(Walk):
    """Values are the delays that spikes have passed: node that emits them -> steps."""

    def __init__(self, steps: Sequence[Step]) -> None:
        super().__init__(steps)
        self.longest: dict[fx.Node, int] = {}

    def at_input(self, step: Step) -> dict[fx.Node, int]:
        self.longest[step.node] = 0
        return {step.node: 0}

    def at_synapses(self, step: Step) -> dict[fx.Node, int]:
        arriving: dict[fx.Node, int] = {}
        for before in step.sources:
            for source, delay in self.values[before].items():
                arriving[source] = max(arriving.get(source, 0), delay)
        for source, delay in arriving.items():
            self.longest[source] = max(self.longest[source], delay)
        return arriving

    def at_delay(self, step: Step) -> dict[fx.Node, int]:
        assert isinstance(step.module, AxonalDelay)
        own = step.module.steps
        return {source: delay + own for source, delay in self.at_synapses(step).items()}

    def at_neurons(self, step: Step) -> dict[fx.Node, int]:
        self.at_synapses(step)
        return self.at_input(step)

    def at_pool(self, step: Step) -> dict[fx.Node, int]:
        return self.at_neurons(step)

    def at_output(self, step: Step) -> dict[fx.Node, int]:
        return self.at_synapses(step)


def _of_layer(
    topology: Topology, layer: Layer, ones: fx.GraphModule, relays: int, shared: bool, chip: LoihiChip
) -> Sheet:
    shape, p = topology.shape_of(layer), layer.neuron.p
    neurons, image = shape.numel(), as_image(tuple(shape))
    synapses = int(sum(float(count.sum()) for count in topology.fan_outs[layer.name].values()))
    support = 2 + (p.rectifier is not None)
    others = (support + 2 * p.hold) * neurons + biased_neurons(layer, shape)
    kernels = _kernels(topology, layer.projection) if shared else None
    each = chip.weight_bits + chip.index_bits

    def weight_memory(size: Size) -> float:
        own = others / neurons * math.prod(size) * each
        if kernels is not None:
            weights, one_to_one = kernels
            return weights * size[0] / image[0] * chip.weight_bits + one_to_one * math.prod(size) * each + own
        return synapses / neurons * math.prod(size) * each + own

    return Sheet(
        layer.name, image, relays, synapses, others, InAxons(topology, layer, ones), weight_memory,
        _largest_readout_weight(topology, layer), support,
    )  # fmt: skip


def _kernels(topology: Topology, projection: Projection) -> tuple[int, int] | None:
    """Weights of a layer's convolutions, and synapses one to one a neuron; None where they cannot be shared.

    That is where linear maps follow each other, or one is a matrix.
    """
    routed = set(projection.sources)
    weights = one_to_one = 0
    for node in projection.nodes:
        each: Any = projection.module.get_submodule(str(node.target))
        from_spikes, shape = routed.issuperset(node.all_input_nodes), topology.shapes[node.all_input_nodes[0].name]
        if adds(each):
            one_to_one += sum(arg in routed for arg in node.all_input_nodes)
        elif isinstance(each, OneToOne) and from_spikes:
            one_to_one += 1
        elif has_weights(each) and rank_of(each) and from_spikes:
            weights += each.weight.numel()
        elif weighs(each, shape):
            return None
        elif from_spikes and moves_spikes(each, shape):
            routed.add(node)
    return weights, one_to_one + (projection.target in routed)


def _of_pool(topology: Topology, node: fx.Node, relays: int, chip: LoihiChip) -> Sheet:
    graph, shapes = topology.graph, topology.shapes
    module = graph.module.get_submodule(str(node.target))
    assert isinstance(module, FirstSpikeMaxPool)
    (before,) = node.all_input_nodes
    relation, image = pool_relation(module.pool, shapes[before.name]), as_image(tuple(shapes[node.name]))
    sources = {population_at(source): shapes[source.name].numel() for source in spike_sources(graph.module, before)}

    def axons(size: Size) -> Axons:
        counts = relation.units_into(parts_of_rank(parts_of(image, size), len(shapes[node.name])))
        assert counts is not None
        # Of several that are concatenated, as large a share as they are of all.
        units = int(counts.sum())
        return Axons(
            int(counts.max()), {source: -(-units * of // sum(sources.values())) for source, of in sources.items()}
        )

    per_neuron = axons((1, 1, 1)).fullest
    return Sheet(
        str(node.target), image, relays, sum(axons((1, 1, 1)).of_all.values()), 0,
        axons, lambda size: per_neuron * math.prod(size) * chip.index_bits,
    )  # fmt: skip


def _largest_readout_weight(topology: Topology, layer: Layer) -> float:
    """Largest ``|1 - A(1)|``, A with its bias."""
    graph = topology.graph
    ones = {
        source: torch.ones(1, *topology.shapes[source.name], dtype=graph.dtype, device=graph.device)
        for source in layer.projection.sources
    }
    with torch.no_grad():
        total: Tensor = layer.projection(ones)
        bias = layer.neuron.p.bias
        if bias is not None:
            total = total + (torch.ones_like(bias) if layer.neuron.p.bias_code == "spike" else bias)
    return float((1 - total).abs().max())


def coarse_readouts(topology: Topology, sheets: Sequence[Sheet], chip: LoihiChip) -> list[str]:
    """Name the layers whose readout weight a coarse and a fine synapse cannot hold as finely as the weights."""
    readouts = {sheet.name: sheet.readout for sheet in sheets if sheet.readout is not None}
    shapes = {topology.nodes[name]: shape for name, shape in topology.shapes.items()}
    notes = []
    for layer in topology.layers:
        largest = _largest_weight(layer, shapes)
        if layer.name in readouts and readouts[layer.name] > 2**chip.weight_bits * largest > 0:
            notes.append(
                f"{layer.name}: the readout weight is up to {readouts[layer.name] / largest:,.0f} times the largest "
                f"weight; a coarse and a fine synapse of {chip.weight_bits} bits reach {2**chip.weight_bits} times in "
                "the weights' own steps, and farther in coarser ones, which round the membrane"
            )
    return notes


def _largest_weight(layer: Layer, shapes: dict[fx.Node, torch.Size]) -> float:
    """Largest weight into a layer: of any term of the composed map, or of its factors where that is no convolution."""
    convolutions = convolutions_of(layer, shapes)
    if convolutions is None:
        factors = [layer.projection.module.get_submodule(str(node.target)) for node in layer.projection.nodes]
        weights: list[Any] = [factor.weight for factor in factors if has_weights(factor)]
    else:
        weights = [each.weight for each in convolutions]
    return max((float(weight.abs().max()) for weight in weights), default=0.0)
