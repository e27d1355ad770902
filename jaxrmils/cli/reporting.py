"""The commands that look at saved runs: `report` and `compare`."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from jaxrmils.artifacts.files import replace_file
from jaxrmils.artifacts.report_files import (
    SPREADSHEETS,
    RunFolder,
    load_run,
    write_page,
    write_spreadsheets,
)
from jaxrmils.cli.commands import Outcome, console_of
from jaxrmils.cli.config import ConfigError
from jaxrmils.cli.printing import print_saved
from jaxrmils.evaluation.page import (
    Comparison,
    NamedReport,
    compare,
    compare_page,
)
from jaxrmils.evaluation.page.comparing import decision, differs, judged
from jaxrmils.evaluation.page.words import between, change, formats, percent, sizes


def report(args: argparse.Namespace) -> Outcome:
    """A saved run's tables again, its page and its spreadsheets."""
    _no_overrides(args)
    folder = load_run(args.run_folder)
    page, *sheets = _targets(folder.path, args.out)
    write_page(folder.document, page, folder.run)
    write_spreadsheets(folder.document, *sheets)
    console = console_of(args)
    print_saved(folder.report, console)
    console.print(Text(f"Files      {', '.join(map(str, (page, *sheets)))}"))
    return Outcome(folder.document, folder.report.test.passed)


def _targets(folder: Path, out: str | None) -> tuple[Path, ...]:
    """The page and the spreadsheets: in the run's folder, or beside the page that is asked for."""
    if out is None:
        return folder / "report.html", *(folder / f"{name}.csv" for name in SPREADSHEETS)
    page = Path(out)
    if page.suffix not in (".html", ".htm"):
        raise ConfigError(f"--out is {out}; the name of an .html file was expected")
    return page, *(page.with_suffix(f".{name}.csv") for name in SPREADSHEETS)


def compare_runs(args: argparse.Namespace) -> Outcome:
    """Saved runs side by side."""
    _no_overrides(args)
    if len(args.run_folders) < 2:
        raise ConfigError("compare needs two run folders or more: jaxrmils compare RUN RUN")
    if args.out is not None:
        _targets(Path(), args.out)
    folders = [load_run(path) for path in args.run_folders]
    names = run_names([folder.path for folder in folders])
    runs = [NamedReport(n, f.report, f.run) for n, f in zip(names, folders, strict=True)]
    comparison = compare(runs)
    console = console_of(args)
    print_comparison(comparison, console)
    if args.out is not None:
        replace_file(args.out, compare_page(comparison).encode())
        console.print(Text(f"Files      {args.out}"))
    return Outcome(_comparison_dict(comparison, folders))


def run_names(paths: Sequence[Path]) -> list[str]:
    """Names that tell folders apart: their own, or as many of their parents as that takes.

    >>> run_names([Path("runs/a"), Path("runs/b")]), run_names([Path("x/run"), Path("y/run")])
    (['a', 'b'], ['x/run', 'y/run'])
    """
    parts = [path.resolve().parts for path in paths]
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(p[-length:]) for p in parts]
        if len(set(names)) == len(names):
            return names
    return [f"{name} ({place})" for place, name in enumerate(names, 1)]


def print_comparison(comparison: Comparison, console: Console) -> None:
    """Prints runs side by side, layers that differ in bold, and the warnings last."""
    runs = comparison.runs
    rows: tuple[tuple[str, Callable[[NamedReport], str]], ...] = (
        ("verdict", lambda r: r.report.test.outcome),
        ("size", lambda r: sizes(r.report.float_bits, r.report.quantized_bits)),
        ("of the float model", lambda r: percent(r.report.share)),
        ("Δloss", lambda r: change(r.report.measured)),
        ("bounds", lambda r: between(r.report.test.lower_bound, r.report.test.upper_bound)),
        ("margin", lambda r: f"{r.report.test.margin:.6g}"),
        *judged(runs),
        ("examples", lambda r: f"{r.report.test.n:,}"),
        ("layers", lambda r: formats(r.report.format_counts)),
    )
    table = _side_by_side("Runs", "", runs)
    for name, pick in rows:
        table.add_row(name, *(Text(pick(run)) for run in runs))
    console.print(table)
    layers = f"Layers, of which {comparison.differing} differ (≠)"
    table = _side_by_side(layers, "layer", runs)
    for name, lines in comparison.layers.items():
        other = differs(lines)
        cells = [
            decision(x) + (f"\n{sizes(x.float_bits, x.quantized_bits)}" if x else "") for x in lines
        ]
        style = "bold" if other else "dim"
        table.add_row(Text(("≠ " if other else "  ") + name), *map(Text, cells), style=style)
    console.print(table)
    if comparison.settings:
        table = _side_by_side("Settings that differ", "field", runs)
        for name, values in comparison.settings.items():
            table.add_row(Text(name), *map(Text, values))
        console.print(table)
    for run in runs:
        console.print(Text(f"Verdict    {run.name}: {run.report.verdict}"))
    for warning in comparison.warnings:
        console.print(Text(f"Warning    {warning}", style="bold yellow"))


def _side_by_side(title: str, first: str, runs: Sequence[NamedReport]) -> Table:
    table = Table(title=title, title_justify="left", pad_edge=False)
    table.add_column(first, overflow="fold")
    for run in runs:
        table.add_column(Text(run.name), overflow="fold")
    return table


def _comparison_dict(comparison: Comparison, folders: Sequence[RunFolder]) -> dict[str, Any]:
    return {
        "warnings": list(comparison.warnings),
        "runs": [
            {
                "name": run.name,
                "folder": str(folder.path),
                "verdict": run.report.verdict,
                "outcome": run.report.test.outcome,
                "size_bits": run.report.quantized_bits,
                "float_bits": run.report.float_bits,
                "measured": dataclasses.asdict(run.report.measured),
                "test": dataclasses.asdict(run.report.test),
                "metrics": [dataclasses.asdict(metric) for metric in run.report.metrics],
                "splits": run.run.splits,
            }
            for run, folder in zip(comparison.runs, folders, strict=True)
        ],
        "layers": {
            name: {
                "differs": differs(lines),
                "runs": [
                    None
                    if line is None
                    else {
                        "format": line.format,
                        "rounding": list(line.rounding),
                        "quantized_bits": line.quantized_bits,
                    }
                    for line in lines
                ],
            }
            for name, lines in comparison.layers.items()
        },
        "settings": {name: list(values) for name, values in comparison.settings.items()},
    }


def _no_overrides(args: argparse.Namespace) -> None:
    if args.overrides:
        raise ConfigError(
            f"{args.command} reads saved runs and takes no config fields; found "
            f"{args.overrides[0]!r}"
        )
