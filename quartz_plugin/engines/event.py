"""The event engine: work grows with the spikes, and with the steps only as levels differ. Exact for every neuron.

With ``r`` steps left before readout the membrane is ``v_r = sum w max(0, n - r) + b max(0, S - r)``, ``n`` the
levels of the inputs. It is linear in ``r`` between two levels that occur, so spikes are sorted by level, falling,
and arrive one after the other; in between, the membranes of a tile of neurons advance at once, and only where one
of them ends over the threshold are the steps looked at one by one. A neuron whose largest ``r`` with
``v_r >= S + 1/2`` exists fires early and says ``S + 1 + r``; any other says ``clip(floor(v_0 + 1/2), 0, S)``.

A layer whose synapses are no convolutions of spikes (:mod:`quartz_plugin.engines.convolutions`) is stepped.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial, reduce
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from quartz_plugin.engines.convolutions import (
    Convolution,
    as_image,
    channel_ranges,
    convolutions_of,
    is_routing,
    pair,
    reached,
    rows_as_channels,
)
from quartz_plugin.engines.stepped import EngineOutput, step_layer
from quartz_plugin.functional import TTFSParameters, check_bias_shape, spike_steps_of
from quartz_plugin.graph import ConvertedGraph, Layer, is_spike_source, module_nodes, propagate_levels
from quartz_plugin.graph.fingerprint import Fingerprint, Kept, fingerprint_of
from quartz_plugin.graph.synapses import unit_shapes
from quartz_plugin.neuron import FirstSpikeMaxPool

LANES = 8
"""Numbers in a vector; runs of weights are padded with zeros to a multiple of it, rows of neurons with lost lanes."""

WEIGHT_BYTES = 256 * 1024
"""Weights of one block of channels: they stay in the second-level cache while images go by."""

FEW_LEVELS = 128
"""Up to so many steps in a window, spikes that come one to one are looked for at every level, without sorting."""

MOST_BUCKETS = 2**12
"""Up to so high a level, spikes are sorted by a bucket for each; beyond, memory must not grow with the window."""

TILE_BYTES = 16 * 1024
"""Currents and membranes of one tile: they stay in the first-level cache."""

SHORT_ROW = 128
"""Up to so many neurons in a row, all spikes of a row of units are delivered to all of it."""

FEW_CHANNELS = 16
"""Below so many channels, pooling is done by whole pictures."""

EVENT_BYTES = 2 * 1024 * 1024
"""Sorted spikes of the images that go through a layer together."""

WORTH_THREADS = 10**8
"""Synapses of a batch from which on several threads share its images."""

LEAST_CHANGE = 1e-6
"""A current that changes by less has not changed: sums of floats leave as much."""

NONE = np.empty(0, np.int64)


@contextmanager
def _threads(plan: NetworkPlan, batch: int) -> Iterator[int]:
    """How many threads the kernels take for so many images: they share the images, where those are worth it.

    Unless torch steps layers between, it takes one thread meanwhile: its idle ones spin, on the kernels' cores.
    """
    threads = torch.get_num_threads()
    if threads == 1 or batch == 1 or batch * plan.synapses < WORTH_THREADS:
        yield 1
    elif None in plan.layers.values():
        yield threads
    else:
        torch.set_num_threads(1)
        try:
            yield threads
        finally:
            torch.set_num_threads(threads)


@torch.no_grad()
def run_event(
    graph: ConvertedGraph, input_levels: Tensor, record: bool = True, fingerprint: Fingerprint | None = None
) -> EngineOutput:
    """Find all spikes by events, on a CPU, without gradients.

    Other parameters, and returns, are those of :func:`~quartz_plugin.engines.stepped.run_stepped`.

    Parameters
    ----------
    fingerprint : Fingerprint, optional
        The network's, where that has just been taken.

    Raises
    ------
    ImportError
        Without numba.
    """
    plan = _plan_of(graph, fingerprint)
    with _threads(plan, len(input_levels)) as threads:
        return _run(graph, plan, input_levels, record, threads)


def _run(graph: ConvertedGraph, plan: NetworkPlan, input_levels: Tensor, record: bool, threads: int) -> EngineOutput:
    module = graph.module
    layers = {layer.node: layer for layer in graph.layers}
    output = list(layers.values())[-1]
    last_use = {source: node for node in module.graph.nodes for source in _source_nodes(node, layers, plan)}
    levels: dict[fx.Node, Tensor] = {}
    spike_steps: dict[str, Tensor] = {}
    for node in module.graph.nodes:
        if node.op == "placeholder":
            levels[node] = input_levels
        elif (layer := layers.get(node)) is not None:
            wanted = record or layer is output
            if layer is output:
                membrane = layer.membrane_at_readout({source: levels[source] for source in layer.projection.sources})
            own = plan.layers[layer.name]
            levels[node], steps = (
                _step(layer, levels, input_levels.dtype)
                if own is None
                else _fire(layer, own, levels, input_levels, wanted, threads)
            )
            if steps is not None and wanted:
                spike_steps[layer.name] = steps
        elif node.name in plan.pools:
            levels[node] = pooled(plan.pools[node.name].pool, levels[node.all_input_nodes[0]])
        elif node.name in plan.routing:
            levels[node] = propagate_levels(module, node, levels)
        for source in [source for source in levels if last_use.get(source) is node]:
            del levels[source]
    return spike_steps, levels[output.node], membrane


def _source_nodes(node: fx.Node, layers: dict[fx.Node, Layer], plan: NetworkPlan) -> list[fx.Node]:
    """Nodes whose levels are looked at for this node."""
    layer = layers.get(node)
    if layer is None:
        return node.all_input_nodes if node.name in plan.pools or node.name in plan.routing else []
    own = plan.layers[layer.name]
    sources = set(layer.projection.sources)
    if own is None:
        return list(sources)
    # The last layer's membranes are looked at as well.
    is_output = node is list(layers)[-1]
    return [n for n in node.graph.nodes if n.name in own.sources or (is_output and n in sources)]


def pooled(pool: Any, levels: Tensor) -> Tensor:
    """Levels of the first spikes in each window."""
    plain = isinstance(pool, nn.MaxPool2d) and levels.dim() == 4 and not pool.ceil_mode
    if (
        not (plain and pair(pool.padding) == (0, 0) and pair(pool.dilation) == (1, 1))
        or levels.shape[1] >= FEW_CHANNELS
    ):
        found: Tensor = pool(levels)
        return found
    # Of few channels, torch's kernel for channels that lie side by side is slow; pictures of their windows are not.
    for dim, size, stride in zip((2, 3), pair(pool.kernel_size), pair(pool.stride), strict=True):
        behind_last_window = (levels.shape[dim] - size) // stride * stride + 1
        every_nth = [
            levels[(slice(None),) * dim + (slice(first, first + behind_last_window, stride),)] for first in range(size)
        ]
        levels = reduce(torch.maximum, every_nth)
    return levels


def _step(layer: Layer, levels: dict[fx.Node, Tensor], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    steps = step_layer(layer, {source: levels[source] for source in layer.projection.sources})
    return layer.neuron.clock.output_window.levels_at(steps, layer.neuron.p.silent_level).to(dtype), steps


def _fire(
    layer: Layer, plan: LayerPlan, levels: dict[fx.Node, Tensor], like: Tensor, record: bool, threads: int
) -> tuple[Tensor, Tensor | None]:
    """Levels of a layer, and its spike steps where they are wanted."""
    p, batch = layer.neuron.p, len(like)
    out = torch.empty(batch, *_channels_behind(plan.shape), dtype=like.dtype)
    _deliver(plan, levels, out, threads)
    said = out.permute(0, 3, 1, 2).reshape(batch, *plan.shape)
    steps = spike_steps_of(p, said, said >= p.silent_level if p.signed else None) if record else None
    return (said.clamp_(min=p.silent_level) if p.signed else said), steps


def _deliver(
    plan: LayerPlan,
    levels: Mapping[fx.Node, Tensor],
    out: Tensor,
    threads: int,
    changes: np.ndarray[Any, Any] = NONE,
) -> None:
    sources = {source.name: _channels_last(value) for source, value in levels.items() if source.name in plan.sources}
    for channel_range in plan.ranges:
        channel_range.fire([sources[source] for source in channel_range.sources], out.numpy(), threads, changes)


def _channels_behind(shape: tuple[int, ...]) -> tuple[int, int, int]:
    channels, height, width = as_image(shape)
    return height, width, channels


@torch.no_grad()
def count_changes(graph: ConvertedGraph, levels: Mapping[fx.Node, Tensor]) -> dict[str, Tensor]:
    """Neuron-steps in which currents change by more than 1e-6: by arrivals, bias or readout.

    Parameters
    ----------
    graph : ConvertedGraph
        The network, on a CPU.
    levels : mapping
        Levels ``[B, ...]`` of all nodes that emit spikes, 0 or less where no spike comes before readout.

    Returns
    -------
    dict
        Layer -> int64 ``[B]``; without the layers whose synapses are no convolutions of spikes.
    """
    plan, batch = _plan_of(graph), len(next(iter(levels.values())))
    with _threads(plan, batch) as threads:
        return _count_changes(graph, plan, levels, threads)


def _count_changes(
    graph: ConvertedGraph, plan: NetworkPlan, levels: Mapping[fx.Node, Tensor], threads: int
) -> dict[str, Tensor]:
    counts = {}
    for layer in graph.layers:
        own = plan.layers[layer.name]
        if own is None:
            continue
        heard = {source: levels[source] for source in layer.projection.sources}
        for node in layer.projection.nodes:
            if node.name in plan.routing:
                heard[node] = propagate_levels(graph.module, node, heard)
        batch = len(next(iter(heard.values())))
        changes = np.zeros(batch, np.int64)
        _deliver(own, heard, torch.empty(batch, *_channels_behind(own.shape), dtype=graph.dtype), threads, changes)
        counts[layer.name] = torch.from_numpy(changes)
    return counts


def _channels_last(levels: Tensor) -> np.ndarray[Any, Any]:
    image = levels.reshape(len(levels), *as_image(tuple(levels.shape[1:])))
    return image.permute(0, 2, 3, 1).contiguous().numpy()


@dataclass(frozen=True)
class LayerPlan:
    """How spikes arrive at a layer of this shape: one plan for each range of its channels."""

    shape: tuple[int, ...]
    ranges: list[Plan]

    @property
    def sources(self) -> set[str]:
        """Names of the nodes whose levels are looked at."""
        return {source for channel_range in self.ranges for source in channel_range.sources}


@dataclass(frozen=True)
class NetworkPlan:
    """Plans of all layers (None: the layer is stepped), and the names of the nodes that pool or move levels.

    It holds no node: nodes hold their network, which a plan must not keep alive.
    """

    layers: dict[str, LayerPlan | None]
    pools: dict[str, FirstSpikeMaxPool]
    routing: set[str]

    @property
    def synapses(self) -> int:
        """About how many the planned layers have."""
        ranges = [each for layer in self.layers.values() if layer is not None for each in layer.ranges]
        return sum(each.synapses for each in ranges)


def _planned(graph: ConvertedGraph) -> NetworkPlan:
    shapes = unit_shapes(graph)
    layers = {layer.name: _layer_plan(graph, layer, shapes) for layer in graph.layers}
    pools: dict[str, FirstSpikeMaxPool] = {}
    routing: set[str] = set()
    spikes = {node for node in graph.module.graph.nodes if is_spike_source(graph.module, node)}
    for node, module in module_nodes(graph.module):
        if isinstance(module, FirstSpikeMaxPool):
            pools[node.name] = module
        elif node not in spikes and node.all_input_nodes and spikes.issuperset(node.all_input_nodes):
            moves = is_routing(module, shapes[node.all_input_nodes[0]])
            routing |= {node.name} if moves else set()
            spikes |= {node} if moves else set()
    return NetworkPlan(layers, pools, routing)


_PLANS = Kept(_planned, fingerprint_of)


def _plan_of(graph: ConvertedGraph, fingerprint: Fingerprint | None = None) -> NetworkPlan:
    """Plan of a network, kept until it is edited; `fingerprint`, where that has just been taken."""
    return _PLANS.of(graph, fingerprint)


def _layer_plan(graph: ConvertedGraph, layer: Layer, shapes: dict[fx.Node, torch.Size]) -> LayerPlan | None:
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
    return LayerPlan(shape, [Plan(layer.neuron.p, shape, *each, graph.dtype) for each in ranges])


class Plan:
    """How spikes arrive at a range of a layer's channels: weights as they are walked, and tables of where they go.

    A block is so many channels that their weights stay in the second-level cache; a tile is so many rows of a block
    that its neurons stay in the first-level cache. A neuron's place in its tile is ``row * row_length + x *
    block_size + channel``. A spike at (channel, y, x) reaches pairs of an output row and a kernel row, and in each
    one or more runs: neighbouring neurons, and the weights that belong to them, side by side. Where there are few
    channels, a whole row of units counts as the channels of one place.
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
        if last - first == channels and _rows_are_short(convolutions, channels * width, dtype.itemsize):
            convolutions = [rows_as_channels(convolution, width) for convolution in convolutions]
            bias = None if bias is None else bias.permute(2, 0, 1).reshape(-1, height, 1)
            channels, last, width = channels * width, last * width, 1
        self.spatial = (height, width)
        self.channels, self.first, self.outputs = channels, first, last - first
        clock = p.clock
        self.window, self.lowest, self.unsaid = clock.window, p.silent_level, p.silent_level - 1
        self.last_level = clock.readout - p.last_step
        self.theta = math.inf if p.hold else clock.threshold
        self.direct = next(
            (c for c in convolutions if p.clock.input_window < FEW_LEVELS and _is_direct(c, self.spatial)), None
        )
        self.convolutions = [c for c in convolutions if c is not self.direct]
        self.synapses = self.outputs * height * width * sum(c.weight[0].numel() for c in convolutions)
        self.block_size = _block_size(self.outputs, self.convolutions, dtype.itemsize)
        self.row_length = _padded(width * self.block_size + LANES - 1)
        self.tile_rows = min(height, max(1, TILE_BYTES // (2 * dtype.itemsize * self.row_length)))
        tables = _Tables(self.block_size, self.row_length, self.tile_rows, height, width)
        packed = [tables.add(convolution, self.outputs) for convolution in self.convolutions]
        blocks = -(-self.outputs // self.block_size)
        weights = torch.cat(packed, 1) if packed else torch.zeros(blocks, 0)
        self.block_length = weights.shape[1]
        # Vectors may be read past the last run.
        self.weights = torch.cat([weights.to(dtype).flatten(), torch.zeros(LANES, dtype=dtype)]).numpy()
        self.tables = tables.arrays()
        self.rows = tables.rows
        self._set_direct(width, dtype)
        self._set_bias(p, bias)

    def _set_direct(self, width: int, dtype: torch.dtype) -> None:
        """Weights of the spikes that come one to one, laid out as a row of a tile."""
        self.direct_weights, self.direct_first = np.zeros(0, self.weights.dtype), 0
        self.direct_row = self.direct_channels = 0
        if self.direct is None:
            return
        weights = self.direct.weight.to(dtype).view(-1, 1, 1)
        self.direct_weights = self._laid_out(weights.expand(-1, 1, width))
        self.direct_channels, self.direct_first = self.direct.source_shape[0], self.direct.first_input
        # A whole row at a time where neighbours in the tile are neighbours in the source as well.
        self.direct_row = width if self.block_size == self.direct_channels else 1

    def _set_bias(self, p: TTFSParameters, whole: Tensor | None) -> None:
        """Amount and level of each neuron's bias, laid out as the tiles are; one row where all are alike.

        ``bias_stops`` are the levels that occur, falling.
        """
        self.bias = self.bias_level = np.zeros(0, self.weights.dtype)
        self.bias_stops = np.zeros(0, np.int64)
        self.bias_row_length = self.bias_block_length = 0
        self.late = False
        if whole is None:
            return
        clock = p.clock
        bias = whole[self.first : self.first + self.outputs]
        alike = bool((bias == bias[:, :1]).all())
        bias = bias[:, :1] if alike else bias
        if p.bias_code == "spike":
            level = clock.readout - clock.bias_spike_steps(bias)
            bias = torch.ones_like(bias)
        else:
            level = torch.full_like(bias, clock.input_window)
        self.late = bool((level < 0).any())
        self.bias_stops = level[level > 0].long().unique().flip(0).numpy()
        self.bias, self.bias_level = self._laid_out(bias), self._laid_out(level)
        self.bias_row_length = 0 if alike else self.row_length
        self.bias_block_length = self.row_length * bias.shape[1]

    def _laid_out(self, values: Tensor) -> np.ndarray[Any, Any]:
        """``[C, H, W]`` as ``[blocks, H, row_length]``, flat; 0 in lost lanes."""
        blocks = -(-self.outputs // self.block_size)
        padded = torch.nn.functional.pad(values, (0, 0, 0, 0, 0, blocks * self.block_size - self.outputs))
        rows = padded.unflatten(0, (blocks, self.block_size)).permute(0, 2, 3, 1).flatten(2)
        return torch.nn.functional.pad(rows, (0, self.row_length - rows.shape[-1])).flatten().numpy()

    @property
    def sources(self) -> list[str]:
        """Names of the nodes whose levels :meth:`fire` takes."""
        return [c.source for c in [*self.convolutions, *([] if self.direct is None else [self.direct])]]

    def fire(
        self,
        every_level: list[np.ndarray[Any, Any]],
        out: np.ndarray[Any, Any],
        threads: int,
        changes: np.ndarray[Any, Any] = NONE,
    ) -> None:
        """Write the levels that the range's neurons say, given those of each of `sources`, ``[B, H, W, C]``.

        With `changes`, ``[B]``, count there instead, as :func:`count_changes` says.
        """
        batch = len(out)
        if batch == 0:
            return
        out = out.reshape(batch, *self.spatial, self.channels)
        levels = [
            level.reshape(batch, *c.source_shape[1:], c.source_shape[0])
            for level, c in zip(every_level, self.convolutions, strict=False)
        ]
        direct = every_level[-1].reshape(-1) if self.direct is not None else self.direct_weights
        top = max([int(level.max()) for level in every_level if level.size] + [*self.bias_stops[:1], 0])
        stops = None
        if self.direct is not None or top <= MOST_BUCKETS:
            stops = np.full(top + 1, self.direct is not None)
            stops[self.bias_stops] = True
        units = sum(level[0].size for level in levels)
        ranks = min(top, units + (len(self.bias_stops) if self.direct is None else top))
        bytes_of_starts = 0 if stops is None else 8 * self.rows * (ranks + 1)
        images = max(1, EVENT_BYTES // max(1, 20 * units + bytes_of_starts))
        images = min(images, -(-batch // threads))
        jobs = [
            partial(self._fire_some, levels, direct, out, start, min(images, batch - start), stops, ranks, changes)
            for start in range(0, batch, images)
        ]
        _in_parallel(jobs, threads)

    def _fire_some(
        self,
        levels: list[np.ndarray[Any, Any]],
        direct: np.ndarray[Any, Any],
        out: np.ndarray[Any, Any],
        image: int,
        images: int,
        stops: np.ndarray[Any, Any] | None,
        ranks: int,
        changes: np.ndarray[Any, Any],
    ) -> None:
        """Do so for some images; `stops` marks the levels that are looked at anyway, None: the bias's alone are."""
        from quartz_plugin.engines.event_kernels import collect, fire, sort_by_level

        spikes = 1 + images * sum(level[0].size for level in levels)
        event_level, event = np.empty(spikes, np.int32), np.empty(spikes, np.int64)
        row_start = np.zeros((images, self.rows, 2), np.int64)
        at = 0
        for level, convolution, first_row in zip(levels, self.convolutions, self.tables.terms[:, 0], strict=True):
            at = collect(
                level, image, images, convolution.first_input, convolution.inputs, at, first_row,
                event_level, event, row_start,
            )  # fmt: skip
        if stops is None:
            starts, level_of = np.empty((0, 0, 0), np.int64), event_level[:at]
            by_level, level_of, ranked, distinct = _sorted(level_of, event[:at], row_start, self.bias_stops)
        else:
            by_level, level_of = np.empty(spikes, np.int64), event_level[:0]
            starts = np.empty((images, self.rows, ranks + 1), np.int64)
            ranked, distinct = np.empty((images, ranks + 1), np.int64), np.empty(images, np.int64)
            sort_by_level(event_level, event, row_start, stops, by_level, starts, ranked, distinct)
        fire(
            out, image, images, self.first, self.outputs, self.block_size, self.tile_rows, self.row_length,
            self.weights, self.block_length, *self.tables, by_level, starts, row_start, level_of, ranked, distinct,
            direct, self.direct_weights, self.direct_row, self.direct_channels, self.direct_first,
            self.bias, self.bias_level, self.bias_stops, self.bias_row_length, self.bias_block_length, self.late,
            self.window, self.theta, self.lowest, self.unsaid, self.last_level, changes, LEAST_CHANGE,
        )  # fmt: skip


def _sorted(
    level_of: np.ndarray[Any, Any],
    event: np.ndarray[Any, Any],
    row_start: np.ndarray[Any, Any],
    stops: np.ndarray[Any, Any],
) -> tuple[np.ndarray[Any, Any], ...]:
    """Sort each row's spikes by level, falling, in memory that grows with the spikes alone.

    Returns the spikes and their levels, and for each image the levels that occur there or in `stops`, and how many.
    """
    images, rows, _ = row_start.shape
    first, behind = row_start.reshape(-1, 2).T
    by_place = np.argsort(first, kind="stable")
    counts = (behind - first)[by_place]
    order = np.lexsort((-level_of, np.repeat(np.arange(len(counts)), counts)))
    image_of = np.repeat(by_place // max(1, rows), counts)
    occurring = [np.unique(np.concatenate([level_of[image_of == image], stops]))[::-1] for image in range(images)]
    distinct = np.array([len(levels) for levels in occurring], np.int64)
    ranked = np.zeros((images, 1 + max(distinct, default=0)), np.int64)
    for own, levels in zip(ranked, occurring, strict=True):
        own[: len(levels)] = levels
    return event[order], level_of[order], ranked, distinct


def _in_parallel(jobs: Sequence[Callable[[], None]], threads: int) -> None:
    if threads == 1 or len(jobs) == 1:
        for job in jobs:
            job()
        return
    with ThreadPoolExecutor(threads) as pool:
        for done in [pool.submit(job) for job in jobs]:
            done.result()


def _run_length(places: int, size: int) -> int:
    """Length of a run of weights for so many places; what is read behind its end must be zeros.

    At a border it is read from a place within, in whole vectors, which then end behind the end of the run.
    """
    whole = places == 1 or size % LANES == 0
    return _padded(places * size + (0 if whole else LANES - 1))


def _is_direct(convolution: Convolution, spatial: tuple[int, int]) -> bool:
    """Whether each spike goes to the neuron of its own place and channel, and whole vectors of them do."""
    alike = convolution.source_shape[1:] == spatial and convolution.outputs % LANES == 0
    return alike and convolution.pointwise and convolution.depthwise


def _padded(length: int) -> int:
    return -(-length // LANES) * LANES


def _rows_are_short(convolutions: list[Convolution], row: int, itemsize: int) -> bool:
    """Whether a whole row of units, as the channels of one place, still has few weights."""
    spread = [c for c in convolutions if c.source_shape[2] > 1 and not (c.pointwise and c.depthwise)]
    weights = sum(row * c.source_shape[0] * c.source_shape[2] * c.kernel[0] for c in spread)
    whole = all(c.first_input == c.first_output == 0 and c.inputs == c.source_shape[0] for c in convolutions)
    return bool(spread) and whole and row <= SHORT_ROW and weights * itemsize <= WEIGHT_BYTES


def _block_size(outputs: int, convolutions: list[Convolution], itemsize: int) -> int:
    """Channels in a block: all, or as many as have weights that fit; groups are not divided."""
    per_channel = sum(c.weight[0].numel() for c in convolutions) * itemsize
    if per_channel * outputs <= WEIGHT_BYTES or any(c.groups > 1 for c in convolutions):
        return outputs
    fitting = max(2 * LANES, WEIGHT_BYTES // per_channel // LANES * LANES)
    blocks = -(-outputs // fitting)
    return _padded(-(-outputs // blocks))


@dataclass(frozen=True)
class _Arrays:
    """The tables as :func:`quartz_plugin.engines.event_kernels.fire` takes them, in its order."""

    terms: np.ndarray[Any, Any]
    reach: np.ndarray[Any, Any]
    reach_row: np.ndarray[Any, Any]
    reach_pair: np.ndarray[Any, Any]
    pairs: np.ndarray[Any, Any]
    column: np.ndarray[Any, Any]
    runs: np.ndarray[Any, Any]
    channel_at: np.ndarray[Any, Any]

    def __iter__(self) -> Any:
        return iter(vars(self).values())


class _Tables:
    """Builds a plan's tables, one convolution after the other."""

    def __init__(self, block_size: int, row_length: int, tile_rows: int, height: int, width: int) -> None:
        self.block_size, self.row_length, self.tile_rows = block_size, row_length, tile_rows
        self.height, self.width = height, width
        self.rows = self.weight_start = 0
        self.terms: list[list[int]] = []
        self.reach: list[int] = []
        self.reach_row: list[int] = []
        self.reach_pair: list[int] = [0]
        self.pairs: list[tuple[int, int, int]] = []
        self.column: list[int] = []
        self.runs: list[tuple[int, int, int]] = []
        self.channel_at: list[int] = []

    def add(self, convolution: Convolution, outputs: int) -> Tensor:
        """Enter one convolution; returns its weights as they are walked, ``[blocks, length]``."""
        classes = _classes(convolution)
        size = self.block_size if convolution.groups == 1 else outputs // convolution.groups
        starts = np.cumsum([0] + [_run_length(len(members), size) for members in classes])
        run_length = int(starts[-1])
        kernel_rows = convolution.kernel[0]
        self.terms.append(
            [
                self.rows,
                self.weight_start,
                kernel_rows * run_length,
                len(self.column),
                len(self.channel_at),
                len(self.reach),
                0 if convolution.groups == 1 else size,
            ]
        )
        self.rows += convolution.source_shape[1]
        self._add_rows(convolution, run_length)
        self._add_columns(convolution, classes, starts, size)
        per_group = convolution.inputs // convolution.groups
        self.channel_at += [(c // per_group) * size if convolution.groups > 1 else 0 for c in range(convolution.inputs)]
        packed = _packed(convolution.weight, convolution.groups, classes, starts, size, outputs)
        self.weight_start += packed.shape[1]
        return packed

    def _add_rows(self, convolution: Convolution, run_length: int) -> None:
        tiles = -(-self.height // self.tile_rows)
        tables: list[dict[int, list[tuple[int, int, int]]]] = [{} for _ in range(tiles)]
        for y in range(convolution.source_shape[1]):
            for row, k in reached(convolution, 0, y, self.height):
                tile = row // self.tile_rows
                own = row - tile * self.tile_rows
                pair = (own * self.row_length, k * run_length, own)
                tables[tile].setdefault(y, []).append(pair)
        for table in tables:
            self.reach.append(len(self.reach_row))
            for y, pairs in table.items():
                self.reach_row.append(y)
                self.pairs += pairs
                self.reach_pair.append(len(self.pairs))
        self.reach.append(len(self.reach_row))

    def _add_columns(
        self, convolution: Convolution, classes: list[list[int]], starts: np.ndarray[Any, Any], size: int
    ) -> None:
        place = {k: (index, at) for index, members in enumerate(classes) for at, k in enumerate(members)}
        for x in range(convolution.source_shape[2]):
            self.column.append(len(self.runs))
            by_class: dict[int, list[tuple[int, int]]] = {}
            for column, k in reached(convolution, 1, x, self.width):
                index, at = place[k]
                by_class.setdefault(index, []).append((column, at))
            for index, members in by_class.items():
                column, at = min(members)
                self.runs.append(
                    (
                        column * self.block_size,
                        int(starts[index]) + at * size,
                        _padded(len(members) * size) // _padded(1),
                    )
                )
        self.column.append(len(self.runs))

    def arrays(self) -> _Arrays:
        """All tables, int64."""
        return _Arrays(
            np.array(self.terms, np.int64).reshape(-1, 7),
            np.array(self.reach, np.int64),
            np.array(self.reach_row, np.int64),
            np.array(self.reach_pair, np.int64),
            np.array(self.pairs, np.int64).flatten(),
            np.array(self.column, np.int64),
            np.array(self.runs, np.int64).flatten(),
            np.array(self.channel_at, np.int64),
        )


def _classes(convolution: Convolution) -> list[list[int]]:
    """Kernel columns in lists: those of a list reach neighbouring outputs, from left to right."""
    kernel, stride, dilation = convolution.kernel[1], convolution.stride[1], convolution.dilation[1]
    if convolution.groups > 1 or (dilation > 1 if convolution.transposed else stride % dilation):
        return [[k] for k in range(kernel)]
    if convolution.transposed:
        return [list(range(kernel))]
    step = stride // dilation
    return [list(reversed(range(first, kernel, step))) for first in range(min(step, kernel))]


def _packed(
    weight: Tensor, groups: int, classes: list[list[int]], starts: np.ndarray[Any, Any], size: int, outputs: int
) -> Tensor:
    """Weights ``[blocks, inputs * KH * run length]``: for an input channel and kernel row, the runs side by side."""
    kernel_rows = weight.shape[2]
    if groups > 1:
        # [groups, outputs, inputs, KH, KW] -> [1, groups * inputs, KH, KW, outputs]
        walked = weight.unflatten(0, (groups, size)).permute(0, 2, 3, 4, 1).flatten(0, 1).unsqueeze(0)
    else:
        blocks = -(-outputs // size)
        whole = torch.nn.functional.pad(weight, (0, 0, 0, 0, 0, 0, 0, blocks * size - outputs))
        walked = whole.unflatten(0, (blocks, size)).permute(0, 2, 3, 4, 1)
    packed = walked.new_zeros(walked.shape[0], walked.shape[1], kernel_rows, int(starts[-1]))
    for members, start in zip(classes, starts[:-1], strict=True):
        runs = walked[:, :, :, members].flatten(3)
        packed[..., start : start + runs.shape[-1]] = runs
    flat: Tensor = packed.flatten(1)
    return flat
