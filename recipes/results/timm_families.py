"""The families of timm: what converts, what is refused and by which operation; writes timm.md beside this file.

    python recipes/results/timm_families.py --cache runs/timm                      # all: half an hour on one core
    python recipes/results/timm_families.py --cache runs/timm --again resnet vgg   # these anew, the others as kept

A family is a module of timm.models. Of each the smallest network is taken, and the smallest that has nothing but ReLU,
ReLU6 and max pooling, if that is another: with random weights, on small images where it takes them. Each is converted
in a process of its own with a limit of time. Outcomes are kept in the folder of --cache, a file for each family: a run
that was cut off goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import quartz_plugin

PAGE = Path(__file__).with_name("timm.md")
T_MAX, TOLERANCE = (2_049, 32_769, 1_048_577), 0.1
CLASSES, IMAGES, SIZES = 10, 6, (64, 96, 128, 160)

RELUS = (nn.ReLU, nn.ReLU6, nn.Identity)
OTHERS = {
    "sigmoid": "sigmoid", "hardsigmoid": "hard sigmoid", "silu": "SiLU", "gelu": "GELU", "hardswish": "hard swish",
    "tanh": "tanh", "leaky_relu": "leaky ReLU", "elu": "ELU", "mish": "Mish", "softplus": "softplus",
    "_softmax": "softmax", "_log_softmax": "softmax", "exp": "exp", "native_layer_norm": "layer norm",
    "native_group_norm": "group norm", "_fused_rms_norm": "RMS norm", "rsqrt": "norm of values", "linalg_vector_norm":
    "norm of values", "bmm": "product", "pow": "power", "_scaled_dot_product_flash_attention_for_cpu": "attention",
}  # fmt: skip
"""Operation of ATen -> what it is called, of those that are neither linear nor a ReLU nor a choice of the largest."""


class OtherOperations(TorchDispatchMode):
    """Notes which operations of :data:`OTHERS` a network computes of its images, and products of two activations."""

    def __init__(self, images: int) -> None:
        super().__init__()
        self.images = images
        self.found: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation, and note it."""
        name = func._schema.name.removeprefix("aten::").rstrip("_")
        of_images = [a for a in args if isinstance(a, Tensor) and a.dim() > 1 and a.shape[0] % self.images == 0]
        if of_images and name in OTHERS:
            self.found.add(OTHERS[name])
        elif len(of_images) > 1 and name == "mul":
            self.found.add("product")
        return func(*args, **(kwargs or {}))


def size_and_relus(model: str) -> tuple[int, bool]:
    """Return a network's number of parameters, and whether all its activations and norms that are modules are plain."""
    with torch.device("meta"):
        network = timm.create_model(model, num_classes=CLASSES)
    plain = all(
        isinstance(module, (*RELUS, nn.modules.batchnorm._BatchNorm))
        or not (
            type(module).__module__.startswith(("torch.nn.modules.activation", "timm.layers.activations"))
            or re.search(
                r"(layer|group|rms|simple|evo|response|instance)_?norm|attention|attn$|softmax",
                type(module).__name__,
                re.IGNORECASE,
            )
        )
        for module in network.modules()
    )
    return sum(parameter.numel() for parameter in network.parameters()), plain


def smallest(family: str) -> list[str]:
    """Return the smallest network of a family, and the smallest with nothing but ReLUs, if that is another."""
    found = []
    for model in timm.list_models(module=family):
        # Some cannot be made without numbers.
        try:
            found.append((*size_and_relus(model), model))
        except (NotImplementedError, RuntimeError, TypeError, ValueError):
            continue
    found.sort(key=lambda each: each[0])
    plain = next((model for _, plain, model in found if plain and not besides(model)), None)
    return list(dict.fromkeys([*(model for _, _, model in found[:1]), *([plain] if plain else [])]))


def besides(model: str) -> list[str]:
    """Name what a network has besides linear maps, ReLUs and max pooling."""
    network, images = prepared(model)
    with torch.no_grad(), OtherOperations(IMAGES) as operations:
        network(images)
    return sorted(operations.found)


