"""Lossless or not: the non-inferiority test of a mean paired change, and its words."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from scipy import special

from jaxrmils.statistics.errors import StatisticsError
from jaxrmils.statistics.intervals import (
    Method,
    bounds,
    checked_changes,
    independent_units,
    mean_and_error,
    unseen,
)

# The chance, at the planned number of examples, that a truly lossless plan is shown to be so.
PLANNED_POWER = 0.8

# A difference that needs more examples than this is rounding.
MOST_EXAMPLES = 1e15


@dataclass(frozen=True)
class NonInferiority:
    """Is the mean change below `margin`? Each bound is one-sided, at confidence 1 - `alpha`.

    Attributes:
        mean: mean change, over examples.
        standard_error: of the mean; cluster-robust with groups.
        lower_bound, upper_bound: by `method`.
        margin: the largest mean change that still counts as lossless.
        alpha: chance of passing a plan whose mean change is the margin.
        n: examples.
        method: of the bounds that decide.
        passed: `upper_bound < margin`, and the changes are not all equal.
        needed_n: roughly how many examples would decide the question in one direction or the
            other; `None` where the mean is the margin, or so near that 10^15 would not tell.
        groups: number of groups of dependent examples; `None` where each stands for itself.
        bounds: `(lower, upper)` by method: the one that decides, "t" and "bootstrap", so that a
            report can show them side by side.
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
    groups: int | None = None
    bounds: Mapping[str, tuple[float, float]] = field(default_factory=dict, hash=False)


def noninferiority(
    changes: Any,
    *,
    margin: float,
    alpha: float = 0.05,
    method: Method = "guarded",
    groups: Any = None,
    identical: bool = False,
) -> NonInferiority:
    """Test that the mean change is below `margin`, by its one-sided upper confidence bound.

    The margin must be set before the changes are seen (`default_margin`), on examples that chose
    nothing.

    Args:
        changes: floats `[n]`, n >= 2, quantized minus float loss of each example.
        margin: the largest mean change that still counts as lossless, in the loss's unit, >= 0.
        alpha: chance of passing a plan whose mean change is the margin, in (0, 0.5).
        method: of the bound that decides, see `mean_interval`; "t" and "bootstrap" are reported
            beside it.
        groups: `[n]` of any hashable values; examples of one group may depend on each other.
        identical: the two models are one and the same by construction, so that changes which are
            all zero prove it. Otherwise changes that are all equal prove nothing: of a loss that
            changes rarely (0/1 loss), a sample may miss every change, and with none in n examples
            the chance of one can still be 3 / n.

    Returns:
        The bounds, the verdict and, from the standard deviation and the distance between mean and
        margin, roughly the n that decides with a power of 80 %.

    Raises:
        StatisticsError: as `mean_interval`, or `margin` or `alpha` out of range.

    >>> result = noninferiority([0.001, -0.002, 0.003, 0.0] * 150, margin=0.005)
    >>> print(verdict_words(result))
    lossless within 0.005 nats at 95 % (upper bound +0.000622, mean +0.0005, n = 600)
    """
    changes = checked_changes(changes)
    if not (math.isfinite(margin) and margin >= 0.0):
        raise StatisticsError(f"margin is {margin}; expected a finite number of at least 0")
    if not 0.0 < alpha < 0.5:
        raise StatisticsError(f"alpha is {alpha}; expected between 0 and 0.5, such as 0.05")
    units = independent_units(changes, groups)
    methods: tuple[Method, ...] = (method, "t", "bootstrap")
    found = {each: _floats(bounds(units, alpha, each)) for each in dict.fromkeys(methods)}
    lower, upper = found[method]
    mean, standard_error = mean_and_error(units)
    return NonInferiority(
        mean=mean,
        standard_error=standard_error,
        lower_bound=lower,
        upper_bound=upper,
        margin=float(margin),
        alpha=alpha,
        n=changes.size,
        method=method,
        passed=upper < margin and (identical or standard_error > 0.0),
        needed_n=_needed_n(
            units, changes.size, margin, alpha, method, decided=upper < margin or lower > margin
        ),
        groups=None if groups is None else units.size,
        bounds=found,
    )


