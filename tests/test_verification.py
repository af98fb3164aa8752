"""verify: how far a spiking network is from its ANN, told layer by layer."""

import copy
import re

import pytest
import torch
from helpers.random_chains import HELD, NEURONS, SCALES, SOME, chains, fired_levels, t_maxima
from hypothesis import given
from torch import nn

import quartz_plugin


def separable():
    """A classifier whose logits lie far apart, with images for it."""
    torch.manual_seed(5)
    ann = nn.Sequential(nn.Linear(3, 6, bias=False), nn.ReLU(), nn.Linear(6, 3, bias=False))
    with torch.no_grad():
        ann[0].weight.copy_(torch.cat([torch.eye(3), 2 * torch.eye(3)]))
        ann[2].weight.copy_(torch.cat([torch.eye(3), torch.eye(3)], 1))
    images = torch.rand(90, 3) * 0.3
    images[torch.arange(90), torch.arange(90) % 3] += 0.6
    return ann, images


class TestVerify:
    @SOME
    @given(chains(), t_maxima(), NEURONS, SCALES)
    def test_compares_every_layer(self, chain, t_max, neuron, scales):
        snn = chain.convert(t_max, **neuron, **scales)
        check = quartz_plugin.verify(chain.ann, snn, chain.images)
        assert [layer.layer for layer in check.layers] == list(snn.windows)[1:]
        assert 0 <= check.agreement <= 1
        assert check.images == len(chain.images)
        result = snn.run(chain.images)
        for layer in check.layers:
            steps = result.spike_steps[layer.layer]
            assert layer.silent == pytest.approx(float((steps == -1).float().mean()))
            assert layer.early == pytest.approx(float(result.early[layer.layer].float().mean()))
            assert 0 <= layer.mean <= layer.worst
            assert 0 <= layer.saturated <= 1

    @SOME
    @given(chains(), t_maxima(), HELD, SCALES)
    def test_the_first_layer_on_representable_images_is_off_by_half_a_step(self, chain, t_max, neuron, scales):
        length = t_max - 1
        images = torch.floor(chain.images * length) / length
        chain.calibration = torch.cat([chain.calibration, images])
        snn = chain.convert(t_max, **neuron, **(scales | {"percentile": 100}))
        first = quartz_plugin.verify(chain.ann, snn, images).layers[0]
        # Inputs have no error, nothing exceeds the scale of 100 %: what is left is the rounding.
        assert first.worst <= 0.5 + 1e-3
        assert first.early == 0
        assert first.saturated == 0

    def test_tells_mean_and_worst_in_steps(self):
        ann = nn.Sequential(nn.Linear(1, 1, bias=False), nn.ReLU(), nn.Linear(1, 1, bias=False))
        with torch.no_grad():
            ann[0].weight.fill_(1.0)
            ann[2].weight.fill_(1.0)
        images = torch.tensor([[1.0], [0.5], [0.125], [0.3]])
        snn = quartz_plugin.convert(ann, images, t_max=5, percentile=100)
        first = quartz_plugin.verify(ann, snn, images).layers[0]
        # In steps of 1/4: 4, 2, 0.5, 1.2 become 4, 2, 1, 1.
        assert first.worst == pytest.approx(0.5, abs=1e-5)
        assert first.mean == pytest.approx(0.7 / 4, abs=1e-5)

    def test_counts_what_exceeds_the_scale(self):
        ann, images = nn.Sequential(nn.Linear(1, 1, bias=False), nn.ReLU(), nn.Linear(1, 1)), torch.rand(1000, 1)
        with torch.no_grad():
            ann[0].weight.fill_(1.0)
        snn = quartz_plugin.convert(ann, images, t_max=101, percentile=80)
        first = quartz_plugin.verify(ann, snn, images).layers[0]
        assert first.saturated == pytest.approx(0.2, abs=0.02)
        assert first.worst == pytest.approx(100 * (float(images.max()) / 0.8 - 1), rel=0.1)

    @pytest.mark.parametrize("t_max", [16, 64, 256])
    def test_agreement_is_one_on_a_separable_case(self, t_max):
        ann, images = separable()
        check = quartz_plugin.verify(ann, quartz_plugin.convert(ann, images, t_max, percentile=100), images)
        assert check.agreement == 1.0
        assert check.ties == 0.0

    def test_agreement_counts_the_images_of_the_same_class(self):
        ann, images = separable()
        snn = quartz_plugin.convert(ann, images, 64, percentile=100)
        swapped = copy.deepcopy(ann)
        with torch.no_grad():
            swapped[2].weight.copy_(ann[2].weight[[1, 0, 2]])
        assert quartz_plugin.verify(swapped, snn, images).agreement == pytest.approx(1 / 3)

    def test_ties_are_told(self):
        ann, images = separable()
        with torch.no_grad():
            ann[2].weight[1] = ann[2].weight[0]
        snn = quartz_plugin.convert(ann, images, 64, percentile=100)
        shares = [quartz_plugin.verify(ann, snn, images[first::3]).ties for first in (0, 2)]
        assert shares == [1.0, 0.0]

    @pytest.mark.parametrize("engine", ["stepped", "analytic", "auto"])
    def test_takes_any_engine(self, engine):
        ann, images = separable()
        snn = quartz_plugin.convert(ann, images, 9)
        assert quartz_plugin.verify(ann, snn, images, engine=engine).agreement > 0.9

    def test_does_not_modify_the_ann(self):
        ann, images = separable()
        ann = nn.Sequential(ann, nn.BatchNorm1d(3)).train()
        state = copy.deepcopy(ann.state_dict())
        snn = quartz_plugin.convert(ann, images, 9)
        quartz_plugin.verify(ann, snn, images)
        assert ann.training
        assert all(torch.equal(value, state[name]) for name, value in ann.state_dict().items())

    def test_a_silent_rectified_output_says_0_where_it_says_nothing(self):
        ann, images = nn.Sequential(nn.Linear(3, 5), nn.ReLU()), torch.rand(50, 3)
        spike = quartz_plugin.verify(ann, quartz_plugin.convert(ann, images, 9), images)
        snn = quartz_plugin.convert(ann, images, 9, rectifier="silent")
        silent = quartz_plugin.verify(ann, snn, images)
        assert silent.layers[0].worst == pytest.approx(spike.layers[0].worst)
        assert silent.layers[0].silent > 0
        steps = snn.run(images).spike_steps["1"]
        assert torch.equal(snn.run(images).levels("1"), fired_levels(snn.graph, "1", steps))


