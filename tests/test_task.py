"""What an output means: one logit, a decision at every position, values to estimate."""

import copy

import pytest
import torch
from helpers.random_chains import input_train
from torch import nn
from torch.nn import functional as F

import quartz_plugin
from quartz_plugin import metrics
from quartz_plugin.convert.sketches import RangeSketch
from quartz_plugin.costs import HOROWITZ_FLOAT32
from quartz_plugin.metrics import Agreement, DecisionLatency, agreement
from quartz_plugin.task import class_scores, decide, undecided
from quartz_plugin.training import labels_for, restored, structure_of

PIXELS = (3, 6, 7)


class Lambda(nn.Module):
    """What a function does, as a module that torch.fx looks into."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


class Squeezed(nn.Module):
    """A network of one logit, `[B]`."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        return self.net(x).squeeze(1)


@pytest.fixture
def vectors():
    return torch.rand(300, 6)


@pytest.fixture
def one_logit(vectors):
    """A binary classifier that is not sure: logits lie around 0."""
    net = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 1))
    with torch.no_grad():
        net[2].bias -= net(vectors).mean()
    return net.eval()


@pytest.fixture
def images():
    return torch.rand(40, *PIXELS)


@pytest.fixture
def segmenter(images):
    """Five classes at every pixel."""
    net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 5, 3, padding=1))
    with torch.no_grad():
        net[2].bias -= net(images).mean((0, 2, 3))
    return net.eval()


SIZES = torch.tensor([100.0, 1.0, 0.01])


@pytest.fixture
def regressor():
    """Three outputs of very different size, the first far from 0."""
    net = nn.Sequential(nn.Linear(6, 24), nn.ReLU(), nn.Linear(24, 3))
    with torch.no_grad():
        net[2].weight *= SIZES.unsqueeze(1)
        net[2].bias.copy_(SIZES * torch.tensor([5.0, 0.2, -1.0]))
    return net.eval()


# --- one logit --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["percentile", "output", "search+output", "least_squares+bias_correction", "best"])
def test_one_logit_keeps_its_negative_side(one_logit, vectors, method):
    snn = quartz_plugin.convert(one_logit, vectors, 16, calibration_method=method, tuning_rate=1e-3)
    wanted = one_logit(vectors).detach()
    step = 2 * float(wanted.abs().max()) / 15
    assert float(wanted.min()) < -step
    assert float((snn(vectors) - wanted).abs().max()) < 3 * step
    assert float(snn(vectors).min()) < float(wanted.min()) / 2


def test_the_range_of_one_logit_lets_its_sign_be_that_of_its_membrane(one_logit, vectors):
    for t_max in (2, 3, 8):
        result = quartz_plugin.convert(one_logit, vectors, t_max, calibration_method="output").run(vectors)
        assert not result.ties.any()
        assert torch.equal(result.decisions, (result.membrane > 0).long().squeeze(1))


def test_a_prepared_network_of_one_logit_says_both_signs_and_learns(one_logit, vectors):
    net = quartz_plugin.prepare_qat(one_logit, vectors, t_max=8)
    scale, shift = net.output_range
    assert shift - scale < float(one_logit(vectors).min()) * 0.8
    labels = (one_logit(vectors) > 0).float()
    teacher = quartz_plugin.DistillationLoss(net)
    optimizer = torch.optim.Adam(net.parameter_groups())
    losses = []
    for step in range(40):
        loss = teacher(net, vectors, labels, alpha=0.5, progress=step / 40)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    assert losses[-1] < losses[0]
    net.eval().choose_output_range(vectors, labels)
    snn = net.to_spiking()
    assert torch.allclose(snn(vectors), net(vectors), atol=1e-5)
    assert float((decide(snn(vectors)) == labels.squeeze(1)).float().mean()) > 0.8


def test_steps_are_spent_where_one_logit_needs_them(one_logit, vectors):
    windows = quartz_plugin.allocate_steps(one_logit, vectors, steps=60)
    assert max(windows.values()) > 8
    assert quartz_plugin.convert(one_logit, vectors, windows).n_steps <= 60


