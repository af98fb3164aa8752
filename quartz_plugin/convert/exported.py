"""The part of stage 1 that takes exported programs: torch.export sees what torch.fx cannot trace.

torch.export runs a forward with Python's own control flow and sees operations of ATen. Each becomes the function of
torch that it is made of, under the path of the module that called it, so that the rest of tracing finds what torch.fx
would have found.
"""

from __future__ import annotations

import io
import logging
import operator
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram
from torch.utils._pytree import tree_leaves, tree_unflatten

from quartz_plugin.convert.aten import spell_as_torch
from quartz_plugin.convert.calls import NAMED
from quartz_plugin.graph import unique_path
from quartz_plugin.operators.table import OPERATORS, ConversionError

_IN_PLACE = {"add_": "add", "sub_": "sub", "mul_": "mul", "div_": "truediv"}
"""Python's ``+=`` on a tensor, which torch.fx takes for ``+``."""

CALLED = "called"
"""Key of a node's ``meta``: path of the module whose value the node gives, which torch.fx does not look into."""


_WITH = frozenset({"wrap_with_autocast", "wrap_with_set_grad_enabled"})
"""What a ``with`` in a forward is to torch.export: a call of a graph of its own."""


def exported(root: nn.Module, inputs: tuple[Tensor, ...]) -> fx.Graph:
    """Capture a network with torch.export, the size of the batch left open.

    Parameters
    ----------
    root : nn.Module
        The network, in eval mode. A submodule of it will hold the tensors that the graph computes with.
    inputs : tuple of Tensor
        For each input a batch of two at least.

    Raises
    ------
    Exception
        Whatever torch.export raises where it cannot capture the network.
    """
    batch = tuple({0: Dim.DYNAMIC} for _ in inputs)
    with _quiet():
        try:
            program = torch.export.export(root, inputs, dynamic_shapes=batch, strict=False)
        except Exception:
            # Python's bytecode, read by torch, has an answer to more questions, as len(x).
            program = torch.export.export(root, inputs, dynamic_shapes=batch, strict=True)
    graph = graph_of(program, root)
    _check_for_one_image(root, graph, tuple(each[:1] for each in inputs))
    return graph


def _check_for_one_image(root: nn.Module, graph: fx.Graph, inputs: tuple[Tensor, ...]) -> None:
    """Refuse what one image and several are not the same for: two stand for any number of them.

    Raises
    ------
    ConversionError
        If the network computes something else for one image.
    ValueError
        If values decide what it computes.
    """
    if any(node.target == "item" for node in graph.nodes):
        raise ValueError("it computes in Python with the values of tensors")
    try:
        wanted, given = (
            tree_leaves(run(*(each.clone() for each in inputs)))
            for run in (root, fx.Interpreter(root, graph=graph).run)
        )
        for one, other in zip(wanted, given, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3, equal_nan=True)
    except Exception as error:
        raise ConversionError(
            f"{type(root).__name__}, captured by torch.export, computes something else for one image than for several: "
            "its forward is random in eval mode, or depends on the size of the batch; write it without"
        ) from error


def graph_of(program: ExportedProgram, root: nn.Module) -> fx.Graph:
    """Return the graph of a program with its tensors as attributes of `root`, which gets a submodule for them."""
    lifted = nn.Module()
    place = unique_path("lifted", {name for name, _ in root.named_modules()} | set(dir(root)))
    root.add_module(place, lifted)
    tensors = {**program.state_dict, **program.constants}
    kept = {spec.arg.name: spec.target for spec in program.graph_signature.input_specs if spec.target is not None}
    graph = fx.Graph()
    copies: dict[fx.Node, Any] = {}
    # Inputs stand before the tensors that torch.export has made further inputs.
    for node in sorted(program.graph.nodes, key=lambda node: node.op != "placeholder" or node.name in kept):
        if node.op == "placeholder" and node.name in kept:
            name = f"tensor_{len(lifted._buffers)}"
            lifted.register_buffer(name, tensors[kept[node.name]])
            copies[node] = graph.get_attr(f"{place}.{name}")
        elif node.op == "output":
            changed = len(node.args[0]) - len(program.graph_signature.user_outputs)
            outputs = [copies.get(each, each) for each in node.args[0][changed:]]
            assert program.call_spec.out_spec is not None
            graph.output(tree_unflatten(outputs, program.call_spec.out_spec))
        else:
            _copy(node, graph, copies, program.graph_module)
    spell(graph)
    return graph


def _copy(node: fx.Node, graph: fx.Graph, copies: dict[fx.Node, Any], owner: nn.Module) -> None:
    """Copy a node, and of a ``with torch.autocast(...)`` or ``torch.no_grad()`` what stands in it."""
    if getattr(node.target, "__name__", "") in _WITH:
        place = next(place for place, each in enumerate(node.args) if each in copies and copies[each] is None)  # type: ignore[index]
        inner = owner.get_submodule(node.args[place].target)  # type: ignore[union-attr, arg-type]
        given = iter(node.args[place + 1 :])
        for each in inner.graph.nodes:  # type: ignore[union-attr]
            if each.op == "placeholder":
                copies[each] = copies[next(given)]  # type: ignore[index]
            elif each.op == "output":
                copies[node] = [copies[result] for result in each.args[0]]
            else:
                _copy(each, graph, copies, inner)
    elif node.op == "get_attr" and isinstance(owner._modules.get(str(node.target)), nn.Module):
        copies[node] = None
    elif node.target is operator.getitem and isinstance(copies[node.args[0]], list):  # type: ignore[index]
        copies[node] = copies[node.args[0]][node.args[1]]  # type: ignore[index]
    else:
        copies[node] = graph.node_copy(node, lambda source: copies[source])


def spell(graph: fx.Graph) -> None:
    """Let a graph of ATen's operations be one of torch's functions, each under its module's path."""
    spell_as_torch(graph)
    _note_calls(graph)


def _note_calls(graph: fx.Graph) -> None:
    """Note with the last operation of a module that torch.fx does not look into that it gives the module's value."""
    last: fx.Node | None = None
    running: Any = None
    for node in [*graph.nodes, None]:
        if node is not None and node.op not in ("call_function", "call_method"):
            continue
        if node is not None and node.target in _IN_PLACE:
            node.meta[NAMED] = _IN_PLACE[node.target]
        key, path, kind = _caller(node) if node is not None else (None, "", "")
        if running is not None and key != running:
            assert last is not None
            last.meta[CALLED] = last.meta["nn_module_stack"][running][0]
        running, last = (key if path and kind in _leaves() else None), node


def _caller(node: fx.Node) -> tuple[Any, str, str]:
    """Key, path and class of the module whose forward calls an operation."""
    stack = node.meta.get("nn_module_stack") or {"": ("", "")}
    key = next(reversed(stack))
    path, kind = stack[key]
    return key, path, kind if isinstance(kind, str) else f"{kind.__module__}.{kind.__qualname__}"


def _leaves() -> set[str]:
    """Names of the classes that torch.fx does not look into."""
    torchs = (kind for kind in vars(nn).values() if isinstance(kind, type) and issubclass(kind, nn.Module))
    leaves = {*torchs, *OPERATORS} - {nn.Sequential, nn.Module}
    return {f"{kind.__module__}.{kind.__qualname__}" for kind in leaves}


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep torch.export from logging, printing and warning: what it could not capture, is reported by us."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


__all__ = ["CALLED", "exported", "graph_of", "spell"]
