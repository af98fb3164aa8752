"""Synapses of a converted network, counted exactly: entries of the composed map between two layers of spikes.

The units of a source reach those of a node by relations, composed of those that the table of operators has for the
modules between them; where several paths meet, they are united (:mod:`quartz_plugin.operators.unions`). One walk over
the graph finds them all. Borders and overlaps are exact.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, fx, nn

from quartz_plugin.graph.converted import ConvertedGraph, Layer, Projection
from quartz_plugin.graph.walk import LevelWalk, Step, Walk, plan_walk
from quartz_plugin.operators.relation import NoProductError, Relation
from quartz_plugin.operators.table import adds, moves_spikes, row_of, weighs
from quartz_plugin.operators.unions import Union, Unions

MOST_PROBED = 2**26
"""Values that may be computed for a report to find how many neurons each unit reaches, by a spike from each."""

Module = TypeVar("Module", bound=nn.Module)

FanOut = dict[str, dict[str, Tensor]]
"""Layer -> name of a source node -> number of synapses of each source unit into that layer. Not to be changed."""


def fan_outs(graph: ConvertedGraph) -> FanOut:
    """:func:`fan_out` of every layer, int64 of each source's shape."""
    counted = _Counted(graph)
    return {
        layer.name: {fan.source.name: counted.units(fan) for fan in counted.into(layer)} for layer in counted.layers
    }


def unit_shapes(graph: ConvertedGraph) -> dict[fx.Node, torch.Size]:
    """Shape of every node's value, without the batch."""
    walk = _Shapes(plan_walk(graph.module))
    with torch.no_grad():
        zeros = torch.zeros(1, *graph.input_shape, dtype=graph.dtype, device=graph.device)
        return {step.node: value.shape[1:] for step, value in walk.each(zeros) if step.role != "at_output"}


class _Shapes(LevelWalk):
    """Levels that neurons hand on as they come: of the right shape, and of no meaning."""

    def at_neurons(self, step: Step) -> Any:
        return self.source(step)


def synapse_counts(graph: ConvertedGraph, most_probed: int = MOST_PROBED) -> dict[str, tuple[int, int] | None]:
    """Layer -> its synapses: of the composed maps into it, and of the chains as software runs them.

    A chain that several layers share is counted for the first of them alone in the second figure. None where a spike
    from each unit would have to be sent, and more than `most_probed` values computed for it.

    Examples
    --------
    >>> import quartz_plugin
    >>> bottleneck = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2), nn.Linear(2, 8), nn.ReLU())
    >>> synapse_counts(quartz_plugin.convert(bottleneck, torch.rand(32, 4)).graph)
    {'1': (32, 32), '4': (64, 32)}
    """
    counted = _Counted(graph, most_probed)
    chains = counted.chains()

    def counts_of(layer: Layer) -> tuple[int, int] | None:
        try:
            return sum(map(counted.total, counted.into(layer))), sum(map(counted.total, chains[layer.name]))
        except _TooManyProbesError:
            return None

    return {layer.name: counts_of(layer) for layer in counted.layers}


Chain = list[tuple[str, Tensor]]
"""Name of a node, number of synapses that each of its units has in the map behind it; one entry for each map."""


def chains(graph: ConvertedGraph) -> dict[str, Chain]:
    """Layer -> the synapses of each linear map on the way to it; a shared map stands with the first layer alone."""
    counted = _Counted(graph)
    return {
        layer: [(fan.source.name, counted.units(fan)) for fan in chain] for layer, chain in counted.chains().items()
    }


class _Fan(NamedTuple):
    """Synapses between the units of a node and those of another, where they are known as a union of relations."""

    source: fx.Node
    union: Union | None
    projection: Projection


