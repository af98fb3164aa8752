"""The table of operators: what each operation of a ReLU network becomes, and all that any stage knows of it.

One row a module class, in the files of the families (synapses, constants, pooling, routing, borders, activations).
Tracing turns functions and methods into modules that have rows here and refuses what has none; the graph, its files,
counts and engines look a module's row up by its class. The table that users read is made of it (``operator_table``).
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from quartz_plugin.host import PRODUCTS, STARTS
from quartz_plugin.operators import (
    activations,
    borders,
    constants,
    copies,
    interpolation,
    pooling,
    routing,
    synapses,
)
from quartz_plugin.operators.activations import DROPOUTS, ceiling_of
from quartz_plugin.operators.constants import NORMS, norm_as_affine
from quartz_plugin.operators.gains import IntoWeights
from quartz_plugin.operators.modules import Affine, OneToOne
from quartz_plugin.operators.refused import REASONS
from quartz_plugin.operators.row import Operator, Role, Rows
from quartz_plugin.operators.rules import RULES, Rule, register_rule, rules_with, unregister_rule
from quartz_plugin.operators.spelling import spell_plainly
from quartz_plugin.operators.synapses import WEIGHTED
from quartz_plugin.operators.tracing import Append, Build, ConversionError, Refusal, Value, call

OPERATORS: Rows = (
    synapses.ROWS
    | constants.ROWS
    | pooling.ROWS
    | routing.ROWS
    | copies.ROWS
    | interpolation.ROWS
    | borders.ROWS
    | activations.ROWS
)
"""Rows of the module classes that an ANN may be made of; what stands neither here nor among the functions is refused.
"""

EMITTED: Rows = synapses.EMITTED | routing.EMITTED | activations.EMITTED
"""Rows of the module classes that only converted networks hold."""


@dataclass(frozen=True, eq=False)
class Function:
    """A function or method of the table: the row it belongs to, how modules stand for it, and what it changes."""

    row: Operator
    build: Build
    in_place: bool

    def changes_first_argument(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
        """Check whether a call with these arguments writes what it gives into the first of them."""
        names = list(inspect.signature(self.build).parameters)[1:]
        return self.in_place or bool(dict(zip(names, args, strict=False), **kwargs).get("inplace", False))


def _functions(rows: Rows) -> dict[Any, Function]:
    return {
        target: Function(row, build, target in row.in_place)
        for row in dict.fromkeys(rows.values())
        for build, targets in row.functions.items()
        for target in targets
    }


FUNCTIONS: dict[Any, Function] = _functions(OPERATORS)
"""Functions and methods that tracing replaces by modules of the table; methods by name."""

_KINDS: dict[str, type[nn.Module]] = {
    kind.__name__: kind for kind, row in (OPERATORS | EMITTED).items() if row.settings is not None
}

SHAPE_QUERIES: frozenset[Any] = frozenset(
    {getattr, "size", "dim", "ndimension", "numel", "nelement", "stride", "new_zeros", "new_ones"}
    | {torch.zeros_like, torch.ones_like}
)
"""Questions about shapes alone, which are known, since a converted network takes inputs of one shape."""
SHAPE_ATTRIBUTES = frozenset({"shape", "ndim", "dtype", "device", "is_cuda", "requires_grad"})


def row_of(module: nn.Module) -> Operator | None:
    """Row of a module, by its class; None where it has none.

    Examples
    --------
    >>> row_of(nn.Flatten()).role
    <Role.ROUTE: 'routing'>
    >>> row_of(nn.GELU()) is None
    True
    """
    kind = type(module)
    if kind not in OPERATORS and kind not in EMITTED and parametrize.is_parametrized(module):
        # torch makes a class of its own for a module whose weights are computed.
        kind = kind.__bases__[0]
    return OPERATORS.get(kind) or EMITTED.get(kind)


def row_of_class(kind: type[nn.Module]) -> Operator:
    """Row of a module class that has one."""
    return OPERATORS[kind] if kind in OPERATORS else EMITTED[kind]


def role_of(module: nn.Module, shape: Sequence[int]) -> Role:
    """Role of a module that has passed the check, on inputs of this shape (without the batch).

    Examples
    --------
    >>> role_of(nn.AdaptiveAvgPool2d(2), (8, 4, 4)), role_of(nn.AdaptiveAvgPool2d((4, 4)), (8, 4, 4))
    (<Role.SYNAPSE: 'synapses'>, <Role.ROUTE: 'routing'>)
    """
    row = OPERATORS[type(module)]
    if row.role is Role.SYNAPSE and row.moves_spikes(module, shape):
        return Role.ROUTE
    return row.role


def moves_spikes(module: nn.Module, shape: Sequence[int]) -> bool:
    """Check whether a module, on units of this shape (without the batch), only moves spikes.

    Examples
    --------
    >>> moves_spikes(nn.Flatten(), (3, 4)), moves_spikes(nn.Linear(4, 4), (3, 4))
    (True, False)
    """
    row = row_of(module)
    return row is not None and row.moves_spikes(module, shape)


def weighs(module: nn.Module, shape: Sequence[int]) -> bool:
    """Check whether a module has synapses of its own between units of this shape (without the batch) and its own.

    A sum has none: the synapses are those of what it adds. A module that has no row has a synapse between all units
    that it relates.

    Examples
    --------
    >>> weighs(nn.AvgPool1d(2), (3, 4)), weighs(nn.Flatten(), (3, 4))
    (True, False)
    """
    row = row_of(module)
    if row is None:
        return True
    return row.role is Role.SYNAPSE and len(row.inputs) == 1 and not row.moves_spikes(module, shape)


def adds(module: nn.Module) -> bool:
    """Check whether a module adds several inputs up."""
    row = row_of(module)
    return row is not None and row.role is Role.SYNAPSE and len(row.inputs) > 1


def makes_anew(module: nn.Module | None, inputs: int) -> bool:
    """Check whether a module's value, of so many inputs, never shares its memory with these.

    Examples
    --------
    >>> makes_anew(nn.Linear(4, 4), 1), makes_anew(nn.Flatten(), 1)
    (True, False)
    """
    if module is None:
        return False
    return has_weights(module) or isinstance(module, OneToOne) or (adds(module) and inputs > 1)


def has_weights(module: nn.Module | None) -> bool:
    """Check whether a module mixes units by weights of its own, with a bias or without."""
    return weights_of(module) is not None


def weights_of(module: nn.Module | None) -> IntoWeights | None:
    """Return what the table knows of the weights by which a module mixes units; None where it has no such weights.

    Examples
    --------
    >>> weights_of(nn.Conv2d(3, 8, 3)).bias_shape(nn.Conv2d(3, 8, 3))
    (8, 1, 1)
    """
    row = None if module is None else row_of(module)
    return row.gain if row is not None and isinstance(row.gain, IntoWeights) else None


def keeps_sign(module: nn.Module) -> bool:
    """Check whether a module's value is never negative where its inputs are not."""
    row = row_of(module)
    return row is not None and (row.keeps_sign or row.role in (Role.ROUTE, Role.NOTHING))


