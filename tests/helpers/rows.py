"""New rows in the table of operators, for as long as a test wants them."""

from contextlib import contextmanager
from unittest import mock

from quartz_plugin.operators import table


@contextmanager
def added_row(kind, row):
    """Let the table have one more row for a while, as a new operator's file would give it."""
    functions = {
        target: table.Function(row, build, target in row.in_place)
        for build, targets in row.functions.items()
        for target in targets
    }
    names = {kind.__name__: kind} if row.settings is not None else {}
    with (
        mock.patch.dict(table.OPERATORS, {kind: row}),
        mock.patch.dict(table.FUNCTIONS, functions),
        mock.patch.dict(table._KINDS, names),
    ):
        yield
