r"""Stage 5, rescale: synapses between values in [0, 1], and the bias of every neuron.

Between two layers of spikes stands an affine map ``A`` (one or more modules). The neurons get the bias
``A(0) / s_out``, a map over positions where padding or preprocessing makes it one; the synapses get
``A``'s linear part times ``s_in / s_out``, put into the weights that are there.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from quartz_plugin.convert.draft import Draft
from quartz_plugin.convert.operators import Affine, ConversionError, Role, role_of
from quartz_plugin.graph import OneToOne, unique_name

Path = str
Synapse = tuple[Path, nn.Module]

_AVERAGE_POOLS = (nn.AvgPool1d, nn.AvgPool2d, nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d)


@dataclass
class ScaledLayer:
    """One spiking layer to be emitted.

    Attributes
    ----------
    name : str
        Path of its ReLU in the ANN, or "output".
    pools : list
        Routing and first-spike pooling between its source's spikes and its synapses.
    synapses : list
        Paths and modules of its projection, none with a bias.
    bias : Tensor or None
        Bias of its neurons, broadcastable to one sample; None where it is 0.
    scale : Tensor
        What its value 1 stands for in the ANN.
    rectified : bool
        Whether a ReLU follows; False for a signed output.
    shape : tuple of int
        Shape of its neurons, without the batch.
    """

    name: str
    pools: list[Synapse]
    synapses: list[Synapse]
    bias: Tensor | None
    scale: Tensor
    rectified: bool
    shape: tuple[int, ...]


@dataclass
class _Segment:
    """The modules collected since the last spikes."""

    scale: Tensor
    shape: tuple[int, ...]
    pools: list[Synapse] = field(default_factory=list)
    steps: list[Synapse] = field(default_factory=list)


def rescale(draft: Draft, scales: dict[str, Tensor]) -> list[ScaledLayer]:
    """Cut the network into spiking layers and scale their synapses.

    Parameters
    ----------
    draft : Draft
        The folded, checked network.
    scales : dict
        Path -> scale of each ReLU and of the output, as :func:`~quartz_plugin.convert.calibrate.calibrate` gives.

    Returns
    -------
    list of ScaledLayer
        The spiking layers in order, the output last. The draft keeps its own modules.
    """
    layers: list[ScaledLayer] = []
    segment = _Segment(torch.ones((), dtype=torch.float64), draft.input_shape)
    steps = draft.steps()
    for node, module in steps:
        path, role = str(node.target), role_of(module)
        if role is Role.MAX_POOL:
            # Only routing can stand before it: the check has seen to that.
            scale = _routed(segment.scale, segment.shape, segment.steps)
            if not _alike_in_windows(scale, module):
                raise ConversionError(
                    f"cannot convert {path!r} ({type(module).__name__}) with a scale for each channel: it pools "
                    'channels of different scales; use granularity="layer"'
                )
            segment = _Segment(
                scale, node.meta["shape"], [*segment.pools, *segment.steps, (path, copy.deepcopy(module))]
            )
        elif role is not Role.RECTIFIER:
            segment.steps.append((path, copy.deepcopy(module)))
        ends = role is Role.RECTIFIER or node is steps[-1][0]
        if ends:
            name = path if role is Role.RECTIFIER else unique_name("output", draft.names())
            scale = scales[path].double().cpu()
            layers.append(
                ScaledLayer(
                    name=name,
                    pools=segment.pools,
                    bias=_bias(segment, scale, draft.dtype, draft.device),
                    synapses=_scaled_synapses(segment, scale, name, draft.dtype, draft.device),
                    scale=scale,
                    rectified=role is Role.RECTIFIER,
                    shape=node.meta["shape"],
                )
            )
            segment = _Segment(scale, node.meta["shape"])
    return layers


def _bias(segment: _Segment, scale: Tensor, dtype: torch.dtype, device: torch.device) -> Tensor | None:
    """``A(0) / s_out``, as small a tensor as says it."""
    value = torch.zeros((1, *segment.shape), dtype=torch.float64, device=device)
    with torch.no_grad():
        for _, module in segment.steps:
            value = copy.deepcopy(module).double()(value)
    bias = (value[0] / scale.to(device)).to(dtype)
    if not bool(bias.any()):
        return None
    spatial = tuple(range(1, bias.dim()))
    if spatial and bool((bias == bias.amax(dim=spatial, keepdim=True)).all()):
        bias = bias.amax(dim=spatial, keepdim=True)
    return bias


def _scaled_synapses(
    segment: _Segment, scale_out: Tensor, name: str, dtype: torch.dtype, device: torch.device
) -> list[Synapse]:
    """Scale the linear part: gains in front and behind are merged into weights wherever these can take them."""
    gain = segment.scale.to(device)
    out_gain = 1 / scale_out.to(device)
    if out_gain.dim() == 0:
        gain, out_gain = gain * out_gain, torch.ones_like(out_gain)
    synapses: list[Synapse] = []
    shape = segment.shape

    def place(path: str, gain: Tensor) -> None:
        if not bool((gain == 1).all()):
            synapses.append((path, OneToOne(gain.to(dtype))))

    for path, module in segment.steps:
        with torch.no_grad():
            out_shape = tuple(module.double()(torch.zeros((1, *shape), dtype=torch.float64, device=device)).shape[1:])
        if isinstance(module, Affine):
            gain = gain * module.weight.detach()
        elif isinstance(module, nn.Conv1d | nn.Conv2d | nn.Linear):
            merged = _times_input_gain(module, gain, shape)
            if not merged:
                place(f"{path}_gain", gain)
            module.bias = None
            synapses.append((path, module.to(dtype)))
            gain = torch.ones((), dtype=torch.float64, device=device)
        elif isinstance(module, _AVERAGE_POOLS):
            if not _alike_in_windows(gain, module):
                place(f"{path}_gain", gain)
                gain = torch.ones((), dtype=torch.float64, device=device)
            synapses.append((path, module.to(dtype)))
        else:
            gain = _routed(gain, shape, [(path, module)])
            synapses.append((path, module.to(dtype)))
        shape = out_shape
    left = gain * out_gain
    if not bool((left == 1).all()) and not _times_output_gain(synapses, left):
        place(f"{name}_gain", left)
    return synapses


def _per_channel(gain: Tensor) -> bool:
    return gain.dim() == 0 or all(size == 1 for size in gain.shape[1:])


def _times_input_gain(module: nn.Conv1d | nn.Conv2d | nn.Linear, gain: Tensor, shape: tuple[int, ...]) -> bool:
    """Multiply the weights by a gain on their inputs; False where one weight serves several gains."""
    weight = module.weight.detach().double()
    if gain.dim() > 0 and not (_per_channel(gain) if not isinstance(module, nn.Linear) else len(shape) == 1):
        return False
    if isinstance(module, nn.Linear) or gain.dim() == 0:
        scaled = weight * gain
    else:
        channels = gain.flatten().expand(module.in_channels)
        by_group = channels.view(module.groups, 1, -1, *[1] * (weight.dim() - 2))
        scaled = (weight.unflatten(0, (module.groups, -1)) * by_group).flatten(0, 1)
    module.weight = nn.Parameter(scaled.to(module.weight.dtype), requires_grad=False)
    return True


def _times_output_gain(synapses: list[Synapse], gain: Tensor) -> bool:
    """Multiply the last weights by a gain on their outputs, if nothing that mixes positions stands behind them."""
    for _, module in reversed(synapses):
        if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Linear):
            flat = gain.flatten()
            along_outputs = gain.dim() == 1 or not isinstance(module, nn.Linear)
            fits = gain.dim() == 0 or (_per_channel(gain) and along_outputs and len(flat) == module.weight.shape[0])
            if not fits:
                return False
            weight = module.weight.detach()
            scaled = weight.double() * flat.view(-1, *[1] * (weight.dim() - 1))
            module.weight = nn.Parameter(scaled.to(weight.dtype), requires_grad=False)
            return True
        if gain.dim() > 0 and not isinstance(module, _AVERAGE_POOLS):
            return False
    return False


def _alike_in_windows(gain: Tensor, pool: nn.Module) -> bool:
    """Whether all values that a pooling module puts together have the same gain."""
    dims = 2 if type(pool).__name__.endswith("2d") else 1
    return gain.dim() == 0 or all(size == 1 for size in gain.shape[-dims:])


def _routed(gain: Tensor, shape: tuple[int, ...], routes: list[Synapse]) -> Tensor:
    """Carry a gain through routing modules; of size 1 along each dimension in which it does not differ."""
    for _, module in routes:
        if gain.dim() == 0:
            break
        full = gain.expand(shape).unsqueeze(0)
        if isinstance(module, nn.ZeroPad1d | nn.ZeroPad2d):
            # Nothing spikes in a border, so its gain may be that of the edge.
            routed = nn.functional.pad(full, module.padding, mode="replicate")[0]
        else:
            routed = module(full)[0]
        shape, gain = tuple(routed.shape), routed
        for dim in range(gain.dim()):
            first = gain.narrow(dim, 0, 1)
            gain = first if bool((gain == first).all()) else gain
    return gain
