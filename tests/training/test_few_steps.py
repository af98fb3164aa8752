"""Few steps: calibration that tunes, networks that train with the rounding of their spikes, windows of their own."""

import copy
import math
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from helpers.random_chains import SOME
from helpers.random_graphs import random_nets
from hypothesis import given
from hypothesis import strategies as st
from lightning.pytorch.trainer.states import TrainerFn
from torch import nn
from torch.nn import functional as F

import quartz_plugin
from quartz_plugin import ConversionError, TTFSActivation
from quartz_plugin.calibration_methods import CalibrationMethod
from quartz_plugin.convert.check import check
from quartz_plugin.convert.fake_quant import values_at
from quartz_plugin.convert.fold import fold
from quartz_plugin.convert.refine import tuning
from quartz_plugin.convert.refine.distance import output_distance
from quartz_plugin.convert.refine.output_range import choose_output_range
from quartz_plugin.convert.sketches import QuantileSketch
from quartz_plugin.convert.trace import trace
from quartz_plugin.convert.traced import Scales
from quartz_plugin.graph import module_nodes
from quartz_plugin.lightning import Classifier, FewStepsClassifier
from quartz_plugin.lightning.modules import few_steps, mixed

PREPROCESSING = ((0.4, 0.5, 0.6), (0.2, 0.25, 0.3))


