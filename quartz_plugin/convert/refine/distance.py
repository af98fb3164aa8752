"""Distances of a rounded network from its ANN: of outputs and of activations."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from quartz_plugin.task import Task, class_scores

TEMPERATURE = 4.0
"""Temperature in learning: at 1 an ANN that is sure of its training images shows little but its decisions."""


NO_DISTANCE = 1e-6
"""Distance that is none: what single precision makes of two outputs that are alike."""

DISTANCES: dict[Task, str] = {"classification": "relative entropy", "regression": "squared error by squared range"}
"""Names of :func:`output_distance`."""


def output_distance(
    outputs: Tensor, wanted: Tensor, task: Task, size: Tensor | float, temperature: float = 1.0
) -> Tensor:
    """Distance of outputs from those wanted: :func:`relative_entropy`, or of a regression the mean squared error.

    Each output's error is taken in units of its `size`, so that small outputs count as much as large ones.
    """
    if task == "classification":
        return relative_entropy(outputs, wanted, temperature)
    size = size.to(outputs) if isinstance(size, Tensor) else size
    return ((outputs - wanted) / size).square().mean()


def relative_entropy(logits: Tensor, wanted: Tensor, temperature: float = 1.0) -> Tensor:
    """Of the softmax of logits ``[B, classes, ...]``, from that of the wanted logits; mean over decisions.

    A single logit stands for the two classes of its sigmoid. Both are divided by the temperature, and what comes out is
    multiplied by its square (arXiv:1503.02531).
    """
    given, wanted = (F.log_softmax(class_scores(each) / temperature, dim=1) for each in (logits, wanted))
    return temperature**2 * F.kl_div(given, wanted, reduction="batchmean", log_target=True)


class _SumOfSquares(torch.autograd.Function):
    """Sum of the squares of values' errors, which are given.

    The gradient is stored as the errors are, channels last where they are. That of torch's own mean is not, and norms
    of channels that lie last take ten times as long with it.
    """

    @staticmethod
    def forward(ctx: Any, values: Tensor, errors: Tensor) -> Tensor:
        ctx.save_for_backward(errors)
        total: Tensor = torch.linalg.vector_norm(errors).square()
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (errors,) = ctx.saved_tensors
        return errors * (2 * grads[0]), None


def relative_feature_mse(given: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> Tensor:
    """Mean over layers of the squared error of their values, as a share of the square of those `wanted`.

    Of a layer that is to be 0 there is no share; it counts as none. The values `wanted` are overwritten.
    """
    shares = []
    for path, target in wanted.items():
        size = torch.linalg.vector_norm(target).square() / target.numel()
        size = torch.where(size > 0, size.clamp(min=1e-12), torch.inf)
        values = given[path]
        with torch.no_grad():
            errors = torch.sub(values, target, out=target if values.dtype == target.dtype else None)
        total = _SumOfSquares.apply(values, errors)  # type: ignore[no-untyped-call]
        shares.append(total / (size * target.numel()))
    return torch.stack(shares).mean() if shares else torch.zeros(())
