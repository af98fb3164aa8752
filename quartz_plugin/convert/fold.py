"""Stage 2, fold: batch norm, dropout and preprocessing disappear into their neighbours."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, fx, nn

from quartz_plugin.convert.draft import Draft
from quartz_plugin.convert.operators import Affine, Role, role_of
from quartz_plugin.graph import unique_name

Preprocessing = tuple[Sequence[float] | Tensor | float, Sequence[float] | Tensor | float]


def fold(draft: Draft, preprocessing: Preprocessing | None = None) -> Draft:
    """Drop what does nothing, fold batch norms, put preprocessing in front, and pools behind their ReLU.

    The network computes the same as before; only ``preprocessing`` changes what its input means.

    Raises
    ------
    ValueError
        If `preprocessing` does not fit the input or has a standard deviation of 0.
    """
    for node, module in draft.steps():
        if role_of(module) is Role.NOTHING:
            draft.log(str(node.target), became=Role.NOTHING.value, exact="exact")
            draft.remove(node)
    for node, module in draft.steps():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            _fold_batch_norm(draft, node, module)
    _move_pools_behind_relus(draft)
    _drop_repeated_relus(draft)
    _move_last_relu_to_the_end(draft)
    if preprocessing is not None:
        _prepend(draft, preprocessing)
    draft.module.graph.lint()
    draft.module.recompile()
    return draft


def _fold_batch_norm(draft: Draft, node: fx.Node, norm: nn.BatchNorm1d | nn.BatchNorm2d) -> None:
    assert norm.running_mean is not None
    assert norm.running_var is not None
    mean, variance = norm.running_mean.double(), norm.running_var.double()
    weight = torch.rsqrt(variance + norm.eps)
    if norm.weight is not None:
        weight = weight * norm.weight.detach().double()
    bias = -mean * weight
    if norm.bias is not None:
        bias = bias + norm.bias.detach().double()

    source = node.all_input_nodes[0]
    before = None if source.op == "placeholder" else draft.module.get_submodule(str(source.target))
    if isinstance(before, nn.Conv1d | nn.Conv2d | nn.Linear) and (
        not isinstance(before, nn.Linear) or len(source.meta["shape"]) == 1
    ):
        out_first = [-1] + [1] * (before.weight.dim() - 1)
        dtype = before.weight.dtype
        old_bias = 0.0 if before.bias is None else before.bias.detach().double()
        before.weight = nn.Parameter((before.weight.detach().double() * weight.view(out_first)).to(dtype))
        before.bias = nn.Parameter((old_bias * weight + bias).to(dtype))
        draft.log(str(node.target), became=f"folded into {source.target}", exact="exact")
        draft.remove(node)
        return
    shape = (-1, *[1] * (len(source.meta["shape"] if source.meta else draft.input_shape) - 1))
    dtype = norm.running_mean.dtype
    draft.replace(node, Affine(weight.view(shape).to(dtype), bias.view(shape).to(dtype)))
    draft.log(str(node.target), became="folded into the synapses that follow", exact="exact")


def _move_pools_behind_relus(draft: Draft) -> None:
    """``relu(maxpool(x)) = maxpool(relu(x))``: let the neurons fire first, then the first spike win."""
    for node, module in draft.steps():
        if role_of(module) is not Role.RECTIFIER:
            continue
        first_pool, behind = None, node.all_input_nodes[0]
        while behind.op == "call_module" and _role(draft, behind) in (Role.MAX_POOL, Role.ROUTE):
            if _role(draft, behind) is Role.MAX_POOL:
                first_pool = behind
            behind = behind.all_input_nodes[0]
        if first_pool is None:
            continue
        draft.log(str(first_pool.target), moved=True)
        _move_in_front(draft, node, first_pool)


def _drop_repeated_relus(draft: Draft) -> None:
    """Drop a ReLU of values that are not negative anyway: spikes of other neurons."""
    for node, module in draft.steps():
        if role_of(module) is not Role.RECTIFIER:
            continue
        source = node.all_input_nodes[0]
        while source.op == "call_module" and _role(draft, source) in (Role.MAX_POOL, Role.ROUTE):
            source = source.all_input_nodes[0]
        if source.op == "call_module" and _role(draft, source) is Role.RECTIFIER:
            draft.log(str(node.target), became="dropped: its input is never negative", exact="exact")
            draft.remove(node)


def _move_last_relu_to_the_end(draft: Draft) -> None:
    """A last ReLU is the output layer: whatever merely routes its values goes in front of it."""
    steps = draft.steps()
    trailing = []
    for node, module in reversed(steps):
        if role_of(module) is Role.ROUTE:
            trailing.append(node)
            continue
        if role_of(module) is Role.RECTIFIER and trailing:
            path, relu = str(node.target), module
            draft.remove(node)
            last = trailing[0]
            with draft.module.graph.inserting_after(last):
                moved = draft.module.graph.call_module(path, (last,))
            draft.module.set_submodule(path, relu)
            _insert_behind(last, moved)
            moved.meta["shape"] = last.meta["shape"]
        return


def _prepend(draft: Draft, preprocessing: Preprocessing) -> None:
    first = draft.steps()[0][0] if draft.steps() else None
    channels = draft.input_shape[0] if draft.input_shape else 0
    try:
        mean, std = (torch.as_tensor(value, dtype=torch.float64).flatten() for value in preprocessing)
    except (TypeError, ValueError) as error:
        raise ValueError(f"preprocessing must be (mean, std), got {preprocessing!r}") from error
    for what, value in (("mean", mean), ("std", std)):
        if value.numel() not in (1, channels) or not bool(torch.isfinite(value).all()):
            raise ValueError(
                f"preprocessing: {what} must be 1 or {channels} finite numbers (one a channel), got {value.tolist()}"
            )
    if bool((std <= 0).any()):
        raise ValueError(f"preprocessing: std must be positive, got {std.tolist()}")
    if first is None:
        return
    shape = (-1, *[1] * (len(draft.input_shape) - 1))
    like = torch.zeros((), dtype=draft.dtype, device=draft.device)
    path = unique_name("preprocessing", draft.names())
    draft.module.add_submodule(path, Affine((1 / std).view(shape).to(like), (-mean / std).view(shape).to(like)))
    source = first.all_input_nodes[0]
    with draft.module.graph.inserting_after(source):
        node = draft.module.graph.call_module(path, (source,))
    _insert_behind(source, node)
    node.meta["shape"] = draft.input_shape
    draft.log(path, operation="(x - mean) / std", became="folded into the synapses that follow", exact="exact")


def _role(draft: Draft, node: fx.Node) -> Role:
    return role_of(draft.module.get_submodule(str(node.target)))


def _move_in_front(draft: Draft, node: fx.Node, target: fx.Node) -> None:
    """Move a shape-preserving node so that it acts on the input of `target`."""
    source = target.all_input_nodes[0]
    draft.remove(node)
    with draft.module.graph.inserting_before(target):
        moved = draft.module.graph.call_module(str(node.target), (source,))
    target.replace_input_with(source, moved)
    moved.meta["shape"] = source.meta.get("shape", draft.input_shape)


def _insert_behind(source: fx.Node, node: fx.Node) -> None:
    """Let all users of `source` but `node` use `node`."""
    source.replace_all_uses_with(node, delete_user_cb=lambda user: user is not node)
