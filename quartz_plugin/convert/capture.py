"""The part of stage 1 that captures a network as a graph: by torch.fx, and where that fails by torch.export."""

from __future__ import annotations

from torch import fx, nn

from quartz_plugin.convert.exported import exported
from quartz_plugin.convert.programs import captured_graph
from quartz_plugin.convert.symbolic import NotTraceableError, Tracer, UnansweredError, symbolic
from quartz_plugin.operators.table import ConversionError


def capture(root: nn.Module, name: str, tracer: Tracer) -> fx.Graph:
    """Capture a network of this name as a graph of calls.

    Raises
    ------
    ConversionError
        With the reason why torch.fx cannot trace it, where torch.export cannot either.
    """
    if (graph := captured_graph(root)) is not None:
        return graph
    try:
        return symbolic(root, name, tracer)
    except NotTraceableError as error:
        try:
            return exported(root, tuple(each[:2] for each in tracer.inputs[0]))
        except Exception as other:
            better = isinstance(other, ConversionError) and not isinstance(error.__cause__, UnansweredError)
            raise (other if better else error) from error.__cause__


__all__ = ["capture"]
