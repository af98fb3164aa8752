"""All that is derived from a converted graph: found once, and found anew when the network has been edited.

There is one rule of staleness, that of :mod:`quartz_plugin.graph.fingerprint`: what follows from the structure holds
while the structure does, what follows from the weights while they do as well. What is derived may hold nodes and
modules: it stands on the network that it is of, and keeps no other alive.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Generic, TypeVar

import torch
from torch import Tensor, fx

from quartz_plugin.coding import Window
from quartz_plugin.graph.converted import INPUT, ConvertedGraph, Layer, check_modules, spike_sources
from quartz_plugin.graph.fingerprint import Snapshot, snapshot_of, structure_of, tensors_of
from quartz_plugin.graph.synapses import Chain, FanOut, chains, fan_outs, pool_fan_out, unit_shapes
from quartz_plugin.graph.walk import Step, called_by, is_spike_source, module_nodes, plan_walk
from quartz_plugin.neuron import FirstSpikeMaxPool
from quartz_plugin.operators.table import moves_spikes

Result = TypeVar("Result")


class Topology:
    """All that follows from the structure of a network: its layers, and who is connected to whom.

    Each part is found when it is asked for. Take one by :meth:`of`, and anew for each run: it is of the network as it
    was then.

    Parameters
    ----------
    graph : ConvertedGraph
        The network.

    Examples
    --------
    >>> import quartz_plugin
    >>> ann = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
    >>> topology = Topology.of(quartz_plugin.convert(ann, torch.rand(32, 4)).graph)
    >>> [layer.name for layer in topology.layers], topology.layout
    (['1', 'output'], {'input': (4,), '1': (8,), 'output': (3,)})
    """

    def __init__(self, graph: ConvertedGraph) -> None:
        self.graph = graph

    @staticmethod
    def of(graph: ConvertedGraph, snapshot: Snapshot | None = None) -> Topology:
        """Return that of a network as it is now; `snapshot`, where it has just been taken."""
        memo = (structure_of(graph) if snapshot is None else snapshot.structure).memo
        if Topology not in memo:
            memo[Topology] = Topology(graph)
        topology: Topology = memo[Topology]
        return topology

    @cached_property
    def layers(self) -> tuple[Layer, ...]:
        """The spiking layers, each after its sources; the last one is the output."""
        return tuple(self.graph.layers)

    @property
    def output(self) -> Layer:
        """The output layer."""
        return self.layers[-1]

    @cached_property
    def layer_at(self) -> dict[fx.Node, Layer]:
        """Node of a layer's neurons -> the layer."""
        return {layer.node: layer for layer in self.layers}

    @cached_property
    def hold(self) -> bool:
        """True where no neuron may fire before its readout."""
        return all(layer.neuron.p.hold for layer in self.layers)

    @cached_property
    def n_steps(self) -> int:
        """Global steps an inference takes."""
        return max(layer.neuron.p.last_step for layer in self.layers) + 1

    @cached_property
    def windows(self) -> dict[str, Window]:
        """Layer -> window of its spikes, "input" first."""
        own = {layer.name: layer.neuron.clock.output_window for layer in self.layers}
        return {INPUT: self.graph.input_window, **own}

    @cached_property
    def arrivals(self) -> dict[fx.Node, int]:
        """Return :meth:`ConvertedGraph.arrivals`, which raises where windows that meet do not end together."""
        return self.graph.arrivals()

    @cached_property
    def nodes(self) -> dict[str, fx.Node]:
        """Name -> node."""
        return {node.name: node for node in self.graph.module.graph.nodes}

    @cached_property
    def spike_sources(self) -> tuple[fx.Node, ...]:
        """Nodes that emit spikes, in order: the input, neurons and first-spike pools."""
        return tuple(node for node in self.nodes.values() if is_spike_source(self.graph.module, node))

    @cached_property
    def between(self) -> tuple[fx.Node, ...]:
        """Nodes between those that emit spikes, in order, the output among them: synapses, routing and delays."""
        emitting = set(self.spike_sources)
        return tuple(node for node in self.nodes.values() if node not in emitting)

    @cached_property
    def routed(self) -> tuple[fx.Node, ...]:
        """Nodes whose values are the spikes of others, routed or delayed at most, in order."""
        return tuple(routed_nodes(self.graph.module, {self.nodes[name]: each for name, each in self.shapes.items()}))

    @cached_property
    def steps(self) -> tuple[Step, ...]:
        """Walk over the whole graph; the value of the output layer is kept."""
        return plan_walk(self.graph.module, keep=[self.output.node])

    @cached_property
    def layer_steps(self) -> tuple[Step, ...]:
        """Walk from layer to layer: visits those and the pools, and of other nodes the routing in front of pools.

        At its neurons, values of the layer's sources are there; those of the output layer are kept.
        """
        return plan_walk(self.graph.module, [layer.node for layer in self.layers], [self.output.node], self._sources_of)

    def _sources_of(self, node: fx.Node) -> tuple[fx.Node, ...] | list[fx.Node]:
        return self.layer_at[node].projection.sources if node in self.layer_at else node.all_input_nodes

    @cached_property
    def fan_outs(self) -> FanOut:
        """Return :func:`quartz_plugin.graph.synapses.fan_outs`, float64: dot products of it are exact below 2^53."""
        counts = fan_outs(self.graph)
        # Many are one tensor.
        doubles = {id(count): count.flatten().double() for by_source in counts.values() for count in by_source.values()}
        return {
            layer: {source: doubles[id(count)] for source, count in by_source.items()}
            for layer, by_source in counts.items()
        }

    @cached_property
    def chains(self) -> dict[str, Chain]:
        """Return :func:`quartz_plugin.graph.synapses.chains`."""
        return chains(self.graph)

    @cached_property
    def chained(self) -> set[str]:
        """Layers that have other synapses in their composed maps than in the maps one after the other."""
        spikes = {node.name for node in (*self.spike_sources, *self.routed)}
        # Of maps of spikes alone, no unit has fewer synapses than in what they compose to.
        plain = {
            layer
            for layer, chain in self.chains.items()
            if all(before in spikes for before, _ in chain)
            and sum(int(count.sum()) for _, count in chain)
            == sum(int(count.sum()) for count in self.fan_outs[layer].values())
        }
        return set(self.chains) - plain

    @cached_property
    def shapes(self) -> dict[str, torch.Size]:
        """Name of a node -> shape of its value, without the batch."""
        return {node.name: shape for node, shape in unit_shapes(self.graph).items()}

    def shape_of(self, layer: Layer) -> torch.Size:
        """Shape of a layer's neurons, without the batch."""
        return self.shapes[layer.node.name]

    @cached_property
    def layout(self) -> dict[str, tuple[int, ...]]:
        """Layer -> shape of its neurons, "input" first. ValueError where a node calls no module."""
        check_modules(self.graph)
        return {INPUT: self.graph.input_shape, **{layer.name: tuple(self.shape_of(layer)) for layer in self.layers}}

    @cached_property
    def pools(self) -> dict[str, list[tuple[str, Tensor]]]:
        """Layer -> for each max pooling in front of it, the node that it pools and how many windows a unit is in.

        A pooling in front of several layers stands with the first.
        """
        seen: set[fx.Node] = set()
        pools: dict[str, list[tuple[str, Tensor]]] = {layer.name: [] for layer in self.layers}
        for layer in self.layers:
            pending = list(layer.projection.sources)
            while pending:
                node = pending.pop()
                pool = called_by(self.graph.module, node)
                if not isinstance(pool, FirstSpikeMaxPool) or node in seen:
                    continue
                seen.add(node)
                (before,) = node.all_input_nodes
                pools[layer.name].append((before.name, pool_fan_out(pool.pool, self.shapes[before.name])))
                pending += spike_sources(self.graph.module, before)
        return pools


