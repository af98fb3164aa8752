"""ATen's operations, which exported programs are made of, as the functions of torch that users call.

The table of operators has rows for torch's functions and methods. An overload of ATen (``aten.add.Tensor``) mostly has
the name of such a function and takes the same arguments in the same order; those that differ are listed here.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx
from torch.nn import functional as F

from quartz_plugin.operators.table import FUNCTIONS, REASONS, SHAPE_QUERIES

Call = tuple[Any, tuple[Any, ...], dict[str, Any]]
"""A function, or the name of a method, and its arguments."""

_NO_END = 2**63 - 1


def spell_as_torch(graph: fx.Graph) -> None:
    """Let every call of an ATen operation in a graph be one of a function or method of torch, in place."""
    _erase_checks(graph)
    for node in list(graph.nodes):
        if not _is_of_aten(node):
            continue
        name = _name(node.target)
        arguments = _SIGNATURES.get(name, _in_their_order(name))
        try:
            target, args, kwargs = arguments(node, *node.args, **node.kwargs)
        except (TypeError, ValueError):
            # Arguments that are not listed here: it stays what it is, and is refused by its name.
            continue
        node.op = "call_method" if isinstance(target, str) else "call_function"
        node.target, node.args, node.kwargs = target, args, kwargs


def _is_of_aten(node: fx.Node) -> bool:
    return node.op == "call_function" and isinstance(node.target, torch._ops.OpOverload)


def _erase_checks(graph: fx.Graph) -> None:
    """Erase assertions, and whatever is computed for them alone."""
    for node in reversed(list(graph.nodes)):
        idle = _is_of_aten(node) and not node.users
        if idle and (_name(node.target) in _CHECKS or not node.target._schema.is_mutable):
            graph.erase_node(node)


def _name(overload: Any) -> str:
    """Name of an operation, without its home and the kind of its arguments."""
    name: str = overload._schema.name.partition("::")[2]
    return name


def _in_their_order(name: str) -> Callable[..., Call]:
    def call(node: fx.Node, *args: Any, **kwargs: Any) -> Call:
        return counterpart(name), args, kwargs

    return call


def counterpart(name: str) -> Any:
    """Return torch's function or method of this name: one that the table knows, where there is one.

    Examples
    --------
    >>> counterpart("relu") is torch.relu, counterpart("view")
    (True, 'view')
    """
    functions = [getattr(home, name) for home in (torch, F) if hasattr(home, name)]
    spellings = [*functions, *([name] if hasattr(torch.Tensor, name) else [])]
    for known in (FUNCTIONS, REASONS, SHAPE_QUERIES):
        for spelling in spellings:
            if spelling in known:
                return spelling
    return spellings[0] if spellings else getattr(torch.ops.aten, name)


def _as(target: Any) -> Callable[..., Call]:
    """The same arguments in the same order, for a function of another name."""

    def call(node: fx.Node, *args: Any, **kwargs: Any) -> Call:
        return target, args, kwargs

    return call


def _in_place(target: Any) -> Callable[..., Call]:
    """A function that is asked by an argument to write what it gives into its input."""

    def call(node: fx.Node, *args: Any, **kwargs: Any) -> Call:
        return target, args, {**kwargs, "inplace": True}

    return call


def _without_options(target: Any) -> Callable[..., Call]:
    """The input alone: how its copy lies in memory is nobody's business."""

    def call(node: fx.Node, input: Any, *args: Any, **kwargs: Any) -> Call:
        return target, (input,), {}

    return call


def _first_of(target: Any, indices: bool = False) -> Callable[..., Call]:
    """A function whose other results nobody asks for: what picks the first of them is left out."""

    def call(node: fx.Node, *args: Any, **kwargs: Any) -> Call:
        others = False
        for user in list(node.users):
            if user.target is not operator.getitem:
                continue
            if user.args[1] == 0:
                user.replace_all_uses_with(node)
            if user.users:
                others = True
            else:
                node.graph.erase_node(user)
        return target, args, {**kwargs, **({"return_indices": True} if indices and others else {})}

    return call


def _batch_norm(node: fx.Node, input: Any, weight: Any, bias: Any, mean: Any, variance: Any, *settings: Any) -> Call:
    training, momentum, eps = settings[:3]
    return F.batch_norm, (input, mean, variance, weight, bias, training, momentum, eps), {}


def _batch_norm_in_eval_mode(node: fx.Node, input: Any, *others: Any) -> Call:
    _first_of(F.batch_norm)(node)
    *tensors, momentum, eps = others
    return _batch_norm(node, input, *tensors, False, momentum, eps)


def _convolution(node: fx.Node, input: Any, weight: Any, bias: Any, *settings: Any) -> Call:
    stride, padding, dilation, transposed, output_padding, groups = settings
    function = getattr(F, f"conv{'_transpose' if transposed else ''}{len(stride)}d")
    named = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    return function, (input, weight, bias), named | ({"output_padding": output_padding} if transposed else {})


def _linear_with_bias_first(node: fx.Node, bias: Any, input: Any, weight: Any) -> Call:
    with node.graph.inserting_before(node):
        turned = node.graph.call_method("t", (weight,))
    turned.meta = dict(node.meta)
    return F.linear, (input, turned, bias), {}


def _slice(node: fx.Node, input: Any, dim: int = 0, start: Any = None, end: Any = None, step: int = 1) -> Call:
    whole = start in (None, 0) and end in (None, _NO_END) and step == 1
    return _getitem(input, dim, slice(None) if whole else slice(start, None if end == _NO_END else end, step))


def _select(node: fx.Node, input: Any, dim: int, index: int) -> Call:
    return _getitem(input, dim, index)


