"""Networks between the stages of conversion: traced, folded, calibrated."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn

from quartz_plugin.activation import TTFSActivation
from quartz_plugin.config import ConversionConfig
from quartz_plugin.graph import INPUT, unique_path
from quartz_plugin.graph.walk import Step, Walk, plan_walk
from quartz_plugin.inputs import Input, Inputs
from quartz_plugin.operators.modules import DenseFirstLayer
from quartz_plugin.operators.table import Role, role_of, weights_of
from quartz_plugin.outputs import OUTPUT, Head, Outputs


@dataclass(frozen=True)
class TracedNetwork:
    """A traced network, and the log of what became of each module.

    Attributes
    ----------
    module : fx.GraphModule
        The network; every node between input and output calls a module of its own.
    input_shape : tuple of int
        One input, without the batch.
    dtype, device
        Those the network computes in.
    report : dict
        Module path -> row of the report, in the order of the network; every stage logs into it.
    traced : frozenset of str
        Paths that tracing found; what the later stages insert is not among them.
    outputs : Outputs
        What the network returns, of the value of its last node.
    inputs : Inputs
        The tensors that the network takes.
    unpacked : dict
        Place of an input -> path of the module that gives it; of none that gives the input as it is.
    """

    module: fx.GraphModule
    input_shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    report: dict[str, dict[str, Any]] = field(default_factory=dict)
    traced: frozenset[str] = frozenset()
    outputs: Outputs = field(default_factory=lambda: Outputs((Head(OUTPUT, ()),)))
    inputs: Inputs = field(default_factory=lambda: Inputs((Input(INPUT, ()),)))
    unpacked: Mapping[int, str] = field(default_factory=dict)

    def steps(self) -> list[tuple[fx.Node, nn.Module]]:
        """The nodes between input and output with their modules, in order."""
        return [(node, self.module_at(node)) for node in self.module.graph.nodes if node.op == "call_module"]

    def module_at(self, node: fx.Node) -> nn.Module:
        """Module that this node calls."""
        return self.module.get_submodule(str(node.target))

    def role_at(self, node: fx.Node) -> Role | None:
        """Role of this node's module; None for the input and the output."""
        if node.op != "call_module":
            return None
        return role_of(self.module_at(node), self.shape_at(node.all_input_nodes[0]))

    @property
    def input(self) -> fx.Node:
        """The node that images enter at."""
        (node,) = (node for node in self.module.graph.nodes if node.op == "placeholder")
        assert isinstance(node, fx.Node)
        return node

    @property
    def last(self) -> fx.Node:
        """The node whose value the network returns."""
        (output,) = (node for node in self.module.graph.nodes if node.op == "output")
        (last,) = output.all_input_nodes
        assert isinstance(last, fx.Node)
        return last

    def spikes(self) -> set[fx.Node]:
        """Nodes whose values are spikes: the input's, a rectifier's, and whatever pools or routes only such."""
        spikes: set[fx.Node] = set()
        for node in self.module.graph.nodes:
            role = self.role_at(node)
            passed_on = role in (Role.ROUTE, Role.MAX_POOL) and spikes.issuperset(node.all_input_nodes)
            if node.op == "placeholder" or role is Role.RECTIFIER or passed_on:
                spikes.add(node)
        return spikes

    def layers(self) -> list[fx.Node]:
        """Nodes whose values spiking layers encode: every rectifier, and the network's last node."""
        last = self.last
        return [node for node, _ in self.steps() if self.role_at(node) is Role.RECTIFIER or node is last]

    def log(self, path: str, **entries: Any) -> None:
        """Note what became of a module."""
        self.report.setdefault(path, {"module": path}).update(entries)

    def remove(self, node: fx.Node) -> None:
        """Take a node with one input out of the graph."""
        node.replace_all_uses_with(node.all_input_nodes[0])
        self.module.graph.erase_node(node)
        self.module.delete_submodule(str(node.target))

    def replace(self, node: fx.Node, module: nn.Module) -> None:
        """Let a node call another module."""
        self.module.set_submodule(str(node.target), module)

    def insert(self, wanted: str, module: nn.Module, source: fx.Node, shape: tuple[int, ...]) -> fx.Node:
        """Let a new node call `module` on the value of `source`, right behind it; nobody uses it yet."""
        path = unique_path(wanted, self.names())
        self.module.add_submodule(path, module)
        with self.module.graph.inserting_after(source):
            node = self.module.graph.call_module(path, (source,))
        node.meta["shape"] = shape
        return node

    def rows(self) -> list[dict[str, Any]]:
        """The report in the order of the network: what was inserted stands behind its sources."""
        rows = dict(self.report)
        order = [path for path in rows if path in self.traced]
        for node, _ in self.steps():
            path = str(node.target)
            if path not in self.traced:
                sources = [str(source.target) for source in node.all_input_nodes if source.op != "placeholder"]
                order.insert(max((order.index(source) for source in sources), default=-1) + 1, path)
        return [rows[path] for path in [*order, *(path for path in rows if path not in order)]]

    def names(self) -> set[str]:
        """Paths that are taken."""
        return {name for name, _ in self.module.named_modules()} | {INPUT}

    def shape_at(self, node: fx.Node) -> tuple[int, ...]:
        """Shape of a node's value, without the batch."""
        return self.input_shape if node.op == "placeholder" else node.meta["shape"]

    def run(self, images: Tensor) -> Iterable[tuple[fx.Node, Tensor]]:
        """Yield every node's value on `images`, without gradients, forgetting each after its last use."""
        with torch.no_grad():
            for step, value in Walk(plan_walk(self.module)).each(images):
                if step.role != "at_output":
                    yield step.node, value

    def biases(self) -> dict[fx.Node, Tensor]:
        """``A(0)`` at every layer, float64 of one sample: its value, before the ReLU, when nobody spikes."""
        walk = _Biases(self)
        with torch.no_grad():
            walk.run(None)
        return walk.biases

    def output(self, images: Tensor) -> Tensor:
        """Output of the network on `images`."""
        last = self.last
        (value,) = (value for node, value in self.run(images) if node is last)
        return value


