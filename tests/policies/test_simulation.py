"""One compiled simulation for every plan."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import loss
from stages import TARGETS, calibrated, table_of, traced, unreached

import jaxrmils as jr
from jaxrmils.policies import PlanError, Simulator
from jaxrmils.policies import simulation as policy_simulation
from jaxrmils.sensitivity import ScoreError


def simulated(name, batches=None):
    graph, params, inputs = traced(name)
    return Simulator(graph, loss).on(params, calibrated(name), batches or [(inputs, TARGETS)])


@pytest.mark.parametrize("name", ["scanned_stack", "nnx_transformer"])
def test_changes_and_shares_are_those_of_the_plan_alone(name):
    graph, params, inputs = traced(name)
    simulation, ranges = simulated(name), calibrated(name)
    first = next(iter(graph.layers))
    plan = jr.uniform(table_of(name), "w4a8", skip=[*unreached(name), first])
    expected = jr.attribute(graph, params, plan, [(inputs, TARGETS)], loss, ranges)
    found = simulation.attribute(plan)
    scale = np.abs(expected.quantized_loss).max()
    np.testing.assert_allclose(simulation.change(plan), expected.change, atol=2e-5 * scale)
    assert set(found.layers) == set(expected.layers)
    for layer, share in expected.layers.items():
        np.testing.assert_allclose(found.layers[layer], share, atol=2e-5 * scale)


def test_the_last_results_are_kept_by_what_a_plan_does():
    simulation, table = simulated("plain"), table_of("plain")
    plans = [jr.uniform(table, name) for name in ("w8a8", "w4a8")]
    again = dataclasses.replace(plans[0], layers=dict(reversed(plans[0].layers.items())))
    again = dataclasses.replace(again, policy={"name": "another"})
    for look in (simulation.attribute, simulation.change, simulation.holding(["w8a8d"]).change):
        found = [look(plan) for plan in plans]
        assert look(again) is found[0] and look(plans[1]) is found[1]
        assert found[0] is not found[1]
    with pytest.raises(ValueError, match="read-only"):
        simulation.change(plans[0])[0] = 0.0


def test_what_is_kept_is_limited_in_bytes(monkeypatch):
    table = table_of("plain")
    plans = [jr.uniform(table, name) for name in ("w8a8", "w4a8", "w4a4", "w8")]
    one = simulated("plain").attribute(plans[0])
    arrays = [*one.layers.values(), one.float_loss, one.quantized_loss]
    size = sum(array.nbytes for array in arrays)
    monkeypatch.setattr(policy_simulation, "ATTRIBUTIONS_BYTES", 3 * size)
    monkeypatch.setattr(policy_simulation, "CHANGES_BYTES", 2 * one.float_loss.nbytes)
    simulation = simulated("plain")
    attributed = [simulation.attribute(plan) for plan in plans]
    for number in (3, 2, 1):
        assert simulation.attribute(plans[number]) is attributed[number]
    again = simulation.attribute(plans[0])  # The oldest, so that it had to go.
    assert again is not attributed[0]
    np.testing.assert_array_equal(again.change, attributed[0].change)
    assert simulation.attribute(plans[3]) is not attributed[3]  # Not looked at for the longest.
    changes = [simulation.change(plan) for plan in plans[:3]]
    assert simulation.change(plans[1]) is changes[1]
    assert simulation.change(plans[0]) is not changes[0]
    # The last result is kept, however large.
    monkeypatch.setattr(policy_simulation, "ATTRIBUTIONS_BYTES", 1)
    simulation = simulated("plain")
    last = simulation.attribute(plans[0])
    assert simulation.attribute(plans[0]) is last
    simulation.attribute(plans[1])
    assert simulation.attribute(plans[0]) is not last


def test_in_bfloat16_it_is_the_integer_model_that_is_simulated():
    keys = jax.random.split(jax.random.key(0), 5)
    params = [jax.random.normal(key, (64, 64), jnp.bfloat16) / 8 for key in keys]
    x = jax.random.normal(jax.random.key(1), (256, 64), jnp.bfloat16)

    def apply(params, x):
        for w in params:
            x = jax.nn.relu(x @ w)
        return x

    def squares(outputs, targets):
        return jnp.sum((outputs.astype(jnp.float32) - targets) ** 2, axis=-1)

    y = apply(params, x).astype(jnp.float32) + jax.random.normal(keys[0], x.shape)
    graph = jr.trace(apply, params, x[:2])
    ranges = jr.calibrate(graph, params, [x])
    plan = jr.uniform(jr.tabulate(graph), "int8")
    found = Simulator(graph, squares).on(params, ranges, [(x, y)]).change(plan)
    model = jr.quantize(graph, params, plan, ranges)
    measured = squares(model(x), y) - squares(apply(params, x), y)
    assert np.corrcoef(found, measured)[0, 1] > 0.98


def test_a_loss_that_is_a_mean_is_refused():
    graph, params, inputs = traced("plain")
    mean = Simulator(graph, lambda outputs, targets: loss(outputs, targets).mean())
    with pytest.raises(ScoreError, match="one value for every"):
        mean.on(params, calibrated("plain"), [(inputs, TARGETS)]).float_loss  # noqa: B018


def test_a_short_last_batch_changes_nothing():
    _, _, inputs = traced("plain")
    plan = jr.uniform(table_of("plain"), "int4")
    whole = simulated("plain")
    parts = simulated("plain", [(inputs[:3], TARGETS[:3]), (inputs[3:], TARGETS[3:])])
    np.testing.assert_allclose(parts.change(plan), whole.change(plan), atol=1e-6)
    np.testing.assert_allclose(
        sum(parts.attribute(plan).layers.values()),
        sum(whole.attribute(plan).layers.values()),
        atol=1e-6,
    )


def test_plans_and_parameters_are_data():
    graph, params, inputs = traced("plain")
    simulator, ranges, batches = Simulator(graph, loss), calibrated("plain"), [(inputs, TARGETS)]
    simulation = simulator.on(params, ranges, batches)
    for format_ in ("int8", "int4", "w4a8"):
        simulation.change(jr.uniform(table_of("plain"), format_))
    other = params | {"right": -params["right"]}
    simulator.on(other, ranges, batches).change(jr.uniform(table_of("plain"), "int8"))
    assert simulator.losses._cache_size() == 1


def test_bad_input_is_refused():
    graph, params, inputs = traced("plain")
    simulator = Simulator(graph, loss)
    with pytest.raises(PlanError, match="another model"):
        simulator.on(params, calibrated("experts"), [(inputs, TARGETS)])
    with pytest.raises(ScoreError, match="no batches"):
        simulator.on(params, calibrated("plain"), [])
    with pytest.raises(ScoreError, match="shape"):
        simulator.on(params, calibrated("plain"), [(inputs, TARGETS[:2])])
    nan = lambda outputs, targets: loss(outputs, targets) * jnp.nan  # noqa: E731
    broken = Simulator(graph, nan).on(params, calibrated("plain"), [(inputs, TARGETS)])
    with pytest.raises(ScoreError, match="the loss of example 0 is nan"):
        broken.change(jr.uniform(table_of("plain"), "int8"))


def test_a_site_without_a_range_is_named():
    name = "cond_data"
    graph, params, inputs = traced(name)
    one = inputs[:1]
    ranges = jr.calibrate(graph, params, [one])
    assert set(ranges.grids) < {s.name for s in graph.sites}
    simulation = Simulator(graph, loss).on(params, ranges, [(inputs, TARGETS)])
    with pytest.raises(PlanError, match="no calibration example reached it"):
        simulation.change(jr.uniform(table_of(name), "int8"))
