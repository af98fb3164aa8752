"""The converted network as a graph, and what its readers share.

A converted network is an ordinary :class:`torch.fx.GraphModule` of synapses (``nn.Conv2d``, ``nn.Linear``,
pooling; none with a bias), routing, :class:`TTFSNeuron`, :class:`FirstSpikeMaxPool` and :class:`AxonalDelay`.
Linear maps may be shared: a chain of synapses is evaluated once for all layers behind it, and a delay may stand
behind synapses, where it delays their currents. Paths meet only where their windows end together.

Engines, exporters, metrics and files all read it through this module and know nothing of how it came about.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Container, Mapping
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, fx

from quartz_plugin.coding import Window, check_unit_interval
from quartz_plugin.config import ConversionConfig, without_notes
from quartz_plugin.graph.digest import Structure, new_number
from quartz_plugin.graph.walk import LevelWalk, Step, Walk, is_spike_source, module_nodes, plan_walk
from quartz_plugin.inputs import Inputs, check_shape
from quartz_plugin.neuron import AxonalDelay, TTFSNeuron
from quartz_plugin.operators.modules import DenseFirstLayer
from quartz_plugin.outputs import OUTPUT, Head, Outputs, task_of
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

    @cached_property
    def _steps(self) -> tuple[Step, ...]:
        return plan_walk(self.module, keep=[self.target], among=self.nodes)

    def __call__(self, spikes: Mapping[fx.Node, Tensor]) -> Tensor:
        """Current that these spikes of the sources cause, all delays past."""
        current: Tensor = LevelWalk(self._steps).run_from(spikes)[self.target]
        return current


@dataclass(frozen=True)
class Layer:
    """One spiking layer as it was when it was found: its name, neurons and synapses.

    All its sources' windows end, behind their delays, at its readout: a spike of level ``n`` arrives ``n`` steps
    before it, whichever source it comes from.
    """

    name: str
    node: fx.Node
    neuron: TTFSNeuron
    module: fx.GraphModule

    @cached_property
    def projection(self) -> Projection:
        """Synapses between the spikes of the layer's sources and its neurons."""
        return projection_to(self.module, self.node)

    def membrane_at_readout(self, levels: Mapping[fx.Node, Tensor]) -> Tensor:
        """Membranes ``S y``, in levels, when the spikes of its sources, which encode `levels`, have arrived.

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
    """A converted network, as everything else reads it.

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
    shifts : dict
        For each layer in front of a max pool that encodes signed values, what the value 0 stands for, as `scales`.
    settings : dict
        The options of ``convert`` that made it (plain JSON values).
    report : list of dict
        A row for each module of the ANN (plain JSON values).
    dense_stem : DenseFirstLayer or None
        What computes the values that the input's spikes encode; None where they encode the image.
    output_shift : float or Tensor
        The ANN's output that the value 0 stands for.
    inputs : Inputs or None
        What the input layer's units encode, where that is not one tensor as it is.
    outputs : Outputs
        What users get of the output layer's values.
    number : int
        Identity as an object: its copies, which may be edited apart from it, have others.
    known_structure : Structure or None
        As it was when it was last looked at; see :func:`~quartz_plugin.graph.fingerprint.structure_of`.
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
    shifts: dict[str, Tensor] = field(default_factory=dict)
    inputs: Inputs | None = None
    outputs: Outputs = field(default_factory=lambda: Outputs((Head(OUTPUT, ()),)))
    number: int = field(default_factory=new_number, repr=False, compare=False)
    known_structure: Structure | None = field(default=None, init=False, repr=False, compare=False)

    def __deepcopy__(self, memo: dict[int, Any]) -> ConvertedGraph:
        copied = [each.name for each in fields(self) if each.name not in ("number", "known_structure")]
        return ConvertedGraph(**copy.deepcopy({name: getattr(self, name) for name in copied}, memo))

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "known_structure": None}

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
        """Meaning of the only output; several are each known by name, and together values to estimate.

        Files of earlier versions, which do not have it, hold classifiers.
        """
        return self.outputs.task(self.settings.get("task", ConversionConfig.task))

    def task_of(self, head: str) -> Task:
        """Meaning of one of the outputs."""
        return task_of(self.settings.get("task", ConversionConfig.task), head)

    def output_values(self, levels: Tensor, window: int) -> Tensor:
        """The ANN's outputs that the output's levels ``[B, ...]`` of a window of so many steps stand for."""
        scale, shift = self.output_scale / window, self.output_shift
        scale, shift = (each.to(levels) if isinstance(each, Tensor) else each for each in (scale, shift))
        return levels * scale + shift

    @property
    def silent(self) -> bool:
        """True where silence encodes zero."""
        return bool(self.settings["rectifier"] == "silent")

    @property
    def hold(self) -> bool:
        """True where no neuron may fire before its readout."""
        return all(layer.neuron.p.hold for layer in self.layers)

    @property
    def layers(self) -> list[Layer]:
        """The spiking layers, each after its sources; the last one is the output. Found anew at each call."""
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
        """Global step at which a spike of value 0 comes from each node: where its window ends.

        Raises
        ------
        ValueError
            Where paths meet whose windows end at different steps, or a layer is not read out when they end: the
            network, edited by hand, lacks a delay.
        """
        return _Arrivals(plan_walk(self.module, keep=list(self.module.graph.nodes))).find(self.input_window.end)

    def check_images(self, images: Any) -> Tensor:
        """Return the images, rounding clamped; ValueError unless ``[B, *image_shape]`` with values in [0, 1].

        Of several or signed inputs, the values of the units that encode them.
        """
        if self.inputs is not None:
            packed: Tensor = self.inputs.pack(images)
            return packed
        checked = check_unit_interval(images, "images")
        check_shape(checked, self.image_shape, "images")
        return checked

    @property
    def image_shape(self) -> tuple[int, ...]:
        """Shape of one image, without the batch; of several inputs that of the units that encode them."""
        if self.inputs is not None and len(self.inputs.parts) == 1:
            return self.inputs.parts[0].shape
        return self.input_shape if self.dense_stem is None else self.dense_stem.image_shape

    def values_to_encode(self, images: Tensor) -> Tensor:
        """Values that the input's spikes encode: those of the images, or of a first layer that computes on them."""
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
        """True where a weight or bias asks for a gradient, and gradients are on."""
        tensors = itertools.chain(self.module.parameters(), self.module.buffers())
        return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)

    @property
    def device(self) -> torch.device:
        """Device of the synapses."""
        return next((p.device for p in self.module.parameters()), torch.device("cpu"))


