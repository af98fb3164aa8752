"""The chip: limits of its cores, times and energies."""

from __future__ import annotations

from dataclasses import dataclass

from quartz_plugin.costs.energy import LOIHI, EnergyProfile

LIMITS = ("compartments", "synaptic memory", "in-axons", "out-axons")
"""Limits of a core."""


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
