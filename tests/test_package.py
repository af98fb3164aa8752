"""The package as a whole: what it exports, what it does not import, that documents and code agree."""

import ast
import graphlib
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from helpers.paths import ROOT

import quartz_plugin


def test_every_public_name_is_documented_and_sorted():
    assert list(quartz_plugin.__all__) == sorted(quartz_plugin.__all__, key=lambda name: (not name.isupper(), name))
    for name in quartz_plugin.__all__:
        assert name == "PAPER" or getattr(quartz_plugin, name).__doc__


def test_import_leaves_the_heavy_packages_alone():
    code = (
        "import quartz_plugin, sys; "
        "print([m for m in ('torchvision', 'lightning', 'torchmetrics', 'norse', 'matplotlib') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_missing_extra_is_named_in_one_line():
    for module, extra, missing in (
        ("quartz_plugin.lightning", "recipes", "lightning"),
        ("quartz_plugin.norse", "norse", "norse"),
    ):
        code = f"import sys; sys.modules['{missing}'] = None; import {module}"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        last = done.stderr.strip().splitlines()[-1]
        assert last.startswith("ImportError: ")
        assert f"pip install 'quartz_plugin[{extra}]'" in last
    code = (
        "import sys; sys.modules['matplotlib'] = None; import torch, quartz_plugin; from quartz_plugin import plot; "
        "snn = quartz_plugin.convert(torch.nn.Linear(2, 2), torch.rand(4, 2)); plot.raster(snn.run(torch.rand(1, 2)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "pip install 'quartz_plugin[plot]'" in done.stderr.strip().splitlines()[-1]


def test_the_version_stands_in_one_place():
    with open(ROOT / "pyproject.toml", "rb") as file:
        project = tomllib.load(file)
    assert "version" in project["project"]["dynamic"]
    assert project["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "quartz_plugin.__version__"}
    assert re.fullmatch(r"\d+\.\d+\.\d+", quartz_plugin.__version__)


def test_the_faces_of_norse_are_quiet():
    pytest.importorskip("norse")
    done = subprocess.run(
        [sys.executable, "-W", "always", "-c", "import quartz_plugin.norse"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "norse" not in done.stderr
    assert "torch.jit" not in done.stderr


class TestTheCommandQuartzRecipes:
    @pytest.fixture
    def recipes(self):
        """The module behind the command."""
        for name in ("lightning", "jsonargparse", "torchvision"):
            pytest.importorskip(name)
        from quartz_plugin.lightning import recipes

        return recipes

    def test_is_installed_under_this_name(self, recipes):
        with open(ROOT / "pyproject.toml", "rb") as file:
            module, function = tomllib.load(file)["project"]["scripts"]["quartz-recipes"].split(":")
        assert module == recipes.__name__
        assert callable(getattr(recipes, function))

    def test_copies_scripts_and_configurations(self, recipes, tmp_path, capsys):
        target = tmp_path / "recipes"
        assert recipes.main(["copy", str(target)]) == 0
        for path in [*(ROOT / "recipes").glob("[!_]*.py"), *(ROOT / "recipes" / "configs").iterdir()]:
            assert (target / path.relative_to(ROOT / "recipes")).read_text() == path.read_text()
        assert not (target / "_packaging.py").exists()
        assert recipes.main(["copy", str(target)]) == 1
        assert "quartz-recipes copy FOLDER" in capsys.readouterr().err

    def test_runs_a_recipe_with_its_arguments(self, recipes, monkeypatch, capsys):
        monkeypatch.setattr(sys, "argv", ["quartz-recipes"])
        with pytest.raises(SystemExit) as left:
            recipes.main(["mnist", "convert", "--help"])
        assert left.value.code == 0
        assert "--t_max" in capsys.readouterr().out

    def test_names_the_recipes_there_are(self, recipes, capsys):
        assert recipes.main(["imagnet", "fit"]) == 2
        assert "benchmark, cifar10, imagenet, mnist" in capsys.readouterr().err
        assert recipes.main([]) == 0
        assert "quartz-recipes copy" in capsys.readouterr().out


def test_the_top_level_holds_only_what_it_may():
    tracked = subprocess.run(
        ["git", "-c", "safe.directory=*", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split()
    allowed = {"quartz_plugin", "tests", "recipes", "pyproject.toml", "CHANGELOG.md", "README.md", "LICENSE", ".ci"}
    assert {Path(name).parts[0] for name in tracked} <= allowed | {".gitignore"}


SOURCES = sorted((ROOT / "quartz_plugin").rglob("*.py"))
LONG_FILES = {"quartz_plugin/engines/event/kernels.py"}
# Their keywords are options of a user, of the command line or of snnTorch's neurons.
MANY_OPTIONS = {
    "quartz_plugin/convert/pipeline.py::convert",
    "quartz_plugin/lightning/commands/fit.py::fit",
    "quartz_plugin/lightning/commands/test.py::test",
    "quartz_plugin/lightning/data/folders.py::__init__",
    "quartz_plugin/lightning/modules/classifier.py::__init__",
    "quartz_plugin/neuron.py::__init__",
}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_and_functions_fit_on_a_screen(path):
    """At most 400 lines a file, 60 a function (its docstring apart), 8 parameters."""
    source, name = path.read_text(), str(path.relative_to(ROOT))
    assert len(source.splitlines()) <= 400 or name in LONG_FILES
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef):
            text = node.body[0] if ast.get_docstring(node) is not None else None
            lines = node.end_lineno - node.lineno + 1 - (text.end_lineno - text.lineno + 1 if text else 0)
            parameters = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            count = sum(parameter.arg not in ("self", "cls") for parameter in parameters)
            assert lines <= 60, f"{node.name} has {lines} lines"
            assert count <= 8 or f"{name}::{node.name}" in MANY_OPTIONS, f"{node.name} has {count} parameters"


FLOORS = ["operators", "graph", "engines", "costs", "convert", "training", ("hardware", "metrics", "plot"), "lightning"]


def test_imports_run_downwards_only():
    """Also those inside functions; the order is that of DESIGN's house."""
    floors = {name: floor for floor, names in enumerate(FLOORS) for name in ([names] if type(names) is str else names)}
    modules = {
        str(path.relative_to(ROOT).with_suffix("")).replace("/", ".").removesuffix(".__init__"): path
        for path in SOURCES
    }
    imported: dict[str, set[str]] = {}
    for module, path in modules.items():
        names = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom)]
        targets = {f"{node.module}.{alias.name}" for node in names for alias in node.names if node.module}
        ours = {target if target in modules else target.rpartition(".")[0] for target in targets}
        imported[module] = (ours & set(modules)) - {module}
    for module, targets in imported.items():
        for target in targets:
            pair = [floors.get(name.split(".")[1]) for name in (module, target) if "." in name]
            assert None in pair or len(pair) < 2 or pair[0] >= pair[1], f"{module} imports {target}"
    graphlib.TopologicalSorter(imported).prepare()  # raises on a circle


DOCUMENTS = [
    ROOT / "README.md",
    *sorted((ROOT / "recipes").glob("*.md")),
    *sorted((ROOT / "recipes/results").glob("*.md")),
]


def python_blocks(path):
    """Source of each python block of a document."""
    return re.findall(r"```python\n(.*?)```", path.read_text(), flags=re.DOTALL)


def test_documents_have_examples():
    assert len(python_blocks(ROOT / "README.md")) >= 2
    assert sum(len(python_blocks(path)) for path in DOCUMENTS) >= 12


@pytest.mark.parametrize(
    ("path", "number"),
    [(path, number) for path in DOCUMENTS for number in range(len(python_blocks(path)))],
    ids=lambda value: value.stem if isinstance(value, Path) else str(value),
)
def test_readme_examples_run(path, number, tmp_path, monkeypatch):
    """Every python block of README and of the recipes' documents is executed, each by itself."""
    block = python_blocks(path)[number]
    if "norse" in block:
        pytest.importorskip("norse")
    monkeypatch.chdir(tmp_path)
    exec(compile(block, path.name, "exec"), {"__name__": "readme"})


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.stem)
def test_links_of_documents_lead_somewhere(path):
    for target in re.findall(r"\]\(([^)\s]+)\)", path.read_text()):
        if target.startswith("http"):
            continue
        file, _, anchor = target.partition("#")
        linked = (path.parent / file).resolve() if file else path
        assert linked.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", linked.read_text(), flags=re.MULTILINE)
            assert anchor in {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}, (
                target
            )


def test_readme_links_every_public_name():
    links = dict(re.findall(r"\[`(\w+)`\]\(([^)]+\.py)\)", (ROOT / "README.md").read_text()))
    assert set(quartz_plugin.__all__) <= set(links)
    for name, target in links.items():
        assert re.search(rf"\b{name}\b", (ROOT / target).read_text()), f"{name} is not in {target}"


def test_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 250


def test_readme_and_changelog_are_finished():
    for name in ("README.md", "CHANGELOG.md"):
        assert "@@" not in (ROOT / name).read_text()
