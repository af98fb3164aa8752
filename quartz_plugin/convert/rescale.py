r"""Stage 5, rescale: synapses between levels, and the bias of every neuron.

Between the spikes stands an affine map ``A`` (one or more modules, shared where it leads to several layers).
Neurons get the bias ``A(0) / s_out``, a map over positions where padding or preprocessing makes it one; the
synapses get ``A``'s linear part, times ``s_in / s_out`` and ``S_out / S_in``, put into the weights that are there.

Each value on the way carries a *gain*: what it stands for in the ANN, for each unit of what is computed. A
spike's level stands for ``s / S``; a gain passes through all that is linear and acts on units one by one, and
is put into weights where values are mixed, added, or arrive at neurons.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from quartz_plugin.convert.traced import CalibratedNetwork
from quartz_plugin.graph import INPUT, unique_path
from quartz_plugin.operators.borders import as_silent
from quartz_plugin.operators.gains import AsSum, Gain, IntoGain, IntoWeights, Mixed, Moved, Summed, compressed
from quartz_plugin.operators.modules import OneToOne, with_weight
from quartz_plugin.operators.table import ConversionError, Role, row_of_class, weights_of

ONE = torch.ones((), dtype=torch.float64)


@dataclass
class ScaledLayer:
    """One spiking layer to be emitted.

    Attributes
    ----------
    name : str
        Path of its ReLU in the ANN, or "output".
    bias : Tensor or None
        Bias of its neurons, broadcastable to one sample; None where it is 0.
    scale : Tensor
        What its value 1 stands for in the ANN.
    rectified : bool
        Whether a ReLU follows; False for a signed output.
    shape : tuple of int
        Shape of its neurons, without the batch.
    window, input_window : int
        Steps of its own window, and of the longest one among its sources.
    """

    name: str
    bias: Tensor | None
    scale: Tensor
    rectified: bool
    shape: tuple[int, ...]
    window: int
    input_window: int


@dataclass
class ScaledNetwork:
    """Scaled synapses, pools and routing, and where in their graph the neurons stand.

    Attributes
    ----------
    graph : fx.Graph
        Calls `modules` by their paths, and the layers by their names.
    modules : dict
        Path -> module, none with a bias. The folded network keeps its own.
    layers : dict
        Node -> the spiking layer to be put there, in order; the output last.
    input_shape : tuple of int
        One input, without the batch.
    """

    graph: fx.Graph
    modules: dict[str, nn.Module]
    layers: dict[fx.Node, ScaledLayer]
    input_shape: tuple[int, ...] = ()


def rescale(calibrated: CalibratedNetwork) -> ScaledNetwork:
    """Scale the synapses between the spiking layers of a calibrated network.

    With ``weight_bits`` averages add up, and what they divide by goes into the weights that follow, as on a chip.

    Raises
    ------
    ConversionError
        If spikes of different scales are pooled together, or an average is no sum in windows of one size.
    """
    return _Rescaling(calibrated).run()


class _Rescaling:
    """Walks the folded network once; `gains` and `nodes` are those of what is emitted for each of its nodes."""

    def __init__(self, calibrated: CalibratedNetwork) -> None:
        folded, scales, windows = calibrated.network, calibrated.scales.of_layers, calibrated.windows
        self.folded, self.average_by_sums = folded, calibrated.config.weight_bits is not None
        self.output_shift, self.input_window = calibrated.scales.output_shift, windows[INPUT]
        self.input_gain = compressed(calibrated.input_scale / self.input_window)
        self.names = folded.names()
        self.network = ScaledNetwork(fx.Graph(), {}, {}, folded.input_shape)
        self.scales = {node: scales[str(node.target)].double().cpu() for node in folded.layers()}
        self.windows = {node: windows[str(node.target)] for node in folded.layers()}
        self.quanta = {node: scale / self.windows[node] for node, scale in self.scales.items()}
        self.wanted = self._wanted_gains()
        self.biases = folded.biases()
        self.nodes: dict[fx.Node, fx.Node] = {}
        self.gains: dict[fx.Node, Tensor] = {}
        self.longest: dict[fx.Node, int] = {}

    def run(self) -> ScaledNetwork:
        """Emit every node of the folded network, and return what became of them."""
        for node in self.folded.module.graph.nodes:
            if node.op == "placeholder":
                self.nodes[node] = self.network.graph.placeholder(INPUT)
                self.gains[node], self.longest[node] = self.input_gain, self.input_window
            elif node.op == "call_module":
                self.longest[node] = max(self.longest[source] for source in node.all_input_nodes)
                self._visit(node, self.folded.module_at(node), self.folded.role_at(node))
        last = self.folded.last
        if self.folded.role_at(last) is not Role.RECTIFIER:
            self._place_neurons(last, last, unique_path("output", self.names), rectified=False)
        self.network.graph.output(self.nodes[last])
        return self.network

    def _visit(self, node: fx.Node, module: nn.Module, role: Role | None) -> None:
        sources = [arg for arg in node.args if isinstance(arg, fx.Node)]
        if role is Role.RECTIFIER:
            self._place_neurons(node, sources[0], str(node.target), rectified=True)
            return
        match self._rule(node):
            case IntoGain() as rule:
                self.nodes[node] = self.nodes[sources[0]]
                self.gains[node] = compressed(self.gains[sources[0]] * rule.weight(module).double().cpu())
            case IntoWeights() as rule:
                self._visit_weighted(node, module, sources[0], rule)
            case Summed():
                self._visit_sum(node, module, sources)
            case Mixed() as rule:
                self._visit_mixed(node, module, sources[0], rule)
            case Moved() as rule:
                self._call(node, as_silent(copy.deepcopy(module)), [self.nodes[source] for source in sources])
                self.gains[node] = self._moved(module, sources, rule)

    def _rule(self, node: fx.Node) -> Gain:
        """The way a gain passes through the module at a node; one that merely moves spikes here keeps them."""
        rule = row_of_class(type(self.folded.module_at(node))).gain
        if self.folded.role_at(node) is Role.ROUTE and not isinstance(rule, Moved):
            return Moved()
        assert rule is not None
        return rule

    def _call(self, node: fx.Node, module: nn.Module, sources: list[fx.Node]) -> None:
        self.network.modules[str(node.target)] = module
        self.nodes[node] = self.network.graph.call_module(str(node.target), tuple(sources))

    def _visit_mixed(self, node: fx.Node, module: nn.Module, source: fx.Node, rule: Mixed) -> None:
        gain, drive = self.gains[source], self.nodes[source]
        if not rule.are_alike(module, gain):
            if self.folded.role_at(node) is Role.MAX_POOL:
                raise ConversionError(
                    f"cannot convert {node.target!r} ({type(module).__name__}): it pools units of different "
                    'scales; pool them before they are joined, or use granularity="layer" where it pools channels'
                )
            drive, gain = self._weighed(source, gain, str(node.target)), ONE
        if not self._adds_up(rule):
            self._call(node, copy.deepcopy(module), [drive])
            self.gains[node] = rule.behind(module, gain)
            return
        before, added, behind = self._as_sum(node, module, rule)
        if before:
            drive = self._insert(f"{node.target}_ordered", before, drive)
        self._call(node, added.to(self.folded.device, self.folded.dtype), [drive])
        if behind:
            self.nodes[node] = self._insert(f"{node.target}_squeezed", behind, self.nodes[node])
        self.gains[node] = compressed(rule.behind(module, gain) * self._share(node, module, rule))

    def _adds_up(self, rule: Mixed) -> bool:
        return self.average_by_sums and rule.as_sum is not None

    def _as_sum(self, node: fx.Node, module: nn.Module, rule: Mixed) -> AsSum:
        """A module that adds up where a module averages, and the routing before and behind it."""
        assert rule.as_sum is not None
        shape = self.folded.shape_at(node.all_input_nodes[0])
        found = rule.as_sum(module, shape, self.folded.shape_at(node))
        if found is None:
            raise ConversionError(
                f"cannot convert {str(node.target)!r} ({type(module).__name__}) with weight_bits: no fixed weights add "
                "up what it averages over windows of several sizes, or interpolates; pool to a size that divides its "
                'input\'s or without ceil_mode, or upsample with mode="nearest"'
            )
        return found

    def _share(self, node: fx.Node, module: nn.Module, rule: Mixed) -> Tensor:
        """The factor that makes an average of a sum in each window; 1 where averages are averages."""
        if not self._adds_up(rule):
            return ONE
        shape = self.folded.shape_at(node.all_input_nodes[0])
        ones = torch.ones(1, *shape, dtype=torch.float64)
        before, added, behind = self._as_sum(node, module, rule)
        summed = nn.Sequential(*before, added.double(), *behind)(ones)
        average = module(ones)
        # A window in padding alone adds up nothing.
        return compressed((average / summed.reshape(average.shape)).nan_to_num(1.0)[0])

    def _insert(self, name: str, modules: list[nn.Module], source: fx.Node) -> fx.Node:
        """Let modules of no node of the folded network's follow `source`."""
        for module in modules:
            path = unique_path(name, self.names)
            self.names.add(path)
            self.network.modules[path] = module
            source = self.network.graph.call_module(path, (source,))
        return source

    def _weighed(self, source: fx.Node, weight: Tensor, name: str) -> fx.Node:
        """The node emitted for `source`, times a weight; behind one synapse a unit, unless the weight is 1."""
        if bool((weight == 1).all()):
            return self.nodes[source]
        like = torch.zeros((), dtype=self.folded.dtype, device=self.folded.device)
        return self._insert(f"{name}_gain", [OneToOne(weight.to(like))], self.nodes[source])

    def _place_neurons(self, node: fx.Node, source: fx.Node, name: str, rectified: bool) -> None:
        scale, window = self.scales[node], self.windows[node]
        drive = self._weighed(source, self.gains[source] / self.quanta[node], name)
        self.nodes[node] = self.network.graph.call_module(name, (drive,))
        self.gains[node] = self.quanta[node]
        input_window, self.longest[node] = self.longest[node], window
        self.network.layers[self.nodes[node]] = ScaledLayer(
            name=name,
            bias=self._bias(node, scale, window / input_window),
            scale=scale,
            rectified=rectified,
            shape=self.folded.shape_at(node),
            window=window,
            input_window=input_window,
        )

    def _bias(self, node: fx.Node, scale: Tensor, ratio: float) -> Tensor | None:
        """``A(0) / s_out``, as small a tensor as holds it; an output's lacks its shift."""
        shift = 0.0 if self.folded.role_at(node) is Role.RECTIFIER else self.output_shift
        shift = shift.to(self.folded.device) if isinstance(shift, Tensor) else shift
        bias = ((self.biases[node] - shift) * (ratio / scale.to(self.folded.device))).to(self.folded.dtype)
        if not bool(bias.any()):
            return None
        spatial = tuple(range(1, bias.dim()))
        if spatial and bool((bias == bias.amax(dim=spatial, keepdim=True)).all()):
            bias = bias.amax(dim=spatial, keepdim=True)
        return bias

    def _visit_weighted(self, node: fx.Node, module: Any, source: fx.Node, rule: IntoWeights) -> None:
        gain, shape = self.gains[source], self.folded.shape_at(source)
        drive, of_inputs = self.nodes[source], rule.of_inputs(module, gain, shape)
        if of_inputs is None:
            drive, of_inputs = self._weighed(source, gain, str(node.target)), ONE
        wanted = self.wanted[node]
        out_gain = wanted if wanted is not None and rule.along_outputs(module, wanted) else ONE
        weight = rule.scaled(module, of_inputs, 1 / out_gain)
        emitted = with_weight(module, weight.to(module.weight.dtype))
        emitted._parameters["bias"] = None
        self._call(node, emitted, [drive])
        self.gains[node] = out_gain

    def _visit_sum(self, node: fx.Node, module: nn.Module, sources: list[fx.Node]) -> None:
        gains = [self.gains[source] for source in sources]
        wanted = self.wanted[node]
        if wanted is None:
            wanted = gains[0] if _alike_but_for_signs(gains) and bool((gains[0] != 0).all()) else ONE
        weighed = [
            self._weighed(source, gain / wanted, str(node.target)) for source, gain in zip(sources, gains, strict=True)
        ]
        self._call(node, copy.deepcopy(module), weighed)
        self.gains[node] = wanted

    def _moved(self, module: nn.Module, sources: list[fx.Node], rule: Moved) -> Tensor:
        """Carry the sources' gains through routing; of size 1 along dimensions in which one is alike."""
        gains = [self.gains[source] for source in sources]
        if all(gain.dim() == 0 and bool(gain == gains[0]) for gain in gains):
            return gains[0]
        full = [
            gain.expand(self.folded.shape_at(source)).unsqueeze(0) for gain, source in zip(gains, sources, strict=True)
        ]
        return compressed(rule.behind(module, full)[0])

    def _wanted_gains(self) -> dict[fx.Node, Tensor | None]:
        """Gain that would save a value its own weights on the way to its only target layer."""
        wanted: dict[fx.Node, Tensor | None] = {}
        for node in reversed(self.folded.module.graph.nodes):
            gains = [self._wanted_by(user, node, wanted) for user in node.users]
            wanted[node] = gains[0] if len(gains) == 1 or _proportional(gains) or _alike_but_for_signs(gains) else None
        return wanted

    def _wanted_by(self, user: fx.Node, node: fx.Node, wanted: dict[fx.Node, Tensor | None]) -> Tensor | None:
        if user.op == "output":
            return self.quanta.get(node)
        module = self.folded.module_at(user)
        if self.folded.role_at(user) is Role.RECTIFIER:
            return self.quanta[user]
        gain, rule = wanted[user], self._rule(user)
        if gain is None or isinstance(rule, IntoWeights):
            return None
        if isinstance(rule, IntoGain):
            weight = rule.weight(module).double().cpu()
            return compressed(gain / weight) if bool((weight != 0).all()) else None
        if isinstance(rule, Summed) or (gain.dim() == 0 and not (isinstance(rule, Mixed) and self._adds_up(rule))):
            return gain
        if isinstance(rule, Mixed):
            return self._wanted_before(user, module, gain, rule)
        if rule.before is None:
            return _routed_back(gain, module, self.folded.shape_at(node), self.folded.shape_at(user))
        if list(user.args).count(node) != 1:
            return None
        sizes = [self.folded.shape_at(source) for source in user.args if isinstance(source, fx.Node)]
        return rule.before(module, gain, list(user.args).index(node), sizes)

    def _wanted_before(self, node: fx.Node, module: nn.Module, gain: Tensor, rule: Mixed) -> Tensor | None:
        before = rule.before(module, gain)
        if before is None:
            return None
        share = self._share(node, module, rule)
        return before / share if share.dim() == 0 else None


