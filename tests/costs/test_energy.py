"""Energy profiles by hand arithmetic, and what an ANN costs, counted multiplication by multiplication."""

import copy
import itertools
import math
import pickle

import pytest
import torch
from helpers.mnist import paper_network
from torch import nn

import quartz_plugin
from quartz_plugin.costs import (
    COUNTS,
    HOROWITZ_FLOAT32,
    HOROWITZ_INT8,
    LOIHI,
    EnergyProfile,
    InferenceCounts,
    ann_costs,
    paper_profile,
)
from quartz_plugin.costs.energy import add_bits, mac_bits
from quartz_plugin.figures import FIGURES
from quartz_plugin.metrics import EnergyEstimate

PROFILES = [HOROWITZ_FLOAT32, HOROWITZ_INT8, LOIHI, paper_profile(16), paper_profile(16, strict=True)]
every_profile = pytest.mark.parametrize("profile", PROFILES, ids=lambda profile: profile.name)


# ------------------------------------------------------------------------------------------------- profiles


@pytest.mark.parametrize(
    ("first", "second", "bits"), [(4, 32, 46), (32, 4, 46), (1, 32, 47.5), (8, 8, 8), (math.log2(64), 32, 45)]
)
def test_an_addition_costs_the_longer_number_and_half_the_difference(first, second, bits):
    assert add_bits(first, second) == bits


def test_a_multiplication_costs_one_number_times_the_other():
    assert mac_bits(32, 8) == 256
    assert mac_bits(8, 8) == 64


@pytest.mark.parametrize(("t_max", "addition"), [(2, 47.5), (4, 47), (16, 46), (64, 45)])
def test_the_paper_adds_log2_t_bits_to_32_and_multiplies_32_by_8(t_max, addition):
    profile, strict = paper_profile(t_max), paper_profile(t_max, strict=True)
    assert profile.energy({"operations": 1000.0, "operations_strict": 7.0}) == 1000 * addition
    assert strict.energy({"operations": 1000.0, "operations_strict": 7.0}) == 7 * addition
    assert profile.energy({"macs": 1000.0}, of="ann") == strict.energy({"macs": 1000.0}, of="ann") == 256_000
    assert {profile.name, strict.name} == {"paper", "paper_strict"}
    assert profile.unit == "1-bit additions"


def test_on_the_papers_profile_mnist_at_t_16_costs_an_eighth_of_the_ann():
    """225,840 multiplications against 171 k additions (DESIGN.md, section 7)."""
    profile = paper_profile(16)
    ratio = profile.energy({"operations": 171_000}) / profile.energy({"macs": 225_840}, of="ann")
    assert ratio == pytest.approx(0.136, abs=0.001)


def test_loihi_costs_what_davies_et_al_measured():
    """23.6 pJ a synaptic operation, two of them a readout, 81 and 52 pJ an update, 1.7 pJ a spike."""
    counts = dict.fromkeys(LOIHI.spiking, 0.0)
    one = {name: LOIHI.energy({**counts, name: 1.0}) * 1e12 for name in counts}
    assert one == pytest.approx(
        {
            "synops": 23.6,
            "bias_events": 23.6,
            "readout_events": 47.2,
            "rectifier_events": 23.6,
            "hold_events": 23.6,
            "pool_events": 23.6,
            "active_updates": 81.0,
            "inactive_updates": 52.0,
            "spikes": 1.7,
        }
    )
    assert LOIHI.unit == "J"
    with pytest.raises(ValueError, match="'loihi' has no energies for an ANN"):
        LOIHI.energy({"macs": 1.0}, of="ann")


def test_arithmetic_in_45_nm_costs_what_horowitz_lists():
    spiking = {"synops": 1e6, "graded_synops": 0.0, "active_updates": 1e5}
    assert HOROWITZ_FLOAT32.energy(spiking) == pytest.approx(1.1e6 * 0.9e-12)
    assert HOROWITZ_INT8.energy(spiking) == pytest.approx(1.1e6 * 0.1e-12)
    assert HOROWITZ_FLOAT32.energy({"macs": 1e6}, of="ann") == pytest.approx(1e6 * (3.7e-12 + 0.9e-12))
    assert HOROWITZ_INT8.energy({"macs": 1e6}, of="ann") == pytest.approx(1e6 * (0.2e-12 + 0.1e-12))


