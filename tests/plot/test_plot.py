"""Pictures: that they show what was simulated, and the numbers they were given."""

import csv
import io

import matplotlib as mpl
import numpy as np
import pytest
import torch
from torch import nn

import quartz_plugin
from quartz_plugin import plot
from quartz_plugin.plot import (
    activations,
    chronogram,
    cores_per_layer,
    counts_per_layer,
    energy_delay_bars,
    error_curves,
    raster,
    spike_time_histograms,
)
from quartz_plugin.plot import values as value_pictures

mpl.use("Agg")
from matplotlib import pyplot
from matplotlib.colors import to_hex

BLUE, GREY, ORANGE = plot.EXCITING, plot.ZERO, plot.EARLY


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


def saturating(**options):
    """A network whose ANN exceeds its scales, early spikes where there is no hold, and images for it."""
    torch.manual_seed(1)
    ann = nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(27, 4))
    images = torch.rand(70, 1, 8, 8)
    return ann, quartz_plugin.convert(ann, images, 8, percentile=70, output_percentile=70, **options), images


def bars(ax):
    """Colour -> {position: length} of an axes' upright bars."""
    drawn = {}
    for bar in (bar for container in ax.containers for bar in container):
        drawn.setdefault(to_hex(bar.get_facecolor()), {})[bar.get_x() + bar.get_width() / 2] = bar.get_height()
    return drawn


class TestSpikeTimeHistograms:
    @pytest.mark.parametrize("options", [{}, {"hold": False}, {"rectifier": "silent"}, quartz_plugin.PAPER])
    def test_bars_are_the_counts_of_each_kind_at_each_step(self, options):
        _, snn, images = saturating(**options)
        result = snn.run(images)
        axes = spike_time_histograms(result)
        assert len(axes) == len(result.spike_steps) == 3
        kinds = set()
        for ax, (name, steps) in zip(axes, result.spike_steps.items(), strict=True):
            window = result.windows[name]
            drawn = bars(ax)
            kinds |= set(drawn)
            for color, chosen in {
                ORANGE: (steps >= 0) & (steps < window.start),
                BLUE: (steps >= window.start) & (steps != window.end),
                GREY: steps == window.end,
            }.items():
                assert sum(drawn.get(color, {}).values()) == int(chosen.sum())
            every = {step: count for counts in drawn.values() for step, count in counts.items()}
            assert every == {step: int((steps == step).sum()) for step in steps[steps >= 0].unique().tolist()}
            shortest, low = min(every.values()), ax.get_ylim()[0]
            assert low < shortest
        assert (ORANGE in kinds) == (not snn.graph.hold)

    def test_shades_windows_names_layers_and_tells_the_silent(self):
        _, snn, images = saturating(rectifier="silent")
        result = snn.run(images)
        axes = spike_time_histograms(result)
        assert [ax.get_ylabel() for ax in axes] == ["input", "layer 1", "output"]
        # The output has the negative half of its window, too.
        shades = [ax.patches[-1] for ax in axes]
        assert [(s.get_x(), s.get_x() + s.get_width()) for s in shades] == [(-0.5, 7.5), (6.5, 14.5), (13.5, 28.5)]
        silent = [100 * float((steps == -1).double().mean()) for steps in result.spike_steps.values()]
        assert [text.get_text() for ax in axes for text in ax.texts] == [f"{s:.1f} %\nsilent" for s in silent]
        assert len({ax.get_xlim() for ax in axes}) == 1
        assert axes[0].get_title().startswith("spikes of 70 images")

    def test_takes_axes_and_counts_them(self, snn):
        result = snn.run(torch.rand(1, 1, 8, 8))
        axes = pyplot.subplots(1, 3)[1]
        assert spike_time_histograms(result, axes) is axes
        assert all(ax.containers for ax in axes)
        with pytest.raises(ValueError, match=r"axes must be 3, one for each of \['input', '1', 'output'\], got 2"):
            spike_time_histograms(result, axes[:2])

    def test_needs_the_spikes_of_all_layers(self, snn):
        with pytest.raises(ValueError, match="record=True"):
            spike_time_histograms(snn.run(torch.rand(1, 1, 8, 8), record=False))

    def test_grows_with_depth(self):
        layers = [module for _ in range(60) for module in (nn.Linear(3, 3), nn.ReLU())]
        for layer in layers[::2]:
            nn.init.eye_(layer.weight)
        images = torch.rand(4, 3)
        snn = quartz_plugin.convert(nn.Sequential(*layers, nn.Linear(3, 2)), images, 4)
        figure = spike_time_histograms(snn.run(images))[0].figure
        assert figure.get_figheight() / 62 > 0.5


