"""Sums over images, layer by layer: what the counting metrics share."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric


class PerLayerMetric(Metric):
    """Adds up integer counts ``[B]`` for each layer; the base of the counting metrics."""

    is_differentiable = False
    full_state_update = False

    images: Tensor

    def __init__(self, layers: Iterable[str], quantities: Iterable[str], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.layers = list(layers)
        for quantity in quantities:
            self.add_state(quantity, torch.zeros(len(self.layers), dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("images", torch.tensor(0), dist_reduce_fx="sum")

    def add(self, quantity: str, counts: Mapping[str, Tensor]) -> None:
        """Add the counts ``[B]`` of each layer."""
        sums = torch.stack([counts[layer].sum() for layer in self.layers]).to(self.device)
        setattr(self, quantity, getattr(self, quantity) + sums)

    def per_image(self, quantity: str) -> dict[str, Tensor]:
        """Mean over images: the total under `quantity`, each layer under ``quantity_layer``."""
        means = getattr(self, quantity).double() / self.images
        by_layer = {f"{quantity}_{layer}": mean for layer, mean in zip(self.layers, means, strict=True)}
        return {quantity: means.sum(), **by_layer}
