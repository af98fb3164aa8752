"""Stage 1, trace: the ANN as a graph in which every node calls a module of its own."""

from __future__ import annotations

import copy
import inspect
import operator
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from quartz_plugin.coding import plain
from quartz_plugin.convert.draft import Draft
from quartz_plugin.convert.operators import (
    BATCH,
    FUNCTIONS,
    OPERATORS,
    REASONS,
    RULES,
    SHAPE_ATTRIBUTES,
    SHAPE_QUERIES,
    Append,
    ConversionError,
    Refusal,
    Value,
    call,
)
from quartz_plugin.graph import INPUT, unique_path
from quartz_plugin.structure import Add, Concatenate

EXAMPLES = 3
"""Size of the batch that a network is traced with: what mixes the batch with the units then shows."""


class _Tracer(fx.Tracer):
    """Traces down to the modules of the table; remembers where it was when tracing failed."""

    def __init__(self) -> None:
        super().__init__(param_shapes_constant=True)
        self.failed_in: str | None = None

    def create_arg(self, a: Any) -> Any:
        """Take numbers of numpy, and whole ones of torch, for settings; other tensors are weights."""
        whole = isinstance(a, Tensor) and not (a.is_floating_point() or a.is_complex())
        return super().create_arg(plain(a) if whole or isinstance(a, np.generic) else a)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return type(m) in OPERATORS or super().is_leaf_module(m, module_qualified_name)

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        try:
            return super().call_module(m, forward, args, kwargs)
        except Exception:
            self.failed_in = self.failed_in or self.path_of_module(m)
            raise


def trace(ann: nn.Module, example: Tensor) -> Draft:
    """Trace a copy of `ann` in eval mode; `ann` itself is left alone.

    Functions and methods become modules of the table; a module or function that is not in it is refused before
    anything is computed.

    Parameters
    ----------
    ann : nn.Module
        The trained network.
    example : Tensor
        One input, ``[1, ...]``.

    Raises
    ------
    ConversionError
        If torch.fx cannot trace the network, an operation cannot be converted, the network does not run on the
        example, or the traced network computes something else than the network itself.
    ValueError
        If a weight or a batch-norm statistic is NaN or infinite.
    """
    if not isinstance(ann, nn.Module):
        raise TypeError(f"ann must be a torch.nn.Module, got {type(ann).__name__}")
    ann = _unwrapped(ann)
    _check_initialised(ann)
    root = _with_rules(_copy(ann).eval())
    if not isinstance(root, nn.Sequential) and (
        type(root).__module__.startswith("torch.nn") or type(root) in OPERATORS
    ):
        root = nn.Sequential(root)
    graph = _symbolic(root, type(ann).__name__)
    dynamic = _dynamic(graph)
    paths = _paths(root, graph, dynamic)
    _check_known(root, graph, paths, dynamic)
    _check_finite(ann)
    # The draft computes in the example's type, which is float32 at least.
    root = root.to(device=example.device, dtype=example.dtype)
    reference = root
    if any(type(module) in RULES for module in ann.modules()):
        reference = _copy(ann).eval().to(device=example.device, dtype=example.dtype)
    hooked = any(module._forward_hooks or module._forward_pre_hooks for module in ann.modules())
    # Different images show what mixes them; a batch of another size, what has taken the size for a number.
    others = torch.rand(
        EXAMPLES - 1, *example.shape[1:], generator=torch.Generator().manual_seed(0), dtype=torch.float64
    )
    examples = torch.cat([example[:1], others.to(example)])
    with torch.no_grad():
        wanted = _run(reference, examples[1:].clone())
        del reference
        draft = _build(root, graph, paths, dynamic, examples)
        traced = draft.output(examples[1:].clone())
    tolerance = 1e-3 * float(wanted.abs().nan_to_num(0.0, posinf=0.0).max()) if wanted.numel() else 0.0
    if wanted.shape != traced.shape or not torch.allclose(wanted, traced, rtol=0, atol=tolerance, equal_nan=True):
        raise ConversionError(_DIFFERENT_WITH_HOOKS if hooked else _DIFFERENT)
    return draft


def _unwrapped(ann: nn.Module) -> nn.Module:
    """Return what torch.compile and data parallelism wrap."""
    ann = getattr(ann, "_orig_mod", ann)
    if isinstance(ann, nn.DataParallel | nn.parallel.DistributedDataParallel):
        ann = ann.module
    if isinstance(ann, torch.jit.ScriptModule):
        raise ConversionError("a scripted network cannot be traced by torch.fx; give the nn.Module it was made from")
    return ann


