"""Bias correction: what rounding and clipping take away on average goes into the biases (arXiv:1906.04721)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from quartz_plugin.convert.images import evenly_of
from quartz_plugin.convert.traced import FoldedNetwork, Scales
from quartz_plugin.functional import fake_quantize
from quartz_plugin.graph import INPUT, call_node
from quartz_plugin.operators.table import WEIGHTED, Affine, Role

LAYER_VALUES = 1 << 27
"""Values of the largest layer that are held at once where all images go through one layer after the other."""


def correct_biases(network: FoldedNetwork, scales: Scales, windows: Mapping[str, int], images: Tensor) -> None:
    """Add to every channel's bias what rounding and clipping in front of it take away on average.

    Layer after layer, each with the layers in front of it corrected; by as many images, evenly spread, as
    :data:`LAYER_VALUES` allows.
    """
    largest = max(math.prod(network.shape_at(node)) for node in (network.input, *(node for node, _ in network.steps())))
    images = evenly_of(images, LAYER_VALUES // max(1, largest))
    layers = set(network.layers())
    exact: dict[fx.Node, Any] = {}
    spiking: dict[fx.Node, Any] = {}
    shifts: dict[fx.Node, Tensor] = {}
    nodes = list(network.module.graph.nodes)
    last_use = {source: node for node in nodes for source in node.all_input_nodes}
    with torch.no_grad():
        for node in nodes:
            if node.op == "output":
                break
            if node.op == "placeholder":
                exact[node] = images
                one = images.new_ones(())
                spiking[node] = fake_quantize(images, one, windows[INPUT]) if INPUT in windows else images
                continue
            path = str(node.target)
            if network.role_at(node) is Role.RECTIFIER:
                (source,) = node.all_input_nodes
                shifts[node] = shift = _channel_means(exact[source] - spiking[source])
                exact[node] = call_node(network.module, node, exact)
                drive = spiking[source] + shift
                spiking[node] = fake_quantize(drive, scales.of_layers[path].to(drive), windows[path])
            else:
                exact[node] = call_node(network.module, node, exact)
                spiking[node] = call_node(network.module, node, spiking)
                if node in layers:
                    shifts[node] = _channel_means(exact[node] - spiking[node])
            for source in [source for source in exact if last_use.get(source) is node]:
                del exact[source], spiking[source]
    for node, shift in shifts.items():
        _shift(network, node, shift)
    network.module.recompile()


def _shift(network: FoldedNetwork, node: fx.Node, shift: Tensor) -> None:
    """Add to what a layer's neurons are driven by: in the bias of the layer in front, or in a sum of its own."""
    rectifies = network.role_at(node) is Role.RECTIFIER
    source = node.all_input_nodes[0] if rectifies else node
    before: Any = network.module_at(source) if source.op == "call_module" else None
    # A linear layer's channels are its last dimension: with positions in front, shifts are those of positions.
    fits = isinstance(before, WEIGHTED) and not (isinstance(before, nn.Linear) and shift.dim() > 1)
    if fits and (not rectifies or len(source.users) == 1):
        give_bias(network, before)
        biased: Any = before
        biased.bias.data.add_(shift.flatten())
    elif rectifies:
        correction = Affine(torch.ones_like(shift), shift)
        inserted = network.insert(f"{node.target}_correction", correction, source, network.shape_at(source))
        node.replace_input_with(source, inserted)
        network.log(
            str(inserted.target), operation="bias correction", became="part of the neurons' bias", exact="exact"
        )


def _channel_means(values: Tensor) -> Tensor:
    """Mean of each channel over batch and positions, ``[C, 1, ...]``."""
    others = [dim for dim in range(values.dim()) if dim != 1]
    return values.mean(dim=others, keepdim=True)[0]


def _outputs(layer: Any) -> int:
    return int(layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels)


def give_bias(network: FoldedNetwork, layer: Any) -> None:
    """Let a layer with weights have a bias."""
    if layer.bias is None:
        zeros = torch.zeros(_outputs(layer), dtype=network.dtype, device=network.device)
        layer.bias = nn.Parameter(zeros, requires_grad=False)
