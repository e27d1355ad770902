"""A saved run as a sweep of budgets reads it: scores, policy, costs, and the model if need be."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from jaxrmils import artifacts
from jaxrmils.artifacts.folder import read_manifest
from jaxrmils.artifacts.latency_file import load_latency
from jaxrmils.artifacts.moments_file import kept_scores, load_kept
from jaxrmils.artifacts.record_file import load_record
from jaxrmils.artifacts.report_files import RUN_KIND, RunFolder, load_run
from jaxrmils.cli import commands, pipeline, profile_command
from jaxrmils.cli.batch_sizes import (
    has_measured_costs,
    size_for_costs,
    with_batch_size,
    with_recorded_size,
)
from jaxrmils.cli.checks import (
    budget_settings,
    check_has_latency,
    check_refinable,
    limits_of,
    refinement_rounds,
)
from jaxrmils.cli.config import ConfigError, apply_overrides
from jaxrmils.cli.costs import costs_path, measured, save_run_costs, saved_costs
from jaxrmils.cli.defaults import base_config
from jaxrmils.data import DataError, Task
from jaxrmils.evaluation.pareto_report import uniform_plans
from jaxrmils.graph import Graph
from jaxrmils.policies import MEASURED_COSTS, Plan, PlanError, Tangents, usage
from jaxrmils.policies.budget.policy import Settings
from jaxrmils.progress import bars, silent
from jaxrmils.sensitivity import ScoreMoments

POLICY = "--config.policy."


@dataclass(frozen=True)
class SavedRun:
    """A saved run as a sweep reads it.

    Attributes:
      folder: its records.
      policy: its policy settings, with those of the command line.
      scores: what budgets are solved from.
      plan: its own plan.
      settings: what `pareto` takes.
      notes: what was left out, and why.
    """

    folder: RunFolder
    policy: Any
    scores: Tangents
    plan: Plan
    settings: Settings
    notes: tuple[str, ...] = ()


def load_saved(args: argparse.Namespace) -> SavedRun:
    """Reads a run's folder, without its model.

    Args:
      args: of `jaxrmils pareto`.

    Raises:
      ArtifactError: no run, one without scores, or a damaged file.
      ConfigError: a policy that can't be, of the run with what the command line changes.
    """
    folder = load_run(args.run_folder)
    kept = kept_scores(folder.path)
    if kept is None:
        loss = folder.run.config.get("loss", "task")
        raise artifacts.ArtifactError(
            f"{folder.path} holds no scores"
            + (f" (its loss is {loss!r}, whose tangent is zero)" if loss != "task" else "")
            + "; quantize with --config.loss=task, whose scores budgets are solved from"
        )
    scores = load_kept(kept)
    plan = artifacts.load_plan(folder.path / "plan.json")
    policy = _policy(args, folder)
    settings = budget_settings(policy)
    check_refinable(policy)
    if refinement_rounds(policy) and isinstance(scores, ScoreMoments):
        raise ConfigError(
            f"config field policy.refine is {policy.refine}, but {kept} holds moments, and a "
            "refinement needs every example's scores; give --config.policy.refine=0"
        )
    groups = read_manifest(kept)["info"].get("groups")
    settings["clusters"] = groups["selection"] if groups else None
    run = SavedRun(folder, policy, scores, plan, settings)
    run = run if settings.get("latency") else _with_latency(run, args.along)
    if args.along == "latency":
        check_has_latency("--along latency", run.settings)
    elif limits_of(policy).latency is not None:
        check_has_latency("config field policy.limits.latency", run.settings)
    return run


def _with_latency(run: SavedRun, along: str) -> SavedRun:
    """The run with the times that `jaxrmils profile` wrote, if they are of all that can occur."""
    path = run.folder.path / profile_command.FILE
    if not path.is_file():
        return run
    latency = load_latency(path)
    used = replace(run, settings={**run.settings, "latency": latency})
    float_plan = uniform_plans(run.scores, ["float"])["float"]
    try:
        for plan in (float_plan, run.plan, *uniforms_of(run).values()):
            usage(run.scores.table, plan.layers, latency)
    except PlanError as error:
        if along == "latency":
            raise
        note = f"The times in {path.name} are not shown: {error}."
        return replace(run, notes=(note,))
    return used


def _policy(args: argparse.Namespace, folder: RunFolder) -> Any:
    """The run's policy settings, with today's defaults where an older run has none."""
    config = base_config()
    saved = folder.run.config.get("policy", {})
    merged = {**config.policy.to_dict(), **{k: _tuples(v) for k, v in saved.items()}}
    merged["limits"] = {**config.policy.limits.to_dict(), **saved.get("limits", {})}
    config.policy = ConfigDict(merged)
    given = [text for text in args.overrides if text.startswith(POLICY)]
    given += [f"{POLICY}objective={args.objective}"] * (args.objective is not None)
    given += [f"{POLICY}latency_table={args.latency}"] * (args.latency is not None)
    return apply_overrides(config, given).policy


def _tuples(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def uniforms_of(run: SavedRun) -> dict[str, Plan]:
    """The uniform plans of the policy's formats, by name."""
    settings = run.settings
    return uniform_plans(
        run.scores,
        settings.get("formats", ()),
        skip=settings.get("skip", ()),
        force=settings.get("force"),
    )


