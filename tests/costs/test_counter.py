"""Counts of a running network, judged by one spike and one tap of a kernel at a time."""

import copy
import itertools
import sys

import pytest
import snntorch
import torch
from helpers.mnist import paper_network
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import quartz_plugin
from quartz_plugin.costs import HOROWITZ_FLOAT32, LOIHI, paper_profile
from quartz_plugin.costs.counts import synaptic_operations
from quartz_plugin.costs.profiler import COUNTED, OperationCounts, count_operations


@pytest.fixture(scope="module")
def norse():
    """Norse, where it is installed."""
    return pytest.importorskip("norse.torch")


class Calls(nn.Module):
    """A module that calls a function of torch."""

    def __init__(self, function, *parameters):
        super().__init__()
        self.function, self.weights = function, nn.ParameterList(parameters)

    def forward(self, *inputs):
        return self.function(*inputs, *self.weights)


def spike_train(*shape, rate=0.4):
    return (torch.rand(shape) < rate).float()


def nonzero(values):
    return int((values != 0).sum())


def counted(net, *inputs):
    """All counts of one call."""
    with torch.no_grad(), count_operations(net) as counts:
        net(*inputs)
    return {name: getattr(counts, name) for name in COUNTED}


CONVOLUTIONS = {
    (1, False): F.conv1d,
    (2, False): F.conv2d,
    (3, False): F.conv3d,
    (1, True): F.conv_transpose1d,
    (2, True): F.conv_transpose2d,
    (3, True): F.conv_transpose3d,
}


def taps_one_by_one(inputs, weight, result, stride, padding, dilation, groups, transposed):
    """Delivered inputs: for each channel of the result, each input channel of its group and each tap, where it lands.

    `inputs` is the batch, true where an input counts.
    """
    _, channels, *sizes = inputs.shape
    sizes_after = result.shape[2:]
    outputs = result.shape[1]
    count = 0
    for source, target in itertools.product(range(channels), range(outputs)):
        if source // (channels // groups) != target // (outputs // groups):
            continue
        # The side that is walked with a stride, and the other, on which the taps lie.
        walked, fixed = (sizes, sizes_after) if transposed else (sizes_after, sizes)
        for place in itertools.product(*map(range, walked)):
            for tap in itertools.product(*map(range, weight.shape[2:])):
                met = [p * s - b + t * d for p, s, b, t, d in zip(place, stride, padding, tap, dilation, strict=True)]
                if all(0 <= position < size for position, size in zip(met, fixed, strict=True)):
                    count += int(inputs[:, source][:, *(place if transposed else met)].sum())
    return count


