"""Error against what it costs."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import cycle
from typing import TYPE_CHECKING, Any

from quartz_plugin.figures import SWEEP_OPTIONS, figure_of
from quartz_plugin.plot.style import NEUTRAL, PALETTE, PUBLISHED, log_scale, own_axes, short_number
from quartz_plugin.tables import printable

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Row = Mapping[str, Any]
Point = tuple[float, float, float]
"""T to write beside it (0 for none), place on the axis, error in %."""
Corner = tuple[str, str]

_T_MAX, *_OF_SCALES, _METHOD, _HOLD, _BIAS, _RECTIFIER = SWEEP_OPTIONS
OPTIONS = (_METHOD, _HOLD, _BIAS, _RECTIFIER, *_OF_SCALES)
"""Columns of a sweep that are options of ``convert``: :func:`error_curves` draws a line for each combination."""


def error_curves(
    rows: Sequence[Row],
    x: str = "t_max",
    ax: Axes | None = None,
    *,
    ann_accuracy: float | None = None,
    published: Mapping[str, Sequence[Row]] | None = None,
) -> Axes:
    """Error against what it costs: a line for each combination of the options that vary, a point a row.

    Both axes are logarithmic where all values allow it; an error of 0 stands at the foot of the axis. Where `x` is
    not ``t_max``, the number at a point is its T.

    Parameters
    ----------
    rows : sequence of mappings
        A sweep's: from ``csv.DictReader`` or from memory, with the columns `x` and ``accuracy`` (a share), and
        ``t_max`` and :data:`OPTIONS` as far as there are any. Rows without a value in either column are left out.
    x : str
        A column of numbers: ``t_max``, ``operations``, ``synops``, ``energy_loihi`` (joules), or any other.
    ax : Axes, optional
        Where to draw.
    ann_accuracy : float, optional
        Accuracy of the ANN, a share; its error becomes a dashed line.
    published : dict, optional
        Name of a publication -> its rows, of the same columns in the same units: ``t_max`` in steps, ``accuracy`` as
        a share, and whatever else it gives, such as ``operations`` an inference or ``energy_loihi`` in joules. Each
        becomes one dotted line with stars, its options unread. A row without ``t_max`` is the publication's own ANN:
        a thin dotted line across. Rows without a value in `x` are left out, and so is a publication, its ANN
        included, of which no point remains.

    Returns
    -------
    Axes

    Raises
    ------
    ValueError
        If there are no rows, a column is missing or not of numbers, or an accuracy lies outside [0, 1].
    """
    usable = _usable(rows, x)
    figure = figure_of(x)
    varying, lines = _lines_by_options(usable, x, figure.factor)
    theirs = {name: _published_points(its_rows, x, figure.factor) for name, its_rows in (published or {}).items()}
    theirs = {name: found for name, found in theirs.items() if found[0]}

    place: dict[str, Any] = {} if ax is not None else {"loc": "lower left", "bbox_to_anchor": (0, 1), "ncols": 2}
    ax = own_axes(ax, 6.5, 4.6)
    # Corners keep the numbers of lines that lie on each other apart.
    corners = cycle((("left", "bottom"), ("right", "top"), ("left", "top"), ("right", "bottom")))
    _draw_lines(ax, varying, lines, corners)
    drawn = [point for points in (*lines.values(), *(points for points, _ in theirs.values())) for point in points]
    errors = [error for *_, error in drawn]
    if ann_accuracy is not None:
        errors.append(_error(ann_accuracy))
        ax.axhline(errors[-1], color=NEUTRAL, linestyle="--", linewidth=1, label=f"ANN, {errors[-1]:.3g} %")
    errors += _draw_published(ax, theirs, corners)
    log_scale(ax.set_yscale, ax.yaxis, errors)
    _set_x_axis(ax, x, sorted({value for _, value, _ in drawn}))
    ax.set_xlabel(figure.axis_label, fontsize=9)
    ax.set_ylabel("error (%)", fontsize=9)
    ax.tick_params(which="both", labelsize=8)
    numbered = any(t_max for t_max, *_ in drawn)
    ax.legend(
        fontsize=8, title_fontsize=8, frameon=False, title="numbers at the points: T_max" if numbered else None,
        alignment="left", **place,
    )  # fmt: skip
    ax.spines[["top", "right"]].set_visible(False)
    return ax


def _usable(rows: Sequence[Row], x: str) -> list[tuple[Row, float, float]]:
    """Rows with a value in `x` and an accuracy, each with both."""
    if not rows:
        raise ValueError("there are no rows to draw")
    usable = [
        (row, value, accuracy)
        for row in rows
        if (value := _number(row, x)) is not None and (accuracy := _number(row, "accuracy")) is not None
    ]
    if not usable:
        absent = [column for column in (x, "accuracy") if all(_number(row, column) is None for row in rows)]
        wanted = " and ".join(map(repr, absent or (x, "accuracy")))
        raise ValueError(f"no row has a value in {wanted}; columns are {list(rows[0])}")
    return usable


def _lines_by_options(
    usable: Sequence[tuple[Row, float, float]], x: str, factor: float
) -> tuple[list[str], dict[tuple[str, ...], list[Point]]]:
    """The options that vary, and for each combination of their values its points."""
    # An option on the axis leaves T to distinguish the lines; a cost on the axis follows from T.
    options = [option for option in (*OPTIONS, *(["t_max"] if x in OPTIONS else [])) if option != x]
    along_t = x not in ("t_max", *OPTIONS)
    varying = [option for option in options if len({_text(row, option) for row, *_ in usable}) > 1]
    lines: dict[tuple[str, ...], list[Point]] = {}
    for row, value, accuracy in usable:
        t_max = (_number(row, "t_max") or 0.0) if along_t else 0.0
        line = lines.setdefault(tuple(_text(row, option) for option in varying), [])
        line.append((t_max, value * factor, _error(accuracy)))
    return varying, lines


def _draw_lines(
    ax: Axes, varying: Sequence[str], lines: Mapping[tuple[str, ...], Sequence[Point]], corners: Iterator[Corner]
) -> None:
    """A line for each combination of options; dashes and open markers let a lower one show."""
    styles = zip(cycle(PALETTE), cycle("os^Dv"), cycle(("-", "--", "-.")), strict=False)
    for (values, points), (color, marker, dashes) in zip(lines.items(), styles, strict=False):
        label = ", ".join(filter(None, map(_option_label, varying, values))) or "spiking network"
        _error_curve(
            ax, points, next(corners), label=label, color=color,
            marker=marker, linestyle=dashes, markersize=5, markerfacecolor="none",
        )  # fmt: skip


def _draw_published(
    ax: Axes, theirs: Mapping[str, tuple[Sequence[Point], Sequence[float]]], corners: Iterator[Corner]
) -> list[float]:
    """A dotted line for each publication, and one across for its ANN; returns the errors of the ANNs."""
    anns: list[float] = []
    # Colours and markers have other periods: none comes with the same partner soon.
    for (name, (points, errors)), color, marker in zip(theirs.items(), cycle(PUBLISHED), cycle("*PdX"), strict=False):
        # Filled, they lie below our open markers, which they would hide.
        _error_curve(
            ax, points, next(corners), label=name, color=color,
            marker=marker, linestyle=":", markersize=8, zorder=1.9,
        )  # fmt: skip
        for error in errors:
            label = f"{name}, ANN, {error:.3g} %"
            ax.axhline(error, color=color, linestyle=":", linewidth=0.8, zorder=1.9, label=label)
        anns += errors
    return anns


def _set_x_axis(ax: Axes, x: str, places: Sequence[float]) -> None:
    """A log axis: of base 2, with a tick at every T, or of plain numbers."""
    if x != "t_max":
        log_scale(ax.set_xscale, ax.xaxis, places)
        return
    ax.set_xscale("log", base=2)
    ax.set_xticks(places, labels=[short_number(t_max) for t_max in places])
    ax.minorticks_off()


def _published_points(rows: Sequence[Row], x: str, factor: float) -> tuple[list[Point], list[float]]:
    """A publication's points as (T to write, x, error in %), and the errors of its own ANNs: the rows without T."""
    points, anns = [], []
    for row in rows:
        t_max, value, accuracy = _number(row, "t_max"), _number(row, x), _number(row, "accuracy")
        if accuracy is None:
            continue
        if t_max is None:
            anns.append(_error(accuracy))
        elif value is not None:
            points.append((0.0 if x == "t_max" else t_max, value * factor, _error(accuracy)))
    return points, anns


