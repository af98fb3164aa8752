"""Stage 1, trace: the ANN as a graph in which every node calls a module of its own."""

from __future__ import annotations

import copy
import inspect
import keyword
import operator
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from quartz_plugin.convert.intake import carry_out_hooks, copy_of, first_line, hooks_of, make_plain
from quartz_plugin.convert.symbolic import Tracer, class_name, reason_against, refusal, symbolic, value_dependent
from quartz_plugin.convert.traced import TracedNetwork
from quartz_plugin.graph import INPUT, unique_path
from quartz_plugin.operators.modules import Reshape
from quartz_plugin.operators.table import (
    FUNCTIONS,
    INSIDE,
    MONOTONE,
    MONOTONE_OUTPUT,
    OPERATORS,
    REASONS,
    Append,
    ConversionError,
    Refusal,
    Role,
    Rule,
    Value,
    call,
    has_weights,
    rules_with,
    spell_out,
)
from quartz_plugin.operators.tracing import BATCH
from quartz_plugin.precision import exact_arithmetic

Rules = Mapping[type[nn.Module], Rule]

EXAMPLES = 3
"""Size of the batch that a network is traced with: what mixes the batch with the units then shows."""


def trace(ann: nn.Module, example: Tensor, rules: Rules | None = None) -> TracedNetwork:
    """Trace a copy of `ann` in eval mode; `ann` itself is left alone.

    Functions and methods become modules of the table; a module or function that is not in it is refused before
    anything is computed.

    Parameters
    ----------
    ann : nn.Module
        The trained network.
    example : Tensor
        One input, ``[1, ...]``.
    rules : dict, optional
        Rules for module classes, beside those of ``register_rule`` and before them.

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
    # Different images show what mixes them; a batch of another size, what has taken the size for a number.
    others = torch.rand(
        EXAMPLES - 1, *example.shape[1:], generator=torch.Generator().manual_seed(0), dtype=torch.float64
    )
    examples = torch.cat([example[:1], others.to(example)])
    with exact_arithmetic(), torch.no_grad():
        return _trace(ann, examples, rules_with(rules))


def _trace(ann: nn.Module, examples: Tensor, rules: Rules) -> TracedNetwork:
    """Trace with a batch of examples, and compare with the network itself on the last of them."""
    root = copy_of(ann)
    _refuse_meta(root, examples, rules)
    # The draft computes in the examples' type, which is float32 at least.
    root = root.to(device=examples.device, dtype=examples.dtype)
    name, tracer, wanted = type(root).__name__, Tracer(examples, examples[:1]), None
    if hooked := hooks_of(root):
        wanted = carry_out_hooks(root, hooked, tracer, rules, _run, examples[1:], examples[:1])
    make_plain(root)
    _check_finite(root)
    if "forward" in vars(root):
        raise ConversionError(refusal("the network itself", name, reason_against(root)))
    root, graph, dynamic, paths = _known_graph(root, name, tracer, rules)
    if wanted is None:
        wanted = _run(copy_of(ann).to(device=examples.device, dtype=examples.dtype), examples[1:].clone())
    draft = _Builder(root, paths, dynamic, examples).build(graph)
    traced = draft.output(examples[1:].clone())
    tolerance = 1e-3 * float(wanted.abs().nan_to_num(0.0, posinf=0.0).max()) if wanted.numel() else 0.0
    if wanted.shape != traced.shape or not torch.allclose(wanted, traced, rtol=0, atol=tolerance, equal_nan=True):
        raise ConversionError(_DIFFERENT)
    return draft


def _known_graph(
    root: nn.Module, name: str, tracer: Tracer, rules: Rules
) -> tuple[nn.Module, fx.Graph, set[fx.Node], dict[fx.Node, str]]:
    """The network as torch.fx sees it, of known operations; its numbers do not matter."""
    root = _with_rules(root, rules)
    if not isinstance(root, nn.Sequential) and (
        type(root).__module__.startswith("torch.nn") or type(root) in OPERATORS
    ):
        root = nn.Sequential(root)
    graph = symbolic(root, name, tracer)
    dynamic = value_dependent(graph)
    paths = _paths(root, graph, dynamic)
    _check_known(root, graph, paths, dynamic)
    return root, graph, dynamic, paths


def _refuse_meta(root: nn.Module, examples: Tensor, rules: Rules) -> None:
    """Refuse a network without numbers; first for the module that would stand in the way with them."""
    for name, tensor in [*root.named_parameters(), *root.named_buffers()]:
        if tensor.is_meta:
            on_meta = examples.to("meta")
            _known_graph(root, type(root).__name__, Tracer(on_meta, on_meta[:1]), rules)
            raise ConversionError(f"{name} is on the meta device, which holds no numbers; load the weights first")


_DIFFERENT = (
    "the traced network computes something else than the network itself: its forward is random in eval mode, computes "
    "with the size of the batch, "
    "changes a tensor in place (as `x += y` does) that it uses again under another name, or a registered rule is "
    "not the module it stands for"
)


def _check_finite(root: nn.Module) -> None:
    for name, tensor in [*root.named_parameters(), *root.named_buffers()]:
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"{name} contains NaN or infinity; the network cannot be converted")


def _with_rules(root: nn.Module, rules: Rules) -> nn.Module:
    """Put what the users' rules make in the place of their modules."""
    done: dict[int, nn.Module] = {}
    for path, module in list(root.named_modules(remove_duplicate=False)):
        rule = rules.get(type(module))
        if rule is None:
            continue
        if id(module) not in done:
            try:
                done[id(module)] = replacement = rule(module)
            except Exception as error:
                raise ConversionError(
                    f"the rule registered for {type(module).__name__} failed at {path!r}: {first_line(error)}"
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
            module = root.get_submodule(str(node.target))
            reason, operation = reason_against(module), class_name(module)
        else:
            reason = None if node.target in FUNCTIONS else REASONS.get(node.target, "")
            operation = _function_name(node.target)
        if reason is not None:
            kind = node.target if node.op != "call_module" else type(module)
            if kind in MONOTONE:
                reason = MONOTONE_OUTPUT if _ends_network(root, node) else INSIDE.get(kind, reason)
            raise ConversionError(refusal(paths[node], operation, reason))
    output = next(node for node in graph.nodes if node.op == "output")
    if not isinstance(output.args[0], fx.Node) or output.args[0] not in dynamic:
        raise ConversionError(
            f"the network must have one input tensor and one output tensor; forward returns {_described(output)}"
        )


def _ends_network(root: nn.Module, node: fx.Node) -> bool:
    """Check whether a node's values reach the output in their own order: routed, or through functions that keep it."""
    for user in node.users:
        if user.op == "output":
            continue
        target = type(root.get_submodule(str(user.target))) if user.op == "call_module" else user.target
        row = OPERATORS[target] if target in OPERATORS else FUNCTIONS[target].row if target in FUNCTIONS else None
        passes = target in MONOTONE or (row is not None and row.role in (Role.ROUTE, Role.NOTHING))
        if not passes or not _ends_network(root, user):
            return False
    return True


def _described(output: fx.Node) -> str:
    returned = output.args[0]
    if isinstance(returned, tuple | list | dict):
        kind = next(kind for kind in (tuple, list, dict) if isinstance(returned, kind))
        return f"a {kind.__name__} of {len(returned)}; wrap it in a module that returns one of them"
    return "a value that does not depend on the input"


def _run(network: nn.Module, examples: Tensor) -> Tensor:
    """Run the network itself; an error of torch about an unfit input becomes ours."""
    try:
        out = network(examples)
    except (RuntimeError, ValueError, IndexError, TypeError, AssertionError) as error:
        shape = [1, *examples.shape[1:]]
        raise ConversionError(
            f"the network does not run on inputs of shape {shape} (the first of those given, [N, ...]): "
            f"{first_line(error)}"
        ) from error
    if not isinstance(out, Tensor):
        raise ConversionError(f"the network must return one tensor, it gave {type(out).__name__}")
    return out


class _Builder:
    """Builds the traced network, one module a node, computing the example on the way: it shows shapes and constants.

    Parameters
    ----------
    root : nn.Module
        The network that was traced.
    paths : dict
        Node -> its path.
    dynamic : set of fx.Node
        Nodes whose values depend on the image.
    examples : Tensor
        A batch of inputs.
    """

    def __init__(self, root: nn.Module, paths: dict[fx.Node, str], dynamic: set[fx.Node], examples: Tensor) -> None:
        self.root, self.paths, self.dynamic, self.examples = root, paths, dynamic, examples
        self.graph = fx.Graph()
        self.modules: dict[str, nn.Module] = {}
        self.report: dict[str, dict[str, Any]] = {}
        self.used: set[str] = set()

    def build(self, traced: fx.Graph) -> TracedNetwork:
        """Carry out every node of the traced graph."""
        known: dict[fx.Node, Any] = {}
        result: Any = None
        # Found first: modules that are carried out are no longer in place.
        in_place = {node for node in traced.nodes if _in_place(self.root, node)}
        for node in traced.nodes:
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda source: known[source])
            if node.op == "placeholder":
                default = node.args[0] if node.args else None
                known[node] = default if known else Value(self.graph.placeholder(INPUT), self.examples)
            elif node.op == "output":
                result = args[0]
            elif node.op == "get_attr":
                known[node] = _attribute(self.root, str(node.target))
            else:
                known[node] = self._carry_out(node, args, kwargs)
            if node in in_place:
                # Whoever uses the changed tensor from here on sees the change.
                changed = next(iter([*args, *kwargs.values()]))
                known.update({earlier: known[node] for earlier, value in known.items() if value is changed})
        if not isinstance(result, Value):
            raise ConversionError("the network must have one input tensor and one output tensor")
        self.graph.output(result.node)
        module = fx.GraphModule(self.modules, self.graph)
        module.graph.eliminate_dead_code()
        module.delete_all_unused_submodules()
        paths = [str(node.target) for node in module.graph.nodes if node.op == "call_module"]
        return TracedNetwork(
            module,
            tuple(self.examples.shape[1:]),
            self.examples.dtype,
            self.examples.device,
            report={path: self.report[path] for path in paths},
            traced=frozenset(paths),
        )

    def _carry_out(self, node: fx.Node, args: Any, kwargs: Any) -> Any:
        """Value of a call."""
        operation = _operation(self.root, node)
        append = self._appender(self.paths[node], operation)
        try:
            if node.op != "call_module":
                return _evaluate(node.target, args, kwargs, node in self.dynamic, append)
            if node not in self.dynamic:
                return self.root.get_submodule(str(node.target))(*_tensors(args), **_tensors(kwargs))
            module = _own_copy(self.root, str(node.target), self.used)
            return append(module, *_inputs(module, args, kwargs))
        except Refusal as reason:
            raise ConversionError(refusal(self.paths[node], operation, str(reason))) from reason
        except (RuntimeError, ValueError, IndexError, TypeError) as error:
            why = f"it does not run here: {first_line(error)}"
            raise ConversionError(refusal(self.paths[node], operation, why)) from error

    def _appender(self, path: str, operation: str) -> Append:
        def append(module: nn.Module, *inputs: Value) -> Value:
            like = self.examples
            module = spell_out(module.eval().to(device=like.device, dtype=like.dtype), inputs[0].tensor.shape)
            row = OPERATORS[type(module)]
            refused = row.refusal(module)
            if refused is not None:
                raise Refusal(refused)
            shape = tuple(inputs[0].tensor.shape[1:])
            if not row.rank or row.rank < len(shape):
                return self._add(path, operation, module, *inputs)
            # torch takes it for one image, the batch for its channels.
            if has_weights(module):
                raise Refusal(BATCH)
            channels = self._add(f"{path}_unsqueezed", "unsqueeze", Reshape((1, *shape)), *inputs)
            pooled = self._add(path, operation, module, channels)
            return self._add(f"{path}_squeezed", "squeeze", Reshape(pooled.tensor.shape[2:]), pooled)

        return append

    def _add(self, path: str, operation: str, module: nn.Module, *inputs: Value) -> Value:
        own = unique_path(_safe(path), self.modules)
        out = module(*(value.tensor for value in inputs))
        if out.dim() == 0 or len(out) != EXAMPLES:
            raise Refusal(BATCH)
        self.modules[own] = module
        self.report[own] = {"module": own, "operation": operation}
        node = self.graph.call_module(own, tuple(value.node for value in inputs))
        node.meta["shape"] = tuple(out.shape[1:])
        return Value(node, out)


