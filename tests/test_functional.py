"""The neuron's mathematics against a plain reading of DESIGN.md, section 3, in fractions."""

import math
from fractions import Fraction
from typing import NamedTuple

import pytest
import snntorch.surrogate
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from quartz_plugin import TTFSNeuron
from quartz_plugin.functional import (
    TTFSParameters,
    TTFSState,
    arctan_surrogate,
    closed_form,
    initial_state,
    threshold,
    ttfs_step,
)

HALF = Fraction(1, 2)


class Rules(NamedTuple):
    """Parameters of the plain neuron below."""

    t_max: int
    readout: int
    input_window: int
    hold: bool
    rectifier: str | None
    bias_code: str


def plain_bias_step(bias, readout, input_window):
    """Step at which a bias spike arrives; Python's round of a Fraction is half to even."""
    clamped = max(-3 * HALF, min(3 * HALF, bias))
    return readout - input_window + round(input_window * (2 - clamped)) - input_window


def plain_neuron(currents, bias, rules):
    """Spike train, currents and membranes of one neuron: the five rules, in order, in fractions."""
    window = rules.t_max - 1
    theta = rules.t_max - HALF
    rectify = rules.readout + window
    bias_step = None
    if bias is not None:
        bias_step = rules.readout - rules.input_window
        if rules.bias_code == "spike":
            bias_step = plain_bias_step(bias, rules.readout, rules.input_window)
    i = v = Fraction(0)
    fired = off = False
    trace = []
    for step, arrival in enumerate(currents):
        i += arrival
        if step == bias_step:
            i += 1 if rules.bias_code == "spike" else bias
        if step == rules.readout:
            pending = rules.bias_code == "spike" and bias_step is not None and bias_step > step
            i = Fraction(0 if pending else 1)
        if rules.rectifier == "silent" and step == rectify:
            off = True
        v += i
        fires = v >= theta
        if rules.hold and step < rules.readout:
            fires = False
        if rules.rectifier is None and step > rules.readout + 2 * window:
            off = True
        if rules.rectifier == "spike" and step == rectify:
            fires = True
        spike = fires and not fired and not off
        fired = fired or spike
        trace.append((int(spike), i, v))
    return trace


def parameters_of(rules, bias, layer=1):
    return TTFSParameters(
        rules.t_max,
        layer=layer,
        hold=rules.hold,
        rectifier=rules.rectifier,
        bias=bias,
        bias_code=rules.bias_code,
        readout=rules.readout,
        input_window=rules.input_window,
    ).check()


def run(currents, p):
    """All steps of `currents` [steps, B, ...] through ttfs_step: spikes, and the states after each step."""
    state, spikes, states = None, [], []
    for current in currents:
        spike, state = ttfs_step(current, state, p)
        spikes.append(spike)
        states.append(state)
    return torch.stack(spikes), states


seeds = st.integers(0, 10**6)
weights = st.integers(-1024, 1024).map(lambda k: Fraction(k, 256))
kinds = st.one_of(
    st.tuples(st.booleans(), st.sampled_from(["spike", "silent", None]), st.just("synapse")),
    st.tuples(st.just(False), st.sampled_from(["spike", None]), st.just("spike")),
)


@st.composite
def neurons(draw):
    """Rules, biases, synapses and spike times (in or out of the input window) of a few neurons."""
    t_max = draw(st.integers(2, 12))
    hold, rectifier, bias_code = draw(kinds)
    input_window = draw(st.one_of(st.just(t_max - 1), st.integers(1, 12)))
    n_neurons, n_inputs = draw(st.integers(1, 3)), draw(st.integers(1, 5))
    bias = st.integers(-600, 600).map(lambda k: Fraction(k, 256))
    biases = draw(st.none() | st.lists(bias, min_size=n_neurons, max_size=n_neurons))
    readout = input_window * draw(st.integers(1, 3))
    if biases is not None and bias_code == "spike":
        readout += max(0, *(-plain_bias_step(b, readout, input_window) for b in biases))
    rules = Rules(t_max, readout, input_window, hold, rectifier, bias_code)
    n_steps = readout + 2 * (t_max - 1) + 4
    synapses = draw(
        st.lists(st.lists(weights, min_size=n_inputs, max_size=n_inputs), min_size=n_neurons, max_size=n_neurons)
    )
    # Mostly before readout, as in a network; some after it, some never.
    when = st.one_of(st.integers(0, readout), st.integers(0, n_steps + 3))
    samples = draw(st.lists(st.lists(when, min_size=n_inputs, max_size=n_inputs), min_size=1, max_size=2))
    return rules, biases, synapses, samples, n_steps


