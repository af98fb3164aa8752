"""The table of operators: every function, method and module in it, what users add to it, and the page that shows it."""

import copy
import math
import operator
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.conversions import assert_same_spikes
from helpers.one_by_one import OneByOne, as_lists, changes_on_the_clock
from helpers.random_graphs import make_exact
from torch import nn
from torch.nn import functional as F

import quartz_plugin
from quartz_plugin import ConversionError
from quartz_plugin.convert.symbolic import Tracer
from quartz_plugin.convert.trace import trace
from quartz_plugin.costs import InferenceCounts
from quartz_plugin.operators import choices
from quartz_plugin.operators.interpolation import BicubicInterpolate, Interpolate
from quartz_plugin.operators.table import FUNCTIONS, OPERATORS, RULES, Role, operator_table, page

# Many levels, so that rounding is far smaller than any mistake.
FINE = {"t_max": 1 << 20, "percentile": 100}


class Around(nn.Module):
    """Convolution, ReLU, what is tested on [B, 4, 6, 6], and a signed output."""

    def __init__(self, tested, relu=True):
        super().__init__()
        self.conv, self.tested, self.relu = nn.Conv2d(2, 4, 3, padding=1), tested, relu
        self.weight = nn.Parameter(torch.randn(4, 4, 2, 2))
        self.line = nn.Parameter(torch.randn(4, 4, 2))
        self.matrix = nn.Parameter(torch.randn(6, 3))
        self.register_buffer("mean", torch.rand(4))
        self.register_buffer("var", torch.rand(4) + 0.5)
        self.is_module = isinstance(tested, nn.Module)

    def forward(self, x):
        x = self.conv(x)
        x = x.relu() if self.relu else x
        return (self.tested(x) if self.is_module else self.tested(self, x)).flatten(1)


def assert_converts(ann, shape=(2, 6, 6), **options):
    ann = ann.double().eval()
    with torch.no_grad():
        ann.conv.bias.add_(0.3)
    images = torch.rand(30, *shape)
    wanted = ann(images.double()).detach()
    assert wanted.abs().max() > 0.01
    snn = quartz_plugin.convert(ann, images, **(FINE | options))
    torch.testing.assert_close(snn(images), wanted, rtol=0, atol=2e-4)
    return snn


def sequence(x):
    return x.flatten(2)


def volume(x):
    """[B, 4, H, W] as 2 channels of 2 slices."""
    return x.unflatten(1, (2, 2))


def above(x, compare=operator.gt):
    """ReLU, as a product with a comparison."""
    return compare(x, 0) * x


def places(like, count):
    """Places from 0 to `count`, without it, in turn; the same for each image."""
    sample = like.shape[1:]
    return torch.zeros_like(like, dtype=torch.int64) + (torch.arange(math.prod(sample)) % count).view(sample)


