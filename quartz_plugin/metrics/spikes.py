"""Spikes of an inference: all of them, those that encode nothing but zero, and those that come early."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from quartz_plugin.costs.spikes import (
    SpikeTrains,
    early_spike_counts,
    spike_counts,
    train_counts,
    zero_spike_counts,
)
from quartz_plugin.engines.result import SimulationResult
from quartz_plugin.graph import INPUT
from quartz_plugin.metrics.per_layer import PerLayerMetric
from quartz_plugin.network import SpikingNetwork


def _layers(network: SpikingNetwork | Iterable[str]) -> list[str]:
    if isinstance(network, (str, nn.Module)) and not isinstance(network, SpikingNetwork):
        given = repr(network) if isinstance(network, str) else type(network).__name__
        raise TypeError(f"network must be a SpikingNetwork or several names of layers, got {given}")
    return list(network.windows) if isinstance(network, SpikingNetwork) else list(network)


def _converted(network: SpikingNetwork | Iterable[str]) -> SpikingNetwork | None:
    return network if isinstance(network, SpikingNetwork) else None


def _images(result: SimulationResult | SpikeTrains) -> int:
    return len(result.logits) if isinstance(result, SimulationResult) else next(iter(result.values())).shape[1]


def _counts(result: SimulationResult | SpikeTrains, layers: list[str]) -> dict[str, Tensor]:
    if isinstance(result, SimulationResult):
        return spike_counts(result)
    if not isinstance(result, Mapping):
        raise TypeError(
            f"spikes are those of a SimulationResult (snn.run(images)) or a dict of trains, got {type(result).__name__}"
        )
    if missing := [layer for layer in layers if layer not in result]:
        raise ValueError(f"no spikes of {missing}: give a train for each of {layers}")
    return train_counts(result)


class SpikeCount(PerLayerMetric):
    """Spikes of an inference: in total ("input" included), by layer, and those that encode nothing but zero.

    ``compute`` gives a dict: ``spikes``, ``zero_spikes``, and ``spikes/LAYER``, ``zero_spikes/LAYER``, each the
    mean over images (float64). Of a network that is not a converted one, spikes alone.

    Parameters
    ----------
    network : SpikingNetwork or names
        The network whose results are counted; or the names of any network's layers, whose spike trains
        ``{name: [steps, B, ...]}`` ``update`` then takes.

    Raises
    ------
    ValueError
        By ``update``, for a result without ``record=True`` or a layer without spikes.

    Examples
    --------
    >>> import quartz_plugin
    >>> ann = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
    >>> snn = quartz_plugin.convert(ann, torch.rand(32, 4))
    >>> metric = SpikeCount(snn)
    >>> metric.update(snn.run(torch.rand(5, 4)))
    >>> int(metric.compute()["spikes/input"]), int(metric.compute()["spikes/1"])
    (4, 8)
    >>> metric = SpikeCount(["lif1"])
    >>> metric.update({"lif1": torch.tensor([[[1.0, 0.0]], [[1.0, 1.0]]])})
    >>> int(metric.compute()["spikes"])
    3
    """

    def __init__(self, network: SpikingNetwork | Iterable[str], **kwargs: Any) -> None:
        quantities = ("spikes", "zero_spikes") if isinstance(network, SpikingNetwork) else ("spikes",)
        super().__init__(_layers(network), quantities, _converted(network), **kwargs)

    def update(self, result: SimulationResult | SpikeTrains) -> None:
        """Add a simulation with ``record=True``, or spike trains; ValueError for a simulation of another network."""
        if isinstance(result, SimulationResult):
            self.check_network(result)
        counts = [_counts(result, self.layers)]
        if "zero_spikes" in self.quantities and isinstance(result, SimulationResult):
            counts.append(zero_spike_counts(result))
        self.add(*counts)
        self.images += _images(result)


class SpikesPerNeuron(PerLayerMetric):
    """Spikes an inference, divided by neurons: of all layers without the input, and of each, the input included.

    ``compute`` gives a dict: ``spikes_per_neuron`` and ``spikes_per_neuron/LAYER``, mean over images (float64).

    Parameters
    ----------
    network : SpikingNetwork or names
        As of :class:`SpikeCount`.

    Examples
    --------
    >>> import quartz_plugin
    >>> ann = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
    >>> snn = quartz_plugin.convert(ann, torch.rand(32, 4))
    >>> metric = SpikesPerNeuron(snn)
    >>> metric.update(snn.run(torch.rand(5, 4)))
    >>> metric.compute()["spikes_per_neuron/1"]
    tensor(1., dtype=torch.float64)
    """

    higher_is_better = False
    neurons: Tensor

    def __init__(self, network: SpikingNetwork | Iterable[str], **kwargs: Any) -> None:
        super().__init__(_layers(network), ("spikes",), _converted(network), **kwargs)
        # Known from the first spikes on; a process that saw none learns it from the others.
        self.add_state("neurons", torch.zeros(len(self.layers), dtype=torch.int64), dist_reduce_fx="max")

    def update(self, result: SimulationResult | SpikeTrains) -> None:
        """Add a simulation with ``record=True``, or spike trains; ValueError for a simulation of another network."""
        if isinstance(result, SimulationResult):
            self.check_network(result)
        self.add(_counts(result, self.layers))
        if isinstance(result, SimulationResult):
            units = [result.spike_steps[layer].shape[1:].numel() for layer in self.layers]
        else:
            units = [result[layer].shape[2:].numel() for layer in self.layers]
        self.neurons = torch.tensor(units, device=self.device)
        self.images += _images(result)

    def compute(self) -> dict[str, Tensor]:
        """Spikes a neuron; see the class."""
        own = torch.tensor([layer != INPUT for layer in self.layers], device=self.device)
        spikes = self.total("spikes")
        each = spikes.double() / (self.images * self.neurons)
        whole = spikes[own].sum().double() / (self.images * self.neurons[own].sum())
        return {"spikes_per_neuron": whole, **self.by_layer("spikes_per_neuron", each)}


class EarlySpikeRate(PerLayerMetric):
    """Share of the neurons' spikes that came before their layer's readout; 0 with ``hold=True``.

    ``compute`` gives a dict: ``early_spike_rate`` and ``early_spike_rate/LAYER``.

    Parameters
    ----------
    network : SpikingNetwork
        The network whose results are counted.

    Examples
    --------
    >>> import quartz_plugin
    >>> ann = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
    >>> snn = quartz_plugin.convert(ann, torch.rand(32, 4))
    >>> metric = EarlySpikeRate(snn)
    >>> metric.update(snn.run(torch.rand(5, 4)))
    >>> float(metric.compute()["early_spike_rate"])
    0.0
    """

    higher_is_better = False

    def __init__(self, network: SpikingNetwork, **kwargs: Any) -> None:
        super().__init__((name for name in network.windows if name != INPUT), ("early", "fired"), network, **kwargs)

    def update(self, result: SimulationResult) -> None:
        """Add a simulation with ``record=True``; ValueError for one of another network."""
        self.check_network(result)
        self.add(early_spike_counts(result), spike_counts(result))
        self.images += len(result.logits)

    def compute(self) -> dict[str, Tensor]:
        """Shares in [0, 1]; see the class."""
        early, fired = self.total("early"), self.total("fired")
        shares = early.double() / fired.clamp(min=1)
        whole = early.sum().double() / fired.sum().clamp(min=1)
        return {"early_spike_rate": whole, **self.by_layer("early_spike_rate", shares)}
