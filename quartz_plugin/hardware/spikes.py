"""How many spikes a simulation holds: all of them, those that only say zero, those that come early."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import wraps

import torch
from torch import Tensor

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
    return {name: at_or_after(0, steps) for name, steps in result.spike_steps.items()}


@_once
def zero_spike_counts(result: SimulationResult) -> dict[str, Tensor]:
    """Spikes that say the value zero: layer -> int64 ``[B]``. ValueError without ``record=True``."""

    def zeros(name: str, steps: Tensor) -> Tensor:
        zero = result.windows[name].end
        # Only a signed output says anything later.
        negative = at_or_after(zero + 1, steps) if name == result.output and result.signed_output else 0
        return at_or_after(zero, steps) - negative

    return {name: zeros(name, steps) for name, steps in result.spike_steps.items()}


@_once
def early_spike_counts(result: SimulationResult) -> dict[str, Tensor]:
    """Spikes before their layer's readout: layer -> int64 ``[B]``; the input's are never early."""
    fired = spike_counts(result)
    return {
        name: fired[name] - at_or_after(result.windows[name].start, steps)
        for name, steps in result.spike_steps.items()
        if name != INPUT
    }


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


def at_or_after(step: int, steps: Tensor) -> Tensor:
    """How many of an image's steps ``[B, ...]`` are `step` or later: int64 ``[B]``."""
    # A sum of clamped integers takes a third of the time that it takes to compare and count them.
    units = steps.shape[1:].numel()
    return sum_of_steps(steps.clamp(step - 1, step), step) - (step - 1) * units


def sum_of_steps(steps: Tensor, latest: int) -> Tensor:
    """Sum of an image's steps ``[B, ...]``, none of them later than `latest`: int64 ``[B]``."""
    fits = steps.shape[1:].numel() * max(1, latest) < 2**31
    return steps.flatten(1).sum(dim=1, dtype=torch.int32 if fits else torch.int64).long()


def per_image(counts: Tensor) -> Tensor:
    """Sum over all but the batch: ``[B, ...]`` to int64 ``[B]``."""
    return counts.flatten(1).sum(dim=1)
