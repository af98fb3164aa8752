"""Operations that weigh single units or mix them by weights of their own, and sums: synapses of a spiking network."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from quartz_plugin.operators.constants import scaled, shifted
from quartz_plugin.operators.contractions import build_einsum, from_left
from quartz_plugin.operators.gains import IntoWeights, Summed, is_per_channel
from quartz_plugin.operators.linear_map import LinearMap, Shape3, as_convolution, pair, sum_of_terms
from quartz_plugin.operators.modules import Add, OneToOne, Reshape, per_dimension
from quartz_plugin.operators.relation import Relation
from quartz_plugin.operators.row import Operator, Role, Rows, changes_no_relation
from quartz_plugin.operators.selection import broadcast
from quartz_plugin.operators.settings import MOST, MOST_UNITS, Settings, one_of, sizes, whole
from quartz_plugin.operators.spelling import spell_space
from quartz_plugin.operators.tracing import ATTENTION, Append, Build, Refusal, Value

_WEIGHTED = "weights scaled, bias moved to the neurons; maps in a row act as one"


def _check_constant(*weights: Any) -> None:
    if any(isinstance(weight, Value) for weight in weights):
        raise Refusal(ATTENTION)


def _with_weights(module: Any, weight: Tensor, bias: Tensor | None) -> nn.Module:
    module.weight = nn.Parameter(weight.detach().clone(), requires_grad=False)
    if bias is not None:
        module.bias = nn.Parameter(bias.detach().clone(), requires_grad=False)
    return module  # type: ignore[no-any-return]


def _without_data(kind: Any, settings: dict[str, Any], weights: Mapping[str, Tensor]) -> nn.Module:
    """A layer with weights on the meta device, without a bias unless the settings want one."""
    module: nn.Module = kind(**{"bias": False, **settings}, device="meta")
    return module


# Convolutions


def _build_convolution(kind: Any, transposed: bool) -> Build:
    names = ["stride", "padding", *(["output_padding", "groups", "dilation"] if transposed else ["dilation", "groups"])]

    def build(append: Append, input: Value, weight: Any, bias: Any = None, *args: Any, **kwargs: Any) -> Value:
        options = dict(zip(names, args, strict=False)) | kwargs
        _check_constant(weight, bias)
        groups = options.get("groups", 1)
        rows, columns = weight.shape[:2]
        inputs, outputs = (rows, columns * groups) if transposed else (columns * groups, rows)
        module = kind(inputs, outputs, tuple(weight.shape[2:]), bias=bias is not None, **options, device="meta")
        return append(_with_weights(module, weight, bias), input)

    return build


def _convolution_settings(rank: int, transposed: bool) -> Settings:
    settings = {
        "in_channels": whole(1),
        "out_channels": whole(1),
        "kernel_size": sizes(rank, 1),
        "stride": sizes(rank, 1),
        "padding": sizes(rank, 0, ("same", "valid")),
        "dilation": sizes(rank, 1),
        "groups": whole(1),
        "padding_mode": one_of("zeros", "reflect", "replicate", "circular"),
    }
    if transposed:
        settings |= {"padding": sizes(rank, 0), "padding_mode": one_of("zeros"), "output_padding": sizes(rank, 0)}
    return settings


def _check_convolution(transposed: bool) -> Callable[[Any, Sequence[Tensor]], None]:
    """Check what torch looks at only where it computes."""

    def check(module: Any, sources: Sequence[Tensor]) -> None:
        (value,) = sources
        rank = len(module.kernel_size)
        if value.dim() != 2 + rank or value.shape[1] != module.in_channels:
            raise ValueError(f"it takes {module.in_channels} channels in {rank} dimensions")
        if transposed:
            for extra, stride, dilation in zip(module.output_padding, module.stride, module.dilation, strict=True):
                if extra >= max(stride, dilation):
                    raise ValueError(f"output_padding={extra} is not smaller than stride or dilation")
        elif not isinstance(module.padding, str):
            padded = [size + 2 * pad for size, pad in zip(value.shape[2:], module.padding, strict=True)]
            if module.in_channels * math.prod(padded) > MOST_UNITS:
                raise ValueError(f"padding={module.padding} gives more than {MOST_UNITS} units")

    return check


def _relate_convolution(transposed: bool) -> Callable[[Relation, Any, int, Sequence[Sequence[int]]], None]:
    def relate(relation: Relation, module: Any, place: int, shapes: Sequence[Sequence[int]]) -> None:
        relation.mix(0, module.out_channels, module.groups)
        rank = relation.rank() - 1
        for dim in range(rank):
            size, stride, dilation = (
                per_dimension(value, rank)[dim] for value in (module.kernel_size, module.stride, module.dilation)
            )
            kernel = torch.ones(1, 1, size, dtype=torch.float32)
            if transposed:
                pad, extra = (per_dimension(value, rank)[dim] for value in (module.padding, module.output_padding))
                relation.slide(1 + dim, F.conv_transpose1d, kernel, None, stride, pad, extra, 1, dilation)
            else:
                # torch counts paddings from the last dimension backwards.
                pads = module._reversed_padding_repeated_twice[2 * (rank - 1 - dim) :][:2]
                mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
                relation.slide(1 + dim, F.pad, tuple(pads), mode=mode)
                relation.slide(1 + dim, F.conv1d, kernel, stride=stride, dilation=dilation)

    return relate


def _convolution_as_map(rank: int, transposed: bool) -> Callable[[Any, Shape3, torch.Size], LinearMap | None]:
    def linear_map(module: Any, shape: Shape3, out_shape: torch.Size) -> LinearMap | None:
        if module.padding_mode != "zeros" or len(out_shape) != 1 + rank or rank > 2:
            return None
        weight, groups = module.weight.detach(), int(module.groups)
        if transposed:
            # Theirs is [inputs, outputs / groups, ...].
            weight = weight.unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1)
        if isinstance(module.padding, str):
            # "same" or "valid": counted from the last dimension backwards, left and right of each.
            both = module._reversed_padding_repeated_twice
            padding = (both[2] if len(both) > 2 else 0, both[0])
        else:
            padding = pair(module.padding, rank, 0)
        return LinearMap(
            weight=weight.unsqueeze(2) if rank == 1 else weight,
            stride=pair(module.stride, rank, 1),
            padding=padding,
            dilation=pair(module.dilation, rank, 1),
            groups=groups,
            transposed=transposed,
        )

    return linear_map


def _gain_of_channels(module: Any, gain: Tensor, shape: Sequence[int]) -> Tensor | None:
    if gain.dim() == 0:
        return gain
    return gain.flatten().expand(shape[0]) if is_per_channel(gain) else None


def _along_channels(module: Any, gain: Tensor) -> bool:
    return is_per_channel(gain)


def _scaled_convolution(transposed: bool) -> Callable[[Any, Tensor, Tensor], Tensor]:
    def scaled(module: Any, gain: Tensor, out_gain: Tensor) -> Tensor:
        # In place on a copy of its own: the largest layers decide how much memory conversion takes.
        weight: Tensor = module.weight.detach().to(torch.float64, copy=True)
        gain, out_gain = gain.to(weight.device), out_gain.flatten().to(weight.device)
        spatial = [1] * (weight.dim() - 2)
        groups = module.groups
        inputs = gain.flatten().expand(module.in_channels).view(groups, -1)
        outputs = out_gain.expand(module.out_channels).view(groups, -1)
        first, second = (inputs, outputs) if transposed else (outputs, inputs)
        by_group = weight.unflatten(0, (groups, -1))
        by_group.mul_(first.view(groups, -1, 1, *spatial)).mul_(second.view(groups, 1, -1, *spatial))
        return weight

    return scaled


def _bias_of_channels(module: Any) -> tuple[int, ...]:
    return (module.out_channels, *[1] * (module.weight.dim() - 2))


def _convolution_with_bias(rank: int) -> Callable[[Any, Tensor, Tensor], Tensor]:
    function = (F.conv1d, F.conv2d, F.conv3d)[rank - 1]

    def convolve(module: Any, x: Tensor, bias: Tensor) -> Tensor:
        padding = module.padding
        if module.padding_mode != "zeros":
            x = F.pad(x, module._reversed_padding_repeated_twice, mode=module.padding_mode)
            padding = 0
        return function(x, module.weight, bias, module.stride, padding, module.dilation, module.groups)

    return convolve


def _convolution(kind: Any, rank: int, functions: Sequence[Any], transposed: bool = False) -> Operator:
    return Operator(
        role=Role.SYNAPSE,
        how=_WEIGHTED,
        functions={_build_convolution(kind, transposed): functions},
        spell=spell_space(rank),
        rank=rank,
        settings=_convolution_settings(rank, transposed),
        rebuild=_without_data,
        check=_check_convolution(transposed),
        relate=_relate_convolution(transposed),
        form=as_convolution(_convolution_as_map(rank, transposed)),
        gain=IntoWeights(
            _gain_of_channels,
            _along_channels,
            _scaled_convolution(transposed),
            _bias_of_channels,
            output_dim=1 if transposed else 0,
            with_bias=None if transposed else _convolution_with_bias(rank),
        ),
    )


# Linear layers


def _build_linear(append: Append, input: Value, weight: Any, bias: Any = None) -> Value:
    _check_constant(weight, bias)
    module = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    return append(_with_weights(module, weight, bias), input)


def _build_matmul(append: Append, input: Any, other: Any) -> Value:
    if isinstance(input, Value) and isinstance(other, Value):
        raise Refusal(ATTENTION)
    if not isinstance(input, Value):
        return from_left(append, input, other)
    if other.dim() == 1 and input.tensor.dim() > 2:
        return append(Reshape(input.tensor.shape[1:-1]), _build_linear(append, input, other.view(1, -1)))
    if other.dim() != 2:
        raise Refusal("write it as x @ weight, or as nn.Linear")
    return _build_linear(append, input, other.t())


def _build_product(append: Append, input: Value, mat2: Any) -> Value:
    """Product with a matrix for each image of a batch, which has to be one matrix."""
    _check_constant(mat2)
    if mat2.dim() == 3 and not bool((mat2 == mat2[:1]).all()):
        raise Refusal("its matrices differ from image to image of a batch; multiply by one matrix")
    return _build_matmul(append, input, mat2[0] if mat2.dim() == 3 else mat2)


def _build_sum_with_product(
    append: Append, input: Any, first: Any, second: Any, *, beta: float = 1, alpha: float = 1
) -> Value:
    if not isinstance(first, Value):
        raise Refusal("it multiplies by activations from the right; write it as x @ weight, or as nn.Linear")
    product = scaled(append, _build_product(append, first, second), alpha)
    return _build_sum(append, product, input, alpha=beta)


def _relate_linear(relation: Relation, module: Any, place: int, shapes: Sequence[Sequence[int]]) -> None:
    relation.connect_all(module.out_features)


def _linear_as_map(module: Any, shape: Shape3, out_shape: torch.Size) -> LinearMap | None:
    weight = module.weight.detach()
    if len(out_shape) != 1 or weight.shape[1] != math.prod(shape):
        return None
    return LinearMap(weight=weight.view(-1, *shape))


def _gain_of_features(module: Any, gain: Tensor, shape: Sequence[int]) -> Tensor | None:
    if gain.dim() == 0:
        return gain
    if any(size != 1 for size in gain.shape[:-1]):
        return None
    return gain.flatten().expand(shape[-1])


def _along_features(module: Any, gain: Tensor) -> bool:
    return gain.dim() <= 1


def _scaled_linear(module: Any, gain: Tensor, out_gain: Tensor) -> Tensor:
    # In place on a copy of its own: the largest layers decide how much memory conversion takes.
    weight: Tensor = module.weight.detach().to(torch.float64, copy=True)
    gain, out_gain = gain.to(weight.device), out_gain.flatten().to(weight.device)
    return weight.mul_(gain).mul_(out_gain.view(-1, 1))


def _bias_of_features(module: Any) -> tuple[int, ...]:
    return (module.out_features,)


def _linear_with_bias(module: Any, x: Tensor, bias: Tensor) -> Tensor:
    return F.linear(x, module.weight, bias)


_LINEAR = Operator(
    role=Role.SYNAPSE,
    how=_WEIGHTED,
    functions={
        _build_linear: [F.linear],
        build_einsum: [torch.einsum],
        _build_matmul: [torch.matmul, operator.matmul, "matmul"],
        _build_product: [torch.bmm, "bmm"],
        _build_sum_with_product: [torch.addmm, torch.baddbmm],
    },
    settings={"in_features": whole(1), "out_features": whole(1)},
    rebuild=_without_data,
    relate=_relate_linear,
    form=as_convolution(_linear_as_map, takes_flattened=True),
    gain=IntoWeights(
        _gain_of_features, _along_features, _scaled_linear, _bias_of_features, with_bias=_linear_with_bias
    ),
)


# One synapse a unit, and sums


def _rebuild_one_to_one(kind: Any, settings: dict[str, Any], weights: Mapping[str, Tensor]) -> nn.Module:
    module: nn.Module = kind(weights["weight"])
    return module


def _check_one_to_one(module: Any, sources: Sequence[Tensor]) -> None:
    (value,) = sources
    weight = module.weight
    if weight.dim() >= value.dim() or torch.broadcast_shapes(weight.shape, value.shape) != value.shape:
        raise ValueError(f"its weights are of shape {list(weight.shape)}")


def _one_to_one_as_map(module: Any, shape: Shape3, out_shape: torch.Size) -> LinearMap | None:
    weight, channels = module.weight.detach(), shape[0]
    by_channel = weight.dim() == len(out_shape) and weight.numel() == weight.shape[0] == channels
    if weight.numel() != 1 and not by_channel:
        return None
    return LinearMap(weight=weight.reshape(-1, 1, 1, 1).expand(channels, 1, 1, 1), groups=channels)


_ONE_TO_ONE = Operator(
    role=Role.SYNAPSE,
    how="one synapse a unit, where no weights that are there take up a scale",
    settings={},
    rebuild=_rebuild_one_to_one,
    check=_check_one_to_one,
    relate=changes_no_relation,
    form=as_convolution(_one_to_one_as_map),
    gain=None,
)


def _build_sum(append: Append, input: Any, other: Any, *, alpha: float = 1) -> Value:
    if isinstance(input, Value) and isinstance(other, Value):
        one, other = broadcast(append, [input, scaled(append, other, alpha)])
        return append(Add(), one, other)
    if isinstance(input, Value):
        return shifted(append, input, other * alpha)
    return shifted(append, scaled(append, other, alpha), input)


def _build_difference(append: Append, input: Any, other: Any, *, alpha: float = 1) -> Value:
    return _build_sum(append, input, other, alpha=-alpha)


def _check_sum(module: Any, sources: Sequence[Tensor]) -> None:
    if any(source.shape != sources[0].shape for source in sources):
        raise ValueError("they are added, and differ")


_ADD = Operator(
    role=Role.SYNAPSE,
    how="currents add; scales are met by weights, times by delays",
    functions={
        _build_sum: [operator.add, operator.iadd, torch.add, "add", "add_"],
        _build_difference: [operator.sub, operator.isub, torch.sub, "sub", "sub_"],
    },
    in_place=[operator.iadd, operator.isub, "add_", "sub_"],
    inputs=range(2, MOST),
    settings={},
    check=_check_sum,
    relate=changes_no_relation,
    form=sum_of_terms,
    gain=Summed(),
    keeps_sign=True,
)

ROWS: Rows = {
    nn.Conv1d: _convolution(nn.Conv1d, 1, [F.conv1d, torch.conv1d]),
    nn.Conv2d: _convolution(nn.Conv2d, 2, [F.conv2d, torch.conv2d]),
    nn.Conv3d: _convolution(nn.Conv3d, 3, [F.conv3d, torch.conv3d]),
    nn.ConvTranspose3d: _convolution(nn.ConvTranspose3d, 3, [F.conv_transpose3d], transposed=True),
    nn.ConvTranspose1d: _convolution(nn.ConvTranspose1d, 1, [F.conv_transpose1d], transposed=True),
    nn.ConvTranspose2d: _convolution(nn.ConvTranspose2d, 2, [F.conv_transpose2d], transposed=True),
    nn.Linear: _LINEAR,
    Add: _ADD,
}

WEIGHTED: tuple[Any, ...] = tuple(kind for kind, row in ROWS.items() if isinstance(row.gain, IntoWeights))
"""Modules whose weights mix units."""

EMITTED: Rows = {OneToOne: _ONE_TO_ONE}
"""Rows of modules that conversion alone makes."""

__all__ = ["EMITTED", "ROWS", "WEIGHTED"]
