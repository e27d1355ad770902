"""The main job: trace, calibrate, score, plan, quantize, verify, save."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import jax
import numpy as np

from jaxrmils.cli.batch_sizes import (
    has_measured_costs,
    one_example,
    with_batch_size,
    with_exact_batch_size,
)
from jaxrmils.cli.checks import (
    candidates_of,
    check_choice,
    check_config,
    forced,
    plan_of_file,
    search_of,
)
from jaxrmils.cli.config import ConfigError, resolve_function
from jaxrmils.cli.costs import budget_plan, measured
from jaxrmils.data import Batches, DataError, Dataset, Splits, Task, check_disjoint
from jaxrmils.data.splits import SPLIT_NAMES
from jaxrmils.evaluation import Metrics, Report, verify
from jaxrmils.graph import SHORTCUTS, Graph, Shortcuts, tabulate, trace
from jaxrmils.lowering import QuantizedModel, quantize
from jaxrmils.numerics import Ranges, calibrate
from jaxrmils.policies import (
    Costs,
    Lossless,
    Plan,
    Tangents,
    lossless,
    mu_values,
    rmils,
    steps_of,
    uniform,
)
from jaxrmils.policies.tangents import mean_loss
from jaxrmils.progress import Progress, silent
from jaxrmils.sensitivity import (
    Curvature,
    ScoreMoments,
    Scores,
    curvature,
    label_free,
    score,
    score_moments,
)
from jaxrmils.sensitivity.losses import LabelFree, float_outputs
from jaxrmils.statistics import default_margin
from jaxrmils.zoo import image_task, mnist_cnn_task, squad_task, text_task

TASKS = {
    "mnist_cnn": mnist_cnn_task,
    "images": image_task,
    "squad": squad_task,
    "texts": text_task,
}


@dataclass(frozen=True, eq=False)
class Result:
    """What a run made.

    Attributes:
      task, graph, ranges, scores, plan, model: the stages' results; no scores without labels, and
        moments in their place where the config asks for those.
      costs: of a budget's objective that needs a pass of its own; else None.
      params: the float parameters.
      report: predicted against measured, the controls and the verdict.
      mu: for the rmils policy, every layer's mu at 8 and 4 bits; else empty.
      batch_size: examples in a batch.
    """

    task: Task
    graph: Graph
    params: Any
    ranges: Ranges
    scores: Tangents | None
    costs: Costs | None
    plan: Plan
    model: QuantizedModel
    report: Report
    mu: dict[str, dict[int, float]]
    batch_size: int


def make_task(config: Any, path: str | Path | None, progress: Progress = silent) -> Task:
    """The task that a config names.

    Args:
      config: its `task` is a name such as "images" (see `jaxrmils.cli.defaults`),
        "package.module:function" or "file.py:function".
      path: the config file, beside which task files are looked for.
      progress: passed to the task.

    Raises:
      ConfigError: there is no such task, or it returns something else.
    """
    function = TASKS.get(config.task) or resolve_function(config.task, path, tuple(TASKS))
    task = function(config, progress)
    if not isinstance(task, Task):
        raise ConfigError(f"task {config.task!r} returned {type(task).__name__}, not a Task")
    return task


def batches(data: Dataset, size: int) -> Batches:
    """A split in batches; a batch larger than the split is cut down to it."""
    return data.batches(min(size, len(data)))


def shortcuts_of(config: Any) -> str:
    """What shortcuts read; a run that an earlier version kept does not say."""
    return config.get("shortcuts", SHORTCUTS[0])


def trace_task(task: Task, shortcuts: str = "float") -> Graph:
    """The task's graph, from shapes alone.

    Raises:
      ConfigError: unknown `shortcuts`, see `jaxrmils.trace`.
    """
    check_choice("config field shortcuts", shortcuts, SHORTCUTS)
    inputs = jax.tree.map(one_example, task.dataset.inputs)
    return trace(task.apply, task.shapes, inputs, shortcuts=cast("Shortcuts", shortcuts))


def _check_unseen(config: Any, task: Task) -> None:
    """DataError for splits that overlap or were trained on; names the field that says so."""
    try:
        check_disjoint(task.splits, task.training, task.dataset.groups)
    except DataError as error:
        fields = ("trained_on", "calibration_trained_on")
        said = [f"config.data.{field}" for field in fields if config.data[field]]
        if task.training is None or not said:
            raise
        raise DataError(
            f"{error}. {' and '.join(said)} says so: give such files as config.data.calibration, "
            "with config.data.calibration_splits=('ranges',), and unseen ones as config.data.files"
        ) from error


def make_plan(
    config: Any,
    graph: Graph,
    params: Any,
    task: Task,
    ranges: Ranges,
    scores: Tangents | None,
    costs: Costs | None = None,
    second_order: Curvature | None = None,
    progress: Progress = silent,
) -> tuple[Plan, Lossless | None]:
    """The plan of the configured policy, and how `lossless` came to it.

    Raises:
      PlanError: an option that the policy does not take, or limits that no plan is within.
    """
    policy, fixed = config.policy, forced(config.policy.force)
    if policy.name == "uniform":
        return uniform(tabulate(graph), policy.format, skip=policy.skip, force=fixed), None
    if policy.name == "file":
        return plan_of_file(policy), None
    if policy.name == "budget":
        selection = task.split("selection")
        data = batches(selection, config.batch_size)
        known = (graph, params, data, task.loss, ranges, scores, costs)
        return budget_plan(config, *known, clusters=selection.groups, progress=progress), None
    assert not isinstance(scores, ScoreMoments)
    if policy.name == "lossless":
        selection, confirmation = task.split("selection"), task.split("confirmation")
        found = lossless(
            graph,
            params,
            batches(selection, config.batch_size),
            batches(confirmation, config.batch_size),
            task.loss,
            ranges,
            margin=config.verify.margin or None,
            alpha=config.verify.alpha,
            unit=task.unit,
            search=search_of(policy),
            scores=scores,
            curvature=second_order,
            directed=policy.directed,
            groups=confirmation.groups,
            selection_groups=selection.groups,
            skip=policy.skip,
            force=fixed,
            progress=progress,
        )
        return found.plan, found
    assert scores is not None
    plan = rmils(
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
        force=fixed,
    )
    return plan, None


def without_labels(
    task: Task,
    graph: Graph,
    params: Any,
    kind: LabelFree,
    size: int,
    names: Sequence[str] = SPLIT_NAMES,
    progress: Progress = silent,
) -> Task:
    """The task with the float model's outputs in place of its targets.

    Args:
      task: whose targets are not read.
      graph: from `trace_task`.
      params: the float parameters.
      kind: "kl" or "squared".
      size: examples in a batch.
      names: the splits that are needed; the others keep their first example alone.
      progress: draws a bar.
    """
    parts = {name: getattr(task.splits, name) for name in SPLIT_NAMES}
    parts = {name: part if name in names else part[:1] for name, part in parts.items()}
    chosen, metrics = np.concatenate(list(parts.values())), task.metrics
    used = task.dataset.take(chosen)
    outputs = [y for _, y in float_outputs(graph, params, batches(used, size), progress=progress)]
    ends = np.cumsum([part.size for part in parts.values()])
    return replace(
        task,
        dataset=replace(used, targets=jax.tree.map(lambda *y: np.concatenate(y), *outputs)),
        splits=Splits(*np.split(np.arange(ends[-1]), ends[:-1]), seed=task.splits.seed),
        training=None,
        loss=label_free(kind),
        unit="nats" if kind == "kl" else "squared error",
        params=params,
        metrics=metrics and (lambda outputs, indices: metrics(outputs, chosen[indices])),
    )


def metrics_on(task: Task, split: str) -> Metrics | None:
    """The task's metrics of the outputs on one split, in its order; None where it has none."""
    metrics, indices = task.metrics, getattr(task.splits, split)
    return None if metrics is None else lambda outputs: metrics(outputs, indices)


