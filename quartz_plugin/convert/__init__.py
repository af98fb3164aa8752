"""Conversion, in stages that can be read one after the other: :mod:`quartz_plugin.convert.pipeline`."""

from quartz_plugin.config import PAPER, Override
from quartz_plugin.convert.pipeline import check_convertible, convert
from quartz_plugin.operators.table import ConversionError, register_rule, unregister_rule

__all__ = ["PAPER", "ConversionError", "Override", "check_convertible", "convert", "register_rule", "unregister_rule"]
