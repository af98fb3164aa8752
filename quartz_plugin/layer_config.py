"""Options of single layers, beside those of the whole network."""

# ruff: noqa: RUF009 (option() is a field, as dataclasses.field is)
from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, TypedDict

from quartz_plugin import checks
from quartz_plugin.coding import plain
from quartz_plugin.options import option, take_plain_and_check

Granularity = Literal["layer", "channel"]


class Override(TypedDict, total=False):
    """Options of one layer, or of all layers of one block of the network, as a plain dict."""

    percentile: float
    granularity: Granularity
    t_max: int


@dataclass(frozen=True)
class LayerConfig:
    """Options of one layer, or of all layers of one block of the network; None: those of the whole network.

    Examples
    --------
    >>> LayerConfig(percentile=99.99).to_dict()
    {'percentile': 99.99}
    """

    percentile: float | None = option(
        None, "Percentile of the layer's values that becomes the value 1.", checks.percentile
    )
    granularity: Granularity | None = option(
        None, "One scale for the layer, or for each channel.", checks.one_of(Granularity)
    )
    t_max: int | None = option(None, "T of the layer.", checks.t_max)

    def __post_init__(self) -> None:
        take_plain_and_check(self, leave_out=lambda value: value is None)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], name: str = "the layer's options") -> LayerConfig:
        """Read a plain dict; `name` is what a message calls it.

        Raises
        ------
        ValueError
            For what is no dict, unknown keys, or values that an option cannot have.
        """
        options = {each.name: each for each in fields(cls)}
        if not isinstance(values, Mapping) or not set(values) <= set(options):
            raise ValueError(f"{name} must be a dict with some of {tuple(options)}, got {values!r}")
        for key, value in values.items():
            options[key].metadata["check"](f"{name}: {key}", plain(value))
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """The options that are given, as plain JSON values."""
        return {each.name: value for each in fields(self) if (value := getattr(self, each.name)) is not None}

    def overridden_by(self, other: LayerConfig) -> LayerConfig:
        """These options, and those of `other` where it has some."""
        return dataclasses.replace(self, **other.to_dict())


__all__ = ["Granularity", "LayerConfig", "Override"]
