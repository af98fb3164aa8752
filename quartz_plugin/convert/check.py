"""Stage 3, check: every operation stands where spikes can carry it out, or is refused by name."""

from __future__ import annotations

from quartz_plugin.convert.traced import FoldedNetwork
from quartz_plugin.operators.table import OPERATORS, ConversionError, Role


def check(network: FoldedNetwork) -> FoldedNetwork:
    """Refuse networks that compute nothing; log what each module becomes.

    Raises
    ------
    ConversionError
        If there is nothing that spikes or synapses could carry out.
    """
    for node, module in network.steps():
        path, role = str(node.target), network.role_at(node)
        assert role is not None
        network.log(path, exact=OPERATORS[type(module)].exact)
        if network.report[path].get("became") is None:
            network.log(path, became=role.value + (", moved behind the ReLU" if path in network.moved else ""))
    if all(network.role_at(node) in (Role.ROUTE, None) for node in network.module.graph.nodes):
        raise ConversionError("the network computes nothing: it has no weights and no ReLU")
    return network
