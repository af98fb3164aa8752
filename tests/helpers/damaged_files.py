"""Files of networks, damaged at random; and a judge: what loads runs in all engines with equal spikes.

``PYTHONPATH=tests python -m helpers.damaged_files 20000`` damages so many files, and prints what went wrong.
"""

import collections
import copy
import json
import math
import multiprocessing
import random
import resource
import sys
import tempfile
import time
import warnings
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F

import quartz_plugin
from helpers.random_graphs import assert_the_clock_agrees, make_exact
from quartz_plugin.costs import COUNTS, InferenceCounts
from quartz_plugin.graph.files import FORMAT
from quartz_plugin.graph.wellformed import shapes_of
from quartz_plugin.hardware import map_to_loihi

LONGEST, LARGEST = 300, 2_000_000
"""Steps of an inference and units of a network, up to which what loads is run."""


def contents(path):
    with safe_open(path, framework="pt") as file:
        header = json.loads(file.metadata()[FORMAT])
        return header, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def rewrite(path, header, tensors):
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, {FORMAT: json.dumps(header)})


class Joined(nn.Module):
    """A network with every class of module that joins or routes."""

    def __init__(self):
        super().__init__()
        self.conv, self.side, self.fc = nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(2, 4, 1), nn.Linear(8, 3)

    def forward(self, x):
        x = self.conv(x).relu() + self.side(x)
        x = torch.cat([x, 2 * x[:, ::2]], 1).relu().view(-1, 2, 3, 4, 4).transpose(1, 2)
        x = F.interpolate(x.reshape(-1, 6, 4, 4), scale_factor=2)
        return self.fc(F.pad(x, (0, 0, 0, 0, 1, 1)).mean((2, 3)))


