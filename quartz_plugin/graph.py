"""The converted network as a graph, and what its readers share.

A converted network is an ordinary :class:`torch.fx.GraphModule` of synapses (``nn.Conv2d``, ``nn.Linear``,
pooling; none with a bias), routing, :class:`TTFSNeuron`, :class:`FirstSpikeMaxPool` and :class:`AxonalDelay`.
Engines, exporters, metrics and files all read it through this module and know nothing of how it came about.
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from quartz_plugin.coding import Window, check_unit_interval
from quartz_plugin.neuron import AxonalDelay, FirstSpikeMaxPool, TTFSNeuron

INPUT = "input"
"""Name of the input encoder among the layers."""


class OneToOne(nn.Module):
    """One synapse per neuron: multiplies by fixed weights, broadcast over the batch.

    Parameters
    ----------
    weight : Tensor
        Broadcastable to one sample's shape.

    Examples
    --------
    >>> OneToOne(torch.tensor([2.0, 3.0]))(torch.ones(1, 2))
    tensor([[2., 3.]])
    """

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.detach().clone(), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """Multiply."""
        return x * self.weight

    def extra_repr(self) -> str:
        """Show the shape."""
        return f"weight={tuple(self.weight.shape)}"


@dataclass(frozen=True)
class Projection:
    """The synapses of one layer: all modules between the spikes of its sources and its neurons.

    Attributes
    ----------
    sources : tuple of fx.Node
        Nodes whose spikes arrive.
    nodes : tuple of fx.Node
        Synapse and routing nodes, in order.
    target : fx.Node
        The node that carries the summed current.
    """

    module: fx.GraphModule
    sources: tuple[fx.Node, ...]
    nodes: tuple[fx.Node, ...]
    target: fx.Node

    def __call__(self, spikes: Mapping[fx.Node, Tensor]) -> Tensor:
        """Current that these spikes of the sources cause."""
        values = dict(spikes)
        for node in self.nodes:
            values[node] = call_node(self.module, node, values)
        return values[self.target]

    def submodules(self) -> Iterator[nn.Module]:
        """Yield the modules the spikes pass, in order."""
        for node in self.nodes:
            yield self.module.get_submodule(str(node.target))


@dataclass(frozen=True)
class Layer:
    """One spiking layer: its name, neurons and synapses."""

    name: str
    node: fx.Node
    neuron: TTFSNeuron
    projection: Projection


@dataclass
class ConvertedGraph:
    """What conversion makes and everything else reads.

    Attributes
    ----------
    module : fx.GraphModule
        The network, to be stepped by hand; its neurons keep their state inside.
    t_max : int
        ``T`` of the input's window.
    input_shape : tuple of int
        Shape of one input, without the batch.
    output_scale : float
        The ANN's logit that the value 1 stands for.
    scales : dict
        For each layer, what the value 1 stands for: a 0-dimensional tensor, or one entry a channel.
    settings : dict
        The options of ``convert`` that made it (plain JSON values).
    report : list of dict
        A row for each module of the ANN (plain JSON values).
    """

    module: fx.GraphModule
    t_max: int
    input_shape: tuple[int, ...]
    output_scale: float
    scales: dict[str, Tensor]
    settings: dict[str, Any]
    report: list[dict[str, Any]] = field(default_factory=list)

    @property
    def input_window(self) -> Window:
        """Window of the input's spikes."""
        return Window.of_input(self.t_max)

    @property
    def silent(self) -> bool:
        """Whether zeros are said by silence."""
        return bool(self.settings["rectifier"] == "silent")

    @property
    def hold(self) -> bool:
        """Whether no neuron may fire before its readout."""
        return all(layer.neuron.p.hold for layer in self.layers)

    @property
    def layers(self) -> list[Layer]:
        """The spiking layers, each after those it listens to; the last one is the output."""
        return [
            Layer(str(node.target), node, module, projection_to(self.module, node))
            for node, module in module_nodes(self.module)
            if isinstance(module, TTFSNeuron)
        ]

    @property
    def n_steps(self) -> int:
        """Global steps an inference takes."""
        return max(layer.neuron.p.last_step for layer in self.layers) + 1

    def windows(self) -> dict[str, Window]:
        """Window of every spiking layer, "input" first."""
        return {
            INPUT: self.input_window,
            **{layer.name: layer.neuron.clock.output_window for layer in self.layers},
        }

    def source_windows(self) -> dict[fx.Node, Window]:
        """Window of every node that emits spikes, as its targets see it (behind its delay)."""
        windows: dict[fx.Node, Window] = {}
        for node in self.module.graph.nodes:
            if node.op == "placeholder":
                windows[node] = self.input_window
            elif is_spike_source(self.module, node):
                windows[node] = self._window_behind(node, windows)
        return windows

    def _window_behind(self, node: fx.Node, windows: dict[fx.Node, Window]) -> Window:
        module = self.module.get_submodule(str(node.target))
        if isinstance(module, TTFSNeuron):
            return module.clock.output_window
        source = node.all_input_nodes[0]
        while source not in windows:
            source = source.all_input_nodes[0]
        return windows[source].delayed(module.steps) if isinstance(module, AxonalDelay) else windows[source]

    def check_images(self, images: Tensor) -> None:
        """Raise ValueError unless `images` are ``[B, *input_shape]`` with values in [0, 1]."""
        check_unit_interval(images, "images")
        if tuple(images.shape[1:]) != self.input_shape or images.dim() != len(self.input_shape) + 1:
            expected = ", ".join(["B", *map(str, self.input_shape)])
            raise ValueError(
                f"images must have the shape the network was converted for, [{expected}], got {list(images.shape)}"
            )

    @property
    def dtype(self) -> torch.dtype:
        """Type the synapses are held in."""
        return next((p.dtype for p in self.module.parameters()), torch.float32)

    @property
    def device(self) -> torch.device:
        """Where the synapses are."""
        return next((p.device for p in self.module.parameters()), torch.device("cpu"))


