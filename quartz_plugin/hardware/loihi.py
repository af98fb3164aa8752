"""From a converted network to the cores of Loihi 1: an estimate made of published limits and energies.

Every population (input encoder, max pooling, layer) has cores of its own, cut into tiles of rows, columns and
channels (or channels, rows and columns) until each tile keeps the limits of a core. Support neurons, one at each
readout, send bias, readout, rectifier and hold; relay neurons carry delays that are longer than the chip's. At each
step the fullest core updates all its compartments at the time of active ones; synaptic operations take the time of
each population's busiest core, one population after the other. What it leaves out: routing and hops between tiles of
the chip, spike traffic's time, resetting between images, packing of small layers, learning.

References
----------
M. Davies et al., "Loihi: A Neuromorphic Manycore Processor with On-Chip Learning", IEEE Micro 38 (1), 2018.
G. Lenz, G. Orchard, S. Sheik, arXiv:2309.16795.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from quartz_plugin.costs.counts import biased_neurons
from quartz_plugin.costs.energy import LOIHI, EnergyProfile
from quartz_plugin.engines.convolutions import as_image, convolutions_of
from quartz_plugin.graph import INPUT, ConvertedGraph, Layer, Projection, called_by, is_spike_source, spike_sources
from quartz_plugin.graph.synapses import pool_relation, relation_to, unit_shapes, with_unit_weights
from quartz_plugin.graph.topology import Topology
from quartz_plugin.network import SpikingNetwork
from quartz_plugin.neuron import AxonalDelay, FirstSpikeMaxPool
from quartz_plugin.operators.modules import AVERAGES, WEIGHTED, Add, OneToOne
from quartz_plugin.tables import format_table

SUPPORT = "support"

MOST_PROBES = 64
"""Tiles of a layer at which several paths from one unit meet, whose in-axons are found one by one."""

LIMITS = ("compartments", "synaptic memory", "in-axons", "out-axons")
"""What a core has so much of."""


@dataclass(frozen=True)
class LoihiChip:
    """Limits and times of a chip.

    Attributes
    ----------
    cores : int
        Cores of a chip.
    compartments, in_axons, out_axons : int
        Of a core.
    synaptic_memory : int
        Bytes of a core.
    weight_bits, index_bits : int
        Of a synapse: its weight, and the compartment it leads to; convolution weights that a core's neurons share
        need no index.
    longest_delay : int
        Steps.
    active_update_time, synop_time : float
        Seconds (Davies et al. 2018, table 2).
    barrier_time : float
        Seconds that a core waits for the others at each step (there, the longest).
    input_spike_time : float
        Seconds to bring one input spike to the chip. Published nowhere: fitted to the 4.9 ms that the authors of
        Quartz measured for MNIST's 784 input spikes, at any T up to 32.
    other_power : float
        Watts beside the cores' dynamic power (leakage, host processors). Fitted in the same way: 182.5 uJ an
        inference in all, 45.6 uJ of it dynamic in the cores, in 4.9 ms at T = 16.
    profile : EnergyProfile
        Dynamic energies of the cores.
    """

    cores: int = 128
    compartments: int = 1024
    in_axons: int = 4096
    out_axons: int = 4096
    synaptic_memory: int = 128 * 1024
    weight_bits: int = 8
    index_bits: int = 10
    longest_delay: int = 62
    active_update_time: float = 8.4e-9
    synop_time: float = 3.5e-9
    barrier_time: float = 465e-9
    input_spike_time: float = 4.9e-3 / 784
    other_power: float = (182.5e-6 - 45.6e-6) / 4.9e-3
    profile: EnergyProfile = LOIHI


LOIHI_1 = LoihiChip()
"""Loihi 1."""


@dataclass(frozen=True)
class Population:
    """Neurons of one kind on cores of their own.

    Attributes
    ----------
    name : str
        "input", a layer, a max pooling, or "support".
    neurons : int
        Compartments, relay neurons included.
    relays : int
        Neurons that only carry spikes over delays longer than the chip's.
    cores : int
        Cores it takes.
    binding : str
        The limit that decides how many: see :data:`LIMITS`.
    cores_by_limit : dict
        Limit -> cores that it alone would take, cut in the same order.
    in_axons, out_axons : int
        Of the fullest core, without those of support neurons (three, of an output two); of all cores together. Where
        several paths lead from one unit to a layer of more than 64 tiles, they are found at 27 of them.
    synaptic_memory : int
        Bytes of the fullest core.
    synapses : int
        Weight synapses into it, and those of readout (two: a coarse and a fine), bias, rectifier and hold.
    largest_readout_weight : float or None
        Largest ``|r|``, ``r = 1 - A(1)``, in units of the weights; with bias spikes, of weight 1, the bias in A is 1.
    """

    name: str
    neurons: int
    relays: int
    cores: int
    binding: str
    cores_by_limit: Mapping[str, int]
    in_axons: int
    out_axons: int
    synaptic_memory: int
    synapses: int
    largest_readout_weight: float | None = None


@dataclass(frozen=True)
class LoihiEstimate:
    """What an inference takes on the chip; SI units.

    Attributes
    ----------
    steps : int
        Until all outputs of 0 and more are out.
    step_time : float
        On the chip, mean of all steps.
    latency : float
        The longer of stepping and bringing the input to the chip.
    throughput, pipelined_throughput : float
        Images a second, one after the other, and with an image starting as soon as each layer is free again.
    core_energy, total_energy : float
        Dynamic in the cores; with the chip's other power over the latency.
    energy_delay_product : float
        Of the total.
    """

    steps: int
    step_time: float
    latency: float
    throughput: float
    pipelined_throughput: float
    core_energy: float
    total_energy: float

    @property
    def energy_delay_product(self) -> float:
        """Total energy times latency, J s."""
        return self.total_energy * self.latency

    def __str__(self) -> str:
        rows = [
            ["steps", f"{self.steps}"],
            ["time of a step", f"{1e6 * self.step_time:.3g} us"],
            ["latency", f"{1e3 * self.latency:.3g} ms"],
            ["throughput", f"{self.throughput:.4g} images/s"],
            ["throughput, pipelined", f"{self.pipelined_throughput:.4g} images/s"],
            ["energy, dynamic in the cores", f"{1e6 * self.core_energy:.4g} uJ"],
            ["energy, all", f"{1e6 * self.total_energy:.4g} uJ"],
            ["energy-delay product", f"{1e6 * self.energy_delay_product:.3g} uJs"],
        ]
        return format_table(["an inference on Loihi, estimated", ""], rows)


@dataclass(frozen=True)
class LoihiMapping:
    """A network on the cores of Loihi; prints as a table.

    Attributes
    ----------
    populations : tuple of Population
        In the order of the network, support neurons last.
    steps : int
        Steps until all outputs of 0 and more are out: ``(L + 1) S + 1``, and one for each hop between populations.
    interval : int
        Steps for which a layer is busy with one image.
    misfits : tuple of str
        Neurons that fit on no core, and the limit that they break.
    notes : tuple of str
        What else to know.
    """

    populations: tuple[Population, ...]
    steps: int
    interval: int
    misfits: tuple[str, ...]
    notes: tuple[str, ...]
    chip: LoihiChip

    @property
    def cores(self) -> int:
        """Cores of all populations."""
        return sum(population.cores for population in self.populations)

    @property
    def chips(self) -> int:
        """Chips that have so many cores."""
        return -(-self.cores // self.chip.cores)

    @property
    def fits(self) -> bool:
        """Whether every neuron fits on a core."""
        return not self.misfits

    def estimate(self, counts: Mapping[str, float]) -> LoihiEstimate:
        """What an inference takes, from what it counts.

        Parameters
        ----------
        counts : mapping
            Totals of an inference, as :class:`~quartz_plugin.hardware.InferenceCounts` names them and its ``mean()``
            gives them: those of the chip's profile, and ``spikes/input``.

        Raises
        ------
        ValueError
            If a count is missing, or the counts are of another network.
        """
        # Which updates are inactive follows from the chip's compartments and steps.
        wanted = [name for name in (*self.chip.profile.spiking, "spikes/input") if name != "inactive_updates"]
        if missing := [name for name in wanted if name not in counts]:
            raise ValueError(f"an estimate needs the counts {missing} of an inference; given are {sorted(counts)}")
        self._check_network(counts)
        chip = self.chip
        compartments = sum(population.neurons for population in self.populations)
        active = float(counts["active_updates"])
        updates = {"active_updates": active, "inactive_updates": max(0.0, compartments * self.steps - active)}
        core_energy = float(chip.profile.energy({**counts, **updates}))
        fullest = max(-(-population.neurons // population.cores) for population in self.populations)
        update_time = chip.barrier_time + fullest * chip.active_update_time
        synop_times = [chip.synop_time * population.synapses / population.cores for population in self.populations]
        chip_time = self.steps * update_time + sum(synop_times)
        input_time = float(counts["spikes/input"]) * chip.input_spike_time
        latency = max(chip_time, input_time)
        return LoihiEstimate(
            steps=self.steps,
            step_time=chip_time / self.steps,
            latency=latency,
            throughput=1 / latency,
            pipelined_throughput=1 / max(self.interval * update_time + max(synop_times), input_time),
            core_energy=core_energy,
            total_energy=core_energy + chip.other_power * latency,
        )

    def _check_network(self, counts: Mapping[str, float]) -> None:
        """Raise ValueError where the counts of layers, if there are any, are not of those of the mapping."""
        neurons = {population.name: population.neurons - population.relays for population in self.populations}
        for name, count in counts.items():
            kind, _, layer = name.partition("/")
            if kind == "readout_events" and layer and count != neurons.get(layer):
                raise ValueError(
                    f"the counts are of another network: {count:g} neurons of layer {layer!r} are read out in an "
                    f"inference, in this mapping {neurons.get(layer, 'there is no such layer')}"
                )

    def __str__(self) -> str:
        header = [
            "population",
            "neurons",
            "relays",
            "cores",
            "binds",
            "in-axons",
            "out-axons",
            "KiB a core",
            "synapses",
        ]
        rows = [
            [
                p.name,
                p.neurons,
                p.relays,
                p.cores,
                p.binding,
                p.in_axons,
                p.out_axons,
                p.synaptic_memory / 1024,
                p.synapses,
            ]
            for p in self.populations
        ]
        total = f"{self.cores:,} cores, {self.chips:,} chip{'s' * (self.chips > 1)}, {self.steps:,} steps (an estimate)"
        return "\n".join([format_table(header, rows), total, *(f"- {note}" for note in (*self.misfits, *self.notes))])


# Axons are partly found by gradients.
@torch.inference_mode(False)
def map_to_loihi(snn: SpikingNetwork, shared_weights: bool = True, chip: LoihiChip = LOIHI_1) -> LoihiMapping:
    """Lay a converted network out on cores.

    Parameters
    ----------
    snn : SpikingNetwork
        With ``rectifier="spike"``.
    shared_weights : bool
        Whether the neurons of a core share a convolution's weights, or each has a list of its own.
    chip : LoihiChip
        Its limits.

    Raises
    ------
    ValueError
        With silent zeros: Loihi's neurons cannot set their own current at readout, and a fixed readout weight needs
        every unit to fire.

    Examples
    --------
    >>> import quartz_plugin
    >>> ann = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    >>> mapping = map_to_loihi(quartz_plugin.convert(ann, torch.rand(32, 4), t_max=16))
    >>> mapping.cores, mapping.chips, mapping.steps, [population.name for population in mapping.populations]
    (4, 1, 48, ['input', '1', 'output', 'support'])
    """
    if not isinstance(snn, SpikingNetwork):
        raise TypeError(f"map_to_loihi takes a SpikingNetwork, as convert makes it, got {type(snn).__name__}")
    graph = snn.graph
    if graph.silent:
        raise ValueError(
            'rectifier="silent" needs neurons that set their own current at readout, as programmable ones (Loihi 2) '
            'can; Loihi 1 has a fixed readout weight, which needs every unit to fire: convert with rectifier="spike"'
        )
    misfits: list[str] = []
    notes: list[str] = []
    bits = graph.config.weight_bits
    if bits is None or bits > chip.weight_bits:
        notes.append(f"the weights are finer than the chip's: weight_bits={chip.weight_bits} shows what that costs")
    if graph.dense_stem is not None:
        notes.append("the first layer computes on the image itself, off the chip: what it costs is not in here")
    units = list(_units(graph, shared_weights, chip))
    notes += _coarse_readouts(graph, units, chip)
    outgoing = {unit.name: 0 for unit in units}
    populations: list[Population] = []
    for unit in reversed(units):
        cut = _cut(unit, outgoing[unit.name], chip, misfits)
        for source, axons in cut.axons.of_all.items():
            outgoing[source] += axons
        populations.append(_population(unit, cut, outgoing[unit.name]))
    support = _support(graph, chip, populations)
    ends = max(layer.neuron.clock.rectify for layer in graph.layers)
    busy = max(layer.neuron.clock.rectify - layer.neuron.clock.first_input for layer in graph.layers)
    return LoihiMapping(
        (*reversed(populations), support), ends + 1 + _hops(graph), busy + 1, tuple(misfits), tuple(notes), chip
    )


Size = tuple[int, int, int]
"""Channels, rows and columns of a tile."""

Parts = tuple[list[slice], list[slice], list[slice]]
"""How they are cut."""


@dataclass(frozen=True)
class _Axons:
    """In-axons of a unit that is cut into tiles: of the fullest, and of all from each source."""

    fullest: int
    of_all: dict[str, int]


@dataclass
class _Unit:
    """What is laid out: its neurons as an image, and what a tile of them needs."""

    name: str
    shape: Size
    relays: int
    weight_synapses: int
    other_synapses: int
    axons: Callable[[Size], _Axons]
    weight_memory: Callable[[Size], float]
    """Size of a tile -> bits of its weight synapses."""
    readout: float | None = None
    support_axons: int = 0


@dataclass
class _Cut:
    tiles: int
    axons: _Axons
    memory: float
    by_limit: dict[str, int]


def _parts(shape: Size, size: Size) -> Parts:
    first, second, third = (
        [slice(start, min(start + part, whole)) for start in range(0, whole, part)]
        for whole, part in zip(shape, size, strict=True)
    )
    return first, second, third


def _units(graph: ConvertedGraph, shared: bool, chip: LoihiChip) -> Iterator[_Unit]:
    topology = Topology.of(graph)
    shapes, fan_outs = topology.shapes, topology.fan_outs
    layers = {layer.node: layer for layer in graph.layers}
    delays = _longest_delays(graph)
    ones = with_unit_weights(graph.module)
    for node in graph.module.graph.nodes:
        if not is_spike_source(graph.module, node):
            continue
        relays = shapes[node.name].numel() * _relays(delays[node], chip)
        if node.op == "placeholder":
            yield _Unit(INPUT, as_image(shapes[node.name]), relays, 0, 0, lambda size: _Axons(0, {}), lambda size: 0.0)
        elif node in layers:
            layer = layers[node]
            synapses_into = int(sum(float(count.sum()) for count in fan_outs[layer.name].values()))
            yield _of_layer(graph, layer, ones, shapes, synapses_into, relays, shared, chip)
        else:
            yield _of_pool(graph, node, shapes, relays, chip)


def _relays(delay: int, chip: LoihiChip) -> int:
    """Neurons in a row that carry a spike over a delay."""
    return max(0, -(-delay // chip.longest_delay) - 1)


def _longest_delays(graph: ConvertedGraph) -> dict[fx.Node, int]:
    """For each node that emits spikes, the longest delay on the way to a layer or pooling; shorter ones share it."""
    longest: dict[fx.Node, int] = {}
    behind: dict[fx.Node, dict[fx.Node, int]] = {}
    for node in graph.module.graph.nodes:
        module = called_by(graph.module, node)
        arriving: dict[fx.Node, int] = {}
        for before in node.all_input_nodes:
            for source, delay in behind[before].items():
                arriving[source] = max(arriving.get(source, 0), delay)
        for source, delay in arriving.items():
            longest[source] = max(longest[source], delay)
        own = module.steps if isinstance(module, AxonalDelay) else 0
        behind[node] = {source: delay + own for source, delay in arriving.items()}
        if is_spike_source(graph.module, node):
            longest[node], behind[node] = 0, {node: 0}
    return longest


def _named(graph: ConvertedGraph, node: fx.Node) -> str:
    if node.op == "placeholder":
        return INPUT
    return str(node.target)


def _of_layer(
    graph: ConvertedGraph,
    layer: Layer,
    ones: fx.GraphModule,
    shapes: dict[str, torch.Size],
    synapses: int,
    relays: int,
    shared: bool,
    chip: LoihiChip,
) -> _Unit:
    neurons = shapes[layer.node.name].numel()
    p = layer.neuron.p
    extra = 2 + (p.rectifier is not None) + 2 * p.hold
    others = extra * neurons + biased_neurons(layer, shapes[layer.node.name])
    kernels = _kernels(layer.projection) if shared else None
    image = as_image(shapes[layer.node.name])
    each = chip.weight_bits + chip.index_bits

    def weight_memory(size: Size) -> float:
        own = others / neurons * math.prod(size) * each
        if kernels is not None:
            weights, one_to_one = kernels
            return weights * size[0] / image[0] * chip.weight_bits + one_to_one * math.prod(size) * each + own
        return synapses / neurons * math.prod(size) * each + own

    return _Unit(
        layer.name, image, relays, synapses, others, _Reach(graph, layer, ones, shapes), weight_memory,
        _largest_readout_weight(graph, layer, shapes), 2 + (p.rectifier is not None),
    )  # fmt: skip


def _kernels(projection: Projection) -> tuple[int, int] | None:
    """Weights of a layer's convolutions, and synapses one to one a neuron; None where they cannot be shared.

    That is where linear maps follow each other, or one is a matrix.
    """
    routed = set(projection.sources)
    weights = one_to_one = 0
    for node in projection.nodes:
        each = projection.module.get_submodule(str(node.target))
        from_spikes = routed.issuperset(node.all_input_nodes)
        if isinstance(each, Add):
            one_to_one += sum(arg in routed for arg in node.all_input_nodes)
        elif isinstance(each, OneToOne) and from_spikes:
            one_to_one += 1
        elif isinstance(each, (nn.Conv1d, nn.Conv2d, nn.ConvTranspose1d, nn.ConvTranspose2d)) and from_spikes:
            weights += each.weight.numel()
        elif isinstance(each, (*WEIGHTED, *AVERAGES, OneToOne)):
            return None
        elif from_spikes:
            routed.add(node)
    return weights, one_to_one + (projection.target in routed)


class _Reach:
    """How many units of its sources reach each tile of a layer, each unit once."""

    def __init__(
        self, graph: ConvertedGraph, layer: Layer, ones: fx.GraphModule, shapes: dict[str, torch.Size]
    ) -> None:
        self.graph, self.layer, self.ones = graph, layer, ones
        self.neurons = shapes[layer.node.name]
        self.shape = as_image(self.neurons)
        by_node = {node: shapes[node.name] for node in graph.module.graph.nodes if node.name in shapes}
        self.shapes = {source: by_node[source] for source in layer.projection.sources}
        self.relations = {source: relation_to(layer.projection, source, by_node) for source in self.shapes}
        self.known: dict[Size, _Axons] = {}

    def __call__(self, size: Size) -> _Axons:
        if size not in self.known:
            self.known[size] = self._find(_parts(self.shape, size))
        return self.known[size]

    def _find(self, parts: Parts) -> _Axons:
        by_source = {}
        for source, relation in self.relations.items():
            counts = None if relation is None else relation.units_into(_of_rank(parts, len(self.neurons)))
            if counts is None:
                return self._probe(parts)
            by_source[_named(self.graph, source)] = counts
        return _Axons(int(_total(by_source).max()), {source: int(counts.sum()) for source, counts in by_source.items()})

    def _probe(self, parts: Parts) -> _Axons:
        """The same by gradients, where paths meet: of all tiles, or of some of them where there are many."""
        tiles = math.prod(map(len, parts))
        chosen = parts if tiles <= MOST_PROBES else tuple([each[0], each[len(each) // 2], each[-1]] for each in parts)
        probed = [self._gradients(tile) for tile in itertools.product(*chosen)]
        fullest = max(sum(tile.values()) for tile in probed)
        share = tiles / len(probed)
        return _Axons(fullest, {s: math.ceil(share * sum(tile[s] for tile in probed)) for s in probed[0]})

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
            _named(self.graph, source): 0 if gradient is None else int((gradient != 0).sum())
            for source, gradient in zip(inputs, gradients, strict=True)
        }


def _of_rank(parts: Parts, rank: int) -> list[list[slice]]:
    """Parts of an image's dimensions as those of a vector or sequence."""
    return [parts[0], *parts[1:][3 - rank :]] if rank <= 3 else []


