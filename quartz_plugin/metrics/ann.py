"""Costs of the ANN, beside the spiking networks made of it; counted in :mod:`quartz_plugin.costs.ann`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from quartz_plugin.costs.ann import count_ann
from quartz_plugin.metrics.identity import Shared
from quartz_plugin.metrics.per_layer import PerLayerMetric


class ANNOperations(PerLayerMetric):
    """Multiplications and memory accesses of an ANN, mean over images.

    ``compute`` gives a dict: ``macs``, ``nonzero_macs`` (of inputs that are not zero), ``memory_reads``,
    ``memory_writes``, each in total and by module, as :func:`~quartz_plugin.costs.ann.ann_costs` counts them.

    Parameters
    ----------
    ann : nn.Module
        The network.
    images : Tensor
        ``[B, ...]``, one or more, which are run to learn which modules have weights.

    Raises
    ------
    ValueError
        If there are no images.

    Examples
    --------
    >>> ann = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    >>> metric = ANNOperations(ann, torch.rand(1, 4))
    >>> metric.update(torch.tensor([[0.5, 0.0, 0.0, 1.0]]))
    >>> int(metric.compute()["macs"]), int(metric.compute()["nonzero_macs/0"])
    (56, 16)
    """

    higher_is_better = False

    def __init__(self, ann: nn.Module, images: Tensor, **kwargs: Any) -> None:
        modules = count_ann(ann, images).macs
        super().__init__(modules, ("macs", "nonzero_macs", "memory_reads", "memory_writes"), **kwargs)
        self.ann = Shared(ann)

    def update(self, images: Tensor) -> None:
        """Run the ANN on images ``[B, ...]`` and count; ValueError if modules run that did not at first."""
        if len(images) == 0:
            return
        counts = count_ann(self.ann.held, images)
        reads = {module: 2 * macs for module, macs in counts.macs.items()}
        found = counts.macs, counts.synops, reads, counts.outputs
        self.add(*({module: torch.tensor(count) for module, count in each.items()} for each in found))
        self.images += len(images)
