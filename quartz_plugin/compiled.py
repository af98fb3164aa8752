"""Numba's compiler with this package's settings; imported only where numba is installed."""

from __future__ import annotations

from typing import Any

from numba import njit


def compiled(function: Any) -> Any:
    """Compile to run without Python's lock; later processes reuse the machine code where a folder can be written."""
    try:
        return njit(nogil=True, cache=True)(function)
    except RuntimeError:
        return njit(nogil=True)(function)
