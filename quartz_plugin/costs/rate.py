"""The rate-coded network that a Quartz network replaces, to compare under the same counts.

From the same ANN and the same normalisation: each ReLU is a layer of snnTorch's ``Leaky`` (``beta=1``, reset by
subtraction, threshold 1), the image is a current that stays for all steps, and a plain loop runs over them.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field

import torch
from snntorch import Leaky
from torch import Tensor, nn

from quartz_plugin.costs.counts import biased_neurons
from quartz_plugin.costs.spikes import per_image
from quartz_plugin.costs.synops import LayerCounts, delivered
from quartz_plugin.engines.event import LEAST_CHANGE
from quartz_plugin.graph.topology import Topology
from quartz_plugin.graph.walk import Step, Walk, plan_walk
from quartz_plugin.network import SpikingNetwork
from quartz_plugin.neuron import AxonalDelay, FirstSpikeMaxPool, TTFSNeuron, forget_instance, reset
from quartz_plugin.precision import exact_arithmetic

RATE_COUNTS = (
    "spikes",
    "synops",
    "graded_synops",
    "synops_merged",
    "bias_events",
    "pool_events",
    "neuron_updates",
    "active_updates",
    "operations",
    "operations_strict",
)
"""Names of the counts of a rate-coded network."""


@dataclass(frozen=True)
class RateResult:
    """Output and costs of a rate-coded simulation.

    Attributes
    ----------
    logits : Tensor
        ``[B, classes]``, in the ANN's units: the mean over steps.
    counts : dict
        Name of a count -> layer -> int64 ``[B]``, as in :class:`~quartz_plugin.costs.InferenceCounts`: ``spikes``,
        ``synops`` (into a layer; the image's nonzero pixels deliver at every step), ``graded_synops`` (the part of
        them that comes from pixels and so multiplies), ``synops_merged`` (neuron-steps in which a current arrives,
        a bias included), ``bias_events`` (one a neuron and step), ``pool_events``, ``neuron_updates`` and
        ``active_updates`` (neurons times steps), ``operations`` and ``operations_strict`` (merged and strict synops,
        and N a step).
    n_steps : int
        Steps of the simulation.
    """

    logits: Tensor
    counts: dict[str, LayerCounts] = field(repr=False)
    n_steps: int


class RateCodedNetwork(nn.Module):
    """The same ANN in rate code, built of snnTorch's neurons.

    Max pooling acts on the spikes of a step, as ANN-to-SNN conversion commonly has it. The output layer does not
    spike: its currents are averaged over the steps.

    Parameters
    ----------
    snn : SpikingNetwork
        A converted network, whose normalised weights and biases it takes.

    Raises
    ------
    ValueError
        If the network's windows differ (its weights then hold ratios of windows) or its weights are on a grid.

    Examples
    --------
    >>> import quartz_plugin
    >>> _ = torch.manual_seed(0)
    >>> ann = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    >>> images = torch.rand(32, 4)
    >>> rate = RateCodedNetwork(quartz_plugin.convert(ann, images))
    >>> bool((rate(images, 256) - ann(images)).abs().max() < 0.05)
    True
    """

    def __init__(self, snn: SpikingNetwork) -> None:
        super().__init__()
        graph = snn.graph
        if graph.dense_stem is not None:
            raise ValueError('a rate-coded network is made of one that encodes the image: first_layer="spiking"')
        lengths = {window.length for window in snn.windows.values()}
        if len(lengths) > 1 or graph.config.weight_bits is not None:
            raise ValueError(
                "a rate-coded network is made of one whose windows are alike and whose weights are free; "
                "convert without layers={...: t_max} and without weight_bits"
            )
        self.converted = graph
        self.net = copy.deepcopy(graph.module)
        for path, module in list(self.net.named_modules()):
            if isinstance(module, TTFSNeuron):
                self.net.set_submodule(path, _Readout(module.bias) if module.p.signed else _RateNeurons(module.bias))
            elif isinstance(module, FirstSpikeMaxPool):
                self.net.set_submodule(path, module.pool)
            elif isinstance(module, AxonalDelay):
                self.net.set_submodule(path, nn.Identity())

    def forward(self, images: Tensor, steps: int) -> Tensor:
        """Logits ``[B, classes]`` after so many steps."""
        return self.run(images, steps).logits

    @exact_arithmetic()
    @torch.no_grad()
    def run(self, images: Tensor, steps: int) -> RateResult:
        """Simulate and count.

        Parameters
        ----------
        images : Tensor
            ``[B, *input_shape]`` in [0, 1].
        steps : int
            At least 1.

        Raises
        ------
        ValueError
            For images of a wrong shape or outside [0, 1], or fewer steps than 1.
        """
        if steps < 1:
            raise ValueError(f"steps must be at least 1, got {steps}")
        images = self.converted.check_images(images)
        reset(self.net)
        like = next(self.net.parameters(), images)
        images = images.to(device=like.device, dtype=like.dtype)
        topology = Topology.of(self.converted)
        walk = _Steps(plan_walk(self.net), {layer.node.name for layer in topology.layers}, images)
        output = walk.advance()
        for _ in range(steps - 1):
            output = output + walk.advance()
        reset(self.net)
        return RateResult(self.converted.output_values(output, steps), _counts(topology, walk, steps), steps)


class _Steps(Walk):
    """Steps a rate-coded network, and counts what its nodes emit and the steps in which currents arrive at layers.

    Attributes
    ----------
    emitted : dict
        Name of a node -> how often each of its values was not zero, ``[B, ...]``.
    merged : dict
        Name of a layer's node -> neuron-steps in which a current arrived, ``[B]``.
    """

    def __init__(self, steps: tuple[Step, ...], layers: set[str], images: Tensor) -> None:
        super().__init__(steps)
        self.images = images
        self.none = torch.zeros(len(images), dtype=torch.int64, device=images.device)
        self.merged = dict.fromkeys(layers, self.none)
        self.emitted: dict[str, Tensor] = {}

    def advance(self) -> Tensor:
        """Go on by one step; returns the output's currents."""
        out: Tensor = self.images
        for step, out in self.each(self.images):
            if step.role != "at_output":
                name = step.node.name
                self.emitted[name] = self.emitted.get(name, 0) + (out != 0).to(torch.int32)
        return out

    def at_synapses(self, step: Step) -> Tensor:
        if step.node.name in self.merged and step.module is not None:
            arriving, bias = self.source(step).abs() > LEAST_CHANGE, step.module.bias
            changed = arriving if bias is None else arriving | (bias != 0)
            self.merged[step.node.name] = self.merged[step.node.name] + per_image(changed)
        value: Tensor = super().at_synapses(step)
        return value


