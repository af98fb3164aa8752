"""The table of operators: each row is complete, each reader reads it, and a new operator is one new row."""

import ast
import copy
from pathlib import Path

import pytest
import torch
from helpers.conversions import assert_same_spikes
from helpers.one_by_one import MAPS, OneByOne, as_lists, changes_on_the_clock
from helpers.random_graphs import Clock, make_exact
from helpers.rows import added_row
from torch import nn
from torch.nn import functional as F

import quartz_plugin
from quartz_plugin.convert.calls import function_name
from quartz_plugin.costs import InferenceCounts
from quartz_plugin.graph.synapses import fan_out, probed_fan_out, unit_shapes
from quartz_plugin.neuron import FirstSpikeMaxPool
from quartz_plugin.operators.gains import IntoGain, IntoWeights, Mixed, Moved, Summed
from quartz_plugin.operators.linear_map import LinearMap, as_convolution
from quartz_plugin.operators.modules import Permute
from quartz_plugin.operators.row import Operator, Role
from quartz_plugin.operators.settings import whole
from quartz_plugin.operators.table import (
    EMITTED,
    FUNCTIONS,
    NORMS,
    OPERATORS,
    Affine,
    moves_spikes,
    row_of,
    weighs,
    weights_of,
)

ROWS = OPERATORS | EMITTED


class TestRows:
    @pytest.mark.parametrize("kind", ROWS, ids=lambda kind: kind.__name__)
    def test_are_complete_for_their_role(self, kind):
        row = ROWS[kind]
        assert isinstance(row.role, Role)
        assert row.how
        assert row.exact.startswith("exact")
        if row.role in (Role.NOTHING, Role.RECTIFIER) or kind in (*NORMS, Affine, nn.UpsamplingBilinear2d, nn.Unfold):
            # Nothing of it is in a converted network; of neurons a file keeps the settings.
            assert (row.relate, row.form) == (None, None)
            assert (row.settings is None) == (kind in OPERATORS)
            assert isinstance(row.gain, IntoGain if kind is Affine else type(None))
            return
        assert row.settings is not None
        if row.role is Role.ROUTE:
            assert isinstance(row.gain, Moved)
            assert row.relate is not None
        elif row.role is Role.MAX_POOL:
            assert row.relate is not None
            assert isinstance(row.gain, Mixed)
        else:
            assert row.relate is not None
            assert row.form is not None
            assert isinstance(row.gain, IntoWeights | Mixed | Summed) or kind in EMITTED

    def test_every_function_belongs_to_a_row(self):
        rows = dict.fromkeys(OPERATORS.values())
        builders = [(target, build) for row in rows for build, targets in row.functions.items() for target in targets]
        assert {target: function.build for target, function in FUNCTIONS.items()} == dict(builders)
        assert len(set(builders)) == len(FUNCTIONS), "two rows want one function"
        assert all(function.build in function.row.functions for function in FUNCTIONS.values())

    @pytest.mark.parametrize("target", FUNCTIONS, ids=function_name)
    def test_a_function_changes_its_first_argument_where_its_row_has_it(self, target):
        name = function_name(target)
        assert FUNCTIONS[target].in_place == (name.endswith("_") or name in ("iadd", "isub", "imul", "itruediv"))
        assert all(each in FUNCTIONS for each in FUNCTIONS[target].row.in_place)
        assert FUNCTIONS[F.relu].changes_first_argument((None, True), {})
        assert FUNCTIONS[F.dropout].changes_first_argument((None,), {"inplace": True})

    def test_the_max_pools_are_those_that_first_spikes_are_pooled_by(self):
        pools = [kind for kind, row in OPERATORS.items() if row.role is Role.MAX_POOL]
        assert len(pools) == 6
        assert all(FirstSpikeMaxPool(kind(2)).pool for kind in pools)

    @pytest.mark.parametrize("padding_mode", ["zeros", "circular"])
    @pytest.mark.parametrize(
        ("kind", "arguments", "shape"),
        [
            (nn.Conv1d, (4, 6, 3, 2, 1, 1, 2), (2, 4, 9)),
            (nn.Conv2d, (4, 6, (3, 2), 2, (1, 0), 1, 2), (2, 4, 7, 8)),
            (nn.Conv2d, (4, 6, 3, 1, "same"), (2, 4, 7, 8)),
            (nn.Linear, (4, 6), (2, 4)),
            (nn.ConvTranspose2d, (4, 6, 3, 2, 1, 1, 2), (2, 4, 5, 5)),
        ],
    )
    def test_weights_know_their_outputs_and_how_a_bias_is_added(self, kind, arguments, shape, padding_mode):
        padded = issubclass(kind, nn.Conv1d | nn.Conv2d)
        module = kind(*arguments, bias=False, **({"padding_mode": padding_mode} if padded else {}))
        rule, x, bias = weights_of(module), torch.rand(shape), torch.arange(6.0)
        assert rule.bias_shape(module)[0] == 6
        assert module.weight.shape[rule.output_dim] * getattr(module, "groups", 1) in (6, 12)
        wanted = module(x) + bias.view(rule.bias_shape(module))
        assert (rule.with_bias is None) == (kind is nn.ConvTranspose2d)
        if rule.with_bias is not None:
            torch.testing.assert_close(rule.with_bias(module, x, bias), wanted)
        module.bias = nn.Parameter(bias)
        torch.testing.assert_close(module(x), wanted)

    def test_no_class_has_two_rows(self):
        assert not set(OPERATORS) & set(EMITTED)
        names = [kind.__name__ for kind, row in ROWS.items() if row.settings is not None]
        assert len(names) == len(set(names)), "a file could not tell them apart"


