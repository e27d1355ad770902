"""Where an int8 model's time goes, by kind of operation, and how near it comes to the peak.

    python benchmarks/where_time_goes.py --models resnet18,mobilenet_v2 --batch 8
    python benchmarks/where_time_goes.py --kernels native --shortcuts codes

`jaxrmils.profile` times every layer of the w8a8 model: its product, and what follows up to the next
one (rescaling, bias, activation, additions, the next layer's quantization). Here they are summed by
kind. The peak is what the cores' VNNI instructions reach in a loop of nothing else, or, on a
machine without them, a large square int8 dot; a kind's share of it is its operations over its time.
"at the peak" is what the kind would take there.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from pathlib import Path
from typing import Any

from integer_speed import CALIBRATION_BATCH, listed
from native_kernels import peak
from rich.console import Console
from rich.table import Table
from scoring_cost import environment
from speed_models import NETWORKS, workload

import jaxrmils as jr
from jaxrmils.graph import Graph
from jaxrmils.lowering.native import kernels
from jaxrmils.lowering.table import conv_operation

FORMAT = "w8a8"


def kinds(graph: Graph) -> dict[str, str]:
    """What every layer is: "conv 3 x 3", "depthwise", "dense", "product of activations", ..."""
    found = {}
    for site, eqn in zip(graph.sites, graph.traced.eqns, strict=True):
        if site.kind == "gather":
            found[site.layer] = "lookup"
        elif site.kind == "dot":
            found[site.layer] = "dense" if site.weight else "product of activations"
        else:
            found[site.layer] = _conv(eqn)
    return found


def _conv(eqn: Any) -> str:
    lhs, rhs = (var.aval.shape for var in eqn.invars)
    numbers, groups = eqn.params["dimension_numbers"], eqn.params["feature_group_count"]
    channels, features = lhs[numbers.lhs_spec[1]], rhs[numbers.rhs_spec[0]]
    operation = conv_operation(channels, features, groups)
    window = " x ".join(str(rhs[axis]) for axis in numbers.rhs_spec[2:])
    return f"{operation} {window}"


def measure(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """Milliseconds and shares by kind."""
    work, batch = workload(name, None), args.batch
    graph = jr.trace(work.apply, work.variables, work.make_inputs(1), shortcuts=args.shortcuts)
    ranges = jr.calibrate(graph, work.variables, [work.make_inputs(CALIBRATION_BATCH)])
    options = {"formats": (FORMAT,), "rounds": args.rounds, "kernels": args.kernels}
    found = jr.profile(graph, work.variables, ranges, work.make_inputs(batch), **options)
    times, kind_of = found.programs[FORMAT], kinds(graph)
    most, of = found.peak, "a large int8 dot"
    if kernels.available() is None and kernels.instructions() == "avx512_vnni":
        most, of = peak(), "VNNI instructions"
    rows: dict[str, dict[str, float]] = {}
    for layer in jr.tabulate(graph).layers:
        row = rows.setdefault(kind_of[layer.name], {"layers": 0, "seconds": 0.0, "products": 0.0})
        row["layers"] += 1
        row["seconds"] += times.layers[layer.name]
        row["products"] += batch * layer.macs
    for row in rows.values():
        row["share"] = row["seconds"] / times.seconds
        row["of_peak"] = 2 * row["products"] / max(row["seconds"], 1e-9) / most
        row["at_peak"] = 2 * row["products"] / most
    return {
        "seconds": times.seconds,
        "float_seconds": found.programs["float"].seconds,
        "rest": times.rest,
        "peak": most,
        "peak_of": of,
        "rows": dict(sorted(rows.items(), key=lambda each: -each[1]["seconds"])),
    }


def show(title: str, result: dict[str, Any], console: Console) -> None:
    """Prints one network's table."""
    names = ("kind", "layers", "ms", "of the time", "at the peak, ms", "of the peak")
    table = Table(
        *names,
        title=f"{title}: {1e3 * result['seconds']:.1f} ms",
        caption=f"peak {result['peak'] / 1e9:.0f} GOP/s, of {result['peak_of']}",
    )
    for kind, row in result["rows"].items():
        table.add_row(
            kind,
            str(row["layers"]),
            f"{1e3 * row['seconds']:.2f}",
            f"{100 * row['share']:.0f} %",
            f"{1e3 * row['at_peak']:.2f}",
            f"{100 * row['of_peak']:.0f} %",
        )
    rest = result["rest"]
    table.add_row("no layer", "", f"{1e3 * rest:.2f}", f"{100 * rest / result['seconds']:.0f} %")
    console.print(table)


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--models", type=listed, default=("resnet18", "mobilenet_v2", "bert_base"))
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--kernels", choices=("xla", "native"), default="xla")
    parser.add_argument("--shortcuts", choices=("float", "codes"), default="float")
    parser.add_argument("--out", type=Path, help="a JSON file to write")
    args = parser.parse_args()
    if unknown := set(args.models) - set(NETWORKS):
        parser.error(f"unknown: {', '.join(sorted(unknown))}; expected {', '.join(NETWORKS)}")
    console, results = Console(width=110), {}
    for name in args.models:
        results[name] = measure(name, args)
        show(f"{name}, batch {args.batch}", results[name], console)
    if args.out:
        command = shlex.join(["python", "benchmarks/where_time_goes.py", *sys.argv[1:]])
        document = {**environment(), "command": command, "models": results}
        args.out.write_text(json.dumps(document, indent=2) + "\n")


if __name__ == "__main__":
    main()
