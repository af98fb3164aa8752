"""What is kept about a network is kept while it is the same, whatever way it is edited."""

import copy
import itertools

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize, prune

import quartz_plugin
from quartz_plugin import TTFSNeuron
from quartz_plugin.graph.digest import BLOCK, CHUNK, MULTIPLIERS, digest, digest_in_torch
from quartz_plugin.graph.fingerprint import Identity, identity_of, snapshot_of, structure_of
from quartz_plugin.graph.topology import Derived


@pytest.fixture
def images():
    return torch.rand(6, 2, 6, 6)


def converted(images, **options):
    ann = nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.ReLU(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(16, 5), nn.ReLU(), nn.Linear(5, 3)
    )
    return quartz_plugin.convert(ann, images, 9, **options)


def conv(snn):
    return snn.graph_module.get_submodule("0")


def weight_of(snn):
    return conv(snn).weight


def assigned(snn):
    conv(snn).weight = nn.Parameter(weight_of(snn).detach() * 2)


def rows_of_equal_sum_swapped(snn):
    weight_of(snn).data[[0, 1]] = weight_of(snn).data[[1, 0]]


def two_weights_swapped(snn):
    flat = weight_of(snn).data.view(-1)
    flat[0], flat[5] = float(flat[5]), float(flat[0])


def two_signs_changed(snn):
    weight_of(snn).data.view(-1)[[1, 3]] *= -1


def optimised(snn):
    weight = weight_of(snn).requires_grad_()
    weight.grad = torch.ones_like(weight)
    torch.optim.SGD([weight], 0.5).step()
    weight.requires_grad_(False)


def numpy_view_written(snn):
    weight_of(snn).detach().numpy()[0, 0, 0, 0] += 1


def storage_swapped(snn):
    weight_of(snn).data = weight_of(snn).data.flip(0)


class Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight


EDITS = {
    "another parameter": assigned,
    "in place": lambda snn: weight_of(snn).data.mul_(2),
    "copied into data": lambda snn: weight_of(snn).data.copy_(weight_of(snn).data + 1),
    "permuted": lambda snn: weight_of(snn).data.copy_(weight_of(snn).data.flip(0).clone()),
    "rolled": lambda snn: weight_of(snn).data.copy_(weight_of(snn).data.roll(1, 3).clone()),
    "rows swapped": rows_of_equal_sum_swapped,
    "two weights swapped": two_weights_swapped,
    "signs": two_signs_changed,
    "all signs": lambda snn: weight_of(snn).data.neg_(),
    "optimiser": optimised,
    "state loaded": lambda snn: snn.load_state_dict({k: v.flip(0) for k, v in snn.state_dict().items()}),
    "numpy view": numpy_view_written,
    "other storage": storage_swapped,
    "bias": lambda snn: snn.graph.layers[0].neuron.bias.data.copy_(snn.graph.layers[0].neuron.bias.data.flip(0)),
    "another module": lambda snn: snn.graph_module.set_submodule("0", nn.Conv2d(2, 4, 3, bias=False)),
    "a pruned module": lambda snn: prune.random_unstructured(conv(snn), "weight", 0.5),
    "a parametrized module": lambda snn: parametrize.register_parametrization(conv(snn), "weight", Doubled()),
    "a setting": lambda snn: setattr(snn.graph_module.get_submodule("2"), "divisor_override", 1),
    "another neuron": lambda snn: snn.graph_module.set_submodule(
        "1", TTFSNeuron(9, 1, hold=True, rectifier="silent", bias=snn.graph.layers[0].neuron.bias, init_hidden=True)
    ),
    "a rule": lambda snn: setattr(
        snn.graph.layers[0].neuron, "_parameters_but_bias", snn.graph.layers[0].neuron.p._replace(rectifier="silent")
    ),
}


