"""Unions of relations: all that a source's units reach on several paths, each kind of union worked out once.

Where paths meet, their relations are alike, or differ in one dimension (parts side by side), or one holds the other
(a shortcut beside convolutions): the union is a product again, and does not grow with the number of paths.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from quartz_plugin.operators.relation import MOST_ELEMENTS, NoProductError, Relation, as_tensor
from quartz_plugin.operators.table import WEIGHTED, row_of

MOST_UNITED = 8
"""Products in a union, none of which holds another, up to which it is counted by inclusion and exclusion."""

Union = tuple[Relation, ...]
"""Products of one source's relations to one tensor, none of which holds another; none where nothing is reached."""


class Unions:
    """Composes and unites relations, and counts what is reached; equal ones are one object, worked out once.

    Methods raise :class:`~quartz_plugin.operators.relation.NoProductError` where the result is no small union.

    Examples
    --------
    >>> unions = Unions()
    >>> direct = unions.identity((2, 5))
    >>> convolved = unions.composed(direct, nn.Conv1d(2, 2, 3, padding=1), 0, [(2, 5)])
    >>> both = unions.united(direct, convolved)
    >>> both == convolved, unions.total(both), unions.units(both)
    (True, 52, tensor([[4, 6, 6, 6, 4],
            [4, 6, 6, 6, 4]]))
    """

    def __init__(self) -> None:
        self._relations: dict[Any, Relation] = {}
        self._factors: dict[Any, Tensor] = {}
        self._known: dict[Any, Any] = {}
        self._modules: list[nn.Module] = []

    def identity(self, shape: Sequence[int]) -> Union:
        """Each unit of this shape reaches itself."""
        return self._settled([Relation.identity(shape)])

    def composed(self, union: Union, module: nn.Module, place: int, shapes: Sequence[Sequence[int]]) -> Union:
        """What is reached behind a module with inputs of these shapes, one of which has been reached."""
        row = row_of(module)
        relate = None if row is None else row.relate
        if relate is None:
            raise NoProductError
        sizes = tuple(map(tuple, shapes))

        def compose(relation: Relation) -> Union:
            relation = relation.copy()
            relate(relation, module, place, sizes)
            return self._settled([relation])

        behind = (self._once((self._kind(module), place, sizes, id(each)), compose, each) for each in union)
        return self._united(tuple(itertools.chain.from_iterable(behind)))

    def united(self, first: Union, second: Union) -> Union:
        """What is reached in one way or the other."""
        return first if first is second else self._united((*first, *second))

    def units(self, union: Union) -> Tensor:
        """For each unit of the source, how many it reaches: int64, of the factors' shape. Not to be changed."""
        units: Tensor = self._once(("units", *map(id, union)), _units, union)
        return units

    def total(self, union: Union) -> int:
        """Sum of :meth:`units`, without the units."""
        total: int = self._once(("total", *map(id, union)), _total, union)
        return total

    def _once(self, key: Any, find: Callable[[Any], Any], argument: Any) -> Any:
        if key not in self._known:
            try:
                self._known[key] = find(argument)
            except NoProductError:
                self._known[key] = None
        if (known := self._known[key]) is None:
            raise NoProductError
        return known

    def _kind(self, module: nn.Module) -> Any:
        """What a module relates follows from: its settings, and the shapes of weights that mix units."""
        settings = {name: value for name, value in vars(module).items() if name[0] != "_" and name != "training"}
        held = itertools.chain(module.parameters(), module.buffers(), module.children(), settings.values())
        if any(isinstance(each, Tensor | nn.Module) for each in held) and not isinstance(module, WEIGHTED):
            # Kept, so that no other one gets its number.
            self._modules.append(module)
            return id(module)
        return type(module), *((name, repr(value)) for name, value in settings.items())

    def _settled(self, relations: Sequence[Relation]) -> Union:
        """The objects that stand for these relations, of those that are not empty."""
        union = []
        for relation in relations:
            if relation.is_empty():
                continue
            relation.settle()
            keys, factors = zip(*map(self._factor, relation.factors), strict=True) if relation.factors else ((), ())
            relation.factors = list(factors)
            order = None if relation.order is None else relation.order.numpy().tobytes()
            key = (keys, tuple(relation.dims), relation.sources, relation.flat, order)
            union.append(self._relations.setdefault(key, relation))
        return tuple(union)

    def _factor(self, factor: Tensor | int) -> tuple[Any, Tensor | int]:
        if isinstance(factor, int):
            return factor, factor
        key = factor.shape, (factor.numpy() > 0.5).tobytes()
        return id(known := self._factors.setdefault(key, factor)), known

    def _united(self, relations: Union) -> Union:
        distinct = tuple({id(each): each for each in relations}.values())
        if len(distinct) < 2:
            return distinct
        united: Union = self._once(("united", *map(id, distinct)), self._unite, distinct)
        return united

    def _unite(self, relations: Union) -> Union:
        """Take them in one after the other, each united with those that it forms a product with."""
        union: list[Relation] = []
        pending = list(relations)
        while pending:
            each = pending.pop()
            for other in union:
                merged = self._product_of(each, other)
                if merged is other:
                    break
                if merged is not None:
                    union.remove(other)
                    pending.append(merged)
                    break
            else:
                union.append(each)
            if len(union) > MOST_UNITED:
                raise NoProductError
        return tuple(union)

    def _product_of(self, first: Relation, second: Relation) -> Relation | None:
        """Their union, where it is a product."""
        try:
            product: Relation = self._once(("product", id(first), id(second)), self._one_product, (first, second))
        except NoProductError:
            return None
        return product

    def _one_product(self, pair: tuple[Relation, Relation]) -> Relation:
        parts = [(part, _joint(pair[0], part), _joint(pair[1], part)) for part in _parts_in_common(pair)]
        if all(bool((one <= other).all()) for _, one, other in parts):
            return pair[1]
        if all(bool((one >= other).all()) for _, one, other in parts):
            return pair[0]
        differing = [index for index, (_, one, other) in enumerate(parts) if not torch.equal(one, other)]
        if len(differing) != 1 or any(len(part.sources) > 1 for part, *_ in parts):
            raise NoProductError
        factors: list[Tensor | int] = [torch.ones(size, dtype=torch.float32) for size in pair[0].source_sizes()]
        dims = [(0, 0)] * len(pair[0].dims)
        for part, one, other in parts:
            united = torch.maximum(one, other)
            index = part.sources[0] if part.sources else len(factors)
            factors[index : index + 1] = [united if part.sources else united.unsqueeze(0)]
            for axis, dim in enumerate(part.dims):
                dims[dim] = (index, 1 + axis)
        merged = Relation(factors, dims, pair[0].sources, pair[0].flat, pair[0].order)
        (settled,) = self._settled([merged])
        return settled


