"""The exported networks, stepped by hand over the whole clock, spike when the stepped engine says."""

import copy

import pytest
import torch
from helpers.random_chains import MANY, NEURONS, SCALES, SOME, chains, first_spikes, input_train, t_maxima
from hypothesis import given
from norse.torch import SequentialState
from torch import nn

import quartz_plugin
from quartz_plugin import AxonalDelay, FirstSpikeMaxPool, TTFSNeuron


def run_snntorch(net, train):
    return first_spikes([net(spikes) for spikes in train])


def run_norse(net, train):
    state, outputs = None, []
    for spikes in train:
        out, state = net(spikes, state)
        outputs.append(out)
    return first_spikes(outputs)


def neurons(net):
    return [module for module in net.modules() if isinstance(module, TTFSNeuron)]


@MANY
@given(chains(), t_maxima(), NEURONS, SCALES)
def test_layer_after_layer_equals_all_layers_on_the_global_clock(chain, t_max, neuron, scales):
    snn = chain.convert(t_max, **neuron, **scales)
    net = snn.to_snntorch()
    heard = {module: [] for module in neurons(net)}
    for module, spikes in heard.items():
        module.register_forward_hook(lambda m, inputs, out, spikes=spikes: spikes.append(out))
    for spikes in input_train(snn, chain.images):
        net(spikes)
    result = snn.run(chain.images, engine="stepped")
    assert len(heard) == len(snn.graph.layers)
    for layer, spikes in zip(snn.graph.layers, heard.values(), strict=True):
        assert torch.equal(first_spikes(spikes), result.spike_steps[layer.name]), layer.name


@SOME
@given(chains(), t_maxima(), NEURONS, SCALES)
def test_norse_and_snntorch_give_the_steps_of_the_stepped_engine(chain, t_max, neuron, scales):
    snn = chain.convert(t_max, **neuron, **scales)
    result = snn.run(chain.images, engine="stepped")
    expected, train = result.spike_steps[result.output], input_train(snn, chain.images)
    norse, snntorch = snn.to_norse(), snn.to_snntorch()
    for _ in range(2):
        assert torch.equal(run_norse(norse, train), expected)
        assert torch.equal(run_snntorch(snntorch, train), expected)
        quartz_plugin.reset(snntorch)


@SOME
@given(chains(), t_maxima(), NEURONS, SCALES)
def test_the_graph_module_itself_can_be_stepped(chain, t_max, neuron, scales):
    snn = chain.convert(t_max, **neuron, **scales)
    result = snn.run(chain.images, engine="stepped")
    steps = run_snntorch(snn.graph_module, input_train(snn, chain.images))
    assert torch.equal(steps, result.spike_steps[result.output])
    assert torch.equal(snn.run(chain.images, engine="stepped").logits, result.logits)


def large_bias_ann():
    """First-layer biases far above every value, so that their spikes come before the clock would start."""
    ann = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    with torch.no_grad():
        ann[0].weight.uniform_(-1.0, -0.5)
        ann[0].bias.copy_(torch.tensor([3.0, 1.5, 2.0, 4.0]))
    return ann


class TestLeadIn:
    """``bias="spike"`` and b > 1 in the first layer: the clock starts with empty steps."""

    @pytest.fixture
    def snn(self):
        return quartz_plugin.convert(large_bias_ann(), torch.rand(200, 3) * 0.5 + 0.5, t_max=9, **quartz_plugin.PAPER)

    def test_the_input_waits_in_a_delay_and_everything_is_that_much_later(self, snn):
        layers = snn.graph.layers
        assert float(layers[0].neuron.bias.max()) > 1.2
        delays = [m for m in snn.graph_module.modules() if isinstance(m, AxonalDelay)]
        lead = round(8 * (min(1.5, float(layers[0].neuron.bias.max())) - 1))
        assert [delay.steps for delay in delays] == [lead]
        assert [layer.neuron.clock.readout for layer in layers] == [8 + lead, 16 + lead, 24 + lead]
        assert snn.n_steps == 5 * 8 + 1 + lead
        assert snn.report[0]["module"] == "0"
        assert next(row for row in snn.report if row["module"] == "1")["delay"] == lead

    @pytest.mark.parametrize("face", ["snntorch", "norse"])
    def test_exports_agree_with_the_stepped_engine(self, snn, face):
        images = torch.rand(50, 3)
        train = input_train(snn, images)
        expected = snn.run(images, engine="stepped").spike_steps["output"]
        if face == "snntorch":
            assert torch.equal(run_snntorch(snn.to_snntorch(), train), expected)
        else:
            assert torch.equal(run_norse(snn.to_norse(), train), expected)

    def test_the_bias_still_counts_in_full_where_nothing_fires_early(self, snn):
        image = torch.ones(1, 3)
        layer = snn.graph.layers[0]
        weight = snn.graph_module.get_submodule("0").weight
        drive = 8 * (weight.sum(1) + layer.neuron.bias.clamp(max=1.5))
        result = snn.run(image)
        exact = ~result.early["1"][0]
        assert exact.any()
        wanted = torch.floor(drive + 0.5).clamp(0, 8)
        # A bias spike comes at a whole step: within half a level of b.
        assert ((result.levels("1")[0] - wanted).abs()[exact] <= 1).all()


