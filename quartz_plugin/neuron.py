"""Time-to-first-spike neurons as snnTorch modules, and their companions.

The mathematics is in :mod:`quartz_plugin.functional`; these are thin shells that keep or hand on the state.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from snntorch import SpikingNeuron
from torch import Tensor, nn

from quartz_plugin.coding import NeuronClock, plain
from quartz_plugin.functional import (
    BiasCode,
    Rectifier,
    Surrogate,
    TTFSParameters,
    TTFSState,
    arctan_surrogate,
    not_fired,
    ttfs_step,
)
from quartz_plugin.wiring import warn_of_late_arrivals

_MEANINGLESS = {
    "beta": "the neuron does not leak",
    "alpha": "the neuron does not leak",
    "threshold": "the threshold is t_max - 1/2, by the code",
    "learn_threshold": "the threshold is t_max - 1/2, by the code",
    "learn_beta": "the neuron does not leak",
    "reset_mechanism": "the neuron fires once and is silent until it is reset",
    "reset_delay": "the neuron fires once and is silent until it is reset",
    "inhibition": "every neuron encodes a value of its own",
    "state_quant": "the membrane is exact",
    "graded_spikes_factor": "a spike encodes its value by its time",
    "learn_graded_spikes_factor": "a spike encodes its value by its time",
    "surrogate_disable": "leave gradients out with torch.no_grad()",
}


def _same_kind(kept: Tensor, input_: Tensor) -> bool:
    return (kept.device, kept.dtype) == (input_.device, input_.dtype)


class StatefulModule(nn.Module):
    """A module that carries state from step to step: inside (`init_hidden`) or through its caller's hands.

    ``out, state = module(input_, state)``, or with `init_hidden` ``out = module(input_)``. The hidden state is
    formed at the first step, is not part of ``state_dict``, and starts anew when the input's shape, dtype or
    device changes.
    """

    init_hidden: bool
    _hidden: Any

    def _start_hidden(self, init_hidden: bool) -> None:
        self.init_hidden = init_hidden
        self._hidden = None

    def _fits(self, state: Any, input_: Tensor) -> bool:
        raise NotImplementedError

    def advance(self, input_: Tensor, state: Any | None) -> tuple[Tensor, Any]:
        """Advance one step with a state in the caller's hands, whatever `init_hidden` is; see :meth:`forward`."""
        raise NotImplementedError

    def forward(self, input_: Tensor, state: Any = None) -> Any:
        """Advance one step; see the class."""
        if self.init_hidden:
            if state is not None:
                raise TypeError(f"{type(self).__name__} keeps its state itself (init_hidden=True); call it without one")
            state = self._hidden
            if state is not None and not self._fits(state, input_):
                state = None
        elif state is not None and not (isinstance(state, tuple) and self._fits(state, input_)):
            raise ValueError(
                f"the state given to {type(self).__name__} is not one it returned for input of shape "
                f"{list(input_.shape)} and this dtype and device; start an inference with None"
            )
        out, state = self.advance(input_, state)
        if self.init_hidden:
            self._hidden = state
            return out
        return out, state

    def reset_mem(self) -> Any:
        """Forget the inference so far. Returns the state to start a hand-written loop with."""
        self._hidden = None

    def __getstate__(self) -> dict[str, Any]:
        # Tensors inside an autograd graph cannot be deep-copied; the copy starts from their values.
        state = self.__dict__.copy()
        if state["_hidden"] is not None:
            state["_hidden"] = type(state["_hidden"])(*(value.detach() for value in state["_hidden"]))
        return state


