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
from quartz_plugin.graph import ConvertedGraph, Layer
from quartz_plugin.graph.fingerprint import Snapshot, snapshot_of
from quartz_plugin.graph.topology import Topology
from quartz_plugin.graph.walk import LevelWalk, Step, plan_walk
from quartz_plugin.neuron import FirstSpikeMaxPool


@contextmanager
def _threads(plan: NetworkPlan, batch: int) -> Iterator[int]:
    """Threads that the kernels take for so many images: they share the images, where those are worth it.

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
    graph: ConvertedGraph, input_levels: Tensor, record: bool = True, snapshot: Snapshot | None = None
) -> EngineOutput:
    """Find all spikes by events, on a CPU, without gradients.

    Parameters and returns are those of :func:`~quartz_plugin.engines.stepped.run_stepped`.

    Raises
    ------
    ImportError
        Without numba.
    """
    topology, plan = Topology.of(graph, snapshot), plan_of(graph, snapshot)
    with _threads(plan, len(input_levels)) as threads:
        walk = _ByEvents(topology, plan, record, threads)
        walk.run(input_levels)
    assert walk.membrane is not None
    return EngineOutput(walk.spike_steps, walk.values[topology.output.node], walk.membrane)


class _ByEvents(LevelWalk):
    """Goes from layer to layer, each as planned."""

    def __init__(self, topology: Topology, plan: NetworkPlan, record: bool, threads: int) -> None:
        super().__init__(plan.steps)
        self.topology, self.plan, self.record, self.threads = topology, plan, record, threads
        self.spike_steps: dict[str, Tensor] = {}
        self.membrane: Tensor | None = None

    def at_pool(self, step: Step) -> Tensor:
        assert isinstance(step.module, FirstSpikeMaxPool)
        return pooled(step.module.pool, self.source(step))

    def at_neurons(self, step: Step) -> Tensor:
        layer = self.topology.layer_at[step.node]
        is_output, plan = layer is self.topology.output, self.plan.layers[layer.name]
        wanted = self.record or is_output
        if is_output:
            self.membrane = layer.membrane_at_readout(self._of_sources(layer))
        levels, steps = (
            _step(layer, self._of_sources(layer), self.input.dtype)
            if plan is None
            else _fire(layer, plan, self.values, self.input, wanted, self.threads)
        )
        if steps is not None and wanted:
            self.spike_steps[layer.name] = steps
        return levels

    def _of_sources(self, layer: Layer) -> dict[fx.Node, Tensor]:
        return {source: self.values[source] for source in layer.projection.sources}


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
    steps = step_layer(layer, levels)
    return layer.neuron.clock.output_window.levels_at(steps, layer.neuron.p.silent_level).to(dtype), steps


def _fire(
    layer: Layer, plan: LayerPlan, levels: dict[fx.Node, Tensor], like: Tensor, record: bool, threads: int
) -> tuple[Tensor, Tensor | None]:
    """Levels of a layer, and its spike steps where they are wanted."""
    p, batch = layer.neuron.p, len(like)
    channels, height, width = as_image(plan.shape)
    # numpy asks the system for large pages, torch does not.
    out = torch.from_numpy(np.empty((batch, height, width, channels), like.numpy().dtype))
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
    snapshot, batch = snapshot_of(graph), len(next(iter(levels.values())))
    plan = plan_of(graph, snapshot)
    with _threads(plan, batch) as threads:
        return _count_changes(Topology.of(graph, snapshot), plan, levels, threads)


def _count_changes(
    topology: Topology, plan: NetworkPlan, levels: Mapping[fx.Node, Tensor], threads: int
) -> dict[str, Tensor]:
    counts = {}
    for layer in topology.layers:
        own = plan.layers[layer.name]
        if own is None:
            continue
        arriving = {source: levels[source] for source in layer.projection.sources}
        routing = [node for node in layer.projection.nodes if node in plan.routing]
        if routing:
            steps = plan_walk(topology.graph.module, keep=[*arriving, *routing], among=routing)
            arriving = LevelWalk(steps).run_from(arriving)
        changes = np.zeros(len(next(iter(arriving.values()))), np.int64)
        sources = _sources_of(own, arriving)
        for channel_range in own.ranges:
            count_changes_in_range(
                channel_range, [sources[source] for source in channel_range.sources], changes, threads
            )
        counts[layer.name] = torch.from_numpy(changes)
    return counts
