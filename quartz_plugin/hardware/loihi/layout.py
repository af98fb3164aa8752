"""The way from a converted network to cores."""

from __future__ import annotations

import itertools
import math

import torch

from quartz_plugin.graph.topology import Topology
from quartz_plugin.graph.walk import Step, Walk, plan_walk
from quartz_plugin.hardware.loihi.chip import LOIHI_1, LoihiChip
from quartz_plugin.hardware.loihi.cutting import Cut, Sheet, cut_sheet
from quartz_plugin.hardware.loihi.mapping import LoihiMapping, Population
from quartz_plugin.hardware.loihi.sheets import coarse_readouts, relays_over, sheets_of
from quartz_plugin.network import SpikingNetwork

SUPPORT = "support"
"""Name of the population of support neurons."""


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
    >>> ann = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
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
    topology = Topology.of(graph)
    sheets = list(sheets_of(topology, shared_weights, chip))
    notes += coarse_readouts(topology, sheets, chip)
    outgoing = {sheet.name: 0 for sheet in sheets}
    populations: list[Population] = []
    for sheet in reversed(sheets):
        cut, broken = cut_sheet(sheet, outgoing[sheet.name], chip)
        misfits += broken
        for source, axons in cut.axons.of_all.items():
            outgoing[source] += axons
        populations.append(_population(sheet, cut, outgoing[sheet.name]))
    support = _support(topology, chip, populations)
    clocks = [layer.neuron.clock for layer in topology.layers]
    steps = max(clock.rectify for clock in clocks) + 1 + _hops(topology)
    interval = max(clock.rectify - clock.first_input for clock in clocks) + 1
    return LoihiMapping((*reversed(populations), support), steps, interval, tuple(misfits), tuple(notes), chip)


def _population(sheet: Sheet, cut: Cut, outgoing: int) -> Population:
    return Population(
        name=sheet.name,
        neurons=math.prod(sheet.shape) + sheet.relays,
        relays=sheet.relays,
        cores=cut.tiles,
        binding=max(cut.by_limit, key=lambda limit: cut.by_limit[limit]),
        cores_by_limit=cut.by_limit,
        in_axons=cut.axons.fullest,
        out_axons=outgoing,
        synaptic_memory=math.ceil(cut.memory / 8),
        synapses=sheet.weight_synapses + sheet.other_synapses,
        largest_readout_weight=sheet.readout,
    )


def _support(topology: Topology, chip: LoihiChip, populations: list[Population]) -> Population:
    """One neuron at each step at which a window starts or ends; each wakes the next, over relays where that is long."""
    clocks = [layer.neuron.clock for layer in topology.layers]
    times = sorted({time for clock in clocks for time in (clock.first_input, clock.readout, clock.rectify)})
    relays = sum(relays_over(later - time, chip) for time, later in itertools.pairwise(times))
    layers = {layer.name for layer in topology.layers}
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


def _hops(topology: Topology) -> int:
    """Populations that a spike passes on the longest way from the input: each takes a step."""
    walk = _Hops(plan_walk(topology.graph.module, keep=list(topology.nodes.values())))
    walk.run(0)
    hops: int = max(walk.values.values())
    return hops


class _Hops(Walk):
    """Values are the populations that spikes have passed behind the input."""

    def at_synapses(self, step: Step) -> int:
        return max((self.values[source] for source in step.sources), default=-1)

    def at_neurons(self, step: Step) -> int:
        return self.at_synapses(step) + 1

    def at_pool(self, step: Step) -> int:
        return self.at_synapses(step) + 1
