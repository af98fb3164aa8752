r"""Time-to-first-spike neurons in Norse's idiom: a pure step function, a cell, and whole sequences.

.. math::
    i_t = i_{t-1} + \sum_j w_j s_{j,t}, \qquad v_t = v_{t-1} + i_t, \qquad
    z_t = \Theta(v_t - \theta) \text{ once}, \quad \theta = T_{max} - 1/2

and at the readout step :math:`i = 1`. See :mod:`quartz_plugin.functional` for every rule.

References
----------
G. Lenz, G. Orchard, S. Sheik, "Ultra-low-power Image Classification on Neuromorphic Hardware",
arXiv:2309.16795, https://doi.org/10.48550/arXiv.2309.16795.
"""

from __future__ import annotations

import warnings
from typing import Any

from torch import Tensor, nn

from quartz_plugin.functional import TTFSParameters, TTFSState, initial_state, ttfs_step
from quartz_plugin.neuron import keep_bias
from quartz_plugin.wiring import warn_of_late_arrivals

try:
    with warnings.catch_warnings():
        # Norse compiles functions when it is imported, and torch warns of each.
        warnings.filterwarnings("ignore", r"`torch\.jit\.\w+` is deprecated")
        from norse.torch.module.snn import SNN, SNNCell
except ImportError as error:
    raise ImportError("quartz_plugin.norse needs Norse: pip install 'quartz_plugin[norse]'") from error

__all__ = ["TTFS", "TTFSCell", "TTFSParameters", "TTFSState", "ttfs_step"]


class _BiasOfModule(nn.Module):
    """Keeps the bias of ``p`` as the module's own: tensors inside a NamedTuple reach neither state_dict nor ``.to``."""

    bias: Tensor | None

    @property
    def p(self) -> TTFSParameters:
        """The neurons' parameters, with the bias as it now is."""
        parameters: TTFSParameters = self._parameters_but_bias
        return parameters._replace(bias=self.bias)

    @p.setter
    def p(self, parameters: TTFSParameters) -> None:
        self._parameters_but_bias = parameters.check()._replace(bias=None)
        keep_bias(self, parameters.bias)


class TTFSCell(_BiasOfModule, SNNCell):
    """One time step of neurons that fire at most once, for :class:`norse.torch.SequentialState`.

    Parameters
    ----------
    p : TTFSParameters
        The neurons' parameters; ``p.bias`` becomes a buffer (or stays a parameter) of the module.

    Raises
    ------
    ValueError
        If the parameters cannot be simulated; see :meth:`TTFSParameters.check`.

    Examples
    --------
    >>> import torch
    >>> from norse.torch import SequentialState
    >>> net = SequentialState(torch.nn.Linear(3, 2, bias=False), TTFSCell(TTFSParameters(t_max=4)))
    >>> spikes, state = net(torch.ones(5, 3))
    >>> spikes, state = net(torch.zeros(5, 3), state)
    >>> spikes.shape, int(state[1].step)
    (torch.Size([5, 2]), 2)
    """

    def __init__(self, p: TTFSParameters, **kwargs: Any) -> None:
        super().__init__(activation=_checked_step, state_fallback=initial_state, p=p, **kwargs)


class TTFS(_BiasOfModule, SNN):
    """Whole sequences through neurons that fire at most once.

    Parameters
    ----------
    p : TTFSParameters
        The neurons' parameters; ``p.bias`` becomes a buffer (or stays a parameter) of the module.
    record_states : bool
        Return the states of all steps, stacked, in place of the last.

    Raises
    ------
    ValueError
        If the parameters cannot be simulated; see :meth:`TTFSParameters.check`.

    Examples
    --------
    >>> import torch
    >>> from quartz_plugin import decode, encode
    >>> spikes, state = TTFS(TTFSParameters(t_max=5))(encode(torch.tensor([[0.25, 0.75]]), 5, steps=9))
    >>> decode(spikes, t_max=5, start=4)
    tensor([[0.2500, 0.7500]])
    """

    def __init__(self, p: TTFSParameters, **kwargs: Any) -> None:
        super().__init__(activation=_checked_step, state_fallback=_state_of_one_step, p=p, **kwargs)


def _checked_step(
    input_: Tensor, state: TTFSState | None, p: TTFSParameters, dt: float = 1.0
) -> tuple[Tensor, TTFSState]:
    spikes, state = ttfs_step(input_, state, p, dt)
    warn_of_late_arrivals(state, p, p.bias)
    return spikes, state


def _state_of_one_step(sequence: Any) -> TTFSState:
    return initial_state(sequence[0])
