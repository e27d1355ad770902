"""The benchmark of single operations runs, and what it times is the same operation."""

import importlib
import json
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
operations = importlib.import_module("operations")


def test_it_runs(tmp_path, monkeypatch, capsys):
    out = tmp_path / "operations.json"
    monkeypatch.setattr(
        "sys.argv", ["operations.py", "--quick", "--rounds", "1", "--out", str(out)]
    )
    operations.main()
    record = json.loads(out.read_text())
    assert len(record["rows"]) == len(operations.QUICK)
    for row in record["rows"].values():
        assert row["gops"] > 0 and row["faster"][operations.FLOAT][0] == 1.0
    assert "peak" in capsys.readouterr().out
    monkeypatch.setattr("sys.argv", ["operations.py", "--only", "nothing"])
    with pytest.raises(SystemExit):
        operations.main()


@pytest.mark.parametrize("case", operations.QUICK, ids=lambda case: case.name)
def test_formulations_agree(case):
    timed = operations.compile_case(case, "cpu")
    results = {name: np.asarray(jax.device_get(each.run())) for name, each in timed.items()}
    np.testing.assert_array_equal(results[operations.INTEGER], results[operations.WRITTEN])
    if operations.INT4 in results:
        np.testing.assert_array_equal(results[operations.INTEGER], results[operations.INT4])
    for name in {operations.WHOLE, operations.ROWS} & set(results):
        np.testing.assert_allclose(results[name], results[operations.FLOAT], atol=0.02)
    floats = np.clip(np.round(results[operations.FLOAT]), -128, 127)
    np.testing.assert_array_equal(np.maximum(results[operations.INTEGER], 0), floats)


def test_products_are_counted():
    dot = operations.dot_case(4, 8, 16)
    attention = next(case for case in operations.CASES if case.name == "attention q k")
    assert dot.products() == 4 * 8 * 16
    assert attention.products() == 8 * 12 * 128 * 128 * 64
    conv = operations.conv_case("stem", 224, 7, 3, 64, stride=2)
    assert conv.products() == 8 * 112 * 112 * 7 * 7 * 3 * 64
