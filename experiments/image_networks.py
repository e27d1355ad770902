"""The paper's table for a reference image network: every policy on images that chose nothing.

    python experiments/image_networks.py --network cifar_resnet20 --checkpoint FILE --images FOLDER

FOLDER holds images in folders named after their classes (or a zip archive of that), or `--labels`
names a CSV file. Every draw deals the images anew to ranges, selection, confirmation and test, and
each row is measured on that draw's test images; intervals of a draw are over its images, and the
table's are Student's over draws.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from results_file import write_table

import jaxrmils as jr
from jaxrmils.data import Dataset, load_image_folder, make_splits
from jaxrmils.evaluation.simulate import SimulatedModel
from jaxrmils.evaluation.temperature import fit_temperature
from jaxrmils.policies import Plan, Simulator
from jaxrmils.progress import bars
from jaxrmils.statistics import mean_interval
from jaxrmils.zoo import cross_entropy, reference

PUBLISHED = {
    "cifar_resnet20": "ResNet-18, published: float 69.77 / 89.07, loss 1.247004, 44.7 MB; RMILS "
    "69.75 / 89.092, 1.246837, 12.27 MB (other weights, other data)",
    "efficientnet_lite0": "MobileNetV2, published: float 71.89 / 90.292, loss 1.14792, 13.6 MB; "
    "RMILS 71.882 / 90.298, 1.147831, 4.13 MB (other weights)",
}


def main() -> None:
    """Runs the experiment."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--network", default="cifar_resnet20")
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument("--images", required=True)
    parser.add_argument("--labels", help="CSV with the columns file and label")
    parser.add_argument("--ranges", type=int, default=250)
    parser.add_argument("--selection", type=int, default=1_000)
    parser.add_argument("--confirmation", type=int, default=4_000)
    parser.add_argument("--test", type=int, default=4_750)
    parser.add_argument("--draws", type=int, default=5)
    parser.add_argument("--margin", type=float, default=0.01)
    parser.add_argument("--batch", type=int, default=250)
    parser.add_argument("--mu", type=float, nargs="*", default=[0.01, 0.1])
    parser.add_argument("--out")
    args = parser.parse_args()
    network = reference(args.network)
    data = load_image_folder(
        args.images,
        size=network.input_size,
        crop_padding=network.crop_padding,
        normalization=network.normalization,
        labels=args.labels,
    )
    apply, params = jr.from_linen(network.module, network.from_checkpoint(args.checkpoint))
    graph = jr.trace(apply, params, data.inputs[:1])
    print(graph.coverage.summary(), flush=True)
    simulator = Simulator(graph, cross_entropy)
    draws = []
    for seed in bars(range(args.draws), "draws", args.draws):
        draws.append(draw(seed, simulator, params, data, args))
        for row in draws[-1]:
            print(seed, row, flush=True)
    out = Path(args.out or f"experiments/results/image_{args.network}")
    write_table(out, [row for rows in draws for row in rows], table(draws, data, args))


def draw(seed: int, simulator: Simulator, params, data: Dataset, args) -> list[dict]:
    """All rows of one deal of the images."""
    graph = simulator.graph
    splits = make_splits(
        len(data),
        ranges=args.ranges,
        selection=args.selection,
        confirmation=args.confirmation,
        test=args.test,
        seed=seed,
    )

    def batches(name: str) -> list:
        part = data.take(getattr(splits, name))
        return list(part.batches(min(args.batch, len(part))))

    began = time.perf_counter()
    inputs = [x for x, _ in batches("ranges")]
    ranges = jr.calibrate(graph, params, inputs)
    scores = jr.score(graph, params, batches("selection"), cross_entropy, ranges)
    found = jr.lossless(
        graph,
        params,
        batches("selection"),
        batches("confirmation"),
        cross_entropy,
        ranges,
        margin=args.margin,
        scores=scores,
        search=jr.Search(formats=("w8a8", "w4a8"), length=24),
        simulator=simulator,
    )
    seconds = time.perf_counter() - began
    print(seed, found.words, f"{seconds:.0f} s", flush=True)
    judged = Judge(SimulatedModel(graph, params, ranges, cross_entropy), batches("test"), scores)
    rows = [judged.float_row(), judged.temperature_row(batches("selection"))]
    rows.append(judged.row("uniform int8", jr.uniform(scores.table, "int8")))
    aciq = jr.calibrate(graph, params, inputs, estimator="aciq_laplace")
    other = Judge(SimulatedModel(graph, params, aciq, cross_entropy), batches("test"), scores)
    rows.append(other.row("uniform int8, ACIQ ranges", jr.uniform(scores.table, "int8"), judged))
    rows.append(judged.row("uniform int4 weights", jr.uniform(scores.table, "w4a8")))
    for variant in ("radical", "balanced"):
        for mu in args.mu:
            plan = jr.rmils(graph, scores, mu=mu, variant=variant)
            rows.append(judged.row(f"rmils, {variant}, mu {mu:g}", plan))
    rows.append(judged.row("lossless", found.plan) | {"seconds": seconds})
    return rows


