r"""Stage 5, rescale: synapses between levels, and the bias of every neuron.

Between the spikes stands an affine map ``A`` (one or more modules, shared where several layers listen to it).
Neurons get the bias ``A(0) / s_out``, a map over positions where padding or preprocessing makes it one; the
synapses get ``A``'s linear part, times ``s_in / s_out`` and ``S_out / S_in``, put into the weights that are there.

Each value on the way carries a *gain*: what it stands for in the ANN, for each unit of what is computed. A
spike's level stands for ``s / S``; a gain passes through all that is linear and acts on units one by one, and
is put into weights where values are mixed, added, or arrive at neurons.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from quartz_plugin.convert.traced import TracedNetwork
from quartz_plugin.graph import INPUT, unique_path
from quartz_plugin.operators.modules import (
    AVERAGES,
    PADDING_MODES,
    WEIGHTED,
    Add,
    Concatenate,
    Mean,
    OneToOne,
    Permute,
    Reshape,
    rank_of,
)
from quartz_plugin.operators.table import Affine, ConversionError, Role

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
        Path -> module, none with a bias. The draft keeps its own.
    layers : dict
        Node -> the spiking layer to be put there, in order; the output last.
    input_shape : tuple of int
        One input, without the batch.
    """

    graph: fx.Graph
    modules: dict[str, nn.Module]
    layers: dict[fx.Node, ScaledLayer]
    input_shape: tuple[int, ...] = ()


def rescale(
    draft: TracedNetwork, scales: Mapping[str, Tensor], windows: Mapping[str, int], *, average_by_sums: bool = False
) -> ScaledNetwork:
    """Scale the synapses between the spiking layers of a folded, checked network.

    Parameters
    ----------
    draft : TracedNetwork
        The network.
    scales : dict
        Path -> scale of each ReLU and of the output, as :func:`~quartz_plugin.convert.calibrate.calibrate` gives.
    windows : dict
        Path of each ReLU and of the output, and "input" -> steps of its window.
    average_by_sums : bool
        Let averages add up, and put what they divide by into the weights that follow, as a chip would.

    Raises
    ------
    ConversionError
        If spikes of different scales are pooled together, or an average is no sum in windows of one size.
    """
    return _Rescaling(draft, scales, windows, average_by_sums).network


