"""Synapses of a converted network, counted exactly: entries of the composed map between two layers of spikes.

Who reaches whom is a relation between the units of a source and the neurons of a layer. For convolutions, pools and
routing it is a product of one relation for each dimension, and so is the composition of such; where several paths
lead from a source to a layer, their union is counted by inclusion and exclusion. Borders and overlaps are exact.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from quartz_plugin.graph.converted import ConvertedGraph, Projection
from quartz_plugin.graph.walk import LevelWalk, Step, plan_walk
from quartz_plugin.neuron import AxonalDelay
from quartz_plugin.operators.modules import (
    AVERAGES,
    PADDING_MODES,
    WEIGHTED,
    Add,
    Concatenate,
    Mean,
    OneToOne,
    Permute,
    Reshape,
    Slice,
    per_dimension,
)

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
        weighs = isinstance(each, (*WEIGHTED, *AVERAGES, OneToOne))
        if not weighs and not isinstance(each, Add) and routed.issuperset(node.all_input_nodes):
            routed.add(node)
        if node not in counted and weighs:
            (before,) = node.all_input_nodes
            ((_, count),) = fan_out(Projection(module, (before,), (node,), node), shapes, most_probes).items()
            chain.append((before.name, count))
        elif node not in counted and isinstance(each, Add):
            # Spikes that are added as they come do so through a synapse each.
            chain += [one_to_one(arg) for arg in node.all_input_nodes if arg in routed]
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
    """Which units are in which windows of a max pooling."""
    relation = Relation.identity(shape)
    relation.pool(pool)
    return relation


def relation_to(projection: Projection, source: fx.Node, shapes: dict[fx.Node, torch.Size]) -> Relation | None:
    """Which units of a source reach which neurons; None where several paths lead there, or it is no product."""
    paths = _paths(projection, source)
    if paths is None or len(paths) != 1:
        return None
    return _along(projection, paths[0], shapes)


class _TooManyProbesError(Exception):
    pass


def fan_out(
    projection: Projection, shapes: dict[fx.Node, torch.Size], most_probes: int | None = None
) -> dict[fx.Node, Tensor]:
    """How many neurons each source unit reaches: its weight synapses, an entry of the composed map each.

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
                reached = [_row_sums(torch.stack([r.factor(place) for r in chosen]).amin(0)) for place in places]
            size = _outer(reached)
            size = size if count % 2 else -size
            total = size if total is None else total + size
    return total


def _row_sums(factor: Tensor) -> Tensor:
    return factor.reshape(len(factor), -1).sum(dim=1).long()


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
        sizes = [shapes[arg] for arg in inputs] if isinstance(module, Concatenate) else []
        if not relation.through(module, place, sizes):
            return None
    return relation


