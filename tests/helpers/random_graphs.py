"""Random ReLU networks that are graphs, for hypothesis, and readers of what becomes of them that the tests trust.

A network is written line by line, as users write a forward: ``v3 = F.relu(self.m2(v1)) + v1``; it prints so.
What is expected is written here once more and apart from the package: a clock that steps a converted network
by the rules of DESIGN.md section 3, and the ANN itself computing with rounded values.
"""

import copy
import math
import operator
import re
import warnings
from collections import Counter
from dataclasses import dataclass

import numpy as np
import torch
from hypothesis import assume
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, prune

import quartz_plugin
from helpers.random_chains import (
    TIE,
    assert_equal_but_for_ties,
    fired_levels,
    normalise,
    round_half_up,
    spelled,
    spelled_kernel,
    spelled_stride,
)
from quartz_plugin import AxonalDelay, ConversionError, FirstSpikeMaxPool, TTFSNeuron
from quartz_plugin.operators.table import WEIGHTED

_WORDS = {"torch": torch, "F": F, "operator": operator, "np": np}


@dataclass
class Line:
    """One line of a network's forward.

    ``path`` is the name its layer would have. ``rectifies`` marks a ReLU; of a ReLU behind max
    pooling, whose neurons stand in front of it, ``pooled`` is what remains without it, and ``sources`` are the
    values that the neurons encode. ``pools`` marks a line that pools ``sources`` itself. ``calls`` counts the nodes
    that it becomes; the last of them has its value. Where neurons stand inside of it, ``inside`` has the place of
    each layer among those nodes with what it rectifies, and ``rest`` is the line's value by what they encode, ``r0``,
    ``r1``.
    """

    names: tuple[str, ...]
    text: str
    path: str = ""
    rectifies: bool = False
    pooled: str = ""
    pools: bool = False
    sources: tuple[str, ...] = ()
    calls: int = 1
    inside: tuple[tuple[int, str], ...] = ()
    rest: str = ""

    def drives(self, net, known):
        """Name -> what each layer of neurons inside of the line rectifies."""
        names = {f"{self.path}_{place}" if place > 1 else self.path: text for place, text in self.inside}
        return {name: eval(text, _WORDS, {"self": net, **known}) for name, text in names.items()}

    def values(self, net, known, text=None):
        """What the line gives for each of its names."""
        value = eval(text or self.text, _WORDS, {"self": net, **known})
        return {name: value[i] for i, name in enumerate(self.names)} if len(self.names) > 1 else {self.names[0]: value}

    def __str__(self):
        return f"{', '.join(self.names)} = {self.text}"


class Net(nn.Module):
    """A network whose forward is a list of lines; returns what the last one gives."""

    def __init__(self, lines, modules):
        super().__init__()
        self.lines = lines
        for name, module in modules.items():
            self.register_module(name, module)

    def forward(self, x):
        known = {"x": x}
        for line in self.lines:
            known.update(line.values(self, known))
        return known[self.lines[-1].names[0]]


class Constant(nn.Module):
    """Holds a constant that lines compute with."""

    def __init__(self, value):
        super().__init__()
        self.register_buffer("value", value)

    def extra_repr(self):
        return str(self.value.tolist())


class Token(nn.Module):
    """Holds numbers of its own that are put beside values, as a class token."""

    def __init__(self, value):
        super().__init__()
        self.value = nn.Parameter(value)

    def extra_repr(self):
        return str(self.value.tolist())


class Part(nn.Module):
    """A block of one expression of `a` and `b`: its functions are named after it."""

    def __init__(self, text):
        super().__init__()
        self.text = text

    def forward(self, a, b=None):
        return eval(self.text, _WORDS, {"a": a, "b": b})

    def extra_repr(self):
        return self.text


@dataclass
class RandomNet:
    """A random network with images for it."""

    ann: Net
    input_shape: tuple[int, ...]
    calibration: torch.Tensor
    images: torch.Tensor
    preprocessing: tuple | None

    def convert(self, t_max, **options):
        options |= {"preprocessing": self.preprocessing}
        try:
            return quartz_plugin.convert(self.ann, self.calibration, t_max, **options)
        except ConversionError as refusal:
            # Joined branches may have different scales; what differs by the options of a call is the caller's.
            assume(options.keys() & {"layers", "granularity"} or not pools_mixed_scales(self, refusal))
            # Pools of signed values may need larger biases than the paper's neuron has.
            if options.get("bias") != "spike" or "which no bias spike encodes" not in str(refusal):
                raise
            return quartz_plugin.convert(self.ann, self.calibration, t_max, **options | {"bias": "synapse"})

    def _repr_pretty_(self, printer, cycle):
        printer.text(repr(self))

    def __repr__(self):
        lines = "\n".join(f"    {line}" for line in self.ann.lines)
        modules = "\n".join(f"    {name} = {module}" for name, module in self.ann.named_children())
        return (
            f"input {self.input_shape}, {len(self.images)} images, preprocessing {self.preprocessing}, "
            f"{self.calibration.dtype}\n{lines}\n{modules}"
        )


@dataclass
class _Value:
    """A value of the network being drawn.

    ``kind`` is "spikes", "positive" (never negative, but not encoded by one spike each) or "signed"; ``run`` counts
    the linear maps since the last spikes.
    """

    name: str
    shape: tuple[int, ...]
    kind: str
    run: int = 0
    # Changing it in place would change another tensor as well.
    aliased: bool = False
    # Behind routing: a ReLU behind a pool may have its neurons in front of that as well.
    routed: bool = False
    weighted: bool = False
    used: bool = False


