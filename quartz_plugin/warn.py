"""Warnings that point at the line of the user's that led to them."""

from __future__ import annotations

import contextlib
import sys
import warnings
from pathlib import Path

from torch import nn

PACKAGE = str(Path(__file__).parent)
_PASSED_OVER = (PACKAGE, contextlib.__file__, str(Path(nn.__file__).parent))


class QuartzWarning(UserWarning):
    """Something about a network or its images that its owner should know."""


def warn(message: str, category: type[Warning] = QuartzWarning) -> None:
    """Warn at the nearest line outside this package; decorators and torch's calls of modules are passed over."""
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_PASSED_OVER):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, category, stacklevel=level)
