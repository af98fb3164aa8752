"""Networks of timm and of Hugging Face by name, with the images that they expect; needs the extra ``zoos``."""

from __future__ import annotations

import contextlib
import difflib
import importlib
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from quartz_plugin.lightning.console import one_line
from quartz_plugin.lightning.weights import fill, load_weights

PUBLISHED = "DEFAULT"
"""Weights of this name are those that were published with the network, or lie in its folder."""

TIMM, HUGGING_FACE = "timm:", "hf:"


def is_of_zoo(arch: str) -> bool:
    """Return whether a name is that of a network of timm or Hugging Face.

    Examples
    --------
    >>> is_of_zoo("timm:resnet18"), is_of_zoo("resnet18")
    (True, False)
    """
    return arch.startswith((TIMM, HUGGING_FACE))


@dataclass(frozen=True)
class ExpectedImages:
    """Images that a network expects, by its own configuration.

    Attributes
    ----------
    mean, std : tuple of float
        Values that raw images in [0, 1] are normalised by, one for each channel; empty for images as they are.
    size : int or None
        Height and width, where it names them.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    size: int | None = None


IMAGENET = ExpectedImages((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
"""What networks expect that name nothing else."""


def expected_images(network: nn.Module) -> ExpectedImages | None:
    """Return the images that a network of timm or Hugging Face expects; None for any other, and where it names none.

    Examples
    --------
    >>> expected_images(nn.Linear(2, 3)) is None
    True
    """
    if isinstance(network, HuggingFaceClassifier):
        return network.expected
    held = getattr(network, "pretrained_cfg", None)
    if not isinstance(held, Mapping) or not {"mean", "std", "input_size"} <= set(held):
        return None
    return ExpectedImages(tuple(held["mean"]), tuple(held["std"]), int(held["input_size"][-1]))


class HuggingFaceClassifier(nn.Module):
    """An image classifier of Hugging Face that returns its logits alone, as all other networks do.

    Parameters
    ----------
    network : nn.Module
        Returns a ``ModelOutput`` with ``logits``.
    expected : ExpectedImages, optional
        Images that it expects.
    """

    def __init__(self, network: nn.Module, expected: ExpectedImages | None = None) -> None:
        super().__init__()
        self.network = network
        self.expected = expected

    def forward(self, images: Tensor) -> Tensor:
        """Logits ``[B, classes]``."""
        logits: Tensor = self.network(images).logits
        return logits


def build_from_zoo(
    arch: str, classes: int | None, weights: str | None, arguments: Mapping[str, Any]
) -> tuple[nn.Module, list[str]]:
    """Make a network of timm or Hugging Face, and give it published or stored weights.

    Parameters
    ----------
    arch : str
        ``timm:NAME``; ``hf:FOLDER`` with a ``config.json``, ``hf:OWNER/NAME`` on the hub or in its cache, or
        ``hf:TYPE`` (``hf:resnet``), the architecture with its default configuration.
    classes : int, optional
        Outputs; by default the network's own number.
    weights : str, optional
        A .safetensors or .pt file, or ``DEFAULT``: those in the folder, on the hub or in its cache.
    arguments : mapping
        What ``timm.create_model`` or the configuration takes besides.

    Returns
    -------
    network : nn.Module
    fresh : list of str
        Parameters that the weights could not fill, for their number of classes.

    Raises
    ------
    ImportError
        If the package is missing.
    FileNotFoundError, ValueError
        If there is no such network or file, the hub cannot be reached, the arguments do not fit, or the weights are of
        another network.
    """
    make = _from_timm if arch.startswith(TIMM) else _from_hugging_face
    return make(arch, classes, weights, arguments)


def _package(name: str, arch: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(f"{arch} needs {error.name or name}: pip install 'quartz_plugin[zoos]'") from error


def _unknown(arch: str, name: str, known: Sequence[str], there: str) -> ValueError:
    close = difflib.get_close_matches(name, known, n=3)
    meant = f"; did you mean {' or '.join(close)}?" if close else "."
    return ValueError(f"{arch}: no network is called {name!r}{meant} There are {there}")


@contextlib.contextmanager
def _in_one_line(what: str, hint: str = "") -> Iterator[None]:
    """Turn whatever a package raises into one line of ours, with what to do."""
    try:
        yield
    except Exception as error:
        raise ValueError(f"{what} ({_first_sentence(error)}){hint}") from error


def _first_sentence(error: Exception) -> str:
    sentence, _, _ = one_line(error).partition(". ")
    return f"{type(error).__name__}: {sentence[:160].rstrip('.')}"


def _from_timm(
    arch: str, classes: int | None, weights: str | None, arguments: Mapping[str, Any]
) -> tuple[nn.Module, list[str]]:
    timm, name = _package("timm", arch), arch.removeprefix(TIMM)
    if not timm.is_model(name):
        known = timm.list_models()
        raise _unknown(arch, name, known, f"{len(known):,} in timm: timm.list_models()")
    options = {**({} if classes is None else {"num_classes": classes}), **arguments}
    with _in_one_line(f"{arch} cannot be made with {options}"):
        network: nn.Module = timm.create_model(name, pretrained=False, **options)
    if weights is None:
        return network, []
    if weights != PUBLISHED:
        return network, load_weights(network, weights)
    with _in_one_line(f"{arch} has no published weights within reach", "; give --model.weights a file instead"):
        published = timm.create_model(name, pretrained=True, **arguments)
    return network, fill(network, published.state_dict(), f"timm's weights of {name}")


def _from_hugging_face(
    arch: str, classes: int | None, weights: str | None, arguments: Mapping[str, Any]
) -> tuple[nn.Module, list[str]]:
    transformers, name = _package("transformers", arch), arch.removeprefix(HUGGING_FACE)
    config, source = _configuration(transformers, arch, name, arguments)
    if classes is not None and "num_labels" not in arguments:
        config.num_labels = classes
    config.return_dict = True
    auto = transformers.AutoModelForImageClassification
    fresh: list[str] = []
    with _quiet(transformers):
        if weights == PUBLISHED:
            if source is None:
                raise ValueError(
                    f"{arch} is an architecture and has no weights of its own: give --model.weights a file, or "
                    "--model.arch hf:OWNER/NAME of the hub or hf:FOLDER"
                )
            network, fresh = _published(auto, arch, source, config)
        else:
            with _in_one_line(f"{arch} cannot be made with {dict(arguments)}"):
                network = auto.from_config(config, trust_remote_code=False)
        expected = None if source is None else _images_of_processor(transformers, arch, source)
    # A file of weights may be of half precision.
    classifier = HuggingFaceClassifier(network.float(), expected)
    if weights is not None and weights != PUBLISHED:
        fresh = load_weights(network, weights)
    return classifier, fresh


def _configuration(transformers: Any, arch: str, name: str, arguments: Mapping[str, Any]) -> tuple[Any, str | None]:
    """Return a configuration, and the folder or the name on the hub that its weights lie under; None without one."""
    folder = Path(name).expanduser()
    known = list(transformers.models.auto.modeling_auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise FileNotFoundError(f"{arch}: no config.json in {folder}")
        source, unreadable, hint = str(folder), f"{arch}: cannot read {folder / 'config.json'}", ""
    elif name in known:
        has = {*transformers.AutoConfig.for_model(name).to_dict(), "num_labels"}
        _refuse(set(arguments) - has, arch, arguments)
        with _in_one_line(f"{arch} cannot be made with {dict(arguments)}"):
            return transformers.AutoConfig.for_model(name, **arguments), None
    elif name.count("/") != 1 or name.startswith((".", "/", "~")):
        if "/" in name:
            raise FileNotFoundError(f"{arch}: no folder {name}")
        raise _unknown(arch, name, known, f"folders, names on the hub (OWNER/NAME), and {', '.join(known)}")
    else:
        source, hint = name, "; give hf:FOLDER with a config.json"
        unreadable = f"{arch}: no such folder, and not on Hugging Face's hub within reach nor in its cache"
    with _in_one_line(unreadable, hint):
        config, unused = transformers.AutoConfig.from_pretrained(
            source, trust_remote_code=False, return_unused_kwargs=True, **arguments
        )
    # trust_remote_code comes back as well.
    _refuse(set(unused) & set(arguments), arch, arguments)
    if config.model_type not in known:
        raise ValueError(f"{arch} is of the type {config.model_type!r}, which classifies no images in transformers")
    return config, source


def _refuse(unknown: Set[str], arch: str, arguments: Mapping[str, Any]) -> None:
    """Raise ValueError for arguments that a configuration does not have: it would keep them without using them."""
    if unknown:
        names = ", ".join(sorted(unknown))
        raise ValueError(f"{arch} cannot be made with {dict(arguments)}: its configuration has no {names}")


def _published(auto: Any, arch: str, source: str, config: Any) -> tuple[nn.Module, list[str]]:
    """Load the weights in a folder or on the hub, from safetensors alone; names what stays fresh."""
    hint = "; give --model.weights a file instead (.safetensors, or .bin and .pt, from which no code is run)"
    with _in_one_line(f"{arch} has no model.safetensors within reach", hint):
        network, info = auto.from_pretrained(
            source,
            config=config,
            ignore_mismatched_sizes=True,
            use_safetensors=True,
            output_loading_info=True,
            trust_remote_code=False,
            dtype=torch.float32,
        )
    fresh = sorted({*info["missing_keys"], *(name for name, *_ in info["mismatched_keys"])})
    body = f"{network.base_model_prefix}."
    if misfit := [name for name in fresh if name.startswith(body)]:
        raise ValueError(
            f"{arch}: its model.safetensors holds the weights of another network: {len(misfit)} are missing or of "
            f"another shape ({', '.join(misfit[:3])})"
        )
    return network, fresh


@contextlib.contextmanager
def _quiet(transformers: Any) -> Iterator[None]:
    """Leave out the table of what fits and what does not; that is reported here."""
    logging = transformers.utils.logging
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def _images_of_processor(transformers: Any, arch: str, source: str) -> ExpectedImages | None:
    """Return what the image processor of a folder or name gives a network; None where it has none."""
    try:
        held = transformers.AutoImageProcessor.from_pretrained(source, trust_remote_code=False).to_dict()
    except OSError:
        return None
    except Exception as error:
        raise ValueError(f"{arch}: cannot read its preprocessor_config.json ({_first_sentence(error)})") from error
    if held.get("do_flip_channel_order"):
        raise ValueError(f"{arch} takes images as BGR, and the recipes give RGB: give a network that takes RGB")
    # The network sees (255 f x - shift - mean) / std of x in [0, 1], f being the factor.
    gain = round(255 * float(held.get("rescale_factor", 1 / 255)), 6) if held.get("do_rescale", True) else 255.0
    shift = 1.0 if held.get("rescale_offset") or held.get("offset") else 0.0
    means, stds = (held["image_mean"], held["image_std"]) if held.get("do_normalize") else ([0.0] * 3, [1.0] * 3)
    mean = tuple((shift + float(value)) / gain for value in means)
    std = tuple(float(value) / gain for value in stds)
    if set(mean) == {0.0} and set(std) == {1.0}:
        mean, std = (), ()
    return ExpectedImages(mean, std, _side(held))


def _side(held: Mapping[str, Any]) -> int | None:
    """Height and width that an image processor cuts out, or resizes to."""
    sizes = (held.get("crop_size") if held.get("do_center_crop") else None) or held.get("size") or {}
    side = sizes if isinstance(sizes, int) else sizes.get("height", sizes.get("shortest_edge"))
    return side if type(side) is int else None


__all__ = ["IMAGENET", "ExpectedImages", "HuggingFaceClassifier", "build_from_zoo", "expected_images", "is_of_zoo"]
