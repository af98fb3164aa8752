r"""The latency code and the clock.

A value :math:`x \in [0, 1]` is one spike at step :math:`\lceil S (1 - x) - 1/2 \rceil` of a window of
:math:`S = T_{max} - 1` steps. A spike at window step ``k`` encodes the **level** ``n = S - k``, the value ``n / S``.

Every step at which anything happens is computed here, and nowhere else.

G. Lenz, G. Orchard, S. Sheik, "Ultra-low-power Image Classification on Neuromorphic Hardware", arXiv:2309.16795.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, ParamSpec, TypeVar

import numpy as np
import torch
from torch import Tensor

P = ParamSpec("P")
Returned = TypeVar("Returned")

NO_SPIKE = -1
"""The step of a unit that did not fire."""

MOST_STEPS = 2**24
"""``T`` from which on float32, in which levels are carried, no longer holds every level."""

MOST_TIME = 2**31
"""Global step from which on int32, in which spike steps are recorded, wraps."""

LARGEST_BIAS = 1.5
"""Largest bias that a bias spike encodes, relative to what a spike at once encodes; larger ones are clamped."""


class Window(NamedTuple):
    """The steps ``[start, start + length]`` in which the units of one layer encode their values.

    Attributes
    ----------
    start : int
        Global step of a spike that encodes 1.
    length : int
        ``S``: steps from the value 1 to the value 0.

    Examples
    --------
    >>> window = Window(start=15, length=15)
    >>> window.end, window.level_at(20), window.step_of(10)
    (30, 10, 20)
    """

    start: int
    length: int

    @classmethod
    def of_input(cls, t_max: int) -> Window:
        """Window of the input encoder: the clock starts with it."""
        return cls(0, window_length(t_max))

    @property
    def end(self) -> int:
        """Global step of a spike that encodes 0."""
        return self.start + self.length

    def level_at(self, step: int) -> int:
        """Level that a spike at this global step encodes."""
        return self.end - step

    def step_of(self, level: int) -> int:
        """Global step of the spike that encodes this level."""
        return self.end - level

    def steps_of(self, levels: Tensor) -> Tensor:
        """Global steps (int32) of the spikes that encode these levels; same shape."""
        return levels.to(torch.int32, copy=True).neg_().add_(self.end)

    def levels_at(self, steps: Tensor, silent: int | None = 0, dtype: torch.dtype = torch.int32) -> Tensor:
        """Levels encoded by spikes at these global steps; `silent` where there is none (None: all have spikes)."""
        # Steps beyond 2**24 are whole numbers in int32 alone.
        exact = dtype if self.end < MOST_STEPS else torch.int32
        levels = torch.sub(torch.tensor(self.end, dtype=exact, device=steps.device), steps).to(dtype)
        return levels if silent is None else levels.masked_fill_(steps == NO_SPIKE, silent)

    def delayed(self, steps: int) -> Window:
        """Return the same window, seen behind an axonal delay."""
        return Window(self.start + steps, self.length)


class NeuronClock(NamedTuple):
    """Global steps at which the events of one spiking layer happen.

    Attributes
    ----------
    readout : int
        Step at which the current becomes 1; the windows of all sources end here.
    window : int
        ``S`` of the layer's own spikes.
    input_window : int
        Longest window among the sources; the bias enters at ``readout - input_window``.

    Examples
    --------
    >>> clock = NeuronClock.of_layer(t_max=16, layer=2)
    >>> clock.readout, clock.rectify, clock.threshold
    (30, 45, 15.5)
    """

    readout: int
    window: int
    input_window: int

    @classmethod
    def of_layer(cls, t_max: int, layer: int) -> NeuronClock:
        """Clock of layer `layer` (counted from 1) where all windows are alike."""
        length = window_length(t_max)
        if isinstance(layer, bool) or not isinstance(layer, int) or layer < 1:
            raise ValueError(f"layer must be a whole number of at least 1 (the input is layer 0), got {layer!r}")
        return cls(readout=layer * length, window=length, input_window=length)

    @property
    def output_window(self) -> Window:
        """Window in which the layer spikes."""
        return Window(self.readout, self.window)

    @property
    def threshold(self) -> float:
        """``T_max - 1/2``."""
        return self.window + 0.5

    @property
    def first_input(self) -> int:
        """First step of the layer's input window; a bias synapse delivers here."""
        return self.readout - self.input_window

    @property
    def rectify(self) -> int:
        """Step at which a neuron that has not fired encodes 0."""
        return self.readout + self.window

    def last_step(self, signed: bool) -> int:
        """Last step in which a neuron may fire; `signed` where values down to -1 are encoded."""
        return self.readout + (2 if signed else 1) * self.window

    def bias_spike_steps(self, bias: Tensor) -> Tensor:
        r"""Steps at which unit-weight bias spikes arrive: ``first_input + round(S (2 - b)) - S``, half to even.

        `bias` is clamped first, as the authors of Quartz do. A negative result: readout must be that much later.
        """
        clamped = bias.clamp(-LARGEST_BIAS, LARGEST_BIAS)
        return torch.round(self.input_window * (2.0 - clamped)) - self.input_window + self.first_input


