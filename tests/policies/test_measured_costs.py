"""Costs that take a pass of their own: options, sums over layers, and the measured reference."""

import functools
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from models import loss
from stages import TARGETS, calibrated, table_of, traced, unreached

import jaxrmils as jr
from jaxrmils.evaluation.simulate import SimulatedModel
from jaxrmils.policies import LayerPlan, Plan, PlanError, Simulator, cost_programs
from jaxrmils.policies.measured_costs import (
    MEASURED_COSTS,
    hessian_trace_costs,
    measured_costs,
    sqnr_costs,
    squared_output_costs,
)
from jaxrmils.policies.plan import FLOAT_LAYER, check_plan
from jaxrmils.sensitivity import ScoreError, weight_noise
from jaxrmils.sensitivity.fisher_diagonal import fisher_diagonal
from jaxrmils.sensitivity.hessian_trace import hessian_traces
from jaxrmils.sensitivity.output_noise import NEAREST, operand_power, output_power, squared_output

FORMATS = ("w8a8", "w4a8", "w4a4", "w4")
BITS = ((8, 8), (4, 8), (4, 4), (4, 32))


@functools.cache
def costs_of(objective, name, formats=FORMATS):
    graph, params, inputs = traced(name)
    data = [(inputs, TARGETS)]
    return MEASURED_COSTS[objective](graph, params, data, loss, calibrated(name), formats=formats)


def by_format(costs, layer):
    return {option.format: cost for option, cost in costs.options[layer].items()}


@pytest.mark.parametrize("objective", MEASURED_COSTS)
@pytest.mark.parametrize("name", ["scanned_stack", "tied_embedding", "cond_data"])
def test_the_table_holds_every_option_that_a_plan_may_have(objective, name):
    graph = traced(name)[0]
    costs = costs_of(objective, name)
    assert costs.objective == objective
    assert list(costs.options) == list(graph.layers)
    for layer, options in costs.options.items():
        assert options[FLOAT_LAYER] == 0
        assert all(isinstance(c, float) and np.isfinite(c) for c in options.values())
        for option in options:
            layers = {**dict.fromkeys(graph.layers, FLOAT_LAYER), layer: option}
            check_plan(Plan(layers, graph.fingerprint), table_of(name))
            if layer in unreached(name):
                assert not option.rounding
    if objective != "measured":
        assert min(c for options in costs.options.values() for c in options.values()) == 0


def test_lookups_and_products_of_activations_have_options_of_their_own():
    assert set(by_format(costs_of("squared_output", "tied_embedding"), "Dense_0/kernel")) == {
        "float",
        *FORMATS,
    }
    product = by_format(costs_of("squared_output", "experts"), "dot_0")
    assert set(product) == {"float", "a8", "a4"}
    assert product["a4"] > product["a8"] > 0


def test_squared_outputs_and_ratios_are_summed_over_a_layers_sites():
    """The embedding's lookup and its output product; and the layers of a stack."""
    for name, layer in (
        ("tied_embedding", "Embed_0/embedding"),
        ("scanned_stack", "layers/Dense_0/kernel"),
    ):
        graph, params, inputs = traced(name)
        ranges, sites = calibrated(name), table_of(name).layer[layer].sites
        squares = squared_output(graph, params, inputs, TARGETS, loss, ranges, BITS)
        expected = sum(np.mean(squares[site], axis=0) for site in sites)
        found = by_format(costs_of("squared_output", name), layer)
        np.testing.assert_allclose([found[f] for f in FORMATS], expected, rtol=1e-4)
        ratio = np.zeros(len(BITS))
        for site, (noise, signal) in output_power(graph, params, inputs, ranges, BITS).items():
            if site in sites:
                each = np.mean(noise, axis=0) / np.mean(signal, axis=0)[..., None]
                ratio += each.reshape(-1, len(BITS)).sum(axis=0)
        found = by_format(costs_of("sqnr", name), layer)
        np.testing.assert_allclose([found[f] for f in FORMATS], ratio, rtol=1e-4)


