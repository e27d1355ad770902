import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from jaxrmils.numerics import (
    BITS,
    QuantParams,
    code_range,
    dequantize,
    fake_quant,
    from_range,
    quantize,
    weight_params,
)

FORMATS = [(bits, symmetric) for bits in BITS for symmetric in (True, False)]
TINY = float(np.finfo(np.float32).smallest_normal)
HUGE = float(np.finfo(np.float32).max)
SUBNORMAL = float(np.float32(1e-40))

# Flushed subnormals would make hypothesis' own checks disagree, so they are named examples.
floats = st.floats(-(2.0**100), 2.0**100, width=32, allow_subnormal=False)
formats = st.sampled_from(FORMATS)
tensors = hnp.arrays(np.float32, 64, elements=floats)
fast = settings(max_examples=30, deadline=None)


def reference_codes(x, scale, zero_point, bits, symmetric, rounding):
    """The float32 quotient, and the float32 tolerance that keeps grid values on the grid."""
    quotient, tolerance = x.astype(np.float32) / scale, np.float32(2.0**-14)
    rounded = {
        "nearest": np.rint(quotient),
        "floor": np.floor(quotient + tolerance),
        "ceil": np.ceil(quotient - tolerance),
    }[rounding].astype(np.float64)
    return np.clip(rounded + zero_point, *code_range(bits, symmetric)).astype(np.int8)


def grid_of(x, bits, symmetric):
    return from_range(jnp.min(x), jnp.max(x), bits=bits, symmetric=symmetric)


def tolerance(x, qp):
    """Rounding of the quotient and of the product: a few units in the last place."""
    return np.float64(qp.scale) * 1e-4 + np.abs(np.float64(x)) * 1e-6


@fast
@given(tensors, formats)
@example(np.full(64, HUGE / 2, np.float32), (8, False))
@example(np.resize(np.array([-HUGE / 2, HUGE / 2], np.float32), 64), (4, False))
@example(np.full(64, 3e-36, np.float32), (8, True))
@example(np.full(64, -7.0, np.float32), (4, False))
@example(np.zeros(64, np.float32), (4, False))
def test_round_trip_inside_the_range(x, fmt):
    qp = grid_of(jnp.asarray(x), *fmt)
    restored = np.float64(fake_quant(jnp.asarray(x), qp))
    bound = np.float64(qp.scale) / 2 + tolerance(x, qp)
    assert np.all(np.abs(restored - np.float64(x)) <= bound)


@fast
@given(tensors, formats)
def test_floor_below_and_ceil_above(x, fmt):
    bits, symmetric = fmt
    qp = grid_of(jnp.asarray(x), bits, symmetric)
    # One step inside the ends, where clipping has no part.
    lo, hi = (dequantize(jnp.int8(code), qp) for code in code_range(bits, symmetric))
    inner = jnp.clip(jnp.asarray(x), lo, hi)
    x64 = np.float64(inner)
    down, up = (np.float64(fake_quant(inner, qp, rounding)) for rounding in ("floor", "ceil"))
    slack = tolerance(x64, qp)
    step = np.float64(qp.scale)
    assert np.all(down <= x64 + slack) and np.all(x64 - down <= step + slack)
    assert np.all(up >= x64 - slack) and np.all(up - x64 <= step + slack)


@fast
@given(
    hnp.arrays(np.float32, 64, elements=st.floats(width=32, allow_nan=False)),
    st.floats(-1e9, 0, width=32),
    st.floats(0, 1e9, width=32),
    formats,
    st.sampled_from(["nearest", "floor", "ceil", "stochastic"]),
)
def test_codes_stay_in_range_for_any_input(x, lo, hi, fmt, rounding):
    qp = from_range(jnp.float32(lo), jnp.float32(hi), bits=fmt[0], symmetric=fmt[1])
    codes = quantize(jnp.asarray(x), qp, rounding, jax.random.key(0))
    qmin, qmax = code_range(*fmt)
    assert codes.dtype == jnp.int8
    assert int(codes.min()) >= qmin and int(codes.max()) <= qmax


ends = st.floats(width=32)


