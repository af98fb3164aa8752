"""The walk of the event engine over a network's layers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import reduce
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from quartz_plugin.engines.convolutions import as_image, pair
from quartz_plugin.engines.event import constants
from quartz_plugin.engines.event.deliver import count_changes_in_range, fire_range
from quartz_plugin.engines.event.plan import LayerPlan, NetworkPlan, plan_of
from quartz_plugin.engines.event.records import Array
from quartz_plugin.engines.stepped import EngineOutput, step_layer
from quartz_plugin.functional import spike_steps_of
from quartz_plugin.graph import ConvertedGraph, Layer, propagate_levels
from quartz_plugin.graph.fingerprint import Fingerprint


@contextmanager
def _threads(plan: NetworkPlan, batch: int) -> Iterator[int]:
    """How many threads the kernels take for so many images: they share the images, where those are worth it.

    Unless torch steps layers between, it takes one thread meanwhile: its idle ones spin, on the kernels' cores.
    """
    threads = torch.get_num_threads()
    if threads == 1 or batch == 1 or batch * plan.synapse_count < constants.WORTH_THREADS:
        yield 1
    elif None in plan.layers.values():
        yield threads
    else:
        torch.set_num_threads(1)
        try:
            yield threads
        finally:
            torch.set_num_threads(threads)


@torch.no_grad()
def run_event(
    graph: ConvertedGraph, input_levels: Tensor, record: bool = True, fingerprint: Fingerprint | None = None
) -> EngineOutput:
    """Find all spikes by events, on a CPU, without gradients.

    Other parameters, and returns, are those of :func:`~quartz_plugin.engines.stepped.run_stepped`.

    Parameters
    ----------
    fingerprint : Fingerprint, optional
        The network's, where that has just been taken.

    Raises
    ------
    ImportError
        Without numba.
    """
    plan = plan_of(graph, fingerprint)
    with _threads(plan, len(input_levels)) as threads:
        return _run(graph, plan, input_levels, record, threads)


def _run(graph: ConvertedGraph, plan: NetworkPlan, input_levels: Tensor, record: bool, threads: int) -> EngineOutput:
    module = graph.module
    layers = {layer.node: layer for layer in graph.layers}
    output = list(layers.values())[-1]
    last_use = {source: node for node in module.graph.nodes for source in _source_nodes(node, layers, plan)}
    levels: dict[fx.Node, Tensor] = {}
    spike_steps: dict[str, Tensor] = {}
    for node in module.graph.nodes:
        if node.op == "placeholder":
            levels[node] = input_levels
        elif (layer := layers.get(node)) is not None:
            wanted = record or layer is output
            if layer is output:
                membrane = layer.membrane_at_readout({source: levels[source] for source in layer.projection.sources})
            own = plan.layers[layer.name]
            levels[node], steps = (
                _step(layer, levels, input_levels.dtype)
                if own is None
                else _fire(layer, own, levels, input_levels, wanted, threads)
            )
            if steps is not None and wanted:
                spike_steps[layer.name] = steps
        elif node.name in plan.pools:
            levels[node] = pooled(plan.pools[node.name].pool, levels[node.all_input_nodes[0]])
        elif node.name in plan.routing:
            levels[node] = propagate_levels(module, node, levels)
        for source in [source for source in levels if last_use.get(source) is node]:
            del levels[source]
    return spike_steps, levels[output.node], membrane


def _source_nodes(node: fx.Node, layers: dict[fx.Node, Layer], plan: NetworkPlan) -> list[fx.Node]:
    """Nodes whose levels are looked at for this node."""
    layer = layers.get(node)
    if layer is None:
        return node.all_input_nodes if node.name in plan.pools or node.name in plan.routing else []
    own = plan.layers[layer.name]
    sources = set(layer.projection.sources)
    if own is None:
        return list(sources)
    # The last layer's membranes are looked at as well.
    is_output = node is list(layers)[-1]
    return [n for n in node.graph.nodes if n.name in own.sources or (is_output and n in sources)]


def pooled(pool: Any, levels: Tensor) -> Tensor:
    """Levels of the first spikes in each window."""
    plain = isinstance(pool, nn.MaxPool2d) and levels.dim() == 4 and not pool.ceil_mode
    if (
        not (plain and pair(pool.padding) == (0, 0) and pair(pool.dilation) == (1, 1))
        or levels.shape[1] >= constants.FEW_CHANNELS
    ):
        found: Tensor = pool(levels)
        return found
    # Of few channels, torch's kernel for channels that lie side by side is slow; pictures of their windows are not.
    for dim, size, stride in zip((2, 3), pair(pool.kernel_size), pair(pool.stride), strict=True):
        behind_last_window = (levels.shape[dim] - size) // stride * stride + 1
        every_nth = [
            levels[(slice(None),) * dim + (slice(first, first + behind_last_window, stride),)] for first in range(size)
        ]
        levels = reduce(torch.maximum, every_nth)
    return levels


def _step(layer: Layer, levels: dict[fx.Node, Tensor], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    steps = step_layer(layer, {source: levels[source] for source in layer.projection.sources})
    return layer.neuron.clock.output_window.levels_at(steps, layer.neuron.p.silent_level).to(dtype), steps


def _fire(
    layer: Layer, plan: LayerPlan, levels: dict[fx.Node, Tensor], like: Tensor, record: bool, threads: int
) -> tuple[Tensor, Tensor | None]:
    """Levels of a layer, and its spike steps where they are wanted."""
    p, batch = layer.neuron.p, len(like)
    channels, height, width = as_image(plan.shape)
    out = torch.empty(batch, height, width, channels, dtype=like.dtype)
    sources = _sources_of(plan, levels)
    for channel_range in plan.ranges:
        fire_range(channel_range, [sources[source] for source in channel_range.sources], out.numpy(), threads)
    fired = out.permute(0, 3, 1, 2).reshape(batch, *plan.shape)
    steps = spike_steps_of(p, fired, fired >= p.silent_level if p.signed else None) if record else None
    return (fired.clamp_(min=p.silent_level) if p.signed else fired), steps


def _sources_of(plan: LayerPlan, levels: Mapping[fx.Node, Tensor]) -> dict[str, Array]:
    """Levels of the nodes that a plan reads, ``[B, H, W, C]``."""
    return {source.name: _channels_last(value) for source, value in levels.items() if source.name in plan.sources}


def _channels_last(levels: Tensor) -> Array:
    image = levels.reshape(len(levels), *as_image(tuple(levels.shape[1:])))
    return image.permute(0, 2, 3, 1).contiguous().numpy()


@torch.no_grad()
def count_changes(graph: ConvertedGraph, levels: Mapping[fx.Node, Tensor]) -> dict[str, Tensor]:
    """Neuron-steps in which currents change by more than 1e-6: by arrivals, bias or readout.

    Parameters
    ----------
    graph : ConvertedGraph
        The network, on a CPU.
    levels : mapping
        Levels ``[B, ...]`` of all nodes that emit spikes, 0 or less where no spike comes before readout.

    Returns
    -------
    dict
        Layer -> int64 ``[B]``; without the layers whose synapses are no convolutions of spikes.
    """
    plan, batch = plan_of(graph), len(next(iter(levels.values())))
    with _threads(plan, batch) as threads:
        return _count_changes(graph, plan, levels, threads)


def _count_changes(
    graph: ConvertedGraph, plan: NetworkPlan, levels: Mapping[fx.Node, Tensor], threads: int
) -> dict[str, Tensor]:
    counts = {}
    for layer in graph.layers:
        own = plan.layers[layer.name]
        if own is None:
            continue
        arriving = {source: levels[source] for source in layer.projection.sources}
        for node in layer.projection.nodes:
            if node.name in plan.routing:
                arriving[node] = propagate_levels(graph.module, node, arriving)
        changes = np.zeros(len(next(iter(arriving.values()))), np.int64)
        sources = _sources_of(own, arriving)
        for channel_range in own.ranges:
            count_changes_in_range(
                channel_range, [sources[source] for source in channel_range.sources], changes, threads
            )
        counts[layer.name] = torch.from_numpy(changes)
    return counts