@st.composite
def convolutions(draw):
    """A function, its input and its arguments."""
    rank, transposed = draw(st.integers(1, 3)), draw(st.booleans())

    def each(low, high):
        return tuple(draw(st.integers(low, high)) for _ in range(rank))

    kernel, stride, dilation = each(1, 3), each(1, 3), each(1, 2)
    padding, sizes, groups = each(0, 2), each(1, 5 if rank < 3 else 4), draw(st.integers(1, 3))
    inside, outside = groups * draw(st.integers(1, 2)), draw(st.integers(1, 2))
    arguments = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    if transposed:
        weight = torch.randn(inside, outside, *kernel)
        extra = [draw(st.integers(0, max(s, d) - 1)) for s, d in zip(stride, dilation, strict=True)]
        arguments["output_padding"] = tuple(extra)
        sizes_after = [
            (n - 1) * s - 2 * p + d * (k - 1) + e + 1
            for n, s, p, d, k, e in zip(sizes, stride, padding, dilation, kernel, extra, strict=True)
        ]
        assume(min(sizes_after) > 0)
    else:
        weight = torch.randn(groups * outside, inside // groups, *kernel)
        room = zip(sizes, padding, dilation, kernel, strict=True)
        assume(all(n + 2 * p >= d * (k - 1) + 1 for n, p, d, k in room))
    torch.manual_seed(draw(st.integers(0, 10**6)))
    pixels = torch.rand(draw(st.integers(1, 2)), inside, *sizes)
    inputs = torch.where(pixels < 0.4, 0.0, torch.where(pixels < 0.7, 1.0, pixels))
    return CONVOLUTIONS[rank, transposed], inputs, weight, arguments, transposed


CONVOLUTION = ("stride", "padding", "dilation", "groups")
TRANSPOSED = ("stride", "padding", "output_padding", "groups", "dilation")


@given(convolutions(), st.booleans())
def test_convolutions_deliver_what_lands_tap_by_tap(convolution, batched):
    function, inputs, weight, arguments, transposed = convolution
    inputs = inputs if batched else inputs[:1]
    result = function(inputs, weight, **arguments)
    along = {name: value for name, value in arguments.items() if name != "output_padding"}

    def judged(counting):
        return {"Calls": taps_one_by_one(counting, weight, result, **along, transposed=transposed)}

    expected = {
        "spikes": {},
        "neuron_updates": {},
        "synops": judged(inputs != 0),
        "graded_synops": judged((inputs != 0) & (inputs != 1)),
        "macs": judged(inputs == inputs),
        "outputs": {"Calls": (result if batched else result[0]).numel()},
    }
    in_order = [arguments[name] for name in (TRANSPOSED if transposed else CONVOLUTION)]
    for call in (lambda x, w: function(x, w, **arguments), lambda x, w: function(x, w, None, *in_order)):
        assert counted(Calls(call, nn.Parameter(weight)), inputs if batched else inputs[0]) == expected


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@given(st.data())
def test_paddings_by_name_are_those_of_torch(data):
    """With a kernel of ones, the sum of the outputs is the number of taps that met an input of 1."""
    rank, padding = data.draw(st.integers(1, 3)), data.draw(st.sampled_from(["same", "valid"]))
    kernel, dilation = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 2))
    function, inputs = CONVOLUTIONS[rank, False], spike_train(2, 2, *[7] * rank)
    ones = nn.Parameter(torch.ones(3, 2, *[kernel] * rank))
    net = Calls(lambda x, w: function(x, w, padding=padding, dilation=[dilation]), ones)
    counts = counted(net, inputs)
    with torch.no_grad():
        assert counts["synops"]["Calls"] == round(float(net(inputs).double().sum()))
        assert counts["macs"]["Calls"] == round(float(net(torch.ones_like(inputs)).double().sum()))


@pytest.mark.parametrize(
    ("module", "shape", "fan_out"),
    [
        (nn.Linear(6, 5), (6,), 5),
        (nn.Linear(6, 5), (2, 3, 6), 5),
        (Calls(lambda x, w: x @ w, nn.Parameter(torch.rand(6, 4))), (3, 6), 4),
        (Calls(lambda x, w: x.matmul(w.t()), nn.Parameter(torch.rand(4, 6))), (2, 3, 6), 4),
        (Calls(lambda x, w: torch.matmul(input=x, other=w), nn.Parameter(torch.rand(6, 4))), (6,), 4),
        (Calls(lambda x, w: torch.mm(x, w), nn.Parameter(torch.rand(6, 4))), (3, 6), 4),
        (Calls(lambda x, w: x.mm(mat2=w), nn.Parameter(torch.rand(6, 4))), (3, 6), 4),
        (Calls(lambda x, w, b: torch.addmm(b, x, w), *map(nn.Parameter, torch.rand(2, 6, 6))), (6, 6), 6),
        (Calls(lambda x, w: w @ x, nn.Parameter(torch.rand(4, 6))), (6, 3), 4),
        (Calls(lambda x, w: w.view(4, 6) @ x, nn.Parameter(torch.rand(24))), (2, 6, 3), 4),
        (Calls(lambda x, w: F.linear(weight=w, input=x), nn.Parameter(torch.rand(5, 6))), (3, 6), 5),
        (Calls(lambda x, w: torch.sparse.mm(x.to_sparse(), w), nn.Parameter(torch.rand(6, 4))), (3, 6), 4),
    ],
)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_products_with_a_matrix_deliver_each_input_to_every_output(module, shape, fan_out, mode):
    spikes = spike_train(*shape)
    with mode(), count_operations(nn.Sequential(module)) as counts:
        module(spikes)
    assert counts.synops == {"0": nonzero(spikes) * fan_out}
    assert counts.macs == {"0": spikes.numel() * fan_out}
    assert counts.graded_synops == {"0": 0}


