"""Random graphs of layers: converted, they spike when DESIGN.md's clock says, and say what the ANN says."""

import copy
import math
import re

import pytest
import torch
from helpers.conversions import LINEAR, PERCENTILES, T_MAXIMA, assert_same_spikes, conversions, engines_of
from helpers.random_chains import HELD, MANY, NEURONS, SOME, first_spikes, input_train
from helpers.random_graphs import (
    Clock,
    assert_the_ann_agrees,
    assert_the_clock_agrees,
    make_exact,
    random_nets,
)
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

import quartz_plugin
from quartz_plugin import AxonalDelay, ConversionError, TTFSNeuron


@MANY
@given(conversions(exact=True))
def test_on_fixed_point_weights_every_layer_spikes_when_the_global_clock_says(conversion):
    net, snn = conversion
    clock = Clock(snn, net.images)
    for engine in engines_of(snn):
        assert_same_spikes(snn.run(net.images, engine=engine).spike_steps, clock.spike_steps)


@MANY
@given(conversions())
def test_on_free_weights_every_layer_spikes_when_the_clock_says_but_for_ties(conversion):
    net, snn = conversion
    for engine in engines_of(snn):
        assert_the_clock_agrees(snn, net.images, snn.run(net.images, engine=engine).spike_steps)


@MANY
@given(conversions(HELD))
def test_held_neurons_say_what_the_ann_computes_from_rounded_values(conversion):
    net, snn = conversion
    for engine in engines_of(snn):
        assert_the_ann_agrees(net, snn, snn.run(net.images, engine=engine).spike_steps)


@SOME
@given(conversions())
def test_exports_stepped_by_hand_spike_when_the_stepped_engine_says(conversion):
    net, snn = conversion
    result = snn.run(net.images, engine="stepped")
    train = input_train(snn, net.images)
    snntorch, norse = snn.to_snntorch(), snn.to_norse()
    for _ in range(2):
        state, outputs = None, []
        for spikes in train:
            out, state = norse(spikes, state)
            outputs.append(out)
        assert torch.equal(first_spikes(outputs), result.spike_steps[result.output])
        assert torch.equal(snn.decode(torch.stack(outputs)), result.outputs)
        heard = [snntorch(spikes) for spikes in train]
        assert torch.equal(torch.stack(heard), torch.stack(outputs))
        quartz_plugin.reset(snntorch)


@SOME
@given(conversions())
def test_all_layers_of_the_export_spike_when_the_stepped_engine_says(conversion):
    net, snn = conversion
    stepped = snn.to_snntorch()
    heard = {name: [] for name, module in stepped.named_modules() if isinstance(module, TTFSNeuron)}
    for name, spikes in heard.items():
        stepped.get_submodule(name).register_forward_hook(lambda m, inputs, out, spikes=spikes: spikes.append(out))
    for spikes in input_train(snn, net.images):
        stepped(spikes)
    # A chain's modules have names without dots.
    expected = {name.replace(".", "_"): s for name, s in snn.run(net.images, "stepped").spike_steps.items()}
    assert len(heard) == len(snn.graph.layers)
    for name, spikes in heard.items():
        assert torch.equal(first_spikes(spikes), expected[name.replace(".", "_")]), name


@SOME
@given(conversions(), st.data())
def test_copies_and_files_are_the_same_network(tmp_path_factory, conversion, data):
    net, snn = conversion
    logits = snn(net.images)
    path = tmp_path_factory.mktemp("graphs") / "snn.safetensors"
    snn.save(path)
    loaded = quartz_plugin.load(path)
    for other in (loaded, copy.deepcopy(snn)):
        assert torch.equal(other(net.images), logits)
        assert list(other.report) == list(snn.report)
        assert other.windows == snn.windows
    # Weights and biases are all there is to a network of this shape.
    state = {name: value.clone() for name, value in snn.state_dict().items()}
    with torch.no_grad():
        for value in snn.state_dict().values():
            value.zero_()
    assert torch.equal(loaded(net.images), logits)
    snn.load_state_dict(state)
    assert torch.equal(snn(net.images), logits)
    engine = data.draw(st.sampled_from(["auto", "stepped"]))
    double = snn.to(torch.float64)
    assert_the_clock_agrees(double, net.images, double.run(net.images, engine=engine).spike_steps)


