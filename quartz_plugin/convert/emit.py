"""Stage 7, emit: the converted network as an ordinary graph of modules."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx, nn

from quartz_plugin.coding import LARGEST_BIAS
from quartz_plugin.convert.rescale import ScaledLayer, ScaledNetwork
from quartz_plugin.convert.schedule import Schedule
from quartz_plugin.convert.traced import CalibratedNetwork
from quartz_plugin.graph import INPUT, ConvertedGraph, Layer, unique_path
from quartz_plugin.graph.synapses import synapse_counts
from quartz_plugin.neuron import AxonalDelay, FirstSpikeMaxPool, TTFSNeuron
from quartz_plugin.operators.table import ConversionError, Role, row_of_class
from quartz_plugin.task import number_or_tensor


def emit(calibrated: CalibratedNetwork, network: ScaledNetwork, times: Schedule) -> ConvertedGraph:
    """Build the graph of synapses, pools, delays and neurons, and complete the report."""
    folded, config = calibrated.network, calibrated.config
    modules = {path: _first_spikes(module) for path, module in network.modules.items()}
    for node, layer in network.layers.items():
        clock = times.clocks[node]
        modules[layer.name] = TTFSNeuron(
            clock.window + 1,
            hold=config.hold,
            rectifier=config.rectifier if layer.rectified else None,
            # A parameter, so that training reaches it; frozen below, as all are.
            bias=None if layer.bias is None else nn.Parameter(layer.bias),
            bias_code=config.bias,
            readout=clock.readout,
            input_window=clock.input_window,
            init_hidden=True,
        )
    for (node, source), steps in times.delays.items():
        _insert_delay(network, modules, node, source, steps, folded.names())
    network.graph.lint()
    module = fx.GraphModule(modules, network.graph, "SpikingGraph")
    module.eval()
    for name, tensor in module.state_dict().items():
        if not bool(torch.isfinite(tensor).all()):
            raise ConversionError(f"{name} of the spiking network is not finite: the ANN's values overflow its type")
    for parameter in module.parameters():
        parameter.requires_grad_(False)
    layers = list(network.layers.values())
    graph = ConvertedGraph(
        module=module,
        t_max=calibrated.windows[INPUT] + 1,
        input_shape=folded.input_shape,
        output_scale=number_or_tensor(layers[-1].scale),
        scales={layer.name: layer.scale for layer in layers},
        shifts=dict(calibrated.scales.shifts),
        settings=config.to_dict(),
        dense_stem=calibrated.dense_stem,
        output_shift=calibrated.scales.output_shift,
        outputs=folded.outputs,
        inputs=None if folded.inputs.plain else folded.inputs,
    )
    if graph.dense_stem is not None:
        # Its values are those of images in the network's type, which the grids of weights may have widened.
        graph.dense_stem.to(graph.dtype)
    ends = graph.arrivals()
    for layer, emitted in zip(layers, graph.layers, strict=True):
        earliest = min(ends[source] for source in emitted.projection.sources)
        delay = emitted.neuron.clock.readout - earliest
        folded.log(layer.name, **_row(calibrated, layer, emitted, delay))
    clamped = [layer.name for layer in graph.layers if _clamps_bias(layer)]
    if clamped and graph.shifts:
        raise ConversionError(
            f"{next(iter(graph.shifts))!r} pools signed values, and so {clamped[0]!r} needs biases above "
            f'{LARGEST_BIAS}, which no bias spike encodes: give bias="synapse"'
        )
    graph.report = folded.rows()
    synapses = synapse_counts(graph)
    for row in graph.report:
        if (counts := synapses.get(row["module"])) is not None:
            row["synapses"], row["synapses_factored"] = counts
    return graph


def _first_spikes(module: nn.Module) -> nn.Module:
    """A pool of first spikes for one of largest values; any other module as it is."""
    pools = row_of_class(type(module)).role is Role.MAX_POOL
    return FirstSpikeMaxPool(module, init_hidden=True) if pools else module


def _insert_delay(
    network: ScaledNetwork, modules: dict[str, nn.Module], node: fx.Node, source: fx.Node, steps: int, taken: set[str]
) -> None:
    """Delay the path from `source` into `node`, as near to the spikes as no other path is delayed with it."""
    while source not in network.layers and source.op == "call_module" and list(source.users) == [node]:
        if len(source.all_input_nodes) != 1 or isinstance(modules[str(source.target)], FirstSpikeMaxPool):
            break
        node, source = source, source.all_input_nodes[0]
    path = unique_path(f"{node.target}_delay", taken | set(modules))
    modules[path] = AxonalDelay(steps, init_hidden=True)
    with network.graph.inserting_before(node):
        delay = network.graph.call_module(path, (source,))
    node.replace_input_with(source, delay)


def _clamps_bias(layer: Layer) -> bool:
    p = layer.neuron.p
    return p.bias is not None and p.bias_code == "spike" and bool((p.bias.abs() > LARGEST_BIAS).any())


def _row(calibrated: CalibratedNetwork, scaled: ScaledLayer, layer: Layer, delay: int) -> dict[str, Any]:
    """The report's row of a spiking layer."""
    folded = calibrated.network
    row = folded.report.get(scaled.name, {})
    # A signed output's neurons are like those behind a ReLU.
    rectifier = type(folded.module.get_submodule(scaled.name)) if scaled.rectified else nn.ReLU
    clock = layer.neuron.clock
    path = scaled.name if scaled.rectified else str(folded.last.target)
    silent = ", 0 on all calibration images" if path in calibrated.scales.silent else ""
    exact = "exact" if calibrated.config.hold else row_of_class(rectifier).exact_without_hold
    if _clamps_bias(layer):
        exact += f"; biases above {LARGEST_BIAS} are clamped"
    return {
        "operation": row.get("operation", "signed output"),
        "became": ("spiking layer" if scaled.rectified else "output layer") + silent,
        "exact": exact,
        "neurons": int(torch.Size(scaled.shape).numel()),
        "scale": float(scaled.scale.max()),
        "readout": clock.readout,
        "window": clock.window,
        "delay": delay,
    }
