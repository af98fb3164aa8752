"""Methods of calibration: where scales come from, and what follows."""

from __future__ import annotations

from dataclasses import dataclass

SCALE_RULES = ("percentile", "least_squares", "search")
"""Where a layer's scale comes from; one of them."""

REFINEMENTS = ("bias_correction", "tune", "distill", "output")
"""What may follow, in this order."""

TUNING = {"tune", "distill"}
"""Those that learn."""

BEST = "least_squares+distill+output"
"""What the measurements in README recommend."""


@dataclass(frozen=True)
class CalibrationMethod:
    """Strategies of calibration, read from their names.

    Attributes
    ----------
    scale : "percentile", "least_squares" or "search"
        Where the scales come from.
    refinements : frozenset of str
        Which of "bias_correction", "tune", "distill" and "output" follow.
    """

    scale: str
    refinements: frozenset[str]

    @classmethod
    def parse(cls, given: str) -> CalibrationMethod:
        """Read names joined by "+", as ``"least_squares+bias_correction"``; "best" stands for :data:`BEST`.

        Raises
        ------
        ValueError
            For an unknown name, two scale rules, or "tune" with "distill".

        Examples
        --------
        >>> CalibrationMethod.parse("tune").scale
        'percentile'
        >>> print(CalibrationMethod.parse("best+bias_correction"))
        least_squares+bias_correction+distill+output
        """
        named = given.split("+") if isinstance(given, str) else [given]
        names = [part for name in named for part in (BEST.split("+") if name == "best" else [name])]
        rules = [name for name in names if name in SCALE_RULES]
        unknown = [name for name in names if name not in (*SCALE_RULES, *REFINEMENTS)]
        if unknown or len(rules) > 1 or len(set(names)) < len(names) or set(names) >= TUNING:
            raise ValueError(
                f"calibration_method must be one of {', '.join(SCALE_RULES)}, then any of bias_correction, tune or "
                f'distill, output, joined by "+", as "least_squares+output"; or best, which is "{BEST}"; got {given!r}'
            )
        return cls(rules[0] if rules else "percentile", frozenset(names) - set(SCALE_RULES))

    def __str__(self) -> str:
        return "+".join((self.scale, *(name for name in REFINEMENTS if name in self.refinements)))

    @property
    def needs_images(self) -> bool:
        """Whether the images are looked at more than once."""
        return self.scale == "search" or bool(self.refinements)
