"""What the recipes share: modules, data, networks, and the command line. Needs the extra ``recipes``."""

try:
    import jsonargparse  # noqa: F401
    import lightning  # noqa: F401
    import torchvision  # noqa: F401
except ImportError as error:
    raise ImportError(f"quartz_plugin.lightning needs {error.name}: pip install 'quartz_plugin[recipes]'") from error

from quartz_plugin.lightning.cli import QuartzCLI, QuartzTrainer
from quartz_plugin.lightning.comparison import Measured
from quartz_plugin.lightning.data import MNISTData
from quartz_plugin.lightning.modules import Classifier, SpikingClassifier
from quartz_plugin.lightning.networks import MobileNetV1, ResNet20, quartz_mnist, vgg11_bn_cifar10

__all__ = [
    "Classifier",
    "MNISTData",
    "Measured",
    "MobileNetV1",
    "QuartzCLI",
    "QuartzTrainer",
    "ResNet20",
    "SpikingClassifier",
    "quartz_mnist",
    "vgg11_bn_cifar10",
]
