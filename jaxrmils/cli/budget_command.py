"""`jaxrmils pareto`: what budgets cost."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict
from rich.text import Text

from jaxrmils import artifacts
from jaxrmils.artifacts.folder import read_manifest
from jaxrmils.artifacts.latency_file import load_latency
from jaxrmils.artifacts.moments_file import kept_scores, load_kept
from jaxrmils.artifacts.pareto_file import (
    FOLDER,
    pareto_document,
    save_pareto,
    sources,
)
from jaxrmils.artifacts.report_files import RUN_KIND, RunFolder, load_run
from jaxrmils.cli import commands, pipeline, profile_command
from jaxrmils.cli.budget_printing import pareto_table, picks_document, print_picks
from jaxrmils.cli.checks import BUDGET_OBJECTIVES, budget_settings, check_choice, limits_of
from jaxrmils.cli.commands import Outcome, console_of
from jaxrmils.cli.config import ConfigError, apply_overrides
from jaxrmils.cli.costs import costs_path, measured, save_run_costs, saved_costs
from jaxrmils.cli.defaults import base_config
from jaxrmils.data import DataError, Task
from jaxrmils.evaluation import SimulatedModel
from jaxrmils.evaluation.page.pareto_page import statements
from jaxrmils.evaluation.pareto_report import (
    USES,
    Contender,
    HeldOut,
    ParetoReport,
    PlanPoint,
    contenders,
    measured_points,
    predicted_points,
    uniform_plans,
)
from jaxrmils.graph import Graph
from jaxrmils.policies import MEASURED_COSTS, Limits, Plan, PlanError, Tangents, pareto, usage
from jaxrmils.policies.budget import problem
from jaxrmils.policies.budget.policy import Settings
from jaxrmils.policies.budget.solve import infeasible
from jaxrmils.policies.tangents import mean_loss
from jaxrmils.progress import bars, silent

ROOM = 1.25
_POLICY = "--config.policy."


def pareto_arguments(parser: argparse.ArgumentParser) -> None:
    """Solves many budgets from a saved run's scores, measures their plans, the uniform ones and the
    run's own on the confirmation split, and writes RUN/pareto/: pareto.html (loss and accuracy
    against size and against latency or bit operations), pareto.csv, pareto.json, and every plan as
    a file that `jaxrmils.load_plan` reads. Solving needs neither the model nor the data; an
    objective that the scores do not hold (squared_output, fisher, hessian_trace, sqnr, measured)
    takes a pass over the selection split, once: its costs are kept in RUN/costs/.

      jaxrmils pareto runs/mnist                                  10 budgets of size
      jaxrmils pareto runs/mnist --along weight_bits --values 4,5,6,8
      jaxrmils pareto runs/mnist --no-verify                      predictions, in a moment
      jaxrmils pareto runs/mnist --objective squared_output       what is minimised
      jaxrmils pareto runs/mnist --config.policy.limits.activation_bits=8

    What the run's config says of the policy (formats, skip, force, groups, capabilities, limits
    other than the one that is varied) holds for every budget, and can be overridden. The test split
    is not read: it is left for the certificate of the plan that you take:

      jaxrmils quantize --config FILE --out RUN2 --config.policy.name=file \\
        --config.policy.file=RUN/pareto/budget-03.json
    """
    parser.add_argument("run_folder", metavar="RUN", help="a folder that quantize or demo wrote")
    amounts = parser.add_mutually_exclusive_group()
    amounts.add_argument(
        "--values",
        "--sizes",
        metavar="V,V,...",
        help="the budgets, such as 0.15,0.2 (shares of the float model unless --along says else)",
    )
    amounts.add_argument(
        "--count",
        type=int,
        default=10,
        help="this many budgets, evenly from the smallest possible one to somewhat above the "
        "largest uniform plan's (default: %(default)s)",
    )
    parser.add_argument(
        "--along",
        default="size_share",
        metavar="LIMIT",
        help=f"what is limited: {', '.join(USES)} (default: %(default)s)",
    )
    parser.add_argument(
        "--objective",
        metavar="NAME",
        help=f"what is minimised: {', '.join(BUDGET_OBJECTIVES)} (default: the config's)",
    )
    parser.add_argument(
        "--latency",
        metavar="FILE",
        help="seconds of every layer, to limit and to show (default: the RUN/latency.json that "
        "`jaxrmils profile` writes, if there is one)",
    )
    parser.add_argument(
        "--verify",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="measure the plans on held-out data, which needs the run's model and data",
    )
    parser.add_argument("--config", help="where model and data come from, if not the run's own")
    parser.set_defaults(run=run_pareto)


@dataclass(frozen=True)
class _Run:
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


def run_pareto(args: argparse.Namespace) -> Outcome:
    """A sweep of budgets from a saved run."""
    _check(args)
    run = _load(args)
    network = _network(args, run) if args.verify else None
    run = _with_costs(args, run, network)
    start = time.perf_counter()
    budgets = _budgets(args, run)
    solved = pareto(run.scores, budgets, **run.settings)
    found = contenders(solved, args.along, _uniforms(run), run.plan)
    seconds = time.perf_counter() - start
    points = predicted_points(
        found,
        run.scores,
        latency=run.settings.get("latency"),
        clusters=run.settings.get("clusters"),
    )
    held_out = None
    if network is not None:
        held_out, points = _measured(args, run, network, found, points)
    report = _report(args, run, len(budgets), points, held_out)
    written = save_pareto(report, {c.name: c.plan for c in found}, run.folder.path)
    console = console_of(args)
    console.print(pareto_table(report))
    for note in statements(report):
        console.print(Text(f"Note       {note}"))
    console.print(Text(f"Solved     {len(budgets)} budgets in {seconds:.2f} s"))
    print_picks(report, report.picks(), run.folder.path, console)
    console.print(Text(f"Files      {run.folder.path}: {', '.join(written)}"))
    data = {"out": str(run.folder.path / FOLDER), "files": written, "solve_seconds": seconds}
    return Outcome({**data, **pareto_document(report), "picks": picks_document(report.picks())})


def _check(args: argparse.Namespace) -> None:
    """ConfigError for arguments that can't be right, before anything is read."""
    check_choice("--along", args.along, USES)
    if args.objective is not None:
        check_choice("--objective", args.objective, BUDGET_OBJECTIVES)
    if args.count < 1:
        raise ConfigError(f"--count is {args.count}; expected 1 or more")
    if any(text.startswith(f"{_POLICY}refine") for text in args.overrides):
        raise ConfigError(
            "pareto solves budgets without refinement; have one refined with `jaxrmils quantize "
            "--config.policy.refine=True` and its limits"
        )
    rest = [text for text in args.overrides if not text.startswith(_POLICY)]
    if rest and not args.verify:
        raise ConfigError(
            f"{rest[0]!r} concerns the model or the data, which --no-verify leaves alone; only "
            "--config.policy fields count then"
        )
    if args.config and not args.verify:
        raise ConfigError("--config says where model and data are, which --no-verify leaves alone")


