"""ANNs that are trained to be converted."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from quartz_plugin.lightning.build import build
from quartz_plugin.lightning.comparison import Measured
from quartz_plugin.lightning.modules.base import EvaluatedClassifier
from quartz_plugin.lightning.weights import load_weights, read_dataset_name
from quartz_plugin.lightning.zoos import IMAGENET, expected_images


class Classifier(EvaluatedClassifier):
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
    published : mapping
        Name of a publication -> its figures, rows as a sweep's (``t_max``, ``accuracy``, ``operations``; without
        ``t_max``: its ANN), to stand beside ours in pictures.
    published_classes : int
        The number of classes those figures are of.
    measured_on_loihi : mapping
        T -> published measurement, to stand beside the estimates.
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
        super().__init__(network, classes, label_smoothing, preprocessing)
        self.lr, self.weight_decay = lr, weight_decay
        if weights is not None and (fresh := load_weights(network, weights)):
            raise ValueError(f"{weights} holds the weights of another number of classes ({', '.join(fresh)})")
        if weights is not None:
            self.fitted_on = read_dataset_name(weights)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Cross-entropy of one batch; auxiliary heads, as GoogLeNet's, weigh 0.3."""
        images, labels = batch
        outputs = self(images)
        logits, *auxiliary = outputs if isinstance(outputs, tuple) else (outputs,)
        loss = self._cross_entropy(logits, labels)
        for head in auxiliary:
            if head is not None:
                loss = loss + 0.3 * self._cross_entropy(head, labels)
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> Any:
        """AdamW, one cycle over all steps."""
        optimizer = torch.optim.AdamW(self.network.parameters(), lr=self.lr, weight_decay=self.weight_decay)
        steps = max(1, int(self.trainer.estimated_stepping_batches))
        cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, self.lr, total_steps=steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": cycle, "interval": "step"}}


class ImageClassifier(Classifier):
    """A network by name, trained with SGD and a cosine schedule after a warm-up.

    Parameters
    ----------
    arch : str
        resnet20, vgg_cifar10, vgg11_bn_cifar10 or mobilenet_v1 (quartz_plugin.lightning), any classification
        model of torchvision, timm:NAME, hf:OWNER/NAME, hf:FOLDER, hf:TYPE, or the import path of your own class.
    weights : str, optional
        A .safetensors or .pt file, a checkpoint, or the name of published weights (DEFAULT) to start from. Of another
        number of classes, they serve to fit from, with a fresh last layer.
    arch_arguments : dict[str, Any], optional
        What the network's constructor takes besides the number of classes.
    classes : int
        Number of classes; those of the data.
    mean : list[float], optional
        What the network expects its input normalised by, for each channel; [] for images as they are; by default what
        the configuration of timm's or Hugging Face's network names, else ImageNet's.
    std : list[float], optional
        The same.
    lr : float
        Highest learning rate.
    momentum : float
        SGD's, after Nesterov.
    weight_decay : float
        SGD's; not for biases and batch norms.
    warmup_epochs : float
        Epochs in which the learning rate rises to lr; then it falls to 0 along a cosine.
    label_smoothing : float
        Share of the target spread over all classes.
    cost_images : int, optional
        Costs are counted on so many of the test images, evenly spread; by default on all.

    Attributes
    ----------
    image_size : int or None
        Height and width of the images that the network's own configuration names.
    """

    def __init__(
        self,
        arch: str = "resnet18",
        weights: str | None = None,
        arch_arguments: dict[str, Any] | None = None,
        classes: int = 1000,
        mean: list[float] | None = None,
        std: list[float] | None = None,
        lr: float = 0.1,
        momentum: float = 0.9,
        weight_decay: float = 1e-4,
        warmup_epochs: float = 1.0,
        label_smoothing: float = 0.1,
        cost_images: int | None = None,
    ) -> None:
        if cost_images is not None and cost_images < 1:
            raise ValueError(f"cost_images must be at least 1, got {cost_images}")
        network, fresh = build(arch, classes or None, weights, arch_arguments)
        expected = expected_images(network) or IMAGENET
        mean = list(expected.mean) if mean is None else mean
        std = list(expected.std) if std is None else std
        if len(mean) != len(std):
            raise ValueError(f"mean and std must have a number for each channel, got {mean} and {std}")
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
        self.image_size = expected.size
        if weights is not None and not fresh:
            self.fitted_on = read_dataset_name(weights)
        elif fresh:
            self.untrained = (
                f"{weights} is of another number of classes than the data ({classes}), so {', '.join(fresh)} are "
                "untrained: fit first, and give --ckpt_path"
            )

    def configure_optimizers(self) -> Any:
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