@pytest.mark.parametrize("edit", EDITS)
class TestEveryEdit:
    def test_is_seen_by_the_fingerprint(self, images, edit):
        snn = converted(images, hold=False)
        before, still = snapshot_of(snn.graph).fingerprint, snapshot_of(snn.graph).fingerprint
        assert before == still
        EDITS[edit](snn)
        assert snapshot_of(snn.graph).fingerprint != before

    def test_is_seen_by_the_event_engine(self, images, edit):
        pytest.importorskip("numba")
        snn = converted(images, hold=False)
        before = snn.run(images, "event").spike_steps
        EDITS[edit](snn)
        found = [snn.run(images, engine).spike_steps for engine in ("event", "stepped")]
        for name, steps in found[0].items():
            assert (steps != found[1][name]).sum() <= 1, name
        assert not all(torch.equal(steps, before[name]) for name, steps in found[0].items())

    def test_is_seen_by_what_a_result_remembers_of_its_network(self, images, edit):
        snn = converted(images, hold=False)
        result = snn.run(images)
        result.memo(snn.graph)["found"] = 1
        result.memo()["found"] = 2
        assert result.memo(snn.graph) == {"found": 1}
        EDITS[edit](snn)
        assert result.memo(snn.graph) == {}
        assert result.memo() == {"found": 2}


@pytest.mark.parametrize(
    "edit",
    [
        lambda steps: steps.data.zero_(),
        lambda steps: steps.data.copy_(steps.data.flip(1).clone()),
        lambda steps: steps.numpy()[0].sort(),
        lambda steps: steps.neg_(),
        lambda steps: steps[0, 0].add_(1),
    ],
)
def test_an_edit_of_spikes_is_seen_by_what_is_counted_of_them(images, edit):
    snn = converted(images)
    result = snn.run(images)
    result.memo()["found"] = result.memo(snn.graph)["found"] = 1
    edit(result.spike_steps["1"])
    assert result.memo() == result.memo(snn.graph) == {}


def test_counts_follow_spikes_and_weights(images):
    from quartz_plugin.costs import InferenceCounts

    snn = converted(images)
    result = snn.run(images)
    before = InferenceCounts(snn, result)
    assert before["spikes"]["1"].sum() > 0
    merged = before["synops_merged"]["4" if "4" in before["synops_merged"] else "5"].clone()
    result.spike_steps["1"].data.fill_(-1)
    after = InferenceCounts(snn, result)
    assert after["spikes"]["1"].sum() == 0
    assert not torch.equal(after["synops_merged"]["5"], merged)
    weight_of(snn).data.zero_()
    snn.graph.layers[0].neuron.bias.data.zero_()
    assert InferenceCounts(snn, result)["bias_events"]["1"].sum() == 0