def test_agreement_on_one_logit_is_that_of_signs(one_logit, vectors):
    snn = quartz_plugin.convert(one_logit, vectors, 4)
    alike = (snn(vectors) > 0) == (one_logit(vectors) > 0)
    assert 0.5 < float(alike.float().mean()) < 1.0
    check = quartz_plugin.verify(one_logit, snn, vectors)
    assert check.agreement == pytest.approx(float(alike.float().mean()))
    assert check.ties == pytest.approx(float((snn(vectors) == 0).float().mean()))
    assert torch.equal(agreement(snn(vectors), one_logit(vectors)), alike.squeeze(1))


def test_a_network_without_a_class_dimension_is_one_of_one_logit(one_logit, vectors):
    flat = Squeezed(one_logit)
    for method in ("percentile", "best"):
        snn = quartz_plugin.convert(flat, vectors, 16, calibration_method=method, tuning_rate=1e-3)
        other = quartz_plugin.convert(one_logit, vectors, 16, calibration_method=method, tuning_rate=1e-3)
        result, beside = snn.run(vectors), other.run(vectors)
        assert torch.equal(result.logits, beside.logits.squeeze(1))
        for name in ("ties", "decisions", "decision_steps"):
            assert getattr(result, name).shape == (300,)
            assert torch.equal(getattr(result, name), getattr(beside, name)), name
        one, two = quartz_plugin.verify(flat, snn, vectors), quartz_plugin.verify(one_logit, other, vectors)
        assert (one.agreement, one.ties) == (two.agreement, two.ties)
        metric = Agreement()
        metric.update(result.logits, flat(vectors))
        assert float(metric.compute()) == pytest.approx(one.agreement)
    one, two = (quartz_plugin.allocate_steps(net, vectors, 60) for net in (flat, one_logit))
    assert list(one.values()) == list(two.values())


@pytest.mark.parametrize("rectified", [False, True])
@pytest.mark.parametrize("method", ["percentile", "output"])
def test_one_logit_is_decided_as_soon_as_no_later_spike_could_change_its_sign(one_logit, vectors, rectified, method):
    ann = nn.Sequential(*one_logit, nn.ReLU()) if rectified else one_logit
    snn = quartz_plugin.convert(ann, vectors, 6, calibration_method=method)
    window = snn.windows[list(snn.windows)[-1]]
    result = snn.run(vectors)
    for steps, logit, decided in zip(
        result.spike_steps[result.output], result.logits, result.decision_steps, strict=True
    ):
        fired = int(steps)
        for step in range(window.start, snn.n_steps):
            if step == fired:
                break
            # Who has been silent until now may still say any lower level.
            levels = torch.arange(0 if rectified else -window.length, window.level_at(step))
            values = snn.graph.output_values(levels.float(), window.length)
            if len(set(decide(values).tolist())) <= 1:
                break
        assert int(decided) == step
        assert int(decide(logit.unsqueeze(0))) == int(logit > 0)


# --- a decision at every position -------------------------------------------------------------------------------------


def test_every_pixel_is_a_decision(segmenter, images):
    snn = quartz_plugin.convert(segmenter, images, 16)
    result = snn.run(images)
    wanted = segmenter(images).argmax(1)
    alike = result.logits.argmax(1) == wanted
    assert result.decisions.shape == result.ties.shape == result.decision_steps.shape == wanted.shape
    assert torch.equal(result.decisions, result.logits.argmax(1))
    steps = result.spike_steps[result.output]
    assert torch.equal(result.decision_steps, torch.where(steps < 0, snn.n_steps - 1, steps).amin(1))
    check = quartz_plugin.verify(segmenter, snn, images)
    assert check.agreement == pytest.approx(float(alike.float().mean()))
    assert check.ties == pytest.approx(float(result.ties.float().mean()))
    assert check.images == 40
    metric, latency = Agreement(), DecisionLatency()
    for classes in (wanted, segmenter(images)):
        metric.update(result.logits, classes)
    latency.update(result)
    assert float(metric.compute()) == pytest.approx(check.agreement)
    assert float(latency.compute()) == pytest.approx(float(result.decision_steps.double().mean()) + 1)