EXAMPLES = {
    F.conv1d: lambda net, x: F.conv1d(sequence(x), net.line, net.mean, 2, padding=1),
    torch.conv1d: lambda net, x: torch.conv1d(sequence(x), net.line),
    F.conv3d: lambda net, x: F.conv3d(volume(x), net.weight.view(4, 2, 2, 2, 2), net.mean, (1, 2, 1), (0, 1, 0)),
    torch.conv3d: lambda net, x: torch.conv3d(volume(x), net.weight[:, :1].unsqueeze(2), None, groups=2),
    F.conv_transpose3d: lambda net, x: F.conv_transpose3d(volume(x), net.weight[:2].unsqueeze(2), net.mean, (1, 2, 1)),
    F.conv2d: lambda net, x: F.conv2d(x, net.weight[:, :2], None, 1, 1, 1, 2),
    torch.conv2d: lambda net, x: torch.conv2d(x, net.weight, net.mean, stride=2),
    F.conv_transpose1d: lambda net, x: F.conv_transpose1d(sequence(x), net.line, net.mean, 2, 1, 1),
    F.conv_transpose2d: lambda net, x: F.conv_transpose2d(x, net.weight, None, 2, groups=2),
    F.linear: lambda net, x: F.linear(x, net.matrix.t(), net.mean[:3]),
    torch.matmul: lambda net, x: torch.matmul(x, net.matrix),
    operator.matmul: lambda net, x: x @ net.matrix,
    "matmul": lambda net, x: (
        net.matrix.t().matmul(x.matmul(net.matrix)) + (net.mean @ x[:, :, :4]).unsqueeze(2) @ net.matrix
    ),
    torch.einsum: lambda net, x: (
        torch.einsum("bchw,wo->bohc", x, net.matrix)[:, :, 0]
        + torch.einsum("oh,...hc,c->...o", [net.matrix.t(), x.transpose(1, 3).transpose(1, 2), net.mean]).transpose(
            1, 2
        )[..., :4]
        + torch.einsum("cio,bcih->boc", net.weight[:, :, 0].repeat(1, 2, 2)[:, :6, :3], x)
    ),
    torch.bmm: lambda net, x: torch.bmm(x.flatten(1, 2), torch.zeros_like(x[:, 0, :, :3]) + net.matrix),
    "bmm": lambda net, x: x[:, 1].bmm(torch.zeros_like(x[:, 0, :, :3]) + net.matrix),
    torch.addmm: lambda net, x: torch.addmm(net.mean[:3], x[:, 0, 0], net.matrix, beta=0.5, alpha=2),
    torch.baddbmm: lambda net, x: torch.baddbmm(x[:, 0, :, :3], x[:, 1], torch.zeros_like(x[:, 0, :, :3]) + net.matrix),
    F.batch_norm: lambda net, x: F.batch_norm(x, net.mean, net.var, net.var, net.mean),
    operator.mul: lambda net, x: 0.5 * x * net.mean.view(4, 1, 1),
    operator.imul: lambda net, x: operator.imul(x, 0.5),
    torch.mul: lambda net, x: torch.mul(x, net.mean.view(1, 4, 1, 1)),
    torch.multiply: lambda net, x: torch.multiply(x, -2),
    "mul": lambda net, x: x.mul(3.0),
    "mul_": lambda net, x: x.mul_(3.0),
    operator.truediv: lambda net, x: x / 2,
    operator.itruediv: lambda net, x: operator.itruediv(x, 2),
    torch.div: lambda net, x: torch.div(x, net.var.view(4, 1, 1)),
    "div": lambda net, x: x.div(4),
    "div_": lambda net, x: x.div_(4),
    operator.neg: lambda net, x: -x,
    torch.neg: lambda net, x: torch.neg(x),
    "neg": lambda net, x: x.neg(),
    operator.add: lambda net, x: 0.25 + x + (x + net.mean.view(4, 1, 1)),
    operator.iadd: lambda net, x: operator.iadd(x.clone(), x),
    torch.add: lambda net, x: torch.add(x, x, alpha=-0.5),
    "add": lambda net, x: x.add(x, alpha=2),
    "add_": lambda net, x: x.add_(0.5),
    operator.sub: lambda net, x: 1 - x - (x - 0.5),
    operator.isub: lambda net, x: operator.isub(x, 0.5),
    torch.sub: lambda net, x: torch.sub(x, 0.5),
    "sub": lambda net, x: x.sub(x * 0.25, alpha=2),
    "sub_": lambda net, x: x.sub_(0.5),
    F.avg_pool1d: lambda net, x: F.avg_pool1d(sequence(x), 5, 2, 2, True, False),
    F.avg_pool2d: lambda net, x: F.avg_pool2d(x, 3, 2, 1, ceil_mode=True, count_include_pad=False, divisor_override=5),
    F.avg_pool3d: lambda net, x: F.avg_pool3d(volume(x), (2, 3, 1), 1, (1, 0, 0)),
    F.adaptive_avg_pool3d: lambda net, x: F.adaptive_avg_pool3d(volume(x), (1, 4, None)),
    F.max_pool3d: lambda net, x: F.max_pool3d(volume(x), (2, 3, 2), 2, (0, 1, 0)),
    F.adaptive_max_pool3d: lambda net, x: F.adaptive_max_pool3d(volume(x), (1, 4, 2)),
    F.dropout3d: lambda net, x: F.dropout3d(volume(x), training=net.training),
    F.feature_alpha_dropout: lambda net, x: F.feature_alpha_dropout(x, training=net.training),
    F.adaptive_avg_pool1d: lambda net, x: F.adaptive_avg_pool1d(sequence(x), 7),
    F.adaptive_avg_pool2d: lambda net, x: F.adaptive_avg_pool2d(x, (4, 1)),
    torch.mean: lambda net, x: torch.mean(x, (1, 3), keepdim=True),
    "mean": lambda net, x: x.mean([2, 3]),
    torch.sum: lambda net, x: torch.sum(x, 1),
    "sum": lambda net, x: x.sum(-1, keepdim=True),
    torch.cumsum: lambda net, x: torch.cumsum(x, -1),
    "cumsum": lambda net, x: x.cumsum(dim=1) - x.cumsum(2) + x.flatten(1).cumsum(1).view(-1, 4, 6, 6),
    F.relu: lambda net, x: F.relu(x - 0.3, inplace=True),
    F.relu_: lambda net, x: F.relu_(x - 0.3),
    torch.relu: lambda net, x: torch.relu(x - 0.3),
    torch.relu_: lambda net, x: torch.relu_(x - 0.3),
    "relu": lambda net, x: (x - 0.3).relu(),
    "relu_": lambda net, x: (x - 0.3).relu_(),
    F.relu6: lambda net, x: F.relu6(8 * x),
    F.hardtanh: lambda net, x: F.hardtanh(x, 0.0, 0.5),
    F.hardtanh_: lambda net, x: F.hardtanh_(x - 0.1, 0, 0.5),
    torch.clamp: lambda net, x: torch.clamp(x - 0.1, 0, 0.4),
    torch.clip: lambda net, x: torch.clip(x - 0.1, min=0),
    "clamp": lambda net, x: (x - 0.1).clamp(min=0.0, max=0.4),
    "clamp_": lambda net, x: (x - 0.1).clamp_(0),
    "clip": lambda net, x: (x - 0.1).clip(0, 0.3),
    "clamp_min": lambda net, x: (x - 0.1).clamp_min(0),
    "clamp_min_": lambda net, x: (x - 0.1).clamp_min_(0),
    torch.clamp_min: lambda net, x: torch.clamp_min(x - 0.1, 0.2),
    torch.clamp_max: lambda net, x: torch.clamp_max(x, 0.3),
    "clamp_max": lambda net, x: (x - 0.5).clamp_max(0.1) + x.clamp_max(net.mean.view(4, 1, 1)),
    "clamp_max_": lambda net, x: (x - 0.1).clamp_max_(0.3),
    torch.maximum: lambda net, x: torch.maximum(x - 0.4, x.flip(2) * 0.5 - 0.3),
    "maximum": lambda net, x: (x - 0.4).maximum(net.mean.view(4, 1, 1)) + (x - 0.3).maximum(torch.zeros(())),
    torch.minimum: lambda net, x: torch.minimum(net.mean.view(4, 1, 1), x[:, :1]),
    "minimum": lambda net, x: x.minimum(x.mean((1, 2, 3), keepdim=True)),
    torch.min: lambda net, x: torch.min(x, x.roll(1, 2)) + torch.min(x - 0.3, 3, keepdim=True).values,
    "min": lambda net, x: x.min(x.roll(1, 2)) + x.min(dim=1)[0].unsqueeze(1),
    torch.amin: lambda net, x: torch.amin(x, (1, 3)),
    "amin": lambda net, x: x.amin((2, 3), keepdim=True),
    torch.abs: lambda net, x: torch.abs(x - x.flip(3)),
    "abs": lambda net, x: (x - 0.3).abs(),
    operator.gt: lambda net, x: (y := x - 0.3) * (y > 0) + above(x - 0.2),
    torch.gt: lambda net, x: torch.where(torch.gt(x, 0.4), x, 0.4),
    "gt": lambda net, x: x.where(x.gt(y := x.flip(3)), y),
    operator.ge: lambda net, x: above(0.3 - x, operator.ge),
    torch.ge: lambda net, x: above(x - 0.3, torch.ge),
    "ge": lambda net, x: (y := x - 0.3) * y.ge(0).to(x.dtype).type_as(x),
    operator.lt: lambda net, x: (y := x - 0.3) * (y < 0),
    torch.lt: lambda net, x: torch.where(torch.lt(x, 0.2), x, torch.zeros_like(x) + 0.2),
    "lt": lambda net, x: (y := x - 0.3) * y.lt(0).double(),
    operator.le: lambda net, x: torch.where(x <= net.mean.view(4, 1, 1), net.mean.view(4, 1, 1), x),
    torch.le: lambda net, x: torch.le(y := x - 0.3, 0) * y,
    "le": lambda net, x: (y := x - 0.3).masked_fill(y.le(0), 0.0),
    operator.invert: lambda net, x: ~((y := x - 0.3) <= 0) * y,
    torch.logical_not: lambda net, x: torch.logical_not((y := x - 0.3) > 0) * y,
    "logical_not": lambda net, x: ((y := x - 0.3) > 0).logical_not().type(x.dtype) * y,
    torch.bitwise_not: lambda net, x: torch.bitwise_not((y := x - 0.3) > 0) * y,
    torch.where: lambda net, x: torch.where((y := x - 0.3) > 0, y, 0),
    "where": lambda net, x: (y := x - 0.3).where(y > 0, torch.zeros_like(y)),
    torch.masked_fill: lambda net, x: torch.masked_fill(y := x - 0.3, y < 0, 0),
    "masked_fill": lambda net, x: (y := x - 0.3).masked_fill(y < 0, 0),
    "masked_fill_": lambda net, x: (y := x - 0.3).masked_fill_(y < 0, 0) + y,
    F.threshold: lambda net, x: F.threshold(x - 0.3, 0, 0),
    F.threshold_: lambda net, x: F.threshold_(x - 0.3, 0.0, 0.0),
    torch.amax: lambda net, x: torch.amax(x, (1, 3)),
    "amax": lambda net, x: x.amax((2, 3), keepdim=True),
    torch.max: lambda net, x: torch.max(x, 1)[0] + torch.max(x, 2, keepdim=True).values[:, 0],
    "max": lambda net, x: x.flatten(1).max(dim=1)[0].unsqueeze(1) + x.flatten(2).max(2).values,
    getattr: lambda net, x: x.mT + x.max(2, keepdim=True).values,
    F.max_pool1d: lambda net, x: F.max_pool1d(sequence(x), 3, 2, 1, 1, True),
    F.max_pool2d: lambda net, x: F.max_pool2d(x, 3, 2, 1, 1, True),
    F.adaptive_max_pool1d: lambda net, x: F.adaptive_max_pool1d(sequence(x), 5),
    F.adaptive_max_pool2d: lambda net, x: F.adaptive_max_pool2d(x, (2, 3)),
    torch.flatten: lambda net, x: torch.flatten(x, 2),
    "flatten": lambda net, x: x.flatten(1, 2),
    torch.reshape: lambda net, x: torch.reshape(x, (x.shape[0], 2, -1)),
    "reshape": lambda net, x: x.reshape(x.size(0), 8, 18),
    torch.unflatten: lambda net, x: torch.unflatten(x, 1, (2, 2)),
    "unflatten": lambda net, x: x.unflatten(1, (2, 2)),
    torch.squeeze: lambda net, x: torch.squeeze(x[:, :1], 1),
    "squeeze": lambda net, x: x[:, 1:2].squeeze(1),
    torch.unsqueeze: lambda net, x: torch.unsqueeze(x, 2),
    "unsqueeze": lambda net, x: x.unsqueeze(-1),
    "view": lambda net, x: x.view(x.size(0), x.size(1) // 2, 2, x.shape[-2], -1),
    torch.permute: lambda net, x: torch.permute(x, (0, 2, 3, 1)),
    "permute": lambda net, x: x.permute(0, 3, 1, 2),
    torch.transpose: lambda net, x: torch.transpose(x, 1, 3),
    "transpose": lambda net, x: x.transpose(-1, 1),
    torch.swapaxes: lambda net, x: torch.swapaxes(x, 1, 2),
    "swapaxes": lambda net, x: x.swapaxes(2, 3),
    torch.swapdims: lambda net, x: torch.swapdims(x, 1, 3),
    "swapdims": lambda net, x: x.swapdims(-1, 1),
    torch.movedim: lambda net, x: torch.movedim(x, (1, 2), (2, 3)),
    "movedim": lambda net, x: x.movedim(1, -1),
    torch.moveaxis: lambda net, x: torch.moveaxis(x, 3, 1),
    "moveaxis": lambda net, x: x.moveaxis(2, 1),
    "view_as": lambda net, x: x.view_as(x.flatten(2)),
    "reshape_as": lambda net, x: x.transpose(1, 2).reshape_as(x.flatten(1)),
    "expand": lambda net, x: x.unsqueeze(2).expand(-1, 4, 3, 6, -1),
    "expand_as": lambda net, x: x.mean((2, 3), keepdim=True).expand_as(x),
    torch.broadcast_to: lambda net, x: torch.broadcast_to(x[:, :1], (x.size(0), 5, 6, 6)),
    "broadcast_to": lambda net, x: x[..., :1].broadcast_to(x.shape),
    torch.broadcast_tensors: lambda net, x: torch.add(*torch.broadcast_tensors(x[..., :1], x[:, :1])),
    "repeat": lambda net, x: x[..., :1].repeat(1, 2, 1, 3) + x[:, [0, 1, 2, 3] * 2, :, :3],
    torch.tile: lambda net, x: torch.tile(x, (2, 1)),
    "tile": lambda net, x: x.tile(1, 2, 1, 1),
    torch.repeat_interleave: lambda net, x: torch.repeat_interleave(x, torch.tensor([1, 0, 2, 1]), 1),
    "repeat_interleave": lambda net, x: x.repeat_interleave(3, dim=2),
    torch.flip: lambda net, x: torch.flip(x, (1, -1)),
    "flip": lambda net, x: x.flip(2),
    F.unfold: lambda net, x: F.linear(
        F.unfold(x, (2, 3), 1, (1, 0), stride=2).transpose(1, 2), net.line.view(1, 32)[:, :24]
    ),
    torch.index_select: lambda net, x: torch.index_select(x, 1, torch.tensor([3, 0, 0])),
    "index_select": lambda net, x: x.index_select(-1, torch.tensor([5])),
    torch.gather: lambda net, x: torch.gather(x, 1, places(x[:, :2], 3)),
    "gather": lambda net, x: x.gather(3, places(x, 5)),
    torch.take_along_dim: lambda net, x: torch.take_along_dim(x, torch.tensor([2, 2, 0]).view(1, 3, 1, 1), 1),
    "take_along_dim": lambda net, x: x.take_along_dim(torch.tensor([[[[1, 0]]]]), dim=3),
    torch.select: lambda net, x: torch.select(x, 1, -1),
    "select": lambda net, x: x.select(2, 3),
    torch.unbind: lambda net, x: torch.unbind(x, 1)[2],
    "unbind": lambda net, x: x.unbind(-1)[5] - x.unbind(dim=2)[0],
    torch.tensor_split: lambda net, x: torch.tensor_split(x, (1, 4), 2)[1],
    "tensor_split": lambda net, x: x.tensor_split(4, dim=3)[0],
    torch.hstack: lambda net, x: torch.hstack([x, net.weight[:1, :, :1, :1].expand(x.size(0), 4, 6, 6), x]),
    torch.roll: lambda net, x: torch.roll(x, (1, -2), (1, -1)),
    "roll": lambda net, x: x.roll(shifts=2, dims=3),
    torch.chunk: lambda net, x: torch.chunk(x, 3, 2)[1],
    "chunk": lambda net, x: x.chunk(2, dim=1)[0],
    torch.split: lambda net, x: torch.split(x, [1, 3], 1)[1],
    "split": lambda net, x: x.split(4, 3)[1],
    torch.narrow: lambda net, x: torch.narrow(x, 1, 1, 2),
    "narrow": lambda net, x: x.narrow(2, 3, 2),
    operator.getitem: lambda net, x: x[:, 1, None, ..., -4:6:2],
    torch.cat: lambda net, x: torch.cat([x, x[:, :1], 2 * x], 1),
    torch.concat: lambda net, x: torch.concat((x, x), -1),
    torch.concatenate: lambda net, x: torch.concatenate((x, x), dim=2),
    torch.stack: lambda net, x: torch.stack([x, 2 * x], 2),
    F.pixel_shuffle: lambda net, x: F.pixel_shuffle(x, 2),
    F.pixel_unshuffle: lambda net, x: F.pixel_unshuffle(x, 3),
    F.channel_shuffle: lambda net, x: F.channel_shuffle(x, 2),
    F.interpolate: lambda net, x: F.interpolate(x, scale_factor=1.5),
    F.pad: lambda net, x: F.pad(F.pad(x, (1, 2, 0, 1), mode="circular"), (0, -1, 2, 0, 1, 1), value=-0.5),
    F.dropout: lambda net, x: F.dropout(x, 0.5, training=net.training),
    F.dropout1d: lambda net, x: F.dropout1d(sequence(x), training=net.training),
    F.dropout2d: lambda net, x: F.dropout2d(x, training=net.training),
    F.alpha_dropout: lambda net, x: F.alpha_dropout(x, training=net.training),
    "contiguous": lambda net, x: x.transpose(1, 2).contiguous().view(x.size(0), -1),
    "clone": lambda net, x: x.clone(),
    torch.clone: lambda net, x: torch.clone(x),
    "detach": lambda net, x: x.detach(),
    "to": lambda net, x: x.to(torch.float64),
    "float": lambda net, x: x.float().to(x.dtype),
    "double": lambda net, x: x.double(),
    "type": lambda net, x: x.type(x.dtype),
    "type_as": lambda net, x: x.type_as(net.mean),
}

COMPARISONS = [each for build in choices.COMPARISONS.values() for each in build]


def in_front_of_a_linear_map(example):
    """Where nothing but it stood behind the last one, the host would carry it out."""
    return lambda net, x: F.linear(example(net, x), net.matrix.t())


EXAMPLES |= {target: in_front_of_a_linear_map(EXAMPLES[target]) for target in COMPARISONS}


@pytest.mark.parametrize("target", FUNCTIONS, ids=lambda target: getattr(target, "__name__", f".{target}"))
def test_every_function_of_the_table_becomes_exact_spikes(target):
    net = Around(EXAMPLES[target])
    # Not torch's own tracer, which before 2.7 takes no symbols in a tuple of sizes.
    tracer = Tracer((torch.rand(3, 2, 6, 6),), (torch.rand(1, 2, 6, 6),))
    targets = [node.target for node in tracer.trace(net.eval()).nodes]
    # torch.fx writes `x += y` as `x = x + y`.
    traced = {operator.iadd: operator.add, operator.isub: operator.sub, operator.imul: operator.mul}
    traced |= {operator.itruediv: operator.truediv}
    assert traced.get(target, target) in targets, "the example does not call what it is an example of"
    assert_converts(net)


@pytest.mark.parametrize(
    ("choice", "problem"),
    [
        (lambda net, x: (y := x - 0.3) * (y > 0.1), "(mul): it chooses between other values than those that it"),
        (lambda net, x: torch.where(x > 0.3, x, 0.2), "(where): it chooses between other values than those that it"),
        (lambda net, x: torch.where(x > 0.3, 1.0, 0.0), "(where): it chooses between other values than those that it"),
        (lambda net, x: x + (x > 0.3), "(add): it computes with a comparison of values"),
        (lambda net, x: torch.relu((x > 0.3).float()), "(relu): it computes with a comparison of values"),
    ],
)
def test_choices_between_other_values_than_those_compared_are_refused(choice, problem):
    net = Around(in_front_of_a_linear_map(choice))
    with pytest.raises(ConversionError) as refused:
        quartz_plugin.convert(net, torch.rand(20, 2, 6, 6))
    assert problem in str(refused.value)


def test_a_choice_as_a_method_at_the_end_is_left_to_the_host():
    net = Around(lambda net, x: (y := x @ net.matrix).where(y > 0.1, torch.zeros_like(y)))
    assert_converts(net)


MODULES = {
    nn.ConvTranspose2d: [nn.ConvTranspose2d(4, 6, 3, 2, 1, 1, groups=2), nn.BatchNorm2d(6)],
    nn.ConvTranspose1d: [nn.Flatten(2), nn.ConvTranspose1d(4, 4, 3, dilation=2), nn.BatchNorm1d(4), nn.ReLU()],
    nn.Conv3d: [nn.Unflatten(1, (2, 2)), nn.Conv3d(2, 3, 2, padding=1), nn.BatchNorm3d(3), nn.ReLU(), nn.AvgPool3d(2)],
    nn.ConvTranspose3d: [nn.Unflatten(1, (2, 2)), nn.ConvTranspose3d(2, 3, (1, 2, 2), stride=2), nn.Dropout3d()],
    nn.AdaptiveAvgPool3d: [nn.Unflatten(1, (2, 2)), nn.AdaptiveAvgPool3d((1, 3, None)), nn.Conv3d(2, 8, 1), nn.ReLU()],
    nn.MaxPool3d: [nn.Unflatten(1, (2, 2)), nn.Conv3d(2, 3, 1), nn.ReLU(), nn.MaxPool3d((1, 2, 3))],
    nn.AdaptiveMaxPool3d: [nn.Unflatten(1, (2, 2)), nn.Conv3d(2, 3, 1), nn.ReLU(), nn.AdaptiveMaxPool3d((1, 3, 2))],
    nn.SyncBatchNorm: [nn.Conv2d(4, 3, 3), nn.SyncBatchNorm(3), nn.ReLU()],
    nn.ReLU6: [nn.Conv2d(4, 3, 1), nn.ReLU6(inplace=True)],
    nn.Hardtanh: [nn.Hardtanh(0, 0.3), nn.MaxPool2d(2), nn.Hardtanh(-0.1, 0.25)],
    nn.PixelShuffle: [nn.PixelShuffle(2), nn.MaxPool2d(2)],
    nn.Unfold: [nn.Unfold(3, 2, 1, (2, 1)), nn.Linear(8, 2), nn.ReLU()],
    nn.PixelUnshuffle: [nn.PixelUnshuffle(2)],
    nn.ChannelShuffle: [nn.ChannelShuffle(2), nn.Conv2d(4, 2, 2, groups=2)],
    nn.Upsample: [nn.Upsample(scale_factor=2), nn.MaxPool2d(3)],
    nn.UpsamplingNearest2d: [nn.UpsamplingNearest2d(size=(9, 8)), nn.Conv2d(4, 2, 3)],
    Interpolate: [nn.Upsample(scale_factor=(1.4, 2), mode="bilinear"), nn.Conv2d(4, 2, 3)],
    BicubicInterpolate: [nn.Upsample((9, 5), mode="bicubic", align_corners=True), nn.Conv2d(4, 2, 3)],
    nn.UpsamplingBilinear2d: [nn.Conv2d(4, 2, 3), nn.UpsamplingBilinear2d(scale_factor=2), nn.ReLU()],
    nn.ZeroPad3d: [nn.ZeroPad3d((1, 0, 0, 2, 1, 1)), nn.Conv2d(6, 2, 3), nn.ReLU()],
    nn.ConstantPad1d: [nn.Flatten(2), nn.ConstantPad1d(2, 0.0), nn.MaxPool1d(3)],
    nn.ConstantPad2d: [nn.ConstantPad2d(1, 0.0), nn.Conv2d(4, 2, 3), nn.ReLU()],
    nn.ReflectionPad1d: [nn.Flatten(2), nn.ReflectionPad1d(2)],
    nn.ReflectionPad2d: [nn.ReflectionPad2d(2), nn.Conv2d(4, 2, 3)],
    nn.ReplicationPad1d: [nn.Flatten(2), nn.ReplicationPad1d((0, 3))],
    nn.ReplicationPad2d: [nn.ReplicationPad2d(1), nn.MaxPool2d(2)],
    nn.CircularPad1d: [nn.Flatten(2), nn.CircularPad1d(2), nn.Conv1d(4, 3, 5)],
    nn.CircularPad2d: [nn.CircularPad2d((1, 0, 0, 2)), nn.Conv2d(4, 2, 3)],
    nn.Dropout1d: [nn.Flatten(2), nn.Dropout1d()],
    nn.AlphaDropout: [nn.AlphaDropout()],
    nn.Threshold: [nn.Conv2d(4, 3, 1), nn.Threshold(0, 0), nn.MaxPool2d(2)],
    nn.ConstantPad3d: [
        nn.Unflatten(1, (2, 2)),
        nn.ConstantPad3d((1, 0, 0, 1, 1, 1), -math.inf),
        nn.MaxPool3d(2),
        nn.ConstantPad3d(1, 0.5),
    ],
}


@pytest.mark.parametrize("kind", MODULES, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("relu", [True, False], ids=["of spikes", "of signed values"])
def test_modules_beyond_chains_are_exact_and_saved(kind, relu, tmp_path):
    tested = nn.Sequential(*copy.deepcopy(MODULES[kind]))
    for module in tested:
        if hasattr(module, "reset_parameters"):
            # Weights of the time of import depend on which tests are collected.
            module.reset_parameters()
    net = Around(nn.Sequential(*tested, nn.Flatten(), nn.LazyLinear(5)), relu)
    net(torch.rand(2, 2, 6, 6))
    snn = assert_converts(net)
    snn.save(tmp_path / "snn.safetensors")
    images = torch.rand(3, 2, 6, 6)
    assert torch.equal(quartz_plugin.load(tmp_path / "snn.safetensors")(images), snn(images))


def test_every_module_of_the_table_can_be_saved_or_never_is():
    emitted = {kind for kind, row in OPERATORS.items() if row.role not in (Role.NOTHING, Role.RECTIFIER)}
    folded = {"BatchNorm1d", "BatchNorm2d", "BatchNorm3d", "SyncBatchNorm", "Affine", "UpsamplingBilinear2d", "Unfold"}
    saved = {kind for kind, row in OPERATORS.items() if row.settings is not None}
    assert {kind.__name__ for kind in emitted - saved} == folded


def test_the_page_beside_the_table_has_it():
    text = Path(quartz_plugin.operators.table.__file__).with_name("OPERATORS.md").read_text()
    assert operator_table() in text
    assert text == page(), f"write the page anew, as its last lines show: {text[-140:]}"


class Doubled(nn.Module):
    """Traced by torch.fx it could not be: it branches on values."""

    def __init__(self):
        super().__init__()
        self.factor = 2.0

    def forward(self, x):
        return x * self.factor if x.sum() > -1e9 else x


class Scaled(nn.Module):
    """Times a number, which torch.fx can trace."""

    def __init__(self, factor):
        super().__init__()
        self.factor = factor

    def forward(self, x):
        return x * self.factor


@pytest.fixture
def rules():
    before = dict(RULES)
    yield RULES
    RULES.clear()
    RULES.update(before)


class TestRules:
    def test_stand_in_for_modules_of_a_class(self, rules):
        net = Around(nn.Sequential(Doubled(), nn.ReLU(), Doubled()))
        with pytest.raises(ConversionError, match=r"torch\.fx cannot trace Around in module 'tested\.0'"):
            assert_converts(net)
        quartz_plugin.register_rule(Doubled, lambda module: nn.Sequential(nn.Conv2d(4, 4, 1, groups=4, bias=False)))
        with pytest.raises(ConversionError, match="a registered rule is not the module it stands for"):
            assert_converts(net)

        def rule(module):
            conv = nn.Conv2d(4, 4, 1, groups=4, bias=False)
            nn.init.constant_(conv.weight, module.factor)
            return conv

        quartz_plugin.register_rule(Doubled, rule)
        assert_converts(net)
        assert isinstance(net.tested[0], Doubled)

    def test_can_stand_in_for_the_whole_network(self, rules):
        quartz_plugin.register_rule(Doubled, lambda module: nn.Hardtanh(0.0, 2.0))
        with pytest.raises(ConversionError, match="a registered rule is not"):
            quartz_plugin.convert(Doubled(), torch.rand(20, 4))

    def test_must_return_modules(self, rules):
        quartz_plugin.register_rule(Doubled, lambda module: 3)
        with pytest.raises(TypeError, match=r"rule registered for Doubled must return a torch.nn.Module, got int"):
            quartz_plugin.convert(nn.Sequential(nn.Linear(4, 4), Doubled()), torch.rand(20, 4))

    def test_can_be_given_for_one_conversion_and_come_before_registered_ones(self, rules):
        net, images = nn.Sequential(nn.Linear(4, 4), Doubled()), torch.rand(20, 4)
        with pytest.raises(ConversionError, match=r"torch\.fx cannot trace"):
            trace(net, images[:1])
        doubled = {Doubled: lambda module: Scaled(module.factor)}
        assert trace(net, images[:1], doubled).output(images).equal(net(images).detach())
        quartz_plugin.check_convertible(net, images, rules=doubled)
        assert Doubled not in RULES
        quartz_plugin.register_rule(Doubled, lambda module: Scaled(3.0))
        with pytest.raises(ConversionError, match="a registered rule is not the module it stands for"):
            trace(net, images[:1])
        trace(net, images[:1], doubled)

    def test_can_be_taken_back(self, rules):
        net, images = nn.Sequential(nn.Linear(4, 4), Doubled()), torch.rand(20, 4)
        quartz_plugin.register_rule(Doubled, lambda module: Scaled(module.factor))
        trace(net, images[:1])
        quartz_plugin.unregister_rule(Doubled)
        with pytest.raises(ConversionError, match=r"torch\.fx cannot trace"):
            trace(net, images[:1])
        for unknown in (Doubled, 3):
            with pytest.raises(KeyError, match="no rule is registered for"):
                quartz_plugin.unregister_rule(unknown)

    @pytest.mark.parametrize(
        ("given", "message"),
        [([Doubled], "rules must be a dict"), ({3: nn.ReLU}, "module_class"), ({nn.ReLU: 3}, "rule must take")],
    )
    def test_bad_ones_given_for_one_conversion_are_refused(self, given, message):
        with pytest.raises(TypeError, match=message):
            trace(nn.Linear(2, 2), torch.rand(1, 2), given)

    @pytest.mark.parametrize(("arguments", "says"), [((3, nn.ReLU), "module_class"), ((nn.ReLU, 3), "rule must take")])
    def test_bad_ones_are_refused(self, rules, arguments, says):
        with pytest.raises(TypeError, match=says):
            quartz_plugin.register_rule(*arguments)


class TestTracing:
    def test_sees_what_in_place_operations_do_to_tensors_that_are_used_again(self):
        class Pre(nn.Module):
            def __init__(self):
                super().__init__()
                self.conv = nn.Conv2d(2, 4, 1)
                self.relu = nn.ReLU(inplace=True)
                self.second = nn.Conv2d(4, 4, 1)

            def forward(self, x):
                x = self.conv(x) - 0.2
                y = self.second(self.relu(x))
                y += x  # which the ReLU has changed
                return (self.relu(y) + y).flatten(1)

        snn = assert_converts(Pre())
        assert [row["module"] for row in snn.report if row["became"] == "spiking layer"] == ["relu", "relu_2"]

    def test_sees_a_change_in_place_that_is_asked_for_by_position(self):
        class Positional(nn.Module):
            def __init__(self):
                super().__init__()
                self.conv = nn.Conv2d(2, 4, 1)

            def forward(self, x):
                x = self.conv(x) - 0.2
                return (F.relu(x, True) + x).flatten(1)

        assert_converts(Positional())

    @pytest.mark.parametrize(
        "change", [operator.and_, operator.or_, operator.xor, operator.mod, operator.iadd, operator.imul], ids=str
    )
    def test_takes_no_operation_on_sizes_for_one_that_changes_them(self, change):
        class Sizes(nn.Module):
            def __init__(self):
                super().__init__()
                self.conv = nn.Conv2d(2, 4, 1)

            def forward(self, x):
                features = x.shape[1] * x.shape[2] * x.shape[3]
                other = change(features, 3)
                x = self.conv(x).relu() * (1 + other % 3)
                return x.reshape(-1, 2 * features)

        assert_converts(Sizes())

    def test_takes_no_input_or_buffer_for_a_change_by_its_name(self):
        class Underscored(nn.Module):
            def __init__(self):
                super().__init__()
                self.conv = nn.Conv2d(2, 4, 1)
                self.register_buffer("mean_", torch.full((1, 2, 1, 1), 0.3))

            def forward(self, x_):
                return self.conv(x_ - self.mean_).relu().flatten(1)

        assert_converts(Underscored())

    def test_refuses_in_place_operations_on_views(self):
        class OnView(nn.Module):
            def __init__(self):
                super().__init__()
                self.conv = nn.Conv2d(2, 4, 1)

            def forward(self, x):
                x = self.conv(x) - 0.5
                x[:, :2].relu_()
                return x.flatten(1)

        with pytest.raises(ConversionError, match="changes a tensor in place"):
            assert_converts(OnView())

    def test_names_functions_by_the_module_that_calls_them(self):
        class Block(nn.Module):
            def forward(self, x):
                return F.relu(x) + F.relu(0.1 - 0.1 * x)

        net = nn.Sequential(nn.Linear(3, 4), Block(), nn.Sequential(Block()), nn.Linear(4, 2))
        names = list(quartz_plugin.convert(net, torch.rand(50, 3)).windows)
        assert names == ["input", "1.relu", "1.relu_2", "2.0.relu", "2.0.relu_2", "output"]

    def test_takes_optional_arguments_at_their_defaults(self):
        class Optional(nn.Module):
            def __init__(self):
                super().__init__()
                self.conv = nn.Conv2d(2, 4, 1)

            def forward(self, x, mask=None, scale=2.0):
                return (self.conv(x).relu() * scale).flatten(1)

        assert_converts(Optional())

    def test_folds_normalisation_by_buffers_exactly_at_the_borders(self):
        class Normalising(nn.Module):
            def __init__(self):
                super().__init__()
                self.register_buffer("mean", torch.rand(1, 2, 1, 1))
                self.register_buffer("std", torch.rand(1, 2, 1, 1) + 0.2)
                self.conv = nn.Conv2d(2, 3, 3, padding=1)

            def forward(self, x):
                return self.conv((x - self.mean) / self.std).relu().mean((2, 3))

        assert_converts(Normalising())

    @pytest.mark.parametrize(
        ("returned", "says"),
        [
            (lambda x: torch.ones(3), "does not depend on the input"),
            (lambda x: (x, torch.ones(3)), "does not depend on the input: 1"),
            (lambda x: (x, "words"), "several nested: 1 is str, which is no tensor"),
            (lambda x: None, "the network must return a tensor, or several; it returns none"),
        ],
    )
    def test_refuses_outputs_that_are_no_tensors_of_the_network(self, returned, says):
        with pytest.raises(ConversionError, match=says):
            quartz_plugin.convert(nn.Sequential(nn.Linear(4, 4), _Returning(returned)), torch.rand(5, 4))

    def test_refuses_a_second_input(self):
        class Two(nn.Module):
            def forward(self, x, y):
                return x.relu() + y

        with pytest.raises(ConversionError, match=r"forward also takes 'y'"):
            quartz_plugin.convert(Two(), torch.rand(5, 4))

    def test_on_the_meta_device_says_that_there_are_no_weights(self):
        with torch.device("meta"):
            net = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
        with pytest.raises(ConversionError, match=r"0\.weight is on the meta device.*load the weights"):
            quartz_plugin.convert(net, torch.rand(5, 4))


class _Returning(nn.Module):
    def __init__(self, returned):
        super().__init__()
        self.returned = returned

    def forward(self, x):
        return self.returned(x)


class TestLayers:
    """Options of their own for layers and blocks."""

    @pytest.fixture
    def ann(self):
        block = nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Conv2d(3, 3, 3, padding=1), nn.ReLU())
        return nn.Sequential(block, nn.Flatten(), nn.Linear(48, 4), nn.ReLU(), nn.Linear(4, 2))

    def scales(self, ann, **options):
        return quartz_plugin.convert(ann, torch.rand(200, 1, 6, 6), 8, **options)

    def test_a_block_a_layer_the_input_and_the_output(self, ann):
        torch.manual_seed(1)
        plain = self.scales(ann, percentile=90)
        torch.manual_seed(1)
        own = {
            "0": {"percentile": 80, "t_max": 5},
            "0.3": {"percentile": 100, "granularity": "channel"},
            "input": {"t_max": 17},
            "output": {"t_max": 33, "percentile": 80},
        }
        snn = self.scales(ann, percentile=90, layers=own)
        assert {name: window.length for name, window in snn.windows.items()} == {
            "input": 16, "0.1": 4, "0.3": 4, "3": 7, "output": 32,
        }  # fmt: skip
        before, after = plain.graph.scales, snn.graph.scales
        assert float(after["0.1"]) < float(before["0.1"])
        assert after["0.3"].shape == (3, 1, 1)
        assert float(after["0.3"].max()) > float(before["0.3"])
        assert float(after["3"]) == float(before["3"])
        assert float(after["output"]) < float(before["output"])
        assert snn.graph.settings["layers"] == own
        starts = [window.start for window in snn.windows.values()]
        assert starts == [0, 16, 20, 24, 31]

    @pytest.mark.parametrize(
        ("layers", "says"),
        [
            ({"7": {"percentile": 50}}, r"no layer or block is called '7'; the layers are \['0\.1', '0\.3', '3'"),
            ({"0": {"percentil": 50}}, r"layers\['0'\] must be a dict with some of"),
            ({"0": 3}, r"layers\['0'\] must be a dict"),
            ({"0": {"percentile": 0}}, r"layers\['0'\]: percentile must be a number in"),
            ({"0": {"t_max": 1}}, "t_max must be a whole number of at least 2"),
            ({"0": {"granularity": "row"}}, "granularity must be"),
        ],
    )
    def test_wrong_ones_are_refused(self, ann, layers, says):
        with pytest.raises(ValueError, match=says):
            self.scales(ann, layers=layers)

    def test_must_be_a_dict(self, ann):
        with pytest.raises(TypeError, match="layers must be a dict"):
            self.scales(ann, layers=[("0", {})])


def test_the_report_sums_up_neurons_and_synapses():
    ann = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2), nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 3))
    report = quartz_plugin.convert(ann, torch.rand(50, 4)).report
    assert str(report).splitlines()[-1] == (
        "3 layers, 19 neurons, 120 synapses (88 where linear maps in a row are computed one after the other)"
    )
    assert re.search(r"\n4 .* 64 .* 32\n", str(report))


