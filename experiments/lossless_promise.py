"""Does `lossless` keep its promise? Retrained networks and new splits of the full MNIST.

    python experiments/lossless_promise.py --mnist FOLDER

Every repetition shuffles the 70,000 images, trains a network on some, lets `lossless` choose a plan
with others, and takes the true loss change of every plan of its sequence on those that are left.
A returned plan breaks the promise if its true change is above the margin, which may happen in 5 %
of the repetitions. Beside it, the naive choice: the smallest plan of the sequence whose mean change
on the selection data is within the margin. Finished repetitions are kept, so that an interrupted
run goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import dataclass
from pathlib import Path

import jax
import mnist_full
import numpy as np
from results_file import write_table
from scipy import stats

import jaxrmils as jr
from jaxrmils.graph import Graph, from_linen
from jaxrmils.policies import Lossless, LosslessStep, Plan, Simulation, Simulator
from jaxrmils.progress import bars
from jaxrmils.zoo import MnistCNN, cross_entropy, train_classifier

BATCH = 500


def main() -> None:
    """Runs the experiment."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    mnist_full.add_option(parser)
    parser.add_argument("--repetitions", type=int, default=40)
    parser.add_argument("--training", type=int, default=8_000)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--ranges", type=int, default=500)
    parser.add_argument("--selection", type=int, default=1_000)
    parser.add_argument("--confirmation", type=int, default=10_000)
    parser.add_argument("--pool", type=int, default=40_000, help="images for the truth")
    parser.add_argument(
        "--margins", type=float, nargs="+", default=[0.0, 0.002], help="0 for the library's default"
    )
    parser.add_argument("--out", default="experiments/results/lossless_promise")
    args = parser.parse_args()
    data = mnist_full.load(args.mnist)
    simulator = simulator_for(data)
    kept = Path(args.out).with_suffix(".partial.json")
    # The settings that must agree for kept repetitions to belong to this run.
    settings = {k: v for k, v in vars(args).items() if k not in ("mnist", "repetitions", "out")}
    rows = restored(kept, settings)
    for seed in bars(range(args.repetitions), "repetitions", args.repetitions):
        if seed >= len(rows):
            rows.append(repetition(seed, data, simulator, args))
            kept.parent.mkdir(parents=True, exist_ok=True)
            kept.write_text(json.dumps({"settings": settings, "rows": rows}))
            print(summary(rows[-1]), flush=True)
    rows = rows[: args.repetitions]
    write_table(Path(args.out), rows, table(rows, args))
    kept.unlink(missing_ok=True)


def restored(kept: Path, settings: dict) -> list[dict]:
    """The repetitions of an interrupted run with the same settings."""
    if not kept.exists():
        return []
    found = json.loads(kept.read_text())
    return found["rows"] if found["settings"] == settings else []


def simulator_for(data) -> Simulator:
    """The network's functions, compiled once for all repetitions."""
    module = MnistCNN()
    example = jax.ShapeDtypeStruct((1, *data.inputs.shape[1:]), data.inputs.dtype)
    shapes = jax.eval_shape(module.init, jax.random.key(0), example)
    apply, _ = from_linen(module, shapes)
    return Simulator(jr.trace(apply, shapes, example), cross_entropy)


def repetition(seed: int, data, simulator: Simulator, args) -> dict:
    """One network, one set of splits."""
    began = time.perf_counter()
    sizes = (args.training, args.ranges, args.selection, args.confirmation)
    order = np.random.default_rng(seed).permutation(len(data))
    parts = [data.take(indices) for indices in np.split(order, np.cumsum(sizes))]
    training, ranges_data, selection, confirmation, rest = parts
    params = train_classifier(MnistCNN(), training, epochs=args.epochs, seed=seed)
    graph = simulator.graph
    ranges = jr.calibrate(graph, params, [x for x, _ in ranges_data.batches(BATCH)])
    chosen = list(selection.batches(BATCH))
    scores = jr.score(graph, params, chosen, cross_entropy, ranges)
    pool = rest.take(np.arange(args.pool))
    truth = Truth(simulator.on(params, ranges, list(pool.batches(BATCH))), {})
    margins, prepared = [], time.perf_counter() - began
    for margin in args.margins:
        began = time.perf_counter()
        found = jr.lossless(
            graph,
            params,
            chosen,
            list(confirmation.batches(BATCH)),
            cross_entropy,
            ranges,
            margin=margin or None,
            scores=scores,
            simulator=simulator,
        )
        seconds = time.perf_counter() - began
        steps = [described(step, graph) for step in found.steps]
        picked = {"chosen": found.chosen, "naive": naive(steps, found.margin)}
        margins.append(
            {
                "margin": found.margin,
                **picked,
                "best": truth.best(found, steps),
                "true": {
                    key: None if index is None else truth.of(found.steps[index].plan)
                    for key, index in picked.items()
                },
                "steps": steps,
                "seconds": seconds,
            }
        )
    return {
        "seed": seed,
        "float_loss": float(truth.simulation.float_loss.mean()),
        "pool": len(pool),
        "seconds": prepared,
        "margins": margins,
    }


