"""Budgets on the command line: the policy, `jaxrmils pareto` and `jaxrmils recommend`."""

import csv
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_task

import jaxrmils as jr
from jaxrmils.artifacts.latency_file import save_latency
from jaxrmils.artifacts.pareto_file import load_pareto
from jaxrmils.cli import batch_sizes, pipeline
from jaxrmils.cli.defaults import base_config
from jaxrmils.cli.main import BAD_INPUT, OK, USAGE, main
from jaxrmils.policies import LatencyTable, usage

CONFIG = """
from jaxrmils.cli.defaults import base_config

def get_config():
    config = base_config()
    config.task = "tiny_task.py:build"
    config.batch_size = 50
    config.policy.name = "budget"
    config.policy.limits.size_share = 0.35
    for name in ("layers", "attribute", "controls"):
        config.verify[name] = False
    return config
"""

PAIRS = """
import dataclasses
import numpy as np
from jaxrmils.data import make_splits
import tiny_task

def build(config, progress):
    task = tiny_task.build(config, progress)
    pairs = np.arange(400) // 2
    sizes = dict(ranges=30, selection=50, confirmation=30, test=75, seed=0)
    splits = make_splits(400, groups=pairs, **sizes)
    dataset = dataclasses.replace(task.dataset, groups=pairs)
    return dataclasses.replace(task, dataset=dataset, splits=splits)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("budgets")
    (folder / "config.py").write_text(CONFIG)
    shutil.copy(Path(__file__).parent / "tiny_task.py", folder / "tiny_task.py")
    return folder


def quantize(folder, out, *options):
    arguments = ["quantize", "--config", f"{folder}/config.py", "--out", str(folder / out)]
    return main([*arguments, "--quiet", *options])


@pytest.fixture(scope="module")
def run(folder):
    assert quantize(folder, "run") == OK
    return folder / "run"


@pytest.fixture(scope="module")
def swept(run, folder):
    """A copy of the run with a measured sweep."""
    out = folder / "swept"
    shutil.copytree(run, out)
    assert main(["pareto", str(out), "--sizes", "0.27,0.32,0.4", "--quiet"]) == OK
    return out


@pytest.fixture
def copied(swept, tmp_path):
    return Path(shutil.copytree(swept, tmp_path / "copied"))


def said(capsys):
    captured = capsys.readouterr()
    return " ".join((captured.out + captured.err).split())


def test_the_budget_policy_is_recorded_with_its_limits(run):
    plan = jr.load_plan(run / "plan.json")
    scores = jr.load_scores(run / "scores")
    policy = plan.policy
    assert policy["name"] == "budget" and policy["objective"] == "squared"
    assert policy["limits"] == {"size_share": 0.35}
    assert policy["used"]["size_share"] == usage(scores.table, plan.layers)["size_share"] <= 0.35
    assert plan == jr.budget(scores, jr.Limits(size_share=0.35), objective="squared")
    report = json.loads((run / "report.json").read_text())
    assert report["quantized_bits"] <= 0.35 * report["float_bits"]
    settings = json.loads((run / "run.json").read_text())["config"]["policy"]
    assert settings["limits"]["size_share"] == 0.35 and settings["limits"]["bops"] == 0


def test_more_limits_groups_and_no_labels(folder):
    options = ["limits.weight_bits=8", "limits.activation_bits=8", "groups=Dense_*"]
    options += ["objective=sqnr", "limits.size_share=0", "formats=w8a8"]
    arguments = (f"--config.policy.{each}" for each in options)
    exact = ["--config.batch_size=0", "--config.batch_size_exact=True"]
    few = [*exact, "--config.memory_bytes=20000", "--config.loss=kl"]
    assert quantize(folder, "mixed", *arguments, *few) == OK
    # The compiler's count has parameters and temporaries; 20 kB are not enough for 100 examples.
    assert 1 < json.loads((folder / "mixed" / "run.json").read_text())["batch_size"] < 100
    plan = jr.load_plan(folder / "mixed" / "plan.json")
    assert plan.policy["limits"] == {"weight_bits": 8, "activation_bits": 8}
    assert plan.policy["groups"] == [["Dense_0/kernel", "Dense_1/kernel"]]
    assert plan.policy["objective"] == "sqnr" and plan.counts() == {"w8a8": 2}
    assert not (folder / "mixed" / "costs").exists()


def test_the_pass_of_an_objective_counts_and_the_size_is_kept(folder, monkeypatch):
    asked = []

    def said_to_fit(memory_bytes, *known, steps, **options):
        asked.append((steps, options["formats"]))
        return 20 if len(asked) == 1 else 10

    monkeypatch.setattr(batch_sizes, "batch_size_for", said_to_fit)
    options = ["--config.batch_size=0", "--config.batch_size_exact=True"]
    options += ["--config.policy.objective=fisher", "--config.policy.formats=w8a8,w4a8"]
    assert quantize(folder, "exact", *options) == OK
    assert asked == [(["score", "fisher"], ("w8a8", "w4a8"))]
    out = folder / "exact"
    assert json.loads((out / "run.json").read_text())["batch_size"] == 20

    def estimate(*known, **options):
        raise AssertionError("the run says how many fit")

    monkeypatch.setattr(batch_sizes, "fitting_batch_size", estimate)
    sizes = []
    own = pipeline.batches

    def batches(data, size):
        sizes.append(size)
        return own(data, size)

    monkeypatch.setattr(pipeline, "batches", batches)
    assert main(["evaluate", str(out), "--quiet"]) == OK
    assert main(["pareto", str(out), "--sizes", "0.4", "--quiet"]) == OK
    assert len(asked) == 1 and set(sizes) == {20}
    # Another objective's pass was not counted.
    sweep = ["pareto", str(out), "--sizes", "0.4", "--objective", "squared_output", "--quiet"]
    assert main(sweep) == OK
    assert asked[1:] == [(["squared_output"], ("w8a8", "w4a8"))] and set(sizes) == {20, 10}
    with pytest.raises(AssertionError, match="the run says"):
        main(["evaluate", str(out), "--config.batch_size=0", "--quiet"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["limits.size_share=0.01"], "size_share <= 0.01 is out of reach"),
        (["limits.size_share=0"], "nothing is limited; set one or more of policy.limits"),
        (["limits.size_shares=0.2"], "did you mean policy.limits.size_share"),
        (["limits.size_share=20"], "the limit size_share is 20"),
        (["refine=-1"], "policy.refine is -1; expected rounds"),
        (["refine=True", "objective=signed"], "expected one of 'squared', 'squared_output'"),
        (["refine=True", "name=uniform"], "only a budget is refined"),
        (["objective=squared_outputs"], "did you mean 'squared_output'?"),
        (["objective=sqnr", "formats=w8a8,w8a8d"], "w8a8d: these costs know calibrated grids"),
        (["refine=1", "scores=moments"], "policy.refine needs every example's scores"),
        (["objective=squard"], "did you mean 'squared'? Expected one of 'signed'"),
        (["rounding=up"], "policy.rounding is 'up'; expected one of 'nearest', 'directed'"),
        (["capabilities=cuds"], "did you mean 'cuda'?"),
        (["groups=Dens"], "matches no layer; near matches: Dense_1/kernel"),
        (["limits.latency=0.1"], "`jaxrmils profile RUN` measures one on this machine"),
        (["limits.latency=0.1"], "give it as --config.policy.latency_table=RUN/latency.json"),
        (["name=file"], "policy.file is empty; give a plan"),
    ],
)
def test_what_is_wrong_with_a_budget_is_said_before_anything_runs(folder, capsys, options, message):
    arguments = [f"--config.policy.{each}" for each in options]
    arguments = [each.replace("policy.scores", "scores") for each in arguments]
    assert quantize(folder, "never", *arguments) == USAGE
    assert message in said(capsys)
    assert not (folder / "never").exists()


def test_a_budget_needs_a_tangent(folder, capsys):
    assert quantize(folder, "never", "--config.loss=kl") == USAGE
    assert "budget has nothing to go by" in said(capsys)
    options = ["--config.loss=kl", "--config.policy.objective=sqnr", "--config.policy.refine=1"]
    assert quantize(folder, "never", *options) == USAGE
    assert "leave out policy.refine" in said(capsys)


def test_costs_of_a_pass_are_made_once_and_refined(folder, tmp_path, capsys):
    options = ["objective=sqnr", "refine=1", "force=Dense_1/*=w8a4"]
    capsys.readouterr()
    assert quantize(folder, "refined", *(f"--config.policy.{each}" for each in options)) == OK
    assert "took the selection split's loss change from" in said(capsys)
    out = folder / "refined"
    plan, scores = jr.load_plan(out / "plan.json"), jr.load_scores(out / "scores")
    record = plan.policy["refinement"]
    rounds, chosen = record["rounds"], record["chosen"]
    own = rounds[chosen]["selection"] if isinstance(chosen, int) else record["uniform"][chosen]
    assert len(rounds) <= 2 and record["selection"] == own

    task = tiny_task.build(base_config(), None)
    graph = jr.trace(task.apply, task.params, task.dataset.inputs[:1])
    data = task.split("selection").batches(50)
    make = jr.MEASURED_COSTS["sqnr"]
    formats = ("w8a8", "w4a8", "w4a4", "w8a4")
    expected = make(graph, task.params, data, task.loss, scores.ranges, formats=formats)
    costs = jr.load_costs(out / "costs" / "sqnr.json")
    assert costs == expected
    first = jr.budget(
        scores, jr.Limits(size_share=0.35), objective=costs, force={"Dense_1/*": "w8a4"}
    )

    copy = Path(shutil.copytree(out, tmp_path / "copy"))
    without = ["pareto", str(copy), "--no-verify", "--values", "0.35", "--json"]
    assert main(without) == OK
    data = json.loads(capsys.readouterr().out)
    assert data["objective"] == "sqnr" and "not refined" in data["notes"][0]
    assert jr.load_plan(copy / "pareto" / data["points"][0]["file"]).layers == first.layers
    more = ["--config.policy.formats=w8a8,w4"]
    assert main([*without, *more]) == BAD_INPUT
    assert "holds no costs of these scores and formats" in said(capsys)
    assert main(["pareto", str(copy), "--values", "0.35", *more, "--quiet"]) == OK
    report = load_pareto(copy)
    taken = jr.load_plan(copy / "pareto" / report.points[0].file).policy
    assert taken["refinement"]["rounds"] and taken["limits"] == {"size_share": 0.35}
    assert report.settings["refine"] == 1 and report.points[0].used == taken["used"]
    assert main([*without, *more]) == OK
    manifest = json.loads((copy / "scores" / "manifest.json").read_text())
    manifest["info"]["seed"] = 1
    (copy / "scores" / "manifest.json").write_text(json.dumps(manifest))
    capsys.readouterr()
    assert main(without) == BAD_INPUT
    assert "holds no costs of these scores" in said(capsys)


def test_a_sweep_measures_every_plan_on_the_confirmation_split(swept, capsys):
    report = load_pareto(swept)
    assert report.held_out.split == "confirmation" and report.held_out.examples == 60
    assert [p.name for p in report.points if p.kind == "uniform"] == [
        "uniform w8a8",
        "uniform w4a8",
        "uniform w4a4",
    ]
    capsys.readouterr()
    # The integer model, by another road.
    assert main(["evaluate", str(swept), "--split", "confirmation", "--json", "--quiet"]) == OK
    evaluated = json.loads(capsys.readouterr().out)
    own = report.points[-1]
    assert own.kind == "run" and report.task == "tiny" and report.unit == "nats"
    assert own.measured.mean == pytest.approx(evaluated["change"]["mean"], abs=1e-6)
    assert own.metrics[0].mean == pytest.approx(evaluated["accuracy"])
    assert report.held_out.loss == pytest.approx(evaluated["float_loss"], abs=1e-6)


def test_a_sweep_writes_plans_that_load_and_records_that_agree(swept):
    files = {path.name for path in (swept / "pareto").iterdir()}
    report = load_pareto(swept)
    assert files == {"pareto.html", "pareto.csv", "pareto.json", *(p.file for p in report.points)}
    scores = jr.load_scores(swept / "scores")
    for point in report.points:
        plan = jr.load_plan(swept / "pareto" / point.file)
        assert plan.counts() == point.formats
        assert usage(scores.table, plan.layers) == point.used
        for name, limit in point.limits.items():
            assert point.used[name] <= limit
    with (swept / "pareto" / "pareto.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [float(row["measured_mean"]) for row in rows] == [p.measured.mean for p in report.points]


def test_a_sweep_along_latency_needs_times(run, capsys):
    assert main(["pareto", str(run), "--along", "latency", "--no-verify"]) == USAGE
    words = said(capsys)
    assert "--along latency limits seconds" in words and "`jaxrmils profile RUN`" in words
    assert "--latency RUN/latency.json" in words
    limited = ["--config.policy.limits.latency=0.1", "--no-verify"]
    assert main(["pareto", str(run), *limited]) == USAGE
    assert "policy.limits.latency limits seconds" in said(capsys)


def test_a_sweep_without_the_model_says_that_nothing_was_measured(run, tmp_path, capsys):
    out = Path(shutil.copytree(run, tmp_path / "run"))
    record = json.loads((out / "run.json").read_text())
    record["config"]["task"] = "gone.py:build"
    (out / "run.json").write_text(json.dumps(record))
    assert main(["pareto", str(out)]) == BAD_INPUT
    assert "--no-verify for predictions from the saved scores" in said(capsys)
    assert not (out / "pareto").exists()
    options = ["--no-verify", "--along", "weight_bits", "--values", "4,6,8", "--json"]
    kept = "--config.policy.limits.activation_bits=8"
    assert main(["pareto", str(out), *options, kept, "--objective", "joint_upper_bound"]) == OK
    captured = capsys.readouterr()
    data = json.loads(captured.out)
    assert "Nothing here was measured" in " ".join(captured.err.split())
    assert data["held_out"] is None and data["along"] == "weight_bits"
    assert data["objective"] == "joint_upper_bound" and data["solve_seconds"] < 30
    budgets = [point for point in data["points"] if point["kind"] == "budget"]
    assert all(
        point["limits"].keys() == {"weight_bits", "activation_bits", "size_share"}
        for point in budgets
    )
    assert data["settings"]["limits kept"] == {"size_share": 0.35, "activation_bits": 8}
    saved = json.loads((out / "pareto" / "pareto.json").read_text())
    assert saved["points"] == data["points"] and data["picks"]["compact"]["reason"]


def test_budgets_of_latency(run, tmp_path, capsys):
    out = Path(shutil.copytree(run, tmp_path / "run"))
    record = json.loads((out / "run.json").read_text())
    record["config"]["policy"] = {"name": "rmils", "mu": 0.1, "skip": []}  # of an earlier version
    (out / "run.json").write_text(json.dumps(record))
    layers = jr.load_plan(out / "plan.json").layers
    seconds = {"float": 4e-3, "w8a8": 1e-3, "w4a8": 2e-3, "w4a4": 2e-3}
    table = LatencyTable(dict.fromkeys(layers, seconds), "cpu", "invented", overhead=1e-3)
    save_latency(table, tmp_path / "latency.json")
    options = ["--along", "latency", "--count", "3", "--latency", f"{tmp_path}/latency.json"]
    assert main(["pareto", str(out), "--no-verify", *options, "--json"]) == OK
    data = json.loads(capsys.readouterr().out)
    budgets = [point for point in data["points"] if point["kind"] == "budget"]
    assert budgets[0]["used"]["latency"] == pytest.approx(3e-3)
    assert all(p["used"]["latency"] <= p["limits"]["latency"] + 1e-12 for p in budgets)
    assert data["latency"] == "invented, for cpu"
    assert "latency in ms" in (out / "pareto" / "pareto.html").read_text()
    shutil.copy(tmp_path / "latency.json", out)  # where `jaxrmils profile` puts it
    assert main(["pareto", str(out), "--no-verify", "--count", "2", "--json"]) == OK
    assert json.loads(capsys.readouterr().out)["latency"] == "invented, for cpu"
    del seconds["w4a4"]
    save_latency(table, out / "latency.json")
    assert main(["pareto", str(out), "--no-verify", "--count", "2"]) == OK
    assert "latency.json are not shown: the latency table has no 'w4a4'" in said(capsys)
    assert main(["pareto", str(out), "--no-verify", "--along", "latency"]) == USAGE
    assert "has no 'w4a4'" in said(capsys)
    (tmp_path / "latency.json").write_text('{"kind": "jaxrmils latency", "format_version": 1}')
    assert main(["pareto", str(out), "--no-verify", *options]) == BAD_INPUT
    assert "latency.json is incomplete" in said(capsys)


def test_examples_that_belong_together(folder, capsys):
    (folder / "pairs.py").write_text(f"import sys\nsys.path.insert(0, {str(folder)!r})\n{PAIRS}")
    grouped = "--config.task=pairs.py:build"
    assert quantize(folder, "never", grouped, "--config.scores=moments") == USAGE
    assert "belong to groups" in said(capsys)
    assert quantize(folder, "pairs", grouped) == OK
    assert main(["pareto", f"{folder}/pairs", "--values", "0.3", "--quiet"]) == OK
    report = load_pareto(folder / "pairs")
    point = report.points[0]
    assert point.predicted.groups == 50 and point.predicted.n == 100
    assert point.measured.groups == report.held_out.groups == 30


def test_three_picks_and_the_certificate_of_one(swept, folder, capsys):
    assert main(["recommend", str(swept)]) == OK
    printed = said(capsys)
    for name in ("Quality", "Balanced", "Compact", "select again", "pareto.html"):
        assert name in printed
    assert main(["recommend", str(swept), "--margin", "0.2", "--tolerance", "0.5", "--json"]) == OK
    picks = json.loads(capsys.readouterr().out)["picks"]
    assert set(picks) == {"quality", "balanced", "compact"}
    smallest = min(load_pareto(swept).points, key=lambda p: (p.size_bytes, p.upper))
    assert picks["compact"]["name"] == smallest.name and picks["compact"]["qualifies"]
    path = picks["quality"]["path"]
    options = ["--config.policy.name=file", f"--config.policy.file={path}"]
    assert quantize(folder, "certified", *options, "--config.scores=moments") == OK
    out = folder / "certified"
    assert jr.load_plan(out / "plan.json") == jr.load_plan(path)

    # Budgets from moments are those from scores.
    assert not (out / "scores").exists() and len(jr.load_moments(out / "moments")) == 100
    points = []
    for each in (out, shutil.copytree(swept, folder / "again")):
        options = ["--no-verify", "--values", "0.3", "--objective", "joint_upper_bound", "--json"]
        capsys.readouterr()
        assert main(["pareto", str(each), *options]) == OK
        data = json.loads(capsys.readouterr().out)
        points.append([data["points"][0]["predicted"]["upper"], data["float_loss"]])
    assert points[0] == pytest.approx(points[1], rel=1e-5)
    assert main(["pareto", str(out), "--config.policy.refine=1"]) == USAGE
    assert "moments, and a refinement needs every example's scores" in said(capsys)
    assert set(load_pareto(out).sources) == {"moments/manifest.json", "plan.json"}


def test_a_sweep_is_refused_once_it_no_longer_belongs_to_its_run(copied, capsys):
    plan = json.loads((copied / "plan.json").read_text())
    plan["policy"]["name"] = "by hand"
    (copied / "plan.json").write_text(json.dumps(plan))
    assert main(["recommend", str(copied)]) == BAD_INPUT
    assert "made from other scores or another plan" in said(capsys)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda p: p.write_text(p.read_text()[:-40]), "no valid JSON"),
        (lambda p: p.write_text(p.read_text().replace('"margin"', '"margn"')), "margin is missing"),
        (lambda p: p.write_text("{}"), "of the kind None"),
        (lambda p: p.unlink(), "run `jaxrmils pareto"),
        (lambda p: (p.parent / "budget-01.json").unlink(), "budget-01.json, which is missing"),
    ],
)
def test_damaged_sweeps_say_what_is_wrong(copied, capsys, damage, message):
    damage(copied / "pareto" / "pareto.json")
    assert main(["recommend", str(copied)]) == BAD_INPUT
    assert message in said(capsys)


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--objective", "squard"], USAGE, "--objective is 'squard'; did you mean 'squared'?"),
        (["--along", "size_shar"], USAGE, "--along is 'size_shar'; did you mean 'size_share'?"),
        (["--count", "0"], USAGE, "--count is 0; expected 1 or more"),
        (["--values", "0.2;0.3"], USAGE, "expected numbers separated by commas"),
        (["--no-verify", "--values", "0.01"], USAGE, "can't go below 0.26"),
        (
            ["--no-verify", "--along", "latency"],
            USAGE,
            "--along latency limits seconds, but there is no table",
        ),
        (["--config.policy.refine=2", "--objective=signed"], USAGE, "never negative"),
        (["--no-verify", "--config.seed=1"], USAGE, "which --no-verify leaves alone"),
        (["--config.policy.objectiv=signed"], USAGE, "did you mean policy.objective"),
        (["--config.seed=1"], BAD_INPUT, "fingerprint"),
        (["--no-verify", "--latency", "nowhere.json"], BAD_INPUT, "nowhere.json does not exist"),
    ],
)
def test_errors_of_a_sweep_write_nothing(run, capsys, arguments, code, message):
    assert main(["pareto", str(run), "--quiet", *arguments]) == code
    assert message in said(capsys)
    assert not (run / "pareto").exists()


def test_runs_without_a_sweep_without_scores_and_no_runs(run, swept, tmp_path, capsys):
    assert main(["recommend", str(run)]) == BAD_INPUT
    assert f"run `jaxrmils pareto {run}` first" in said(capsys)
    for command in ("pareto", "recommend"):
        assert main([command, f"{tmp_path}/nowhere"]) == BAD_INPUT
        assert "nowhere does not exist" in said(capsys)
    assert main(["recommend", str(swept), "--margin", "-1"]) == USAGE
    assert "expected 0 < margin <= tolerance" in said(capsys)
    assert main(["recommend", str(swept), "--config.seed=1"]) == USAGE
    bare = Path(shutil.copytree(run, tmp_path / "bare"))
    shutil.rmtree(bare / "scores")
    assert main(["pareto", str(bare), "--no-verify"]) == BAD_INPUT
    assert "holds no scores" in said(capsys)
    other = Path(shutil.copytree(run, tmp_path / "other"))
    (other / "pareto").mkdir()
    (other / "pareto" / "mine.txt").write_text("keep")
    assert main(["pareto", str(other), "--no-verify", "--quiet"]) == BAD_INPUT
    assert "was not made by `jaxrmils pareto`" in said(capsys)
    assert [path.name for path in (other / "pareto").iterdir()] == ["mine.txt"]


def test_what_a_solver_prints_does_not_come_into_the_json():
    code = """
import os, sys
from jaxrmils.cli import main
main.main = lambda: os.write(1, b"noise") and print("{}")
sys.argv = ["jaxrmils", "pareto", "--json"]
main.entry_point()
"""
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout == "{}\n" and "noise" in found.stderr


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("pareto", ("--no-verify", "--along", "squared", "confirmation split", "policy.name=file")),
        ("recommend", ("quality", "balanced", "compact", "--margin")),
    ],
)
def test_help_teaches(command, words, capsys):
    assert main([command, "--help"]) == OK
    out = capsys.readouterr().out
    assert "exit codes" in out and all(word in out for word in words)
