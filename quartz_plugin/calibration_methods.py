"""Methods of calibration: where scales come from, and what follows.

Each is a small object, and they add up: ``LeastSquares() + Distill(passes=4) + OutputRange()``. Files and command lines
name them, joined by "+": ``"least_squares+distill+output"``.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

SomeStep = TypeVar("SomeStep", bound="CalibrationStep")


@dataclass(frozen=True)
class CalibrationStep:
    """One step of a calibration method; its numbers are options of the configuration where they are None."""

    name: ClassVar[str]
    options: ClassVar[dict[str, str]] = {}
    """Field -> the configuration's option of the same meaning."""

    def __add__(self, other: CalibrationStep | CalibrationMethod) -> CalibrationMethod:
        return CalibrationMethod.of(self) + other


class ScaleRule(CalibrationStep):
    """A source of the layers' scales; a method has one."""


@dataclass(frozen=True)
class Percentile(ScaleRule):
    """Scale at a percentile of each layer's values.

    Parameters
    ----------
    percentile : float, optional
        In (0, 100].
    """

    percentile: float | None = None
    name = "percentile"
    options: ClassVar = {"percentile": "percentile"}


@dataclass(frozen=True)
class LeastSquares(ScaleRule):
    """Scale at which clipping and rounding lose least, in squares, in each layer."""

    name = "least_squares"


@dataclass(frozen=True)
class Search(ScaleRule):
    """Percentiles, multiplied layer after layer by what brings the output nearest to the ANN's."""

    name = "search"


class Refinement(CalibrationStep):
    """A step that may follow once scales are there."""


@dataclass(frozen=True)
class BiasCorrection(Refinement):
    """Biases that make up for the mean error of rounding (arXiv:1906.04721)."""

    name = "bias_correction"


@dataclass(frozen=True)
class Tuning(Refinement):
    """Learning, without labels, to give the ANN's activations.

    Parameters
    ----------
    passes : int, optional
        Number of times that every image is seen.
    rate : float, optional
        Adam's highest rate, as a share of the size of each layer's weights and scale.
    """

    passes: int | None = None
    rate: float | None = None
    options: ClassVar = {"passes": "tuning_passes", "rate": "tuning_rate"}


@dataclass(frozen=True)
class Tune(Tuning):
    """Scales and biases learn to give the ANN's activations; parameters are those of :class:`Tuning`."""

    name = "tune"


@dataclass(frozen=True)
class Distill(Tuning):
    """All weights learn to give the ANN's activations and output; parameters are those of :class:`Tuning`."""

    name = "distill"


@dataclass(frozen=True)
class OutputRange(Refinement):
    """The output's range lets the first spike agree most often with the ANN, or a regression's values most nearly."""

    name = "output"


STEPS: dict[str, type[CalibrationStep]] = {
    each.name: each for each in (Percentile, LeastSquares, Search, BiasCorrection, Tune, Distill, OutputRange)
}
"""Name -> step, in the order in which they are carried out."""

TUNING = frozenset(name for name, each in STEPS.items() if issubclass(each, Tuning))
"""Names of the steps that learn."""

BEST = "least_squares+distill+output"
"""The method that the measurements in README recommend."""


@dataclass(frozen=True)
class CalibrationMethod:
    """A scale rule (without one, percentiles), and what follows, in the order in which it is carried out.

    Attributes
    ----------
    steps : tuple of CalibrationStep
        The scale rule first.

    Examples
    --------
    >>> method = LeastSquares() + OutputRange() + BiasCorrection()
    >>> print(method)
    least_squares+bias_correction+output
    >>> CalibrationMethod.of("bias_correction+output+least_squares") == method
    True
    """

    steps: tuple[CalibrationStep, ...]

    @classmethod
    def of(cls, given: Any) -> CalibrationMethod:
        """Read a method from names joined by "+", as ``"least_squares+tune"``, or from a step.

        "best" stands for :data:`BEST`.

        Raises
        ------
        ValueError
            For an unknown name, two scale rules, one step twice, or "tune" with "distill".

        Examples
        --------
        >>> print(CalibrationMethod.of("best+bias_correction"))
        least_squares+bias_correction+distill+output
        """
        if isinstance(given, CalibrationMethod):
            return given
        return cls._ordered([given] if isinstance(given, CalibrationStep) else cls._named(given), given)

    @classmethod
    def _named(cls, given: Any) -> list[CalibrationStep | None]:
        named = given.split("+") if isinstance(given, str) else [given]
        names = [part for name in named for part in (BEST.split("+") if name == "best" else [name])]
        return [STEPS[name]() if isinstance(name, str) and name in STEPS else None for name in names]

    @classmethod
    def _ordered(cls, steps: Iterable[CalibrationStep | None], given: Any) -> CalibrationMethod:
        steps = [*steps]
        known = [step for step in steps if step is not None and step.name in STEPS]
        alike = [sum(isinstance(step, kind) for step in known) for kind in (ScaleRule, Tuning)]
        if len(known) < len(steps) or len({step.name for step in known}) < len(known) or max(alike) > 1:
            raise ValueError(
                "calibration_method must be one of percentile, least_squares, search, then any of bias_correction, "
                f'tune or distill, output, joined by "+", as "least_squares+output"; or best, which is "{BEST}"; got '
                f"{given!r}"
            )
        return cls(tuple(sorted(known, key=lambda step: [*STEPS].index(step.name))))

    def __add__(self, other: CalibrationStep | CalibrationMethod) -> CalibrationMethod:
        steps = (*self.steps, *CalibrationMethod.of(other).steps)
        return self._ordered(steps, " + ".join(map(repr, steps)))

    def __str__(self) -> str:
        return "+".join((self.scale, *(step.name for step in self.steps if isinstance(step, Refinement))))

    def find(self, kind: type[SomeStep]) -> SomeStep | None:
        """The step of this kind; None where the method has none."""
        return next((step for step in self.steps if isinstance(step, kind)), None)

    def without(self, kind: type[CalibrationStep]) -> CalibrationMethod:
        """The method without the steps of this kind."""
        return CalibrationMethod(tuple(step for step in self.steps if not isinstance(step, kind)))

    @property
    def scale(self) -> str:
        """Name of the rule that scales come from."""
        rule = self.find(ScaleRule)
        return Percentile.name if rule is None else rule.name

    @property
    def refinements(self) -> frozenset[str]:
        """Names of what follows."""
        return frozenset(step.name for step in self.steps if isinstance(step, Refinement))

    @property
    def needs_images(self) -> bool:
        """True where the images are looked at more than once."""
        return self.find(Search) is not None or self.find(Refinement) is not None

    def numbers(self) -> dict[str, Any]:
        """The configuration's options that steps have as numbers of their own."""
        given = {option: getattr(step, name) for step in self.steps for name, option in step.options.items()}
        return {option: value for option, value in given.items() if value is not None}


__all__ = [
    "BEST",
    "BiasCorrection",
    "CalibrationMethod",
    "CalibrationStep",
    "Distill",
    "LeastSquares",
    "OutputRange",
    "Percentile",
    "Search",
    "Tune",
]
