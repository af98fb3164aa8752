"""Engines give the same spike steps, and those are what DESIGN.md says."""

import copy

import pytest
import torch
from helpers.random_chains import (
    HELD,
    MANY,
    NEURONS,
    SCALES,
    SOME,
    assert_closed_form,
    assert_equal_but_for_ties,
    assert_the_ann_agrees,
    chains,
    fired_levels,
    near_a_half,
    quantise,
    round_half_up,
    t_maxima,
    walk,
)
from hypothesis import given
from torch import nn

import quartz_plugin
from quartz_plugin import ConversionError
from quartz_plugin.engines.stepped import step_layer


def assert_same_spikes(one, other):
    assert one.keys() == other.keys()
    for name, steps in one.items():
        assert steps.dtype == torch.int32
        assert torch.equal(steps, other[name]), name


def stepped_on(graph, values):
    """Spike steps of every layer by the stepped engine, each on the levels in `values`."""
    return {
        layer.name: step_layer(
            layer,
            {source: values[source].to(graph.dtype) for source in layer.projection.sources},
        )
        for layer in graph.layers
    }


@MANY
@given(chains(exact=True), t_maxima(), HELD, SCALES)
def test_on_fixed_point_weights_both_engines_give_the_closed_form_without_exception(chain, t_max, neuron, scales):
    snn = quantise(chain.convert(t_max, **neuron, **scales))
    stepped = snn.run(chain.images, engine="stepped")
    analytic = snn.run(chain.images, engine="analytic")
    assert_same_spikes(stepped.spike_steps, analytic.spike_steps)
    assert torch.equal(stepped.logits, analytic.logits)
    _, drives = walk(snn.graph, stepped.spike_steps)
    for layer in snn.graph.layers:
        lowest = -(t_max - 1) if layer.neuron.p.rectifier is None else 0
        expected = round_half_up(drives[layer.name]).clamp(lowest, t_max - 1)
        levels = fired_levels(snn.graph, layer.name, stepped.spike_steps[layer.name])
        assert torch.equal(levels.double(), expected), layer.name


@MANY
@given(chains(), t_maxima(), HELD, SCALES)
def test_on_free_weights_both_engines_give_the_closed_form_layer_by_layer_but_for_ties(chain, t_max, neuron, scales):
    snn = chain.convert(t_max, **neuron, **scales)
    graph = snn.graph
    analytic = snn.run(chain.images, engine="analytic").spike_steps
    assert_closed_form(graph, analytic)
    values, drives = walk(graph, analytic)
    for name, steps in stepped_on(graph, values).items():
        levels = fired_levels(graph, name, steps)
        expected = fired_levels(graph, name, analytic[name])
        assert_equal_but_for_ties(levels, expected, drives[name], name)
        assert torch.equal(steps == -1, analytic[name] == -1) or near_a_half(drives[name]).any()


@MANY
@given(chains(), t_maxima(), HELD, SCALES)
def test_held_neurons_say_what_the_ann_computes_from_rounded_activations(chain, t_max, neuron, scales):
    snn = chain.convert(t_max, **neuron, **scales)
    for engine in ("stepped", "analytic"):
        assert_the_ann_agrees(chain, snn, snn.run(chain.images, engine=engine).spike_steps)


@SOME
@given(chains(), t_maxima(), NEURONS, SCALES)
def test_steps_levels_and_logits_belong_together(chain, t_max, neuron, scales):
    snn = chain.convert(t_max, **neuron, **scales)
    result = snn.run(chain.images)
    for name, steps in result.spike_steps.items():
        assert torch.equal(result.levels(name), fired_levels(snn.graph, name, steps)), name
        window, fired = result.windows[name], steps[steps != -1]
        signed = name == "output"
        assert (fired <= window.end + (window.length if signed else 0)).all()
        if name != "input":
            assert torch.equal(result.early[name], (steps != -1) & (steps < window.start))
            assert not (neuron["hold"] and result.early[name].any())
    assert "input" not in result.early
    output = fired_levels(snn.graph, result.output, result.spike_steps[result.output])
    logits = output.double() * (snn.graph.output_scale / (t_max - 1))
    torch.testing.assert_close(result.logits.double(), logits)
    assert torch.equal(snn(chain.images), result.logits)


@SOME
@given(chains(), t_maxima(), NEURONS, SCALES)
def test_not_recording_changes_nothing_but_what_is_kept(chain, t_max, neuron, scales):
    snn = chain.convert(t_max, **neuron, **scales)
    for engine in ("stepped", "analytic") if neuron["hold"] else ("stepped",):
        full = snn.run(chain.images, engine=engine)
        short = snn.run(chain.images, engine=engine, record=False)
        assert list(short.spike_steps) == [full.output]
        assert torch.equal(short.spike_steps[full.output], full.spike_steps[full.output])
        assert torch.equal(short.logits, full.logits)


