"""Networks with several outputs, and what the host computes of them."""

import copy
import dataclasses
import operator
import pickle
from collections import namedtuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

import quartz_plugin
from quartz_plugin.host import OPERATIONS, PRODUCTS, STARTS, HostProgram
from quartz_plugin.outputs import Head, Outputs
from quartz_plugin.structure import flattened, from_json, rebuilt, to_json


@dataclasses.dataclass
class Found:
    logits: torch.Tensor
    boxes: torch.Tensor | None = None


Pair = namedtuple("Pair", ["policy", "value"])


class Net(nn.Module):
    """A stem with two heads and an early one; `returned` makes what it returns."""

    def __init__(self, returned):
        super().__init__()
        self.returned = returned
        self.stem, self.one, self.two, self.early = nn.Linear(6, 8), nn.Linear(8, 3), nn.Linear(8, 4), nn.Linear(6, 2)

    def forward(self, x):
        early = self.early(x)
        x = self.stem(x).relu()
        return self.returned(self.one(x), self.two(x), early)


RETURNED = {
    "tuple": lambda a, b, c: (a, b),
    "list": lambda a, b, c: [b, a],
    "dict": lambda a, b, c: {"a": a, "b": b, "early": c},
    "nested": lambda a, b, c: {"a": (a, None), "b": [b, {"c": c}]},
    "dataclass": lambda a, b, c: Found(a, b),
    "dataclass with a hole": lambda a, b, c: Found(a),
    "named tuple": lambda a, b, c: Pair(a.softmax(1), torch.tanh(b).mean(1)),
    "one value twice": lambda a, b, c: (a, a),
    "logits and shares": lambda a, b, c: {"logits": a, "shares": F.softmax(a, dim=1), "class": a.argmax(1)},
    "shaped": lambda a, b, c: (a, b.view(b.size(0), 2, 2)),
    "picked": lambda a, b, c: torch.sigmoid(b)[:, [0, 2]],
    "a split value": lambda a, b, c: b.chunk(2, 1),
    "behind one another": lambda a, b, c: torch.log(torch.sigmoid(a) + 1e-3).view(a.size(0), -1) * 2 - b.tanh()[:, :3],
    "a distribution": lambda a, b, c: (b.softmax(-1) * torch.arange(4.0)).sum(-1),
}


FOUND_IN_REVIEW = {
    "keys with dots": lambda a, b, c: {"a.b": a + 100, "a": {"b": a}},
    "whole numbers as keys": lambda a, b, c: {0: a, 1: a.sigmoid()},
    "types of softmaxes": lambda a, b, c: (
        torch.softmax(a, 1, torch.float64),
        F.softmax(a, dim=1, dtype=torch.float64),
    ),
    "another type": lambda a, b, c: a.sigmoid().double(),
    "both of a maximum": lambda a, b, c: b.softmax(1).max(1),
    "the largest two": lambda a, b, c: b.sigmoid().topk(2),
    "pieces": lambda a, b, c: b.sigmoid().chunk(2, 1),
    "compared": lambda a, b, c: (b.sigmoid() > 0.5).float(),
    "weighted": lambda a, b, c: torch.add(a.tanh(), a.tanh(), alpha=3),
    "sliced": lambda a, b, c: b.softmax(1)[:, 1:3][..., 0],
    "small constants": lambda a, b, c: b.sigmoid() * torch.tensor([1, 2, 3, 4], dtype=torch.int32),
}


@pytest.mark.parametrize("name", FOUND_IN_REVIEW)
def test_what_a_review_found_is_returned_and_read_again(name, tmp_path):
    ann, images = Net(FOUND_IN_REVIEW[name]).eval(), torch.rand(40, 6)
    snn = quartz_plugin.convert(ann, images, 4096, percentile=100)
    wanted, given = leaves_of(ann(images)), leaves_of(snn(images))
    for one, other in zip(given, wanted, strict=True):
        assert one.shape == other.shape
        if other.is_floating_point() and name != "compared":
            assert float((one - other).detach().abs().max()) < 3e-3 * max(1.0, float(other.detach().abs().max()))
        else:
            assert float((one == other).float().mean()) >= 0.9
    snn.save(tmp_path / "net.snn")
    for one, other in zip(leaves_of(quartz_plugin.load(tmp_path / "net.snn")(images)), given, strict=True):
        assert torch.equal(one, other)
    result = snn.run(images)
    before = result.logits.clone()
    torch.save(result, tmp_path / "result.pt")
    for one, other in zip(
        leaves_of(torch.load(tmp_path / "result.pt").outputs), leaves_of(result.outputs), strict=True
    ):
        assert torch.equal(one, other)
    assert torch.equal(result.logits, before)


