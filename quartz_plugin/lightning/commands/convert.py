"""convert: an ANN, or a network trained for few steps, as a spiking network in one file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import quartz_plugin
from quartz_plugin.config import ConversionConfig
from quartz_plugin.lightning.checkpoints import refuse_few_steps
from quartz_plugin.lightning.commands.base import CommandTrainer
from quartz_plugin.lightning.console import print_once, progress_bar
from quartz_plugin.lightning.loading import load_trained
from quartz_plugin.lightning.modules import Classifier, EvaluatedClassifier, FewStepsClassifier
from quartz_plugin.lightning.options import options_with_defaults
from quartz_plugin.lightning.outputs import write_csv
from quartz_plugin.network import SpikingNetwork
from quartz_plugin.verification import Verification


class Convert(CommandTrainer):
    """Conversion."""

    def convert(
        self,
        model: Classifier,
        datamodule: Any,
        ckpt_path: str | None = None,
        output: str | None = None,
        total_steps: int | None = None,
        verify_images: int = 500,
        all_figures: bool = False,
        **conversion: Any,
    ) -> SpikingNetwork:
        """Turn a checkpoint (or --model.weights) into a spiking network in one .safetensors file.

        Parameters
        ----------
        model : Classifier
            The classifier.
        datamodule : ClassificationData
            Its data; calibrated on training images only.
        ckpt_path : str, optional
            Checkpoint that fit wrote; without it the model is taken as it is.
        output : str, optional
            File to write; default snn.safetensors in the trainer's folder. convert.csv lies beside it.
        total_steps : int, optional
            Steps that an inference may take: windows are then chosen for each layer, in place of t_max.
        verify_images : int
            Training images on which the spiking network is compared with the ANN; 0 for none.
        all_figures : bool
            Print every module and layer; they stand in convert.csv in any case.
        **conversion
            Options of the conversion.
        """
        chosen = options_with_defaults("convert", conversion)
        options = {name: value for name, value in chosen.items() if value is not None}
        ConversionConfig(**options)
        trained = load_trained(model, ckpt_path, datamodule)
        path = self.file(output, "snn.safetensors")
        if isinstance(trained, FewStepsClassifier) and trained.network.first_layer == "dense":
            options["first_layer"] = "dense"
        if total_steps is not None:
            _check_total_steps(trained, options)
            options["t_max"] = self._allocated(trained, datamodule, total_steps, options)
        snn = self.converted(trained, datamodule, options)
        if self.is_global_zero:
            path.parent.mkdir(parents=True, exist_ok=True)
            snn.save(path)
            images = datamodule.training_images(verify_images) if verify_images else None
            check = None if images is None else quartz_plugin.verify(trained.network, snn, images)
            write_csv(path.parent / "convert.csv", _rows(snn, check))
            _print_summary(trained, snn, check, all_figures)
            print(f"\nwrote {path}")
        return snn

    def _allocated(
        self, model: EvaluatedClassifier, datamodule: Any, steps: int, options: Mapping[str, Any]
    ) -> dict[str, int]:
        """Windows for each layer that take so many steps together, measured on training images."""
        images = datamodule.training_images(datamodule.calibration_images)
        with progress_bar("allocating steps", self.is_global_zero) as move:
            windows = quartz_plugin.allocate_steps(
                model.network,
                images,
                steps,
                granularity=options["granularity"],
                linear=options["linear"],
                preprocessing=model.preprocessing,
                progress=move,
            )
        print_once(f"--t_max '{json.dumps(windows)}'")
        return windows


def _check_total_steps(model: EvaluatedClassifier, options: Mapping[str, Any]) -> None:
    """Raise ValueError where --total_steps cannot give the windows."""
    refuse_few_steps(model, "--total_steps gives windows to an ANN")
    if "t_max" in options:
        raise ValueError("--total_steps gives all windows itself: leave out --t_max, or --total_steps")
    if options["first_layer"] == "dense" or any("t_max" in own for own in options.get("layers", {}).values()):
        raise ValueError("--total_steps gives all windows itself: leave out --first_layer dense, and t_max in --layers")


def _print_summary(
    model: EvaluatedClassifier, snn: SpikingNetwork, check: Verification | None, all_figures: bool
) -> None:
    """Print size, calibration, steps and agreement; with `all_figures` every module and layer."""
    few = isinstance(model, FewStepsClassifier)
    method = snn.graph.settings["calibration_method"]
    print(snn.report if all_figures else snn.report.totals())
    print("windows and scales as trained" if few else f"scales from {method}")
    print(f"an inference takes {snn.n_steps} steps")
    if check is not None:
        print(f"\nagainst the ANN, on {check.images} training images:")
        print(check if all_figures else check.summary())
    if not all_figures:
        print("(--all_figures true prints every layer; convert.csv holds them)")


def _rows(snn: SpikingNetwork, check: Verification | None) -> list[dict[str, Any]]:
    """Rows of the report, each with the deviation of its layer from the ANN."""
    deviations = {} if check is None else {each.layer: asdict(each) for each in check.layers}
    rows = [{**row, **deviations.pop(row["module"], {})} for row in snn.report]
    return [*rows, *deviations.values()]
