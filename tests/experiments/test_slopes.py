"""Slopes and divergences of a network that runs in seconds."""

import json
import sys

import pytest
import slopes
from test_paper_table import CONFIG


def test_changes_are_divergences_and_slopes(tmp_path, monkeypatch):
    (tmp_path / "tiny.py").write_text(CONFIG)
    out = tmp_path / "table"
    command = ["slopes.py", "--config", str(tmp_path / "tiny.py"), "--draws", "2", "--bits", "6"]
    command += ["--objectives", "squared", "sqnr", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", command)
    slopes.main()
    rows = json.loads(out.with_suffix(".json").read_text())["rows"]
    plans = [row for row in rows if "objective" in row]
    assert {(r["seed"], r["objective"]) for r in plans} == {
        (seed, name) for seed in (50, 51) for name in ("squared", "sqnr")
    }
    for row in plans:
        for where in ("selection", "other"):
            parts = row[f"{where} divergence"] + row[f"{where} slope"]
            assert row[f"{where} change"] == pytest.approx(parts)
            # Of cross-entropy it is a divergence of softmaxes, never negative.
            assert row[f"{where} divergence"] > -1e-5
    formats = [row for row in rows if "format" in row]
    assert len(formats) == 4 and all(0 <= row["k"] <= 1 for row in formats)
    text = out.with_suffix(".md").read_text()
    assert "| 50 | squared |" in text and "| 51 | w4a8 |" in text


def test_an_unknown_objective_is_refused(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["slopes.py", "--config", "x.py", "--objectives", "magic"])
    with pytest.raises(SystemExit):
        slopes.main()
    assert "['magic']" in capsys.readouterr().err
