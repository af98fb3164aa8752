"""The part of stage 1 that runs a network's forward on symbols: torch.fx, which here knows the shapes of tensors.

A converted network takes inputs of one shape, so whatever a forward asks of shapes has an answer; what it asks of
values has none.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from quartz_plugin.coding import plain
from quartz_plugin.convert.calls import NAMED, function_name, is_of_the_user
from quartz_plugin.convert.lines import line_of_error
from quartz_plugin.convert.recurrent import unrolled
from quartz_plugin.convert.shapes import Shapes, not_known, place_of, value_dependent
from quartz_plugin.convert.sizes import sizes_of_symbols
from quartz_plugin.graph import call_node
from quartz_plugin.intake import first_line
from quartz_plugin.operators.table import FUNCTIONS, OPERATORS, REASONS, SHAPE_ATTRIBUTES, ConversionError

_REPLACED = "its forward has been replaced on this one module, so that its class is another; write a class for it"
_QUANTISED = "it holds quantised weights; convert the float network it was made from (weight_bits=8 rounds its weights)"

_NOTED_WHERE_THEY_STAND = (
    *(torch.zeros, torch.ones, torch.full, torch.empty, torch.eye, torch.arange, torch.linspace, torch.tensor),
    # Torch before 2.7 takes no symbol in a tuple of sizes.
    torch.reshape,
)
"""Functions that take no tensor, and so would not see a symbol among their arguments."""

_QUESTIONS = frozenset({"size", "dim", "ndimension", "numel", "nelement", "is_floating_point", "is_complex"})
"""Methods of a tensor that its shape and type answer."""


class Tracer(fx.Tracer):
    """Traces down to the modules of the table; answers what is asked of shapes, and remembers where it was.

    Parameters
    ----------
    *inputs : tuple of Tensor
        Inputs of different batch sizes: what depends on the size of the batch then shows.

    Attributes
    ----------
    called : list of (str, nn.Module)
        Path and module of each call that it did not look into, in order.
    count : int
        How many inputs there are.
    failed_in : str or None
        Path of the innermost module whose forward failed.
    """

    proxy_buffer_attributes = False

    def __init__(self, *inputs: tuple[Tensor, ...]) -> None:
        super().__init__(autowrap_functions=_NOTED_WHERE_THEY_STAND, param_shapes_constant=True)
        self._autowrap_search.append(torch)
        self.failed_in: str | None = None
        self.called: list[tuple[str, nn.Module]] = []
        self.inputs, self.count = inputs, len(inputs[0])
        self._known: list[dict[fx.Node, Any]] = [{} for _ in inputs]
        self._shapes: list[list[Shapes]] = []
        self._settings: dict[str, dict[str, Any]] = {}
        self._inside: list[str] = []

    def create_arg(self, a: Any) -> Any:
        """Take numbers of numpy, and whole ones of torch, for settings; other tensors are weights."""
        whole = isinstance(a, Tensor) and not (a.is_floating_point() or a.is_complex())
        return super().create_arg(plain(a) if whole or isinstance(a, np.generic) else a)

    def create_proxy(self, kind: str, target: Any, args: Any, kwargs: Any, *others: Any, **named: Any) -> Any:
        """Note a call; look into a function of the user's that torch.fx was asked not to look into."""
        if kind == "call_function" and is_of_the_user(target) and target not in FUNCTIONS:
            result = self._called_inside(target, args, kwargs)
            if isinstance(result, fx.Proxy):
                return result
            if isinstance(result, int | float | str):
                target, args, kwargs = type(result), (result,), {}
        if target is operator.getitem and isinstance(args[1], list) and not all(map(_is_a_place, args[1])):
            args = (args[0], tuple(args[1]))
        proxy = super().create_proxy(kind, target, args, kwargs, *others, **named)
        if self._inside:
            proxy.node.meta[NAMED] = ".".join([*self._inside, function_name(target)])
        return proxy

    def _called_inside(self, function: Any, args: Any, kwargs: Any) -> Any:
        """Value of a function whose operations go by its name, and its own."""
        self._inside.append(function_name(function))
        try:
            return function(*map(self._opened, args), **{name: self._opened(each) for name, each in kwargs.items()})
        finally:
            self._inside.pop()

    def _opened(self, each: Any) -> Any:
        """Symbols of the parts of a tuple or list that a symbol stands for; anything else as it is."""
        values = self.without_values(each.node) if isinstance(each, fx.Proxy) else None
        if values is None or not isinstance(values[0], tuple | list) or isinstance(values[0], torch.Size):
            return each
        return tuple(each[place] for place in range(len(values[0])))

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Check whether a module is not looked into."""
        own = type(m) in OPERATORS or super().is_leaf_module(m, module_qualified_name)
        return own and unrolled(m) is None

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        """Trace the call of a module, and note it."""
        path = self.path_of_module(m)
        if self.is_leaf_module(m, path):
            self.called.append((path, m))
            self.check_settings(path, m)
        try:
            return super().call_module(m, unrolled(m) or forward, args, kwargs)
        except Exception:
            self.failed_in = self.failed_in or path
            raise

    def check_settings(self, path: str, module: nn.Module) -> None:
        """Raise ConversionError where a module's settings are no longer those that it was called with before."""
        now = _settings(module)
        before = self._settings.setdefault(path, now)
        for name, value in now.items():
            if isinstance(value, fx.Proxy) or (isinstance(value, tuple | list) and _holds_proxy(value)):
                why = f"its {name} is set in forward; call its function (torch.nn.functional) with it instead"
            elif value != before.get(name):
                why = (
                    f"its {name} changes during forward, from {before.get(name)} to {value}; "
                    "use a module of its own for each"
                )
            else:
                continue
            raise ConversionError(refusal(path, class_name(module), why))

    def proxy(self, node: fx.Node) -> fx.Proxy:
        """Return the symbol that stands for a node's value."""
        return _Proxy(node, self)

    def to_bool(self, obj: fx.Proxy) -> bool:
        """Answer an ``if``."""
        return bool(self.answer(obj, "branch on"))

    def iter(self, obj: Any) -> Iterator[Any]:
        """Answer a ``for``: shapes decide how many pieces there are."""
        count = self.answer(obj, "iterate over", len)
        return (obj[index] for index in range(count))

    def answer(self, obj: fx.Proxy, doing: str, question: Callable[[Any], Any] | None = None) -> Any:
        """Value of a proxy, or what `question` finds of it, where shapes decide.

        Raises
        ------
        UnansweredError
            Where the values of tensors, or the size of the batch, would decide.
        """
        if question is None and obj.node in value_dependent(self.graph):
            raise UnansweredError(f"must not {doing} the values of tensors")
        found = self.without_values(obj.node)
        if found is None or (question is None and any(isinstance(each, Tensor) for each in found)):
            batches = zip(self._known, self.inputs, strict=True)
            with _running_modules():
                found = [self._evaluate(obj.node, known, images) for known, images in batches]
        answers = found if question is None else [question(each) for each in found]
        if any(answer != answers[0] for answer in answers):
            raise UnansweredError(f"must not {doing} the size of the batch")
        return answers[0]

    def without_values(self, node: fx.Node) -> list[Any] | None:
        """Return a node's value for each size of the batch, tensors on the meta device; None if it needs values."""
        if not self._shapes:
            self._shapes = [[Shapes(self.root, each, numbers) for each in self.inputs] for numbers in (False, True)]
        with _running_modules():
            for shapes in self._shapes:
                with suppress(Exception):  # What a module of the user's does there is not known.
                    return [each.of(self.graph, node) for each in shapes]
        return None

    def sizes_of(self, node: fx.Node) -> tuple[int, ...]:
        """Sizes of a node's value for the first of the inputs; none where it is no tensor, or not known."""
        values = self.without_values(node)
        return tuple(values[0].shape) if values is not None and isinstance(values[0], Tensor) else ()

    def of_shape(self, obj: fx.Proxy, question: Callable[[Tensor], Any], symbol: Callable[[], Any]) -> Any:
        """Return what `question` finds of a tensor's shape: numbers, and symbols where the batch decides."""
        values = self.without_values(obj.node)
        if values is None or not all(isinstance(value, Tensor) for value in values):
            return symbol()
        first, *others = answers = [question(value) for value in values]
        if all(answer == first for answer in others):
            return first
        if not isinstance(first, torch.Size) or len({len(answer) for answer in answers}) > 1:
            return symbol()
        sizes = symbol()
        by_dim = enumerate(zip(*answers, strict=True))
        return tuple(size[0] if len(set(size)) == 1 else sizes[dim] for dim, size in by_dim)

    def attribute_of(self, obj: fx.Proxy, name: str, symbol: fx.Proxy) -> Any:
        """Attribute of a tensor that its shape, its type or its device decides, or the symbol for it."""
        by_device = name in ("device", "is_cuda")
        return self.of_shape(
            obj, lambda value: getattr(self.inputs[0][0] if by_device else value, name), lambda: symbol
        )

    def _evaluate(self, node: fx.Node, known: dict[fx.Node, Any], inputs: tuple[Tensor, ...]) -> Any:
        for each in not_known(self.graph, node, known):
            if each.op == "placeholder":
                known[each] = each.args[0] if each.args else inputs[place_of(self.graph, each)].clone()
            elif each.op == "get_attr":
                known[each] = operator.attrgetter(str(each.target))(self.root)
            else:
                known[each] = call_node(self.root, each, known)  # type: ignore[arg-type]
        return known[node]


