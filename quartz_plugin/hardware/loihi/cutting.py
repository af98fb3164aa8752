"""Sheets of neurons, and how they are cut into tiles that fit on cores."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from quartz_plugin.hardware.loihi.chip import LoihiChip

Size = tuple[int, int, int]
"""Channels, rows and columns of a tile."""

Parts = tuple[list[slice], list[slice], list[slice]]
"""Ranges into which each of them is cut."""


@dataclass(frozen=True)
class Axons:
    """In-axons of a sheet that is cut into tiles: of the fullest, and of all from each source."""

    fullest: int
    of_all: dict[str, int]


@dataclass
class Sheet:
    """Neurons of one kind as an image, and what a tile of them needs.

    Attributes
    ----------
    name : str
        That of the population.
    shape : tuple of int
        Channels, rows and columns.
    relays : int
        Neurons that only carry its spikes over long delays.
    weight_synapses, other_synapses : int
        Synapses into it: those with weights, and those of readout, bias, rectifier and hold.
    axons : callable
        Size of a tile -> its in-axons.
    weight_memory : callable
        Size of a tile -> bits of its synapses.
    readout : float or None
        Largest readout weight.
    support_axons : int
        In-axons of support neurons.
    """

    name: str
    shape: Size
    relays: int
    weight_synapses: int
    other_synapses: int
    axons: Callable[[Size], Axons]
    weight_memory: Callable[[Size], float]
    readout: float | None = None
    support_axons: int = 0


@dataclass
class Cut:
    """A sheet in tiles: how many, their in-axons, bits of the fullest, and the tiles that each limit alone takes."""

    tiles: int
    axons: Axons
    memory: float
    by_limit: dict[str, int]


def parts_of(shape: Size, size: Size) -> Parts:
    """Cut a sheet of this shape into tiles of at most this size."""
    first, second, third = (
        [slice(start, min(start + part, whole)) for start in range(0, whole, part)]
        for whole, part in zip(shape, size, strict=True)
    )
    return first, second, third


def cut_sheet(sheet: Sheet, outgoing: int, chip: LoihiChip) -> tuple[Cut, list[str]]:
    """Cut a sheet into tiles that fit, space first or channels first, whichever takes fewer cores.

    Returns it with the limits that single neurons break, which are left out. `outgoing` are the out-axons of the
    whole sheet.
    """
    units = math.prod(sheet.shape)
    relayed = (units + sheet.relays) / max(1, units)
    keeps: dict[str, Callable[[Size], bool]] = {
        "compartments": lambda size: math.prod(size) * relayed <= chip.compartments,
        "synaptic memory": lambda size: sheet.weight_memory(size) <= 8 * chip.synaptic_memory,
        "in-axons": lambda size: sheet.axons(size).fullest + sheet.support_axons <= chip.in_axons,
        "out-axons": lambda size: math.prod(size) * outgoing <= chip.out_axons * units,
    }
    alone: Size = (1, 1, 1)
    needs = {
        "compartments": f"a neuron with its relays takes {relayed:,.0f} compartments, a core has {chip.compartments:,}",
        "synaptic memory": f"a neuron's synapses take {sheet.weight_memory(alone) / 8:,.0f} bytes, "
        f"a core has {chip.synaptic_memory:,}",
        "in-axons": f"a neuron has {sheet.axons(alone).fullest:,} source units and {sheet.support_axons} support "
        f"neurons, a core has {chip.in_axons:,} in-axons",
        "out-axons": f"a neuron reaches {outgoing / max(1, units):,.0f} cores, a core has {chip.out_axons:,} out-axons",
    }
    broken = [limit for limit, keep in keeps.items() if not keep(alone)]
    kept = {limit: keep for limit, keep in keeps.items() if limit not in broken}
    cut = min((_cut_in_order(sheet, kept, order) for order in ORDERS), key=lambda cut: cut.tiles)
    misfits = [f"{sheet.name} does not fit: {needs[limit]}; what is counted leaves this limit out" for limit in broken]
    return cut, misfits


ORDERS = ((1, 2, 0), (0, 1, 2))
"""Dimensions in the order in which they are cut: rows, columns, channels; or channels, rows, columns."""


def _cut_in_order(sheet: Sheet, keeps: Mapping[str, Callable[[Size], bool]], order: Sequence[int]) -> Cut:
    def size_of(parts: int) -> Size:
        size = list(sheet.shape)
        for dim in order:
            cuts = min(sheet.shape[dim], parts)
            size[dim], parts = -(-sheet.shape[dim] // cuts), -(-parts // cuts)
        return size[0], size[1], size[2]

    def tiles_of(parts: int) -> int:
        return math.prod(map(len, parts_of(sheet.shape, size_of(parts))))

    def fewest(keep: Callable[[Size], bool]) -> int:
        return _fewest(lambda parts: keep(size_of(parts)), math.prod(sheet.shape))

    needed = {limit: fewest(keep) for limit, keep in keeps.items()}
    parts = max(needed.values(), default=1)
    return Cut(
        tiles_of(parts), sheet.axons(size_of(parts)), sheet.weight_memory(size_of(parts)),
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
