"""`dot_int32` against numpy int64, for every order of dims; and what it lowers to."""

import re
import string

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from held_codes import WEIGHTS, WIDTHS, clipped, hold, operand, random_codes
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from jax import lax

from jaxrmils.lowering.integer_dot import (
    check_accumulator,
    dot_int32,
    operand_sum,
    output_scale,
    sum_to_output,
)

MATMUL = (((1,), (0,)), ((), ()))
# Few shapes, each met in many orders of its dims: sizes of batch, contracting and free dims.
FAMILIES = [
    ((), (5,), (3,), (2,)),
    ((), (5,), (1,), (4,)),
    ((), (2, 3), (), (4,)),
    ((), (4,), (1, 1), (2,)),
    ((), (5,), (3,), (1,)),
    ((), (2, 2), (3, 2), ()),
    ((), (), (2,), (3,)),
    ((2,), (3,), (4,), ()),
    ((2, 3), (4,), (1,), (2,)),
    ((3,), (2, 2), (2, 1), (3,)),
]


def reference(lhs, rhs, dimension_numbers, lhs_zero_point=0, rhs_zero_point=0):
    """The dot as an einsum of int64: one letter per dim."""
    (lhs_contracting, rhs_contracting), (lhs_batch, rhs_batch) = dimension_numbers
    letters = iter(string.ascii_letters)
    left = [next(letters) for _ in range(lhs.ndim)]
    right = [next(letters) for _ in range(rhs.ndim)]
    for i, j in zip((*lhs_contracting, *lhs_batch), (*rhs_contracting, *rhs_batch), strict=True):
        right[j] = left[i]
    out = [left[i] for i in lhs_batch]
    out += [left[i] for i in range(lhs.ndim) if i not in (*lhs_contracting, *lhs_batch)]
    out += [right[j] for j in range(rhs.ndim) if j not in (*rhs_contracting, *rhs_batch)]
    spec = f"{''.join(left)},{''.join(right)}->{''.join(out)}"
    left_values = np.asarray(lhs, np.int64) - lhs_zero_point
    return np.einsum(spec, left_values, np.asarray(rhs, np.int64) - rhs_zero_point)


def codes(seed, shape, bits=8, extreme=False):
    return random_codes(np.random.default_rng(seed), shape, bits, extreme)


def assert_exact(actual, expected):
    assert actual.dtype == jnp.int32
    np.testing.assert_array_equal(np.asarray(actual, np.int64), expected)


@st.composite
def dots(draw, family=None):
    """Operand shapes with their dims in any order, and the matching dimension numbers."""
    family = family or draw(st.sampled_from(FAMILIES))
    batch, contracting, lhs_free, rhs_free = family
    shapes, dims = [], []
    for free in (lhs_free, rhs_free):
        sizes = (*batch, *contracting, *free)
        place = draw(st.permutations(range(len(sizes))))
        shape = [0] * len(sizes)
        for size, position in zip(sizes, place, strict=True):
            shape[position] = size
        shapes.append(tuple(shape))
        dims.append((tuple(place[len(batch) :][: len(contracting)]), tuple(place[: len(batch)])))
    (lhs_contracting, lhs_batch), (rhs_contracting, rhs_batch) = dims
    return *shapes, ((lhs_contracting, rhs_contracting), (lhs_batch, rhs_batch))


zero_points = st.sampled_from([-128, None, "rows", -1, 0, 127]) | st.integers(-128, 127)


def zero_of(kind, seed, shape, contracting, bits):
    """None, a scalar, or random zero points for the rows of an operand of this shape."""
    if kind != "rows":
        return None if kind is None else np.int32(clipped(kind, bits))
    rows = [1 if d in contracting else n for d, n in enumerate(shape)]
    return np.random.default_rng(seed).integers(-128, 128, rows, np.int32)


COMPUTES_INT4 = jax.__version_info__ >= (0, 12)
"""Whether XLA:CPU can be made to compute int4 x int4."""


def options_of(backend, bits):
    """What XLA:CPU must be told to compute a backend's formulation for operands of these widths.

    One of its passes widens both operands of an int4 x int4 dot, and its verifier refuses what
    comes of it. Without the pass, the dot is computed as it is.
    """
    is_int4 = backend == "tpu" and bits == (4, 4)
    return {"xla_disable_hlo_passes": "operand_upcaster"} if is_int4 else None


