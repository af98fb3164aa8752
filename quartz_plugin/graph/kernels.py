"""Compiled loops over a network's weights (numba)."""

from __future__ import annotations

from typing import Any

import numpy as np

from quartz_plugin.compiled import compiled


@compiled
def digest_words(words: Any, multipliers: Any, base: Any) -> Any:
    """Weigh words by their multipliers, block by block, and blocks by powers of `base`; modulo 2^64, signed."""
    # Unsigned indices need no look at their sign, and the loop runs in vectors.
    size, block, start = np.uint64(words.size), np.uint64(multipliers.size), np.uint64(0)
    total = np.int64(0)
    while start < size:
        members, weighed = min(block, size - start), np.int64(0)
        for index in range(members):
            weighed += np.int64(words[start + np.uint64(index)]) * np.int64(multipliers[np.uint64(index)])
        total = total * base + weighed
        start += members
    return total
