"""`jaxrmils pareto`: what budgets cost."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from typing import Any

from rich.text import Text

from jaxrmils import artifacts
from jaxrmils.artifacts.pareto_file import (
    FOLDER,
    pareto_document,
    save_pareto,
    sources,
)
from jaxrmils.artifacts.report_files import RUN_KIND
from jaxrmils.cli import pipeline
from jaxrmils.cli.budget_printing import pareto_table, picks_document, print_picks
from jaxrmils.cli.checks import (
    BUDGET_OBJECTIVES,
    check_choice,
    limits_of,
    refinement_rounds,
)
from jaxrmils.cli.commands import Outcome, console_of
from jaxrmils.cli.config import ConfigError
from jaxrmils.cli.costs import wanted_formats
from jaxrmils.cli.saved_run import (
    POLICY,
    Network,
    SavedRun,
    load_saved,
    network_of,
    uniforms_of,
    with_costs,
)
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
from jaxrmils.policies import (
    Limits,
    ParetoPoint,
    Simulator,
    pareto,
    plan_interval,
    refined,
    usage,
)
from jaxrmils.policies.budget import problem
from jaxrmils.policies.budget.solve import infeasible
from jaxrmils.policies.pareto import point_of
from jaxrmils.policies.tangents import mean_loss
from jaxrmils.progress import bars, silent
from jaxrmils.sensitivity import Scores

ROOM = 1.25


def pareto_arguments(parser: argparse.ArgumentParser) -> None:
    """Solves many budgets from a saved run's scores, measures their plans, the uniform ones and the
    run's own on the confirmation split, and writes RUN/pareto/: pareto.html (loss and accuracy
    against size and against latency or bit operations), pareto.csv, pareto.json, and every plan as
    a file that `jaxrmils.load_plan` reads. Solving needs neither the model nor the data; an
    objective that the scores do not hold (squared_output, fisher, hessian_trace, sqnr, measured)
    takes a pass over the selection split, once: its costs are kept in RUN/costs/. If the policy
    refines (--config.policy.refine, in rounds), every budget's plan is refined on that split, too.

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


def run_pareto(args: argparse.Namespace) -> Outcome:
    """A sweep of budgets from a saved run."""
    _check(args)
    run = load_saved(args)
    network = network_of(args, run) if args.verify else None
    run = with_costs(args, run, network)
    start = time.perf_counter()
    budgets = _budgets(args, run)
    solved = _refined(args, run, network, pareto(run.scores, budgets, **run.settings))
    found = contenders(solved, args.along, uniforms_of(run), run.plan)
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
    rest = [text for text in args.overrides if not text.startswith(POLICY)]
    if rest and not args.verify:
        raise ConfigError(
            f"{rest[0]!r} concerns the model or the data, which --no-verify leaves alone; only "
            "--config.policy fields count then"
        )
    if args.config and not args.verify:
        raise ConfigError("--config says where model and data are, which --no-verify leaves alone")


def _refined(
    args: argparse.Namespace,
    run: SavedRun,
    network: Network | None,
    solved: tuple[ParetoPoint, ...],
) -> tuple[ParetoPoint, ...]:
    """The budgets' points with refined plans, where the policy refines and the model is there."""
    rounds = refinement_rounds(run.policy)
    if network is None or not rounds:
        return solved
    scores, task, settings = run.scores, network.task, dict[str, Any](run.settings)
    assert isinstance(scores, Scores)
    selection = pipeline.batches(task.split("selection"), network.config.batch_size)
    simulator = Simulator(network.graph, task.loss)
    simulation = simulator.on(network.params, scores.ranges, selection)
    simulation = simulation.holding(wanted_formats(run.policy))  # One for all budgets.
    progress = silent if args.quiet else bars
    points = []
    for point in progress(solved, "refining budgets", len(solved)):
        options = {**settings, "rounds": rounds}
        plan = refined(simulation, scores, point.limits, **options).plan
        predicted = plan_interval(scores, plan, settings["clusters"])
        points.append(
            point_of(scores.table, point.limits, plan, predicted, settings.get("latency"))
        )
    return tuple(points)


def _budgets(args: argparse.Namespace, run: SavedRun) -> list[Limits]:
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


def _evenly(args: argparse.Namespace, run: SavedRun, kept: Limits) -> Sequence[float]:
    """From the smallest use that is possible to `ROOM` times that of the largest uniform plan.

    The room is for a few layers in float; above it, budgets buy little but more of them.
    """
    programme = problem(run.scores, **run.settings).programme
    low = programme.minimum(args.along, kept.given())
    if low is None:
        raise infeasible(programme, kept)
    table, latency = run.scores.table, run.settings.get("latency")
    uses = [usage(table, plan.layers, latency)[args.along] for plan in uniforms_of(run).values()]
    float_plan = uniform_plans(run.scores, ["float"])["float"]
    most = max([usage(table, float_plan.layers, latency)[args.along], *uses])
    high = max(low, min(ROOM * max(uses), most))
    steps = [i / (args.count - 1) for i in range(args.count)] if args.count > 1 else [0.0]
    # max: rounding must not take the first below what is possible.
    return [max(low, low + step * (high - low)) for step in steps]


def _measured(
    args: argparse.Namespace,
    run: SavedRun,
    network: Network,
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
    run: SavedRun,
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
    if held_out is None and refinement_rounds(policy):
        notes.append("Plans of budgets are not refined, which takes the model.")
    names = ("refine", "formats", "rounding", "skip", "force", "groups", "capabilities")
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
