"""What a network is like that conversion made: settings of its modules, roles, clocks, shapes.

Files are checked by it, before one is written and after one is read: what stands here runs in every engine.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from quartz_plugin.coding import Window
from quartz_plugin.engines.convolutions import is_routing
from quartz_plugin.functional import check_bias_shape
from quartz_plugin.graph import ConvertedGraph, called_by, is_spike_source, module_nodes
from quartz_plugin.neuron import MAX_POOLS, AxonalDelay, FirstSpikeMaxPool, TTFSNeuron
from quartz_plugin.operators.modules import (
    POOLS,
    WEIGHTED,
    Add,
    Concatenate,
    DenseFirstLayer,
    Mean,
    OneToOne,
    Permute,
    Reshape,
    Slice,
    per_dimension,
    rank_of,
)

MOST = 2**31 - 1
"""Largest whole number that a setting may be: torch and the clock count in 32 bits."""

MOST_UNITS = 2**28
"""Units of one value that no network has: a float32 map of them takes 1 GB an image."""

FEW_UNITS, UNITS_FOR_EACH = 2**24, 256
"""Units of one value that any network may have, and more for each unit of its input and each of its weights."""

DTYPES = (torch.float32, torch.float64)
"""Types that hold a membrane."""


@dataclass(frozen=True)
class Setting:
    """A setting of a module: what it has to be, and a function that tells whether a JSON value is that."""

    expected: str
    fits: Callable[[Any], bool]
    optional: bool = False


def _is_whole(value: Any, least: int) -> bool:
    return type(value) is int and least <= value <= MOST


def _is_positive(value: Any) -> bool:
    return type(value) in (int, float) and 0 < value <= MOST


def _whole(least: int) -> Setting:
    return Setting(f"a whole number of at least {least}", lambda value: _is_whole(value, least))


def _whole_or_none(least: int) -> Setting:
    return Setting(f"a whole number of at least {least}, or null", lambda v: v is None or _is_whole(v, least))


def _one_of(*values: Any) -> Setting:
    expected = " or ".join(map(repr, values))
    return Setting(expected, lambda value: any(type(value) is type(each) and value == each for each in values))


def _listed(least: int, count: int | None = None) -> Setting:
    """A list of whole numbers, of any length or of `count`."""

    def fits(value: Any) -> bool:
        return isinstance(value, list) and count in (None, len(value)) and all(_is_whole(each, least) for each in value)

    return Setting(f"a list of {'' if count is None else f'{count} '}whole numbers of at least {least}", fits)


def _sizes(rank: int, least: int, also: tuple[Any, ...] = ()) -> Setting:
    """A number for all dimensions of space, or one for each of `rank`; or something else that is allowed `also`."""

    def fits(value: Any) -> bool:
        each = value if isinstance(value, list) and len(value) == rank else [value]
        return all(_is_whole(one, least) or (one is None and None in also) for one in each) or (
            isinstance(value, str) and value in also
        )

    others = "".join(f", or {'null' if value is None else repr(value)}" for value in also)
    return Setting(f"a whole number of at least {least}, or {rank} of them{others}", fits)


def _for_each_dimension(expected: str, fits_one: Callable[[Any], bool]) -> Setting:
    """Null, a number for all dimensions of space, or one for each."""

    def fits(value: Any) -> bool:
        each = value if isinstance(value, list) and 1 <= len(value) <= 3 else [value]
        return value is None or all(fits_one(one) for one in each)

    return Setting(f"{expected}, one for each dimension, or null", fits)


_FLAG = _one_of(True, False)
_ZERO = Setting("0", lambda value: type(value) in (int, float) and value == 0)


def _convolution(rank: int) -> dict[str, Setting]:
    return {
        "in_channels": _whole(1),
        "out_channels": _whole(1),
        "kernel_size": _sizes(rank, 1),
        "stride": _sizes(rank, 1),
        "padding": _sizes(rank, 0, ("same", "valid")),
        "dilation": _sizes(rank, 1),
        "groups": _whole(1),
        "padding_mode": _one_of("zeros", "reflect", "replicate", "circular"),
    }


def _transposed(rank: int) -> dict[str, Setting]:
    own = {"padding": _sizes(rank, 0), "padding_mode": _one_of("zeros"), "output_padding": _sizes(rank, 0)}
    return _convolution(rank) | own


def _average(rank: int) -> dict[str, Setting]:
    return {
        "kernel_size": _sizes(rank, 1),
        "stride": _sizes(rank, 1),
        "padding": _sizes(rank, 0),
        "ceil_mode": _FLAG,
        "count_include_pad": _FLAG,
    }


def _max(rank: int) -> dict[str, Setting]:
    return {
        "kernel_size": _sizes(rank, 1),
        "stride": _sizes(rank, 1),
        "padding": _sizes(rank, 0),
        "dilation": _sizes(rank, 1),
        "ceil_mode": _FLAG,
    }


def _padding(rank: int) -> dict[str, Setting]:
    return {"padding": _listed(-MOST, 2 * rank)}


_SIZE = _for_each_dimension("a whole number of at least 1", lambda value: _is_whole(value, 1))
_SCALE_FACTOR = _for_each_dimension("a positive number", _is_positive)

ATTRIBUTES: dict[type[nn.Module], dict[str, Setting]] = {
    nn.Conv1d: _convolution(1),
    nn.Conv2d: _convolution(2),
    nn.ConvTranspose1d: _transposed(1),
    nn.ConvTranspose2d: _transposed(2),
    nn.Linear: {"in_features": _whole(1), "out_features": _whole(1)},
    nn.AvgPool1d: _average(1),
    nn.AvgPool2d: {**_average(2), "divisor_override": _whole_or_none(1)},
    nn.AdaptiveAvgPool1d: {"output_size": _sizes(1, 1)},
    nn.AdaptiveAvgPool2d: {"output_size": _sizes(2, 1, (None,))},
    nn.MaxPool1d: _max(1),
    nn.MaxPool2d: _max(2),
    nn.AdaptiveMaxPool1d: {"output_size": _sizes(1, 1)},
    nn.AdaptiveMaxPool2d: {"output_size": _sizes(2, 1, (None,))},
    nn.Flatten: {"start_dim": _whole(1), "end_dim": _whole(-MOST)},
    nn.Unflatten: {"dim": _whole(-MOST), "unflattened_size": _listed(-1)},
    nn.PixelShuffle: {"upscale_factor": _whole(1)},
    nn.PixelUnshuffle: {"downscale_factor": _whole(1)},
    nn.ChannelShuffle: {"groups": _whole(1)},
    nn.Upsample: {
        "size": _SIZE,
        "scale_factor": _SCALE_FACTOR,
        "mode": _one_of("nearest", "nearest-exact"),
        "recompute_scale_factor": Setting("a boolean or null", lambda v: v is None or type(v) is bool, optional=True),
    },
    nn.UpsamplingNearest2d: {"size": _SIZE, "scale_factor": _SCALE_FACTOR},
    nn.ZeroPad1d: _padding(1),
    nn.ZeroPad2d: _padding(2),
    nn.ZeroPad3d: _padding(3),
    nn.ConstantPad1d: {**_padding(1), "value": _ZERO},
    nn.ConstantPad2d: {**_padding(2), "value": _ZERO},
    nn.ReflectionPad1d: _padding(1),
    nn.ReflectionPad2d: _padding(2),
    nn.ReplicationPad1d: _padding(1),
    nn.ReplicationPad2d: _padding(2),
    nn.CircularPad1d: _padding(1),
    nn.CircularPad2d: _padding(2),
    Add: {},
    Concatenate: {"dim": _whole(1)},
    Slice: {"dim": _whole(1), "start": _whole(0), "stop": _whole(0), "step": _whole(1)},
    Permute: {"dims": _listed(0)},
    Reshape: {"shape": _listed(1)},
    Mean: {"dims": _listed(1), "keepdim": _FLAG},
    AxonalDelay: {"steps": _whole(0)},
    OneToOne: {},
    TTFSNeuron: {
        "t_max": _whole(2),
        "layer": _whole(1),
        "hold": _FLAG,
        "rectifier": _one_of("spike", "silent", None),
        "bias_code": _one_of("synapse", "spike"),
        "readout": _whole_or_none(0),
        "input_window": _whole_or_none(1),
        "has_bias": _FLAG,
    },
}
"""Modules of a converted network, with the settings that build them again."""

KINDS = {kind.__name__: kind for kind in ATTRIBUTES}


def check_settings(entry: Any, path: str, kinds: Sequence[type[nn.Module]]) -> type[nn.Module]:
    """Return the class of a module, one of `kinds`, that a file describes.

    Raises
    ------
    ValueError
        If it is no such class, or a setting is missing, unknown, or none that conversion leaves.
    """
    name = entry.get("class") if isinstance(entry, dict) else None
    kind = KINDS.get(name) if isinstance(name, str) else None
    if kind is None or kind not in kinds:
        raise ValueError(f"{path!r} is of an unknown module class, or of one that cannot stand there: {name!r}")
    settings = ATTRIBUTES[kind]
    for option in entry.keys() - settings.keys() - {"class"}:
        raise ValueError(f"{path!r} ({name}) has an unknown setting {option!r}")
    for option, setting in settings.items():
        if option not in entry and not setting.optional:
            raise ValueError(f"{path!r} ({name}) has no {option}")
        if option in entry and not setting.fits(entry[option]):
            raise ValueError(f"{path!r} ({name}) has {option}={entry[option]!r}, expected {setting.expected}")
    return kind


def check_network(graph: ConvertedGraph) -> None:
    """Refuse what conversion would not make, by shapes and settings alone: no value is computed.

    Raises
    ------
    ValueError
        In one line, naming the module.
    """
    _check_tensors(graph)
    _check_calls(graph.module)
    _check_neurons(graph)
    shapes = shapes_of(graph)
    _check_pools(graph.module, shapes)
    _check_scales(graph, shapes)
    if graph.dense_stem is not None:
        _check_dense_stem(graph, graph.dense_stem)


def _check_tensors(graph: ConvertedGraph) -> None:
    """Let all weights and biases be of one type, which engines and exporters compute in."""
    for name, tensor in graph.module.state_dict().items():
        if tensor.dtype not in DTYPES:
            raise ValueError(f"{name} is in {tensor.dtype}, which cannot hold a membrane; use snn.to(torch.float32)")
        if tensor.dtype != graph.dtype:
            raise ValueError(f"{name} is in {tensor.dtype}, and the network in {graph.dtype}; give all one type")
    for name, scale in graph.scales.items():
        if not scale.is_floating_point():
            raise ValueError(f"the scale of {name!r} is in {scale.dtype}, no floating-point type")


def _check_calls(module: fx.GraphModule) -> None:
    nodes = list(module_nodes(module))
    if not nodes or not isinstance(nodes[-1][1], TTFSNeuron):
        raise ValueError("the network does not end in a layer of neurons")
    called: set[str] = set()
    for node, each in nodes:
        taken = len(node.args)
        if str(node.target) in called:
            raise ValueError(f"{node.target!r} is called twice; give each call a module of its own")
        if isinstance(each, WEIGHTED) and each.bias is not None:
            raise ValueError(f"{node.target!r} ({type(each).__name__}) has a bias, which is its neurons' to have")
        called.add(str(node.target))
        if (taken != 1 and not isinstance(each, Add | Concatenate)) or (taken < 2 and isinstance(each, Add)):
            raise ValueError(f"{node.target!r} ({type(each).__name__}) cannot listen to {taken} modules")
    for node in module.graph.nodes:
        if node.op != "output" and not node.users:
            raise ValueError(f"nobody listens to {str(node.target)!r}")


def _check_neurons(graph: ConvertedGraph) -> None:
    """All neurons are of one kind, only the last may be without a rectifier, and each hears whole windows."""
    layers = graph.layers
    kind = (layers[0].neuron.p.hold, layers[0].neuron.p.bias_code, graph.config.rectifier)
    windows: dict[fx.Node, Window] = {}
    longest: dict[fx.Node, int] = {}
    graph.arrivals()
    for layer in layers:
        p = layer.neuron.p
        last = layer is layers[-1]
        if (p.hold, p.bias_code, p.rectifier or (graph.config.rectifier if last else None)) != kind:
            raise ValueError(
                f"{layer.name!r} is of another kind of neuron than the rest: hold={p.hold}, rectifier={p.rectifier!r}, "
                f"bias_code={p.bias_code!r}"
            )
    for node in graph.module.graph.nodes:
        module = called_by(graph.module, node)
        if node.op == "placeholder":
            longest[node] = graph.input_window.length
        elif node.op != "output":
            longest[node] = max(longest[source] for source in node.all_input_nodes)
        if isinstance(module, TTFSNeuron):
            if module.clock.input_window != longest[node]:
                raise ValueError(
                    f"{node.target!r} has input_window={module.clock.input_window}, and the longest window among its "
                    f"sources is {longest[node]}"
                )
            longest[node], windows[node] = module.clock.window, module.clock.output_window
    # A layer is read out when its sources' windows end, and half a window later at most, for bias spikes.
    if graph.n_steps > 3 + 2 * (graph.input_window.length + sum(window.length + 1 for window in windows.values())):
        raise ValueError(f"an inference takes {graph.n_steps} steps, more than its windows and what is between them")
    if graph.n_steps > MOST:
        raise ValueError(f"an inference takes {graph.n_steps} steps, more than the clock counts")


def shapes_of(graph: ConvertedGraph) -> dict[fx.Node, torch.Size]:
    """Shape of every node's value, without the batch; computes nothing.

    Raises
    ------
    ValueError
        Where one does not fit the next, has no units or too many, or the batch is mixed with a sample's units.
    """
    of_two, of_three = ({graph.module.graph.find_nodes(op="placeholder")[0]: _empty(n, graph)} for n in (2, 3))
    held = sum(tensor.numel() for tensor in graph.module.state_dict().values()) + math.prod(graph.image_shape)
    most = min(MOST_UNITS, FEW_UNITS + UNITS_FOR_EACH * held)
    for node, module in module_nodes(graph.module):
        name = f"{node.target!r} ({type(module).__name__})"
        for values in (of_two, of_three):
            sources = [values[source] for source in node.args if isinstance(source, fx.Node)]
            try:
                values[node] = _shape_behind(module, sources)
            except (RuntimeError, ValueError, IndexError, TypeError, OverflowError, AssertionError) as error:
                shapes = " and ".join(str(list(source.shape[1:])) for source in sources)
                reason = str(error).partition("\n")[0]
                raise ValueError(f"{name} does not fit units of shape {shapes}: {reason}") from error
            if len(values[node]) != len(sources[0]):
                raise ValueError(f"{name} mixes the batch with the units of a sample")
        shape = of_two[node].shape[1:]
        if shape != of_three[node].shape[1:]:
            raise ValueError(f"{name} mixes the batch with the units of a sample")
        if not 1 <= shape.numel() <= most:
            raise ValueError(f"{name} has {shape.numel()} units, expected from 1 to {most}")
    return {node: value.shape[1:] for node, value in of_two.items()}


def _empty(batch: int, graph: ConvertedGraph) -> Tensor:
    if math.prod(graph.input_shape) > MOST_UNITS or math.prod(graph.image_shape) > MOST_UNITS:
        raise ValueError(f"its input has more than {MOST_UNITS} units")
    return torch.empty(batch, *graph.input_shape, device="meta", dtype=graph.dtype)


def _shape_behind(module: Any, sources: list[Tensor]) -> Tensor:
    """A tensor without data, of the shape that a module gives for these."""
    value = sources[0]
    if isinstance(module, TTFSNeuron):
        check_bias_shape(module.bias, value)
        return value
    if isinstance(module, AxonalDelay):
        return value
    if isinstance(module, FirstSpikeMaxPool):
        module = module.pool
    if isinstance(module, Add) and any(source.shape != value.shape for source in sources):
        raise ValueError("they are added, and differ")
    if isinstance(module, POOLS) and value.dim() != 2 + rank_of(module):
        # torch takes a batch without channels for one image.
        raise ValueError(f"it pools {rank_of(module)}-dimensional channels")
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.ConvTranspose1d | nn.ConvTranspose2d):
        _check_convolution(module, value)
    light = copy.copy(module)
    light._parameters = {
        name: None if parameter is None else torch.empty_like(parameter, device="meta")
        for name, parameter in module._parameters.items()
    }
    with torch.no_grad():
        out: Tensor = light(*sources)
    if isinstance(module, OneToOne) and (out.shape != value.shape or module.weight.dim() >= value.dim()):
        raise ValueError(f"its weights are of shape {list(module.weight.shape)}")
    return out


def _check_convolution(module: Any, value: Tensor) -> None:
    """Check what torch looks at only where it computes."""
    rank = len(module.kernel_size)
    if value.dim() != 2 + rank or value.shape[1] != module.in_channels:
        raise ValueError(f"it takes {module.in_channels} channels in {rank} dimensions")
    if isinstance(module, nn.ConvTranspose1d | nn.ConvTranspose2d):
        for extra, stride, dilation in zip(module.output_padding, module.stride, module.dilation, strict=True):
            if extra >= max(stride, dilation):
                raise ValueError(f"output_padding={extra} is not smaller than stride or dilation")
    elif not isinstance(module.padding, str):
        padded = [size + 2 * pad for size, pad in zip(value.shape[2:], module.padding, strict=True)]
        if module.in_channels * math.prod(padded) > MOST_UNITS:
            raise ValueError(f"padding={module.padding} gives more than {MOST_UNITS} units")


def _check_pools(module: fx.GraphModule, shapes: Mapping[fx.Node, torch.Size]) -> None:
    """First spikes are pooled of spikes: from neurons or the input, and merely routed on the way."""
    spikes = {node for node in module.graph.nodes if is_spike_source(module, node)}
    for node, each in module_nodes(module):
        heard, shape = spikes.issuperset(node.all_input_nodes), shapes[node.all_input_nodes[0]]
        if isinstance(each, FirstSpikeMaxPool):
            if not heard:
                raise ValueError(f"{node.target!r} pools currents, and only of spikes the first is the largest")
            _check_windows(each.pool, shape, str(node.target))
        elif heard and is_routing(each, shape):
            spikes.add(node)


def _check_windows(pool: Any, shape: torch.Size, path: str) -> None:
    """Refuse windows of padding alone, whose largest value is none."""
    if not isinstance(pool, nn.MaxPool1d | nn.MaxPool2d):
        return
    rank = rank_of(pool)
    settings = [per_dimension(value, rank) for value in (pool.kernel_size, pool.stride, pool.padding, pool.dilation)]
    for size, kernel, stride, padding, dilation in zip(shape[-rank:], *settings, strict=True):
        pooled = F.max_pool1d(torch.zeros(1, 1, size), kernel, stride, padding, dilation, pool.ceil_mode)
        if not bool(pooled.isfinite().all()):
            raise ValueError(f"{path!r} has pooling windows of padding alone")


def _check_scales(graph: ConvertedGraph, shapes: Mapping[fx.Node, torch.Size]) -> None:
    if {layer.name for layer in graph.layers} != set(graph.scales):
        raise ValueError("its layers and scales do not belong together")
    for layer in graph.layers:
        scale = graph.scales[layer.name]
        if not bool((scale > 0).all() and torch.isfinite(scale).all()):
            raise ValueError(f"a scale is not positive: that of {layer.name!r}")
        if not _broadcasts(scale, shapes[layer.node]):
            raise ValueError(f"the scale of {layer.name!r} is of shape {list(scale.shape)}, which does not fit it")


def _check_dense_stem(graph: ConvertedGraph, front: DenseFirstLayer) -> None:
    tensors = {name: tensor for name, tensor in front.state_dict().items() if tensor.dtype != graph.dtype}
    for name, tensor in tensors.items():
        raise ValueError(f"{name} of its first layer is in {tensor.dtype}, and the network in {graph.dtype}")
    layer: Any = front.layer
    image = torch.empty(2, *front.image_shape, device="meta", dtype=graph.dtype)
    try:
        values = _shape_behind(layer, [image])
    except (RuntimeError, ValueError, IndexError, TypeError) as error:
        raise ValueError(f"its first layer does not fit the image: {str(error).partition(chr(10))[0]}") from error
    if values.shape != (2, *graph.input_shape):
        raise ValueError("its first layer does not fit the input")
    fits = all(_broadcasts(each, image.shape[1:]) for each in (front.gain, front.shift))
    if not fits or not _broadcasts(front.scale, values.shape[1:]) or not bool((front.scale > 0).all()):
        raise ValueError("its first layer is damaged")


def _broadcasts(tensor: Tensor, shape: Sequence[int]) -> bool:
    """Whether a tensor is one number, or fits units of this shape without making more of them."""
    try:
        return bool(torch.broadcast_shapes(tensor.shape, tuple(shape)) == tuple(shape))
    except RuntimeError:
        return False


BODY = tuple(kind for kind in ATTRIBUTES if kind not in MAX_POOLS)
"""Classes of modules that a network calls; max pools stand inside of FirstSpikeMaxPool."""

__all__ = ["ATTRIBUTES", "BODY", "KINDS", "WEIGHTED", "check_network", "check_settings", "shapes_of"]