class TestWhatReviewFound:
    """Networks that once became others, silently or with errors from inside torch."""

    @pytest.mark.parametrize("granularity", ["layer", "channel"])
    @pytest.mark.parametrize("place", ["spikes", "signed", "tail"])
    @pytest.mark.parametrize("shape", [(6,), (6, 1), (4, 1, 6), (1, 6, 6), (4, 6, 6)])
    def test_constants_along_other_dimensions_than_channels(self, shape, place, granularity):
        # As many channels as pixels in a row: nothing but the rank tells them apart.
        class Weighed(nn.Module):
            def __init__(self):
                super().__init__()
                channels = 6 if shape[0] != 4 or len(shape) < 3 else 4
                self.conv, self.last = nn.Conv2d(2, channels, 3, padding=1), nn.Conv2d(channels, 3, 3)
                self.register_buffer("constant", torch.rand(shape) + 0.3)

            def forward(self, x):
                x = self.conv(x)
                x = x.relu() * self.constant if place == "spikes" else (x * self.constant + self.constant).relu()
                return self.last(x).flatten(1) if place != "tail" else (x * self.constant).mean((2, 3))

        assert_converts(Weighed(), granularity=granularity)

    def test_batch_norms_that_are_zero_and_added(self):
        class Zeros(nn.Module):
            def __init__(self):
                super().__init__()
                self.conv, self.one, self.two = nn.Conv2d(2, 4, 1), nn.BatchNorm2d(4), nn.BatchNorm2d(4)
                self.one.weight.data[0] = 0.0
                self.one.bias.data.uniform_()
                self.two.weight.data.zero_()

            def forward(self, x):
                x = self.conv(x).relu()
                y = self.one(x) + self.one(x)
                return (y.relu() + y + (self.two(x) + self.two(x))).flatten(1)

        assert_converts(Zeros())

    @pytest.mark.parametrize(
        "forward",
        [
            lambda net, x: _aliased(net, x),
            lambda net, x: net.conv(x).relu().flatten(1) / x.size(0),
            lambda net, x: net.conv(x).flatten(1) * x.shape[0],
        ],
        ids=["changed in place", "divided by the batch size", "times the batch size"],
    )
    def test_a_black_first_image_does_not_hide_a_wrong_trace(self, forward):
        class Wrong(nn.Module):
            def __init__(self):
                super().__init__()
                self.conv = nn.Conv2d(2, 4, 3)

            def forward(self, x):
                return forward(self, x)

        images = torch.rand(20, 2, 6, 6)
        images[0] = 0.0
        with pytest.raises(ConversionError, match="computes something else than the network itself"):
            quartz_plugin.convert(Wrong(), images)

    def test_copies_change_in_place_apart(self):
        def kept(net, x):
            copied = (x - 0.3).clone()
            original = x - 0.3
            other = original.clone()
            other.relu_()
            return original + other + copied

        assert_converts(Around(kept))

    @pytest.mark.parametrize(
        ("function", "says"),
        [
            (lambda net, x: x.to(torch.int8).to(x.dtype), r"'to' \(to\).*converts to torch.int8"),
            (lambda net, x: torch.div(x, 0.1, rounding_mode="floor"), "'div'.*not all known here.*rounding_mode"),
            (lambda net, x: net.convt(x, output_size=[13, 13]), r"'convt'.*called with 2 arguments"),
        ],
    )
    def test_calls_that_cannot_be_carried_are_named(self, function, says):
        net = Around(function)
        net.convt = nn.ConvTranspose2d(4, 4, 3, 2)
        with pytest.raises(ConversionError, match=says):
            assert_converts(net)

    def test_calls_by_keyword(self):
        class Keywords(nn.Module):
            def __init__(self):
                super().__init__()
                self.conv, self.relu = nn.Conv2d(2, 4, 1), nn.ReLU(inplace=True)
                self.inner, self.constant = nn.Linear(3, 36), nn.Parameter(torch.rand(1, 3))

            def forward(self, x):
                x = self.relu(input=self.conv(input=x)) + self.inner(self.constant).view(6, 6)
                a, b = x.chunk(chunks=2, dim=1)
                c, d = torch.split(x, split_size_or_sections=2, dim=1)
                x = torch.cat(tensors=[F.relu(input=a - d), b + c], dim=1)
                x = F.interpolate(x, scale_factor=1.4, recompute_scale_factor=True)
                return torch.mean(x, axis=3).flatten(start_dim=1)

        assert_converts(Keywords())

    def test_with_another_default_type(self):
        torch.set_default_dtype(torch.float64)
        try:
            assert_converts(Around(nn.Sequential(nn.Conv2d(4, 3, 3), nn.ReLU())))
        finally:
            torch.set_default_dtype(torch.float32)

    def test_wrapped_scripted_and_parametrised_networks(self):
        net = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
        images = torch.rand(30, 4)
        assert torch.equal(
            quartz_plugin.convert(nn.DataParallel(net), images)(images), quartz_plugin.convert(net, images)(images)
        )
        with pytest.raises(ConversionError, match=r"scripted network.*give the nn.Module it was made from"):
            quartz_plugin.convert(torch.jit.trace(net, images), images)
        expected = quartz_plugin.convert(net, images)(images)
        torch.nn.utils.parametrizations.weight_norm(net[0])
        torch.testing.assert_close(quartz_plugin.convert(net, images)(images), expected)

    def test_a_rule_that_fails_is_named(self, rules):
        quartz_plugin.register_rule(Doubled, lambda module: 1 / 0)
        with pytest.raises(ConversionError, match=r"rule registered for Doubled failed at '1': division by zero"):
            quartz_plugin.convert(nn.Sequential(nn.Linear(4, 4), Doubled()), torch.rand(20, 4))

    @pytest.mark.parametrize("options", [{"percentile": 99}, {"granularity": "channel"}])
    def test_options_that_mean_nothing_for_the_input_are_refused(self, options):
        with pytest.raises(ValueError, match=r"layers\['input'\].*mean nothing there"):
            quartz_plugin.convert(nn.Linear(4, 2), torch.rand(20, 4), layers={"input": options})


