r"""Refine, between calibrate and rescale: scales, biases and weights that suit the rounding, without labels.

Held neurons encode :math:`s/S\, clip(\lfloor S y / s + 1/2 \rfloor, 0, S)`, so the spiking network is the ANN with
clipped and rounded activations, and what is known of quantised networks holds for it: scales that a search finds,
biases that make up for the mean error of rounding (arXiv:1906.04721), layers that learn to give what the ANN's gave
(arXiv:2102.05426, arXiv:1902.08153). All of it sees unlabelled training images only, and changes numbers alone: what is
emitted afterwards is a network like any other.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping

import torch
from torch import Tensor

from quartz_plugin.calibration_methods import BiasCorrection, CalibrationMethod, OutputRange, Search, Tuning
from quartz_plugin.config import ConversionConfig
from quartz_plugin.convert.images import chunk_size, evenly_of
from quartz_plugin.convert.refine.bias_correction import correct_biases
from quartz_plugin.convert.refine.output_range import RANGE_VALUES, choose_output_range
from quartz_plugin.convert.refine.search import search_scales
from quartz_plugin.convert.refine.tuning import tune
from quartz_plugin.convert.run import TuningProgress
from quartz_plugin.convert.traced import FoldedNetwork, Scales
from quartz_plugin.task import decide


def refine(
    network: FoldedNetwork,
    scales: Scales,
    windows: Mapping[str, int],
    images: Tensor,
    config: ConversionConfig,
    progress: TuningProgress,
) -> tuple[Scales, CalibrationMethod]:
    """Carry out the steps of a method behind percentiles and least squares; weights change in place.

    Parameters
    ----------
    network : FoldedNetwork
        The folded, checked network.
    scales : Scales
        Of each ReLU and of the output.
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
    Scales, CalibrationMethod
        The scales, and what they come from: the method without what was left out.
    """
    method, task = config.method, network.outputs.task(config.task)
    if method.find(OutputRange) and len(network.outputs.heads) > 1:
        names = ", ".join(head.name for head in network.outputs.heads)
        raise ValueError(
            f'calibration_method={config.calibration_method!r} chooses the range of one output ("output"), and this '
            f'network has several ({names}): leave "output" out, as "least_squares+distill" does'
        )
    # The ANN as it is before any step changes its numbers.
    teacher = copy.deepcopy(network.module) if method.find(Tuning) else None
    ranged = evenly_of(images, RANGE_VALUES // max(1, math.prod(network.shape_at(network.last))))
    wanted = torch.cat([network.output(chunk) for chunk in ranged.split(chunk_size(images))])
    wanted = decide(wanted) if task == "classification" else wanted
    if method.find(Search):
        scales = search_scales(network, scales, windows, images, config, progress)
    if method.find(BiasCorrection):
        correct_biases(network, scales, windows, images)
    if method.find(OutputRange):
        scales = choose_output_range(network, scales, windows, ranged, wanted, task)
    if teacher is not None:
        tuned = tune(network, teacher, scales, windows, images, config, progress)
        if tuned is None:
            return scales, method.without(Tuning)
        scales = tuned
        if method.find(OutputRange):
            scales = choose_output_range(network, scales, windows, ranged, wanted, task)
    return scales, method


__all__ = ["refine"]
