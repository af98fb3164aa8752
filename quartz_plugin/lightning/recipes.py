"""The command ``quartz-recipes``: the recipes of an installed package, run by name, or copied to be edited."""

import runpy
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

PACKAGE = Path(__file__).parents[1]

USAGE = """\
usage: quartz-recipes NAME COMMAND ...    as `python recipes/NAME.py COMMAND ...`; NAME is one of {names}
       quartz-recipes copy [FOLDER]       the recipes and their configurations as files (FOLDER: ./recipes)

quartz-recipes mnist run takes a minute and needs no data; quartz-recipes NAME COMMAND --help lists the options."""


def recipes_folder() -> Path:
    """Folder that holds the recipes: within an installed package, beside it in a checkout."""
    installed = PACKAGE / "recipes"
    return installed if installed.is_dir() else PACKAGE.parent / "recipes"


def recipe_paths() -> dict[str, Path]:
    """Script of each recipe, by name.

    Examples
    --------
    >>> sorted(recipe_paths())
    ['benchmark', 'cifar10', 'imagenet', 'mnist']
    """
    return {path.stem: path for path in sorted(recipes_folder().glob("*.py")) if not path.stem.startswith("_")}


def copy_recipes(target: Path) -> None:
    """Copy scripts and configurations to a folder that is not there yet.

    Raises
    ------
    FileExistsError
        If `target` exists.
    """
    if target.exists():
        raise FileExistsError(f"{target} exists; name a folder that does not: quartz-recipes copy FOLDER")
    left_out = shutil.ignore_patterns("_*", "results", "notebooks", "runs")
    shutil.copytree(recipes_folder(), target, ignore=left_out)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one recipe, or copy all; returns the exit status."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    paths = recipe_paths()
    if given[:1] == ["copy"] and len(given) <= 2:
        target = Path(given[1] if len(given) == 2 else "recipes")
        try:
            copy_recipes(target)
        except OSError as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
        print(f"the recipes are in {target}; begin with: python {target / 'mnist.py'} run")
        return 0
    if not given or given[0] not in paths:
        asked_for_help = not given or given[0] in ("-h", "--help")
        print(USAGE.format(names=", ".join(paths)), file=sys.stdout if asked_for_help else sys.stderr)
        return 0 if asked_for_help else 2
    script = str(paths[given[0]])
    sys.argv = [script, *given[1:]]
    runpy.run_path(script, run_name="__main__")
    return 0
