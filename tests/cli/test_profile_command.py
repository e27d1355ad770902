"""`jaxrmils profile` as a user meets it."""

import json
import shutil
from pathlib import Path

import pytest
from test_export_command import CONFIG

import jaxrmils as jr
from jaxrmils.cli.main import BAD_INPUT, OK, USAGE, main


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("profile")
    (folder / "config.py").write_text(CONFIG)
    shutil.copy(Path(__file__).parent / "tiny_task.py", folder / "tiny_task.py")
    out = folder / "run"
    arguments = ["quantize", "--config", str(folder / "config.py"), "--out", str(out), "--quiet"]
    assert main(arguments) == OK
    return out


def test_it_measures_and_writes_a_table(run, capsys):
    assert main(["profile", str(run), "--batch-size", "16", "--rounds", "2", "--quiet"]) == OK
    printed = capsys.readouterr().out
    for words in (
        "tiny: batches of 16 on ",
        "int8 peak",
        "whole call",
        "Predicted",
        "latency.json",
    ):
        assert words in printed
    table = jr.load_latency(run / "latency.json")
    plan = jr.load_plan(run / "plan.json")
    assert set(table.seconds) == set(plan.layers)
    assert {"float", "w8a8", "w4a8"} <= set(next(iter(table.seconds.values())))


def test_json(run, tmp_path, capsys):
    out = tmp_path / "times.json"
    arguments = ["profile", str(run), "--rounds", "1", "--formats", "w8a8", "--out", str(out)]
    assert main([*arguments, "--json"]) == OK
    data = json.loads(capsys.readouterr().out)
    assert data["batch_size"] == 8 and data["peak_gops"] > 0
    # The run's plan is w4a8, which was not measured in uniform.
    assert data["predicted"] is None and out.exists()


@pytest.mark.parametrize(
    ("options", "words", "code"),
    [
        (["--formats", "w3"], "unknown format 'w3'", USAGE),
        (["--formats", "float"], "leave it out", USAGE),
        (["--batch-size", "0"], "at least 1", USAGE),
        (["--batch-size", "100000"], "there are only 100 examples", BAD_INPUT),
    ],
)
def test_wrong_options(run, options, words, code, capsys):
    assert main(["profile", str(run), *options, "--quiet"]) == code
    assert words in capsys.readouterr().err


def test_a_folder_that_is_no_run(tmp_path, capsys):
    assert main(["profile", str(tmp_path), "--quiet"]) == BAD_INPUT
    assert "run.json" in capsys.readouterr().err
