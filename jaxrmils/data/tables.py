"""CSV tables: columns by name, and labels as class indices."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from jaxrmils.data.dataset import DataError


def read_columns(
    path: str | Path, columns: Sequence[str], where: Mapping[str, str] | None = None
) -> dict[str, list[str]]:
    """Columns of a CSV file with a header line, in UTF-8.

    Args:
        path: the file.
        columns: names of the columns to return; a name may come twice.
        where: keep only the rows with these values in these columns.

    Returns:
        The texts of each column, in the file's order.

    Raises:
        DataError: there is no such file or column, a row has too few cells, or no row is left.
    """
    path, columns, where = Path(path), list(dict.fromkeys(columns)), dict(where or {})
    if not path.is_file():
        raise DataError(f"{path} is no file; expected a CSV table with a header line")
    with path.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file)
        header = list(reader.fieldnames or [])
        rows = [(reader.line_num, row) for row in reader]
    for column in [*columns, *where]:
        if column not in header:
            raise DataError(f"{path} has no column {column!r}; its columns are {header}")
    kept: dict[str, list[str]] = {column: [] for column in columns}
    for line, row in rows:
        for column in [*columns, *where]:
            if row[column] is None:
                raise DataError(f"{path}, line {line}: column {column!r} is missing")
        if all(row[column] == value for column, value in where.items()):
            for column in columns:
                kept[column].append(row[column])
    if not next(iter(kept.values())):
        raise DataError(f"{path} has {len(rows)} rows, and none of them matches {where}")
    return kept


def class_indices(labels: Sequence[str], classes: Sequence[str] | None = None) -> np.ndarray:
    """Labels as class indices.

    Args:
        labels: names of classes; without `classes` also integers as text, which are kept.
        classes: the names in the order of their indices; by default all that occur, sorted.

    Returns:
        int32 `[examples]`.

    Raises:
        DataError: a label is not among `classes`, or a name is given twice.

    >>> class_indices(["cat", "ant", "cat"])
    array([1, 0, 1], dtype=int32)
    >>> class_indices(["7", "-1"]), class_indices(["cat"], ["dog", "cat"])
    (array([ 7, -1], dtype=int32), array([1], dtype=int32))
    """
    if classes is None:
        if all(label.removeprefix("-").isdecimal() for label in labels):
            return np.array([int(label) for label in labels], np.int32)
        classes = sorted(set(labels))
    index = {label: position for position, label in enumerate(classes)}
    if len(index) != len(classes):
        raise DataError(f"the classes {list(classes)} hold a name twice")
    unknown = sorted(set(labels) - set(index))
    if unknown:
        raise DataError(
            f"{len(unknown)} labels are none of the {len(index)} classes: {unknown[:5]}; "
            f"the classes are {list(classes)[:5]} ..."
        )
    return np.array([index[label] for label in labels], np.int32)
