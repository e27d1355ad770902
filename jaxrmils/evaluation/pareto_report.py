"""Plans of many budgets, beside uniform ones: predicted, and measured on data that chose none.

Every plan is simulated by one compiled function. All numbers of a plan are paired with the float
model's on the same examples; all intervals are two-sided at 95 %, each by itself.
"""

from __future__ import annotations

import csv
import dataclasses
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from jaxrmils.evaluation.metrics import Metrics, metric_values
from jaxrmils.evaluation.simulate import Measured, SimulatedModel
from jaxrmils.policies import (
    LatencyTable,
    ParetoPoint,
    Plan,
    Recommendation,
    Tangents,
    plan_interval,
    recommend,
    uniform,
    usage,
)
from jaxrmils.progress import Progress, silent
from jaxrmils.statistics import Interval, accuracy_change, mean_interval

Kind = Literal["budget", "uniform", "run"]
PICKS = ("quality", "balanced", "compact")
USES = (
    "size_bytes",
    "size_share",
    "weight_bits",
    "activation_bits",
    "bops",
    "bops_share",
    "latency",
)
"""The names of `Limits`, in the order of columns."""


@dataclass(frozen=True)
class Contender:
    """A plan that is looked at.

    Attributes:
      name: what it is called.
      kind: "budget" for one of the sweep, "uniform", or "run" for the run's own.
      plan: the plan.
      limits: of a budget, by name.
    """

    name: str
    kind: Kind
    plan: Plan
    limits: Mapping[str, float] = dataclasses.field(default_factory=dict)

    @property
    def file(self) -> str:
        """The name of its plan's file."""
        return self.name.replace(" ", "-") + ".json"


@dataclass(frozen=True)
class MetricEstimate:
    """A metric of a plan on held-out data; a fraction, better the larger it is.

    Attributes:
      name: of the metric.
      mean: the plan's.
      change: its mean minus the float model's.
      lower: end of the change's two-sided 95 % interval.
      upper: the other end.
    """

    name: str
    mean: float
    change: float
    lower: float
    upper: float


@dataclass(frozen=True)
class PlanPoint:
    """A plan's cost and what it does to the loss.

    Attributes:
      name, kind, limits: as in `Contender`.
      file: the plan's file, beside the report.
      used: what the plan uses, by the names of `Limits`.
      formats: how many layers have each format.
      predicted: mean first-order change of the loss, on the data that chose the plan.
      measured: mean change of the loss on held-out data; None where it was not measured.
      metrics: on the same data.
    """

    name: str
    kind: Kind
    file: str
    limits: dict[str, float]
    used: dict[str, float]
    formats: dict[str, int]
    predicted: Interval
    measured: Interval | None = None
    metrics: tuple[MetricEstimate, ...] = ()

    @property
    def judged(self) -> Interval:
        """The loss change that counts: the measured one where there is one."""
        return self.measured or self.predicted

    @property
    def size_bytes(self) -> float:
        """Size of the stored model."""
        return self.used["size_bytes"]

    @property
    def change(self) -> float:
        """Mean of `judged`."""
        return self.judged.mean

    @property
    def lower(self) -> float:
        """Lower end of `judged`."""
        return self.judged.lower

    @property
    def upper(self) -> float:
        """Upper end of `judged`."""
        return self.judged.upper


@dataclass(frozen=True)
class HeldOut:
    """The data that plans were measured on, and the float model there.

    Attributes:
      split: its name.
      examples: how many.
      groups: how many groups they form; None where each stands for itself.
      loss: the float model's mean loss.
      metrics: the float model's metrics by name.
    """

    split: str
    examples: int
    loss: float
    groups: int | None = None
    metrics: dict[str, float] = dataclasses.field(default_factory=dict)


