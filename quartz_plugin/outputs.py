"""Outputs of a network: the heads that the output layer encodes, and what users get of them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from quartz_plugin.host import HostProgram
from quartz_plugin.structure import Leaf, Structure, from_json, rebuilt, to_json
from quartz_plugin.task import CLASSIFICATION, Task

OUTPUT = "output"
"""Name of a network's only head."""


@dataclass(frozen=True)
class Head:
    """One of the tensors that the output layer encodes.

    Attributes
    ----------
    name : str
        Its name among the outputs; "output" where it is the only one.
    shape : tuple of int
        Its shape, without the batch.
    """

    name: str
    shape: tuple[int, ...]

    @property
    def units(self) -> int:
        """Neurons that encode it."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Outputs:
    """What a network returns: heads, what the host computes of them, and the structure of the results.

    One head is the output layer as it is; several stand flattened, one behind the other, in its units.

    Attributes
    ----------
    heads : tuple of Head
        The tensors that the output layer encodes.
    program : HostProgram or None
        What the host computes of the decoded heads; None where they are what the network returns.
    structure : Leaf, Nest or None
        How the program's results (or the heads) are nested.

    Examples
    --------
    >>> import torch
    >>> outputs = Outputs((Head("a", (2,)), Head("b", (1, 3))), None, from_json(["tuple", ["0", "1"], [0, 1]], 2))
    >>> [tuple(each.shape) for each in outputs.present(torch.rand(4, 5))]
    [(4, 2), (4, 1, 3)]
    """

    heads: tuple[Head, ...]
    program: HostProgram | None = None
    structure: Structure = field(default_factory=lambda: Leaf(0))

    @property
    def plain(self) -> bool:
        """True where the network returns its one head as it is."""
        return len(self.heads) == 1 and self.program is None and isinstance(self.structure, Leaf)

    def task(self, task: Task | Mapping[str, Task]) -> Task:
        """Meaning of the output layer as a whole: that of the only head; several are values, with a range each."""
        return task_of(task, self.heads[0].name) if len(self.heads) == 1 else "regression"

    def check_task(self, task: Task | Mapping[str, Task]) -> None:
        """Raise ValueError where a task is given for an output that there is not."""
        names = [head.name for head in self.heads]
        for name in task if isinstance(task, Mapping) else ():
            if name not in names:
                raise ValueError(f"task names no output {name!r}; there are {', '.join(map(repr, names))}")

    def split(self, packed: Tensor) -> list[Tensor]:
        """Heads ``[B, *shape]``, of the output layer's values."""
        if len(self.heads) == 1:
            return [packed]
        parts = packed.split([head.units for head in self.heads], dim=1)
        return [part.reshape(-1, *head.shape) for part, head in zip(parts, self.heads, strict=True)]

    def results(self, packed: Tensor) -> list[Any]:
        """The tensors that the network returns, in order."""
        heads = self.split(packed)
        return heads if self.program is None else self.program.run(heads)

    def present(self, packed: Tensor) -> Any:
        """What the network returns, nested as the ANN nests it."""
        return rebuilt(self.structure, self.results(packed))

    def index_of(self, name: str) -> int:
        """Place of a head.

        Raises
        ------
        KeyError
            Where there is none of this name; the message has those there are.
        """
        names = [head.name for head in self.heads]
        if name not in names:
            raise KeyError(f"no output {name!r}; there are {', '.join(map(repr, names))}")
        return names.index(name)

    def to_json(self) -> dict[str, Any] | None:
        """The outputs as plain JSON values; None for one head as it is."""
        if self.plain:
            return None
        return {
            "heads": [[head.name, list(head.shape)] for head in self.heads],
            "program": None if self.program is None else self.program.to_json(),
            "structure": to_json(self.structure),
        }

    @classmethod
    def from_json(cls, value: Any, shape: tuple[int, ...]) -> Outputs:
        """Read what :meth:`to_json` wrote, of a network whose output layer has this shape.

        Raises
        ------
        ValueError
            For what is damaged, or does not fit.
        """
        if value is None:
            return cls((Head(OUTPUT, shape),))
        try:
            heads = tuple(Head(str(name), tuple(int(size) for size in sizes)) for name, sizes in value["heads"])
            program = None if value["program"] is None else HostProgram.from_json(value["program"])
            count = len(heads) if program is None else len(program.results)
            structure = from_json(value["structure"], count)
        except (KeyError, TypeError) as error:
            raise ValueError(f"its outputs are damaged: {error}") from error
        fits = heads[0].shape == shape if len(heads) == 1 else shape == (sum(head.units for head in heads),)
        if not heads or not fits or len({head.name for head in heads}) < len(heads):
            raise ValueError(f"its outputs do not fit an output layer of shape {list(shape)}")
        if program is not None and program.inputs != len(heads):
            raise ValueError(f"its host program takes {program.inputs} outputs, and there are {len(heads)}")
        return cls(heads, program, structure)


def task_of(task: Task | Mapping[str, Task], head: str) -> Task:
    """Task of a head; of one that is not named, classification.

    Examples
    --------
    >>> task_of("regression", "boxes"), task_of({"boxes": "regression"}, "scores")
    ('regression', 'classification')
    """
    return task.get(head, CLASSIFICATION) if isinstance(task, Mapping) else task


__all__ = ["OUTPUT", "Head", "Outputs", "task_of"]
