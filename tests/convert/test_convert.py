"""convert: what becomes of a network, what is left alone, and what is refused in which words."""

import copy
import gc
import math
import re
import weakref

import pytest
import torch
from helpers.random_chains import (
    NEURONS,
    SCALES,
    SOME,
    assert_the_ann_agrees,
    chains,
    fired_levels,
    near_a_half,
    round_half_up,
    t_maxima,
)
from hypothesis import given
from snntorch import SpikingNeuron
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import quartz_plugin
from quartz_plugin import ConversionError, FirstSpikeMaxPool, TTFSNeuron


def small_ann(channels=1):
    return nn.Sequential(
        nn.Conv2d(channels, 3, 3),
        nn.BatchNorm2d(3),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Dropout(),
        nn.Flatten(),
        nn.Linear(12, 4),
    )


def small_ann_like(ann):
    other = small_ann()
    other.load_state_dict(ann.state_dict())
    return other


def assert_same_network(one, other):
    assert one.report[:] == other.report[:]
    assert one.graph.scales.keys() == other.graph.scales.keys()
    states = one.state_dict(), other.state_dict()
    assert states[0].keys() == states[1].keys()
    for name, value in states[0].items():
        torch.testing.assert_close(value, states[1][name], rtol=0, atol=0, msg=name)


class TestTheANN:
    @pytest.mark.parametrize("training", [True, False])
    def test_is_not_modified(self, training):
        ann = small_ann().train(training)
        ann[4].eval()
        ann[0].weight.requires_grad_(False)
        state = copy.deepcopy(ann.state_dict())
        flags = [module.training for module in ann.modules()]
        modules = list(ann.modules())
        ann[0](torch.rand(1, 1, 4, 4)).sum().backward()
        gradient = ann[0].bias.grad.clone()
        quartz_plugin.convert(ann, torch.rand(70, 1, 6, 6), preprocessing=(0.3, 0.2))
        assert ann.state_dict().keys() == state.keys()
        assert all(torch.equal(value, state[name]) for name, value in ann.state_dict().items())
        assert [module.training for module in ann.modules()] == flags
        assert all(one is other for one, other in zip(ann.modules(), modules, strict=True))
        assert not ann[0].weight.requires_grad
        assert ann[1].weight.requires_grad
        assert torch.equal(ann[0].bias.grad, gradient)

    def test_keeps_its_hooks(self):
        ann = small_ann()
        handle = ann[2].register_forward_hook(lambda module, inputs, output: None)
        expected = quartz_plugin.convert(small_ann_like(ann), images := torch.rand(10, 1, 6, 6))
        assert_same_network(quartz_plugin.convert(ann, images), expected)
        assert list(ann[2]._forward_hooks) == [handle.id]

    def test_is_not_silently_mistaken_where_a_hook_changes_what_it_computes(self):
        ann, images = small_ann().eval(), torch.rand(50, 1, 6, 6)
        ann[2].register_forward_hook(lambda module, inputs, output: 3 * output)
        try:
            snn = quartz_plugin.convert(ann, images, t_max=2000, percentile=100)
        except ConversionError as error:
            assert "hook" in str(error)  # noqa: PT017
        else:
            wanted = ann(images).detach()
            assert (snn(images) - wanted).abs().max() < 0.02 * wanted.abs().max()

    def test_is_used_as_in_eval_mode(self):
        ann = small_ann()
        ann[1].running_mean.normal_()
        calibration = torch.rand(100, 1, 6, 6)
        trained = quartz_plugin.convert(ann.train(), calibration)
        assert_same_network(trained, quartz_plugin.convert(ann.eval(), calibration))

    def test_may_share_its_relu(self):
        class Shared(nn.Module):
            def __init__(self):
                super().__init__()
                self.a, self.b, self.c = nn.Linear(4, 6), nn.Linear(6, 5), nn.Linear(5, 3)
                self.relu = nn.ReLU()

            def forward(self, x):
                return self.c(self.relu(self.b(self.relu(self.a(x)))))

        ann = Shared()
        plain = nn.Sequential(ann.a, nn.ReLU(), ann.b, nn.ReLU(), ann.c)
        calibration, images = torch.rand(100, 4), torch.rand(30, 4)
        shared = quartz_plugin.convert(ann, calibration).run(images)
        expected = quartz_plugin.convert(plain, calibration).run(images)
        assert list(shared.spike_steps) == ["input", "relu", "relu_2", "output"]
        for one, other in zip(shared.spike_steps.values(), expected.spike_steps.values(), strict=True):
            assert torch.equal(one, other)

    def test_may_share_its_weights_beside_modules_of_like_names(self):
        class Shared(nn.Module):
            def __init__(self):
                super().__init__()
                self.fc, self.fc_2, self.last = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)
                self.relu, self.relu_2 = nn.ReLU(), nn.ReLU()

            def forward(self, x):
                x = self.relu(self.fc(x))
                x = self.relu(self.fc(x))
                return self.last(self.relu_2(self.fc_2(x)))

        ann = Shared()
        with torch.no_grad():
            ann.fc.bias.add_(0.5)
            ann.fc_2.bias.add_(0.5)
        images = torch.rand(100, 4)
        snn = quartz_plugin.convert(ann, images, t_max=2000, percentile=100)
        assert len(snn.graph.layers) == 4
        assert (snn(images) - ann(images)).abs().max() < 0.01

    def test_may_call_functions_in_place_of_modules(self):
        class Functional(nn.Module):
            def __init__(self):
                super().__init__()
                self.conv, self.fc, self.last = nn.Conv2d(1, 3, 3), nn.Linear(48, 6), nn.Linear(6, 2)

            def forward(self, x):
                x = torch.flatten(F.relu(self.conv(x), inplace=True), 1)
                x = F.dropout(x, training=self.training)
                return self.last(self.fc(x).relu())

        ann = Functional()
        plain = nn.Sequential(ann.conv, nn.ReLU(), nn.Flatten(), ann.fc, nn.ReLU(), ann.last)
        images = torch.rand(60, 1, 6, 6)
        functional = quartz_plugin.convert(ann, images)
        assert torch.equal(functional(images), quartz_plugin.convert(plain, images)(images))
        assert len(functional.graph.layers) == 3

    def test_may_name_its_modules_like_the_input_and_the_output(self):
        class Named(nn.Module):
            def __init__(self):
                super().__init__()
                self.first, self.output, self.last = nn.Linear(4, 5), nn.Linear(5, 6), nn.Linear(6, 3)
                self.input, self.mem = nn.ReLU(), nn.ReLU()

            def forward(self, x):
                return self.last(self.mem(self.output(self.input(self.first(x)))))

        ann = Named()
        plain = nn.Sequential(ann.first, ann.input, ann.output, ann.mem, ann.last)
        images = torch.rand(60, 4)
        expected = quartz_plugin.convert(plain, images).run(images)
        for engine in ("stepped", "analytic"):
            result = quartz_plugin.convert(ann, images).run(images, engine=engine)
            assert len(result.spike_steps) == len(result.windows) == len(expected.spike_steps) == 4
            assert torch.equal(result.spike_steps["input"], expected.spike_steps["input"])
            assert torch.equal(result.logits, expected.logits)

    def test_may_be_a_single_layer(self):
        ann, images = nn.Linear(4, 3), torch.rand(20, 4)
        snn = quartz_plugin.convert(ann, images, t_max=500)
        assert (snn(images) - ann(images)).abs().max() < 0.01
        assert list(snn.windows) == ["input", "output"]

    def test_may_be_a_subclass_of_relu(self):
        class Mine(nn.ReLU):
            pass

        images = torch.rand(20, 4)
        layers = nn.Linear(4, 3), nn.Linear(3, 2)
        mine = quartz_plugin.convert(nn.Sequential(layers[0], Mine(), layers[1]), images)
        plain = quartz_plugin.convert(nn.Sequential(layers[0], nn.ReLU(), layers[1]), images)
        assert torch.equal(mine(images), plain(images))

    def test_may_be_repeatedly_rectified(self):
        first, last, images = nn.Conv1d(2, 3, 2), nn.Linear(12, 2), torch.rand(20, 2, 5)
        pool = nn.MaxPool1d(2, 1, padding=1)
        twice = nn.Sequential(first, nn.ReLU(), pool, nn.ReLU(), nn.Flatten(), nn.ReLU(), last)
        last = twice[6] = nn.Linear(15, 2)
        once = nn.Sequential(first, nn.ReLU(), pool, nn.Flatten(), last)
        snn = quartz_plugin.convert(twice, images)
        assert torch.equal(snn(images), quartz_plugin.convert(once, images)(images))
        assert len(snn.graph.layers) == 2


