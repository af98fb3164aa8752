"""Files: a converted network as one safetensors file, its structure as JSON in the header. No code."""

from __future__ import annotations

import copy
import json
import math
import os
import re
import tempfile
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor, fx, nn

from quartz_plugin.coding import window_length
from quartz_plugin.graph import INPUT, ConvertedGraph, call_node, check_modules
from quartz_plugin.neuron import AxonalDelay, FirstSpikeMaxPool, TTFSNeuron
from quartz_plugin.structure import (
    WEIGHTED,
    Add,
    Concatenate,
    DenseFirstLayer,
    Mean,
    OneToOne,
    Permute,
    Reshape,
    Slice,
)
from quartz_plugin.task import CLASSIFICATION, check_task

FORMAT = "quartz_plugin.network"
VERSION = 3

_CONVOLUTION = (
    "in_channels",
    "out_channels",
    "kernel_size",
    "stride",
    "padding",
    "dilation",
    "groups",
    "padding_mode",
)
_AVERAGE_1D = ("kernel_size", "stride", "padding", "ceil_mode", "count_include_pad")
_MAX = ("kernel_size", "stride", "padding", "dilation", "ceil_mode")

ATTRIBUTES: dict[type[nn.Module], tuple[str, ...]] = {
    nn.Conv1d: _CONVOLUTION,
    nn.Conv2d: _CONVOLUTION,
    nn.ConvTranspose1d: (*_CONVOLUTION, "output_padding"),
    nn.ConvTranspose2d: (*_CONVOLUTION, "output_padding"),
    nn.Linear: ("in_features", "out_features"),
    nn.AvgPool1d: _AVERAGE_1D,
    nn.AvgPool2d: (*_AVERAGE_1D, "divisor_override"),
    nn.AdaptiveAvgPool1d: ("output_size",),
    nn.AdaptiveAvgPool2d: ("output_size",),
    nn.MaxPool1d: _MAX,
    nn.MaxPool2d: _MAX,
    nn.AdaptiveMaxPool1d: ("output_size",),
    nn.AdaptiveMaxPool2d: ("output_size",),
    nn.Flatten: ("start_dim", "end_dim"),
    nn.Unflatten: ("dim", "unflattened_size"),
    nn.PixelShuffle: ("upscale_factor",),
    nn.PixelUnshuffle: ("downscale_factor",),
    nn.ChannelShuffle: ("groups",),
    nn.Upsample: ("size", "scale_factor", "mode"),
    nn.UpsamplingNearest2d: ("size", "scale_factor"),
    **dict.fromkeys((nn.ZeroPad1d, nn.ZeroPad2d, nn.ZeroPad3d), ("padding",)),
    **dict.fromkeys((nn.ConstantPad1d, nn.ConstantPad2d), ("padding", "value")),
    **dict.fromkeys((nn.ReflectionPad1d, nn.ReflectionPad2d), ("padding",)),
    **dict.fromkeys((nn.ReplicationPad1d, nn.ReplicationPad2d), ("padding",)),
    **dict.fromkeys((nn.CircularPad1d, nn.CircularPad2d), ("padding",)),
    Add: (),
    Concatenate: ("dim",),
    Slice: ("dim", "start", "stop", "step"),
    Permute: ("dims",),
    Reshape: ("shape",),
    Mean: ("dims", "keepdim"),
    AxonalDelay: ("steps",),
}
"""Modules a file may hold, with what builds them again."""

MOST_UNITS = 2**31
"""Units of one value that no network has; a damaged size would only fail when memory is asked for."""

_ALLOWED: dict[str, dict[str, tuple[Any, ...]]] = {
    "Upsample": {"mode": ("nearest", "nearest-exact")},
    "ConstantPad1d": {"value": (0,)},
    "ConstantPad2d": {"value": (0,)},
}
"""Options that have to be as conversion leaves them."""

_WHAT_DAMAGE_RAISES = (
    ArithmeticError,
    AttributeError,
    LookupError,
    MemoryError,
    RuntimeError,
    SyntaxError,
    TypeError,
    ValueError,
)

_NAME = re.compile(r'[^"\\\x00-\x1f]+')
_PLAIN_MODULE = nn.Module()
_NEURON = ("t_max", "layer", "hold", "rectifier", "bias_code", "readout", "input_window")