def window_length(t_max: int) -> int:
    """``S = t_max - 1``, the length of one window in steps.

    Raises
    ------
    ValueError
        If `t_max` is not a whole number of at least 2 and below 2**24.

    Examples
    --------
    >>> window_length(16)
    15
    """
    if isinstance(t_max, bool) or not hasattr(t_max, "__index__") or operator.index(t_max) < 2:
        raise ValueError(f"t_max must be a whole number of at least 2 (two levels), got {t_max!r}")
    if operator.index(t_max) >= MOST_STEPS:
        raise ValueError(
            f"t_max must be below 2**24 = {MOST_STEPS}, from which on float32 no longer holds every level, "
            f"got {t_max!r}"
        )
    return operator.index(t_max) - 1


def plain(value: Any) -> Any:
    """A number of numpy or torch as Python's, also inside of tuples, lists, mappings and slices; the rest as it is.

    Files hold plain numbers, and what they are compared with are such.

    Examples
    --------
    >>> import numpy as np
    >>> plain({"t_max": np.int64(8), "percentile": np.float32(99.5), "kernel": (torch.tensor(3), np.bool_(True))})
    {'t_max': 8, 'percentile': 99.5, 'kernel': (3, True)}
    """
    if isinstance(value, np.generic | np.ndarray | Tensor):
        return value.item() if value.ndim == 0 else value
    if isinstance(value, tuple) and type(value) is not torch.Size:
        parts = map(plain, value)
        return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
    if isinstance(value, list):
        return list(map(plain, value))
    if isinstance(value, Mapping):
        return {plain(key): plain(entry) for key, entry in value.items()}
    if isinstance(value, slice):
        return slice(plain(value.start), plain(value.stop), plain(value.step))
    return value


def with_plain_numbers(function: Callable[P, Returned]) -> Callable[P, Returned]:
    """Let a function take numbers of numpy and torch as :func:`plain` gives them."""

    @functools.wraps(function)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> Returned:
        return function(*map(plain, args), **{name: plain(value) for name, value in kwargs.items()})  # type: ignore[arg-type]

    return wrapped


def at_least_float32(dtype: torch.dtype) -> torch.dtype:
    """Return `dtype`, or float32 where it is too narrow to hold a membrane."""
    return dtype if dtype in (torch.float32, torch.float64) else torch.float32


def is_traced(x: Tensor) -> bool:
    """True where `x` has no values to look at: it is traced by torch.compile, torch.export or torch.func, or meta.

    What would be refused for its values is then taken on trust.
    """
    return torch.compiler.is_compiling() or x.is_meta or torch._C._functorch.is_functorch_wrapped_tensor(x)


