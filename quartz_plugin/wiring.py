"""A check of networks wired by hand, made while they are stepped."""

from __future__ import annotations

from torch import Tensor

from quartz_plugin.coding import is_traced
from quartz_plugin.functional import TTFSParameters, TTFSState
from quartz_plugin.warn import warn


def warn_of_late_arrivals(state: TTFSState, p: TTFSParameters, bias: Tensor | None) -> None:
    """Warn where current has arrived after the readout, when it can no longer change the values of the neurons.

    All sources end with the readout, and from then on the current is 1 (0 until a bias spike that is still to come):
    anything else is wired wrongly, or the next inference stepped without a reset. The check is made once a window.

    Parameters
    ----------
    state : TTFSState
        State after a step.
    p : TTFSParameters
        The neurons' parameters; their own bias is not looked at.
    bias : Tensor, optional
        The neurons' bias.

    Examples
    --------
    >>> import torch, warnings
    >>> from quartz_plugin.functional import ttfs_step
    >>> p, state = TTFSParameters(t_max=3), None
    >>> with warnings.catch_warnings(record=True) as caught:
    ...     warnings.simplefilter("always")
    ...     for _ in range(5):
    ...         _, state = ttfs_step(torch.ones(1, 1), state, p)
    ...         warn_of_late_arrivals(state, p, None)
    >>> [str(each.message)[:61] for each in caught]
    ['current arrives after the readout (step 2 of an inference), s']
    """
    step = int(state.step) - 1
    if (step - (p.readout or 0)) % (p.t_max - 1):  # without `readout` it is a multiple of the window
        return
    clock = p.clock
    if step <= clock.readout or is_traced(state.i):
        return
    late = state.i != 1
    if bias is not None and p.bias_code == "spike":
        late = late & (clock.bias_spike_steps(bias) <= step)
    if bool(late.any()):
        warn(
            f"current arrives after the readout (step {clock.readout} of an inference), so it is no part of the "
            "neurons' values: call quartz_plugin.reset(net) before each inference (snntorch.utils.reset does not "
            "reset them), step encode(x, ...) instead of x, number the layers 1, 2, 3, ... and give those in front "
            "bias=False"
        )
