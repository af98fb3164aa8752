"""Options of conversion on the command line: the configuration's, the same for every command."""

import dataclasses

import pytest

pytest.importorskip("lightning", reason="needs the extra recipes")

from jsonargparse import ArgumentParser

from quartz_plugin import plot
from quartz_plugin.calibration_methods import STEPS
from quartz_plugin.config import TRAINING, ConversionConfig, ConversionOptions, LayerConfig
from quartz_plugin.figures import SWEEP_OPTIONS
from quartz_plugin.lightning.options import (
    DEFAULTS_OF,
    LISTS_OF,
    OPTIONS_OF,
    add_conversion_options,
    options_with_defaults,
    points_of,
)

FIELDS = {field.name: field for field in dataclasses.fields(ConversionConfig)}


def parser_of(command):
    parser = ArgumentParser(exit_on_error=False)
    names = add_conversion_options(parser, command)
    return parser, names


def test_convert_takes_every_option_of_the_configuration_but_those_of_the_model():
    _, names = parser_of("convert")
    assert set(names) == {"t_max", *ConversionOptions.__optional_keys__} - {"preprocessing", "task"}
    assert names == [name for name in FIELDS if name in names]


@pytest.mark.parametrize("command", sorted(OPTIONS_OF))
def test_options_have_the_configurations_defaults_and_help(command):
    parser, names = parser_of(command)
    parsed = vars(parser.parse_args([]))
    assert set(parsed) == set(names)
    own = DEFAULTS_OF.get(command, {})
    for name in names:
        assert parsed[name] == own.get(name, FIELDS[name].default), name
        assert FIELDS[name].metadata["help"].split()[0] in parser.format_help()
    assert options_with_defaults(command, {}) == parsed
    # What a command has of its own are options that it takes.
    assert set(own) <= set(names)
    assert set(LISTS_OF.get(command, ())) <= set(names)


def test_training_starts_from_the_configurations_own_defaults():
    assert DEFAULTS_OF["fit"] == {**TRAINING, "granularity": "channel"}


def test_values_are_read_as_the_configuration_takes_them():
    parser, _ = parser_of("convert")
    given = parser.parse_args(
        ['--t_max={"default": 8, "input": 32}', '--layers={"input": {"percentile": 100.0}}', "--weight_bits=8"]
    )
    config = ConversionConfig(**vars(given))
    assert config.own_options["input"].t_max == 32
    assert config.own_options["input"].percentile == 100.0
    assert config.weight_bits == 8
    parser, _ = parser_of("sweep")
    assert parser.parse_args(["--t_max=[2,3]", "--hold=[true]"]).t_max == [2, 3]


def test_a_call_with_an_option_that_a_command_does_not_take_names_it():
    with pytest.raises(TypeError, match="costs takes no option rectifier; there are t_max, linear"):
        options_with_defaults("costs", {"rectifier": "silent"})


def test_no_command_has_options_of_conversion_where_nothing_is_converted():
    for command in ("test", "validate", "predict", "figures"):
        assert parser_of(command)[1] == []


def test_convert_leaves_t_max_to_the_network_unless_it_is_given():
    parser, _ = parser_of("convert")
    assert parser.parse_args([]).t_max is None
    assert parser.parse_args(["--t_max=16"]).t_max == 16
    assert "By default as the network was trained, or else 16." in " ".join(parser.format_help().split())


class TestPointsOfASweep:
    def test_that_do_not_go_together_are_left_out_with_the_reason(self):
        given = {"t_max": [4], "calibration_method": ["percentile", "best"]}
        points, left_out = points_of("sweep", options_with_defaults("sweep", given))
        for point in points:
            ConversionConfig(**point)
        neurons = [(point["calibration_method"], point["hold"], point["bias"], point["rectifier"]) for point in points]
        others = [(False, "synapse"), (True, "synapse")]
        assert neurons == [
            ("percentile", False, "spike", "spike"),
            *[("percentile", *other, rectifier) for other in others for rectifier in ("spike", "silent")],
            *[("best", *other, rectifier) for other in others for rectifier in ("spike", "silent")],
        ]
        neuron, method = left_out
        assert neuron.startswith('6 of 16 combinations are left out: bias="spike" is the paper')
        assert method.startswith("1 of 16 combinations are left out: calibration_method='best'")

    def test_without_any_are_refused(self):
        with pytest.raises(ValueError, match=r"there is nothing to convert: bias=.spike. .* goes with hold=False"):
            points_of("sweep", options_with_defaults("sweep", {"bias": ["spike"], "hold": [True]}))
        with pytest.raises(ValueError, match="there is nothing to convert, an option has no value"):
            points_of("sweep", options_with_defaults("sweep", {"t_max": []}))

    def test_have_only_values_that_an_option_can_have(self):
        with pytest.raises(ValueError, match="calibration_method must be one of"):
            points_of("sweep", options_with_defaults("sweep", {"calibration_method": ["percentile", "fastest"]}))

    def test_are_made_of_the_options_that_its_file_and_its_pictures_have(self):
        assert set(LISTS_OF["sweep"]) < set(SWEEP_OPTIONS)
        assert set(plot.OPTIONS) == set(SWEEP_OPTIONS) - {"t_max"}
        assert set(SWEEP_OPTIONS) <= set(OPTIONS_OF["sweep"])


def test_help_names_the_calibration_methods_and_the_fields_of_layers():
    shown = " ".join(parser_of("convert")[0].format_help().split())
    of_method = shown[shown.rindex("--calibration_method CAL") : shown.rindex("--tuning_passes")]
    assert all(name in of_method for name in (*STEPS, "best"))
    of_layers = shown[shown.rindex("--layers LAYERS") :]
    assert all(each.name in of_layers for each in dataclasses.fields(LayerConfig))
