"""The closed form of held neurons as an activation, to train and to tune networks with."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from quartz_plugin.coding import at_least_float32, window_length
from quartz_plugin.functional import closed_form
from quartz_plugin.layout import stored_like


class _Rounding(torch.autograd.Function):
    """The closed form in units of the values, with its straight-through gradients, in few passes over memory."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, window: int, lowest: int, gradient_outside: bool) -> Tensor:
        drive = x * (window / scale)
        encoded = closed_form(drive, window, lowest).mul_(scale / window)
        ctx.save_for_backward(drive, encoded, scale)
        ctx.window, ctx.lowest, ctx.gradient_outside = window, lowest, gradient_outside
        return encoded

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        drive, encoded, scale = ctx.saved_tensors
        # Norms in front are slow with gradients that are stored in another order than their values.
        grad = stored_like(grads[0], drive)
        through = torch.ops.aten.hardtanh_backward(grad, drive, ctx.lowest, ctx.window)
        by_scale = None
        if ctx.needs_input_grad[1]:
            # The level's part and that of the drive, whose sums need no value kept beside these two.
            product = grad * encoded
            by_scale = product.sum_to_size(scale.shape) / scale
            by_scale -= torch.mul(through, drive, out=product).sum_to_size(scale.shape) / ctx.window
        if ctx.gradient_outside:
            # Where it leads back into the range.
            outside = ((drive > ctx.window) & (grad > 0)) | ((drive < ctx.lowest) & (grad < 0))
            through = torch.where(outside, grad, through)
        return through, by_scale, None, None, None


def check_range(scale: Tensor, shift: Tensor, signed: bool) -> None:
    """Raise ValueError where no activation encodes values of this scale and shift."""
    if not bool(torch.isfinite(scale).all() and (scale > 0).all()):
        raise ValueError(f"scale must be positive and finite, got {scale.tolist()}")
    if not bool(torch.isfinite(shift).all()) or (bool(shift.any()) and not signed):
        raise ValueError(f"shift must be a finite number, and 0 unless signed, got {shift.tolist()}")


class TTFSActivation(nn.Module):
    r"""Values that held neurons encode for their drive: clipped and rounded, with straight-through gradients.

    .. math:: y \mapsto \frac{s}{S}\, clip(\lfloor S y / s + 1/2 \rfloor, lowest, S), \quad S = t_{max} - 1

    It stands in a network where a ReLU stood. :func:`quartz_plugin.convert` makes a spiking layer of it that encodes
    these values, whatever calibration images it is given (arXiv:2309.16795; the learned scale is that of
    arXiv:1902.08153).

    Parameters
    ----------
    t_max : int
        ``T``: the number of values, zero and the scale among them.
    scale : float or Tensor
        What the value 1 stands for, positive: one number, or one for each channel, ``[C, 1, ...]``.
    signed : bool
        Encode values from ``-scale`` on, as an output does; ``lowest`` is then ``-S``, else 0.
    learned : bool
        Let the logarithm of the scale be a parameter. Its gradient is divided by the root of the number of units that
        have it and of ``S``.
    ceiling : float, optional
        The scale's upper bound, as a ReLU6 has it.
    shift : float or Tensor
        What a signed activation's value 0 stands for: it encodes values from ``shift - scale`` to ``shift + scale``.
        One number, or one for each channel, ``[C, 1, ...]``.

    Raises
    ------
    ValueError
        If `t_max` < 2, or the scale is not positive and finite.

    Examples
    --------
    >>> TTFSActivation(t_max=4, scale=3.0)(torch.tensor([-1.0, 1.4, 1.6, 9.0])).tolist()
    [0.0, 1.0, 2.0, 3.0]
    """

    log_scale: Tensor
    shift: Tensor

    def __init__(
        self,
        t_max: int,
        scale: float | Tensor = 1.0,
        *,
        signed: bool = False,
        learned: bool = True,
        ceiling: float | None = None,
        shift: float | Tensor = 0.0,
    ) -> None:
        super().__init__()
        self.window = window_length(t_max)
        # The logarithm in float64: what it is rounded to later does not hang on the default type.
        scale, dtype = torch.as_tensor(scale, dtype=torch.float64).detach(), at_least_float32(torch.get_default_dtype())
        shift = torch.as_tensor(shift, dtype=torch.float64).detach()
        check_range(scale, shift, signed)
        self.signed, self.ceiling = signed, ceiling
        # A regression's has one there, which leads back into the range.
        self.gradient_outside = False
        self.register_buffer("shift", shift.to(dtype).clone())
        if learned:
            self.log_scale = nn.Parameter(scale.log().to(dtype))
        else:
            self.register_buffer("log_scale", scale.log().to(dtype))

    @property
    def t_max(self) -> int:
        """``T``."""
        return self.window + 1

    @property
    def scale(self) -> Tensor:
        """Activation that the value 1 stands for."""
        scale = self.log_scale.exp()
        # Straight-through: a scale at its ceiling may still learn to be smaller.
        return scale if self.ceiling is None else scale + (scale.clamp(max=self.ceiling) - scale).detach()

    def forward(self, x: Tensor) -> Tensor:
        """Round values ``[B, ...]``."""
        scale = self.scale
        if scale.requires_grad:
            # A scale that many units share would else learn faster than their weights (arXiv:1902.08153).
            share = 1 / math.sqrt(max(1, x.shape[1:].numel() // scale.numel()) * self.window)
            scale = scale * share + (scale * (1 - share)).detach()
        lowest, shift = (-self.window, self.shift) if self.signed else (0, None)
        drive = x if shift is None else x - shift
        encoded: Tensor = _Rounding.apply(drive, scale, self.window, lowest, self.gradient_outside)  # type: ignore[no-untyped-call]
        return encoded if shift is None else encoded + shift

    def extra_repr(self) -> str:
        """Show the window and the scale."""
        scale = self.scale.detach()
        shown = f"{float(scale):.4g}" if scale.numel() == 1 else f"{tuple(scale.shape)}"
        return f"t_max={self.t_max}, scale={shown}" + (", signed=True" if self.signed else "")
