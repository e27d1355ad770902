"""Sweeps the threshold mu of the radical and the balanced variant on digit classifiers.

    python experiments/mnist_mu_ablation.py --mnist FOLDER

Several networks are trained anew; each chooses its plans on its own selection images and is
measured on test images that chose nothing. Thresholds are the published 0.3, 0.4 and 0.5 (nats per
unit of activation) and, since no layer here has so large a mu, quantiles of each network's own mu.
Intervals are Student's 95 % over networks; "lower / higher" counts the networks whose own 95 %
interval over the test images is below or above zero. Writes JSON and markdown.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from mnist_full import add_option
from mnist_nets import Digits, digits, train
from results_file import write_table

import jaxrmils as jr
from jaxrmils.evaluation import Measured, SimulatedModel
from jaxrmils.policies import Plan
from jaxrmils.progress import bars
from jaxrmils.sensitivity import Scores
from jaxrmils.statistics import mean_interval
from jaxrmils.zoo import cross_entropy

PUBLISHED_MU = (0.3, 0.4, 0.5)
QUANTILES = (0.0, 0.25, 0.5, 0.75)
WIDTHS = ((8, 4), (8,))
BATCH = 500

# (loss, accuracy) on MNIST, on the authors' own networks.
PUBLISHED = {
    ("radical", 0.3): (0.1167, 0.9211),
    ("radical", 0.4): (0.0801, 0.9691),
    ("radical", 0.5): (0.0782, 0.9748),
    ("balanced", 0.3): (0.0654, 0.9731),
    ("balanced", 0.4): (0.0654, 0.9731),
    ("balanced", 0.5): (0.0782, 0.9748),
}


def main() -> None:
    """Runs the experiment."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add_option(parser)
    parser.add_argument("--seeds", type=int, default=5, help="networks")
    parser.add_argument("--selection", type=int, default=750, help="selection images")
    parser.add_argument("--held-out", type=int, default=10_000, help="test images, if there are")
    parser.add_argument("--out", default="experiments/results/mnist_mu_ablation")
    args = parser.parse_args()
    data = digits(args.mnist, args.held_out)
    rows = []
    for seed in bars(range(args.seeds), "networks", args.seeds):
        rows += network(data, seed, args.selection)
    write(Path(args.out), rows, data, args.seeds)


def network(data: Digits, seed: int, selection: int) -> list[dict]:
    """One network: a row for every plan of the sweep."""
    net = train(data, seed=seed, examples=2_000, copies=4, epochs=4)
    chosen = net.unseen.take(np.arange(selection))
    ranges_from = net.unseen.take(np.arange(selection, selection + 250))
    ranges = jr.calibrate(net.graph, net.params, [ranges_from.inputs])
    batches = list(chosen.batches(min(250, selection)))
    scores = jr.score(net.graph, net.params, batches, cross_entropy, ranges)
    model = SimulatedModel(net.graph, net.params, ranges, cross_entropy)
    held_out = list(data.held_out.batches(BATCH))
    before = model.run(held_out)
    known: dict[tuple, Measured] = {}
    rows = []
    for name, mu, variant, bits, plan in plans(net.graph, scores):
        key = tuple(plan.layers.values())
        if key not in known:
            known[key] = model.run(held_out, plan)
        described = {"seed": seed, "mu": name, "threshold": mu, "variant": variant, "bits": bits}
        rows.append(described | measured(scores, plan, before, known[key]))
    return rows


def plans(graph: jr.Graph, scores: Scores):
    """Yields name and value of mu, variant, widths and plan."""
    float_plan = jr.uniform(scores.table, "float")
    yield "-", None, "float", "-", float_plan
    for format_ in ("int8", "int4"):
        yield "-", None, f"uniform {format_}, nearest", "-", jr.uniform(scores.table, format_)
    values = jr.mu_values(graph, scores)
    for bits in WIDTHS:
        pooled = [mu for by_bits in values.values() for b, mu in by_bits.items() if b in bits]
        levels = [(f"{100 * q:g} % quantile", float(np.quantile(pooled, q))) for q in QUANTILES]
        levels += [(f"{mu:g}", mu) for mu in PUBLISHED_MU]
        for variant in ("radical", "balanced"):
            for name, mu in levels:
                plan = jr.rmils(graph, scores, mu=mu, variant=variant, bits=bits)
                yield name, mu, variant, ",".join(map(str, bits)), plan


