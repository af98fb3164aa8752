"""Spike steps of large layers, written into memory that costs little to get."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from quartz_plugin.coding import NO_SPIKE, Window
from quartz_plugin.layout import in_memory_order, is_channels_last

BLOCK = 2**16
"""Neurons that fit a cache while their steps are computed."""


def recorded_steps(levels: Tensor, window: Window, silent: bool) -> Tensor:
    """Global steps (int32) of the spikes that encode these uint8 levels, laid out as they are.

    Parameters
    ----------
    levels : Tensor
        Contiguous, or channels-last.
    window : Window
        Their window.
    silent : bool
        Whether level 0 is encoded by no spike.

    Examples
    --------
    >>> recorded_steps(torch.tensor([3, 1, 0], dtype=torch.uint8), Window(3, 3), silent=True)
    tensor([ 3,  5, -1], dtype=torch.int32)
    """
    in_order = in_memory_order(levels).contiguous()
    steps, end = _empty(in_order), torch.tensor(window.end, dtype=torch.int32, device=levels.device)
    for block, own in zip(steps.view(-1).split(BLOCK), in_order.view(-1).split(BLOCK), strict=True):
        torch.sub(end, block.copy_(own), out=block)
        if silent:
            block.masked_fill_(own == 0, NO_SPIKE)
    return steps.permute(0, 3, 1, 2) if is_channels_last(levels) else steps


def _empty(like: Tensor) -> Tensor:
    if like.device.type != "cpu":
        return torch.empty_like(like, dtype=torch.int32)
    # NumPy asks the system for large pages, and torch for small ones, whose first touch costs more than the steps.
    return torch.from_numpy(np.empty(like.shape, dtype=np.int32))
