"""What the ANN costs, beside the spiking networks made of it; counted in :mod:`quartz_plugin.hardware.ann`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from quartz_plugin.hardware.ann import count_ann
from quartz_plugin.metrics.per_layer import PerLayerMetric


class ANNOperations(PerLayerMetric):
    """Multiplications and memory accesses of an ANN, mean over images.

    ``compute`` gives a dict: ``macs``, ``nonzero_macs`` (of inputs that are not zero), ``memory_reads``,
    ``memory_writes``, each in total and by module, as :func:`~quartz_plugin.hardware.ann.ann_costs` counts them.

    Parameters
    ----------
    ann : nn.Module
        The network.
    images : Tensor
        ``[B, ...]``, one or more: the first is run to learn which modules have weights.

    Raises
    ------
    ValueError
        If there are no images.

    Examples
    --------
    >>> ann = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    >>> metric = ANNOperations(ann, torch.rand(1, 4))
    >>> metric.update(torch.tensor([[0.5, 0.0, 0.0, 1.0]]))
    >>> int(metric.compute()["macs"]), int(metric.compute()["nonzero_macs_0"])
    (56, 16)
    """

    higher_is_better = False

    def __init__(self, ann: nn.Module, images: Tensor, **kwargs: Any) -> None:
        modules = count_ann(ann, images[:1]).macs
        super().__init__(modules, ("macs", "nonzero_macs", "memory_reads", "memory_writes"), **kwargs)
        # In a tuple, so that the ANN is no part of the metric.
        self._ann = (ann,)

    def update(self, images: Tensor) -> None:
        """Run the ANN on images ``[B, ...]`` and count."""
        counts = count_ann(self._ann[0], images)
        found = {"macs": counts.macs, "nonzero_macs": counts.synops, "memory_writes": counts.outputs}
        found["memory_reads"] = {module: 2 * macs for module, macs in counts.macs.items()}
        for quantity, by_module in found.items():
            self.add(quantity, {module: torch.tensor(count) for module, count in by_module.items()})
        self.images += len(images)