class Shifted(NamedTuple):
    """Neurons that encode signed values in front of max pools.

    Attributes
    ----------
    front : str
        Path of what adds to their drive.
    pools : tuple of str
        Paths of the pools that their spikes enter.
    behind : tuple of str
        Paths of what takes that away again.
    """

    front: str
    pools: tuple[str, ...]
    behind: tuple[str, ...]


@dataclass(frozen=True)
class FoldedNetwork(TracedNetwork):
    """A network of synapses, routing, pools and rectifiers alone.

    Attributes
    ----------
    pairs : dict
        Where a signed value is carried by two layers: path of the positive half -> path of the negative.
    moved : frozenset of str
        Paths of the pools that were moved behind their ReLU.
    shifted : dict
        Path of neurons that encode signed values in front of max pools -> what stands around them.
    input_quantizer, output_quantizer : TTFSActivation or None
        What rounds the input and a signed output, where the network was trained with them.
    """

    pairs: dict[str, str] = field(default_factory=dict)
    moved: frozenset[str] = frozenset()
    shifted: dict[str, Shifted] = field(default_factory=dict)
    input_quantizer: TTFSActivation | None = None
    output_quantizer: TTFSActivation | None = None

    def activation_quantizers(self) -> dict[str, TTFSActivation]:
        """Path of each layer, and "input" -> the activation that it was trained with, where there is one."""
        given = {str(node.target): self.module_at(node) for node in self.layers()}
        found = {path: module for path, module in given.items() if isinstance(module, TTFSActivation)}
        found |= {} if self.input_quantizer is None else {INPUT: self.input_quantizer}
        return found | ({} if self.output_quantizer is None else {str(self.last.target): self.output_quantizer})

    @property
    def signed_output(self) -> bool:
        """True where the output is no rectifier's."""
        return self.role_at(self.last) is not Role.RECTIFIER


@dataclass(frozen=True)
class Scales:
    """Values that 1 stands for, and what is known of them.

    Attributes
    ----------
    of_layers : dict
        Path of each ReLU and of the output -> its scale, float64, 0-dimensional or ``[C, 1, ...]``.
    output_shift : float or Tensor
        What a signed output's value 0 stands for; of a regression one for each output, ``[outputs, 1, ...]``.
    silent : frozenset of str
        Paths of the layers that were 0 on all calibration images.
    shifts : dict
        Path of neurons that encode signed values -> what their value 0 stands for, as `of_layers` has the scales.
    """

    of_layers: dict[str, Tensor]
    output_shift: float | Tensor = 0.0
    silent: frozenset[str] = frozenset()
    shifts: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class CalibratedNetwork:
    """A folded network with all that its spiking network needs to know.

    Attributes
    ----------
    network : FoldedNetwork
        The network.
    scales : Scales
        Of its layers.
    windows : dict
        Path of each ReLU and of the output, and "input" where spikes encode the input -> steps of its window.
    config : ConversionConfig
        The options, without what was left out of them.
    input_scale : Tensor
        What an input's value 1 stands for.
    dense_stem : DenseFirstLayer or None
        The first layer, where it computes on the image itself and is no more part of the network.
    """

    network: FoldedNetwork
    scales: Scales
    windows: dict[str, int]
    config: ConversionConfig
    input_scale: Tensor = field(default_factory=lambda: torch.ones((), dtype=torch.float64))
    dense_stem: DenseFirstLayer | None = None


class _Biases(Walk):
    """Evaluates a network on silence, in float64."""

    def __init__(self, network: TracedNetwork) -> None:
        super().__init__(plan_walk(network.module))
        self.network, self.spikes, self.layers = network, network.spikes(), set(network.layers())
        self.biases: dict[fx.Node, Tensor] = {}

    def at_input(self, step: Step) -> Tensor:
        return self._zeros(step.node)

    def at_synapses(self, step: Step) -> Tensor:
        node = step.node
        if self.network.role_at(node) is Role.RECTIFIER:
            self.biases[node] = self.source(step)[0]
        if node in self.spikes:
            value = self._zeros(node)
        elif (own := self._bias_alone(step)) is not None:
            value = own
        else:
            double = copy.deepcopy(self.network.module_at(node)).double()
            value = super().at_synapses(step._replace(module=double))
        if node in self.layers:
            self.biases.setdefault(node, value[0])
        return value

    def _zeros(self, node: fx.Node) -> Tensor:
        return torch.zeros(1, *self.network.shape_at(node), dtype=torch.float64, device=self.network.device)

    def _bias_alone(self, step: Step) -> Tensor | None:
        """A convolution's or linear layer's value when its inputs are silent, without computing with its weights."""
        module: Any = step.module
        rule = weights_of(module)
        if rule is None or step.sources[0] not in self.spikes:
            return None
        if module.bias is None:
            return self._zeros(step.node)
        value: Tensor = module.bias.detach().double().view(rule.bias_shape(module))
        return value.expand(1, *self.network.shape_at(step.node))