@torch.no_grad()
def prepared(model: str) -> tuple[nn.Module, Tensor]:
    """Make a network with random weights whose batch norms fit the images, and images of a size that it takes."""
    torch.manual_seed(0)
    network = timm.create_model(model, num_classes=CLASSES).eval()
    cfg = network.pretrained_cfg
    channels, *_, own = cfg["input_size"]
    norms = [each for each in network.modules() if isinstance(each, nn.modules.batchnorm._BatchNorm)]
    for norm in norms:
        norm.momentum = 1.0
        if norm.weight is not None:
            # timm starts residual branches at 0, which would test nothing of them.
            norm.weight.uniform_(0.5, 1.5)
            norm.bias.uniform_(-0.2, 0.2)
    for size in [own] if cfg.get("fixed_input_size") else [*(size for size in SIZES if size < own), own]:
        images = torch.rand(IMAGES, channels, size, size, generator=torch.Generator().manual_seed(4))
        try:
            for norm in norms:
                norm.train()
            network(images)
            if network.eval()(images).isfinite().all():
                return network, images
        except (AssertionError, IndexError, RuntimeError, ValueError, ZeroDivisionError):
            if size == own:
                raise
    raise ValueError(f"{model} gives no finite numbers with random weights")


@torch.no_grad()
def outcome(model: str) -> dict[str, Any]:
    """Convert a network and compare it with its ANN, finer where rounding adds up; or note why it is refused."""
    network, images = prepared(model)
    wanted = network(images)

    def off(given: Tensor) -> float:
        return float((given - wanted).abs().max() / wanted.abs().max())

    noise = (torch.rand(images.shape, generator=torch.Generator().manual_seed(5)) - 0.5) / (T_MAX[0] - 1)
    found: dict[str, Any] = {
        "parameters": sum(parameter.numel() for parameter in network.parameters()),
        "size": images.shape[-1],
        "besides": besides(model),
        "noise": off(network(images + noise)),
        "result": "differs",
    }
    try:
        for t_max in T_MAX:
            snn = quartz_plugin.convert(network, images, t_max, percentile=100)
            found[f"off at {t_max}"] = off(snn(images))
            if found[f"off at {t_max}"] <= TOLERANCE:
                found["result"] = "converts" if t_max == T_MAX[0] else "approximates"
                break
    except quartz_plugin.ConversionError as error:
        found |= {"result": "refused", "reason": str(error).splitlines()[0]}
    return found


