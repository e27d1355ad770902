import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from jaxrmils.numerics import fake_quant, from_range
from jaxrmils.sensitivity import Candidate
from jaxrmils.sensitivity.probe import activation_probe, noise, weight_probe

CANDIDATES = (Candidate(8, "floor"), Candidate(4), Candidate(4, "ceil"))
GRIDS = {
    bits: from_range(jnp.float32(-1), jnp.float32(3), bits=bits, symmetric=False) for bits in (8, 4)
}
arrays = hnp.arrays(np.float32, (3, 4), elements=st.floats(-4, 4, width=32, allow_subnormal=False))


def pull_back(h, g):
    """Cotangents of the probe's input and slot."""
    slot = jnp.zeros(len(CANDIDATES) + 2, jnp.float32)
    y, pull = jax.vjp(lambda h, s: activation_probe(CANDIDATES, h, s, GRIDS), h, slot)
    return y, *pull(g)


@settings(max_examples=15, deadline=None)
@given(arrays, arrays)
def test_the_slot_receives_contractions_and_the_gradient_passes(h, g):
    y, through, slot = pull_back(jnp.asarray(h), jnp.asarray(g))
    np.testing.assert_array_equal(y, h)
    np.testing.assert_array_equal(through, g)
    for k, candidate in enumerate(CANDIDATES):
        quantized = fake_quant(jnp.asarray(h), GRIDS[candidate.bits], candidate.rounding)
        terms = np.float64(g) * (np.float64(quantized) - np.float64(h))
        np.testing.assert_allclose(slot[k], terms.sum(), atol=1e-5 + 1e-6 * np.abs(terms).sum())
    np.testing.assert_allclose(slot[-2], np.float64(g).sum(), atol=1e-4)
    np.testing.assert_allclose(slot[-1], (np.float64(g) ** 2).sum(), rtol=1e-5, atol=1e-30)


@settings(max_examples=10, deadline=None)
@given(arrays, arrays, st.floats(-3, 3, width=16))
def test_contractions_are_linear_in_the_gradient(h, g, factor):
    h, g = jnp.asarray(h), jnp.asarray(g)
    one, other = pull_back(h, g)[2], pull_back(h, jnp.float32(factor) * g)[2]
    np.testing.assert_allclose(other[:-1], jnp.float32(factor) * one[:-1], atol=1e-3)


def test_floor_is_negative_ceil_positive_and_zero_has_no_noise():
    h = jnp.concatenate([jnp.zeros(5), jnp.linspace(-0.9, 2.9, 37)])
    down, up = noise(h, GRIDS[4], Candidate(4, "floor")), noise(h, GRIDS[4], Candidate(4, "ceil"))
    assert np.all(np.asarray(down) <= 1e-6) and np.all(np.asarray(up) >= -1e-6)
    assert np.all(np.asarray(down)[:5] == 0) and np.all(np.asarray(up)[:5] == 0)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_noise_is_float32_and_of_the_true_values(dtype):
    h = jnp.linspace(-1, 3, 50).astype(dtype)
    found = noise(h, GRIDS[4], Candidate(4))
    assert found.dtype == jnp.float32
    wide = h.astype(jnp.float32)
    np.testing.assert_array_equal(found, fake_quant(wide, GRIDS[4]) - wide)


def test_the_activation_probe_keeps_bfloat16():
    h = jnp.linspace(-1, 3, 8).astype(jnp.bfloat16)
    y, through, slot = pull_back(h, h)
    assert (y.dtype, through.dtype, slot.dtype) == (jnp.bfloat16, jnp.bfloat16, jnp.float32)


def test_the_weight_probe_contracts_with_the_operation():
    rng = np.random.default_rng(0)
    h, g = rng.normal(size=(2, 3)).astype(np.float32), rng.normal(size=(2, 4)).astype(np.float32)
    deltas = tuple(jnp.asarray(rng.normal(size=(3, 4)), jnp.float32) for _ in range(2))
    y = jnp.zeros((2, 4))

    def operation(h, w):
        return h @ w

    result, pull = jax.vjp(
        lambda y, slot: weight_probe(operation, 0, y, slot, jnp.asarray(h), deltas), y, jnp.zeros(2)
    )
    through, slot = pull(jnp.asarray(g))
    np.testing.assert_array_equal(result, y)
    np.testing.assert_array_equal(through, g)
    expected = [np.sum(g * (h @ np.asarray(d))) for d in deltas]
    np.testing.assert_allclose(slot, expected, rtol=1e-5)
    # The same number as the weight gradient contracted with the noise.
    np.testing.assert_allclose(slot, [np.sum((h.T @ g) * np.asarray(d)) for d in deltas], rtol=1e-4)


def test_slots_of_a_loop_add_up():
    h, slot = jnp.linspace(-1, 3, 12).reshape(3, 4), jnp.zeros(len(CANDIDATES) + 2)

    def total(slot):
        def body(carry, row):
            return carry + jnp.sum(activation_probe(CANDIDATES, row, slot, GRIDS) ** 2), None

        return jax.lax.scan(body, jnp.float32(0), h)[0]

    rows = sum(pull_back(row, 2 * row)[2] for row in h)
    np.testing.assert_allclose(jax.grad(total)(slot), rows, rtol=1e-5, atol=1e-5)
