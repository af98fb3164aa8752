"""Files: a converted network as one safetensors file, its structure as JSON in the header. No code."""

from __future__ import annotations

import json
import math
import os
import tempfile
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor, fx, nn

from quartz_plugin.coding import window_length
from quartz_plugin.config import ConversionConfig, without_notes
from quartz_plugin.graph import INPUT, ConvertedGraph, check_modules
from quartz_plugin.graph.wellformed import (
    check_network,
    check_settings,
    may_stand_alone,
    mixes_by_weights,
    pools_first_spikes,
    shapes_of,
)
from quartz_plugin.inputs import Inputs
from quartz_plugin.neuron import FirstSpikeMaxPool, StatefulModule, TTFSNeuron
from quartz_plugin.operators.modules import DenseFirstLayer
from quartz_plugin.operators.table import kind_named, row_of, row_of_class
from quartz_plugin.outputs import Outputs
from quartz_plugin.tables import printable

FORMAT = "quartz_plugin.network"
VERSION = 3

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

MOST_CHARACTERS = 500
"""Length of a message about a file, which may hold names of any length."""

_PLAIN_MODULE = nn.Module()
_DEEPEST = 50
"""Blocks within blocks that a module's path may name: copying a network recurs into them."""


def write(graph: ConvertedGraph, path: str | PathLike[str]) -> None:
    """Write a network to one file, all or nothing.

    Raises
    ------
    OSError
        If the file cannot be written; an older one is then left as it was.
    ValueError
        If the graph holds (put there by hand) what conversion would not make, or a weight is not finite: a file of it
        could not be read.
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
        "front": None if graph.dense_stem is None else _describe_dense_stem(graph.dense_stem),
    }
    if graph.inputs is not None:
        header["inputs"] = graph.inputs.to_json()
    if not graph.outputs.plain:
        header["outputs"] = graph.outputs.to_json()
    try:
        text = json.dumps(header)
        _check_header(json.loads(text))
        check_network(graph)
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"the network cannot be saved: {printable(error, MOST_CHARACTERS)}") from error
    tensors = {f"module.{name}": value.contiguous().cpu() for name, value in graph.module.state_dict().items()}
    if graph.dense_stem is not None:
        tensors |= {f"front.{name}": value.contiguous().cpu() for name, value in graph.dense_stem.state_dict().items()}
    check_finite(tensors)
    tensors |= {f"scale.{name}": value.contiguous().cpu() for name, value in graph.scales.items()}
    tensors |= {f"shift.{name}": value.contiguous().cpu() for name, value in graph.shifts.items()}
    write_atomically(path, to_bytes(tensors, metadata={FORMAT: text}))


_PREFIXES = ("module.", "scale.", "shift.", "front.")
"""What the names of tensors begin with: of modules, layers' scales and shifts, and the first layer's."""


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
        reason = printable(error, MOST_CHARACTERS)
        raise ValueError(f"{path} is not a readable safetensors file, or it is truncated: {reason}") from error
    if FORMAT not in metadata:
        raise ValueError(f"{path} holds no converted network: write one with snn.save(path)")
    try:
        header = json.loads(metadata[FORMAT])
        version = header["version"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: its header is not readable") from error
    if version != VERSION:
        found = printable(repr(version), MOST_CHARACTERS)
        raise ValueError(f"{path} is of version {found}, and this package reads version {VERSION}; update it")
    try:
        return _build(header, tensors)
    except _WHAT_DAMAGE_RAISES as error:
        what = f"no {error}" if isinstance(error, KeyError) else str(error).partition("\n")[0]
        raise ValueError(f"{path} is damaged: {printable(what, MOST_CHARACTERS)}") from error


def _build(header: dict[str, Any], tensors: dict[str, Tensor]) -> ConvertedGraph:
    _check_header(header)
    check_finite(tensors)
    # Cloned: what safetensors gives is the file's memory, and would change with it.
    weights, scales, shifts, front = (
        {name.removeprefix(prefix): t.clone() for name, t in tensors.items() if name.startswith(prefix)}
        for prefix in _PREFIXES
    )
    modules = {path: _rebuild(entry, path, weights) for path, entry in header["modules"].items()}
    graph = fx.Graph()
    built = {INPUT: graph.placeholder(INPUT)}
    last = built[INPUT]
    for entry in header["nodes"]:
        path, inputs = entry["module"], entry["inputs"]
        if path not in modules or path in built:
            raise ValueError(f"no module {path!r}, or it is called twice")
        if not isinstance(inputs, list) or not inputs or any(source not in built for source in inputs):
            raise ValueError(f"{path!r} takes values of {inputs!r}, which are no modules before it")
        last = graph.call_module(path, tuple(built[source] for source in inputs))
        built[path] = last
    if len(built) != len(modules) + 1:
        raise ValueError("it holds modules that are never called")
    graph.output(last)
    module = fx.GraphModule(modules, graph, "SpikingGraph")
    own = module.state_dict().keys()
    strange = next((name for name in tensors if not name.startswith(_PREFIXES)), None)
    if strange is not None or own != weights.keys() or (front and header["front"] is None):
        raise ValueError(f"it holds tensors that belong to no module: {strange or sorted({*weights, *front} - own)}")
    module.eval()
    result = ConvertedGraph(
        module=module,
        t_max=int(header["t_max"]),
        input_shape=tuple(int(size) for size in header["input_shape"]),
        output_scale=_along_outputs(header["output_scale"], scales.get(str(last.target))),
        scales=scales,
        shifts=shifts,
        settings=dict(header["settings"]),
        report=list(header["report"]),
        dense_stem=_rebuild_dense_stem(header["front"], front),
        output_shift=_along_outputs(header["output_shift"], scales.get(str(last.target))),
    )
    check_network(result)
    if "inputs" in header:
        result.inputs = Inputs.from_json(header["inputs"], result.input_shape)
    result.outputs = Outputs.from_json(header.get("outputs"), output_shape(result))
    check_outputs(result)
    return result


def check_outputs(graph: ConvertedGraph) -> None:
    """Raise ValueError where what the host computes does not run on the outputs."""
    shape = output_shape(graph)
    try:
        graph.outputs.results(torch.zeros(2, *shape, dtype=graph.dtype))
    except (RuntimeError, IndexError, TypeError, AttributeError) as error:
        raise ValueError(f"its host program does not run: {str(error).partition(chr(10))[0]}") from error


def output_shape(graph: ConvertedGraph) -> tuple[int, ...]:
    """Shape of the output layer, without the batch."""
    return tuple(shapes_of(graph)[graph.layers[-1].node])


def _check_header(header: dict[str, Any]) -> None:
    """Refuse what would go wrong only later, and names that torch.fx would write into code as they are."""
    window_length(header["t_max"])
    shape, scale, settings = header["input_shape"], header["output_scale"], header["settings"]
    if not _is_shape(shape):
        raise ValueError(f"its input shape is {shape!r}")
    if not _are_finite(scale) or not all(each > 0 for each in (scale if isinstance(scale, list) else [scale])):
        raise ValueError(f"its output scale is {scale!r}")
    if not _are_finite(header["output_shift"]):
        raise ValueError(f"its output shift is {header['output_shift']!r}")
    if not isinstance(settings, dict) or not {"rectifier", "linear", "preprocessing"} <= settings.keys():
        raise ValueError("its settings are incomplete")
    ConversionConfig.from_dict(without_notes(settings))
    report = header["report"]
    if not isinstance(report, list) or not all(_is_row(row) for row in report):
        raise ValueError("its report is no list of rows")
    if not isinstance(header["modules"], dict) or not isinstance(header["nodes"], list):
        raise ValueError("its modules or its nodes are not there")
    for path, entry in header["modules"].items():
        _check_name(path)
        pools = isinstance(entry, dict) and entry.get("class") == FirstSpikeMaxPool.__name__
        if pools and entry.keys() != {"class", "pool"}:
            raise ValueError(f"{path!r} (FirstSpikeMaxPool) holds more or less than a pool")
        check_settings(entry["pool"] if pools else entry, path, pools_first_spikes if pools else may_stand_alone)
    front = header["front"]
    if front is not None:
        if not isinstance(front, dict) or not _is_shape(front["image_shape"]) or type(front["has_bias"]) is not bool:
            raise ValueError("its first layer is damaged")
        check_settings(front["layer"], "the first layer", mixes_by_weights)


def _check_name(path: str) -> None:
    parts = path.split(".")
    plain = all(part and part.isprintable() and not {'"', "\\"} & {*part} for part in parts)
    if not plain or len(parts) > _DEEPEST or any(hasattr(_PLAIN_MODULE, part) for part in parts):
        raise ValueError(f"it names a module {path!r}")


def _is_shape(shape: Any) -> bool:
    return isinstance(shape, list) and bool(shape) and all(type(size) is int and size >= 1 for size in shape)


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
    if isinstance(module, FirstSpikeMaxPool):
        return {"class": "FirstSpikeMaxPool", "pool": _describe(module.pool, path)}
    row = row_of(module)
    if row is None or row.settings is None or kind_named(type(module).__name__) is not type(module):
        raise ValueError(f"cannot save {path!r}: the file format does not know {type(module).__name__}")
    if isinstance(module, TTFSNeuron):
        options = {name: getattr(module.p, name) for name in row.settings if name != "has_bias"}
        return {"class": "TTFSNeuron", **options, "has_bias": module.bias is not None}
    return {"class": type(module).__name__, **{name: _plain(getattr(module, name)) for name in row.settings}}


def _rebuild(entry: dict[str, Any], path: str, weights: dict[str, Tensor]) -> nn.Module:
    """Make a module by settings that have been checked; its weights are those given, so nothing is made up for it."""
    if entry["class"] == FirstSpikeMaxPool.__name__:
        return FirstSpikeMaxPool(_rebuild(entry["pool"], path, weights), init_hidden=True)
    kind, options = _kind_and_settings(entry)
    own = {name.removeprefix(f"{path}."): tensor for name, tensor in weights.items() if name.startswith(f"{path}.")}
    if issubclass(kind, StatefulModule):
        options["init_hidden"] = True
    if kind is TTFSNeuron and options.pop("has_bias"):
        options["bias"] = nn.Parameter(weights[f"{path}.bias"], requires_grad=False)
    module = row_of_class(kind).rebuild(kind, options, own)
    return module if issubclass(kind, StatefulModule) else _with_weights(module, path, weights)


def _kind_and_settings(entry: dict[str, Any]) -> tuple[type[nn.Module], dict[str, Any]]:
    kind = kind_named(entry["class"])
    assert kind is not None
    return kind, {name: _tupled(value) for name, value in entry.items() if name != "class"}


def _with_weights(module: nn.Module, path: str, weights: dict[str, Tensor]) -> nn.Module:
    """Give a module without data its parameters, where they are of its shapes."""
    for name, parameter in module.named_parameters():
        own = weights[f"{path}.{name}"]
        if own.shape != parameter.shape:
            raise ValueError(f"{path}.{name} is of shape {list(own.shape)}, expected {list(parameter.shape)}")
        setattr(module, name, nn.Parameter(own, requires_grad=False))
    return module


def _describe_dense_stem(front: DenseFirstLayer) -> dict[str, Any]:
    return {
        "layer": _describe(front.layer, "the first layer"),
        "image_shape": list(front.image_shape),
        "has_bias": front.layer.bias is not None,
    }


def _rebuild_dense_stem(entry: dict[str, Any] | None, own: dict[str, Tensor]) -> DenseFirstLayer | None:
    if entry is None:
        return None
    kind, options = _kind_and_settings(entry["layer"])
    layer = row_of_class(kind).rebuild(kind, options | {"bias": entry["has_bias"]}, own)
    layer = _with_weights(layer, "layer", own)
    front = DenseFirstLayer(layer, own["scale"], entry["image_shape"], own["gain"], own["shift"])
    if front.state_dict().keys() != own.keys():
        raise ValueError("its first layer is damaged")
    return front


def _are_finite(given: Any) -> bool:
    """Check that these are a finite number or a list of some."""
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


def _tupled(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple | torch.Size) else value


def _label(node: Any) -> str:
    return INPUT if node.op == "placeholder" else str(node.target)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
