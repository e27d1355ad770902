"""How long a whole quantization takes, and how much memory: every stage of a config's task.

    python benchmarks/whole_quantization.py --config configs/imagenet_efficientnet_lite0.py \
        --config.data.files=photos --config.data.labels=photos.csv \
        --config.model.weights=efficientnet_lite0.safetensors --calibration 750

The same examples give ranges and scores (all sites, all candidates); the RMILS rule makes the plan,
and the integer model is built, compiled and run on one batch. `--search N` adds a lossless search
on N of the examples, tested on N others. Nothing is evaluated. Compilation is included.
"""

from __future__ import annotations

import argparse
import json
import resource
import shlex
import sys
import time
from pathlib import Path

import jax
import numpy as np
from rich.console import Console
from rich.table import Table

import jaxrmils as jr
from jaxrmils.artifacts import versions
from jaxrmils.cli import batches, load_config, make_task, search_of, trace_task, with_batch_size
from jaxrmils.policies import Simulator
from jaxrmils.progress import bars


def main() -> None:
    """Runs the stages one after the other."""
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0],
        epilog="Further options override the config: --config.data.files=FOLDER",
    )
    parser.add_argument("--config", required=True)
    parser.add_argument("--calibration", type=int, default=750, help="examples")
    parser.add_argument("--mu", type=float, default=0.01)
    parser.add_argument("--search", type=int, default=0, help="examples of a lossless search")
    parser.add_argument("--points", type=int, default=1, help="quadrature points of the search")
    parser.add_argument("--out", help="a JSON file")
    args, overrides = parser.parse_known_args()
    config = load_config(args.config, overrides)
    config.splits.update(dict.fromkeys(config.splits, 1))  # read whole, not in splits
    stages = Stages([])
    task = make_task(config, args.config, bars)
    if len(task.dataset) < max(args.calibration, 2 * args.search):
        parser.error(f"{task.name}: only {len(task.dataset)} examples")
    params = task.load_params()
    stages.done("load the weights, list the data")
    graph = trace_task(task)
    config = with_batch_size(config, graph, task)
    stages.done(f"trace, choose the batch size ({config.batch_size})")
    data = batches(task.dataset.take(np.arange(args.calibration)), config.batch_size)
    ranges = jr.calibrate(graph, params, data.inputs(), progress=bars)
    stages.done("ranges")
    scores = jr.score(graph, params, data, task.loss, ranges, progress=bars)
    stages.done("scores")
    plan = jr.rmils(graph, scores, mu=args.mu)
    stages.done("plan")
    model = jr.quantize(graph, params, plan, ranges)
    inputs, _ = next(iter(data))
    jax.block_until_ready(model(inputs))
    stages.done("integer model, compiled and run once")
    if args.search:
        order = np.arange(len(task.dataset))
        selection, confirmation = order[: args.search], order[-args.search :]
        jr.lossless(
            graph,
            params,
            batches(task.dataset.take(selection), config.batch_size),
            batches(task.dataset.take(confirmation), config.batch_size),
            task.loss,
            ranges,
            margin=config.verify.margin or None,
            search=search_of(config.policy),
            scores=scores,
            directed=config.policy.directed,
            simulator=Simulator(graph, task.loss, points=args.points),
            progress=bars,
        )
        stages.done(f"lossless search on {args.search} + {args.search}")
    stages.show(task.name, args.calibration)
    if args.out:
        command = "python " + shlex.join(sys.argv)
        document = {"command": command, "versions": versions(), "stages": stages.rows}
        Path(args.out).write_text(json.dumps(document, indent=1) + "\n")


class Stages:
    """Seconds of every stage, and the peak memory after it."""

    def __init__(self, rows: list[dict]):
        self.rows = rows
        self.began = time.perf_counter()

    def done(self, name: str) -> None:
        """Ends a stage."""
        now = time.perf_counter()
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
        self.rows.append({"stage": name, "seconds": now - self.began, "peak_gb": peak})
        self.began = now

    def show(self, name: str, examples: int) -> None:
        """Prints the table."""
        table = Table("stage", "seconds", "peak GB", title=f"{name}, {examples} for calibration")
        for row in self.rows:
            table.add_row(row["stage"], f"{row['seconds']:.1f}", f"{row['peak_gb']:.2f}")
        table.add_row("together", f"{sum(row['seconds'] for row in self.rows):.1f}", "")
        Console().print(table)


if __name__ == "__main__":
    main()
