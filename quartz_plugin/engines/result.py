"""The result of a simulation."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from quartz_plugin.coding import NO_SPIKE, Window
from quartz_plugin.graph import INPUT, ConvertedGraph
from quartz_plugin.graph.digest import digests
from quartz_plugin.graph.fingerprint import Identity, Snapshot, snapshot_of
from quartz_plugin.layout import in_memory_order
from quartz_plugin.outputs import OUTPUT, Head, Outputs
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
        Layer name -> the :class:`~quartz_plugin.coding.Window` in which its spikes encode 1 to 0.
    n_steps : int
        Steps an inference takes.
    engine : str
        The engine that ran.
    signed_output : bool
        Whether silence of an output encodes -1 (0 where the network ends in a ReLU).
    task : "classification" or "regression"
        Meaning of the output; see :func:`~quartz_plugin.convert`.
    last_positive_step : int or None
        Step at which an output of the smallest positive value fires.
    layout : Outputs
        Heads that the output layer encodes, and what the host computes of them.
    parts : dict
        Of a network with several outputs: name of each -> its task and last positive step.
    network : Identity or None
        Which network it is of; None where that is not known.
    arithmetic : dict
        Layer name -> what the "integer" engine added up in: "int8", or "float32" or "float64" where the library has no
        such form of its synapses. Empty for the other engines.

    Notes
    -----
    It can be pickled, saved by ``torch.save`` (and loaded with ``weights_only=True``), deep-copied and sent between
    processes; the copy has all of the above, logits and membrane without their gradients, and no network.
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
    layout: Outputs = field(default_factory=lambda: Outputs((Head(OUTPUT, ()),)))
    parts: dict[str, tuple[Task, int | None]] = field(default_factory=dict)
    network: Identity | None = None
    arithmetic: dict[str, str] = field(default_factory=dict)
    _found: dict[Any, tuple[Hashable, dict[Any, Any]]] = field(default_factory=dict, init=False, repr=False)

    def __getstate__(self) -> dict[str, Any]:
        # Tensors inside an autograd graph cannot go to another process, nor be copied.
        apart = {"logits": self.logits.detach(), "membrane": self.membrane.detach(), "_found": {}}
        # Plain values: a file of results is loaded without any class of the user's.
        apart["layout"] = self.layout.to_json()
        return {**self.__dict__, **apart}

    def __setstate__(self, state: dict[str, Any]) -> None:
        units = tuple(state["logits"].shape[1:])
        self.__dict__.update(state | {"layout": Outputs.from_json(state["layout"], units)})

    def memo(self, graph: ConvertedGraph | None = None, snapshot: Snapshot | None = None) -> dict[Any, Any]:
        """All that readers have found out about these spikes, for one another: of a network's, or of any.

        It is empty again where spikes, or the network, have been edited (:mod:`quartz_plugin.graph.fingerprint`);
        `snapshot`, where that of the network has just been taken.
        """
        owner = None if graph is None else graph.number
        shapes = tuple((name, steps.shape, steps.stride()) for name, steps in self.spike_steps.items())
        spikes = digests(map(in_memory_order, self.spike_steps.values()))
        own = spikes, shapes, tuple(self.windows.items()), self.n_steps
        if graph is not None and snapshot is None:
            snapshot = snapshot_of(graph)
        state = own, None if snapshot is None else snapshot.fingerprint
        known = self._found.get(owner)
        if known is None or known[0] != state:
            known = self._found[owner] = state, {}
        return known[1]

    @property
    def outputs(self) -> Any:
        """What the network returns: the logits, nested and computed with as the ANN does it."""
        return self.layout.present(self.logits)

    @property
    def heads(self) -> tuple[str, ...]:
        """Names of the outputs that the output layer encodes, ``("output",)`` for one."""
        return tuple(head.name for head in self.layout.heads)

    def head(self, name: str) -> SimulationResult:
        """One of several outputs as a result of its own: its logits, spikes, decisions and ties.

        Spikes and steps of the other layers are those of the whole network.

        Raises
        ------
        KeyError
            Where there is no output of this name.

        Examples
        --------
        >>> import torch, quartz_plugin
        >>> class Two(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.stem, self.policy, self.value = (torch.nn.Linear(4, n) for n in (4, 3, 1))
        ...     def forward(self, x):
        ...         x = self.stem(x).relu()
        ...         return {"policy": self.policy(x), "value": self.value(x)}
        >>> images = torch.rand(8, 4)
        >>> result = quartz_plugin.convert(Two(), images, task={"value": "regression"}).run(images)
        >>> result.heads, result.head("policy").decisions.shape
        (('policy', 'value'), torch.Size([8]))
        """
        place = self.layout.index_of(name)
        if len(self.layout.heads) == 1:
            return self
        head, (task, last_positive_step) = self.layout.heads[place], self.parts[name]
        steps = {self.output: self.layout.split(self.spike_steps[self.output])[place]}
        return replace(
            self,
            logits=self.layout.split(self.logits)[place],
            membrane=self.layout.split(self.membrane)[place],
            spike_steps=self.spike_steps | steps,
            task=task,
            last_positive_step=last_positive_step,
            layout=Outputs((Head(OUTPUT, head.shape),)),
            parts={},
            network=None,
        )

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
        """Levels (int32) that the spikes of a layer encode; 0 for silence, ``-S`` for a silent signed output."""
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
        if len(self.heads) > 1:
            raise ValueError(f"this network has several outputs: result.head(name) of one of {', '.join(self.heads)}")
        if self.task == "regression":
            raise ValueError("a regression decides for no class; compare result.logits with the values wanted")


# Plain data: a file of results may be loaded without running code.
torch.serialization.add_safe_globals([SimulationResult, Window, Identity])
