"""Controls against plans, shifts and temperatures that are run by hand."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import loss as any_loss
from stages import TARGETS, calibrated, float64, traced, unreached

import jaxrmils as jr
from jaxrmils.evaluation import EvaluationError, controls, measure, simulate
from jaxrmils.evaluation.constant_shift import mean_noise, shifted_apply
from jaxrmils.evaluation.controls import explanations, naive_plan, rounding_plans
from jaxrmils.numerics import fake_quant
from jaxrmils.policies import PlanError
from jaxrmils.sensitivity import weight_noise
from jaxrmils.statistics import noninferiority

ROUNDINGS = ["all nearest", "all floor", "all ceil", "flipped directions", "random directions"]


def loss(outputs, targets):
    return -jnp.take_along_axis(jax.nn.log_softmax(outputs), targets[:, None], axis=1)[:, 0]


def apply(params, x):
    y = jax.nn.relu(x @ params["a"])
    return jnp.tanh(y @ params["b"]) @ params["c"]


@pytest.fixture(scope="module")
def job():
    """A model that is right about most labels and too sure of itself."""
    keys = jax.random.split(jax.random.key(0), 6)
    params = {
        "a": jax.random.normal(keys[0], (6, 16)),
        "b": jax.random.normal(keys[1], (16, 16)),
        "c": jax.random.normal(keys[2], (16, 5)),
    }
    x = np.asarray(jax.random.normal(keys[3], (150, 6)))
    flat = apply(params, x) / 4 + jax.random.gumbel(keys[4], (150, 5))
    y = np.asarray(jnp.argmax(flat, axis=1), np.int32)
    batches = [(x[i : i + 30], y[i : i + 30]) for i in range(0, 150, 30)]
    graph = jr.trace(apply, params, x[:2])
    ranges = jr.calibrate(graph, params, [x[:30]])
    scores = jr.score(graph, params, batches[:2], loss, ranges)
    return graph, params, ranges, scores, batches[:2], batches[2:]


@pytest.fixture(scope="module")
def run(job):
    graph, params, ranges, scores, selection, held_out = job
    plan = jr.rmils(graph, scores, mu=0.0)
    found = controls(
        graph, params, plan, held_out, loss, ranges, fit_batches=selection, margin=0.01
    )
    return plan, {control.name: control for control in found}


def change(graph, params, held_out, apply_other):
    before = measure(graph, lambda x: graph.apply(params, x), held_out, loss)
    return measure(graph, apply_other, held_out, loss).loss - before.loss


def test_the_plan_comes_first_and_all_that_apply_follow(run):
    names = list(run[1])
    assert names[0] == "this plan"
    assert names[1:] == [
        *ROUNDINGS,
        "float + same constant shift",
        "float + temperature",
        "this plan + its own temperature",
        "uniform int8",
        "uniform int4",
        "naive at equal size",
    ]


def test_roundings_and_uniform_plans_are_the_integer_models(job, run):
    graph, params, ranges, scores, _, held_out = job
    plan, found = run
    plans = {"this plan": plan, **rounding_plans(plan)}
    plans["uniform int8"] = jr.uniform(scores.table, "int8")
    plans["uniform int4"] = jr.uniform(scores.table, "int4")
    for name, each in plans.items():
        model = jr.quantize(graph, params, each, ranges)
        values = change(graph, params, held_out, model)
        expected = noninferiority(values, margin=0.01)
        assert found[name].test.mean == pytest.approx(expected.mean, abs=1e-5), name
        assert found[name].test.upper_bound == pytest.approx(expected.upper_bound, abs=1e-5)
        assert found[name].size_bits == model.size_bits
    plans.pop("uniform int4")  # This plan is all in int4: the same as all nearest.
    assert len({found[name].test.mean for name in plans}) == len(plans)


def test_roundings_are_what_they_are_called(run):
    plan = run[0]
    chosen = [r for layer in plan.layers.values() for r in layer.rounding]
    plans = {
        name: [r for layer in other.layers.values() for r in layer.rounding]
        for name, other in rounding_plans(plan).items()
    }
    assert plans["all nearest"] == ["nearest"] * 3 and plans["all ceil"] == ["ceil"] * 3
    pairs = zip(chosen, plans["flipped directions"], strict=True)
    assert all({a, b} == {"floor", "ceil"} for a, b in pairs)
    others = [plans[name] for name in plans if name != "random directions"]
    assert plans["random directions"] not in [chosen, *others]
    assert rounding_plans(plan, 3) == rounding_plans(plan, 3)


def test_the_constant_shift_is_the_mean_noise_of_the_quantized_network(job, run):
    graph, params, ranges, _, selection, held_out = job
    plan, found = run
    quantized = {
        name: params[name]
        + weight_noise(graph, params)[name][0 if plan.layers[name].weight_bits == 8 else 1]
        for name in params
    }
    z, shifts = np.concatenate([x for x, _ in selection]), {}
    for name, activation in (("a", jax.nn.relu), ("b", jnp.tanh), ("c", None)):
        layer = plan.layers[name]
        on_grid = fake_quant(z, ranges.grids[name][0][layer.activation_bits], layer.rounding[0])
        shifts[name] = jnp.mean(on_grid - z)
        z = activation(on_grid @ quantized[name]) if activation else z

    def shifted(x):
        y = jax.nn.relu((x + shifts["a"]) @ params["a"])
        return (jnp.tanh((y + shifts["b"]) @ params["b"]) + shifts["c"]) @ params["c"]

    expected = change(graph, params, held_out, shifted).mean()
    assert abs(expected) > 1e-4
    control = found["float + same constant shift"]
    assert control.test.mean == pytest.approx(expected, abs=1e-5)
    assert control.size_bits == graph_bits(job)


def graph_bits(job):
    return job[3].table.float_bits


def test_every_layer_of_a_stack_has_its_own_shift():
    graph, params, inputs = traced("nnx_stack")
    ranges = calibrated("nnx_stack")
    plan = jr.uniform(jr.tabulate(graph), "int4")
    (site,) = graph.sites
    (found,) = mean_noise(graph, params, plan, [(inputs, TARGETS)], ranges)[site.name]
    kernel, bias = params["layers"]["kernel"], params["layers"]["bias"]
    delta, z, expected = weight_noise(graph, params)[site.name][1], inputs, []
    for i in range(len(kernel)):
        grid = jax.tree.map(lambda a, i=i: a[i], ranges.grids[site.name][0][4])
        on_grid = fake_quant(z, grid)
        expected.append(jnp.mean(on_grid - z))
        z = jnp.tanh(on_grid @ (kernel[i] + delta[i]) + bias[i])
    np.testing.assert_allclose(found, jnp.stack(expected), atol=1e-6)
    z = inputs
    for i in range(len(kernel)):
        z = jnp.tanh((z + 0.1 * i) @ kernel[i] + bias[i])
    shifts = {site.name: (0.1 * jnp.arange(len(kernel), dtype=jnp.float32),)}
    np.testing.assert_allclose(shifted_apply(graph, params, shifts, inputs), z, atol=1e-5)


@pytest.mark.parametrize("name", ["lstm", "cond_data", "experts"])
def test_shifts_run_wherever_plans_do(name):
    graph, params, inputs = traced(name)
    ranges, plan = calibrated(name), jr.uniform(jr.tabulate(graph), "int8")
    shifts = mean_noise(graph, params, plan, [(inputs, TARGETS)], ranges)
    assert all(np.isfinite(v).all() for each in shifts.values() for v in each)
    nothing = jax.tree.map(jnp.zeros_like, shifts)
    outputs = shifted_apply(graph, params, nothing, inputs)
    np.testing.assert_allclose(
        float64(outputs), float64(graph.apply(params, inputs)), rtol=1e-5, atol=1e-5
    )


def test_temperatures_divide_the_logits(job, run):
    graph, params, _, _, selection, held_out = job
    _, found = run
    z, y = (np.concatenate(each) for each in zip(*selection, strict=True))
    logits = apply(params, z)
    grid = np.exp(np.linspace(-3, 3, 2001))
    best = grid[np.argmin([float(loss(logits / np.float32(t), y).mean()) for t in grid])]
    control = found["float + temperature"]
    assert f"T = {best:.1f}" in control.note and best > 1.5
    expected = change(graph, params, held_out, lambda x: apply(params, x) / np.float32(best))
    assert control.test.mean == pytest.approx(expected.mean(), abs=1e-4)
    assert control.accuracy_difference == 0
    cooled = found["this plan + its own temperature"]
    assert cooled.test.mean < found["this plan"].test.mean
    assert cooled.accuracy_difference == found["this plan"].accuracy_difference
    assert "against float at its own" in cooled.note


def test_one_compiled_function_serves_all_plans(job, monkeypatch):
    graph, params, ranges, scores, selection, held_out = job
    count = 0
    original = simulate.perturbed_outputs

    def counted(*args, **kwargs):
        nonlocal count
        count += 1
        return original(*args, **kwargs)

    monkeypatch.setattr(simulate, "perturbed_outputs", counted)
    plan = jr.rmils(graph, scores, mu=0.0)
    controls(graph, params, plan, held_out, loss, ranges, fit_batches=selection, margin=0.01)
    assert count == 1


def test_what_explains_a_gain_is_said(run):
    def with_mean(name, mean):
        control = run[1][name]
        return dataclasses.replace(control, test=dataclasses.replace(control.test, mean=mean))

    plan = with_mean("this plan", -0.01)
    cooled = with_mean("float + temperature", -0.012)
    shifted = with_mean("float + same constant shift", -0.005)
    (sentence,) = explanations([plan, cooled, shifted])
    assert "confidence" in sentence and "0.012" in sentence
    assert explanations([plan, with_mean("float + temperature", -0.009), shifted]) == ()
    assert explanations([with_mean("this plan", 0.01), cooled]) == ()
    (sentence,) = explanations([plan, with_mean("float + same constant shift", -0.01)])
    assert "bias" in sentence


def test_naive_plans_have_the_size_asked_for(job):
    table = job[3].table
    int8 = table.size_bits(jr.uniform(table, "int8").formats())
    w4a8 = table.size_bits(jr.uniform(table, "w4a8").formats())
    formats = lambda size: [p.format for p in naive_plan(table, size).layers.values()]  # noqa: E731
    assert formats(int8) == ["w8a8"] * 3
    assert formats(int8 - 1) == ["w4a8", "w8a8", "w8a8"]
    assert formats(w4a8) == ["w4a8"] * 3 == formats(1)
    first_float = table.size_bits(jr.uniform(table, "int8", skip=["a"]).formats())
    assert formats(first_float) == ["float", "w8a8", "w8a8"]
    assert formats(first_float - 1) == ["w8a8"] * 3
    assert formats(table.float_bits) == ["float"] * 3


def test_controls_that_do_not_apply_are_left_out(job):
    graph, params, ranges, scores, selection, held_out = job

    def names(format, loss=loss):
        plan = jr.uniform(scores.table, format)
        found = controls(
            graph, params, plan, held_out, loss, ranges,
            fit_batches=selection, margin=0.01, compare=(),
        )  # fmt: skip
        return [control.name for control in found], found[0].note

    temperatures = ["float + temperature", "this plan + its own temperature"]
    assert names("w8") == (["this plan", *temperatures, "naive at equal size"], "")
    assert names("float") == (["this plan", "float + temperature"], "")
    hinge = lambda z, y: jnp.maximum(0, 1 - jnp.take_along_axis(z, y[:, None], 1)[:, 0])  # noqa: E731
    assert names("float", hinge)[0] == ["this plan"]
    assert "constant is added to all logits" in names("float", hinge)[1]


def test_a_model_of_two_outputs_has_temperatures():
    keys = jax.random.split(jax.random.key(2), 6)
    params = {name: jax.random.normal(key, (6, 5)) for name, key in zip("ab", keys, strict=False)}
    x = np.asarray(jax.random.normal(keys[2], (120, 6)))
    two = lambda p, x: {"start": x @ p["a"], "end": x @ p["b"]}  # noqa: E731
    y = {  # less sure than the model is
        name: np.asarray(jax.random.categorical(key, z / 3), np.int32)
        for key, (name, z) in zip(keys[3:], two(params, x).items(), strict=False)
    }

    def spans(outputs, targets):
        return loss(outputs["start"], targets["start"]) + loss(outputs["end"], targets["end"])

    batches = [(x[c], {k: v[c] for k, v in y.items()}) for c in (slice(0, 60), slice(60, 120))]
    graph = jr.trace(two, params, x[:2])
    ranges = jr.calibrate(graph, params, [x])
    found = controls(
        graph, params, jr.uniform(jr.tabulate(graph), "int8"), batches[1:], spans, ranges,
        fit_batches=batches[:1], margin=0.01, compare=(),
    )  # fmt: skip
    rows = {control.name: control for control in found}
    assert found[0].note == "" and "this plan + its own temperature" in rows
    grid = np.float32(np.exp(np.linspace(-1, 3, 801)))
    cooled = lambda x, t: jax.tree.map(lambda z: z / t, two(params, x))  # noqa: E731
    best = grid[np.argmin([float(spans(cooled(x[:60], t), batches[0][1]).mean()) for t in grid])]
    row = rows["float + temperature"]
    assert f"T = {best:.1f}" in row.note and "fitted on 60 selection examples" in row.note
    x, y = batches[1]
    expected = (spans(cooled(x, best), y) - spans(two(params, x), y)).mean()
    assert row.test.mean == pytest.approx(float(expected), abs=1e-3) and best > 1.5
    assert row.accuracy_difference is None


def test_a_distance_to_the_float_model_has_the_temperature_1():
    graph, params, inputs = traced("experts")
    unlabelled = jr.with_float_outputs(graph, params, [(inputs, TARGETS)])
    found = controls(
        graph, params, jr.uniform(jr.tabulate(graph), "int4"), unlabelled, jr.label_free("kl"),
        calibrated("experts"), fit_batches=unlabelled, margin=0.01, compare=(),
    )  # fmt: skip
    (row,) = [control for control in found if control.name == "float + temperature"]
    assert abs(row.test.mean) < 1e-6


def test_a_loss_of_no_softmax_has_no_temperature():
    graph, params, inputs = traced("experts")
    plan = jr.uniform(jr.tabulate(graph), "int8")
    batches = [(inputs, TARGETS)]
    found = controls(
        graph, params, plan, batches, any_loss, calibrated("experts"),
        fit_batches=batches, margin=0.01,
    )  # fmt: skip
    assert not any("temperature" in control.name for control in found)
    assert "constant is added" in found[0].note and found[0].accuracy_difference is None
    assert [c.note for c in found if c.name == "uniform int8"] == ["the same as this plan"]


def test_layers_without_a_range_stay_float():
    graph, params, inputs = traced("cond_parameter")
    (unseen,) = unreached("cond_parameter")
    plan = jr.uniform(jr.tabulate(graph), "int8", skip=[unseen])
    batches = [(inputs, TARGETS)]
    found = controls(
        graph, params, plan, batches, any_loss, calibrated("cond_parameter"),
        fit_batches=batches, margin=0.01,
    )  # fmt: skip
    notes = {control.name: control.note for control in found}
    assert notes["uniform int8"] == notes["all nearest"] == "the same as this plan"
    assert all(np.isfinite(control.test.mean) for control in found)


def test_bad_input_is_refused(job):
    graph, params, ranges, scores, selection, _ = job
    plan = jr.uniform(scores.table, "int8")
    other = jr.uniform(jr.tabulate(traced("experts")[0]), "int8")
    with pytest.raises(PlanError, match="another model"):
        controls(graph, params, other, selection, loss, ranges, fit_batches=selection, margin=0.01)
    with pytest.raises(EvaluationError, match="one is empty"):
        controls(graph, params, plan, [], loss, ranges, fit_batches=selection, margin=0.01)


def test_parts_and_controls_of_a_mixture_share_one_program():
    rng = np.random.default_rng(0)
    params = {name: rng.normal(size=(8, 8)).astype(np.float32) for name in "ab"}
    x, targets = rng.normal(size=(4, 8)).astype(np.float32), np.zeros(4, np.float32)
    graph = jr.trace(lambda p, x: jnp.tanh(x @ p["a"]) @ p["b"], params, x)
    ranges = jr.calibrate(graph, params, [x], estimator="minmax")
    plan = jr.uniform(jr.tabulate(graph), "w8a8d", force={"b": "w4g32"})
    narrow = simulate.SimulatedModel(graph, params, ranges, any_loss)
    model = narrow.holding([plan])
    others = [plan.only("a"), plan.only("b"), *rounding_plans(plan).values(), None]
    losses = [model.run([(x, targets)], each).loss for each in (plan, *others)]
    # All nearest is the plan itself, and of a single input random directions are floor or ceil.
    assert len(np.unique(losses, axis=0)) == len(losses) - 2
    assert model._step._cache_size() == 1
    assert model.holding([plan, *others[:-1]]) is model
    narrow.holding([plan]).run([(x, targets)], plan)  # Another one compiles nothing either.
    assert narrow._step._cache_size() == 1
