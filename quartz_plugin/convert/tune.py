r"""Tune, between calibrate and rescale: scales, biases and weights that suit the rounding, without labels.

Held neurons say :math:`s/S\, clip(\lfloor S y / s + 1/2 \rfloor, 0, S)`, so the spiking network is the ANN with clipped
and rounded activations, and what is known of quantised networks holds for it: scales that a search finds, biases that
make up for the mean error of rounding (arXiv:1906.04721), layers that learn to give what the ANN's gave
(arXiv:2102.05426, arXiv:1902.08153). All of it sees unlabelled training images only, and changes numbers alone: what is
emitted afterwards is a network like any other.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from quartz_plugin.activation import TTFSActivation
from quartz_plugin.calibration_methods import TUNING, CalibrationMethod
from quartz_plugin.config import ConversionConfig
from quartz_plugin.convert.calibrate import chunk_size, evenly_of
from quartz_plugin.convert.fake_quant import insert_fake_quant, output_code, values_at
from quartz_plugin.convert.rescale import along_outputs, scaled_weight
from quartz_plugin.convert.traced import TracedNetwork
from quartz_plugin.functional import closed_form, fake_quantize
from quartz_plugin.graph import INPUT, call_node
from quartz_plugin.operators.modules import WEIGHTED
from quartz_plugin.operators.table import NORMS, Affine, Role
from quartz_plugin.task import CLASSIFICATION, Task, by_output, class_scores, decide, number_or_tensor, single_logit

TuningProgress = Callable[[int, int], None]


def refine(
    draft: TracedNetwork,
    scales: Mapping[str, Tensor],
    windows: Mapping[str, int],
    images: Tensor,
    config: ConversionConfig,
    progress: TuningProgress,
) -> tuple[dict[str, Tensor], CalibrationMethod]:
    """Carry out what a method names besides percentiles and least squares; changes the draft.

    Parameters
    ----------
    draft : TracedNetwork
        The folded, checked network.
    scales : dict
        Path -> scale of each ReLU and of the output.
    windows : dict
        Path of each ReLU and of the output, and "input" -> steps of its window.
    images : Tensor
        Training images, ``[N, ...]``.
    config : ConversionConfig
        Method, passes and rate of what learns, and the task.
    progress : callable
        Called with the steps done and those to do.

    Returns
    -------
    dict, CalibrationMethod
        The scales, and what they come from: the method without what was left out.
    """
    found, method, task = dict(scales), config.method, config.task
    output = str(draft.last.target)
    ranged = evenly_of(images, RANGE_VALUES // max(1, math.prod(draft.shape_at(draft.last))))
    wanted = torch.cat([draft.output(chunk) for chunk in ranged.split(chunk_size(images))])
    wanted = decide(wanted) if task == "classification" else wanted
    if method.scale == "search":
        found = search_scales(draft, found, windows, images, task, progress)
    if "bias_correction" in method.refinements:
        correct_biases(draft, found, windows, images)
    if "output" in method.refinements:
        found[output], draft.output_shift = output_range(draft, found, windows, ranged, wanted, task)
    if method.refinements & TUNING:
        tuned = reconstruct(
            draft, found, windows, images,
            weights="distill" in method.refinements, passes=config.tuning_passes, learning_rate=config.tuning_rate,
            task=task, progress=progress,
        )  # fmt: skip
        if tuned is None:
            return found, replace(method, refinements=method.refinements - TUNING)
        found = tuned
        if "output" in method.refinements:
            found[output], draft.output_shift = output_range(draft, found, windows, ranged, wanted, task)
    return found, method


RANGE_VALUES, RANGE_DECISIONS = 1 << 26, 1 << 17
"""Values of all outputs, and decisions, by which the output's range is chosen, at most; evenly spread."""


AT_ONCE = 1 << 22
"""Input values that go through the whole network together where all of them are looked at layer by layer."""


LAYER_VALUES = 1 << 27
"""Values of the largest layer that are held at once where all images go through one layer after the other."""


TUNED_AT_ONCE = 1 << 20
"""Input values of a batch that tuning takes, 10 images at least and 50 at most."""