class TestActivations:
    @pytest.mark.parametrize(
        "options", [{}, {"hold": False}, {"granularity": "channel"}, {"weight_bits": 8}, quartz_plugin.PAPER]
    )
    def test_counts_every_unit_where_ann_and_snn_have_it(self, options):
        ann, snn, images = saturating(**options)
        axes = activations(ann, snn, images)
        assert [ax.get_title() for ax in axes] == ["layer 1", "output"]
        result = snn.run(images)
        exact = [ann[:2](images).detach(), ann(images).detach()]
        for ax, name, ours in zip(axes, ["1", "output"], exact, strict=True):
            theirs = result.levels(name) * snn.graph.scales[name] / result.windows[name].length
            counts = drawn_counts(ax)
            assert counts.sum() == ours.numel()
            (mesh,) = ax.collections
            corners = mesh.get_coordinates()
            across, up = corners[0, :, 0], corners[:, 0, 1]
            middles = (across[1:] + across[:-1]) / 2, (up[1:] + up[:-1]) / 2
            for middle, marginal, values in zip(middles, (counts.sum(0), counts.sum(1)), (ours, theirs), strict=True):
                width = float(middle[1] - middle[0])
                assert abs((middle * marginal).sum() / marginal.sum() - float(values.mean())) <= width / 2
            if "granularity" not in options:
                # The units have one scale: a row of cells is a level, and lies around it.
                assert (middles[1] * counts.sum(1)).sum() / counts.sum() == pytest.approx(
                    float(theirs.mean()), abs=1e-5
                )
            (low, high), limits = ax.get_xlim(), ax.get_ylim()
            assert (low, high) == limits
            assert low <= min(ours.min(), theirs.min())
            assert high >= max(ours.max(), theirs.max())

    def test_agreement_lies_on_the_diagonal(self):
        ann, images = nn.Sequential(nn.Linear(5, 5), nn.ReLU(), nn.Linear(5, 2)), torch.rand(300, 5)
        snn = quartz_plugin.convert(ann, images, 256, percentile=100)
        for ax in activations(ann, snn, images):
            rows, columns = np.nonzero(drawn_counts(ax))
            assert np.abs(rows - columns).max() <= 1
            assert len(set(rows)) > 5

    def test_marks_the_value_one_where_values_saturate(self):
        ann, snn, images = saturating()
        layer, output = activations(ann, snn, images)
        scale, logit = float(snn.graph.scales["1"]), snn.graph.output_scale
        assert values_one(layer) == pytest.approx([scale])
        assert values_one(output) == pytest.approx([-logit, logit])
        by_channel = saturating(granularity="channel")
        scales = by_channel[1].graph.scales["1"]
        assert values_one(activations(*by_channel)[0]) == pytest.approx([float(scales.min()), float(scales.max())])
        whole = quartz_plugin.convert(ann, images, 8, percentile=100)
        assert [values_one(ax) for ax in activations(ann, whole, images)] == [[], []]

    def test_carries_signed_values_by_two_layers(self):
        ann = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3), nn.Linear(3, 6), nn.ReLU(), nn.Linear(6, 2))
        images = torch.rand(40, 4)
        snn = quartz_plugin.convert(ann, images, 32, linear="pair")
        axes = activations(ann, snn, images)
        assert len(axes) == len(snn.graph.layers) == 5
        assert [drawn_counts(ax).sum() for ax in axes] == [40 * n for n in (6, 3, 3, 6, 2)]

    # 70 images of 32 units. Every 32nd unit would be the same of all images: every 33rd then.
    @pytest.mark.parametrize(("limit", "points"), [(64, 64), (70, 68), (1000, 747)])
    def test_picks_units_evenly_over_images_and_positions(self, monkeypatch, limit, points):
        monkeypatch.setattr(value_pictures, "POINTS", limit)
        images = torch.rand(70, 1, 4, 4)
        ann = nn.Sequential(nn.Conv2d(1, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(32, 2))
        with torch.no_grad():
            ann[0].weight.fill_(1.0)
            ann[0].bias.copy_(torch.tensor([0.0, 5.0]))
        snn = quartz_plugin.convert(ann, images, 16)
        first = drawn_counts(activations(ann, snn, images)[0])
        assert first.sum() == points
        # The channels lie 5 apart.
        upper = first[:, first.shape[1] // 2 :].sum()
        assert abs(upper / first.sum() - 0.5) < 0.1

    def test_picks_layers_evenly_the_first_and_the_output_among_them(self):
        layers = [module for _ in range(9) for module in (nn.Linear(3, 3), nn.ReLU())]
        for layer in layers[::2]:
            nn.init.eye_(layer.weight)
        ann, images = nn.Sequential(*layers, nn.Linear(3, 2)), torch.rand(20, 3)
        snn = quartz_plugin.convert(ann, images, 8)
        titles = [ax.get_title() for ax in activations(ann, snn, images, panels=4)]
        assert titles == ["layer 1", "layer 7", "layer 13", "output"]
        axes = activations(ann, snn, images)
        assert len(axes) == 10
        # No empty panel is left over, and there is one colour bar.
        assert len(axes[0].figure.axes) == 11
        given = pyplot.subplots(1, 2)[1]
        assert activations(ann, snn, images, given, panels=2) is given
        assert [drawn_counts(ax).sum() for ax in given] == [60, 40]
        with pytest.raises(ValueError, match="axes must be 3"):
            activations(ann, snn, images, given, panels=3)
        with pytest.raises(ValueError, match="panels must be at least 2"):
            activations(ann, snn, images, panels=1)

    def test_refuses_another_network_and_no_images(self):
        ann, snn, images = saturating()
        with pytest.raises(ValueError, match="not the same network"):
            activations(nn.Sequential(nn.Flatten(), nn.Linear(64, 4)), snn, images)
        with pytest.raises(ValueError, match="at least one image"):
            activations(ann, snn, images[:0])


def drawn_counts(ax):
    """Units in each cell of a panel, rows from below."""
    (mesh,) = ax.collections
    return np.ma.filled(mesh.get_array(), 0)


def values_one(ax):
    """Heights of the dashed lines, rising."""
    return sorted(line.get_ydata()[0] for line in ax.lines if line.get_linestyle() == "--")


MEMORY = [
    {"t_max": t, "percentile": 99.0, "hold": hold, "rectifier": rectifier, "accuracy": accuracy, "synops": synops}
    for t, hold, rectifier, accuracy, synops in (
        (16, False, "spike", 0.99, 2e5),
        (4, False, "spike", 0.95, 2e5),
        (4, True, "silent", 0.96, 4e4),
        (16, True, "silent", 0.98, 8e4),
        (4, False, "silent", 0.94, 5e4),
    )
]


PUBLISHED = [
    {"t_max": None, "accuracy": 0.993, "operations": None},
    {"t_max": 32, "accuracy": 0.985, "operations": 3e5},
    {"t_max": 8, "accuracy": 0.92, "operations": 1e5},
    {"t_max": 64, "accuracy": None, "operations": 6e5},
]


def as_csv(rows):
    """Rows as csv.DictReader gives them back."""
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0])
    writer.writeheader()
    writer.writerows(rows)
    return list(csv.DictReader(io.StringIO(text.getvalue())))


