"""Pictures: that they show what was simulated."""

import matplotlib as mpl
import pytest
import torch
from torch import nn

import quartz_plugin
from quartz_plugin.plot import chronogram, raster

mpl.use("Agg")
from matplotlib import pyplot


@pytest.fixture(autouse=True)
def _close():
    yield
    pyplot.close("all")


@pytest.fixture(params=[{}, {"rectifier": "silent"}, quartz_plugin.PAPER], ids=["hold", "silent", "paper"])
def snn(request):
    ann = nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(27, 4))
    return quartz_plugin.convert(ann, torch.rand(20, 1, 8, 8), 8, **request.param)


def test_chronogram_draws_membrane_threshold_readout_and_rectifier(snn):
    image = torch.rand(1, 8, 8)
    spikes, current, membrane = chronogram(snn, image, layer="1", neuron=5)
    steps = membrane.lines[0].get_xdata()
    assert list(steps) == list(range(int(steps[0]), 15))
    assert membrane.lines[1].get_ydata()[0] == 7.5
    verticals = {line.get_xdata()[0] for line in current.lines[1:]}
    assert verticals == {7, 14}
    fired = int(snn.run(image[None], engine="stepped").spike_steps["1"].flatten()[5])
    marks = [line.get_xdata()[0] for line in membrane.lines if line.get_marker() == "o"]
    assert marks == ([] if fired < 0 else [fired])
    assert spikes.get_title(loc="left") == "layer 1, neuron 5"


def test_chronogram_of_an_output_has_no_rectifier_and_takes_axes(snn):
    axes = pyplot.subplots(3, 1)[1]
    assert chronogram(snn, torch.rand(1, 1, 8, 8), layer="output", axes=axes) is axes
    assert {line.get_xdata()[0] for line in axes[1].lines[1:]} == {14}


@pytest.mark.parametrize(("layer", "neuron"), [("nowhere", None), ("output", 4), ("output", -1)])
def test_chronogram_names_what_there_is(snn, layer, neuron):
    with pytest.raises(ValueError, match=r"layer must be one of|has 4 neurons"):
        chronogram(snn, torch.rand(1, 8, 8), layer=layer, neuron=neuron)


def test_raster_draws_one_mark_for_every_spike(snn):
    result = snn.run(torch.rand(2, 1, 8, 8))
    ax = pyplot.subplots()[1]
    assert raster(result, image=1, ax=ax) is ax
    drawn = sorted(float(x) for marks in ax.collections for x, _ in marks.get_offsets())
    expected = sorted(float(s) for steps in result.spike_steps.values() for s in steps[1].flatten() if s >= 0)
    assert drawn == expected
    assert [label.get_text().splitlines()[0] for label in ax.get_yticklabels()] == ["input", "layer 1", "output"]


def test_raster_picks_at_most_so_many_neurons_of_a_layer(snn):
    result = snn.run(torch.rand(1, 1, 8, 8))
    ax = raster(result, neurons=10)
    drawn = sum(len(marks.get_offsets()) for marks in ax.collections)
    assert drawn <= 10 + 10 + 4
