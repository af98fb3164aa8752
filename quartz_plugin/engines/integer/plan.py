"""What of a network is carried out in int8, and what in floating point, each exactly."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from quartz_plugin.engines.integer import maps
from quartz_plugin.engines.integer.forms import Forms, in_front_of_delays, serves_one
from quartz_plugin.engines.integer.maps import MOST_LEVEL, IntegerMap, operators_work, rows_fit
from quartz_plugin.graph import ConvertedGraph
from quartz_plugin.graph.fingerprint import Snapshot
from quartz_plugin.graph.reach import EXACT_BITS, Reach, Reaches, is_weighted, places_in_use
from quartz_plugin.graph.topology import Derived, Topology
from quartz_plugin.graph.walk import Step, plan_walk
from quartz_plugin.neuron import TTFSNeuron
from quartz_plugin.operators.linear_map import Convolution, as_image
from quartz_plugin.operators.modules import Add, OneToOne, with_weight
from quartz_plugin.operators.table import row_of, weights_of

INTEGERS, SINGLE, DOUBLE = "int8", "float32", "float64"


@dataclass(frozen=True)
class Firing:
    """How the levels of a layer are found of what arrives.

    Attributes
    ----------
    source : fx.Node
        Node of the synapses in front of the neurons.
    dtype : torch.dtype
        Type that holds their membranes.
    map : IntegerMap or None
        Synapses that are carried out together with the rounding.
    levels : tuple of fx.Node
        Levels that go into the map, side by side.
    others : tuple of fx.Node
        What is added to it.
    gain : float or None
        Where `others` are levels, times this.
    bias : Tensor or None
        Times the window; for the map one number for each output channel.
    rounding : Tensor or None
        The same and half a unit of the grid, which lets no tie arise.
    """

    source: fx.Node
    dtype: torch.dtype
    map: IntegerMap | None = None
    levels: tuple[fx.Node, ...] = ()
    others: tuple[fx.Node, ...] = ()
    gain: float | None = None
    bias: Tensor | None = None
    rounding: Tensor | None = None


@dataclass
class Plan:
    """What each node of a network is carried out in.

    Attributes
    ----------
    maps : dict
        Node -> its synapses in int8.
    levels : dict
        Node -> nodes of the levels that go into them, side by side.
    modules : dict
        Node -> its module in floating point, of the type that is wide enough.
    dtypes : dict
        Node -> that type.
    firings : dict
        Node of a layer's neurons -> how its levels are found.
    steps : tuple of Step
        Walk that visits what the layers need.
    arithmetic : dict
        Layer -> "int8", or the type of what has no form in it.
    added_up, in_integers : int
        Products that are added up for an image, and how many of them in int8.
    unfit : str or None
        Why the network cannot be computed exactly so; None where it can.
    """

    maps: dict[fx.Node, IntegerMap] = field(default_factory=dict)
    levels: dict[fx.Node, tuple[fx.Node, ...]] = field(default_factory=dict)
    modules: dict[fx.Node, nn.Module] = field(default_factory=dict)
    dtypes: dict[fx.Node, torch.dtype] = field(default_factory=dict)
    firings: dict[fx.Node, Firing] = field(default_factory=dict)
    steps: tuple[Step, ...] = ()
    arithmetic: dict[str, str] = field(default_factory=dict)
    added_up: int = 0
    in_integers: int = 0
    unfit: str | None = None


class _Planner:
    """Goes through a network once and decides, node by node."""

    def __init__(self, topology: Topology) -> None:
        self.topology, self.graph, self.plan = topology, topology.graph, Plan()
        self.on_cpu = self.graph.device.type == "cpu" and operators_work()
        self.wide = EXACT_BITS.get(self.graph.dtype, 0)
        self.reach: dict[fx.Node, Reach] = {}
        self.forms = Forms(topology)
        self.levels = self.forms.levels

    def make(self) -> Plan:
        """Return the plan; with `unfit` set, and nothing else to be used, where there is none."""
        plan, topology = self.plan, self.topology
        plan.unfit = self._unfit()
        if plan.unfit is not None:
            return plan
        with torch.no_grad():
            for step, reach in Reaches(topology).each(None):
                self.reach[step.node] = reach
                if step.role == "at_neurons":
                    self._plan_neurons(step)
                elif step.role == "at_synapses" and step.node not in self.levels:
                    self._plan_synapses(step)
                elif step.role == "at_delay" and step.node not in self.levels:
                    # Of what arrives: on levels, which count back from the readout, a delay does nothing.
                    plan.dtypes[step.node] = plan.dtypes[step.sources[0]]
                if plan.unfit is not None:
                    return plan
        layers = [layer.node for layer in topology.layers]
        plan.steps = plan_walk(self.graph.module, layers, [topology.output.node], self._needs)
        visited = {step.node for step in plan.steps}
        plan.arithmetic = {layer.name: self._arithmetic(layer.node, visited) for layer in topology.layers}
        return plan

    def _unfit(self) -> str | None:
        topology = self.topology
        if not topology.hold:
            return "neurons that may fire early have no closed form: convert with hold=True"
        longest = max(window.length for window in topology.windows.values())
        if longest > MOST_LEVEL:
            return f"a window of {longest} steps is longer than {MOST_LEVEL}: convert with t_max up to {MOST_LEVEL + 1}"
        for step in topology.steps:
            if step.role == "at_synapses" and (step.module is None or step.arguments is None):
                return f"node {step.node.name!r}, edited by hand, calls no module on values alone"
            if step.role == "at_synapses" and step.module is not None and row_of(step.module) is None:
                return f"{step.node.target!r} ({type(step.module).__name__}) is no module of the table of operators"
        return None

    def _needs(self, node: fx.Node) -> list[fx.Node]:
        firing = self.plan.firings.get(node)
        if firing is not None and firing.map is not None:
            return [*firing.levels, *firing.others]
        return list(self.plan.levels.get(node, node.all_input_nodes))

    def _arithmetic(self, node: fx.Node, visited: set[fx.Node]) -> str:
        """Names of the arithmetic of all synapses in front of a layer."""
        found, pending = set(), [node]
        plan = self.plan
        while pending:
            at = pending.pop()
            if at is not node and at in self.levels:
                continue
            if at in plan.maps or (at is node and plan.firings[node].map is not None):
                found.add(INTEGERS)
            elif at is not node and at in visited:
                found.add(str(plan.dtypes[at]).removeprefix("torch."))
            pending += self._needs(at)
        return " and ".join(sorted(found, key=[INTEGERS, SINGLE, DOUBLE].index)) or SINGLE

    def _plan_synapses(self, step: Step) -> None:
        node, module, reach = step.node, step.module, self.reach[step.node]
        assert module is not None
        narrow = all(self.plan.dtypes.get(source, torch.float32) == torch.float32 for source in step.sources)
        dtype = self._type_for(float(reach.bits.max()), narrow, str(node.target))
        if dtype is None:
            return
        self.plan.dtypes[node] = dtype
        form = self.forms.of(node, module) if dtype == torch.float32 and self.on_cpu else None
        map_ = None if form is None else self._as_map(form[0], node)
        if form is not None and map_ is not None:
            self.plan.maps[node], self.plan.levels[node] = map_, form[1]
        self.plan.modules[node] = _in_type(module, dtype)
        if weights_of(module) is not None:
            weight: Any = module.weight
            products = self.topology.shapes[node.name].numel() * weight[0].numel()
            self.plan.added_up += products
            self.plan.in_integers += 0 if map_ is None else products

    def _type_for(self, bits: float, narrow: bool, name: str) -> torch.dtype | None:
        if bits >= self.wide:
            self.plan.unfit = (
                f"{name!r} may add up to numbers of {bits:.0f} bits, and {self.graph.dtype} holds {self.wide}: convert "
                "with weight_bits up to 8"
            )
            return None
        return torch.float32 if narrow and bits < EXACT_BITS[torch.float32] else torch.float64

    def _as_map(self, convolution: Convolution, node: fx.Node) -> IntegerMap | None:
        """The convolution in int8; None where its weights, or their sums, do not fit."""
        weight, places = convolution.weight.detach(), self.reach[node].places
        if places.numel() not in (1, len(weight)):
            return None
        # Levels are whole numbers: the places are those of the weights.
        grid = 2.0 ** -places.flatten().expand(len(weight))
        level = max(window.length for window in self.topology.windows.values())
        if not rows_fit(weight / grid.to(weight.dtype).view(-1, 1, 1, 1), level):
            return None
        units = self.topology.shapes[node.name]
        return IntegerMap(convolution, grid, as_image(units), units)

    def _plan_neurons(self, step: Step) -> None:
        node, neuron, (source,) = step.node, step.module, step.sources
        assert isinstance(neuron, TTFSNeuron)
        reach = self.reach[source]
        places = reach.places.clamp(min=1)
        up = down = torch.zeros(())
        if neuron.bias is not None:
            bias = neuron.bias.detach().double().cpu() * neuron.clock.input_window
            places = torch.maximum(places, places_in_use(bias))
            up, down = bias.clamp(min=0), (-bias).clamp(min=0)
        bits = torch.log2(reach.largest_membrane(up, down, neuron.clock.window)) + places
        narrow = self.plan.dtypes.get(source, torch.float32) == torch.float32
        dtype = self._type_for(float(bits.max()), narrow, str(node.target))
        if dtype is None:
            return
        self.plan.dtypes[node] = dtype
        # A map that rounds adds half a unit of the finest place.
        rounds = float(bits.max()) < EXACT_BITS[torch.float32] - 1
        self.plan.firings[node] = self._firing(neuron, source, places, dtype, rounds)

    def _firing(self, neuron: TTFSNeuron, source: fx.Node, places: Tensor, dtype: torch.dtype, rounds: bool) -> Firing:
        bias = None if neuron.bias is None else (neuron.bias.detach().double() * neuron.clock.input_window).to(dtype)
        carrier, others, gain = self._carrier(source) if rounds and dtype == torch.float32 else (None, (), None)
        if carrier is None or not _is_by_channel(bias, self.topology.shapes[source.name]):
            return Firing(source, dtype, bias=bias)
        map_ = self.plan.maps[carrier]
        channels = map_.shape[0]
        of_channels = None if bias is None else bias.flatten().expand(channels).contiguous()
        finest = places[0].flatten(1).amax(1) if places.dim() > 2 else places[0]
        finest = finest.expand(channels)
        half = 0.5 * 2.0**-finest
        rounding = (half if of_channels is None else of_channels.double() + half).float()
        levels = self.plan.levels[carrier]
        return Firing(source, dtype, map_, levels, others, gain, of_channels, rounding)

    def _carrier(self, source: fx.Node) -> tuple[fx.Node | None, tuple[fx.Node, ...], float | None]:
        """Synapses in int8 that round at once, what is added to them, and its weight where that is levels."""
        if not serves_one(source):
            return None, (), None
        if source in self.plan.maps:
            return source, (), None
        if not isinstance(self.plan.modules.get(source), Add):
            return None, (), None
        args = [in_front_of_delays(self.graph.module, arg) for arg in source.args if isinstance(arg, fx.Node)]
        alone = [arg for arg in args if arg in self.plan.maps and serves_one(arg) and args.count(arg) == 1]
        carrier = next(iter(alone), None)
        if carrier is None:
            return None, (), None
        others = tuple(arg for arg in args if arg is not carrier)
        if len(others) == 1 and not self.plan.maps[carrier].is_product:
            other, gain = self._as_levels(others[0])
            if gain is not None and tuple(as_image(self.topology.shapes[other.name])) == self.plan.maps[carrier].shape:
                return carrier, (other,), gain
        return carrier, others, None

    def _as_levels(self, node: fx.Node) -> tuple[fx.Node, float | None]:
        """Levels that a value is, and the positive number that they are times; None where it is no such thing."""
        if node in self.levels:
            return node, 1.0
        module = self.plan.modules.get(node)
        (source, *_) = node.all_input_nodes
        if isinstance(module, OneToOne) and source in self.levels and module.weight.numel() == 1:
            return source, float(module.weight) if bool(module.weight > 0) else None
        return node, None


def _is_by_channel(bias: Tensor | None, shape: Sequence[int]) -> bool:
    """Check that a bias of units of a shape is one number for each channel, or one for all."""
    if bias is None or bias.numel() == 1:
        return True
    return bias.dim() == len(shape) and bias.numel() == bias.shape[0] == shape[0]


def _in_type(module: Any, dtype: torch.dtype) -> nn.Module:
    """The same module with weights of a type, laid out as channels-last levels want them; it may share them."""
    if not is_weighted(module):
        return module  # type: ignore[no-any-return]
    weight = module.weight.detach().to(dtype)
    if weight.dim() == 4:
        weight = weight.contiguous(memory_format=torch.channels_last)
    return with_weight(module, weight)


PLAN = Derived(lambda topology: _Planner(topology).make(), from_weights=True)


@contextmanager
def without_integer_operators() -> Iterator[None]:
    """Compute in floating point within, as where torch has no operators for int8.

    Examples
    --------
    >>> import quartz_plugin
    >>> snn = quartz_plugin.convert(nn.Linear(4, 3), torch.rand(32, 4), weight_bits=8)
    >>> with without_integer_operators():
    ...     snn.run(torch.rand(2, 4), engine="integer").arithmetic
    {'output': 'float32'}
    """
    before, maps.USED = maps.USED, False
    PLAN.clear()
    try:
        yield
    finally:
        maps.USED = before
        PLAN.clear()


def why_not_integers(graph: ConvertedGraph, snapshot: Snapshot | None = None) -> str | None:
    """Why the integer engine cannot be exact for a network; None where it can."""
    return PLAN.of(graph, snapshot).unfit


def pays_in_integers(graph: ConvertedGraph, snapshot: Snapshot | None = None) -> bool:
    """Check whether the integer engine is exact, and adds up at least half of all in int8."""
    if graph.settings.get("weight_bits") is None or graph.device.type != "cpu":
        return False
    plan = PLAN.of(graph, snapshot)
    return plan.unfit is None and 2 * plan.in_integers >= plan.added_up > 0


__all__ = ["PLAN", "Firing", "Plan", "pays_in_integers", "why_not_integers", "without_integer_operators"]
