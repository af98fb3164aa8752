"""The analytic engine: one ordinary forward pass on levels, with a rounding in place of each ReLU.

Exact for held neurons at any ``T``, on any device, and differentiable (straight-through).
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, fx, nn
from torch.nn import functional as F

from quartz_plugin.engines.stepped import EngineOutput
from quartz_plugin.functional import check_bias_shape, closed_form, fires_before_deadline, spike_steps_of
from quartz_plugin.graph import ConvertedGraph, called_by, expiring_after, propagate_levels
from quartz_plugin.neuron import FirstSpikeMaxPool, TTFSNeuron


def run_analytic(graph: ConvertedGraph, input_levels: Tensor, record: bool = True) -> EngineOutput:
    """Find every held neuron's level by the closed form ``clip(floor(W n + S b + 1/2), 0, S)``.

    Parameters and returns are those of :func:`~quartz_plugin.engines.stepped.run_stepped`.
    """
    module = graph.module
    expiring = expiring_after(module)
    last = graph.layers[-1]
    output = last.node

    values: dict[fx.Node, Any] = {}
    spike_steps: dict[str, Tensor] = {}
    biased: set[fx.Node] = set()
    for node in module.graph.nodes:
        if node.op == "placeholder":
            values[node] = input_levels
        elif node.op == "output":
            break
        else:
            target = called_by(module, node)
            if isinstance(target, TTFSNeuron):
                current = values[source := node.all_input_nodes[0]]
                check_bias_shape(target.bias, current)
                if node is output:
                    membrane = current if source in biased else last.with_bias(current)
                levels, fired = _fire(target, current, source in biased, keep=node is output)
                if record or node is output:
                    spike_steps[str(node.target)] = spike_steps_of(target.p, levels.detach(), fired)
                values[node] = levels
            elif isinstance(target, FirstSpikeMaxPool):
                values[node] = target.pool(values[node.all_input_nodes[0]])
            else:
                bias = _bias_to_fuse(module, node)
                if bias is None or target is None:
                    values[node] = propagate_levels(module, node, values)
                else:
                    values[node] = _call_with_bias(target, values[node.all_input_nodes[0]], bias)
                    biased.add(node)
        for source in expiring.get(node, ()):
            if source is not output:
                del values[source]
    return spike_steps, values[output], membrane


def _fire(neuron: TTFSNeuron, current: Tensor, bias_is_in: bool, keep: bool) -> tuple[Tensor, Tensor | None]:
    """Levels, and which neurons fired (None: all of them)."""
    clock, p = neuron.clock, neuron.p
    # Without a bias the current may be another layer's levels, merely routed here.
    own = p.bias is not None and not keep
    if p.bias is not None and not bias_is_in:
        current = current + clock.input_window * p.bias
    if p.signed:
        # The drive decides who says -1 in time, so it is looked at before it is clipped.
        fired = fires_before_deadline(current.detach(), clock.window)
        return closed_form(current, clock.window, p.silent_level), fired
    return closed_form(current, clock.window, inplace=own), None


def _bias_to_fuse(module: fx.GraphModule, node: fx.Node) -> Tensor | None:
    """Bias of the only layer behind this convolution or linear layer, if it is one number a channel."""
    if node.op != "call_module" or len(node.users) != 1:
        return None
    synapses, user = module.get_submodule(str(node.target)), next(iter(node.users))
    if user.op != "call_module" or not isinstance(synapses, (nn.Conv1d, nn.Conv2d, nn.Linear)):
        return None
    neuron = module.get_submodule(str(user.target))
    if not isinstance(neuron, TTFSNeuron) or neuron.bias is None:
        return None
    channels = synapses.weight.shape[0]
    per_channel = (channels,) if isinstance(synapses, nn.Linear) else (channels, *[1] * (synapses.weight.dim() - 2))
    if tuple(neuron.bias.shape) != per_channel:
        return None
    return neuron.bias.flatten() * neuron.clock.input_window


def _call_with_bias(synapses: nn.Module, x: Tensor, bias: Tensor) -> Tensor:
    if isinstance(synapses, nn.Linear):
        return F.linear(x, synapses.weight, bias)
    assert isinstance(synapses, (nn.Conv1d, nn.Conv2d))
    current: Tensor = synapses._conv_forward(x, synapses.weight, bias)
    return current
