"""Float32 arithmetic that reaches the integers exactly, up to the longest sums it accepts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax

from jaxrmils.lowering.exact_float import exact_bilinear
from jaxrmils.lowering.integer_conv import conv_int32
from jaxrmils.lowering.integer_dot import dot_int32

MATMUL = (((1,), (0,)), ((), ()))


def float_dot(lhs, rhs):
    return lax.dot_general(lhs, rhs, MATMUL, precision=lax.Precision.HIGHEST)


def integers(rng, shape, bound, extreme):
    values = rng.integers(-bound, bound + 1, shape)
    return np.full(shape, -bound) + (values == bound) if extreme else values


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from([1, 7, 300, 1_024, 9_000, 33_025, 65_536]),
    st.sampled_from([7, 8, 15, 127, 128, 255]),
    st.sampled_from([7, 8, 127, 128]),
    st.booleans(),
    st.sampled_from(["int16", "int32", "float32"]),
    st.integers(0, 2**32 - 1),
)
def test_dots_are_exact(k, lhs_bound, rhs_bound, extreme, dtype, seed):
    rng = np.random.default_rng(seed)
    lhs = integers(rng, (2, k), lhs_bound, extreme)
    rhs = integers(rng, (k, 3), rhs_bound, extreme)
    operands = jnp.asarray(lhs, dtype), jnp.asarray(rhs, dtype)
    out = exact_bilinear(float_dot, *operands, k, lhs_bound, rhs_bound)
    assert out.dtype == jnp.int32
    np.testing.assert_array_equal(np.asarray(out, np.int64), lhs @ rhs)


@pytest.mark.parametrize(
    ("k", "lhs_bound", "rhs_bound", "calls"),
    [
        (1_024, 128, 128, 1),  # 2^24 exactly
        (1_025, 128, 128, 2),
        (8_738, 128, 128, 2),
        (8_739, 128, 128, 4),
        (33_025, 255, 255, 4),
        (65_536, 8, 8, 1),
        (65_536, 255, 8, 2),  # the wide operand is the one to split
    ],
)
def test_no_more_calls_than_needed(k, lhs_bound, rhs_bound, calls):
    seen = []

    def op(lhs, rhs):
        assert lhs.dtype == rhs.dtype == jnp.float32
        seen.append((lhs, rhs))
        return float_dot(lhs, rhs)

    lhs, rhs = jnp.full((1, k), -lhs_bound, jnp.int16), jnp.full((k, 1), -rhs_bound, jnp.int16)
    assert exact_bilinear(op, lhs, rhs, k, lhs_bound, rhs_bound).item() == k * lhs_bound * rhs_bound
    assert len(seen) == calls
    for left, right in seen:
        assert k * float(jnp.abs(left).max()) * float(jnp.abs(right).max()) <= 2**24


def test_too_long_sums_are_refused():
    code = jnp.zeros((1, 1), jnp.int8)
    with pytest.raises(ValueError, match=r"K = 33026 .*limit is K = 33025"):
        exact_bilinear(float_dot, code, code, 33_026, 255, 255)
    with pytest.raises(ValueError, match=r"K = 80000 .*base 16: the limit is K = 74565"):
        exact_bilinear(float_dot, code, code, 80_000, 128, 128)
    with pytest.raises(ValueError, match=r"K = 300000 .*base 16: the limit is K = 262144"):
        exact_bilinear(float_dot, code, code, 300_000, 8, 8)


def test_equals_the_integer_dot_under_jit():
    rng = np.random.default_rng(0)
    lhs = jnp.asarray(rng.integers(-128, 128, (4, 3_000)), jnp.int8)
    rhs = jnp.asarray(rng.integers(-128, 128, (3_000, 5)), jnp.int8)
    zero_point = jnp.int32(-128)

    @jax.jit
    def simulate(lhs, rhs):
        shifted = lhs.astype(jnp.int32) - zero_point
        return exact_bilinear(float_dot, shifted, rhs, 3_000, 255, 128)

    expected = dot_int32(lhs, rhs, MATMUL, lhs_zero_point=zero_point)
    np.testing.assert_array_equal(simulate(lhs, rhs), expected)


def test_equals_the_integer_convolution():
    rng = np.random.default_rng(1)
    lhs = jnp.asarray(rng.integers(-128, 128, (2, 7, 7, 160)), jnp.int8)
    rhs = jnp.asarray(rng.integers(-128, 128, (3, 3, 160, 8)), jnp.int8)
    layouts = lax.conv_dimension_numbers(lhs.shape, rhs.shape, ("NHWC", "HWIO", "NHWC"))
    geometry = {
        "window_strides": (2, 2),
        "padding": ((1, 1), (1, 1)),
        "lhs_dilation": (1, 1),
        "rhs_dilation": (1, 1),
        "dimension_numbers": layouts,
    }

    def convolve(lhs, rhs):
        precision = lax.Precision.HIGHEST
        return lax.conv_general_dilated(lhs, rhs, **geometry, precision=precision)

    shifted = lhs.astype(jnp.int32) - 17
    out = exact_bilinear(convolve, shifted, rhs, 3 * 3 * 160, 255, 128)
    expected = conv_int32(lhs, rhs, **geometry, lhs_zero_point=jnp.int32(17))
    np.testing.assert_array_equal(out, expected)
