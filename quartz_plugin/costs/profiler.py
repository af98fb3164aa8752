"""Spikes, synaptic operations and MACs of any network while it runs: snnTorch, Norse or plain torch, unconverted.

A synaptic operation is an input that is not zero times a synapse that carries it: an entry of a weight matrix, or a
tap of a kernel that lands on an output. Borders are exact: where a kernel reaches into the padding is no synapse.
"""

from __future__ import annotations

import functools
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
from snntorch import AssociativeLeaky, LeakyParallel, SpikingNeuron, StateLeaky
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList
from torch.overrides import TorchFunctionMode

from quartz_plugin.costs.deliveries import OPAQUE_FUNCTIONS, WEIGHTED_FUNCTIONS, Delivery, is_weight, taps_of
from quartz_plugin.costs.energy import ONLY_CONVERTED, EnergyProfile
from quartz_plugin.tables import format_table

COUNTED = ("spikes", "neuron_updates", "synops", "graded_synops", "macs", "outputs")
"""Names of the counts of :class:`OperationCounts`."""


class OperationCounts:
    """Counts that :func:`count_operations` has made so far, over all steps and images; prints as a table.

    It can be read at any time, inside the ``with`` block too; reading waits for the device, counting does not.

    Attributes
    ----------
    spikes : dict
        Path of a neuron module -> spikes it emitted: the nonzero elements of its output.
    neuron_updates : dict
        Same keys: elements of its output, one for each neuron and step.
    synops : dict
        Path of a module with weights -> synaptic operations: nonzero inputs times the synapses that carry them.
    graded_synops : dict
        Keys of `synops`: those whose input was neither 0 nor 1 (pixels, averages), so that each is a multiplication.
    macs : dict
        Same keys: all inputs times synapses, which is what a dense pass multiplies.
    outputs : dict
        Same keys: elements that the weighted operations wrote.

    Examples
    --------
    >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    >>> with count_operations(net) as counts:
    ...     logits = net(torch.tensor([[0.5, 0.0, 1.0, 0.0]]))
    >>> counts.synops["0"], counts.graded_synops["0"], counts.macs
    (16, 8, {'0': 32, '2': 24})
    >>> counts.total("macs"), counts.per_inference(1)["macs/2"]
    (56, 24.0)
    """

    def __init__(self) -> None:
        self._sums: dict[str, dict[str, Tensor | int]] = {}

    def add(self, path: str, name: str, number: Tensor | int) -> None:
        """Add to one of the counts of a module: an int, or an int64 scalar that may stay on its device."""
        sums = self._sums.setdefault(path, {})
        before = sums.get(name, 0)
        if isinstance(before, Tensor) and isinstance(number, Tensor):
            number = number.to(before.device)
        # Not in place: a sum begun in inference mode could not be changed outside it.
        sums[name] = before + number

    @property
    def spikes(self) -> dict[str, int]:
        """Spikes of each neuron module; see the class."""
        return self._of("spikes")

    @property
    def neuron_updates(self) -> dict[str, int]:
        """Neurons times steps of each neuron module; see the class."""
        return self._of("neuron_updates")

    @property
    def synops(self) -> dict[str, int]:
        """Synaptic operations of each module with weights; see the class."""
        return self._of("synops")

    @property
    def graded_synops(self) -> dict[str, int]:
        """Synaptic operations on inputs that are neither 0 nor 1; see the class."""
        return self._of("graded_synops")

    @property
    def macs(self) -> dict[str, int]:
        """Multiplications of a dense pass; see the class."""
        return self._of("macs")

    @property
    def outputs(self) -> dict[str, int]:
        """Elements that weighted operations wrote; see the class."""
        return self._of("outputs")

    def _of(self, name: str) -> dict[str, int]:
        return {path: int(sums[name]) for path, sums in self._sums.items() if name in sums}

    def total(self, name: str) -> int:
        """Sum over all modules of "spikes", "neuron_updates", "synops", "graded_synops", "macs" or "outputs".

        Raises
        ------
        ValueError
            If `name` is none of them.
        """
        if name not in COUNTED:
            raise ValueError(f"a count is one of {', '.join(COUNTED)}, got {name!r}")
        return sum(self._of(name).values())

    def per_inference(self, n: int) -> dict[str, float]:
        """Means over `n` inferences, flat as ``log_dict`` takes them: totals first, then ``synops/MODULE`` etc.

        Parameters
        ----------
        n : int
            How many images were inferred, all batches together; an image counts once, however many steps it took.

        Returns
        -------
        dict
            ``spikes``, ``neuron_updates``, ``synops``, ``graded_synops``, ``macs``, ``outputs``, and each of them for
            each module.

        Raises
        ------
        ValueError
            If `n` < 1.
        """
        if n < 1:
            raise ValueError(f"counts are divided by the number of inferences, 1 or more, got {n!r}")
        counts = {name: self._of(name) for name in COUNTED}
        totals = {name: sum(by_module.values()) / n for name, by_module in counts.items()}
        by_module = {f"{name}/{path}": count / n for name in COUNTED for path, count in counts[name].items()}
        return totals | by_module

    def energy(self, profile: EnergyProfile, n: int) -> float:
        """Mean energy of `n` inferences, in the profile's unit.

        Every neuron counts as active at every step; readout, rectifier and what else only this package's neurons have
        counts as none.

        Parameters
        ----------
        profile : EnergyProfile
            Energy of each count, such as :data:`~quartz_plugin.costs.LOIHI`.
        n : int
            As in :meth:`per_inference`.

        Raises
        ------
        ValueError
            If `n` < 1, or the profile needs counts that only a converted network has (the paper's).

        Examples
        --------
        >>> from quartz_plugin.costs import HOROWITZ_FLOAT32
        >>> with count_operations(net := nn.Linear(4, 8)) as counts:
        ...     _ = net(torch.ones(1, 4))
        >>> round(counts.energy(HOROWITZ_FLOAT32, n=1) * 1e12, 1)  # 32 additions of 0.9 pJ
        28.8
        """
        means = self.per_inference(n)
        own = {**dict.fromkeys(ONLY_CONVERTED, 0.0), **means, "active_updates": means["neuron_updates"]}
        return float(profile.energy(own))

    def __str__(self) -> str:
        counts = [self._of(name) for name in COUNTED]
        rows = [[path, *(by_module.get(path) for by_module in counts)] for path in self._sums]
        return format_table(["module", *COUNTED], [*rows, ["total", *(sum(c.values()) for c in counts)]])