def test_hessian_costs_are_average_eigenvalues_times_noise():
    name, layer = "scanned_stack", "layers/Dense_0/kernel"
    graph, params, inputs = traced(name)
    traces = hessian_traces(graph, params, [(inputs, TARGETS)], loss)
    deltas = np.asarray(weight_noise(graph, params, NEAREST)[layer][1], np.float64)
    weight = sum(
        max(trace, 0) / 64 * np.sum(delta**2) / 2
        for trace, delta in zip(traces.weights[layer], deltas, strict=True)
    )
    powers = np.mean(operand_power(graph, params, inputs, calibrated(name))[layer], axis=0)
    operand = sum(
        max(trace, 0) / 8 * power / 2
        for trace, power in zip(traces.activations[layer][0], powers[:, 0, 0], strict=True)
    )
    assert min(weight, operand) > 0
    found = by_format(costs_of("hessian_trace", name), layer)
    np.testing.assert_allclose(found["w4"], weight, rtol=1e-5)
    np.testing.assert_allclose(found["w4a8"], weight + operand, rtol=1e-5)
    alone = hessian_trace_costs(
        graph,
        params,
        [(inputs, TARGETS)],
        loss,
        calibrated(name),
        formats=FORMATS,
        activations=False,
    )
    assert by_format(alone, layer)["w4a4"] == by_format(alone, layer)["w4"] == found["w4"]


def test_fisher_costs_are_half_the_squares_of_the_weight_and_its_operands():
    graph, params, inputs = traced("plain")
    weights, operands = fisher_diagonal(graph, params, inputs, TARGETS, loss, calibrated("plain"))
    found = by_format(costs_of("fisher", "plain"), "left")
    weight, operand = np.mean(weights["left"], axis=0), np.mean(operands["left"][:, 0], axis=0)
    expected = [weight[0] + operand[0], weight[1] + operand[0], weight[1] + operand[1], weight[1]]
    np.testing.assert_allclose([2 * found[f] for f in FORMATS], expected, rtol=1e-5)


def test_negative_curvature_costs_nothing():
    graph, params, inputs = traced("plain")
    hill = lambda outputs, targets: -jnp.sum(outputs**2, axis=-1)  # noqa: E731
    data = (graph, params, [(inputs, TARGETS)], hill)
    assert hessian_traces(*data, activations=False).weights["einsum/1"] < 0
    costs = hessian_trace_costs(*data, calibrated("plain"))
    assert set(by_format(costs, "einsum/1").values()) == {0.0}


@pytest.mark.parametrize("name", ["scanned_stack", "tied_embedding"])
def test_measured_costs_are_those_of_the_simulated_model(name):
    graph, params, inputs = traced(name)
    model, batches = SimulatedModel(graph, params, calibrated(name), loss), [(inputs, TARGETS)]
    base = model.run(batches).loss.mean(dtype=np.float64)
    for layer, options in costs_of("measured", name).options.items():
        for option, cost in options.items():
            layers = {**dict.fromkeys(graph.layers, FLOAT_LAYER), layer: option}
            run = model.run(batches, Plan(layers, graph.fingerprint))
            np.testing.assert_allclose(cost, run.loss.mean(dtype=np.float64) - base, atol=1e-6)


def test_measuring_shows_its_progress_and_compiles_once():
    graph, params, inputs = traced("plain")
    seen, simulator = [], Simulator(graph, loss)

    def progress(items, description, total):
        seen.append(total)
        return items

    data = (graph, params, [(inputs, TARGETS)], loss, calibrated("plain"))
    formats = ("w8a8", "w8a8d", "w4a8d", "w4g32")
    costs = measured_costs(*data, formats=formats, simulator=simulator, progress=progress)
    assert seen[-1] == 4 * len(costs.options)
    assert simulator.losses._cache_size() == 1
    with pytest.raises(ScoreError, match="another graph or loss"):
        measured_costs(*data, simulator=Simulator(graph, lambda o, t: loss(o, t)))


@pytest.mark.parametrize("objective", ["squared_output", "fisher", "sqnr"])
def test_a_short_last_batch_counts_its_own_examples_alone(objective):
    graph, params, inputs = traced("plain")
    batches = [(inputs[:3], TARGETS[:3]), (inputs[3:], TARGETS[3:])]
    found = MEASURED_COSTS[objective](
        graph, params, batches, loss, calibrated("plain"), formats=FORMATS
    )
    for layer, values in costs_of(objective, "plain").options.items():
        np.testing.assert_allclose(
            list(found.options[layer].values()), list(values.values()), rtol=1e-4
        )


