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
from quartz_plugin.graph import INPUT
from quartz_plugin.graph.walk import Step, Walk, plan_walk
from quartz_plugin.operators.table import Affine, Role, weights_of

LAYER_VALUES = 1 << 27
"""Values of the largest layer that are held at once where all images go through one layer after the other."""


def correct_biases(network: FoldedNetwork, scales: Scales, windows: Mapping[str, int], images: Tensor) -> None:
    """Add to every channel's bias what rounding and clipping in front of it take away on average.

    Layer after layer, each with the layers in front of it corrected; by as many images, evenly spread, as
    :data:`LAYER_VALUES` allows.
    """
    largest = max(math.prod(network.shape_at(node)) for node in (network.input, *(node for node, _ in network.steps())))
    images = evenly_of(images, LAYER_VALUES // max(1, largest))
    walk = _Corrected(network, scales, windows)
    with torch.no_grad():
        walk.run(images)
    for node, shift in walk.shifts.items():
        _shift(network, node, shift)
    network.module.recompile()


class _Corrected(Walk):
    """Finds each layer's shift, where those in front have theirs; values are pairs: exact, and of spikes."""

    def __init__(self, network: FoldedNetwork, scales: Scales, windows: Mapping[str, int]) -> None:
        super().__init__(plan_walk(network.module))
        self.network, self.scales, self.windows = network, scales, windows
        self.layers = set(network.layers())
        self.shifts: dict[fx.Node, Tensor] = {}

    def at_input(self, step: Step) -> tuple[Tensor, Tensor]:
        images = self.input
        if INPUT not in self.windows:
            return images, images
        return images, fake_quantize(images, images.new_ones(()), self.windows[INPUT])

    def at_synapses(self, step: Step) -> tuple[Tensor, Tensor]:
        assert step.module is not None
        assert step.arguments is not None
        if self.network.role_at(step.node) is Role.RECTIFIER:
            return self._rectified(step, step.module)
        exact, spiking = (step.module(*each) for each in zip(*(self.values[n] for n in step.arguments), strict=True))
        if step.node in self.layers:
            self.shifts[step.node] = _channel_means(exact - spiking)
        return exact, spiking

    def _rectified(self, step: Step, rectifier: nn.Module) -> tuple[Tensor, Tensor]:
        path, (exact, spiking) = str(step.node.target), self.source(step)
        self.shifts[step.node] = shift = _channel_means(exact - spiking)
        drive = spiking + shift
        return rectifier(exact), fake_quantize(drive, self.scales.of_layers[path].to(drive), self.windows[path])


def _shift(network: FoldedNetwork, node: fx.Node, shift: Tensor) -> None:
    """Add to what a layer's neurons are driven by: in the bias of the layer in front, or in a sum of its own."""
    rectifies = network.role_at(node) is Role.RECTIFIER
    source = node.all_input_nodes[0] if rectifies else node
    before: Any = network.module_at(source) if source.op == "call_module" else None
    rule = weights_of(before)
    # A linear layer's channels are its last dimension: with positions in front, shifts are those of positions.
    if rule is not None and shift.shape == rule.bias_shape(before) and (not rectifies or len(source.users) == 1):
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


def give_bias(network: FoldedNetwork, layer: Any) -> None:
    """Let a layer with weights have a bias."""
    rule = weights_of(layer)
    if rule is not None and layer.bias is None:
        zeros = torch.zeros(rule.bias_shape(layer)[0], dtype=network.dtype, device=network.device)
        layer.bias = nn.Parameter(zeros, requires_grad=False)
