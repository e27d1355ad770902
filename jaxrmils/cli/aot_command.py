"""`jaxrmils aot`: what a plan becomes on a device that is not here."""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from jaxrmils import artifacts
from jaxrmils.artifacts.latency_file import save_latency
from jaxrmils.cli import commands, pipeline
from jaxrmils.cli.commands import Outcome
from jaxrmils.cli.config import ConfigError, load_config
from jaxrmils.evaluation import wide_console
from jaxrmils.graph import Graph, tabulate
from jaxrmils.lowering import LoweringError
from jaxrmils.lowering.ahead import (
    BESIDE,
    THIS_PLAN,
    Comparison,
    ProgramCost,
    SiteCost,
    Target,
    batch_shapes,
    check_compiled,
    check_plan_lowering,
    find_target,
    has_symmetric_grids,
    latency_table,
    operand_words,
    site_costs,
    targets,
    without_devices,
)
from jaxrmils.lowering.ahead.latency import FLOAT
from jaxrmils.numerics import format_size
from jaxrmils.policies import FORMATS, Plan, check_plan, parse_format, uniform
from jaxrmils.progress import bars, silent

_NOTES = """\
  Cycles are the compiler's estimates, not measurements: no device has run anything. A site's are
  those of the instructions that hold its operation, with whatever is fused into them, and of its
  quantization and scaling. * is in one instruction with other sites, which counts for each.
  float32 is multiplied as jax does by default on a TPU, in bfloat16."""


def arguments(parser: argparse.ArgumentParser) -> None:
    """Compiles a plan for a device that is not here, beside the float model and uniform plans, and
    reads what its compiler made of it: the operand types and kernels of every dot and convolution,
    the bytes that every site reads and writes, memory, and for a TPU estimated cycles (the
    compiler's estimates, not measurements). Exits with 3 if a planned site does not multiply
    integers there.

      jaxrmils aot runs/mnist --target tpu:v5e
      jaxrmils aot --config configs/mnist_cnn.py --plan runs/mnist/plan.json --target tpu:v6e
      jaxrmils aot --config configs/mnist_cnn.py --plan w4a8 --target cuda
      jaxrmils aot runs/mnist --target tpu:v5e --latency runs/mnist/latency.json

    Targets tpu:v5e, cuda:h100, ... need a compiler, not the device: pip install
    'jaxrmils[tpu-aot]', or jax's own CUDA plugin and nvidia-cuda-nvcc. Without it, and for the
    targets tpu and cuda, the model is only lowered to StableHLO, what compilers are given: that
    shows the operand types and nothing more.

    Only shapes are compiled: no parameters are loaded or trained beyond those of RUN.
    """
    parser.add_argument(
        "run_folder", metavar="RUN", nargs="?", help="a folder that quantize or demo wrote"
    )
    parser.add_argument(
        "--target",
        default="tpu:v5e",
        help=f"one of {', '.join(targets())} (default: %(default)s)",
    )
    parser.add_argument("--artifact", metavar="RUN", help="another way to name RUN")
    parser.add_argument("--config", help="a Python file with get_config(), in place of RUN's")
    parser.add_argument(
        "--plan", help="a plan.json in place of RUN's, or a format such as int8 for all layers"
    )
    parser.add_argument(
        "--batch-size", type=int, default=8, help="examples in a batch (default: %(default)s)"
    )
    parser.add_argument(
        "--beside",
        default=",".join(BESIDE),
        help="what to compile beside the plan: float32, bfloat16, formats for uniform plans; "
        "'' for nothing (default: %(default)s)",
    )
    parser.add_argument(
        "--latency",
        metavar="FILE",
        help="write a latency table of estimated seconds, such as RUN/latency.json, for "
        "config.policy.latency_table and `jaxrmils pareto --latency`; needs a TPU target",
    )
    parser.add_argument(
        "--clock", type=float, help="cycles a second for --latency (default: the target's)"
    )
    parser.set_defaults(run=aot)


