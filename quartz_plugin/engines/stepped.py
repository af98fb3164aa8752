"""The stepped engine: dense time steps, layer after layer; the plain reading that judges the others.

Layer after layer it keeps one step at a time, so memory does not grow with ``T``. Where a weight wants a gradient, all
layers are stepped together on the global clock instead, with surrogate gradients; that keeps every step.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, fx

from quartz_plugin.coding import NO_SPIKE
from quartz_plugin.functional import TTFSState, check_bias_shape, initial_state, ttfs_step
from quartz_plugin.graph import (
    ConvertedGraph,
    Layer,
    call_node,
    called_by,
    evaluated,
    is_spike_source,
    propagate_levels,
)
from quartz_plugin.neuron import FirstSpikeMaxPool, StatefulModule

EngineOutput = tuple[dict[str, Tensor], Tensor, Tensor]
"""Spike steps of the layers, levels of the output, and its membranes at readout."""


def run_stepped(graph: ConvertedGraph, input_levels: Tensor, record: bool = True) -> EngineOutput:
    """Step each layer from the earliest spike that reaches it to the end of its window.

    Parameters
    ----------
    graph : ConvertedGraph
        The network.
    input_levels : Tensor
        Levels of the input, ``[B, *input_shape]``.
    record : bool
        Return the spikes of all layers, not of the output alone.

    Returns
    -------
    spike_steps : dict
        Layer name -> int32 global steps, -1 for no spike.
    output_levels : Tensor
        Levels of the output layer, ``-S`` where it did not fire.
    membrane : Tensor
        Membranes of the output layer at its readout, in levels.
    """
    if graph.wants_gradient:
        return _run_with_gradients(graph, input_levels, record)
    with torch.no_grad():
        return _run_by_layers(graph, input_levels, record)


def _run_by_layers(graph: ConvertedGraph, input_levels: Tensor, record: bool) -> EngineOutput:
    layers = {layer.node: layer for layer in graph.layers}
    output = list(layers.values())[-1]
    levels: dict[fx.Node, Tensor] = {}
    spike_steps: dict[str, Tensor] = {}
    for node in graph.module.graph.nodes:
        if node.op == "placeholder":
            levels[node] = input_levels
        elif node in layers:
            layer = layers[node]
            steps = step_layer(layer, {source: levels[source] for source in layer.projection.sources})
            spoken = layer.neuron.clock.output_window.levels_at(steps, layer.neuron.p.silent_level)
            levels[node] = spoken.to(input_levels.dtype)
            if record or layer is output:
                spike_steps[layer.name] = steps
        elif is_spike_source(graph.module, node):
            pool = graph.module.get_submodule(str(node.target))
            assert isinstance(pool, FirstSpikeMaxPool)
            levels[node] = pool.pool(_routed_levels(graph.module, node.all_input_nodes[0], levels))
    membrane = output.membrane_at_readout({source: levels[source] for source in output.projection.sources})
    return spike_steps, levels[output.node], membrane


def _run_with_gradients(graph: ConvertedGraph, input_levels: Tensor, record: bool) -> EngineOutput:
    """Step all layers together; the output's levels carry surrogate gradients.

    A neuron that has fired stays fired, so the level it says is, but for a constant, the number of steps in which it
    has: a sum of spikes, through which gradients flow.
    """
    module, output = graph.module, graph.layers[-1]
    names = {layer.node: layer.name for layer in graph.layers if record or layer == output}
    spike_steps: dict[str, Tensor] = {}
    states: dict[fx.Node, Any] = {}
    steps_fired: Tensor | None = None
    membrane: Tensor | None = None
    clock, bias = output.neuron.clock, output.neuron.p.bias
    for step in range(graph.n_steps):
        values: dict[fx.Node, Any] = {}
        for node in module.graph.nodes:
            target = called_by(module, node)
            if node.op == "placeholder":
                arriving = input_levels == graph.input_window.level_at(step)
                values[node] = arriving.to(input_levels.dtype)
            elif isinstance(target, StatefulModule):
                values[node], states[node] = target.advance(values[node.all_input_nodes[0]], states.get(node))
            elif node.op != "output":
                values[node] = call_node(module, node, values)
            if node in names:
                spikes = values[node].detach()
                at = spike_steps.setdefault(names[node], torch.full_like(spikes, NO_SPIKE, dtype=torch.int32))
                at[spikes != 0] = step
        fired = states[output.node].fired
        steps_fired = fired if steps_fired is None else steps_fired + fired
        if step == clock.readout:
            # Without the step's climb, and with what bias spikes still to come will take from it.
            membrane = states[output.node].v - states[output.node].i
            if bias is not None and output.neuron.p.bias_code == "spike":
                membrane = membrane + (clock.readout - clock.bias_spike_steps(bias)).clamp(max=0).to(membrane)
    assert steps_fired is not None
    assert membrane is not None
    p = output.neuron.p
    never = p.clock.output_window.level_at(graph.n_steps)
    return spike_steps, (steps_fired + never).clamp(min=p.silent_level), membrane


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


def _routed_levels(module: fx.GraphModule, node: fx.Node, levels: dict[fx.Node, Tensor]) -> Tensor:
    """Levels at a node between a spike source and a pool, where only routing can stand."""
    return evaluated(node, levels, lambda each: propagate_levels(module, each, levels))
