"""Tangent and secant (1, 2, 4 points) beside the measured joint change, on the demo CNN.

    python experiments/secant_points.py --out experiments/results/secant_points

For all-int4 and for a mixed plan, on the selection split of the embedded digits. Writes JSON and
markdown.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from results_file import write_table

import jaxrmils as jr
from jaxrmils.cli.defaults import base_config
from jaxrmils.cli.pipeline import batches, trace_task
from jaxrmils.zoo import mnist_cnn_task

MIXED = {"Conv_0/*": "w8a8", "Conv_1/*": "w4a8", "Dense_0/*": "w4a4", "Dense_1/*": "float"}


def main() -> None:
    """Runs the experiment."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", default="experiments/results/secant_points")
    args = parser.parse_args()
    config = base_config()
    task = mnist_cnn_task(config)
    graph, params = trace_task(task), task.load_params()
    size = config.batch_size
    ranges = jr.calibrate(graph, params, [x for x, _ in batches(task.split("ranges"), size)])
    data = batches(task.split("selection"), size)
    scores = jr.score(graph, params, data, task.loss, ranges)
    plans = {
        "all int4, nearest": jr.uniform(scores.table, "int4"),
        "all int4, directed (rmils, mu = 0)": jr.rmils(graph, scores, mu=0.0),
        "mixed": jr.uniform(scores.table, "float", force=MIXED),
    }
    rows = []
    for name, plan in plans.items():
        tangent = sum(jr.predict(scores, plan).values())
        found = {
            t: jr.attribute(graph, params, plan, data, task.loss, ranges, points=t)
            for t in (1, 2, 4)
        }
        rows.append(row(name, "tangent", tangent, found[2]))
        for points, each in found.items():
            predicted = sum(each.layers.values())
            rows.append(row(name, f"secant, T = {points}", predicted, each))
    write(Path(args.out), rows)


def row(plan: str, method: str, predicted: np.ndarray, found) -> dict:
    """One line: means, per-example correlation and the rest as a share of the absolute sum."""
    absolute = np.mean(sum(np.abs(values) for values in found.layers.values()))
    return {
        "plan": plan,
        "method": method,
        "predicted": float(predicted.mean()),
        "measured": float(found.change.mean()),
        "correlation": float(np.corrcoef(predicted, found.change)[0, 1]),
        "rest": float(abs(predicted.mean() - found.change.mean()) / absolute),
    }


def write(out: Path, rows: list[dict]) -> None:
    """Writes and prints the table."""
    lines = [
        "| plan | method | predicted | measured | per-example correlation | rest |",
        "|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {r['plan']} | {r['method']} | {r['predicted']:+.5f} | {r['measured']:+.5f} "
        f"| {r['correlation']:.4f} | {100 * r['rest']:.2f} % |"
        for r in rows
    ]
    write_table(out, rows, lines)


if __name__ == "__main__":
    main()
