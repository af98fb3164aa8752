"""A network on the cores of the chip, and an estimate of its inferences there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from quartz_plugin.hardware.loihi.chip import LoihiChip
from quartz_plugin.tables import format_table


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
        The limit that decides how many: see :data:`~quartz_plugin.hardware.loihi.LIMITS`.
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
    """Times and energies of an inference on the chip; SI units.

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
        Remarks, such as weights finer than the chip's.
    chip : LoihiChip
        The chip.
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
        """True where every neuron fits on a core."""
        return not self.misfits

    def estimate(self, counts: Mapping[str, float]) -> LoihiEstimate:
        """Estimate times and energies of an inference from its counts.

        Parameters
        ----------
        counts : mapping
            Totals of an inference, as :class:`~quartz_plugin.costs.InferenceCounts` names them and its ``mean()``
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
