"""The walk over a graph, against the network itself; and the topology that keeps its steps."""

import copy
import gc
import pickle
import weakref
from unittest import mock

import pytest
import torch
from torch import fx, nn

import quartz_plugin
from quartz_plugin import AxonalDelay, FirstSpikeMaxPool, TTFSNeuron
from quartz_plugin.costs import InferenceCounts
from quartz_plugin.graph import ConvertedGraph
from quartz_plugin.graph.topology import Derived, Topology
from quartz_plugin.graph.walk import LevelWalk, Walk, add_up, plan_walk
from quartz_plugin.operators.modules import Add


class Branches(nn.Module):
    """Functions, methods, constants, keywords, an argument that is taken twice, and a value that nobody takes."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        y = self.first(x).relu()
        unused = self.second(y).neg()  # noqa: F841
        z = torch.cat([y, self.second(y)], dim=1).view(-1, 2, 4).sum(dim=1)
        return torch.add(z, y, alpha=2) * 0.5 + z * z


class Recording(Walk):
    """Notes, at each step, the nodes whose values are there."""

    def __init__(self, steps):
        super().__init__(steps)
        self.seen = []

    def at_synapses(self, step):
        self.seen.append({node.name for node in self.values})
        return super().at_synapses(step)


@pytest.fixture
def net():
    return fx.symbolic_trace(Branches())


@pytest.fixture
def x():
    return torch.rand(3, 4)


def node_of(net, name):
    (node,) = (node for node in net.graph.nodes if node.name == name)
    return node


def test_a_walk_gives_what_the_network_gives(net, x):
    assert torch.equal(Walk(plan_walk(net)).run(x), net(x))
    assert torch.equal(Walk(plan_walk(net)).run(x), net(x))


def test_each_node_is_visited_once_in_order(net, x):
    visited = [(step.node, value) for step, value in Walk(plan_walk(net)).each(x)]
    assert [node for node, _ in visited] == list(net.graph.nodes)
    assert torch.equal(visited[-1][1], net(x))


def test_values_are_freed_behind_their_last_use(net, x):
    walk = Recording(plan_walk(net))
    walk.run(x)
    calls = [node for node in net.graph.nodes if node.op not in ("placeholder", "output")]
    order = list(net.graph.nodes)
    for node, seen in zip(calls, walk.seen, strict=True):
        place = order.index(node)
        needed = {each.name for each in order[:place] if any(order.index(user) >= place for user in each.users)}
        assert seen == needed, node
    assert {node.op for node in walk.values} == {"output"}


def test_what_is_to_be_kept_stays(net, x):
    relu = node_of(net, "relu")
    walk = Walk(plan_walk(net, keep=[relu]))
    walk.run(x)
    assert torch.equal(walk.values[relu], net.first(x).relu())


def test_only_what_is_needed_is_visited(net):
    relu = node_of(net, "relu")
    assert [step.node.name for step in plan_walk(net, [relu])] == ["x", "first", "relu"]
    assert [step.node.name for step in plan_walk(net, [relu], needs=lambda node: [])] == ["relu"]


def test_a_walk_may_begin_anywhere(net, x):
    nodes = list(net.graph.nodes)
    relu = node_of(net, "relu")
    behind = nodes[nodes.index(relu) + 1 :]
    values = {relu: net.first(x).relu()}
    found = Walk(plan_walk(net, among=behind)).run_from(values)
    assert torch.equal(found[nodes[-1]], net(x))
    assert list(values) == [relu]


def test_deep_networks_are_walked():
    net = fx.GraphModule(nn.Module(), fx.Graph())
    node = net.graph.placeholder("x")
    for _ in range(5000):
        node = net.graph.call_function(torch.neg, (node,))
    net.graph.output(node)
    assert float(Walk(plan_walk(net)).run(torch.ones(()))) == 1.0


def test_a_kind_of_node_that_cannot_be_evaluated_is_refused(x):
    net = fx.symbolic_trace(nn.Linear(4, 4))
    with net.graph.inserting_before(next(iter(net.graph.nodes))):
        net.graph.get_attr("weight")
    with pytest.raises(ValueError, match="cannot evaluate a node of kind 'get_attr'"):
        Walk(plan_walk(net)).run(x)


def test_each_module_has_the_role_of_its_kind():
    module = nn.Sequential(
        nn.Linear(4, 4), TTFSNeuron(8), AxonalDelay(7), nn.Unflatten(1, (1, 4)), FirstSpikeMaxPool(nn.MaxPool1d(2))
    )

    class Leaves(fx.Tracer):
        def is_leaf_module(self, module, name):
            return not isinstance(module, nn.Sequential)

    net = fx.GraphModule(module, Leaves().trace(module))
    assert [step.role for step in plan_walk(net)] == [
        "at_input", "at_synapses", "at_neurons", "at_delay", "at_synapses", "at_pool", "at_output",
    ]  # fmt: skip

    class Levels(LevelWalk):
        def at_neurons(self, step):
            return self.source(step)

    x = torch.randint(0, 8, (2, 4)).float()
    assert torch.equal(Levels(plan_walk(net)).run(x), nn.MaxPool1d(2)(module[0](x).unflatten(1, (1, 4))))


# ------------------------------------------------------------------------------------------------------ topology


@pytest.fixture
def images():
    return torch.rand(5, 2, 6, 6)


@pytest.fixture(params=[True, False])
def snn(images, request):
    ann = nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(16, 5), nn.ReLU(), nn.Linear(5, 3)
    )
    return quartz_plugin.convert(ann, images, 9, hold=request.param)


def twin_of(module):
    """Another module of the same settings and shapes, and other numbers."""
    twin = copy.deepcopy(module)
    with torch.no_grad():
        for tensor in [*twin.parameters(), *([twin.bias] if isinstance(twin, TTFSNeuron) else [])]:
            tensor.copy_(tensor.flip(0) + 0.1)
    return twin


def replace_graph(snn):
    snn.graph_module.graph = copy.deepcopy(snn.graph_module.graph)


EDITS = {
    "neurons like those before": lambda snn: snn.graph_module.set_submodule(
        "1", twin_of(snn.graph_module.get_submodule("1"))
    ),
    "synapses like those before": lambda snn: snn.graph_module.set_submodule(
        "0", twin_of(snn.graph_module.get_submodule("0"))
    ),
    "nodes like those before": replace_graph,
    "a setting": lambda snn: setattr(snn.graph_module.get_submodule("2").pool, "ceil_mode", True),
}


@pytest.mark.parametrize("edit", EDITS)
def test_a_topology_is_of_the_network_as_it_is(snn, edit):
    first = Topology.of(snn.graph)
    assert Topology.of(snn.graph) is first
    EDITS[edit](snn)
    second = Topology.of(snn.graph)
    assert second is not first
    nodes = list(snn.graph_module.graph.nodes)
    for layer in second.layers:
        assert layer.neuron is snn.graph_module.get_submodule(layer.name)
        assert any(layer.node is node for node in nodes)
    assert [step.node for step in second.steps] == nodes


@pytest.mark.parametrize("edit", EDITS)
def test_no_engine_runs_what_was_there_before_an_edit(snn, images, edit):
    engines = ["auto", "stepped"]
    before = {engine: snn.run(images, engine) for engine in engines}
    EDITS[edit](snn)
    fresh = quartz_plugin.SpikingNetwork(copy.deepcopy(snn.graph))
    for engine in engines:
        now, expected = snn.run(images, engine), fresh.run(images, engine)
        assert torch.equal(now.logits, expected.logits)
        assert all(torch.equal(steps, expected.spike_steps[name]) for name, steps in now.spike_steps.items())
        if "like those" in edit and "nodes" not in edit:
            assert not torch.equal(now.spike_steps["1"], before[engine].spike_steps["1"])


def test_an_edit_of_weights_leaves_the_topology_and_not_what_follows_from_weights(snn):
    of_structure, of_weights = [], []
    structure = Derived(lambda topology: of_structure.append(topology) or len(of_structure))
    weights = Derived(lambda topology: of_weights.append(topology) or len(of_weights), from_weights=True)
    assert [structure.of(snn.graph), structure.of(snn.graph), weights.of(snn.graph), weights.of(snn.graph)] == [1] * 4
    next(snn.parameters()).data.neg_()
    assert [structure.of(snn.graph), weights.of(snn.graph)] == [1, 2]
    snn.graph_module.get_submodule("2").pool.ceil_mode = True
    assert [structure.of(snn.graph), weights.of(snn.graph)] == [2, 3]
    assert of_structure[0] is of_weights[0] is of_weights[1] is not of_structure[1]


def test_copies_and_pickles_have_topologies_of_their_own(snn, images):
    result = snn.run(images)
    for other in (copy.deepcopy(snn.graph), pickle.loads(pickle.dumps(snn.graph))):
        assert other.known_structure is None
        assert Topology.of(other).graph is other
        assert torch.equal(quartz_plugin.SpikingNetwork(other).run(images).logits, result.logits)


@pytest.mark.parametrize("engine", ["auto", "stepped"])
def test_layers_are_found_once(snn, images, engine):
    found, layers = [], ConvertedGraph.layers.fget
    with mock.patch.object(ConvertedGraph, "layers", property(lambda graph: found.append(graph) or layers(graph))):
        snn.run(images, engine)
        assert len(found) == 1
        for each in ("auto", "stepped", "auto"):
            result = snn.run(images, each)
        assert len(found) == 1
        InferenceCounts(snn, result).mean()
        before = len(found)
        InferenceCounts(snn, snn.run(1 - images)).mean()
        assert len(found) == before


def test_nothing_that_is_kept_keeps_a_network(images):
    snn = quartz_plugin.convert(nn.Sequential(nn.Flatten(), nn.Linear(72, 3)), images, 4, hold=False)
    result = snn.run(images)
    means = InferenceCounts(snn, result).mean()
    module = weakref.ref(snn.graph_module)
    del snn
    gc.collect()
    assert module() is None
    assert means["synops/output"] == 216
    assert result.logits.shape == (5, 3)


def test_spare_values_are_those_that_one_visit_alone_looks_at():
    graph = fx.Graph()
    x = graph.placeholder("x")
    one = graph.call_module("one", (x,))
    two, flat = graph.call_module("two", (one,)), graph.call_module("flat", (x,))
    graph.output(graph.call_module("add", (two, one, flat)))
    net = fx.GraphModule({"one": nn.Linear(3, 3), "two": nn.Linear(3, 3), "flat": nn.Flatten(), "add": Add()}, graph)
    spare = {step.node.name: [source.name for source in step.spare] for step in plan_walk(net)}
    assert spare == {"x": [], "one": [], "two": [], "flat": [], "add": ["two"], "output": spare["output"]}


@pytest.mark.parametrize("spare", [[False] * 3, [True, False, False], [False, True, True], [False, False, True]])
def test_a_sum_in_place_is_bit_for_bit_the_sum(spare):
    values = [torch.randn(4, 3, 5, 5) * 10**k for k in range(3)]
    values[1] = values[1].contiguous(memory_format=torch.channels_last)
    wanted, copies = Add()(*values), [value.clone() for value in values]
    assert torch.equal(add_up(copies, spare), wanted)
    for given, value, may_overwrite in zip(copies, values, spare, strict=True):
        assert may_overwrite or torch.equal(given, value)
    grown = [value.clone().requires_grad_() for value in values]
    add_up([2 * value for value in grown], [True] * 3).sum().backward()
    assert all(torch.equal(value.grad, torch.full_like(value, 2)) for value in grown)
    twice = torch.arange(3.0)
    assert torch.equal(add_up([twice, torch.ones(3), twice], [True, False, True]), 2 * torch.arange(3.0) + 1)
