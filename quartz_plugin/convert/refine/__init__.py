r"""Tune, between calibrate and rescale: scales, biases and weights that suit the rounding, without labels.

Held neurons say :math:`s/S\, clip(\lfloor S y / s + 1/2 \rfloor, 0, S)`, so the spiking network is the ANN with clipped
and rounded activations, and what is known of quantised networks holds for it: scales that a search finds, biases that
make up for the mean error of rounding (arXiv:1906.04721), layers that learn to give what the ANN's gave
(arXiv:2102.05426, arXiv:1902.08153). All of it sees unlabelled training images only, and changes numbers alone: what is
emitted afterwards is a network like any other.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from quartz_plugin.calibration_methods import BiasCorrection, CalibrationMethod, Distill, OutputRange, Search, Tuning
from quartz_plugin.config import ConversionConfig
from quartz_plugin.convert.images import chunk_size, evenly_of
from quartz_plugin.convert.refine.bias_correction import correct_biases
from quartz_plugin.convert.refine.output_range import RANGE_VALUES, output_range
from quartz_plugin.convert.refine.search import search_scales
from quartz_plugin.convert.refine.tuning import reconstruct
from quartz_plugin.convert.run import TuningProgress
from quartz_plugin.convert.traced import TracedNetwork
from quartz_plugin.task import decide


def refine(
    draft: TracedNetwork,
    scales: Mapping[str, Tensor],
    windows: Mapping[str, int],
    images: Tensor,
    config: ConversionConfig,
    progress: TuningProgress,
) -> tuple[dict[str, Tensor], CalibrationMethod]:
    """Carry out what a method names besides percentiles and least squares; changes the draft.

    Parameters
    ----------
    draft : TracedNetwork
        The folded, checked network.
    scales : dict
        Path -> scale of each ReLU and of the output.
    windows : dict
        Path of each ReLU and of the output, and "input" -> steps of its window.
    images : Tensor
        Training images, ``[N, ...]``.
    config : ConversionConfig
        Method, passes and rate of what learns, and the task.
    progress : callable
        Called with the steps done and those to do.

    Returns
    -------
    dict, CalibrationMethod
        The scales, and what they come from: the method without what was left out.
    """
    found, method, task = dict(scales), config.method, config.task
    output = str(draft.last.target)
    ranged = evenly_of(images, RANGE_VALUES // max(1, math.prod(draft.shape_at(draft.last))))
    wanted = torch.cat([draft.output(chunk) for chunk in ranged.split(chunk_size(images))])
    wanted = decide(wanted) if task == "classification" else wanted
    if method.find(Search):
        found = search_scales(draft, found, windows, images, task, progress)
    if method.find(BiasCorrection):
        correct_biases(draft, found, windows, images)
    if method.find(OutputRange):
        found[output], draft.output_shift = output_range(draft, found, windows, ranged, wanted, task)
    if learned := method.find(Tuning):
        tuned = reconstruct(
            draft, found, windows, images,
            weights=isinstance(learned, Distill), passes=config.tuning_passes, learning_rate=config.tuning_rate,
            task=task, progress=progress,
        )  # fmt: skip
        if tuned is None:
            return found, method.without(Tuning)
        found = tuned
        if method.find(OutputRange):
            found[output], draft.output_shift = output_range(draft, found, windows, ranged, wanted, task)
    return found, method


__all__ = ["refine"]
