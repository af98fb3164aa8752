"""The command line of the recipes: Lightning's, with ``convert``, ``run``, ``sweep``, ``figures`` and ``costs``."""

from __future__ import annotations

import argparse
import copy
import csv
import hashlib
import io
import itertools
import json
import math
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import lightning
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ModelCheckpoint, RichProgressBar
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from lightning.pytorch.plugins import TorchCheckpointIO
from lightning.pytorch.strategies.launchers.subprocess_script import _SubprocessScriptLauncher
from lightning.pytorch.utilities import rank_zero_only
from rich.progress import Progress

import quartz_plugin
from quartz_plugin.calibration_methods import TUNING, CalibrationMethod
from quartz_plugin.config import FirstLayer
from quartz_plugin.costs.rate import RateCodedNetwork
from quartz_plugin.figures import SWEEP_COLUMNS, SWEEP_PRINTED
from quartz_plugin.functional import BiasCode, Rectifier
from quartz_plugin.graph import INPUT
from quartz_plugin.graph.files import write_atomically
from quartz_plugin.hardware import map_to_loihi
from quartz_plugin.lightning.comparison import (
    Figures,
    ann_columns,
    loihi_table,
    pictures_of,
    pictures_of_sweep,
    save_pictures,
    side_by_side,
    write_csv,
)
from quartz_plugin.lightning.data import MOST_PIXELS, ClassificationData
from quartz_plugin.lightning.modules import (
    Classifier,
    ImageClassifier,
    RateClassifier,
    SpikingClassifier,
    check_outputs,
    common_t_max,
    inner_windows,
)
from quartz_plugin.lightning.networks import CLASS_NAMES, FITTED_ON, SPIKES, class_names_of
from quartz_plugin.lightning.weights import compare, read_file
from quartz_plugin.metrics import ANNOperations
from quartz_plugin.network import SpikingNetwork, load
from quartz_plugin.operators.modules import in_eval_mode
from quartz_plugin.tables import format_table, printable
from quartz_plugin.task import class_scores
from quartz_plugin.training import TrainableNetwork, restored

_SKIP = {"model", "dataloaders", "datamodule"}

SWEEP_OPTIONS = ("t_max", "percentile", "calibration_method", "hold", "bias", "rectifier")
"""The options that a sweep varies."""

PICTURED = 200
"""Images whose spikes and activations are drawn."""

# Of several processes, one speaks and writes.
_say, _write_csv, _save_pictures = rank_zero_only(print), rank_zero_only(write_csv), rank_zero_only(save_pictures)


class _Resumption(lightning.Callback):
    """Notes that a run which goes on from a checkpoint has trained on a batch: it is that run from there on."""

    def __init__(self) -> None:
        self.done = False

    def on_train_batch_end(self, *_: Any, **__: Any) -> None:
        """Of the first batch, optimizer and learning rate included."""
        self.done = True


class AtomicCheckpoints(TorchCheckpointIO):
    """Checkpoints that are there whole or not at all, wherever the run is killed."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write beside the file, then put in its place."""
        data = io.BytesIO()
        torch.save(checkpoint, data)
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, data.getvalue())


def _best_checkpoint(folder: Any, monitor: str, mode: str) -> ModelCheckpoint:
    return ModelCheckpoint(folder, "best", monitor=monitor, mode=mode, enable_version_counter=False)


