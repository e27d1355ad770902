import math

import numpy as np
import pytest
from families import both_tails, heavy_right, rare_damage
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import optimize, stats

from jaxrmils.statistics import METHODS, mean_interval
from jaxrmils.statistics.intervals import bounds, unseen

# Bootstrap-t resamples 4,000 times for every example that hypothesis tries.
lean = settings(max_examples=40, deadline=None)


@pytest.mark.parametrize("level", [0.8, 0.95, 0.99])
def test_t_interval_agrees_with_scipy(level):
    changes = np.random.default_rng(0).exponential(size=37)
    interval = mean_interval(changes, level=level, method="t")
    reference = stats.ttest_1samp(changes, 0.0).confidence_interval(level)
    assert interval.lower == pytest.approx(reference.low, rel=1e-12)
    assert interval.upper == pytest.approx(reference.high, rel=1e-12)
    assert interval.standard_error == pytest.approx(stats.sem(changes), rel=1e-12)
    assert (interval.n, interval.level, interval.method) == (37, level, "t")
    assert interval.groups is None


@pytest.mark.parametrize("tail", [0.025, 0.25])
@pytest.mark.parametrize("sign", [1, -1])
def test_hall_bounds_solve_his_transformation(tail, sign):
    changes = sign * np.random.default_rng(2).lognormal(size=40)
    n, mean, error = changes.size, changes.mean(), stats.sem(changes)
    skewness = stats.skew(changes, bias=False)

    def transformed(mu):
        t = (mean - mu) / error
        a = skewness / 3
        return t + a * t**2 / n**0.5 + a**2 * t**3 / (3 * n) + skewness / (6 * n**0.5)

    interval = mean_interval(changes, level=1 - 2 * tail, method="hall")
    for found, quantile in ((interval.upper, tail), (interval.lower, 1 - tail)):
        target = stats.t.ppf(quantile, n - 1)
        root = optimize.brentq(
            lambda mu, target=target: transformed(mu) - target, mean - 99, mean + 99
        )
        assert found == pytest.approx(root, rel=1e-9)


def test_hall_is_continuous_where_the_skewness_vanishes():
    symmetric = np.concatenate([np.arange(20.0), -np.arange(20.0)])
    nearly = symmetric.copy()
    nearly[19] += 1e-3
    exact = mean_interval(symmetric, method="hall")
    assert exact.upper == pytest.approx(mean_interval(symmetric, method="t").upper, rel=1e-12)
    assert mean_interval(nearly, method="hall").upper == pytest.approx(exact.upper, rel=1e-3)


def test_skewness_adjusted_is_the_wider_at_each_end():
    changes = np.random.default_rng(3).exponential(size=50)
    wider, hall, t = (mean_interval(changes, method=m) for m in ("skewness-adjusted", "hall", "t"))
    assert wider.upper == hall.upper > t.upper
    assert wider.lower == t.lower < hall.lower


@pytest.mark.parametrize("n", [50, 400, 2000])
def test_guarded_reckons_with_one_more_example_like_the_furthest(n):
    changes = np.random.default_rng(3).lognormal(size=n)
    base = mean_interval(changes, method="skewness-adjusted")
    guarded = mean_interval(changes)
    for end, furthest in (("lower", changes.min()), ("upper", changes.max())):
        # The variance (divisor n) of the sample with its furthest example twice, by definition.
        widening = max(1.0, np.append(changes, furthest).std() / changes.std())
        expected = changes.mean() + widening * (getattr(base, end) - changes.mean())
        expected += unseen(n) * (furthest - changes.mean()) / n
        assert getattr(guarded, end) == pytest.approx(expected, rel=1e-12)
    assert guarded.method == "guarded"


def upper_coverage(draw, truth, n, method, repeats=2000):
    changes = draw(np.random.default_rng(7), (repeats, n))
    return np.mean(bounds(changes, 0.05, method)[1] >= truth)


def test_coverage_where_damage_is_rare():
    # Nominal 0.95; the simulation's own standard error is 0.005.
    assert upper_coverage(rare_damage, 0.05, 200, "t") < 0.88
    assert upper_coverage(rare_damage, 0.05, 200, "hall") > 0.935
    assert upper_coverage(rare_damage, 0.05, 200, "bootstrap", repeats=500) > 0.92
    assert upper_coverage(rare_damage, 0.05, 200, "skewness-adjusted") > 0.935


