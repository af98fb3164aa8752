"""How many spikes there are, how many only say zero, and how many come early."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from quartz_plugin.coding import NO_SPIKE
from quartz_plugin.engines.result import SimulationResult
from quartz_plugin.graph import INPUT
from quartz_plugin.metrics.per_layer import PerLayerMetric
from quartz_plugin.network import SpikingNetwork


def spike_counts(result: SimulationResult) -> dict[str, Tensor]:
    """Spikes of each layer, "input" included: layer -> int64 ``[B]``. ValueError without ``record=True``."""
    result.check_recorded()
    return {name: (steps != NO_SPIKE).flatten(1).sum(dim=1) for name, steps in result.spike_steps.items()}


def zero_spike_counts(result: SimulationResult) -> dict[str, Tensor]:
    """Spikes that say the value zero: layer -> int64 ``[B]``."""
    result.check_recorded()
    return {
        name: (steps == result.windows[name].end).flatten(1).sum(dim=1) for name, steps in result.spike_steps.items()
    }


def early_spike_counts(result: SimulationResult) -> dict[str, Tensor]:
    """Spikes before their layer's readout: layer -> int64 ``[B]``; the input's are never early."""
    result.check_recorded()
    return {name: early.flatten(1).sum(dim=1) for name, early in result.early.items()}


class SpikeCount(PerLayerMetric):
    """Spikes of an inference: in total ("input" included), by layer, and those that only say zero.

    ``compute`` gives a dict: ``spikes``, ``zero_spikes``, and ``spikes_LAYER``, ``zero_spikes_LAYER``, each the
    mean over images (float64).

    Parameters
    ----------
    network : SpikingNetwork
        The network whose results are counted.

    Examples
    --------
    >>> import torch, quartz_plugin
    >>> ann = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
    >>> snn = quartz_plugin.convert(ann, torch.rand(32, 4))
    >>> metric = SpikeCount(snn)
    >>> metric.update(snn.run(torch.rand(5, 4)))
    >>> int(metric.compute()["spikes_input"]), int(metric.compute()["spikes_1"])
    (4, 8)
    """

    spikes: Tensor
    zero_spikes: Tensor

    def __init__(self, network: SpikingNetwork, **kwargs: Any) -> None:
        super().__init__(network.windows, ("spikes", "zero_spikes"), **kwargs)

    def update(self, result: SimulationResult) -> None:
        """Add a simulation with ``record=True``."""
        self.add("spikes", spike_counts(result))
        self.add("zero_spikes", zero_spike_counts(result))
        self.images += len(result.logits)

    def compute(self) -> dict[str, Tensor]:
        """Means over images; see the class."""
        return self.per_image("spikes") | self.per_image("zero_spikes")


class EarlySpikeRate(PerLayerMetric):
    """Share of the neurons' spikes that came before their layer's readout; 0 with ``hold=True``.

    ``compute`` gives a dict: ``early_spike_rate`` and ``early_spike_rate_LAYER``.

    Parameters
    ----------
    network : SpikingNetwork
        The network whose results are counted.

    Examples
    --------
    >>> import torch, quartz_plugin
    >>> ann = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
    >>> snn = quartz_plugin.convert(ann, torch.rand(32, 4))
    >>> metric = EarlySpikeRate(snn)
    >>> metric.update(snn.run(torch.rand(5, 4)))
    >>> float(metric.compute()["early_spike_rate"])
    0.0
    """

    higher_is_better = False
    early: Tensor
    fired: Tensor

    def __init__(self, network: SpikingNetwork, **kwargs: Any) -> None:
        super().__init__((name for name in network.windows if name != INPUT), ("early", "fired"), **kwargs)

    def update(self, result: SimulationResult) -> None:
        """Add a simulation with ``record=True``."""
        self.add("early", early_spike_counts(result))
        self.add("fired", spike_counts(result))
        self.images += len(result.logits)

    def compute(self) -> dict[str, Tensor]:
        """Shares in [0, 1]; see the class."""
        shares = self.early.double() / self.fired.clamp(min=1)
        by_layer = {f"early_spike_rate_{layer}": share for layer, share in zip(self.layers, shares, strict=True)}
        return {"early_spike_rate": self.early.sum().double() / self.fired.sum().clamp(min=1), **by_layer}
