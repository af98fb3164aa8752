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

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from importlib.util import find_spec
from typing import Any, TypeVar

import torch
from torch import Tensor, fx

from quartz_plugin.coding import NO_SPIKE, Window
from quartz_plugin.costs.spikes import (
    early_spike_counts,
    per_image,
    spike_counts,
    sums_of_steps,
    zero_spike_counts,
)
from quartz_plugin.engines.event import LEAST_CHANGE, count_changes, pooled
from quartz_plugin.engines.result import SimulationResult
from quartz_plugin.engines.stepped import walk_layer
from quartz_plugin.graph import (
    INPUT,
    ConvertedGraph,
    Layer,
    called_by,
    check_modules,
    evaluated,
    is_spike_source,
    propagate_levels,
    spike_sources,
)
from quartz_plugin.graph.fingerprint import Kept, structure_of
from quartz_plugin.graph.synapses import Chain, FanOut, chains, fan_outs, pool_fan_out, unit_shapes, with_unit_weights
from quartz_plugin.neuron import FirstSpikeMaxPool
from quartz_plugin.operators.modules import AVERAGES, WEIGHTED, Add, OneToOne

SILENT = -1
"""Level of a source that sends no spike; no spike ever says it."""

LayerCounts = dict[str, Tensor]
"""Layer -> int64 ``[B]``."""

_Found = TypeVar("_Found")


class Topology:
    """Who is connected to whom in a network: found when asked for, kept while its structure is the same.

    It holds no node: nodes hold their network, which it must not keep alive.
    """

    def __init__(self) -> None:
        self._found: dict[str, Any] = {}

    @staticmethod
    def of(graph: ConvertedGraph) -> Topology:
        """Return those of this network."""
        return _SYNAPSES.of(graph)

    def fan_outs(self, graph: ConvertedGraph) -> FanOut:
        """Return :func:`quartz_plugin.graph.synapses.fan_outs`, float64: dot products of it are exact below 2^53."""
        return self._once("fan_outs", lambda: {k: _double(v) for k, v in fan_outs(graph).items()})

    def chains(self, graph: ConvertedGraph) -> dict[str, Chain]:
        """Return :func:`quartz_plugin.graph.synapses.chains`."""
        return self._once("chains", lambda: chains(graph))

    def chained(self, graph: ConvertedGraph) -> set[str]:
        """Layers that have other synapses in their composed maps than in the maps one after the other."""
        return self._once("chained", lambda: self._find_chained(graph))

    def _find_chained(self, graph: ConvertedGraph) -> set[str]:
        fan_outs, chains, nodes = self.fan_outs(graph), self.chains(graph), graph.module.graph.nodes
        routed: set[str] = set()
        for node in nodes:
            module = called_by(graph.module, node)
            weighs = isinstance(module, (*WEIGHTED, *AVERAGES, OneToOne, Add))
            moves = not weighs and all(before.name in routed for before in node.all_input_nodes)
            if is_spike_source(graph.module, node) or moves:
                routed.add(node.name)
        # Of maps that hear spikes alone, no unit has fewer synapses than in what they compose to.
        plain = {
            layer
            for layer, chain in chains.items()
            if all(before in routed for before, _ in chain)
            and sum(int(count.sum()) for _, count in chain)
            == sum(int(count.sum()) for count in fan_outs[layer].values())
        }
        return set(chains) - plain

    def shapes(self, graph: ConvertedGraph) -> dict[str, torch.Size]:
        """Name of a node -> shape of its value, without the batch."""
        return self._once("shapes", lambda: {node.name: shape for node, shape in unit_shapes(graph).items()})

    def layout(self, graph: ConvertedGraph) -> dict[str, tuple[int, ...]]:
        """Layer -> shape of its neurons, "input" first. ValueError where a node calls no module."""
        return self._once("layout", lambda: self._find_layout(graph))

    def _find_layout(self, graph: ConvertedGraph) -> dict[str, tuple[int, ...]]:
        check_modules(graph)
        shapes = self.shapes(graph)
        return {INPUT: graph.input_shape, **{each.name: tuple(shapes[each.node.name]) for each in graph.layers}}

    def windows(self, graph: ConvertedGraph) -> dict[str, Window]:
        """Layer -> window of its spikes, "input" first."""
        return self._once("windows", graph.windows)

    def pools(self, graph: ConvertedGraph) -> dict[str, list[tuple[str, Tensor]]]:
        """Layer -> for each max pooling in front of it, the node that it pools and how many windows a unit is in.

        A pooling that several layers listen to stands with the first.
        """
        return self._once("pools", lambda: self._find_pools(graph))

    def _find_pools(self, graph: ConvertedGraph) -> dict[str, list[tuple[str, Tensor]]]:
        shapes, seen = self.shapes(graph), set()
        pools: dict[str, list[tuple[str, Tensor]]] = {layer.name: [] for layer in graph.layers}
        for layer in graph.layers:
            pending = list(layer.projection.sources)
            while pending:
                node = pending.pop()
                pool = called_by(graph.module, node)
                if not isinstance(pool, FirstSpikeMaxPool) or node in seen:
                    continue
                seen.add(node)
                (before,) = node.all_input_nodes
                pools[layer.name].append((before.name, pool_fan_out(pool.pool, shapes[before.name])))
                pending += spike_sources(graph.module, before)
        return pools

    def _once(self, name: str, find: Callable[[], _Found]) -> _Found:
        if name not in self._found:
            self._found[name] = find()
        found: _Found = self._found[name]
        return found


