"""Three picks from a list of plans, and why, in a sentence each."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from jaxrmils.numerics import format_size
from jaxrmils.policies.formats import PlanError
from jaxrmils.statistics import default_margin


class Judged(Protocol):
    """A plan's size and loss change: a `ParetoPoint`, a `MeasuredPoint`, or what looks like one."""

    @property
    def size_bytes(self) -> float:
        """Size of the stored model."""
        ...

    @property
    def change(self) -> float:
        """Mean change of the loss against the float model."""
        ...

    @property
    def lower(self) -> float:
        """Lower end of its confidence interval."""
        ...

    @property
    def upper(self) -> float:
        """Upper end of its confidence interval."""
        ...


@dataclass(frozen=True)
class MeasuredPoint:
    """A plan measured on data that did not choose it.

    Attributes:
      name: what to call it.
      size_bytes: size of the stored model.
      change: mean of quantized minus float loss.
      lower: lower end of its confidence interval.
      upper: upper end.
    """

    name: str
    size_bytes: float
    change: float
    lower: float
    upper: float


P = TypeVar("P", bound=Judged)


@dataclass(frozen=True)
class Pick(Generic[P]):
    """One recommendation.

    Attributes:
      index: in the list that was given.
      point: the point.
      reason: why, in a sentence.
      qualifies: False where no point does what the pick promises, and this is the nearest.
    """

    index: int
    point: P
    reason: str
    qualifies: bool


@dataclass(frozen=True)
class Recommendation(Generic[P]):
    """Three picks; the same point may be more than one of them.

    Attributes:
      quality: the smallest plan that is shown to be as good as float.
      balanced: the knee between the two others.
      compact: the smallest plan that is shown to be within the tolerance.
    """

    quality: Pick[P]
    balanced: Pick[P]
    compact: Pick[P]


def recommend(
    points: Sequence[P],
    *,
    margin: float | None = None,
    tolerance: float | None = None,
    float_loss: float | None = None,
    unit: str = "nats",
    measured: bool = True,
) -> Recommendation[P]:
    """Picks three plans by size and loss change.

    * quality: the smallest plan whose upper confidence bound is within `margin` of float.
    * compact: the smallest plan whose upper confidence bound is within `tolerance` of float.
    * balanced: of the plans between these two in size and also within `tolerance`, the one
      furthest below the straight line from the one to the other, both axes scaled to [0, 1].

    The bound counts and not whether the interval reaches 0: a wide interval does too, and is no
    evidence. Where no plan qualifies the one with the lowest upper bound is picked, and the
    sentence says so.

    Args:
      points: in any order, predicted or (better) measured on data that did not choose them.
      margin: a loss change that counts as none; by default 0.5 % of `float_loss`, and at least
        0.005 if the loss is in nats.
      tolerance: a loss change that is accepted; by default four margins.
      float_loss: the float model's mean loss, for the default margin.
      unit: of the loss.
      measured: False for points that are predicted: nothing is shown of them, and the sentences
        say so.

    Returns:
      The picks.

    Raises:
      PlanError: no points, numbers that are not finite, an interval that does not hold its mean, or
        a margin and a tolerance that are not 0 < margin <= tolerance.
      StatisticsError: no default margin exists for the float loss in this unit.

    >>> points = [
    ...     MeasuredPoint("all int8", 6e6, 0.001, -0.001, 0.003),
    ...     MeasuredPoint("mixed", 4e6, 0.006, 0.003, 0.009),
    ...     MeasuredPoint("mostly int4", 3.5e6, 0.015, 0.011, 0.019),
    ...     MeasuredPoint("all int4", 3e6, 0.09, 0.08, 0.10),
    ... ]
    >>> found = recommend(points)
    >>> [pick.point.name for pick in (found.quality, found.balanced, found.compact)]
    ['all int8', 'mixed', 'mostly int4']
    >>> print(found.quality.reason)
    6.00 MB: the smallest plan shown to be as good as float; its loss changes by +0.001 nats
    (interval -0.001 to +0.003), and the upper end is within the margin of 0.005.
    """
    _check(points)
    if margin is None:
        if float_loss is None and unit != "nats":
            raise PlanError(f"no margin is known in {unit}; pass one, or the float loss")
        margin = default_margin(float_loss or 0.0, unit=unit)
    tolerance = 4 * margin if tolerance is None else tolerance
    if not (0 < margin <= tolerance < math.inf):
        raise PlanError(
            f"margin {margin} and tolerance {tolerance}: expected 0 < margin <= tolerance"
        )
    quality, is_good = _smallest(points, margin)
    compact, is_close = _smallest(points, tolerance)
    balanced = _knee(points, quality, compact, tolerance)
    words = functools.partial(_bound_words, unit=unit, measured=measured)
    return Recommendation(
        Pick(
            quality,
            points[quality],
            words(points[quality], "as good as float", "margin", margin, is_good),
            is_good,
        ),
        Pick(
            balanced,
            points[balanced],
            _balanced_words(points, balanced, quality, compact, unit, measured),
            is_close,
        ),
        Pick(
            compact,
            points[compact],
            words(points[compact], "close to float", "tolerance", tolerance, is_close),
            is_close,
        ),
    )


