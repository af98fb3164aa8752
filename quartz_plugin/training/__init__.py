"""Networks that learn with the rounding of their spikes: for few steps, where conversion alone loses accuracy."""

from quartz_plugin.training.distillation import DistillationLoss, Teacher
from quartz_plugin.training.labels import labels_for
from quartz_plugin.training.qat import prepare, prepare_qat, restored, structure_of
from quartz_plugin.training.trainable import TrainableNetwork

__all__ = [
    "DistillationLoss",
    "Teacher",
    "TrainableNetwork",
    "labels_for",
    "prepare",
    "prepare_qat",
    "restored",
    "structure_of",
]
