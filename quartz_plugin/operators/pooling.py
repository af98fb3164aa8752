"""Operations that put units together by fixed weights, which are synapses, and max pooling of first spikes."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from quartz_plugin.operators.constants import scaled
from quartz_plugin.operators.extremes import build_attribute, build_largest, build_max, build_min, build_smallest
from quartz_plugin.operators.gains import AsSum, Mixed
from quartz_plugin.operators.linear_map import LinearMap, Shape3, as_convolution, as_image, pair
from quartz_plugin.operators.modules import Mean, Permute, Reshape, per_dimension, sample_dim
from quartz_plugin.operators.relation import Relation
from quartz_plugin.operators.row import Operator, Relate, Role, Rows
from quartz_plugin.operators.settings import FLAG, Settings, listed, sizes, whole, whole_or_none
from quartz_plugin.operators.spelling import spell_space
from quartz_plugin.operators.tracing import Append, Build, Value, build_module, unit_dim

_AVERAGE = "linear, unrounded: part of the synapses that follow"


def check_channels(rank: int) -> Callable[[Any, Sequence[Tensor]], None]:
    """Check that there are channels: torch takes a batch without any for one image."""

    def check(module: Any, sources: Sequence[Tensor]) -> None:
        if sources[0].dim() != 2 + rank:
            raise ValueError(f"it pools {rank}-dimensional channels")

    return check


def _space(rank: int) -> Callable[[Any], Sequence[int]]:
    return lambda module: range(-rank, 0)


def _relate_windows(function: Callable[..., Tensor], *names: str) -> Relate:
    """Relation of a pool whose windows slide along each dimension, by torch's function of these settings."""

    def relate(relation: Relation, module: Any, place: int, shapes: Sequence[Sequence[int]]) -> None:
        rank = relation.rank() - 1
        for dim in range(rank):
            windows = (per_dimension(getattr(module, name), rank)[dim] for name in names)
            relation.slide(1 + dim, function, *windows, ceil_mode=module.ceil_mode)

    return relate


def _relate_adaptive(function: Callable[..., Tensor]) -> Relate:
    def relate(relation: Relation, module: Any, place: int, shapes: Sequence[Sequence[int]]) -> None:
        rank = relation.rank() - 1
        for dim in range(rank):
            size = per_dimension(module.output_size, rank)[dim]
            relation.slide(1 + dim, function, size or relation.size(1 + dim))

    return relate


# Averages


def _average_settings(rank: int) -> Settings:
    settings = {
        "kernel_size": sizes(rank, 1),
        "stride": sizes(rank, 1),
        "padding": sizes(rank, 0),
        "ceil_mode": FLAG,
        "count_include_pad": FLAG,
    }
    return settings | ({"divisor_override": whole_or_none(1)} if rank > 1 else {})


def _depthwise_average(channels: int, kernel: tuple[int, int], divisor: int, **options: Any) -> LinearMap:
    weight = torch.full((channels, 1, *kernel), 1.0 / divisor, dtype=torch.float64)
    return LinearMap(weight=weight, groups=channels, **options)


def _average_as_map(rank: int) -> Callable[[Any, Shape3, torch.Size], LinearMap | None]:
    def linear_map(module: Any, shape: Shape3, out_shape: torch.Size) -> LinearMap | None:
        kernel, padding = pair(module.kernel_size, rank, 1), pair(module.padding, rank, 0)
        padded_apart = padding != (0, 0) and not module.count_include_pad
        if len(out_shape) != 1 + rank or rank > 2 or module.ceil_mode or padded_apart:
            return None
        divisor = getattr(module, "divisor_override", None) or math.prod(kernel)
        return _depthwise_average(shape[0], kernel, divisor, stride=pair(module.stride, rank, 1), padding=padding)

    return linear_map


def _sum_in_windows_1d(module: Any, shape: Sequence[int], out_shape: Sequence[int]) -> AsSum | None:
    if module.ceil_mode:
        return None
    return [], _sum_along(shape[0], module.kernel_size[0], module.stride[0], module.padding[0]), []


def _sum_in_windows(module: Any, shape: Sequence[int], out_shape: Sequence[int]) -> AsSum:
    summed = copy.deepcopy(module)
    summed.divisor_override = 1
    return [], summed, []