class _Counted:
    """Finds which units reach which in a network, and counts them; one that is not to be edited meanwhile."""

    def __init__(self, graph: ConvertedGraph, most_probed: float = math.inf) -> None:
        self.layers, self.module, self.most_probed = graph.layers, graph.module, most_probed
        self.shapes, self.unions = unit_shapes(graph), Unions()
        targets = [layer.projection.target for layer in self.layers]
        walk = _Reaching(plan_walk(self.module, keep=targets), self.shapes, self.unions)
        walk.run(None)
        self.reached: Mapping[fx.Node, _Reached] = walk.values

    def into(self, layer: Layer) -> Iterator[_Fan]:
        """Synapses of the composed maps into a layer, from each of its sources."""
        projection = layer.projection
        reached = self.reached[projection.target]
        return (_Fan(source, reached[source], projection) for source in projection.sources)

    def chains(self) -> dict[str, list[_Fan]]:
        """Layer -> the synapses of each linear map on the way to it; a shared map stands with the first layer alone."""
        seen: set[fx.Node] = set()
        return {layer.name: list(self._chain(layer.projection, seen)) for layer in self.layers}

    def _chain(self, projection: Projection, seen: set[fx.Node]) -> Iterator[_Fan]:
        routed = set(projection.sources)
        for node in projection.nodes:
            each = self.module.get_submodule(str(node.target))
            before = node.all_input_nodes
            if routed.issuperset(before) and moves_spikes(each, self.shapes[before[0]]):
                routed.add(node)
            if node not in seen and adds(each):
                # Spikes that are added as they come do so through a synapse each.
                yield from (self._one_to_one(arg) for arg in before if arg in routed)
            elif node not in seen and weighs(each, self.shapes[before[0]]):
                alone = Projection(self.module, tuple(before), (node,), node)
                reached = _reached(alone, self.shapes, self.unions)
                yield from (_Fan(source, reached[source], alone) for source in before)
            seen.add(node)
        if projection.target in routed:
            yield self._one_to_one(projection.target)

    def _one_to_one(self, node: fx.Node) -> _Fan:
        return _Fan(node, self.unions.identity(self.shapes[node]), Projection(self.module, (node,), (), node))

    def units(self, fan: _Fan) -> Tensor:
        """For each unit of the source, its synapses: int64, of the source's shape."""
        return _units(fan, self.shapes, self.unions, self.most_probed)

    def total(self, fan: _Fan) -> int:
        """Synapses of all units of the source."""
        if fan.union is not None:
            try:
                return self.unions.total(fan.union)
            except NoProductError:
                pass
        return int(self.units(fan).sum())


_Reached = dict[fx.Node, Union | None]
"""Node that emits spikes -> what its units reach at some other node; None where that is no small union of products."""


class _Reaching(Walk):
    """Finds what the units of each node that emits spikes reach at all others."""

    def __init__(self, steps: Iterable[Step], shapes: Mapping[fx.Node, torch.Size], unions: Unions) -> None:
        super().__init__(steps)
        self.shapes, self.unions = shapes, unions

    def _itself(self, step: Step) -> _Reached:
        return {step.node: self.unions.identity(self.shapes[step.node])}

    at_input = at_neurons = at_pool = _itself

    def at_delay(self, step: Step) -> _Reached:
        reached: _Reached = self.source(step)
        return reached

    def at_synapses(self, step: Step) -> _Reached:
        if step.module is None or step.arguments is None:
            return dict.fromkeys(source for before in step.sources for source in self.values[before])
        shapes = [self.shapes[before] for before in step.arguments]
        reached: _Reached = {}
        for place, before in enumerate(step.arguments):
            for source, union in self.values[before].items():
                try:
                    if union is None:
                        raise NoProductError
                    behind = self.unions.composed(union, step.module, place, shapes)
                    known = reached.get(source, behind)
                    reached[source] = None if known is None else self.unions.united(known, behind)
                except NoProductError:
                    reached[source] = None
        return reached


def _reached(projection: Projection, shapes: Mapping[fx.Node, torch.Size], unions: Unions) -> _Reached:
    """What the units of the sources of a projection reach at its target."""
    from_sources = {source: {source: unions.identity(shapes[source])} for source in projection.sources}
    steps = plan_walk(projection.module, keep=[projection.target], among=projection.nodes)
    reached: _Reached = _Reaching(steps, shapes, unions).run_from(from_sources)[projection.target]
    return reached


def pool_fan_out(pool: nn.Module, shape: Sequence[int]) -> Tensor:
    """In how many windows of a max pooling each unit is: int64 of this shape (no batch).

    Examples
    --------
    >>> pool_fan_out(nn.MaxPool1d(3, stride=1), (1, 5))
    tensor([[1, 2, 3, 2, 1]])
    """
    product = torch.ones((), dtype=torch.int64)
    for count in pool_relation(pool, shape).reached():
        product = product.unsqueeze(-1) * count
    return product


