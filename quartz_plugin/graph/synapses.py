"""Synapses of a converted network, counted exactly: entries of the composed map between two layers of spikes.

The units of a source reach the neurons of a layer by a relation, composed of those that the table of operators has for
the modules between them (:mod:`quartz_plugin.operators.relation`); where several paths lead from a source to a layer,
their union is counted by inclusion and exclusion. Borders and overlaps are exact.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, fx, nn

from quartz_plugin.graph.converted import ConvertedGraph, Projection
from quartz_plugin.graph.walk import LevelWalk, Step, plan_walk
from quartz_plugin.operators.relation import NoProductError, Relation, row_sums
from quartz_plugin.operators.table import adds, moves_spikes, row_of, weighs

MOST_PATHS = 6
"""Paths from one source into one layer whose union is counted by inclusion and exclusion; beyond, units are probed."""

Module = TypeVar("Module", bound=nn.Module)

FanOut = dict[str, dict[str, Tensor]]
"""Layer -> name of a source node -> number of synapses of each source unit into that layer."""


def fan_outs(graph: ConvertedGraph) -> FanOut:
    """:func:`fan_out` of every layer, int64 of each source's shape."""
    shapes = unit_shapes(graph)
    counts = {}
    for layer in graph.layers:
        by_source = fan_out(layer.projection, shapes)
        counts[layer.name] = {source.name: count for source, count in by_source.items()}
    return counts


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


def synapse_counts(graph: ConvertedGraph, most_probes: int = 4096) -> dict[str, tuple[int, int] | None]:
    """Layer -> its synapses: of the composed maps into it, and of the chains as software runs them.

    A chain that several layers share is counted for the first of them alone in the second figure. None where a
    count would have to send a spike from each of more than `most_probes` units.

    Examples
    --------
    >>> import quartz_plugin
    >>> bottleneck = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2), nn.Linear(2, 8), nn.ReLU())
    >>> synapse_counts(quartz_plugin.convert(bottleneck, torch.rand(32, 4)).graph)
    {'1': (32, 32), '4': (64, 32)}
    """
    shapes = unit_shapes(graph)
    counted: set[fx.Node] = set()
    counts: dict[str, tuple[int, int] | None] = {}
    for layer in graph.layers:
        try:
            composed = fan_out(layer.projection, shapes, most_probes).values()
            chain = _chain(layer.projection, shapes, counted, most_probes)
            counts[layer.name] = sum(int(count.sum()) for count in composed), sum(int(c.sum()) for _, c in chain)
        except _TooManyProbesError:
            counts[layer.name] = None
    return counts


Chain = list[tuple[str, Tensor]]
"""Name of a node, number of synapses that each of its units has in the map behind it; one entry for each map."""


def chains(graph: ConvertedGraph) -> dict[str, Chain]:
    """Layer -> the synapses of each linear map on the way to it; a shared map stands with the first layer alone."""
    shapes = unit_shapes(graph)
    counted: set[fx.Node] = set()
    return {layer.name: _chain(layer.projection, shapes, counted) for layer in graph.layers}


def _chain(
    projection: Projection, shapes: dict[fx.Node, torch.Size], counted: set[fx.Node], most_probes: int | None = None
) -> Chain:
    module = projection.module
    routed = set(projection.sources)
    chain: Chain = []

    def one_to_one(node: fx.Node) -> tuple[str, Tensor]:
        return node.name, torch.ones(shapes[node], dtype=torch.int64)

    for node in projection.nodes:
        each = module.get_submodule(str(node.target))
        before = node.all_input_nodes
        if routed.issuperset(before) and moves_spikes(each, shapes[before[0]]):
            routed.add(node)
        if node not in counted and adds(each):
            # Spikes that are added as they come do so through a synapse each.
            chain += [one_to_one(arg) for arg in before if arg in routed]
        elif node not in counted and weighs(each, shapes[before[0]]):
            each_count = fan_out(Projection(module, tuple(before), (node,), node), shapes, most_probes)
            chain += [(source.name, count) for source, count in each_count.items()]
        counted.add(node)
    return [*chain, one_to_one(projection.target)] if projection.target in routed else chain


def pool_fan_out(pool: nn.Module, shape: Sequence[int]) -> Tensor:
    """In how many windows of a max pooling each unit is: int64 of this shape (no batch).

    Examples
    --------
    >>> pool_fan_out(nn.MaxPool1d(3, stride=1), (1, 5))
    tensor([[1, 2, 3, 2, 1]])
    """
    return _outer(pool_relation(pool, shape).reached())


def pool_relation(pool: nn.Module, shape: Sequence[int]) -> Relation:
    """Units in each window of a max pooling."""
    relation, row = Relation.identity(shape), row_of(pool)
    if row is None or row.relate is None:
        raise TypeError(f"pool must be a max-pooling module of torch.nn, got {pool!r}")
    row.relate(relation, pool, 0, [shape])
    return relation


def relation_to(projection: Projection, source: fx.Node, shapes: dict[fx.Node, torch.Size]) -> Relation | None:
    """Units of a source by the neurons that they reach; None where several paths lead there, or it is no product."""
    paths = _paths(projection, source)
    if paths is None or len(paths) != 1:
        return None
    return _along(projection, paths[0], shapes)


