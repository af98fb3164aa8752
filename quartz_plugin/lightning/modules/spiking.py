"""A converted network under test."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import lightning
import torch
from torch import Tensor
from torchmetrics import MeanMetric, Metric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy

from quartz_plugin.engines import SimulationResult
from quartz_plugin.lightning.modules.evaluation import (
    check_outputs,
    common_t_max,
    counted,
    exact_sum,
    profiles,
    warn_if_seen,
)
from quartz_plugin.lightning.notes import FITTED_ON
from quartz_plugin.metrics import (
    Agreement,
    ANNOperations,
    DecisionLatency,
    EarlySpikeRate,
    EnergyEstimate,
    MemoryAccesses,
    NeuronEvents,
    QuartzOperations,
    SpikeCount,
    SpikesPerNeuron,
    SynapticOperations,
)
from quartz_plugin.network import SpikingNetwork
from quartz_plugin.task import class_scores


def cost_metrics(snn: SpikingNetwork) -> MetricCollection:
    """Every cost that a test of a spiking network reports; updated with ``result=``."""
    costs: dict[str, Metric] = {
        "spikes": SpikeCount(snn),
        "spikes_per_neuron": SpikesPerNeuron(snn),
        "early": EarlySpikeRate(snn),
        "synops": SynapticOperations(snn),
        "synops_factored": SynapticOperations(snn, kind="factored"),
        "synops_merged": SynapticOperations(snn, kind="merged"),
        "operations": QuartzOperations(snn),
        "events": NeuronEvents(snn),
        "memory": MemoryAccesses(snn),
        "energy": EnergyEstimate(snn, profiles(common_t_max(snn))),
    }
    return MetricCollection(costs, compute_groups=False)


class SpikingClassifier(lightning.LightningModule):
    """A converted network under test: accuracy, agreement with the ANN, spikes, operations, energy, latency.

    Parameters
    ----------
    snn : SpikingNetwork
        The converted network.
    classes : int
        Number of classes.
    decisions : sequence of Tensor, optional
        What the ANN decided for on the same test images, batch by batch; without them there is no agreement.
    engine : str
        As in :meth:`SpikingNetwork.run`.
    cost_images : int, optional
        Costs are counted on so many of the test images, evenly spread; by default on all.
    """

    def __init__(
        self,
        snn: SpikingNetwork,
        classes: int,
        decisions: Sequence[Tensor] | None = None,
        engine: str = "auto",
        cost_images: int | None = None,
    ) -> None:
        super().__init__()
        self.snn = snn
        self.classes = classes
        self.engine = engine
        self.cost_images = cost_images
        self.decisions = decisions
        answers: dict[str, Metric] = {
            "accuracy": MulticlassAccuracy(classes, average="micro"),
            "decision_steps": DecisionLatency(),
        }
        # What a reader of the membranes would decide.
        self.by_membrane = MulticlassAccuracy(classes, average="micro")
        if decisions is not None:
            answers["agreement"] = Agreement()
        # What the first layer multiplies, where it computes on the image itself.
        self.first_layer = (
            None if snn.dense_stem is None else ANNOperations(snn.dense_stem, torch.zeros(1, *snn.graph.image_shape))
        )
        self.answers = MetricCollection(answers, compute_groups=False)
        self.costs = cost_metrics(snn)
        self.ties = MeanMetric().set_dtype(torch.float64)
        self.images, self.counted = exact_sum(), exact_sum()
        # Images that the spiking network alone gets right, and wrong.
        self.gained, self.lost = exact_sum(), exact_sum()
        self.figures: dict[str, float] = {}

    def forward(self, images: Tensor) -> Tensor:
        """Logits ``[B, classes]``."""
        logits: Tensor = self.snn(images)
        return logits

    def on_test_start(self) -> None:
        """Warn where test images are training images."""
        warn_if_seen(self.snn.graph.settings.get(FITTED_ON), self.trainer)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        """Simulate one batch and count."""
        images, labels = batch
        chosen = counted(self.trainer, batch_idx, len(images), self.cost_images)
        every = len(chosen) == len(images)
        result: SimulationResult = self.snn.run(images, engine=self.engine, record=every)
        check_outputs(result.logits, self.classes)
        seen = {"result": result, "preds": class_scores(result.logits), "target": labels}
        if self.decisions is not None:
            seen["reference"] = self.decisions[batch_idx]
            right, ann_right = result.decisions == labels, seen["reference"] == labels
            self.gained.update((right & ~ann_right).sum())
            self.lost.update((ann_right & ~right).sum())
        self.answers.update(**seen)
        self.by_membrane.update(class_scores(result.membrane), labels)
        if chosen:
            self.costs.update(result=result if every else self.snn.run(images[chosen], engine=self.engine))
            if self.first_layer is not None:
                self.first_layer.update(images[chosen])
        self.counted.update(len(chosen))
        self.ties.update(result.ties.double())
        self.images.update(len(images))

    def on_test_epoch_end(self) -> None:
        """Log the figures of all images; `figures` keeps them in full precision."""
        figures = {name: float(value) for name, value in self.answers.compute().items()}
        figures |= {name: float(value) for name, value in self.costs.compute().items()}
        if self.first_layer is not None:
            totals = {name: float(value) for name, value in self.first_layer.compute().items()}
            figures["first_layer_macs"] = totals["macs"]
            for profile in profiles(common_t_max(self.snn)):
                if profile.ann:
                    figures[profile.figure] += profile.energy(totals, "ann")
            self.first_layer.reset()
        figures["accuracy_membrane"] = float(self.by_membrane.compute())
        figures["cost_images"] = float(self.counted.compute())
        if self.decisions is not None:
            figures |= {"gained": float(self.gained.compute()), "lost": float(self.lost.compute())}
        self.figures = {**figures, "ties": float(self.ties.compute()), "steps": float(self.snn.n_steps)}
        self.figures["images"] = float(self.images.compute())
        # Summed over all processes already.
        self.log_dict(self.figures, rank_zero_only=True)
        counters = (self.by_membrane, self.ties, self.images, self.counted, self.gained, self.lost)
        for metric in (self.answers, self.costs, *counters):
            metric.reset()
