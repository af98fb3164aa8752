"""Operations of an inference: synaptic, at the neurons, in memory; the counts are in :mod:`quartz_plugin.costs`."""

from __future__ import annotations

from typing import Any, Literal

from quartz_plugin.metrics.per_layer import CountMetric
from quartz_plugin.network import SpikingNetwork

_NAMES = {"synapse": "synops", "factored": "synops_factored", "merged": "synops_merged"}


class SynapticOperations(CountMetric):
    """Synaptic operations of an inference, mean over images.

    ``compute`` gives a dict: the total under ``synops`` (``synops_factored``, ``synops_merged``) and each layer
    behind it with its name.

    Parameters
    ----------
    network : SpikingNetwork
        The network whose results are counted.
    kind : "synapse", "factored" or "merged"
        "synapse": spikes times the weight synapses that carry them, the encoder's included; where linear maps
        follow each other a synapse is an entry of the map they compose to. "factored": those of the maps one after
        the other, as software computes them. "merged": the paper's count, neuron-steps in which the current
        changes; spikes that arrive together count once.

    Raises
    ------
    ValueError
        For another kind; by ``update``, for a result without ``record=True``.

    Examples
    --------
    >>> import torch, quartz_plugin
    >>> ann = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
    >>> snn = quartz_plugin.convert(ann, torch.rand(32, 4))
    >>> metric = SynapticOperations(snn)
    >>> metric.update(snn.run(torch.rand(5, 4)))
    >>> {name: int(count) for name, count in metric.compute().items()}
    {'synops': 56, 'synops/1': 32, 'synops/output': 24}
    """

    def __init__(
        self, network: SpikingNetwork, kind: Literal["synapse", "factored", "merged"] = "synapse", **kwargs: Any
    ) -> None:
        if kind not in _NAMES:
            raise ValueError(f'kind must be "synapse", "factored" or "merged", got {kind!r}')
        super().__init__(network, [_NAMES[kind]], **kwargs)
        self.kind = kind


class QuartzOperations(CountMetric):
    """Operations as the paper's tables count them: ``synops_merged + 2 N T`` (arXiv:2309.16795).

    ``compute`` gives a dict: ``operations``, and ``operations_strict``, the same sum with spikes times synapses in the
    place of the merged count; both by layer as well.

    Parameters
    ----------
    network : SpikingNetwork
        The network whose results are counted.

    Examples
    --------
    >>> import torch, quartz_plugin
    >>> ann = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
    >>> snn = quartz_plugin.convert(ann, torch.rand(32, 4), t_max=16)
    >>> metric, merged = QuartzOperations(snn), SynapticOperations(snn, kind="merged")
    >>> result = snn.run(torch.rand(5, 4))
    >>> for each in (metric, merged):
    ...     each.update(result)
    >>> round(float(metric.compute()["operations"] - merged.compute()["synops_merged"])) == 2 * 11 * 16
    True
    """

    def __init__(self, network: SpikingNetwork, **kwargs: Any) -> None:
        super().__init__(network, ["operations", "operations_strict"], **kwargs)


class NeuronEvents(CountMetric):
    """Events at neurons besides weight synapses: bias, readout, rectifier and hold, and those of max pooling.

    ``compute`` gives a dict: ``bias_events``, ``readout_events``, ``rectifier_events``, ``hold_events`` (two a
    neuron), ``pool_events`` (spikes times the windows they are in), ``neuron_updates`` (neurons times steps) and
    ``active_updates`` (until a neuron has fired), each in total and by layer. No count of synaptic operations
    contains them.

    Parameters
    ----------
    network : SpikingNetwork
        The network whose results are counted.

    Examples
    --------
    >>> import torch, quartz_plugin
    >>> ann = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
    >>> snn = quartz_plugin.convert(ann, torch.rand(32, 4))
    >>> metric = NeuronEvents(snn)
    >>> metric.update(snn.run(torch.rand(5, 4)))
    >>> {name: int(count) for name, count in metric.compute().items() if name.endswith("events")}
    {'bias_events': 11, 'readout_events': 11, 'rectifier_events': 8, 'hold_events': 22, 'pool_events': 0}
    """

    def __init__(self, network: SpikingNetwork, **kwargs: Any) -> None:
        events = ["bias_events", "readout_events", "rectifier_events", "hold_events", "pool_events"]
        super().__init__(network, [*events, "neuron_updates", "active_updates"], **kwargs)


class MemoryAccesses(CountMetric):
    """Memory accesses as the paper counts them: reads ``synops_merged + 4 N T``, writes ``synops_merged + N T``.

    ``compute`` gives a dict: ``memory_reads`` and ``memory_writes`` (arXiv:2309.16795), ``memory_reads_strict`` and
    ``memory_writes_strict`` with spikes times synapses in the place of the merged count; in total and by layer.

    Parameters
    ----------
    network : SpikingNetwork
        The network whose results are counted.

    Examples
    --------
    >>> import torch, quartz_plugin
    >>> ann = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
    >>> snn = quartz_plugin.convert(ann, torch.rand(32, 4), t_max=16)
    >>> metric = MemoryAccesses(snn)
    >>> metric.update(snn.run(torch.rand(5, 4)))
    >>> counts = metric.compute()
    >>> round(float(counts["memory_reads"] - counts["memory_writes"])) == 3 * 11 * 16
    True
    """

    def __init__(self, network: SpikingNetwork, **kwargs: Any) -> None:
        super().__init__(
            network, ["memory_reads", "memory_writes", "memory_reads_strict", "memory_writes_strict"], **kwargs
        )
