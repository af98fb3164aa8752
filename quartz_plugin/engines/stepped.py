"""The stepped engine: dense time steps, layer after layer; the plain reading that judges the others.

Layer after layer it keeps one step at a time, so memory does not grow with ``T``. Where a weight wants a gradient, all
layers are stepped together on the global clock instead, with surrogate gradients; that keeps every step.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

from quartz_plugin.coding import NO_SPIKE
from quartz_plugin.functional import TTFSState, check_bias_shape, initial_state, ttfs_step
from quartz_plugin.graph import ConvertedGraph, Layer
from quartz_plugin.graph.fingerprint import Snapshot
from quartz_plugin.graph.topology import Topology
from quartz_plugin.graph.walk import LevelWalk, Step, Walk
from quartz_plugin.neuron import StatefulModule


class EngineOutput(NamedTuple):
    """All that an engine finds.

    Attributes
    ----------
    spike_steps : dict
        Layer name -> int32 global steps, -1 for no spike.
    output_levels : Tensor
        Levels of the output layer, ``-S`` where it did not fire.
    membrane : Tensor
        Membranes of the output layer at its readout, in levels.
    arithmetic : mapping
        Layer name -> types of numbers in which what arrives was added up, where they differ from layer to layer.
    """

    spike_steps: dict[str, Tensor]
    output_levels: Tensor
    membrane: Tensor
    arithmetic: Mapping[str, str] = MappingProxyType({})


def run_stepped(
    graph: ConvertedGraph, input_levels: Tensor, record: bool = True, snapshot: Snapshot | None = None
) -> EngineOutput:
    """Step each layer from the earliest spike that reaches it to the end of its window.

    Parameters
    ----------
    graph : ConvertedGraph
        The network.
    input_levels : Tensor
        Levels of the input, ``[B, *input_shape]``.
    record : bool
        Return the spikes of all layers, not of the output alone.
    snapshot : Snapshot, optional
        The network's, where it has just been taken.
    """
    topology = Topology.of(graph, snapshot)
    if graph.wants_gradient:
        return _run_with_gradients(topology, input_levels, record)
    with torch.no_grad():
        walk = _LayerByLayer(topology, record)
        walk.run(input_levels)
    assert walk.membrane is not None
    return EngineOutput(walk.spike_steps, walk.values[topology.output.node], walk.membrane)


class _LayerByLayer(LevelWalk):
    """Steps one layer after the other through its whole time, given the levels of its sources."""

    def __init__(self, topology: Topology, record: bool) -> None:
        super().__init__(topology.layer_steps)
        self.topology, self.record = topology, record
        self.spike_steps: dict[str, Tensor] = {}
        self.membrane: Tensor | None = None

    def at_neurons(self, step: Step) -> Tensor:
        layer = self.topology.layer_at[step.node]
        levels = {source: self.values[source] for source in layer.projection.sources}
        is_output = layer is self.topology.output
        if is_output:
            self.membrane = layer.membrane_at_readout(levels)
        spike_steps = step_layer(layer, levels)
        if self.record or is_output:
            self.spike_steps[layer.name] = spike_steps
        encoded = layer.neuron.clock.output_window.levels_at(spike_steps, layer.neuron.p.silent_level)
        return encoded.to(self.input.dtype)


def _run_with_gradients(topology: Topology, input_levels: Tensor, record: bool) -> EngineOutput:
    """Step all layers together; the output's levels carry surrogate gradients.

    A neuron that has fired stays fired, so the level it encodes is, but for a constant, the number of steps in which
    it has: a sum of spikes, through which gradients flow.
    """
    graph, output = topology.graph, topology.output
    recorded = topology.layers if record else (output,)
    walk = _AllLayers(topology, {layer.node: layer.name for layer in recorded})
    steps_fired: Tensor | None = None
    membrane: Tensor | None = None
    clock, bias = output.neuron.clock, output.neuron.p.bias
    for step in range(topology.n_steps):
        walk.advance((input_levels == graph.input_window.level_at(step)).to(input_levels.dtype), step)
        state = walk.states[output.node]
        steps_fired = state.fired if steps_fired is None else steps_fired + state.fired
        if step == clock.readout:
            # Without the step's climb, and with what bias spikes still to come will take from it.
            membrane = state.v - state.i
            if bias is not None and output.neuron.p.bias_code == "spike":
                membrane = membrane + (clock.readout - clock.bias_spike_steps(bias)).clamp(max=0).to(membrane)
    assert steps_fired is not None
    assert membrane is not None
    p = output.neuron.p
    never = p.clock.output_window.level_at(topology.n_steps)
    return EngineOutput(walk.spike_steps, (steps_fired + never).clamp(min=p.silent_level), membrane)


class _AllLayers(Walk):
    """One global step of all layers; states are kept from step to step."""

    def __init__(self, topology: Topology, recorded: Mapping[fx.Node, str]) -> None:
        super().__init__(topology.steps)
        self.recorded = recorded
        self.states: dict[fx.Node, Any] = {}
        self.spike_steps: dict[str, Tensor] = {}
        self.time = 0

    def advance(self, arriving: Tensor, time: int) -> None:
        """Let these spikes of the input arrive at this step."""
        self.time = time
        self.run(arriving)

    def at_neurons(self, step: Step) -> Tensor:
        fired = self.at_delay(step)
        if step.node in self.recorded:
            spikes = fired.detach()
            at = self.spike_steps.setdefault(
                self.recorded[step.node], torch.full_like(spikes, NO_SPIKE, dtype=torch.int32)
            )
            at[spikes != 0] = self.time
        return fired

    def at_pool(self, step: Step) -> Tensor:
        return self.at_delay(step)

    def at_delay(self, step: Step) -> Tensor:
        assert isinstance(step.module, StatefulModule)
        out, self.states[step.node] = step.module.advance(self.source(step), self.states.get(step.node))
        return out


def step_layer(layer: Layer, levels: Mapping[fx.Node, Tensor]) -> Tensor:
    """Global spike steps (int32, -1 for none) of one layer, given the levels of its sources."""
    spike_steps = None
    for step, spikes, _ in walk_layer(layer, levels):
        if spike_steps is None:
            spike_steps = torch.full(spikes.shape, NO_SPIKE, dtype=torch.int32, device=spikes.device)
        spike_steps[spikes != 0] = step
    assert spike_steps is not None
    return spike_steps


def walk_layer(layer: Layer, levels: Mapping[fx.Node, Tensor]) -> Iterator[tuple[int, Tensor, TTFSState]]:
    """Step one layer from the earliest spike that reaches it; yield each global step, its spikes, the state."""
    p, clock = layer.neuron.p, layer.neuron.clock
    first = clock.first_input
    for source_levels in levels.values():
        if source_levels.numel():
            first = min(first, clock.readout - int(source_levels.max()))
    if p.bias is not None and p.bias_code == "spike":
        first = min(first, int(clock.bias_spike_steps(p.bias).min()))

    # A first look at no spikes gives the neurons' shape.
    silence = layer.projection({source: torch.zeros_like(value) for source, value in levels.items()})
    check_bias_shape(p.bias, silence)
    state = initial_state(silence)._replace(step=torch.tensor(first))
    for step in range(first, p.last_step + 1):
        current = silence
        if step < clock.readout:
            level = clock.readout - step
            current = layer.projection({source: (value == level).to(value.dtype) for source, value in levels.items()})
        fired, state = ttfs_step(current, state, p)
        yield step, fired, state
