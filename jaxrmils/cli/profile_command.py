"""`jaxrmils profile`: where a model's time goes on this machine."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, get_args

from rich.table import Table
from rich.text import Text

from jaxrmils import artifacts
from jaxrmils.artifacts.latency_file import save_latency
from jaxrmils.artifacts.moments_file import kept_scores, load_kept
from jaxrmils.cli import commands
from jaxrmils.cli.commands import Outcome
from jaxrmils.cli.config import ConfigError
from jaxrmils.cli.costs import wanted_formats
from jaxrmils.graph import Graph, ModelTable, tabulate
from jaxrmils.lowering.profile import (
    THIS_PLAN,
    Kernels,
    Prediction,
    Profile,
    formats_to_measure,
    profile,
)
from jaxrmils.policies import Plan, PlanError, check_plan, parse_format
from jaxrmils.progress import bars, silent

FILE = "latency.json"


def arguments(parser: argparse.ArgumentParser) -> None:
    """Times every layer of a saved run on this machine: in float32, in uniform formats and in the
    run's own plan, as jax's profiler sees them, and writes RUN/latency.json, from which budgets of
    latency are solved. Says how well the sum of the layers' times predicts the time of the run's
    plan and of others, and what share of the machine's int8 peak each layer reaches.

      jaxrmils profile runs/cifar --batch-size 32
      jaxrmils profile runs/cifar --formats w8a8,w4a8,w8
      jaxrmils profile runs/cifar --plan runs/cifar/pareto/budget-0*.json

    Times are medians of alternating calls; close what else is running.
    """
    parser.add_argument("run_folder", metavar="RUN", help="a folder that quantize or demo wrote")
    parser.add_argument(
        "--batch-size", type=int, default=8, help="examples in a batch (default: %(default)s)"
    )
    parser.add_argument(
        "--formats",
        help="what to measure beside float, separated by commas (default: those that budgets "
        "choose from, config.policy.formats and .force, and those of the plans)",
    )
    parser.add_argument(
        "--plan",
        nargs="+",
        action="extend",
        default=[],
        metavar="FILE",
        help="plans to measure beside the run's own, such as `jaxrmils pareto` wrote",
    )
    parser.add_argument(
        "--kernels",
        choices=get_args(Kernels),
        default="xla",
        help="of integer layers: XLA's, or our own for CPU, which are compiled with the system's "
        "C++ compiler when they are first used (default: %(default)s)",
    )
    parser.add_argument(
        "--rounds", type=int, default=15, help="timed calls of each (default: %(default)s)"
    )
    parser.add_argument("--out", help=f"the file to write (default: RUN/{FILE})")
    parser.add_argument("--config", help="another config file than the run's own")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> Outcome:
    """Measures, prints and saves."""
    formats = _checked(args)
    folder = Path(args.run_folder)
    progress = silent if args.quiet else bars
    config, task = commands.task_of(folder, args)
    model = artifacts.load_model(folder / "model", task.apply)
    ranges = load_kept(kept_scores(folder) or folder / "scores").ranges
    table = tabulate(model.graph)
    files = list(dict.fromkeys(args.plan))
    plans = _plans(files, table)
    if formats is None:
        wanted = wanted_formats(config.policy)
        formats = formats_to_measure(table, wanted, [model.plan, *plans.values()])
    inputs = next(iter(task.split("selection").batches(args.batch_size)))[0]
    found = profile(
        model.graph,
        task.load_params(),
        ranges,
        inputs,
        formats=formats,
        plan=model.plan,
        plans=plans,
        kernels=args.kernels,
        rounds=args.rounds,
        progress=progress,
    )
    out = Path(args.out or folder / FILE)
    console = commands.console_of(args)
    console.print(Text(f"{task.name}: {_machine(found)}", style="bold"))
    console.print(layers_table(found, model.graph))
    predictions = found.predictions()
    console.print(predictions_table(predictions))
    lines = [f"Note       {each.name} is not predicted: {each.missing}" for each in predictions]
    lines = [line for line, each in zip(lines, predictions, strict=True) if each.missing]
    console.print(Text("\n".join([*lines, f"Written to {out}"])))
    records = [_record(each, files, plans) for each in predictions]
    info = {"run": str(folder), **found.environment}
    save_latency(found.latency_table(), out, info=info, plans=records)
    programs = {name: asdict(times) for name, times in found.programs.items()}
    data = {"out": str(out), "batch_size": found.batch_size, **found.environment}
    data |= {"peak_gops": found.peak / 1e9, "programs": programs, "plans": records}
    own = next(each for each in predictions if each.name == THIS_PLAN)
    return Outcome(data | {"predicted": own.predicted})


def _checked(args: argparse.Namespace) -> list[str] | None:
    """The formats that were asked for, if any were."""
    if args.batch_size < 1 or args.rounds < 1:
        raise ConfigError(
            f"--batch-size is {args.batch_size} and --rounds {args.rounds}; expected at least 1"
        )
    if args.formats is None:
        return None
    formats = [name.strip() for name in args.formats.split(",") if name.strip()]
    for name in formats:
        if parse_format(name) == parse_format("float"):
            raise ConfigError("--formats: float is measured anyway; leave it out")
    return formats


def _plans(files: Sequence[str], table: ModelTable) -> dict[str, Plan]:
    """Plans by their files' names, with the folder's where those are the same.

    Raises:
      ArtifactError: a file that is no plan.
      PlanError: a plan for another model; it names the file.
    """
    stems = [Path(file).stem for file in files]
    plans = {}
    for file, stem in zip(files, stems, strict=True):
        plan = artifacts.load_plan(file)
        try:
            check_plan(plan, table)
        except PlanError as error:
            raise PlanError(f"--plan {file}: {error}") from error
        plans[stem if stems.count(stem) == 1 else file] = plan
    return plans


def _record(
    prediction: Prediction, files: Sequence[str], plans: Mapping[str, Plan]
) -> dict[str, Any]:
    """A prediction as JSON values, with the plan's file."""
    file = dict(zip(plans, files, strict=True)).get(prediction.name, "")
    return asdict(prediction) | {"file": file}


