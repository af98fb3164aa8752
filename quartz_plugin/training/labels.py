"""Labels as they compare with a network's outputs."""

from __future__ import annotations

from torch import Tensor

from quartz_plugin.task import Task, single_logit

IGNORED = -100
"""Class of a decision that has none, as torch's cross-entropy knows it."""


def labels_for(outputs: Tensor, labels: Tensor, task: Task) -> Tensor:
    """Labels as they compare with outputs: classes (whole numbers), shares of them, or values of the outputs' shape.

    Raises
    ------
    ValueError
        If their shapes do not go together.

    Examples
    --------
    >>> import torch
    >>> labels_for(torch.zeros(2, 1), torch.tensor([1.0, 0.0]), "classification")
    tensor([1, 0])
    """
    decisions = outputs.shape[:1] + outputs.shape[2:]
    single, alike = single_logit(outputs), labels.shape == outputs.shape
    if task == "regression" and (alike or (single and labels.shape == decisions)):
        if not bool(labels.isfinite().all()):
            raise ValueError("labels contain NaN or infinity")
        return labels.reshape(outputs.shape).to(outputs)
    if task == "classification" and single and labels.shape == (*decisions[:1], 2, *decisions[1:]):
        return labels
    if task == "classification" and single and (alike or labels.shape == decisions):
        # As binary cross-entropy takes them: 0 or 1, whole or not, of the logit's shape or without its class dimension.
        if bool((strange := (labels != 0) & (labels != 1)).any()):
            raise ValueError(f"labels of a single logit must be 0 or 1, got {labels[strange][0].item():g}")
        return labels.reshape(decisions).long()
    if task == "classification" and alike and labels.is_floating_point():
        return labels
    if task == "classification" and labels.shape == decisions and not labels.is_floating_point():
        labels = labels.long()
        strange = (labels != IGNORED) & ((labels < 0) | (labels >= outputs.shape[1]))
        if bool(strange.any()):
            raise ValueError(
                f"labels must be classes from 0 to {outputs.shape[1] - 1}, or {IGNORED} where there is none, got "
                f"{int(labels[strange][0])}"
            )
        return labels
    wanted = "a value for each output" if task == "regression" else "0 or 1" if single else "a class for each decision"
    raise ValueError(
        f"labels must be {wanted}: for outputs {list(outputs.shape)}, got {labels.dtype} {list(labels.shape)}"
    )
