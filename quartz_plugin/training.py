"""Networks that learn with the rounding of their spikes: for few steps, where conversion alone loses accuracy."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any, Unpack

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from quartz_plugin.activation import TTFSActivation, check_range
from quartz_plugin.coding import check_unit_interval, with_plain_numbers
from quartz_plugin.config import TRAINING, ConversionConfig, FirstLayer, Preprocessing, TrainingOptions, configured
from quartz_plugin.convert.calibrate import along_channels
from quartz_plugin.convert.check import check
from quartz_plugin.convert.fake_quant import insert_fake_quant, output_code, values_at
from quartz_plugin.convert.fold import fold
from quartz_plugin.convert.images import Calibration
from quartz_plugin.convert.pipeline import convert, scale
from quartz_plugin.convert.refine.distance import TEMPERATURE, output_distance, relative_feature_mse
from quartz_plugin.convert.refine.learning import parameter_groups
from quartz_plugin.convert.refine.output_range import best_range, drives_of
from quartz_plugin.convert.run import Run
from quartz_plugin.convert.sketches import RangeSketch
from quartz_plugin.convert.trace import trace
from quartz_plugin.functional import Rectifier
from quartz_plugin.graph import INPUT
from quartz_plugin.network import SpikingNetwork
from quartz_plugin.operators.modules import WEIGHTED, in_eval_mode
from quartz_plugin.operators.table import DROPOUTS, NORMS, ConversionError
from quartz_plugin.options import UNSET, with_options
from quartz_plugin.precision import exact_arithmetic
from quartz_plugin.task import CLASSIFICATION, Task, by_output, check_task, class_scores, number_or_tensor, single_logit


class TrainableNetwork(nn.Module):
    """A network that computes what the spiking network says, with gradients; :func:`prepare` makes it.

    Calling it with raw images ``[B, ...]`` in [0, 1] gives logits ``[B, classes]``. It is trained like any module; in
    eval mode it computes what :meth:`to_spiking`'s network does.

    Attributes
    ----------
    network : torch.fx.GraphModule
        The ANN with a :class:`TTFSActivation` in place of every ReLU, one at the input and one at the output; its batch
        norms and dropout are alive.
    input_shape : tuple of int
        One input, without the batch.
    task : "classification" or "regression"
        What the output means.
    """

    def __init__(self, network: fx.GraphModule, input_shape: tuple[int, ...], task: Task = CLASSIFICATION) -> None:
        super().__init__()
        self.network = network
        self.input_shape = input_shape
        self.task = task

    def forward(self, images: Tensor) -> Tensor:
        """Logits ``[B, classes]``. ValueError for images of another shape, or outside [0, 1]."""
        logits: Tensor = self.network(self._checked(images))
        return logits

    def _checked(self, images: Tensor) -> Tensor:
        # torch.fx traces it with something else.
        if not isinstance(images, Tensor):
            return images
        if tuple(images.shape[1:]) != self.input_shape:
            wanted = ", ".join(map(str, ("B", *self.input_shape)))
            raise ValueError(f"images must have the shape [{wanted}], got {list(images.shape)}")
        return check_unit_interval(images, "images")

    @property
    def t_max(self) -> dict[str, int]:
        """Name of each layer, "input" and "output" included -> its ``T``."""
        return {
            INPUT if path == self._input_code else "output" if code.signed else path: code.t_max
            for path, code in self.codes().items()
        }

    def codes(self) -> dict[str, TTFSActivation]:
        """Path -> activation, the input's and the output's included."""
        return {path: each for path, each in self.network.named_modules() if isinstance(each, TTFSActivation)}

    def parameter_groups(self, learning_rate: float = 1e-2) -> list[dict[str, Any]]:
        """What an optimizer like Adam should learn, and how fast.

        Adam moves every parameter as far as every other, so one rate for all would change layers of small weights most.

        Parameters
        ----------
        learning_rate : float
            As a share of the root mean square of each layer's weights, and of a scale.

        Returns
        -------
        list of dict
            Groups with a learning rate each, as optimizers take them.

        Examples
        --------
        >>> import torch, quartz_plugin
        >>> ann = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 2))
        >>> net = quartz_plugin.prepare(ann, torch.rand(64, 6), t_max=4)
        >>> optimizer = torch.optim.Adam(net.parameter_groups())
        """
        unequal = self._last_layer if self.task == "regression" else None
        return parameter_groups(self.network, learning_rate, unequal=unequal)

    @exact_arithmetic()
    def choose_output_range(self, images: Tensor, labels: Tensor) -> None:
        """Give the output the range of values with which the first spike is most often that of the label.

        Training changes the output's input; which range serves best then, gradients hardly tell. To be called when
        training is done, and between epochs. A single logit has the sign of its membrane then, whatever the labels.

        Parameters
        ----------
        images : Tensor
            Training images, ``[B, ...]``.
        labels : Tensor
            Their classes ``[B]``, or ``[B, ...]`` where every position is a decision (-100: none); of a regression the
            values wanted, whose range each output then has: to be called before an untrained network learns.

        Raises
        ------
        ValueError
            If there are no images, or not a label for each, or the output's input is not finite.
        """
        if len(images) == 0 or len(labels) != len(images):
            raise ValueError(f"give images and a label for each, got {list(images.shape)} and {list(labels.shape)}")
        with in_eval_mode(self):
            drives = drives_of(self.network, self._output, images)
        labels = labels_for(drives, labels, self.task)
        if self.task == "classification" and labels.is_floating_point():
            labels = labels.argmax(dim=1)
        if not bool(drives.isfinite().all()):
            raise ValueError("training diverged: outputs are not finite; train with a lower rate (fit: --relative_lr)")
        if self.task == "regression":
            of_labels = RangeSketch(by_output(labels).double().mean(dim=1).cpu())
            of_labels.update(by_output(labels))
            ranges = of_labels.range(100.0, self._output.signed, "all")
            self.set_output_range(*(along_channels(each, drives.shape[1:]) for each in ranges))
            return
        found = best_range(self._output, drives, labels)
        if found is not None:
            self.set_output_range(*found)

    @property
    def output_range(self) -> tuple[float | Tensor, float | Tensor]:
        """Scale and shift of the output, which encodes values from ``shift - scale`` to ``shift + scale``.

        Numbers, of a regression of several outputs tensors ``[outputs, 1, ...]``.
        """
        return number_or_tensor(self._output.scale), number_or_tensor(self._output.shift)

    def set_output_range(self, scale: float | Tensor, shift: float | Tensor = 0.0) -> None:
        """Let the output encode values from ``shift - scale`` to ``shift + scale``; a ReLU from 0, without a shift.

        Raises
        ------
        ValueError
            If a scale is not positive and finite, a ReLU is to be shifted, or there are not as many as outputs.
        """
        scale, shift = (torch.as_tensor(each, dtype=torch.float64) for each in (scale, shift))
        check_range(scale, shift, self._output.signed)
        own = self._output.log_scale.shape
        if any(each.numel() != 1 and each.shape != own for each in (scale, shift)):
            raise ValueError(
                f"scale and shift must be numbers, or tensors of the output's {list(own)}, got {list(scale.shape)} and "
                f"{list(shift.shape)}"
            )
        with torch.no_grad():
            self._output.log_scale.copy_(scale.log())
            if self._output.signed:
                self._output.shift.copy_(shift)

    @property
    def _output(self) -> TTFSActivation:
        code = self.network.get_submodule(output_code(self.network))
        assert isinstance(code, TTFSActivation)
        return code

    @property
    def _last_layer(self) -> nn.Module | None:
        """The layer of weights that alone feeds the output's activation; None where there is none."""
        (source,) = (node for node in self.network.graph.nodes if str(node.target) == output_code(self.network))
        (before,) = source.all_input_nodes
        layer = self.network.get_submodule(str(before.target)) if before.op == "call_module" else None
        return layer if isinstance(layer, WEIGHTED) else None

    @property
    def first_layer(self) -> FirstLayer:
        """Whether spikes say the image ("spiking"), or the first layer computes on it ("dense")."""
        return "dense" if self._input_code is None else "spiking"

    @property
    def _input_code(self) -> str | None:
        (source,) = (node for node in self.network.graph.nodes if node.op == "placeholder")
        path = str(next(iter(source.users)).target)
        return path if isinstance(self.network.get_submodule(path), TTFSActivation) else None

    def to_spiking(self, *, rectifier: Rectifier = "spike", weight_bits: int | None = None) -> SpikingNetwork:
        """Return the spiking network that was trained; nothing is measured any more, and nothing lost.

        Parameters
        ----------
        rectifier : "spike" or "silent"
            As in :func:`~quartz_plugin.convert`.
        weight_bits : int, optional
            The same; rounds the weights.

        Raises
        ------
        ConversionError
            If training has made a weight NaN or infinite.
        """
        parameter = next(self.network.parameters())
        example = torch.zeros(1, *self.input_shape, dtype=parameter.dtype, device=parameter.device)
        return convert(
            self.network,
            example,
            rectifier=rectifier,
            weight_bits=weight_bits,
            first_layer=self.first_layer,
            task=self.task,
        )


