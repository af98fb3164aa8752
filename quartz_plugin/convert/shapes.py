"""Shapes while torch.fx traces: a graph's values on the meta device, where tensors have no numbers."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, fx, nn

from quartz_plugin.operators.table import call


class Shapes:
    """Values of a graph's nodes on the meta device, where tensors have shapes alone.

    Parameters
    ----------
    root : nn.Module
        The network.
    inputs : tuple of Tensor
        A batch for each input.
    """

    def __init__(self, root: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self._root, self._inputs = root, [each.to("meta") for each in inputs]
        self._known: dict[fx.Node, Any] = {}

    def of(self, graph: fx.Graph, node: fx.Node) -> Any:
        """Return a node's value."""
        for each in not_known(graph, node, self._known):
            if each.op == "placeholder":
                self._known[each] = each.args[0] if each.args else self._input_at(graph, each)
            elif each.op == "get_attr":
                value = operator.attrgetter(str(each.target))(self._root)
                self._known[each] = value.to("meta") if isinstance(value, Tensor) else value
            else:
                self._known[each] = self._call(each)
        return self._known[node]

    def _input_at(self, graph: fx.Graph, node: fx.Node) -> Tensor:
        return self._inputs[place_of(graph, node)].clone()

    def _call(self, node: fx.Node) -> Any:
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda source: self._known[source])
        if node.op == "call_module":
            module = self._root.get_submodule(str(node.target))
            tensors = {
                name: tensor.to("meta") for name, tensor in (*module.named_parameters(), *module.named_buffers())
            }
            return torch.func.functional_call(module, tensors, args, kwargs)
        target: Any = node.target
        with torch.device("meta"):
            return call(target, *_on_meta(args), **_on_meta(kwargs))


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


__all__ = ["Shapes", "not_known", "place_of"]
