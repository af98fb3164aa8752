"""The neuron and its companions as modules: every way of stepping them is the same neuron."""

import copy
import gc
import inspect
import io
import math
import pickle
import weakref

import pytest
import snntorch
import snntorch.functional as SF
import torch
from hypothesis import given
from hypothesis import strategies as st
from snntorch import SpikingNeuron
from torch import nn

import quartz_plugin
from quartz_plugin import AxonalDelay, FirstSpikeMaxPool, TTFSNeuron, decode, encode, reset
from quartz_plugin.functional import TTFSParameters, TTFSState, closed_form, ttfs_step

T = 5
S = T - 1


def make_net(init_hidden=True, parts=256, **options):
    """Two layers of neurons, synapses without bias, weights multiples of 1 / parts."""
    net = nn.Sequential(
        nn.Linear(6, 4, bias=False),
        TTFSNeuron(T, init_hidden=init_hidden, bias=torch.tensor([0.25, -0.5, 0.0, 0.125]), **options),
        nn.Linear(4, 3, bias=False),
        TTFSNeuron(T, layer=2, rectifier=None, init_hidden=init_hidden, **options),
    )
    with torch.no_grad():
        for module in net[::2]:
            module.weight.copy_(torch.randint(-parts, parts + 1, module.weight.shape) / parts)
    return net


def some_input(batch=7, steps=4 * S + 1):
    return encode(torch.rand(batch, 6), T, steps)


def run(net, spikes):
    return torch.stack([net(s) for s in spikes]) if len(spikes) else spikes


def pure(net, spikes):
    """The same network by the step function alone."""
    states, out = [None, None], []
    for x in spikes:
        for index in range(2):
            current = x @ net[2 * index].weight.T
            x, states[index] = ttfs_step(current, states[index], net[2 * index + 1].p)
        out.append(x)
    return torch.stack(out).detach(), states


# ----------------------------------------------------------------------------------------- what it returns


def test_without_hidden_state_it_returns_spikes_and_state():
    neuron = TTFSNeuron(T)
    cur = torch.rand(2, 3)
    spk, state = neuron(cur)
    assert spk.shape == (2, 3)
    assert isinstance(state, TTFSState)
    assert int(state.step) == 1
    assert torch.equal(state.v, cur)
    _, state = neuron(cur, state)
    assert int(state.step) == 2
    assert torch.equal(state.v, cur * 3)


def test_with_hidden_state_it_returns_spikes_alone():
    neuron = TTFSNeuron(T, init_hidden=True)
    spk = neuron(torch.rand(2, 3))
    assert isinstance(spk, torch.Tensor)
    assert spk.shape == (2, 3)


def test_an_output_returns_its_membrane_and_recording_it_works():
    neuron = TTFSNeuron(T, init_hidden=True, output=True)
    spikes, membranes = [], []
    for cur in encode(torch.tensor([[0.0, 0.5, 1.0]]), T, 2 * S + 1):
        spk, mem = neuron(cur)
        spikes.append(spk)
        membranes.append(mem)
        assert torch.equal(mem, neuron.mem)
    recorded = torch.stack(membranes)
    assert torch.stack(spikes).shape == recorded.shape == (2 * S + 1, 1, 3)
    # v = S y at readout, after which it climbs one a step.
    assert recorded[S - 1].tolist() == [[0.0, 2.0, 4.0]]
    assert recorded[2 * S].tolist() == [[5.0, 7.0, 9.0]]


def test_output_without_hidden_state_hands_out_the_whole_state():
    spk, state = TTFSNeuron(T, output=True)(torch.ones(1, 2))
    assert isinstance(state, TTFSState)
    assert spk.shape == (1, 2)


def test_mem_is_the_membrane_and_empty_before_the_first_step_and_after_a_reset():
    neuron = TTFSNeuron(T, init_hidden=True)
    assert neuron.mem.numel() == 0
    neuron(torch.full((2, 3), 0.5))
    neuron(torch.full((2, 3), 0.25))
    assert neuron.mem.tolist() == [[1.25] * 3] * 2
    neuron.reset_mem()
    assert neuron.mem.numel() == 0


def test_reset_mem_starts_a_hand_written_loop():
    net = make_net(init_hidden=False)
    spikes = some_input()
    states, out = [neuron.reset_mem() for neuron in net[1::2]], []
    for s in spikes:
        hidden, states[0] = net[1](net[0](s), states[0])
        spk, states[1] = net[3](net[2](hidden), states[1])
        out.append(spk)
    assert torch.equal(torch.stack(out), pure(net, spikes)[0])


def test_a_hidden_state_and_one_from_outside_do_not_go_together():
    neuron = TTFSNeuron(T, init_hidden=True)
    _, state = TTFSNeuron(T)(torch.ones(1, 2))
    with pytest.raises(TypeError, match="init_hidden=True"):
        neuron(torch.ones(1, 2), state)


# ------------------------------------------------------------------------------------ the same in every net