def measured(scores: Scores, plan: Plan, before: Measured, after: Measured) -> dict:
    """Loss, accuracy, size and formats of one plan."""
    change = mean_interval(after.loss - before.loss)
    assert before.correct is not None and after.correct is not None
    accuracy = mean_interval(after.correct.astype(float) - before.correct)
    table = scores.table
    weights = sum(row.weight_size for row in table.layers)
    bits = sum(plan.layers[row.name].weight_bits * row.weight_size for row in table.layers)
    widths = [layer.weight_bits for layer in plan.layers.values()]
    return {
        "loss": float(after.loss.mean()),
        "change": change.mean,
        "change_lower": change.lower,
        "change_upper": change.upper,
        "accuracy": float(after.correct.mean()),
        "accuracy_change": accuracy.mean,
        "accuracy_lower": accuracy.lower,
        "accuracy_upper": accuracy.upper,
        "average_weight_bits": bits / weights,
        "size_bits": table.size_bits(plan.formats()),
        "int4": widths.count(4),
        "int8": widths.count(8),
        "float": widths.count(32),
    }


def over_networks(values: list[float], digits: int = 4) -> str:
    """Mean and Student's 95 % half width over networks."""
    if len(values) < 2:
        return f"{values[0]:.{digits}f}"
    found = mean_interval(values, method="t")
    return f"{found.mean:.{digits}f} ± {found.upper - found.mean:.{digits}f}"


def write(out: Path, rows: list[dict], data: Digits, seeds: int) -> None:
    """Writes and prints the table."""
    lines = [
        f"{seeds} networks, {len(data.held_out):,} held-out images ({data.name}).",
        "",
        "| variant | widths | mu | threshold | loss | loss change | against uniform int8 "
        "| lower / higher | accuracy | weight bits | size, kB | layers int4 / int8 / float "
        "| published loss, accuracy (other weights) |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    int8 = {r["seed"]: r["change"] for r in rows if r["variant"].startswith("uniform int8")}
    for variant, bits, mu in dict.fromkeys((r["variant"], r["bits"], r["mu"]) for r in rows):
        some = [r for r in rows if (r["variant"], r["bits"], r["mu"]) == (variant, bits, mu)]

        def column(field: str, some: list[dict] = some) -> list[float]:
            return [row[field] for row in some]

        def mean(field: str, column=column) -> float:
            return float(np.mean(column(field)))

        beside = [row["change"] - int8[row["seed"]] for row in some]
        lower = sum(row["change_upper"] < 0 for row in some)
        higher = sum(row["change_lower"] > 0 for row in some)
        threshold = "-" if some[0]["threshold"] is None else f"{mean('threshold'):.4g}"
        published = PUBLISHED.get((variant, some[0]["threshold"])) if bits == "8,4" else None
        layers = " / ".join(f"{mean(width):.1f}" for width in ("int4", "int8", "float"))
        lines.append(
            f"| {variant} | {bits} | {mu} | {threshold} | {over_networks(column('loss'))} "
            f"| {over_networks(column('change'), 5)} | {over_networks(beside, 5)} "
            f"| {lower} / {higher} | {over_networks(column('accuracy'))} "
            f"| {mean('average_weight_bits'):.1f} | {mean('size_bits') / 8000:.1f} | {layers} "
            f"| {'-' if published is None else '{:.4f}, {:.4f}'.format(*published)} |"
        )
    write_table(out, rows, lines)


if __name__ == "__main__":
    main()
