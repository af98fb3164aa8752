"""Stage 0, intake: a copy of the user's network whose layers hold plain tensors.

What a network computes before its layers (pruning, weight norm, spectral norm, parametrisations, hooks that make
weights) is carried out once, on the copy. What a hook does to the values themselves stays where torch.fx can see it,
and is refused by name elsewhere.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.utils import parametrize
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm
from torch.optim.swa_utils import AveragedModel

from quartz_plugin.operators.table import NORMS, OPERATORS, ConversionError, Rule, has_weights

_COMPUTING_HOOKS = (BasePruningMethod, SpectralNorm, WeightNorm)
"""Torch's own pre-forward hooks that compute a weight of their module, and can make it permanent."""

_HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks_with_kwargs",
)
_STATE_HOOKS = (
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)
"""They save and load what weights were computed from, which is no longer there."""

_BACKWARD_HOOKS = ("_backward_hooks", "_backward_pre_hooks")

_STATISTICS = ("running_mean", "running_var")
_TENSORS = ("weight", "bias", *_STATISTICS)
"""Tensors that the modules of the table compute with."""


def copy_of(ann: nn.Module) -> nn.Module:
    """Copy a network in eval mode, without the wrappers in it or around it; its hooks stay.

    torch.compile, (Distributed)DataParallel and AveragedModel are wrappers. A tensor that a hook has computed with
    gradients comes as a number.

    Raises
    ------
    ConversionError
        If it cannot be copied, or its weights are not there yet.
    """
    _check_is_a_network_of_modules(ann)
    memo: dict[int, Any] = {}
    for module in ann.modules():
        for tensor in _tensors(vars(module)):
            if not tensor.is_leaf:
                memo[id(tensor)] = tensor.detach().clone()
    try:
        # The inner ones first: what wraps them is then known.
        for module in reversed(list(ann.modules())):
            if (wrapped := _wrapped_by(module)) is not None:
                memo[id(module)] = inner = copy.deepcopy(wrapped, memo)
                _hand_down_hooks(module, inner, memo)
        root: nn.Module = copy.deepcopy(ann, memo)
    except Exception as error:
        raise ConversionError(
            f"{type(ann).__name__} cannot be copied: {first_line(error)}; conversion works on a copy, so give a "
            "network that copy.deepcopy can copy"
        ) from error
    for module in root.modules():
        for name in _BACKWARD_HOOKS:
            getattr(module, name).clear()
    return root.eval()


def computes_weights(ann: nn.Module) -> bool:
    """Check whether a network computes weights before its layers, or may: it is hooked or parametrised."""
    return any(module._forward_pre_hooks or parametrize.is_parametrized(module) for module in ann.modules())


def make_plain(root: nn.Module) -> None:
    """Carry out, for good, what torch's own hooks and parametrisations compute; `root` is a copy.

    Raises
    ------
    ConversionError
        Naming the module whose weights cannot be computed.
    """
    with torch.no_grad():
        for path, module in list(root.named_modules()):
            try:
                for key, hook in list(module._forward_pre_hooks.items()):
                    if isinstance(hook, _COMPUTING_HOOKS):
                        hook.remove(module)
                        del module._forward_pre_hooks[key]
                if parametrize.is_parametrized(module):
                    _end_parametrizations(module)
            except Exception as error:
                raise ConversionError(
                    f"the weights of {path!r} ({type(module).__name__}) cannot be computed: {first_line(error)}; make "
                    "them permanent (torch.nn.utils.parametrize.remove_parametrizations, prune.remove, "
                    "remove_weight_norm, remove_spectral_norm)"
                ) from error
            if type(module) in OPERATORS and (has_weights(module) or isinstance(module, NORMS)):
                _hold_plain_tensors(module)


def _end_parametrizations(module: nn.Module) -> None:
    """Let what a parametrised module computes be its parameters."""
    # Not remove_parametrizations: it edits the class, which the user's own module shares with the copy.
    computed = {name: getattr(module, name) for name in module.parametrizations}  # type: ignore[operator, union-attr]
    module.__class__ = type(module).__bases__[0]
    del module.parametrizations
    for name, tensor in computed.items():
        module.register_parameter(name, nn.Parameter(tensor.detach().clone(), requires_grad=False))


