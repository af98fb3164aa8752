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
        mean_and_std(value)


def mean_and_std(value: Any) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """The numbers of (mean, std), each one or some; ValueError for anything else."""
    try:
        mean, std = (torch.as_tensor(part, dtype=torch.float64).flatten().tolist() for part in value)
    except (TypeError, ValueError) as error:
        raise ValueError(f"preprocessing must be (mean, std), got {value!r}") from error
    return tuple(mean), tuple(std)
