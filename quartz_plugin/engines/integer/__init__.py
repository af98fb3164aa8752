"""The integer engine: held neurons whose weights are on grids of few bits, in the arithmetic of int8.

Levels are uint8, weights int8, their sums int32: exact, and on a CPU faster than float32. ``maps`` has linear maps in
that arithmetic, ``plan`` finds what of a network has a form in it, ``run`` goes through the network.
"""

from quartz_plugin.engines.integer.plan import pays_in_integers, why_not_integers, without_integer_operators
from quartz_plugin.engines.integer.run import run_integer

__all__ = ["pays_in_integers", "run_integer", "why_not_integers", "without_integer_operators"]
