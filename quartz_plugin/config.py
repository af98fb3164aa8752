"""Configuration: every option of conversion, with its default, its check and its line of help, in one place.

A new option is a field of :class:`ConversionConfig`, a keyword of :class:`ConversionOptions`, and a line in the stage
that reads it. The signatures and docstrings of :func:`~quartz_plugin.convert` and its like, the settings in a saved
file and the command line are made from the fields.
"""

# ruff: noqa: RUF009 (option() is a field, as dataclasses.field is)
from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal, TypedDict

from torch import Tensor

from quartz_plugin import checks
from quartz_plugin.calibration_methods import CalibrationMethod, CalibrationStep
from quartz_plugin.functional import BiasCode, Rectifier
from quartz_plugin.layer_config import Granularity, LayerConfig, Override
from quartz_plugin.options import UNSET, NotGiven, describe, option, refuse_unknown, take_plain_and_check
from quartz_plugin.task import CLASSIFICATION, Task

Linear = Literal["compose", "pair"]
FirstLayer = Literal["spiking", "dense"]
Shifts = Literal["all", "far", "none"]
Pair = tuple[Sequence[float] | Tensor | float, Sequence[float] | Tensor | float]
Preprocessing = Pair | list[Pair | None]

End = Sequence[float] | Tensor | float
InputRange = tuple[End, End] | Sequence[tuple[End, End] | None]

Method = str | CalibrationMethod | CalibrationStep

DEFAULT = "default"
"""Name under which a mapping of ``t_max`` has that of the layers it does not name."""


def _check_layers(name: str, value: Any) -> None:
    if value is None:
        return
    if not isinstance(value, Mapping):
        raise TypeError(f"{name} must be a dict, name of a layer or block -> options, got {type(value).__name__}")
    for layer, own in value.items():
        if not isinstance(layer, str):
            raise TypeError(f"{name} must be named by strings, as the report has them, got {layer!r}")
        if not isinstance(own, LayerConfig):
            LayerConfig.from_dict(own, f"{name}[{layer!r}]")


