"""The package as a whole: what it exports, what it does not import, that documents and code agree."""

import re
import subprocess
import sys
from pathlib import Path

import quartz_plugin

ROOT = Path(__file__).parents[1]


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


def test_the_top_level_holds_only_what_it_may():
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    allowed = {"quartz_plugin", "tests", "recipes", "pyproject.toml", "CHANGELOG.md", "README.md", "LICENSE", ".ci"}
    assert {Path(name).parts[0] for name in tracked} <= allowed | {".gitignore"}


def test_readme_examples_run(tmp_path, monkeypatch):
    """Every python block of README is executed, each by itself."""
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    assert len(blocks) >= 4
    for block in blocks:
        exec(compile(block, "README.md", "exec"), {"__name__": "readme"})


def test_readme_and_changelog_are_finished():
    for name in ("README.md", "CHANGELOG.md"):
        assert "@@" not in (ROOT / name).read_text()