def test_products_without_weights_are_not_counted():
    module = Calls(lambda q, k: q @ k.transpose(1, 2))
    assert counted(module, torch.rand(2, 3, 4), torch.rand(2, 3, 4))["macs"] == {}


def test_of_two_parameters_the_right_one_holds_the_weights():
    prompt, weights = nn.Parameter(torch.tensor([[1.0, 0.0], [0.0, 0.0], [1.0, 1.0]])), nn.Parameter(torch.rand(2, 5))
    assert counted(Calls(lambda a, b: a @ b, prompt, weights))["synops"] == {"Calls": 3 * 5}


@pytest.mark.parametrize(
    ("cell", "gates"), [(nn.LSTMCell, 4), (nn.GRUCell, 3), (nn.RNNCell, 1), (lambda *n: nn.RNNCell(*n, bias=False), 1)]
)
def test_cells_of_torch_multiply_input_and_hidden_state(cell, gates):
    module, x, h = cell(4, 3), spike_train(2, 4), spike_train(2, 3)
    state = (h, torch.zeros(2, 3)) if gates == 4 else h
    counts = counted(nn.Sequential(module)[0], x, state)
    assert list(counts["synops"].values()) == [(nonzero(x) + nonzero(h)) * gates * 3]
    assert list(counts["macs"].values()) == [2 * (4 + 3) * gates * 3]


class Loop(nn.Module):
    """A snnTorch network as its tutorials write them."""

    def __init__(self, init_hidden=False):
        super().__init__()
        self.init_hidden = init_hidden
        self.conv, self.fc = nn.Conv2d(1, 3, 3, stride=2, padding=1), nn.Linear(48, 5)
        self.lif1, self.lif2 = (snntorch.Leaky(beta=0.8, threshold=0.2, init_hidden=init_hidden) for _ in range(2))

    def forward(self, x):
        mem1 = mem2 = torch.zeros(1)
        if self.init_hidden:
            self.lif1.reset_mem()
            self.lif2.reset_mem()
        first, last = [], []
        for step in x:
            if self.init_hidden:
                first.append(self.lif1(self.conv(step)))
                last.append(self.lif2(self.fc(first[-1].flatten(1))))
            else:
                spikes, mem1 = self.lif1(self.conv(step), mem1)
                first.append(spikes)
                spikes, mem2 = self.lif2(self.fc(spikes.flatten(1)), mem2)
                last.append(spikes)
        return torch.stack(first), torch.stack(last)


@pytest.mark.parametrize("init_hidden", [False, True])
def test_a_snntorch_loop_is_counted_over_all_steps(init_hidden):
    net, steps = Loop(init_hidden), spike_train(6, 2, 1, 8, 8)
    with count_operations(net) as counts:
        first, last = net(steps)
    assert counts.spikes == {"lif1": nonzero(first), "lif2": nonzero(last)}
    assert min(counts.spikes.values()) > 0
    border = F.conv2d(steps.flatten(0, 1), torch.ones(3, 1, 3, 3), stride=2, padding=1)
    assert counts.synops == {"conv": int(border.sum()), "fc": 5 * nonzero(first)}
    assert counts.macs["fc"] == 6 * 2 * 48 * 5
    assert counts.total("graded_synops") == 0


def test_recurrent_weights_of_snntorch_carry_the_spikes_of_the_step_before():
    net = snntorch.RLeaky(beta=0.9, threshold=0.3, linear_features=4, init_hidden=True)
    steps, spikes = spike_train(7, 3, 4), []
    with count_operations(nn.ModuleDict({"lif": net})) as counts:
        spikes = torch.stack([net(step) for step in steps])
    assert counts.spikes == {"lif": nonzero(spikes)}
    assert counts.synops == {"lif.recurrent": 4 * nonzero(spikes[:-1])}
    assert nonzero(spikes[:-1]) > 0


