"""Stage 2, fold: what does nothing disappears, the rest moves to where spikes can carry it out."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from quartz_plugin import checks
from quartz_plugin.activation import TTFSActivation
from quartz_plugin.config import ConversionConfig, Linear, Preprocessing
from quartz_plugin.convert.signed_pools import encode_signed_values, entrance, give_each_pool_its_border
from quartz_plugin.convert.traced import FoldedNetwork, TracedNetwork
from quartz_plugin.operators.gains import IntoWeights
from quartz_plugin.operators.modules import Add
from quartz_plugin.operators.table import (
    DROPOUTS,
    NORMS,
    Affine,
    ConversionError,
    Role,
    adds,
    ceiling_of,
    has_weights,
    keeps_sign,
    norm_as_affine,
    row_of,
)


def fold(
    traced: TracedNetwork,
    preprocessing: Preprocessing | None = None,
    linear: Linear = ConversionConfig.linear,
    *,
    trainable: bool = False,
) -> FoldedNetwork:
    """Drop what does nothing, fold batch norms, put preprocessing in front, and pools behind their ReLU.

    The network computes the same as before; only ``preprocessing`` changes what its input means. Signed values that
    are pooled get neurons of their own. With ``linear="pair"``, a signed value that feeds on is split into its two
    halves, each a layer of neurons.

    A `trainable` network keeps its batch norms and dropout.

    Raises
    ------
    ConversionError
        If a TTFSActivation stands where no neurons can encode its values, or a border of minus infinity where no max
        pool leaves it out.
    ValueError
        If `preprocessing` does not fit the input or has a standard deviation of 0.
    """
    network = FoldedNetwork(**vars(traced))
    input_quantizer, output_quantizer = _take_quantizers(network)
    for node, module in network.steps():
        if network.role_at(node) is Role.NOTHING and not (trainable and isinstance(module, DROPOUTS)):
            network.log(str(node.target), became=Role.NOTHING.value, exact="exact")
            network.remove(node)
    if preprocessing is not None:
        # First of all: what is normalised is no longer the input's spikes.
        _normalise_inputs(network, preprocessing)
    give_each_pool_its_border(network)
    for node, module in network.steps():
        if isinstance(module, NORMS):
            node = _in_front_of_pools(network, node, module)
            if not trainable:
                _fold_batch_norm(network, node, module)
    moved = _move_pools_behind_relus(network)
    _give_sums_neurons_before_pools(network)
    _drop_repeated_relus(network)
    _drop_relus_before_bounds(network)
    _move_last_relu_to_the_end(network)
    shifted = encode_signed_values(network)
    pairs = _split_into_pairs(network) if linear == "pair" else {}
    network.module.graph.eliminate_dead_code()
    network.module.delete_all_unused_submodules()
    network.module.graph.lint()
    network.module.recompile()
    return replace(
        network,
        pairs=pairs,
        moved=moved,
        shifted=shifted,
        input_quantizer=input_quantizer,
        output_quantizer=output_quantizer,
    )


def _take_quantizers(network: TracedNetwork) -> tuple[TTFSActivation | None, TTFSActivation | None]:
    """Take the activations of input and output, which no layer of neurons stands for, out of a trained network."""
    input_quantizer = output_quantizer = None
    source = network.input
    if len(source.users) == 1:
        (first,) = source.users
        code = network.module_at(first) if first.op == "call_module" else None
        if isinstance(code, TTFSActivation) and first is not network.last:
            if code.signed or not bool((code.scale == 1).all()):
                raise ConversionError(
                    f"cannot convert {first.target!r}: the input's TTFSActivation must be of scale 1 and not signed"
                )
            input_quantizer = code
            network.log(str(first.target), became="the input's rounding", exact="exact")
            network.remove(first)
    code = network.module_at(network.last) if network.steps() else None
    if isinstance(code, TTFSActivation) and code.signed:
        output_quantizer = code
        network.log(str(network.last.target), became="the output's rounding", exact="exact with hold")
        network.remove(network.last)
    for node, module in network.steps():
        if isinstance(module, TTFSActivation) and module.signed:
            raise ConversionError(
                f"cannot convert {node.target!r}: no neurons inside a network encode signed values; use signed=False"
            )
    return input_quantizer, output_quantizer


def _in_front_of_pools(network: TracedNetwork, node: fx.Node, norm: _BatchNorm) -> fx.Node:
    """Move a batch norm of positive weights in front of pooling of signed values: the largest stays the largest."""
    pool = node.all_input_nodes[0]
    while network.role_at(pool) is Role.MAX_POOL and len(pool.users) == 1 and bool((_affine(norm)[0] > 0).all()):
        user, source = entrance(network, pool)
        if source in network.spikes():
            break
        network.remove(node)
        node = network.insert(str(node.target), norm, source, network.shape_at(source))
        user.replace_input_with(source, node)
        pool = source
    return node


def _affine(norm: _BatchNorm) -> tuple[Tensor, Tensor]:
    assert norm.running_mean is not None
    assert norm.running_var is not None
    return norm_as_affine(norm.running_mean, norm.running_var, norm.weight, norm.bias, norm.eps)


def _fold_batch_norm(network: TracedNetwork, node: fx.Node, norm: _BatchNorm) -> None:
    gain, shift = _affine(norm)
    source = node.all_input_nodes[0]
    before: Any = None if source.op == "placeholder" else network.module_at(source)
    shape, dtype = network.shape_at(source), network.dtype
    channels_first = (-1, *[1] * (len(shape) - 1))
    row = None if before is None else row_of(before)
    weights = row.gain if row is not None and isinstance(row.gain, IntoWeights) else None
    if weights is not None and len(source.users) == 1 and weights.along_outputs(before, gain.view(channels_first)):
        weight = weights.scaled(before, torch.ones((), dtype=torch.float64), gain)
        old_bias = 0.0 if before.bias is None else before.bias.detach().double()
        before.weight = nn.Parameter(weight.to(dtype), requires_grad=False)
        before.bias = nn.Parameter((old_bias * gain + shift).to(dtype), requires_grad=False)
        network.log(str(node.target), became=f"folded into {source.target}", exact="exact")
        network.remove(node)
        return
    network.replace(node, Affine(gain.view(channels_first).to(dtype), shift.view(channels_first).to(dtype)))
    network.log(str(node.target), became="folded into the synapses that follow", exact="exact")


def _move_pools_behind_relus(network: TracedNetwork) -> frozenset[str]:
    """``relu(maxpool(x)) = maxpool(relu(x))``: let the neurons fire first, then the first spike win.

    Returns the paths of those pools.
    """
    behind: set[str] = set()
    for node, relu in network.steps():
        if network.role_at(node) is not Role.RECTIFIER:
            continue
        region, edges = _pooled_region(network, node)
        pools = [pool for pool in region if network.role_at(pool) is Role.MAX_POOL]
        if not pools:
            continue
        path = str(node.target)
        network.remove(node)
        for count, (source, user) in enumerate(dict.fromkeys(edges)):
            moved = network.insert(path, relu if count == 0 else copy.deepcopy(relu), source, network.shape_at(source))
            user.replace_input_with(source, moved)
            network.report.setdefault(str(moved.target), network.report[path] | {"module": str(moved.target)})
        behind.update(str(pool.target) for pool in pools)
    return frozenset(behind)


def _pooled_region(network: TracedNetwork, relu: fx.Node) -> tuple[set[fx.Node], list[tuple[fx.Node, fx.Node]]]:
    """Max pools and routing of signed values right in front of a ReLU and for it alone, and the edges into them."""
    if network.role_at(relu.all_input_nodes[0]) not in (Role.MAX_POOL, Role.ROUTE):
        return set(), []
    spikes = network.spikes()
    region: set[fx.Node] = set()
    edges: list[tuple[fx.Node, fx.Node]] = []
    pending = [relu]
    while pending:
        user = pending.pop()
        for source in user.all_input_nodes:
            passes_on = network.role_at(source) in (Role.MAX_POOL, Role.ROUTE) and source not in spikes
            if not passes_on or not (region | {relu}).issuperset(source.users):
                edges.append((source, user))
            elif source not in region:
                region.add(source)
                pending.append(source)
    # Another way into the region may have shown that a source is for the ReLU alone after all.
    return region, [(source, user) for source, user in edges if source not in region]


def _give_sums_neurons_before_pools(network: TracedNetwork) -> None:
    """A first spike encodes the largest of several values only if one spike encodes each: sums get neurons first."""
    spikes, positive = network.spikes(), _never_negative(network)
    for node, module in network.steps():
        if network.role_at(node) is not Role.MAX_POOL:
            continue
        user, source = entrance(network, node)
        if source not in spikes and source in positive:
            neurons = network.insert(f"{node.target}_neurons", nn.ReLU(), source, network.shape_at(source))
            network.log(str(neurons.target), operation=f"neurons for {type(module).__name__}")
            user.replace_input_with(source, neurons)


def _never_negative(network: TracedNetwork) -> set[fx.Node]:
    """Nodes whose values cannot be negative: spikes, and what is averaged or added of such."""
    positive = network.spikes()
    for node, module in network.steps():
        if keeps_sign(module) and positive.issuperset(node.all_input_nodes):
            positive.add(node)
    return positive


def _drop_repeated_relus(network: TracedNetwork) -> None:
    """Drop a ReLU of values that are spikes anyway, and so are not negative."""
    spikes = network.spikes()
    for node, module in network.steps():
        if network.role_at(node) is not Role.RECTIFIER or isinstance(module, TTFSActivation):
            continue
        # A dropped one's input is a node of spikes as well, so they stay the ones that were found.
        if ceiling_of(module) is None and node.all_input_nodes[0] in spikes:
            network.log(str(node.target), became="dropped: its input is never negative", exact="exact")
            network.remove(node)


def _drop_relus_before_bounds(network: TracedNetwork) -> None:
    """Drop a ReLU whose values only go on to be clipped between 0 and a bound."""
    for node, module in network.steps():
        source = node.all_input_nodes[0]
        if ceiling_of(module) is None or network.role_at(source) is not Role.RECTIFIER or len(source.users) > 1:
            continue
        relu = network.module_at(source)
        if ceiling_of(relu) is None and not isinstance(relu, TTFSActivation):
            network.log(str(source.target), became=f"dropped: its values are clipped by {node.target}", exact="exact")
            network.remove(source)


def _move_last_relu_to_the_end(network: TracedNetwork) -> None:
    """A last ReLU is the output layer: whatever merely routes its values goes in front of it."""
    node, trailing = network.last, []
    while network.role_at(node) is Role.ROUTE and len(node.users) == 1 and len(node.all_input_nodes) == 1:
        trailing.append(node)
        node = node.all_input_nodes[0]
    if network.role_at(node) is not Role.RECTIFIER or len(node.users) > 1 or not trailing:
        return
    path, relu, last = str(node.target), network.module_at(node), trailing[0]
    network.remove(node)
    _insert_behind(last, network.insert(path, relu, last, network.shape_at(last)))


def _normalise_inputs(network: TracedNetwork, preprocessing: Any) -> None:
    """Normalise every input as the ANN expects it; of several inputs there is a pair, or None, for each."""
    parts = network.inputs.parts
    each = preprocessing if isinstance(preprocessing, list) else [preprocessing]
    if len(each) != len(parts):
        raise ValueError(f"preprocessing must be a list of {len(parts)} pairs (mean, std), one for each input, or None")
    for place, (part, own) in enumerate(zip(parts, each, strict=True)):
        node = network.input
        if place in network.unpacked:
            path = network.unpacked[place]
            node = next(step for step, _ in network.steps() if str(step.target) == path)
        if own is not None:
            _prepend(network, own, node, part.shape or network.input_shape)


def _prepend(network: TracedNetwork, preprocessing: Preprocessing, source: fx.Node, sizes: tuple[int, ...]) -> None:
    channels = sizes[0] if sizes else 0
    mean, std = (torch.tensor(value, dtype=torch.float64) for value in checks.mean_and_std(preprocessing))
    for what, value in (("mean", mean), ("std", std)):
        if value.numel() not in (1, channels) or not bool(torch.isfinite(value).all()):
            inputs = ", ".join(["N", *map(str, sizes)])
            of_what = (
                f"one for all, or one for each of the {channels} channels of inputs [{inputs}]"
                if len(sizes) > 1
                else f"inputs [{inputs}] have no channels: one for all, or one for each feature"
            )
            raise ValueError(
                f"preprocessing: {what} must be 1 or {channels} finite numbers ({of_what}), got {value.tolist()}"
            )
    if bool((std <= 0).any()):
        raise ValueError(f"preprocessing: std must be positive, got {std.tolist()}")
    if not network.steps():
        return
    shape = (-1, *[1] * (len(sizes) - 1))
    like = torch.zeros((), dtype=network.dtype, device=network.device)
    affine = Affine((1 / std).view(shape).to(like), (-mean / std).view(shape).to(like))
    node = network.insert("preprocessing", affine, source, sizes)
    _insert_behind(source, node)
    network.log(
        str(node.target), operation="(x - mean) / std", became="folded into the synapses that follow", exact="exact"
    )


def _split_into_pairs(network: TracedNetwork) -> dict[str, str]:
    """``x = relu(x) - relu(-x)``: give every signed value that feeds on two layers of neurons, one per sign.

    Returns the path of the positive half of each -> that of the negative.
    """
    positive, spikes = _never_negative(network), network.spikes()
    computed: set[fx.Node] = set()
    pairs: dict[str, str] = {}
    for node, module in network.steps():
        sums = adds(module) or has_weights(module)
        if node in spikes or not (sums or not computed.isdisjoint(node.all_input_nodes)):
            continue
        computed.add(node)
        if node not in positive and network.role_at(node) is not Role.ROUTE and _feeds_on(network, node):
            pairs |= _pair(network, node)
            computed.discard(node)
    return pairs


def _feeds_on(network: TracedNetwork, node: fx.Node) -> bool:
    """Check whether a value goes, routed or not, into synapses that are not its own neurons' alone."""
    users, pending, seen = [], list(node.users), set()
    while pending:
        user = pending.pop()
        if user in seen:
            continue
        seen.add(user)
        if network.role_at(user) is Role.ROUTE:
            pending.extend(user.users)
        else:
            users.append(user)
    weighted = any(user.op == "call_module" and has_weights(network.module_at(user)) for user in users)
    return weighted or (len(users) > 1 and any(network.role_at(user) is not Role.RECTIFIER for user in users))


def _pair(network: TracedNetwork, node: fx.Node) -> dict[str, str]:
    path, shape = str(node.target), network.shape_at(node)
    users = list(node.users)
    one = torch.ones((), dtype=network.dtype, device=network.device)
    upper = network.insert(f"{path}_positive", nn.ReLU(), node, shape)
    flipped = network.insert(f"{path}_negated", Affine(-one, 0 * one), node, shape)
    lower = network.insert(f"{path}_negative", nn.ReLU(), flipped, shape)
    back = network.insert(f"{path}_subtracted", Affine(-one, 0 * one), lower, shape)
    both = network.insert(f"{path}_pair", Add(), upper, shape)
    both.args = (upper, back)
    for user in users:
        user.replace_input_with(node, both)
    halves = {upper: "positive half", flipped: "sign", lower: "negative half", back: "sign", both: "sum of the halves"}
    for half, what in halves.items():
        network.log(str(half.target), operation=f"{what} of {path}")
    return {str(upper.target): str(lower.target)}


def _insert_behind(source: fx.Node, node: fx.Node) -> None:
    """Let all users of `source` but `node` use `node`."""
    source.replace_all_uses_with(node, delete_user_cb=lambda user: user is not node)