def _aliased(net, x):
    x = net.conv(x)
    kept = x
    x += x.relu()
    return (x + kept).flatten(1)


@pytest.mark.parametrize("state", [(), {"x": 1}, "shape"])
def test_a_state_of_another_network_or_shape_is_refused(state):
    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x):
            return x + self.fc(x).relu()

    net = quartz_plugin.convert(Residual(), torch.rand(20, 4), 4).to_norse()
    if state == "shape":
        _, state = net(torch.ones(3, 4))
    with pytest.raises(ValueError, match=r"not one that this network returned for input of shape \[2, 4\]"):
        net(torch.ones(2, 4), state)


SPELLINGS = {
    "padding of one": lambda: nn.Conv2d(4, 3, 3, padding=(1,)),
    "stride of one": lambda: nn.Conv2d(4, 3, 3, stride=(2,)),
    "dilation of one": lambda: nn.Conv2d(4, 3, 3, dilation=[2]),
    "all of one": lambda: nn.Conv2d(4, 4, [3, 2], [2], [1], (1,), groups=2),
    "valid": lambda: nn.Conv2d(4, 3, 2, padding="valid", stride=[2]),
    "same, uneven": lambda: nn.Conv2d(4, 3, (2, 4), padding="same", dilation=(1,)),
    "reflected": lambda: nn.Conv2d(4, 3, 3, padding=[1, 0], padding_mode="reflect"),
    "numpy": lambda: nn.Conv2d(np.int64(4), np.int64(3), np.int64(3), np.int64(2), padding=np.int64(1)),
    "torch's numbers": lambda: nn.Conv2d(4, 4, 3, groups=torch.tensor(2)),
    "transposed": lambda: nn.ConvTranspose2d(4, 3, 3, [2], padding=(1,), output_padding=(1,), dilation=[1]),
    "average": lambda: nn.AvgPool2d([2]),
    "average, no stride": lambda: nn.AvgPool2d((2,), stride=[]),
    "average, all of one": lambda: nn.AvgPool2d((3,), (1,), (1,)),
    "average, numpy": lambda: nn.AvgPool2d(np.int64(2), np.int64(1)),
    "max": lambda: nn.MaxPool2d((2,), (1,), (1,), (2,)),
    "max, no stride": lambda: nn.MaxPool2d([2], []),
    "max, torch's number": lambda: nn.MaxPool2d(torch.tensor(2)),
    "adaptive": lambda: nn.AdaptiveAvgPool2d((None, 3)),
    "adaptive, list": lambda: nn.AdaptiveAvgPool2d([2, None]),
    "adaptive max": lambda: nn.AdaptiveMaxPool2d([None, 3]),
    "upsample": lambda: nn.Upsample(scale_factor=(2, 1.5)),
    "upsample, recomputed": lambda: nn.Upsample(scale_factor=1.7, recompute_scale_factor=True),
    "upsample, numpy": lambda: nn.Upsample(size=np.int64(4)),
    "pad one dimension": lambda: nn.ZeroPad2d((1, 2)),
    "pad two of one": lambda: nn.ZeroPad1d((1, 0, 2, 1)),
    "crop": lambda: nn.ZeroPad2d(-1),
    "shuffle": lambda: nn.PixelShuffle(torch.tensor(2)),
    "flatten from the end": lambda: nn.Flatten(-3),
    "flatten between": lambda: nn.Flatten(-3, -2),
    "unflatten from the end": lambda: nn.Unflatten(-3, [2, -1]),
    "1d": lambda: nn.Sequential(nn.Flatten(2), nn.Conv1d(4, 3, [3], [2], [1], (2,))),
    "1d transposed": lambda: nn.Sequential(nn.Flatten(2), nn.ConvTranspose1d(4, 3, (3,), (2,), (1,), [1])),
    "1d average": lambda: nn.Sequential(nn.Flatten(2), nn.AvgPool1d([2], [], (1,))),
    "1d max": lambda: nn.Sequential(nn.Flatten(2), nn.MaxPool1d([2], (), (1,))),
    "1d adaptive": lambda: nn.Sequential(nn.Flatten(2), nn.AdaptiveAvgPool1d([4])),
    "1d adaptive max": lambda: nn.Sequential(nn.Flatten(2), nn.AdaptiveMaxPool1d((5,))),
    "average without channels": lambda: nn.Sequential(nn.Flatten(2), nn.AvgPool2d((2, 3))),
    "max without channels": lambda: nn.Sequential(nn.Flatten(2), nn.MaxPool2d((2, 3), 1)),
    "adaptive without channels": lambda: nn.Sequential(nn.Flatten(2), nn.AdaptiveAvgPool2d((2, None))),
    "average of a vector": lambda: nn.Sequential(nn.Flatten(), nn.AvgPool1d(5)),
    "max of a vector": lambda: nn.Sequential(nn.Flatten(), nn.AdaptiveMaxPool1d(7)),
    "F.conv2d": lambda: lambda net, x: F.conv2d(x, net.weight, stride=[2], padding=(1,), dilation=(1,)),
    "F.conv_transpose2d": lambda: lambda net, x: F.conv_transpose2d(x, net.weight, None, (2,), [1]),
    "F.avg_pool2d": lambda: lambda net, x: F.avg_pool2d(x, [2], None, (1,)),
    "F.avg_pool2d, no stride": lambda: lambda net, x: F.avg_pool2d(x, 3, []),
    "F.max_pool2d": lambda: lambda net, x: F.max_pool2d(x, (2,), [], (1,)),
    "F.max_pool1d": lambda: lambda net, x: F.max_pool1d(x.flatten(2), [3], ()),
    "F.adaptive_avg_pool2d": lambda: lambda net, x: F.adaptive_avg_pool2d(x, [None, 2]),
    "F.interpolate": lambda: lambda net, x: F.interpolate(x, scale_factor=1.7, recompute_scale_factor=True),
}