class QuartzTrainer(lightning.Trainer):
    """Lightning's Trainer, which also converts.

    Logs go to `default_root_dir` as CSV, and to TensorBoard where it is installed; the best and the last
    checkpoint are kept there as ``best.ckpt`` and ``last.ckpt``. The best ANN is that of the least validation loss, the
    best network of spikes the most accurate one.
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
            self._best = _best_checkpoint(default_root_dir, "val_loss", "min")
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

    def fit(  # type: ignore[override]
        self,
        model: Any,
        train_dataloaders: Any = None,
        val_dataloaders: Any = None,
        datamodule: Any = None,
        ckpt_path: str | None = None,
        t_max: int | dict[str, int] | None = None,
        granularity: Literal["layer", "channel"] = "channel",
        calibration_method: str = "least_squares+output",
        first_layer: FirstLayer = "spiking",
        relative_lr: float = 0.01,
        distillation: float = 0.5,
        mixup: float = 0.0,
    ) -> None:
        """Train the network, or, with t_max, the spiking network; one that cannot be converted is refused at the start.

        Args:
            model: The classifier.
            train_dataloaders: Not used on the command line.
            val_dataloaders: Not used on the command line.
            datamodule: Its data.
            ckpt_path: Checkpoint to go on from, as after a run that was cut off: last.ckpt in the trainer's folder.
            t_max: Train with the rounding of spikes, for this T, or one by layer ('{"default": 4, "input": 32}'); from
                scratch or from an ANN's weights (--model.weights, a checkpoint too). The best network is then also
                written as snn.safetensors.
            granularity: One scale for each layer, or for each channel, with t_max.
            calibration_method: Where the scales start, with t_max: percentile, least_squares or search, and +output.
            first_layer: With t_max, let spikes say the image (spiking), or compute the first layer on it (dense).
            relative_lr: Adam's highest learning rate with t_max, as a share of the size of each layer's weights and
                scale; it stands in place of the model's own rate and decay.
            distillation: Share of the loss, with t_max, that asks for the ANN's outputs instead of the labels, where
                there is a trained ANN; it then teaches its activations, too.
            mixup: Where an ANN teaches, mix a random share of another image into each, this at most (arXiv:1710.09412).
        """
        if not relative_lr > 0:
            raise ValueError(f"relative_lr must be greater than 0, got {relative_lr}")
        if not 0 <= distillation <= 1:
            raise ValueError(f"distillation is a share from 0 to 1, got {distillation}")
        if not 0 <= mixup <= 1:
            raise ValueError(f"mixup is a share from 0 to 1, got {mixup}")
        if isinstance(model, Classifier) and isinstance(datamodule, ClassificationData):
            image = datamodule.training_images(1)
            quartz_plugin.check_convertible(model.network, image, model.preprocessing)
            with torch.no_grad(), in_eval_mode(model):
                check_outputs(model(image), model.classes)
            _check_mixup(mixup, ckpt_path, t_max is not None and model.fitted_on is not None and distillation > 0)
            if ckpt_path is not None:
                _check_resumable(load_checkpoint(model, ckpt_path), ckpt_path)
                _check_windows(model, ckpt_path, t_max)
            elif t_max is not None:
                images = datamodule.training_images(datamodule.calibration_images)
                model.train_spikes(
                    quartz_plugin.prepare(
                        model.network, images, t_max, granularity=granularity, calibration_method=calibration_method,
                        first_layer=first_layer, preprocessing=model.preprocessing,
                    )
                )  # fmt: skip
                model.distillation, model.relative_lr, model.mixup = distillation, relative_lr, mixup
            # An output of few values is rounded for the most right answers; its loss ranks them by other standards.
            spikes = isinstance(model.network, TrainableNetwork)
            self._keep_best(*(("val_accuracy", "max") if spikes else ("val_loss", "min")))
            _say(datamodule.summary())
        resumption = _Resumption()
        self.callbacks.insert(0, resumption)  # type: ignore[has-type]
        try:
            super().fit(model, train_dataloaders, val_dataloaders, datamodule, ckpt_path, weights_only=True)
        except Exception as error:
            if ckpt_path is None or resumption.done or isinstance(error, OSError | MisconfigurationException):
                raise
            raise ValueError(
                f"{ckpt_path} is damaged, or of another run or version: it cannot be gone on from; to start from its "
                f"weights alone, give it as --model.weights ({type(error).__name__}: {printable(error)[:150]})"
            ) from error
        finally:
            self.callbacks.remove(resumption)  # type: ignore[has-type]
        if self._best_path:
            _say(f"wrote {os.path.relpath(self._best_path)}")
            if isinstance(model, Classifier) and isinstance(model.network, TrainableNetwork) and self.is_global_zero:
                best = copy.deepcopy(model).cpu().eval()
                load_checkpoint(best, self._best_path)
                assert isinstance(best.network, TrainableNetwork)
                snn = _with_notes(best.network.to_spiking(), model, datamodule)
                path = self._file(None, "snn.safetensors")
                snn.save(path)
                print(f"wrote {os.path.relpath(path)}")

    def _keep_best(self, monitor: str, mode: str) -> None:
        """Let the checkpoint that is kept as the best be the best of these, unless the user gave others."""
        if self._best is None or self._best.monitor == monitor:
            return
        fresh = _best_checkpoint(self._best.dirpath, monitor, mode)
        callbacks: list[lightning.Callback] = self.callbacks  # type: ignore[has-type]
        self.callbacks = [fresh if each is self._best else each for each in callbacks]
        self._best = fresh

    @property
    def _best_path(self) -> str:
        """Path of the best checkpoint that fit wrote; empty without one."""
        return str(getattr(self.checkpoint_callback, "best_model_path", ""))

    def _file(self, given: str | None, default: str) -> Path:
        """A file to read or write: the one given, or that of the trainer's folder."""
        return Path(self.default_root_dir) / default if given is None else Path(given)

    def validate(  # type: ignore[override]
        self,
        model: Any = None,
        dataloaders: Any = None,
        ckpt_path: str | None = None,
        verbose: bool = True,
        datamodule: Any = None,
    ) -> Any:
        """Loss and accuracy of the network on the validation images.

        Args:
            model: The classifier.
            dataloaders: Not used on the command line.
            ckpt_path: Checkpoint that fit wrote; without it the model is taken as it is (--model.weights).
            verbose: Print the figures.
            datamodule: Its data.
        """
        if isinstance(model, Classifier):
            _load_trained(model, ckpt_path, datamodule)
            ckpt_path = None
        return super().validate(model, dataloaders, ckpt_path, verbose, datamodule)

    def convert(
        self,
        model: Classifier,
        datamodule: Any,
        ckpt_path: str | None = None,
        output: str | None = None,
        t_max: int | dict[str, int] = 16,
        hold: bool = True,
        rectifier: Rectifier = "spike",
        bias: BiasCode = "synapse",
        percentile: float = 99.9,
        output_percentile: float = 100.0,
        granularity: Literal["layer", "channel"] = "layer",
        calibration_method: str = "percentile",
        tuning_passes: int = 6,
        tuning_rate: float = 0.01,
        first_layer: FirstLayer = "spiking",
        total_steps: int | None = None,
        layers: dict[str, dict[str, Any]] | None = None,
        verify_images: int = 500,
    ) -> SpikingNetwork:
        """Turn a checkpoint (or --model.weights) into a spiking network in one .safetensors file.

        Args:
            model: The classifier.
            datamodule: Its data; calibrated on training images only.
            ckpt_path: Checkpoint that fit wrote; without it the model is taken as it is.
            output: File to write; default snn.safetensors in the trainer's folder.
            t_max: T: every value is one of T levels, and a layer takes T - 1 steps. Or one for each layer or block, the
                input and the output, and "default" for the rest: '{"default": 8, "input": 32}'.
            hold: No neuron may fire before its readout; false is the paper's neuron.
            rectifier: Zeros are said by a forced spike ("spike", the paper's) or by silence ("silent").
            bias: A bias as a synapse, or as the authors' spike in time (with hold false only).
            percentile: Percentile of each ReLU's values that becomes the value 1.
            output_percentile: The same for the output, of the size of the logits.
            granularity: One scale for each layer, or for each channel.
            calibration_method: Where scales come from (percentile, least_squares, search), and what follows, joined by
                +: bias_correction, tune or distill, output; or best. No labels are needed.
            tuning_passes: How often tune and distill see every calibration image.
            tuning_rate: How fast they learn: Adam's highest rate, as a share of the size of each layer's weights and
                scale.
            first_layer: Let spikes say the image (spiking), or compute the first layer on the image itself (dense).
            total_steps: Steps that an inference may take: windows are then chosen for each layer, in place of t_max.
            layers: Options of single layers or blocks, of the input and the output: '{"input": {"percentile": 100}}'.
            verify_images: Training images on which the spiking network is compared with the ANN; 0 for none.
        """
        _load_trained(model, ckpt_path, datamodule)
        path = self._file(output, "snn.safetensors")
        options = {
            "t_max": t_max,
            "hold": hold,
            "rectifier": rectifier,
            "bias": bias,
            "percentile": percentile,
            "output_percentile": output_percentile,
            "granularity": granularity,
            "calibration_method": calibration_method,
            "tuning_passes": tuning_passes,
            "tuning_rate": tuning_rate,
            "first_layer": first_layer,
            "layers": layers,
        }
        if isinstance(model.network, TrainableNetwork):
            options["first_layer"] = model.network.first_layer
        if total_steps is not None:
            if first_layer == "dense" or any("t_max" in own for own in (layers or {}).values()):
                raise ValueError(
                    "--total_steps gives all windows itself: leave out --first_layer dense, and t_max in --layers"
                )
            _refuse_trained(model, "--total_steps gives windows to an ANN")
            options["t_max"] = self._allocated(model, datamodule, total_steps, granularity)
        snn = self._converted(model, datamodule, options)
        if self.is_global_zero:
            path.parent.mkdir(parents=True, exist_ok=True)
            snn.save(path)
            print(snn.report)
            trained = isinstance(model.network, TrainableNetwork)
            print(
                "windows and scales as trained"
                if trained
                else f"scales from {snn.graph.settings['calibration_method']}"
            )
            print(f"an inference takes {snn.n_steps} steps")
            if verify_images:
                images = datamodule.training_images(verify_images)
                print(f"\nagainst the ANN, on {len(images)} training images:")
                print(quartz_plugin.verify(model.network, snn, images))
            print(f"\nwrote {path}")
        return snn

    def _allocated(
        self, model: Classifier, datamodule: Any, steps: int, granularity: Literal["layer", "channel"]
    ) -> dict[str, int]:
        """Windows for each layer that take so many steps together, measured on training images."""
        images = datamodule.training_images(datamodule.calibration_images)
        with Progress(transient=True, disable=not self.is_global_zero) as progress:
            task = progress.add_task("allocating steps", total=None)

            def show(done: int, total: int) -> None:
                progress.update(task, completed=done, total=total)

            windows = quartz_plugin.allocate_steps(
                model.network, images, steps, granularity=granularity, preprocessing=model.preprocessing, progress=show
            )
        _say(f"--t_max '{json.dumps(windows)}'")
        return windows

    def _converted(self, model: Classifier, datamodule: Any, options: dict[str, Any]) -> SpikingNetwork:
        """Convert a classifier's network, calibrated on training images; all processes share them out."""
        self._start_processes(datamodule)
        calibration = datamodule.calibration_dataloader()
        network = model.network.to(self.strategy.root_device)
        several = self.world_size > 1
        with Progress(transient=True, disable=not self.is_global_zero) as progress:
            task = progress.add_task("calibrating", total=len(calibration.sampler))

            def show(seen: int) -> None:
                progress.update(task, completed=seen)

            def show_tuning(done: int, total: int) -> None:
                progress.update(task, description="tuning", completed=done, total=total)

            snn = quartz_plugin.convert(
                network, calibration, progress=show, tuning_progress=show_tuning, distributed=several,
                preprocessing=model.preprocessing, **options,
            )  # fmt: skip
        model.cpu()
        return _with_notes(snn, model, datamodule).cpu()

    def _start_processes(self, datamodule: Any) -> None:
        """Start the processes of --trainer.devices, and let them know each other, as fit and test do by themselves."""
        datamodule.trainer = self
        launcher = self.strategy.launcher
        if self.world_size > 1 and not isinstance(launcher, _SubprocessScriptLauncher):
            raise ValueError("several processes convert with --trainer.strategy ddp only")
        if launcher is not None:
            launcher.launch(self.strategy.setup_environment, trainer=self)

    def test(  # type: ignore[override]
        self,
        model: Any = None,
        dataloaders: Any = None,
        ckpt_path: str | None = None,
        verbose: bool = True,
        datamodule: Any = None,
        snn: str | None = None,
        engine: Literal["auto", "analytic", "event", "stepped"] = "auto",
        output: str | None = None,
    ) -> Any:
        """Test an ANN checkpoint (--ckpt_path) or a converted network (--snn), or both side by side.

        Args:
            model: The classifier.
            dataloaders: Not used on the command line.
            ckpt_path: Checkpoint of the ANN that fit wrote.
            verbose: Print the figures.
            datamodule: Its data.
            snn: File that convert wrote; with --ckpt_path or --model.weights its agreement with the ANN is measured.
            engine: How the spiking network is simulated: auto, analytic (hold only), event (a CPU) or stepped.
            output: File for the figures, .json or .csv; default test.json and test.csv in the trainer's folder.
        """
        if not isinstance(model, Classifier) or datamodule is None:
            return super().test(model, dataloaders, ckpt_path, verbose, datamodule)
        if output is not None and Path(output).suffix not in (".json", ".csv"):
            raise ValueError(f"--output must end in .json or .csv, got {output}")
        network = _load_both(model, snn, ckpt_path, datamodule)
        figures: dict[str, Figures] = {}
        if model.fitted_on is not None:
            figures |= ann_columns(self._test_ann(model, datamodule))
        if network is not None:
            figures[_named(network)] = self._test_spiking(model, network, datamodule, engine)
        if verbose:
            _say(side_by_side(figures))
        root = Path(self.default_root_dir)
        for path in [root / "test.json", root / "test.csv"] if output is None else [Path(output)]:
            _write_figures(path, figures)
            if verbose:
                _say(f"wrote {path}")
        return list(figures.values())

    def _test_ann(self, model: Classifier, datamodule: Any) -> dict[str, float]:
        """Accuracy and costs of the ANN, on the test images."""
        model.costs = ANNOperations(model.ann, datamodule.test_image().unsqueeze(0))
        try:
            super().test(model, datamodule=datamodule, verbose=False)
        finally:
            model.costs = None
        if not model.figures.get("images"):
            raise ValueError("no image was tested: is --trainer.limit_test_batches 0, or the test set empty?")
        return model.figures

    def _test_spiking(
        self, model: Classifier, network: SpikingNetwork, datamodule: Any, engine: str = "auto"
    ) -> dict[str, float]:
        """All figures of a spiking network, on the test images."""
        _check_size(network, datamodule.test_image())
        _check_names(class_names_of(network.graph.settings), datamodule)
        decisions = None if model.fitted_on is None else model.decisions
        spiking = SpikingClassifier(network, model.classes, decisions, engine, model.cost_images)
        super().test(spiking, datamodule=datamodule, verbose=False)
        return {**spiking.figures, "t_max": float(common_t_max(network))}

    @torch.no_grad()
    def predict(  # type: ignore[override]
        self,
        model: Classifier,
        datamodule: Any,
        images: str | list[str],
        snn: str | None = None,
        ckpt_path: str | None = None,
        top: int = 5,
    ) -> list[dict[str, Any]]:
        """Classify image files: the most likely classes, the step of the decision, and a picture of the spikes.

        Args:
            model: The classifier.
            datamodule: Its data, which says how images are read.
            images: An image file, or several: '[a.jpg, b.jpg]'.
            snn: File that convert wrote; without it the ANN answers (--ckpt_path or --model.weights).
            ckpt_path: Checkpoint of the ANN that fit wrote.
            top: How many classes to show.
        """
        from quartz_plugin import plot

        network = _load_both(model, snn, ckpt_path, datamodule)
        images = [images] if isinstance(images, str) else images
        if not images:
            raise ValueError("no images: give --images a list of files, as --images '[a.jpg, b.jpg]'")
        batch = torch.stack([datamodule.read(path) for path in images])
        if network is not None:
            _check_size(network, batch[0])
        answers: dict[str, torch.Tensor] = {}
        result = None if network is None else network.run(batch)
        if network is not None and result is not None:
            answers[_named(network)] = result.logits
        if model.fitted_on is not None:
            answers["ANN"] = model.eval()(batch)
        names = (class_names_of(network.graph.settings) if network else []) or list(datamodule.class_names)
        alike = len({Path(path).stem for path in images}) < len(images)
        found = []
        for number, path in enumerate(images):
            decided = None if result is None else int(result.decision_steps[number])
            when = "" if decided is None else f"  decided at step {decided} of {network.n_steps}"  # type: ignore[union-attr]
            tops = {who: top_classes(class_scores(logits)[number], top, names) for who, logits in answers.items()}
            ranks = zip(*tops.values(), strict=True)
            print(f"{printable(path)}{when}")
            print(format_table([*tops], [[f"{name}  {100 * share:.1f} %" for name, share in rank] for rank in ranks]))
            found.append({"image": path, "decision_step": decided, **tops})
            if result is not None:
                stem = f"{number + 1}_{Path(path).stem}" if alike else Path(path).stem
                picture = Path(self.default_root_dir) / f"{stem}_raster"
                drawn = save_pictures(picture.parent, {picture.name: partial(plot.raster, result, number)})
                print(f"wrote {printable(drawn[picture.name])}\n")
        return found

    def figures(
        self,
        model: Classifier,
        datamodule: Any,
        sweep: str | None = None,
        calibrated: list[str] | None = None,
        trained: list[str] | None = None,
        output: str | None = None,
    ) -> None:
        """Draw a sweep: error against T_max, steps, operations and energy, with the figures of the paper and of others.

        Args:
            model: The classifier, which knows the published figures.
            datamodule: Not used.
            sweep: CSV file that sweep wrote; default sweep.csv in the trainer's folder.
            calibrated: JSON files that test wrote of networks that convert tuned, on the same images.
            trained: The same, of networks trained with t_max.
            output: Folder for the pictures; default the file's.
        """
        path = self._file(sweep, "sweep.csv")
        if not path.is_file():
            raise FileNotFoundError(f"no sweep {path}: sweep writes it")
        rows = _rows_of(path)
        if not rows:
            raise ValueError(f"{path} has no whole row")
        # The latest sweep stands first; others are of another network, other images or options.
        same = ("network", "layers", "images", "calibration_images")
        drawn = [row for row in rows if all(row.get(name) == rows[0].get(name) for name in same)]
        if len(drawn) < len(rows):
            _say(f"{len(rows) - len(drawn)} rows of other networks, images or layers are left out")
        others = {
            name: [figures for file in files or [] for figures in _spiking_figures(file)]
            for name, files in (("calibrated", calibrated), ("trained", trained))
        }
        images = rows[0].get("images")
        for name, found in others.items():
            if strange := {figures["images"] for figures in found} - {images}:
                raise ValueError(f"the sweep is of {_rounded(images)} images, and --{name} of {strange}")
        self._draw_sweep(model, drawn, Path(output) if output is not None else path.parent, others)

    def _draw_sweep(
        self,
        model: Classifier,
        rows: list[dict[str, Any]],
        folder: Path,
        others: Mapping[str, Sequence[Mapping[str, float]]] = MappingProxyType({}),
    ) -> None:
        # What was published of other images has no place beside these.
        alike = rows[0].get("classes", model.published_classes) == model.published_classes
        beside = {**others, **(model.published if alike else {})}
        pictures = pictures_of_sweep(
            _as_calibrated(rows), rows[0]["ann_accuracy"], {name: of for name, of in beside.items() if of}
        )
        for picture in (_save_pictures(folder, pictures) or {}).values():
            _say(f"wrote {picture}")

    def run(
        self,
        model: Classifier,
        datamodule: Any,
        t_max: int = 16,
        hold: bool = True,
        percentile: float = 99.9,
        output_percentile: float = 99.0,
        granularity: Literal["layer", "channel"] = "channel",
    ) -> None:
        """Fit, convert, test, and end with one table and four pictures.

        Args:
            model: The classifier.
            datamodule: Its data.
            t_max: T: every value is one of T levels, and a layer takes T - 1 steps.
            hold: No neuron may fire before its readout; false is the paper's neuron.
            percentile: Percentile of each ReLU's values that becomes the value 1.
            output_percentile: The same for the output, of the size of the logits.
            granularity: One scale for each layer, or for each channel.
        """
        root = Path(self.default_root_dir)
        self.fit(model, datamodule=datamodule)
        best = self._best_path
        if best:
            load_checkpoint(model, best)
        options: dict[str, Any] = {
            "t_max": t_max,
            "hold": hold,
            "percentile": percentile,
            "output_percentile": output_percentile,
            "granularity": granularity,
        }
        snn = self.convert(model, datamodule, **options)
        silent = self._converted(model, datamodule, {**options, "rectifier": "silent"})
        figures = ann_columns(self._test_ann(model, datamodule))
        for name, network in ((f"SNN, T = {t_max}", snn), ("the same, silent zeros", silent)):
            figures[name] = self._test_spiking(model, network, datamodule)
        images = next(iter(datamodule.test_dataloader()))[0][:PICTURED]
        pictures = _save_pictures(root, pictures_of(model.network, silent, images))
        _say("\n" + side_by_side(figures))
        _say("\nbest checkpoint   " + (os.path.relpath(best) if best else "none"))
        _say(f"spiking network   {root / 'snn.safetensors'}")
        for name, path in (pictures or {}).items():
            _say(f"{name:<17} {path}")

    def costs(
        self,
        model: Classifier,
        datamodule: Any,
        ckpt_path: str | None = None,
        t_max: list[int] = [4, 16],  # noqa: B006
        rate_steps: list[int] = [8, 32],  # noqa: B006
        percentile: float = 99.0,
        output_percentile: float = 99.0,
        granularity: Literal["layer", "channel"] = "layer",
        loihi_t_max: list[int] = [8, 16, 32, 64],  # noqa: B006
        output: str | None = None,
    ) -> None:
        """What an inference costs: ANN, rate code and Quartz side by side under the same counts, and on Loihi.

        Args:
            model: The classifier.
            datamodule: Its data; calibrated on training images only.
            ckpt_path: Checkpoint that fit wrote; without it the model is taken as it is (--model.weights).
            t_max: The T to convert at, each with the paper's neuron (forced zeros) and with silent zeros.
            rate_steps: Steps of the rate-coded networks, made of the same ANN and normalisation.
            percentile: Percentile of each ReLU's values that becomes the value 1.
            output_percentile: The same for the output, of the size of the logits.
            granularity: One scale for each layer, or for each channel.
            loihi_t_max: The T to map to Loihi, with the paper's neuron.
            output: CSV file to write; default costs.csv in the trainer's folder, pictures beside it.
        """
        from quartz_plugin import plot

        _load_trained(model, ckpt_path, datamodule)
        path = self._file(output, "costs.csv")
        path.parent.mkdir(parents=True, exist_ok=True)
        scales: dict[str, Any] = {
            "percentile": percentile, "output_percentile": output_percentile, "granularity": granularity,
        }  # fmt: skip
        figures = ann_columns(self._test_ann(model, datamodule))
        rate = RateCodedNetwork(self._converted(model, datamodule, {"t_max": min(t_max), **scales}))
        for steps in rate_steps:
            tested = RateClassifier(rate, steps, model.classes, model.decisions, model.cost_images)
            super().test(tested, datamodule=datamodule, verbose=False)
            figures[f"rate code, {steps} steps"] = tested.figures
        mappings, estimates = {}, {}
        for t in sorted({*t_max, *loihi_t_max}):
            paper = self._converted(model, datamodule, {"t_max": t, **scales, **quartz_plugin.PAPER})
            found = self._test_spiking(model, paper, datamodule)
            if t in t_max:
                figures[f"Quartz, T = {t}"] = found
                silent = self._converted(model, datamodule, {"t_max": t, **scales, "rectifier": "silent"})
                figures[f"silent zeros, T = {t}"] = self._test_spiking(model, silent, datamodule)
            if t in loihi_t_max:
                mappings[t] = map_to_loihi(paper)
                estimates[t] = mappings[t].cores, mappings[t].estimate(found)
        _write_csv(path, [{"network": name, **of} for name, of in figures.items()])
        _say("\n" + side_by_side(figures))
        bars = {name: of.get("synops", of.get("macs", 0.0)) for name, of in figures.items()}
        label = "synaptic operations an inference, spikes x synapses (the ANN's: MACs)"
        pictures: dict[str, Any] = {"synops": lambda: plot.counts_per_layer(bars, quantity=label)}
        if mappings:
            largest = mappings[max(mappings)]
            _say(f"\nT = {max(mappings)} on Loihi 1:\n{largest}\n\n{loihi_table(estimates, model.measured_on_loihi)}")
            products = {f"Quartz, T = {t}, estimated": e.energy_delay_product for t, (_, e) in estimates.items()}
            products |= model.measured_products
            pictures["energy_delay"] = lambda: plot.energy_delay_bars(products)
            by_name = {p.name: p for p in largest.populations}
            pictures["cores"] = lambda: plot.cores_per_layer(
                {name: p.cores for name, p in by_name.items()},
                binding={name: p.binding for name, p in by_name.items()},
            )
        _say(f"\nwrote {path}")
        for picture in (_save_pictures(path.parent, pictures) or {}).values():
            _say(f"wrote {picture}")

    def sweep(
        self,
        model: Classifier,
        datamodule: Any,
        ckpt_path: str | None = None,
        t_max: list[int] = [2, 4, 8, 16, 32],  # noqa: B006
        percentile: list[float] = [99.0],  # noqa: B006
        hold: list[bool] = [False, True],  # noqa: B006
        rectifier: list[Rectifier] = ["spike", "silent"],  # noqa: B006
        bias: list[BiasCode] = ["spike", "synapse"],  # noqa: B006
        output_percentile: float = 99.0,
        granularity: Literal["layer", "channel"] = "layer",
        calibration_method: list[str] = ["percentile"],  # noqa: B006
        tuning_passes: int = 6,
        tuning_rate: float = 0.01,
        layers: dict[str, dict[str, Any]] | None = None,
        output: str | None = None,
        resume: bool = True,
    ) -> None:
        """Convert at every combination of T_max, percentile and neuron, and test each: a CSV, a table, pictures.

        Args:
            model: The classifier.
            datamodule: Its data; calibrated on training images only.
            ckpt_path: Checkpoint that fit wrote; without it the model is taken as it is (--model.weights).
            t_max: The T to convert at.
            percentile: Percentiles of each ReLU's values that become the value 1.
            hold: Whether neurons may fire before their readout (false: they may, as the paper's).
            rectifier: How zeros are said.
            bias: How biases arrive; "spike" goes with hold false and rectifier spike, and is left out elsewhere.
            output_percentile: The percentile for the output, of the size of the logits.
            granularity: One scale for each layer, or for each channel.
            calibration_method: As of convert, one or several.
            tuning_passes: How often tune and distill see every calibration image.
            tuning_rate: How fast they learn, as of convert.
            layers: Options of single layers or blocks, of the input and the output, as of convert.
            output: File to write; default sweep.csv in the trainer's folder, pictures beside it.
            resume: Take the rows of that file that are of this network, these images and these options, and leave the
                others in it; without it the file is written anew.
        """
        _load_trained(model, ckpt_path, datamodule)
        _refuse_trained(model, "sweep converts an ANN at several T")
        path = self._file(output, "sweep.csv")
        path.parent.mkdir(parents=True, exist_ok=True)
        points = [
            {
                "t_max": t, "percentile": p, "output_percentile": output_percentile, "granularity": granularity,
                "calibration_method": method, "hold": held, "bias": b, "rectifier": r,
            }
            for method, t, p, held, b, r in itertools.product(
                calibration_method, t_max, percentile, hold, bias, rectifier
            )
            if b == "synapse" or (not held and r == "spike")
        ]  # fmt: skip
        if not points:
            raise ValueError(
                'there is nothing to convert: bias "spike" goes with hold false and rectifier "spike" only'
            )
        done = _rows_of(path) if resume else []
        ann = self._test_ann(model, datamodule)
        fixed = {
            "network": _digest(model.network),
            "classes": model.classes,
            "layers": json.dumps(layers, sort_keys=True) if layers else "",
            "images": ann["images"],
            "cost_images": ann["cost_images"],
            "calibration_images": len(datamodule.calibration_dataloader().dataset),
            "ann_accuracy": ann["accuracy"],
            "ann_macs": ann["macs"],
        }
        rows: list[dict[str, Any]] = []
        for number, options in enumerate(points, 1):
            started = time.perf_counter()
            tuning = {"tuning_passes": tuning_passes, "tuning_rate": tuning_rate}
            asked = {**options, **fixed, **(tuning if _tunes(str(options["calibration_method"])) else {})}
            row = next((old for old in done if _same(old, asked)), None)
            if row is None:
                snn = self._converted(model, datamodule, {**options, **tuning, "layers": layers})
                figures = self._test_spiking(model, snn, datamodule)
                calibrated_by = snn.graph.settings["calibration_method"]
                row = {
                    **asked,
                    **tuning,
                    "calibrated_by": calibrated_by,
                    **{column: figures[column] for column in SWEEP_COLUMNS},
                }
                took = f"{time.perf_counter() - started:.0f} s"
            else:
                took = "kept"
            rows.append(row)
            # Rows of other sweeps, and what is not reached yet, stay.
            _write_csv(path, [*rows, *(old for old in done if not any(old is kept for kept in rows))])
            said = ", ".join(f"{name} {options[name]}" for name in SWEEP_OPTIONS)
            _say(f"{number} of {len(points)}: {said}: {took}", flush=True)
        _say(f"\nANN accuracy {100 * ann['accuracy']:.2f} %, {fixed['images']:,.0f} test images")
        shown = [
            name
            for name in (*SWEEP_OPTIONS, *SWEEP_PRINTED)
            if name != "calibration_method" or calibration_method != ["percentile"]
        ]
        _say(format_table(shown, [[_rounded(row[name]) for name in shown] for row in _as_calibrated(rows)]))
        _say(f"\nwrote {path}")
        self._draw_sweep(model, rows, path.parent)