def default_margin(float_loss: float, *, unit: str = "nats") -> float:
    """The margin within which a plan counts as lossless: 0.5 % of the float loss.

    In nats it is at least 0.005, which no reader of a model would notice. What is little in another
    unit nobody but its user knows.

    Args:
        float_loss: mean loss of the float model.
        unit: its unit.

    Raises:
        StatisticsError: the loss is not a finite number, or is 0 in a unit other than nats.

    >>> default_margin(2.0), default_margin(0.1), default_margin(0.1, unit="mm2")
    (0.01, 0.005, 0.0005)
    """
    if not math.isfinite(float_loss):
        raise StatisticsError(f"the float model's loss is {float_loss}; expected a finite number")
    if unit == "nats":
        return max(0.005 * float_loss, 0.005)
    if float_loss <= 0.0:
        raise StatisticsError(
            f"the float model's loss is {float_loss:.3g} {unit}, of which 0.5 % is no margin; set "
            "one in that unit"
        )
    return 0.005 * float_loss


def verdict_words(result: NonInferiority, *, unit: str = "nats") -> str:
    """The verdict of a non-inferiority test in plain words.

    Args:
        result: what `noninferiority` returned.
        unit: the loss's unit.

    Returns:
        One line: lossless, not lossless (the lower bound is above the margin), or undecided.

    >>> print(verdict_words(noninferiority([0.2, 0.1, 0.3, 0.2] * 99, margin=0.005)))
    not lossless at this margin: the loss rises by 0.2 nats
    (95 % lower bound +0.194, margin 0.005, n = 396)
    >>> changes, pages = [0.3, -0.1, 0.1, -0.1], ["one", "two", "two", "three"]
    >>> print(verdict_words(noninferiority(changes, margin=0.005, groups=pages)))
    no evidence either way: n = 4 in 3 groups is too small, about 128 examples are needed
    (mean +0.05 nats, upper bound +0.95, margin 0.005)
    """
    confidence = f"{100 * (1 - result.alpha):g} %"
    margin = f"{result.margin:.3g}"
    count = f"n = {result.n}" + ("" if result.groups is None else f" in {result.groups} groups")
    if result.passed:
        return (
            f"lossless within {margin} {unit} at {confidence} (upper bound "
            f"{result.upper_bound:+.3g}, mean {result.mean:+.3g}, {count})"
        )
    if result.lower_bound > result.margin:
        return (
            f"not lossless at this margin: the loss rises by {result.mean:.3g} {unit} "
            f"({confidence} lower bound {result.lower_bound:+.3g}, margin {margin}, {count})"
        )
    found = (
        f"(mean {result.mean:+.3g} {unit}, upper bound {result.upper_bound:+.3g}, margin {margin})"
    )
    if result.standard_error == 0.0 and result.upper_bound < result.margin:
        return f"no evidence either way: all changes are equal, {count} {found}"
    if result.needed_n is None:
        return f"no evidence either way: the mean change is the margin itself, {count} {found}"
    return (
        f"no evidence either way: {count} is too small, about {result.needed_n} examples "
        f"are needed {found}"
    )


def _floats(pair: tuple[Any, Any]) -> tuple[float, float]:
    return float(pair[0]), float(pair[1])


def _needed_n(
    units: np.ndarray, n: int, margin: float, alpha: float, method: Method, *, decided: bool
) -> int | None:
    """Examples that put the bound on the mean's side of the margin with `PLANNED_POWER`.

    Counted in independent units, examples or groups, and converted at the present n per unit.
    """
    mean, standard_error = mean_and_error(units)
    distance = abs(margin - mean)
    deviation = standard_error * math.sqrt(units.size)
    quantiles = float(special.ndtri(1 - alpha) + special.ndtri(PLANNED_POWER))
    furthest = 0.0
    if method == "guarded":
        furthest = float(units.max() - mean if mean < margin else mean - units.min())

    def decides(count: float) -> bool:
        shift = unseen(count) * furthest / count
        return quantiles * deviation / math.sqrt(count) + shift <= distance

    if not decides(MOST_EXAMPLES):
        return None
    few, enough = 1.0, 2.0
    while not decides(enough):
        few, enough = enough, 2.0 * enough
    while enough - few > 1e-3 * few:
        middle = (few + enough) / 2
        few, enough = (few, middle) if decides(middle) else (middle, enough)
    needed = max(2, math.ceil(enough * n / units.size))
    return needed if decided else max(needed, n + 1)
