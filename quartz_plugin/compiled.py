"""Compiled functions (numba). Imported where compiled loops are: numba is an extra and takes its time to import."""

from __future__ import annotations

import inspect
import zlib
from collections.abc import Callable
from types import ModuleType
from typing import Any

from numba import njit


def compiled(function: Any) -> Any:
    """Compile to run without Python's lock; later processes reuse the machine code where a folder can be written."""
    try:
        return njit(nogil=True, cache=True)(function)
    except RuntimeError:
        return njit(nogil=True)(function)


def compiled_with(*modules: ModuleType) -> Callable[[Any], Any]:
    """:func:`compiled` for functions whose machine code holds parts of other modules, too.

    numba keeps machine code, under a function's name, as long as the function's own file is the same. What stands in
    these modules becomes part of the name.
    """
    sources = zlib.crc32("".join(map(inspect.getsource, modules)).encode())

    def compile_as(function: Any) -> Any:
        function.__qualname__ += f"_{sources:08x}"
        return compiled(function)

    return compile_as
