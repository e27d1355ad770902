"""Reports for the terminal."""

from __future__ import annotations

from typing import IO, Any

from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from jaxrmils.evaluation.verify import LayerReport, Report
from jaxrmils.graph import Coverage, Graph, ModelTable
from jaxrmils.numerics import format_size
from jaxrmils.statistics import Interval

_ARROWS = {"floor": "floor ↓", "ceil": "ceil ↑", "nearest": "nearest"}


def layer_table(report: Report) -> Table:
    """Bits, rounding, predicted and measured loss change and size of every layer."""
    table = Table(title="Layers", title_justify="left", show_footer=True, pad_edge=False)
    table.add_column("layer", footer="whole model", overflow="fold")
    table.add_column("format")
    table.add_column("rounding")
    table.add_column("predicted Δloss", justify="right", footer=_change(report.predicted))
    table.add_column("measured Δloss", justify="right", footer=_change(report.measured))
    table.add_column("size", justify="right", footer=_sizes(report))
    for row in report.layers:
        table.add_row(
            row.name,
            row.format,
            " ".join(_ARROWS[r] for r in row.rounding) or "-",
            _change(row.predicted),
            _change(row.measured),
            _layer_size(row),
        )
    return table


def _change(interval: Interval | None) -> str:
    if interval is None:
        return "-"
    half = (interval.upper - interval.lower) / 2
    return f"{interval.mean:+.5f} ± {half:.5f}"


def _layer_size(row: LayerReport) -> str:
    if not row.float_bits:
        return "-"
    return f"{format_size(row.float_bits)} → {format_size(row.quantized_bits)}"


def _sizes(report: Report) -> str:
    return f"{format_size(report.float_bits)} → {format_size(report.quantized_bits)}"


def summary(report: Report) -> Text:
    """The verdict and what supports it, in a few lines."""
    share = 100 * report.quantized_bits / report.float_bits
    lines = [
        f"Verdict    {report.verdict}",
        f"Size       {_sizes(report)} ({share:.1f} %)",
        f"Loss       float {report.float_loss:.5f}, change {_change(report.measured)} "
        f"(95 % interval, {report.measured.n} held-out examples)",
    ]
    if report.accuracy is not None and report.float_accuracy is not None:
        a = report.accuracy
        lines.append(
            f"Accuracy   float {100 * report.float_accuracy:.2f} %, change "
            f"{100 * a.difference:+.2f} points ({a.gained} gained, {a.lost} lost, McNemar p = "
            f"{a.p_value:.2g})"
        )
    lines.append(
        f"Simulation {100 * report.differing_codes:.4f} % of the activation codes differ from the "
        f"simulation at the worst site, by at most {report.code_steps} step(s)"
    )
    lines.append(
        f"Integers   {report.integer_sites} of {report.planned_sites} planned sites hold an "
        "integer operation in the compiled program"
    )
    lines += [f"Note       {note}" for note in report.notes]
    return Text("\n".join(lines))


def coverage_table(graph: Graph, table: ModelTable) -> Group:
    """Every layer with its operations, and every dot or convolution that is no site, and why."""
    layers = Table(title="Layers", title_justify="left", pad_edge=False)
    layers.add_column("layer", overflow="fold")
    layers.add_column("operations")
    layers.add_column("weight")
    layers.add_column("size", justify="right")
    layers.add_column("MACs", justify="right")
    for row in table.layers:
        weight = graph.weights.get(row.name)
        shape = "x".join(map(str, weight.shape)) if weight else "activation x activation"
        layers.add_row(
            row.name,
            " ".join(row.kinds),
            shape,
            format_size(table.layer_bits(row.name, 32)) if weight else "-",
            f"{row.macs:,}",
        )
    parts: list[Any] = [layers, Text(graph.coverage.summary())]
    rest = _uncovered(graph.coverage)
    if rest is not None:
        parts.insert(1, rest)
    return Group(*parts)


def _uncovered(coverage: Coverage) -> Table | None:
    entries = [entry for entry in coverage.entries if entry.status != "site"]
    if not entries:
        return None
    table = Table(title="Not quantizable", title_justify="left", pad_edge=False)
    for name in ("operation", "where", "status", "why"):
        table.add_column(name, overflow="fold")
    for entry in entries:
        table.add_row(entry.op, entry.scope or "top level", entry.status, entry.reason)
    return table


def wide_console(file: IO[str] | None = None) -> Console:
    """A console as wide as the terminal, or 120 characters where the output is none."""
    console = Console(file=file, highlight=False)
    return console if console.is_terminal else Console(file=file, highlight=False, width=120)


def print_report(report: Report, console: Console | None = None) -> None:
    """Prints coverage, layers and verdict."""
    console = console or wide_console()
    console.print(Text(report.coverage.summary()))
    console.print(layer_table(report))
    console.print(summary(report))