@pytest.mark.parametrize("family", FAMILIES, ids=str)
@settings(max_examples=8, deadline=None)
@given(
    st.data(),
    zero_points,
    zero_points,
    WIDTHS,
    WEIGHTS,
    st.booleans(),
    st.booleans(),
    st.integers(0, 2**32 - 1),
    st.sampled_from(["cpu", "cuda", "tpu"]),
)
def test_any_order_of_dims(
    family,
    data,
    lhs_zero_point,
    rhs_zero_point,
    width,
    weight,
    weight_first,
    precomputed,
    seed,
    backend,
):
    *shapes, dimension_numbers = data.draw(dots(family))
    kinds = (lhs_zero_point, rhs_zero_point)
    held = [(width, "int8"), weight]
    if weight_first:
        held.reverse()
    # Only of 8 bits do rows have zero points of their own.
    held = [(8, "int8") if kind == "rows" else h for kind, h in zip(kinds, held, strict=True)]
    bits = tuple(each for each, _ in held)
    assume(COMPUTES_INT4 or options_of(backend, bits) is None)
    arrays = [codes(seed + i, shapes[i], bits[i], extreme=seed >> i & 1 == 0) for i in range(2)]
    zeros = [
        zero_of(kinds[i], seed + i, shapes[i], dimension_numbers[0][i], bits[i]) for i in range(2)
    ]
    points = {
        f"{side}_zero_point": None if zero is None else jnp.asarray(zero)
        for side, zero in zip(("lhs", "rhs"), zeros, strict=True)
    }
    if precomputed:
        for side, array in zip(("lhs", "rhs"), arrays, strict=True):
            points[f"{side}_sum"] = operand_sum(array, dimension_numbers, side)

    def run(lhs, rhs, points):
        options = {"lhs_bits": bits[0], "rhs_bits": bits[1], "backend": backend}
        return dot_int32(operand(lhs), operand(rhs), dimension_numbers, **points, **options)

    tensors = [hold(array, *h) for array, h in zip(arrays, held, strict=True)]
    out = jax.jit(run, compiler_options=options_of(backend, bits))(*tensors, points)
    expected = reference(
        *arrays, dimension_numbers, *(0 if zero is None else zero for zero in zeros)
    )
    assert_exact(out, expected)


@settings(max_examples=30, deadline=None)
@given(dots(), st.booleans(), st.booleans())
def test_scales_follow_their_channels(dot, lhs_scalar, rhs_scalar):
    lhs_shape, rhs_shape, dimension_numbers = dot
    (lhs_contracting, rhs_contracting), _ = dimension_numbers
    lhs, rhs = codes(1, lhs_shape), codes(2, rhs_shape)
    scales, factors = [], []
    for values, contracting, scalar in (
        (lhs, lhs_contracting, lhs_scalar),
        (rhs, rhs_contracting, rhs_scalar),
    ):
        shape = [1 if d in contracting else n for d, n in enumerate(values.shape)]
        # Powers of two, so that products of scales are exact.
        scale = np.exp2(np.arange(np.prod(shape, dtype=int)) % 7).astype(np.float32)
        scales.append(np.float32(2.0) if scalar else scale.reshape(shape))
        factors.append(np.asarray(values, np.int64) * scales[-1].astype(np.int64))
    scale = output_scale(*map(jnp.asarray, scales), dimension_numbers, lhs.ndim, rhs.ndim)
    assert scale.dtype == jnp.float32
    out = np.asarray(dot_int32(lhs, rhs, dimension_numbers), np.float64) * np.asarray(scale)
    np.testing.assert_array_equal(out, reference(*factors, dimension_numbers))


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize(
    ("k", "lhs_zero_point", "rhs_zero_point"),
    [(131_071, None, None), (65_536, 127, None), (65_536, None, -128), (33_025, 127, 127)],
)
def test_largest_sums(rows, k, lhs_zero_point, rhs_zero_point):
    lhs, rhs = jnp.full((rows, k), -128, jnp.int8), jnp.full((k, 2), -128, jnp.int8)
    out = dot_int32(
        lhs,
        rhs,
        MATMUL,
        lhs_zero_point=None if lhs_zero_point is None else jnp.int32(lhs_zero_point),
        rhs_zero_point=None if rhs_zero_point is None else jnp.int32(rhs_zero_point),
    )
    assert_exact(out, reference(lhs, rhs, MATMUL, lhs_zero_point or 0, rhs_zero_point or 0))


