"""A row of the table of operators: all that any stage knows of an operation."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from torch import Tensor, nn

from quartz_plugin.operators.gains import Gain
from quartz_plugin.operators.linear_map import Form
from quartz_plugin.operators.relation import Relation
from quartz_plugin.operators.settings import Settings
from quartz_plugin.operators.tracing import Append, Build, Value


class Role(Enum):
    """The part an operation has in a network of spikes."""

    SYNAPSE = "synapses"
    ROUTE = "routing"
    RECTIFIER = "spiking layer"
    MAX_POOL = "first-spike max pooling"
    NOTHING = "dropped"


Relate = Callable[[Relation, Any, int, Sequence[Sequence[int]]], None]
"""``relate(relation, module, place, sizes)``: compose a relation to the input at this place with the module.

`sizes` are the shapes of all inputs, without the batch. Raises NoProductError where the result is no product.
"""


def accept(module: Any) -> str | None:
    """Refuse no module of the class."""
    return None


def changes_no_relation(relation: Relation, module: Any, place: int, sizes: Sequence[Sequence[int]]) -> None:
    """Leave a relation as it is: each unit reaches the one in its own place alone."""


def _as_it_is(module: Any, shape: Sequence[int]) -> nn.Module:
    spelled: nn.Module = module
    return spelled


def _fits_anything(module: Any, sources: Sequence[Tensor]) -> None:
    pass


def _by_settings(kind: Any, settings: dict[str, Any], weights: Mapping[str, Tensor]) -> nn.Module:
    module: nn.Module = kind(**settings)
    return module


def never(module: Any, shape: Sequence[int]) -> bool:
    """Deny that a module only moves spikes."""
    return False


def always(module: Any, shape: Sequence[int]) -> bool:
    """Confirm that a module only moves spikes."""
    return True


@dataclass(frozen=True, eq=False, kw_only=True)
class Operator:
    """One row of the table.

    Attributes
    ----------
    role : Role
        The part the operation has in a network of spikes.
    how : str
        How it is converted.
    exact : str
        "exact", or when it is not.
    exact_without_hold : str
        Of what neurons take the place of: "exact", or when it is not in a network that does not hold.
    refusal : callable
        Takes the module; returns why this one is refused (and what to do), or None.
    functions : dict
        Builder -> the functions and methods (by name) that it lets modules stand for; see :data:`Build`.
    in_place : collection
        Those of `functions` that write what they give into their first argument; others may be asked to by an argument
        ``inplace``.
    spell : callable
        ``(module, input shape)``: write the settings, which are Python's own numbers and tuples, in one way;
        returns the module, or another that computes the same.
    build : callable or None
        ``(append, module, input)``: let others stand for the module, where no single one does.
    rank : int
        Dimensions of space that it works on, behind the channels; 0 where there is no such thing.
    inputs : range
        How many inputs it may take.
    settings : dict or None
        What a file keeps of the module; None: no converted network holds one.
    rebuild : callable
        ``(class, settings, weights)``: the module, with parameters on the meta device, or without any.
    check : callable
        ``(module, inputs)``: raise ValueError where torch would take inputs of these shapes for something else.
    routes : callable or None
        ``(module, input shape without the batch)``: whether it only moves spikes, and so may move levels. By default
        modules whose role is routing do.
    relate : callable or None
        Which units reach which behind it (its fan-out); None: units are probed one by one.
    form : callable or None
        Its form as convolutions of levels, behind a map that weighs; None: it is stepped there.
    gain : Gain or None
        How rescaling passes a gain through it; None: nothing of it is left by then, or neurons take its place.
    keeps_sign : bool
        Its value is never negative where its inputs are not.
    """

    role: Role
    how: str
    exact: str = "exact"
    exact_without_hold: str = "exact but for early spikes"
    refusal: Callable[[Any], str | None] = accept
    functions: Mapping[Build, Sequence[Any]] = field(default_factory=dict)
    in_place: Collection[Any] = ()
    spell: Callable[[Any, Sequence[int]], nn.Module] = _as_it_is
    build: Callable[[Append, Any, Value], Value] | None = None
    rank: int = 0
    inputs: range = range(1, 2)
    settings: Settings | None
    rebuild: Callable[[Any, dict[str, Any], Mapping[str, Tensor]], nn.Module] = _by_settings
    check: Callable[[Any, Sequence[Tensor]], None] = _fits_anything
    routes: Callable[[Any, Sequence[int]], bool] | None = None
    relate: Relate | None
    form: Form | None
    gain: Gain | None
    keeps_sign: bool = False

    def moves_spikes(self, module: Any, shape: Sequence[int]) -> bool:
        """Check whether a module, on units of this shape, only moves spikes, and so may move levels."""
        if self.routes is not None:
            return self.routes(module, shape)
        return self.role is Role.ROUTE and self.refusal(module) is None


Rows = dict[type[nn.Module], Operator]
"""Class -> its row."""


def rows_of(kinds: Iterable[type[nn.Module]], row: Operator) -> Rows:
    """Let several classes have the same row."""
    return dict.fromkeys(kinds, row)


__all__ = ["Operator", "Relate", "Role", "Rows", "accept", "always", "changes_no_relation", "never", "rows_of"]
