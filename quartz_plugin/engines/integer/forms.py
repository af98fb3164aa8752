"""Synapses of a node as one convolution of levels, or of the levels of several nodes side by side."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import fx, nn

from quartz_plugin.engines.integer.maps import has_integer_form
from quartz_plugin.graph.reach import is_weighted
from quartz_plugin.graph.topology import Topology
from quartz_plugin.graph.walk import called_by
from quartz_plugin.neuron import AxonalDelay
from quartz_plugin.operators.linear_map import Convolution, Terms, as_image
from quartz_plugin.operators.modules import Add, OneToOne
from quartz_plugin.operators.table import row_of


class Forms:
    """Finds the forms of a network's synapses.

    Attributes
    ----------
    levels : frozenset of fx.Node
        Nodes whose values are levels: those that emit spikes, and what merely routes these.
    """

    def __init__(self, topology: Topology) -> None:
        self.topology, self.module = topology, topology.graph.module
        self.levels = frozenset((*topology.spike_sources, *topology.routed))

    def of(self, node: fx.Node, module: nn.Module) -> tuple[Convolution, tuple[fx.Node, ...]] | None:
        """Weighted synapses as a convolution of levels, and the nodes of these; None where they are no such thing."""
        (source, *others), row, shapes = node.all_input_nodes, row_of(module), self.topology.shapes
        if others or not is_weighted(module) or row is None or row.form is None:
            return None
        if len(shapes[source.name]) > 3 or len(shapes[node.name]) > 3:
            return None
        terms = self._terms_of(source)
        form = None if terms is None else row.form(module, [terms], shapes[node.name], False)
        if form is None or form.shape != as_image(shapes[node.name]) or not all(map(has_integer_form, form.terms)):
            return None
        convolution = _side_by_side(form.terms)
        if convolution is None or (convolution.first_output, convolution.outputs) != (0, form.shape[0]):
            return None
        nodes = self.topology.nodes
        return convolution, tuple(nodes[term.source] for term in form.terms)

    def _terms_of(self, node: fx.Node) -> Terms | None:
        """Levels, or those of a pair, less one another; None where it is anything else."""
        shape = self.topology.shapes[node.name]
        if node in self.levels:
            return Terms.of_spikes(node.name, shape)
        module = called_by(self.module, node)
        row = None if module is None else row_of(module)
        sources = [arg for arg in node.args if isinstance(arg, fx.Node)]
        inputs = [self._terms_of(in_front_of_delays(self.module, source)) for source in sources]
        if row is None or row.form is None or not isinstance(module, Add | OneToOne) or any(t is None for t in inputs):
            return None
        return row.form(module, [terms for terms in inputs if terms is not None], shape, False)


def serves_one(node: fx.Node) -> bool:
    """Check whether one other node alone takes a node's value."""
    return len(node.users) == 1


def in_front_of_delays(module: fx.GraphModule, node: fx.Node) -> fx.Node:
    """The node whose only reader is a delay, for that; any other node as it is."""
    while isinstance(called_by(module, node), AxonalDelay):
        (source,) = node.all_input_nodes
        if not serves_one(source):
            break
        node = source
    return node


def _side_by_side(terms: list[Convolution]) -> Convolution | None:
    """One convolution of the channels of several sources side by side; None where they are of several kinds."""
    first = terms[0]
    if len(terms) == 1:
        return first
    alike = [replace(term, weight=first.weight, source=first.source) for term in terms]
    whole = (first.first_input, first.inputs) == (0, first.source_shape[0])
    if first.groups != 1 or not whole or any(each != alike[0] for each in alike):
        return None
    channels = sum(term.inputs for term in terms)
    weight = torch.cat([term.weight.double() for term in terms], 1)
    return replace(first, weight=weight, source_shape=(channels, *first.source_shape[1:]))


__all__ = ["Forms", "in_front_of_delays", "serves_one"]
