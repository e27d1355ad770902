"""Numbers as the terminal prints them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from jaxrmils.evaluation.page.saved import Estimate, SavedMetric, SavedReport, SavedTest
from jaxrmils.numerics import format_size

ARROWS = {"floor": "floor ↓", "ceil": "ceil ↑", "nearest": "nearest"}


def change(interval: Estimate | None) -> str:
    """A mean with its interval, which need not be symmetric.

    >>> change(Estimate(0.5, 0.45, 0.6, 0.05, 10, 0.95, "t"))
    '+0.50000 [+0.45000, +0.60000]'
    """
    if interval is None:
        return "-"
    return f"{interval.mean:+.5f} {between(interval.lower, interval.upper)}"


def between(lower: float, upper: float) -> str:
    """Two bounds; a bound that is not known is a dash."""
    words = ["-" if math.isnan(bound) else f"{bound:+.5f}" for bound in (lower, upper)]
    return f"[{words[0]}, {words[1]}]"


def sizes(before: int, after: int) -> str:
    """Bits before and after, in decimal units; a dash where there is no weight.

    >>> sizes(64, 16)
    '8 B → 2 B'
    """
    return f"{format_size(before)} → {format_size(after)}" if before else "-"


def rounding(directions: Sequence[str]) -> str:
    """Rounding directions with arrows."""
    return " ".join(ARROWS[direction] for direction in directions) or "-"


def percent(fraction: float, digits: int = 1) -> str:
    """A fraction in percent; a dash for NaN."""
    return "-" if math.isnan(fraction) else f"{100 * fraction:.{digits}f} %"


def points(fraction: float | None) -> str:
    """A difference of accuracies in points."""
    return "-" if fraction is None else f"{100 * fraction:+.2f} points"


def confidence(test: SavedTest) -> str:
    """The one-sided confidence of a test's bounds."""
    return f"{100 * (1 - test.alpha):g} %"


def examples(n: int, groups: int | None) -> str:
    """How many examples, and in how many groups."""
    return f"{n:,} examples" + (f" in {groups:,} groups" if groups else "")


def accuracy_lines(report: SavedReport) -> tuple[str, str]:
    """The accuracy change in words: the change itself, and what supports it."""
    a = report.accuracy
    if a is None:
        return "", ""
    support = f"{a.gained} gained, {a.lost} lost, p = {a.p_value:.2g} ({a.test})"
    if a.drop_upper is not None:
        level = f"{100 * (1 - (a.alpha or report.test.alpha)):g} %"
        support += f"; at {level} the drop is below {100 * a.drop_upper:.2f} points"
    return points(a.difference), support


def metric_lines(metric: SavedMetric) -> tuple[str, str]:
    """A metric's change in words: the change itself, and what supports it."""
    change, counts = metric.change, metric.accuracy
    support = (
        f"float {percent(metric.float_mean, 2)}, quantized {percent(metric.quantized_mean, 2)}; "
        f"[{100 * change.lower:+.2f}, {100 * change.upper:+.2f}] points, two-sided "
        f"{percent(change.level, 0)}; "
    )
    if counts is not None:
        support += (
            f"{counts.gained} gained, {counts.lost} lost, p = {counts.p_value:.2g} ({counts.test});"
            " "
        )
    level = f"{100 * (1 - metric.alpha):g} %"
    support += f"at {level} the drop is below {100 * metric.drop_upper:.2f} points"
    return points(change.mean), support


def formats(counts: dict[str, int]) -> str:
    """Formats with their number of layers.

    >>> formats({"w8a8": 3, "float": 1})
    'w8a8: 3, float: 1'
    """
    return ", ".join(f"{name}: {count}" for name, count in counts.items())


def flatten(value: Any, prefix: str = "") -> dict[str, str]:
    """Nested settings as one level of dotted names.

    >>> flatten({"policy": {"mu": 0.1, "bits": [8, 4]}})
    {'policy.mu': '0.1', 'policy.bits': '8, 4'}
    """
    if isinstance(value, dict):
        result: dict[str, str] = {}
        for key, entry in value.items():
            result |= flatten(entry, f"{prefix}.{key}" if prefix else str(key))
        return result
    if isinstance(value, (list, tuple)):
        return {prefix: ", ".join(map(str, value))}
    return {prefix: str(value)}