def test_a_membrane_computed_as_a_convolution_is_no_synapse():
    net = snntorch.LinearLeaky(0.5, 4, 3)
    with count_operations(net) as counts:
        spikes, _ = net(10 * spike_train(5, 2, 4))
    assert counts.spikes == {"LinearLeaky": nonzero(spikes)}
    assert counts.macs == {"linear": 5 * 2 * 4 * 3}


def test_modules_of_snntorch_that_return_a_membrane_emit_no_spikes():
    for module in (snntorch.StateLeaky(0.5, 4, output=False), snntorch.AssociativeLeaky(4, 2, 2, 4)):
        assert counted(module, torch.rand(5, 2, 4))["spikes"] == {}


def test_norse_is_counted_by_step_and_by_sequence(norse):
    conv, fc = nn.Conv2d(1, 3, 3, padding=1), nn.Linear(48, 4)
    p = norse.LIFParameters(v_th=torch.as_tensor(0.1))
    stepped = norse.SequentialState(conv, norse.LIFCell(p), nn.Flatten(), fc, norse.LICell())
    whole = norse.SequentialState(norse.Lift(conv), norse.LIF(p), nn.Flatten(2), norse.Lift(fc), norse.LI())
    steps, state = spike_train(6, 2, 1, 4, 4), None
    spikes = []
    stepped[1].register_forward_hook(lambda module, inputs, out: spikes.append(out[0]))
    with torch.no_grad(), count_operations(stepped) as by_step:
        for step in steps:
            _, state = stepped(step, state)
    with torch.no_grad(), count_operations(whole) as by_sequence:
        whole(steps)
    emitted = nonzero(torch.stack(spikes))
    delivered = int(F.conv2d(steps.flatten(0, 1), torch.ones(3, 1, 3, 3), padding=1).sum())
    assert emitted > 0
    assert by_step.spikes == by_sequence.spikes == {"1": emitted}
    assert by_step.synops == {"0": delivered, "3": 4 * emitted}
    assert by_sequence.synops == {"0.lifted_module": delivered, "3.lifted_module": 4 * emitted}


@pytest.mark.parametrize("sparse", [False, True])
def test_recurrent_cells_of_norse_count_input_and_recurrent_weights(norse, sparse):
    net, state, spikes = norse.SequentialState(norse.LIFRecurrentCell(6, 5)), None, []
    steps = spike_train(20, 2, 6)
    with torch.no_grad(), count_operations(net) as counts:
        for step in steps:
            out, state = net(10 * step.to_sparse() if sparse else 10 * step, state)
            spikes.append(out.to_dense() if sparse else out)
    assert counts.spikes == {"0": nonzero(torch.stack(spikes))}
    assert counts.synops == {"0": 5 * nonzero(steps) + 5 * nonzero(torch.stack(spikes[:-1]))}
    assert counts.graded_synops == {"0": 5 * nonzero(steps)}
    assert counts.macs == {"0": 20 * 2 * (6 + 5) * 5}
    assert nonzero(torch.stack(spikes)) > 0


def test_neurons_outside_the_families_of_a_library_are_known_too(norse):
    x = 10 * torch.ones(1, 4)
    assert counted(norse.LIBoxCell(), x)["spikes"] == {}
    for cell, weights in (
        (norse.CobaLIFCell(4, 3), ()),
        (norse.LIFCorrelation(4, 3), (torch.rand(3, 4), torch.rand(3, 3), None)),
    ):
        spikes = nonzero(cell(x, *weights)[0])
        assert counted(cell, x, *weights)["spikes"] == {type(cell).__name__: spikes}
    parallel = snntorch.LeakyParallel(4, 3, beta=0.9, threshold=-1.0)
    with pytest.warns(UserWarning, match="rnn_relu in 'rnn' act unseen"):
        assert counted(parallel, x.expand(5, -1, -1))["spikes"] == {"LeakyParallel": 5 * 3}


