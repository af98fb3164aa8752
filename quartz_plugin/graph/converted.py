"""The converted network as a graph, and what its readers share.

A converted network is an ordinary :class:`torch.fx.GraphModule` of synapses (``nn.Conv2d``, ``nn.Linear``,
pooling; none with a bias), routing, :class:`TTFSNeuron`, :class:`FirstSpikeMaxPool` and :class:`AxonalDelay`.
Linear maps may be shared: a chain of synapses is evaluated once for all layers that listen to it, and a delay
may stand behind synapses, where it delays their currents. Paths meet only where their windows end together.

Engines, exporters, metrics and files all read it through this module and know nothing of how it came about.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Container, Iterator, Mapping
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, fx, nn

from quartz_plugin.coding import Window, check_unit_interval
from quartz_plugin.config import ConversionConfig, without_notes
from quartz_plugin.graph.fingerprint import new_number
from quartz_plugin.neuron import AxonalDelay, FirstSpikeMaxPool, TTFSNeuron
from quartz_plugin.operators.modules import DenseFirstLayer
from quartz_plugin.task import Task

INPUT = "input"
"""Name of the input encoder among the layers."""


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
        """Current that these spikes of the sources cause, all delays past."""
        values = dict(spikes)
        for node in self.nodes:
            values[node] = propagate_levels(self.module, node, values)
        return values[self.target]


@dataclass(frozen=True)
class Layer:
    """One spiking layer: its name, neurons and synapses.

    All its sources' windows end, behind their delays, at its readout: a spike of level ``n`` arrives ``n`` steps
    before it, whichever source it comes from.
    """

    name: str
    node: fx.Node
    neuron: TTFSNeuron
    module: fx.GraphModule

    @cached_property
    def projection(self) -> Projection:
        """Synapses between the layer's neurons and the spikes they listen to."""
        return projection_to(self.module, self.node)

    def membrane_at_readout(self, levels: Mapping[fx.Node, Tensor]) -> Tensor:
        """Membranes ``S y``, in levels, when the spikes of its sources, which say `levels`, have arrived.

        A bias spike that comes after the readout counts as if it had come: it takes as much from the climb.
        """
        return self.with_bias(self.projection(levels))

    def with_bias(self, current: Tensor) -> Tensor:
        """Add what the bias gives to the membrane up to readout."""
        p, clock = self.neuron.p, self.neuron.clock
        if p.bias is None:
            return current
        if p.bias_code == "spike":
            return current + (clock.readout - clock.bias_spike_steps(p.bias)).to(current)
        return current + clock.input_window * p.bias


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
        Shape of the input's spikes, without the batch.
    output_scale : float or Tensor
        How much of the ANN's output the value 1 stands for; of a regression one for each output, ``[outputs, 1, ...]``.
    scales : dict
        For each layer, what the value 1 stands for: a 0-dimensional tensor, or one entry a channel.
    settings : dict
        The options of ``convert`` that made it (plain JSON values).
    report : list of dict
        A row for each module of the ANN (plain JSON values).
    dense_stem : DenseFirstLayer or None
        What computes the values that the input's spikes say; None where they say the image.
    output_shift : float or Tensor
        The ANN's output that the value 0 stands for.
    number : int
        Tells it, as an object, from its copies, which may be edited apart from it.
    """

    module: fx.GraphModule
    t_max: int
    input_shape: tuple[int, ...]
    output_scale: float | Tensor
    scales: dict[str, Tensor]
    settings: dict[str, Any]
    report: list[dict[str, Any]] = field(default_factory=list)
    dense_stem: DenseFirstLayer | None = None
    output_shift: float | Tensor = 0.0
    number: int = field(default_factory=new_number, repr=False, compare=False)

    def __deepcopy__(self, memo: dict[int, Any]) -> ConvertedGraph:
        own = {each.name: getattr(self, each.name) for each in fields(self) if each.name != "number"}
        return ConvertedGraph(**copy.deepcopy(own, memo))

    @property
    def input_window(self) -> Window:
        """Window of the input's spikes."""
        return Window.of_input(self.t_max)

    @property
    def config(self) -> ConversionConfig:
        """The options in `settings`, which may hold notes beside them; those that earlier versions lacked by default.

        Raises
        ------
        ValueError, TypeError
            If one cannot be, as after an edit.
        """
        return ConversionConfig.from_dict(without_notes(self.settings))

    @property
    def task(self) -> Task:
        """What the output means; files of earlier versions, which do not have it, hold classifiers."""
        task: Task = self.settings.get("task", ConversionConfig.task)
        return task

    def output_values(self, levels: Tensor, window: int) -> Tensor:
        """The ANN's outputs that the output's levels ``[B, ...]`` of a window of so many steps stand for."""
        scale, shift = self.output_scale / window, self.output_shift
        scale, shift = (each.to(levels) if isinstance(each, Tensor) else each for each in (scale, shift))
        return levels * scale + shift

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
            Layer(str(node.target), node, module, self.module)
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

    def arrivals(self) -> dict[fx.Node, int]:
        """Global step at which each node says 0: where its window ends.

        Raises
        ------
        ValueError
            Where paths meet whose windows end at different steps, or a layer is not read out when they end: the
            network, edited by hand, lacks a delay.
        """
        ends: dict[fx.Node, int] = {}
        for node in self.module.graph.nodes:
            if node.op == "placeholder":
                ends[node] = self.input_window.end
                continue
            module = called_by(self.module, node)
            sources = {ends[source] for source in node.all_input_nodes}
            expected = {module.clock.readout} if isinstance(module, TTFSNeuron) else sources
            if len(sources) != 1 or sources != expected:
                name = node.target if module is not None else node.name
                raise ValueError(
                    f"at {name!r} windows that end at steps {sorted(sources)} meet"
                    + (f", and it is read out at {expected.pop()}" if isinstance(module, TTFSNeuron) else "")
                    + "; delay the earlier ones (AxonalDelay)"
                )
            (ends[node],) = sources
            if isinstance(module, TTFSNeuron):
                ends[node] = module.clock.output_window.end
            elif isinstance(module, AxonalDelay):
                ends[node] += module.steps
        return ends

    def check_images(self, images: Tensor) -> Tensor:
        """Return the images, rounding clamped; ValueError unless ``[B, *image_shape]`` with values in [0, 1]."""
        images = check_unit_interval(images, "images")
        if tuple(images.shape[1:]) != self.image_shape or images.dim() != len(self.image_shape) + 1:
            expected = ", ".join(["B", *map(str, self.image_shape)])
            raise ValueError(
                f"images must have the shape the network was converted for, [{expected}], got {list(images.shape)}"
            )
        return images

    @property
    def image_shape(self) -> tuple[int, ...]:
        """Shape of one image, without the batch."""
        return self.input_shape if self.dense_stem is None else self.dense_stem.image_shape

    def values_to_encode(self, images: Tensor) -> Tensor:
        """What the input's spikes say of images: their values, or those of a first layer that computes on them."""
        images = images.to(device=self.device, dtype=self.dtype)
        if self.dense_stem is None:
            return images
        values: Tensor = self.dense_stem(images)
        return values

    @property
    def dtype(self) -> torch.dtype:
        """Type the synapses are held in."""
        return next((p.dtype for p in self.module.parameters()), torch.float32)

    @property
    def wants_gradient(self) -> bool:
        """Whether a weight or bias asks for a gradient, and gradients are on."""
        tensors = itertools.chain(self.module.parameters(), self.module.buffers())
        return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)

    @property
    def device(self) -> torch.device:
        """Where the synapses are."""
        return next((p.device for p in self.module.parameters()), torch.device("cpu"))


