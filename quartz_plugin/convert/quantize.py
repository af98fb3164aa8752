r"""Quantize, between rescale and schedule: weights on a fixed-point grid, as hardware holds them.

Only with ``weight_bits``. Every weight becomes a whole number of at most that many bits, one of them the sign, times
:math:`2^{-k}`, with one ``k`` for each layer or output channel, as large as its largest weight allows. The current
after readout, 1, and the threshold, ``S + 1/2``, are on that grid already, since it is binary; ``S b`` is put on it.
Membranes are then whole multiples of one :math:`2^{-k}`, and sums are exact in any order: all engines agree bit for
bit, without ties.

A neuron's membrane fits into float32 where :math:`m 2^k < 2^{24}`, ``m`` being the most that its positive, or its
negative, inputs add up to: no sum of some of them, in any order, is larger. Up to 8 bits a held neuron whose weights
stand for themselves gets a ``k`` for which this holds; where linear maps stand in a row their grids multiply, and the
network may be in float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from quartz_plugin.convert.rescale import ScaledNetwork
from quartz_plugin.convert.traced import CalibratedNetwork
from quartz_plugin.graph import INPUT
from quartz_plugin.graph.reach import EXACT_BITS, Reach, behind, is_weighted, of_spikes, row_shape
from quartz_plugin.layer_config import Granularity
from quartz_plugin.operators.modules import OneToOne, with_weight
from quartz_plugin.operators.table import ConversionError

CHANNELS_APART = 16
"""Binary places by which the grid of one channel may be finer than that of another."""

FINEST = 40
"""Binary places behind the point that a grid may have at most."""

MOST_BITS_IN_FLOAT32 = 8
"""Bits of weights up to which grids are chosen so that float32 holds the membranes of held neurons."""


def quantize(network: ScaledNetwork, calibrated: CalibratedNetwork) -> ScaledNetwork:
    """Put all weights and biases of a scaled network, whose averages are sums, on their grids.

    Where the network's type could not hold every membrane exactly, what comes out is in float64.

    Parameters
    ----------
    network : ScaledNetwork
        The network; its weights and biases stay as they are.
    calibrated : CalibratedNetwork
        What it was made of. With ``weight_bits`` and ``weight_granularity``: one grid for each layer's weights, or for
        each output channel's. A bias spike has the weight 1, which is on the grid.

    Returns
    -------
    ScaledNetwork
        Of the same graph.

    Raises
    ------
    ConversionError
        If no type could hold a membrane exactly.
    """
    grids = _Grids(network, calibrated)
    if calibrated.config.hold and grids.weight_bits <= MOST_BITS_IN_FLOAT32:
        grids.coarsen_single_maps(EXACT_BITS[torch.float32] - HALF_UNIT)
    grids.coarsen_maps_in_a_row(EXACT_BITS[torch.float64])
    needed = max(float(grids.bits_of(node).max()) for node in network.layers)
    exact = next((one for one in (calibrated.network.dtype, torch.float64) if needed < EXACT_BITS[one]), None)
    if exact is None:
        raise ConversionError(
            f"weight_bits={grids.weight_bits}: a membrane would need {needed:.0f} bits, and float64 holds 53; "
            'give fewer weight_bits, or linear="pair" where many linear maps stand in a row'
        )
    layers = {}
    for node, layer in network.layers.items():
        bias = grids.rounded_bias(node, EXACT_BITS[exact] - HALF_UNIT)
        layers[node] = replace(layer, bias=None if bias is None else bias.to(exact))
    return replace(network, modules={path: each.to(exact) for path, each in grids.modules.items()}, layers=layers)


HALF_UNIT = 1
"""Bits for half a unit of the finest place, by which the integer engine rounds."""


class _Grids:
    """Grids of the weights of a network, and the bits that its membranes need with them."""

    def __init__(self, network: ScaledNetwork, calibrated: CalibratedNetwork) -> None:
        config = calibrated.config
        assert config.weight_bits is not None
        self.network, self.weight_bits = network, config.weight_bits
        self.spends_spike = config.bias == "spike"
        windows = {node: layer.window for node, layer in network.layers.items()}
        # A level of held neurons is one window at most; early spikes encode more.
        early = 0 if config.hold else (len(windows) + 1) * max(calibrated.windows[INPUT], *windows.values())
        self.input_level = early or calibrated.windows[INPUT]
        self.levels = {node: early or window for node, window in windows.items()}
        self.drives = {node: early or layer.input_window for node, layer in network.layers.items()}
        self.places = {
            path: _finest_places(module, self.weight_bits, config.weight_granularity or config.granularity)
            for path, module in network.modules.items()
            if is_weighted(module) and not _is_sign(module)
        }
        self.modules = dict(network.modules)
        self.rounded_to: dict[str, Tensor] = {}
        self.in_front = {node: self._weights_in_front_of(node) for node in network.layers}
        self._put_on_grids()

    def bits_of(self, node: fx.Node) -> Tensor:
        """Bits that a whole number needs to hold the membrane of each neuron of a layer."""
        return torch.log2(self._largest(node)) + self._membrane_places(node)

    def coarsen_single_maps(self, bits: int) -> None:
        """Give weights that lead from spikes to neurons by themselves grids with which so many bits hold these."""
        single = [node for node, paths in self.in_front.items() if max(paths.values(), default=0) == 1]
        # A grid of fewer places may round a sum up.
        while max([self._coarsen(node, self._room(node, bits)) for node in single], default=False):
            self._put_on_grids()

    def coarsen_maps_in_a_row(self, bits: int) -> None:
        """Where membranes need more bits, take places from the finest grids of each map in front of them.

        Those of channels that are finer than others first; then of all weights of few bits, the others stay.
        """
        while tight := [node for node in self.in_front if not bool((self.bits_of(node) < bits).all())]:
            paths = {path for node in tight for path in self.in_front[node]}
            paths = {path for path in paths if self._differs(path)} or paths
            if not any(map(self._differs, paths)) and self.weight_bits > MOST_BITS_IN_FLOAT32:
                return
            for path in paths:
                self.places[path] = self.places[path].clamp(max=self.places[path].max() - 1)
            self._put_on_grids()

    def _differs(self, path: str) -> bool:
        return bool(self.places[path].max() > self.places[path].min())

    def rounded_bias(self, node: fx.Node, bits: int) -> Tensor | None:
        """The bias of a layer on a grid with which numbers of so many bits hold its membranes."""
        layer = self.network.layers[node]
        if layer.bias is None or self.spends_spike:
            return layer.bias
        # S b is what the membrane gets.
        wanted = self._membrane_places(node) + math.ceil(math.log2(layer.input_window))
        places = torch.minimum(wanted, self._room(node, bits))[0].expand(layer.shape)
        grid = 2.0 ** _over(places, layer.bias.shape, torch.amin).to(layer.bias.device)
        return torch.round(layer.bias.double() * grid) / grid

    def _room(self, node: fx.Node, bits: int) -> Tensor:
        """Places that the membranes of a layer may have so that so many bits hold them."""
        return torch.ceil(bits - torch.log2(self._largest(node))) - 1

    def _membrane_places(self, node: fx.Node) -> Tensor:
        # The threshold, S + 1/2, has one.
        return self.reach[node].places.clamp(min=1)

    def _largest(self, node: fx.Node) -> Tensor:
        """The most that membranes may be on their way, and what the integer engine takes to round them."""
        layer, reach = self.network.layers[node], self.reach[node]
        up = down = torch.tensor(float(self.drives[node] if self.spends_spike else 0))
        if layer.bias is not None and not self.spends_spike:
            # What the grid makes of a bias may be half a unit larger.
            drive = layer.bias.detach().cpu().double() * self.drives[node]
            up, down = drive.clamp(min=0) + 1, (-drive).clamp(min=0) + 1
        return reach.largest_membrane(up, down, layer.window)

    def _coarsen(self, node: fx.Node, room: Tensor) -> bool:
        """Take the places from grids in front of a layer that there is no room for; returns whether any were."""
        room, coarsened = room[0].expand(self.network.layers[node].shape), False
        for path in self.in_front[node]:
            places, rows = self.places[path], row_shape(self.modules[path])
            if places.dim() == 0 or rows is None or not _is_broadcastable(rows, room.shape):
                fitting = torch.minimum(places, room.min())
            else:
                fitting = torch.minimum(places, _over(room, rows, torch.amin).flatten())
            if bool((fitting < places).any()):
                self.places[path], coarsened = fitting, True
        return coarsened

    def _weights_in_front_of(self, node: fx.Node) -> dict[str, int]:
        """Path of each module with weights between spikes and a layer -> how many stand in a row from it on."""
        found: dict[str, int] = {}
        pending = [(source, 0) for source in node.all_input_nodes]
        while pending:
            source, in_a_row = pending.pop()
            if source.op != "call_module" or source in self.network.layers:
                continue
            path = str(source.target)
            if path in self.places:
                in_a_row += 1
                if found.get(path, 0) >= in_a_row:
                    continue
                found[path] = in_a_row
            pending += [(each, in_a_row) for each in source.all_input_nodes]
        return found

    def _put_on_grids(self) -> None:
        for path, places in self.places.items():
            if self.rounded_to.get(path) is not places:
                module = self.network.modules[path]
                self.modules[path], self.rounded_to[path] = _on_grid(module, places, self.weight_bits), places
        self.reach = self._find_reach()

    def _find_reach(self) -> dict[fx.Node, Reach]:
        """What may arrive at each layer, all inputs at their largest level."""
        values: dict[fx.Node, Reach] = {}
        reach: dict[fx.Node, Reach] = {}
        last_use = {source: node for node in self.network.graph.nodes for source in node.all_input_nodes}
        with torch.no_grad():
            for node in self.network.graph.nodes:
                if node.op == "placeholder":
                    values[node] = of_spikes(self.network.input_shape, self.input_level)
                elif (layer := self.network.layers.get(node)) is not None:
                    reach[node] = values[node.all_input_nodes[0]]
                    values[node] = of_spikes(layer.shape, self.levels[node])
                elif node.op == "call_module":
                    values[node] = behind(self.modules[str(node.target)], [values[arg] for arg in node.args])
                for source in node.all_input_nodes:
                    if last_use[source] is node:
                        del values[source]
        return reach


def _is_sign(module: Any) -> bool:
    """Check for synapses that weigh 1 or -1, which are on every grid and take no places."""
    return isinstance(module, OneToOne) and bool((module.weight.abs() == 1).all())


def _finest_places(module: Any, weight_bits: int, granularity: Granularity) -> Tensor:
    """Places of the finest grid on which weights have so many bits: one for each row, or for all of them."""
    magnitude, largest = module.weight.detach().double().cpu().abs(), 2 ** (weight_bits - 1) - 1
    by_row = granularity == "channel" and row_shape(module) is not None
    magnitude = (
        magnitude.flatten(1).amax(1) if by_row and magnitude.dim() > 1 else magnitude if by_row else magnitude.max()
    )
    # A channel without weights needs no grid, and one that is nearly dead none finer than counts in the others.
    places = torch.floor(torch.log2(largest / magnitude)).masked_fill(magnitude == 0, FINEST)
    return places.clamp(max=min(FINEST, float(places.min()) + CHANNELS_APART))


def _on_grid(module: Any, places: Tensor, weight_bits: int) -> nn.Module:
    """A module with its weights on their grids."""
    weight, largest = module.weight.detach(), 2 ** (weight_bits - 1) - 1
    grid = 2.0 ** places.to(weight.device)
    if places.dim():
        grid = grid.view(-1, *[1] * (weight.dim() - 1))
    rounded = torch.round(weight.double() * grid).clamp(-largest, largest) / grid
    return with_weight(module, rounded.to(weight.dtype))


def _is_broadcastable(shape: Sequence[int], to: Sequence[int]) -> bool:
    sizes = zip(reversed(shape), reversed(to), strict=False)
    return len(shape) <= len(to) and all(size in (1, other) for size, other in sizes)


def _over(values: Tensor, shape: Sequence[int], reduce: Callable[..., Tensor]) -> Tensor:
    """Values of a sample's units reduced to a shape that is broadcastable to theirs."""
    full = [1] * (values.dim() - len(shape)) + list(shape)
    dims = [dim for dim, size in enumerate(full) if size == 1 and values.shape[dim] != 1]
    return (reduce(values, dims, keepdim=True) if dims else values).reshape(shape)
