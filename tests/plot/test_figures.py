"""The table of figures: complete, without doubles, and read by metrics, files and pictures."""

import sys

import pytest
import torch
from torch import nn

import quartz_plugin
from quartz_plugin import metrics
from quartz_plugin.costs import COUNTS, HOROWITZ_FLOAT32, HOROWITZ_INT8, LOIHI, paper_profile
from quartz_plugin.costs.rate import RATE_COUNTS
from quartz_plugin.figures import FIGURES, SUMMARY, SWEEP_COLUMNS, SWEEP_PRINTED, figure_of
from quartz_plugin.plot import error_curves

PROFILES = [LOIHI, HOROWITZ_FLOAT32, HOROWITZ_INT8, paper_profile(16), paper_profile(16, strict=True)]


@pytest.fixture
def counted():
    """Every metric of a network's result, and what it gave."""
    ann = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    images = torch.rand(32, 4)
    snn = quartz_plugin.convert(ann, images)
    result = snn.run(images)
    found = [
        metrics.SpikeCount(snn), metrics.SpikesPerNeuron(snn), metrics.EarlySpikeRate(snn), metrics.NeuronEvents(snn),
        metrics.QuartzOperations(snn), metrics.MemoryAccesses(snn), metrics.EnergyEstimate(snn, PROFILES),
        *(metrics.SynapticOperations(snn, kind) for kind in ("synapse", "factored", "merged")),
    ]  # fmt: skip
    for metric in found:
        metric.update(result)
    ann_operations = metrics.ANNOperations(ann, images)
    ann_operations.update(images)
    return [*found, ann_operations]


def test_every_figure_that_metrics_give_stands_in_the_table(counted):
    names = {name for metric in counted for name in metric.compute() if "/" not in name}
    assert names <= set(FIGURES)
    assert set(RATE_COUNTS) <= set(FIGURES)
    assert {*SWEEP_COLUMNS, *SWEEP_PRINTED, *SUMMARY} <= set(FIGURES)
    assert {f"energy_{profile.name}" for profile in PROFILES} <= set(FIGURES)
    assert set(COUNTS) <= set(FIGURES)


def test_no_two_figures_are_shown_alike():
    assert len({figure.label for figure in FIGURES.values()}) == len(FIGURES)
    for name, figure in FIGURES.items():
        assert figure.name == name
        assert figure.label.strip()
        assert figure.axis


def test_metrics_have_the_tables_sense_of_better(counted):
    for metric in [*counted, metrics.Agreement(), metrics.DecisionLatency()]:
        first = {"Agreement": "agreement", "DecisionLatency": "decision_steps"}.get(type(metric).__name__)
        first = first or next(iter(metric.compute()))
        # A count of spikes has no better side for torchmetrics.
        if metric.higher_is_better is not None:
            assert metric.higher_is_better == FIGURES[first].higher_is_better, first


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("accuracy", 0.98765, "98.77 %"),
        ("gained", 4.0, "4"),
        ("zero_spikes", 3488.84, "3,488.8"),
        ("spikes_per_neuron", 0.3449, "0.345"),
        ("energy_45nm_int8", 3.554e-8, "0.03554 uJ"),
        ("energy_paper", 7.76e6, "7.76 M"),
        ("synops", 225_840.0, "225,840.0"),
    ],
)
def test_values_are_shown_with_their_units(name, value, text):
    assert FIGURES[name].text(value) == text


def test_pictures_read_axis_and_factor_from_the_table():
    pytest.importorskip("matplotlib").use("Agg")
    from matplotlib import pyplot

    rows = [{"t_max": 4, "accuracy": 0.9, name: 2.0} for name in ("x",)]
    for name in ("ties", "energy_paper", "spikes_per_neuron", "nobody_knows"):
        ax = error_curves([{**rows[0], name: 2.0}], name)
        assert ax.get_xlabel() == figure_of(name).axis_label
        assert list(ax.lines[0].get_xdata()) == pytest.approx([2.0 * figure_of(name).factor])
        pyplot.close("all")


def test_plot_of_a_metric_names_the_missing_extra(monkeypatch, counted):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for metric in (metrics.Agreement(), metrics.DecisionLatency(), counted[0]):
        with pytest.raises(ImportError, match=r"needs matplotlib: pip install 'quartz_plugin\[plot\]'"):
            metric.plot()
