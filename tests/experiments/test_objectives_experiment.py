"""The comparison of objectives on a network that runs in seconds."""

import json
import sys

import objectives
import pytest
from test_paper_table import CONFIG


def test_every_objective_has_a_row(tmp_path, monkeypatch, capsys):
    (tmp_path / "tiny.py").write_text(CONFIG)
    out = tmp_path / "table"
    command = ["objectives.py", "--config", str(tmp_path / "tiny.py"), "--draws", "2"]
    command += ["--bits", "3", "4", "6", "--rounds", "1", "--out", str(out)]
    command += ["--objectives", "signed", "squared", "squared_output"]
    monkeypatch.setattr(sys, "argv", [*command, "--only", "101"])
    objectives.main()  # as another process would
    assert [path.name for path in tmp_path.glob("*.partial.json")] == ["table.101.partial.json"]
    assert "seed 101" in capsys.readouterr().out and not out.with_suffix(".json").exists()
    monkeypatch.setattr(sys, "argv", command)
    objectives.main()
    printed = capsys.readouterr().out
    assert "seed 100" in printed and "seed 101" not in printed
    rows = json.loads(out.with_suffix(".json").read_text())["rows"]
    assert "3 bits: " in printed  # No int4 model is as small as that.
    names = {"signed", "squared", "squared_output", "refined", "random"}
    for seed in (100, 101):
        for bits in (4.0, 6.0):
            found = {r["objective"] for r in rows if (r["seed"], r["bits"]) == (seed, bits)}
            assert found == {*names, "uniform"}
    assert all(isinstance(row["change"], float) and "Acc@1 drop" in row for row in rows)
    assert all(("refinement" in row) == (row["objective"] == "refined") for row in rows)
    # At 4 bits there is one assignment: all agree but for what stays without a weight.
    four = [r["change"] for r in rows if (r["seed"], r["bits"]) == (100, 4.0)]
    assert max(four) - min(four) < 0.1
    table = out.with_suffix(".md").read_text()
    assert "| refined |" in table and "| squared_output |" in table and "2 draws" in table
    assert table.count("a training step's gradient") == 1 and ": tangent " in table
    assert "No plan has 3 bits" in table
    assert not list(tmp_path.glob("*.partial.json"))
    # Rows of one objective are made again, the others stay.
    monkeypatch.setattr(sys, "argv", [*command, "--again", "refined"])
    objectives.main()
    printed = capsys.readouterr().out
    assert "'objective': 'refined'" in printed and "'objective': 'signed'" not in printed
    again = json.loads(out.with_suffix(".json").read_text())["rows"]

    def found(rows, names):
        return {
            (r["seed"], r["bits"], r["objective"]): r["change"]
            for r in rows
            if r["objective"] in names
        }

    assert found(again, names) == pytest.approx(found(rows, names))
    assert len(again) == len(rows)
    kept = [{k: v for k, v in row.items() if k != "passes"} for row in again]
    for row in rows:
        row.pop("passes", None)
        assert row["objective"] == "refined" or row in kept
    assert sum("passes" in row for row in again) == 2  # A round's cost is measured again.
    # Or nothing but passes.
    monkeypatch.setattr(sys, "argv", [*command, "--again", "passes"])
    objectives.main()
    assert "'objective'" not in capsys.readouterr().out
    timed = json.loads(out.with_suffix(".json").read_text())["rows"]
    times = [[row.pop("passes") for row in rows if "passes" in row] for rows in (again, timed)]
    assert timed == again and times[0] != times[1] and len(times[1]) == 2


def test_an_unknown_objective_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["objectives.py", "--config", "x.py", "--objectives", "magic"])
    with pytest.raises(SystemExit):
        objectives.main()
    assert "['magic']" in capsys.readouterr().err
