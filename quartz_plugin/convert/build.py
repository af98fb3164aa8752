"""The second half of stage 1: modules of the table for what torch.fx saw, one a node."""

from __future__ import annotations

import copy
import inspect
import keyword
import operator
from typing import Any

import torch
from torch import Tensor, fx, nn

from quartz_plugin.convert.calls import function_name
from quartz_plugin.convert.lines import line_of_node
from quartz_plugin.convert.symbolic import refusal
from quartz_plugin.convert.tail import HostBuilder, HostValue, builds_output, host_call, tensors_of
from quartz_plugin.convert.traced import TracedNetwork
from quartz_plugin.convert.unused import changes_a_tensor
from quartz_plugin.graph import INPUT, unique_path
from quartz_plugin.inputs import PLACE
from quartz_plugin.intake import first_line
from quartz_plugin.operators.extremes import NEVER_NEGATIVE, Largest
from quartz_plugin.operators.modules import Reshape
from quartz_plugin.operators.table import (
    FUNCTIONS,
    OPERATORS,
    Append,
    ConversionError,
    Refusal,
    Role,
    Value,
    call,
    has_weights,
    keeps_sign,
    spell_out,
)
from quartz_plugin.operators.tracing import BATCH
from quartz_plugin.outputs import OUTPUT, Head, Outputs
from quartz_plugin.structure import flattened

HOSTED = "computed on the decoded output, by the host"