def test_the_output_range_of_pixels_lets_more_of_them_agree(segmenter, images):
    def agreeing(method):
        snn = quartz_plugin.convert(segmenter, images, 8, calibration_method=method, tuning_rate=1e-3)
        return quartz_plugin.verify(segmenter, snn, images).agreement

    plain = agreeing("percentile")
    assert agreeing("output") > plain + 0.02
    assert agreeing("best") > plain + 0.02
    assert agreeing("search+output") > plain + 0.02


def test_pixels_are_distances_and_labels_as_so_many_images_are(segmenter, images):
    """A network of pixels is one of as many images of one pixel."""
    pointwise = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 5, 1)).eval()
    points = images.movedim(1, -1).reshape(-1, 3, 1, 1)
    whole, apart = (
        quartz_plugin.convert(pointwise, given, 4, calibration_method="output") for given in (images, points)
    )
    assert whole.graph.output_scale == pytest.approx(apart.graph.output_scale)
    assert whole.graph.output_shift == pytest.approx(apart.graph.output_shift)
    nets = [
        quartz_plugin.prepare_qat(pointwise, given, 4, calibration_method="percentile") for given in (images, points)
    ]
    labels = torch.randint(5, (40, *PIXELS[1:]))
    losses = [
        quartz_plugin.DistillationLoss(net, activations=0.0)(net, given, of, alpha=0.3)
        for net, given, of in zip(nets, (images, points), (labels, labels.flatten().view(-1, 1, 1)), strict=True)
    ]
    torch.testing.assert_close(*losses)
    steps = [
        quartz_plugin.allocate_steps(pointwise, given, 40, choices=(2, 4, 8)) for given in (images[:5], points[:210])
    ]
    assert steps[0] == steps[1]


def test_class_scores_hold_a_row_for_each_decision():
    logits = torch.rand(2, 4, 3, 5)
    scores = class_scores(logits)
    assert torch.equal(scores.argmax(1), decide(logits).flatten())
    assert torch.equal(scores.view(2, 3, 5, 4), logits.movedim(1, -1))
    single = torch.randn(2, 1, 3, 5)
    torch.testing.assert_close(class_scores(single).softmax(1)[:, 1], single.sigmoid().flatten())
    assert torch.equal(class_scores(single).argmax(1), decide(single).flatten())
    assert torch.equal(undecided(torch.zeros(2, 1, 3)), torch.ones(2, 3, dtype=torch.bool))


# --- regression -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"hold": False, "percentile": 100.0},
        {"granularity": "channel", "rectifier": "silent"},
        {"calibration_method": "best"},
        {"calibration_method": "search+bias_correction+output"},
        {"weight_bits": 12},
    ],
)
def test_each_value_of_a_regression_has_a_range_of_its_own(regressor, vectors, options):
    snn = quartz_plugin.convert(regressor, vectors, 64, task="regression", **options)
    wanted = regressor(vectors)
    spread = wanted.amax(0) - wanted.amin(0)
    assert bool(((snn(vectors) - wanted).abs().mean(0) < 0.04 * spread).all())
    assert bool((snn.run(vectors).membrane - wanted).abs().mean(0).lt(0.04 * spread).all())
    # One range for all of them leaves the smallest a single value.
    alike = quartz_plugin.convert(regressor, vectors, 64, **{**options, "calibration_method": "percentile"})
    assert len(alike(vectors)[:, 2].unique()) == 1


def test_engines_exports_and_files_know_several_ranges(regressor, vectors, tmp_path):
    for options in ({}, {"hold": False}, {"first_layer": "dense"}):
        snn = quartz_plugin.convert(regressor, vectors, 9, task="regression", weight_bits=8, **options)
        engines = ("stepped", "event") if options == {"hold": False} else ("stepped", "event", "analytic")
        results = [snn.run(vectors, engine=engine) for engine in engines]
        for result in results:
            assert torch.equal(result.logits, results[0].logits)
            assert torch.equal(result.spike_steps[result.output], results[0].spike_steps[result.output])
        net = snn.to_snntorch()
        outputs = torch.stack([net(spikes) for spikes in input_train(snn, snn.values_to_encode(vectors).float())])
        assert torch.equal(snn.decode(outputs), results[0].logits)
        snn.save(tmp_path / "snn.safetensors")
        loaded = quartz_plugin.load(tmp_path / "snn.safetensors")
        assert torch.equal(loaded(vectors), results[0].logits)
        assert loaded.run(vectors).task == "regression"
        assert torch.equal(copy.deepcopy(snn)(vectors), results[0].logits)
        latest = results[0].spike_steps[results[0].output]
        latest = torch.where(latest < 0, snn.n_steps - 1, latest).amax(1)
        assert torch.equal(results[0].decision_steps, latest)


