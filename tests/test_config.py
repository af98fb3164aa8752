"""The configuration: each option's help, default and check, what goes together, and how files and functions have it."""

import inspect
import json
from dataclasses import FrozenInstanceError, fields, replace

import numpy as np
import pytest
import torch
from torch import nn

import quartz_plugin
from quartz_plugin import ConversionConfig, LayerConfig
from quartz_plugin.calibration_methods import (
    STEPS,
    BiasCorrection,
    CalibrationMethod,
    Distill,
    LeastSquares,
    OutputRange,
    Percentile,
    Search,
    Tune,
)
from quartz_plugin.config import TRAINING, AllocationOptions, ConversionOptions, Override, TrainingOptions

OTHER_VALUES = {
    "t_max": {"default": 8, "input": 32},
    "hold": False,
    "rectifier": "silent",
    "bias": "spike",
    "linear": "pair",
    "percentile": 99.0,
    "output_percentile": 99.5,
    "granularity": "channel",
    "calibration_method": "least_squares+tune",
    "tuning_passes": 2,
    "tuning_rate": 0.1,
    "first_layer": "dense",
    "preprocessing": ((0.5,), (0.25, 0.5, 0.75)),
    "input_range": [((-1.0,), (1.0,)), None],
    "clamp_inputs": True,
    "weight_bits": 8,
    "weight_granularity": "channel",
    "task": "regression",
    "layers": {"1": LayerConfig(percentile=50.0), "input": LayerConfig(t_max=4)},
}
"""For each option a value that is not its default."""
TOGETHER = {"bias": {"hold": False}}
"""What an option's other value needs beside it."""
WRONG_VALUES = {
    "t_max": [1, 2.0, {"input": 1}, None],
    "hold": [1, None],
    "rectifier": ["quiet", None],
    "bias": ["neuron", []],
    "linear": ["none"],
    "percentile": [0, 101, "99", True, float("nan")],
    "output_percentile": [0, None],
    "granularity": ["neuron"],
    "calibration_method": ["fastest", None, 3],
    "tuning_passes": [0, 1.5, True],
    "tuning_rate": [0, 1.0, "fast"],
    "first_layer": ["analog"],
    "preprocessing": [0.5, (0.5,), ("a", "b")],
    "input_range": [3, (1, 0), (0, float("inf")), ("a", "b"), (1,), [(0, 1), 3]],
    "clamp_inputs": [1, None],
    "weight_bits": [1, 17, 8.0],
    "weight_granularity": ["neuron", 3],
    "task": ["detection"],
    "layers": [{"0": 3}, {"0": {"percentil": 3}}, {"0": {"percentile": 0}}, {"0": {"percentile": None}}],
}
NAMES = [each.name for each in fields(ConversionConfig)]


@pytest.fixture
def ann():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))