class _Part(NamedTuple):
    """Dimensions of the source and of the current tensor that relations relate apart from all others."""

    sources: list[int]
    dims: list[int]


def _parts_in_common(relations: Sequence[Relation]) -> list[_Part]:
    """The finest parts of which each of these relations is a product."""
    first = relations[0]
    like = _outside(first)
    if any(_outside(each) != like or not _same_order(each, first) for each in relations):
        raise NoProductError
    # The least number among those that a dimension is related to; the source's dimensions come first.
    least = list(range(first.sources + len(first.dims)))
    for relation in relations:
        of_factor: dict[int, list[int]] = {index: [index] for index in range(first.sources)}
        for dim, (index, _) in enumerate(relation.dims):
            of_factor.setdefault(index, []).append(first.sources + dim)
        for members in of_factor.values():
            related = {least[each] for each in members}
            least = [min(related) if each in related else each for each in least]
    parts = []
    for root in sorted(set(least)):
        members = [each for each, its in enumerate(least) if its == root]
        sources = [each for each in members if each < first.sources]
        parts.append(_Part(sources, [each - first.sources for each in members if each >= first.sources]))
    return parts


def _outside(relation: Relation) -> Any:
    """Shapes of both sides of a relation; those that are to be united have one."""
    return relation.source_sizes(), [relation.size(dim) for dim in range(len(relation.dims))], relation.flat


def _same_order(first: Relation, second: Relation) -> bool:
    if first.order is None or second.order is None:
        return first.order is second.order
    return torch.equal(first.order, second.order)


def _joint(relation: Relation, part: _Part) -> Tensor:
    """A part of a relation: ``[*sizes of its source dimensions, *sizes of its current ones]``."""
    sizes = [relation.source_sizes()[each] for each in part.sources] + [relation.size(dim) for dim in part.dims]
    if math.prod(sizes) > MOST_ELEMENTS:
        raise NoProductError
    joint = torch.ones((1,) * len(sizes), dtype=torch.float32)
    indices = dict.fromkeys([*part.sources, *(relation.dims[dim][0] for dim in part.dims)])
    for index in indices:
        factor = as_tensor(relation.factors[index])
        # Of a settled relation, axes stand in the order of dimensions.
        places = [len(part.sources) + at for at, dim in enumerate(part.dims) if relation.dims[dim][0] == index]
        shape = [1] * len(sizes)
        for place in places:
            shape[place] = sizes[place]
        if index < relation.sources:
            shape[part.sources.index(index)] = len(factor)
        joint = joint * factor.reshape(shape)
    return joint.expand(sizes)


def _signed_meetings(union: Union) -> list[tuple[int, list[tuple[list[int], Tensor]]]]:
    """The union by inclusion and exclusion: signs, and for each part how many coordinates its sources reach."""
    terms = []
    for count in range(1, len(union) + 1):
        for chosen in itertools.combinations(union, count):
            met = []
            for part in _parts_in_common(chosen):
                joint = torch.stack([_joint(each, part) for each in chosen]).amin(dim=0)
                flat = joint.reshape(*joint.shape[: len(part.sources)], -1)
                met.append((part.sources, flat.sum(dim=-1, dtype=torch.float64).long()))
            terms.append((1 if count % 2 else -1, met))
    return terms


def _units(union: Union) -> Tensor:
    if not union:
        return torch.zeros((), dtype=torch.int64)
    sizes = union[0].source_sizes()
    if len(union) == 1:
        reached = union[0].reached()
        counts = [([index] if index < len(sizes) else [], each) for index, each in enumerate(reached)]
        terms = [(1, counts)]
    else:
        terms = _signed_meetings(union)
    total = torch.zeros(sizes, dtype=torch.int64)
    for sign, met in terms:
        product = torch.full([1] * len(sizes), sign, dtype=torch.int64)
        for sources, count in met:
            shape = [size if index in sources else 1 for index, size in enumerate(sizes)]
            product = product * count.reshape(shape)
        total = total + product
    order = union[0].order
    return total if order is None else torch.empty_like(total.flatten()).index_copy_(0, order, total.flatten())


def _total(union: Union) -> int:
    if len(union) == 1:
        return math.prod(int(each.sum()) for each in union[0].reached())
    return sum(sign * math.prod(int(count.sum()) for _, count in met) for sign, met in _signed_meetings(union))


__all__ = ["Union", "Unions"]