class TestTheTable:
    def test_prints_a_line_a_layer_and_the_agreement(self):
        ann, images = separable()
        text = str(quartz_plugin.verify(ann, quartz_plugin.convert(ann, images, 64, percentile=100), images))
        lines = text.splitlines()
        assert lines[0].split() == ["layer", "mean", "worst", "relative", "saturated", "early", "silent"]
        assert set(lines[1]) == {"-", " "}
        assert [line.split()[0] for line in lines[2:4]] == ["1", "output"]
        assert "distance from the ANN in time steps" in lines[4]
        assert lines[5] == "no layer deviates by more than 25 % of the size of its values"
        assert lines[6] == "top-1 agreement with the ANN 100.00 %, ties 0.00 % (90 images)"
        assert len(lines) == 7
        assert max(map(len, lines[:4])) < 80

    def test_the_report_prints_a_line_a_module(self):
        ann, images = separable()
        lines = str(quartz_plugin.convert(ann, images, 9).report).splitlines()
        assert lines[0].split()[:4] == ["module", "operation", "became", "exact"]
        assert [line.split()[:2] for line in lines[2:5]] == [["0", "Linear"], ["1", "ReLU"], ["2", "Linear"]]
        assert re.search(r"^output +signed output +output layer +exact +3 ", lines[5])


class TestRefusals:
    @pytest.fixture
    def case(self):
        ann, images = separable()
        return ann, quartz_plugin.convert(ann, images, 9), images

    @pytest.mark.parametrize(
        "other",
        [
            nn.Sequential(nn.Linear(3, 3)),
            nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 3)),
            nn.Sequential(nn.Linear(3, 6), nn.ReLU(), nn.Linear(6, 4)),
            nn.Sequential(nn.Linear(3, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 3)),
            nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)),
            nn.Sequential(nn.Linear(3, 6), nn.Sigmoid(), nn.Linear(6, 3)),
        ],
    )
    def test_another_network(self, case, other):
        _, snn, images = case
        with pytest.raises(ValueError, match=r"not the same network|does not run on|cannot convert"):
            quartz_plugin.verify(other, snn, images)

    def test_no_module(self, case):
        _, snn, images = case
        with pytest.raises(TypeError, match="ann must be"):
            quartz_plugin.verify(None, snn, images)

    def test_images_that_do_not_fit(self, case):
        ann, snn, _ = case
        with pytest.raises(ValueError, match="looks normalised"):
            quartz_plugin.verify(ann, snn, torch.randn(9, 3))
        with pytest.raises(ValueError, match="shape the network was converted for"):
            quartz_plugin.verify(ann, snn, torch.rand(9, 4))

    def test_an_engine_that_cannot(self):
        ann, images = separable()
        snn = quartz_plugin.convert(ann, images, 9, hold=False)
        with pytest.raises(ValueError, match=r"analytic.*hold=True"):
            quartz_plugin.verify(ann, snn, images, engine="analytic")


def test_many_images_are_compared_in_chunks_and_none_is_refused():
    ann, images = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)), torch.rand(150, 4)
    snn = quartz_plugin.convert(ann, images, 16, percentile=90)
    whole = quartz_plugin.verify(ann, snn, images)
    parts = [quartz_plugin.verify(ann, snn, part) for part in images.split(50)]
    for index, layer in enumerate(whole.layers):
        assert layer.mean == pytest.approx(sum(part.layers[index].mean for part in parts) / 3)
        assert layer.worst == max(part.layers[index].worst for part in parts)
        assert layer.saturated == pytest.approx(sum(part.layers[index].saturated for part in parts) / 3)
    assert whole.images == 150
    with pytest.raises(ValueError, match="at least one image"):
        quartz_plugin.verify(ann, snn, images[:0])
