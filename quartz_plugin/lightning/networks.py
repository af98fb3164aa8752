"""The networks of the recipes."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn
from torch.nn import functional as F


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


class EfficientNetLite0(nn.Module):
    """EfficientNet-Lite0 for 224 x 224 images: inverted residuals with linear bottlenecks and ReLU6, without gates.

    M. Tan, Q. V. Le, arXiv:1905.11946, in the form that TensorFlow published for small devices. Names of modules are
    those of the PyPI package efficientnet-lite-pytorch, whose weights ``../shared`` has.

    Parameters
    ----------
    classes : int
        Outputs.

    Examples
    --------
    >>> import torch
    >>> EfficientNetLite0().eval()(torch.zeros(1, 3, 224, 224)).shape
    torch.Size([1, 1000])
    """

    # Kernel, stride, channels and blocks of each stage.
    STAGES = (
        (3, 1, 16, 1),
        (3, 2, 24, 2),
        (5, 2, 40, 2),
        (3, 2, 80, 3),
        (5, 1, 112, 3),
        (5, 2, 192, 4),
        (3, 1, 320, 1),
    )

    def __init__(self, classes: int = 1000) -> None:
        super().__init__()
        self._conv_stem = nn.Conv2d(3, 32, 3, 2, bias=False)
        self._bn0 = nn.BatchNorm2d(32, eps=1e-3)
        blocks: list[nn.Module] = []
        inputs = 32
        for kernel, stride, outputs, count in self.STAGES:
            for position in range(count):
                expansion = 6 if blocks else 1
                blocks.append(InvertedResidual(inputs, outputs, kernel, 1 if position else stride, expansion))
                inputs = outputs
        self._blocks = nn.Sequential(*blocks)
        self._conv_head = nn.Conv2d(inputs, 1280, 1, bias=False)
        self._bn1 = nn.BatchNorm2d(1280, eps=1e-3)
        self._fc = nn.Linear(1280, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``[B, classes]`` of images ``[B, 3, 224, 224]``."""
        x = F.relu6(self._bn0(self._conv_stem(F.pad(x, _same_padding(3, 2)))))
        x = F.relu6(self._bn1(self._conv_head(self._blocks(x))))
        return self._fc(x.mean((2, 3)))  # type: ignore[no-any-return]


class InvertedResidual(nn.Module):
    """Expand channels, convolve each by itself, project back without a ReLU; a shortcut where shapes agree."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        width = inputs * expansion
        if expansion > 1:
            self._expand_conv = nn.Conv2d(inputs, width, 1, bias=False)
            self._bn0 = nn.BatchNorm2d(width, eps=1e-3)
        self._depthwise_conv = nn.Conv2d(width, width, kernel, stride, groups=width, bias=False)
        self._bn1 = nn.BatchNorm2d(width, eps=1e-3)
        self._project_conv = nn.Conv2d(width, outputs, 1, bias=False)
        self._bn2 = nn.BatchNorm2d(outputs, eps=1e-3)
        self.expands, self.padding = expansion > 1, _same_padding(kernel, stride)
        self.has_shortcut = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        """Expand, convolve, project."""
        y = F.relu6(self._bn0(self._expand_conv(x))) if self.expands else x
        y = F.relu6(self._bn1(self._depthwise_conv(F.pad(y, self.padding))))
        projected: Tensor = self._bn2(self._project_conv(y))
        return x + projected if self.has_shortcut else projected


def _same_padding(kernel: int, stride: int) -> tuple[int, int, int, int]:
    """TensorFlow's padding of even sizes: what is odd goes to the right and below."""
    before, total = (kernel - stride) // 2, kernel - stride
    return (before, total - before, before, total - before)


NETWORKS: dict[str, Callable[..., nn.Module]] = {
    "quartz_mnist": quartz_mnist,
    "vgg_cifar10": vgg_cifar10,
    "vgg11_bn_cifar10": vgg11_bn_cifar10,
    "resnet20": ResNet20,
    "mobilenet_v1": MobileNetV1,
    "efficientnet_lite0": EfficientNetLite0,
}
"""Name on the command line -> what makes the network; all take the number of ``classes``."""
