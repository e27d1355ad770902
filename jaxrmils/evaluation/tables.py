"""Reports for the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import IO, Any

from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from jaxrmils.evaluation.controls import THIS_PLAN, Control
from jaxrmils.evaluation.metrics import repeats_accuracy
from jaxrmils.evaluation.verify import LayerReport, Report
from jaxrmils.graph import Coverage, Graph, ModelTable
from jaxrmils.numerics import format_size
from jaxrmils.statistics import AccuracyChange, Interval, MetricChange, NonInferiority

_ARROWS = {"floor": "↓", "ceil": "↑", "nearest": "="}


def layer_table(report: Report) -> Table:
    """Format, predicted, attributed and measured loss change and size of every layer."""
    table = Table(
        title="Layers",
        title_justify="left",
        caption="Rounding of the inputs: = nearest, ↓ floor, ↑ ceil. Predicted: tangent, on "
        "selection data. Attributed: secant\nshare of the joint change, measured: the layer alone "
        "(last row: all layers), both on held-out data.",
        caption_justify="left",
        show_footer=True,
        pad_edge=False,
    )
    table.add_column("layer", footer="whole model", overflow="fold")
    table.add_column("format", no_wrap=True)
    for name, total in (
        ("predicted Δloss", report.predicted),
        ("attributed Δloss", report.attributed),
        ("measured Δloss", report.measured),
    ):
        table.add_column(name, justify="right", no_wrap=True, footer=_change(total))
    curved = any(row.curvature for row in report.layers)
    if curved:
        table.add_column("2nd order", justify="right", no_wrap=True)
    table.add_column("size", justify="right", no_wrap=True, footer=_sizes(report))
    for row in report.layers:
        table.add_row(
            row.name,
            f"{row.format} {''.join(_ARROWS[r] for r in row.rounding)}".strip(),
            _change(row.predicted),
            _change(row.attributed),
            _change(row.measured),
            *([_second_order(row.curvature)] if curved else []),
            _layer_size(row),
        )
    return table


def _second_order(interval: Interval | None) -> str:
    """The mean and, below it, its standard error."""
    return "-" if interval is None else f"{interval.mean:+.5f}\n(± {interval.standard_error:.5f})"


def joint_table(report: Report) -> Table:
    """The whole model's change: what the tangent and the secant say, and what was measured."""
    table = Table(title="All layers together, Δloss", title_justify="left", pad_edge=False)
    for name, data in (
        ("tangent", "selection"),
        ("secant", "selection"),
        ("secant", "held-out"),
        ("secant's rest", "held-out"),
        ("measured", "held-out"),
    ):
        table.add_column(f"{name}\n{data}", justify="right", no_wrap=True)
    table.add_row(
        _change(report.predicted),
        _change(report.predicted_secant),
        _change(report.attributed),
        _change(report.residual),
        _change(report.measured),
    )
    return table


