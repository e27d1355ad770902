"""The embedded task: real digits from a package, a small network trained on the spot."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from jaxrmils.data import Dataset, Task, load_mnist5k, make_splits, shifted_copies
from jaxrmils.graph import from_linen
from jaxrmils.progress import Progress, silent
from jaxrmils.zoo.mnist_cnn import MnistCNN
from jaxrmils.zoo.training import cross_entropy, train_classifier


def mnist_cnn_task(config: Any, progress: Progress = silent) -> Task:
    """MNIST's 5,000 embedded images and a `MnistCNN` trained on part of them.

    Args:
        config: with `seed`, `train` (`examples`, `copies`, `epochs`, `batch_size`,
            `learning_rate`) and `splits` (`ranges`, `selection`, `confirmation`, `test`).
        progress: draws the training's progress.

    Returns:
        The task; training happens when its parameters are first asked for.
    """
    dataset = load_mnist5k()
    shuffled = np.random.default_rng(config.seed).permutation(len(dataset))
    training, unseen = np.split(shuffled, [config.train.examples])
    splits = make_splits(len(dataset), **config.splits, seed=config.seed, available=unseen)
    module = MnistCNN()
    example = jax.ShapeDtypeStruct((1, *dataset.inputs.shape[1:]), dataset.inputs.dtype)
    shapes = jax.eval_shape(module.init, jax.random.key(0), example)
    apply, _ = from_linen(module, shapes)
    return Task(
        name="MnistCNN on MNIST (5,000 images)",
        apply=apply,
        params=lambda: _train(module, dataset.take(training), config, progress),
        shapes=shapes,
        loss=cross_entropy,
        dataset=dataset,
        splits=splits,
        training=training,
    )


def _train(module: MnistCNN, data: Dataset, config: Any, progress: Progress) -> Any:
    settings = config.train
    data = shifted_copies(data, settings.copies, seed=config.seed) if settings.copies else data
    steps = settings.epochs * (len(data) // settings.batch_size)
    bar = iter(progress(range(steps), "training the float model", steps))
    variables = train_classifier(
        module,
        data,
        epochs=settings.epochs,
        batch_size=settings.batch_size,
        learning_rate=settings.learning_rate,
        seed=config.seed,
        progress=lambda step, total, loss: next(bar),
    )
    next(bar, None)
    return variables
