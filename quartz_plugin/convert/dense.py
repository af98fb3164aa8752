"""The first layer on the image itself: an option behind calibration, in front of rescale."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx

from quartz_plugin.convert.refine.bias_correction import give_bias
from quartz_plugin.convert.traced import CalibratedNetwork, FoldedNetwork
from quartz_plugin.graph import INPUT
from quartz_plugin.operators.modules import DenseFirstLayer
from quartz_plugin.operators.table import WEIGHTED, Affine, ConversionError, Role, weights_of


def dense_nodes(network: FoldedNetwork) -> list[fx.Node]:
    """Preprocessing, if any, the first linear map and its ReLU.

    Raises
    ------
    ConversionError
        If not one layer with weights, and the ReLU behind it, stand between the image and all the rest.
    """
    if not network.inputs.plain:
        raise ConversionError(
            'first_layer="dense" computes on one input in [0, 1]; give first_layer="spiking" for others'
        )
    found: list[fx.Node] = []
    fronts = {shifted.front for shifted in network.shifted.values()}
    node = network.input
    while len(node.users) == 1:
        (node,) = node.users
        if node.op != "call_module":
            break
        module, weighted = network.module_at(node), [n for n in found if isinstance(network.module_at(n), WEIGHTED)]
        if network.role_at(node) is Role.RECTIFIER and weighted and node is not network.last:
            return [*found, node]
        if weighted and str(node.target) in fronts:
            continue
        if weighted or not isinstance(module, (Affine, *WEIGHTED)):
            break
        found.append(node)
    where = repr(str(node.target)) if node.op == "call_module" else "the output"
    raise ConversionError(
        'first_layer="dense" needs one convolution or linear layer and its ReLU between the image and all the rest, '
        f'and {where} stands in the way; give first_layer="spiking"'
    )


def _start_at(network: FoldedNetwork, layer: Any, path: str, lowest: Tensor) -> None:
    """Let a layer's values start at the lowest one that the neurons of a path encode, which 0 then stands for."""
    rule = weights_of(layer)
    if rule is None or (lowest.numel() > 1 and lowest.shape != rule.bias_shape(layer)):
        raise ConversionError(
            f'first_layer="dense": the channels of {path!r} are no outputs of the first layer; give granularity="layer"'
        )
    give_bias(network, layer)
    layer.bias.data -= lowest.flatten().to(layer.bias)


def compute_first_layer(calibrated: CalibratedNetwork) -> CalibratedNetwork:
    """Take the first layer out of a calibrated network, to compute on the image: its values are the input from then on.

    The input's scale, shape and window are those that the layer had.
    """
    network, windows = calibrated.network, dict(calibrated.windows)
    of_layers, shifts = dict(calibrated.scales.of_layers), dict(calibrated.scales.shifts)
    *before, linear, relu = dense_nodes(network)
    like = torch.zeros((), dtype=network.dtype, device=network.device)
    gain, shift = torch.ones_like(like), like
    for node in before:
        module = network.module_at(node)
        assert isinstance(module, Affine)
        gain, shift = gain * module.weight.detach(), shift * module.weight.detach() + module.bias.detach()
    layer, path = network.module_at(linear), str(relu.target)
    if path in shifts:
        _start_at(network, layer, path, shifts.pop(path))
    scale = of_layers.pop(path)
    windows[INPUT] = windows.pop(path)
    stem = DenseFirstLayer(layer.requires_grad_(False), scale.to(like), network.input_shape, gain, shift)
    shape = network.shape_at(relu)
    network.log(str(linear.target), became="computed on the image itself", exact="exact")
    network.log(path, became="the values that the input's spikes encode", exact="exact", scale=float(scale.max()))
    image = network.input
    relu.replace_all_uses_with(image)
    behind = [node for node in relu.all_input_nodes if node is not linear]
    for node in (relu, *behind, linear, *reversed(before)):
        if str(node.target) not in network.traced:
            network.report.pop(str(node.target), None)
        network.module.graph.erase_node(node)
    network.module.delete_all_unused_submodules()
    network.module.graph.lint()
    network.module.recompile()
    return replace(
        calibrated,
        network=replace(network, input_shape=shape),
        scales=replace(calibrated.scales, of_layers=of_layers, shifts=shifts),
        windows=windows,
        input_scale=scale.double().cpu(),
        dense_stem=stem,
    )


__all__ = ["compute_first_layer", "dense_nodes"]
