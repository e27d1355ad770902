"""Reports hold what was measured, and bad data is refused."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

import jaxrmils as jr
from jaxrmils.evaluation import EvaluationError, code_agreement, measure, measure_layers
from jaxrmils.policies import predict
from jaxrmils.sensitivity import ScoreError


def loss(outputs, targets):
    return -jnp.take_along_axis(jax.nn.log_softmax(outputs), targets[:, None], axis=1)[:, 0]


def apply(params, x):
    return jax.nn.relu(x @ params["a"]) @ params["b"]


@pytest.fixture(scope="module")
def job():
    keys = jax.random.split(jax.random.key(0), 3)
    params = {"a": jax.random.normal(keys[0], (6, 8)), "b": jax.random.normal(keys[1], (8, 3))}
    x = np.asarray(jax.random.normal(keys[2], (90, 6)))
    y = np.asarray(jnp.argmax(apply(params, x), axis=1), np.int32)
    batches = [(x[i : i + 30], y[i : i + 30]) for i in (0, 30, 60)]
    graph = jr.trace(apply, params, x[:2])
    ranges = jr.calibrate(graph, params, [x[:30]])
    scores = jr.score(graph, params, batches[:2], loss, ranges)
    return graph, params, batches, ranges, scores


def test_a_report_holds_predicted_and_measured(job):
    graph, params, batches, ranges, scores = job
    model = jr.quantize(graph, params, jr.uniform(scores.table, "int8"), ranges)
    report = jr.verify(graph, params, model, batches, loss, ranges=ranges, scores=scores)
    x, y = (np.concatenate(parts) for parts in zip(*batches, strict=True))
    change = np.asarray(loss(model(x), y) - loss(apply(params, x), y))
    assert report.measured.n == 90
    assert report.measured.mean == pytest.approx(change.mean(), abs=1e-6)
    assert report.float_accuracy == 1.0 and report.accuracy.gained == 0
    assert report.planned_sites == report.integer_sites == 2
    assert report.code_steps <= 1
    assert [row.name for row in report.layers] == ["a", "b"]
    total = sum(predict(scores, model.plan).values()).mean()
    assert report.predicted.mean == pytest.approx(total)
    assert report.quantized_bits == model.size_bits
    assert json.loads(json.dumps(report.to_dict()))["verdict"] == report.verdict
    console = Console(record=True, width=120)
    jr.print_report(report, console)
    text = console.export_text()
    assert "w8a8" in text and report.verdict.split(" (")[0] in text


def test_a_float_plan_changes_nothing(job):
    graph, params, batches, ranges, scores = job
    model = jr.quantize(graph, params, jr.uniform(scores.table, "float"), ranges)
    report = jr.verify(graph, params, model, batches, loss, ranges=ranges)
    assert report.measured.mean == 0 and report.planned_sites == 0
    assert report.verdict.startswith("lossless")


def test_a_layer_alone_is_the_model_with_that_layer_alone(job):
    graph, params, batches, ranges, scores = job
    plan = jr.rmils(graph, scores, mu=0.0)
    alone = measure_layers(graph, params, plan, ranges, batches, loss)
    before = measure(graph, lambda x: apply(params, x), batches, loss)
    assert set(alone) == {"a", "b"}
    for name, change in alone.items():
        model = jr.quantize(graph, params, plan.only(name), ranges)
        after = measure(graph, model, batches, loss)
        np.testing.assert_allclose(change, after.loss - before.loss, atol=2e-5)


def test_codes_agree_with_the_simulation(job):
    graph, params, batches, ranges, scores = job
    model = jr.quantize(graph, params, jr.uniform(scores.table, "w4a8"), ranges)
    agreement = code_agreement(model, batches[0][0])
    assert set(agreement) == {"a", "b"}
    assert all(fraction < 0.01 and steps <= 1 for fraction, steps in agreement.values())


def test_int4_on_cpu_is_said_to_be_smaller_but_not_faster(job):
    graph, params, batches, ranges, scores = job
    model = jr.quantize(graph, params, jr.uniform(scores.table, "int4"), ranges, backend="cpu")
    report = jr.verify(graph, params, model, batches, loss)
    assert any("smaller but not faster" in note for note in report.notes)


def test_bad_data_is_refused(job):
    graph, params, batches, ranges, scores = job
    model = jr.quantize(graph, params, jr.uniform(scores.table, "int8"), ranges)
    with pytest.raises(EvaluationError, match="no batches"):
        jr.verify(graph, params, model, [], loss)
    x, y = batches[0]
    with pytest.raises(ScoreError, match="label 7 of example 4 is outside"):
        wrong = y.copy()
        wrong[4] = 7
        measure(graph, model, [(x, wrong)], loss)
    with pytest.raises(EvaluationError, match="the loss of example 0 is nan"):
        measure(graph, model, [(x, y)], lambda o, t: loss(o, t) * jnp.nan)
