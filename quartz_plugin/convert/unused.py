"""Operations that a forward carries out and whose results nobody uses: they are neither converted nor refused."""

from __future__ import annotations

import operator
from collections.abc import Container

import torch
from torch import fx, nn

from quartz_plugin.convert.calls import changes_in_place, is_of_the_user
from quartz_plugin.operators.table import FUNCTIONS

_CHANGES = frozenset(
    {operator.setitem, operator.delitem}
    | {getattr(operator, name) for name in dir(operator) if name[0] == "i" and f"__{name}__" in dir(operator)}
) - {operator.index, operator.inv, operator.invert}
"""Functions of Python that change what they are given."""


def erase_unused(root: nn.Module, graph: fx.Graph, dynamic: Container[fx.Node]) -> None:
    """Erase what is computed in vain, in place; what changes a tensor that it was given stays.

    Assertions on the values of tensors go, with what is computed for them alone: spikes have nothing to assert.

    Parameters
    ----------
    root : nn.Module
        The network.
    graph : fx.Graph
        Its graph, which is changed.
    dynamic : collection of fx.Node
        Nodes whose values depend on the image.
    """
    for node in reversed(list(graph.nodes)):
        if node.users or node.op in ("placeholder", "output"):
            continue
        asserts = node.target is torch._assert
        if (asserts and node in dynamic) or not (asserts or changes_a_tensor(root, node)):
            graph.erase_node(node)


def changes_a_tensor(root: nn.Module, node: fx.Node) -> bool:
    """Check whether a call may change a tensor that it was given."""
    if node.op == "call_module":
        return bool(getattr(root.get_submodule(str(node.target)), "inplace", False))
    if node.op not in ("call_function", "call_method"):
        return False
    function = FUNCTIONS.get(node.target)
    if function is not None:
        return function.changes_first_argument(node.args, node.kwargs)
    given = node.kwargs.get("out") is not None or node.target in _CHANGES
    return given or changes_in_place(node) or is_of_the_user(node.target)


__all__ = ["changes_a_tensor", "erase_unused"]
