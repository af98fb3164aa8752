"""The command line of the recipes: Lightning's, with ``convert``, ``run`` and ``sweep``."""

from __future__ import annotations

import csv
import io
import itertools
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import lightning
import torch
from lightning.pytorch.callbacks import ModelCheckpoint, RichProgressBar
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from rich.progress import Progress

import quartz_plugin
from quartz_plugin.functional import BiasCode, Rectifier
from quartz_plugin.io import write_atomically
from quartz_plugin.lightning.modules import FITTED_ON, Classifier, SpikingClassifier
from quartz_plugin.network import SpikingNetwork, load
from quartz_plugin.synapses import fan_outs
from quartz_plugin.tables import format_table

_SKIP = {"model", "dataloaders", "datamodule"}

KINDS: tuple[dict[str, Any], ...] = (
    {"hold": False, "bias": "spike", "rectifier": "spike"},
    {"hold": False, "bias": "synapse", "rectifier": "spike"},
    {"hold": False, "bias": "synapse", "rectifier": "silent"},
    {"hold": True, "bias": "synapse", "rectifier": "spike"},
    {"hold": True, "bias": "synapse", "rectifier": "silent"},
)
"""The neurons a sweep compares; the first is the paper's."""

SWEPT = (
    "accuracy",
    "agreement",
    "ties",
    "early_spike_rate",
    "spikes",
    "zero_spikes",
    "synops",
    "synops_merged",
    "operations",
    "decision_steps",
    "steps",
)
"""The figures a sweep writes down."""