class QuartzCLI(LightningCLI):
    """``python RECIPE.py fit | validate | convert | test | predict | run | sweep | figures | costs``.

    Parameters
    ----------
    model_class : type
        A :class:`~quartz_plugin.lightning.Classifier`.
    datamodule_class : type
        A :class:`~quartz_plugin.lightning.ClassificationData`.
    **options
        Those of :class:`lightning.pytorch.cli.LightningCLI`; ``trainer_defaults`` above all.
    """

    def __init__(self, model_class: Any, datamodule_class: Any, **options: Any) -> None:
        options.setdefault("seed_everything_default", 0)
        options.setdefault("save_config_kwargs", {"overwrite": True})
        super().__init__(
            model_class,
            datamodule_class,
            trainer_class=QuartzTrainer,
            auto_configure_optimizers=False,
            # Stored hyperparameters would silently win over --model.* flags.
            load_from_checkpoint_support=False,
            **options,
        )

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Return the subcommands, and the arguments of theirs that the command line does not show."""
        return {
            "fit": {"model", "train_dataloaders", "val_dataloaders", "datamodule"},
            "validate": _SKIP,
            "test": _SKIP,
            "convert": {"model", "datamodule"},
            "run": {"model", "datamodule"},
            "predict": {"model", "datamodule"},
            "sweep": {"model", "datamodule"},
            "figures": {"model", "datamodule"},
            "costs": {"model", "datamodule"},
        }

    def add_arguments_to_parser(self, parser: Any) -> None:
        """A model that is told its number of classes hears it from the data."""
        if isinstance(self._model_class, type) and issubclass(self._model_class, ImageClassifier):
            parser.link_arguments("data", "model.classes", _classes_of, apply_on="instantiate")

    def init_parser(self, **kwargs: Any) -> Any:
        """A parser that raises what is wrong, for one line, in place of printing all options."""
        return super().init_parser(**{**kwargs, "exit_on_error": False})

    def _parse_ckpt_path(self) -> None:
        # Lightning would read the file here, for hyperparameters that we do not store.
        pass

    def parse_arguments(self, parser: Any, args: Any) -> None:
        """Parse options and files of options; what such a file breaks is told in one line, too."""
        try:
            super().parse_arguments(parser, args)
        except (argparse.ArgumentError, OSError, ValueError, ImportError, MisconfigurationException):
            raise
        except Exception as error:
            raise ValueError(
                f"cannot read the options, or a file of theirs as --config ({type(error).__name__}: "
                f"{printable(error)[:100]})"
            ) from error

    @classmethod
    def main(cls, model_class: Any, datamodule_class: Any, **options: Any) -> None:
        """Run the command line; what a user can mend ends in one line, not in a traceback."""
        # best.ckpt and last.ckpt lie beside the logs, and are meant to be overwritten.
        warnings.filterwarnings("ignore", message="Checkpoint directory .* exists and is not empty")
        try:
            cls(model_class, datamodule_class, **options)
        except argparse.ArgumentError as error:
            recipe, *rest = sys.argv
            command = next((word for word in rest if word in cls.subcommands()), "")
            what = f"{_line(error)} (python {recipe} {command} --help lists the options)"
            sys.exit(f"error: {what}".replace("  ", " "))
        except (OSError, ValueError, ImportError, MisconfigurationException) as error:
            sys.exit(f"error: {_line(error)}")


def _line(error: Exception) -> str:
    """What an error says, in one line without control characters."""
    text = str(error)
    if "Original Traceback" in text:  # Of a process that loads data.
        _, _, text = text.strip().splitlines()[-1].partition(": ")
    return " ".join(printable(text).split())


def _classes_of(data: ClassificationData) -> int:
    """Number of classes, 0 where the images are not there: what uses them says so."""
    try:
        return data.classes
    except (OSError, ValueError):
        return 0


def _load_both(model: Classifier, snn: str | None, ckpt_path: str | None, datamodule: Any) -> SpikingNetwork | None:
    """Load the spiking network, if there is one, and the ANN, which may be missing only beside it."""
    network = None if snn is None else load(snn)
    if network is not None:
        try:
            class_names_of(network.graph.settings)
        except ValueError as error:
            raise ValueError(f"{snn} is damaged: {error}") from error
    if network is None or ckpt_path is not None:
        _load_trained(model, ckpt_path, datamodule)
    return network


def _load_trained(model: Classifier, ckpt_path: str | None, datamodule: Any) -> None:
    """Load a checkpoint if there is one; refuse a network that nobody has trained, or of other classes."""
    if ckpt_path is not None:
        load_checkpoint(model, ckpt_path)
    _check_names(model.class_names, datamodule)
    if model.fitted_on is None:
        raise ValueError(model.untrained)


def _check_size(network: SpikingNetwork, image: torch.Tensor) -> None:
    given, wanted = list(image.shape), list(network.graph.image_shape)
    if given != wanted:
        raise ValueError(
            f"the spiking network takes images of {wanted}, the data gives {given}: give the --data options that "
            f"it was converted with (--data.size {wanted[-1]})"
        )


def _check_names(known: Sequence[str] | None, datamodule: Any) -> None:
    """Raise ValueError where a network was made for other classes than the data has."""
    given = list(getattr(datamodule, "class_names", ()))
    if known and given and list(known) != given:
        other = next(((a, b) for a, b in zip(known, given, strict=False) if a != b), (len(known), len(given)))
        raise ValueError(
            f"the network was made for other classes than the data has (first difference: {other[0]}, {other[1]}): "
            "give the --data.root that it was made for"
        )


def _digest(network: torch.nn.Module) -> str:
    """Tells a network from others by its weights."""
    digest = hashlib.sha256()
    for name, tensor in network.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return "sha256:" + digest.hexdigest()[:16]


def _rows_of(path: Path) -> list[dict[str, Any]]:
    """Whole rows of a sweep's file, if there is one; numbers as numbers.

    Raises
    ------
    ValueError
        If it is a file of something else, or a cell holds what sweep does not write.
    """
    if not path.is_file():
        return []
    try:
        text = path.read_text(encoding="utf-8-sig")
        reader = csv.DictReader(io.StringIO(text, newline=""))
        rows = [(reader.line_num, row) for row in reader]
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path} is no file of a sweep; give another --output") from error
    if not {"t_max", "network", "ann_accuracy", *SWEEP_COLUMNS} <= set(reader.fieldnames or ()):
        raise ValueError(f"{path} is no file of a sweep (its columns are missing); give another --output")
    # A line without its end was cut off while it was written.
    whole = rows if text.endswith(("\n", "\r")) else rows[:-1]
    values = []
    for line, row in whole:
        if None in row or None in row.values():
            raise ValueError(f"{path}, line {line}: not as many cells as columns; mend or remove it")
        # Versions that had fewer figures wrote none of the others.
        if any(row[name] == "" for name in SWEEP_COLUMNS):
            continue
        found = {name: _value(cell) for name, cell in row.items()}
        if wrong := next((name for name, right in _CELLS.items() if not right(found.get(name))), None):
            cell = printable(row.get(wrong))[:40]
            raise ValueError(f"{path}, line {line}: '{cell}' in column {wrong}; mend or remove the line")
        values.append(found)
    # Versions whose tuning was another wrote no rate.
    return [
        row for row in values if "tuning_rate" in row or not _tunes(str(row.get("calibration_method", "percentile")))
    ]


def _is_number(value: Any) -> bool:
    """Whether it is a number that can be drawn and printed; NaN is, where there was nothing to count."""
    return isinstance(value, int | float) and not isinstance(value, bool) and (value != value or abs(value) < 1e100)


def _is_share(value: Any) -> bool:
    return _is_number(value) and 0 <= value <= 1


def _is_method(value: Any) -> bool:
    try:
        return value is None or bool(CalibrationMethod.parse(str(value)))
    except ValueError:
        return False


_CELLS: dict[str, Callable[[Any], bool]] = {
    **dict.fromkeys(SWEEP_COLUMNS, _is_number),
    "accuracy": _is_share,
    "ann_accuracy": _is_share,
    "t_max": lambda value: type(value) is int and value >= 2,
    "images": lambda value: value is None or _is_number(value),
    "calibration_method": _is_method,
    "calibrated_by": lambda value: value == "" or _is_method(value),
    "tuning_rate": lambda value: value in (None, "") or _is_number(value),
}
"""Columns of a sweep's file -> whether a value may stand there; None where the column is not there."""


