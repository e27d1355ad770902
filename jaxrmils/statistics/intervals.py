"""Confidence bounds of a mean change, in float64 and free of any model.

A *change* is one example's quantized loss minus its float loss. Most are near zero and a few are
large, so that a sample's mean is skewed and its spread depends on whether it caught one of the few.
Measured on the changes of uniformly quantized networks on 61,000 images (how often a bound at 5 %
lies below the true mean; `python experiments/confirmation_error.py`):

* int8: almost symmetric, both tails heavy (kurtosis above 100). t is right, 5 to 6 % at n = 500.
  Hall's transformation and bootstrap-t trust a skewness that is noise: 9 to 10 %.
* int4: right-skewed and heavy (skewness 4 to 5, kurtosis above 90). t errs in 9 % at n = 500 and in
  11 to 13 % at 200; Hall and bootstrap-t are no better, for they learn the skewness from the same
  sample, which often misses the tail. The wider of t and Hall ("skewness-adjusted") is right where
  the sample shows the skewness; here it has 8 to 9 % at n = 500.

No sample shows what it missed. The default, "guarded", therefore starts from the wider of t and
Hall and reckons with further examples as far out as the furthest seen: with one in the spread, and
in small samples with some in the mean (`unseen`). Its weights were chosen by such simulations, not
derived. It has 3.7 to 6.8 % from n = 500 on (21 of 24 cells within 4 to 6 %, the simulation's own
standard error being 0.5 %), and 1 to 5 % at 200, where it is conservative on purpose. On Gaussian
changes it costs next to nothing from n = 500 on. With far fewer than 200 examples of a tail this
heavy, it errs too, as every method does.

References:
    Hall, P. (1992). On the removal of skewness by transformation. Journal of the Royal Statistical
    Society B 54, 221-228.
    Johnson, N. J. (1978). Modified t tests and confidence intervals for asymmetrical populations.
    Journal of the American Statistical Association 73, 536-544.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
from scipy import special

from jaxrmils.statistics.bootstrap import studentized_quantiles
from jaxrmils.statistics.clusters import group_numbers, pseudo_values
from jaxrmils.statistics.errors import StatisticsError

Method = Literal["guarded", "skewness-adjusted", "hall", "t", "bootstrap"]
METHODS: tuple[Method, ...] = get_args(Method)


# Numbers that differ by no more count as equal: the square of their spread would underflow.
EQUAL = 1e-150


@dataclass(frozen=True)
class Interval:
    """Two-sided confidence interval of a mean.

    `standard_error` is sd / sqrt(n), or the cluster-robust one if the examples are in `groups`,
    their number; `None` where every example stands for itself.
    """

    mean: float
    standard_error: float
    lower: float
    upper: float
    n: int
    level: float
    method: Method
    groups: int | None = None


def mean_interval(
    changes: Any, *, level: float = 0.95, method: Method = "guarded", groups: Any = None
) -> Interval:
    """Two-sided confidence interval of the mean change.

    With m, s, n the mean, standard deviation and count, g the sample skewness, and t_q the
    q-quantile of Student's t with n - 1 degrees of freedom, an end at one-sided level q is
    m - w s / sqrt(n), where

        t:          w = t_q
        hall:       w = (3 / k) (cbrt(1 + k (t_q - k / 6)) - 1),   k = g / sqrt(n)
        bootstrap:  w = the q-quantile of the t statistic over resamples (`bootstrap.py`)

    The second inverts Hall's monotone transformation T + k T^2 / 3 + k^2 T^3 / 27 + k / 6 of the
    t statistic T, which is Johnson's correction made invertible by the cubic term.
    "skewness-adjusted" is the wider of t and Hall at each end. "guarded", the default, is that,
    multiplied by what one more example at distance c, that of the furthest example beyond this
    end, would add to s, plus `unseen(n)` c / n for such examples in the mean (see the module).

    With `groups`, all of this is computed from one pseudo-value for each group
    (`clusters.pseudo_values`), n being the number of groups.

    Args:
        changes: floats `[n]`, n >= 2, one per example; computed in float64.
        level: confidence in (0, 1).
        method: one of `METHODS`.
        groups: `[n]` of any hashable values; examples of one group may depend on each other.

    Returns:
        The interval, in the unit of the changes. Changes that are all equal give a point.

    Raises:
        StatisticsError: fewer than 2 changes, NaN or infinity among them, groups that do not fit or
            fewer than 2 of them, or a level or method that does not exist.

    >>> interval = mean_interval([0.0, 0.0, 0.0, 1.0], method="t")
    >>> print(f"{interval.mean} [{interval.lower:.3f}, {interval.upper:.3f}]")
    0.25 [-0.546, 1.046]
    >>> twice = mean_interval([0.0, 0.0, 1.0, 1.0, 0.5, 0.5], groups=list("aabbcc"))
    >>> twice.groups, twice.standard_error == mean_interval([0.0, 1.0, 0.5]).standard_error
    (3, True)
    """
    changes = checked_changes(changes)
    if not 0.0 < level < 1.0:
        raise StatisticsError(f"level is {level}; expected between 0 and 1, such as 0.95")
    units = independent_units(changes, groups)
    mean, error = mean_and_error(units)
    lower, upper = (float(end) for end in bounds(units, (1.0 - level) / 2.0, method))
    count = None if groups is None else units.size
    return Interval(mean, error, lower, upper, changes.size, level, method, count)


def t_interval(mean: float, standard_error: float, n: int, *, level: float = 0.95) -> Interval:
    """Student's interval where only the mean of n numbers and its standard error were kept.

    Args:
        mean, standard_error: in the unit of the changes.
        n: how many, at least 2.
        level: confidence in (0, 1).

    Raises:
        StatisticsError: n or the level is out of range.

    >>> kept, whole = t_interval(0.25, 0.25, 4), mean_interval([0.0, 0.0, 0.0, 1.0], method="t")
    >>> math.isclose(kept.upper, whole.upper)
    True
    """
    if n < 2 or not 0.0 < level < 1.0:
        raise StatisticsError(
            f"n is {n} and level {level}; expected 2 or more, and between 0 and 1"
        )
    reach = float(special.stdtrit(n - 1, (1.0 + level) / 2.0)) * standard_error
    return Interval(mean, standard_error, mean - reach, mean + reach, n, level, "t")


def bounds(values: np.ndarray, tail: float, method: Method) -> tuple[np.ndarray, np.ndarray]:
    """Lower and upper bound of the mean, each leaving `tail` of the probability outside.

    Args:
        values: float64 `[..., n]`, n >= 2, independent along the last axis; each row by itself.
        tail: one-sided probability, in (0, 0.5).
        method: one of `METHODS`.

    Returns:
        The bounds, float64 `[...]`; of `[n]` equal values, that value twice.

    Raises:
        StatisticsError: there is no such method, or one of several rows holds equal values alone.
    """
    if method not in METHODS:
        raise StatisticsError(f"method is {method!r}; expected one of {', '.join(METHODS)}")
    n = values.shape[-1]
    if (np.ptp(values, axis=-1) <= EQUAL).any():
        if values.ndim == 1:
            return values[0], values[0]
        raise StatisticsError("a row holds equal values alone; bound it by itself")
    mean, deviation = values.mean(axis=-1), values.std(axis=-1, ddof=1)
    error = deviation / math.sqrt(n)
    t = np.full(mean.shape, float(special.stdtrit(n - 1, 1.0 - tail)))
    low, high = t, t
    if method == "bootstrap":
        quantiles = studentized_quantiles(values, tail)
        low, high = quantiles[1], -quantiles[0]
    elif method != "t":
        k = _skewness(values) / math.sqrt(n)
        low, high = _hall_inverse(t, k), -_hall_inverse(-t, k)
        if method != "hall":
            low, high = np.maximum(low, t), np.maximum(high, t)
    lower, upper = mean - low * error, mean + high * error
    if method == "guarded":
        above, below = values.max(axis=-1) - mean, mean - values.min(axis=-1)
        lower = mean - low * error * _widening(below, deviation, n) - unseen(n) * below / n
        upper = mean + high * error * _widening(above, deviation, n) + unseen(n) * above / n
    return lower, upper


def unseen(n: float) -> float:
    """How many further examples as far out as the furthest "guarded" adds to the mean of n.

    (300 / n)^2.5, at most 3: 1 at n = 300, 0.28 at 500, 0.05 at 1,000. Chosen by experiment, see
    the module.

    >>> unseen(50), unseen(300), round(unseen(1000), 3)
    (3.0, 1.0, 0.049)
    """
    return min(3.0, (300.0 / n) ** 2.5)


def checked_changes(changes: Any) -> np.ndarray:
    """The changes as float64 `[n]`.

    Raises:
        StatisticsError: another shape, fewer than 2, or NaN or infinity among them.
    """
    changes = np.asarray(changes, dtype=np.float64)
    if changes.ndim != 1:
        raise StatisticsError(
            f"changes must be one number per example; found shape {changes.shape}"
        )
    if changes.size < 2:
        raise StatisticsError(f"a confidence bound needs at least 2 examples; found {changes.size}")
    broken = np.flatnonzero(~np.isfinite(changes))
    if broken.size:
        raise StatisticsError(
            f"{broken.size} of {changes.size} changes are NaN or infinite, the first at example "
            f"{broken[0]}; one of the two models has a broken loss there"
        )
    return changes


def independent_units(changes: np.ndarray, groups: Any) -> np.ndarray:
    """The changes, or one pseudo-value for each group."""
    if groups is None:
        return changes
    return pseudo_values(changes, group_numbers(groups, changes.size))


def mean_and_error(units: np.ndarray) -> tuple[float, float]:
    """Mean and standard error of independent numbers `[n]`."""
    if np.ptp(units) <= EQUAL:  # Rounding in the mean would leave a tiny standard deviation.
        return float(units[0]), 0.0
    return float(units.mean()), float(units.std(ddof=1) / math.sqrt(units.size))


def _skewness(values: np.ndarray) -> np.ndarray:
    """The sample skewness G1, corrected for small n; 0 for two values, which have none."""
    n = values.shape[-1]
    if n == 2:
        return np.zeros(values.shape[:-1])
    centered = values - values.mean(axis=-1, keepdims=True)
    standardized = centered / values.std(axis=-1, keepdims=True)
    return np.mean(standardized**3, axis=-1) * (math.sqrt(n * (n - 1)) / (n - 2))


def _hall_inverse(quantile: np.ndarray, k: np.ndarray) -> np.ndarray:
    """The t statistic that Hall's transformation takes to `quantile` (Hall 1992, section 2)."""
    near = np.abs(k) < 1e-6  # There the limit, to first order: the exact form divides 0 by 0.
    safe = np.where(near, 1.0, k)
    exact = 3 / safe * (np.cbrt(1 + safe * (quantile - safe / 6)) - 1)
    return np.where(near, quantile - k / 6 - k * quantile**2 / 3, exact)


def _widening(distance: np.ndarray, deviation: np.ndarray, n: int) -> np.ndarray:
    """By what factor one more example at `distance` from the mean widens the deviation, >= 1."""
    square = (distance / deviation) ** 2 * n / (n - 1)  # In units of the variance with divisor n.
    return np.sqrt(np.maximum(1.0, (n + square * n / (n + 1)) / (n + 1)))
