"""The trainer with all commands of the recipes."""

from __future__ import annotations

from quartz_plugin.lightning.commands.costs import Costs
from quartz_plugin.lightning.commands.figures import Figures
from quartz_plugin.lightning.commands.predict import Predict
from quartz_plugin.lightning.commands.run import Run
from quartz_plugin.lightning.commands.sweep import Sweep
from quartz_plugin.lightning.commands.test import Evaluate
from quartz_plugin.lightning.commands.validate import Validate


class QuartzTrainer(Run, Validate, Evaluate, Predict, Sweep, Figures, Costs):
    """Lightning's Trainer, which also converts.

    Logs go to `default_root_dir` as CSV, and to TensorBoard where it is installed; the best and the last
    checkpoint are kept there as ``best.ckpt`` and ``last.ckpt``. The best ANN is that of the least validation loss, the
    best network trained for few steps the most accurate one.
    """
