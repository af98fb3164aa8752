"""The part of stage 1 that leaves to the host what stands behind a network's last linear map."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass, field, is_dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from quartz_plugin.host import (
    MATRIX_PRODUCTS,
    MODULES,
    OPERATIONS,
    PRODUCTS,
    BatchSize,
    Call,
    ForEachImage,
    HostProgram,
    Ref,
    starts,
)
from quartz_plugin.operators.table import Value


@dataclass(frozen=True, eq=False)
class HostValue:
    """A value that the host computes while a network is traced: its place in the program, and what it is here."""

    index: int
    tensor: Any


_HOMES = (torch, F, operator, torch.special, torch.linalg)

NAMES: Mapping[Any, str] = {
    getattr(home, spelled): name
    for home in _HOMES
    for name in OPERATIONS
    for spelled in (name, f"{name}_")
    if hasattr(home, spelled)
} | {torch.linalg.norm: "linalg_norm", getattr: "getattr"}
"""Functions -> the host's name of what they do; a function of the user's own may have the name of one of torch's."""


def host_call(root: nn.Module, node: fx.Node) -> tuple[str, dict[str, Any]] | None:
    """Operation of the host's that a node is, and its settings; None where it is none."""
    if node.op == "call_module":
        module = root.get_submodule(str(node.target))
        return MODULES[type(module)](module) if type(module) in MODULES else None
    if node.op not in ("call_function", "call_method"):
        return None
    name = NAMES.get(node.target) if node.op == "call_function" else str(node.target).removesuffix("_")
    if name is None or name not in OPERATIONS or (name == "getattr" and node.args[1] not in ("values", "indices")):
        return None
    return name, dict(node.kwargs)


def builds_output(node: fx.Node) -> bool:
    """Check whether a node only makes a dataclass or a named tuple, as torch.fx writes them, of what is returned."""
    kind = node.target
    return isinstance(kind, type) and (is_dataclass(kind) or hasattr(kind, "_fields"))


def _settings(name: str, node: fx.Node, settings: Mapping[str, Any]) -> dict[str, Any]:
    """What decides whether an operation is the host's, given by place or by name."""
    if name in ("clamp", "clip", "hardtanh") and len(node.args) > 1 and node.op != "call_module":
        return {"min": node.args[1]}
    return dict(settings)


def _joins(node: fx.Node, name: str, dynamic: set[fx.Node]) -> bool:
    """Check whether an operation multiplies or divides one value of the network by another."""
    return name in PRODUCTS and sum(each in dynamic for each in node.args if isinstance(each, fx.Node)) > 1


def _finds_places(node: fx.Node, name: str) -> bool:
    """Check whether the place of a largest or smallest value is asked for, which no spike encodes."""
    picks = (user.args[1] for user in node.users if user.target in (operator.getitem, getattr))
    return name in ("max", "min") and any(pick == 1 or pick == "indices" for pick in picks)


def _takes_over(node: fx.Node, name: str, settings: Mapping[str, Any], dynamic: set[fx.Node]) -> bool:
    # What nobody uses is no output either.
    begins = starts(name, _settings(name, node, settings))
    return bool(node.users) and (begins or _joins(node, name, dynamic) or _finds_places(node, name))


def hosted_nodes(root: nn.Module, graph: fx.Graph, dynamic: set[fx.Node]) -> set[fx.Node]:
    """Nodes that the host carries out: a first one, and all behind it, where it can carry out all of them."""
    hosted: set[fx.Node] = set()
    # From the end: what stands behind a node is known when the node is looked at.
    able = {node for node in graph.nodes if node.op == "output" or builds_output(node)}
    for node in reversed(graph.nodes):
        if node in dynamic and all(user in able for user in node.users):
            call = host_call(root, node)
            # A product with constants is a layer of its own: what is in front of it is not behind the last one.
            if call is not None and (call[0] not in MATRIX_PRODUCTS or _joins(node, call[0], dynamic)):
                able.add(node)
    for node in graph.nodes:
        if node not in able or node.op == "output" or builds_output(node):
            continue
        call = host_call(root, node)
        assert call is not None
        if not hosted.isdisjoint(node.all_input_nodes) or _takes_over(node, *call, dynamic):
            hosted.add(node)
    return hosted


