"""The networks of the recipes."""

from __future__ import annotations

import difflib
import importlib
import inspect
import os
import sys
import warnings
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from quartz_plugin.lightning.weights import fill, read_file
from quartz_plugin.tables import printable

FITTED_ON, CLASS_NAMES = "fitted_on", "class_names"
"""What a converted network's settings, and a checkpoint, are told of their data."""

SPIKES = "spikes"
"""What a checkpoint is told of a network that was trained for few steps."""

UNKNOWN_DATA = "unknown data"


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


def vgg11_bn_cifar10(classes: int = 10) -> nn.Sequential:
    """Return VGG11 with batch norm for 32 x 32 images; 159,754 neurons, 171.7 M multiplications.

    Configuration A of arXiv:1409.1556, whose features end as 1 x 1 x 512 here; two hidden layers of 4,096. Without the
    zeros of the padding there are 133.2 M multiplications.

    Parameters
    ----------
    classes : int
        Outputs.

    Examples
    --------
    >>> import torch
    >>> vgg11_bn_cifar10().eval()(torch.zeros(1, 3, 32, 32)).shape
    torch.Size([1, 10])
    """
    return nn.Sequential(
        *_vgg11_features(64),
        nn.Flatten(),
        nn.Linear(512, 4096),
        nn.ReLU(),
        nn.Dropout(),
        nn.Linear(4096, 4096),
        nn.ReLU(),
        nn.Dropout(),
        nn.Linear(4096, classes),
    )


def vgg_cifar10(classes: int = 10) -> nn.Sequential:
    """Return a VGG for 32 x 32 images that 2 CPU cores train in an hour; 75,786 neurons, 29.0 M multiplications.

    The convolutions of :func:`vgg11_bn_cifar10` with half their channels, and one linear layer behind them.

    Parameters
    ----------
    classes : int
        Outputs.

    Examples
    --------
    >>> import torch
    >>> vgg_cifar10().eval()(torch.zeros(1, 3, 32, 32)).shape
    torch.Size([1, 10])
    """
    return nn.Sequential(*_vgg11_features(32), nn.Flatten(), nn.Dropout(), nn.Linear(256, classes))


def _vgg11_features(width: int) -> list[nn.Module]:
    """Configuration A of arXiv:1409.1556 with batch norm; from `width` channels to 8 times as many."""
    features: list[nn.Module] = []
    channels = 3
    for stage in ((1,), (2,), (4, 4), (8, 8), (8, 8)):
        for factor in stage:
            features += [nn.Conv2d(channels, factor * width, 3, padding=1), nn.BatchNorm2d(factor * width), nn.ReLU()]
            channels = factor * width
        features.append(nn.MaxPool2d(2))
    return features


class ResNet20(nn.Module):
    """ResNet-20 for 32 x 32 images (He et al. 2016, arXiv:1512.03385): stages of 16, 32 and 64 channels.

    Its shortcuts have no weights (option A): where a stage begins, every other pixel and zero channels at both sides.

    Parameters
    ----------
    classes : int
        Outputs.

    Examples
    --------
    >>> import torch
    >>> ResNet20()(torch.zeros(1, 3, 32, 32)).shape
    torch.Size([1, 10])
    """

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = nn.Sequential(*(BasicBlock(16, 16) for _ in range(3)))
        self.layer2 = nn.Sequential(BasicBlock(16, 32), *(BasicBlock(32, 32) for _ in range(2)))
        self.layer3 = nn.Sequential(BasicBlock(32, 64), *(BasicBlock(64, 64) for _ in range(2)))
        self.linear = nn.Linear(64, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``[B, classes]`` of images ``[B, 3, 32, 32]``."""
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(x.mean((2, 3)))  # type: ignore[no-any-return]


class BasicBlock(nn.Module):
    """Two 3 x 3 convolutions and a shortcut around them; half the size where the channels double."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.grows = outputs - inputs
        stride = 2 if self.grows else 1
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        """Add the shortcut, then the ReLU."""
        shortcut = x
        if self.grows:
            shortcut = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.grows // 2, self.grows // 2))
        x = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(x)) + shortcut)


