import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import optimize, stats

from jaxrmils.statistics import (
    accuracy_change,
    default_margin,
    mean_interval,
    noninferiority,
    verdict_words,
)

METHODS = ["skewness-adjusted", "hall", "t"]


def rare_damage(rng, shape):
    """Most examples hardly change, 5 % get worse: mean 0.05, skewness about 7."""
    damaged = rng.random(shape) < 0.05
    return rng.normal(0, 0.02, shape) + damaged * rng.exponential(1.0, shape)


def both_tails(rng, shape):
    """A tenth of the examples change, for better or worse: mean 0, kurtosis about 40."""
    return rng.laplace(size=shape) * (rng.random(shape) < 0.1)


@pytest.mark.parametrize("level", [0.8, 0.95, 0.99])
def test_t_interval_agrees_with_scipy(level):
    changes = np.random.default_rng(0).exponential(size=37)
    interval = mean_interval(changes, level=level, method="t")
    reference = stats.ttest_1samp(changes, 0.0).confidence_interval(level)
    assert interval.lower == pytest.approx(reference.low, rel=1e-12)
    assert interval.upper == pytest.approx(reference.high, rel=1e-12)
    assert interval.standard_error == pytest.approx(stats.sem(changes), rel=1e-12)
    assert (interval.n, interval.level, interval.method) == (37, level, "t")


def test_noninferiority_agrees_with_scipys_one_sided_test():
    changes = np.random.default_rng(1).normal(0.0, 0.1, 60)
    for margin in np.linspace(0.0, 0.05, 11):
        reference = stats.ttest_1samp(changes, margin, alternative="less").pvalue
        assert noninferiority(changes, margin=margin, method="t").passed == (reference < 0.05)


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


def upper_coverage(draw, truth, n, method, repeats=3000):
    rng = np.random.default_rng(7)
    bounds = [
        noninferiority(changes, margin=0.0, method=method).upper_bound
        for changes in draw(rng, (repeats, n))
    ]
    return np.mean(np.array(bounds) >= truth)


def test_coverage_where_damage_is_rare():
    # Nominal 0.95; the simulation's own standard error is 0.004.
    assert upper_coverage(rare_damage, 0.05, 200, "t") < 0.88
    assert upper_coverage(rare_damage, 0.05, 200, "hall") > 0.935
    assert upper_coverage(rare_damage, 0.05, 200, "skewness-adjusted") > 0.935


def test_coverage_where_both_tails_are_heavy():
    assert upper_coverage(both_tails, 0.0, 200, "hall") < 0.93
    assert upper_coverage(both_tails, 0.0, 200, "skewness-adjusted") > 0.935


def test_coverage_on_normal_changes_is_not_wasteful():
    def draw(rng, shape):
        return rng.normal(size=shape)

    assert 0.94 < upper_coverage(draw, 0.0, 100, "skewness-adjusted") < 0.965


@given(
    st.lists(st.floats(-100, 100, allow_subnormal=False), min_size=2, max_size=30),
    st.sampled_from(METHODS),
)
def test_bounds_are_ordered_and_finite(changes, method):
    interval = mean_interval(changes, method=method)
    assert math.isfinite(interval.lower) and math.isfinite(interval.upper)
    assert interval.lower <= interval.upper
    if method != "hall":  # Hall's interval of a very skewed sample may miss the sample mean.
        assert interval.lower <= interval.mean <= interval.upper


@given(st.lists(st.integers(-50, 50), min_size=3, max_size=20), st.sampled_from(METHODS))
def test_sign_and_scale_carry_over(changes, method):
    interval = mean_interval(changes, method=method)
    mirrored = mean_interval([-4.0 * change for change in changes], method=method)
    assert mirrored.lower == pytest.approx(-4.0 * interval.upper, abs=1e-6)
    assert mirrored.upper == pytest.approx(-4.0 * interval.lower, abs=1e-6)


def test_default_is_the_wider_at_each_end():
    changes = np.random.default_rng(3).exponential(size=50)
    default, hall, t = (mean_interval(changes, method=method) for method in METHODS)
    assert default.upper == hall.upper > t.upper
    assert default.lower == t.lower < hall.lower


