"""Notes on their data that checkpoints and converted networks carry."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from quartz_plugin.tables import printable

FITTED_ON, CLASS_NAMES = "fitted_on", "class_names"
"""Keys, in a converted network's settings and in a checkpoint, of the data's name and of its classes' names."""

SPIKES = "spikes"
"""Key, in a checkpoint, of how a network that was trained for few steps is built and trained."""

UNKNOWN_DATA = "unknown data"


def fitted_on_of(notes: Mapping[Any, Any]) -> str | None:
    """Return the name of the data in a checkpoint or a network's settings; None where they have none."""
    note = notes.get(FITTED_ON)
    return note if isinstance(note, str) else None


def class_names_of(notes: Mapping[Any, Any]) -> list[str]:
    """Return the names of classes in a checkpoint or a network's settings; empty where they have none.

    Raises
    ------
    ValueError
        If they are anything but a list of texts.
    """
    names = notes.get(CLASS_NAMES)
    if names is None:
        return []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"its class names are no list of texts, but {printable(repr(names))[:80]}")
    return names