class TTFSNeuron(StatefulModule, SpikingNeuron):
    r"""A layer of neurons that fire at most once, for snnTorch loops and Norse's SequentialState alike.

    Non-leaky neurons that integrate current; at readout their current becomes 1 and they climb to the
    threshold, so that the time of the one spike encodes ``floor(S y + 1/2) / S``, with ``y`` the weighted sum of
    the input's values, ``S = t_max - 1`` (arXiv:2309.16795). The layers in front must have ``bias=False``:
    the bias is the neuron's, and without `bias` the layer has none.

    Parameters
    ----------
    t_max : int
        ``T``, at least 2; a window has ``S = t_max - 1`` steps.
    layer : int
        ``l``, counted from 1: the neurons are read out ``l S`` steps after reset and spike in ``[l S, (l+1) S]``.
    hold : bool
        No spike before readout; values clip at 1.
    rectifier : "spike", "silent" or None
        At step ``(l+1) S``, who has not fired fires ("spike") or is switched off ("silent"): the ReLU.
        None: an output layer, which may fire until it has encoded -1, at ``(l+2) S``.
    bias : Tensor, optional
        Broadcastable to the neurons' shape without the batch: ``[F]`` behind a linear layer, ``[C, 1]``,
        ``[C, 1, 1]`` or a map behind a convolution. An ``nn.Parameter`` stays one and is trained; another tensor
        becomes a buffer.
    spike_grad : callable, optional
        Surrogate gradient, as in :mod:`snntorch.surrogate`; default: the slope of ``arctan(pi x) / pi``.
    init_hidden : bool
        Keep the state inside: ``spk = neuron(cur)``.
    output : bool
        With `init_hidden`, return ``(spk, mem)``, both tensors.
    bias_code : "synapse" or "spike"
        How the bias arrives: as a synapse from a unit that encodes 1, or as the authors' spike in time.
    readout, input_window : int, optional
        Readout step and longest source window, where they are not ``l S`` and ``S``.

    Raises
    ------
    ValueError
        If `t_max` < 2, `layer` < 1, the bias is not finite, or the combination is refused.
    TypeError
        For keywords of SpikingNeuron that mean nothing here.

    Examples
    --------
    >>> import torch
    >>> from quartz_plugin import TTFSNeuron, decode, encode
    >>> neuron = TTFSNeuron(t_max=5)
    >>> state, spikes = None, []
    >>> for cur in encode(torch.tensor([[0.25, 0.75]]), t_max=5, steps=9):
    ...     spk, state = neuron(cur, state)
    ...     spikes.append(spk)
    >>> decode(torch.stack(spikes), t_max=5, start=4)
    tensor([[0.2500, 0.7500]])
    """

    bias: Tensor | None
    spike_grad: Surrogate

    def __init__(
        self,
        t_max: int,
        layer: int = 1,
        *,
        hold: bool = False,
        rectifier: Rectifier | None = "spike",
        bias: Tensor | None = None,
        spike_grad: Surrogate | None = None,
        init_hidden: bool = False,
        output: bool = False,
        bias_code: BiasCode = "synapse",
        readout: int | None = None,
        input_window: int | None = None,
        **meaningless: Any,
    ) -> None:
        for name in meaningless:
            reason = _MEANINGLESS.get(name, "it is not a parameter of this neuron")
            raise TypeError(f"TTFSNeuron takes no {name!r}: {reason}")
        parameters = TTFSParameters(
            t_max, layer, hold, rectifier, bias, bias_code, readout, input_window, spike_grad or arctan_surrogate
        ).check()
        super().__init__(
            threshold=parameters.clock.threshold,
            spike_grad=parameters.spike_grad,
            init_hidden=init_hidden,
            output=output,
            reset_mechanism="none",
        )
        forget_instance(self)
        for constant in ("threshold", "graded_spikes_factor", "reset_mechanism_val"):
            self.register_buffer(constant, self._buffers[constant], persistent=False)
        self._start_hidden(init_hidden)
        self._parameters_but_bias = parameters._replace(bias=None)
        keep_bias(self, bias)

    @property
    def p(self) -> TTFSParameters:
        """The parameters, with the bias as it now is."""
        return self._parameters_but_bias._replace(bias=self.bias, spike_grad=self.spike_grad)

    @property
    def clock(self) -> NeuronClock:
        """Steps of this layer's readout, rectifier and last spike."""
        return self._parameters_but_bias.clock

    @property
    def mem(self) -> Tensor:
        """Membrane after the last step (with init_hidden), a tensor; empty before the first."""
        return torch.zeros(0) if self._hidden is None else self._hidden.v

    def reset_mem(self) -> TTFSState | None:
        """Forget the inference so far. Returns the state to start a hand-written loop with, None."""
        super().reset_mem()
        return None

    def init_leaky(self) -> None:
        """Do what :meth:`reset_mem` does, under snnTorch's older name."""
        self.reset_mem()

    def _fits(self, state: TTFSState, input_: Tensor) -> bool:
        fresh = (input_.shape, input_.device, torch.promote_types(input_.dtype, torch.float32))
        return isinstance(state, TTFSState) and (state.v.shape, state.v.device, state.v.dtype) == fresh

    def advance(self, input_: Tensor, state: TTFSState | None) -> tuple[Tensor, TTFSState]:
        """Advance one step; see the base class."""
        return ttfs_step(input_, state, self.p)

    def forward(self, input_: Tensor, state: TTFSState | None = None) -> Any:
        """Advance one step; a QuartzWarning where current arrives after the readout, when it changes no value.

        Parameters
        ----------
        input_ : Tensor
            Current that arrives now, ``[B, ...]``.
        state : TTFSState, optional
            State after the step before; None starts an inference. Not with `init_hidden`.

        Returns
        -------
        Tensor or tuple
            ``(spk, state)``; with `init_hidden` ``spk``, or ``(spk, mem)`` with `output`.
        """
        out = super().forward(input_, state)
        warn_of_late_arrivals(self._hidden if self.init_hidden else out[1], self._parameters_but_bias, self.bias)
        return (out, self.mem) if self.init_hidden and self.output else out

    def extra_repr(self) -> str:
        """Show the parameters that define the layer."""
        p = self._parameters_but_bias
        shape = None if self.bias is None else tuple(self.bias.shape)
        return f"t_max={p.t_max}, readout={p.clock.readout}, hold={p.hold}, rectifier={p.rectifier!r}, bias={shape}" + (
            ', bias_code="spike"' if p.bias_code == "spike" else ""
        )