class _Graded(Walk):
    """Finds whether a node that emits spikes hands numbers on: the image, and poolings over it."""

    def at_synapses(self, step: Step) -> bool:
        return any(self.values[source] for source in step.sources)

    def at_neurons(self, step: Step) -> bool:
        return False


def _counts(topology: Topology, walk: _Steps, steps: int) -> dict[str, LayerCounts]:
    emitted, none, layers = walk.emitted, walk.none, topology.layers
    numbers = _Graded(plan_walk(topology.graph.module, keep=topology.spike_sources))
    numbers.run(True)
    graded = {node.name for node, is_number in numbers.values.items() if is_number}
    synops = {
        layer: {source: delivered(emitted[source], fan_out) for source, fan_out in by_source.items()}
        for layer, by_source in topology.fan_outs.items()
    }
    counts: dict[str, LayerCounts] = {
        "spikes": {layer.name: per_image(emitted[layer.node.name]) for layer in layers if not layer.neuron.p.signed},
        "synops": {layer: sum(by_source.values(), none) for layer, by_source in synops.items()},
        "graded_synops": {
            layer: sum((count for source, count in by_source.items() if source in graded), none)
            for layer, by_source in synops.items()
        },
        "synops_merged": {layer.name: walk.merged[layer.node.name] for layer in layers},
        "bias_events": {layer.name: none + steps * biased_neurons(layer, topology.shape_of(layer)) for layer in layers},
        "pool_events": {
            layer: sum((delivered(emitted[before], windows) for before, windows in pools), none)
            for layer, pools in topology.pools.items()
        },
        "neuron_updates": {layer.name: none + steps * topology.shape_of(layer).numel() for layer in layers},
    }
    updates = counts["active_updates"] = counts["neuron_updates"]
    for name, strictly in (("operations", "synops_merged"), ("operations_strict", "synops")):
        counts[name] = {layer: of_layer + updates[layer] for layer, of_layer in counts[strictly].items()}
    return counts


class _RateNeurons(nn.Module):
    """A bias, which is a current of every step, and snnTorch's neurons."""

    bias: Tensor | None

    def __init__(self, bias: Tensor | None) -> None:
        super().__init__()
        self.register_buffer("bias", None if bias is None else bias.detach().clone())
        self.neurons = Leaky(beta=1.0, threshold=1.0, reset_mechanism="subtract", init_hidden=True)
        forget_instance(self.neurons)

    def forward(self, current: Tensor) -> Tensor:
        spikes: Tensor = self.neurons(current if self.bias is None else current + self.bias)
        # snnTorch's spikes are float32, whatever the currents are.
        return spikes.to(current.dtype)


class _Readout(nn.Module):
    """An output layer's currents."""

    bias: Tensor | None

    def __init__(self, bias: Tensor | None) -> None:
        super().__init__()
        self.register_buffer("bias", None if bias is None else bias.detach().clone())

    def forward(self, current: Tensor) -> Tensor:
        return current if self.bias is None else current + self.bias


__all__ = ["RATE_COUNTS", "RateCodedNetwork", "RateResult"]
