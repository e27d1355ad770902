"""Metrics of the whole integer model, on a network with two outputs as for answers in a text."""

import json

import jax
import numpy as np
import pytest
from evaluation.pages import Page
from rich.console import Console

import jaxrmils as jr
from jaxrmils.evaluation import EvaluationError, measure, metric_changes, repeats_accuracy
from jaxrmils.evaluation.page import read_report, report_page
from jaxrmils.statistics import accuracy_change, mean_interval
from jaxrmils.zoo import cross_entropy

LENGTH = 7


def apply(params, x):
    hidden = jax.nn.relu(x @ params["a"])
    return hidden @ params["start"], hidden @ params["end"]


def spans(outputs, targets):
    return (
        cross_entropy(outputs[0], targets["start"]) + cross_entropy(outputs[1], targets["end"])
    ) / 2


def scores(outputs, targets):
    """Exact match, and the share of the answer's and the prediction's tokens that both have."""
    found = {"EM": [], "F1": []}
    for i, (start, end) in enumerate(zip(*outputs, strict=True)):
        a, b = (int(np.argmax(z)) for z in (start, end))
        own = set(range(a, b + 1))
        right = set(range(targets["start"][i], targets["end"][i] + 1))
        found["EM"].append(own == right)
        both = len(own & right)
        found["F1"].append(2 * both / (len(own) + len(right)))
    return {name: np.array(values) for name, values in found.items()}


@pytest.fixture(scope="module")
def job():
    keys = jax.random.split(jax.random.key(0), 4)
    params = {
        "a": jax.random.normal(keys[0], (6, 8)),
        "start": jax.random.normal(keys[1], (8, LENGTH)),
        "end": jax.random.normal(keys[2], (8, LENGTH)),
    }
    x = np.asarray(jax.random.normal(keys[3], (90, 6)))
    start, end = (np.argmax(z, axis=1).astype(np.int32) for z in apply(params, x))
    targets = {"start": start, "end": np.maximum(start, end)}
    cuts = [slice(0, 40), slice(40, 80), slice(80, 90)]  # the last one is smaller
    batches = [(x[c], {k: v[c] for k, v in targets.items()}) for c in cuts]
    graph = jr.trace(apply, params, x[:2])
    ranges = jr.calibrate(graph, params, [x[:30]])
    model = jr.quantize(graph, params, jr.uniform(jr.tabulate(graph), "int4"), ranges)
    return graph, params, model, batches, x, targets


@pytest.fixture(scope="module")
def report(job):
    graph, params, model, batches, _, targets = job
    groups = np.arange(90) // 3
    return jr.verify(
        graph, params, model, batches, spans,
        groups=groups, metrics=lambda outputs: scores(outputs, targets),
    )  # fmt: skip


def test_metrics_are_those_of_the_integer_model(job, report):
    _, params, model, _, x, targets = job
    before, after = scores(apply(params, x), targets), scores(model(x), targets)
    exact, overlap = report.metrics
    assert (exact.name, overlap.name) == ("EM", "F1")
    for metric in report.metrics:
        a, b = (np.float64(values[metric.name]) for values in (before, after))
        assert (metric.float_mean, metric.quantized_mean) == pytest.approx((a.mean(), b.mean()))
        assert a.mean() > b.mean() > 0.1
        units = (b - a).reshape(30, 3).mean(axis=1)
        assert metric.change.mean == pytest.approx(units.mean())
        assert metric.change.standard_error == pytest.approx(units.std(ddof=1) / np.sqrt(30))
        assert metric.change.groups == 30
        assert metric.change.lower < metric.change.mean < metric.change.upper
    groups = np.arange(90) // 3
    tango = accuracy_change(before["EM"], after["EM"], groups=groups)
    assert exact.drop_upper == tango.drop_upper and exact.accuracy == tango
    drops = mean_interval(before["F1"] - after["F1"], level=0.9, groups=groups)
    assert overlap.drop_upper == pytest.approx(drops.upper) and overlap.accuracy is None


