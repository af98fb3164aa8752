"""Values <-> spike steps <-> spike trains, and the clock, against plain arithmetic with fractions."""

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import nn

import quartz_plugin
from quartz_plugin import TTFSActivation, TTFSNeuron, decode, encode
from quartz_plugin.coding import (
    NO_SPIKE,
    NeuronClock,
    Window,
    at_least_float32,
    round_half_up,
    to_levels,
    window_length,
)
from quartz_plugin.costs.rate import RateCodedNetwork
from quartz_plugin.functional import TTFSParameters

HALF = Fraction(1, 2)

t_maxes = st.integers(2, 70)
# k / 2^12 times S < 2^7 and the half behind it are exact in float32.
exact_values = st.lists(st.integers(0, 4096).map(lambda k: Fraction(k, 4096)), min_size=1, max_size=30)
any_values = st.lists(st.floats(0, 1, width=32), min_size=1, max_size=30)


def plain_step(x, t_max):
    """``ceil(S (1 - x) - 1/2)``."""
    return math.ceil((t_max - 1) * (1 - x) - HALF)


def tensor(fractions, dtype=torch.float32):
    return torch.tensor([float(x) for x in fractions], dtype=dtype)


# ------------------------------------------------------------------------------------------------ encode


@given(exact_values, t_maxes, st.sampled_from([torch.float32, torch.float64]))
def test_each_value_is_one_spike_at_the_step_of_the_formula(values, t_max, dtype):
    spikes = encode(tensor(values, dtype).unsqueeze(0), t_max)
    assert spikes.dtype == dtype
    assert spikes.shape == (t_max, 1, len(values))
    expected = torch.zeros(t_max, 1, len(values), dtype=dtype)
    for index, x in enumerate(values):
        expected[plain_step(x, t_max), 0, index] = 1
    assert torch.equal(spikes, expected)


@given(st.integers(0, 6), st.data())
def test_halves_between_two_levels_round_up(log_window, data):
    window = 2**log_window
    level = data.draw(st.integers(0, window - 1))
    x = (level + HALF) / window
    assert to_levels(tensor([x]), window + 1).tolist() == [level + 1]
    assert encode(tensor([x]), window + 1)[:, 0].argmax() == window - level - 1 == plain_step(x, window + 1)


def test_one_fires_at_once_and_zero_at_the_end_of_the_window():
    for t_max in (2, 3, 16, 64):
        steps = encode(torch.tensor([[1.0, 0.0]]), t_max).argmax(0)
        assert steps.tolist() == [[0, t_max - 1]]


@given(t_maxes)
def test_every_level_keeps_its_level(t_max):
    levels = torch.arange(t_max)
    assert to_levels(levels.float() / (t_max - 1), t_max).tolist() == levels.tolist()


@given(st.lists(st.integers(1, 3), min_size=1, max_size=4), t_maxes, st.integers(0, 9), st.integers(0, 10**6))
def test_time_is_the_first_axis_and_as_long_as_asked(shape, t_max, more, seed):
    torch.manual_seed(seed)
    x = torch.rand(shape)
    short, long = encode(x, t_max), encode(x, t_max, t_max + more)
    assert short.shape == (t_max, *shape)
    assert long.shape == (t_max + more, *shape)
    assert torch.equal(long[:t_max], short)
    assert long[t_max:].count_nonzero() == 0


@given(exact_values, t_maxes)
def test_silent_zeros_leave_out_exactly_the_spikes_that_say_zero(values, t_max):
    x = tensor(values)
    spikes, silent = encode(x, t_max), encode(x, t_max, silent_zeros=True)
    assert torch.equal(silent[:-1], spikes[:-1])
    assert silent[-1].count_nonzero() == 0
    assert torch.equal(silent.sum(0), torch.tensor([float(plain_step(v, t_max) < t_max - 1) for v in values]))
    assert torch.equal(decode(silent, t_max), decode(spikes, t_max))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_spikes_have_the_dtype_of_the_values_but_levels_are_not_rounded_by_it(dtype):
    x = torch.arange(257, dtype=torch.float32).div(256).to(dtype)
    spikes = encode(x, 201)
    assert spikes.dtype == dtype
    expected = [plain_step(Fraction(float(value)), 201) for value in x]
    assert spikes.argmax(0).tolist() == expected