class QuartzTrainer(lightning.Trainer):
    """Lightning's Trainer, which also converts.

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
        callbacks = list(callbacks) if isinstance(callbacks, list | tuple) else [callbacks] if callbacks else []
        if kwargs.get("enable_checkpointing") is not False and not any(
            isinstance(callback, ModelCheckpoint) for callback in callbacks
        ):
            callbacks.append(
                ModelCheckpoint(
                    default_root_dir,
                    filename="best",
                    monitor="val_loss",
                    save_last=True,
                    enable_version_counter=False,
                )
            )
        if kwargs.get("enable_progress_bar") is not False and sys.stdout.isatty():
            callbacks.append(RichProgressBar())
        super().__init__(*args, default_root_dir=default_root_dir, logger=logger, callbacks=callbacks, **kwargs)

    def convert(
        self,
        model: Classifier,
        datamodule: Any,
        ckpt_path: str | None = None,
        output: str | None = None,
        t_max: int = 16,
        hold: bool = True,
        rectifier: Rectifier = "spike",
        bias: BiasCode = "synapse",
        percentile: float = 99.9,
        output_percentile: float = 100.0,
        granularity: Literal["layer", "channel"] = "layer",
        verify_images: int = 500,
    ) -> SpikingNetwork:
        """Turn a checkpoint (or --model.weights) into a spiking network in one .safetensors file.

        Args:
            model: The classifier.
            datamodule: Its data; calibrated on training images only.
            ckpt_path: Checkpoint that fit wrote; without it the model is taken as it is.
            output: File to write; default snn.safetensors in the trainer's folder.
            t_max: T: every value is one of T levels, and a layer takes T - 1 steps.
            hold: No neuron may fire before its readout; false is the paper's neuron.
            rectifier: Zeros are said by a forced spike ("spike", the paper's) or by silence ("silent").
            bias: A bias as a synapse, or as the authors' spike in time (with hold false only).
            percentile: Percentile of each ReLU's values that becomes the value 1.
            output_percentile: The same for the output, of the size of the logits.
            granularity: One scale for each layer, or for each channel.
            verify_images: Training images on which the spiking network is compared with the ANN; 0 for none.
        """
        _load_trained(model, ckpt_path)
        path = Path(output) if output is not None else Path(self.default_root_dir) / "snn.safetensors"
        options = {
            "t_max": t_max,
            "hold": hold,
            "rectifier": rectifier,
            "bias": bias,
            "percentile": percentile,
            "output_percentile": output_percentile,
            "granularity": granularity,
        }
        snn = convert_with_progress(model, datamodule, options)
        path.parent.mkdir(parents=True, exist_ok=True)
        snn.save(path)
        print(snn.report)
        if verify_images:
            images = torch.cat([batch[0] for batch in datamodule.calibration_dataloader()])[:verify_images]
            print(f"\nagainst the ANN, on {len(images)} training images:")
            print(quartz_plugin.verify(model.network, snn, images))
        print(f"\nwrote {path}")
        return snn

    def test(  # type: ignore[override]
        self,
        model: Any = None,
        dataloaders: Any = None,
        ckpt_path: str | None = None,
        verbose: bool = True,
        datamodule: Any = None,
        snn: str | None = None,
        engine: Literal["auto", "analytic", "event", "stepped"] = "auto",
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
        """
        if snn is None:
            if isinstance(model, Classifier):
                _load_trained(model, ckpt_path)
                ckpt_path = None
            return super().test(model, dataloaders, ckpt_path, verbose, datamodule)
        network = load(snn)
        if ckpt_path is not None:
            load_checkpoint(model, ckpt_path)
        has_ann = model.fitted_on is not None
        figures = {}
        if has_ann:
            figures["ANN"] = super().test(model, dataloaders, None, False, datamodule)[0]
        spiking = SpikingClassifier(network, model.classes, model.network if has_ann else None, engine)
        figures[f"SNN, T = {network.t_max}"] = super().test(spiking, dataloaders, None, False, datamodule)[0]
        if verbose:
            print(comparison(figures, network, datamodule))
        return list(figures.values())

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
        """Fit, convert, test, and end with one table and two pictures.

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
        best = str(getattr(self.checkpoint_callback, "best_model_path", ""))
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
        silent = convert_with_progress(model, datamodule, {**options, "rectifier": "silent"})
        figures = {"ANN": super().test(model, datamodule=datamodule, verbose=False)[0]}
        for name, network in ((f"SNN, T = {t_max}", snn), ("the same, silent zeros", silent)):
            spiking = SpikingClassifier(network, model.classes, model.network)
            figures[name] = super().test(spiking, datamodule=datamodule, verbose=False)[0]
        image = next(iter(datamodule.test_dataloader()))[0][:1]
        pictures = draw(silent, image, root)
        print("\n" + comparison(figures, snn, datamodule))
        print("\nbest checkpoint   " + (os.path.relpath(best) if best else "none"))
        print(f"spiking network   {root / 'snn.safetensors'}")
        for name, path in pictures.items():
            print(f"{name:<17} {path}")

    def sweep(
        self,
        model: Classifier,
        datamodule: Any,
        ckpt_path: str | None = None,
        t_max: list[int] = [2, 4, 8, 16, 32],  # noqa: B006
        percentile: float = 99.0,
        output_percentile: float = 99.0,
        output: str | None = None,
    ) -> None:
        """Convert at several T_max with every kind of neuron and test each: one CSV and one table.

        Args:
            model: The classifier.
            datamodule: Its data; calibrated on training images only.
            ckpt_path: Checkpoint that fit wrote; without it the model is taken as it is (--model.weights).
            t_max: The T to convert at.
            percentile: Percentile of each ReLU's values that becomes the value 1.
            output_percentile: The same for the output, of the size of the logits.
            output: File to write; default sweep.csv in the trainer's folder.
        """
        _load_trained(model, ckpt_path)
        path = Path(output) if output is not None else Path(self.default_root_dir) / "sweep.csv"
        path.parent.mkdir(parents=True, exist_ok=True)
        ann = super().test(model, datamodule=datamodule, verbose=False)[0]
        rows = []
        points = list(itertools.product(t_max, KINDS))
        for number, (t, kind) in enumerate(points, 1):
            started = time.perf_counter()
            options = {"t_max": t, "percentile": percentile, "output_percentile": output_percentile, **kind}
            snn = convert_with_progress(model, datamodule, options)
            figures = super().test(
                SpikingClassifier(snn, model.classes, model.network), datamodule=datamodule, verbose=False
            )[0]
            rows.append({**options, **{column: figures[column] for column in SWEPT}})
            _write_csv(path, rows)
            print(f"{number} of {len(points)}: {options} {time.perf_counter() - started:.0f} s", flush=True)
        print(f"\nANN accuracy {100 * ann['accuracy']:.2f} %")
        print(format_table(list(rows[0]), [_rounded(row) for row in rows]))
        print(f"\nwrote {path}")


class QuartzCLI(LightningCLI):
    """``python RECIPE.py fit | validate | test | convert | run | sweep``.

    Parameters
    ----------
    model_class : type
        A :class:`~quartz_plugin.lightning.Classifier`.
    datamodule_class : type
        A data module with ``calibration_dataloader()``.
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
            "sweep": {"model", "datamodule"},
        }

    def _parse_ckpt_path(self) -> None:
        # Lightning would read the file here, for hyperparameters that we do not store.
        pass

    @classmethod
    def main(cls, model_class: Any, datamodule_class: Any, **options: Any) -> None:
        """Run the command line; what a user can mend ends in one line, not in a traceback."""
        # best.ckpt and last.ckpt lie beside the logs, and are meant to be overwritten.
        warnings.filterwarnings("ignore", message="Checkpoint directory .* exists and is not empty")
        try:
            cls(model_class, datamodule_class, **options)
        except (OSError, ValueError, ImportError) as error:
            sys.exit(f"error: {error}")


