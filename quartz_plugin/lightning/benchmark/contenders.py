"""Spiking networks that are timed: engines, a loop of snnTorch's, and rate code."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import Any

import snntorch
import torch
from torch import Tensor, nn

import quartz_plugin
from quartz_plugin.engines.integer import run_integer
from quartz_plugin.engines.integer.maps import MOST_LEVEL
from quartz_plugin.functional import closed_form
from quartz_plugin.lightning.modules import cost_metrics
from quartz_plugin.network import SpikingNetwork

RATE_STEPS = 16
LONG_FROM = 128
"""The MNIST network is stepped below this T without being asked to."""

KINDS: dict[str, dict[str, Any]] = {
    "hold": {},
    # Linear maps in a row have no form in int8.
    "8 bits": {"weight_bits": 8, "weight_granularity": "channel", "linear": "pair"},
    "paper": {**quartz_plugin.PAPER},
    "hold off": {"hold": False},
}
"""Options of the spiking networks that run."""

Run = Callable[[Tensor], Tensor]
"""Images to logits."""


@dataclass(frozen=True)
class Contender:
    """A kind of spiking network, and what makes it run."""

    engine: str
    kind: str
    prepare: Callable[[SpikingNetwork], Run]
    is_slow: bool = False


def _engine(engine: str, record: bool, snn: SpikingNetwork) -> Run:
    return lambda images: snn.run(images, engine, record).logits


def _in_int8(snn: SpikingNetwork) -> Run:
    """The same operators on levels that are there already: the ANN, quantised, without an encoder or spike times."""
    graph, given = snn.graph, {}

    def run(images: Tensor) -> Tensor:
        window = graph.input_window.length
        if "levels" not in given:
            given["levels"] = closed_form(graph.values_to_encode(images) * window, window).to(torch.uint8)
        logits: Tensor = run_integer(graph, given["levels"], record=False).membrane
        return logits

    return run


def _with_metrics(engine: str, snn: SpikingNetwork) -> Run:
    """Count every cost that the recipes' test reports."""
    costs = cost_metrics(snn)

    def run(images: Tensor) -> Tensor:
        result = snn.run(images, engine)
        costs.update(result=result)
        return result.logits

    return run


def _loop(snn: SpikingNetwork) -> Run:
    """Step a network over the global clock, as a user of snnTorch would."""
    net = snn.to_snntorch()

    def run(images: Tensor) -> Tensor:
        quartz_plugin.reset(net)
        train = [*quartz_plugin.encode(images, snn.t_max), *[torch.zeros_like(images)] * (snn.n_steps - snn.t_max)]
        logits: Tensor = snn.decode(torch.stack([net(spikes) for spikes in train]))
        return logits

    return run


def rate_coded(ann: nn.Module, scales: Mapping[str, float]) -> Run:
    """Rate code: the network's ReLUs as snnTorch's Leaky, what their firing rate 1 stands for by name."""
    net, before = nn.Sequential(), 1.0
    for position, (name, module) in enumerate(ann.named_children()):
        own: Any = copy.deepcopy(module)
        if isinstance(module, nn.ReLU):
            own = snntorch.Leaky(beta=1.0, threshold=1.0, reset_mechanism="subtract", init_hidden=True)
            before = scales[name]
        elif isinstance(module, nn.Conv2d | nn.Linear):
            following = (later for later, each in list(ann.named_children())[position:] if isinstance(each, nn.ReLU))
            after = scales.get(next(following, ""), 1.0)
            own.weight.data.mul_(before / after)
            own.bias.data.div_(after)
        net.append(own)
    net.eval()

    def run(images: Tensor) -> Tensor:
        for module in net:
            if isinstance(module, snntorch.Leaky):
                module.reset_mem()
        return torch.stack([net(images) for _ in range(RATE_STEPS)]).mean(0)

    return run


def channels_last(ann: nn.Module) -> Run:
    """The same network with its weights and values laid out channels-last."""
    net = copy.deepcopy(ann).to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def run(images: Tensor) -> Tensor:
        logits: Tensor = net(images.contiguous(memory_format=torch.channels_last))
        return logits

    return run


def scales_of(snn: SpikingNetwork) -> dict[str, float]:
    """Name of a ReLU -> what its value 1 stands for."""
    return {row["module"]: row["scale"] for row in snn.report if row["operation"] == "ReLU"}


CHANNELS_LAST = "ANN, channels-last"
IN_INT8 = "ANN in int8, integer's operators"
RATE = f"rate code in snnTorch's Leaky, {RATE_STEPS} steps"

CONTENDERS = {
    "analytic, logits alone": Contender("analytic", "hold", lambda snn: snn),
    "analytic, all spikes": Contender("analytic", "hold", partial(_engine, "analytic", True)),
    "analytic, all metrics": Contender("analytic", "hold", partial(_with_metrics, "analytic")),
    "integer, logits alone": Contender("integer", "8 bits", partial(_engine, "integer", False)),
    "integer, all spikes": Contender("integer", "8 bits", partial(_engine, "integer", True)),
    "integer, all metrics": Contender("integer", "8 bits", partial(_with_metrics, "integer")),
    IN_INT8: Contender("integer", "8 bits", _in_int8),
    "event, paper's neuron, logits alone": Contender("event", "paper", partial(_engine, "event", False)),
    "event, all spikes": Contender("event", "paper", partial(_engine, "event", True)),
    "event, all metrics": Contender("event", "paper", partial(_with_metrics, "event")),
    "event, hold off": Contender("event", "hold off", partial(_engine, "event", False)),
    "stepped": Contender("stepped", "paper", partial(_engine, "stepped", True), is_slow=True),
    "to_snntorch() in a loop": Contender("stepped", "paper", _loop, is_slow=True),
}


def takes_long(name: str, t: int) -> bool:
    """Return whether stepping this network at this T takes long."""
    return name != "mnist" or t >= LONG_FROM


ENGINES = tuple(dict.fromkeys(contender.engine for contender in CONTENDERS.values()))


def left_out_contenders(name: str, t: int, slow: bool, engines: Collection[str]) -> dict[str, str]:
    """Contenders of these engines that do not run here, and what would let them."""
    has_numba, left_out = find_spec("numba") is not None, {}
    for what, contender in CONTENDERS.items():
        if contender.engine not in engines:
            continue
        if contender.engine == "event" and not has_numba:
            left_out[what] = "pip install 'quartz_plugin[fast]'"
        elif contender.is_slow and takes_long(name, t) and not slow:
            left_out[what] = "--slow true"
        elif contender.kind == "8 bits" and t - 1 > MOST_LEVEL:
            left_out[what] = f"T up to {MOST_LEVEL + 1}"
    return left_out
