"""Modules that torch.nn lacks, which join, route and weigh spikes where a network is no chain; and their modes."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


def per_dimension(value: Any, rank: int) -> tuple[Any, ...]:
    """A setting for each of `rank` dimensions; torch takes one for all of them, alone or in a sequence.

    Examples
    --------
    >>> per_dimension(3, 2), per_dimension([3], 2), per_dimension((1, 2), 2)
    ((3, 3), (3, 3), (1, 2))
    """
    values = tuple(value) if isinstance(value, tuple | list) else (value,)
    return values * rank if len(values) == 1 else values


def with_weight(module: nn.Module, weight: Tensor) -> nn.Module:
    """A module like another but for its weight, which is frozen; it shares all the rest.

    Examples
    --------
    >>> with_weight(nn.Linear(2, 1, bias=False), torch.ones(1, 2))(torch.tensor([[1.0, 2.0]]))
    tensor([[3.]])
    """
    copied: nn.Module = copy.copy(module)
    copied._parameters = {**module._parameters, "weight": nn.Parameter(weight, requires_grad=False)}
    return copied


@contextmanager
def in_eval_mode(net: nn.Module) -> Iterator[None]:
    """Put a network into eval mode, and afterwards each of its modules back into its own."""
    was_training = [module for module in net.modules() if module.training]
    net.eval()
    try:
        yield
    finally:
        for module in was_training:
            module.training = True


class Affine(nn.Module):
    """Per-channel ``x * weight + bias``: batch norms, constants and preprocessing while they are not yet folded.

    Parameters
    ----------
    weight, bias : Tensor
        Broadcastable to one sample's shape.
    """

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.detach().clone(), requires_grad=False)
        self.bias = nn.Parameter(bias.detach().clone(), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """Scale and shift."""
        return x * self.weight + self.bias


class SignedValues(nn.Module):
    """Stands where neurons will encode signed values, as long as their lowest value is not known: the identity.

    Examples
    --------
    >>> SignedValues()(torch.tensor([[-2.0, 1.0]]))
    tensor([[-2.,  1.]])
    """

    def forward(self, x: Tensor) -> Tensor:
        """Leave values as they are."""
        return x


class OneToOne(nn.Module):
    """One synapse per neuron: multiplies by fixed weights, broadcast over the batch.

    Parameters
    ----------
    weight : Tensor
        Broadcastable to one sample's shape.

    Examples
    --------
    >>> OneToOne(torch.tensor([2.0, 3.0]))(torch.ones(1, 2))
    tensor([[2., 3.]])
    """

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.detach().clone(), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """Multiply."""
        return x * self.weight

    def extra_repr(self) -> str:
        """Show the shape."""
        return f"weight={tuple(self.weight.shape)}"


class Add(nn.Module):
    """Sums the currents of several paths.

    Examples
    --------
    >>> Add()(torch.ones(1, 2), torch.ones(1, 2), torch.ones(1, 2))
    tensor([[3., 3.]])
    """

    def forward(self, first: Tensor, *others: Tensor) -> Tensor:
        """Add tensors of one shape."""
        total = first
        for other in others:
            total = total + other
        return total


class Concatenate(nn.Module):
    """Puts the units of several paths side by side.

    Parameters
    ----------
    dim : int
        Dimension, 1 or more: the batch stays apart.

    Examples
    --------
    >>> Concatenate(1)(torch.zeros(1, 1), torch.ones(1, 2))
    tensor([[0., 1., 1.]])
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = sample_dim(dim)

    def forward(self, *inputs: Tensor) -> Tensor:
        """Concatenate along the dimension."""
        return torch.cat(inputs, self.dim)

    def extra_repr(self) -> str:
        """Show the dimension."""
        return f"dim={self.dim}"


class Slice(nn.Module):
    """Takes every `step`-th unit from `start` up to, and without, `stop`.

    Parameters
    ----------
    dim : int
        Dimension, 1 or more.
    start, stop, step : int
        As in ``range``; `step` at least 1.

    Examples
    --------
    >>> Slice(1, 1, 5, 2)(torch.arange(6.0).reshape(1, -1))
    tensor([[1., 3.]])
    """

    def __init__(self, dim: int, start: int, stop: int, step: int = 1) -> None:
        super().__init__()
        if any(type(value) is not int or value < 0 for value in (start, stop, step)) or step == 0:
            raise ValueError(f"a slice goes from a start to a stop by a step of at least 1, got {start, stop, step!r}")
        self.dim, self.start, self.stop, self.step = sample_dim(dim), start, stop, step

    def forward(self, x: Tensor) -> Tensor:
        """Slice."""
        return x[(slice(None),) * self.dim + (slice(self.start, self.stop, self.step),)]

    def extra_repr(self) -> str:
        """Show the range."""
        return f"dim={self.dim}, start={self.start}, stop={self.stop}, step={self.step}"


class Expand(nn.Module):
    """Copies units along dimensions of size 1.

    Parameters
    ----------
    shape : sequence of int
        One sample's new shape, without the batch, of as many dimensions.

    Examples
    --------
    >>> Expand((2, 3))(torch.ones(5, 2, 1)).shape
    torch.Size([5, 2, 3])
    """

    def __init__(self, shape: Sequence[int]) -> None:
        super().__init__()
        self.shape = tuple(shape)

    def forward(self, x: Tensor) -> Tensor:
        """Expand."""
        return x.expand(len(x), *self.shape).contiguous()

    def extra_repr(self) -> str:
        """Show the shape."""
        return f"shape={self.shape}"


