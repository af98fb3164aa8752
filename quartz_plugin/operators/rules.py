"""Rules: modules that stand in for module classes of a user's own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

Rule = Callable[[Any], nn.Module]
"""Takes a module (a copy in eval mode); returns one of operations that can be converted."""

RULES: dict[type[nn.Module], Rule] = {}
"""Rules that users have registered with :func:`register_rule`."""


def register_rule(module_class: type[nn.Module], rule: Rule) -> None:
    """Teach `convert` a module class of your own.

    Wherever a network holds a module of exactly this class, the module that the rule returns is converted in its
    place. It must compute the same in eval mode; `convert` compares the two on an example. For one conversion alone,
    pass ``rules={module_class: rule}`` to it instead.

    Parameters
    ----------
    module_class : type
        The class; torch's own classes may be given rules too.
    rule : callable
        Takes the module (a copy in eval mode) and returns an ``nn.Module`` of operations that can be converted.

    Raises
    ------
    TypeError
        If `module_class` is no module class, or `rule` cannot be called.

    See Also
    --------
    unregister_rule

    Examples
    --------
    A ReLU with a learned upper bound:

    >>> import torch, quartz_plugin
    >>> class LearnedClip(nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.bound = nn.Parameter(torch.tensor(2.0))
    ...     def forward(self, x):
    ...         return torch.minimum(x.relu(), self.bound)
    >>> quartz_plugin.register_rule(LearnedClip, lambda module: nn.Hardtanh(0.0, module.bound.item()))
    >>> ann = nn.Sequential(nn.Linear(4, 8), LearnedClip(), nn.Linear(8, 2))
    >>> quartz_plugin.convert(ann, torch.rand(32, 4)).report[1]["became"]
    'spiking layer'
    >>> quartz_plugin.unregister_rule(LearnedClip)
    """
    _check_rule(module_class, rule)
    RULES[module_class] = rule


def unregister_rule(module_class: type[nn.Module]) -> None:
    """Forget the rule of a module class.

    Parameters
    ----------
    module_class : type
        The class that the rule was registered for.

    Raises
    ------
    KeyError
        If no rule is registered for it.

    Examples
    --------
    >>> register_rule(nn.Softsign, lambda module: nn.Hardtanh(0.0, 1.0))
    >>> unregister_rule(nn.Softsign)
    >>> unregister_rule(nn.Softsign)
    Traceback (most recent call last):
    KeyError: 'no rule is registered for Softsign; register_rule registers one'
    """
    if module_class not in RULES:
        name = getattr(module_class, "__name__", repr(module_class))
        raise KeyError(f"no rule is registered for {name}; register_rule registers one")
    del RULES[module_class]


def rules_with(rules: Mapping[type[nn.Module], Rule] | None) -> dict[type[nn.Module], Rule]:
    """Registered rules, and those given for one conversion, which come first.

    Raises
    ------
    TypeError
        If `rules` is no mapping of module classes to callables.
    """
    if rules is None:
        return dict(RULES)
    if not isinstance(rules, Mapping):
        raise TypeError(f"rules must be a dict of module classes and their rules, got {type(rules).__name__}")
    for module_class, rule in rules.items():
        _check_rule(module_class, rule)
    return RULES | dict(rules)


def _check_rule(module_class: Any, rule: Any) -> None:
    if not (isinstance(module_class, type) and issubclass(module_class, nn.Module)):
        raise TypeError(f"module_class must be a subclass of torch.nn.Module, got {module_class!r}")
    if not callable(rule):
        raise TypeError(f"rule must take a module and return one, got {rule!r}")


__all__ = ["RULES", "Rule", "register_rule", "rules_with", "unregister_rule"]
