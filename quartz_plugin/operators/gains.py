"""Gains: what a value of the spiking network stands for in the ANN, and how operations pass one on.

A gain is a float64 tensor with one entry for each unit of a value, of size 1 along each dimension in which it does not
differ, and of no dimension where it nowhere does. Rescaling dispatches on the classes below.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

AsSum = tuple[list[nn.Module], nn.Module, list[nn.Module]]
"""Routing, a module that adds up, and routing behind it."""


@dataclass(frozen=True, eq=False)
class IntoWeights:
    """The module's weights take up the gain of its inputs, and a gain that its outputs are to have.

    Attributes
    ----------
    of_inputs : callable
        ``(module, gain, input shape)``: one number for each input channel or feature; None where one weight serves
        inputs of several gains.
    along_outputs : callable
        ``(module, gain)``: whether a gain of the outputs is one number for each row of weights.
    scaled : callable
        ``(module, gain of inputs, gain of outputs)``: the weights times both, float64.
    bias_shape : callable
        Shape in which one number for each output is added to a sample.
    output_dim : int
        Dimension of the weights that goes with the outputs, of each group where there are several.
    with_bias : callable or None
        ``(module, inputs, bias)``: the module's value with another bias than its own; None where the bias is better
        added to the value.
    """

    of_inputs: Callable[[Any, Tensor, Sequence[int]], Tensor | None]
    along_outputs: Callable[[Any, Tensor], bool]
    scaled: Callable[[Any, Tensor, Tensor], Tensor]
    bias_shape: Callable[[Any], tuple[int, ...]]
    output_dim: int = 0
    with_bias: Callable[[Any, Tensor, Tensor], Tensor] | None = None


@dataclass(frozen=True, eq=False)
class IntoGain:
    """The gain takes up the module's weights, one a unit; nothing of the module remains.

    Attributes
    ----------
    weight : callable
        The module's weight, broadcastable to one sample.
    """

    weight: Callable[[Any], Tensor]


@dataclass(frozen=True, eq=False)
class Summed:
    """All inputs need one gain, which is the sum's."""


@dataclass(frozen=True, eq=False)
class Mixed:
    """Fixed weights put units together, which need one gain.

    Attributes
    ----------
    dims : callable
        Dimensions of a sample along which units are put together.
    removed : callable
        Those of them that the result lacks.
    as_sum : callable, optional
        Of a module that averages, ``(module, input shape, shape)``: what adds up in its windows instead, and the
        routing before and behind it; None where no fixed weights do.
    """

    dims: Callable[[Any], Sequence[int]]
    removed: Callable[[Any], Sequence[int]] = lambda module: ()
    as_sum: Callable[[Any, Sequence[int], Sequence[int]], AsSum | None] | None = None

    def are_alike(self, module: Any, gain: Tensor) -> bool:
        """Check whether all units that the module puts together have the same gain."""
        return gain.dim() == 0 or all(gain.shape[dim] == 1 for dim in self.dims(module))

    def behind(self, module: Any, gain: Tensor) -> Tensor:
        """Gain of the result, where :meth:`are_alike`."""
        if gain.dim() == 0:
            return gain
        removed = {dim % gain.dim() for dim in self.removed(module)}
        return gain.reshape([size for dim, size in enumerate(gain.shape) if dim not in removed])

    def before(self, module: Any, gain: Tensor) -> Tensor | None:
        """Gain of the input that becomes `gain`; None where there is none."""
        if gain.dim() > 0:
            for dim in sorted(self.removed(module)):
                gain = gain.unsqueeze(dim)
        return gain if self.are_alike(module, gain) else None


def _by_itself(module: Any, gains: list[Tensor]) -> Tensor:
    routed: Tensor = module(*gains)
    return routed


@dataclass(frozen=True, eq=False)
class Moved:
    """Units keep their gain and change their place.

    Attributes
    ----------
    behind : callable
        ``(module, gains)``: gains ``[1, ...]`` of the inputs' units in their new places.
    before : callable, optional
        ``(module, gain, place, sizes)``: gain of the input at this place, the inputs being of these sizes, that
        becomes `gain`. Without it, numbers are sent through the module to see where they go.
    """

    behind: Callable[[Any, list[Tensor]], Tensor] = _by_itself
    before: Callable[[Any, Tensor, int, Sequence[Sequence[int]]], Tensor] | None = None


Gain = IntoWeights | IntoGain | Summed | Mixed | Moved


def compressed(gain: Tensor) -> Tensor:
    """A gain of size 1 along each dimension in which it does not differ; of no dimension where it nowhere does."""
    for dim in range(gain.dim()):
        first = gain.narrow(dim, 0, 1)
        gain = first if bool((gain == first).all()) else gain
    return gain.reshape(()) if gain.numel() == 1 else gain


def is_per_channel(gain: Tensor) -> bool:
    """Check whether a gain differs between channels alone."""
    return gain.dim() == 0 or all(size == 1 for size in gain.shape[1:])


__all__ = ["AsSum", "Gain", "IntoGain", "IntoWeights", "Mixed", "Moved", "Summed", "compressed", "is_per_channel"]
