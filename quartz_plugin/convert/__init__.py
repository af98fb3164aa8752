"""Conversion, in stages that can be read one after the other.

trace -> fold -> check -> calibrate (-> tune) -> rescale (-> quantize) -> schedule -> emit.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Literal, TypedDict

import torch
from torch import Tensor, nn

from quartz_plugin.coding import at_least_float32, check_unit_interval, window_length, with_plain_numbers
from quartz_plugin.convert.calibrate import (
    Calibration,
    Granularity,
    Override,
    Shifts,
    calibrate,
    chunks,
    peek,
    raise_on_all_ranks,
)
from quartz_plugin.convert.check import check
from quartz_plugin.convert.dense import dense_nodes, take_first_layer
from quartz_plugin.convert.emit import NeuronKind, emit
from quartz_plugin.convert.fold import Linear, Preprocessing, fold
from quartz_plugin.convert.quantize import quantize
from quartz_plugin.convert.rescale import rescale
from quartz_plugin.convert.schedule import schedule
from quartz_plugin.convert.trace import trace
from quartz_plugin.convert.traced import TracedNetwork
from quartz_plugin.convert.tune import CalibrationMethod, TuningProgress, refine
from quartz_plugin.functional import BiasCode, Rectifier
from quartz_plugin.graph import INPUT
from quartz_plugin.graph.synapses import synapse_counts
from quartz_plugin.network import SpikingNetwork
from quartz_plugin.operators.table import ConversionError, Role, ceiling_of, register_rule
from quartz_plugin.precision import exact_arithmetic
from quartz_plugin.task import CLASSIFICATION, Task, check_task, prepared_tasks

__all__ = ["PAPER", "ConversionError", "Override", "check_convertible", "convert", "register_rule"]


class _Paper(TypedDict):
    hold: bool
    bias: BiasCode
    rectifier: Rectifier


FirstLayer = Literal["spiking", "dense"]
"""How the first linear map is carried out: by spikes that say the image, or on the image itself."""

DEFAULT_T_MAX = 16
"""``T`` where none is asked for."""

PAPER: _Paper = {"hold": False, "bias": "spike", "rectifier": "spike"}
"""Options that make the neuron of arXiv:2309.16795: ``convert(ann, calibration, **PAPER)``."""


@with_plain_numbers
@exact_arithmetic()
def convert(
    ann: nn.Module,
    calibration: Calibration,
    t_max: int | Mapping[str, int] = DEFAULT_T_MAX,
    *,
    hold: bool = True,
    rectifier: Rectifier = "spike",
    bias: BiasCode = "synapse",
    linear: Linear = "compose",
    percentile: float = 99.9,
    output_percentile: float = 100.0,
    granularity: Granularity = "layer",
    calibration_method: str = "percentile",
    tuning_passes: int = 6,
    tuning_rate: float = 0.01,
    first_layer: FirstLayer = "spiking",
    preprocessing: Preprocessing | None = None,
    example_input: Tensor | None = None,
    weight_bits: int | None = None,
    task: Task = CLASSIFICATION,
    layers: Mapping[str, Override] | None = None,
    progress: Callable[[int], None] | None = None,
    tuning_progress: TuningProgress | None = None,
    distributed: bool = False,
) -> SpikingNetwork:
    r"""Turn a trained ReLU network into a spiking network whose neurons fire at most once.

    With ``hold=True`` every neuron says exactly :math:`clip(\lfloor S y + 1/2 \rfloor, 0, S) / S` of its
    normalised drive ``y``, ``S = t_max - 1`` (arXiv:2309.16795).

    Parameters
    ----------
    ann : nn.Module
        A ReLU network that torch.fx can trace: convolutions, linear layers, batch norms, ReLUs, pools, sums,
        concatenations (README.md has the table of operators); used as in eval mode, never modified.
    calibration : Tensor or iterable
        Raw training inputs in [0, 1], ``[N, ...]``, or an iterable of such batches or of ``(images, labels)``.
        It is read once, in chunks; where `calibration_method` looks at images again and again, they are kept.
    t_max : int or dict
        ``T``: every value is one of ``T`` levels, and a layer takes ``T - 1`` steps. Or one for each: name of a layer
        (as the report has it; "output", "input") or of a block -> its ``T``, "default" for the rest, as
        ``{"default": 8, "input": 32}``; :func:`allocate_steps` finds some. Layers of a network that was trained for
        spikes (:func:`prepare`) keep their own, and others are refused.
    hold : bool
        No neuron may fire before its readout. False is the paper's neuron, with its early spikes.
    rectifier : "spike" or "silent"
        Zeros are said by a forced spike (the paper's) or by silence.
    bias : "synapse" or "spike"
        A bias as a synapse from a unit that says 1, or as the authors' unit-weight spike in time; the latter
        goes with ``hold=False, rectifier="spike"`` only.
    linear : "compose" or "pair"
        What becomes of a signed value without a ReLU that feeds on, as in a linear bottleneck. "compose": the
        linear maps in a row act as the one they compose to; exact, no neuron, no delay. "pair": two layers of
        neurons carry it, one for each sign, which rounds it and clips its size at their scale.
    percentile : float
        Percentile of each ReLU's values (zeros included) that becomes the value 1; in (0, 100]. Where it is 0
        (a layer or channel that is seldom active), the largest value seen takes its place.
    output_percentile : float
        The same for the output, of ``|logit|``; of a regression as many percent of an output's values lie below the
        upper end of its range, and above the lower.
    granularity : "layer" or "channel"
        One scale for each layer, or for each channel.
    calibration_method : str
        How scales and biases are found, names joined by "+"; no labels are needed. First, where scales come from:
        "percentile", "least_squares" (rounding loses least in each layer) or "search" (the output is nearest to the
        ANN's). Then, if wanted, "bias_correction" (the mean error of rounding goes into the biases); "tune" (scales and
        biases learn, all blocks at once, to give the ANN's activations) or "distill" (all weights learn to give the
        ANN's activations and output); "output" (the output's range lets the first spike agree most often with the ANN,
        or a regression's values most nearly).
        "best" is what README's measurements recommend, :data:`~quartz_plugin.convert.tune.BEST`. Tuning after which
        the output is twice as far from the ANN's is left out with a warning, and in
        ``snn.graph.settings["calibration_method"]``.
    tuning_passes : int
        How often "tune" and "distill" see every image.
    tuning_rate : float
        How fast they learn: Adam's highest rate, as a share of the size of each layer's weights, and of its scale. Deep
        networks without batch norms, and few images, want less.
    first_layer : "spiking" or "dense"
        "dense" computes the first linear map and its ReLU on the image itself, as multiplications, and encodes what
        comes out: the image is not rounded, and there is one window less.
    preprocessing : (mean, std), optional
        What the ANN expects its input normalised by; folded in exactly.
    example_input : Tensor, optional
        One raw input with a batch dimension, ``[1, ...]``; by default the first calibration image. With it the
        network is traced; calibration images of another shape are refused.
    weight_bits : int, optional
        Put weights, ``S b`` and threshold on a fixed-point grid, weights of so many bits with their sign (2 to 16),
        for each layer or, with ``granularity="channel"``, each output channel. All engines then compute in exact whole
        numbers (on a CPU, whose libraries only add and multiply) and agree bit for bit. The network is in float64
        where float32 could not hold them.
    task : "classification" or "regression"
        What the output means. "classification": classes on dimension 1, and a decision at every position (``[B,
        classes]``, ``[B, classes, H, W]``); a single logit (``[B]``, ``[B, 1]``) decides by its sign. "regression":
        values to estimate, ``[B, outputs, ...]``, each with a range of its own, from its least value to its largest on
        the calibration images (around 0 with ``bias="spike"``, and with ``hold=False`` unless 0 lies outside).
    layers : dict, optional
        Name of a layer (as the report has it; "output", "input") or of a block of the ANN -> options of its
        own: ``percentile``, ``granularity``, ``t_max``. The longer name wins: ``{"layer1": dict(percentile=99.99),
        "layer1.0.relu": dict(t_max=32)}``.
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
        If `ann` is no module, or `calibration` neither a tensor nor an iterable.

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
    _check_options(hold, rectifier, bias, linear, weight_bits)
    check_task(task)
    if bias == "spike" and "output" in CalibrationMethod.parse(calibration_method).refinements:
        raise ValueError(
            f'calibration_method={calibration_method!r} chooses the output\'s range ("output"), which shifts biases, '
            'and bias="spike" clamps those: leave "output" out, or give bias="synapse"'
        )
    scaled = scale(
        ann,
        calibration,
        t_max,
        hold=hold,
        linear=linear,
        percentile=percentile,
        output_percentile=output_percentile,
        granularity=granularity,
        calibration_method=calibration_method,
        tuning_passes=tuning_passes,
        tuning_rate=tuning_rate,
        first_layer=first_layer,
        preprocessing=preprocessing,
        example_input=example_input,
        task=task,
        shifts="none" if bias == "spike" else "all" if hold else "far",
        layers=layers,
        progress=progress,
        tuning_progress=tuning_progress,
        distributed=distributed,
    )
    draft, scales, lengths = scaled.draft, scaled.scales, scaled.windows
    dense_stem = take_first_layer(draft, scales, lengths, INPUT) if first_layer == "dense" else None
    network = rescale(draft, scales, lengths, average_by_sums=weight_bits is not None)
    if weight_bits is not None:
        early_windows = 1 if hold else len(network.layers) + 1
        quantize(network, weight_bits, granularity, bias, lengths[INPUT], draft.dtype, early_windows)
    times = schedule(network, lengths[INPUT] + 1, bias)
    settings: dict[str, Any] = {
        "t_max": scaled.trained or (dict(t_max) if isinstance(t_max, Mapping) else t_max),
        "hold": hold,
        "rectifier": rectifier,
        "bias": bias,
        "linear": linear,
        "percentile": percentile,
        "output_percentile": output_percentile,
        "granularity": granularity,
        "calibration_method": scaled.calibration_method,
        "tuning_passes": tuning_passes,
        "tuning_rate": tuning_rate,
        "first_layer": first_layer,
        "preprocessing": None
        if preprocessing is None
        else [torch.as_tensor(v, dtype=torch.float64).flatten().tolist() for v in preprocessing],
        "weight_bits": weight_bits,
        "task": task,
        "layers": {name: dict(options) for name, options in (layers or {}).items()},
    }
    kind = NeuronKind(hold, rectifier, bias)
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


def scale(
    ann: nn.Module,
    calibration: Calibration,
    t_max: int | Mapping[str, int],
    *,
    hold: bool = True,
    linear: Linear = "compose",
    percentile: float = 99.9,
    output_percentile: float = 100.0,
    granularity: Granularity = "layer",
    calibration_method: str = "percentile",
    tuning_passes: int = 6,
    tuning_rate: float = 0.01,
    first_layer: FirstLayer = "spiking",
    preprocessing: Preprocessing | None = None,
    example_input: Tensor | None = None,
    task: Task = CLASSIFICATION,
    shifts: Shifts = "all",
    layers: Mapping[str, Override] | None = None,
    progress: Callable[[int], None] | None = None,
    tuning_progress: TuningProgress | None = None,
    distributed: bool = False,
) -> CalibratedNetwork:
    """Go through the stages up to rescale; parameters and what is raised are those of :func:`convert`.

    Its callers see to plain numbers and exact arithmetic. `shifts` says which of a regression's outputs may have ranges
    that do not lie around 0; see :func:`calibrate`.
    """
    check_task(task)
    for called in (progress, tuning_progress):
        if called is not None and not callable(called):
            raise TypeError(f"progress and tuning_progress must be functions of numbers, got {called!r}")
    method = CalibrationMethod.parse(calibration_method)
    if distributed and method.needs_images:
        raise ValueError(
            f'calibration_method={calibration_method!r} runs in one process; with distributed=True give "percentile" '
            'or "least_squares"'
        )
    if first_layer not in ("spiking", "dense"):
        raise ValueError(f'first_layer must be "spiking" or "dense", got {first_layer!r}')
    if type(tuning_passes) is not int or tuning_passes < 1:
        raise ValueError(f"tuning_passes must be a whole number of at least 1, got {tuning_passes!r}")
    if not isinstance(tuning_rate, (int, float)) or not 0 < tuning_rate < 1:
        raise ValueError(f"tuning_rate is a share between 0 and 1, got {tuning_rate!r}")
    _check_granularity(granularity)
    _check_percentile("percentile", percentile)
    _check_percentile("output_percentile", output_percentile)
    if task == "regression" and output_percentile <= 50:
        raise ValueError(f"output_percentile of a regression must be above 50, got {output_percentile!r}")
    with raise_on_all_ranks() if distributed else nullcontext():
        first, images = peek(chunks(calibration))
        if first is None:
            raise ValueError("calibration is empty: give at least one batch of training images")
        example = _example(ann, first, example_input)
        draft = check(fold(trace(ann, example), preprocessing, linear))
        if first_layer == "dense":
            dense_nodes(draft)
            draft.encodes_image = False
        codes = draft.codes()
        if codes and not hold:
            raise ValueError("the network was trained for held neurons, which say its activations: give hold=True")
        if codes and (prepared := prepared_tasks(ann) - {task}):
            raise ValueError(f"the network was prepared with task={prepared.pop()!r}: give the same, got {task!r}")
        if codes and method.needs_images:
            raise ValueError(
                f"calibration_method={calibration_method!r} changes what the network was trained to say; leave it out"
            )
        if draft.input_code is not None and not draft.encodes_image:
            raise ValueError('the network was trained with spikes that say the image: give first_layer="spiking"')
        own = _overrides(draft, _with_windows(layers or {}, t_max))
        trained = {path: code.window for path, code in codes.items()}
        # An image that is not encoded has no window; until its first layer is taken out, it stands here as 1.
        lengths = _windows(own, t_max, trained | ({} if draft.encodes_image else {INPUT: 1}))
    chunked: Iterable[Tensor] = (chunk.to(example) for chunk in images)
    if method.needs_images:
        chunked = list(chunked)
    scales = calibrate(
        draft,
        chunked,
        percentile=percentile,
        output_percentile=output_percentile,
        granularity=granularity,
        overrides=own,
        least_squares=lengths if method.scale == "least_squares" else None,
        known={path: code.scale.detach().double().cpu() for path, code in codes.items() if path != INPUT},
        task=task,
        shifts=shifts,
        progress=progress,
        distributed=distributed,
    )
    for node in [node for node in draft.layers() if str(node.target) in draft.silent]:
        taken = "a guess" if ceiling_of(draft.module_at(node)) is None else "its upper bound"
        warnings.warn(
            f"{node.target!r} is 0 on all calibration images, so its scale is {taken}: "
            "give more varied training images, or see whether the layer is dead",
            stacklevel=2,
        )
    if method.needs_images:
        scales, done = refine(
            draft, scales, lengths, torch.cat(list(chunked)), method, tuning_passes, tuning_rate, task,
            tuning_progress or _unseen,
        )  # fmt: skip
        calibration_method = calibration_method if done == method else str(done)
    own_t_max = {path: window + 1 for path, window in trained.items()}
    return CalibratedNetwork(draft, scales, lengths, example, own_t_max, calibration_method)


@exact_arithmetic()
def check_convertible(
    ann: nn.Module, example_input: Tensor, preprocessing: Preprocessing | None = None, linear: Linear = "compose"
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
    quartz_plugin.operators.table.ConversionError: cannot convert '1' (GELU): it is not a ReLU; train the network with
    nn.ReLU in its place
    """
    check(fold(trace(ann, _example(ann, example_input, example_input)), preprocessing, linear))


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


_OPTIONS_OF_LAYERS = tuple(Override.__annotations__)
_MEANINGLESS = {INPUT: {"percentile", "granularity"}, "output": {"granularity"}}
"""Options that the input's values (always from 0 to 1) and the output (one scale) do not have."""


DEFAULT = "default"
"""Name under which a mapping of windows has that of the layers it does not name."""


def _unseen(done: int, total: int) -> None:
    pass


def _with_windows(layers: Mapping[str, Override], t_max: int | Mapping[str, int]) -> Mapping[str, Override]:
    """Options of layers, and their windows where `t_max` names them."""
    if not isinstance(t_max, Mapping):
        window_length(t_max)
        return layers
    if not isinstance(layers, Mapping):
        return layers
    merged: dict[str, Override] = {name: {"t_max": own} for name, own in t_max.items() if name != DEFAULT}
    for name, options in layers.items():
        merged[name] = {**merged.get(name, {}), **options} if isinstance(options, Mapping) else options
    return merged


def _windows(own: Mapping[str, Override], t_max: int | Mapping[str, int], trained: Mapping[str, int]) -> dict[str, int]:
    """Path of each layer, and "input" -> steps of its window."""
    default = t_max.get(DEFAULT) if isinstance(t_max, Mapping) else t_max
    asked = set(t_max.values() if isinstance(t_max, Mapping) else [t_max])
    own_t_max = {path: window + 1 for path, window in trained.items()}
    if trained.keys() >= own.keys() and not asked <= {*own_t_max.values(), DEFAULT_T_MAX}:
        raise ValueError(
            f"the network was trained for windows of its own, {own_t_max}, and can have no others: leave t_max out"
        )
    lengths = {}
    for path, options in own.items():
        wanted = options.get("t_max", default)
        if wanted is None and path not in trained:
            raise ValueError(f't_max names no window for the layer {path!r}: name it, or give "default"')
        lengths[path] = trained[path] if path in trained else _window(path, wanted)  # type: ignore[arg-type]
    return lengths


def _window(path: str, t_max: int) -> int:
    try:
        return window_length(t_max)
    except ValueError as error:
        raise ValueError(f"layer {path!r}: {error}") from error


def _overrides(draft: TracedNetwork, layers: Mapping[str, Override]) -> dict[str, Override]:
    """Options of each layer (path -> its own): those of the blocks it is in, the innermost first."""
    last = draft.last
    names = {str(node.target): {str(node.target)} for node in draft.layers()} | {INPUT: {INPUT}}
    if draft.role_at(last) is not Role.RECTIFIER:
        names[str(last.target)].add("output")
    if not isinstance(layers, Mapping):
        raise TypeError(f"layers must be a dict, name of a layer or block -> options, got {type(layers).__name__}")
    own: dict[str, Override] = {path: {} for path in names}
    for key in sorted(layers, key=lambda name: len(str(name))):
        options = layers[key]
        if not isinstance(key, str):
            raise TypeError(f"layers must be named by strings, as the report has them, got {key!r}")
        if not isinstance(options, Mapping) or not set(options) <= set(_OPTIONS_OF_LAYERS):
            raise ValueError(f"layers[{key!r}] must be a dict with some of {_OPTIONS_OF_LAYERS}, got {options!r}")
        _check_percentile(f"layers[{key!r}]: percentile", options.get("percentile", 100.0))
        _check_granularity(options.get("granularity", "layer"))
        matching = [path for path, also in names.items() if any(f"{name}.".startswith(f"{key}.") for name in also)]
        if not matching:
            known = sorted(name for also in names.values() for name in also)
            raise ValueError(f"t_max, layers: no layer or block is called {key!r}; the layers are {known}")
        for path in matching:
            if key in names[path] and (meaningless := _MEANINGLESS.get(key, set()) & set(options)):
                raise ValueError(f"layers[{key!r}]: {sorted(meaningless)} mean nothing there")
            own[path].update(options)
    return own


def _check_options(
    hold: bool,
    rectifier: str,
    bias: str,
    linear: str,
    weight_bits: int | None,
) -> None:
    if weight_bits is not None and (type(weight_bits) is not int or not 2 <= weight_bits <= 16):
        raise ValueError(f"weight_bits must be a whole number from 2 to 16 (8 on Loihi), or None, got {weight_bits!r}")
    if not isinstance(hold, bool):
        raise ValueError(f"hold must be True or False, got {hold!r}")
    if linear not in ("compose", "pair"):
        raise ValueError(f'linear must be "compose" or "pair", got {linear!r}')
    if rectifier not in ("spike", "silent"):
        raise ValueError(f'rectifier must be "spike" or "silent", got {rectifier!r}')
    if bias not in ("synapse", "spike"):
        raise ValueError(f'bias must be "synapse" or "spike", got {bias!r}')
    if bias == "spike" and (hold or rectifier == "silent"):
        raise ValueError(
            'bias="spike" is the paper\'s neuron and goes with hold=False, rectifier="spike" only '
            "(convert(ann, calibration, **quartz_plugin.PAPER))"
        )


def _check_granularity(granularity: str) -> None:
    if granularity not in ("layer", "channel"):
        raise ValueError(f'granularity must be "layer" or "channel", got {granularity!r}')


def _check_percentile(name: str, value: float) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0.0 < value <= 100.0:
        raise ValueError(f"{name} must be a number in (0, 100], got {value!r}")
