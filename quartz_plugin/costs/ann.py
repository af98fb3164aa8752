"""Costs of one forward pass of an ANN, on the footing of the spiking networks: borders exact, per image."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from quartz_plugin.costs.profiler import OperationCounts, count_operations
from quartz_plugin.intake import computes_weights, copy_of, make_plain
from quartz_plugin.operators.modules import in_eval_mode
from quartz_plugin.precision import exact_arithmetic


def ann_costs(ann: nn.Module, images: Tensor) -> dict[str, float]:
    """Count the multiplications and memory accesses of an ANN, in eval mode.

    Parameters
    ----------
    ann : nn.Module
        The network.
    images : Tensor
        ``[B, ...]``, as the network takes them.

    Returns
    -------
    dict
        Means over images: ``macs``, all inputs times their synapses (a weight that meets padding is none);
        ``nonzero_macs``, those whose input is not zero, which is all that an engine that skips zeros does;
        ``memory_reads``, a weight and an input for each of ``macs``; ``memory_writes``, each output of a layer once
        (its sum stays in a register); and each of the first two for each module, ``macs/MODULE``.

    Raises
    ------
    ValueError
        If there are no images.

    Examples
    --------
    >>> ann = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    >>> costs = ann_costs(ann, torch.tensor([[0.5, 0.0, 0.0, 1.0]]))
    >>> costs["macs"], costs["nonzero_macs/0"], costs["memory_reads"], costs["memory_writes"]
    (56.0, 16.0, 112.0, 11.0)
    """
    found = count_ann(ann, images).per_inference(len(images))
    costs = {
        "macs": found["macs"],
        "nonzero_macs": found["synops"],
        "memory_reads": 2 * found["macs"],
        "memory_writes": found["outputs"],
    }
    for name, count in found.items():
        kind, _, module = name.partition("/")
        if module and kind in ("macs", "synops"):
            costs[f"{'nonzero_macs' if kind == 'synops' else kind}/{module}"] = count
    return costs


@exact_arithmetic()
@torch.no_grad()
def count_ann(ann: nn.Module, images: Tensor) -> OperationCounts:
    """Count what :func:`ann_costs` reads, in eval mode; ValueError without images.

    Weights that are computed in front of layers are computed before the count begins.
    """
    if len(images) == 0:
        raise ValueError("there are no images to run the ANN on")
    if computes_weights(ann):
        ann = copy_of(ann)
        make_plain(ann)
    with in_eval_mode(ann), count_operations(ann) as counts:
        ann(images)
    return counts


__all__ = ["ann_costs", "count_ann"]