def _load(args: argparse.Namespace) -> _Run:
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
    groups = read_manifest(kept)["info"].get("groups")
    settings["clusters"] = groups["selection"] if groups else None
    run = _Run(folder, policy, scores, plan, settings)
    return run if settings.get("latency") else _with_latency(run, args.along)


def _with_latency(run: _Run, along: str) -> _Run:
    """The run with the times that `jaxrmils profile` wrote, if they are of all that can occur."""
    path = run.folder.path / profile_command.FILE
    if not path.is_file():
        return run
    latency = load_latency(path)
    used = replace(run, settings={**run.settings, "latency": latency})
    float_plan = uniform_plans(run.scores, ["float"])["float"]
    try:
        for plan in (float_plan, run.plan, *_uniforms(run).values()):
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
    given = [text for text in args.overrides if text.startswith(_POLICY)]
    given += [f"{_POLICY}objective={args.objective}"] * (args.objective is not None)
    given += [f"{_POLICY}latency_table={args.latency}"] * (args.latency is not None)
    return apply_overrides(config, given).policy


def _tuples(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _task(args: argparse.Namespace) -> tuple[Any, Task]:
    """The run's config and task; what is missing names --no-verify."""
    rest = [text for text in args.overrides if not text.startswith(_POLICY)]
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
class _Network:
    """The run's model and data, its config with the batch size."""

    config: Any
    task: Task
    graph: Graph
    params: Any


def _network(args: argparse.Namespace, run: _Run) -> _Network:
    config, task = _task(args)
    graph = pipeline.trace_task(task)
    if graph.fingerprint != run.scores.table.fingerprint:
        raise PlanError(
            f"the task's model is another one than {run.folder.path} was made from (fingerprints "
            f"{graph.fingerprint[:12]} and {run.scores.table.fingerprint[:12]}); quantize again, "
            "or give --no-verify"
        )
    config = pipeline.with_batch_size(config, graph, task)
    return _Network(config, task, graph, task.load_params())


def _with_costs(args: argparse.Namespace, run: _Run, network: _Network | None) -> _Run:
    """The run with the costs of an objective that the scores do not hold, made where need be."""
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
        task, size = network.task, network.config.batch_size
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


def _budgets(args: argparse.Namespace, run: _Run) -> list[Limits]:
    """The limits of every budget; those of the config that are not varied hold for all."""
    kept = limits_of(run.policy).given()
    kept.pop(args.along, None)
    values = _values(args.values) if args.values else _evenly(args, run, Limits(**kept))
    return [Limits(**{**kept, args.along: value}) for value in values]


def _values(text: str) -> list[float]:
    try:
        return [float(word) for word in text.split(",") if word.strip()]
    except ValueError as error:
        raise ConfigError(
            f"--values is {text!r}; expected numbers separated by commas, such as 0.15,0.2"
        ) from error


def _evenly(args: argparse.Namespace, run: _Run, kept: Limits) -> Sequence[float]:
    """From the smallest use that is possible to `ROOM` times that of the largest uniform plan.

    The room is for a few layers in float; above it, budgets buy little but more of them.
    """
    programme = problem(run.scores, **run.settings).programme
    low = programme.minimum(args.along, kept.given())
    if low is None:
        raise infeasible(programme, kept)
    table, latency = run.scores.table, run.settings.get("latency")
    uses = [usage(table, plan.layers, latency)[args.along] for plan in _uniforms(run).values()]
    float_plan = uniform_plans(run.scores, ["float"])["float"]
    most = max([usage(table, float_plan.layers, latency)[args.along], *uses])
    high = max(low, min(ROOM * max(uses), most))
    steps = [i / (args.count - 1) for i in range(args.count)] if args.count > 1 else [0.0]
    # max: rounding must not take the first below what is possible.
    return [max(low, low + step * (high - low)) for step in steps]


def _uniforms(run: _Run) -> dict[str, Plan]:
    settings = run.settings
    return uniform_plans(
        run.scores,
        settings.get("formats", ()),
        skip=settings.get("skip", ()),
        force=settings.get("force"),
    )


def _measured(
    args: argparse.Namespace,
    run: _Run,
    network: _Network,
    found: Sequence[Contender],
    points: Sequence[PlanPoint],
) -> tuple[HeldOut, tuple[PlanPoint, ...]]:
    """Every plan on the confirmation split, which chose none of the sweep's."""
    config, task = network.config, network.task
    split = task.split("confirmation")
    simulation = SimulatedModel(network.graph, network.params, run.scores.ranges, task.loss)
    return measured_points(
        found,
        points,
        simulation,
        pipeline.batches(split, config.batch_size),
        split="confirmation",
        groups=split.groups,
        metrics=pipeline.metrics_on(task, "confirmation"),
        progress=silent if args.quiet else bars,
    )


def _report(
    args: argparse.Namespace,
    run: _Run,
    budgets: int,
    points: tuple[PlanPoint, ...],
    held_out: HeldOut | None,
) -> ParetoReport:
    policy, config, latency = run.policy, run.folder.run.config, run.settings.get("latency")
    info = artifacts.load_record(run.folder.path / "run.json", RUN_KIND)
    notes = list(run.notes)
    if held_out is not None and run.plan.policy.get("name") == "lossless":
        notes.append(
            "The run's own plan was chosen by tests on the confirmation split, so that its change "
            "here is too kind."
        )
    if run.plan.policy.get("refinement"):
        notes.append(
            "The run's own plan was refined by measuring; the plans of the budgets were not."
        )
    names = ("formats", "rounding", "skip", "force", "groups", "capabilities")
    settings = {name: policy[name] for name in names if policy[name]}
    kept = limits_of(policy).given()
    kept.pop(args.along, None)
    return ParetoReport(
        task=info.get("task", str(config.get("task", ""))),
        along=args.along,
        budgets=budgets,
        objective=policy.objective,
        unit=info.get("unit", "units of the loss"),
        margin=run.folder.report.test.margin,
        float_bytes=run.scores.table.float_bits / 8,
        float_loss=mean_loss(run.scores),
        examples=len(run.scores),
        points=points,
        held_out=held_out,
        latency=f"{latency.source}, for {latency.backend}" if latency else "",
        settings=settings | ({"limits kept": kept} if kept else {}),
        notes=tuple(notes),
        sources=sources(run.folder.path),
    )