@SOME
@given(conversions())
def test_converting_changes_neither_the_ann_nor_what_comes_out_the_second_time(conversion):
    net, snn = conversion
    before = copy.deepcopy(net.ann.state_dict())
    training, settings = [module.training for module in net.ann.modules()], snn.graph.settings
    again = net.convert(settings["t_max"], **{k: v for k, v in settings.items() if k not in ("t_max", "preprocessing")})
    assert torch.equal(again(net.images), snn(net.images))
    assert [module.training for module in net.ann.modules()] == training
    assert all(torch.equal(value, before[name]) for name, value in net.ann.state_dict().items())


@SOME
@given(conversions(exact=True))
def test_one_image_at_a_time_gives_the_spikes_of_the_batch(conversion):
    net, snn = conversion
    batch = snn.run(net.images, engine="stepped").spike_steps
    for index, image in enumerate(net.images):
        for name, steps in snn.run(image.unsqueeze(0), engine="stepped").spike_steps.items():
            assert torch.equal(steps[0], batch[name][index]), name


@SOME
@given(conversions(NEURONS.filter(lambda neuron: neuron["bias"] == "synapse")))
def test_every_path_takes_as_long_as_its_delays_say(conversion):
    _, snn = conversion
    module, graph = snn.graph_module, snn.graph
    # The end of the window at each node, by adding up along every path.
    ends = {}
    for node in module.graph.nodes:
        if node.op == "placeholder":
            ends[node] = {graph.t_max - 1}
            continue
        ends[node] = set().union(*(ends[source] for source in node.all_input_nodes))
        target = module.get_submodule(node.target) if node.op == "call_module" else None
        if isinstance(target, AxonalDelay):
            assert target.steps > 0
            ends[node] = {end + target.steps for end in ends[node]}
        elif isinstance(target, TTFSNeuron):
            assert ends[node] == {target.clock.readout}, node.target
            ends[node] = {target.clock.readout + target.clock.window}
    rows = {row["module"]: row for row in snn.report}
    for layer in graph.layers:
        assert rows[layer.name]["readout"] == layer.neuron.clock.readout
        assert rows[layer.name]["window"] == layer.neuron.clock.window
        assert (
            rows[layer.name]["neurons"] == snn.run(torch.zeros(1, *graph.input_shape)).spike_steps[layer.name].numel()
        )
    last = graph.layers[-1].neuron
    assert snn.n_steps >= last.clock.readout + last.clock.window * (1 if last.p.rectifier else 2) + 1


@SOME
@given(random_nets(), T_MAXIMA, LINEAR, NEURONS.filter(lambda neuron: neuron["bias"] == "synapse"))
def test_with_windows_alike_the_readout_is_the_longest_path_times_the_window(net, t_max, linear, neuron):
    snn = net.convert(t_max, linear=linear, **neuron)
    longest = {}
    for node in snn.graph_module.graph.nodes:
        module = snn.graph_module.get_submodule(node.target) if node.op == "call_module" else None
        longest[node] = max((longest[source] for source in node.all_input_nodes), default=0)
        if isinstance(module, TTFSNeuron):
            longest[node] += 1
            assert module.clock.readout == longest[node] * (t_max - 1)
    assert longest[node] <= len(snn.graph.layers)


