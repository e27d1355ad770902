import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from jaxrmils.numerics import pack_int4, unpack_int4
from jaxrmils.numerics.packing import BITCASTS, _by_bitcast, _by_shifts

shapes = hnp.array_shapes(min_dims=1, max_dims=4, min_side=1, max_side=5)


@settings(max_examples=15, deadline=None)
@given(shapes.flatmap(lambda s: hnp.arrays(np.int8, s, elements=st.integers(-8, 7))))
def test_round_trip(codes):
    packed = pack_int4(jnp.asarray(codes))
    assert packed.dtype == jnp.uint8
    assert packed.shape == (*codes.shape[:-1], (codes.shape[-1] + 1) // 2)
    restored = unpack_int4(packed, codes.shape[-1])
    assert restored.dtype == jnp.int8
    np.testing.assert_array_equal(restored, codes)


def test_every_byte_against_python():
    packed = np.arange(256, dtype=np.uint8)
    low, high = packed & 15, packed >> 4
    expected = np.stack([low, high], axis=-1).astype(np.int8)
    expected = np.where(expected > 7, expected - 16, expected).reshape(-1)
    unpack = jax.jit(unpack_int4, static_argnums=1)
    codes = unpack(jnp.asarray(packed), 512)
    np.testing.assert_array_equal(codes, expected)
    np.testing.assert_array_equal(jax.jit(pack_int4)(codes), packed)


@settings(max_examples=10, deadline=None)
@given(shapes.flatmap(lambda s: hnp.arrays(np.uint8, s)))
def test_what_a_cpu_and_what_other_backends_compile(packed):
    # Devices of one kind compile one of them; the other is lowered for another platform alone.
    np.testing.assert_array_equal(_by_bitcast(packed), _by_shifts(packed))
    unpack = jax.jit(unpack_int4, static_argnums=1).trace(packed, 2 * packed.shape[-1])
    on_cpu, on_cuda = (
        unpack.lower(lowering_platforms=(platform,)).as_text() for platform in ("cpu", "cuda")
    )
    assert ("xi4>" in on_cpu) == ("shift_right" not in on_cpu) == BITCASTS
    assert "xi4>" not in on_cuda and "shift_right_arithmetic" in on_cuda


@pytest.mark.parametrize("shape", [(1,), (2, 1), (48, 7), (5, 5, 1, 32)])
def test_constants_that_a_compiler_folds(shape):
    codes = np.random.default_rng(0).integers(-8, 8, shape).astype(np.int8)
    packed = pack_int4(jnp.asarray(codes))
    np.testing.assert_array_equal(jax.jit(lambda: unpack_int4(packed, shape[-1]))(), codes)


def test_rows_of_unknown_number():
    (rows,) = jax.export.symbolic_shape("rows")
    exported = jax.export.export(jax.jit(lambda packed: unpack_int4(packed, 5)))(
        jax.ShapeDtypeStruct((rows, 3), jnp.uint8)
    )
    codes = np.arange(-7, 8, dtype=np.int8).reshape(3, 5)
    np.testing.assert_array_equal(exported.call(pack_int4(jnp.asarray(codes))), codes)


def test_odd_length_pads_with_zero():
    assert int(pack_int4(jnp.array([-1], jnp.int8))[0]) == 15


def test_empty_axes():
    assert pack_int4(jnp.zeros((3, 0), jnp.int8)).shape == (3, 0)
    assert unpack_int4(jnp.zeros((0, 2), jnp.uint8), 3).shape == (0, 3)


def test_wrong_shapes_are_refused():
    with pytest.raises(ValueError, match="last axis"):
        pack_int4(jnp.int8(1))
    with pytest.raises(ValueError, match="5 codes take a last axis of 3 bytes"):
        unpack_int4(jnp.zeros((4, 2), jnp.uint8), 5)