@pytest.mark.parametrize("hold", [False, True])
def test_a_sequential_net_equals_the_pure_step(hold):
    net, spikes = make_net(hold=hold), some_input()
    expected, states = pure(net, spikes)
    assert 0 < expected.sum() < expected[0].numel() * len(expected)
    assert torch.equal(run(net, spikes), expected)
    assert torch.equal(net[1].mem, states[0].v)
    assert torch.equal(net[3].mem, states[1].v)


@pytest.mark.filterwarnings("ignore:current arrives after the readout")
def test_after_a_reset_the_same_input_gives_the_same_spikes_and_without_one_it_does_not():
    net, spikes = make_net(), some_input()
    first = run(net, spikes)
    assert run(net, spikes).count_nonzero() == 0
    reset(net)
    assert torch.equal(run(net, spikes), first)


class Nested(nn.Module):
    """Neurons in a list in a module in a module, called in a hand-written forward."""

    def __init__(self, net):
        super().__init__()
        self.synapses = nn.ModuleList(net[::2])
        self.neurons = nn.ModuleDict({"a": nn.Sequential(net[1]), "b": nn.Sequential(nn.Sequential(net[3]))})

    def forward(self, x):
        hidden = self.neurons["a"](self.synapses[0](x))
        return self.neurons["b"](self.synapses[1](hidden))


def test_nested_modules_are_the_same_net_and_reset_reaches_them():
    net, spikes = make_net(), some_input()
    nested = nn.Sequential(Nested(net))
    expected = pure(net, spikes)[0]
    for _ in range(2):
        assert torch.equal(run(nested, spikes), expected)
        reset(nested)
        assert nested[0].neurons["a"][0].mem.numel() == 0
        assert nested[0].neurons["b"][0][0].mem.numel() == 0


def test_norses_sequential_state_carries_the_neuron_unwrapped():
    norse = pytest.importorskip("norse.torch")
    net, spikes = make_net(init_hidden=False), some_input()
    sequential = norse.SequentialState(*net)
    state, out = None, []
    for s in spikes:
        spk, state = sequential(s, state)
        out.append(spk)
    assert torch.equal(torch.stack(out), pure(net, spikes)[0])
    assert [type(s) for s in state] == [type(None), TTFSState, type(None), TTFSState]


def test_norses_sequential_state_carries_pools_and_delays():
    norse = pytest.importorskip("norse.torch")
    x = encode(torch.rand(2, 3, 6, 6), T, 3 * S)

    def modules(init_hidden):
        return AxonalDelay(3, init_hidden), FirstSpikeMaxPool(nn.MaxPool2d(2), init_hidden)

    sequential, state, out = norse.SequentialState(*modules(False)), None, []
    for s in x:
        spk, state = sequential(s, state)
        out.append(spk)
    assert torch.equal(torch.stack(out), run(nn.Sequential(*modules(True)), x))


@given(
    st.lists(st.floats(0, 1, width=32), min_size=1, max_size=6),
    st.integers(2, 20),
    st.integers(1, 4),
    st.booleans(),
    st.sampled_from(["spike", "silent"]),
)
def test_a_neuron_repeats_the_value_it_receives(values, t_max, layer, hold, rectifier):
    window = t_max - 1
    neuron = TTFSNeuron(t_max, layer, hold=hold, rectifier=rectifier, init_hidden=True)
    x = torch.tensor([values])
    silence = torch.zeros((layer - 1) * window, *x.shape)
    out = run(neuron, torch.cat([silence, encode(x, t_max, 2 * window + 1)]))
    expected = decode(encode(x, t_max), t_max)
    assert torch.equal(decode(out, t_max, start=layer * window), expected)
    assert torch.equal(out.sum(0), (torch.ones_like(x) if rectifier == "spike" else (expected > 0).float()))


# ------------------------------------------------------------------------------------------- changing inputs


@pytest.mark.filterwarnings("ignore:current arrives after the readout")
@pytest.mark.parametrize("rectifier", ["spike", "silent", None])
@pytest.mark.parametrize("hold", [False, True])
def test_it_fires_at_most_once_and_not_after_its_last_step(rectifier, hold):
    neuron = TTFSNeuron(T, layer=2, rectifier=rectifier, hold=hold, init_hidden=True)
    last = {"spike": 3 * S, "silent": 3 * S - 1, None: 4 * S}[rectifier]
    out = run(neuron, torch.randn(8 * S, 50, 20))
    assert out.sum(0).max() == 1
    assert out[: last + 1].count_nonzero() > 0
    assert out[last + 1 :].count_nonzero() == 0
    assert set(out.unique().tolist()) <= {0.0, 1.0}


@pytest.mark.parametrize("shape", [(3, 6), (1, 6), (8, 6)])
def test_another_batch_size_starts_an_inference_anew(shape):
    net, spikes = make_net(), some_input()
    run(net, spikes[:3])
    other = encode(torch.rand(shape), T, 4 * S + 1)
    assert torch.equal(run(net, other), pure(net, other)[0])