COMPARISONS = ["gt", "ge", "lt", "le", "eq", "ne"]

HOSTED = {
    "softmax": lambda a, b, c: torch.softmax(a, -1),
    "log_softmax": lambda a, b, c: F.log_softmax(a, dim=1),
    "softmin": lambda a, b, c: F.softmin(a, dim=1),
    "clamp": lambda a, b, c: a.clamp(-0.1, 0.1),
    "clip": lambda a, b, c: torch.clip(a, -0.1),
    "hardtanh": lambda a, b, c: F.hardtanh(a, -0.2, 0.3),
    "interpolate": lambda a, b, c: F.interpolate(b.view(-1, 1, 2, 2), scale_factor=2, mode="bilinear"),
    **{
        name: lambda a, b, c, name=name: getattr(torch, name)(a)
        for name in ["sigmoid", "tanh", "exp", "expm1", "sin", "cos", "atan"]
    },
    **{
        name: lambda a, b, c, name=name: getattr(a.sigmoid() + 0.1, name)()
        for name in ["log", "log1p", "sqrt", "rsqrt", "reciprocal"]
    },
    "logit": lambda a, b, c: torch.logit(a.sigmoid()),
    "square": lambda a, b, c: a.square().sum(1),
    "pow": lambda a, b, c: (a - b[:, :3]) ** 2,
    "erf": lambda a, b, c: torch.special.erf(a),
    **{
        name: lambda a, b, c, name=name: getattr(F, name)(a)
        for name in ["logsigmoid", "softsign", "tanhshrink", "hardsigmoid"]
    },
    **{
        name: lambda a, b, c, name=name: getattr(F, name)(a)
        for name in ["selu", "celu", "leaky_relu", "silu", "mish", "hardswish"]
    },
    "softplus": lambda a, b, c: F.softplus(a, beta=2, threshold=10),
    "gelu": lambda a, b, c: F.gelu(a, approximate="tanh"),
    "elu": lambda a, b, c: F.elu(a, 0.7, inplace=True) + 1,
    **{name: lambda a, b, c, name=name: getattr(torch, name)(a * 4) for name in ["round", "floor", "ceil", "sign"]},
    **{
        name: lambda a, b, c, name=name: getattr(a, name)(1)
        for name in ["argmax", "argmin", "argsort", "logsumexp", "std", "var"]
    },
    "sort": lambda a, b, c: a.sort(1, descending=True).values,
    "topk": lambda a, b, c: torch.topk(b, 2).indices,
    "norm": lambda a, b, c: a / a.norm(dim=1, keepdim=True),
    "vector_norm": lambda a, b, c: torch.linalg.vector_norm(a, dim=1),
    "linalg_norm": lambda a, b, c: torch.linalg.norm(a, ord=1, dim=-1),
    **{name: lambda a, b, c, name=name: getattr(operator, name)(a, 0.05) for name in COMPARISONS},
    "normalize": lambda a, b, c: F.normalize(a, p=1),
    "cosine_similarity": lambda a, b, c: F.cosine_similarity(a, b[:, 1:]),
    "pairwise_distance": lambda a, b, c: F.pairwise_distance(a, b[:, 1:]),
    "mul": lambda a, b, c: a * b[:, :3],
    "truediv": lambda a, b, c: a / (b[:, :1].exp() + 1),
    "div": lambda a, b, c: torch.div(a, a.abs() + 1),
    "matmul": lambda a, b, c: b.view(-1, 2, 2) @ c.unsqueeze(2),
    "bmm": lambda a, b, c: torch.bmm(b.view(-1, 2, 2), b.view(-1, 2, 2)),
    "place of the largest": lambda a, b, c: a.max(1).indices,
    "largest and its place": lambda a, b, c: torch.max(a, dim=1)[1],
    "chosen": lambda a, b, c: torch.where(a > 0.05, a, -1.0),
}


def test_every_operation_that_the_host_begins_with_has_an_example():
    assert set(HOSTED) >= set(STARTS) | set(PRODUCTS)