def _hold_plain_tensors(module: nn.Module) -> None:
    """Let a layer hold its tensors where they are found, none shadowed, and what they were made from no longer."""
    for name in _TENSORS:
        shadow, buffer = vars(module).get(name), module._buffers.get(name)
        held = shadow if isinstance(shadow, Tensor) else buffer
        if not isinstance(held, Tensor) or (held is buffer and name in _STATISTICS):
            continue
        for place in (vars(module), module._parameters, module._buffers):
            place.pop(name, None)  # type: ignore[attr-defined]
        if name in _STATISTICS:
            module.register_buffer(name, held.detach().clone())
        else:
            module.register_parameter(name, nn.Parameter(held.detach().clone(), requires_grad=False))
    for held_by in (module._parameters, module._buffers):
        for name in held_by.keys() - {*_TENSORS, "num_batches_tracked"}:
            del held_by[name]
    for name in _STATE_HOOKS:
        getattr(module, name).clear()


def hooks_of(root: nn.Module) -> list[str]:
    """Paths of the modules with hooks that are not torch's own computations of weights."""
    return [
        path
        for path, module in root.named_modules()
        if module._forward_hooks
        or any(not isinstance(hook, _COMPUTING_HOOKS) for hook in module._forward_pre_hooks.values())
    ]


def carry_out_hooks(
    root: nn.Module,
    hooked: list[str],
    tracer: fx.Tracer,
    rules: Mapping[type[nn.Module], Rule],
    run: Callable[[nn.Module, tuple[Tensor, ...]], Tensor],
    *batches: tuple[Tensor, ...],
) -> Tensor:
    """Run a copy with its hooks, take off those that change no value, and keep the tensors that they made.

    Parameters
    ----------
    root : nn.Module
        The copy; in eval mode.
    hooked : list of str
        Paths that :func:`hooks_of` gave.
    tracer : fx.Tracer
        What will trace it, and does not look into its leaf modules.
    rules : dict
        Rules for module classes, which are not looked into either.
    run : callable
        Runs the network on a batch.
    *batches : tuple of Tensor
        Inputs: two batches at least, for what differs from call to call to show.

    Returns
    -------
    Tensor
        What the network gives for the first batch. The tensors that its modules compute with are those that their
        hooks left.

    Raises
    ------
    ConversionError
        Naming the module whose hook changes values where they cannot be traced, or makes other weights in each call.
    """
    watch = _Watch(root, hooked)
    try:
        outputs = [run(root, batch) for batch in batches]
    finally:
        watch.end()
    for path in watch.unsteady:
        raise ConversionError(
            f"a hook gives {path!r} ({type(root.get_submodule(path)).__name__}) other weights in each call, and "
            "synapses are fixed weights; remove it (handle.remove())"
        )
    for path in hooked:
        module = root.get_submodule(path)
        if path not in watch.changed:
            for name in _HOOKS:
                hooks = getattr(module, name)
                for key in [key for key, hook in hooks.items() if not isinstance(hook, _COMPUTING_HOOKS)]:
                    del hooks[key]
        elif not path or type(module) in rules or tracer.is_leaf_module(module, path):
            raise ConversionError(
                f"a hook on {path or 'the network itself'!r} ({type(module).__name__}) changes {watch.changed[path]}, "
                "and a spiking network cannot carry it; put what it does into the network's forward, or remove it "
                "(handle.remove())"
            )
    return outputs[0]


