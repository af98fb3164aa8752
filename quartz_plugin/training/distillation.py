"""Distillation: the ANN that a trainable network came from, as its loss."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from quartz_plugin.convert.fake_quant import (
    values_at,
)
from quartz_plugin.convert.refine.distance import TEMPERATURE, output_distance, relative_feature_mse
from quartz_plugin.operators.table import DROPOUTS, NORMS, makes_anew
from quartz_plugin.task import class_scores
from quartz_plugin.training.labels import labels_for
from quartz_plugin.training.trainable import TrainableNetwork
from quartz_plugin.warn import warn


class DistillationLoss(nn.Module):
    r"""Distance of a trainable network from the ANN that it came from, layer by layer.

    To be made before the network learns: it copies the ANN, in eval mode, ReLUs in place of the activations. It is the
    relative entropy of the softmax at temperature :math:`\tau = 4` (arXiv:1503.02531) plus the squared errors of
    all layers' values (arXiv:1412.6550), which at first are the better guide:

    .. math:: \tau^2 KL(softmax(z_{ANN} / \tau) \,\|\, softmax(z / \tau))
        + \lambda (1 - progress) \, mean_l \frac{\|x_l - x_l^{ANN}\|^2}{\|x_l^{ANN}\|^2}

    In a regression the squared error of each output by the square of its range takes the place of the relative entropy.

    Parameters
    ----------
    net : TrainableNetwork
        As :func:`prepare_qat` made it.
    activations : float
        :math:`\lambda`.

    Raises
    ------
    TypeError
        If `net` is something else.

    Examples
    --------
    >>> import torch, quartz_plugin
    >>> _ = torch.manual_seed(0)
    >>> ann = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 2))
    >>> images = torch.rand(64, 6)
    >>> net = quartz_plugin.prepare_qat(ann, images, t_max=4)
    >>> loss = quartz_plugin.DistillationLoss(net)
    >>> optimizer = torch.optim.Adam(net.parameter_groups())
    >>> before = loss(net, images).item()
    >>> for step in range(50):
    ...     optimizer.zero_grad()
    ...     loss(net, images, progress=step / 50).backward()
    ...     optimizer.step()
    >>> loss(net, images).item() < before
    True
    """

    size: Tensor

    def __init__(self, net: TrainableNetwork, activations: float = 1.0) -> None:
        super().__init__()
        if not isinstance(net, TrainableNetwork):
            raise TypeError(f"a DistillationLoss is made of what prepare_qat(ann, ...) gives, got {type(net).__name__}")
        self.network = copy.deepcopy(net.network)
        self.activations = activations
        self.task = net.task
        # In units of which a regression's errors are taken, whatever the range becomes in training.
        self.register_buffer("size", net.output_quantizer.scale.detach().clone())
        quantizers, image = net.activation_quantizers(), net.input_quantizer_path
        self._paths = {path for path, each in quantizers.items() if not each.signed and path != image}
        for path, each in quantizers.items():
            alone = _takes_alone(self.network, path)
            rectifier = nn.ReLU(alone) if each.ceiling is None else nn.Hardtanh(0.0, each.ceiling, alone)
            self.network.set_submodule(path, rectifier if path in self._paths else nn.Identity())
        self.eval().requires_grad_(False)

    def ann_outputs(self, images: Tensor) -> Tensor:
        """Logits ``[B, classes]`` of the ANN."""
        logits: Tensor = self.network(images)
        return logits

    def forward(
        self,
        net: TrainableNetwork,
        images: Tensor,
        labels: Tensor | None = None,
        *,
        alpha: float = 1.0,
        progress: float = 0.0,
    ) -> Tensor:
        """Distance of a network from its teacher, and from the labels where there are any.

        Dropout is off in it: the teacher leaves nothing out, so what the network leaves out could not be learnt.

        Parameters
        ----------
        net : TrainableNetwork
            The network that learns.
        images : Tensor
            Raw images, ``[B, ...]``.
        labels : Tensor, optional
            Classes ``[B]`` (``[B, ...]`` where every position is a decision), or shares of them ``[B, classes, ...]``;
            of a regression the values wanted, ``[B, outputs, ...]``.
        alpha : float
            Share of the loss that the ANN's outputs have; the rest is the cross-entropy with `labels`, or a
            regression's squared error.
        progress : float
            Share of the training that is done, 0 to 1; the layers' part of the loss shrinks with it.

        Returns
        -------
        Tensor
            Scalar, to be minimised.

        Raises
        ------
        ValueError
            If `alpha` leaves a part to labels that are not given, there is not a label for each image, images are of
            another shape, or `net` is of another ANN.
        """
        if labels is None and alpha != 1.0:
            raise ValueError(f"alpha={alpha} leaves the rest to labels: give labels, or alpha=1.0")
        if labels is not None and len(labels) != len(images):
            raise ValueError(f"give a label for each image, got {len(images)} images and {len(labels)} labels")
        if not self._paths <= set(net.activation_quantizers()):
            raise ValueError("the network that learns is of another ANN than its teacher")
        images = net.checked(images)
        with torch.no_grad():
            wanted, taught = values_at(self.network, images, self._paths)
        dropping = [module for module in net.modules() if isinstance(module, DROPOUTS) and module.training]
        for module in dropping:
            module.eval()
        given, logits = values_at(net.network, images, self._paths)
        for module in dropping:
            module.train()
        loss = alpha * output_distance(logits, taught, self.task, self.size, TEMPERATURE)
        if labels is not None and alpha < 1:
            loss = loss + (1 - alpha) * self._loss_of_labels(logits, labels)
        return loss + self.activations * (1 - progress) * relative_feature_mse(given, wanted)

    def _loss_of_labels(self, outputs: Tensor, labels: Tensor) -> Tensor:
        labels = labels_for(outputs, labels, self.task)
        if self.task == "regression":
            return output_distance(outputs, labels, self.task, self.size)
        shares = labels.is_floating_point()
        return F.cross_entropy(class_scores(outputs), class_scores(labels) if shares else labels.flatten())


def _takes_alone(network: fx.GraphModule, path: str) -> bool:
    """Check that the module at a path alone reads what weights, a norm or a sum give it, and so may overwrite it."""
    (source,) = (each for node in network.graph.nodes if node.target == path for each in node.all_input_nodes)
    module = network.get_submodule(str(source.target)) if source.op == "call_module" else None
    anew = makes_anew(module, len(source.args)) or isinstance(module, tuple(NORMS))
    return anew and len(source.users) == 1


class Teacher(DistillationLoss):
    """Earlier name of :class:`DistillationLoss`, whose `alpha` and `progress` were `share` and `done`."""

    def __init__(self, net: TrainableNetwork, activations: float = 1.0) -> None:
        warn(
            "quartz_plugin.Teacher is now DistillationLoss, and share and done are alpha and progress",
            DeprecationWarning,
        )
        super().__init__(net, activations)

    def forward(self, images: Tensor) -> Tensor:  # type: ignore[override]
        """Logits ``[B, classes]`` of the ANN."""
        return self.ann_outputs(images)

    def loss(
        self,
        net: TrainableNetwork,
        images: Tensor,
        labels: Tensor | None = None,
        *,
        share: float = 1.0,
        done: float = 0.0,
    ) -> Tensor:
        """The loss itself; parameters are those of :meth:`DistillationLoss.forward`."""
        return DistillationLoss.forward(self, net, images, labels, alpha=share, progress=done)
