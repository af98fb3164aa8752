"""A classifier under validation and test, whatever it is trained for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import lightning
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics.classification import MulticlassAccuracy
from torchvision.transforms import v2

from quartz_plugin.lightning.data import global_seed, seed_of
from quartz_plugin.lightning.modules.evaluation import check_outputs, counted, exact_sum, profiles, warn_if_seen
from quartz_plugin.lightning.notes import CLASS_NAMES, FITTED_ON, UNKNOWN_DATA, class_names_of, fitted_on_of
from quartz_plugin.metrics import ANNOperations
from quartz_plugin.task import class_scores, decide


class EvaluatedClassifier(lightning.LightningModule):
    """A network that classifies: what training an ANN and training it for few steps have in common.

    Parameters
    ----------
    network : nn.Module
        Takes raw images in [0, 1], gives logits.
    classes : int
        Number of classes.
    label_smoothing : float
        Share of the target spread over all classes.
    preprocessing : (mean, std), optional
        What the network expects its input normalised by, a value for each channel.

    Attributes
    ----------
    cost_images : int or None
        Costs are counted on so many of the test images, evenly spread; None counts on all.
    fitted_on : str or None
        Names the data that the network is fitted on; None where it is untrained.
    figures : dict
        The figures of the latest test, in full precision.
    decisions : list of Tensor
        Classes decided for in the latest test, batch by batch.
    """

    def __init__(
        self,
        network: nn.Module,
        classes: int,
        label_smoothing: float = 0.0,
        preprocessing: tuple[Sequence[float], Sequence[float]] | None = None,
    ) -> None:
        super().__init__()
        self.network = network
        self.classes = classes
        self.preprocessing = preprocessing
        self.normalize = nn.Identity() if preprocessing is None else v2.Normalize(*map(list, preprocessing))
        self.label_smoothing = label_smoothing
        self.untrained = "the network is untrained: give --ckpt_path (fit writes best.ckpt) or --model.weights"
        self.class_names: list[str] = []
        # None until it is fitted or given weights: an untrained network is not worth converting.
        self.fitted_on: str | None = None
        self.val_accuracy = MulticlassAccuracy(classes, average="micro")
        self.test_accuracy = MulticlassAccuracy(classes, average="micro")
        self.images, self.counted = exact_sum(), exact_sum()
        self.cost_images: int | None = None
        # Counted while testing, where there is one.
        self.costs: ANNOperations | None = None
        self.figures: dict[str, float] = {}
        self.decisions: list[Tensor] = []

    @property
    def ann(self) -> nn.Module:
        """The network as it takes raw images: with its preprocessing in front."""
        return self.network if self.preprocessing is None else nn.Sequential(self.normalize, self.network)

    def forward(self, images: Tensor) -> Any:
        """Logits ``[B, classes]`` of raw images; in training also those of auxiliary heads, where there are any."""
        return self.network(self.normalize(images))

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Seed what is random in the network by seed, epoch and batch, so that a resumed run is the unbroken one."""
        if (seed := global_seed()) is not None:
            torch.manual_seed(seed_of(seed, self.current_epoch, batch_idx, self.global_rank))

    def _cross_entropy(self, logits: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(class_scores(logits), labels, label_smoothing=self.label_smoothing)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Loss and accuracy of one batch."""
        images, labels = batch
        logits = self(images)
        scores = class_scores(logits)
        self.val_accuracy(scores, labels)
        self.log("val_loss", F.cross_entropy(scores, labels), prog_bar=True, sync_dist=True, batch_size=len(images))
        self.log("val_accuracy", self.val_accuracy, prog_bar=True)

    def on_test_start(self) -> None:
        """Warn where test images are training images."""
        warn_if_seen(self.fitted_on, self.trainer)
        self.decisions = []

    def test_step(self, batch: Any, batch_idx: int) -> None:
        """Accuracy of one batch, and its costs where they are wanted (``costs``)."""
        images, labels = batch
        logits = self(images)
        check_outputs(logits, self.classes)
        self.decisions.append(decide(logits))
        self.test_accuracy.update(class_scores(logits), labels)
        self.images.update(len(images))
        if self.costs is not None:
            chosen = counted(self.trainer, batch_idx, len(images), self.cost_images)
            self.counted.update(len(chosen))
            if chosen:
                self.costs.update(images[chosen])

    def on_test_epoch_end(self) -> None:
        """Log the figures of all images; `figures` keeps them in full precision."""
        self.figures = {"accuracy": float(self.test_accuracy.compute()), "images": float(self.images.compute())}
        if self.costs is not None:
            totals = {name: float(self.costs.compute()[name]) for name in self.costs.quantities}
            energies = {p.figure: p.energy(totals, "ann") for p in profiles(2) if p.ann}
            self.figures |= {**totals, **energies, "cost_images": float(self.counted.compute())}
            self.costs.reset()
            self.counted.reset()
        # Summed over all processes already.
        self.log_dict(self.figures, rank_zero_only=True)
        self.test_accuracy.reset()
        self.images.reset()

    def on_fit_start(self) -> None:
        """Note which data the network is fitted on; convolutions are faster with channels last."""
        if has_2d_convolutions(self.network):
            self.network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.fitted_on = getattr(self.trainer.datamodule, "source", UNKNOWN_DATA)  # type: ignore[attr-defined]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the data's name and its classes' names with the weights."""
        checkpoint[FITTED_ON] = self.fitted_on
        checkpoint[CLASS_NAMES] = list(getattr(self.trainer.datamodule, "class_names", ()))  # type: ignore[attr-defined]

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Read the data's name and its classes' names."""
        self.fitted_on = fitted_on_of(checkpoint) or UNKNOWN_DATA
        self.class_names = class_names_of(checkpoint)


def has_2d_convolutions(network: nn.Module) -> bool:
    """Return whether there is a 2-d convolution in a network."""
    return any(isinstance(module, nn.Conv2d) for module in network.modules())
