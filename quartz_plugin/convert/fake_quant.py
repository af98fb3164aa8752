"""Fake quantisation: a network that rounds as its spikes will, to be tuned and trained."""

from __future__ import annotations

import copy
from collections.abc import Container, Mapping
from typing import Any

from torch import Tensor, fx

from quartz_plugin.activation import TTFSActivation
from quartz_plugin.convert.traced import FoldedNetwork, Scales
from quartz_plugin.graph import INPUT, unique_path
from quartz_plugin.graph.walk import Walk, plan_walk
from quartz_plugin.operators.table import Role, ceiling_of

INPUT_QUANTIZER, OUTPUT_QUANTIZER = "input_quantizer", "output_quantizer"
"""Names of the two activations in whose place no ReLU stood."""


def insert_fake_quant(network: FoldedNetwork, scales: Scales, windows: Mapping[str, int]) -> fx.GraphModule:
    """Copy a folded network, the values of its input, its spiking layers and its output rounded.

    The input's are not where the first layer computes on the image itself: it has no window then.

    Parameters
    ----------
    network : FoldedNetwork
        The network.
    scales : Scales
        Of each ReLU and of the output.
    windows : dict
        Path of each ReLU and of the output, and "input" -> steps of its window.
    """
    module = copy.deepcopy(network.module)
    nodes = {node.name: node for node in module.graph.nodes}
    names = network.names()

    def quantizer(window: int, scale: Any, **options: Any) -> TTFSActivation:
        return TTFSActivation(window + 1, scale, **options).to(device=network.device, dtype=network.dtype)

    def insert_behind(node: fx.Node, wanted: str, activation: TTFSActivation) -> None:
        path = unique_path(wanted, names)
        module.add_submodule(path, activation)
        with module.graph.inserting_after(node):
            rounded = module.graph.call_module(path, (node,))
        rounded.meta.update(node.meta)
        node.replace_all_uses_with(rounded, delete_user_cb=lambda user: user is not rounded)

    for original in network.layers():
        path, node = str(original.target), nodes[original.name]
        if network.role_at(original) is Role.RECTIFIER:
            ceiling = ceiling_of(network.module_at(original))
            module.set_submodule(path, quantizer(windows[path], scales.of_layers[path], ceiling=ceiling))
        else:
            insert_behind(
                node,
                OUTPUT_QUANTIZER,
                quantizer(windows[path], scales.of_layers[path], signed=True, shift=scales.output_shift),
            )
    if INPUT in windows:
        insert_behind(nodes[network.input.name], INPUT_QUANTIZER, quantizer(windows[INPUT], 1.0, learned=False))
    module.graph.lint()
    module.recompile()
    return module


def output_path(module: fx.GraphModule) -> str:
    """Path of the module that gives the network's output."""
    (output,) = (node for node in module.graph.nodes if node.op == "output")
    (last,) = output.all_input_nodes
    return str(last.target)


def output_quantizer_of(module: fx.GraphModule) -> TTFSActivation:
    """The activation that the output of a rounded network comes from."""
    quantizer = module.get_submodule(output_path(module))
    assert isinstance(quantizer, TTFSActivation)
    return quantizer


def values_at(module: fx.GraphModule, images: Tensor, paths: Container[str]) -> tuple[dict[str, Tensor], Tensor]:
    """Values of the modules of these paths on `images`, and the network's output."""
    found: dict[str, Tensor] = {}
    value: Any = None
    for step, value in Walk(plan_walk(module)).each(images):
        if str(step.node.target) in paths:
            found[str(step.node.target)] = value
    return found, value


def all_values(module: fx.GraphModule, images: Tensor) -> dict[fx.Node, Any]:
    """Value of every node on `images`."""
    walk = Walk(plan_walk(module, keep=list(module.graph.nodes)))
    walk.run(images)
    return walk.values


def values_behind(module: fx.GraphModule, node: fx.Node, values: Mapping[fx.Node, Any]) -> dict[fx.Node, Any]:
    """Values of all nodes, those behind `node` found anew from the others."""
    nodes = list(module.graph.nodes)
    return Walk(plan_walk(module, keep=nodes, among=nodes[nodes.index(node) + 1 :])).run_from(values)
