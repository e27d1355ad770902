"""Tangent and secant (1, 2, 4 points) beside the measured joint change, on three networks.

    python experiments/secant_points.py --out experiments/results/secant_points

The demo CNN, trained, on the selection split of the embedded digits; a transformer block and
Hugging Face's FlaxBert (two layers), both with random weights, on random inputs. All in int4, all
in int4 and rounded in the tangent's directions, and mixed formats. The rest is the mean of
predicted minus measured, as a share of the mean sum of absolute contributions. Writes JSON and
markdown.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from results_file import write_table

import jaxrmils as jr
from jaxrmils.cli import base_config, batches, trace_task
from jaxrmils.graph import ModelTable
from jaxrmils.policies import Plan
from jaxrmils.zoo import mnist_cnn_task

CNN_MIXED = {"Conv_0/*": "w8a8", "Conv_1/*": "w4a8", "Dense_0/*": "w4a4", "Dense_1/*": "float"}
TURNS = ("w4a4", "w8a8", "w4a8", "float")
INT4, DIRECTED, MIXED = "all int4, nearest", "all int4, directed", "mixed"


class Network(NamedTuple):
    """A network with its data, ready to score."""

    graph: jr.Graph
    params: Any
    data: list[tuple[Any, Any]]
    loss: Callable[[Any, Any], Any]
    ranges: jr.Ranges
    mixed: dict[str, str] | None


def demo_cnn() -> Network:
    """The demo's CNN on 750 digits."""
    config = base_config()
    task = mnist_cnn_task(config)
    graph, params = trace_task(task), task.load_params()
    size = config.batch_size
    ranges = jr.calibrate(graph, params, [x for x, _ in batches(task.split("ranges"), size)])
    data = batches(task.split("selection"), size)
    return Network(graph, params, data, task.loss, ranges, CNN_MIXED)


def transformer_block(examples: int = 512) -> Network:
    """The tests' transformer block."""
    sys.path.append(str(Path(__file__).parents[1] / "tests"))
    from models import loss, model, random

    apply, params, _ = model("transformer")
    inputs, targets = random(examples, 5, 8, seed=3), jnp.linspace(-0.5, 0.5, examples)
    graph = jr.trace(apply, params, inputs)
    ranges = jr.calibrate(graph, params, [random(256, 5, 8, seed=4)])
    return Network(graph, params, [(inputs, targets)], loss, ranges, None)


def flax_bert(examples: int = 64) -> Network:
    """The tests' FlaxBert; the loss is the cross-entropy of an answer's start and end."""
    sys.path.append(str(Path(__file__).parents[1] / "tests"))
    from flax_bert import LENGTH, VOCABULARY
    from flax_bert import flax_bert as tiny_bert

    apply, params, _ = tiny_bert()
    rng = np.random.default_rng(1)

    def inputs(count: int) -> dict[str, Any]:
        lengths = rng.integers(4, LENGTH + 1, (count, 1))
        return {
            "input_ids": jnp.asarray(rng.integers(0, VOCABULARY, (count, LENGTH)), jnp.int32),
            "attention_mask": jnp.asarray(np.arange(LENGTH) < lengths, jnp.int32),
            "token_type_ids": jnp.asarray(rng.integers(0, 2, (count, LENGTH)), jnp.int32),
        }

    def span_loss(outputs: Any, targets: Any) -> Any:
        start, end = (jax.nn.log_softmax(logits) for logits in outputs)
        rows = jnp.arange(targets.shape[0])
        return -(start[rows, targets[:, 0]] + end[rows, targets[:, 1]]) / 2

    selection, targets = inputs(examples), rng.integers(0, 4, (examples, 2)).astype(np.int32)
    graph = jr.trace(apply, params, selection)
    ranges = jr.calibrate(graph, params, [inputs(examples)])
    return Network(graph, params, [(selection, targets)], span_loss, ranges, None)


NETWORKS = {"demo CNN": demo_cnn, "transformer block": transformer_block, "FlaxBert": flax_bert}


def mixed_formats(network: Network, table: ModelTable) -> dict[str, str]:
    """A format by layer or pattern: the network's own, or all kinds in turn."""
    return network.mixed or {name: TURNS[i % len(TURNS)] for i, name in enumerate(table.layer)}


def plans_for(network: Network, scores: jr.Scores) -> dict[str, Plan]:
    """All in int4, rounded to nearest or in the tangent's directions, and mixed formats."""
    mixed = mixed_formats(network, scores.table)
    return {
        INT4: jr.uniform(scores.table, "int4"),
        DIRECTED: jr.rmils(network.graph, scores, mu=0.0),
        MIXED: jr.uniform(scores.table, "float", force=mixed),
    }


def attributed(network: Network, plan: Plan, points: int) -> Any:
    """The plan's attribution."""
    graph, params, data, loss, ranges, _ = network
    return jr.attribute(graph, params, plan, data, loss, ranges, points=points)


def row(network: str, plan: str, method: str, predicted: np.ndarray, found: Any) -> dict:
    """One line: means, per-example correlation and the rest as a share of the absolute sum."""
    absolute = np.mean(sum(np.abs(values) for values in found.layers.values()))
    return {
        "network": network,
        "plan": plan,
        "method": method,
        "predicted": float(predicted.mean()),
        "measured": float(found.change.mean()),
        "correlation": float(np.corrcoef(predicted, found.change)[0, 1]),
        "rest": float(abs(predicted.mean() - found.change.mean()) / absolute),
    }


def rows_of(name: str, network: Network) -> list[dict]:
    """The lines of one network."""
    graph, params, data, loss, ranges, _ = network
    scores = jr.score(graph, params, data, loss, ranges)
    rows = []
    for plan_name, plan in plans_for(network, scores).items():
        tangent = sum(jr.predict(scores, plan).values())
        found = {t: attributed(network, plan, t) for t in (1, 2, 4)}
        rows.append(row(name, plan_name, "tangent", tangent, found[2]))
        for points, each in found.items():
            predicted = sum(each.layers.values())
            rows.append(row(name, plan_name, f"secant, T = {points}", predicted, each))
    return rows


def write(out: Path, rows: list[dict]) -> None:
    """Writes and prints the table."""
    lines = [
        "| network | plan | method | predicted | measured | per-example correlation | rest |",
        "|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {r['network']} | {r['plan']} | {r['method']} | {r['predicted']:+.5f} "
        f"| {r['measured']:+.5f} | {r['correlation']:.4f} | {100 * r['rest']:.2f} % |"
        for r in rows
    ]
    write_table(out, rows, lines)


def main() -> None:
    """Runs the experiment."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", default="experiments/results/secant_points")
    args = parser.parse_args()
    rows = [row for name, make in NETWORKS.items() for row in rows_of(name, make())]
    write(Path(args.out), rows)


if __name__ == "__main__":
    main()
