"""Max pooling of signed values: neurons of its own in front of it, which encode them from a lowest one on.

``maxpool(x) = maxpool(relu(x - lowest)) + lowest`` wherever no pooled value is below the lowest. Calibration finds that
value; until then the network computes with signed values.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from quartz_plugin.convert.symbolic import refusal
from quartz_plugin.convert.traced import FoldedNetwork, Shifted, TracedNetwork
from quartz_plugin.operators.borders import is_below_all
from quartz_plugin.operators.modules import Affine, SignedValues
from quartz_plugin.operators.table import ConversionError, Role


def give_each_pool_its_border(network: TracedNetwork) -> None:
    """Let every padding by a value below all others belong to one max pool, whose windows it makes larger.

    Raises
    ------
    ConversionError
        If anything but a max pool takes the padded values, or a window of it holds nothing else.
    """
    module: Any
    for node, module in network.steps():
        if not is_below_all(module):
            continue
        for user in list(node.users):
            if network.role_at(user) is not Role.MAX_POOL:
                reason = f"it pads with {module.value}, which only a max pool right behind it leaves out; pad with 0"
                raise ConversionError(refusal(str(node.target), type(module).__name__, reason))
        source, shape = node.all_input_nodes[0], network.shape_at(node)
        for place, user in enumerate(list(node.users)):
            zeros = torch.zeros(1, *network.shape_at(source), dtype=network.dtype, device=network.device)
            if not bool(network.module_at(user)(module(zeros)).isfinite().all()):
                reason = f"{str(user.target)!r} has pooling windows of its padding alone; pad less"
                raise ConversionError(refusal(str(node.target), type(module).__name__, reason))
            if place:
                own = network.insert(str(node.target), copy.deepcopy(module), source, shape)
                network.log(str(own.target), operation=network.report[str(node.target)]["operation"])
                user.replace_input_with(node, own)


def entrance(network: TracedNetwork, pool: fx.Node) -> tuple[fx.Node, fx.Node]:
    """The node of a max pool, or of its border, and what enters there."""
    (source,) = pool.all_input_nodes
    while source.op == "call_module" and is_below_all(network.module_at(source)):
        pool, source = source, source.all_input_nodes[0]
    return pool, source


def encode_signed_values(network: TracedNetwork) -> dict[str, Shifted]:
    """Give the signed values that max pools take neurons of their own.

    Returns the path of those neurons -> what stands around them.
    """
    neurons: dict[fx.Node, fx.Node] = {}
    pools: dict[fx.Node, list[fx.Node]] = {}
    behind: dict[fx.Node, tuple[fx.Node, fx.Node]] = {}
    for node, module in network.steps():
        if network.role_at(node) is not Role.MAX_POOL:
            continue
        user, source = entrance(network, node)
        if source in behind:
            # A pool right behind a pool: its spikes are there.
            own, spikes = behind[source]
        elif source in network.spikes():
            continue
        else:
            own = neurons.get(source) or _neurons(network, source, str(node.target), type(module).__name__)
            neurons[source] = spikes = own
            pools.setdefault(own, []).append(node)
        user.replace_input_with(source, spikes)
        users = list(node.users)
        back = _shift(network, f"{node.target}_from_lowest", node)
        for user in users:
            user.replace_input_with(node, back)
        _log_shift(network, back, own)
        behind[back] = own, node
    return {
        str(own.target): Shifted(
            str(own.all_input_nodes[0].target),
            tuple(str(pool.target) for pool in taken),
            tuple(str(back.target) for back, (its, _) in behind.items() if its is own and back.users),
        )
        for own, taken in pools.items()
    }


def _neurons(network: TracedNetwork, source: fx.Node, pool: str, kind: str) -> fx.Node:
    front = _shift(network, f"{pool}_shifted", source)
    neurons = network.insert(f"{pool}_neurons", SignedValues(), front, network.shape_at(source))
    _log_shift(network, front, neurons)
    network.log(str(neurons.target), operation=f"neurons for {kind}")
    return neurons


def _shift(network: TracedNetwork, wanted: str, source: fx.Node) -> fx.Node:
    """A constant for each channel behind `source`, 0 as yet."""
    shape = network.shape_at(source)
    one = torch.ones((), dtype=network.dtype, device=network.device)
    return network.insert(wanted, Affine(one, one.new_zeros(shape[0], *[1] * (len(shape) - 1))), source, shape)


def _log_shift(network: TracedNetwork, shift: fx.Node, neurons: fx.Node) -> None:
    operation = f"lowest value of {neurons.target}"
    network.log(str(shift.target), operation=operation, became="part of the neurons' bias", exact="exact")


def with_shifts(network: FoldedNetwork, shifts: Mapping[str, Tensor]) -> FoldedNetwork:
    """Let the neurons in front of pools rectify, their lowest values at 0; changes the network, and returns it."""
    for path, shifted in network.shifted.items():
        lowest = shifts[path]
        with torch.no_grad():
            for shift, sign in ((shifted.front, -1.0), *((each, 1.0) for each in shifted.behind)):
                bias: Tensor = network.module.get_submodule(shift).bias  # type: ignore[assignment]
                bias.copy_(sign * lowest)
        network.module.set_submodule(path, nn.ReLU())
    return network


def pools_of(network: FoldedNetwork) -> Iterator[tuple[fx.Node, str]]:
    """Pools that take signed values, each with the path of the neurons that encode them."""
    nodes = {str(node.target): node for node, _ in network.steps()}
    for path, shifted in network.shifted.items():
        for pool in shifted.pools:
            yield nodes[pool], path


__all__ = ["encode_signed_values", "entrance", "give_each_pool_its_border", "pools_of", "with_shifts"]
