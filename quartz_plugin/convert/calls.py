"""Functions that a captured graph calls: their names, and whose they are."""

from __future__ import annotations

from types import FunctionType
from typing import Any

NAMED = "named"
"""Key of a node's ``meta``: the name that the function goes by, where it is another than its own."""


def function_name(target: Any) -> str:
    """Name of a function, or of a method, which is its name already.

    Examples
    --------
    >>> import torch
    >>> function_name(torch.relu), function_name("relu")
    ('relu', 'relu')
    """
    return target if isinstance(target, str) else getattr(target, "__name__", repr(target))


def is_of_the_user(function: Any) -> bool:
    """Check whether a function is neither torch's nor of Python itself.

    Examples
    --------
    >>> import torch
    >>> is_of_the_user(torch.relu), is_of_the_user(len), is_of_the_user(lambda x: x)
    (False, False, True)
    """
    return isinstance(function, FunctionType) and function.__module__.partition(".")[0] != "torch"


__all__ = ["NAMED", "function_name", "is_of_the_user"]
