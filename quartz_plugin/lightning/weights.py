"""Files of weights and checkpoints as people have them, read without running code from them."""

from __future__ import annotations

import argparse
import os
import re
import warnings
import zipfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from quartz_plugin.graph.files import check_finite
from quartz_plugin.lightning.notes import SPIKES, UNKNOWN_DATA, fitted_on_of
from quartz_plugin.tables import printable

_WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
"""Names that DataParallel, torch.compile, AveragedModel and the like put in front of a module's own, wherever."""

_AVERAGED = re.compile(r"ema|swa|averag|shadow", re.IGNORECASE)
"""Places at which running means of weights lie beside the weights themselves."""

_LATER = "num_batches_tracked"
"""Buffer that batch norms of old files lack; torch fills it in."""

_COUNT = "n_averaged"
"""Buffer that an AveragedModel holds beside its module."""

_OLD_DENSENET = re.compile(r"(denselayer\d+\.(?:norm|conv))\.(\d)")
"""As torchvision's published DenseNets spell norm1 and conv2."""


def read_file(path: str | os.PathLike[str], kind: str, mmap: bool | None = None) -> Mapping[Any, Any]:
    """Read what torch.save or safetensors wrote: tensors, numbers, texts and collections of them; no code is run.

    Parameters
    ----------
    path : str or path
        A .safetensors file, or one of torch.save's.
    kind : str
        What it should be, for the error.
    mmap : bool, optional
        As of :func:`torch.load`.

    Raises
    ------
    ValueError
        If it is damaged, holds anything else, or is no dictionary.
    """
    try:
        if Path(path).suffix == ".safetensors":
            from safetensors.torch import load_file

            return dict(load_file(path))
        _refuse_bomb(path)
        # Training programs keep their options as such a namespace, which does nothing by itself.
        with torch.serialization.safe_globals([argparse.Namespace]):
            loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except Exception as error:
        raise ValueError(f"{printable(path)} is not a readable {kind} ({_reason(error)})") from error
    if not isinstance(loaded, Mapping):
        held = type(loaded).__name__
        raise ValueError(f"{printable(path)} is not a readable {kind} (it holds a {held}, not a state dict)")
    return loaded


def _refuse_bomb(path: str | os.PathLike[str]) -> None:
    """Raise ValueError for an archive whose files are larger than itself; torch.save compresses none."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            size = sum(entry.file_size for entry in archive.infolist())
        if size > Path(path).stat().st_size:
            raise ValueError(f"it would become {size:,} bytes, which torch.save does not write")


def _reason(error: Exception) -> str:
    """Return what torch or safetensors found wrong, in few words."""
    text = str(error)
    if held := re.search(r"GLOBAL (\S+)", text):
        name = printable(held[1])[:80]
        return f"it holds a {name}, and code from files is not run: save the network's state_dict() alone"
    found = re.search(r"WeightsUnpickler error: ([^\n]*)", text)
    return f"{type(error).__name__}: {printable(found[1] if found else text.partition(chr(10))[0])[:120]}"


def load_weights(network: nn.Module, path: str | os.PathLike[str]) -> list[str]:
    """Load a file of weights into a network, running no code from it.

    Parameters
    ----------
    network : nn.Module
        Is modified.
    path : str or path
        A state dict, .safetensors or of torch.save's, or a checkpoint with one in it, of Lightning's or as others have
        them: see :func:`fill`.

    Returns
    -------
    list of str
        Parameters left as they were, because the weights are of another number of classes.

    Raises
    ------
    FileNotFoundError, ValueError
        If the file is not there, not readable, or of another network.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"no weights file {path}")
    loaded = read_file(path, "file of weights")
    if loaded.get(SPIKES) is not None:
        raise ValueError(
            f"{path} is a checkpoint of a network that was trained for spikes, no ANN's: give it as --ckpt_path, and "
            "as --model.weights the ANN's weights that it was trained from"
        )
    return fill(network, loaded, str(path))


