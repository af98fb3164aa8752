"""Steps until a decision."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from quartz_plugin.engines.result import SimulationResult
from quartz_plugin.figures import FIGURES
from quartz_plugin.metrics.identity import OfOneNetwork
from quartz_plugin.plot.style import pyplot


def decision_latency(result: SimulationResult) -> Tensor:
    """Steps until a decision can be made, counted from 1: ``[B]``, or ``[B, ...]`` for decisions at every position.

    See :attr:`~quartz_plugin.SimulationResult.decision_steps`.
    """
    return result.decision_steps + 1


class DecisionLatency(OfOneNetwork):
    """Mean number of steps until a decision can be made: the first output spike, or the last one of a regression.

    Examples
    --------
    >>> import quartz_plugin
    >>> ann = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
    >>> snn = quartz_plugin.convert(ann, torch.rand(32, 4), t_max=8)
    >>> metric = DecisionLatency()
    >>> metric.update(snn.run(torch.rand(5, 4)))
    >>> 15 <= metric.compute() <= snn.n_steps
    tensor(True)
    """

    is_differentiable = False
    higher_is_better = FIGURES["decision_steps"].higher_is_better
    full_state_update = False

    steps: Tensor
    total: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("steps", torch.tensor(0), dist_reduce_fx="sum")
        self.add_state("total", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, result: SimulationResult) -> None:
        """Add a simulation; ValueError for one of another network than the first."""
        self.check_network(result)
        latency = decision_latency(result)
        self.steps += latency.sum().to(self.steps)
        self.total += latency.numel()

    def compute(self) -> Tensor:
        """Mean over decisions, float64."""
        return self.steps.double() / self.total

    def plot(self, val: Any = None, ax: Any = None) -> Any:
        """Draw the value, or several from ``forward``, as torchmetrics does; returns figure and axes."""
        pyplot()
        return self._plot(val, ax)