# ------------------------------------------------------------------------------------------ one time step


@given(neurons(), st.sampled_from([torch.float32, torch.float64]))
def test_the_step_equals_the_plain_reading_of_the_rules_bit_for_bit(neuron, dtype):
    rules, biases, synapses, samples, n_steps = neuron
    spikes_in = torch.zeros(n_steps, len(samples), len(samples[0]), dtype=dtype)
    for sample, times in enumerate(samples):
        for source, time in enumerate(times):
            if time < n_steps:
                spikes_in[time, sample, source] = 1
    weight = torch.tensor([[float(w) for w in row] for row in synapses], dtype=dtype)
    bias = None if biases is None else torch.tensor([float(b) for b in biases], dtype=dtype)
    spikes, states = run(spikes_in @ weight.T, parameters_of(rules, bias))

    rectify = rules.readout + rules.t_max - 1
    for sample, times in enumerate(samples):
        for index, row in enumerate(synapses):
            currents = [
                sum((w for w, time in zip(row, times, strict=True) if time == step), Fraction(0))
                for step in range(n_steps)
            ]
            plain = plain_neuron(currents, None if biases is None else biases[index], rules)
            assert spikes[:, sample, index].tolist() == [spike for spike, _, _ in plain]
            for step, (_, i, v) in enumerate(plain):
                if rules.rectifier == "silent" and step >= rectify:
                    break  # switched off: what it then holds means nothing
                assert states[step].i[sample, index].item() == i
                assert states[step].v[sample, index].item() == v
                assert states[step].fired[sample, index].item() == sum(s for s, _, _ in plain[: step + 1])


@given(neurons(), seeds)
def test_nobody_fires_twice_and_with_the_rectifier_everybody_fires_once(neuron, seed):
    torch.manual_seed(seed)
    rules, biases, synapses, samples, n_steps = neuron
    bias = None if biases is None else torch.tensor([float(b) for b in biases])
    currents = torch.randn(n_steps, len(samples), len(synapses)) * 3
    spikes, _ = run(currents, parameters_of(rules, bias))
    count = spikes.sum(0)
    assert count.max() <= 1
    if rules.rectifier == "spike":
        assert count.min() == 1
    if rules.hold:
        assert spikes[: rules.readout].count_nonzero() == 0
    if rules.rectifier == "silent":
        assert spikes[rules.readout + rules.t_max - 1 :].count_nonzero() == 0


@pytest.mark.parametrize("level", range(8))
def test_a_half_reaches_the_threshold_exactly_and_fires(level):
    """y = (level + 1/2) / S meets theta at the step that says level + 1; a hair less says level."""
    p = TTFSParameters(t_max=9)
    weight = torch.tensor([[(level + 0.5) / 8, (level + 0.5) / 8 - 2**-10]])
    currents = torch.zeros(20, 1, 2)
    currents[0] = weight  # a spike at once says 1
    spikes, states = run(currents, p)
    steps = spikes.argmax(0)[0].tolist()
    assert steps == [16 - (level + 1), 16 - level]
    assert states[steps[0]].v[0, 0].item() == p.clock.threshold


def test_readout_sets_the_current_to_one_whatever_it_was():
    p = TTFSParameters(t_max=5, rectifier=None)
    currents = torch.zeros(13, 1, 3)
    currents[1, 0] = torch.tensor([0.25, -7.0, 0.0])
    currents[4, 0] = 100.0  # arrives at readout itself: too late
    _, states = run(currents, p)
    assert states[3].i.tolist() == [[0.25, -7.0, 0.0]]
    assert [state.i.tolist() for state in states[4:]] == [[[1.0, 1.0, 1.0]]] * 9


def test_a_silent_neuron_is_off_before_it_could_cross_in_the_rectifier_step():
    """v = 1/2 at readout crosses with level 1; v = -1/2 would cross in the very step that says 0."""
    currents = torch.zeros(12, 1, 2)
    currents[3, 0] = torch.tensor([0.5, -0.5])
    silent, _ = run(currents, TTFSParameters(t_max=5, rectifier="silent"))
    spiking, _ = run(currents, TTFSParameters(t_max=5, rectifier="spike"))
    assert silent.sum(0).tolist() == [[1.0, 0.0]]
    assert spiking.argmax(0).tolist() == [[7, 8]]
    assert silent[:, 0, 0].argmax() == 7