@dataclass(frozen=True)
class ParetoReport:
    """A sweep of budgets.

    Attributes:
      task: what was quantized.
      along: the limit that was varied.
      budgets: how many budgets were solved; some may have the same plan.
      objective: what was minimised.
      unit: of the loss.
      margin: a loss change that counts as none.
      float_bytes: size of the float model.
      float_loss: its mean loss on the data that the plans were chosen on.
      examples: of that data.
      points: the plans, budgets from the smallest on, then uniform ones, then the run's own.
      held_out: None where nothing was measured.
      latency: where predicted seconds come from, in words; "" without any.
      settings: of the policy, by name.
      notes: what a reader should not miss.
      sources: SHA-256 of the files that the sweep was made from, by their place in the run.
    """

    task: str
    along: str
    budgets: int
    objective: str
    unit: str
    margin: float
    float_bytes: float
    float_loss: float
    examples: int
    points: tuple[PlanPoint, ...]
    held_out: HeldOut | None = None
    latency: str = ""
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)
    notes: tuple[str, ...] = ()
    sources: dict[str, str] = dataclasses.field(default_factory=dict)

    def picks(
        self, margin: float | None = None, tolerance: float | None = None
    ) -> Recommendation[PlanPoint]:
        """Three picks among all plans; see `recommend`.

        Raises:
          PlanError: not 0 < margin <= tolerance.
        """
        margin = self.margin if margin is None else margin
        measured = self.held_out is not None
        options = {"margin": margin, "tolerance": tolerance, "unit": self.unit}
        return recommend(self.points, **options, measured=measured)


def contenders(
    points: Sequence[ParetoPoint],
    along: str,
    uniforms: Mapping[str, Plan],
    own: Plan | None = None,
) -> tuple[Contender, ...]:
    """The plans to compare, each budget's plan once, under the smallest of its budgets.

    Args:
      points: from `pareto`, in any order.
      along: the limit by which they are ordered.
      uniforms: uniform plans by format.
      own: the run's plan.
    """
    found: list[Contender] = []
    for point in sorted(points, key=lambda p: (p.limits.given()[along], p.size_bytes)):
        if all(each.plan.layers != point.plan.layers for each in found):
            name = f"budget {len(found) + 1:02d}"
            found.append(Contender(name, "budget", point.plan, point.limits.given()))
    found += [Contender(f"uniform {name}", "uniform", plan) for name, plan in uniforms.items()]
    if own is not None:
        found.append(Contender("this run", "run", own))
    return tuple(found)


def uniform_plans(
    scores: Tangents,
    formats: Sequence[str],
    *,
    skip: Sequence[str] = (),
    force: Mapping[str, str] | None = None,
) -> dict[str, Plan]:
    """A uniform plan for each format; layers that calibration never reached stay float.

    Args:
      scores: from `score` or `score_moments`.
      formats: their names.
      skip: globs of layers that stay float.
      force: format by glob.

    Raises:
      PlanError: an unknown format, or a pattern that matches nothing.
    """
    reached = scores.ranges.grids
    unreached = [
        row.name
        for row in scores.table.layers
        if any(a.site not in reached for a in row.activations)
    ]
    return {
        name: uniform(scores.table, name, skip=[*skip, *unreached], force=force) for name in formats
    }


def predicted_points(
    found: Sequence[Contender],
    scores: Tangents,
    *,
    latency: LatencyTable | None = None,
    clusters: Any = None,
) -> tuple[PlanPoint, ...]:
    """What plans use, and what the scores predict of them.

    Args:
      found: from `contenders`.
      scores: that they were made from.
      latency: to predict seconds.
      clusters: [N], the group of each scored example; None for none.

    Raises:
      PlanError: a plan of another model, a format that was not scored or has no time.
    """
    return tuple(
        PlanPoint(
            name=each.name,
            kind=each.kind,
            file=each.file,
            limits=dict(each.limits),
            used=usage(scores.table, each.plan.layers, latency),
            formats=each.plan.counts(),
            predicted=plan_interval(scores, each.plan, clusters),
        )
        for each in found
    )


