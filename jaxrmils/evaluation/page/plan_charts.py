"""Charts of whole plans: controls, other bounds, the calibration curve, the tested sequence."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

from jaxrmils.evaluation.page.axes import (
    Mark,
    Scale,
    focused_scale,
    legend,
    padded,
    plot,
    signed_scale,
    strip,
    strip_axis,
    upright,
)
from jaxrmils.evaluation.page.markup import Markup, join, tag
from jaxrmils.evaluation.page.saved import Control, SavedReport, SavedTest, Step
from jaxrmils.evaluation.page.words import (
    between,
    change,
    confidence,
    formats,
    percent,
    points,
)
from jaxrmils.numerics import format_size

_UNITS = {"B": 1.0, "kB": 1e3, "MB": 1e6, "GB": 1e9}
_SIGNS = {"lossless": "✓", "not lossless": "✗", "no evidence": "?"}


def badge(test: SavedTest) -> Markup:
    """The verdict as a coloured word with a sign."""
    outcome = test.outcome
    words = f"{_SIGNS[outcome]} {outcome}"
    return tag("span", words, class_=f"badge {outcome.replace(' ', '-')}")


def forest(controls: Sequence[Control], float_bits: int, title: str = "plan") -> Markup:
    """Plans with their sizes, loss changes and bounds, against zero and the margin.

    Args:
      controls: the plans; the first one decides what part of the axis is shown.
      float_bits: size of the float model, in bits.
      title: name of the first column.
    """
    tests = [control.test for control in controls]
    margin = tests[0].margin
    own = (tests[0].lower_bound, tests[0].upper_bound)
    others = [b for t in tests for b in (t.lower_bound, t.upper_bound, t.mean)]
    scale = focused_scale((0.0, margin, *own), others)
    body = [_control_row(control, float_bits, scale) for control in controls]
    names = ("size", "accuracy", "verdict")
    with_accuracy = any(control.accuracy_difference is not None for control in controls)
    if not with_accuracy:
        names = ("size", "verdict")
        body = [_control_row(control, float_bits, scale, accuracy=False) for control in controls]
    head = tag(
        "tr",
        tag("th", title, scope="col"),
        tag("th", strip_axis(scale, margin), class_="plot", scope="col", aria_label="change"),
        tag("th", "Δloss", class_="number", scope="col"),
        *(tag("th", name, class_="number", scope="col") for name in names),
    )
    table = tag("table", tag("thead", head), tag("tbody", *body), class_="strips forest")
    return join(
        tag(
            "p",
            f"A plan is lossless if its bar ends left of the margin at {margin:.3g}. Bars reach "
            f"from the lower to the upper one-sided {confidence(tests[0])} bound; an arrow says "
            "that it goes on.",
        ),
        tag("div", table, class_="fit"),
    )


def _control_row(
    control: Control, float_bits: int, scale: Scale, *, accuracy: bool = True
) -> Markup:
    test = control.test
    own = control.kind == "this plan"
    bounds = between(test.lower_bound, test.upper_bound)
    tip = f"{control.name}: {test.mean:+.5f}, {bounds}; {control.verdict}"
    mark = Mark("plan" if own else "control", test.mean, test.lower_bound, test.upper_bound, tip)
    share = f" ({percent(control.size_bits / float_bits)})" if float_bits else ""
    name = [control.name]
    if control.kind not in ("this plan", control.name):
        name += [tag("span", f" · {control.kind}", class_="kind")]
    if control.note:
        name.append(tag("small", control.note))
    cells = [f"{test.mean:+.5f}", format_size(control.size_bits) + share]
    cells += [points(control.accuracy_difference)] if accuracy else []
    return tag(
        "tr",
        tag("th", *name, scope="row"),
        tag("td", strip(scale, [mark], margin=test.margin), class_="plot"),
        *(tag("td", cell, class_="number") for cell in cells),
        tag("td", badge(test), class_="number"),
        class_="own" if own else None,
    )


def bounds_chart(test: SavedTest) -> Markup:
    """The verdict's bounds by other methods."""
    if not test.bounds:
        return Markup("")
    bounds = {test.method: (test.lower_bound, test.upper_bound), **test.bounds}
    ends = [end for pair in bounds.values() for end in pair]
    scale = signed_scale((test.mean,), ends, (0.0, test.margin))
    body = []
    for name, (lower, upper) in bounds.items():
        own = name == test.method
        tip = f"{name}: {test.mean:+.5f}, {between(lower, upper)}"
        mark = Mark("plan" if own else "control", test.mean, lower, upper, tip)
        passed = "below the margin" if upper < test.margin else "reaches the margin"
        body.append(
            tag(
                "tr",
                tag("th", name, " (decides)" if own else "", scope="row"),
                tag("td", strip(scale, [mark], margin=test.margin), class_="plot"),
                tag("td", between(lower, upper), class_="number"),
                tag("td", passed, class_="number"),
                class_="own" if own else None,
            )
        )
    head = tag(
        "tr",
        tag("th", "method", scope="col"),
        tag("th", strip_axis(scale, test.margin), class_="plot", scope="col", aria_label="change"),
        tag("th", f"{confidence(test)} bounds, each one-sided", class_="number", scope="col"),
        tag("th", "upper bound", class_="number", scope="col"),
    )
    table = tag("table", tag("thead", head), tag("tbody", *body), class_="strips")
    agree = len({upper < test.margin for _, upper in bounds.values()}) == 1
    words = "All methods agree." if agree else "The methods disagree: the verdict is a close call."
    return join(tag("p", words), tag("div", table, class_="fit"))