class TestCalibration:
    def test_forms_of_the_same_images_give_the_same_network(self):
        ann, images, labels = small_ann(), torch.rand(192, 1, 6, 6), torch.arange(192)
        expected = quartz_plugin.convert(ann, images)
        loader = DataLoader(TensorDataset(images, labels), batch_size=64)
        forms = [
            list(images.split(64)),
            [(some, labels[: len(some)]) for some in images.split(128)],
            loader,
            ((some, None) for some in images.split(64)),
            iter([images]),
            images.double(),
        ]
        for form in forms:
            assert_same_network(quartz_plugin.convert(ann, form), expected)

    def test_batches_of_any_size_give_the_same_scales(self):
        ann, images = small_ann(), torch.rand(150, 1, 6, 6)
        expected = quartz_plugin.convert(ann, images).graph.scales
        for size in (1, 7, 150):
            scales = quartz_plugin.convert(ann, images.split(size)).graph.scales
            for name, scale in scales.items():
                torch.testing.assert_close(scale, expected[name], rtol=1e-5, atol=0)

    def test_it_is_read_once_and_progress_is_told(self):
        yielded, seen = [], []

        def batches():
            for index in range(3):
                yielded.append(index)
                yield torch.rand(100, 1, 6, 6)

        quartz_plugin.convert(small_ann(), batches(), progress=seen.append)
        assert yielded == [0, 1, 2]
        assert seen == sorted(seen)
        assert seen[-1] == 300

    def test_the_images_are_not_modified(self):
        images = torch.rand(20, 4)
        before = images.clone()
        quartz_plugin.convert(nn.Sequential(nn.ReLU(inplace=True), nn.Linear(4, 2)), images)
        assert torch.equal(images, before)


class TestPreprocessing:
    def both(self, **options):
        mean, std = [0.2, 0.5, 0.4], [0.3, 0.25, 0.6]
        norm = nn.BatchNorm2d(3, eps=0.0, affine=False).eval()
        norm.running_mean.copy_(torch.tensor(mean))
        norm.running_var.copy_(torch.tensor(std).double() ** 2)
        layers = [
            nn.Conv2d(3, 4, 3, padding=1),
            nn.ReLU(),
            nn.AvgPool2d(2, padding=1, count_include_pad=False),
            nn.Flatten(),
            nn.Linear(64, 3),
        ]
        ann = nn.Sequential(*layers).double()
        explicit = nn.Sequential(norm, *layers).double()
        calibration = torch.rand(60, 3, 6, 6)
        folded = quartz_plugin.convert(ann, calibration, preprocessing=(mean, std), **options)
        return explicit, folded, quartz_plugin.convert(explicit, calibration, **options)

    @pytest.mark.parametrize("granularity", ["layer", "channel"])
    def test_equals_an_ann_that_normalises_itself(self, granularity):
        _, folded, explicit = self.both(t_max=9, granularity=granularity)
        images = torch.rand(40, 3, 6, 6)
        for engine in ("stepped", "analytic"):
            one, other = (snn.run(images, engine=engine) for snn in (folded, explicit))
            for a, b in zip(one.spike_steps.values(), other.spike_steps.values(), strict=True):
                assert torch.equal(a, b)

    def test_is_exact_where_zero_padding_is_not_a_zero_of_the_input(self):
        explicit, snn, _ = self.both(t_max=17)
        images = torch.randint(0, 17, (20, 3, 6, 6)) / 16
        with torch.no_grad():
            relu = explicit[:3](images.double())
        drive = relu * (16 / snn.graph.scales["1"])
        levels = snn.run(images, engine="stepped").levels("1")
        exact = levels == round_half_up(drive).clamp(0, 16)
        assert (exact | near_a_half(drive)).all()
        border = torch.ones(6, 6, dtype=bool)
        border[1:-1, 1:-1] = False
        assert (drive[..., border] > 1).float().mean() > 0.2

    def test_makes_the_bias_a_map_that_differs_at_the_border_only(self):
        _, snn, _ = self.both()
        bias = snn.graph.layers[0].neuron.bias
        assert bias.shape == (4, 6, 6)
        inner = bias[:, 1:-1, 1:-1]
        torch.testing.assert_close(inner, inner[:, :1, :1].expand_as(inner))
        assert (bias[:, 0] - inner[:, 0, 0, None]).abs().min() > 1e-3

    def test_of_one_number_serves_all_channels(self):
        ann, images = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 2)), None
        images = torch.rand(30, 3, 6, 6)
        one = quartz_plugin.convert(ann, images, preprocessing=(0.4, 0.3))
        three = quartz_plugin.convert(ann, images, preprocessing=(torch.full((3,), 0.4), [0.3] * 3))
        assert torch.equal(one(images), three(images))

    def test_never_rounds_or_clips_the_normalised_values(self):
        ann = nn.Sequential(nn.Linear(2, 2, bias=False)).double()
        with torch.no_grad():
            ann[0].weight.copy_(torch.eye(2))
        images = torch.tensor([[0.0, 0.25], [0.5, 1.0]])
        snn = quartz_plugin.convert(ann, images, t_max=5, preprocessing=(0.5, 0.25))
        assert snn(images).tolist() == [[-2.0, -1.0], [0.0, 2.0]]

    @pytest.mark.parametrize(
        ("layers", "shape", "words"),
        [
            ([nn.Linear(4, 2)], (4,), r"1 or 4 finite numbers \(inputs \[N, 4\] have no channels: one for all, or one"),
            (
                [nn.Conv2d(3, 1, 1), nn.Flatten(), nn.Linear(20, 2)],
                (3, 4, 5),
                r"1 or 3 finite numbers \(one for all, or one for each of the 3 channels of inputs \[N, 3, 4, 5\]\)",
            ),
        ],
    )
    def test_that_does_not_fit_says_what_would(self, layers, shape, words):
        ann = nn.Sequential(*layers)
        message = message_of(ann, torch.rand(5, *shape), preprocessing=([0.5, 0.5], [0.2, 0.2]))
        assert re.search(words, message), message