def horizontals(ax):
    """Label -> (height, line style) of every line across."""
    return {
        line.get_label(): (round(line.get_ydata()[0], 6), line.get_linestyle())
        for line in ax.lines
        if line.get_marker() in ("None", None)
    }


def curves(ax):
    """Label -> points of every line with points."""
    return {
        line.get_label(): list(map(tuple, np.round(line.get_xydata(), 6).tolist()))
        for line in ax.lines
        if line.get_marker() not in ("None", None)
    }


class TestErrorCurves:
    @pytest.mark.parametrize("rows", [MEMORY, as_csv(MEMORY)], ids=["memory", "csv"])
    def test_a_line_for_each_combination_that_occurs_labelled_by_what_differs(self, rows):
        ax = error_curves(rows, ann_accuracy=0.992)
        assert curves(ax) == {
            "no hold, rectifier spike": [(4, 5), (16, 1)],
            "hold, rectifier silent": [(4, 4), (16, 2)],
            "no hold, rectifier silent": [(4, 6)],
        }
        (dashed,) = (line for line in ax.lines if line.get_marker() == "None")
        assert dashed.get_linestyle() == "--"
        assert dashed.get_ydata()[0] == pytest.approx(0.8)
        legend = [text.get_text() for text in ax.get_legend().get_texts()]
        assert legend == [*curves(ax), "ANN, 0.8 %"]
        assert (ax.get_xscale(), ax.get_yscale()) == ("log", "log")
        assert [label.get_text() for label in ax.get_xticklabels()] == ["4", "16"]
        assert (ax.get_xlabel(), ax.get_ylabel()) == ("T_max", "error (%)")
        assert not list(ax.texts)

    def test_writes_t_at_the_points_of_a_cost(self):
        ax = error_curves(as_csv(MEMORY), "synops")
        assert ax.get_xlabel() == "synaptic operations an inference (spikes x synapses)"
        assert curves(ax)["no hold, rectifier spike"] == [(2e5, 5), (2e5, 1)]
        written = {(note.xy[0], round(note.xy[1], 6)): note.get_text() for note in ax.texts}
        assert written == {(2e5, 5): "4", (2e5, 1): "16", (4e4, 4): "4", (8e4, 2): "16", (5e4, 6): "4"}
        assert ax.get_legend().get_title().get_text() == "numbers at the points: T_max"

    def test_energy_is_drawn_in_microjoules_and_an_unknown_column_by_its_name(self):
        rows = [{"t_max": "8", "energy_loihi": "2.5e-6", "area": 3, "accuracy": "0.9"}]
        ax = error_curves(rows, "energy_loihi")
        assert ax.get_xlabel() == "energy an inference, Loihi 1 (uJ)"
        assert curves(ax) == {"spiking network": [(2.5, 10)]}
        ax = error_curves(rows, "area")
        assert (ax.get_xlabel(), curves(ax)) == ("area", {"spiking network": [(3, 10)]})

    def test_spells_options_alike_and_skips_rows_without_values(self):
        rows = [
            {"t_max": "2", "hold": "True", "percentile": "99", "accuracy": "0.9"},
            {"t_max": 4, "hold": True, "percentile": 99.0, "accuracy": torch.tensor(0.95, dtype=torch.float64)},
            {"t_max": 8, "hold": "true", "percentile": "99.00", "accuracy": ""},
            {"t_max": 8, "hold": "false", "percentile": "99.00", "accuracy": None},
        ]
        assert curves(error_curves(rows)) == {"spiking network": [(2, 10), (4, 5)]}

    def test_with_an_option_on_the_axis_t_tells_the_lines_apart(self):
        rows = [
            {"t_max": t, "percentile": p, "hold": True, "accuracy": 0.9 + t / 1000 + p / 10000}
            for p in (99.9, 99.0)
            for t in (4, 8)
        ]
        ax = error_curves(rows, "percentile")
        assert curves(ax) == {
            "T = 4": [(99.0, pytest.approx(8.61)), (99.9, pytest.approx(8.601))],
            "T = 8": [(99.0, pytest.approx(8.21)), (99.9, pytest.approx(8.201))],
        }
        assert not list(ax.texts)

    @pytest.mark.parametrize("accuracies", [(0.9, 1.0), (1.0, 1.0)])
    def test_no_error_at_all_is_drawn_and_within_the_axes(self, accuracies):
        rows = [{"t_max": t, "accuracy": accuracy} for t, accuracy in zip((4, 8), accuracies, strict=True)]
        ax = error_curves(rows, ann_accuracy=1.0)
        ax.figure.canvas.draw()
        points = curves(ax)["spiking network"]
        assert [error for _, error in points] == pytest.approx([100 - 100 * a for a in accuracies])
        heights = ax.transAxes.inverted().transform(ax.transData.transform(points))[:, 1]
        assert np.isfinite(heights).all()
        assert 0 <= heights.min() <= heights.max() <= 1
        assert len(set(heights.round(6))) == len(set(accuracies))
        assert "0" in [label.get_text() for label in ax.get_yticklabels()]

    @pytest.mark.parametrize("rows", [PUBLISHED, as_csv(PUBLISHED)], ids=["memory", "csv"])
    def test_draws_what_was_published_beside_ours(self, rows):
        ours = curves(error_curves(MEMORY))
        ax = error_curves(MEMORY, ann_accuracy=0.992, published={"theirs": rows})
        assert curves(ax) == ours | {"theirs": [(8, 8), (32, 1.5)]}
        assert horizontals(ax) == {"ANN, 0.8 %": (0.8, "--"), "theirs, ANN, 0.7 %": (0.7, ":")}
        legend = [text.get_text() for text in ax.get_legend().get_texts()]
        assert legend == [*ours, "ANN, 0.8 %", "theirs", "theirs, ANN, 0.7 %"]
        assert [label.get_text() for label in ax.get_xticklabels()] == ["4", "8", "16", "32"]
        assert not list(ax.texts)

    def test_what_was_published_looks_unlike_ours(self):
        publications = {name: [{"t_max": 8, "accuracy": 0.9}, {"accuracy": 0.95}] for name in ("one", "two")}
        ax = error_curves(MEMORY, published=publications)
        looks = {line.get_label(): (line.get_linestyle(), line.get_marker(), line.get_color()) for line in ax.lines}
        colors = [looks[name][2] for name in ("one", "two")]
        assert [looks[name] for name in ("one", "two")] == [(":", *look) for look in zip("*P", colors, strict=True)]
        assert [looks[f"{name}, ANN, 5 %"][2] for name in ("one", "two")] == colors
        assert len({*colors, *plot.PALETTE}) == 2 + len(plot.PALETTE)
        filled = {line.get_label(): line.get_markerfacecolor() for line in ax.lines}
        assert [filled[name] for name in ("one", "two")] == colors
        assert {filled[name] for name in curves(ax) if name not in publications} == {"none"}

    def test_writes_t_at_published_points_of_a_cost_and_scales_them(self):
        ours = [{"t_max": 8, "accuracy": 0.9, "energy_loihi": 2e-6}]
        theirs = [
            {"t_max": 32, "accuracy": 0.97, "energy_loihi": 5e-6},
            {"t_max": 16, "accuracy": 0.95, "energy_loihi": 7e-6},
            {"t_max": 64, "accuracy": 0.98},
        ]
        ax = error_curves(ours, "energy_loihi", published={"theirs": theirs})
        assert curves(ax) == {"spiking network": [(2, 10)], "theirs": [(7, 5), (5, 3)]}
        written = {tuple(np.round(note.xy, 6).tolist()): note.get_text() for note in ax.texts}
        assert written == {(2, 10): "8", (7, 5): "16", (5, 3): "32"}
        assert ax.get_legend().get_title().get_text() == "numbers at the points: T_max"

    def test_leaves_out_a_publication_without_values(self):
        ours = curves(error_curves(MEMORY, "synops"))
        for rows in (PUBLISHED, PUBLISHED[:1], []):
            ax = error_curves(MEMORY, "synops", published={"theirs": rows})
            assert (curves(ax), horizontals(ax)) == (ours, {})
            assert [text.get_text() for text in ax.get_legend().get_texts()] == list(ours)

    @pytest.mark.parametrize(
        "theirs", [[{"t_max": 8, "accuracy": 1.0}], [{"t_max": 8, "accuracy": 0.9}, {"t_max": "", "accuracy": 1.0}]]
    )
    def test_published_errors_set_the_scale(self, theirs):
        ours = [{"t_max": 8, "accuracy": 0.9}]
        assert error_curves(ours).get_yscale() == "log"
        ax = error_curves(ours, published={"theirs": theirs})
        assert ax.get_yscale() == "symlog"
        assert "0" in [label.get_text() for label in ax.get_yticklabels()]

    def test_published_accuracies_are_shares(self):
        for t_max in (8, None):
            with pytest.raises(ValueError, match=r"a share in \[0, 1\], got 92.4"):
                error_curves(MEMORY, published={"theirs": [{"t_max": t_max, "accuracy": 92.4}]})

    def test_draws_on_given_axes(self):
        ax = pyplot.subplots()[1]
        assert error_curves(MEMORY, ax=ax) is ax
        assert len(curves(ax)) == 3

    @pytest.mark.parametrize(
        ("rows", "x", "message"),
        [
            ([], "t_max", "no rows"),
            ([{"t_max": 2, "accuracy": 0.9}], "synops", r"value in 'synops'; columns are \['t_max', 'accuracy'\]"),
            ([{"t_max": 2, "top1": 0.9}], "synops", "'synops' and 'accuracy'"),
            ([{"t_max": 2, "accuracy": ""}, {"accuracy": 0.9}], "t_max", "'t_max' and 'accuracy'"),
            ([{"t_max": 2, "bias": "spike", "accuracy": 0.9}], "bias", "'bias' must hold numbers, got 'spike'"),
            ([{"t_max": 2, "hold": True, "accuracy": 0.9}], "hold", "'hold' must hold numbers, got True"),
            ([{"t_max": 2, "accuracy": 98.2}], "t_max", r"a share in \[0, 1\], got 98.2"),
        ],
    )
    def test_names_what_is_missing(self, rows, x, message):
        with pytest.raises(ValueError, match=message):
            error_curves(rows, x)


