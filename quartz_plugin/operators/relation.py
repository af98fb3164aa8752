"""Relations between the units of two tensors: which unit of the first reaches which of the second.

For convolutions, pools and routing it is a product of one relation for each dimension, and so is the composition of
such. Borders and overlaps are exact.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

MOST_ELEMENTS = 2**24
"""Elements of a factor that several others are joined to; larger ones would not be found quickly."""


class NoProductError(Exception):
    """A composed relation is no product of relations of single dimensions."""


@dataclass(eq=False)
class Relation:
    """The coordinates that a unit reaches, as a product of factors: one for each source dimension, then free ones.

    A factor is ``[size of the source's dimension, *sizes]``, 1 where a source coordinate reaches a coordinate of
    the current tensor, and ``[1, *sizes]`` if it is free; ``dims`` holds, for each dimension of that tensor, which
    factor and axis it is. An identity is no more than its size until it meets another relation: that of a long vector
    would not fit into memory.

    Methods that compose it with one more map raise :class:`NoProductError` where the result is none.

    Attributes
    ----------
    factors : list of Tensor or int
        The factors; an int is an identity of that size.
    dims : list of (int, int)
        Factor and axis of each dimension of the current tensor.
    sources : int
        Number of source dimensions.
    flat : bool
        Whether the dimensions of the current tensor have become one, which cannot be told apart.
    order : Tensor or None
        Number of the source's unit for each unit of the factors; None where they are in the source's order.
    """

    factors: list[Tensor | int]
    dims: list[tuple[int, int]]
    sources: int
    flat: bool = False
    order: Tensor | None = None

    @classmethod
    def identity(cls, shape: Sequence[int]) -> Relation:
        """Each unit of this shape reaches itself."""
        return cls(list(shape), [(index, 1) for index in range(len(shape))], len(shape))

    def copy(self) -> Relation:
        """Return one that can be composed further while this one stays as it is."""
        return Relation(list(self.factors), list(self.dims), self.sources, self.flat, self.order)

    def factor(self, index: int) -> Tensor:
        """A factor as a tensor."""
        factor = self.factors[index]
        if isinstance(factor, int):
            self.factors[index] = factor = as_tensor(factor)
        return factor

    def source_sizes(self) -> list[int]:
        """Sizes of the source's dimensions."""
        return [factor if isinstance(factor, int) else len(factor) for factor in self.factors[: self.sources]]

    def reached(self) -> list[Tensor]:
        """For each factor, how many coordinates each of its source coordinates reaches."""
        return [
            torch.ones(factor, dtype=torch.int64) if isinstance(factor, int) else row_sums(factor)
            for factor in self.factors
        ]

    def units_into(self, parts: Sequence[Sequence[slice]]) -> Tensor | None:
        """Number of units that reach each tile of the current tensor.

        Parameters
        ----------
        parts : sequence of slices for each dimension
            How each dimension is cut.

        Returns
        -------
        Tensor or None
            int64 ``[parts of the first dimension, ...]``; None where dimensions are one and cannot be cut.
        """
        if self.flat or len(parts) != len(self.dims):
            return None
        total = torch.ones([len(slices) for slices in parts], dtype=torch.int64)
        for index, factor in enumerate(self.factors):
            cut = [(dim, axis) for dim, (of, axis) in enumerate(self.dims) if of == index]
            shape = [len(slices) if dim in dict(cut) else 1 for dim, slices in enumerate(parts)]
            counts = []
            for chosen in itertools.product(*(parts[dim] for dim, _ in cut)):
                if isinstance(factor, int):
                    counts.append(len(range(factor)[chosen[0]]) if chosen else factor)
                    continue
                taken = [slice(None)] * factor.dim()
                for (_, axis), part in zip(cut, chosen, strict=True):
                    taken[axis] = part
                counts.append(int((factor[tuple(taken)].reshape(len(factor), -1).sum(dim=1) > 0).sum()))
            total = total * torch.tensor(counts, dtype=torch.int64).view(shape)
        return total

    def size(self, dim: int) -> int:
        """Size of a dimension of the current tensor."""
        index, axis = self.dims[dim]
        factor = self.factors[index]
        return factor if isinstance(factor, int) else factor.shape[axis]

    def rank(self) -> int:
        """Dimensions of the current tensor, where they can be told apart."""
        if self.flat:
            raise NoProductError
        return len(self.dims)

    def along(self, dim: int, relate: Callable[[Tensor], Tensor]) -> None:
        """Compose with ``[n, size] -> [n, new size]`` along one dimension; what is positive is reached."""
        index, axis = self.dims[dim % self.rank()]
        moved = self.factor(index).movedim(axis, -1)
        related = (relate(moved.reshape(-1, moved.shape[-1])) > 0).float()
        self.factors[index] = related.reshape(*moved.shape[:-1], related.shape[-1]).movedim(-1, axis)

    def slide(self, dim: int, function: Callable[..., Tensor], *args: object, **options: object) -> None:
        """Compose with a function of one-dimensional images, ``[n, 1, size]``, along one dimension."""
        self.along(dim, lambda m: function(m.unsqueeze(1), *args, **options).squeeze(1))

    def permute(self, order: Sequence[int]) -> None:
        """Order the dimensions anew."""
        self.rank()
        self.dims = [self.dims[dim] for dim in order]

    def remove(self, dim: int) -> None:
        """Take out a dimension of size 1."""
        self.rank()
        self._reduce(*self.dims[dim])
        del self.dims[dim]

    def _reduce(self, index: int, axis: int) -> None:
        """Take an axis from a factor: what reaches any of its coordinates."""
        factor = self.factors[index]
        self.factors[index] = (
            torch.ones(factor, dtype=torch.float32) if isinstance(factor, int) else any_along(factor, axis)
        )
        self.dims = [(of, at - (of == index and at > axis)) for of, at in self.dims]

    def mix(self, dim: int, outputs: int, groups: int = 1) -> None:
        """Compose with a matrix along one dimension, or with so many of one size along its diagonal."""
        (index, axis), inputs = self.dims[dim % self.rank()], self.size(dim)
        if groups == 1:
            self._reduce(index, axis)
            self.dims[dim] = (len(self.factors), 1)
            self.factors.append(torch.ones(1, outputs, dtype=torch.float32))
        elif groups != inputs or groups != outputs:
            block = torch.ones(inputs // groups, outputs // groups, dtype=torch.float32)
            matrix = torch.block_diag(*[block] * groups)
            self.along(dim, lambda m: m @ matrix)

    def connect_all(self, outputs: int) -> None:
        """Compose with a matrix: what reaches any feature reaches all outputs; the last dimension, or a flat tensor."""
        if self.flat:
            self.factors = [
                torch.ones(factor, dtype=torch.float32)
                if isinstance(factor, int)
                else any_along(factor.reshape(len(factor), -1), 1)
                for factor in self.factors
            ]
            self.dims, self.flat = [(len(self.factors), 1)], False
            self.factors.append(torch.ones(1, outputs, dtype=torch.float32))
        else:
            self.mix(len(self.dims) - 1, outputs)

    def flatten(self, reshaped: Callable[[Sequence[int]], Sequence[int]]) -> None:
        """:meth:`reshape` to one dimension at its end, which a tensor that is flat already has."""
        if not self.flat:
            self.reshape(reshaped)

    def reshape(self, reshaped: Callable[[Sequence[int]], Sequence[int]]) -> None:
        """Give the current tensor the shape that `reshaped` makes of its own."""
        old = [self.size(dim) for dim in range(len(self.dims))]
        new = list(reshaped([math.prod(old)] if self.flat else old))
        self.separate()
        if not self.flat and self._reshape_by_factor(old, new):
            return
        if (moved := self._moved()) is not None:
            self._renumber(moved, new)
            return
        self.flat = len(new) == 1
        if not self.flat:
            raise NoProductError

    def _moved(self) -> Tensor | None:
        """Number of the unit of the factors at each place of the current tensor; None where it does more than move."""
        numbers, step = torch.zeros([1] * len(self.dims), dtype=torch.int64), 1
        for index in reversed(range(len(self.factors))):
            factor = self.factors[index]
            places = [dim for dim, (of, _) in enumerate(self.dims) if of == index]
            if isinstance(factor, Tensor):
                reach = factor.permute(0, *(self.dims[dim][1] for dim in places)).flatten(1) if places else factor
                if not places or len(reach) != reach.shape[1] or not _permutes(reach):
                    return None
                number = reach.argmax(dim=0)
            else:
                number = torch.arange(factor)
            shape = [self.size(dim) if dim in places else 1 for dim in range(len(self.dims))]
            numbers, step = numbers + step * number.view(shape), step * len(number)
        return numbers.flatten()

    def _renumber(self, moved: Tensor, new: Sequence[int]) -> None:
        """See the source's units as those of the current tensor in its new shape, which they are one by one."""
        order = moved if self.order is None else self.order[moved]
        in_order = torch.equal(order, torch.arange(len(order)))
        identity = Relation.identity(new)
        self.factors, self.dims, self.sources = identity.factors, identity.dims, identity.sources
        self.flat, self.order = False, None if in_order else order

    def _reshape_by_factor(self, old: list[int], new: list[int]) -> bool:
        """Reshape where dimensions are split, or merged that no two dimensions of the source decide."""
        result, dims = self.copy(), []
        at_old = at_new = 0
        while at_old < len(old) or at_new < len(new):
            # The next few dimensions that hold as many coordinates before as after.
            end_old, end_new = at_old + (at_old < len(old)), at_new + (at_new < len(new))
            while math.prod(old[at_old:end_old]) != math.prod(new[at_new:end_new]):
                if math.prod(old[at_old:end_old]) < math.prod(new[at_new:end_new]):
                    end_old += 1
                else:
                    end_new += 1
            merged, sizes = self.dims[at_old:end_old], new[at_new:end_new]
            if old[at_old:end_old] == sizes:
                dims += merged
            elif not merged:
                dims += [(len(result.factors), 1 + axis) for axis in range(len(sizes))]
                result.factors.append(torch.ones(1, *sizes, dtype=torch.float32))
            elif (joined := self._joined(merged)) is not None:
                index = min(of for of, _ in merged)
                for of, _ in merged:
                    # The factors that it is joined with are left without an axis.
                    result.factors[of] = torch.ones(1, dtype=torch.float32)
                result.factors[index] = joined.reshape(len(joined), *sizes)
                dims += [(index, 1 + axis) for axis in range(len(sizes))]
            else:
                return False
            at_old, at_new = end_old, end_new
        self.factors, self.dims = result.factors, dims
        return True

    def _joined(self, merged: Sequence[tuple[int, int]]) -> Tensor | None:
        """One factor of all that these dimensions are of, its axes in their order; None where there is none."""
        indices = sorted({index for index, _ in merged})
        axes = [(index, axis) for index in indices for axis in range(1, self._axes(index) + 1)]
        if len(axes) != len(merged) or sum(index < self.sources for index in indices) > 1:
            return None
        if sum(self._elements(index).bit_length() for index in indices) > MOST_ELEMENTS.bit_length():
            return None
        joined, sizes = torch.ones(1, 1, dtype=torch.float32), [self._size(*axis) for axis in axes]
        for index in indices:
            factor = as_tensor(self.factors[index]).flatten(1)
            joined = (joined.unsqueeze(2) * factor.unsqueeze(1)).flatten(1)
        return joined.view(len(joined), *sizes).permute(0, *(1 + axes.index(axis) for axis in merged))

    def _axes(self, index: int) -> int:
        factor = self.factors[index]
        return 1 if isinstance(factor, int) else factor.dim() - 1

    def _elements(self, index: int) -> int:
        factor = self.factors[index]
        return factor * factor if isinstance(factor, int) else factor.numel()

    def _size(self, index: int, axis: int) -> int:
        factor = self.factors[index]
        return factor if isinstance(factor, int) else factor.shape[axis]

    def separate(self) -> None:
        """Make a free factor of each axis on which what is reached does not depend on the others of its factor.

        So it is behind a matrix: what reaches any of its outputs reaches all.
        """
        for dim in range(len(self.dims)):
            (index, axis), factor = self.dims[dim], self.factors[self.dims[dim][0]]
            if isinstance(factor, int) or (index >= self.sources and factor.dim() == 2):
                continue
            rest, line = any_along(factor, axis), any_along(factor.movedim(axis, 0).flatten(1), 1)
            if int(rest.count_nonzero()) * int(line.count_nonzero()) == int(factor.count_nonzero()):
                self._reduce(index, axis)
                self.dims[dim] = (len(self.factors), 1)
                self.factors.append(line.unsqueeze(0))

    def settle(self) -> None:
        """Bring it into the one form that all equal relations have, unless they are empty."""
        self.separate()
        self.factors = [_identity_or(factor) for factor in self.factors]
        of_factor: dict[int, list[int]] = {index: [] for index in range(self.sources)}
        for dim, (index, _) in enumerate(self.dims):
            of_factor.setdefault(index, []).append(dim)
        factors: list[Tensor | int] = []
        dims = dict[int, tuple[int, int]]()
        for index, members in of_factor.items():
            factor = self.factors[index]
            if not isinstance(factor, int):
                factor = factor.permute(0, *(self.dims[dim][1] for dim in members))
            dims.update({dim: (len(factors), 1 + axis) for axis, dim in enumerate(members)})
            factors.append(factor)
        self.factors, self.dims = factors, [dims[dim] for dim in range(len(self.dims))]

    def is_empty(self) -> bool:
        """Check whether no unit reaches any."""
        return any(isinstance(factor, Tensor) and not bool(factor.any()) for factor in self.factors)


def as_tensor(factor: Tensor | int) -> Tensor:
    """A factor as a tensor."""
    return torch.eye(factor, dtype=torch.float32) if isinstance(factor, int) else factor


def _identity_or(factor: Tensor | int) -> Tensor | int:
    """The size of an identity, in place of its tensor."""
    if isinstance(factor, int) or factor.dim() != 2 or len(factor) != factor.shape[1] or len(factor) == 1:
        return factor
    return len(factor) if bool((factor.diagonal() == 1).all()) and _permutes(factor) else factor


def _permutes(matrix: Tensor) -> bool:
    """Check that a square matrix of zeros and ones has a single one in each row and column."""
    return bool((matrix.sum(dim=0) == 1).all()) and bool((matrix.sum(dim=1) == 1).all())


def any_along(factor: Tensor, axis: int) -> Tensor:
    """1 where any coordinate along an axis is 1; without the axis."""
    return (factor.sum(dim=axis) > 0).float()


def row_sums(factor: Tensor) -> Tensor:
    """For each source coordinate of a factor, how many it reaches."""
    return factor.reshape(len(factor), -1).sum(dim=1, dtype=torch.float64).long()


__all__ = ["MOST_ELEMENTS", "NoProductError", "Relation", "as_tensor", "row_sums"]
