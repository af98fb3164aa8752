"""What a simulation costs, as a multiple of the same ANN's forward pass on the same images.

    python recipes/benchmark.py                                     # the paper's MNIST network, random weights
    python recipes/benchmark.py --data ../shared --memory true      # trained, on real images; peak memory as well
    python recipes/benchmark.py --data ../shared --networks [mnist,vgg11,resnet20,squeezenet] --t_max [16,64]
    python recipes/benchmark.py --networks resnet20 --t_max 4 --batch_size 20 --slow true
    python recipes/benchmark.py --data ../shared --t_max 16 --batch_size 100 --test_pass true

For each T everything runs in one process, interleaved: ANN, engine, engine, ..., ANN, engine, ..., after one round
that warms up; the table gives medians. The ANN gets images that are normalised already. `--networks` are mnist,
vgg11, resnet20 and squeezenet. A CSV file and a picture go to runs/benchmark.

"logits alone" computes no spike times but the output's; "all spikes" records those of every layer; "all metrics" counts
on them every cost that the recipes' test reports. "event, hold off" is logits alone, of a neuron without hold whose
bias is a synapse. stepped is the paper's neuron, and so is to_snntorch() in a user's loop over the global clock. Rate
code is the same ANN with snnTorch's Leaky (beta = 1, reset by subtraction) for ReLU, weights scaled by the same
percentiles, currents that stay: 16 steps of a plain loop.
"""

import copy
import itertools
import json
import logging
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from csv import DictWriter
from dataclasses import asdict, dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning
import snntorch
import torch
import torchvision
from jsonargparse import auto_cli
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torchvision.transforms import v2

import quartz_plugin
from quartz_plugin.lightning import (
    ClassificationData,
    FolderData,
    MNISTData,
    ResNet20,
    cost_metrics,
    quartz_mnist,
    vgg11_bn_cifar10,
)
from quartz_plugin.lightning.data import open_image
from quartz_plugin.lightning.modules import SpikingClassifier
from quartz_plugin.lightning.networks import load_weights
from quartz_plugin.network import SpikingNetwork
from quartz_plugin.tables import format_table

if TYPE_CHECKING:
    from matplotlib.axes import Axes

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))

RATE_STEPS = 16
LONG_FROM = 128
"""The MNIST network is stepped below this T without being asked to."""


@dataclass(frozen=True)
class Network:
    """A network, where its weights and images lie, and what its input is normalised by."""

    title: str
    make: Callable[[], nn.Module]
    shape: tuple[int, int, int]
    train: str
    test: str
    weights: str | None
    preprocessing: tuple[tuple[float, ...], tuple[float, ...]] | None = None


NETWORKS = {
    "mnist": Network(
        "the paper's MNIST network", quartz_mnist, (1, 28, 28),
        "MNIST/raw", "MNIST/raw", "mnist_convnet.safetensors",
    ),
    "vgg11": Network(
        "VGG11 with batch norm for CIFAR-10", vgg11_bn_cifar10, (3, 32, 32), "cifar10/train", "cifar10/test", None
    ),
    "resnet20": Network(
        "ResNet-20 for CIFAR-10", ResNet20, (3, 32, 32),
        "cifar10/train", "cifar10/test", "cifar10_resnet20.safetensors", IMAGENET,
    ),
    "squeezenet": Network(
        "SqueezeNet 1.0 for ImageNet", torchvision.models.squeezenet1_0, (3, 227, 227),
        "imagenet/train", "imagenet/val", "imagenet_squeezenet1_0.safetensors", IMAGENET,
    ),
}  # fmt: skip

KINDS: dict[str, dict[str, Any]] = {"hold": {}, "paper": {**quartz_plugin.PAPER}, "hold off": {"hold": False}}
"""Options of the spiking networks that run."""

Run = Callable[[Tensor], Tensor]
"""Images to logits."""


@dataclass(frozen=True)
class Contender:
    """A kind of spiking network, and what makes it run."""

    kind: str
    prepare: Callable[[SpikingNetwork], Run]
    by_event: bool = False
    is_slow: bool = False


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


