"""The script that makes the table of timm's families."""

import importlib.util
import json
import time

import pytest
import torch
from helpers.paths import ROOT
from torch import nn

pytest.importorskip("timm", reason="needs timm (extra zoos)")


@pytest.fixture
def script():
    """The script as a module."""
    path = ROOT / "recipes" / "results" / "timm_families.py"
    spec = importlib.util.spec_from_file_location("timm_families", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_of_a_family_the_smallest_network_and_the_smallest_of_relus_alone_stand(script):
    assert script.smallest("fasternet") == ["fasternet_t0", "fasternet_t2"]


def test_a_network_is_converted_or_the_operation_that_refuses_it_named(script):
    found = script.outcome("test_resnet")
    assert (found["result"], found["besides"], found["size"]) == ("converts", [], 64)
    assert found["off at 2049"] <= 0.1
    found = script.outcome("test_efficientnet")
    assert found["result"] == "refused"
    assert "SiLU" in found["besides"]
    assert script.cells(found)[1].startswith("`SiLU` at bn1.act: it is not a ReLU")


def test_what_a_network_computes_besides_is_seen_in_functions_too(script):
    class Gated(nn.Module):
        def forward(self, x):
            return torch.relu(x) * torch.sigmoid(x.mean((2, 3), keepdim=True))

    with torch.no_grad(), script.OtherOperations(6) as operations:
        Gated()(torch.rand(6, 3, 8, 8))
    assert operations.found == {"product", "sigmoid"}


def test_a_run_goes_on_where_it_was_cut_off_and_makes_some_anew(script, tmp_path, monkeypatch, capsys):
    asked = []

    def limited(function, name, seconds):
        asked.append(name)
        if name == "c":
            return False, "no result in 60 s"
        if function is script.smallest:
            return True, [f"{name}_small", f"{name}_plain"]
        if name == "b_small":
            reason = "cannot convert 'act' (SiLU): it is not a ReLU; train the network with nn.ReLU in its place"
            return True, {"parameters": 5, "besides": ["SiLU"], "result": "refused", "reason": reason}
        off = {"result": "approximates", "off at 2049": 0.2, "off at 32769": 0.02}
        return True, {"parameters": 2_000_000, "besides": [], "noise": 0.1, **off}

    monkeypatch.setattr(script, "limited", limited)
    monkeypatch.setattr(script, "PAGE", tmp_path / "timm.md")
    monkeypatch.setattr(script.timm, "list_modules", lambda: ["a", "b", "c"])
    (tmp_path / "cache").mkdir()
    kept = {"models": {"a_old": {"parameters": 1, "besides": [], "result": "converts", "off at 2049": 0.01}}}
    (tmp_path / "cache" / "a.json").write_text(json.dumps(kept))
    script.main(["--cache", str(tmp_path / "cache")])
    assert asked == ["b", "b_small", "b_plain", "c"]
    page = (tmp_path / "timm.md").read_text()
    assert "| a | a_old | 0.0 | converts | 0.01 |" in page
    assert "| b | b_plain | 2.0 | approximates | 0.2, 0.02 at 32,769; the ANN itself 0.1 |" in page
    assert "| b | b_small | 0.0 | SiLU | refused | `SiLU` at act: it is not a ReLU |" in page
    assert "| c |  |  |  | not examined | no result in 60 s |" in page
    assert "| `SiLU` | 1 | b_small |" in page
    assert "4 networks in 3 families: 1 converts, 1 approximates, 1 refused, 1 not examined" in page
    asked.clear()
    script.main(["--cache", str(tmp_path / "cache"), "--again", "b"])
    assert asked == ["b_small", "b_plain"]
    with pytest.raises(SystemExit):
        script.main(["--cache", str(tmp_path / "cache"), "--again", "d"])
    assert "timm has no families d" in capsys.readouterr().err


def test_a_network_that_takes_too_long_is_given_up(script):
    assert script.limited(lambda name: time.sleep(60), "x", 0.4) == (False, "no result in 0 s")
    assert script.limited(lambda name: 1 / 0, "x", 30) == (False, "ZeroDivisionError: division by zero")
    assert script.limited(len, "four", 30) == (True, 4)