class Builder:
    """Builds the traced network, one module a node, computing the example on the way: it shows shapes and constants.

    Parameters
    ----------
    root : nn.Module
        The network that was traced.
    paths : dict
        Node -> its path.
    dynamic : set of fx.Node
        Nodes whose values depend on the image.
    hosted : set of fx.Node
        Nodes that the host carries out on the decoded outputs.
    examples : Tensor
        A batch of inputs.
    """

    def __init__(
        self,
        root: nn.Module,
        paths: dict[fx.Node, str],
        dynamic: set[fx.Node],
        hosted: set[fx.Node],
        examples: Tensor,
    ) -> None:
        self.root, self.paths, self.dynamic, self.hosted, self.examples = root, paths, dynamic, hosted, examples
        self.host = HostBuilder(len(examples))
        self.graph = fx.Graph()
        self.modules: dict[str, nn.Module] = {}
        self.report: dict[str, dict[str, Any]] = {}
        self.hosted_rows: dict[str, dict[str, Any]] = {}
        self.used: set[str] = set()
        self.unpacked: dict[int, str] = {}

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
            elif builds_output(node):
                known[node] = dict(zip(getattr(node.target, "_fields", ()), args, strict=False)) | kwargs
            else:
                known[node] = self._carry_out(node, args, kwargs)
            if PLACE in node.meta and node.op != "placeholder":
                self.unpacked[node.meta[PLACE]] = str(known[node].node.target)
            if node in in_place:
                # Each user of the changed tensor from here on sees the change; numbers are never changed in place.
                changed = next(iter([*args, *kwargs.values()]))
                if isinstance(changed, Value | HostValue | Tensor):
                    known.update({earlier: known[node] for earlier, value in known.items() if value is changed})
        outputs, packed = self._end(result)
        self.graph.output(packed.node)
        module = fx.GraphModule(self.modules, self.graph)
        module.graph.eliminate_dead_code()
        module.delete_all_unused_submodules()
        paths = [str(node.target) for node in module.graph.nodes if node.op == "call_module"]
        return TracedNetwork(
            module,
            tuple(self.examples.shape[1:]),
            self.examples.dtype,
            self.examples.device,
            report={path: self.report[path] for path in paths} | self.hosted_rows,
            traced=frozenset(paths),
            outputs=outputs,
            unpacked=self.unpacked,
        )

    def _end(self, result: Any) -> tuple[Outputs, Value]:
        """What the network returns, and the value that the output layer encodes: all heads, one behind the other."""
        structure, leaves = flattened(self._opened(result), lambda each: isinstance(each, Value | HostValue | Tensor))
        for name, leaf in leaves.items():
            if isinstance(leaf, Tensor):
                raise ConversionError(
                    f"the network returns a value that does not depend on the input{name and f': {name}'}"
                )
        if not leaves:
            raise ConversionError("the network must return a tensor, or several; it returns none")
        program = self.host.program(list(leaves.values()))
        heads = self.host.heads
        if program is not None:
            try:
                program.check_apart([head.tensor for head in heads])
            except ValueError as reason:
                what = ", ".join(f"{row['module']!r} ({row['operation']})" for row in self.hosted_rows.values())
                raise ConversionError(
                    f"cannot leave {what or 'what is returned'} to the host: {first_line(reason)}"
                ) from reason
        names = self._names_of(leaves)
        outputs = Outputs(
            tuple(Head(name, tuple(head.tensor.shape[1:])) for name, head in zip(names, heads, strict=True)),
            program,
            structure,
        )
        if len(heads) == 1:
            return outputs, heads[0]
        append = self._appender("outputs", "outputs")
        flat = [head if head.tensor.dim() == 2 else append(Reshape((head.tensor[0].numel(),)), head) for head in heads]
        packed: Value = FUNCTIONS[torch.cat].build(append, flat, 1)
        return outputs, packed

    def _opened(self, result: Any) -> Any:
        """What the network returns, with several values that the host gives at once taken apart."""
        if isinstance(result, HostValue) and isinstance(result.tensor, tuple | list):
            return tuple(self.host.add("getitem", (result, place), {}) for place in range(len(result.tensor)))
        if isinstance(result, tuple | list) and not hasattr(result, "_fields"):
            return (tuple if isinstance(result, tuple) else list)(map(self._opened, result))
        if isinstance(result, dict):
            return {key: self._opened(part) for key, part in result.items()}
        return result

    def _names_of(self, leaves: dict[str, Any]) -> list[str]:
        """A name for each head: that of the only output that is made of it, else that of its module."""
        heads = self.host.heads
        if len(heads) == 1:
            return [OUTPUT]
        behind = {name: self.host.heads_behind(leaf) for name, leaf in leaves.items()}
        names: list[str] = []
        for place, head in enumerate(heads):
            own = [name for name, found in behind.items() if found == {place}]
            names.append(unique_path(own[0] if own else str(head.node.target), names))
        return names

    def _carry_out(self, node: fx.Node, args: Any, kwargs: Any) -> Any:
        """Value of a call."""
        operation = _operation(self.root, node)
        append = self._appender(self.paths[node], operation)
        try:
            if node in self.hosted and (call := host_call(self.root, node)) is not None:
                path = self.paths[node]
                self.hosted_rows[path] = {"module": path, "operation": operation, "became": HOSTED, "exact": "exact"}
                return self.host.add(call[0], args, kwargs if node.op != "call_module" else call[1])
            if node.op != "call_module":
                value = _evaluate(node.target, args, kwargs, node in self.dynamic, append)
                if value is None and node.users and isinstance(args[0], Largest):
                    raise Refusal("it takes the places of values, which no spikes encode; take the values alone")
                return value
            if node not in self.dynamic:
                return self.root.get_submodule(str(node.target))(*tensors_of(args), **tensors_of(kwargs))
            module = _own_copy(self.root, str(node.target), self.used)
            inputs, build = _inputs(module, args, kwargs), OPERATORS[type(module)].build
            return append(module, *inputs) if build is None else build(append, module, *inputs)
        except Refusal as reason:
            raise ConversionError(refusal(self.paths[node], operation, str(reason)) + line_of_node(node)) from reason
        except (RuntimeError, ValueError, IndexError, TypeError) as error:
            why = f"it does not run here: {first_line(error)}"
            raise ConversionError(refusal(self.paths[node], operation, why) + line_of_node(node)) from error

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
        if out.dim() == 0 or len(out) != len(self.examples):
            raise Refusal(BATCH)
        self.modules[own] = module
        self.report[own] = {"module": own, "operation": operation}
        node = self.graph.call_module(own, tuple(value.node for value in inputs))
        node.meta["shape"] = tuple(out.shape[1:])
        rectified = all(value.node.meta.get(NEVER_NEGATIVE, False) for value in inputs) and keeps_sign(module)
        rectifies = OPERATORS[type(module)].role is Role.RECTIFIER and not getattr(module, "signed", False)
        node.meta[NEVER_NEGATIVE] = rectified or rectifies
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
    return call(target, *tensors_of(args), **tensors_of(kwargs))


def _in_place(root: nn.Module, node: fx.Node) -> bool:
    """Check whether a node changes the tensor it is called on."""
    known = node.op == "call_module" or node.target in FUNCTIONS or host_call(root, node) is not None
    return known and changes_a_tensor(root, node)


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
    return function_name(node.target)


__all__ = ["Builder"]
