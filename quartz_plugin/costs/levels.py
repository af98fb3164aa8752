"""Levels at the nodes of a converted network, found again from the spikes that a simulation recorded."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from functools import partial
from typing import Any

from torch import Tensor, fx

from quartz_plugin.costs.spikes import spike_counts
from quartz_plugin.engines.event import pooled
from quartz_plugin.engines.result import SimulationResult
from quartz_plugin.graph import INPUT, ConvertedGraph
from quartz_plugin.graph.synapses import with_unit_weights
from quartz_plugin.graph.topology import Topology
from quartz_plugin.graph.walk import LevelWalk, Step, plan_walk
from quartz_plugin.neuron import FirstSpikeMaxPool, TTFSNeuron
from quartz_plugin.operators.table import weighs

SILENT = -1
"""Level of a source that sends no spike; no spike ever encodes it."""


def source_levels(graph: ConvertedGraph, result: SimulationResult) -> dict[fx.Node, Tensor]:
    """Levels (float32) that every node emits, pools included; :data:`SILENT` where no spike comes."""
    return levels_of_sources(Topology.of(graph), result)


def levels_of_sources(topology: Topology, result: SimulationResult) -> dict[fx.Node, Tensor]:
    """:func:`source_levels` of a network whose topology is at hand."""
    emitting = topology.spike_sources
    steps = plan_walk(topology.graph.module, emitting, emitting, partial(_needs, topology))
    return _FromSpikes(steps, topology, result).run_from({})


def _needs(topology: Topology, node: fx.Node) -> list[fx.Node]:
    return [] if node in topology.layer_at else node.all_input_nodes


class _Routing(LevelWalk):
    """Moves levels from spikes to pools, between which only routing can stand."""

    def at_synapses(self, step: Step) -> Any:
        # Shifted, so that the border a padding adds is silent.
        values = self.values
        self.values = {source: values[source] - SILENT for source in step.sources}
        routed = super().at_synapses(step) + SILENT
        self.values = values
        return routed

    def at_pool(self, step: Step) -> Tensor:
        assert isinstance(step.module, FirstSpikeMaxPool)
        return pooled(step.module.pool, self.source(step))


class _FromSpikes(_Routing):
    """Takes the levels of input and neurons from their spikes."""

    def __init__(self, steps: tuple[Step, ...], topology: Topology, result: SimulationResult) -> None:
        super().__init__(steps)
        self.result, self.spikes, self.dtype = result, spike_counts(result), topology.graph.dtype

    def at_input(self, step: Step) -> Tensor:
        return self._recorded(INPUT)

    def at_neurons(self, step: Step) -> Tensor:
        assert isinstance(step.module, TTFSNeuron)
        return self._recorded(str(step.node.target))

    def _recorded(self, name: str) -> Tensor:
        window, steps = self.result.windows[name], self.result.spike_steps[name]
        all_fire = bool((self.spikes[name] == steps.shape[1:].numel()).all())
        return window.levels_at(steps, None if all_fire else SILENT, self.dtype)


class _Reach(LevelWalk):
    """1 where any spike reaches a unit of a node, else 0."""

    def at_synapses(self, step: Step) -> Tensor:
        if step.module is not None and weighs(step.module, self.source(step).shape[1:]):
            reached = with_unit_weights(step.module)(*(self.values[each] for each in step.arguments or step.sources))
        else:
            reached = super().at_synapses(step)
        reaches: Tensor = (reached > 0).to(reached.dtype)
        return reaches


def routed_levels(
    topology: Topology, levels: Mapping[fx.Node, Tensor], nodes: Collection[str]
) -> dict[fx.Node, Tensor]:
    """Levels at nodes between spikes and pools, of these names, given those of all nodes that emit spikes."""
    wanted = [topology.nodes[name] for name in nodes]
    steps = plan_walk(topology.graph.module, wanted, [*wanted, *levels], among=topology.between)
    return _Routing(steps).run_from(levels)


def reached_units(
    topology: Topology, levels: Mapping[fx.Node, Tensor], nodes: Collection[str]
) -> dict[fx.Node, Tensor]:
    """1 where any spike reaches a unit of the nodes of these names, else 0; given the levels of those that emit."""
    wanted = [topology.nodes[name] for name in nodes]
    steps = plan_walk(topology.graph.module, wanted, wanted, among=topology.between)
    dtype = topology.graph.dtype
    return _Reach(steps).run_from({node: (value != SILENT).to(dtype) for node, value in levels.items()})


__all__ = ["SILENT", "levels_of_sources", "reached_units", "routed_levels", "source_levels"]
