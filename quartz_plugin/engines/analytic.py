"""The analytic engine: one ordinary forward pass on levels, with a rounding in place of each ReLU.

Exact for held neurons at any ``T``, on any device, and differentiable (straight-through).
"""

from __future__ import annotations

from torch import Tensor, fx, nn
from torch.nn import functional as F

from quartz_plugin.engines.stepped import EngineOutput
from quartz_plugin.functional import check_bias_shape, closed_form, fires_before_deadline, spike_steps_of
from quartz_plugin.graph import ConvertedGraph
from quartz_plugin.graph.fingerprint import Snapshot
from quartz_plugin.graph.topology import Derived, Topology
from quartz_plugin.graph.walk import LevelWalk, Step
from quartz_plugin.neuron import TTFSNeuron


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

    def __init__(self, topology: Topology, fused: dict[fx.Node, TTFSNeuron], record: bool) -> None:
        super().__init__(topology.steps)
        self.output, self.fused, self.record = topology.output, fused, record
        self.spike_steps: dict[str, Tensor] = {}
        self.membrane: Tensor | None = None

    def at_synapses(self, step: Step) -> Tensor:
        neuron = self.fused.get(step.node)
        if neuron is None or neuron.bias is None or step.module is None:
            levels: Tensor = super().at_synapses(step)
            return levels
        return _call_with_bias(step.module, self.source(step), neuron.bias.flatten() * neuron.clock.input_window)

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


def _find_fused(topology: Topology) -> dict[fx.Node, TTFSNeuron]:
    """Convolutions and linear layers -> the only neurons behind each, where their bias is one number a channel."""
    modules = {step.node: step.module for step in topology.steps}
    fused: dict[fx.Node, TTFSNeuron] = {}
    for node, synapses in modules.items():
        if len(node.users) != 1 or not isinstance(synapses, (nn.Conv1d, nn.Conv2d, nn.Linear)):
            continue
        neuron = modules[next(iter(node.users))]
        if not isinstance(neuron, TTFSNeuron) or neuron.bias is None:
            continue
        channels = synapses.weight.shape[0]
        places = [] if isinstance(synapses, nn.Linear) else [1] * (synapses.weight.dim() - 2)
        if tuple(neuron.bias.shape) == (channels, *places):
            fused[node] = neuron
    return fused


_FUSED = Derived(_find_fused)


def _call_with_bias(synapses: nn.Module, x: Tensor, bias: Tensor) -> Tensor:
    if isinstance(synapses, nn.Linear):
        return F.linear(x, synapses.weight, bias)
    assert isinstance(synapses, (nn.Conv1d, nn.Conv2d))
    current: Tensor = synapses._conv_forward(x, synapses.weight, bias)
    return current