def test_encode_leaves_its_input_alone_and_accepts_an_empty_batch():
    x = torch.rand(3, 4)
    before = x.clone()
    encode(x, 5, silent_zeros=True)
    assert torch.equal(x, before)
    assert encode(torch.empty(0, 4), 5).shape == (5, 0, 4)


@pytest.mark.parametrize("t_max", [1, 0, -3, 4.0, 2.5, "4", None, True])
@pytest.mark.parametrize(
    "use",
    [lambda t: encode(torch.rand(2), t), lambda t: decode(torch.ones(9, 2), t)],
    ids=["encode", "decode"],
)
def test_t_max_must_be_a_whole_number_of_at_least_two(use, t_max):
    with pytest.raises(ValueError, match="t_max must be a whole number of at least 2"):
        use(t_max)


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.tensor([0.5, 1.001]), r"must lie in \[0, 1\].* to 1.001"),
        (torch.tensor([0.5, math.inf]), r"must lie in \[0, 1\]"),
        (torch.tensor([0.5, -0.001]), r"must lie in \[0, 1\], got values from -0.001 to 0.5; map them by"),
        (torch.tensor([-0.07, 0.03]), r"; map them by .*preprocessing=\(-low.*, here \(0.7, 10\)$"),
        (torch.tensor([-3.0]), r"; map them by .*preprocessing=\(-low / \(high - low\), 1 / \(high - low\)\)$"),
        (torch.tensor([0.0, 4.97]), r"; divide them by the largest value they can have.*preprocessing=\(0, 1 / that\)"),
        (torch.tensor([0.0, 4095.0]), r"; divide them by the largest value they can have"),
        (torch.tensor([0.0, 254.0]), r"; divide raw bytes by 255"),
        (torch.randn(100), r"; it looks normalised: .*preprocessing=\(mean, std\) to convert; or map them by"),
        (torch.tensor([0.5, 1.00001]), r"must lie in \[0, 1\]"),
        (torch.tensor([0.5, -1e-5]), r"must lie in \[0, 1\]"),
        (torch.tensor([0.5, math.nan]), "NaN"),
        (torch.tensor([0, 1]), "floating point"),
        (torch.tensor([0, 255], dtype=torch.uint8), "divide raw bytes by 255"),
        (torch.tensor([True, False]), "floating point"),
    ],
)
def test_values_that_have_no_code_are_refused(x, message):
    with pytest.raises(ValueError, match=message):
        encode(x, 4)


def test_what_rounding_leaves_outside_is_clamped_at_all_doors():
    x = torch.tensor([[1.0000001, 0.5, -1e-7, 0.0], [1.0000009, 0.25, -9e-7, 1.0]])
    clean = x.clamp(0.0, 1.0)
    assert torch.equal(encode(x, 9), encode(clean, 9))
    ann = torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.ReLU(), torch.nn.Linear(5, 2))
    for options in ({}, {"first_layer": "dense"}, {"hold": False}):
        snn = quartz_plugin.convert(ann, [x], example_input=x[:1], **options)
        expected = quartz_plugin.convert(ann, clean, **options)
        assert snn.graph.scales == expected.graph.scales
        for engine in ("stepped", "event", "auto"):
            assert torch.equal(snn.run(x, engine=engine).logits, expected.run(clean, engine=engine).logits)
        assert torch.equal(snn.values_to_encode(x), expected.values_to_encode(clean))
        assert str(quartz_plugin.verify(ann, snn, x)) == str(quartz_plugin.verify(ann, snn, clean))
    assert torch.equal(quartz_plugin.prepare_qat(ann, x)(x), quartz_plugin.prepare_qat(ann, clean)(clean))
    plain = quartz_plugin.convert(ann, clean)
    assert torch.equal(RateCodedNetwork(plain)(x, 4), RateCodedNetwork(plain)(clean, 4))
    assert quartz_plugin.allocate_steps(ann, x, 60) == quartz_plugin.allocate_steps(ann, clean, 60)


@pytest.mark.parametrize(("low", "high"), [(-3.2, 2.9), (-0.07, 0.04), (0.0, 4.97)])
def test_mapped_as_the_message_says_the_network_computes_on_what_it_was_trained_on(low, high):
    ann = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
    raw = torch.rand(50, 4) * (high - low) + low
    preprocessing = (-low / (high - low), 1 / (high - low))
    mapped = ((raw - low) / (high - low)).clamp(0, 1)
    snn = quartz_plugin.convert(ann, mapped, 4000, percentile=100, preprocessing=preprocessing)
    wanted = ann(raw).detach()
    assert (snn(mapped) - wanted).abs().max() < 0.01 * wanted.abs().max()