def _tunes(calibration_method: str) -> bool:
    return bool(CalibrationMethod.parse(calibration_method).refinements & TUNING)


def _as_calibrated(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Rows of a sweep as they are shown: under the calibration that was carried out."""
    return [
        {**row, "calibration_method": row.get("calibrated_by") or row.get("calibration_method", "")} for row in rows
    ]


def _value(text: str) -> Any:
    if text in ("True", "False"):
        return text == "True"
    # Python also takes 1_000, and digits without end.
    if "_" in text or len(text) > 40:
        return text
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def _same(row: dict[str, Any], asked: dict[str, Any]) -> bool:
    """Whether a row of a file is of these options and this network."""
    return all(row.get(name) == value for name, value in asked.items())


def load_checkpoint(model: Classifier, path: str) -> Mapping[str, Any]:
    """Load a checkpoint of Lightning's into a classifier, running no code from it; returns all that it holds.

    Raises
    ------
    FileNotFoundError, ValueError
        If it is not there, not readable, or of another network.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"no checkpoint {path}: fit writes best.ckpt and last.ckpt")
    checkpoint = read_file(path, "checkpoint of Lightning's")
    state = checkpoint.get("state_dict")
    if not isinstance(state, Mapping) or not all(isinstance(name, str) for name in state):
        raise ValueError(
            f"{path} is not a readable checkpoint of Lightning's (it holds no state_dict): give weights that fit did "
            "not write as --model.weights"
        )
    try:
        if checkpoint.get(SPIKES) is not None:
            _restore_spikes(model, checkpoint[SPIKES], state)
        if misfit := compare(
            *({n: v for n, v in of.items() if torch.is_tensor(v)} for of in (state, model.state_dict()))
        ):
            raise ValueError(str(misfit))
        model.load_state_dict(state)
    except Exception as error:
        arch = f" than --model.arch {model.arch}" if isinstance(model, ImageClassifier) else ""
        reason = printable(error)[:200]
        if not isinstance(error, ValueError | RuntimeError):
            reason = f"{type(error).__name__}: {reason}"
        raise ValueError(
            f"{path} is a checkpoint of another network{arch}, or of other classes than the data's {model.classes}: "
            "give the --model and --data options it was fitted with, or, if another program wrote it, give it as "
            f"--model.weights ({reason})"
        ) from error
    try:
        model.on_load_checkpoint(dict(checkpoint))
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    return checkpoint