class Branches(nn.Module):
    """Branches of several lengths and scales, pooled behind what routes them."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(2, 4, 3), nn.Conv2d(4, 4, 3, padding=1, groups=2), nn.Conv2d(4, 4, 1)
        self.d, self.fc = nn.Conv2d(8, 3, 1), nn.Linear(3, 2)

    def forward(self, x):
        x = F.pad(self.a(x).relu(), (1, 1, 0, 0))
        y = self.c(self.b(x).relu())
        x = torch.cat([F.max_pool2d(x, 2, ceil_mode=True), F.avg_pool2d(y + x, 2, ceil_mode=True).relu()], 1)
        return self.fc(F.adaptive_max_pool2d(self.d(x).relu(), 1).flatten(1)).relu()


def networks():
    """Small networks that together hold all that conversion emits; whole numbers of 2^-8, so that sums are exact."""
    torch.manual_seed(0)
    plain = nn.Sequential(
        nn.Conv2d(1, 3, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.AvgPool2d(2, stride=1), nn.Flatten(),
        nn.Linear(12, 4), nn.ReLU(), nn.Linear(4, 2),
    )  # fmt: skip
    lines = nn.Sequential(
        nn.ReflectionPad1d(1), nn.Conv1d(2, 4, 3, padding="same"), nn.BatchNorm1d(4), nn.ReLU(), nn.MaxPool1d(3, 1, 1),
        nn.ConvTranspose1d(4, 4, 3, stride=2, output_padding=1), nn.ReLU(), nn.AvgPool1d(2), nn.Unflatten(1, (2, 2)),
        nn.Flatten(1, 2), nn.AdaptiveAvgPool1d(3), nn.ReLU(), nn.Flatten(), nn.Linear(12, 3),
    )  # fmt: skip
    maps = nn.Sequential(
        nn.PixelUnshuffle(2), nn.Conv2d(4, 8, 3, padding=1, padding_mode="circular"), nn.ReLU(), nn.ChannelShuffle(2),
        nn.PixelShuffle(2), nn.AdaptiveMaxPool2d((3, None)), nn.UpsamplingNearest2d(scale_factor=2), nn.ZeroPad2d(1),
        nn.ConvTranspose2d(2, 3, 2, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 2),
    )  # fmt: skip
    quiet = {"hold": False, "rectifier": "silent"}
    windows = {"default": 4, "input": 6, "output": 7}
    for ann, shape, t_max, options in (
        (plain, (1, 6, 6), 6, {"preprocessing": (0.3, 0.2)}),
        (plain, (1, 6, 6), 4, {"first_layer": "dense", "weight_bits": 4, "rectifier": "silent"}),
        (plain, (1, 6, 6), 5, quartz_plugin.PAPER),
        (plain, (1, 6, 6), 5, {"task": "regression"}),
        (lines, (2, 5), windows, {}),
        (lines, (2, 5), 4, quiet),
        (maps, (1, 4, 4), 4, {"hold": False}),
        (maps, (1, 4, 4), windows, {}),
        (plain, (1, 6, 6), windows, {"granularity": "channel"}),
        (Joined(), (2, 4, 4), 4, {"rectifier": "silent"}),
        (Joined(), (2, 4, 4), 4, {"linear": "pair"}),
        (Branches(), (2, 5, 5), {"default": 4, "input": 6}, {}),
        (Branches(), (2, 5, 5), 4, quiet),
    ):
        for name, bias in ann.named_parameters():
            # No layer is silent.
            bias.data = bias.data.abs() if name.endswith("bias") else bias.data
        snn = quartz_plugin.convert(copy.deepcopy(ann).eval(), torch.rand(20, *shape), t_max, **options)
        yield snn if options.get("weight_bits") else make_exact(snn)


VALUES = [
    None, True, False, 0, 1, 2, 3, 4, 5, 7, -1, -2, 10**3, 10**5, 10**9, 2**31, 2**40, 10**30, 0.5, 1.5, -0.5, 1e-9,
    1e6, 1e300, float("nan"), float("inf"), "", "x", "5", "same", "valid", "reflect", "bilinear", "nearest", "spike",
    "silent", "\x1b[2J\n", "input", "output", [], {}, [0], [1], [2], [1, 1], [2, 2], [0, 0], [-1, -1], [1, 2, 3],
    [10**5, 10**5], [[1]], {"class": "Add"}, [1.5, 1.5], [None, 1], [True, True],
]  # fmt: skip
DTYPES = [
    torch.int8, torch.int32, torch.int64, torch.bool, torch.uint8, torch.float16, torch.bfloat16, torch.float32,
    torch.float64,
]  # fmt: skip


class Damage:
    """Damages a file's header and tensors, by a random number generator."""

    def __init__(self, seed, files):
        self.random = random.Random(seed)
        header, tensors = self.random.choice(files)
        self.header, self.tensors = copy.deepcopy(header), dict(tensors)
        self.others = [entry for other, _ in files for entry in other["modules"].values()]
        kinds = [self.value, self.number, self.key, self.nodes, self.module, self.insert, self.tensor, self.bend]
        for _ in range(self.random.choice([1, 1, 1, 2, 3])):
            self.random.choice(kinds)()

    def place(self):
        """A container inside the header with one of its keys, mostly in modules."""
        at = self.header
        key = self.random.choice(["modules", "modules", "modules", "nodes", *at])
        while isinstance(at, dict) and key not in at:
            key = self.random.choice([*at])
        while isinstance(at[key], dict | list) and at[key] and self.random.random() < 0.8:
            at = at[key]
            key = self.random.choice([*at] if isinstance(at, dict) else range(len(at)))
        return at, key

    def value(self):
        at, key = self.place()
        at[key] = self.random.choice(VALUES)

    def number(self):
        for _ in range(20):
            at, key = self.place()
            if type(at[key]) in (int, float):
                change = [
                    lambda n: n + 1,
                    lambda n: n - 1,
                    lambda n: 2 * n,
                    lambda n: -n,
                    float,
                    str,
                    bool,
                    lambda n: [n],
                ]
                change += [lambda n: [n, n], lambda n: n * 10**6, lambda n: 0 * n]
                at[key] = self.random.choice(change)(at[key])
                return

    def key(self):
        at, key = self.place()
        if self.random.random() < 0.5 or not isinstance(at, dict):
            del at[key]
        else:
            at[self.random.choice(["a", "bias", "weight", "\x1b]0;x", "steps", "padding", "class"])] = at[key]

    def nodes(self):
        nodes = self.header.get("nodes")
        if not isinstance(nodes, list) or len(nodes) < 2:
            return
        one, other = self.random.sample(range(len(nodes)), 2)
        what = self.random.randrange(6)
        if what == 0:
            nodes[one], nodes[other] = nodes[other], nodes[one]
        elif what == 1:
            del nodes[one]
        elif what == 2:
            nodes.insert(other, copy.deepcopy(nodes[one]))
        elif isinstance(nodes[one], dict) and isinstance(nodes[other], dict):
            inputs, name = nodes[one].get("inputs"), nodes[other].get("module")
            if what == 3:
                nodes[one]["inputs"] = copy.deepcopy(nodes[other].get("inputs"))
            elif what == 4 and isinstance(inputs, list):
                inputs.append(name)
            else:
                nodes[one]["module"], nodes[other]["module"] = name, nodes[one].get("module")

    def module(self):
        """Another network's module, or the settings of one under another class."""
        modules = self.header.get("modules")
        if not isinstance(modules, dict) or not modules:
            return
        path, entry = self.random.choice([*modules]), copy.deepcopy(self.random.choice(self.others))
        if self.random.random() < 0.5 and isinstance(modules[path], dict):
            modules[path]["class"] = entry["class"]
        else:
            modules[path] = entry["pool"] if "pool" in entry and self.random.random() < 0.5 else entry

    def insert(self):
        """A module more, or a thousand, behind a node; all that listened to it listen to them."""
        modules, nodes = self.header.get("modules"), self.header.get("nodes")
        if not (isinstance(modules, dict) and isinstance(nodes, list) and nodes):
            return
        own = [
            {"class": "Add"}, {"class": "Concatenate", "dim": 1}, {"class": "AxonalDelay", "steps": 0},
            {"class": "ZeroPad1d", "padding": [0, 0]}, {"class": "ZeroPad2d", "padding": [1, 1, -1, -1]},
            {"class": "MaxPool2d", "kernel_size": 1, "stride": 1, "padding": 0, "dilation": 1, "ceil_mode": False},
            {"class": "AdaptiveAvgPool2d", "output_size": [None, None]},
            {"class": "AdaptiveMaxPool2d", "output_size": 1},
            {"class": "Slice", "dim": 1, "start": 0, "stop": 9, "step": 1}, {"class": "OneToOne"},
            {"class": "Mean", "dims": [2], "keepdim": True}, {"class": "Flatten", "start_dim": 1, "end_dim": -1},
            {"class": "Upsample", "size": None, "scale_factor": 2.0, "mode": "nearest"},
            {"class": "FirstSpikeMaxPool", "pool": {"class": "AdaptiveMaxPool1d", "output_size": 2}},
        ]  # fmt: skip
        weightless = [entry for entry in self.others if entry["class"] not in ("TTFSNeuron", "Linear", "Conv2d")]
        entry = copy.deepcopy(self.random.choice(own + weightless))
        at = self.random.randrange(-1, len(nodes))
        before = "input" if at < 0 else nodes[at].get("module") if isinstance(nodes[at], dict) else None
        first = before
        for number in range(self.random.choice([1] * 40 + [3] * 10 + [30] * 5 + [1000])):
            path = f"new{number}"
            modules[path] = entry
            times = self.random.choice([1, 1, 2]) if entry["class"] in ("Add", "Concatenate") else 1
            if entry["class"] == "Concatenate" and number > 2:
                times = 1
            if entry["class"] == "OneToOne":
                self.tensors[f"module.{path}.weight"] = torch.ones((), dtype=torch.float64)
            nodes.insert(at + 1, {"module": path, "inputs": [before] * (2 if entry["class"] == "Add" else times)})
            at, before = at + 1, path
        for node in nodes[at + 1 :]:
            if isinstance(node, dict) and isinstance(node.get("inputs"), list):
                node["inputs"] = [before if source == first else source for source in node["inputs"]]

    def tensor(self):
        if not self.tensors:
            return
        name, other = self.random.choice([*self.tensors]), self.random.choice([*self.tensors])
        value = self.tensors[name]
        what = self.random.randrange(7)
        if what == 0:
            del self.tensors[name]
        elif what == 1:
            self.tensors[self.random.choice(["module.x", "front.x", "x", "scale.x", "\x1b[1m", f"{name}.x"])] = value
        elif what == 2:
            self.tensors[name], self.tensors[other] = self.tensors[other], value
        elif what == 3:
            self.tensors[name] = value.to(self.random.choice(DTYPES))
        elif what == 4:
            dtype = self.random.choice(DTYPES)
            self.tensors = {each: tensor.to(dtype) for each, tensor in self.tensors.items()}
        elif what == 5:
            bad = self.random.choice([float("nan"), float("inf"), 0.0, -1.0, 1e30, 1e-30, 3.0])
            self.tensors[name] = value.clone()
            self.tensors[name].view(-1)[:1] = bad
        else:
            self.tensors[name] = value * self.random.choice([0, -1, 2, 0.5, 1024])

    def bend(self):
        """Another shape."""
        if not self.tensors:
            return
        name = self.random.choice([*self.tensors])
        value = self.tensors[name]
        change = [
            lambda t: t.flatten(), lambda t: t.unsqueeze(0), lambda t: t.unsqueeze(-1), lambda t: t[..., None, None],
            lambda t: t.reshape(-1)[:1], lambda t: t.reshape(-1)[:1].reshape(()), lambda t: t.reshape(-1)[:0],
            lambda t: torch.cat([t, t]) if t.dim() else t, lambda t: t[:1] if t.dim() else t, lambda t: t.squeeze(),
            lambda t: t.transpose(0, 1) if t.dim() > 1 else t, lambda t: t.expand(3, *t.shape), lambda t: t.repeat(4),
        ]  # fmt: skip
        try:
            self.tensors[name] = self.random.choice(change)(value)
        except RuntimeError:
            self.tensors[name] = value.flatten()


