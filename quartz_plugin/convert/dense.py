"""The first layer on the image itself: an option behind calibration, in front of rescale."""

from __future__ import annotations

import torch
from torch import Tensor, fx

from quartz_plugin.convert.traced import TracedNetwork
from quartz_plugin.operators.modules import WEIGHTED, DenseFirstLayer
from quartz_plugin.operators.table import Affine, ConversionError, Role


def dense_nodes(draft: TracedNetwork) -> list[fx.Node]:
    """Preprocessing, if any, the first linear map and its ReLU.

    Raises
    ------
    ConversionError
        If not one layer with weights, and the ReLU behind it, stand between the image and all the rest.
    """
    found: list[fx.Node] = []
    node = draft.input
    while len(node.users) == 1:
        (node,) = node.users
        if node.op != "call_module":
            break
        module, weighted = draft.module_at(node), [n for n in found if isinstance(draft.module_at(n), WEIGHTED)]
        if draft.role_at(node) is Role.RECTIFIER and weighted and node is not draft.last:
            return [*found, node]
        if weighted or not isinstance(module, (Affine, *WEIGHTED)):
            break
        found.append(node)
    where = repr(str(node.target)) if node.op == "call_module" else "the output"
    raise ConversionError(
        'first_layer="dense" needs one convolution or linear layer and its ReLU between the image and all the rest, '
        f'and {where} stands in the way; give first_layer="spiking"'
    )


def take_first_layer(
    draft: TracedNetwork, scales: dict[str, Tensor], windows: dict[str, int], name: str
) -> DenseFirstLayer:
    """Take the first layer out of a calibrated network, whose input is from now on what that layer says.

    `scales` and `windows` lose the layer; the window of the input (`name`) is its own.
    """
    *before, linear, relu = dense_nodes(draft)
    like = torch.zeros((), dtype=draft.dtype, device=draft.device)
    gain, shift = torch.ones_like(like), like
    for node in before:
        module = draft.module_at(node)
        assert isinstance(module, Affine)
        gain, shift = gain * module.weight.detach(), shift * module.weight.detach() + module.bias.detach()
    layer, path = draft.module_at(linear), str(relu.target)
    scale = scales.pop(path)
    windows[name] = windows.pop(path)
    front = DenseFirstLayer(layer.requires_grad_(False), scale.to(like), draft.input_shape, gain, shift)
    draft.input_shape, draft.input_scale = draft.shape_at(relu), scale.double().cpu()
    draft.log(str(linear.target), became="computed on the image itself", exact="exact")
    draft.log(path, became="what the input's spikes say", exact="exact", scale=float(scale.max()))
    image = draft.input
    relu.replace_all_uses_with(image)
    for node in (relu, linear, *reversed(before)):
        if str(node.target) not in draft.traced:
            draft.report.pop(str(node.target), None)
        draft.module.graph.erase_node(node)
    draft.module.delete_all_unused_submodules()
    draft.module.graph.lint()
    draft.module.recompile()
    return front


__all__ = ["dense_nodes", "take_first_layer"]