class Judge:
    """Measures plans on the test images of a draw, in simulation."""

    def __init__(self, model: SimulatedModel, batches: list, scores: jr.Scores):
        self.model, self.batches, self.table = model, batches, scores.table
        self.labels = np.concatenate([np.asarray(y) for _, y in batches])
        self.float_model = model.run(batches, keep_logits=True)

    def described(self, name: str, found, bits: int, weight_bits: float) -> dict:
        """A row from losses and logits."""
        top = np.argsort(-found.logits, axis=1)[:, :5]
        hits = top == self.labels[:, None]
        change = mean_interval(found.loss - self.float_model.loss)
        return {
            "row": name,
            "acc1": float(hits[:, 0].mean()),
            "acc5": float(hits.any(axis=1).mean()),
            "loss": float(found.loss.mean()),
            "change": change.mean,
            "lower": change.lower,
            "upper": change.upper,
            "megabytes": bits / 8e6,
            "weight_bits": weight_bits,
        }

    def float_row(self) -> dict:
        """The float model."""
        return self.described("float", self.float_model, self.table.float_bits, 32.0)

    def temperature_row(self, selection: list) -> dict:
        """The float model at a temperature fitted on the selection images."""
        logits = self.model.run(selection, keep_logits=True).logits
        targets = np.concatenate([np.asarray(y) for _, y in selection])
        temperature = fit_temperature(logits, targets, cross_entropy).value
        found = self.model.run(self.batches, temperature=temperature, keep_logits=True)
        name = "float, own temperature"
        return self.described(name, found, self.table.float_bits, 32.0) | {"T": temperature}

    def row(self, name: str, plan: Plan, against: Judge | None = None) -> dict:
        """A plan."""
        found = self.model.run(self.batches, plan, keep_logits=True)
        sizes = [row for row in self.table.layers if row.has_weight]
        bits = sum(row.weight_size * plan.layers[row.name].weight_bits for row in sizes)
        weights = sum(row.weight_size for row in sizes)
        judge = against or self
        size = self.table.size_bits(plan.formats())
        return judge.described(name, found, size, bits / weights) | {"formats": plan.counts()}


def table(draws: list[list[dict]], data: Dataset, args) -> list[str]:
    """The rows' means over draws, with Student's 95 % intervals."""

    def over(rows: list[dict], key: str, show: Callable[[float], str]) -> str:
        values = np.array([row[key] for row in rows])
        if len(values) < 2 or np.ptp(values) == 0:
            return show(values[0])
        interval = mean_interval(values, method="t")
        half = (interval.upper - interval.lower) / 2
        return f"{show(interval.mean)} ± {show(half)}"

    lines = [
        "| | Acc@1 | Acc@5 | loss | change of the loss | above the margin | MB | weight bits |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for rows in zip(*draws, strict=True):
        worse = sum(row["lower"] > args.margin for row in rows)
        cells = [
            over(rows, "acc1", lambda v: f"{100 * v:.2f}"),
            over(rows, "acc5", lambda v: f"{100 * v:.2f}"),
            over(rows, "loss", lambda v: f"{v:.4f}"),
            over(rows, "change", lambda v: f"{v:.4f}"),
            f"{worse} of {len(rows)}",
            over(rows, "megabytes", lambda v: f"{v:.3f}"),
            over(rows, "weight_bits", lambda v: f"{v:.2f}"),
        ]
        lines.append(f"| {rows[0]['row']} | " + " | ".join(cells) + " |")
    seconds = np.median([row["seconds"] for rows in draws for row in rows if "seconds" in row])
    lines += [
        "",
        f"{len(draws)} draws from {len(data):,} images: {args.ranges} for ranges, "
        f"{args.selection:,} for selection, {args.confirmation:,} for confirmation, "
        f"{args.test:,} for test; margin {args.margin} nats; calibration, scores, search and tests "
        f"take {seconds:.0f} s (median). {PUBLISHED.get(args.network, '')}",
    ]
    return lines


if __name__ == "__main__":
    main()
