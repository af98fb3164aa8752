"""Operations that people ask for and that are refused, and what to do."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from quartz_plugin.operators.tracing import ATTENTION

_NOT_PIECEWISE_LINEAR = "it is not a ReLU; train the network with nn.ReLU in its place"
_SHARES = (
    "it divides values by their sum, which no fixed synapses do, and inside a network it cannot be left to the host; "
    "train the network without it"
)
_WRITES = (
    "it writes into a part of a tensor; multiply by a constant mask of 0 and 1 and add the rest, put parts side by "
    "side with torch.cat, or write masked_fill"
)
_OWN_STATISTICS = "it normalises by statistics of its own input; train the network with batch norm in its place"

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
    **dict.fromkeys((nn.MultiheadAttention, nn.Bilinear, F.bilinear), ATTENTION),
    **dict.fromkeys(("fill_", "zero_", "copy_", "index_put_", torch.index_put, torch.index_fill), _WRITES),
    **dict.fromkeys((torch.select_scatter, torch.slice_scatter, torch.scatter, "scatter"), _WRITES),
    **dict.fromkeys((nn.Softmax, nn.LogSoftmax, F.softmax, F.log_softmax, torch.softmax), _SHARES),
    **dict.fromkeys((torch.log_softmax, "softmax", "log_softmax", nn.Softmax2d), _SHARES),
}
"""Reasons why some operations are refused, and what to do."""

__all__ = ["REASONS"]
