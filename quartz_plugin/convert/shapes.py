"""Shapes while torch.fx traces: a graph's values on the meta device, where tensors have no numbers."""

from __future__ import annotations

import operator
from collections.abc import Container, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from quartz_plugin.graph import call_node
from quartz_plugin.operators.table import SHAPE_ATTRIBUTES, SHAPE_QUERIES, call


class Shapes:
    """Values of a graph's nodes on the meta device, where tensors have shapes alone.

    Parameters
    ----------
    root : nn.Module
        The network.
    inputs : tuple of Tensor
        A batch for each input.
    with_numbers : bool
        Compute with numbers what does not depend on the image: slower, and needed where a tensor of sizes decides a
        shape.
    """

    def __init__(self, root: nn.Module, inputs: tuple[Tensor, ...], with_numbers: bool = False) -> None:
        self._root, self._inputs = root, [each.to("meta") for each in inputs]
        self._with_numbers, self._dependent = with_numbers, set[fx.Node]()
        self._known: dict[fx.Node, Any] = {}

    def of(self, graph: fx.Graph, node: fx.Node) -> Any:
        """Return a node's value."""
        for each in not_known(graph, node, self._known):
            if depends_on_values(each, self._dependent):
                self._dependent.add(each)
            if each.op == "placeholder":
                self._known[each] = each.args[0] if each.args else self._input_at(graph, each)
            elif each.op == "get_attr":
                value = operator.attrgetter(str(each.target))(self._root)
                self._known[each] = value if self._with_numbers else _to_meta(value)
            elif not self._with_numbers:
                self._known[each] = self._call(each, self._known)
            elif each not in self._dependent:
                self._known[each] = call_node(self._root, each, self._known)  # type: ignore[arg-type]
            else:
                self._known[each] = self._call_with_numbers(each)
        return self._known[node]

    def _input_at(self, graph: fx.Graph, node: fx.Node) -> Tensor:
        return self._inputs[place_of(graph, node)].clone()

    def _call_with_numbers(self, node: fx.Node) -> Any:
        known = {source: self._known[source] for source in node.all_input_nodes}
        whole = {source: each for source, each in known.items() if _is_whole(each)}
        on_meta = {source: _to_meta(each) for source, each in known.items()}
        try:
            return self._call(node, on_meta | whole)
        except Exception:  # Whole numbers are sizes, or are computed with.
            return self._call(node, on_meta)

    def _call(self, node: fx.Node, known: Mapping[fx.Node, Any]) -> Any:
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda source: known[source])
        if node.op == "call_module":
            module = self._root.get_submodule(str(node.target))
            tensors = {name: _to_meta(each) for name, each in (*module.named_parameters(), *module.named_buffers())}
            return torch.func.functional_call(module, tensors, args, kwargs)
        target: Any = node.target
        with torch.device("meta"):
            return call(target, *_on_meta(args), **_on_meta(kwargs))


def depends_on_values(node: fx.Node, dependent: Container[fx.Node]) -> bool:
    """Check whether a node's value depends on the image, and not on its shape alone, where these before it do."""
    if node.op == "placeholder":
        return not node.args
    asks_for_shape = node.target in SHAPE_QUERIES and (node.target is not getattr or node.args[1] in SHAPE_ATTRIBUTES)
    return not (asks_for_shape and node.op != "output") and any(each in dependent for each in node.all_input_nodes)


def value_dependent(graph: fx.Graph) -> set[fx.Node]:
    """Nodes whose values depend on the image, and not on its shape alone."""
    dependent: set[fx.Node] = set()
    for node in graph.nodes:
        if depends_on_values(node, dependent):
            dependent.add(node)
    return dependent


def _is_whole(value: Any) -> bool:
    return isinstance(value, Tensor) and not (value.is_meta or value.is_floating_point() or value.is_complex())


def _to_meta(value: Any) -> Any:
    return value.to("meta") if isinstance(value, Tensor) else value


def _on_meta(structure: Any) -> Any:
    """The structure of arguments with devices that are the meta device."""
    if isinstance(structure, torch.device):
        return torch.device("meta")
    if isinstance(structure, tuple | list) and not isinstance(structure, torch.Size):
        return type(structure)(map(_on_meta, structure))
    if isinstance(structure, dict):
        return {key: _on_meta(value) for key, value in structure.items()}
    return structure


def place_of(graph: fx.Graph, placeholder: fx.Node) -> int:
    """Place of a placeholder among the inputs."""
    return [node for node in graph.nodes if node.op == "placeholder"].index(placeholder)


def not_known(graph: fx.Graph, node: fx.Node, known: dict[fx.Node, Any]) -> list[fx.Node]:
    """The nodes that a node's value needs and that have none yet, in order."""
    wanted, pending = set(), [node]
    while pending:
        each = pending.pop()
        if each not in known and each not in wanted:
            wanted.add(each)
            pending.extend(each.all_input_nodes)
    return [each for each in graph.nodes if each in wanted] if wanted else []


__all__ = ["Shapes", "depends_on_values", "not_known", "place_of", "value_dependent"]
