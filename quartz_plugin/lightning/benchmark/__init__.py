"""Benchmark of the engines beside the ANN; ``recipes/benchmark.py`` is its command."""

from quartz_plugin.lightning.benchmark.run import Benchmark, main, run_benchmark

__all__ = ["Benchmark", "main", "run_benchmark"]
