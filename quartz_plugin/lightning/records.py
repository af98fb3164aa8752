"""Files of figures that sweep and test wrote, read back with a check of every cell."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from quartz_plugin.calibration_methods import TUNING, CalibrationMethod
from quartz_plugin.figures import SWEEP_COLUMNS
from quartz_plugin.tables import printable


def rows_of_sweep(path: Path) -> list[dict[str, Any]]:
    """Return the whole rows of a sweep's file, if there is one; numbers as numbers.

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
        row for row in values if "tuning_rate" in row or not tunes(str(row.get("calibration_method", "percentile")))
    ]


def is_number(value: Any) -> bool:
    """Return whether it is a number that can be drawn and printed; NaN is, where there was nothing to count."""
    return isinstance(value, int | float) and not isinstance(value, bool) and (value != value or abs(value) < 1e100)


def is_share(value: Any) -> bool:
    """Return whether it is a number from 0 to 1."""
    return is_number(value) and 0 <= value <= 1


def _is_method(value: Any) -> bool:
    try:
        return value is None or bool(CalibrationMethod.of(str(value)))
    except ValueError:
        return False


_CELLS: dict[str, Callable[[Any], bool]] = {
    **dict.fromkeys(SWEEP_COLUMNS, is_number),
    "accuracy": is_share,
    "ann_accuracy": is_share,
    "t_max": lambda value: type(value) is int and value >= 2,
    "images": lambda value: value is None or is_number(value),
    "calibration_method": _is_method,
    "calibrated_by": lambda value: value == "" or _is_method(value),
    "tuning_rate": lambda value: value in (None, "") or is_number(value),
}
"""Columns of a sweep's file -> check of a cell; None stands for a column that is not there."""


def tunes(calibration_method: str) -> bool:
    """Return whether a calibration method tunes, so that passes and rate of tuning matter."""
    return bool(CalibrationMethod.of(calibration_method).refinements & TUNING)


def as_calibrated(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the rows of a sweep as they are shown: under the calibration that was carried out."""
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


def spiking_figures(path: str) -> list[dict[str, Any]]:
    """Return the figures of the spiking networks in a file that test wrote.

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
                given = printable(json.dumps(row.get(name)))[:40]
                raise ValueError(f"{path} is not a file that test wrote ({given} as a network's {name})")
        for name, value in row.items():
            if value is not None and not isinstance(value, str) and not is_number(value):
                raise ValueError(f"{path} is not a file that test wrote (no number as a network's {printable(name)})")
    return found


_FIGURES: dict[str, Callable[[Any], bool]] = {
    "t_max": lambda value: is_number(value) and value >= 2,
    "accuracy": lambda value: value is None or is_share(value),
    "images": lambda value: is_number(value) and value >= 1,
}
"""Figures that test writes of a spiking network -> check of a value."""


def rounded(value: Any) -> Any:
    """Return a number with at most five decimals, whole ones without a point."""
    if isinstance(value, float) and math.isfinite(value):
        return int(value) if value == int(value) else round(value, 5)
    return value
