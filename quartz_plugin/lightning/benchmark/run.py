"""The benchmark's options, and what they run."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from jsonargparse import ArgumentParser

import quartz_plugin
from quartz_plugin.lightning.benchmark.contenders import (
    CONTENDERS,
    ENGINES,
    KINDS,
    RATE,
    RATE_STEPS,
    left_out_contenders,
)
from quartz_plugin.lightning.benchmark.measure import Row, recipes_data, time_all, time_test_passes
from quartz_plugin.lightning.benchmark.memory import measure_memory
from quartz_plugin.lightning.benchmark.results import heading, table, write
from quartz_plugin.lightning.benchmark.setup import NETWORKS, Setup, data_folder, set_up
from quartz_plugin.network import SpikingNetwork
from quartz_plugin.plot.style import pyplot


@dataclass(frozen=True)
class Benchmark:
    """Options of a benchmark.

    Parameters
    ----------
    networks : str | Sequence[str]
        mnist, vgg11, resnet20, squeezenet, resnet50, efficientnet_lite0, or several: '[mnist,vgg11]'.
    t_max : int | Sequence[int]
        The T to convert at, one or several.
    engines : str | Sequence[str]
        analytic, integer, event, stepped (and the loop), or several; all by default.
    batch_size : int
        Images in a batch.
    threads : int
        Threads of torch and of the event engine.
    repeats : int
        Rounds; each round runs everything once.
    data : str, optional
        Folder laid out like ../shared, with real images and trained weights; without it both are random.
    calibration_images : int
        Training images to calibrate on, with --data; else the random images themselves.
    percentile : float
        Of each ReLU's values, and of the logits' size, that becomes the value 1.
    slow : bool
        Also step and loop where it takes long: at T = 128 and above, and in the larger networks at every T.
    memory : bool
        Also measure peak memory, of each contender in a process of its own.
    test_pass : bool
        Also time the recipes' test of all test images, with all metrics and with costs of one image.
    csv : str
        File for the table.
    plot : str
        File for the picture.
    seed : int
        Of the random weights and images.
    """

    networks: str | Sequence[str] = "mnist"
    t_max: int | Sequence[int] = (4, 8, 16, 32, 64, 128)
    engines: str | Sequence[str] = ENGINES
    batch_size: int = 200
    threads: int = 1
    repeats: int = 7
    data: str | None = None
    calibration_images: int = 200
    percentile: float = 99.0
    slow: bool = False
    memory: bool = False
    test_pass: bool = False
    csv: str = "runs/benchmark/benchmark.csv"
    plot: str = "runs/benchmark/benchmark.png"
    seed: int = 0

    @property
    def names(self) -> list[str]:
        """The networks, several or one."""
        return [self.networks] if isinstance(self.networks, str) else list(self.networks)

    @property
    def times(self) -> list[int]:
        """The T to convert at, several or one."""
        return [self.t_max] if isinstance(self.t_max, int) else list(self.t_max)

    @property
    def chosen_engines(self) -> list[str]:
        """The engines, several or one."""
        return [self.engines] if isinstance(self.engines, str) else list(self.engines)

    def check(self) -> None:
        """Raise ValueError for options that cannot be run, ImportError where matplotlib is missing."""
        for name in self.names:
            if name not in NETWORKS:
                raise ValueError(f"no network is called {name!r}; there are {', '.join(NETWORKS)}")
        for engine in self.chosen_engines:
            if engine not in ENGINES:
                raise ValueError(f"no engine is called {engine!r}; there are {', '.join(ENGINES)}")
        if not self.names or not self.times:
            raise ValueError("give at least one network and one T")
        for option in ("batch_size", "repeats", "calibration_images"):
            if getattr(self, option) < 1:
                raise ValueError(f"{option} must be at least 1, got {getattr(self, option)}")
        if self.test_pass and self.data is None:
            raise ValueError("--test_pass true tests on real images: give --data")
        # Known before minutes of measuring, not after.
        pyplot()


def run_benchmark(options: Benchmark) -> None:
    """Time the ANN and all engines side by side; print tables, write a CSV file and a picture."""
    options.check()
    root = None if options.data is None else data_folder(options.data, options.names)
    torch.set_num_threads(options.threads)
    every: list[Row] = []
    for name in options.names:
        setup = set_up(name, root, options.batch_size, options.calibration_images, options.seed)
        every += _run_network(options, setup, root)
        write(every, Path(options.csv), Path(options.plot))
    print(f"wrote {options.csv} and {options.plot}")


def _run_network(options: Benchmark, setup: Setup, root: Path | None) -> list[Row]:
    """Measure one network at every T, and print its tables."""
    convert = partial(_convert, setup, options.percentile)
    engines = options.chosen_engines
    nearest = min(options.times, key=lambda t: abs(t - RATE_STEPS))
    left_out = {t: left_out_contenders(setup.name, t, options.slow, engines) for t in options.times}
    rows: list[Row] = []
    for t in options.times:
        print(f"{setup.name}: T = {t}", file=sys.stderr, flush=True)
        running = [what for what, each in CONTENDERS.items() if each.engine in engines and what not in left_out[t]]
        if t == nearest and setup.name == "mnist" and "stepped" in engines:
            running.append(RATE)
        rows += time_all(setup, t, convert, options.repeats, running)
    if options.memory:
        measure_memory(setup, rows, convert)
    print(heading(setup, options.threads, options.repeats, options.percentile, root, left_out))
    print(table(rows) + "\n")
    if options.test_pass:
        assert root is not None
        data = recipes_data(setup.network, root, options.batch_size)
        print(time_test_passes(data, options.times, convert, options.repeats) + "\n")
    return rows


def _convert(setup: Setup, percentile: float, t: int, kind: str) -> SpikingNetwork:
    return quartz_plugin.convert(
        setup.ann, setup.calibration, t, percentile=percentile, output_percentile=percentile,
        preprocessing=setup.network.preprocessing, **KINDS[kind],
    )  # fmt: skip


def main() -> None:
    """Run the command line; what a user can mend ends in one line."""
    parser = ArgumentParser(description="Time the ANN and all engines side by side.")
    parser.add_class_arguments(Benchmark, as_group=False)
    try:
        run_benchmark(Benchmark(**vars(parser.parse_args())))
    except (OSError, ValueError, ImportError) as error:
        sys.exit(f"error: {error}")
