"""Stage 3, check: every operation stands where spikes can carry it out, or is refused by name."""

from __future__ import annotations

from torch import fx

from quartz_plugin.convert.traced import FoldedNetwork
from quartz_plugin.operators.table import OPERATORS, ConversionError, Role


def check(network: FoldedNetwork) -> FoldedNetwork:
    """Refuse max pooling of signed values, and networks that compute nothing; log what each module becomes.

    Raises
    ------
    ConversionError
        Naming the module that stands in the way, and what could be done.
    """
    spikes = network.spikes()
    for node, module in network.steps():
        path, role = str(node.target), network.role_at(node)
        assert role is not None
        source = node.all_input_nodes[0]
        if role is Role.MAX_POOL and source not in spikes:
            raise ConversionError(
                f"cannot convert {path!r} ({type(module).__name__}): it pools signed values "
                f"(from {_first_signed(network, source, spikes)!r}), and a first spike encodes the largest value "
                "only of a ReLU's; put a ReLU in front of it, or one behind it that alone takes its values"
            )
        network.log(path, exact=OPERATORS[type(module)].exact)
        if network.report[path].get("became") is None:
            network.log(path, became=role.value + (", moved behind the ReLU" if path in network.moved else ""))
    if all(network.role_at(node) in (Role.ROUTE, None) for node in network.module.graph.nodes):
        raise ConversionError("the network computes nothing: it has no weights and no ReLU")
    return network


def _first_signed(network: FoldedNetwork, node: fx.Node, spikes: set[fx.Node]) -> str:
    """Path of the first module between the last spikes and this node: from there on values are signed."""
    while signed := [source for source in node.all_input_nodes if source not in spikes]:
        node = signed[0]
    return str(node.target)