@dataclass(frozen=True)
class Setup:
    """What is timed: the ANN and its images."""

    name: str
    ann: nn.Module
    images: Tensor
    calibration: Tensor
    labels: Tensor | None
    origin: str

    @property
    def network(self) -> Network:
        """Of which this is one."""
        return NETWORKS[self.name]


def benchmark(
    networks: str | Sequence[str] = "mnist",
    t_max: int | Sequence[int] = (4, 8, 16, 32, 64, 128),
    batch_size: int = 200,
    threads: int = 1,
    repeats: int = 7,
    data: str | None = None,
    calibration_images: int = 200,
    percentile: float = 99.0,
    slow: bool = False,
    memory: bool = False,
    test_pass: bool = False,
    csv: str = "runs/benchmark/benchmark.csv",
    plot: str = "runs/benchmark/benchmark.png",
    seed: int = 0,
) -> None:
    """Time the ANN and all engines side by side.

    Args:
        networks: mnist, vgg11, resnet20, squeezenet, or several: '[mnist,vgg11]'.
        t_max: The T to convert at, one or several.
        batch_size: Images in a batch.
        threads: Threads of torch and of the event engine.
        repeats: Rounds; each round runs everything once.
        data: Folder laid out like ../shared, with real images and trained weights; without it both are random.
        calibration_images: Training images to calibrate on, with --data; else the random images themselves.
        percentile: Of each ReLU's values, and of the logits' size, that becomes the value 1.
        slow: Also step and loop where it takes long: at T = 128 and above, and in the larger networks at every T.
        memory: Also measure peak memory, of each contender in a process of its own.
        test_pass: Also time the recipes' test of all test images, with all metrics and with costs of one image.
        csv: File for the table.
        plot: File for the picture.
        seed: Of the random weights and images.
    """
    names = [networks] if isinstance(networks, str) else list(networks)
    times = [t_max] if isinstance(t_max, int) else list(t_max)
    _check(names, times, {"batch_size": batch_size, "repeats": repeats, "calibration_images": calibration_images})
    if test_pass and data is None:
        raise ValueError("--test_pass true tests on real images: give --data")
    root = None if data is None else _root(data, names)
    torch.set_num_threads(threads)
    every: list[Row] = []
    for name in names:
        setup = _set_up(name, root, batch_size, calibration_images, seed)
        convert = partial(_convert, setup, percentile)
        rows = []
        for t in times:
            print(f"{name}: T = {t}", file=sys.stderr, flush=True)
            rows += _time(setup, t, convert, repeats, slow, with_rate=t == _nearest(times, RATE_STEPS))
        if memory:
            _measure_memory(setup, rows, convert)
        print(_heading(setup, threads, repeats, percentile, root, {t: _left_out(name, t, slow) for t in times}))
        print(_table(rows) + "\n")
        if test_pass:
            assert root is not None
            print(_test_passes(_recipes_data(setup.network, root, batch_size), times, convert, repeats) + "\n")
        every += rows
        _write(every, Path(csv), Path(plot))
    print(f"wrote {csv} and {plot}")


def _check(names: Sequence[str], times: Sequence[int], counts: Mapping[str, int]) -> None:
    for name in names:
        if name not in NETWORKS:
            raise ValueError(f"no network is called {name!r}; there are {', '.join(NETWORKS)}")
    if not names or not times:
        raise ValueError("give at least one network and one T")
    for option, count in counts.items():
        if count < 1:
            raise ValueError(f"{option} must be at least 1, got {count}")


def _nearest(times: Sequence[int], to: int) -> int:
    return min(times, key=lambda t: abs(t - to))


# Networks and images.


def _root(data: str, names: Sequence[str]) -> Path:
    """Folder with MNIST, cifar10, imagenet and weights: the one given, or `data` in it."""
    root = Path(data)
    if not root.is_dir():
        raise FileNotFoundError(f"no folder {data}")
    root = root / "data" if (root / "data").is_dir() else root
    for network in (NETWORKS[name] for name in names):
        for folder in (network.train, network.test):
            if not (root / folder).is_dir():
                raise FileNotFoundError(f"no folder {root / folder}")
    return root


