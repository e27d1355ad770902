"""A sweep of budgets as one HTML page."""

from __future__ import annotations

from jaxrmils.evaluation.page.markup import Markup, join, tag
from jaxrmils.evaluation.page.pareto_chart import loss_chart, metric_chart
from jaxrmils.evaluation.page.template import Section, document, facts, notes, tiles
from jaxrmils.evaluation.page.words import between, examples, flatten, formats, percent
from jaxrmils.evaluation.pareto_report import PICKS, ParetoReport, PlanPoint, pick_names
from jaxrmils.numerics import format_size
from jaxrmils.statistics import Interval

_WORK = {"latency": "latency", "bops": "bit operations"}


def pareto_page(report: ParetoReport) -> str:
    """A sweep as an HTML page that needs no other file, no network and no model.

    Args:
      report: the sweep, measured or predicted.

    Returns:
      The page: three picks, loss change and every metric against size and against latency (or bit
      operations where no latency is known), and every number in a table.
    """
    work = next((name for name in _WORK if all(name in p.used for p in report.points)), "")
    sections = _charts(report, "size", "size_bytes", "size")
    if work:
        sections += _charts(report, "work", work, _WORK[work])
    sections += [
        ("plans", "Every plan in numbers", _table(report)),
        ("made", "How it was made", _provenance(report)),
    ]
    head = join(tiles(_tiles(report)), notes(statements(report)))
    subtitle = f"{report.task} · {len(report.points)} plans · objective {report.objective}"
    return document("Budgets and what they cost", subtitle, head, sections)


def _charts(report: ParetoReport, key: str, across: str, words: str) -> list[Section]:
    """Loss change and every metric against one of the things that plans use."""
    sections: list[Section] = [(key, f"Loss change against {words}", loss_chart(report, across))]
    for number, name in enumerate(report.held_out.metrics if report.held_out else ()):
        place = f"{key}-metric" + (f"-{number + 1}" if number else "")
        chart = metric_chart(report, across, name)
        sections.append((place, f"Change of {name} against {words}", chart))
    return sections


def statements(report: ParetoReport) -> tuple[str, ...]:
    """What the numbers are evidence of, and what not, in sentences."""
    chosen = f"the data that chose the plans ({report.examples:,} examples)"
    held_out = report.held_out
    if held_out is None:
        return (
            f"Nothing here was measured. All changes are first-order predictions on {chosen}, and "
            "too kind for that reason. Measure the plans on other data before one is taken.",
            *report.notes,
        )
    return (
        "The plans were chosen on selection data and are measured on the held-out "
        f"{held_out.split} split ({examples(held_out.examples, held_out.groups)}), in exact "
        "simulation. Predictions are to first order, on the data that chose the plans.",
        "To pick from measured points is to select again, on this data: the pick's own number is "
        "a little too kind. Its certificate is a test on data that neither chose the plans nor "
        "picked among them, such as jaxrmils quantize with policy.name=file gives on the test "
        "split.",
        "Every interval holds by itself at 95 %, not all of them together.",
        *report.notes,
    )


def _tiles(report: ParetoReport) -> list[tuple[str, str, str]]:
    found = report.picks()
    entries = []
    for name in PICKS:
        pick = getattr(found, name)
        point = pick.point
        number = f"{format_size(8 * point.size_bytes)} ({_share(point)})"
        entries.append((f"{name.capitalize()}: {point.name}", number, pick.reason))
    return entries


def _share(point: PlanPoint) -> str:
    return percent(point.used["size_share"]) if "size_share" in point.used else "-"


def _table(report: ParetoReport) -> Markup:
    metrics = list(report.held_out.metrics) if report.held_out else []
    with_latency = any("latency" in point.used for point in report.points)
    names = ["plan", "size", "of float", "bits (weights, activations)", "bit operations"]
    names += ["latency"] * with_latency + ["predicted Δloss"]
    names += ["held-out Δloss"] * (report.held_out is not None)
    names += [f"{name}, change in points" for name in metrics] + ["layers", "file"]
    rows = []
    for point, picks in zip(report.points, pick_names(report), strict=True):
        used = point.used
        cells = [format_size(8 * point.size_bytes), _share(point)]
        cells.append(", ".join(_number(used.get(f"{each}_bits"), ".2f") for each in _OPERANDS))
        cells.append(_number(used.get("bops"), ".4g"))
        cells += [_number(used.get("latency"), ".4g", " s")] * with_latency
        cells.append(_change(point.predicted))
        cells += [_change(point.measured)] if point.measured else []
        cells += [
            f"{100 * m.mean:.2f} %, {100 * m.change:+.2f} [{100 * m.lower:+.2f}, "
            f"{100 * m.upper:+.2f}]"
            for m in point.metrics
        ]
        limits = ", ".join(f"{name} ≤ {value:.6g}" for name, value in point.limits.items())
        small = "; ".join(filter(None, (limits, "pick: " + ", ".join(picks) if picks else "")))
        rows.append(
            tag(
                "tr",
                tag("th", point.name, tag("small", small) if small else "", scope="row"),
                *(tag("td", cell, class_="number") for cell in cells),
                tag("td", formats(point.formats), class_="number"),
                tag("td", point.file),
                class_="own" if picks else None,
            )
        )
    head = tag("thead", tag("tr", *(tag("th", name, scope="col") for name in names)))
    table = tag("table", head, tag("tbody", *rows), class_="numbers")
    return tag("div", table, class_="wide")


_OPERANDS = ("weight", "activation")


def _number(value: float | None, form: str, unit: str = "") -> str:
    return "-" if value is None else f"{value:{form}}{unit}"


def _change(interval: Interval) -> str:
    return f"{interval.mean:+.5f} {between(interval.lower, interval.upper)}"


def _provenance(report: ParetoReport) -> Markup:
    about = {
        "budgets": f"{report.budgets} along {report.along}",
        "objective": report.objective,
        "loss in": report.unit,
        "margin": f"{report.margin:.6g}",
        "float model": format_size(round(8 * report.float_bytes)),
        "selection data": f"{report.examples:,} examples, float loss {report.float_loss:.5f}",
    }
    held_out = report.held_out
    if held_out is not None:
        metrics = "".join(f", {name} {percent(m, 2)}" for name, m in held_out.metrics.items())
        about["held-out data"] = (
            f"{held_out.split}, {examples(held_out.examples, held_out.groups)}, float loss "
            f"{held_out.loss:.5f}{metrics}"
        )
    if report.latency:
        about["latency"] = report.latency
    return facts(about | flatten(report.settings))
