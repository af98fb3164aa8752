"""Pictures of a network at work, of a sweep, and of a comparison of costs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch

from quartz_plugin import plot
from quartz_plugin.network import SpikingNetwork

Pictures = dict[str, Callable[[], Any]]
"""Name of a picture -> what draws it."""

_SWEEP_AXES = {
    "error_t_max": "t_max",
    "error_steps": "steps",
    "error_operations": "operations",
    "error_synops": "synops",
    "error_energy": "energy_loihi",
    "error_energy_paper": "energy_paper",
}
"""Name of a sweep's picture -> the figure on its axis."""


def pictures_of(ann: torch.nn.Module, snn: SpikingNetwork, images: torch.Tensor) -> Pictures:
    """Pictures of a network at work: one neuron, one image's spikes, all images' spike times and activations."""
    return {
        "chronogram": lambda: plot.chronogram(snn, images[:1]),
        "raster": lambda: plot.raster(snn.run(images[:1])),
        "spike_times": lambda: plot.spike_time_histograms(snn.run(images)),
        "activations": lambda: plot.activations(ann, snn, images),
    }


def pictures_of_sweep(
    rows: Iterable[Mapping[str, Any]],
    ann_accuracy: float,
    published: Mapping[str, Sequence[Mapping[str, Any]]] | None = None,
) -> Pictures:
    """Error against T_max, operations, energy (the paper's figures 2, 3, 4), steps and strict operations."""
    rows = list(rows)

    def drawing(column: str) -> Callable[[], Any]:
        return lambda: plot.error_curves(rows, column, ann_accuracy=ann_accuracy, published=published)

    return {name: drawing(column) for name, column in _SWEEP_AXES.items()}