@dataclass(frozen=True)
class Kept:
    """Where ranges and scores keep their progress, so that a killed run goes on.

    Attributes:
      folder: of the checkpoints.
      seconds: the least time between two saves.
    """

    folder: Path
    seconds: float = 60.0

    def options(self, part: str) -> dict[str, Any]:
        """What a pass over data takes."""
        return {"checkpoint": self.folder / part, "checkpoint_seconds": self.seconds}


def run(
    config: Any,
    path: str | Path | None = None,
    progress: Progress = silent,
    *,
    kept: Kept | None = None,
) -> Result:
    """Runs the main job.

    Args:
      config: see `jaxrmils.cli.defaults`.
      path: the config file it came from.
      progress: draws bars.
      kept: where to keep the progress, and to go on from; None for nowhere.

    Returns:
      All stages' results; nothing but the progress is written to disk.

    Raises:
      CheckpointError: the progress is that of another run.
    """
    task = make_task(config, path, progress)
    if config.batch_size > len(task.dataset):
        raise ConfigError(
            f"batch_size is {config.batch_size}, but the data set has {len(task.dataset)} examples"
        )
    _check_unseen(config, task)
    graph = trace_task(task, shortcuts_of(config))
    check_config(config, graph)
    if config.scores == "moments" and task.dataset.groups is not None:
        raise ConfigError(
            "config field scores is 'moments', but the data's examples belong to groups, whose "
            "standard errors need every example; use scores 'examples'"
        )
    is_exact = config.batch_size_exact and not config.batch_size
    config = with_batch_size(config, graph, task)
    params = task.load_params()
    given = task
    if config.loss != "task":
        size = config.batch_size
        task = without_labels(task, graph, params, config.loss, size, progress=progress)
    settings = config.ranges
    ranges = calibrate(
        graph,
        params,
        batches(task.split("ranges"), config.batch_size).inputs(),
        estimator=settings.estimator,
        symmetric=settings.symmetric,
        percentile=settings.percentile,
        progress=progress,
        **(kept.options("ranges") if kept else {}),
    )
    if is_exact:
        config = with_exact_batch_size(config, graph, params, task, ranges)
    size = config.batch_size
    selection = batches(task.split("selection"), size)
    arguments = (graph, params, selection, task.loss, ranges)
    wanted = candidates_of(config, graph)
    options: dict[str, Any] = {
        "activation_candidates": wanted.activations,
        "weight_candidates": wanted.weights,
        "progress": progress,
    }
    scores = costs = second_order = None
    if config.loss == "task":
        shift_probe = config.policy.name == "rmils" and config.policy.probe == "shift"
        resumed = kept.options("scores") if kept else {}
        if config.scores == "moments":
            scores = score_moments(*arguments, **options, **resumed)
        else:
            scores = score(*arguments, shift_probe=shift_probe, **options, **resumed)
    if config.curvature:
        second_order = curvature(*arguments, seed=config.seed, **options)
    if has_measured_costs(config):
        costs = measured(config.policy, *arguments, progress)
    plan, search = make_plan(
        config, graph, params, task, ranges, scores, costs, second_order, progress
    )
    model = quantize(graph, params, plan, ranges, backend=config.backend or None)
    report = _verified(
        config, graph, params, model, task, ranges, scores, second_order, search, progress
    )
    if search:
        report = replace(report, lossless=steps_of(search))
    return Result(
        task=given,
        graph=graph,
        params=params,
        ranges=ranges,
        scores=scores,
        costs=costs,
        plan=plan,
        model=model,
        report=report,
        mu=_mu(config, graph, scores),
        batch_size=size,
    )


