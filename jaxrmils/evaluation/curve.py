"""How much selection data a plan needed: its prediction against the number of examples."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxrmils.evaluation.simulate import EvaluationError
from jaxrmils.policies import Plan, predict
from jaxrmils.sensitivity import Scores
from jaxrmils.statistics import Interval, group_numbers, mean_interval

_SHUFFLES = 20


@dataclass(frozen=True)
class CurvePoint:
    """What a part of the selection data says.

    Attributes:
      examples: how many.
      predicted: the plan's first-order prediction from them.
      sign_agreement: share of operands whose mean(p . 1) has the sign that all the data give it.
    """

    examples: int
    predicted: Interval
    sign_agreement: float


def calibration_curve(
    scores: Scores,
    plan: Plan,
    *,
    sizes: tuple[int, ...] | None = None,
    groups: Any = None,
    seed: int = 0,
) -> tuple[CurvePoint, ...]:
    """A plan's prediction and the signs of mean(p . 1) from more and more selection examples.

    The prediction is that of nested prefixes of one seeded shuffle, so that a point differs from
    the next by the examples added. The sign agreement is the mean over 20 shuffles. It flatters:
    the part is compared with a whole that contains it, and reaches 1 at all examples by
    construction; what holds on other data is at most this.

    Args:
      scores: from `score`.
      plan: for the same model.
      sizes: numbers of examples; default 50, 100, 200, ... and all.
      groups: [N], which selection examples belong together; whole groups are shuffled.
      seed: of the shuffles.

    Returns:
      A point for every size.

    Raises:
      EvaluationError: fewer than two examples, or a size out of range.
      PlanError: a format of the plan was not scored.
      StatisticsError: groups that do not fit, or fewer than two of them.
    """
    n = len(scores)
    if n < 2:
        raise EvaluationError(f"the scores hold {n} example; a curve needs two or more")
    sizes = default_sizes(n) if sizes is None else tuple(sorted(set(sizes)))
    if not sizes or sizes[0] < 2 or sizes[-1] > n:
        raise EvaluationError(f"sizes are {sizes}; expected numbers from 2 to {n}")
    labels = np.arange(n) if groups is None else group_numbers(groups, n)
    change = np.zeros(n) + sum(predict(scores, plan).values())
    sums = np.asarray(scores.gradient_sum, np.float64)
    random = np.random.default_rng(seed)
    orders = [_shuffled(labels, random) for _ in range(_SHUFFLES)]
    points = []
    for size in sizes:
        part = orders[0][:size]
        if np.unique(labels[part]).size < 2:
            continue
        interval = mean_interval(change[part], groups=None if groups is None else labels[part])
        agreement = float(np.mean([_agreement(sums, order[:size]) for order in orders]))
        points.append(CurvePoint(size, interval, agreement))
    return tuple(points)


def default_sizes(n: int) -> tuple[int, ...]:
    """50, 100, 200, ... and n.

    >>> default_sizes(750), default_sizes(40)
    ((50, 100, 200, 400, 750), (40,))
    """
    sizes = []
    while 50 << len(sizes) < n:
        sizes.append(50 << len(sizes))
    return (*sizes, n)


def _shuffled(labels: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """The examples with their groups in random order."""
    ranks = random.permutation(labels.max() + 1)
    return np.argsort(ranks[labels], kind="stable")


def _agreement(sums: np.ndarray, part: np.ndarray) -> float:
    """Share of the columns whose mean over a part has the sign of the mean over all."""
    if sums.shape[1] == 0:
        return 1.0
    return float(np.mean(np.sign(sums[part].mean(axis=0)) == np.sign(sums.mean(axis=0))))