def test_an_output_may_say_minus_one_but_nothing_less():
    """A level -S fires in the last step of the signed half; -S - 1/2 and less is silent for ever."""
    currents = torch.zeros(20, 1, 3)
    currents[3, 0] = torch.tensor([-4.5, -4.75, -100.0])
    spikes, _ = run(currents, TTFSParameters(t_max=5, rectifier=None))
    assert spikes.sum(0).tolist() == [[1.0, 0.0, 0.0]]
    assert spikes[:, 0, 0].argmax() == 12


def test_early_spikes_stay_without_hold_and_are_moved_to_readout_by_it():
    currents = torch.zeros(12, 1, 1)
    currents[0] = 2.5
    free, _ = run(currents, TTFSParameters(t_max=5))
    held, _ = run(currents, TTFSParameters(t_max=5, hold=True))
    assert free.argmax(0).item() == 1  # 2.5, 5.0 >= 4.5
    assert held.argmax(0).item() == 4
    assert (free.sum(), held.sum()) == (1, 1)


@pytest.mark.parametrize("code", ["synapse", "spike"])
def test_a_bias_map_is_one_bias_a_position(code):
    bias = torch.tensor([[[0.25, 0.5]], [[0.75, 1.0]]])
    spikes, _ = run(torch.zeros(9, 3, 2, 1, 2), TTFSParameters(t_max=5, bias=bias, bias_code=code))
    expected = (8 - 4 * bias).long()
    assert torch.equal(spikes.argmax(0), expected.expand(3, 2, 1, 2))


@pytest.mark.parametrize("t_max", [2, 3, 8])
def test_after_a_negative_bias_spike_the_membrane_climbs_and_until_then_it_rests(t_max):
    window = t_max - 1
    p = TTFSParameters(t_max=t_max, bias=torch.tensor([-1.0, -0.25, 0.0]), bias_code="spike")
    _, states = run(torch.zeros(4 * t_max, 1, 3), p)
    for index, bias in enumerate([-1, Fraction(-1, 4), 0]):
        arrives = window + round(-bias * window)
        currents = [state.i[0, index].item() for state in states]
        assert currents == [0.0] * arrives + [1.0] * (4 * t_max - arrives)


def snapshot(state):
    return [(value, value.clone(), value._version) for value in state]


@given(neurons(), seeds)
def test_the_step_is_pure(neuron, seed):
    torch.manual_seed(seed)
    rules, biases, synapses, samples, n_steps = neuron
    bias = None if biases is None else torch.tensor([float(b) for b in biases])
    p = parameters_of(rules, bias)
    state = initial_state(torch.zeros(len(samples), len(synapses)))
    for _ in range(n_steps):
        current = torch.randn(len(samples), len(synapses))
        before = snapshot([*state, current] + ([] if bias is None else [bias]))
        first, after = ttfs_step(current, state, p)
        again, after_again = ttfs_step(current, state, p)
        for value, copy, version in before:
            assert torch.equal(value, copy)
            assert value._version == version
        assert torch.equal(first, again)
        assert all(torch.equal(a, b) for a, b in zip(after, after_again, strict=True))
        state = after


