"""Saved reports: read and checked, and written as pages and spreadsheets."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxrmils.artifacts.errors import ArtifactError
from jaxrmils.artifacts.files import PathLike, replace_file
from jaxrmils.artifacts.plan_file import load_plan
from jaxrmils.artifacts.record_file import load_record
from jaxrmils.evaluation import EvaluationError, Report
from jaxrmils.evaluation.page import (
    SavedReport,
    SavedRun,
    read_report,
    read_run,
    report_page,
)
from jaxrmils.evaluation.spreadsheet import controls_csv, layers_csv, metrics_csv

REPORT_KIND, RUN_KIND = "jaxrmils report", "jaxrmils run"
SPREADSHEETS = ("layers", "controls", "metrics")
"""What is written as CSV, in the order of `write_spreadsheets`."""


@dataclass(frozen=True)
class RunFolder:
    """A run's records: the dict of report.json, the same checked and typed, and run.json."""

    path: Path
    document: dict[str, Any]
    report: SavedReport
    run: SavedRun


def load_run(folder: PathLike) -> RunFolder:
    """Reads a run folder's records; neither its model nor its scores.

    Args:
      folder: what `jaxrmils quantize` or `demo` wrote.

    Raises:
      ArtifactError: the folder or one of report.json, run.json and plan.json is missing or damaged,
        or a field is missing or has another type; the message names file and field.
    """
    folder = Path(folder)
    if not folder.is_dir():
        found = "is a file" if folder.exists() else "does not exist"
        raise ArtifactError(f"{folder} {found}; the folder of a run was expected")
    path = folder / "report.json"
    document = load_record(path, REPORT_KIND)
    report = _checked(path, lambda: read_report(document))
    path = folder / "run.json"
    info = load_record(path, RUN_KIND)
    model = load_plan(folder / "plan.json").fingerprint
    return RunFolder(folder, document, report, _checked(path, lambda: read_run(info, model)))


def write_page(
    report: Report | Mapping[str, Any], path: PathLike, run: SavedRun | None = None
) -> None:
    """Writes a report as an HTML page that opens offline, at once or not at all.

    Args:
      report: from `verify`, or the dict of a saved `report.json`.
      path: the file, such as "report.html".
      run: what the report was made with, for the end of the page.

    Raises:
      EvaluationError: the dict lacks a field, or one has another type.
      ArtifactError: path is a folder.
      OSError: the file can't be written; an older one is untouched.
    """
    replace_file(path, report_page(report, run).encode())


def write_spreadsheets(
    report: Report | Mapping[str, Any],
    layers: PathLike,
    controls: PathLike,
    metrics: PathLike | None = None,
) -> None:
    """Writes a report's layers, controls and metrics as CSV files, each at once or not at all.

    Args:
      report: from `verify`, or the dict of a saved `report.json`.
      layers: the file with one row a layer.
      controls: the file with one row a plan.
      metrics: the file with one row a metric; None for no such file.

    Raises:
      EvaluationError, ArtifactError, OSError: as `write_page`.
    """
    texts = layers_csv(report), controls_csv(report), metrics_csv(report)
    for path, text in zip((layers, controls, metrics), texts, strict=True):
        if path is not None:
            replace_file(path, text.encode())


def _checked(path: Path, read: Any) -> Any:
    try:
        return read()
    except EvaluationError as error:
        raise ArtifactError(
            f"{path}: {error}; the file was changed or is damaged. Restore it, or quantize again"
        ) from error