_DIFFERENT_WITH_HOOKS = (
    "a forward hook changes what the network computes, and a spiking network cannot carry it; "
    "put it into the network's forward, or remove it (handle.remove())"
)
_DIFFERENT = (
    "the traced network computes something else than the network itself: its forward is random in eval mode, computes "
    "with the size of the batch, "
    "changes a tensor in place (as `x += y` does) that it uses again under another name, or a registered rule is "
    "not the module it stands for"
)


def _check_initialised(ann: nn.Module) -> None:
    for name, tensor in [*ann.named_parameters(), *ann.named_buffers()]:
        if isinstance(tensor, nn.parameter.UninitializedParameter | nn.parameter.UninitializedBuffer):
            raise ConversionError(f"{name} is not initialised; run the network once before converting it")


def _check_finite(ann: nn.Module) -> None:
    for name, tensor in [*ann.named_parameters(), *ann.named_buffers()]:
        if tensor.is_meta:
            raise ConversionError(f"{name} is on the meta device, which holds no numbers; load the weights first")
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"{name} contains NaN or infinity; the network cannot be converted")


def _copy(ann: nn.Module) -> nn.Module:
    try:
        return copy.deepcopy(ann)
    except RuntimeError as error:
        raise ConversionError(
            f"{type(ann).__name__} cannot be copied: {_first_line(error)}. Make pruning or weight norm permanent "
            "(torch.nn.utils.prune.remove, remove_weight_norm)"
        ) from error


def _with_rules(root: nn.Module) -> nn.Module:
    """Put what the users' rules make in the place of their modules."""
    done: dict[int, nn.Module] = {}
    for path, module in list(root.named_modules(remove_duplicate=False)):
        rule = RULES.get(type(module))
        if rule is None:
            continue
        if id(module) not in done:
            try:
                done[id(module)] = replacement = rule(module)
            except Exception as error:
                raise ConversionError(
                    f"the rule registered for {type(module).__name__} failed at {path!r}: {_first_line(error)}"
                ) from error
            if not isinstance(replacement, nn.Module):
                raise TypeError(
                    f"the rule registered for {type(module).__name__} must return a torch.nn.Module, "
                    f"got {type(replacement).__name__} for {path!r}"
                )
        if not path:
            return done[id(module)].eval()
        root.set_submodule(path, done[id(module)].eval())
    return root


def _symbolic(root: nn.Module, name: str) -> fx.Graph:
    """Trace `root` with torch.fx; arguments but the first take their defaults."""
    tracer = _Tracer()
    try:
        graph = tracer.trace(root)
    except Exception as error:
        # An operation we refuse is the better reason than what tracing stumbled over behind it.
        for path, module in root.named_modules():
            if tracer.is_leaf_module(module, path) and (reason := _reason_against(module)):
                raise ConversionError(reason(path)) from error
        where = f" in module {tracer.failed_in!r}" if tracer.failed_in else ""
        raise ConversionError(
            f"torch.fx cannot trace {name}{where}: {_first_line(error)}. "
            "Its forward must not branch on the values of tensors"
        ) from error
    return graph


def _paths(root: nn.Module, graph: fx.Graph, dynamic: set[fx.Node]) -> dict[fx.Node, str]:
    """Path for every node: a module's own, or the owner's and the function's name; unique."""
    taken = {name for name, _ in root.named_modules()} | {INPUT}
    called: set[str] = {INPUT}
    paths: dict[fx.Node, str] = {}
    for node in graph.nodes:
        if node.op == "call_module":
            path = str(node.target)
            path = unique_path(path, taken) if path in called else path
            called.add(path)
        elif node.op in ("call_function", "call_method"):
            owner = next((module for module, _ in reversed(node.meta.get("nn_module_stack", {}).values())), "")
            name = _function_name(node.target)
            path = unique_path(f"{owner}.{name}" if owner else name, taken)
        else:
            continue
        paths[node] = path
        if node in dynamic:
            taken.add(path)
    return paths


def _dynamic(graph: fx.Graph) -> set[fx.Node]:
    """Nodes whose values depend on the image, and not on its shape alone."""
    dynamic: set[fx.Node] = set()
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    for node in graph.nodes:
        asks_for_shape = node.target in SHAPE_QUERIES and (
            node.target is not getattr or node.args[1] in SHAPE_ATTRIBUTES
        )
        depends = node is inputs[0] or not dynamic.isdisjoint(node.all_input_nodes)
        if depends and not (asks_for_shape and node.op != "output"):
            dynamic.add(node)
    return dynamic