class _Watch:
    """Hooks around the hooks of modules: which change values, and whether weights stay the same."""

    def __init__(self, root: nn.Module, hooked: list[str]) -> None:
        self.changed: dict[str, str] = {}
        self.unsteady: list[str] = []
        self._before: dict[str, list[Tensor]] = {}
        self._weights: dict[str, dict[str, Tensor]] = {}
        self._handles: list[Any] = []
        for path, module in root.named_modules():
            if path in hooked:
                self._around(path, module)
            if type(module) in OPERATORS:
                self._handles.append(module.register_forward_pre_hook(self._weights_of(path)))

    def end(self) -> None:
        """Take off all hooks."""
        for handle in self._handles:
            handle.remove()

    def _around(self, path: str, module: nn.Module) -> None:
        def note(values: Any) -> None:
            self._before[path] = [tensor.detach().clone() for tensor in _tensors(values)]

        def compare(values: Any, what: str) -> None:
            if not _alike(self._before[path], list(_tensors(values))):
                self.changed.setdefault(path, what)

        self._handles += [
            module.register_forward_pre_hook(lambda _, *given: note(given), prepend=True, with_kwargs=True),
            module.register_forward_pre_hook(lambda _, *given: compare(given, "its input"), with_kwargs=True),
            module.register_forward_hook(lambda _, __, out: note(out), prepend=True),
            module.register_forward_hook(lambda _, __, out: compare(out, "its output")),
        ]

    def _weights_of(self, path: str) -> Any:
        def note(module: nn.Module, _: Any) -> None:
            tensors = {name: getattr(module, name, None) for name in _TENSORS}
            now = {name: tensor.detach() for name, tensor in tensors.items() if isinstance(tensor, Tensor)}
            known = self._weights.setdefault(path, {name: tensor.clone() for name, tensor in now.items()})
            if known.keys() != now.keys() or not _alike(list(known.values()), list(now.values())):
                self.unsteady.append(path)

        return note


def _alike(some: list[Tensor], others: list[Tensor]) -> bool:
    return len(some) == len(others) and all(
        one.shape == other.shape and bool(((one == other) | ((one != one) & (other != other))).all())
        for one, other in zip(some, others, strict=True)
    )


def _check_is_a_network_of_modules(ann: nn.Module) -> None:
    for path, module in ann.named_modules():
        where = f" (at {path!r})" if path else ""
        if isinstance(module, torch.jit.ScriptModule):
            raise ConversionError(
                f"a scripted network cannot be traced by torch.fx{where}; give the nn.Module it was made from"
            )
        is_graph = isinstance(module, fx.GraphModule)
        aten = is_graph and any(isinstance(node.target, torch._ops.OpOverload) for node in module.graph.nodes)
        if (aten and path) or (not is_graph and type(module).__module__.startswith("torch.export")):
            raise ConversionError(
                f"an exported network (torch.export) is part of another or unflattened{where}; give the exported "
                "program itself, or the nn.Module it was made from"
            )
    for name, tensor in [*ann.named_parameters(), *ann.named_buffers()]:
        if isinstance(tensor, nn.parameter.UninitializedParameter | nn.parameter.UninitializedBuffer):
            raise ConversionError(f"{name} is not initialised; run the network once before converting it")


def _wrapped_by(module: nn.Module) -> nn.Module | None:
    """Return what torch.compile, data parallelism or averaging wrap; None for any other module."""
    if "_orig_mod" in module._modules:
        return module._modules["_orig_mod"]
    if isinstance(module, nn.DataParallel | nn.parallel.DistributedDataParallel | AveragedModel):
        wrapped: nn.Module = module.module
        return wrapped
    return None


def _hand_down_hooks(wrapper: nn.Module, inner: nn.Module, memo: dict[int, Any]) -> None:
    for name in _HOOKS:
        getattr(inner, name).update(copy.deepcopy(getattr(wrapper, name), memo))


def _tensors(structure: Any) -> Iterator[Tensor]:
    """Tensors in tuples, lists and dicts."""
    if isinstance(structure, Tensor):
        yield structure
    elif isinstance(structure, dict):
        yield from _tensors(list(structure.values()))
    elif isinstance(structure, tuple | list):
        for part in structure:
            yield from _tensors(part)


def first_line(error: BaseException) -> str:
    """First line of an error's message, or its name where it has none."""
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
