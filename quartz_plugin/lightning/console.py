"""The console: one process of several prints, errors take one line, and other libraries' advertisement is left out."""

from __future__ import annotations

import contextlib
import logging
import os
import warnings
from collections.abc import Callable, Iterator

from lightning.pytorch.utilities import rank_zero_only
from rich.progress import Progress

from quartz_plugin.tables import printable

print_once = rank_zero_only(print)
"""``print``, in the first of several processes alone."""

_ADVERTISEMENT = ("💡", "litlogger", "litmodels")
"""Marks of Lightning's tips for its own products."""

_NOT_OURS = (
    # Lightning uses what torch and jsonargparse are about to take away.
    (r".*treespec.*|.*LeafSpec.*", r"lightning\..*"),
    (r".*instantiate_classes.*|.*JsonargparseDeprecationWarning.*|.*JSONARGPARSE_DEPRECATION_WARNINGS.*", r".*"),
    # best.ckpt and last.ckpt lie beside the logs, and are meant to be overwritten.
    (r"Checkpoint directory .* exists and is not empty", r".*"),
    # Workers have a default of our own, chosen for the machine.
    (r"The '.*_dataloader' does not have many workers.*", r".*"),
)
"""Message and module of warnings that a user of the recipes cannot act on."""


class _WithoutAdvertisement(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        return not any(mark in record.getMessage() for mark in _ADVERTISEMENT)


def quiet_other_libraries() -> None:
    """Leave out Lightning's advertisement, and deprecations within other libraries; all other warnings stay."""
    os.environ.setdefault("JSONARGPARSE_DEPRECATION_WARNINGS", "off")
    for name in ("lightning.pytorch.utilities.rank_zero", "lightning.pytorch.trainer.connectors", "lightning.pytorch"):
        logger = logging.getLogger(name)
        if not any(isinstance(each, _WithoutAdvertisement) for each in logger.filters):
            logger.addFilter(_WithoutAdvertisement())
    for message, module in _NOT_OURS:
        warnings.filterwarnings("ignore", message=message, module=module)


def one_line(error: Exception) -> str:
    """Return an error's message in one line without control characters."""
    text = str(error)
    if "Original Traceback" in text:  # Of a process that loads data.
        _, _, text = text.strip().splitlines()[-1].partition(": ")
    return " ".join(printable(text).split())


@contextlib.contextmanager
def progress_bar(description: str, shown: bool, total: int | None = None) -> Iterator[Callable[..., None]]:
    """A bar that goes when it is done; gives a function ``(completed, total=, description=)`` that moves it."""
    with Progress(transient=True, disable=not shown) as progress:
        task = progress.add_task(description, total=total)

        def move(completed: int, total: int | None = total, description: str | None = None) -> None:
            progress.update(task, completed=completed, total=total, description=description)

        yield move
