r"""A trained network beside the spiking networks made of it, on the same images from a folder.

    python recipes/compare.py --network resnet20 --weights ../shared/data/weights/cifar10_resnet20.safetensors \
        --train ../shared/data/cifar10/train --test ../shared/data/cifar10/test --size 32

`--network` is resnet20 or mobilenet_v1 (quartz_plugin.lightning), or any classification model of torchvision.
Folders hold one folder of images for each class; the classes are those of `--train`. Calibration images come from
`--train` alone, as many from each class as from the others.
"""

import csv
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal

import torch
import torchvision
from jsonargparse import auto_cli
from rich.progress import track
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset
from torchvision.transforms import v2

import quartz_plugin
from quartz_plugin.lightning import MobileNetV1, ResNet20
from quartz_plugin.lightning.modules import load_weights
from quartz_plugin.tables import format_table

COLUMNS = ("T", "ANN %", "SNN %", "agreement %", "gained", "lost", "ties %", "early %", "steps", "neurons")


def compare(
    weights: str,
    train: str,
    test: str,
    size: int,
    network: str = "resnet20",
    t_max: Sequence[int] = (16, 32, 64),
    own_t_max: Mapping[str, int] | None = None,
    percentile: float = 99.9,
    granularity: Literal["layer", "channel"] = "layer",
    calibration_images: int = 1000,
    hold: bool = True,
    mean: Sequence[float] = (0.485, 0.456, 0.406),
    std: Sequence[float] = (0.229, 0.224, 0.225),
    batch_size: int = 50,
    threads: int = 2,
    out: str | None = None,
) -> None:
    """Convert at every T and classify the same test images with the network and the spiking networks.

    Args:
        weights: State dict of the network (.safetensors or .pt).
        train: Folder of training images, for calibration.
        test: Folder of test images.
        size: Images are resized to this many pixels, the shorter side, and cropped to a square.
        network: Its name.
        t_max: The T to convert at.
        own_t_max: T of single layers, blocks, the input or the output, by name: '{"input": 256, "output": 256}'.
        percentile: Of each ReLU's values on the calibration images.
        granularity: One scale a layer, or one a channel.
        calibration_images: At most this many.
        hold: No neuron fires before its readout; False lets early spikes happen, as in the paper.
        mean: What the network expects its input normalised by.
        std: The same.
        batch_size: Images in a batch.
        threads: Threads of torch.
        out: CSV file for the table.
    """
    torch.set_num_threads(threads)
    ann = build(network, weights).eval()
    train_set, test_set = _folder(train, size), _folder(test, size, classes_of=train)
    calibration = _evenly(train_set, calibration_images)
    layers: dict[str, quartz_plugin.Override] = {name: {"t_max": own} for name, own in (own_t_max or {}).items()}
    snns = {
        t: quartz_plugin.convert(
            ann, _batches(calibration, batch_size, f"calibrating T = {t}"), t,
            percentile=percentile, granularity=granularity, hold=hold, preprocessing=(mean, std),
            layers=layers,
        )
        for t in t_max
    }  # fmt: skip
    norm = v2.Normalize(list(mean), list(std))
    counts = {t: dict.fromkeys(("right", "agree", "gained", "lost", "ties", "early", "neurons"), 0) for t in t_max}
    right_of_ann = total = 0
    with torch.no_grad():
        for images, labels in _batches(test_set, batch_size, "testing"):
            answer = ann(norm(images)).argmax(1)
            right = answer == labels
            right_of_ann += int(right.sum())
            total += len(labels)
            for t, snn in snns.items():
                _count(counts[t], snn.run(images), answer, right, labels)

    rows = []
    for t, snn in snns.items():
        n = {name: count / total for name, count in counts[t].items()}
        rows.append(
            [
                t,
                round(100 * right_of_ann / total, 2),
                round(100 * n["right"], 2),
                round(100 * n["agree"], 2),
                counts[t]["gained"],
                counts[t]["lost"],
                round(100 * n["ties"], 2),
                round(100 * n["early"] / n["neurons"], 2),
                snn.n_steps,
                int(n["neurons"]),
            ]
        )
    how = f"percentile {percentile} by {granularity}"
    how += "".join(f", {name} T = {own}" for name, own in (own_t_max or {}).items())
    print(f"{network}: {total} test images, calibrated on {len(calibration)} training images, {how}")
    print(format_table(COLUMNS, rows))
    if out is not None:
        with Path(out).open("w", newline="") as file:
            csv.writer(file).writerows([COLUMNS, *rows])


def build(network: str, weights: str) -> nn.Module:
    """Return the network of that name with these weights."""
    own: dict[str, type[nn.Module]] = {"resnet20": ResNet20, "mobilenet_v1": MobileNetV1}
    if network in own:
        ann = own[network]()
    elif network in (names := torchvision.models.list_models(module=torchvision.models)):
        ann = torchvision.models.get_model(network)
    else:
        raise SystemExit(f"no network is called {network!r}; there are {[*own, *names]}")
    if not Path(weights).is_file():
        raise SystemExit(f"no file {weights}")
    load_weights(ann, weights)
    return ann


def _folder(root: str, size: int, classes_of: str | None = None) -> torchvision.datasets.ImageFolder:
    """Images of a folder of folders as float in [0, 1], with the classes of another such folder."""
    if not Path(root).is_dir():
        raise SystemExit(f"no folder {root}")
    transform = v2.Compose(
        [v2.ToImage(), v2.Resize(size), v2.CenterCrop(size), v2.ToDtype(torch.float32, scale=True), v2.ToPureTensor()]
    )
    images = torchvision.datasets.ImageFolder(root, transform, allow_empty=True)
    if classes_of is not None:
        expected = sorted(path.name for path in Path(classes_of).iterdir() if path.is_dir())
        if images.classes != expected:
            raise SystemExit(f"{root} and {classes_of} do not hold the same classes")
    return images


def _evenly(images: torchvision.datasets.ImageFolder, count: int) -> Subset[tuple[Tensor, int]]:
    """At most `count` images, spread evenly over the folder's, which are sorted by class."""
    return Subset(images, torch.linspace(0, len(images) - 1, min(count, len(images))).long().tolist())


def _batches(images: Dataset[tuple[Tensor, int]], size: int, what: str) -> Iterator[tuple[Tensor, Tensor]]:
    yield from track(DataLoader(images, batch_size=size), description=what)


def _count(
    counts: dict[str, int], result: quartz_plugin.SimulationResult, answer: Tensor, right: Tensor, labels: Tensor
) -> None:
    said = result.logits.argmax(1)
    counts["right"] += int((said == labels).sum())
    counts["agree"] += int((said == answer).sum())
    counts["gained"] += int(((said == labels) & ~right).sum())
    counts["lost"] += int(((said != labels) & right).sum())
    counts["ties"] += int(result.ties.sum())
    counts["early"] += sum(int(early.sum()) for early in result.early.values())
    counts["neurons"] += sum(early.numel() for early in result.early.values())


if __name__ == "__main__":
    auto_cli(compare, as_positional=False)
