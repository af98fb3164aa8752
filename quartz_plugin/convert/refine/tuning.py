"""Tuning: the rounded network learns to give what the ANN gives (arXiv:2102.05426, arXiv:1902.08153)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx

from quartz_plugin.activation import TTFSActivation
from quartz_plugin.calibration_methods import Distill
from quartz_plugin.config import ConversionConfig
from quartz_plugin.convert.fake_quant import insert_fake_quant, output_quantizer_of, values_at
from quartz_plugin.convert.images import chunk_size, evenly_of
from quartz_plugin.convert.refine.bias_correction import give_bias
from quartz_plugin.convert.refine.distance import (
    DISTANCES,
    NO_DISTANCE,
    TEMPERATURE,
    output_distance,
    relative_feature_mse,
)
from quartz_plugin.convert.refine.learning import adam, parameter_groups
from quartz_plugin.convert.refine.search import SEARCH_IMAGES
from quartz_plugin.convert.rescale import along_outputs, scaled_weight
from quartz_plugin.convert.run import TuningProgress
from quartz_plugin.convert.traced import FoldedNetwork, Scales
from quartz_plugin.operators.table import WEIGHTED
from quartz_plugin.task import Task, number_or_tensor
from quartz_plugin.warn import warn

TUNED_AT_ONCE = 1 << 20
"""Input values of a batch that tuning takes, 10 images at least and 50 at most."""


ACTIVATIONS = 4.0
"""Weight of the layers' errors in what tuning minimises, at its beginning."""


def tune(
    network: FoldedNetwork,
    teacher: fx.GraphModule,
    scales: Scales,
    windows: Mapping[str, int],
    images: Tensor,
    config: ConversionConfig,
    progress: TuningProgress,
) -> Scales | None:
    """Let the rounded network learn to give what the ANN gives, in every layer and at the end; returns the scales.

    The ANN is the `teacher`: the network's module with the numbers that it had before any were corrected. Where the
    output is twice as far from the ANN's afterwards, or no number, warn, leave all as it was, return None.
    """
    output = str(network.last.target)
    size = scales.of_layers[output]
    factors = _balancing_factors(network, size) if network.outputs.task(config.task) == "regression" else None
    if factors is None:
        return _tune(network, teacher, scales, windows, images, config, progress)
    shift = torch.as_tensor(scales.output_shift, dtype=torch.float64)
    balanced = replace(
        scales, of_layers=scales.of_layers | {output: size * factors}, output_shift=number_or_tensor(shift * factors)
    )
    for module in (network.module, teacher):
        _scale_outputs(module, output, factors)
    learned = _tune(network, teacher, balanced, windows, images, config, progress)
    _scale_outputs(network.module, output, 1 / factors)
    return None if learned is None else replace(scales, of_layers=learned.of_layers | {output: size})


def _balancing_factors(network: FoldedNetwork, scale: Tensor) -> Tensor | None:
    """Powers of two that bring a regression's outputs to about one size, so that one learning rate suits all of them.

    None where one layer of weights does not have them all to itself.
    """
    if network.last.op != "call_module" or not isinstance(module := network.module_at(network.last), WEIGHTED):
        return None
    factors = torch.exp2(-scale.log2().round())
    return factors if along_outputs(module, factors) else None


def _scale_outputs(module: fx.GraphModule, path: str, factors: Tensor) -> None:
    """Multiply the outputs of the layer at a path by powers of two, exactly."""
    layer: Any = module.get_submodule(path)
    layer.weight.data.copy_(scaled_weight(layer, torch.ones_like(factors).max(), factors))
    if layer.bias is not None:
        layer.bias.data.mul_(factors.flatten().to(layer.bias))


