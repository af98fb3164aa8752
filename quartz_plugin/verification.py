"""verify: the spiking network against the ANN it came from, layer by layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from torch import Tensor, nn

from quartz_plugin.coding import NO_SPIKE
from quartz_plugin.convert.fold import fold
from quartz_plugin.convert.operators import Role, role_of
from quartz_plugin.convert.trace import trace
from quartz_plugin.graph import INPUT
from quartz_plugin.network import SpikingNetwork
from quartz_plugin.tables import format_table


@dataclass(frozen=True)
class LayerDeviation:
    """How far one layer is from the ANN's.

    Attributes
    ----------
    layer : str
        Name of the layer.
    mean, worst : float
        Deviation of the layer's values from the ANN's, in units of one time step.
    saturated : float
        Share of the ANN's values above the layer's scale, which no held neuron can say.
    early : float
        Share of the neurons that fired before their readout.
    silent : float
        Share of the neurons that did not fire.
    """

    layer: str
    mean: float
    worst: float
    saturated: float
    early: float
    silent: float


@dataclass(frozen=True)
class Verification:
    """Result of :func:`verify`; prints as a table."""

    layers: Sequence[LayerDeviation]
    agreement: float
    ties: float
    images: int

    def __str__(self) -> str:
        header = list(LayerDeviation.__dataclass_fields__)
        table = format_table(header, [list(asdict(layer).values()) for layer in self.layers])
        return (
            f"{table}\n"
            f"top-1 agreement with the ANN {100 * self.agreement:.2f} %, "
            f"ties {100 * self.ties:.2f} % ({self.images} images)"
        )


def verify(ann: nn.Module, snn: SpikingNetwork, images: Tensor, *, engine: str = "auto") -> Verification:
    """Compare a spiking network with the ANN it was converted from, layer by layer.

    Parameters
    ----------
    ann : nn.Module
        The network that was converted; not modified.
    snn : SpikingNetwork
        What became of it.
    images : Tensor
        ``[B, ...]``, raw values in [0, 1]; all are simulated at once.
    engine : str
        As in :meth:`SpikingNetwork.run`.

    Raises
    ------
    ValueError
        If the images do not fit the network, or `ann` is another network.

    Examples
    --------
    >>> import torch, quartz_plugin
    >>> _ = torch.manual_seed(0)
    >>> ann = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 2))
    >>> images = torch.rand(100, 6)
    >>> check = quartz_plugin.verify(ann, quartz_plugin.convert(ann, images, t_max=64, percentile=100), images)
    >>> check.layers[0].layer, check.layers[0].worst < 3
    ('1', True)
    """
    graph = snn.graph
    graph.check_images(images)
    images = images.to(device=graph.device, dtype=graph.dtype)
    result = snn.run(images, engine=engine)

    draft = trace(ann, images[:1])
    draft = fold(draft, graph.settings["preprocessing"])
    steps = draft.steps()
    ends = [node for node, module in steps if role_of(module) is Role.RECTIFIER or node is steps[-1][0]]
    names = [name for name in result.windows if name != INPUT]
    if len(ends) != len(names):
        raise ValueError(
            f"ann has {len(ends)} layers of neurons and the spiking network {len(names)}: not the same network"
        )
    layer_of = dict(zip(ends, names, strict=True))

    deviations, logits = [], images
    for node, value in draft.run(images):
        logits = value
        if node in layer_of:
            name = layer_of[node]
            window, steps_of_layer = result.windows[name], result.spike_steps[name]
            if value.shape != steps_of_layer.shape:
                raise ValueError(
                    f"layer {name!r} has the shape {list(value.shape)} in ann and {list(steps_of_layer.shape)} "
                    "in the spiking network: not the same network"
                )
            exact = value * (window.length / graph.scales[name].to(value))
            distance = (exact - result.levels(name)).abs()
            deviations.append(
                LayerDeviation(
                    layer=name,
                    mean=float(distance.mean()),
                    worst=float(distance.max()),
                    saturated=float((exact > window.length + 0.5).float().mean()),
                    early=float(result.early[name].float().mean()),
                    silent=float((steps_of_layer == NO_SPIKE).float().mean()),
                )
            )
    agree = (logits.flatten(1).argmax(1) == result.logits.flatten(1).argmax(1)).float().mean()
    return Verification(deviations, float(agree), float(result.ties.float().mean()), len(images))


__all__ = ["LayerDeviation", "Verification", "verify"]