def aot(args: argparse.Namespace) -> Outcome:
    """Compiles or lowers a plan for a target."""
    args.run_folder = _run_folder(args)
    target, beside = _checked(args)
    console = wide_console(sys.stderr if args.json else sys.stdout)
    with without_devices():
        name, graph, plan, symmetric, formats = _model(args)
        if args.latency:
            beside = list(dict.fromkeys([FLOAT, *beside, *formats, *_formats_of(plan)]))
        inputs = batch_shapes(graph, args.batch_size)
        title = f"{name}: {target.name}, batches of {args.batch_size}"
        console.print(Text(title, style="bold"))
        data: dict[str, Any] = {"task": name, "target": target.name, "batch_size": args.batch_size}
        if not target.is_compiled or not target.is_installed:
            found = check_plan_lowering(graph, plan, inputs, target.platform, symmetric=symmetric)
            note = _lowered_note(target)
            console.print(_lowered_table(graph, plan, found))
            console.print(Text(f"Note       {note}"))
            sites = [
                {"name": site.name, "format": plan.layers[site.layer].format}
                | {"operands": found.get(site.name, [])}
                for site in graph.sites
            ]
            return Outcome(data | {"compiled": False, "note": note, "sites": sites})
        comparison = site_costs(
            graph,
            plan,
            target.name,
            inputs,
            symmetric=symmetric,
            beside=beside,
            progress=silent if args.quiet else bars,
        )
    _print(comparison, graph, plan, console)
    check_compiled(graph, plan, comparison.plan, target.name)
    data |= {"compiled": True, **_as_data(comparison, graph, plan)}
    if args.latency:
        data["latency"] = _write_latency(args, comparison, graph, plan, console)
    return Outcome(data)


def _run_folder(args: argparse.Namespace) -> str | None:
    if args.artifact and args.run_folder:
        raise ConfigError(f"--artifact {args.artifact} and RUN {args.run_folder}: give one of them")
    return args.run_folder or args.artifact


def _formats_of(plan: Plan) -> list[str]:
    """The formats of a plan by which uniform plans are known."""
    return [name for name in plan.counts() if name in FORMATS and name != "float"]


def _write_latency(
    args: argparse.Namespace, comparison: Comparison, graph: Graph, plan: Plan, console: Console
) -> dict[str, Any]:
    """Writes the table; says what it predicts of the plan beside what was compiled of it."""
    clock = args.clock or find_target(args.target).clock
    table = latency_table(comparison, graph, batch_size=args.batch_size, clock=clock)
    save_latency(table, args.latency, info={"target": args.target, "clock": clock})
    predicted = table.overhead + sum(table.of(n, layer) for n, layer in plan.layers.items())
    compiled = (comparison.plan.cycles or 0) / clock
    words = (
        f"Latency    {args.latency}: {table.source}\n"
        f"This plan  {1e6 * predicted:.1f} us by its layers, {1e6 * compiled:.1f} us as it was "
        f"compiled ({100 * (predicted / compiled - 1):+.0f} %)"
    )
    console.print(Text(words))
    return {"file": args.latency, "clock": clock, "predicted": predicted, "compiled": compiled}


def _checked(args: argparse.Namespace) -> tuple[Target, list[str]]:
    """The target and what goes beside the plan, before anything expensive runs."""
    try:
        target = find_target(args.target)
    except LoweringError as error:
        raise ConfigError(f"--target: {error}") from error
    if args.batch_size < 1:
        raise ConfigError(f"--batch-size is {args.batch_size}; at least 1 was expected")
    if not args.run_folder and not (args.config and args.plan):
        raise ConfigError("aot needs a RUN, or --config FILE and --plan FILE (jaxrmils aot --help)")
    if args.latency:
        _check_latency(args, target)
    beside = [name.strip() for name in args.beside.split(",") if name.strip()]
    for name in beside:
        if name not in BESIDE:
            parse_format(name)
    return target, beside