@dataclass
class HostBuilder:
    """Collects the host's program while a network is traced.

    Attributes
    ----------
    batch : int
        Images of the example: a setting of this size that asks for the batch is the number of images.
    heads : list of Value
        Outputs of the network that it takes.
    """

    batch: int
    heads: list[Value] = field(default_factory=list)
    _calls: list[tuple[str, Any, Any]] = field(default_factory=list)

    def add(self, name: str, args: Any, kwargs: Any) -> HostValue:
        """Carry an operation out on the example, and note it."""
        for each in (*args, *kwargs.values()):
            self._take(each)
        found = OPERATIONS[name](*tensors_of(args), **tensors_of(kwargs))
        self._calls.append((name, args, kwargs))
        return HostValue(len(self._calls) - 1, found)

    def head(self, value: Value) -> int:
        """Place of an output of the network among the heads; it becomes one."""
        for place, known in enumerate(self.heads):
            if known.node is value.node:
                return place
        self.heads.append(value)
        return len(self.heads) - 1

    def program(self, results: list[Value | HostValue]) -> HostProgram | None:
        """The program that gives these results; None where they are the heads themselves, in order."""
        places = [self.head(each) if isinstance(each, Value) else -1 for each in results]
        count = len(self.heads)
        if not self._calls and places == list(range(count)):
            return None
        indices = [
            place if isinstance(each, Value) else count + each.index
            for place, each in zip(places, results, strict=True)
        ]
        calls = [
            Call(
                name,
                tuple(self._written(each, name, place) for place, each in enumerate(args)),
                {key: self._written(each, name) for key, each in kwargs.items()},
            )
            for name, args, kwargs in self._calls
        ]
        return HostProgram(count, tuple(calls), tuple(indices))

    def heads_behind(self, result: Value | HostValue) -> set[int]:
        """Heads that a result is computed from."""
        if isinstance(result, Value):
            return {self.head(result)}
        _, args, kwargs = self._calls[result.index]
        found: set[int] = set()
        for each in _values([*args, *kwargs.values()]):
            found |= self.heads_behind(each)
        return found

    def _take(self, each: Any) -> None:
        for value in _values([each]):
            if isinstance(value, Value):
                self.head(value)

    def _written(self, each: Any, name: str, place: int = -1) -> Any:
        if isinstance(each, Value):
            return Ref(self.head(each))
        if isinstance(each, HostValue):
            return Ref(len(self.heads) + each.index)
        if name in ("view", "reshape", "expand") and place == 1:
            sizes = list(each) if isinstance(each, tuple | list) else [each]
            if sizes and sizes[0] == self.batch:
                sizes[0] = BatchSize()
            return tuple(sizes) if isinstance(each, tuple | list) else sizes[0]
        if isinstance(each, tuple | list):
            # torch.fx has lists of its own.
            return (tuple if isinstance(each, tuple) else list)(self._written(part, name) for part in each)
        if not isinstance(each, Tensor):
            return each
        value = each.detach().cpu()
        alike = value.dim() > 1 and len(value) == self.batch and bool((value == value[:1]).all())
        return ForEachImage(value[:1].clone()) if alike else value


def _values(structure: Any) -> list[Value | HostValue]:
    if isinstance(structure, Value | HostValue):
        return [structure]
    if isinstance(structure, tuple | list):
        return [value for part in structure for value in _values(part)]
    return []


def tensors_of(structure: Any) -> Any:
    """The structure with the example's tensors in place of traced ones, to ask for their shapes."""
    if isinstance(structure, Value | HostValue):
        return structure.tensor
    if isinstance(structure, tuple | list):
        return type(structure)(tensors_of(part) for part in structure)
    if isinstance(structure, dict):
        return {key: tensors_of(part) for key, part in structure.items()}
    return structure


__all__ = ["HostBuilder", "HostValue", "builds_output", "host_call", "hosted_nodes", "tensors_of"]
