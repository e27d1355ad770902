"""The main job: trace, calibrate, score, plan, quantize, verify, save."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxrmils import artifacts
from jaxrmils.cli.config import ConfigError, resolve_function
from jaxrmils.data import Dataset, Task, check_disjoint
from jaxrmils.evaluation import Report, measure, verify
from jaxrmils.graph import Graph, tabulate, trace
from jaxrmils.lowering import BACKENDS, QuantizedModel, quantize
from jaxrmils.numerics import ESTIMATORS, Ranges, calibrate
from jaxrmils.policies import (
    NORMALIZATIONS,
    POLICIES,
    PROBES,
    VARIANTS,
    Constraints,
    Plan,
    mu_values,
    parse_format,
    rmils,
    uniform,
)
from jaxrmils.progress import Progress, silent
from jaxrmils.sensitivity import Scores, score
from jaxrmils.statistics import NonInferiority, noninferiority, verdict_words
from jaxrmils.zoo import mnist_cnn_task

WIDTHS = ("int8", "int4", "float")
RUN_KIND, REPORT_KIND = "jaxrmils run", "jaxrmils report"
_TASKS = {"mnist_cnn": mnist_cnn_task}


@dataclass(frozen=True)
class Comparison:
    """A uniform plan beside the chosen one: its size and its test on the same held-out data."""

    name: str
    size_bits: int
    test: NonInferiority
    verdict: str


@dataclass(frozen=True, eq=False)
class Result:
    """What a run made.

    Attributes:
      task, graph, ranges, scores, plan, model: the stages' results.
      params: the float parameters.
      report: predicted against measured, and the verdict.
      comparisons: uniform plans on the same data.
      mu: for the rmils policy, every layer's mu at 8 and 4 bits; else empty.
    """

    task: Task
    graph: Graph
    params: Any
    ranges: Ranges
    scores: Scores
    plan: Plan
    model: QuantizedModel
    report: Report
    comparisons: tuple[Comparison, ...]
    mu: dict[str, dict[int, float]]


def make_task(config: Any, path: str | Path | None, progress: Progress = silent) -> Task:
    """The task that a config names.

    Args:
      config: its `task` is "mnist_cnn", "package.module:function" or "file.py:function".
      path: the config file, beside which task files are looked for.
      progress: passed to the task.

    Raises:
      ConfigError: there is no such task, or it returns something else.
    """
    function = _TASKS.get(config.task) or resolve_function(config.task, path)
    task = function(config, progress)
    if not isinstance(task, Task):
        raise ConfigError(f"task {config.task!r} returned {type(task).__name__}, not a Task")
    return task


def batches(data: Dataset, size: int) -> list[tuple[Any, Any]]:
    """A split in batches; a batch larger than the split is cut down to it."""
    return list(data.batches(min(size, len(data))))


def trace_task(task: Task) -> Graph:
    """The task's graph, from shapes alone."""
    inputs = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct((1, *x.shape[1:]), x.dtype), task.dataset.inputs
    )
    return trace(task.apply, task.shapes, inputs)


def make_plan(config: Any, graph: Graph, scores: Scores) -> Plan:
    """The plan of the configured policy.

    Raises:
      PlanError: an option that the policy does not take.
    """
    policy = config.policy
    force = _forced(policy.force)
    if policy.name == "uniform":
        return uniform(scores.table, policy.format, skip=policy.skip, force=force)
    return rmils(
        graph,
        scores,
        mu=policy.mu,
        variant=policy.variant,
        normalization=policy.normalization,
        probe=policy.probe,
        bits=policy.bits,
        weights=policy.weights,
        lookups=policy.lookups,
        skip=policy.skip,
        force=force,
    )


def check_config(config: Any, graph: Graph) -> None:
    """Finds mistakes in a config before anything expensive runs.

    Raises:
      ConfigError: an unknown choice or a number out of range.
      PlanError: a pattern that matches nothing, an unknown format.
    """
    policy, settings = config.policy, config.ranges
    choices = {
        "policy.name": (policy.name, POLICIES),
        "policy.variant": (policy.variant, VARIANTS),
        "policy.normalization": (policy.normalization, NORMALIZATIONS),
        "policy.probe": (policy.probe, PROBES),
        "policy.weights": (policy.weights, ("same", *WIDTHS)),
        "policy.lookups": (policy.lookups, WIDTHS),
        "ranges.estimator": (settings.estimator, ESTIMATORS),
        "backend": (config.backend, ("", *BACKENDS)),
    }
    for field, (value, allowed) in choices.items():
        if value not in allowed:
            words = ", ".join(repr(choice) for choice in allowed)
            raise ConfigError(f"config field {field} is {value!r}; expected one of {words}")
    if not policy.bits or not set(policy.bits) <= {8, 4}:
        raise ConfigError(f"config field policy.bits is {policy.bits}; expected 8, 4 or both")
    if config.batch_size < 1 or config.verify.margin < 0 or not 0 < config.verify.alpha < 0.5:
        raise ConfigError(
            f"batch_size {config.batch_size}, verify.margin {config.verify.margin} and "
            f"verify.alpha {config.verify.alpha}: expected >= 1, >= 0, and between 0 and 0.5"
        )
    Constraints(policy.skip, _forced(policy.force)).resolve(tabulate(graph))
    for name in (policy.format, *config.verify.compare):
        parse_format(name)