class Residual(nn.Module):
    """A convolution with a batch norm, a block with a shortcut, pooling, dropout and a linear layer."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.first, self.second = nn.Conv2d(6, 6, 3, padding=1), nn.Conv2d(6, 6, 3, padding=1)
        self.relu, self.clipped = nn.ReLU(), nn.ReLU6()
        self.pool, self.drop, self.head = nn.MaxPool2d(2), nn.Dropout(0.5), nn.Linear(6 * 16, 4)

    def forward(self, x):
        x = self.relu(self.norm(self.conv(x)))
        x = F.relu(self.second(self.clipped(self.first(x))) + x)
        return self.head(self.drop(self.pool(x).flatten(1)))


@pytest.fixture
def images():
    return torch.rand(64, 3, 8, 8)


@pytest.fixture
def ann(images):
    net = Residual()
    net.train()
    net((images - 0.5) / 0.25)
    return net.eval()


def distance(ann, snn, images):
    """Of the output's membranes from the ANN's logits."""
    mean, std = (torch.tensor(value).view(1, 3, 1, 1) for value in PREPROCESSING)
    with torch.no_grad():
        return float((snn.run(images).membrane - ann((images - mean) / std)).square().mean())


def relative_entropy(ann, snn, images):
    """Of the output, which is what a search makes least."""
    mean, std = (torch.tensor(value).view(1, 3, 1, 1) for value in PREPROCESSING)
    with torch.no_grad():
        wanted = ann((images - mean) / std).log_softmax(1)
    return float(F.kl_div(snn(images).log_softmax(1), wanted, reduction="batchmean", log_target=True))


# --- the activation ---------------------------------------------------------------------------------------------------


def test_the_activation_says_what_held_neurons_say():
    x = torch.linspace(-1, 4, 1001)
    said = TTFSActivation(5, 2.0)(x)
    assert torch.allclose(said, torch.floor(x.clamp(0, 2) * 2 + 0.5) / 2)
    signed = TTFSActivation(5, 2.0, signed=True)(x)
    assert torch.allclose(signed, torch.floor(x.clamp(-2, 2) * 2 + 0.5) / 2)


def test_the_activations_gradients_are_straight_through():
    code = TTFSActivation(5, 2.0)
    x = torch.tensor([[-1.0, 0.3, 1.1, 3.0]], requires_grad=True)
    code(x).sum().backward()
    assert x.grad.tolist() == [[0.0, 1.0, 1.0, 0.0]]
    # Of the scale: what is said less what is driven inside, all of it beyond, divided by the root of units and steps.
    inside = (0.5 - 0.3) + (1.0 - 1.1)
    assert float(code.log_scale.grad) == pytest.approx((inside + 2.0) / math.sqrt(4 * 4))


@pytest.mark.parametrize("scale", [0.0, -1.0, float("nan"), float("inf")])
def test_the_activation_refuses_scales_that_are_none(scale):
    with pytest.raises(ValueError, match="positive and finite"):
        TTFSActivation(4, scale)
    with pytest.raises(ValueError, match="t_max"):
        TTFSActivation(1)


def test_a_scale_never_exceeds_its_ceiling():
    assert TTFSActivation(4, 9.0, ceiling=6.0).scale.item() == 6.0


# --- calibration ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("window", [1, 3, 15])
def test_least_squares_finds_the_scale_that_a_search_over_all_values_finds(window):
    values = torch.randn(2, 5000).abs() ** 1.5
    sketch = QuantileSketch(2, 64)
    for part in values.split(1000, dim=1):
        sketch.update(part)
    found = sketch.least_squares(window)

    def lost(channel, scale):
        levels = torch.floor((values[channel] * window / scale).clamp(0, window) + 0.5)
        return float((levels * scale / window - values[channel]).square().mean())

    for channel in range(2):
        least = min(lost(channel, scale) for scale in torch.linspace(0.05, float(values[channel].max()), 800).tolist())
        assert lost(channel, float(found[channel])) <= 1.03 * least


@pytest.mark.parametrize(
    "method",
    ["least_squares", "search", "bias_correction", "search+bias_correction", "tune", "least_squares+distill", "best"],
)
@pytest.mark.parametrize("granularity", ["layer", "channel"])
def test_better_calibration_is_nearer_to_the_ann(ann, images, method, granularity):
    def convert(calibration_method):
        windows = {"default": 4, "input": 32, "output": 64}
        return quartz_plugin.convert(
            ann, images, windows, preprocessing=PREPROCESSING, granularity=granularity,
            calibration_method=calibration_method, tuning_passes=30,
        )  # fmt: skip

    plain, better = convert("percentile"), convert(method)
    far = relative_entropy if method == "search" else distance
    assert far(ann, better, images) < far(ann, plain, images)
    assert better.graph.settings["calibration_method"] == method
    stepped = better.run(images[:4], engine="stepped")
    for name, steps in better.run(images[:4], engine="analytic").spike_steps.items():
        assert float((steps != stepped.spike_steps[name]).float().mean()) < 0.01


def test_tuning_leaves_the_ann_and_the_random_state_alone_and_is_repeatable(ann, images):
    before = {name: tensor.clone() for name, tensor in ann.state_dict().items()}
    state = torch.get_rng_state()
    options = {"calibration_method": "distill", "tuning_passes": 1, "preprocessing": PREPROCESSING}
    one, other = (quartz_plugin.convert(ann, images, 4, **options) for _ in range(2))
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(tensor, before[name]) for name, tensor in ann.state_dict().items())
    assert torch.allclose(one(images), other(images), atol=1e-3)


def test_tuning_tells_how_far_it_is(ann, images):
    told = []
    quartz_plugin.convert(
        ann, images, 4, calibration_method="distill", tuning_passes=2, tuning_progress=lambda *step: told.append(step)
    )
    assert told[-1][0] == told[-1][1] == len(told)


def test_bias_correction_takes_the_mean_error_out_of_every_channel(images):
    ann = nn.Sequential(nn.Conv2d(3, 5, 3), nn.ReLU(), nn.Conv2d(5, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3))
    plain, corrected = (
        quartz_plugin.convert(ann, images, 3, calibration_method=method) for method in ("percentile", "bias_correction")
    )
    with torch.no_grad():
        wanted = ann(images)
        errors = [float((snn.run(images).membrane - wanted).mean(0).abs().max()) for snn in (plain, corrected)]
    assert errors[1] < 1e-4 < errors[0]


@pytest.mark.parametrize("method", ["bias_correction+tune", "bias_correction+distill"])
@pytest.mark.parametrize("task", ["classification", "regression"])
def test_the_ann_teaches_also_where_biases_have_been_corrected(images, task, method):
    torch.manual_seed(0)
    ann = nn.Sequential(nn.Conv2d(3, 5, 3), nn.ReLU(), nn.Conv2d(5, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3))
    corrected = quartz_plugin.convert(ann, images, 3, calibration_method="bias_correction", task=task)
    with torch.no_grad():
        expected = output_distance(corrected.run(images).membrane, ann(images), task, corrected.graph.output_scale)
    # What is lost by learning too fast is measured against the teacher.
    with pytest.warns(UserWarning, match="tuning moved the output away from the ANN's") as warned:
        quartz_plugin.convert(ann, images, 3, calibration_method=method, task=task, tuning_rate=0.99, tuning_passes=1)
    before = float(str(warned[0].message).partition(" before")[0].split()[-1])
    assert before == pytest.approx(float(expected), rel=0.01)


def test_bias_correction_of_a_sum_of_paths_stands_in_the_report(ann, images):
    snn = quartz_plugin.convert(ann, images, 4, calibration_method="bias_correction", preprocessing=PREPROCESSING)
    rows = [row for row in snn.report if row["operation"] == "bias correction"]
    assert [row["became"] for row in rows] == ["part of the neurons' bias"]


def test_the_outputs_range_is_that_of_most_agreement(images):
    ann = nn.Sequential(nn.Flatten(), nn.Linear(192, 6))
    network, scales = check(fold(trace(ann, images[:1]))), Scales({"1": torch.tensor(1.0)})
    wanted = ann(images).argmax(1)
    found = choose_output_range(network, scales, {"1": 1, "input": 255}, images, wanted, "classification")
    scale, shift = found.of_layers["1"], found.output_shift

    def agreement(s, middle):
        with torch.no_grad():
            drive = ann(torch.floor(images * 255 + 0.5) / 255) - middle
        levels = torch.floor((drive / s).clamp(-1, 1) + 0.5)
        first = levels == levels.amax(1, keepdim=True)
        return float((first.gather(1, wanted[:, None]).squeeze(1) / first.sum(1)).mean())

    others = [agreement(s, m) for s in torch.linspace(0.05, 2, 30).tolist() for m in torch.linspace(-1, 1, 21).tolist()]
    assert agreement(float(scale), shift) >= max(others) - 0.03


def test_a_shifted_output_says_the_anns_logits(images, tmp_path):
    ann = nn.Sequential(nn.Flatten(), nn.Linear(192, 16), nn.ReLU(), nn.Linear(16, 5))
    nn.init.constant_(ann[3].bias, 3.0)
    snn = quartz_plugin.convert(ann, images, {"default": 64, "output": 4}, calibration_method="least_squares+output")
    assert snn.graph.output_shift != 0
    with torch.no_grad():
        wanted = ann(images)
        result = snn.run(images, engine="stepped")
        assert float((result.membrane - wanted).abs().max()) < 0.05
    assert torch.equal(result.logits, snn(images))
    step = snn.graph.output_scale / 3
    inside = (wanted - snn.graph.output_shift).abs() < snn.graph.output_scale
    assert float((result.logits - wanted).abs()[inside].max()) < 0.5 * step + 0.05
    snn.save(tmp_path / "snn.safetensors")
    assert torch.equal(quartz_plugin.load(tmp_path / "snn.safetensors")(images), snn(images))
    check = quartz_plugin.verify(ann, snn, images)
    assert check.layers[-1].layer == "output"
    net = snn.to_snntorch()
    spikes = torch.stack([net(s) for s in quartz_plugin.encode(images, snn.t_max, snn.n_steps)])
    assert torch.equal(snn.decode(spikes), result.logits)
    with pytest.raises(ValueError, match='bias="spike" clamps those'):
        quartz_plugin.convert(ann, images, calibration_method="output", **quartz_plugin.PAPER)


@pytest.mark.parametrize(
    "method", ["", "fastest", "percentile+least_squares", "tune+distill", "tune+tune", "percentile,tune", None, 3]
)
def test_an_unknown_method_is_refused_by_name(ann, images, method):
    with pytest.raises(ValueError, match="calibration_method must be"):
        quartz_plugin.convert(ann, images, calibration_method=method)


def test_best_is_a_method_of_names():
    assert CalibrationMethod.of("best").needs_images
    assert CalibrationMethod.of("best+bias_correction").refinements == {"bias_correction", "distill", "output"}
    with pytest.raises(ValueError, match="calibration_method must be"):
        CalibrationMethod.of("best+tune")


@pytest.mark.parametrize("passes", [0, -1, 1.5, True])
def test_passes_are_counted(ann, images, passes):
    with pytest.raises(ValueError, match="tuning_passes"):
        quartz_plugin.convert(ann, images, calibration_method="tune", tuning_passes=passes)


@pytest.mark.parametrize("rate", [0, -0.1, 1.0, "fast"])
def test_the_tuning_rate_is_a_share(ann, images, rate):
    with pytest.raises(ValueError, match="tuning_rate"):
        quartz_plugin.convert(ann, images, calibration_method="tune", tuning_rate=rate)


@pytest.mark.parametrize("method", ["tune", "distill"])
def test_tuning_that_leads_away_from_the_ann_is_left_out(ann, images, method):
    options = {"preprocessing": PREPROCESSING, "tuning_passes": 1, "tuning_rate": 0.9}
    plain = quartz_plugin.convert(ann, images, 32, preprocessing=PREPROCESSING)
    with pytest.warns(UserWarning, match="lower tuning_rate"):
        tuned = quartz_plugin.convert(ann, images, 32, calibration_method=method, **options)
    assert torch.allclose(tuned(images), plain(images), atol=1e-5)
    assert tuned.graph.settings["calibration_method"] == "percentile"


def test_the_output_range_is_chosen_by_the_labels(ann, images):
    net = quartz_plugin.prepare_qat(ann, images, 4, preprocessing=PREPROCESSING, calibration_method="percentile")
    mean, std = (torch.tensor(value).view(1, 3, 1, 1) for value in PREPROCESSING)
    labels = ann((images - mean) / std).argmax(1)

    def right():
        net.eval()
        return float((net(images).argmax(1) == labels).float().mean())

    net.set_output_range(1000.0)
    before = right()
    net.train().choose_output_range(images, labels)
    assert net.training
    assert right() > before
    assert net.output_range[0] < 1000.0
    assert torch.allclose(net.eval().to_spiking()(images), net(images), atol=1e-4)
    with pytest.raises(ValueError, match="label for each"):
        net.choose_output_range(images, labels[:3])


@pytest.mark.parametrize("scale", [0.0, -1.0, math.nan, math.inf])
def test_an_output_range_is_positive_and_finite(ann, images, scale):
    net = quartz_plugin.prepare_qat(ann, images, 4)
    before = net.output_range
    with pytest.raises(ValueError, match="scale must be positive and finite"):
        net.set_output_range(scale)
    assert net.output_range == before


@pytest.fixture
def in_training(ann, images):
    """A classifier that learns to spike, its output's range far too wide, and its trainer's stand-in."""
    network = quartz_plugin.prepare_qat(ann, images, 4, preprocessing=PREPROCESSING)
    model = FewStepsClassifier(Classifier(ann, 4, preprocessing=PREPROCESSING), network)
    model.network.set_output_range(1000.0)
    model.log = lambda *args, **options: None
    model.trainer = SimpleNamespace(
        state=SimpleNamespace(fn=TrainerFn.FITTING), strategy=SimpleNamespace(broadcast=lambda given: given)
    )
    return model


@pytest.mark.parametrize("hook", ["on_validation_start", "on_train_epoch_end"])
def test_the_output_range_is_chosen_while_training_by_the_latest_images_once(in_training, images, hook):
    labels = torch.randint(4, (64,))
    getattr(in_training, hook)()
    assert in_training.network.output_range[0] == pytest.approx(1000.0)
    in_training.training_step((images, labels), 0)
    in_training.trainer.strategy.broadcast = lambda given: (given[0], 0.25)
    getattr(in_training, hook)()
    chosen = in_training.network.output_range
    assert chosen[0] < 100.0
    # All processes take that of the first.
    assert chosen[1] == 0.25
    # Once for what was trained on.
    in_training.network.set_output_range(1000.0)
    getattr(in_training, hook)()
    assert in_training.network.output_range[0] == pytest.approx(1000.0)


def test_training_that_diverged_is_said_to_have(in_training, images):
    in_training.training_step((images, torch.randint(4, (64,))), 0)
    with torch.no_grad():
        in_training.network.network.head.weight[0, 0] = math.nan
    with pytest.raises(ValueError, match=r"diverged.*--relative_lr"):
        in_training.on_validation_start()


def test_validation_alone_leaves_the_output_range(in_training, images):
    in_training.training_step((images, torch.randint(4, (64,))), 0)
    in_training.trainer.state.fn = TrainerFn.VALIDATING
    in_training.on_validation_start()
    assert in_training.network.output_range[0] == pytest.approx(1000.0)
    in_training.on_fit_end()
    in_training.trainer.state.fn = TrainerFn.FITTING
    in_training.on_validation_start()
    assert in_training.network.output_range[0] == pytest.approx(1000.0)


@pytest.mark.parametrize(
    ("bound", "kept"), [({"RANGE_IMAGES": 1000}, 4), ({"RANGE_IMAGES": 32}, 2), ({"RANGE_VALUES": 1}, 1)]
)
def test_few_images_are_kept_for_the_output_range(in_training, images, bound, kept):
    with mock.patch.multiple(few_steps, **bound):
        for start in range(0, 64, 16):
            in_training.training_step((images[start : start + 16], torch.randint(4, (16,))), 0)
        assert len(in_training._seen) == kept
    assert torch.equal(in_training._seen[-1][0], images[48:])


def test_images_are_mixed_with_their_labels(images):
    labels = F.one_hot(torch.arange(64) % 4, 4).float()
    found, shares = mixed(images, labels, 0.5)
    assert torch.allclose(shares.sum(dim=1), torch.ones(64))
    part = 1 - (shares * labels).sum(dim=1)
    # Where both images are of one class, the shares do not tell.
    told = (labels != labels.flip(0)).any(dim=1)
    assert bool(told.any())
    assert 0 < float(part[told].max()) <= 0.5
    expected = torch.lerp(images, images.flip(0), part.view(-1, 1, 1, 1))
    assert torch.allclose(found[told], expected[told], atol=1e-6)
    assert torch.equal(mixed(images, labels, 0.0)[0], images)


def test_a_taught_network_learns_without_dropout_and_alone_with_it(ann, images):
    labels = torch.randint(4, (64,))

    def trained(taught):
        classifier = Classifier(copy.deepcopy(ann), 4, preprocessing=PREPROCESSING)
        classifier.fitted_on = "these" if taught else None
        network = quartz_plugin.prepare_qat(classifier.network, images, 4, preprocessing=PREPROCESSING)
        model = FewStepsClassifier(classifier, network, distillation=0.5)
        model.train()
        model.log = lambda *args, **options: None
        model.trainer = mock.Mock(estimated_stepping_batches=10, global_step=0)
        dropped = []
        (dropout,) = (each for each in model.network.modules() if isinstance(each, nn.Dropout))
        dropout.register_forward_hook(lambda module, given, found: dropped.append(module.training))
        model.training_step((images, labels), 0)
        return dropped

    assert trained(taught=True) == [False]
    assert trained(taught=False) == [True]
    net = quartz_plugin.prepare_qat(ann, images, 4, preprocessing=PREPROCESSING).train()
    teacher = quartz_plugin.DistillationLoss(net)
    assert torch.equal(teacher(net, images), teacher(net, images))
    assert all(each.training for each in net.modules() if isinstance(each, nn.Dropout))


def test_what_a_teacher_cannot_teach_is_said(ann, images):
    net = quartz_plugin.prepare_qat(ann, images, 4)
    teacher = quartz_plugin.DistillationLoss(net)
    other = quartz_plugin.prepare_qat(
        nn.Sequential(nn.Flatten(), nn.Linear(192, 3), nn.ReLU(), nn.Linear(3, 4)), images, 4
    )
    with pytest.raises(TypeError, match=r"made of what prepare_qat\(ann, ...\) gives, got Residual"):
        quartz_plugin.DistillationLoss(ann)
    with pytest.raises(ValueError, match="of another ANN than its teacher"):
        teacher(other, images)
    with pytest.raises(ValueError, match="a label for each image, got 64 images and 3 labels"):
        teacher(net, images, torch.zeros(3, dtype=torch.long), alpha=0.5)
    for call in (net, lambda given: teacher(net, given)):
        with pytest.raises(ValueError, match=r"shape \[B, 3, 8, 8\], got \[64, 3, 7, 8\]"):
            call(images[:, :, 1:])


def test_small_images_are_tuned_fifty_at_a_time_and_large_ones_ten(ann, images):
    def steps_of_two_passes(values_at_once):
        seen = []
        with mock.patch.object(tuning, "TUNED_AT_ONCE", values_at_once):
            quartz_plugin.convert(
                ann, images, 4, calibration_method="tune", tuning_passes=2,
                tuning_progress=lambda done, total: seen.append((done, total)),
            )  # fmt: skip
        assert seen[-1][0] == seen[-1][1] == len(seen)
        return len(seen)

    assert steps_of_two_passes(10**9) == 2 * 2
    assert steps_of_two_passes(20 * images[0].numel()) == 2 * 4
    assert steps_of_two_passes(1) == 2 * 7


def test_tuning_of_several_processes_is_refused(ann, images):
    with pytest.raises(ValueError, match="one process"):
        quartz_plugin.convert(ann, images, calibration_method="tune", distributed=True)


# --- windows of their own ---------------------------------------------------------------------------------------------


def test_windows_go_by_name_and_the_rest_by_default(ann, images):
    snn = quartz_plugin.convert(ann, images, {"default": 5, "input": 32, "output": 9, "clipped": 3})
    lengths = {name: window.length + 1 for name, window in snn.windows.items()}
    assert (lengths["input"], lengths["output"], lengths["clipped"]) == (32, 9, 3)
    assert set(lengths.values()) == {5, 32, 9, 3}
    assert snn.n_steps == 31 + 4 + 2 + 4 + 8 + 8 + 1


def test_windows_without_a_name_or_a_default_are_refused(ann, images):
    with pytest.raises(ValueError, match="no window for the layer 'relu'"):
        quartz_plugin.convert(ann, images, {"input": 32})
    with pytest.raises(ValueError, match="no layer or block is called 'nobody'"):
        quartz_plugin.convert(ann, images, {"default": 4, "nobody": 32})


def test_layers_win_over_windows_of_the_same_name(ann, images):
    snn = quartz_plugin.convert(ann, images, {"default": 5, "input": 32}, layers={"input": {"t_max": 8}})
    assert snn.t_max == 8


@pytest.mark.filterwarnings("ignore:.* is 0 on all calibration images")
@SOME
@given(random_nets(), st.integers(0, 30))
def test_allocated_steps_are_those_that_an_inference_takes(net, spare):
    plain = net.convert(2)
    windows = quartz_plugin.allocate_steps(
        net.ann, net.calibration, plain.n_steps + spare, choices=(2, 3, 5), preprocessing=net.preprocessing
    )
    snn = net.convert(windows)
    assert snn.n_steps <= plain.n_steps + spare
    assert set(windows) == {*snn.windows}


def test_steps_go_where_they_help_most(images):
    ann = nn.Sequential(
        nn.Conv2d(3, 5, 3), nn.ReLU(), nn.Conv2d(5, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 8), nn.ReLU(),
        nn.Linear(8, 3),
    )  # fmt: skip
    windows = quartz_plugin.allocate_steps(ann, images, 60)
    snn = quartz_plugin.convert(ann, images, windows, calibration_method="least_squares")
    uniform = quartz_plugin.convert(ann, images, 10, calibration_method="least_squares")
    assert snn.n_steps <= uniform.n_steps + 5
    assert len(set(windows.values())) > 1
    with pytest.raises(ValueError, match="at least 7"):
        quartz_plugin.allocate_steps(ann, images, 6)


# --- the first layer on the image -------------------------------------------------------------------------------------


@pytest.mark.parametrize("granularity", ["layer", "channel"])
@pytest.mark.parametrize("neuron", [{}, {"hold": False}, {"rectifier": "silent"}, quartz_plugin.PAPER])
def test_a_dense_first_layer_encodes_what_it_computes(ann, images, neuron, granularity):
    options = {"preprocessing": PREPROCESSING, "granularity": granularity, **neuron}
    snn = quartz_plugin.convert(ann, images, 16, first_layer="dense", **options)
    usual = quartz_plugin.convert(ann, images, 16, **options)
    assert len(snn.windows) == len(usual.windows) - 1
    assert snn.n_steps <= usual.n_steps - 15
    mean, std = (torch.tensor(value).view(1, 3, 1, 1) for value in PREPROCESSING)
    with torch.no_grad():
        first = F.relu(ann.norm(ann.conv((images - mean) / std)))
        values = snn.values_to_encode(images)
    scale = snn.dense_stem.scale
    assert torch.allclose(values, (first / scale).clamp(max=1), atol=1e-5)
    results = [snn.run(images[:3], engine=engine) for engine in ("stepped", "event")]
    for name, steps in results[0].spike_steps.items():
        assert float((steps != results[1].spike_steps[name]).float().mean()) < 0.01
    assert quartz_plugin.verify(ann, snn, images[:8]).agreement >= 0.5


def test_a_dense_first_layer_survives_files_copies_and_stepping_by_hand(ann, images, tmp_path):
    snn = quartz_plugin.convert(ann, images, 8, first_layer="dense", preprocessing=PREPROCESSING)
    snn.save(tmp_path / "snn.safetensors")
    again = quartz_plugin.load(tmp_path / "snn.safetensors")
    assert torch.equal(again(images), snn(images))
    net = snn.to_snntorch()
    values = snn.values_to_encode(images)
    spikes = torch.stack([net(s) for s in quartz_plugin.encode(values, snn.t_max, snn.n_steps)])
    assert torch.equal(snn.decode(spikes), snn.run(images, engine="stepped").logits)


def test_a_dense_first_layer_needs_one_layer_and_its_relu(images):
    two = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 2))
    with pytest.raises(ConversionError, match="'1' stands in the way"):
        quartz_plugin.convert(two, images, first_layer="dense")
    with pytest.raises(ConversionError, match="the output stands in the way"):
        quartz_plugin.convert(nn.Sequential(nn.Linear(8, 2)), images, first_layer="dense")
    with pytest.raises(ValueError, match="first_layer must be"):
        quartz_plugin.convert(two, images, first_layer="analog")


# --- training ---------------------------------------------------------------------------------------------------------


def assert_the_spikes_say_what_was_trained(net, snn, images):
    """Layer by layer, but for sums that end within rounding of a half."""
    called = [(str(node.target), module) for node, module in module_nodes(net.network)]
    codes = {path: module for path, module in called if isinstance(module, TTFSActivation) and not module.signed}
    with torch.no_grad():
        trained, logits = values_at(net.network, images.to(snn.graph.dtype), codes)
    result = snn.run(images, engine="stepped")
    names = [name for name in snn.windows if name != result.output or not result.signed_output]
    assert len(names) == len(codes)
    for name, (path, code) in zip(names, codes.items(), strict=True):
        levels = torch.round(trained[path] * (code.window / code.scale))
        assert float((levels != result.levels(name)).float().mean()) <= 2e-3, name
    near = (result.logits - logits).abs() < 1e-4 * (1 + logits.abs())
    assert float(near.float().mean()) > 0.95


@pytest.mark.parametrize("first_layer", ["spiking", "dense"])
@pytest.mark.parametrize("granularity", ["layer", "channel"])
def test_the_spiking_network_is_the_trained_one(ann, images, granularity, first_layer):
    labels = torch.randint(4, (64,))
    windows = {"default": 4} | ({"input": 16} if first_layer == "spiking" else {})
    net = quartz_plugin.prepare_qat(
        ann, images, windows, granularity=granularity, first_layer=first_layer, preprocessing=PREPROCESSING
    )
    assert net.training
    optimizer = torch.optim.Adam(net.parameters(), 1e-2)
    losses, scales = [], [m.scale.detach().clone() for m in net.modules() if isinstance(m, TTFSActivation)]
    for _ in range(25):
        optimizer.zero_grad()
        losses.append(F.cross_entropy(net(images), labels))
        losses[-1].backward()
        optimizer.step()
    assert sum(losses[-5:]) < 0.98 * sum(losses[:5])
    moved = [m.scale for m in net.modules() if isinstance(m, TTFSActivation)]
    assert any(not torch.equal(one, other) for one, other in zip(scales, moved, strict=True))
    snn = net.eval().to_spiking()
    assert snn.graph.settings["first_layer"] == first_layer
    assert_the_spikes_say_what_was_trained(net, snn, images)


@pytest.mark.filterwarnings("ignore:.* is 0 on all calibration images")
@SOME
@given(random_nets(dtypes=(torch.float64,)), st.integers(2, 9))
def test_random_networks_say_what_was_prepared(net, t_max):
    try:
        prepared = quartz_plugin.prepare_qat(net.ann, net.images, t_max, preprocessing=net.preprocessing)
    except ConversionError as refusal:
        assert "neurons come about only when batch norms are folded" in str(refusal)  # noqa: PT017
        return
    prepared.eval()
    assert_the_spikes_say_what_was_trained(prepared, prepared.to_spiking(), net.images)


def test_preparing_leaves_the_ann_alone_and_refuses_what_training_does(ann, images):
    before = {name: tensor.clone() for name, tensor in ann.state_dict().items()}
    net = quartz_plugin.prepare_qat(ann, images, 4)
    net(images).sum().backward()
    assert all(torch.equal(tensor, before[name]) for name, tensor in ann.state_dict().items())
    assert all(parameter.grad is None for parameter in ann.parameters())
    assert not ann.training
    with pytest.raises(ValueError, match="changes weights"):
        quartz_plugin.prepare_qat(ann, images, 4, calibration_method="distill")


def test_preparing_keeps_the_outputs_shift(images):
    ann = nn.Sequential(nn.Flatten(), nn.Linear(192, 16), nn.ReLU(), nn.Linear(16, 5))
    nn.init.constant_(ann[3].bias, 10.0)
    net = quartz_plugin.prepare_qat(ann, images, 8).eval()
    with torch.no_grad():
        assert float((net(images) - ann(images)).abs().mean()) < 0.2


def test_a_trained_network_refuses_what_would_change_it(ann, images):
    net = quartz_plugin.prepare_qat(ann, images, 4)
    for options in ({"calibration_method": "tune"}, {"first_layer": "dense"}):
        with pytest.raises(ValueError, match="trained"):
            quartz_plugin.convert(net.network, images, **options)
    with pytest.raises(ValueError, match="windows of its own"):
        quartz_plugin.allocate_steps(net.network, images, 200)
    with pytest.raises(ValueError, match=r"windows of its own, .*'relu': 4.*leave t_max out"):
        quartz_plugin.convert(net.network, images, 8)
    assert quartz_plugin.convert(net.network, images, 4).n_steps == net.to_spiking().n_steps


def test_verify_finds_a_trained_network_right(ann, images):
    net = quartz_plugin.prepare_qat(ann, images, 4).eval()
    check = quartz_plugin.verify(net.network, net.to_spiking(), images)
    assert check.agreement > 0.95
    assert all(layer.saturated < 0.01 for layer in check.layers[:-1])


def test_a_scale_at_its_ceiling_still_learns():
    code = TTFSActivation(4, 6.0, ceiling=6.0)
    code(torch.linspace(0, 20, 50).unsqueeze(0)).sum().backward()
    assert float(code.log_scale.grad) > 0


@pytest.mark.parametrize("percentile", [50.0, 100.0])
def test_the_range_of_an_output_that_is_a_relu_does_not_hang_on_the_scale_before(images, percentile):
    ann = nn.Sequential(nn.Flatten(), nn.Linear(192, 16), nn.ReLU(), nn.Linear(16, 5), nn.ReLU())
    method = {"calibration_method": "least_squares+output"}
    one, other = (quartz_plugin.convert(ann, images, 3, output_percentile=p, **method) for p in (percentile, 99.0))
    assert one.graph.output_scale == pytest.approx(other.graph.output_scale)


def test_tuning_and_allocating_refuse_bad_input_in_one_line(ann, images):
    with pytest.raises(ValueError, match="calibration is empty"):
        quartz_plugin.allocate_steps(ann, images[:0], 100)
    with pytest.raises(ValueError, match="whole number of steps"):
        quartz_plugin.allocate_steps(ann, images, None)
    with pytest.raises(ValueError, match="at least one choice"):
        quartz_plugin.allocate_steps(ann, images, 100, choices=())


def test_a_trained_network_refuses_early_spikes(ann, images):
    net = quartz_plugin.prepare_qat(ann, images, 4)
    with pytest.raises(ValueError, match="give hold=True"):
        quartz_plugin.convert(net.network, images, hold=False)


def test_activations_in_a_network_of_ones_own_become_its_layers(images):
    ann = nn.Sequential(
        nn.Flatten(), nn.Linear(192, 8), TTFSActivation(6, 1.5), nn.Linear(8, 3), TTFSActivation(4, 2.0, signed=True)
    )
    snn = quartz_plugin.convert(ann, images, 256)
    assert [window.length + 1 for window in snn.windows.values()] == [256, 6, 4]
    with torch.no_grad():
        near = (snn(images) - ann(torch.floor(images * 255 + 0.5) / 255)).abs() < 1e-5
    assert float(near.float().mean()) > 0.98
    ann[2].signed = True
    with pytest.raises(ConversionError, match="signed"):
        quartz_plugin.convert(ann, images)


# --- the output's membranes -------------------------------------------------------------------------------------------


@SOME
@given(random_nets(dtypes=(torch.float64,)), st.sampled_from([{}, {"hold": False}, quartz_plugin.PAPER]))
def test_membranes_are_what_the_output_rounds_and_all_engines_agree(net, neuron):
    snn = net.convert(7, **neuron)
    stepped = snn.run(net.images, engine="stepped")
    layer = snn.graph.layers[-1]
    window = layer.neuron.clock.window
    drive = stepped.membrane * (window / snn.graph.output_scale)
    if snn.graph.hold:
        # Levels are membranes, rounded and clipped.
        lowest = -window if stepped.signed_output else 0
        levels = torch.floor(drive.clamp(lowest, window) + 0.5)
        wrong = (levels != stepped.levels(layer.name)) & ((drive + 0.5) % 1 > 1e-6) & ((drive + 0.5) % 1 < 1 - 1e-6)
        assert not bool(wrong.any())
    for engine in ("event", "analytic") if snn.graph.hold else ("event",):
        other = snn.run(net.images, engine=engine, record=False)
        same = [torch.equal(other.spike_steps[layer.name], stepped.spike_steps[layer.name])]
        if all(same):
            assert torch.allclose(other.membrane, stepped.membrane, atol=1e-6 * snn.graph.output_scale + 1e-9)


def test_surrogate_gradients_reach_the_membranes(images):
    ann = nn.Sequential(nn.Flatten(), nn.Linear(192, 8), nn.ReLU(), nn.Linear(8, 3))
    for options in ({}, dict(quartz_plugin.PAPER)):
        snn = quartz_plugin.convert(ann, images, 5, **options)
        plain = snn.run(images, engine="stepped").membrane
        for parameter in snn.parameters():
            parameter.requires_grad_(True)
        result = snn.run(images[:8], engine="stepped")
        assert torch.allclose(result.membrane, plain[:8], atol=1e-5)
        result.membrane.sum().backward()
        assert all(parameter.grad is not None for parameter in snn.parameters() if parameter.dim() > 1)


def test_a_state_dict_of_an_earlier_version_loads_into_a_dense_first_layer(ann, images):
    snn = quartz_plugin.convert(ann, images, 8, first_layer="dense", preprocessing=PREPROCESSING)
    expected = snn(images)
    earlier = {name.replace("dense_stem.", "front."): value.clone() for name, value in snn.state_dict().items()}
    assert earlier.keys() != snn.state_dict().keys()
    for value in snn.state_dict().values():
        value.zero_()
    snn.load_state_dict(earlier)
    assert torch.equal(snn(images), expected)
