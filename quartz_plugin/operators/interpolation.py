"""Interpolation between units: a linear map of fixed weights, a product of one matrix for each dimension of space."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from quartz_plugin.operators.gains import Mixed
from quartz_plugin.operators.linear_map import as_convolution
from quartz_plugin.operators.modules import per_dimension
from quartz_plugin.operators.relation import Relation
from quartz_plugin.operators.row import Operator, Role, Rows
from quartz_plugin.operators.settings import FLAG, SCALE_FACTOR, listed, one_of
from quartz_plugin.operators.tracing import Refusal

LINEAR = ("linear", "bilinear", "trilinear")
"""Modes of torch by how many dimensions of space they interpolate along; their weights are never negative."""


class Interpolate(nn.Module):
    """Interpolates linearly along all dimensions of space.

    Parameters
    ----------
    size : sequence of int
        Size of each dimension of space behind it.
    scale_factor : sequence of float, optional
        Where a network upsamples by factors, these: places in between are found by them.
    mode : str
        As of ``torch.nn.functional.interpolate``.
    align_corners, antialias : bool
        As there.

    Examples
    --------
    >>> Interpolate([3], None, "linear", True)(torch.tensor([[[0.0, 1.0]]]))
    tensor([[[0.0000, 0.5000, 1.0000]]])
    """

    modes: tuple[str, ...] = LINEAR

    def __init__(
        self,
        size: Sequence[int],
        scale_factor: Sequence[float] | None = None,
        mode: str = "bilinear",
        align_corners: bool = False,
        antialias: bool = False,
    ) -> None:
        super().__init__()
        self.size, self.mode, self.align_corners, self.antialias = tuple(size), mode, align_corners, antialias
        self.scale_factor = None if scale_factor is None else tuple(scale_factor)
        self.weighs_one = False

    def forward(self, x: Tensor) -> Tensor:
        """Interpolate."""
        if self.weighs_one:
            for dim in range(len(self.size)):
                reached = self.matrix(dim, x.shape[2 + dim]).to(x.device) != 0
                x = (x.movedim(2 + dim, -1) @ reached.to(x.dtype)).movedim(-1, 2 + dim)
            return x
        size = self.size if self.scale_factor is None else None
        options = {"align_corners": self.align_corners, "antialias": self.antialias}
        return F.interpolate(x, size, self.scale_factor, mode=self.mode, **options)  # type: ignore[arg-type]

    def weigh_one(self) -> None:
        """Add up what is put together, each by a weight of 1, from here on."""
        self.weighs_one = True

    def matrix(self, dim: int, size: int) -> Tensor:
        """Weights ``[size, new size]`` along a dimension of space, float64."""
        each = torch.eye(size, dtype=torch.float64).view(size, 1, size, 1)
        factor = None if self.scale_factor is None else (self.scale_factor[dim], 1.0)
        new = (self.size[dim], 1) if factor is None else None
        mode = "bicubic" if self.mode == "bicubic" else "bilinear"
        options = {"align_corners": self.align_corners, "antialias": self.antialias}
        return F.interpolate(each, new, factor, mode=mode, **options)[:, 0, :, 0]  # type: ignore[arg-type]

    def extra_repr(self) -> str:
        """Show the size and the mode."""
        return f"size={self.size}, mode={self.mode!r}, align_corners={self.align_corners}"


class BicubicInterpolate(Interpolate):
    """:class:`Interpolate` by cubic weights, of which some are negative."""

    modes = ("bicubic",)


def interpolating(upsample: Any, shape: Sequence[int], antialias: bool = False) -> nn.Module:
    """Interpolation that an ``nn.Upsample`` is on inputs of this shape, the batch included; of "area" an average."""
    rank = len(shape) - 2
    if not 1 <= rank <= 3:
        raise Refusal(f"it interpolates {rank} dimensions; give it inputs [B, C, ...] of 1 to 3 dimensions of space")
    if upsample.mode not in ("area", "bicubic", LINEAR[rank - 1]) or (upsample.mode == "bicubic" and rank != 2):
        raise Refusal(f"torch has no mode={upsample.mode!r} for {rank} dimensions of space; use {LINEAR[rank - 1]!r}")
    like = torch.empty(*shape, device="meta")
    size = tuple(F.interpolate(like, upsample.size, upsample.scale_factor, mode="nearest").shape[2:])
    if upsample.mode == "area":
        kinds: tuple[Any, ...] = (nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d)
        average: nn.Module = kinds[rank - 1](size)
        return average
    factor = None
    if upsample.scale_factor is not None and not upsample.recompute_scale_factor:
        factor = tuple(map(float, per_dimension(upsample.scale_factor, rank)))
    kind = BicubicInterpolate if upsample.mode == "bicubic" else Interpolate
    return kind(size, factor, upsample.mode, bool(upsample.align_corners), antialias)


def _check_space(module: Any, sources: Sequence[Tensor]) -> None:
    (value,) = sources
    rank = len(module.size)
    factors = module.scale_factor
    if value.dim() != 2 + rank or (factors is not None and len(factors) != rank):
        raise ValueError(f"it interpolates along {rank} dimensions of space")
    if any(size < 1 for size in module.size):
        raise ValueError(f"it interpolates to the size {module.size}")


def _relate_interpolation(relation: Relation, module: Any, place: int, shapes: Sequence[Sequence[int]]) -> None:
    relation.rank()
    for dim in range(len(module.size)):
        reached = (module.matrix(dim, shapes[place][1 + dim]) != 0).float()
        relation.along(1 + dim, lambda m, reached=reached: m @ reached)  # type: ignore[misc]


def _space(module: Any) -> Sequence[int]:
    return range(-len(module.size), 0)


def _interpolation(kind: type[Interpolate], keeps_sign: bool) -> Operator:
    return Operator(
        role=Role.SYNAPSE,
        how="fixed weights, part of the synapses that follow (with weight_bits: refused)",
        settings={
            "size": listed(1),
            "scale_factor": SCALE_FACTOR,
            "mode": one_of(*kind.modes),
            "align_corners": FLAG,
            "antialias": FLAG,
        },
        check=_check_space,
        relate=_relate_interpolation,
        form=as_convolution(lambda module, shape, out_shape: None),
        gain=Mixed(_space, as_sum=lambda module, shape, out_shape: None),
        keeps_sign=keeps_sign,
    )


ROWS: Rows = {
    Interpolate: _interpolation(Interpolate, keeps_sign=True),
    BicubicInterpolate: _interpolation(BicubicInterpolate, keeps_sign=False),
}

__all__ = ["ROWS", "BicubicInterpolate", "Interpolate", "interpolating"]