def _error_curve(ax: Axes, points: Sequence[Point], corner: Corner, *, color: str, **look: Any) -> None:
    """One line through points (T, x, error), by rising T, and the T, where there is one, at this corner of each."""
    from matplotlib.patheffects import withStroke

    points = sorted(points)
    ax.plot([value for _, value, _ in points], [error for *_, error in points], color=color, linewidth=1.3, **look)
    side, edge = corner
    away = 4 if side == "left" else -4, 3 if edge == "bottom" else -3
    for t_max, value, error in points:
        if t_max:
            ax.annotate(
                f"{t_max:g}", (value, error), xytext=away, textcoords="offset points", ha=side, va=edge,
                color=color, fontsize=7, path_effects=[withStroke(linewidth=2, foreground="white")],
            )  # fmt: skip


def _number(row: Row, column: str) -> float | None:
    """The number in a column; None where there is none."""
    value = row.get(column)
    if str(value).strip() in ("", "None"):
        return None
    try:
        number = float(str(value) if isinstance(value, bool) else value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        number = math.inf
    if math.isinf(number):
        raise ValueError(f"column {column!r} must hold numbers, got {printable(repr(value))[:80]}")
    return None if math.isnan(number) else number


def _text(row: Row, column: str) -> str:
    """A column's value, spelled alike whether it comes from a file or from memory."""
    text = str(row.get(column, "")).strip()
    try:
        return f"{float(text):.10g}"
    except ValueError:
        return text.capitalize() if text.lower() in ("true", "false", "none") else text


def _option_label(option: str, value: str) -> str:
    """An option and its value in words."""
    if value in ("", "None"):
        return ""
    if option == "hold":
        return {"True": "hold", "False": "no hold"}.get(value, f"hold {value}")
    return f"T = {value}" if option == "t_max" else f"{option.replace('_', ' ')} {value}"


def _error(accuracy: float) -> float:
    """Error in %."""
    if not 0 <= accuracy <= 1:
        raise ValueError(f"accuracy must be a share in [0, 1], got {accuracy:g}")
    return 100 - 100 * accuracy