class Teacher(nn.Module):
    r"""The ANN that a trainable network came from, which tells it layer by layer what to say.

    To be made before the network learns: it is a copy, in eval mode, with the ReLUs where the activations are. Its loss
    is the relative entropy of the softmax at temperature :math:`\tau = 4` (arXiv:1503.02531) plus the squared errors of
    what all layers say (arXiv:1412.6550), which at first are the better guide:

    .. math:: \tau^2 KL(softmax(z_{ANN} / \tau) \,\|\, softmax(z / \tau))
        + \lambda (1 - done) \, mean_l \frac{\|x_l - x_l^{ANN}\|^2}{\|x_l^{ANN}\|^2}

    In a regression the squared error of each output by the square of its range takes the place of the relative entropy.

    Parameters
    ----------
    net : TrainableNetwork
        As :func:`prepare` made it.
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
    >>> net = quartz_plugin.prepare(ann, images, t_max=4)
    >>> teacher = quartz_plugin.Teacher(net)
    >>> optimizer = torch.optim.Adam(net.parameter_groups())
    >>> before = teacher.loss(net, images).item()
    >>> for step in range(50):
    ...     optimizer.zero_grad()
    ...     teacher.loss(net, images, done=step / 50).backward()
    ...     optimizer.step()
    >>> teacher.loss(net, images).item() < before
    True
    """

    size: Tensor

    def __init__(self, net: TrainableNetwork, activations: float = 1.0) -> None:
        super().__init__()
        if not isinstance(net, TrainableNetwork):
            raise TypeError(f"a Teacher is made of what prepare(ann, ...) gives, got {type(net).__name__}")
        self.network = copy.deepcopy(net.network)
        self.activations = activations
        self.task = net.task
        # In units of which a regression's errors are taken, whatever the range becomes in training.
        self.register_buffer("size", net._output.scale.detach().clone())
        codes, image = net.codes(), net._input_code
        self._paths = {path for path, code in codes.items() if not code.signed and path != image}
        for path, code in codes.items():
            rectifier = nn.ReLU() if code.ceiling is None else nn.Hardtanh(0.0, code.ceiling)
            self.network.set_submodule(path, rectifier if path in self._paths else nn.Identity())
        self.eval().requires_grad_(False)

    def forward(self, images: Tensor) -> Tensor:
        """Logits ``[B, classes]`` of the ANN."""
        logits: Tensor = self.network(images)
        return logits

    def loss(
        self,
        net: TrainableNetwork,
        images: Tensor,
        labels: Tensor | None = None,
        *,
        share: float = 1.0,
        done: float = 0.0,
    ) -> Tensor:
        """How far a network is from its teacher, and from the labels where there are any.

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
        share : float
            Share of the loss that the ANN's outputs have; the rest is the cross-entropy with `labels`, or a
            regression's squared error.
        done : float
            How much of the training is done, 0 to 1; the layers' part of the loss goes with it.

        Returns
        -------
        Tensor
            Scalar, to be minimised.

        Raises
        ------
        ValueError
            If `share` leaves a part to labels that are not given, there is not a label for each image, images are of
            another shape, or `net` is of another ANN.
        """
        if labels is None and share != 1.0:
            raise ValueError(f"share={share} leaves the rest to labels: give labels, or share=1.0")
        if labels is not None and len(labels) != len(images):
            raise ValueError(f"give a label for each image, got {len(images)} images and {len(labels)} labels")
        if not self._paths <= set(net.codes()):
            raise ValueError("the network that learns is of another ANN than its teacher")
        images = net._checked(images)
        with torch.no_grad():
            wanted, taught = values_at(self.network, images, self._paths)
        dropping = [module for module in net.modules() if isinstance(module, DROPOUTS) and module.training]
        for module in dropping:
            module.eval()
        given, logits = values_at(net.network, images, self._paths)
        for module in dropping:
            module.train()
        loss = share * output_distance(logits, taught, self.task, self.size, TEMPERATURE)
        if labels is not None and share < 1:
            loss = loss + (1 - share) * self._loss_of_labels(logits, labels)
        return loss + self.activations * (1 - done) * relative_feature_mse(given, wanted)

    def _loss_of_labels(self, outputs: Tensor, labels: Tensor) -> Tensor:
        labels = labels_for(outputs, labels, self.task)
        if self.task == "regression":
            return output_distance(outputs, labels, self.task, self.size)
        shares = labels.is_floating_point()
        return F.cross_entropy(class_scores(outputs), class_scores(labels) if shares else labels.flatten())


