"""Measurements: time, interleaved in one process, and the recipes' test of all images."""

from __future__ import annotations

import itertools
import logging
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import lightning
import torch
from torch import Tensor

from quartz_plugin.lightning.benchmark.contenders import (
    CHANNELS_LAST,
    CONTENDERS,
    KINDS,
    RATE,
    RATE_STEPS,
    channels_last,
    rate_coded,
    scales_of,
)
from quartz_plugin.lightning.benchmark.setup import Network, Setup, normalise
from quartz_plugin.lightning.console import quiet_other_libraries
from quartz_plugin.lightning.data import ClassificationData, FolderData, MNISTData
from quartz_plugin.lightning.modules import SpikingClassifier
from quartz_plugin.network import SpikingNetwork
from quartz_plugin.tables import format_table


@dataclass
class Row:
    """One measurement."""

    network: str
    images: str
    batch: int
    threads: int
    what: str
    t_max: int
    ms: float
    ann_ms: float
    times_ann: float
    right_percent: float | None = None
    memory_mb: float | None = None


@torch.no_grad()
def time_all(
    setup: Setup,
    t: int,
    convert: Callable[[int, str], SpikingNetwork],
    repeats: int,
    running: Sequence[str],
) -> list[Row]:
    """Rows of one T, of the contenders that run; multiples are of the ANN's faster layout."""
    contenders = {what: CONTENDERS[what] for what in running if what != RATE}
    kinds = {each.kind for each in contenders.values()} | ({"hold"} if RATE in running else set())
    snns = {kind: convert(t, kind) for kind in KINDS if kind in kinds}
    inputs = normalise(setup.network, setup.images)
    last = inputs.contiguous(memory_format=torch.channels_last)
    runs: dict[str, Callable[[], Tensor]] = {
        "ANN": partial(setup.ann, inputs), CHANNELS_LAST: partial(channels_last(setup.ann), last),
    }  # fmt: skip
    for what, contender in contenders.items():
        runs[what] = partial(contender.prepare(snns[contender.kind]), setup.images)
    if RATE in running:
        runs[RATE] = partial(rate_coded(setup.ann, scales_of(snns["hold"])), setup.images)

    seconds: dict[str, list[float]] = {what: [] for what in runs}
    right: dict[str, float | None] = {}
    for repeat in range(repeats + 1):
        for what, run in runs.items():
            started = time.perf_counter()
            logits = run()
            taken = time.perf_counter() - started
            if repeat:
                seconds[what].append(taken)
            else:  # the first round warms up
                right[what] = right_percent(logits, setup.labels)
    medians = {what: statistics.median(taken) for what, taken in seconds.items()}
    of_ann = min(medians["ANN"], medians[CHANNELS_LAST])
    return [
        Row(
            network=setup.name,
            images=setup.origin,
            batch=len(setup.images),
            threads=torch.get_num_threads(),
            what=what,
            t_max=RATE_STEPS if what == RATE else t,
            ms=1000 * median,
            ann_ms=1000 * of_ann,
            times_ann=median / of_ann,
            right_percent=right[what],
        )
        for what, median in medians.items()
    ]


def recipes_data(network: Network, root: Path, batch_size: int) -> ClassificationData:
    """Test images as the recipes read them."""
    if network.train.startswith("MNIST"):
        return MNISTData(str(root), batch_size)
    folder, size = (root / network.test).parent, network.shape[1]
    return FolderData(str(folder), size=size, resize=size, batch_size=batch_size, cache=True)


def time_test_passes(
    data: ClassificationData, times: Sequence[int], convert: Callable[[int, str], SpikingNetwork], repeats: int
) -> str:
    """Table of how long Lightning's test of a spiking network takes, with all metrics and with costs of one image."""
    quiet_other_libraries()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    data.prepare_data()
    data.setup("test")
    image = data.test_image().unsqueeze(0)

    def seconds(snn: SpikingNetwork, cost_images: int | None) -> float:
        model = SpikingClassifier(snn, snn.run(image).logits.shape[1], cost_images=cost_images)
        trainer = lightning.Trainer(
            accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False,
        )  # fmt: skip
        started = time.perf_counter()
        trainer.test(model, datamodule=data, verbose=False)
        return time.perf_counter() - started

    lines: list[list[object]] = []
    for t, kind in itertools.product(times, ("hold", "paper")):
        snn = convert(t, kind)
        # The first round warms up.
        rounds = [(seconds(snn, None), seconds(snn, 1)) for _ in range(repeats + 1)][1:]
        counting, plain = (statistics.median(each) for each in zip(*rounds, strict=True))
        ratio = statistics.median(every / one for every, one in rounds)
        lines.append([kind, t, *(round(each, 2) for each in (counting, plain, ratio))])
    tested: Any = data.test_dataloader().dataset
    what = f"test of {len(tested):,} images, batch {data.batch_size}"
    return format_table([what, "T", "s, all metrics", "s, of one image", "times"], lines)


def right_percent(logits: Tensor, labels: Tensor | None) -> float | None:
    """Percentage of correct decisions; None without labels."""
    return None if labels is None else 100 * float((logits.argmax(1) == labels).float().mean())