def test_errors_stand_in_the_place_of_agreement(regressor, vectors):
    snn = quartz_plugin.convert(regressor, vectors, 16, task="regression")
    check = quartz_plugin.verify(regressor, snn, vectors)
    error, wanted = (snn(vectors) - regressor(vectors)).double(), regressor(vectors).double()
    assert check.agreement is None
    assert check.ties is None
    for index, of in enumerate(check.errors):
        assert of.output == index
        assert of.mean == pytest.approx(float(error[:, index].abs().mean()))
        assert of.rms == pytest.approx(float(error[:, index].square().mean().sqrt()))
        assert of.relative == pytest.approx(of.rms / float(wanted[:, index].std(correction=0)), rel=1e-4)
        assert of.relative < 0.3
    assert "standard deviation" in str(check)
    assert "agreement" not in str(check)
    result = snn.run(vectors)
    for name in ("ties", "decisions"):
        with pytest.raises(ValueError, match="a regression decides for no class"):
            getattr(result, name)


def test_a_depth_map_has_a_range_for_each_channel(images):
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 1))
    with torch.no_grad():
        net[2].weight[1] *= 1e-3
    snn = quartz_plugin.convert(net, images, 64, task="regression")
    assert snn.graph.output_scale.shape == (2, 1, 1)
    check = quartz_plugin.verify(net, snn, images)
    assert [error.relative < 0.2 for error in check.errors] == [True, True]


def test_a_regression_is_prepared_taught_and_becomes_the_spiking_network(regressor, vectors):
    net = quartz_plugin.prepare_qat(regressor, vectors, t_max=8, task="regression")
    assert net.task == "regression"
    wanted = regressor(vectors).detach()
    teacher = quartz_plugin.DistillationLoss(net)
    optimizer = torch.optim.Adam(net.parameter_groups(3e-3))
    losses = []
    for step in range(60):
        loss = teacher(net, vectors, wanted, alpha=0.5, progress=step / 60)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    assert losses[-1] < losses[0]
    net.eval().choose_output_range(vectors, wanted)
    snn = net.to_spiking()
    assert torch.allclose(snn(vectors), net(vectors), rtol=1e-5)
    assert snn.graph.task == "regression"
    spread = wanted.amax(0) - wanted.amin(0)
    assert bool(((snn(vectors) - wanted).abs().mean(0) < 0.2 * spread).all())
    again = restored(regressor, structure_of(net), None)
    again.load_state_dict(net.state_dict())
    assert torch.equal(again.eval()(vectors), net(vectors))
    with pytest.raises(ValueError, match="prepared with task='regression': give the same, got 'classification'"):
        quartz_plugin.convert(net, vectors)


def test_tuning_brings_a_regression_nearer_whatever_the_sizes_of_its_outputs(regressor, vectors):
    def errors(method):
        snn = quartz_plugin.convert(regressor, vectors, 4, task="regression", calibration_method=method)
        return [error.relative for error in quartz_plugin.verify(regressor, snn, vectors).errors]

    before, after = errors("least_squares+output"), errors("least_squares+distill+output")
    assert sum(after) < sum(before)
    assert max(after) < 1.0


def test_steps_are_spent_by_the_errors_of_a_regression(regressor, vectors):
    windows = quartz_plugin.allocate_steps(regressor, vectors, 80, task="regression")
    snn = quartz_plugin.convert(regressor, vectors, windows, task="regression")
    assert snn.n_steps <= 80
    assert min(windows.values()) > 2


