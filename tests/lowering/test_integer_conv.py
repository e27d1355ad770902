"""`conv_int32` against a convolution written out in numpy int64."""

import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from held_codes import WEIGHTS, WIDTHS, clipped, code_range, hold, operand, random_codes
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax

from jaxrmils.lowering.integer_conv import conv_int32, conv_output_scale, kernel_sum

# (spatial dims, channels, kernel inputs, features, feature groups, batch groups)
DENSE, GROUPED, BATCH_GROUPED = (4, 4, 3, 1, 1), (4, 2, 6, 2, 1), (3, 3, 4, 1, 2)
DEPTHWISE, MULTIPLIED, ONE_CHANNEL = (3, 1, 3, 3, 1), (3, 1, 6, 3, 1), (1, 1, 4, 1, 1)
# Few channels and more than 16 features: the stems of image networks.
STEM, GREY = (3, 3, 17, 1, 1), (1, 1, 18, 1, 1)
KINDS = [DENSE, GROUPED, BATCH_GROUPED, DEPTHWISE, MULTIPLIED, ONE_CHANNEL, STEM, GREY]
LAYOUTS = {
    1: [("NHC", "HIO", "NHC"), ("NCH", "OIH", "NCH"), ("CHN", "IOH", "NCH")],
    2: [("NHWC", "HWIO", "NHWC"), ("NCHW", "OIHW", "NCHW"), ("HWNC", "OIWH", "CWHN")],
    3: [("NDHWC", "DHWIO", "NDHWC"), ("NCDHW", "OIDHW", "NHCWD")],
}
SIZES, TAPS = (6, 5, 4), (3, 2, 1)


def arrange(array, layout, first, second, spatial):
    """An array in `layout`, with its dims in the order (first, second, spatial...)."""
    return array.transpose([layout.index(name) for name in (first, second, *spatial)])


