"""Checks that a network is like one that conversion made: settings of its modules, roles, clocks, shapes.

Files are checked by it, before one is written and after one is read: what stands here runs in every engine.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from quartz_plugin.coding import Window
from quartz_plugin.functional import check_bias_shape
from quartz_plugin.graph import ConvertedGraph, called_by, is_spike_source, module_nodes
from quartz_plugin.graph.topology import routed_nodes
from quartz_plugin.neuron import AxonalDelay, FirstSpikeMaxPool, TTFSNeuron
from quartz_plugin.operators.gains import IntoWeights
from quartz_plugin.operators.modules import DenseFirstLayer
from quartz_plugin.operators.row import Operator, Role
from quartz_plugin.operators.settings import MOST, MOST_UNITS
from quartz_plugin.operators.table import has_weights, kind_named, row_of, row_of_class

FEW_UNITS, UNITS_FOR_EACH = 2**24, 256
"""Units of one value that any network may have, and more for each unit of its input and each of its weights."""

DTYPES = (torch.float32, torch.float64)
"""Types that hold a membrane."""


def may_stand_alone(row: Operator) -> bool:
    """Check whether a network calls modules of this row; max pools stand inside of FirstSpikeMaxPool."""
    return row.role is not Role.MAX_POOL


def pools_first_spikes(row: Operator) -> bool:
    """Check whether a FirstSpikeMaxPool may hold modules of this row."""
    return row.role is Role.MAX_POOL


def mixes_by_weights(row: Operator) -> bool:
    """Check whether modules of this row have weights of their own that mix units."""
    return isinstance(row.gain, IntoWeights)


def check_settings(entry: Any, path: str, fits: Callable[[Operator], bool]) -> type[nn.Module]:
    """Return the class of a module that a file describes, one whose row `fits`.

    Raises
    ------
    ValueError
        If it is no such class, or a setting is missing, unknown, or none that conversion leaves.
    """
    name = entry.get("class") if isinstance(entry, dict) else None
    kind = kind_named(name) if isinstance(name, str) else None
    row = None if kind is None else row_of_class(kind)
    if kind is None or row is None or row.settings is None or not fits(row):
        raise ValueError(f"{path!r} is of an unknown module class, or of one that cannot stand there: {name!r}")
    for option in entry.keys() - row.settings.keys() - {"class"}:
        raise ValueError(f"{path!r} ({name}) has an unknown setting {option!r}")
    for option, setting in row.settings.items():
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
    for what, given in (("scale", graph.scales), ("shift", graph.shifts)):
        for name, tensor in given.items():
            if not tensor.is_floating_point():
                raise ValueError(f"the {what} of {name!r} is in {tensor.dtype}, no floating-point type")


def _check_calls(module: fx.GraphModule) -> None:
    nodes = list(module_nodes(module))
    if not nodes or not isinstance(nodes[-1][1], TTFSNeuron):
        raise ValueError("the network does not end in a layer of neurons")
    called: set[str] = set()
    for node, each in nodes:
        taken = len(node.args)
        if str(node.target) in called:
            raise ValueError(f"{node.target!r} is called twice; give each call a module of its own")
        if has_weights(each) and each.bias is not None:
            raise ValueError(f"{node.target!r} ({type(each).__name__}) has a bias, which is its neurons' to have")
        called.add(str(node.target))
        row = row_of(each)
        if taken not in (range(1, 2) if row is None else row.inputs):
            raise ValueError(f"{node.target!r} ({type(each).__name__}) cannot take {taken} inputs")
    for node in module.graph.nodes:
        if node.op != "output" and not node.users:
            raise ValueError(f"{str(node.target)!r} has no target: no module takes its values")


def _check_neurons(graph: ConvertedGraph) -> None:
    """All neurons are of one kind, only the last may be without a rectifier, and whole windows reach each."""
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
    row = row_of(module)
    if row is not None:
        row.check(module, sources)
    light = copy.copy(module)
    light._parameters = {
        name: None if parameter is None else torch.empty_like(parameter, device="meta")
        for name, parameter in module._parameters.items()
    }
    with torch.no_grad():
        out: Tensor = light(*sources)
    return out


def _check_pools(module: fx.GraphModule, shapes: Mapping[fx.Node, torch.Size]) -> None:
    """First spikes are pooled of spikes: from neurons or the input, and merely routed on the way."""
    spikes = {node for node in module.graph.nodes if is_spike_source(module, node)}
    spikes |= set(routed_nodes(module, shapes))
    for node, each in module_nodes(module):
        if isinstance(each, FirstSpikeMaxPool) and not spikes.issuperset(node.all_input_nodes):
            raise ValueError(f"{node.target!r} pools currents, and only of spikes the first is the largest")


def _check_scales(graph: ConvertedGraph, shapes: Mapping[fx.Node, torch.Size]) -> None:
    if (names := {layer.name for layer in graph.layers}) != set(graph.scales) or not names.issuperset(graph.shifts):
        raise ValueError("its layers and scales do not belong together")
    for layer in graph.layers:
        scale = graph.scales[layer.name]
        if not bool((scale > 0).all() and torch.isfinite(scale).all()):
            raise ValueError(f"a scale is not positive: that of {layer.name!r}")
        if not _broadcasts(scale, shapes[layer.node]):
            raise ValueError(f"the scale of {layer.name!r} is of shape {list(scale.shape)}, which does not fit it")
        shift = graph.shifts.get(layer.name)
        if shift is not None and not (bool(torch.isfinite(shift).all()) and _broadcasts(shift, shapes[layer.node])):
            raise ValueError(f"the shift of {layer.name!r} is not finite, or does not fit it: {list(shift.shape)}")


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
    """Check whether a tensor is one number, or fits units of this shape without making more of them."""
    try:
        return bool(torch.broadcast_shapes(tensor.shape, tuple(shape)) == tuple(shape))
    except RuntimeError:
        return False


__all__ = [
    "check_network",
    "check_settings",
    "may_stand_alone",
    "mixes_by_weights",
    "pools_first_spikes",
    "shapes_of",
]
