"""Four disjoint parts of the data, so that nothing is chosen and judged on the same examples.

`ranges` gives the scales, `selection` the scores and the plans, `confirmation` the lossless
decision, and `test` is read once, for the report.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from jaxrmils.data.dataset import DataError

SPLIT_NAMES = ("ranges", "selection", "confirmation", "test")


@dataclass(frozen=True, eq=False)
class Splits:
    """Example indices of each split.

    Args:
        ranges: int64 `[n_ranges]`, examples that set the scales.
        selection: int64 `[n_selection]`, examples that score sites and choose plans.
        confirmation: int64 `[n_confirmation]`, examples that decide whether a plan is lossless.
        test: int64 `[n_test]`, examples of the final report.
        seed: the shuffle's seed.

    The `fingerprint` is the SHA-256 of the four index arrays: equal fingerprints mean the same
    examples in the same roles and order.
    """

    ranges: np.ndarray
    selection: np.ndarray
    confirmation: np.ndarray
    test: np.ndarray
    seed: int
    fingerprint: str = field(init=False)

    def __post_init__(self) -> None:
        digest = hashlib.sha256()
        for name in SPLIT_NAMES:
            indices = np.ascontiguousarray(getattr(self, name), dtype="<i8")
            object.__setattr__(self, name, indices)
            # The length keeps an index from moving between neighbouring splits unseen.
            digest.update(f"{name}:{indices.size}:".encode())
            digest.update(indices.tobytes())
        object.__setattr__(self, "fingerprint", digest.hexdigest())


def make_splits(
    n: int,
    *,
    ranges: int | float,
    selection: int | float,
    confirmation: int | float,
    test: int | float,
    seed: int,
    available: np.ndarray | None = None,
    groups: np.ndarray | None = None,
) -> Splits:
    """Shuffle examples with `seed` and deal them out to four disjoint splits.

    With `groups`, whole groups are dealt out and all sizes count groups: examples of a group
    resemble each other, so those of one split say nothing new about another's.

    Args:
        n: number of examples in the data set.
        ranges, selection, confirmation, test: each an `int` (examples) or a `float` in (0, 1]
            (fraction of the available examples, rounded down). Groups instead of examples where
            `groups` are given.
        seed: seed of the shuffle.
        available: integers `[m]` in `[0, n)`, the examples to deal from, such as those the model
            was not trained on; all `n` by default.
        groups: `[n]`, which examples belong together, such as `Dataset.groups`.

    Returns:
        The splits; examples left over belong to none.

    Raises:
        DataError: a split would be empty, together they need more examples or groups than there
            are, or a group is available in part only.

    >>> splits = make_splits(100, ranges=10, selection=0.3, confirmation=20, test=40, seed=0)
    >>> len(splits.selection), splits.test.size, len(splits.fingerprint)
    (30, 40, 64)
    >>> pairs = np.arange(100) // 2
    >>> make_splits(100, ranges=5, selection=5, confirmation=5, test=5, seed=0, groups=pairs).test
    array([90, 91, 60, 61, 54, 55, 12, 13, 42, 43])
    """
    pool = np.arange(n) if available is None else _checked_indices("available", available, n)
    # A group is known by its first example from here on.
    first = np.arange(n) if groups is None else _first_of_group(groups, n, pool)
    dealt = pool if groups is None else np.unique(first[pool])
    requested: dict[str, int | float] = dict(
        zip(SPLIT_NAMES, (ranges, selection, confirmation, test), strict=True)
    )
    parts = deal(dealt, requested, seed, "examples" if groups is None else "groups")
    if groups is not None:
        parts = {name: _members(part, first) for name, part in parts.items()}
    return Splits(**parts, seed=seed)


def deal(
    pool: np.ndarray, requested: Mapping[str, int | float], seed: int, unit: str = "examples"
) -> dict[str, np.ndarray]:
    """A pool, shuffled with `seed`, in disjoint parts of the requested sizes.

    Args:
        pool: integers `[m]` to deal out.
        requested: sizes of the parts, as `make_splits` takes them.
        seed: seed of the shuffle.
        unit: what the pool holds, for error messages.

    Raises:
        DataError: a part would be empty, or the pool is too small for all of them.

    >>> {name: part.size for name, part in deal(np.arange(9), {"a": 2, "b": 0.5}, seed=0).items()}
    {'a': 2, 'b': 4}
    """
    sizes = {name: _split_size(name, size, pool.size, unit) for name, size in requested.items()}
    needed = sum(sizes.values())
    if needed > pool.size:
        each = ", ".join(f"{name} {size}" for name, size in sizes.items())
        raise DataError(
            f"the splits need {needed} {unit} ({each}) but {pool.size} were found; "
            f"ask for {needed - pool.size} fewer or bring more data"
        )
    shuffled = np.random.default_rng(seed).permutation(pool)[:needed]
    ends = np.cumsum(list(sizes.values()))
    return dict(zip(sizes, np.split(shuffled, ends[:-1]), strict=True)) if sizes else {}


def check_disjoint(
    splits: Splits, training: np.ndarray | None = None, groups: np.ndarray | None = None
) -> None:
    """Raise unless no example is used twice, within the splits and against the training data.

    Args:
        splits: the splits to check.
        training: integers `[m]`, the examples the model was trained on. They may set ranges, since
            a scale only describes the activations; they must not select, confirm or test, since
            the model's loss on them is lower than on new data and moves differently.
        groups: `[n]`, which examples belong together: no group may lie in two splits either.

    Raises:
        DataError: an example is repeated or a group divided; says how many and in which splits.

    >>> splits = make_splits(50, ranges=10, selection=10, confirmation=10, test=10, seed=0)
    >>> check_disjoint(splits, training=splits.ranges)
    """
    for position, name in enumerate(SPLIT_NAMES):
        indices = getattr(splits, name)
        repeated = indices.size - np.unique(indices).size
        if repeated:
            raise DataError(f"split {name} repeats {repeated} examples; expected each one once")
        for other in SPLIT_NAMES[position + 1 :]:
            shared = np.intersect1d(indices, getattr(splits, other))
            if shared.size:
                raise DataError(
                    f"splits {name} and {other} share {shared.size} examples (the first is "
                    f"{shared[0]}); what chooses a plan must not judge it: make them disjoint"
                )
            if groups is not None:
                _check_whole_groups(np.asarray(groups), splits, name, other)
    if training is None:
        return
    for name in SPLIT_NAMES[1:]:
        shared = np.intersect1d(getattr(splits, name), training)
        if shared.size:
            raise DataError(
                f"split {name} holds {shared.size} training examples (the first is {shared[0]}); "
                "training data may give ranges but never a verdict: draw selection, confirmation "
                "and test from examples the model has not seen"
            )


def _check_whole_groups(groups: np.ndarray, splits: Splits, name: str, other: str) -> None:
    shared = np.intersect1d(groups[getattr(splits, name)], groups[getattr(splits, other)])
    if shared.size:
        raise DataError(
            f"splits {name} and {other} share {shared.size} groups (the first is {shared[0]!r}); "
            "examples of a group resemble each other: deal out whole groups, make_splits(groups=)"
        )


def _first_of_group(groups: np.ndarray, n: int, pool: np.ndarray) -> np.ndarray:
    """Int64 `[n]`: the first example of every example's group."""
    groups = np.asarray(groups)
    if groups.shape != (n,):
        raise DataError(f"groups have shape {groups.shape}; expected ({n},), one for each example")
    _, where, number = np.unique(groups, return_index=True, return_inverse=True)
    first = where[number]
    outside = np.setdiff1d(np.arange(n), pool)
    torn = np.intersect1d(first[pool], first[outside])
    if torn.size:
        raise DataError(
            f"{torn.size} groups are available in part only, the first is {groups[torn[0]]!r}; "
            "leave such groups out of available, or the rest of them is not new to the model"
        )
    return first