def _check_known(root: nn.Module, graph: fx.Graph, paths: dict[fx.Node, str], dynamic: set[fx.Node]) -> None:
    """Refuse, by name, what is not in the table or what the table refuses."""
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    for extra in inputs[1:]:
        if not extra.args and extra.users:
            raise ConversionError(
                f"the network must have one input tensor and one output tensor; forward also takes {extra.target!r}"
            )
    for node in graph.nodes:
        if node not in dynamic or node.op in ("placeholder", "output"):
            continue
        if node.op == "call_module":
            reason = _reason_against(root.get_submodule(str(node.target)))
            if reason:
                raise ConversionError(reason(paths[node]))
        elif node.target not in FUNCTIONS:
            raise ConversionError(_refusal(paths[node], _function_name(node.target), REASONS.get(node.target)))
    output = next(node for node in graph.nodes if node.op == "output")
    if not isinstance(output.args[0], fx.Node) or output.args[0] not in dynamic:
        raise ConversionError(
            f"the network must have one input tensor and one output tensor; forward returns {_described(output)}"
        )


def _described(output: fx.Node) -> str:
    returned = output.args[0]
    if isinstance(returned, tuple | list | dict):
        kind = next(kind for kind in (tuple, list, dict) if isinstance(returned, kind))
        return f"a {kind.__name__} of {len(returned)}; wrap it in a module that returns one of them"
    return "a value that does not depend on the input"


def _reason_against(module: nn.Module) -> Callable[[str], str] | None:
    """Say why a leaf module is refused, as a function of its path; None if it is not."""
    row = OPERATORS.get(type(module))
    reason = REASONS.get(type(module)) if row is None else row.refusal(module)
    if row is not None and reason is None:
        return None
    if torch.nn.utils.parametrize.is_parametrized(module):
        reason = "its weights are computed anew in each call; use torch.nn.utils.parametrize.remove_parametrizations"
    return lambda path: _refusal(path, type(module).__name__, reason)


def _run(network: nn.Module, examples: Tensor) -> Tensor:
    """Run the network itself; what torch says of an unfit input becomes our error."""
    try:
        out = network(examples)
    except (RuntimeError, ValueError, IndexError, TypeError, AssertionError) as error:
        shape = [1, *examples.shape[1:]]
        raise ConversionError(
            f"the network does not run on inputs of shape {shape} (the first of those given, [N, ...]): "
            f"{_first_line(error)}"
        ) from error
    if not isinstance(out, Tensor):
        raise ConversionError(f"the network must return one tensor, it gave {type(out).__name__}")
    return out


def _build(
    root: nn.Module, traced: fx.Graph, paths: dict[fx.Node, str], dynamic: set[fx.Node], examples: Tensor
) -> Draft:
    """Build the draft, one module a node, computing the example on the way: it tells shapes and constants."""
    graph = fx.Graph()
    modules: dict[str, nn.Module] = {}
    report: dict[str, dict[str, Any]] = {}
    known: dict[fx.Node, Any] = {}
    in_place = {node for node in traced.nodes if _in_place(root, node)}
    used: set[str] = set()

    def appender(path: str, operation: str) -> Append:
        def append(module: nn.Module, *inputs: Value) -> Value:
            own = unique_path(path, modules)
            module = _with_plain_settings(module.eval().to(device=examples.device, dtype=examples.dtype))
            out = module(*(value.tensor for value in inputs))
            if out.dim() == 0 or len(out) != EXAMPLES:
                raise Refusal(BATCH)
            modules[own] = module
            report[own] = {"module": own, "operation": operation}
            node = graph.call_module(own, tuple(value.node for value in inputs))
            node.meta["shape"] = tuple(out.shape[1:])
            return Value(node, out)

        return append

    result: Any = None
    for node in traced.nodes:
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda source: known[source])
        if node.op == "placeholder":
            default = node.args[0] if node.args else None
            known[node] = default if known else Value(graph.placeholder(INPUT), examples)
        elif node.op == "output":
            result = args[0]
        elif node.op == "get_attr":
            known[node] = _attribute(root, str(node.target))
        else:
            operation = _operation(root, node)
            append = appender(paths[node], operation)
            try:
                if node.op == "call_module" and node in dynamic:
                    known[node] = append(_own_copy(root, str(node.target), used), *_inputs(operation, args, kwargs))
                elif node.op == "call_module":
                    known[node] = root.get_submodule(str(node.target))(*_tensors(args), **_tensors(kwargs))
                else:
                    known[node] = _evaluate(node.target, args, kwargs, node in dynamic, append)
            except Refusal as refusal:
                raise ConversionError(_refusal(paths[node], operation, str(refusal))) from refusal
            except (RuntimeError, ValueError, IndexError, TypeError) as error:
                why = f"it does not run here: {_first_line(error)}"
                raise ConversionError(_refusal(paths[node], operation, why)) from error
        if node in in_place:
            # Whoever uses the changed tensor from here on sees the change.
            changed = next(iter([*args, *kwargs.values()]))
            known.update({earlier: known[node] for earlier, value in known.items() if value is changed})
    if not isinstance(result, Value):
        raise ConversionError("the network must have one input tensor and one output tensor")
    graph.output(result.node)
    module = fx.GraphModule(modules, graph)
    module.graph.eliminate_dead_code()
    module.delete_all_unused_submodules()
    draft = Draft(module, tuple(examples.shape[1:]), examples.dtype, examples.device)
    draft.report = {str(node.target): report[str(node.target)] for node, _ in draft.steps()}
    draft.traced = frozenset(draft.report)
    return draft