class _Arrivals(Walk):
    """Finds, for each node, the step at which its window ends; refuses windows that meet and do not end together."""

    def find(self, input_end: int) -> dict[fx.Node, int]:
        """Steps of all nodes, those of the input given."""
        self.run(input_end)
        return self.values

    def at_synapses(self, step: Step) -> int:
        return self._meeting(step)

    def at_pool(self, step: Step) -> int:
        return self._meeting(step)

    def at_output(self, step: Step) -> int:
        return self._meeting(step)

    def at_delay(self, step: Step) -> int:
        assert isinstance(step.module, AxonalDelay)
        return self._meeting(step) + step.module.steps

    def at_neurons(self, step: Step) -> int:
        assert isinstance(step.module, TTFSNeuron)
        self._meeting(step, step.module.clock.readout)
        return step.module.clock.output_window.end

    def _meeting(self, step: Step, readout: int | None = None) -> int:
        """Step at which all windows end that meet at a node; they must end at the readout, if there is one."""
        ends: set[int] = {self.values[source] for source in step.sources}
        if len(ends) != 1 or (readout is not None and ends != {readout}):
            name = step.node.name if step.module is None else step.node.target
            raise ValueError(
                f"at {name!r} windows that end at steps {sorted(ends)} meet"
                + ("" if readout is None else f", and it is read out at {readout}")
                + "; delay the earlier ones (AxonalDelay)"
            )
        return ends.pop()


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
    """Check that every node has one input and one user."""
    return all(
        (node.op == "placeholder" or len(node.args) == 1) and (node.op == "output" or len(node.users) == 1)
        for node in graph.module.graph.nodes
    )


def projection_to(module: fx.GraphModule, neurons: fx.Node) -> Projection:
    """Collect the synapses between the neurons at this node and the spikes that reach them."""
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


def unique_path(wanted: str, taken: Container[str]) -> str:
    """Return `wanted`, or the first of `wanted_2`, `wanted_3`, ... that is free."""
    path, count = wanted, 2
    while path in taken:
        path, count = f"{wanted}_{count}", count + 1
    return path