def controls_table(controls: Sequence[Control]) -> Group:
    """A plan beside its controls, with notes below."""
    table = Table(
        title="Controls, simulated on the same held-out data", title_justify="left", pad_edge=False
    )
    confidence = 100 * (1 - controls[0].test.alpha) if controls else 95
    table.add_column("", overflow="fold")
    for name in ("size", "Δloss", f"{confidence:g} % bounds", "accuracy"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("verdict", no_wrap=True)
    for control in controls:
        test = control.test
        table.add_row(
            control.name,
            format_size(control.size_bits),
            f"{test.mean:+.5f}",
            f"[{test.lower_bound:+.5f}, {test.upper_bound:+.5f}]",
            "-"
            if control.accuracy_difference is None
            else f"{100 * control.accuracy_difference:+.2f} pt",
            _short_verdict(test),
            style="bold" if control.kind == THIS_PLAN else "",
        )
    notes = [Text(f"  {c.name}: {c.note}") for c in controls if c.note]
    return Group(table, *notes)


def _short_verdict(test: NonInferiority) -> str:
    if test.passed:
        return "lossless"
    return "not lossless" if test.lower_bound > test.margin else "no evidence"


def curve_table(report: Report) -> Table:
    """The prediction against the number of selection examples."""
    table = Table(
        title="With fewer selection examples",
        title_justify="left",
        caption="Sign: share of inputs whose mean gradient has the sign that all examples give it.",
        caption_justify="left",
        pad_edge=False,
    )
    for name in ("examples", "predicted Δloss", "interval", "sign"):
        table.add_column(name, justify="right", no_wrap=True)
    for point in report.curve:
        table.add_row(
            str(point.examples),
            f"{point.predicted.mean:+.5f}",
            _between(point.predicted),
            f"{100 * point.sign_agreement:.0f} %",
        )
    return table


def _change(interval: Interval | None) -> str:
    """The mean and, below it, the interval: it is not symmetric, so no ± would do."""
    return "-" if interval is None else f"{interval.mean:+.5f}\n{_between(interval)}"


def _between(interval: Interval) -> str:
    return f"[{interval.lower:+.5f}, {interval.upper:+.5f}]"


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
        f"Bounds     {_bounds(report.test)}",
        f"Size       {_sizes(report)} ({share:.1f} %)",
        f"Loss       float {report.float_loss:.5f}, change {report.measured.mean:+.5f} "
        f"{_between(report.measured)} ({100 * report.measured.level:g} % interval, "
        f"{report.measured.n} held-out examples)",
    ]
    told = repeats_accuracy(report)
    if report.accuracy is not None and report.float_accuracy is not None and not told:
        lines.append(
            f"Accuracy   float {100 * report.float_accuracy:.2f} %, {_accuracy(report.accuracy)}"
        )
    lines += [metric_line(metric) for metric in report.metrics]
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


def metric_line(metric: MetricChange) -> str:
    """A metric's means, change and bound of the drop, in percent and points.

    >>> from jaxrmils.statistics import metric_change
    >>> words = metric_line(metric_change("F1", [0.9, 0.8, 1.0], [0.9, 0.8, 0.7]))
    >>> words[:58]
    'F1         float 90.00 %, quantized 80.00 %, change -10.00'
    """
    change, counts = metric.change, metric.accuracy
    words = (
        f"{metric.name:<10} float {100 * metric.float_mean:.2f} %, quantized "
        f"{100 * metric.quantized_mean:.2f} %, change {100 * change.mean:+.2f} "
        f"[{100 * change.lower:+.2f}, {100 * change.upper:+.2f}] points "
        f"({100 * change.level:g} % interval), {100 * (1 - metric.alpha):g} % bound of the drop "
        f"{100 * metric.drop_upper:.2f} points"
    )
    if counts is None:
        return words
    return f"{words} ({counts.gained} gained, {counts.lost} lost, p = {counts.p_value:.2g})"


def _accuracy(a: AccuracyChange) -> str:
    words = (
        f"change {100 * a.difference:+.2f} points ({a.gained} gained, {a.lost} lost, "
        f"p = {a.p_value:.2g})"
    )
    if a.drop_upper is None:  # A report that was saved before there were bounds.
        return words
    return f"{words}, {100 * (1 - a.alpha):g} % bound of the drop {100 * a.drop_upper:.2f} points"


def _bounds(test: NonInferiority) -> str:
    bounds = test.bounds or {test.method: (test.lower_bound, test.upper_bound)}
    each = ", ".join(
        f"{name} {lower:+.5f} to {upper:+.5f}" for name, (lower, upper) in bounds.items()
    )
    clustered = "" if test.groups is None else f"; {test.groups} groups of dependent examples"
    return f"{each} ({test.method} decides{clustered})"


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
    """Prints coverage, layers, controls and verdict."""
    console = console or wide_console()
    console.print(Text(report.coverage.summary()))
    console.print(layer_table(report))
    if report.predicted is not None or report.attributed is not None:
        console.print(joint_table(report))
    if report.controls:
        console.print(controls_table(report.controls))
    if report.curve:
        console.print(curve_table(report))
    console.print(summary(report))
