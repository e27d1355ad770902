"""Moments are those of the whole matrix, merged in whatever parts."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from stages import scored

import jaxrmils as jr
from jaxrmils.sensitivity import ScoreError
from jaxrmils.sensitivity.moments import Moments, moments_of, score_moments


@pytest.mark.parametrize("cuts", [[1], [500], [3, 4, 900], list(range(10, 1000, 10))])
def test_merged_parts_are_the_whole(cuts):
    # A large mean beside a small spread, where sums of squares would lose all digits.
    rows = 1e6 + np.random.default_rng(0).normal(size=(1000, 4)) @ np.diag([1, 2, 1e-2, 5.0])
    merged = functools.reduce(Moments.merged, map(Moments.of, np.split(rows, cuts)))
    assert merged.count == 1000
    np.testing.assert_allclose(merged.mean, rows.mean(0), rtol=1e-14)
    np.testing.assert_allclose(merged.covariance, np.cov(rows.T), rtol=1e-6, atol=1e-9)


def test_empty_parts_add_nothing():
    rows = np.random.default_rng(0).normal(size=(5, 2))
    one, none = Moments.of(rows), Moments.of(rows[:0])
    assert one.merged(none) is one and none.merged(one) is one
    with pytest.raises(ScoreError, match="two examples"):
        _ = Moments.of(rows[:1]).covariance


@pytest.mark.parametrize("name", ["plain", "scanned_stack"])
def test_columns_are_those_of_the_scores(name):
    scores = scored(name)
    found = moments_of(scores)
    layer = next(row.name for row in scores.table.layers if row.activations)
    weight_format, format_ = scores.weight_candidates[-1], scores.activation_candidates[2]
    site, position = scores.activation_rows[-1]
    one, other = scores.activation(site, position, format_), scores.weight(layer, weight_format)
    columns = found.activation_columns(site, position, format_)
    columns += found.weight_columns(layer, weight_format)
    mean, error = found.total(columns)
    joint = np.float64(one) + other
    assert mean == pytest.approx(joint.mean(), rel=1e-5)
    assert error == pytest.approx(joint.std(ddof=1) / np.sqrt(len(joint)), rel=1e-5)
    row = scores.activation_rows.index((site, position))
    mean, _ = found.total(found.gradient_sum_columns(site, position))
    assert mean == pytest.approx(np.float64(scores.gradient_sum[:, row]).mean(), rel=1e-6)
    assert found.moments.mean[0] == pytest.approx(np.float64(scores.loss).mean())


def squares(outputs, targets):
    return jnp.sum((outputs - targets) ** 2, axis=-1)


class ManyBatches:
    """Batches that exist one at a time."""

    def __init__(self, count, size):
        self.count, self.size = count, size

    def __iter__(self):
        for number in range(self.count):
            rng = np.random.default_rng(number)
            yield rng.normal(size=(self.size, 4)).astype(np.float32)


def test_a_hundred_thousand_examples():
    weights = {"a": jnp.eye(4) * 0.7, "b": jnp.ones((4, 2))}
    apply = lambda p, x: jnp.tanh(x @ p["a"]) @ p["b"]  # noqa: E731
    graph = jr.trace(apply, weights, jax.ShapeDtypeStruct((2, 4), jnp.float32))
    data = ManyBatches(100, 1000)
    ranges = jr.calibrate(graph, weights, data)
    assert ranges.examples == 100_000
    batches = ((x, np.zeros((len(x), 2), np.float32)) for x in data)
    found = score_moments(graph, weights, batches, squares, ranges)
    assert len(found) == 100_000
    x = np.concatenate(list(data)).astype(np.float64)
    loss = ((np.tanh(x @ (np.eye(4) * 0.7)) @ np.ones((4, 2))) ** 2).sum(1)
    mean, error = found.total([0])
    assert mean == pytest.approx(loss.mean(), rel=1e-5)
    assert error == pytest.approx(loss.std() / np.sqrt(1e5), rel=1e-4)