def pool_relation(pool: nn.Module, shape: Sequence[int]) -> Relation:
    """Units in each window of a max pooling."""
    relation, row = Relation.identity(shape), row_of(pool)
    if row is None or row.relate is None:
        raise TypeError(f"pool must be a max-pooling module of torch.nn, got {pool!r}")
    row.relate(relation, pool, 0, [shape])
    return relation


def relation_to(projection: Projection, source: fx.Node, shapes: dict[fx.Node, torch.Size]) -> Relation | None:
    """Units of a source by the neurons that they reach; None where it is no product."""
    union = _reached(projection, shapes, Unions())[source]
    return union[0].copy() if union is not None and len(union) == 1 else None


class _TooManyProbesError(Exception):
    pass


def fan_out(
    projection: Projection, shapes: dict[fx.Node, torch.Size], most_probed: float = math.inf
) -> dict[fx.Node, Tensor]:
    """Number of neurons that each source unit reaches: its weight synapses, an entry of the composed map each.

    Parameters
    ----------
    projection : Projection
        The synapses of a layer.
    shapes : dict
        Shape of every node's value, as :func:`unit_shapes` gives.
    most_probed : int, optional
        Where a spike from each unit would have to be sent, and more values computed than this, give up with an
        exception.

    Returns
    -------
    dict
        Source -> int64, of the source's shape. Not to be changed.
    """
    unions = Unions()
    reached = _reached(projection, shapes, unions)
    return {
        source: _units(_Fan(source, reached[source], projection), shapes, unions, most_probed)
        for source in projection.sources
    }


def _units(fan: _Fan, shapes: Mapping[fx.Node, torch.Size], unions: Unions, most_probed: float) -> Tensor:
    if fan.union is not None:
        try:
            units = unions.units(fan.union)
            return units.view(shapes[fan.source]) if fan.union else units.expand(shapes[fan.source])
        except NoProductError:
            pass
    return _probed(fan.projection, fan.source, shapes, most_probed)


def probed_fan_out(projection: Projection, shapes: dict[fx.Node, torch.Size]) -> dict[fx.Node, Tensor]:
    """:func:`fan_out` by sending a spike from each unit through synapses of weight 1; exact, and slow."""
    return {source: _probed(projection, source, shapes) for source in projection.sources}


def with_unit_weights(module: Module) -> Module:
    """Copy of a module in which all weights are 1."""
    ones = copy.deepcopy(module)
    for parameter in ones.parameters():
        parameter.data = torch.ones_like(parameter)
    for each in ones.modules():
        # Of fixed weights, which are no parameters.
        if (weigh_one := getattr(each, "weigh_one", None)) is not None:
            weigh_one()
    return ones


def _probed(
    projection: Projection,
    source: fx.Node,
    shapes: Mapping[fx.Node, torch.Size],
    most_probed: float = math.inf,
    chunk: int = 256,
) -> Tensor:
    behind = {source}
    for node in projection.nodes:
        if not behind.isdisjoint(node.all_input_nodes):
            behind.add(node)
    passed = [node for node in projection.nodes if node in behind]
    units = shapes[source].numel()
    if units * sum(shapes[node].numel() for node in passed) > most_probed:
        raise _TooManyProbesError
    steps = [
        step if step.module is None else step._replace(module=with_unit_weights(step.module).cpu().double())
        for step in plan_walk(projection.module, keep=[projection.target], among=passed)
    ]
    silent = {before for step in steps for before in step.sources} - behind
    reached = []
    for start in range(0, units, chunk):
        stop = min(start + chunk, units)
        spikes = torch.zeros(stop - start, units, dtype=torch.float64)
        spikes[torch.arange(stop - start), torch.arange(start, stop)] = 1.0
        values = {node: torch.zeros(stop - start, *shapes[node], dtype=torch.float64) for node in silent}
        values[source] = spikes.view(-1, *shapes[source])
        with torch.no_grad():
            current = LevelWalk(steps).run_from(values)[projection.target]
        reached.append((current > 0).unsqueeze(-1).flatten(1).sum(dim=1))
    return torch.cat(reached).view(shapes[source])


__all__ = [
    "FanOut",
    "Relation",
    "chains",
    "fan_out",
    "fan_outs",
    "pool_fan_out",
    "pool_relation",
    "probed_fan_out",
    "relation_to",
    "synapse_counts",
    "unit_shapes",
    "with_unit_weights",
]
