"""Operation counts of a converted network: spikes, synaptic operations, events at the neurons, memory accesses.

``synops`` counts spikes times weight synapses: each spike that a synapse delivers. ``synops_merged`` counts, as
the paper does, the steps in which a neuron's current changes: spikes that arrive together count once.
Neither counts rectifier or hold; bias and readout enter the merged count where they change the current. What a
neuron needs besides its weight synapses stands in rows of its own (``bias_events`` and so on).

References
----------
G. Lenz, G. Orchard, S. Sheik, "Ultra-low-power Image Classification on Neuromorphic Hardware",
arXiv:2309.16795, section 4.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from quartz_plugin.coding import NO_SPIKE
from quartz_plugin.costs.levels import SILENT, levels_of_sources, source_levels
from quartz_plugin.costs.spikes import early_spike_counts, spike_counts, sums_of_steps, zero_spike_counts
from quartz_plugin.costs.synops import (
    LayerCounts,
    changes_step_by_step,
    composed_synops,
    factored_synops,
    merged_synops,
    pool_events,
)
from quartz_plugin.engines.result import SimulationResult
from quartz_plugin.graph import ConvertedGraph, Layer
from quartz_plugin.graph.fingerprint import snapshot_of
from quartz_plugin.graph.topology import Topology


class InferenceCounts:
    """Costs of a simulation: name of a count -> layer -> int64 ``[B]``.

    A count is found when it is asked for, once for all who read the same result. The names:

    - ``spikes``, ``zero_spikes`` (those that encode nothing but 0), of each layer and of "input"; ``early_spikes``;
    - ``synops``: spikes times the weight synapses into a layer that carry them, entries of the composed maps;
      ``synops_factored``: the same maps as the chains they are computed as, each synapse whose unit any spike
      reaches once; ``synops_merged``: neuron-steps in which the current changes; ``graded_synops``: those that
      would need a multiplication, of which there are none here;
    - ``bias_events``, ``readout_events``, ``rectifier_events``, ``hold_events`` (two a neuron), one for each neuron
      that has them, be it through a synapse or by the neuron itself; ``pool_events``: spikes times the windows of max
      pooling they are in;
    - ``neuron_updates``: neurons times steps; ``active_updates``: those from the first step at which a spike of an
      image can reach a layer until the neuron has fired or is switched off; ``inactive_updates``: the others;
    - ``operations``, ``memory_reads``, ``memory_writes``: the paper's ``synops_merged + 2 N T``, ``+ 4 N T``,
      ``+ N T``, with ``2 T`` the steps of a layer's two windows; ``operations_strict``, ``memory_reads_strict`` and
      ``memory_writes_strict``: the same with ``synops``.

    Parameters
    ----------
    network : SpikingNetwork or ConvertedGraph
        The network, or its ``graph``.
    result : SimulationResult
        A simulation of it with ``record=True``.

    Raises
    ------
    ValueError
        Without ``record=True``; if the result is of another network; for a name that is none of these.

    Examples
    --------
    >>> import quartz_plugin
    >>> ann = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
    >>> snn = quartz_plugin.convert(ann, torch.rand(32, 4))
    >>> counts = InferenceCounts(snn, snn.run(torch.rand(2, 4)))
    >>> {layer: count.tolist() for layer, count in counts["synops"].items()}
    {'1': [32, 32], 'output': [24, 24]}
    """

    def __init__(self, network: Any, result: SimulationResult) -> None:
        graph = getattr(network, "graph", network)
        if not isinstance(graph, ConvertedGraph) or not isinstance(result, SimulationResult):
            raise TypeError(
                "counts are of a converted network and a SimulationResult of it (snn, snn.run(images)), "
                f"got {type(network).__name__} and {type(result).__name__}"
            )
        result.check_recorded()
        snapshot = snapshot_of(graph)
        self.graph, self.result, self.topology = graph, result, Topology.of(graph, snapshot)
        self._found = result.memo(graph, snapshot)
        if "checked" not in self._found:
            self._check()

    def _check(self) -> None:
        windows, names = self.topology.windows, self.topology.layout
        found = {name: tuple(steps.shape[1:]) for name, steps in self.result.spike_steps.items()}
        if windows != self.result.windows or names != found:
            raise ValueError(
                "the result is of another network: its layers, shapes or windows are not this network's; "
                f"given are {found} with windows {self.result.windows}, expected {names} with {windows}"
            )
        self._found["checked"] = True

    def __iter__(self) -> Iterator[str]:
        return iter(COUNTS)

    def __len__(self) -> int:
        return len(COUNTS)

    def __contains__(self, name: object) -> bool:
        return name in COUNTS

    def __getitem__(self, name: str) -> LayerCounts:
        return {layer: count.clone() for layer, count in self.shared(name).items()}

    def shared(self, name: str) -> LayerCounts:
        """A count as all its readers share it: not to be edited."""
        if name not in COUNTS:
            raise ValueError(f"no count is called {name!r}; there are {', '.join(COUNTS)}")
        if name not in self._found:
            with torch.no_grad():
                self._found[name] = COUNTS[name](self)
        found: LayerCounts = self._found[name]
        return found

    def sums(self, names: Sequence[str], layers: Sequence[str]) -> Tensor:
        """Sums over images, int64 ``[names, layers]``; 0 for the input where it has none."""
        kept, order = self._found.setdefault("sums", {}), list(self.result.windows)
        if missing := [name for name in names if name not in kept]:
            kept.update(zip(missing, sums_of([self.shared(name) for name in missing], order), strict=True))
        sums = torch.stack([kept[name] for name in names])
        return sums if list(layers) == order else sums[:, [order.index(layer) for layer in layers]]

    def mean(self, *names: str) -> dict[str, float]:
        """Means over images, in total and by layer (``synops``, ``synops/LAYER``); of all counts by default."""
        means = {}
        for name in names or COUNTS:
            by_layer = {layer: float(count.double().mean()) for layer, count in self[name].items()}
            means[name] = sum(by_layer.values())
            means |= {f"{name}/{layer}": mean for layer, mean in by_layer.items()}
        return means

    @property
    def layers(self) -> tuple[Layer, ...]:
        """The spiking layers."""
        return self.topology.layers

    @property
    def levels(self) -> dict[fx.Node, Tensor]:
        """:func:`~quartz_plugin.costs.levels.source_levels`."""
        if "levels" not in self._found:
            # By name: a result holds no node, for nodes hold their network.
            levels = levels_of_sources(self.topology, self.result)
            self._found["levels"] = {node.name: value for node, value in levels.items()}
        return {self.topology.nodes[name]: value for name, value in self._found["levels"].items()}

    def shape(self, layer: Layer) -> torch.Size:
        """Shape of a layer's neurons, without the batch."""
        return self.topology.shape_of(layer)

    def neurons(self, layer: Layer) -> int:
        """Neurons of a layer."""
        return self.shape(layer).numel()

    def alike(self, of_layer: Callable[[Layer], int]) -> LayerCounts:
        """Counts that are the same for every image."""
        return {layer.name: self.all_images(of_layer(layer)) for layer in self.layers}

    def all_images(self, count: int) -> Tensor:
        """A number for each image."""
        like = self.result.logits
        return torch.full((len(like),), count, dtype=torch.int64, device=like.device)


