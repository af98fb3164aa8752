"""Lines of the user's own code, which refusals point at."""

from __future__ import annotations

import re
import traceback
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import fx

_OTHERS = tuple(str(Path(place).parent) for place in (torch.__file__, Path(__file__).parent))
"""Folders whose code is not the user's: torch's and ours."""
_LONGEST = 80

_FRAME = re.compile(r'File "(.+)", line (\d+), in .*\n\s*(.*)')


def line_of_node(node: fx.Node) -> str:
    """Line that called an operation, where the graph knows it: ``" (net.py, line 12: x = F.gelu(x))"``, or ""."""
    return _last((name, int(line), code) for name, line, code in _FRAME.findall(node.meta.get("stack_trace") or ""))


def line_of_error(error: BaseException) -> str:
    """Line that an error came from, in the same form."""
    frames = traceback.extract_tb(error.__traceback__)
    return _last((frame.filename, frame.lineno or 0, frame.line or "") for frame in frames)


def _last(frames: Iterable[tuple[str, int, str]]) -> str:
    own = [frame for frame in frames if not frame[0].startswith((*_OTHERS, "<"))]
    if not own:
        return ""
    name, line, code = own[-1]
    code = code.strip()
    shown = code if len(code) <= _LONGEST else code[: _LONGEST - 3] + "..."
    return f" ({Path(name).name}, line {line}{': ' if shown else ''}{shown})"


__all__ = ["line_of_error", "line_of_node"]