@dataclass(frozen=True)
class ConversionConfig:
    """Every option of :func:`~quartz_plugin.convert`; checked when it is made.

    Numbers may be those of numpy and torch; they are kept as Python's.

    Parameters
    ----------
    {options}

    Raises
    ------
    ValueError, TypeError
        For a value that an option cannot have, or options that do not go together.

    Examples
    --------
    >>> config = ConversionConfig(t_max=8, granularity="channel", layers={"input": {"t_max": 32}})
    >>> config.percentile, config.layers["input"]
    (99.9, LayerConfig(percentile=None, granularity=None, t_max=32))
    >>> ConversionConfig.from_dict(config.to_dict()) == config
    True
    """

    t_max: int | Mapping[str, int] = option(
        NotGiven(16),
        "T: every value is one of T levels, and a layer takes T - 1 steps; or one for each layer or block.",
        checks.t_max_or_one_each,
        """
        A dict has the name of a layer (as the report has it; "output", "input") or of a block -> its ``T``, "default"
        for the rest, as ``{"default": 8, "input": 32}``; :func:`~quartz_plugin.allocate_steps` finds some. Layers of a
        network that was trained for spikes (:func:`~quartz_plugin.prepare_qat`) keep their own, and others are refused.
        """,
    )
    hold: bool = option(
        True,
        "No neuron may fire before its readout; False is the paper's neuron, with its early spikes.",
        checks.flag,
    )
    rectifier: Rectifier = option(
        "spike",
        'Zeros are encoded by a forced spike ("spike", the paper\'s) or by silence ("silent").',
        checks.one_of(Rectifier),
    )
    bias: BiasCode = option(
        "synapse",
        "A bias as a synapse from a unit that encodes 1, or as the authors' unit-weight spike in time.",
        checks.one_of(BiasCode),
        'The latter goes with ``hold=False, rectifier="spike"`` only.',
    )
    linear: Linear = option(
        "compose",
        "What becomes of a signed value without a ReLU that feeds on, as in a linear bottleneck.",
        checks.one_of(Linear),
        """
        "compose": the linear maps in a row act as the one they compose to; exact, no neuron, no delay. "pair": two
        layers of neurons carry it, one for each sign, which rounds it and clips its size at their scale.
        """,
    )
    percentile: float = option(
        99.9,
        "Percentile of each ReLU's values (zeros included) that becomes the value 1; in (0, 100].",
        checks.percentile,
        "Where it is 0 (a layer or channel that is seldom active), the largest value seen takes its place.",
    )
    output_percentile: float = option(
        100.0,
        "The same for the output, of the size of the logits.",
        checks.percentile,
        """
        Of a regression as many percent of an output's values lie below the upper end of its range, and above the lower.
        """,
    )
    granularity: Granularity = option(
        "layer", "One scale for each layer, or for each channel.", checks.one_of(Granularity)
    )
    calibration_method: Method = option(
        "percentile",
        "Scales by percentile, least_squares or search, then +bias_correction, +tune or +distill, +output; or best.",
        checks.method,
        """
        No labels are needed.
        Or objects that add up, as ``LeastSquares() + Distill(passes=4)`` (:mod:`quartz_plugin.calibration_methods`).
        First, where scales come from: "percentile", "least_squares" (rounding loses least in each layer) or "search"
        (the output is nearest to the ANN's). Then, if wanted, "bias_correction" (the mean error of rounding goes into
        the biases); "tune" (scales and biases learn, all blocks at once, to give the ANN's activations) or "distill"
        (all weights learn to give the ANN's activations and output); "output" (the output's range lets the first spike
        agree most often with the ANN, or a regression's values most nearly).
        "best" is what README's measurements recommend, :data:`~quartz_plugin.calibration_methods.BEST`. Tuning after
        which the output is twice as far from the ANN's is left out with a warning, and in
        ``snn.graph.settings["calibration_method"]``.
        """,
    )
    tuning_passes: int = option(6, "Number of times that tune and distill see every calibration image.", checks.count)
    tuning_rate: float = option(
        0.01,
        "Adam's highest rate in tune and distill, as a share of the size of each layer's weights and scale.",
        checks.share,
        "Deep networks without batch norms, and few images, want less.",
    )
    first_layer: FirstLayer = option(
        "spiking",
        "Spikes encode the image (spiking), or the first layer computes on the image itself (dense).",
        checks.one_of(FirstLayer),
        """
        "dense" computes the first linear map and its ReLU by multiplications, and encodes what comes out: the image is
        not rounded, and there is one window less.
        """,
    )
    preprocessing: Preprocessing | None = option(
        None,
        "(mean, std) that the ANN expects its input normalised by, folded in exactly; of several inputs a list.",
        checks.preprocessing,
    )
    input_range: InputRange | None = option(
        None,
        "Least and largest values of the inputs, (0, 1) where it is not given; negative ones get neurons of their own.",
        checks.input_range,
        """
        ``(-3, 3)``, or with one number for each channel; of several inputs a list with one pair, or None, for each. A
        signed input is encoded by two units for each value, one for each sign, so that 0 is silent.
        """,
    )
    clamp_inputs: bool = option(False, "Clamp inputs outside of their range, in place of refusing them.", checks.flag)
    weight_bits: int | None = option(
        None,
        "Put weights, biases and threshold on a fixed-point grid, weights of so many bits with their sign (2 to 16).",
        checks.weight_bits,
        """
        For each layer or each output channel (``weight_granularity``). All engines then compute in exact whole
        numbers (on a CPU, whose libraries only add and multiply) and agree bit for bit, the engine "integer" among
        them, with up to 8 bits. Where float32 could not hold the sums of a held neuron, its weights have a coarser
        grid; of more than 8 bits, without hold, or with linear maps in a row, the network is in float64 instead.
        """,
    )
    weight_granularity: Granularity | None = option(
        None,
        "With weight_bits: one grid for each layer's weights, or for each output channel's; as granularity by default.",
        checks.optional(checks.one_of(Granularity)),
        """
        A chip may have one scale for all weights of a layer; a grid for each channel is never the coarser. Networks of
        depthwise convolutions need it: their channels differ much.
        """,
    )
    task: Task | Mapping[str, Task] = option(
        CLASSIFICATION,
        "Meaning of the output: classes (classification) or values (regression); of several, one for all or for each.",
        checks.task,
        """
        "classification": classes on dimension 1, and a decision at every position (``[B, classes]``, ``[B, classes, H,
        W]``); a single logit (``[B]``, ``[B, 1]``) decides by its sign. "regression": values to estimate, ``[B,
        outputs, ...]``, each with a range of its own, from its least value to its largest on the calibration images
        (around 0 with ``bias="spike"``, and with ``hold=False`` unless 0 lies outside). A dict has the name of an
        output, of several -> its task, ``{"boxes": "regression"}``; the others classify.
        """,
    )
    layers: Mapping[str, LayerConfig | Override] | None = option(
        None,
        "Options of single layers, blocks, input, output: name -> dict of percentile, granularity, t_max.",
        _check_layers,
        """
        Name of a layer (as the report has it; "output", "input") or of a block of the ANN -> options of its own, a
        :class:`LayerConfig` or a dict of its fields: ``percentile``, ``granularity``, ``t_max``. The longer name wins:
        ``{"layer1": dict(percentile=99.99), "layer1.0.relu": dict(t_max=32)}``.
        """,
    )

    def __post_init__(self) -> None:
        take_plain_and_check(self)
        self._take_numbers_of_method()
        if self.input_range is not None:
            object.__setattr__(self, "input_range", checks.ranges(self.input_range))
        if self.preprocessing is not None:
            object.__setattr__(self, "preprocessing", checks.preprocessings(self.preprocessing))
        own = {
            name: value if isinstance(value, LayerConfig) else LayerConfig.from_dict(value)
            for name, value in (self.layers or {}).items()
        }
        object.__setattr__(self, "layers", own)
        self._check_together()

    def _take_numbers_of_method(self) -> None:
        """Keep a method of objects by its names, and the numbers that they have as the options that they are."""
        if isinstance(self.calibration_method, str):
            return
        method = CalibrationMethod.of(self.calibration_method)
        for name, value in method.numbers().items():
            if getattr(self, name) not in (value, getattr(ConversionConfig, name)):
                raise ValueError(
                    f"{method} has {name}={value!r} and the configuration {getattr(self, name)!r}: give one"
                )
            object.__setattr__(self, name, value)
        object.__setattr__(self, "calibration_method", str(method))
        take_plain_and_check(self)

    def _check_together(self) -> None:
        """Refuse options that do not go together."""
        if self.bias == "spike" and (self.hold or self.rectifier == "silent"):
            raise ValueError(
                'bias="spike" is the paper\'s neuron and goes with hold=False, rectifier="spike" only '
                "(convert(ann, calibration, **quartz_plugin.PAPER))"
            )
        if self.bias == "spike" and "output" in self.method.refinements:
            raise ValueError(
                f'calibration_method={self.calibration_method!r} chooses the output\'s range ("output"), which shifts '
                'biases, and bias="spike" clamps those: leave "output" out, or give bias="synapse"'
            )
        tasks = self.task.values() if isinstance(self.task, Mapping) else (self.task,)
        if "regression" in tasks and self.output_percentile <= 50:
            raise ValueError(f"output_percentile of a regression must be above 50, got {self.output_percentile!r}")

    @property
    def method(self) -> CalibrationMethod:
        """The calibration method that ``calibration_method`` names."""
        return CalibrationMethod.of(self.calibration_method)

    @property
    def own_options(self) -> dict[str, LayerConfig]:
        """Name of a layer or block -> its own options, those that ``t_max`` names included."""
        own = {}
        if isinstance(self.t_max, Mapping):
            own = {name: LayerConfig(t_max=t_max) for name, t_max in self.t_max.items() if name != DEFAULT}
        for name, options in (self.layers or {}).items():
            assert isinstance(options, LayerConfig)
            own[name] = own.get(name, LayerConfig()).overridden_by(options)
        return own

    @property
    def default_t_max(self) -> int | None:
        """``T`` of the layers that have none of their own; None where it is not given."""
        return self.t_max.get(DEFAULT) if isinstance(self.t_max, Mapping) else self.t_max

    @property
    def output_shifts(self) -> Shifts:
        """Outputs of a regression that may have a range that does not lie around 0: all, those far from it, or none."""
        return "none" if self.bias == "spike" else "all" if self.hold else "far"

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ConversionConfig:
        """Read what :meth:`to_dict` gives; what is missing has its default. ValueError for unknown options."""
        refuse_unknown(values, [each.name for each in fields(cls)], ValueError)
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """Every option as a plain JSON value, as files hold them."""
        values = {each.name: getattr(self, each.name) for each in fields(self)}
        if self.preprocessing is not None:
            values["preprocessing"] = _as_lists(checks.preprocessings(self.preprocessing))
        if self.input_range is not None:
            values["input_range"] = _as_lists(checks.ranges(self.input_range))
        values["task"] = dict(self.task) if isinstance(self.task, Mapping) else self.task
        values["t_max"] = dict(self.t_max) if isinstance(self.t_max, Mapping) else int(self.t_max)
        return values | {"layers": {name: LayerConfig.to_dict(own) for name, own in (self.layers or {}).items()}}  # type: ignore[arg-type]


