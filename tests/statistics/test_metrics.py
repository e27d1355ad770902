"""Metrics' paired changes against sums by hand."""

import dataclasses

import numpy as np
import pytest

from jaxrmils.statistics import StatisticsError, accuracy_change, metric_change

Z = 1.6448536269514722


def test_a_metric_of_right_and_wrong_has_tangos_bound_and_counts():
    rng = np.random.default_rng(0)
    before, after = rng.random(400) < 0.8, rng.random(400) < 0.7
    groups = np.arange(400) // 3
    found = metric_change("EM", before, after.astype(np.float32), alpha=0.1, groups=groups)
    assert (found.name, found.alpha) == ("EM", 0.1)
    assert (found.float_mean, found.quantized_mean) == (before.mean(), after.mean())
    assert found.change.mean == pytest.approx(after.mean() - before.mean())
    assert (found.accuracy.gained, found.accuracy.lost) == (
        (~before & after).sum(),
        (before & ~after).sum(),
    )
    expected = accuracy_change(before, after, alpha=0.1, groups=groups)
    assert found.drop_upper == expected.drop_upper
    assert found.accuracy == expected


@pytest.mark.parametrize("grouped", [False, True])
def test_any_other_metric_has_the_bound_of_a_mean(grouped):
    rng = np.random.default_rng(1)
    n, size = 20_000, 5
    shared = np.repeat(rng.normal(size=n // size), size)
    before = rng.uniform(0.4, 0.6, n)
    after = np.clip(before - 0.02 + 0.05 * shared + 0.05 * rng.normal(size=n), 0, 1)
    found = metric_change("F1", before, after, groups=np.arange(n) // size if grouped else None)
    drops = before - after
    units = drops.reshape(-1, size).mean(axis=1) if grouped else drops
    error = units.std(ddof=1) / np.sqrt(units.size)
    assert found.accuracy is None
    assert found.change.mean == pytest.approx(-drops.mean())
    assert found.change.standard_error == pytest.approx(error)
    assert found.change.groups == (n // size if grouped else None)
    assert found.drop_upper - drops.mean() == pytest.approx(Z * error, rel=0.03)
    assert found.change.upper + drops.mean() == pytest.approx(1.96 * error, rel=0.03)


def test_drops_that_are_all_zero_are_no_certainty():
    scores = np.linspace(0, 1, 50)
    found = metric_change("F1", scores, scores)
    assert found.change.mean == 0.0
    assert found.drop_upper == pytest.approx(Z**2 / (50 + Z**2))
    assert metric_change("F1", [1.0, 0.9], [0.0, 0.3]).drop_upper == 1.0


def test_it_is_plain_data():
    found = metric_change("F1", [0.5, 0.2], [0.4, 0.3])
    assert {type(v) for v in dataclasses.asdict(found).values()} == {str, float, dict, type(None)}


@pytest.mark.parametrize(
    ("before", "after", "options", "message"),
    [
        ([0.5, 1.2], [0.5, 1.0], {}, "metric 'F1' is 1.2 at example 1"),
        ([0.5, 1.0], [np.nan, 1.0], {}, "metric 'F1' is nan at example 0"),
        ([0.5, 1.0], [0.5, 1.0, 0.0], {}, "2 numbers of the float model and 3"),
        ([[0.5]], [[0.5]], {}, r"has shape \(1, 1\)"),
        ([0.5, 1.0], [0.5, 0.9], {"alpha": 0.5}, "alpha is 0.5"),
        ([0.5, 1.0], [0.5, 0.9], {"groups": [1]}, r"groups has shape \(1,\)"),
        ([0.5], [0.4], {}, "at least 2 examples"),
    ],
)
def test_what_does_not_fit_is_refused(before, after, options, message):
    with pytest.raises(StatisticsError, match=message):
        metric_change("F1", before, after, **options)