def _send(pipe: Connection, function: Callable[[str], Any], name: str) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    try:
        pipe.send((True, function(name)))
    except Exception as error:
        pipe.send((False, f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"))


def limited(function: Callable[[str], Any], name: str, seconds: float) -> tuple[bool, Any]:
    """Call a function of a name in a process of its own: whether it gave a result in time, and that or the reason."""
    # Everything is imported already in a fork, which saves seconds for each network.
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_send, args=(theirs, function, name), daemon=True)
    process.start()
    theirs.close()
    try:
        done = ours.recv() if ours.poll(seconds) else (False, f"no result in {seconds:.0f} s")
    except EOFError:
        done = (False, "the process died")
    process.kill()
    process.join()
    return done


def examined(family: str, kept: Mapping[str, Any], seconds: float) -> dict[str, Any]:
    """Convert the networks that stand for a family; which those are is taken from what is kept, if it is there."""
    models = kept.get("models") or {}
    if not models:
        right, chosen = limited(smallest, family, 20 * seconds)
        if not right:
            return {"models": {}, "result": "not examined", "reason": chosen}
        models = dict.fromkeys(chosen)
    found = {}
    for model in models:
        right, result = limited(outcome, model, seconds)
        found[model] = result if right else {"result": "not examined", "reason": result}
    return {"models": found}


def cells(result: Mapping[str, Any]) -> list[str]:
    """What became of a network, and how far it is from its ANN or why it is refused."""
    offs = {t_max: result[f"off at {t_max}"] for t_max in T_MAX if f"off at {t_max}" in result}
    if offs:
        finer = [f"{off:.2g} at {t_max:,}" for t_max, off in offs.items() if t_max != T_MAX[0]]
        noise = f"; the ANN itself {result['noise']:.2g}" if finer else ""
        return [result["result"], f"{offs[T_MAX[0]]:.2g}" + "".join(f", {each}" for each in finer) + noise]
    reason = result["reason"].replace("|", "\\|")
    if found := re.match(REFUSAL, reason):
        return ["refused", f"`{found['what']}` at {found['path']}: {found['why'].strip()}"]
    return [result["result"], reason]


def page(families: Mapping[str, Any]) -> str:
    """Write the page: the plain networks, all others, and by which operation these are refused."""
    plain: list[str] = []
    others: list[str] = []
    counts = dict.fromkeys(("converts", "approximates", "differs", "refused", "not examined"), 0)
    blockers: dict[str, list[str]] = {}
    for family, held in families.items():
        for model, result in held["models"].items() or {"": held}.items():
            counts[result["result"]] += 1
            size = f"{result['parameters'] / 1e6:.1f}" if "parameters" in result else ""
            if result.get("besides") == []:
                plain.append(f"| {' | '.join([family, model, size, *cells(result)])} |")
            else:
                has = ", ".join(result.get("besides", ()))
                others.append(f"| {' | '.join([family, model, size, has, *cells(result)])} |")
            if result["result"] == "refused":
                found = re.match(REFUSAL, result["reason"])
                blockers.setdefault(f"`{found['what']}`" if found else "another reason", []).append(model)
    blocking = sorted(blockers.items(), key=lambda each: (-len(each[1]), each[0]))
    return TEXT.format(
        timm=timm.__version__, torch=torch.__version__.partition("+")[0],
        tolerance=f"{100 * TOLERANCE:.0f} %", coarse=f"{T_MAX[0]:,}", finer=" or ".join(f"{t:,}" for t in T_MAX[1:]),
        families=len(families), networks=sum(counts.values()), images=IMAGES, size=SIZES[0],
        counts=", ".join(f"{count} {word}" for word, count in counts.items() if count),
        plain="\n".join(plain), others="\n".join(others),
        blockers="\n".join(f"| {what} | {len(models)} | {', '.join(models)} |" for what, models in blocking),
    )  # fmt: skip


REFUSAL = re.compile(r"cannot convert '(?P<path>[^']*)' \((?P<what>[^)]*)\): (?P<why>[^;,(]*)")

TEXT = """\
# Results: the families of timm

Every family (module of `timm.models`) of timm {timm}, torch {torch}: its smallest network and, if that is another, its
smallest with nothing but linear maps, ReLU, ReLU6 and max pooling. Random weights, batch norms with random gains and
the statistics of the {images} random images on which it is calibrated (percentile 100) and compared, {size} x {size}
pixels where the network takes them. Of {networks} networks in {families} families: {counts}.

- **converts**: at T = {coarse} no output is further from the ANN's than {tolerance} of the ANN's largest output.
- **approximates**: so only with finer steps, T = {finer}. Rounding adds up in a network that amplifies: "the ANN
  itself" is how far the ANN's own outputs move when its input is changed by half a step of T = {coarse} at most. Deep
  networks with random weights amplify far more than trained ones.
- **differs**: further away at every T.
- **refused**: the first operation that stands in the way; all that the network has besides linear maps and ReLUs is in
  the column before.

No weights are downloaded. The script goes on where it was cut off:

```bash
pip install -e '.[zoos]' && OMP_NUM_THREADS=1 python recipes/results/timm_families.py --cache runs/timm
```

## Nothing but linear maps, ReLUs and max pooling

| family | network | million parameters | result | furthest output |
|---|---|---|---|---|
{plain}

## The others

| family | network | million parameters | has besides | result | by |
|---|---|---|---|---|---|
{others}

## What refuses them

| operation | networks | |
|---|---|---|
{blockers}
"""


def main(arguments: Sequence[str] | None = None) -> None:
    """Examine the families that nothing is kept of, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--cache", type=Path, required=True, help="folder that keeps the outcomes between runs")
    parser.add_argument("--again", nargs="*", default=(), metavar="FAMILY", help="examine these anew")
    parser.add_argument("--seconds", type=float, default=60, help="limit for each network")
    given = parser.parse_args(arguments)
    names = timm.list_modules()
    if unknown := sorted(set(given.again) - set(names)):
        parser.error(f"timm has no families {', '.join(unknown)}; it has {', '.join(names)}")
    given.cache.mkdir(parents=True, exist_ok=True)
    families: dict[str, Any] = {}
    for number, family in enumerate(names, 1):
        file = given.cache / f"{family}.json"
        kept = json.loads(file.read_text()) if file.exists() else {}
        if not kept or family in given.again:
            kept = examined(family, kept, given.seconds)
            file.write_text(json.dumps(kept, indent=1))
            for model, result in kept["models"].items() or {"": kept}.items():
                print(
                    f"{number}/{len(names)} {family} {model}: {result['result']} {result.get('reason', '')[:150]}",
                    flush=True,
                )
        families[family] = kept
    PAGE.write_text(page(families))
    print(f"wrote {PAGE}")


if __name__ == "__main__":
    main()
