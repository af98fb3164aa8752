"""test: accuracy and costs of an ANN, a spiking network, or both on the same images."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from quartz_plugin.engines import EngineName
from quartz_plugin.lightning.commands.base import CommandTrainer
from quartz_plugin.lightning.comparison import Figures, ann_columns, side_by_side
from quartz_plugin.lightning.console import print_once
from quartz_plugin.lightning.loading import load_both, name_of
from quartz_plugin.lightning.modules import EvaluatedClassifier
from quartz_plugin.lightning.outputs import write_figures_once


class Evaluate(CommandTrainer):
    """Tests."""

    def test(  # type: ignore[override]
        self,
        model: Any = None,
        dataloaders: Any = None,
        ckpt_path: str | None = None,
        verbose: bool = True,
        datamodule: Any = None,
        snn: str | None = None,
        engine: EngineName = "auto",
        output: str | None = None,
        all_figures: bool = False,
    ) -> Any:
        """Test an ANN checkpoint (--ckpt_path) or a converted network (--snn), or both side by side.

        Parameters
        ----------
        model : EvaluatedClassifier
            The classifier.
        dataloaders : DataLoader, optional
            Not used on the command line.
        ckpt_path : str, optional
            Checkpoint of the ANN that fit wrote.
        verbose : bool
            Print the figures.
        datamodule : ClassificationData
            Its data.
        snn : str, optional
            File that convert wrote; with --ckpt_path or --model.weights its agreement with the ANN is
            measured.
        engine : Literal['auto', 'analytic', 'event', 'integer', 'stepped']
            How the spiking network is simulated: auto, analytic (hold only), integer (hold and weight_bits up to 8),
            event (a CPU) or stepped.
        output : str, optional
            File for the figures, .json or .csv; default test.json and test.csv in the trainer's folder.
        all_figures : bool
            Print all figures; they stand in the files in any case.
        """
        if not isinstance(model, EvaluatedClassifier) or datamodule is None:
            return super().test(model, dataloaders, ckpt_path, verbose, datamodule)
        if output is not None and Path(output).suffix not in (".json", ".csv"):
            raise ValueError(f"--output must end in .json or .csv, got {output}")
        model, network = load_both(model, snn, ckpt_path, datamodule)
        figures: dict[str, Figures] = {}
        if model.fitted_on is not None:
            figures |= ann_columns(self.test_ann(model, datamodule))
        if network is not None:
            figures[name_of(network)] = self.test_spiking(model, network, datamodule, engine)
        write_and_print(self.default_root_dir, figures, output, all_figures, verbose)
        return list(figures.values())


def write_and_print(
    root: str, figures: Mapping[str, Figures], output: str | None, all_figures: bool, verbose: bool = True
) -> None:
    """Write the figures of networks to test.json and test.csv (or `output`), and print their table."""
    paths = [Path(root) / "test.json", Path(root) / "test.csv"] if output is None else [Path(output)]
    for path in paths:
        write_figures_once(path, figures)
    if verbose:
        print_once(side_by_side(figures, all_figures))
        if not all_figures:
            print_once("(--all_figures true prints the others; the files hold them)")
        print_once("\n".join(f"wrote {path}" for path in paths))