def write(graph: ConvertedGraph, path: str | PathLike[str]) -> None:
    """Write a network to one file, all or nothing.

    Raises
    ------
    OSError
        If the file cannot be written; an older one is then left as it was.
    ValueError
        If the graph holds (put there by hand) what the format does not know, or a weight is not finite.
    """
    check_modules(graph)
    modules = {
        str(node.target): _describe(graph.module.get_submodule(str(node.target)), str(node.target))
        for node in graph.module.graph.nodes
        if node.op == "call_module"
    }
    nodes = [
        {"module": str(node.target), "inputs": [_label(source) for source in node.args]}
        for node in graph.module.graph.nodes
        if node.op == "call_module"
    ]
    header = {
        "format": FORMAT,
        "version": VERSION,
        "t_max": graph.t_max,
        "input_shape": list(graph.input_shape),
        "output_scale": _numbers(graph.output_scale),
        "output_shift": _numbers(graph.output_shift),
        "settings": graph.settings,
        "report": graph.report,
        "modules": modules,
        "nodes": nodes,
        "front": None if graph.front is None else _describe_front(graph.front),
    }
    tensors = {f"module.{name}": value.contiguous().cpu() for name, value in graph.module.state_dict().items()}
    if graph.front is not None:
        tensors |= {f"front.{name}": value.contiguous().cpu() for name, value in graph.front.state_dict().items()}
    check_finite(tensors)
    tensors |= {f"scale.{name}": value.contiguous().cpu() for name, value in graph.scales.items()}
    write_atomically(path, to_bytes(tensors, metadata={FORMAT: json.dumps(header)}))


def write_atomically(path: str | PathLike[str], data: bytes) -> None:
    """Write `data` to `path` through a temporary file beside it, so that no half of it is ever there."""
    path = Path(path)
    if not path.parent.is_dir():
        raise FileNotFoundError(f"no folder {path.parent} to write {path.name} into")
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def read(path: str | PathLike[str]) -> ConvertedGraph:
    """Read what :func:`write` wrote.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    ValueError
        If it is damaged, truncated, of another kind, or of an unknown version.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no such file: {path}")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(f"{path} is not a readable safetensors file, or it is truncated: {error}") from error
    if FORMAT not in metadata:
        raise ValueError(f"{path} holds no converted network: write one with snn.save(path)")
    try:
        header = json.loads(metadata[FORMAT])
        version = header["version"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: its header is not readable") from error
    if version != VERSION:
        raise ValueError(f"{path} is of version {version!r}, and this package reads version {VERSION}; update it")
    try:
        return _build(header, tensors)
    except _WHAT_DAMAGE_RAISES as error:
        what = f"no {error}" if isinstance(error, KeyError) else str(error).partition("\n")[0]
        raise ValueError(f"{path} is damaged: {what}") from error


def _build(header: dict[str, Any], tensors: dict[str, Tensor]) -> ConvertedGraph:
    weights = {name.removeprefix("module."): t for name, t in tensors.items() if name.startswith("module.")}
    # Cloned: what safetensors gives is the file's memory, and would change with it.
    scales = {name.removeprefix("scale."): t.clone() for name, t in tensors.items() if name.startswith("scale.")}
    _check_header(header)
    check_finite(tensors)
    modules = {path: _rebuild(entry, path, weights) for path, entry in header["modules"].items()}
    graph = fx.Graph()
    built = {INPUT: graph.placeholder(INPUT)}
    last = built[INPUT]
    for entry in header["nodes"]:
        path, inputs = entry["module"], entry["inputs"]
        if path not in modules or path in built:
            raise ValueError(f"no module {path!r}, or it is called twice")
        if not isinstance(inputs, list) or not inputs or any(source not in built for source in inputs):
            raise ValueError(f"{path!r} listens to {inputs!r}, which are no modules before it")
        if len(inputs) > 1 and not isinstance(modules[path], Add | Concatenate):
            raise ValueError(f"{path!r} listens to {len(inputs)} modules, and takes one")
        last = graph.call_module(path, tuple(built[source] for source in inputs))
        built[path] = last
    if len(built) != len(modules) + 1:
        raise ValueError("it holds modules that are never called")
    graph.output(last)
    module = fx.GraphModule(modules, graph, "SpikingGraph")
    module.load_state_dict(weights, strict=True)
    module.eval()
    result = ConvertedGraph(
        module=module,
        t_max=int(header["t_max"]),
        input_shape=tuple(int(size) for size in header["input_shape"]),
        output_scale=_along_outputs(header["output_scale"], scales.get(str(last.target))),
        scales=scales,
        settings=dict(header["settings"]),
        report=list(header["report"]),
        front=_rebuild_front(header["front"], tensors),
        output_shift=_along_outputs(header["output_shift"], scales.get(str(last.target))),
    )
    layers = result.layers
    if not layers or layers[-1].node is not last or {layer.name for layer in layers} != set(scales):
        raise ValueError("its layers and scales do not belong together")
    if not all(bool((scale > 0).all()) for scale in scales.values()):
        raise ValueError("a scale is not positive")
    result.arrivals()
    _check_fit(result)
    if result.front is not None:
        on_meta = copy.deepcopy(result.front).to("meta")
        if tuple(on_meta(torch.empty(2, *result.image_shape, device="meta")).shape[1:]) != result.input_shape:
            raise ValueError("its first layer does not fit the input")
    return result


def _check_fit(graph: ConvertedGraph) -> None:
    """Raise what torch says where one module's values do not fit the next; computes shapes alone."""
    on_meta = copy.deepcopy(graph.module).to("meta")
    values: dict[fx.Node, Tensor] = {}
    for node in on_meta.graph.nodes:
        if node.op == "placeholder":
            values[node] = torch.empty(2, *graph.input_shape, device="meta")
        elif node.op == "call_module":
            module = on_meta.get_submodule(str(node.target))
            source = values[node.all_input_nodes[0]]
            # Neurons keep their input's shape; stepping them would compute.
            values[node] = source if isinstance(module, TTFSNeuron) else call_node(on_meta, node, values)
            reshaped = isinstance(module, OneToOne) and values[node].shape != source.shape
            if len(values[node]) != len(source) or reshaped or values[node][0].numel() > MOST_UNITS:
                raise ValueError(f"{node.target!r} does not fit what it listens to")


