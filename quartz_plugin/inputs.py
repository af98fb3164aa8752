"""Inputs of a network: what the units of the input layer encode of the tensors that users give.

Every unit encodes a value in [0, 1]. A signed input is encoded by two units for each value, one for each sign, so that
0 is silent; several inputs stand flattened, one behind the other. In the network, fixed linear maps and routing behind
the input layer make the tensors again.
"""

from __future__ import annotations

import inspect
import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from quartz_plugin.coding import TOLERANCE, check_unit_interval, is_traced

Range = tuple[tuple[float, ...], tuple[float, ...]]
"""Least and largest values of an input: one for all, or one for each channel."""

PLACE = "input"
"""Key in a node's meta of the place of the input that it gives."""

UNIT: Range = ((0.0,), (1.0,))


@dataclass(frozen=True)
class Input:
    """One of a network's input tensors.

    Attributes
    ----------
    name : str
        Its name in the network's forward.
    shape : tuple of int
        Its shape, without the batch.
    low, high : tuple of float
        Least and largest values: one for all, or one for each channel.
    """

    name: str
    shape: tuple[int, ...]
    low: tuple[float, ...] = UNIT[0]
    high: tuple[float, ...] = UNIT[1]

    @property
    def signed(self) -> bool:
        """True where it may be negative: two units encode a value, one for each sign."""
        return min(self.low) < 0

    @property
    def units(self) -> int:
        """Units that encode it."""
        return math.prod(self.shape) * (2 if self.signed else 1)

    @property
    def plain(self) -> bool:
        """True where its units encode its values as they are."""
        return (self.low, self.high) == UNIT

    def size(self) -> Tensor:
        """What the value 1 of a unit stands for, float64: one number, or one for each channel, ``[C, 1, ...]``."""
        low, high = (torch.tensor(each, dtype=torch.float64) for each in (self.low, self.high))
        size = torch.maximum(low.abs(), high.abs())
        return size.reshape(()) if len(size) == 1 else size.view(-1, *[1] * (len(self.shape) - 1))

    def check(self, values: Tensor, clamp: bool, what: str) -> Tensor:
        """Return the values, rounding clamped; raises where they do not fit, or lie outside (unless `clamp`)."""
        if not isinstance(values, Tensor):
            raise TypeError(f"{what} must be a torch.Tensor, got {type(values).__name__}")
        check_shape(values, self.shape, what)
        if self.plain and not clamp:
            return check_unit_interval(values, what)
        if not values.is_floating_point():
            raise ValueError(f"{what} must be floating point, got {values.dtype}; give {what}.float()")
        if is_traced(values) or values.numel() == 0:
            return values
        if bool(values.isnan().any()):
            raise ValueError(f"{what} contains NaN")
        low, high = (
            torch.tensor(each, dtype=torch.float64).view(-1, *[1] * (len(self.shape) - 1)).to(values)
            for each in (self.low, self.high)
        )
        slack = TOLERANCE * float(torch.maximum(low.abs(), high.abs()).max())
        if not clamp and bool(((values < low - slack) | (values > high + slack)).any()):
            lowest, highest = (float(value) for value in values.aminmax())
            raise ValueError(
                f"{what} must have values from {_numbers(self.low)} to {_numbers(self.high)}, got {lowest:g} to "
                f"{highest:g}; give input_range=(least, largest), or clamp_inputs=True"
            )
        return torch.minimum(torch.maximum(values, low), high)

    def pack(self, values: Tensor) -> Tensor:
        """Values of the units, in [0, 1], of checked values ``[B, *shape]``: ``[B, 2, *shape]`` for signed ones."""
        if self.plain:
            return values
        scaled = values / self.size().to(values)
        return torch.stack([scaled.clamp(min=0), (-scaled).clamp(min=0)], dim=1) if self.signed else scaled

    def unpack(self, units: Any) -> Any:
        """What its units encode; of a tensor, or of a symbol of torch.fx."""
        if self.signed:
            units = operator.sub(units[:, 0], units[:, 1])
        size = self.size()
        if size.numel() == 1:
            return units if float(size) == 1 else operator.mul(units, float(size))
        if isinstance(units, Tensor):
            return units * size.to(units)
        return operator.mul(units, units.tracer.create_proxy("call_function", torch.tensor, (size.tolist(),), {}))

    @property
    def packed_shape(self) -> tuple[int, ...]:
        """Shape of its units, without the batch."""
        return (2, *self.shape) if self.signed else self.shape


def check_shape(values: Tensor, shape: tuple[int, ...], what: str) -> None:
    """Raise ValueError unless the values are ``[B, *shape]``."""
    if tuple(values.shape[1:]) != shape or values.dim() != len(shape) + 1:
        expected = ", ".join(["B", *map(str, shape)])
        raise ValueError(
            f"{what} must have the shape the network was converted for, [{expected}], got {list(values.shape)}"
        )


def _numbers(values: Sequence[float]) -> str:
    return f"{values[0]:g}" if len(values) == 1 else f"[{', '.join(f'{value:g}' for value in values)}]"


