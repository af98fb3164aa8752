"""Nested tuples, lists and dicts of tensors, as networks take and return them: flattened, and built again."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

SEQUENCES: dict[str, Callable[[Sequence[Any]], Any]] = {"tuple": tuple, "list": list}
"""Kinds of sequences -> what builds one."""

MOST_DEEP = 16
"""Levels of nesting that a file may hold."""


@dataclass(frozen=True)
class Leaf:
    """Place of a tensor: its index among the flattened ones."""

    index: int


@dataclass(frozen=True)
class Nest:
    """A tuple, list or dict of leaves, nests and None.

    Attributes
    ----------
    kind : "tuple", "list" or "dict"
        Its kind as files know it; dataclasses and named tuples are dicts there.
    names : tuple
        Keys of its parts, of which files hold text; of sequences the places.
    parts : tuple
        What it holds.
    own_class : type or None
        The user's own class, which takes the parts as keywords; None for plain ones, and after a file.
    """

    kind: str
    names: tuple[Any, ...]
    parts: tuple[Any, ...]
    own_class: type | None = None


Structure = Leaf | Nest | None


def flattened(value: Any, is_leaf: Callable[[Any], bool]) -> tuple[Structure, dict[str, Any]]:
    """Structure of a nested value, and its leaves by name (``"boxes.0"``), in order.

    Raises
    ------
    TypeError
        For a part that is no leaf, sequence, dict, dataclass or None; names the place.

    Examples
    --------
    >>> structure, leaves = flattened({"scores": 1, "boxes": (2, 3)}, lambda value: isinstance(value, int))
    >>> leaves
    {'scores': 1, 'boxes.0': 2, 'boxes.1': 3}
    >>> rebuilt(structure, list("abc"))
    {'scores': 'a', 'boxes': ('b', 'c')}
    """
    leaves: dict[str, Any] = {}

    def visit(value: Any, name: str) -> Structure:
        if value is None:
            return None
        if is_leaf(value):
            own, count = name, 2
            while own in leaves:
                own, count = f"{name}_{count}", count + 1
            leaves[own] = value
            return Leaf(len(leaves) - 1)
        kind, parts, own_class = _opened(value, name)
        below = [visit(part, f"{name}.{key}" if name else str(key)) for key, part in parts.items()]
        return Nest(kind, tuple(parts), tuple(below), own_class)

    return visit(value, ""), leaves


def _opened(value: Any, name: str) -> tuple[str, dict[Any, Any], type | None]:
    """Kind, parts by key, and the class where it is the user's own."""
    kind = type(value)
    if isinstance(value, Mapping):
        parts = dict(value.items())
        if any(type(key) not in (str, int) for key in parts) or len({*map(str, parts)}) < len(parts):
            raise TypeError(f"{name or 'it'} is a dict of keys {list(parts)!r}, which no file tells apart as text")
        # transformers' ModelOutput is a dict whose class takes its items as keywords.
        return "dict", parts, None if kind is dict else kind
    if isinstance(value, tuple) and hasattr(kind, "_fields"):
        return "dict", dict(zip(kind._fields, value, strict=True)), kind
    if isinstance(value, tuple | list):
        return "tuple" if isinstance(value, tuple) else "list", dict(enumerate(value)), None
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        parts = {each.name: getattr(value, each.name) for each in dataclasses.fields(value) if each.init}
        return "dict", parts, kind
    raise TypeError(f"{name or 'it'} is {kind.__name__}, which is no tensor, nor a tuple, list or dict of tensors")


def rebuilt(structure: Structure, leaves: Sequence[Any]) -> Any:
    """The nested value with these leaves; see :func:`flattened`."""
    if structure is None:
        return None
    if isinstance(structure, Leaf):
        return leaves[structure.index]
    parts = [rebuilt(part, leaves) for part in structure.parts]
    if structure.kind in SEQUENCES:
        return SEQUENCES[structure.kind](parts)
    made = dict(zip(structure.names, parts, strict=True))
    return made if structure.own_class is None else structure.own_class(**made)


def to_json(structure: Structure) -> Any:
    """The structure as plain JSON values; the user's classes become dicts."""
    if structure is None or isinstance(structure, Leaf):
        return None if structure is None else structure.index
    return [structure.kind, list(map(str, structure.names)), [to_json(part) for part in structure.parts]]


def from_json(value: Any, count: int, depth: int = 0) -> Structure:
    """Read what :func:`to_json` wrote.

    Raises
    ------
    ValueError
        For anything else, or a leaf that is not among `count` ones.
    """
    if value is None:
        return None
    if type(value) is int and 0 <= value < count:
        return Leaf(value)
    if isinstance(value, list) and len(value) == 3 and depth < MOST_DEEP:
        kind, names, parts = value
        known = kind in (*SEQUENCES, "dict") and isinstance(names, list) and isinstance(parts, list)
        if known and len(names) == len(parts) == len(set(map(str, names))) and all(type(n) is str for n in names):
            return Nest(kind, tuple(names), tuple(from_json(part, count, depth + 1) for part in parts))
    raise ValueError("the structure of its outputs is damaged")
