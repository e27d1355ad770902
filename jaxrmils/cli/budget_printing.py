"""A sweep of budgets in the terminal."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from jaxrmils.artifacts.pareto_file import FOLDER
from jaxrmils.evaluation.page.words import between, formats, percent
from jaxrmils.evaluation.pareto_report import PICKS, ParetoReport, PlanPoint, pick_names
from jaxrmils.numerics import format_size
from jaxrmils.policies import Recommendation
from jaxrmils.statistics import Interval


def pareto_table(report: ParetoReport) -> Table:
    """The plans of a sweep for the terminal."""
    held_out = report.held_out
    metrics = list(held_out.metrics) if held_out else []
    table = Table(
        title=f"{len(report.points)} plans, objective {report.objective}",
        title_justify="left",
        pad_edge=False,
    )
    table.add_column("plan", no_wrap=True)
    table.add_column("size", justify="right", no_wrap=True)
    columns = {"weight_bits": "bits", "bops_share": "bops", "latency": "latency"}
    shown = {k: v for k, v in columns.items() if any(k in p.used for p in report.points)}
    names = [*shown.values(), "predicted Δloss"]
    names += ["held-out Δloss"] * (held_out is not None) + [f"{name}, points" for name in metrics]
    for name in names:
        table.add_column(
            name.replace(" Δ", "\nΔ").replace(", ", ",\n"), justify="right", no_wrap=True
        )
    table.add_column("layers", overflow="fold", min_width=10)
    for point, picks in zip(report.points, pick_names(report), strict=True):
        share = f"\n{percent(point.used['size_share'])}" if "size_share" in point.used else ""
        table.add_row(
            "\n▶ ".join((point.name, *picks)),
            format_size(8 * point.size_bytes) + share,
            *(_used(point, name) for name in shown),
            f"{point.predicted.mean:+.5f}" if point.measured else _interval(point.predicted),
            *([_interval(point.measured)] if point.measured else []),
            *(
                f"{100 * m.change:+.2f}\n[{100 * m.lower:+.2f}, {100 * m.upper:+.2f}]"
                for m in point.metrics
            ),
            formats(point.formats),
            style="bold" if picks else None,
        )
    return table


def _used(point: PlanPoint, name: str) -> str:
    if name not in point.used:
        return "-"
    value = point.used[name]
    return {
        "weight_bits": f"{value:.2f}",
        "bops_share": percent(value),
        "latency": f"{1e3 * value:.3g} ms",
    }[name]


def _interval(interval: Interval) -> str:
    return f"{interval.mean:+.5f}\n{between(interval.lower, interval.upper)}"


def print_picks(
    report: ParetoReport, picks: Recommendation[PlanPoint], folder: Path, console: Console
) -> None:
    """Prints three picks, each with its reason and its plan's file."""
    kind = "measured" if report.held_out else "predicted, not measured"
    for name in PICKS:
        pick = getattr(picks, name)
        file = folder / FOLDER / pick.point.file
        console.print(Text(f"{name.capitalize():<10} {pick.point.name} ({kind}), {pick.reason}"))
        console.print(Text(f"           {file}", style="dim"))


def picks_document(picks: Recommendation[PlanPoint], folder: Path | None = None) -> dict[str, Any]:
    """Three picks as JSON values, with the plans' paths where the run's folder is given."""
    result = {}
    for name in PICKS:
        pick = getattr(picks, name)
        where = {} if folder is None else {"path": str(folder / FOLDER / pick.point.file)}
        own = {k: v for k, v in dataclasses.asdict(pick).items() if k != "point"}
        result[name] = {**own, "name": pick.point.name, "file": pick.point.file, **where}
    return result
