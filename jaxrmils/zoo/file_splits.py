"""Splits of a task's files: the data that is judged, and further data that only calibrates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxrmils.data import SPLIT_NAMES, DataError, Splits, make_splits
from jaxrmils.data.splits import deal


def check_file_options(config: Any, task: str, kind: str, needed: Sequence[str]) -> None:
    """Finds missing options of a task that reads files, or a data set of TFDS.

    Args:
        config: with `model` and `data`.
        task: its name, for messages.
        kind: what `config.data.files` should be, for messages.
        needed: fields of `config.model` that must not be empty.

    Raises:
        DataError: a field is empty, or one is set that the task does not read.
    """
    data = config.data
    tfds = "config.data.name, of a data set that TFDS has prepared in config.data.data_dir"
    if not data.files and not data.name:
        raise DataError(
            f"config.data.files is empty; the task {task!r} needs {kind}, or in its place {tfds}"
        )
    if data.files and data.name:
        raise DataError(
            f"config.data.files is {data.files!r} and config.data.name is {data.name!r}; the task "
            f"{task!r} reads one of them: {kind}, or {tfds}"
        )
    if data.name and not data.data_dir:
        raise DataError(
            f"config.data.data_dir is empty; where has TFDS prepared {data.name}? "
            "--config.data.data_dir=FOLDER"
        )
    for field in needed:
        if not config.model[field]:
            raise DataError(f"config.model.{field} is empty; the task {task!r} needs its path")
    for field in ("labels", "where", "calibration_labels", "calibration_where"):
        if data[field]:
            raise DataError(
                f"config.data.{field} is {data[field]!r}, which the task {task!r} does not "
                f"read; it takes {kind} in config.data.files and config.data.calibration"
            )
    both = data.calibration and data.files
    same = both and Path(data.calibration).resolve() == Path(data.files).resolve()
    if same:
        raise DataError(
            "config.data.calibration is config.data.files: what chooses a plan must not judge it; "
            "leave config.data.calibration empty to split the one file"
        )


def deal_files(
    config: Any, lengths: Sequence[int], groups: np.ndarray | None
) -> tuple[Splits, np.ndarray | None]:
    """The splits of one file, or of one and a second that calibrates.

    Args:
        config: with `seed`, `splits` and `data`.
        lengths: examples of the first file, and of the second where there is one; together they
            are the data set.
        groups: `[examples]`, which belong together, or `None`; sizes, and `config.data.examples`,
            then count groups.

    Returns:
        The splits, those of `config.data.calibration_splits` from the second file; and the
        examples that the model was trained on, as far as `config` says so, else `None`.

    Raises:
        DataError: a split has no name, nothing is left to judge, or there is too little data.
    """
    data, n = config.data, sum(lengths)
    sources = np.split(np.arange(n), np.cumsum(lengths)[:-1])
    main = sources[0]
    if data.examples:
        main = _deal({"data.examples": data.examples}, main, groups, config.seed)["data.examples"]
    trained = [data.trained_on, data.calibration_trained_on][: len(sources)]
    seen = [source for source, known in zip(sources, trained, strict=True) if known]
    training = np.concatenate(seen) if seen else None
    sizes = dict(config.splits)
    if len(sources) == 1:
        dealt = make_splits(n, **sizes, seed=config.seed, available=main, groups=groups)
        return dealt, training
    calibrating = tuple(data.calibration_splits)
    if calibrating not in (("ranges",), ("ranges", "selection")):
        raise DataError(
            f"config.data.calibration_splits is {calibrating}; expected ('ranges',) or "
            "('ranges', 'selection'): the data that is judged must be config.data.files"
        )
    judging = tuple(name for name in SPLIT_NAMES if name not in calibrating)
    dealt = {}
    for names, pool in ((calibrating, sources[1]), (judging, main)):
        dealt |= _deal({name: sizes[name] for name in names}, pool, groups, config.seed)
    return Splits(**dealt, seed=config.seed), training


def _deal(
    sizes: Mapping[str, int | float], pool: np.ndarray, groups: np.ndarray | None, seed: int
) -> dict[str, np.ndarray]:
    """Disjoint parts of a pool, shuffled by the seed; with groups, sizes count groups."""
    if groups is None:
        return deal(pool, sizes, seed)
    parts = deal(np.unique(groups[pool]), sizes, seed, "groups")
    return {name: pool[np.isin(groups[pool], part)] for name, part in parts.items()}
