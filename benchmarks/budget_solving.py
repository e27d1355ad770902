"""How long budgets take to solve from saved scores, without the model.

    python benchmarks/budget_solving.py              # 200 layers x 12 options; a few minutes
    python benchmarks/budget_solving.py --quick      # 12 layers; a smoke test

Scores are invented: layers differ in size and in sensitivity by factors of a hundred, noise is that
of the widths, and layers depend on each other. Options are float and w8a8, w8a4, w4a8, w4a4 with
nearest, floor and ceil. Timed is everything from scores to plan: costs, constraints, the integer
programme, and the plan's predicted change. Times are the process's processor seconds (all of it is
one thread), so that a busy machine does not count; medians over rounds, each with other scores.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import scipy
from rich.console import Console
from rich.table import Table

from jaxrmils.graph import ActivationRow, LayerRow, ModelTable
from jaxrmils.numerics import Ranges
from jaxrmils.policies import LayerPlan, parse_format
from jaxrmils.policies.budget import Limits, budget
from jaxrmils.policies.objectives import tangent_costs
from jaxrmils.policies.pareto import pareto
from jaxrmils.sensitivity import ACTIVATION_CANDIDATES, WEIGHT_CANDIDATES, Candidate, Scores

FORMATS = ("w8a8", "w8a4", "w4a8", "w4a4")
ROUNDINGS = ("nearest", "floor", "ceil")
STEPS = {8: 1 / 255, 4: 1 / 15}

BUDGETS = {
    "size": Limits(size_share=0.18),
    "size, bit operations": Limits(size_share=0.18, bops_share=0.05),
    "size, bit operations, activations": Limits(
        size_share=0.18, bops_share=0.05, activation_bits=6.5
    ),
}


def invented_table(layers: int, rng: np.random.Generator) -> ModelTable:
    """A model of dense layers of very different sizes."""
    sizes = np.exp(rng.normal(10.0, 1.5, layers)).astype(int)
    places = rng.integers(1, 200, layers)
    rows = tuple(
        LayerRow(
            name=f"layer_{i}",
            sites=(f"layer_{i}",),
            kinds=("dot",),
            weight_size=int(sizes[i]),
            weight_scales=64,
            weight_leaves=(2 * i,),
            activations=(ActivationRow(f"layer_{i}", 0, int(places[i]) * 64, 1, 1),),
            macs=int(sizes[i] * places[i]),
        )
        for i in range(layers)
    )
    return ModelTable(
        layers=rows,
        leaf_names=tuple(f"layer_{i}/{leaf}" for i in range(layers) for leaf in ("w", "b")),
        leaf_bits=tuple(bits for size in sizes for bits in (32 * int(size), 32 * 64)),
        float_leaves=tuple(range(1, 2 * layers, 2)),
        fingerprint="invented",
    )


def invented_scores(layers: int, examples: int, seed: int = 0) -> Scores:
    """Contributions with a mean, a spread of their own, and one that all layers share."""
    rng = np.random.default_rng(seed)
    table = invented_table(layers, rng)
    shared = rng.normal(size=(examples, 1))

    def values(candidates: tuple[Candidate, ...]) -> np.ndarray:
        sensitivity = np.exp(rng.normal(-4.0, 1.5, (1, layers)))
        columns = []
        for candidate in candidates:
            step = STEPS[candidate.bits] * (1 if candidate.rounding == "nearest" else 2)
            own = rng.normal(size=(examples, layers)) + 0.3 * shared
            curved = 30 * step * rng.lognormal(size=(1, layers))
            drift = rng.normal(scale=0.1, size=(1, layers))
            columns.append(sensitivity * step * (curved + drift + own))
        return np.stack(columns, axis=2).astype(np.float32)

    names = [row.name for row in table.layers]
    return Scores(
        table=table,
        ranges=Ranges({}, dict.fromkeys(names, ()), "minmax", False, 0.0, examples, "invented"),
        loss=np.ones(examples, np.float32),
        activations=values(ACTIVATION_CANDIDATES),
        weights=values(WEIGHT_CANDIDATES),
        gradient_sum=np.zeros((examples, layers), np.float32),
        gradient_square=np.ones((examples, layers), np.float32),
        shift=None,
        activation_rows=tuple((name, 0) for name in names),
        weight_rows=tuple(names),
        activation_candidates=ACTIVATION_CANDIDATES,
        weight_candidates=WEIGHT_CANDIDATES,
    )


def all_options(scores: Scores) -> dict[str, tuple[LayerPlan, ...]]:
    """Float, and every format in every rounding."""
    own = [LayerPlan.of(parse_format(f), (r,)) for f in FORMATS for r in ROUNDINGS]
    return {name: (LayerPlan(), *own) for name in scores.table.layer}


def workloads(points: int) -> dict[str, Callable[[Scores], Any]]:
    """What is timed, each from scores to plans."""

    def additive(objective: str, limits: Limits | None) -> Callable[[Scores], Any]:
        def run(scores: Scores) -> Any:
            costs = tangent_costs(scores, objective, all_options(scores))
            settings = {"objective": costs, "formats": FORMATS}
            if limits is None:
                return pareto(scores, points, **settings)
            return budget(scores, limits, **settings)

        return run

    def joint(scores: Scores) -> Any:
        return budget(
            scores,
            BUDGETS["size"],
            objective="joint_upper_bound",
            rounding="directed",
            formats=FORMATS,
        )

    found = {
        f"{objective}: {name}": additive(objective, limits)
        for objective in ("signed", "squared")
        for name, limits in BUDGETS.items()
    }
    return {
        **found,
        f"squared: sweep of {points} sizes": additive("squared", None),
        "joint upper bound (8 options): size": joint,
    }


def timed(run: Callable[[Scores], Any], scores: list[Scores]) -> list[float]:
    """Seconds of the processor in every round."""
    seconds = []
    for each in scores:
        start = time.process_time()
        run(each)
        seconds.append(time.process_time() - start)
    return seconds


def environment() -> dict[str, Any]:
    """What the numbers depend on, and how to make them again."""
    return {
        "command": shlex.join(["python", "benchmarks/budget_solving.py", *sys.argv[1:]]),
        "scipy": scipy.__version__,
        "python": platform.python_version(),
        "cores": os.cpu_count(),
    }


def parse() -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=200, help="layers (200)")
    parser.add_argument("--examples", type=int, default=1000, help="examples (1000)")
    parser.add_argument("--points", type=int, default=10, help="budgets of the sweep (10)")
    parser.add_argument("--rounds", type=int, default=9, help="timed runs of everything (9)")
    parser.add_argument("--quick", action="store_true", help="12 layers, 50 examples, 2 rounds")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    options = parser.parse_args()
    if options.quick:
        options.layers, options.examples, options.points, options.rounds = 12, 50, 3, 2
    if options.output is None:
        name = f"budget_solving_scipy_{scipy.__version__}.json"
        options.output = Path(__file__).parent / "results" / name
    return options


def main() -> None:
    """Runs the benchmark."""
    options = parse()
    console = Console(width=120)
    scores = [
        invented_scores(options.layers, options.examples, seed) for seed in range(options.rounds)
    ]
    rows = {name: timed(run, scores) for name, run in workloads(options.points).items()}
    table = Table(title=f"{options.layers} layers x 12 options and float, processor seconds")
    for column in ("", "median", "smallest", "largest"):
        table.add_column(column, justify="right" if column else "left")
    for name, seconds in rows.items():
        figures = (statistics.median(seconds), min(seconds), max(seconds))
        table.add_row(name, *(f"{x:.2f}" for x in figures))
    console.print(table)
    sizes = {key: getattr(options, key) for key in ("layers", "examples", "points", "rounds")}
    result = {**environment(), **sizes, "seconds": rows}
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(result, indent=2) + "\n")
    console.print(f"Written: {options.output.name}")


if __name__ == "__main__":
    main()