def routed_nodes(module: fx.GraphModule, shapes: Mapping[fx.Node, torch.Size]) -> list[fx.Node]:
    """Nodes whose values are the spikes of others, routed or delayed at most, in order.

    Parameters
    ----------
    module : fx.GraphModule
        The network.
    shapes : mapping
        Shape of each node's value, without the batch.
    """
    spikes = {node for node in module.graph.nodes if is_spike_source(module, node)}
    routed: list[fx.Node] = []
    for node, called in module_nodes(module):
        sources = node.all_input_nodes
        if node in spikes or not sources or not spikes.issuperset(sources):
            continue
        if moves_spikes(called, shapes[sources[0]]):
            spikes.add(node)
            routed.append(node)
    return routed


class Derived(Generic[Result]):
    """Something that others derive from networks; of each it is kept until the network is edited.

    Parameters
    ----------
    derive : callable
        What derives it from a topology.
    from_weights : bool
        Whether it depends on the values of weights, or on the structure alone.

    Examples
    --------
    >>> import quartz_plugin
    >>> largest = Derived(lambda topology: float(max(p.max() for p in topology.graph.module.parameters())), True)
    >>> snn = quartz_plugin.convert(torch.nn.Linear(4, 3), torch.rand(32, 4))
    >>> weight = next(snn.parameters())
    >>> weight.data.fill_(2.0).shape, largest.of(snn.graph)
    (torch.Size([3, 4]), 2.0)
    """

    def __init__(self, derive: Callable[[Topology], Result], from_weights: bool = False) -> None:
        self._derive, self._from_weights = derive, from_weights
        self._key = object()

    def of(self, graph: ConvertedGraph, snapshot: Snapshot | None = None) -> Result:
        """Return that of a network as it is now; `snapshot`, where it has just been taken."""
        if snapshot is None:
            snapshot = snapshot_of(graph) if self._from_weights else Snapshot(structure_of(graph), None)
        weights = snapshot.weights if self._from_weights else None
        memo = snapshot.structure.memo
        if self._from_weights and weights is None:
            # Weights that are traced have no values to know them by.
            return self._derive(Topology.of(graph, snapshot))
        if self._key not in memo or memo[self._key][0] != weights:
            memo[self._key] = weights, self._derive(Topology.of(graph, snapshot))
        found: Result = memo[self._key][1]
        return found

    def clear(self) -> None:
        """Forget those of all networks."""
        self._key = object()


def _check_finite(topology: Topology) -> None:
    for name, tensor in tensors_of(topology.graph):
        # A sum of finite numbers is finite, or too large; to look at each of them takes a multiple of its time.
        if not bool(torch.isfinite(tensor.detach().sum())) and not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"{name} of the network contains NaN or infinity")


FINITE = Derived(_check_finite, from_weights=True)
"""Raises ValueError where a weight is NaN or infinite."""