def judge(path):
    """What became of a file: "refused", or "runs" where all engines and exporters agree. AssertionError otherwise."""
    try:
        snn = quartz_plugin.load(path)
    except ValueError as error:
        message = str(error)
        good = message.startswith(f"{path} ") and message.isprintable() and len(message) < 1000
        assert good, repr(message)
        return "refused"
    units = sum(shape.numel() for shape in shapes_of(snn.graph).values())
    if snn.n_steps > LONGEST or max(units, math.prod(snn.graph.image_shape)) > LARGEST:
        return "large"
    torch.manual_seed(0)
    images = (torch.rand(2, *snn.graph.image_shape) * 256).round() / 256
    results = {
        engine: snn.run(images, engine=engine)
        for engine in ("stepped", "event", *(["analytic"] if snn.graph.hold else []))
    }
    levels = images if snn.graph.dense_stem is None else snn.values_to_encode(images)
    for result in results.values():
        assert_the_clock_agrees(snn, levels.to(snn.graph.dtype), result.spike_steps)
        assert result.logits.isfinite().all()
    stepped = results["stepped"]
    for engine, result in results.items():
        different = sum(int((a != result.spike_steps[n]).sum()) for n, a in stepped.spike_steps.items())
        assert different <= sum(steps.numel() for steps in stepped.spike_steps.values()) // 20, engine
    spikes = quartz_plugin.encode(levels.to(snn.graph.dtype), snn.t_max, snn.n_steps, silent_zeros=snn.graph.silent)
    net, norse, state = snn.to_snntorch(), snn.to_norse(), None
    out, idiom = [], []
    with torch.no_grad():
        for step in spikes:
            out.append(net(step))
            after, state = norse(step, state)
            idiom.append(after)
    assert torch.equal(torch.stack(out), torch.stack(idiom))
    assert (snn.decode(torch.stack(out)) != stepped.logits).float().mean() <= 0.5
    counts = InferenceCounts(snn.graph, stepped)
    for name in COUNTS:
        assert all(bool((count >= 0).all()) for count in counts[name].values()), name
    try:
        str(map_to_loihi(snn))
    except ValueError as error:
        assert "\n" not in str(error), error  # noqa: PT017
    str(snn.report)
    snn.save(path)
    assert quartz_plugin.load(path).n_steps == snn.n_steps
    return "runs"


