"""How often a plan whose true loss change is exactly the margin passes as lossless.

    python experiments/confirmation_error.py --mnist FOLDER

Trains two MnistCNNs (8,000 images each; 6 and 12 epochs), measures the per-example loss changes of
uniform int8, w4a8 and int4 on some 61,500 images that trained and calibrated nothing, and takes
these as the population. Each repetition draws n of them with replacement, so that the population's
mean is the true change; the margin is put there. Bounds move with the changes, so that passing is
the same as an upper bound below the true mean. Nominal: 5 %. The weights of "guarded" were chosen
on the first of these networks and on another one; the second network is a check. Takes some
four minutes on two idle cores; for the images see `mnist_full.py`. Writes JSON and markdown.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import jax
import numpy as np
from mnist_full import add_option, load
from results_file import write_table
from scipy import stats

import jaxrmils as jr
from jaxrmils.data import Dataset
from jaxrmils.evaluation import measure
from jaxrmils.statistics import METHODS, Method
from jaxrmils.statistics.intervals import bounds
from jaxrmils.zoo import MnistCNN, cross_entropy, train_classifier

ALPHA = 0.05
DEFAULT: Method = "guarded"
FORMATS = ("int8", "w4a8", "int4")
SIZES = (200, 500, 1000, 2000, 5000)
EPOCHS = (6, 12)
TRAINING, CALIBRATION = 8000, 512
TOGETHER = 250  # Repetitions that are bounded in one call.


def main() -> None:
    """Runs the experiment."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", default="experiments/results/confirmation_error")
    parser.add_argument("--repetitions", type=int, default=2000)
    add_option(parser)
    args = parser.parse_args()
    dataset = load(args.mnist)
    rows = []
    for model, epochs in enumerate(EPOCHS):
        for name, changes in loss_changes(dataset, epochs, seed=model).items():
            for n in SIZES:
                seed = np.random.default_rng([model, FORMATS.index(name), n])
                errors = pass_rates(changes, n, args.repetitions, seed)
                rows.append(row(f"{epochs} epochs", name, n, changes, errors))
                print(rows[-1], flush=True)
    write(Path(args.out), rows, args.repetitions)


def loss_changes(dataset: Dataset, epochs: int, seed: int) -> dict[str, np.ndarray]:
    """Per format, the changes of a freshly trained network on the images it never saw."""
    order = np.random.default_rng(seed).permutation(len(dataset))
    training, calibration, others = np.split(order, [TRAINING, TRAINING + CALIBRATION])
    module = MnistCNN()
    variables = train_classifier(module, dataset.take(training), epochs=epochs, seed=seed)
    apply, params = jr.from_linen(module, variables)
    graph = jr.trace(apply, params, jax.ShapeDtypeStruct((1, 28, 28, 1), np.float32))
    ranges = jr.calibrate(graph, params, [x for x, _ in dataset.take(calibration).batches(256)])
    data = list(dataset.take(others).batches(1000))
    before = measure(graph, lambda x: apply(params, x), data, cross_entropy).loss
    result = {}
    for name in FORMATS:
        model = jr.quantize(graph, params, jr.uniform(jr.tabulate(graph), name), ranges)
        result[name] = measure(graph, model, data, cross_entropy).loss - before
    return result


def pass_rates(
    changes: np.ndarray, n: int, repetitions: int, rng: np.random.Generator
) -> dict[Method, float]:
    """By method, how often the upper bound on n of the changes lies below the mean of all."""
    passed = dict.fromkeys(METHODS, 0)
    for start in range(0, repetitions, TOGETHER):
        count = min(TOGETHER, repetitions - start)
        drawn = changes[rng.integers(changes.size, size=(count, n))]
        for method in METHODS:
            passed[method] += int(np.sum(bounds(drawn, ALPHA, method)[1] < changes.mean()))
    return {method: passed[method] / repetitions for method in METHODS}


def row(model: str, name: str, n: int, changes: np.ndarray, errors: dict[Method, float]) -> dict:
    """One line: the population's shape and every method's error."""
    return {
        "model": model,
        "plan": name,
        "n": n,
        "population": changes.size,
        "mean": float(changes.mean()),
        "standard_deviation": float(changes.std()),
        "skewness": float(stats.skew(changes)),
        "kurtosis": float(stats.kurtosis(changes)),
        "passed": errors,
    }


def write(out: Path, rows: list[dict], repetitions: int) -> None:
    """Writes and prints the table and what it says about the default."""
    errors = {n: [r["passed"] for r in rows if r["n"] == n] for n in sorted({r["n"] for r in rows})}
    large = [100 * e[DEFAULT] for n, found in errors.items() if n >= 500 for e in found]
    plain = [100 * e["t"] for n, found in errors.items() if n >= 500 for e in found]
    noise = 100 * (ALPHA * (1 - ALPHA) / repetitions) ** 0.5
    lines = [
        "How often a plan passes whose true loss change is the margin, in %; nominal 5 %. "
        f"{repetitions} repetitions with replacement from {rows[0]['population']} images; the "
        f"simulation's own standard error is {noise:.2f}.",
        "",
        f"| model | plan | skewness | kurtosis | n | {' | '.join(METHODS)} |",
        "|---" * (5 + len(METHODS)) + "|",
    ]
    lines += [
        f"| {r['model']} | {r['plan']} | {r['skewness']:.1f} | {r['kurtosis']:.0f} | {r['n']} | "
        + " | ".join(f"{100 * r['passed'][method]:.1f}" for method in METHODS)
        + " |"
        for r in rows
    ]
    inside = sum(4.0 <= value <= 6.0 for value in large)
    lines += [
        "",
        f'The default is "{DEFAULT}": from n = 500 on it passes in {min(large):.1f} to '
        f"{max(large):.1f} % ({inside} of {len(large)} cells within 5 % +- 1 %), plain t in "
        f"{min(plain):.1f} to {max(plain):.1f} %. Its weights were chosen with the first network "
        "among others; the second chose nothing.",
    ]
    write_table(out, rows, lines)


if __name__ == "__main__":
    main()
