"""Activations, which become layers of neurons, and what does nothing in eval mode."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, get_args

import torch
from torch import nn
from torch.nn import functional as F

from quartz_plugin.activation import TTFSActivation
from quartz_plugin.functional import BiasCode, Rectifier
from quartz_plugin.neuron import TTFSNeuron
from quartz_plugin.operators.choices import COMPARISONS, build_conversion
from quartz_plugin.operators.extremes import (
    build_absolute,
    build_clamp,
    build_least,
    build_maximum,
    build_minimum,
    build_most,
)
from quartz_plugin.operators.modules import SignedValues
from quartz_plugin.operators.row import Operator, Role, Rows, always, rows_of
from quartz_plugin.operators.settings import FLAG, one_of, whole, whole_or_none
from quartz_plugin.operators.tracing import Append, Build, Refusal, Value, call


def _neurons(how: str, without_hold: str | None = None, **facets: Any) -> Operator:
    """A row of an activation: neurons take its place, and nothing of it is in a converted network."""
    exact = "exact with hold"
    if without_hold is not None:
        exact = f"{exact}; without, {without_hold}"
        facets["exact_without_hold"] = without_hold
    return Operator(
        role=Role.RECTIFIER, how=how, exact=exact, settings=None, relate=None, form=None, gain=None, **facets
    )


def _is_no_clipped_relu(hardtanh: Any) -> str | None:
    if hardtanh.min_val >= hardtanh.max_val:
        bounds = f"{hardtanh.min_val} and {hardtanh.max_val}"
        return f"it clips at {bounds}, and so leaves no values; clip below the upper bound"
    return None


def _build_clipped(append: Append, module: Any, input: Value) -> Value:
    return build_clamp(append, input, module.min_val, module.max_val) if module.min_val else append(module, input)


def _build_relu(append: Append, input: Value, inplace: bool = False) -> Value:
    return append(nn.ReLU(), input)


def _build_relu6(append: Append, input: Value, inplace: bool = False) -> Value:
    return append(nn.ReLU6(), input)


def _build_hardtanh(
    append: Append, input: Value, min_val: float = -1.0, max_val: float = 1.0, inplace: bool = False
) -> Value:
    return build_clamp(append, input, min_val, max_val)


def _is_no_relu(threshold: Any) -> str | None:
    if (threshold.threshold, threshold.value) != (0, 0):
        return f"it jumps from {threshold.value} to {threshold.threshold}; only nn.Threshold(0, 0) is a ReLU"
    return None


def _as_relu(threshold: Any, shape: Sequence[int]) -> nn.Module:
    return nn.ReLU() if _is_no_relu(threshold) is None else threshold  # type: ignore[no-any-return]


def _build_threshold(append: Append, input: Value, threshold: float, value: float, inplace: bool = False) -> Value:
    return append(nn.Threshold(threshold, value), input)


def ceiling_of(rectifier: nn.Module) -> float | None:
    """Upper bound of a ReLU6 or Hardtanh; None for a ReLU."""
    return float(rectifier.max_val) if isinstance(rectifier, nn.Hardtanh) else None


_CLIPPED = "a layer of TTFSNeuron whose value 1 is at most the upper bound, shifted by a lower bound other than 0"
_CLIPPED_EARLY = "an early spike can encode more than the bound"

DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)


def _build_dropout(append: Append, input: Value, p: float = 0.5, training: bool = True, inplace: bool = False) -> Value:
    if training and p > 0:
        raise Refusal("it drops units in eval mode as well; pass training=self.training")
    return input


def _build_copy(target: Any) -> Build:
    """Keep the values: the same tensor, or a copy of its own that changes in place apart."""

    def build(append: Append, input: Value, *args: Any, **kwargs: Any) -> Value:
        others = [arg.tensor if isinstance(arg, Value) else arg for arg in args]
        out = call(target, input.tensor, *others, **kwargs)
        if out.dtype not in (torch.float32, torch.float64):
            raise Refusal(f"it converts to {out.dtype}, which rounds; leave values in floating point")
        same = out.data_ptr() == input.tensor.data_ptr()
        return input if same else Value(input.node, input.tensor.clone())

    return build


def _dropped(**facets: Any) -> Operator:
    return Operator(
        role=Role.NOTHING,
        how="nothing in eval mode",
        settings=None,
        relate=None,
        form=None,
        gain=None,
        **facets,
    )


_COPIES = ("contiguous", "clone", torch.clone, "detach")
_CONVERSIONS = {
    build_conversion(target, _build_copy(target)): [target] for target in ("to", "float", "double", "type_as", "type")
}

ROWS: Rows = {
    nn.ReLU: _neurons(
        "a layer of TTFSNeuron; of a maximum, a minimum, an absolute value or a choice of the larger or smaller of two "
        "(by other comparisons: refused), of the difference, and a sum behind it",
        "exact but for early spikes",
        functions={
            _build_relu: [F.relu, F.relu_, torch.relu, torch.relu_, "relu", "relu_"],
            build_maximum: [torch.maximum, "maximum"],
            build_minimum: [torch.minimum, "minimum"],
            build_absolute: [torch.abs, "abs"],
            **COMPARISONS,
        },
        in_place=[F.relu_, torch.relu_, "relu_", "masked_fill_"],
    ),
    nn.Threshold: _neurons(
        "as nn.ReLU (thresholds and values other than 0: refused)",
        "exact but for early spikes",
        refusal=_is_no_relu,
        spell=_as_relu,
        functions={_build_threshold: [F.threshold, F.threshold_]},  # type: ignore[attr-defined]
        in_place=[F.threshold_],  # type: ignore[attr-defined]
    ),
    nn.ReLU6: _neurons(_CLIPPED, _CLIPPED_EARLY, refusal=_is_no_clipped_relu, functions={_build_relu6: [F.relu6]}),
    nn.Hardtanh: _neurons(
        _CLIPPED,
        _CLIPPED_EARLY,
        refusal=_is_no_clipped_relu,
        build=_build_clipped,
        functions={
            _build_hardtanh: [F.hardtanh, F.hardtanh_],
            build_clamp: [torch.clamp, torch.clip, "clamp", "clamp_", "clip"],
            build_least: [torch.clamp_min, "clamp_min", "clamp_min_"],
            build_most: [torch.clamp_max, "clamp_max", "clamp_max_"],
        },
        in_place=[F.hardtanh_, "clamp_", "clamp_min_", "clamp_max_"],
    ),
    TTFSActivation: _neurons("a layer of TTFSNeuron that encodes the values of the activation (hold only)"),
    SignedValues: _neurons("a layer of TTFSNeuron that encodes signed values from a lowest one on"),
    nn.Dropout: _dropped(
        functions={
            _build_dropout: [F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout]
        }
    ),
    **rows_of(DROPOUTS[1:], _dropped()),
    nn.Identity: _dropped(
        routes=always, functions={_build_copy(target): [target] for target in _COPIES} | _CONVERSIONS
    ),
}

EMITTED: Rows = {
    TTFSNeuron: Operator(
        role=Role.RECTIFIER,
        how="neurons",
        settings={
            "t_max": whole(2),
            "layer": whole(1),
            "hold": FLAG,
            "rectifier": one_of(*get_args(Rectifier), None),
            "bias_code": one_of(*get_args(BiasCode)),
            "readout": whole_or_none(0),
            "input_window": whole_or_none(1),
            "has_bias": FLAG,
        },
        relate=None,
        form=None,
        gain=None,
    )
}
"""Rows of modules that conversion alone makes."""

__all__ = ["DROPOUTS", "EMITTED", "ROWS", "ceiling_of"]