def some_of(images: Tensor, most: int) -> Tensor:
    """As many images, evenly spread, as :data:`AT_ONCE` allows, and `most` at most."""
    return evenly_of(images, min(most, AT_ONCE // max(1, images[:1].numel())))


def search_scales(
    draft: TracedNetwork,
    scales: Mapping[str, Tensor],
    windows: Mapping[str, int],
    images: Tensor,
    task: Task,
    progress: TuningProgress,
) -> dict[str, Tensor]:
    """Multiply one layer's scales after the other by what brings the network's output nearest to the ANN's.

    Nearest is least in :func:`output_distance`.
    """
    images = some_of(images, SEARCH_IMAGES)
    module = insert_fake_quant(draft, scales, windows)
    found = {path: scale.clone() for path, scale in scales.items()}
    nodes = list(module.graph.nodes)
    layers = [n for n in nodes if n.op == "call_module" and str(n.target) in found and _is_code(module, n)]
    (last,) = nodes[-1].all_input_nodes
    size = scales[str(draft.last.target)]
    with torch.no_grad():
        wanted = draft.output(images)
        values: dict[fx.Node, Any] = {}
        run_from(module, nodes, values, images)
        least = float(output_distance(values[last], wanted, task, size))
        kept = values
        for done, layer in enumerate(layers):
            path, place = str(layer.target), nodes.index(layer)
            code = module.get_submodule(path)
            assert isinstance(code, TTFSActivation)
            best = 1.0
            for factor in FACTORS:
                code.log_scale.add_(math.log(factor))
                tried = dict(values)
                run_from(module, nodes[place:], tried, images)
                code.log_scale.sub_(math.log(factor))
                if (distance := float(output_distance(tried[last], wanted, task, size))) < least:
                    least, best, kept = distance, factor, tried
            if best != 1.0:
                code.log_scale.add_(math.log(best))
                found[path] = code.scale.double().cpu()
                values = kept
            progress(done + 1, len(layers))
    return found


SEARCH_IMAGES = 256
"""Images that the search looks at."""

FACTORS = (0.5, 0.6, 0.7, 0.8, 0.9, 1.12, 1.26)
"""What the search multiplies a layer's scales by, besides leaving them alone."""


def _is_code(module: fx.GraphModule, node: fx.Node) -> bool:
    return isinstance(module.get_submodule(str(node.target)), TTFSActivation)


def run_from(module: fx.GraphModule, nodes: Sequence[fx.Node], values: dict[fx.Node, Any], images: Tensor) -> None:
    """Put the values of these nodes, one after the other, to those that are known."""
    for node in nodes:
        if node.op != "output":
            values[node] = images if node.op == "placeholder" else call_node(module, node, values)


def output_distance(
    outputs: Tensor, wanted: Tensor, task: Task, size: Tensor | float, temperature: float = 1.0
) -> Tensor:
    """Distance of outputs from those wanted: :func:`relative_entropy`, or of a regression the mean squared error.

    Each output's error is taken in units of its `size`, so that small outputs count as much as large ones.
    """
    if task == "classification":
        return relative_entropy(outputs, wanted, temperature)
    size = size.to(outputs) if isinstance(size, Tensor) else size
    return ((outputs - wanted) / size).square().mean()


def relative_entropy(logits: Tensor, wanted: Tensor, temperature: float = 1.0) -> Tensor:
    """Of the softmax of logits ``[B, classes, ...]``, from that of the wanted logits; mean over decisions.

    A single logit stands for the two classes of its sigmoid. Both are divided by the temperature, and what comes out is
    multiplied by its square (arXiv:1503.02531).
    """
    given, wanted = (F.log_softmax(class_scores(each) / temperature, dim=1) for each in (logits, wanted))
    return temperature**2 * F.kl_div(given, wanted, reduction="batchmean", log_target=True)


TEMPERATURE = 4.0
"""That of what is learned: an ANN that is sure of its training images says little else at 1."""


def output_range(
    draft: TracedNetwork,
    scales: Mapping[str, Tensor],
    windows: Mapping[str, int],
    images: Tensor,
    wanted: Tensor,
    task: Task = CLASSIFICATION,
) -> tuple[Tensor, float | Tensor]:
    """:func:`best_range` of a network's output; where that finds none, the range it has.

    Parameters
    ----------
    draft, scales, windows
        The network with its scales and windows.
    images : Tensor
        Training images.
    wanted : Tensor
        Classes that the ANN decided for; of a regression its outputs.
    task : "classification" or "regression"
        What the output means.
    """
    path = str(draft.last.target)
    module = insert_fake_quant(draft, scales, windows)
    code = module.get_submodule(output_code(module))
    assert isinstance(code, TTFSActivation)
    found = best_range(code, drives_of(module, code, images), wanted, task)
    if found is None:
        return scales[path], draft.output_shift
    scale, shift = found
    return torch.as_tensor(scale, dtype=torch.float64).cpu(), shift


def drives_of(module: nn.Module, code: TTFSActivation, images: Tensor) -> Tensor:
    """Inputs of the output's activation on these images, of the output's shape."""
    drives: list[Tensor] = []
    hook = code.register_forward_pre_hook(lambda _, given: drives.append(given[0]))
    try:
        with torch.no_grad():
            for chunk in images.split(chunk_size(images)):
                module(chunk)
    finally:
        hook.remove()
    return torch.cat(drives)


def best_range(
    code: TTFSActivation, drives: Tensor, wanted: Tensor, task: Task = CLASSIFICATION
) -> tuple[float | Tensor, float | Tensor] | None:
    """The output's scale and shift with which the spikes agree most often, or most nearly, with what is wanted.

    The output encodes values from ``shift - scale`` to ``shift + scale`` (a ReLU: from 0, without a shift). A narrow
    range clips the largest outputs to one value, a wide one rounds them to one; where between them least is lost,
    depends on the window.

    Parameters
    ----------
    code : TTFSActivation
        The output's.
    drives : Tensor
        Its inputs, ``[B, ...]``.
    wanted : Tensor
        Classes ``[B]``, or ``[B, ...]`` where every position is a decision; of a regression values of the drives'
        shape.
    task : "classification" or "regression"
        What the output means. Of several first spikes each counts its share; a regression's outputs each have the range
        of the least squared error.

    Returns
    -------
    (scale, shift) or None
        Numbers, of a regression tensors ``[outputs, 1, ...]``. None where the drives are not finite, or all 0.
    """
    largest = float(drives.abs().max())
    if not math.isfinite(largest) or largest == 0.0:
        return None
    with torch.no_grad():
        if task == "regression":
            return _nearest_range(code, drives, wanted)
        return _agreeing_range(code, drives, wanted)


def _agreeing_range(code: TTFSActivation, drives: Tensor, wanted: Tensor) -> tuple[float, float]:
    """The range with which the first spike decides most often as wanted."""
    single, logits, wanted = single_logit(drives), class_scores(drives), wanted.flatten()
    window = code.window
    if single and code.signed:
        # Half a step beside 0, none of its values is 0, and its sign is that of its drive, whatever the range.
        scale = float(logits.abs().max()) / (1 - 1 / (2 * window))
        return scale, scale / (2 * window)
    logits, wanted = (logits, wanted) if bool((wanted >= 0).all()) else (logits[wanted >= 0], wanted[wanted >= 0])
    logits, wanted = (evenly_of(each, RANGE_DECISIONS) for each in (logits, wanted))
    largest, lowest = float(logits.abs().max()), -window if code.signed else 0
    ends = float(logits.min()), float(logits.max())
    shifts = torch.linspace(*ends, 41, dtype=logits.dtype).tolist() if code.signed else []
    best = -1.0, largest, 0.0
    for scale in (largest * 0.93**power for power in range(44)):
        for shift in (0.0, *shifts):
            levels = closed_form((logits - shift) * (window / scale), window, lowest)
            first = levels == levels.amax(dim=1, keepdim=True)
            share = first.gather(1, wanted.unsqueeze(1)).squeeze(1) / first.sum(dim=1)
            best = max(best, (float(share.mean()), scale, shift))
    return min(best[1], code.ceiling or best[1]), best[2]


def _nearest_range(code: TTFSActivation, drives: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """Each output's range with which its values are nearest to those wanted, in squares."""
    shape = [1] * (drives.dim() - 2)
    given, wanted = (evenly_of(by_output(each).double().T, RANGE_DECISIONS).T for each in (drives, wanted))
    window, lowest = code.window, -code.window if code.signed else 0
    low, high = wanted.amin(dim=1, keepdim=True), wanted.amax(dim=1, keepdim=True)
    middle = (low + high) / 2 if code.signed else torch.zeros_like(low)
    reach = (high - low) / 2 if code.signed else high
    reach = torch.where(reach > 0, reach, torch.where(middle != 0, middle.abs(), torch.ones_like(reach)))
    if code.ceiling is not None:
        reach = reach.clamp(max=code.ceiling)
    least, best_scale, best_shift = torch.full_like(middle, math.inf), reach, middle
    for scale in (reach * 0.97**power for power in range(44)):
        for aside in (-0.5, -0.25, 0.0, 0.25, 0.5) if code.signed else (0.0,):
            # A narrower range may lie anywhere within the whole one.
            shift = middle + 2 * aside * (reach - scale)
            error = (
                (fake_quantize(given - shift, scale, window, lowest) + shift - wanted)
                .square()
                .mean(dim=1, keepdim=True)
            )
            better = error < least
            least = torch.where(better, error, least)
            best_scale, best_shift = (
                torch.where(better, new, old) for new, old in ((scale, best_scale), (shift, best_shift))
            )
    if len(best_scale) == 1:
        return best_scale.reshape(()), best_shift.reshape(())
    return best_scale.view(-1, *shape), best_shift.view(-1, *shape)


def correct_biases(
    draft: TracedNetwork, scales: Mapping[str, Tensor], windows: Mapping[str, int], images: Tensor
) -> None:
    """Add to every channel's bias what rounding and clipping in front of it take away on average.

    Layer after layer, each with the layers in front of it corrected; by as many images, evenly spread, as
    :data:`LAYER_VALUES` allows.
    """
    largest = max(math.prod(draft.shape_at(node)) for node in (draft.input, *(node for node, _ in draft.steps())))
    images = evenly_of(images, LAYER_VALUES // max(1, largest))
    layers = set(draft.layers())
    exact: dict[fx.Node, Any] = {}
    spiking: dict[fx.Node, Any] = {}
    shifts: dict[fx.Node, Tensor] = {}
    nodes = list(draft.module.graph.nodes)
    last_use = {source: node for node in nodes for source in node.all_input_nodes}
    with torch.no_grad():
        for node in nodes:
            if node.op == "output":
                break
            if node.op == "placeholder":
                exact[node] = images
                one = images.new_ones(())
                spiking[node] = fake_quantize(images, one, windows[INPUT]) if draft.encodes_image else images
                continue
            path = str(node.target)
            if draft.role_at(node) is Role.RECTIFIER:
                (source,) = node.all_input_nodes
                shifts[node] = shift = _channel_means(exact[source] - spiking[source])
                exact[node] = call_node(draft.module, node, exact)
                drive = spiking[source] + shift
                spiking[node] = fake_quantize(drive, scales[path].to(drive), windows[path])
            else:
                exact[node] = call_node(draft.module, node, exact)
                spiking[node] = call_node(draft.module, node, spiking)
                if node in layers:
                    shifts[node] = _channel_means(exact[node] - spiking[node])
            for source in [source for source in exact if last_use.get(source) is node]:
                del exact[source], spiking[source]
    for node, shift in shifts.items():
        _shift(draft, node, shift)
    draft.module.recompile()


def _shift(draft: TracedNetwork, node: fx.Node, shift: Tensor) -> None:
    """Add to what a layer's neurons are driven by: in the bias of the layer in front, or in a sum of its own."""
    rectifies = draft.role_at(node) is Role.RECTIFIER
    source = node.all_input_nodes[0] if rectifies else node
    before: Any = draft.module_at(source) if source.op == "call_module" else None
    # A linear layer's channels are its last dimension: with positions in front, shifts are those of positions.
    fits = isinstance(before, WEIGHTED) and not (isinstance(before, nn.Linear) and shift.dim() > 1)
    if fits and (not rectifies or len(source.users) == 1):
        _give_bias(draft, before)
        biased: Any = before
        biased.bias.data.add_(shift.flatten())
    elif rectifies:
        correction = Affine(torch.ones_like(shift), shift)
        inserted = draft.insert(f"{node.target}_correction", correction, source, draft.shape_at(source))
        node.replace_input_with(source, inserted)
        draft.log(str(inserted.target), operation="bias correction", became="part of the neurons' bias", exact="exact")


def _channel_means(values: Tensor) -> Tensor:
    """Mean of each channel over batch and positions, ``[C, 1, ...]``."""
    others = [dim for dim in range(values.dim()) if dim != 1]
    return values.mean(dim=others, keepdim=True)[0]


def reconstruct(
    draft: TracedNetwork,
    scales: Mapping[str, Tensor],
    windows: Mapping[str, int],
    images: Tensor,
    *,
    weights: bool,
    passes: int,
    progress: TuningProgress,
    learning_rate: float,
    task: Task = CLASSIFICATION,
    activations: float = 4.0,
) -> dict[str, Tensor] | None:
    """Let the rounded network learn to give what the ANN gives, in every layer and at the end; returns the scales.

    Where its output is twice as far from the ANN's afterwards, or no number, warn, leave all as it was, return None.
    """
    options = _Tuning(weights, passes, progress, learning_rate, task, activations)
    output = str(draft.last.target)
    factors = _balancing_factors(draft, scales[output]) if task == "regression" else None
    if factors is None:
        return _reconstruct(draft, scales, windows, images, options)
    _scale_outputs(draft, factors)
    learned = _reconstruct(draft, {**scales, output: scales[output] * factors}, windows, images, options)
    _scale_outputs(draft, 1 / factors)
    return None if learned is None else {**learned, output: scales[output]}


@dataclass(frozen=True)
class _Tuning:
    """Options of :func:`reconstruct`."""

    weights: bool
    passes: int
    progress: TuningProgress
    learning_rate: float
    task: Task
    activations: float


def _balancing_factors(draft: TracedNetwork, scale: Tensor) -> Tensor | None:
    """Powers of two that bring a regression's outputs to about one size, so that one learning rate suits all of them.

    None where one layer of weights does not have them all to itself.
    """
    if draft.last.op != "call_module" or not isinstance(module := draft.module_at(draft.last), WEIGHTED):
        return None
    factors = torch.exp2(-scale.log2().round())
    return factors if along_outputs(module, factors) else None


def _scale_outputs(draft: TracedNetwork, factors: Tensor) -> None:
    """Multiply the last layer's outputs by powers of two, exactly; the shift goes with them."""
    layer: Any = draft.module_at(draft.last)
    layer.weight.data.copy_(scaled_weight(layer, torch.ones_like(factors).max(), factors))
    if layer.bias is not None:
        layer.bias.data.mul_(factors.flatten().to(layer.bias))
    draft.output_shift = number_or_tensor(torch.as_tensor(draft.output_shift, dtype=torch.float64) * factors)


def _reconstruct(
    draft: TracedNetwork,
    scales: Mapping[str, Tensor],
    windows: Mapping[str, int],
    images: Tensor,
    options: _Tuning,
) -> dict[str, Tensor] | None:
    learning_rate, task = options.learning_rate, options.task
    teacher, output = copy.deepcopy(draft.module), str(draft.last.target)
    for _, layer in draft.steps():
        if isinstance(layer, WEIGHTED):
            _give_bias(draft, layer)
    module = insert_fake_quant(draft, scales, windows)
    groups = parameter_groups(module, learning_rate, weights=options.weights)
    every = {str(node.target) for node in draft.layers()}
    paths = every - {output}
    if images.dim() == 4:
        module, teacher = (each.to(memory_format=torch.channels_last) for each in (module, teacher))  # type: ignore[call-overload]
    batch = max(10, min(50, TUNED_AT_ONCE // images[:1].numel()))
    steps_of_a_pass = math.ceil(len(images) / batch)
    total = options.passes * steps_of_a_pass
    optimizer, schedule = adam(groups, total)
    judged = evenly_of(images, SEARCH_IMAGES)
    size = scales[output]

    def distance() -> float:
        chunks = judged.split(chunk_size(judged))
        with torch.no_grad():
            answers = torch.cat([values_at(module, chunk, {output})[0][output] for chunk in chunks])
            wanted = torch.cat([teacher(chunk) for chunk in chunks])
        return float(output_distance(answers, wanted, task, size))

    before = distance()
    generator = torch.Generator().manual_seed(0)
    with torch.enable_grad():
        for done in range(total):
            if done % steps_of_a_pass == 0:
                order = torch.randperm(len(images), generator=generator)
            place = (done % steps_of_a_pass) * batch
            chosen = images[order[place : place + batch]]
            with torch.no_grad():
                wanted, logits = values_at(teacher, chosen, paths)
            given, _ = values_at(module, chosen, every)
            # The membranes: what the output makes of them is for its own rule.
            answers = given.pop(output)
            loss = output_distance(answers, logits, task, size, TEMPERATURE)
            # At first the layers in front tell best what to do; at last the output decides.
            loss = loss + options.activations * (1 - done / total) * relative_feature_mse(given, wanted)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
            options.progress(min(done + 1, total), total)
    after = distance()
    # Also where it is no number.
    if not after <= 2 * before + NO_DISTANCE:
        warnings.warn(
            f"tuning moved the output away from the ANN's ({DISTANCES[task]} {before:.3g} before, {after:.3g} after) "
            f"and is left out: give a lower tuning_rate than {learning_rate:g}, or more calibration images or "
            "tuning_passes",
            stacklevel=2,
        )
        return None
    return _take_back(draft, module, scales)


def _outputs(layer: Any) -> int:
    return int(layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels)


def _give_bias(draft: TracedNetwork, layer: Any) -> None:
    """Let a layer with weights have a bias."""
    if layer.bias is None:
        zeros = torch.zeros(_outputs(layer), dtype=draft.dtype, device=draft.device)
        layer.bias = nn.Parameter(zeros, requires_grad=False)


NO_DISTANCE = 1e-6
"""Distance that is none: what single precision makes of two outputs that are alike."""

DISTANCES: dict[Task, str] = {"classification": "relative entropy", "regression": "squared error by squared range"}
"""Names of :func:`output_distance`."""


def parameter_groups(
    module: nn.Module, learning_rate: float, *, weights: bool = True, unequal: nn.Module | None = None
) -> list[dict[str, Any]]:
    """What Adam learns of a rounded network, and how fast: a layer's parameters in proportion to its weights' size.

    Adam moves every parameter as far as every other, so with one rate for all, layers of small weights would be lost
    first. The network is left with gradients on for these parameters alone.

    Parameters
    ----------
    module : nn.Module
        A network with :class:`~quartz_plugin.TTFSActivation`.
    learning_rate : float
        As a share of the root mean square of the layer's weights, and of a scale.
    weights : bool
        Learn weights and batch norms; otherwise only biases and scales.
    unequal : nn.Module, optional
        A layer whose outputs differ in size, as a regression's may: its rate goes with the smallest of them.
    """
    module.requires_grad_(False)
    groups: list[dict[str, Any]] = []
    for each in module.modules():
        if isinstance(each, TTFSActivation):
            groups.append({"params": list(each.parameters()), "lr": learning_rate})
        elif isinstance(each, WEIGHTED) or (weights and isinstance(each, NORMS) and each.affine):
            chosen = [p for name, p in each.named_parameters() if weights or name == "bias"]
            weight = each.weight.detach()
            square = weight.square().mean()
            if each is unequal and bool(weight.any()):
                rows = weight.transpose(0, 1) if isinstance(each, nn.ConvTranspose1d | nn.ConvTranspose2d) else weight
                squares = rows.flatten(1).square().mean(dim=1)
                square = squares[squares > 0].min()
            size = float(square.sqrt())
            groups.append({"params": chosen, "lr": learning_rate * size})
    groups = [group for group in groups if group["params"]]
    for group in groups:
        for parameter in group["params"]:
            parameter.requires_grad_(True)
    return groups


def adam(
    groups: list[dict[str, Any]], total: int
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    """Adam for :func:`parameter_groups`; over `total` steps a short warm-up, then along a cosine to 0."""
    warmup = max(1, total // 20)

    def share(step: int) -> float:
        return min(1.0, (step + 1) / warmup) * 0.5 * (1 + math.cos(math.pi * min(1.0, step / total)))

    optimizer = torch.optim.Adam(groups)
    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, share)


def relative_feature_mse(given: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> Tensor:
    """Mean over layers of the squared error of their values, as a share of the square of those `wanted`.

    Of a layer that is to be 0 there is no share; it counts as none.
    """
    shares = []
    for path, target in wanted.items():
        size = target.square().mean()
        size = torch.where(size > 0, size.clamp(min=1e-12), torch.inf)
        shares.append((given[path] - target).square().mean() / size)
    return torch.stack(shares).mean() if shares else torch.zeros(())


def _take_back(draft: TracedNetwork, module: fx.GraphModule, scales: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Put the learned numbers into the draft; returns the scales."""
    found = {}
    with torch.no_grad():
        learned = module.state_dict()
        for name, tensor in draft.module.state_dict().items():
            tensor.copy_(learned[name])
        for path, scale in scales.items():
            code = module.get_submodule(path)
            if not isinstance(code, TTFSActivation):
                code = module.get_submodule(output_code(module))
            assert isinstance(code, TTFSActivation)
            found[path] = code.scale.detach().double().cpu().reshape(scale.shape)
    return found
