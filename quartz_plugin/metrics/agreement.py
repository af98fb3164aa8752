"""Share of decisions that two networks make alike."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from quartz_plugin.figures import FIGURES
from quartz_plugin.plot.style import pyplot
from quartz_plugin.task import decide


def agreement(preds: Tensor, reference: Tensor) -> Tensor:
    """Compare the decisions of two networks.

    Parameters
    ----------
    preds : Tensor
        Logits ``[B, classes, ...]``, a decision at every position (``[B, classes, H, W]`` in segmentation); of equal
        logits the smallest class index counts. A single logit, ``[B]`` or ``[B, 1, ...]``, decides by its sign.
    reference : Tensor
        Logits of the same shape, or the classes decided for, whole numbers ``[B, ...]``.

    Returns
    -------
    Tensor
        bool ``[B, ...]``: whether both decide alike.

    Raises
    ------
    ValueError
        If the shapes do not go together.

    Examples
    --------
    >>> agreement(torch.tensor([[1.0, 2.0], [3.0, 3.0]]), torch.tensor([[0.0, 5.0], [0.0, 1.0]]))
    tensor([ True, False])
    """
    decided = not reference.is_floating_point()
    if decided and reference.shape == preds.shape and preds.dim() > 1 and preds.shape[1] == 1:
        reference = reference.squeeze(1)
    if preds.dim() == 0 or reference.shape != (preds.shape[:1] + preds.shape[2:] if decided else preds.shape):
        raise ValueError(
            "preds must be [B, classes] (or [B, classes, ...]) and reference the same, or classes [B, ...] (whole "
            f"numbers), got {list(preds.shape)} and {list(reference.shape)}"
        )
    return decide(preds) == (reference if decided else decide(reference))


class Agreement(Metric):
    """Share of decisions that the spiking network makes as the ANN does (top-1); in segmentation of pixels.

    Examples
    --------
    >>> metric = Agreement()
    >>> metric.update(torch.tensor([[1.0, 2.0], [3.0, 0.0]]), torch.tensor([[0.0, 5.0], [0.0, 1.0]]))
    >>> metric.compute()
    tensor(0.5000)
    """

    is_differentiable = False
    higher_is_better = FIGURES["agreement"].higher_is_better
    full_state_update = False

    agreeing: Tensor
    total: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("agreeing", torch.tensor(0), dist_reduce_fx="sum")
        self.add_state("total", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, preds: Tensor, reference: Tensor) -> None:
        """Add the spiking network's logits ``[B, classes, ...]``, and the ANN's or the classes it decided for."""
        alike = agreement(preds, reference)
        self.agreeing += alike.sum()
        self.total += alike.numel()

    def compute(self) -> Tensor:
        """Share in [0, 1]."""
        return self.agreeing / self.total

    def plot(self, val: Any = None, ax: Any = None) -> Any:
        """Draw the value, or several from ``forward``, as torchmetrics does; returns figure and axes."""
        pyplot()
        return self._plot(val, ax)