def count_operations(
    net: nn.Module, neurons: type[nn.Module] | tuple[type[nn.Module], ...] | None = None
) -> AbstractContextManager[OperationCounts]:
    """Count spikes, synaptic operations and MACs of a network while it runs inside a ``with`` block.

    Weighted operations are counted wherever they are called (``F.linear``, convolutions, transposed ones, recurrent
    cells, products with a matrix) while a module of `net` runs, under the path of the innermost one; a module known
    by two names counts under the first, `net` itself under the name of its class. Outputs, gradients and random
    numbers stay as they are, and at the end, or after an exception, `net` is as before.

    Parameters
    ----------
    net : nn.Module
        Any network, on any device, in training or not; it may be called any number of times.
    neurons : type or tuple of types, optional
        Classes of modules whose output counts as spikes besides the neurons of snnTorch, Norse and this package.
        The output is the first tensor of what a module returns. Of neurons within neurons, the outermost counts.

    Returns
    -------
    context manager
        Its value is an :class:`OperationCounts`.

    Raises
    ------
    TypeError
        If `net` is no module, or `neurons` neither a class nor a tuple of classes.

    Warns
    -----
    UserWarning
        Once for each module whose weights act where they cannot be seen (``nn.LSTM``, attention, ``einsum``, scripts).

    Notes
    -----
    A weight of zero is a synapse too. Of a product of two matrices, the right one holds the weights, unless only the
    left one is a parameter; products of larger tensors, such as attention scores, are not counted, nor are pooling,
    normalisation and products element by element. Zeros that a module of its own pads are inputs to the next
    (MACs, but no synaptic operations). What checkpointing runs once more in a backward pass counts once. What
    ``torch.compile`` has compiled runs uncompiled meanwhile.

    Examples
    --------
    >>> import snntorch
    >>> net = nn.Sequential(nn.Linear(4, 2, bias=False), snntorch.Leaky(beta=0.5, init_hidden=True), nn.Linear(2, 3))
    >>> _ = nn.init.ones_(net[0].weight)
    >>> with torch.no_grad(), count_operations(net) as counts:
    ...     for spikes in torch.tensor([[[1.0, 0.0, 0.0, 0.0]], [[1.0, 1.0, 0.0, 1.0]]]):
    ...         out = net(spikes)
    >>> print(counts)
    module  spikes  neuron_updates  synops  graded_synops  macs  outputs
    ------  ------  --------------  ------  -------------  ----  -------
    0            -               -       8              0    16        4
    1            2               4       -              -     -        -
    2            -               -       6              0    12        6
    total        2               4      14              0    28       10
    """
    if not isinstance(net, nn.Module):
        raise TypeError(f"operations are counted in an nn.Module, got {type(net).__name__}")
    given = () if neurons is None else neurons if isinstance(neurons, tuple) else (neurons,)
    if not all(isinstance(each, type) for each in given):
        raise TypeError(f"neurons must be a class or a tuple of classes, got {neurons!r}")
    return _counting(net, given)


@contextmanager
def _counting(net: nn.Module, neurons: tuple[type[nn.Module], ...]) -> Iterator[OperationCounts]:
    counter = _Counter(net, neurons)
    with ExitStack() as stack:
        for module in counter.paths:
            # Functions, so that a deep copy of the network does not copy the counter.
            entry = module.register_forward_pre_hook(lambda module, _: counter.enter(module), prepend=True)
            stack.callback(entry.remove)
            leave = module.register_forward_hook(lambda module, _, out: counter.leave(module, out), always_call=True)
            stack.callback(leave.remove)
        if "torch._dynamo" in sys.modules:
            # Compiled code shows no operations; what was compiled runs as it was written.
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(counter)
        yield counter.counts


