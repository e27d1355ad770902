"""Many budgets solved from the same scores: what each unit of size, work or time costs.

The points are predictions on the data that chose the plans. Measure the plans on other data before
one is taken; `recommend` picks from measured points as well.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Unpack

from jaxrmils.graph import ModelTable
from jaxrmils.policies.budget.limits import LatencyTable, Limits
from jaxrmils.policies.budget.policy import Problem, Settings, problem
from jaxrmils.policies.budget.resources import usage
from jaxrmils.policies.budget.solve import infeasible
from jaxrmils.policies.formats import PlanError
from jaxrmils.policies.plan import Plan
from jaxrmils.policies.tangents import Tangents
from jaxrmils.statistics import Interval


@dataclass(frozen=True)
class ParetoPoint:
    """One solved budget.

    Attributes:
      limits: what was asked for.
      plan: the plan.
      change: predicted mean change of the loss, to first order.
      standard_error: of that mean, with the covariance between layers.
      lower: end of its two-sided 95 % interval.
      upper: the other end.
      cost: the objective's value, which is what was minimised.
      size_bytes: size of the stored model.
      size_share: the same as a share of the float model's.
      weight_bits: average bits of a weight element; None without weights.
      activation_bits: average bits of an activation element; None without activations.
      bops: bit operations for one example; None without any.
      latency: predicted seconds; None without a latency table.
    """

    limits: Limits
    plan: Plan
    change: float
    standard_error: float
    lower: float
    upper: float
    cost: float
    size_bytes: float
    size_share: float
    weight_bits: float | None
    activation_bits: float | None
    bops: float | None
    latency: float | None


def pareto(
    scores: Tangents,
    budgets: Sequence[Limits] | int = 10,
    *,
    along: str = "size_share",
    kept: Limits | None = None,
    **settings: Unpack[Settings],
) -> tuple[ParetoPoint, ...]:
    """The best plan for each of several budgets. The model is not run.

    Costs and constraints are made once. With an additive objective, which leaves costs alone, the
    cost never rises with the budget; the predicted change may, unless the objective is "signed".

    Args:
      scores: from `score` or `score_moments`, or loaded.
      budgets: the limits of each point; or a number of points, evenly spaced from the smallest use
        that is possible to that of the plan which would be chosen without a limit.
      along: the limit that is varied where a number of points is given: a field of `Limits`.
      kept: limits that all those points keep.
      **settings: objective, formats, groups and so on, as for `budget`.

    Returns:
      A point for every budget, in their order (from the smallest where a number was given).

    Raises:
      InfeasibleBudgetError: a budget has no plan.
      PlanError: no budgets, an unknown limit, or as `budget`.
    """
    prepared = problem(scores, **settings)
    if isinstance(budgets, int):
        budgets = _evenly(prepared, budgets, along, kept or Limits())
    elif kept is not None:
        raise PlanError("kept goes with a number of points; write it into each of the budgets")
    if not budgets:
        raise PlanError("there are no budgets; pass some Limits, or a number of points")
    return tuple(_point(prepared, limits) for limits in budgets)


def _evenly(prepared: Problem, count: int, along: str, kept: Limits) -> tuple[Limits, ...]:
    """Limits from the least that is possible to what the best plan uses."""
    given = kept.given()
    known = [field.name for field in dataclasses.fields(Limits)]
    if along not in known or along in given or count < 1:
        raise PlanError(
            f"{count} points along {along!r}, keeping {sorted(given)}; expected at least one point "
            f"along a limit that is not kept, of {', '.join(known)}"
        )
    lowest = prepared.programme.minimum(along, given)
    free = prepared.programme.minimise(given)
    if lowest is None or free is None:
        raise infeasible(prepared.programme, kept)
    highest = prepared.programme.used(along, free)
    steps = [i / (count - 1) for i in range(count)] if count > 1 else [0.0]
    # max: rounding must not take the first below what is possible.
    values = [max(lowest, lowest + step * (highest - lowest)) for step in steps]
    return tuple(Limits(**{**given, along: value}) for value in values)


def _point(prepared: Problem, limits: Limits) -> ParetoPoint:
    plan, predicted = prepared.solve(limits)
    return point_of(prepared.scores.table, limits, plan, predicted, prepared.rules.latency)


def point_of(
    table: ModelTable,
    limits: Limits,
    plan: Plan,
    predicted: Interval,
    latency: LatencyTable | None = None,
) -> ParetoPoint:
    """A budget's point.

    Args:
      table: the model's.
      limits: what was asked for.
      plan: from `budget` or `refined`.
      predicted: its change, from `plan_interval`.
      latency: to predict seconds.

    Raises:
      PlanError: the latency table lacks a layer or a format.
    """
    used = usage(table, plan.layers, latency)
    return ParetoPoint(
        limits=limits,
        plan=plan,
        change=predicted.mean,
        standard_error=predicted.standard_error,
        lower=predicted.lower,
        upper=predicted.upper,
        cost=plan.policy["cost"],
        size_bytes=used["size_bytes"],
        size_share=used["size_share"],
        weight_bits=used.get("weight_bits"),
        activation_bits=used.get("activation_bits"),
        bops=used.get("bops"),
        latency=used.get("latency"),
    )
