"""Paired change of a metric between 0 and 1: who answers better where the two models differ."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxrmils.statistics.accuracy import AccuracyChange, accuracy_change
from jaxrmils.statistics.errors import StatisticsError
from jaxrmils.statistics.intervals import Interval, mean_interval


@dataclass(frozen=True)
class MetricChange:
    """Paired change of a metric that is better the larger it is.

    Attributes:
        name: of the metric.
        float_mean, quantized_mean: its mean for either model, in [0, 1].
        change: quantized minus float, two-sided at 95 %.
        drop_upper: one-sided upper confidence bound of the drop, the mean of float minus quantized.
        alpha: the bound's confidence is 1 - `alpha`.
        accuracy: gained and lost examples of a metric that is 0 or 1; `None` for other metrics.
    """

    name: str
    float_mean: float
    quantized_mean: float
    change: Interval
    drop_upper: float
    alpha: float = 0.05
    accuracy: AccuracyChange | None = None


def metric_change(
    name: str, before: Any, after: Any, *, alpha: float = 0.05, groups: Any = None
) -> MetricChange:
    """A metric's means and its paired change, with an upper bound of the drop.

    A metric that is 0 or 1 for every example has Tango's bound (`accuracy_change`); any other that
    of the mean drop (`mean_interval`). Of drops that are all 0 the second would say that the true
    one is 0 for certain; such a metric has Tango's bound with no example lost, which holds for
    drops of at most 1.

    Args:
        name: what the metric is called.
        before: `[n]` numbers in [0, 1], the float model's.
        after: `[n]`, the quantized model's, of the same examples in the same order.
        alpha: one-sided level of the bound, in (0, 0.5).
        groups: `[n]` of any hashable values; examples of one group may depend on each other.

    Returns:
        Means, change and bound, as fractions.

    Raises:
        StatisticsError: other shapes, fewer than 2 examples, a number outside [0, 1], `alpha` out
            of range, or groups that do not fit.

    >>> found = metric_change("F1", [0.5, 1.0, 0.0, 1.0], [0.5, 0.8, 0.0, 1.0])
    >>> round(found.change.mean, 3), found.accuracy
    (-0.05, None)
    >>> metric_change("EM", [0, 1, 1], [0, 1, 0]).accuracy.lost
    1
    """
    before, after = checked_metric(name, before), checked_metric(name, after)
    if before.shape != after.shape:
        raise StatisticsError(
            f"metric {name!r}: {before.size} numbers of the float model and {after.size} of the "
            "quantized one; expected the same examples"
        )
    if not 0.0 < alpha < 0.5:
        raise StatisticsError(f"alpha is {alpha}; expected between 0 and 0.5, such as 0.05")
    accuracy = None
    if np.isin([before, after], (0.0, 1.0)).all():
        accuracy = accuracy_change(before == 1.0, after == 1.0, alpha=alpha, groups=groups)
        drop = accuracy.drop_upper
    elif np.array_equal(before, after):
        same = np.ones(before.shape, bool)
        drop = accuracy_change(same, same, alpha=alpha, groups=groups).drop_upper
    else:
        drop = min(mean_interval(before - after, level=1 - 2 * alpha, groups=groups).upper, 1.0)
    return MetricChange(
        name=name,
        float_mean=float(before.mean()),
        quantized_mean=float(after.mean()),
        change=mean_interval(after - before, groups=groups),
        drop_upper=float(drop),
        alpha=alpha,
        accuracy=accuracy,
    )


def checked_metric(name: str, values: Any) -> np.ndarray:
    """A metric as float64 `[n]`.

    Raises:
        StatisticsError: another shape, or a number that is not between 0 and 1.
    """
    values = np.asarray(values, np.float64)
    if values.ndim != 1:
        raise StatisticsError(
            f"metric {name!r} has shape {values.shape}; expected one number per example"
        )
    bad = np.flatnonzero(~((values >= 0.0) & (values <= 1.0)))
    if bad.size:
        raise StatisticsError(
            f"metric {name!r} is {values[bad[0]]} at example {bad[0]}; expected between 0 and 1"
        )
    return values