def test_an_operation_on_a_number_costs_a_multiplication_more():
    spikes, numbers = ({"synops": 1e6, "graded_synops": n, "active_updates": 0.0} for n in (0.0, 1e6))
    assert HOROWITZ_FLOAT32.energy(numbers) - HOROWITZ_FLOAT32.energy(spikes) == pytest.approx(3.7e-6)
    # An operation that is a multiplication and an addition costs what one of the ANN does.
    for profile in (HOROWITZ_FLOAT32, HOROWITZ_INT8):
        assert profile.energy(numbers) == pytest.approx(profile.energy({"macs": 1e6}, of="ann"))


@every_profile
def test_the_profiles_that_come_along_read_counts_that_there_are(profile):
    assert set(profile.spiking) <= set(COUNTS)
    assert set(profile.ann) <= {"macs", "nonzero_macs", "memory_reads", "memory_writes"}
    assert profile.source


def test_a_profile_of_ones_own_takes_ten_lines():
    snn = quartz_plugin.convert(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)), torch.rand(32, 4), t_max=16)
    mine = EnergyProfile(
        name="my chip",
        source="its manual",
        spiking={"synops": 10e-12, "memory_reads": 5e-12, "spikes": 1e-12},
        ann={"macs": 100e-12, "memory_writes": 50e-12},
    )
    metric = EnergyEstimate(snn, mine)
    metric.update(snn.run(torch.rand(5, 4)))
    energy = metric.compute()
    # Everybody fires: 56 synapses, 4 + 8 spikes and those of outputs, of which some are silent; reads as counted.
    counts = InferenceCounts(snn.graph, snn.run(torch.rand(1, 4)))
    assert list(energy) == ["energy_my chip", "energy_my chip/input", "energy_my chip/1", "energy_my chip/output"]
    assert float(energy["energy_my chip/input"]) == pytest.approx(4e-12)
    reads = float(counts["memory_reads"]["1"][0] - counts["synops_merged"]["1"][0])
    assert reads == 4 * 8 * 16
    assert float(energy["energy_my chip/1"]) > 32 * 10e-12 + reads * 5e-12 + 8e-12 - 1e-15
    assert mine.energy({"macs": 56.0, "memory_writes": 11.0}, of="ann") == pytest.approx(6.15e-9)


def test_energies_of_tensors_are_tensors():
    profile = EnergyProfile("mine", "", spiking={"synops": 2.0, "spikes": 1.0})
    energy = profile.energy({"synops": torch.tensor([1.0, 2.0]), "spikes": torch.tensor([3.0, 4.0])})
    assert energy.tolist() == [5.0, 8.0]


def test_the_costs_of_an_ann_have_an_energy():
    ann = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    costs = ann_costs(ann, torch.rand(5, 4))
    assert HOROWITZ_FLOAT32.energy(costs, of="ann") == pytest.approx(56 * 4.6e-12)
    assert paper_profile(16).energy(costs, of="ann") == 56 * 256


def test_the_counts_of_a_simulation_have_an_energy():
    snn = quartz_plugin.convert(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)), torch.rand(32, 4))
    counts = InferenceCounts(snn.graph, snn.run(torch.rand(6, 4))).mean()
    by_hand = sum(LOIHI.spiking[name] * counts[name] for name in LOIHI.spiking)
    assert LOIHI.energy(counts) == pytest.approx(by_hand)
    assert by_hand > 56 * 23.6e-12


def test_missing_counts_are_named_with_those_that_are_there():
    profile = EnergyProfile("mine", "", spiking={"synops": 1.0, "spikes": 1.0, "bias_events": 1.0})
    with pytest.raises(ValueError, match=r"'mine' needs \['spikes', 'bias_events'\]; given are \['macs', 'synops'\]"):
        profile.energy({"synops": 1.0, "macs": 1.0})


