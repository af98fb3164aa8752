"""The paper's MNIST network, and MNIST."""

import numpy as np
import torch
from torch import nn

from helpers.paths import SHARED


def paper_network():
    """The paper's MNIST network, untrained; its keys are those of ../shared."""
    return nn.Sequential(
        nn.Conv2d(1, 6, 5),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(6, 12, 5),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(12, 120, 4),
        nn.ReLU(),
        nn.Dropout(),
        nn.Flatten(),
        nn.Linear(120, 10),
    )


def read_mnist(split):
    """Images float32 [N, 1, 28, 28] in [0, 1] and labels int64 of "train" or "t10k", from the idx files."""
    raw = SHARED / "data" / "MNIST" / "raw"
    images = np.fromfile(raw / f"{split}-images-idx3-ubyte", np.uint8, offset=16)
    labels = np.fromfile(raw / f"{split}-labels-idx1-ubyte", np.uint8, offset=8)
    images = images.reshape(len(labels), 1, 28, 28).astype(np.float32) / 255
    return torch.from_numpy(images), torch.from_numpy(labels.astype(np.int64))
