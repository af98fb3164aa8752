"""The converted network as a graph, what is derived from it, and the files that hold it."""

from quartz_plugin.graph.converted import (
    INPUT,
    ConvertedGraph,
    Layer,
    Projection,
    call_node,
    called_by,
    check_modules,
    evaluated,
    expiring_after,
    is_chain,
    is_spike_source,
    module_nodes,
    projection_to,
    propagate_levels,
    spike_sources,
    unique_path,
)

__all__ = [
    "INPUT",
    "ConvertedGraph",
    "Layer",
    "Projection",
    "call_node",
    "called_by",
    "check_modules",
    "evaluated",
    "expiring_after",
    "is_chain",
    "is_spike_source",
    "module_nodes",
    "projection_to",
    "propagate_levels",
    "spike_sources",
    "unique_path",
]