@pytest.mark.parametrize("hold", [True, False])
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_settings_in_any_spelling_of_torchs_are_the_same_network(spelling, hold, tmp_path):
    ann = nn.Sequential(Around(SPELLINGS[spelling]()), nn.ReLU())
    ann(torch.rand(2, 2, 6, 6))
    ann, images = ann.double().eval(), torch.rand(30, 2, 6, 6, dtype=torch.float64)
    with torch.no_grad():
        ann[0].conv.bias.add_(0.3)
    snn = make_exact(quartz_plugin.convert(ann, images, 9, hold=hold, percentile=100))
    stepped = snn.run(images[:3], engine="stepped")
    # Of early spikes each is judged by stepping alone.
    fine = quartz_plugin.convert(ann, images, **FINE)
    torch.testing.assert_close(fine(images), ann(images).detach(), rtol=0, atol=2e-4)
    for engine in ("event", *(["analytic"] if hold else [])):
        assert_same_spikes(snn.run(images[:3], engine=engine).spike_steps, stepped.spike_steps)
    counted, judge = InferenceCounts(snn, stepped), OneByOne(snn, stepped)
    assert as_lists(counted["synops"]) == judge.synops()
    assert as_lists(counted["synops_merged"]) == as_lists(changes_on_the_clock(snn, images[:3]))
    snn.save(tmp_path / "snn.safetensors")
    assert torch.equal(quartz_plugin.load(tmp_path / "snn.safetensors")(images), snn(images))


