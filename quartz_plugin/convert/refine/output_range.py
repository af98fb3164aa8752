"""Output range: that with which the first spikes agree most often with the ANN, or values most nearly."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from quartz_plugin.activation import TTFSActivation
from quartz_plugin.convert.fake_quant import insert_fake_quant, output_quantizer_of
from quartz_plugin.convert.images import chunk_size, evenly_of
from quartz_plugin.convert.traced import FoldedNetwork, Scales
from quartz_plugin.functional import closed_form, fake_quantize
from quartz_plugin.task import CLASSIFICATION, Task, by_output, class_scores, single_logit

RANGE_VALUES, RANGE_DECISIONS = 1 << 26, 1 << 17
"""Values of all outputs, and decisions, by which the output's range is chosen, at most; evenly spread."""


def choose_output_range(
    network: FoldedNetwork,
    scales: Scales,
    windows: Mapping[str, int],
    images: Tensor,
    wanted: Tensor,
    task: Task,
) -> Scales:
    """Scales with :func:`best_range` of the network's output; where that finds none, with the range it has.

    Parameters
    ----------
    network, scales, windows
        The network with its scales and windows.
    images : Tensor
        Training images.
    wanted : Tensor
        Classes that the ANN decided for; of a regression its outputs.
    task : "classification" or "regression"
        What the output means.
    """
    module = insert_fake_quant(network, scales, windows)
    quantizer = output_quantizer_of(module)
    found = best_range(quantizer, drives_of(module, quantizer, images), wanted, task)
    if found is None:
        return scales
    scale, shift = found
    own = {str(network.last.target): torch.as_tensor(scale, dtype=torch.float64).cpu()}
    return replace(scales, of_layers=scales.of_layers | own, output_shift=shift)


def drives_of(module: nn.Module, quantizer: TTFSActivation, images: Tensor) -> Tensor:
    """Inputs of the output's activation on these images, of the output's shape."""
    drives: list[Tensor] = []
    hook = quantizer.register_forward_pre_hook(lambda _, given: drives.append(given[0]))
    try:
        with torch.no_grad():
            for chunk in images.split(chunk_size(images)):
                module(chunk)
    finally:
        hook.remove()
    return torch.cat(drives)


def best_range(
    quantizer: TTFSActivation, drives: Tensor, wanted: Tensor, task: Task = CLASSIFICATION
) -> tuple[float | Tensor, float | Tensor] | None:
    """The output's scale and shift with which the spikes agree most often, or most nearly, with what is wanted.

    The output encodes values from ``shift - scale`` to ``shift + scale`` (a ReLU: from 0, without a shift). A narrow
    range clips the largest outputs to one value, a wide one rounds them to one; where between them least is lost,
    depends on the window.

    Parameters
    ----------
    quantizer : TTFSActivation
        The output's.
    drives : Tensor
        Its inputs, ``[B, ...]``.
    wanted : Tensor
        Classes ``[B]``, or ``[B, ...]`` where every position is a decision; of a regression values of the drives'
        shape.
    task : "classification" or "regression"
        What the output means. Of several first spikes each counts its share; a regression's outputs each have the range
        of the least squared error.

    Returns
    -------
    (scale, shift) or None
        Numbers, of a regression tensors ``[outputs, 1, ...]``. None where the drives are not finite, or all 0.
    """
    largest = float(drives.abs().max())
    if not math.isfinite(largest) or largest == 0.0:
        return None
    with torch.no_grad():
        if task == "regression":
            return _nearest_range(quantizer, drives, wanted)
        return _agreeing_range(quantizer, drives, wanted)


def _agreeing_range(quantizer: TTFSActivation, drives: Tensor, wanted: Tensor) -> tuple[float, float]:
    """The range with which the first spike decides most often as wanted."""
    single, logits, wanted = single_logit(drives), class_scores(drives), wanted.flatten()
    window = quantizer.window
    if single and quantizer.signed:
        # Half a step beside 0, none of its values is 0, and its sign is that of its drive, whatever the range.
        scale = float(logits.abs().max()) / (1 - 1 / (2 * window))
        return scale, scale / (2 * window)
    logits, wanted = (logits, wanted) if bool((wanted >= 0).all()) else (logits[wanted >= 0], wanted[wanted >= 0])
    logits, wanted = (evenly_of(each, RANGE_DECISIONS) for each in (logits, wanted))
    largest, lowest = float(logits.abs().max()), -window if quantizer.signed else 0
    ends = float(logits.min()), float(logits.max())
    shifts = torch.linspace(*ends, 41, dtype=logits.dtype).tolist() if quantizer.signed else []
    best = -1.0, largest, 0.0
    for scale in (largest * 0.93**power for power in range(44)):
        for shift in (0.0, *shifts):
            levels = closed_form((logits - shift) * (window / scale), window, lowest)
            first = levels == levels.amax(dim=1, keepdim=True)
            share = first.gather(1, wanted.unsqueeze(1)).squeeze(1) / first.sum(dim=1)
            best = max(best, (float(share.mean()), scale, shift))
    return min(best[1], quantizer.ceiling or best[1]), best[2]


def _nearest_range(quantizer: TTFSActivation, drives: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """Each output's range with which its values are nearest to those wanted, in squares."""
    shape = [1] * (drives.dim() - 2)
    given, wanted = (evenly_of(by_output(each).double().T, RANGE_DECISIONS).T for each in (drives, wanted))
    window, lowest = quantizer.window, -quantizer.window if quantizer.signed else 0
    low, high = wanted.amin(dim=1, keepdim=True), wanted.amax(dim=1, keepdim=True)
    middle = (low + high) / 2 if quantizer.signed else torch.zeros_like(low)
    reach = (high - low) / 2 if quantizer.signed else high
    reach = torch.where(reach > 0, reach, torch.where(middle != 0, middle.abs(), torch.ones_like(reach)))
    if quantizer.ceiling is not None:
        reach = reach.clamp(max=quantizer.ceiling)
    least, best_scale, best_shift = torch.full_like(middle, math.inf), reach, middle
    for scale in (reach * 0.97**power for power in range(44)):
        for aside in (-0.5, -0.25, 0.0, 0.25, 0.5) if quantizer.signed else (0.0,):
            # A narrower range may lie anywhere within the whole one.
            shift = middle + 2 * aside * (reach - scale)
            error = (
                (fake_quantize(given - shift, scale, window, lowest) + shift - wanted)
                .square()
                .mean(dim=1, keepdim=True)
            )
            better = error < least
            least = torch.where(better, error, least)
            best_scale, best_shift = (
                torch.where(better, new, old) for new, old in ((scale, best_scale), (shift, best_shift))
            )
    if len(best_scale) == 1:
        return best_scale.reshape(()), best_shift.reshape(())
    return best_scale.view(-1, *shape), best_shift.view(-1, *shape)
