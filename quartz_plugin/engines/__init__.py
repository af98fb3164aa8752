"""Engines: ways to find the same spike steps.

``analytic`` uses the closed form (hold only), ``integer`` does so in the arithmetic of int8 (weights on grids),
``event`` walks from spike to spike (a CPU, with numba), ``stepped`` walks through time and judges the others.
"""

from __future__ import annotations

import math
from importlib.util import find_spec
from typing import Any, Literal

import torch
from torch import Tensor

from quartz_plugin.coding import NO_SPIKE, Window
from quartz_plugin.engines.analytic import run_analytic
from quartz_plugin.engines.event import run_event
from quartz_plugin.engines.integer import pays_in_integers, run_integer, why_not_integers
from quartz_plugin.engines.result import SimulationResult
from quartz_plugin.engines.stepped import run_stepped
from quartz_plugin.functional import closed_form
from quartz_plugin.graph import INPUT, ConvertedGraph
from quartz_plugin.graph.fingerprint import Snapshot, identity_of, snapshot_of
from quartz_plugin.graph.topology import FINITE, Topology
from quartz_plugin.precision import exact_arithmetic
from quartz_plugin.task import Task, number_or_tensor

__all__ = ["ENGINES", "EngineName", "SimulationResult", "decode_output", "run"]

EngineName = Literal["auto", "analytic", "event", "integer", "stepped"]

ENGINES = {"analytic": run_analytic, "event": run_event, "integer": run_integer, "stepped": run_stepped}


def run(
    graph: ConvertedGraph, images: Any, engine: str = "auto", record: bool = True, packed: bool = False
) -> SimulationResult:
    """Simulate one inference for each image.

    Parameters
    ----------
    graph : ConvertedGraph
        The network.
    images : Tensor
        ``[B, *image_shape]``, values in [0, 1].
    engine : "auto", "analytic", "event", "integer" or "stepped"
        Where neurons are held "auto" takes "integer", if it adds up most in int8, else "analytic"; where they are not
        "event" on a CPU where numba is installed, else "stepped".
    record : bool
        Keep the spikes of all layers, not of the output alone.
    packed : bool
        `images` are what :meth:`ConvertedGraph.check_images` gave.

    Raises
    ------
    ValueError
        For images of a wrong shape or outside [0, 1], an unknown engine, one that cannot be exact here, synapses in
        a type narrower than float32, weights that are NaN or infinite, or paths that meet with windows that do not
        end together.
    ImportError
        For "event" where numba is not installed.
    """
    snapshot = snapshot_of(graph)
    topology = Topology.of(graph, snapshot)
    engine = _chosen(topology, engine, images, snapshot)
    if graph.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"{graph.dtype} cannot hold the membrane; use snn.to(torch.float32)")
    images = images if packed else graph.check_images(images)
    network = identity_of(graph, snapshot)
    if network is not None:
        FINITE.of(graph, snapshot)
        # Looked at, for it raises where windows that meet do not end together.
        _ = topology.arrivals
    window = graph.input_window
    with exact_arithmetic():
        drive = graph.values_to_encode(images) * window.length
        input_levels = closed_form(drive, window.length)
        spike_steps, output_levels, membrane, arithmetic = ENGINES[engine](graph, input_levels, record, snapshot)
        if record:
            steps = window.steps_of(input_levels.detach())
            if graph.silent:
                steps[input_levels == 0] = NO_SPIKE
            spike_steps = {INPUT: steps, **spike_steps}
    neuron = topology.output.neuron
    return SimulationResult(
        logits=graph.output_values(output_levels, neuron.clock.window),
        membrane=graph.output_values(membrane, neuron.clock.window),
        spike_steps=spike_steps,
        windows=dict(topology.windows),
        n_steps=topology.n_steps,
        engine=engine,
        signed_output=neuron.p.signed,
        task=graph.task,
        last_positive_step=_last_positive_step(graph.output_scale, graph.output_shift, neuron.clock.output_window),
        layout=graph.outputs,
        parts=_parts(graph, neuron.clock.output_window),
        network=network,
        arithmetic=dict(arithmetic),
    )


