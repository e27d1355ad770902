"""The chart of a sweep: what plans do, upwards, against what they use, across."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from jaxrmils.evaluation.page.axes import (
    Mark,
    Scale,
    focused_scale,
    legend,
    padded,
    plot,
    upright,
)
from jaxrmils.evaluation.page.markup import Markup, join, tag
from jaxrmils.evaluation.page.words import formats
from jaxrmils.evaluation.pareto_report import PICKS, ParetoReport, PlanPoint, pick_names
from jaxrmils.numerics import format_size

HEIGHT = 320.0
_PREFIXES = (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3), ("", 1.0), ("m", 1e-3), ("µ", 1e-6))
_ACROSS = {"size_bytes": ("size", "B"), "bops": ("bit operations", ""), "latency": ("latency", "s")}
_SERIES = {"uniform": "measured", "run": "plan"}


@dataclass(frozen=True)
class _Value:
    """What is drawn upwards of one plan."""

    mean: float
    lower: float
    upper: float


def loss_chart(report: ParetoReport, across: str) -> Markup:
    """Loss changes against one of the things that plans use; nothing where no plan uses any.

    Args:
      report: the sweep.
      across: "size_bytes", "bops" or "latency".
    """
    values = [_Value(p.change, p.lower, p.upper) for p in report.points]
    predicted = None
    name = "predicted Δloss"
    if report.held_out is not None:
        name = f"held-out Δloss in {report.unit}"
        predicted = [
            _Value(p.predicted.mean, p.predicted.lower, p.predicted.upper) for p in report.points
        ]
    return _chart(report, across, name, values, predicted, report.margin)


def metric_chart(report: ParetoReport, across: str, metric: str) -> Markup:
    """Changes of a metric, in points, against one of the things that plans use.

    Args:
      report: the sweep, measured.
      across: "size_bytes", "bops" or "latency".
      metric: its name.
    """
    values = []
    for point in report.points:
        found = next(each for each in point.metrics if each.name == metric)
        values.append(_Value(100 * found.change, 100 * found.lower, 100 * found.upper))
    return _chart(report, across, f"held-out change of {metric} in points", values)


def _chart(
    report: ParetoReport,
    across: str,
    name: str,
    values: Sequence[_Value],
    predicted: Sequence[_Value] | None = None,
    margin: float | None = None,
) -> Markup:
    uses = [point.used.get(across) for point in report.points]
    if any(use is None for use in uses):
        return Markup("")
    amounts = [use for use in uses if use is not None]
    words, factor = _unit(across, max(amounts))
    amounts = [amount / factor for amount in amounts]
    x, y = padded(min(amounts), max(amounts)), _upward(report, values, predicted, margin)
    places = [x.percent(amount) for amount in amounts]
    drawn: list[Markup] = []
    if margin is not None and not y.outside(margin):
        at = HEIGHT * (1 - y.at(margin))
        drawn.append(tag("line", class_="margin", x1="0%", x2="100%", y1=at, y2=at))
        drawn.append(tag("text", "margin", class_="tick margin-name", x="100%", y=at - 5))
    drawn += _picks(report, x, amounts)
    swept = [i for i, point in enumerate(report.points) if point.kind == "budget"]
    if any(amounts[a] > amounts[b] for a, b in itertools.pairwise(swept)):
        swept = []  # ordered by another limit: a line would run to and fro
    for a, b in itertools.pairwise(swept):
        ends = [HEIGHT * (1 - y.at(values[i].mean)) for i in (a, b)]
        drawn.append(tag("line", class_="path", x1=places[a], x2=places[b], y1=ends[0], y2=ends[1]))
    for i, point in enumerate(report.points):
        if predicted is not None:
            mark = _mark(point, "predicted", predicted[i], "predicted", pale=True)
            drawn.append(upright(y, mark, places[i], HEIGHT, -6.0))
        series = _SERIES.get(point.kind, "predicted" if report.held_out is None else "test")
        drawn.append(upright(y, _mark(point, series, values[i], name), places[i], HEIGHT))
        if point.kind != "budget":
            at = HEIGHT * (1 - y.at(values[i].mean)) + (18 if point.kind == "run" else -10)
            label = point.name.removeprefix("uniform ")
            drawn.append(tag("text", label, class_="tick", x=places[i], y=at))
    title = "; ".join(_tip(p, name, v) for p, v in zip(report.points, values, strict=True))
    return join(
        _legend(report, predicted is not None),
        plot(x, y, HEIGHT, f"{name} against {words}: {title}", (words, name), *drawn),
    )


def _unit(across: str, largest: float) -> tuple[str, float]:
    """The axis's name with a unit in which values have few digits, and that unit.

    >>> _unit("size_bytes", 61_000.0)
    ('size in kB', 1000.0)
    """
    name, unit = _ACROSS[across]
    prefix, factor = next((each for each in _PREFIXES if largest >= each[1]), _PREFIXES[-1])
    return (f"{name} in {prefix}{unit}" if prefix + unit else name), factor


def _upward(
    report: ParetoReport,
    values: Sequence[_Value],
    predicted: Sequence[_Value] | None,
    margin: float | None,
) -> Scale:
    """A scale in which plans that one would take can be told apart; far ones become arrows."""
    chosen = report.picks()
    near = {getattr(chosen, name).index for name in PICKS}
    near |= {i for i, p in enumerate(report.points) if p.upper <= 4 * report.margin}
    ends = [[v.mean, v.lower, v.upper] for v in values]
    focus = [end for i in near for end in ends[i]] + [0.0] + [margin] * (margin is not None)
    others = [end for each in ends for end in each]
    others += [value.mean for value in predicted or ()]
    return focused_scale([f for f in focus if f is not None], others)


def _picks(report: ParetoReport, x: Scale, amounts: Sequence[float]) -> list[Markup]:
    """A band and a name at every pick; names that would touch are stacked."""
    drawn, last, raised = [], -1.0, False
    named = [(amounts[i], names) for i, names in enumerate(pick_names(report)) if names]
    for amount, names in sorted(named):
        place = x.percent(amount)
        raised = not raised if x.at(amount) - last < 0.14 else False
        last = x.at(amount)
        drawn.append(tag("line", class_="chosen", x1=place, x2=place, y1=0, y2=HEIGHT))
        words = ", ".join(names)
        y = 28 if raised else 14
        drawn.append(tag("text", words, class_="tick chosen-name", x=place, y=y))
    return drawn


def _mark(point: PlanPoint, series: str, value: _Value, name: str, pale: bool = False) -> Mark:
    tip = _tip(point, name, value)
    return Mark(series, value.mean, value.lower, value.upper, tip, pale)


def _tip(point: PlanPoint, name: str, value: _Value) -> str:
    size = format_size(8 * point.size_bytes)
    interval = f"{value.mean:+.4g} [{value.lower:+.4g}, {value.upper:+.4g}]"
    return f"{point.name}, {size}, {formats(point.formats)}: {name} {interval}"


def _legend(report: ParetoReport, predicted: bool) -> Markup:
    kinds = {point.kind for point in report.points}
    entries = []
    if "budget" in kinds:
        series, words = ("test", "measured") if report.held_out else ("predicted", "predicted")
        entries.append((series, f"plans of budgets, {words}"))
    entries += [("measured", "uniform plans")] * ("uniform" in kinds)
    entries += [("plan", "the run's own plan")] * ("run" in kinds)
    entries += [("predicted", "pale: predicted, on the data that chose the plans")] * predicted
    return legend(entries)