class Skips(nn.Module):
    """Paths of one, two and four layers meet."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.third = (nn.Conv2d(2, 2, 3, padding=1) for _ in range(3))
        self.relu = nn.ReLU(inplace=True)
        self.head = nn.Linear(4 * 16, 3)

    def forward(self, x):
        short = self.relu(self.first(x))
        long = self.relu(self.second(short))
        long = self.relu(self.third(long) + x)
        return self.head(torch.cat([short, long], 1).flatten(1))


def rows(snn, column):
    """Column of the report, of the spiking layers."""
    return {row["module"]: row[column] for row in snn.report if column in row}


class TestTiming:
    @pytest.fixture
    def images(self):
        return torch.rand(20, 2, 4, 4)

    def test_windows_alike(self, images):
        snn = quartz_plugin.convert(Skips(), images, t_max=9)
        assert rows(snn, "readout") == {"relu": 8, "relu_2": 16, "relu_3": 24, "output": 32}
        # The input waits for two layers, the first layer's spikes for two as well.
        assert rows(snn, "delay") == {"relu": 0, "relu_2": 0, "relu_3": 16, "output": 16}
        assert rows(snn, "window") == dict.fromkeys(rows(snn, "window"), 8)
        assert sorted(m.steps for m in snn.graph_module.modules() if isinstance(m, AxonalDelay)) == [16, 16]
        assert snn.n_steps == (4 + 2) * 8 + 1

    def test_windows_of_their_own(self, images):
        own = {"input": {"t_max": 4}, "relu": {"t_max": 17}, "relu_3": {"t_max": 3}, "output": {"t_max": 11}}
        snn = quartz_plugin.convert(Skips(), images, t_max=9, layers=own)
        # The windows end at 3, 3 + 16, 19 + 8, 27 + 2.
        assert rows(snn, "readout") == {"relu": 3, "relu_2": 19, "relu_3": 27, "output": 29}
        assert rows(snn, "window") == {"relu": 16, "relu_2": 8, "relu_3": 2, "output": 10}
        assert rows(snn, "delay") == {"relu": 0, "relu_2": 0, "relu_3": 24, "output": 10}
        assert snn.n_steps == 29 + 2 * 10 + 1
        assert snn.t_max == 4

    def test_no_delay_where_windows_end_together(self, images):
        class Both(nn.Module):
            def __init__(self):
                super().__init__()
                self.left, self.right, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)

            def forward(self, x):
                return self.head(self.left(x).relu() + self.right(x).relu())

        snn = quartz_plugin.convert(Both(), torch.rand(30, 4), t_max=5)
        assert not [m for m in snn.graph_module.modules() if isinstance(m, AxonalDelay)]
        shorter = quartz_plugin.convert(Both(), torch.rand(30, 4), t_max=5, layers={"relu": {"t_max": 3}})
        assert [m.steps for m in shorter.graph_module.modules() if isinstance(m, AxonalDelay)] == [2]

    @pytest.mark.parametrize("engine", ["auto", "analytic", "stepped"])
    def test_a_network_that_lacks_a_delay_is_refused(self, images, engine):
        snn = quartz_plugin.convert(Skips(), images, t_max=9)
        for node in list(snn.graph_module.graph.nodes):
            if node.op == "call_module" and isinstance(snn.graph_module.get_submodule(node.target), AxonalDelay):
                node.replace_all_uses_with(node.args[0])
                snn.graph_module.graph.erase_node(node)
                break
        snn.graph_module.recompile()
        with pytest.raises(ValueError, match=r"windows that end at steps \[8, 24\] meet; delay the earlier ones"):
            snn.run(images, engine=engine)

    def test_a_layer_read_out_too_early_is_refused(self, images):
        snn = quartz_plugin.convert(Skips(), images, t_max=9)
        neuron = TTFSNeuron(9, layer=1, hold=True, init_hidden=True)
        snn.graph_module.set_submodule("relu_2", neuron)
        with pytest.raises(ValueError, match=r"at 'relu_2' windows that end at steps \[16\] meet.*read out at 8"):
            snn(images)


@st.composite
def bottlenecks(draw):
    """Inverted residual blocks: wide ReLUs between narrow linear layers, which are added up."""
    torch.manual_seed(draw(st.integers(0, 2**16)))
    depthwise, blocks, channels = draw(st.booleans()), draw(st.integers(1, 3)), draw(st.integers(1, 3))

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            wide = 2 * channels
            self.expand, self.project = nn.Conv2d(channels, wide, 1), nn.Conv2d(wide, channels, 1)
            self.middle = nn.Conv2d(wide, wide, 3, padding=1, groups=wide if depthwise else 1)
            self.norm = nn.BatchNorm2d(channels)

        def forward(self, x):
            return x + self.norm(self.project(F.relu6(self.middle(F.relu6(self.expand(x))))))

    stem, head = nn.Conv2d(2, channels, 3), nn.Linear(channels, 3)
    ann = nn.Sequential(stem, *(Block() for _ in range(blocks)), nn.AdaptiveAvgPool2d(1), nn.Flatten(), head)
    with torch.no_grad():
        for block in ann[1 : blocks + 1]:
            block.expand.bias.uniform_(0.2, 1)
            block.middle.bias.uniform_(0.2, 1)
    return ann.eval(), torch.rand(20, 2, 5, 5), blocks


@SOME
@given(bottlenecks(), T_MAXIMA, PERCENTILES, st.sampled_from(["spike", "silent"]))
def test_a_pair_says_the_rounded_value_with_its_sign(bottleneck, t_max, percentile, rectifier):
    ann, images, blocks = bottleneck
    snn = quartz_plugin.convert(
        ann, images, t_max, linear="pair", percentile=percentile, rectifier=rectifier, example_input=images[:1]
    )
    result, length = snn.run(images), t_max - 1
    pairs = [
        row["module"].removesuffix("_positive") for row in snn.report if "positive half" in row.get("operation", "")
    ]
    # The stem feeds on, every block's sum, and the last one's average.
    assert pairs == ["0", *(f"{block + 1}.add" for block in range(blocks - 1)), f"{blocks + 1}"]
    said = {}
    for path in pairs:
        halves = result.levels(f"{path}_positive"), result.levels(f"{path}_negative")
        assert not (halves[0] * halves[1]).any()
        scale = snn.graph.scales[f"{path}_positive"]
        assert torch.equal(scale, snn.graph.scales[f"{path}_negative"])
        said[path] = (halves[0] - halves[1]).double() * (scale / length)

    # The ANN with every signed value replaced by what its pair says; ReLUs by what theirs say.
    double = copy.deepcopy(ann).double()

    def rounded(value, scale):
        drive = value.double() * (length / scale)
        levels = drive.sign() * torch.floor(drive.abs() + 0.5).clamp(max=length)
        return drive, levels

    def judge(name, value, levels):
        drive, expected = rounded(value, float(snn.graph.scales[name]))
        near = (drive.abs() % 1 - 0.5).abs() < 1e-4
        assert torch.equal(levels.double()[~near], expected[~near]), name

    with torch.no_grad():
        stem = double[0]((images.double() * length + 0.5).floor() / length)
        for index, path in enumerate(pairs):
            scale = float(snn.graph.scales[f"{path}_positive"])
            value = stem if index < blocks else double[index + 1](stem)
            judge(f"{path}_positive", value, (said[path] * (length / scale)).round())
            if index == blocks:
                break
            block, x = double[index + 1], said[path]
            inner = x
            for conv, name in ((block.expand, "relu6"), (block.middle, "relu6_2")):
                layer = f"{index + 1}.{name}"
                levels = result.levels(layer)
                judge(layer, F.relu6(conv(inner)), levels)
                inner = levels.double() * (float(snn.graph.scales[layer]) / length)
            stem = x + block.norm(block.project(inner))


def test_pairs_cost_time_and_composition_none():
    torch.manual_seed(1)
    ann = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2), nn.Linear(2, 6), nn.ReLU(), nn.Linear(6, 3))
    images = torch.rand(50, 4)
    composed = quartz_plugin.convert(ann, images, t_max=8)
    paired = quartz_plugin.convert(ann, images, t_max=8, linear="pair")
    assert [layer.name for layer in composed.graph.layers] == ["1", "4", "output"]
    assert sorted(layer.name for layer in paired.graph.layers) == ["1", "2_negative", "2_positive", "4", "output"]
    assert paired.n_steps - composed.n_steps == 7
    for row in paired.report:
        assert {"module", "operation", "became", "exact"} <= row.keys(), row


class TestMixedScales:
    class Pooled(nn.Module):
        """Pools over places that were channels."""

        def __init__(self):
            super().__init__()
            self.conv, self.pool, self.head = nn.Conv2d(1, 4, 3), nn.MaxPool2d(2), nn.Linear(8, 2)

        def forward(self, x):
            x = F.relu(self.conv(x))
            return self.head(self.pool(x.permute(0, 2, 1, 3)).flatten(1))

    def test_one_scale_a_layer_pools(self):
        ann, images = self.Pooled(), torch.rand(20, 1, 6, 4)
        snn = quartz_plugin.convert(ann, images, t_max=129, percentile=100)
        wanted = ann(images)
        assert (snn(images) - wanted).abs().max() < 0.05 * wanted.abs().max()

    def test_a_scale_for_each_channel_is_refused_by_the_pools_name(self):
        with pytest.raises(ConversionError, match=r"'pool' \(MaxPool2d\).*different scales.*granularity=\"layer\""):
            quartz_plugin.convert(self.Pooled(), torch.rand(20, 1, 6, 4), granularity="channel")

    def test_branches_side_by_side_keep_their_scales(self):
        class Branches(nn.Module):
            def __init__(self):
                super().__init__()
                self.small, self.large = nn.Conv2d(1, 2, 3), nn.Conv2d(1, 2, 3)
                self.pool, self.head = nn.MaxPool2d(2), nn.Linear(16, 3)
                with torch.no_grad():
                    self.large.weight.abs_().mul_(100)

            def forward(self, x):
                both = torch.cat([F.relu(self.small(x)), F.relu(self.large(x))], 1)
                return self.head(self.pool(both).flatten(1))

        ann, images = Branches(), torch.rand(40, 1, 6, 6)
        snn = quartz_plugin.convert(ann, images, t_max=129, percentile=100)
        small, large = (float(snn.graph.scales[name]) for name in ("relu", "relu_2"))
        assert large > 20 * small
        wanted = ann(images)
        assert (snn(images) - wanted).abs().max() < 0.05 * wanted.abs().max()


def test_max_pooling_a_sum_of_relus_rounds_it_first():
    class Sum(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.pool, self.head = nn.Conv2d(1, 1, 1, bias=False), nn.MaxPool2d(2), nn.Linear(4, 2)
            nn.init.ones_(self.conv.weight)

        def forward(self, x):
            return self.head(self.pool(self.conv(x).relu() + x).flatten(1))

    ann, images = Sum(), torch.rand(20, 1, 4, 4)
    images[0, 0, 0, 0] = 1.0
    snn = quartz_plugin.convert(ann, images, t_max=9, percentile=100)
    assert [layer.name for layer in snn.graph.layers] == ["relu", "pool_neurons", "output"]
    levels = snn.run(images).levels
    relu, scale = float(snn.graph.scales["relu"]), float(snn.graph.scales["pool_neurons"])
    assert math.isclose(scale, 2.0, rel_tol=1e-3)
    # x counts in eighths, and so does its copy, up to what calibration adds to the scale.
    expected = torch.floor((levels("input") + relu * levels("relu")) / scale + 0.5)
    assert torch.equal(levels("pool_neurons").double(), expected.double())


NORMALISED = ([0.5], [0.25])


class TestNormalisedInput:
    """What stands right behind the input meets signed values once the input is normalised."""

    images = torch.rand(20, 1, 4, 4)

    def test_a_relu_keeps_its_neurons(self):
        ann = nn.Sequential(nn.ReLU(), nn.Flatten(), nn.Linear(16, 3))
        snn = quartz_plugin.convert(ann, self.images, t_max=65, percentile=100, preprocessing=NORMALISED)
        assert [layer.name for layer in snn.graph.layers] == ["0", "output"]
        wanted = ann((self.images - 0.5) / 0.25)
        assert (snn(self.images) - wanted).abs().max() < 0.2

    def test_max_pooling_before_a_relu_moves_behind_it(self):
        ann = nn.Sequential(nn.MaxPool2d(2), nn.ReLU(), nn.Flatten(), nn.Linear(4, 3))
        snn = quartz_plugin.convert(ann, self.images, t_max=65, percentile=100, preprocessing=NORMALISED)
        wanted = ann((self.images - 0.5) / 0.25)
        assert (snn(self.images) - wanted).abs().max() < 0.2


class PoolsBeforeRelus(nn.Module):
    """A value that one ReLU reaches through a pool, and another layer without it."""

    def __init__(self, between):
        super().__init__()
        self.between = between
        self.first, self.second = nn.Conv2d(1, 2, 3, padding=1), nn.Conv2d(2, 2, 3, padding=1)
        self.pool, self.head = nn.MaxPool2d(2), nn.LazyLinear(3)

    def forward(self, x):
        x = self.first(x)
        x = self.pool(x).relu() if self.between == "pool" else x[:, :, 1:]
        other = self.second(x)
        pooled = F.relu(self.pool(torch.cat([x, x], 1) if self.between == "slice" else torch.cat([x, other], 1)))
        return self.head(torch.cat([pooled.flatten(1), other.flatten(1)], 1))


@pytest.mark.parametrize("between", ["pool", "slice"])
def test_a_pool_before_a_relu_moves_though_others_listen_to_what_it_pools(between):
    ann, images = PoolsBeforeRelus(between).eval(), torch.rand(20, 1, 8, 8)
    ann(images)
    snn = quartz_plugin.convert(ann, images, t_max=65, percentile=100)
    wanted = ann(images)
    assert (snn(images) - wanted).abs().max() < 0.1 * wanted.abs().max()


class Heads(nn.Module):
    """A random network that also returns an earlier value, and its last one behind a sigmoid; or takes two inputs."""

    def __init__(self, net, other, second):
        super().__init__()
        self.net, self.other, self.second = net, other, second

    def forward(self, x, y=None):
        known = {"x": x if y is None else x - y}
        for line in self.net.lines:
            known.update(line.values(self.net, known))
        last = known[self.net.lines[-1].names[0]]
        return {"last": last, "other": (known[self.other], None), "shares": torch.sigmoid(last)}


@SOME
@given(random_nets(exact=True), st.integers(3, 9), st.booleans(), st.booleans(), st.data())
def test_several_and_signed_inputs_and_several_outputs(tmp_path_factory, net, t_max, signed, two, data):
    names = [name for line in net.ann.lines for name in line.names]
    changed_in_place = any(re.search(r"_\(|iadd|inplace=True", f"{line}") for line in net.ann.lines)
    other = names[-1] if changed_in_place else data.draw(st.sampled_from(names))
    ann = Heads(net.ann, other, two).eval()
    dtype = next(ann.parameters()).dtype
    shift = 0.5 if signed else 0.0
    given_inputs = [(each - shift).to(dtype) for each in (net.calibration, net.images)]
    if two:
        given_inputs = [(each, each.flip(0) / 2) for each in given_inputs]
    calibration, images = given_inputs
    options = {"input_range": [(-1, 1), (-2, 2)][: 1 + two]} if signed else {}
    example = tuple(each[:1] for each in calibration) if two else None
    try:
        snn = quartz_plugin.convert(ann, calibration, t_max, example_input=example, **options)
    except ConversionError as refusal:
        if "sigmoid" in str(refusal):
            raise
        return
    snn = make_exact(snn)
    wide = tuple(each.double() for each in images) if two else images.double()
    result = snn.run(wide, engine="stepped")
    for engine in engines_of(snn):
        assert_same_spikes(snn.run(wide, engine=engine).spike_steps, result.spike_steps)
    outputs = snn(wide)
    assert torch.equal(outputs["shares"], torch.sigmoid(outputs["last"]))
    assert outputs["other"][1] is None
    path = tmp_path_factory.mktemp("heads") / "snn.safetensors"
    snn.save(path)
    again = quartz_plugin.load(path)(wide)
    assert torch.equal(again["last"], outputs["last"])
    assert torch.equal(again["other"][0], outputs["other"][0])
