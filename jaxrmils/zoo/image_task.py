"""A published image network and images of a data set, a folder or an archive."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict

from jaxrmils.data import (
    DataError,
    Dataset,
    Task,
    check_labels,
    join,
    load_image_folder,
    load_tfds,
    resize_and_crop,
)
from jaxrmils.graph import from_linen
from jaxrmils.progress import Progress, silent
from jaxrmils.zoo.file_splits import deal_files
from jaxrmils.zoo.importing import StateDict, load_state_dict
from jaxrmils.zoo.reference_model import Reference
from jaxrmils.zoo.registry import reference, reference_names
from jaxrmils.zoo.training import cross_entropy


def image_task(config: Any, progress: Progress = silent) -> Task:
    """A reference network with a checkpoint's weights, and images that are read batch by batch.

    The images stay uint8 and the normalization is part of the model.

    Args:
        config: with `seed`, `splits`, `model` (`name`, `weights`) and `data`, as in
            `jaxrmils.cli.defaults`. A TFDS data set has the features `image` and `label`. A
            folder's or archive's images lie in folders named after their classes, or
            `data.labels` is a CSV file with the columns `file` and `label`, of which `data.where`
            chooses rows. Images of
            `data.calibration` that only give ranges need no labels.
        progress: not used.

    Returns:
        The task; its metrics are "Acc@1" and, with more than 5 classes, "Acc@5".

    Raises:
        DataError: an option is missing or does not fit, the data cannot be read, or labels are
            not the network's.
        WeightError: the checkpoint is of another network.
        ImportError: a torch checkpoint, and PyTorch is not installed.
    """
    network, state = _network(config.model)
    parts = [_main_data(config.data, network)]
    if config.data.calibration:
        parts.append(_calibration_data(config.data, network))
    dataset = parts[0] if len(parts) == 1 else join(*parts)
    splits, training = deal_files(config, [len(part) for part in parts], None)
    shapes = network.shapes()
    logits, _ = from_linen(network.module, shapes)
    return Task(
        name=f"{network.name} on {parts[0].name} ({len(parts[0]):,} images)",
        apply=lambda params, images: logits(params, network.normalization(images)),
        params=lambda: network.from_state_dict(state),
        shapes=shapes,
        loss=cross_entropy,
        dataset=dataset,
        splits=splits,
        training=training,
        metrics=top_accuracies(dataset.targets),
    )


def top_accuracies(labels: np.ndarray) -> Callable[[Any, np.ndarray], dict[str, np.ndarray]]:
    """A task's metrics for a classifier.

    Args:
        labels: integers `[examples]`.

    Returns:
        `metrics(logits [chosen, classes], indices [chosen])`: per example 1.0 where the label is
        the most likely class ("Acc@1") or among the five most likely ("Acc@5", with more than 5
        classes). Of equal logits the first counts as the larger, as for `argmax`.

    >>> metrics = top_accuracies(np.array([0, 1, 0]))
    >>> metrics(np.array([[1.0, 2.0], [3.0, 3.0]]), np.array([1, 2]))
    {'Acc@1': array([1., 1.])}
    """

    def metrics(outputs: Any, indices: np.ndarray) -> dict[str, np.ndarray]:
        logits = np.asarray(outputs, np.float32)
        chosen = np.asarray(labels)[np.asarray(indices)][:, None]
        own = np.take_along_axis(logits, chosen, axis=1)
        number = np.arange(logits.shape[1])
        # Counted as not below instead of above, so that a NaN comes last.
        ahead = np.where(number < chosen, ~(logits < own), ~(logits <= own)) & (number != chosen)
        rank = ahead.sum(axis=1)
        found = {"Acc@1": (rank < 1).astype(np.float64)}
        if logits.shape[1] > 5:
            found["Acc@5"] = (rank < 5).astype(np.float64)
        return found

    return metrics


def _network(model: Any) -> tuple[Reference, StateDict]:
    """The network with as many classes as the checkpoint has, and the checkpoint."""
    if model.name not in reference_names():
        found = f"is {model.name!r}" if model.name else "is empty"
        raise DataError(
            f"config.model.name {found}; expected one of {', '.join(reference_names())}, as in "
            "--config.model.name=resnet18"
        )
    network = reference(model.name)
    if not model.weights:
        raise DataError(
            f"config.model.weights is empty; give a checkpoint of {network.checkpoint}: "
            "--config.model.weights=FILE.safetensors (or .pth, with PyTorch)"
        )
    if not Path(model.weights).is_file():
        raise DataError(f"config.model.weights: there is no file {model.weights}")
    state = load_state_dict(model.weights)
    return _with_head_of(network, state), state


def _with_head_of(network: Reference, state: StateDict) -> Reference:
    """The network with as many classes as the checkpoint's last bias has.

    A checkpoint without that tensor is another network's; importing it says what is missing.
    """
    classes: int = _module(network).num_classes
    shapes: dict[tuple[str, ...], Any] = flatten_dict(network.shapes())
    other: Any = flatten_dict(network.with_classes(classes + 1).shapes())
    (path,) = [
        path for path in shapes if path[-1] == "bias" and shapes[path].shape != other[path].shape
    ]
    head = state.get(".".join(path[1:]))
    return network if head is None else network.with_classes(len(head))


def _module(network: Reference) -> Any:
    """Every reference network's module has `num_classes`."""
    return network.module


