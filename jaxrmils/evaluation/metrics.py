"""Metrics that people judge a model by, from its outputs on the held-out data."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from jaxrmils.evaluation.simulate import EvaluationError
from jaxrmils.statistics import MetricChange, StatisticsError, checked_metric, metric_change

Metrics = Callable[[Any], Mapping[str, Any]]
"""From the outputs of all examples, in order, to numbers in [0, 1], `[examples]`, by name."""

TOP_1 = "Acc@1"
"""What metrics call the share of examples whose largest logit is the label's."""


def metric_values(metrics: Metrics, outputs: Any, examples: int) -> dict[str, np.ndarray]:
    """A model's metrics, checked.

    Args:
      metrics: what is computed.
      outputs: pytree of arrays [examples, ...].
      examples: how many there are.

    Returns:
      float64 [examples] by name.

    Raises:
      EvaluationError: a metric has another shape, or a number outside [0, 1].

    >>> metric_values(lambda z: {"positive": z > 0}, np.array([1.0, -2.0]), 2)
    {'positive': array([1., 0.])}
    """
    try:
        result = {name: checked_metric(name, values) for name, values in metrics(outputs).items()}
    except StatisticsError as error:
        raise EvaluationError(str(error)) from error
    for name, values in result.items():
        if values.size != examples:
            raise EvaluationError(
                f"metric {name!r} has {values.size} numbers for {examples} held-out examples; "
                "one for each was expected"
            )
    return result


def metric_changes(
    before: Mapping[str, np.ndarray],
    after: Mapping[str, np.ndarray],
    *,
    alpha: float = 0.05,
    groups: Any = None,
) -> tuple[MetricChange, ...]:
    """Every metric's paired change.

    Args:
      before: the float model's, from `metric_values`.
      after: the quantized model's.
      alpha: one-sided level of the bounds.
      groups: [N], which examples belong together; None for none.

    Raises:
      EvaluationError: the two models have other metrics, or too few examples for an interval.
    """
    if set(before) != set(after):
        raise EvaluationError(
            f"the float model's metrics are {sorted(before)}, the quantized model's "
            f"{sorted(after)}; names must not depend on the outputs"
        )
    try:
        return tuple(
            metric_change(name, before[name], after[name], alpha=alpha, groups=groups)
            for name in before
        )
    except StatisticsError as error:
        raise EvaluationError(str(error)) from error


def repeats_accuracy(report: Any) -> bool:
    """Whether the metric "Acc@1" says what the report's accuracy says, which counts arg max.

    Args:
      report: a `Report` or `SavedReport`.
    """
    accuracy = report.accuracy
    if accuracy is None or report.float_accuracy is None:
        return False
    return any(
        metric.name == TOP_1
        and metric.accuracy is not None
        and math.isclose(metric.float_mean, report.float_accuracy)
        and (metric.accuracy.gained, metric.accuracy.lost) == (accuracy.gained, accuracy.lost)
        for metric in report.metrics
    )