@SOME
@given(chains(), t_maxima(), NEURONS.filter(lambda neuron: neuron["bias"] == "synapse"), SCALES)
def test_silence_says_the_same_as_spikes_for_zero(chain, t_max, neuron, scales):
    options = {key: neuron[key] for key in ("hold",)} | scales
    spiking = chain.convert(t_max, rectifier="spike", **options).run(chain.images, engine="stepped")
    snn = chain.convert(t_max, rectifier="silent", **options)
    for engine in ("stepped", "analytic") if neuron["hold"] else ("stepped",):
        silent = snn.run(chain.images, engine=engine)
        if engine == "stepped":
            assert torch.equal(silent.logits, spiking.logits)
        for name, steps in silent.spike_steps.items():
            zeros = steps == silent.windows[name].end
            if name == silent.output and snn.graph.layers[-1].neuron.p.rectifier is None:
                continue
            assert not zeros.any(), f"{name} says 0 with a spike"
            if engine == "stepped":
                said = torch.where(steps == -1, spiking.windows[name].end, steps)
                assert torch.equal(said, spiking.spike_steps[name])


def test_forced_zeros_are_said_by_every_neuron_and_silent_ones_by_none():
    ann = nn.Sequential(nn.Linear(4, 50), nn.ReLU(), nn.Linear(50, 3))
    images = torch.rand(20, 4)
    images[0] = 0.0
    spike = quartz_plugin.convert(ann, images, 8).run(images)
    silent = quartz_plugin.convert(ann, images, 8, rectifier="silent").run(images)
    assert (spike.spike_steps["1"] != -1).all()
    assert (spike.spike_steps["input"] != -1).all()
    assert (silent.spike_steps["1"] == -1).float().mean() > 0.2
    assert (silent.spike_steps["input"][0] == -1).all()


def test_a_held_network_chooses_analytic_and_an_unheld_one_event():
    ann, images = nn.Sequential(nn.Linear(3, 2)), torch.rand(5, 3)
    assert quartz_plugin.convert(ann, images).run(images).engine == "analytic"
    assert quartz_plugin.convert(ann, images, hold=False).run(images).engine == "event"


def test_without_hold_early_spikes_happen_and_say_more_than_one():
    # Positive input first, then an equal negative one: v crosses theta on the way, while y = 0.5.
    ann = nn.Sequential(nn.Linear(2, 1, bias=False), nn.ReLU(), nn.Linear(1, 1))
    with torch.no_grad():
        ann[0].weight.copy_(torch.tensor([[3.0, -4.0]]))
    image = torch.tensor([[0.5, 0.25]])
    snn = quartz_plugin.convert(ann, image, t_max=9, hold=False, percentile=100)
    # In units of the scale 0.5: weights 6 and -8, levels 4 and 2. From step 4 on, i = 6: v = 6, 12 >= 8.5.
    result = snn.run(image)
    assert result.spike_steps["1"].tolist() == [[5]]
    assert result.early["1"].tolist() == [[True]]
    assert result.levels("1").tolist() == [[11]]
    held = quartz_plugin.convert(ann, image, t_max=9, percentile=100)
    assert held.run(image, engine="stepped").levels("1").tolist() == [[8]]


def test_the_largest_logit_of_the_earliest_output_spike_decides():
    ann = nn.Sequential(nn.Linear(3, 4))
    images = torch.rand(30, 3)
    snn = quartz_plugin.convert(ann, images, t_max=6)
    result = snn.run(images)
    steps = result.spike_steps["output"]
    late = torch.where(steps == -1, snn.n_steps - 1, steps)
    assert torch.equal(result.decision_steps, late.amin(1))
    shared = (result.logits == result.logits.amax(1, keepdim=True)).sum(1) > 1
    assert torch.equal(result.ties, shared)
    assert 0 < shared.sum() < 30
    earliest_first_index = [row.index(min(row)) for row in late.tolist()]
    assert result.logits.argmax(1).tolist() == earliest_first_index


def test_equal_outputs_tie_and_the_smallest_class_wins():
    ann = nn.Sequential(nn.Linear(2, 3, bias=False))
    with torch.no_grad():
        ann[0].weight.copy_(torch.tensor([[-1.0, 0.0], [1.0, 1.0], [1.0, 1.0]]))
    snn = quartz_plugin.convert(ann, torch.ones(1, 2), t_max=5)
    result = snn.run(torch.ones(1, 2))
    assert result.ties.tolist() == [True]
    assert result.logits.argmax(1).tolist() == [1]
    assert result.decision_steps.tolist() == [4]


