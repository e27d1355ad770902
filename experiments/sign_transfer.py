"""How much data a rounding direction needs before it holds on other data.

    python experiments/sign_transfer.py --mnist FOLDER

For well-fitted networks (shifted copies, early stop) and overfitted ones (few images, many epochs),
several seeds each. Many calibration sets of every size are drawn from images that the network has
not seen; disjoint held-out images are the truth. Asked are

* the sign of mean(p . 1) of every layer input: does the held-out mean have it too?
* the direction, floor or ceil, with the smaller mean first-order contribution, at int8 and int4:
  does the held-out data choose the same?
* the sign of that direction's mean contribution: is a predicted gain or loss one on held-out data?
* the joint loss of all layers in that width, rounded in the chosen directions, against rounding to
  nearest, measured on the held-out data: is the gain real? ("surely": one-sided 95 % over images)
* the plan from the largest calibration set beside its controls: flipped directions, the float model
  with the same constant shift, the float model at a fitted temperature.

All but the last are asked of all inputs and of those whose calibration statistic has |t| > 2 (the
others are rounded to nearest; a set in which none passes gains nothing). Inputs that the grid
represents exactly are left out. Sets of one size overlap: they are drawn from one pool, and the
last size is all of it. In brackets, how many inputs pass. Writes JSON and markdown.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from mnist_full import add_option
from mnist_nets import Digits, Net, digits, train
from results_file import write_table

import jaxrmils as jr
from jaxrmils.evaluation import SimulatedModel, controls
from jaxrmils.numerics import Rounding
from jaxrmils.policies import Plan
from jaxrmils.policies.constraints import nearest_layer
from jaxrmils.progress import bars
from jaxrmils.sensitivity import Candidate, Scores
from jaxrmils.statistics import mean_interval
from jaxrmils.zoo import cross_entropy

KINDS = {
    "well-fitted": {"examples": 2_000, "copies": 4, "epochs": 2},
    "overfitted": {"examples": 200, "copies": 0, "epochs": 120, "weight_decay": 0.0},
}
SIZES = (50, 100, 200, 500, 1_000)
FLOORS = (0.0, 2.0)
NAMES: dict[int, Rounding] = {-1: "floor", 0: "nearest", 1: "ceil"}
BITS = (8, 4)
BATCH = 500


def main() -> None:
    """Runs the experiment."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add_option(parser)
    parser.add_argument("--seeds", type=int, default=3, help="networks of each kind")
    parser.add_argument("--draws", type=int, default=20, help="calibration sets of each size")
    parser.add_argument("--pool", type=int, default=2_000, help="images they are drawn from")
    parser.add_argument("--held-out", type=int, default=6_000, help="held-out images, if there are")
    parser.add_argument("--out", default="experiments/results/sign_transfer")
    args = parser.parse_args()
    data = digits(args.mnist, args.held_out)
    jobs = [(kind, seed) for kind in KINDS for seed in range(args.seeds)]
    rows, beside = [], []
    for kind, seed in bars(jobs, "networks", len(jobs)):
        net = train(data, seed=seed, **KINDS[kind])
        truth = Truth.of(net, data, args.pool)
        rows += [{"kind": kind, "seed": seed, **r} for r in rows_of(truth, seed, args.draws)]
        beside += [{"kind": kind, "seed": seed, **r} for r in controls_of(truth)]
    write(Path(args.out), rows, beside, data, args)


@dataclass(frozen=True, eq=False)
class Truth:
    """A network's scores on the pool and on the held-out data, and its simulation there."""

    net: Net
    pool: Scores
    held_out: Scores
    model: SimulatedModel
    chosen: list
    batches: list
    changes: dict
    float_loss: float

    @classmethod
    def of(cls, net: Net, data: Digits, pool: int) -> Truth:
        """Calibrates on 250 unseen images, scores the pool (the next ones) and the held-out."""
        pool = min(pool, len(net.unseen) - 250)
        ranges = jr.calibrate(net.graph, net.params, [net.unseen.inputs[:250]])
        parts = (net.unseen.take(np.arange(250, 250 + pool)), data.held_out)
        chosen, held_out = (list(part.batches(BATCH)) for part in parts)
        scores = jr.score(net.graph, net.params, chosen, cross_entropy, ranges)
        truth = jr.score(net.graph, net.params, held_out, cross_entropy, ranges)
        model = SimulatedModel(net.graph, net.params, ranges, cross_entropy)
        return cls(net, scores, truth, model, chosen, held_out, {}, float(truth.loss.mean()))

    def plan(self, bits: int, directions: tuple[Rounding, ...]) -> Plan:
        """All layers in one width, with these roundings."""
        table, layers, rest = self.pool.table, {}, list(directions)
        for row in table.layers:
            layer = nearest_layer(table, row.name, (bits, bits))
            roundings = tuple(rest.pop(0) for _ in row.activations)
            layers[row.name] = type(layer)(bits, bits, roundings)
        return Plan(layers, table.fingerprint)

    def loss(self, bits: int, directions: tuple[Rounding, ...]) -> np.ndarray:
        """float64 [N]: the held-out losses, simulated once for every plan."""
        key = (bits, directions)
        if key not in self.changes:
            self.changes[key] = self.model.run(self.batches, self.plan(*key)).loss
        return self.changes[key]