def _set_up(name: str, root: Path | None, batch_size: int, calibration_images: int, seed: int) -> Setup:
    torch.manual_seed(seed)
    network = NETWORKS[name]
    ann = network.make().eval()
    if root is None:
        images = torch.rand(batch_size, *network.shape)
        _take_statistics(ann, _normalise(network, images))
        return Setup(name, ann, images, images, None, "random weights, random images")
    calibration, _ = _read(network, root / network.train, calibration_images, train=True)
    images, labels = _read(network, root / network.test, batch_size, train=False)
    if network.weights is None:
        _take_statistics(ann, _normalise(network, calibration))
        return Setup(name, ann, images, calibration, None, "random weights (there are no trained ones), real images")
    load_weights(ann, str(root / "weights" / network.weights))
    return Setup(name, ann, images, calibration, labels, "trained weights, real images")


def _normalise(network: Network, images: Tensor) -> Tensor:
    return images if network.preprocessing is None else v2.Normalize(*map(list, network.preprocessing))(images)


@torch.no_grad()
def _take_statistics(ann: nn.Module, inputs: Tensor) -> None:
    """Set the batch norms' running statistics to those of these images."""
    norms = [module for module in ann.modules() if isinstance(module, nn.BatchNorm2d)]
    if not norms:
        return
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = None
    ann.train()(inputs)
    ann.eval()
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum


def _read(network: Network, folder: Path, count: int, train: bool) -> tuple[Tensor, Tensor]:
    """`count` images as float in [0, 1], spread evenly over the folder's, and their labels."""
    dataset: Any
    if network.train.startswith("MNIST"):
        try:
            dataset = torchvision.datasets.MNIST(folder.parents[1], train=train)
        except RuntimeError as error:
            raise FileNotFoundError(f"MNIST's four idx files are not in {folder}") from error
    else:
        dataset = torchvision.datasets.ImageFolder(
            folder, loader=lambda path: open_image(path).convert("RGB"), allow_empty=True
        )
    if len(dataset) < count:
        raise ValueError(f"{folder} holds {len(dataset)} images, {count} are wanted")
    size = network.shape[1]
    transform = v2.Compose(
        [v2.ToImage(), v2.Resize(size), v2.CenterCrop(size), v2.ToDtype(torch.float32, scale=True), v2.ToPureTensor()]
    )
    chosen = [dataset[index] for index in torch.linspace(0, len(dataset) - 1, count).long().tolist()]
    return torch.stack([transform(image) for image, _ in chosen]), torch.tensor([label for _, label in chosen])


def _convert(setup: Setup, percentile: float, t: int, kind: str) -> SpikingNetwork:
    return quartz_plugin.convert(
        setup.ann, setup.calibration, t, percentile=percentile, output_percentile=percentile,
        preprocessing=setup.network.preprocessing, **KINDS[kind],
    )  # fmt: skip


# Contenders.


def _engine(engine: str, record: bool, snn: SpikingNetwork) -> Run:
    return lambda images: snn.run(images, engine, record).logits


def _with_metrics(engine: str, snn: SpikingNetwork) -> Run:
    """Count every cost that the recipes' test reports."""
    costs = cost_metrics(snn)

    def run(images: Tensor) -> Tensor:
        result = snn.run(images, engine)
        costs.update(result=result)
        return result.logits

    return run


def _loop(snn: SpikingNetwork) -> Run:
    """Step a network over the global clock, as a user of snnTorch would."""
    net = snn.to_snntorch()

    def run(images: Tensor) -> Tensor:
        quartz_plugin.reset(net)
        train = [*quartz_plugin.encode(images, snn.t_max), *[torch.zeros_like(images)] * (snn.n_steps - snn.t_max)]
        return snn.decode(torch.stack([net(spikes) for spikes in train]))

    return run


