"""Windows of different lengths: where the steps of an inference help most."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Unpack

import torch
from torch import Tensor, fx, nn

from quartz_plugin.coding import window_length, with_plain_numbers
from quartz_plugin.config import AllocationOptions, ConversionConfig, configured
from quartz_plugin.convert.calibrate import calibrate
from quartz_plugin.convert.fake_quant import all_values, values_behind
from quartz_plugin.convert.images import Calibration, chunk_size, evenly_of, some_of
from quartz_plugin.convert.pipeline import calibrate_traced, trace_network
from quartz_plugin.convert.refine.distance import output_distance
from quartz_plugin.convert.run import Run
from quartz_plugin.convert.traced import FoldedNetwork
from quartz_plugin.functional import fake_quantize
from quartz_plugin.graph import INPUT
from quartz_plugin.operators.table import Rule
from quartz_plugin.options import with_options
from quartz_plugin.precision import exact_arithmetic

CHOICES = (2, 3, 4, 5, 6, 8, 10, 12, 16, 24, 32, 48, 64)
"""The ``T`` that a layer may get."""

SCALE_IMAGES, DISTANCE_IMAGES = 1024, 256
"""Images, evenly spread, by which scales are found for each choice, and by which distances are measured."""


@with_options(ConversionConfig, AllocationOptions)
@with_plain_numbers
@exact_arithmetic()
def allocate_steps(
    ann: nn.Module,
    calibration: Calibration,
    steps: int,
    *,
    choices: Sequence[int] = CHOICES,
    example_input: Tensor | None = None,
    progress: Callable[[int, int], None] | None = None,
    rules: Mapping[type[nn.Module], Rule] | None = None,
    **options: Unpack[AllocationOptions],
) -> dict[str, int]:
    """Spend a number of steps on the layers where they help most.

    For every layer and every ``T``, rounding that layer alone moves the network's output away from the ANN's (relative
    entropy of the softmax on training images, or a regression's squared error). Beginning with the smallest windows,
    the one is lengthened that takes most of the sum of these distances for each step it costs, until no longer one
    fits. Layers side by side share their time: what costs no step comes first.

    Parameters
    ----------
    ann, calibration, example_input, rules
        As in :func:`~quartz_plugin.convert`; scales are those of least squares. Of the images, evenly spread, 1,024
        are looked at for scales, and 256 for distances, fewer where they are large.
    {options}
    steps : int
        What an inference may take, ``snn.n_steps``.
    choices : sequence of int
        The ``T`` that a layer may get.
    progress : callable, optional
        Called with the number of layers measured so far, and that of all.

    Returns
    -------
    dict
        Name of each layer, "input" and "output" included -> its ``T``; what ``convert(..., t_max=...)`` takes.

    Raises
    ------
    ConversionError
        If the network cannot be converted.
    ValueError
        If even the smallest windows take more than `steps`, or for bad calibration data.

    Examples
    --------
    >>> import torch, quartz_plugin
    >>> _ = torch.manual_seed(0)
    >>> ann = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 2))
    >>> images = torch.rand(100, 6)
    >>> windows = quartz_plugin.allocate_steps(ann, images, steps=40)
    >>> quartz_plugin.convert(ann, images, windows).n_steps <= 40
    True
    """
    lengths = sorted({window_length(choice) for choice in choices})
    if not lengths or type(steps) is not int:
        raise ValueError(f"give at least one choice and a whole number of steps, got {choices!r} and {steps!r}")
    config, run = configured(options, AllocationOptions, lengths[0] + 1), Run(example_input, rules=rules)
    traced, batches = trace_network(ann, calibration, config, run)
    images = evenly_of(torch.cat(list(batches)), SCALE_IMAGES)
    found = calibrate_traced(ann, traced, images.split(chunk_size(images)), config, run)
    network = found.network
    if network.activation_quantizers():
        raise ValueError("the network was trained for windows of its own, and can have no others")
    windows = dict.fromkeys(found.windows, lengths[0])
    needed = steps_of(network, windows)
    if needed > steps:
        raise ValueError(f"steps must be at least {needed}, which the smallest windows take, got {steps}")
    lost = _lost_by_rounding(network, images, lengths, config, progress)
    while True:
        best: tuple[float, str, int] | None = None
        now = steps_of(network, windows)
        for path, length in windows.items():
            for longer in (each for each in lengths if each > length):
                cost = steps_of(network, {**windows, path: longer}) - now
                gain = lost[path][length] - lost[path][longer]
                # Steps that cost nothing count as a hundredth of one.
                worth = gain / max(cost, 0.01)
                if now + cost <= steps and gain > 0 and (best is None or worth > best[0]):
                    best = worth, path, longer
        if best is None:
            break
        windows[best[1]] = best[2]
    output = str(network.last.target)
    signed = network.signed_output
    layers = [str(node.target) for node in network.layers()]
    return {"output" if signed and path == output else path: windows[path] + 1 for path in (INPUT, *layers)}


def steps_of(network: FoldedNetwork, windows: Mapping[str, int]) -> int:
    """Steps of an inference with these windows (path of each layer, and "input" -> steps)."""
    layers = set(network.layers())
    ends: dict[fx.Node, int] = {}
    for node in network.module.graph.nodes:
        if node.op == "placeholder":
            ends[node] = windows[INPUT]
        elif node.op == "call_module":
            arrival = max(ends[source] for source in node.all_input_nodes)
            ends[node] = arrival + (windows[str(node.target)] if node in layers else 0)
    last = network.last
    signed_half = windows[str(last.target)] if network.signed_output else 0
    return max(ends[node] for node in [*layers]) + signed_half + 1


def _lost_by_rounding(
    network: FoldedNetwork,
    images: Tensor,
    lengths: Sequence[int],
    config: ConversionConfig,
    progress: Callable[[int, int], None] | None,
) -> dict[str, dict[int, float]]:
    """Path of each layer, and "input" -> length of its window -> how far the output is when it alone is rounded."""
    layers = network.layers()
    by_length = {
        length: calibrate(
            network,
            images.split(chunk_size(images)),
            replace(config, calibration_method="least_squares"),
            own={},
            windows={str(node.target): length for node in layers},
        )
        for length in lengths
    }
    images = some_of(images, DISTANCE_IMAGES)
    lost: dict[str, dict[int, float]] = {}
    with torch.no_grad():
        values = all_values(network.module, images)
        wanted = values[network.last]
        size = by_length[lengths[0]].of_layers[str(network.last.target)]
        shift = torch.as_tensor(by_length[lengths[0]].output_shift, dtype=torch.float64).to(wanted)
        measured = [network.input, *layers]
        for done, node in enumerate(measured):
            path = INPUT if node.op == "placeholder" else str(node.target)
            signed = node is network.last and network.signed_output
            lost[path] = {}
            for length in lengths:
                one = torch.ones((), dtype=torch.float64)
                own = one if path == INPUT else by_length[length].of_layers[path]
                lowest, around = (-length, shift) if signed else (0, 0.0)
                rounded = fake_quantize(values[node] - around, own.to(values[node]), length, lowest) + around
                tried = values_behind(network.module, node, {**values, node: rounded})
                lost[path][length] = float(
                    output_distance(tried[network.last], wanted, network.outputs.task(config.task), size)
                )
            if progress is not None:
                progress(done + 1, len(measured))
    return lost


__all__ = ["allocate_steps"]
