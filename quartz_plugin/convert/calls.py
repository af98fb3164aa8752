"""Functions that a captured graph calls: their names, and whose they are."""

from __future__ import annotations

import inspect
from types import FunctionType
from typing import Any

from torch import fx

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


def changes_in_place(node: fx.Node) -> bool:
    """Check whether a call asks for its result to be written into its input, by its name or by an argument."""
    name = function_name(node.target)
    if name.endswith("_") and not name.endswith("__"):
        return True
    if not callable(node.target):
        return False
    try:
        arguments = inspect.signature(node.target).bind(*node.args, **node.kwargs).arguments
    except (TypeError, ValueError):  # Of builtins none has such an argument, nor a signature.
        return False
    return bool(arguments.get("inplace", False))


__all__ = ["NAMED", "changes_in_place", "function_name", "is_of_the_user"]
