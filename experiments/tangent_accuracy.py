"""How well the tangent predicts: per site and candidate, predicted against measured changes.

    python experiments/tangent_accuracy.py --out experiments/results/tangent_accuracy

Trains the demo CNN, scores it on the selection split, and measures each candidate alone on the
same examples (so that sampling plays no part). Writes JSON and markdown.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from results_file import write_table

import jaxrmils as jr
from jaxrmils.cli import base_config, batches, trace_task
from jaxrmils.sensitivity import all_off, perturbed_losses
from jaxrmils.zoo import mnist_cnn_task


def main() -> None:
    """Runs the experiment."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", default="experiments/results/tangent_accuracy")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    config = base_config()
    config.seed = args.seed
    task = mnist_cnn_task(config)
    rows = measure(task, config.batch_size, task.load_params())
    write(Path(args.out), rows)


def measure(task, batch_size: int, params) -> list[dict]:
    """One row per activation operand and candidate, and per weight and width."""
    graph = trace_task(task)
    ranges = jr.calibrate(graph, params, [x for x, _ in batches(task.split("ranges"), batch_size)])
    data = batches(task.split("selection"), batch_size)
    scores = jr.score(graph, params, data, task.loss, ranges)

    @jax.jit
    def losses(inputs, targets, switches):
        return perturbed_losses(graph, params, inputs, targets, task.loss, ranges, *switches)

    def change(switches):
        found = [np.asarray(losses(x, y, switches), np.float64) for x, y in data]
        return np.concatenate(found) - base

    off = all_off(graph, ranges)
    base = np.zeros(len(scores))
    base = change(off)
    rows = []
    for index, (site, position) in enumerate(scores.activation_rows):
        for k, candidate in enumerate(scores.activation_candidates):
            activations = {**off[0], site: off[0][site].at[position].set(k + 1)}
            predicted = scores.activations[:, index, k]
            rows.append(row(f"{site} input", candidate, predicted, change((activations, off[1]))))
    for name in graph.weights:
        for k, candidate in enumerate(scores.weight_candidates):
            weights = {**off[1], name: jnp.int32(k + 1)}
            predicted = scores.weight(name, candidate)
            rows.append(row(f"{name} weight", candidate, predicted, change((off[0], weights))))
    return rows


def row(site, candidate, predicted, measured) -> dict:
    """Correlation and error of one candidate; no correlation where nothing changes."""
    scale = float(np.abs(measured).mean())
    moved = scale > 1e-6
    return {
        "site": site,
        "candidate": str(candidate),
        "predicted": float(predicted.mean()),
        "measured": float(measured.mean()),
        "mean_absolute_change": scale,
        "correlation": float(np.corrcoef(predicted, measured)[0, 1]) if moved else None,
        "mean_error": abs(float(predicted.mean() - measured.mean())) / scale if moved else None,
    }


def write(out: Path, rows: list[dict]) -> None:
    """Writes and prints the table."""
    lines = [
        "| site | candidate | predicted | measured | mean abs. change | correlation | mean error |",
        "|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        fits = "-" if r["correlation"] is None else f"{r['correlation']:.4f}"
        error = "-" if r["mean_error"] is None else f"{100 * r['mean_error']:.1f} %"
        lines.append(
            f"| {r['site']} | {r['candidate']} | {r['predicted']:+.5f} | {r['measured']:+.5f} "
            f"| {r['mean_absolute_change']:.5f} | {fits} | {error} |"
        )
    write_table(out, rows, lines)


if __name__ == "__main__":
    main()