def _check_header(header: dict[str, Any]) -> None:
    """Refuse what would go wrong only later, and names that torch.fx would write into code as they are."""
    window_length(header["t_max"])
    shape, scale, settings = header["input_shape"], header["output_scale"], header["settings"]
    if not isinstance(shape, list) or not shape or any(type(size) is not int or size < 1 for size in shape):
        raise ValueError(f"its input shape is {shape!r}")
    if not _are_finite(scale) or not all(each > 0 for each in (scale if isinstance(scale, list) else [scale])):
        raise ValueError(f"its output scale is {scale!r}")
    if not _are_finite(header["output_shift"]):
        raise ValueError(f"its output shift is {header['output_shift']!r}")
    if not isinstance(settings, dict) or settings.get("rectifier") not in ("spike", "silent"):
        raise ValueError("its settings lack the rectifier")
    if settings.get("linear") not in ("compose", "pair") or "preprocessing" not in settings:
        raise ValueError("its settings are incomplete")
    check_task(settings.get("task", CLASSIFICATION))
    report = header["report"]
    if not isinstance(report, list) or not all(_is_row(row) for row in report):
        raise ValueError("its report is no list of rows")
    if not isinstance(header["modules"], dict) or not isinstance(header["nodes"], list):
        raise ValueError("its modules or its nodes are not there")
    for path in header["modules"]:
        parts = path.split(".")
        if any(not _NAME.fullmatch(part) or hasattr(_PLAIN_MODULE, part) for part in parts):
            raise ValueError(f"it names a module {path!r}")


def _is_row(row: Any) -> bool:
    numbers = ("neurons", "scale", "readout", "window", "delay", "synapses", "synapses_factored")
    return (
        isinstance(row, dict)
        and isinstance(row.get("module"), str)
        and all(row.get(name) is None or type(row[name]) in (int, float) for name in numbers)
    )


def check_finite(tensors: dict[str, Tensor]) -> None:
    """Raise ValueError, naming the tensor, for NaN and infinity."""
    for name, tensor in tensors.items():
        if not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"{name} contains NaN or infinity")