def _machine(found: Profile) -> str:
    words = found.environment
    return (
        f"batches of {found.batch_size} on {words['device']} ({words['backend']}, jax "
        f"{words['jax']}, {words['kernels']} kernels), int8 peak {found.peak / 1e9:,.0f} GOP/s"
    )


def layers_table(found: Profile, graph: Graph) -> Table:
    """Milliseconds of every layer in every program.

    Args:
      found: what was measured, with a plan.
      graph: of the model.
    """
    table = Table(title="Milliseconds", title_justify="left", show_footer=True, pad_edge=False)
    table.add_column("layer", footer="whole call", overflow="fold")
    table.add_column("format", no_wrap=True)
    columns = {
        name: times
        for name, times in found.programs.items()
        if name == THIS_PLAN or name not in found.compared
    }
    for name, times in columns.items():
        footer = f"{1e3 * times.seconds:.2f}"
        table.add_column(name, justify="right", no_wrap=True, footer=footer)
    table.add_column("of the int8 peak", justify="right", no_wrap=True)
    own, plan = found.programs[THIS_PLAN], found.plans[THIS_PLAN]
    for row in tabulate(graph).layers:
        seconds = own.layers[row.name]
        rate = 2 * row.macs * found.batch_size / seconds if seconds else 0.0
        cells = [f"{1e3 * times.layers[row.name]:.3f}" for times in columns.values()]
        name, layer = Text(row.name), plan.layers[row.name]
        table.add_row(name, layer.format, *cells, f"{100 * rate / found.peak:.0f} %")
    rests = [f"{1e3 * times.rest:.3f}" for times in columns.values()]
    table.add_row("(between layers)", "", *rests, "")
    return table


def predictions_table(predictions: Sequence[Prediction]) -> Table:
    """Seconds of every program beside the sum of its layers' times in the uniform programs.

    Args:
      predictions: from `Profile.predictions`, of "float" among others.
    """
    table = Table(
        title="Milliseconds of a call",
        title_justify="left",
        caption="Predicted: the sum of its layers' times in the uniform programs, and of the rest. "
        "The uniform programs are what these are made of, so only the others say how good it is.",
        caption_justify="left",
        pad_edge=False,
    )
    table.add_column("plan", overflow="fold")
    for name in ("measured", "predicted", "predicted / measured", "times faster than float"):
        table.add_column(name, justify="right")
    base = next(each.measured for each in predictions if each.name == "float")
    for each in predictions:
        table.add_row(
            Text(each.name),
            f"{1e3 * each.measured:.3f}",
            "" if each.predicted is None else f"{1e3 * each.predicted:.3f}",
            "" if each.ratio is None else f"{each.ratio:.2f}",
            f"{base / each.measured:.2f}",
            style="dim" if each.is_uniform else None,
        )
    return table