def test_neurons_of_this_package_count_in_both_libraries(norse):
    import quartz_plugin.norse as faces

    steps = quartz_plugin.encode(torch.rand(3, 4), 6, 11)
    cell, layer = faces.TTFSCell(faces.TTFSParameters(6)), faces.TTFS(faces.TTFSParameters(6))
    state, total = None, 0
    with count_operations(nn.ModuleList([cell, layer])) as counts:
        layer(steps)
        for step in steps:
            spikes, state = cell(step, state)
            total += nonzero(spikes)
    assert counts.spikes == {"1": total, "0": total}
    assert total == 12


def test_without_norse_nothing_of_it_is_looked_for(monkeypatch):
    monkeypatch.delitem(sys.modules, "norse.torch", raising=False)
    assert counted(snntorch.Leaky(beta=0.5, init_hidden=True), 2 * torch.ones(1, 3))["spikes"] == {"Leaky": 3}


class Threshold(nn.Module):
    """Neurons of the user's own."""

    def forward(self, x):
        return {"time": 3, "spikes": [(x > 0.5).float(), x]}


class Wrapped(nn.Module):
    """Neurons within neurons."""

    def __init__(self):
        super().__init__()
        self.inner, self.leaky = Threshold(), snntorch.Leaky(beta=0.5, init_hidden=True)

    def forward(self, x):
        return self.leaky(2 * self.inner(x)["spikes"][0])


def test_neurons_of_the_users_own_count_and_of_nested_ones_the_outermost():
    x = torch.rand(4, 5)
    spikes = nonzero(x > 0.5)
    for neurons, expected in (
        (None, {"leaky": spikes}),
        (Threshold, {"inner": spikes, "leaky": spikes}),
        ((Threshold, Wrapped), {"Wrapped": spikes}),
    ):
        net = Wrapped()
        with count_operations(net, neurons) as counts:
            net(x)
        assert counts.spikes == expected


def test_macs_and_nonzero_macs_of_the_papers_network():
    net, image = paper_network().eval(), torch.rand(1, 1, 28, 28)
    with torch.no_grad(), count_operations(net) as counts:
        net(image.expand(3, -1, -1, -1))
    assert counts.macs == {"0": 3 * 86_400, "3": 3 * 115_200, "6": 3 * 23_040, "10": 3 * 1_200}
    assert counts.total("macs") == 3 * 225_840
    assert counts.per_inference(3)["macs"] == 225_840
    # A second time, with weights of 1 and each activation that is not 0 replaced by 1.
    activation, expected = image, {}
    for index, module in enumerate(net):
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            ones = copy.deepcopy(module).double().requires_grad_(False)
            nn.init.ones_(ones.weight)
            nn.init.zeros_(ones.bias)
            expected[str(index)] = 3 * round(float(ones((activation != 0).double()).sum()))
        activation = module(activation)
    assert counts.synops == expected
    assert counts.total("synops") < counts.total("macs")


@pytest.mark.parametrize("rectifier", ["spike", "silent"])
def test_a_converted_network_stepped_by_hand_costs_what_its_simulation_says(rectifier):
    ann = nn.Sequential(
        *(nn.Conv2d(1, 4, 3, stride=2, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(4, 6, 3, padding=1, groups=2), nn.ReLU(), nn.Flatten(), nn.Linear(54, 5)),
    )
    images = torch.rand(20, 1, 12, 12)
    snn = quartz_plugin.convert(ann, images, 6, rectifier=rectifier)
    result = snn.run(images)
    net = snn.to_snntorch()
    with torch.no_grad(), count_operations(net) as counts:
        for step in quartz_plugin.encode(images, snn.t_max, snn.n_steps, silent_zeros=rectifier == "silent"):
            net(step)
    operations = [int(each.sum()) for each in synaptic_operations(snn.graph, result).values()]
    assert list(counts.synops.values()) == operations
    assert list(counts.synops) == ["0", "3", "6"]
    assert counts.spikes == {name: nonzero(result.spike_steps[name] >= 0) for name in ("1", "4", "output")}


def test_outputs_gradients_and_random_numbers_stay_as_they_are():
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(), nn.Flatten(), nn.Linear(144, 3))
    twin, images = copy.deepcopy(net), torch.rand(2, 1, 8, 8)

    def trained(module):
        torch.manual_seed(1)
        logits = module(images)
        logits.square().sum().backward()
        return [logits, torch.get_rng_state(), *(p.grad for p in module.parameters()), *module.buffers()]

    plain = trained(twin)
    with count_operations(net) as counts:
        watched = trained(net)
    assert all(torch.equal(a, b) for a, b in zip(plain, watched, strict=True))
    assert watched[0].requires_grad
    assert counts.macs == {"0": 2 * 36 * 36, "5": 2 * 432}