def _describe(module: nn.Module, path: str) -> dict[str, Any]:
    if isinstance(module, TTFSNeuron):
        options = {name: getattr(module.p, name) for name in _NEURON}
        return {"class": "TTFSNeuron", **options, "has_bias": module.bias is not None}
    if isinstance(module, FirstSpikeMaxPool):
        return {"class": "FirstSpikeMaxPool", "pool": _describe(module.pool, path)}
    if isinstance(module, OneToOne):
        return {"class": "OneToOne"}
    if type(module) not in ATTRIBUTES:
        raise ValueError(f"cannot save {path!r}: the file format does not know {type(module).__name__}")
    return {
        "class": type(module).__name__,
        **{name: _plain(getattr(module, name)) for name in ATTRIBUTES[type(module)]},
    }


def _rebuild(entry: dict[str, Any], path: str, weights: dict[str, Tensor]) -> nn.Module:
    options: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in entry.items()
    }
    name = options.pop("class")
    if name == "TTFSNeuron":
        has_bias = options.pop("has_bias")
        bias = nn.Parameter(weights[f"{path}.bias"].clone(), requires_grad=False) if has_bias else None
        return TTFSNeuron(**options, bias=bias, init_hidden=True)
    if name == "FirstSpikeMaxPool":
        return FirstSpikeMaxPool(_rebuild(entry["pool"], path, weights), init_hidden=True)
    if name == "OneToOne":
        return OneToOne(weights[f"{path}.weight"])
    kinds: dict[str, Any] = {kind.__name__: kind for kind in ATTRIBUTES}
    if name not in kinds:
        raise ValueError(f"unknown module class {name!r}")
    if name == "AxonalDelay":
        options["init_hidden"] = True
    weight = weights.get(f"{path}.weight")
    if (weight is None) == issubclass(kinds[name], WEIGHTED):
        raise ValueError(f"{path!r} has no weights, or some that it cannot have")
    for option, allowed in _ALLOWED.get(name, {}).items():
        if options.get(option) not in allowed:
            raise ValueError(f"{path!r} has {option}={options.get(option)!r}, which spikes cannot carry out")
    if weight is not None:
        options |= {"bias": False, "dtype": weight.dtype, "device": "meta"}
    module: nn.Module = kinds[name](**options)
    return module if weight is None else module.to_empty(device="cpu").requires_grad_(False)


def _describe_front(front: DenseFirstLayer) -> dict[str, Any]:
    return {
        "layer": _describe(front.layer, "the first layer"),
        "image_shape": list(front.image_shape),
        "has_bias": front.layer.bias is not None,
    }


def _rebuild_front(entry: dict[str, Any] | None, tensors: dict[str, Tensor]) -> DenseFirstLayer | None:
    if entry is None:
        return None
    own = {name.removeprefix("front."): t.clone() for name, t in tensors.items() if name.startswith("front.")}
    options = {name: tuple(value) if isinstance(value, list) else value for name, value in entry["layer"].items()}
    kinds: dict[str, Any] = {kind.__name__: kind for kind in WEIGHTED}
    options |= {"bias": bool(entry["has_bias"]), "dtype": own["layer.weight"].dtype, "device": "meta"}
    layer: nn.Module = kinds[str(options.pop("class"))](**options)
    layer = layer.to_empty(device="cpu").requires_grad_(False)
    front = DenseFirstLayer(layer, own["scale"], entry["image_shape"], own["gain"], own["shift"])
    front.load_state_dict(own, strict=True)
    if not bool((front.scale > 0).all()) or any(type(size) is not int or size < 1 for size in front.image_shape):
        raise ValueError("its first layer is damaged")
    return front


def _are_finite(given: Any) -> bool:
    """Whether these are a finite number or a list of some."""
    numbers = given if isinstance(given, list) else [given]
    return all(type(each) in (int, float) and math.isfinite(each) for each in numbers) and bool(numbers)


def _along_outputs(given: float | list[float], scale: Tensor | None) -> float | Tensor:
    """A number for all outputs, or one for each as the output layer's scales have them."""
    if not isinstance(given, list):
        return float(given)
    if scale is None or scale.numel() != len(given):
        raise ValueError(f"it has {len(given)} output ranges, and its output layer others")
    return torch.tensor(given, dtype=torch.float64).view(scale.shape)


def _numbers(values: float | Tensor) -> float | list[float]:
    return [float(each) for each in values.flatten()] if isinstance(values, Tensor) else values


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple | torch.Size) else value


def _label(node: Any) -> str:
    return INPUT if node.op == "placeholder" else str(node.target)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
