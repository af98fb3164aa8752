"""Data modules: MNIST, CIFAR-10, and folders of images."""

from quartz_plugin.lightning.data.cifar10 import CIFAR10_CLASSES, CIFAR10Data
from quartz_plugin.lightning.data.folders import FolderData
from quartz_plugin.lightning.data.images import MOST_PIXELS, Images, UnreadableImageError, open_image
from quartz_plugin.lightning.data.mnist import MNISTData, load_digits, random_affine, stratified_split
from quartz_plugin.lightning.data.module import DIGITS, FULL_MNIST, ClassificationData
from quartz_plugin.lightning.data.sampling import Seeded, ShareSampler, global_seed, seed_of

__all__ = [
    "CIFAR10_CLASSES",
    "DIGITS",
    "FULL_MNIST",
    "MOST_PIXELS",
    "CIFAR10Data",
    "ClassificationData",
    "FolderData",
    "Images",
    "MNISTData",
    "Seeded",
    "ShareSampler",
    "UnreadableImageError",
    "global_seed",
    "load_digits",
    "open_image",
    "random_affine",
    "seed_of",
    "stratified_split",
]