def hooks(net):
    return [
        {name: dict(value) for name, value in vars(module).items() if name.endswith(("hooks", "kwargs", "called"))}
        for module in net.modules()
    ]


def test_hooks_are_gone_afterwards_and_those_there_before_stay():
    net = nn.Sequential(nn.Linear(2, 3), nn.Sequential(snntorch.Leaky(beta=0.5, init_hidden=True)))
    net[0].register_forward_hook(lambda module, inputs, out: out + 1)
    before, function = hooks(net), F.linear
    with count_operations(net):
        assert hooks(net) != before
    assert hooks(net) == before
    with pytest.raises(KeyError), count_operations(net):
        raise KeyError
    assert hooks(net) == before
    assert F.linear is function
    assert torch.overrides._get_current_function_mode() is None


def test_a_forward_pass_that_fails_leaves_the_counts_in_order():
    class Fails(nn.Module):
        def forward(self, x):
            raise RuntimeError

    net = nn.Sequential(nn.Linear(2, 3), snntorch.Leaky(beta=0.5, init_hidden=True), Fails())
    with count_operations(net) as counts:
        for _ in range(2):
            with pytest.raises(RuntimeError):
                net(torch.ones(1, 2))
        F.linear(torch.ones(1, 2), torch.ones(3, 2))
    assert counts.macs == {"0": 12}
    assert set(counts.spikes) == {"1"}


def test_only_what_modules_of_the_network_do_is_counted():
    net, other = nn.Linear(2, 3), nn.Linear(2, 3)
    x = torch.ones(1, 2)
    with count_operations(net) as counts:
        F.linear(x, net.weight)
        other(x)
        copy.deepcopy(net)(x)
        assert counts.macs == {}
        net(x)
        assert counts.macs == {"Linear": 6}
    net(x)
    assert counts.macs == {"Linear": 6}


def test_a_shared_module_counts_under_its_first_name_and_an_operation_under_the_innermost():
    class Shares(nn.Module):
        def __init__(self):
            super().__init__()
            self.b = nn.Linear(4, 4)
            self.a = nn.Sequential(self.b, nn.ReLU())

        def forward(self, x):
            return F.linear(self.a(self.b(x)), self.b.weight)

    assert counted(Shares(), torch.rand(2, 4))["macs"] == {"b": 2 * 2 * 16, "Shares": 2 * 16}


def test_counting_inside_counting():
    net = nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.Sequential(nn.Flatten(), nn.Linear(32, 3)))
    x = torch.rand(1, 1, 4, 4)
    with count_operations(net) as outer:
        net(x)
        with count_operations(net[1]) as inner, count_operations(net) as same:
            net(x)
        net(x)
    once = {"0": 2 * (2 + 3 + 3 + 2) ** 2, "1.1": 96}
    assert same.macs == once
    assert inner.macs == {"1": 96}
    assert outer.macs == {path: 3 * count for path, count in once.items()}


def test_a_count_goes_on_in_and_after_inference_mode():
    net = nn.Sequential(nn.Conv1d(2, 3, 3, padding=1), snntorch.Leaky(beta=0.0))
    x = spike_train(2, 2, 6)
    with count_operations(net) as counts:
        for mode in (torch.inference_mode, torch.no_grad, torch.enable_grad, torch.inference_mode):
            with mode():
                net(x)
    once = counted(net, x)
    assert counts.synops == {"0": 4 * once["synops"]["0"]}
    assert counts.spikes == {"1": 4 * once["spikes"]["1"]}
    assert counts.total("synops") > 0


