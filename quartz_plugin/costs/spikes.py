"""Spikes of a simulation: all of them, those that encode nothing but zero, those that come early."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec

import numpy as np
import torch
from torch import Tensor

from quartz_plugin.coding import NO_SPIKE, Window
from quartz_plugin.engines.result import SimulationResult
from quartz_plugin.graph import INPUT
from quartz_plugin.layout import in_memory_order

SpikeTrains = Mapping[str, Tensor]
"""Layer -> its spikes at every step, ``[steps, B, ...]``, nonzero for a spike."""


def _counted(result: SimulationResult) -> dict[str, Tensor]:
    """Layer -> int64 ``[4, B]``: its spikes, those of zero, those before readout, the sum of its neurons' steps.

    What is asked of spikes is found together, once: most of the time goes to bringing them from memory.
    """
    memo = result.memo()
    if "counted" not in memo:
        result.check_recorded()
        memo["counted"] = {
            name: _count_spikes(steps, result.windows[name]) for name, steps in result.spike_steps.items()
        }
    found: dict[str, Tensor] = memo["counted"]
    return found


def _count_spikes(steps: Tensor, window: Window) -> Tensor:
    if steps.device.type == "cpu" and find_spec("numba") is not None:
        from quartz_plugin.costs.kernels import count_spikes

        counts = np.empty((4, len(steps)), np.int64)
        count_spikes(_rows(steps).numpy(), window.start, window.end, counts)
        return torch.from_numpy(counts)
    spikes = per_image(steps != NO_SPIKE)
    silent = steps.shape[1:].numel() - spikes
    early = per_image(steps < window.start) - silent
    return torch.stack([spikes, per_image(steps == window.end), early, per_image(steps)])


def spike_counts(result: SimulationResult) -> dict[str, Tensor]:
    """Spikes of each layer, "input" included: layer -> int64 ``[B]``. ValueError without ``record=True``."""
    return {name: counts[0] for name, counts in _counted(result).items()}


def zero_spike_counts(result: SimulationResult) -> dict[str, Tensor]:
    """Spikes that encode the value zero: layer -> int64 ``[B]``. ValueError without ``record=True``."""
    return {name: counts[1] for name, counts in _counted(result).items()}


def early_spike_counts(result: SimulationResult) -> dict[str, Tensor]:
    """Spikes before their layer's readout: layer -> int64 ``[B]``; the input's are never early."""
    return {name: counts[2] for name, counts in _counted(result).items() if name != INPUT}


def sums_of_steps(result: SimulationResult) -> dict[str, Tensor]:
    """Sum of the steps of all neurons, :data:`NO_SPIKE` of the silent ones among them: layer -> int64 ``[B]``."""
    return {name: counts[3] for name, counts in _counted(result).items()}


def train_counts(trains: SpikeTrains) -> dict[str, Tensor]:
    """Spikes of each layer of any network: layer -> int64 ``[B]``.

    Parameters
    ----------
    trains : mapping
        Layer -> ``[steps, B, ...]``, as ``torch.stack(spk_rec)`` gives them; nonzero is a spike.

    Raises
    ------
    ValueError
        For a train without a time and a batch axis.

    Examples
    --------
    >>> import torch
    >>> train_counts({"lif1": torch.tensor([[[1.0, 0.0]], [[1.0, 1.0]]])})
    {'lif1': tensor([3])}
    """
    for name, train in trains.items():
        if train.dim() < 2:
            raise ValueError(f"the spikes of {name!r} must be [steps, B, ...], got {list(train.shape)}")
    return {name: per_image((train != 0).sum(dim=0)) for name, train in trains.items()}


def per_image(counts: Tensor) -> Tensor:
    """Sum over all but the batch: ``[B, ...]`` to int64 ``[B]``."""
    return _rows(counts).sum(dim=1)


def _rows(values: Tensor) -> Tensor:
    """``[B, ...]`` as ``[B, units]`` in any order, also of a single unit without a dimension of its own."""
    return in_memory_order(values).unsqueeze(-1).flatten(1)