def _tune(
    network: FoldedNetwork,
    teacher: fx.GraphModule,
    scales: Scales,
    windows: Mapping[str, int],
    images: Tensor,
    config: ConversionConfig,
    progress: TuningProgress,
) -> Scales | None:
    for _, layer in network.steps():
        if isinstance(layer, WEIGHTED):
            give_bias(network, layer)
    module = insert_fake_quant(network, scales, windows)
    weights = config.method.find(Distill) is not None
    groups = parameter_groups(module, config.tuning_rate, weights=weights)
    if images.dim() == 4:
        module, teacher = (each.to(memory_format=torch.channels_last) for each in (module, teacher))  # type: ignore[call-overload]
    tuning = _Tuning(network, module, teacher, scales, network.outputs.task(config.task))
    before = tuning.distance(images)
    tuning.learn(groups, images, config.tuning_passes, progress)
    after = tuning.distance(images)
    # Also where it is no number.
    if not after <= 2 * before + NO_DISTANCE:
        warn(
            f"tuning moved the output away from the ANN's ({DISTANCES[tuning.task]} {before:.3g} before, {after:.3g} "
            f"after) and is left out: give a lower tuning_rate than {config.tuning_rate:g}, or more calibration images "
            "or tuning_passes"
        )
        return None
    return _take_back(network, module, scales)


class _Tuning:
    """A rounded network that learns from its ANN."""

    def __init__(
        self, network: FoldedNetwork, module: fx.GraphModule, teacher: fx.GraphModule, scales: Scales, task: Task
    ) -> None:
        self.module, self.teacher, self.task = module, teacher, task
        self.output = str(network.last.target)
        self.paths = {str(node.target) for node in network.layers()}
        self.size = scales.of_layers[self.output]

    def distance(self, images: Tensor) -> float:
        """Distance of the output from the ANN's on some of the images."""
        chunks = (judged := evenly_of(images, SEARCH_IMAGES)).split(chunk_size(judged))
        with torch.no_grad():
            given = torch.cat([values_at(self.module, chunk, {self.output})[0][self.output] for chunk in chunks])
            wanted = torch.cat([self.teacher(chunk) for chunk in chunks])
        return float(output_distance(given, wanted, self.task, self.size))

    def learn(self, groups: list[dict[str, Any]], images: Tensor, passes: int, progress: TuningProgress) -> None:
        """See all images so many times."""
        batch = max(10, min(50, TUNED_AT_ONCE // images[:1].numel()))
        steps_of_a_pass = math.ceil(len(images) / batch)
        total = passes * steps_of_a_pass
        optimizer, schedule = adam(groups, total)
        generator = torch.Generator().manual_seed(0)
        with torch.enable_grad():
            for done in range(total):
                if done % steps_of_a_pass == 0:
                    order = torch.randperm(len(images), generator=generator)
                place = (done % steps_of_a_pass) * batch
                loss = self.loss(images[order[place : place + batch]], done / total)
                optimizer.zero_grad(set_to_none=True)
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                schedule.step()
                progress(min(done + 1, total), total)

    def loss(self, images: Tensor, progress: float) -> Tensor:
        """Distance of the output and of all layers, of which the latter count for less the further learning is."""
        with torch.no_grad():
            wanted, logits = values_at(self.teacher, images, self.paths - {self.output})
        given, _ = values_at(self.module, images, self.paths)
        # The membranes: what the output makes of them is for its own rule.
        answers = given.pop(self.output)
        loss = output_distance(answers, logits, self.task, self.size, TEMPERATURE)
        # At first the layers in front are the better guide; at last the output decides.
        return loss + ACTIVATIONS * (1 - progress) * relative_feature_mse(given, wanted)


def _take_back(network: FoldedNetwork, module: fx.GraphModule, scales: Scales) -> Scales:
    """Put the learned numbers into the network; returns the scales."""
    found = {}
    with torch.no_grad():
        learned = module.state_dict()
        for name, tensor in network.module.state_dict().items():
            tensor.copy_(learned[name])
        for path, scale in scales.of_layers.items():
            quantizer = module.get_submodule(path)
            if not isinstance(quantizer, TTFSActivation):
                quantizer = output_quantizer_of(module)
            found[path] = quantizer.scale.detach().double().cpu().reshape(scale.shape)
    return replace(scales, of_layers=found)
