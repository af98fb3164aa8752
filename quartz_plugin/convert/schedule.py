"""Stage 6, schedule: when each layer is read out, and which paths are delayed to meet in time."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from quartz_plugin.coding import NeuronClock, Window
from quartz_plugin.config import ConversionConfig
from quartz_plugin.convert.rescale import ScaledNetwork
from quartz_plugin.functional import BiasCode


@dataclass
class Schedule:
    """Times of a scaled network.

    Attributes
    ----------
    clocks : dict
        Node of each spiking layer -> its clock.
    delays : dict
        (node, one of its inputs) -> steps by which the path between them is delayed; only where that is not 0.
    """

    clocks: dict[fx.Node, NeuronClock]
    delays: dict[tuple[fx.Node, fx.Node], int]


def schedule(network: ScaledNetwork, input_window: int, bias_code: BiasCode = ConversionConfig.bias) -> Schedule:
    """Read every layer out as soon as the windows of all its sources have ended, the earlier ones delayed.

    Where all windows are alike, a layer's readout is ``l S`` with ``l`` the longest path from the input. With
    ``bias_code="spike"`` a bias above 1 arrives before its layer's window; where that would be before step 0,
    the layer is read out later, and its input delayed.

    Parameters
    ----------
    network : ScaledNetwork
        The network, with the windows of its layers.
    input_window : int
        Steps of the input's window.
    bias_code : "synapse" or "spike"
        How biases arrive.
    """
    times = Schedule({}, {})
    ends: dict[fx.Node, int] = {}
    for node in network.graph.nodes:
        if node.op == "placeholder":
            ends[node] = Window(0, input_window).end
            continue
        arrival = max(ends[source] for source in node.all_input_nodes)
        layer = network.layers.get(node)
        if layer is not None:
            clock = NeuronClock(arrival, layer.window, layer.input_window)
            if bias_code == "spike" and layer.bias is not None:
                earliest = int(clock.bias_spike_steps(layer.bias).min())
                clock = clock._replace(readout=arrival + max(0, -earliest))
            times.clocks[node], arrival = clock, clock.readout
        if node.op != "output":
            for source in node.all_input_nodes:
                if ends[source] < arrival:
                    times.delays[node, source] = arrival - ends[source]
        ends[node] = arrival if layer is None else times.clocks[node].output_window.end
    return times