def _verified(
    config: Any,
    graph: Graph,
    params: Any,
    model: QuantizedModel,
    task: Task,
    ranges: Ranges,
    scores: Tangents | None,
    second_order: Curvature | None,
    search: Lossless | None,
    progress: Progress,
) -> Report:
    """The report on the test split, which is read here and nowhere else."""
    settings, size = config.verify, config.batch_size
    test, selection = task.split("test"), task.split("selection")
    margin = search.margin if search else settings.margin or None
    if isinstance(scores, ScoreMoments):
        margin, scores = margin or default_margin(mean_loss(scores), unit=task.unit), None
    return verify(
        graph,
        params,
        model,
        batches(test, size),
        task.loss,
        ranges=ranges,
        scores=scores,
        curvature=second_order,
        margin=margin,
        alpha=settings.alpha,
        groups=test.groups,
        metrics=metrics_on(task, "test"),
        layers=settings.layers,
        attributed=settings.attribute,
        points=settings.points,
        selection=batches(selection, size) if settings.controls else None,
        selection_groups=selection.groups,
        compare=settings.compare,
        unit=task.unit,
        seed=config.seed,
        progress=progress,
    )


def _mu(config: Any, graph: Graph, scores: Tangents | None) -> dict[str, dict[int, float]]:
    policy = config.policy
    if policy.name != "rmils" or not isinstance(scores, Scores):
        return {}
    return mu_values(graph, scores, normalization=policy.normalization, probe=policy.probe)
