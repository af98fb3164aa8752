"""A rate-coded network under test."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import lightning
from torch import Tensor
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy

from quartz_plugin.costs.energy import ONLY_CONVERTED
from quartz_plugin.costs.rate import RATE_COUNTS, RateCodedNetwork
from quartz_plugin.lightning.modules.evaluation import counted, exact_sum, profiles
from quartz_plugin.metrics import Agreement
from quartz_plugin.task import class_scores


class RateClassifier(lightning.LightningModule):
    """A rate-coded network under test: accuracy, agreement with the ANN, and costs under the same counts.

    Parameters
    ----------
    rate : RateCodedNetwork
        The network.
    steps : int
        Steps of an inference.
    classes : int
        Number of classes.
    decisions : sequence of Tensor
        What the ANN decided for on the same test images, batch by batch.
    cost_images : int, optional
        Costs are counted on so many of the test images, evenly spread; by default on all.
    """

    def __init__(
        self,
        rate: RateCodedNetwork,
        steps: int,
        classes: int,
        decisions: Sequence[Tensor],
        cost_images: int | None = None,
    ) -> None:
        super().__init__()
        self.rate, self.steps, self.decisions, self.cost_images = rate, steps, decisions, cost_images
        self.accuracy = MulticlassAccuracy(classes, average="micro")
        self.agreement = Agreement()
        self.counts = MetricCollection({name: exact_sum() for name in RATE_COUNTS}, compute_groups=False)
        self.images = exact_sum()
        self.figures: dict[str, float] = {}

    def test_step(self, batch: Any, batch_idx: int) -> None:
        """Simulate one batch and count."""
        images, labels = batch
        result = self.rate.run(images, self.steps)
        self.accuracy.update(class_scores(result.logits), labels)
        self.agreement.update(result.logits, self.decisions[batch_idx])
        chosen = counted(self.trainer, batch_idx, len(images), self.cost_images)
        for name, metric in self.counts.items():
            metric.update(sum(count[chosen].double().sum() for count in result.counts[name].values()))
        self.images.update(len(chosen))

    def on_test_epoch_end(self) -> None:
        """Put the figures of all images together."""
        images = float(self.images.compute())
        means = {name: float(total) / images for name, total in self.counts.compute().items()}
        # What this code has not: every neuron is active, and none is read out, rectified or held.
        counts = {**dict.fromkeys(ONLY_CONVERTED, 0.0), **means}
        energies = {p.figure: p.energy(counts) for p in profiles(2) if p.unit == "J"}
        spikes_per_neuron = means["spikes"] / (means["neuron_updates"] / self.steps)
        self.figures = {
            "accuracy": float(self.accuracy.compute()),
            "agreement": float(self.agreement.compute()),
            "steps": float(self.steps),
            "spikes_per_neuron": spikes_per_neuron,
            **means,
            **energies,
        }
