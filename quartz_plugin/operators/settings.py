"""Settings that a file keeps of a module: what each has to be."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

MOST = 2**31 - 1
"""Largest whole number that a setting may be: torch and the clock count in 32 bits."""

MOST_UNITS = 2**28
"""Units of one value that no network has: a float32 map of them takes 1 GB an image."""


@dataclass(frozen=True)
class Setting:
    """A setting of a module: what it has to be, and a check that a JSON value is that."""

    expected: str
    fits: Callable[[Any], bool]
    optional: bool = False


Settings = dict[str, Setting]
"""Name of an attribute, and of an argument of the module's class -> what it has to be."""


def _is_whole(value: Any, least: int) -> bool:
    return type(value) is int and least <= value <= MOST


def _is_positive(value: Any) -> bool:
    return type(value) in (int, float) and 0 < value <= MOST


def whole(least: int) -> Setting:
    """A whole number."""
    return Setting(f"a whole number of at least {least}", lambda value: _is_whole(value, least))


def whole_or_none(least: int) -> Setting:
    """A whole number, or null."""
    return Setting(f"a whole number of at least {least}, or null", lambda v: v is None or _is_whole(v, least))


def one_of(*values: Any) -> Setting:
    """One of these values, of the same type."""
    expected = " or ".join(map(repr, values))
    return Setting(expected, lambda value: any(type(value) is type(each) and value == each for each in values))


def listed(least: int, count: int | None = None) -> Setting:
    """A list of whole numbers, of any length or of `count`."""

    def fits(value: Any) -> bool:
        return isinstance(value, list) and count in (None, len(value)) and all(_is_whole(each, least) for each in value)

    return Setting(f"a list of {'' if count is None else f'{count} '}whole numbers of at least {least}", fits)


def sizes(rank: int, least: int, also: tuple[Any, ...] = ()) -> Setting:
    """A number for all dimensions of space, or one for each of `rank`; or something else that is allowed `also`."""

    def fits(value: Any) -> bool:
        each = value if isinstance(value, list) and len(value) == rank else [value]
        return all(_is_whole(one, least) or (one is None and None in also) for one in each) or (
            isinstance(value, str) and value in also
        )

    others = "".join(f", or {'null' if value is None else repr(value)}" for value in also)
    return Setting(f"a whole number of at least {least}, or {rank} of them{others}", fits)


def _for_each_dimension(expected: str, fits_one: Callable[[Any], bool]) -> Setting:
    """Null, a number for all dimensions of space, or one for each."""

    def fits(value: Any) -> bool:
        each = value if isinstance(value, list) and 1 <= len(value) <= 3 else [value]
        return value is None or all(fits_one(one) for one in each)

    return Setting(f"{expected}, one for each dimension, or null", fits)


FLAG = one_of(True, False)
FLAG_OR_NONE = Setting("a boolean or null", lambda value: value is None or type(value) is bool, optional=True)
ZERO = Setting("0", lambda value: type(value) in (int, float) and value == 0)
SIZE = _for_each_dimension("a whole number of at least 1", lambda value: _is_whole(value, 1))
SCALE_FACTOR = _for_each_dimension("a positive number", _is_positive)

__all__ = [
    "FLAG",
    "FLAG_OR_NONE",
    "MOST",
    "MOST_UNITS",
    "SCALE_FACTOR",
    "SIZE",
    "ZERO",
    "Setting",
    "Settings",
    "listed",
    "one_of",
    "sizes",
    "whole",
    "whole_or_none",
]
