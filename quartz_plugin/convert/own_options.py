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
from quartz_plugin.task import prepared_tasks

_MEANINGLESS = {INPUT: {"percentile", "granularity"}, "output": {"granularity"}}
"""Options that the input's values (always from 0 to 1) and the output (one scale) do not have."""


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
    own = dict.fromkeys(names, LayerConfig())
    for key in sorted(layers, key=len):
        options = layers[key]
        matching = [path for path, also in names.items() if any(f"{name}.".startswith(f"{key}.") for name in also)]
        if not matching:
            known = sorted(name for also in names.values() for name in also)
            raise ValueError(f"t_max, layers: no layer or block is called {key!r}; the layers are {known}")
        for path in matching:
            if key in names[path] and (meaningless := _MEANINGLESS.get(key, set()) & set(options.to_dict())):
                raise ValueError(f"layers[{key!r}]: {sorted(meaningless)} mean nothing there")
            own[path] = own[path].overridden_by(options)
    return own


def windows_of(network: FoldedNetwork, config: ConversionConfig, own: Mapping[str, LayerConfig]) -> dict[str, int]:
    """Path of each layer, and "input" where spikes encode it -> steps of its window.

    Raises
    ------
    ValueError
        If a layer has none, or the network was trained for others.
    """
    trained = network.activation_quantizers()
    asked = set(config.t_max.values() if isinstance(config.t_max, Mapping) else [config.t_max])
    own_t_max = {path: quantizer.t_max for path, quantizer in trained.items()}
    encoded = [path for path in own if path != INPUT or config.first_layer == "spiking"]
    if trained.keys() >= {*encoded} and not asked <= {*own_t_max.values(), ConversionConfig.t_max}:
        raise ValueError(
            f"the network was trained for windows of its own, {own_t_max}, and can have no others: leave t_max out"
        )
    windows = {}
    for path in encoded:
        t_max = own_t_max.get(path, own[path].t_max or config.default_t_max)
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
    if network.input_quantizer is not None and config.first_layer == "dense":
        raise ValueError('the network was trained with spikes that encode the image: give first_layer="spiking"')