@dataclass(frozen=True)
class Truth:
    """True loss changes: means over the pool, each taken once."""

    simulation: Simulation
    known: dict

    def of(self, plan: Plan) -> float:
        """The mean change of a plan, in nats."""
        key = tuple(plan.layers.values())
        if key not in self.known:
            self.known[key] = float(self.simulation.change(plan).mean())
        return self.known[key]

    def best(self, found: Lossless, steps: list[dict]) -> float:
        """Compression of the best plan of the sequence that truly meets the margin; 1 if none."""
        for step, row in zip(reversed(found.steps), reversed(steps), strict=True):
            if self.of(step.plan) <= found.margin:
                return row["compression"]
        return 1.0


def described(step: LosslessStep, graph: Graph) -> dict:
    """A plan of the sequence."""
    layers = step.plan.layers.values()
    return {
        "compression": jr.tabulate(graph).float_bits / step.size_bits,
        "formats": [layer.format for layer in layers],
        "roundings": [layer.rounding for layer in layers],
        "selection": step.selection.mean,
        "selection_error": step.selection.standard_error,
        "upper_bound": None if step.test is None else step.test.upper_bound,
        "passed": step.test is not None and step.test.passed,
    }


def naive(steps: list[dict], margin: float) -> int | None:
    """The smallest plan that looks lossless on the data that chose it."""
    passing = [i for i, step in enumerate(steps) if step["selection"] <= margin]
    return passing[-1] if passing else None


def outcome(found: dict, key: str) -> tuple[bool, float]:
    """Does the plan break the promise; its compression."""
    index = found[key]
    if index is None:
        return False, 1.0
    return found["true"][key] > found["margin"], found["steps"][index]["compression"]


def summary(row: dict) -> str:
    """One line while it runs."""
    parts = []
    for found in row["margins"]:
        broken, compression = outcome(found, "chosen")
        parts.append(
            f"margin {found['margin']:.4f}: {compression:.2f} x of {found['best']:.2f} x, "
            f"{'BROKEN' if broken else 'kept'}, naive "
            f"{'BROKEN' if outcome(found, 'naive')[0] else 'kept'}, {found['seconds']:.0f} s"
        )
    return f"seed {row['seed']}: " + "; ".join(parts)


def table(rows: list[dict], args) -> list[str]:
    """The table: one pair of lines for every margin."""
    lines = [
        "| margin | plan | broke the promise | share (95 % interval) | mean compression "
        "| of the best that the truth allows |",
        "|---|---|---|---|---|---|",
    ]
    for number, margin in enumerate(args.margins):
        at_margin = [row["margins"][number] for row in rows]
        name = f"{margin} nats" if margin else "default"
        for plan, key in (("lossless", "chosen"), ("naive", "naive")):
            outcomes = [outcome(found, key) for found in at_margin]
            broken = sum(b for b, _ in outcomes)
            interval = stats.binomtest(broken, len(rows)).proportion_ci(0.95, method="exact")
            compression = np.mean([c for _, c in outcomes])
            best = np.mean([found["best"] for found in at_margin])
            lines.append(
                f"| {name} | {plan} | {broken} of {len(rows)} | {100 * broken / len(rows):.1f} % "
                f"({100 * interval.low:.1f} to {100 * interval.high:.1f}) | {compression:.2f} x "
                f"| {100 * compression / best:.1f} % |"
            )
    losses = [row["float_loss"] for row in rows]
    defaults = [m["margin"] for row in rows for m in row["margins"][:1]]
    seconds = np.median([found["seconds"] for row in rows for found in row["margins"]])
    lines += [
        "",
        f"{len(rows)} repetitions: {args.training:,} training images, {args.selection:,} for "
        f"selection, {args.confirmation:,} for confirmation, "
        f"{min(row['pool'] for row in rows):,} for the truth; the default margin is "
        f"{min(defaults):.4f} to {max(defaults):.4f} nats; float loss {min(losses):.3f} to "
        f"{max(losses):.3f}; a search with its tests takes {seconds:.0f} s (median).",
    ]
    return lines


if __name__ == "__main__":
    main()
