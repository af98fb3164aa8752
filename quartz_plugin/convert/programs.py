"""Exported programs that are given in place of a network: modules again, which run on any number of images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx, nn
from torch.export import ExportedProgram
from torch.utils._pytree import tree_unflatten

from quartz_plugin.convert.exported import graph_of, spell

_CAPTURED = "captured by torch.export"
"""Key of a graph module's ``meta``: its graph is what tracing would find."""

_WITH_SIZES = frozenset({"view", "reshape", "expand", torch.reshape})
"""Functions that are called with sizes, that of the batch among them."""


def _sizes_noted(node: fx.Node) -> Sequence[Any]:
    """Sizes of a node's value where the program was exported."""
    return tuple(getattr(node.meta.get("val"), "shape", ()))


def as_network(ann: Any) -> Any:
    """Module of an exported program, or of what its ``module()`` gives; anything else as it is.

    A program that was exported for a batch of one size runs on any other too: sizes that are the batch's are left open.

    Examples
    --------
    >>> program = torch.export.export(nn.Linear(4, 2).eval(), (torch.rand(1, 4),))
    >>> as_network(program)(torch.rand(3, 4)).shape
    torch.Size([3, 2])
    """
    if isinstance(ann, ExportedProgram):
        root = nn.Module()
        graph = graph_of(ann, root)
    elif isinstance(ann, fx.GraphModule) and _is_of_aten(ann):
        root, graph = ann, _without_guards(ann.graph)
        spell(graph)
    else:
        return ann
    open_batch(graph)
    network = fx.GraphModule(root, graph)
    network.meta[_CAPTURED] = True
    return network


def captured_graph(root: nn.Module) -> fx.Graph | None:
    """Graph of a module that :func:`as_network` made, or of a copy of it; None for any other."""
    return root.graph if isinstance(root, fx.GraphModule) and _CAPTURED in root.meta else None


def _is_of_aten(module: fx.GraphModule) -> bool:
    return any(isinstance(node.target, torch._ops.OpOverload) for node in module.graph.nodes)


def _without_guards(program: fx.Graph) -> fx.Graph:
    """Copy the graph of a program's module, without checks of its inputs' sizes, returning what the user's did."""
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in sorted(program.nodes, key=lambda node: node.op != "placeholder"):
        if node.op == "output":
            (outputs,) = fx.node.map_arg(node.args, lambda source: copies[source])
            structure = getattr(getattr(program._codegen, "pytree_info", None), "out_spec", None)
            graph.output(outputs if structure is None else tree_unflatten(list(outputs), structure))
        elif node.op != "call_module" or node.users:
            copies[node] = graph.node_copy(node, lambda source: copies[source])
    return graph


def open_batch(graph: fx.Graph, sizes: Callable[[fx.Node], Sequence[Any]] = _sizes_noted) -> None:
    """Leave the size of the batch open in a graph that was captured for one.

    Parameters
    ----------
    graph : fx.Graph
        The graph, which is changed.
    sizes : callable
        Takes a node; returns the sizes of its value, none where it is no tensor. By default those that torch.export
        has noted.
    """
    (first, *_) = (node for node in graph.nodes if node.op == "placeholder")
    batch = tuple(sizes(first)[:1])
    if not batch or not isinstance(batch[0], int):
        return
    for node in graph.nodes:
        if node.target not in _WITH_SIZES or not isinstance(node.args[0], fx.Node):
            continue
        before, behind = tuple(sizes(node.args[0])), tuple(sizes(node))
        if before[:1] == behind[:1] == batch:
            shape = (-1, *behind[1:])
            node.args = (node.args[0], *shape) if node.target == "expand" else (node.args[0], shape)
            node.kwargs = {}


__all__ = ["as_network", "captured_graph", "open_batch"]
