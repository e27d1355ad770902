"""Confidence bounds and verdicts for paired changes, in float64 and free of any model.

A *change* is one example's quantized loss minus its float loss. Most changes are near zero and a
few are large, so their mean has a skewed distribution, on which Student's t bound undercovers:
for changes of which 5 % are exponential and the rest small Gaussian noise, a "95 %" upper t bound
on 200 examples holds 84 % of the time. Hall's transformation repairs that (96 %), but undercovers
where both tails are heavy (91 %, where t has 95 %), since its skewness estimate is then noise. The
default method takes the wider of the two at each end: a verdict should err towards "not shown".
`tests/statistics/test_intervals.py` simulates these coverages.

References:
    Hall, P. (1992). On the removal of skewness by transformation. Journal of the Royal Statistical
    Society B 54, 221-228.
    Johnson, N. J. (1978). Modified t tests and confidence intervals for asymmetrical populations.
    Journal of the American Statistical Association 73, 536-544.
    McNemar, Q. (1947). Note on the sampling error of the difference between correlated proportions
    or percentages. Psychometrika 12, 153-157.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
from scipy import special, stats

Method = Literal["skewness-adjusted", "hall", "t"]

# The chance, at the planned number of examples, that a truly lossless plan is shown to be so.
PLANNED_POWER = 0.8


@dataclass(frozen=True)
class Interval:
    """Two-sided confidence interval of a mean; `standard_error` is sd / sqrt(n)."""

    mean: float
    standard_error: float
    lower: float
    upper: float
    n: int
    level: float
    method: Method


@dataclass(frozen=True)
class NonInferiority:
    """Is the mean change below `margin`? Each bound is one-sided, at confidence 1 - `alpha`.

    `passed` says that `upper_bound < margin`. `needed_n` is roughly how many examples would decide
    the question in one direction or the other; `None` where the mean is the margin exactly.
    """

    mean: float
    standard_error: float
    lower_bound: float
    upper_bound: float
    margin: float
    alpha: float
    n: int
    method: Method
    passed: bool
    needed_n: int | None


@dataclass(frozen=True)
class AccuracyChange:
    """Paired change of accuracy: `difference` is (gained - lost) / n, `p_value` is McNemar's."""

    gained: int
    lost: int
    n: int
    difference: float
    p_value: float


def mean_interval(
    changes: Any, *, level: float = 0.95, method: Method = "skewness-adjusted"
) -> Interval:
    """Two-sided confidence interval of the mean change.

    With m, s, n the mean, standard deviation and count, g the sample skewness, and t_q the
    q-quantile of Student's t with n - 1 degrees of freedom, an end at one-sided level q is
    m - w s / sqrt(n), where

        t:     w = t_q
        hall:  w = (3 / k) (cbrt(1 + k (t_q - k / 6)) - 1),   k = g / sqrt(n)

    The second inverts Hall's monotone transformation T + k T^2 / 3 + k^2 T^3 / 27 + k / 6 of the
    t statistic T, which is Johnson's correction made invertible by the cubic term.
    "skewness-adjusted", the default, is the wider of the two at each end.

    Args:
        changes: floats `[n]`, n >= 2, one per example; computed in float64.
        level: confidence in (0, 1).
        method: "skewness-adjusted", "hall" or "t".

    Returns:
        The interval. Changes that are all equal give a point.

    Raises:
        ValueError: fewer than 2 changes, NaN or infinity among them, or a level or method that
            does not exist.

    >>> interval = mean_interval([0.0, 0.0, 0.0, 1.0], method="t")
    >>> print(f"{interval.mean} [{interval.lower:.3f}, {interval.upper:.3f}]")
    0.25 [-0.546, 1.046]
    """
    changes = _checked_changes(changes)
    if not 0.0 < level < 1.0:
        raise ValueError(f"level is {level}; expected between 0 and 1, such as 0.95")
    lower, upper = _bounds(changes, (1.0 - level) / 2.0, method)
    mean, standard_error = _mean_and_error(changes)
    return Interval(mean, standard_error, lower, upper, changes.size, level, method)


