"""A gradient with the noise of a weight: by products, and by the weight's own gradient."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxrmils as jr
from jaxrmils.sensitivity import Candidate, contributions, weight_noise
from jaxrmils.sensitivity import weight_contraction as wc

FIVE = tuple(Candidate(bits) for bits in (8, 4)) + tuple(
    Candidate(4, group=group) for group in (2, 4, 8)
)


def squares(outputs, targets):
    return jnp.sum((outputs - targets) ** 2, axis=tuple(range(1, outputs.ndim)))


@settings(max_examples=30, deadline=None)
@given(
    st.integers(1, 40),
    st.integers(1, 60),
    st.integers(1, 50),
    st.integers(1, 5),
    st.integers(1, 400),
    st.integers(1, 9),
)
def test_both_forms_are_the_float64_sums(rows, size, out, formats, block, least):
    rng = np.random.default_rng(rows * size + out)
    g, h = rng.normal(size=(rows, out)), rng.normal(size=(rows, size))
    deltas = rng.normal(size=(formats, size, out))
    expected = np.einsum("ro,ri,kio->k", g, h, deltas)
    arrays = [jnp.asarray(x, jnp.float32) for x in (g, h, *deltas)]
    tolerance = 1e-5 * np.einsum("ro,ri,kio->k", abs(g), abs(h), abs(deltas)).max()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(wc, "BLOCK", block)
        patch.setattr(wc, "BLOCK_ROWS", least)
        found = wc.by_gradient.__wrapped__(*arrays)
    np.testing.assert_allclose(found, expected, atol=tolerance)
    found = wc.by_products(jnp.matmul, *arrays)
    np.testing.assert_allclose(found, expected, atol=tolerance)


def products(equation, weight_shape, inputs_shape):
    """A graph of one einsum with a weight, its parameters and inputs."""
    keys = jax.random.split(jax.random.key(0))
    params = {"w": jax.random.normal(keys[0], weight_shape)}
    inputs = jax.random.normal(keys[1], inputs_shape)
    graph = jr.trace(lambda p, x: jnp.tanh(jnp.einsum(equation, x, p["w"])), params, inputs)
    return graph, params, inputs


CASES = {
    # What is a product of matrices, with many rows.
    "btj,jo->bto": ((16, 8), (4, 32, 16), True),
    "btj,jhd->bthd": ((16, 2, 8), (4, 32, 16), True),
    "bthd,hdo->bto": ((2, 8, 16), (4, 32, 2, 8), True),
    # Summed in another order, or not along the weight's first dims.
    "bthd,dho->bto": ((8, 2, 16), (4, 32, 2, 8), False),
    "btj,oj->bto": ((8, 16), (4, 32, 16), False),
    # A weight for every head; few rows.
    "bhtj,hjo->bhto": ((2, 16, 8), (4, 2, 32, 16), False),
    "bj,jo->bo": ((16, 8), (4, 16), False),
}


@pytest.mark.parametrize("equation", CASES)
def test_scores_are_those_of_the_weight_gradient(equation):
    weight_shape, inputs_shape, by_gradient = CASES[equation]
    graph, params, x = products(equation, weight_shape, inputs_shape)
    ranges = jr.calibrate(graph, params, [x])
    targets = jnp.zeros_like(graph.apply(params, x))
    (name,) = graph.weights

    def scores(params, x, targets):
        found = contributions(graph, params, x, targets, squares, ranges, weight_candidates=FIVE)
        return found.weights["w"]

    def loss(params, x, target):
        return squares(graph.apply(params, x[None]), target[None])[0]

    gradients = jax.vmap(jax.grad(loss), in_axes=(None, 0, 0))(params, x, targets)["w"]
    noise = weight_noise(graph, params, FIVE)[name]
    expected = np.stack(
        [np.sum(np.float64(gradients) * d, axis=(1, 2, 3)[: d.ndim]) for d in noise]
    )
    compiled = jax.jit(scores).lower(params, x, targets).compile()
    scale = np.abs(expected).max()
    np.testing.assert_allclose(compiled(params, x, targets), expected.T, atol=1e-4 * scale)

    # And they are reached as it says: by G of every example, as a row. Elsewhere by products.
    size = math.prod(weight_shape)
    assert (f"f32[4,{size}]" in compiled.as_text()) == by_gradient
    elsewhere = jax.jit(scores).trace(params, x, targets).lower(lowering_platforms=("tpu",))
    assert f"tensor<4x{size}xf32>" not in elsewhere.as_text()


def test_it_pays_where_many_rows_meet_a_weight():
    assert wc.gradient_pays(32, 2) and not wc.gradient_pays(16, 2)
    assert wc.gradient_pays(20, 5) and not wc.gradient_pays(1000, 1)


def test_in_a_scanned_stack_of_half_precision():
    keys = jax.random.split(jax.random.key(1), 2)
    params = {"stack": 0.3 * jax.random.normal(keys[0], (3, 16, 16), jnp.bfloat16)}
    x = jax.random.normal(keys[1], (4, 32, 16), jnp.bfloat16)

    def apply(params, x):
        return jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, params["stack"])[0]

    graph = jr.trace(apply, params, x)
    ranges = jr.calibrate(graph, params, [x])
    targets = jnp.zeros(x.shape, jnp.bfloat16)
    found = contributions(graph, params, x, targets, squares, ranges)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(wc, "gradient_pays", lambda rows, formats: False)
        expected = contributions(graph, params, x, targets, squares, ranges)
    for site, value in found.weights.items():
        scale = np.abs(expected.weights[site]).max()
        np.testing.assert_allclose(value, expected.weights[site], atol=1e-5 * scale)
