"""A report as one HTML page."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxrmils.evaluation.metrics import repeats_accuracy
from jaxrmils.evaluation.page import layer_charts, plan_charts
from jaxrmils.evaluation.page.markup import Markup, join, tag
from jaxrmils.evaluation.page.saved import SavedReport, SavedRun, read_report
from jaxrmils.evaluation.page.template import document, facts, notes, tiles, verdict_box
from jaxrmils.evaluation.page.words import (
    accuracy_lines,
    between,
    confidence,
    examples,
    flatten,
    formats,
    metric_lines,
    percent,
    sizes,
)
from jaxrmils.evaluation.verify import Report


def report_page(report: Report | Mapping[str, Any], run: SavedRun | None = None) -> str:
    """A report as an HTML page that needs no other file, no network and no model.

    Args:
      report: from `verify`, or the dict of a saved `report.json`, of this version or an older one.
      run: what it was made with, for the end of the page.

    Returns:
      The page. Sections whose numbers the report does not have are left out.

    Raises:
      EvaluationError: the dict lacks a field, or one has another type; the message names it.
    """
    saved = read_report(report)
    head = join(
        verdict_box(saved.test, saved.verdict),
        tiles(_tiles(saved)),
        notes(saved.notes),
    )
    controls = saved.controls
    sections = (
        ("sequence", "The tested sequence", plan_charts.sequence_chart(saved)),
        (
            "controls",
            "Beside other plans, on the same held-out data",
            plan_charts.forest(controls, saved.float_bits) if len(controls) > 1 else Markup(""),
        ),
        ("bounds", "The verdict by other methods", plan_charts.bounds_chart(saved.test)),
        ("sizes", "Bits and size of every layer", layer_charts.sizes_chart(saved)),
        ("contributions", "Where the loss change comes from", layer_charts.contributions(saved)),
        ("agreement", "Predicted against measured", layer_charts.agreement(saved)),
        ("curve", "How many examples were needed", plan_charts.curve_chart(saved)),
        ("numbers", "Every number by layer", layer_charts.layer_numbers(saved)),
        ("coverage", "Coverage", _coverage(saved)),
        ("run", "How it was made", _provenance(saved, run)),
    )
    return document("Quantization report", subtitle(saved, run), head, sections)


def subtitle(report: SavedReport, run: SavedRun | None) -> str:
    """Task, policy and layers in a line."""
    parts = []
    if run is not None:
        settings = flatten(run.config)
        parts += [settings[key] for key in ("task", "policy.name") if key in settings]
    return " · ".join([*parts, f"{len(report.layers)} layers ({formats(report.format_counts)})"])


def _tiles(report: SavedReport) -> list[tuple[str, str, str]]:
    test = report.test
    relation = "<" if test.passed else "≥"
    entries = [
        (
            "Size",
            sizes(report.float_bits, report.quantized_bits),
            f"{percent(report.share)} of the float model",
        ),
        (
            "Loss change",
            f"{report.measured.mean:+.5f}",
            f"{between(report.measured.lower, report.measured.upper)}, two-sided "
            f"{percent(report.measured.level, 0)}; float {report.float_loss:.5f}; "
            f"{confidence(test)} upper bound "
            f"{test.upper_bound:+.5f} {relation} margin {test.margin:.3g}",
        ),
    ]
    told = repeats_accuracy(report)
    if report.accuracy is not None and report.float_accuracy is not None and not told:
        difference, support = accuracy_lines(report)
        words = f"float {percent(report.float_accuracy, 2)}; {support}"
        entries.append(("Accuracy change", difference, words))
    entries += [(f"{metric.name}, change", *metric_lines(metric)) for metric in report.metrics]
    entries.append(
        (
            "Held-out data",
            examples(test.n, test.groups),
            f"{report.integer_sites} of {report.planned_sites} planned sites hold an integer "
            f"operation; {percent(report.differing_codes, 4)} of the codes differ from the "
            f"simulation at the worst site, by at most {report.code_steps} step(s)",
        )
    )
    return entries


def _coverage(report: SavedReport) -> Markup:
    entries = [entry for entry in report.coverage.entries if entry.status != "site"]
    words = tag("p", report.coverage.summary())
    if not entries:
        return words
    names = ("operation", "where", "status", "why")
    head = tag("thead", tag("tr", *(tag("th", name, scope="col") for name in names)))
    rows = [
        tag(
            "tr",
            tag("th", entry.op, scope="row"),
            *(tag("td", text) for text in (entry.scope or "top level", entry.status, entry.reason)),
        )
        for entry in entries
    ]
    table = tag("table", head, tag("tbody", *rows), class_="facts")
    return join(
        words,
        tag(
            "details",
            tag("summary", f"{len(entries)} operations that can't be quantized, and why"),
            tag("div", table, class_="wide"),
        ),
    )


def _provenance(report: SavedReport, run: SavedRun | None) -> Markup:
    test = report.test
    about = {
        "test": f"one-sided non-inferiority, margin {test.margin:.6g}, alpha {test.alpha:g}, "
        f"{test.method} bounds",
    }
    if run is None:
        return facts(about)
    if run.config_file:
        about["config file"] = run.config_file.replace("\\", "/").rsplit("/", 1)[-1]
    about["splits, fingerprint"] = run.splits
    if run.model:
        about["model, fingerprint"] = run.model
    about |= {f"version of {name}": version for name, version in run.versions.items()}
    settings = facts(flatten(run.config))
    return join(facts(about), tag("details", tag("summary", "The whole config"), settings))