class TestTheSpikingNetwork:
    @SOME
    @given(chains(), t_maxima(), NEURONS, SCALES)
    def test_takes_l_plus_two_windows_and_one_step(self, chain, t_max, neuron, scales):
        snn = chain.convert(t_max, **neuron, **scales)
        length, layers = t_max - 1, snn.graph.layers
        signed = layers[-1].neuron.p.rectifier is None
        assert signed == (chain.ends == "linear" or layers[-1].name == "output")
        lead = layers[0].neuron.clock.readout - length
        assert lead == 0 or neuron["bias"] == "spike"
        assert snn.n_steps == (len(layers) + 1 + signed) * length + 1 + lead
        assert list(snn.windows) == ["input", *(layer.name for layer in layers)]
        starts = [window.start for window in snn.windows.values()]
        assert starts == [0, *(lead + number * length for number in range(1, len(layers) + 1))]
        assert all(window.length == length for window in snn.windows.values())

    @SOME
    @given(chains(), t_maxima(), NEURONS, SCALES)
    def test_is_a_graph_of_plain_modules_without_biases(self, chain, t_max, neuron, scales):
        snn = chain.convert(t_max, **neuron, **scales)
        dtypes = {tensor.dtype for tensor in [*snn.parameters(), *snn.buffers()] if tensor.dim()}
        assert dtypes == {next(p.dtype for p in chain.ann.parameters())}
        assert not any(parameter.requires_grad for parameter in snn.parameters())
        for module in snn.graph_module.modules():
            if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Linear):
                assert module.bias is None
        for layer in snn.graph.layers[:-1]:
            p = layer.neuron.p
            assert (p.hold, p.rectifier, p.bias_code) == (
                neuron["hold"],
                neuron["rectifier"],
                neuron["bias"],
            )

    @SOME
    @given(chains(), t_maxima(), NEURONS, SCALES)
    def test_has_a_report_row_for_every_module(self, chain, t_max, neuron, scales):
        snn = chain.convert(t_max, **neuron, **scales)
        rows = {row["module"]: row for row in snn.report}
        leaves = [name for name, module in chain.ann.named_modules() if not isinstance(module, nn.Sequential)]
        extra = [name for name in rows if name not in leaves]
        assert set(leaves) <= set(rows)
        assert sorted(extra) == sorted(
            ["preprocessing"] * (chain.preprocessing is not None) + ["output"] * ("output" in snn.windows)
        )
        table = str(snn.report)
        assert len(table.splitlines()) == 2 + len(snn.report) + 1
        for layer in snn.graph.layers:
            row = rows[layer.name]
            assert row["readout"] == snn.windows[layer.name].start
            assert row["window"] == t_max - 1
            assert row["scale"] == pytest.approx(float(snn.graph.scales[layer.name].max()))
            assert row["neurons"] == snn.run(chain.images).spike_steps[layer.name][0].numel()
            assert layer.name in table

    def test_approximates_the_ann_the_better_the_larger_t_max(self):
        ann = small_ann().double().eval()
        ann[1].running_mean.normal_(0, 0.2)
        images = torch.rand(100, 1, 6, 6)
        wanted = ann(images.double()).detach()
        errors = [
            float((quartz_plugin.convert(ann, images, t, percentile=100)(images) - wanted).abs().max())
            for t in (5, 33, 257, 2049)
        ]
        assert errors[1] < errors[0] / 3
        assert errors[2] < errors[1] / 3
        assert errors[3] < errors[2] / 3
        assert errors[3] < 0.005 * wanted.abs().max()

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_is_of_the_anns_dtype(self, dtype):
        snn = quartz_plugin.convert(small_ann().to(dtype), torch.rand(20, 1, 6, 6))
        assert snn.graph.dtype == dtype
        assert snn(torch.rand(2, 1, 6, 6)).dtype == dtype
        assert snn.run(torch.rand(2, 1, 6, 6), engine="stepped").logits.dtype == dtype

    def test_a_half_precision_ann_becomes_float32(self):
        snn = quartz_plugin.convert(small_ann().to(torch.bfloat16), torch.rand(20, 1, 6, 6))
        assert snn.graph.dtype == torch.float32
        assert snn(torch.rand(2, 1, 6, 6)).dtype == torch.float32

    def test_does_not_share_memory_with_the_ann(self):
        ann, images = small_ann(), torch.rand(20, 1, 6, 6)
        snn = quartz_plugin.convert(ann, images, percentile=100)
        before = snn(images)
        with torch.no_grad():
            for tensor in ann.state_dict().values():
                tensor.zero_()
        assert torch.equal(snn(images), before)

    def test_a_deep_copy_is_independent(self):
        images = torch.rand(20, 1, 6, 6)
        snn = quartz_plugin.convert(small_ann(), images)
        before, scales = snn(images), {k: v.clone() for k, v in snn.graph.scales.items()}
        clone = copy.deepcopy(snn)
        assert torch.equal(clone(images), before)
        with torch.no_grad():
            for tensor in clone.graph_module.state_dict().values():
                tensor.zero_()
            for scale in clone.graph.scales.values():
                scale.zero_()
        clone.graph.settings["percentile"] = -1
        clone.graph.report[0]["became"] = "nonsense"
        assert torch.equal(snn(images), before)
        assert not torch.equal(clone(images), before)
        assert all(torch.equal(value, scales[name]) for name, value in snn.graph.scales.items())
        assert snn.graph.settings["percentile"] == 99.9
        assert snn.report[0]["became"] != "nonsense"

    def test_a_deep_copy_stays_trainable(self):
        snn = quartz_plugin.convert(small_ann(), torch.rand(20, 1, 6, 6))
        snn.requires_grad_(True)
        clone = copy.deepcopy(snn)
        assert all(parameter.requires_grad for parameter in clone.parameters())

    def test_a_deep_copy_in_mid_inference_starts_anew_and_leaves_the_original_its_state(self):
        snn = quartz_plugin.convert(nn.Sequential(nn.Linear(2, 2)), torch.rand(20, 2))
        snn.graph_module(torch.ones(1, 2))
        clone = copy.deepcopy(snn)
        assert clone.graph.layers[0].neuron.mem.numel() == 0
        assert snn.graph.layers[0].neuron.mem.numel() == 2

    def test_follows_to_double(self):
        images = torch.rand(20, 1, 6, 6)
        snn = quartz_plugin.convert(small_ann(), images)
        assert snn.double()(images).dtype == torch.float64

    def test_many_conversions_leave_no_neuron_alive(self):
        ann, images = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2)), torch.rand(10, 2)
        with torch.no_grad():
            ann[0].bias.fill_(1.0)
        registered, alive = len(SpikingNeuron.instances), []
        for _ in range(100):
            snn = quartz_plugin.convert(ann, images, t_max=4)
            nets = [snn, snn.to_snntorch(), copy.deepcopy(snn)]
            snn(images)
            nets[1](images)
            alive += [weakref.ref(module) for net in nets for module in net.modules() if isinstance(module, TTFSNeuron)]
        assert len(alive) == 600
        assert len(SpikingNeuron.instances) == registered
        del snn, nets
        gc.collect()
        assert [ref() for ref in alive if ref() is not None] == []

    def test_settings_say_how_it_was_made(self):
        snn = quartz_plugin.convert(
            small_ann(3), torch.rand(9, 3, 6, 6), 7, rectifier="silent", preprocessing=(0.5, [0.2, 0.3, 0.4])
        )
        settings = snn.graph.settings
        assert settings["t_max"] == 7
        assert settings["rectifier"] == "silent"
        assert settings["hold"] is True
        assert settings["preprocessing"][0] == [0.5]

    def test_the_defaults_are_those_of_the_design(self):
        settings = quartz_plugin.convert(nn.Sequential(nn.Linear(2, 2)), torch.rand(9, 2)).graph.settings
        settings.pop("preprocessing")
        assert (
            settings.items()
            >= {
                "t_max": 16,
                "hold": True,
                "rectifier": "spike",
                "bias": "synapse",
                "percentile": 99.9,
                "output_percentile": 100.0,
                "granularity": "layer",
            }.items()
        )
        assert quartz_plugin.PAPER == {"hold": False, "bias": "spike", "rectifier": "spike"}