READERS = (
    *("graph/synapses.py", "graph/wellformed.py", "graph/files.py", "graph/topology.py", "graph/walk.py"),
    *("engines/convolutions.py", "engines/event/plan.py", "costs/levels.py", "costs/counts.py", "costs/synops.py"),
    "intake.py",
    *(f"convert/{stage}.py" for stage in ("trace", "build", "symbolic", "check", "rescale", "fold")),
)
NEURONS = {"TTFSNeuron", "AxonalDelay", "TTFSActivation"}


@pytest.mark.parametrize("reader", READERS)
def test_readers_look_rows_up_and_ask_for_no_classes(reader):
    tree = ast.parse((Path(quartz_plugin.__file__).parent / reader).read_text())
    kinds = {kind.__name__ for kind in ROWS} - NEURONS
    asked = [call for call in ast.walk(tree) if isinstance(call, ast.Call) and ast.unparse(call.func) == "isinstance"]
    words = {
        word
        for call in asked
        for each in ast.walk(call.args[1])
        for word in (getattr(each, "attr", ""), getattr(each, "id", ""))
    }
    assert not words & kinds


class Mirrored(nn.Module):
    """Routes: the last dimension backwards, `places` further on."""

    def __init__(self, places):
        super().__init__()
        self.places = places

    def forward(self, x):
        return x.flip(-1).roll(self.places, -1)


class Neighbours(nn.Module):
    """Weighs: sums of each unit of a row and the one `gap` units on."""

    def __init__(self, gap):
        super().__init__()
        self.gap = gap

    def forward(self, x):
        return x[..., self.gap :] + x[..., : x.shape[-1] - self.gap]


def along_rows(relation, module, place, shapes):
    relation.along(-1, module)


def neighbours_as_map(module, shape, out_shape):
    if len(out_shape) == 1:
        return None
    return LinearMap(weight=torch.ones(shape[0], 1, 1, 2), dilation=(1, module.gap), groups=shape[0])


def mirrored_twice(append, value):
    """Two quarter turns: backwards in both dimensions of space."""
    for _ in range(2):
        value = append(Permute((0, 1, 3, 2)), append(Mirrored(0), value))
    return value