def test_a_list_is_not_a_tensor():
    with pytest.raises(TypeError, match=r"torch\.Tensor, got list"):
        encode([0.5], 4)


@pytest.mark.parametrize("steps", [3, 1, 0, -1])
def test_too_few_steps_for_the_window_are_refused(steps):
    with pytest.raises(ValueError, match="steps must be at least t_max = 4"):
        encode(torch.rand(2), 4, steps)


# ------------------------------------------------------------------------------------------------ decode


@given(any_values, t_maxes, st.integers(0, 5))
def test_decode_of_encode_is_within_half_a_level(values, t_max, more):
    x = torch.tensor(values, dtype=torch.float32)
    back = decode(encode(x, t_max, t_max + more), t_max)
    assert back.dtype == torch.float32
    assert (back.double() - x.double()).abs().max() <= 0.5 / (t_max - 1) + 1e-6


@given(t_maxes, st.data())
def test_decode_says_the_level_of_the_first_spike(t_max, data):
    start = data.draw(st.integers(0, 100))
    steps = data.draw(st.lists(st.integers(0, 150), min_size=1, max_size=3))
    spikes = torch.zeros(151, 1)
    spikes[steps] = 1
    value = Fraction(start + t_max - 1 - min(steps), t_max - 1)
    assert decode(spikes, t_max, start).item() == pytest.approx(float(value), abs=1e-6)


def test_no_spike_decodes_to_zero_an_early_spike_to_more_than_one_a_late_one_to_less_than_zero():
    spikes = torch.zeros(13, 3)
    spikes[1, 1] = 1
    spikes[12, 2] = 1
    assert decode(spikes, t_max=5, start=4).tolist() == [0.0, 1.75, -1.0]


@pytest.mark.parametrize("silent", [-1.0, -1, torch.tensor(-1.0)])
def test_a_silent_output_decodes_to_what_it_is_given_and_does_not_beat_a_late_one(silent):
    spikes = torch.zeros(13, 1, 2)
    spikes[11, 0, 1] = 1
    values = decode(spikes, t_max=5, start=4, silent=silent)
    assert values.tolist() == [[-1.0, -0.75]]
    assert values.dtype == torch.float32
    assert decode(spikes.bool(), t_max=5, start=4, silent=silent).tolist() == [[-1.0, -0.75]]


@pytest.mark.parametrize("silent", [None, "0", True, [0.0], torch.zeros(2)])
def test_the_value_of_silence_is_one_number(silent):
    with pytest.raises(ValueError, match="silent must be a number, the value of units that did not fire, got"):
        decode(torch.zeros(5, 1), 5, silent=silent)


@pytest.mark.parametrize("hold", [True, False])
def test_decode_of_a_signed_output_decides_as_its_spike_times_do(hold):
    torch.manual_seed(0)
    t_max = 6
    fc = nn.Linear(20, 4, bias=False)
    nn.init.uniform_(fc.weight, -0.3, 0.1)  # most values are below 0, some below -1, which never fire
    output = TTFSNeuron(t_max, layer=1, rectifier=None, hold=hold, init_hidden=True)
    train = encode(torch.rand(200, 20), t_max, steps=3 * (t_max - 1) + 1)
    spikes = torch.stack([output(fc(step)) for step in train]).detach()
    fired = spikes.any(0)
    assert 0.1 < fired.float().mean() < 0.9
    first = torch.where(fired, spikes.argmax(0), len(spikes))
    some = first.min(1).values < len(spikes) - 1  # a spike in the last step encodes -1 as silence does
    values = decode(spikes, t_max, start=t_max - 1, silent=-1.0)
    assert torch.equal(values.argmax(1)[some], first.argmin(1)[some])
    assert values.min() == -1.0
    by_default = decode(spikes, t_max, start=t_max - 1)
    assert (by_default.argmax(1) != first.argmin(1))[some].float().mean() > 0.2


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.bfloat16, torch.float32, torch.float64])
def test_decode_takes_spikes_of_any_dtype_and_answers_in_at_least_float32(dtype):
    spikes = encode(torch.tensor([[0.0, 0.25, 1.0]]), 5).to(dtype)
    values = decode(spikes, 5)
    assert values.tolist() == [[0.0, 0.25, 1.0]]
    assert values.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