_SYNAPSES = Kept(lambda graph: Topology(), structure_of)


def _double(counts: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {source: count.flatten().double() for source, count in counts.items()}


class InferenceCounts:
    """What a simulation costs: name of a count -> layer -> int64 ``[B]``.

    A count is found when it is asked for, once for all who read the same result. The names:

    - ``spikes``, ``zero_spikes`` (those that only say 0), of each layer and of "input"; ``early_spikes``;
    - ``synops``: spikes times the weight synapses into a layer that carry them, entries of the composed maps;
      ``synops_factored``: the same maps as the chains they are computed as, each synapse whose unit any spike
      reaches once; ``synops_merged``: neuron-steps in which the current changes; ``graded_synops``: those that
      would need a multiplication, of which there are none here;
    - ``bias_events``, ``readout_events``, ``rectifier_events``, ``hold_events`` (two a neuron), one for each neuron
      that has them, be it through a synapse or by the neuron itself; ``pool_events``: spikes times the windows of max
      pooling they are in;
    - ``neuron_updates``: neurons times steps; ``active_updates``: those from the first step at which a layer can hear
      a spike of an image until the neuron has fired or is switched off; ``inactive_updates``: the others;
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
        self.graph, self.result = graph, result
        self._found = result.memo(graph)
        if "checked" not in self._found:
            self._check()

    def _check(self) -> None:
        windows = self.synapses.windows(self.graph)
        names = self.synapses.layout(self.graph)
        found = {name: tuple(steps.shape[1:]) for name, steps in self.result.spike_steps.items()}
        if windows != self.result.windows or names != found:
            raise ValueError(
                "the result is of another network: its layers, shapes or windows are not this network's; "
                f"given are {found} with windows {self.result.windows}, expected {names} with {windows}"
            )
        self._found["checked"] = True

    def __iter__(self) -> Any:
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

    @cached_property
    def layers(self) -> list[Layer]:
        """The spiking layers."""
        return self.graph.layers

    @property
    def synapses(self) -> Topology:
        """Who is connected to whom; looked up once a result, for all metrics."""
        if "synapses" not in self._found:
            self._found["synapses"] = Topology.of(self.graph)
        found: Topology = self._found["synapses"]
        return found

    @property
    def levels(self) -> dict[fx.Node, Tensor]:
        """:func:`source_levels`."""
        if "levels" not in self._found:
            self._found["levels"] = {node.name: v for node, v in source_levels(self.graph, self.result).items()}
        by_name = self._found["levels"]
        return {node: by_name[node.name] for node in self.graph.module.graph.nodes if node.name in by_name}

    def shape(self, layer: Layer) -> torch.Size:
        """Shape of a layer's neurons, without the batch."""
        return self.synapses.shapes(self.graph)[layer.node.name]

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


def source_levels(graph: ConvertedGraph, result: SimulationResult) -> dict[fx.Node, Tensor]:
    """Levels (float32) that every node emits, pools included; :data:`SILENT` where no spike comes."""
    spikes = spike_counts(result)
    levels: dict[fx.Node, Tensor] = {}
    names = {layer.node: layer.name for layer in graph.layers}
    for node in graph.module.graph.nodes:
        if not is_spike_source(graph.module, node):
            continue
        if node.op == "placeholder" or node in names:
            name = names.get(node, INPUT)
            window, steps = result.windows[name], result.spike_steps[name]
            all_fire = bool((spikes[name] == steps.shape[1:].numel()).all())
            levels[node] = window.levels_at(steps, None if all_fire else SILENT, graph.dtype)
            continue
        module = graph.module.get_submodule(str(node.target))
        assert isinstance(module, FirstSpikeMaxPool)
        levels[node] = pooled(module.pool, _routed(graph.module, node.all_input_nodes[0], levels))
    return levels


def _routed(module: fx.GraphModule, node: fx.Node, levels: Mapping[fx.Node, Tensor]) -> Tensor:
    """Levels at a node between a spike source and a pool, where only routing can stand."""

    def route(each: fx.Node) -> Tensor:
        # Shifted, so that the border a padding adds is silent.
        inputs = {source: known[source] - SILENT for source in each.all_input_nodes}
        routed: Tensor = propagate_levels(module, each, inputs) + SILENT
        return routed

    known = dict(levels)
    return evaluated(node, known, route)


def delivered(spikes: Tensor, fan_out: Tensor) -> Tensor:
    """Spikes ``[B, ...]`` of units times the synapses that each unit has: int64 ``[B]``, exact below 2^53."""
    return (spikes.flatten(1).double() @ fan_out.flatten().to(spikes.device, torch.float64)).long()


def _sum(parts: list[Tensor], counts: InferenceCounts) -> Tensor:
    return sum(parts, counts.all_images(0))


def _synops(counts: InferenceCounts) -> LayerCounts:
    levels = {node.name: value for node, value in counts.levels.items()}
    fired: dict[str, Tensor | None] = {}

    def of_source(source: str, fan_out: Tensor) -> Tensor:
        if source not in fired:
            # Where all fire, all synapses deliver.
            said = levels[source]
            fired[source] = None if said.numel() and bool(said.min() > SILENT) else said != SILENT
        these = fired[source]
        if these is None:
            return counts.all_images(int(fan_out.sum()))
        return delivered(these, fan_out)

    return {
        layer: _sum([of_source(source, fan_out) for source, fan_out in by_source.items()], counts)
        for layer, by_source in counts.synapses.fan_outs(counts.graph).items()
    }


def _synops_factored(counts: InferenceCounts) -> LayerCounts:
    module, chains_of = counts.graph.module, counts.synapses.chains(counts.graph)
    chained = counts.synapses.chained(counts.graph)
    if not chained:
        return counts.shared("synops")
    dtype = counts.graph.dtype
    reached = {node: (value != SILENT).to(dtype) for node, value in counts.levels.items()}
    nodes = {node.name: node for node in module.graph.nodes}

    def reach(node: fx.Node) -> Tensor:
        """1 where any spike reaches a unit of this node, else 0."""
        inputs = {source: reached[source] for source in node.all_input_nodes}
        each = module.get_submodule(str(node.target))
        weighs = isinstance(each, (*WEIGHTED, *AVERAGES, OneToOne))
        through = with_unit_weights(each)(*inputs.values()) if weighs else propagate_levels(module, node, inputs)
        reaches: Tensor = (through > 0).to(through.dtype)
        return reaches

    return {
        layer: _sum([delivered(evaluated(nodes[before], reached, reach) > 0, count) for before, count in chain], counts)
        if layer in chained
        else counts.shared("synops")[layer]
        for layer, chain in chains_of.items()
    }


def _synops_merged(counts: InferenceCounts) -> LayerCounts:
    graph, levels = counts.graph, counts.levels
    by_event = {}
    if graph.device.type == "cpu" and find_spec("numba") is not None:
        by_event = count_changes(graph, levels)
    return {
        layer.name: by_event[layer.name]
        if layer.name in by_event
        else changes_step_by_step(layer, {source: levels[source] for source in layer.projection.sources})
        for layer in counts.layers
    }


def changes_step_by_step(layer: Layer, levels: Mapping[fx.Node, Tensor]) -> Tensor:
    """Neuron-steps in which a layer's currents change by more than 1e-6, by stepping it: int64 ``[B]``.

    `levels` are those of its sources, :data:`SILENT` where no spike comes.
    """
    current: Tensor | None = None
    changes: Any = 0
    for step, _, state in walk_layer(layer, levels):
        change = state.i if current is None else state.i - current
        changes = changes + per_image(change.abs() > LEAST_CHANGE)
        current = state.i
        if step == layer.neuron.clock.readout and layer.neuron.p.bias_code != "spike":
            break
    assert isinstance(changes, Tensor)
    return changes


def biased_neurons(layer: Layer, shape: torch.Size) -> int:
    """Neurons of a layer of this shape that have a bias other than 0; a bias spike says 0 as well."""
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


def _pool_events(counts: InferenceCounts) -> LayerCounts:
    module, levels = counts.graph.module, counts.levels
    nodes = {node.name: node for node in module.graph.nodes}

    def at(before: str, windows: Tensor) -> Tensor:
        layer = str(nodes[before].target)
        if bool((windows == 1).all()) and layer in counts.shared("spikes"):
            return counts.shared("spikes")[layer]
        return delivered(_routed(module, nodes[before], levels) != SILENT, windows)

    return {
        layer: _sum([at(before, windows) for before, windows in pools], counts)
        for layer, pools in counts.synapses.pools(counts.graph).items()
    }


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
    """Step from which on a layer may hear a spike: its input window's first, or that of each image's earliest."""
    clock = layer.neuron.clock
    earliest = [counts.levels[source].flatten(1).amax(dim=1) for source in layer.projection.sources]
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
    "synops": _synops,
    "graded_synops": lambda counts: counts.alike(lambda layer: 0),
    "synops_factored": _synops_factored,
    "synops_merged": _synops_merged,
    "bias_events": lambda counts: counts.alike(lambda layer: biased_neurons(layer, counts.shape(layer))),
    "readout_events": lambda counts: counts.alike(counts.neurons),
    "rectifier_events": _rectifier_events,
    "hold_events": _hold_events,
    "pool_events": _pool_events,
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
"""Name of a count -> what finds it."""


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
        entry of the composed map, borders exact; spikes that say zero are counted like all others.

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
    shapes = Topology.of(graph).shapes(graph)
    return sum(shapes[layer.node.name].numel() for layer in graph.layers)


__all__ = [
    "COUNTS",
    "SILENT",
    "InferenceCounts",
    "LayerCounts",
    "Topology",
    "changes_step_by_step",
    "merged_operations",
    "neuron_count",
    "quartz_operations",
    "source_levels",
    "synaptic_operations",
]
