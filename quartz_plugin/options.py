"""Options of a configuration: fields with a line of help and a check, and the functions that take them as keywords."""

from __future__ import annotations

import difflib
import inspect
import textwrap
from collections.abc import Callable, Iterable, Mapping
from dataclasses import field, fields
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from quartz_plugin.coding import plain, window_length

Value = TypeVar("Value")
Function = TypeVar("Function", bound=Callable[..., Any])
Check = Callable[[str, Any], None]
"""Raises ValueError for a value that an option of this name cannot have."""


def option(default: Value, help: str, check: Check, details: str = "") -> Value:
    """A field of a configuration.

    Parameters
    ----------
    default
        Its default.
    help : str
        One line, as the command line shows it.
    check : callable
        Called with the option's name and a value.
    details : str
        What the docstring adds to the line of help.
    """
    metadata = {"help": help, "check": check, "details": textwrap.dedent(details).strip()}
    return field(default=default, metadata=metadata)


def one_of(choices: Any) -> Check:
    """Check of an option that has one of the values of a Literal."""
    names = get_args(choices)
    in_words = " or ".join(f'"{each}"' for each in names)

    def check(name: str, value: Any) -> None:
        if value not in names:
            raise ValueError(f"{name} must be {in_words}, got {value!r}")

    return check


def is_percentile(name: str, value: Any) -> None:
    """Check of a number in (0, 100]."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0.0 < value <= 100.0:
        raise ValueError(f"{name} must be a number in (0, 100], got {value!r}")


def is_bool(name: str, value: Any) -> None:
    """Check of True and False."""
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be True or False, got {value!r}")


def is_count(name: str, value: Any) -> None:
    """Check of a whole number of at least 1."""
    if type(value) is not int or value < 1:
        raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}")


def is_share(name: str, value: Any) -> None:
    """Check of a number between 0 and 1."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1:
        raise ValueError(f"{name} is a share between 0 and 1, got {value!r}")


def is_weight_bits(name: str, value: Any) -> None:
    """Check of the bits of a weight."""
    if value is not None and (type(value) is not int or not 2 <= value <= 16):
        raise ValueError(f"{name} must be a whole number from 2 to 16 (8 on Loihi), or None, got {value!r}")


def is_t_max(name: str, value: Any) -> None:
    """Check of ``T``."""
    try:
        window_length(value)
    except ValueError as error:
        raise ValueError(str(error).replace("t_max", name, 1)) from error


def is_t_max_or_one_each(name: str, value: Any) -> None:
    """Check of ``T``, or of a dict of one for each layer."""
    if not isinstance(value, Mapping):
        is_t_max(name, value)
        return
    for layer, own in value.items():
        if not isinstance(layer, str):
            raise TypeError(f"{name} must name layers by strings, as the report has them, got {layer!r}")
        is_t_max(f"layer {layer!r}: {name}", own)


def take_plain_and_check(config: Any, leave_out: Callable[[Any], bool] = lambda value: False) -> None:
    """Keep numbers of numpy and torch as Python's, and check each field that is not left out."""
    for each in fields(config):
        value = plain(getattr(config, each.name))
        object.__setattr__(config, each.name, value)
        if not leave_out(value):
            each.metadata["check"](each.name, value)


def refuse_unknown(options: Iterable[str], known: Iterable[str], kind: type[Exception]) -> None:
    """Raise an error of this kind that names the first option that is not known, and the nearest that is."""
    known = sorted(known)
    for name in options:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, 1)
            hint = f"did you mean {near[0]!r}?" if near else f"the options are {', '.join(known)}"
            raise kind(f"unknown option {name!r}: {hint}")


INDENT = 4 * " "


def describe(config: type, names: Mapping[str, Any] | set[str]) -> str:
    """Lines of a docstring's section of parameters, for the fields of these names."""
    hints, lines = get_type_hints(config), []
    for each in fields(config):
        if each.name in names:
            choices = get_args(hints[each.name]) if get_origin(hints[each.name]) is Literal else ()
            kind = " or ".join(f'"{choice}"' for choice in choices) or each.type
            text = f"{each.metadata['help']} {each.metadata['details']}".strip()
            lines.append(f"{each.name} : {kind}")
            lines += textwrap.wrap(
                text,
                112,
                initial_indent="    ",
                subsequent_indent="    ",
                break_on_hyphens=False,
                break_long_words=False,
            )
    return "\n".join(lines)


UNSET: Any = object()
"""Default of an argument that the configuration has where it is not given."""


def with_options(config: type, taken: Any, defaults: Mapping[str, Any] | None = None) -> Callable[[Function], Function]:
    """Decorator of a function that takes options as keywords: gives it their signature, and their lines of help.

    Parameters
    ----------
    config : type
        The dataclass whose fields they are.
    taken : type
        The TypedDict of its keywords. The function's docstring has ``{options}`` where their lines belong.
    defaults : dict, optional
        Defaults that differ from the configuration's.
    """

    def decorate(function: Function) -> Function:
        signature = inspect.signature(function)
        names = {*signature.parameters} | {*taken.__optional_keys__}
        missing = {each.name: each for each in fields(config) if each.name in names}
        parameters: list[inspect.Parameter] = []
        for parameter in signature.parameters.values():
            if parameter.default is UNSET:
                parameter = parameter.replace(default=missing.pop(parameter.name).default)
            if parameter.kind is not inspect.Parameter.VAR_KEYWORD:
                parameters.append(parameter)
        for name, each in missing.items():
            default = (defaults or {}).get(name, each.default)
            keyword = inspect.Parameter.KEYWORD_ONLY
            parameters.append(inspect.Parameter(name, keyword, default=default, annotation=each.type))
        function.__doc__ = inspect.cleandoc(function.__doc__ or "").replace("{options}", describe(config, names))
        function.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
        return function

    return decorate