def noninferiority(
    changes: Any,
    *,
    margin: float,
    alpha: float = 0.05,
    method: Method = "skewness-adjusted",
) -> NonInferiority:
    """Test that the mean change is below `margin`, by its one-sided upper confidence bound.

    The margin must be set before the changes are seen (`default_margin`), on examples that chose
    nothing.

    Args:
        changes: floats `[n]`, n >= 2, quantized minus float loss of each example.
        margin: the largest mean change that still counts as lossless, in the loss's unit, >= 0.
        alpha: chance of passing a plan whose mean change is the margin, in (0, 0.5).
        method: see `mean_interval`.

    Returns:
        The bounds, the verdict and, from the standard deviation and the distance between mean and
        margin, roughly the n that decides with a power of 80 %.

    Raises:
        ValueError: as `mean_interval`, or `margin` or `alpha` out of range.

    >>> result = noninferiority([0.001, -0.002, 0.003, 0.0] * 50, margin=0.005)
    >>> print(verdict_words(result))
    lossless within 0.005 nats at 95 % (upper bound +0.000711, mean +0.0005, n = 200)
    """
    changes = _checked_changes(changes)
    if not (math.isfinite(margin) and margin >= 0.0):
        raise ValueError(f"margin is {margin}; expected a finite number of at least 0")
    if not 0.0 < alpha < 0.5:
        raise ValueError(f"alpha is {alpha}; expected between 0 and 0.5, such as 0.05")
    lower, upper = _bounds(changes, alpha, method)
    mean, standard_error = _mean_and_error(changes)
    return NonInferiority(
        mean=mean,
        standard_error=standard_error,
        lower_bound=lower,
        upper_bound=upper,
        margin=float(margin),
        alpha=alpha,
        n=changes.size,
        method=method,
        passed=upper < margin,
        needed_n=_needed_n(changes, margin, alpha, decided=upper < margin or lower > margin),
    )


def default_margin(float_loss: float) -> float:
    """The margin within which a plan counts as lossless: 0.5 % of the float loss, >= 0.005 nats.

    Args:
        float_loss: mean loss of the float model, in nats.

    Raises:
        ValueError: the loss is not a finite number.

    >>> default_margin(2.0), default_margin(0.1)
    (0.01, 0.005)
    """
    if not math.isfinite(float_loss):
        raise ValueError(f"the float model's loss is {float_loss}; expected a finite number")
    return max(0.005 * float_loss, 0.005)


def verdict_words(result: NonInferiority, *, unit: str = "nats") -> str:
    """The verdict of a non-inferiority test in plain words.

    Args:
        result: what `noninferiority` returned.
        unit: the loss's unit.

    Returns:
        One line: lossless, not lossless (the lower bound is above the margin), or undecided.

    >>> print(verdict_words(noninferiority([0.2, 0.1, 0.3, 0.2], margin=0.005)))
    not lossless at this margin: the loss rises by 0.2 nats
    (95 % lower bound +0.104, margin 0.005, n = 4)
    >>> print(verdict_words(noninferiority([0.3, -0.1, 0.1, -0.1], margin=0.005)))
    no evidence either way: n = 4 is too small, about 112 examples are needed
    (mean +0.05 nats, upper bound +0.944, margin 0.005)
    """
    confidence = f"{100 * (1 - result.alpha):g} %"
    margin = f"{result.margin:.3g}"
    if result.passed:
        return (
            f"lossless within {margin} {unit} at {confidence} (upper bound "
            f"{result.upper_bound:+.3g}, mean {result.mean:+.3g}, n = {result.n})"
        )
    if result.lower_bound > result.margin:
        return (
            f"not lossless at this margin: the loss rises by {result.mean:.3g} {unit} "
            f"({confidence} lower bound {result.lower_bound:+.3g}, margin {margin}, n = {result.n})"
        )
    found = (
        f"(mean {result.mean:+.3g} {unit}, upper bound {result.upper_bound:+.3g}, margin {margin})"
    )
    if result.needed_n is None:
        return f"no evidence either way: the mean change is the margin itself {found}"
    return (
        f"no evidence either way: n = {result.n} is too small, about {result.needed_n} examples "
        f"are needed {found}"
    )