def test_an_output_that_never_fires_decides_at_the_last_step_and_says_minus_one():
    ann = nn.Sequential(nn.Linear(1, 2))
    with torch.no_grad():
        ann[0].weight.zero_()
        ann[0].bias.fill_(-1.0)
    images = torch.rand(4, 1)
    snn = quartz_plugin.convert(ann, images, t_max=4)
    with torch.no_grad():
        snn.graph.layers[-1].neuron.bias.mul_(2)
    for engine in ("stepped", "analytic"):
        result = snn.run(images, engine=engine)
        assert (result.spike_steps["output"] == -1).all()
        assert (result.decision_steps == snn.n_steps - 1).all()
        torch.testing.assert_close(result.logits, torch.full((4, 2), -1.0))


@pytest.mark.parametrize("engine", ["stepped", "analytic"])
def test_engines_take_an_empty_batch(engine):
    ann = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(8, 3))
    snn = quartz_plugin.convert(ann, torch.rand(8, 1, 6, 6), t_max=4)
    result = snn.run(torch.rand(0, 1, 6, 6), engine=engine)
    assert result.logits.shape == (0, 3)
    assert result.spike_steps["output"].shape == (0, 3)


@pytest.mark.parametrize("engine", ["stepped", "analytic"])
def test_one_image_at_a_time_gives_the_same_as_a_batch(engine):
    ann = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)).double()
    images = torch.rand(6, 4)
    snn = quartz_plugin.convert(ann, images, t_max=9)
    batch = snn.run(images, engine=engine).spike_steps
    for index in range(6):
        single = snn.run(images[index : index + 1], engine=engine).spike_steps
        for name, steps in single.items():
            assert torch.equal(steps[0], batch[name][index])


def test_running_leaves_the_network_and_the_images_alone():
    ann = nn.Sequential(nn.ReLU(inplace=True), nn.Linear(4, 6), nn.ReLU(inplace=True), nn.Linear(6, 3))
    images = torch.rand(6, 4)
    snn = quartz_plugin.convert(ann, images, t_max=9)
    weights, before = copy.deepcopy(snn.state_dict()), images.clone()
    first = {engine: snn.run(images, engine=engine).spike_steps for engine in ("stepped", "analytic")}
    for engine, spikes in first.items():
        assert_same_spikes(snn.run(images, engine=engine).spike_steps, spikes)
    assert torch.equal(images, before)
    assert all(torch.equal(value, weights[name]) for name, value in snn.state_dict().items())


