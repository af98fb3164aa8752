"""The analytic engine: one ordinary forward pass on levels, with a rounding in place of each ReLU.

Exact for held neurons at any ``T``, on any device, and differentiable (straight-through). Where no gradient is wanted,
biases and the half that rounds enter with the synapses, and values that nobody else looks at are overwritten.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

from quartz_plugin.coding import is_traced
from quartz_plugin.engines.pools import largest_of_tiles, tile_of
from quartz_plugin.engines.stepped import EngineOutput
from quartz_plugin.functional import check_bias_shape, closed_form, fires_before_deadline, spike_steps_of
from quartz_plugin.graph import ConvertedGraph
from quartz_plugin.graph.fingerprint import Snapshot, snapshot_of
from quartz_plugin.graph.topology import Derived, Topology
from quartz_plugin.graph.walk import LevelWalk, Step, add_up
from quartz_plugin.layout import channels_last
from quartz_plugin.neuron import FirstSpikeMaxPool, TTFSNeuron
from quartz_plugin.operators.modules import Add, OneToOne
from quartz_plugin.operators.table import row_of, weights_of


def run_analytic(
    graph: ConvertedGraph, input_levels: Tensor, record: bool = True, snapshot: Snapshot | None = None
) -> EngineOutput:
    """Find every held neuron's level by the closed form ``clip(floor(W n + S b + 1/2), 0, S)``.

    Parameters and returns are those of :func:`~quartz_plugin.engines.stepped.run_stepped`.
    """
    snapshot = snapshot or snapshot_of(graph)
    topology, fused = Topology.of(graph, snapshot), _FUSED.of(graph, snapshot)
    traced = snapshot.weights is None or is_traced(input_levels)
    if traced or graph.wants_gradient or (torch.is_grad_enabled() and input_levels.requires_grad):
        walk = _ClosedForm(topology, fused, record)
        walk.run(input_levels)
    else:
        walk = _Overwriting(topology, fused, record, _PREPARED.of(graph, snapshot))
        # Spikes of all layers are stored in torch's own order, and to reorder them takes longer than is gained.
        walk.run(input_levels if record else channels_last(input_levels))
    assert walk.membrane is not None
    levels = walk.values[topology.output.node].contiguous()
    return EngineOutput(walk.spike_steps, levels, walk.membrane.contiguous())


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
        return self.recorded(step, levels, fired)

    def recorded(self, step: Step, levels: Tensor, fired: Tensor | None = None) -> Tensor:
        """Levels, whose spikes are noted where they are asked for."""
        if self.record or step.node is self.output.node:
            assert isinstance(step.module, TTFSNeuron)
            steps = spike_steps_of(step.module.p, levels.detach(), fired)
            self.spike_steps[str(step.node.target)] = steps.contiguous()
        return levels


class _Overwriting(_ClosedForm):
    """The same without gradients, in fewer passes over memory."""

    def __init__(self, topology: Topology, fused: dict[fx.Node, _Fused], record: bool, prepared: _Prepared) -> None:
        super().__init__(topology, fused, record)
        self.prepared = prepared

    def at_synapses(self, step: Step) -> Tensor:
        entering = self.prepared.entering.get(step.node)
        if entering is not None:
            biased: Tensor = entering.with_bias(step.module, self.source(step), entering.bias)
            return biased
        if step.node in self.prepared.weights:
            # Weighed where it is added up.
            unweighed: Tensor = self.source(step)
            return unweighed
        if type(step.module) is Add and step.arguments is not None:
            return self._sum(step.arguments, step.spare)
        if step.module is not None and row_of(step.module) is not None:
            return super().at_synapses(step)
        # Code that is not of this library may ask how its inputs are stored.
        given = {source: self.values[source] for source in step.sources}
        self.values.update({source: value.contiguous() for source, value in given.items()})
        levels: Tensor = super().at_synapses(step)
        self.values.update(given)
        return levels

    def at_neurons(self, step: Step) -> Tensor:
        node, prepared = step.node, self.prepared
        if (window := prepared.windows.get(node)) is None:
            return super().at_neurons(step)
        current, bias = self.source(step), prepared.biases.get(node)
        if bias is not None:
            check_bias_shape(bias, current)
            if step.sources[0] in prepared.weights:
                current = torch.addcmul(bias, current, prepared.weights[step.sources[0]])
            else:
                current = current.add_(bias) if step.spare else current + bias
        if bias is not None or node in prepared.halved:
            return self.recorded(step, current.clamp_(0, window + 0.5).floor_())
        return self.recorded(step, closed_form(current, window, inplace=bool(step.spare)))

    def at_pool(self, step: Step) -> Tensor:
        assert isinstance(step.module, FirstSpikeMaxPool)
        levels: Tensor = self.source(step)
        tile = tile_of(step.module.pool)
        if tile is not None and levels.device.type == "cpu" and levels.dim() == 4:
            return largest_of_tiles(levels, *tile)
        pooled: Tensor = super().at_pool(step)
        return pooled

    def _sum(self, arguments: Sequence[fx.Node], spare: Collection[fx.Node]) -> Tensor:
        weights = self.prepared.weights
        values: list[Tensor] = [self.values[node] for node in arguments]
        alike = len({value.shape for value in values}) == 1
        own = [alike and node in spare and node not in weights and arguments.count(node) == 1 for node in arguments]
        if weights.keys().isdisjoint(arguments):
            return add_up(values, own)
        first = own.index(True) if True in own else 0
        total, is_own = values[first], own[first]
        if arguments[first] in weights:
            total, is_own = total * weights[arguments[first]], True
        for place, (node, value) in enumerate(zip(arguments, values, strict=True)):
            if place == first:
                continue
            if node not in weights:
                total = total.add_(value) if is_own else total + value
            else:
                total = (total.addcmul_ if is_own else total.addcmul)(value, weights[node])
            is_own = True
        return total


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


class _Entering(NamedTuple):
    """A bias that synapses add, and how these are called with one."""

    bias: Tensor
    with_bias: Callable[[Any, Tensor, Tensor], Tensor]


class _Prepared(NamedTuple):
    """All that weights and biases are made into before values come.

    Attributes
    ----------
    entering : dict
        Synapses -> the bias that they add: that of the neurons behind them, or behind the sum that they are part of.
    windows : dict
        Neurons behind a rectifier -> steps of their window.
    halved : set
        Those of them whose current has the half that rounds in it already.
    biases : dict
        Other neurons -> their bias and that half.
    weights : dict
        Synapses of one unit to one, whose only reader weighs them -> their weights.
    """

    entering: dict[fx.Node, _Entering]
    windows: dict[fx.Node, int]
    halved: set[fx.Node]
    biases: dict[fx.Node, Tensor]
    weights: dict[fx.Node, Tensor]


def _prepare(topology: Topology) -> _Prepared:
    prepared = _Prepared({}, {}, set(), {}, {})
    modules = {step.node: step.module for step in topology.steps}
    for node, neuron in modules.items():
        if not isinstance(neuron, TTFSNeuron) or node is topology.output.node or neuron.p.signed:
            continue
        prepared.windows[node] = neuron.clock.window
        if neuron.bias is None:
            continue
        (source,), bias = node.all_input_nodes, neuron.bias.detach() * neuron.clock.input_window
        added = source.all_input_nodes if _sums(modules[source], source) else ()
        summed = [source, *(each for each in added if source.args.count(each) == 1)]
        entrances = [each for each in summed if _takes_bias(modules[each], each, bias)]
        if entrances:
            module, entrance = modules[entrances[0]], entrances[0]
            rule = weights_of(module)
            assert rule is not None
            assert rule.with_bias is not None
            if halves := _halves(module):
                prepared.halved.add(node)
            prepared.entering[entrance] = _Entering(bias.flatten() + 0.5 * halves, rule.with_bias)
        else:
            prepared.biases[node] = bias + 0.5
    for node, module in modules.items():
        if type(module) is OneToOne and len(node.users) == 1:
            (user,) = node.users
            is_sum = _sums(modules[user], user) and user.args.count(node) == 1
            if is_sum or user in prepared.biases:
                prepared.weights[node] = module.weight.detach()
    return prepared


def _sums(module: Any, node: fx.Node) -> bool:
    """Check that a node sums other nodes' values up for one reader alone."""
    nodes = not node.kwargs and all(isinstance(argument, fx.Node) for argument in node.args)
    return type(module) is Add and nodes and len(node.args) > 1 and len(node.users) == 1


def _takes_bias(module: Any, node: fx.Node, bias: Tensor) -> bool:
    """Check that synapses with one reader can add this bias."""
    rule = weights_of(module)
    fits = rule is not None and rule.with_bias is not None and bias.shape == rule.bias_shape(module)
    return fits and len(node.users) == 1 and len(node.all_input_nodes) == 1


def _halves(synapses: Any) -> bool:
    """Check that halves lie on the grid of every output's weights, if they lie on one.

    Else a sum that float32 just holds would be rounded by another half, and the next weight bring it back to size.
    """
    weight = synapses.weight.detach().flatten(1)
    return bool(((weight != weight.round()).any(dim=1) | (weight == 0).all(dim=1)).all())


_PREPARED = Derived(_prepare, from_weights=True)
