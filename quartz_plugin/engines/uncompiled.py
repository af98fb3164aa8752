"""A simulation that ``torch.compile`` leaves alone. Imported where it traces, for this takes its time to import."""

from collections.abc import Callable

import torch

from quartz_plugin import engines

run: Callable[..., engines.SimulationResult] = torch.compiler.disable(
    engines.run,
    reason="a simulation walks the network's graph, which torch.compile does not trace; torch.export.export takes it",
)
