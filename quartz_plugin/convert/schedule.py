"""Stage 6, schedule: when each layer is read out."""

from __future__ import annotations

from quartz_plugin.coding import NeuronClock, Window
from quartz_plugin.convert.rescale import ScaledLayer
from quartz_plugin.functional import BiasCode


def schedule(layers: list[ScaledLayer], t_max: int, bias_code: BiasCode = "synapse") -> list[NeuronClock]:
    """Clock of every layer: read out when the windows of its sources end.

    With ``bias_code="spike"`` a bias above 1 arrives before its layer's window; where that would be before
    step 0, the layer is read out later, and its input delayed.

    Parameters
    ----------
    layers : list of ScaledLayer
        The layers of a chain, in order.
    t_max : int
        ``T`` of all windows.
    bias_code : "synapse" or "spike"
        How biases arrive.
    """
    source = Window.of_input(t_max)
    length = source.length
    clocks = []
    for layer in layers:
        clock = NeuronClock(readout=source.end, window=length, input_window=source.length)
        if bias_code == "spike" and layer.bias is not None:
            earliest = int(clock.bias_spike_steps(layer.bias).min())
            clock = clock._replace(readout=clock.readout + max(0, -earliest))
        clocks.append(clock)
        source = clock.output_window
    return clocks


def delay_of(clock: NeuronClock, source: Window) -> int:
    """Axonal delay that makes the source's window end at this layer's readout."""
    return clock.readout - source.end
