"""Options of single layers, and those that a trained network refuses: none is ignored. Images of a wrong shape."""

import pytest
import torch
from torch import nn

import quartz_plugin
from quartz_plugin import ConversionConfig, ConversionError, TTFSActivation


@pytest.fixture
def images():
    return torch.rand(40, 6)


@pytest.fixture
def ann():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3))


class TestATrainedNetwork:
    @pytest.fixture
    def net(self, ann, images):
        return quartz_plugin.prepare_qat(ann, images, 8).eval()

    @pytest.mark.parametrize(
        "options",
        [
            {"t_max": 16},
            {"t_max": {"default": 8, "input": 16}},
            {"config": ConversionConfig(t_max=16)},
            {"layers": {"1": {"t_max": 4}}},
            {"layers": {"output": {"t_max": 4}}},
        ],
    )
    def test_refuses_other_windows(self, net, images, options):
        with pytest.raises(ValueError, match=r"windows of its own, .*'1': 8.*leave t_max out"):
            quartz_plugin.convert(net.network, images, **options)

    @pytest.mark.parametrize(
        "options",
        [
            {"percentile": 1.0},
            {"output_percentile": 50.0},
            {"granularity": "channel"},
            {"calibration_method": "least_squares"},
        ],
    )
    def test_refuses_options_of_scales(self, net, images, options):
        (name,) = options
        with pytest.raises(ValueError, match=f"trained with scales of its own: leave {name} out"):
            quartz_plugin.convert(net.network, images, **options)

    @pytest.mark.parametrize("options", [{"percentile": 50.0}, {"granularity": "channel"}])
    def test_refuses_options_of_a_layers_scale(self, net, images, options):
        (name,) = options
        with pytest.raises(ValueError, match=rf"layers\['1'\]: \['{name}'\] mean nothing there"):
            quartz_plugin.convert(net.network, images, layers={"1": options})

    @pytest.mark.parametrize(
        "options",
        [{}, {"t_max": 8}, {"t_max": {"input": 8, "1": 8}}, {"layers": {"3": {"t_max": 8}}}, {"percentile": 99.9}],
    )
    def test_takes_what_it_was_trained_with_and_notes_it(self, net, images, options):
        snn = quartz_plugin.convert(net.network, images, **options)
        assert torch.equal(snn(images), net.to_spiking()(images))
        assert set(snn.graph.settings["t_max"].values()) == {8}

    def test_takes_the_configuration_of_its_own_file(self, net, images):
        snn = net.to_spiking()
        again = quartz_plugin.convert(net.network, images, config=snn.graph.config)
        assert again.graph.settings == snn.graph.settings


def test_beside_a_trained_layer_options_are_of_the_others(images):
    net = nn.Sequential(nn.Linear(6, 5), TTFSActivation(4), nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3))
    snn = quartz_plugin.convert(net, images, 16, percentile=90.0)
    assert [window.length + 1 for window in snn.windows.values()] == [16, 4, 16, 16]
    assert snn.graph.settings["t_max"] == {"input": 16, "1": 4, "3": 16, "4": 16}
    with pytest.raises(ValueError, match="windows of its own"):
        quartz_plugin.convert(net, images, {"default": 16, "1": 8})


class TestGranularityOfTheOutput:
    @pytest.mark.parametrize("name", ["4", "output"])
    def test_is_refused_by_either_name(self, ann, images, name):
        with pytest.raises(ValueError, match=rf"layers\['{name}'\]: \['granularity'\] mean nothing there"):
            quartz_plugin.convert(ann, images, layers={name: {"granularity": "channel"}})

    def test_is_refused_where_the_output_is_a_relu(self, ann, images):
        with pytest.raises(ValueError, match=r"layers\['3'\]: \['granularity'\] mean nothing there"):
            quartz_plugin.convert(ann[:4], images, layers={"3": {"granularity": "channel"}})

    def test_may_be_that_of_a_block_with_other_layers(self, ann, images):
        net = nn.Sequential()
        net.add_module("body", ann)
        asked = {"granularity": "channel"}
        snn = quartz_plugin.convert(net, images, layers={"body": asked})
        assert torch.equal(snn(images), quartz_plugin.convert(ann, images, **asked)(images))