@pytest.mark.parametrize("name", HOSTED)
@pytest.mark.parametrize("exported", [False, True], ids=["traced", "exported"])
def test_host_operations_give_what_the_ann_gives(name, exported, tmp_path):
    ann, images = Net(HOSTED[name]).eval(), torch.rand(40, 6)
    shapes = ({0: torch.export.Dim("batch")},)
    source = torch.export.export(ann, (images[:2],), dynamic_shapes=shapes) if exported else ann
    snn = quartz_plugin.convert(source, images, 1 << 16, percentile=100)
    wanted, given = ann(images), snn(images)
    assert given.shape == wanted.shape
    if wanted.is_floating_point() and name not in ("round", "floor", "ceil", "sign", "chosen"):
        torch.testing.assert_close(given, wanted, rtol=1e-3, atol=1e-3)
    else:
        assert float(torch.isclose(given, wanted, atol=1e-3).float().mean()) > 0.95
    snn.save(tmp_path / "net.snn")
    assert torch.equal(quartz_plugin.load(tmp_path / "net.snn")(images), given)


@pytest.mark.parametrize("exported", [False, True], ids=["traced", "exported"])
def test_a_layer_behind_a_sigmoid_is_not_left_to_the_host(exported):
    ann, images = Net(lambda a, b, c: a.sigmoid() @ torch.ones(3, 2)).eval(), torch.rand(40, 6)
    source = torch.export.export(ann, (images,)) if exported else ann
    with pytest.raises(quartz_plugin.ConversionError, match="sigmoid"):
        quartz_plugin.convert(source, images, 16)


@pytest.mark.parametrize(
    "returned",
    [
        lambda a, b, c: a.softmax(0),
        lambda a, b, c: a.tanh() - a.tanh().mean(0),
        lambda a, b, c: a.argmax(0),
        lambda a, b, c: a.exp().sum(),
        lambda a, b, c: a.sigmoid().cumsum(0),
        lambda a, b, c: a.sort(0).values,
        lambda a, b, c: a.tanh() @ a.tanh().transpose(0, 1),
    ],
)
def test_what_mixes_images_is_not_left_to_the_host(returned):
    with pytest.raises(quartz_plugin.ConversionError, match="depend on the other images"):
        quartz_plugin.convert(Net(returned).eval(), torch.rand(40, 6), 16)


@pytest.mark.parametrize(
    "change",
    [
        lambda y: F.elu(y, inplace=True),
        lambda y: F.elu(y, 1.0, True),
        F.leaky_relu_,
        torch.exp_,
        lambda y: y.mul_(2),
        lambda y: y.sigmoid_().add_(1),
    ],
)
@pytest.mark.parametrize("exported", [False, True], ids=["traced", "exported"])
def test_what_the_host_writes_in_place_is_seen_by_all_later_users(change, exported):
    def returned(a, b, c):
        y = b.tanh()
        x = change(y)
        return x + 1, y

    ann, images = Net(returned).eval(), torch.rand(40, 6)
    source = torch.export.export(ann, (images,)) if exported else ann
    snn = quartz_plugin.convert(source, images, 1 << 14, percentile=100)
    for one, other in zip(snn(images), ann(images), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)
    result = snn.run(images)
    before = result.logits.clone()
    assert torch.equal(result.outputs[1], snn(images)[1])
    assert torch.equal(result.logits, before)


def test_what_is_written_in_place_and_not_used_itself_is_kept():
    def returned(a, b, c):
        y = b.tanh()
        F.elu(y, 0.5, True)
        return y

    ann, images = Net(returned).eval(), torch.rand(40, 6)
    torch.testing.assert_close(
        quartz_plugin.convert(ann, images, 1 << 14, percentile=100)(images), ann(images), rtol=1e-3, atol=1e-3
    )


def test_host_operations_change_nothing_in_place():
    ann, images = Net(lambda a, b, c: F.hardtanh(b, -0.1, 0.1, inplace=True)).eval(), torch.rand(40, 6)
    result = quartz_plugin.convert(ann, images, 256, percentile=100).run(images)
    before = result.logits.clone()
    assert float(result.outputs.abs().max()) < 0.101
    assert torch.equal(result.logits, before)


