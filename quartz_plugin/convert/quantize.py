r"""Quantize, between rescale and schedule: weights on a fixed-point grid, as hardware holds them.

Only with ``weight_bits``. Every weight becomes a whole number of at most that many bits, one of them the sign, times
:math:`2^{-k}`, with one ``k`` for each layer or output channel, as large as its largest weight allows. The current
after readout, 1, and the threshold, ``S + 1/2``, are on that grid already, since it is binary; ``S b`` is put on it.
Membranes are then whole multiples of one :math:`2^{-k}`, and sums are exact in any order: all engines agree bit for
bit, without ties.
"""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from quartz_plugin.convert.rescale import ScaledNetwork
from quartz_plugin.convert.traced import CalibratedNetwork
from quartz_plugin.graph import INPUT
from quartz_plugin.layer_config import Granularity
from quartz_plugin.operators.modules import OneToOne
from quartz_plugin.operators.table import ConversionError, weights_of

EXACT_BITS = {torch.float32: 24, torch.float64: 53}
"""Bits of the whole numbers that each type holds without a gap."""


CHANNELS_APART = 16
"""Binary places by which the grid of one channel may be finer than that of another."""

FINEST = 40
"""Binary places behind the point that a grid may have at most."""


def quantize(network: ScaledNetwork, calibrated: CalibratedNetwork) -> ScaledNetwork:
    """Put all weights and biases of a scaled network, whose averages are sums, on their grids.

    Where the network's type could not hold every membrane exactly, what comes out is in float64.

    Parameters
    ----------
    network : ScaledNetwork
        The network; its weights and biases stay as they are.
    calibrated : CalibratedNetwork
        What it was made of. With ``weight_bits`` and ``granularity``: one grid for each layer's weights, or for each
        output channel's. A bias spike has the weight 1, which is on the grid.

    Returns
    -------
    ScaledNetwork
        Of the same graph.

    Raises
    ------
    ConversionError
        If no type could hold a membrane exactly.
    """
    config, weight_bits = calibrated.config, calibrated.config.weight_bits
    assert weight_bits is not None
    # A level of held neurons is one window at most; early spikes encode more.
    early_windows = 1 if config.hold else len(network.layers) + 1
    rounded = {path: _round(module, weight_bits, config.granularity) for path, module in network.modules.items()}
    places = {path: finest for path, (_, finest) in rounded.items()}
    network = replace(network, modules={path: module for path, (module, _) in rounded.items()})
    biases: dict[fx.Node, Tensor | None] = {}
    longest = max([calibrated.windows[INPUT], *(layer.window for layer in network.layers.values())])
    below = _fractional_bits(network, places)
    reach = _largest_currents(network, float(early_windows * longest))
    needed = 0.0
    for node, layer in network.layers.items():
        bits = below[node.all_input_nodes[0]]
        largest, bias = reach[node], layer.bias
        if bias is not None and config.bias == "synapse":
            # S b is what the membrane gets.
            bits += math.ceil(math.log2(layer.input_window))
            bias = torch.round(bias.double() * 2.0**bits).div(2.0**bits)
            largest += float(bias.abs().max()) * early_windows * longest
        else:
            largest += early_windows * longest
        biases[node] = bias
        needed = max(needed, math.log2(max(largest, 1.0) + 2 * layer.window) + max(bits, 1))
    exact = next((one for one in (calibrated.network.dtype, torch.float64) if needed < EXACT_BITS[one]), None)
    if exact is None:
        raise ConversionError(
            f"weight_bits={weight_bits}: a membrane would need {needed:.0f} bits, and float64 holds 53; "
            'give fewer weight_bits, or linear="pair" where many linear maps stand in a row'
        )
    layers = {
        node: replace(layer, bias=None if (bias := biases[node]) is None else bias.to(exact))
        for node, layer in network.layers.items()
    }
    return replace(network, modules={path: each.to(exact) for path, each in network.modules.items()}, layers=layers)


def _round(module: Any, weight_bits: int, granularity: Granularity) -> tuple[nn.Module, int]:
    """A module with its weights on their grids, and how many binary places behind the point the finest of them has."""
    rule = weights_of(module)
    if rule is None and not isinstance(module, OneToOne):
        return module, 0
    weight, weight_type = module.weight.detach().double(), module.weight.dtype
    largest = 2 ** (weight_bits - 1) - 1
    by_channel = granularity == "channel" and rule is not None and rule.output_dim == 0
    magnitude = weight.abs()
    magnitude = magnitude.flatten(1).amax(1).view(-1, *[1] * (weight.dim() - 1)) if by_channel else magnitude.max()
    # A channel without weights needs no grid, and one that is nearly dead none finer than counts in the others.
    places = torch.floor(torch.log2(largest / magnitude)).masked_fill(magnitude == 0, FINEST)
    places = places.clamp(max=min(FINEST, float(places.min()) + CHANNELS_APART))
    rounded = torch.round(weight * 2**places).clamp(-largest, largest) / 2**places
    on_grid = copy.copy(module)
    on_grid._parameters = {**module._parameters, "weight": nn.Parameter(rounded.to(weight_type), requires_grad=False)}
    finest = int(places.max())
    whole = (rounded * 2.0**finest).long()
    # Weights that are all even, as the ones of a sum are, need less.
    lowest_bit = whole[whole != 0].bitwise_and(-whole[whole != 0])
    return on_grid, finest - (int(lowest_bit.min()).bit_length() - 1 if lowest_bit.numel() else finest)


def _fractional_bits(network: ScaledNetwork, places: dict[str, int]) -> dict[fx.Node, int]:
    """Binary places behind the point that the current at each node may have."""
    bits: dict[fx.Node, int] = {}
    for node in network.graph.nodes:
        if node.op == "placeholder" or node in network.layers:
            bits[node] = 0
        else:
            bits[node] = max(bits[source] for source in node.all_input_nodes) + places.get(str(node.target), 0)
    return bits


def _largest_currents(network: ScaledNetwork, level: float) -> dict[fx.Node, float]:
    """For each layer, the most that its synapses could add up to, all inputs at this level."""
    values: dict[fx.Node, Tensor] = {}
    reach: dict[fx.Node, float] = {}
    with torch.no_grad():
        for node in network.graph.nodes:
            if node.op == "placeholder":
                values[node] = torch.full((1, *network.input_shape), level, dtype=torch.float64)
            elif (layer := network.layers.get(node)) is not None:
                reach[node] = float(values[node.all_input_nodes[0]].max())
                values[node] = torch.full((1, *layer.shape), level, dtype=torch.float64)
            elif node.op == "call_module":
                module: Any = copy.deepcopy(network.modules[str(node.target)]).double().cpu()
                for parameter in module.parameters():
                    parameter.abs_()
                values[node] = module(*(values[arg] for arg in node.args))
    return reach
