"""Reports as CSV, for spreadsheets and data frames: every number in full precision."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from jaxrmils.evaluation.page.saved import Estimate, SavedLayer, read_report
from jaxrmils.evaluation.verify import Report

_ESTIMATES = ("predicted", "attributed", "measured", "curvature")
_PARTS = ("mean", "standard_error", "lower", "upper", "n", "level", "method", "groups")


def layers_csv(report: Report | Mapping[str, Any]) -> str:
    """One row a layer: its decision, sizes in bits, estimates with intervals, and mu.

    Args:
      report: a `Report`, or the dict of a saved `report.json`.

    Returns:
      CSV as RFC 4180 has it: a header, commas, lines that end in CR LF, cells quoted where needed.
      What the report does not have is an empty cell; the columns are always the same.

    Raises:
      EvaluationError: the dict lacks a field, or one has another type.
    """
    saved = read_report(report)
    header = ["layer", "format", "rounding", "float_bits", "quantized_bits"]
    header += [f"{name}_{part}" for name in _ESTIMATES for part in _PARTS]
    header += ["mu_int8", "mu_int4"]
    rows = []
    for layer in saved.layers:
        mu = saved.mu.get(layer.name, {})
        rows.append([*_layer_cells(layer), mu.get("8"), mu.get("4")])
    return _csv(header, rows)


def _layer_cells(layer: SavedLayer) -> list[Any]:
    cells: list[Any] = [layer.name, layer.format, " ".join(layer.rounding)]
    cells += [layer.float_bits, layer.quantized_bits]
    for name in _ESTIMATES:
        estimate: Estimate | None = getattr(layer, name)
        cells += [getattr(estimate, part, None) for part in _PARTS]
    return cells


def controls_csv(report: Report | Mapping[str, Any]) -> str:
    """One row a plan that was tested on the held-out data, the report's own first.

    Args:
      report: a `Report`, or the dict of a saved `report.json`.

    Returns:
      CSV, see `layers_csv`. Sizes are in bits, `accuracy_difference` is a fraction.

    Raises:
      EvaluationError: the dict lacks a field, or one has another type.
    """
    saved = read_report(report)
    numbers = ("mean", "standard_error", "lower_bound", "upper_bound", "margin", "alpha", "n")
    numbers += ("groups", "method", "passed", "needed_n")
    header = ["name", "kind", "size_bits", "share", *numbers]
    header += ["verdict", "accuracy_difference", "note"]
    rows = []
    for control in saved.controls:
        share = control.size_bits / saved.float_bits if saved.float_bits else None
        cells = [control.name, control.kind, control.size_bits, share]
        cells += [getattr(control.test, name) for name in numbers]
        rows.append([*cells, control.verdict, control.accuracy_difference, control.note])
    return _csv(header, rows)


def metrics_csv(report: Report | Mapping[str, Any]) -> str:
    """One row a metric of the whole integer model against the float model.

    Args:
      report: a `Report`, or the dict of a saved `report.json`.

    Returns:
      CSV, see `layers_csv`; a header alone for a report without metrics. Means, changes and bounds
      are fractions; `gained`, `lost` and `p_value` are of metrics that are 0 or 1.

    Raises:
      EvaluationError: the dict lacks a field, or one has another type.
    """
    counts = ("gained", "lost", "p_value")
    header = ["name", "float_mean", "quantized_mean", *(f"change_{part}" for part in _PARTS)]
    header += ["drop_upper", "alpha", *counts]
    rows = []
    for metric in read_report(report).metrics:
        cells = [metric.name, metric.float_mean, metric.quantized_mean]
        cells += [getattr(metric.change, part) for part in _PARTS]
        cells += [metric.drop_upper, metric.alpha]
        rows.append([*cells, *(getattr(metric.accuracy, name, None) for name in counts)])
    return _csv(header, rows)


def _csv(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    file = io.StringIO(newline="")
    writer = csv.writer(file)
    writer.writerow(header)
    writer.writerows([_cell(cell) for cell in row] for row in rows)
    return file.getvalue()


def _cell(value: Any) -> Any:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, bool):
        return "true" if value else "false"
    return value
