"""The table of operators: what each operation of a ReLU network becomes, and how exactly.

One table serves every stage: tracing turns functions and methods into the modules listed here, checking refuses
what is not listed, the later stages ask for an operation's role alone, and README's table is made of it.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, Protocol

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from quartz_plugin.activation import TTFSActivation
from quartz_plugin.operators.modules import (
    AVERAGES,
    PADDING_MODES,
    WEIGHTED,
    Add,
    Concatenate,
    Mean,
    Permute,
    Reshape,
    Slice,
)


class ConversionError(ValueError):
    """The network cannot be converted; the message names the module and says what could be done."""


class Refusal(Exception):  # noqa: N818
    """Why an operation cannot be converted; tracing adds where it stands."""


class Affine(nn.Module):
    """Per-channel ``x * weight + bias``: batch norms, constants and preprocessing while they are not yet folded.

    Parameters
    ----------
    weight, bias : Tensor
        Broadcastable to one sample's shape.
    """

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.detach().clone(), requires_grad=False)
        self.bias = nn.Parameter(bias.detach().clone(), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """Scale and shift."""
        return x * self.weight + self.bias


class Role(Enum):
    """What an operation means to a network of spikes."""

    SYNAPSE = "synapses"
    ROUTE = "routing"
    RECTIFIER = "spiking layer"
    MAX_POOL = "first-spike max pooling"
    NOTHING = "dropped"


def _accept(module: Any) -> str | None:
    return None


@dataclass(frozen=True, eq=False)
class Operator:
    """One row of the table.

    Attributes
    ----------
    role : Role
        What the operation means to a network of spikes.
    how : str
        How it is converted.
    exact : str
        "exact", or when it is not.
    refusal : callable
        Takes the module; returns why this one is refused (and what to do), or None.
    """

    role: Role
    how: str
    exact: str = "exact"
    refusal: Callable[[Any], str | None] = _accept


def _uses_batch_statistics(norm: Any) -> str | None:
    if norm.running_mean is None:
        return _BATCH_STATISTICS
    return None


def _pools_indices(pool: Any) -> str | None:
    return "it returns indices; use return_indices=False" if getattr(pool, "return_indices", False) else None


def _flattens_batch(flatten: Any) -> str | None:
    return None if flatten.start_dim != 0 else "it flattens the batch; use start_dim=1"


def _unflattens_batch(unflatten: Any) -> str | None:
    return "it unflattens the batch; use dim=1" if unflatten.dim == 0 else None


def _is_no_clipped_relu(hardtanh: Any) -> str | None:
    if hardtanh.min_val != 0 or hardtanh.max_val <= 0:
        return f"it clips at {hardtanh.min_val} and {hardtanh.max_val}; only a lower bound of 0 is a ReLU's"
    return None


def _interpolates(upsample: Any) -> str | None:
    if upsample.mode not in ("nearest", "nearest-exact"):
        return f'it interpolates (mode={upsample.mode!r}), and only copies of spikes are spikes; use mode="nearest"'
    return None


def _pads_with_a_constant(pad: Any) -> str | None:
    return None if getattr(pad, "value", 0) == 0 else _PADDED_BY_A_CONSTANT


_PADDED_BY_A_CONSTANT = "it pads with a constant other than 0, which nothing says; pad with 0"
_BATCH_STATISTICS = "it normalises by the statistics of each batch; use track_running_stats=True"
BATCH = "it mixes the batch with the units of a sample; keep dimension 0 apart"
_PRODUCT = "it multiplies two activations, and synapses are fixed weights: the network is no ReLU network"

_CONVOLUTION = Operator(Role.SYNAPSE, "weights scaled, bias moved to the neurons; maps in a row act as one")
_AVERAGE = Operator(Role.SYNAPSE, "linear, unrounded: part of the synapses that follow")
_NORM = Operator(
    Role.SYNAPSE,
    "folded into the layer before, or into the synapses that follow; its shift into the neurons' bias "
    "(without running statistics: refused)",
    refusal=_uses_batch_statistics,
)
_CONSTANTS = Operator(Role.SYNAPSE, "by or with constants: folded into the synapses that follow")
_ADD = Operator(Role.SYNAPSE, "currents add; scales are met by weights, times by delays")
_RECTIFIER = Operator(Role.RECTIFIER, "a layer of TTFSNeuron", "exact with hold; without, exact but for early spikes")
_CLIPPED = Operator(
    Role.RECTIFIER,
    "a layer of TTFSNeuron whose value 1 is at most the upper bound (lower bounds other than 0: refused)",
    "exact with hold; without, an early spike can say more than the bound",
    refusal=_is_no_clipped_relu,
)
_ROUNDED = Operator(
    Role.RECTIFIER, "a layer of TTFSNeuron that says the values of the activation (hold only)", "exact with hold"
)
_MAX_POOL = Operator(
    Role.MAX_POOL,
    "the first spike passes, once; moved behind a ReLU that follows; neurons in front of sums that cannot be negative "
    "(of other signed values, or with indices: refused)",
    refusal=_pools_indices,
)
_ROUTE = Operator(Role.ROUTE, "routes spikes (where it mixes the batch with a sample's units: refused)")
_COPIES = Operator(Role.ROUTE, "routes copies of spikes (modes but nearest: refused)", refusal=_interpolates)
_PAD = Operator(
    Role.ROUTE, "silent units at the border (constants other than 0: refused)", refusal=_pads_with_a_constant
)
_BORDER = Operator(Role.ROUTE, "routes copies of spikes to the border")
_DROPPED = Operator(Role.NOTHING, "nothing in eval mode")

NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)

DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.AlphaDropout)

OPERATORS: dict[type[nn.Module], Operator] = {
    **dict.fromkeys(WEIGHTED, _CONVOLUTION),
    **dict.fromkeys(NORMS, _NORM),
    Affine: _CONSTANTS,
    **dict.fromkeys(AVERAGES, _AVERAGE),
    Add: _ADD,
    nn.ReLU: _RECTIFIER,
    **dict.fromkeys((nn.ReLU6, nn.Hardtanh), _CLIPPED),
    TTFSActivation: _ROUNDED,
    **dict.fromkeys((nn.MaxPool1d, nn.MaxPool2d, nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d), _MAX_POOL),
    nn.Flatten: Operator(Role.ROUTE, _ROUTE.how, refusal=_flattens_batch),
    nn.Unflatten: Operator(Role.ROUTE, _ROUTE.how, refusal=_unflattens_batch),
    **dict.fromkeys((Concatenate, Slice, Permute, Reshape), _ROUTE),
    **dict.fromkeys((nn.PixelShuffle, nn.PixelUnshuffle, nn.ChannelShuffle), _ROUTE),
    **dict.fromkeys((nn.Upsample, nn.UpsamplingNearest2d), _COPIES),
    **{kind: _PAD if mode == "constant" else _BORDER for kind, mode in PADDING_MODES.items()},
    **dict.fromkeys((*DROPOUTS, nn.Identity), _DROPPED),
}
"""What each module class becomes; what stands neither here nor among the functions is refused."""

_NOT_PIECEWISE_LINEAR = "it is not a ReLU; train the network with nn.ReLU in its place"
MONOTONE_OUTPUT = "leave it out: the predicted class is the same without it"
_OWN_STATISTICS = "it normalises by statistics of its own input; train the network with batch norm in its place"
_ATTENTION = "it multiplies activations with each other, and synapses are fixed weights"

REASONS: dict[Any, str] = {
    **dict.fromkeys(
        (
            nn.Sigmoid,
            nn.Hardsigmoid,
            nn.Tanh,
            nn.GELU,
            nn.SiLU,
            nn.ELU,
            nn.LeakyReLU,
            nn.PReLU,
            nn.Hardswish,
            nn.Softplus,
            nn.Mish,
            F.sigmoid,
            F.tanh,
            F.gelu,
            F.silu,
            F.elu,
            F.leaky_relu,
            F.hardswish,
            torch.sigmoid,
            torch.tanh,
            "sigmoid",
            "tanh",
        ),
        _NOT_PIECEWISE_LINEAR,
    ),
    **dict.fromkeys((nn.LayerNorm, nn.GroupNorm, nn.InstanceNorm1d, nn.InstanceNorm2d), _OWN_STATISTICS),
    **dict.fromkeys((F.layer_norm, F.group_norm, F.instance_norm), _OWN_STATISTICS),
    **dict.fromkeys((nn.MultiheadAttention, nn.Bilinear), _ATTENTION),
    **dict.fromkeys((nn.Softmax, nn.LogSoftmax, F.softmax, F.log_softmax, torch.softmax), MONOTONE_OUTPUT),
    **dict.fromkeys((torch.log_softmax, "softmax", "log_softmax"), MONOTONE_OUTPUT),
}
"""Why some operations that people ask for are refused, and what to do."""

_SOFTMAXES = frozenset(target for target, reason in REASONS.items() if reason is MONOTONE_OUTPUT)
MONOTONE: frozenset[Any] = _SOFTMAXES | {
    nn.Softmax2d, nn.Sigmoid, nn.LogSigmoid, F.sigmoid, F.logsigmoid, torch.sigmoid, "sigmoid", torch.argmax, "argmax"
}  # fmt: skip
"""What may be left out at the end of a network: the decision is the same without it."""

_SHARES = (
    "it divides values by their sum, which no fixed synapses do, and inside a network it cannot be left out; train the "
    "network without it"
)
INSIDE: dict[Any, str] = dict.fromkeys((*_SOFTMAXES, nn.Softmax2d), _SHARES)
"""Reasons against some of them elsewhere."""


def role_of(module: nn.Module) -> Role:
    """Return the role of a module that has passed the check."""
    return OPERATORS[type(module)].role


def ceiling_of(rectifier: nn.Module) -> float | None:
    """Upper bound of a ReLU6 or Hardtanh; None for a ReLU."""
    return float(rectifier.max_val) if isinstance(rectifier, nn.Hardtanh) else None


Rule = Callable[[Any], nn.Module]
RULES: dict[type[nn.Module], Rule] = {}
"""What users have registered with :func:`register_rule`."""


def register_rule(module_class: type[nn.Module], rule: Rule) -> None:
    """Teach `convert` a module class of your own.

    Wherever a network holds a module of exactly this class, the module that the rule returns is converted in its
    place. It must compute the same in eval mode; `convert` compares the two on an example.

    Parameters
    ----------
    module_class : type
        The class; torch's own classes may be given rules too.
    rule : callable
        Takes the module (a copy in eval mode) and returns an ``nn.Module`` of operations that can be converted.

    Raises
    ------
    TypeError
        If `module_class` is no module class, or `rule` cannot be called.

    Examples
    --------
    A ReLU with a learned upper bound:

    >>> import torch, quartz_plugin
    >>> class LearnedClip(nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.bound = nn.Parameter(torch.tensor(2.0))
    ...     def forward(self, x):
    ...         return torch.minimum(x.relu(), self.bound)
    >>> quartz_plugin.register_rule(LearnedClip, lambda module: nn.Hardtanh(0.0, module.bound.item()))
    >>> ann = nn.Sequential(nn.Linear(4, 8), LearnedClip(), nn.Linear(8, 2))
    >>> quartz_plugin.convert(ann, torch.rand(32, 4)).report[1]["became"]
    'spiking layer'
    """
    if not (isinstance(module_class, type) and issubclass(module_class, nn.Module)):
        raise TypeError(f"module_class must be a subclass of torch.nn.Module, got {module_class!r}")
    if not callable(rule):
        raise TypeError(f"rule must take a module and return one, got {rule!r}")
    RULES[module_class] = rule


@dataclass(frozen=True, eq=False)
class Value:
    """A tensor of the network while it is traced: the node that gives it, and what it is on the example."""

    node: fx.Node
    tensor: Tensor


class Append(Protocol):
    """Appends a module to the traced network, called on these values."""

    def __call__(self, module: nn.Module, *inputs: Value) -> Value:
        """Return what the module gives."""


Build = Callable[..., Any]


@dataclass(frozen=True, eq=False)
class Function:
    """A function or method of the table: its row, and how modules stand for it.

    ``build(append, *args, **kwargs)`` gets the call's arguments, with a :class:`Value` for each tensor of the
    network and constants as they are; returns the result, or raises :class:`Refusal`.
    """

    row: Operator
    build: Build


def norm_as_affine(
    mean: Tensor, variance: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """Weight and bias (float64, ``[channels]``) of a batch norm in eval mode."""
    gain = torch.rsqrt(variance.detach().double() + eps)
    if weight is not None:
        gain = gain * weight.detach().double()
    shift = -mean.detach().double() * gain
    if bias is not None:
        shift = shift + bias.detach().double()
    return gain, shift


def _module(kind: Callable[..., nn.Module]) -> Build:
    """Stand a module in for a function with the same arguments behind its input."""
    return lambda append, input, *args, **kwargs: append(kind(*args, **kwargs), input)


def _kept(target: Any) -> Build:
    """Keep the values: the same tensor, or a copy of its own that changes in place apart."""

    def build(append: Append, input: Value, *args: Any, **kwargs: Any) -> Value:
        others = [arg.tensor if isinstance(arg, Value) else arg for arg in args]
        out = call(target, input.tensor, *others, **kwargs)
        if out.dtype not in (torch.float32, torch.float64):
            raise Refusal(f"it converts to {out.dtype}, which rounds; leave values in floating point")
        same = out.data_ptr() == input.tensor.data_ptr()
        return input if same else Value(input.node, input.tensor.clone())

    return build


def _relu(append: Append, input: Value, inplace: bool = False) -> Value:
    return append(nn.ReLU(), input)


def _relu6(append: Append, input: Value, inplace: bool = False) -> Value:
    return append(nn.ReLU6(), input)


def _hardtanh(
    append: Append, input: Value, min_val: float = -1.0, max_val: float = 1.0, inplace: bool = False
) -> Value:
    return append(nn.Hardtanh(min_val, max_val), input)


def _clamp(append: Append, input: Value, min: Any = None, max: Any = None) -> Value:
    if isinstance(min, Value | Tensor) or isinstance(max, Value | Tensor) or min != 0:
        raise Refusal(f"it clips at {min} and {max}; only a lower bound of 0 is a ReLU's")
    return append(nn.ReLU() if max is None else nn.Hardtanh(0.0, max), input)


def _max_pool(kind: Callable[..., nn.Module]) -> Build:
    def build(
        append: Append,
        input: Value,
        kernel_size: Any,
        stride: Any = None,
        padding: Any = 0,
        dilation: Any = 1,
        ceil_mode: bool = False,
        return_indices: bool = False,
    ) -> Value:
        return append(kind(kernel_size, stride, padding, dilation, return_indices, ceil_mode), input)

    return build


def _adaptive_max_pool(kind: Callable[..., nn.Module]) -> Build:
    def build(append: Append, input: Value, output_size: Any, return_indices: bool = False) -> Value:
        return append(kind(output_size, return_indices), input)

    return build


def _reshaped(target: Any) -> Build:
    def build(append: Append, input: Value, *args: Any, **kwargs: Any) -> Value:
        # contiguous() is dropped, so a view may have to copy here.
        out = call("reshape" if target == "view" else target, input.tensor, *args, **kwargs)
        if out.dim() == 0 or len(out) != len(input.tensor):
            raise Refusal(BATCH)
        if out.shape == input.tensor.shape:
            return input
        return append(nn.Flatten() if out.dim() == 2 else Reshape(out.shape[1:]), input)

    return build


def _permuted(target: Any) -> Build:
    def build(append: Append, input: Value, *args: Any, **kwargs: Any) -> Value:
        # The sizes of a tensor shaped like the order of its dimensions tell their new order.
        order = torch.empty(tuple(range(1, input.tensor.dim() + 1)), device="meta")
        dims = [size - 1 for size in call(target, order, *args, **kwargs).shape]
        if dims[0] != 0:
            raise Refusal(BATCH)
        return append(Permute(dims), input)

    return build


def _pieces(target: Any) -> Build:
    def build(append: Append, input: Value, sections: Any = None, dim: int = 0, **named: Any) -> list[Value]:
        dim = _unit_dim(dim, input)
        if sections is None:
            # torch calls it chunks, split_size or split_size_or_sections.
            (sections,) = named.values()
        pieces, start = [], 0
        for piece in call(target, input.tensor, sections, dim):
            pieces.append(append(Slice(dim, start, start + piece.shape[dim]), input))
            start += piece.shape[dim]
        return pieces

    return build


def _narrow(append: Append, input: Value, dim: int, start: int, length: int) -> Value:
    return append(Slice(_unit_dim(dim, input), start, start + length), input)


def _getitem(append: Append, input: Value, index: Any) -> Value:
    index = list(index) if isinstance(index, tuple) else [index]
    if any(not isinstance(part, slice | int) and part is not None and part is not Ellipsis for part in index):
        raise Refusal("it picks units by a tensor or a list; slices, whole numbers, None and ... are routed")
    rank, used = input.tensor.dim(), sum(part is not None and part is not Ellipsis for part in index)
    if Ellipsis not in index:
        index.append(Ellipsis)
    place = index.index(Ellipsis)
    index[place : place + 1] = [slice(None)] * (rank - used)
    if not index or index[0] != slice(None):
        raise Refusal(BATCH)
    value, dim = input, 0
    for part in index:
        if part is None:
            continue
        if dim > 0:
            size = value.tensor.shape[dim]
            if isinstance(part, int):
                part = slice(part % size, part % size + 1)
            taken = range(*part.indices(size))
            if taken != range(size):
                value = append(Slice(dim, taken.start, taken.stop, taken.step), value)
        dim += 1
    shape = input.tensor[tuple(index)].shape
    return value if value.tensor.shape == shape else append(Reshape(shape[1:]), value)


def _cat(append: Append, tensors: Sequence[Any], dim: int = 0) -> Value:
    if not all(isinstance(value, Value) for value in tensors):
        raise Refusal("it puts a constant beside activations; pad with zeros (F.pad) where these are meant")
    return append(Concatenate(_unit_dim(dim, tensors[0])), *tensors)


def _stack(append: Append, tensors: Sequence[Any], dim: int = 0) -> Value:
    unsqueezed = _reshaped("unsqueeze")
    rows = [unsqueezed(append, value, dim) if isinstance(value, Value) else value for value in tensors]
    return _cat(append, rows, dim)


def _add(append: Append, input: Any, other: Any, *, alpha: float = 1) -> Value:
    if isinstance(input, Value) and isinstance(other, Value):
        if input.tensor.shape != other.tensor.shape:
            shapes = f"{list(input.tensor.shape[1:])} and {list(other.tensor.shape[1:])}"
            raise Refusal(f"it adds tensors of different shapes, {shapes}; give both one shape")
        return append(Add(), input, _scaled(append, other, alpha))
    if isinstance(input, Value):
        return _shifted(append, input, other * alpha)
    return _shifted(append, _scaled(append, other, alpha), input)


def _subtract(append: Append, input: Any, other: Any, *, alpha: float = 1) -> Value:
    return _add(append, input, other, alpha=-alpha)


def _multiply(append: Append, input: Any, other: Any) -> Value:
    if isinstance(input, Value) and isinstance(other, Value):
        raise Refusal(_PRODUCT)
    return _scaled(append, input, other) if isinstance(input, Value) else _scaled(append, other, input)


def _divide(append: Append, input: Any, other: Any) -> Value:
    if isinstance(other, Value):
        raise Refusal(_PRODUCT.replace("multiplies two", "divides by"))
    return _scaled(append, input, 1 / torch.as_tensor(other, dtype=torch.float64))


def _negate(append: Append, input: Value) -> Value:
    return _scaled(append, input, -1.0)


def _mean(append: Append, input: Value, dim: Any = None, keepdim: bool = False) -> Value:
    dims = range(input.tensor.dim()) if dim is None else [dim] if isinstance(dim, int) else dim
    return append(Mean([_unit_dim(d, input) for d in dims], keepdim), input)


def _sum(append: Append, input: Value, dim: Any = None, keepdim: bool = False) -> Value:
    mean = _mean(append, input, dim, keepdim)
    return _scaled(append, mean, input.tensor[0].numel() / mean.tensor[0].numel())


def _pad(append: Append, input: Value, pad: Sequence[int], mode: str = "constant", value: float | None = None) -> Value:
    if value:
        raise Refusal(_PADDED_BY_A_CONSTANT)
    return append(padding_of(mode, tuple(pad), input.tensor.dim()), input)


_PADS: dict[str, tuple[Any, ...]] = {
    "constant": (nn.ZeroPad1d, nn.ZeroPad2d, nn.ZeroPad3d),
    "reflect": (nn.ReflectionPad1d, nn.ReflectionPad2d),
    "replicate": (nn.ReplicationPad1d, nn.ReplicationPad2d),
    "circular": (nn.CircularPad1d, nn.CircularPad2d),
}


def padding_of(mode: str, pads: tuple[int, ...], dims: int) -> nn.Module:
    """The module that pads as many dimensions as `pads` names, of an input of so many, in torch's mode."""
    rank = len(pads) // 2
    if rank >= dims or rank > len(_PADS.get(mode, ())) or rank == 0:
        raise Refusal(f"it pads {rank} dimensions with mode={mode!r}; padding of units of a sample is routed")
    module: nn.Module = _PADS[mode][rank - 1](pads)
    return module


def _dropout(append: Append, input: Value, p: float = 0.5, training: bool = True, inplace: bool = False) -> Value:
    if training and p > 0:
        raise Refusal("it drops units in eval mode as well; pass training=self.training")
    return input


def _interpolate(
    append: Append,
    input: Value,
    size: Any = None,
    scale_factor: Any = None,
    mode: str = "nearest",
    align_corners: bool | None = None,
    recompute_scale_factor: bool | None = None,
    antialias: bool = False,
) -> Value:
    if recompute_scale_factor:
        size, scale_factor = F.interpolate(input.tensor, None, scale_factor).shape[2:], None
    return append(nn.Upsample(size, scale_factor, mode), input)


def _convolution(kind: Any) -> Build:
    def build(append: Append, input: Value, weight: Any, bias: Any = None, *args: Any, **kwargs: Any) -> Value:
        names = ["stride", "padding", "dilation", "groups"]
        if issubclass(kind, nn.ConvTranspose1d | nn.ConvTranspose2d):
            names = ["stride", "padding", "output_padding", "groups", "dilation"]
        options = dict(zip(names, args, strict=False)) | kwargs
        _check_constant(weight, bias)
        groups = options.get("groups", 1)
        rows, columns = weight.shape[:2]
        inputs, outputs = (rows, columns * groups) if "output_padding" in names else (columns * groups, rows)
        module = kind(inputs, outputs, tuple(weight.shape[2:]), bias=bias is not None, **options, device="meta")
        return append(_with_weights(module, weight, bias), input)

    return build


def _linear(append: Append, input: Value, weight: Any, bias: Any = None) -> Value:
    _check_constant(weight, bias)
    module = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    return append(_with_weights(module, weight, bias), input)


def _matmul(append: Append, input: Any, other: Any) -> Value:
    if not isinstance(input, Value) or isinstance(other, Value) or other.dim() != 2:
        raise Refusal(_ATTENTION if isinstance(other, Value) else "write it as x @ weight, or as nn.Linear")
    return _linear(append, input, other.t())


def _batch_norm(
    append: Append,
    input: Value,
    running_mean: Any,
    running_var: Any,
    weight: Any = None,
    bias: Any = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Value:
    if training or running_mean is None:
        raise Refusal(_BATCH_STATISTICS)
    shape = (-1, *[1] * (input.tensor.dim() - 2))
    gain, shift = norm_as_affine(running_mean, running_var, weight, bias, eps)
    return append(Affine(gain.view(shape).to(input.tensor), shift.view(shape).to(input.tensor)), input)


def _check_constant(*weights: Any) -> None:
    if any(isinstance(weight, Value) for weight in weights):
        raise Refusal(_ATTENTION)


def _with_weights(module: Any, weight: Tensor, bias: Tensor | None) -> nn.Module:
    module.weight = nn.Parameter(weight.detach().clone(), requires_grad=False)
    if bias is not None:
        module.bias = nn.Parameter(bias.detach().clone(), requires_grad=False)
    return module  # type: ignore[no-any-return]


def _unit_dim(dim: int, value: Value) -> int:
    dim = dim % value.tensor.dim()
    if dim == 0:
        raise Refusal(BATCH)
    return dim


def _scaled(append: Append, value: Value, factor: Any) -> Value:
    factor = _constant(factor, value)
    if bool((factor == 1).all()):
        return value
    return append(Affine(factor, torch.zeros_like(factor)), value)


def _shifted(append: Append, value: Value, shift: Any) -> Value:
    shift = _constant(shift, value)
    if bool((shift == 0).all()):
        return value
    return append(Affine(torch.ones_like(shift), shift), value)


def _constant(constant: Any, value: Value) -> Tensor:
    """Return a constant without the batch dimension, as `value`'s type, where it fits one sample of it."""
    if not isinstance(constant, int | float | Tensor):
        raise Refusal(f"it computes with {type(constant).__name__}, which is no number or tensor")
    constant = constant.detach() if isinstance(constant, Tensor) else torch.tensor(constant, dtype=torch.float64)
    sample = value.tensor.shape[1:]
    if 0 < constant.dim() < len(sample):
        # Aligned with the last dimensions; said in full, it cannot be taken for one number a channel.
        constant = constant.reshape((1,) * (len(sample) - constant.dim()) + constant.shape)
    if constant.dim() == value.tensor.dim():
        if not bool((constant == constant[:1]).all()):
            raise Refusal("its constant differs from image to image of a batch")
        constant = constant[0]
    try:
        fits = torch.broadcast_shapes(constant.shape, sample) == sample
    except RuntimeError:
        fits = False
    if not fits or not bool(torch.isfinite(constant).all()):
        raise Refusal(f"its constant, of shape {list(constant.shape)}, does not fit units of shape {list(sample)}")
    fitting: Tensor = constant.to(value.tensor)
    return fitting


def call(target: Any, *args: Any, **kwargs: Any) -> Any:
    """Call a function, or the method of that name of the first argument."""
    if isinstance(target, str):
        return getattr(args[0], target)(*args[1:], **kwargs)
    return target(*args, **kwargs)


def _table(rows: Iterable[tuple[Operator, Build, Iterable[Any]]]) -> dict[Any, Function]:
    return {target: Function(row, build) for row, build, targets in rows for target in targets}


FUNCTIONS: dict[Any, Function] = _table(
    [
        (_CONVOLUTION, _convolution(nn.Conv1d), [F.conv1d, torch.conv1d]),
        (_CONVOLUTION, _convolution(nn.Conv2d), [F.conv2d, torch.conv2d]),
        (_CONVOLUTION, _convolution(nn.ConvTranspose1d), [F.conv_transpose1d]),
        (_CONVOLUTION, _convolution(nn.ConvTranspose2d), [F.conv_transpose2d]),
        (_CONVOLUTION, _linear, [F.linear]),
        (_CONVOLUTION, _matmul, [torch.matmul, operator.matmul, "matmul"]),
        (_NORM, _batch_norm, [F.batch_norm]),
        (_CONSTANTS, _multiply, [operator.mul, operator.imul, torch.mul, torch.multiply, "mul", "mul_"]),
        (_CONSTANTS, _divide, [operator.truediv, operator.itruediv, torch.div, "div", "div_"]),
        (_CONSTANTS, _negate, [operator.neg, torch.neg, "neg"]),
        (_ADD, _add, [operator.add, operator.iadd, torch.add, "add", "add_"]),
        (_ADD, _subtract, [operator.sub, operator.isub, torch.sub, "sub", "sub_"]),
        (_AVERAGE, _module(nn.AvgPool1d), [F.avg_pool1d]),
        (_AVERAGE, _module(nn.AvgPool2d), [F.avg_pool2d]),
        (_AVERAGE, _module(nn.AdaptiveAvgPool1d), [F.adaptive_avg_pool1d]),
        (_AVERAGE, _module(nn.AdaptiveAvgPool2d), [F.adaptive_avg_pool2d]),
        (_AVERAGE, _mean, [torch.mean, "mean"]),
        (_AVERAGE, _sum, [torch.sum, "sum"]),
        (_RECTIFIER, _relu, [F.relu, F.relu_, torch.relu, torch.relu_, "relu", "relu_"]),
        (_CLIPPED, _relu6, [F.relu6]),
        (_CLIPPED, _hardtanh, [F.hardtanh, F.hardtanh_]),
        (_CLIPPED, _clamp, [torch.clamp, torch.clip, "clamp", "clamp_", "clip", "clamp_min", "clamp_min_"]),
        (_MAX_POOL, _max_pool(nn.MaxPool1d), [F.max_pool1d]),
        (_MAX_POOL, _max_pool(nn.MaxPool2d), [F.max_pool2d]),
        (_MAX_POOL, _adaptive_max_pool(nn.AdaptiveMaxPool1d), [F.adaptive_max_pool1d]),
        (_MAX_POOL, _adaptive_max_pool(nn.AdaptiveMaxPool2d), [F.adaptive_max_pool2d]),
        *(
            (_ROUTE, _reshaped(target), [target])
            for function, names in (
                (torch.flatten, "flatten"),
                (torch.reshape, "reshape"),
                (torch.unflatten, "unflatten"),
                (torch.squeeze, "squeeze"),
                (torch.unsqueeze, "unsqueeze"),
                (None, "view"),
            )
            for target in (function, names)
            if target is not None
        ),
        *(
            (_ROUTE, _permuted(target), [target])
            for target in (torch.permute, "permute", torch.transpose, "transpose", torch.swapaxes, "swapaxes")
        ),
        *((_ROUTE, _pieces(target), [target]) for target in (torch.chunk, "chunk", torch.split, "split")),
        (_ROUTE, _narrow, [torch.narrow, "narrow"]),
        (_ROUTE, _getitem, [operator.getitem]),
        (_ROUTE, _cat, [torch.cat, torch.concat, torch.concatenate]),
        (_ROUTE, _stack, [torch.stack]),
        (_ROUTE, _module(nn.PixelShuffle), [F.pixel_shuffle]),
        (_ROUTE, _module(nn.PixelUnshuffle), [F.pixel_unshuffle]),
        (_ROUTE, _module(nn.ChannelShuffle), [F.channel_shuffle]),
        (_COPIES, _interpolate, [F.interpolate]),
        (_PAD, _pad, [F.pad]),
        (_DROPPED, _dropout, [F.dropout, F.dropout1d, F.dropout2d, F.alpha_dropout]),
        *(
            (_DROPPED, _kept(target), [target])
            for target in ("contiguous", "clone", torch.clone, "detach", "to", "float", "double", "type_as")
        ),
    ]
)
"""Functions and methods that tracing replaces by modules of the table; methods by name."""

SHAPE_QUERIES: frozenset[Any] = frozenset(
    {getattr, "size", "dim", "ndimension", "numel", "nelement", "stride", "new_zeros", "new_ones"}
    | {torch.zeros_like, torch.ones_like}
)
"""What asks for a shape alone, which is known, since a converted network takes inputs of one shape."""
SHAPE_ATTRIBUTES = frozenset({"shape", "ndim", "dtype", "device", "is_cuda", "requires_grad"})


def operator_table() -> str:
    """Return the table as Markdown: what is converted, how, how exactly; then what is refused, and why."""
    converted: dict[tuple[str, str, str], list[str]] = {}
    for kind, row in OPERATORS.items():
        if kind.__module__.startswith("torch.nn"):
            converted.setdefault((row.role.value, row.how, row.exact), []).append(f"nn.{kind.__name__}")
    for target, function in FUNCTIONS.items():
        row = function.row
        names = converted.setdefault((row.role.value, row.how, row.exact), [])
        if (name := _spelled(target)) not in names:
            names.append(name)
    refused: dict[str, list[str]] = {}
    for target, reason in REASONS.items():
        refused.setdefault(reason, []).append(_spelled(target))

    def cell(names: list[str]) -> str:
        return ", ".join(f"`{name}`" for name in names)

    lines = ["| operation | becomes | how | exact? |", "|---|---|---|---|"]
    lines += [f"| {cell(names)} | {role} | {how} | {exact} |" for (role, how, exact), names in converted.items()]
    lines += [f"| {cell(names)} | refused | {reason} | |" for reason, names in refused.items()]
    return "\n".join(lines)


def _spelled(target: Any) -> str:
    """Write an operation as users write it."""
    if isinstance(target, str):
        return f"x.{target}()"
    if isinstance(target, type):
        return f"nn.{target.__name__}"
    symbols = {"add": "+", "iadd": "+=", "sub": "-", "isub": "-=", "mul": "*", "imul": "*=", "truediv": "/"}
    symbols |= {"itruediv": "/=", "neg": "-x", "matmul": "@", "getitem": "x[...]"}
    name = target.__name__
    if getattr(operator, name, None) is target:
        return symbols[name]
    home = "F" if getattr(F, name, None) is target else "torch"
    return f"{home}.{name}"