def test_overflow_is_refused_before_running():
    def trace(k, zero_point=None, **bits):
        shapes = [jax.ShapeDtypeStruct(shape, jnp.int8) for shape in ((2, k), (k, 2))]
        points = {"lhs_zero_point": zero_point, "rhs_zero_point": zero_point}
        jax.eval_shape(lambda lhs, rhs: dot_int32(lhs, rhs, MATMUL, **points, **bits), *shapes)

    trace(131_071)
    with pytest.raises(ValueError, match=r"K = 131072 .*128 \* 128.*limit is K = 131071"):
        trace(131_072)
    with pytest.raises(ValueError, match=r"K = 33026 .*255 \* 255.*limit is K = 33025"):
        trace(33_026, jnp.int32(3))
    trace(1_000_000, jnp.int32(3), lhs_bits=4, rhs_bits=4)
    with pytest.raises(ValueError, match="limit is K = 2147483647"):
        check_accumulator(2**31, 1, 1)


def test_wrong_arguments_are_named():
    lhs, rhs = codes(0, (2, 3)), codes(1, (3, 4))
    with pytest.raises(TypeError, match="int8 or int4, found float32"):
        dot_int32(lhs.astype(jnp.float32), rhs, MATMUL)
    with pytest.raises(ValueError, match=r"rhs zero point of shape \(4,\) must be a"):
        dot_int32(lhs, rhs, MATMUL, rhs_zero_point=jnp.zeros(4, jnp.int32))
    with pytest.raises(TypeError, match="lhs zero point must be an integer"):
        dot_int32(lhs, rhs, MATMUL, lhs_zero_point=jnp.float32(1))
    with pytest.raises(ValueError, match=r"rhs values of shape \(4, 1\) must have 1 dims"):
        sum_to_output(jnp.zeros((4, 1)), MATMUL, 2, 2, "rhs")
    with pytest.raises(ValueError, match="size 1 on the contracting dims"):
        output_scale(jnp.ones(()), jnp.ones((3, 4)), MATMUL, 2, 2)


@pytest.mark.parametrize("rows", [1, 3])
def test_jit_and_vmap(rows):
    lhs, rhs = codes(3, (4, rows, 6)), codes(4, (6, 5))
    points = {"lhs_zero_point": jnp.int32(-128), "rhs_zero_point": jnp.int32(9)}
    dot = jax.jit(lambda lhs, rhs: dot_int32(lhs, rhs, MATMUL, **points))
    expected = reference(lhs, rhs, (((2,), (0,)), ((), ())), -128, 9)
    assert_exact(dot(lhs[0], rhs), expected[0])
    assert_exact(jax.vmap(dot, in_axes=(0, None))(lhs, rhs), expected)
    many = jnp.stack([rhs, rhs[::-1]])
    assert_exact(
        jax.vmap(dot, in_axes=(None, 0))(lhs[1], many)[1],
        reference(lhs[1], many[1], MATMUL, -128, 9),
    )


@pytest.mark.parametrize("backend", ["cpu", "cuda", "tpu"])
def test_int4_arrays_are_exact(backend):
    lhs, rhs = codes(5, (3, 8), bits=4), codes(6, (8, 2), bits=4)
    int4 = jnp.int4
    # For TPU's int4 x int4 dot, see the next test.
    pairs = [(lhs.astype(int4), rhs), (lhs, rhs.astype(int4))]
    if backend != "tpu":
        pairs.append((lhs.astype(int4), rhs.astype(int4)))
    for left, right in pairs:
        out = dot_int32(left, right, MATMUL, lhs_zero_point=jnp.int32(-8), backend=backend)
        assert_exact(out, reference(lhs, rhs, MATMUL, -8))
    # A weight in front of activations whose rows (columns here) have their own zero points.
    wide, zero = codes(8, (8, 2)), jnp.array([[3, -128]])
    out = dot_int32(lhs.astype(int4), wide, MATMUL, rhs_zero_point=zero, backend=backend)
    assert_exact(out, reference(lhs, wide, MATMUL, 0, np.asarray(zero)))


@pytest.mark.skipif(not COMPUTES_INT4, reason="XLA:CPU computes no int4 x int4")
@pytest.mark.parametrize("family", FAMILIES, ids=str)
def test_int4_products_of_tpu_are_exact(family):
    """The formulation of w4a4 and a4 on TPU, computed on CPU."""
    batch, contracting, lhs_free, rhs_free = family
    depth = len(batch) + len(contracting)
    batched, contracted = tuple(range(depth))[: len(batch)], tuple(range(depth))[len(batch) :]
    numbers = ((contracted, contracted), (batched, batched))
    shapes = (*batch, *contracting, *lhs_free), (*batch, *contracting, *rhs_free)

    @jax.jit
    def run(lhs, rhs, points):
        options = {"lhs_bits": 4, "rhs_bits": 4, "backend": "tpu"}
        return dot_int32(operand(lhs), operand(rhs), numbers, **points, **options)

    for seed, extreme in enumerate((False, True)):
        lhs, rhs = (codes(seed, shape, 4, extreme) for shape in shapes)
        # Activations come as int8, weights as int4.
        arguments = hold(lhs, 4), hold(rhs, 4, "int4")
        for zeros in ((None, None), (7, None), (-8, 7)):
            points = dict(zip(("lhs_zero_point", "rhs_zero_point"), zeros, strict=True))
            points = {name: jnp.int32(z) for name, z in points.items() if z is not None}
            lowered = run.lower(*arguments, points)
            assert re.search(r"dot_general.*xi4>, tensor<.*xi4>\) ->", lowered.as_text())
            out = lowered.compile(options_of("tpu", (4, 4)))(*arguments, points)
            assert_exact(out, reference(lhs, rhs, numbers, *(z or 0 for z in zeros)))


