"""A saved report in the terminal: what a run prints is what it has written."""

from __future__ import annotations

import dataclasses
from typing import cast

from rich.console import Console
from rich.table import Table
from rich.text import Text

from jaxrmils.evaluation import Report, print_report
from jaxrmils.evaluation.page import SavedReport
from jaxrmils.evaluation.page.saved import LosslessSearch
from jaxrmils.numerics import format_size


def print_saved(report: SavedReport, console: Console, *, mu_title: str = "mu") -> None:
    """Prints a saved report.

    Args:
      report: from `jaxrmils.artifacts.load_run`.
      console: where to.
      mu_title: the title of the mu table.
    """
    beside = report.controls if len(report.controls) > 1 else ()
    # A saved report has the fields that a fresh one has.
    print_report(cast(Report, dataclasses.replace(report, controls=beside)), console)
    if report.lossless is not None:
        console.print(sequence_table(report.lossless, report.float_bits))
        console.print(Text(f"Search     {report.lossless.words}"))
    if report.mu:
        console.print(_mu_table(report, mu_title))


def sequence_table(search: LosslessSearch, float_bits: int) -> Table:
    """The plans that `lossless` tested, least compressed first."""
    margin, level = f"{search.margin:.3g}", f"{100 * (1 - search.alpha):g}"
    table = Table(
        title="Plans tested in this order, to the first failure",
        title_justify="left",
        caption=f"A plan passes where its {level} % upper bound is below the margin of {margin}.",
        caption_justify="left",
        pad_edge=False,
    )
    table.add_column("", width=1)
    table.add_column("size", justify="right", no_wrap=True)
    table.add_column("share", justify="right")
    table.add_column("layers", overflow="fold")
    table.add_column("selection Δloss", justify="right", no_wrap=True)
    table.add_column("confirmation Δloss", justify="right", no_wrap=True)
    table.add_column("upper bound", justify="right", no_wrap=True)
    table.add_column("test", no_wrap=True)
    for step in search.steps:
        test = step.test
        table.add_row(
            "▶" if step.chosen else "",
            format_size(step.size_bits),
            f"{100 * step.size_bits / float_bits:.1f} %",
            ", ".join(f"{count} {name}" for name, count in step.formats.items()),
            f"{step.selection.mean:+.5f}",
            "-" if test is None else f"{test.mean:+.5f}",
            "-" if test is None else f"{test.upper_bound:+.5f}",
            "not reached" if test is None else "passed" if test.passed else "failed",
            style="bold" if step.chosen else "dim" if test is None else None,
        )
    return table


def _mu_table(report: SavedReport, title: str) -> Table:
    bits = sorted({b for by_bits in report.mu.values() for b in by_bits}, key=int, reverse=True)
    table = Table(title=title, title_justify="left", pad_edge=False)
    table.add_column("layer", overflow="fold")
    for b in bits:
        table.add_column(f"int{b}", justify="right")
    for name, by_bits in report.mu.items():
        table.add_row(Text(name), *(f"{by_bits[b]:.4g}" if b in by_bits else "-" for b in bits))
    return table