def test_counting_reads_no_value_from_the_device():
    """On meta, where there are no values to read."""
    net = nn.Sequential(nn.Conv2d(1, 2, 3), snntorch.Leaky(beta=0.5), nn.Linear(2, 3)).to("meta")
    with count_operations(net[:1]) as counts:
        net[0](torch.empty(5, 1, 6, 6, device="meta"))
    with count_operations(nn.ModuleList([Threshold(), net[2]]), Threshold) as others:
        Threshold()(torch.empty(3, device="meta"))
        net[2](torch.empty(4, 2, device="meta"))
    assert counts.macs == {"0": 5 * 2 * 16 * 9}
    assert others.macs == {"1": 24}
    with pytest.raises(RuntimeError, match="meta"):
        print(counts.synops)


def test_half_precision_counts_exactly():
    """A float16 sum would stop at 65504."""
    net, x = nn.Linear(600, 7).to(torch.bfloat16), torch.ones(300, 600, dtype=torch.bfloat16)
    assert counted(net, x)["synops"] == {"Linear": 300 * 600 * 7}
    with torch.autocast("cpu", torch.bfloat16):
        assert counted(nn.Linear(600, 7), x.float())["synops"] == {"Linear": 300 * 600 * 7}


@pytest.mark.parametrize("backward", [lambda loss: loss.backward(), lambda loss: torch.autograd.backward([loss])])
def test_what_checkpointing_runs_again_counts_once(backward):
    net, x = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 2)), torch.rand(4, 3)
    with count_operations(net, nn.ReLU) as counts:
        backward(checkpoint(net, x, use_reentrant=False).sum())
    assert counts.macs == {"0": 36, "2": 24}
    assert counts.spikes == {"1": nonzero(net[:2](x))}
    assert net[0].weight.grad is not None