class TestEachOption:
    def test_is_known_to_the_tests_of_this_file(self):
        assert {*OTHER_VALUES} == {*WRONG_VALUES} == {*NAMES}

    @pytest.mark.parametrize("name", NAMES)
    def test_has_a_line_of_help(self, name):
        (own,) = (each for each in fields(ConversionConfig) if each.name == name)
        assert own.metadata["help"].endswith(".")
        assert "\n" not in own.metadata["help"]
        assert len(own.metadata["help"]) < 120

    @pytest.mark.parametrize("name", NAMES)
    def test_has_a_default_that_passes_its_check(self, name):
        (own,) = (each for each in fields(ConversionConfig) if each.name == name)
        own.metadata["check"](name, own.default)
        assert getattr(ConversionConfig, name) == own.default

    @pytest.mark.parametrize(("name", "value"), [(name, v) for name, values in WRONG_VALUES.items() for v in values])
    def test_refuses_what_it_cannot_have_by_its_name(self, name, value):
        with pytest.raises(ValueError, match=name):
            ConversionConfig(**{name: value})

    @pytest.mark.parametrize("name", NAMES)
    def test_survives_a_file(self, name):
        config = ConversionConfig(**{name: OTHER_VALUES[name]}, **TOGETHER.get(name, {}))
        assert getattr(config, name) == OTHER_VALUES[name]
        assert config != ConversionConfig()
        assert ConversionConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config

    @pytest.mark.parametrize("name", NAMES)
    def test_may_be_missing_from_a_file_of_an_earlier_version(self, name):
        values = ConversionConfig().to_dict()
        del values[name]
        assert ConversionConfig.from_dict(values) == ConversionConfig()

    @pytest.mark.parametrize("name", NAMES)
    def test_is_a_keyword_of_convert_and_stands_in_its_help(self, name):
        parameter = inspect.signature(quartz_plugin.convert).parameters[name]
        assert parameter.default == getattr(ConversionConfig, name)
        assert parameter.annotation
        (own,) = (each for each in fields(ConversionConfig) if each.name == name)
        for documented in (quartz_plugin.convert, ConversionConfig):
            assert " ".join(own.metadata["help"].split()) in " ".join(documented.__doc__.split())

    def test_is_a_typed_keyword(self):
        assert {"t_max", *ConversionOptions.__annotations__} == {*NAMES}
        assert {*Override.__annotations__} == {each.name for each in fields(LayerConfig)}
        types = {each.name: each.type for each in fields(ConversionConfig)}
        typed = {
            name: getattr(kind, "__forward_arg__", kind) for name, kind in ConversionOptions.__annotations__.items()
        }
        assert typed == {name: kind for name, kind in types.items() if name != "t_max"}


def test_it_is_frozen():
    with pytest.raises(FrozenInstanceError):
        ConversionConfig().hold = False


def test_numbers_of_numpy_and_torch_are_kept_as_pythons():
    config = ConversionConfig(
        np.int64(8), percentile=torch.tensor(99.5), preprocessing=(np.float32(0.5), torch.tensor([0.25, 0.5]))
    )
    assert config == ConversionConfig(8, percentile=99.5, preprocessing=(0.5, [0.25, 0.5]))
    assert type(config.t_max) is int
    json.dumps(config.to_dict())


def test_unknown_options_are_refused_with_the_nearest(ann):
    with pytest.raises(ValueError, match="unknown option 'percentil': did you mean 'percentile'"):
        ConversionConfig.from_dict({"percentil": 3})
    with pytest.raises(TypeError, match="unknown option 'granularty': did you mean 'granularity'"):
        quartz_plugin.convert(ann, torch.rand(4, 4), granularty="channel")
    with pytest.raises(
        TypeError, match="unknown option 'hold': the options are calibration_method, clamp_inputs, first_layer"
    ):
        quartz_plugin.prepare_qat(ann, torch.rand(4, 4), hold=True)
    with pytest.raises(TypeError, match="unknown option 'percentile'"):
        quartz_plugin.allocate_steps(ann, torch.rand(4, 4), 40, percentile=99)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"bias": "spike"}, "hold=False"),
        ({"bias": "spike", "hold": False, "rectifier": "silent"}, 'rectifier="spike" only'),
        ({**quartz_plugin.PAPER, "calibration_method": "best"}, 'leave "output" out'),
        ({"task": "regression", "output_percentile": 50}, "above 50"),
    ],
)
def test_options_that_do_not_go_together(options, words):
    with pytest.raises(ValueError, match=words):
        ConversionConfig(**options)