class TestPools:
    def test_max_pooling_before_the_relu_is_moved_behind_it(self):
        conv, last, images = nn.Conv2d(1, 3, 3), nn.Linear(12, 2), torch.rand(40, 1, 6, 6)
        before = nn.Sequential(conv, nn.MaxPool2d(2), nn.ReLU(), nn.Flatten(), last)
        behind = nn.Sequential(conv, nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), last)
        moved = quartz_plugin.convert(before, images)
        assert torch.equal(moved(images), quartz_plugin.convert(behind, images)(images))
        assert "moved" in next(row for row in moved.report if row["module"] == "1")["became"]
        kinds = [type(module) for module in moved.graph_module.children()]
        assert kinds.index(TTFSNeuron) < kinds.index(FirstSpikeMaxPool)

    def test_average_pooling_is_not_rounded(self):
        # The mean of levels 3, 0, 0, 0 is 3/4: rounded on its own, 4 x it would be 4, not 3.
        ann = nn.Sequential(nn.ReLU(), nn.AvgPool1d(4), nn.ReLU(), nn.Flatten(), nn.Linear(1, 1, bias=False))
        with torch.no_grad():
            ann[4].weight.fill_(4.0)
        calibration = torch.tensor([[[1.0, 1.0, 1.0, 1.0]]])
        snn = quartz_plugin.convert(ann[:2].append(nn.Flatten()), calibration, t_max=13)
        result = snn.run(torch.tensor([[[0.25, 0.0, 0.0, 0.0]]]), engine="stepped")
        assert result.levels("output").tolist() == [[1]]
        double = nn.Sequential(*ann[:2], nn.Flatten(), ann[4])
        snn = quartz_plugin.convert(double, calibration, t_max=13)
        result = snn.run(torch.tensor([[[0.25, 0.0, 0.0, 0.0]]]), engine="stepped")
        assert result.logits.tolist() == [[pytest.approx(4 / 12)]]

    @pytest.mark.parametrize("pool", [nn.MaxPool2d(2), nn.AdaptiveMaxPool2d(2), nn.MaxPool2d(3, 2, padding=1)])
    def test_a_pad_before_max_pooling_keeps_the_scales_of_channels(self, pool):
        ann = nn.Sequential(
            nn.Conv2d(1, 3, 3), nn.ReLU(), nn.ZeroPad2d(1), pool, nn.Flatten(), nn.LazyLinear(2)
        ).double()
        images = torch.rand(60, 1, 5, 5)
        wanted = ann(images.double()).detach()
        snn = quartz_plugin.convert(ann, images, 2000, granularity="channel", percentile=100)
        assert (snn(images) - wanted).abs().max() < 0.01

    def test_max_pooling_over_flattened_positions_keeps_the_scales_of_channels(self):
        ann = nn.Sequential(
            nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Flatten(2), nn.MaxPool1d(3), nn.Flatten(), nn.Linear(9, 2)
        ).double()
        images = torch.rand(60, 1, 5, 5)
        wanted = ann(images.double()).detach()
        snn = quartz_plugin.convert(ann, images, 2000, granularity="channel", percentile=100)
        assert (snn(images) - wanted).abs().max() < 0.01

    def test_max_pooling_across_channels_of_different_scales_is_right_or_refused(self):
        ann = nn.Sequential(
            nn.Linear(4, 6), nn.ReLU(), nn.Unflatten(1, (1, 6)), nn.MaxPool1d(2), nn.Flatten(), nn.Linear(3, 2)
        ).double()
        with torch.no_grad():
            ann[0].weight.mul_(torch.logspace(-1, 1, 6).double().unsqueeze(1))
            ann[0].bias.abs_()
        images = torch.rand(60, 4)
        wanted = ann(images.double()).detach()
        try:
            snn = quartz_plugin.convert(ann, images, 2000, granularity="channel", percentile=100)
        except ConversionError as error:
            assert "'3'" in str(error)  # noqa: PT017
        else:
            assert (snn(images) - wanted).abs().max() < 0.05

    @pytest.mark.parametrize("granularity", ["layer", "channel"])
    def test_a_parameterless_end_keeps_dtype_and_value(self, granularity):
        ann = nn.Sequential(
            nn.Sequential(nn.Conv2d(1, 3, 3)), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
        ).double()
        images = torch.rand(60, 1, 5, 5)
        wanted = ann(images.double()).detach()
        snn = quartz_plugin.convert(ann, images, 2000, granularity=granularity, percentile=100)
        assert {parameter.dtype for parameter in snn.parameters()} == {torch.float64}
        assert (snn(images) - wanted).abs().max() < 0.01