def check_modules(graph: ConvertedGraph) -> None:
    """Raise ValueError unless every node but input and output calls a module of its own on values alone.

    A graph edited by hand may hold functions, which engines run but files and exporters cannot carry.
    """
    for node in graph.module.graph.nodes:
        carried = node.op == "call_module" and all(isinstance(arg, fx.Node) for arg in node.args) and not node.kwargs
        if not carried and node.op not in ("placeholder", "output"):
            raise ValueError(
                f"node {node.name!r} ({node.op} {node.target}) is no call of a module, so the network cannot be "
                "saved or exported; put what it does into a module"
            )


def is_chain(graph: ConvertedGraph) -> bool:
    """Whether every node has one input and one user."""
    return all(
        (node.op == "placeholder" or len(node.args) == 1) and (node.op == "output" or len(node.users) == 1)
        for node in graph.module.graph.nodes
    )


def module_nodes(module: fx.GraphModule) -> Iterator[tuple[fx.Node, nn.Module]]:
    """Yield the nodes that call modules, with the modules, in order."""
    for node in module.graph.nodes:
        if node.op == "call_module":
            yield node, module.get_submodule(str(node.target))


def called_by(module: fx.GraphModule, node: fx.Node) -> nn.Module | None:
    """Module that this node calls; None where it calls none, as input and output."""
    return module.get_submodule(str(node.target)) if node.op == "call_module" else None


