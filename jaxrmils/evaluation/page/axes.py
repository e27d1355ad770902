"""Scales, gridlines and marks of charts.

Horizontal positions are percentages and vertical ones pixels, so that a chart takes the width that
there is while text and marks keep their size.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from jaxrmils.evaluation.page.markup import Markup, join, tag


@dataclass(frozen=True)
class Scale:
    """Values from `low` to `high` on a line from 0 to 1.

    >>> scale = Scale(0.0, 4.0)
    >>> scale.at(1.0), scale.at(9.0), scale.ticks
    (0.25, 1.0, (0.0, 1.0, 2.0, 3.0, 4.0))
    """

    low: float
    high: float
    logarithmic: bool = False

    def at(self, value: float) -> float:
        """Where a value lies, cut to the ends."""
        low, high = self.low, self.high
        if self.logarithmic:
            low, high, value = math.log(low), math.log(high), math.log(value)
        return min(max((value - low) / (high - low), 0.0), 1.0)

    def percent(self, value: float) -> str:
        """Where a value lies, as a coordinate."""
        return f"{100 * self.at(value):.2f}%"

    def outside(self, value: float) -> int:
        """-1 or 1 for a value below or above the ends, else 0."""
        return int(value > self.high) - int(value < self.low)

    @property
    def ticks(self) -> tuple[float, ...]:
        """About six round values."""
        if self.logarithmic:
            first, last = math.ceil(math.log2(self.low)), math.floor(math.log2(self.high))
            step = max(1, math.ceil((last - first) / 6))
            return tuple(2.0**power for power in range(first, last + 1, step))
        rough = (self.high - self.low) / 6
        base = 10.0 ** math.floor(math.log10(rough))
        step = next(base * factor for factor in (1, 2, 2.5, 5, 10) if base * factor >= rough * 0.99)
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        return tuple(round(i * step, 12) for i in range(first, last + 1))

    def label(self, value: float) -> str:
        """A tick in as few digits as tell the ticks apart."""
        ticks = self.ticks
        step = abs(ticks[1] - ticks[0]) if len(ticks) > 1 else abs(value) or 1.0
        digits = max(0, -math.floor(math.log10(step) + 1e-9))
        digits += not math.isclose(step, round(step, digits))
        return f"{value:.{digits}f}" if abs(value) < 1e15 else f"{value:.3g}"


def signed_scale(
    means: Iterable[float], bounds: Iterable[float] = (), always: Iterable[float] = (0.0,)
) -> Scale:
    """A scale that shows all means, the values in `always`, and all but outlying bounds.

    One interval that is much wider than the others would press them into a line; it is cut, and
    drawn with an arrow.
    """
    shown = _finite([*means, *always]) or [0.0]
    bounds = np.asarray(_finite(bounds) or [0.0])
    limit = 1.5 * float(np.quantile(np.abs(bounds), 0.9))
    low = min(min(shown), max(float(bounds.min()), -limit))
    high = max(max(shown), min(float(bounds.max()), limit))
    return padded(low, high)


def focused_scale(focus: Iterable[float], values: Iterable[float]) -> Scale:
    """A scale around the values in `focus` that reaches other values up to six times as far."""
    focus, values = _finite(focus), _finite(values)
    reach = 6 * max((abs(value) for value in focus), default=0.0) or math.inf
    low = min([*focus, *(max(value, -reach) for value in values)], default=0.0)
    high = max([*focus, *(min(value, reach) for value in values)], default=0.0)
    return padded(low, high)


def padded(low: float, high: float) -> Scale:
    """A scale with a little room at both ends; of some width even around a single value."""
    room = 0.04 * (high - low) or 0.1 * abs(high) or 1e-3
    return Scale(low - room, high + room)


def _finite(values: Iterable[float]) -> list[float]:
    return [value for value in values if math.isfinite(value)]


@dataclass(frozen=True)
class Mark:
    """A mean with its interval: `series` is its class and marker, `tip` what hovering tells."""

    series: str
    mean: float
    lower: float
    upper: float
    tip: str
    pale: bool = False


def svg(height: float, label: str, *children: str, class_: str | None = None) -> Markup:
    """A chart that fills its container's width; without a label it is decoration."""
    described = {"role": "img", "aria_label": label} if label else {"aria_hidden": "true"}
    return tag("svg", *children, class_=class_, width="100%", height=float(height), **described)