def test_a_regression_with_spikes_for_biases_has_ranges_around_0(regressor, vectors):
    snn = quartz_plugin.convert(regressor, vectors, 16, task="regression", **quartz_plugin.PAPER)
    assert not snn.graph.output_shift.any()
    wanted = regressor(vectors).abs().amax(0)
    torch.testing.assert_close(snn.graph.output_scale, wanted.double().detach())


def test_an_output_that_never_varies_keeps_its_value(vectors):
    net = nn.Linear(6, 3)
    with torch.no_grad():
        net.weight[:2] = 0.0
        net.bias.copy_(torch.tensor([0.0, 7.0, 0.1]))
    snn = quartz_plugin.convert(net, vectors, 16, task="regression")
    torch.testing.assert_close(snn(vectors)[:, :2], torch.tensor([0.0, 7.0]).expand(300, 2))
    errors = quartz_plugin.verify(net, snn, vectors).errors
    assert errors[0].relative == 0.0


def test_a_rectified_regression_has_no_shift(regressor, vectors):
    net = nn.Sequential(*regressor, nn.ReLU())
    snn = quartz_plugin.convert(net, vectors, 64, task="regression")
    assert not torch.as_tensor(snn.graph.output_shift).any()
    wanted = net(vectors)
    assert bool(((snn(vectors) - wanted).abs().mean(0) <= 0.02 * wanted.amax(0)).all())


@pytest.mark.parametrize("percentile", [0.0, 1.0, 30.0, 50.0, 99.0, 100.0])
def test_quantiles_of_signed_values(percentile):
    values = torch.stack([torch.randn(5000) * 3 + 100, -torch.rand(5000), torch.randn(5000)]).double()
    sketch = RangeSketch(values[:, :100].mean(dim=1))
    other = RangeSketch(sketch.centre)
    sketch.update(values[:, :3000])
    other.update(values[:, 3000:])
    sketch.merge(other)
    expected = values.quantile(percentile / 100, dim=1)
    assert bool(((sketch.quantile(percentile) - expected).abs() <= 0.01 * values.std(dim=1)).all())
    if percentile in (0.0, 100.0):
        assert torch.equal(sketch.quantile(percentile), expected)


def test_a_double_next_to_a_power_of_two_is_counted_in_the_octave_that_it_rounds_to():
    sketch = RangeSketch(torch.zeros(1, dtype=torch.float64))
    sketch.update(torch.tensor([[0.5, 1 - 1e-12]], dtype=torch.float64))
    assert float(sketch.quantile(100.0)) == 1 - 1e-12
    assert abs(float(sketch.quantile(99.0)) - 1) <= 2e-3


def test_costs_of_a_network_without_a_class_dimension_are_those_of_one_with_it(one_logit, vectors):
    from quartz_plugin.costs.rate import RateCodedNetwork

    for options in ({}, {"rectifier": "silent"}, {"hold": False}):
        snns = [quartz_plugin.convert(net, vectors, 9, **options) for net in (Squeezed(one_logit), one_logit)]
        for metric in (
            metrics.SpikeCount,
            metrics.SpikesPerNeuron,
            metrics.EarlySpikeRate,
            metrics.SynapticOperations,
            lambda snn: metrics.SynapticOperations(snn, kind="merged"),
            metrics.QuartzOperations,
            metrics.NeuronEvents,
            metrics.MemoryAccesses,
            lambda snn: metrics.EnergyEstimate(snn, HOROWITZ_FLOAT32),
        ):
            found = []
            for snn in snns:
                each = metric(snn)
                each.update(snn.run(vectors))
                value = each.compute()
                found.append([*value.values()] if isinstance(value, dict) else [value])
            assert found[0] == found[1]
    flat, beside = (
        RateCodedNetwork(quartz_plugin.convert(net, vectors, 9)) for net in (Squeezed(one_logit), one_logit)
    )
    assert torch.equal(flat(vectors, 4), beside(vectors, 4).squeeze(1))