@pytest.mark.parametrize("backend", ["cpu", "cuda", "tpu"])
@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize(
    ("lhs_dtype", "rhs_dtype"),
    [("int8", "int8"), ("int8", "int4"), ("int4", "int4")],
)
def test_lowered_operands_stay_narrow(backend, rows, lhs_dtype, rhs_dtype):
    def dot(lhs, rhs, zero_point):
        return dot_int32(lhs, rhs, MATMUL, lhs_zero_point=zero_point, backend=backend)

    arguments = (
        jax.ShapeDtypeStruct((rows, 64), lhs_dtype),
        jax.ShapeDtypeStruct((64, 32), rhs_dtype),
        jax.ShapeDtypeStruct((), jnp.int32),
    )
    text = jax.jit(dot).trace(*arguments).lower(lowering_platforms=(backend,)).as_text()
    (types,) = re.findall(r"stablehlo\.dot_general.*: \((.*)\) ->", text)
    element = "i4" if backend == "tpu" and lhs_dtype == "int4" else "i8"
    # But on TPU the single row is the first of two, along a new axis.
    shape = "2x1x64" if backend != "tpu" and rows == 1 else f"{rows}x64"
    assert types == f"tensor<{shape}x{element}>, tensor<64x32x{element}>"


def test_matches_dot_general_layout():
    lhs, rhs = codes(7, (2, 3, 4, 5)), codes(8, (5, 6, 2))
    dimension_numbers = (((3,), (0,)), ((0,), (2,)))
    plain = lax.dot_general(lhs, rhs, dimension_numbers, preferred_element_type=jnp.int32)
    assert_exact(dot_int32(lhs, rhs, dimension_numbers), np.asarray(plain))


@pytest.mark.parametrize(("k", "kind"), [(258, "f32"), (259, "s32")])
@pytest.mark.parametrize("sign", [1, -1])
def test_short_batched_dots_on_cpu_are_float32_up_to_the_last_exact_sum(k, kind, sign):
    lhs = jnp.full((2, 3, k), 127, jnp.int8)
    rhs = jnp.full((2, k, 4), 127 if sign > 0 else -128, jnp.int8)
    numbers = (((2,), (1,)), ((0,), (0,)))
    zeros = (np.int32(-128), np.int32(-128 if sign > 0 else 127))

    def dot(lhs, rhs):
        points = {"lhs_zero_point": zeros[0], "rhs_zero_point": zeros[1]}
        return dot_int32(lhs, rhs, numbers, **points)

    assert_exact(dot(lhs, rhs), reference(lhs, rhs, numbers, *zeros))
    (product,) = (
        e for e in jax.make_jaxpr(dot)(lhs, rhs).eqns if "dot_general" in str(e.primitive)
    )
    assert product.outvars[0].aval.dtype == {"f32": jnp.float32, "s32": jnp.int32}[kind]


@pytest.mark.parametrize(
    ("zero", "error"),
    [
        (jnp.float32(1.5), TypeError),
        (jnp.zeros(3, jnp.int32), ValueError),
        (jnp.zeros((2, 3, 4), jnp.int32), ValueError),
    ],
)
@pytest.mark.parametrize("backend", ["cpu", "tpu"])
def test_zero_points_of_short_dots_are_checked(zero, error, backend):
    lhs, rhs = jnp.ones((2, 3, 4), jnp.int8), jnp.ones((2, 4, 5), jnp.int8)
    numbers = (((2,), (1,)), ((0,), (0,)))
    with pytest.raises(error, match="zero point"):
        dot_int32(lhs, rhs, numbers, lhs_zero_point=zero, backend=backend)
    number = dot_int32(lhs, rhs, numbers, lhs_zero_point=3, backend=backend)
    assert_exact(number, reference(lhs, rhs, numbers, 3, 0))
