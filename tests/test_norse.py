"""The same neuron in Norse's idiom, and the package without Norse."""

import copy
import subprocess
import sys
import textwrap

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from quartz_plugin import TTFSNeuron, encode
from quartz_plugin.functional import initial_state, ttfs_step

# Random currents arrive at all steps.
pytestmark = pytest.mark.filterwarnings("ignore:current arrives after the readout")


@pytest.fixture(scope="module")
def faces():
    """The module quartz_plugin.norse, where Norse is installed."""
    pytest.importorskip("norse")
    import quartz_plugin.norse

    return quartz_plugin.norse


T = 6
S = T - 1
BIAS = torch.tensor([0.25, -0.5, 0.0, 0.75])

options = st.one_of(
    st.fixed_dictionaries(
        {
            "hold": st.booleans(),
            "rectifier": st.sampled_from(["spike", "silent", None]),
            "bias": st.sampled_from([None, BIAS]),
        }
    ),
    st.fixed_dictionaries(
        {
            "rectifier": st.sampled_from(["spike", None]),
            "bias": st.just(BIAS),
            "bias_code": st.just("spike"),
        }
    ),
)


def currents(steps=5 * S, batch=3):
    return torch.randint(-256, 257, (steps, batch, 4)) / 128


def step_through(cell, sequence, state=None):
    out = []
    for x in sequence:
        spk, state = cell(x, state)
        out.append(spk)
    return torch.stack(out), state