@settings(max_examples=80, deadline=None)
@given(ends, ends, formats)
@example(0.0, 0.0, (8, False))
@example(0.0, SUBNORMAL, (8, False))
@example(-SUBNORMAL, TINY, (4, False))
@example(TINY, 255 * TINY, (8, False))
@example(-HUGE, HUGE, (4, False))
@example(-HUGE, HUGE, (8, True))
@example(float("-inf"), float("inf"), (8, False))
@example(float("nan"), 1.0, (8, False))
def test_any_range_gives_a_usable_grid_with_zero_on_it(lo, hi, fmt):
    qp = from_range(jnp.float32(lo), jnp.float32(hi), bits=fmt[0], symmetric=fmt[1])
    scale = float(qp.scale)
    qmin, qmax = code_range(*fmt)
    assert np.isfinite(scale) and scale >= TINY
    assert qp.scale.dtype == jnp.float32 and qp.zero_point.dtype == jnp.int32
    assert qmin <= int(qp.zero_point) <= qmax
    codes = jnp.array([qmin, qmax], jnp.int8)
    assert np.isfinite(np.asarray(dequantize(codes, qp))).all()
    for rounding in ("nearest", "floor", "ceil", "stochastic"):
        zero = fake_quant(jnp.float32(0), qp, rounding, jax.random.key(1))
        assert float(zero) == 0.0


def test_known_grids():
    relu = from_range(jnp.float32(0), jnp.float32(255), bits=8, symmetric=False)
    assert float(relu.scale) == 1.0 and int(relu.zero_point) == -128
    negative = from_range(jnp.float32(-15), jnp.float32(-1), bits=4, symmetric=False)
    assert float(negative.scale) == 1.0 and int(negative.zero_point) == 7
    symmetric = from_range(jnp.float32(-127), jnp.float32(3), bits=8, symmetric=True)
    assert float(symmetric.scale) == 1.0 and int(symmetric.zero_point) == 0
    empty = from_range(jnp.float32(0), jnp.float32(0), bits=8, symmetric=False)
    assert float(empty.scale) == 1.0 and int(empty.zero_point) == 0


@pytest.mark.parametrize("rounding", ["nearest", "floor", "ceil"])
@pytest.mark.parametrize("bits, symmetric", FORMATS)
def test_codes_match_numpy_bit_for_bit(bits, symmetric, rounding):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(40, 50)).astype(np.float32)
    qp = grid_of(jnp.asarray(x), bits, symmetric)
    scale, zero_point = np.asarray(qp.scale), np.asarray(qp.zero_point)
    # Exact multiples and halves of the step, and their neighbours.
    ties = (np.arange(-300, 300) * (scale / 2)).astype(np.float32).reshape(-1, 50)
    above = np.nextafter(ties, np.inf, dtype=np.float32)
    above = np.where(ties == 0, ties, above)  # not a subnormal, which XLA flushes
    x = np.concatenate([x, ties, above])
    expected = reference_codes(x, scale, zero_point, bits, symmetric, rounding)
    x = jnp.asarray(x)
    np.testing.assert_array_equal(quantize(x, qp, rounding), expected)
    np.testing.assert_array_equal(jax.jit(quantize, static_argnums=2)(x, qp, rounding), expected)
    constant = jax.jit(lambda x: quantize(x, qp, rounding))
    np.testing.assert_array_equal(constant(x), expected)
    by_row = jax.jit(jax.vmap(lambda row: quantize(row, qp, rounding)))
    np.testing.assert_array_equal(by_row(x), expected)


@pytest.mark.parametrize("rounding", ["nearest", "floor", "ceil"])
@pytest.mark.parametrize("bits, symmetric", FORMATS)
def test_grid_values_are_fixed_points(bits, symmetric, rounding):
    for scale in np.random.default_rng(1).uniform(1e-6, 1e3, 20).astype(np.float32):
        zero_point = 0 if symmetric else -3
        qp = QuantParams(jnp.asarray(scale), jnp.int32(zero_point), bits, symmetric)
        qmin, qmax = code_range(bits, symmetric)
        codes = jnp.arange(qmin, qmax + 1, dtype=jnp.int8)
        again = jax.jit(lambda c, qp=qp: quantize(dequantize(c, qp), qp, rounding))
        restored = again(codes)
        np.testing.assert_array_equal(restored, codes)


@fast
@given(tensors, formats, st.sampled_from(["nearest", "floor", "ceil"]))
def test_quantizing_twice_changes_nothing(x, fmt, rounding):
    qp = grid_of(jnp.asarray(x), *fmt)
    once = fake_quant(jnp.asarray(x), qp, rounding)
    np.testing.assert_array_equal(fake_quant(once, qp, rounding), once)