def _check(points: Sequence[Judged]) -> None:
    if not points:
        raise PlanError("there are no points to pick from; expected one or more")
    for number, each in enumerate(points):
        numbers = (each.size_bytes, each.change, each.lower, each.upper)
        if not all(math.isfinite(x) for x in numbers) or each.size_bytes < 0:
            raise PlanError(f"point {number} has size and changes {numbers}; expected finite ones")
        if not each.lower <= each.change <= each.upper:
            raise PlanError(
                f"point {number}: the change {each.change} is outside its interval "
                f"[{each.lower}, {each.upper}]"
            )


def _smallest(points: Sequence[Judged], bound: float) -> tuple[int, bool]:
    """The smallest point with its upper end within a bound, else that with the lowest end."""
    within = [i for i, each in enumerate(points) if each.upper <= bound]
    if within:
        return min(within, key=lambda i: (points[i].size_bytes, points[i].upper)), True
    return min(range(len(points)), key=lambda i: (points[i].upper, points[i].size_bytes)), False


def _knee(points: Sequence[Judged], start: int, end: int, tolerance: float) -> int:
    """The point furthest below the chord between two others; the first if none is."""
    (x0, y0), (x1, y1) = ((points[i].size_bytes, points[i].change) for i in (start, end))
    if x0 <= x1 or y0 >= y1:
        return start

    def below(i: int) -> float:
        across = (x0 - points[i].size_bytes) / (x0 - x1)
        return across - (points[i].change - y0) / (y1 - y0)

    between = [i for i, p in enumerate(points) if x1 < p.size_bytes < x0 and p.upper <= tolerance]
    best = max(between, key=lambda i: (below(i), -points[i].size_bytes), default=start)
    return best if best != start and below(best) > 0 else start


def _bound_words(
    point: Judged,
    aim: str,
    name: str,
    bound: float,
    qualifies: bool,
    *,
    unit: str,
    measured: bool,
) -> str:
    size, change = format_size(8 * point.size_bytes), _change(point, unit)
    known = "shown" if measured else "predicted"
    if qualifies:
        return (
            f"{size}: the smallest plan {known} to be {aim}; its loss {_moves(measured)} by "
            f"{change}, and the upper end is within the {name} of {bound:.3g}."
        )
    what = "loss change" if measured else "predicted loss change"
    return (
        f"{size}: no plan is {known} to be {aim}, since every interval reaches beyond the {name} "
        f"of {bound:.3g}; this one reaches least far, with a {what} of {change}."
    )


def _moves(measured: bool) -> str:
    return "changes" if measured else "is predicted to change"


def _balanced_words(
    points: Sequence[Judged], chosen: int, quality: int, compact: int, unit: str, measured: bool
) -> str:
    point = points[chosen]
    size, change = format_size(8 * point.size_bytes), _change(point, unit)
    if chosen == quality:
        return (
            f"{size}: the same as for quality, since no plan between that and the compact one "
            f"saves more than its share of the loss; the loss {_moves(measured)} by {change}."
        )
    large, small = points[quality], points[compact]
    saved = (large.size_bytes - point.size_bytes) / (large.size_bytes - small.size_bytes)
    paid = (point.change - large.change) / (small.change - large.change)
    return (
        f"{size}: saves {saved:.0%} of the bytes between the quality and the compact plan for "
        f"{paid:.0%} of the loss between them; the loss {_moves(measured)} by {change}."
    )


def _change(point: Judged, unit: str) -> str:
    return f"{point.change:+.3g} {unit} (interval {point.lower:+.3g} to {point.upper:+.3g})"
