"""Operations of one weight and one shift a unit or channel: batch norms, and arithmetic with constants."""

from __future__ import annotations

import inspect
import operator
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from quartz_plugin.operators.gains import IntoGain
from quartz_plugin.operators.modules import Affine
from quartz_plugin.operators.row import Operator, Role, Rows, rows_of
from quartz_plugin.operators.selection import expanded
from quartz_plugin.operators.tracing import Append, Comparison, Refusal, Value, constant_for

_BATCH_STATISTICS = "it normalises by the statistics of each batch; use track_running_stats=True"
_PRODUCT = "it multiplies two activations, and synapses are fixed weights: the network is no ReLU network"
_OWN_FACTOR = (
    "it multiplies two activations, one of them a function of the other, as Hardswish and SiLU do; train the network "
    "with nn.ReLU in its place"
)
_GATE = (
    "it multiplies two activations, one of them a gate that is computed from the other, as squeeze and excitation do; "
    "train the network without the gate"
)


def _uses_batch_statistics(norm: Any) -> str | None:
    return _BATCH_STATISTICS if norm.running_mean is None else None


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


def _build_batch_norm(append: Append, *args: Any, **kwargs: Any) -> Value:
    call = inspect.signature(F.batch_norm).bind(*args, **kwargs)
    call.apply_defaults()
    given = call.arguments
    if given["training"] or given["running_mean"] is None:
        raise Refusal(_BATCH_STATISTICS)
    value: Value = given["input"]
    mean, variance, weight, bias = (given[name] for name in ("running_mean", "running_var", "weight", "bias"))
    if any(isinstance(each, Value) for each in (mean, variance, weight, bias)):
        raise Refusal(_PRODUCT)
    if (weight is None) is not (bias is None):
        weight = torch.ones_like(mean) if weight is None else weight
        bias = torch.zeros_like(mean) if bias is None else bias
    dims = value.tensor.dim()
    if dims > 4:
        gain, shift = (each.to(value.tensor) for each in norm_as_affine(mean, variance, weight, bias, given["eps"]))
        shape = (-1, *[1] * (dims - 2))
        return append(Affine(gain.view(shape), shift.view(shape)), value)
    kind = NORMS[0] if dims < 4 else NORMS[1]
    norm = kind(mean.numel(), eps=given["eps"], affine=weight is not None, device="meta")
    norm.running_mean, norm.running_var = mean.detach().clone(), variance.detach().clone()
    norm.num_batches_tracked = torch.zeros((), dtype=torch.long)
    if weight is not None:
        norm.weight, norm.bias = (nn.Parameter(each.detach().clone(), requires_grad=False) for each in (weight, bias))
    return append(norm, value)


_NORM = Operator(
    role=Role.SYNAPSE,
    how="folded into the layer before, or into the synapses that follow; its shift into the neurons' bias "
    "(without running statistics: refused)",
    refusal=_uses_batch_statistics,
    functions={_build_batch_norm: [F.batch_norm]},
    settings=None,
    relate=None,
    form=None,
    gain=None,
)


def _as_wide(append: Append, value: Value, constant: Any) -> Value:
    """Let a value be copied along dimensions of size 1 in which a constant is larger."""
    units = value.tensor.shape[1:]
    if not isinstance(constant, Tensor) or constant.dim() > value.tensor.dim():
        return value
    own = constant.shape[1:] if constant.dim() == value.tensor.dim() else constant.shape
    try:
        shape = torch.broadcast_shapes(own, units)
    except RuntimeError:
        return value
    return expanded(append, value, (len(value.tensor), *shape)) if len(shape) == len(units) else value


def scaled(append: Append, value: Value, factor: Any) -> Value:
    """Let a value be followed by a factor, unless that is 1."""
    value = _as_wide(append, value, factor)
    factor = constant_for(factor, value)
    if bool((factor == 1).all()):
        return value
    return append(Affine(factor, torch.zeros_like(factor)), value)


def shifted(append: Append, value: Value, shift: Any) -> Value:
    """Let a value be followed by a constant that is added, unless that is 0."""
    value = _as_wide(append, value, shift)
    shift = constant_for(shift, value)
    if bool((shift == 0).all()):
        return value
    return append(Affine(torch.ones_like(shift), shift), value)


def _build_product(append: Append, input: Any, other: Any) -> Value:
    if isinstance(input, Comparison):
        input, other = other, input
    if isinstance(other, Comparison):
        return other.choose(append, other, input, 0.0)
    if isinstance(input, Value) and isinstance(other, Value):
        raise Refusal(_reason_against_product(input, other))
    return scaled(append, input, other) if isinstance(input, Value) else scaled(append, other, input)


def _reason_against_product(first: Value, second: Value) -> str:
    """Reason against a product of two values: which activation it is, where one is computed from the other."""
    for value, factor in ((first, second), (second, first)):
        if _is_behind(factor.node, value.node):
            return _OWN_FACTOR if factor.tensor.shape == value.tensor.shape else _GATE
    return _PRODUCT


def _is_behind(node: fx.Node, source: fx.Node) -> bool:
    """Check whether a node's value is computed from another's."""
    seen, pending = set(), [node]
    while pending:
        each = pending.pop()
        if each is source:
            return True
        pending += [before for before in each.all_input_nodes if before not in seen]
        seen.update(each.all_input_nodes)
    return False


def _build_quotient(append: Append, input: Any, other: Any) -> Value:
    if isinstance(other, Value):
        raise Refusal(_PRODUCT.replace("multiplies two", "divides by"))
    return scaled(append, input, 1 / torch.as_tensor(other, dtype=torch.float64))


def _build_negation(append: Append, input: Value) -> Value:
    return scaled(append, input, -1.0)


_CONSTANTS = Operator(
    role=Role.SYNAPSE,
    how="by or with constants: folded into the synapses that follow",
    functions={
        _build_product: [operator.mul, operator.imul, torch.mul, torch.multiply, "mul", "mul_"],
        _build_quotient: [operator.truediv, operator.itruediv, torch.div, "div", "div_"],
        _build_negation: [operator.neg, torch.neg, "neg"],
    },
    in_place=[operator.imul, operator.itruediv, "mul_", "div_"],
    settings=None,
    relate=None,
    form=None,
    gain=IntoGain(lambda module: module.weight.detach()),
)

NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)

ROWS: Rows = {**rows_of(NORMS, _NORM), Affine: _CONSTANTS}

__all__ = ["NORMS", "ROWS", "norm_as_affine", "scaled", "shifted"]