def base_files(folder):
    files = []
    for snn in networks():
        snn.save(Path(folder) / "snn")
        files.append(contents(Path(folder) / "snn"))
    return files


def damaged(seed, files, path):
    """Write a damaged file; False where damage is no file at all."""
    try:
        damage = Damage(seed, files)
        rewrite(path, damage.header, damage.tensors)
    except (RuntimeError, ValueError, TypeError):
        return False
    return True


def _many(seeds):
    resource.setrlimit(resource.RLIMIT_AS, (8 * 2**30, 8 * 2**30))
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    found = []
    with tempfile.TemporaryDirectory() as folder:
        files, path = base_files(folder), Path(folder) / "damaged"
        for header, tensors in files:
            # Kernels are compiled.
            rewrite(path, header, tensors)
            judge(path)
        for seed in seeds:
            if not damaged(seed, files, path):
                continue
            began = time.time()
            before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            try:
                outcome = judge(path)
            except BaseException as error:
                outcome = f"{type(error).__name__}: {str(error)[:150]!r}"
            grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024
            if time.time() - began > 10 or grown > 500:
                outcome += f" SLOW {time.time() - began:.0f} s, {grown} MB"
            found.append((seed, outcome))
    return found


if __name__ == "__main__":
    many, first = (int(arg) for arg in [*sys.argv[1:], 0][:2])
    chunks = [range(start, min(start + 100, first + many)) for start in range(first, first + many, 100)]
    tally = collections.Counter()
    with multiprocessing.get_context("fork").Pool(1, maxtasksperchild=20) as pool:
        for chunk in pool.imap_unordered(_many, chunks):
            for seed, outcome in chunk:
                tally[outcome if outcome in ("refused", "runs", "large") else "wrong"] += 1
                if outcome not in ("refused", "runs", "large"):
                    print(seed, outcome, flush=True)
    print(dict(tally))