class TestDigest:
    def test_the_multipliers_tell_places_apart(self):
        assert len(set(MULTIPLIERS.tolist())) == BLOCK
        assert bool((MULTIPLIERS % 2 == 1).all() and (MULTIPLIERS > 0).all())

    @pytest.mark.parametrize("size", [0, 1, BLOCK - 1, BLOCK, BLOCK + 1, 5 * BLOCK + 3, CHUNK, CHUNK + BLOCK + 1])
    def test_is_the_same_with_and_without_compiled_loops(self, size):
        x = torch.randn(size)
        assert digest(x) == digest_in_torch(x.view(torch.int32))
        exact = 0
        for start in range(0, min(size, 8 * BLOCK), BLOCK):
            words = x.view(torch.int32)[start : start + BLOCK].tolist()
            exact = exact * 0x9E3779B97F4A7C15 + sum(w * int(m) for w, m in zip(words, MULTIPLIERS, strict=False))
        if size < 8 * BLOCK:
            assert digest(x) % 2**64 == exact % 2**64

    def test_every_word_counts(self):
        x = torch.zeros(3 * BLOCK)
        found = {digest(x)}
        for place in range(len(x)):
            for bit in (0, 31):
                changed = x.clone()
                changed.view(torch.int32)[place] = -(2**31) if bit == 31 else 1
                found.add(digest(changed))
        assert len(found) == 2 * len(x) + 1

    def test_every_two_places_are_told_apart(self):
        """Of weights on a coarse grid, whose low bits are all 0."""
        x = torch.zeros(64)
        x[0] = 1.0
        found = {digest(x.roll(place)) for place in range(64)}
        signs = {digest(1 - 2 * (torch.arange(64).view(1, -1) == torch.tensor(pair).view(-1, 1)).float().sum(0))
                 for pair in itertools.combinations(range(64), 2)}  # fmt: skip
        assert (len(found), len(signs)) == (64, 64 * 63 // 2)

    @pytest.mark.parametrize(
        "dtype", [torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int8, torch.bool]
    )
    def test_of_every_type(self, dtype):
        x = (torch.arange(40) ** 2 % 23 > 9).to(dtype)
        assert digest(x) == digest(x.clone()) == digest(x.repeat_interleave(2)[::2])
        assert len({digest(x), digest(x.flip(0)), digest(x.roll(1))}) == 3


def test_what_is_kept_is_kept_and_found_anew_after_an_edit(images):
    snn, found = converted(images), []
    kept = Derived(lambda topology: found.append(topology.graph.number) or len(found), from_weights=True)
    assert [kept.of(snn.graph), kept.of(snn.graph)] == [1, 1]
    weight_of(snn).data.neg_()
    assert [kept.of(snn.graph), kept.of(snn.graph)] == [2, 2]
    kept.clear()
    assert kept.of(snn.graph) == 3


def test_a_structure_is_the_same_for_copies_and_files_and_whatever_the_weights(images, tmp_path):
    snn = converted(images)
    snn.save(tmp_path / "net")
    other = copy.deepcopy(snn)
    loaded = quartz_plugin.load(tmp_path / "net")
    weight_of(other).data.neg_()
    number = structure_of(snn.graph).number
    assert number == structure_of(other.graph).number == structure_of(loaded.graph).number
    assert snapshot_of(snn.graph).fingerprint == snapshot_of(loaded.graph).fingerprint
    assert number != structure_of(converted(images, hold=False).graph).number


def test_a_network_is_itself_while_it_learns_and_its_copy_until_then(images):
    snn = converted(images)
    first, copied = identity_of(snn.graph), copy.deepcopy(snn)
    assert first is not None
    assert identity_of(copied.graph).is_that_of(first)
    weight_of(snn).data.neg_()
    assert identity_of(snn.graph).is_that_of(first)
    assert not identity_of(copied.graph).is_that_of(identity_of(snn.graph))
    assert not Identity(1, 2, 3).is_that_of(Identity(1, 1, 3))
    snn.graph_module.get_submodule("2").stride = 1
    assert not identity_of(snn.graph).is_that_of(first)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("hold", [True, False])
def test_what_is_not_finite_is_refused_alike_by_all_engines(images, hold, value):
    for where in (lambda snn: weight_of(snn), lambda snn: snn.graph.layers[-1].neuron.bias):
        snn = converted(images, hold=hold)
        for engine in ["auto", "stepped", *(["analytic"] if hold else [])]:
            snn.run(images, engine)
        before = where(snn).detach().flatten()[1].clone()
        where(snn).data.view(-1)[1] = value
        for engine in ["auto", "stepped", "event", *(["analytic"] if hold else [])]:
            with pytest.raises(ValueError, match=r"^\w+\.(weight|bias) of the network contains NaN or infinity$"):
                snn.run(images, engine)
        where(snn).data.view(-1)[1] = before
        assert bool(snn(images).isfinite().all())


def test_what_is_not_finite_is_refused_in_a_dense_first_layer(images):
    snn = converted(images, first_layer="dense")
    snn.dense_stem.layer.weight.data[0, 0, 0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"^front\.layer\.weight of the network contains NaN or infinity$"):
        snn(images)


def test_large_weights_are_finite(images):
    snn = converted(images)
    snn.graph_module.get_submodule("4").weight.data.fill_(3e38)
    snn(images)