@pytest.mark.filterwarnings("ignore:current arrives after the readout")
@pytest.mark.parametrize("first", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_spikes_have_the_inputs_dtype_and_the_state_at_least_float32(dtype, first):
    net = TTFSNeuron(T, bias=torch.tensor([0.5]), init_hidden=True)
    net(torch.ones(4, 3, dtype=first))
    if first == dtype or torch.float64 not in (first, dtype):
        reset(net)  # the states look alike; others start an inference of themselves
    currents = (torch.randint(-64, 65, (2 * S + 1, 4, 3)) / 64).to(dtype)  # exact in all three
    out = run(net, currents)
    assert out.dtype == dtype
    assert net.mem.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    reset(net)
    assert torch.equal(run(net, currents.float()), out.float())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_net_moved_to_another_dtype_steps_in_it(dtype):
    net, spikes = make_net(parts=16), some_input()  # so that sums are exact in bfloat16
    expected = run(net, spikes)
    reset(net)
    net = net.to(dtype)
    assert net[1].bias.dtype == dtype
    out = run(net, spikes.to(dtype))
    assert out.dtype == dtype
    assert torch.equal(out.float(), expected)


# ----------------------------------------------------------------------------------------- copies and files


@pytest.mark.parametrize("steps", [0, 1, 6, 11])
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net))])
def test_a_copy_in_the_middle_of_an_inference_goes_on_alone(steps, duplicate):
    net, spikes = make_net(), some_input()
    expected = pure(net, spikes)[0]
    run(net, spikes[:steps])  # with autograd on
    clone = duplicate(net)
    assert torch.equal(run(clone, spikes[steps:]), expected[steps:])
    # The clone's steps have not moved the original, nor does its reset.
    reset(clone)
    if steps:
        assert net[1].mem.shape == (7, 4)
        assert net[1].mem.requires_grad
    assert torch.equal(run(net, spikes[steps:]), expected[steps:])
    assert clone[1].mem.numel() == clone[3].mem.numel() == 0
    assert torch.equal(run(clone, spikes), expected)


def test_a_copy_does_not_cut_the_originals_gradient():
    net, spikes = make_net(), some_input()
    early = run(net, spikes[:5])
    copy.deepcopy(net)
    torch.cat([early, run(net, spikes[5:])]).mul(torch.arange(len(spikes)).view(-1, 1, 1)).sum().backward()
    gradient = net[0].weight.grad.clone()
    net.zero_grad()
    reset(net)
    run(net, spikes).mul(torch.arange(len(spikes)).view(-1, 1, 1)).sum().backward()
    assert gradient.count_nonzero() > 0
    assert torch.equal(net[0].weight.grad, gradient)


def test_a_copys_state_shares_no_memory_with_the_original():
    neuron = TTFSNeuron(T, init_hidden=True, bias=torch.tensor([0.5]))
    with torch.no_grad():
        neuron(torch.ones(2, 2))
        clone = copy.deepcopy(neuron)
        clone.mem.fill_(100.0)
        clone.bias.fill_(0.0)
    assert neuron.mem.tolist() == [[1.5, 1.5]] * 2
    assert neuron.bias.tolist() == [0.5]


@pytest.mark.parametrize(
    ("module", "shape"),
    [(FirstSpikeMaxPool(nn.MaxPool1d(2), True), (2, 3, 4)), (AxonalDelay(2, True), (2, 3))],
)
def test_companions_are_copied_in_the_middle_of_an_inference_too(module, shape):
    scale = torch.ones(shape, requires_grad=True)
    spikes = torch.zeros(6, *shape)
    spikes[torch.randint(0, 6, shape).unsqueeze(0) == torch.arange(6).view(-1, *[1] * len(shape))] = 1
    run(module, spikes[:3] * scale)
    clone = copy.deepcopy(module)
    expected = run(module, spikes[3:])
    assert torch.equal(run(clone, spikes[3:]), expected)
    reset(module)
    assert clone._hidden is not None
    assert module._hidden is None


def test_reset_resets_this_net_alone():
    nets, spikes = [make_net() for _ in range(3)], some_input()
    for net in nets:
        run(net, spikes[:2])
    reset(nets[1])
    assert [net[1].mem.numel() for net in nets] == [28, 0, 28]
    assert [net[3].mem.numel() for net in nets] == [21, 0, 21]


@pytest.mark.filterwarnings("ignore:current arrives after the readout")
def test_reset_also_resets_snntorchs_own_neurons_inside_the_net():
    net = nn.Sequential(TTFSNeuron(T, init_hidden=True), nn.Sequential(snntorch.Leaky(0.5, init_hidden=True)))
    other = snntorch.Leaky(0.5, init_hidden=True)
    spikes = torch.rand(2 * T, 2, 3)
    first = run(net, spikes)
    other(spikes[0])
    assert net[1][0].mem.count_nonzero() > 0
    reset(net)
    assert net[1][0].mem.count_nonzero() == 0
    assert other.mem.count_nonzero() > 0
    assert torch.equal(run(net, spikes), first)


def test_reset_does_nothing_to_modules_without_state():
    net = nn.Sequential(nn.Linear(2, 3), nn.ReLU())
    before = copy.deepcopy(net.state_dict())
    reset(net)
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())