def check_chain(graph: ConvertedGraph) -> None:
    """Raise ValueError unless every node but input and output calls a module with one input.

    A graph edited by hand may hold functions, which engines run but files and exporters cannot carry.
    """
    for node in graph.module.graph.nodes:
        carried = node.op in ("placeholder", "output") or (node.op == "call_module" and len(node.all_input_nodes) == 1)
        if not carried or (node.op != "output" and len(node.users) != 1):
            raise ValueError(
                f"node {node.name!r} ({node.op} {node.target}) is no module in a chain, so the network cannot be "
                "saved or exported; put what it does into a module"
            )


def module_nodes(module: fx.GraphModule) -> Iterator[tuple[fx.Node, nn.Module]]:
    """Yield the nodes that call modules, with the modules, in order."""
    for node in module.graph.nodes:
        if node.op == "call_module":
            yield node, module.get_submodule(str(node.target))


def is_spike_source(module: fx.GraphModule, node: fx.Node) -> bool:
    """Whether this node emits spikes of its own timing (input, neurons, pools, delays)."""
    if node.op == "placeholder":
        return True
    emits = (TTFSNeuron, FirstSpikeMaxPool, AxonalDelay)
    return node.op == "call_module" and isinstance(module.get_submodule(str(node.target)), emits)


def projection_to(module: fx.GraphModule, neurons: fx.Node) -> Projection:
    """Collect the synapses between the neurons at this node and the spikes they listen to."""
    target = neurons.all_input_nodes[0]
    wanted, pending, sources = set(), [target], set()
    while pending:
        node = pending.pop()
        if is_spike_source(module, node):
            sources.add(node)
        elif node not in wanted:
            wanted.add(node)
            pending.extend(node.all_input_nodes)
    order = list(module.graph.nodes)
    return Projection(
        module,
        tuple(node for node in order if node in sources),
        tuple(node for node in order if node in wanted),
        target,
    )


def expiring_after(module: fx.GraphModule) -> dict[fx.Node, list[fx.Node]]:
    """Node -> the nodes whose values nobody needs once it is evaluated."""
    last_use = {source: node for node in module.graph.nodes for source in node.all_input_nodes}
    expiring: dict[fx.Node, list[fx.Node]] = {}
    for source, user in last_use.items():
        expiring.setdefault(user, []).append(source)
    return expiring


def unique_name(wanted: str, taken: Container[str]) -> str:
    """Return `wanted`, with underscores behind it until it is free."""
    while wanted in taken:
        wanted += "_"
    return wanted


def call_node(module: fx.GraphModule, node: fx.Node, values: Mapping[fx.Node, Any]) -> Any:
    """Evaluate one node on the values of its inputs."""
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda source: values[source])
    if node.op == "call_module":
        return module.get_submodule(str(node.target))(*args, **kwargs)
    if node.op == "call_method":
        return getattr(args[0], str(node.target))(*args[1:], **kwargs)
    if node.op == "call_function":
        return node.target(*args, **kwargs)  # type: ignore[operator]
    raise ValueError(f"cannot evaluate a node of kind {node.op!r}")
