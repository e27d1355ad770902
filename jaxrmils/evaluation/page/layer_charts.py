"""Charts with a row or a point per layer: contributions, prediction against measurement, sizes."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from operator import attrgetter

from jaxrmils.evaluation.page.axes import (
    Mark,
    Scale,
    legend,
    plot,
    rising,
    signed_scale,
    strip,
    strip_axis,
    svg,
)
from jaxrmils.evaluation.page.markup import Markup, join, tag
from jaxrmils.evaluation.page.saved import Estimate, SavedLayer, SavedReport
from jaxrmils.evaluation.page.words import between, change, percent, rounding, sizes
from jaxrmils.numerics import format_size

MOST_ROWS = 400
"""Layers that a chart shows; pages of larger models would take browsers seconds to draw."""

_LONG = 30

_SERIES: dict[str, tuple[str, Callable[[SavedLayer], Estimate | None]]] = {
    "attributed": ("share of the joint change (secant, held-out data)", attrgetter("attributed")),
    "predicted": ("predicted (tangent, selection data)", attrgetter("predicted")),
    "measured": ("measured with this layer alone (held-out data)", attrgetter("measured")),
}


def shown_layers(report: SavedReport) -> tuple[list[tuple[int, SavedLayer]], str]:
    """The layers that charts show, with their places in the model, and a note on those left out."""
    rows = list(enumerate(report.layers))
    if len(rows) <= MOST_ROWS:
        return rows, ""
    kept = sorted(rows, key=lambda row: -_importance(row[1]))[:MOST_ROWS]
    note = f" The {MOST_ROWS} of {len(rows)} layers with the largest changes are shown."
    return sorted(kept, key=lambda row: row[0]), note


def _importance(layer: SavedLayer) -> float:
    return max((abs(e.mean) for _, pick in _SERIES.values() if (e := pick(layer))), default=0.0)


def contributions(report: SavedReport) -> Markup:
    """What every layer adds to the loss: attributed, predicted, and measured alone."""
    series = [name for name, (_, pick) in _SERIES.items() if any(map(pick, report.layers))]
    rows, left_out = shown_layers(report)
    rows = [row for row in rows if any(_SERIES[name][1](row[1]) for name in series)]
    if not rows:
        return Markup("")
    totals = _totals(report)
    estimates = [e for _, layer in rows for name in series if (e := _SERIES[name][1](layer))]
    estimates += [e for _, _, e in totals]
    scale = signed_scale(
        (e.mean for e in estimates), (b for e in estimates for b in (e.lower, e.upper))
    )
    body = [_contribution_row(place, layer, series, scale) for place, layer in rows]
    whole = [
        tag(
            "tr",
            tag("th", words, scope="row"),
            tag("td", strip(scale, [_mark(name, words, e)]), class_="plot"),
            tag("td", change(e), class_="number"),
        )
        for words, name, e in totals
    ]
    table = tag(
        "table",
        _strip_head("layer", scale, f"Δloss, {_SERIES[series[0]][0].split(' (')[0]}"),
        tag("tbody", *whole, class_="whole"),
        tag("tbody", *body, class_="rows"),
        class_="strips",
        id="contributions-table",
    )
    level = f"{100 * estimates[0].level:g} %"
    return join(
        tag(
            "p",
            f"Left of zero lowers the loss, right of it raises it. Bars are {level} intervals; "
            f"an arrow says that one goes on.{left_out}",
        ),
        legend([(name, _SERIES[name][0]) for name in series]),
        _tools("contributions-table", series),
        _scrolled(table, len(rows), "contributions by layer"),
    )


def _scrolled(table: Markup, rows: int, label: str) -> Markup:
    """A table in a frame of its own if it is long, which the keyboard can scroll as well."""
    if rows <= _LONG:
        return tag("div", table, class_="fit")
    return tag("div", table, class_="scroll", tabindex=0, role="region", aria_label=label)


def _totals(report: SavedReport) -> list[tuple[str, str, Estimate]]:
    entries = (
        ("whole model, measured", "measured", report.measured),
        ("sum of the shares", "attributed", report.attributed),
        ("left unexplained by the shares", "attributed", report.residual),
        ("sum of the predictions", "predicted", report.predicted),
        ("sum of the shares, selection data", "predicted", report.predicted_secant),
    )
    return [(words, name, e) for words, name, e in entries if e is not None]


def _contribution_row(place: int, layer: SavedLayer, series: Sequence[str], scale: Scale) -> Markup:
    found = [(name, e) for name in series if (e := _SERIES[name][1](layer))]
    marks = [_mark(name, layer.name, e) for name, e in found]
    return tag(
        "tr",
        tag("th", layer.name, " ", chip(layer.format), scope="row"),
        tag("td", strip(scale, marks), class_="plot"),
        tag("td", change(found[0][1]), class_="number"),
        data_model=str(place),
        data_change=f"{-found[0][1].mean:.9g}",
        data_magnitude=f"{-abs(found[0][1].mean):.9g}",
        data_size=str(-layer.quantized_bits),
        data_name=layer.name,
    )


def _mark(series: str, where: str, e: Estimate) -> Mark:
    kind = _SERIES[series][0].split(" (")[0]
    tip = f"{where}: {kind} {e.mean:+.5f}, {between(e.lower, e.upper)}, n = {e.n}"
    return Mark(series, e.mean, e.lower, e.upper, tip)


def _strip_head(first: str, scale: Scale, last: str) -> Markup:
    return tag(
        "thead",
        tag(
            "tr",
            tag("th", first, scope="col"),
            tag("th", strip_axis(scale), class_="plot", scope="col", aria_label="change of loss"),
            tag("th", last, class_="number", scope="col"),
        ),
    )


def _tools(table: str, series: Sequence[str]) -> Markup:
    """Sorting, filtering and hiding; shown by the script that serves them."""
    orders = (
        ("model", "order of the model"),
        ("magnitude", "largest change"),
        ("change", "most harmful"),
        ("size", "largest"),
    )
    options = [tag("option", words, value=key) for key, words in orders]
    boxes = [
        tag("label", tag("input", type="checkbox", checked=True, data_series=name), f" {name}")
        for name in series
        if len(series) > 1
    ]
    return tag(
        "div",
        tag("label", "sort by ", tag("select", *options, data_sort=True)),
        tag("label", "find ", tag("input", type="search", data_filter=True, placeholder="layer")),
        *boxes,
        class_="tools",
        hidden=True,
        data_table=table,
    )


def agreement(report: SavedReport) -> Markup:
    """Predicted against measured change of every layer, with the line of equality."""
    alone = any(layer.predicted and layer.measured for layer in report.layers)
    rows, left_out = shown_layers(report)
    pairs = [
        (layer, layer.predicted, other)
        for _, layer in rows
        if layer.predicted and (other := layer.measured if alone else layer.attributed)
        if math.isfinite(layer.predicted.mean) and math.isfinite(other.mean)
    ]
    if not pairs:
        return Markup("")
    estimates = [e for _, before, after in pairs for e in (before, after)]
    scale = signed_scale(
        (e.mean for e in estimates), (b for e in estimates for b in (e.lower, e.upper))
    )
    height = 380.0
    drawn = [_point(layer, x, y, scale, height) for layer, x, y in pairs]
    name = "measured alone" if alone else "share of the joint change"
    label = f"{len(pairs)} layers: predicted change across, {name} upwards, with equality's line"
    same = sum((x.mean > 0) == (y.mean > 0) for _, x, y in pairs)
    return join(
        tag(
            "p",
            f"On the dashed line the prediction is exact; {same} of {len(pairs)} layers have the "
            f"predicted sign. Lines are {100 * estimates[0].level:g} % intervals, cut at the "
            f"frame.{left_out}",
        ),
        _format_legend([layer.format for layer, _, _ in pairs]),
        plot(
            scale,
            scale,
            height,
            label,
            ("predicted Δloss", f"{name}, Δloss"),
            rising(scale, scale, height),
            *drawn,
        ),
    )


def _point(layer: SavedLayer, x: Estimate, y: Estimate, scale: Scale, height: float) -> Markup:
    across, up = scale.percent(x.mean), height * (1 - scale.at(y.mean))
    tip = (
        f"{layer.name} ({layer.format}): predicted {x.mean:+.5f}, {between(x.lower, x.upper)}; "
        f"measured {y.mean:+.5f}, {between(y.lower, y.upper)}"
    )
    left, right = (scale.percent(x.mean if math.isnan(b) else b) for b in (x.lower, x.upper))
    low, high = (y.mean if math.isnan(b) else b for b in (y.lower, y.upper))
    ends = {"y1": height * (1 - scale.at(low)), "y2": height * (1 - scale.at(high))}
    return tag(
        "g",
        tag("line", x1=left, x2=right, y1=up, y2=up),
        tag("line", x1=across, x2=across, **ends),
        tag("circle", cx=across, cy=up, r=4.5),
        class_=f"point {format_class(layer.format)}",
        data_tip=tip,
    )


def sizes_chart(report: SavedReport) -> Markup:
    """Bits of every layer before and after, and what the model is made of."""
    rows, left_out = shown_layers(report)
    rows = [row for row in rows if row[1].float_bits]
    if not rows:
        return Markup("")
    largest = max(layer.float_bits for _, layer in rows)
    body = [_size_row(place, layer, largest, report) for place, layer in rows]
    head = tag(
        "thead",
        tag(
            "tr",
            tag("th", "layer", scope="col"),
            tag("th", "size", class_="plot", scope="col"),
            tag("th", "before → after", class_="number", scope="col"),
            tag("th", "of the whole", class_="number", scope="col"),
        ),
    )
    table = tag("table", head, tag("tbody", *body, class_="rows"), class_="strips sizes")
    return join(
        tag(
            "p",
            "Pale is the layer in float, full its quantized size, coloured by format."
            f" The last column is its share of the quantized model.{left_out}",
        ),
        _format_legend([layer.format for layer in report.layers]),
        _stack(report),
        _scrolled(table, len(rows), "sizes by layer"),
    )


def _size_row(place: int, layer: SavedLayer, largest: int, report: SavedReport) -> Markup:
    tip = (
        f"{layer.name}: {layer.format}, {sizes(layer.float_bits, layer.quantized_bits)} "
        f"({percent(layer.quantized_bits / layer.float_bits)})"
    )
    bars = svg(
        22,
        tip,
        tag("rect", class_="before", y=4, height=14, **_span(0, layer.float_bits, largest)),
        tag("rect", class_="after", y=4, height=14, **_span(0, layer.quantized_bits, largest)),
        class_="strip",
    )
    share = layer.quantized_bits / report.quantized_bits if report.quantized_bits else 0.0
    return tag(
        "tr",
        tag("th", layer.name, " ", chip(layer.format), scope="row"),
        tag("td", bars, class_=f"plot {format_class(layer.format)}", data_tip=tip),
        tag("td", sizes(layer.float_bits, layer.quantized_bits), class_="number"),
        tag("td", percent(share), class_="number"),
        data_model=str(place),
    )


def _span(start: float, width: float, whole: float) -> dict[str, str]:
    return {"x": f"{100 * start / whole:.3f}%", "width": f"{max(100 * width / whole, 0.15):.3f}%"}


def _stack(report: SavedReport) -> Markup:
    """The whole model before and after, as bars of its formats."""
    before, after = _by_format(report, "float_bits"), _by_format(report, "quantized_bits")
    bars = []
    for y, parts, words in ((0, before, "float"), (42, after, "quantized")):
        total = report.float_bits if words == "float" else report.quantized_bits
        bars.append(tag("text", f"{words} {format_size(total)}", class_="bar-name", x=0, y=y + 12))
        start = 0.0
        for name, bits in parts.items():
            class_ = "f-rest" if name == "other parameters" else format_class(name)
            tip = f"{words}: {name} {format_size(bits)}, {percent(bits / total)}"
            bars.append(
                tag(
                    "rect",
                    class_=f"after {class_}",
                    y=y + 17,
                    height=18,
                    data_tip=tip,
                    **_span(start, bits, report.float_bits),
                )
            )
            start += bits
    label = f"the whole model: {sizes(report.float_bits, report.quantized_bits)}"
    return svg(80, label, *bars, class_="stack")


def _by_format(report: SavedReport, field: str) -> dict[str, int]:
    parts: dict[str, int] = {}
    for layer in report.layers:
        parts[layer.format] = parts.get(layer.format, 0) + getattr(layer, field)
    rest = getattr(report, field) - sum(parts.values())
    if rest > 0:
        parts["other parameters"] = rest
    return {name: bits for name, bits in parts.items() if bits}


def chip(name: str) -> Markup:
    """A format's name on its colour."""
    return tag("span", name, class_=f"chip {format_class(name)}")