class TestTraining:
    def network(self):
        torch.manual_seed(3)
        ann = nn.Sequential(
            nn.Conv2d(1, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 3)
        )
        images = torch.rand(24, 1, 6, 6)
        return quartz_plugin.convert(ann, images, t_max=16), images, torch.arange(24) % 3

    def test_gradients_reach_every_synapse_and_bias_and_the_image(self):
        snn, images, labels = self.network()
        snn.requires_grad_(True)
        images.requires_grad_(True)
        nn.functional.cross_entropy(snn(images), labels).backward()
        parameters = dict(snn.named_parameters())
        assert len(parameters) == 6
        for name, parameter in parameters.items():
            assert parameter.grad is not None, name
            assert parameter.grad.abs().sum() > 0, name
        assert images.grad.abs().sum() > 0

    def test_the_straight_through_gradient_is_that_of_the_clipped_linear_map(self):
        ann = nn.Sequential(nn.Linear(2, 3, bias=False), nn.ReLU(), nn.Linear(3, 1, bias=False)).double()
        with torch.no_grad():
            ann[0].weight.copy_(torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0]]))
            ann[2].weight.fill_(1.0)
        snn = quartz_plugin.convert(ann, torch.tensor([[1.0, 0.5]]), t_max=11)
        # Scale 1: the third neuron is at 0.5, in range; the second is rectified; x = 1 saturates the first.
        image = torch.tensor([[0.4, 0.5]], dtype=torch.float64, requires_grad=True)
        snn(image).sum().backward()
        torch.testing.assert_close(image.grad, torch.tensor([[1.0, 1.0]], dtype=torch.float64))

    def test_a_few_steps_of_training_lower_the_loss(self):
        snn, images, _ = self.network()
        target = snn(images).roll(1, dims=1)
        snn.requires_grad_(True)
        optimizer = torch.optim.Adam(snn.parameters(), lr=0.02)
        losses = []
        for _ in range(20):
            loss = nn.functional.mse_loss(snn(images), target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
        assert losses[-1] < 0.5 * losses[0]
        # What was trained is a network of spikes still.
        assert_closed_form(snn.graph, snn.run(images, engine="stepped").spike_steps)

    def test_training_changes_no_spike_of_the_same_weights(self):
        snn, images, _ = self.network()
        frozen = snn.run(images, engine="analytic").spike_steps
        snn.requires_grad_(True)
        assert_same_spikes(snn.run(images, engine="analytic").spike_steps, frozen)


class TestErrors:
    @pytest.fixture
    def snn(self):
        return quartz_plugin.convert(nn.Sequential(nn.Linear(4, 2)), torch.rand(20, 4), t_max=4)

    def test_analytic_without_hold_says_which_engine_can(self):
        snn = quartz_plugin.convert(nn.Sequential(nn.Linear(4, 2)), torch.rand(20, 4), t_max=4, hold=False)
        with pytest.raises(ValueError, match=r'analytic.*hold=True.*use engine="event" or engine="stepped"'):
            snn.run(torch.rand(1, 4), engine="analytic")

    def test_an_unknown_engine_lists_the_known(self, snn):
        with pytest.raises(ValueError, match=r"auto.*analytic.*stepped.*got 'clocked'"):
            snn.run(torch.rand(1, 4), engine="clocked")

    def test_images_above_one(self, snn):
        with pytest.raises(ValueError, match=r"images must lie in \[0, 1\], got values from 0 to 255"):
            snn(torch.tensor([[0.0, 255.0, 1.0, 2.0]]))

    def test_images_that_look_normalised_point_to_preprocessing(self, snn):
        with pytest.raises(ValueError, match=r"looks normalised.*preprocessing=\(mean, std\)"):
            snn(torch.randn(5, 4))

    def test_bytes_say_to_divide_by_255(self, snn):
        with pytest.raises(ValueError, match=r"uint8.*255"):
            snn(torch.zeros(1, 4, dtype=torch.uint8))

    def test_nan_in_images(self, snn):
        with pytest.raises(ValueError, match="images contains NaN"):
            snn(torch.tensor([[0.1, float("nan"), 0.2, 0.3]]))

    @pytest.mark.parametrize("shape", [(4,), (2, 5), (2, 1, 4), (2, 4, 1)])
    def test_images_of_another_shape(self, snn, shape):
        with pytest.raises(ValueError, match=r"shape the network was converted for, \[B, 4\], got"):
            snn(torch.rand(shape))

    def test_images_that_are_no_tensor(self, snn):
        with pytest.raises(TypeError, match=r"images must be a torch\.Tensor, got list"):
            snn([[0.1, 0.2, 0.3, 0.4]])

    def test_conversion_errors_are_value_errors(self):
        assert issubclass(ConversionError, ValueError)


def accuracy(snn, images, labels):
    """Per cent."""
    right = sum(
        int((snn(some).argmax(1) == truth).sum())
        for some, truth in zip(images.split(250), labels.split(250), strict=True)
    )
    return 100 * right / len(labels)


@pytest.mark.shared
class TestMNIST:
    @pytest.mark.parametrize(("t_max", "at_least"), [(4, 97.5), (8, 98.2), (16, 98.4)])
    def test_the_papers_network_keeps_its_accuracy(self, mnist_ann, mnist_train, mnist_test, t_max, at_least):
        options = {"percentile": 99, "output_percentile": 99, **quartz_plugin.PAPER}
        snn = quartz_plugin.convert(mnist_ann, mnist_train[0][:10_000], t_max, **options)
        assert accuracy(snn, mnist_test[0][:2000], mnist_test[1][:2000]) >= at_least

    @pytest.mark.parametrize(("bias", "figure"), [("spike", 92.36), ("synapse", 88.64)])
    def test_the_papers_network_meets_the_figures_at_two_levels(self, mnist_ann, mnist_train, mnist_test, bias, figure):
        options = {"percentile": 99, "output_percentile": 99, "hold": False, "bias": bias}
        snn = quartz_plugin.convert(mnist_ann, mnist_train[0][:10_000], 2, **options)
        assert abs(accuracy(snn, *mnist_test) - figure) <= 0.05

    def test_stepped_equals_analytic_on_200_images(self, mnist_ann, mnist_train, mnist_test):
        snn = quartz_plugin.convert(mnist_ann, mnist_train[0][:2000], t_max=16)
        graph, images = snn.graph, mnist_test[0][:200]
        analytic = snn.run(images, engine="analytic").spike_steps
        values, drives = walk(graph, analytic)
        differing = neurons = 0
        for name, steps in stepped_on(graph, values).items():
            levels, expected = (fired_levels(graph, name, s) for s in (steps, analytic[name]))
            assert_equal_but_for_ties(levels, expected, drives[name], name)
            differing += int((steps != analytic[name]).sum())
            neurons += steps.numel()
        assert neurons == 200 * (6 * 24 * 24 + 12 * 8 * 8 + 120 + 10)
        assert differing <= neurons / 10_000

    def test_stepped_equals_analytic_exactly_on_fixed_point_weights(self, mnist_ann, mnist_train, mnist_test):
        snn = quantise(quartz_plugin.convert(mnist_ann, mnist_train[0][:2000], t_max=16))
        images = mnist_test[0][:100]
        stepped = snn.run(images, engine="stepped").spike_steps
        assert_same_spikes(stepped, snn.run(images, engine="analytic").spike_steps)


@SOME
@given(chains(exact=True), t_maxima(), NEURONS, SCALES)
def test_with_gradients_the_stepped_engine_gives_the_same_spikes_and_logits(chain, t_max, neuron, scales):
    snn = quantise(chain.convert(t_max, **neuron, **scales))
    plain = snn.run(chain.images, engine="stepped")
    for parameter in snn.graph_module.parameters():
        parameter.requires_grad_(True)
    assert_same_spikes(snn.run(chain.images, engine="stepped").spike_steps, plain.spike_steps)
    result = snn.run(chain.images, engine="stepped", record=False)
    assert list(result.spike_steps) == [plain.output]
    assert torch.equal(result.logits.detach(), plain.logits)
    assert result.logits.requires_grad or not list(snn.graph_module.parameters())


@pytest.mark.parametrize(
    ("engine", "options"),
    [
        ("analytic", {}),
        ("stepped", {}),
        ("stepped", {"hold": False}),
        ("stepped", {"hold": False, "rectifier": "silent"}),
    ],
)
def test_a_small_network_learns_from_scratch(engine, options):
    images = torch.rand(200, 6)
    labels = (images[:, 0] + images[:, 1] > 1).long() + (images[:, 2] > 0.6).long()
    ann = nn.Sequential(nn.Linear(6, 24), nn.ReLU(), nn.Linear(24, 12), nn.ReLU(), nn.Linear(12, 3))
    snn = quartz_plugin.convert(ann, images, t_max=8, **options).requires_grad_(True)
    optimizer = torch.optim.Adam(snn.parameters(), lr=0.01)
    losses = []
    for _ in range(40):
        logits = snn.run(images, engine=engine, record=False).logits
        loss = nn.functional.cross_entropy(logits * (4 / snn.graph.output_scale), labels)
        optimizer.zero_grad()
        loss.backward()
        assert all(parameter.grad is not None for parameter in snn.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert min(losses[-5:]) < 0.6 * losses[0]


@pytest.mark.parametrize("t_max", [8, 24])
def test_surrogate_gradients_point_where_those_of_the_closed_form_do(t_max):
    images, target = torch.rand(100, 6), torch.randn(100, 3)
    ann = nn.Sequential(nn.Linear(6, 24), nn.ReLU(), nn.Linear(24, 12), nn.ReLU(), nn.Linear(12, 3))
    snn = quartz_plugin.convert(ann, images, t_max).requires_grad_(True)
    gradients = []
    for engine in ("analytic", "stepped"):
        loss = nn.functional.mse_loss(snn.run(images, engine, record=False).logits, target)
        gradients.append(torch.cat([each.flatten() for each in torch.autograd.grad(loss, list(snn.parameters()))]))
    straight, surrogate = gradients
    assert torch.cosine_similarity(straight, surrogate, 0) > 0.75
    assert 0.5 < surrogate.norm() / straight.norm() < 5


def test_auto_steps_an_unheld_network_whose_weights_want_gradients():
    images = torch.rand(8, 3)
    snn = quartz_plugin.convert(nn.Linear(3, 2), images, hold=False).requires_grad_(True)
    assert snn.run(images).engine == "stepped"
    with torch.no_grad():
        assert snn.run(images).engine == "event"


@pytest.mark.parametrize("engine", ["analytic", "stepped"])
def test_a_bias_alone_can_be_trained(engine):
    snn = quartz_plugin.convert(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)), torch.rand(8, 3))
    assert [name for name, _ in snn.named_parameters() if name.endswith("bias")]
    bias = snn.graph.layers[-1].neuron.bias.requires_grad_(True)
    snn.run(torch.rand(4, 3), engine=engine).logits.sum().backward()
    assert bias.grad.abs().sum() > 0