@pytest.mark.parametrize("method", METHODS)
def test_constant_changes_are_a_point(method):
    interval = mean_interval(np.full(7, 0.1), method=method)
    assert (interval.lower, interval.mean, interval.upper) == (0.1, 0.1, 0.1)
    assert interval.standard_error == 0.0
    assert noninferiority(np.zeros(7), margin=0.005, method=method).passed
    assert not noninferiority(np.full(7, 0.1), margin=0.005, method=method).passed


def test_needed_n_decides_about_as_often_as_planned():
    rng = np.random.default_rng(4)
    needed = noninferiority(rng.normal(0.0, 0.1, 2000), margin=0.02).needed_n
    assert 100 < needed < 260  # (1.645 + 0.842)^2 (0.1 / 0.02)^2 = 155, the mean being known.
    passed = [noninferiority(rng.normal(0.0, 0.1, 155), margin=0.02).passed for _ in range(1000)]
    assert 0.75 < np.mean(passed) < 0.85


def test_needed_n_of_an_undecided_result_is_more_than_there_is():
    changes = rare_damage(np.random.default_rng(5), 40)
    for margin in np.linspace(0.0, 0.4, 81):
        result = noninferiority(changes, margin=margin)
        if not result.passed and result.lower_bound <= margin:
            assert result.needed_n > 40


def test_needed_n_where_the_mean_is_the_margin():
    result = noninferiority([0.0, 1.0], margin=0.5)
    assert result.needed_n is None
    assert "the mean change is the margin itself" in verdict_words(result)


def test_verdicts_in_words():
    changes = np.random.default_rng(6).normal(0.0, 0.01, 500)
    assert verdict_words(noninferiority(changes, margin=0.005)).startswith(
        "lossless within 0.005 nats at 95 % (upper bound +0.00"
    )
    assert verdict_words(noninferiority(changes + 1, margin=0.005), unit="bits").startswith(
        "not lossless at this margin: the loss rises by 1 bits"
    )
    assert verdict_words(noninferiority(changes * 100, margin=0.005, alpha=0.01)).startswith(
        "no evidence either way: n = 500 is too small, about "
    )


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
    with pytest.raises(ValueError, match=message):
        noninferiority(changes, margin=0.1)


def test_unusable_options():
    with pytest.raises(ValueError, match="level is 95"):
        mean_interval([0.0, 1.0], level=95)
    with pytest.raises(ValueError, match="margin is -1"):
        noninferiority([0.0, 1.0], margin=-1)
    with pytest.raises(ValueError, match=r"alpha is 0\.5"):
        noninferiority([0.0, 1.0], margin=1, alpha=0.5)
    with pytest.raises(ValueError, match="expected one of skewness-adjusted, hall, t"):
        mean_interval([0.0, 1.0], method="z")


def test_default_margin():
    assert default_margin(3.0) == pytest.approx(0.015)
    assert default_margin(0.0) == 0.005
    with pytest.raises(ValueError, match="nan"):
        default_margin(math.nan)


def test_accuracy_change_is_mcnemars_exact_test():
    before = np.array([True] * 12 + [False] * 8)
    after = before.copy()
    after[:9] = False  # 9 lost
    after[12:14] = True  # 2 gained
    change = accuracy_change(before, after)
    assert (change.gained, change.lost, change.n) == (2, 9, 20)
    assert change.difference == pytest.approx(after.mean() - before.mean())
    by_hand = 2 * sum(math.comb(11, k) for k in range(3)) / 2**11
    assert change.p_value == pytest.approx(by_hand)


def test_accuracy_change_without_any_difference():
    change = accuracy_change([True, False], [True, False])
    assert (change.difference, change.p_value) == (0.0, 1.0)


def test_accuracy_change_refuses_what_is_not_paired():
    with pytest.raises(ValueError, match="shapes"):
        accuracy_change([True, False], [True])
    with pytest.raises(ValueError, match="boolean"):
        accuracy_change([1, 0], [True, False])
