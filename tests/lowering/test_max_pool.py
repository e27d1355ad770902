"""Max-pooling as shifted maxima, and of codes, against XLA's windowed reduction."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from models import random

import jaxrmils as jr
from jaxrmils.lowering.max_pool import can_shift, run_max_pool, shifted_max_pool
from jaxrmils.numerics import quantize
from jaxrmils.numerics.formats import code_range
from jaxrmils.numerics.quant_params import from_range


def pooling(x, **options):
    """What `lax.reduce_window` says, and its equation."""
    defaults = {"padding": ((0, 0),) * x.ndim, "base_dilation": (1,) * x.ndim}

    def pool(x):
        return jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, **{**defaults, **options})

    (eqn,) = jax.make_jaxpr(pool)(x).eqns
    assert eqn.primitive.name == "reduce_window_max"
    return pool(x), eqn


AXES = st.tuples(
    st.integers(1, 4), st.integers(1, 3), st.integers(1, 2), st.integers(0, 2), st.integers(0, 2)
)


@settings(max_examples=10, deadline=None)
@given(st.tuples(AXES, AXES), st.integers(0, 99), st.sampled_from([8, 4]), st.booleans())
def test_shifted_maxima(axes, seed, bits, symmetric):
    window, strides, dilation, low, high = zip(*axes, strict=True)
    x = random(2, 9, 8, 3, seed=seed)
    expected, eqn = pooling(
        x,
        window_dimensions=(1, *window, 1),
        window_strides=(1, *strides, 1),
        window_dilation=(1, *dilation, 1),
        padding=((0, 0), *zip(low, high, strict=True), (0, 0)),
    )
    assert can_shift(eqn)
    np.testing.assert_array_equal(run_max_pool(eqn, [x])[0], expected)
    # Codes of the maximum are the maximum of the codes, windows of nothing but padding included.
    grid = from_range(x.min(), x.max(), bits=bits, symmetric=symmetric)
    codes = shifted_max_pool(quantize(x, grid), eqn, code_range(bits, symmetric)[0])
    assert codes.dtype == jnp.int8
    np.testing.assert_array_equal(codes, quantize(expected, grid))


@pytest.mark.parametrize(
    "options",
    [
        {"window_dimensions": (1, 10, 1), "window_strides": (1, 1, 1)},
        {"window_dimensions": (1, 13, 1), "window_strides": (1, 1, 1)},
        {
            "window_dimensions": (1, 2, 1),
            "window_strides": (1, 1, 1),
            "base_dilation": (1, 2, 1),
        },
    ],
)
def test_what_is_left_to_xla(options):
    x = random(2, 12, 3)
    expected, eqn = pooling(x, **options)
    assert not can_shift(eqn)
    np.testing.assert_array_equal(run_max_pool(eqn, [x])[0], expected)


def pooled_net(p, x):
    h = jax.nn.relu(_conv(x, p["a"]))
    h = jax.lax.reduce_window(h, -jnp.inf, jax.lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
    return jnp.mean(_conv(h, p["b"]), axis=(1, 2))


def _conv(x, kernel):
    return jax.lax.conv_general_dilated(
        x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


@pytest.mark.parametrize(("format", "pooled_dtype"), [("w8a8", "s8"), ("w8", "f32")])
def test_codes_are_pooled_in_the_compiled_program(format, pooled_dtype):
    params = {"a": random(3, 3, 4, 8), "b": random(3, 3, 8, 8, seed=2)}
    x = random(2, 8, 8, 4, seed=3)
    graph = jr.trace(pooled_net, params, x)
    ranges = jr.calibrate(graph, params, [x])
    plan = jr.uniform(jr.tabulate(graph), format)
    models = {b: jr.quantize(graph, params, plan, ranges, backend=b) for b in ("cpu", "tpu")}
    text = jax.jit(models["cpu"].apply).lower(models["cpu"].params, x).as_text("hlo")
    assert "reduce-window" not in text
    maxima = [line for line in text.splitlines() if " maximum(" in line and "[2,4,4,8]" in line]
    assert maxima and all(pooled_dtype in line for line in maxima)
    # Another backend pools floats first; the numbers are the same.
    np.testing.assert_array_equal(*(jax.jit(m.apply)(m.params, x) for m in models.values()))
