"""Synaptic operations, strictly and as the paper counts them; the functions are in :mod:`quartz_plugin.hardware`."""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor

from quartz_plugin.engines.result import SimulationResult
from quartz_plugin.graph import INPUT
from quartz_plugin.hardware.operations import (
    merged_operations,
    neuron_count,
    quartz_operations,
    synaptic_operations,
)
from quartz_plugin.metrics.per_layer import PerLayerMetric
from quartz_plugin.network import SpikingNetwork
from quartz_plugin.synapses import FanOut, fan_outs

_NAMES = {"synapse": "synops", "merged": "synops_merged"}


class SynapticOperations(PerLayerMetric):
    """Synaptic operations of an inference, mean over images.

    ``compute`` gives a dict: the total under ``synops`` (or ``synops_merged``) and each layer behind it with its name.

    Parameters
    ----------
    network : SpikingNetwork
        The network whose results are counted.
    kind : "synapse" or "merged"
        "synapse": spikes times the weight synapses that carry them, the encoder's included. "merged": the
        paper's count, neuron-steps in which the current changes; spikes that arrive together count once.

    Raises
    ------
    ValueError
        For another kind.

    Examples
    --------
    >>> import torch, quartz_plugin
    >>> ann = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
    >>> snn = quartz_plugin.convert(ann, torch.rand(32, 4))
    >>> metric = SynapticOperations(snn)
    >>> metric.update(snn.run(torch.rand(5, 4)))
    >>> {name: int(count) for name, count in metric.compute().items()}
    {'synops': 56, 'synops_1': 32, 'synops_output': 24}
    """

    higher_is_better = False

    def __init__(self, network: SpikingNetwork, kind: Literal["synapse", "merged"] = "synapse", **kwargs: Any) -> None:
        if kind not in _NAMES:
            raise ValueError(f'kind must be "synapse" or "merged", got {kind!r}')
        super().__init__((name for name in network.windows if name != INPUT), [_NAMES[kind]], **kwargs)
        self.kind = kind
        self.graph = network.graph
        self._fan_out: FanOut | None = None

    def update(self, result: SimulationResult) -> None:
        """Add a simulation with ``record=True``."""
        if self.kind == "merged":
            counts = merged_operations(self.graph, result)
        else:
            if self._fan_out is None:
                self._fan_out = fan_outs(self.graph)
            counts = synaptic_operations(self.graph, result, self._fan_out)
        self.add(_NAMES[self.kind], counts)
        self.images += len(result.logits)

    def compute(self) -> dict[str, Tensor]:
        """Means over images; see the class."""
        return self.per_image(_NAMES[self.kind])


class QuartzOperations(SynapticOperations):
    """Operations as the paper's tables count them: ``synops_merged + 2 N T`` (arXiv:2309.16795).

    ``compute`` gives a dict: ``operations``, and the merged synaptic operations as
    ``SynapticOperations(kind="merged")`` does.

    Parameters
    ----------
    network : SpikingNetwork
        The network whose results are counted.

    Examples
    --------
    >>> import torch, quartz_plugin
    >>> ann = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
    >>> snn = quartz_plugin.convert(ann, torch.rand(32, 4), t_max=16)
    >>> metric = QuartzOperations(snn)
    >>> metric.update(snn.run(torch.rand(5, 4)))
    >>> counts = metric.compute()
    >>> int(counts["operations"] - counts["synops_merged"]) == 2 * 11 * 16
    True
    """

    def __init__(self, network: SpikingNetwork, **kwargs: Any) -> None:
        super().__init__(network, kind="merged", **kwargs)
        self.neurons = neuron_count(network.graph)
        self.t_max = network.t_max

    def compute(self) -> dict[str, Tensor]:
        """Means over images; see the class."""
        counts = super().compute()
        return {"operations": quartz_operations(counts["synops_merged"], self.neurons, self.t_max), **counts}
