"""Sweeps of budgets."""

import itertools

import invented
import pytest

from jaxrmils.policies import PlanError
from jaxrmils.policies.budget import InfeasibleBudgetError, LatencyTable, Limits, budget, usage
from jaxrmils.policies.pareto import pareto

TABLE = invented.chain(24, 40, 7, 12, 30)
SCORES = invented.scores(TABLE)
SQUARED = {"objective": "squared", "formats": ("w8a8", "w4a8", "w4a4")}


def test_every_point_is_the_plan_of_its_budget():
    budgets = [Limits(size_share=s, bops_share=b) for s, b in ((0.4, 0.1), (0.6, 0.04))]
    points = pareto(SCORES, budgets, **SQUARED)
    for limits, point in zip(budgets, points, strict=True):
        plan = budget(SCORES, limits, **SQUARED)
        assert point.plan == plan and point.limits == limits
        predicted = plan.policy["predicted"]
        assert point.change == predicted["mean"]
        assert point.standard_error == predicted["standard_error"]
        assert point.lower < point.change < point.upper
        used = usage(TABLE, plan.layers)
        for name in ("size_bytes", "size_share", "weight_bits", "activation_bits", "bops"):
            assert getattr(point, name) == used[name]
        assert point.latency is None and point.cost == plan.policy["cost"]


def test_evenly_spaced_from_the_smallest_to_what_no_limit_would_choose():
    points = pareto(SCORES, 7, **SQUARED)
    asked = [point.limits.size_share for point in points]
    steps = [b - a for a, b in itertools.pairwise(asked)]
    assert steps == pytest.approx([steps[0]] * 6)
    assert points[0].plan.counts().keys() <= {"w4a8", "w4a4"}
    assert points[-1].plan.is_float and points[-1].size_share == 1
    assert all(p.size_share <= share + 1e-12 for p, share in zip(points, asked, strict=True))
    costs = [point.cost for point in points]
    assert costs == sorted(costs, reverse=True) and costs[0] > costs[-1] == 0


@pytest.mark.parametrize("along", ["weight_bits", "activation_bits", "bops", "size_bytes"])
def test_along_other_limits(along):
    points = pareto(SCORES, 4, along=along, **SQUARED)
    costs = [point.cost for point in points]
    assert costs == sorted(costs, reverse=True) and costs[0] > costs[-1]
    assert len({str(point.plan.layers) for point in points}) > 2


def test_latency_and_kept_limits():
    times = {n: {"float": 4.0, "w8a8": 2.0, "w4a8": 3.0, "w4a4": 1.0} for n in "abcde"}
    latency = LatencyTable(times, "cpu", "invented")
    kept = Limits(latency=12.0)
    points = pareto(SCORES, 5, kept=kept, latency=latency, **SQUARED)
    assert all(point.latency <= 12.0 and point.limits.latency == 12.0 for point in points)
    free = pareto(SCORES, 5, latency=latency, **SQUARED)
    assert free[-1].latency == 20.0


def test_the_joint_bound_sweeps_too():
    points = pareto(SCORES, 3, objective="joint_upper_bound", formats=("w8a8",))
    assert [point.plan.policy["objective"] for point in points] == ["joint_upper_bound"] * 3


def test_one_point_is_the_smallest():
    (point,) = pareto(SCORES, 1, **SQUARED)
    assert point.weight_bits == 4


def test_refusals():
    with pytest.raises(PlanError, match="there are no budgets"):
        pareto(SCORES, [])
    with pytest.raises(PlanError, match="0 points along 'size_share'"):
        pareto(SCORES, 0)
    with pytest.raises(PlanError, match="along 'size'"):
        pareto(SCORES, 3, along="size")
    with pytest.raises(PlanError, match="keeping"):
        pareto(SCORES, 3, kept=Limits(size_share=0.5))
    with pytest.raises(PlanError, match="write it into each"):
        pareto(SCORES, [Limits()], kept=Limits(size_share=0.5))
    with pytest.raises(InfeasibleBudgetError, match="can't go below"):
        pareto(SCORES, [Limits(size_share=0.9), Limits(size_share=0.01)])
    with pytest.raises(InfeasibleBudgetError):
        pareto(SCORES, 3, kept=Limits(activation_bits=1))