def test_settings_are_spelled_in_one_way_and_the_network_itself_is_left_as_it_was():
    ann = nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=(1,), stride=[1]), nn.ReLU(), nn.AvgPool2d([2], []), nn.Flatten(-3), nn.LazyLinear(3)
    )
    images = torch.rand(10, 2, 6, 6)
    ann(images)
    before = str(ann)
    modules = dict(quartz_plugin.convert(ann, images).graph_module.named_children())
    assert (modules["0"].padding, modules["0"].stride) == ((1, 1), (1, 1))
    assert (modules["2"].kernel_size, modules["2"].stride, modules["2"].padding) == ((2, 2), (2, 2), (0, 0))
    assert (modules["3"].start_dim, modules["3"].end_dim) == (1, -1)
    assert str(ann) == before


def test_a_padding_that_torch_itself_lays_out_wrongly_is_refused():
    conv = nn.Conv2d(2, 4, 3, padding="same", padding_mode="reflect", dilation=(2,))
    with pytest.raises(ConversionError, match=r"'0' \(Conv2d\): torch pads it unevenly.*give dilation=\(2, 2\)"):
        quartz_plugin.convert(nn.Sequential(conv, nn.ReLU()), torch.rand(3, 2, 6, 6))


@pytest.mark.parametrize("arguments", [(1,), (1, 0), ((1, 1), (0, 1))])
def test_rolls_that_mix_the_batch_are_refused(arguments):
    with pytest.raises(ConversionError, match=r"'roll' \(roll\).*mixes the batch"):
        assert_converts(Around(lambda net, x: torch.roll(x, *arguments)))


