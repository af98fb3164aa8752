"""Search: one layer's scales after the other, by what the network's output becomes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, fx

from quartz_plugin.activation import TTFSActivation
from quartz_plugin.config import ConversionConfig
from quartz_plugin.convert.fake_quant import all_values, insert_fake_quant, values_behind
from quartz_plugin.convert.images import some_of
from quartz_plugin.convert.refine.distance import output_distance
from quartz_plugin.convert.run import TuningProgress
from quartz_plugin.convert.traced import FoldedNetwork, Scales

SEARCH_IMAGES = 256
"""Images that the search looks at."""

FACTORS = (0.5, 0.6, 0.7, 0.8, 0.9, 1.12, 1.26)
"""Factors that the search tries on a layer's scales, besides 1."""


def search_scales(
    network: FoldedNetwork,
    scales: Scales,
    windows: Mapping[str, int],
    images: Tensor,
    config: ConversionConfig,
    progress: TuningProgress,
) -> Scales:
    """Multiply one layer's scales after the other by what brings the network's output nearest to the ANN's.

    Nearest is least in :func:`output_distance`.
    """
    images = some_of(images, SEARCH_IMAGES)
    module = insert_fake_quant(network, scales, windows)
    found = {path: scale.clone() for path, scale in scales.of_layers.items()}
    nodes = list(module.graph.nodes)
    layers = [n for n in nodes if n.op == "call_module" and str(n.target) in found and _is_quantizer(module, n)]
    (last,) = nodes[-1].all_input_nodes
    task, size = network.outputs.task(config.task), scales.of_layers[str(network.last.target)]
    with torch.no_grad():
        wanted = network.output(images)
        values = all_values(module, images)
        least = float(output_distance(values[last], wanted, task, size))
        kept = values
        for done, layer in enumerate(layers):
            path, (source,) = str(layer.target), layer.all_input_nodes
            quantizer = module.get_submodule(path)
            assert isinstance(quantizer, TTFSActivation)
            best = 1.0
            for factor in FACTORS:
                quantizer.log_scale.add_(math.log(factor))
                tried = values_behind(module, layer, values | {layer: quantizer(values[source])})
                quantizer.log_scale.sub_(math.log(factor))
                if (distance := float(output_distance(tried[last], wanted, task, size))) < least:
                    least, best, kept = distance, factor, tried
            if best != 1.0:
                quantizer.log_scale.add_(math.log(best))
                found[path] = quantizer.scale.double().cpu()
                values = kept
            progress(done + 1, len(layers))
    return replace(scales, of_layers=found)


def _is_quantizer(module: fx.GraphModule, node: fx.Node) -> bool:
    return isinstance(module.get_submodule(str(node.target)), TTFSActivation)
