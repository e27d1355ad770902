import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrmils.numerics import (
    BITS,
    QTensor,
    fake_quant,
    from_range,
    quantize,
    quantize_weight,
    weight_params,
)


def weight(shape, seed=0):
    return jax.random.normal(jax.random.key(seed), shape)


@pytest.mark.parametrize("shape", [(6,), (4, 6), (4, 5), (3, 3, 2, 7), (2, 1)])
@pytest.mark.parametrize("bits", BITS)
def test_dequantizes_to_fake_quant(shape, bits):
    w = weight(shape)
    axes = (len(shape) - 1,)
    q = quantize_weight(w, bits=bits, channel_axes=axes)
    qp = weight_params(w, bits=bits, channel_axes=axes)
    assert q.packed == (bits == 4) and q.shape == shape and q.ndim == len(shape)
    assert q.codes().dtype == jnp.int8
    np.testing.assert_array_equal(q.codes(), quantize(w, qp))
    np.testing.assert_array_equal(q.dequantize(), fake_quant(w, qp))
    np.testing.assert_array_equal(jax.jit(QTensor.dequantize)(q), fake_quant(w, qp))
    assert q.dequantize(jnp.bfloat16).dtype == jnp.bfloat16


@pytest.mark.parametrize("pack", [True, False])
def test_slices_of_a_stack(pack):
    w = weight((3, 4, 5))
    stack = quantize_weight(w, bits=4, channel_axes=(0, 2), pack=pack)
    expected = stack.dequantize()

    def step(carry, q):
        assert q.shape == (4, 5)
        return carry, q.dequantize()

    _, scanned = jax.lax.scan(step, None, stack)
    np.testing.assert_array_equal(scanned, expected)
    np.testing.assert_array_equal(jax.vmap(QTensor.dequantize)(stack), expected)
    sliced = jax.tree.map(lambda leaf: leaf[1], stack)
    np.testing.assert_array_equal(sliced.dequantize(), expected[1])
    each = jax.vmap(lambda w: quantize_weight(w, bits=4, channel_axes=(1,), pack=pack))(w)
    assert jax.tree.structure(each) == jax.tree.structure(stack)
    np.testing.assert_array_equal(each.codes(), stack.codes())


@pytest.mark.parametrize("pack", [True, False])
@pytest.mark.parametrize("symmetric", [True, False])
def test_from_codes_with_a_zero_point(pack, symmetric):
    x = jnp.linspace(-0.3, 2, 21).reshape(3, 7)
    qp = from_range(x.min(), x.max(), bits=4, symmetric=symmetric)
    q = QTensor.from_codes(quantize(x, qp), qp, pack=pack)
    assert (q.zero_point is None) == symmetric
    assert q.params.symmetric == symmetric
    np.testing.assert_array_equal(q.dequantize(), fake_quant(x, qp))
    assert q.size_bits == 4 * 21 + 32 + (0 if symmetric else 8)


def test_native_int4():
    q = quantize_weight(weight((4, 5)), bits=4, channel_axes=(1,))
    native = q.native_int4()
    assert native.values.dtype == jnp.int4 and not native.packed and native.shape == (4, 5)
    assert native.codes().dtype == jnp.int8
    np.testing.assert_array_equal(native.codes(), q.codes())
    np.testing.assert_array_equal(native.dequantize(), q.dequantize())
    assert native.size_bits == q.size_bits
    with pytest.raises(ValueError, match="8 bits"):
        quantize_weight(weight((4, 5)), bits=8, channel_axes=(1,)).native_int4()


def test_size_counts_bits_without_padding():
    packed = quantize_weight(weight((4, 5)), bits=4, channel_axes=(1,))
    assert packed.size_bits == 4 * 20 + 32 * 5
    assert quantize_weight(weight((4, 5)), bits=4, channel_axes=(1,), pack=False).size_bits == 240
    assert quantize_weight(weight((4, 5)), bits=8, channel_axes=()).size_bits == 8 * 20 + 32


@pytest.mark.parametrize("perm", [(0, 1, 2), (1, 0, 2), (2, 0, 1), (-1, 1, 0)])
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("axes", [(2,), (0, 2)])
def test_transpose(perm, bits, axes):
    q = quantize_weight(weight((2, 4, 5)), bits=bits, channel_axes=axes)
    moved = q.transpose(perm)
    assert moved.packed == q.packed
    np.testing.assert_array_equal(moved.dequantize(), jnp.transpose(q.dequantize(), perm))
    native = jax.jit(lambda q: q.transpose(perm).codes())(q)
    np.testing.assert_array_equal(native, moved.codes())


def test_transpose_with_zero_points_and_scalar_scale():
    x = weight((3, 5))
    for axis in (None, 1):
        ends = x.min(axis=0, keepdims=True), x.max(axis=0, keepdims=True)
        ends = ends if axis else (x.min(), x.max())
        qp = from_range(*ends, bits=4, symmetric=False)
        q = QTensor.from_codes(quantize(x, qp), qp, pack=True)
        np.testing.assert_array_equal(q.transpose((1, 0)).dequantize(), q.dequantize().T)


def test_transpose_refuses_what_it_cannot_do():
    q = quantize_weight(weight((3, 5)), bits=8, channel_axes=(1,))
    with pytest.raises(ValueError, match="expected each axis once"):
        q.transpose((0, 0))
    flat = QTensor(q.values, q.scale[0], None, 8)
    with pytest.raises(ValueError, match="as many axes"):
        flat.transpose((1, 0))


def test_tree_operations_need_no_arrays():
    q = quantize_weight(weight((3, 5)), bits=4, channel_axes=(1,))
    shapes = jax.eval_shape(lambda q: q, q)
    assert shapes.shape == (3, 5) and shapes.size_bits == q.size_bits
    assert shapes.scale.shape == (1, 5)
    leaves, structure = jax.tree.flatten(q)
    assert len(leaves) == 2
    assert jax.tree.unflatten(structure, [None, None]).bits == 4
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(q)]
    assert paths == [".values", ".scale"]


def test_rounding_and_storage_options():
    w = weight((4, 6))
    down = quantize_weight(w, bits=4, channel_axes=(1,), rounding="floor")
    up = quantize_weight(w, bits=4, channel_axes=(1,), rounding="ceil")
    assert int((up.codes() - down.codes()).max()) == 1
    key = jax.random.key(0)
    random = quantize_weight(w, bits=4, channel_axes=(1,), rounding="stochastic", key=key)
    assert bool(((random.codes() == up.codes()) | (random.codes() == down.codes())).all())
    with pytest.raises(ValueError, match="only int4 is packed"):
        quantize_weight(w, bits=8, channel_axes=(1,), pack=True)


def test_all_zero_channels_and_bfloat16():
    w = weight((4, 3)).at[:, 1].set(0).astype(jnp.bfloat16)
    q = quantize_weight(w, bits=8, channel_axes=(1,))
    assert q.scale.dtype == jnp.float32 and float(q.scale[0, 1]) == 1.0
    assert not q.dequantize()[:, 1].any()