def _sum_along(channels: int, kernel: int, stride: int, padding: int = 0) -> nn.Module:
    ones = nn.Conv1d(channels, channels, kernel, stride, padding, groups=channels, bias=False)
    ones.weight = nn.Parameter(torch.ones_like(ones.weight.detach()), requires_grad=False)
    return ones


def _average(kind: Any, rank: int, function: Any, as_sum: Any) -> Operator:
    return Operator(
        role=Role.SYNAPSE,
        how=_AVERAGE,
        functions={build_module(kind): [function]},
        spell=spell_space(rank),
        rank=rank,
        settings=_average_settings(rank),
        check=check_channels(rank),
        relate=_relate_windows(F.avg_pool1d, "kernel_size", "stride", "padding"),
        form=as_convolution(_average_as_map(rank)),
        gain=Mixed(_space(rank), as_sum=as_sum),
        keeps_sign=True,
    )


def _keeps_size(rank: int) -> Callable[[Any, Sequence[int]], bool]:
    """An adaptive average to the size that is there already is each unit itself."""
    return lambda module, shape: per_dimension(module.output_size, rank) == tuple(shape[-rank:])


def _adaptive_average_as_map(rank: int) -> Callable[[Any, Shape3, torch.Size], LinearMap | None]:
    def linear_map(module: Any, shape: Shape3, out_shape: torch.Size) -> LinearMap | None:
        (channels, height, width), (_, rows, columns) = shape, as_image(out_shape)
        if len(out_shape) != 1 + rank or rank > 2 or height % rows or width % columns:
            return None
        kernel = (height // rows, width // columns)
        return _depthwise_average(channels, kernel, math.prod(kernel), stride=kernel)

    return linear_map


def _adaptive_sum(module: Any, shape: Sequence[int], out_shape: Sequence[int]) -> AsSum | None:
    wanted = list(zip(shape[-len(module.output_size) :], module.output_size, strict=True))
    if any(own % size for own, size in wanted):
        return None
    kernel = tuple(own // size for own, size in wanted)
    if len(kernel) == 1:
        return [], _sum_along(shape[0], kernel[0], kernel[0]), []
    pool: Any = nn.AvgPool2d if len(kernel) == 2 else nn.AvgPool3d
    return [], pool(kernel, kernel, divisor_override=1), []


def _adaptive_average(kind: Any, rank: int, function: Any) -> Operator:
    return Operator(
        role=Role.SYNAPSE,
        how=_AVERAGE,
        functions={build_module(kind): [function]},
        spell=spell_space(rank),
        rank=rank,
        settings={"output_size": sizes(rank, 1, (None,) if rank > 1 else ())},
        check=check_channels(rank),
        routes=_keeps_size(rank),
        relate=_relate_adaptive(F.adaptive_avg_pool1d),
        form=as_convolution(_adaptive_average_as_map(rank)),
        gain=Mixed(_space(rank), as_sum=_adaptive_sum),
        keeps_sign=True,
    )


def _build_mean(append: Append, input: Value, dim: Any = None, keepdim: bool = False) -> Value:
    dims = range(input.tensor.dim()) if dim is None else [dim] if isinstance(dim, int) else dim
    return append(Mean([unit_dim(d, input) for d in dims], keepdim), input)


def _build_total(append: Append, input: Value, dim: Any = None, keepdim: bool = False) -> Value:
    mean = _build_mean(append, input, dim, keepdim)
    return scaled(append, mean, input.tensor[0].numel() / mean.tensor[0].numel())


def _relate_mean(relation: Relation, module: Any, place: int, shapes: Sequence[Sequence[int]]) -> None:
    for dim in sorted((dim - 1 for dim in module.dims), reverse=True):
        relation.along(dim, lambda m: m.amax(dim=1, keepdim=True))
        if not module.keepdim:
            relation.remove(dim)


def _mean_as_map(module: Any, shape: Shape3, out_shape: torch.Size) -> LinearMap | None:
    channels, height, width = shape
    if module.dims == (1,) and module.keepdim:
        return LinearMap(weight=torch.full((1, channels, 1, 1), 1.0 / channels, dtype=torch.float64))
    if 1 in module.dims or math.prod(out_shape) != channels:
        return None
    return _depthwise_average(channels, (height, width), height * width)


def _mean_as_sum(module: Any, shape: Sequence[int], out_shape: Sequence[int]) -> AsSum | None:
    reshaped: list[nn.Module] = [Reshape(out_shape)]
    if 1 not in module.dims and len(shape) in (2, 3):
        kernel = tuple(size if 2 + dim in module.dims else 1 for dim, size in enumerate(shape[1:]))
        behind = [] if module.keepdim else reshaped
        if len(kernel) == 1:
            return [], _sum_along(shape[0], kernel[0], kernel[0]), behind
        return [], nn.AvgPool2d(kernel, kernel, divisor_override=1), behind  # type: ignore[arg-type]
    # What is added up comes last, in one dimension.
    kept = [dim for dim in range(1, 1 + len(shape)) if dim not in module.dims]
    summed = math.prod(shape[dim - 1] for dim in module.dims)
    order = Permute((0, *kept, *sorted(module.dims)))
    rows = Reshape((1, math.prod(shape) // summed, summed))
    return [order, rows], nn.AvgPool2d((1, summed), divisor_override=1), reshaped


def _averaged(module: Any) -> list[int]:
    return [dim - 1 for dim in module.dims]


_MEAN = Operator(
    role=Role.SYNAPSE,
    how=_AVERAGE,
    functions={_build_mean: [torch.mean, "mean"], _build_total: [torch.sum, "sum"]},
    settings={"dims": listed(1), "keepdim": FLAG},
    relate=_relate_mean,
    form=as_convolution(_mean_as_map),
    gain=Mixed(_averaged, removed=lambda module: [] if module.keepdim else _averaged(module), as_sum=_mean_as_sum),
    keeps_sign=True,
)


# Cumulative sums

MOST_SUMMED = 2**12
"""Channels, up to which their cumulative sum is seen as a matrix; beyond, it is stepped."""


class CumulativeSum(nn.Module):
    """Sum of each unit and all in front of it along a dimension.

    Parameters
    ----------
    dim : int
        Dimension, 1 or more: the batch stays apart.

    Examples
    --------
    >>> CumulativeSum(1)(torch.ones(1, 4))
    tensor([[1., 2., 3., 4.]])
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = sample_dim(dim)

    def forward(self, x: Tensor) -> Tensor:
        """Add up."""
        return x.cumsum(self.dim)

    def extra_repr(self) -> str:
        """Show the dimension."""
        return f"dim={self.dim}"


def _build_cumulative_sum(append: Append, input: Value, dim: int) -> Value:
    return append(CumulativeSum(unit_dim(dim, input)), input)


def _relate_cumulative_sum(relation: Relation, module: Any, place: int, shapes: Sequence[Sequence[int]]) -> None:
    relation.along(module.dim - 1, lambda m: m.cumsum(1))


def _cumulative_sum_as_map(module: Any, shape: Shape3, out_shape: torch.Size) -> LinearMap | None:
    channels = shape[0]
    if module.dim == 1:
        if channels > MOST_SUMMED:
            return None
        return LinearMap(weight=torch.ones(channels, channels, dtype=torch.float64).tril().view(channels, -1, 1, 1))
    # A kernel as long as the dimension, which reaches back alone; a sequence's only one is the width.
    size, along_width = out_shape[module.dim - 1], module.dim == len(out_shape)
    kernel, padding = ((1, size), (0, size - 1)) if along_width else ((size, 1), (size - 1, 0))
    return LinearMap(weight=torch.ones(channels, 1, *kernel, dtype=torch.float64), padding=padding, groups=channels)


_CUMULATIVE_SUM = Operator(
    role=Role.SYNAPSE,
    how=_AVERAGE,
    functions={_build_cumulative_sum: [torch.cumsum, "cumsum"]},
    settings={"dim": whole(1)},
    relate=_relate_cumulative_sum,
    form=as_convolution(_cumulative_sum_as_map),
    gain=Mixed(lambda module: [module.dim - 1]),
    keeps_sign=True,
)


# Max pooling


def _returns_indices(pool: Any) -> str | None:
    return "it returns indices; use return_indices=False" if getattr(pool, "return_indices", False) else None


def _build_max_pool(kind: Callable[..., nn.Module]) -> Build:
    def build(
        append: Append,
        input: Value,
        kernel_size: Any,
        stride: Any = None,
        padding: Any = 0,
        dilation: Any = 1,
        *modes: bool,
        **named: bool,
    ) -> Value:
        flags = dict(zip(("ceil_mode", "return_indices"), modes, strict=False)) | named
        return append(kind(kernel_size, stride, padding, dilation, **flags), input)

    return build


def _build_adaptive_max_pool(kind: Callable[..., nn.Module]) -> Build:
    def build(append: Append, input: Value, output_size: Any, return_indices: bool = False) -> Value:
        return append(kind(output_size, return_indices), input)

    return build


def _check_windows(rank: int) -> Callable[[Any, Sequence[Tensor]], None]:
    """Refuse windows of padding alone, whose largest value is none."""
    has_channels = check_channels(rank)

    def check(module: Any, sources: Sequence[Tensor]) -> None:
        has_channels(module, sources)
        names = ("kernel_size", "stride", "padding", "dilation")
        settings = [per_dimension(getattr(module, name), rank) for name in names]
        for size, kernel, stride, padding, dilation in zip(sources[0].shape[-rank:], *settings, strict=True):
            pooled = F.max_pool1d(torch.zeros(1, 1, size), kernel, stride, padding, dilation, module.ceil_mode)
            if not bool(pooled.isfinite().all()):
                raise ValueError("it has pooling windows of padding alone")

    return check


_OVER_DIMENSIONS: dict[Any, list[Any]] = {
    build_largest: [torch.amax, "amax"],
    build_max: [torch.max, "max"],
    build_smallest: [torch.amin, "amin"],
    build_min: [torch.min, "min"],
    build_attribute: [getattr],
}


def _max_pool(kind: Any, rank: int, function: Any, adaptive: bool = False) -> Operator:
    windows = {
        "kernel_size": sizes(rank, 1),
        "stride": sizes(rank, 1),
        "padding": sizes(rank, 0),
        "dilation": sizes(rank, 1),
        "ceil_mode": FLAG,
    }
    relate = _relate_windows(F.max_pool1d, "kernel_size", "stride", "padding", "dilation")
    return Operator(
        role=Role.MAX_POOL,
        how="the first spike passes, once; moved behind a ReLU that follows; neurons in front of other sums and signed "
        "values, which encode them from a lowest one on; smallest values are those of the negative (with indices: "
        "refused)",
        refusal=_returns_indices,
        functions={
            (_build_adaptive_max_pool if adaptive else _build_max_pool)(kind): [function],
            **(_OVER_DIMENSIONS if adaptive and rank == 1 else {}),
        },
        spell=spell_space(rank),
        rank=rank,
        settings={"output_size": sizes(rank, 1, (None,) if rank > 1 else ())} if adaptive else windows,
        check=check_channels(rank) if adaptive else _check_windows(rank),
        relate=_relate_adaptive(F.adaptive_max_pool1d) if adaptive else relate,
        form=None,
        gain=Mixed(_space(rank)),
        keeps_sign=True,
    )


ROWS: Rows = {
    nn.AvgPool1d: _average(nn.AvgPool1d, 1, F.avg_pool1d, _sum_in_windows_1d),
    nn.AvgPool2d: _average(nn.AvgPool2d, 2, F.avg_pool2d, _sum_in_windows),
    nn.AvgPool3d: _average(nn.AvgPool3d, 3, F.avg_pool3d, _sum_in_windows),
    nn.AdaptiveAvgPool3d: _adaptive_average(nn.AdaptiveAvgPool3d, 3, F.adaptive_avg_pool3d),
    nn.AdaptiveAvgPool1d: _adaptive_average(nn.AdaptiveAvgPool1d, 1, F.adaptive_avg_pool1d),
    nn.AdaptiveAvgPool2d: _adaptive_average(nn.AdaptiveAvgPool2d, 2, F.adaptive_avg_pool2d),
    Mean: _MEAN,
    CumulativeSum: _CUMULATIVE_SUM,
    nn.MaxPool1d: _max_pool(nn.MaxPool1d, 1, F.max_pool1d),
    nn.MaxPool2d: _max_pool(nn.MaxPool2d, 2, F.max_pool2d),
    nn.MaxPool3d: _max_pool(nn.MaxPool3d, 3, F.max_pool3d),
    nn.AdaptiveMaxPool3d: _max_pool(nn.AdaptiveMaxPool3d, 3, F.adaptive_max_pool3d, adaptive=True),
    nn.AdaptiveMaxPool1d: _max_pool(nn.AdaptiveMaxPool1d, 1, F.adaptive_max_pool1d, adaptive=True),
    nn.AdaptiveMaxPool2d: _max_pool(nn.AdaptiveMaxPool2d, 2, F.adaptive_max_pool2d, adaptive=True),
}

__all__ = ["ROWS"]