def test_no_state_is_the_initial_state():
    p = TTFSParameters(t_max=3, bias=torch.tensor([0.5]))
    x = torch.tensor([[1.0], [0.25]])
    fresh, given = ttfs_step(x, None, p), ttfs_step(x, initial_state(x), p)
    assert torch.equal(fresh[0], given[0])
    assert isinstance(fresh[1], TTFSState)
    assert all(torch.equal(a, b) for a, b in zip(fresh[1], given[1], strict=True))
    assert [value.count_nonzero().item() for value in initial_state(x)] == [0, 0, 0, 0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_state_is_at_least_float32_and_spikes_are_like_the_input(dtype):
    spike, state = ttfs_step(torch.ones(2, 3, dtype=dtype), None, TTFSParameters(t_max=4))
    assert spike.dtype == dtype
    wanted = torch.float64 if dtype == torch.float64 else torch.float32
    assert {value.dtype for value in state[1:]} == {wanted}
    assert (state.step.dtype, state.step.dim(), int(state.step)) == (torch.int64, 0, 1)


def test_a_membrane_is_not_rounded_by_narrow_inputs():
    """257 / 256 does not exist in bfloat16, but is the sum of two currents that do."""
    p = TTFSParameters(t_max=9, rectifier=None)
    _, state = ttfs_step(torch.tensor([1.0], dtype=torch.bfloat16), None, p)
    _, state = ttfs_step(torch.tensor([2**-8], dtype=torch.bfloat16), state, p)
    assert state.i.item() == 1 + 2**-8


# --------------------------------------------------------------------------------------- threshold, gradients


def test_the_threshold_fires_on_equality():
    x = torch.tensor([-1.0, -1e-7, -0.0, 0.0, 1e-7, 1.0])
    assert threshold(x).tolist() == [0, 0, 1, 1, 1, 1]
    assert threshold(x.requires_grad_()).tolist() == [0, 0, 1, 1, 1, 1]


def arctan_slope(x):
    return 1 / (1 + (math.pi * x) ** 2)


def fast_sigmoid_slope(x):
    return 1 / (25 * x.abs() + 1) ** 2


surrogates = pytest.mark.parametrize(
    ("spike_grad", "slope"),
    [
        (None, arctan_slope),
        (arctan_surrogate, arctan_slope),
        (snntorch.surrogate.fast_sigmoid(slope=25), fast_sigmoid_slope),
        (torch.sigmoid, lambda x: torch.sigmoid(x) * (1 - torch.sigmoid(x))),
    ],
    ids=["default", "arctan", "fast_sigmoid", "sigmoid"],
)


@surrogates
def test_forward_is_the_step_and_backward_the_surrogates_slope(spike_grad, slope):
    x = torch.linspace(-3, 3, 61, dtype=torch.float64)
    x[30] = 0.0
    x.requires_grad_()
    crossed = threshold(x, spike_grad)
    crossed.sum().backward()
    assert torch.equal(crossed, (x >= 0).double())
    torch.testing.assert_close(x.grad, slope(x.detach()))


@surrogates
def test_gradients_of_a_spike_are_those_of_the_chain_rule(spike_grad, slope):
    """T = 2, a current x at step 0: v = x, then x + 1; theta = 3/2; at step 2 who has not fired fires.

    To fire earlier is to fire no more behind it; to have been able to fire before a spike is no slope of the spike.
    """
    x = torch.tensor([[-0.75, 0.25, 0.5, 0.75, 1.25, 1.5, 2.25]], dtype=torch.float64, requires_grad=True)
    p = TTFSParameters(t_max=2, spike_grad=spike_grad)
    zero = torch.zeros_like(x)
    spikes, _ = run([x, zero, zero], p)
    assert spikes[:, 0].argmax(0).tolist() == [2, 2, 1, 1, 1, 0, 0]

    at = x.detach()
    first, second = (at >= 1.5).double(), (at + 1 >= 1.5).double()
    early = slope(at - 1.5)
    late = slope(at - 0.5) * (1 - first) - second * early * first
    for spike, expected in zip(spikes, [early, late, -(early + late) * second], strict=True):
        (gradient,) = torch.autograd.grad(spike.sum(), x, retain_graph=True)
        torch.testing.assert_close(gradient, expected)


@given(neurons(), st.sampled_from([None, snntorch.surrogate.fast_sigmoid(), snntorch.surrogate.atan()]), seeds)
def test_autograd_changes_no_spike(neuron, spike_grad, seed):
    torch.manual_seed(seed)
    rules, biases, synapses, samples, n_steps = neuron
    bias = None if biases is None else torch.tensor([float(b) for b in biases])
    p = parameters_of(rules, bias)._replace(spike_grad=spike_grad)
    currents = torch.randint(-512, 513, (n_steps, len(samples), len(synapses))) / 256
    plain, _ = run(currents, p)
    tracked, states = run(currents.clone().requires_grad_(), p)
    assert tracked.requires_grad
    assert torch.equal(plain, tracked)
    assert torch.equal(states[-1].fired, plain.sum(0))


def test_gradients_reach_weights_and_biases_through_two_layers():
    first = torch.full((4, 3), 0.3, requires_grad=True)
    second = torch.full((2, 4), 0.2, requires_grad=True)
    bias = torch.full((4,), 0.1, requires_grad=True)
    state_1 = state_2 = None
    loss = torch.zeros(())
    for step in range(13):
        x = torch.full((1, 3), float(step == 1))
        hidden, state_1 = ttfs_step(x @ first.T, state_1, TTFSParameters(t_max=4, bias=bias))
        out, state_2 = ttfs_step(hidden @ second.T, state_2, TTFSParameters(t_max=4, layer=2, rectifier=None))
        loss = loss + step * out.sum()
    loss.backward()
    for parameter in (first, second, bias):
        assert parameter.grad.isfinite().all()
        assert (parameter.grad != 0).all()


# ------------------------------------------------------------------------------------------- closed form


@given(st.lists(st.integers(-(2**14), 2**14), min_size=1), st.integers(1, 63), st.booleans())
def test_the_closed_form_rounds_half_up_and_clips(drives, window, signed):
    lowest = -window if signed else 0
    x = torch.tensor(drives) / 256
    before = x.clone()
    expected = [min(window, max(lowest, math.floor(Fraction(d, 256) + HALF))) for d in drives]
    assert closed_form(x, window, lowest).tolist() == expected
    assert torch.equal(x, before)
    assert closed_form(x, window, lowest, inplace=True).tolist() == expected
    assert x.tolist() == expected


@given(st.lists(st.integers(-(2**14), 2**14), min_size=1), st.integers(1, 63), st.booleans(), st.booleans())
def test_gradients_pass_the_rounding_straight_and_stop_where_it_clips(drives, window, signed, inplace):
    """Values inside [0, 1] have one, also those that round to its ends: at T = 2 there are no others."""
    lowest = -window if signed else 0
    x = (torch.tensor(drives) / 256).requires_grad_()
    before = x.detach().clone()
    levels = closed_form(x, window, lowest, inplace=inplace)
    assert torch.equal(levels.detach(), closed_form(before.clone(), window, lowest))
    weights = torch.arange(1.0, len(drives) + 1)
    (levels * weights).sum().backward()
    inside = (before > lowest) & (before < window)
    beyond = (before < lowest - 0.5) | (before > window + 0.5)
    assert torch.equal(x.grad[inside], weights[inside])
    assert x.grad[beyond].count_nonzero() == 0
    assert x.grad.isfinite().all()
    assert torch.equal(x.detach(), before)


@st.composite
def held_layers(draw):
    """A layer of held neurons and levels of its sources, with windows alike or not."""
    window = draw(st.integers(1, 12))
    input_window = draw(st.one_of(st.just(window), st.integers(1, 12)))
    n_neurons, n_inputs, batch = draw(st.integers(1, 4)), draw(st.integers(1, 6)), draw(st.integers(1, 3))

    def grid(values, rows, columns):
        return st.lists(st.lists(values, min_size=columns, max_size=columns), min_size=rows, max_size=rows)

    weight = torch.tensor(draw(grid(st.integers(-512, 512), n_neurons, n_inputs))) / 256
    levels = torch.tensor(draw(grid(st.integers(0, input_window), batch, n_inputs)))
    bias = draw(st.none() | st.lists(st.integers(-512, 512), min_size=n_neurons, max_size=n_neurons))
    delay = draw(st.integers(0, 20))
    return window, input_window, weight, levels, None if bias is None else torch.tensor(bias) / 256, delay


@given(held_layers(), st.sampled_from(["spike", "silent", None]))
@example((1, 1, torch.tensor([[-0.5], [-1.5]]), torch.tensor([[1]]), None, 0), None)
def test_held_neurons_stepped_through_time_say_the_closed_form(layer, rectifier):
    window, input_window, weight, levels, bias, delay = layer
    readout = input_window + delay
    p = TTFSParameters(
        window + 1, hold=True, rectifier=rectifier, bias=bias, readout=readout, input_window=input_window
    ).check()
    currents = [(levels == readout - step).float() @ weight.T for step in range(p.last_step + 1)]
    spikes, states = run(currents, p)

    drive = levels.float() @ weight.T
    if bias is not None:
        drive = drive + input_window * bias
    expected = closed_form(drive, window, 0 if rectifier else -window)
    said = spikes.any(0)
    stepped = p.clock.rectify - spikes.argmax(0)
    stepped = torch.where(said, stepped, 0 if rectifier else -window)
    assert torch.equal(stepped.float(), expected)
    assert torch.equal(states[readout].v - 1, drive)
    if rectifier == "spike":
        assert said.all()
    if rectifier == "silent":
        assert torch.equal(said, expected > 0)
    if rectifier is None:
        # Silent outputs have the value -1, too.
        assert torch.equal(said, drive >= -window - 0.5)


@given(held_layers())
def test_without_hold_too_where_no_membrane_can_cross_before_readout(layer):
    window, input_window, weight, levels, _, delay = layer
    weight = -weight.abs()
    readout = input_window + delay
    p = TTFSParameters(window + 1, rectifier=None, readout=readout, input_window=input_window)
    currents = [(levels == readout - step).float() @ weight.T for step in range(p.last_step + 1)]
    spikes, _ = run(currents, p)
    free = torch.where(spikes.any(0), p.clock.rectify - spikes.argmax(0), -window)
    assert torch.equal(free.float(), closed_form(levels.float() @ weight.T, window, -window))


# ------------------------------------------------------------------------------------------------- refusals


def as_neuron(t_max, **options):
    return TTFSNeuron(t_max, **options)


def as_parameters(t_max, **options):
    return TTFSParameters(t_max, **options).check()


faces = pytest.mark.parametrize("make", [as_parameters, as_neuron])


@faces
@pytest.mark.parametrize("t_max", [1, 0, -4, 4.0, "4", None, True])
def test_t_max_below_two_is_refused(make, t_max):
    with pytest.raises(ValueError, match="t_max must be a whole number of at least 2"):
        make(t_max)


@faces
@pytest.mark.parametrize("layer", [0, -1, 1.0, "1", None, True])
def test_layers_below_one_are_refused(make, layer):
    with pytest.raises(ValueError, match="layer must be a whole number of at least 1"):
        make(4, layer=layer)


@faces
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("code", ["synapse", "spike"])
def test_a_bias_that_is_not_finite_is_refused(make, value, code):
    with pytest.raises(ValueError, match="bias contains NaN or infinity"):
        make(4, bias=torch.tensor([0.0, value]), bias_code=code)


@faces
@pytest.mark.parametrize("bias", [0.5, [0.5], True, "synapse"])
def test_a_bias_is_a_tensor(make, bias):
    with pytest.raises(TypeError, match="bias must be a Tensor or None"):
        make(4, bias=bias)


@faces
@pytest.mark.parametrize("options", [{"hold": True}, {"rectifier": "silent"}])
@pytest.mark.parametrize("bias", [None, torch.tensor([0.5])])
def test_a_bias_in_time_goes_with_the_papers_neuron_only(make, options, bias):
    with pytest.raises(ValueError, match=r'bias_code="spike" .* hold=False and rectifier="spike" only'):
        make(4, bias=bias, bias_code="spike", **options)


@faces
@pytest.mark.parametrize(
    "options", [{"rectifier": "none"}, {"rectifier": True}, {"bias_code": "time"}, {"bias_code": None}]
)
def test_unknown_kinds_are_refused_by_name(make, options):
    (name,) = options
    with pytest.raises(ValueError, match=f"{name} must be "):
        make(4, **options)


@faces
def test_a_bias_spike_before_the_clock_starts_names_the_readout_that_helps(make):
    bias = torch.tensor([0.0, 1.5])
    with pytest.raises(ValueError, match=r"at step -4,.*give readout=12 and delay the input by 4 steps"):
        make(9, bias=bias, bias_code="spike")
    assert make(9, bias=bias, bias_code="spike", readout=12).clock.bias_spike_steps(bias).tolist() == [12, 0]
    assert make(9, layer=2, bias=bias, bias_code="spike").clock.first_input == 8


@faces
def test_a_readout_before_the_input_window_is_over_is_refused(make):
    with pytest.raises(ValueError, match="readout 2 leaves no room for an input window of 3 steps"):
        make(4, readout=2)
    with pytest.raises(ValueError, match="readout 3 leaves no room for an input window of 7 steps"):
        make(4, input_window=7)


@faces
@pytest.mark.parametrize("options", [{"readout": 4.5}, {"input_window": 1.5}, {"input_window": -1}])
def test_steps_are_whole_numbers(make, options):
    """A neuron read out at step 4.5 is never read out."""
    with pytest.raises((TypeError, ValueError)):
        make(4, **options)