def curve_chart(report: SavedReport) -> Markup:
    """The predicted change, and how many signs it has right, by number of examples."""
    known = (p for p in report.curve if math.isfinite(p.predicted.mean + p.sign_agreement))
    curve = sorted(known, key=lambda point: point.examples)
    if not curve:
        return Markup("")
    first, last = curve[0].examples, curve[-1].examples
    many = last > 6 * first > 0
    across = Scale(first / 1.15, last * 1.15, True) if many else padded(first, last)
    estimates = [point.predicted for point in curve]
    scale = signed_scale(
        (e.mean for e in estimates), (b for e in estimates for b in (e.lower, e.upper))
    )
    height, low = 240.0, 130.0
    marks, lines, signs = [], [], []
    share = Scale(min([0.5, *(p.sign_agreement for p in curve)]), 1.0)
    for point in curve:
        e, x = point.predicted, across.percent(point.examples)
        tip = f"{point.examples} examples: predicted {e.mean:+.5f}, {between(e.lower, e.upper)}"
        mark = Mark("attributed", e.mean, e.lower, e.upper, tip)
        marks.append(upright(scale, mark, x, height))
        tip = f"{point.examples} examples: {percent(point.sign_agreement)} of the signs"
        y = low * (1 - share.at(point.sign_agreement))
        signs.append(tag("circle", class_="dot", cx=x, cy=y, r=4.5, data_tip=tip))
    for a, b in itertools.pairwise(curve):
        ends = {"x1": across.percent(a.examples), "x2": across.percent(b.examples)}
        y = [height * (1 - scale.at(p.predicted.mean)) for p in (a, b)]
        lines.append(tag("line", class_="path", **ends, y1=y[0], y2=y[1]))
        y = [low * (1 - share.at(p.sign_agreement)) for p in (a, b)]
        signs.insert(0, tag("line", class_="path", **ends, y1=y[0], y2=y[1]))
    label = "predicted change with its interval: " + "; ".join(
        f"{p.examples} examples {change(p.predicted)}" for p in curve
    )
    label2 = "share of inputs whose sign agrees: " + "; ".join(
        f"{p.examples} examples {percent(p.sign_agreement)}" for p in curve
    )
    names = ("calibration examples", "predicted Δloss")
    return join(
        tag(
            "p",
            "How many examples the prediction needs: where both curves are flat, enough. The lower "
            "one is the share of inputs whose mean gradient has the sign that all data give it.",
        ),
        plot(across, scale, height, label, names, *lines, *marks),
        plot(across, share, low, label2, ("calibration examples", "signs that agree"), *signs),
    )


