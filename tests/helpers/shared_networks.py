"""Trained networks and images of ../shared."""

import torch
import torchvision
from torchvision.transforms import v2

from helpers.paths import SHARED
from quartz_plugin.lightning.weights import load_weights

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def images_of(folder, count, size):
    """`count` images, spread over the classes, and their labels."""
    transform = v2.Compose([v2.ToImage(), v2.Resize(size), v2.ToDtype(torch.float32, scale=True), v2.ToPureTensor()])
    found = torchvision.datasets.ImageFolder(SHARED / "data" / folder, transform, allow_empty=True)
    chosen = torch.linspace(0, len(found) - 1, count).long().tolist()
    images, labels = zip(*(found[index] for index in chosen), strict=True)
    return torch.stack(images), torch.tensor(labels)


def trained(network, weights):
    load_weights(network, str(SHARED / "data" / "weights" / weights))
    return network.eval()