def accuracy_change(float_correct: Any, quantized_correct: Any) -> AccuracyChange:
    """Paired change of accuracy with McNemar's exact two-sided test.

    Only examples on which the two models differ carry evidence: of `gained + lost` of them, were
    the models equally accurate, `gained` would be binomial with probability 1/2.

    Args:
        float_correct: bools `[n]`, which examples the float model gets right.
        quantized_correct: bools `[n]`, the same for the quantized model, in the same order.

    Returns:
        The counts, the difference of accuracies and the p-value (1 where no example differs).

    Raises:
        ValueError: the arrays are empty, not boolean, or not one-dimensional of equal length.

    >>> accuracy_change([True, True, False, True], [True, False, True, False])
    AccuracyChange(gained=1, lost=2, n=4, difference=-0.25, p_value=1.0)
    """
    before, after = np.asarray(float_correct), np.asarray(quantized_correct)
    if before.dtype != np.bool_ or after.dtype != np.bool_:
        raise ValueError(f"expected boolean arrays; found {before.dtype} and {after.dtype}")
    if before.ndim != 1 or before.shape != after.shape or before.size == 0:
        raise ValueError(
            f"expected two arrays [n] of the same examples; found shapes {before.shape} and "
            f"{after.shape}"
        )
    gained = int(np.sum(~before & after))
    lost = int(np.sum(before & ~after))
    differing = gained + lost
    p_value = float(stats.binomtest(gained, differing).pvalue) if differing else 1.0
    return AccuracyChange(gained, lost, before.size, (gained - lost) / before.size, p_value)


def _checked_changes(changes: Any) -> np.ndarray:
    changes = np.asarray(changes, dtype=np.float64)
    if changes.ndim != 1:
        raise ValueError(f"changes must be one number per example; found shape {changes.shape}")
    if changes.size < 2:
        raise ValueError(f"a confidence bound needs at least 2 examples; found {changes.size}")
    broken = np.flatnonzero(~np.isfinite(changes))
    if broken.size:
        raise ValueError(
            f"{broken.size} of {changes.size} changes are NaN or infinite, the first at example "
            f"{broken[0]}; one of the two models has a broken loss there"
        )
    return changes


def _mean_and_error(changes: np.ndarray) -> tuple[float, float]:
    if np.ptp(changes) == 0.0:  # Rounding in the mean would leave a tiny standard deviation.
        return float(changes[0]), 0.0
    return float(changes.mean()), float(changes.std(ddof=1) / math.sqrt(changes.size))


def _bounds(changes: np.ndarray, tail: float, method: Method) -> tuple[float, float]:
    """Bounds that each leave `tail` of the probability outside."""
    if method not in get_args(Method):
        raise ValueError(f"method is {method!r}; expected one of {', '.join(get_args(Method))}")
    mean, standard_error = _mean_and_error(changes)
    if standard_error == 0.0:
        return mean, mean
    t = float(special.stdtrit(changes.size - 1, 1.0 - tail))
    k = _skewness(changes) / math.sqrt(changes.size)
    upper_weights = {"t": -t, "hall": _hall_inverse(-t, k)}
    lower_weights = {"t": t, "hall": _hall_inverse(t, k)}
    upper_weights["skewness-adjusted"] = min(upper_weights.values())
    lower_weights["skewness-adjusted"] = max(lower_weights.values())
    return (
        mean - lower_weights[method] * standard_error,
        mean - upper_weights[method] * standard_error,
    )


def _skewness(changes: np.ndarray) -> float:
    """The sample skewness G1, corrected for small n; 0 for two values, which have none."""
    n = changes.size
    if n == 2:
        return 0.0
    standardized = (changes - changes.mean()) / changes.std(ddof=0)
    return float(np.mean(standardized**3)) * math.sqrt(n * (n - 1)) / (n - 2)


def _hall_inverse(quantile: float, k: float) -> float:
    """The t statistic that Hall's transformation takes to `quantile` (Hall 1992, section 2)."""
    if abs(k) < 1e-6:  # The limit, to first order: the exact form would divide 0 by 0.
        return quantile - k / 6 - k * quantile**2 / 3
    return 3 / k * (float(np.cbrt(1 + k * (quantile - k / 6))) - 1)


def _needed_n(changes: np.ndarray, margin: float, alpha: float, *, decided: bool) -> int | None:
    """Examples that put the bound on the mean's side of the margin with `PLANNED_POWER`."""
    mean, standard_error = _mean_and_error(changes)
    distance = abs(margin - mean)
    if distance == 0.0:
        return None
    deviation = standard_error * math.sqrt(changes.size)
    quantiles = float(special.ndtri(1 - alpha) + special.ndtri(PLANNED_POWER))
    needed = max(2, math.ceil((quantiles * deviation / distance) ** 2))
    return needed if decided else max(needed, changes.size + 1)
