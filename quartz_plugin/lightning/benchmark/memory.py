"""Peak memory, of each contender in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

import quartz_plugin
from quartz_plugin.lightning.benchmark.contenders import (
    CHANNELS_LAST,
    CONTENDERS,
    RATE,
    Run,
    channels_last,
    rate_coded,
    scales_of,
)
from quartz_plugin.lightning.benchmark.measure import Row
from quartz_plugin.lightning.benchmark.setup import NETWORKS, Setup, normalise
from quartz_plugin.network import SpikingNetwork


def measure_memory(setup: Setup, rows: Sequence[Row], convert: Callable[[int, str], SpikingNetwork]) -> None:
    """Fill in each row's peak memory, in MB above the ANN's; networks go to their processes in files."""
    with tempfile.TemporaryDirectory() as folder:
        images = {"raw": setup.images, "normalised": normalise(setup.network, setup.images)}
        for name, tensor in images.items():
            save_file({name: tensor.contiguous()}, Path(folder) / name)
        save_file(setup.ann.state_dict(), Path(folder) / "ann")
        by_ann = _peak_of(folder, setup.name, "ANN", {})
        for row in rows:
            if row.what == "ANN":
                row.memory_mb = 0.0
                continue
            if row.what == CHANNELS_LAST:
                row.memory_mb = _peak_of(folder, setup.name, row.what, {}) - by_ann
                continue
            kind = "hold" if row.what == RATE else CONTENDERS[row.what].kind
            path = Path(folder) / f"{kind} {row.t_max}"
            print(f"{setup.name}: memory of {row.what}, T = {row.t_max}", file=sys.stderr, flush=True)
            if not path.exists():
                convert(row.t_max, kind).save(path)
            scales = scales_of(quartz_plugin.load(path)) if row.what == RATE else {}
            row.memory_mb = _peak_of(folder, setup.name, row.what, {"snn": str(path), "scales": scales}) - by_ann


def _peak_of(folder: str, name: str, what: str, options: dict[str, Any]) -> float:
    job = {"folder": folder, "name": name, "what": what, "threads": torch.get_num_threads(), **options}
    command = [sys.executable, "-m", "quartz_plugin.lightning.benchmark.peak", json.dumps(job)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise ValueError(f"measuring the memory of {what} failed: {(done.stderr.strip() or 'killed').splitlines()[-1]}")
    return float(done.stdout.split()[-1])


@torch.no_grad()
def run_once(
    folder: str, name: str, what: str, threads: int, snn: str = "", scales: Mapping[str, float] | None = None
) -> None:
    """Run one contender, in a process that does nothing else."""
    torch.set_num_threads(threads)
    kind = "normalised" if what in ("ANN", CHANNELS_LAST) else "raw"
    images = load_file(Path(folder) / kind)[kind]
    run: Run
    if what in CONTENDERS:
        run = CONTENDERS[what].prepare(quartz_plugin.load(snn))
    else:
        ann = NETWORKS[name].make().eval()
        ann.load_state_dict(load_file(Path(folder) / "ann"))
        run = ann if what == "ANN" else channels_last(ann) if what == CHANNELS_LAST else rate_coded(ann, scales or {})
    run(images)


def peak_mb() -> float:
    """Peak of this process's resident memory."""
    status = Path("/proc/self/status")
    if status.exists():  # ru_maxrss would begin with the parent's peak
        (line,) = (line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) / 1024
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1024**2 if sys.platform == "darwin" else 1024)