@dataclass
class Relation:
    """Which coordinates a unit reaches, as a product of factors: one for each source dimension, then free ones.

    A factor is ``[size of the source's dimension, *sizes]``, 1 where a source coordinate reaches a coordinate of
    the current tensor; ``dims`` says, for each dimension of that tensor, which factor and axis it is. An identity
    is no more than its size until it meets another relation: that of a long vector would not fit into memory.
    """

    factors: list[Tensor | int]
    dims: list[tuple[int, int]]
    flat: bool = False

    @classmethod
    def identity(cls, shape: Sequence[int]) -> Relation:
        """Each unit of this shape reaches itself."""
        return cls(list(shape), [(index, 1) for index in range(len(shape))])

    def factor(self, index: int) -> Tensor:
        """A factor as a tensor."""
        factor = self.factors[index]
        if isinstance(factor, int):
            self.factors[index] = factor = torch.eye(factor, dtype=torch.float32)
        return factor

    def reached(self) -> list[Tensor]:
        """For each factor, how many coordinates each of its source coordinates reaches."""
        return [
            torch.ones(factor, dtype=torch.int64) if isinstance(factor, int) else _row_sums(factor)
            for factor in self.factors
        ]

    def units_into(self, parts: Sequence[Sequence[slice]]) -> Tensor | None:
        """How many units reach each tile of the current tensor.

        Parameters
        ----------
        parts : sequence of slices for each dimension
            How each dimension is cut.

        Returns
        -------
        Tensor or None
            int64 ``[parts of the first dimension, ...]``; None where dimensions are one and cannot be cut.
        """
        if self.flat or len(parts) != len(self.dims):
            return None
        total = torch.ones([len(slices) for slices in parts], dtype=torch.int64)
        for index, factor in enumerate(self.factors):
            cut = [(dim, axis) for dim, (of, axis) in enumerate(self.dims) if of == index]
            shape = [len(slices) if dim in dict(cut) else 1 for dim, slices in enumerate(parts)]
            counts = []
            for chosen in itertools.product(*(parts[dim] for dim, _ in cut)):
                if isinstance(factor, int):
                    counts.append(len(range(factor)[chosen[0]]) if chosen else factor)
                    continue
                taken = [slice(None)] * factor.dim()
                for (_, axis), part in zip(cut, chosen, strict=True):
                    taken[axis] = part
                counts.append(int((factor[tuple(taken)].reshape(len(factor), -1).sum(dim=1) > 0).sum()))
            total = total * torch.tensor(counts, dtype=torch.int64).view(shape)
        return total

    def matches(self, other: Relation) -> bool:
        """Whether both relate the same dimensions, so that they can be intersected."""
        same = self.dims == other.dims and self.flat == other.flat and len(self.factors) == len(other.factors)
        return same and all(self.factor(i).shape == other.factor(i).shape for i in range(len(self.factors)))

    def through(self, module: nn.Module, place: int, sizes: list[torch.Size]) -> bool:
        """Compose with one more module; False where it is no product of relations."""
        if isinstance(module, OneToOne | Add | AxonalDelay):
            return True
        if isinstance(module, nn.Flatten | nn.Unflatten | Reshape):
            return self._reshape(module)
        if isinstance(module, nn.Linear):
            self._linear(module.out_features)
            return True
        if self.flat:
            return False
        if isinstance(module, Permute):
            self.dims = [self.dims[dim - 1] for dim in module.dims[1:]]
        elif isinstance(module, Slice):
            self._on(module.dim - 1, lambda m: m[:, module.start : module.stop : module.step])
        elif isinstance(module, Concatenate):
            before = sum(size[module.dim - 1] for size in sizes[:place])
            behind = sum(size[module.dim - 1] for size in sizes[place + 1 :])
            self._on(module.dim - 1, lambda m: F.pad(m, (before, behind)))
        elif isinstance(module, Mean):
            for dim in sorted((dim - 1 for dim in module.dims), reverse=True):
                self._on(dim, lambda m: m.amax(dim=1, keepdim=True))
                if not module.keepdim:
                    del self.dims[dim]
        elif isinstance(module, nn.Conv1d | nn.Conv2d | nn.ConvTranspose1d | nn.ConvTranspose2d):
            self._convolve(module)
        elif isinstance(module, nn.ChannelShuffle):
            order = module(torch.arange(self._size(0), dtype=torch.float32).view(1, -1, 1, 1)).flatten().long()
            self._on(0, lambda m: m[:, order])
        else:
            return self._space_by_space(module)
        return True

    def _size(self, dim: int) -> int:
        index, axis = self.dims[dim]
        factor = self.factors[index]
        return factor if isinstance(factor, int) else factor.shape[axis]

    def _on(self, dim: int, relate: Callable[[Tensor], Tensor]) -> None:
        """Apply ``[n, size] -> [n, new size]`` along one dimension of the current tensor."""
        index, axis = self.dims[dim]
        moved = self.factor(index).movedim(axis, -1)
        related = (relate(moved.reshape(-1, moved.shape[-1])) > 0).float()
        self.factors[index] = related.reshape(*moved.shape[:-1], related.shape[-1]).movedim(-1, axis)

    def _linear(self, outputs: int) -> None:
        """Whoever reaches any of the features reaches every output: the last dimension, or all of a flat tensor."""
        last = self.dims[-1][0]
        for index, factor in enumerate(self.factors):
            if not self.flat and index != last:
                continue
            if isinstance(factor, int):
                self.factors[index] = torch.ones(factor, 1, dtype=torch.float32)
            elif self.flat:
                self.factors[index] = factor.reshape(len(factor), -1).amax(dim=1, keepdim=True)
            else:
                self.factors[index] = factor.amax(dim=self.dims[-1][1], keepdim=True)
        self.factors.append(torch.ones(1, outputs, dtype=torch.float32))
        self.dims = [*([] if self.flat else self.dims[:-1]), (len(self.factors) - 1, 1)]
        self.flat = False

    def _reshape(self, module: nn.Module) -> bool:
        old = [self._size(dim) for dim in range(len(self.dims))]
        in_order = self.dims == [(index, 1) for index in range(len(self.factors))]
        untouched = in_order and all(isinstance(factor, int) for factor in self.factors)
        if self.flat and isinstance(module, nn.Flatten):
            return True
        new = list(module(torch.empty(1, *([math.prod(old)] if self.flat else old), device="meta")).shape[1:])
        if not self.flat and self._reshape_by_factor(old, new):
            return True
        if untouched:
            # Nothing has happened yet: the source's units may as well be of that shape.
            self.factors, self.dims, self.flat = list(new), [(index, 1) for index in range(len(new))], False
            return True
        self.flat = len(new) == 1
        return self.flat

    def _reshape_by_factor(self, old: list[int], new: list[int]) -> bool:
        """Reshape where dimensions are split or merged within one factor each."""
        factors, dims = list(self.factors), []
        at_old = at_new = 0
        while at_old < len(old) or at_new < len(new):
            # The next few dimensions that hold as many coordinates before as after.
            end_old, end_new = at_old + (at_old < len(old)), at_new + (at_new < len(new))
            while math.prod(old[at_old:end_old]) != math.prod(new[at_new:end_new]):
                if math.prod(old[at_old:end_old]) < math.prod(new[at_new:end_new]):
                    end_old += 1
                else:
                    end_new += 1
            merged, sizes = self.dims[at_old:end_old], new[at_new:end_new]
            indices = {index for index, _ in merged}
            if old[at_old:end_old] == sizes:
                dims += merged
            elif not merged:
                dims += [(len(factors), 1 + axis) for axis in range(len(sizes))]
                factors.append(torch.ones(1, *sizes, dtype=torch.float32))
            elif len(indices) == 1 and self.factor(merged[0][0]).dim() == len(merged) + 1:
                (index,) = indices
                ordered = self.factor(index).permute(0, *(axis for _, axis in merged))
                factors[index] = ordered.reshape(len(ordered), *sizes)
                dims += [(index, 1 + axis) for axis in range(len(sizes))]
            else:
                return False
            at_old, at_new = end_old, end_new
        self.factors, self.dims = factors, dims
        return True

    def _slide(self, dim: int, function: Callable[..., Tensor], *args: Any, **kwargs: Any) -> None:
        """Apply a function of one-dimensional images, ``[n, 1, size]``, along one dimension."""
        self._on(dim, lambda m: function(m.unsqueeze(1), *args, **kwargs).squeeze(1))

    def _convolve(self, module: Any) -> None:
        block = torch.ones(
            module.in_channels // module.groups, module.out_channels // module.groups, dtype=torch.float32
        )
        channels = torch.block_diag(*[block] * module.groups)
        self._on(0, lambda m: m @ channels)
        for dim in range(1, len(self.dims)):
            size, stride, dilation = (
                _along_dim(value, dim) for value in (module.kernel_size, module.stride, module.dilation)
            )
            kernel = torch.ones(1, 1, size, dtype=torch.float32)
            if isinstance(module, nn.ConvTranspose1d | nn.ConvTranspose2d):
                pad, extra = _along_dim(module.padding, dim), _along_dim(module.output_padding, dim)
                self._slide(dim, F.conv_transpose1d, kernel, None, stride, pad, extra, 1, dilation)
            else:
                # torch counts paddings from the last dimension backwards.
                pads = module._reversed_padding_repeated_twice[-2 * dim :][:2]
                mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
                self._slide(dim, F.pad, tuple(pads), mode=mode)
                self._slide(dim, F.conv1d, kernel, stride=stride, dilation=dilation)

    def _space_by_space(self, module: Any) -> bool:
        """Compose with pooling, padding or upsampling, which treat each dimension by itself."""
        rank, of = len(self.dims), _along_dim
        if isinstance(module, nn.AvgPool1d | nn.AvgPool2d):
            for dim in range(1, rank):
                kernel, stride, pad = (of(value, dim) for value in (module.kernel_size, module.stride, module.padding))
                self._slide(dim, F.avg_pool1d, kernel, stride, pad, module.ceil_mode)
        elif isinstance(module, nn.AdaptiveAvgPool1d | nn.AdaptiveAvgPool2d):
            for dim in range(1, rank):
                self._slide(dim, F.adaptive_avg_pool1d, of(module.output_size, dim) or self._size(dim))
        elif isinstance(module, nn.Upsample):
            for dim in range(1, rank):
                size, scale = of(module.size, dim), of(module.scale_factor, dim)
                anew = None if scale is None else module.recompute_scale_factor
                self._slide(dim, F.interpolate, size, scale, mode=module.mode, recompute_scale_factor=anew)
        elif type(module) in PADDING_MODES:
            for place in range(len(module.padding) // 2):
                pads = module.padding[2 * place : 2 * place + 2]
                self._slide(rank - 1 - place, F.pad, pads, mode=PADDING_MODES[type(module)])
        else:
            return False
        return True

    def pool(self, module: Any) -> None:
        """Compose with max pooling: a unit reaches the windows it is in."""
        for dim in range(1, len(self.dims)):
            if isinstance(module, nn.AdaptiveMaxPool1d | nn.AdaptiveMaxPool2d):
                self._slide(dim, F.adaptive_max_pool1d, _along_dim(module.output_size, dim) or self._size(dim))
            else:
                sizes = (module.kernel_size, module.stride, module.padding, module.dilation)
                self._slide(dim, F.max_pool1d, *(_along_dim(size, dim) for size in sizes), module.ceil_mode)


def _along_dim(value: Any, dim: int) -> Any:
    """Setting of a module along one dimension of a sample, the channels' being 0."""
    return per_dimension(value, dim)[dim - 1]


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
