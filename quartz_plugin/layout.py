"""Orders in which tensors are stored: a CPU convolves images whose channels lie side by side up to twice as fast."""

from __future__ import annotations

import torch
from torch import Tensor


def channels_last(images: Tensor) -> Tensor:
    """Images ``[B, C, H, W]`` with their channels stored last, where a CPU computes faster with such; else themselves.

    Values and shape are the same, and what is computed of them is stored like them.

    Examples
    --------
    >>> channels_last(torch.zeros(2, 3, 5, 5)).stride()
    (75, 1, 15, 3)
    >>> channels_last(torch.zeros(2, 3, 5)).stride()
    (15, 5, 1)
    """
    fast = images.dim() == 4 and images.dtype == torch.float32 and images.device.type == "cpu"
    return images.contiguous(memory_format=torch.channels_last) if fast else images


def is_channels_last(values: Tensor) -> bool:
    """Check whether values are stored with their channels last, and not in torch's own order as well."""
    last = values.dim() == 4 and values.is_contiguous(memory_format=torch.channels_last)
    return last and not values.is_contiguous()


def in_memory_order(units: Tensor) -> Tensor:
    """``[B, ...]`` with the dimensions behind the batch as they lie in memory, where they are channels-last.

    Examples
    --------
    >>> in_memory_order(torch.zeros(2, 3, 4, 5).contiguous(memory_format=torch.channels_last)).shape
    torch.Size([2, 4, 5, 3])
    """
    return units.permute(0, 2, 3, 1) if is_channels_last(units) else units


def as_stored(values: Tensor) -> Tensor:
    """All values in one dimension, in the order in which they are stored: a view of dense tensors.

    Examples
    --------
    >>> as_stored(torch.arange(6).reshape(2, 3).t())
    tensor([0, 1, 2, 3, 4, 5])
    """
    return values.permute(sorted(range(values.dim()), key=values.stride, reverse=True)).reshape(-1)


def stored_like(values: Tensor, other: Tensor) -> Tensor:
    """Values with their channels last where those of another tensor of their shape are.

    Examples
    --------
    >>> stored_like(torch.zeros(2, 3, 5, 5), channels_last(torch.zeros(2, 3, 5, 5))).stride()
    (75, 1, 15, 3)
    """
    return values.contiguous(memory_format=torch.channels_last) if is_channels_last(other) else values