ENDS = {
    "flatten": [nn.AdaptiveAvgPool2d(1), nn.Flatten()],
    "mean": [Lambda(lambda x: x.mean((2, 3)))],
    "sum": [nn.AvgPool2d((6, 7)), Lambda(lambda x: (x + 2 * x).flatten(1))],
    "view": [nn.AdaptiveAvgPool2d(1), Lambda(lambda x: x.view(x.size(0), -1))],
    "permute": [nn.AdaptiveAvgPool2d(1), Lambda(lambda x: x.permute(0, 2, 3, 1).reshape(-1, 3))],
}


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("granularity", ["layer", "channel"])
def test_weights_on_a_grid_keep_the_sizes_of_outputs_whatever_stands_behind_them(images, end, granularity):
    net = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 3, 1), *ENDS[end]).eval()
    with torch.no_grad():
        net[2].weight *= SIZES.view(-1, 1, 1, 1)
        net[2].bias *= SIZES
    options = {"task": "regression", "granularity": granularity}
    free, bits = (quartz_plugin.convert(net, images, 64, weight_bits=n, **options) for n in (None, 10))
    for exact, rounded in zip(*(quartz_plugin.verify(net, snn, images).errors for snn in (free, bits)), strict=True):
        assert rounded.relative < exact.relative + 0.1
    assert torch.equal(bits.run(images, engine="stepped").logits, bits.run(images, engine="event").logits)


def test_without_hold_the_range_of_a_regression_lies_around_0_unless_0_lies_outside(regressor, vectors):
    snn = quartz_plugin.convert(regressor, vectors, 32, task="regression", hold=False)
    wanted = regressor(vectors).detach()
    around = (wanted.amin(0) <= 0) & (wanted.amax(0) >= 0)
    assert torch.equal(snn.graph.output_shift == 0, around)
    assert around.any()
    assert not around.all()


def test_an_untrained_regression_learns_where_it_was_given_the_range_of_its_targets(vectors):
    torch.manual_seed(1)
    wanted = torch.stack([3 + 2 * vectors[:, 0] * vectors[:, 1], 100 * (vectors[:, 2] - vectors[:, 3])], dim=1)
    ann = nn.Sequential(nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, 2))
    net = quartz_plugin.prepare_qat(ann, vectors, 16, task="regression")
    net.eval().choose_output_range(vectors, wanted)
    scale, shift = net.output_range
    torch.testing.assert_close(shift - scale, wanted.amin(0).double())
    torch.testing.assert_close(shift + scale, wanted.amax(0).double())
    optimizer = torch.optim.Adam(net.train().parameters(), 0.02)
    for _ in range(300):
        optimizer.zero_grad()
        ((net(vectors) - wanted) / wanted.std(0)).square().mean().backward()
        optimizer.step()
    errors = (net.eval().to_spiking()(vectors) - wanted).square().mean(0).sqrt() / wanted.std(0)
    assert bool((errors < 0.35).all()), errors


@pytest.mark.parametrize("last", [nn.ReLU(), nn.ReLU6()])
def test_the_range_of_a_rectified_regression_is_chosen_by_its_targets(regressor, vectors, last):
    net = quartz_plugin.prepare_qat(nn.Sequential(*regressor, last), vectors, 8, task="regression")
    wanted = last(regressor(vectors)).detach()
    net.eval().choose_output_range(vectors, wanted)
    scale, shift = net.output_range
    assert not torch.as_tensor(shift).any()
    alive = wanted.amax(0) > 0
    torch.testing.assert_close(scale[alive].float(), wanted.amax(0)[alive])
    with pytest.raises(ValueError, match=r"tensors of the output's \[3\], got \[2\]"):
        net.set_output_range(torch.ones(2))


@pytest.mark.parametrize("wrap", [nn.Sequential, nn.DataParallel, torch.optim.swa_utils.AveragedModel])
def test_a_prepared_regression_is_one_within_a_wrapper(regressor, vectors, wrap):
    net = wrap(quartz_plugin.prepare_qat(regressor, vectors, 8, task="regression").eval())
    with pytest.raises(ValueError, match="prepared with task='regression'"):
        quartz_plugin.convert(net, vectors)
    assert quartz_plugin.convert(net, vectors, task="regression").graph.task == "regression"


