"""Networks made by name, with published or stored weights."""

from __future__ import annotations

import difflib
import importlib
import inspect
import os
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torchvision
from torch import Tensor, nn

from quartz_plugin.lightning.networks import NETWORKS
from quartz_plugin.lightning.weights import fill, load_weights
from quartz_plugin.lightning.zoos import build_from_zoo, is_of_zoo


def build(
    arch: str, classes: int | None = None, weights: str | None = None, arguments: Mapping[str, Any] | None = None
) -> tuple[nn.Module, list[str]]:
    """Make a network by name, and give it published or stored weights.

    Where the weights are of another number of classes, the layers that differ in nothing but their outputs keep their
    fresh values.

    Parameters
    ----------
    arch : str
        A name in :data:`NETWORKS`, a classification model of torchvision, ``timm:NAME`` or ``hf:NAME`` (see
        :func:`~quartz_plugin.lightning.zoos.build_from_zoo`), or the import path of a class or function of your own
        (``package.module.Network``; the working directory is searched as well).
    classes : int, optional
        Outputs, handed on as ``classes`` or ``num_classes``; by default the network's own number.
    weights : str, optional
        A .safetensors or .pt file, or the name of published weights (``DEFAULT``).
    arguments : mapping, optional
        What the network's constructor takes besides.

    Returns
    -------
    network : nn.Module
    fresh : list of str
        Parameters that the weights could not fill, for their number of classes; empty without `weights`.

    Raises
    ------
    FileNotFoundError, ValueError
        If there is no such network or file, the arguments do not fit, or the weights are of another network.
    ImportError
        If timm or transformers is asked for and missing.

    Examples
    --------
    >>> network, fresh = build("resnet20", classes=7)
    >>> network.linear.out_features, fresh
    (7, [])
    """
    if is_of_zoo(arch):
        return build_from_zoo(arch, classes, weights, dict(arguments or {}))
    published = torchvision.models.list_models(module=torchvision.models)
    make = _maker(arch, published)
    options = dict(arguments or {})
    of_torchvision = weights is not None and arch in published and not Path(weights).suffix
    if of_torchvision and arch in ("googlenet", "inception_v3"):
        # Their published weights want another normalisation than torchvision's other models, and bring it along.
        options.setdefault("transform_input", True)
    if classes is not None:
        own = {"classes", "num_classes"} & set(inspect.signature(make).parameters)
        # torchvision's builders hand everything on.
        name = own.pop() if own else "num_classes" if arch in published else None
        if name is not None:
            options.setdefault(name, classes)
    network = _made(make, arch, options)
    if weights is None:
        return network, []
    if of_torchvision:
        return network, fill(network, _published_state(arch, weights), f"torchvision's {weights} weights")
    return network, load_weights(network, weights)


def _maker(arch: str, published: Sequence[str]) -> Any:
    """Return what makes a network of this name."""
    if arch in NETWORKS:
        return NETWORKS[arch]
    if arch in published:
        return torchvision.models.get_model_builder(arch)
    if "." not in arch:
        close = difflib.get_close_matches(arch, [*NETWORKS, *published], n=3)
        meant = f"; did you mean {' or '.join(close)}?" if close else "."
        raise ValueError(
            f"no network is called {arch!r}{meant} There are {', '.join(NETWORKS)}, torchvision's classification "
            "models, timm:NAME, hf:NAME, and the import path of your own class"
        )
    make = _imported(arch)
    if not callable(make):
        raise ValueError(f"{arch} is a {type(make).__name__}, not a class or function that makes a torch.nn.Module")
    return make


def _made(make: Callable[..., Any], arch: str, options: Mapping[str, Any]) -> nn.Module:
    """Make a network with these options."""
    with warnings.catch_warnings():
        # torchvision's own notice about how GoogLeNet and Inception initialise.
        warnings.filterwarnings("ignore", category=FutureWarning, module="torchvision")
        try:
            network = make(**options)
        except TypeError as error:
            raise ValueError(f"{arch} cannot be made with {options}: {error}") from error
    if not isinstance(network, nn.Module):
        raise ValueError(f"{arch} makes a {type(network).__name__}, not a torch.nn.Module")
    return network


def _imported(path: str) -> Any:
    """Import a name of a module, also of one in the working directory."""
    module, _, name = path.rpartition(".")
    if (here := os.getcwd()) not in sys.path:
        sys.path.append(here)
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"cannot import {path}: {error}") from error


def _published_state(arch: str, name: str) -> dict[str, Tensor]:
    """Download the state dict of published weights of torchvision's, or take it from its cache."""
    known = torchvision.models.get_model_weights(arch)
    try:
        chosen = known[name]
    except KeyError as error:
        raise ValueError(
            f"{arch} has the published weights {', '.join(known.__members__)}, or give a file; got {name!r}"
        ) from error
    try:
        return chosen.get_state_dict(progress=True, check_hash=True, weights_only=True)  # type: ignore[no-any-return]
    except (OSError, RuntimeError) as error:
        raise ValueError(f"could not download {chosen.url} ({error}); give --model.weights a file instead") from error
