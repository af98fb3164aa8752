"""Conversion, in stages that can be read one after the other.

trace -> fold -> check -> calibrate -> rescale -> schedule -> emit.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, TypedDict

import torch
from torch import Tensor, nn

from quartz_plugin.coding import at_least_float32, check_unit_interval, window_length
from quartz_plugin.convert.calibrate import Calibration, Granularity, calibrate, chunks, peek
from quartz_plugin.convert.check import check
from quartz_plugin.convert.emit import NeuronKind, emit
from quartz_plugin.convert.fold import Preprocessing, fold
from quartz_plugin.convert.operators import ConversionError
from quartz_plugin.convert.rescale import rescale
from quartz_plugin.convert.schedule import schedule
from quartz_plugin.convert.trace import trace
from quartz_plugin.functional import BiasCode, Rectifier
from quartz_plugin.network import SpikingNetwork

__all__ = ["PAPER", "ConversionError", "convert"]


class _Paper(TypedDict):
    hold: bool
    bias: BiasCode
    rectifier: Rectifier


PAPER: _Paper = {"hold": False, "bias": "spike", "rectifier": "spike"}
"""Options that make the neuron of arXiv:2309.16795: ``convert(ann, calibration, **PAPER)``."""


def convert(
    ann: nn.Module,
    calibration: Calibration,
    t_max: int = 16,
    *,
    hold: bool = True,
    rectifier: Rectifier = "spike",
    bias: BiasCode = "synapse",
    linear: Literal["compose"] = "compose",
    percentile: float = 99.9,
    output_percentile: float = 100.0,
    granularity: Granularity = "layer",
    preprocessing: Preprocessing | None = None,
    example_input: Tensor | None = None,
    progress: Callable[[int], None] | None = None,
) -> SpikingNetwork:
    r"""Turn a trained ReLU network into a spiking network whose neurons fire at most once.

    With ``hold=True`` every neuron says exactly :math:`clip(\lfloor S y + 1/2 \rfloor, 0, S) / S` of its
    normalised drive ``y``, ``S = t_max - 1`` (arXiv:2309.16795).

    Parameters
    ----------
    ann : nn.Module
        A chain of convolutions, linear layers, batch norms, ReLUs and pools; used as in eval mode, never modified.
    calibration : Tensor or iterable
        Raw training inputs in [0, 1], ``[N, ...]``, or an iterable of such batches or of ``(images, labels)``.
        It is read once, in chunks.
    t_max : int
        ``T``: every value is one of ``T`` levels, and a layer takes ``T - 1`` steps.
    hold : bool
        No neuron may fire before its readout. False is the paper's neuron, with its early spikes.
    rectifier : "spike" or "silent"
        Zeros are said by a forced spike (the paper's) or by silence.
    bias : "synapse" or "spike"
        A bias as a synapse from a unit that says 1, or as the authors' unit-weight spike in time; the latter
        goes with ``hold=False, rectifier="spike"`` only.
    linear : "compose"
        Linear maps in a row, without a ReLU between them, act as the one map they compose to.
    percentile : float
        Percentile of each ReLU's values (zeros included) that becomes the value 1; in (0, 100]. Where it is 0
        (a layer or channel that is seldom active), the largest value seen takes its place.
    output_percentile : float
        The same for the output, of ``|logit|``.
    granularity : "layer" or "channel"
        One scale for each layer, or for each channel.
    preprocessing : (mean, std), optional
        What the ANN expects its input normalised by; folded in exactly.
    example_input : Tensor, optional
        One raw input with a batch dimension, ``[1, ...]``; by default the first calibration image. With it the
        network is traced; calibration images of another shape are refused.
    progress : callable, optional
        Called with the number of calibration images seen so far.

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
    window_length(t_max)
    _check_options(hold, rectifier, bias, linear, percentile, output_percentile, granularity)
    first, images = peek(chunks(calibration))
    if first is None:
        raise ValueError("calibration is empty: give at least one batch of training images")
    parameter = next((p for p in ann.parameters()), None) if isinstance(ann, nn.Module) else None
    dtype = torch.float32 if parameter is None else at_least_float32(parameter.dtype)
    device = first.device if parameter is None else parameter.device
    if example_input is not None:
        check_unit_interval(example_input, "example_input")
        if example_input.shape[1:] != first.shape[1:] or len(example_input) == 0:
            raise ValueError(
                f"example_input has the shape {list(example_input.shape)}, which is not one of calibration images "
                f"of shape {list(first.shape)}"
            )
        first = example_input
    example = first[:1].to(device=device, dtype=dtype)

    draft = trace(ann, example)
    fold(draft, preprocessing)
    check(draft)
    draft.record_shapes(example)
    scales = calibrate(
        draft,
        (chunk.to(device=device, dtype=dtype) for chunk in images),
        percentile=percentile,
        output_percentile=output_percentile,
        granularity=granularity,
        progress=progress,
    )
    layers = rescale(draft, scales)
    clocks = schedule(layers, t_max, bias)
    settings: dict[str, Any] = {
        "t_max": t_max,
        "hold": hold,
        "rectifier": rectifier,
        "bias": bias,
        "linear": linear,
        "percentile": percentile,
        "output_percentile": output_percentile,
        "granularity": granularity,
        "preprocessing": None
        if preprocessing is None
        else [torch.as_tensor(v).flatten().tolist() for v in preprocessing],
    }
    return SpikingNetwork(emit(draft, layers, clocks, t_max, NeuronKind(hold, rectifier, bias), settings))


def _check_options(
    hold: bool,
    rectifier: str,
    bias: str,
    linear: str,
    percentile: float,
    output_percentile: float,
    granularity: str,
) -> None:
    if not isinstance(hold, bool):
        raise ValueError(f"hold must be True or False, got {hold!r}")
    if linear != "compose":
        raise ValueError(f'linear must be "compose" (pairs of neurons are not built yet), got {linear!r}')
    if rectifier not in ("spike", "silent"):
        raise ValueError(f'rectifier must be "spike" or "silent", got {rectifier!r}')
    if bias not in ("synapse", "spike"):
        raise ValueError(f'bias must be "synapse" or "spike", got {bias!r}')
    if granularity not in ("layer", "channel"):
        raise ValueError(f'granularity must be "layer" or "channel", got {granularity!r}')
    if bias == "spike" and (hold or rectifier == "silent"):
        raise ValueError(
            'bias="spike" is the paper\'s neuron and goes with hold=False, rectifier="spike" only '
            "(convert(ann, calibration, **quartz_plugin.PAPER))"
        )
    for name, value in (("percentile", percentile), ("output_percentile", output_percentile)):
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0.0 < value <= 100.0:
            raise ValueError(f"{name} must be a number in (0, 100], got {value!r}")
