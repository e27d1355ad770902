"""The paper's table on a network that runs in seconds."""

import json
import sys
from pathlib import Path

import paper_rows
import paper_table
import pytest

TASK = Path(__file__).parents[1] / "cli" / "tiny_task.py"
CONFIG = f"""
from jaxrmils.cli.defaults import base_config

def get_config():
    config = base_config()
    config.task = "{TASK}:judged"
    config.batch_size = 50
    config.verify.margin = 0.5
    config.policy.formats = ("w8a8", "w4a8")
    config.policy.rounds = 1
    return config
"""


def run(folder, monkeypatch, draws):
    (folder / "tiny.py").write_text(CONFIG)
    command = ["paper_table.py", "--config", str(folder / "tiny.py"), "--draws", str(draws)]
    command += ["--mu", "0.1", "--out", str(folder / "table"), "--config.policy.directed=false"]
    monkeypatch.setattr(sys, "argv", command)
    paper_table.main()
    document = json.loads((folder / "table.json").read_text())
    return document["rows"], (folder / "table.md").read_text()


def test_every_policy_has_a_row_and_an_interrupted_run_goes_on(tmp_path, monkeypatch):
    counted, draw = [], paper_table.draw

    def interrupted(config, *args):
        counted.append(config.seed)
        if counted == [0, 1]:
            raise KeyboardInterrupt
        return draw(config, *args)

    monkeypatch.setattr(paper_table, "draw", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, monkeypatch, 2)
    rows, table = run(tmp_path, monkeypatch, 2)
    assert counted == [0, 1, 1]
    assert not list(tmp_path.glob("*.partial.json"))
    names = [row["name"] for row in rows]
    assert names[: len(names) // 2] == names[len(names) // 2 :]
    assert {"float", "uniform int8, ACIQ ranges", "rmils, balanced, mu 0.1", "lossless"} <= {*names}
    float_row, found = rows[0], rows[names.index("lossless")]
    assert float_row["change"] == [0.0, 0.0, 0.0] and float_row["share"] == 1.0
    assert found["share"] < 0.5 and not found["above"]
    assert len(float_row["units"]) == 150
    for name in ("Acc@1", "1/rank"):
        moved = sum(amount for _, amount in found["moved"][name]) / 150
        assert found["metrics"][name]["change"][0] == pytest.approx(moved, abs=1e-12)
        assert f"{name}: drop at most, all draws" in table
    assert "2 draws of examples" in table


def row(name, units, moved):
    return paper_rows.Row(
        name=name,
        loss=1.0,
        change=(0.0, 0.0, 0.0),
        above=False,
        metrics={},
        megabytes=1.0,
        share=1.0,
        weight_bits=8.0,
        formats={},
        seconds=None,
        units=units,
        moved={"Acc@1": moved},
    )


def test_examples_tested_twice_count_once():
    def bound(second):
        lost = [(position, -1.0) for position in range(10)]
        draws = [[row("float", list(range(100)), []), row("plan", (), lost)]]
        draws.append([row("float", second, []), row("plan", (), lost)])
        return paper_rows._pooled_drop(draws, [rows[1] for rows in draws], "Acc@1")

    same, other = bound(list(range(100))), bound(list(range(100, 200)))
    assert same > other > 0.1
