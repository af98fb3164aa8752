"""Plans of how spikes arrive at layers, kept with their network until it is edited."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor, fx

from quartz_plugin.engines.convolutions import (
    Convolution,
    as_image,
    channel_ranges,
    convolutions_of,
    places_as_channels,
)
from quartz_plugin.engines.event import constants
from quartz_plugin.engines.event.constants import LANES
from quartz_plugin.engines.event.records import Array, Bias, Direct, Neurons, Routes, Tiles
from quartz_plugin.engines.event.tables import layout_of, tables_of
from quartz_plugin.functional import TTFSParameters, check_bias_shape
from quartz_plugin.graph import ConvertedGraph, Layer
from quartz_plugin.graph.fingerprint import Snapshot
from quartz_plugin.graph.topology import Derived, Topology
from quartz_plugin.graph.walk import Step, plan_walk


@dataclass(frozen=True)
class LayerPlan:
    """Paths of spikes into a layer of this shape: one plan for each range of its channels."""

    shape: tuple[int, ...]
    ranges: list[ChannelPlan]

    @cached_property
    def sources(self) -> frozenset[str]:
        """Names of the nodes whose levels are read."""
        return frozenset(source for channel_range in self.ranges for source in channel_range.sources)


@dataclass(frozen=True)
class NetworkPlan:
    """Plans of all layers (None: the layer is stepped), the nodes that move levels, and the walk over all of them."""

    layers: dict[str, LayerPlan | None]
    routing: set[fx.Node]
    steps: tuple[Step, ...]

    @property
    def synapse_count(self) -> int:
        """About how many synapses the planned layers have."""
        ranges = [each for layer in self.layers.values() if layer is not None for each in layer.ranges]
        return sum(each.synapse_count for each in ranges)


def _plan_network(topology: Topology) -> NetworkPlan:
    graph = topology.graph
    shapes = {topology.nodes[name]: shape for name, shape in topology.shapes.items()}
    layers = {layer.name: _plan_layer(graph, layer, shapes) for layer in topology.layers}

    def needs(node: fx.Node) -> list[fx.Node]:
        layer = topology.layer_at.get(node)
        if layer is None:
            return node.all_input_nodes
        plan, sources = layers[layer.name], list(layer.projection.sources)
        if plan is None:
            return sources
        # The output's membranes are computed of the spikes themselves.
        return [topology.nodes[name] for name in plan.sources] + (sources if layer is topology.output else [])

    steps = plan_walk(graph.module, list(topology.layer_at), [topology.output.node], needs)
    return NetworkPlan(layers, set(topology.routed), steps)


PLANS = Derived(_plan_network, from_weights=True)
"""Plans of networks, each kept until its network is edited."""


def plan_of(graph: ConvertedGraph, snapshot: Snapshot | None = None) -> NetworkPlan:
    """Plan of a network, kept until it is edited; `snapshot`, where that has just been taken."""
    return PLANS.of(graph, snapshot)


def _plan_layer(graph: ConvertedGraph, layer: Layer, shapes: dict[fx.Node, torch.Size]) -> LayerPlan | None:
    shape = tuple(shapes[layer.node])
    check_bias_shape(layer.neuron.bias, torch.empty(1, *shape, device="meta"))
    convolutions = convolutions_of(layer, shapes) if 1 <= len(shape) <= 3 else None
    if convolutions is None:
        return None
    for each in convolutions:
        # The kernels look nothing up twice.
        assert each.first_input + each.inputs <= each.source_shape[0]
        assert each.first_output + each.outputs <= shape[0]
    ranges = channel_ranges(convolutions, shape[0])
    return LayerPlan(shape, [ChannelPlan(layer.neuron.p, shape, *each, graph.dtype) for each in ranges])


class ChannelPlan:
    """Paths of spikes into a range of a layer's channels: weights as they are walked, and tables of where they go.

    A block is so many channels that their weights stay in the second-level cache; a tile is so many rows of a block
    that its neurons stay in the first-level cache. Where there are few channels, a whole row of units counts as the
    channels of one place.

    Attributes
    ----------
    spatial : tuple of int
        Rows and columns of the layer's places.
    channels : int
        The layer's.
    convolutions : list of Convolution
        Those whose spikes are sorted, in the order of `synapses`.
    direct_convolution : Convolution or None
        That whose spikes are looked for at every level.
    sources : list of str
        Nodes whose levels are read, in the order of these.
    most_tiles : int
        Tiles that a spike reaches at most.
    synapse_count : int
        About how many synapses there are.
    """

    def __init__(
        self,
        p: TTFSParameters,
        shape: tuple[int, ...],
        first: int,
        last: int,
        convolutions: list[Convolution],
        dtype: torch.dtype,
    ) -> None:
        channels, height, width = as_image(shape)
        bias = None if p.bias is None else p.bias.to(dtype).expand(shape).reshape(channels, height, width)
        if height * width == 1:
            convolutions = [
                c if c.pointwise and c.source_shape[1:] == (1, 1) else places_as_channels(c) for c in convolutions
            ]
        self.spatial, self.channels = (height, width), channels
        self.direct_convolution = next(
            (c for c in convolutions if p.clock.input_window < constants.FEW_LEVELS and _is_direct(c, self.spatial)),
            None,
        )
        self.convolutions = [c for c in convolutions if c is not self.direct_convolution]
        self.sources = [c.source for c in self.convolutions]
        if self.direct_convolution is not None:
            self.sources.append(self.direct_convolution.source)
        self.synapse_count = (last - first) * height * width * sum(c.weight[0].numel() for c in convolutions)
        window = p.clock.input_window
        layout = layout_of(self.convolutions, first, last - first, self.spatial, dtype.itemsize, window)
        self.tiles = layout.tiles
        self.routes, self.synapses = tables_of(self.convolutions, layout, window, dtype)
        self.most_tiles = _most_tiles(self.routes)
        self.direct = _direct_of(self.direct_convolution, self.tiles, dtype)
        self.bias = _bias_of(p, None if bias is None else bias[first:last], self.tiles, dtype)
        clock, lowest = p.clock, p.silent_level
        theta = math.inf if p.hold else clock.threshold
        self.neurons = Neurons(clock.window, theta, lowest, lowest - 1, clock.readout - p.last_step)


def _direct_of(convolution: Convolution | None, tiles: Tiles, dtype: torch.dtype) -> Direct:
    """Weights of the spikes that come one to one, laid out as a row of a tile."""
    nothing = torch.zeros(0, dtype=dtype).numpy()
    if convolution is None:
        return Direct(nothing, nothing, 0, 0, 0)
    weights = convolution.weight.to(dtype).view(-1, 1, 1)
    laid_out = _laid_out(weights.expand(-1, 1, tiles.width), tiles)
    channels = convolution.source_shape[0]
    # A whole row at a time where neighbours in the tile are neighbours in the source as well.
    row = tiles.width if tiles.block_size == channels else 1
    return Direct(nothing, laid_out, row, channels, convolution.first_input)


def _bias_of(p: TTFSParameters, bias: Tensor | None, tiles: Tiles, dtype: torch.dtype) -> Bias:
    """Amount and level of each neuron's bias, laid out as the tiles are; one row where all are alike."""
    if bias is None:
        nothing = torch.zeros(0, dtype=dtype).numpy()
        return Bias(nothing, nothing, np.zeros(0, np.int64), 0, 0, 0, late=False)
    alike = bool((bias == bias[:, :1]).all())
    bias = bias[:, :1] if alike else bias
    if p.bias_code == "spike":
        level = p.clock.readout - p.clock.bias_spike_steps(bias)
        bias = torch.ones_like(bias)
    else:
        level = torch.full_like(bias, p.clock.input_window)
    stops = level[level > 0].long().unique().flip(0).numpy()
    return Bias(
        amount=_laid_out(bias, tiles),
        level=_laid_out(level, tiles),
        stops=stops,
        stop_count=len(stops),
        row_length=0 if alike else tiles.lanes,
        block_length=tiles.lanes * bias.shape[1],
        late=bool((level < 0).any()),
    )