@pytest.mark.parametrize("spikes", [torch.tensor(1.0), torch.zeros(0, 3)])
def test_decode_wants_a_time_axis(spikes):
    with pytest.raises(ValueError, match="time axis"):
        decode(spikes, 4)


# ---------------------------------------------------------------------------------------------- rounding


@given(st.lists(st.integers(-(2**14), 2**14), min_size=1))
def test_round_half_up_is_the_floor_of_a_half_more(eighths):
    x = torch.tensor(eighths) / 8
    expected = [math.floor(Fraction(value, 8) + HALF) for value in eighths]
    assert round_half_up(x).tolist() == expected
    assert torch.equal(x, torch.tensor(eighths) / 8)
    assert round_half_up(x, inplace=True) is not None
    assert x.tolist() == expected


@given(st.lists(st.integers(-(2**14), 2**14), min_size=1))
def test_round_half_up_passes_gradients_straight_through_and_leaves_its_input_alone(eighths):
    x = (torch.tensor(eighths) / 8).requires_grad_()
    before = x.detach().clone()
    rounded = round_half_up(x, inplace=True)
    weights = torch.arange(1.0, len(eighths) + 1)
    (rounded * weights).sum().backward()
    assert rounded.tolist() == [math.floor(Fraction(value, 8) + HALF) for value in eighths]
    assert torch.equal(x.grad, weights)
    assert torch.equal(x.detach(), before)


def test_a_membrane_is_never_narrower_than_float32():
    narrow = [torch.float16, torch.bfloat16, torch.uint8, torch.int64, torch.bool, torch.float32]
    assert {at_least_float32(dtype) for dtype in narrow} == {torch.float32}
    assert at_least_float32(torch.float64) == torch.float64


# ------------------------------------------------------------------------------------------------- clock


@given(t_maxes, st.integers(1, 40))
def test_layer_l_is_read_out_at_l_windows_and_rectified_one_later(t_max, layer):
    s = t_max - 1
    clock = NeuronClock.of_layer(t_max, layer)
    assert (clock.first_input, clock.readout, clock.rectify) == ((layer - 1) * s, layer * s, (layer + 1) * s)
    assert clock.output_window == Window(start=layer * s, length=s)
    assert clock.output_window.end == NeuronClock.of_layer(t_max, layer + 1).readout
    assert clock.threshold == t_max - 0.5
    assert clock.last_step(signed=False) == (layer + 1) * s
    assert clock.last_step(signed=True) == (layer + 2) * s


@given(st.integers(0, 200), st.integers(1, 60), st.integers(1, 60))
def test_a_layer_may_have_another_window_than_its_sources(extra, window, input_window):
    clock = NeuronClock(readout=input_window + extra, window=window, input_window=input_window)
    assert clock.first_input == extra
    assert clock.rectify == clock.output_window.end == input_window + extra + window
    assert clock.threshold == window + 0.5
    assert clock.last_step(signed=False) == clock.rectify
    assert clock.last_step(signed=True) == clock.readout + 2 * window


@given(
    st.lists(st.integers(-512, 512).map(lambda k: Fraction(k, 256)), min_size=1),
    st.integers(1, 60),
    st.integers(1, 60),
    st.integers(0, 200),
)
@example(biases=[Fraction(1, 2), -HALF, 3 * HALF, -3 * HALF], window=2, input_window=1, extra=0)
@example(biases=[Fraction(1, 2), -HALF, 3 * HALF, -3 * HALF], window=2, input_window=3, extra=0)
@example(biases=[Fraction(2), Fraction(-2)], window=5, input_window=5, extra=7)
def test_bias_spikes_come_at_the_formulas_step_half_to_even_and_clamped(biases, window, input_window, extra):
    clock = NeuronClock(readout=input_window + extra, window=window, input_window=input_window)
    clamped = [max(-3 * HALF, min(3 * HALF, b)) for b in biases]
    # Python's round of a Fraction is half to even.
    local = [round(input_window * (2 - b)) - input_window for b in clamped]
    assert clock.bias_spike_steps(tensor(biases)).tolist() == [extra + step for step in local]