@dataclass(frozen=True)
class Inputs:
    """The tensors that a network takes, and how the units of the input layer encode them.

    Attributes
    ----------
    parts : tuple of Input
        One for each tensor.
    clamp : bool
        Values outside their range are clamped, not refused.

    Examples
    --------
    >>> inputs = Inputs((Input("x", (2,), (-1.0,), (1.0,)), Input("y", (3,))))
    >>> packed = inputs.pack((torch.tensor([[0.5, -1.0]]), torch.tensor([[0.0, 0.25, 1.0]])))
    >>> packed
    tensor([[0.5000, 0.0000, 0.0000, 1.0000, 0.0000, 0.2500, 1.0000]])
    >>> inputs.unpack(packed)
    (tensor([[ 0.5000, -1.0000]]), tensor([[0.0000, 0.2500, 1.0000]]))
    """

    parts: tuple[Input, ...]
    clamp: bool = False

    @property
    def plain(self) -> bool:
        """True for one tensor whose values the units encode as they are."""
        return len(self.parts) == 1 and self.parts[0].plain and not self.clamp

    @property
    def packed_shape(self) -> tuple[int, ...]:
        """Shape of the input layer, without the batch."""
        return self.parts[0].packed_shape if len(self.parts) == 1 else (sum(part.units for part in self.parts),)

    def tensors(self, given: Any, what: str = "images") -> tuple[Tensor, ...]:
        """The tensors of what users give: one, or a tuple, list or dict (by name) of several; checked.

        Raises
        ------
        TypeError, ValueError
            Where there are more or fewer, or they do not fit.
        """
        names = [part.name for part in self.parts]
        if isinstance(given, dict) and set(given) == set(names):
            given = tuple(given[name] for name in names)
        if len(names) == 1 and isinstance(given, Tensor):
            given = (given,)
        if not isinstance(given, tuple | list) or len(given) != len(names):
            got = f"{len(given)} of them" if isinstance(given, tuple | list) else type(given).__name__
            raise TypeError(f"{what} must be a tuple of {len(names)} tensors ({', '.join(names)}), got {got}")
        several = len(names) > 1
        checked = [
            part.check(values, self.clamp, f"{what} ({part.name})" if several else what)
            for part, values in zip(self.parts, given, strict=True)
        ]
        if len({len(values) for values in checked}) > 1:
            raise ValueError(f"{what} must have one batch size, got {[len(values) for values in checked]}")
        return tuple(checked)

    def pack(self, given: Any, what: str = "images") -> Tensor:
        """Values of the input layer's units, ``[B, *packed_shape]`` in [0, 1]; raises as :meth:`tensors` does."""
        packed = [part.pack(values) for part, values in zip(self.parts, self.tensors(given, what), strict=True)]
        return (
            packed[0]
            if len(packed) == 1
            else torch.cat([each.reshape(len(each), math.prod(each.shape[1:])) for each in packed], dim=1)
        )

    def unpack(self, packed: Any) -> tuple[Any, ...]:
        """The tensors that the units encode; of a tensor, or of a symbol of torch.fx."""
        if len(self.parts) == 1:
            return (self.parts[0].unpack(packed),)
        found, start = [], 0
        for part in self.parts:
            units = torch.reshape(packed[:, start : start + part.units], (-1, *part.packed_shape))
            found.append(part.unpack(units))
            start += part.units
        return tuple(found)

    def unpack_in(self, graph: fx.Graph) -> None:
        """Let a traced graph of several or signed inputs begin at one placeholder, as a forward that unpacks would."""
        if self.plain:
            return
        placeholders = [node for node in graph.nodes if node.op == "placeholder"][: len(self.parts)]
        tracer = fx.proxy.GraphAppendingTracer(graph)
        with graph.inserting_before(next(iter(graph.nodes))):
            packed = graph.placeholder("packed_inputs")
        last = placeholders[-1]
        while last.next.op == "placeholder":
            last = last.next
        with graph.inserting_before(last.next):
            made = self.unpack(fx.Proxy(packed, tracer))
        for place, (old, new) in enumerate(zip(placeholders, made, strict=True)):
            new.node.meta[PLACE] = place
            old.replace_all_uses_with(new.node)
            graph.erase_node(old)

    def to_json(self) -> list[Any]:
        """The inputs as plain JSON values."""
        return [[[p.name, list(p.shape), list(p.low), list(p.high)] for p in self.parts], self.clamp]

    @classmethod
    def from_json(cls, value: Any, shape: tuple[int, ...]) -> Inputs:
        """Read what :meth:`to_json` wrote, of a network whose input layer has this shape.

        Raises
        ------
        ValueError
            For what is damaged, or does not fit.
        """
        try:
            parts, clamp = value
            made = tuple(
                Input(str(name), tuple(map(int, sizes)), tuple(map(float, low)), tuple(map(float, high)))
                for name, sizes, low, high in parts
            )
            inputs = cls(made, bool(clamp))
        except (TypeError, ValueError) as error:
            raise ValueError(f"its inputs are damaged: {error}") from error
        if not made or inputs.packed_shape != shape or any(_damaged(part) for part in made):
            raise ValueError(f"its inputs do not fit an input layer of shape {list(shape)}")
        return inputs


def _damaged(part: Input) -> bool:
    channels = {1, *part.shape[:1]}
    ends = zip(part.low, part.high, strict=False)
    fits = len(part.low) == len(part.high) in channels and all(size >= 1 for size in part.shape)
    return not fits or not all(math.isfinite(a) and math.isfinite(b) and a < b and b > 0 for a, b in ends)


def parameter_names(network: nn.Module) -> list[str]:
    """Names of the tensors that a network's forward must be given."""
    parameters = _parameters(network)
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return [each.name for each in parameters if each.kind in positional and each.default is inspect.Parameter.empty]


def _parameters(network: nn.Module) -> list[inspect.Parameter]:
    try:
        return list(inspect.signature(type(network).forward).parameters.values())[1:]
    except (AttributeError, TypeError, ValueError):  # Scripted forwards have none.
        return []


def named_inputs(network: nn.Module, count: int) -> list[str]:
    """Names for so many inputs: those of the forward, as far as it has them."""
    parameters = [each.name for each in _parameters(network)]
    return [parameters[place] if place < len(parameters) else f"input_{place}" for place in range(count)]


__all__ = ["UNIT", "Input", "Inputs", "Range", "check_shape", "named_inputs", "parameter_names"]
