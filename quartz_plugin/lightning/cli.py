"""The command line of the recipes: ``python RECIPE.py COMMAND``, one method of the trainer each."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.cli import LightningCLI

from quartz_plugin.lightning.console import one_line, quiet_other_libraries
from quartz_plugin.lightning.data import ClassificationData, FolderData
from quartz_plugin.lightning.modules import ImageClassifier
from quartz_plugin.lightning.options import add_conversion_options
from quartz_plugin.lightning.trainer import QuartzTrainer
from quartz_plugin.tables import printable

_NOT_SHOWN = {"model", "datamodule", "dataloaders", "train_dataloaders", "val_dataloaders", "conversion"}
"""Arguments of the commands that the command line gives itself."""

_COMMANDS = ("fit", "validate", "test", "convert", "run", "predict", "sweep", "figures", "costs")


class QuartzCLI(LightningCLI):
    """``python RECIPE.py fit | validate | convert | test | predict | run | sweep | figures | costs``.

    Parameters
    ----------
    model_class : type
        A :class:`~quartz_plugin.lightning.Classifier`.
    datamodule_class : type
        A :class:`~quartz_plugin.lightning.ClassificationData`.
    **options
        Those of :class:`lightning.pytorch.cli.LightningCLI`; ``trainer_defaults`` above all.
    """

    def __init__(self, model_class: Any, datamodule_class: Any, **options: Any) -> None:
        options.setdefault("seed_everything_default", 0)
        options.setdefault("save_config_kwargs", {"overwrite": True})
        self._model_module = model_class.__module__
        super().__init__(
            model_class,
            datamodule_class,
            trainer_class=QuartzTrainer,
            auto_configure_optimizers=False,
            # Stored hyperparameters would silently win over --model.* flags.
            load_from_checkpoint_support=False,
            **options,
        )

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Return the subcommands, and the arguments of theirs that the command line does not show."""
        return dict.fromkeys(_COMMANDS, _NOT_SHOWN)

    def add_arguments_to_parser(self, parser: Any) -> None:
        """Let a model that takes a number of classes have the data's."""
        if isinstance(self._model_class, type) and issubclass(self._model_class, ImageClassifier):
            parser.link_arguments("data", "model.classes", _classes_of, apply_on="instantiate")

    def instantiate_classes(self) -> None:
        """Make the network and the data; images are of the size that the network expects where none was given."""
        super().instantiate_classes()
        size = getattr(self.model, "image_size", None)
        if size is not None and isinstance(self.datamodule, FolderData):
            self.datamodule.suggest_size(size)

    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **kwargs: Any) -> Any:
        """Add the options of conversion, and put a command's own options before the trainer's."""
        parser = super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        self._subcommand_method_arguments[subcommand] += add_conversion_options(parser, subcommand)
        parser.usage = f"{Path(sys.argv[0]).name} {subcommand} [options]"
        _put_own_options_first(parser)
        return parser

    def init_parser(self, **kwargs: Any) -> Any:
        """Return a parser that raises what is wrong, for one line, in place of printing all options."""
        recipe, _, _ = (getattr(sys.modules.get(self._model_module), "__doc__", None) or "").partition("\n")
        return super().init_parser(**{"description": recipe, **kwargs, "exit_on_error": False})

    def _parse_ckpt_path(self) -> None:
        # Lightning would read the file here, for hyperparameters that we do not store.
        pass

    def parse_arguments(self, parser: Any, args: Any) -> None:
        """Parse options and files of options; what such a file breaks ends in one line, too."""
        try:
            super().parse_arguments(parser, args)
        except (argparse.ArgumentError, OSError, ValueError, ImportError, MisconfigurationException):
            raise
        except Exception as error:
            raise ValueError(
                f"cannot read the options, or a file of theirs as --config ({type(error).__name__}: "
                f"{printable(error)[:100]})"
            ) from error

    @classmethod
    def main(cls, model_class: Any, datamodule_class: Any, **options: Any) -> None:
        """Run the command line; what a user can mend ends in one line, not in a traceback."""
        quiet_other_libraries()
        try:
            cls(model_class, datamodule_class, **options)
        except argparse.ArgumentError as error:
            recipe, *rest = sys.argv
            command = next((word for word in rest if word in cls.subcommands()), "")
            what = f"{one_line(error)} (python {recipe} {command} --help lists the options)"
            sys.exit(f"error: {what}".replace("  ", " "))
        except (OSError, ValueError, ImportError, MisconfigurationException) as error:
            sys.exit(f"error: {one_line(error)}")


def _put_own_options_first(parser: Any) -> None:
    """Order the groups of a parser's help: the command's own, then the network, the data, and the trainer's sixty."""

    def place(group: Any) -> int:
        named = [option for action in group._group_actions for option in action.option_strings]
        if group.title == "Linked arguments":
            return 1
        return max((n for n, name in enumerate(("model", "data", "trainer"), 1) if f"--{name}" in named), default=0)

    parser._action_groups.sort(key=place)


def _classes_of(data: ClassificationData) -> int:
    """Return the number of classes, 0 where the images are not there: what uses them raises."""
    try:
        return data.classes
    except (OSError, ValueError):
        return 0