def _is_a_place(part: Any) -> bool:
    return not (part is None or part is Ellipsis or isinstance(part, slice))


_RUN = nn.Module.__call__, nn.Module.__getattr__


@contextmanager
def _running_modules() -> Iterator[None]:
    """Run modules, which torch.fx has patched to be traced."""
    traced = nn.Module.__call__, nn.Module.__getattr__
    nn.Module.__call__, nn.Module.__getattr__ = _RUN  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.__call__, nn.Module.__getattr__ = traced  # type: ignore[method-assign]


class NotTraceableError(ConversionError):
    """A network that torch.fx cannot trace, for no reason that the table of operators knows."""


class UnansweredError(Exception):
    """A question that a forward must not ask."""


class _Answering:
    """Questions of Python to a number, answered by the tracer."""

    tracer: Tracer

    def __index__(self) -> int:
        return operator.index(self.tracer.answer(self, "compute in Python with"))  # type: ignore[arg-type]

    def __int__(self) -> int:
        return int(self.tracer.answer(self, "compute in Python with"))  # type: ignore[arg-type]

    def __float__(self) -> float:
        return float(self.tracer.answer(self, "compute in Python with"))  # type: ignore[arg-type]

    def __len__(self) -> int:
        return int(self.tracer.answer(self, "compute in Python with", len))  # type: ignore[arg-type]

    def __getattr__(self, name: str) -> Any:
        attribute = _Attribute(self, name)  # type: ignore[arg-type]
        if name in SHAPE_ATTRIBUTES:
            tracer: Tracer = object.__getattribute__(self, "tracer")
            return tracer.attribute_of(self, name, attribute)  # type: ignore[arg-type]
        return attribute