def _load_trained(model: Classifier, ckpt_path: str | None) -> None:
    """Load a checkpoint if there is one; refuse a network that nobody has trained."""
    if ckpt_path is not None:
        load_checkpoint(model, ckpt_path)
    if model.fitted_on is None:
        raise ValueError("the network is untrained: give --ckpt_path (fit writes best.ckpt) or --model.weights")


def _write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, rows[0])
    writer.writeheader()
    writer.writerows(rows)
    write_atomically(path, text.getvalue().encode())


def load_checkpoint(model: Classifier, path: str) -> None:
    """Load a checkpoint of Lightning's into a classifier, running no code from it.

    Raises
    ------
    FileNotFoundError, ValueError
        If it is not there, not readable, or of another network.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"no checkpoint {path}: fit writes best.ckpt and last.ckpt")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        state = checkpoint["state_dict"]
    except Exception as error:
        raise ValueError(f"{path} is not a readable checkpoint of Lightning's") from error
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(f"{path} is a checkpoint of another network: {' '.join(str(error).split())[:300]}") from error
    model.on_load_checkpoint(checkpoint)


def convert_with_progress(model: Classifier, datamodule: Any, options: dict[str, Any]) -> SpikingNetwork:
    """Convert a classifier's network, calibrated on training images, with a progress bar."""
    calibration = datamodule.calibration_dataloader()
    with Progress(transient=True) as progress:
        task = progress.add_task("calibrating", total=len(calibration.dataset))

        def show(seen: int) -> None:
            progress.update(task, completed=seen)

        snn = quartz_plugin.convert(model.network, calibration, progress=show, **options)
    snn.graph.settings[FITTED_ON] = model.fitted_on
    return snn


def comparison(figures: dict[str, Mapping[str, float]], snn: SpikingNetwork, datamodule: Any) -> str:
    """Return the table of ANN and SNN side by side."""
    synapses = sum(int(count.sum()) for by in fan_outs(snn.graph).values() for count in by.values())
    count = len(datamodule.test_dataloader().dataset)

    def percent(name: str) -> Callable[[Mapping[str, float]], str]:
        return lambda column: f"{100 * column[name]:.2f} %" if name in column else "-"

    def number(name: str) -> Callable[[Mapping[str, float]], str]:
        return lambda column: f"{column[name]:,.1f}" if name in column else "-"

    def macs(column: Mapping[str, float]) -> str:
        return number("synops")(column) if "synops" in column else f"{synapses:,} MACs"

    rows: list[tuple[str, Callable[[Mapping[str, float]], str]]] = [
        ("accuracy", percent("accuracy")),
        ("agreement with the ANN", percent("agreement")),
        ("first spikes that tie", percent("ties")),
        ("early spikes", percent("early_spike_rate")),
        ("spikes, input included", number("spikes")),
        ("spikes that say zero", number("zero_spikes")),
        ("synaptic operations: spikes x synapses", macs),
        ("synaptic operations: merged, as the paper counts", number("synops_merged")),
        ("operations: merged + 2 N T", number("operations")),
        ("steps until the first output spike", number("decision_steps")),
        ("steps of an inference", number("steps")),
    ]
    return format_table(
        [f"{count:,} test images, mean of each", *figures],
        [[label, *(cell(column) for column in figures.values())] for label, cell in rows],
    )


def draw(snn: SpikingNetwork, image: torch.Tensor, folder: Path) -> dict[str, Path]:
    """Draw a neuron's chronogram and a digit's raster into `folder`."""
    import matplotlib

    matplotlib.use("Agg")
    from quartz_plugin import plot

    folder.mkdir(parents=True, exist_ok=True)
    paths = {"chronogram": folder / "chronogram.png", "raster": folder / "raster.png"}
    for name, axes in (("chronogram", plot.chronogram(snn, image)[0]), ("raster", plot.raster(snn.run(image)))):
        figure = axes.get_figure(root=True)
        assert figure is not None
        picture = io.BytesIO()
        figure.savefig(picture, dpi=120)
        write_atomically(paths[name], picture.getvalue())
    return paths


def _rounded(row: dict[str, Any]) -> list[Any]:
    return [round(value, 5) if isinstance(value, float) else value for value in row.values()]
