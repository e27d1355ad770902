"""ModelOpt's plans beside the library's; what ModelOpt chose is given."""

import json
import sys

import modelopt_check
import pytest
from test_paper_table import CONFIG


def folder_of(path, names):
    (path / "tiny.py").write_text(CONFIG)
    settings = {"config": str(path / "tiny.py"), "overrides": [], "seeds": [100], "command": "x"}
    (path / "settings.json").write_text(json.dumps(settings))
    plan = {"seed": 100, "bits": 6, "formats": dict(zip(names, ("w8a8", "w4a8"), strict=True))}
    document = {"versions": {"nvidia-modelopt": "0.47.0"}, "plans": [plan | {"seconds": 2.0}]}
    (path / "plans.json").write_text(json.dumps(document))
    return ["modelopt_check.py", "judge", str(path), "--out", str(path / "table")]


def test_all_plans_are_held_to_the_size_that_modelopt_reached(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", folder_of(tmp_path, ("Dense_0", "Dense_1")))
    modelopt_check.main()
    rows = json.loads((tmp_path / "table.json").read_text())["rows"]
    assert [r["objective"] for r in rows] == ["modelopt", "squared_output", "squared", "refined"]
    # 12 x 16 weights in 8 bits and 16 x 5 in 4.
    assert rows[0]["reached"] == pytest.approx((192 * 8 + 80 * 4) / 272)
    assert all(r["reached"] <= rows[0]["reached"] for r in rows)
    assert rows[0]["change"] != 0.0 and rows[0]["seconds"] == 2.0
    assert "nvidia-modelopt 0.47.0" in (tmp_path / "table.md").read_text()


def test_layers_of_another_network_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", folder_of(tmp_path, ("Dense_0", "head")))
    with pytest.raises(ValueError, match=r"Dense_1/kernel.*head/kernel"):
        modelopt_check.main()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["prepare", "x"], "needs --config"),
        (["search", "x"], "needs --weights"),
        (["judge", "x", "--nonsense"], "unknown options: --nonsense"),
    ],
)
def test_a_step_says_what_it_needs(arguments, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["modelopt_check.py", *arguments])
    with pytest.raises(SystemExit):
        modelopt_check.main()
    assert message in capsys.readouterr().err