def test_bias_spikes_of_one_zero_and_minus_one_frame_the_windows():
    clock = NeuronClock.of_layer(t_max=9, layer=3)
    steps = clock.bias_spike_steps(torch.tensor([1.0, 0.0, -1.0]))
    assert steps.tolist() == [clock.first_input, clock.readout, clock.rectify]


@pytest.mark.parametrize("layer", [0, -1, 1.0, True, None, "1"])
def test_a_layer_is_a_whole_number_from_one(layer):
    with pytest.raises(ValueError, match="layer must be a whole number of at least 1"):
        NeuronClock.of_layer(4, layer)


# ------------------------------------------------------------------------------------------------ window


@given(st.integers(0, 100), st.integers(1, 60), st.lists(st.integers(-60, 120), min_size=1), st.integers(0, 50))
def test_levels_count_down_to_zero_at_the_end_of_a_window(start, length, levels, delay):
    window = Window(start, length)
    assert window.level_at(start) == length
    assert window.level_at(window.end) == 0
    assert [window.level_at(window.step_of(level)) for level in levels] == levels
    steps = window.steps_of(torch.tensor(levels))
    assert steps.dtype == torch.int32
    assert steps.tolist() == [window.step_of(level) for level in levels]
    later = window.delayed(delay)
    assert (later.start, later.length) == (start + delay, length)
    assert later.steps_of(torch.tensor(levels)).tolist() == [step + delay for step in steps.tolist()]


@given(st.integers(0, 100), st.integers(1, 60), st.integers(-60, 0))
def test_levels_of_steps_give_silence_its_own_level(start, length, silent):
    window = Window(start, length)
    steps = torch.tensor([NO_SPIKE, start, window.end, NO_SPIKE], dtype=torch.int32)
    levels = window.levels_at(steps, silent)
    assert levels.dtype == torch.int32
    assert levels.tolist() == [silent, length, 0, silent]
    assert window.levels_at(steps).tolist() == [0, length, 0, 0]


class TestLongWindows:
    @pytest.mark.parametrize("t_max", [2**24, 2**29, 2**62])
    @pytest.mark.parametrize(
        "takes",
        [
            lambda t_max: window_length(t_max),
            lambda t_max: encode(torch.rand(1, 2), t_max),
            lambda t_max: decode(torch.zeros(4, 1, 2), t_max),
            lambda t_max: to_levels(torch.rand(2), t_max),
            lambda t_max: quartz_plugin.TTFSNeuron(t_max),
            lambda t_max: quartz_plugin.TTFSNeuron(4, input_window=t_max, readout=t_max),
            lambda t_max: TTFSParameters(t_max).check(),
            lambda t_max: TTFSActivation(t_max),
            lambda t_max: quartz_plugin.convert(nn.Linear(2, 2), torch.rand(4, 2), t_max),
            lambda t_max: quartz_plugin.convert(nn.Linear(2, 2), torch.rand(4, 2), {"input": t_max, "output": 4}),
            lambda t_max: quartz_plugin.convert(nn.Linear(2, 2), torch.rand(4, 2), layers={"input": {"t_max": t_max}}),
            lambda t_max: quartz_plugin.prepare_qat(nn.Sequential(nn.Linear(2, 2), nn.ReLU()), torch.rand(4, 2), t_max),
        ],
    )
    def test_that_float32_cannot_tell_apart_are_refused(self, takes, t_max):
        with pytest.raises(ValueError, match=r"t_max must be below 2\*\*24 = 16777216.*float32"):
            takes(t_max)

    def test_up_to_the_limit_are_taken(self):
        assert window_length(2**24 - 1) == 2**24 - 2

    def test_steps_that_int32_cannot_hold_are_refused(self):
        with pytest.raises(ValueError, match=r"last step would be .*int32"):
            quartz_plugin.TTFSNeuron(2**23, layer=256)

    def test_steps_beyond_what_float32_holds_are_exact(self):
        window = Window(start=2**24 + 1, length=2**23 - 1)
        levels = torch.tensor([0.0, 1.0, 2.0, 3.0, 2**23 - 1])
        steps = window.steps_of(levels)
        assert steps.tolist() == [window.end - int(level) for level in levels]
        assert torch.equal(window.levels_at(steps, dtype=torch.float32), levels)

    def test_levels_of_whole_numbers_are_left_as_they_are(self):
        levels = torch.tensor([1, 2], dtype=torch.int32)
        assert Window(0, 4).steps_of(levels).tolist() == [3, 2]
        assert levels.tolist() == [1, 2]
