"""Paired change of accuracy: who is right where the two models differ.

References:
    McNemar, Q. (1947). Note on the sampling error of the difference between correlated proportions
    or percentages. Psychometrika 12, 153-157.
    Tango, T. (1998). Equivalence test and confidence interval for the difference in proportions for
    the paired-sample design. Statistics in Medicine 17, 891-908.
    Rao, J. N. K. and Scott, A. J. (1992). A simple method for the analysis of clustered binary
    data. Biometrics 48, 577-585.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from scipy import optimize, special, stats

from jaxrmils.statistics.clusters import group_numbers, pseudo_values
from jaxrmils.statistics.errors import StatisticsError

AccuracyTest = Literal["McNemar, exact", "sign flips of groups, exact"]


@dataclass(frozen=True)
class AccuracyChange:
    """Paired change of accuracy.

    Attributes:
        gained: examples that only the quantized model gets right.
        lost: examples that only the float model gets right.
        n: examples.
        difference: (gained - lost) / n; negative where the quantized model is worse.
        p_value: two-sided, of no change, by `test`.
        drop_upper: one-sided upper confidence bound of the drop of accuracy, in [-1, 1].
        alpha: the bound's confidence is 1 - `alpha`.
        groups: number of groups of dependent examples; `None` where each stands for itself.
        test: "McNemar, exact" without groups, where the bound is Tango's score bound; with groups
            "sign flips of groups, exact" and the bound at the effective sample size.
    """

    gained: int
    lost: int
    n: int
    difference: float
    p_value: float
    drop_upper: float
    alpha: float = 0.05
    groups: int | None = None
    test: AccuracyTest = "McNemar, exact"


def accuracy_change(
    float_correct: Any, quantized_correct: Any, *, alpha: float = 0.05, groups: Any = None
) -> AccuracyChange:
    """Paired change of accuracy, an exact two-sided test and an upper bound of the drop.

    Only examples on which the two models differ carry evidence for a change: of `gained + lost` of
    them, were the models equally accurate, `gained` would be binomial with probability 1/2
    (McNemar). With groups, examples are no longer independent; were the models equal, swapping them
    within a group would be as likely, so that each group's net change (gained - lost) has a random
    sign. The exact distribution of their sum gives the p-value, McNemar's for groups of one.

    The bound of the drop is Tango's (`drop_bound`). With groups it is computed at the effective
    sample size: n, gained and lost divided by the design effect, the cluster-robust variance of the
    difference over that of independent examples, at least 1 (Rao and Scott), and with Student's t
    of groups - 1 degrees of freedom in place of the normal. Where no variance shows (no example
    differs, or all do alike), each group counts as one example.

    Args:
        float_correct: bools `[n]`, which examples the float model gets right.
        quantized_correct: bools `[n]`, the same for the quantized model, in the same order.
        alpha: one-sided level of the bound, in (0, 0.5).
        groups: `[n]` of any hashable values; examples of one group may depend on each other.

    Returns:
        Counts, difference of accuracies, p-value (1 where no example differs) and bound.

    Raises:
        StatisticsError: the arrays are empty, not boolean, or not one-dimensional of equal length,
            `alpha` is out of range, or groups do not fit or are fewer than 2.

    >>> change = accuracy_change([True, True, False, True], [True, False, True, False])
    >>> change.gained, change.lost, change.difference, change.p_value, round(change.drop_upper, 3)
    (1, 2, -0.25, 1.0, 0.731)
    """
    before, after = np.asarray(float_correct), np.asarray(quantized_correct)
    if before.dtype != np.bool_ or after.dtype != np.bool_:
        raise StatisticsError(f"expected boolean arrays; found {before.dtype} and {after.dtype}")
    if before.ndim != 1 or before.shape != after.shape or before.size == 0:
        raise StatisticsError(
            f"expected two arrays [n] of the same examples; found shapes {before.shape} and "
            f"{after.shape}"
        )
    if not 0.0 < alpha < 0.5:
        raise StatisticsError(f"alpha is {alpha}; expected between 0 and 0.5, such as 0.05")
    net = after.astype(np.int64) - before
    gained, lost, n = int(np.sum(net > 0)), int(np.sum(net < 0)), net.size
    counts = (gained, lost, n, (gained - lost) / n)
    if groups is None:
        differing = gained + lost
        p_value = float(stats.binomtest(gained, differing).pvalue) if differing else 1.0
        quantile = float(special.ndtri(1 - alpha))
        return AccuracyChange(*counts, p_value, drop_bound(lost, gained, n, quantile), alpha)
    numbers = group_numbers(groups, n)
    totals = np.zeros(int(numbers.max()) + 1, np.int64)
    np.add.at(totals, numbers, net)
    effect = _design_effect(net.astype(np.float64), numbers)
    quantile = float(special.stdtrit(totals.size - 1, 1 - alpha))
    drop = drop_bound(lost / effect, gained / effect, n / effect, quantile)
    test: AccuracyTest = "sign flips of groups, exact"
    return AccuracyChange(*counts, _sign_flips(totals), drop, alpha, totals.size, test)


def drop_bound(lost: float, gained: float, n: float, quantile: float) -> float:
    """Tango's upper score bound of the drop, the difference (lost - gained) / n of proportions.

    The largest D with (lost - gained - n D) / sqrt(n (2 q + D (1 - D))) >= -quantile, where q is
    the chance of a gain that is most likely if the drop is D: the larger root of

        2 n q^2 - (lost + gained - (2 n - lost + gained) D) q - gained D (1 - D) = 0

    Args:
        lost, gained: discordant examples; fractions where they are effective counts.
        n: all examples.
        quantile: of the standard normal, such as 1.645.

    Returns:
        The bound, in [-1, 1].

    >>> round(drop_bound(0, 0, 100, 1.645), 4)  # quantile^2 / (n + quantile^2)
    0.0263
    """

    def score(drop: float) -> float:
        half = (2 * n - lost + gained) * drop - lost - gained
        constant = -gained * drop * (1 - drop)
        q = (math.sqrt(max(half**2 - 8 * n * constant, 0.0)) - half) / (4 * n)
        variance = max(n * (2 * q + drop * (1 - drop)), 0.0)
        return lost - gained - n * drop + quantile * math.sqrt(variance)

    difference = (lost - gained) / n
    # With no discordant example the estimate is a root too, without variance: start beside it.
    start = difference + 1e-9 * (1 - difference)
    if start >= 1.0 or score(start) <= 0.0:
        return min(difference, 1.0)
    return optimize.root_scalar(score, bracket=(start, 1.0), method="brentq", xtol=1e-12).root


def _design_effect(net: np.ndarray, numbers: np.ndarray) -> float:
    """Variance of the mean by groups over that of independent examples, at least 1."""
    groups = int(numbers.max()) + 1
    independent = net.var(ddof=1) / net.size
    if independent == 0.0:
        return net.size / groups
    return max(float(pseudo_values(net, numbers).var(ddof=1)) / groups / float(independent), 1.0)


def _sign_flips(totals: np.ndarray) -> float:
    """P(|sum of s_g totals_g| >= |sum of totals|) with independent random signs s_g, exactly."""
    sizes, counts = np.unique(np.abs(totals[totals != 0]), return_counts=True)
    chances = np.ones(1)  # Of the sums -extent, ..., extent, which are symmetric around 0.
    for size, count in zip(sizes, counts, strict=True):
        signs = np.zeros(2 * size * count + 1)
        signs[:: 2 * size] = stats.binom.pmf(np.arange(count + 1), count, 0.5)
        chances = np.convolve(chances, signs)
    extent = (chances.size - 1) // 2
    extreme = np.abs(np.arange(-extent, extent + 1)) >= abs(int(totals.sum()))
    return min(1.0, float(chances[extreme].sum()))
