import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxrmils.statistics import METHODS, mean_interval, noninferiority
from jaxrmils.statistics.intervals import bounds, independent_units

lean = settings(max_examples=30, deadline=None)
change_lists = st.lists(st.integers(-50, 50), min_size=3, max_size=15)


def close(a, b):
    size = max(1.0, abs(b.lower), abs(b.upper))
    found = (a.mean, a.standard_error, a.lower, a.upper)
    return found == pytest.approx((b.mean, b.standard_error, b.lower, b.upper), abs=1e-8 * size)


def test_standard_error_by_hand():
    # Residuals 0, 1 | -3, 2 | 0: sums 1, -1, 0; G / (G - 1) = 3 / 2.
    interval = mean_interval([3.0, 4.0, 0.0, 5.0, 3.0], groups=[7, 7, 1, 1, 4], method="t")
    assert interval.mean == 3.0
    assert interval.standard_error == pytest.approx(math.sqrt(3 / 2 * (1 + 1)) / 5)
    # Student's t with 2 degrees of freedom at 0.975.
    assert interval.upper == pytest.approx(3.0 + 4.302653 * interval.standard_error)
    assert (interval.n, interval.groups) == (5, 3)


@lean
@given(change_lists, st.sampled_from(METHODS))
def test_groups_of_one_are_no_groups(changes, method):
    names = [f"example {i}" for i in range(len(changes))]
    grouped = mean_interval(changes, method=method, groups=names)
    assert close(grouped, mean_interval(changes, method=method))
    assert grouped.groups == len(changes)


@lean
@given(change_lists, st.integers(2, 4), st.sampled_from(METHODS))
def test_copies_are_no_evidence(changes, copies, method):
    groups = np.repeat(np.arange(len(changes)), copies)
    grouped = mean_interval(np.repeat(changes, copies), method=method, groups=groups)
    assert close(grouped, mean_interval(changes, method=method))
    assert grouped.n == copies * len(changes)


@lean
@given(change_lists, st.randoms(use_true_random=False), st.sampled_from(METHODS))
def test_order_and_names_of_groups_are_of_no_account(changes, random, method):
    groups = [0, 1] + [random.randrange(4) for _ in changes[2:]]
    order = random.sample(range(len(changes)), len(changes))
    interval = mean_interval(changes, groups=groups, method=method)
    other = mean_interval(
        [changes[i] for i in order], groups=["abcd"[groups[i]] for i in order], method=method
    )
    assert close(other, interval)


def test_coverage_with_groups_of_unequal_size():
    # Groups share a normal effect; sizes 1 to 7. Ignored, coverage is far below 0.95.
    rng = np.random.default_rng(0)
    numbers = np.repeat(np.arange(120), rng.integers(1, 8, 120))
    effects, noise = rng.normal(size=(1000, 120)), rng.normal(size=(1000, numbers.size))
    changes = effects[:, numbers] + noise
    grouped = [bounds(independent_units(row, numbers), 0.05, "t")[1] for row in changes]
    # The simulation's standard error is 0.007; t on 120 groups is about right.
    assert 0.925 < np.mean(np.array(grouped) >= 0.0) < 0.975
    assert np.mean(bounds(changes, 0.05, "t")[1] >= 0.0) < 0.88


def test_noninferiority_counts_groups_and_plans_in_examples():
    changes = np.random.default_rng(1).normal(0.0, 0.1, 600)
    alone = noninferiority(changes, margin=0.003)
    grouped = noninferiority(
        np.repeat(changes, 5), margin=0.003, groups=np.repeat(np.arange(600), 5)
    )
    assert (grouped.n, grouped.groups) == (3000, 600)
    assert grouped.upper_bound == pytest.approx(alone.upper_bound)
    assert grouped.needed_n == pytest.approx(5 * alone.needed_n, abs=5)


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ([0, 1], r"groups has shape \(2,\); expected \(3,\)"),
        (np.zeros((3, 1)), r"shape \(3, 1\)"),
        (["a", "a", "a"], "at least 2 groups"),
        ([0.0, math.nan, 1.0], "NaN"),
    ],
)
def test_unusable_groups(groups, message):
    with pytest.raises(ValueError, match=message):
        mean_interval([0.0, 1.0, 2.0], groups=groups)
    with pytest.raises(ValueError, match=message):
        noninferiority([0.0, 1.0, 2.0], margin=1.0, groups=groups)
