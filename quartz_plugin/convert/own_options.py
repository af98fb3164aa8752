"""Options of each layer, and the windows that come of them; what does not go with a network that was trained."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from quartz_plugin.coding import window_length
from quartz_plugin.config import ConversionConfig, LayerConfig
from quartz_plugin.convert.dense import dense_nodes
from quartz_plugin.convert.run import Run
from quartz_plugin.convert.traced import FoldedNetwork
from quartz_plugin.graph import INPUT
from quartz_plugin.options import NotGiven
from quartz_plugin.task import prepared_tasks

_OF_SCALES = {"percentile", "granularity"}
"""Options of one layer that choose its scale."""


def own_options(network: FoldedNetwork, config: ConversionConfig) -> dict[str, LayerConfig]:
    """Options of each layer (path -> its own): those of the blocks it is in, the innermost last.

    Raises
    ------
    ValueError
        For a name that no layer or block has, or an option that means nothing there.
    """
    layers = config.own_options
    names = {str(node.target): {str(node.target)} for node in network.layers()} | {INPUT: {INPUT}}
    if network.signed_output:
        names[str(network.last.target)].add("output")
    if INPUT in layers and config.first_layer == "dense":
        raise ValueError(
            "t_max, layers: with first_layer=\"dense\" no spikes encode 'input': name the first layer, "
            f"{str(dense_nodes(network)[-1].target)!r}, in its place"
        )
    own = dict.fromkeys(names, LayerConfig())
    for key in sorted(layers, key=len):
        options = layers[key]
        matching = [path for path, also in names.items() if any(f"{name}.".startswith(f"{key}.") for name in also)]
        if not matching:
            known = sorted(name for also in names.values() for name in also)
            raise ValueError(f"t_max, layers: no layer or block is called {key!r}; the layers are {known}")
        meaningless = set.intersection(*(_meaningless(network, path) for path in matching))
        if ignored := sorted(meaningless & set(options.to_dict())):
            raise ValueError(f"layers[{key!r}]: {ignored} mean nothing there: leave them out")
        for path in matching:
            own[path] = own[path].overridden_by(options)
    return own


def _meaningless(network: FoldedNetwork, path: str) -> set[str]:
    """Options that a layer does not have.

    The input's values are always from 0 to 1, a trained layer has the scale it was trained with, a pair's negative half
    that of the positive, and the output one for all its channels.
    """
    if path == INPUT or path in network.activation_quantizers() or path in network.pairs.values():
        return _OF_SCALES
    return {"granularity"} if path == str(network.last.target) else set()


def windows_of(network: FoldedNetwork, config: ConversionConfig, own: Mapping[str, LayerConfig]) -> dict[str, int]:
    """Path of each layer, and "input" where spikes encode it -> steps of its window.

    Raises
    ------
    ValueError
        If a layer has none, or the network was trained for others.
    """
    trained = {path: quantizer.t_max for path, quantizer in network.activation_quantizers().items()}
    encoded = [path for path in own if path != INPUT or config.first_layer == "spiking"]
    # Beside trained layers, the T of all layers is that of the others.
    only_trained = trained.keys() >= {*encoded}
    of_all = config.default_t_max if only_trained and not isinstance(config.t_max, NotGiven) else None
    if any((own[path].t_max or of_all or t_max) != t_max for path, t_max in trained.items()):
        raise ValueError(
            f"the network was trained for windows of its own, {trained}, and can have no others: leave t_max out"
        )
    windows = {}
    for path in encoded:
        t_max = trained.get(path, own[path].t_max or config.default_t_max)
        if t_max is None:
            raise ValueError(f't_max names no window for the layer {path!r}: name it, or give "default"')
        windows[path] = window_length(t_max)
    return windows


def refuse_processes(config: ConversionConfig, run: Run) -> None:
    """Refuse a method that looks at all images again and again where several processes share them out."""
    if run.distributed and config.method.needs_images:
        raise ValueError(
            f"calibration_method={config.calibration_method!r} runs in one process; with distributed=True give "
            '"percentile" or "least_squares"'
        )


def refuse_other_training(ann: nn.Module, network: FoldedNetwork, config: ConversionConfig) -> None:
    """Refuse options that a network's training did not have, and a dense first layer where there is none.

    Raises
    ------
    ValueError
        If the network was trained for something else.
    ConversionError
        If no first layer could compute on the image.
    """
    if config.first_layer == "dense":
        dense_nodes(network)
    if not network.activation_quantizers():
        return
    if not config.hold:
        raise ValueError("the network was trained for held neurons, which encode its activations: give hold=True")
    if prepared := prepared_tasks(ann) - {config.task}:
        raise ValueError(f"the network was prepared with task={prepared.pop()!r}: give the same, got {config.task!r}")
    if config.method.needs_images:
        raise ValueError(
            f"calibration_method={config.calibration_method!r} changes the activations that the network was trained "
            "with; leave it out"
        )
    if network.activation_quantizers().keys() >= {str(node.target) for node in network.layers()}:
        usual = ConversionConfig()
        names = ("percentile", "output_percentile", "granularity", "calibration_method")
        if given := [name for name in names if getattr(config, name) != getattr(usual, name)]:
            raise ValueError(f"the network was trained with scales of its own: leave {', '.join(given)} out")
    if network.input_quantizer is not None and config.first_layer == "dense":
        raise ValueError('the network was trained with spikes that encode the image: give first_layer="spiking"')