def test_the_making_of_weights_is_no_synaptic_operation():
    class LowRank(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Parameter(torch.rand(1, 4)), nn.Parameter(torch.rand(3, 1))

        def forward(self, weight):
            return weight + self.b @ self.a

    net = nn.Linear(4, 3)
    nn.utils.parametrize.register_parametrization(net, "weight", LowRank())
    assert counted(net, torch.rand(2, 4))["macs"] == {"ParametrizedLinear": 24}


@pytest.mark.parametrize(
    ("module", "inputs"),
    [
        (nn.LSTM(4, 3), 1),
        (nn.MultiheadAttention(4, 2), 3),
        (nn.Bilinear(4, 4, 2), 2),
        (Calls(lambda x, w: torch.einsum("tbi,io->tbo", x, w), nn.Parameter(torch.rand(4, 3))), 1),
    ],
)
def test_weights_that_act_unseen_are_said_once(module, inputs):
    net = nn.Sequential(nn.ModuleDict({"part": module}))
    with pytest.warns(UserWarning, match="act unseen") as said, count_operations(net):  # noqa: PT031
        for _ in range(2):
            module(*[torch.rand(2, 3, 4)] * inputs)
    assert "in '0.part' act unseen; its operations are not counted" in str(said[0].message)
    assert len(said) == 1


def test_an_einsum_without_weights_is_nothing_to_say(recwarn):
    assert counted(Calls(lambda x: torch.einsum("bi,bj->bij", x, x)), torch.rand(2, 3))["macs"] == {}
    assert not recwarn.list


@pytest.mark.filterwarnings("ignore:`torch.jit.*:FutureWarning", "ignore:`torch.jit.*:DeprecationWarning")
def test_scripts_are_said_to_show_nothing():
    inner = torch.jit.trace(nn.Sequential(nn.Linear(4, 3), nn.ReLU()), torch.rand(2, 4))
    net = nn.Sequential(inner, nn.Linear(3, 2))
    with pytest.warns(UserWarning, match="'0' is a script") as said:
        counts = counted(net, torch.rand(2, 4))
    assert len(said) == 1
    assert counts["macs"] == {"1": 12}


def test_compiled_modules_run_as_they_were_written():
    net = nn.Sequential(torch.compile(nn.Linear(4, 3), backend="eager"), nn.Linear(3, 2))
    x = torch.rand(2, 4)
    expected = net(x)
    with count_operations(net) as counts:
        assert torch.allclose(net(x), expected)
    assert counts.macs == {"0._orig_mod": 24, "1": 12}
    assert torch.equal(net(x), expected)


def test_counts_print_as_a_table_and_divide_by_inferences():
    counts = OperationCounts()
    for path, name, number in (
        ("fc1", "synops", torch.tensor(6)),
        ("fc1", "graded_synops", 2),
        ("fc1", "macs", 12),
        ("lif", "spikes", 3),
        ("lif", "spikes", torch.tensor(2)),
        ("a.fc2", "synops", 2**60),
        ("a.fc2", "synops", torch.tensor(1)),
    ):
        counts.add(path, name, number)
    assert str(counts).splitlines() == [
        "module  spikes  neuron_updates               synops  graded_synops  macs  outputs",
        "------  ------  --------------  -------------------  -------------  ----  -------",
        "fc1          -               -                    6              2    12        -",
        "lif          5               -                    -              -     -        -",
        "a.fc2        -               -  1152921504606846977              -     -        -",
        "total        5               0  1152921504606846983              2    12        0",
    ]
    assert counts.total("synops") == 2**60 + 7
    totals = {
        "neuron_updates": 0.0,
        "spikes": 2.5,
        "synops": (2**60 + 7) / 2,
        "graded_synops": 1.0,
        "macs": 6.0,
        "outputs": 0.0,
    }
    synops = {"synops/fc1": 3.0, "synops/a.fc2": (2**60 + 1) / 2}
    assert counts.per_inference(2) == totals | synops | {"spikes/lif": 2.5, "graded_synops/fc1": 1.0, "macs/fc1": 6.0}
    assert all(type(count) is int for name in COUNTED for count in getattr(counts, name).values())


def test_wrong_arguments_are_refused_in_one_line():
    with pytest.raises(TypeError, match=r"nn\.Module, got function"):
        count_operations(lambda x: x)
    for neurons in ("Leaky", (nn.ReLU, nn.ReLU()), [nn.ReLU]):
        with pytest.raises(TypeError, match="a class or a tuple of classes"):
            count_operations(nn.ReLU(), neurons)
    for n in (0, -1):
        with pytest.raises(ValueError, match="1 or more, got"):
            OperationCounts().per_inference(n)
    with pytest.raises(ValueError, match="spikes, neuron_updates, synops, graded_synops, macs, outputs, got 'energy'"):
        OperationCounts().total("energy")


def test_energy_of_a_network_that_nobody_converted_is_its_counts_times_their_prices():
    net = nn.Sequential(nn.Linear(6, 5), snntorch.Leaky(beta=0.9, init_hidden=True), nn.Linear(5, 2))
    trains = (torch.rand(7, 3, 6) < 0.4).float()
    with torch.no_grad(), count_operations(net) as counts:
        for step in trains:
            net(step)
    assert counts.neuron_updates == {"1": 7 * 3 * 5}
    spikes, synops = counts.total("spikes"), int(trains.sum()) * 5 + counts.total("spikes") * 2
    assert counts.energy(LOIHI, 3) == pytest.approx((23.6 * synops + 81 * 105 + 1.7 * spikes) * 1e-12 / 3)
    assert counts.energy(HOROWITZ_FLOAT32, 3) == pytest.approx((synops + 105) * 0.9e-12 / 3)
    with pytest.raises(ValueError, match="needs"):
        counts.energy(paper_profile(16), 3)


def test_weights_in_products_of_other_shapes_are_not_left_out_in_silence():
    class Products(nn.Module):
        def __init__(self):
            super().__init__()
            self.vector, self.batched = nn.Parameter(torch.rand(4)), nn.Parameter(torch.rand(2, 4, 3))

        def forward(self, x):
            return x @ self.vector, torch.matmul(x, self.batched), torch.dot(x[0], self.vector)

    net = Products()
    with pytest.warns(UserWarning, match="act unseen") as warned, count_operations(net) as counts:
        net(torch.rand(5, 4))
    assert {str(each.message).split()[3] for each in warned} == {"matmul", "dot"}
    assert counts.total("macs") == 0
