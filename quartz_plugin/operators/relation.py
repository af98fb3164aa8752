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


class NoProductError(Exception):
    """A composed relation is no product of relations of single dimensions."""


@dataclass
class Relation:
    """The coordinates that a unit reaches, as a product of factors: one for each source dimension, then free ones.

    A factor is ``[size of the source's dimension, *sizes]``, 1 where a source coordinate reaches a coordinate of
    the current tensor; ``dims`` holds, for each dimension of that tensor, which factor and axis it is. An identity
    is no more than its size until it meets another relation: that of a long vector would not fit into memory.

    Methods that compose it with one more map raise :class:`NoProductError` where the result is none.
    """

    factors: list[Tensor | int]
    dims: list[tuple[int, int]]
    flat: bool = False

    @classmethod
    def identity(cls, shape: Sequence[int]) -> Relation:
        """Each unit of this shape reaches itself."""
        return cls(list(shape), [(index, 1) for index in range(len(shape))])

    def factor(self, index: int) -> Tensor:
        """A factor as a tensor."""
        factor = self.factors[index]
        if isinstance(factor, int):
            self.factors[index] = factor = torch.eye(factor, dtype=torch.float32)
        return factor

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

    def matches(self, other: Relation) -> bool:
        """Check whether both relate the same dimensions, so that they can be intersected."""
        same = self.dims == other.dims and self.flat == other.flat and len(self.factors) == len(other.factors)
        return same and all(self.factor(i).shape == other.factor(i).shape for i in range(len(self.factors)))

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
        del self.dims[dim]

    def connect_all(self, outputs: int) -> None:
        """Compose with a matrix: what reaches any feature reaches all outputs; the last dimension, or a flat tensor."""
        last = self.dims[-1][0]
        for index, factor in enumerate(self.factors):
            if not self.flat and index != last:
                continue
            if isinstance(factor, int):
                self.factors[index] = torch.ones(factor, 1, dtype=torch.float32)
            elif self.flat:
                self.factors[index] = factor.reshape(len(factor), -1).amax(dim=1, keepdim=True)
            else:
                self.factors[index] = factor.amax(dim=self.dims[-1][1], keepdim=True)
        self.factors.append(torch.ones(1, outputs, dtype=torch.float32))
        self.dims = [*([] if self.flat else self.dims[:-1]), (len(self.factors) - 1, 1)]
        self.flat = False

    def flatten(self, reshaped: Callable[[Sequence[int]], Sequence[int]]) -> None:
        """:meth:`reshape` to one dimension at its end, which a tensor that is flat already has."""
        if not self.flat:
            self.reshape(reshaped)

    def reshape(self, reshaped: Callable[[Sequence[int]], Sequence[int]]) -> None:
        """Give the current tensor the shape that `reshaped` makes of its own."""
        old = [self.size(dim) for dim in range(len(self.dims))]
        in_order = self.dims == [(index, 1) for index in range(len(self.factors))]
        untouched = in_order and all(isinstance(factor, int) for factor in self.factors)
        new = list(reshaped([math.prod(old)] if self.flat else old))
        if not self.flat and self._reshape_by_factor(old, new):
            return
        if untouched:
            # Nothing has happened yet: the source's units may as well be of that shape.
            self.factors, self.dims, self.flat = list(new), [(index, 1) for index in range(len(new))], False
            return
        self.flat = len(new) == 1
        if not self.flat:
            raise NoProductError

    def _reshape_by_factor(self, old: list[int], new: list[int]) -> bool:
        """Reshape where dimensions are split or merged within one factor each."""
        factors, dims = list(self.factors), []
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
            indices = {index for index, _ in merged}
            if old[at_old:end_old] == sizes:
                dims += merged
            elif not merged:
                dims += [(len(factors), 1 + axis) for axis in range(len(sizes))]
                factors.append(torch.ones(1, *sizes, dtype=torch.float32))
            elif len(indices) == 1 and self.factor(merged[0][0]).dim() == len(merged) + 1:
                (index,) = indices
                ordered = self.factor(index).permute(0, *(axis for _, axis in merged))
                factors[index] = ordered.reshape(len(ordered), *sizes)
                dims += [(index, 1 + axis) for axis in range(len(sizes))]
            else:
                return False
            at_old, at_new = end_old, end_new
        self.factors, self.dims = factors, dims
        return True


def row_sums(factor: Tensor) -> Tensor:
    """For each source coordinate of a factor, how many it reaches."""
    return factor.reshape(len(factor), -1).sum(dim=1).long()


__all__ = ["NoProductError", "Relation", "row_sums"]