def rank_of(module: nn.Module) -> int:
    """Dimensions of space that a convolution or pooling works on; 0 for other modules.

    Examples
    --------
    >>> rank_of(nn.Conv1d(1, 1, 3)), rank_of(nn.AvgPool2d(2)), rank_of(nn.Linear(2, 2))
    (1, 2, 0)
    """
    row = row_of(module)
    return 0 if row is None else row.rank


def kind_named(name: str) -> type[nn.Module] | None:
    """Class of a converted network's modules that has this name."""
    return _KINDS.get(name)


def spell_out(module: nn.Module, shape: Sequence[int]) -> nn.Module:
    """Write the settings of a module of the table, in place, in the one way that all readers know.

    Numbers are Python's own, sequences are tuples with an entry for each dimension of space, and what is left open (a
    stride, an adaptive size, a dimension counted from the end) is filled in. What the module computes is the same.

    Parameters
    ----------
    module : nn.Module
        The module, which is changed.
    shape : sequence of int
        Shape of its input, the batch included.

    Returns
    -------
    nn.Module
        The module itself; of one that pads, the one for as many dimensions as it pads.

    Raises
    ------
    Refusal
        If torch computes something that the settings do not express.

    Examples
    --------
    >>> spell_out(nn.AvgPool2d([2], stride=[], padding=(1,)), (1, 3, 8, 8))
    AvgPool2d(kernel_size=(2, 2), stride=(2, 2), padding=(1, 1))
    >>> spell_out(nn.Flatten(-3), (1, 3, 8, 8))
    Flatten(start_dim=1, end_dim=-1)
    """
    spell_plainly(module)
    return OPERATORS[type(module)].spell(module, shape)