def _check_latency(args: argparse.Namespace, target: Target) -> None:
    """Whether there will be estimates to make a latency table of."""
    if not target.clock:
        timed = ", ".join(name for name, each in targets().items() if each.clock)
        raise ConfigError(
            f"--latency: for {target.name} no cycles are estimated; expected one of {timed}, or "
            "measure with `jaxrmils profile`"
        )
    if not target.is_installed:
        raise ImportError(
            f"--latency needs the compiler for {target.name}, which is not installed: "
            f"{target.install}"
        )
    if args.clock is not None and not args.clock > 0:
        raise ConfigError(f"--clock is {args.clock}; expected cycles a second above 0")


def _model(args: argparse.Namespace) -> tuple[str, Graph, Plan, bool, tuple[str, ...]]:
    """The task's name, its graph, the plan, whether activations have no zero points, and the
    formats that budgets would choose from."""
    if args.run_folder:
        folder = Path(args.run_folder)
        config, task = commands.task_of(folder, args)
        model = artifacts.load_model(folder / "model", task.apply)
        graph, plan = model.graph, model.plan
        symmetric = has_symmetric_grids(model)
    else:
        config = load_config(args.config, args.overrides)
        task = pipeline.make_task(config, args.config, silent if args.quiet else bars)
        graph = pipeline.trace_task(task, pipeline.shortcuts_of(config))
        plan, symmetric = None, config.ranges.symmetric
    if args.plan:
        table = tabulate(graph)
        is_format = args.plan in FORMATS
        plan = uniform(table, args.plan) if is_format else artifacts.load_plan(args.plan)
        check_plan(plan, table)
    assert plan is not None
    return task.name, graph, plan, symmetric, tuple(config.policy.formats)


def _lowered_note(target: Target) -> str:
    if target.is_compiled:
        return (
            "lowered to StableHLO and not compiled, since the compiler is not installed: after "
            f"{target.install} this command compiles for {target.name} and shows kernels, memory "
            "and, for a TPU, estimated cycles"
        )
    return "lowered to StableHLO and not compiled: operand types are what a compiler is given"


def _lowered_table(graph: Graph, plan: Plan, found: dict[str, Any]) -> Table:
    table = Table(title="Integer sites in StableHLO", title_justify="left", pad_edge=False)
    for name in ("site", "format", "operands"):
        table.add_column(name, overflow="fold")
    for site in graph.sites:
        words = operand_words(found[site.name]) if site.name in found else "-"
        table.add_row(Text(site.name), plan.layers[site.layer].format, words)
    return table


def _print(comparison: Comparison, graph: Graph, plan: Plan, console: Console) -> None:
    names = _names(comparison)
    if comparison.plan.cycles is None:
        console.print(_kernels_table(comparison, graph, plan))
    else:
        console.print(_cycles_table(comparison, names, graph, plan))
        console.print(Text(_NOTES))
    console.print(_bytes_table(comparison, names, graph, plan))
    console.print(_programs_table(comparison, names))
    for name, reason in comparison.refused.items():
        console.print(Text(f"Note       {name} could not be compiled: {reason}"))
    if any(program.unknown_loops for program in comparison.programs.values()):
        console.print(Text("Note       loops of unknown length count once"))


def _cycles_table(comparison: Comparison, names: list[str], graph: Graph, plan: Plan) -> Table:
    table = Table(
        title=f"Estimated cycles on {comparison.target}",
        title_justify="left",
        show_footer=True,
        pad_edge=False,
    )
    table.add_column("site", footer="whole program", overflow="fold")
    table.add_column("format", no_wrap=True)
    table.add_column("operands", no_wrap=True)
    for name in names:
        total = _number(comparison.programs[name].cycles)
        table.add_column(name, justify="right", no_wrap=True, footer=total)
    for site in graph.sites:
        costs = [comparison.programs[name].sites.get(site.name) for name in names]
        table.add_row(
            Text(site.name),
            plan.layers[site.layer].format,
            _operands(comparison.plan.sites.get(site.name)),
            *map(_cycles, costs),
        )
    return table


