"""Conversion, in stages that can be read one after the other.

trace -> fold -> check -> calibrate (-> refine) -> rescale (-> quantize) -> schedule -> emit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any, Unpack

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from quartz_plugin.calibration_methods import CalibrationMethod
from quartz_plugin.coding import at_least_float32, check_unit_interval, with_plain_numbers
from quartz_plugin.config import ConversionConfig, ConversionOptions, InputRange, Linear, Preprocessing, configured
from quartz_plugin.convert.calibrate import calibrate
from quartz_plugin.convert.check import check
from quartz_plugin.convert.dense import compute_first_layer
from quartz_plugin.convert.emit import emit
from quartz_plugin.convert.fold import fold
from quartz_plugin.convert.images import Calibration, inputs_of, peek
from quartz_plugin.convert.own_options import own_options, refuse_other_training, refuse_processes, windows_of
from quartz_plugin.convert.processes import raise_on_all_ranks
from quartz_plugin.convert.programs import as_network
from quartz_plugin.convert.quantize import quantize
from quartz_plugin.convert.refine import refine
from quartz_plugin.convert.rescale import rescale
from quartz_plugin.convert.run import Run, TuningProgress
from quartz_plugin.convert.schedule import schedule
from quartz_plugin.convert.signed_pools import with_shifts
from quartz_plugin.convert.trace import trace
from quartz_plugin.convert.traced import CalibratedNetwork, FoldedNetwork, Scales, TracedNetwork
from quartz_plugin.graph import INPUT
from quartz_plugin.inputs import Inputs
from quartz_plugin.network import SpikingNetwork
from quartz_plugin.operators.modules import in_eval_mode
from quartz_plugin.operators.table import ConversionError, Rule, ceiling_of
from quartz_plugin.options import UNSET, with_options
from quartz_plugin.precision import exact_arithmetic
from quartz_plugin.warn import warn


@with_options(ConversionConfig, ConversionOptions)
@with_plain_numbers
@exact_arithmetic()
def convert(
    ann: nn.Module,
    calibration: Calibration,
    t_max: int | Mapping[str, int] = UNSET,
    *,
    config: ConversionConfig | None = None,
    example_input: Tensor | tuple[Tensor, ...] | None = None,
    progress: Callable[[int], None] | None = None,
    tuning_progress: TuningProgress | None = None,
    distributed: bool = False,
    rules: Mapping[type[nn.Module], Rule] | None = None,
    **options: Unpack[ConversionOptions],
) -> SpikingNetwork:
    r"""Turn a trained ReLU network into a spiking network whose neurons fire at most once.

    With ``hold=True`` every neuron encodes exactly :math:`clip(\lfloor S y + 1/2 \rfloor, 0, S) / S` of its
    normalised drive ``y``, ``S = t_max - 1`` (arXiv:2309.16795).

    Parameters
    ----------
    ann : nn.Module
        A ReLU network that torch.fx or torch.export can capture, or an exported program: convolutions, linear layers,
        batch norms, ReLUs, pools, sums, concatenations (quartz_plugin/operators/OPERATORS.md has all); used as in eval
        mode, never modified.
    calibration : Tensor or iterable
        Raw training inputs in [0, 1], ``[N, ...]``, or an iterable of such batches or of ``(images, labels)``. Of a
        network with several inputs a tuple of tensors, or batches of tuples or of ``((x, y), labels)``.
        It is read once, in chunks; where `calibration_method` looks at images again and again, they are kept.
    {options}
    config : ConversionConfig, optional
        The options in one object; keywords beside it take precedence.
    example_input : Tensor, optional
        One raw input with a batch dimension, ``[1, ...]``; by default the first calibration image. With it the
        network is traced; calibration images of another shape are refused.
    progress : callable, optional
        Called with the number of calibration images seen so far.
    tuning_progress : callable, optional
        Called with the number of steps of tuning done so far, and that of all.
    distributed : bool
        Every process of torch.distributed calls `convert` with its own share of the calibration images; all
        get the network that one process would make of all of them. With "percentile" and "least_squares" only.
    rules : dict, optional
        Module class -> rule that gives what it is to be converted as, as :func:`~quartz_plugin.register_rule` has them;
        for this call, and before those that are registered.

    Returns
    -------
    SpikingNetwork
        On the ANN's device, in its dtype (float32 at least).

    Raises
    ------
    ConversionError
        If the network cannot be converted; names the module and what could be done.
    ValueError
        For NaN weights, bad calibration data, or options that do not go together.
    TypeError
        If `ann` is no module, `calibration` neither a tensor nor an iterable, or an option is unknown.

    Examples
    --------
    >>> import torch, quartz_plugin
    >>> _ = torch.manual_seed(0)
    >>> ann = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.ReLU(), torch.nn.Linear(5, 2))
    >>> snn = quartz_plugin.convert(ann, torch.rand(100, 6), t_max=8)
    >>> snn.n_steps
    29
    >>> snn(torch.rand(3, 6)).shape
    torch.Size([3, 2])
    """
    config = configured(options, ConversionOptions, t_max, config)
    run = Run(example_input, progress, tuning_progress, distributed, rules)
    calibrated = calibrate_network(ann, calibration, config, run)
    if config.first_layer == "dense":
        calibrated = compute_first_layer(calibrated)
    scaled = rescale(calibrated)
    if config.weight_bits is not None:
        scaled = quantize(scaled, calibrated)
    times = schedule(scaled, calibrated.windows[INPUT], config.bias)
    return SpikingNetwork(emit(calibrated, scaled, times))


def calibrate_network(
    ann: nn.Module, calibration: Calibration, config: ConversionConfig, run: Run
) -> CalibratedNetwork:
    """Go through the stages up to calibration; what is raised is that of :func:`convert`.

    Its callers see to plain numbers and exact arithmetic.
    """
    refuse_processes(config, run)
    ann = as_network(ann)
    with as_one(run):
        traced, images = trace_network(ann, calibration, config, run)
    return calibrate_traced(ann, traced, images, config, run)


def trace_network(
    ann: nn.Module, calibration: Calibration, config: ConversionConfig, run: Run
) -> tuple[TracedNetwork, Iterator[Tensor]]:
    """Trace a network with the first calibration image or the one given; also the images, checked, in chunks."""
    inputs, images = inputs_of(ann, calibration, run.example_input, config)
    first, images = peek(images)
    if first is None:
        raise ValueError("calibration is empty: give at least one batch of training images")
    example = _example(ann, first, run.example_input, inputs)
    given = calibration if isinstance(calibration, Tensor) else first
    traced = _traced(ann, example, run.rules, "calibration", given, inputs)
    return traced, (chunk.to(example) for chunk in images)


def calibrate_traced(
    ann: nn.Module, traced: TracedNetwork, images: Iterable[Tensor], config: ConversionConfig, run: Run
) -> CalibratedNetwork:
    """Fold, check and calibrate a network that has been traced."""
    method = config.method
    with as_one(run):
        network = check(fold(traced, config.preprocessing, config.linear))
        network.outputs.check_task(config.task)
        refuse_other_training(ann, network, config)
        own = own_options(network, config)
        windows = windows_of(network, config, own)
    if method.needs_images:
        images = list(images)
    scales = calibrate(network, images, config, own, windows, run)
    warn_of_silent_layers(network, scales)
    network = with_shifts(network, scales.shifts)
    if method.needs_images:
        progress = run.tuning_progress or (lambda done, total: None)
        scales, method = refine(network, scales, windows, torch.cat(list(images)), config, progress)
    return CalibratedNetwork(network, scales, windows, _as_carried_out(network, windows, config, method))


def as_one(run: Run) -> AbstractContextManager[None]:
    """Context in which an error in one of several processes is one in all."""
    return raise_on_all_ranks() if run.distributed else nullcontext()


def _as_carried_out(
    network: FoldedNetwork, windows: Mapping[str, int], config: ConversionConfig, method: CalibrationMethod
) -> ConversionConfig:
    """The configuration with the windows that were trained, and without tuning that was left out."""
    if network.activation_quantizers():
        config = replace(config, t_max={path: length + 1 for path, length in windows.items()})
    return config if method == config.method else replace(config, calibration_method=method)


def warn_of_silent_layers(network: FoldedNetwork, scales: Scales) -> None:
    """Warn of each layer that was 0 on all calibration images."""
    for node in [node for node in network.layers() if str(node.target) in scales.silent]:
        taken = "a guess" if ceiling_of(network.module_at(node)) is None else "its upper bound"
        warn(
            f"{node.target!r} is 0 on all calibration images, so its scale is {taken}: "
            "give more varied training images, or see whether the layer is dead"
        )


@exact_arithmetic()
def check_convertible(
    ann: nn.Module,
    example_input: Tensor | tuple[Tensor, ...],
    preprocessing: Preprocessing | None = None,
    linear: Linear = ConversionConfig.linear,
    *,
    input_range: InputRange | None = None,
    rules: Mapping[type[nn.Module], Rule] | None = None,
) -> None:
    """Find out whether a network can be converted, before it is trained: nothing is calibrated.

    Parameters
    ----------
    ann : nn.Module
        The network, trained or not; never modified.
    example_input : Tensor, or tuple of Tensor
        Raw inputs in [0, 1], ``[N, ...]``; the first is used. A tuple of them for a network of several inputs.
    preprocessing, linear, input_range
        As in :func:`convert`.
    rules : dict, optional
        Rules for module classes, beside those of :func:`register_rule`.

    Raises
    ------
    ConversionError
        If it cannot; names the module and what could be done.
    ValueError
        For NaN weights, an input that does not fit, or a value that an option cannot have.

    Examples
    --------
    >>> import torch, quartz_plugin
    >>> quartz_plugin.check_convertible(torch.nn.Sequential(torch.nn.GELU(), torch.nn.Linear(6, 5)), torch.rand(1, 6))
    Traceback (most recent call last):
    quartz_plugin.operators.tracing.ConversionError: cannot convert '0' (GELU): it is not a ReLU; train the network with
    nn.ReLU in its place
    """
    config = ConversionConfig(preprocessing=preprocessing, linear=linear, input_range=input_range)
    inputs, images = inputs_of(ann, example_input, example_input, config, "example_input")
    example = _example(ann, next(images), None, inputs)
    traced = _traced(ann, example, rules, "example_input", example_input, inputs)
    check(fold(traced, config.preprocessing, config.linear))


def _traced(
    ann: nn.Module,
    example: Tensor,
    rules: Mapping[type[nn.Module], Rule] | None,
    name: str,
    given: Any,
    inputs: Inputs,
) -> TracedNetwork:
    """Trace a network with one example of the images given; of a wrong shape, where another one runs, name that."""
    try:
        return trace(ann, example, rules, inputs)
    except ConversionError as error:
        if not inputs.plain or _runs(ann, torch.cat([example] * 3)):
            raise
        shape = list(given.shape)
        if _runs(ann, given[None].to(example)):
            raise ConversionError(
                f"{name} has the shape {shape}; is a batch dimension missing? The network runs on {[1, *shape]}"
            ) from error
        if example.dim() > 2 and _runs(ann, example.movedim(-1, 1)):
            raise ConversionError(
                f"{name} has the shape {shape}; are channels last? The network runs on "
                f"{[shape[0], shape[-1], *shape[1:-1]]}: give images.movedim(-1, 1)"
            ) from error
        raise


def _runs(ann: nn.Module, images: Tensor) -> bool:
    """Return whether a network takes images of this shape."""
    try:
        with in_eval_mode(ann), torch.no_grad():
            ann(images)
    except Exception:
        return False
    return True


def _example(ann: nn.Module, first: Tensor, given: Any, inputs: Inputs) -> Tensor:
    """Units of one image on the ANN's device, in its type: of the one given, or of the first of calibration."""
    parameter = next((p for p in ann.parameters()), None) if isinstance(ann, nn.Module | ExportedProgram) else None
    dtype = torch.float32 if parameter is None else at_least_float32(parameter.dtype)
    device = first.device if parameter is None else parameter.device
    if given is not None and not inputs.plain:
        first = inputs.pack(given, "example_input")
    elif given is not None:
        given = check_unit_interval(given, "example_input")
        if given.shape[1:] != first.shape[1:] or len(given) == 0:
            raise ValueError(
                f"example_input has the shape {list(given.shape)}, which is not one of calibration images "
                f"of shape {list(first.shape)}"
            )
        first = given
    return first[:1].to(device=device, dtype=dtype)
