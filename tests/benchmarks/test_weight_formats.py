"""The benchmark of weights' formats runs, and compares forms that agree."""

import importlib
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
weight_formats = importlib.import_module("weight_formats")


def test_it_runs(tmp_path, monkeypatch, capsys):
    out = tmp_path / "formats.json"
    options = ["--rows", "4", "32", "--formats", "2", "--tokens", "64", "--width", "12"]
    monkeypatch.setattr(
        "sys.argv", ["weight_formats.py", *options, "--rounds", "1", "--out", str(out)]
    )
    weight_formats.main()
    record = json.loads(out.read_text())
    assert [row["chosen"] for row in record["rows"].values()] == [False, True]
    assert record["command"].startswith("python benchmarks/weight_formats.py")
    assert "32" in capsys.readouterr().out