@pytest.mark.parametrize("options", [{"t_max": {"default": 8, "input": 32}}, {"layers": {"input": {"t_max": 32}}}])
def test_the_input_has_no_options_where_the_first_layer_computes_on_the_image(ann, images, options):
    with pytest.raises(ValueError, match=r"no spikes encode 'input': name the first layer, '1'"):
        quartz_plugin.convert(ann, images, first_layer="dense", **options)
    snn = quartz_plugin.convert(ann, images, {"default": 8, "1": 32}, first_layer="dense")
    assert [window.length + 1 for window in snn.windows.values()] == [32, 8, 8]


@pytest.fixture
def bottleneck():
    """A signed value between two layers, one of which feeds another too."""
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3), nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2))


def test_the_negative_half_of_a_pair_has_no_scale_of_its_own(bottleneck, images):
    snn = quartz_plugin.convert(bottleneck, images, linear="pair")
    (negative,) = (name for name in snn.windows if name.endswith("_negative"))
    with pytest.raises(ValueError, match=r"percentile.*mean nothing there"):
        quartz_plugin.convert(bottleneck, images, linear="pair", layers={negative: {"percentile": 50.0}})


def test_steps_are_allocated_to_both_halves_of_a_pair(bottleneck, images):
    windows = quartz_plugin.allocate_steps(bottleneck, images, 60, choices=(2, 4, 8, 16), linear="pair")
    assert any(name.endswith("_negative") for name in windows)
    snn = quartz_plugin.convert(bottleneck, images, windows, linear="pair")
    assert snn.n_steps <= 60
    assert set(snn.windows) >= {name for name in windows if name != "output"}


class TestImagesOfAWrongShape:
    @pytest.fixture
    def net(self):
        return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 2))

    def calls(self, net, images):
        yield "calibration", lambda: quartz_plugin.convert(net, images)
        yield "calibration", lambda: quartz_plugin.convert(net, images, example_input=images[:1])
        yield "example_input", lambda: quartz_plugin.check_convertible(net, images)
        yield "calibration", lambda: quartz_plugin.prepare_qat(net, images)

    def test_without_a_batch_dimension_are_named_as_they_were_given(self, net):
        for name, call in self.calls(net, torch.rand(3, 8, 8)):
            with pytest.raises(ConversionError) as refusal:
                call()
            assert str(refusal.value) == (
                f"{name} has the shape [3, 8, 8]; is a batch dimension missing? The network runs on [1, 3, 8, 8]"
            )

    def test_with_channels_last_are_named_as_they_were_given(self, net):
        for name, call in self.calls(net, torch.rand(20, 8, 8, 3)):
            with pytest.raises(ConversionError) as refusal:
                call()
            assert str(refusal.value) == (
                f"{name} has the shape [20, 8, 8, 3]; are channels last? The network runs on [20, 3, 8, 8]: give "
                "images.movedim(-1, 1)"
            )
        assert net.training

    def test_that_no_other_order_mends_end_in_the_error_of_the_network(self, net):
        for _, call in self.calls(net, torch.rand(20, 5, 8, 8)):
            with pytest.raises(ConversionError, match=r"does not run on inputs of shape \[1, 5, 8, 8\]"):
                call()

    def test_are_not_blamed_for_an_operation_that_cannot_be_converted(self, net):
        net[2] = nn.GELU()
        for _, call in self.calls(net, torch.rand(20, 3, 8, 8)):
            with pytest.raises(ConversionError, match=r"cannot convert '2' \(GELU\)"):
                call()


@pytest.mark.parametrize("options", [{"linear": "foo"}, {"preprocessing": 0.5}])
def test_checking_refuses_an_option_that_it_cannot_have(ann, images, options):
    with pytest.raises(ValueError, match=f"{next(iter(options))} must be"):
        quartz_plugin.check_convertible(ann, images, **options)
