"""One rule for all that is kept about a network or its spikes: it is kept while every bit of them is the same.

Topologies, event plans, counts of a simulation and the check for NaN all go by it. Any edit is seen, whatever way it
takes (``optimizer.step()``, ``load_state_dict``, in place, through ``.data`` or a numpy view, a module or a setting
replaced), since the tensors are read, at the speed of memory, and not asked whether they were edited.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any, NamedTuple

from torch import Tensor, fx, nn

from quartz_plugin.coding import is_traced
from quartz_plugin.graph.converted import ConvertedGraph
from quartz_plugin.graph.digest import Structure, digests
from quartz_plugin.neuron import TTFSNeuron


class Fingerprint(NamedTuple):
    """Numbers of 64 bits that are equal, in every process, while nothing of a network is edited.

    Attributes
    ----------
    structure : int
        Of its graph, modules and their settings, and the shapes of its weights.
    weights : int
        Of the values of its parameters and buffers.
    """

    structure: int
    weights: int


class Identity(NamedTuple):
    """Identity of the network that a simulation is of.

    Attributes
    ----------
    number : int
        That of the network as an object, from its making on: edits keep it, copies have others.
    structure, weights : int
        Its fingerprint when it ran.
    """

    number: int
    structure: int
    weights: int

    def is_that_of(self, other: Identity) -> bool:
        """Check that both are of one network: of the same structure, and either the same object or the same weights.

        So a network may be trained between two simulations, and a copy that has not been edited is no other network.
        """
        alike = self.number == other.number or self.weights == other.weights
        return alike and self.structure == other.structure


class Snapshot(NamedTuple):
    """A network as it is at one moment.

    Attributes
    ----------
    structure : Structure
        All but the values of its weights.
    weights : int or None
        64 bits that depend on the values of its parameters and buffers; None where they are traced and have none.
    """

    structure: Structure
    weights: int | None

    @property
    def fingerprint(self) -> Fingerprint | None:
        """The numbers alone, which hold no network; None where weights have no values."""
        return None if self.weights is None else Fingerprint(self.structure.number, self.weights)


class _Parts(NamedTuple):
    """Parts that a network computes with: its modules, all their settings, and their tensors with their names."""

    modules: list[nn.Module]
    settings: list[Any]
    tensors: list[tuple[str, Tensor]]


def _parts_of(graph: ConvertedGraph) -> _Parts:
    settings: list[Any] = [graph.t_max, graph.input_shape]
    modules: list[nn.Module] = []
    tensors: list[tuple[str, Tensor]] = []
    stem = () if graph.dense_stem is None else graph.dense_stem.named_modules(prefix="front")
    for path, module in itertools.chain(graph.module.named_modules(), stem):
        modules.append(module)
        settings += (path, type(module))
        if isinstance(module, TTFSNeuron):
            # Of its tensors it computes with the bias alone; the others are there for snnTorch.
            settings.append(module.p._replace(bias=None, spike_grad=None))
            held: Iterable[tuple[str, Any]] = [("bias", module.bias)]
        else:
            own = [(name, value) for name, value in vars(module).items() if name not in _OF_ANY_MODULE]
            held = [*module._parameters.items(), *module._buffers.items(), *own]
        for name, value in held:
            if isinstance(value, Tensor):
                tensors.append((f"{path}.{name}", value))
            elif name[0] != "_":
                settings += (name, value if type(value) in _SCALARS else repr(value))
    return _Parts(modules, settings, tensors)


_SCALARS = {int, float, bool, str, type(None)}
_OF_ANY_MODULE = frozenset(vars(nn.Module()))
"""Its mode, hooks and the like, which change nothing of what it computes."""


def tensors_of(graph: ConvertedGraph) -> list[tuple[str, Tensor]]:
    """Names and tensors that a network computes with."""
    return _parts_of(graph).tensors


def _structure_of(graph: ConvertedGraph, parts: _Parts) -> Structure:
    nodes: list[fx.Node] = list(graph.module.graph.nodes)
    calls = [(n.op, n.name, *map(_argument, (n.target, *n.args)), str(n.kwargs)) for n in nodes]
    description = calls, parts.settings, [(name, tensor.shape) for name, tensor in parts.tensors]
    known = graph.known_structure
    if known is None or not known.is_still(description, nodes, parts.modules):
        graph.known_structure = known = Structure(description, nodes, parts.modules)
    return known


def _argument(value: Any) -> Any:
    """An argument of a node, or what it calls; a node counts by its name."""
    return value if isinstance(value, str) else value.name if isinstance(value, fx.Node) else repr(value)


def snapshot_of(graph: ConvertedGraph) -> Snapshot:
    """Return a network as it is now."""
    parts = _parts_of(graph)
    traced = any(is_traced(tensor) for _, tensor in parts.tensors)
    weights = None if traced else digests(tensor for _, tensor in parts.tensors)
    return Snapshot(_structure_of(graph, parts), weights)


def structure_of(graph: ConvertedGraph) -> Structure:
    """Return what a network is now, apart from the values of its weights, without reading them."""
    return _structure_of(graph, _parts_of(graph))


def identity_of(graph: ConvertedGraph, snapshot: Snapshot | None = None) -> Identity | None:
    """Return which network this is, and how it is now; None where its weights are traced and have no values.

    Parameters
    ----------
    graph : ConvertedGraph
        The network.
    snapshot : Snapshot, optional
        Where it has just been taken.
    """
    fingerprint = (snapshot or snapshot_of(graph)).fingerprint
    return None if fingerprint is None else Identity(graph.number, *fingerprint)
