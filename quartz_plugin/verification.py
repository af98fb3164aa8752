"""verify: the spiking network against the ANN it came from, layer by layer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace

import torch
from torch import Tensor, nn

from quartz_plugin import engines
from quartz_plugin.coding import NO_SPIKE
from quartz_plugin.convert.fold import fold
from quartz_plugin.convert.images import chunk_size
from quartz_plugin.convert.trace import trace
from quartz_plugin.engines.result import SimulationResult
from quartz_plugin.network import SpikingNetwork
from quartz_plugin.operators.table import Rule
from quartz_plugin.precision import exact_arithmetic
from quartz_plugin.tables import format_table
from quartz_plugin.task import by_output, decide

WRONG = 0.25
"""Relative deviation from which on a layer has gone wrong."""


@dataclass(frozen=True)
class LayerDeviation:
    """Distance of one layer from the ANN's.

    Attributes
    ----------
    layer : str
        Name of the layer.
    mean, worst : float
        Deviation of the layer's values from the ANN's, in units of one time step.
    relative : float
        Mean deviation as a share of the mean size of the ANN's values.
    saturated : float
        Share of the ANN's values above the layer's scale, which no held neuron can encode.
    early : float
        Share of the neurons that fired before their readout.
    silent : float
        Share of the neurons that did not fire.
    """

    layer: str
    mean: float
    worst: float
    relative: float
    saturated: float
    early: float
    silent: float


@dataclass(frozen=True)
class OutputError:
    """Distance of one output of a regression from the ANN's.

    Attributes
    ----------
    output : int
        Its index on dimension 1.
    mean : float
        Mean absolute error, in the ANN's units.
    rms : float
        Root mean square error, the same.
    relative : float
        The latter as a share of the standard deviation of the ANN's output over images and positions; 1 is what a
        constant would achieve. Infinite where the ANN's output never varies and the spiking network's differs.
    """

    output: int
    mean: float
    rms: float
    relative: float


@dataclass(frozen=True)
class Verification:
    """Result of :func:`verify`; prints as a table.

    Attributes
    ----------
    layers : sequence of LayerDeviation
        One for each spiking layer, in order.
    agreement : float or None
        Share of decisions for which ANN and spiking network have the same class; None for a regression.
    ties : float or None
        Share of decisions that the class index makes, since several outputs share the first spike.
    images : int
        How many were compared.
    errors : sequence of OutputError
        Of a regression, one for each output; else none.
    heads : dict
        Of a network with several outputs: name of each -> its agreement, ties and errors, without layers; agreement and
        ties of the whole are then None.
    """

    layers: Sequence[LayerDeviation]
    agreement: float | None
    ties: float | None
    images: int
    errors: Sequence[OutputError] = ()
    heads: Mapping[str, Verification] = field(default_factory=dict)

    @property
    def first_wrong(self) -> LayerDeviation | None:
        """The first layer whose relative deviation exceeds :data:`WRONG`; None where there is none."""
        return next((layer for layer in self.layers if layer.relative > WRONG), None)

    def diagnosis(self) -> str:
        """Name the layer where it starts to go wrong, and what to try, in one sentence."""
        wrong = self.first_wrong
        if wrong is None:
            return f"no layer deviates by more than {100 * WRONG:.0f} % of the size of its values"
        advice = 'more steps (t_max), a scale for each channel (granularity), or calibration_method="best"'
        if wrong.early > 0.01:
            advice = "hold=True, or a higher percentile: neurons fire before their readout"
        elif wrong.saturated > 0.01:
            advice = "a higher percentile: values above the scale are clipped"
        share = f"{100 * wrong.relative:.0f} % of the size of its values"
        return f"it starts to go wrong at {wrong.layer!r} (off by {share}); try {advice}"

    def __str__(self) -> str:
        header = list(LayerDeviation.__dataclass_fields__)
        table = format_table(header, [list(asdict(layer).values()) for layer in self.layers])
        return (
            f"{table}\n"
            "(mean, worst: distance from the ANN in time steps; relative: mean distance by mean size of the ANN's "
            "values; saturated: share of the ANN's values above the scale; early, silent: share of neurons that fired "
            "before readout, that did not fire)\n"
            f"{self.summary()}"
        )

    def summary(self) -> str:
        """Layer at which it starts to go wrong, and how alike the outputs are, without the table of layers."""
        return f"{self.diagnosis()}\n{self._of_outputs()}"

    def _of_outputs(self) -> str:
        if self.heads:
            return "\n".join(f"{name}: {head._of_outputs()}" for name, head in self.heads.items())
        if self.agreement is not None and self.ties is not None:
            return (
                f"top-1 agreement with the ANN {100 * self.agreement:.2f} %, "
                f"ties {100 * self.ties:.2f} % ({self.images} images)"
            )
        table = format_table(
            [*OutputError.__dataclass_fields__], [list(asdict(error).values()) for error in self.errors]
        )
        return (
            f"{table}\n(mean absolute and root mean square distance from the ANN's output, and the latter as a share "
            f"of the output's standard deviation; {self.images} images)"
        )


@exact_arithmetic()
def verify(
    ann: nn.Module,
    snn: SpikingNetwork,
    images: Tensor,
    *,
    engine: str = "auto",
    rules: Mapping[type[nn.Module], Rule] | None = None,
) -> Verification:
    """Compare a spiking network with the ANN it was converted from, layer by layer.

    Both see the same raw images, with the preprocessing that ``convert`` was given: one that was forgotten
    there cannot be noticed here. Compare accuracies on labelled images for that.

    Parameters
    ----------
    ann : nn.Module
        The network that was converted; not modified.
    snn : SpikingNetwork
        What became of it.
    images : Tensor
        ``[B, ...]``, raw values in [0, 1]; at least one.
    engine : str
        As in :meth:`SpikingNetwork.run`.
    rules : dict, optional
        Those that :func:`~quartz_plugin.convert` was given.

    Raises
    ------
    ValueError
        If the images do not fit the network, or `ann` is another network.

    Examples
    --------
    >>> import torch, quartz_plugin
    >>> _ = torch.manual_seed(0)
    >>> ann = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 2))
    >>> images = torch.rand(100, 6)
    >>> check = quartz_plugin.verify(ann, quartz_plugin.convert(ann, images, t_max=64, percentile=100), images)
    >>> check.layers[0].layer, check.layers[0].worst < 3
    ('1', True)
    """
    sums = {layer.name: _Sums() for layer in snn.graph.layers}
    heads = {head.name: _HeadSums() for head in snn.graph.outputs.heads}
    for name, value, result in values_side_by_side(ann, snn, images, engine, rules):
        if name is not None:
            sums[name].add(name, value, result, snn.graph.scales[name])
            continue
        for head, wanted in zip(heads, snn.graph.outputs.split(value), strict=True):
            heads[head].add(wanted, result.head(head))
    layers = [each.deviation(name) for name, each in sums.items()]
    verified = {name: each.verification(len(images)) for name, each in heads.items()}
    if len(verified) == 1:
        (only,) = verified.values()
        return replace(only, layers=layers)
    return Verification(layers, None, None, len(images), heads=verified)


def values_side_by_side(
    ann: nn.Module,
    snn: SpikingNetwork,
    images: Tensor,
    engine: str = "auto",
    rules: Mapping[type[nn.Module], Rule] | None = None,
) -> Iterator[tuple[str | None, Tensor, SimulationResult]]:
    """Yield each layer's name, the ANN's values there and the simulation of the same images, some images at a time.

    After the last of its layers the logits of the ANN come, under the name None. The parameters, and what is raised,
    are those of :func:`verify`.
    """
    graph = snn.graph
    images = graph.check_images(images)
    if len(images) == 0:
        raise ValueError("verify needs at least one image")
    example = images[:1].to(device=graph.device, dtype=graph.dtype)
    network = fold(trace(ann, example, rules, graph.inputs), graph.config.preprocessing, graph.config.linear)
    ends, last = network.layers(), network.last
    if graph.dense_stem is not None:
        ends = ends[1:]
    names = [layer.name for layer in graph.layers]
    if len(ends) != len(names):
        raise ValueError(
            f"ann has {len(ends)} layers of neurons and the spiking network {len(names)}: not the same network"
        )

    def rounded(quantizer: nn.Module | None, value: Tensor) -> Tensor:
        return value if quantizer is None else quantizer(value)

    layer_of = dict(zip(ends, names, strict=True))
    for chunk in images.split(chunk_size(images)):
        chunk = chunk.to(device=graph.device, dtype=graph.dtype)
        result = engines.run(graph, chunk, engine, packed=True)
        # A network that was trained for spikes rounds its input and output itself.
        for node, value in network.run(rounded(network.input_quantizer, chunk)):
            if (name := layer_of.get(node)) is not None:
                spiking = result.spike_steps[name]
                if value.shape != spiking.shape:
                    raise ValueError(
                        f"layer {name!r} has the shape {list(value.shape[1:])} in ann and {list(spiking.shape[1:])} "
                        "in the spiking network: not the same network"
                    )
                encoded = value
                if node is last:
                    encoded = value - torch.as_tensor(graph.output_shift, dtype=torch.float64).to(value)
                elif name in graph.shifts:
                    # The pool behind lets none pass that is below the lowest of its values.
                    encoded = (value - graph.shifts[name].to(value)).clamp(min=0)
                yield name, encoded, result
            if node is last:
                yield None, rounded(network.output_quantizer, value), result


@dataclass
class _ErrorSums:
    """Sums over the images of a regression, float64 of one entry for each output."""

    absolute: Tensor | float = 0.0
    square: Tensor | float = 0.0
    values: Tensor | float = 0.0
    values_square: Tensor | float = 0.0
    first: Tensor | None = None
    count: int = 0

    def add(self, wanted: Tensor, given: Tensor) -> None:
        wanted, given = by_output(wanted.double()), by_output(given.double())
        self.first = wanted[:, :1] if self.first is None else self.first
        self.absolute += (given - wanted).abs().sum(dim=1)
        self.square += (given - wanted).square().sum(dim=1)
        # From the first value on, so that what is far from 0 loses no digits.
        self.values += (wanted - self.first).sum(dim=1)
        self.values_square += (wanted - self.first).square().sum(dim=1)
        self.count += wanted.shape[1]

    def by_output(self) -> list[OutputError]:
        mean, square = (torch.as_tensor(each) / self.count for each in (self.absolute, self.square))
        spread = torch.as_tensor(self.values_square) / self.count
        spread = (spread - (torch.as_tensor(self.values) / self.count).square()).clamp(min=0).sqrt()
        rms = square.sqrt()
        relative = torch.where(rms > 0, rms / spread, 0.0)
        return [
            OutputError(index, *entries)
            for index, entries in enumerate(zip(mean.tolist(), rms.tolist(), relative.tolist(), strict=True))
        ]


@dataclass
class _HeadSums:
    """Sums over the images of one output."""

    agreeing: int = 0
    ties: int = 0
    decisions: int = 0
    errors: _ErrorSums = field(default_factory=_ErrorSums)

    def add(self, wanted: Tensor, result: SimulationResult) -> None:
        if result.task == "regression":
            self.errors.add(wanted, result.logits)
            return
        self.agreeing += int((decide(wanted) == result.decisions).sum())
        self.ties += int(result.ties.sum())
        self.decisions += result.ties.numel()

    def verification(self, images: int) -> Verification:
        if self.decisions == 0:
            return Verification([], None, None, images, self.errors.by_output())
        return Verification([], self.agreeing / self.decisions, self.ties / self.decisions, images)


@dataclass
class _Sums:
    """Sums over the images of one layer."""

    values: int = 0
    distance: float = 0.0
    size: float = 0.0
    worst: float = 0.0
    saturated: int = 0
    early: int = 0
    silent: int = 0

    def add(self, name: str, value: Tensor, result: SimulationResult, scale: Tensor) -> None:
        window, spike_steps = result.windows[name], result.spike_steps[name]
        exact = value * (window.length / scale.to(value))
        distance = (exact - result.levels(name)).abs()
        self.values += value.numel()
        self.distance += float(distance.sum(dtype=torch.float64))
        self.size += float(exact.abs().sum(dtype=torch.float64))
        self.worst = max(self.worst, float(distance.max()))
        size = exact.abs() if name == result.output and result.signed_output else exact
        self.saturated += int((size > window.length + 0.5).sum())
        self.early += int(result.early[name].sum())
        self.silent += int((spike_steps == NO_SPIKE).sum())

    def deviation(self, name: str) -> LayerDeviation:
        return LayerDeviation(
            name,
            mean=self.distance / self.values,
            worst=self.worst,
            relative=self.distance / self.size if self.size else 0.0,
            saturated=self.saturated / self.values,
            early=self.early / self.values,
            silent=self.silent / self.values,
        )


__all__ = ["LayerDeviation", "OutputError", "Verification", "values_side_by_side", "verify"]
