"""Reports hold what was measured, and bad data is refused."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

import jaxrmils as jr
from jaxrmils.evaluation import EvaluationError, code_agreement, measure, measure_layers
from jaxrmils.lowering import WIDENED, check_integer_sites
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


@pytest.mark.parametrize("rows", [2, 30])
def test_sites_whose_codes_are_widened_are_named(job, rows):
    graph, params, batches, ranges, _ = job
    model = jr.quantize(graph, params, jr.uniform(jr.tabulate(graph), "int8"), ranges)
    own = [(x[:rows], y[:rows]) for x, y in batches]
    kinds = check_integer_sites(model, own[0][0])
    wide = [site for site, found in kinds.items() if WIDENED["dot"] in found]
    notes = [note for note in jr.verify(graph, params, model, own, loss).notes if "int32" in note]
    assert len(notes) == bool(wide)
    assert all(site in notes[0] for site in wide)


@pytest.fixture(scope="module")
def full(job):
    """The report of an int4 plan with everything that a report can hold."""
    graph, params, batches, ranges, scores = job
    model = jr.quantize(graph, params, jr.rmils(graph, scores, mu=0.0), ranges)
    report = jr.verify(
        graph, params, model, batches[2:], loss, ranges=ranges, scores=scores, selection=batches[:2]
    )
    return model, report


def test_layers_share_out_the_joint_change(job, full):
    graph, params, batches, ranges, _ = job
    model, report = full
    shares = jr.attribute(graph, params, model.plan, batches[2:], loss, ranges, points=2)
    for row in report.layers:
        assert row.attributed.mean == pytest.approx(shares.layers[row.name].mean(), abs=1e-6)
        assert row.attributed.n == row.measured.n == 30 and row.predicted.n == 60
        assert row.curvature is None
    assert report.attributed.mean == pytest.approx(sum(r.attributed.mean for r in report.layers))
    total = report.attributed.mean + report.residual.mean
    assert total == pytest.approx(report.measured.mean, abs=1e-5)
    chosen_on = jr.attribute(graph, params, model.plan, batches[:2], loss, ranges, points=2)
    expected = sum(chosen_on.layers.values()).mean()
    assert report.predicted_secant.mean == pytest.approx(expected, abs=1e-6)


def test_a_full_report_is_printed_and_saved_whole(full):
    _, report = full
    saved = json.loads(json.dumps(report.to_dict()))
    assert [c["kind"] for c in saved["controls"]][:2] == ["this plan", "rounding"]
    assert set(saved["controls"][0]) == {
        "name",
        "kind",
        "size_bits",
        "test",
        "verdict",
        "accuracy_difference",
        "note",
    }
    assert saved["controls"][0]["test"]["mean"] == pytest.approx(report.test.mean, abs=1e-5)
    assert [set(p) for p in saved["curve"]] == [{"examples", "predicted", "sign_agreement"}] * 2
    assert saved["lossless"] is None
    console = Console(record=True, width=120)
    jr.print_report(report, console)
    text = console.export_text()
    assert max(len(line.rstrip()) for line in text.splitlines()) <= 120
    assert f"bound of the drop {100 * report.accuracy.drop_upper:.2f}" in " ".join(text.split())
    assert all(f"{name} {lower:+.5f}" in text for name, (lower, _) in report.test.bounds.items())
    for interval in (report.predicted_secant, report.attributed, report.residual):
        assert f"{interval.mean:+.5f}" in text
    for control in report.controls:
        assert control.name in text and control.note[:60] in " ".join(text.split())
    assert "With fewer selection examples" in text


def test_dependent_examples_are_counted_as_groups(job):
    graph, params, batches, ranges, scores = job
    twice = [tuple(np.repeat(each, 2, axis=0) for each in batch) for batch in batches]
    model = jr.quantize(graph, params, jr.uniform(scores.table, "int4"), ranges)
    once = jr.verify(graph, params, model, batches, loss, ranges=ranges)
    report = jr.verify(
        graph, params, model, twice, loss,
        ranges=ranges, scores=scores, selection=batches[:2],
        groups=np.repeat(np.arange(90), 2), selection_groups=np.arange(60) // 2,
    )  # fmt: skip
    assert report.test.groups == report.accuracy.groups == 90
    assert report.test.upper_bound == pytest.approx(once.test.upper_bound, abs=1e-6)
    assert report.attributed.upper == pytest.approx(once.attributed.upper, abs=1e-6)
    assert report.residual.groups == report.layers[0].measured.groups == 90
    assert all(control.test.groups == 90 for control in report.controls)
    selected = (report.predicted, report.predicted_secant, report.layers[0].predicted)
    assert [each.groups for each in selected] == [30] * 3
    assert report.curve[-1].predicted.groups == 30


def test_what_is_not_asked_for_is_not_run(job):
    graph, params, batches, ranges, scores = job
    model = jr.quantize(graph, params, jr.uniform(scores.table, "int8"), ranges)
    report = jr.verify(
        graph, params, model, batches, loss, ranges=ranges, layers=False, attributed=False
    )
    assert report.attributed is report.residual is report.predicted is None
    assert report.controls == () == report.curve
    assert all(row.attributed is row.measured is None for row in report.layers)


def test_a_float_plan_changes_nothing(job):
    graph, params, batches, ranges, scores = job
    model = jr.quantize(graph, params, jr.uniform(scores.table, "float"), ranges)
    report = jr.verify(graph, params, model, batches, loss, ranges=ranges, scores=scores)
    assert report.measured.mean == 0 and report.planned_sites == 0
    assert report.attributed is None and report.predicted.mean == 0
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
    with pytest.raises(EvaluationError, match=r"groups: groups has shape \(5,\); expected \(90,\)"):
        jr.verify(graph, params, model, batches, loss, groups=np.arange(5))
    x, y = batches[0]
    with pytest.raises(ScoreError, match="label 7 of example 4 is outside"):
        wrong = y.copy()
        wrong[4] = 7
        measure(graph, model, [(x, wrong)], loss)
    with pytest.raises(EvaluationError, match="the loss of example 0 is nan"):
        measure(graph, model, [(x, y)], lambda o, t: loss(o, t) * jnp.nan)
