"""Checkpoints of Lightning's: written whole, read without running code, and checked before a run goes on from them."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins import TorchCheckpointIO

from quartz_plugin.graph.files import write_atomically
from quartz_plugin.lightning.data import MOST_PIXELS
from quartz_plugin.lightning.modules import EvaluatedClassifier, FewStepsClassifier, ImageClassifier
from quartz_plugin.lightning.notes import SPIKES
from quartz_plugin.lightning.records import is_number, is_share
from quartz_plugin.lightning.weights import compare, read_file
from quartz_plugin.tables import printable
from quartz_plugin.training import restored


class AtomicCheckpoints(TorchCheckpointIO):
    """Checkpoints that are there whole or not at all, wherever the run is killed."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write beside the file, then put in its place."""
        data = io.BytesIO()
        torch.save(checkpoint, data)
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, data.getvalue())


def best_checkpoint(folder: Any, monitor: str, mode: str) -> ModelCheckpoint:
    """Return the callback that keeps best.ckpt by the least or greatest value of a logged figure."""
    return ModelCheckpoint(folder, "best", monitor=monitor, mode=mode, enable_version_counter=False)


def load_checkpoint(model: EvaluatedClassifier, path: str) -> tuple[EvaluatedClassifier, Mapping[str, Any]]:
    """Load a checkpoint of Lightning's, running no code from it.

    Parameters
    ----------
    model : EvaluatedClassifier
        The classifier it was saved from, or, where that was trained for few steps, its ANN's. Is modified.
    path : str
        The file.

    Returns
    -------
    model : EvaluatedClassifier
        The one given, or that for few steps.
    checkpoint : mapping
        All that the file holds.

    Raises
    ------
    FileNotFoundError, ValueError
        If it is not there, not readable, or of another network.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"no checkpoint {path}: fit writes best.ckpt and last.ckpt")
    checkpoint = read_file(path, "checkpoint of Lightning's")
    state = checkpoint.get("state_dict")
    if not isinstance(state, Mapping) or not all(isinstance(name, str) for name in state):
        raise ValueError(
            f"{path} is not a readable checkpoint of Lightning's (it holds no state_dict): give weights that fit did "
            "not write as --model.weights"
        )
    try:
        if checkpoint.get(SPIKES) is not None:
            model = _for_few_steps(model, checkpoint[SPIKES], state)
        if misfit := compare(
            *({n: v for n, v in of.items() if torch.is_tensor(v)} for of in (state, model.state_dict()))
        ):
            raise ValueError(str(misfit))
        model.load_state_dict(state)
    except Exception as error:
        raise ValueError(_misfit(model, path, error)) from error
    try:
        model.on_load_checkpoint(dict(checkpoint))
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    return model, checkpoint


def _misfit(model: EvaluatedClassifier, path: str, error: Exception) -> str:
    """Describe a checkpoint that does not fit a classifier."""
    arch = f" than --model.arch {model.arch}" if isinstance(model, ImageClassifier) else ""
    reason = printable(error)[:200]
    if not isinstance(error, ValueError | RuntimeError):
        reason = f"{type(error).__name__}: {reason}"
    return (
        f"{path} is a checkpoint of another network{arch}, or of other classes than the data's {model.classes}: "
        "give the --model and --data options it was fitted with, or, if another program wrote it, give it as "
        f"--model.weights ({reason})"
    )


_TRAINED: dict[str, Callable[[Any], bool]] = {
    "distillation": is_share,
    "relative_lr": lambda value: is_number(value) and value >= 0,
    "mixup": is_share,
}
"""Options of few-step training in a checkpoint -> check of the value."""


def _for_few_steps(model: EvaluatedClassifier, held: Any, state: Mapping[str, Any]) -> FewStepsClassifier:
    """Build the classifier for few steps that a checkpoint describes; raises whatever is wrong."""
    # Versions before mixing wrote nothing of it.
    options = {name: held.get(name, 0.0) if name == "mixup" else held[name] for name in _TRAINED}
    for name, right in _TRAINED.items():
        if not right(options[name]):
            raise ValueError(f"its {name} is {printable(repr(options[name]))[:40]}")
    # What it holds itself is the most that it may ask for; of images, as many values as they may have pixels.
    largest = max((value.numel() for value in state.values() if torch.is_tensor(value)), default=0)
    for sizes, most in [(held["input_shape"], MOST_PIXELS), *((sizes, largest) for sizes in held["scales"].values())]:
        if not all(type(size) is int and size > 0 for size in sizes) or math.prod(sizes) > most:
            raise ValueError(f"it has values of {printable(repr(sizes))[:40]}")
    if not isinstance(model, FewStepsClassifier):
        model = FewStepsClassifier(model, restored(model.network, held, model.preprocessing))
    for name, value in options.items():
        setattr(model, name, float(value))
    return model


def check_resumable(checkpoint: Mapping[str, Any], path: str) -> None:
    """Raise ValueError where a run cannot go on from a checkpoint, as far as that shows before it does."""
    if absent := next(_absent_from_run(checkpoint), None):
        raise ValueError(
            f"{path} holds no run that could go on ({absent}): give it as --model.weights, to start from its weights"
        )


def _absent_from_run(checkpoint: Mapping[str, Any]) -> Iterator[str]:
    """Name what is missing or wrong in the state of a run."""
    wanted = {
        "epoch": int, "global_step": int, "loops": dict, "optimizer_states": list, "lr_schedulers": list,
        "callbacks": dict,
    }  # fmt: skip
    if absent := [name for name, kind in wanted.items() if type(checkpoint.get(name)) is not kind]:
        yield ", ".join(absent)
        return
    # Lightning begins anew where these two are not there.
    if not {"epoch_progress", "epoch_loop.batch_progress"} <= set(checkpoint["loops"].get("fit_loop", ())):
        yield "its counters"
    if not all(map(_is_counter, _leaves([checkpoint["epoch"], checkpoint["global_step"], checkpoint["loops"]], dict))):
        yield "its counters"
    rates = _leaves([checkpoint["optimizer_states"], checkpoint["lr_schedulers"]], dict | list)
    if not all(math.isfinite(rate) for rate in rates if isinstance(rate, float)):
        yield "its learning rates"
    # The state of the keeper of the best checkpoint is used only when it keeps the next.
    for name, state in checkpoint["callbacks"].items():
        if str(name).startswith(ModelCheckpoint.__name__) and not _is_keeper(state):
            yield "its best checkpoint"


def _leaves(values: list[Any], nested: Any) -> Iterator[Any]:
    """Go through values, and into dictionaries (and lists) among them."""
    waiting = list(values)
    while waiting:
        value = waiting.pop()
        if isinstance(value, nested):
            waiting += value.values() if isinstance(value, dict) else value
        else:
            yield value


def _is_counter(value: Any) -> bool:
    return type(value) is bool or (type(value) is int and 0 <= value < 1 << 53)


def _is_keeper(state: Any) -> bool:
    """Return whether it is what a ModelCheckpoint keeps: paths, and losses or accuracies."""
    if not isinstance(state, dict) or not isinstance(state.get("best_k_models"), dict):
        return False
    scores = [state.get(name) for name in ("best_model_score", "current_score", "kth_value")]
    scores += state["best_k_models"].values()
    paths = [state.get(name) for name in ("best_model_path", "kth_best_model_path", "last_model_path", "dirpath")]
    paths += state["best_k_models"]
    return all(score is None or (torch.is_tensor(score) and score.numel() == 1) for score in scores) and all(
        isinstance(path, str) for path in paths
    )


def check_same_run(model: EvaluatedClassifier, path: str, t_max: int | dict[str, int] | None) -> None:
    """Raise ValueError where a run that goes on is not the one that was cut off."""
    if not isinstance(model, FewStepsClassifier):
        if t_max is not None:
            raise ValueError(f"{path} is of an ANN: to train from it with t_max, give it as --model.weights")
        return
    trained = model.network.t_max
    asked = [] if t_max is None else list(t_max.values()) if isinstance(t_max, dict) else [t_max]
    if not set(asked) <= set(trained.values()):
        raise ValueError(f"{path} was trained with t_max {trained}: leave --t_max out to go on")
    if model.distillation and not model.teacher:
        raise ValueError(f"{path} was taught by an ANN: give its --model.weights again")


def refuse_few_steps(model: EvaluatedClassifier, why: str) -> None:
    """Raise ValueError where the network was trained for windows of its own."""
    if isinstance(model, FewStepsClassifier):
        raise ValueError(
            f"{why}, and this checkpoint was trained for spikes: its windows are its own; use convert or test"
        )
