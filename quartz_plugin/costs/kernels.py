"""Compiled loops over spikes (numba)."""

from __future__ import annotations

from typing import Any

import numpy as np

from quartz_plugin.coding import NO_SPIKE
from quartz_plugin.compiled import compiled


@compiled
def count_spikes(steps: Any, readout: int, zero: int, counts: Any) -> None:
    """Count, for each image of ``steps [B, units]``, what is asked of its spikes, into ``counts [4, B]``.

    They are the spikes, those at the step `zero`, those before `readout`, and the sum of all steps.
    """
    for image in range(steps.shape[0]):
        spikes, zeros, early, total = np.int32(0), np.int32(0), np.int32(0), np.int64(0)
        for unit in range(steps.shape[1]):
            step = steps[image, unit]
            spikes += step != NO_SPIKE
            zeros += step == zero
            early += (step != NO_SPIKE) & (step < readout)
            total += step
        counts[0, image], counts[1, image], counts[2, image], counts[3, image] = spikes, zeros, early, total
