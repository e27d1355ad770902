"""Rows of the paper's table: what is measured of a plan on one draw's test examples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxrmils.data import Task
from jaxrmils.evaluation import Measured
from jaxrmils.graph import ModelTable
from jaxrmils.policies import Plan
from jaxrmils.statistics import mean_interval, metric_change

# What the paper reports, on other weights and other data, by task and by what the network's name
# holds. It has no classification of texts.
_RESNET = "ResNet-18 on ImageNet: float 69.77 / 89.07, loss 1.247004, 44.7 MB; RMILS 69.75 / "
_RESNET += "89.092, 1.246837, 12.27 MB, in under 5 minutes"
_MOBILENET = "MobileNetV2: float 71.89 / 90.292, loss 1.14792, 13.6 MB; RMILS 71.882 / 90.298, "
_MOBILENET += "1.147831, 4.13 MB"
_BERT = "BERT-base on SQuAD: float EM 80.492, F1 88.1464, 421 MB; RMILS 80.5109 / 88.1458, "
_BERT += "254.25 MB"
PUBLISHED = {
    "images": {"resnet": _RESNET, "efficientnet": _MOBILENET, "mobilenet": _MOBILENET},
    "squad": {"": _BERT},
}


def published(config: Any) -> str:
    """What the paper reports of a config's task on a network like its own; "" for nothing."""
    rows = PUBLISHED.get(config.task, {})
    return next((words for key, words in rows.items() if key in config.model.name), "")


@dataclass(frozen=True)
class Row:
    """One plan on one draw.

    Attributes:
      name: of the row.
      loss: mean loss.
      change: mean loss change against float, with its 95 % interval over examples: mean, lower,
        upper.
      above: is the interval wholly above the margin?
      metrics: per metric, its mean and its change against float, both in [0, 1], the change's 95 %
        interval over examples, and the one-sided 95 % upper bound of the drop.
      megabytes: size of the model.
      share: of the float model's size.
      weight_bits: average bits of a weight.
      formats: per layer.
      seconds: calibration, scores and plan; None where nothing was searched.
      moved: per metric, the test examples at which it changed, by position, and by how much.
    """

    name: str
    loss: float
    change: Sequence[float]
    above: bool
    metrics: dict[str, dict[str, Any]]
    megabytes: float
    share: float
    weight_bits: float
    formats: dict[str, str]
    seconds: float | None
    moved: dict[str, Sequence[Sequence[float]]]

    def summary(self) -> str:
        """One line while the experiment runs."""
        metrics = ", ".join(
            f"{name} {100 * m['mean']:.2f} (drop at most {100 * m['drop']:.2f})"
            for name, m in self.metrics.items()
        )
        mean, lower, upper = self.change
        return (
            f"{self.name}: {metrics}, loss {self.loss:.4f}, change {mean:+.5f} [{lower:+.5f}, "
            f"{upper:+.5f}], {self.megabytes:.3f} MB ({100 * self.share:.1f} %)"
        )


@dataclass(frozen=True)
class Draw:
    """The rows of one deal of the examples.

    Attributes:
      seed: of the deal.
      units: what every test example belongs to: its number, or its group's.
      rows: the first is float's.
    """

    seed: int
    units: Sequence[int]
    rows: Sequence[Row]


def tested(task: Task) -> list[int]:
    """What every test example of a task belongs to."""
    groups = task.split("test").groups
    return [int(unit) for unit in (task.splits.test if groups is None else groups)]


def judged(
    name: str,
    task: Task,
    plain: Measured,
    run: Measured,
    table: ModelTable,
    plan: Plan | None,
    margin: float,
    seconds: float | None,
) -> Row:
    """A row from what the float model and a plan do on the test examples."""
    indices, groups = task.splits.test, task.split("test").groups
    metrics, moved = {}, {}
    if task.metrics is not None:
        before, after = task.metrics(plain.outputs, indices), task.metrics(run.outputs, indices)
        metrics = {key: _changed(key, before[key], after[key], groups) for key in before}
        moved = {key: _moved(after[key] - before[key].astype(np.float64)) for key in before}
    change = mean_interval(run.loss - plain.loss, groups=groups)
    bits = table.float_bits if plan is None else table.size_bits(plan.formats())
    rows = [row for row in table.layers if row.has_weight]
    widths = {row.name: 32 if plan is None else plan.layers[row.name].weight_bits for row in rows}
    weights = sum(row.weight_size for row in rows)
    return Row(
        name=name,
        loss=float(run.loss.mean()),
        change=(change.mean, change.lower, change.upper),
        above=change.lower > margin,
        metrics=metrics,
        megabytes=bits / 8e6,
        share=bits / table.float_bits,
        weight_bits=sum(row.weight_size * widths[row.name] for row in rows) / weights,
        formats={} if plan is None else {k: layer.format for k, layer in plan.layers.items()},
        seconds=seconds,
        moved=moved,
    )


def _moved(change: np.ndarray) -> list[tuple[int, float]]:
    return [(int(i), float(change[i])) for i in np.flatnonzero(change)]


