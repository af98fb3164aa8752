"""Order and randomness of images: functions of seed, epoch and index alone, whoever loads them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, DistributedSampler


class ShareSampler(DistributedSampler[Any]):
    """One process's share of a dataset: each index in one process, or, shuffled, (seed, epoch, index), as many in each.

    A DistributedSampler, so that Lightning leaves it alone and sets its epoch.

    Examples
    --------
    >>> [list(ShareSampler(range(5), rank, 2)) for rank in (0, 1)]
    [[0, 2, 4], [1, 3]]
    """

    def __init__(self, dataset: Any, rank: int = 0, processes: int = 1, shuffle: bool = False) -> None:
        super().__init__(dataset, processes, rank, shuffle, seed=global_seed() or 0)

    def __len__(self) -> int:
        count = len(self.dataset)  # type: ignore[arg-type]
        return count // self.num_replicas if self.shuffle else len(range(self.rank, count, self.num_replicas))

    def __iter__(self) -> Iterator[Any]:
        count = len(self.dataset)  # type: ignore[arg-type]
        if not self.shuffle:
            return iter(range(self.rank, count, self.num_replicas))
        order = torch.randperm(count, generator=torch.Generator().manual_seed(seed_of(self.seed, self.epoch)))
        mine = order[self.rank :: self.num_replicas][: len(self)].tolist()
        return iter([(self.seed, self.epoch, index) for index in mine])


class Seeded(Dataset[Any]):
    """A dataset whose random transforms depend on (seed, epoch, index) alone, not on who loads it or when."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: tuple[int, int, int]) -> Any:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed_of(*key))
            return self.dataset[key[-1]]


def global_seed() -> int | None:
    """The seed of ``seed_everything``; None where nobody called it."""
    seed = os.environ.get("PL_GLOBAL_SEED")
    return None if seed is None else int(seed)


def seed_of(*numbers: int) -> int:
    """One seed of several numbers; 63 bits.

    Examples
    --------
    >>> seed_of(0, 1) == seed_of(0, 1), seed_of(0, 1) == seed_of(1, 0)
    (True, False)
    """
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(1))
