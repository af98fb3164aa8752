"""Calibration in several processes of torch.distributed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def raise_on_all_ranks() -> Iterator[None]:
    """Let an error in one process of torch.distributed be one in all: none waits for another that has gone."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        raise ValueError("distributed=True needs torch.distributed: call init_process_group in every process first")
    own: Exception | None = None
    try:
        yield
    except Exception as error:
        own = error
    errors: list[str | None] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(errors, None if own is None else f"{type(own).__name__}: {own}")
    if own is not None:
        raise own
    for rank, message in enumerate(errors):
        if message is not None:
            raise ValueError(f"process {rank} could not calibrate: {message}")


def of_all_processes(seen: int, brightest: float, sketches: dict[str, Any]) -> tuple[int, float, dict[str, Any]]:
    """Counts, largest value and sketches of all processes together, the same in each."""
    gathered: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(gathered, (seen, brightest, sketches))
    for path, sketch in gathered[0][2].items():
        for _, _, others in gathered[1:]:
            sketch.merge(others[path])
    return sum(entry[0] for entry in gathered), max(entry[1] for entry in gathered), gathered[0][2]