def _restore_spikes(model: Classifier, told: Any, state: Mapping[str, Any]) -> None:
    """Make a classifier's network the one for few steps that a checkpoint is told of; raises whatever is wrong."""
    options = {name: told.get(name, 0.0) if name == "mixup" else told[name] for name in _TRAINED}
    for name, right in _TRAINED.items():
        if not right(options[name]):
            raise ValueError(f"its {name} is {printable(repr(options[name]))[:40]}")
    # What it holds itself is the most that it may ask for; of images, as many values as they may have pixels.
    largest = max((value.numel() for value in state.values() if torch.is_tensor(value)), default=0)
    for sizes, most in [(told["input_shape"], MOST_PIXELS), *((sizes, largest) for sizes in told["scales"].values())]:
        if not all(type(size) is int and size > 0 for size in sizes) or math.prod(sizes) > most:
            raise ValueError(f"it has values of {printable(repr(sizes))[:40]}")
    if not isinstance(model.network, TrainableNetwork):
        model.train_spikes(restored(model.network, told, model.preprocessing))
    for name, value in options.items():
        setattr(model, name, float(value))


_TRAINED: dict[str, Callable[[Any], bool]] = {
    "distillation": _is_share,
    "relative_lr": lambda value: _is_number(value) and value >= 0,
    "mixup": _is_share,
}
"""How a network for few steps is trained, as its checkpoint is told -> whether a value may stand there."""