def vertical(scale: Scale, value: float, height: float, class_: str) -> Markup:
    """A line from top to bottom at a value; nothing where the value is off the scale."""
    if scale.outside(value):
        return Markup("")
    x = scale.percent(value)
    return tag("line", class_=class_, x1=x, x2=x, y1=0, y2=float(height))


def guides(scale: Scale, height: float, margin: float | None = None) -> Markup:
    """Gridlines, the zero line and the margin's line."""
    lines = [vertical(scale, tick, height, "grid") for tick in scale.ticks if tick]
    lines.append(vertical(scale, 0.0, height, "zero"))
    if margin is not None:
        lines.append(vertical(scale, margin, height, "margin"))
    return join(*lines)


def tick_labels(scale: Scale, y: float) -> Markup:
    """Labels of the ticks; every second one is left out on narrow screens."""
    labels = []
    ticks = scale.ticks
    zero = ticks.index(0.0) if 0.0 in ticks else 0
    for i, tick in enumerate(ticks):
        class_ = "tick" if (i - zero) % 2 == 0 else "tick wide-only"
        labels.append(
            tag("text", scale.label(tick), class_=class_, x=scale.percent(tick), y=float(y))
        )
    return join(*labels)


def strip_axis(scale: Scale, margin: float | None = None) -> Markup:
    """The axis over a column of strips."""
    label = Markup("")
    if margin is not None and not scale.outside(margin):
        label = tag("text", "margin", class_="tick margin-label", x=scale.percent(margin), y=8)
    return svg(28, "", tick_labels(scale, 24), label, class_="strip")


def strip(
    scale: Scale, marks: Sequence[Mark], *, margin: float | None = None, pitch: int = 12
) -> Markup:
    """A row's marks one below the other, over gridlines that join those of its neighbours."""
    height = pitch * max(len(marks), 1) + 12
    drawn = [horizontal(scale, mark, 6 + pitch * (i + 0.5)) for i, mark in enumerate(marks)]
    label = "; ".join(mark.tip for mark in marks)
    return svg(height, label, guides(scale, height, margin), *drawn, class_="strip")


def horizontal(scale: Scale, mark: Mark, y: float) -> Markup:
    """A mark whose interval lies along a horizontal scale, at height `y`."""
    if not math.isfinite(mark.mean):
        return Markup("")
    known = [v if not math.isnan(v) else mark.mean for v in (mark.lower, mark.upper)]
    parts = [
        tag(
            "line", class_="bar", x1=scale.percent(known[0]), x2=scale.percent(known[1]), y1=y, y2=y
        )
    ]
    for value in known:
        side = scale.outside(value)
        if side:
            name = "#arrow-right" if side > 0 else "#arrow-left"
            parts.append(tag("use", href=name, x=scale.percent(value), y=y))
        elif value != mark.mean:
            x = scale.percent(value)
            parts.append(tag("line", class_="bar", x1=x, x2=x, y1=y - 3, y2=y + 3))
    if not scale.outside(mark.mean):
        parts.append(tag("use", href=f"#mark-{mark.series}", x=scale.percent(mark.mean), y=y))
    return tag("g", *parts, class_=_classes(mark), data_tip=mark.tip)


