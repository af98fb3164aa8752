"""Checks of single options: each raises ValueError, naming the option, for a value that it cannot have."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, get_args

import torch

from quartz_plugin.calibration_methods import CalibrationMethod
from quartz_plugin.coding import window_length
from quartz_plugin.task import check_task

Check = Callable[[str, Any], None]
"""Takes the option's name and a value."""


def one_of(choices: Any) -> Check:
    """Check of an option that has one of the values of a Literal."""
    names = get_args(choices)
    in_words = " or ".join(f'"{each}"' for each in names)

    def check(name: str, value: Any) -> None:
        if value not in names:
            raise ValueError(f"{name} must be {in_words}, got {value!r}")

    return check


def optional(check: Check) -> Check:
    """The same check, of an option that may be None."""

    def checked(name: str, value: Any) -> None:
        if value is not None:
            check(name, value)

    return checked


def percentile(name: str, value: Any) -> None:
    """Check of a number in (0, 100]."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0.0 < value <= 100.0:
        raise ValueError(f"{name} must be a number in (0, 100], got {value!r}")


def flag(name: str, value: Any) -> None:
    """Check of True and False."""
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be True or False, got {value!r}")


def count(name: str, value: Any) -> None:
    """Check of a whole number of at least 1."""
    if type(value) is not int or value < 1:
        raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}")


def share(name: str, value: Any) -> None:
    """Check of a number between 0 and 1."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1:
        raise ValueError(f"{name} is a share between 0 and 1, got {value!r}")


def weight_bits(name: str, value: Any) -> None:
    """Check of the bits of a weight."""
    if value is not None and (type(value) is not int or not 2 <= value <= 16):
        raise ValueError(f"{name} must be a whole number from 2 to 16 (8 on Loihi), or None, got {value!r}")


def t_max(name: str, value: Any) -> None:
    """Check of ``T``."""
    try:
        window_length(value)
    except ValueError as error:
        raise ValueError(str(error).replace("t_max", name, 1)) from error


def t_max_or_one_each(name: str, value: Any) -> None:
    """Check of ``T``, or of a dict of one for each layer."""
    if not isinstance(value, Mapping):
        t_max(name, value)
        return
    for layer, own in value.items():
        if not isinstance(layer, str):
            raise TypeError(f"{name} must name layers by strings, as the report has them, got {layer!r}")
        t_max(f"layer {layer!r}: {name}", own)


def task(name: str, value: Any) -> None:
    """Check of the meaning of an output."""
    for each in value.values() if isinstance(value, Mapping) else [value]:
        check_task(each)


def method(name: str, value: Any) -> None:
    """Check of a calibration method, by names or objects."""
    CalibrationMethod.of(value)


def preprocessing(name: str, value: Any) -> None:
    """Check of (mean, std), or None."""
    if value is not None:
        preprocessings(value)


def preprocessings(value: Any) -> Any:
    """(mean, std), or of several inputs a list of such pairs and None, as plain numbers.

    Examples
    --------
    >>> preprocessings((0.5, 2)), preprocessings([(0.5, [1, 2]), None])
    (((0.5,), (2.0,)), [((0.5,), (1.0, 2.0)), None])
    """
    if _is_list_of_pairs(value):
        return [None if pair is None else mean_and_std(pair) for pair in value]
    return mean_and_std(value)


def _is_list_of_pairs(value: Any) -> bool:
    """True for a list with an entry for each input; a file holds tuples as lists, of numbers for one input."""
    if not isinstance(value, list) or not value:
        return False
    return all(
        pair is None
        or (isinstance(pair, tuple) and len(pair) == 2)
        or (isinstance(pair, list) and len(pair) == 2 and isinstance(pair[0], list))
        for pair in value
    )


def ranges(value: Any) -> list[tuple[tuple[float, ...], tuple[float, ...]] | None]:
    """The least and largest values of each input: of a pair for one input, or of a list of pairs and None for several.

    Examples
    --------
    >>> ranges((-1, 1)), ranges([(0, [1, 2]), None])
    ([((-1.0,), (1.0,))], [((0.0, 0.0), (1.0, 2.0)), None])
    """
    if not isinstance(value, tuple | list):
        raise ValueError(f"input_range must be (least, largest), or a list of such pairs, got {value!r}")
    found: list[tuple[tuple[float, ...], tuple[float, ...]] | None] = []
    for pair in [value] if isinstance(value, tuple) else value:
        if pair is None:
            found.append(None)
            continue
        try:
            low, high = (torch.as_tensor(end, dtype=torch.float64).flatten() for end in pair)
            low, high = torch.broadcast_tensors(low, high)
        except (TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"input_range must be (least, largest), got {pair!r}") from error
        if not bool((torch.isfinite(low) & torch.isfinite(high) & (low < high) & (high > 0)).all()):
            raise ValueError(f"input_range must rise from a finite least value to a positive largest, got {pair!r}")
        found.append((tuple(low.tolist()), tuple(high.tolist())))
    return found


def input_range(name: str, value: Any) -> None:
    """Check of the range of inputs, or None."""
    if value is not None:
        ranges(value)


def mean_and_std(value: Any) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """The numbers of (mean, std), each one or some; ValueError for anything else."""
    try:
        mean, std = (torch.as_tensor(part, dtype=torch.float64).flatten().tolist() for part in value)
    except (TypeError, ValueError) as error:
        raise ValueError(f"preprocessing must be (mean, std), got {value!r}") from error
    return tuple(mean), tuple(std)
