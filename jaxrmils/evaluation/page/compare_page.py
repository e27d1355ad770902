"""Runs side by side as one HTML page."""

from __future__ import annotations

from collections.abc import Callable

from jaxrmils.evaluation.page.comparing import Comparison, NamedReport, decision, differs, judged
from jaxrmils.evaluation.page.layer_charts import MOST_ROWS, chip
from jaxrmils.evaluation.page.markup import Markup, join, tag
from jaxrmils.evaluation.page.plan_charts import badge, forest
from jaxrmils.evaluation.page.saved import Control, SavedLayer
from jaxrmils.evaluation.page.template import Section, document, notes
from jaxrmils.evaluation.page.words import (
    change,
    examples,
    formats,
    percent,
    rounding,
    sizes,
)


def compare_page(comparison: Comparison) -> str:
    """Runs side by side as an HTML page that needs no other file and no network.

    Args:
      comparison: from `compare`.
    """
    runs = comparison.runs
    layers = f"{comparison.differing} of {len(comparison.layers)} layers differ"
    sections: list[Section] = [
        ("summary", "In short", _summary(runs)),
        ("changes", "Loss change and size", _forest(runs)),
        ("layers", f"Layers: {layers}", _layers(comparison)),
        ("settings", "Settings that differ", _settings(comparison)),
    ]
    names = " · ".join(run.name for run in runs)
    return document("Runs compared", names, notes(comparison.warnings, "warnings"), sections)


def _heads(first: str, runs: tuple[NamedReport, ...]) -> Markup:
    names = (first, *(run.name for run in runs))
    return tag("thead", tag("tr", *(tag("th", name, scope="col") for name in names)))


def _summary(runs: tuple[NamedReport, ...]) -> Markup:
    rows: tuple[tuple[str, Callable[[NamedReport], str]], ...] = (
        ("verdict", lambda r: badge(r.report.test)),
        ("in words", lambda r: r.report.verdict),
        ("size", lambda r: sizes(r.report.float_bits, r.report.quantized_bits)),
        ("of the float model", lambda r: percent(r.report.share)),
        ("loss change", lambda r: change(r.report.measured)),
        ("upper bound", lambda r: f"{r.report.test.upper_bound:+.5f}"),
        ("margin", lambda r: f"{r.report.test.margin:.6g}"),
        ("float loss", lambda r: f"{r.report.float_loss:.5f}"),
        *((f"{name} change", pick) for name, pick in judged(runs)),
        ("held-out data", lambda r: examples(r.report.test.n, r.report.test.groups)),
        ("layers", lambda r: formats(r.report.format_counts)),
        ("splits", lambda r: r.run.splits[:12]),
    )
    body = []
    for name, pick in rows:
        values = [pick(run) for run in runs]
        body.append(
            tag(
                "tr",
                tag("th", name, scope="row"),
                *(tag("td", value) for value in values),
                class_="diff" if name in ("margin", "splits") and len(set(values)) > 1 else None,
            )
        )
    table = tag("table", _heads("", runs), tag("tbody", *body), class_="facts")
    return tag("div", table, class_="wide")


def _forest(runs: tuple[NamedReport, ...]) -> Markup:
    controls = [
        Control(
            name=run.name,
            kind=run.name,
            size_bits=run.report.quantized_bits,
            test=run.report.test,
            verdict=run.report.verdict,
            accuracy_difference=run.report.accuracy.difference if run.report.accuracy else None,
        )
        for run in runs
    ]
    return forest(controls, 0, "run")


def _layers(comparison: Comparison) -> Markup:
    lines = list(comparison.layers.items())
    note = ""
    if len(lines) > MOST_ROWS:
        lines = sorted(lines, key=lambda line: not differs(line[1]))[:MOST_ROWS]
        note = f" {len(lines)} are shown, those that differ first."
    body = []
    for name, layers in lines:
        other = differs(layers)
        cells = [tag("td", _decision(layer)) for layer in layers]
        mark = tag("span", "≠ ", aria_label="differs: ") if other else ""
        body.append(
            tag("tr", tag("th", mark, name, scope="row"), *cells, class_="diff" if other else None)
        )
    table = tag(
        "table", _heads("layer", comparison.runs), tag("tbody", *body), class_="numbers words"
    )
    return join(
        tag("p", f"Lines with ≠ differ in format or rounding.{note}"),
        tag("div", table, class_="wide"),
    )


def _decision(layer: SavedLayer | None) -> Markup:
    if layer is None:
        return Markup(decision(layer))
    size = sizes(layer.float_bits, layer.quantized_bits) if layer.float_bits else ""
    directions = rounding(layer.rounding) if layer.rounding else ""
    return join(
        chip(layer.format),
        " ",
        ", ".join(filter(None, (directions, size))),
        tag("small", f"measured alone {change(layer.measured)}") if layer.measured else "",
    )


def _settings(comparison: Comparison) -> Markup:
    if not comparison.settings:
        return Markup("")
    body = [
        tag("tr", tag("th", name, scope="row"), *(tag("td", value) for value in values))
        for name, values in comparison.settings.items()
    ]
    table = tag("table", _heads("field", comparison.runs), tag("tbody", *body), class_="facts")
    return tag("div", table, class_="wide")
