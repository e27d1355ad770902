"""`jaxrmils report` and `jaxrmils compare` on run folders without models."""

import json
import shutil
from pathlib import Path

import pytest
from evaluation import saved_reports
from evaluation.pages import Page

from jaxrmils import artifacts
from jaxrmils.cli.main import BAD_INPUT, NOT_LOSSLESS, OK, USAGE, main
from jaxrmils.policies import LayerPlan, Plan

CONFIG = """
from jaxrmils.cli.defaults import base_config

def get_config():
    config = base_config()
    config.task = "tiny_task.py:build"
    config.batch_size = 50
    config.policy.name = "rmils"
    return config
"""


def write_run(folder, report, **run):
    folder.mkdir()
    artifacts.save_record(report, folder / "report.json", "jaxrmils report")
    artifacts.save_record(saved_reports.RUN | run, folder / "run.json", "jaxrmils run")
    artifacts.save_plan(Plan({"Dense_0/kernel": LayerPlan()}, "f00d"), folder / "plan.json")
    return folder


@pytest.fixture
def run(tmp_path):
    return write_run(tmp_path / "run", saved_reports.full())


def flat(text):
    return " ".join(text.split())


def test_report_prints_tables_and_writes_page_and_spreadsheets(run, capsys):
    assert main(["report", str(run)]) == OK
    out = capsys.readouterr().out
    for words in ("Encoder/<Block & 'co'>/kernel", "Verdict", "uniform int4", "Search", "report.h"):
        assert words in out
    assert Page((run / "report.html").read_text()).sections[0] == "sequence"
    lines = (run / "layers.csv").read_bytes().split(b"\r\n")
    assert len(lines) == 6 + 2
    assert (run / "controls.csv").read_text().startswith("name,kind,")


def test_report_prints_the_saved_dict_as_json(run, capsys):
    assert main(["report", str(run), "--json"]) == OK
    assert json.loads(capsys.readouterr().out) == json.loads((run / "report.json").read_text())


def test_report_of_an_older_run(tmp_path, capsys):
    run = write_run(tmp_path / "old", saved_reports.minimal())
    assert main(["report", str(run)]) == OK
    assert "uniform int4" in capsys.readouterr().out
    assert (run / "report.html").exists()


def test_metrics_are_shown_again_and_compared(tmp_path, capsys):
    first = write_run(tmp_path / "a", saved_reports.with_metrics())
    second = write_run(tmp_path / "b", saved_reports.minimal())
    assert main(["report", str(first)]) == OK
    out = flat(capsys.readouterr().out)
    assert "<F1> float 98.00 %, quantized 97.90 %, change -0.13" in out
    assert " Accuracy float" not in out
    assert len((first / "metrics.csv").read_text().splitlines()) == 3
    assert main(["compare", str(first), str(second)]) == OK
    assert "<F1>" in capsys.readouterr().out
    assert main(["compare", str(first), str(second), "--json"]) == OK
    data = json.loads(capsys.readouterr().out)
    assert [len(run["metrics"]) for run in data["runs"]] == [2, 0]


def test_report_elsewhere_leaves_the_run_alone(run, tmp_path):
    before = {path.name for path in run.iterdir()}
    assert main(["report", str(run), "--out", f"{tmp_path}/new/page.html"]) == OK
    assert {path.name for path in run.iterdir()} == before
    assert {path.name for path in (tmp_path / "new").iterdir()} == {
        "page.html",
        "page.layers.csv",
        "page.controls.csv",
        "page.metrics.csv",
    }


def test_report_require_lossless_is_an_exit_code(run, tmp_path):
    assert main(["report", str(run), "--require-lossless"]) == OK
    other = write_run(tmp_path / "other", saved_reports.undecided())
    assert main(["report", str(other), "--require-lossless"]) == NOT_LOSSLESS


