"""Run by `test_resume.py`, which kills it: ranges, scores and moments with checkpoints."""

import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import jaxrmils as jr
from jaxrmils.sensitivity.moments import score_moments


def apply(params, x):
    return jnp.tanh(x @ params["a"]) @ params["b"]


def loss(outputs, targets):
    return jnp.sum((outputs - targets) ** 2, axis=-1)


class SlowBatches:
    """Batches that take their time; each one that is read is written down."""

    def __init__(self, log, seconds, count=12, seed=0, inputs_only=False):
        self.log, self.seconds, self.count = log, seconds, count
        self.seed, self.inputs_only = seed, inputs_only

    def __iter__(self):
        for number in range(self.count):
            time.sleep(self.seconds)
            rng = np.random.default_rng((self.seed, number))
            rows = 8 if number + 1 < self.count else 5
            batch = [rng.normal(size=(rows, n)).astype(np.float32) for n in (6, 2)]
            with self.log.open("a") as log:
                log.write(f"{number} ")
            yield batch[0] if self.inputs_only else tuple(batch)


def model():
    keys = jax.random.split(jax.random.key(0))
    params = {"a": jax.random.normal(keys[0], (6, 8)), "b": jax.random.normal(keys[1], (8, 2))}
    return params, jr.trace(apply, params, jax.ShapeDtypeStruct((2, 6), jnp.float32))


def job(folder, checkpoint, seconds):
    """Ranges, scores and moments as arrays; progress is kept after every batch."""
    params, graph = model()
    inputs = SlowBatches(folder / "log.txt", seconds, inputs_only=True)
    data = SlowBatches(folder / "log.txt", seconds)
    kept = [None] * 3 if checkpoint is None else [checkpoint / part for part in "abc"]
    every = {"checkpoint_seconds": 0.0}
    ranges = jr.calibrate(graph, params, inputs, checkpoint=kept[0], **every)
    scores = jr.score(graph, params, data, loss, ranges, checkpoint=kept[1], **every)
    moments = score_moments(graph, params, data, loss, ranges, checkpoint=kept[2], **every)
    leaves = [*jax.tree.leaves(ranges), scores.loss, scores.activations, scores.weights]
    leaves += [scores.gradient_sum, moments.moments.mean, moments.moments.products]
    return [np.asarray(leaf) for leaf in leaves] + [np.int64([len(moments), ranges.examples])]


def main(folder):
    result = job(folder, folder / "kept", 0.02)
    np.savez(folder / "result.npz", *result)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
