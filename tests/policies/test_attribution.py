"""A plan's attribution by layer."""

import jax.numpy as jnp
import numpy as np
import pytest
from models import loss
from stages import TARGETS, calibrated, table_of, traced

import jaxrmils as jr
from jaxrmils.policies import PlanAttribution, PlanError, attribute, formats_of
from jaxrmils.sensitivity import Candidate, ScoreError
from jaxrmils.statistics import mean_interval


def test_layers_add_up_to_the_quantized_models_change():
    graph, params, inputs = traced("tied_embedding")
    plan = jr.uniform(table_of("tied_embedding"), "w4a8")
    ranges = calibrated("tied_embedding")
    batches = [(inputs[:2], TARGETS[:2]), (inputs[2:], TARGETS[2:])]
    found = attribute(graph, params, plan, batches, loss, ranges)
    assert set(found.layers) == set(graph.layers)
    model = jr.quantize(graph, params, plan, ranges)
    np.testing.assert_allclose(found.quantized_loss, loss(model(inputs), TARGETS), rtol=1e-4)
    np.testing.assert_allclose(
        found.float_loss, loss(graph.apply(params, inputs), TARGETS), rtol=1e-5
    )
    assert np.abs(found.residual).sum() < 0.01 * np.abs(found.change).sum()


def test_layers_have_intervals():
    share = np.random.default_rng(0).normal(1.0, 2.0, size=400)
    zeros = np.zeros(400)
    found = PlanAttribution({"a": share, "b": zeros}, zeros, share, 2)
    intervals = found.intervals(level=0.9)
    assert intervals["a"] == mean_interval(share, level=0.9)
    assert (intervals["b"].lower, intervals["b"].upper) == (0.0, 0.0)
    grouped = found.intervals(groups=np.repeat(np.arange(40), 10))
    assert grouped["a"].groups == 40


def test_formats_follow_the_plan():
    graph, _, _ = traced("experts")
    plan = jr.uniform(table_of("experts"), "int8")
    formats = formats_of(graph, plan)
    assert set(formats.weights) == set(graph.weights)
    assert all(c == Candidate(8) for row in formats.activations.values() for c in row)
    alone = formats_of(graph, plan.only(next(iter(plan.layers))))
    assert len(alone.weights) <= 1


def test_bad_input_is_refused():
    graph, params, inputs = traced("plain")
    plan, ranges = jr.uniform(table_of("plain"), "int8"), calibrated("plain")
    with pytest.raises(ScoreError, match="no batches"):
        attribute(graph, params, plan, [], loss, ranges)
    with pytest.raises(ScoreError, match="NaN or infinite"):
        nan = lambda outputs, targets: loss(outputs, targets) * jnp.nan  # noqa: E731
        attribute(graph, params, plan, [(inputs, TARGETS)], nan, ranges)
    with pytest.raises(PlanError, match="another model"):
        attribute(graph, params, plan, [(inputs, TARGETS)], loss, calibrated("experts"))