def _getitem(input: Any, dim: int, part: Any) -> Call:
    index = (slice(None),) * dim + (part,) if dim >= 0 else (Ellipsis, part) + (slice(None),) * (-dim - 1)
    return operator.getitem, (input, index), {}


def _nearest(mode: str) -> Callable[..., Call]:
    def call(node: fx.Node, input: Any, size: Any, *scales: Any) -> Call:
        factors = scales[0] if len(scales) == 1 and isinstance(scales[0], list | tuple) else scales
        factors = tuple(factor for factor in factors if factor is not None)
        return F.interpolate, (input, None if factors else size, factors or None, mode), {}

    return call


def _interpolated(mode: str) -> Callable[..., Call]:
    def call(node: fx.Node, input: Any, size: Any, align_corners: bool, *scales: Any) -> Call:
        function, arguments, _ = _nearest(mode)(node, input, size, *scales)
        return function, (*arguments, align_corners), {}

    return call


def _softmax(target: Any) -> Callable[..., Call]:
    def call(node: fx.Node, input: Any, dim: int, half_to_float: bool) -> Call:
        return target, (input, dim), {}

    return call


def _pad(mode: str) -> Callable[..., Call]:
    def call(node: fx.Node, input: Any, pad: Any, *value: Any) -> Call:
        return F.pad, (input, pad, mode, *value), {}

    return call


def _viewed_as(node: fx.Node, input: Any, other: Any) -> Call:
    return "reshape", (input, (-1, *node.meta["val"].shape[1:])), {}


def _subtracted_from(node: fx.Node, input: Any, other: Any) -> Call:
    return torch.sub, (other, input), {}


def _converted(node: fx.Node, input: Any, *args: Any, dtype: Any = None, device: Any = None, **options: Any) -> Call:
    given = [*args[:2], dtype, device]
    wanted = [each for each in given if isinstance(each, torch.dtype | torch.device)]
    return ("to", (input, *wanted[:1]), {}) if wanted else ("contiguous", (input,), {})


def _expanded(node: fx.Node, input: Any, sizes: Any, implicit: bool = False) -> Call:
    return "expand", (input, *sizes), {}


_CHECKS = frozenset(
    {
        "_assert_tensor_metadata",
        "_assert_scalar",
        "_assert_async",
        "sym_constrain_range",
        "sym_constrain_range_for_size",
    }
)
"""Operations that compute nothing."""

_WITH_INPLACE = (
    *("relu", "relu6", "hardtanh", "elu", "selu", "celu"),
    *("leaky_relu", "silu", "mish", "hardswish", "hardsigmoid"),
)

_SIGNATURES: dict[str, Callable[..., Call]] = {
    "addmm": _linear_with_bias_first,
    "mm": _as(torch.matmul),
    "convolution": _convolution,
    "batch_norm": _batch_norm,
    "_native_batch_norm_legit_no_training": _batch_norm_in_eval_mode,
    **dict.fromkeys(("_unsafe_view", "view_copy", "_reshape_copy"), _as("reshape")),
    **{f"{name}_": _in_place(getattr(F, name)) for name in _WITH_INPLACE},
    "special_erf": _as(torch.erf),
    "view_as": _viewed_as,
    "slice": _slice,
    "select": _select,
    **{name: _as(torch.split) for name in ("split_with_sizes", "split_copy", "split_with_sizes_copy")},
    **{f"max_pool{rank}d_with_indices": _first_of(getattr(F, f"max_pool{rank}d"), True) for rank in (1, 2, 3)},
    **{f"adaptive_max_pool{r}d": _first_of(getattr(F, f"adaptive_max_pool{r}d"), True) for r in (1, 2, 3)},
    **{f"_adaptive_avg_pool{rank}d": _as(getattr(F, f"adaptive_avg_pool{rank}d")) for rank in (2, 3)},
    **{f"upsample_nearest{rank}d": _nearest("nearest") for rank in (1, 2, 3)},
    **{f"_upsample_nearest_exact{rank}d": _nearest("nearest-exact") for rank in (1, 2, 3)},
    "upsample_bilinear2d": _interpolated("bilinear"),
    "upsample_bicubic2d": _interpolated("bicubic"),
    "_softmax": _softmax(torch.softmax),
    "_log_softmax": _softmax(torch.log_softmax),
    "linalg_vector_norm": _as(torch.linalg.vector_norm),
    "linalg_norm": _as(torch.linalg.norm),
    **dict.fromkeys(("log_sigmoid", "log_sigmoid_forward"), _first_of(F.logsigmoid)),
    "constant_pad_nd": _pad("constant"),
    **{f"reflection_pad{rank}d": _pad("reflect") for rank in (1, 2, 3)},
    **{f"replication_pad{rank}d": _pad("replicate") for rank in (1, 2, 3)},
    "rsub": _subtracted_from,
    "im2col": _as(F.unfold),
    **dict.fromkeys(("to", "_to_copy"), _converted),
    **dict.fromkeys(("alias", "detach_", "lift_fresh", "lift_fresh_copy"), _without_options("contiguous")),
    "expand": _expanded,
    "dropout_": _as(F.dropout),
    **dict.fromkeys(("feature_dropout", "feature_dropout_"), _as(F.dropout2d)),
    **dict.fromkeys(("alpha_dropout_", "feature_alpha_dropout", "feature_alpha_dropout_"), _as(F.alpha_dropout)),
    "_local_scalar_dense": _as("item"),
    "sym_size": _as("size"),
    "sym_numel": _as("numel"),
    "sym_stride": _as("stride"),
}
"""Operations that have another name than torch's function, or take their arguments in another order."""

__all__ = ["counterpart", "spell_as_torch"]