def _inputs(operation: str, args: Any, kwargs: Any) -> list[Value]:
    """The one tensor that a module of the table takes, or those that it joins."""
    given = [*args, *kwargs.values()]
    joins = operation in (Add.__name__, Concatenate.__name__)
    if (len(given) != 1 and not joins) or not all(isinstance(each, Value) for each in given):
        raise Refusal(f"it is called with {len(given)} arguments, and only its input can be carried")
    return given


def _own_copy(root: nn.Module, path: str, used: set[str]) -> nn.Module:
    """The module at a path, a copy of its own for each call after the first; without hooks, and never in place."""
    module = root.get_submodule(path)
    if path in used:
        module = copy.deepcopy(module)
    used.add(path)
    module._forward_hooks.clear()
    module._forward_pre_hooks.clear()
    if getattr(module, "inplace", False):
        module.inplace = False  # type: ignore[assignment]
    return module


def _with_plain_settings(module: nn.Module) -> nn.Module:
    """Let a module of our own have Python's numbers as settings, not numpy's or torch's."""
    for name, value in vars(module).items():
        if not isinstance(value, dict):
            vars(module)[name] = plain(value)
    return module


def _evaluate(target: Any, args: Any, kwargs: Any, dynamic: bool, append: Append) -> Any:
    if target is operator.getitem and not isinstance(args[0], Value):
        return args[0][args[1]]  # a piece of a split tensor, or a size
    if dynamic:
        named = {"dim" if name == "axis" else name: value for name, value in kwargs.items()}
        try:
            inspect.signature(FUNCTIONS[target].build).bind(append, *args, **named)
        except TypeError as error:
            raise Refusal(f"its arguments are not all known here ({error}); write it without") from error
        return FUNCTIONS[target].build(append, *args, **named)
    return call(target, *_tensors(args), **_tensors(kwargs))


def _tensors(structure: Any) -> Any:
    """The structure with the example's tensors in place of traced ones, to ask for their shapes."""
    if isinstance(structure, Value):
        return structure.tensor
    if isinstance(structure, tuple | list):
        return type(structure)(_tensors(part) for part in structure)
    if isinstance(structure, dict):
        return {key: _tensors(part) for key, part in structure.items()}
    return structure


_IN_PLACE = {operator.iadd, operator.isub, operator.imul, operator.itruediv}


def _in_place(root: nn.Module, node: fx.Node) -> bool:
    if node.op == "call_module":
        return bool(getattr(root.get_submodule(str(node.target)), "inplace", False))
    name = _function_name(node.target)
    return bool(node.kwargs.get("inplace", False)) or name.endswith("_") or node.target in _IN_PLACE


def _attribute(root: nn.Module, path: str) -> Any:
    value: Any = root
    for part in path.split("."):
        value = getattr(value, part)
    return value.detach() if isinstance(value, Tensor) else value


def _operation(root: nn.Module, node: fx.Node) -> str:
    if node.op == "call_module":
        return type(root.get_submodule(str(node.target))).__name__
    return _function_name(node.target)


def _refusal(where: str, operation: str, reason: str | None) -> str:
    fallback = (
        "it is not in the table of operators (README.md); replace it, leave it out, "
        "or register a rule for its module (quartz_plugin.register_rule)"
    )
    return f"cannot convert {where!r} ({operation}): {reason or fallback}"


def _function_name(target: Any) -> str:
    return target if isinstance(target, str) else getattr(target, "__name__", repr(target))


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
