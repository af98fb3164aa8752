"""The warning of networks that are wired or stepped wrongly by hand, and its silence where they are not."""

import warnings

import pytest
import torch
from snntorch import utils
from snntorch.functional import accuracy_temporal
from torch import nn

import quartz_plugin
from quartz_plugin import TTFSNeuron, decode, encode, reset
from quartz_plugin.functional import TTFSParameters
from quartz_plugin.warn import QuartzWarning

T = 6
S = T - 1
LATE = "current arrives after the readout"


def make_net(first_bias=False, second_layer=2, t_max=T, **options):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(10, 8, bias=first_bias),
        TTFSNeuron(t_max, layer=1, bias=torch.rand(8), init_hidden=True, **options),
        nn.Linear(8, 3, bias=False),
        TTFSNeuron(t_max, layer=second_layer, rectifier=None, init_hidden=True),
    )


def run(net, train):
    return torch.stack([net(step) for step in train]).detach()


def some_input(t_max=T, steps=None):
    return encode(torch.rand(20, 10), t_max, 4 * (t_max - 1) + 1 if steps is None else steps)


def hand_on(neuron, train, state):
    for step in train:
        _, state = neuron(step, state)


@pytest.fixture
def no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error", QuartzWarning)
        yield


@pytest.mark.usefixtures("no_warnings")
class TestIsSilent:
    @pytest.mark.parametrize("t_max", [2, 3, 9])
    @pytest.mark.parametrize("options", [{}, {"hold": True}, {"rectifier": "silent"}])
    def test_of_a_network_that_is_reset_however_long_it_is_stepped(self, t_max, options):
        net = make_net(t_max=t_max, **options)
        first, second = some_input(t_max), some_input(t_max, steps=20 * t_max)
        run(net, first)
        reset(net)
        run(net, second)

    def test_of_bias_spikes_that_come_after_the_readout(self):
        neuron = TTFSNeuron(T, bias=torch.tensor([-1.5, -0.4, 0.3]), bias_code="spike", init_hidden=True, readout=2 * S)
        run(neuron, torch.cat([torch.zeros(S, 20, 3), encode(torch.rand(20, 3), T, 8 * S)]))

    def test_where_the_shape_of_the_input_starts_an_inference(self):
        net = make_net()
        run(net, some_input())
        run(net, some_input()[:, :7])

    @pytest.mark.parametrize("options", [{}, quartz_plugin.PAPER, {"rectifier": "silent"}, {"weight_bits": 8}])
    def test_of_converted_networks(self, options):
        torch.manual_seed(0)
        ann = nn.Sequential(nn.Linear(10, 8), nn.ReLU(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3))
        images = torch.rand(50, 10)
        snn = quartz_plugin.convert(ann, images, t_max={"default": 5, "input": 9}, percentile=90, **options)
        net = snn.to_snntorch()
        spikes = run(net, encode(images, snn.t_max, snn.n_steps))
        assert spikes.count_nonzero() > 0


class TestWarns:
    @pytest.mark.parametrize("t_max", [2, 3, 9])
    def test_of_a_forgotten_reset(self, t_max):
        net = make_net(t_max=t_max)
        run(net, some_input(t_max))
        with pytest.warns(
            QuartzWarning, match=rf"{LATE}.*call quartz_plugin\.reset\(net\) before each inference"
        ) as caught:
            run(net, some_input(t_max))
        assert {each.filename for each in caught} == {__file__}

    def test_of_snntorchs_reset_in_its_place(self):
        net = make_net()
        run(net, some_input())
        utils.reset(net)
        with pytest.warns(QuartzWarning, match=r"snntorch\.utils\.reset does not reset them"):
            run(net, some_input())

    def test_of_a_bias_in_front(self):
        with pytest.warns(QuartzWarning, match=f"{LATE}.*give those in front bias=False"):
            run(make_net(first_bias=True), some_input())

    def test_of_a_layer_number_that_is_too_small(self):
        with pytest.warns(QuartzWarning, match=rf"{LATE} \(step {S} .*number the layers 1, 2, 3"):
            run(make_net(second_layer=1), some_input())

    def test_of_values_that_are_not_encoded(self):
        x = torch.rand(20, 10)
        with pytest.warns(QuartzWarning, match=rf"{LATE}.*step encode\(x, \.\.\.\) instead of x"):
            run(make_net(), [x] * (4 * S + 1))

    def test_of_a_state_that_is_handed_on_to_the_next_inference(self):
        fc, neuron, state = nn.Linear(10, 8, bias=False), TTFSNeuron(T), None
        for step in some_input():
            _, state = neuron(fc(step), state)
        second = [fc(step) for step in some_input()]
        with pytest.warns(QuartzWarning, match=LATE):
            hand_on(neuron, second, state)

    def test_of_norses_cells_and_sequences(self):
        pytest.importorskip("norse")
        from quartz_plugin.norse import TTFS, TTFSCell

        late = torch.ones(2 * S + 1, 2, 3)
        with pytest.warns(QuartzWarning, match=LATE):
            TTFS(TTFSParameters(T))(late)
        with pytest.warns(QuartzWarning, match=LATE):
            hand_on(TTFSCell(TTFSParameters(T)), late, None)


def test_an_output_decoded_with_its_silence_is_as_accurate_as_its_spike_times_are():
    net = make_net()
    net[2].weight.data.mul_(4)
    spikes = run(net, some_input())
    labels = torch.randint(3, (20,))
    assert not spikes.any(0).all()
    assert spikes.any(0).any(1).all()
    values = decode(spikes, T, start=2 * S, silent=-1.0)
    assert (values.argmax(1) == labels).double().mean().item() == accuracy_temporal(spikes, labels)
