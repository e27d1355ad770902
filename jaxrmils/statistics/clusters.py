"""Examples that depend on each other: one pseudo-value for every group.

Questions about one paragraph or images of one patient rise and fall together, so that n of them
carry less evidence than n independent ones. The mean over examples is a ratio, the sum over groups
of their sums by the sum of their sizes. Linearised, it is the mean of one number for each group,
and the groups are independent: every method for independent numbers then applies to these.

Reference:
    Cochran, W. G. (1977). Sampling Techniques, third edition, sections 6.3 and 9A.1.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from jaxrmils.statistics.errors import StatisticsError


def group_numbers(groups: Any, n: int) -> np.ndarray:
    """Numbers 0, 1, ... for the groups, in order of first appearance.

    Args:
        groups: `[n]`, the group of each example: integers, strings or any other hashable values.
        n: the number of examples.

    Returns:
        int64 `[n]`.

    Raises:
        StatisticsError: not one group per example, fewer than 2 groups, or groups that are NaN.

    >>> group_numbers(["b", "a", "b"], 3).tolist()
    [0, 1, 0]
    """
    # A list is no array yet: NumPy would turn a mix of strings and integers into strings.
    entries = np.asarray(groups) if hasattr(groups, "dtype") else list(groups)
    shape = entries.shape if isinstance(entries, np.ndarray) else (len(entries),)
    if shape != (n,):
        raise StatisticsError(f"groups has shape {shape}; expected ({n},), one group per example")
    numbers: dict[Any, int] = {}
    if isinstance(entries, np.ndarray):
        entries = entries.tolist()
    found = np.array([numbers.setdefault(entry, len(numbers)) for entry in entries], np.int64)
    if any(entry != entry for entry in numbers):
        raise StatisticsError(
            "some groups are NaN; expected an integer or a name for every example"
        )
    if len(numbers) < 2:
        raise StatisticsError(
            f"all {n} examples are in one group; a confidence bound needs at least 2 groups"
        )
    return found


def pseudo_values(changes: np.ndarray, numbers: np.ndarray) -> np.ndarray:
    """One number for each group, whose mean is that of the examples.

    With m the mean over n examples in G groups, group g's number is
    m + (G / n) sum_{i in g} (changes_i - m). The standard error of their mean is
    sqrt(G / (G - 1) sum_g (sum_{i in g} (changes_i - m))^2) / n, the cluster-robust one of the
    ratio estimator. Groups of one example each give the changes themselves.

    Args:
        changes: float64 `[n]`.
        numbers: from `group_numbers`, `[n]`.

    Returns:
        float64 `[G]`, in the unit of the changes.

    >>> pseudo_values(np.array([1.0, 1.0, 4.0]), np.array([0, 0, 1])).round(3).tolist()
    [0.667, 3.333]
    """
    if np.ptp(changes) == 0.0:  # Rounding in the mean would leave a spread.
        return np.full(int(numbers.max()) + 1, changes[0])
    mean = changes.mean()
    sums = np.bincount(numbers, weights=changes - mean)
    return mean + sums * (sums.size / changes.size)