def test_nearest_is_half_to_even():
    qp = QuantParams(jnp.float32(1), jnp.int32(0), 8, True)
    codes = quantize(jnp.array([0.5, 1.5, 2.5, -0.5, -1.5]), qp)
    np.testing.assert_array_equal(codes, [0, 2, 2, 0, -2])


def test_stochastic_is_unbiased_and_keeps_grid_values():
    qp = QuantParams(jnp.float32(0.5), jnp.int32(2), 4, False)
    x = jnp.broadcast_to(jnp.array([-0.37, 0.0, 0.1, 1.0, 1.45])[:, None], (5, 40_000))
    restored = fake_quant(x, qp, "stochastic", jax.random.key(3))
    # The mean of 40,000 draws has a standard error of at most 0.00125.
    np.testing.assert_allclose(restored.mean(axis=1), x[:, 0], atol=0.006)
    np.testing.assert_array_equal(restored[jnp.array([1, 3])], x[jnp.array([1, 3])])


def test_rounding_errors():
    qp = QuantParams(jnp.float32(1), jnp.int32(0), 8, True)
    with pytest.raises(ValueError, match="pass a PRNG key"):
        quantize(jnp.ones(2), qp, "stochastic")
    with pytest.raises(ValueError, match="expected one of nearest, floor"):
        quantize(jnp.ones(2), qp, "up")


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
@pytest.mark.parametrize("bits, symmetric", FORMATS)
def test_fake_quant_keeps_the_dtype_and_computes_in_float32(dtype, bits, symmetric):
    x = jnp.linspace(-3, 5, 99).astype(dtype)
    qp = grid_of(x, bits, symmetric)
    assert qp.scale.dtype == jnp.float32
    restored = fake_quant(x, qp)
    assert restored.dtype == dtype
    expected = fake_quant(x.astype(jnp.float32), qp).astype(dtype)
    np.testing.assert_array_equal(np.float32(restored), np.float32(expected))


def test_infinities_saturate():
    qp = from_range(jnp.float32(-1), jnp.float32(1), bits=8, symmetric=False)
    codes = quantize(jnp.array([-jnp.inf, jnp.inf]), qp)
    np.testing.assert_array_equal(codes, [-128, 127])


@pytest.mark.parametrize("bits", BITS)
def test_weight_params_per_channel(bits):
    w = np.random.default_rng(2).normal(size=(3, 5, 7)).astype(np.float32)
    w[:, :, 4] = 0
    for axes in [(2,), (-1,), (0, 2), ()]:
        qp = weight_params(jnp.asarray(w), bits=bits, channel_axes=axes)
        kept = {axis % 3 for axis in axes}
        absmax = np.abs(w).max(axis=tuple(a for a in range(3) if a not in kept), keepdims=True)
        qmax = code_range(bits, True)[1]
        expected = np.where(absmax > 0, absmax / np.float32(qmax), np.float32(1))
        np.testing.assert_array_equal(qp.scale, expected)
        assert np.all(np.asarray(fake_quant(jnp.asarray(w), qp))[:, :, 4] == 0)


def test_weight_params_refuses_bad_axes():
    for axes in [(3,), (0, 0), (-1, 1)]:
        with pytest.raises(ValueError, match="channel_axes"):
            weight_params(jnp.ones((2, 3)), bits=8, channel_axes=axes)


def test_quant_params_are_a_pytree():
    lo = -jnp.arange(3.0)
    stack = from_range(lo, 2 * -lo, bits=4, symmetric=False)
    x = jnp.linspace(-2, 4, 30).reshape(3, 10)
    rows = jax.vmap(fake_quant)(x, stack)
    _, scanned = jax.lax.scan(lambda c, args: (c, fake_quant(*args)), None, (x, stack))
    one = [fake_quant(x[i], jax.tree.map(lambda leaf, i=i: leaf[i], stack)) for i in range(3)]
    np.testing.assert_array_equal(rows, jnp.stack(one))
    np.testing.assert_array_equal(scanned, jnp.stack(one))
    shapes = jax.eval_shape(lambda: from_range(lo, lo, bits=8, symmetric=True))
    assert shapes.scale.shape == (3,) and shapes.bits == 8