def _as_lists(value: Any) -> Any:
    """Tuples, nested, as the lists that a file holds."""
    return list(map(_as_lists, value)) if isinstance(value, tuple | list) else value


class _NetworkOptions(TypedDict, total=False):
    """Options that everything which calibrates a network has in common with ``convert``."""

    granularity: Granularity
    preprocessing: Preprocessing | None
    input_range: InputRange | None
    clamp_inputs: bool
    task: Task | Mapping[str, Task]


class AllocationOptions(_NetworkOptions, total=False):
    """Options that :func:`~quartz_plugin.allocate_steps` has in common with ``convert``."""

    linear: Linear


class TrainingOptions(_NetworkOptions, total=False):
    """Options that :func:`~quartz_plugin.prepare_qat` has in common with ``convert``; ``t_max`` stands apart."""

    percentile: float
    output_percentile: float
    calibration_method: Method
    first_layer: FirstLayer
    layers: Mapping[str, LayerConfig | Override] | None


class ConversionOptions(TrainingOptions, total=False):
    """The fields of :class:`ConversionConfig` as keywords; ``t_max``, which may be given by position, stands apart."""

    hold: bool
    rectifier: Rectifier
    bias: BiasCode
    linear: Linear
    tuning_passes: int
    tuning_rate: float
    weight_bits: int | None
    weight_granularity: Granularity | None