TOLERANCE = 1e-6
"""Distance outside [0, 1] at which a value is still taken for 0 or 1: what resizing or dividing in float32 leaves."""


def check_unit_interval(x: Tensor, what: str = "x") -> Tensor:
    """Return `x`, what lies outside [0, 1] by rounding alone clamped.

    Raises
    ------
    TypeError, ValueError
        Unless it is a floating-point tensor with all values in [0, 1] but for :data:`TOLERANCE`.

    Examples
    --------
    >>> check_unit_interval(torch.tensor([0.25, 1.0000001]))
    tensor([0.2500, 1.0000])
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"{what} must be a torch.Tensor, got {type(x).__name__}")
    if not x.is_floating_point():
        hint = "divide raw bytes by 255" if x.dtype == torch.uint8 else "give x.float() / the largest value it can have"
        raise ValueError(f"{what} must be floating point in [0, 1], got {x.dtype}; {hint}")
    if is_traced(x) or x.numel() == 0:
        return x
    low, high = (float(value) for value in x.detach().aminmax())
    if low >= 0.0 and high <= 1.0:
        return x
    if low != low or high != high:
        raise ValueError(f"{what} contains NaN")
    if low >= -TOLERANCE and high <= 1.0 + TOLERANCE:
        return x.clamp(0.0, 1.0)
    hint = _how_to_map(x.detach().double(), low, high)
    raise ValueError(f"{what} must lie in [0, 1], got values from {low:.7g} to {high:.7g}; {hint}")


def _how_to_map(x: Tensor, low: float, high: float) -> str:
    """Advice on mapping values from `low` to `high` into [0, 1], and on giving the network what it was trained on."""
    width = high - low
    if not math.isfinite(width):
        return "give finite values"
    if low >= 0.0:
        most = "raw bytes by 255" if 16.0 < high <= 255.0 else "them by the largest value they can have"
        return f"divide {most}, and give convert preprocessing=(0, 1 / that) where the network was trained without it"
    normalised = abs(float(x.mean())) < 1.0 and x.numel() > 1 and 0.4 < float(x.std()) < 2.0
    raw = "it looks normalised: pass raw images and preprocessing=(mean, std) to convert; or " if normalised else ""
    here = f", here ({-low / width:.4g}, {1 / width:.4g})" if width > 0.0 else ""
    return (
        f"{raw}map them by (x - low) / (high - low), and let convert take that back for the network: "
        f"preprocessing=(-low / (high - low), 1 / (high - low)){here}"
    )


def to_levels(x: Tensor, t_max: int) -> Tensor:
    r"""Levels ``n = S - ceil(S (1 - x) - 1/2)`` of values in [0, 1]; float32 at least, same shape.

    Examples
    --------
    >>> to_levels(torch.tensor([0.0, 0.5, 1.0]), t_max=4)
    tensor([0., 2., 3.])
    """
    length = window_length(t_max)
    return round_half_up(x.to(at_least_float32(x.dtype)) * length)


def round_half_up(x: Tensor, *, inplace: bool = False) -> Tensor:
    r""":math:`\lfloor x + 1/2 \rfloor`, with gradient 1 (straight-through).

    `inplace` overwrites `x` where no gradient is wanted.

    Examples
    --------
    >>> round_half_up(torch.tensor([0.4, 0.5, -0.5]))
    tensor([0., 1., 0.])
    """
    if torch.is_grad_enabled() and x.requires_grad:
        return x + ((x + 0.5).floor() - x).detach()
    return (x.add_(0.5) if inplace else x + 0.5).floor_()


def encode(x: Tensor, t_max: int, steps: int | None = None, *, silent_zeros: bool = False) -> Tensor:
    r"""Latency code: one spike per value, the earlier the larger.

    The spike of value ``x`` comes at step :math:`\lceil S (1 - x) - 1/2 \rceil`, ``S = t_max - 1``.

    Parameters
    ----------
    x : Tensor
        Values in [0, 1], shape ``[B, ...]``.
    t_max : int
        ``T``; at least 2.
    steps : int, optional
        Length of the time axis, at least ``t_max`` (the default), which holds the input alone. A network goes on
        after its input: pass ``snn.n_steps``, or for ``L`` layers of your own ``(L + 1) * (t_max - 1) + 1``, and one
        window more, ``(L + 2) * (t_max - 1) + 1``, where the last of them is a signed output (``rectifier=None``).
    silent_zeros : bool
        Send no spike for the level 0.

    Returns
    -------
    Tensor
        Spikes, 0 or 1, of x's dtype and device; shape ``[steps, B, ...]``, time first.

    Raises
    ------
    ValueError
        If a value lies outside [0, 1] or is NaN, `t_max` < 2 or >= 2**24, or `steps` < `t_max`.

    Examples
    --------
    >>> encode(torch.tensor([[1.0, 0.5, 0.0]]), t_max=3)
    tensor([[[1., 0., 0.]],
            [[0., 1., 0.]],
            [[0., 0., 1.]]])
    """
    length = window_length(t_max)
    x = check_unit_interval(x)
    steps = t_max if steps is None else plain(steps)
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < t_max:
        raise ValueError(f"steps must be at least t_max = {t_max}, a whole number, got {steps!r}")
    levels = to_levels(x, t_max)
    spikes = x.new_zeros((steps, *x.shape))
    spikes.scatter_(0, (length - levels).long().unsqueeze(0), 1.0)
    if silent_zeros:
        spikes[length].masked_fill_(levels == 0, 0.0)
    return spikes


def decode(spikes: Tensor, t_max: int, start: int = 0, *, silent: float = 0.0) -> Tensor:
    """Values encoded by the first spike of each unit; the inverse of :func:`encode`.

    A time has no gradient: a loss on spikes weighs them by their steps instead.

    Parameters
    ----------
    spikes : Tensor
        Spike trains, time first: ``[steps, B, ...]``; nonzero is a spike.
    t_max : int
        ``T``; at least 2.
    start : int
        Step of a spike that encodes 1: 0 for the input, ``l * (t_max - 1)`` for layer ``l``.
    silent : float
        Value of a unit that did not fire. Give -1 for a signed output (``rectifier=None``), whose late spikes encode
        values down to -1: with 0 an output that stays silent would be larger than one that fires late.

    Returns
    -------
    Tensor
        ``(S - (first step - start)) / S``, shape ``[B, ...]``; `silent` where no spike came. Early spikes
        encode more than 1, spikes after the window (a signed output) less than 0.

    Raises
    ------
    ValueError
        If `t_max` < 2 or >= 2**24, there is no time axis, or `silent` is no number.

    Examples
    --------
    >>> decode(encode(torch.tensor([[0.0, 0.4, 1.0]]), t_max=6), t_max=6)
    tensor([[0.0000, 0.4000, 1.0000]])
    >>> decode(torch.zeros(9, 1, 2), t_max=3, start=4, silent=-1.0)
    tensor([[-1., -1.]])
    """
    length = window_length(t_max)
    if spikes.dim() == 0 or spikes.shape[0] == 0:
        raise ValueError(f"spikes must have a time axis first, [steps, B, ...], got shape {tuple(spikes.shape)}")
    silent = plain(silent)
    if isinstance(silent, bool) or not isinstance(silent, int | float):
        raise ValueError(f"silent must be a number, the value of units that did not fire, got {silent!r}")
    fired = spikes != 0
    levels = Window(start, length).end - fired.to(torch.int8).argmax(dim=0)
    dtype = at_least_float32(spikes.dtype)
    silent_value = torch.full((), silent, dtype=dtype, device=spikes.device)
    return torch.where(fired.any(dim=0), levels.to(dtype) / length, silent_value)