class _Writer:
    """Writes lines that fit one behind the other."""

    def __init__(self, draw, shape, exact, preprocessed):
        self.draw, self.exact = draw, exact
        self.modules, self.lines, self.paths = {}, [], Counter()
        self.values = [_Value("x", shape, "signed" if preprocessed else "spikes", aliased=True)]
        self.shared, self.count = None, 1

    # What hypothesis draws.
    def chance(self, percent=50):
        return self.draw(st.integers(0, 99)) >= 100 - percent

    def pick(self, *choices):
        return self.draw(st.sampled_from(choices))

    def spelled(self, value, rank=2):
        return spelled(self.pick, value, rank)

    def value(self, fits=lambda value: True):
        """A value, the latest most often; None where none fits."""
        fitting = [value for value in reversed(self.values) if fits(value)]
        if not fitting:
            return None
        return fitting[0] if self.chance(60) else self.pick(*fitting)

    # What it writes.
    def module(self, module):
        name = f"m{len(self.modules)}"
        self.modules[name] = module
        return name

    def path(self, wanted):
        """Name of one more call of a module or function."""
        self.paths[wanted] += 1
        count = self.paths[wanted]
        return wanted if count == 1 else f"{wanted}_{count}"

    def write(self, text, sources, kind, *, path="", run=0, alias=False, names=1, **line):
        """Append a line; returns its values, or none where it does not fit."""
        names = tuple(f"v{self.count + i}" for i in range(names))
        new = Line(names, text, sources=tuple(source.name for source in sources), **line)
        net = Net([], self.modules).eval()
        try:
            with torch.no_grad():
                known = {source.name: torch.rand(2, *source.shape) for source in sources}
                values = new.values(net, known)
        except (RuntimeError, ValueError):
            return []
        if any(value.numel() == 0 or not value.isfinite().all() for value in values.values()):
            return []
        new.path = self.path(path)
        self.lines.append(new)
        shapes = [tuple(value.shape[1:]) for value in values.values()]
        made = [_Value(name, shape, kind, run, alias) for name, shape in zip(names, shapes, strict=True)]
        for source in sources:
            source.used = True
            source.aliased |= alias
        self.values += made
        self.count += len(made)
        return made

    def call(self, module, source, kind, **line):
        name = self.module(module)
        return self.write(f"self.{name}({source.name})", [source], kind, path=name, **line)

    # Operations, each of one line; they do nothing where nothing fits.
    def rectify(self, source=None):
        source = source or self.value(lambda v: v.kind != "spikes" or self.chance(10))
        if source is None:
            return
        name, inplace = source.name, not source.aliased and self.chance(30)
        bound = self.pick(0.5, 1.0, 6.0)
        how = self.pick("module", "shared", "function", "method", "clamp", "bounded", "clipped", "in a block")
        if how == "shared" and (self.shared is None or (self.modules[self.shared].inplace and source.aliased)):
            how = "module"
        if how == "module":
            shared = self.module(self.pick(nn.ReLU, nn.ReLU, nn.ReLU6)(inplace=inplace))
            self.shared = self.pick(shared, self.shared or shared)
            text, path = f"self.{shared}({name})", shared
        elif how == "shared":
            text, path, inplace = f"self.{self.shared}({name})", self.shared, self.modules[self.shared].inplace
        elif how == "function":
            text, path = (f"F.relu({name}, inplace={inplace})", "relu")
        elif how == "method":
            text, path = (f"{name}.relu_()", "relu_") if inplace else (f"{name}.relu()", "relu")
        elif how == "clamp":
            inplace = False
            text, path = self.pick(
                (f"{name}.clamp(min=0)", "clamp"),
                (f"torch.clamp({name}, 0, {bound})", "clamp"),
                (f"torch.relu({name})", "relu"),
            )
        elif how == "bounded":
            # The ReLU is dropped, and its name is taken all the same.
            inplace, text, path = False, f"{name}.relu().clamp_max({bound})", "clamp_max"
            self.path("relu")
        elif how == "clipped":
            inplace = False
            clip = self.module(nn.Hardtanh(0.0, bound))
            text, path = self.pick(
                (f"self.{clip}({name})", clip),
                (f"F.hardtanh({name}, 0.0, {bound})", "hardtanh"),
                (f"F.relu6({name})", "relu6"),
            )
        else:
            inplace = False
            block = self.module(Part("F.relu(a)"))
            text, path = f"self.{block}({name})", f"{block}.relu"
        made = self.write(text, [source], "spikes", path=path, rectifies=True)
        if inplace and made:
            # Who uses the source from here on sees it rectified.
            source.kind, source.run, source.weighted = "spikes", 0, False
            source.aliased = made[0].aliased = True

    def weigh(self, source=None, out=None, keep=False):
        """A convolution or linear layer, perhaps with its batch norm."""
        source = source or self.value(lambda v: v.run < 3)
        if source is None:
            return None
        shape, bias = source.shape, self.chance(70)
        out = out or self.pick(2, 3, 4, shape[0])
        if len(shape) in (1, 4) or (len(shape) > 1 and not keep and self.chance(10)):
            layer = nn.Linear(shape[-1], out, bias)
        elif len(shape) == 2:
            kernel = 1 if keep else self.pick(1, 1, 2, 3)
            options = {} if keep else {"stride": self.spelled(self.pick(1, 2), 1), "padding": self.pick(0, [1], (1,))}
            kind = nn.ConvTranspose1d if not keep and self.chance(15) else nn.Conv1d
            layer = kind(shape[0], out, spelled_kernel(self.pick, kernel, 1), bias=bias, **options)
        else:
            groups = self.pick(*[g for g in (1, 1, 2, 3, shape[0]) if shape[0] % g == 0 and out % g == 0])
            kernel = self.pick(1, 3)
            options = {"padding": self.spelled(kernel // 2), "groups": groups, "bias": bias}
            if not keep and self.chance(20):
                options |= {"stride": self.spelled(self.pick(1, 2)), "padding": self.spelled(self.pick(0, 1))}
                layer = nn.ConvTranspose2d(shape[0], out, spelled_kernel(self.pick, 2, 2), **options)
            elif not keep and self.chance(35):
                options |= {"stride": self.spelled(self.pick(1, 2)), "padding": self.spelled(self.pick(0, 1))}
                options |= {"dilation": self.spelled(self.pick(1, 1, 2))}
                layer = nn.Conv2d(shape[0], out, spelled_kernel(self.pick, self.pick(2, 3), 2), **options)
            else:
                options |= {"padding": self.pick(options["padding"], "same")}
                layer = nn.Conv2d(shape[0], out, spelled_kernel(self.pick, kernel, 2), **options)
        norm = None
        if (len(shape) in (2, 3) and not isinstance(layer, nn.Linear)) or len(shape) == 1:
            norm = self.norm(out, len(shape)) if self.chance(30) else None
        made = self.call(layer, source, "signed", run=source.run + 1)
        if not made:
            return None
        made[0].weighted = True
        if norm is not None:
            # The line goes on with its norm, which is folded into the layer and takes its name.
            self.lines[-1].text = f"self.{self.module(norm)}({self.lines[-1].text})"
        return made[0]

    def norm(self, channels, dims):
        norm = (nn.BatchNorm2d if dims == 3 else nn.BatchNorm1d)(channels, affine=self.chance(80))
        with torch.no_grad():
            norm.running_mean.normal_(0, 0.3)
            norm.running_var.uniform_(0.3, 2)
            if norm.affine:
                norm.weight.normal_(1, 0.5)
                norm.bias.normal_(0.2, 0.3)
        return norm

    def normalise(self):
        """A batch norm of its own, as in pre-activation streams."""
        source = self.value(lambda v: len(v.shape) < 4 and v.run < 3 and not v.weighted)
        if source is not None:
            self.call(self.norm(source.shape[0], len(source.shape)), source, "signed", run=source.run + 1)

    def compute_with_constants(self, source=None):
        """A number, or a tensor of some of the shapes that fit."""
        source = source or self.value(lambda v: v.run < 3)
        if source is None:
            return
        numbers = [
            ("{} * 0.5", "mul"),
            ("{} + 0.25", "add"),
            ("{} / 2", "truediv"),
            ("-{}", "neg"),
            ("{} - 0.1", "sub"),
        ]
        tensors = [("{} * {c}", "mul"), ("{c} * {}", "mul"), ("{} + {c}", "add"), ("{c} + {}", "add")]
        tensors += [("{} - {c}", "sub"), ("{} / {c}", "truediv")]
        text, path = self.pick(*numbers, *tensors)
        if "{c}" in text:
            shape = source.shape[self.pick(*range(len(source.shape))) :]
            shape = tuple(self.pick(size, size, 1) for size in shape)
            constant = self.module(Constant(torch.rand(shape) + 0.3))
            text = text.replace("{c}", f"self.{constant}.value")
        self.write(text.format(source.name), [source], "signed", path=path, run=source.run + 1)

    def bottleneck(self):
        """Linear maps in a row."""
        value = self.weigh(self.value(lambda v: v.run < 2))
        if value is not None:
            self.weigh(value)

    def branch(self):
        """A residual block around a value: one or two layers that keep its shape, and the sum."""
        start = self.value(lambda v: len(v.shape) < 4 and v.run < 3)
        if start is None:
            return
        end = start
        for _ in range(self.pick(1, 2)):
            if self.chance(70):
                end = self.weigh(end, out=start.shape[0], keep=True) or end
            if self.chance(70):
                self.rectify(end)
                end = self.values[-1]
            if end.run >= 3:
                break
        if end is not start:
            self.join(start, end)

    def join(self, one=None, other=None):
        """A sum or difference."""
        one = one or self.value()
        other = other or self.value(lambda v: v.shape == one.shape)
        both = [one, other] if self.chance() else [other, one]
        a, b = both
        kind = "positive" if "signed" not in (a.kind, b.kind) else "signed"
        run = max(a.run, b.run)
        how = self.pick("operator", "method", "subtract", "in place")
        if how == "in place" and (a.aliased or a is b):
            how = "operator"
        if how == "operator":
            self.write(f"{a.name} + {b.name}", both, kind, path="add", run=run)
        elif how == "method":
            text = self.pick("{}.add({})", "torch.add({}, {})").format(a.name, b.name)
            self.write(text, both, kind, path="add", run=run)
        elif how == "subtract":
            block = self.module(Part("a - b"))
            self.write(f"self.{block}({a.name}, {b.name})", both, "signed", path=f"{block}.sub", run=run, calls=2)
        elif self.chance():
            (made,) = self.write(f"{a.name}.add_({b.name})", both, kind, path="add_", run=run)
            a.kind, a.run, a.weighted = kind, run, False
            a.aliased = made.aliased = True
        else:
            # torch.fx takes += for +, so nobody may look at the old name again.
            self.write(f"operator.iadd({a.name}, {b.name})", both, kind, path="add", run=run)
            self.values.remove(a)

    def broadcast(self):
        """A sum or difference with something that is smaller along some dimensions."""
        large = self.value(lambda v: v.run < 3)
        if large is None:
            return
        dims = [dim for dim in range(1, 1 + len(large.shape)) if self.chance()] or [-1]
        name, whole = large.name, all(large.shape[dim - (dim > 0)] in (1, 2, 4, 8) for dim in dims)
        if (not self.exact or whole) and self.chance(60):
            kind = "signed" if large.kind == "signed" else "positive"
            made = self.write(f"{name}.mean({dims}, keepdim=True)", [large], kind, path="mean", run=large.run)
        else:
            parts = ", ".join(
                ":1" if dim in dims or dim - len(large.shape) - 1 in dims else ":"
                for dim in range(1, 1 + len(large.shape))
            )
            made = self.write(f"{name}[:, {parts}]", [large], large.kind, run=large.run, alias=True)
        if not made or made[0].shape == large.shape:
            return
        (small,) = made
        small.routed = True
        if len(large.shape) < 4 and self.chance(30):
            self.rectify(small)
            small = self.values[-1]
        a, b = (small, large) if self.chance() else (large, small)
        sign = self.pick("+", "+", "-")
        block = self.module(Part(f"a {sign} b"))
        kind = "positive" if "signed" not in (a.kind, b.kind) and sign == "+" else "signed"
        path, calls = (f"{block}.add", 2) if sign == "+" else (f"{block}.sub", 3)
        run = max(a.run, b.run)
        self.write(f"self.{block}({a.name}, {b.name})", [a, b], kind, path=path, run=run, calls=calls)

    def compare(self):
        """Absolute values, the larger or smaller of two, and bounds other than 0: neurons inside of a line."""
        one = self.value(lambda v: v.kind == "signed" and v.run < 3)
        if one is None:
            return
        other = self.value(lambda v: v.shape == one.shape and v is not one)
        how, a = self.pick("abs", "clamp", *(["maximum", "minimum"] if other is not None else [])), one.name
        if how == "abs":
            block = self.module(Part("a.abs()"))
            inside, calls, rest, sources = ((1, a), (3, f"-{a}")), 4, "r0 + r1", [one]
        elif how == "clamp":
            block = self.module(Part("a.clamp(-0.25, 0.5)"))
            inside, calls, rest, sources = ((2, f"{a} + 0.25"),), 3, "r0 - 0.25", [one]
        elif how == "maximum":
            block = self.module(Part("torch.maximum(a, b)"))
            inside, calls, rest, sources = ((3, f"{other.name} - {a}"),), 4, f"{a} + r0", [one, other]
        else:
            block = self.module(Part("torch.minimum(a, b)"))
            inside, calls, rest, sources = ((3, f"{a} - {other.name}"),), 5, f"{a} - r0", [one, other]
        text = f"self.{block}({', '.join(source.name for source in sources)})"
        kind, run = ("positive", 0) if how == "abs" else ("signed", max(source.run for source in sources) + 1)
        self.write(text, sources, kind, path=f"{block}.{how}", run=run, calls=calls, inside=inside, rest=rest)

    def copy(self):
        """Copies of units, or their order, by places that are known beforehand."""
        source = self.value(lambda v: math.prod(v.shape) <= 60)
        if source is None:
            return
        name, rank = source.name, len(source.shape)
        dim = self.pick(*range(1, 1 + rank))
        size = source.shape[dim - 1]
        ones = [1] * (rank + 1)
        twice = [*ones[:dim], 2, *ones[dim + 1 :]]
        places = [self.pick(*range(size)) for _ in range(self.pick(1, 2, 3))]
        choices = [
            f"{name}.flip({dim})",
            f"torch.flip({name}, [{dim}, -1])" if dim < rank else f"torch.flip({name}, (-1,))",
            f"{name}.repeat({twice})",
            f"torch.tile({name}, {tuple(twice)})",
            f"{name}.repeat_interleave(2, dim={dim})",
            f"{name}.index_select({dim}, torch.tensor({places}))",
            f"{name}.unsqueeze({dim}).expand({', '.join(map(str, [-1] * dim + [2] + [-1] * (rank + 1 - dim)))})",
            f"{name}.narrow({dim}, 0, 1).expand_as({name})",
            f"{name}.movedim({dim}, 1)",
            f"{name}.unbind({dim})[-1]" if rank > 1 else f"{name}.tensor_split(2, dim=1)[0]",
        ]
        if rank == 3:
            # Three times, for they fit seldom.
            choices += 3 * [f"F.pixel_shuffle({name}.repeat(1, 4, 1, 1), 2)", f"F.pixel_unshuffle({name}, 2)"]
            choices += 3 * [f"F.unfold({name}, 2, padding=1)"]
        text = self.pick(*choices)
        alias = any(word in text for word in ("expand", "movedim", "unbind", "split"))
        for made in self.write(text, [source], source.kind, run=source.run, alias=alias):
            made.routed = True

    def put_beside(self):
        """Constants beside a value, and perhaps other values behind them."""
        source = self.value(lambda v: v.run < 3)
        if source is None:
            return
        name, dim = source.name, self.pick(*range(1, 1 + len(source.shape)))
        shape = [1, *source.shape]
        shape[dim] = self.pick(1, 2)
        token = self.module(Token(torch.randn(shape)))
        constant = f"self.{token}.value.expand({name}.size(0), {', '.join(['-1'] * len(source.shape))})"
        parts = self.pick([constant, name], [name, constant], [name, constant, name], [constant, name, constant])
        # Padding, and then a bias.
        text = f"torch.cat([{', '.join(parts)}], {dim})"
        for made in self.write(text, [source], "signed", run=source.run + 1):
            made.routed = True

    def concatenate(self):
        one = self.value()
        if one is None:
            return
        dim = 1 if self.chance(80) else len(one.shape)

        def fits(value):
            same = list(zip(value.shape, one.shape, strict=False))
            del same[dim - 1 : dim]
            return len(value.shape) == len(one.shape) and all(a == b for a, b in same)

        parts = [one, *(self.value(fits) for _ in range(self.pick(1, 1, 2)))]
        if sum(part.shape[dim - 1] for part in parts) > 8:
            return
        kinds = {part.kind for part in parts}
        kind = "signed" if "signed" in kinds else "positive" if "positive" in kinds else "spikes"
        text = f"torch.cat([{', '.join(part.name for part in parts)}], {dim})"
        for made in self.write(text, parts, kind, run=max(part.run for part in parts)):
            made.routed = True

    def max_pool(self):
        """Over spikes, or over other values, which get neurons of their own: signed ones from a lowest one on."""
        source = self.value(lambda v: len(v.shape) < 4 and (v.kind != "signed" or (v.run < 3 and self.chance(40))))
        if source is None:
            return
        kind, run = ("signed", source.run + 1) if source.kind == "signed" else ("spikes", 0)
        if len(source.shape) in (2, 3) and self.chance(20):
            name, last = source.name, len(source.shape)
            whole = self.pick(
                f"{name}.amax({(2, 3)[: last - 1]}, keepdim={self.chance()})", f"torch.amax({name}, (-1,))"
            )
            text = whole if last == 3 else self.pick(whole, f"{name}.max(2)[0]", f"torch.max({name}, -1).values")
            if last == 2 or text.startswith(name):
                self.write(text, [source], kind, path="amax" if "amax" in text else "max", pools=True, run=run)
                return
        if len(source.shape) == 3 and self.chance(60):
            size = f"{self.pick(2, [2], (2,))}, {self.pick(1, (1,), [], None)}"
            pads = self.pick("(0, 1, 1, 0)", "[1, 1]", "(-1, 1, 0, 1)")
            value = self.pick("-float('inf')", "-float('inf')", "-1e9")
            # Three times, for they fit seldom.
            padded = self.pick(source.name, *3 * [f"F.pad({source.name}, {pads}, value={value})"])
            text = f"F.max_pool2d({padded}, {size})"
            self.write(text, [source], kind, path="max_pool2d", pools=True, run=run)
        else:
            self.call(self.any_max_pool(self.rank(source)), source, kind, pools=True, run=run)

    def smallest(self):
        """Smallest values, which are the largest of the negative ones."""
        source = self.value(lambda v: 1 < len(v.shape) < 4 and v.run < 3)
        if source is None:
            return
        block = self.module(Part(self.pick("a.amin(-1)", "a.min(-1)[0]", "torch.amin(a, dim=(1, -1), keepdim=True)")))
        self.write(f"self.{block}({source.name})", [source], "signed", run=source.run + 1)

    def rank(self, source):
        """Dimensions of space to pool: all but the channels', and where there are few, perhaps those as well."""
        rank = len(source.shape) - 1
        return rank if rank == 2 or (rank == 1 and self.chance()) else rank + 1

    def any_max_pool(self, rank=2):
        if self.chance(20):
            size = self.pick(1, 2, *([(None, 1), (2, None)] if rank == 2 else []))
            return (nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d)[rank - 1](size)
        options = {"padding": self.spelled(self.pick(0, 1), rank), "ceil_mode": self.chance(20)}
        options |= {"stride": spelled_stride(self.pick, rank)}
        return (nn.MaxPool1d, nn.MaxPool2d)[rank - 1](self.spelled(self.pick(2, 3), rank), **options)

    def max_pool_before_relu(self):
        one = self.value(lambda v: len(v.shape) == 3 and not v.routed)
        if one is None:
            return
        parts = [one]
        if self.chance(40):
            parts.append(self.value(lambda v: v.shape[1:] == one.shape[1:] and len(v.shape) == 3 and not v.routed))
        if parts[-1] is one:
            parts = [one]
        if all(part.kind == "spikes" for part in parts):
            return
        pool, relu = self.module(self.any_max_pool()), self.module(self.pick(nn.ReLU, nn.ReLU6)())
        joined = f"torch.cat([{', '.join(part.name for part in parts)}], 1)" if len(parts) > 1 else one.name
        pooled = f"self.{pool}({joined})"
        if self.chance(20):
            pooled += ".flatten(2)"
        self.write(f"self.{relu}({pooled})", parts, "spikes", path=relu, rectifies=True, pooled=pooled)

    def average(self):
        source = self.value(lambda v: len(v.shape) < 4)
        if source is None:
            return
        if len(source.shape) < 3:
            self.average_rows(source)
            return
        kind, name = "signed" if source.kind == "signed" else "positive", source.name
        whole = all(size in (1, 2, 4, 8) for size in source.shape[1:])
        how = self.pick("pool", "function", *(["adaptive", "mean", "keep"] if whole or not self.exact else []))
        if how == "pool":
            options = {"stride": spelled_stride(self.pick, 2), "padding": self.spelled(self.pick(0, 1))}
            if not self.exact:
                options |= {"count_include_pad": self.chance(), "ceil_mode": self.chance(20)}
            self.call(nn.AvgPool2d(self.spelled(2), **options), source, kind, run=source.run)
        elif how == "function":
            text = f"F.avg_pool2d({name}, {self.pick('2', '(2,)', '[2]', '2, []', '2, None, (1,)', '(2, 1), [1]')})"
            self.write(text, [source], kind, path="avg_pool2d", run=source.run)
        elif how == "adaptive":
            size = 1 if self.exact else self.pick(1, 2, 3)
            self.call(nn.AdaptiveAvgPool2d(size), source, kind, run=source.run)
        elif how == "mean":
            self.write(f"{name}.mean((2, 3))", [source], kind, path="mean", run=source.run)
        else:
            self.write(f"{name}.mean(3, keepdim=True)", [source], kind, path="mean", run=source.run)

    def add_up(self):
        """Sums along a dimension, as of an ordinal or a quantile network's steps."""
        source = self.value(lambda v: v.run < 3)
        if source is None:
            return
        kind, dim = "signed" if source.kind == "signed" else "positive", self.pick(*range(1, 1 + len(source.shape)), -1)
        name = source.name
        spelled = (f"{name}.cumsum({dim})", f"{name}.cumsum(dim={dim})", f"{name}.cumsum(np.int64({dim}))")
        text = self.pick(*spelled, f"torch.cumsum({name}, {dim})", f"torch.cumsum({name}, dim={dim})")
        self.write(text, [source], kind, path="cumsum", run=source.run + 1)

    def average_rows(self, source):
        """Of a sequence or a vector, which torch takes for a map without channels as well."""
        kind, rank = "signed" if source.kind == "signed" else "positive", self.rank(source)
        pool = (nn.AvgPool1d, nn.AvgPool2d)[rank - 1]
        options = {"stride": spelled_stride(self.pick, rank), "padding": self.spelled(self.pick(0, 1), rank)}
        self.call(pool(self.spelled(2, rank), **options), source, kind, run=source.run)

    def reshape(self):
        """Another shape for several places at once, and something that tells them apart behind it."""
        source = self.value(lambda v: len(v.shape) > 1)
        if source is None:
            return
        if len(source.shape) == 3 and self.chance(40):
            self.average()
            source = self.values[-1]
        value = self.reshaped(source)
        for _ in range(self.pick(0, 1, 2)):
            if value is None or value.run >= 3:
                return
            how = self.pick("constants", "itself", "alike", "again")
            if how == "constants":
                self.compute_with_constants(value)
            elif how == "itself":
                self.join(value, value)
            elif how == "alike":
                self.join(value)
            else:
                self.reshaped(value)
            value = self.values[-1]

    def reshaped(self, source):
        """A value of another shape, or of another order; None where it does not fit."""
        name, shape = source.name, source.shape
        units = math.prod(shape)
        last = len(shape)
        choices = [f"{name}.flatten(1)", f"{name}.flatten(-{last})", f"{name}.reshape({name}.size(0), -1)"]
        if last > 1:
            choices += [f"{name}.transpose(1, {self.pick(2, -1)})", f"{name}.transpose(-1, 1).flatten(1)"]
            choices += [f"{name}.permute(0, {', '.join(map(str, range(last, 0, -1)))}).flatten(1)"]
            choices += [f"{name}.flatten(1, 2)", f"{name}.flatten(-2)"]
        for rows in (2, 3, 4):
            if units % rows == 0:
                choices += [
                    f"{name}.reshape(-1, {rows}, {units // rows})",
                    f"{name}.flatten(1).unflatten(-1, [{rows}, -1])",
                ]
            if units % (2 * rows) == 0:
                choices += [
                    f"{name}.reshape({name}.shape[0], {rows}, 2, -1)",
                    f"{name}.flatten(1).unflatten(1, (2, {rows}, -1))",
                ]
        module = self.pick(None, None, nn.Flatten(), nn.Flatten(-last), nn.Flatten(1, -2), nn.Unflatten(-1, (-1, 1)))
        if module is not None:
            made = self.call(module, source, source.kind, run=source.run, alias=True)
        else:
            made = self.write(self.pick(*choices), [source], source.kind, run=source.run, alias=True)
        if not made:
            return None
        made[0].routed = True
        return made[0]

    def route(self):
        source = self.value()
        name, shape, last = source.name, source.shape, self.pick(1, -1)
        choices = [
            (f"F.dropout({name}, 0.5, self.training)", True),
            (f"{name}.contiguous()", True),
            (f"{name}[:, 1:]", True),
            (f"{name}[:, ::2]", True),
            (f"torch.roll({name}, {self.pick('1', '2', 'shifts=-1', '(1,)', 'np.int64(2)')}, dims={last})", False),
            (
                f"{name}.roll({self.pick('1, 1', '[-1], [-1]', 'shifts=3, dims=(1,)', '(1, 2), (1, -1)', '0, 1')})",
                False,
            ),
        ]
        if len(shape) == 3:
            channels, height, width = shape
            shuffle = f"{name}.view({name}.size(0), 2, {channels // 2}, {height}, {width}).transpose(1, 2)"
            choices += [
                (f"{name}[..., 1:]", True),
                (f"{name}[:, 0].unsqueeze(1)", True),
                (f"{name}.permute(0, 1, 3, 2)", True),
                (f"{name}.permute(0, 2, 1, 3)", True),
                (f"{name}.flatten(2)", True),
                (f"{name}.flatten(1)", True),
                (f"{name}.roll((1, -2), dims=({self.pick(1, 2)}, 3))", False),
                (f"{shuffle}.reshape({name}.size(0), -1, {height}, {width})", True),
            ]
        text, alias = self.pick(*choices)
        keeps = "dropout" in text or "contiguous" in text
        for made in self.write(text, [source], source.kind, run=source.run, alias=alias):
            made.routed = source.routed or not keeps
            made.weighted = keeps and source.weighted

    def resize(self):
        """Padding, cropping, nearest upsampling."""
        source = self.value(lambda v: len(v.shape) == 3)
        if source is None:
            return
        name = source.name
        pads = [nn.ZeroPad2d((1, 2)), nn.ZeroPad1d([1, 0, 0, 1]), nn.ConstantPad2d((0, 1), 0), nn.ZeroPad2d(-1)]
        pads += [nn.ReplicationPad2d(np.int64(1)), nn.ReflectionPad1d((0, 1, 1, 0))]
        choices = [
            f"F.pad({name}, (1, 0, 0, 1))",
            f"F.pad({name}, (-1, 1))",
            f"F.pad({name}, (1, 1, 0, 0), mode='reflect')",
            f"F.pad({name}, [0, 1])",
            f"F.interpolate({name}, scale_factor={self.pick('2', '2.0', '(2, 1)', '[1, 2.0]')})",
            f"F.interpolate({name}, scale_factor=1.4, recompute_scale_factor=True)",
            f"F.interpolate({name}, scale_factor=2, mode='bilinear')",
            *(
                []
                if self.exact
                else [
                    f"F.interpolate({name}, size=(5, 3), mode='bilinear', align_corners=True)",
                    f"F.interpolate({name}, size=(4, 5), mode='bicubic')",
                ]
            ),
            f"F.interpolate({name}, size={self.pick('5', '(3, 5)', '[4, 4]')}, mode='nearest-exact')",
        ]
        what = self.pick("module", "function", "function")
        if what == "module":
            made = self.call(self.pick(*pads), source, source.kind, run=source.run)
        else:
            text = self.pick(*choices)
            if "scale_factor" in text and max(source.shape) > 4:
                return
            linear = "linear" in text or "bicubic" in text
            kind = source.kind if not linear else "signed" if "bicubic" in text else self.added(source)
            path = "interpolate" if "interpolate" in text else ""
            made = self.write(text, [source], kind, path=path, run=source.run + linear)
            if linear:
                return
        for value in made:
            value.routed = True

    @staticmethod
    def added(source):
        """Kind of what adds units up."""
        return "signed" if source.kind == "signed" else "positive"

    def split(self):
        source = self.value(lambda v: v.shape[0] > 1)
        if source is None:
            return
        text = f"{source.name}.chunk(2, dim=1)"
        for made in self.write(text, [source], source.kind, run=source.run, alias=True, names=2):
            made.routed = True

    OPERATIONS = (
        *(["rectify"] * 4 + ["weigh"] * 3 + ["branch"] * 3 + ["join"] * 2 + ["concatenate"] * 2),
        *(["broadcast"] * 2 + ["compare"] * 2 + ["copy"] * 3 + ["put_beside"]),
        *("bottleneck", "normalise", "compute_with_constants", "max_pool_before_relu", "add_up", "split", "smallest"),
        *(["route"] * 3 + ["resize"] * 3 + ["reshape"] * 3 + ["max_pool"] * 3 + ["average"] * 2),
    )

    def end(self):
        """Bring what nobody has used so far together, and let one value out."""
        ends = self.pick("linear", "linear", "linear", "relu", "average", "flat", "as it is")
        if ends == "flat" and len(self.values[-1].shape) == 3:
            self.average()
            if self.chance():
                self.compute_with_constants(self.values[-1] if self.values[-1].run < 3 else None)
            latest = self.values[-1]
            if len(latest.shape) > 1 and latest.kind != "spikes":
                self.write(f"{latest.name}.flatten(1)", [latest], latest.kind, run=latest.run)
                return
        latest = self.values[-1]
        if ends == "average" and len(latest.shape) == 3 and (latest.kind != "spikes") and not self.exact:
            text = f"F.adaptive_avg_pool2d({latest.name}, 1).flatten(1)"
            self.write(text, [latest], latest.kind, path="adaptive_avg_pool2d", run=latest.run)
            return
        if ends == "as it is" and latest.kind != "spikes":
            return
        leaves = [v for v in self.values[1:] if not v.used and v.run < 3][-3:] or [self.value(lambda v: v.run < 3)]
        if len(leaves) > 1:
            flat = ", ".join(f"{leaf.name}.flatten(1)" for leaf in leaves)
            self.write(f"torch.cat([{flat}], 1)", leaves, "signed", run=max(leaf.run for leaf in leaves))
        elif len(leaves[0].shape) > 1:
            self.write(f"{leaves[0].name}.flatten(1)", leaves, "signed", run=leaves[0].run)
        self.call(nn.Linear(math.prod(self.values[-1].shape), self.pick(3, 1, 4)), self.values[-1], "signed")
        logits = self.values[-1]
        if logits.shape == (1,) and self.chance():
            # One logit without a class dimension.
            way = self.pick("squeeze(1)", "squeeze(-1)", "flatten()", "view(-1)", "reshape(-1)")
            self.write(f"{logits.name}.{way}", [logits], logits.kind, run=logits.run)
        if ends == "relu":
            self.rectify(self.values[-1])


COMPUTED = {
    "pruned": lambda module: prune.l1_unstructured(module, "weight", 0.3),
    "pruned twice": lambda module: (
        prune.random_unstructured(module, "weight", 0.2),
        prune.l1_unstructured(module, "weight", 0.2),
    ),
    "weight norm": lambda module: parametrizations.weight_norm(module),
    "spectral norm": lambda module: parametrizations.spectral_norm(module),
    "old weight norm": lambda module: old_weight_norm(module),
    "old spectral norm": lambda module: nn.utils.spectral_norm(module),
}
"""Ways to let a network compute a module's weight in front of it."""


def old_weight_norm(module):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        nn.utils.weight_norm(module)


def compute_weights(way, module):
    """Let a module's weight be computed in front of it, of numbers loaded since it last ran without gradients."""
    COMPUTED[way](module)
    like = module.weight
    inputs = torch.rand(1, like.shape[1] * getattr(module, "groups", 1), *[8 * size for size in like.shape[2:]])
    with torch.no_grad():
        module.eval()(inputs.to(like))
        for name, tensor in module.state_dict().items():
            if name.endswith(("weight_orig", "weight_v", "original1", "original")):
                tensor.mul_(torch.rand_like(tensor) + 0.5)


@st.composite
def random_nets(draw, *, exact=False, dtypes=(torch.float32, torch.float32, torch.float64), vectors=True):
    """Random networks that can be converted, with calibration images on which every ReLU is alive.

    Parameters
    ----------
    exact : bool
        Average over powers of two only, so that fixed-point weights stay fixed-point.
    dtypes : tuple
        Types of the weights to draw from.
    vectors : bool
        Draw networks on vectors as well.
    """
    torch.manual_seed(draw(st.integers(0, 2**16)))
    image = (draw(st.integers(1, 3)), draw(st.integers(4, 6)), draw(st.integers(4, 6)))
    # As many channels as places in a row hide what takes one for the other.
    square, sequence = draw(st.sampled_from([(4, 4, 4), (4, 4)])), (draw(st.integers(1, 4)), draw(st.integers(4, 6)))
    others = [(draw(st.integers(2, 6)),), sequence] if vectors else []
    shape = draw(st.sampled_from([image, image, image, square if vectors else (4, 4, 4), *others]))
    preprocessing = None
    if draw(st.integers(0, 99)) >= 75:
        preprocessing = ((torch.rand(shape[0]) * 0.5).tolist(), (torch.rand(shape[0]) * 0.4 + 0.2).tolist())
    writer = _Writer(draw, shape, exact, preprocessing is not None)
    writer.weigh(writer.values[0])
    for _ in range(draw(st.integers(2, 8))):
        getattr(writer, writer.pick(*writer.OPERATIONS))()
    writer.end()
    text = " ".join(line.text for line in writer.lines)
    modules = {name: module for name, module in writer.modules.items() if re.search(rf"self\.{name}\b", text)}
    with torch.no_grad():
        for module in modules.values():
            if isinstance(module, WEIGHTED):
                module.weight.mul_(1.5)
                if module.bias is not None:
                    module.bias.add_(0.1)
    net = RandomNet(
        ann=Net(writer.lines, modules).to(draw(st.sampled_from(dtypes))),
        input_shape=shape,
        calibration=torch.rand(30, *shape),
        images=torch.rand(draw(st.integers(1, 3)), *shape),
        preprocessing=preprocessing,
    )
    for module in net.ann.children():
        if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Linear) and draw(st.integers(0, 99)) >= 90:
            compute_weights(draw(st.sampled_from(sorted(COMPUTED))), module)
    net.images[torch.rand(net.images.shape) < 0.1] = 0.0
    net.images[torch.rand(net.images.shape) < 0.1] = 1.0
    if exact:
        net.images = round_half_up(net.images * 2**8) / 2**8
    assume(_alive(net) and _computes(net.ann) and _names_stay(net.ann))
    return net


def _live_lines(ann):
    """Lines that the output is computed of, from the last on; what one changes in place is not followed."""
    live = {ann.lines[-1].names[0]}
    for line in reversed(ann.lines):
        if not live.isdisjoint(line.names):
            live |= set(re.findall(r"\b(?:v\d+|x)\b", line.text))
            yield line


def _names_stay(ann):
    """Whether no line that is computed in vain, and left out, takes the first of several names of one call."""
    live = list(_live_lines(ann))
    idle = {_without_number(line.path) for line in ann.lines if line not in live and line.path}
    return idle.isdisjoint(_without_number(line.path) for line in live)


def _is_normalised(ann, name):
    """Whether a batch norm takes a value."""
    called = [re.search(rf"self\.(m\d+)\({name}\)", line.text) for line in ann.lines]
    return any(found and isinstance(ann.get_submodule(found[1]), nn.modules.batchnorm._BatchNorm) for found in called)


def _without_number(path):
    return re.sub(r"_\d+$", "", path)


def _computes(ann):
    """Whether weights or a ReLU stand between the input and the output, and not the host's operations alone."""
    found = False
    for line in _live_lines(ann):
        modules = [ann.get_submodule(name) for name in re.findall(r"self\.(m\d+)\b", line.text)]
        found |= line.rectifies or any(isinstance(module, WEIGHTED) for module in modules)
    return found


def _alive(net):
    """Whether every line gives something on the calibration images."""
    ann, known = copy.deepcopy(net.ann).double().eval(), {"x": normalise(net.calibration, net.preprocessing)}
    with torch.no_grad():
        for line in ann.lines:
            values = line.values(ann, known)
            if any(float(drive.max()) < 0.01 for drive in line.drives(ann, known).values()):
                return False
            known.update(values)
            if any(float(value.abs().max()) < 0.01 for value in values.values()):
                return False
    return True


def pools_mixed_scales(net, refusal):
    """Whether a refusal is that of a pool over units of different scales, and names a pool of this network."""
    pools = {line.path for line in net.ann.lines if line.pools}
    kinds = nn.MaxPool1d | nn.MaxPool2d | nn.AdaptiveMaxPool1d | nn.AdaptiveMaxPool2d
    pools |= {name for name, module in net.ann.named_modules() if isinstance(module, kinds)}
    return "pools units of different scales" in str(refusal) and str(refusal).split("'")[1] in pools


def own_windows(draw, snn):
    """Options of ``convert`` that give some layers, and perhaps the input, windows of their own."""
    names = ["input", *(layer.name for layer in snn.graph.layers)]
    chosen = draw(st.sets(st.sampled_from(names), min_size=1))
    return {name: {"t_max": draw(st.integers(2, 9))} for name in sorted(chosen)}


def make_exact(snn):
    """Round weights and biases to few binary places and compute in float64: sums are then exact in any order.

    2**-8 where few maps stand in a row, else 2**-5.
    """
    deepest, depth = 0, {}
    for node in snn.graph_module.graph.nodes:
        module = snn.graph_module.get_submodule(node.target) if node.op == "call_module" else None
        before = max((depth[source] for source in node.all_input_nodes), default=0)
        if isinstance(module, TTFSNeuron):
            before = 0
        depth[node] = before + (getattr(module, "weight", None) is not None)
        deepest = max(deepest, depth[node])
    unit = 2.0 ** (8 if deepest <= 4 else 5)
    with torch.no_grad():
        for layer in snn.graph.layers:
            if layer.neuron.bias is not None:
                # Towards 0, so that no bias spike comes before the clock starts.
                layer.neuron.bias.copy_(torch.trunc(layer.neuron.bias * unit) / unit)
        for weight in snn.graph_module.parameters():
            weight.copy_(round_half_up(weight * unit) / unit)
    return snn.double()


class Clock:
    """Steps all nodes of a converted network together on the global clock, by DESIGN.md section 3, in float64.

    Reads the graph's modules and the neurons' parameters; neurons, first-spike pools, delays and biases in time
    are written here once more.

    Parameters
    ----------
    snn : SpikingNetwork
        The network; not changed.
    recorded : dict, optional
        Layer name -> global spike steps that its targets get in place of its own. Each layer is then judged on
        the spikes that the layers before it were recorded to send.

    Attributes
    ----------
    spike_steps : dict
        Layer name -> step at which each neuron fires, -1 where it does not.
    margins : dict
        Layer name -> how near to its threshold each membrane came in the steps in which it might have fired.
    """

    def __init__(self, snn, images, recorded=None):
        self.graph, self.recorded = snn.graph, recorded or {}
        self.module = copy.deepcopy(snn.graph.module).double()
        self.spike_steps, self.margins = {}, {}
        self.current, self.membrane, self.queues, self.passed = {}, {}, {}, {}
        window = self.graph.t_max - 1
        drive = images.to(snn.graph.dtype).numpy() * window
        levels = torch.from_numpy(drive + 0.5).floor()
        self.input_steps = (window - levels).int()
        if self.graph.settings["rectifier"] == "silent":
            self.input_steps[levels == 0] = -1
        self.spike_steps["input"] = self.recorded.get("input", self.input_steps)
        with torch.no_grad():
            for step in range(snn.n_steps):
                self.advance(step)

    def advance(self, step):
        values = {}
        for node in self.module.graph.nodes:
            if node.op == "placeholder":
                values[node] = (self.spike_steps["input"] == step).double()
            elif node.op == "call_module":
                module, name = self.module.get_submodule(node.target), str(node.target)
                arrived = [values[source] for source in node.args]
                if isinstance(module, TTFSNeuron):
                    spikes = self.neuron(name, module.p, arrived[0], step)
                    values[node] = (self.recorded[name] == step).double() if name in self.recorded else spikes
                elif isinstance(module, FirstSpikeMaxPool):
                    values[node] = self.first_spike(name, module.pool, arrived[0])
                elif isinstance(module, AxonalDelay):
                    queue = self.queues.setdefault(name, [torch.zeros_like(arrived[0])] * module.steps)
                    queue.append(arrived[0])
                    values[node] = queue.pop(0)
                else:
                    values[node] = module(*arrived)

    def first_spike(self, name, pool, spikes):
        first = pool(spikes)
        passed = self.passed.get(name, torch.zeros_like(first))
        first = first * (1 - passed)
        self.passed[name] = passed + first
        return first

    def neuron(self, name, p, arrived, step):
        if name not in self.membrane:
            self.current[name] = torch.zeros_like(arrived)
            self.membrane[name] = torch.zeros_like(arrived)
            self.spike_steps[name] = torch.full(arrived.shape, -1, dtype=torch.int32)
            self.margins[name] = torch.full(arrived.shape, math.inf, dtype=torch.float64)
        window = p.t_max - 1
        readout = p.layer * window if p.readout is None else p.readout
        start = readout - (p.input_window or window)
        last = readout + (window if p.rectifier else 2 * window)
        if step > last or (p.rectifier == "silent" and step == last):
            return torch.zeros_like(arrived)

        current = self.current[name] + arrived
        bias_steps = None
        if p.bias is not None and p.bias_code == "spike":
            # In the bias's own type: float32 has halves that float64 has not.
            bias = self.graph.module.get_submodule(name).bias.clamp(-1.5, 1.5)
            bias_steps = start + torch.round(p.input_window * (2.0 - bias)) - p.input_window
            current = current + (bias_steps == step)
        elif p.bias is not None and step == start:
            current = current + p.bias
        if step == readout:
            current = torch.ones_like(current)
            if bias_steps is not None:
                current = current * (bias_steps <= step)
        membrane = self.membrane[name] + current
        self.current[name], self.membrane[name] = current, membrane

        waiting = self.spike_steps[name] == -1
        fires = membrane >= window + 0.5
        if p.hold and step < readout:
            fires = torch.zeros_like(fires)
        else:
            margin = torch.where(waiting, (membrane - (window + 0.5)).abs(), math.inf)
            self.margins[name] = torch.minimum(self.margins[name], margin)
        if p.rectifier == "spike" and step == last:
            fires = torch.ones_like(fires)
        fires = fires & waiting
        self.spike_steps[name][fires] = step
        return fires.double()


def assert_the_clock_agrees(snn, images, spike_steps):
    """Every layer fires when the clock does, on the spikes that it was recorded to get; but for ties."""
    clock = Clock(snn, images, recorded=spike_steps)
    near = ((images.double() * (snn.t_max - 1)) % 1 - 0.5).abs() < TIE
    assert (clock.input_steps == spike_steps["input"])[~near].all()
    assert list(clock.spike_steps) == list(spike_steps)
    for name, margin in clock.margins.items():
        wrong = (clock.spike_steps[name] != spike_steps[name]) & (margin >= TIE)
        assert not wrong.any(), (
            f"{name}: {int(wrong.sum())} of {wrong.numel()} neurons fire at another step, e.g. at "
            f"{spike_steps[name][wrong][0]} for {clock.spike_steps[name][wrong][0]}"
        )


class _NeuronsElsewhereError(Exception):
    """A ReLU's neurons stand in front of a pool, behind which its line is."""


def _names_of_layers(lines):
    """Names that the layers of these lines may have."""
    for line in lines:
        for path in (line.path, *(f"{line.path}_{call}" for call in range(2, 7))):
            yield from (path, f"{path}_neurons", f"{path}_positive", f"{path}_negative")


def assert_the_ann_agrees(net, snn, spike_steps):
    """See :func:`_assert_the_ann_agrees`; returns whether the network could be judged so."""
    try:
        return _assert_the_ann_agrees(net, snn, spike_steps)
    except _NeuronsElsewhereError:
        return False


def _assert_the_ann_agrees(net, snn, spike_steps):
    """The ANN itself, in float64 with each spiking layer rounded and clipped, has the values that the layer encodes.

    Every layer hands on what the spikes recorded there encode, so that each is judged on the spikes it got. Every
    layer of the spiking network must have been met once.

    Returns whether it was judged: lines that get neurons inside of them (comparisons, pools whose ReLU stands behind a
    norm, constants beside signed values) are the clock's alone.
    """
    graph, seen = snn.graph, []
    lengths = {layer.name: layer.neuron.clock.window for layer in graph.layers}
    output = graph.layers[-1].name
    if not lengths.keys() <= {output, *_names_of_layers(net.ann.lines)}:
        return False

    def encoded(name, value):
        seen.append(name)
        levels = fired_levels(graph, name, spike_steps[name]).double()
        if levels.numel() != value.numel():
            raise _NeuronsElsewhereError
        levels = levels.reshape(value.shape)
        shift = graph.output_shift if name == output else graph.shifts.get(name, 0.0)
        drive = (value - shift) * (lengths[name] / graph.scales[name].double())
        lowest = -lengths[name] if graph.layers[-1].neuron.p.rectifier is None and name == output else 0
        expected = round_half_up(drive).clamp(lowest, lengths[name])
        assert_equal_but_for_ties(levels, expected, drive, name)
        return levels / lengths[name] * graph.scales[name].double() + shift

    def by_a_pair(line, value):
        """A signed value, by the pair of layers that carries it, if one does."""
        name = line.path if line.calls == 1 else f"{line.path}_{line.calls}"
        if f"{name}_positive" not in lengths:
            return value
        return encoded(f"{name}_positive", value) - encoded(f"{name}_negative", -value)

    pooled = []

    def in_front_of_pools(line, value):
        """What a line pools: by neurons of its own, or by those that another pool of the same value has."""
        if f"{line.path}_neurons" in lengths:
            pooled.append((value, encoded(f"{line.path}_neurons", value)))
            return pooled[-1][1]
        for other, found in pooled:
            if other.data_ptr() == value.data_ptr() and other.shape == value.shape:
                return found
        return value

    ann, length = copy.deepcopy(net.ann).double().eval(), graph.t_max - 1
    drive = net.images.double() * length
    levels = fired_levels(graph, "input", spike_steps["input"]).double()
    assert_equal_but_for_ties(levels, round_half_up(drive), drive, "input")
    known = {"x": normalise(levels / length, net.preprocessing)}
    with torch.no_grad():
        for line in ann.lines:
            if line.pooled:
                # Neurons stand in front of the pool, on each of what it pools.
                names, rectified = [line.path, f"{line.path}_2"], {}
                relu = ann.get_submodule(line.path)
                for name, source in zip(names, line.sources, strict=False):
                    # Two names of one value, as dropout makes them, have the same neurons.
                    same = [other for other in rectified if known[other].data_ptr() == known[source].data_ptr()]
                    if same and known[same[0]].shape == known[source].shape:
                        rectified[source] = rectified[same[0]]
                        continue
                    value = relu(known[source].clone())
                    rectified[source] = encoded(name, value) if name in lengths else value
                value = line.values(ann, known | rectified, line.pooled)[line.names[0]]
            elif line.inside:
                drives = line.drives(ann, known).items()
                rectified = {
                    f"r{place}": encoded(name, drive) if name in lengths else drive.relu()
                    for place, (name, drive) in enumerate(drives)
                }
                value = by_a_pair(line, eval(line.rest, _WORDS, {"self": ann, **known, **rectified}))
            else:
                if line.pools:
                    (source,) = line.sources
                    if _is_normalised(ann, line.names[0]):
                        # The norm may be moved in front of the pool, and of its neurons.
                        raise _NeuronsElsewhereError
                    values = line.values(ann, known | {source: in_front_of_pools(line, known[source])})
                    (out,) = values.values()
                    signed = bool((known[source] < 0).any()) and f"{line.path}_neurons" not in lengths
                    if signed and out.numel() == known[source].numel():
                        # Moved behind a ReLU, whose neurons are as many as the pooled values.
                        raise _NeuronsElsewhereError
                else:
                    values = line.values(ann, known)
                if len(values) > 1:
                    known.update(values)
                    continue
                (value,) = values.values()
                same = [name for name, other in known.items() if other is value]
                if line.rectifies and line.path in lengths:
                    value = encoded(line.path, value)
                elif not line.rectifies:
                    value = by_a_pair(line, value)
                # In place: who uses what the line has changed sees the change.
                known.update(dict.fromkeys(same, value))
            known[line.names[0]] = value
    if graph.outputs.program is not None:
        # The last lines are the host's, and the output encodes what is in front of them.
        seen.append(output)
    elif output not in seen:
        encoded(output, known[ann.lines[-1].names[0]])
    assert sorted(seen) == sorted(lengths)
    return True
