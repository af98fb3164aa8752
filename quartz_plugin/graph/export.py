"""Exporters: the converted network as modules of snnTorch's and of Norse's kind."""

from __future__ import annotations

import copy
from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, fx, nn

from quartz_plugin.graph import (
    INPUT,
    ConvertedGraph,
    check_modules,
    is_chain,
    module_nodes,
    unique_path,
)
from quartz_plugin.graph.walk import Step, Walk, plan_walk
from quartz_plugin.neuron import AxonalDelay, FirstSpikeMaxPool, StatefulModule, TTFSNeuron, reset


def to_snntorch(graph: ConvertedGraph) -> nn.Module:
    """Return an independent network whose neurons keep their state (``init_hidden=True``).

    An ``nn.Sequential`` where the network is a chain, else a :class:`torch.fx.GraphModule`.
    """
    check_modules(graph)
    net: nn.Module
    if is_chain(graph):
        net = nn.Sequential(OrderedDict(_in_order(graph)))
    else:
        net = copy.deepcopy(graph.module)
        _take_float32(graph, net)
    reset(net)
    return net


def to_norse(graph: ConvertedGraph) -> nn.Module:
    """Return an independent network that hands its state on: ``out, state = net(spikes, state)``.

    A :class:`norse.torch.SequentialState` where the network is a chain, else a :class:`StatefulGraph`, which may
    itself stand in a SequentialState.
    """
    # Ours first: where Norse is missing, it names what to install.
    from quartz_plugin.norse import TTFSCell  # isort: skip
    from norse.torch import SequentialState  # isort: skip

    def with_state_outside(module: nn.Module) -> nn.Module:
        if isinstance(module, TTFSNeuron):
            return TTFSCell(module.p).to(device=graph.device)
        if isinstance(module, FirstSpikeMaxPool):
            return FirstSpikeMaxPool(module.pool)
        if isinstance(module, AxonalDelay):
            return AxonalDelay(module.steps)
        return module

    check_modules(graph)
    net: nn.Module
    if is_chain(graph):
        net = SequentialState(*(with_state_outside(module) for _, module in _in_order(graph)))
        return net
    inner = copy.deepcopy(graph.module)
    for node, module in list(module_nodes(inner)):
        inner.set_submodule(str(node.target), with_state_outside(module))
    _take_float32(graph, inner)
    return StatefulGraph(inner)


class InputType(nn.Module):
    """Brings spikes to the type of the weights behind it, which are float64 where float32 cannot hold a membrane.

    Parameters
    ----------
    dtype : torch.dtype
        The weights' type; ``.to`` changes it as it changes weights.

    Examples
    --------
    >>> InputType(torch.float64)(torch.ones(2)).dtype
    torch.float64
    """

    like: Tensor

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.register_buffer("like", torch.empty(0, dtype=dtype), persistent=False)

    def forward(self, input_: Tensor) -> Tensor:
        """Convert."""
        return input_.to(self.like.dtype)

    def extra_repr(self) -> str:
        """Show the type."""
        return f"{self.like.dtype}"


def _take_float32(graph: ConvertedGraph, net: fx.GraphModule) -> None:
    """Let a network of another type than float32 take float32 spikes, as :func:`~quartz_plugin.encode` gives them."""
    if graph.dtype == torch.float32:
        return
    (spikes,) = (node for node in net.graph.nodes if node.op == "placeholder")
    path = unique_path("input_type", {name for name, _ in net.named_modules()})
    net.add_submodule(path, InputType(graph.dtype).to(graph.device))
    with net.graph.inserting_after(spikes):
        converted = net.graph.call_module(path, (spikes,))
    spikes.replace_all_uses_with(converted, delete_user_cb=lambda user: user is not converted)
    net.recompile()


class StatefulGraph(nn.Module):
    """A network that is not a chain, in Norse's idiom: ``out, state = net(spikes, state)`` for each step.

    Parameters
    ----------
    network : fx.GraphModule
        Calls modules alone; those with a parameter named ``state`` return their output and their state.

    Examples
    --------
    >>> import torch, quartz_plugin
    >>> class Residual(nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.fc1, self.fc2 = nn.Linear(4, 4), nn.Linear(4, 4)
    ...     def forward(self, x):
    ...         x = self.fc1(x).relu()
    ...         return x + self.fc2(x).relu()
    >>> images = torch.rand(32, 4)
    >>> snn = quartz_plugin.convert(Residual(), images, t_max=8)
    >>> net, state, spikes = snn.to_norse(), None, []
    >>> for step in quartz_plugin.encode(images, 8, snn.n_steps):
    ...     out, state = net(step, state)
    ...     spikes.append(out)
    >>> torch.equal(snn.decode(torch.stack(spikes)), snn(images))
    True
    """

    def __init__(self, network: fx.GraphModule) -> None:
        super().__init__()
        self.network = network

    def forward(self, input_: Tensor, state: dict[str, Any] | None = None) -> tuple[Tensor, dict[str, Any]]:
        """Advance one step.

        Parameters
        ----------
        input_ : Tensor
            Spikes that arrive now, ``[B, ...]``.
        state : dict, optional
            What the step before returned: path of each stateful module -> its state. None starts an inference.

        Raises
        ------
        ValueError
            If `state` is not one that this network returned for input of this shape.
        """
        if state is not None and (not isinstance(state, dict) or state.get(INPUT) != input_.shape):
            raise ValueError(
                f"the state is not one that this network returned for input of shape {list(input_.shape)}; "
                "start an inference with None"
            )
        walk = _WithStates(plan_walk(self.network), state or {})
        out = walk.run(input_)
        return out, {INPUT: input_.shape, **walk.after}


class _WithStates(Walk):
    """One step of a network whose modules return their states."""

    def __init__(self, steps: tuple[Step, ...], before: dict[str, Any]) -> None:
        super().__init__(steps)
        self.before = before
        self.after: dict[str, Any] = {}

    def at_synapses(self, step: Step) -> Any:
        if step.module is None or not _keeps_state(step.module):
            return super().at_synapses(step)
        path = str(step.node.target)
        out, self.after[path] = step.module(self.source(step), self.before.get(path))
        return out


def _keeps_state(module: nn.Module) -> bool:
    from quartz_plugin.norse import TTFSCell

    return isinstance(module, StatefulModule | TTFSCell)


def _in_order(graph: ConvertedGraph) -> list[tuple[str, nn.Module]]:
    """Copies of the modules of a chain, named by their paths with "_" for "."."""
    copies: dict[str, nn.Module] = {}
    if graph.dtype != torch.float32:
        copies["input_type"] = InputType(graph.dtype).to(graph.device)
    for node, module in module_nodes(graph.module):
        copies[unique_path(str(node.target).replace(".", "_"), copies)] = copy.deepcopy(module)
    return list(copies.items())