def _check_resumable(checkpoint: Mapping[str, Any], path: str) -> None:
    """Raise ValueError where a run cannot go on from a checkpoint, as far as that shows before it does."""
    wanted = {
        "epoch": int, "global_step": int, "loops": dict, "optimizer_states": list, "lr_schedulers": list,
        "callbacks": dict,
    }  # fmt: skip
    absent = [name for name, kind in wanted.items() if type(checkpoint.get(name)) is not kind]
    # Lightning begins anew where these two are not there.
    if not absent and not {"epoch_progress", "epoch_loop.batch_progress"} <= set(
        checkpoint["loops"].get("fit_loop", ())
    ):
        absent = ["its counters"]
    counters = [checkpoint.get("epoch"), checkpoint.get("global_step"), checkpoint.get("loops")]
    while not absent and counters:
        counter = counters.pop()
        if isinstance(counter, dict):
            counters += counter.values()
        elif type(counter) is not bool and (type(counter) is not int or not 0 <= counter < 1 << 53):
            absent = ["its counters"]
    rates = [] if absent else [checkpoint["optimizer_states"], checkpoint["lr_schedulers"]]
    while rates:
        rate = rates.pop()
        if isinstance(rate, dict | list):
            rates += rate.values() if isinstance(rate, dict) else rate
        elif isinstance(rate, float) and not math.isfinite(rate):
            absent = ["its learning rates"]
    # What the keeper of the best checkpoint is told is used only when it keeps the next.
    for name, state in [] if absent else checkpoint["callbacks"].items():
        if str(name).startswith(ModelCheckpoint.__name__) and not _is_keeper(state):
            absent = ["its best checkpoint"]
    if absent:
        raise ValueError(
            f"{path} holds no run that could go on ({', '.join(absent)}): give it as --model.weights, to start from "
            "its weights"
        )


