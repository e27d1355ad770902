import math
from dataclasses import asdict

import numpy as np
import pytest
from families import rare_damage
from scipy import stats

from jaxrmils.statistics import METHODS, default_margin, noninferiority, verdict_words
from jaxrmils.statistics.intervals import bounds


def test_agrees_with_scipys_one_sided_test():
    changes = np.random.default_rng(1).normal(0.0, 0.1, 60)
    for margin in np.linspace(0.0, 0.05, 11):
        reference = stats.ttest_1samp(changes, margin, alternative="less").pvalue
        assert noninferiority(changes, margin=margin, method="t").passed == (reference < 0.05)


@pytest.mark.parametrize("method", METHODS)
def test_reports_t_and_bootstrap_beside_the_bound_that_decides(method):
    changes = np.random.default_rng(2).exponential(size=80)
    result = noninferiority(changes, margin=1.0, alpha=0.1, method=method)
    assert set(result.bounds) == {method, "t", "bootstrap"}
    assert result.bounds[method] == (result.lower_bound, result.upper_bound)
    for each, pair in result.bounds.items():
        assert pair == pytest.approx(bounds(changes, 0.1, each), rel=1e-12)
    assert asdict(result)["bounds"] == result.bounds  # Reports are saved as plain dicts.
    assert isinstance(hash(result), int)


@pytest.mark.parametrize("method", METHODS)
def test_constant_changes(method):
    # Equal changes say nothing of others, unless the models are the same by construction.
    assert not noninferiority(np.zeros(7), margin=0.005, method=method).passed
    assert "all changes are equal" in verdict_words(noninferiority(np.zeros(7), margin=0.005))
    assert noninferiority(np.zeros(7), margin=0.005, method=method, identical=True).passed
    assert not noninferiority(np.full(7, 0.1), margin=0.005, method=method).passed
    # So small that the square of their spread underflows.
    assert noninferiority([0.0, 1e-293], margin=0.005, method=method).standard_error == 0.0


@pytest.mark.parametrize("distance", [0.02, 0.005])
def test_needed_n_decides_about_as_often_as_planned(distance):
    rng = np.random.default_rng(4)
    centered = rng.normal(0.0, 0.1, 500)
    centered -= centered.mean()
    by_t = noninferiority(centered, margin=distance, method="t").needed_n
    # (1.645 + 0.842)^2 (sd / distance)^2
    assert by_t == pytest.approx(6.18 * (centered.std(ddof=1) / distance) ** 2, rel=0.01)
    needed = noninferiority(centered, margin=distance).needed_n
    assert needed >= by_t
    passed = bounds(rng.normal(0.0, 0.1, (1000, needed)), 0.05, "guarded")[1] < distance
    assert 0.75 < passed.mean() < 0.87


def test_needed_n_of_an_undecided_result_is_more_than_there_is():
    changes = rare_damage(np.random.default_rng(5), 40)
    for margin in np.linspace(0.0, 0.4, 41):
        result = noninferiority(changes, margin=margin)
        if not result.passed and result.lower_bound <= margin:
            assert result.needed_n > 40


@pytest.mark.parametrize("offset", [0.0, 1e-300, 1e-12])
def test_needed_n_where_the_mean_is_the_margin(offset):
    result = noninferiority([-1.0, 1.0], margin=offset)
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


def test_verdicts_count_groups():
    rng = np.random.default_rng(7)
    groups = np.arange(1190) % 240
    changes = rng.normal(0.0, 0.01, 1190) + rng.normal(0.0, 0.01, 240)[groups]
    words = [
        verdict_words(noninferiority(scale * changes + shift, margin=0.005, groups=groups))
        for scale, shift in ((1, 0), (1, 1), (20, 0))
    ]
    starts = ("lossless within", "not lossless", "no evidence either way: n = 1190 in 240 groups ")
    for sentence, start in zip(words, starts, strict=True):
        assert sentence.startswith(start)
        assert "n = 1190 in 240 groups" in sentence


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"margin": -1}, "margin is -1"),
        ({"margin": 1, "alpha": 0.5}, r"alpha is 0\.5"),
        ({"margin": 1, "method": "z"}, "method is 'z'"),
    ],
)
def test_unusable_options(options, message):
    with pytest.raises(ValueError, match=message):
        noninferiority([0.0, 1.0], **options)
    with pytest.raises(ValueError, match="1 of 2 changes"):
        noninferiority([0.1, math.inf], margin=0.1)


def test_default_margin():
    assert default_margin(3.0) == pytest.approx(0.015)
    assert default_margin(0.0) == 0.005
    with pytest.raises(ValueError, match="nan"):
        default_margin(math.nan)
