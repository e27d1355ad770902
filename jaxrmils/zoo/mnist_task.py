"""Digits and a small network that is trained on the spot: nothing has to be downloaded."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from jaxrmils.data import (
    DataError,
    Dataset,
    Task,
    check_labels,
    load_mnist5k,
    load_mnist_csv,
    load_tfds,
    make_splits,
    shifted_copies,
)
from jaxrmils.graph import from_linen
from jaxrmils.progress import Progress, silent
from jaxrmils.zoo.image_task import top_accuracies
from jaxrmils.zoo.mnist_cnn import MnistCNN
from jaxrmils.zoo.training import cross_entropy, train_classifier


def mnist_cnn_task(config: Any, progress: Progress = silent) -> Task:
    """MNIST and a `MnistCNN` trained on part of it.

    Args:
        config: with `seed`, `train` (`examples`, `copies`, `epochs`, `batch_size`,
            `learning_rate`), `splits` (`ranges`, `selection`, `confirmation`, `test`) and `data`:
            `files` is read by `load_mnist_csv`, `name` with `split` and `data_dir` by `load_tfds`;
            with neither, the data are MNIST's 5,000 embedded images.
        progress: draws the training's progress.

    Returns:
        The task; training happens when its parameters are first asked for. Its metrics are "Acc@1"
        and "Acc@5".

    Raises:
        DataError: an option that does not fit, data that cannot be read, or too few images.
    """
    dataset = _images(config.data)
    shuffled = np.random.default_rng(config.seed).permutation(len(dataset))
    training, unseen = np.split(shuffled, [config.train.examples])
    splits = make_splits(len(dataset), **config.splits, seed=config.seed, available=unseen)
    module = MnistCNN()
    example = jax.ShapeDtypeStruct((1, *dataset.inputs.shape[1:]), dataset.inputs.dtype)
    shapes = jax.eval_shape(module.init, jax.random.key(0), example)
    apply, _ = from_linen(module, shapes)
    return Task(
        name=f"MnistCNN on MNIST ({len(dataset):,} images)",
        apply=apply,
        params=lambda: _train(module, dataset.take(training), config, progress),
        shapes=shapes,
        loss=cross_entropy,
        dataset=dataset,
        splits=splits,
        training=training,
        metrics=top_accuracies(dataset.targets),
    )


def _images(data: Any) -> Dataset:
    unread = ("labels", "where", "examples", "trained_on", "calibration")
    for field in unread:
        if data[field]:
            raise DataError(
                f"config.data.{field} is {data[field]!r}, which the task 'mnist_cnn' does not read"
            )
    if data.name and data.files:
        raise DataError(
            f"config.data.name is {data.name!r} and config.data.files is {data.files!r}; give one "
            "of them, or neither for the 5,000 embedded images"
        )
    if data.files:
        return load_mnist_csv(data.files)
    if not data.name:
        return load_mnist5k()
    if not data.data_dir:
        raise DataError(
            f"config.data.data_dir is empty; where has TFDS prepared {data.name}? "
            "--config.data.data_dir=FOLDER"
        )
    found = load_tfds(
        data.name, data.split, data_dir=data.data_dir, inputs="image", targets="label"
    )
    shape = found.inputs.shape
    if shape[1:] != (28, 28, 1) or found.inputs.dtype != np.uint8:
        raise DataError(
            f"{found.name}: images are {found.inputs.dtype} {list(shape[1:])}; expected uint8 "
            "[28, 28, 1], as in TFDS's mnist"
        )
    check_labels(found.targets, MnistCNN().num_classes)
    return Dataset(np.float32(found.inputs) / np.float32(255), found.targets, None, found.name)


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
