"""A network with what its neurons will say in place of each ReLU: what is tuned, and what is trained."""

from __future__ import annotations

import copy
from collections.abc import Container, Mapping
from typing import Any

from torch import Tensor, fx

from quartz_plugin.activation import TTFSActivation
from quartz_plugin.convert.traced import TracedNetwork
from quartz_plugin.graph import INPUT, unique_path
from quartz_plugin.graph.walk import Walk, plan_walk
from quartz_plugin.operators.table import Role, ceiling_of

INPUT_CODE, OUTPUT_CODE = "input_code", "output_code"
"""Names of the two activations that no ReLU stood for."""


def insert_fake_quant(draft: TracedNetwork, scales: Mapping[str, Tensor], windows: Mapping[str, int]) -> fx.GraphModule:
    """Copy a folded network and let the input, every spiking layer and the output say rounded values.

    The input does not where the first layer computes on the image itself.

    Parameters
    ----------
    draft : TracedNetwork
        The network.
    scales : dict
        Path -> scale of each ReLU and of the output.
    windows : dict
        Path of each ReLU and of the output, and "input" -> steps of its window.
    """
    module = copy.deepcopy(draft.module)
    nodes = {node.name: node for node in module.graph.nodes}
    names = draft.names()

    def code(window: int, scale: Any, **options: Any) -> TTFSActivation:
        return TTFSActivation(window + 1, scale, **options).to(device=draft.device, dtype=draft.dtype)

    def insert_behind(node: fx.Node, wanted: str, activation: TTFSActivation) -> None:
        path = unique_path(wanted, names)
        module.add_submodule(path, activation)
        with module.graph.inserting_after(node):
            said = module.graph.call_module(path, (node,))
        said.meta.update(node.meta)
        node.replace_all_uses_with(said, delete_user_cb=lambda user: user is not said)

    for original in draft.layers():
        path, node = str(original.target), nodes[original.name]
        if draft.role_at(original) is Role.RECTIFIER:
            ceiling = ceiling_of(draft.module_at(original))
            module.set_submodule(path, code(windows[path], scales[path], ceiling=ceiling))
        else:
            insert_behind(node, OUTPUT_CODE, code(windows[path], scales[path], signed=True, shift=draft.output_shift))
    if draft.encodes_image:
        insert_behind(nodes[draft.input.name], INPUT_CODE, code(windows[INPUT], 1.0, learned=False))
    module.graph.lint()
    module.recompile()
    return module


def output_code(module: fx.GraphModule) -> str:
    """Path of the activation that the output of a rounded network comes from."""
    (output,) = (node for node in module.graph.nodes if node.op == "output")
    (last,) = output.all_input_nodes
    return str(last.target)


def values_at(module: fx.GraphModule, images: Tensor, paths: Container[str]) -> tuple[dict[str, Tensor], Tensor]:
    """What the modules of these paths give on `images`, and what the network gives."""
    found: dict[str, Tensor] = {}
    value: Any = None
    for step, value in Walk(plan_walk(module)).each(images):
        if str(step.node.target) in paths:
            found[str(step.node.target)] = value
    return found, value
