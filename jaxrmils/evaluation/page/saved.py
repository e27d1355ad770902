"""A saved report, typed and checked: what pages, spreadsheets and terminal tables are made from."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from jaxrmils.evaluation.page.decoding import decode
from jaxrmils.evaluation.verify import Report
from jaxrmils.graph import Coverage

Rounding = Literal["nearest", "floor", "ceil"]
Outcome = Literal["lossless", "not lossless", "no evidence"]


@dataclass(frozen=True)
class Estimate:
    """A mean with its two-sided interval, in the loss's unit."""

    mean: float
    lower: float
    upper: float
    standard_error: float
    n: int
    level: float
    method: str
    groups: int | None = None


@dataclass(frozen=True)
class SavedTest:
    """A non-inferiority test; each bound is one-sided. `bounds` are other methods' bounds."""

    mean: float
    standard_error: float
    lower_bound: float
    upper_bound: float
    margin: float
    alpha: float
    n: int
    method: str
    passed: bool
    needed_n: int | None = None
    groups: int | None = None
    bounds: dict[str, tuple[float, float]] = field(default_factory=dict)

    @property
    def outcome(self) -> Outcome:
        """Which of the three verdicts it is."""
        if self.passed:
            return "lossless"
        return "not lossless" if self.lower_bound > self.margin else "no evidence"


@dataclass(frozen=True)
class SavedAccuracy:
    """Paired accuracy change; `difference` and `drop_upper` are fractions."""

    gained: int
    lost: int
    n: int
    difference: float
    p_value: float
    drop_upper: float | None = None
    alpha: float | None = None
    groups: int | None = None
    test: str = "McNemar, exact"


@dataclass(frozen=True)
class SavedMetric:
    """Paired change of a metric, as fractions; see `jaxrmils.statistics.MetricChange`."""

    name: str
    float_mean: float
    quantized_mean: float
    change: Estimate
    drop_upper: float
    alpha: float
    accuracy: SavedAccuracy | None = None


@dataclass(frozen=True)
class SavedLayer:
    """A layer's line; see `jaxrmils.evaluation.LayerReport`."""

    name: str
    format: str
    rounding: tuple[Rounding, ...]
    float_bits: int
    quantized_bits: int
    predicted: Estimate | None = None
    measured: Estimate | None = None
    attributed: Estimate | None = None
    curvature: Estimate | None = None


@dataclass(frozen=True)
class Control:
    """A plan beside the chosen one, tested on the same held-out data."""

    name: str
    kind: str
    size_bits: int
    test: SavedTest
    verdict: str
    accuracy_difference: float | None = None
    note: str = ""


@dataclass(frozen=True)
class CurvePoint:
    """The prediction from the first `examples` alone, and how many layers' signs it has right."""

    examples: int
    predicted: Estimate
    sign_agreement: float


@dataclass(frozen=True)
class Step:
    """One plan of the tested sequence; `test` is None where the sequence stopped before it."""

    size_bits: int
    formats: dict[str, int]
    selection: Estimate
    chosen: bool
    test: SavedTest | None = None


@dataclass(frozen=True)
class LosslessSearch:
    """The sequence of plans from which the smallest that passed was taken."""

    margin: float
    alpha: float
    words: str
    steps: tuple[Step, ...]


@dataclass(frozen=True)
class _Comparison:
    name: str
    size_bits: int
    mean: float
    upper_bound: float
    passed: bool
    verdict: str


@dataclass(frozen=True)
class SavedReport:
    """A report as its file has it; fields with defaults may be absent from older files.

    `controls` has the report's own plan first. Sizes are in bits, losses in the loss's unit.
    """

    layers: tuple[SavedLayer, ...]
    coverage: Coverage
    float_bits: int
    quantized_bits: int
    float_loss: float
    measured: Estimate
    test: SavedTest
    verdict: str
    differing_codes: float
    code_steps: int
    planned_sites: int
    integer_sites: int
    predicted: Estimate | None = None
    predicted_secant: Estimate | None = None
    attributed: Estimate | None = None
    residual: Estimate | None = None
    float_accuracy: float | None = None
    accuracy: SavedAccuracy | None = None
    metrics: tuple[SavedMetric, ...] = ()
    notes: tuple[str, ...] = ()
    controls: tuple[Control, ...] = ()
    comparisons: tuple[_Comparison, ...] = ()
    curve: tuple[CurvePoint, ...] = ()
    lossless: LosslessSearch | None = None
    mu: dict[str, dict[str, float]] = field(default_factory=dict)

    @property
    def share(self) -> float:
        """Size after as a fraction of the size before."""
        return self.quantized_bits / self.float_bits if self.float_bits else math.nan

    @property
    def format_counts(self) -> dict[str, int]:
        """How many layers have each format, in the order of first appearance."""
        names = [layer.format for layer in self.layers]
        return {name: names.count(name) for name in dict.fromkeys(names)}


@dataclass(frozen=True)
class SavedRun:
    """What a report was made with.

    Attributes:
      config: the run's config, as JSON values.
      splits: the splits' fingerprint.
      versions: of the packages, by name.
      config_file: where the config came from; "" for the embedded one.
      model: the fingerprint of the graph that the plan belongs to; "" if unknown.
    """

    config: dict[str, Any]
    splits: str
    versions: dict[str, str]
    config_file: str = ""
    model: str = ""


def read_report(report: Report | Mapping[str, Any]) -> SavedReport:
    """A report from its saved dict, checked field by field.

    Args:
      report: a `Report`, or the dict of its file, of this version or an older one.

    Raises:
      EvaluationError: a field is missing or has another type; the message names it.
    """
    saved = decode(SavedReport, report.to_dict() if isinstance(report, Report) else report)
    controls = saved.controls or tuple(_control(c, saved.test) for c in saved.comparisons)
    if not any(control.kind == "this plan" for control in controls):
        own = Control(
            name="this plan",
            kind="this plan",
            size_bits=saved.quantized_bits,
            test=saved.test,
            verdict=saved.verdict,
            accuracy_difference=saved.accuracy.difference if saved.accuracy else None,
        )
        controls = (own, *controls)
    return replace(saved, controls=tuple(sorted(controls, key=lambda c: c.kind != "this plan")))


def read_run(run: Mapping[str, Any], model: str = "") -> SavedRun:
    """What a run was made with, from run.json's dict and the plan's fingerprint.

    Raises:
      EvaluationError: a field is missing or has another type.
    """
    return replace(decode(SavedRun, run), model=model)


def _control(old: _Comparison, test: SavedTest) -> Control:
    """Older files kept of a comparison's test no more than its mean and upper bound."""
    return Control(
        name=old.name,
        kind="uniform",
        size_bits=old.size_bits,
        test=replace(
            test,
            mean=old.mean,
            upper_bound=old.upper_bound,
            passed=old.passed,
            lower_bound=math.nan,
            standard_error=math.nan,
            needed_n=None,
            bounds={},
        ),
        verdict=old.verdict,
    )