IGNORED = -100
"""Class of a decision that has none, as torch's cross-entropy knows it."""


def labels_for(outputs: Tensor, labels: Tensor, task: Task) -> Tensor:
    """Labels as they compare with outputs: classes (whole numbers), shares of them, or values of the outputs' shape.

    Raises
    ------
    ValueError
        If their shapes do not go together.

    Examples
    --------
    >>> labels_for(torch.zeros(2, 1), torch.tensor([1.0, 0.0]), "classification")
    tensor([1, 0])
    """
    decisions = outputs.shape[:1] + outputs.shape[2:]
    single, alike = single_logit(outputs), labels.shape == outputs.shape
    if task == "regression" and (alike or (single and labels.shape == decisions)):
        if not bool(labels.isfinite().all()):
            raise ValueError("labels contain NaN or infinity")
        return labels.reshape(outputs.shape).to(outputs)
    if task == "classification" and single and labels.shape == (*decisions[:1], 2, *decisions[1:]):
        return labels
    if task == "classification" and single and (alike or labels.shape == decisions):
        # As binary cross-entropy takes them: 0 or 1, whole or not, of the logit's shape or without its class dimension.
        if bool((strange := (labels != 0) & (labels != 1)).any()):
            raise ValueError(f"labels of a single logit must be 0 or 1, got {labels[strange][0].item():g}")
        return labels.reshape(decisions).long()
    if task == "classification" and alike and labels.is_floating_point():
        return labels
    if task == "classification" and labels.shape == decisions and not labels.is_floating_point():
        labels = labels.long()
        strange = (labels != IGNORED) & ((labels < 0) | (labels >= outputs.shape[1]))
        if bool(strange.any()):
            raise ValueError(
                f"labels must be classes from 0 to {outputs.shape[1] - 1}, or {IGNORED} where there is none, got "
                f"{int(labels[strange][0])}"
            )
        return labels
    wanted = "a value for each output" if task == "regression" else "0 or 1" if single else "a class for each decision"
    raise ValueError(
        f"labels must be {wanted}: for outputs {list(outputs.shape)}, got {labels.dtype} {list(labels.shape)}"
    )


