"""Quantisation-aware training: networks that learn with the rounding of their spikes."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any, Unpack

import torch
from torch import Tensor, nn

from quartz_plugin.activation import TTFSActivation
from quartz_plugin.coding import window_length, with_plain_numbers
from quartz_plugin.config import TRAINING, ConversionConfig, Preprocessing, TrainingOptions, configured
from quartz_plugin.convert.check import check
from quartz_plugin.convert.fake_quant import (
    insert_fake_quant,
)
from quartz_plugin.convert.fold import fold
from quartz_plugin.convert.images import Calibration
from quartz_plugin.convert.pipeline import calibrate_traced, trace_network
from quartz_plugin.convert.run import Run
from quartz_plugin.convert.signed_pools import with_shifts
from quartz_plugin.convert.trace import trace
from quartz_plugin.convert.traced import FoldedNetwork, Scales
from quartz_plugin.graph import INPUT
from quartz_plugin.operators.table import NORMS, WEIGHTED, ConversionError, Rule
from quartz_plugin.options import UNSET, with_options
from quartz_plugin.precision import exact_arithmetic
from quartz_plugin.task import Task, check_task
from quartz_plugin.training.trainable import TrainableNetwork, earlier_name
from quartz_plugin.warn import warn


@with_options(ConversionConfig, TrainingOptions, TRAINING)
@with_plain_numbers
@exact_arithmetic()
def prepare_qat(
    ann: nn.Module,
    calibration: Calibration,
    t_max: int | Mapping[str, int] = UNSET,
    *,
    example_input: Tensor | None = None,
    progress: Callable[[int], None] | None = None,
    rules: Mapping[type[nn.Module], Rule] | None = None,
    **options: Unpack[TrainingOptions],
) -> TrainableNetwork:
    r"""Make a network that trains with the rounding of its spikes, from an ANN, trained or not.

    Every ReLU becomes a :class:`TTFSActivation`, :math:`s/S\, clip(\lfloor S y / s + 1/2 \rfloor, 0, S)`, with a
    straight-through gradient and a scale that learns (arXiv:1902.08153). Calibration gives the scales to start from.

    Parameters
    ----------
    ann : nn.Module
        As in :func:`~quartz_plugin.convert`; not modified.
    calibration, example_input, progress, rules
        As in :func:`~quartz_plugin.convert`.
    {options}

    Of calibration methods "percentile", "least_squares" and "search", with "output" if wanted: the rest is what
    training does.

    Returns
    -------
    TrainableNetwork
        In training mode, with gradients on; takes raw images.

    Raises
    ------
    ConversionError
        If the network cannot be converted.
    ValueError
        For bad calibration data, or options that do not go together.

    Examples
    --------
    >>> import torch, quartz_plugin
    >>> _ = torch.manual_seed(0)
    >>> ann = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 2))
    >>> images, labels = torch.rand(64, 6), torch.randint(2, (64,))
    >>> net = quartz_plugin.prepare_qat(ann, images, t_max=4)
    >>> optimizer = torch.optim.Adam(net.parameters(), 1e-2)
    >>> for _ in range(20):
    ...     optimizer.zero_grad()
    ...     nn.functional.cross_entropy(net(images), labels).backward()
    ...     optimizer.step()
    >>> snn = net.eval().to_spiking()
    >>> torch.allclose(snn(images), net(images), atol=1e-5)
    True
    """
    config = configured(TRAINING | options, TrainingOptions, t_max)
    if config.method.refinements - {"output"}:
        raise ValueError(
            f"calibration_method={config.calibration_method!r} changes weights, which is what training does; give "
            '"percentile", "least_squares" or "search", with "+output" if wanted'
        )
    run = Run(example_input, progress, rules=rules)
    traced, images = trace_network(ann, calibration, config, run)
    folded = check(fold(copy.deepcopy(traced), config.preprocessing, trainable=True))
    if not folded.inputs.plain:
        raise ConversionError(
            "prepare_qat trains networks of one input in [0, 1]: leave input_range and clamp_inputs out"
        )
    heads = folded.outputs.heads
    if len(heads) > 1:
        names = ", ".join(head.name for head in heads)
        raise ConversionError(f"prepare_qat trains one output, and this network has several ({names}): return one")
    calibrated = calibrate_traced(ann, traced, images, config, run)
    if missing := {str(node.target) for node in folded.layers()}.symmetric_difference(calibrated.scales.of_layers):
        raise ConversionError(
            f"cannot train {sorted(missing)}: its neurons come about only when batch norms are folded"
        )
    folded = with_shifts(folded, calibrated.scales.shifts)
    return _trainable(folded, calibrated.scales, calibrated.windows, folded.outputs.task(config.task))


def prepare(*args: Any, **kwargs: Any) -> TrainableNetwork:
    """Earlier name of :func:`prepare_qat`."""
    warn("quartz_plugin.prepare is now prepare_qat", DeprecationWarning)
    return prepare_qat(*args, **kwargs)


def _trainable(folded: FoldedNetwork, scales: Scales, windows: Mapping[str, int], task: Task) -> TrainableNetwork:
    """A trainable network with activations of these scales and windows; its batch norms and dropout are alive."""
    module = insert_fake_quant(folded, scales, windows)
    module.train()
    for parameter in module.parameters():
        parameter.requires_grad_(False)
    for each in module.modules():
        if isinstance(each, (TTFSActivation, *NORMS, *WEIGHTED)):
            each.requires_grad_(True)
    net = TrainableNetwork(module, folded.input_shape, task)
    net.output_quantizer.gradient_outside = task == "regression"
    return net


def structure_of(net: TrainableNetwork) -> dict[str, Any]:
    """Plain JSON values that, beside the ANN and the tensors, make a trainable network again."""
    scales = {path: list(each.log_scale.shape) for path, each in net.activation_quantizers().items()}
    return {"t_max": net.t_max, "input_shape": list(net.input_shape), "scales": scales, "task": net.task}


@exact_arithmetic()
def restored(ann: nn.Module, structure: Mapping[str, Any], preprocessing: Preprocessing | None) -> TrainableNetwork:
    """Make a trainable network of the structure that :func:`structure_of` gave; its numbers are to be loaded.

    Raises
    ------
    ConversionError, ValueError
        If the ANN is another.
    """
    parameter = next(ann.parameters())
    example = torch.zeros(1, *structure["input_shape"], dtype=parameter.dtype, device=parameter.device)
    folded = check(fold(trace(ann, example), preprocessing, trainable=True))
    t_max, paths = structure["t_max"], [str(node.target) for node in folded.layers()]
    windows = {path: window_length(t_max[path if path in t_max else "output"]) for path in paths}
    windows |= {INPUT: window_length(t_max[INPUT])} if INPUT in t_max else {}
    task: Task = structure.get("task", ConversionConfig.task)
    check_task(task)
    net = _trainable(folded, Scales({path: torch.ones(()) for path in paths}), windows, task)
    for path, quantizer in net.activation_quantizers().items():
        shapes = structure["scales"]
        shape = shapes[path if path in shapes else earlier_name(path)]
        zeros = torch.zeros(shape, dtype=parameter.dtype, device=parameter.device)
        quantizer.log_scale = nn.Parameter(zeros) if isinstance(quantizer.log_scale, nn.Parameter) else zeros
        if task == "regression" and quantizer.signed:
            quantizer.shift = zeros.clone()
    return net
