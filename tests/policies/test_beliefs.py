"""Beliefs that are corrected by shares, against shares whose truth is known."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxrmils.policies.beliefs import corrected

COUNT = 60


def drawn(seed, departure, noise, scale=0.5):
    """`(beliefs, truth, shares, variances)` of a network as the model has it."""
    rng = np.random.default_rng(seed)
    beliefs = np.exp(rng.normal(size=COUNT))
    truth = beliefs * (scale + departure * rng.normal(size=COUNT))
    errors = noise * np.exp(0.5 * rng.normal(size=COUNT))
    return beliefs, truth, truth + errors * rng.normal(size=COUNT), errors**2


@pytest.mark.parametrize(
    ("departure", "noise"), [(0.0, 1.0), (0.1, 0.3), (0.3, 0.3), (0.6, 0.3), (0.3, 0.01)]
)
def test_corrected_costs_are_nearer_than_beliefs_and_shares(departure, noise):
    errors = np.zeros(3)
    for seed in range(20):
        beliefs, truth, shares, variances = drawn(seed, departure, noise)
        found = corrected(beliefs, shares, variances)
        only_scaled = beliefs * found.scale
        candidates = (found.costs, only_scaled, shares)
        errors += [np.mean((c - truth) ** 2) for c in candidates]
    assert errors[0] <= 1.3 * errors[1:].min()
    assert errors[0] < errors[1:].max() / 1.5


def test_the_scale_is_found_and_a_few_layers_do_not_move_it():
    beliefs, _, shares, variances = drawn(0, 0.05, 0.02)
    shares[:6] += 40 * beliefs[:6]
    found = corrected(beliefs, shares, variances)
    assert found.scale == pytest.approx(0.5, rel=0.1)
    np.testing.assert_allclose(found.costs[:6], shares[:6], rtol=0.01)
    assert np.abs(found.costs[6:] - 0.5 * beliefs[6:]).max() < 5


def test_noise_of_either_sign_leaves_the_order_of_beliefs():
    beliefs = np.linspace(1.0, 3.0, COUNT)
    shares = np.where(np.arange(COUNT) % 2, 0.8, -0.9)
    found = corrected(beliefs, shares, np.ones(COUNT))
    assert found.scale > 0
    assert np.all(np.diff(found.costs) > 0)


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.floats(0.001, 100), min_size=1, max_size=6),
    st.data(),
    st.sampled_from([1e-6, 1.0, 1e6]),
)
def test_the_units_of_beliefs_and_shares_do_not_matter(beliefs, data, unit):
    size = {"min_size": len(beliefs), "max_size": len(beliefs)}
    shares = np.array(data.draw(st.lists(st.integers(-9, 9), **size)), float)
    variances = np.array(data.draw(st.lists(st.integers(1, 9), **size)), float)
    plain = corrected(np.array(beliefs), shares, variances)
    assert np.all(np.isfinite(plain.costs))
    other = corrected(np.array(beliefs), unit * shares, unit**2 * variances)
    np.testing.assert_allclose(other.costs, unit * plain.costs, rtol=1e-6, atol=1e-9 * unit)