def read_dataset_name(weights: str) -> str:
    """Name the data that weights were fitted on, where they are a checkpoint, which notes it."""
    # Lightning writes zip files; of those the tensors need not be read for this.
    if not zipfile.is_zipfile(weights):
        return UNKNOWN_DATA
    return fitted_on_of(read_file(weights, "file of weights", mmap=True)) or UNKNOWN_DATA


def fill(network: nn.Module, loaded: Mapping[Any, Any], source: str) -> list[str]:
    """Load the weights of a network, wherever they are in a dictionary, under whatever prefix.

    They are looked for by their names: in dictionaries within it (``{"state_dict": ...}``, ``{"model": ...}``), behind
    prefixes (``net.``), without what wrappers add (``module.``, ``_orig_mod.``). Where there are running means of them
    as well (EMA), the weights themselves are taken, with a warning. Where the weights are of another number of classes,
    the layers that differ in nothing but their outputs keep their values.

    Parameters
    ----------
    network : nn.Module
        Is modified; stays as it was where this raises.
    loaded : mapping
        What :func:`read_file` gives.
    source : str
        What it is called in errors.

    Returns
    -------
    list of str
        Parameters left as they were, because the weights are of another number of classes.

    Raises
    ------
    ValueError
        If they are of another network, of several that fit, or not finite; names what does not fit.
    """
    own = network.state_dict()
    state = _weights_of(own, _tensors_in(loaded), source)
    misfit = compare(state, own)
    # Another number of outputs is a weight and its bias, in a head (or two: GoogLeNet has auxiliary ones).
    fresh = [
        name
        for name in state
        if name in misfit.shapes
        and state[name].dim()
        and own[name].dim()
        and state[name].shape[1:] == own[name].shape[1:]
    ]
    if misfit.of_shapes_alone and len(fresh) == len(misfit.shapes):
        of_heads = {(len(state[name]), len(own[name])) for name in fresh}
        if len(of_heads) == 1:
            state = {**state, **{name: own[name] for name in fresh}}
            return _loaded(network, state, source, fresh)
    if misfit and _translated(network, state):
        return []
    if misfit:
        raise ValueError(f"{source} holds the weights of another network: {misfit}")
    return _loaded(network, state, source, [])


def _loaded(network: nn.Module, state: dict[str, Tensor], source: str, fresh: list[str]) -> list[str]:
    """Load what fits; all but what stays as it is must be finite."""
    try:
        check_finite({name: state[name] for name, _ in network.named_parameters() if name not in fresh})
        network.load_state_dict(state)
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"{source}: {printable(error)[:200]}") from error
    return fresh


@dataclass(frozen=True)
class Misfit:
    """The part of a state dict that does not fit a network; false where all does."""

    missing: Sequence[str]
    unexpected: Sequence[str]
    shapes: Mapping[str, str]
    types: Mapping[str, str]

    def __bool__(self) -> bool:
        return bool(self.missing or self.unexpected or self.shapes or self.types)

    @property
    def of_shapes_alone(self) -> bool:
        """True where all names are there, with numbers of the right type, and some of another shape."""
        return bool(self.shapes) and not (self.missing or self.unexpected or self.types)

    def __str__(self) -> str:
        """Counts, and a few names of each."""
        parts = [
            f"{len(names)} {what} ({_few(names)})"
            for what, names in (
                ("missing", self.missing),
                ("unexpected", self.unexpected),
                ("of another shape", [f"{name} {how}" for name, how in self.shapes.items()]),
                ("of another type", [f"{name} {how}" for name, how in self.types.items()]),
            )
            if names
        ]
        return ", ".join(parts)