class TestReset:
    @pytest.fixture(params=[{}, {"hold": False}, {"rectifier": "silent"}, quartz_plugin.PAPER])
    def snn(self, request):
        ann = nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(12, 3))
        with torch.no_grad():
            ann[0].weight.sub_(0.3)
            ann[0].bias.add_(1.5)
        return quartz_plugin.convert(ann, torch.rand(50, 1, 6, 6), t_max=6, **request.param)

    def test_between_two_inferences_makes_the_second_forget_the_first(self, snn):
        first, second = (input_train(snn, torch.rand(4, 1, 6, 6)) for _ in range(2))
        net = snn.to_snntorch()
        alone = run_snntorch(net, first)
        quartz_plugin.reset(net)
        other = run_snntorch(net, second)
        quartz_plugin.reset(net)
        assert torch.equal(run_snntorch(net, first), alone)
        assert not torch.equal(other, alone)

    @pytest.mark.filterwarnings("ignore:current arrives after the readout")
    def test_without_it_a_network_stays_silent(self, snn):
        train = input_train(snn, torch.rand(4, 1, 6, 6))
        net = snn.to_snntorch()
        first = torch.stack([net(spikes) for spikes in train])
        second = torch.stack([net(spikes) for spikes in train])
        fired = first.any(0)
        assert fired.any()
        assert not second[:, fired].any()

    def test_in_the_middle_of_an_inference_starts_a_new_one(self, snn):
        train = input_train(snn, torch.rand(4, 1, 6, 6))
        net = snn.to_snntorch()
        expected = run_snntorch(net, train)
        quartz_plugin.reset(net)
        for spikes in train[: len(train) // 2]:
            net(spikes)
        quartz_plugin.reset(net)
        assert torch.equal(run_snntorch(net, train), expected)

    def test_touches_no_other_network(self, snn):
        train = input_train(snn, torch.rand(4, 1, 6, 6))
        net, other = snn.to_snntorch(), snn.to_snntorch()
        expected = run_snntorch(other, train)
        quartz_plugin.reset(other)
        half = len(train) // 2
        before = [net(spikes) for spikes in train[:half]]
        for spikes in train:
            other(spikes)
        quartz_plugin.reset(other)
        after = [net(spikes) for spikes in train[half:]]
        assert torch.equal(first_spikes(before + after), expected)


def test_a_norse_state_belongs_to_its_inference_alone():
    ann = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    snn = quartz_plugin.convert(ann, torch.rand(50, 3), t_max=5)
    trains = [input_train(snn, torch.rand(4, 3)) for _ in range(2)]
    net = snn.to_norse()
    expected = [run_norse(net, train) for train in trains]
    states, outputs = [None, None], [[], []]
    for step in range(snn.n_steps):
        for which, train in enumerate(trains):
            out, states[which] = net(train[step], states[which])
            outputs[which].append(out)
    assert torch.equal(first_spikes(outputs[0]), expected[0])
    assert torch.equal(first_spikes(outputs[1]), expected[1])


def test_exports_are_plain_modules_without_biases():
    ann = nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.MaxPool2d(2), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(3, 3))
    snn = quartz_plugin.convert(ann, torch.rand(50, 1, 6, 6), t_max=6)
    net = snn.to_snntorch()
    kinds = [nn.Conv2d, TTFSNeuron, FirstSpikeMaxPool, nn.AvgPool2d, nn.Flatten, nn.Linear, TTFSNeuron]
    assert [type(module) for module in net] == kinds
    assert all(neuron.init_hidden for neuron in neurons(net))
    for exported in (net, snn.to_norse()):
        assert all(m.bias is None for m in exported.modules() if isinstance(m, nn.Conv2d | nn.Linear))
    assert isinstance(snn.to_norse(), SequentialState)