def test_masks_may_be_bytes_and_leave_pixels_out(segmenter, images):
    net = quartz_plugin.prepare_qat(segmenter, images, 8)
    mask = segmenter(images).argmax(1)
    teacher = quartz_plugin.DistillationLoss(net)
    expected = teacher(net, images, mask, alpha=0.5)
    net.eval().choose_output_range(images, mask)
    ranges = net.output_range
    for kind in (torch.uint8, torch.int16, torch.int32):
        torch.testing.assert_close(
            teacher(net, images, mask.to(kind), alpha=0.0), teacher(net, images, mask, alpha=0.0)
        )
        net.choose_output_range(images, mask.to(kind))
        assert net.output_range == ranges
    assert bool(expected.isfinite())
    # What is left out counts nowhere: as if every image had its first row alone.
    spoilt, left_out = mask.clone(), mask.clone()
    spoilt[:, 1:] = (spoilt[:, 1:] + 1) % 5
    left_out[:, 1:] = -100
    net.choose_output_range(images, left_out)
    assert net.output_range != ranges
    net.choose_output_range(images, spoilt)
    with pytest.raises(ValueError, match="labels must be classes from 0 to 4, or -100 where there is none, got 255"):
        net.choose_output_range(images, torch.full_like(mask, 255))
    shares = F.one_hot(mask, 5).movedim(-1, 1).float()
    net.choose_output_range(images, shares)
    assert net.output_range == ranges


# --- errors -----------------------------------------------------------------------------------------------------------


def test_an_unknown_task_is_refused(one_logit, vectors):
    for call in (
        lambda: quartz_plugin.convert(one_logit, vectors, task="detection"),
        lambda: quartz_plugin.prepare_qat(one_logit, vectors, task="detection"),
        lambda: quartz_plugin.allocate_steps(one_logit, vectors, 60, task="detection"),
    ):
        with pytest.raises(ValueError, match="task must be one of 'classification', 'regression', got 'detection'"):
            call()


def test_a_prepared_network_takes_raw_inputs_alone_and_finite_targets(regressor, vectors):
    net = quartz_plugin.prepare_qat(regressor, vectors, 8, task="regression")
    teacher = quartz_plugin.DistillationLoss(net)
    for given in (vectors * 4 - 2, (vectors * 255).byte()):
        for call in (lambda given=given: net(given), lambda given=given: teacher(net, given)):
            with pytest.raises(ValueError, match="images must"):
                call()
    with pytest.raises(ValueError, match="labels contain NaN"):
        teacher(net, vectors, torch.full((300, 3), torch.nan), alpha=0.5)


@pytest.mark.parametrize(
    ("shape", "labels", "task"),
    [
        ((4, 1), torch.tensor([0, 1, 2, 0]), "classification"),
        ((4, 1), torch.zeros(3), "classification"),
        ((4, 5), torch.zeros(4, 1).long(), "classification"),
        ((4, 5, 6), torch.zeros(4).long(), "classification"),
        ((4, 5), torch.zeros(4, 5).long(), "classification"),
        ((4, 5), torch.zeros(5, 4), "regression"),
        ((4, 5), torch.zeros(4), "regression"),
    ],
)
def test_labels_that_do_not_fit_are_refused(shape, labels, task):
    with pytest.raises(ValueError, match=r"labels must be .* for outputs|single logit must be 0 or 1, got 2"):
        labels_for(torch.zeros(shape), labels, task)


def test_labels_of_one_logit_may_be_what_binary_cross_entropy_takes(one_logit, vectors):
    net = quartz_plugin.prepare_qat(one_logit, vectors, 4, calibration_method="percentile")
    teacher = quartz_plugin.DistillationLoss(net, activations=0.0)
    labels = torch.randint(2, (300,))
    expected = F.binary_cross_entropy_with_logits(net(vectors), labels.float().unsqueeze(1))
    for given in (labels, labels.float(), labels.unsqueeze(1), F.one_hot(labels, 2).float()):
        torch.testing.assert_close(teacher(net, vectors, given, alpha=0.0), expected)