def _inputs(module: nn.Module, args: Any, kwargs: Any) -> list[Value]:
    """The tensors that a module of the table takes."""
    given = [*args, *kwargs.values()]
    if len(given) not in OPERATORS[type(module)].inputs or not all(isinstance(each, Value) for each in given):
        raise Refusal(f"it is called with {len(given)} arguments, and only its input can be carried")
    return given


def _own_copy(root: nn.Module, path: str, used: set[str]) -> nn.Module:
    """The module at a path, a copy of its own for each call after the first; never in place."""
    module = root.get_submodule(path)
    if path in used:
        module = copy.deepcopy(module)
    used.add(path)
    if getattr(module, "inplace", False):
        module.inplace = False  # type: ignore[assignment]
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


_EMPTY = fx.GraphModule(nn.Module(), fx.Graph())


def _safe(path: str) -> str:
    """A module's path as the code of a graph module can spell it: no keyword of Python, and no name of its own."""
    first, *rest = [_spelt(name) for name in path.split(".")]
    return ".".join([first + "_" if hasattr(_EMPTY, first) else first, *rest])


def _spelt(name: str) -> str:
    if keyword.iskeyword(name):
        return name + "_"
    return "".join("_" if letter in '"\\' or not letter.isprintable() else letter for letter in name)


def _operation(root: nn.Module, node: fx.Node) -> str:
    if node.op == "call_module":
        return type(root.get_submodule(str(node.target))).__name__
    return _function_name(node.target)


def _function_name(target: Any) -> str:
    return target if isinstance(target, str) else getattr(target, "__name__", repr(target))