@pytest.mark.parametrize("export", ["to_snntorch", "to_norse"])
def test_exports_are_independent_of_the_network(export):
    snn = quartz_plugin.convert(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)), torch.rand(50, 3), t_max=5)
    images = torch.rand(5, 3)
    before = snn(images)
    net = getattr(snn, export)()
    with torch.no_grad():
        for tensor in [*net.parameters(), *net.buffers()]:
            tensor.zero_()
    assert torch.equal(snn(images), before)
    weights = copy.deepcopy(snn.state_dict())
    net = getattr(snn, export)()
    with torch.no_grad():
        for tensor in snn.graph_module.state_dict().values():
            tensor.zero_()
    values = {value.sum().item() for value in net.state_dict().values()}
    assert values >= {value.sum().item() for value in weights.values()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("export", ["to_snntorch", "to_norse"])
def test_exports_keep_the_dtype(export, dtype):
    ann = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).to(dtype)
    snn = quartz_plugin.convert(ann, torch.rand(50, 3), t_max=5)
    net = getattr(snn, export)()
    tensors = {name: value for name, value in net.state_dict().items() if "bias" in name or "weight" in name}
    assert len(tensors) == 4
    assert all(value.dtype == dtype for value in tensors.values())


def test_modules_of_like_names_are_all_exported():
    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = nn.Sequential(nn.Linear(3, 3), nn.ReLU())
            self.block_1 = nn.Linear(3, 3)
            self.block_0 = nn.ReLU()
            self.last = nn.Linear(3, 2)

        def forward(self, x):
            return self.last(self.block_0(self.block_1(self.block(x))))

    ann = Network()
    with torch.no_grad():
        ann.block[0].bias.add_(0.5)
        ann.block_1.bias.add_(0.5)
    snn = quartz_plugin.convert(ann, torch.rand(50, 3), t_max=5)
    images = torch.rand(20, 3)
    expected = snn.run(images, engine="stepped").spike_steps["output"]
    assert len(neurons(snn.to_snntorch())) == 3
    assert torch.equal(run_snntorch(snn.to_snntorch(), input_train(snn, images)), expected)
    assert torch.equal(run_norse(snn.to_norse(), input_train(snn, images)), expected)


def test_a_deep_copied_export_is_reset_on_its_own():
    snn = quartz_plugin.convert(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)), torch.rand(50, 3), t_max=5)
    train = input_train(snn, torch.rand(4, 3))
    net = snn.to_snntorch()
    expected = run_snntorch(net, train)
    clone = copy.deepcopy(net)
    quartz_plugin.reset(clone)
    assert torch.equal(run_snntorch(clone, train), expected)


@SOME
@given(chains(), t_maxima(), NEURONS)
def test_decode_makes_the_logits_of_the_network_of_spikes_stepped_by_hand(chain, t_max, neuron):
    snn = chain.convert(t_max, **neuron)
    net = snn.to_snntorch()
    spikes = [net(step) for step in quartz_plugin.encode(chain.images.to(snn.graph.dtype), t_max, snn.n_steps)]
    wanted = snn.run(chain.images, engine="stepped").logits
    assert torch.equal(snn.decode(torch.stack(spikes)), wanted)
    with pytest.raises(ValueError, match=rf"must be \[{snn.n_steps}, B"):
        snn.decode(torch.stack(spikes[:-1]))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("hold", [True, False])
def test_a_weight_that_is_not_finite_is_refused_by_both_faces(hold, value):
    snn = quartz_plugin.convert(nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU()), torch.rand(4, 1, 5, 5), 4, hold=hold)
    train = quartz_plugin.encode(torch.rand(2, 1, 5, 5), 4, snn.n_steps)
    snn.graph_module.get_submodule("0").weight.data[1, 0, 2, 2] = value
    for walk, net in ((run_snntorch, snn.to_snntorch()), (run_norse, snn.to_norse())):
        with pytest.raises(ValueError, match=r"^a membrane is NaN: "):
            walk(net, train)


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second, self.last = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x):
        x = self.first(x).relu()
        return self.last(x + self.second(x).relu())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", ["chain", "graph"])
def test_networks_of_float64_take_the_spikes_that_encode_gives(kind, dtype):
    ann = Residual() if kind == "graph" else nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 3))
    images = torch.rand(20, 6)
    # Its grids are so far apart that float32 could not hold a membrane.
    with torch.no_grad():
        next(ann.parameters())[0] *= 1e-4
    snn = quartz_plugin.convert(ann, images, 65, weight_bits=16, granularity="channel")
    assert snn.graph.dtype == torch.float64
    train = quartz_plugin.encode(images.to(dtype), 65, snn.n_steps)
    wanted = snn.run(images, engine="stepped")
    net = snn.to_snntorch()
    assert net.state_dict().keys() == snn.graph_module.state_dict().keys()
    for each in (net, copy.deepcopy(net)):
        quartz_plugin.reset(each)
        assert torch.equal(snn.decode(torch.stack([each(spikes) for spikes in train])), wanted.logits)
    assert torch.equal(run_norse(snn.to_norse(), train), wanted.spike_steps["output"])
    # It follows the network's type.
    assert net.float()(train[0].double()).dtype == torch.float32