def _routed_back(gain: Tensor, module: nn.Module, before: tuple[int, ...], behind: tuple[int, ...]) -> Tensor | None:
    """Gain in front of routing that becomes `gain` behind it; None where units are left out or doubled."""
    places = module(torch.arange(math.prod(before), dtype=torch.float64).view(1, *before))[0].flatten().long()
    if len(places) != math.prod(before) or len(places.unique()) != len(places):
        return None
    routed = torch.empty(len(places), dtype=torch.float64)
    routed[places] = gain.expand(behind).flatten()
    return compressed(routed.view(before))


def _alike_but_for_signs(gains: Sequence[Tensor | None]) -> bool:
    """Check whether one of several gains serves all, but for a sign each."""
    first = gains[0] if gains else None
    if first is None:
        return False
    return all(
        each is not None and each.shape == first.shape and (torch.equal(each, first) or torch.equal(each, -first))
        for each in gains
    )


def _proportional(gains: list[Tensor | None]) -> bool:
    """Check whether one of several gains by channel serves all, but for one number each."""
    first = gains[0] if gains else None
    if first is None or first.dim() == 0:
        return False
    return all(gain is not None and compressed(gain / first).dim() == 0 for gain in gains)


def along_outputs(module: nn.Module, gain: Tensor) -> bool:
    """Check whether a gain on the outputs of a layer is one number for each row of its weights."""
    return _weights_of(module).along_outputs(module, gain)


def scaled_weight(module: nn.Module, gain: Tensor, out_gain: Tensor) -> Tensor:
    """Weights of a layer times gains on their inputs and outputs, float64."""
    return _weights_of(module).scaled(module, gain, out_gain)


def _weights_of(module: nn.Module) -> IntoWeights:
    rule = weights_of(module)
    if rule is None:
        raise TypeError(f"a layer with weights is needed, got {module}")
    return rule
