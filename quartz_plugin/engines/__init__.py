"""Engines: ways to find the same spike steps.

``analytic`` uses the closed form (hold only), ``event`` walks from spike to spike (a CPU, with numba), ``stepped``
walks through time and judges the others.
"""

from __future__ import annotations

import math
from functools import partial
from importlib.util import find_spec

import torch
from torch import Tensor

from quartz_plugin.coding import NO_SPIKE
from quartz_plugin.engines.analytic import run_analytic
from quartz_plugin.engines.event import run_event
from quartz_plugin.engines.result import SimulationResult
from quartz_plugin.engines.stepped import run_stepped
from quartz_plugin.functional import closed_form
from quartz_plugin.graph import INPUT, ConvertedGraph
from quartz_plugin.graph.fingerprint import FINITE, Fingerprint, Kept, identity_of, structure_of
from quartz_plugin.precision import exact_arithmetic

__all__ = ["ENGINES", "SimulationResult", "decode_output", "run"]

_ARRIVING = Kept(lambda graph: bool(graph.arrivals()), structure_of)
"""Raises ValueError where windows that meet do not end together."""

ENGINES = {"analytic": run_analytic, "event": run_event, "stepped": run_stepped}


def run(graph: ConvertedGraph, images: Tensor, engine: str = "auto", record: bool = True) -> SimulationResult:
    """Simulate one inference for each image.

    Parameters
    ----------
    graph : ConvertedGraph
        The network.
    images : Tensor
        ``[B, *image_shape]``, values in [0, 1].
    engine : "auto", "analytic", "event" or "stepped"
        "auto" takes "analytic" where neurons are held, else "event" on a CPU where numba is installed, else "stepped".
    record : bool
        Keep the spikes of all layers, not of the output alone.

    Raises
    ------
    ValueError
        For images of a wrong shape or outside [0, 1], an unknown engine, one that cannot be exact here, synapses in
        a type narrower than float32, weights that are NaN or infinite, or paths that meet with windows that do not
        end together.
    ImportError
        For "event" where numba is not installed.
    """
    engine = _chosen(graph, engine)
    if graph.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"{graph.dtype} cannot hold the membrane; use snn.to(torch.float32)")
    images = graph.check_images(images)
    network = identity_of(graph)
    fingerprint = None if network is None else Fingerprint(network.structure, network.weights)
    if network is not None:
        FINITE.of(graph, fingerprint)
        _ARRIVING.of(graph, network.structure)
    window = graph.input_window
    with exact_arithmetic():
        drive = graph.values_to_encode(images) * window.length
        input_levels = closed_form(drive, window.length)
        engine_of = partial(run_event, fingerprint=fingerprint) if engine == "event" else ENGINES[engine]
        spike_steps, output_levels, membrane = engine_of(graph, input_levels, record)
        if record:
            steps = window.steps_of(input_levels.detach())
            if graph.silent:
                steps[input_levels == 0] = NO_SPIKE
            spike_steps = {INPUT: steps, **spike_steps}
    return SimulationResult(
        logits=_logits(graph, output_levels),
        membrane=_logits(graph, membrane),
        spike_steps=spike_steps,
        windows=graph.windows(),
        n_steps=graph.n_steps,
        engine=engine,
        signed_output=graph.layers[-1].neuron.p.signed,
        task=graph.task,
        last_positive_step=_last_positive_step(graph),
        network=network,
    )


def _chosen(graph: ConvertedGraph, engine: str) -> str:
    """Name of the engine to run; raises where it cannot be exact, or not run, here."""
    if engine not in ("auto", *ENGINES):
        raise ValueError(f'engine must be "auto" or one of {sorted(ENGINES)}, got {engine!r}')
    if torch.compiler.is_exporting() and not (graph.hold and engine in ("auto", "analytic")):
        raise ValueError(
            "torch.export takes the closed form of held neurons: convert with hold=True and leave the engine to auto"
        )
    on_cpu = graph.device.type == "cpu"
    if engine == "auto":
        if graph.hold:
            return "analytic"
        return "event" if on_cpu and not graph.wants_gradient and find_spec("numba") else "stepped"
    if engine == "analytic" and not graph.hold:
        raise ValueError(
            'engine="analytic" is exact with hold=True only (early spikes have no closed form); '
            'use engine="event" or engine="stepped"'
        )
    if engine == "event" and not on_cpu:
        raise ValueError(
            f'engine="event" runs on a CPU, and the network is on {graph.device}; '
            f'use engine="{"analytic" if graph.hold else "stepped"}", or snn.cpu()'
        )
    if engine == "event" and find_spec("numba") is None:
        raise ImportError("engine=\"event\" needs numba: pip install 'quartz_plugin[fast]'")
    return engine


def decode_output(graph: ConvertedGraph, output_spikes: Tensor) -> Tensor:
    """Logits that output spikes ``[steps, B, ...]`` on the global clock say."""
    neuron = graph.layers[-1].neuron
    fired = output_spikes != 0
    steps = torch.where(fired.any(dim=0), fired.to(torch.int8).argmax(dim=0), NO_SPIKE)
    levels = neuron.clock.output_window.levels_at(steps, neuron.p.silent_level)
    return _logits(graph, levels.to(graph.dtype))


def _logits(graph: ConvertedGraph, output_levels: Tensor) -> Tensor:
    """The output's levels in the ANN's units."""
    return graph.output_values(output_levels, graph.layers[-1].neuron.clock.window)


def _last_positive_step(graph: ConvertedGraph) -> int | None:
    """Step at which an output of the smallest positive value fires; None where outputs differ in their range."""
    scale, shift, clock = graph.output_scale, graph.output_shift, graph.layers[-1].neuron.clock
    if isinstance(scale, Tensor) or isinstance(shift, Tensor):
        return None
    window = clock.output_window
    level = math.floor(-shift * window.length / scale) + 1
    return window.step_of(max(-window.length, min(window.length, level)))