def _bytes_table(comparison: Comparison, names: list[str], graph: Graph, plan: Plan) -> Table:
    title = "Bytes that a site's instructions read and write"
    table = Table(title=title, title_justify="left", pad_edge=False)
    table.add_column("site", overflow="fold")
    table.add_column("format", no_wrap=True)
    for name in names:
        table.add_column(name, justify="right", no_wrap=True)
    for site in graph.sites:
        costs = [comparison.programs[name].sites.get(site.name) for name in names]
        sizes = [_size(cost and cost.bytes) for cost in costs]
        table.add_row(Text(site.name), plan.layers[site.layer].format, *sizes)
    return table


def _kernels_table(comparison: Comparison, graph: Graph, plan: Plan) -> Table:
    table = Table(title=f"Sites on {comparison.target}", title_justify="left", pad_edge=False)
    for name in ("site", "format", "operands", "kernel"):
        table.add_column(name, overflow="fold")
    for site in graph.sites:
        cost = comparison.plan.sites.get(site.name)
        kernels = ", ".join(dict.fromkeys(cost.kernels)) if cost else ""
        format = plan.layers[site.layer].format
        table.add_row(Text(site.name), format, _operands(cost), kernels or "-")
    return table


def _names(comparison: Comparison) -> list[str]:
    """The programs as they are shown: the plan last, beside the plans it is compared with."""
    return [*(name for name in comparison.programs if name != THIS_PLAN), THIS_PLAN]


def _operands(cost: SiteCost | None) -> str:
    if cost is None:
        return "-"
    if not cost.operands:
        return "elementwise" if cost.is_integer else "-"
    return operand_words(list(cost.operands))


def _cycles(cost: SiteCost | None) -> str:
    if cost is None or cost.cycles is None or cost.overhead is None:
        return "-"
    return f"{_number(cost.cycles + cost.overhead)}{'*' if cost.shares else ''}"


def _number(value: int | None) -> str:
    return "-" if value is None else f"{value:,}"


def _programs_table(comparison: Comparison, names: list[str]) -> Table:
    table = Table(title="Whole programs", title_justify="left", pad_edge=False)
    table.add_column("", no_wrap=True)
    first = comparison.programs[names[0]].cycles
    columns = ["estimated cycles", f"share of {names[0]}", "bytes accessed"] if first else []
    for column in (*columns, "parameters, inputs", "temporaries", "code"):
        table.add_column(column, justify="right", no_wrap=True)
    for name in names:
        program = comparison.programs[name]
        cells = []
        if first and program.cycles is not None:
            cells = [_number(program.cycles), f"{100 * program.cycles / first:.1f} %"]
            cells.append(_size(program.bytes_accessed))
        memory = program.memory
        sizes: list[int | None] = [None] * 3
        if memory:  # A program without a size is one whose size is not told.
            sizes = [memory.arguments, memory.temporaries, memory.code or None]
        style = "bold" if name == THIS_PLAN else ""
        table.add_row(name, *cells, *map(_size, sizes), style=style)
    return table


def _size(size: float | None) -> str:
    return "-" if size is None else format_size(8 * int(size))


def _as_data(comparison: Comparison, graph: Graph, plan: Plan) -> dict[str, Any]:
    """A comparison as JSON values."""

    def program(cost: ProgramCost) -> dict[str, Any]:
        values = asdict(cost)
        for name, site in values["sites"].items():
            site["operands"] = operand_words(list(cost.sites[name].operands))
        return values

    return {
        "cycles": "estimated by the compiler where it does, never measured",
        "formats": {site.name: plan.layers[site.layer].format for site in graph.sites},
        "programs": {n: program(comparison.programs[n]) for n in _names(comparison)},
        "refused": dict(comparison.refused),
    }