class TestCalibrationMethods:
    def test_add_up_to_what_their_names_join_to(self):
        method = OutputRange() + LeastSquares() + Tune()
        assert str(method) == "least_squares+tune+output"
        assert method == CalibrationMethod.of("least_squares+tune+output")
        assert method + BiasCorrection() == CalibrationMethod.of("least_squares+bias_correction+tune+output")
        assert [*STEPS] == ["percentile", "least_squares", "search", "bias_correction", "tune", "distill", "output"]

    def test_are_kept_by_name_and_their_numbers_as_options(self, ann):
        config = ConversionConfig(calibration_method=Percentile(99.0) + Distill(passes=2, rate=0.02))
        assert config == ConversionConfig(
            calibration_method="percentile+distill", percentile=99.0, tuning_passes=2, tuning_rate=0.02
        )
        images = torch.rand(20, 4)
        objects, names = Search() + BiasCorrection(), "search+bias_correction"
        one, other = (quartz_plugin.convert(ann, images, 4, calibration_method=each) for each in (objects, names))
        assert torch.equal(one(images), other(images))
        assert one.graph.settings == other.graph.settings

    @pytest.mark.parametrize(
        "combine",
        [
            lambda: Tune() + Distill(),
            lambda: LeastSquares() + Search(),
            lambda: Tune(passes=2) + Tune(rate=0.1),
            lambda: LeastSquares() + "tune" + "fastest",
        ],
    )
    def test_that_exclude_each_other_are_refused(self, combine):
        with pytest.raises(ValueError, match="calibration_method must be"):
            combine()

    def test_with_numbers_that_they_cannot_have_are_refused(self):
        with pytest.raises(ValueError, match="tuning_passes must be a whole number"):
            ConversionConfig(calibration_method=Tune(passes=0))
        with pytest.raises(ValueError, match=r"has tuning_passes=2 and the configuration 5"):
            ConversionConfig(calibration_method=Tune(passes=2), tuning_passes=5)


class TestConvert:
    def test_takes_a_configuration_and_keywords_beside_it(self, ann):
        images, config = torch.rand(20, 4), ConversionConfig(8, percentile=90.0, rectifier="silent")
        snn = quartz_plugin.convert(ann, images, config=config)
        assert snn.graph.config == config
        assert torch.equal(
            snn(images), quartz_plugin.convert(ann, images, 8, percentile=90, rectifier="silent")(images)
        )
        assert quartz_plugin.convert(ann, images, 4, config=config).graph.config == replace(config, t_max=4)
        again = quartz_plugin.convert(ann, images, config=config, rectifier="spike")
        assert again.graph.config == replace(config, rectifier="spike")

    def test_refuses_what_is_no_configuration(self, ann):
        with pytest.raises(TypeError, match="config must be a ConversionConfig, got dict"):
            quartz_plugin.convert(ann, torch.rand(4, 4), config={"t_max": 8})

    def test_tells_files_its_configuration(self, ann, tmp_path):
        options = {"t_max": {"default": 8, "input": 4}, "layers": {"1": {"percentile": 50.0, "t_max": 6}}}
        snn = quartz_plugin.convert(ann, torch.rand(20, 4), **options, preprocessing=(0.5, 0.25))
        snn.graph.settings["class_names"] = ["cat", "dog"]
        snn.save(tmp_path / "snn")
        loaded = quartz_plugin.load(tmp_path / "snn")
        assert loaded.graph.config == ConversionConfig(**options, preprocessing=(0.5, 0.25))
        assert loaded.graph.settings["class_names"] == ["cat", "dog"]
        assert {name: loaded.graph.settings[name] for name in options} == options

    def test_has_layers_as_dicts_and_as_configurations(self, ann):
        images = torch.rand(20, 4)
        one, other = (
            quartz_plugin.convert(ann, images, layers={"1": own})
            for own in ({"t_max": 4, "percentile": 50}, LayerConfig(t_max=4, percentile=50))
        )
        assert torch.equal(one(images), other(images))
        assert one.graph.settings == other.graph.settings


def test_other_functions_have_their_part_of_it():
    for function, taken, defaults in (
        (quartz_plugin.prepare_qat, TrainingOptions, TRAINING),
        (quartz_plugin.allocate_steps, AllocationOptions, {}),
    ):
        parameters = inspect.signature(function).parameters
        assert {*taken.__annotations__} <= {*parameters}
        assert {*parameters} & {*NAMES} <= {*taken.__annotations__, "t_max"}
        for name in taken.__annotations__:
            assert parameters[name].default == defaults.get(name, getattr(ConversionConfig, name))
            assert f"\n{name} : " in function.__doc__
