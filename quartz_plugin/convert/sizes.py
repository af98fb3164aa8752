"""Sizes while torch.fx traces: ``torch.Size`` takes the symbols that stand for the size of the batch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx

_Size = torch.Size


class _SizesOrSymbols(type):
    """A class that is ``torch.Size`` to who asks for types, and makes tuples where symbols are among the sizes."""

    def __call__(cls, sizes: Iterable[Any] = ()) -> Any:
        sizes = tuple(sizes)
        return sizes if any(isinstance(size, fx.Proxy) for size in sizes) else _Size(sizes)

    def __instancecheck__(cls, value: Any) -> bool:
        return isinstance(value, _Size)


class _Sizes(metaclass=_SizesOrSymbols):
    pass


@contextmanager
def sizes_of_symbols() -> Iterator[None]:
    """Let ``torch.Size`` take symbols.

    Examples
    --------
    >>> with sizes_of_symbols():
    ...     torch.Size([2, 3]), isinstance(torch.rand(2, 3).shape, torch.Size)
    (torch.Size([2, 3]), True)
    """
    torch.Size = _Sizes  # type: ignore[misc, assignment]
    try:
        yield
    finally:
        torch.Size = _Size  # type: ignore[misc]


__all__ = ["sizes_of_symbols"]
