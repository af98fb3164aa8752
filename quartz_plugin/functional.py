r"""The neuron's mathematics: one time step, and the closed form.

.. math::
    i_t &= i_{t-1} + \sum_j w_j s_{j,t} \;(+\, b \text{ at the window's first step}), \qquad
    i_{readout} = 1 \\
    v_t &= v_{t-1} + i_t, \qquad \text{fire once if } v_t \ge \theta = T_{max} - 1/2

and a neuron that has not fired at the rectifier step fires then (0, the ReLU). At readout
:math:`v = S (\sum_j w_j x_j + b) = S y`; the membrane then climbs by one a step, so the neuron encodes
:math:`\lfloor S y + 1/2 \rfloor / S`: that is the closed form.

Backward, the threshold has the slope of a surrogate. A loss that weighs the spike of step t by :math:`c_t` has, for a
neuron that fires at :math:`t^*`, the slope :math:`\sum_{t \le t^*} \sigma'(v_t - \theta) (c_t - c_{t^* + 1})`, that of
an earlier spike in the place of a later one. See :func:`not_fired`.

G. Lenz, G. Orchard, S. Sheik, "Ultra-low-power Image Classification on Neuromorphic Hardware", arXiv:2309.16795.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from quartz_plugin.coding import (
    MOST_TIME,
    NO_SPIKE,
    NeuronClock,
    at_least_float32,
    is_traced,
    plain,
    round_half_up,
    window_length,
)

Rectifier = Literal["spike", "silent"]
BiasCode = Literal["synapse", "spike"]
Surrogate = Callable[[Tensor], Tensor]


class TTFSState(NamedTuple):
    """State of time-to-first-spike neurons between two steps.

    Attributes
    ----------
    step : Tensor
        Steps seen, a 0-dimensional int64 tensor, on the CPU so that reading it never waits for a device.
    i : Tensor
        Synaptic current.
    v : Tensor
        Membrane.
    fired : Tensor
        1 where the neuron has fired, else 0; of v's dtype, for it carries the gradients of its spikes.
    """

    step: Tensor
    i: Tensor
    v: Tensor
    fired: Tensor


class TTFSParameters(NamedTuple):
    """Parameters of time-to-first-spike neurons; checked by :meth:`check`.

    Attributes
    ----------
    t_max : int
        ``T``, at least 2: a layer's window has ``S = T - 1`` steps.
    layer : int
        ``l``, counted from 1: the neuron is read out at ``l S``.
    hold : bool
        No spike before readout.
    rectifier : "spike", "silent" or None
        At the rectifier step, who has not fired fires ("spike", the paper's) or is switched off ("silent").
        None: an output, which may fire until it has encoded -1.
    bias : Tensor, optional
        Broadcastable to the neurons' shape without the batch (``[C, 1]`` or ``[C, 1, 1]`` for one number a channel);
        enters once per inference.
    bias_code : "synapse" or "spike"
        "synapse": weight ``b`` from a unit that encodes 1. "spike": the authors' unit-weight spike, whose time is b.
    readout : int, optional
        Readout step, where it is not ``l S``.
    input_window : int, optional
        Longest window among the sources, where it is not ``S``.
    spike_grad : callable, optional
        Surrogate whose gradient replaces that of the threshold (default :func:`arctan_surrogate`).
    """

    t_max: int
    layer: int = 1
    hold: bool = False
    rectifier: Rectifier | None = "spike"
    bias: Tensor | None = None
    bias_code: BiasCode = "synapse"
    readout: int | None = None
    input_window: int | None = None
    spike_grad: Surrogate | None = None

    @property
    def clock(self) -> NeuronClock:
        """Global steps of this layer's events."""
        clock = NeuronClock.of_layer(self.t_max, self.layer)
        if self.readout is not None:
            clock = clock._replace(readout=self.readout)
        if self.input_window is not None:
            clock = clock._replace(input_window=self.input_window)
        return clock

    @property
    def signed(self) -> bool:
        """True where values down to -1 are encoded: in an output layer, which has no rectifier."""
        return self.rectifier is None

    @property
    def silent_level(self) -> int:
        """Level of a neuron that has not fired: 0, or ``-S`` of a signed output."""
        return -self.clock.window if self.signed else 0

    @property
    def last_step(self) -> int:
        """Last global step at which a neuron of this layer may fire."""
        return self.clock.last_step(self.signed)

    def check(self) -> TTFSParameters:
        """Return these parameters with plain numbers, or raise ValueError or TypeError for what cannot be simulated."""
        numbers = {name: plain(value) for name, value in self._asdict().items() if name not in ("bias", "spike_grad")}
        return self._replace(**numbers)._checked()

    def _checked(self) -> TTFSParameters:
        window_length(self.t_max)
        for name, steps, least in (("readout", self.readout, 0), ("input_window", self.input_window, 1)):
            if steps is not None and (isinstance(steps, bool) or not isinstance(steps, int) or steps < least):
                raise ValueError(f"{name} must be a whole number of steps, at least {least}, or None, got {steps!r}")
        clock = self.clock
        window_length(clock.input_window + 1)
        if self.last_step >= MOST_TIME:
            raise ValueError(
                f"the neurons' last step would be {self.last_step}, and steps are int32 and stop at 2**31 - 1; "
                "give a smaller t_max, or fewer layers"
            )
        if self.rectifier not in (*get_args(Rectifier), None):
            raise ValueError(f'rectifier must be "spike", "silent" or None (an output layer), got {self.rectifier!r}')
        if self.bias_code not in get_args(BiasCode):
            raise ValueError(f'bias_code must be "synapse" or "spike", got {self.bias_code!r}')
        if clock.first_input < 0:
            raise ValueError(
                f"readout {clock.readout} leaves no room for an input window of {clock.input_window} steps"
            )
        if self.bias_code == "spike" and (self.hold or self.rectifier == "silent"):
            raise ValueError(
                'bias_code="spike" is the paper\'s neuron: it goes with hold=False and rectifier="spike" only'
            )
        if self.spike_grad is not None and not callable(self.spike_grad):
            raise TypeError(
                f"spike_grad must be a function of a tensor, as in snntorch.surrogate, got {self.spike_grad!r}"
            )
        if self.bias is not None:
            if not isinstance(self.bias, Tensor):
                raise TypeError(f"bias must be a Tensor or None, got {type(self.bias).__name__}")
            if not bool(torch.isfinite(self.bias).all()):
                raise ValueError("bias contains NaN or infinity")
            if self.bias_code == "spike" and self.bias.numel():
                earliest = int(clock.bias_spike_steps(self.bias).min())
                if earliest < 0:
                    raise ValueError(
                        f"a bias spike would arrive at step {earliest}, before the clock starts; "
                        f"give readout={clock.readout - earliest} and delay the input by {-earliest} steps"
                    )
        return self


def arctan_surrogate(x: Tensor) -> Tensor:
    r"""Smooth stand-in for the threshold, :math:`\arctan(\pi x) / \pi`, used for its gradient alone.

    Examples
    --------
    >>> x = torch.zeros(1, requires_grad=True)
    >>> arctan_surrogate(x).backward(); x.grad
    tensor([1.])
    """
    return torch.atan(math.pi * x) / math.pi


def initial_state(input_: Tensor) -> TTFSState:
    """State before the first step, for neurons of the shape, device and (at least float32) dtype of `input_`."""
    zeros = torch.zeros_like(input_, dtype=at_least_float32(input_.dtype), requires_grad=False)
    return TTFSState(torch.zeros((), dtype=torch.int64), zeros, zeros, zeros)


def ttfs_step(input_: Tensor, state: TTFSState | None, p: TTFSParameters, dt: float = 1.0) -> tuple[Tensor, TTFSState]:
    r"""One time step of time-to-first-spike neurons, a pure function.

    In this order: arrivals and bias add to the current; at readout the current becomes 1; the membrane adds
    the current; fire if ``v >= theta`` and not fired before; at the rectifier step fire if not fired.

    Parameters
    ----------
    input_ : Tensor
        Current that arrives at this step (weights times spikes), shape ``[B, ...]``.
    state : TTFSState or None
        State after the step before; None starts an inference.
    p : TTFSParameters
        The neurons' parameters.
    dt : float
        For Norse's signature; time is counted in steps, so it changes nothing.

    Raises
    ------
    ValueError
        At step 0, if the bias does not fit the neurons' shape, or fits in more than one way; at readout, if a
        membrane is NaN.

    Returns
    -------
    spikes : Tensor
        0 or 1, of input_'s shape and dtype.
    state : TTFSState
        State after this step, float32 at least.

    Examples
    --------
    A value 1/3 of three levels, read out at step 3, fires two steps later:

    >>> p = TTFSParameters(t_max=4, layer=1)
    >>> state, train = None, []
    >>> for step in range(7):
    ...     spike, state = ttfs_step(torch.tensor([1 / 3 if step == 0 else 0.0]), state, p)
    ...     train.append(int(spike))
    >>> train
    [0, 0, 0, 0, 0, 1, 0]
    """
    del dt
    if state is None:
        state = initial_state(input_)
    clock, step = p.clock, int(state.step)
    if step == 0:
        check_bias_shape(p.bias, input_)
    i = state.i + input_.to(state.i.dtype)
    bias = None if p.bias is None else p.bias.to(i)
    if bias is not None and p.bias_code == "spike":
        bias_steps = clock.bias_spike_steps(bias)
        i = i + (bias_steps == step).to(i.dtype)
    elif bias is not None and step == clock.first_input:
        i = i + bias
    if step == clock.readout:
        drive = state.v if bias is None else state.v + bias
        if not is_traced(drive) and bool(drive.isnan().any()):
            raise ValueError("a membrane is NaN: a weight, a bias or an input is NaN or infinite")
        i = torch.ones_like(i)
        if bias is not None and p.bias_code == "spike":
            # A negative bias is a spike still to come: until then nothing pulls the membrane up.
            i = i * (bias_steps <= step).to(i.dtype)
    v = state.v + i

    if not may_fire(p, step):
        spikes = torch.zeros_like(v)
    else:
        crossed = torch.ones_like(v) if must_fire(p, step) else threshold(v - clock.threshold, p.spike_grad)
        spikes = crossed * not_fired(state.fired)
    state = TTFSState(state.step + 1, i, v, state.fired + spikes)
    return spikes.to(input_.dtype if input_.is_floating_point() else v.dtype), state


def check_bias_shape(bias: Tensor | None, input_: Tensor) -> None:
    """Raise ValueError unless a bias fits neurons that are given `input_`, ``[B, ...]``, in one way alone."""
    if bias is None:
        return
    neurons = input_.shape[1:]
    fits = bias.dim() <= len(neurons) and all(
        own in (1, size) for own, size in zip(reversed(bias.shape), reversed(neurons), strict=False)
    )
    # One number a channel would broadcast along the last dimension of [C, H, W] or [C, C], not along the channels.
    alone = bias.dim() == 1 < len(neurons) and len(bias) > 1
    if fits and not (alone and (len(neurons) == 3 or len(bias) == neurons[0])):
        return
    ones = ", 1" * (len(neurons) - 1)
    hint = f"; for channels give bias.view(-1{ones})" if bias.dim() == 1 < len(neurons) else ""
    hint += f", for the last dimension bias.view({ones[2:]}, -1)" if hint and fits else ""
    raise ValueError(
        f"a bias of shape {list(bias.shape)} does not fit neurons of shape {list(neurons)} (no batch){hint}"
    )


def may_fire(p: TTFSParameters, step: int) -> bool:
    """True where any neuron of the layer may fire at this step."""
    if p.hold and step < p.clock.readout:
        return False
    if p.rectifier == "silent" and step >= p.clock.rectify:
        return False
    return step <= p.last_step


def must_fire(p: TTFSParameters, step: int) -> bool:
    """True where a neuron that has not fired encodes 0 at this step."""
    return p.rectifier == "spike" and step == p.clock.rectify


def not_fired(fired: Tensor) -> Tensor:
    """1 where a unit has not fired, else 0; backward, it has a slope where it has.

    There a spike's slope is taken from the step behind it, so that to fire earlier is no spike more. Before a spike
    there is none: else each earlier step would take from the spike what it gives to itself, and together, to a loss
    that looks at the spike alone (a spike's time), they would outweigh its own slope and lead uphill.

    Examples
    --------
    >>> not_fired(torch.tensor([0.0, 1.0]))
    tensor([1., 0.])
    """
    return 1 - fired * fired.detach()


def threshold(x: Tensor, spike_grad: Surrogate | None = None) -> Tensor:
    """1 where ``x >= 0``, else 0; backward, the gradient of `spike_grad`.

    snnTorch's surrogates fire on ``x > 0``, Quartz on ``x >= 0``: only their gradient is used.

    Examples
    --------
    >>> threshold(torch.tensor([-1.0, 0.0, 1.0]))
    tensor([0., 1., 1.])
    """
    crossed = (x >= 0).to(x.dtype)
    if not (torch.is_grad_enabled() and x.requires_grad):
        return crossed
    smooth = (spike_grad or arctan_surrogate)(x)
    return crossed + (smooth - smooth.detach())


def fires_before_deadline(drive: Tensor, window: int) -> Tensor:
    """True where a signed output with this drive (in levels) fires by its last step, which encodes -1."""
    return drive >= -window - 0.5


def closed_form(drive: Tensor, window: int, lowest: int = 0, *, inplace: bool = False) -> Tensor:
    r"""Levels that held neurons encode: :math:`clip(\lfloor S y + 1/2 \rfloor, lowest, S)`.

    Differentiable by a straight-through estimator: the rounding has gradient 1, the clipping its own.

    Parameters
    ----------
    drive : Tensor
        ``S y``: the membrane at readout, in levels.
    window : int
        ``S`` of the neurons.
    lowest : int
        0 for rectified neurons, ``-S`` for signed outputs.
    inplace : bool
        Overwrite `drive`, where no gradient is wanted.

    Examples
    --------
    >>> closed_form(torch.tensor([-3.0, 1.4, 1.5, 99.0]), window=15)
    tensor([ 0.,  1.,  2., 15.])
    """
    # Clipped before it is rounded (the bounds are whole): values that round to a bound keep their gradient.
    inplace = inplace and not drive.requires_grad
    clipped = drive.clamp_(lowest, window) if inplace else drive.clamp(lowest, window)
    return round_half_up(clipped, inplace=not clipped.requires_grad)


def fake_quantize(drive: Tensor, scale: Tensor, window: int, lowest: int = 0) -> Tensor:
    """Values that held neurons of this scale and window encode for a drive, in its units: a closed form of ``S y / s``.

    Examples
    --------
    >>> fake_quantize(torch.tensor([-1.0, 1.4, 1.6, 9.0]), torch.tensor(3.0), window=3)
    tensor([0., 1., 2., 3.])
    """
    return closed_form(drive * (window / scale), window, lowest) * (scale / window)


def spike_steps_of(p: TTFSParameters, levels: Tensor, fired: Tensor | None = None) -> Tensor:
    """Global steps (int32) of the spikes that encode these levels; :data:`NO_SPIKE` where there is no spike.

    Parameters
    ----------
    p : TTFSParameters
        The neurons' parameters.
    levels : Tensor
        Levels that they encode.
    fired : Tensor, optional
        Bool, of levels' shape: which of them fire at all; None: all.

    Examples
    --------
    >>> spike_steps_of(TTFSParameters(t_max=4, rectifier="silent"), torch.tensor([3.0, 1.0, 0.0]))
    tensor([ 3,  5, -1], dtype=torch.int32)
    """
    steps = p.clock.output_window.steps_of(levels)
    if fired is not None:
        steps.masked_fill_(~fired, NO_SPIKE)
    if p.rectifier == "silent":
        steps.masked_fill_(levels == 0, NO_SPIKE)
    return steps