@pytest.mark.parametrize("steps", [0, 3])
def test_the_state_dict_holds_the_bias_alone(steps):
    net = make_net()
    run(net, some_input()[:steps])
    assert list(net.state_dict()) == ["0.weight", "1.bias", "2.weight"]
    assert list(TTFSNeuron(T).state_dict()) == []
    assert not list(TTFSNeuron(T, bias=torch.ones(2)).parameters())


def test_a_state_dict_makes_another_net_the_same():
    net, spikes = make_net(), some_input()
    other = make_net()
    other[1].bias.zero_()
    expected = run(net, spikes)
    file = io.BytesIO()
    torch.save(net.state_dict(), file)
    file.seek(0)
    assert not torch.equal(run(other, spikes), expected)
    reset(other)
    other.load_state_dict(torch.load(file))
    assert torch.equal(run(other, spikes), expected)


def test_the_bias_is_the_neurons_own_copy():
    bias = torch.tensor([0.5], requires_grad=True)
    neuron = TTFSNeuron(T, bias=bias)
    with torch.no_grad():
        bias.fill_(9.0)
    assert neuron.bias.tolist() == [0.5]
    assert not neuron.bias.requires_grad
    assert neuron.p.bias is neuron.bias


# -------------------------------------------------------------------------------------- as a SpikingNeuron


def meaningless_keywords():
    ours = {"spike_grad", "init_hidden", "output"}
    names = {
        name
        for kind in (SpikingNeuron, snntorch.Leaky, snntorch.Synaptic, snntorch.Alpha)
        for name in inspect.signature(kind.__init__).parameters
    }
    return sorted(names - ours - {"self", "args", "kwargs"})


@pytest.mark.parametrize("keyword", meaningless_keywords())
def test_keywords_of_snntorch_that_mean_nothing_here_raise(keyword):
    with pytest.raises(TypeError, match=f"'{keyword}'"):
        TTFSNeuron(T, **{keyword: 0.5})


def test_keywords_that_mean_nothing_anywhere_raise():
    with pytest.raises(TypeError, match="'treshold'"):
        TTFSNeuron(T, treshold=1.0)


def test_the_keywords_looked_at_are_those_of_snntorch():
    assert {"beta", "threshold", "reset_mechanism", "inhibition", "learn_threshold"} <= set(meaningless_keywords())


def test_it_is_a_spiking_neuron_with_the_codes_threshold():
    neuron = TTFSNeuron(16)
    assert isinstance(neuron, SpikingNeuron)
    assert neuron.threshold == 15.5


def test_the_class_wide_list_of_instances_does_not_grow():
    leaky = snntorch.Leaky(0.5)
    before = list(SpikingNeuron.instances)
    assert any(instance is leaky for instance in before)
    kept = [make_net() for _ in range(3)]
    kept += [copy.deepcopy(kept[0])]
    with pytest.raises(ValueError, match="t_max"):
        TTFSNeuron(1)
    after = SpikingNeuron.instances
    assert len(after) == len(before)
    assert all(a is b for a, b in zip(after, before, strict=True))


def test_a_hundred_dropped_nets_leave_no_neuron_alive():
    alive = []
    for _ in range(100):
        net = make_net()
        run(net, some_input(batch=2)[:3])
        clone = copy.deepcopy(net)
        alive += [weakref.ref(module) for module in (net[1], net[3], clone[1], clone[3])]
    assert alive[-1]() is not None
    del net, clone
    gc.collect()
    assert [ref for ref in alive if ref() is not None] == []


@pytest.mark.parametrize("init_hidden", [False, True])
@pytest.mark.parametrize(
    ("spike_grad", "slope"),
    [
        (None, lambda x: 1 / (1 + (torch.pi * x) ** 2)),
        (snntorch.surrogate.fast_sigmoid(slope=10), lambda x: 1 / (10 * x.abs() + 1) ** 2),
    ],
    ids=["default", "fast_sigmoid"],
)
def test_the_surrogate_gradient_asked_for_is_used(spike_grad, slope, init_hidden):
    neuron = TTFSNeuron(T, spike_grad=spike_grad, init_hidden=init_hidden)
    cur = torch.linspace(0, 9, 19).view(1, -1).requires_grad_()
    out = neuron(cur)
    spk = out if init_hidden else out[0]
    assert torch.equal(spk, (cur >= 4.5).float())
    spk.sum().backward()
    torch.testing.assert_close(cur.grad, slope(cur.detach() - 4.5))


def test_a_few_steps_of_training_through_time_lower_the_loss():
    net = make_net()
    spikes, target = some_input(batch=16), torch.randint(0, 3, (16,))
    weight = torch.linspace(1, 0, len(spikes)).view(-1, 1, 1)  # the earlier the better
    optimiser = torch.optim.Adam(net.parameters(), 0.02)
    losses = []
    for _ in range(40):
        reset(net)
        loss = nn.functional.cross_entropy(10 * (run(net, spikes) * weight).sum(0), target)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert min(losses[-5:]) < 0.8 * losses[0]