def _rate(ann: nn.Module, scales: Mapping[str, float]) -> Run:
    """Rate code: the network's ReLUs as snnTorch's Leaky, what their firing rate 1 stands for by name."""
    net, before = nn.Sequential(), 1.0
    for position, (name, module) in enumerate(ann.named_children()):
        own: Any = copy.deepcopy(module)
        if isinstance(module, nn.ReLU):
            own = snntorch.Leaky(beta=1.0, threshold=1.0, reset_mechanism="subtract", init_hidden=True)
            before = scales[name]
        elif isinstance(module, nn.Conv2d | nn.Linear):
            following = (later for later, each in list(ann.named_children())[position:] if isinstance(each, nn.ReLU))
            after = scales.get(next(following, ""), 1.0)
            own.weight.data.mul_(before / after)
            own.bias.data.div_(after)
        net.append(own)
    net.eval()

    def run(images: Tensor) -> Tensor:
        for module in net:
            if isinstance(module, snntorch.Leaky):
                module.reset_mem()
        return torch.stack([net(images) for _ in range(RATE_STEPS)]).mean(0)

    return run


def _scales(snn: SpikingNetwork) -> dict[str, float]:
    """Name of a ReLU -> what its value 1 stands for."""
    return {row["module"]: row["scale"] for row in snn.report if row["operation"] == "ReLU"}


RATE = f"rate code in snnTorch's Leaky, {RATE_STEPS} steps"

CONTENDERS = {
    "analytic, logits alone": Contender("hold", lambda snn: snn),
    "analytic, all spikes": Contender("hold", partial(_engine, "analytic", True)),
    "analytic, all metrics": Contender("hold", partial(_with_metrics, "analytic")),
    "event, paper's neuron, logits alone": Contender("paper", partial(_engine, "event", False), by_event=True),
    "event, all spikes": Contender("paper", partial(_engine, "event", True), by_event=True),
    "event, all metrics": Contender("paper", partial(_with_metrics, "event"), by_event=True),
    "event, hold off": Contender("hold off", partial(_engine, "event", False), by_event=True),
    "stepped": Contender("paper", partial(_engine, "stepped", True), is_slow=True),
    "to_snntorch() in a loop": Contender("paper", _loop, is_slow=True),
}


def _takes_long(name: str, t: int) -> bool:
    return name != "mnist" or t >= LONG_FROM


def _left_out(name: str, t: int, slow: bool) -> list[str]:
    """Contenders that do not run here."""
    has_numba = find_spec("numba") is not None
    return [
        what
        for what, contender in CONTENDERS.items()
        if (contender.is_slow and _takes_long(name, t) and not slow) or (contender.by_event and not has_numba)
    ]


# Measuring.


@torch.no_grad()
def _time(
    setup: Setup,
    t: int,
    convert: Callable[[int, str], SpikingNetwork],
    repeats: int,
    slow: bool,
    with_rate: bool,
) -> list[Row]:
    """Rows of one T."""
    left_out = _left_out(setup.name, t, slow)
    running = {what: contender for what, contender in CONTENDERS.items() if what not in left_out}
    snns = {kind: convert(t, kind) for kind in KINDS if any(each.kind == kind for each in running.values())}
    runs: dict[str, Callable[[], Tensor]] = {"ANN": partial(setup.ann, _normalise(setup.network, setup.images))}
    for what, contender in running.items():
        runs[what] = partial(contender.prepare(snns[contender.kind]), setup.images)
    if with_rate and setup.name == "mnist":
        runs[RATE] = partial(_rate(setup.ann, _scales(snns["hold"])), setup.images)

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
                right[what] = _right(logits, setup.labels)
    medians = {what: statistics.median(taken) for what, taken in seconds.items()}
    return [
        Row(
            network=setup.name,
            images=setup.origin,
            batch=len(setup.images),
            threads=torch.get_num_threads(),
            what=what,
            t_max=RATE_STEPS if what == RATE else t,
            ms=1000 * median,
            ann_ms=1000 * medians["ANN"],
            times_ann=median / medians["ANN"],
            right_percent=right[what],
        )
        for what, median in medians.items()
    ]


def _recipes_data(network: Network, root: Path, batch_size: int) -> ClassificationData:
    """Test images as the recipes read them."""
    if network.train.startswith("MNIST"):
        return MNISTData(str(root), batch_size)
    folder, size = (root / network.test).parent, network.shape[1]
    return FolderData(str(folder), size=size, resize=size, batch_size=batch_size, cache=True)


