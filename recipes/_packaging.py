"""Packaging: recipes in a wheel, and the tests into a source archive; setuptools reads it (pyproject.toml)."""

import shutil
from pathlib import Path

from setuptools.command.build_py import build_py
from setuptools.command.sdist import sdist


class BuildWithRecipes(build_py):
    """Lays the recipes beside the package, where `quartz-recipes` finds them; an editable install has them already."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            target = Path(self.build_lib) / "quartz_plugin" / "recipes"
            shutil.rmtree(target, ignore_errors=True)
            shutil.copytree("recipes", target, ignore=shutil.ignore_patterns("_*", "results", "notebooks", "runs"))


class WholeSdist(sdist):
    """Holds the recipes and the tests whole, helpers and all, not the test files alone."""

    def make_distribution(self) -> None:
        for folder in ("recipes", "tests"):
            kept = (p for p in Path(folder).rglob("*") if p.is_file() and not {"__pycache__", "runs"} & set(p.parts))
            self.filelist.extend(sorted(map(str, kept)))
        self.filelist.append("CHANGELOG.md")
        self.filelist.remove_duplicates()
        super().make_distribution()