# ------------------------------------------------------------------------------- losses of spikes and of their times


def some_task():
    """Input spikes and labels of 120 images."""
    torch.manual_seed(0)
    x = torch.rand(120, 6)
    return encode(x, 8, 29), (x[:, 0] + x[:, 1] > 1).long() + (x[:, 2] > 0.6).long()


def some_parameters(seed=0):
    """Weights of two layers, and biases."""
    torch.manual_seed(seed)
    weights = [nn.Parameter(nn.Linear(a, b).weight.detach()) for a, b in ((6, 16), (16, 3))]
    return weights, [nn.Parameter(torch.zeros(16)), nn.Parameter(torch.zeros(3))]


def through_modules(weights, biases, spikes, hold):
    first, second = (TTFSNeuron(8, layer, hold=hold, rectifier=r) for layer, r in ((1, "spike"), (2, None)))
    first.bias, second.bias = biases
    states, out = [None, None], []
    for x in spikes:
        hidden, states[0] = first(x @ weights[0].T, states[0])
        spk, states[1] = second(hidden @ weights[1].T, states[1])
        out.append(spk)
    return torch.stack(out)


def through_norse(weights, biases, spikes, hold):
    norse = pytest.importorskip("quartz_plugin.norse", reason="needs Norse", exc_type=ImportError)
    for layer, rectifier in ((1, "spike"), (2, None)):
        neurons = norse.TTFS(TTFSParameters(8, layer, hold, rectifier))
        neurons.bias = biases[layer - 1]
        spikes, _ = neurons(spikes @ weights[layer - 1].T)
    return spikes


LOSSES = {
    "ce_temporal": SF.ce_temporal_loss(),
    "mse_temporal": SF.mse_temporal_loss(on_target=14, off_target=21),
    "ce_rate": SF.ce_rate_loss(),
}


@pytest.mark.parametrize("hold", [False, True])
@pytest.mark.parametrize("face", [through_modules, through_norse])
class TestLossesOfSnntorch:
    @pytest.mark.parametrize("loss", LOSSES)
    def test_the_gradient_leads_uphill_in_the_mean_over_images(self, face, hold, loss):
        spikes, labels = some_task()
        for seed in range(3):
            weights, biases = some_parameters(seed)
            values = [LOSSES[loss](face(weights, biases, spikes, hold), labels.clone())]
            gradient = torch.autograd.grad(values[0], [*weights, *biases])
            length = torch.stack([each.square().sum() for each in gradient]).sum().sqrt()
            with torch.no_grad():
                for by in (0.1, -0.2):
                    for parameter, each in zip([*weights, *biases], gradient, strict=True):
                        parameter.add_(each * (by / length))
                    values.append(LOSSES[loss](face(weights, biases, spikes, hold), labels.clone()))
            slope = float(values[1] - values[2]) / 0.2
            assert slope > 0
            if loss != "ce_rate":  # which hardly changes where all fire once
                assert 0.2 < float(length) / slope < 2

    @pytest.mark.parametrize(("loss", "share"), [("ce_temporal", 0.8), ("mse_temporal", 0.8), ("ce_rate", 0.997)])
    def test_a_network_learns(self, face, hold, loss, share):
        spikes, labels = some_task()
        weights, biases = some_parameters()
        optimiser = torch.optim.Adam([*weights, *biases], 0.02)
        losses = []
        for _ in range(15):
            value = LOSSES[loss](face(weights, biases, spikes, hold), labels.clone())
            optimiser.zero_grad()
            value.backward()
            optimiser.step()
            losses.append(value.item())
        assert losses[-1] < share * losses[0]

    def test_to_fire_earlier_is_no_spike_more(self, face, hold):
        weights, biases = some_parameters()
        out = face(weights, biases, some_task()[0], hold)
        assert bool((out.sum(0) == 1).all())
        out.sum().backward()
        assert max(float(each.grad.abs().max()) for each in [*weights, *biases]) < 1e-3


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("init_hidden", [False, True])
def test_a_weight_that_is_not_finite_is_refused_at_readout(value, init_hidden):
    net = make_net(init_hidden)
    spikes = some_input()
    with torch.no_grad():
        net[0].weight[1, 2] = value
    with pytest.raises(ValueError, match=r"^a membrane is NaN: a weight, a bias or an input is NaN or infinite$"):
        run(net, spikes) if init_hidden else pure(net, spikes)


@pytest.mark.parametrize("bias_code", ["synapse", "spike"])
def test_a_bias_that_became_nan_is_refused_at_readout(bias_code):
    neuron = TTFSNeuron(T, bias=torch.zeros(3), bias_code=bias_code, init_hidden=True)
    neuron.bias[1] = torch.nan
    for _ in range(S):
        neuron(torch.zeros(2, 3))
    with pytest.raises(ValueError, match="a membrane is NaN"):
        neuron(torch.zeros(2, 3))


# ------------------------------------------------------------- refusals (more of them: test_functional.py)