def _refuse_trained(model: Classifier, why: str) -> None:
    """Raise ValueError where the network was trained for windows of its own."""
    if isinstance(model.network, TrainableNetwork):
        raise ValueError(
            f"{why}, and this checkpoint was trained for spikes: its windows are its own; use convert or test"
        )


def _is_keeper(state: Any) -> bool:
    """Whether it is what a ModelCheckpoint keeps: paths, and losses or accuracies."""
    if not isinstance(state, dict) or not isinstance(state.get("best_k_models"), dict):
        return False
    scores = [state.get(name) for name in ("best_model_score", "current_score", "kth_value")]
    scores += state["best_k_models"].values()
    paths = [state.get(name) for name in ("best_model_path", "kth_best_model_path", "last_model_path", "dirpath")]
    paths += state["best_k_models"]
    return all(score is None or (torch.is_tensor(score) and score.numel() == 1) for score in scores) and all(
        isinstance(path, str) for path in paths
    )


def _check_windows(model: Classifier, ckpt_path: str, t_max: int | dict[str, int] | None) -> None:
    """Raise ValueError where a run that goes on is not the one that was cut off."""
    trained = model.network.t_max if isinstance(model.network, TrainableNetwork) else None
    if trained is None and t_max is not None:
        raise ValueError(f"{ckpt_path} is of an ANN: to train from it with t_max, give it as --model.weights")
    asked = [] if t_max is None else list(t_max.values()) if isinstance(t_max, dict) else [t_max]
    if trained is not None and not set(asked) <= set(trained.values()):
        raise ValueError(f"{ckpt_path} was trained with t_max {trained}: leave --t_max out to go on")
    if model.distillation and not model.teacher:
        raise ValueError(f"{ckpt_path} was taught by an ANN: give its --model.weights again")


