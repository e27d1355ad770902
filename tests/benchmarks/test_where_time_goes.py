"""The profile by kinds runs, and its parts add up."""

import importlib
import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
where_time_goes = importlib.import_module("where_time_goes")


def test_it_runs(tmp_path, monkeypatch, capsys):
    out = tmp_path / "time.json"
    options = ["--models", "tiny_resnet,tiny_bert", "--batch", "2", "--rounds", "1"]
    monkeypatch.setattr("sys.argv", ["where_time_goes.py", *options, "--out", str(out)])
    where_time_goes.main()
    models = json.loads(out.read_text())["models"]
    for result in models.values():
        parts = sum(row["seconds"] for row in result["rows"].values()) + result["rest"]
        assert parts == pytest.approx(result["seconds"])
        assert result["peak"] > 1e9 and result["peak_of"]
        for row in result["rows"].values():
            assert row["at_peak"] * result["peak"] == pytest.approx(2 * row["products"])
    assert any(kind.startswith("conv") for kind in models["tiny_resnet"]["rows"])
    assert {"dense", "product of activations"} <= set(models["tiny_bert"]["rows"])
    assert "no layer" in capsys.readouterr().out