PAPER: ConversionOptions = {"hold": False, "bias": "spike", "rectifier": "spike"}
"""Options that make the neuron of arXiv:2309.16795: ``convert(ann, calibration, **PAPER)``."""

TRAINING: TrainingOptions = {"calibration_method": "least_squares+output"}
"""Options that training starts from, where they differ from those of a conversion."""


def without_notes(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The options among a network's settings, which may also hold notes, such as the names of its classes."""
    return {each.name: settings[each.name] for each in fields(ConversionConfig) if each.name in settings}


def configured(
    options: Mapping[str, Any],
    taken: Any,
    t_max: int | Mapping[str, int] = UNSET,
    config: ConversionConfig | None = None,
) -> ConversionConfig:
    """The configuration of a call: the one given, by default that of all defaults, with what the call itself gives.

    TypeError if `config` is something else, or an option is none of those that the TypedDict `taken` has.
    """
    if config is not None and not isinstance(config, ConversionConfig):
        raise TypeError(f"config must be a ConversionConfig, got {type(config).__name__}")
    refuse_unknown(options, taken.__optional_keys__, TypeError)
    own: dict[str, Any] = {} if t_max is UNSET else {"t_max": t_max}
    return dataclasses.replace(config or ConversionConfig(), **own, **options)


ConversionConfig.__doc__ = inspect.cleandoc(ConversionConfig.__doc__ or "").replace(
    "{options}", describe(ConversionConfig, {each.name for each in fields(ConversionConfig)})
)

__all__ = ["PAPER", "ConversionConfig", "ConversionOptions", "LayerConfig", "Override"]