def test_coverage_where_both_tails_are_heavy():
    assert upper_coverage(both_tails, 0.0, 200, "hall") < 0.93
    assert upper_coverage(both_tails, 0.0, 200, "bootstrap", repeats=500) < 0.945
    assert upper_coverage(both_tails, 0.0, 200, "skewness-adjusted") > 0.935


def test_only_the_guarded_bound_covers_a_tail_that_samples_miss():
    truth = 0.03 * math.exp(1.2**2 / 2)
    for method in METHODS:
        coverage = upper_coverage(heavy_right, truth, 500, method, repeats=500)
        # Two standard errors of 500 repetitions are 0.02.
        assert (coverage > 0.93) == (method == "guarded"), (method, coverage)


def test_the_default_is_not_wasteful_on_normal_changes():
    def draw(rng, shape):
        return rng.normal(size=shape)

    assert 0.94 < upper_coverage(draw, 0.0, 1000, "guarded") < 0.965
    assert 0.94 < upper_coverage(draw, 0.0, 500, "guarded") < 0.97
    assert upper_coverage(draw, 0.0, 100, "guarded") > 0.96  # Wide on purpose.


finite = st.floats(-100, 100, allow_subnormal=False)
any_method = st.sampled_from(METHODS)


@lean
@given(st.lists(finite, min_size=2, max_size=30), any_method)
def test_bounds_are_ordered_and_finite(changes, method):
    interval = mean_interval(changes, method=method)
    assert math.isfinite(interval.lower) and math.isfinite(interval.upper)
    assert interval.lower <= interval.upper
    if method not in ("hall", "bootstrap"):  # Theirs may miss a very skewed sample's mean.
        assert interval.lower <= interval.mean <= interval.upper


@lean
@given(
    st.lists(st.integers(-50, 50), min_size=3, max_size=20),
    any_method,
    st.sampled_from([-4.0, 0.5, 8.0]),
    st.integers(-20, 20),
)
def test_scale_sign_and_shift_carry_over(changes, method, factor, shift):
    interval = mean_interval(changes, method=method)
    moved = mean_interval([factor * change + shift for change in changes], method=method)
    ends = sorted([factor * interval.lower + shift, factor * interval.upper + shift])
    size = max(1.0, *map(abs, ends))
    assert moved.lower == pytest.approx(ends[0], abs=1e-9 * size)
    assert moved.upper == pytest.approx(ends[1], abs=1e-9 * size)


@lean
@given(st.lists(finite, min_size=2, max_size=20), any_method, st.randoms(use_true_random=False))
def test_the_order_of_examples_is_of_no_account(changes, method, random):
    shuffled = random.sample(changes, len(changes))
    interval, other = (mean_interval(each, method=method) for each in (changes, shuffled))
    size = 1e-9 * max(1.0, abs(interval.lower), abs(interval.upper))
    assert other.lower == pytest.approx(interval.lower, abs=size)
    assert other.upper == pytest.approx(interval.upper, abs=size)


@pytest.mark.parametrize("method", METHODS)
def test_rows_are_bounded_as_if_each_were_alone(method):
    rows = np.random.default_rng(8).exponential(size=(2, 3, 25))
    lower, upper = bounds(rows, 0.05, method)
    assert lower.shape == upper.shape == (2, 3)
    alone = bounds(rows[1, 2], 0.05, method)
    assert (lower[1, 2], upper[1, 2]) == pytest.approx(alone, rel=1e-9)
    with pytest.raises(ValueError, match="equal values"):
        bounds(np.array([[1.0, 1.0], [0.0, 1.0]]), 0.05, method)


@pytest.mark.parametrize("method", METHODS)
def test_constant_changes_are_a_point(method):
    interval = mean_interval(np.full(7, 0.1), method=method)
    assert (interval.lower, interval.mean, interval.upper) == (0.1, 0.1, 0.1)
    assert interval.standard_error == 0.0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ([], "at least 2 examples; found 0"),
        ([0.1], "at least 2 examples; found 1"),
        ([0.1, math.nan, math.nan], "2 of 3 changes are NaN or infinite, the first at example 1"),
        ([0.1, math.inf], "1 of 2 changes"),
        ([[0.1, 0.2]], r"found shape \(1, 2\)"),
    ],
)
def test_unusable_changes(changes, message):
    with pytest.raises(ValueError, match=message):
        mean_interval(changes)


def test_unusable_options():
    with pytest.raises(ValueError, match="level is 95"):
        mean_interval([0.0, 1.0], level=95)
    with pytest.raises(ValueError, match="one of guarded, skewness-adjusted, hall, t, bootstrap"):
        mean_interval([0.0, 1.0], method="z")