def upright(scale: Scale, mark: Mark, x: str, height: float, shift: float = 0.0) -> Markup:
    """A mark whose interval lies along a vertical scale, at the coordinate `x`.

    Args:
      scale: of the values.
      mark: what to draw.
      x: a percentage.
      height: of the plot in pixels.
      shift: to the right, in pixels.
    """
    if not math.isfinite(mark.mean):
        return Markup("")
    known = [v if not math.isnan(v) else mark.mean for v in (mark.lower, mark.upper)]
    low, high, mean = (height * (1 - scale.at(v)) for v in (*known, mark.mean))
    parts = [tag("line", class_="bar", x1=x, x2=x, y1=low, y2=high)]
    for value, y in zip(known, (low, high), strict=True):
        side = scale.outside(value)
        if side:
            parts.append(tag("use", href="#arrow-up" if side > 0 else "#arrow-down", x=x, y=y))
    if not scale.outside(mark.mean):
        parts.append(tag("use", href=f"#mark-{mark.series}", x=x, y=mean))
    move = f"translate({shift:g} 0)" if shift else None
    return tag("g", *parts, class_=_classes(mark), transform=move, data_tip=mark.tip)


def _classes(mark: Mark) -> str:
    return f"mark {mark.series}{' pale' if mark.pale else ''}"


def plot(
    x: Scale, y: Scale, height: float, label: str, names: tuple[str, str], *children: str
) -> Markup:
    """A chart with two axes, their gridlines, labels and names (of x, of y)."""
    lines = [vertical(x, tick, height, "grid" if tick else "zero") for tick in x.ticks]
    labels = [tick_labels(x, height + 18)]
    for tick in y.ticks:
        at = height * (1 - y.at(tick))
        class_ = "grid" if tick else "zero"
        lines.append(tag("line", class_=class_, x1="0%", x2="100%", y1=at, y2=at))
        labels.append(tag("text", y.label(tick), class_="tick left", x=-8, y=at + 4))
    texts = (
        tag("text", names[0], class_="axis-name", x="50%", y=height + 38),
        tag("text", names[1], class_="axis-name left-top", x=-56, y=-10),
    )
    return tag("div", svg(height, label, *lines, *labels, *texts, *children), class_="plot2")


def rising(scale_x: Scale, scale_y: Scale, height: float) -> Markup:
    """The line on which both values are equal."""
    low, high = max(scale_x.low, scale_y.low), min(scale_x.high, scale_y.high)
    return tag(
        "line",
        class_="identity",
        x1=scale_x.percent(low),
        x2=scale_x.percent(high),
        y1=height * (1 - scale_y.at(low)),
        y2=height * (1 - scale_y.at(high)),
    )


def symbols() -> Markup:
    """Markers and arrows, defined once in a page and used by all its charts."""
    shapes = {
        "mark-attributed": tag("circle", r=4.5),
        "mark-predicted": tag("path", d="M0-5L5 0L0 5L-5 0Z", class_="hollow"),
        "mark-measured": tag("rect", x=-4, y=-4, width=8, height=8),
        "mark-selection": tag("path", d="M0-5L5 0L0 5L-5 0Z", class_="hollow"),
        "mark-test": tag("circle", r=4.5),
        "mark-plan": tag("rect", x=-5, y=-5, width=10, height=10),
        "mark-control": tag("circle", r=4),
        "arrow-right": tag("path", d="M-7-4.5L1 0L-7 4.5Z", class_="tip"),
        "arrow-left": tag("path", d="M7-4.5L-1 0L7 4.5Z", class_="tip"),
        "arrow-up": tag("path", d="M-4.5 7L0-1L4.5 7Z", class_="tip"),
        "arrow-down": tag("path", d="M-4.5-7L0 1L4.5-7Z", class_="tip"),
    }
    defined = [tag("g", shape, id=name) for name, shape in shapes.items()]
    return tag(
        "svg", tag("defs", *defined), width="0", height="0", aria_hidden="true", class_="symbols"
    )


def legend(entries: Sequence[tuple[str, str]]) -> Markup:
    """Series with their markers and names."""
    items = []
    for series, words in entries:
        marker = tag(
            "svg",
            tag("line", class_="bar", x1=0, x2=26, y1=7, y2=7),
            tag("use", href=f"#mark-{series}", x=13, y=7),
            class_=f"mark {series}",
            width=26,
            height=14,
            aria_hidden="true",
        )
        items.append(tag("li", marker, words))
    return tag("ul", *items, class_="legend")
