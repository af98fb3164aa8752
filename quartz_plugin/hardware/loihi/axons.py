"""In-axons: how many units of its sources reach each tile of a layer."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping

import torch
from torch import Tensor, fx

from quartz_plugin.engines.convolutions import as_image
from quartz_plugin.graph import INPUT, Layer, Projection
from quartz_plugin.graph.synapses import relation_to
from quartz_plugin.graph.topology import Topology
from quartz_plugin.hardware.loihi.cutting import Axons, Parts, Size, parts_of

MOST_PROBES = 64
"""Tiles of a layer at which several paths from one unit meet, whose in-axons are found one by one."""


def population_at(node: fx.Node) -> str:
    """Name of the population whose spikes a node emits."""
    return INPUT if node.op == "placeholder" else str(node.target)


class InAxons:
    """Counts the units of its sources that reach each tile of a layer, each unit once."""

    def __init__(self, topology: Topology, layer: Layer, ones: fx.GraphModule) -> None:
        self.graph, self.layer, self.ones = topology.graph, layer, ones
        self.neurons = topology.shape_of(layer)
        self.shape = as_image(tuple(self.neurons))
        by_node = {topology.nodes[name]: shape for name, shape in topology.shapes.items()}
        self.shapes = {source: by_node[source] for source in layer.projection.sources}
        self.relations = {source: relation_to(layer.projection, source, by_node) for source in self.shapes}
        self.known: dict[Size, Axons] = {}

    def __call__(self, size: Size) -> Axons:
        """In-axons of the layer in tiles of this size."""
        if size not in self.known:
            self.known[size] = self._find(parts_of(self.shape, size))
        return self.known[size]

    def _find(self, parts: Parts) -> Axons:
        by_source = {}
        for source, relation in self.relations.items():
            counts = None if relation is None else relation.units_into(parts_of_rank(parts, len(self.neurons)))
            if counts is None:
                return self._probe(parts)
            by_source[population_at(source)] = counts
        return Axons(int(_total(by_source).max()), {source: int(counts.sum()) for source, counts in by_source.items()})

    def _probe(self, parts: Parts) -> Axons:
        """The same by gradients, where paths meet: of all tiles, or of some of them where there are many."""
        tiles = math.prod(map(len, parts))
        chosen = parts if tiles <= MOST_PROBES else tuple([each[0], each[len(each) // 2], each[-1]] for each in parts)
        probed = [self._gradients(tile) for tile in itertools.product(*chosen)]
        fullest = max(sum(tile.values()) for tile in probed)
        share = tiles / len(probed)
        return Axons(fullest, {s: math.ceil(share * sum(tile[s] for tile in probed)) for s in probed[0]})

    @torch.enable_grad()
    def _gradients(self, tile: tuple[slice, ...]) -> dict[str, int]:
        """Units that change the tile's currents, all weights 1."""
        projection = self.layer.projection
        inputs = {
            source: torch.zeros(1, *shape, dtype=self.graph.dtype, device=self.graph.device, requires_grad=True)
            for source, shape in self.shapes.items()
        }
        ones = Projection(self.ones, projection.sources, projection.nodes, projection.target)
        current = ones(inputs).reshape(self.shape)[tile].sum()
        gradients = torch.autograd.grad(current, list(inputs.values()), allow_unused=True)
        return {
            population_at(source): 0 if gradient is None else int((gradient != 0).sum())
            for source, gradient in zip(inputs, gradients, strict=True)
        }


def parts_of_rank(parts: Parts, rank: int) -> list[list[slice]]:
    """Parts of an image's dimensions as those of a vector or sequence."""
    return [parts[0], *parts[1:][3 - rank :]] if rank <= 3 else []


def _total(by_source: Mapping[str, Tensor]) -> Tensor:
    first, *others = by_source.values()
    return sum(others, first)
