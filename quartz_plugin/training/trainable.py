"""Trainable networks: an ANN that computes what its spiking network will, with gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn

from quartz_plugin.activation import TTFSActivation, check_range
from quartz_plugin.coding import check_unit_interval
from quartz_plugin.config import ConversionConfig, FirstLayer
from quartz_plugin.convert.calibrate import along_channels
from quartz_plugin.convert.fake_quant import (
    INPUT_QUANTIZER,
    OUTPUT_QUANTIZER,
    output_path,
    output_quantizer_of,
)
from quartz_plugin.convert.pipeline import convert
from quartz_plugin.convert.refine.learning import parameter_groups
from quartz_plugin.convert.refine.output_range import best_range, drives_of
from quartz_plugin.convert.sketches import RangeSketch
from quartz_plugin.functional import Rectifier
from quartz_plugin.graph import INPUT
from quartz_plugin.layer_config import Granularity
from quartz_plugin.network import SpikingNetwork
from quartz_plugin.operators.modules import in_eval_mode
from quartz_plugin.operators.table import WEIGHTED
from quartz_plugin.precision import exact_arithmetic
from quartz_plugin.task import CLASSIFICATION, Task, by_output, number_or_tensor
from quartz_plugin.training.labels import labels_for
from quartz_plugin.warn import warn


class TrainableNetwork(nn.Module):
    """A network that computes what its spiking network will, with gradients; :func:`prepare_qat` makes it.

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
        self.register_load_state_dict_pre_hook(_take_earlier_names)

    def forward(self, images: Tensor) -> Tensor:
        """Logits ``[B, classes]``. ValueError for images of another shape, or outside [0, 1]."""
        logits: Tensor = self.network(self.checked(images))
        return logits

    def checked(self, images: Tensor) -> Tensor:
        """Images that this network takes; ValueError for others."""
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
            INPUT if path == self.input_quantizer_path else "output" if each.signed else path: each.t_max
            for path, each in self.activation_quantizers().items()
        }

    def activation_quantizers(self) -> dict[str, TTFSActivation]:
        """Path -> activation, the input's and the output's included."""
        return {path: each for path, each in self.network.named_modules() if isinstance(each, TTFSActivation)}

    def codes(self) -> dict[str, TTFSActivation]:
        """Earlier name of :meth:`activation_quantizers`."""
        warn("TrainableNetwork.codes is now activation_quantizers", DeprecationWarning)
        return self.activation_quantizers()

    def parameter_groups(self, learning_rate: float = 1e-2) -> list[dict[str, Any]]:
        """Parameter groups for an optimizer like Adam, with a rate each.

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
        >>> net = quartz_plugin.prepare_qat(ann, torch.rand(64, 6), t_max=4)
        >>> optimizer = torch.optim.Adam(net.parameter_groups())
        """
        unequal = self._last_layer if self.task == "regression" else None
        return parameter_groups(self.network, learning_rate, unequal=unequal)

    @exact_arithmetic()
    def choose_output_range(self, images: Tensor, labels: Tensor) -> None:
        """Give the output the range of values with which the first spike is most often that of the label.

        Training changes the output's input; which range serves best then, gradients hardly show. To be called when
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
            drives = drives_of(self.network, self.output_quantizer, images)
        labels = labels_for(drives, labels, self.task)
        if self.task == "classification" and labels.is_floating_point():
            labels = labels.argmax(dim=1)
        if not bool(drives.isfinite().all()):
            raise ValueError("training diverged: outputs are not finite; train with a lower rate (fit: --relative_lr)")
        if self.task == "regression":
            of_labels = RangeSketch(by_output(labels).double().mean(dim=1).cpu())
            of_labels.update(by_output(labels))
            ranges = of_labels.range(100.0, self.output_quantizer.signed, "all")
            self.set_output_range(*(along_channels(each, drives.shape[1:]) for each in ranges))
            return
        found = best_range(self.output_quantizer, drives, labels)
        if found is not None:
            self.set_output_range(*found)

    @property
    def output_range(self) -> tuple[float | Tensor, float | Tensor]:
        """Scale and shift of the output, which encodes values from ``shift - scale`` to ``shift + scale``.

        Numbers, of a regression of several outputs tensors ``[outputs, 1, ...]``.
        """
        return number_or_tensor(self.output_quantizer.scale), number_or_tensor(self.output_quantizer.shift)

    def set_output_range(self, scale: float | Tensor, shift: float | Tensor = 0.0) -> None:
        """Let the output encode values from ``shift - scale`` to ``shift + scale``; a ReLU from 0, without a shift.

        Raises
        ------
        ValueError
            If a scale is not positive and finite, a ReLU is to be shifted, or there are not as many as outputs.
        """
        scale, shift = (torch.as_tensor(each, dtype=torch.float64) for each in (scale, shift))
        check_range(scale, shift, self.output_quantizer.signed)
        own = self.output_quantizer.log_scale.shape
        if any(each.numel() != 1 and each.shape != own for each in (scale, shift)):
            raise ValueError(
                f"scale and shift must be numbers, or tensors of the output's {list(own)}, got {list(scale.shape)} and "
                f"{list(shift.shape)}"
            )
        with torch.no_grad():
            self.output_quantizer.log_scale.copy_(scale.log())
            if self.output_quantizer.signed:
                self.output_quantizer.shift.copy_(shift)

    @property
    def output_quantizer(self) -> TTFSActivation:
        """The activation that the output comes from."""
        return output_quantizer_of(self.network)

    @property
    def _last_layer(self) -> nn.Module | None:
        """The layer of weights that alone feeds the output's activation; None where there is none."""
        (source,) = (node for node in self.network.graph.nodes if str(node.target) == output_path(self.network))
        (before,) = source.all_input_nodes
        layer = self.network.get_submodule(str(before.target)) if before.op == "call_module" else None
        return layer if isinstance(layer, WEIGHTED) else None

    @property
    def first_layer(self) -> FirstLayer:
        """Spikes encode the image ("spiking"), or the first layer computes on it ("dense")."""
        return "dense" if self.input_quantizer_path is None else "spiking"

    @property
    def input_quantizer_path(self) -> str | None:
        """Path of the activation that rounds the image; None where there is none."""
        (source,) = (node for node in self.network.graph.nodes if node.op == "placeholder")
        path = str(next(iter(source.users)).target)
        return path if isinstance(self.network.get_submodule(path), TTFSActivation) else None

    def to_spiking(
        self,
        *,
        rectifier: Rectifier = ConversionConfig.rectifier,
        weight_bits: int | None = ConversionConfig.weight_bits,
        weight_granularity: Granularity | None = ConversionConfig.weight_granularity,
    ) -> SpikingNetwork:
        """Return the spiking network that was trained; nothing is measured any more, and nothing lost.

        Parameters
        ----------
        rectifier : "spike" or "silent"
            As in :func:`~quartz_plugin.convert`.
        weight_bits : int, optional
            The same; rounds the weights.
        weight_granularity : "layer" or "channel", optional
            The same.

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
            weight_granularity=weight_granularity,
            first_layer=self.first_layer,
            task=self.task,
        )


def earlier_name(path: str) -> str:
    """The name that versions before 0.2 gave to the module of this path."""
    return path.replace(INPUT_QUANTIZER, "input_code").replace(OUTPUT_QUANTIZER, "output_code")


def _take_earlier_names(net: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Rename what a state dict of an earlier version names otherwise."""
    assert isinstance(net, TrainableNetwork)
    for path in net.activation_quantizers():
        earlier, now = f"{prefix}network.{earlier_name(path)}.", f"{prefix}network.{path}."
        for name in [name for name in state if earlier != now and name.startswith(earlier)]:
            state.setdefault(now + name.removeprefix(earlier), state.pop(name))
