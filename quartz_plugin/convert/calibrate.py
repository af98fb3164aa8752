"""Stage 4, calibrate: the value of each layer that the spiking network will call 1."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, fx, nn

from quartz_plugin.calibration_methods import LeastSquares
from quartz_plugin.config import ConversionConfig, LayerConfig
from quartz_plugin.convert.processes import of_all_processes, raise_on_all_ranks
from quartz_plugin.convert.run import Run
from quartz_plugin.convert.signed_pools import pools_of
from quartz_plugin.convert.sketches import HeadsSketch, QuantileSketch, RangeSketch
from quartz_plugin.convert.traced import FoldedNetwork, Scales
from quartz_plugin.graph import INPUT
from quartz_plugin.graph.walk import Step, Walk, add_up, plan_walk
from quartz_plugin.layout import as_stored, channels_last
from quartz_plugin.operators.modules import Add
from quartz_plugin.operators.table import ConversionError, ceiling_of
from quartz_plugin.outputs import task_of
from quartz_plugin.task import by_output, number_or_tensor

Sketch = QuantileSketch | RangeSketch | HeadsSketch


def calibrate(
    network: FoldedNetwork,
    images: Iterable[Tensor],
    config: ConversionConfig,
    own: Mapping[str, LayerConfig],
    windows: Mapping[str, int],
    run: Run | None = None,
) -> Scales:
    """Scales: percentiles of what each ReLU and the output (its size) give on the calibration images.

    With least squares, of the layers without a percentile of their own, the scale at which rounding loses least.
    Layers that were trained with an activation have its scale. A regression's outputs have a scale and a shift each.

    Activations are counted as they come; memory is that of the network and one chunk of images.

    Parameters
    ----------
    network : FoldedNetwork
        The folded network, unscaled.
    images : iterable of Tensor
        Chunks ``[n, ...]`` of raw training images; see :func:`chunks`.
    config : ConversionConfig
        Percentiles, granularity, method and task.
    own : dict
        Path of a layer -> its own options.
    windows : dict
        Path of a layer -> steps of its window.
    run : Run, optional
        Whether several processes add up their counts, of which each then gets the same scales, and the progress.

    Returns
    -------
    Scales
        Both halves of a pair have the same. A layer that is 0 on all images has its upper bound, or else the scale of
        its sources; it is among the silent ones.

    Raises
    ------
    ConversionError
        If a layer gives NaN or infinity.
    ValueError
        If there are no images, or all of them are 0.
    """
    run, quantizers = run or Run(), network.activation_quantizers()
    known = {path: each.scale.detach().double().cpu() for path, each in quantizers.items() if path != INPUT}
    shift = 0.0 if network.output_quantizer is None else number_or_tensor(network.output_quantizer.shift)
    if known.keys() >= {str(node.target) for node in network.layers()}:
        return Scales(known, shift)
    sketches = _sketches(network, config, own, known)
    with raise_on_all_ranks() if run.distributed else nullcontext():
        seen, brightest = _observe(network, images, sketches, run.progress)
    if run.distributed:
        seen, brightest, sketches = of_all_processes(seen, brightest, sketches)
    if seen == 0:
        raise ValueError("calibration is empty: give at least one batch of training images")
    if brightest == 0.0:
        raise ValueError("calibration is all zero: give training images, with values in [0, 1]")

    scales, silent, shifts = dict(known), set(), {}
    for node in network.layers():
        path = str(node.target)
        if (sketch := sketches.get(path)) is None:
            continue
        percentile, ceiling = own.get(path, NOTHING).percentile, ceiling_of(network.module_at(node))
        if isinstance(sketch, RangeSketch) and path in network.shifted:
            least_squares = config.method.find(LeastSquares) is not None and percentile is None
            scale, lowest = sketch.from_smallest(
                None if least_squares else percentile or config.percentile, windows[path]
            )
            shifts[path] = along_channels(lowest, network.shape_at(node))
        elif isinstance(sketch, RangeSketch | HeadsSketch):
            percentile = percentile or config.output_percentile
            scale, middle = sketch.range(percentile, network.signed_output, config.output_shifts)
            shift = number_or_tensor(along_channels(middle, network.shape_at(node)))
        else:
            scale = _scale_of(sketch, config, percentile, windows[path], node is network.last)
        if float(scale.max()) == 0.0:
            silent.add(path)
            scale = torch.full_like(scale, _scale_in_front(node, scales) if ceiling is None else ceiling)
        scale = scale if ceiling is None else scale.clamp(max=ceiling)
        scales[path] = along_channels(scale, network.shape_at(node))
        if path in network.pairs:
            scales[network.pairs[path]] = scales[path].clone()
    return Scales(scales, shift, frozenset(silent), shifts)


NOTHING = LayerConfig()
"""Options of a layer that has none of its own."""


def _sketches(
    network: FoldedNetwork, config: ConversionConfig, own: Mapping[str, LayerConfig], known: Mapping[str, Tensor]
) -> dict[str, Sketch]:
    """An empty sketch for each layer whose scale is not known; both halves of a pair share one."""
    sketches: dict[str, Sketch] = {}
    for node in network.layers():
        path = str(node.target)
        if path in known or path in network.pairs.values():
            continue
        heads = network.outputs.heads
        if node is network.last and network.outputs.task(config.task) == "regression":
            value = network.output(_grey(network)).double()
            if len(heads) > 1:
                tasks = [task_of(config.task, head.name) for head in heads]
                sketches[path] = HeadsSketch([head.shape for head in heads], tasks, value[0].cpu())
            else:
                sketches[path] = RangeSketch(by_output(value).mean(dim=1).cpu())
            continue
        granularity = own.get(path, NOTHING).granularity or config.granularity
        by_channel = granularity == "channel" and node is not network.last
        channels = network.shape_at(node)[0] if by_channel else 1
        sketches[path] = (
            RangeSketch(_centre(network, path, channels))
            if path in network.shifted
            else QuantileSketch(channels, 64 if by_channel else 512)
        )
    return sketches


def _grey(network: FoldedNetwork) -> Tensor:
    """An image whose values, the same in all processes, are as a rule in the midst of others'."""
    return torch.full((1, *network.input_shape), 0.5, dtype=network.dtype, device=network.device)


