"""Shifted products against XLA's own convolution, and where they are used."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxrmils as jr
from jaxrmils.graph import interpret
from jaxrmils.graph.depthwise import is_depthwise, shifted_products

LAYOUTS = [("NHWC", "HWIO", "NHWC"), ("NCHW", "OIHW", "NCHW"), ("NHWC", "OIHW", "NCHW")]


@st.composite
def cases(draw):
    taps = draw(st.tuples(st.integers(1, 5), st.integers(1, 5)))
    pair = st.tuples(st.integers(1, 3), st.integers(1, 3))
    edge = st.tuples(st.integers(-1, 3), st.integers(-1, 3))
    return {
        "channels": draw(st.integers(2, 5)),
        "multiplier": draw(st.integers(1, 2)),
        "taps": taps,
        "layout": draw(st.sampled_from(LAYOUTS)),
        "window_strides": draw(pair),
        "padding": (draw(edge), draw(edge)),
        "lhs_dilation": draw(pair),
        "rhs_dilation": draw(pair),
    }


def built(case, dtype=np.float32):
    """A convolution, its equation and operands."""
    case = dict(case)
    channels, multiplier = case.pop("channels"), case.pop("multiplier")
    taps, layout = case.pop("taps"), case.pop("layout")
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 13, 14, channels)).astype(dtype)
    w = rng.normal(size=(*taps, 1, channels * multiplier)).astype(dtype)
    x = np.transpose(x, ["NHWC".index(axis) for axis in layout[0]])
    w = np.transpose(w, ["HWIO".index(axis) for axis in layout[1]])

    def conv(x, w):
        return jax.lax.conv_general_dilated(
            x, w, dimension_numbers=layout, feature_group_count=channels, **case
        )

    (eqn,) = jax.make_jaxpr(conv)(x, w).jaxpr.eqns
    return conv, eqn, x, w


@settings(max_examples=10, deadline=None)
@given(cases())
def test_values_and_gradients_are_the_convolutions(case):
    conv, eqn, x, w = built(case)
    assert is_depthwise(eqn)
    expected, pull = jax.vjp(conv, x, w)
    found, own_pull = jax.vjp(lambda x, w: shifted_products(eqn, x, w), x, w)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-4)
    cotangent = np.random.default_rng(1).normal(size=expected.shape).astype(np.float32)
    for own, theirs in zip(own_pull(cotangent), pull(cotangent), strict=True):
        np.testing.assert_allclose(own, theirs, rtol=1e-4, atol=1e-3)


PLAIN = {
    "channels": 3,
    "multiplier": 1,
    "taps": (3, 3),
    "layout": LAYOUTS[0],
    "window_strides": (2, 2),
    "padding": ((0, 1), (0, 1)),
    "lhs_dilation": (1, 1),
    "rhs_dilation": (1, 1),
}


def test_forward_over_reverse_and_vmap():
    conv, eqn, x, w = built(PLAIN)

    def product(function):
        return jax.vmap(
            lambda x: jax.jvp(
                jax.grad(lambda x, w: jnp.sum(function(x[None], w) ** 3)),
                (x, w),
                (jnp.ones_like(x), jnp.ones_like(w)),
            )[1]
        )(x)

    found = product(lambda x, w: shifted_products(eqn, x, w))
    np.testing.assert_allclose(found, product(conv), rtol=1e-4, atol=1e-2)


def test_bfloat16_is_summed_in_float32():
    conv, eqn, x, w = built(PLAIN, jnp.bfloat16)
    found = shifted_products(eqn, jnp.asarray(x), jnp.asarray(w))
    assert found.dtype == jnp.bfloat16
    exact = conv(x.astype(np.float32), w.astype(np.float32))
    np.testing.assert_allclose(found.astype(np.float32), exact, rtol=2**-8, atol=1e-6)


@pytest.mark.parametrize(
    ("groups", "taps", "dtype"), [(2, 3, np.float32), (4, 11, np.float32), (4, 3, np.int8)]
)
def test_other_convolutions_are_left_alone(groups, taps, dtype):
    x, w = np.zeros((1, 14, 14, 4), dtype), np.zeros((taps, taps, 4 // groups, 4), dtype)

    def conv(x, w):
        return jax.lax.conv_general_dilated(
            x,
            w,
            (1, 1),
            "SAME",
            dimension_numbers=LAYOUTS[0],
            feature_group_count=groups,
        )

    (eqn,) = jax.make_jaxpr(conv)(x, w).jaxpr.eqns
    assert not is_depthwise(eqn)


def test_a_site_runs_without_xlas_grouped_convolution_on_cpu():
    conv, _, x, w = built(PLAIN)
    graph = jr.trace(lambda params, x: conv(x, params["w"]), {"w": w}, x)

    def run(w, x):
        return interpret(graph, lambda call: (call.bind(*call.operands()), None), [w], x)[0]

    text = jax.jit(run).lower(w, x).as_text()
    assert "stablehlo.convolution" not in text
    np.testing.assert_allclose(jax.jit(run)(w, x), conv(x, w), rtol=1e-5, atol=1e-5)
    exported = jax.jit(run).trace(w, x).lower(lowering_platforms=("tpu",)).as_text()
    assert "stablehlo.convolution" in exported
