"""Lightning modules: networks while they are trained, and spiking networks while they are tested."""

from quartz_plugin.lightning.modules.base import EvaluatedClassifier
from quartz_plugin.lightning.modules.classifier import Classifier, ImageClassifier
from quartz_plugin.lightning.modules.evaluation import check_outputs, common_t_max, inner_windows, warn_if_seen
from quartz_plugin.lightning.modules.few_steps import FewStepsClassifier, mixed
from quartz_plugin.lightning.modules.rate import RateClassifier
from quartz_plugin.lightning.modules.spiking import SpikingClassifier, cost_metrics

__all__ = [
    "Classifier",
    "EvaluatedClassifier",
    "FewStepsClassifier",
    "ImageClassifier",
    "RateClassifier",
    "SpikingClassifier",
    "check_outputs",
    "common_t_max",
    "cost_metrics",
    "inner_windows",
    "mixed",
    "warn_if_seen",
]
