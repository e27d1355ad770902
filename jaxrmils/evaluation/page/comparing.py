"""Runs side by side: what differs, and what forbids to read their numbers as paired."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from jaxrmils.evaluation.metrics import repeats_accuracy
from jaxrmils.evaluation.page.saved import SavedLayer, SavedReport, SavedRun
from jaxrmils.evaluation.page.words import accuracy_lines, flatten, percent, points, rounding
from jaxrmils.evaluation.simulate import EvaluationError


@dataclass(frozen=True)
class NamedReport:
    """A run under the name that tells it from the others."""

    name: str
    report: SavedReport
    run: SavedRun


@dataclass(frozen=True)
class Comparison:
    """Runs side by side.

    Attributes:
      runs: at least two.
      warnings: why their numbers may not be paired; empty where they are.
      layers: for every layer of any run its line in each; None where a run does not have it.
      settings: the config's fields that differ, with a value per run.
    """

    runs: tuple[NamedReport, ...]
    warnings: tuple[str, ...]
    layers: dict[str, tuple[SavedLayer | None, ...]]
    settings: dict[str, tuple[str, ...]]

    @property
    def differing(self) -> int:
        """How many layers differ in format or rounding."""
        return sum(differs(lines) for lines in self.layers.values())


def compare(runs: Sequence[NamedReport]) -> Comparison:
    """Lays runs side by side.

    Raises:
      EvaluationError: fewer than two runs.
    """
    if len(runs) < 2:
        raise EvaluationError(f"{len(runs)} run to compare; expected two or more")
    tables = [{layer.name: layer for layer in run.report.layers} for run in runs]
    names = dict.fromkeys(name for table in tables for name in table)
    configs = [flatten(run.run.config) for run in runs]
    fields = dict.fromkeys(field for config in configs for field in config)
    settings = {field: tuple(c.get(field, "-") for c in configs) for field in fields}
    return Comparison(
        runs=tuple(runs),
        warnings=tuple(_warnings(runs)),
        layers={name: tuple(table.get(name) for table in tables) for name in names},
        settings={field: v for field, v in settings.items() if len(set(v)) > 1},
    )


def differs(lines: Sequence[SavedLayer | None]) -> bool:
    """Whether a layer is not the same in all runs."""
    return len({(line.format, line.rounding) if line else None for line in lines}) > 1


def decision(line: SavedLayer | None) -> str:
    """A layer's format and rounding in words."""
    if line is None:
        return "not there"
    directions = f", {rounding(line.rounding)}" if line.rounding else ""
    return line.format + directions


def judged(runs: Sequence[NamedReport]) -> list[tuple[str, Callable[[NamedReport], str]]]:
    """What else the runs are judged by, with the words on a run: accuracy, and every metric.

    Accuracy is left out where in every run the metric "Acc@1" says the same.
    """
    found: list[tuple[str, Callable[[NamedReport], str]]] = []
    if not all(repeats_accuracy(run.report) for run in runs):
        found.append(("accuracy", lambda run: _accuracy(run.report)))
    names = dict.fromkeys(metric.name for run in runs for metric in run.report.metrics)
    return found + [(name, partial(_metric, name)) for name in names]


def _metric(name: str, run: NamedReport) -> str:
    for metric in run.report.metrics:
        if metric.name == name:
            level = f"{100 * (1 - metric.alpha):g} %"
            return (
                f"{points(metric.change.mean)} (float {percent(metric.float_mean, 2)}; at {level} "
                f"the drop is below {100 * metric.drop_upper:.2f} points)"
            )
    return "-"


def _accuracy(report: SavedReport) -> str:
    """The accuracy change with its counts, or a dash."""
    if report.accuracy is None:
        return "-"
    a = report.accuracy
    return f"{accuracy_lines(report)[0]} ({a.gained} gained, {a.lost} lost)"


def _warnings(runs: Sequence[NamedReport]) -> list[str]:
    checks: tuple[tuple[str, Callable[[NamedReport], Any], str], ...] = (
        (
            "splits",
            lambda r: r.run.splits[:12],
            "the data or its roles differ, so that the numbers are not paired: other examples "
            "stand behind each column, and data that chose one plan may judge another",
        ),
        (
            "models",
            lambda r: r.run.model[:12],
            "the plans belong to different networks",
        ),
        (
            "margins",
            lambda r: f"{r.report.test.margin:.6g}",
            "the verdicts answer different questions",
        ),
        ("alphas", lambda r: f"{r.report.test.alpha:g}", "the bounds have different confidence"),
        ("numbers of examples", lambda r: r.report.test.n, "the numbers are not paired"),
    )
    found = []
    for what, pick, meaning in checks:
        values = [pick(run) for run in runs]
        if len(set(values)) > 1:
            pairs = ", ".join(
                f"{run.name} {v or 'none'}" for run, v in zip(runs, values, strict=True)
            )
            found.append(f"different {what} ({pairs}): {meaning}")
    losses = [run.report.float_loss for run in runs]
    same_data = len({run.run.splits for run in runs}) == 1
    if same_data and not all(math.isclose(losses[0], loss, rel_tol=1e-5) for loss in losses):
        words = ", ".join(f"{run.name} {run.report.float_loss:.5f}" for run in runs)
        found.append(
            f"different float losses on the same data ({words}): the float parameters differ, so "
            "that the changes start from different models"
        )
    return found
