"""One walk over a network's graph: a method for each role of a node, and values freed behind their last use.

:func:`plan_walk` finds the steps, once; a :class:`Walk` goes them as often as wanted. Engines, counts, exporters and
all other readers of a graph override the methods of the roles that they care about. Nothing here recurs, for
networks may be deep.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn

from quartz_plugin.neuron import AxonalDelay, FirstSpikeMaxPool, TTFSNeuron
from quartz_plugin.operators.table import makes_anew

ROLES = {TTFSNeuron: "at_neurons", FirstSpikeMaxPool: "at_pool", AxonalDelay: "at_delay"}
"""Class of a module -> the walk's method for nodes that call it; all others are synapses or routing."""


class Step(NamedTuple):
    """One node of a walk.

    Attributes
    ----------
    node : fx.Node
        The node.
    role : str
        Name of the walk's method for it.
    module : nn.Module or None
        Module that it calls; None where it calls none.
    sources : tuple of fx.Node
        Nodes that it takes values of, each once.
    arguments : tuple of fx.Node or None
        All arguments of its module, in order; None where there are others than nodes, or no module.
    expiring : tuple of fx.Node
        Nodes whose values are used here for the last time.
    spare : tuple of fx.Node
        Of these, those in tensors of their own, which nobody else looks at: a visit may overwrite them.
    """

    node: fx.Node
    role: str
    module: nn.Module | None
    sources: tuple[fx.Node, ...]
    arguments: tuple[fx.Node, ...] | None
    expiring: tuple[fx.Node, ...]
    spare: tuple[fx.Node, ...] = ()


def inputs_of(node: fx.Node) -> list[fx.Node]:
    """Nodes that a node takes values of, each once."""
    return node.all_input_nodes


def plan_walk(
    module: fx.GraphModule,
    wanted: Collection[fx.Node] | None = None,
    keep: Collection[fx.Node] = (),
    needs: Callable[[fx.Node], Iterable[fx.Node]] = inputs_of,
    among: Sequence[fx.Node] | None = None,
) -> tuple[Step, ...]:
    """Find the steps of a walk.

    Parameters
    ----------
    module : fx.GraphModule
        The network.
    wanted : collection of fx.Node, optional
        Nodes to visit, with all that they need; every node by default.
    keep : collection of fx.Node
        Nodes whose values stay when the walk is over.
    needs : callable
        For a node, those whose values its visit looks at.
    among : sequence of fx.Node, optional
        Nodes that may be visited, in order; values of others are there before the walk begins. All by default.

    Returns
    -------
    tuple of Step
        In the order of the graph. Of the network as it is now: they hold its modules.
    """
    last_use: dict[fx.Node, fx.Node | None] = dict.fromkeys(keep)
    visited: list[fx.Node] = []
    wanted_nodes = None if wanted is None else set(wanted)
    for node in reversed(module.graph.nodes if among is None else among):
        if wanted_nodes is None or node in wanted_nodes:
            visited.append(node)
            last_use.setdefault(node, node)
            for source in needs(node):
                last_use.setdefault(source, node)
                if wanted_nodes is not None:
                    wanted_nodes.add(source)
    expiring: dict[fx.Node, list[fx.Node]] = {}
    for source, user in last_use.items():
        # The value of the last node is what a walk returns.
        if user is not None and source is not visited[0]:
            expiring.setdefault(user, []).append(source)
    return tuple(_step(module, node, tuple(expiring.get(node, ()))) for node in reversed(visited))


def _step(module: fx.GraphModule, node: fx.Node, expiring: tuple[fx.Node, ...]) -> Step:
    called, arguments = called_by(module, node), None
    if called is not None and not node.kwargs and all(isinstance(argument, fx.Node) for argument in node.args):
        arguments = node.args
    if node.op in ("placeholder", "output"):
        role = "at_input" if node.op == "placeholder" else "at_output"
    else:
        role = next((role for kind, role in ROLES.items() if isinstance(called, kind)), "at_synapses")
    spare = tuple(
        source
        for source in expiring
        if len(source.users) == 1 and makes_anew(called_by(module, source), len(source.args))
    )
    return Step(node, role, called, tuple(node.all_input_nodes), arguments, expiring, spare)  # type: ignore[arg-type]


