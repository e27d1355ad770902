import numpy as np
import pytest
from scipy import stats

from jaxrmils.statistics import bootstrap
from jaxrmils.statistics.bootstrap import studentized_quantiles


def test_agrees_with_resampling_one_at_a_time():
    values = np.random.default_rng(0).exponential(size=40)
    rng = np.random.default_rng(1)
    drawn = values[rng.integers(40, size=(20_000, 40))]
    reference = (drawn.mean(axis=1) - values.mean()) / stats.sem(drawn, axis=1)
    low, high = studentized_quantiles(values, 0.05, resamples=20_000)
    # The density is about 0.07 and 0.16 there: standard errors of 0.02 and 0.01 on each side.
    assert low == pytest.approx(np.quantile(reference, 0.05), abs=0.1)
    assert high == pytest.approx(np.quantile(reference, 0.95), abs=0.05)
    assert -low > high + 0.3  # Right-skewed values, left-skewed t.


def test_normal_values_give_students_quantiles():
    # Quantiles of a normal as the sample: its bootstrap distribution is nearly Student's.
    values = stats.norm.ppf((np.arange(500) + 0.5) / 500)
    low, high = studentized_quantiles(values, 0.05, resamples=20_000)
    assert (low, high) == pytest.approx((-1.648, 1.648), abs=0.05)


def test_the_seed_decides():
    values = np.random.default_rng(2).normal(size=30)
    first = studentized_quantiles(values, 0.05)
    assert first == studentized_quantiles(values, 0.05)
    assert first != studentized_quantiles(values, 0.05, seed=1)


def test_chunks_of_resamples_make_one_whole(monkeypatch):
    values = np.random.default_rng(3).normal(size=30)
    whole = studentized_quantiles(values, 0.05)
    monkeypatch.setattr(bootstrap, "CHUNK", 30 * 700)
    assert np.array(studentized_quantiles(values, 0.05)) == pytest.approx(
        np.array(whole), rel=1e-12
    )


def test_resamples_of_equal_values_are_bounded_as_if_one_differed():
    # 37 % of the resamples miss the one that differs: their mean is 0.01 lower, and the sample's
    # standard deviation of 0.1 divided by sqrt(100) makes T* = -0.01 * 10 / 0.01.
    low, _ = studentized_quantiles(np.array([0.0] * 99 + [1.0]), 0.05)
    assert low == pytest.approx(-10.0, rel=1e-6)
    # The same where rounding leaves a trace of variance.
    low, _ = studentized_quantiles(np.array([0.1] * 99 + [0.1 + 1e-9]), 0.05)
    assert low == pytest.approx(-10.0, rel=1e-3)
    assert np.isfinite(studentized_quantiles(np.array([0.0, 1.0]), 0.05)).all()
