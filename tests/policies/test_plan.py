import dataclasses

import numpy as np
import pytest
import synthetic

from jaxrmils import Plan, predict, tabulate, uniform
from jaxrmils.graph import Format
from jaxrmils.policies import LayerPlan, PlanError, check_plan
from jaxrmils.policies.plan import FLOAT_LAYER
from jaxrmils.sensitivity import Candidate


def table():
    return tabulate(synthetic.setup()[0])


def changed(**layers):
    """A valid plan with other decisions for some layers."""
    plan = uniform(table(), "int8")
    return dataclasses.replace(plan, layers={**plan.layers, **layers})


def test_a_valid_plan_passes():
    check_plan(uniform(table(), "int4"), table())
    check_plan(changed(first=LayerPlan(4, 32, (), "floor")), table())


@pytest.mark.parametrize(
    "layers, message",
    [
        ({"firts": FLOAT_LAYER}, r"unknown layer 'firts'; near matches: \['first'\]"),
        ({"first": LayerPlan(16, 32)}, "layer first: bits 16/32; 32, 8 or 4 expected"),
        ({"first": LayerPlan(8, 2)}, "layer first: bits 8/2"),
        (
            {"first": LayerPlan(8, 8)},
            "layer first: 0 rounding directions for 1 quantized activations",
        ),
        (
            {"first": LayerPlan(8, 32, ("floor",))},
            "layer first: 1 rounding directions for 0 quantized activations",
        ),
        (
            {"dot_0": LayerPlan(32, 8, ("floor",))},
            "layer dot_0: 1 rounding directions for 2 quantized activations",
        ),
        ({"first": LayerPlan(8, 8, ("up",))}, "layer first: rounding 'up'"),
        ({"first": LayerPlan(8, 8, ("stochastic",))}, "layer first: rounding 'stochastic'"),
        ({"first": LayerPlan(8, 32, (), "stochastic")}, "layer first: rounding 'stochastic'"),
        ({"first": LayerPlan(32, 8, ("floor",))}, "layer first: int8 activations need an integer"),
        (
            {"dot_0": LayerPlan(8, 32)},
            "layer dot_0 multiplies two activations and has no weight to quantize",
        ),
    ],
)
def test_what_does_not_fit_is_named(layers, message):
    with pytest.raises(PlanError, match=message):
        check_plan(changed(**layers), table())


def test_a_missing_layer_and_another_model():
    plan = uniform(table(), "int8")
    layers = {n: p for n, p in plan.layers.items() if n != "second"}
    with pytest.raises(PlanError, match=r"no decision for \['second'\]"):
        check_plan(dataclasses.replace(plan, layers=layers), table())
    with pytest.raises(PlanError, match="made for another model"):
        check_plan(dataclasses.replace(plan, fingerprint="0" * 64), table())


def test_formats_counts_and_only():
    plan = changed(first=LayerPlan(4, 8, ("ceil",)), second=FLOAT_LAYER)
    assert plan.formats() == {"first": Format(4, 8), "second": Format(), "dot_0": Format(32, 8)}
    assert plan.counts() == {"w4a8": 1, "float": 1, "a8": 1}
    alone = plan.only("first")
    assert alone.layers["first"] == plan.layers["first"]
    assert alone.layers["dot_0"].is_float and alone.policy["only"] == "first"
    check_plan(alone, table())


def test_predict_adds_weight_and_activations():
    numbers = np.arange(8, dtype=np.float32)
    scores = synthetic.scores(
        activations={(0, 1): numbers, (2, 5): 2 * numbers, (3, 4): -numbers, (1, 0): 100},
        weights={(0, 1): 10 * numbers, (1, 0): 100},
    )
    plan = changed(
        first=LayerPlan(4, 8, ("floor",)),
        second=FLOAT_LAYER,
        dot_0=LayerPlan(32, 4, ("ceil", "floor")),
    )
    found = predict(scores, plan)
    assert found["first"].dtype == np.float64
    np.testing.assert_array_equal(found["first"], 11 * numbers)
    np.testing.assert_array_equal(found["second"], 0)
    np.testing.assert_array_equal(found["dot_0"], numbers)


def test_predict_refuses_what_was_not_scored():
    scores = synthetic.scores()
    plan = changed(first=LayerPlan(8, 32, (), "floor"))
    with pytest.raises(PlanError, match="layer first: the format w8 was not scored"):
        predict(scores, plan)
    fewer = synthetic.without(
        scores,
        activations=scores.activations[:, :, :1],
        activation_candidates=(Candidate(8),),
    )
    with pytest.raises(PlanError, match="layer first: the format w4a4 was not scored"):
        predict(fewer, uniform(table(), "int4"))
    assert predict(fewer, uniform(table(), "w8a8")).keys() == set(synthetic.LAYERS)


def test_predict_refuses_another_models_plan():
    plan = Plan({}, "another")
    with pytest.raises(PlanError, match="another model"):
        predict(synthetic.scores(), plan)
