"""Conversion, in stages that can be read one after the other.

trace -> fold -> check -> calibrate (-> tune) -> rescale (-> quantize) -> schedule -> emit.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Unpack

import torch
from torch import Tensor, nn

from quartz_plugin.coding import at_least_float32, check_unit_interval, window_length, with_plain_numbers
from quartz_plugin.config import (
    ConversionConfig,
    ConversionOptions,
    LayerConfig,
    Linear,
    Preprocessing,
    configured,
)
from quartz_plugin.convert.calibrate import calibrate
from quartz_plugin.convert.check import check
from quartz_plugin.convert.dense import dense_nodes, take_first_layer
from quartz_plugin.convert.emit import NeuronKind, emit
from quartz_plugin.convert.fold import fold
from quartz_plugin.convert.images import Calibration, chunks, peek
from quartz_plugin.convert.processes import raise_on_all_ranks
from quartz_plugin.convert.quantize import quantize
from quartz_plugin.convert.refine import refine
from quartz_plugin.convert.rescale import rescale
from quartz_plugin.convert.run import Run, TuningProgress
from quartz_plugin.convert.schedule import schedule
from quartz_plugin.convert.trace import trace
from quartz_plugin.convert.traced import TracedNetwork
from quartz_plugin.graph import INPUT
from quartz_plugin.graph.synapses import synapse_counts
from quartz_plugin.network import SpikingNetwork
from quartz_plugin.operators.table import Role, Rule, ceiling_of
from quartz_plugin.options import UNSET, with_options
from quartz_plugin.precision import exact_arithmetic
from quartz_plugin.task import prepared_tasks


@with_options(ConversionConfig, ConversionOptions)
@with_plain_numbers
@exact_arithmetic()
def convert(
    ann: nn.Module,
    calibration: Calibration,
    t_max: int | Mapping[str, int] = UNSET,
    *,
    config: ConversionConfig | None = None,
    example_input: Tensor | None = None,
    progress: Callable[[int], None] | None = None,
    tuning_progress: TuningProgress | None = None,
    distributed: bool = False,
    **options: Unpack[ConversionOptions],
) -> SpikingNetwork:
    r"""Turn a trained ReLU network into a spiking network whose neurons fire at most once.

    With ``hold=True`` every neuron encodes exactly :math:`clip(\lfloor S y + 1/2 \rfloor, 0, S) / S` of its
    normalised drive ``y``, ``S = t_max - 1`` (arXiv:2309.16795).

    Parameters
    ----------
    ann : nn.Module
        A ReLU network that torch.fx can trace: convolutions, linear layers, batch norms, ReLUs, pools, sums,
        concatenations (README.md has the table of operators); used as in eval mode, never modified.
    calibration : Tensor or iterable
        Raw training inputs in [0, 1], ``[N, ...]``, or an iterable of such batches or of ``(images, labels)``.
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
    run = Run(example_input, progress, tuning_progress, distributed)
    scaled = scale(ann, calibration, config, run)
    draft, scales, lengths = scaled.draft, scaled.scales, scaled.windows
    dense_stem = take_first_layer(draft, scales, lengths, INPUT) if config.first_layer == "dense" else None
    network = rescale(draft, scales, lengths, average_by_sums=config.weight_bits is not None)
    if config.weight_bits is not None:
        early_windows = 1 if config.hold else len(network.layers) + 1
        quantize(
            network, config.weight_bits, config.granularity, config.bias, lengths[INPUT], draft.dtype, early_windows
        )
    times = schedule(network, lengths[INPUT] + 1, config.bias)
    settings = config.to_dict() | {"calibration_method": scaled.calibration_method}
    if scaled.trained:
        settings["t_max"] = scaled.trained
    kind = NeuronKind(config.hold, config.rectifier, config.bias)
    graph = emit(draft, network, times, lengths[INPUT] + 1, kind, settings, dense_stem)
    synapses = synapse_counts(graph)
    for row in graph.report:
        if (counts := synapses.get(row["module"])) is not None:
            row["synapses"], row["synapses_factored"] = counts
    return SpikingNetwork(graph)


