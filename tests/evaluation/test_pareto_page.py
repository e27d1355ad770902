"""Sweeps of budgets: measured as the integer model does, drawn, and written as CSV."""

import csv
import dataclasses
import io

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from evaluation.pages import Page, assert_accessible, assert_self_contained

import jaxrmils as jr
from jaxrmils.evaluation import EvaluationError, SimulatedModel
from jaxrmils.evaluation.page.pareto_page import pareto_page
from jaxrmils.evaluation.pareto_report import (
    ParetoReport,
    contenders,
    measured_points,
    metric_estimate,
    pareto_csv,
    predicted_points,
    uniform_plans,
)
from jaxrmils.policies import LatencyTable, Limits, pareto
from jaxrmils.statistics import mean_interval
from jaxrmils.zoo import cross_entropy

FORMATS = ("w8a8", "w4a8")


def apply(params, x):
    for name in "abc":
        x = jnp.tanh(x @ params[name]) * 2
    return x


@pytest.fixture(scope="module")
def world():
    keys = jax.random.split(jax.random.key(0), 4)
    params = {n: jax.random.normal(k, (8, 8)) for n, k in zip("abc", keys, strict=False)}
    x = jax.random.normal(keys[3], (160, 8))
    y = jnp.argmax(apply(params, x), axis=1)
    graph = jr.trace(apply, params, x[:4])
    ranges = jr.calibrate(graph, params, [x[:40]])
    scores = jr.score(graph, params, [(x[40:100], y[40:100])], cross_entropy, ranges)
    held_out = [(x[100:140], y[100:140]), (x[140:], y[140:])]
    return graph, params, ranges, scores, held_out


@pytest.fixture(scope="module")
def found(world):
    scores = world[3]
    budgets = [Limits(size_share=s) for s in (0.6, 0.27, 0.32, 0.2701, 0.4)]
    points = pareto(scores, budgets, objective="squared", formats=FORMATS)
    plans = uniform_plans(scores, FORMATS)
    return contenders(points, "size_share", plans, plans["w4a8"])


def latency(found):
    seconds = {"float": 3e-3, "w8a8": 1e-3, "w4a8": 2e-3}
    return LatencyTable(dict.fromkeys(found[0].plan.layers, seconds), "cpu", "invented")


@pytest.fixture(scope="module")
def report(world, found):
    graph, params, ranges, scores, held_out = world
    points = predicted_points(found, scores)
    simulation = SimulatedModel(graph, params, ranges, cross_entropy)
    data, points = measured_points(found, points, simulation, held_out, split="confirmation")
    return ParetoReport(
        task="a <b> task",
        along="size_share",
        budgets=5,
        objective="squared",
        unit="nats",
        margin=0.05,
        float_bytes=768.0,
        float_loss=float(scores.loss.mean()),
        examples=len(scores),
        points=points,
        held_out=data,
    )


@pytest.fixture(scope="module")
def predicted(report):
    points = (dataclasses.replace(p, measured=None, metrics=()) for p in report.points)
    return dataclasses.replace(report, points=tuple(points), held_out=None)


def test_every_plan_once_from_the_smallest_budget_on(found):
    names = [each.name for each in found]
    budgets = [each for each in found if each.kind == "budget"]
    assert names[-3:] == ["uniform w8a8", "uniform w4a8", "this run"]
    assert [b.name for b in budgets] == [f"budget {i + 1:02d}" for i in range(len(budgets))]
    asked = [b.limits["size_share"] for b in budgets]
    assert asked == sorted(asked) and 0.27 in asked and 0.2701 not in asked
    assert len({tuple(b.plan.layers.items()) for b in budgets}) == len(budgets) >= 3
    assert len({each.file for each in found}) == len(found)


def test_plans_are_measured_as_their_integer_models_behave(world, found, report):
    graph, params, ranges, _, held_out = world
    x, y = (np.concatenate(parts) for parts in zip(*held_out, strict=True))
    before = np.asarray(cross_entropy(apply(params, x), y), np.float64)
    for each, point in zip(found, report.points, strict=True):
        model = jr.quantize(graph, params, each.plan, ranges)
        outputs = jnp.concatenate([model(inputs) for inputs, _ in held_out])
        changes = np.asarray(cross_entropy(outputs, y), np.float64) - before
        right = np.asarray(jnp.argmax(outputs, axis=1)) == y
        assert point.measured.mean == pytest.approx(changes.mean(), abs=1e-5)
        assert point.measured.n == 60 and point.measured.level == 0.95
        (accuracy,) = point.metrics
        assert accuracy.mean == pytest.approx(right.mean())
        assert accuracy.change == pytest.approx(right.mean() - 1.0)
        assert accuracy.lower <= accuracy.change <= accuracy.upper
    assert report.held_out.metrics == {"accuracy": 1.0}
    assert report.held_out.loss == pytest.approx(before.mean(), abs=1e-6)
    assert any(point.measured.mean > 1e-3 for point in report.points)


def test_metrics_of_the_outputs_stand_in_for_accuracy(world, found):
    graph, params, ranges, scores, held_out = world
    simulation = SimulatedModel(graph, params, ranges, cross_entropy)
    points = predicted_points(found, scores)
    groups = np.arange(60) // 2

    def run(metrics):
        return measured_points(
            found[:2],
            points[:2],
            simulation,
            held_out,
            split="test",
            groups=groups,
            metrics=metrics,
        )

    data, measured = run(lambda z: {"first": jax.nn.sigmoid(z[:, 0])})
    assert data.groups == 30 and measured[0].measured.groups == 30
    assert measured[0].metrics[0].name == "first"
    assert measured[0].metrics[0].mean - data.metrics["first"] == pytest.approx(
        measured[0].metrics[0].change
    )
    with pytest.raises(EvaluationError, match="one for each was expected"):
        run(lambda z: {"first": np.zeros(3)})


