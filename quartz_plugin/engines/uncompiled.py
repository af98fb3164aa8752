"""A simulation that ``torch.compile`` leaves alone. Imported where it traces, for this takes its time to import."""

import inspect
from collections.abc import Callable

import torch

from quartz_plugin import engines

_REASON = "a simulation walks the network's graph, which torch.compile does not trace; torch.export.export takes it"
# torch 2.6 takes no reason.
_OPTIONS = {"reason": _REASON} if "reason" in inspect.signature(torch.compiler.disable).parameters else {}

run: Callable[..., engines.SimulationResult] = torch.compiler.disable(engines.run, **_OPTIONS)
