"""How many spikes a simulation holds: all of them, those that only say zero, those that come early."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import wraps

import torch
from torch import Tensor

from quartz_plugin.coding import NO_SPIKE
from quartz_plugin.engines.result import SimulationResult
from quartz_plugin.graph import INPUT

SpikeTrains = Mapping[str, Tensor]
"""Layer -> its spikes at every step, ``[steps, B, ...]``, nonzero for a spike."""

_Count = Callable[[SimulationResult], dict[str, Tensor]]


def _once(count: _Count) -> _Count:
    """Count a result's spikes once, whoever asks."""

    @wraps(count)
    def counted(result: SimulationResult) -> dict[str, Tensor]:
        found = result.memo()
        if count.__name__ not in found:
            result.check_recorded()
            found[count.__name__] = count(result)
        return dict(found[count.__name__])

    return counted


@_once
def spike_counts(result: SimulationResult) -> dict[str, Tensor]:
    """Spikes of each layer, "input" included: layer -> int64 ``[B]``. ValueError without ``record=True``."""
    return {
        name: _all(steps) if _least(steps) > NO_SPIKE else per_image(steps != NO_SPIKE)
        for name, steps in result.spike_steps.items()
    }


@_once
def zero_spike_counts(result: SimulationResult) -> dict[str, Tensor]:
    """Spikes that say the value zero: layer -> int64 ``[B]``. ValueError without ``record=True``."""
    return {name: per_image(steps == result.windows[name].end) for name, steps in result.spike_steps.items()}


@_once
def early_spike_counts(result: SimulationResult) -> dict[str, Tensor]:
    """Spikes before their layer's readout: layer -> int64 ``[B]``; the input's are never early."""
    fired = spike_counts(result)

    def early(name: str, steps: Tensor) -> Tensor:
        start = result.windows[name].start
        if _least(steps) >= start:
            return torch.zeros_like(fired[name])
        # Before the readout is whoever comes before and is not silent, which is -1.
        return per_image(steps < start) - _all(steps) + fired[name]

    return {name: early(name, steps) for name, steps in result.spike_steps.items() if name != INPUT}


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
    return {name: per_image((train != 0).sum(dim=0).unsqueeze(-1)) for name, train in trains.items()}


def _least(steps: Tensor) -> int:
    """Least of all steps: looking for it takes less time than counting, which it often saves."""
    return int(steps.min()) if steps.numel() else NO_SPIKE


def _all(steps: Tensor) -> Tensor:
    """As many as there are neurons, for each image."""
    return torch.full((len(steps),), steps.shape[1:].numel(), dtype=torch.int64, device=steps.device)


def per_image(counts: Tensor) -> Tensor:
    """Sum over all but the batch: ``[B, ...]`` to int64 ``[B]``."""
    return counts.flatten(1).sum(dim=1)