def _pooled_drop(draws: Sequence[Draw], rows: Sequence[Row], name: str) -> float:
    """One-sided 95 % upper bound of a metric's drop over all draws, clustered by unit: an example
    may be tested in several draws.
    """
    units, changes = [], []
    for draw, row in zip(draws, rows, strict=True):
        change = np.zeros(len(draw.units))
        for position, amount in row.moved[name]:
            change[int(position)] = amount
        units.append(draw.units)
        changes.append(change)
    found = mean_interval(-np.concatenate(changes), level=0.9, groups=np.concatenate(units))
    return found.upper


def _changed(name: str, before: np.ndarray, after: np.ndarray, groups: Any) -> dict[str, Any]:
    found = metric_change(name, before, after, groups=groups)
    return {
        "mean": found.quantized_mean,
        "change": (found.change.mean, found.change.lower, found.change.upper),
        "drop": found.drop_upper,
    }


def markdown(draws: Sequence[Draw], config: Any) -> list[str]:
    """The table: means over draws, with Student's 95 % intervals over draws."""
    names = list(draws[0].rows[0].metrics)
    head = ["", *names, "loss", "change of the loss", "over examples", "above the margin"]
    head += [f"{name}: drop at most, {how}" for name in _bounded(names) for how in HOW]
    head += ["MB", "% of float", "weight bits", "seconds"]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for rows in zip(*(draw.rows for draw in draws), strict=True):
        lines.append("| " + " | ".join(_cells(draws, rows, names)) + " |")
    sizes = ", ".join(f"{count:,} for {name}" for name, count in config.splits.items())
    what = "groups" if config.task == "squad" else "examples"
    lines += [
        "",
        f"{len(draws)} draws of {what}: {sizes}. `change of the loss` ± over draws, `over "
        "examples` the half width of a draw's own 95 % interval. `drop at most`: one-sided 95 % "
        "upper bounds, the mean of the draws' and that of all draws together, clustered by "
        f"{what}. Seconds are medians: calibration, scores and plan.",
        "",
        own_temperatures(draws),
    ]
    if words := published(config):
        lines += ["", f"Published, on other weights: {words}."]
    lines += ["", "Formats of the `lossless` plan of the first draw:", ""]
    (plan,) = (row for row in draws[0].rows if row.name == "lossless")
    by_format: dict[str, list[str]] = {}
    for layer, format_ in plan.formats.items():
        by_format.setdefault(format_, []).append(f"`{layer}`")
    lines += [f"- {format_}: {', '.join(layers)}" for format_, layers in by_format.items()]
    return lines


def own_temperatures(draws: Sequence[Draw]) -> str:
    """`lossless` against float where each has its own temperature, and what confidence explains."""
    rows = [{row.name: row for row in draw.rows} for draw in draws]
    plain = [each["lossless"].change[0] for each in rows]
    cooled = [
        each["lossless, own temperature"].loss - each["float, own temperature"].loss
        for each in rows
    ]
    words = (
        f"`lossless` against float: {_over(plain, 4, '+')}; both at their own temperatures, paired "
        f"within a draw: {_over(cooled, 4, '+')}."
    )
    gain = np.mean(plain)
    if gain < 0 and len(plain) > 1 and mean_interval(np.array(plain), method="t").upper < 0:
        words += f" Of the gain {100 * (1 - np.mean(cooled) / gain):.0f} % is confidence."
    return words


HOW = ("a draw", "all draws")


def _bounded(names: Sequence[str]) -> list[str]:
    return [name for name in names if name != "Acc@5"]


def _cells(draws: Sequence[Draw], rows: Sequence[Row], names: Sequence[str]) -> list[str]:
    halves = [(row.change[2] - row.change[1]) / 2 for row in rows]
    seconds = [row.seconds for row in rows if row.seconds is not None]
    return [
        rows[0].name,
        *(_over([100 * row.metrics[name]["mean"] for row in rows], 2) for name in names),
        _over([row.loss for row in rows], 4),
        _over([row.change[0] for row in rows], 4),
        f"± {np.median(halves):.4f}",
        f"{sum(row.above for row in rows)} of {len(rows)}",
        *(
            f"{100 * bound:.2f}"
            for name in _bounded(names)
            for bound in (
                np.mean([row.metrics[name]["drop"] for row in rows]),
                _pooled_drop(draws, rows, name),
            )
        ),
        _over([row.megabytes for row in rows], 3),
        _over([100 * row.share for row in rows], 1),
        _over([row.weight_bits for row in rows], 2),
        f"{np.median(seconds):.0f}" if seconds else "",
    ]


def _over(values: Sequence[float], digits: int, sign: str = "") -> str:
    """Mean and half of Student's interval over draws."""
    if len(values) < 2 or np.ptp(values) == 0:
        return f"{values[0]:{sign}.{digits}f}"
    interval = mean_interval(np.array(values), method="t")
    half = (interval.upper - interval.lower) / 2
    return f"{interval.mean:{sign}.{digits}f} ± {half:.{digits}f}"
