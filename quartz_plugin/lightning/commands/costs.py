"""costs: ANN, rate code and Quartz side by side under the same counts, and on Loihi."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import quartz_plugin
from quartz_plugin import plot
from quartz_plugin.config import ConversionConfig
from quartz_plugin.costs.rate import RateCodedNetwork
from quartz_plugin.figures import FIGURES
from quartz_plugin.hardware import map_to_loihi
from quartz_plugin.lightning.commands.base import CommandTrainer
from quartz_plugin.lightning.comparison import Figures, ann_columns, loihi_table, side_by_side
from quartz_plugin.lightning.console import print_once
from quartz_plugin.lightning.loading import load_trained
from quartz_plugin.lightning.modules import Classifier, EvaluatedClassifier, RateClassifier
from quartz_plugin.lightning.options import options_with_defaults
from quartz_plugin.lightning.outputs import save_pictures_once, write_csv_once
from quartz_plugin.lightning.pictures import Pictures


class Costs(CommandTrainer):
    """Costs."""

    def costs(
        self,
        model: Classifier,
        datamodule: Any,
        ckpt_path: str | None = None,
        rate_steps: list[int] = [8, 32],  # noqa: B006
        loihi_t_max: list[int] = [8, 16, 32, 64],  # noqa: B006
        output: str | None = None,
        **conversion: Any,
    ) -> None:
        """Compare what an inference costs: ANN, rate code and Quartz under the same counts, and on Loihi.

        Each T is converted with the paper's neuron (forced zeros) and with silent zeros.

        Parameters
        ----------
        model : Classifier
            The classifier.
        datamodule : ClassificationData
            Its data; calibrated on training images only.
        ckpt_path : str, optional
            Checkpoint that fit wrote; without it the model is taken as it is (--model.weights).
        rate_steps : list[int]
            Steps of the rate-coded networks, made of the same ANN and normalisation.
        loihi_t_max : list[int]
            The T to map to Loihi, with the paper's neuron.
        output : str, optional
            CSV file to write; default costs.csv in the trainer's folder, pictures beside it.
        **conversion
            Options of the conversions.
        """
        options = options_with_defaults("costs", conversion)
        t_max = options.pop("t_max")
        _check_options(options, [*t_max, *loihi_t_max])
        trained = load_trained(model, ckpt_path, datamodule)
        path = self.file(output, "costs.csv")
        figures = ann_columns(self.test_ann(trained, datamodule))
        figures |= self._rate_coded(trained, datamodule, rate_steps, {**options, "t_max": min(t_max)})
        mappings, estimates = {}, {}
        for t in sorted({*t_max, *loihi_t_max}):
            paper = self.converted(trained, datamodule, {**options, "t_max": t, **quartz_plugin.PAPER})
            found = self.test_spiking(trained, paper, datamodule)
            if t in t_max:
                figures[f"Quartz, T = {t}"] = found
                silent = self.converted(trained, datamodule, {**options, "t_max": t, "rectifier": "silent"})
                figures[f"silent zeros, T = {t}"] = self.test_spiking(trained, silent, datamodule)
            if t in loihi_t_max:
                mappings[t] = map_to_loihi(paper)
                estimates[t] = mappings[t].cores, mappings[t].estimate(found)
        write_csv_once(path, [{"network": name, **of} for name, of in figures.items()])
        print_once("\n" + side_by_side(figures, all_figures=True))
        pictures = _pictures_of_operations(figures)
        if mappings:
            table = loihi_table(estimates, model.measured_on_loihi)
            print_once(f"\nT = {max(mappings)} on Loihi 1:\n{mappings[max(mappings)]}\n\n{table}")
            pictures |= _pictures_of_loihi(model, mappings[max(mappings)], estimates)
        print_once(f"\nwrote {path}")
        for picture in save_pictures_once(path.parent, pictures).values():
            print_once(f"wrote {picture}")

    def _rate_coded(
        self, model: EvaluatedClassifier, datamodule: Any, rate_steps: Sequence[int], options: Mapping[str, Any]
    ) -> dict[str, Figures]:
        """Figures of rate-coded networks of the same ANN."""
        rate = RateCodedNetwork(self.converted(model, datamodule, options))
        figures: dict[str, Figures] = {}
        for steps in rate_steps:
            tested = RateClassifier(rate, steps, model.classes, model.decisions, model.cost_images)
            self._tested(tested, datamodule)
            figures[f"rate code, {steps} steps"] = tested.figures
        return figures


def _check_options(options: Mapping[str, Any], t_max: Sequence[int]) -> None:
    """Raise ValueError for options that one of the networks cannot have."""
    if any("t_max" in own for own in (options["layers"] or {}).values()):
        raise ValueError("a rate code has one T for all layers: leave t_max out of --layers")
    for t in t_max:
        ConversionConfig(**{**options, "t_max": t, **quartz_plugin.PAPER})


def _pictures_of_operations(figures: Mapping[str, Figures]) -> Pictures:
    """Synaptic operations of every network, the ANN's multiplications in their place."""
    bars = {name: of.get("synops", of.get("macs", 0.0)) for name, of in figures.items()}
    label = f"{FIGURES['synops'].axis_label}, the ANN's: MACs"
    return {"synops": lambda: plot.counts_per_layer(bars, quantity=label)}


def _pictures_of_loihi(model: Classifier, mapping: Any, estimates: Mapping[int, tuple[int, Any]]) -> Pictures:
    """Energy-delay products beside those measured, and the cores of each layer."""
    products = {f"Quartz, T = {t}, estimated": e.energy_delay_product for t, (_, e) in estimates.items()}
    products |= model.measured_products
    by_name = {p.name: p for p in mapping.populations}
    cores, binding = ({name: getattr(p, what) for name, p in by_name.items()} for what in ("cores", "binding"))
    return {
        "energy_delay": lambda: plot.energy_delay_bars(products),
        "cores": lambda: plot.cores_per_layer(cores, binding=binding),
    }