@pytest.mark.parametrize("command", [["report"], ["compare"]])
@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda run: shutil.rmtree(run), "run does not exist; the folder of a run"),
        (lambda run: (run / "report.json").unlink(), "report.json does not exist"),
        (lambda run: (run / "run.json").unlink(), "run.json does not exist"),
        (lambda run: (run / "plan.json").unlink(), "plan.json does not exist"),
        (lambda run: (run / "report.json").write_text("{"), "report.json is no valid JSON"),
        (lambda run: edit(run / "report.json", "verdict", 3), "report.json: field verdict is 3"),
        (lambda run: edit(run / "run.json", "splits", None), "run.json: field splits is None"),
        (lambda run: edit(run / "run.json", "kind", "x"), "run.json is of the kind 'x'"),
    ],
)
def test_damaged_runs_are_named_and_nothing_is_written(run, capsys, command, damage, words):
    (run / "report.html").write_text("the page before")
    damage(run)
    others = [str(run)] if command == ["compare"] else []
    assert main([*command, str(run), *others]) == BAD_INPUT
    assert words in flat(capsys.readouterr().err)
    if run.exists():
        assert (run / "report.html").read_text() == "the page before"


def edit(path, field, value):
    path.write_text(json.dumps(json.loads(path.read_text()) | {field: value}))


def test_compare_shows_differences_and_warns(run, tmp_path, capsys):
    report = saved_reports.full()
    report["layers"][1] |= {"format": "w4a8", "rounding": ["nearest"]}
    report["test"]["margin"] = 0.01
    other = write_run(
        tmp_path / "other", report, splits="0" * 64, config={"policy": {"name": "uniform"}}
    )
    page = tmp_path / "compare.html"
    assert main(["compare", str(run), str(other), "--out", str(page)]) == OK
    out = flat(capsys.readouterr().out)
    for words in ("≠ Conv_1/kernel", "1 differ", "policy.name", "different splits", "not paired"):
        assert words in out
    assert "different margins (run 0.005, other 0.01)" in out
    assert "≠ Dense_0/kernel" not in out
    assert len(Page(page.read_text()).sections) == 4


def test_compare_json_and_equal_names(run, tmp_path, capsys):
    (tmp_path / "b").mkdir()
    other = write_run(tmp_path / "b" / "run", saved_reports.full())
    assert main(["compare", str(run), str(other), str(run), "--json"]) == OK
    data = json.loads(capsys.readouterr().out)
    assert len({entry["name"] for entry in data["runs"]}) == 3
    assert data["warnings"] == [] and len(data["layers"]) == 6
    assert not any(layer["differs"] for layer in data["layers"].values())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["compare", "RUN"], "two run folders or more"),
        (["report", "RUN", "--config.seed=1"], "takes no config fields"),
        (["compare", "RUN", "RUN", "--config.seed=1"], "takes no config fields"),
        (["report", "RUN", "--out", "page.pdf"], ".html file was expected"),
        (["report", "RUN", "--ouput", "x.html"], "did you mean --out"),
    ],
)
def test_wrong_usage_is_said(run, capsys, arguments, words):
    arguments = [str(run) if word == "RUN" else word for word in arguments]
    assert main(arguments) == USAGE
    assert words in flat(capsys.readouterr().err)


@pytest.mark.parametrize("command", ["report", "compare"])
def test_help_teaches(command, capsys):
    assert main([command, "--help"]) == OK
    out = capsys.readouterr().out
    assert "exit codes" in out and "RUN" in out and "--config." not in out


def test_what_quantize_writes_today_can_be_shown(tmp_path, capsys):
    (tmp_path / "config.py").write_text(CONFIG)
    shutil.copy(Path(__file__).parent / "tiny_task.py", tmp_path / "tiny_task.py")
    config, out = f"{tmp_path}/config.py", str(tmp_path / "run")
    lean = [f"--config.verify.{field}=False" for field in ("layers", "controls", "attribute")]
    assert main(["quantize", "--config", config, "--out", out, "--quiet", *lean]) == OK
    printed = capsys.readouterr().out.splitlines()
    assert main(["report", out]) == OK
    again = capsys.readouterr().out.splitlines()
    lines = [line for line in printed if line.startswith(("│Dense_", "Verdict", "Size", "Loss"))]
    assert len(lines) > 4 and set(lines) <= set(again)
    assert "Dense_1/kernel" in Page((tmp_path / "run" / "report.html").read_text()).source