@dataclass(frozen=True)
class CalibratedNetwork:
    """A network behind the first stages: traced, folded, checked, calibrated and tuned.

    Attributes
    ----------
    draft : TracedNetwork
        The network.
    scales : dict
        Path of each ReLU and of the output -> its scale.
    windows : dict
        Path of each ReLU and of the output, and "input" -> steps of its window.
    example : Tensor
        One input, ``[1, ...]``, of the ANN's type.
    trained : dict
        Path of each layer that was trained to say rounded values, and "input" -> its ``T``.
    calibration_method : str
        The one asked for, without what was left out.
    """

    draft: TracedNetwork
    scales: dict[str, Tensor]
    windows: dict[str, int]
    example: Tensor
    trained: dict[str, int]
    calibration_method: str


def scale(ann: nn.Module, calibration: Calibration, config: ConversionConfig, run: Run) -> CalibratedNetwork:
    """Go through the stages up to rescale; what is raised is that of :func:`convert`.

    Its callers see to plain numbers and exact arithmetic.
    """
    method = config.method
    if run.distributed and method.needs_images:
        raise ValueError(
            f"calibration_method={config.calibration_method!r} runs in one process; with distributed=True give "
            '"percentile" or "least_squares"'
        )
    with raise_on_all_ranks() if run.distributed else nullcontext():
        first, images = peek(chunks(calibration))
        if first is None:
            raise ValueError("calibration is empty: give at least one batch of training images")
        example = _example(ann, first, run.example_input)
        draft = check(fold(trace(ann, example), config.preprocessing, config.linear))
        if config.first_layer == "dense":
            dense_nodes(draft)
            draft.encodes_image = False
        codes = draft.codes()
        if codes and not config.hold:
            raise ValueError("the network was trained for held neurons, which say its activations: give hold=True")
        if codes and (prepared := prepared_tasks(ann) - {config.task}):
            raise ValueError(
                f"the network was prepared with task={prepared.pop()!r}: give the same, got {config.task!r}"
            )
        if codes and method.needs_images:
            raise ValueError(
                f"calibration_method={config.calibration_method!r} changes what the network was trained to say; leave "
                "it out"
            )
        if draft.input_code is not None and not draft.encodes_image:
            raise ValueError('the network was trained with spikes that say the image: give first_layer="spiking"')
        own = _own_options(draft, config.own_options)
        trained = {path: code.window for path, code in codes.items()}
        # An image that is not encoded has no window; until its first layer is taken out, it stands here as 1.
        lengths = _windows(own, config, trained | ({} if draft.encodes_image else {INPUT: 1}))
    chunked: Iterable[Tensor] = (chunk.to(example) for chunk in images)
    if method.needs_images:
        chunked = list(chunked)
    known = {path: code.scale.detach().double().cpu() for path, code in codes.items() if path != INPUT}
    scales = calibrate(draft, chunked, config, own, lengths, known, run.progress, run.distributed)
    for node in [node for node in draft.layers() if str(node.target) in draft.silent]:
        taken = "a guess" if ceiling_of(draft.module_at(node)) is None else "its upper bound"
        warnings.warn(
            f"{node.target!r} is 0 on all calibration images, so its scale is {taken}: "
            "give more varied training images, or see whether the layer is dead",
            stacklevel=2,
        )
    named = str(config.calibration_method)
    if method.needs_images:
        progress = run.tuning_progress or _unseen
        scales, done = refine(draft, scales, lengths, torch.cat(list(chunked)), config, progress)
        named = named if done == method else str(done)
    own_t_max = {path: window + 1 for path, window in trained.items()}
    return CalibratedNetwork(draft, scales, lengths, example, own_t_max, named)


