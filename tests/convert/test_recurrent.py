"""Recurrent layers with ReLUs, unrolled over the steps of their inputs."""

import pytest
import torch
from helpers.conversions import assert_same_spikes
from torch import nn

import quartz_plugin
from quartz_plugin import ConversionError


class Recurrent(nn.Module):
    def __init__(self, read, **options):
        super().__init__()
        self.rnn = nn.RNN(5, 7, nonlinearity="relu", batch_first=True, **options)
        self.read, self.out = read, nn.LazyLinear(3)

    def forward(self, x):
        return self.out(self.read(*self.rnn(x)))


class Cells(nn.Module):
    def __init__(self):
        super().__init__()
        self.cell, self.out = nn.RNNCell(5, 7, nonlinearity="relu"), nn.Linear(7, 3)

    def forward(self, x):
        state = torch.zeros(x.shape[0], 7)
        for step in range(x.shape[1]):
            state = self.cell(x[:, step], state)
        return self.out(state)


NETWORKS = {
    "last step": Recurrent(lambda y, h: y[:, -1]),
    "last state": Recurrent(lambda y, h: h[-1], num_layers=2),
    "squeezed": Recurrent(lambda y, h: h.squeeze(0), bias=False),
    "both directions": Recurrent(lambda y, h: y.flatten(1), num_layers=2, bidirectional=True),
    "mean of steps": Recurrent(lambda y, h: y.mean(1)),
    "cells": Cells(),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_are_their_ann_in_every_engine(name, tmp_path):
    ann, images = NETWORKS[name].eval(), torch.rand(30, 4, 5)
    wanted = ann(images).detach()
    snn = quartz_plugin.convert(ann, images, 4097, percentile=100)
    assert float((snn(images) - wanted).abs().max()) < 2e-3 * float(wanted.abs().max())
    snn = quartz_plugin.convert(ann, images, 9, weight_bits=8)
    stepped = snn.run(images[:3], engine="stepped")
    for engine in ("event", "analytic"):
        assert_same_spikes(snn.run(images[:3], engine=engine).spike_steps, stepped.spike_steps)
    assert quartz_plugin.verify(ann, snn, images).agreement is not None
    snn.save(tmp_path / "snn.safetensors")
    assert torch.equal(quartz_plugin.load(tmp_path / "snn.safetensors")(images), snn(images))


@pytest.mark.parametrize("layer", [nn.RNN(5, 7, batch_first=True), nn.LSTM(5, 7, batch_first=True), nn.GRU(5, 7)])
def test_without_relus_are_refused_by_their_path(layer):
    class Other(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn, self.out = layer, nn.Linear(7, 3)

        def forward(self, x):
            return self.out(self.rnn(x)[0][:, -1])

    with pytest.raises(ConversionError, match=rf"'rnn' \({type(layer).__name__}\)"):
        quartz_plugin.convert(Other(), torch.rand(9, 4, 5))