MIRRORED = Operator(
    role=Role.ROUTE,
    how="mirrored",
    functions={lambda append, input, times, dims: mirrored_twice(append, input): ["rot90"]},
    settings={"places": whole(0)},
    relate=along_rows,
    form=None,
    gain=Moved(),
)
NEIGHBOURS = Operator(
    role=Role.SYNAPSE,
    how="sums of neighbours",
    settings={"gap": whole(1)},
    relate=along_rows,
    form=as_convolution(neighbours_as_map),
    gain=Mixed(lambda module: (-1,)),
    keeps_sign=True,
)


class Flipping(nn.Module):
    """Calls the method that the first row is for."""

    def forward(self, x):
        return x.rot90(2, (2, 3))


@pytest.fixture
def toys():
    with added_row(Mirrored, MIRRORED), added_row(Neighbours, NEIGHBOURS):
        yield
    assert row_of(Mirrored(1)) is None
    assert "rot90" not in FUNCTIONS


TOYS = {
    "of spikes": [
        nn.Conv2d(1, 3, 3),
        nn.ReLU(),
        Mirrored(2),
        Neighbours(1),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.LazyLinear(4),
    ],
    "behind weights": [
        nn.Conv2d(1, 3, 3),
        Neighbours(2),
        nn.Conv2d(3, 6, 2),
        nn.ReLU(),
        nn.Flatten(),
        nn.LazyLinear(4),
    ],
    "routed behind weights": [nn.Conv2d(1, 3, 3), Mirrored(1), nn.ReLU(), Neighbours(1), nn.ReLU(), nn.Flatten()],
    "by a method": [Flipping(), nn.Conv2d(1, 3, 3), nn.ReLU(), Flipping(), nn.Flatten(), nn.LazyLinear(4)],
}


@pytest.mark.parametrize("hold", [True, False])
@pytest.mark.parametrize("granularity", ["layer", "channel"])
@pytest.mark.parametrize("name", TOYS)
def test_one_new_row_is_a_new_operator(toys, name, granularity, hold, tmp_path):
    torch.manual_seed(3)
    ann, images = nn.Sequential(*copy.deepcopy(TOYS[name])), torch.rand(40, 1, 7, 7)
    ann(images)
    fine = quartz_plugin.convert(ann.double(), images, t_max=1 << 20, percentile=100, granularity=granularity)
    torch.testing.assert_close(fine(images), ann(images.double()).detach(), rtol=0, atol=2e-4)

    snn = make_exact(quartz_plugin.convert(ann, images, 9, granularity=granularity, hold=hold))
    stepped = snn.run(images[:3], engine="stepped")
    assert_same_spikes(stepped.spike_steps, Clock(snn, images[:3]).spike_steps)
    for engine in ("event", *(["analytic"] if hold else [])):
        assert_same_spikes(snn.run(images[:3], engine=engine).spike_steps, stepped.spike_steps)

    judge = OneByOne(snn, stepped)
    judge.maps = (*MAPS, Neighbours)
    counted = InferenceCounts(snn, stepped)
    assert as_lists(counted["synops"]) == judge.synops()
    assert as_lists(counted["synops_factored"]) == judge.synops_factored()
    assert as_lists(counted["synops_merged"]) == as_lists(changes_on_the_clock(snn, images[:3]))
    shapes = unit_shapes(snn.graph)
    for layer in snn.graph.layers:
        found, probed = fan_out(layer.projection, shapes), probed_fan_out(layer.projection, shapes)
        assert all(torch.equal(found[source], probed[source]) for source in probed)

    snn.save(tmp_path / "snn.safetensors")
    assert torch.equal(quartz_plugin.load(tmp_path / "snn.safetensors")(images), snn(images))


def test_a_network_with_a_row_that_is_gone_is_not_read(tmp_path):
    ann, images = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), Mirrored(1), nn.Linear(4, 2)), torch.rand(20, 4)
    with added_row(Mirrored, MIRRORED):
        quartz_plugin.convert(ann, images).save(tmp_path / "snn.safetensors")
    with pytest.raises(ValueError, match=r"'2' is of an unknown module class.*'Mirrored'"):
        quartz_plugin.load(tmp_path / "snn.safetensors")