@with_options(ConversionConfig, TrainingOptions, TRAINING)
@with_plain_numbers
@exact_arithmetic()
def prepare(
    ann: nn.Module,
    calibration: Calibration,
    t_max: int | Mapping[str, int] = UNSET,
    *,
    example_input: Tensor | None = None,
    progress: Callable[[int], None] | None = None,
    **options: Unpack[TrainingOptions],
) -> TrainableNetwork:
    r"""Make a network that trains with the rounding of its spikes, from an ANN, trained or not.

    Every ReLU becomes a :class:`TTFSActivation`, :math:`s/S\, clip(\lfloor S y / s + 1/2 \rfloor, 0, S)`, with a
    straight-through gradient and a scale that learns (arXiv:1902.08153). Calibration gives the scales to start from.

    Parameters
    ----------
    ann : nn.Module
        As in :func:`~quartz_plugin.convert`; not modified.
    calibration, example_input, progress
        As in :func:`~quartz_plugin.convert`.
    {options}

    Of calibration methods "percentile", "least_squares" and "search", with "output" if wanted: the rest is what
    training does.

    Returns
    -------
    TrainableNetwork
        In training mode, with gradients on; takes raw images.

    Raises
    ------
    ConversionError
        If the network cannot be converted.
    ValueError
        For bad calibration data, or options that do not go together.

    Examples
    --------
    >>> import torch, quartz_plugin
    >>> _ = torch.manual_seed(0)
    >>> ann = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 2))
    >>> images, labels = torch.rand(64, 6), torch.randint(2, (64,))
    >>> net = quartz_plugin.prepare(ann, images, t_max=4)
    >>> optimizer = torch.optim.Adam(net.parameters(), 1e-2)
    >>> for _ in range(20):
    ...     optimizer.zero_grad()
    ...     nn.functional.cross_entropy(net(images), labels).backward()
    ...     optimizer.step()
    >>> snn = net.eval().to_spiking()
    >>> torch.allclose(snn(images), net(images), atol=1e-5)
    True
    """
    config = configured(TRAINING | options, TrainingOptions, t_max)
    if config.method.refinements - {"output"}:
        raise ValueError(
            f"calibration_method={config.calibration_method!r} changes weights, which is what training does; give "
            '"percentile", "least_squares" or "search", with "+output" if wanted'
        )
    found = scale(ann, calibration, config, Run(example_input, progress))
    shift = found.draft.output_shift
    return trainable(
        ann, found.example, found.scales, found.windows, config.preprocessing, config.first_layer, shift, config.task
    )