def format_class(name: str) -> str:
    """The class that gives a format its colour: that of its widths, whatever grids there are."""
    known = ("float", "w8a8", "w8a4", "w4a8", "w4a4", "w8", "w4", "a8", "a4")
    name = re.sub(r"g\d+|d$", "", name)
    return f"f-{name}" if name in known else "f-other"


def _format_legend(names: Sequence[str]) -> Markup:
    items = [tag("li", chip(name)) for name in dict.fromkeys(names)]
    return tag("ul", *items, class_="legend", aria_label="formats")


def layer_numbers(report: SavedReport) -> Markup:
    """Every number of every layer, as a table."""
    columns = [(name, pick) for name, (_, pick) in _SERIES.items() if any(map(pick, report.layers))]
    if any(layer.curvature for layer in report.layers):
        columns.append(("second order", lambda layer: layer.curvature))
    bits = sorted({key for by_bits in report.mu.values() for key in by_bits}, key=int, reverse=True)
    names = ["layer", "format", "rounding", "size", *(name for name, _ in columns)]
    names += [f"mu, int{key}" for key in bits]
    rows, left_out = shown_layers(report)
    body = []
    for _, layer in rows:
        mu = report.mu.get(layer.name, {})
        cells = [layer.format, rounding(layer.rounding)]
        cells += [sizes(layer.float_bits, layer.quantized_bits)]
        cells += [change(pick(layer)) for _, pick in columns]
        cells += [f"{mu[key]:.4g}" if key in mu else "-" for key in bits]
        tds = [tag("td", cell, class_="number") for cell in cells]
        body.append(tag("tr", tag("th", layer.name, scope="row"), *tds))
    head = tag("thead", tag("tr", *(tag("th", name, scope="col") for name in names)))
    note = f" {left_out.strip()} layers.csv has them all." if left_out else ""
    table = tag("table", head, tag("tbody", *body), class_="numbers")
    return join(
        tag("p", f"Mean and interval.{note}"),
        tag("div", table, class_="wide", tabindex=0, role="region", aria_label="numbers by layer"),
    )