def _centre(network: FoldedNetwork, path: str, channels: int) -> Tensor:
    """A value of each channel's that the neurons at a path encode, ``[channels]``, float64."""
    pool = next(pool for pool, neurons in pools_of(network) if neurons == path)
    (value,) = (value for node, value in network.run(_grey(network)) if node is pool)
    centre = value.double().reshape(channels, -1).mean(dim=1).cpu()
    return centre.nan_to_num(0.0, 0.0, 0.0)


def _scale_of(
    sketch: QuantileSketch, config: ConversionConfig, percentile: float | None, window: int, is_output: bool
) -> Tensor:
    """Scale of each channel; 0 where all values are."""
    if config.method.find(LeastSquares) is not None and percentile is None and not is_output:
        scale = sketch.least_squares(window)
    else:
        scale = sketch.quantile(percentile or (config.output_percentile if is_output else config.percentile))
    # A channel seldom active has a percentile of 0: its largest value then; a dead one takes the layer's.
    scale = torch.where(scale > 0, scale, sketch.largest)
    return torch.where(scale > 0, scale, scale.max())


def _scale_in_front(node: fx.Node, scales: Mapping[str, Tensor]) -> float:
    """Largest scale of a layer's sources: that of one which shows none of its own."""
    found, pending = 0.0, list(node.all_input_nodes)
    while pending:
        source = pending.pop()
        if source.op == "placeholder":
            found = max(found, 1.0)
        elif str(source.target) in scales:
            found = max(found, float(scales[str(source.target)].max()))
        else:
            pending.extend(source.all_input_nodes)
    return found


class _Overwriting(Walk):
    """Evaluates a network in as little memory as it can: each value holds up to the next alone."""

    def at_synapses(self, step: Step) -> Any:
        if step.spare and type(step.module) is nn.ReLU:
            return torch.relu_(self.source(step))
        if step.spare and type(step.module) is Add and step.arguments is not None:
            return add_up(
                [self.values[node] for node in step.arguments], [node in step.spare for node in step.arguments]
            )
        return super().at_synapses(step)


@torch.no_grad()
def _observe(
    network: FoldedNetwork,
    images: Iterable[Tensor],
    sketches: Mapping[str, Sketch],
    progress: Callable[[int], None] | None,
) -> tuple[int, float]:
    """Count the layers' values in their sketches; returns the number of images and their largest value."""
    # Both halves of a pair are scaled by the size of the signed value that they split.
    watched = {
        node.all_input_nodes[0] if str(node.target) in network.pairs else node: node
        for node in network.layers()
        if str(node.target) in sketches and str(node.target) not in network.shifted
    }
    # Of signed values only those that their pools let pass count.
    pooled = {pool: path for pool, path in pools_of(network) if path in sketches}
    last, walk = network.last, _Overwriting(plan_walk(network.module))
    seen, brightest = 0, 0.0
    for chunk in images:
        brightest = max(brightest, float(chunk.max()))
        for (node, *_), value in walk.each(channels_last(chunk)):
            if node in watched or node in pooled:
                path = pooled[node] if node in pooled else str(watched[node].target)
                sketch = sketches[path]
                try:
                    if isinstance(sketch, HeadsSketch):
                        sketch.update(by_output(value))
                        continue
                    if isinstance(sketch, RangeSketch):
                        sketch.update(by_output(value).reshape(len(sketch.centre), -1))
                        continue
                    values = value if watched[node] is node and node is not last else value.abs()
                    values = by_output(values) if len(sketch.zeros) > 1 else as_stored(values).unsqueeze(0)
                    sketch.update(values)
                except ValueError as error:
                    raise ConversionError(f"{path!r} gives NaN or infinity on the calibration images") from error
        seen += len(chunk)
        if progress is not None:
            progress(seen)
    return seen, brightest


def along_channels(values: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Values ``[channels]``, or one, as they broadcast to one sample of this shape."""
    return values.reshape(()) if len(values) == 1 else values.view(-1, *[1] * (len(shape) - 1))
