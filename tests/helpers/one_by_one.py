"""Spikes, synapses, windows and neurons counted one at a time."""

import copy
import math

import torch
from torch import nn

from helpers.random_chains import input_train
from quartz_plugin import AxonalDelay, FirstSpikeMaxPool, TTFSNeuron
from quartz_plugin.operators.gains import Mixed
from quartz_plugin.operators.interpolation import BicubicInterpolate, Interpolate
from quartz_plugin.operators.modules import Add, OneToOne
from quartz_plugin.operators.pooling import ROWS as POOLS
from quartz_plugin.operators.pooling import CumulativeSum
from quartz_plugin.operators.table import WEIGHTED

AVERAGES = tuple(kind for kind, row in POOLS.items() if isinstance(row.gain, Mixed) and row.gain.as_sum is not None)
"""Modules that average units."""

MAPS = (*WEIGHTED, *AVERAGES, CumulativeSum, Interpolate, BicubicInterpolate, OneToOne)


class OneByOne:
    """Steps the recorded spikes of a simulation through a network whose synapses weigh one, on the global clock.

    Attributes
    ----------
    fired : dict
        Node that emits spikes (input, neurons, first-spike pools) -> bool ``[B, ...]``: who sends one.
    pooled : dict
        First-spike pool -> spikes that arrive at each of its inputs, ``[B, ...]``.
    maps : tuple
        Classes of modules that have synapses of their own.
    """

    maps = MAPS

    def __init__(self, snn, result):
        self.module = copy.deepcopy(snn.graph_module).double()
        for parameter in self.module.parameters():
            parameter.data.fill_(1.0)
        for each in self.module.modules():
            if isinstance(each, Interpolate):
                each.weigh_one()
        self.modules = {
            node: self.module.get_submodule(node.target) for node in self.module.graph.nodes if node.op == "call_module"
        }
        self.nodes = list(self.module.graph.nodes)
        self.layers = {
            str(node.target): node for node, module in self.modules.items() if isinstance(module, TTFSNeuron)
        }
        self.steps = {
            node: result.spike_steps["input" if node.op == "placeholder" else str(node.target)]
            for node in self.nodes
            if node.op == "placeholder" or node in self.layers.values()
        }
        self.fired = {node: steps >= 0 for node, steps in self.steps.items()}
        self.pooled, self.led, queues, passed = {}, {}, {}, {}
        for step in range(snn.n_steps):
            values = {}
            for node in self.nodes:
                module = self.modules.get(node)
                if node in self.steps:
                    values[node] = (self.steps[node] == step).double()
                elif isinstance(module, FirstSpikeMaxPool):
                    arrived = values[node.args[0]]
                    self.pooled[node] = self.pooled.get(node, 0) + (arrived > 0).long()
                    first = module.pool(arrived)
                    passed.setdefault(node, torch.zeros_like(first))
                    values[node] = first * (1 - passed[node])
                    passed[node] = passed[node] + values[node]
                    self.led.setdefault(node, torch.full(first.shape, 10**6))[values[node] > 0] = step
                elif isinstance(module, AxonalDelay):
                    queue = queues.setdefault(node, [torch.zeros_like(values[node.args[0]])] * module.steps)
                    queue.append(values[node.args[0]])
                    values[node] = queue.pop(0)
                elif module is not None:
                    values[node] = module(*(values[source] for source in node.args))
        self.fired |= {node: each > 0 for node, each in passed.items()}

    def emits(self, node):
        return node in self.fired

    def behind(self, node):
        """Nodes between a layer and the spikes it listens to, in order; and the latter."""
        pending, found = [node.args[0]], set()
        while pending:
            each = pending.pop()
            if each not in found:
                found.add(each)
                pending += [] if self.emits(each) else each.args
        ordered = [each for each in self.nodes if each in found]
        return [n for n in ordered if not self.emits(n)], [n for n in ordered if self.emits(n)]

    def delay(self, node, source):
        """Steps that a spike of a source waits on its way to a node; all ways take as long."""
        if node is source:
            return 0
        waits = [self.delay(before, source) for before in node.args if not self.emits(node)]
        own = self.modules[node].steps if isinstance(self.modules.get(node), AxonalDelay) else 0
        return max(waits, default=-math.inf) + own

    def first_steps(self, source):
        """For each image, the step of a source's earliest spike."""
        steps = torch.where(self.fired[source], self.steps[source], 10**6) if source in self.steps else self.led[source]
        return steps.unsqueeze(-1).flatten(1).amin(1).tolist()

    def through(self, nodes, values):
        """Values of nodes, given those of the nodes before them; delays change nothing."""
        values = dict(values)
        for node in nodes:
            module, inputs = self.modules[node], [values[source] for source in node.args]
            values[node] = inputs[0] if isinstance(module, AxonalDelay) else module(*inputs)
        return values

    def synapses(self, node):
        """Source -> bool ``[units, neurons]``: which neurons a spike of each unit reaches, sent alone."""
        nodes, sources = self.behind(node)
        matrices = {}
        for source in sources:
            units = self.fired[source][0].numel()
            silence = {other: torch.zeros(units, *self.fired[other].shape[1:]).double() for other in sources}
            silence[source] = torch.eye(units).double().view(units, *self.fired[source].shape[1:])
            with torch.no_grad():
                matrices[source] = self.through(nodes, silence)[node.args[0]].unsqueeze(-1).flatten(1) > 0
        return matrices

    def outputs_of_each_input(self, node, shape):
        """How many outputs of one linear map each of its inputs reaches."""
        units = math.prod(shape)
        with torch.no_grad():
            return (self.modules[node](torch.eye(units).double().view(units, *shape)).unsqueeze(-1).flatten(1) > 0).sum(
                1
            )

    def moves(self, node, shape):
        """Whether an average to the size that is there gives each unit itself, and so has no synapse to count."""
        adaptive = isinstance(self.modules[node], nn.AdaptiveAvgPool1d | nn.AdaptiveAvgPool2d)
        units = math.prod(shape)
        each = torch.eye(units).double().view(units, *shape)
        return adaptive and torch.equal(self.modules[node](each), each)

    def synops(self):
        """Layer -> for each image, each spike and each neuron that it reaches."""
        counts = {}
        for name, node in self.layers.items():
            counts[name] = [0] * len(self.fired[node])
            for source, matrix in self.synapses(node).items():
                for image, spikes in enumerate(self.fired[source].unsqueeze(-1).flatten(1)):
                    for unit in spikes.nonzero().flatten().tolist():
                        counts[name][image] += int(matrix[unit].sum())
        return counts

    def synops_factored(self):
        """Layer -> for each image, each synapse of each linear map whose input any spike reaches.

        A spike that meets no map on its way passes a synapse where it is added or reaches a neuron. What several
        layers hear counts for the first of them.
        """
        counts, done = {}, set()
        for name, neurons in self.layers.items():
            nodes, sources = self.behind(neurons)
            counts[name] = [0] * len(self.fired[neurons])
            reached = {source: self.fired[source].double() for source in sources}
            raw = dict(reached)
            for node in nodes:
                module, inputs = self.modules[node], list(node.args)
                reached |= {node: (self.through([node], reached)[node] > 0).double()}
                if isinstance(module, self.maps) and not self.moves(node, reached[inputs[0]].shape[1:]):
                    raw[node] = torch.zeros_like(reached[node])
                    outputs = self.outputs_of_each_input(node, reached[inputs[0]].shape[1:])
                    delivered = [
                        sum(int(outputs[unit]) for unit in image.nonzero().flatten())
                        for image in reached[inputs[0]].unsqueeze(-1).flatten(1)
                    ]
                elif isinstance(module, Add):
                    raw[node] = torch.zeros_like(reached[node])
                    delivered = [
                        sum(int(raw[source][b].sum()) for source in set(inputs)) for b in range(len(raw[node]))
                    ]
                else:
                    raw |= {node: self.through([node], raw)[node]}
                    delivered = [0] * len(raw[node])
                if node not in done:
                    counts[name] = [a + b for a, b in zip(counts[name], delivered, strict=True)]
                done.add(node)
            direct = [int((image > 0).sum()) for image in raw[neurons.args[0]]]
            counts[name] = [a + b for a, b in zip(counts[name], direct, strict=True)]
        return counts

    def windows(self):
        """Pool -> for each image, each spike that arrives and each window it is in."""
        counts = {}
        for node, arrived in self.pooled.items():
            shape = arrived.shape[1:]
            units = math.prod(shape)
            alone = self.modules[node].pool(torch.eye(units).double().view(units, *shape)).unsqueeze(-1).flatten(1)
            counts[node] = [
                sum(int(alone[unit].sum()) for unit in image.nonzero().flatten())
                for image in arrived.unsqueeze(-1).flatten(1)
            ]
            assert arrived.max() <= 1
        return counts


def as_lists(counts):
    return {layer: count.tolist() for layer, count in counts.items()}


def changes_on_the_clock(snn, images):
    """Neuron-steps in which a current changes, up to the layer's last step, all exported modules stepped together."""
    net, before = snn.to_snntorch(), {}
    changes = {layer.name: torch.zeros(len(images), dtype=torch.int64) for layer in snn.graph.layers}
    for step, spikes in enumerate(input_train(snn, images)):
        net(spikes)
        for layer in snn.graph.layers:
            # A chain's modules have names without dots.
            path = layer.name.replace(".", "_") if isinstance(net, nn.Sequential) else layer.name
            current = net.get_submodule(path)._hidden.i
            changed = (current - before.get(layer.name, torch.zeros_like(current))).abs() > 1e-6
            if step <= layer.neuron.p.last_step:
                changes[layer.name] += changed.unsqueeze(-1).flatten(1).sum(1)
            before[layer.name] = current
    return changes