def test_a_refused_neuron_says_so_when_it_is_made():
    with pytest.raises(ValueError, match="t_max"):
        TTFSNeuron(1)
    with pytest.raises(ValueError, match="layer"):
        TTFSNeuron(4, layer=0)
    with pytest.raises(ValueError, match="NaN"):
        TTFSNeuron(4, bias=torch.tensor([torch.nan]))
    with pytest.raises(TypeError, match="bias must be a Tensor"):
        TTFSNeuron(4, bias=[0.5])
    with pytest.raises(ValueError, match="hold=False"):
        TTFSNeuron(4, bias_code="spike", hold=True)
    with pytest.raises(ValueError, match="rectifier"):
        TTFSNeuron(4, bias_code="spike", rectifier="silent")


def test_the_readout_that_a_refusal_names_helps_and_the_values_are_the_same():
    """A bias of 1.25 in layer 1 needs two empty steps in front; with them it is but a bias of 1.25."""
    bias, x = torch.tensor([1.25, -0.75]), torch.tensor([[0.0, 1.0], [0.0, 0.75]])
    weight = torch.tensor([-1.0, 1.0])
    with pytest.raises(ValueError, match=r"give readout=10 and delay the input by 2 steps"):
        TTFSNeuron(9, bias=bias, bias_code="spike")
    net = nn.Sequential(
        AxonalDelay(2, init_hidden=True),
        TTFSNeuron(9, bias=bias, bias_code="spike", readout=10, rectifier=None, init_hidden=True),
    )
    out = run(net, encode(x, 9, 27) * weight)
    assert decode(out, 9, start=10).tolist() == [[1.25, 0.25], [1.25, 0.0]]


# -------------------------------------------------------------------------------------- first-spike max pool


pools = pytest.mark.parametrize(
    ("pool", "shape"),
    [
        (nn.MaxPool1d(2), (3, 8)),
        (nn.MaxPool1d(3, stride=2, padding=1), (3, 9)),
        (nn.MaxPool2d(2), (3, 6, 8)),
        (nn.MaxPool2d(3, stride=2, padding=1), (2, 7, 7)),
        (nn.MaxPool2d(3, stride=2, ceil_mode=True), (2, 6, 6)),
        (nn.MaxPool2d(2, dilation=2), (2, 6, 6)),
        (nn.AdaptiveMaxPool1d(2), (3, 7)),
        (nn.AdaptiveMaxPool2d((2, 3)), (3, 6, 7)),
    ],
    ids=str,
)


@pools
@pytest.mark.parametrize("init_hidden", [False, True])
@pytest.mark.parametrize("silent_zeros", [False, True])
def test_pooling_spikes_says_the_maximum_once(pool, shape, init_hidden, silent_zeros):
    x = torch.randint(0, 9, (4, *shape)) / 8
    module = FirstSpikeMaxPool(pool, init_hidden=init_hidden)
    state, out = None, []
    for s in encode(x, 9, silent_zeros=silent_zeros):
        if init_hidden:
            out.append(module(s))
        else:
            spk, state = module(s, state)
            out.append(spk)
    out = torch.stack(out)
    assert torch.equal(decode(out, 9), pool(x))
    count = out.sum(0)
    assert torch.equal(count, (pool(x) > 0).float() if silent_zeros else torch.ones_like(count))


def test_padding_adds_no_spike():
    """A window that is mostly padding waits for the one spike in it."""
    pool = FirstSpikeMaxPool(nn.MaxPool2d(2, stride=2, padding=1), init_hidden=True)
    spikes = torch.zeros(3, 1, 1, 2, 2)
    spikes[1, 0, 0, 0, 0] = spikes[2, 0, 0, 1, 1] = 1
    out = run(pool, spikes)
    assert out[0].count_nonzero() == 0
    assert out[1].flatten().tolist() == [1, 0, 0, 0]
    assert out[2].flatten().tolist() == [0, 0, 0, 1]


