"""The benchmark of max-pooling runs, and compares formulations that agree."""

import importlib
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
max_pool = importlib.import_module("max_pool")


def test_it_runs(tmp_path, monkeypatch, capsys):
    out = tmp_path / "pool.json"
    options = ["--batches", "1", "--size", "9", "--rounds", "1", "--out", str(out)]
    monkeypatch.setattr("sys.argv", ["max_pool.py", *options])
    max_pool.main()
    record = json.loads(out.read_text())
    assert list(record["rows"]["1"]) == [max_pool.WINDOWED, max_pool.SHIFTED, max_pool.CODES]
    assert record["command"].startswith("python benchmarks/max_pool.py")
    assert max_pool.CODES in capsys.readouterr().out
