"""Arguments of one call of conversion, which are no options of the network that it makes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from quartz_plugin.operators.table import Rule

TuningProgress = Callable[[int, int], None]
"""Called with the steps done so far, and all of them."""


@dataclass(frozen=True)
class Run:
    """Arguments of one call, beside its options; see :func:`~quartz_plugin.convert`."""

    example_input: Tensor | tuple[Tensor, ...] | None = None
    progress: Callable[[int], None] | None = None
    tuning_progress: TuningProgress | None = None
    distributed: bool = False
    rules: Mapping[type[nn.Module], Rule] | None = None

    def __post_init__(self) -> None:
        for called in (self.progress, self.tuning_progress):
            if called is not None and not callable(called):
                raise TypeError(f"progress and tuning_progress must be functions of numbers, got {called!r}")
