"""Meaning of a network's output: classes to decide between, or values to estimate."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor, nn

Task = Literal["classification", "regression"]
"""Classes on dimension 1 with a decision at every position, or one value for each output."""

CLASSIFICATION: Task = "classification"
"""Task where none is given."""


def check_task(task: str) -> None:
    """Raise ValueError unless `task` is one.

    Examples
    --------
    >>> check_task("regression")
    """
    if task not in get_args(Task):
        tasks = ", ".join(map(repr, get_args(Task)))
        raise ValueError(
            f"task must be one of {tasks}, got {task!r} (segmentation and single logits are classification)"
        )


def single_logit(outputs: Tensor) -> bool:
    """True where one logit decides by its sign: outputs ``[B]`` or ``[B, 1, ...]``."""
    return outputs.dim() == 1 or outputs.shape[1] == 1


def decide(outputs: Tensor) -> Tensor:
    """Classes (int64) that outputs decide for.

    Parameters
    ----------
    outputs : Tensor
        Logits ``[B, classes, ...]``, a decision at every position; ``[B]`` or ``[B, 1, ...]`` decides by its sign:
        class 1 where the logit is positive. Of equal logits the smallest class index wins.

    Returns
    -------
    Tensor
        ``[B, ...]``: the outputs' shape without dimension 1.

    Examples
    --------
    >>> decide(torch.tensor([[0.1, 0.7], [0.5, 0.5]])), decide(torch.tensor([[-0.2], [0.3]]))
    (tensor([1, 0]), tensor([0, 1]))
    >>> decide(torch.zeros(2, 21, 8, 8)).shape
    torch.Size([2, 8, 8])
    """
    if not single_logit(outputs):
        return outputs.argmax(dim=1)
    positive = (outputs > 0).long()
    return positive if outputs.dim() == 1 else positive.squeeze(1)


def class_scores(outputs: Tensor) -> Tensor:
    """Logits as ``[decisions, classes]``, image by image, position by position.

    A single logit ``z`` stands beside 0: ``[0, z]`` has its sigmoid as softmax, and its sign as argmax.

    Examples
    --------
    >>> class_scores(torch.tensor([[-0.2], [0.3]])).tolist() == [[0.0, torch.tensor(-0.2)], [0.0, torch.tensor(0.3)]]
    True
    >>> class_scores(torch.zeros(2, 21, 8, 8)).shape
    torch.Size([128, 21])
    """
    if single_logit(outputs):
        logits = outputs.reshape(-1, 1)
        return torch.cat([torch.zeros_like(logits), logits], dim=1)
    return outputs if outputs.dim() == 2 else outputs.movedim(1, -1).flatten(0, -2)


def undecided(outputs: Tensor) -> Tensor:
    """Decisions (bool, of :func:`decide`'s shape) that the class index makes: several logits are the largest.

    Examples
    --------
    >>> undecided(torch.tensor([[0.5, 0.5, 0.1], [0.5, 0.2, 0.1]]))
    tensor([ True, False])
    """
    if single_logit(outputs):
        return (outputs == 0).reshape(decide(outputs).shape)
    return (outputs == outputs.amax(dim=1, keepdim=True)).sum(dim=1) > 1


def by_output(values: Tensor) -> Tensor:
    """Outputs of a regression, ``[B]`` or ``[B, outputs, ...]``, as ``[outputs, values]``.

    Examples
    --------
    >>> by_output(torch.zeros(5, 3)).shape, by_output(torch.zeros(5)).shape, by_output(torch.zeros(5, 3, 8, 8)).shape
    (torch.Size([3, 5]), torch.Size([1, 5]), torch.Size([3, 320]))
    """
    return values.unsqueeze(0) if values.dim() == 1 else values.transpose(0, 1).flatten(1)


def prepared_tasks(network: nn.Module) -> set[str]:
    """Tasks that this network, or networks in it, were prepared for (:func:`~quartz_plugin.prepare_qat`)."""
    tasks = {getattr(module, "task", None) for module in network.modules()}
    return {task for task in tasks if isinstance(task, str) and task in get_args(Task)}


def number_or_tensor(values: Tensor) -> float | Tensor:
    """One number where there is one, else a float64 tensor on the CPU.

    Examples
    --------
    >>> number_or_tensor(torch.ones(1)), number_or_tensor(torch.ones(2, 1)).shape
    (1.0, torch.Size([2, 1]))
    """
    values = values.detach()
    return float(values) if values.numel() == 1 else values.double().cpu()


__all__ = [
    "CLASSIFICATION",
    "Task",
    "by_output",
    "check_task",
    "class_scores",
    "decide",
    "number_or_tensor",
    "prepared_tasks",
    "single_logit",
    "undecided",
]