def rows_of(truth: Truth, seed: int, draws: int) -> Iterator[dict]:
    """A row for every size, width and floor."""
    random = np.random.default_rng(seed)
    n = len(truth.pool)
    for size in (*(s for s in SIZES if s < n), n):
        count = draws if size < n else 1
        parts = [random.permutation(n)[:size] for _ in range(count)]
        for floor in FLOORS:
            gradient = [signs(truth.pool.gradient_sum[part], floor) for part in parts]
            agreement = agree(gradient, np.sign(truth.held_out.gradient_sum.mean(axis=0)))
            for bits in BITS:
                yield {
                    "examples": size,
                    "bits": bits,
                    "floor": floor,
                    "training_loss": truth.net.training_loss,
                    "float_loss": truth.float_loss,
                    **{f"gradient_{k}": v for k, v in agreement.items()},
                    **directed(truth, parts, bits, floor),
                }


def controls_of(truth: Truth) -> Iterator[dict]:
    """Held-out changes against float of the plan from the whole pool and of its controls."""
    for bits in BITS:
        down, up = contributions(truth.pool, bits)
        noisy = np.abs(down).mean(axis=0) > 1e-6
        choice = np.where(noisy, signs(down - up, 0.0), 0)
        plan = truth.plan(bits, tuple(NAMES[int(c)] for c in choice))
        m = truth.model
        found = controls(
            m.graph,
            m.params,
            plan,
            truth.batches,
            m.loss,
            m.ranges,
            fit_batches=truth.chosen,
            margin=0.005,
            compare=(),
            simulation=m,
        )
        yield from ({"bits": bits, "name": c.name, "change": c.test.mean} for c in found)


def directed(truth: Truth, parts: list[np.ndarray], bits: int, floor: float) -> dict[str, Any]:
    """How the chosen directions and their contributions carry over, and what they gain."""
    down, up = contributions(truth.pool, bits)
    true_down, true_up = contributions(truth.held_out, bits)
    noisy = np.abs(true_down).mean(axis=0) > 1e-6
    chosen = [np.where(noisy, signs((down - up)[part], floor), 0) for part in parts]
    better = np.where(noisy, np.sign((true_down - true_up).mean(axis=0)), 0)
    directions = agree(chosen, better)
    # The mean contribution of the chosen direction: sign on the calibration set and on other data.
    kept, total, predicted, measured = 0, 0, [], []
    nearest: tuple[Rounding, ...] = ("nearest",) * len(noisy)
    centre = truth.pool.activations[:, :, truth.pool.activation_candidates.index(Candidate(bits))]
    for part, choice in zip(parts, chosen, strict=True):
        here = np.where(choice > 0, up[part], down[part])
        there = np.where(choice > 0, true_up, true_down)
        clear = (choice != 0) & (signs(here, floor) != 0)
        kept += int(np.sum(clear & (np.sign(here.mean(0)) == np.sign(there.mean(0)))))
        total += int(np.sum(clear))
        gains = np.where(choice == 0, 0, here - centre[part])
        predicted.append(float(gains.sum(axis=1).mean()))
        names = tuple(NAMES[int(c)] for c in choice)
        change = truth.loss(bits, names) - truth.loss(bits, nearest)
        measured.append((float(change.mean()), float(change.std(ddof=1) / np.sqrt(change.size))))
    means = np.array([m for m, _ in measured])
    errors = np.array([e for _, e in measured])
    quantized = truth.loss(bits, nearest)
    return {
        **{f"direction_{k}": v for k, v in directions.items()},
        "contribution_agreement": kept / total if total else None,
        "contribution_share": total / (noisy.sum() * len(parts)),
        "predicted_gain": float(np.mean(predicted)),
        "measured_gain": float(means.mean()),
        "lower_loss": float(np.mean(means < 0)),
        "surely_lower": float(np.mean(means + 1.645 * errors < 0)),
        "surely_higher": float(np.mean(means - 1.645 * errors > 0)),
        "nearest_loss": float(quantized.mean()),
    }


def contributions(scores: Scores, bits: int) -> tuple[np.ndarray, np.ndarray]:
    """float64 [N, operands] of floor and of ceil."""
    indices = [scores.activation_candidates.index(Candidate(bits, r)) for r in ("floor", "ceil")]
    down, up = (np.asarray(scores.activations[:, :, k], np.float64) for k in indices)
    return down, up


