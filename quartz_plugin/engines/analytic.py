"""The analytic engine: one ordinary forward pass on levels, with a rounding in place of each ReLU.

Exact for held neurons at any ``T``, on any device, and differentiable (straight-through).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor, fx

from quartz_plugin.engines.stepped import EngineOutput
from quartz_plugin.functional import check_bias_shape, closed_form, fires_before_deadline, spike_steps_of
from quartz_plugin.graph import ConvertedGraph
from quartz_plugin.graph.fingerprint import Snapshot
from quartz_plugin.graph.topology import Derived, Topology
from quartz_plugin.graph.walk import LevelWalk, Step
from quartz_plugin.neuron import TTFSNeuron
from quartz_plugin.operators.table import weights_of


def run_analytic(
    graph: ConvertedGraph, input_levels: Tensor, record: bool = True, snapshot: Snapshot | None = None
) -> EngineOutput:
    """Find every held neuron's level by the closed form ``clip(floor(W n + S b + 1/2), 0, S)``.

    Parameters and returns are those of :func:`~quartz_plugin.engines.stepped.run_stepped`.
    """
    topology = Topology.of(graph, snapshot)
    walk = _ClosedForm(topology, _FUSED.of(graph, snapshot), record)
    walk.run(input_levels)
    assert walk.membrane is not None
    return EngineOutput(walk.spike_steps, walk.values[topology.output.node], walk.membrane)


class _ClosedForm(LevelWalk):
    """Evaluates synapses on levels and neurons by their closed form; biases are added by the synapses that can."""

    def __init__(self, topology: Topology, fused: dict[fx.Node, _Fused], record: bool) -> None:
        super().__init__(topology.steps)
        self.output, self.fused, self.record = topology.output, fused, record
        self.spike_steps: dict[str, Tensor] = {}
        self.membrane: Tensor | None = None

    def at_synapses(self, step: Step) -> Tensor:
        fused = self.fused.get(step.node)
        if fused is None or fused.neuron.bias is None:
            levels: Tensor = super().at_synapses(step)
            return levels
        bias = fused.neuron.bias.flatten() * fused.neuron.clock.input_window
        return fused.with_bias(step.module, self.source(step), bias)

    def at_neurons(self, step: Step) -> Tensor:
        assert isinstance(step.module, TTFSNeuron)
        neuron, current, is_output = step.module, self.source(step), step.node is self.output.node
        bias_is_in = step.sources[0] in self.fused
        check_bias_shape(neuron.bias, current)
        if is_output:
            self.membrane = current if bias_is_in else self.output.with_bias(current)
        levels, fired = _fire(neuron, current, bias_is_in, keep=is_output)
        if self.record or is_output:
            self.spike_steps[str(step.node.target)] = spike_steps_of(neuron.p, levels.detach(), fired)
        return levels


def _fire(neuron: TTFSNeuron, current: Tensor, bias_is_in: bool, keep: bool) -> tuple[Tensor, Tensor | None]:
    """Levels, and which neurons fired (None: all of them)."""
    clock, p = neuron.clock, neuron.p
    # Without a bias the current may be another layer's levels, merely routed here.
    own = p.bias is not None and not keep
    if p.bias is not None and not bias_is_in:
        current = current + clock.input_window * p.bias
    if p.signed:
        # The drive decides which neurons encode -1 in time, so it is looked at before it is clipped.
        fired = fires_before_deadline(current.detach(), clock.window)
        return closed_form(current, clock.window, p.silent_level), fired
    return closed_form(current, clock.window, inplace=own), None


class _Fused(NamedTuple):
    """Neurons whose bias the synapses in front of them add, and how these are called with one."""

    neuron: TTFSNeuron
    with_bias: Callable[[Any, Tensor, Tensor], Tensor]


def _find_fused(topology: Topology) -> dict[fx.Node, _Fused]:
    """Synapses that take a bias -> the only neurons behind each, where their bias is one number an output."""
    modules = {step.node: step.module for step in topology.steps}
    fused: dict[fx.Node, _Fused] = {}
    for node, synapses in modules.items():
        rule = weights_of(synapses)
        if len(node.users) != 1 or rule is None or rule.with_bias is None:
            continue
        neuron, of_outputs = modules[next(iter(node.users))], rule.bias_shape(synapses)
        if isinstance(neuron, TTFSNeuron) and neuron.bias is not None and neuron.bias.shape == of_outputs:
            fused[node] = _Fused(neuron, rule.with_bias)
    return fused


_FUSED = Derived(_find_fused)