def is_spike_source(module: fx.GraphModule, node: fx.Node) -> bool:
    """Whether this node emits spikes: the input, neurons, or first-spike pools."""
    if node.op == "placeholder":
        return True
    return isinstance(called_by(module, node), TTFSNeuron | FirstSpikeMaxPool)


def projection_to(module: fx.GraphModule, neurons: fx.Node) -> Projection:
    """Collect the synapses between the neurons at this node and the spikes they listen to."""
    target = neurons.all_input_nodes[0]
    sources, between = _spikes_behind(module, target)
    order = list(module.graph.nodes)
    return Projection(
        module,
        tuple(node for node in order if node in sources),
        tuple(node for node in order if node in between),
        target,
    )


def spike_sources(module: fx.GraphModule, node: fx.Node) -> list[fx.Node]:
    """Nodes whose spikes reach this one without neurons or pools between; itself alone if it emits any."""
    return list(_spikes_behind(module, node)[0])


def _spikes_behind(module: fx.GraphModule, node: fx.Node) -> tuple[dict[fx.Node, None], dict[fx.Node, None]]:
    """Nodes that emit the spikes which reach this one, and the nodes they pass, itself included."""
    between: dict[fx.Node, None] = {}
    sources: dict[fx.Node, None] = {}
    pending = [node]
    while pending:
        each = pending.pop()
        if is_spike_source(module, each):
            sources[each] = None
        elif each not in between:
            between[each] = None
            pending.extend(reversed(each.all_input_nodes))
    return sources, between


def evaluated(node: fx.Node, values: dict[fx.Node, Tensor], evaluate: Callable[[fx.Node], Tensor]) -> Tensor:
    """Value of a node; those that it needs and `values` lacks are evaluated before it, and kept there.

    Networks may be deep, so nothing here recurs.
    """
    pending = [node]
    while pending:
        each = pending[-1]
        missing = [] if each in values else [source for source in each.all_input_nodes if source not in values]
        if missing:
            pending += missing
            continue
        pending.pop()
        if each not in values:
            values[each] = evaluate(each)
    return values[node]


def expiring_after(module: fx.GraphModule) -> dict[fx.Node, list[fx.Node]]:
    """Node -> the nodes whose values nobody needs once it is evaluated."""
    last_use = {source: node for node in module.graph.nodes for source in node.all_input_nodes}
    expiring: dict[fx.Node, list[fx.Node]] = {}
    for source, user in last_use.items():
        expiring.setdefault(user, []).append(source)
    return expiring


def unique_path(wanted: str, taken: Container[str]) -> str:
    """Return `wanted`, or the first of `wanted_2`, `wanted_3`, ... that is free."""
    path, count = wanted, 2
    while path in taken:
        path, count = f"{wanted}_{count}", count + 1
    return path


def propagate_levels(module: fx.GraphModule, node: fx.Node, values: Mapping[fx.Node, Any]) -> Any:
    """Evaluate one node between two layers, where levels count back from the readout and a delay changes nothing."""
    if isinstance(called_by(module, node), AxonalDelay):
        return values[node.all_input_nodes[0]]
    return call_node(module, node, values)


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