def sums_of(counts: Sequence[Mapping[str, Tensor]], layers: Sequence[str]) -> Tensor:
    """Sums over images of these layers' counts ``[B]``: int64 ``[counts, layers]``; 0 for a layer that has none."""
    none = torch.zeros_like(next(iter(counts[0].values())))
    each = torch.stack([by_layer.get(layer, none) for by_layer in counts for layer in layers])
    sums: Tensor = each.reshape(len(counts), len(layers), -1).sum(dim=2)
    return sums


def biased_neurons(layer: Layer, shape: torch.Size) -> int:
    """Neurons of a layer of this shape that have a bias other than 0; a bias spike encodes 0 as well."""
    bias = layer.neuron.p.bias
    if bias is None:
        return 0
    if layer.neuron.p.bias_code == "spike":
        return shape.numel()
    # Each number of a bias is that of as many neurons.
    return int(bias.count_nonzero()) * (shape.numel() // max(1, bias.numel()))


def _rectifier_events(counts: InferenceCounts) -> LayerCounts:
    return counts.alike(lambda layer: 0 if layer.neuron.p.rectifier is None else counts.neurons(layer))


def _hold_events(counts: InferenceCounts) -> LayerCounts:
    return counts.alike(lambda layer: 2 * counts.neurons(layer) if layer.neuron.p.hold else 0)


def _active_updates(counts: InferenceCounts) -> LayerCounts:
    sums = sums_of_steps(counts.result)
    any_early = any(bool(early.any()) for early in counts.shared("early_spikes").values())

    def active(layer: Layer) -> Tensor:
        clock, p = layer.neuron.clock, layer.neuron.p
        last = clock.rectify if p.rectifier == "silent" else p.last_step
        silent = counts.neurons(layer) - counts.shared("spikes")[layer.name]
        # The step of a silent neuron is NO_SPIKE.
        ends = sums[layer.name] + silent * (last - NO_SPIKE)
        active_from: Tensor | int = _first_arrival(counts, layer) if any_early else clock.first_input
        updates: Tensor = ends + counts.neurons(layer) * (1 - active_from)
        return updates

    return {layer.name: active(layer) for layer in counts.layers}


def _first_arrival(counts: InferenceCounts, layer: Layer) -> Tensor:
    """First step at which a spike may reach a layer: its input window's first, or that of each image's earliest."""
    clock = layer.neuron.clock
    levels = counts.levels
    earliest = [levels[source].flatten(1).amax(dim=1) for source in layer.projection.sources]
    return (clock.readout - torch.stack(earliest).amax(dim=0)).clamp(max=clock.first_input).long()


def _inactive_updates(counts: InferenceCounts) -> LayerCounts:
    active = counts.shared("active_updates")
    return {layer: updates - active[layer] for layer, updates in counts.shared("neuron_updates").items()}


def _with_updates(of_neurons: int, synops: str = "synops_merged") -> Callable[[InferenceCounts], LayerCounts]:
    """Synaptic operations and so many times N T."""

    def count(counts: InferenceCounts) -> LayerCounts:
        return {
            layer.name: quartz_operations(
                counts.shared(synops)[layer.name], counts.neurons(layer), t_max_of(layer), of_neurons
            )
            for layer in counts.layers
        }

    return count


def t_max_of(layer: Layer) -> float:
    """``T`` of a layer: half the steps of its two windows."""
    clock = layer.neuron.clock
    return (clock.input_window + clock.window + 2) / 2


COUNTS: dict[str, Callable[[InferenceCounts], LayerCounts]] = {
    "spikes": lambda counts: spike_counts(counts.result),
    "zero_spikes": lambda counts: zero_spike_counts(counts.result),
    "early_spikes": lambda counts: early_spike_counts(counts.result),
    "synops": lambda counts: composed_synops(counts.topology, counts.levels),
    "graded_synops": lambda counts: counts.alike(lambda layer: 0),
    "synops_factored": lambda counts: factored_synops(counts.topology, counts.levels, counts.shared("synops")),
    "synops_merged": lambda counts: merged_synops(counts.topology, counts.levels),
    "bias_events": lambda counts: counts.alike(lambda layer: biased_neurons(layer, counts.shape(layer))),
    "readout_events": lambda counts: counts.alike(counts.neurons),
    "rectifier_events": _rectifier_events,
    "hold_events": _hold_events,
    "pool_events": lambda counts: pool_events(counts.topology, counts.levels, counts.shared("spikes")),
    "neuron_updates": lambda counts: counts.alike(lambda layer: counts.neurons(layer) * counts.result.n_steps),
    "active_updates": _active_updates,
    "inactive_updates": _inactive_updates,
    "operations": _with_updates(2),
    "operations_strict": _with_updates(2, "synops"),
    "memory_reads": _with_updates(4),
    "memory_writes": _with_updates(1),
    "memory_reads_strict": _with_updates(4, "synops"),
    "memory_writes_strict": _with_updates(1, "synops"),
}
"""Name of a count -> the function that finds it."""


def synaptic_operations(network: Any, result: SimulationResult) -> LayerCounts:
    """``synops``: spikes times the weight synapses that carry them, layer by layer.

    Parameters
    ----------
    network : SpikingNetwork or ConvertedGraph
        The network, or its ``graph``.
    result : SimulationResult
        A simulation of it with ``record=True``.

    Returns
    -------
    dict
        Layer -> int64 ``[B]``: operations of each inference at the synapses into that layer. A synapse is an
        entry of the composed map, borders exact; spikes that encode zero are counted like all others.

    Examples
    --------
    >>> import quartz_plugin
    >>> ann = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
    >>> snn = quartz_plugin.convert(ann, torch.rand(32, 4))
    >>> operations = synaptic_operations(snn, snn.run(torch.rand(2, 4)))
    >>> {layer: counts.tolist() for layer, counts in operations.items()}
    {'1': [32, 32], 'output': [24, 24]}
    """
    return InferenceCounts(network, result)["synops"]


def merged_operations(network: Any, result: SimulationResult) -> LayerCounts:
    """``synops_merged``, the paper's count: neuron-steps in which the current changes by more than 1e-6.

    Parameters and returns are those of :func:`synaptic_operations`.
    """
    return InferenceCounts(network, result)["synops_merged"]


def quartz_operations(merged: Tensor, neurons: int, t_max: float, of_neurons: int = 2) -> Tensor:
    """Operations in the paper's sense: ``synops_merged + 2 N T``, N ReLU outputs and logits.

    With 4 and 1 in place of 2, the paper's memory reads and writes.

    Examples
    --------
    >>> quartz_operations(torch.tensor(1000), neurons=10, t_max=16)
    tensor(1320)
    """
    return merged + int(of_neurons * neurons * t_max)


def neuron_count(graph: ConvertedGraph) -> int:
    """``N``: ReLU outputs and logits."""
    topology = Topology.of(graph)
    return sum(topology.shape_of(layer).numel() for layer in topology.layers)


__all__ = [
    "COUNTS",
    "SILENT",
    "InferenceCounts",
    "LayerCounts",
    "changes_step_by_step",
    "merged_operations",
    "neuron_count",
    "quartz_operations",
    "source_levels",
    "synaptic_operations",
]
