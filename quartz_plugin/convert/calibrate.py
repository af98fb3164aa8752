"""Stage 4, calibrate: the value of each layer that the spiking network will call 1."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext

import torch
from torch import Tensor, fx

from quartz_plugin.calibration_methods import LeastSquares
from quartz_plugin.config import ConversionConfig, LayerConfig
from quartz_plugin.convert.processes import of_all_processes, raise_on_all_ranks
from quartz_plugin.convert.run import Run
from quartz_plugin.convert.sketches import QuantileSketch, RangeSketch
from quartz_plugin.convert.traced import FoldedNetwork, Scales
from quartz_plugin.graph import INPUT
from quartz_plugin.operators.table import ConversionError, Role, ceiling_of
from quartz_plugin.task import by_output, number_or_tensor


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
    run, nothing = run or Run(), LayerConfig()
    quantizers = network.activation_quantizers()
    scales = {path: each.scale.detach().double().cpu() for path, each in quantizers.items() if path != INPUT}
    shift: float | Tensor = (
        0.0 if network.output_quantizer is None else number_or_tensor(network.output_quantizer.shift)
    )
    silent: set[str] = set()
    least_squares = config.method.find(LeastSquares) is not None
    if scales.keys() >= {str(node.target) for node in network.layers()}:
        return Scales(scales, shift)
    by_channel = {
        str(node.target): (own.get(str(node.target), nothing).granularity or config.granularity) == "channel"
        for node in network.layers()
        if network.role_at(node) is Role.RECTIFIER
    }
    together = raise_on_all_ranks if run.distributed else nullcontext
    output: RangeSketch | None = None
    if config.task == "regression" and str(network.last.target) not in scales:
        # The output for a grey image: the same in all processes, and as a rule in the midst of the values.
        grey = torch.full((1, *network.input_shape), 0.5, dtype=network.dtype, device=network.device)
        output = RangeSketch(by_output(network.output(grey).double()).mean(dim=1).cpu())
    with together():
        seen, brightest, sketches = _observe(network, images, by_channel, scales, output, run.progress)
    if run.distributed:
        seen, brightest, sketches = of_all_processes(seen, brightest, sketches)
    if seen == 0:
        raise ValueError("calibration is empty: give at least one batch of training images")
    if brightest == 0.0:
        raise ValueError("calibration is all zero: give training images, with values in [0, 1]")

    for node in network.layers():
        path = str(node.target)
        if path not in sketches:
            continue
        sketch, own_percentile = sketches[path], own.get(path, nothing).percentile
        shape, ceiling = network.shape_at(node), ceiling_of(network.module_at(node))
        if isinstance(sketch, RangeSketch):
            found = sketch.range(
                own_percentile or config.output_percentile, network.signed_output, config.output_shifts
            )
            scale, shifts = (along_channels(each, shape) for each in found)
            scales[path] = scale if ceiling is None else scale.clamp(max=ceiling)
            shift = number_or_tensor(shifts)
            continue
        is_output = node is network.last
        if least_squares and own_percentile is None and not is_output:
            scale = sketch.least_squares(windows[path])
        else:
            scale = sketch.quantile(own_percentile or (config.output_percentile if is_output else config.percentile))
        # A channel seldom active has a percentile of 0: its largest value then; a dead one takes the layer's.
        scale = torch.where(scale > 0, scale, sketch.largest)
        scale = torch.where(scale > 0, scale, scale.max())
        if float(scale.max()) == 0.0:
            silent.add(path)
            scale = torch.full_like(scale, _scale_in_front(node, scales) if ceiling is None else ceiling)
        if ceiling is not None:
            scale = scale.clamp(max=ceiling)
        scales[path] = along_channels(scale, shape)
        if path in network.pairs:
            scales[network.pairs[path]] = scales[path].clone()
    return Scales(scales, shift, frozenset(silent))


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


def _observe(
    network: FoldedNetwork,
    images: Iterable[Tensor],
    by_channel: Mapping[str, bool],
    known: Mapping[str, Tensor],
    output: RangeSketch | None,
    progress: Callable[[int], None] | None,
) -> tuple[int, float, dict[str, QuantileSketch | RangeSketch]]:
    """Number of images, their largest value, and a sketch of each layer's values; the output's may be given."""
    # Both halves of a pair are scaled by the size of the signed value that they split.
    lower_halves = set(network.pairs.values())
    watched = {
        node.all_input_nodes[0] if str(node.target) in network.pairs else node: node
        for node in network.layers()
        if str(node.target) not in lower_halves and str(node.target) not in known
    }
    last = network.last
    sketches: dict[str, QuantileSketch | RangeSketch] = {}
    for node in watched.values():
        if node is last and output is not None:
            sketches[str(node.target)] = output
            continue
        per_channel = node is not last and by_channel.get(str(node.target), False)
        channels = network.shape_at(node)[0] if per_channel else 1
        sketches[str(node.target)] = QuantileSketch(channels, 64 if per_channel else 512)
    seen, brightest = 0, 0.0
    for chunk in images:
        brightest = max(brightest, float(chunk.max()))
        for node, value in network.run(chunk):
            if node in watched:
                path = str(watched[node].target)
                sketch = sketches[path]
                try:
                    if isinstance(sketch, RangeSketch):
                        sketch.update(by_output(value))
                        continue
                    values = value if watched[node] is node and node is not last else value.abs()
                    values = by_output(values) if len(sketch.zeros) > 1 else values.reshape(1, -1)
                    sketch.update(values.float())
                except ValueError as error:
                    raise ConversionError(f"{path!r} gives NaN or infinity on the calibration images") from error
        seen += len(chunk)
        if progress is not None:
            progress(seen)
    return seen, brightest, sketches


def along_channels(values: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Values ``[channels]``, or one, as they broadcast to one sample of this shape."""
    return values.reshape(()) if len(values) == 1 else values.view(-1, *[1] * (len(shape) - 1))
