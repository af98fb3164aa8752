"""sweep: conversion and test at every combination of t_max, percentile and neuron."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from quartz_plugin.figures import SWEEP_COLUMNS, SWEEP_OPTIONS, SWEEP_PRINTED
from quartz_plugin.lightning.checkpoints import refuse_few_steps
from quartz_plugin.lightning.commands.base import CommandTrainer
from quartz_plugin.lightning.commands.figures import draw_sweep
from quartz_plugin.lightning.console import print_once
from quartz_plugin.lightning.loading import load_trained
from quartz_plugin.lightning.modules import Classifier, EvaluatedClassifier
from quartz_plugin.lightning.options import LISTS_OF, options_with_defaults, points_of
from quartz_plugin.lightning.outputs import write_csv_once
from quartz_plugin.lightning.records import as_calibrated, rounded, rows_of_sweep, tunes
from quartz_plugin.tables import format_table

_TUNING = ("tuning_passes", "tuning_rate")

_PRINTED_OPTIONS = LISTS_OF["sweep"]

Row = dict[str, Any]


class Sweep(CommandTrainer):
    """Sweeps."""

    def sweep(
        self,
        model: Classifier,
        datamodule: Any,
        ckpt_path: str | None = None,
        output: str | None = None,
        resume: bool = True,
        **conversion: Any,
    ) -> None:
        """Convert at every combination of t_max, percentile and neuron, and test each: a CSV, a table, pictures.

        Parameters
        ----------
        model : Classifier
            The classifier.
        datamodule : ClassificationData
            Its data; calibrated on training images only.
        ckpt_path : str, optional
            Checkpoint that fit wrote; without it the model is taken as it is (--model.weights).
        output : str, optional
            File to write; default sweep.csv in the trainer's folder, pictures beside it.
        resume : bool
            Take the rows of that file that are of this network, these images and these options, and leave
            the others in it; without it the file is written anew.
        **conversion
            Options of the conversions.
        """
        options = options_with_defaults("sweep", conversion)
        points, left_out = points_of("sweep", options)
        for line in left_out:
            print_once(line)
        trained = load_trained(model, ckpt_path, datamodule)
        refuse_few_steps(trained, "sweep converts an ANN at several T")
        path = self.file(output, "sweep.csv")
        done = rows_of_sweep(path) if resume else []
        ann = self.test_ann(trained, datamodule)
        fixed = _fixed(trained, ann, datamodule, options)
        rows: list[Row] = []
        for number, point in enumerate(points, 1):
            started = time.perf_counter()
            asked = {**{name: point[name] for name in SWEEP_OPTIONS}, **fixed, **_own_columns(point)}
            row = next((old for old in done if _is_same(old, asked)), None)
            took = "kept"
            if row is None:
                row = {**asked, **self._row(trained, datamodule, point)}
                took = f"{time.perf_counter() - started:.0f} s"
            rows.append(row)
            # Rows of other sweeps, and what is not reached yet, stay.
            write_csv_once(path, [*rows, *(old for old in done if not any(old is kept for kept in rows))])
            shown = ", ".join(f"{name} {point[name]}" for name in _PRINTED_OPTIONS)
            print_once(f"{number} of {len(points)}: {shown}: {took}", flush=True)
        print_once(f"\nANN accuracy {100 * ann['accuracy']:.2f} %, {ann['images']:,.0f} test images")
        print_once(_table(rows, options))
        print_once(f"\nwrote {path}")
        draw_sweep(model, rows, path.parent)

    def _row(self, model: EvaluatedClassifier, datamodule: Any, point: Mapping[str, Any]) -> Row:
        """Convert and test at one point; returns what a row holds beside the options."""
        snn = self.converted(model, datamodule, point)
        figures = self.test_spiking(model, snn, datamodule)
        return {
            **{name: point[name] for name in _TUNING},
            "calibrated_by": snn.graph.settings["calibration_method"],
            **{column: figures[column] for column in SWEEP_COLUMNS},
        }


def _fixed(model: EvaluatedClassifier, ann: Mapping[str, float], datamodule: Any, options: Mapping[str, Any]) -> Row:
    """Columns that all rows of one sweep share, and by which rows of others are known."""
    layers = options["layers"]
    return {
        "network": _digest(model.network),
        "classes": model.classes,
        "layers": json.dumps(layers, sort_keys=True) if layers else "",
        "images": ann["images"],
        "cost_images": ann["cost_images"],
        "calibration_images": len(datamodule.calibration_dataloader().dataset),
        "ann_accuracy": ann["accuracy"],
        "ann_macs": ann["macs"],
    }


def _own_columns(point: Mapping[str, Any]) -> Row:
    """Columns of options that rows have only where they matter, so that rows of older versions are known again."""
    tuning = {name: point[name] for name in _TUNING} if tunes(str(point["calibration_method"])) else {}
    return {**tuning, **{name: point[name] for name, usual in _unusual().items() if point[name] != usual}}


def _unusual() -> Row:
    """Options that stand in a row only where they are not the default, and their defaults."""
    usual = options_with_defaults("sweep", {})
    return {name: value for name, value in usual.items() if name not in {*SWEEP_OPTIONS, *_TUNING, "layers"}}


def _is_same(row: Row, asked: Row) -> bool:
    """Return whether a row of the file is of these options, this network and these images."""
    left_out = _unusual().keys() - asked.keys()
    return all(row.get(name) == value for name, value in asked.items()) and all(
        row.get(name) in (None, "") for name in left_out
    )


def _table(rows: Sequence[Row], options: Mapping[str, Any]) -> str:
    """Return the table that a sweep ends with."""
    shown = [
        name
        for name in (*_PRINTED_OPTIONS, *SWEEP_PRINTED)
        if name != "calibration_method" or options[name] != ["percentile"]
    ]
    return format_table(shown, [[rounded(row[name]) for name in shown] for row in as_calibrated(rows)])


def _digest(network: torch.nn.Module) -> str:
    """Digest of a network's weights, which distinguishes it from others."""
    digest = hashlib.sha256()
    for name, tensor in network.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return "sha256:" + digest.hexdigest()[:16]
