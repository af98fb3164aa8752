"""The converted network as a graph, what is derived from it, and the files that hold it."""

from quartz_plugin.graph.converted import (
    INPUT,
    ConvertedGraph,
    Layer,
    Projection,
    check_modules,
    is_chain,
    projection_to,
    spike_sources,
    unique_path,
)
from quartz_plugin.graph.walk import call_node, called_by, is_spike_source, module_nodes

__all__ = [
    "INPUT",
    "ConvertedGraph",
    "Layer",
    "Projection",
    "call_node",
    "called_by",
    "check_modules",
    "is_chain",
    "is_spike_source",
    "module_nodes",
    "projection_to",
    "spike_sources",
    "unique_path",
]
