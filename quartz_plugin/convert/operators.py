"""The table of operators: what each operation of a ReLU network becomes, and how exactly.

One table serves every stage: tracing turns functions into the modules listed here, checking refuses what is
not listed, and the later stages ask for an operation's role alone.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class ConversionError(ValueError):
    """The network cannot be converted; the message names the module and says what could be done."""


class Affine(nn.Module):
    """Per-channel ``x * weight + bias``: batch norm and preprocessing while they are not yet folded.

    Parameters
    ----------
    weight, bias : Tensor
        Broadcastable to one sample's shape.
    """

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias: nn.Parameter | None = nn.Parameter(bias, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """Scale and shift."""
        scaled = x * self.weight
        return scaled if self.bias is None else scaled + self.bias


class Role(Enum):
    """What an operation means to a network of spikes."""

    SYNAPSE = "synapses"
    ROUTE = "routing"
    RECTIFIER = "spiking layer"
    MAX_POOL = "first-spike max pooling"
    NOTHING = "dropped"


def _accept(module: Any) -> str | None:
    return None


@dataclass(frozen=True)
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
        return "it normalises by the statistics of each batch; use track_running_stats=True"
    return None


def _pools_indices(pool: Any) -> str | None:
    return "it returns indices; use return_indices=False" if getattr(pool, "return_indices", False) else None


def _flattens_batch(flatten: Any) -> str | None:
    return None if flatten.start_dim >= 1 else "it flattens the batch; use start_dim=1"


def _unflattens_batch(unflatten: Any) -> str | None:
    return "it unflattens the batch; use dim=1" if unflatten.dim == 0 else None


_CONVOLUTION = Operator(Role.SYNAPSE, "weights scaled, bias moved to the neurons")
_AVERAGE = Operator(Role.SYNAPSE, "linear, unrounded: part of the synapses that follow")
_NORM = Operator(
    Role.SYNAPSE, "folded into the weights; its shift into the neurons' bias", refusal=_uses_batch_statistics
)
_MAX_POOL = Operator(
    Role.MAX_POOL, "the first spike passes, once; moved behind a ReLU that follows", refusal=_pools_indices
)
_DROPPED = Operator(Role.NOTHING, "nothing in eval mode")
_PAD = Operator(Role.ROUTE, "zeros never spike in time to matter")

OPERATORS: dict[type[nn.Module], Operator] = {
    nn.Conv1d: _CONVOLUTION,
    nn.Conv2d: _CONVOLUTION,
    nn.Linear: _CONVOLUTION,
    nn.BatchNorm1d: _NORM,
    nn.BatchNorm2d: _NORM,
    Affine: Operator(Role.SYNAPSE, "folded into neighbouring weights where there are any"),
    nn.ReLU: Operator(Role.RECTIFIER, "a layer of TTFSNeuron", "exact with hold; without, but for early spikes"),
    nn.MaxPool1d: _MAX_POOL,
    nn.MaxPool2d: _MAX_POOL,
    nn.AdaptiveMaxPool1d: _MAX_POOL,
    nn.AdaptiveMaxPool2d: _MAX_POOL,
    nn.AvgPool1d: _AVERAGE,
    nn.AvgPool2d: _AVERAGE,
    nn.AdaptiveAvgPool1d: _AVERAGE,
    nn.AdaptiveAvgPool2d: _AVERAGE,
    nn.Flatten: Operator(Role.ROUTE, "routes spikes", refusal=_flattens_batch),
    nn.Unflatten: Operator(Role.ROUTE, "routes spikes", refusal=_unflattens_batch),
    nn.ZeroPad1d: _PAD,
    nn.ZeroPad2d: _PAD,
    nn.Dropout: _DROPPED,
    nn.Dropout1d: _DROPPED,
    nn.Dropout2d: _DROPPED,
    nn.AlphaDropout: _DROPPED,
    nn.Identity: _DROPPED,
}

_NOT_PIECEWISE_LINEAR = "it is not a ReLU; train the network with nn.ReLU in its place"
_MONOTONE_OUTPUT = "leave it out: the predicted class is the same without it"
_BOUNDED_RELU = "its upper bound is not carried yet; train the network with nn.ReLU in its place"
_RESHAPED = "use nn.Flatten(), which keeps the batch apart"
_ARITHMETIC = (
    "if it normalises the input, take it out of forward and pass preprocessing=(mean, std); "
    "else put it into the weights of a neighbouring layer"
)
_PAIRWISE = "the networks converted so far are chains: one path from input to output"

REASONS: dict[Any, str] = {
    **dict.fromkeys(
        (
            nn.Sigmoid,
            nn.Tanh,
            nn.GELU,
            nn.SiLU,
            nn.ELU,
            nn.LeakyReLU,
            nn.PReLU,
            nn.Hardswish,
            nn.Softplus,
            nn.Mish,
        ),
        _NOT_PIECEWISE_LINEAR,
    ),
    **dict.fromkeys((nn.Softmax, nn.LogSoftmax, F.softmax, F.log_softmax, torch.softmax), _MONOTONE_OUTPUT),
    **dict.fromkeys((torch.log_softmax, "softmax", "log_softmax"), _MONOTONE_OUTPUT),
    **dict.fromkeys((nn.ReLU6, nn.Hardtanh, F.relu6, F.hardtanh), _BOUNDED_RELU),
    **dict.fromkeys(("view", "reshape", torch.reshape, "size"), _RESHAPED),
    **dict.fromkeys((operator.sub, operator.mul, operator.truediv, torch.sub, torch.mul, torch.div), _ARITHMETIC),
    **dict.fromkeys(("sub", "mul", "div", "sub_", "mul_", "div_"), _ARITHMETIC),
    **dict.fromkeys((operator.add, operator.iadd, torch.add, torch.cat, "add", "add_"), _PAIRWISE),
}

FUNCTIONS: dict[Any, Callable[..., nn.Module]] = {
    F.relu: lambda x, inplace=False: nn.ReLU(),
    torch.relu: lambda x: nn.ReLU(),
    "relu": lambda x: nn.ReLU(),
    "relu_": lambda x: nn.ReLU(),
    torch.flatten: lambda x, start_dim=0, end_dim=-1: nn.Flatten(start_dim, end_dim),
    "flatten": lambda x, start_dim=0, end_dim=-1: nn.Flatten(start_dim, end_dim),
    F.max_pool1d: lambda x, *args, **kwargs: nn.MaxPool1d(*args, **kwargs),
    F.max_pool2d: lambda x, *args, **kwargs: nn.MaxPool2d(*args, **kwargs),
    F.avg_pool1d: lambda x, *args, **kwargs: nn.AvgPool1d(*args, **kwargs),
    F.avg_pool2d: lambda x, *args, **kwargs: nn.AvgPool2d(*args, **kwargs),
    F.adaptive_avg_pool1d: lambda x, output_size: nn.AdaptiveAvgPool1d(output_size),
    F.adaptive_avg_pool2d: lambda x, output_size: nn.AdaptiveAvgPool2d(output_size),
    F.dropout: lambda x, p=0.5, training=True, inplace=False: nn.Identity(),
}
"""Functions and methods that tracing replaces by modules of the table."""


def role_of(module: nn.Module) -> Role:
    """Return the role of a module that has passed the check."""
    return OPERATORS[type(module)].role
