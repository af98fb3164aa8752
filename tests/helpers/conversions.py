"""Random networks with what they became, by any options, and how spikes are compared."""

import torch
from hypothesis import strategies as st

from helpers.random_chains import NEURONS
from helpers.random_graphs import (
    make_exact,
    own_windows,
    pools_mixed_scales,
    random_nets,
)
from quartz_plugin import AxonalDelay, ConversionError
from quartz_plugin.engines.integer import why_not_integers
from quartz_plugin.graph import call_node, called_by

T_MAXIMA = st.one_of(st.integers(2, 9), st.sampled_from([16, 17]))
LINEAR = st.sampled_from(["compose", "pair"])
PERCENTILES = st.sampled_from([70, 99, 99.9, 100])


@st.composite
def conversions(draw, neurons=NEURONS, exact=False, **nets):
    """A random network and what it became: any options, often with windows of their own for some layers."""
    net = draw(random_nets(exact=exact, **nets))
    options = {**draw(neurons), "linear": draw(LINEAR), "percentile": draw(PERCENTILES)}
    # Ranges of an output's own, with shifts.
    options["task"] = draw(st.sampled_from(["classification", "classification", "regression"]))
    t_max = draw(T_MAXIMA)
    snn = net.convert(t_max, **options)
    if draw(st.booleans()):
        options["layers"] = own_windows(draw, snn)
    if draw(st.integers(0, 3)) == 3:
        options["granularity"] = "channel"
    try:
        snn = net.convert(t_max, **options)
    except ConversionError as refusal:
        # Channels or branches may say 1 of different values, or in windows of different lengths.
        if not pools_mixed_scales(net, refusal) or not options.keys() & {"layers", "granularity"}:
            raise
    return net, make_exact(snn) if exact else snn


def engines_of(snn):
    """The engines that are exact for this network."""
    if not snn.graph.hold:
        return ("stepped", "event")
    return ("stepped", "event", "analytic", *(["integer"] if why_not_integers(snn.graph) is None else []))


def propagate_levels(module, node, values):
    """Evaluate one node between two layers, where levels count back from the readout and a delay changes nothing."""
    if isinstance(called_by(module, node), AxonalDelay):
        return values[node.all_input_nodes[0]]
    return call_node(module, node, values)


def assert_same_spikes(one, other):
    assert list(one) == list(other)
    for name, steps in one.items():
        assert steps.dtype == torch.int32
        assert torch.equal(steps, other[name]), name
