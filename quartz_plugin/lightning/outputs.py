"""Files that the commands write: tables, figures, pictures; whole or not at all."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_only

from quartz_plugin.graph.files import write_atomically
from quartz_plugin.lightning.comparison import Figures


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows to a CSV file, all or nothing; columns in the order in which they first come."""
    columns = list(dict.fromkeys(column for row in rows for column in row))
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, columns)
    writer.writeheader()
    writer.writerows(rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, text.getvalue().encode())


def write_figures(path: Path, figures: Mapping[str, Figures]) -> None:
    """Write figures of networks (name -> figures) to a .csv or .json file."""
    rows = [{"network": name, **of} for name, of in figures.items()]
    if path.suffix == ".csv":
        write_csv(path, rows)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, (json.dumps(rows, indent=2) + "\n").encode())


def save_pictures(folder: Path, pictures: Mapping[str, Callable[[], Any]]) -> dict[str, Path]:
    """Draw pictures (name -> what draws it and returns its axes) into a folder; returns their paths."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    folder.mkdir(parents=True, exist_ok=True)
    paths = {}
    for name, draw in pictures.items():
        axes = draw()
        figure = (axes if hasattr(axes, "get_figure") else next(iter(axes))).get_figure(root=True)
        picture = io.BytesIO()
        figure.savefig(picture, dpi=120)
        pyplot.close(figure)
        paths[name] = folder / f"{name}.png"
        write_atomically(paths[name], picture.getvalue())
    return paths


write_csv_once, write_figures_once = rank_zero_only(write_csv), rank_zero_only(write_figures)
"""The same, by the first of several processes alone."""


def save_pictures_once(folder: Path, pictures: Mapping[str, Callable[[], Any]]) -> dict[str, Path]:
    """:func:`save_pictures`, by the first of several processes alone; the others get no paths."""
    return rank_zero_only(save_pictures)(folder, pictures) or {}
