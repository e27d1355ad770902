"""Budgets from moments are those from the scores that the moments were taken of."""

import dataclasses

import invented
import numpy as np
import pytest
from stages import scored, traced

import jaxrmils as jr
from jaxrmils.policies import PlanError, layer_options, plan_interval, tangent_costs
from jaxrmils.policies.tangents import mean_loss
from jaxrmils.sensitivity.moments import moments_of

TABLE = invented.chain(24, 40, 7, 12, 30)
SCORES = invented.scores(TABLE, examples=60, shared=0.7)
MOMENTS = moments_of(SCORES)
OBJECTIVES = ("signed", "upper_bound", "squared", "joint_upper_bound")


@pytest.mark.parametrize("name", ["plain", "scanned_stack"])
@pytest.mark.parametrize("objective", OBJECTIVES[:3])
def test_costs_of_real_models(name, objective):
    scores = scored(name)
    moments = moments_of(scores)
    formats = ("w8a8", "w4a4", "w4")
    options = layer_options(scores, formats, "directed")
    assert layer_options(moments, formats, "directed") == options
    expected = tangent_costs(scores, objective, options).options
    found = tangent_costs(moments, objective, options).options
    for layer, own in expected.items():
        assert found[layer] == pytest.approx(own, rel=1e-5, abs=1e-7)
    assert mean_loss(moments) == pytest.approx(mean_loss(scores), rel=1e-6)


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("rounding", ["nearest", "directed"])
def test_plans_and_predictions(objective, rounding):
    settings = {"objective": objective, "rounding": rounding}
    budgets = [jr.Limits(size_share=share) for share in (0.3, 0.45, 0.7)]
    exact = jr.pareto(SCORES, budgets, **settings)
    kept = jr.pareto(MOMENTS, budgets, **settings)
    for a, b in zip(exact, kept, strict=True):
        assert a.plan.layers == b.plan.layers and not a.plan.is_float
        for part in ("change", "standard_error", "lower", "upper", "cost"):
            assert getattr(b, part) == pytest.approx(getattr(a, part), rel=1e-5, abs=1e-9)
        assert a.plan.policy.keys() == b.plan.policy.keys()
    if objective == "joint_upper_bound":
        joint = [p.plan.policy["joint"] for p in (exact[0], kept[0])]
        assert joint[1] == pytest.approx(joint[0], rel=1e-5)
    picks = [jr.recommend(points, margin=0.1) for points in (exact, kept)]
    assert picks[0].quality.index == picks[1].quality.index


def test_covariance_between_layers_counts():
    plan = jr.budget(MOMENTS, jr.Limits(size_share=0.3), objective="signed")
    together = plan_interval(MOMENTS, plan).standard_error
    alone = [
        plan_interval(MOMENTS, dataclasses.replace(plan, layers={**floats(plan), n: layer}))
        for n, layer in plan.layers.items()
    ]
    independent = np.sqrt(sum(each.standard_error**2 for each in alone))
    assert together > 1.2 * independent


def floats(plan):
    return dict.fromkeys(plan.layers, jr.LayerPlan())


def test_what_needs_single_examples_says_so():
    limits = jr.Limits(size_share=0.3)
    with pytest.raises(PlanError, match="clusters need single examples"):
        jr.budget(MOMENTS, limits, clusters=np.arange(60) // 2)
    plan = jr.budget(MOMENTS, limits)
    with pytest.raises(TypeError, match="moments hold no single examples"):
        jr.predict(MOMENTS, plan)
    with pytest.raises(TypeError, match="moments hold no single examples"):
        jr.rmils(traced("plain")[0], moments_of(scored("plain")), mu=0.1)
    with pytest.raises(AttributeError, match="no attribute 'lossy'"):
        _ = MOMENTS.lossy
    scored_in_w8 = dataclasses.replace(MOMENTS, weight_candidates=MOMENTS.weight_candidates[:1])
    with pytest.raises(PlanError, match="weight_candidates with int4 nearest: `candidates_for`"):
        jr.budget(scored_in_w8, limits)
    with pytest.raises(
        PlanError, match="w8a8d was not scored; score it with activation_candidates"
    ):
        jr.budget(MOMENTS, limits, formats=("w8a8d",))
