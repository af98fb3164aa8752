"""Networks from files, checked against the data that they are to see."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from quartz_plugin.graph import INPUT
from quartz_plugin.lightning.checkpoints import load_checkpoint
from quartz_plugin.lightning.data.preparation import ImagePreparation
from quartz_plugin.lightning.modules import EvaluatedClassifier, common_t_max, inner_windows
from quartz_plugin.lightning.notes import class_names_of
from quartz_plugin.network import SpikingNetwork, load


def load_trained(model: EvaluatedClassifier, ckpt_path: str | None, datamodule: Any) -> EvaluatedClassifier:
    """Load a checkpoint if there is one; refuse a network that nobody has trained, or of other classes."""
    if ckpt_path is not None:
        model, _ = load_checkpoint(model, ckpt_path)
    check_names(model.class_names, datamodule)
    if model.fitted_on is None:
        raise ValueError(model.untrained)
    return model


def load_both(
    model: EvaluatedClassifier, snn: str | None, ckpt_path: str | None, datamodule: Any
) -> tuple[EvaluatedClassifier, SpikingNetwork | None]:
    """Load the ANN, which may be missing only beside a spiking network, and the spiking network, if there is one."""
    network = None if snn is None else load(snn)
    if network is not None:
        try:
            class_names_of(network.graph.settings)
            ImagePreparation.from_settings(network.graph.settings)
        except ValueError as error:
            raise ValueError(f"{snn} is damaged: {error}") from error
    if network is None or ckpt_path is not None:
        model = load_trained(model, ckpt_path, datamodule)
    return model, network


def check_size(network: SpikingNetwork, image: torch.Tensor) -> None:
    """Raise ValueError where images are of another size than the network was converted for."""
    given, wanted = list(image.shape), list(network.graph.image_shape)
    if given != wanted:
        raise ValueError(
            f"the spiking network takes images of {wanted}, the data gives {given}: give the --data options that "
            f"it was converted with (--data.size {wanted[-1]})"
        )


def check_names(known: Sequence[str] | None, datamodule: Any) -> None:
    """Raise ValueError where a network was made for other classes than the data has."""
    given = list(getattr(datamodule, "class_names", ()))
    if known and given and list(known) != given:
        other = next(((a, b) for a, b in zip(known, given, strict=False) if a != b), (len(known), len(given)))
        raise ValueError(
            f"the network was made for other classes than the data has (first difference: {other[0]}, {other[1]}): "
            "give the --data.root that it was made for"
        )


def name_of(network: SpikingNetwork) -> str:
    """Name a network by its T: that of most layers, and what input and output have of their own."""
    *_, last = windows = {name: window.length + 1 for name, window in network.windows.items()}
    inner, common = inner_windows(network), common_t_max(network)
    own = [f"{name} {t}" for name, t in ((INPUT, windows[INPUT]), ("output", windows[last])) if t != common]
    own += ["others differ"] if len(set(inner)) > 1 else []
    return f"SNN, T = {common}" + (f" ({', '.join(own)})" if own else "")
