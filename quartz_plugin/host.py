"""What the host computes of the decoded outputs: the operations behind a network's last linear map.

A softmax, a sigmoid, an argmax or an upsampling of the result needs no spikes: the output layer encodes what is in
front of it, and the host carries it out on the decoded values. A program of them is plain data, which files hold.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def _softmax(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """One of torch's softmaxes, whose type stands behind the dimension, or behind an argument that nobody gives."""

    def softmax(x: Tensor, dim: int | None = None, *rest: Any, dtype: torch.dtype | None = None, **_: Any) -> Tensor:
        given = next((each for each in rest if isinstance(each, torch.dtype)), dtype)
        return function(x, dim, dtype=given)

    return softmax


STARTS: dict[str, Callable[..., Any]] = {
    "softmax": _softmax(F.softmax),
    "log_softmax": _softmax(F.log_softmax),
    "softmin": _softmax(F.softmin),
    "sigmoid": torch.sigmoid,
    "logsigmoid": F.logsigmoid,
    "hardsigmoid": lambda x, inplace=False: F.hardsigmoid(x),
    "tanh": torch.tanh,
    "softplus": F.softplus,
    "exp": torch.exp,
    "argmax": torch.argmax,
    "argmin": torch.argmin,
    "clamp": torch.clamp,
    "clip": torch.clamp,
    "hardtanh": lambda x, min_val=-1.0, max_val=1.0, inplace=False: F.hardtanh(x, min_val, max_val),
    "interpolate": F.interpolate,
    "normalize": F.normalize,
}
"""Operations that the host takes over where nothing but such operations stands behind them, by name."""

FOLLOWS: dict[str, Callable[..., Any]] = {
    **{name: getattr(operator, name) for name in ("mul", "truediv", "neg", "pow", "getitem")},
    "add": lambda x, y, alpha=1: x + y * alpha if alpha != 1 else x + y,
    "sub": lambda x, y, alpha=1: x - y * alpha if alpha != 1 else x - y,
    "to": lambda x, dtype, *_, **__: x.to(dtype),
    "div": torch.div,
    "rsub": torch.rsub,
    **{
        name: getattr(torch, name)
        for name in ("sum", "mean", "sqrt", "abs", "round", "log", "amax", "amin", "max", "min")
    },
    **{name: getattr(torch, name) for name in ("flatten", "unflatten", "permute", "transpose", "squeeze", "unsqueeze")},
    **{
        name: getattr(torch, name) for name in ("cat", "stack", "chunk", "split", "select", "movedim", "topk", "unbind")
    },
    "reshape": lambda x, *shape: x.reshape(*shape),
    "view": lambda x, *shape: x.reshape(*shape),
    "expand": lambda x, *shape: x.expand(*shape),
    **dict.fromkeys(("contiguous", "clone", "detach", "dropout"), lambda x, *_, **__: x),
    **{name: (lambda x, name=name: getattr(x, name)()) for name in ("float", "long", "int", "double", "bool")},
    "t": torch.t,
    **{name: getattr(operator, name) for name in ("gt", "ge", "lt", "le", "eq", "ne")},
}
"""Operations that may stand behind those."""

OPERATIONS: Mapping[str, Callable[..., Any]] = FOLLOWS | STARTS

MODULES: dict[type[nn.Module], Callable[[Any], tuple[str, dict[str, Any]]]] = {
    nn.Softmax: lambda m: ("softmax", {"dim": m.dim}),
    nn.LogSoftmax: lambda m: ("log_softmax", {"dim": m.dim}),
    nn.Softmin: lambda m: ("softmin", {"dim": m.dim}),
    nn.Softmax2d: lambda m: ("softmax", {"dim": -3}),
    nn.Sigmoid: lambda m: ("sigmoid", {}),
    nn.LogSigmoid: lambda m: ("logsigmoid", {}),
    nn.Hardsigmoid: lambda m: ("hardsigmoid", {}),
    nn.Tanh: lambda m: ("tanh", {}),
    nn.Softplus: lambda m: ("softplus", {"beta": m.beta, "threshold": m.threshold}),
    nn.Hardtanh: lambda m: ("hardtanh", {"min_val": m.min_val, "max_val": m.max_val}),
    nn.Upsample: lambda m: (
        "interpolate",
        {
            "size": m.size,
            "scale_factor": m.scale_factor,
            "mode": m.mode,
            "align_corners": m.align_corners,
            "recompute_scale_factor": m.recompute_scale_factor,
        },
    ),
    nn.Flatten: lambda m: ("flatten", {"start_dim": m.start_dim, "end_dim": m.end_dim}),
    nn.Unflatten: lambda m: ("unflatten", {"dim": m.dim, "sizes": m.unflattened_size}),
    nn.Identity: lambda m: ("contiguous", {}),
    nn.Dropout: lambda m: ("contiguous", {}),
}
"""Module classes -> the operation that one is, and its settings."""

LINEAR_MODES = ("linear", "bilinear", "bicubic", "trilinear")


def starts(name: str, settings: Mapping[str, Any]) -> bool:
    """Check whether the host takes an operation over: one that spikes would not carry out, or only at great cost.

    A clamp at 0 is a ReLU, and nearest upsampling routes spikes.

    Examples
    --------
    >>> starts("softmax", {}), starts("interpolate", {"mode": "nearest"}), starts("clamp", {"min": 0})
    (True, False, False)
    """
    if name == "interpolate":
        return settings.get("mode") in LINEAR_MODES
    if name in ("clamp", "clip", "hardtanh"):
        return settings.get("min", settings.get("min_val")) not in (0, 0.0)
    return name in STARTS