def _main_data(data: Any, network: Reference) -> Dataset:
    if bool(data.name) == bool(data.files):
        found = f"config.data.name is {data.name!r} and config.data.files is {data.files!r}"
        raise DataError(
            f"{found}; give one of them: --config.data.files=FOLDER_OR_ZIP of images, or "
            "--config.data.name=imagenet2012 --config.data.data_dir=FOLDER that TFDS has prepared"
        )
    if data.files:
        return _folder("files", data.files, data.labels, data.where, network)
    if not data.data_dir:
        raise DataError(
            f"config.data.data_dir is empty; where has TFDS prepared {data.name}? "
            "--config.data.data_dir=FOLDER"
        )
    if data.labels or data.where:
        raise DataError(
            "config.data.labels and config.data.where are for config.data.files; TFDS has its own "
            "labels"
        )
    found = load_tfds(
        data.name,
        data.split,
        data_dir=data.data_dir,
        inputs="image",
        targets="label",
        lazy={"image": lambda pixels: _prepared(pixels, network)},
    )
    check_labels(found.targets, _module(network).num_classes)
    return found


def _calibration_data(data: Any, network: Reference) -> Dataset:
    if data.files and Path(data.calibration).resolve() == Path(data.files).resolve():
        raise DataError(
            "config.data.calibration is config.data.files: what chooses a plan must not judge it; "
            "leave config.data.calibration empty to split the one set of files"
        )
    labelled = bool(data.calibration_labels) or "selection" in data.calibration_splits
    labels, where = data.calibration_labels, data.calibration_where
    return _folder("calibration", data.calibration, labels, where, network, labelled)


def _folder(
    field: str,
    files: str,
    labels: str,
    where: Sequence[str],
    network: Reference,
    labelled: bool = True,
) -> Dataset:
    """Images of `config.data.{field}`, read when their batch is asked for."""
    pairs = [entry.partition("=") for entry in where]
    if not all(column and separator for column, separator, _ in pairs):
        raise DataError(
            f"config.data: where holds {list(where)!r}; write column=value, as in split=heldout"
        )
    for path in (files, labels):
        if path and not Path(path).exists():
            raise DataError(f"config.data.{field}: {path} does not exist")
    return load_image_folder(
        files,
        size=network.input_size,
        crop_padding=network.crop_padding,
        labels=labels or None,
        where={column: value for column, _, value in pairs},
        num_classes=_module(network).num_classes,
        labelled=labelled,
        lazy=True,
    )


def _prepared(pixels: np.ndarray, network: Reference) -> np.ndarray:
    """An image of TFDS, of any size and with 1, 3 or 4 channels, as the network takes it."""
    if pixels.shape[-1] == 1:
        pixels = np.repeat(pixels, 3, axis=-1)
    return resize_and_crop(pixels[..., :3], network.input_size, network.crop_padding)
