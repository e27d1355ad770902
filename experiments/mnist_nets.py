"""Trained digit classifiers and disjoint data for the experiments.

With `--mnist` (see `mnist_full.py`) examples come from all of MNIST, without it from the 5,000
images that ship inside a package.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from mnist_full import load

import jaxrmils as jr
from jaxrmils.data import Dataset, load_mnist5k, shifted_copies
from jaxrmils.zoo import MnistCNN, cross_entropy, train_classifier

OFFICIAL_TRAINING = 60_000


@dataclass(frozen=True)
class Digits:
    """Examples to train and choose on, and examples that only judge."""

    pool: Dataset
    held_out: Dataset
    name: str


@dataclass(frozen=True, eq=False)
class Net:
    """A trained network with the examples of the pool that it has not seen."""

    params: Any
    graph: jr.Graph
    unseen: Dataset
    training_loss: float


def digits(path: str, held_out: int) -> Digits:
    """MNIST at `path` (its official test images judge), or the embedded 5,000 images.

    Args:
        path: see `mnist_full.load`; "" for the embedded images.
        held_out: how many examples judge.
    """
    if path:
        data = load(path)
        test = np.arange(OFFICIAL_TRAINING, len(data))[:held_out]
        pool, name = np.arange(OFFICIAL_TRAINING), "MNIST, official test images"
    else:
        data = load_mnist5k()
        shuffled = np.random.default_rng(123).permutation(len(data))
        held_out = min(held_out, 1_500)
        test, pool = shuffled[:held_out], shuffled[held_out:]
        name = "MNIST's 5,000 embedded images"
    return Digits(data.take(pool), data.take(test), name)


def train(
    data: Digits,
    *,
    seed: int,
    examples: int,
    copies: int,
    epochs: int,
    learning_rate: float = 3e-3,
    weight_decay: float = 1e-4,
) -> Net:
    """A `MnistCNN` trained on `examples` images of the pool and `copies` shifted copies of each."""
    order = np.random.default_rng(seed).permutation(len(data.pool))
    training = data.pool.take(order[:examples])
    fitted = shifted_copies(training, copies, seed=seed) if copies else training
    model = MnistCNN()
    variables = train_classifier(
        model,
        fitted,
        epochs=epochs,
        learning_rate=learning_rate,
        weight_decay=weight_decay,
        seed=seed,
    )
    apply, params = jr.from_linen(model, variables)
    graph = jr.trace(apply, params, training.inputs[:2])
    logits = jax.jit(apply)(params, training.inputs)
    loss = float(np.mean(np.asarray(cross_entropy(logits, training.targets), np.float64)))
    return Net(params, graph, data.pool.take(order[examples:]), loss)
