"""Learning: parameters of a rounded network with their rates, and their optimizer."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from quartz_plugin.activation import TTFSActivation
from quartz_plugin.operators.table import NORMS, weights_of


def parameter_groups(
    module: nn.Module, learning_rate: float, *, weights: bool = True, unequal: nn.Module | None = None
) -> list[dict[str, Any]]:
    """Parameters that Adam learns of a rounded network, with their rates.

    A layer's are in proportion to its weights' size.

    Adam moves every parameter as far as every other, so with one rate for all, layers of small weights would be lost
    first. The network is left with gradients on for these parameters alone.

    Parameters
    ----------
    module : nn.Module
        A network with :class:`~quartz_plugin.TTFSActivation`.
    learning_rate : float
        As a share of the root mean square of the layer's weights, and of a scale.
    weights : bool
        Learn weights and batch norms; otherwise only biases and scales.
    unequal : nn.Module, optional
        A layer whose outputs differ in size, as a regression's may: its rate goes with the smallest of them.
    """
    module.requires_grad_(False)
    groups: list[dict[str, Any]] = []
    each: Any
    for each in module.modules():
        if isinstance(each, TTFSActivation):
            groups.append({"params": list(each.parameters()), "lr": learning_rate})
        elif (rule := weights_of(each)) is not None or (weights and isinstance(each, NORMS) and each.affine):
            chosen = [p for name, p in each.named_parameters() if weights or name == "bias"]
            weight = each.weight.detach()
            square = weight.square().mean()
            if each is unequal and rule is not None and bool(weight.any()):
                squares = weight.transpose(0, rule.output_dim).flatten(1).square().mean(dim=1)
                square = squares[squares > 0].min()
            size = float(square.sqrt())
            groups.append({"params": chosen, "lr": learning_rate * size})
    groups = [group for group in groups if group["params"]]
    for group in groups:
        for parameter in group["params"]:
            parameter.requires_grad_(True)
    return groups


def adam(
    groups: list[dict[str, Any]], total: int
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    """Adam for :func:`parameter_groups`; over `total` steps a short warm-up, then along a cosine to 0."""
    warmup = max(1, total // 20)

    def share(step: int) -> float:
        return min(1.0, (step + 1) / warmup) * 0.5 * (1 + math.cos(math.pi * min(1.0, step / total)))

    optimizer = torch.optim.Adam(groups)
    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, share)