@pytest.mark.parametrize(
    ("module", "shape"), [(nn.Conv2d(2, 2, 1), (4, 4)), (nn.Conv1d(2, 2, 1), (4,)), (nn.Flatten(-4), (3, 4, 4))]
)
def test_what_takes_the_batch_for_channels_is_refused(module, shape):
    with pytest.raises(ConversionError, match="batch"):
        quartz_plugin.convert(nn.Sequential(module, nn.ReLU()), torch.rand(3, *shape))


@pytest.mark.parametrize(
    ("product", "problem"),
    [
        (lambda net, x: torch.einsum("bchw,bcwk->bchk", x, x), "it multiplies activations with each other"),
        (lambda net, x: torch.einsum("bchw->chw", x), "it mixes the batch"),
        (lambda net, x: torch.einsum("bchh->bch", x), "it takes a diagonal; write it as one letter"),
        (lambda net, x: torch.einsum("bchw,wo", x, net.matrix), "its equation names no result; write it behind '->'"),
        (lambda net, x: net.weight[:, :, 0].repeat(1, 2, 3)[:, :6] @ x, "multiply by one matrix"),
        (lambda net, x: net.matrix.t()[:, : len(x)] @ x.flatten(1)[: len(x)], "it mixes the batch"),
        (lambda net, x: F.bilinear(x, x, torch.ones(3, 6, 6, dtype=x.dtype)), "it multiplies activations with each"),
    ],
)
def test_products_that_no_fixed_weights_are_name_the_reason(product, problem):
    net = Around(lambda net, x: F.linear(product(net, x).flatten(1)[:, :3], net.matrix))
    with pytest.raises(ConversionError, match=re.escape(problem)):
        quartz_plugin.convert(net, torch.rand(20, 2, 6, 6))


