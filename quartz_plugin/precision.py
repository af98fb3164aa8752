"""Arithmetic that results can be vouched for with: float32 at least, whatever modes the caller has switched on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch

_AUTOCAST = ("cpu", "cuda", "mps", "xpu")
"""Kinds of devices that may have autocast on."""


@contextmanager
def full_precision() -> Iterator[None]:
    """Neither autocast nor TF32 nor its like on other devices: all round what is multiplied.

    Examples
    --------
    >>> a = torch.full((1, 1), 1.001)
    >>> with torch.autocast("cpu", torch.bfloat16), full_precision():
    ...     print((a @ a).dtype)
    torch.float32
    """
    with ExitStack() as stack:
        for kind in _AUTOCAST:
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        if torch.cuda.is_available() and torch.backends.cudnn.allow_tf32:
            stack.callback(setattr, torch.backends.cudnn, "allow_tf32", True)
            torch.backends.cudnn.allow_tf32 = False
        if (before := torch.get_float32_matmul_precision()) != "highest":
            stack.callback(torch.set_float32_matmul_precision, before)
            torch.set_float32_matmul_precision("highest")
        yield


@contextmanager
def outside_inference_mode() -> Iterator[None]:
    """In inference mode, run without gradients instead: its tensors could not be edited, or learned from, later."""
    with ExitStack() as stack:
        if torch.is_inference_mode_enabled():
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.no_grad())
        yield


@contextmanager
def exact_arithmetic() -> Iterator[None]:
    """Both :func:`full_precision` and :func:`outside_inference_mode`; decorates what takes a user's network."""
    with full_precision(), outside_inference_mode():
        yield
