"""Two data sets as one."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from jaxrmils.data.dataset import DataError, Dataset
from jaxrmils.data.rows import joined_rows


def join(first: Dataset, second: Dataset) -> Dataset:
    """The examples of both; lazy inputs stay lazy.

    Args:
        first: its examples come first, and its name stays.
        second: a data set with inputs and targets of the same structure, shapes and dtypes.

    Returns:
        The data set. Groups of the two are different groups.

    Raises:
        DataError: the two differ in structure, shape or dtype, or only one has groups.

    >>> five = Dataset(np.zeros((5, 3), np.float32), np.arange(5))
    >>> join(five, five.take([4])).targets
    array([0, 1, 2, 3, 4, 4])
    """
    for field in ("inputs", "targets"):
        forms = [_form(getattr(data, field)) for data in (first, second)]
        if forms[0] != forms[1]:
            raise DataError(
                f"{first.name} and {second.name} cannot be joined: an example's {field} are "
                f"{forms[0]} in the one and {forms[1]} in the other; make them alike"
            )
    if (first.groups is None) != (second.groups is None):
        raise DataError(f"only one of {first.name} and {second.name} has groups; give both or none")
    groups = None
    if first.groups is not None and second.groups is not None:
        a, b = (np.unique(data.groups, return_inverse=True)[1] for data in (first, second))
        groups = np.concatenate([a, b + a.max() + 1])
    return Dataset(
        jax.tree.map(joined_rows, first.inputs, second.inputs),
        jax.tree.map(joined_rows, first.targets, second.targets),
        groups,
        first.name,
    )


def _form(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: f"{leaf.dtype}{list(leaf.shape[1:])}", tree)
