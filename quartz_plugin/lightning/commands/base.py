"""The ground of all commands: a trainer that logs, keeps checkpoints, converts on training images and tests."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import lightning
from lightning.pytorch.callbacks import ModelCheckpoint, RichProgressBar
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from lightning.pytorch.strategies.launchers.subprocess_script import _SubprocessScriptLauncher

import quartz_plugin
from quartz_plugin.lightning.checkpoints import AtomicCheckpoints, best_checkpoint
from quartz_plugin.lightning.console import progress_bar
from quartz_plugin.lightning.data.preparation import PREPARATION
from quartz_plugin.lightning.loading import check_names, check_size
from quartz_plugin.lightning.modules import EvaluatedClassifier, SpikingClassifier, common_t_max
from quartz_plugin.lightning.notes import CLASS_NAMES, FITTED_ON, class_names_of
from quartz_plugin.metrics import ANNOperations
from quartz_plugin.network import SpikingNetwork


class CommandTrainer(lightning.Trainer):
    """Lightning's Trainer with the recipes' logs and checkpoints, and the stages that several commands share.

    Logs go to `default_root_dir` as CSV, and to TensorBoard where it is installed; the best and the last
    checkpoint are kept there as ``best.ckpt`` and ``last.ckpt``.
    """

    def __init__(
        self,
        *args: Any,
        default_root_dir: str = "runs",
        logger: Logger | Iterable[Logger] | bool | None = True,
        callbacks: list[lightning.Callback] | lightning.Callback | None = None,
        **kwargs: Any,
    ) -> None:
        if logger is True:
            logger = [CSVLogger(default_root_dir, name="logs")]
            if find_spec("tensorboard") is not None:
                logger.append(TensorBoardLogger(default_root_dir, name="tensorboard"))
        self._best: ModelCheckpoint | None = None
        callbacks = list(callbacks) if isinstance(callbacks, list | tuple) else [callbacks] if callbacks else []
        if kwargs.get("enable_checkpointing") is not False and not any(
            isinstance(callback, ModelCheckpoint) for callback in callbacks
        ):
            self._best = best_checkpoint(default_root_dir, "val_loss", "min")
            # Lightning's save_last writes only when there is a new best.
            callbacks += [
                self._best,
                ModelCheckpoint(default_root_dir, "last", enable_version_counter=False, save_on_train_epoch_end=True),
            ]
        if kwargs.get("enable_progress_bar") is not False and sys.stdout.isatty():
            callbacks.append(RichProgressBar())
        if not kwargs.get("plugins"):
            kwargs["plugins"] = [AtomicCheckpoints()]
        super().__init__(*args, default_root_dir=default_root_dir, logger=logger, callbacks=callbacks, **kwargs)

    def file(self, given: str | None, default: str) -> Path:
        """Return a file to read or write: the one given, or that of the trainer's folder."""
        return Path(self.default_root_dir) / default if given is None else Path(given)

    def keep_best(self, monitor: str, mode: str) -> None:
        """Keep as the best checkpoint the best of these, unless the user gave checkpoint callbacks."""
        if self._best is None or self._best.monitor == monitor:
            return
        fresh = best_checkpoint(self._best.dirpath, monitor, mode)
        callbacks: list[lightning.Callback] = self.callbacks  # type: ignore[has-type]
        self.callbacks = [fresh if each is self._best else each for each in callbacks]
        self._best = fresh

    @property
    def best_path(self) -> str:
        """Path of the best checkpoint that fit wrote; empty without one."""
        return str(getattr(self.checkpoint_callback, "best_model_path", ""))

    def start_processes(self, datamodule: Any) -> None:
        """Start the processes of --trainer.devices, and let them know each other, as fit and test do by themselves."""
        datamodule.trainer = self
        launcher = self.strategy.launcher
        if self.world_size > 1 and not isinstance(launcher, _SubprocessScriptLauncher):
            raise ValueError("several processes convert with --trainer.strategy ddp only")
        if launcher is not None:
            launcher.launch(self.strategy.setup_environment, trainer=self)

    def converted(self, model: EvaluatedClassifier, datamodule: Any, options: Mapping[str, Any]) -> SpikingNetwork:
        """Convert a classifier's network, calibrated on training images; all processes share them out."""
        self.start_processes(datamodule)
        calibration = datamodule.calibration_dataloader()
        network = model.network.to(self.strategy.root_device)
        with progress_bar("calibrating", self.is_global_zero, len(calibration.sampler)) as move:
            snn = quartz_plugin.convert(
                network,
                calibration,
                progress=move,
                tuning_progress=lambda done, total: move(done, total, "tuning"),
                distributed=self.world_size > 1,
                preprocessing=model.preprocessing,
                **options,
            )
        model.cpu()
        return with_notes(snn, model, datamodule).cpu()

    def test_ann(self, model: EvaluatedClassifier, datamodule: Any) -> dict[str, float]:
        """Accuracy and costs of the ANN, on the test images."""
        model.costs = ANNOperations(model.ann, datamodule.test_image().unsqueeze(0))
        try:
            self._tested(model, datamodule)
        finally:
            model.costs = None
        if not model.figures.get("images"):
            raise ValueError("no image was tested: is --trainer.limit_test_batches 0, or the test set empty?")
        return model.figures

    def test_spiking(
        self, model: EvaluatedClassifier, network: SpikingNetwork, datamodule: Any, engine: str = "auto"
    ) -> dict[str, float]:
        """All figures of a spiking network, on the test images."""
        check_size(network, datamodule.test_image())
        check_names(class_names_of(network.graph.settings), datamodule)
        decisions = None if model.fitted_on is None else model.decisions
        spiking = SpikingClassifier(network, model.classes, decisions, engine, model.cost_images)
        self._tested(spiking, datamodule)
        return {**spiking.figures, "t_max": float(common_t_max(network))}

    def _tested(self, module: lightning.LightningModule, datamodule: Any) -> None:
        """Run Lightning's own test, whatever ``test`` does in a subclass."""
        lightning.Trainer.test(self, module, datamodule=datamodule, verbose=False)


def with_notes(snn: SpikingNetwork, model: EvaluatedClassifier, datamodule: Any) -> SpikingNetwork:
    """Note in a network's settings what it was fitted on, the names of its classes, and how images are prepared."""
    snn.graph.settings[FITTED_ON] = model.fitted_on
    snn.graph.settings[CLASS_NAMES] = list(datamodule.class_names)
    if datamodule.preparation is not None:
        snn.graph.settings[PREPARATION] = datamodule.preparation.to_settings()
    return snn