def test_intervals_of_metrics():
    rng = np.random.default_rng(0)
    before, after = rng.uniform(size=(2, 50))
    found, expected = metric_estimate("F1", before, after), mean_interval(after - before)
    assert (found.lower, found.upper) == (expected.lower, expected.upper)
    right = np.ones(200)
    wrong = right.copy()
    wrong[:10] = 0
    worse, better = metric_estimate("EM", right, wrong), metric_estimate("EM", wrong, right)
    assert worse.lower < worse.change == -0.05 < worse.upper < 0
    assert (better.lower, better.upper) == pytest.approx((-worse.upper, -worse.lower))
    halves = np.full(30, 0.5)
    assert metric_estimate("F1", halves, halves).lower < -0.05


def test_the_page_is_strict_self_contained_and_accessible(report, predicted):
    for each in (report, predicted):
        page = Page(pareto_page(each))
        assert_self_contained(page)
        assert_accessible(page)
        assert "http://" not in page.source and "https://" not in page.source
        assert "a <b> task" in " ".join(page.words("div"))


def test_the_page_has_what_was_measured(report, predicted):
    page, other = Page(pareto_page(report)), Page(pareto_page(predicted))
    assert page.sections == ["size", "size-metric", "work", "work-metric", "plans", "made"]
    assert other.sections == ["size", "work", "plans", "made"]
    words, unmeasured = (" ".join(text for _, text in p.texts) for p in (page, other))
    assert "held-out confirmation split (60 examples)" in words
    assert "select again" in words and "select again" not in unmeasured
    assert "Nothing here was measured" in unmeasured and "Nothing here" not in words
    assert " predicted to be" in unmeasured and " shown to be" not in unmeasured
    assert " shown to be" in words
    for point in report.points:
        assert point.file in words and f"{point.measured.mean:+.5f}" in words
    names = [
        t for t in page.words("text") if set(t.split(", ")) <= {"quality", "balanced", "compact"}
    ]
    assert sorted(", ".join(names[: len(names) // 4]).split(", ")) == [
        "balanced",
        "compact",
        "quality",
    ]


def test_every_metric_has_a_chart(report):
    def both(point):
        (accuracy,) = point.metrics
        f1 = dataclasses.replace(accuracy, name="F1", change=-0.125, lower=-0.25, upper=0.0)
        return dataclasses.replace(point, metrics=(accuracy, f1))

    held_out = dataclasses.replace(report.held_out, metrics={"accuracy": 1.0, "F1": 0.9})
    points = tuple(map(both, report.points))
    page = Page(pareto_page(dataclasses.replace(report, points=points, held_out=held_out)))
    metrics = [f"{key}-metric{end}" for key in ("size", "work") for end in ("", "-2")]
    assert page.sections == ["size", *metrics[:2], "work", *metrics[2:], "plans", "made"]
    assert "Change of F1 against size" in page.words("h2")
    labels = [chart.attrib.get("aria-label", "") for chart in page.charts]
    start = "held-out change of F1 in points against size"
    (chart,) = (label for label in labels if label.startswith(start))
    assert chart.count("-12.5 [-25, +0]") == len(points)
    assert_self_contained(page)
    assert_accessible(page)


def test_marks_lie_where_the_numbers_say(report):
    page = Page(pareto_page(report))
    chart = next(c for c in page.charts if c.attrib.get("aria-label", "").startswith("held-out"))
    marks = [u for u in chart.iter("use") if u.attrib["href"] == "#mark-test"]
    budgets = [p for p in report.points if p.kind == "budget"]
    across = [float(m.attrib["x"].rstrip("%")) for m in marks]
    down = [float(m.attrib["y"]) for m in marks]
    assert len(marks) == len(budgets) and across == sorted(across)
    order = np.argsort([p.measured.mean for p in budgets])
    assert np.argsort(down)[::-1].tolist() == order.tolist()
    sizes = [p.size_bytes for p in budgets]
    assert np.corrcoef(sizes, across)[0, 1] == pytest.approx(1, abs=1e-6)


def test_latency_takes_the_place_of_bit_operations(world, found, predicted):
    points = predicted_points(found, world[3], latency=latency(found))
    uniform = next(p for p in points if p.name == "uniform w4a8")
    assert uniform.used["latency"] == pytest.approx(6e-3)
    page = Page(pareto_page(dataclasses.replace(predicted, points=points, latency="invented")))
    assert "Loss change against latency" in page.words("h2")
    assert any("latency in ms" in text for text in page.words("text"))


def test_the_sheet_holds_every_number(report, predicted):
    rows = list(csv.DictReader(io.StringIO(pareto_csv(report))))
    assert [row["name"] for row in rows] == [p.name for p in report.points]
    for row, point in zip(rows, report.points, strict=True):
        assert float(row["size_bytes"]) == point.used["size_bytes"]
        assert float(row["measured_upper"]) == point.measured.upper
        assert float(row["predicted_mean"]) == point.predicted.mean
        assert float(row["accuracy_lower"]) == point.metrics[0].lower
        assert row["latency"] == "" and row["file"] == point.file
    assert float(rows[0]["limit_size_share"]) == 0.27 and rows[-1]["limit_size_share"] == ""
    picked = " ".join(row["picks"] for row in rows).split()
    assert sorted(picked) == ["balanced", "compact", "quality"]
    bare = list(csv.DictReader(io.StringIO(pareto_csv(predicted))))
    assert bare[0]["measured_mean"] == "" and "accuracy_mean" not in bare[0]
