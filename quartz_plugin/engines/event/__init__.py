"""The event engine: work grows with the spikes, and with the steps only as levels differ. Exact for every neuron.

With ``r`` steps left before readout the membrane is ``v_r = sum w max(0, n - r) + b max(0, S - r)``, ``n`` the
levels of the inputs. It is linear in ``r`` between two levels that occur, so spikes are sorted by level, falling,
and arrive one after the other; in between, the membranes of a tile of neurons advance at once, and only where one
of them ends over the threshold are the steps looked at one by one. A neuron whose largest ``r`` with
``v_r >= S + 1/2`` exists fires early and encodes ``S + 1 + r``; any other encodes ``clip(floor(v_0 + 1/2), 0, S)``.

A layer whose synapses are no convolutions of spikes (:mod:`quartz_plugin.engines.convolutions`) is stepped.

``plan`` lays out weights and ``tables`` of where spikes go (which neurons they ``reach``), ``run`` walks over the
layers, ``deliver`` sorts spikes by level and by kind (those of a kind reach neurons in the same way, whose places and
weights are looked up once for all of them), ``kernels`` are the compiled loops.
"""

from quartz_plugin.engines.event.constants import LEAST_CHANGE
from quartz_plugin.engines.event.run import count_changes, pooled, run_event

__all__ = ["LEAST_CHANGE", "count_changes", "pooled", "run_event"]
