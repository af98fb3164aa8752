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


def _out_of_place(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda x, *settings, **named: function(x.clone(), *settings, **named)


def _of(home: Any, names: str) -> dict[str, Callable[..., Any]]:
    return {name: getattr(home, name) for name in names.split()}


def _part(pair: Any, name: str) -> Tensor:
    """Values or indices of what a maximum, a sort or the like gives."""
    part: Tensor = {"values": pair[0], "indices": pair[1]}[name]
    return part


STARTS: dict[str, Callable[..., Any]] = {
    "softmax": _softmax(F.softmax),
    "log_softmax": _softmax(F.log_softmax),
    "softmin": _softmax(F.softmin),
    "clamp": torch.clamp,
    "clip": torch.clamp,
    "hardtanh": _out_of_place(F.hardtanh),
    "interpolate": F.interpolate,
    **_of(torch, "sigmoid tanh exp expm1 log log1p logit sqrt rsqrt square pow reciprocal sin cos atan erf"),
    **_of(F, "logsigmoid softplus softsign tanhshrink gelu"),
    **{
        name: _out_of_place(getattr(F, name))
        for name in ("hardsigmoid", "elu", "selu", "celu", "leaky_relu", "silu", "mish", "hardswish")
    },
    **_of(torch, "round floor ceil sign"),
    **_of(torch, "argmax argmin argsort sort topk logsumexp norm std var"),
    **_of(operator, "gt ge lt le eq ne"),
    **_of(F, "normalize cosine_similarity pairwise_distance"),
    "vector_norm": torch.linalg.vector_norm,
    "linalg_norm": torch.linalg.norm,
}
"""Operations that the host takes over where nothing but such operations stands behind them, by name."""

MATRIX_PRODUCTS: dict[str, Callable[..., Any]] = _of(torch, "matmul bmm")

PRODUCTS: dict[str, Callable[..., Any]] = {**_of(operator, "mul truediv"), "div": torch.div, **MATRIX_PRODUCTS}
"""Operations that the host takes over where they join two values: fixed synapses carry out the others."""

FOLLOWS: dict[str, Callable[..., Any]] = {
    **_of(operator, "neg getitem"),
    "getattr": _part,
    "add": lambda x, y, alpha=1: x + y * alpha if alpha != 1 else x + y,
    "sub": lambda x, y, alpha=1: x - y * alpha if alpha != 1 else x - y,
    "to": lambda x, dtype, *_, **__: x.to(dtype),
    "reshape": lambda x, *shape: x.reshape(*shape),
    "view": lambda x, *shape: x.reshape(*shape),
    "expand": lambda x, *shape: x.expand(*shape),
    "expand_as": lambda x, other: x.expand_as(other),
    **_of(torch, "rsub sum mean abs amax amin max min prod cumsum clamp_min clamp_max maximum minimum"),
    # As a function, and as a method of what is kept.
    "where": lambda x, y, other: torch.where(x, y, other) if x.dtype == torch.bool else torch.where(y, x, other),
    **_of(torch, "flatten unflatten permute transpose t squeeze unsqueeze"),
    **_of(torch, "cat stack chunk split select movedim unbind"),
    **_of(torch, "logical_and logical_or logical_not"),
    **dict.fromkeys(("contiguous", "clone", "detach", "dropout"), lambda x, *_, **__: x),
    **{name: (lambda x, name=name: getattr(x, name)()) for name in ("float", "long", "int", "double", "bool")},
}
"""Operations that may stand behind those."""

OPERATIONS: Mapping[str, Callable[..., Any]] = FOLLOWS | PRODUCTS | STARTS


def _with(name: str, *settings: str, **renamed: str) -> Callable[[Any], tuple[str, dict[str, Any]]]:
    """An operation, and the attributes of a module that hold its settings."""
    attributes = {each: each for each in settings} | renamed
    return lambda module: (name, {setting: getattr(module, own) for setting, own in attributes.items()})


MODULES: dict[type[nn.Module], Callable[[Any], tuple[str, dict[str, Any]]]] = {
    nn.Softmax: _with("softmax", "dim"),
    nn.LogSoftmax: _with("log_softmax", "dim"),
    nn.Softmin: _with("softmin", "dim"),
    nn.Softmax2d: lambda m: ("softmax", {"dim": -3}),
    nn.Sigmoid: _with("sigmoid"),
    nn.LogSigmoid: _with("logsigmoid"),
    nn.Hardsigmoid: _with("hardsigmoid"),
    nn.Tanh: _with("tanh"),
    nn.Softplus: _with("softplus", "beta", "threshold"),
    nn.Softsign: _with("softsign"),
    nn.Tanhshrink: _with("tanhshrink"),
    nn.GELU: _with("gelu", "approximate"),
    nn.SiLU: _with("silu"),
    nn.Mish: _with("mish"),
    nn.Hardswish: _with("hardswish"),
    nn.ELU: _with("elu", "alpha"),
    nn.SELU: _with("selu"),
    nn.CELU: _with("celu", "alpha"),
    nn.LeakyReLU: _with("leaky_relu", "negative_slope"),
    nn.Hardtanh: _with("hardtanh", "min_val", "max_val"),
    nn.CosineSimilarity: _with("cosine_similarity", "dim", "eps"),
    nn.PairwiseDistance: _with("pairwise_distance", "eps", "keepdim", p="norm"),
    nn.Upsample: _with("interpolate", "size", "scale_factor", "mode", "align_corners", "recompute_scale_factor"),
    nn.Flatten: _with("flatten", "start_dim", "end_dim"),
    nn.Unflatten: _with("unflatten", "dim", sizes="unflattened_size"),
    nn.Identity: _with("contiguous"),
    nn.Dropout: _with("contiguous"),
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
class ForEachImage:
    """A constant ``[1, *shape]`` that each image has: a tensor like an activation, filled with numbers."""

    value: Tensor


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
            if isinstance(each, ForEachImage):
                return each.value.to(outputs[0].device).expand(batch, *each.value.shape[1:])
            if isinstance(each, tuple | list):
                return type(each)(filled(part) for part in each)
            return each.to(outputs[0].device) if isinstance(each, Tensor) else each

        for call in self.calls:
            kwargs = {name: filled(value) for name, value in call.kwargs.items()}
            values.append(OPERATIONS[call.name](*filled(call.args), **kwargs))
        return [values[index] for index in self.results]

    def check_apart(self, outputs: Sequence[Tensor]) -> None:
        """Raise ValueError unless each image's results depend on its own outputs alone.

        Parameters
        ----------
        outputs : sequence of Tensor
            Outputs of some images, ``[B, *shape]`` each, to try it on.
        """
        more = [torch.cat([each, each.flip(0) * 0.75 + 0.125]) for each in outputs]
        first = max(1, len(more[0]) // 3)
        try:
            together = self.run(more)
            one, other = self.run([each[:first] for each in more]), self.run([each[first:] for each in more])
        except (RuntimeError, ValueError, IndexError, TypeError) as error:
            raise ValueError(f"it does not run on another number of images: {error}") from error
        for whole, *parts in zip(together, one, other, strict=True):
            lengths = [len(each) if each.dim() else 0 for each in (whole, *parts)]
            alike = lengths == [len(more[0]), first, len(more[0]) - first]
            alike = alike and len({each.shape[1:] for each in (whole, *parts)}) == 1
            if alike:
                same = torch.isclose(whole, torch.cat(parts), rtol=1e-3, equal_nan=True)
                # Two values may be nearly alike, and in another order of sums the other is the larger one.
                alike = float((~same).double().mean()) <= (0.0 if whole.is_floating_point() else 0.1)
            if not alike:
                raise ValueError("its results for one image depend on the other images")

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
    if isinstance(value, ForEachImage):
        return {"images": _to_json(value.value)}
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
    if kind == "images" and isinstance(part := _from_json(held, known), Tensor) and part.dim() and len(part) == 1:
        return ForEachImage(part)
    if kind == "ellipsis":
        return Ellipsis
    if kind == "slice" and isinstance(held, list) and len(held) == 3:
        return slice(*held)
    if kind in ("tuple", "list") and isinstance(held, list):
        parts = [_from_json(each, known) for each in held]
        return tuple(parts) if kind == "tuple" else parts
    raise ValueError("its host program is damaged")


__all__ = [
    "MATRIX_PRODUCTS",
    "MODULES",
    "OPERATIONS",
    "PRODUCTS",
    "STARTS",
    "BatchSize",
    "Call",
    "ForEachImage",
    "HostProgram",
    "Ref",
    "starts",
]
