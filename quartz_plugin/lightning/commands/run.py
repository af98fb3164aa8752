"""run: fit, convert and test in one go."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from quartz_plugin.config import ConversionConfig
from quartz_plugin.lightning.checkpoints import load_checkpoint
from quartz_plugin.lightning.commands.convert import Convert
from quartz_plugin.lightning.commands.fit import Fit
from quartz_plugin.lightning.commands.test import write_and_print
from quartz_plugin.lightning.comparison import ann_columns
from quartz_plugin.lightning.console import print_once
from quartz_plugin.lightning.loading import name_of
from quartz_plugin.lightning.modules import Classifier
from quartz_plugin.lightning.options import options_with_defaults
from quartz_plugin.lightning.outputs import save_pictures_once
from quartz_plugin.lightning.pictures import pictures_of

PICTURED = 200
"""Images whose spikes and activations are drawn."""


class Run(Fit, Convert):
    """All stages in a row."""

    def run(self, model: Classifier, datamodule: Any, all_figures: bool = False, **conversion: Any) -> None:
        """Fit, convert, test, and end with one table and four pictures.

        Parameters
        ----------
        model : Classifier
            The classifier.
        datamodule : ClassificationData
            Its data.
        all_figures : bool
            Print all figures; they stand in test.json and test.csv in any case.
        **conversion
            Options of the conversion.
        """
        root = Path(self.default_root_dir)
        options = options_with_defaults("run", conversion)
        for rectifier in dict.fromkeys((options["rectifier"], "silent")):
            ConversionConfig(**{**options, "rectifier": rectifier})
        self.fit(model, datamodule=datamodule)
        best = self.best_path
        if best:
            load_checkpoint(model, best)
        snn = self.convert(model, datamodule, all_figures=all_figures, **options)
        silent = self.converted(model, datamodule, {**options, "rectifier": "silent"})
        figures = ann_columns(self.test_ann(model, datamodule))
        for name, network in ((name_of(snn), snn), ("the same, silent zeros", silent)):
            figures[name] = self.test_spiking(model, network, datamodule)
        images = next(iter(datamodule.test_dataloader()))[0][:PICTURED]
        pictures = save_pictures_once(root, pictures_of(model.network, silent, images))
        print_once("")
        write_and_print(self.default_root_dir, figures, None, all_figures)
        print_once("\nbest checkpoint   " + (os.path.relpath(best) if best else "none"))
        print_once(f"spiking network   {root / 'snn.safetensors'}")
        for name, path in pictures.items():
            print_once(f"{name:<17} {path}")