def signs(values: np.ndarray, floor: float) -> np.ndarray:
    """[operands]: the signs of the means; 0 where |t| is not above the floor."""
    values = np.asarray(values, np.float64)
    error = values.std(axis=0, ddof=1) / np.sqrt(len(values))
    mean = values.mean(axis=0)
    return np.where(np.abs(mean) > floor * error, np.sign(mean), 0)


def agree(found: list[np.ndarray], truth: np.ndarray) -> dict[str, float | None]:
    """Share of the signs that are the truth's, and share of all that are signs at all."""
    stacked = np.stack(found)
    given = stacked != 0
    hits = given & (stacked == truth)
    possible = max(int((np.broadcast_to(truth, stacked.shape) != 0).sum()), 1)
    return {
        "agreement": float(hits.sum() / given.sum()) if given.any() else None,
        "share": float(given.sum() / possible),
    }


def write(
    out: Path, rows: list[dict], beside: list[dict], data: Digits, args: argparse.Namespace
) -> None:
    """Writes and prints the tables."""
    lines = [
        f"{args.seeds} networks of each kind, {args.draws} calibration sets of each size (one of "
        f"the largest), {len(data.held_out):,} held-out images ({data.name}).",
        "",
    ]
    for kind in KINDS:
        some = [r for r in rows if r["kind"] == kind]
        fitted, unseen = (
            np.mean([r[field] for r in some]) for field in ("training_loss", "float_loss")
        )
        lines.append(f"**{kind}**: training loss {fitted:.4f}, held-out loss {unseen:.4f}.\n")
        lines += table(some)
    lines += beside_table(beside)
    write_table(out, [{"signs": rows, "controls": beside}], lines)


def table(rows: list[dict]) -> list[str]:
    """Markdown lines of one kind of network, averaged over networks."""
    lines = [
        "| bits | floor | examples | sign of p . 1 holds | direction holds | contribution's sign "
        "holds | predicted gain | measured (95 % over networks) | lower loss "
        "| surely lower / higher |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    keys = {(-r["bits"], r["floor"], r["examples"]) for r in rows}
    for bits, floor, size in sorted(keys):
        some = [r for r in rows if (-r["bits"], r["floor"], r["examples"]) == (bits, floor, size)]

        def mean(field: str, some: list[dict] = some) -> float:
            return float(np.mean([row[field] for row in some]))

        gains = [r["measured_gain"] for r in some]
        half = ""
        if len(gains) > 1:
            half = f" ± {mean_interval(gains, method='t').upper - np.mean(gains):.5f}"
        lines.append(
            f"| {-bits} | {f'abs(t) > {floor:g}' if floor else 'none'} | {size} "
            f"| {shares(some, 'gradient')} | {shares(some, 'direction')} "
            f"| {shares(some, 'contribution')} | {mean('predicted_gain'):+.5f} "
            f"| {np.mean(gains):+.5f}{half} | {100 * mean('lower_loss'):.0f} % "
            f"| {100 * mean('surely_lower'):.0f} / {100 * mean('surely_higher'):.0f} % |"
        )
    return [*lines, ""]


def beside_table(rows: list[dict]) -> list[str]:
    """Markdown lines: the plan of the largest calibration set and its controls against float."""
    columns = [(kind, bits) for kind in KINDS for bits in BITS]
    lines = [
        "**Change of the held-out loss against float**, directions from the largest set, 95 % over "
        "networks.\n",
        "| | " + " | ".join(f"{kind}, int{bits}" for kind, bits in columns) + " |",
        "|---|" + "---|" * len(columns),
    ]
    cooled = ("this plan + its own temperature", "float + temperature")
    names = [(name, None) for name in dict.fromkeys(r["name"] for r in rows)]
    for name, base in [*names, cooled]:
        cells = []
        for kind, bits in columns:
            values = changes(rows, kind, bits, name)
            if base is not None:
                values = values - changes(rows, kind, bits, base)
            half = ""
            if len(values) > 1:
                half = f" ± {mean_interval(values, method='t').upper - values.mean():.5f}"
            cells.append(f"{values.mean():+.5f}{half}" if len(values) else "-")
        words = name if base is None else f"{name}, against {base}"
        lines.append(f"| {words} | " + " | ".join(cells) + " |")
    return lines


def changes(rows: list[dict], kind: str, bits: int, name: str) -> np.ndarray:
    """[networks]: the changes of one control."""
    key = (kind, bits, name)
    return np.array([r["change"] for r in rows if (r["kind"], r["bits"], r["name"]) == key])


def shares(rows: list[dict], name: str) -> str:
    """Agreement over networks, weighted by how many signs were given, and that share."""
    given = np.array([r[f"{name}_share"] for r in rows])
    held = np.array([r[f"{name}_agreement"] or 0.0 for r in rows])
    if not given.sum():
        return "- (0 %)"
    return f"{100 * (given * held).sum() / given.sum():.0f} % ({100 * given.mean():.0f} %)"


if __name__ == "__main__":
    main()