@exact_arithmetic()
def check_convertible(
    ann: nn.Module,
    example_input: Tensor,
    preprocessing: Preprocessing | None = None,
    linear: Linear = "compose",
    *,
    rules: Mapping[type[nn.Module], Rule] | None = None,
) -> None:
    """Find out whether a network can be converted, before it is trained: nothing is calibrated.

    Parameters
    ----------
    ann : nn.Module
        The network, trained or not; never modified.
    example_input : Tensor
        Raw inputs in [0, 1], ``[N, ...]``; the first is used.
    preprocessing, linear
        As in :func:`convert`.
    rules : dict, optional
        Rules for module classes, beside those of :func:`register_rule`.

    Raises
    ------
    ConversionError
        If it cannot; names the module and what could be done.
    ValueError
        For NaN weights, or an input that does not fit.

    Examples
    --------
    >>> import torch, quartz_plugin
    >>> quartz_plugin.check_convertible(torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.GELU()), torch.rand(1, 6))
    Traceback (most recent call last):
    quartz_plugin.operators.tracing.ConversionError: cannot convert '1' (GELU): it is not a ReLU; train the network with
    nn.ReLU in its place
    """
    check(fold(trace(ann, _example(ann, example_input, example_input), rules), preprocessing, linear))


def _example(ann: nn.Module, first: Tensor, given: Tensor | None) -> Tensor:
    """One image on the ANN's device and in its type: the one given, or the first of calibration."""
    parameter = next((p for p in ann.parameters()), None) if isinstance(ann, nn.Module) else None
    dtype = torch.float32 if parameter is None else at_least_float32(parameter.dtype)
    device = first.device if parameter is None else parameter.device
    if given is not None:
        given = check_unit_interval(given, "example_input")
        if given.shape[1:] != first.shape[1:] or len(given) == 0:
            raise ValueError(
                f"example_input has the shape {list(given.shape)}, which is not one of calibration images "
                f"of shape {list(first.shape)}"
            )
        first = given
    return first[:1].to(device=device, dtype=dtype)


_MEANINGLESS = {INPUT: {"percentile", "granularity"}, "output": {"granularity"}}
"""Options that the input's values (always from 0 to 1) and the output (one scale) do not have."""


def _unseen(done: int, total: int) -> None:
    pass


def _windows(own: Mapping[str, LayerConfig], config: ConversionConfig, trained: Mapping[str, int]) -> dict[str, int]:
    """Path of each layer, and "input" -> steps of its window."""
    asked = set(config.t_max.values() if isinstance(config.t_max, Mapping) else [config.t_max])
    own_t_max = {path: window + 1 for path, window in trained.items()}
    if trained.keys() >= own.keys() and not asked <= {*own_t_max.values(), ConversionConfig.t_max}:
        raise ValueError(
            f"the network was trained for windows of its own, {own_t_max}, and can have no others: leave t_max out"
        )
    lengths = {}
    for path, options in own.items():
        wanted = options.t_max or config.default_t_max
        if path not in trained and wanted is None:
            raise ValueError(f't_max names no window for the layer {path!r}: name it, or give "default"')
        lengths[path] = trained[path] if path in trained or wanted is None else window_length(wanted)
    return lengths


def _own_options(draft: TracedNetwork, layers: Mapping[str, LayerConfig]) -> dict[str, LayerConfig]:
    """Options of each layer (path -> its own): those of the blocks it is in, the innermost first."""
    last = draft.last
    names = {str(node.target): {str(node.target)} for node in draft.layers()} | {INPUT: {INPUT}}
    if draft.role_at(last) is not Role.RECTIFIER:
        names[str(last.target)].add("output")
    own = dict.fromkeys(names, LayerConfig())
    for key in sorted(layers, key=len):
        options = layers[key]
        matching = [path for path, also in names.items() if any(f"{name}.".startswith(f"{key}.") for name in also)]
        if not matching:
            known = sorted(name for also in names.values() for name in also)
            raise ValueError(f"t_max, layers: no layer or block is called {key!r}; the layers are {known}")
        for path in matching:
            if key in names[path] and (meaningless := _MEANINGLESS.get(key, set()) & set(options.to_dict())):
                raise ValueError(f"layers[{key!r}]: {sorted(meaningless)} mean nothing there")
            own[path] = own[path].overridden_by(options)
    return own
