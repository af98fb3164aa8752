"""Options of conversion on the command line: the configuration's fields, in one group, for every command alike."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import Field, fields
from itertools import product
from types import GenericAlias
from typing import Any, get_type_hints

import yaml

from quartz_plugin.config import TRAINING, ConversionConfig, ConversionOptions, TrainingOptions
from quartz_plugin.figures import SWEEP_OPTIONS
from quartz_plugin.options import NotGiven

# Lightning writes a command's options beside what it makes, and yaml knows no class of ours.
yaml.SafeDumper.add_representer(NotGiven, lambda dumper, number: dumper.represent_int(int(number)))

GROUP = "conversion, with the same options in every command"

_FIELDS: dict[str, Field[Any]] = {field.name: field for field in fields(ConversionConfig)}

_ELSEWHERE = {"preprocessing", "task"}
"""Fields that the model gives: --model.mean and --model.std, and a classifier classifies."""

_TYPES: dict[str, Any] = {
    **get_type_hints(ConversionConfig),
    # As files of options and the command line spell them.
    "t_max": int | dict[str, int],
    "calibration_method": str,
    "layers": dict[str, dict[str, Any]] | None,
}

_CONVERSION = [name for name in _FIELDS if name in {"t_max", *ConversionOptions.__optional_keys__} - _ELSEWHERE]
_TRAINING = [name for name in _FIELDS if name in TrainingOptions.__optional_keys__ - _ELSEWHERE]

_OF_NEURONS_AND_GRIDS = ("hold", "rectifier", "bias", "first_layer", "weight_bits", "weight_granularity")

OPTIONS_OF: Mapping[str, Sequence[str]] = {
    "fit": _TRAINING,
    "convert": _CONVERSION,
    "run": _CONVERSION,
    "sweep": _CONVERSION,
    "costs": [name for name in _CONVERSION if name not in _OF_NEURONS_AND_GRIDS],
}
"""Command -> the options of conversion that it takes; costs compares the neurons itself, and rate codes of them."""

LISTS_OF: Mapping[str, Sequence[str]] = {
    "sweep": tuple(name for name in SWEEP_OPTIONS if name not in ("output_percentile", "granularity")),
    "costs": ("t_max",),
}
"""Command -> options of which it takes several values."""

DEFAULTS_OF: Mapping[str, Mapping[str, Any]] = {
    "fit": {"granularity": "channel", **TRAINING},
    "convert": {"t_max": None},
    "run": {"output_percentile": 99.0, "granularity": "channel"},
    "sweep": {
        "t_max": [2, 4, 8, 16, 32],
        "percentile": [99.0],
        "calibration_method": ["percentile"],
        "hold": [False, True],
        "bias": ["spike", "synapse"],
        "rectifier": ["spike", "silent"],
        "output_percentile": 99.0,
    },
    "costs": {"t_max": [4, 16], "percentile": 99.0, "output_percentile": 99.0},
}
"""Command -> defaults of its own, where they are not those of ``convert``; sweep and costs have the paper's.

None is for the network to choose: what it was trained with, or else the default of ``convert``.
"""


def options_with_defaults(command: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of conversion of a command: those given, and the defaults of the others.

    Raises
    ------
    TypeError
        For an option that the command does not take.

    Examples
    --------
    >>> options_with_defaults("run", {"t_max": 8})["output_percentile"]
    99.0
    """
    names = OPTIONS_OF[command]
    if unknown := [name for name in given if name not in names]:
        raise TypeError(f"{command} takes no option {', '.join(unknown)}; there are {', '.join(names)}")
    return {name: given[name] if name in given else default_of(command, name) for name in names}


def points_of(command: str, options: Mapping[str, Any]) -> tuple[list[dict[str, Any]], list[str]]:
    """Every combination of the options that are lists, and a line for each reason why some do not go together.

    Raises
    ------
    ValueError
        For a value that an option cannot have, or if no combination goes together.

    Examples
    --------
    >>> points, left_out = points_of("sweep", options_with_defaults("sweep", {"t_max": [4]}))
    >>> [(point["hold"], point["bias"], point["rectifier"]) for point in points][:2]
    [(False, 'spike', 'spike'), (False, 'synapse', 'spike')]
    >>> left_out[0][:46]
    '3 of 8 combinations are left out: bias="spike"'
    """
    # One method after the other: rows of one T stand together.
    names = sorted(LISTS_OF[command], key=lambda name: name != "calibration_method")
    for name in names:
        for value in options[name]:
            _FIELDS[name].metadata["check"](name, value)
    combinations = [dict(zip(names, values, strict=True)) for values in product(*(options[name] for name in names))]
    points, refused = [], []
    for values in combinations:
        point = {**options, **values}
        try:
            ConversionConfig(**point)
            points.append(point)
        except ValueError as error:
            refused.append(str(error))
    if not points:
        why = f": {refused[0]}" if refused else ", an option has no value"
        raise ValueError(f"there is nothing to convert{why}")
    counts = Counter(refused).items()
    return points, [f"{count} of {len(combinations)} combinations are left out: {error}" for error, count in counts]


def default_of(command: str, name: str) -> Any:
    """Return the default of a command's option."""
    return DEFAULTS_OF.get(command, {}).get(name, _FIELDS[name].default)


def add_conversion_options(parser: Any, command: str) -> list[str]:
    """Add the options of conversion that a command takes, with the configuration's help; return their names."""
    names = OPTIONS_OF.get(command, ())
    lists = LISTS_OF.get(command, ())
    group = parser.add_argument_group(GROUP) if names else None
    for name in names:
        kind, text = _TYPES[name], _FIELDS[name].metadata["help"]
        if name in lists:
            # T of single layers has no place in a list.
            kind, text = GenericAlias(list, int if name == "t_max" else kind), f"Several, each of them is tried: {text}"
        if default_of(command, name) is None and _FIELDS[name].default is not None:
            kind, text = kind | None, f"{text} By default as the network was trained, or else {_FIELDS[name].default}."
        assert group is not None
        group.add_argument(f"--{name}", type=kind, default=default_of(command, name), help=text)
    return list(names)
