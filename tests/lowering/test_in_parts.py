"""Batches that run in parts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxrmils.lowering.in_parts import examples_at_once, in_parts, part_size

SQUARE = jax.ShapeDtypeStruct((256, 256), jnp.float32)
EXAMPLE = jax.ShapeDtypeStruct((1, 256), jnp.float32)


def chain(p, x):
    return jnp.tanh(jnp.tanh(x @ p) @ p) @ p


@settings(deadline=None)
@given(st.integers(1, 40), st.integers(1, 12) | st.none())
def test_parts_give_what_the_batch_gives(batch, at_once):
    inputs = {"ids": np.arange(batch), "pair": (np.arange(3.0 * batch).reshape(batch, 3),)}

    def run(x):
        return {"odd": x["ids"] % 2, "rows": x["pair"][0] * 2}

    found, expected = in_parts(run, inputs, at_once), run(jax.tree.map(jnp.asarray, inputs))
    jax.tree.map(np.testing.assert_array_equal, found, expected)


@given(st.integers(1, 10_000), st.integers(1, 10_000))
def test_parts_are_small_enough_and_few(batch, at_once):
    size = part_size(batch, at_once)
    assert 1 <= size <= at_once
    # Less than twice as many as are needed.
    assert -(-batch // size) < 2 * -(-batch // at_once) or size == at_once


def test_as_many_examples_as_fit():
    limit = 50_000
    count = examples_at_once(chain, SQUARE, EXAMPLE, limit)

    def temporaries(batch):
        x = jax.ShapeDtypeStruct((batch, 256), jnp.float32)
        return jax.jit(chain).lower(SQUARE, x).compile().memory_analysis().temp_size_in_bytes

    assert temporaries(count) <= limit < temporaries(count + 1)
    looped = jax.jit(lambda p, x: in_parts(lambda part: chain(p, part), x, count))
    x = jax.ShapeDtypeStruct((8 * count, 256), jnp.float32)
    memory = looped.lower(SQUARE, x).compile().memory_analysis().temp_size_in_bytes
    assert memory < 0.3 * temporaries(8 * count)
    assert examples_at_once(chain, SQUARE, EXAMPLE, 10) == 1


@pytest.mark.parametrize(
    "apply",
    [
        lambda p, x: (x @ p, (x @ p).mean()),  # an output of the whole batch
        lambda p, x: x @ jnp.cumsum(jnp.tanh(p) @ p, 0),  # temporaries of parameters alone
        lambda p, x: x + 1,  # none at all
    ],
)
def test_where_parts_are_of_no_use(apply):
    assert examples_at_once(apply, SQUARE, EXAMPLE, 100_000) is None