class _TooManyProbesError(Exception):
    pass


def fan_out(
    projection: Projection, shapes: dict[fx.Node, torch.Size], most_probes: int | None = None
) -> dict[fx.Node, Tensor]:
    """Number of neurons that each source unit reaches: its weight synapses, an entry of the composed map each.

    Parameters
    ----------
    projection : Projection
        The synapses of a layer.
    shapes : dict
        Shape of every node's value, as :func:`unit_shapes` gives.
    most_probes : int, optional
        Where a count would need more spikes than this, give up with an exception.

    Returns
    -------
    dict
        Source -> int64, of the source's shape.
    """
    counts = {}
    for source in projection.sources:
        paths = _paths(projection, source)
        count = None if paths is None else _size_of_union(projection, paths, shapes)
        if count is None and most_probes is not None and shapes[source].numel() > most_probes:
            raise _TooManyProbesError
        counts[source] = _probed(projection, source, shapes) if count is None else count.view(shapes[source])
    return counts


def probed_fan_out(projection: Projection, shapes: dict[fx.Node, torch.Size]) -> dict[fx.Node, Tensor]:
    """:func:`fan_out` by sending a spike from each unit through synapses of weight 1; exact, and slow."""
    return {source: _probed(projection, source, shapes) for source in projection.sources}


def with_unit_weights(module: Module) -> Module:
    """Copy of a module in which all weights are 1."""
    ones = copy.deepcopy(module)
    for parameter in ones.parameters():
        parameter.data = torch.ones_like(parameter)
    return ones


def _probed(projection: Projection, source: fx.Node, shapes: dict[fx.Node, torch.Size], chunk: int = 256) -> Tensor:
    ones = with_unit_weights(projection.module).cpu().double()
    probe = Projection(ones, projection.sources, projection.nodes, projection.target)
    shape = shapes[source]
    units = math.prod(shape)
    reached = []
    for start in range(0, units, chunk):
        stop = min(start + chunk, units)
        spikes = torch.zeros(stop - start, units, dtype=torch.float64)
        spikes[torch.arange(stop - start), torch.arange(start, stop)] = 1.0
        inputs = {other: torch.zeros(stop - start, *shapes[other], dtype=torch.float64) for other in probe.sources}
        inputs[source] = spikes.view(-1, *shape)
        with torch.no_grad():
            reached.append((probe(inputs) > 0).unsqueeze(-1).flatten(1).sum(dim=1))
    return torch.cat(reached).view(shape)


Path = list[tuple[fx.Node, int]]
"""Nodes on the way, each with the place among its inputs at which the path enters it."""


def _paths(projection: Projection, source: fx.Node) -> list[Path] | None:
    """All paths from a source to the neurons; None where there are too many."""
    inside = set(projection.nodes)
    if source is projection.target:
        return [[]]
    paths: list[Path] = []
    pending: list[tuple[fx.Node, Path]] = [(projection.target, [])]
    while pending:
        node, behind = pending.pop()
        for place, before in enumerate(arg for arg in node.args if isinstance(arg, fx.Node)):
            path = [(node, place), *behind]
            if before is source:
                paths.append(path)
            elif before in inside:
                pending.append((before, path))
        if len(paths) + len(pending) > 64 * MOST_PATHS or len(paths) > MOST_PATHS:
            return None
    return paths


def _size_of_union(projection: Projection, paths: list[Path], shapes: dict[fx.Node, torch.Size]) -> Tensor | None:
    """For each source unit, how many neurons it reaches on any of the paths."""
    relations: list[Relation] = []
    for path in paths:
        relation = _along(projection, path, shapes)
        if relation is None or (relations and not relation.matches(relations[0])):
            return None
        relations.append(relation)
    total: Tensor | None = None
    for count in range(1, len(relations) + 1):
        for chosen in itertools.combinations(relations, count):
            if count == 1:
                reached = chosen[0].reached()
            else:
                places = range(len(chosen[0].factors))
                reached = [row_sums(torch.stack([r.factor(place) for r in chosen]).amin(0)) for place in places]
            size = _outer(reached)
            size = size if count % 2 else -size
            total = size if total is None else total + size
    return total


def _outer(counts: list[Tensor]) -> Tensor:
    """For each unit of the product, how many coordinates it is related to."""
    product = torch.ones((), dtype=torch.int64)
    for count in counts:
        product = product.unsqueeze(-1) * count
    return product


def _along(projection: Projection, path: Path, shapes: dict[fx.Node, torch.Size]) -> Relation | None:
    if not path:
        source = projection.target
    else:
        node, place = path[0]
        source = [arg for arg in node.args if isinstance(arg, fx.Node)][place]
    relation = Relation.identity(shapes[source])
    for node, place in path:
        module = projection.module.get_submodule(str(node.target))
        inputs = [arg for arg in node.args if isinstance(arg, fx.Node)]
        row = row_of(module)
        if row is None or row.relate is None:
            return None
        try:
            row.relate(relation, module, place, [shapes[arg] for arg in inputs])
        except NoProductError:
            return None
    return relation


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