@pytest.mark.parametrize("bad", [-1e-12, math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("kind", ["spiking", "ann"])
def test_energies_that_are_none_are_refused(bad, kind):
    with pytest.raises(ValueError, match=r"energies must be numbers of 0 or more, those of \['synops'\] are not"):
        EnergyProfile("mine", "", **{kind: {"synops": bad, "macs": 1.0, "spikes": 0.0}})


def test_a_profile_without_energies_of_a_kind_refuses_that_kind():
    with pytest.raises(ValueError, match="'a' has no energies for an ANN"):
        EnergyProfile("a", "", spiking={"synops": 1.0}).energy({"macs": 1.0}, of="ann")
    with pytest.raises(ValueError, match="'b' has no energies for spiking networks"):
        EnergyProfile("b", "", ann={"macs": 1.0}).energy({"synops": 1.0})


@every_profile
def test_a_profile_survives_pickling_and_copies(profile):
    for copied in (pickle.loads(pickle.dumps(profile)), copy.deepcopy(profile), copy.copy(profile)):
        assert copied == profile
        assert copied.spiking == profile.spiking
        assert (copied.name, copied.source, copied.unit) == (profile.name, profile.source, profile.unit)


def test_a_profile_does_not_change_with_the_dict_it_was_made_of():
    costs = {"synops": 1.0}
    profile = EnergyProfile("mine", "", spiking=costs)
    costs["synops"] = 5.0
    assert profile.energy({"synops": 1.0}) == 1.0
    with pytest.raises(TypeError):
        profile.spiking["synops"] = 2.0


# ------------------------------------------------------------------------------------------- costs of an ANN


class Small(nn.Module):
    """Padding, stride, groups, dilation, a map that is called twice, and dropout, which eval mode leaves out."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(2, 4, 3, stride=2, padding=1)
        self.second = nn.Conv2d(4, 6, (3, 2), padding=(2, 1), groups=2, dilation=(2, 1), bias=False)
        self.twice = nn.Linear(5, 5)
        self.norm, self.drop = nn.BatchNorm2d(4), nn.Dropout(0.9)

    def forward(self, x):
        x = self.drop(self.norm(self.first(x)).relu())
        x = self.second(x).relu()
        return self.twice(self.twice(x).relu()).flatten(1)


def products(conv, x, out):
    """Each product of a convolution: how many inputs times weights there are, and of inputs that are not 0."""
    macs = nonzero = 0
    batch, channels = x.shape[:2]
    per_group, outputs = channels // conv.groups, conv.out_channels // conv.groups
    for b, o, y, z in itertools.product(range(batch), range(conv.out_channels), *(range(n) for n in out.shape[2:])):
        for i, dy, dz in itertools.product(range(per_group), *(range(n) for n in conv.kernel_size)):
            row = y * conv.stride[0] - conv.padding[0] + dy * conv.dilation[0]
            column = z * conv.stride[1] - conv.padding[1] + dz * conv.dilation[1]
            if 0 <= row < x.shape[2] and 0 <= column < x.shape[3]:
                macs += 1
                nonzero += bool(x[b, o // outputs * per_group + i, row, column] != 0)
    return macs, nonzero


def test_multiplications_of_an_ann_are_those_of_nested_loops():
    ann, images = Small(), torch.rand(3, 2, 5, 7)
    ann.norm.running_mean.uniform_(-0.2, 0.2)
    images[images < 0.4] = 0.0
    twin = copy.deepcopy(ann).eval()
    with torch.no_grad():
        first = twin.first(images)
        rectified = twin.norm(first).relu()
        second = twin.second(rectified)
        once = second.relu()
        again = twin.twice(once).relu()
    loops = {"first": products(ann.first, images, first), "second": products(ann.second, rectified, second)}
    loops["twice"] = (5 * (once.numel() + again.numel()), 5 * int((once != 0).sum() + (again != 0).sum()))
    outputs = first.numel() + second.numel() + 2 * once.numel()
    costs = ann_costs(ann, images)
    assert once.shape[-1] == 5
    for module, (macs, nonzero) in loops.items():
        assert costs[f"macs/{module}"] == pytest.approx(macs / 3)
        assert costs[f"nonzero_macs/{module}"] == pytest.approx(nonzero / 3)
        assert 0 < nonzero < macs
    macs = sum(each for each, _ in loops.values())
    assert costs["macs"] == pytest.approx(macs / 3)
    assert costs["nonzero_macs"] == pytest.approx(sum(each for _, each in loops.values()) / 3)
    assert costs["memory_reads"] == pytest.approx(2 * macs / 3)
    assert costs["memory_writes"] == pytest.approx(outputs / 3)
    names = {"macs", "nonzero_macs", "memory_reads", "memory_writes"}
    assert set(costs) == names | {f"{kind}/{module}" for kind in ("macs", "nonzero_macs") for module in loops}


def test_an_ann_is_as_it_was_when_its_costs_are_known():
    ann = Small()
    ann.norm.eval()
    modes = {name: module.training for name, module in ann.named_modules()}
    state = copy.deepcopy(ann.state_dict())
    random = torch.get_rng_state()
    ann_costs(ann, torch.rand(3, 2, 5, 7, generator=torch.Generator().manual_seed(1)))
    assert {name: module.training for name, module in ann.named_modules()} == modes
    assert all(torch.equal(value, state[name]) for name, value in ann.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)
    assert all(parameter.grad is None and parameter.requires_grad for parameter in ann.parameters())
    with pytest.raises(RuntimeError):
        ann_costs(ann, torch.rand(3, 1, 5, 7))
    assert {name: module.training for name, module in ann.named_modules()} == modes
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in ann.modules())


def test_costs_are_means_over_images():
    ann, images = nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 2)), torch.rand(9, 6)
    images[images < 0.5] = 0.0
    each = [ann_costs(ann, image.unsqueeze(0)) for image in images]
    whole = ann_costs(ann, images)
    for name, mean in whole.items():
        assert mean == pytest.approx(sum(costs[name] for costs in each) / 9)
    with pytest.raises(ValueError, match="no images"):
        ann_costs(ann, images[:0])


def test_an_ann_without_weights_costs_nothing():
    costs = ann_costs(nn.Sequential(nn.Flatten(), nn.ReLU()), torch.rand(2, 3, 4))
    assert costs == {"macs": 0, "nonzero_macs": 0, "memory_reads": 0, "memory_writes": 0}


def test_the_papers_mnist_network_multiplies_225_840_times():
    costs = ann_costs(paper_network(), torch.rand(4, 1, 28, 28))
    macs = {"0": 24 * 24 * 6 * 25, "3": 8 * 8 * 12 * 6 * 25, "6": 120 * 12 * 16, "10": 1200}
    assert sum(macs.values()) == 225_840
    assert costs["macs"] == 225_840
    assert {name: costs[f"macs/{name}"] for name in macs} == macs
    assert costs["memory_reads"] == 451_680
    # Sums that are written: 4,354 of them.
    assert costs["memory_writes"] == 24 * 24 * 6 + 8 * 8 * 12 + 120 + 10 == 4354
    assert costs["nonzero_macs/0"] == macs["0"]
    assert costs["nonzero_macs"] < 225_840


@pytest.mark.shared
def test_of_the_trained_network_most_multiplications_are_by_zero(mnist_ann, mnist_test):
    images = mnist_test[0][:50]
    costs = ann_costs(mnist_ann, images)
    assert costs["macs"] == 225_840
    dark = float((images == 0).double().mean())
    assert 0.7 < dark < 0.9
    # A pixel within meets 25 weights of 6 channels each, and the digits are in the middle.
    assert costs["nonzero_macs/0"] == pytest.approx(float((images[:, :, 4:24, 4:24] != 0).sum()) / 50 * 150, rel=0.05)
    assert not mnist_ann.training


@every_profile
def test_every_profile_of_the_recipes_names_a_figure_of_the_table(profile):
    assert profile.figure in FIGURES