class Own(nn.Module):
    """Has no row: sums of two paths, the second backwards."""

    def forward(self, a, b):
        return a + b.flip(-1)


def test_a_module_without_a_row_in_a_network_edited_by_hand_is_probed():
    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second, self.last = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 3)

        def forward(self, x):
            x = self.first(x).relu()
            return self.last((x + self.second(x)).relu())

    images = torch.rand(20, 4)
    snn = make_exact(quartz_plugin.convert(Residual(), images, 9))
    snn.graph_module.set_submodule("add", Own())
    stepped = snn.run(images[:3], engine="stepped")
    for engine in ("event", "analytic"):
        assert_same_spikes(snn.run(images[:3], engine=engine).spike_steps, stepped.spike_steps)
    shapes = unit_shapes(snn.graph)
    for layer in snn.graph.layers:
        found, probed = fan_out(layer.projection, shapes), probed_fan_out(layer.projection, shapes)
        assert all(torch.equal(found[source], probed[source]) for source in probed)
    counted = InferenceCounts(snn, stepped)
    assert as_lists(counted["synops"]) == OneByOne(snn, stepped).synops()
    # The linear map, one synapse a unit for the scale of the other path, and one a unit and input of the module itself.
    assert as_lists(counted["synops_factored"])[snn.graph.layers[1].name] == [36 + 6 + 12] * 3
    with pytest.raises(ValueError, match="cannot save 'add': the file format does not know Own"):
        snn.save("nowhere.safetensors")


class TestAnAverageToTheSizeThatIsThere:
    """As in front of a VGG's classifier: it moves spikes, for everything that reads the network."""

    @pytest.fixture
    def networks(self):
        torch.manual_seed(1)
        images = torch.rand(30, 2, 6, 6)
        made = {}
        for name, middle in {"average": nn.AdaptiveAvgPool2d((4, None)), "nothing": nn.Identity()}.items():
            torch.manual_seed(2)
            ann = nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(), middle, nn.MaxPool2d(2), nn.Flatten(), nn.Linear(12, 4))
            made[name] = make_exact(quartz_plugin.convert(ann, images, 9, granularity="channel"))
        return made, images

    def test_is_one_answer(self):
        pool, shape = nn.AdaptiveAvgPool2d((4, 4)), (3, 4, 4)
        assert (moves_spikes(pool, shape), weighs(pool, shape)) == (True, False)
        assert (moves_spikes(pool, (3, 8, 8)), weighs(pool, (3, 8, 8))) == (False, True)

    @pytest.mark.parametrize("weight_bits", [None, 8])
    def test_needs_no_neurons_and_no_synapses(self, networks, weight_bits):
        ann = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.AdaptiveAvgPool1d(6), nn.Linear(6, 3))
        report = quartz_plugin.convert(ann, torch.rand(30, 2, 6), weight_bits=weight_bits).report
        assert [row["became"] for row in report] == [
            *("synapses", "spiking layer", "routing", "synapses", "output layer")
        ]
        assert report[-1]["synapses_factored"] == report[-1]["synapses"]
        (average, nothing), _ = networks[0].values(), networks[1]
        assert [layer.name for layer in average.graph.layers] == [layer.name for layer in nothing.graph.layers]

    @pytest.mark.parametrize("engine", ["stepped", "analytic", "event"])
    def test_is_counted_like_brute_force(self, networks, engine):
        made, images = networks
        results = {name: snn.run(images[:4], engine=engine) for name, snn in made.items()}
        assert_same_spikes(results["average"].spike_steps, results["nothing"].spike_steps)
        counted = {name: InferenceCounts(snn, results[name]) for name, snn in made.items()}
        for count in ("synops", "synops_factored", "synops_merged"):
            assert as_lists(counted["average"][count]) == as_lists(counted["nothing"][count])
        judge = OneByOne(made["average"], results["average"])
        assert as_lists(counted["average"]["synops_factored"]) == judge.synops_factored()
        assert as_lists(counted["average"]["synops"]) == judge.synops()
