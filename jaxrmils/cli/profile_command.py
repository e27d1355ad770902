"""`jaxrmils profile`: where a model's time goes on this machine."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from jaxrmils import artifacts
from jaxrmils.artifacts.latency_file import save_latency
from jaxrmils.artifacts.moments_file import kept_scores, load_kept
from jaxrmils.cli import commands
from jaxrmils.cli.commands import Outcome
from jaxrmils.cli.config import ConfigError
from jaxrmils.graph import Graph, tabulate
from jaxrmils.lowering.profile import THIS_PLAN, Profile, profile
from jaxrmils.policies import PlanError, parse_format
from jaxrmils.progress import bars, silent

FILE = "latency.json"


def arguments(parser: argparse.ArgumentParser) -> None:
    """Times every layer of a saved run on this machine: in float32, in uniform formats and in the
    run's own plan, as jax's profiler sees them, and writes RUN/latency.json, from which budgets of
    latency are solved. Says how well the sum of the layers' times predicts the time of the plan,
    and what share of the machine's int8 peak each layer reaches.

      jaxrmils profile runs/cifar --batch-size 32
      jaxrmils profile runs/cifar --formats w8a8,w4a8,w8

    Times are medians of alternating calls; close what else is running.
    """
    parser.add_argument("run_folder", metavar="RUN", help="a folder that quantize or demo wrote")
    parser.add_argument(
        "--batch-size", type=int, default=8, help="examples in a batch (default: %(default)s)"
    )
    parser.add_argument(
        "--formats",
        default="w8a8,w4a8",
        help="what to measure beside float, separated by commas (default: %(default)s)",
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
    _, task = commands.task_of(folder, args)
    model = artifacts.load_model(folder / "model", task.apply)
    ranges = load_kept(kept_scores(folder) or folder / "scores").ranges
    inputs = next(iter(task.split("selection").batches(args.batch_size)))[0]
    found = profile(
        model.graph,
        task.load_params(),
        ranges,
        inputs,
        formats=formats,
        plan=model.plan,
        rounds=args.rounds,
        progress=progress,
    )
    out = Path(args.out or folder / FILE)
    console = commands.console_of(args)
    console.print(Text(f"{task.name}: {_machine(found)}", style="bold"))
    console.print(layers_table(found, model.graph))
    prediction = _prediction(found)
    lines = [*prediction["lines"], f"Written to {out}"]
    console.print(Text("\n".join(lines)))
    table = found.latency_table()
    save_latency(table, out, info={"run": str(folder), **found.environment})
    programs = {name: asdict(times) for name, times in found.programs.items()}
    data = {"out": str(out), "batch_size": found.batch_size, **found.environment}
    data |= {"peak_gops": found.peak / 1e9, "programs": programs}
    return Outcome(data | {"predicted": prediction["seconds"]})


def _checked(args: argparse.Namespace) -> list[str]:
    formats = [name.strip() for name in args.formats.split(",") if name.strip()]
    for name in formats:
        if parse_format(name) == parse_format("float"):
            raise ConfigError("--formats: float is measured anyway; leave it out")
    if args.batch_size < 1 or args.rounds < 1:
        raise ConfigError(
            f"--batch-size is {args.batch_size} and --rounds {args.rounds}; expected at least 1"
        )
    return formats


def _machine(found: Profile) -> str:
    words = found.environment
    return (
        f"batches of {found.batch_size} on {words['device']} ({words['backend']}, jax "
        f"{words['jax']}), int8 peak {found.peak / 1e9:,.0f} GOP/s"
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
    for name, times in found.programs.items():
        footer = f"{1e3 * times.seconds:.2f}"
        table.add_column(name, justify="right", no_wrap=True, footer=footer)
    table.add_column("of the int8 peak", justify="right", no_wrap=True)
    own, plan = found.programs[THIS_PLAN], found.plans[THIS_PLAN]
    for row in tabulate(graph).layers:
        seconds = own.layers[row.name]
        rate = 2 * row.macs * found.batch_size / seconds if seconds else 0.0
        cells = [f"{1e3 * times.layers[row.name]:.3f}" for times in found.programs.values()]
        name, layer = Text(row.name), plan.layers[row.name]
        table.add_row(name, layer.format, *cells, f"{100 * rate / found.peak:.0f} %")
    rests = [f"{1e3 * times.rest:.3f}" for times in found.programs.values()]
    table.add_row("(between layers)", "", *rests, "")
    return table


def _prediction(found: Profile) -> dict[str, Any]:
    """The plan's time as the latency table has it, beside the measured one."""
    measured = found.programs[THIS_PLAN].seconds
    base = found.programs["float"].seconds
    lines = [f"This plan  {1e3 * measured:.2f} ms, {base / measured:.2f} times faster than float"]
    try:
        seconds = found.predicted(found.plans[THIS_PLAN])
    except PlanError as error:
        return {"seconds": None, "lines": [*lines, f"Note       not predicted: {error}"]}
    error = 100 * (seconds / measured - 1)
    lines.append(f"Predicted  {1e3 * seconds:.2f} ms by its layers' times ({error:+.0f} %)")
    return {"seconds": seconds, "lines": lines}