def _test_passes(
    data: ClassificationData, times: Sequence[int], convert: Callable[[int, str], SpikingNetwork], repeats: int
) -> str:
    """Table of how long Lightning's test of a spiking network takes, with all metrics and with costs of one image."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")
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


def _right(logits: Tensor, labels: Tensor | None) -> float | None:
    return None if labels is None else 100 * float((logits.argmax(1) == labels).float().mean())


def _measure_memory(setup: Setup, rows: Sequence[Row], convert: Callable[[int, str], SpikingNetwork]) -> None:
    """Fill in each row's peak memory, in MB above the ANN's; networks go to their processes in files."""
    with tempfile.TemporaryDirectory() as folder:
        images = {"raw": setup.images, "normalised": _normalise(setup.network, setup.images)}
        for name, tensor in images.items():
            save_file({name: tensor.contiguous()}, Path(folder) / name)
        save_file(setup.ann.state_dict(), Path(folder) / "ann")
        by_ann = _peak_of(folder, setup.name, "ANN", {})
        for row in rows:
            if row.what == "ANN":
                row.memory_mb = 0.0
                continue
            kind = "hold" if row.what == RATE else CONTENDERS[row.what].kind
            path = Path(folder) / f"{kind} {row.t_max}"
            print(f"{setup.name}: memory of {row.what}, T = {row.t_max}", file=sys.stderr, flush=True)
            if not path.exists():
                convert(row.t_max, kind).save(path)
            scales = _scales(quartz_plugin.load(path)) if row.what == RATE else {}
            row.memory_mb = _peak_of(folder, setup.name, row.what, {"snn": str(path), "scales": scales}) - by_ann


def _peak_of(folder: str, name: str, what: str, options: dict[str, Any]) -> float:
    job = {"folder": folder, "name": name, "what": what, "threads": torch.get_num_threads(), **options}
    done = subprocess.run(
        [sys.executable, __file__, "--peak-of", json.dumps(job)], capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        raise ValueError(f"measuring the memory of {what} failed: {(done.stderr.strip() or 'killed').splitlines()[-1]}")
    return float(done.stdout.split()[-1])


@torch.no_grad()
def _run_once(
    folder: str, name: str, what: str, threads: int, snn: str = "", scales: Mapping[str, float] | None = None
) -> None:
    """Run one contender, in a process that does nothing else."""
    torch.set_num_threads(threads)
    kind = "normalised" if what == "ANN" else "raw"
    images = load_file(Path(folder) / kind)[kind]
    run: Run
    if what in CONTENDERS:
        run = CONTENDERS[what].prepare(quartz_plugin.load(snn))
    else:
        ann = NETWORKS[name].make().eval()
        ann.load_state_dict(load_file(Path(folder) / "ann"))
        run = ann if what == "ANN" else _rate(ann, scales or {})
    run(images)


def _peak_mb() -> float:
    """Peak of this process's resident memory."""
    status = Path("/proc/self/status")
    if status.exists():  # ru_maxrss would begin with the parent's peak
        (line,) = (line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) / 1024
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1024**2 if sys.platform == "darwin" else 1024)


# What comes out.