def _task(args: argparse.Namespace) -> tuple[Any, Task]:
    """The run's config and task; what is missing names --no-verify."""
    rest = [text for text in args.overrides if not text.startswith(POLICY)]
    options = argparse.Namespace(config=args.config, overrides=rest, quiet=args.quiet)
    try:
        return commands.task_of(Path(args.run_folder), options)
    except (*commands.INPUT_ERRORS, ConfigError) as error:
        if isinstance(error, ConfigError) and rest:
            raise
        raise DataError(
            f"{error}. Measuring needs the run's model and data: give --config, or --no-verify for "
            "predictions from the saved scores alone"
        ) from error


@dataclass(frozen=True)
class Network:
    """The run's model and data, its config with the batch size.

    Attributes:
      config, task, graph, params: the run's.
      costs_size: examples in a batch of an objective's own pass.
    """

    config: Any
    task: Task
    graph: Graph
    params: Any
    costs_size: int


def network_of(args: argparse.Namespace, run: SavedRun) -> Network:
    """The run's model with its parameters, and its data.

    Raises:
      DataError: they are not there.
      PlanError: they are of another model.
    """
    config, task = _task(args)
    graph = pipeline.trace_task(task, pipeline.shortcuts_of(config))
    if graph.fingerprint != run.scores.table.fingerprint:
        raise PlanError(
            f"the task's model is another one than {run.folder.path} was made from (fingerprints "
            f"{graph.fingerprint[:12]} and {run.scores.table.fingerprint[:12]}), or has another "
            "config.shortcuts; quantize again, or give --no-verify"
        )
    params = task.load_params()
    sized = with_recorded_size(config, load_record(run.folder.path / "run.json", RUN_KIND), args)
    sized = with_batch_size(sized, graph, task)
    size, objective = sized.batch_size, run.policy.objective
    counted = has_measured_costs(config) and config.policy.objective == objective
    if objective in MEASURED_COSTS and not config.batch_size and not counted:
        known = (graph, params, task, run.scores.ranges)
        size = min(size, size_for_costs(config, run.policy, *known))
    return Network(sized, task, graph, params, size)


def with_costs(args: argparse.Namespace, run: SavedRun, network: Network | None) -> SavedRun:
    """The run with the costs of an objective that the scores do not hold, made where need be.

    Raises:
      ArtifactError: they must be made, and there is no network.
      ScoreError: a cost that is not finite.
    """
    name, path = run.policy.objective, run.folder.path
    if name not in MEASURED_COSTS:
        return run
    costs = saved_costs(run.policy, path)
    if costs is None and network is None:
        raise artifacts.ArtifactError(
            f"{costs_path(path, name)} holds no costs of these scores and formats, and making them "
            "needs the model; leave out --no-verify"
        )
    if costs is None:
        assert network is not None
        task, size = network.task, network.costs_size
        costs = measured(
            run.policy,
            network.graph,
            network.params,
            pipeline.batches(task.split("selection"), size),
            task.loss,
            run.scores.ranges,
            silent if args.quiet else bars,
        )
        save_run_costs(costs, run.policy, path)
    return replace(run, settings={**run.settings, "objective": costs})