def test_metrics_are_printed_saved_and_drawn(report):
    console = Console(record=True, width=120)
    jr.print_report(report, console)
    text = " ".join(console.export_text().split())
    page = Page(report_page(json.loads(json.dumps(report.to_dict()))))
    for metric in report.metrics:
        bound = f"{100 * metric.drop_upper:.2f} points"
        means = (
            f"float {100 * metric.float_mean:.2f} %, quantized {100 * metric.quantized_mean:.2f} %"
        )
        assert f"{metric.name} {means}" in text and f"bound of the drop {bound}" in text
        place = page.words("dt").index(f"{metric.name}, change")
        (big, more) = page.words("dd")[2 * place : 2 * place + 2]
        assert big == f"{100 * metric.change.mean:+.2f} points"
        assert means in more and f"the drop is below {bound}" in more
    assert f"{report.metrics[0].accuracy.lost} lost" in text
    saved = read_report(json.loads(json.dumps(report.to_dict())))
    assert [m.name for m in saved.metrics] == ["EM", "F1"]
    assert saved.metrics[0].change.groups == 30 and saved.metrics[1].accuracy is None


@pytest.fixture(scope="module")
def classifier():
    keys = jax.random.split(jax.random.key(1), 2)
    params = {"w": jax.random.normal(keys[0], (6, 5))}
    x = np.asarray(jax.random.normal(keys[1], (60, 6)))
    graph = jr.trace(lambda p, x: x @ p["w"], params, x[:2])
    y = np.argmax(x @ params["w"], axis=1).astype(np.int32)
    ranges = jr.calibrate(graph, params, [x])
    model = jr.quantize(graph, params, jr.uniform(jr.tabulate(graph), "int4"), ranges)
    return graph, params, model, [(x, y)], cross_entropy


def printed(report):
    console = Console(record=True, width=120)
    jr.print_report(report, console)
    return console.export_text()


def test_accuracy_is_not_told_twice(classifier):
    y = classifier[3][0][1]
    first = jr.verify(*classifier, metrics=lambda z: {"Acc@1": np.argmax(z, axis=1) == y})
    assert first.accuracy.lost > 0 and repeats_accuracy(first)
    assert "\nAccuracy" not in printed(first) and "\nAcc@1" in printed(first)
    assert "Accuracy change" not in Page(report_page(first)).words("dt")
    assert "Acc@1, change" in Page(report_page(first)).words("dt")
    other = jr.verify(*classifier, metrics=lambda z: {"Acc@1": np.argmin(z, axis=1) == y})
    assert not repeats_accuracy(other)
    assert "\nAccuracy" in printed(other) and "\nAcc@1" in printed(other)
    assert "Accuracy change" in Page(report_page(other)).words("dt")


def test_without_metrics_no_outputs_are_kept(classifier):
    graph, params, _, batches, loss = classifier
    found = measure(graph, lambda x: graph.apply(params, x), batches, loss)
    assert found.outputs is None and found.metrics == {}
    report = jr.verify(*classifier)
    assert report.metrics == () and not repeats_accuracy(report)
    assert "\nAccuracy" in printed(report)


@pytest.mark.parametrize(
    ("metrics", "message"),
    [
        (lambda z: {"top": np.ones(59)}, "metric 'top' has 59 numbers for 60 held-out examples"),
        (lambda z: {"top": np.ones((60, 1))}, r"metric 'top' has shape \(60, 1\)"),
        (lambda z: {"top": np.full(60, 100.0)}, "metric 'top' is 100.0 at example 0"),
    ],
)
def test_metrics_that_do_not_fit_are_refused(classifier, metrics, message):
    with pytest.raises(EvaluationError, match=message):
        jr.verify(*classifier, metrics=metrics)


def test_other_metrics_for_the_other_model_are_refused():
    with pytest.raises(EvaluationError, match=r"float model's metrics are \['a'\]"):
        metric_changes({"a": np.ones(3)}, {"b": np.ones(3)})
