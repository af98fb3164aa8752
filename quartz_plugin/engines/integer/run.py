"""The walk of the integer engine."""

from __future__ import annotations

import torch
from torch import Tensor, fx

from quartz_plugin.engines.analytic import run_analytic
from quartz_plugin.engines.integer.maps import max_pool
from quartz_plugin.engines.integer.plan import PLAN, Firing, Plan
from quartz_plugin.engines.recorded import recorded_steps
from quartz_plugin.engines.stepped import EngineOutput
from quartz_plugin.functional import closed_form, fires_before_deadline, spike_steps_of
from quartz_plugin.graph import ConvertedGraph
from quartz_plugin.graph.fingerprint import Snapshot
from quartz_plugin.graph.topology import Topology
from quartz_plugin.graph.walk import LevelWalk, Step
from quartz_plugin.neuron import FirstSpikeMaxPool, TTFSNeuron


def run_integer(
    graph: ConvertedGraph, input_levels: Tensor, record: bool = True, snapshot: Snapshot | None = None
) -> EngineOutput:
    """Find every held neuron's level by the closed form, in whole numbers.

    Parameters and returns are those of :func:`~quartz_plugin.engines.stepped.run_stepped`. A layer whose synapses have
    no form in int8 is computed in floating point, which holds all its sums.
    """
    if len(input_levels) == 0:
        # The operators take no empty batch.
        return run_analytic(graph, input_levels, record, snapshot)
    topology = Topology.of(graph, snapshot)
    plan = PLAN.of(graph, snapshot)
    with torch.no_grad():
        walk = _Integers(plan, topology, record)
        walk.run(_as_levels(input_levels))
    assert walk.membrane is not None
    assert walk.output_levels is not None
    return EngineOutput(walk.spike_steps, walk.output_levels, walk.membrane, plan.arithmetic)


class _Integers(LevelWalk):
    """Levels are uint8, four-dimensional ones channels-last; what arrives at neurons is floating point."""

    def __init__(self, plan: Plan, topology: Topology, record: bool) -> None:
        super().__init__(plan.steps)
        self.plan, self.topology, self.record = plan, topology, record
        self.spike_steps: dict[str, Tensor] = {}
        self.membrane: Tensor | None = None
        self.output_levels: Tensor | None = None

    def at_synapses(self, step: Step) -> Tensor:
        node, module = step.node, step.module
        assert module is not None
        assert step.arguments is not None
        if node not in self.plan.dtypes:
            return self._routed(step)
        if (map_ := self.plan.maps.get(node)) is not None:
            return map_.drive(self._side_by_side(self.plan.levels[node]))
        dtype = self.plan.dtypes[node]
        value: Tensor = self.plan.modules[node](*[self.values[argument].to(dtype) for argument in step.arguments])
        return value

    def _routed(self, step: Step) -> Tensor:
        module, values = step.module, [self.values[argument] for argument in step.arguments or ()]
        assert module is not None
        try:
            routed: Tensor = module(*values)
        except (RuntimeError, NotImplementedError):
            # Some modules, and those of users, know floating point alone.
            routed = module(*[value.float() for value in values]).to(torch.uint8)
        return routed

    def at_pool(self, step: Step) -> Tensor:
        assert isinstance(step.module, FirstSpikeMaxPool)
        levels, pool = self.source(step), step.module.pool
        pooled = max_pool(levels, pool)
        return pool(levels.float()).to(torch.uint8) if pooled is None else pooled  # type: ignore[no-any-return]

    def at_neurons(self, step: Step) -> Tensor:
        neuron, firing = step.module, self.plan.firings[step.node]
        assert isinstance(neuron, TTFSNeuron)
        if step.node is self.topology.output.node:
            return self._fire_outputs(step, neuron, firing)
        levels = self._levels(step, firing, neuron.clock.window)
        if self.record:
            window = neuron.clock.output_window
            self.spike_steps[str(step.node.target)] = recorded_steps(levels, window, neuron.p.rectifier == "silent")
        return levels

    def _fire_outputs(self, step: Step, neuron: TTFSNeuron, firing: Firing) -> Tensor:
        drive, window = self._drive(step, firing), neuron.clock.window
        if drive.dim() == 4:
            drive = drive.contiguous()
        self.membrane = drive = drive.to(self.topology.graph.dtype)
        signed = neuron.p.signed
        self.output_levels = closed_form(drive, window, neuron.p.silent_level)
        fired = fires_before_deadline(drive, window) if signed else None
        self.spike_steps[str(step.node.target)] = spike_steps_of(neuron.p, self.output_levels, fired)
        return self.output_levels

    def _levels(self, step: Step, firing: Firing, window: int) -> Tensor:
        map_ = firing.map
        if map_ is not None and not firing.others:
            return map_.levels(self._side_by_side(firing.levels), firing.rounding, window)
        if map_ is not None and firing.gain is not None:
            others = self.values[firing.others[0]].clone(memory_format=torch.preserve_format)
            return map_.levels_of_sum(self._side_by_side(firing.levels), others, firing.gain, firing.rounding, window)
        drive = self._drive(step, firing)
        # Clipped, what is not negative is cut off.
        return drive.add_(0.5).clamp_(0, window).to(torch.uint8)

    def _drive(self, step: Step, firing: Firing) -> Tensor:
        """Membranes at readout, in a tensor of their own."""
        if firing.map is None:
            value: Tensor = self.values[firing.source]
            return value.to(firing.dtype, copy=True) if firing.bias is None else value.to(firing.dtype) + firing.bias
        levels, (first, *others) = self._side_by_side(firing.levels), firing.others or (None,)
        if first is None or firing.gain is not None or not firing.map.adds_to(self.values[first]):
            drive, others = firing.map.drive(levels, firing.bias), list(firing.others)
        else:
            own = first in step.spare and firing.others.count(first) == 1
            drive = firing.map.drive_onto(
                levels, self.values[first] if own else self.values[first].clone(), firing.bias
            )
        for other in others:
            drive.add_(self.values[other], alpha=1.0 if firing.gain is None else firing.gain)
        return drive

    def _side_by_side(self, nodes: tuple[fx.Node, ...]) -> Tensor:
        levels = [self.values[node] for node in nodes]
        return levels[0] if len(levels) == 1 else torch.cat(levels, 1)


def _as_levels(levels: Tensor) -> Tensor:
    levels = levels.detach().to(torch.uint8)
    return levels.contiguous(memory_format=torch.channels_last) if levels.dim() == 4 else levels


__all__ = ["run_integer"]
