"""A data set: what every stage that looks at examples reads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from jaxrmils.data.rows import Batches, LazyRows, Rows, take_rows

PyTree = Any


class DataError(ValueError):
    """The data cannot be used as given; the message says what was found and expected."""


@dataclass(frozen=True, eq=False)
class Dataset:
    """Examples, the first axis of every array counting them.

    Args:
        inputs: pytree of arrays `[examples, ...]`, as the model takes them. Kept as NumPy arrays,
            except `LazyRows`, which stay lazy: they are read batch by batch.
        targets: pytree of arrays `[examples, ...]`, as the loss takes them.
        groups: `[examples]`, which examples belong together (one patient, one speaker), or `None`.
        name: what reports call the data set.

    Raises:
        DataError: the data set is empty, two arrays differ in their number of examples, an array
            has no example axis, or a floating input holds NaN or infinity (of lazy inputs, when
            their batch is read).

    >>> dataset = Dataset(np.zeros((5, 3), np.float32), np.arange(5), None, "five")
    >>> len(dataset), [len(targets) for _, targets in dataset.batches(2)]
    (5, [2, 2, 1])
    >>> dataset.take([4, 0]).targets
    array([4, 0])
    """

    inputs: PyTree
    targets: PyTree
    groups: np.ndarray | None = None
    name: str = "data"

    def __post_init__(self) -> None:
        for field in ("inputs", "targets"):
            # Frozen: arrays of other kinds (lists excepted, they are pytrees) become NumPy here.
            object.__setattr__(self, field, jax.tree.map(_as_rows, getattr(self, field)))
        if self.groups is not None:
            object.__setattr__(self, "groups", np.asarray(self.groups))
        _check_leading_axes(self.name, self._named_arrays())
        for path, array in _named_leaves("inputs", self.inputs):
            if not isinstance(array, LazyRows):
                _check_finite(self.name, path, array)

    def __len__(self) -> int:
        return int(jax.tree.leaves(self.inputs)[0].shape[0])

    def take(self, indices: Any) -> Dataset:
        """The examples at `indices`, in that order, as a data set of the same name.

        Args:
            indices: integers `[chosen]`, each in `[0, len(self))`.

        Raises:
            DataError: no index, a boolean mask or other non-integer indices, or one out of range.
        """
        indices = np.asarray(indices)
        if indices.ndim != 1 or not (np.issubdtype(indices.dtype, np.integer) or indices.size == 0):
            raise DataError(
                f"{self.name}: take needs a 1-d array of integer indices, found dtype "
                f"{indices.dtype} of shape {indices.shape} (for a mask use np.flatnonzero)"
            )
        if indices.size == 0:
            raise DataError(f"{self.name}: take was given no index; a data set cannot be empty")
        outside = np.flatnonzero((indices < 0) | (indices >= len(self)))
        if outside.size:
            raise DataError(
                f"{self.name}: index {indices[outside[0]]} (position {outside[0]}) is outside "
                f"the {len(self)} examples; expected 0 to {len(self) - 1}"
            )
        return Dataset(
            jax.tree.map(lambda array: take_rows(array, indices), self.inputs),
            jax.tree.map(lambda array: take_rows(array, indices), self.targets),
            None if self.groups is None else self.groups[indices],
            self.name,
        )

    def batches(self, batch_size: int) -> Batches:
        """The examples in order as `(inputs, targets)`; the last batch may be smaller.

        Lazy inputs are read anew in every pass, a few batches ahead of their use.

        Args:
            batch_size: examples in a batch, from 1 to `len(self)`.

        Returns:
            A sequence, so that several passes can be made.

        Raises:
            DataError: `batch_size` is below 1 or above the number of examples. In a pass: a lazy
                input cannot be read, or is NaN or infinite.
        """
        if batch_size < 1:
            raise DataError(f"{self.name}: batch_size is {batch_size}; expected at least 1")
        if batch_size > len(self):
            raise DataError(
                f"{self.name}: batch_size is {batch_size} but there are only {len(self)} examples; "
                f"pass batch_size={len(self)} or less"
            )
        lazy = any(isinstance(array, LazyRows) for _, array in self._named_arrays())
        return Batches(self._window, len(self), batch_size, ahead=lazy)

    def _window(self, window: slice) -> tuple[PyTree, PyTree]:
        inputs, targets = jax.tree.map(lambda array: array[window], (self.inputs, self.targets))
        for (path, array), kept in zip(
            _named_leaves("inputs", inputs), jax.tree.leaves(self.inputs), strict=True
        ):
            if isinstance(kept, LazyRows):
                _check_finite(self.name, path, array, window.start)
        return inputs, targets

    def _named_arrays(self) -> list[tuple[str, Any]]:
        named = _named_leaves("inputs", self.inputs) + _named_leaves("targets", self.targets)
        return named if self.groups is None else [*named, ("groups", self.groups)]


def check_labels(labels: np.ndarray, num_classes: int) -> None:
    """Raise unless every label is an integer class index below `num_classes`.

    JAX clamps an out-of-range gather index, so a wrong label would give a wrong loss in silence.

    Args:
        labels: integers of any shape; the first axis counts examples.
        num_classes: the number of classes the model predicts.

    Raises:
        DataError: labels are not integers, or one is outside `[0, num_classes)`.

    >>> check_labels(np.array([0, 9]), 10)
    >>> check_labels(np.array([0, 10]), 10)
    Traceback (most recent call last):
    jaxrmils.data.dataset.DataError: 1 label is out of range: the first is 10 at example 1; ...
    """
    labels = np.asarray(labels)
    if not np.issubdtype(labels.dtype, np.integer):
        raise DataError(f"labels must be integer class indices; found dtype {labels.dtype}")
    outside = np.argwhere((labels < 0) | (labels >= num_classes))
    if len(outside):
        count = "1 label is" if len(outside) == 1 else f"{len(outside)} labels are"
        first = tuple(outside[0])
        example = first[0] if first else 0
        raise DataError(
            f"{count} out of range: the first is {labels[first]} at example {example}; "
            f"expected 0 to {num_classes - 1} for {num_classes} classes"
        )


def _as_rows(array: Any) -> Rows:
    return array if isinstance(array, LazyRows) else np.asarray(array)


def _named_leaves(root: str, tree: PyTree) -> list[tuple[str, Any]]:
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return [(root + jax.tree_util.keystr(path), leaf) for path, leaf in leaves]


def _check_leading_axes(name: str, arrays: list[tuple[str, Any]]) -> None:
    if not any(path.startswith("inputs") for path, _ in arrays):
        raise DataError(f"{name}: the inputs hold no array")
    for path, array in arrays:
        if array.ndim == 0:
            raise DataError(f"{name}: {path} is a scalar; expected a leading axis of examples")
    first_path, first = arrays[0]
    for path, array in arrays[1:]:
        if array.shape[0] != first.shape[0]:
            raise DataError(
                f"{name}: {first_path} has {first.shape[0]} examples but {path} has "
                f"{array.shape[0]}; the first axis of every array must count the same examples"
            )
    if first.shape[0] == 0:
        raise DataError(f"{name}: the data set is empty ({first_path} has shape {first.shape})")


def _check_finite(name: str, path: str, array: np.ndarray, start: int = 0) -> None:
    # jax.numpy knows bfloat16 and float8 as floating; NumPy does not.
    if not jax.numpy.issubdtype(array.dtype, jax.numpy.inexact):
        return
    broken = ~np.isfinite(array)
    if broken.any():
        first_example = start + int(np.argwhere(broken)[0][0])
        raise DataError(
            f"{name}: {path} holds {int(broken.sum())} values that are NaN or infinite, the first "
            f"in example {first_example}; drop or repair these examples before quantizing"
        )
