"""The upper bound of a plan's loss change, with the covariance between layers.

The sum of the layers' own upper bounds counts their errors as if they all erred together. The
plan's own bound is that of the sum of its contributions,

    mean(x) + z sqrt(x' Cov x / n)

which is convex in the choice x. It is minimised by outer approximation (Duran & Grossmann 1986):
for any plan k, by Cauchy-Schwarz, sqrt(x' S x) >= x' S x_k / sqrt(x_k' S x_k), with equality at
x_k. Each round adds this bound at the last plan to the integer programme, whose optimum is then a
lower bound of every plan's; a plan that comes back a second time is optimal.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from jaxrmils.policies.budget.programme import Programme, Solution, highest
from jaxrmils.policies.formats import PlanError

# A plan counts as optimal this close to the lower bound, relative to the bound.
_CLOSE = 1e-4


@dataclass(frozen=True)
class Joint:
    """The result of `minimise_bound`.

    Attributes:
      solution: the best plan found.
      bound: its upper bound.
      start: that of the plan that it started from.
      lower: no plan's bound is lower than this.
      rounds: integer programmes that were solved.
    """

    solution: Solution
    bound: float
    start: float
    lower: float
    rounds: int


def minimise_bound(
    programme: Programme,
    limits: dict[str, float],
    start: Solution,
    means: np.ndarray,
    deviations: np.ndarray,
    z: float,
    *,
    rounds: int = 10,
) -> Joint:
    """The plan of the smallest joint upper bound that a few rounds find.

    Args:
      programme: the allowed plans.
      limits: by name.
      start: a plan within the limits; the result's bound is never higher than its.
      means: float64 [columns], the mean contribution of every option.
      deviations: float64 [rows, columns], D with D'D = Cov / n.
      z: standard errors that are added, above 0.
      rounds: integer programmes to solve, at most.

    Raises:
      PlanError: the solver found nothing in its time.
    """

    def bound(solution: Solution) -> float:
        return float(
            means[solution.columns].sum()
            + z * np.linalg.norm(deviations[:, solution.columns].sum(axis=1))
        )

    best, at, lower, solved = start, start, -math.inf, 0
    cuts: list[np.ndarray] = []
    while solved < rounds:
        solved += 1
        error = deviations[:, at.columns].sum(axis=1)
        norm = float(np.linalg.norm(error))
        if norm > 0:
            cuts.append(deviations.T @ (error / norm))
        found = programme.minimise(limits, means, cuts=cuts, term=z)
        if found is None:
            raise PlanError("the solver lost the plan that it started from; raise the time limit")
        reached = float(means[found.columns].sum()) + z * highest(cuts, found)
        lower = max(lower, reached - found.gap)
        if bound(found) < bound(best):
            best = found
        if bound(best) - lower <= _CLOSE * max(abs(bound(best)), abs(bound(start))):
            break
        at = found
    return Joint(best, bound(best), bound(start), min(lower, bound(best)), solved)