def _laid_out(values: Tensor, tiles: Tiles) -> Array:
    """``[C, H, W]`` as ``[blocks, H, lanes]``, flat; 0 in lost lanes."""
    blocks = -(-tiles.outputs // tiles.block_size)
    whole = torch.nn.functional.pad(values, (0, 0, 0, 0, 0, blocks * tiles.block_size - tiles.outputs))
    rows = whole.unflatten(0, (blocks, tiles.block_size)).permute(0, 2, 3, 1).flatten(2)
    return torch.nn.functional.pad(rows, (0, tiles.lanes - rows.shape[-1])).flatten().numpy()


def _is_direct(convolution: Convolution, spatial: tuple[int, int]) -> bool:
    """True where each spike goes to the neuron of its own place and channel, and whole vectors of them do."""
    alike = convolution.source_shape[1:] == spatial and convolution.outputs % LANES == 0
    return alike and convolution.pointwise and convolution.depthwise


def _most_tiles(routes: Routes) -> int:
    """Tiles of rows that a row of spikes reaches at most."""
    most, terms = 1, routes.terms.reshape(-1, 5)
    for height, _, _, _, first in terms:
        kinds = routes.row_class[first : first + routes.tile_count * height].reshape(routes.tile_count, height)
        most = max(most, int((kinds >= 0).sum(0).max()))
    return most