def operator_table() -> str:
    """Return the table as Markdown: what is converted, how, how exactly; then what is refused, and why."""
    converted: dict[tuple[str, str, str], list[str]] = {}
    for kind, row in OPERATORS.items():
        names = converted.setdefault((row.role.value, row.how, row.exact), [])
        if kind.__module__.startswith("torch.nn"):
            names.append(f"nn.{kind.__name__}")
    for target, function in FUNCTIONS.items():
        row = function.row
        names = converted[row.role.value, row.how, row.exact]
        if (name := _spelled(target)) not in names:
            names.append(name)
    refused: dict[str, list[str]] = {}
    for target, reason in REASONS.items():
        refused.setdefault(reason, []).append(_spelled(target))

    def cell(names: list[str]) -> str:
        return ", ".join(f"`{name}`" for name in names)

    lines = ["| operation | becomes | how | exact? |", "|---|---|---|---|"]
    lines += [
        f"| {cell(names)} | {role} | {how} | {exact} |" for (role, how, exact), names in converted.items() if names
    ]
    lines += [f"| {cell(names)} | refused | {reason} | |" for reason, names in refused.items()]
    return "\n".join(lines)


PAGE = """# Table of operators

What an operation of an ANN becomes, and how exactly. A module class of your own is taught with
`quartz_plugin.register_rule`, or with `rules=` for one conversion.

{table}

Where nothing but such operations stands behind the last linear map, the host carries them out on the decoded outputs:
{host}; of two values {products} too, and places of the largest and smallest.

This page is made of the rows in this folder:
`python -c 'from quartz_plugin.operators.table import *; print(page(), end="")'`
"""
"""The page ``OPERATORS.md`` beside this file, but for its table."""


def page() -> str:
    """Return the page of the table, :data:`PAGE` filled in."""
    starts = ", ".join(f"`{name}`" for name in STARTS)
    products = ", ".join(f"`{name}`" for name in PRODUCTS)
    return PAGE.format(table=operator_table(), host=starts, products=products)


def _spelled(target: Any) -> str:
    """Write an operation as users write it."""
    if isinstance(target, str):
        return f"x.{target}()"
    if isinstance(target, type):
        return f"nn.{target.__name__}"
    symbols = {"add": "+", "iadd": "+=", "sub": "-", "isub": "-=", "mul": "*", "imul": "*=", "truediv": "/"}
    symbols |= {"itruediv": "/=", "neg": "-x", "matmul": "@", "getitem": "x[...]"}
    symbols |= {"gt": ">", "ge": ">=", "lt": "<", "le": "<=", "invert": "~"}
    if target is getattr:
        return "x.values"
    name = target.__name__
    if getattr(operator, name, None) is target:
        return symbols[name]
    home = "F" if getattr(F, name, None) is target else "torch"
    return f"{home}.{name}"


__all__ = [
    "DROPOUTS",
    "EMITTED",
    "FUNCTIONS",
    "NORMS",
    "OPERATORS",
    "PAGE",
    "REASONS",
    "RULES",
    "SHAPE_ATTRIBUTES",
    "SHAPE_QUERIES",
    "WEIGHTED",
    "Affine",
    "Append",
    "ConversionError",
    "Function",
    "Operator",
    "Refusal",
    "Role",
    "Rule",
    "Value",
    "adds",
    "call",
    "ceiling_of",
    "has_weights",
    "keeps_sign",
    "kind_named",
    "moves_spikes",
    "norm_as_affine",
    "operator_table",
    "page",
    "rank_of",
    "register_rule",
    "role_of",
    "row_of",
    "row_of_class",
    "rules_with",
    "spell_out",
    "unregister_rule",
    "weighs",
    "weights_of",
]