def test_the_second_spike_in_a_window_does_not_pass():
    pool = FirstSpikeMaxPool(nn.MaxPool1d(2), init_hidden=True)
    spikes = torch.tensor([[0.0, 0, 1, 0], [1, 0, 0, 1], [0, 1, 0, 0]]).view(3, 1, 1, 4)
    assert run(pool, spikes).view(3, 2).tolist() == [[0, 1], [1, 0], [0, 0]]
    reset(pool)
    assert pool(spikes[2]).flatten().tolist() == [1, 0]


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ((2, 3, 8), (5, 3, 8)),
        ((2, 3, 8), (2, 3, 4)),
        ((2, 3, 8), (2, 3, 16)),
        ((2, 3, 8), (2, 5, 8)),
        ((2, 3, 2), (2, 3, 8)),
        ((2, 1, 8), (2, 3, 8)),
    ],
)
def test_a_pool_starts_anew_when_the_inputs_shape_changes(first, second):
    pool = FirstSpikeMaxPool(nn.MaxPool1d(2), init_hidden=True)
    pool(torch.ones(first))
    assert torch.equal(pool(torch.ones(second)), torch.ones(*second[:2], second[2] // 2))


def test_a_pool_starts_anew_when_the_dtype_changes():
    pool = FirstSpikeMaxPool(nn.MaxPool1d(2), init_hidden=True)
    pool(torch.ones(2, 3, 8))
    out = pool(torch.ones(2, 3, 8, dtype=torch.float64))
    assert out.dtype == torch.float64
    assert out.sum() == 24


def test_a_pool_leaves_state_and_input_alone():
    pool, x = FirstSpikeMaxPool(nn.MaxPool1d(2)), torch.tensor([[[1.0, 0, 0, 0]]])
    _, state = pool(x)
    before = state.fired.clone()
    for _ in range(2):
        assert pool(torch.ones_like(x), state)[0].tolist() == [[[0.0, 1.0]]]
    assert torch.equal(state.fired, before)
    assert x.tolist() == [[[1.0, 0, 0, 0]]]


def test_gradients_pass_a_pool():
    pool, x = FirstSpikeMaxPool(nn.MaxPool1d(2), init_hidden=True), torch.tensor([[[1.0, 0.0]]])
    x.requires_grad_()
    pool(x).sum().backward()
    assert x.grad.tolist() == [[[1.0, 0.0]]]


# ------------------------------------------------------------------------------------------- axonal delay


@given(st.integers(0, 7), st.integers(1, 12), st.booleans(), st.integers(0, 10**6))
def test_a_delay_shifts_spikes_by_its_steps(delay, steps, init_hidden, seed):
    torch.manual_seed(seed)
    x = torch.randint(0, 2, (steps, 2, 3)).float()
    module = AxonalDelay(delay, init_hidden=init_hidden)
    state, out = None, []
    for s in x:
        if init_hidden:
            out.append(module(s))
        else:
            spk, state = module(s, state)
            out.append(spk)
    assert torch.equal(torch.stack(out), torch.cat([torch.zeros(delay, 2, 3), x])[:steps])


def test_a_reset_delay_forgets_what_was_on_its_way():
    delay = AxonalDelay(2, init_hidden=True)
    delay(torch.ones(1, 2))
    reset(delay)
    assert run(delay, torch.zeros(5, 1, 2)).count_nonzero() == 0


@pytest.mark.parametrize("shape", [(3, 2), (1, 5)])
def test_a_delay_starts_anew_when_the_inputs_shape_changes(shape):
    delay = AxonalDelay(1, init_hidden=True)
    delay(torch.ones(1, 2))
    assert torch.equal(delay(torch.ones(shape)), torch.zeros(shape))
    assert torch.equal(delay(torch.zeros(shape)), torch.ones(shape))


@pytest.mark.parametrize("steps", [-1, 1.5, 2.0, None, True, "2"])
def test_a_delay_is_a_whole_number_of_steps(steps):
    with pytest.raises(ValueError, match="whole number of steps"):
        AxonalDelay(steps)


def test_delay_and_pool_have_no_entries_in_the_state_dict():
    net = nn.Sequential(AxonalDelay(2, init_hidden=True), FirstSpikeMaxPool(nn.MaxPool1d(2), init_hidden=True))
    run(net, torch.ones(3, 1, 1, 4))
    assert list(net.state_dict()) == []


# ------------------------------------------------------------------------------------- a whole layer at once


@given(st.integers(2, 17), st.sampled_from(["spike", "silent"]), st.integers(0, 10**6))
def test_convolution_pool_and_held_neuron_are_rounding_behind_a_convolution(t_max, rectifier, seed):
    window = t_max - 1
    generator = torch.Generator().manual_seed(seed)
    conv = nn.Conv2d(2, 3, 3, padding=1, bias=False).requires_grad_(False)
    conv.weight.copy_(torch.randint(-128, 129, conv.weight.shape, generator=generator) / 256)
    bias = torch.randint(-128, 129, (3, 1, 1), generator=generator) / 256
    x = torch.randint(0, t_max, (2, 2, 8, 8), generator=generator)
    net = nn.Sequential(
        FirstSpikeMaxPool(nn.MaxPool2d(2), init_hidden=True),
        conv,
        TTFSNeuron(t_max, hold=True, rectifier=rectifier, bias=bias, init_hidden=True),
    )
    trains = (x == window - torch.arange(2 * window + 1).view(-1, 1, 1, 1, 1)).float()
    out = run(net, trains)
    levels = closed_form(conv(nn.functional.max_pool2d(x.float(), 2)) + window * bias, window)
    torch.testing.assert_close(decode(out, t_max, start=window), levels / window, rtol=0, atol=0)


def test_the_printed_neuron_shows_what_it_does():
    text = repr(TTFSNeuron(16, layer=2, hold=True, rectifier=None, bias=torch.zeros(3)))
    assert "t_max=16, readout=30, hold=True, rectifier=None, bias=(3,)" in text
    assert 'bias_code="spike"' in repr(TTFSNeuron(4, bias_code="spike"))
    assert "steps=3" in repr(AxonalDelay(3))


def test_the_parameters_are_those_given():
    neuron = TTFSNeuron(6, 2, hold=True, rectifier="silent", readout=30, input_window=7)
    assert isinstance(neuron.p, TTFSParameters)
    assert neuron.p[:5] == (6, 2, True, "silent", None)
    assert (neuron.clock.readout, neuron.clock.first_input, neuron.clock.window) == (30, 23, 5)


class TestWhatUsersStumbleOver:
    def test_a_bias_parameter_is_trained_and_shared(self):
        bias = nn.Parameter(torch.full((3,), 0.2))
        neuron = TTFSNeuron(4, bias=bias)
        assert [name for name, _ in neuron.named_parameters()] == ["bias"]
        assert neuron.bias is bias
        state, total = None, 0.0
        for step in range(7):
            spikes, state = neuron(torch.full((2, 3), 0.3 if step == 0 else 0.0), state)
            total = total + step * spikes.sum()
        total.backward()
        assert bias.grad.abs().sum() > 0
        assert "bias" in neuron.state_dict()

    @pytest.mark.parametrize(
        ("bias", "neurons", "says"),
        [
            (torch.ones(3), (3, 5, 5), r"bias.view\(-1, 1, 1\)"),
            (torch.ones(5), (3, 5, 5), r"bias.view\(-1, 1, 1\), for the last dimension bias.view\(1, 1, -1\)"),
            (torch.ones(8), (8, 8), r"channels give bias.view\(-1, 1\), for the last dimension bias.view\(1, -1\)"),
            (torch.ones(3), (3, 5), r"bias.view\(-1, 1\)"),
            (torch.ones(3), (3, 2, 2, 3), r"bias.view\(-1, 1, 1, 1\)"),
            (torch.ones(4), (3,), "does not fit neurons of shape"),
            (torch.ones(4, 3), (3,), "does not fit neurons of shape"),
        ],
    )
    def test_a_bias_of_another_shape_is_refused_at_the_first_step(self, bias, neurons, says):
        with pytest.raises(ValueError, match=says):
            TTFSNeuron(4, bias=bias)(torch.zeros(1, *neurons))

    @pytest.mark.parametrize("state", [torch.zeros(2, 3), "state"])
    def test_a_state_of_another_kind_is_refused(self, state):
        with pytest.raises(ValueError, match="start an inference with None"):
            TTFSNeuron(4)(torch.zeros(2, 3), state)

    def test_a_state_of_another_batch_size_is_refused(self):
        for module in (TTFSNeuron(4), AxonalDelay(2), FirstSpikeMaxPool(nn.MaxPool1d(1))):
            _, state = module(torch.zeros(1, 2, 3))
            with pytest.raises(ValueError, match=r"shape \[5, 2, 3\]"):
                module(torch.zeros(5, 2, 3), state)

    def test_the_older_name_of_reset_mem_works(self):
        neuron = TTFSNeuron(4, init_hidden=True)
        neuron(torch.ones(1, 2))
        assert neuron.init_leaky() is None
        assert neuron.mem.numel() == 0

    @pytest.mark.parametrize("pool", [nn.AvgPool1d(2), 2, nn.MaxPool1d(2, return_indices=True)])
    def test_what_is_no_max_pooling_is_refused(self, pool):
        with pytest.raises((TypeError, ValueError), match=r"max-pooling module|return_indices=False"):
            FirstSpikeMaxPool(pool)

    def test_a_surrogate_must_be_a_function(self):
        with pytest.raises(TypeError, match=r"snntorch.surrogate"):
            TTFSNeuron(4, spike_grad="atan")

    def test_t_max_may_be_an_integer_of_numpy(self):
        import numpy as np

        assert TTFSNeuron(np.int64(4)).clock == TTFSNeuron(4).clock


@pytest.mark.parametrize("shape", [(1, 4), (4, 1), (4, 4), (1,)])
def test_a_bias_of_a_square_of_neurons_is_along_the_dimension_that_its_shape_names(shape):
    bias = torch.arange(1, 1 + math.prod(shape)).reshape(shape) / 20
    neuron, state, spikes = TTFSNeuron(21, bias=bias), None, []
    for _ in range(41):
        out, state = neuron(torch.zeros(1, 4, 4), state)
        spikes.append(out)
    torch.testing.assert_close(quartz_plugin.decode(torch.stack(spikes), 21, 20)[0], bias.expand(4, 4))


@pytest.mark.parametrize("engine", ["analytic", "event", "stepped"])
def test_a_bias_put_into_a_network_that_fits_in_two_ways_is_refused_by_every_engine(engine):
    ann = nn.Sequential(nn.Conv1d(2, 4, 1), nn.ReLU(), nn.Flatten(), nn.Linear(16, 2))
    snn = quartz_plugin.convert(ann, torch.rand(10, 2, 4))
    snn.graph.layers[0].neuron.bias = nn.Parameter(torch.rand(4))
    with pytest.raises(ValueError, match=r"does not fit neurons of shape \[4, 4\]"):
        snn.run(torch.rand(1, 2, 4), engine=engine)