def _heading(
    setup: Setup, threads: int, repeats: int, percentile: float, root: Path | None, left_out: Mapping[int, list[str]]
) -> str:
    calibrated = "them" if root is None else f"{len(setup.calibration)} training images"
    lines = [
        f"{setup.network.title}: {setup.origin}, percentile {percentile:g} of {calibrated}",
        f"batch {len(setup.images)}, {threads} thread(s), medians of {repeats}, torch {torch.__version__}, {_cpu()}",
    ]
    missing = {what: [t for t in left_out if what in left_out[t]] for what in CONTENDERS}
    for by_event, how in ((True, "pip install 'quartz_plugin[fast]'"), (False, "--slow true")):
        lines += [
            f"left out: {what} at T = {', '.join(map(str, times))} ({how})"
            for what, times in missing.items()
            if times and CONTENDERS[what].by_event == by_event
        ]
    return "\n".join(lines)


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _table(rows: Sequence[Row]) -> str:
    """The ANN once, at its median over all T, then what was timed beside it."""
    anns = [row for row in rows if row.what == "ANN"]
    first = ["ANN", None, round(statistics.median(row.ms for row in anns), 2), 1.0]
    columns: dict[str, list[object]] = {
        "what": [], "T": [], "ms": [], "x ANN": [], "right %": [], "MB above ANN": [],
    }  # fmt: skip
    lines = [[*first, anns[0].right_percent, anns[0].memory_mb]]
    lines += [
        [row.what, row.t_max, round(row.ms, 2), round(row.times_ann, 2), row.right_percent, row.memory_mb]
        for row in rows
        if row.what != "ANN"
    ]
    for line in lines:
        for cells, cell in zip(columns.values(), line, strict=True):
            cells.append(round(cell) if cells is columns["MB above ANN"] and isinstance(cell, float) else cell)
    shown = {name: cells for name, cells in columns.items() if any(cell is not None for cell in cells)}
    return format_table(list(shown), list(zip(*shown.values(), strict=True)))


def _write(rows: Sequence[Row], csv: Path, plot: Path) -> None:
    for path in (csv, plot):
        path.parent.mkdir(parents=True, exist_ok=True)
    with csv.open("w", newline="") as file:
        writer = DictWriter(file, list(asdict(rows[0])))
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)
    by_network = {name: list(group) for name, group in itertools.groupby(rows, lambda row: row.network)}
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.5 * len(by_network) + 3.5, 4.5), layout="constrained")
    panels = figure.subplots(1, len(by_network), sharey=True, squeeze=False)[0]
    for ax, own in zip(panels, by_network.values(), strict=True):
        draw(own, ax)
    drawn = {label: line for ax in panels for line, label in zip(*ax.get_legend_handles_labels(), strict=True)}
    figure.legend(drawn.values(), drawn.keys(), loc="outside right center", fontsize=8, frameon=False)
    figure.savefig(plot, dpi=150)


COLORS = (
    *("#0072b2", "#56b4e9", "#004466", "#d55e00", "#e69f00", "#7f3300"),
    *("#cc79a7", "#555555", "#009e73", "#000000"),
)


def draw(rows: Sequence[Row], ax: "Axes") -> "Axes":
    """Time against T for one network, one line per contender."""
    times = sorted({row.t_max for row in rows})
    ax.axhline(1, color="#999999", linestyle=":", linewidth=1)
    for (what, color), marker in zip(
        zip([*CONTENDERS, RATE], COLORS, strict=True), ("o", "o", "P", "s", "s", "X", "D", "^", "v", "*"), strict=True
    ):
        own = [row for row in rows if row.what == what]
        if own:
            ax.plot(
                [row.t_max for row in own], [row.times_ann for row in own], marker=marker, color=color, label=what,
                markersize=9 if what == RATE else 4.5, linestyle="none" if what == RATE else "-",
            )  # fmt: skip
    first = rows[0]
    ax.set(xscale="log", yscale="log", xlabel="T (levels of a value)", ylabel="time (x the ANN's forward pass)")
    ax.set_xticks(times, labels=[str(t) for t in times])
    ax.minorticks_off()
    ax.yaxis.set_major_locator(_decimal_ticks())
    ax.yaxis.set_major_formatter("{x:g}")
    ax.label_outer()
    ax.grid(axis="y", linewidth=0.4, alpha=0.6)
    ax.spines[["top", "right"]].set_visible(False)
    ax.set_title(f"{first.network}, batch {first.batch}, {first.threads} thread(s)", loc="left", fontsize=10)
    return ax


def _decimal_ticks() -> Any:
    from matplotlib.ticker import LogLocator

    return LogLocator(subs=(1, 2, 5))


if __name__ == "__main__":
    try:
        if sys.argv[1:2] == ["--peak-of"]:
            _run_once(**json.loads(sys.argv[2]))
            print(_peak_mb())
        else:
            auto_cli(benchmark, as_positional=False)
    except (OSError, ValueError, ImportError) as error:
        sys.exit(f"error: {error}")