def same_state(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@given(
    options, st.integers(1, 2), st.sampled_from([torch.float32, torch.float64, torch.bfloat16]), st.integers(0, 10**6)
)
def test_cell_and_sequence_equal_the_neuron_spike_for_spike(faces, options, layer, dtype, seed):
    torch.manual_seed(seed)
    x = currents().to(dtype)
    p = faces.TTFSParameters(T, layer, **options)
    expected, expected_state = step_through(TTFSNeuron(T, layer, **options), x)
    assert expected.count_nonzero() > 0
    cell_out, cell_state = step_through(faces.TTFSCell(p), x)
    out, state = faces.TTFS(p)(x)
    assert torch.equal(cell_out, expected)
    assert torch.equal(out, expected)
    assert out.dtype == cell_out.dtype == dtype
    assert type(cell_state) is type(state) is faces.TTFSState
    assert same_state(cell_state, expected_state)
    assert same_state(state, expected_state)


@pytest.mark.parametrize("cut", [1, 5, 17])
def test_a_sequence_goes_on_from_a_state(faces, cut):
    net, x = faces.TTFS(faces.TTFSParameters(T, bias=BIAS)), currents()
    whole, last = net(x)
    first, state = net(x[:cut])
    second, end = net(x[cut:], state)
    assert torch.equal(torch.cat([first, second]), whole)
    assert same_state(end, last)


def test_a_sequence_keeps_nothing_between_calls(faces):
    net, x = faces.TTFS(faces.TTFSParameters(T, bias=BIAS)), currents()
    assert torch.equal(net(x)[0], net(x)[0])
    assert net(x[:, :1])[0].shape == (len(x), 1, 4)


def test_recorded_states_are_those_after_every_step(faces):
    p, x = faces.TTFSParameters(T, bias=BIAS), currents(steps=12)
    out, states = faces.TTFS(p, record_states=True)(x)
    assert torch.equal(out, faces.TTFS(p)(x)[0])
    assert states.v.shape == (12, 3, 4)
    assert states.step.tolist() == list(range(1, 13))
    state = None
    for step in range(12):
        _, state = ttfs_step(x[step], state, p)
        assert same_state(state, (value[step] for value in states))


def test_sequential_state_steps_cells_and_pools_like_snntorch_modules(faces):
    from norse.torch import SequentialState

    linear = nn.Linear(4, 4, bias=False), nn.Linear(4, 2, bias=False)
    x = encode(torch.rand(3, 4), T, 4 * S + 1)
    net = SequentialState(
        linear[0],
        faces.TTFSCell(faces.TTFSParameters(T, bias=BIAS)),
        linear[1],
        faces.TTFSCell(faces.TTFSParameters(T, layer=2, rectifier=None)),
    )
    ours = nn.Sequential(
        linear[0],
        TTFSNeuron(T, bias=BIAS, init_hidden=True),
        linear[1],
        TTFSNeuron(T, layer=2, rectifier=None, init_hidden=True),
    )
    out, states = step_through(net, x)
    expected = torch.stack([ours(s) for s in x])
    assert expected.count_nonzero() > 0
    assert torch.equal(out, expected)
    assert torch.equal(states[1].v, ours[1].mem)
    assert int(states[3].step) == len(x)
    again, _ = step_through(net, x)
    assert torch.equal(again, expected)


def test_sequences_follow_each_other_under_lift(faces):
    """Whole sequences layer after layer equal all layers stepped together."""
    from norse.torch import Lift, SequentialState

    linear = nn.Linear(4, 4, bias=False), nn.Linear(4, 2, bias=False)
    p = faces.TTFSParameters(T, bias=BIAS), faces.TTFSParameters(T, layer=2, rectifier=None)
    x = encode(torch.rand(3, 4), T, 4 * S + 1)
    whole, _ = SequentialState(Lift(linear[0]), faces.TTFS(p[0]), Lift(linear[1]), faces.TTFS(p[1]))(x)
    stepped, _ = step_through(SequentialState(linear[0], faces.TTFSCell(p[0]), linear[1], faces.TTFSCell(p[1])), x)
    assert stepped.count_nonzero() > 0
    assert torch.equal(whole, stepped)


@pytest.fixture(params=["TTFSCell", "TTFS"])
def kind(request, faces):
    return getattr(faces, request.param)


def run(module, x):
    """Spikes of a cell or a whole-sequence module."""
    return step_through(module, x)[0] if type(module).__name__ == "TTFSCell" else module(x)[0]


def test_the_state_dict_holds_the_bias_alone_and_carries_it(faces, kind):
    x = currents()
    module = kind(faces.TTFSParameters(T, bias=BIAS))
    other = kind(faces.TTFSParameters(T, bias=torch.zeros(4)))
    assert list(module.state_dict()) == ["bias"]
    assert not torch.equal(run(other, x), run(module, x))
    other.load_state_dict(module.state_dict())
    assert torch.equal(run(other, x), run(module, x))
    assert torch.equal(other.p.bias, BIAS)
    assert list(kind(faces.TTFSParameters(T)).state_dict()) == []


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_module_moves_to_another_dtype_with_its_bias(faces, kind, dtype):
    x = currents()
    module = kind(faces.TTFSParameters(T, bias=BIAS))
    expected = run(module, x)
    module = module.to(dtype)
    assert module.bias.dtype == module.p.bias.dtype == dtype
    out = run(module, x.to(dtype))
    assert out.dtype == dtype
    assert torch.equal(out, expected.to(dtype))


def test_the_state_is_float64_where_the_input_is(faces):
    _, state = faces.TTFSCell(faces.TTFSParameters(T, bias=BIAS)).to(torch.float64)(currents()[0].double())
    assert {value.dtype for value in state[1:]} == {torch.float64}
    assert torch.equal(state.step, initial_state(torch.zeros(1)).step + 1)


def test_the_bias_is_the_modules_own_copy(faces, kind):
    bias = BIAS.clone()
    module = kind(faces.TTFSParameters(T, bias=bias))
    bias.zero_()
    assert torch.equal(module.bias, BIAS)


def test_parameters_can_be_replaced(faces, kind):
    x = currents()
    module = kind(faces.TTFSParameters(T))
    p = faces.TTFSParameters(4, 2, hold=True, rectifier="silent", bias=BIAS)
    module.p = p
    assert torch.equal(run(module, x), run(kind(p), x))
    assert list(module.state_dict()) == ["bias"]
    module.p = p._replace(bias=None)
    assert list(module.state_dict()) == []


def test_copies_are_independent(faces, kind):
    x = currents()
    module = kind(faces.TTFSParameters(T, bias=BIAS))
    clone = copy.deepcopy(module)
    clone.bias.zero_()
    assert torch.equal(module.bias, BIAS)
    assert not torch.equal(run(clone, x), run(module, x))


def test_gradients_flow_back_in_time_with_the_surrogate_asked_for(faces, kind):
    gradients = []
    for spike_grad in (None, torch.sigmoid):
        x = currents().requires_grad_()
        torch.manual_seed(1)
        run(kind(faces.TTFSParameters(T, rectifier=None, spike_grad=spike_grad)), x).sum().backward()
        gradients.append(x.grad)
    assert all(g.isfinite().all() for g in gradients)
    assert all(g[0].count_nonzero() > 0 for g in gradients)
    assert not torch.equal(*gradients)


def test_parameters_that_cannot_be_simulated_are_refused(faces, kind):
    with pytest.raises(ValueError, match="t_max must be a whole number"):
        kind(faces.TTFSParameters(1))
    with pytest.raises(ValueError, match="NaN"):
        kind(faces.TTFSParameters(T, bias=torch.tensor([torch.nan])))
    with pytest.raises(TypeError, match="bias must be a Tensor"):
        kind(faces.TTFSParameters(T, bias=0.5))
    with pytest.raises(ValueError, match="hold=False"):
        kind(faces.TTFSParameters(T, hold=True, bias_code="spike"))
    with pytest.raises(ValueError, match="give readout="):
        kind(faces.TTFSParameters(T, bias=torch.tensor([1.5]), bias_code="spike"))


def test_printing_shows_the_parameters(faces, kind):
    assert "t_max=6" in repr(kind(faces.TTFSParameters(T, bias=BIAS)))


# --------------------------------------------------------------------------------------- without the extra

BLOCK = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {blocked}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Blocker())
"""


def python(code, *blocked):
    """Run code in a fresh interpreter where some packages do not exist; return what it prints."""
    code = BLOCK.format(blocked=set(blocked) or {""}) + textwrap.dedent(code)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_without_norse_the_package_works_and_its_norse_face_names_the_extra():
    out = python(
        """
        import torch, quartz_plugin
        neuron = quartz_plugin.TTFSNeuron(t_max=4, init_hidden=True)
        spikes = [neuron(s) for s in quartz_plugin.encode(torch.tensor([[0.0, 1.0]]), 4, 7)]
        assert quartz_plugin.decode(torch.stack(spikes), 4, start=3).tolist() == [[0.0, 1.0]]
        try:
            import quartz_plugin.norse
        except ImportError as error:
            print(error)
        """,
        "norse",
    )
    assert len(out.splitlines()) == 1
    assert "Norse" in out
    assert "quartz_plugin[norse]" in out


def test_without_norse_the_export_names_the_extra_too():
    out = python(
        """
        import torch, quartz_plugin
        torch.manual_seed(0)  # A fresh interpreter draws from a random seed; some networks so drawn are dead.
        ann = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
        snn = quartz_plugin.convert(ann, torch.rand(20, 3), t_max=4)
        snn.to_snntorch()
        try:
            snn.to_norse()
        except ImportError as error:
            print(error)
        """,
        "norse",
    )
    assert len(out.splitlines()) == 1
    assert "quartz_plugin[norse]" in out


def test_importing_the_package_imports_no_extra():
    heavy = ["torchvision", "lightning", "pytorch_lightning", "norse", "torchmetrics", "matplotlib"]
    out = python(f"import quartz_plugin; print([name for name in {heavy} if name in sys.modules])")
    assert out == "[]"


def test_the_package_works_without_any_extra():
    extras = ["torchvision", "lightning", "norse", "matplotlib", "mlxtend", "jsonargparse", "rich"]
    assert python("import quartz_plugin; print(quartz_plugin.TTFSNeuron(4))", *extras).startswith("TTFSNeuron(")