def test_an_in_place_module_behind_a_host_operation_changes_its_value():
    class Clipped(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.clip = nn.Linear(64, 2), nn.Hardtanh(-1, 0.5, inplace=True)
            nn.init.ones_(self.fc.weight)
            nn.init.constant_(self.fc.bias, -50.0)

        def forward(self, x):
            y = self.fc(x).sigmoid()
            self.clip(y)
            return y

    images = torch.rand(16, 64)
    images[8:] = images[8:] * 0.1 + 0.9
    ann = Clipped().eval()
    snn = quartz_plugin.convert(ann, images, 4096, percentile=100)
    assert float((snn(images) - ann(images)).detach().abs().max()) < 0.05


def clip(x, low, high):
    """A user's function of a name of torch's."""
    return torch.where(x > high, torch.zeros_like(x), x)


torch.fx.wrap("clip")


def test_a_function_of_the_users_is_not_the_hosts_of_that_name(tmp_path):
    ann, images = Net(lambda a, b, c: clip(a, -60.0, 0.1)).eval(), torch.rand(40, 6)
    assert bool((ann(images) == 0).any())
    snn = quartz_plugin.convert(ann, images, 1 << 14, percentile=100)
    near = (snn(images[:9]) - ann(images[:9])).abs() < 1e-3
    assert float(near.float().mean()) > 0.9
    snn.save(tmp_path / "net.snn")
    assert torch.equal(quartz_plugin.load(tmp_path / "net.snn")(images[:9]), snn(images[:9]))


def test_tasks_name_outputs_that_there_are():
    ann, images = Net(RETURNED["dict"]), torch.rand(9, 6)
    with pytest.raises(ValueError, match="task names no output 'valeu'; there are 'a', 'b', 'early'"):
        quartz_plugin.convert(ann, images, 5, task={"valeu": "regression"})


@pytest.mark.filterwarnings("ignore")
def test_networks_of_several_outputs_are_exported_by_torch():
    snn = quartz_plugin.convert(Net(RETURNED["tuple"]).eval(), torch.rand(9, 6), 16)
    images = torch.rand(4, 6)
    program = torch.export.export(snn, (images,), strict=False).module()
    for one, other in zip(program(images), snn(images), strict=True):
        assert torch.equal(one, other)


def leaves_of(value):
    return list(flattened(value, lambda each: isinstance(each, torch.Tensor))[1].values())


@pytest.mark.parametrize("name", RETURNED)
def test_what_is_returned_is_that_of_the_ann(name, tmp_path):
    ann, images = Net(RETURNED[name]).eval(), torch.rand(40, 6)
    snn = quartz_plugin.convert(ann, images, 4096, percentile=100)
    wanted, given = ann(images), snn(images)
    assert type(given) is type(wanted)
    structure, _ = flattened(wanted, lambda each: isinstance(each, torch.Tensor))
    assert flattened(given, lambda each: isinstance(each, torch.Tensor))[0] == structure
    for one, other in zip(leaves_of(given), leaves_of(wanted), strict=True):
        assert one.shape == other.shape
        if other.is_floating_point():
            assert float((one - other).detach().abs().max()) < 3e-3 * max(1.0, float(other.detach().abs().max()))
        else:
            assert float((one == other).float().mean()) >= 0.9
    for engine in ("stepped", "event"):
        if engine == "event":
            pytest.importorskip("numba")
        few = quartz_plugin.convert(ann, images, 9)
        assert torch.equal(few.run(images, engine=engine).logits, few.run(images).logits)
    snn.save(tmp_path / "net.snn")
    again = quartz_plugin.load(tmp_path / "net.snn")
    for loaded, one in zip(leaves_of(again(images)), leaves_of(given), strict=True):
        assert torch.equal(loaded, one)
    assert all(torch.equal(a, b) for a, b in zip(leaves_of(copy.deepcopy(snn)(images)), leaves_of(given), strict=True))


def test_each_output_has_its_own_scale_task_and_decisions():
    def returned(a, b, c):
        return {"a": a * 0.001, "b": b * 100.0, "early": c}

    ann, images = Net(returned).eval(), torch.rand(50, 6)
    snn = quartz_plugin.convert(ann, images, 256, percentile=100, task={"b": "regression"})
    result, wanted = snn.run(images), ann(images)
    assert result.heads == ("a", "b", "early")
    for name in result.heads:
        logits = result.head(name).logits
        assert torch.equal(logits, result.outputs[name])
        assert float((logits - wanted[name]).abs().max()) < 0.03 * float(wanted[name].abs().max())
    assert float((result.head("a").decisions == wanted["a"].argmax(1)).float().mean()) > 0.9
    # The first spike decides: values of one output are scaled alike.
    steps = result.head("a").spike_steps[result.output]
    assert torch.equal(steps.argmin(1), result.head("a").decisions)
    with pytest.raises(ValueError, match="regression decides for no class"):
        _ = result.head("b").decisions
    with pytest.raises(ValueError, match=r"several outputs: result.head\(name\) of one of a, b, early"):
        _ = result.decisions
    with pytest.raises(KeyError, match="no output 'c'; there are 'a', 'b', 'early'"):
        result.head("c")
    again = pickle.loads(pickle.dumps(result))
    assert torch.equal(again.outputs["b"], result.outputs["b"])
    found = quartz_plugin.verify(ann, snn, images)
    assert found.heads["a"].agreement > 0.9
    assert len(found.heads["b"].errors) == 4
    assert found.agreement is None
    assert "early: top-1 agreement" in str(found)


def test_a_network_of_heads_stepped_by_hand_returns_the_same():
    ann, images = Net(RETURNED["nested"]).eval(), torch.rand(3, 6)
    snn = quartz_plugin.convert(ann, images, 6)
    net = snn.to_snntorch()
    spikes = torch.stack([net(step) for step in quartz_plugin.encode(images, 6, snn.n_steps)])
    for one, other in zip(leaves_of(snn.decode(spikes)), leaves_of(snn(images)), strict=True):
        assert torch.equal(one, other)


def test_the_report_names_what_the_host_computes():
    snn = quartz_plugin.convert(nn.Sequential(nn.Linear(4, 3), nn.Softmax(1)), torch.rand(9, 4))
    rows = {row["module"]: row["became"] for row in snn.report}
    assert rows["1"] == "computed on the decoded output, by the host"
    images = torch.rand(5, 4)
    assert torch.allclose(snn(images), snn.run(images).logits.softmax(1))


def test_the_batch_may_have_any_size_behind_the_last_layer():
    ann = Net(lambda a, b, c: torch.sigmoid(a).reshape(a.shape[0], 3, 1)).eval()
    snn = quartz_plugin.convert(ann, torch.rand(9, 6))
    for size in (1, 2, 3, 7):
        assert snn(torch.rand(size, 6)).shape == (size, 3, 1)


def test_what_feeds_on_is_no_host_operation():
    class Gated(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x):
            return self.b(torch.sigmoid(self.a(x)))

    with pytest.raises(quartz_plugin.ConversionError, match=r"'sigmoid' \(sigmoid\)"):
        quartz_plugin.convert(Gated(), torch.rand(5, 4))


@pytest.mark.parametrize(
    "spoil",
    [
        lambda held: held.update(heads=[["a", [2]]]),
        lambda held: held.update(structure=["tuple", ["0"], [7]]),
        lambda held: held.update(structure="tuple"),
        lambda held: held["program"]["calls"].__setitem__(0, ["system", [{"ref": 0}], {}]),
        lambda held: held["program"]["calls"].__setitem__(0, ["softmax", [{"ref": 9}], {}]),
        lambda held: held["program"]["calls"].__setitem__(0, ["softmax", [{"ref": 0}, 5], {}]),
        lambda held: held["program"].update(results=[99]),
        lambda held: held["program"].update(inputs=0),
    ],
)
def test_damaged_outputs_are_refused(spoil):
    snn = quartz_plugin.convert(Net(RETURNED["logits and shares"]), torch.rand(9, 6))
    held = copy.deepcopy(snn.graph.outputs.to_json())
    assert Outputs.from_json(held, (3,)).to_json() == held
    spoil(held)
    with pytest.raises((ValueError, IndexError, RuntimeError)):
        Outputs.from_json(held, (3,)).results(torch.rand(2, 3))


@given(
    st.recursive(
        st.none() | st.integers(),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.lists(inner, max_size=3).map(tuple)
            | st.dictionaries(st.text(max_size=3), inner, max_size=3)
        ),
        max_leaves=8,
    )
)
def test_structures_are_built_again(value):
    structure, leaves = flattened(value, lambda each: isinstance(each, int))
    assert rebuilt(structure, list(leaves.values())) == value
    assert rebuilt(from_json(to_json(structure), len(leaves)), list(leaves.values())) == value


def test_programs_of_every_operation_are_written_and_read():
    for name in OPERATIONS:
        written = {"inputs": 1, "calls": [[name, [{"ref": 0}], {}]], "results": [1]}
        assert HostProgram.from_json(written).to_json() == written
    assert Head("a", (2, 3)).units == 6


def test_what_is_for_one_output_is_refused_in_one_line():
    ann, images = Net(RETURNED["dict"]), torch.rand(9, 6)
    with pytest.raises(quartz_plugin.ConversionError, match=r"prepare_qat trains one output.*\(a, b, early\)"):
        quartz_plugin.prepare_qat(ann, images, 5)
    with pytest.raises(ValueError, match=r'chooses the range of one output \("output"\).*several \(a, b, early\)'):
        quartz_plugin.convert(ann, images, 5, calibration_method="best")
    quartz_plugin.convert(ann, images, 5, calibration_method="least_squares+distill", tuning_passes=1)


def test_what_nobody_uses_is_no_output():
    def returned(a, b, c):
        b.clamp(-0.25, 0.5)
        return a

    snn = quartz_plugin.convert(Net(returned).eval(), torch.rand(9, 6), 5)
    assert snn.graph.outputs.plain
    assert isinstance(snn.graph.output_scale, float)
