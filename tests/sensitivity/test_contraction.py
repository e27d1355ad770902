import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from jaxrmils.numerics import QuantParams, code_range, dequantize, from_range, quantize
from jaxrmils.sensitivity.candidates import ACTIVATION_CANDIDATES, Candidate
from jaxrmils.sensitivity.contraction import BLOCK, GRADIENT_STATISTICS, contract
from jaxrmils.sensitivity.probe import activation_probe

fast = settings(max_examples=40, deadline=None)
some_candidates = st.permutations(ACTIVATION_CANDIDATES).flatmap(
    lambda order: st.integers(0, len(order)).map(lambda k: tuple(order[:k]))
)
values = st.floats(-8, 8, width=32, allow_subnormal=False)


def grids_of(low, high, symmetric):
    low, high = jnp.float32(low), jnp.float32(high)
    return {bits: from_range(low, high, bits=bits, symmetric=symmetric) for bits in (8, 4)}


def reference(candidates, g, h, grids):
    """Codes by `quantize`, everything after them in float64, and what rounding may change."""
    g64 = np.asarray(g, np.float32).astype(np.float64).ravel()
    h32 = jnp.asarray(h, jnp.float32).ravel()
    h64 = np.asarray(h32, np.float64)
    terms = []
    for candidate in candidates:
        grid = grids[candidate.bits]
        restored = dequantize(quantize(h32, grid, candidate.rounding), grid)
        terms.append(g64 * (np.asarray(restored, np.float64) - h64))
    terms += [g64, g64 * g64]
    # code * scale is rounded, or not where it is fused with the subtraction.
    product = np.sum(np.abs(g64) * 2 * np.abs(h64)) * np.finfo(np.float32).eps
    sizes = np.array([np.sum(np.abs(t)) for t in terms])
    slack = np.array([product] * len(candidates) + [0, 0])
    # |g|^2 adds up one sign, so that rounding errors of a running sum do too (4e-6 on jax 0.10).
    relative = np.array([1e-6] * (len(candidates) + 1) + [1e-5])
    return np.array([np.sum(t) for t in terms]), relative * sizes + slack


def check(candidates, g, h, grids):
    found = jax.jit(contract, static_argnums=0)(candidates, g, h, grids)
    assert found.dtype == jnp.float32
    assert found.shape == (len(candidates) + GRADIENT_STATISTICS,)
    expected, tolerance = reference(candidates, g, h, grids)
    assert np.all(np.abs(np.asarray(found, np.float64) - expected) <= tolerance + 1e-30)


@fast
@given(
    some_candidates,
    hnp.arrays(np.float32, 24, elements=values),
    hnp.arrays(np.float32, 24, elements=values),
    st.tuples(st.floats(-8, 0, width=32), st.floats(0, 8, width=32)),
    st.booleans(),
)
@example(ACTIVATION_CANDIDATES, np.ones(24, np.float32), np.zeros(24, np.float32), (0, 0), False)
def test_any_candidates_values_and_range(candidates, g, h, ends, symmetric):
    """The range is not that of h, so many elements are clipped."""
    check(candidates, jnp.asarray(g), jnp.asarray(h), grids_of(ends[0], ends[1], symmetric))


@fast
@given(
    some_candidates,
    st.sampled_from([2.0**-4, 0.5, 1.0, 0.1]),
    st.sampled_from([-128, -8, -3, 0, 7]),
    hnp.arrays(np.float32, 40, elements=values),
)
def test_ties_and_grid_points(candidates, scale, zero_point, g):
    half_steps = np.arange(-20, 20, dtype=np.float32) * np.float32(scale) / 2
    grids = {}
    for bits in (8, 4):
        low, high = code_range(bits, False)
        z = jnp.int32(np.clip(zero_point, low, high))
        grids[bits] = QuantParams(jnp.float32(scale), z, bits, False)
    check(candidates, jnp.asarray(g), jnp.asarray(half_steps), grids)


@pytest.mark.parametrize("size", [0, 1, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK, 5 * BLOCK + 77])
@pytest.mark.parametrize("symmetric", [True, False])
def test_any_size(size, symmetric):
    g = jax.random.normal(jax.random.key(0), (size,))
    h = 3 * jax.random.normal(jax.random.key(1), (size,))
    check(ACTIVATION_CANDIDATES, g, h, grids_of(-2.0, 3.0, symmetric))


@pytest.mark.parametrize("shape", [(), (1,), (3, 5), (2, 3, 4, 5), (7, 1024)])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_any_shape_and_dtype(shape, dtype):
    g = jax.random.normal(jax.random.key(0), shape).astype(dtype)
    h = jax.random.normal(jax.random.key(1), shape).astype(dtype)
    check(ACTIVATION_CANDIDATES, g, h, grids_of(-1.0, 2.0, False))


def test_examples_are_independent_under_vmap():
    shape = (3, 2 * BLOCK + 5)
    g = jax.random.normal(jax.random.key(0), shape)
    h = jax.random.normal(jax.random.key(1), shape)
    grids = grids_of(-1.0, 2.0, False)

    @jax.jit
    def batched(g, h):
        return jax.vmap(lambda g, h: contract(ACTIVATION_CANDIDATES, g, h, grids))(g, h)

    for row, g_row, h_row in zip(batched(g, h), g, h, strict=True):
        expected, tolerance = reference(ACTIVATION_CANDIDATES, g_row, h_row, grids)
        assert np.all(np.abs(np.asarray(row, np.float64) - expected) <= tolerance)


def test_inside_a_scan_with_a_grid_for_every_step():
    steps, size = 3, BLOCK + 9
    h = jax.random.normal(jax.random.key(1), (steps, size))
    weights = jax.random.normal(jax.random.key(2), (size,))
    grids = grids_of([-1.0, -2.0, 0.0], [1.0, 0.5, 3.0], False)
    slots = jnp.zeros((steps, len(ACTIVATION_CANDIDATES) + GRADIENT_STATISTICS))

    @jax.jit
    @jax.grad
    def gradient(slots):
        def body(total, xs):
            x, slot, grid = xs
            return total + jnp.sum(
                weights * activation_probe(ACTIVATION_CANDIDATES, x, slot, grid)
            ), None

        return jax.lax.scan(body, jnp.float32(0), (h, slots, grids))[0]

    for i, row in enumerate(gradient(slots)):
        grid = jax.tree.map(lambda leaf, i=i: leaf[i], grids)
        expected, tolerance = reference(ACTIVATION_CANDIDATES, weights, h[i], grid)
        assert np.all(np.abs(np.asarray(row, np.float64) - expected) <= tolerance)


def test_accelerators_get_one_reduction_and_no_loop():
    g = jnp.ones(4 * BLOCK)
    lowered = jax.jit(contract, static_argnums=0).trace(
        ACTIVATION_CANDIDATES, g, g, grids_of(-1.0, 1.0, False)
    )
    for platform in ("cuda", "tpu"):
        text = lowered.lower(lowering_platforms=(platform,)).as_text()
        assert text.count("stablehlo.reduce(") == 1
        assert "stablehlo.while" not in text


def test_an_unusable_rounding_is_refused():
    with pytest.raises(ValueError, match="stochastic"):
        contract((Candidate(8, "stochastic"),), jnp.ones(3), jnp.ones(3), grids_of(-1, 1, False))
