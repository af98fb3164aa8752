"""Stage 1, trace: the ANN as a graph in which every node calls a module of its own."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn

from quartz_plugin.convert.draft import Draft
from quartz_plugin.convert.operators import FUNCTIONS, OPERATORS, REASONS, ConversionError
from quartz_plugin.graph import INPUT, unique_name


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return type(m) in OPERATORS or super().is_leaf_module(m, module_qualified_name)


def trace(ann: nn.Module, example: Tensor) -> Draft:
    """Trace a copy of `ann` in eval mode; `ann` itself is left alone.

    Parameters
    ----------
    ann : nn.Module
        The trained network.
    example : Tensor
        One input, ``[1, ...]``.

    Raises
    ------
    ConversionError
        If torch.fx cannot trace the network, it does not run on the example, or it is not a chain of modules.
    ValueError
        If a weight or a batch-norm statistic is NaN or infinite.
    """
    if not isinstance(ann, nn.Module):
        raise TypeError(f"ann must be a torch.nn.Module, got {type(ann).__name__}")
    ann = getattr(ann, "_orig_mod", ann)  # what torch.compile wraps
    _check_finite(ann)
    try:
        root = copy.deepcopy(ann)
    except RuntimeError as error:
        raise ConversionError(
            f"{type(ann).__name__} cannot be copied: {_first_line(error)}. Make pruning or weight norm permanent "
            "(torch.nn.utils.prune.remove, remove_weight_norm)"
        ) from error
    # The draft computes in the example's type, which is float32 at least.
    root = root.eval().to(device=example.device, dtype=example.dtype)
    if not isinstance(root, nn.Sequential) and type(root).__module__.startswith("torch.nn"):
        root = nn.Sequential(root)
    hooked = _without_hooks(root, example)
    try:
        graph = _Tracer().trace(root)
        module = fx.GraphModule(root, graph)
    except Exception as error:
        raise ConversionError(
            f"torch.fx cannot trace {type(ann).__name__}: {_first_line(error)}. "
            "Its forward must not branch on the values of tensors"
        ) from error
    _functions_to_modules(module)
    _check_known(module)
    _check_chain(module)
    _one_module_a_node(module)
    draft = Draft(module, tuple(example.shape[1:]), example.dtype, example.device)
    for node, submodule in draft.steps():
        draft.log(str(node.target), operation=type(submodule).__name__)
    with _refusing(example):
        draft.record_shapes(example)
    if hooked is not None and not torch.allclose(hooked, draft.output(example), rtol=1e-3, atol=1e-5):
        raise ConversionError(
            "a forward hook changes what the network computes, and a spiking network cannot carry it; "
            "put it into the network's forward, or remove it (handle.remove())"
        )
    return draft


@contextmanager
def _refusing(example: Tensor) -> Iterator[None]:
    """Turn what torch says of an unfit input into our error."""
    try:
        yield
    except (RuntimeError, ValueError, IndexError, TypeError) as error:
        raise ConversionError(
            f"the network does not run on inputs of shape {list(example.shape)}: {_first_line(error)}"
        ) from error


def _check_finite(ann: nn.Module) -> None:
    for name, tensor in [*ann.named_parameters(), *ann.named_buffers()]:
        if isinstance(tensor, nn.parameter.UninitializedParameter | nn.parameter.UninitializedBuffer):
            raise ConversionError(f"{name} is not initialised; run the network once before converting it")
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"{name} contains NaN or infinity; the network cannot be converted")


def _without_hooks(root: nn.Module, example: Tensor) -> Tensor | None:
    """Take all hooks from `root`; what it gave with them, None if there were none."""
    hooks = [hooks for m in root.modules() for hooks in (m._forward_hooks, m._forward_pre_hooks) if hooks]
    if not hooks:
        return None
    with torch.no_grad(), _refusing(example):
        hooked: Tensor = root(example)
    for each in hooks:
        each.clear()
    return hooked


def _functions_to_modules(module: fx.GraphModule) -> None:
    """Replace functions and methods that the table knows by modules; refuse the rest by name."""
    taken = {name for name, _ in module.named_modules()}
    for node in list(module.graph.nodes):
        if node.op not in ("call_function", "call_method", "get_attr"):
            continue
        build = FUNCTIONS.get(node.target)
        if build is None or len(node.all_input_nodes) != 1:
            raise ConversionError(_refusal(node.name, _function_name(node.target), REASONS.get(node.target)))
        path = unique_name(node.name, taken)
        taken.add(path)
        module.add_submodule(path, build(*node.args, **node.kwargs))
        with module.graph.inserting_before(node):
            call = module.graph.call_module(path, (node.all_input_nodes[0],))
        node.replace_all_uses_with(call)
        module.graph.erase_node(node)


def _check_known(module: fx.GraphModule) -> None:
    """Refuse, by name, every module that is not in the table or that the table refuses."""
    for node in module.graph.nodes:
        if node.op == "call_module":
            submodule = module.get_submodule(str(node.target))
            row = OPERATORS.get(type(submodule))
            reason = REASONS.get(type(submodule)) if row is None else row.refusal(submodule)
            if row is None or reason is not None:
                raise ConversionError(_refusal(str(node.target), type(submodule).__name__, reason))


def _check_chain(module: fx.GraphModule) -> None:
    nodes = list(module.graph.nodes)
    inputs = [node for node in nodes if node.op == "placeholder"]
    if len(inputs) != 1 or len(nodes[-1].all_input_nodes) != 1 or not isinstance(nodes[-1].args[0], fx.Node):
        raise ConversionError("the network must have one input tensor and one output tensor")
    module.graph.eliminate_dead_code()
    for node in module.graph.nodes:
        if node.op == "call_module" and len(node.all_input_nodes) != 1:
            raise ConversionError(_refusal(str(node.target), "a call with several tensors", None))
        if node.op != "output" and len(node.users) > 1:
            raise ConversionError(
                f"the output of {node.target!r} goes to {len(node.users)} places; "
                "the networks converted so far are chains: one path from input to output"
            )


def _one_module_a_node(module: fx.GraphModule) -> None:
    """Give each call of a shared module (one ReLU used three times) its own copy under its own name."""
    taken = {name for name, _ in module.named_modules()} | {INPUT}
    seen: set[str] = set()
    for node in module.graph.nodes:
        if node.op != "call_module":
            continue
        path, count = str(node.target), 2
        if path in seen or path == INPUT:
            while f"{path}_{count}" in taken:
                count += 1
            node.target = f"{path}_{count}"
            taken.add(node.target)
            module.add_submodule(node.target, copy.deepcopy(module.get_submodule(path)))
        seen.add(path)


def _refusal(where: str, operation: str, reason: str | None) -> str:
    fallback = "it is not in the table of operators (quartz_plugin.convert.operators); replace it or leave it out"
    return f"cannot convert {where!r} ({operation}): {reason or fallback}"


def _function_name(target: Any) -> str:
    return target if isinstance(target, str) else getattr(target, "__name__", repr(target))


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
