"""Stage 7, emit: the converted network as an ordinary graph of modules."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from quartz_plugin.coding import NeuronClock, Window
from quartz_plugin.convert.draft import Draft
from quartz_plugin.convert.rescale import ScaledLayer
from quartz_plugin.convert.schedule import delay_of
from quartz_plugin.functional import BiasCode, Rectifier
from quartz_plugin.graph import INPUT, ConvertedGraph, unique_name
from quartz_plugin.neuron import MAX_POOLS, AxonalDelay, FirstSpikeMaxPool, TTFSNeuron


@dataclass(frozen=True)
class NeuronKind:
    """Which of the neurons to emit: hold, rectifier and bias code."""

    hold: bool = True
    rectifier: Rectifier = "spike"
    bias: BiasCode = "synapse"


def emit(
    draft: Draft,
    layers: list[ScaledLayer],
    clocks: list[NeuronClock],
    t_max: int,
    kind: NeuronKind,
    settings: dict[str, Any],
) -> ConvertedGraph:
    """Build the graph of synapses, pools, delays and neurons, and complete the report."""
    graph = fx.Graph()
    modules: dict[str, nn.Module] = {}
    node = graph.placeholder(INPUT)

    def append(path: str, module: nn.Module) -> None:
        nonlocal node
        if isinstance(module, MAX_POOLS):
            module = FirstSpikeMaxPool(module, init_hidden=True)
        modules[path] = module
        node = graph.call_module(path, (node,))

    source = Window.of_input(t_max)
    for layer, clock in zip(layers, clocks, strict=True):
        delay = delay_of(clock, source)
        if delay:
            append(
                unique_name(f"{layer.name}_delay", draft.names() | set(modules)),
                AxonalDelay(delay, init_hidden=True),
            )
        for path, module in [*layer.pools, *layer.synapses]:
            append(path, module)
        rectifier = kind.rectifier if layer.rectified else None
        neuron = TTFSNeuron(
            clock.window + 1,
            hold=kind.hold,
            rectifier=rectifier,
            bias=layer.bias,
            bias_code=kind.bias,
            readout=clock.readout,
            input_window=clock.input_window,
            init_hidden=True,
        )
        append(layer.name, neuron)
        source = clock.output_window
        draft.log(
            layer.name,
            operation=draft.report.get(layer.name, {}).get("operation", "signed output"),
            became="spiking layer" if layer.rectified else "output layer",
            exact="exact" if kind.hold else "exact but for early spikes",
            neurons=int(torch.Size(layer.shape).numel()),
            scale=float(layer.scale.max()),
            readout=clock.readout,
            window=clock.window,
            delay=delay,
        )
    graph.output(node)
    module = fx.GraphModule(modules, graph, "SpikingGraph")
    module.eval()
    for parameter in module.parameters():
        parameter.requires_grad_(False)
    rows = [{key: value for key, value in row.items() if key != "moved"} for row in draft.report.values()]
    return ConvertedGraph(
        module=module,
        t_max=t_max,
        input_shape=draft.input_shape,
        output_scale=float(layers[-1].scale.max()),
        scales={layer.name: layer.scale for layer in layers},
        settings=settings,
        report=rows,
    )
