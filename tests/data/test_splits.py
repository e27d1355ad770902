import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxrmils.data import SPLIT_NAMES, DataError, check_disjoint, make_splits

SIZES = {"ranges": 10, "selection": 20, "confirmation": 30, "test": 40}


def all_indices(splits):
    return np.concatenate([getattr(splits, name) for name in SPLIT_NAMES])


@given(
    sizes=st.tuples(*[st.integers(1, 20)] * 4),
    spare=st.integers(0, 20),
    seed=st.integers(0, 2**32 - 1),
)
def test_splits_are_disjoint_and_of_the_asked_size(sizes, spare, seed):
    n = sum(sizes) + spare
    asked = dict(zip(SPLIT_NAMES, sizes, strict=True))
    splits = make_splits(n, **asked, seed=seed)
    assert {name: getattr(splits, name).size for name in SPLIT_NAMES} == asked
    used = all_indices(splits)
    assert np.unique(used).size == used.size
    assert used.min() >= 0 and used.max() < n
    check_disjoint(splits)


def test_fractions_are_of_the_available_examples():
    splits = make_splits(100, ranges=0.29, selection=0.1, confirmation=5, test=0.5, seed=0)
    assert [getattr(splits, name).size for name in SPLIT_NAMES] == [29, 10, 5, 50]


def test_fingerprint_tells_splits_apart():
    first = make_splits(100, **SIZES, seed=0)
    again = make_splits(100, **SIZES, seed=0)
    other = make_splits(100, **SIZES, seed=1)
    assert first.fingerprint == again.fingerprint != other.fingerprint
    # The same examples in other roles are other splits.
    moved = dataclasses.replace(
        first,
        ranges=first.ranges[:-1],
        selection=np.concatenate([first.ranges[-1:], first.selection]),
    )
    np.testing.assert_array_equal(all_indices(moved), all_indices(first))
    assert moved.fingerprint != first.fingerprint


def test_only_available_examples_are_dealt():
    available = np.arange(50, 200)
    splits = make_splits(200, **SIZES, seed=3, available=available)
    assert np.isin(all_indices(splits), available).all()
    check_disjoint(splits, training=np.arange(50))


def test_too_few_examples_says_needed_and_found():
    with pytest.raises(DataError, match=r"need 100 examples \(ranges 10, selection 20, .* 99 were"):
        make_splits(99, **SIZES, seed=0)


@pytest.mark.parametrize("size", [0, -3, 0.001])
def test_a_split_is_never_empty(size):
    with pytest.raises(DataError, match=r"split selection: .* expected at least 1"):
        make_splits(100, **{**SIZES, "selection": size}, seed=0)


@pytest.mark.parametrize("fraction", [0.0, -0.5, 1.5])
def test_fraction_out_of_range(fraction):
    with pytest.raises(DataError, match="split test: the fraction"):
        make_splits(100, **{**SIZES, "test": fraction}, seed=0)


def test_bad_available():
    with pytest.raises(DataError, match="outside 0 to 9"):
        make_splits(10, **SIZES, seed=0, available=np.array([3, 10]))
    with pytest.raises(DataError, match="repeats"):
        make_splits(10, **SIZES, seed=0, available=np.array([3, 3]))


def test_overlap_is_found():
    splits = make_splits(100, **SIZES, seed=0)
    overlapping = dataclasses.replace(splits, test=splits.confirmation[:4])
    with pytest.raises(DataError, match="confirmation and test share 4 examples"):
        check_disjoint(overlapping)
    repeating = dataclasses.replace(splits, test=np.tile(splits.test[:1], 2))
    with pytest.raises(DataError, match="split test repeats 1"):
        check_disjoint(repeating)


@pytest.mark.parametrize("name", ["selection", "confirmation", "test"])
def test_training_data_never_give_a_verdict(name):
    splits = make_splits(100, **SIZES, seed=0)
    with pytest.raises(
        DataError, match=f"split {name} holds 2 training .* ranges but never a verdict"
    ):
        check_disjoint(splits, training=getattr(splits, name)[:2])


def test_training_data_may_give_ranges():
    splits = make_splits(100, **SIZES, seed=0)
    check_disjoint(splits, training=splits.ranges)


@given(
    group_sizes=st.lists(st.integers(1, 6), min_size=10, max_size=30),
    seed=st.integers(0, 2**32 - 1),
    named=st.booleans(),
)
def test_groups_are_dealt_out_whole(group_sizes, seed, named):
    numbers = np.repeat(np.arange(len(group_sizes)), group_sizes)
    # Examples of a group need not be neighbours.
    numbers = np.random.default_rng(seed).permutation(numbers)
    groups = np.array([f"speaker {number}" for number in numbers]) if named else numbers
    asked = {"ranges": 1, "selection": 2, "confirmation": 3, "test": 4}
    splits = make_splits(len(groups), **asked, seed=seed, groups=groups)
    check_disjoint(splits, groups=groups)
    for name, count in asked.items():
        chosen = getattr(splits, name)
        members = np.isin(groups, groups[chosen])
        assert np.unique(groups[chosen]).size == count
        np.testing.assert_array_equal(np.sort(chosen), np.flatnonzero(members))
    again = make_splits(len(groups), **asked, seed=seed, groups=groups)
    assert again.fingerprint == splits.fingerprint


def test_fractions_are_of_the_available_groups():
    groups = np.arange(120) // 3
    available = np.flatnonzero(groups >= 10)
    splits = make_splits(
        120,
        ranges=0.1,
        selection=0.2,
        confirmation=0.3,
        test=0.4,
        seed=0,
        available=available,
        groups=groups,
    )
    assert [getattr(splits, name).size // 3 for name in SPLIT_NAMES] == [3, 6, 9, 12]
    assert np.isin(all_indices(splits), available).all()


def test_bad_groups():
    groups = np.arange(100) // 2
    with pytest.raises(DataError, match=r"need 100 groups \(ranges 10, .* 50 were found"):
        make_splits(100, **SIZES, seed=0, groups=groups)
    with pytest.raises(DataError, match=r"groups have shape \(99,\); expected \(100,\)"):
        make_splits(100, **SIZES, seed=0, groups=groups[:99])
    ones = dict.fromkeys(SPLIT_NAMES, 1)
    with pytest.raises(DataError, match=r"1 groups are available in part only, the first is .*6"):
        make_splits(100, **ones, seed=0, groups=groups, available=np.arange(13))
    with pytest.raises(
        DataError, match=r"share \d+ groups \(the first is .* deal out whole groups"
    ):
        check_disjoint(make_splits(100, **SIZES, seed=0), groups=groups)
