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
    preds, reference : Tensor
        Logits ``[B, classes]``; of equal logits the smallest class index counts.

    Returns
    -------
    Tensor
        bool ``[B]``.

    Raises
    ------
    ValueError
        If the shapes differ.

    Examples
    --------
    >>> agreement(torch.tensor([[1.0, 2.0], [3.0, 3.0]]), torch.tensor([[0.0, 5.0], [0.0, 1.0]]))
    tensor([ True, False])
    """
    if preds.shape != reference.shape or preds.dim() != 2:
        raise ValueError(
            f"preds and reference must both be [B, classes], got {list(preds.shape)} and {list(reference.shape)}"
        )
    return preds.argmax(dim=1) == reference.argmax(dim=1)


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
        """Add the logits ``[B, classes]`` of the spiking network and of the ANN."""
        self.agreeing += agreement(preds, reference).sum()
        self.total += len(preds)

    def compute(self) -> Tensor:
        """Share in [0, 1]."""
        return self.agreeing / self.total

    def plot(self, val: Any = None, ax: Any = None) -> Any:
        """Draw the value, or several from ``forward``, as torchmetrics does; returns figure and axes."""
        return self._plot(val, ax)