# torch 2.6 has no is_exporting. A simulation is never compiled (uncompiled.py), so what compiles there exports.
_is_exporting = getattr(torch.compiler, "is_exporting", torch.compiler.is_compiling)


def _chosen(topology: Topology, engine: str, images: Any = None, snapshot: Snapshot | None = None) -> str:
    """Name of the engine to run; raises where it cannot be exact, or not run, here."""
    graph, hold = topology.graph, topology.hold
    if engine not in ("auto", *ENGINES):
        raise ValueError(f'engine must be "auto" or one of {sorted(ENGINES)}, got {engine!r}')
    if _is_exporting() and not (hold and engine in ("auto", "analytic")):
        raise ValueError(
            "torch.export takes the closed form of held neurons: convert with hold=True and leave the engine to auto"
        )
    on_cpu = graph.device.type == "cpu"
    wants_gradient = graph.wants_gradient or (isinstance(images, Tensor) and images.requires_grad)
    if engine == "auto":
        if hold:
            in_integers = not _is_exporting() and not wants_gradient and pays_in_integers(graph, snapshot)
            return "integer" if in_integers else "analytic"
        return "event" if on_cpu and not graph.wants_gradient and find_spec("numba") else "stepped"
    if engine == "analytic" and not hold:
        raise ValueError(
            'engine="analytic" is exact with hold=True only (early spikes have no closed form); '
            'use engine="event" or engine="stepped"'
        )
    if engine == "integer" and (reason := why_not_integers(graph, snapshot)) is not None:
        raise ValueError(f'engine="integer" cannot be exact here: {reason}; or use engine="{_other_engine(hold)}"')
    if engine == "integer" and wants_gradient:
        raise ValueError('engine="integer" gives no gradients; use engine="analytic"')
    if engine == "event" and not on_cpu:
        raise ValueError(
            f'engine="event" runs on a CPU, and the network is on {graph.device}; '
            f'use engine="{_other_engine(hold)}", or snn.cpu()'
        )
    if engine == "event" and find_spec("numba") is None:
        raise ImportError("engine=\"event\" needs numba: pip install 'quartz_plugin[fast]'")
    return engine


def _other_engine(hold: bool) -> str:
    return "analytic" if hold else "stepped"


def decode_output(graph: ConvertedGraph, output_spikes: Tensor) -> Tensor:
    """Logits that output spikes ``[steps, B, ...]`` on the global clock encode."""
    neuron = graph.layers[-1].neuron
    fired = output_spikes != 0
    steps = torch.where(fired.any(dim=0), fired.to(torch.int8).argmax(dim=0), NO_SPIKE)
    levels = neuron.clock.output_window.levels_at(steps, neuron.p.silent_level)
    return graph.output_values(levels.to(graph.dtype), neuron.clock.window)


def _parts(graph: ConvertedGraph, window: Window) -> dict[str, tuple[Task, int | None]]:
    """Task and last positive step of each of several outputs."""
    if len(graph.outputs.heads) == 1:
        return {}
    if _is_exporting():
        return {head.name: (graph.task_of(head.name), None) for head in graph.outputs.heads}
    scale, shift = (torch.as_tensor(each) for each in (graph.output_scale, graph.output_shift))
    units = sum(head.units for head in graph.outputs.heads)
    ranges = zip(*(graph.outputs.split(each.expand(1, units)) for each in (scale, shift)), strict=True)
    found: dict[str, tuple[Task, int | None]] = {}
    for head, own in zip(graph.outputs.heads, ranges, strict=True):
        same = [number_or_tensor(each.unique()) for each in own]
        found[head.name] = graph.task_of(head.name), _last_positive_step(same[0], same[1], window)
    return found


def _last_positive_step(scale: float | Tensor, shift: float | Tensor, window: Window) -> int | None:
    """Step at which an output of the smallest positive value fires; None where outputs differ in their range."""
    if isinstance(scale, Tensor) or isinstance(shift, Tensor):
        return None
    level = math.floor(-shift * window.length / scale) + 1
    return window.step_of(max(-window.length, min(window.length, level)))