def _forced(entries: tuple[str, ...]) -> dict[str, str]:
    force = {}
    for entry in entries:
        pattern, separator, format_ = entry.rpartition("=")
        if not separator:
            raise ConfigError(
                f"policy.force holds {entry!r}; write glob=format, as in Dense_*=w8a8"
            )
        force[pattern] = format_
    return force


def run(config: Any, path: str | Path | None = None, progress: Progress = silent) -> Result:
    """Runs the main job.

    Args:
      config: see `jaxrmils.cli.defaults`.
      path: the config file it came from.
      progress: draws bars.

    Returns:
      All stages' results; nothing is written to disk.
    """
    task = make_task(config, path, progress)
    if config.batch_size > len(task.dataset):
        raise ConfigError(
            f"batch_size is {config.batch_size}, but the data set has {len(task.dataset)} examples"
        )
    check_disjoint(task.splits, task.training)
    graph = trace_task(task)
    check_config(config, graph)
    params = task.load_params()
    size, settings = config.batch_size, config.ranges
    ranges = calibrate(
        graph,
        params,
        [inputs for inputs, _ in batches(task.split("ranges"), size)],
        estimator=settings.estimator,
        symmetric=settings.symmetric,
        percentile=settings.percentile,
        progress=progress,
    )
    scores = score(
        graph,
        params,
        batches(task.split("selection"), size),
        task.loss,
        ranges,
        shift_probe=config.policy.name == "rmils" and config.policy.probe == "shift",
        progress=progress,
    )
    plan = make_plan(config, graph, scores)
    model = quantize(graph, params, plan, ranges, backend=config.backend or None)
    held_out = batches(task.split("test"), size)
    report = verify(
        graph,
        params,
        model,
        held_out,
        task.loss,
        ranges=ranges if config.verify.layers else None,
        scores=scores,
        margin=config.verify.margin or None,
        alpha=config.verify.alpha,
        progress=progress,
    )
    comparisons = _compare(config, graph, params, ranges, held_out, task, report, progress)
    return Result(
        task=task,
        graph=graph,
        params=params,
        ranges=ranges,
        scores=scores,
        plan=plan,
        model=model,
        report=report,
        comparisons=comparisons,
        mu=_mu(config, graph, scores),
    )


def _mu(config: Any, graph: Graph, scores: Scores) -> dict[str, dict[int, float]]:
    policy = config.policy
    if policy.name != "rmils":
        return {}
    return mu_values(graph, scores, normalization=policy.normalization, probe=policy.probe)


def _compare(
    config: Any,
    graph: Graph,
    params: Any,
    ranges: Ranges,
    held_out: list[tuple[Any, Any]],
    task: Task,
    report: Report,
    progress: Progress,
) -> tuple[Comparison, ...]:
    if not config.verify.compare:
        return ()
    before = measure(graph, lambda x: graph.apply(params, x), held_out, task.loss)
    result = []
    names = config.verify.compare
    for name in progress(names, "measuring uniform plans", len(names)):
        table = tabulate(graph)
        model = quantize(
            graph, params, uniform(table, name), ranges, backend=config.backend or None
        )
        after = measure(graph, model, held_out, task.loss)
        test = noninferiority(
            after.loss - before.loss, margin=report.test.margin, alpha=report.test.alpha
        )
        result.append(Comparison(f"uniform {name}", model.size_bits, test, verdict_words(test)))
    return tuple(result)


def save(result: Result, config: Any, path: str | Path | None, out: str | Path) -> list[str]:
    """Writes a run's files.

    Args:
      result: from `run`.
      config: its config.
      path: the config file, recorded by name.
      out: the folder; files of an earlier run are replaced one by one, each only when complete.

    Returns:
      What was written, relative to `out`.
    """
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    info = {
        "config": json.loads(config.to_json()),
        "config_file": str(Path(path).resolve()) if path else "",
        "splits": result.task.splits.fingerprint,
        "versions": artifacts.versions(),
    }
    artifacts.save_plan(result.plan, out / "plan.json")
    artifacts.save_scores(result.scores, out / "scores", info={"seed": config.seed})
    artifacts.save_model(result.model, out / "model", info={"seed": config.seed})
    artifacts.save_record(report_dict(result), out / "report.json", REPORT_KIND)
    artifacts.save_record(info, out / "run.json", RUN_KIND)
    return ["plan.json", "scores", "model", "run.json", "report.json"]


def report_dict(result: Result) -> dict[str, Any]:
    """The report and the comparisons as plain JSON values."""
    report = result.report.to_dict()
    report["mu"] = result.mu
    report["comparisons"] = [
        {
            "name": c.name,
            "size_bits": c.size_bits,
            "mean": c.test.mean,
            "upper_bound": c.test.upper_bound,
            "passed": c.test.passed,
            "verdict": c.verdict,
        }
        for c in result.comparisons
    ]
    return json.loads(json.dumps(report, default=_plain))


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, np.generic) else str(value)