def compare(state: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> Misfit:
    """Compare the tensors of a state dict with those of a network.

    Examples
    --------
    >>> print(compare({"weight": torch.ones(2, 3), "b": torch.ones(2)}, nn.Linear(4, 2).state_dict()))
    1 missing (bias), 1 unexpected (b), 1 of another shape (weight [2, 3] for [2, 4])
    """
    both = [name for name in own if name in state]
    return Misfit(
        missing=[name for name in own if name not in state and not name.endswith(_LATER)],
        unexpected=[name for name in state if name not in own],
        shapes={
            name: f"{list(state[name].shape)} for {list(own[name].shape)}"
            for name in both
            if state[name].shape != own[name].shape
        },
        types={
            name: f"{state[name].dtype} for {own[name].dtype}"
            for name in both
            if state[name].is_floating_point() != own[name].is_floating_point()
            or state[name].is_complex() != own[name].is_complex()
        },
    )


def _few(names: Sequence[str], most: int = 3) -> str:
    """The first names, without control characters."""
    return ", ".join(printable(name)[:80] for name in names[:most]) + (", ..." if len(names) > most else "")


def _tensors_in(loaded: Mapping[Any, Any]) -> dict[str, Tensor]:
    """All tensors of a dictionary and those within it, by the names on the way to them, with dots between."""
    found: dict[str, Tensor] = {}
    waiting, seen = [("", loaded)], {id(loaded)}
    while waiting:
        prefix, mapping = waiting.pop()
        for key, value in mapping.items():
            if isinstance(value, Tensor):
                found[f"{prefix}{key}"] = value
            elif isinstance(value, Mapping) and id(value) not in seen:
                seen.add(id(value))
                waiting.append((f"{prefix}{key}.", value))
    return found


def _plain(name: str) -> str:
    """A parameter's name without what wrappers add."""
    return _OLD_DENSENET.sub(r"\1\2", ".".join(part for part in name.split(".") if part not in _WRAPPERS))


def _weights_of(own: Mapping[str, Tensor], found: Mapping[str, Tensor], source: str) -> dict[str, Tensor]:
    """Tensors by the names of a network, where they are found under other names; others keep theirs."""
    ours = {_plain(name): name for name in own}
    theirs: dict[str, Tensor] = {}
    for name, value in found.items():
        theirs[name if _plain(name) in theirs else _plain(name)] = value
    wanted = {name for name in ours if not name.endswith(_LATER)}
    counts: Counter[str] = Counter()
    for name in theirs:
        ends = [0, *(place + 1 for place, sign in enumerate(name) if sign == ".")]
        counts.update(name[:end] for end in ends if name[end:] in wanted)

    def under(prefix: str) -> dict[str, Tensor]:
        within = {name.removeprefix(prefix): value for name, value in theirs.items() if name.startswith(prefix)}
        return {ours.get(name, name): value for name, value in within.items() if name != _COUNT}

    whole = [prefix for prefix, count in counts.items() if count == len(wanted)]
    # The whole of a network may look like a part of it.
    whole = [prefix for prefix in whole if not any(prefix != o and prefix.startswith(o) for o in whole)]
    fitting = [prefix for prefix in whole if not compare(under(prefix), own).shapes] or whole
    plain = [prefix for prefix in fitting if not _AVERAGED.search(prefix)] or fitting
    if len(plain) > 1 and not all(_equal(under(plain[0]), under(prefix)) for prefix in plain[1:]):
        raise ValueError(
            f"{source} holds {len(plain)} networks that fit ({_few([prefix.rstrip('.') for prefix in plain])}): save "
            "the state_dict() of one of them"
        )
    if plain:
        if averaged := [prefix.rstrip(".") for prefix in fitting if prefix not in plain]:
            warnings.warn(
                f"{source} holds running means of the weights as well ({_few(averaged)}): the weights themselves are "
                "taken; save those alone to take them",
                stacklevel=4,
            )
        return under(plain[0])
    return under(max(counts, key=lambda prefix: (counts[prefix], -len(prefix)), default=""))


def _equal(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        one[name].shape == other[name].shape and torch.equal(one[name], other[name]) for name in one
    )


def _translated(network: nn.Module, state: Mapping[str, Tensor]) -> bool:
    """Load what a network's own hooks translate, as from weight_norm's older form; whether they do."""
    if not any(module._load_state_dict_pre_hooks for module in network.modules()):
        return False
    before = {name: value.clone() for name, value in network.state_dict().items()}
    try:
        network.load_state_dict(dict(state))
        check_finite(dict(network.named_parameters()))
    except (RuntimeError, TypeError, AttributeError, KeyError, ValueError):
        network.load_state_dict(before)
        return False
    return True
