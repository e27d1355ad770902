import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrmils.numerics import divide_exactly

SCALE = np.float32(0.0123457)


def numerators(shape):
    """Multiples of half a step: where a second rounding shows."""
    halves = np.arange(np.prod(shape)) % 509 - 254
    return (halves * (SCALE / 2)).astype(np.float32).reshape(shape)


@pytest.mark.parametrize("shape", [(4001,), (3, 4001), (4001, 3), (1, 1), ()])
def test_quotients_are_ieee_however_compiled(shape):
    x = numerators(shape)
    expected = x / SCALE
    scale = jnp.asarray(SCALE)
    for divide in (
        divide_exactly,
        jax.jit(divide_exactly),
        lambda x, scale: jax.jit(lambda x: divide_exactly(x, jnp.float32(SCALE)))(x),
        lambda x, scale: jax.jit(divide_exactly)(x, jnp.full((1,) * x.ndim, scale)),
    ):
        np.testing.assert_array_equal(divide(jnp.asarray(x), scale), expected)


def test_quotients_are_ieee_under_vmap():
    x = numerators((7, 501))
    divide = jax.jit(jax.vmap(divide_exactly, in_axes=(0, None)))
    np.testing.assert_array_equal(divide(jnp.asarray(x), jnp.asarray(SCALE)), x / SCALE)


def test_special_values():
    x = jnp.array([jnp.nan, jnp.inf, -jnp.inf, 0.0])
    np.testing.assert_array_equal(divide_exactly(x, jnp.float32(2)), x)