def _total(by_source: Mapping[str, Tensor]) -> Tensor:
    first, *others = by_source.values()
    return sum(others, first)


def _of_pool(
    graph: ConvertedGraph, node: fx.Node, shapes: dict[str, torch.Size], relays: int, chip: LoihiChip
) -> _Unit:
    module = graph.module.get_submodule(str(node.target))
    assert isinstance(module, FirstSpikeMaxPool)
    (before,) = node.all_input_nodes
    relation, image = pool_relation(module.pool, shapes[before.name]), as_image(shapes[node.name])
    sources = {_named(graph, source): shapes[source.name].numel() for source in spike_sources(graph.module, before)}

    def axons(size: Size) -> _Axons:
        counts = relation.units_into(_of_rank(_parts(image, size), len(shapes[node.name])))
        assert counts is not None
        # Of several that are concatenated, as large a share as they are of all.
        units = int(counts.sum())
        return _Axons(
            int(counts.max()), {source: -(-units * of // sum(sources.values())) for source, of in sources.items()}
        )

    per_neuron = axons((1, 1, 1)).fullest
    return _Unit(
        str(node.target), image, relays, sum(axons((1, 1, 1)).of_all.values()), 0,
        axons, lambda size: per_neuron * math.prod(size) * chip.index_bits,
    )  # fmt: skip


def _largest_readout_weight(graph: ConvertedGraph, layer: Layer, shapes: dict[str, torch.Size]) -> float:
    """Largest ``|1 - A(1)|``, A with its bias."""
    ones = {
        source: torch.ones(1, *shapes[source.name], dtype=graph.dtype, device=graph.device)
        for source in layer.projection.sources
    }
    with torch.no_grad():
        total: Tensor = layer.projection(ones)
        bias = layer.neuron.p.bias
        if bias is not None:
            total = total + (torch.ones_like(bias) if layer.neuron.p.bias_code == "spike" else bias)
    return float((1 - total).abs().max())


def _coarse_readouts(graph: ConvertedGraph, units: Sequence[_Unit], chip: LoihiChip) -> list[str]:
    """Name the layers whose readout weight a coarse and a fine synapse cannot say as finely as the weights."""
    readouts = {unit.name: unit.readout for unit in units if unit.readout is not None}
    shapes = unit_shapes(graph)
    notes = []
    for layer in graph.layers:
        largest = _largest_weight(layer, shapes)
        if layer.name in readouts and readouts[layer.name] > 2**chip.weight_bits * largest > 0:
            notes.append(
                f"{layer.name}: the readout weight is up to {readouts[layer.name] / largest:,.0f} times the largest "
                f"weight; a coarse and a fine synapse of {chip.weight_bits} bits reach {2**chip.weight_bits} times in "
                "the weights' own steps, and farther in coarser ones, which round the membrane"
            )
    return notes


def _largest_weight(layer: Layer, shapes: dict[fx.Node, torch.Size]) -> float:
    """Largest weight into a layer: of any term of the composed map, or of its factors where that is no convolution."""
    convolutions = convolutions_of(layer, shapes)
    if convolutions is None:
        factors = [layer.projection.module.get_submodule(str(node.target)) for node in layer.projection.nodes]
        weights = [factor.weight for factor in factors if isinstance(factor, WEIGHTED)]
    else:
        weights = [each.weight for each in convolutions]
    return max((float(weight.abs().max()) for weight in weights), default=0.0)


def _cut(unit: _Unit, outgoing: int, chip: LoihiChip, misfits: list[str]) -> _Cut:
    """Cut a unit into tiles that fit: space first or channels first, whichever takes fewer cores."""
    units = math.prod(unit.shape)
    relayed = (units + unit.relays) / max(1, units)
    keeps: dict[str, Callable[[Size], bool]] = {
        "compartments": lambda size: math.prod(size) * relayed <= chip.compartments,
        "synaptic memory": lambda size: unit.weight_memory(size) <= 8 * chip.synaptic_memory,
        "in-axons": lambda size: unit.axons(size).fullest + unit.support_axons <= chip.in_axons,
        "out-axons": lambda size: math.prod(size) * outgoing <= chip.out_axons * units,
    }
    alone: Size = (1, 1, 1)
    what = {
        "compartments": f"a neuron with its relays takes {relayed:,.0f} compartments, a core has {chip.compartments:,}",
        "synaptic memory": f"a neuron's synapses take {unit.weight_memory(alone) / 8:,.0f} bytes, "
        f"a core has {chip.synaptic_memory:,}",
        "in-axons": f"a neuron listens to {unit.axons(alone).fullest:,} units and {unit.support_axons} support "
        f"neurons, a core has {chip.in_axons:,} in-axons",
        "out-axons": f"a neuron reaches {outgoing / max(1, units):,.0f} cores, a core has {chip.out_axons:,} out-axons",
    }
    for limit in [limit for limit, keep in keeps.items() if not keep(alone)]:
        misfits.append(f"{unit.name} does not fit: {what[limit]}; what is counted leaves this limit out")
        del keeps[limit]
    return min((_cut_in_order(unit, keeps, order) for order in ORDERS), key=lambda cut: cut.tiles)


ORDERS = ((1, 2, 0), (0, 1, 2))
"""Dimensions in the order in which they are cut: rows, columns, channels; or channels, rows, columns."""


def _cut_in_order(unit: _Unit, keeps: Mapping[str, Callable[[Size], bool]], order: Sequence[int]) -> _Cut:
    def size_of(parts: int) -> Size:
        size = list(unit.shape)
        for dim in order:
            cuts = min(unit.shape[dim], parts)
            size[dim], parts = -(-unit.shape[dim] // cuts), -(-parts // cuts)
        return size[0], size[1], size[2]

    def tiles_of(parts: int) -> int:
        return math.prod(map(len, _parts(unit.shape, size_of(parts))))

    def fewest(keep: Callable[[Size], bool]) -> int:
        return _fewest(lambda parts: keep(size_of(parts)), math.prod(unit.shape))

    needed = {limit: fewest(keep) for limit, keep in keeps.items()}
    parts = max(needed.values(), default=1)
    return _Cut(
        tiles_of(parts), unit.axons(size_of(parts)), unit.weight_memory(size_of(parts)),
        {limit: tiles_of(own) for limit, own in needed.items()},
    )  # fmt: skip


def _fewest(fits: Callable[[int], bool], most: int) -> int:
    """Smallest number of parts that fits, where more parts fit better."""
    low, high = 1, 1
    while high < most and not fits(high):
        low, high = high + 1, min(most, 2 * high)
    while low < high:
        half = (low + high) // 2
        low, high = (low, half) if fits(half) else (half + 1, high)
    return high


def _population(unit: _Unit, cut: _Cut, outgoing: int) -> Population:
    return Population(
        name=unit.name,
        neurons=math.prod(unit.shape) + unit.relays,
        relays=unit.relays,
        cores=cut.tiles,
        binding=max(cut.by_limit, key=lambda limit: cut.by_limit[limit]),
        cores_by_limit=cut.by_limit,
        in_axons=cut.axons.fullest,
        out_axons=outgoing,
        synaptic_memory=math.ceil(cut.memory / 8),
        synapses=unit.weight_synapses + unit.other_synapses,
        largest_readout_weight=unit.readout,
    )


def _support(graph: ConvertedGraph, chip: LoihiChip, populations: list[Population]) -> Population:
    """One neuron at each step at which a window starts or ends; each wakes the next, over relays where that is long."""
    clocks = [layer.neuron.clock for layer in graph.layers]
    times = sorted({time for clock in clocks for time in (clock.first_input, clock.readout, clock.rectify)})
    relays = sum(_relays(later - time, chip) for time, later in itertools.pairwise(times))
    layers = {layer.name for layer in graph.layers}
    # Each of them reaches, at most, the cores of the layers.
    cores = sum(population.cores for population in populations if population.name in layers)
    neurons = len(times) + relays
    needed = {
        "compartments": -(-neurons // chip.compartments),
        "out-axons": -(-cores * len(times) // chip.out_axons),
    }
    return Population(
        SUPPORT, neurons, relays, max(needed.values()), max(needed, key=lambda limit: needed[limit]), needed,
        len(times), cores * len(times), 0, 0,
    )  # fmt: skip


def _hops(graph: ConvertedGraph) -> int:
    """Populations that a spike passes on the longest way from the input: each takes a step."""
    hops: dict[fx.Node, int] = {}
    for node in graph.module.graph.nodes:
        before = max((hops[source] for source in node.all_input_nodes), default=-1)
        hops[node] = before + (node.op != "output" and is_spike_source(graph.module, node))
    return max(hops.values())


__all__ = ["LOIHI_1", "LoihiChip", "LoihiEstimate", "LoihiMapping", "Population", "map_to_loihi"]
