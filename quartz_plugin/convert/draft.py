"""The network between the stages of conversion."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from quartz_plugin.graph import INPUT, call_node, expiring_after


@dataclass
class Draft:
    """A traced network on its way, and the log of what became of each module.

    Attributes
    ----------
    module : fx.GraphModule
        The network so far; every node calls a module of its own.
    input_shape : tuple of int
        One input, without the batch.
    dtype, device
        Those the network computes in.
    report : dict
        Module path -> row of the report, in the order of the network.
    """

    module: fx.GraphModule
    input_shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    report: dict[str, dict[str, Any]] = field(default_factory=dict)

    def steps(self) -> list[tuple[fx.Node, nn.Module]]:
        """The nodes between input and output with their modules, in order."""
        return [
            (node, self.module.get_submodule(str(node.target)))
            for node in self.module.graph.nodes
            if node.op == "call_module"
        ]

    def log(self, path: str, **entries: Any) -> None:
        """Note what became of a module."""
        self.report.setdefault(path, {"module": path}).update(entries)

    def remove(self, node: fx.Node) -> None:
        """Take a node with one input out of the graph."""
        node.replace_all_uses_with(node.all_input_nodes[0])
        self.module.graph.erase_node(node)

    def replace(self, node: fx.Node, module: nn.Module) -> None:
        """Let a node call another module."""
        self.module.set_submodule(str(node.target), module)

    def names(self) -> set[str]:
        """Paths that are taken."""
        return {str(node.target) for node, _ in self.steps()} | {INPUT}

    def run(self, images: Tensor) -> Iterable[tuple[fx.Node, Tensor]]:
        """Yield every node's value on `images`, without gradients, forgetting each after its last use."""
        expiring = expiring_after(self.module)
        values: dict[fx.Node, Any] = {}
        with torch.no_grad():
            for node in self.module.graph.nodes:
                if node.op == "output":
                    return
                values[node] = images if node.op == "placeholder" else call_node(self.module, node, values)
                yield node, values[node]
                for source in expiring.get(node, ()):
                    del values[source]

    def output(self, images: Tensor) -> Tensor:
        """What the network gives on `images`."""
        (last,) = deque(self.run(images), maxlen=1)
        return last[1]

    def record_shapes(self, example: Tensor) -> None:
        """Note each node's output shape, without the batch, as ``node.meta["shape"]``."""
        for node, value in self.run(example):
            node.meta["shape"] = tuple(value.shape[1:])
