"""Operations at synapses and pools: spikes times the synapses that carry them, and steps in which currents change."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, fx

from quartz_plugin.costs.levels import SILENT, reached_units, routed_levels
from quartz_plugin.costs.spikes import per_image
from quartz_plugin.engines.event import LEAST_CHANGE, count_changes
from quartz_plugin.engines.stepped import walk_layer
from quartz_plugin.graph import Layer
from quartz_plugin.graph.topology import Topology

LayerCounts = dict[str, Tensor]
"""Layer -> int64 ``[B]``."""

Levels = Mapping[fx.Node, Tensor]
"""Node that emits spikes -> their levels ``[B, ...]``, :data:`~quartz_plugin.costs.levels.SILENT` where none comes."""


def delivered(spikes: Tensor, fan_out: Tensor) -> Tensor:
    """Spikes ``[B, ...]`` of units times the synapses that each unit has: int64 ``[B]``, exact below 2^53."""
    return (spikes.flatten(1).double() @ fan_out.flatten().to(spikes.device, torch.float64)).long()


def _none(levels: Levels) -> Tensor:
    """Count nothing for each image."""
    like = next(iter(levels.values()))
    return torch.zeros(len(like), dtype=torch.int64, device=like.device)


def composed_synops(topology: Topology, levels: Levels) -> LayerCounts:
    """Count spikes times the entries of the composed maps between two layers that carry them."""
    by_name = {node.name: value for node, value in levels.items()}
    none = _none(levels)
    fired: dict[str, Tensor | None] = {}

    def of_source(source: str, fan_out: Tensor) -> Tensor:
        if source not in fired:
            # Where all fire, all synapses deliver.
            emitted = by_name[source]
            fired[source] = None if emitted.numel() and bool(emitted.min() > SILENT) else emitted != SILENT
        these = fired[source]
        return none + int(fan_out.sum()) if these is None else delivered(these, fan_out)

    return {
        layer: sum((of_source(source, fan_out) for source, fan_out in by_source.items()), none)
        for layer, by_source in topology.fan_outs.items()
    }


def factored_synops(topology: Topology, levels: Levels, composed: LayerCounts) -> LayerCounts:
    """Count the synapses of the maps one after the other whose unit any spike reaches.

    `composed` are the counts of the composed maps, which are the same where there is no chain of maps.
    """
    if not topology.chained:
        return composed
    befores = {before for layer in topology.chained for before, _ in topology.chains[layer]}
    reached = {node.name: value > 0 for node, value in reached_units(topology, levels, befores).items()}
    none = _none(levels)
    return {
        layer: sum((delivered(reached[before], count) for before, count in chain), none)
        if layer in topology.chained
        else composed[layer]
        for layer, chain in topology.chains.items()
    }


def merged_synops(topology: Topology, levels: Levels) -> LayerCounts:
    """Count neuron-steps in which the current changes by more than 1e-6."""
    graph = topology.graph
    by_event = {}
    if graph.device.type == "cpu" and find_spec("numba") is not None:
        by_event = count_changes(graph, levels)
    return {
        layer.name: by_event[layer.name]
        if layer.name in by_event
        else changes_step_by_step(layer, {source: levels[source] for source in layer.projection.sources})
        for layer in topology.layers
    }


def changes_step_by_step(layer: Layer, levels: Levels) -> Tensor:
    """Neuron-steps in which a layer's currents change by more than 1e-6, by stepping it: int64 ``[B]``.

    `levels` are those of its sources.
    """
    current: Tensor | None = None
    changes: Any = 0
    for step, _, state in walk_layer(layer, levels):
        change = state.i if current is None else state.i - current
        changes = changes + per_image(change.abs() > LEAST_CHANGE)
        current = state.i
        if step == layer.neuron.clock.readout and layer.neuron.p.bias_code != "spike":
            break
    assert isinstance(changes, Tensor)
    return changes


def pool_events(topology: Topology, levels: Levels, spikes: LayerCounts) -> LayerCounts:
    """Count spikes times the windows of max pooling that they are in; `spikes` are those of each layer."""

    def of_layer(before: str) -> str:
        return str(topology.nodes[before].target)

    pools = topology.pools
    # Where each spike of a layer is in one window, they need not be looked at.
    once = {
        before
        for in_front in pools.values()
        for before, windows in in_front
        if bool((windows == 1).all()) and of_layer(before) in spikes
    }
    others = {before for in_front in pools.values() for before, _ in in_front} - once
    fired = {node.name: value != SILENT for node, value in routed_levels(topology, levels, others).items()}
    none = _none(levels)
    return {
        layer: sum(
            (
                spikes[of_layer(before)] if before in once else delivered(fired[before], windows)
                for before, windows in in_front
            ),
            none,
        )
        for layer, in_front in pools.items()
    }


__all__ = [
    "LayerCounts",
    "changes_step_by_step",
    "composed_synops",
    "delivered",
    "factored_synops",
    "merged_synops",
    "pool_events",
]