def _members(part: np.ndarray, first: np.ndarray) -> np.ndarray:
    """The examples of the groups in `part`, group after group."""
    order = np.argsort(first, kind="stable")
    starts = np.searchsorted(first[order], part, side="left")
    ends = np.searchsorted(first[order], part, side="right")
    return np.concatenate([order[a:b] for a, b in zip(starts, ends, strict=True)])


def _split_size(name: str, size: int | float, found: int, unit: str) -> int:
    if isinstance(size, float):
        if not 0.0 < size <= 1.0:
            raise DataError(f"split {name}: the fraction {size} is outside (0, 1]")
        # The small term keeps 0.29 * 100 = 28.999999999999996 at 29.
        count = int(size * found + 1e-9)
    else:
        count = int(size)
    if count < 1:
        raise DataError(f"split {name}: {size} of {found} {unit} is {count}; expected at least 1")
    return count


def _checked_indices(name: str, indices: np.ndarray, n: int) -> np.ndarray:
    indices = np.asarray(indices)
    if indices.ndim != 1 or not np.issubdtype(indices.dtype, np.integer):
        raise DataError(
            f"{name} must be a 1-d integer array; found {indices.dtype} of shape {indices.shape}"
        )
    if np.unique(indices).size != indices.size:
        raise DataError(f"{name} repeats examples; expected each one once")
    if indices.size and not 0 <= indices.min() <= indices.max() < n:
        raise DataError(f"{name} holds indices outside 0 to {n - 1}")
    return indices