class MobileNetV1(nn.Module):
    """MobileNet v1 (Howard et al. 2017, arXiv:1704.04861): a stem and 13 depthwise separable blocks with ReLU6.

    Padding is that of TensorFlow: at stride 2 nothing on the left and top, 1 on the right and bottom.

    Parameters
    ----------
    width : float
        Multiplies all channels; 0.25 in the weights of ``../shared``.
    classes : int
        Outputs.

    Examples
    --------
    >>> import torch
    >>> MobileNetV1()(torch.zeros(1, 3, 128, 128)).shape
    torch.Size([1, 1000])
    """

    def __init__(self, width: float = 0.25, classes: int = 1000) -> None:
        super().__init__()
        channels = [int(width * c) for c in (32, 64, 128, 128, 256, 256, *[512] * 6, 1024, 1024)]
        strides = [1, 2, 1, 2, 1, 2, 1, 1, 1, 1, 1, 2, 1]
        self.stem = ConvNormReLU6(3, channels[0], 3, stride=2)
        self.blocks = nn.Sequential(
            *(
                DepthwiseSeparable(inputs, outputs, stride)
                for inputs, outputs, stride in zip(channels, channels[1:], strides, strict=False)
            )
        )
        self.classifier = nn.Linear(channels[-1], classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``[B, classes]`` of images ``[B, 3, 128, 128]``."""
        return self.classifier(self.blocks(self.stem(x)).mean((2, 3)))  # type: ignore[no-any-return]


class ConvNormReLU6(nn.Module):
    """Convolution, batch norm, ReLU6, with TensorFlow's padding."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> None:
        super().__init__()
        self.padding = (0, 1, 0, 1) if stride == 2 else (kernel // 2,) * 4
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, groups=groups, bias=False)
        self.bn = nn.BatchNorm2d(outputs, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        """Pad, convolve, normalise, clip to [0, 6]."""
        return F.relu6(self.bn(self.conv(F.pad(x, self.padding))))


class DepthwiseSeparable(nn.Module):
    """A convolution for each channel by itself, then one for each pixel by itself."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.depthwise = ConvNormReLU6(inputs, inputs, 3, stride, groups=inputs)
        self.pointwise = ConvNormReLU6(inputs, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Depthwise, then pointwise."""
        return self.pointwise(self.depthwise(x))  # type: ignore[no-any-return]


NETWORKS: dict[str, Callable[..., nn.Module]] = {
    "quartz_mnist": quartz_mnist,
    "vgg_cifar10": vgg_cifar10,
    "vgg11_bn_cifar10": vgg11_bn_cifar10,
    "resnet20": ResNet20,
    "mobilenet_v1": MobileNetV1,
}
"""Name on the command line -> what makes the network; all take the number of ``classes``."""


def build(
    arch: str, classes: int | None = None, weights: str | None = None, arguments: Mapping[str, Any] | None = None
) -> tuple[nn.Module, list[str]]:
    """Make a network by name, and give it published or stored weights.

    Where the weights are of another number of classes, the layers that differ in nothing but their outputs keep their
    fresh values.

    Parameters
    ----------
    arch : str
        A name in :data:`NETWORKS`, a classification model of torchvision, or the import path of a class or
        function of your own (``package.module.Network``; the working directory is searched as well).
    classes : int, optional
        Outputs, handed on as ``classes`` or ``num_classes``; by default the network's own number.
    weights : str, optional
        A .safetensors or .pt file, or the name of published weights of torchvision's (``DEFAULT``).
    arguments : mapping, optional
        What the network's constructor takes besides.

    Returns
    -------
    network : nn.Module
    fresh : list of str
        Parameters that the weights could not fill, for their number of classes; empty without `weights`.

    Raises
    ------
    FileNotFoundError, ValueError
        If there is no such network or file, the arguments do not fit, or the weights are of another network.

    Examples
    --------
    >>> network, fresh = build("resnet20", classes=7)
    >>> network.linear.out_features, fresh
    (7, [])
    """
    import torchvision

    published = torchvision.models.list_models(module=torchvision.models)
    if arch in NETWORKS:
        make = NETWORKS[arch]
    elif arch in published:
        make = torchvision.models.get_model_builder(arch)
    elif "." in arch:
        make = _imported(arch)
    else:
        close = difflib.get_close_matches(arch, [*NETWORKS, *published], n=3)
        meant = f"; did you mean {' or '.join(close)}?" if close else "."
        raise ValueError(
            f"no network is called {arch!r}{meant} There are {', '.join(NETWORKS)}, torchvision's classification "
            "models, and the import path of your own class"
        )
    options = dict(arguments or {})
    if not callable(make):
        raise ValueError(f"{arch} is a {type(make).__name__}, not a class or function that makes a torch.nn.Module")
    of_torchvision = weights is not None and arch in published and not Path(weights).suffix
    if of_torchvision and arch in ("googlenet", "inception_v3"):
        # Their published weights want another normalisation than torchvision's other models, and bring it along.
        options.setdefault("transform_input", True)
    if classes is not None:
        accepted = inspect.signature(make).parameters
        own = {"classes", "num_classes"} & set(accepted)
        # torchvision's builders hand everything on.
        name = own.pop() if own else "num_classes" if arch in published else None
        if name is not None:
            options.setdefault(name, classes)
    with warnings.catch_warnings():
        # torchvision's own notice about how GoogLeNet and Inception initialise.
        warnings.filterwarnings("ignore", category=FutureWarning, module="torchvision")
        try:
            network = make(**options)
        except TypeError as error:
            raise ValueError(f"{arch} cannot be made with {options}: {error}") from error
    if not isinstance(network, nn.Module):
        raise ValueError(f"{arch} makes a {type(network).__name__}, not a torch.nn.Module")
    if weights is None:
        return network, []
    if of_torchvision:
        return network, fill(network, _published_state(arch, weights), f"torchvision's {weights} weights")
    return network, load_weights(network, weights)


def _imported(path: str) -> Callable[..., nn.Module]:
    module, _, name = path.rpartition(".")
    if (here := os.getcwd()) not in sys.path:
        sys.path.append(here)
    try:
        return getattr(importlib.import_module(module), name)  # type: ignore[no-any-return]
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"cannot import {path}: {error}") from error


def _published_state(arch: str, name: str) -> dict[str, Tensor]:
    import torchvision

    known = torchvision.models.get_model_weights(arch)
    try:
        chosen = known[name]
    except KeyError as error:
        raise ValueError(
            f"{arch} has the published weights {', '.join(known.__members__)}, or give a file; got {name!r}"
        ) from error
    try:
        return chosen.get_state_dict(progress=True, check_hash=True, weights_only=True)  # type: ignore[no-any-return]
    except (OSError, RuntimeError) as error:
        raise ValueError(f"could not download {chosen.url} ({error}); give --model.weights a file instead") from error


def read_dataset_name(weights: str) -> str:
    """Name the data that weights were fitted on, where it is a checkpoint, which is told it."""
    # Lightning writes zip files; of those the tensors need not be read for this.
    if not zipfile.is_zipfile(weights):
        return UNKNOWN_DATA
    return fitted_on_of(read_file(weights, "file of weights", mmap=True)) or UNKNOWN_DATA


def fitted_on_of(notes: Mapping[Any, Any]) -> str | None:
    """The name of the data that a checkpoint or a network's settings are told of; None where they are told nothing."""
    note = notes.get(FITTED_ON)
    return note if isinstance(note, str) else None


def class_names_of(notes: Mapping[Any, Any]) -> list[str]:
    """The names of classes that a checkpoint or a network's settings are told of; empty where they are told nothing.

    Raises
    ------
    ValueError
        If they are anything but a list of texts.
    """
    names = notes.get(CLASS_NAMES)
    if names is None:
        return []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"its class names are no list of texts, but {printable(repr(names))[:80]}")
    return names


def load_weights(network: nn.Module, path: str | os.PathLike[str]) -> list[str]:
    """Load a file of weights into a network, running no code from it.

    Parameters
    ----------
    network : nn.Module
        Is modified.
    path : str or path
        A state dict, .safetensors or of torch.save's, or a checkpoint with one in it, of Lightning's or as others have
        them: see :func:`quartz_plugin.lightning.weights.fill`.

    Returns
    -------
    list of str
        Parameters left as they were, because the weights are of another number of classes.

    Raises
    ------
    FileNotFoundError, ValueError
        If the file is not there, not readable, or of another network.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"no weights file {path}")
    loaded = read_file(path, "file of weights")
    if loaded.get(SPIKES) is not None:
        raise ValueError(
            f"{path} is a checkpoint of a network that was trained for spikes, no ANN's: give it as --ckpt_path, and "
            "as --model.weights the ANN's weights that it was trained from"
        )
    return fill(network, loaded, str(path))
