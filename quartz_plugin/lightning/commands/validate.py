"""validate: loss and accuracy on the validation images."""

from __future__ import annotations

from typing import Any

from quartz_plugin.lightning.commands.base import CommandTrainer
from quartz_plugin.lightning.loading import load_trained
from quartz_plugin.lightning.modules import EvaluatedClassifier


class Validate(CommandTrainer):
    """Validation."""

    def validate(  # type: ignore[override]
        self,
        model: Any = None,
        dataloaders: Any = None,
        ckpt_path: str | None = None,
        verbose: bool = True,
        datamodule: Any = None,
    ) -> Any:
        """Loss and accuracy of the network on the validation images.

        Parameters
        ----------
        model : EvaluatedClassifier
            The classifier.
        dataloaders : DataLoader, optional
            Not used on the command line.
        ckpt_path : str, optional
            Checkpoint that fit wrote; without it the model is taken as it is (--model.weights).
        verbose : bool
            Print the figures.
        datamodule : ClassificationData
            Its data.
        """
        if isinstance(model, EvaluatedClassifier):
            model, ckpt_path = load_trained(model, ckpt_path, datamodule), None
        return super().validate(model, dataloaders, ckpt_path, verbose, datamodule)
