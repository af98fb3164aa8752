"""fit: train an ANN, or, with t_max, train it for few steps."""

from __future__ import annotations

import copy
import os
from typing import Any

import lightning
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException

import quartz_plugin
from quartz_plugin.lightning.checkpoints import check_resumable, check_same_run, load_checkpoint
from quartz_plugin.lightning.commands.base import CommandTrainer, with_notes
from quartz_plugin.lightning.console import print_once
from quartz_plugin.lightning.data import ClassificationData
from quartz_plugin.lightning.modules import Classifier, EvaluatedClassifier, FewStepsClassifier, check_outputs
from quartz_plugin.lightning.options import options_with_defaults
from quartz_plugin.operators.modules import in_eval_mode
from quartz_plugin.tables import printable


class _FirstBatch(lightning.Callback):
    """Notes that a run which goes on from a checkpoint has trained on a batch: it is that run from there on."""

    def __init__(self) -> None:
        self.trained = False

    def on_train_batch_end(self, *_: Any, **__: Any) -> None:
        """Note the first batch, optimizer and learning rate included."""
        self.trained = True


class Fit(CommandTrainer):
    """Training."""

    def fit(  # type: ignore[override]
        self,
        model: Any,
        train_dataloaders: Any = None,
        val_dataloaders: Any = None,
        datamodule: Any = None,
        ckpt_path: str | None = None,
        t_max: int | dict[str, int] | None = None,
        relative_lr: float = 0.01,
        distillation: float = 0.5,
        mixup: float = 0.0,
        **conversion: Any,
    ) -> Any:
        """Train the network, or, with t_max, the spiking network; one that cannot be converted is refused at the start.

        Parameters
        ----------
        model : EvaluatedClassifier
            The classifier.
        train_dataloaders : DataLoader, optional
            Not used on the command line.
        val_dataloaders : DataLoader, optional
            Not used on the command line.
        datamodule : ClassificationData
            Its data.
        ckpt_path : str, optional
            Checkpoint to go on from, as after a run that was cut off: last.ckpt in the trainer's folder.
        t_max : int | dict[str, int], optional
            Train with the rounding of spikes, for this T, or one by layer ('{"default": 4, "input": 32}');
            from scratch or from an ANN's weights (--model.weights, a checkpoint too). The best network is
            then also written as snn.safetensors.
        relative_lr : float
            Adam's highest learning rate with t_max, as a share of the size of each layer's weights and
            scale; it stands in place of the model's own rate and decay.
        distillation : float
            Share of the loss, with t_max, that asks for the ANN's outputs instead of the labels, where
            there is a trained ANN; it then teaches its activations, too.
        mixup : float
            Where an ANN teaches, mix a random share of another image into each, this at most
            (arXiv:1710.09412).
        **conversion
            Options of the network that is trained with t_max.
        """
        training = {"relative_lr": relative_lr, "distillation": distillation, "mixup": mixup}
        _check_training(training)
        options = options_with_defaults("fit", conversion)
        if isinstance(model, EvaluatedClassifier) and isinstance(datamodule, ClassificationData):
            _check_network(model, datamodule)
            taught = t_max is not None and model.fitted_on is not None and distillation > 0
            _check_mixup(mixup, ckpt_path, taught)
            if ckpt_path is not None:
                model, checkpoint = load_checkpoint(model, ckpt_path)
                check_resumable(checkpoint, ckpt_path)
                check_same_run(model, ckpt_path, t_max)
            elif t_max is not None:
                model = _for_few_steps(model, datamodule, {"t_max": t_max, **options}, training)
            # An output of few values is rounded for the most right answers; its loss ranks them by other standards.
            few = isinstance(model, FewStepsClassifier)
            self.keep_best(*(("val_accuracy", "max") if few else ("val_loss", "min")))
            print_once(datamodule.summary())
        self._train(model, (train_dataloaders, val_dataloaders, datamodule), ckpt_path)
        if self.best_path:
            print_once(f"wrote {os.path.relpath(self.best_path)}")
            if isinstance(model, FewStepsClassifier) and self.is_global_zero:
                self._write_spiking(model, datamodule)
        return model

    def _train(self, model: Any, data: tuple[Any, Any, Any], ckpt_path: str | None) -> None:
        """Run Lightning's own fit; what a checkpoint that it goes on from breaks ends in one line."""
        first = _FirstBatch()
        self.callbacks.insert(0, first)  # type: ignore[has-type]
        try:
            super().fit(model, *data, ckpt_path, weights_only=True)
        except Exception as error:
            if ckpt_path is None or first.trained or isinstance(error, OSError | MisconfigurationException):
                raise
            raise ValueError(
                f"{ckpt_path} is damaged, or of another run or version: it cannot be gone on from; to start from its "
                f"weights alone, give it as --model.weights ({type(error).__name__}: {printable(error)[:150]})"
            ) from error
        finally:
            self.callbacks.remove(first)  # type: ignore[has-type]

    def _write_spiking(self, model: FewStepsClassifier, datamodule: Any) -> None:
        """Write the best network that was trained for few steps as a spiking network."""
        best, _ = load_checkpoint(copy.deepcopy(model).cpu().eval(), self.best_path)
        assert isinstance(best, FewStepsClassifier)
        path = self.file(None, "snn.safetensors")
        with_notes(best.network.to_spiking(), model, datamodule).save(path)
        print(f"wrote {os.path.relpath(path)}")


def _check_training(training: dict[str, float]) -> None:
    """Raise ValueError for options of training out of their range."""
    if not training["relative_lr"] > 0:
        raise ValueError(f"relative_lr must be greater than 0, got {training['relative_lr']}")
    for name in ("distillation", "mixup"):
        if not 0 <= training[name] <= 1:
            raise ValueError(f"{name} is a share from 0 to 1, got {training[name]}")


def _check_network(model: EvaluatedClassifier, datamodule: ClassificationData) -> None:
    """Raise for a network that cannot be converted, or of another number of classes than the data."""
    image = datamodule.training_images(1)
    if isinstance(model, Classifier):
        quartz_plugin.check_convertible(model.network, image, model.preprocessing)
    with torch.no_grad(), in_eval_mode(model):
        check_outputs(model(image), model.classes)


def _check_mixup(mixup: float, ckpt_path: str | None, taught: bool) -> None:
    """Raise ValueError where images are to be mixed and are not."""
    if mixup and ckpt_path is not None:
        raise ValueError(f"a run that goes on mixes as it did before: leave --mixup out beside --ckpt_path {ckpt_path}")
    if mixup and not taught:
        raise ValueError(
            "--mixup mixes images where an ANN teaches: give --t_max and --model.weights, and a --distillation greater "
            "than 0, or leave it out"
        )


def _for_few_steps(
    model: EvaluatedClassifier, datamodule: ClassificationData, options: dict[str, Any], training: dict[str, float]
) -> FewStepsClassifier:
    """Prepare an ANN to be trained for few steps, its scales started from training images."""
    images = datamodule.training_images(datamodule.calibration_images)
    network = quartz_plugin.prepare_qat(model.network, images, preprocessing=model.preprocessing, **options)
    return FewStepsClassifier(model, network, **training)
