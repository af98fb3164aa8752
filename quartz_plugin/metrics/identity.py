"""One network a metric: results of two would mix in its sums without a word."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from quartz_plugin.engines.result import SimulationResult
from quartz_plugin.graph.fingerprint import Identity, identity_of
from quartz_plugin.network import SpikingNetwork

_NONE = (0, 0, 0)


def the_same_network(identities: Tensor) -> Tensor:
    """Reduce identities ``[several, 3]`` (zeros: none) to the one that they are.

    Raises
    ------
    ValueError
        If there are two.

    Examples
    --------
    >>> the_same_network(torch.tensor([[0, 0, 0], [7, 1, 2]]))
    tensor([7, 1, 2])
    """
    known = [Identity(*each) for each in identities.tolist() if tuple(each) != _NONE]
    if not all(each.is_that_of(known[0]) for each in known):
        raise ValueError(
            "the result is of another network than those before it; reset() the metric, or take one for each network"
        )
    return identities.new_tensor(known[0] if known else _NONE)


class Shared:
    """Holds what copies of a metric hold in common: a network is not copied with it, unless it is itself copied."""

    def __init__(self, held: Any) -> None:
        self.held = held

    def __deepcopy__(self, memo: dict[int, Any]) -> Shared:
        return Shared(memo.get(id(self.held), self.held))


class OfOneNetwork(Metric):
    """A metric of simulations of one network: that of the first result, which may learn between two of them.

    Parameters
    ----------
    network : SpikingNetwork, optional
        The network, where it is known beforehand; a copy may stand for it while both are alike.
    """

    seen: Tensor

    def __init__(self, network: SpikingNetwork | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.network = None if network is None else Shared(network.graph)
        # A state, so that metrics that are merged, or those of several processes, are of one network as well.
        self.add_state("seen", torch.tensor(_NONE), dist_reduce_fx=the_same_network)

    def check_network(self, result: SimulationResult) -> None:
        """Raise ValueError if a result is of another network than the metric or the results before."""
        if result.network is None:
            return
        held: Any = None if self.network is None else self.network.held
        if held is not None and held.number != result.network.number:
            own = identity_of(held)
            if own is None or not own.is_that_of(result.network):
                raise ValueError("the result is of another network than the metric; take a metric for each network")
        self.seen = the_same_network(torch.stack([self.seen, self.seen.new_tensor(result.network)]))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Add a result, and compute of it alone; a result that is refused changes nothing."""
        result = args[0] if args else kwargs.get("result")
        if isinstance(result, SimulationResult):
            self.check_network(result)
        return super().forward(*args, **kwargs)
