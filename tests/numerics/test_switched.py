"""Formats as data against formats that are known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxrmils.numerics import fake_quant, from_range, switched_quant

FORMATS = [(b, s, r) for b in (8, 4) for s in (True, False) for r in ("nearest", "floor", "ceil")]


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.floats(-300, 300, width=32), min_size=1, max_size=20),
    st.floats(-100, 0, width=32),
    st.floats(0, 100, width=32),
)
def test_every_switch_is_its_format(values, lo, hi):
    x = jnp.asarray(values, jnp.float32)
    grids = [
        from_range(jnp.float32(lo), jnp.float32(hi), bits=b, symmetric=s) for b, s, _ in FORMATS
    ]
    roundings = [r for _, _, r in FORMATS]
    run = jax.jit(lambda k: switched_quant(x, grids, roundings, k))
    np.testing.assert_array_equal(run(jnp.int32(0)), x)
    for k, (grid, rounding) in enumerate(zip(grids, roundings, strict=True)):
        np.testing.assert_array_equal(run(jnp.int32(k + 1)), fake_quant(x, grid, rounding))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_the_dtype_stays(dtype):
    x = jnp.linspace(-2, 2, 50).astype(dtype)
    grid = from_range(jnp.float32(-1), jnp.float32(2), bits=4, symmetric=False)
    for switch in (0, 1):
        found = switched_quant(x, [grid], ["floor"], switch)
        expected = fake_quant(x, grid, "floor") if switch else x
        assert found.dtype == dtype
        np.testing.assert_array_equal(np.float32(found), np.float32(expected))


def test_there_are_no_branches_in_the_program():
    grid = from_range(jnp.float32(-1), jnp.float32(2), bits=4, symmetric=False)
    run = jax.jit(lambda x, k: switched_quant(x, [grid] * 3, ["floor", "ceil", "nearest"], k))
    assert "case" not in run.lower(jnp.ones(8), jnp.int32(1)).as_text()


def test_stochastic_is_refused():
    grid = from_range(jnp.float32(-1), jnp.float32(2), bits=4, symmetric=False)
    with pytest.raises(ValueError, match="'stochastic'"):
        switched_quant(jnp.ones(3), [grid], ["stochastic"], 1)