def test_parameters_are_data():
    graph, params, inputs = traced("plain")
    data, ranges = [(inputs, TARGETS)], calibrated("plain")
    costs_of("squared_output", "plain")
    compiled: Any = cost_programs.squared_output
    before = compiled._cache_size()
    other = params | {"right": -params["right"]}
    changed = squared_output_costs(graph, other, data, loss, ranges, formats=FORMATS)
    assert compiled._cache_size() == before
    assert changed.options["left"] != costs_of("squared_output", "plain").options["left"]


def test_ratios_read_no_labels():
    graph, params, inputs = traced("plain")
    found = sqnr_costs(graph, params, [(inputs, None)], calibrated("plain"), formats=FORMATS)
    assert found.options == costs_of("sqnr", "plain").options


def test_noise_on_silence_is_refused_with_the_sites_name():
    graph = jr.trace(lambda p, x: x @ p["w"], {"w": jnp.ones((3, 2))}, jnp.ones((2, 3)))
    x, params = jnp.array([[0.5, 0.3125, -0.8125]]), {"w": jnp.ones((3, 2))}
    ranges = jr.calibrate(graph, params, [jnp.array([[1.0, -0.8, 0.2], [0.1, 0.2, 0.3]])])
    with pytest.raises(ScoreError, match="site w is zero"):
        sqnr_costs(graph, params, [(x, None)], ranges)


@pytest.mark.parametrize("objective", ["squared_output", "fisher"])
def test_a_value_that_is_not_finite_names_its_site(objective):
    graph, params, inputs = traced("plain")
    nan = lambda outputs, targets: loss(outputs, targets) * jnp.inf  # noqa: E731
    with pytest.raises(ScoreError, match=r"batch 0: the .* (right|left|einsum/0) is NaN"):
        MEASURED_COSTS[objective](graph, params, [(inputs, TARGETS)], nan, calibrated("plain"))


@pytest.mark.parametrize("objective", MEASURED_COSTS)
def test_bad_input_is_refused(objective):
    graph, params, inputs = traced("plain")
    cost, ranges, data = MEASURED_COSTS[objective], calibrated("plain"), [(inputs, TARGETS)]
    with pytest.raises(ScoreError, match="another model"):
        cost(graph, params, data, loss, calibrated("experts"))
    with pytest.raises(PlanError, match="unknown format 'w9'"):
        cost(graph, params, data, loss, ranges, formats=("w9",))
    for formats in ((), "w8a8"):
        with pytest.raises(PlanError, match="expected some"):
            cost(graph, params, data, loss, ranges, formats=formats)
    with pytest.raises(ScoreError, match="holds no"):
        cost(graph, params, [], loss, ranges)


@pytest.mark.parametrize("objective", MEASURED_COSTS)
def test_a_model_without_sites_has_an_empty_table(objective):
    params, x = {"w": jnp.ones(3)}, jnp.ones((4, 3))
    graph = jr.trace(lambda p, x: x * p["w"], params, x)
    ranges = jr.calibrate(graph, params, [x])
    assert not MEASURED_COSTS[objective](graph, params, [(x, TARGETS)], loss, ranges).options


def test_hessian_costs_need_data_that_can_be_read_twice():
    graph, params, inputs = traced("plain")
    once = iter([(inputs, TARGETS)])
    with pytest.raises(ScoreError, match="one-shot iterator"):
        hessian_trace_costs(graph, params, once, loss, calibrated("plain"))


def test_a_total_is_the_sum_of_a_plans_layers():
    costs = costs_of("squared_output", "plain")
    plan = jr.uniform(table_of("plain"), "w4a8")
    expected = sum(by_format(costs, layer)["w4a8"] for layer in plan.layers)
    assert costs.total(plan.layers) == pytest.approx(expected)
    assert costs.total(dict.fromkeys(plan.layers, LayerPlan())) == 0