def reference(lhs, rhs, layouts, zero_point, geometry, feature_groups, batch_groups):
    """out[n, o, s] = sum over taps and inputs of the written-out input times the weights."""
    lhs_layout, rhs_layout, out_layout = layouts
    # Strides, paddings and dilations are in the order of the kernel's spatial dims.
    spatial = [name for name in rhs_layout if name not in "OI"]
    lhs = arrange(np.asarray(lhs, np.int64) - zero_point, lhs_layout, "N", "C", spatial)
    rhs = arrange(np.asarray(rhs, np.int64), rhs_layout, "O", "I", spatial)
    strides, padding, lhs_dilation, rhs_dilation = geometry
    for axis, ((low, high), dilation) in enumerate(zip(padding, lhs_dilation, strict=True), 2):
        size = (lhs.shape[axis] - 1) * dilation + 1
        wide = np.zeros((*lhs.shape[:axis], size, *lhs.shape[axis + 1 :]), np.int64)
        wide[(slice(None),) * axis + (slice(None, None, dilation),)] = lhs
        widths = [(0, 0)] * lhs.ndim
        widths[axis] = (max(low, 0), max(high, 0))
        wide = np.pad(wide, widths)
        lhs = np.take(wide, range(max(-low, 0), wide.shape[axis] - max(-high, 0)), axis)
    taps = rhs.shape[2:]
    sizes = [
        (n - ((t - 1) * d + 1)) // s + 1
        for n, t, d, s in zip(lhs.shape[2:], taps, rhs_dilation, strides, strict=True)
    ]
    features, inputs = rhs.shape[:2]
    batch = lhs.shape[0] // batch_groups
    out = np.zeros((batch, features, *sizes), np.int64)
    for o in range(features):
        channel = (o * feature_groups // features) * inputs
        first = (o * batch_groups // features) * batch
        part = lhs[first : first + batch, channel : channel + inputs]
        for place in itertools.product(*map(range, sizes)):
            for tap in itertools.product(*map(range, taps)):
                at = tuple(
                    p * s + t * d
                    for p, s, t, d in zip(place, strides, tap, rhs_dilation, strict=True)
                )
                value = part[(slice(None), slice(None), *at)] @ rhs[(o, slice(None), *tap)]
                out[(slice(None), o, *place)] += value
    names = ["N", "C", *spatial]
    return out.transpose([names.index(name) for name in out_layout])


def make_operands(seed, dims, kind, layouts, batch=2, bits=8, lhs_bits=None):
    channels, inputs, features, _, batch_groups = kind
    rng = np.random.default_rng(seed)
    spatial = sorted(set(layouts[0]) - {"N", "C"})
    sizes = dict(zip(spatial, SIZES[:dims], strict=True))
    taps = dict(zip(spatial, TAPS[:dims], strict=True))
    lhs_shape = [{"N": batch * batch_groups, "C": channels, **sizes}[name] for name in layouts[0]]
    rhs_shape = [{"O": features, "I": inputs, **taps}[name] for name in layouts[1]]
    lhs = random_codes(rng, lhs_shape, lhs_bits or bits, extreme=seed % 5 == 0)
    if seed % 3 == 0:
        return lhs, jnp.full(rhs_shape, code_range(bits)[0], jnp.int8)
    return lhs, random_codes(rng, rhs_shape, bits, extreme=seed % 3 == 1)


def dimension_numbers(lhs, rhs, layouts):
    return lax.conv_dimension_numbers(lhs.shape, rhs.shape, layouts)


def run(lhs, rhs, layouts, geometry, kind, **options):
    strides, padding, lhs_dilation, rhs_dilation = geometry
    return conv_int32(
        lhs,
        rhs,
        window_strides=strides,
        padding=padding,
        lhs_dilation=lhs_dilation,
        rhs_dilation=rhs_dilation,
        dimension_numbers=dimension_numbers(lhs, rhs, layouts),
        feature_group_count=kind[3],
        batch_group_count=kind[4],
        **options,
    )


def assert_exact(actual, expected, backend="cpu"):
    assert actual.dtype == (jnp.float32 if backend == "cuda" else jnp.int32)
    np.testing.assert_array_equal(np.asarray(actual, np.int64), expected)


@st.composite
def convolutions(draw):
    dims = draw(st.integers(1, 3))
    layouts = draw(st.sampled_from(LAYOUTS[dims]))
    lhs_dilation = tuple(draw(st.sampled_from([1, 1, 2])) for _ in range(dims))
    rhs_dilation = tuple(draw(st.sampled_from([1, 1, 2])) for _ in range(dims))
    strides = tuple(draw(st.sampled_from([1, 2, 3])) for _ in range(dims))
    spatial = [name for name in layouts[1] if name not in "OI"]
    order = [sorted(spatial).index(name) for name in spatial]
    sizes = [(SIZES[i] - 1) * d + 1 for i, d in zip(order, lhs_dilation, strict=True)]
    spans = [(TAPS[i] - 1) * d + 1 for i, d in zip(order, rhs_dilation, strict=True)]
    style = draw(st.sampled_from(["SAME", "SAME_LOWER", "VALID", "pairs"]))
    if style == "pairs":
        pair = st.tuples(st.integers(-1, 2), st.integers(-1, 2))
        padding = tuple(draw(pair) for _ in range(dims))
    else:
        padding = tuple(lax.padtype_to_pads(sizes, spans, strides, style))
    # An input smaller than the kernel has no output: met in a test of its own.
    padding = tuple(
        (max(low, 0), max(high, 0) + span) if size + low + high < span else (low, high)
        for (low, high), size, span in zip(padding, sizes, spans, strict=True)
    )
    return dims, layouts, (strides, padding, lhs_dilation, rhs_dilation)


@pytest.mark.parametrize("kind", KINDS, ids=str)
@settings(max_examples=15, deadline=None)
@given(
    convolutions(),
    st.none() | st.sampled_from([-128, 0, 127]) | st.integers(-128, 127),
    WIDTHS,
    WEIGHTS,
    st.booleans(),
    st.integers(0, 2**32 - 1),
    st.sampled_from(["cpu", "cpu", "cuda", "tpu"]),
)
def test_any_convolution(kind, convolution, zero_point, width, weight, precomputed, seed, backend):
    dims, layouts, geometry = convolution
    lhs, rhs = make_operands(seed, dims, kind, layouts, bits=weight[0], lhs_bits=width)
    points = {}
    if zero_point is not None:
        zero_point = clipped(zero_point, width)
        points["lhs_zero_point"] = jnp.int32(zero_point)
        if precomputed:
            points["kernel_sum"] = kernel_sum(rhs, dimension_numbers(lhs, rhs, layouts))

    @jax.jit
    def convolve(lhs, rhs, points):
        options = {"lhs_bits": width, "rhs_bits": weight[0], "backend": backend}
        return run(operand(lhs), operand(rhs), layouts, geometry, kind, **points, **options)

    out = convolve(hold(lhs, width), hold(rhs, *weight), points)
    expected = reference(lhs, rhs, layouts, zero_point or 0, geometry, *kind[3:])
    assert_exact(out, expected, backend)


GEOMETRY = ((2, 1), ((0, 1), (1, 0)), (1, 2), (1, 1))


@pytest.mark.parametrize("kind", [DENSE, MULTIPLIED])
def test_jit_and_vmap(kind):
    layouts = LAYOUTS[2][0]
    lhs, rhs = make_operands(1, 2, kind, layouts)
    more = jnp.stack([lhs, lhs[::-1], ~lhs])

    @jax.jit
    def convolve(lhs, zero_point):
        return run(lhs, rhs, layouts, GEOMETRY, kind, lhs_zero_point=zero_point)

    out = jax.vmap(convolve, in_axes=(0, None))(more, jnp.int32(-7))
    for i, one in enumerate(more):
        expected = reference(one, rhs, layouts, -7, GEOMETRY, *kind[3:])
        assert_exact(out[i], expected)
        assert_exact(convolve(one, jnp.int32(-7)), expected)


@pytest.mark.parametrize("kind", [DENSE, DEPTHWISE])
@pytest.mark.parametrize("padding", [((0, 0), (0, 0)), ((-2, -2), (0, 0))])
def test_kernel_larger_than_input_gives_an_empty_output(kind, padding):
    layouts = LAYOUTS[2][0]
    lhs, rhs = make_operands(2, 2, kind, layouts)
    geometry = ((1, 1), padding, (1, 1), (3, 1))
    out = run(lhs, rhs, layouts, geometry, kind, lhs_zero_point=jnp.int32(3))
    assert out.shape == (2, 0, 4, kind[2]) and out.dtype == jnp.int32


@pytest.mark.parametrize("backend", ["cpu", "cuda", "tpu"])
def test_int4_weights(backend):
    layouts = LAYOUTS[2][0]
    lhs, rhs = make_operands(4, 2, DENSE, layouts, bits=4)
    options = {"lhs_zero_point": jnp.int32(-8), "backend": backend}
    out = run(lhs, rhs.astype(jnp.int4), layouts, GEOMETRY, DENSE, **options)
    assert_exact(out, reference(lhs, rhs, layouts, -8, GEOMETRY, 1, 1), backend)


def test_scale_follows_the_output_features():
    for layouts in LAYOUTS[2]:
        lhs, rhs = make_operands(5, 2, DENSE, layouts)
        layout = dimension_numbers(lhs, rhs, layouts)
        shape = [3 if name == "O" else 1 for name in layouts[1]]
        weight_scale = jnp.asarray([1.0, 2.0, 4.0]).reshape(shape)
        scale = conv_output_scale(jnp.float32(0.5), weight_scale, layout)
        scaled = run(lhs, rhs, layouts, GEOMETRY, DENSE).astype(jnp.float32) * scale
        weights = np.asarray(rhs, np.int64) * np.asarray(weight_scale, np.int64)
        expected = reference(lhs, weights, layouts, 0, GEOMETRY, 1, 1)
        np.testing.assert_array_equal(np.asarray(scaled, np.float64) * 2, expected)
        shared = conv_output_scale(jnp.full((1, 1, 1, 1), 0.5), jnp.float32(4), layout)
        assert shared.shape == () and shared == 2.0


def test_wrong_arguments_are_named():
    layouts = LAYOUTS[2][0]
    lhs, rhs = make_operands(6, 2, DENSE, layouts)
    layout = dimension_numbers(lhs, rhs, layouts)
    with pytest.raises(ValueError, match="input scale must be one value"):
        conv_output_scale(jnp.ones((1, 1, 1, 4)), jnp.float32(1), layout)
    with pytest.raises(ValueError, match="all but the output feature dim 3"):
        conv_output_scale(jnp.float32(1), jnp.ones((1, 1, 4, 3)), layout)
    with pytest.raises(ValueError, match=r"kernel_sum must have shape \(3,\), found \(4,\)"):
        sums = {"lhs_zero_point": jnp.int32(1), "kernel_sum": jnp.zeros(4, jnp.int32)}
        run(lhs, rhs, layouts, GEOMETRY, DENSE, **sums)
    with pytest.raises(TypeError, match="int8 or int4, found float32"):
        run(lhs, rhs.astype(jnp.float32), layouts, GEOMETRY, DENSE)


def test_overflow_is_refused_before_running():
    layouts = LAYOUTS[2][0]
    shapes = ((1, 5, 5, 7_400), (3, 3, 7_400, 1))
    lhs, rhs = (jax.ShapeDtypeStruct(shape, jnp.int8) for shape in shapes)
    geometry = ((1, 1), ((0, 0), (0, 0)), (1, 1), (1, 1))
    jax.eval_shape(lambda lhs, rhs: run(lhs, rhs, layouts, geometry, DENSE), lhs, rhs)
    with pytest.raises(ValueError, match=r"K = 66600 .*255 \* 128.*limit is K = 65793"):
        affine = {"lhs_zero_point": jnp.int32(0)}
        jax.eval_shape(lambda lhs, rhs: run(lhs, rhs, layouts, geometry, DENSE, **affine), lhs, rhs)


@pytest.mark.parametrize("backend", ["cpu", "cuda", "tpu"])
@pytest.mark.parametrize("kind", [DENSE, DEPTHWISE])
@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_lowered_operands_stay_narrow(backend, kind, dtype):
    layouts = LAYOUTS[2][0]

    def convolve(lhs, rhs, zero_point):
        options = {"lhs_zero_point": zero_point, "backend": backend}
        return run(lhs, rhs, layouts, GEOMETRY, kind, **options)

    lhs, rhs = make_operands(7, 2, kind, layouts)
    arguments = (
        jax.ShapeDtypeStruct(lhs.shape, dtype),
        jax.ShapeDtypeStruct(rhs.shape, dtype),
        jax.ShapeDtypeStruct((), jnp.int32),
    )
    text = jax.jit(convolve).trace(*arguments).lower(lowering_platforms=(backend,)).as_text()
    found = re.findall(r"stablehlo\.convolution.*: \(tensor<.*x(i\d+)>, tensor<.*x(i\d+)>\)", text)
    element = "i4" if backend == "tpu" and dtype == "int4" else "i8"
    depthwise_on_cpu = backend == "cpu" and kind is DEPTHWISE
    assert found == ([] if depthwise_on_cpu else [(element, element)])


@pytest.mark.parametrize("zero_point", [None, -128, 5, 127])
@pytest.mark.parametrize("lowest", [-128, 100])
def test_large_sums_in_float32_are_within_the_bound(zero_point, lowest):
    """Of the form that CUDA compiles, whose sums pass 2^24 here."""
    layouts = LAYOUTS[2][0]
    rng = np.random.default_rng(0)
    lhs = jnp.asarray(rng.integers(lowest, 128, (2, 3, 3, 4_000)), jnp.int8)
    rhs = jnp.asarray(rng.integers(lowest, 128, (3, 3, 4_000, 3)), jnp.int8)
    geometry = ((1, 1), ((0, 0), (0, 0)), (1, 1), (1, 1))
    numbers = dimension_numbers(lhs, rhs, layouts)
    found = conv_int32(
        lhs,
        rhs,
        window_strides=geometry[0],
        padding=geometry[1],
        lhs_dilation=geometry[2],
        rhs_dilation=geometry[3],
        dimension_numbers=numbers,
        lhs_zero_point=None if zero_point is None else jnp.int32(zero_point),
        backend="cuda",
    )
    assert found.dtype == jnp.float32
    wide, narrow = np.asarray(lhs, np.int64), np.asarray(rhs, np.int64)
    sums = np.einsum("nhwc,hwcf->nf", wide, narrow).reshape(found.shape)
    correction = (zero_point or 0) * narrow.sum((0, 1, 2))
    exact = sums - correction
    bound = 2.0**-24 * (abs(sums) + abs(correction) + abs(exact))
    assert (abs(np.asarray(found, np.float64) - exact) <= bound).all()
    if lowest > 0:
        assert abs(sums).min() > 2**24 and (np.asarray(found, np.float64) != exact).any()


def test_on_cuda_the_convolution_is_converted_at_once():
    """The form that CUDA compiles; exact here, where sums stay below 2^24."""
    rng = np.random.default_rng(0)
    lhs = jnp.asarray(rng.integers(-128, 128, (2, 9, 9, 16)), jnp.int8)
    rhs = jnp.asarray(rng.integers(-127, 128, (3, 3, 16, 8)), jnp.int8)
    numbers = lax.conv_dimension_numbers(lhs.shape, rhs.shape, ("NHWC", "HWIO", "NHWC"))

    def conv(lhs, rhs, zero_point, backend):
        return conv_int32(
            lhs,
            rhs,
            window_strides=(1, 1),
            padding=((1, 1), (1, 1)),
            lhs_dilation=(1, 1),
            rhs_dilation=(1, 1),
            dimension_numbers=numbers,
            lhs_zero_point=zero_point,
            backend=backend,
        )

    zero_point = jnp.int32(-37)
    found = conv(lhs, rhs, zero_point, "cuda")
    assert found.dtype == jnp.float32
    np.testing.assert_array_equal(found, conv(lhs, rhs, zero_point, "cpu").astype(jnp.float32))
    jitted = jax.jit(conv, static_argnums=3)
    lowered = jitted.trace(lhs, rhs, zero_point, "cuda").lower(lowering_platforms=("cuda",))
    lines = [line.strip() for line in lowered.as_text().splitlines()]
    number, line = next((i, s) for i, s in enumerate(lines) if "stablehlo.convolution" in s)
    name = line.split(" = ")[0]
    readers = [s for s in lines[number + 1 :] if name in s.replace(",", " ").split()]
    assert len(readers) == 1 and "stablehlo.convert" in readers[0]
