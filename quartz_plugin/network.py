"""The spiking network that users hold: one graph, and doors to its readers."""

from __future__ import annotations

import copy
from os import PathLike
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn

from quartz_plugin import engines
from quartz_plugin.coding import Window
from quartz_plugin.engines import SimulationResult
from quartz_plugin.graph import ConvertedGraph, export, files
from quartz_plugin.neuron import reset
from quartz_plugin.operators.modules import DenseFirstLayer
from quartz_plugin.report import Report


class SpikingNetwork(nn.Module):
    """A converted network; made by :func:`quartz_plugin.convert` or :func:`quartz_plugin.load`.

    Calling it with images ``[B, ...]`` in [0, 1] gives the output layer's values in the ANN's units,
    ``[B, classes]``.

    ``torch.compile`` runs it as it is, between what it compiles before and behind; ``torch.export.export`` takes the
    closed form of held neurons, as a module that can be compiled whole, and that takes its images on trust.

    What is kept about it (event plans, tables of synapses, counts of a result) is found anew when it has been edited,
    whatever way: :mod:`quartz_plugin.graph.fingerprint`.

    Attributes
    ----------
    graph : ConvertedGraph
        What engines, exporters, metrics and files read.
    graph_module : torch.fx.GraphModule
        The network itself, to be printed, edited or stepped by hand; the graph's own.
    dense_stem : DenseFirstLayer or None
        The first layer, where it computes on the image; the graph's own.

    Examples
    --------
    >>> import torch, quartz_plugin
    >>> _ = torch.manual_seed(0)
    >>> ann = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    >>> images = torch.rand(32, 4)
    >>> snn = quartz_plugin.convert(ann, images, t_max=64)
    >>> bool((snn(images) - ann(images)).abs().max() < 0.05)
    True
    """

    def __init__(self, graph: ConvertedGraph) -> None:
        super().__init__()
        self.graph = graph
        self.register_load_state_dict_pre_hook(_take_earlier_names)

    def __setattr__(self, name: str, value: Any) -> None:
        """Keep one network: what is printed and in the state dict is what runs, whichever of the three is replaced.

        Raises
        ------
        TypeError
            If a value is of another type than this network computes with.
        """
        expected = _EXPECTED.get(name)
        if expected is not None and not isinstance(value, expected):
            names = " or ".join("None" if kind is type(None) else kind.__name__ for kind in expected)
            raise TypeError(f"{name} of a SpikingNetwork must be of type {names}, got {type(value).__name__}")
        super().__setattr__(name, value)
        if name == "graph":
            super().__setattr__("graph_module", value.module)
            super().__setattr__("dense_stem", value.dense_stem)
        elif name == "graph_module":
            self.graph.module = value
        elif name == "dense_stem":
            self.graph.dense_stem = value

    if TYPE_CHECKING:
        graph: ConvertedGraph
        graph_module: fx.GraphModule
        dense_stem: DenseFirstLayer | None

        def __call__(self, images: Any, *others: Tensor) -> Any:
            """Logits ``[B, classes]``, or several outputs; see :meth:`forward`."""

    def forward(self, images: Any, *others: Tensor) -> Any:
        """What the ANN returns for images in [0, 1], by the fastest engine that is exact here.

        As a rule logits ``[B, classes]``; several outputs are nested as the ANN nests them (after a file, classes of
        the user's own are dicts), and what stands behind the last linear map is computed of the decoded values. Several
        inputs are given as to the ANN, or as one tuple.
        """
        return self.run((images, *others) if others else images, record=False).outputs

    def run(self, images: Any, engine: str = "auto", record: bool = True) -> SimulationResult:
        """Simulate one inference for each image.

        Parameters
        ----------
        images : Tensor
            ``[B, ...]``, raw values in [0, 1] (or `input_range`); of several inputs a tuple, or a dict by name.
        engine : "auto", "analytic", "event", "integer" or "stepped"
            They give the same spike steps. "analytic" needs ``hold=True``, "integer" weights of at most 8 bits
            (``weight_bits``) and windows of at most 255 steps as well, "event" a CPU and numba; neither of these two
            gives gradients.
        record : bool
            Keep the spikes of all layers, not of the output alone.

        Raises
        ------
        ValueError
            For images of a wrong shape or outside [0, 1], an unknown engine, or one that cannot be exact here.
        ImportError
            For "event" where numba is not installed.
        """
        if torch.compiler.is_dynamo_compiling():
            from quartz_plugin.engines.uncompiled import run

            return run(self.graph, images, engine, record)
        return engines.run(self.graph, images, engine, record)

    def values_to_encode(self, images: Any) -> Tensor:
        """Values for :func:`~quartz_plugin.encode` where the network is stepped by hand.

        The images ``[B, ...]`` themselves, or with ``first_layer="dense"`` the first layer's values, in [0, 1].

        Raises
        ------
        ValueError
            For images of a wrong shape or outside [0, 1].

        Examples
        --------
        >>> import torch, quartz_plugin
        >>> ann = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> snn = quartz_plugin.convert(ann, torch.rand(32, 4), first_layer="dense")
        >>> snn.values_to_encode(torch.rand(2, 4)).shape
        torch.Size([2, 8])
        """
        images = self.graph.check_images(images)
        return self.graph.values_to_encode(images)

    def decode(self, output_spikes: Tensor) -> Any:
        """Logits that the output spikes of a network stepped by hand encode.

        Parameters
        ----------
        output_spikes : Tensor
            What ``to_snntorch()`` or ``to_norse()`` gave at each of the `n_steps` steps, stacked:
            ``[n_steps, B, classes]``.

        Returns
        -------
        Tensor
            ``[B, classes]``, in the ANN's units, as calling this network gives them; several outputs nested.

        Raises
        ------
        ValueError
            If the time axis is not `n_steps` long.

        Examples
        --------
        >>> import torch, quartz_plugin
        >>> images = torch.rand(32, 4)
        >>> snn = quartz_plugin.convert(nn.Linear(4, 3), images, t_max=16)
        >>> net = snn.to_snntorch()
        >>> spikes = torch.stack([net(s) for s in quartz_plugin.encode(images, 16, snn.n_steps)])
        >>> torch.equal(snn.decode(spikes), snn(images))
        True
        """
        if output_spikes.dim() < 2 or len(output_spikes) != self.n_steps:
            raise ValueError(
                f"output_spikes must be [{self.n_steps}, B, ...], one entry for each step, "
                f"got {list(output_spikes.shape)}"
            )
        return self.graph.outputs.present(engines.decode_output(self.graph, output_spikes))

    @property
    def t_max(self) -> int:
        """``T`` of the input's window."""
        return self.graph.t_max

    @property
    def n_steps(self) -> int:
        """Global steps an inference takes, the signed half of the output included."""
        return self.graph.n_steps

    @property
    def windows(self) -> dict[str, Window]:
        """Layer name -> the window of its spikes, "input" first."""
        return self.graph.windows()

    @property
    def report(self) -> Report:
        """A row for every module, with what became of it; prints as a table."""
        return Report(self.graph.report)

    def save(self, path: str | PathLike[str]) -> None:
        """Write the network to one safetensors file (weights + JSON, no code); all or nothing.

        Raises
        ------
        OSError
            If the file cannot be written; an older file of that name is then left as it was.
        """
        files.write(self.graph, path)

    def to_snntorch(self) -> nn.Module:
        """Return plain modules for a loop: ``for s in encode(x, T, snn.n_steps): out = net(s)``.

        The copy is independent of this network. Call ``quartz_plugin.reset(net)`` between inferences, and
        :meth:`decode` with the stacked outputs for logits.
        """
        return export.to_snntorch(self.graph)

    def to_norse(self) -> nn.Module:
        """Return the network in Norse's idiom: ``out, state = net(s, state)`` for each step.

        :meth:`decode` makes logits of the stacked outputs.

        Raises
        ------
        ImportError
            Where Norse is not installed.
        """
        return export.to_norse(self.graph)

    def __deepcopy__(self, memo: dict[int, Any]) -> SpikingNetwork:
        clone = SpikingNetwork(copy.deepcopy(self.graph, memo))
        clone.train(self.training)
        reset(clone)
        return clone


_EXPECTED: dict[str, tuple[type, ...]] = {
    "graph": (ConvertedGraph,),
    "graph_module": (fx.GraphModule,),
    "dense_stem": (DenseFirstLayer, type(None)),
}
"""Types of the attributes that a network computes with."""


def _take_earlier_names(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Rename what a state dict of an earlier version calls ``front``."""
    for name in [name for name in state if name.startswith(f"{prefix}front.")]:
        state[f"{prefix}dense_stem.{name.removeprefix(f'{prefix}front.')}"] = state.pop(name)


def load(path: str | PathLike[str]) -> SpikingNetwork:
    """Read a network that :meth:`SpikingNetwork.save` wrote. No code is run from the file.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    ValueError
        If it is damaged, truncated, of another kind, or of a version this package does not know.
    """
    return SpikingNetwork(files.read(path))