class _Counter(TorchFunctionMode):
    """Count of each operation, for the module that is running by the hooks of the network."""

    def __init__(self, net: nn.Module, neurons: tuple[type[nn.Module], ...]) -> None:
        super().__init__()
        self.counts = OperationCounts()
        self.paths = {module: path or type(net).__name__ for path, module in net.named_modules()}
        scripts = [module for module in self.paths if isinstance(module, torch.jit.ScriptModule)]
        if scripts:
            name = self.paths[scripts[0]]
            warnings.warn(f"{name!r} is a script, which shows no operations; nothing in it is counted", stacklevel=4)
        for module in scripts:
            del self.paths[module]
        self.neurons = {module for module in self.paths if isinstance(module, neurons) or _emits_spikes(module)}
        self.running: list[nn.Module] = []
        self.warned: set[tuple[str, str]] = set()
        self.taps = functools.cache(taps_of)

    def enter(self, module: nn.Module) -> None:
        """Note that a module begins to run, unless a backward pass runs it once more (checkpointing)."""
        if module in self.paths and torch._C._current_graph_task_id() == -1:
            self.running.append(module)

    def leave(self, module: nn.Module, output: Any) -> None:
        """Note that a module is done, or has raised an exception: then there is no output."""
        if module not in self.running:
            return
        while self.running.pop() is not module:
            pass
        spikes = _first_tensor(output)
        if module in self.neurons and spikes is not None and self.neurons.isdisjoint(self.running):
            self.counts.add(self.paths[module], "spikes", (_dense(spikes) != 0).sum())
            self.counts.add(self.paths[module], "neuron_updates", spikes.numel())

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Call the function; where it is one with weights, count."""
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if self.running and (func in WEIGHTED_FUNCTIONS or func in OPAQUE_FUNCTIONS) and self._acts_on_inputs():
            path = self.paths[self.running[-1]]
            if func in OPAQUE_FUNCTIONS:
                self._warn(path, func, [*args, *kwargs.values()])
            else:
                deliveries = WEIGHTED_FUNCTIONS[func](result, *args, **kwargs)
                for delivery in deliveries:
                    self._count(path, delivery)
                if not deliveries:
                    self._warn(path, func, [*args, *kwargs.values()])
                written = _first_tensor(result) if deliveries else None
                if written is not None:
                    self.counts.add(path, "outputs", written.numel())
        return result

    def _acts_on_inputs(self) -> bool:
        """Check that what runs is neither a membrane, computed as a convolution in time, nor a weight in the making."""
        return not isinstance(self.running[-1], StateLeaky) and not any(
            isinstance(module, ParametrizationList) for module in self.running
        )

    def _count(self, path: str, delivery: Delivery) -> None:
        inputs, fan_out, axes = delivery
        inputs = _dense(inputs.detach())
        taps, taps_of_all = self.taps(axes, inputs.device)
        nonzero = inputs != 0
        graded = nonzero & (inputs != 1)
        for name, mask in (("synops", nonzero), ("graded_synops", graded)):
            # Batch and channels, which meet the same taps, in one dimension: several are summed far more slowly.
            by_place = mask.reshape(-1, *taps.shape).sum(dim=0)
            self.counts.add(path, name, (by_place * taps).sum() * fan_out)
        self.counts.add(path, "macs", inputs.numel() // taps.numel() * taps_of_all * fan_out)

    def _warn(self, path: str, func: Callable[..., Any], arguments: list[Any]) -> None:
        flat = [each for argument in arguments for each in (argument if isinstance(argument, list) else [argument])]
        name = func.__name__
        if (path, name) not in self.warned and any(is_weight(each) for each in flat):
            self.warned.add((path, name))
            warnings.warn(f"the weights of {name} in {path!r} act unseen; its operations are not counted", stacklevel=3)


def _emits_spikes(module: nn.Module) -> bool:
    """Check for a neuron of snnTorch or Norse, ours included, that returns spikes and no membrane."""
    if isinstance(module, StateLeaky):
        return bool(module.output)
    if isinstance(module, AssociativeLeaky):
        return not module.use_q_projection
    if isinstance(module, (SpikingNeuron, LeakyParallel)):
        return True
    # A network that holds modules of Norse has imported it.
    norse = sys.modules.get("norse.torch")
    if norse is None or isinstance(module, (norse.LI, norse.LICell, norse.LIBoxCell)):
        return False
    snn = sys.modules["norse.torch.module.snn"]
    kinds = (snn.SNN, snn.SNNCell, snn.SNNRecurrent, snn.SNNRecurrentCell, norse.CobaLIFCell, norse.LIFCorrelation)
    return isinstance(module, kinds)


def _first_tensor(output: Any) -> Tensor | None:
    if isinstance(output, Tensor):
        return output
    if isinstance(output, dict):
        output = tuple(output.values())
    if isinstance(output, (tuple, list)):
        return next((tensor for tensor in map(_first_tensor, output) if tensor is not None), None)
    return None


def _dense(values: Tensor) -> Tensor:
    return values if values.layout is torch.strided else values.to_dense()


__all__ = ["COUNTED", "OperationCounts", "count_operations"]
