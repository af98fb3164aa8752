"""What a simulation costs, as a multiple of the same ANN's forward pass on the same images.

    python recipes/benchmark.py                       # the paper's MNIST network, T = 4, 16, 64, batch 200, one thread
    python recipes/benchmark.py --t_max 16 --repeats 9 --threads 2

Everything runs in one process, interleaved: ANN, engine, engine, ..., ANN, engine, ...; the table gives medians.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial

import torch
from jsonargparse import auto_cli

import quartz_plugin
from quartz_plugin.lightning import quartz_mnist
from quartz_plugin.tables import format_table


def benchmark(
    t_max: Sequence[int] = (4, 16, 64), batch_size: int = 200, threads: int = 1, repeats: int = 7, seed: int = 0
) -> None:
    """Time the ANN and all engines side by side.

    Args:
        t_max: The T to convert at.
        batch_size: Images in a batch.
        threads: Threads of torch.
        repeats: Rounds; each round runs everything once.
        seed: Of the random weights and images.
    """
    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    ann = quartz_mnist().eval()
    images = torch.rand(batch_size, 1, 28, 28)
    contenders: dict[tuple[str, int | None], Callable[[], object]] = {("ANN", None): partial(ann, images)}
    for t in t_max:
        held = quartz_plugin.convert(ann, images, t_max=t)
        contenders["analytic, logits alone", t] = partial(held, images)
        contenders["analytic, all spikes", t] = partial(held.run, images)
        paper = quartz_plugin.convert(ann, images, t_max=t, **quartz_plugin.PAPER)
        contenders["stepped, the paper's neuron", t] = partial(paper.run, images, engine="stepped")
        contenders["to_snntorch() in a loop", t] = partial(_loop, paper.to_snntorch(), paper, images)

    seconds: dict[tuple[str, int | None], list[float]] = {name: [] for name in contenders}
    with torch.no_grad():
        for repeat in range(repeats + 1):
            for name, run in contenders.items():
                started = time.perf_counter()
                run()
                if repeat:  # the first round warms up
                    seconds[name].append(time.perf_counter() - started)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    ann_time = medians["ANN", None]
    rows = [
        [name, "-" if t is None else str(t), round(1000 * median, 2), round(median / ann_time, 2)]
        for (name, t), median in medians.items()
    ]
    print(f"the paper's MNIST network, batch {batch_size}, {threads} thread(s), medians of {repeats}")
    print(format_table(["what", "T", "ms", "x ANN"], rows))


def _loop(net: torch.nn.Module, snn: quartz_plugin.SpikingNetwork, images: torch.Tensor) -> torch.Tensor:
    """Step a network over the global clock, as a user of snnTorch would."""
    quartz_plugin.reset(net)
    outputs = [net(spikes) for spikes in quartz_plugin.encode(images, snn.t_max, snn.n_steps)]
    return torch.stack(outputs)


if __name__ == "__main__":
    auto_cli(benchmark)