class TestChannelGranularity:
    def test_gives_weak_channels_the_whole_range(self):
        ann = nn.Sequential(nn.Conv2d(1, 2, 1, bias=False), nn.ReLU(), nn.Flatten(), nn.Linear(8, 1))
        with torch.no_grad():
            ann[0].weight.copy_(torch.tensor([1.0, 0.01]).view(2, 1, 1, 1))
        images = torch.rand(100, 1, 2, 2)
        levels = {
            granularity: quartz_plugin.convert(ann, images, 17, granularity=granularity, percentile=100)
            .run(images)
            .levels("1")
            for granularity in ("layer", "channel")
        }
        assert levels["layer"][:, 1].max() == 0
        assert levels["channel"][:, 1].max() == 16
        assert torch.equal(levels["layer"][:, 0], levels["channel"][:, 0])

    @pytest.mark.parametrize("groups", [1, 2, 3, 6])
    @pytest.mark.parametrize("norm", [True, False])
    def test_scales_the_inputs_of_every_group_by_their_own_channel(self, groups, norm):
        ann = nn.Sequential(
            nn.Conv2d(2, 6, 1),
            nn.ReLU(),
            nn.BatchNorm2d(6) if norm else nn.Identity(),
            nn.Conv2d(6, 6, 3, padding=1, groups=groups),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(96, 3),
        )
        ann = ann.double().eval()
        with torch.no_grad():
            ann[0].bias.add_(1.0)
            ann[0].weight.mul_(torch.arange(1, 7).view(6, 1, 1, 1))
            if norm:
                ann[2].weight.uniform_(0.5, 2)
        images = torch.rand(50, 2, 4, 4)
        wanted = ann(images.double()).detach()
        snn = quartz_plugin.convert(ann, images, 1 << 20, granularity="channel", percentile=100)
        assert snn.graph.scales["1"].unique().numel() == 6
        torch.testing.assert_close(snn(images), wanted, rtol=0, atol=1e-3)

    @SOME
    @given(chains(dtypes=(torch.float64,)))
    def test_changes_nothing_at_large_t_max(self, chain):
        results = {}
        chain.calibration = torch.cat([chain.calibration, chain.images])
        for granularity in ("layer", "channel"):
            snn = chain.convert(1 << 20, granularity=granularity, percentile=100)
            result = snn.run(chain.images)
            assert_the_ann_agrees(chain, snn, result.spike_steps)
            results[granularity] = result.logits
        # Only where the weakest channels' rounding is magnified again can anything be seen at 2**-20.
        torch.testing.assert_close(results["layer"], results["channel"], rtol=0, atol=1e-3)


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.relu, self.b = nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)

    def forward(self, x):
        return self.b(x + self.relu(self.a(x)))


class Branching(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 2)

    def forward(self, x):
        return self.fc(x) if x.sum() > 0 else self.fc(-x)


class Scaled(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.fc, self.function = nn.Linear(4, 2), function

    def forward(self, x):
        return self.function(self.fc(x))


class Path(nn.Module):
    def __init__(self, module):
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(1, 4, 3), module)
        self.classifier = nn.Linear(64, 2)

    def forward(self, x):
        return self.classifier(torch.flatten(self.features(x), 1))


def message_of(ann, calibration, kind=ValueError, **options):
    """The message of the one error that a conversion raises: one line, not empty."""
    with pytest.raises(kind) as caught:
        quartz_plugin.convert(ann, calibration, **options)
    message = str(caught.value)
    assert message
    assert "\n" not in message
    return message


