"""Networks that are timed, with their weights and images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import Tensor, nn
from torchvision.transforms import v2

from quartz_plugin.lightning.data import open_image
from quartz_plugin.lightning.networks import EfficientNetLite0, ResNet20, quartz_mnist, vgg11_bn_cifar10
from quartz_plugin.lightning.weights import load_weights
from quartz_plugin.lightning.zoos import IMAGENET

OF_IMAGENET = (IMAGENET.mean, IMAGENET.std)


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
        "cifar10/train", "cifar10/test", "cifar10_resnet20.safetensors", OF_IMAGENET,
    ),
    "squeezenet": Network(
        "SqueezeNet 1.0 for ImageNet", torchvision.models.squeezenet1_0, (3, 227, 227),
        "imagenet/train", "imagenet/val", "imagenet_squeezenet1_0.safetensors", OF_IMAGENET,
    ),
    "resnet50": Network(
        "ResNet-50 for ImageNet", torchvision.models.resnet50, (3, 224, 224),
        "imagenet/train", "imagenet/val", None, OF_IMAGENET,
    ),
    "efficientnet_lite0": Network(
        "EfficientNet-Lite0 for ImageNet", EfficientNetLite0, (3, 224, 224),
        "imagenet/train", "imagenet/val", "imagenet_efficientnet_lite0.safetensors",
        ((127 / 255,) * 3, (128 / 255,) * 3),
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Setup:
    """The ANN that is timed, and its images."""

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


def data_folder(data: str, names: Sequence[str]) -> Path:
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


def set_up(name: str, root: Path | None, batch_size: int, calibration_images: int, seed: int) -> Setup:
    """Make a network, with its weights and images where there is a folder of them, else random ones."""
    torch.manual_seed(seed)
    network = NETWORKS[name]
    ann = network.make().eval()
    if root is None:
        images = torch.rand(batch_size, *network.shape)
        take_statistics(ann, normalise(network, images))
        return Setup(name, ann, images, images, None, "random weights, random images")
    calibration, _ = read_images(network, root / network.train, calibration_images, train=True)
    images, labels = read_images(network, root / network.test, batch_size, train=False)
    if network.weights is None:
        take_statistics(ann, normalise(network, calibration))
        return Setup(name, ann, images, calibration, None, "random weights (there are no trained ones), real images")
    load_weights(ann, str(root / "weights" / network.weights))
    return Setup(name, ann, images, calibration, labels, "trained weights, real images")


def normalise(network: Network, images: Tensor) -> Tensor:
    """Normalise images as the network expects them."""
    return images if network.preprocessing is None else v2.Normalize(*map(list, network.preprocessing))(images)


@torch.no_grad()
def take_statistics(ann: nn.Module, inputs: Tensor) -> None:
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


def read_images(network: Network, folder: Path, count: int, train: bool) -> tuple[Tensor, Tensor]:
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
