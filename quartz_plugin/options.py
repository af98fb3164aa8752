"""Options of a configuration: fields with a line of help and a check, and the functions that take them as keywords."""

from __future__ import annotations

import difflib
import inspect
import textwrap
from collections.abc import Callable, Iterable, Mapping
from dataclasses import field, fields
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from quartz_plugin.checks import Check
from quartz_plugin.coding import plain

Value = TypeVar("Value")
Function = TypeVar("Function", bound=Callable[..., Any])


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


class NotGiven(int):
    """A number that is known for being a default: nobody gave it."""


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
