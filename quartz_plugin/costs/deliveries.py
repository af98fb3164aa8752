"""Functions of torch that weigh: for each, its inputs and how many synapses carry each of them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from quartz_plugin.operators.modules import per_dimension


def is_weight(value: Any) -> bool:
    """Check for a parameter, or a view of one such as its transpose."""
    return isinstance(value, nn.Parameter) or (isinstance(value, Tensor) and isinstance(value._base, nn.Parameter))


class Axis(NamedTuple):
    """Sizes along one dimension, which decide how many taps of a kernel each input meets."""

    inputs: int
    outputs: int
    kernel: int
    stride: int
    padding: int
    dilation: int
    transposed: bool

    def taps(self) -> NDArray[np.int64]:
        """Taps that land on an output, for each input."""
        walked, fixed = (self.inputs, self.outputs) if self.transposed else (self.outputs, self.inputs)
        start = np.arange(walked, dtype=np.int64)[:, None] * self.stride - self.padding
        position = start + np.arange(self.kernel) * self.dilation
        inside = (position >= 0) & (position < fixed)
        return inside.sum(axis=1) if self.transposed else np.bincount(position[inside], minlength=fixed)


def taps_of(axes: tuple[Axis, ...], device: torch.device) -> tuple[Tensor, int]:
    """Taps that each input meets, int64 of the inputs' shape without batch and channels, and their sum."""
    taps = functools.reduce(np.multiply.outer, (axis.taps() for axis in axes), np.ones((), dtype=np.int64))
    return torch.from_numpy(taps).to(device), int(taps.sum())


class Delivery(NamedTuple):
    """Inputs, and the synapses that carry each: `fan_out` for each tap that it meets. A matrix has one tap."""

    inputs: Tensor
    fan_out: int
    axes: tuple[Axis, ...] = ()


# The following take what a function of torch returned and its arguments, by the names they have there.


def _linear(_: Tensor, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> list[Delivery]:
    return [Delivery(input, weight.shape[:-1].numel())]


def _matmul(_: Tensor, input: Tensor, other: Tensor, **__: Any) -> list[Delivery]:
    if input.dim() == 2 and is_weight(input) and not is_weight(other):
        return [Delivery(other, input.shape[0])]
    return [Delivery(input, other.shape[1])] if other.dim() == 2 else []


def _mm(result: Tensor, input: Tensor, mat2: Tensor, **__: Any) -> list[Delivery]:
    return _matmul(result, input, mat2)


def _mv(_: Tensor, input: Tensor, vec: Tensor, **__: Any) -> list[Delivery]:
    return [Delivery(vec, input.shape[0])]


def _addmm(result: Tensor, input: Tensor, mat1: Tensor, mat2: Tensor, **__: Any) -> list[Delivery]:
    return _matmul(result, mat1, mat2)


def _cell(
    _: Any, input: Tensor, hx: Tensor | tuple[Tensor, Tensor], w_ih: Tensor, w_hh: Tensor, *__: Any, **___: Any
) -> list[Delivery]:
    hidden = hx if isinstance(hx, Tensor) else hx[0]
    return [Delivery(input, w_ih.shape[0]), Delivery(hidden, w_hh.shape[0])]


_Sizes = int | Sequence[int]


def _convolution(
    result: Tensor,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: _Sizes = 1,
    padding: _Sizes | str = 0,
    dilation: _Sizes = 1,
    groups: int = 1,
) -> list[Delivery]:
    axes = _axes(result, input, weight, stride, padding, dilation, transposed=False)
    return [Delivery(input, weight.shape[0] // groups, axes)]


def _transposed_convolution(
    result: Tensor, input: Tensor, weight: Tensor, bias: Tensor | None = None, *sizes: Any, **named: Any
) -> list[Delivery]:
    given = {"stride": 1, "padding": 0, "dilation": 1, **dict(zip(_TRANSPOSED_SIZES, sizes, strict=False)), **named}
    axes = _axes(result, input, weight, given["stride"], given["padding"], given["dilation"], transposed=True)
    return [Delivery(input, weight.shape[1], axes)]


_TRANSPOSED_SIZES = ("stride", "padding", "output_padding", "groups", "dilation")
"""Arguments of torch's transposed convolutions behind the bias, in their order."""


def _axes(
    result: Tensor,
    input: Tensor,
    weight: Tensor,
    stride: _Sizes,
    padding: _Sizes | str,
    dilation: _Sizes,
    transposed: bool,
) -> tuple[Axis, ...]:
    kernel = weight.shape[2:]
    rank = len(kernel)

    steps, gaps = per_dimension(stride, rank), per_dimension(dilation, rank)
    if padding == "same":
        # Of an odd number of zeros, torch puts the one more behind.
        borders = tuple(gap * (size - 1) // 2 for gap, size in zip(gaps, kernel, strict=True))
    else:
        borders = per_dimension(0 if isinstance(padding, str) else padding, rank)
    return tuple(
        Axis(input.shape[i - rank], result.shape[i - rank], kernel[i], steps[i], borders[i], gaps[i], transposed)
        for i in range(rank)
    )


WEIGHTED_FUNCTIONS: dict[Any, Callable[..., list[Delivery]]] = {
    F.linear: _linear,
    **dict.fromkeys((F.conv1d, F.conv2d, F.conv3d), _convolution),
    **dict.fromkeys((F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d), _transposed_convolution),
    **dict.fromkeys((torch.matmul, Tensor.matmul, torch.linalg.matmul), _matmul),
    **dict.fromkeys((torch.mm, Tensor.mm, torch.sparse.mm), _mm),
    **dict.fromkeys((torch.mv, Tensor.mv), _mv),
    **dict.fromkeys((torch.addmm, Tensor.addmm), _addmm),
    **dict.fromkeys((torch.lstm_cell, torch.gru_cell, torch.rnn_tanh_cell, torch.rnn_relu_cell), _cell),
}
"""Functions whose operations are counted."""

OPAQUE_FUNCTIONS: frozenset[Any] = frozenset(
    {
        *(torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu, F.multi_head_attention_forward),
        *(
            torch.einsum,
            torch.tensordot,
            torch.inner,
            Tensor.inner,
            *(torch.dot, Tensor.dot, torch.addmv, Tensor.addmv, torch.linalg.multi_dot, torch.linalg.vecdot),
            F.embedding_bag,
            torch.bilinear,
            torch.bmm,
            Tensor.bmm,
            torch.baddbmm,
            Tensor.baddbmm,
        ),
    }
)
"""Functions that may hold weights, and are not counted."""
