"""The rate-coded network that a Quartz network replaces, to compare under the same counts.

From the same ANN and the same normalisation: each ReLU is a layer of snnTorch's ``Leaky`` (``beta=1``, reset by
subtraction, threshold 1), the image is a current that stays for all steps, and a plain loop runs over them.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field

import torch
from snntorch import Leaky
from torch import Tensor, fx, nn

from quartz_plugin.costs.counts import LayerCounts, Topology, biased_neurons, delivered
from quartz_plugin.costs.spikes import per_image
from quartz_plugin.engines.event import LEAST_CHANGE
from quartz_plugin.graph import call_node, called_by, spike_sources
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
"""What is counted of a rate-coded network."""


@dataclass(frozen=True)
class RateResult:
    """What a rate-coded simulation gave and cost.

    Attributes
    ----------
    logits : Tensor
        ``[B, classes]``, in the ANN's units: the mean over steps.
    counts : dict
        Name of a count -> layer -> int64 ``[B]``, as in :class:`~quartz_plugin.hardware.InferenceCounts`: ``spikes``,
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
        layers = {layer.node.name for layer in self.converted.layers}
        none = torch.zeros(len(images), dtype=torch.int64, device=images.device)
        emitted: dict[str, Tensor] = {}
        merged = dict.fromkeys(layers, none)
        output: Tensor | None = None
        for _ in range(steps):
            values: dict[fx.Node, Tensor] = {}
            for node in self.net.graph.nodes:
                if node.op == "output":
                    out = values[node.args[0]]
                    output = out if output is None else output + out
                    continue
                values[node] = images if node.op == "placeholder" else call_node(self.net, node, values)
                if node.name in layers:
                    arriving = values[node.all_input_nodes[0]].abs() > LEAST_CHANGE
                    bias = self.net.get_submodule(str(node.target)).bias
                    changed = arriving if bias is None else arriving | (bias != 0)
                    merged[node.name] = merged[node.name] + per_image(changed)
                emitted[node.name] = emitted.get(node.name, 0) + (values[node] != 0).to(torch.int32)
        assert output is not None
        reset(self.net)
        counts = self._counts(emitted, merged, none, steps)
        return RateResult(self.converted.output_values(output, steps), counts, steps)

    def _counts(
        self, emitted: dict[str, Tensor], merged: dict[str, Tensor], none: Tensor, steps: int
    ) -> dict[str, LayerCounts]:
        graph, synapses = self.converted, Topology.of(self.converted)
        shapes = synapses.shapes(graph)
        # What a pooling over the image hands on are numbers, too.
        graded: set[fx.Node] = set()
        for node in graph.module.graph.nodes:
            pools = isinstance(called_by(graph.module, node), FirstSpikeMaxPool)
            pooled = spike_sources(graph.module, node.args[0]) if pools else []
            if node.op == "placeholder" or not graded.isdisjoint(pooled):
                graded.add(node)
        numbers = {node.name for node in graded}
        synops = {
            layer: {source: delivered(emitted[source], fan_out) for source, fan_out in by_source.items()}
            for layer, by_source in synapses.fan_outs(graph).items()
        }
        counts = {
            "spikes": {
                layer.name: per_image(emitted[layer.node.name]) for layer in graph.layers if not layer.neuron.p.signed
            },
            "synops": {layer: sum(by_source.values(), none) for layer, by_source in synops.items()},
            "graded_synops": {
                layer: sum((count for source, count in by_source.items() if source in numbers), none)
                for layer, by_source in synops.items()
            },
            "synops_merged": {layer.name: merged[layer.node.name] for layer in graph.layers},
            "bias_events": {
                layer.name: none + steps * biased_neurons(layer, shapes[layer.node.name]) for layer in graph.layers
            },
            "pool_events": {
                layer: sum((delivered(emitted[before], windows) for before, windows in pools), none)
                for layer, pools in synapses.pools(graph).items()
            },
            "neuron_updates": {layer.name: none + steps * shapes[layer.node.name].numel() for layer in graph.layers},
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
