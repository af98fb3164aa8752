"""Sums over images, layer by layer: the base of the counting metrics."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from quartz_plugin.costs.counts import COUNTS, InferenceCounts, sums_of
from quartz_plugin.engines.result import SimulationResult
from quartz_plugin.figures import figure_of
from quartz_plugin.graph import INPUT
from quartz_plugin.metrics.identity import OfOneNetwork
from quartz_plugin.network import SpikingNetwork
from quartz_plugin.plot import counts_per_layer

_INSTANCES = itertools.count()


class PerLayerMetric(OfOneNetwork):
    """Adds up integer counts ``[B]`` for each layer; the base of the counting metrics."""

    is_differentiable = False
    full_state_update = False

    images: Tensor
    sums: Tensor

    def __init__(
        self,
        layers: Iterable[str],
        quantities: Iterable[str],
        network: SpikingNetwork | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(network, **kwargs)
        self.layers = list(layers)
        self.quantities = list(quantities)
        none = torch.zeros(len(self.quantities), len(self.layers), dtype=torch.int64)
        self.add_state("sums", none, dist_reduce_fx="sum")
        self.add_state("images", torch.tensor(0), dist_reduce_fx="sum")
        # Metrics that count alike on their first batch would share their state from then on in a MetricCollection.
        self.add_state("instance", torch.tensor(next(_INSTANCES)), dist_reduce_fx="max")

    def add(self, *counts: Mapping[str, Tensor]) -> None:
        """Add the counts ``[B]`` of each layer, quantity by quantity; the input, where it is not there, has none.

        Raises
        ------
        ValueError
            If another layer is missing, or there is one too many: the result is of another network.
        """
        for by_layer in counts:
            if {INPUT, *self.layers} != {INPUT, *by_layer}:
                raise ValueError(
                    f"what is counted is of another network: layers {self.layers}, counted {list(by_layer)}"
                )
        self.add_sums(sums_of(counts, self.layers))

    def add_sums(self, sums: Tensor) -> None:
        """Add ``[quantities, layers]``, summed over images."""
        self.sums = self.sums + sums.to(self.device)

    def total(self, quantity: str) -> Tensor:
        """Sum over images so far: int64, one for each layer."""
        return self.sums[self.quantities.index(quantity)]

    def per_image(self, quantity: str) -> dict[str, Tensor]:
        """Mean over images: the total under `quantity`, each layer under ``quantity/layer``."""
        means = self.total(quantity).double() / self.images
        return {quantity: means.sum(), **self.by_layer(quantity, means)}

    def by_layer(self, quantity: str, values: Tensor) -> dict[str, Tensor]:
        """Name a value for each layer."""
        return {f"{quantity}/{layer}": value for layer, value in zip(self.layers, values, strict=True)}

    def compute(self) -> dict[str, Tensor]:
        """Means over images, float64; see the class."""
        return {name: mean for quantity in self.quantities for name, mean in self.per_image(quantity).items()}

    def plot(self, val: Mapping[str, Tensor] | None = None, ax: Any = None) -> tuple[Any, Any]:
        """Draw the first quantity as a bar for each layer.

        Parameters
        ----------
        val : dict, optional
            What ``compute`` or ``forward`` gave; computed now by default.
        ax : Axes, optional
            Where to draw.

        Returns
        -------
        figure, axes
            As torchmetrics' own metrics return them.
        """
        values = self.compute() if val is None else val
        quantity = next(iter(values))
        bars = {layer: float(values[f"{quantity}/{layer}"]) for layer in self.layers if f"{quantity}/{layer}" in values}
        axes = counts_per_layer(bars, ax, quantity=figure_of(quantity).raw_axis_label)
        return axes.get_figure(), axes


class CountMetric(PerLayerMetric):
    """Counts of :class:`~quartz_plugin.costs.InferenceCounts`, mean over images; the base of those that read them.

    Parameters
    ----------
    network : SpikingNetwork
        The network whose results are counted.
    counts : sequence of str
        Which counts.
    with_input : bool
        Whether the input is a layer of theirs.
    """

    higher_is_better = False

    def __init__(self, network: SpikingNetwork, counts: Sequence[str], with_input: bool = False, **kwargs: Any) -> None:
        if unknown := [count for count in counts if count not in COUNTS]:
            raise ValueError(f"no counts are called {unknown}; there are {', '.join(COUNTS)}")
        if not isinstance(network, SpikingNetwork):
            raise TypeError(f"network must be a SpikingNetwork, as convert makes it, got {type(network).__name__}")
        layers = (name for name in network.windows if with_input or name != INPUT)
        super().__init__(layers, counts, network, **kwargs)

    def update(self, result: SimulationResult) -> None:
        """Add a simulation with ``record=True``; ValueError for one of another network."""
        assert self.network is not None
        sums = InferenceCounts(self.network.held, result).sums(self.quantities, self.layers)
        self.check_network(result)
        self.add_sums(sums)
        self.images += len(result.logits)
