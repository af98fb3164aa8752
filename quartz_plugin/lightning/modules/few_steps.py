"""Networks that are trained for few steps: with the rounding of their spikes, taught by the ANN that they come from."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from torch.nn import functional as F

from quartz_plugin.convert.refine.learning import adam
from quartz_plugin.lightning.modules.base import EvaluatedClassifier, has_2d_convolutions
from quartz_plugin.lightning.notes import SPIKES
from quartz_plugin.training import DistillationLoss, TrainableNetwork, structure_of

RANGE_IMAGES, RANGE_VALUES = 1000, 1 << 25
"""The latest training images, by which the output's range is chosen, and the most values they may have."""


class FewStepsClassifier(EvaluatedClassifier):
    """A network trained with the rounding of its spikes; where the ANN it comes from is trained, that one teaches it.

    Parameters
    ----------
    ann : EvaluatedClassifier
        The ANN's classifier; its number of classes, its label smoothing and the data it is fitted on are taken over.
    network : TrainableNetwork
        What :func:`quartz_plugin.prepare_qat` made of its network.
    distillation : float
        Share of the loss that asks for the ANN's outputs in place of the labels.
    relative_lr : float
        Adam's highest learning rate, as a share of the size of each layer's weights and scale.
    mixup : float
        Share of another image mixed into each, at most, where an ANN teaches.

    Attributes
    ----------
    teacher : tuple of DistillationLoss
        The trained ANN; empty where there is none. In a tuple, since its weights are not this module's.
    """

    network: TrainableNetwork

    def __init__(
        self,
        ann: EvaluatedClassifier,
        network: TrainableNetwork,
        distillation: float = 0.5,
        relative_lr: float = 0.01,
        mixup: float = 0.0,
    ) -> None:
        super().__init__(network, ann.classes, ann.label_smoothing)
        self.fitted_on, self.class_names, self.untrained = ann.fitted_on, ann.class_names, ann.untrained
        self.cost_images = ann.cost_images
        self.teacher: tuple[DistillationLoss, ...] = () if ann.fitted_on is None else (DistillationLoss(network),)
        self.distillation, self.relative_lr, self.mixup = distillation, relative_lr, mixup
        # The latest batches it was trained on, and whether it has been since the output's range was chosen.
        self._seen: list[tuple[Tensor, Tensor]] = []
        self._range_is_old = False

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Distillation loss of one batch where an ANN teaches, else its cross-entropy."""
        images, labels = batch
        most = max(1, min(RANGE_IMAGES // len(images), RANGE_VALUES // images.numel()))
        self._seen, self._range_is_old = [*self._seen, (images, labels)][-most:], True
        taught = self.teacher and self.distillation
        loss = self._taught(images, labels) if taught else self._cross_entropy(self(images), labels)
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def _taught(self, images: Tensor, labels: Tensor) -> Tensor:
        """Loss of one batch where an ANN teaches."""
        (teacher,) = self.teacher
        if self.mixup:
            images, labels = mixed(images, F.one_hot(labels, self.classes).to(images.dtype), self.mixup)
        progress = self.global_step / max(1, int(self.trainer.estimated_stepping_batches))
        loss: Tensor = teacher.to(images.device)(
            self.network, images, labels, alpha=self.distillation, progress=progress
        )
        return loss

    def on_validation_start(self) -> None:
        """While it is trained, set the output's range to what serves best by now."""
        if self.trainer.state.fn == TrainerFn.FITTING:
            self._choose_output_range()

    def on_train_epoch_end(self) -> None:
        """Set the output's range where nothing was validated."""
        self._choose_output_range()

    def _choose_output_range(self) -> None:
        """Choose it by the latest training images, where there are new ones."""
        if not self._range_is_old:
            return
        self._range_is_old = False
        images, labels = (torch.cat(each) for each in zip(*self._seen, strict=True))
        self.network.choose_output_range(images, labels)
        # Processes saw images of their own.
        self.network.set_output_range(*self.trainer.strategy.broadcast(self.network.output_range))

    def configure_optimizers(self) -> Any:
        """Adam, whose rates go with the size of weights."""
        steps = max(1, int(self.trainer.estimated_stepping_batches))
        optimizer, schedule = adam(self.network.parameter_groups(self.relative_lr), steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_fit_start(self) -> None:
        """Note the data; the teacher's convolutions are faster with channels last, too."""
        super().on_fit_start()
        self._seen, self._range_is_old = [], False
        for teacher in self.teacher if has_2d_convolutions(self.network) else ():
            teacher.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def on_fit_end(self) -> None:
        """Let go of the images that chose the output's range."""
        self._seen, self._range_is_old = [], False

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep with the weights how the network is built and trained."""
        super().on_save_checkpoint(checkpoint)
        checkpoint[SPIKES] = {
            **structure_of(self.network),
            "distillation": self.distillation if self.teacher else 0.0,
            "relative_lr": self.relative_lr,
            "mixup": self.mixup,
        }


def mixed(images: Tensor, labels: Tensor, most: float) -> tuple[Tensor, Tensor]:
    """Images ``[B, ...]`` and shares of classes ``[B, classes]`` with a part of another image in each.

    The parts are random, uniform from 0 to `most` (arXiv:1710.09412 draws them from a Beta distribution).
    """
    part = most * torch.rand(len(images), device=images.device, dtype=images.dtype)
    of_images = part.view(-1, *[1] * (images.dim() - 1))
    return torch.lerp(images, images.flip(0), of_images), torch.lerp(labels, labels.flip(0), part.unsqueeze(1))