class Walk:
    """Visits the nodes of a graph in order; as it stands, it evaluates them as the network itself does.

    Parameters
    ----------
    steps : iterable of Step
        As :func:`plan_walk` finds them.

    Attributes
    ----------
    values : dict
        Node -> its value, of those that are needed at this moment.

    Examples
    --------
    >>> import torch
    >>> net = fx.symbolic_trace(nn.Sequential(nn.Linear(2, 3), nn.ReLU()))
    >>> x = torch.rand(1, 2)
    >>> torch.equal(Walk(plan_walk(net)).run(x), net(x))
    True
    """

    def __init__(self, steps: Iterable[Step]) -> None:
        self.steps = steps
        self.values: dict[fx.Node, Any] = {}
        self.input: Any = None

    def run(self, input_: Any) -> Any:
        """Visit all nodes; returns the value of the last one, that of the output where the walk ends there."""
        self.values, self.input = {}, input_
        return self._visit_all()

    def run_from(self, values: Mapping[fx.Node, Any]) -> dict[fx.Node, Any]:
        """Visit all nodes behind those with these values; returns the values that were to be kept."""
        self.values = dict(values)
        self._visit_all()
        return self.values

    def each(self, input_: Any) -> Iterator[tuple[Step, Any]]:
        """Visit one node after the other, and yield each with its value."""
        self.values, self.input = {}, input_
        for step in self.steps:
            self.values[step.node] = getattr(self, step.role)(step)
            yield step, self.values[step.node]
            for source in step.expiring:
                del self.values[source]

    def _visit_all(self) -> Any:
        values, step = self.values, None
        for step in self.steps:
            values[step.node] = getattr(self, step.role)(step)
            for source in step.expiring:
                del values[source]
        return None if step is None else values[step.node]

    def source(self, step: Step) -> Any:
        """Value of a node's only input."""
        return self.values[step.sources[0]]

    def at_input(self, step: Step) -> Any:
        """Take the input's value."""
        return self.input

    def at_synapses(self, step: Step) -> Any:
        """Evaluate a synapse or routing node, or a function in a graph that was edited by hand."""
        if step.arguments is not None and step.module is not None:
            return step.module(*[self.values[argument] for argument in step.arguments])
        return _evaluate(step.node, step.module, self.values)

    def at_delay(self, step: Step) -> Any:
        """Evaluate an axonal delay."""
        return self.at_synapses(step)

    def at_neurons(self, step: Step) -> Any:
        """Evaluate a layer of neurons."""
        return self.at_synapses(step)

    def at_pool(self, step: Step) -> Any:
        """Evaluate a first-spike pool."""
        return self.at_synapses(step)

    def at_output(self, step: Step) -> Any:
        """Return what the network returns."""
        return self.source(step)


def add_up(values: Sequence[Tensor], may_overwrite: Sequence[bool]) -> Tensor:
    """Sum of values, bit for bit as :class:`Add` gives it, in the memory of the first or second where that is allowed.

    Examples
    --------
    >>> import torch
    >>> first, second = torch.ones(2), torch.ones(2)
    >>> add_up([first, second], [False, True]) is second
    True
    """
    if len(values) == 1:
        return values[0]
    apart = torch.is_grad_enabled() and any(value.requires_grad for value in values)
    alike = all(value.shape == values[0].shape and value.dtype == values[0].dtype for value in values)
    once = [sum(value is other for other in values) == 1 for value in values[:2]]
    place = next((place for place in (0, 1) if may_overwrite[place] and once[place] and alike and not apart), None)
    total = values[0] + values[1] if place is None else values[place].add_(values[1 - place])
    for value in values[2:]:
        total = total + value if apart or not alike else total.add_(value)
    return total


class LevelWalk(Walk):
    """Walks with levels, which count back from the readout: a delay changes nothing, a pool takes the largest."""

    def at_delay(self, step: Step) -> Any:
        """Hand the levels on."""
        return self.source(step)

    def at_pool(self, step: Step) -> Any:
        """Take the level of the first spike in each window."""
        assert isinstance(step.module, FirstSpikeMaxPool)
        return step.module.pool(self.source(step))


def called_by(module: fx.GraphModule, node: fx.Node) -> nn.Module | None:
    """Module that this node calls; None where it calls none, as input and output."""
    return module.get_submodule(str(node.target)) if node.op == "call_module" else None


def module_nodes(module: fx.GraphModule) -> Iterator[tuple[fx.Node, nn.Module]]:
    """Yield the nodes that call modules, with the modules, in order."""
    for node in module.graph.nodes:
        if node.op == "call_module":
            yield node, module.get_submodule(str(node.target))


def is_spike_source(module: fx.GraphModule, node: fx.Node) -> bool:
    """Check that this node emits spikes: the input, neurons, or first-spike pools."""
    if node.op == "placeholder":
        return True
    return isinstance(called_by(module, node), TTFSNeuron | FirstSpikeMaxPool)


def call_node(module: fx.GraphModule, node: fx.Node, values: Mapping[fx.Node, Any]) -> Any:
    """Evaluate one node on the values of its inputs."""
    return _evaluate(node, called_by(module, node), values)


def _evaluate(node: fx.Node, module: nn.Module | None, values: Mapping[fx.Node, Any]) -> Any:
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda source: values[source])
    if module is not None:
        return module(*args, **kwargs)
    if node.op == "call_method":
        return getattr(args[0], str(node.target))(*args[1:], **kwargs)
    if node.op == "call_function":
        return node.target(*args, **kwargs)  # type: ignore[operator]
    raise ValueError(f"cannot evaluate a node of kind {node.op!r}")