def sequence_chart(report: SavedReport) -> Markup:
    """The tested sequence: size against loss change, on the selection data and on held-out data."""
    search = report.lossless
    if search is None or not search.steps:
        return Markup("")
    steps = search.steps
    ends = [search.margin, 0.0]
    for step in steps:
        if step.chosen and step.test:
            ends += [step.test.lower_bound, step.test.upper_bound]
    values = [b for s in steps for b in (s.selection.lower, s.selection.upper)]
    values += [b for s in steps if s.test for b in (s.test.lower_bound, s.test.upper_bound)]
    scale = focused_scale(ends, values)
    sizes = [step.size_bits / 8 for step in steps]
    unit = format_size(8 * max(sizes)).split()[1]
    sizes = [size / _UNITS[unit] for size in sizes]
    across = padded(min(sizes), max(sizes))
    height = 320.0
    y = height * (1 - scale.at(search.margin))
    drawn = [tag("line", class_="margin", x1="0%", x2="100%", y1=y, y2=y)]
    drawn.append(tag("text", "margin", class_="tick margin-name", x="100%", y=y - 5))
    places = [across.percent(size) for size in sizes]
    drawn += [_step(*pair, scale, height) for pair in zip(steps, places, strict=True)]
    label = f"{len(steps)} plans, size across, loss change upwards; {search.words}"
    return join(
        tag("p", tag("strong", search.words)),
        tag(
            "p",
            "Every plan with its change on the data that selected it and, where it was tested, on "
            "held-out data. Pale plans were not tested; the chosen one is marked.",
        ),
        legend([("selection", "selection data"), ("test", "test on held-out data")]),
        plot(across, scale, height, label, (f"size in {unit}", "Δloss"), *drawn),
        _step_table(steps),
    )


def _step(step: Step, x: str, scale: Scale, height: float) -> Markup:
    what = f"{format_size(step.size_bits)}, {formats(step.formats)}"
    e, test = step.selection, step.test
    tip = f"{what}: selection {e.mean:+.5f}, {between(e.lower, e.upper)}"
    parts = []
    if step.chosen:
        parts.append(tag("line", class_="chosen", x1=x, x2=x, y1=0, y2=height))
        parts.append(tag("text", "chosen", class_="tick chosen-name", x=x, y=-4))
    pale = test is None
    mark = Mark("selection", e.mean, e.lower, e.upper, tip, pale)
    parts.append(upright(scale, mark, x, height, 0.0 if pale else -5.0))
    if test is not None:
        bounds = between(test.lower_bound, test.upper_bound)
        tip = f"{what}: held-out {test.mean:+.5f}, bounds {bounds}, {test.outcome}"
        mark = Mark("test", test.mean, test.lower_bound, test.upper_bound, tip)
        parts.append(upright(scale, mark, x, height, 5.0))
    return join(*parts)


def _step_table(steps: Sequence[Step]) -> Markup:
    rows = []
    for step in steps:
        test = step.test
        cells: list[str] = [
            formats(step.formats),
            change(step.selection),
            f"{test.mean:+.5f} {between(test.lower_bound, test.upper_bound)}" if test else "-",
            badge(test) if test else "not tested",
        ]
        chosen = " (chosen)" if step.chosen else ""
        rows.append(
            tag(
                "tr",
                tag("th", format_size(step.size_bits), chosen, scope="row"),
                *(tag("td", cell, class_="number") for cell in cells),
                class_="own" if step.chosen else None,
            )
        )
    names = ("size", "layers", "selection Δloss", "held-out Δloss and bounds", "verdict")
    head = tag("thead", tag("tr", *(tag("th", name, scope="col") for name in names)))
    table = tag("table", head, tag("tbody", *rows), class_="numbers")
    return tag(
        "details",
        tag("summary", f"The {len(steps)} plans in numbers"),
        tag("div", table, class_="wide"),
    )