@dataclass(frozen=True)
class Ref:
    """A value of a program: an output of the network, or what an earlier operation gave."""

    index: int


@dataclass(frozen=True)
class BatchSize:
    """The number of images, where an operation's settings ask for it."""


@dataclass(frozen=True)
class Call:
    """One operation: its name, and what it takes; tensors are constants."""

    name: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@dataclass(frozen=True)
class HostProgram:
    """Operations that the host carries out one after the other, on the decoded outputs.

    Attributes
    ----------
    inputs : int
        How many outputs of the network it takes.
    calls : tuple of Call
        The operations.
    results : tuple of int
        Which of the values it gives; the outputs are the first.

    Examples
    --------
    >>> program = HostProgram(1, (Call("softmax", (Ref(0), 1), {}),), (1,))
    >>> program.run([torch.zeros(1, 4)])
    [tensor([[0.2500, 0.2500, 0.2500, 0.2500]])]
    """

    inputs: int
    calls: tuple[Call, ...]
    results: tuple[int, ...]

    def run(self, outputs: Sequence[Tensor]) -> list[Any]:
        """Give the program's results for these outputs."""
        values: list[Any] = list(outputs)
        batch = len(outputs[0])

        def filled(each: Any) -> Any:
            if isinstance(each, Ref):
                return values[each.index]
            if isinstance(each, BatchSize):
                return batch
            if isinstance(each, tuple | list):
                return type(each)(filled(part) for part in each)
            return each.to(outputs[0].device) if isinstance(each, Tensor) else each

        for call in self.calls:
            kwargs = {name: filled(value) for name, value in call.kwargs.items()}
            values.append(OPERATIONS[call.name](*filled(call.args), **kwargs))
        return [values[index] for index in self.results]

    def to_json(self) -> dict[str, Any]:
        """The program as plain JSON values; constant tensors as nested lists."""
        calls = [
            [
                call.name,
                [_to_json(each) for each in call.args],
                {name: _to_json(value) for name, value in call.kwargs.items()},
            ]
            for call in self.calls
        ]
        return {"inputs": self.inputs, "calls": calls, "results": list(self.results)}

    @classmethod
    def from_json(cls, value: Any) -> HostProgram:
        """Read what :meth:`to_json` wrote.

        Raises
        ------
        ValueError
            For an unknown operation, or a value that is not there yet.
        """
        try:
            inputs, calls, results = int(value["inputs"]), [], [int(index) for index in value["results"]]
            for place, (name, args, kwargs) in enumerate(value["calls"]):
                if name not in OPERATIONS:
                    raise ValueError(f"it names a host operation {name!r}")
                known = inputs + place
                taken = {str(key): _from_json(each, known) for key, each in kwargs.items()}
                calls.append(Call(name, tuple(_from_json(each, known) for each in args), taken))
            if not all(0 <= index < inputs + len(calls) for index in results):
                raise ValueError("its host program gives values that it does not compute")
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"its host program is damaged: {error}") from error
        return cls(inputs, tuple(calls), tuple(results))


def _to_json(value: Any) -> Any:
    if isinstance(value, Ref):
        return {"ref": value.index}
    if isinstance(value, BatchSize):
        return {"batch": True}
    if isinstance(value, torch.dtype) and _name_of(value) in _DTYPES:
        return {"dtype": _name_of(value)}
    if isinstance(value, Tensor) and _name_of(value.dtype) in _DTYPES:
        return {"tensor": value.tolist(), "dtype": _name_of(value.dtype)}
    if isinstance(value, slice):
        return {"slice": [value.start, value.stop, value.step]}
    if isinstance(value, tuple | list):
        return {"tuple" if isinstance(value, tuple) else "list": [_to_json(each) for each in value]}
    if value is Ellipsis:
        return {"ellipsis": True}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"the host computes with {type(value).__name__}, which no file holds")


_DTYPES = {
    name: getattr(torch, name)
    for name in ("float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool")
}


def _name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _from_json(value: Any, known: int) -> Any:
    if not isinstance(value, dict):
        if value is None or isinstance(value, bool | int | float | str):
            return value
        raise ValueError("its host program is damaged")
    if "tensor" in value:
        return torch.tensor(value["tensor"], dtype=_DTYPES[value["dtype"]])
    kind, held = next(iter(value.items()), ("", None))
    if kind == "dtype":
        return _DTYPES[str(held)]
    if kind == "ref":
        if type(held) is not int or not 0 <= held < known:
            raise ValueError("its host program takes a value that is not there yet")
        return Ref(held)
    if kind == "batch":
        return BatchSize()
    if kind == "ellipsis":
        return Ellipsis
    if kind == "slice" and isinstance(held, list) and len(held) == 3:
        return slice(*held)
    if kind in ("tuple", "list") and isinstance(held, list):
        parts = [_from_json(each, known) for each in held]
        return tuple(parts) if kind == "tuple" else parts
    raise ValueError("its host program is damaged")


__all__ = ["FOLLOWS", "MODULES", "OPERATIONS", "STARTS", "BatchSize", "Call", "HostProgram", "Ref", "starts"]