class _Rescaling:
    """Walks the draft once; `gains` and `nodes` are those of what is emitted for each of the draft's nodes."""

    def __init__(
        self, draft: TracedNetwork, scales: Mapping[str, Tensor], windows: Mapping[str, int], average_by_sums: bool
    ) -> None:
        self.draft, self.average_by_sums = draft, average_by_sums
        self.names = draft.names()
        self.network = ScaledNetwork(fx.Graph(), {}, {}, draft.input_shape)
        self.scales = {node: scales[str(node.target)].double().cpu() for node in draft.layers()}
        self.windows = {node: windows[str(node.target)] for node in draft.layers()}
        self.quanta = {node: scale / self.windows[node] for node, scale in self.scales.items()}
        self.wanted = self._wanted_gains()
        self.biases = draft.biases()
        self.nodes: dict[fx.Node, fx.Node] = {}
        self.gains: dict[fx.Node, Tensor] = {}
        self.longest: dict[fx.Node, int] = {}

        for node in draft.module.graph.nodes:
            if node.op == "placeholder":
                self.nodes[node] = self.network.graph.placeholder(INPUT)
                self.gains[node] = _compressed(draft.input_scale / windows[INPUT])
                self.longest[node] = windows[INPUT]
            elif node.op == "call_module":
                self.longest[node] = max(self.longest[source] for source in node.all_input_nodes)
                self._visit(node, draft.module_at(node), draft.role_at(node))
        last = draft.last
        if draft.role_at(last) is not Role.RECTIFIER:
            self._place_neurons(last, last, unique_path("output", self.names), rectified=False)
        self.network.graph.output(self.nodes[last])

    def _visit(self, node: fx.Node, module: nn.Module, role: Role | None) -> None:
        sources = [arg for arg in node.args if isinstance(arg, fx.Node)]
        if role is Role.RECTIFIER:
            self._place_neurons(node, sources[0], str(node.target), rectified=True)
        elif isinstance(module, Affine):
            self.nodes[node] = self.nodes[sources[0]]
            self.gains[node] = _compressed(self.gains[sources[0]] * module.weight.detach().double().cpu())
        elif isinstance(module, WEIGHTED):
            self._visit_weighted(node, module, sources[0])
        elif isinstance(module, Add):
            self._visit_add(node, module, sources)
        elif isinstance(module, AVERAGES) or role is Role.MAX_POOL:
            gain = self.gains[sources[0]]
            if not _alike_in_windows(gain, module):
                if role is Role.MAX_POOL:
                    raise ConversionError(
                        f"cannot convert {node.target!r} ({type(module).__name__}): it pools units of different "
                        'scales; pool them before they are joined, or use granularity="layer" where it pools channels'
                    )
                self._pool(node, module, self._weighed(sources[0], gain, str(node.target)))
                self.gains[node] = self._share(node, module)
            else:
                self._pool(node, module, self.nodes[sources[0]])
                self.gains[node] = _compressed(self._routed(node, module, sources) * self._share(node, module))
        else:
            self._call(node, copy.deepcopy(module), [self.nodes[source] for source in sources])
            self.gains[node] = self._routed(node, module, sources)

    def _call(self, node: fx.Node, module: nn.Module, sources: list[fx.Node]) -> None:
        self.network.modules[str(node.target)] = module
        self.nodes[node] = self.network.graph.call_module(str(node.target), tuple(sources))

    def _pool(self, node: fx.Node, module: nn.Module, source: fx.Node) -> None:
        if not self._adds_up(module):
            self._call(node, copy.deepcopy(module), [source])
            return
        before, added, behind = self._as_sum(node, module)
        if before:
            source = self._insert(f"{node.target}_ordered", before, source)
        self._call(node, added.to(self.draft.device, self.draft.dtype), [source])
        if behind:
            self.nodes[node] = self._insert(f"{node.target}_squeezed", behind, self.nodes[node])

    def _as_sum(self, node: fx.Node, module: nn.Module) -> tuple[list[nn.Module], nn.Module, list[nn.Module]]:
        """What adds up where a module averages, and the routing before and behind it."""
        shape = self.draft.shape_at(node.all_input_nodes[0])
        reshaped: list[nn.Module] = [Reshape(self.draft.shape_at(node))]
        if not isinstance(module, Mean):
            return [], _sum_in_windows(module, shape, str(node.target)), []
        if 1 not in module.dims and len(shape) in (2, 3):
            return [], _sum_in_windows(module, shape, str(node.target)), [] if module.keepdim else reshaped
        # What is added up comes last, in one dimension.
        kept = [dim for dim in range(1, 1 + len(shape)) if dim not in module.dims]
        summed = math.prod(shape[dim - 1] for dim in module.dims)
        order = Permute((0, *kept, *sorted(module.dims)))
        rows = Reshape((1, math.prod(shape) // summed, summed))
        return [order, rows], nn.AvgPool2d((1, summed), divisor_override=1), reshaped

    def _insert(self, name: str, modules: list[nn.Module], source: fx.Node) -> fx.Node:
        """Let modules of no node of the draft's follow `source`."""
        for module in modules:
            path = unique_path(name, self.names)
            self.names.add(path)
            self.network.modules[path] = module
            source = self.network.graph.call_module(path, (source,))
        return source

    def _adds_up(self, module: nn.Module) -> bool:
        return self.average_by_sums and isinstance(module, AVERAGES)

    def _share(self, node: fx.Node, module: nn.Module) -> Tensor:
        """What a sum in each window is to be multiplied by to be the average; 1 where averages are averages."""
        if not self._adds_up(module):
            return ONE
        shape = self.draft.shape_at(node.all_input_nodes[0])
        ones = torch.ones(1, *shape, dtype=torch.float64)
        before, added, behind = self._as_sum(node, module)
        summed = nn.Sequential(*before, added.double(), *behind)(ones)
        average = module(ones)
        # A window in padding alone adds up nothing.
        return _compressed((average / summed.reshape(average.shape)).nan_to_num(1.0)[0])

    def _weighed(self, source: fx.Node, weight: Tensor, name: str) -> fx.Node:
        """What is emitted for `source`, times a weight; behind one synapse a unit, unless the weight is 1."""
        if bool((weight == 1).all()):
            return self.nodes[source]
        like = torch.zeros((), dtype=self.draft.dtype, device=self.draft.device)
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
            shape=self.draft.shape_at(node),
            window=window,
            input_window=input_window,
        )

    def _bias(self, node: fx.Node, scale: Tensor, ratio: float) -> Tensor | None:
        """``A(0) / s_out``, as small a tensor as says it; an output's is of what it says beyond its shift."""
        shift = 0.0 if self.draft.role_at(node) is Role.RECTIFIER else self.draft.output_shift
        shift = shift.to(self.draft.device) if isinstance(shift, Tensor) else shift
        bias = ((self.biases[node] - shift) * (ratio / scale.to(self.draft.device))).to(self.draft.dtype)
        if not bool(bias.any()):
            return None
        spatial = tuple(range(1, bias.dim()))
        if spatial and bool((bias == bias.amax(dim=spatial, keepdim=True)).all()):
            bias = bias.amax(dim=spatial, keepdim=True)
        return bias

    def _visit_weighted(self, node: fx.Node, module: Any, source: fx.Node) -> None:
        gain, shape = self.gains[source], self.draft.shape_at(source)
        drive = self.nodes[source]
        if _gain_of_inputs(module, gain, shape) is None:
            drive, gain = self._weighed(source, gain, str(node.target)), ONE
        wanted = self.wanted[node]
        out_gain = wanted if wanted is not None and along_outputs(module, wanted) else ONE
        weight = scaled_weight(module, _gain_of_inputs(module, gain, shape), 1 / out_gain)
        emitted = copy.copy(module)
        emitted._parameters = {
            "weight": nn.Parameter(weight.to(module.weight.dtype), requires_grad=False),
            "bias": None,
        }
        self._call(node, emitted, [drive])
        self.gains[node] = out_gain

    def _visit_add(self, node: fx.Node, module: nn.Module, sources: list[fx.Node]) -> None:
        gains = [self.gains[source] for source in sources]
        wanted = self.wanted[node]
        if wanted is None:
            alike = all(gain.shape == gains[0].shape and bool((gain == gains[0]).all()) for gain in gains)
            wanted = gains[0] if alike and bool((gains[0] != 0).all()) else ONE
        weighed = [
            self._weighed(source, gain / wanted, str(node.target)) for source, gain in zip(sources, gains, strict=True)
        ]
        self._call(node, copy.deepcopy(module), weighed)
        self.gains[node] = wanted

    def _routed(self, node: fx.Node, module: nn.Module, sources: list[fx.Node]) -> Tensor:
        """Carry the sources' gains through routing or pooling; of size 1 along dimensions in which one is alike."""
        gains = [self.gains[source] for source in sources]
        if all(gain.dim() == 0 and bool(gain == gains[0]) for gain in gains):
            return gains[0]
        full = [
            gain.expand(self.draft.shape_at(source)).unsqueeze(0) for gain, source in zip(gains, sources, strict=True)
        ]
        if isinstance(module, Mean):
            # One gain along what is averaged; its mean may be another number in the last place.
            return _compressed(full[0].amax(dim=module.dims, keepdim=module.keepdim)[0])
        if PADDING_MODES.get(type(module)) == "constant":
            # Nothing spikes in a border, so its gain may be that of the edge.
            padding: Any = module.padding
            return _compressed(_pad_with_edges(full[0], padding)[0])
        if isinstance(module, nn.AvgPool1d | nn.AvgPool2d | nn.MaxPool1d | nn.MaxPool2d):
            # Alike in all windows, whatever pads them.
            spatial = len(self.draft.shape_at(node)) - 1
            channels = full[0][0]
            for dim in range(1, spatial + 1):
                channels = channels.narrow(dim, 0, 1)
            return _compressed(channels.expand(self.draft.shape_at(node)))
        return _compressed(module(*full)[0])

    def _wanted_gains(self) -> dict[fx.Node, Tensor | None]:
        """Gain that would save a value its own weights on the way to the one layer that listens to it."""
        wanted: dict[fx.Node, Tensor | None] = {}
        for node in reversed(self.draft.module.graph.nodes):
            gains = [self._wanted_by(user, node, wanted) for user in node.users]
            wanted[node] = gains[0] if len(gains) == 1 or _proportional(gains) else None
        return wanted

    def _wanted_by(self, user: fx.Node, node: fx.Node, wanted: dict[fx.Node, Tensor | None]) -> Tensor | None:
        if user.op == "output":
            return self.quanta.get(node)
        role, module = self.draft.role_at(user), self.draft.module_at(user)
        if role is Role.RECTIFIER:
            return self.quanta[user]
        gain = wanted[user]
        if gain is None or isinstance(module, WEIGHTED):
            return None
        if isinstance(module, Affine):
            weight = module.weight.detach().double().cpu()
            return _compressed(gain / weight) if bool((weight != 0).all()) else None
        if isinstance(module, Add) or (gain.dim() == 0 and not self._adds_up(module)):
            return gain
        if isinstance(module, AVERAGES) and not isinstance(module, Mean):
            if not _alike_in_windows(gain, module):
                return None
            share = self._share(user, module)
            return gain / share if share.dim() == 0 else None
        if isinstance(module, Mean):
            share = self._share(user, module)
            full = gain / share if share.dim() == 0 else None
            if full is None or gain.dim() == 0 or module.keepdim:
                return full
            for dim in sorted(module.dims):
                full = full.unsqueeze(dim - 1)
            return full
        if isinstance(module, Concatenate) and list(user.args).count(node) == 1:
            start, dim = 0, module.dim - 1
            for source in user.args:
                size = self.draft.shape_at(source)[dim]  # type: ignore[arg-type]
                if source is node:
                    return gain if gain.shape[dim] == 1 else gain.narrow(dim, start, size)
                start += size
        if role is Role.ROUTE and not isinstance(module, Concatenate):
            return _routed_back(gain, module, self.draft.shape_at(node), self.draft.shape_at(user))
        return None


def _routed_back(gain: Tensor, module: nn.Module, before: tuple[int, ...], behind: tuple[int, ...]) -> Tensor | None:
    """Gain in front of routing that becomes `gain` behind it; None where units are left out or doubled."""
    places = module(torch.arange(math.prod(before), dtype=torch.float64).view(1, *before))[0].flatten().long()
    if len(places) != math.prod(before) or len(places.unique()) != len(places):
        return None
    routed = torch.empty(len(places), dtype=torch.float64)
    routed[places] = gain.expand(behind).flatten()
    return _compressed(routed.view(before))


def _proportional(gains: list[Tensor | None]) -> bool:
    """Whether one of several gains by channel serves all, but for one number each."""
    first = gains[0] if gains else None
    if first is None or first.dim() == 0:
        return False
    return all(gain is not None and _compressed(gain / first).dim() == 0 for gain in gains)


def _per_channel(gain: Tensor) -> bool:
    return gain.dim() == 0 or all(size == 1 for size in gain.shape[1:])


def _gain_of_inputs(module: Any, gain: Tensor, shape: tuple[int, ...]) -> Tensor | None:
    """A gain on the inputs as one number for each channel or feature; None where one weight serves several."""
    if gain.dim() == 0:
        return gain
    if isinstance(module, nn.Linear):
        if any(size != 1 for size in gain.shape[:-1]):
            return None
        return gain.flatten().expand(shape[-1])
    return gain.flatten().expand(shape[0]) if _per_channel(gain) else None


def along_outputs(module: Any, gain: Tensor) -> bool:
    """Whether a gain on the outputs is one number for each row of weights."""
    if gain.dim() == 0:
        return True
    return gain.dim() == 1 if isinstance(module, nn.Linear) else _per_channel(gain)


def scaled_weight(module: Any, gain: Tensor | None, out_gain: Tensor) -> Tensor:
    """Weights times gains on their inputs and outputs, float64."""
    assert gain is not None
    # In place on a copy of its own: the largest layers decide how much memory conversion takes.
    weight: Tensor = module.weight.detach().to(torch.float64, copy=True)
    gain, out_gain = gain.to(weight.device), out_gain.flatten().to(weight.device)
    if isinstance(module, nn.Linear):
        return weight.mul_(gain).mul_(out_gain.view(-1, 1))
    spatial = [1] * (weight.dim() - 2)
    groups = module.groups
    inputs = gain.flatten().expand(module.in_channels).view(groups, -1)
    outputs = out_gain.expand(module.out_channels).view(groups, -1)
    if isinstance(module, nn.ConvTranspose1d | nn.ConvTranspose2d):
        first, second = inputs, outputs
    else:
        first, second = outputs, inputs
    by_group = weight.unflatten(0, (groups, -1))
    by_group.mul_(first.view(groups, -1, 1, *spatial)).mul_(second.view(groups, 1, -1, *spatial))
    return weight


def _alike_in_windows(gain: Tensor, pool: nn.Module) -> bool:
    """Whether all values that a pooling module puts together have the same gain."""
    if gain.dim() == 0:
        return True
    if isinstance(pool, Mean):
        return all(gain.shape[dim - 1] == 1 for dim in pool.dims)
    return all(size == 1 for size in gain.shape[-rank_of(pool) :])


def _sum_in_windows(module: Any, shape: tuple[int, ...], name: str) -> nn.Module:
    """A module that adds up in the windows in which this one averages."""
    if isinstance(module, nn.AvgPool2d):
        summed = copy.deepcopy(module)
        summed.divisor_override = 1
        return summed
    kernel: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()
    padding: Any = 0
    if isinstance(module, nn.AvgPool1d) and not module.ceil_mode:
        kernel, stride, padding = (tuple(size) for size in (module.kernel_size, module.stride, module.padding))  # type: ignore[arg-type]
    elif isinstance(module, nn.AdaptiveAvgPool1d | nn.AdaptiveAvgPool2d):
        wanted: Any = module.output_size
        sizes = list(zip(shape[-len(wanted) :], wanted, strict=True))
        if all(own % size == 0 for own, size in sizes):
            kernel = stride = tuple(own // size for own, size in sizes)
    elif isinstance(module, Mean):
        kernel = stride = tuple(size if 2 + dim in module.dims else 1 for dim, size in enumerate(shape[1:]))
    if len(kernel) == 2:
        return nn.AvgPool2d(kernel, stride, divisor_override=1)  # type: ignore[arg-type]
    if len(kernel) == 1:
        ones = nn.Conv1d(shape[0], shape[0], kernel[0], stride[0], padding, groups=shape[0], bias=False)
        ones.weight = nn.Parameter(torch.ones_like(ones.weight.detach()), requires_grad=False)
        return ones
    raise ConversionError(
        f"cannot convert {name!r} ({type(module).__name__}) with weight_bits: it averages over windows that no fixed "
        "weights add up; pool to a size that divides its input's, or without ceil_mode"
    )


def _compressed(gain: Tensor) -> Tensor:
    """A gain of size 1 along each dimension in which it does not differ; of no dimension where it nowhere does."""
    for dim in range(gain.dim()):
        first = gain.narrow(dim, 0, 1)
        gain = first if bool((gain == first).all()) else gain
    return gain.reshape(()) if gain.numel() == 1 else gain


def _pad_with_edges(full: Tensor, padding: tuple[int, ...]) -> Tensor:
    """Pad (or crop) the last dimensions by their edges, as torch counts paddings: from the last one backwards."""
    for place in range(len(padding) // 2):
        dim, size = full.dim() - 1 - place, full.shape[full.dim() - 1 - place]
        index = torch.arange(-padding[2 * place], size + padding[2 * place + 1]).clamp(0, size - 1)
        full = full.index_select(dim, index)
    return full