def _check_mixup(mixup: float, ckpt_path: str | None, taught: bool) -> None:
    """Raise ValueError where images are to be mixed and are not."""
    if mixup and ckpt_path is not None:
        raise ValueError(f"a run that goes on mixes as it did before: leave --mixup out beside --ckpt_path {ckpt_path}")
    if mixup and not taught:
        raise ValueError(
            "--mixup mixes images where an ANN teaches: give --t_max and --model.weights, and a --distillation greater "
            "than 0, or leave it out"
        )


def _with_notes(snn: SpikingNetwork, model: Classifier, datamodule: Any) -> SpikingNetwork:
    """Tell a network what it was fitted on, and the names of its classes."""
    snn.graph.settings[FITTED_ON] = model.fitted_on
    snn.graph.settings[CLASS_NAMES] = list(datamodule.class_names)
    return snn


def _named(network: SpikingNetwork) -> str:
    """Its T: that of most layers, and what input and output have of their own."""
    *_, last = windows = {name: window.length + 1 for name, window in network.windows.items()}
    inner, common = inner_windows(network), common_t_max(network)
    own = [f"{name} {t}" for name, t in ((INPUT, windows[INPUT]), ("output", windows[last])) if t != common]
    own += ["others differ"] if len(set(inner)) > 1 else []
    return f"SNN, T = {common}" + (f" ({', '.join(own)})" if own else "")


def top_classes(logits: torch.Tensor, count: int, names: Sequence[str]) -> list[tuple[str, float]]:
    """The `count` most likely classes of one image's logits ``[classes]``, and their softmax.

    Examples
    --------
    >>> top_classes(torch.tensor([0.0, 2.0, 0.0]), 1, ["cat", "dog", "owl"])[0][0]
    'dog'
    """
    shares, classes = logits.softmax(0).topk(min(count, len(logits)))
    named = len(names) == len(logits)
    return [
        (names[number] if named else f"class {number}", share)
        for number, share in zip(classes.tolist(), shares.tolist(), strict=True)
    ]


@rank_zero_only
def _write_figures(path: Path, figures: dict[str, Figures]) -> None:
    rows = [{"network": name, **of} for name, of in figures.items()]
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".csv":
        write_csv(path, rows)
    else:
        write_atomically(path, (json.dumps(rows, indent=2) + "\n").encode())


def _spiking_figures(path: str) -> list[dict[str, Any]]:
    """The figures of the spiking networks in a file that test wrote.

    Raises
    ------
    FileNotFoundError, ValueError
        If there is no such file, or it holds none.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"no file {path}: test writes test.json")
    try:
        rows = json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not a file that test wrote") from error
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"{path} is not a file that test wrote (no list of networks and their figures)")
    found = [row for row in rows if "t_max" in row]
    if not found:
        raise ValueError(f"{path} holds the figures of no spiking network: give test a network with --snn")
    for row in found:
        for name, right in _FIGURES.items():
            if not right(row.get(name)):
                told = printable(json.dumps(row.get(name)))[:40]
                raise ValueError(f"{path} is not a file that test wrote ({told} as a network's {name})")
        for name, value in row.items():
            if value is not None and not isinstance(value, str) and not _is_number(value):
                raise ValueError(f"{path} is not a file that test wrote (no number as a network's {printable(name)})")
    return found


_FIGURES: dict[str, Callable[[Any], bool]] = {
    "t_max": lambda value: _is_number(value) and value >= 2,
    "accuracy": lambda value: value is None or _is_share(value),
    "images": lambda value: _is_number(value) and value >= 1,
}
"""Figures that test writes of a spiking network -> whether a value may stand there."""


def _rounded(value: Any) -> Any:
    if isinstance(value, float) and math.isfinite(value):
        return int(value) if value == int(value) else round(value, 5)
    return value