class TestMaxPoolingAtTheEnd:
    @pytest.mark.parametrize(
        "layers",
        [
            [nn.Conv2d(1, 2, 3), nn.ReLU(), nn.MaxPool2d(2)],
            [nn.Conv2d(1, 2, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Dropout()],
            [nn.Conv2d(1, 2, 3), nn.MaxPool2d(2), nn.ReLU()],
            [nn.MaxPool2d(2)],
        ],
    )
    def test_is_read_out_by_neurons_of_their_own(self, layers):
        ann, images = nn.Sequential(*layers).eval(), torch.rand(20, 1, 6, 6)
        for conv in layers[: len(layers) > 1]:
            nn.init.uniform_(conv.weight, -0.1, 0.3)
        snn = quartz_plugin.convert(ann, images, 256, percentile=100)
        assert list(snn.windows)[-1] == "output"
        torch.testing.assert_close(snn(images), ann(images).detach(), rtol=0, atol=0.02)


def dead_ann(rectifier, channels=()):
    """A network whose first ReLU is 0, or some of its channels, for images of values up to 1/2; and such images."""
    torch.manual_seed(0)
    ann = nn.Sequential(nn.Conv2d(1, 4, 3), rectifier, nn.Conv2d(4, 3, 1), nn.ReLU(), nn.Flatten(), nn.Linear(48, 3))
    with torch.no_grad():
        ann[0].weight.abs_()
        ann[0].bias.fill_(0.1)
        chosen = list(channels) or slice(None)
        ann[0].bias[chosen] = -0.9 * ann[0].weight.sum((1, 2, 3))[chosen]
        ann[2].bias.fill_(0.3)
    return ann, torch.rand(30, 1, 6, 6) / 2


class TestDeadLayers:
    @pytest.mark.parametrize(
        "options", [{}, {"hold": False}, {"rectifier": "silent"}, quartz_plugin.PAPER, {"weight_bits": 8}]
    )
    @pytest.mark.parametrize("granularity", ["layer", "channel"])
    def test_are_converted_as_silent_with_a_warning_that_names_them(self, options, granularity, tmp_path):
        ann, images = dead_ann(nn.ReLU())
        with pytest.warns(UserWarning, match=r"'1' is 0 on all calibration images, so its scale is a guess") as caught:
            snn = quartz_plugin.convert(ann, images, 65, percentile=100, granularity=granularity, **options)
        assert len(caught) == 1
        assert "0 on all calibration images" in str(snn.report)
        assert (snn.graph.scales["1"] == 1).all()
        engines = [
            snn.run(images, engine=engine) for engine in ("stepped", "event", *(["analytic"] if snn.graph.hold else []))
        ]
        for result in engines:
            assert (result.levels("1") == 0).all()
            torch.testing.assert_close(result.logits, ann(images).detach(), rtol=0, atol=0.05)
        check = quartz_plugin.verify(ann, snn, images)
        assert check.layers[0].worst == check.layers[0].relative == 0
        snn.save(tmp_path / "net.snn")
        assert torch.equal(quartz_plugin.load(tmp_path / "net.snn")(images), snn(images))
        net = snn.to_snntorch()
        spikes = torch.stack([net(step) for step in quartz_plugin.encode(images.to(snn.graph.dtype), 65, snn.n_steps)])
        torch.testing.assert_close(snn.decode(spikes), engines[0].logits)
        # What the layer gives on other images is of the size of what it listens to.
        bright = torch.ones(1, 1, 6, 6)
        assert (snn.run(bright, engine="stepped").levels("1") > 0).all()

    @pytest.mark.parametrize("rectifier", [nn.ReLU6(), nn.Hardtanh(0.0, 0.7)])
    def test_with_an_upper_bound_have_it_for_their_scale(self, rectifier):
        ann, images = dead_ann(rectifier)
        with pytest.warns(UserWarning, match=r"'1' is 0 on all calibration images, so its scale is its upper bound"):
            snn = quartz_plugin.convert(ann, images, 2000, percentile=100)
        assert float(snn.graph.scales["1"]) == pytest.approx(rectifier.max_val)
        with pytest.warns(UserWarning, match="upper bound"):
            snn = quartz_plugin.convert(ann, images, 2000, percentile=100, granularity="channel")
        bright = torch.rand(5, 1, 6, 6) / 2 + 0.5
        torch.testing.assert_close(
            snn.run(bright).levels("1") / 1999 * rectifier.max_val, ann[:2](bright).detach(), rtol=0, atol=0.01
        )

    def test_channels_have_that_of_the_others_without_a_word(self):
        ann, images = dead_ann(nn.ReLU(), [1, 3])
        snn = quartz_plugin.convert(ann, images, 2000, percentile=100, granularity="channel")
        torch.testing.assert_close(snn(images), ann(images).detach(), rtol=0, atol=0.01)

    def test_behind_one_another_and_the_output(self):
        ann, images = dead_ann(nn.ReLU())
        with torch.no_grad():
            ann[2].bias.fill_(-0.3)
            ann[5].bias.zero_()
        with pytest.warns(UserWarning, match="is 0 on all") as caught:
            snn = quartz_plugin.convert(ann, images)
        assert [str(warning.message).split("'")[1] for warning in caught] == ["1", "3", "5"]
        assert torch.equal(snn(images), torch.zeros(30, 3))

    @pytest.mark.filterwarnings("ignore:tuning moved the output away")
    @pytest.mark.parametrize("method", ["least_squares", "search+bias_correction+output", "percentile+tune", "distill"])
    def test_are_tuned_around_and_trained(self, method):
        ann, images = dead_ann(nn.ReLU())
        with pytest.warns(UserWarning, match="'1' is 0 on all"):
            snn = quartz_plugin.convert(ann, images, 9, calibration_method=method, tuning_passes=2)
        assert snn(images).isfinite().all()
        with pytest.warns(UserWarning, match="'1' is 0 on all"):
            net = quartz_plugin.prepare_qat(ann, images, 9)
        loss = quartz_plugin.DistillationLoss(net)(net, images)
        assert float(loss) < 10


class TestRefusedNetworks:
    @pytest.mark.parametrize(
        ("module", "words"),
        [
            (nn.Sigmoid(), r"'features\.1' \(Sigmoid\): it is not a ReLU"),
            (nn.LeakyReLU(), r"'features\.1' \(LeakyReLU\): it is not a ReLU"),
            (nn.GELU(), r"'features\.1' \(GELU\).*train the network with nn\.ReLU"),
            (nn.GroupNorm(2, 4), r"'features\.1' \(GroupNorm\)"),
            (nn.InstanceNorm2d(4), r"'features\.1' \(InstanceNorm2d\)"),
            (nn.BatchNorm2d(4, track_running_stats=False), r"'features\.1'.*track_running_stats=True"),
            (nn.MaxPool2d(1, return_indices=True), r"'features\.1'.*return_indices=False"),
            (nn.Flatten(0), r"'features\.1' \(Flatten\).*start_dim=1"),
            (nn.LogSoftmax(1), r"'features\.1' \(LogSoftmax\).*inside a network.*train the network without it"),
            (nn.LPPool2d(2, 2), r"'features\.1' \(LPPool2d\).*not in the table.*register_rule"),
            (
                nn.Upsample(scale_factor=2, mode="linear"),
                r"the network does not run on inputs.*3D|'features\.1'.*mode='linear'",
            ),
        ],
    )
    def test_name_the_module_by_its_path(self, module, words):
        message = message_of(Path(module), torch.rand(5, 1, 6, 6), ConversionError)
        assert re.search(words, message), message

    @pytest.mark.parametrize(
        ("function", "words"),
        [
            (lambda x: (x * x.relu()).relu(), r"'mul' \(mul\).*multiplies two activations"),
            (lambda x: 1 / x, "truediv.*divides by activations"),
            (lambda x: torch.sigmoid(x).relu(), "sigmoid"),
            (lambda x: x.view(-1), r"'view' \(view\).*mixes the batch"),
            (lambda x: x.t(), r"'t' \(t\).*not in the table"),
            (lambda x: x.permute(1, 0), "'permute'.*mixes the batch"),
            (lambda x: x.clamp(1, -1).relu(), "'clamp'.*leaves no values"),
            (lambda x: F.threshold(x, 0.5, 0).relu(), "threshold'.*jumps from 0 to 0.5"),
            (lambda x: x.amax().expand(5, 1).relu(), "'amax'.*mixes the batch"),
            (lambda x: x.min().expand(5, 1).relu(), "'min'.*mixes the batch"),
            (lambda x: x.min(1)[1].relu(), "'getitem'.*places of values, which no spikes encode"),
            (lambda x: F.dropout(x, 0.5), "'dropout'.*drops units in eval mode.*training=self.training"),
            (lambda x: F.pad(x, (1, 1), value=math.nan), "'pad'.*pads with nan, which no neuron encodes"),
            (lambda x: F.pad(x, (1, 1), value=math.inf), "'pad'.*pads with inf, which no neuron encodes"),
            (lambda x: F.pad(x, (1, 1), value=-math.inf).relu(), "'pad'.*pads with -inf.*max pool right behind it"),
            (
                lambda x: F.max_pool1d(F.pad(x.unsqueeze(1), (2, 0), value=-math.inf), 2),
                "'pad'.*'max_pool1d' has pooling windows of its padding alone",
            ),
            (lambda x: x[torch.tensor([0])], "'getitem'.*mixes the batch"),
            (lambda x: x + x[:1], "'getitem'.*mixes the batch"),
            (lambda x: x + x.unsqueeze(1), "'add'.*mixes the batch"),
            (lambda x: x.expand(2, -1, -1), "'expand'.*mixes the batch"),
            (lambda x: x.repeat(2, 1), "'repeat'.*mixes the batch"),
            (lambda x: x.repeat_interleave(2), "'repeat_interleave'.*mixes the batch"),
            (lambda x: x.index_select(1, torch.tensor([7])), "the network does not run on inputs.*out of DATA bounds"),
            (lambda x: F.log_softmax(x, 1).relu(), "log_softmax.*train the network without it"),
            (lambda x: F.gelu(x).relu(), "gelu"),
            (lambda x: x[:1], "'getitem'.*mixes the batch"),
        ],
    )
    def test_that_call_functions_are_told_which(self, function, words):
        message = message_of(Scaled(function), torch.rand(5, 4), ConversionError)
        assert re.search(words, message), message

    def test_with_an_addition_of_shapes_that_do_not_fit(self):
        class Unfit(nn.Module):
            def __init__(self):
                super().__init__()
                self.fc = nn.Linear(4, 2)

            def forward(self, x):
                return x + self.fc(x)

        message = message_of(Unfit(), torch.rand(5, 4), ConversionError)
        assert re.search(r"does not run on inputs of shape \[1, 4\].*must match the size", message), message

    def test_with_branches_that_depend_on_the_data(self):
        message = message_of(Branching(), torch.rand(5, 4), ConversionError)
        assert re.search(r"torch\.fx cannot trace Branching.*must not branch on the values", message), message

    @pytest.mark.parametrize("ann", [nn.Sequential(), nn.Sequential(nn.Flatten(), nn.Dropout()), nn.Identity()])
    def test_that_compute_nothing(self, ann):
        assert "computes nothing" in message_of(ann, torch.rand(5, 4), ConversionError)

    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    @pytest.mark.parametrize("where", ["0.weight", "1.running_var", "6.bias"])
    def test_with_nan_in_their_weights(self, value, where):
        ann = small_ann()
        ann.state_dict()[where].view(-1)[0] = value
        message = message_of(ann, torch.rand(5, 1, 6, 6))
        assert re.search(rf"{re.escape(where)} contains NaN", message), message

    def test_with_weights_not_yet_initialised(self):
        ann = nn.Sequential(nn.LazyLinear(3))
        assert re.search(r"0\.weight is not initialised", message_of(ann, torch.rand(5, 4)))

    def test_that_are_no_modules(self):
        message = message_of(lambda x: x, torch.rand(5, 4), TypeError)
        assert re.search(r"ann must be a torch\.nn\.Module, got function", message), message

    def test_that_do_not_run_on_the_calibration_images(self):
        message = message_of(nn.Sequential(nn.Linear(4, 2)), torch.rand(5, 3), ConversionError)
        assert re.search(r"does not run on inputs of shape \[1, 3\]", message), message

    def test_that_do_not_run_though_they_are_hooked(self):
        ann = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
        ann[1].register_forward_hook(lambda module, inputs, output: None)
        message = message_of(ann, torch.rand(5, 3), ConversionError)
        assert re.search(r"does not run on inputs of shape \[1, 3\]", message), message

    def test_that_overflow(self):
        ann = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
        with torch.no_grad():
            ann[0].weight.fill_(3e38)
        message = message_of(ann, torch.rand(5, 4), ConversionError)
        assert re.search(r"'1' gives NaN or infinity", message), message


class TestRefusedCalibration:
    ann = nn.Sequential(nn.Linear(4, 2))

    @pytest.mark.parametrize(
        "empty", [[], torch.zeros(0, 4), iter([]), [torch.zeros(0, 4)]], ids=["list", "tensor", "iterator", "batch"]
    )
    def test_that_is_empty(self, empty):
        assert "calibration is empty" in message_of(self.ann, empty)

    def test_that_is_all_zero(self):
        assert "calibration is all zero" in message_of(self.ann, torch.zeros(5, 4))

    def test_that_looks_normalised(self):
        message = message_of(self.ann, torch.randn(50, 4))
        assert re.search(r"must lie in \[0, 1\].*looks normalised.*preprocessing=\(mean, std\)", message), message

    def test_that_exceeds_one_without_being_normalised(self):
        message = message_of(self.ann, 255 * torch.rand(50, 4))
        assert re.search(r"calibration must lie in \[0, 1\], got values from", message), message
        assert "normalised" not in message

    def test_with_nan(self):
        images = torch.rand(130, 4)
        images[129, 2] = float("nan")
        assert "calibration contains NaN" in message_of(self.ann, images)
        assert "calibration contains NaN" in message_of(self.ann, images.split(10))

    def test_of_bytes(self):
        message = message_of(self.ann, torch.zeros(5, 4, dtype=torch.uint8))
        assert re.search("uint8.*divide raw bytes by 255", message), message

    def test_of_different_shapes(self):
        ann = nn.Sequential(nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(1, 2))
        message = message_of(ann, [torch.rand(5, 1, 4), torch.rand(5, 1, 6)])
        assert re.search(r"differ in shape: \[1, 4\] and \[1, 6\]", message), message

    def test_without_a_batch_dimension(self):
        assert "batch dimension" in message_of(self.ann, [torch.rand(4)])

    @pytest.mark.parametrize("wrong", [3, None, "images", {"images": torch.rand(5, 4)}])
    def test_of_another_kind(self, wrong):
        assert "calibration must be a Tensor" in message_of(self.ann, wrong, TypeError)

    def test_of_batches_that_are_no_tensors(self):
        assert "must be a torch.Tensor" in message_of(self.ann, [["a", "b"]], TypeError)


class TestRefusedOptions:
    @pytest.mark.parametrize("t_max", [1, 0, -3, 16.0, "16", True, None])
    def test_t_max(self, t_max):
        message = message_of(nn.Sequential(nn.Linear(4, 2)), torch.rand(5, 4), t_max=t_max)
        assert re.search(r"t_max must be a whole number of at least 2", message), message

    @pytest.mark.parametrize(
        ("options", "words"),
        [
            ({"bias": "spike"}, r'bias="spike".*hold=False, rectifier="spike" only'),
            ({"bias": "spike", "hold": False, "rectifier": "silent"}, r'bias="spike".*rectifier="spike" only'),
            ({"bias": "neuron"}, r"""bias must be "synapse" or "spike", got 'neuron'"""),
            ({"rectifier": "quiet"}, r"""rectifier must be "spike" or "silent", got 'quiet'"""),
            ({"rectifier": None}, r"""rectifier must be "spike" or "silent", got None"""),
            ({"granularity": "neuron"}, r"""granularity must be "layer" or "channel", got 'neuron'"""),
            ({"percentile": 0}, r"^percentile must be a number in \(0, 100\], got 0"),
            ({"percentile": 101}, r"^percentile .* got 101"),
            ({"percentile": float("nan")}, r"^percentile .* got nan"),
            ({"percentile": "99"}, r"^percentile .* got '99'"),
            ({"output_percentile": 0}, r"^output_percentile .* got 0"),
            ({"output_percentile": 100.5}, r"^output_percentile .* got 100\.5"),
            (
                {"preprocessing": ([0.5, 0.5], 0.2)},
                r"preprocessing: mean must be 1 or 4 finite numbers.*\[0\.5, 0\.5\]",
            ),
            ({"preprocessing": (0.5, [0.2] * 3)}, r"preprocessing: std must be 1 or 4 finite numbers"),
            ({"preprocessing": (0.5, 0.0)}, r"preprocessing: std must be positive, got \[0\.0\]"),
            ({"preprocessing": (0.5, [1, 1, 1, 0])}, r"preprocessing: std must be positive"),
            ({"preprocessing": (0.5, -1.0)}, r"preprocessing: std must be positive"),
            ({"preprocessing": (float("nan"), 1.0)}, r"preprocessing: mean must be .* finite"),
            ({"preprocessing": 0.5}, r"preprocessing must be \(mean, std\), got 0\.5"),
            ({"preprocessing": (0.5, 0.2, 0.1)}, r"preprocessing must be \(mean, std\)"),
            ({"preprocessing": ("a", "b")}, r"preprocessing must be \(mean, std\)"),
        ],
    )
    def test_each_in_one_clear_message(self, options, words):
        message = message_of(nn.Sequential(nn.Linear(4, 2)), torch.rand(5, 4), **options)
        assert re.search(words, message), message


def test_levels_are_those_of_the_paper_s_code_for_a_worked_example():
    # One weight of 1, no bias, scale 1: the network hands its input on, rounded half up.
    ann = nn.Sequential(nn.Linear(1, 1, bias=False), nn.ReLU(), nn.Linear(1, 1, bias=False))
    with torch.no_grad():
        ann[0].weight.fill_(1.0)
        ann[2].weight.fill_(-1.0)
    images = torch.tensor([[0.0], [0.124], [0.125], [0.5], [1.0]])
    for options in ({}, {"hold": False}, {"rectifier": "silent"}, quartz_plugin.PAPER):
        snn = quartz_plugin.convert(ann, images, 5, **{"percentile": 100, **options})
        result = snn.run(images, engine="stepped")
        assert fired_levels(snn.graph, "input", result.spike_steps["input"]).flatten().tolist() == [0, 0, 1, 2, 4]
        assert result.levels("1").flatten().tolist() == [0, 0, 1, 2, 4]
        assert result.logits.flatten().tolist() == [0, 0, -0.25, -0.5, -1.0]
        # Window of the output: 1 at step 8, 0 at 12, -1 at 16.
        assert result.spike_steps["output"].flatten().tolist() == [12, 12, 13, 14, 16]
        assert snn.n_steps == 17
