"""Recurrent layers with ReLUs, traced as the linear maps that they are: each time step has neurons of its own."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class States(tuple[Tensor, ...]):
    """Last states of all layers and directions, each ``[B, H]``: torch's tensor has them, not the batch, first."""

    def squeeze(self, dim: int = 0) -> Any:
        """Return the only state; several stay as they are."""
        return self[0] if dim == 0 and len(self) == 1 else self


def unrolled(module: nn.Module) -> Callable[..., Any] | None:
    """Return a forward made of linear maps and ReLUs; None for any other module.

    Examples
    --------
    >>> layer, x = nn.RNN(3, 4, nonlinearity="relu", batch_first=True, bidirectional=True), torch.rand(2, 5, 3)
    >>> torch.allclose(unrolled(layer)(x)[0], layer(x)[0], atol=1e-6), unrolled(nn.RNN(3, 4))
    (True, None)
    """
    forward = {nn.RNN: _layers, nn.RNNCell: _cell}.get(type(module))
    if forward is None or getattr(module, "nonlinearity", "") != "relu" or not getattr(module, "batch_first", True):
        return None
    return partial(forward, module)


def _cell(module: Any, input: Tensor, hx: Tensor | None = None) -> Tensor:
    return _step(input, hx, module.weight_ih, module.weight_hh, module.bias_ih, module.bias_hh)


def _layers(module: Any, input: Tensor, hx: Any = None) -> tuple[Tensor, States]:
    ends: list[Tensor] = []
    for layer in range(module.num_layers):
        passes = []
        for suffix in ("", "_reverse")[: 1 + module.bidirectional]:
            names = ["weight_ih", "weight_hh"] + ["bias_ih", "bias_hh"] * module.bias
            weights = [getattr(module, f"{name}_l{layer}{suffix}") for name in names]
            steps, state = list(range(input.shape[1])), None if hx is None else hx[len(ends)]
            states: dict[int, Tensor] = {}
            for step in reversed(steps) if suffix else steps:
                state = states[step] = _step(input[:, step], state, *weights)
            assert state is not None
            ends.append(state)
            passes.append(torch.stack([states[step] for step in steps], dim=1))
        input = torch.cat(passes, dim=-1) if len(passes) > 1 else passes[0]
    return input, States(ends)


def _step(
    input: Tensor,
    state: Tensor | None,
    weight: Tensor,
    of_state: Tensor,
    bias: Tensor | None = None,
    bias_of_state: Tensor | None = None,
) -> Tensor:
    # A state of zeros at the beginning leaves the biases.
    both = bias if bias is None or bias_of_state is None else bias + bias_of_state
    current = F.linear(input, weight, both)
    return torch.relu(current if state is None else current + F.linear(state, of_state))


__all__ = ["States", "unrolled"]