def write_number(x):
    x = x.clone()
    x[:, 0] = 0
    return x


def write_values(x):
    x = x.clone()
    x[:, :, 1:3] = x[:, :, 3:5]
    return x


def write_by_condition(x):
    x = x.clone()
    x[x < 0.3] = 0
    return x


@pytest.mark.parametrize(
    "write",
    [write_number, write_values, write_by_condition, lambda x: torch.select_scatter(x, x[:, 0], 1, 1)],
)
def test_writing_into_a_part_of_a_tensor_names_what_to_do(write):
    net = Around(lambda net, x: F.linear(write(x).flatten(1)[:, :3], net.matrix))
    with pytest.raises(ConversionError, match="it writes into a part of a tensor; multiply by a constant mask"):
        quartz_plugin.convert(net, torch.rand(20, 2, 6, 6))


@pytest.mark.parametrize("name", ["StochasticDepth", "DropBlock2d", "stochastic_depth"])
def test_drops_of_torchvision_are_looked_into_and_do_nothing_in_eval_mode(name):
    ops = pytest.importorskip("torchvision.ops")
    drops = {"StochasticDepth": (0.2, "row"), "DropBlock2d": (0.2, 3)}
    if name in drops:
        drop = getattr(ops, name)(*drops[name])
        net = Around(nn.Sequential(drop, nn.Conv2d(4, 2, 3)))
    else:
        net = Around(lambda net, x: F.linear(ops.stochastic_depth(x, 0.2, "row", net.training), net.matrix.t()))
    assert_converts(net)
