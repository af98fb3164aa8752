"""Tuning: the rounded network learns to give what the ANN gives (arXiv:2102.05426, arXiv:1902.08153)."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from quartz_plugin.activation import TTFSActivation
from quartz_plugin.convert.fake_quant import insert_fake_quant, output_code, values_at
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
from quartz_plugin.convert.traced import TracedNetwork
from quartz_plugin.operators.modules import WEIGHTED
from quartz_plugin.task import CLASSIFICATION, Task, number_or_tensor

TUNED_AT_ONCE = 1 << 20
"""Input values of a batch that tuning takes, 10 images at least and 50 at most."""


def reconstruct(
    draft: TracedNetwork,
    scales: Mapping[str, Tensor],
    windows: Mapping[str, int],
    images: Tensor,
    *,
    weights: bool,
    passes: int,
    progress: TuningProgress,
    learning_rate: float,
    task: Task = CLASSIFICATION,
    activations: float = 4.0,
) -> dict[str, Tensor] | None:
    """Let the rounded network learn to give what the ANN gives, in every layer and at the end; returns the scales.

    Where its output is twice as far from the ANN's afterwards, or no number, warn, leave all as it was, return None.
    """
    options = _Tuning(weights, passes, progress, learning_rate, task, activations)
    output = str(draft.last.target)
    factors = _balancing_factors(draft, scales[output]) if task == "regression" else None
    if factors is None:
        return _reconstruct(draft, scales, windows, images, options)
    _scale_outputs(draft, factors)
    learned = _reconstruct(draft, {**scales, output: scales[output] * factors}, windows, images, options)
    _scale_outputs(draft, 1 / factors)
    return None if learned is None else {**learned, output: scales[output]}


@dataclass(frozen=True)
class _Tuning:
    """Options of :func:`reconstruct`."""

    weights: bool
    passes: int
    progress: TuningProgress
    learning_rate: float
    task: Task
    activations: float


def _balancing_factors(draft: TracedNetwork, scale: Tensor) -> Tensor | None:
    """Powers of two that bring a regression's outputs to about one size, so that one learning rate suits all of them.

    None where one layer of weights does not have them all to itself.
    """
    if draft.last.op != "call_module" or not isinstance(module := draft.module_at(draft.last), WEIGHTED):
        return None
    factors = torch.exp2(-scale.log2().round())
    return factors if along_outputs(module, factors) else None


def _scale_outputs(draft: TracedNetwork, factors: Tensor) -> None:
    """Multiply the last layer's outputs by powers of two, exactly; the shift goes with them."""
    layer: Any = draft.module_at(draft.last)
    layer.weight.data.copy_(scaled_weight(layer, torch.ones_like(factors).max(), factors))
    if layer.bias is not None:
        layer.bias.data.mul_(factors.flatten().to(layer.bias))
    draft.output_shift = number_or_tensor(torch.as_tensor(draft.output_shift, dtype=torch.float64) * factors)


def _reconstruct(
    draft: TracedNetwork,
    scales: Mapping[str, Tensor],
    windows: Mapping[str, int],
    images: Tensor,
    options: _Tuning,
) -> dict[str, Tensor] | None:
    learning_rate, task = options.learning_rate, options.task
    teacher, output = copy.deepcopy(draft.module), str(draft.last.target)
    for _, layer in draft.steps():
        if isinstance(layer, WEIGHTED):
            give_bias(draft, layer)
    module = insert_fake_quant(draft, scales, windows)
    groups = parameter_groups(module, learning_rate, weights=options.weights)
    every = {str(node.target) for node in draft.layers()}
    paths = every - {output}
    if images.dim() == 4:
        module, teacher = (each.to(memory_format=torch.channels_last) for each in (module, teacher))  # type: ignore[call-overload]
    batch = max(10, min(50, TUNED_AT_ONCE // images[:1].numel()))
    steps_of_a_pass = math.ceil(len(images) / batch)
    total = options.passes * steps_of_a_pass
    optimizer, schedule = adam(groups, total)
    judged = evenly_of(images, SEARCH_IMAGES)
    size = scales[output]

    def distance() -> float:
        chunks = judged.split(chunk_size(judged))
        with torch.no_grad():
            answers = torch.cat([values_at(module, chunk, {output})[0][output] for chunk in chunks])
            wanted = torch.cat([teacher(chunk) for chunk in chunks])
        return float(output_distance(answers, wanted, task, size))

    before = distance()
    generator = torch.Generator().manual_seed(0)
    with torch.enable_grad():
        for done in range(total):
            if done % steps_of_a_pass == 0:
                order = torch.randperm(len(images), generator=generator)
            place = (done % steps_of_a_pass) * batch
            chosen = images[order[place : place + batch]]
            with torch.no_grad():
                wanted, logits = values_at(teacher, chosen, paths)
            given, _ = values_at(module, chosen, every)
            # The membranes: what the output makes of them is for its own rule.
            answers = given.pop(output)
            loss = output_distance(answers, logits, task, size, TEMPERATURE)
            # At first the layers in front tell best what to do; at last the output decides.
            loss = loss + options.activations * (1 - done / total) * relative_feature_mse(given, wanted)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
            options.progress(min(done + 1, total), total)
    after = distance()
    # Also where it is no number.
    if not after <= 2 * before + NO_DISTANCE:
        warnings.warn(
            f"tuning moved the output away from the ANN's ({DISTANCES[task]} {before:.3g} before, {after:.3g} after) "
            f"and is left out: give a lower tuning_rate than {learning_rate:g}, or more calibration images or "
            "tuning_passes",
            stacklevel=2,
        )
        return None
    return _take_back(draft, module, scales)


def _take_back(draft: TracedNetwork, module: fx.GraphModule, scales: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Put the learned numbers into the draft; returns the scales."""
    found = {}
    with torch.no_grad():
        learned = module.state_dict()
        for name, tensor in draft.module.state_dict().items():
            tensor.copy_(learned[name])
        for path, scale in scales.items():
            code = module.get_submodule(path)
            if not isinstance(code, TTFSActivation):
                code = module.get_submodule(output_code(module))
            assert isinstance(code, TTFSActivation)
            found[path] = code.scale.detach().double().cpu().reshape(scale.shape)
    return found
