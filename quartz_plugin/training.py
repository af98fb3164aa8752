"""Networks that learn with the rounding of their spikes: for few steps, where conversion alone loses accuracy."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from quartz_plugin.activation import TTFSActivation
from quartz_plugin.convert import FirstLayer, Override, convert, scale
from quartz_plugin.convert.calibrate import Calibration, Granularity
from quartz_plugin.convert.check import check
from quartz_plugin.convert.fold import Preprocessing, fold
from quartz_plugin.convert.operators import ConversionError
from quartz_plugin.convert.rounding import rounded
from quartz_plugin.convert.trace import trace
from quartz_plugin.convert.tune import CalibrationMethod
from quartz_plugin.functional import Rectifier
from quartz_plugin.graph import INPUT
from quartz_plugin.network import SpikingNetwork
from quartz_plugin.structure import WEIGHTED


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
    """

    def __init__(self, network: fx.GraphModule, input_shape: tuple[int, ...]) -> None:
        super().__init__()
        self.network = network
        self.input_shape = input_shape

    def forward(self, images: Tensor) -> Tensor:
        """Logits ``[B, classes]``."""
        logits: Tensor = self.network(images)
        return logits

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
        )


def prepare(
    ann: nn.Module,
    calibration: Calibration,
    t_max: int | Mapping[str, int] = 16,
    *,
    percentile: float = 99.9,
    output_percentile: float = 100.0,
    granularity: Granularity = "layer",
    calibration_method: str = "least_squares+output",
    first_layer: FirstLayer = "spiking",
    preprocessing: Preprocessing | None = None,
    example_input: Tensor | None = None,
    layers: Mapping[str, Override] | None = None,
    progress: Callable[[int], None] | None = None,
) -> TrainableNetwork:
    r"""Make a network that trains with the rounding of its spikes, from an ANN, trained or not.

    Every ReLU becomes a :class:`TTFSActivation`, :math:`s/S\, clip(\lfloor S y / s + 1/2 \rfloor, 0, S)`, with a
    straight-through gradient and a scale that learns (arXiv:1902.08153). Calibration gives the scales to start from.

    Parameters
    ----------
    ann : nn.Module
        As in :func:`~quartz_plugin.convert`; not modified.
    calibration, t_max, percentile, output_percentile, granularity, first_layer, preprocessing, example_input, layers
        As in :func:`~quartz_plugin.convert`.
    progress : callable, optional
        As in :func:`~quartz_plugin.convert`.
    calibration_method : str
        "percentile", "least_squares" or "search", with "output" if wanted: the rest is what training does.

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
    method = CalibrationMethod.parse(calibration_method)
    if method.refinements - {"output"}:
        raise ValueError(
            f"calibration_method={calibration_method!r} changes weights, which is what training does; give "
            '"percentile", "least_squares" or "search", with "+output" if wanted'
        )
    found = scale(
        ann,
        calibration,
        t_max,
        percentile=percentile,
        output_percentile=output_percentile,
        granularity=granularity,
        calibration_method=calibration_method,
        first_layer=first_layer,
        preprocessing=preprocessing,
        example_input=example_input,
        layers=layers,
        progress=progress,
    )
    shift = found.draft.output_shift
    return trainable(ann, found.example, found.scales, found.windows, preprocessing, first_layer, shift)


def trainable(
    ann: nn.Module,
    example: Tensor,
    scales: Mapping[str, Tensor],
    windows: Mapping[str, int],
    preprocessing: Preprocessing | None = None,
    first_layer: FirstLayer = "spiking",
    output_shift: float = 0.0,
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
    output_shift : float
        What the output's value 0 stands for.
    """
    draft = check(fold(trace(ann, example), preprocessing, trainable=True))
    draft.encodes_image, draft.output_shift = first_layer == "spiking", output_shift
    wanted = {str(node.target) for node in draft.layers()}
    if missing := wanted.symmetric_difference(scales):
        raise ConversionError(
            f"cannot train {sorted(missing)}: its neurons come about only when batch norms are folded"
        )
    module = rounded(draft, scales, windows)
    module.train()
    for parameter in module.parameters():
        parameter.requires_grad_(False)
    for each in module.modules():
        if isinstance(each, (TTFSActivation, nn.BatchNorm1d, nn.BatchNorm2d, *WEIGHTED)):
            each.requires_grad_(True)
    return TrainableNetwork(module, tuple(example.shape[1:]))


def structure_of(net: TrainableNetwork) -> dict[str, Any]:
    """What, beside the ANN and the tensors, makes a trainable network again: plain JSON values."""
    scales = {path: list(code.log_scale.shape) for path, code in net.codes().items()}
    return {"t_max": net.t_max, "input_shape": list(net.input_shape), "scales": scales}


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
    net = trainable(ann, example, {path: torch.ones(()) for path in paths}, windows, preprocessing, first_layer)
    for path, shape in structure["scales"].items():
        code = net.network.get_submodule(path)
        assert isinstance(code, TTFSActivation)
        zeros = torch.zeros(shape, dtype=parameter.dtype, device=parameter.device)
        code.log_scale = nn.Parameter(zeros) if isinstance(code.log_scale, nn.Parameter) else zeros
    return net


__all__ = ["TrainableNetwork", "prepare"]