class _Proxy(_Answering, fx.Proxy):  # type: ignore[misc]
    pass


class _Attribute(_Answering, fx.proxy.Attribute):  # type: ignore[misc]
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Note the call of a method, or answer it where it asks of shapes alone."""
        noted = partial(super().__call__, *args, **kwargs)
        if self.attr not in _QUESTIONS:
            return noted()
        return self.tracer.of_shape(self.root, lambda value: getattr(value, self.attr)(*args, **kwargs), noted)


def symbolic(root: nn.Module, name: str, tracer: Tracer) -> fx.Graph:
    """Trace `root` with torch.fx; arguments but the first take their defaults.

    Raises
    ------
    ConversionError
        With the reason, and the module; NotTraceableError where no operation of the network is refused.
    """
    with torch.device("meta"):
        # torch keeps which functions make tensors from the first use on, and torch.fx is about to patch those.
        torch.empty(0)
    try:
        with sizes_of_symbols():
            graph = tracer.trace(root, _defaults(root, tracer.count))
        for path, module in tracer.called:
            tracer.check_settings(path, module)
        return graph
    except ConversionError:
        raise
    except Exception as error:
        # An operation we refuse is the better reason than what tracing stumbled over behind it.
        for path, module in tracer.called:
            if (reason := reason_against(module)) is not None:
                raise ConversionError(refusal(path, class_name(module), reason)) from error
        where = f" in module {tracer.failed_in!r}" if tracer.failed_in else ""
        if isinstance(error, UnansweredError):
            why = f"its forward {error}; write it without, or register a rule (quartz_plugin.register_rule)"
        else:
            why = (
                f"{first_line(error)}; write its forward with operations of torch on tensors, or register a rule "
                "(quartz_plugin.register_rule)"
            )
        raise NotTraceableError(f"torch.fx cannot trace {name}{where}: {why}{line_of_error(error)}") from error


def _defaults(root: nn.Module, count: int) -> dict[str, Any]:
    """Arguments of a forward behind the inputs that have a default: its value, so that ``is None`` is answered."""
    _, *others = inspect.signature(type(root).forward).parameters.values()
    return {each.name: each.default for each in others[count:] if each.default is not inspect.Parameter.empty}


def reason_against(module: nn.Module) -> str | None:
    """Reason against a module that is not looked into; None if there is none, "" if it merely is not in the table."""
    row = OPERATORS.get(type(module))
    if "forward" in vars(module):
        return _REPLACED
    if row is not None:
        return row.refusal(module)
    if ".quantized" in type(module).__module__ or ".qat" in type(module).__module__:
        return _QUANTISED
    return REASONS.get(type(module), "")


def class_name(module: nn.Module) -> str:
    """Name of a module's class, with its home unless that is ``torch.nn``."""
    kind = type(module)
    plain = kind.__module__.startswith(("torch.nn.", "quartz_plugin."))
    return kind.__qualname__ if plain else f"{kind.__module__}.{kind.__qualname__}"


def refusal(where: str, operation: str, reason: str | None) -> str:
    """One line: what stands where, and why it cannot be converted."""
    fallback = (
        "it is not in the table of operators (quartz_plugin/operators/OPERATORS.md); replace it, leave it out, "
        "or register a rule for its module (quartz_plugin.register_rule)"
    )
    return f"cannot convert {where!r} ({operation}): {reason or fallback}"


def _settings(module: nn.Module) -> dict[str, Any]:
    """Settings that a module computes with besides tensors and modules."""
    plain = (int, float, str, tuple, list, type(None), fx.Proxy)
    return {
        name: value
        for name, value in vars(module).items()
        if name[0] != "_" and name != "training" and isinstance(value, plain)
    }


def _holds_proxy(values: tuple[Any, ...] | list[Any]) -> bool:
    return any(isinstance(value, fx.Proxy) for value in values)


__all__ = [
    "NotTraceableError",
    "Tracer",
    "UnansweredError",
    "class_name",
    "reason_against",
    "refusal",
    "symbolic",
]
