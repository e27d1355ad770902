"""`jaxrmils profile` as a user meets it."""

import dataclasses
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
        "predicted / measured",
        "latency.json",
    ):
        assert words in printed
    table = jr.load_latency(run / "latency.json")
    plan = jr.load_plan(run / "plan.json")
    assert set(table.seconds) == set(plan.layers)
    # Of policy.formats: what budgets choose from.
    assert set(next(iter(table.seconds.values()))) == {"float", "w8a8", "w4a8", "w4a4"}


def test_budgets_of_latency_and_what_their_plans_take(run, tmp_path, capsys):
    run = Path(shutil.copytree(run, tmp_path / "run"))
    assert main(["profile", str(run), "--rounds", "1", "--quiet"]) == OK
    options = ["--along", "latency", "--count", "2", "--no-verify", "--quiet"]
    assert main(["pareto", str(run), *options]) == OK
    files = sorted(map(str, (run / "pareto").glob("budget-*.json")))
    assert len(files) >= 1
    capsys.readouterr()
    twice = [*files, files[0]]
    assert main(["profile", str(run), "--rounds", "2", "--plan", *twice, "--json"]) == OK
    captured = capsys.readouterr()
    assert "predicted / measured" in captured.err
    data = json.loads(captured.out)
    names = ["float", "w8a8", "w4a8", "w4a4", "this plan", *(Path(f).stem for f in files)]
    assert [each["name"] for each in data["plans"]] == names
    table = jr.load_latency(run / "latency.json")
    for each in data["plans"][4:]:
        assert not each["is_uniform"] and each["measured"] > 0
        plan = jr.load_plan(each["file"] or run / "plan.json")
        expected = table.overhead + sum(table.of(n, layer) for n, layer in plan.layers.items())
        assert each["predicted"] == pytest.approx(expected)
    document = json.loads((run / "latency.json").read_text())
    assert document["plans"] == data["plans"]
    assert set(data["programs"]) == set(names)


def test_forced_formats_and_those_of_plans_are_measured(run, tmp_path, capsys):
    table = jr.load_scores(run / "scores").table
    plans = [tmp_path / "a" / "plan.json", tmp_path / "b" / "plan.json"]
    for path, name in zip(plans, ("w8", "w8a8d"), strict=True):
        path.parent.mkdir()
        jr.save_plan(jr.uniform(table, name), path)
    options = ["--config.policy.formats=w8a8", "--config.policy.force=Dense_0/*=w4"]
    options += ["--out", str(tmp_path / "latency.json"), "--rounds", "1", "--json"]
    assert main(["profile", str(run), *options, "--plan", *map(str, plans)]) == OK
    data = json.loads(capsys.readouterr().out)
    names = ["float", "w8a8", "w4", "w4a8", "w8", "w8a8d", "this plan", *map(str, plans)]
    assert [each["name"] for each in data["plans"]] == names
    assert all(each["predicted"] > 0 for each in data["plans"])


def test_plans_of_another_model_are_refused(run, tmp_path, capsys):
    plan = jr.load_plan(run / "plan.json")
    path = tmp_path / "other.json"
    jr.save_plan(dataclasses.replace(plan, fingerprint="0" * 64), path)
    assert main(["profile", str(run), "--plan", str(path), "--quiet"]) == USAGE
    assert "other.json: the plan was made for another model" in capsys.readouterr().err
    assert main(["profile", str(run), "--plan", "nowhere.json", "--quiet"]) == BAD_INPUT


def test_json(run, tmp_path, capsys):
    out = tmp_path / "times.json"
    arguments = ["profile", str(run), "--rounds", "1", "--formats", "w8a8", "--out", str(out)]
    assert main([*arguments, "--json"]) == OK
    data = json.loads(capsys.readouterr().out)
    assert data["batch_size"] == 8 and data["peak_gops"] > 0
    # The run's plan is w4a8, which was not measured in uniform.
    assert data["predicted"] is None and out.exists()
    assert "no 'w4a8'" in next(p for p in data["plans"] if p["name"] == "this plan")["missing"]


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
