"""Plain text: tables, and words that come from files."""

from __future__ import annotations

from collections.abc import Sequence


def format_table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Align columns under their header: numbers to the right, words to the left.

    Examples
    --------
    >>> print(format_table(["layer", "spikes"], [["input", 784], ["1", 12.5], ["2", 3456.0]]))
    layer  spikes
    -----  ------
    input     784
    1        12.5
    2       3,456
    """
    header = [printable(cell) for cell in header]
    texts = [[_text(cell) for cell in row] for row in rows]
    widths = [max(len(line[column]) for line in [header, *texts]) for column in range(len(header))]
    numeric = [
        bool(rows) and all(isinstance(row[column], (int, float)) or row[column] is None for row in rows)
        for column in range(len(header))
    ]

    def line(cells: Sequence[str]) -> str:
        aligned = [
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(cells, widths, numeric, strict=True)
        ]
        return "  ".join(aligned).rstrip()

    return "\n".join([line(header), line(["-" * width for width in widths]), *map(line, texts)])


def _text(cell: object) -> str:
    if cell is None:
        return "-"
    if isinstance(cell, float):
        return f"{cell:,.0f}" if abs(cell) >= 1000 else f"{cell:.4g}"
    return printable(cell)


def printable(text: object, most: int | None = None) -> str:
    r"""Return a text in one line without control characters, which files may hold in their names.

    Parameters
    ----------
    text : object
        What is to be printed.
    most : int, optional
        Leave out what comes behind so many characters.

    Examples
    --------
    >>> print(printable("a\x1b[31mb\nc"))
    a\x1b[31mb c
    >>> printable("a" * 1000, most=3)
    'aaa ...'
    """
    given = str(text)
    shown = "".join(
        sign if sign.isprintable() else " " if sign.isspace() else sign.encode("unicode_escape").decode()
        for sign in given[:most]
    )
    return shown if most is None or len(given) <= most else f"{shown} ..."