@exact_arithmetic()
def trainable(
    ann: nn.Module,
    example: Tensor,
    scales: Mapping[str, Tensor],
    windows: Mapping[str, int],
    preprocessing: Preprocessing | None = None,
    first_layer: FirstLayer = "spiking",
    output_shift: float | Tensor = 0.0,
    task: Task = CLASSIFICATION,
) -> TrainableNetwork:
    """Put activations of these scales and windows into a copy of a network; see :func:`prepare`.

    Parameters
    ----------
    ann : nn.Module
        The network.
    example : Tensor
        One input, ``[1, ...]``.
    scales, windows : dict
        Path of each ReLU and of the output (for windows: and "input") -> scale, and steps of its window.
    preprocessing : (mean, std), optional
        What the network expects its input normalised by.
    first_layer : "spiking" or "dense"
        Whether spikes say the image.
    output_shift : float or Tensor
        What the output's value 0 stands for.
    task : "classification" or "regression"
        What the output means.
    """
    draft = check(fold(trace(ann, example), preprocessing, trainable=True))
    draft.encodes_image, draft.output_shift = first_layer == "spiking", output_shift
    wanted = {str(node.target) for node in draft.layers()}
    if missing := wanted.symmetric_difference(scales):
        raise ConversionError(
            f"cannot train {sorted(missing)}: its neurons come about only when batch norms are folded"
        )
    module = insert_fake_quant(draft, scales, windows)
    module.train()
    for parameter in module.parameters():
        parameter.requires_grad_(False)
    for each in module.modules():
        if isinstance(each, (TTFSActivation, *NORMS, *WEIGHTED)):
            each.requires_grad_(True)
    net = TrainableNetwork(module, tuple(example.shape[1:]), task)
    net._output.gradient_outside = task == "regression"
    return net


def structure_of(net: TrainableNetwork) -> dict[str, Any]:
    """What, beside the ANN and the tensors, makes a trainable network again: plain JSON values."""
    scales = {path: list(code.log_scale.shape) for path, code in net.codes().items()}
    return {"t_max": net.t_max, "input_shape": list(net.input_shape), "scales": scales, "task": net.task}


@exact_arithmetic()
def restored(ann: nn.Module, structure: Mapping[str, Any], preprocessing: Preprocessing | None) -> TrainableNetwork:
    """Make a trainable network of the structure that :func:`structure_of` told; its numbers are to be loaded.

    Raises
    ------
    ConversionError, ValueError
        If the ANN is another.
    """
    parameter = next(ann.parameters())
    example = torch.zeros(1, *structure["input_shape"], dtype=parameter.dtype, device=parameter.device)
    draft = check(fold(trace(ann, example), preprocessing))
    t_max = structure["t_max"]
    paths = [str(node.target) for node in draft.layers()]
    windows = {path: t_max[path if path in t_max else "output"] - 1 for path in paths}
    windows |= {INPUT: t_max[INPUT] - 1} if INPUT in t_max else {}
    first_layer: FirstLayer = "spiking" if INPUT in t_max else "dense"
    task: Task = structure.get("task", CLASSIFICATION)
    check_task(task)
    scales = {path: torch.ones(()) for path in paths}
    net = trainable(ann, example, scales, windows, preprocessing, first_layer, task=task)
    for path, shape in structure["scales"].items():
        code = net.network.get_submodule(path)
        assert isinstance(code, TTFSActivation)
        zeros = torch.zeros(shape, dtype=parameter.dtype, device=parameter.device)
        code.log_scale = nn.Parameter(zeros) if isinstance(code.log_scale, nn.Parameter) else zeros
        if task == "regression" and code.signed:
            code.shift = zeros.clone()
    return net


__all__ = ["Teacher", "TrainableNetwork", "prepare"]
