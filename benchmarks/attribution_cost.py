"""What a secant attribution of all sites costs, beside what it is made of: ResNet-18, in one run.

    python benchmarks/attribution_cost.py            # 224 x 224, batch 8; a few minutes
    python benchmarks/attribution_cost.py --quick    # one stage, 32 x 32, batch 2; a smoke test

Every layer is int4, activations and weights. With T points, an attribution is made of

    one quantized forward + T (one bare pass + one forward)

where the bare pass is that of `scoring_cost.py` (forward and activation gradients of every example
through probes that return one number), the forward stands for the weights' noise (every operation
once more), and the quantized forward is the simulated one: noise computed and added at every site.
The overhead is (attribution - quantized forward) / (T (bare pass + forward)), within a round. The
attribution also returns the float loss, a forward of its own; it is timed with and without.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.table import Table
from scoring_cost import (
    BARE,
    Timed,
    Workload,
    compiled,
    cross_entropy,
    environment,
    one_number,
    probed_pass,
    time_in_turns,
    workload,
)

from jaxrmils.graph import SiteCall, interpret
from jaxrmils.numerics import Ranges, fake_quant
from jaxrmils.sensitivity import Candidate, Formats, secant, weight_noise

FORWARD = "forward"
QUANTIZED = "quantized forward"
INT4 = Candidate(4)
POINTS = (1, 2)


def attribution_name(points: int, with_float_loss: bool) -> str:
    """The row of an attribution."""
    return f"attribution, T = {points}" + (", and the float loss" if with_float_loss else "")


def quantized_forward(work: Workload) -> Callable[..., Any]:
    """The simulated int4 network's losses, example by example as the attribution runs it."""
    graph = work.graph

    def whole(params: Any, inputs: Any, targets: Any, ranges: Ranges) -> Any:
        def handler(call: SiteCall) -> tuple[Any, Any]:
            operands = list(call.operands())
            for position, index in enumerate(call.site.activations):
                operands[index] = fake_quant(operands[index], call.state[position][4], "nearest")
            if call.site.weight is not None:
                index = call.site.weight.operand
                operands[index] = operands[index] + call.view(call.weight)
            return call.bind_highest(*operands), None

        noise = {name: delta for name, (delta,) in weight_noise(graph, params, (INT4,)).items()}

        def one(inputs: Any, target: Any) -> Any:
            leaves = jax.tree.leaves(params)
            outputs, _ = interpret(
                graph, handler, leaves, inputs[None], weights=noise, state=ranges.grids
            )
            return cross_entropy(outputs, target[None])[0]

        return jax.vmap(one)(inputs, targets)

    return whole


def attribution(work: Workload, points: int, with_float_loss: bool) -> Callable[..., Any]:
    """All sites in int4; the compiler leaves out what is not returned."""
    graph = work.graph
    formats = Formats(
        {site: (INT4,) * len(stats) for site, stats in work.ranges.stats.items() if stats},
        dict.fromkeys(graph.weights, INT4),
    )

    def whole(params: Any, inputs: Any, targets: Any, ranges: Ranges) -> Any:
        found = secant(
            graph, params, inputs, targets, cross_entropy, ranges, formats, points=points
        )
        shares = found.activations, found.weights, found.quantized_loss
        return (*shares, found.float_loss) if with_float_loss else shares

    return whole


def compile_all(work: Workload) -> dict[str, Timed]:
    """Everything that is timed."""
    functions: dict[str, Callable[..., Any]] = {
        FORWARD: lambda params, inputs, targets, ranges: work.graph.apply(params, inputs),
        BARE: probed_pass(work.graph, one_number),
        QUANTIZED: quantized_forward(work),
    }
    for points in POINTS:
        for with_loss in (False, True):
            name = attribution_name(points, with_loss)
            functions[name] = attribution(work, points, with_loss)
    return {name: compiled(function, work.arguments) for name, function in functions.items()}


def quartiles(ratios: np.ndarray) -> list[float]:
    """Median and quartiles."""
    return [float(q) for q in np.quantile(ratios, [0.5, 0.25, 0.75])]


def summarize(timed: dict[str, Timed], rounds: int) -> dict[str, Any]:
    """Runs everything and gives what the JSON holds."""
    seconds = time_in_turns(timed, rounds)
    by_name = {name: np.asarray(times) for name, times in seconds.items()}
    step = by_name[BARE] + by_name[FORWARD]
    rows = {
        name: {
            "milliseconds": 1e3 * statistics.median(seconds[name]),
            "ratio_to_bare": quartiles(by_name[name] / by_name[BARE]),
            "trace_seconds": each.trace_seconds,
            "compile_seconds": each.compile_seconds,
            "temporary_megabytes": each.temporary_bytes / 1e6,
        }
        for name, each in timed.items()
    }
    overhead = {
        attribution_name(points, with_loss): quartiles(
            (by_name[attribution_name(points, with_loss)] - by_name[QUANTIZED]) / (points * step)
        )
        for points in POINTS
        for with_loss in (False, True)
    }
    return {"rows": rows, "overhead": overhead, "seconds": seconds}


def show(result: dict[str, Any], console: Console) -> None:
    """Prints the table."""
    table = Table(title="median time; ratio to the bare pass and overhead with their quartiles")
    columns = ("", "ms", "ratio", "quartiles", "overhead", "quartiles", "compile s", "temp. MB")
    for column in columns:
        table.add_column(column, justify="right" if column else "left")
    for name, row in result["rows"].items():
        middle, low, high = row["ratio_to_bare"]
        cells = [f"{row['milliseconds']:.0f}", f"{middle:.3f}", f"{low:.3f} to {high:.3f}"]
        if name in result["overhead"]:
            middle, low, high = result["overhead"][name]
            cells += [f"{middle:.3f}", f"{low:.3f} to {high:.3f}"]
        else:
            cells += ["", ""]
        cells += [f"{row['compile_seconds']:.1f}", f"{row['temporary_megabytes']:.0f}"]
        table.add_row(name, *cells)
    console.print(table)


def parse() -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", type=int, default=224, help="image height and width (224)")
    parser.add_argument("--batch", type=int, default=8, help="examples (8)")
    parser.add_argument("--stages", type=int, default=4, help="stages of the network (all 4)")
    parser.add_argument("--rounds", type=int, default=15, help="timed runs of everything (15)")
    parser.add_argument("--quick", action="store_true", help="1 stage, size 32, batch 2, 2 rounds")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    options = parser.parse_args()
    if options.quick:
        options.size, options.batch, options.stages, options.rounds = 32, 2, 1, 2
    if options.output is None:
        name = f"attribution_cost_jax_{jax.__version__}.json"
        options.output = Path(__file__).parent / "results" / name
    return options


def main() -> None:
    """Runs the benchmark."""
    options = parse()
    console = Console(width=120)
    work = workload(options.size, options.batch, options.stages)
    result = {
        **environment(),
        "command": shlex.join(["python", "benchmarks/attribution_cost.py", *sys.argv[1:]]),
        "size": options.size,
        "batch": options.batch,
        "stages": options.stages,
        "rounds": options.rounds,
        **summarize(compile_all(work), options.rounds),
    }
    show(result, console)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(result, indent=2) + "\n")
    console.print(f"Written: {options.output.name}")


if __name__ == "__main__":
    main()
