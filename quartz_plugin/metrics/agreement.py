"""How often two networks decide alike."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric


def agreement(preds: Tensor, reference: Tensor) -> Tensor:
    """Which inferences of two networks have the same top class.

    Parameters
    ----------
    preds : Tensor
        Logits ``[B, classes]``; of equal logits the smallest class index counts.
    reference : Tensor
        Logits of the same shape, or the classes decided for, whole numbers ``[B]``.

    Returns
    -------
    Tensor
        bool ``[B]``.

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
    if preds.dim() != 2 or reference.shape != (preds.shape[:1] if decided else preds.shape):
        raise ValueError(
            "preds must be [B, classes] and reference the same, or classes [B] (whole numbers), "
            f"got {list(preds.shape)} and {list(reference.shape)}"
        )
    return preds.argmax(dim=1) == (reference if decided else reference.argmax(dim=1))


class Agreement(Metric):
    """Share of inferences in which the spiking network decides as the ANN does (top-1).

    Examples
    --------
    >>> metric = Agreement()
    >>> metric.update(torch.tensor([[1.0, 2.0], [3.0, 0.0]]), torch.tensor([[0.0, 5.0], [0.0, 1.0]]))
    >>> metric.compute()
    tensor(0.5000)
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False

    agreeing: Tensor
    total: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("agreeing", torch.tensor(0), dist_reduce_fx="sum")
        self.add_state("total", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, preds: Tensor, reference: Tensor) -> None:
        """Add the spiking network's logits ``[B, classes]``, and the ANN's or the classes it decided for."""
        self.agreeing += agreement(preds, reference).sum()
        self.total += len(preds)

    def compute(self) -> Tensor:
        """Share in [0, 1]."""
        return self.agreeing / self.total

    def plot(self, val: Any = None, ax: Any = None) -> Any:
        """Draw the value, or several from ``forward``, as torchmetrics does; returns figure and axes."""
        return self._plot(val, ax)