class Select(nn.Module):
    """Takes the units at these places of a dimension, some perhaps more than once.

    Parameters
    ----------
    dim : int
        Dimension, 1 or more.
    indices : sequence of int
        Places, from 0 on.

    Examples
    --------
    >>> Select(1, [2, 0, 0])(torch.tensor([[1.0, 2.0, 3.0]]))
    tensor([[3., 1., 1.]])
    """

    def __init__(self, dim: int, indices: Sequence[int]) -> None:
        super().__init__()
        self.dim, self.indices = sample_dim(dim), tuple(indices)

    def forward(self, x: Tensor) -> Tensor:
        """Select."""
        return x.index_select(self.dim, torch.tensor(self.indices, device=x.device))

    def extra_repr(self) -> str:
        """Show the dimension, and how many places there are."""
        return f"dim={self.dim}, places={len(self.indices)}"


class Permute(nn.Module):
    """Reorders dimensions.

    Parameters
    ----------
    dims : sequence of int
        The order of all dimensions, the batch's 0 first.

    Examples
    --------
    >>> Permute((0, 2, 1))(torch.ones(1, 2, 3)).shape
    torch.Size([1, 3, 2])
    """

    def __init__(self, dims: Sequence[int]) -> None:
        super().__init__()
        self.dims = tuple(dims)
        if self.dims[:1] != (0,) or sorted(self.dims) != list(range(len(self.dims))):
            raise ValueError(f"dims must order all dimensions, the batch's 0 first, got {self.dims}")

    def forward(self, x: Tensor) -> Tensor:
        """Permute."""
        return x.permute(self.dims)

    def extra_repr(self) -> str:
        """Show the order."""
        return f"dims={self.dims}"


class Reshape(nn.Module):
    """Reshapes every sample.

    Parameters
    ----------
    shape : sequence of int
        One sample's new shape, without the batch.

    Examples
    --------
    >>> Reshape((2, 3))(torch.ones(5, 6)).shape
    torch.Size([5, 2, 3])
    """

    def __init__(self, shape: Sequence[int]) -> None:
        super().__init__()
        self.shape = tuple(shape)

    def forward(self, x: Tensor) -> Tensor:
        """Reshape."""
        return x.reshape(len(x), *self.shape)

    def extra_repr(self) -> str:
        """Show the shape."""
        return f"shape={self.shape}"


class Mean(nn.Module):
    """Average over dimensions.

    Parameters
    ----------
    dims : sequence of int
        Dimensions, each 1 or more.
    keepdim : bool
        Keep them, of size 1.

    Examples
    --------
    >>> Mean((1,))(torch.tensor([[1.0, 3.0]]))
    tensor([2.])
    """

    def __init__(self, dims: Sequence[int], keepdim: bool = False) -> None:
        super().__init__()
        self.dims, self.keepdim = tuple(sample_dim(dim) for dim in dims), keepdim

    def forward(self, x: Tensor) -> Tensor:
        """Average."""
        return x.mean(self.dims, keepdim=self.keepdim)

    def extra_repr(self) -> str:
        """Show the dimensions."""
        return f"dims={self.dims}, keepdim={self.keepdim}"


class DenseFirstLayer(nn.Module):
    r"""The first linear map and its ReLU, computed on the image itself: multiplications, no spikes.

    .. math:: x \mapsto clip(W (g x + h) + b, 0, s) / s

    Its values, from 0 to 1, are encoded by the network's input spikes.

    Parameters
    ----------
    layer : nn.Module
        A convolution or linear layer, with its bias.
    scale : Tensor
        ``s``, positive: one number, or one for each channel.
    image_shape : tuple of int
        One image, without the batch.
    gain, shift : Tensor
        Preprocessing, broadcastable to one image.

    Examples
    --------
    >>> layer = nn.Linear(2, 1)
    >>> _ = layer.weight.data.fill_(1.0), layer.bias.data.fill_(1.0)
    >>> one = torch.ones(1)
    >>> DenseFirstLayer(layer, torch.tensor(4.0), (2,), one, 0 * one)(torch.tensor([[0.25, 0.75]]))
    tensor([[0.5000]], grad_fn=<ClampBackward1>)
    """

    scale: Tensor
    gain: Tensor
    shift: Tensor

    def __init__(
        self, layer: nn.Module, scale: Tensor, image_shape: Sequence[int], gain: Tensor, shift: Tensor
    ) -> None:
        super().__init__()
        self.layer, self.image_shape = layer, tuple(image_shape)
        self.register_buffer("scale", scale)
        self.register_buffer("gain", gain)
        self.register_buffer("shift", shift)

    def forward(self, images: Tensor) -> Tensor:
        """Values in [0, 1] of images ``[B, *image_shape]``."""
        drive: Tensor = self.layer(images * self.gain + self.shift)
        return (drive / self.scale).clamp(0.0, 1.0)

    def extra_repr(self) -> str:
        """Show the image's shape."""
        return f"image_shape={self.image_shape}"


def sample_dim(dim: int) -> int:
    """Check a dimension of a sample's units, 1 or more; ValueError for any other."""
    if type(dim) is not int or dim < 1:
        raise ValueError(f"a dimension of a sample's units is 1 or more (0 is the batch), got {dim!r}")
    return dim


__all__ = [
    "Add",
    "Affine",
    "Concatenate",
    "DenseFirstLayer",
    "Expand",
    "Mean",
    "OneToOne",
    "Permute",
    "Reshape",
    "Select",
    "SignedValues",
    "Slice",
    "per_dimension",
    "sample_dim",
]