class PoolState(NamedTuple):
    """1 where a pooled unit has passed its spike on, else 0."""

    fired: Tensor


_POOLS = (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d)


class FirstSpikeMaxPool(StatefulModule):
    """Max pooling of spikes: the first spike in each pooling window passes, once.

    Parameters
    ----------
    pool : nn.Module
        A max-pooling module of torch (``nn.MaxPool2d(2)``, ``nn.AdaptiveMaxPool1d(1)``, ...).
    init_hidden : bool
        Keep the state inside.

    Raises
    ------
    TypeError, ValueError
        If `pool` is no max pooling, or returns indices.

    Examples
    --------
    >>> pool = FirstSpikeMaxPool(nn.MaxPool1d(2), init_hidden=True)
    >>> [pool(torch.tensor([[[a, b]]])).item() for a, b in [(0.0, 0.0), (0.0, 1.0), (1.0, 0.0)]]
    [0.0, 1.0, 0.0]
    """

    def __init__(self, pool: nn.Module, init_hidden: bool = False) -> None:
        super().__init__()
        if not isinstance(pool, _POOLS):
            raise TypeError(f"pool must be a max-pooling module of torch.nn, got {pool!r}")
        if getattr(pool, "return_indices", False):
            raise ValueError("the pool returns indices; use return_indices=False")
        self.pool = pool
        self._input_shape: torch.Size | None = None
        self._start_hidden(init_hidden)

    def _fits(self, state: PoolState, input_: Tensor) -> bool:
        return isinstance(state, PoolState) and _same_kind(state.fired, input_) and self._input_shape == input_.shape

    def advance(self, input_: Tensor, state: PoolState | None) -> tuple[Tensor, PoolState]:
        """Advance one step; see the base class."""
        self._input_shape = input_.shape
        spikes = self.pool(input_)
        if state is None:
            return spikes, PoolState(spikes)
        spikes = spikes * not_fired(state.fired)
        return spikes, PoolState(state.fired + spikes)


class DelayState(NamedTuple):
    """Spikes on their way, the next to arrive first: ``[steps, B, ...]``."""

    queue: Tensor


class AxonalDelay(StatefulModule):
    """Delays spikes by a fixed number of steps.

    Parameters
    ----------
    steps : int
        Delay, 0 or more.
    init_hidden : bool
        Keep the state inside.

    Raises
    ------
    ValueError
        If `steps` is not a whole number, 0 or more.

    Examples
    --------
    >>> delay = AxonalDelay(2, init_hidden=True)
    >>> [delay(torch.tensor([float(spike)])).item() for spike in (1, 0, 0, 0)]
    [0.0, 0.0, 1.0, 0.0]
    """

    def __init__(self, steps: int, init_hidden: bool = False) -> None:
        super().__init__()
        steps = plain(steps)
        if isinstance(steps, bool) or not isinstance(steps, int) or steps < 0:
            raise ValueError(f"a delay is a whole number of steps, 0 or more, got {steps!r}")
        self.steps = steps
        self._start_hidden(init_hidden)

    def _fits(self, state: DelayState, input_: Tensor) -> bool:
        return (
            isinstance(state, DelayState) and _same_kind(state.queue, input_) and state.queue.shape[1:] == input_.shape
        )

    def advance(self, input_: Tensor, state: DelayState | None) -> tuple[Tensor, DelayState]:
        """Advance one step; see the base class."""
        waiting = input_.new_zeros((self.steps, *input_.shape)) if state is None else state.queue
        queue = torch.cat([waiting, input_.unsqueeze(0)])
        return queue[0], DelayState(queue[1:])

    def extra_repr(self) -> str:
        """Show the delay."""
        return f"steps={self.steps}"


def reset(net: nn.Module) -> None:
    """Reset every neuron inside `net`, nested or deep-copied, and no other network's.

    snnTorch's own neurons inside `net` are reset with ours.

    Parameters
    ----------
    net : nn.Module
        Any module; nothing happens where it holds no state.

    Examples
    --------
    >>> net = nn.Sequential(nn.Sequential(TTFSNeuron(t_max=4, init_hidden=True)))
    >>> _ = net(torch.ones(2, 3)); net[0][0].mem.shape
    torch.Size([2, 3])
    >>> reset(net); net[0][0].mem.shape
    torch.Size([0])
    """
    for module in net.modules():
        reset_mem = getattr(module, "reset_mem", None)
        if callable(reset_mem):
            reset_mem()


def keep_bias(module: nn.Module, bias: Tensor | None) -> None:
    """Give a module its bias: a parameter where it is one, else a buffer of its own."""
    if isinstance(bias, nn.Parameter):
        module.register_parameter("bias", bias)
    else:
        module.register_buffer("bias", None if bias is None else bias.detach().clone())


def forget_instance(neuron: SpikingNeuron) -> None:
    """Take `neuron` out of snnTorch's class-wide list, which would keep it alive for ever."""
    instances = SpikingNeuron.instances
    index = next((index for index in reversed(range(len(instances))) if instances[index] is neuron), None)
    if index is not None:
        del instances[index]
