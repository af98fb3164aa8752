"""figures: the pictures of a sweep, beside what was published and networks made for few steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from quartz_plugin.lightning.commands.base import CommandTrainer
from quartz_plugin.lightning.console import print_once
from quartz_plugin.lightning.modules import Classifier
from quartz_plugin.lightning.outputs import save_pictures_once
from quartz_plugin.lightning.pictures import pictures_of_sweep
from quartz_plugin.lightning.records import as_calibrated, rounded, rows_of_sweep, spiking_figures


class Figures(CommandTrainer):
    """Pictures."""

    def figures(
        self,
        model: Classifier,
        datamodule: Any,
        sweep: str | None = None,
        calibrated: list[str] | None = None,
        trained: list[str] | None = None,
        output: str | None = None,
    ) -> None:
        """Draw a sweep: error against t_max, steps, operations and energy, with the figures of the paper and of others.

        Parameters
        ----------
        model : Classifier
            The classifier, with the published figures.
        datamodule : ClassificationData
            Not used.
        sweep : str, optional
            CSV file that sweep wrote; default sweep.csv in the trainer's folder.
        calibrated : list[str], optional
            JSON files that test wrote of networks that convert tuned, on the same images.
        trained : list[str], optional
            The same, of networks trained with t_max.
        output : str, optional
            Folder for the pictures; default the file's.
        """
        path = self.file(sweep, "sweep.csv")
        if not path.is_file():
            raise FileNotFoundError(f"no sweep {path}: sweep writes it")
        rows = rows_of_sweep(path)
        if not rows:
            raise ValueError(f"{path} has no whole row")
        # The latest sweep stands first; others are of another network, other images or options.
        same = ("network", "layers", "images", "calibration_images", "linear", "first_layer", "weight_bits")
        drawn = [row for row in rows if all(row.get(name) == rows[0].get(name) for name in same)]
        if len(drawn) < len(rows):
            print_once(f"{len(rows) - len(drawn)} rows of other networks, images or layers are left out")
        others = {
            name: [figures for file in files or [] for figures in spiking_figures(file)]
            for name, files in (("calibrated", calibrated), ("trained", trained))
        }
        images = rows[0].get("images")
        for name, found in others.items():
            if strange := {figures["images"] for figures in found} - {images}:
                raise ValueError(f"the sweep is of {rounded(images)} images, and --{name} of {strange}")
        draw_sweep(model, drawn, Path(output) if output is not None else path.parent, others)


def draw_sweep(
    model: Classifier,
    rows: Sequence[Mapping[str, Any]],
    folder: Path,
    others: Mapping[str, Sequence[Mapping[str, float]]] | None = None,
) -> None:
    """Draw the pictures of a sweep into a folder."""
    # What was published of other images has no place beside these.
    alike = rows[0].get("classes", model.published_classes) == model.published_classes
    beside = {**(others or {}), **(model.published if alike else {})}
    pictures = pictures_of_sweep(
        as_calibrated(rows), rows[0]["ann_accuracy"], {name: of for name, of in beside.items() if of}
    )
    for picture in save_pictures_once(folder, pictures).values():
        print_once(f"wrote {picture}")
