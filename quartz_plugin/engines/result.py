"""What a simulation tells."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from quartz_plugin.coding import NO_SPIKE, Window
from quartz_plugin.graph import INPUT
from quartz_plugin.task import CLASSIFICATION, Task, decide, single_logit, undecided


@dataclass(eq=False)
class SimulationResult:
    """Spikes and logits of one batch of inferences.

    Attributes
    ----------
    logits : Tensor
        ``[B, classes]`` (or as the ANN's output is shaped): the output layer's values in the ANN's units. Equal values
        are equal first spikes; ``argmax`` then takes the smallest class index.
    membrane : Tensor
        Like `logits`: the output's membranes at its readout, in the ANN's units: the logits before the output rounds
        and clips them, for a reader who can see membranes. They seldom tie.
    spike_steps : dict
        Layer name -> int32 ``[B, ...]``: step on the global clock, -1 where there was no spike.
        "input" included; with ``record=False`` the output layer alone.
    windows : dict
        Layer name -> the :class:`~quartz_plugin.coding.Window` in which its spikes say 1 to 0.
    n_steps : int
        Steps an inference takes.
    engine : str
        The engine that ran.
    signed_output : bool
        Whether silence of an output says -1 (0 where the network ends in a ReLU).
    task : "classification" or "regression"
        What the output means; see :func:`~quartz_plugin.convert`.
    last_positive_step : int or None
        Step at which an output of the smallest positive value fires.
    """

    logits: Tensor
    membrane: Tensor
    spike_steps: dict[str, Tensor]
    windows: dict[str, Window]
    n_steps: int
    engine: str
    signed_output: bool = True
    task: Task = CLASSIFICATION
    last_positive_step: int | None = None
    _found: WeakKeyDictionary[Any, Any] = field(default_factory=WeakKeyDictionary, init=False, repr=False)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_found": WeakKeyDictionary()}

    def memo(self, owner: nn.Module | None = None) -> dict[Any, Any]:
        """What readers have found out about these spikes, for one another: of a network's, or of any.

        It is empty again where spikes, or the network's parameters, have been edited through torch; an edit in
        place of a tensor that was made in inference mode (``run`` makes none) is not seen.
        """
        tensors = list(self.spike_steps.values())
        if owner is not None:
            own = [each for module in owner.modules() for each in (module._parameters, module._buffers)]
            tensors += [tensor for named in own for tensor in named.values() if tensor is not None]
        versions = [0 if tensor.is_inference() else tensor._version for tensor in tensors]
        known = self._found.get(self if owner is None else owner)
        # Tensors that are held here cannot give their place in memory to others.
        if known is None or known[1] != versions or [*map(id, known[0])] != [*map(id, tensors)]:
            known = self._found[self if owner is None else owner] = tensors, versions, {}
        found: dict[Any, Any] = known[2]
        return found

    @property
    def output(self) -> str:
        """Name of the output layer."""
        return list(self.windows)[-1]

    def check_recorded(self) -> None:
        """Raise ValueError where only the output's spikes were kept."""
        if INPUT not in self.spike_steps:
            raise ValueError("this needs the spikes of all layers: run the network with record=True")

    @property
    def early(self) -> dict[str, Tensor]:
        """Layer name -> bool ``[B, ...]``: the spike came before the layer's readout (never the input's)."""
        return {
            name: (steps != NO_SPIKE) & (steps < self.windows[name].start)
            for name, steps in self.spike_steps.items()
            if name != INPUT
        }

    def levels(self, name: str) -> Tensor:
        """Levels (int32) that the spikes of a layer say; 0 for silence, ``-S`` for a silent signed output."""
        window = self.windows[name]
        silent = -window.length if name == self.output and self.signed_output else 0
        return window.levels_at(self.spike_steps[name], silent)

    @property
    def decisions(self) -> Tensor:
        """Classes (int64) decided for: ``[B]``, or ``[B, ...]`` where every position is a decision.

        A single logit decides for class 1 where it is positive, else for 0.

        Raises
        ------
        ValueError
            For a regression, which decides for nothing.
        """
        self._check_decides()
        return decide(self.logits)

    @property
    def decision_steps(self) -> Tensor:
        """Step (int32) at which a decision can be made: ``[B]``, or ``[B, ...]`` where every position is a decision.

        That of the first output spike, and the inference's last step where no output fired. A single logit is known
        not to be positive once the step of its smallest positive value has passed. A regression is known with the last
        of an image's output spikes, ``[B]``.
        """
        steps = self.spike_steps[self.output]
        steps = torch.where(steps == NO_SPIKE, self.n_steps - 1, steps)
        if self.task == "regression":
            return steps.flatten(1).amax(dim=1) if steps.dim() > 1 else steps
        if not single_logit(steps):
            return steps.amin(dim=1)
        known = steps.clamp(max=self.last_positive_step)
        return known if steps.dim() == 1 else known.squeeze(1)

    @property
    def ties(self) -> Tensor:
        """Decisions (bool) that the class index makes, since several outputs share the first spike; or a logit is 0.

        ``[B]``, or ``[B, ...]`` where every position is a decision.

        Raises
        ------
        ValueError
            For a regression, which decides for nothing.
        """
        self._check_decides()
        return undecided(self.logits)

    def _check_decides(self) -> None:
        if self.task == "regression":
            raise ValueError("a regression decides for no class; compare result.logits with the values wanted")