def lying(ax):
    """Layer -> (length, colour) of an axes' horizontal bars, from the top."""
    names = [label.get_text() for label in ax.get_yticklabels()]
    heights = [ax.transData.transform((1, tick))[1] for tick in ax.get_yticks()]
    assert heights == sorted(heights, reverse=True)
    return {
        name: (bar.get_width(), to_hex(bar.get_facecolor())) for name, bar in zip(names, ax.containers[0], strict=True)
    }


def numbers(ax):
    """What is written at the bars."""
    return [text.get_text() for text in ax.texts]


class TestBars:
    def test_energy_delay_products_are_in_microjoule_seconds_on_a_log_axis(self):
        ax = energy_delay_bars({"Quartz": 0.9e-6, "rate code": 4.38e-6, "GPU": 222e-6})
        lengths = {name: length for name, (length, _) in lying(ax).items()}
        assert lengths == pytest.approx({"Quartz": 0.9, "rate code": 4.38, "GPU": 222})
        assert numbers(ax) == ["0.9", "4.38", "222"]
        assert ax.get_xlabel() == "energy-delay product (uJs)"
        assert ax.get_xscale() == "log"
        assert 0 < ax.get_xlim()[0] < 0.9 / 1.5
        assert ax.get_xlim()[1] > 222

    @pytest.mark.parametrize(
        ("products", "message"),
        [({}, "nothing"), ({"a": 1e-6, "b": 0.0}, "'b': 0.0"), ({"a": -1}, "positive"), ({"a": float("nan")}, "nan")],
    )
    def test_energy_delay_products_must_be_positive(self, products, message):
        with pytest.raises(ValueError, match=message):
            energy_delay_bars(products)

    def test_cores_are_coloured_by_what_binds(self):
        cores = {"1": 4, "4": 2, "7": 1, "output": 1}
        ax = cores_per_layer(cores, binding={"1": "compartments", "4": "memory", "output": "compartments"})
        drawn = lying(ax)
        assert {name: length for name, (length, _) in drawn.items()} == cores
        assert numbers(ax) == ["4", "2", "1", "1"]
        legend = ax.get_legend()
        handles = {
            text.get_text(): to_hex(patch.get_facecolor())
            for text, patch in zip(legend.get_texts(), legend.get_patches(), strict=True)
        }
        assert set(handles) == {"compartments", "memory"}
        assert handles["compartments"] != handles["memory"]
        assert drawn["1"][1] == drawn["output"][1] == handles["compartments"]
        assert drawn["4"][1] == handles["memory"]
        assert drawn["7"][1] == plot.NEUTRAL
        ax.figure.canvas.draw()
        assert all(float(tick).is_integer() for tick in ax.get_xticks())
        assert cores_per_layer(cores).get_legend() is None

    def test_cores_name_layers_that_are_not_there(self):
        with pytest.raises(ValueError, match=r"cores does not: \['8'\]"):
            cores_per_layer({"7": 1}, binding={"8": "compartments"})

    def test_counts_are_written_with_thousands_apart_or_three_digits(self):
        counts = {"input": 0.12345, "1": 1234567.8, "4": 999.6, "7": 12.345, "9": 99.7, "output": 0}
        ax = counts_per_layer(counts, quantity="spikes an inference")
        assert {name: length for name, (length, _) in lying(ax).items()} == counts
        assert numbers(ax) == ["0.123", "1,234,568", "1,000", "12.3", "100", "0"]
        assert ax.get_xlabel() == "spikes an inference"

    def test_counts_of_nothing_are_drawn(self):
        ax = counts_per_layer({"1": 0, "output": 0})
        assert numbers(ax) == ["0", "0"]
        assert ax.get_xlim()[0] == 0

    @pytest.mark.parametrize("draw", [energy_delay_bars, cores_per_layer, counts_per_layer])
    def test_given_axes_are_used_and_figures_grow(self, draw):
        ax = pyplot.subplots()[1]
        assert draw({"a": 1}, ax) is ax
        assert list(lying(ax)) == ["a"]
        figure = draw({f"layer{i}.relu": i + 1 for i in range(60)}).figure
        assert figure.get_figheight() / 60 > 0.2
        with pytest.raises(ValueError, match="nothing"):
            draw({})
