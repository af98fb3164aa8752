"""Shared parts of the recipes: modules, data, networks, and the command line. Needs the extra ``recipes``."""

try:
    import jsonargparse  # noqa: F401
    import lightning  # noqa: F401
    import torchvision  # noqa: F401
except ImportError as error:
    raise ImportError(f"quartz_plugin.lightning needs {error.name}: pip install 'quartz_plugin[recipes]'") from error

from quartz_plugin.lightning.cli import QuartzCLI
from quartz_plugin.lightning.comparison import Measured
from quartz_plugin.lightning.data import CIFAR10Data, ClassificationData, FolderData, MNISTData
from quartz_plugin.lightning.modules import (
    Classifier,
    FewStepsClassifier,
    ImageClassifier,
    SpikingClassifier,
    cost_metrics,
)
from quartz_plugin.lightning.networks import (
    EfficientNetLite0,
    MobileNetV1,
    ResNet20,
    quartz_mnist,
    vgg11_bn_cifar10,
    vgg_cifar10,
)
from quartz_plugin.lightning.trainer import QuartzTrainer

__all__ = [
    "CIFAR10Data",
    "ClassificationData",
    "Classifier",
    "EfficientNetLite0",
    "FewStepsClassifier",
    "FolderData",
    "ImageClassifier",
    "MNISTData",
    "Measured",
    "MobileNetV1",
    "QuartzCLI",
    "QuartzTrainer",
    "ResNet20",
    "SpikingClassifier",
    "cost_metrics",
    "quartz_mnist",
    "vgg11_bn_cifar10",
    "vgg_cifar10",
]
