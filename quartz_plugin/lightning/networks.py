"""The networks of the recipes."""

from __future__ import annotations

from torch import nn


def quartz_mnist(classes: int = 10) -> nn.Sequential:
    """Return the MNIST network of arXiv:2309.16795: conv6@5, pool, conv12@5, pool, conv120@4, fc; 4,354 neurons.

    Parameters
    ----------
    classes : int
        Outputs.

    Examples
    --------
    >>> import torch
    >>> quartz_mnist()(torch.zeros(1, 1, 28, 28)).shape
    torch.Size([1, 10])
    """
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
        nn.Linear(120, classes),
    )
