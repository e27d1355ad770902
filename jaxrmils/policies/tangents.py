"""What budgets read of first-order contributions, kept example by example or as moments.

A sum of contributions (an option's, a plan's) is c_n for example n. Budgets need the mean of c, of
c^2, and the standard error of the mean, no more: with the moments m and M of the score columns and
a the 0/1 vector of the columns that are summed,

    mean c = a'm,      mean c^2 = a'Ma / N + (a'm)^2,      standard error = sqrt(a'Ma / (N (N - 1)))
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from jaxrmils.policies.formats import FLOAT_BITS, PlanError
from jaxrmils.policies.plan import (
    LayerPlan,
    Plan,
    check_plan,
    layer_prediction,
    not_scored,
    predict,
)
from jaxrmils.sensitivity import Candidate, ScoreMoments, Scores
from jaxrmils.statistics import Interval, group_numbers, mean_interval, pseudo_values, t_interval

Tangents = Scores | ScoreMoments


def check_clusters(scores: Tangents, clusters: Any) -> np.ndarray | None:
    """The examples' groups as numbers, [N]; None without groups.

    Raises:
      PlanError: groups for moments, which hold no single examples.
      StatisticsError: groups that do not fit.
    """
    if clusters is None:
        return None
    if isinstance(scores, ScoreMoments):
        raise PlanError(
            "clusters need single examples, which moments do not hold; use `score`, or leave out "
            "the clusters if examples are independent"
        )
    return group_numbers(clusters, len(scores))


def mean_loss(scores: Tangents) -> float:
    """The float model's mean loss on the scored examples."""
    if isinstance(scores, ScoreMoments):
        return float(scores.moments.mean[0])
    return float(scores.loss.mean())


def operand_mean(scores: Tangents, site: str, position: int, candidate: Candidate) -> float:
    """The mean contribution of one operand under one format."""
    if isinstance(scores, ScoreMoments):
        return float(scores.moments.mean[scores.activation_columns(site, position, candidate)][0])
    return float(scores.activation(site, position, candidate).mean(dtype=np.float64))


def option_mean(scores: Tangents, name: str, layer: LayerPlan) -> float:
    """The mean contribution of a layer in one option."""
    if isinstance(scores, ScoreMoments):
        return float(scores.moments.mean[columns_of(scores, name, layer)].sum())
    return float(layer_prediction(scores, name, layer).mean())


def option_mean_square(scores: Tangents, name: str, layer: LayerPlan) -> float:
    """The mean of an option's squared contributions."""
    if isinstance(scores, ScoreMoments):
        columns = columns_of(scores, name, layer)
        spread = _products(scores, columns) / len(scores)
        return spread + float(scores.moments.mean[columns].sum()) ** 2
    return float(np.mean(layer_prediction(scores, name, layer) ** 2))


def option_error(
    scores: Tangents, name: str, layer: LayerPlan, numbers: np.ndarray | None = None
) -> float:
    """The standard error of an option's mean contribution; `numbers` are the examples' groups."""
    if isinstance(scores, ScoreMoments):
        return scores.total(columns_of(scores, name, layer))[1]
    units = layer_prediction(scores, name, layer)
    if numbers is not None:
        units = pseudo_values(units, numbers)
    return float(units.std(ddof=1) / math.sqrt(units.size))


def plan_interval(scores: Tangents, plan: Plan, clusters: Any = None) -> Interval:
    """A plan's predicted mean change, with the covariance of its layers (95 %, Student's t).

    Args:
      scores: from `score` or `score_moments`.
      plan: for the same model.
      clusters: [N], the group of each example, or None.

    Raises:
      PlanError: a format of the plan was not scored, or groups for moments.
      StatisticsError: clusters that do not fit.
    """
    if isinstance(scores, ScoreMoments):
        check_clusters(scores, clusters)
        check_plan(plan, scores.table)
        columns = [c for n, layer in plan.layers.items() for c in columns_of(scores, n, layer)]
        return t_interval(*scores.total(columns), len(scores))
    changes = np.sum(list(predict(scores, plan).values()), axis=0)
    return mean_interval(changes, method="t", groups=clusters)


def error_factor(
    scores: Tangents, options: Sequence[tuple[str, LayerPlan]], clusters: Any = None
) -> tuple[np.ndarray, np.ndarray]:
    """The options' mean contributions [columns], and a D [rows, columns] with D'D their covariance.

    Of means: |D x| is the standard error of the sum of the options that x chooses.
    """
    numbers = check_clusters(scores, clusters)
    if isinstance(scores, ScoreMoments):
        chosen = np.zeros((scores.moments.mean.size, len(options)))
        for number, (name, layer) in enumerate(options):
            chosen[columns_of(scores, name, layer), number] = 1.0
        covariance = chosen.T @ scores.moments.products @ chosen
        values, vectors = np.linalg.eigh(covariance / (len(scores) * (len(scores) - 1)))
        return chosen.T @ scores.moments.mean, (vectors * np.sqrt(np.maximum(values, 0))).T
    columns: Iterable[np.ndarray] = (layer_prediction(scores, n, p) for n, p in options)
    if numbers is not None:
        columns = (pseudo_values(values, numbers) for values in columns)
    units = np.stack(list(columns), axis=1)
    means = units.mean(axis=0)
    return means, (units - means) / math.sqrt(len(units) * (len(units) - 1))


def columns_of(moments: ScoreMoments, name: str, layer: LayerPlan) -> list[int]:
    """The columns whose sum is a layer's contribution in one option; none for float.

    Raises:
      PlanError: the option was not scored.
    """
    columns = []
    try:
        if layer.weight_bits < FLOAT_BITS:
            columns += moments.weight_columns(name, layer.weight_candidate)
        rows = moments.table.layer[name].activations
        for row, candidate in zip(rows, layer.activation_candidates, strict=False):
            columns += moments.activation_columns(row.site, row.position, candidate)
    except ValueError as error:
        raise not_scored(moments, name, layer) from error
    return columns


def _products(moments: ScoreMoments, columns: Sequence[int]) -> float:
    return float(moments.moments.products[np.ix_(columns, columns)].sum())