def measured_points(
    found: Sequence[Contender],
    points: Sequence[PlanPoint],
    simulation: SimulatedModel,
    batches: Sequence[tuple[Any, Any]],
    *,
    split: str,
    groups: Any = None,
    metrics: Metrics | None = None,
    progress: Progress = silent,
) -> tuple[HeldOut, tuple[PlanPoint, ...]]:
    """Measures plans on held-out data, through one compiled simulation.

    Args:
      found: from `contenders`.
      points: of the same plans, from `predicted_points`.
      simulation: of the float model and the ranges that the scores were made with.
      batches: `(inputs, targets)` batches that chose none of the plans.
      split: their name.
      groups: [N], which of their examples belong together; None for none.
      metrics: of a model's outputs; None for the accuracy where targets are labels.
      progress: draws a bar over plans.

    Returns:
      The data, and the points with what was measured.

    Raises:
      EvaluationError: no data, losses that are not finite, metrics that do not fit.
      PlanError: a plan of another model.
      StatisticsError: groups that do not fit.
    """
    simulation = simulation.holding(each.plan for each in found)

    def run(plan: Plan | None) -> tuple[Measured, dict[str, np.ndarray]]:
        measured = simulation.run(batches, plan, keep_outputs=metrics is not None)
        if metrics is not None:
            return measured, metric_values(metrics, measured.outputs, measured.loss.size)
        right = measured.correct
        return measured, {} if right is None else {"accuracy": right.astype(np.float64)}

    before, judged = run(None)
    known: dict[Any, tuple[Interval, tuple[MetricEstimate, ...]]] = {}
    result = []
    pairs = list(zip(found, points, strict=True))
    for each, point in progress(pairs, "measuring plans", len(pairs)):
        key = tuple(each.plan.layers.items())
        if key not in known:
            after, values = run(each.plan)
            changes = mean_interval(after.loss - before.loss, groups=groups)
            estimates = (metric_estimate(n, judged[n], values[n], groups) for n in judged)
            known[key] = changes, tuple(estimates)
        changes, estimates = known[key]
        result.append(dataclasses.replace(point, measured=changes, metrics=estimates))
    size = mean_interval(before.loss, groups=groups)
    means = {name: float(values.mean()) for name, values in judged.items()}
    return HeldOut(split, size.n, size.mean, size.groups, means), tuple(result)


def metric_estimate(
    name: str, before: np.ndarray, after: np.ndarray, groups: Any = None
) -> MetricEstimate:
    """A metric's paired change with a two-sided 95 % interval.

    Of metrics that are 0 or 1, or do not change at all, the interval has Tango's bounds, which are
    not a point where no example differs; of others those of the mean.

    Args:
      name: of the metric.
      before: float64 [N] in [0, 1], the float model's.
      after: the same for the plan.
      groups: [N], which examples belong together; None for none.

    >>> same = np.ones(100)
    >>> found = metric_estimate("accuracy", same, same)
    >>> found.change, round(found.lower, 3), round(found.upper, 3)
    (0.0, -0.037, 0.037)
    """
    change = float((after - before).mean())
    if np.isin([before, after], (0.0, 1.0)).all():
        first, second = before == 1.0, after == 1.0
    elif np.array_equal(before, after):
        first = second = np.ones(before.shape, bool)
    else:
        found = mean_interval(after - before, groups=groups)
        return MetricEstimate(name, float(after.mean()), change, found.lower, found.upper)
    lower = -accuracy_change(first, second, alpha=0.025, groups=groups).drop_upper
    upper = accuracy_change(second, first, alpha=0.025, groups=groups).drop_upper
    return MetricEstimate(name, float(after.mean()), change, lower, upper)


def pareto_csv(report: ParetoReport) -> str:
    """One row a plan: what was asked, what it uses, what was predicted and measured.

    Args:
      report: the sweep.

    Returns:
      CSV as RFC 4180 has it. What a plan does not have is an empty cell. Sizes are in bytes, bits
      averages, latencies in seconds, metrics fractions.
    """
    metrics = list(report.held_out.metrics) if report.held_out else []
    parts = ("mean", "standard_error", "lower", "upper", "n", "groups")
    header = ["name", "kind", "file", "picks", "formats"]
    header += [f"limit_{name}" for name in USES] + list(USES)
    header += [f"{kind}_{part}" for kind in ("predicted", "measured") for part in parts]
    header += [f"{m}_{part}" for m in metrics for part in ("mean", "change", "lower", "upper")]
    names = pick_names(report)
    file = io.StringIO(newline="")
    writer = csv.writer(file)
    writer.writerow(header)
    for number, point in enumerate(report.points):
        formats = " ".join(f"{name}:{count}" for name, count in point.formats.items())
        row: list[Any] = [point.name, point.kind, point.file, " ".join(names[number]), formats]
        row += [point.limits.get(name) for name in USES] + [point.used.get(n) for n in USES]
        for interval in (point.predicted, point.measured):
            row += [getattr(interval, part, None) for part in parts]
        for each in point.metrics:
            row += [each.mean, each.change, each.lower, each.upper]
        writer.writerow(row)
    return file.getvalue()


def pick_names(report: ParetoReport) -> tuple[tuple[str, ...], ...]:
    """For every point, which of the picks it is."""
    found = report.picks()
    places = {name: getattr(found, name).index for name in PICKS}
    return tuple(
        tuple(name for name, place in places.items() if place == number)
        for number in range(len(report.points))
    )
