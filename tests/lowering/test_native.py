"""The C++ kernels against numpy: sums in int64, what follows in float32, bit for bit."""

import dataclasses
import math
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from held_codes import WEIGHTS, WIDTHS, clipped, code_range, hold, operand
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import special

from jaxrmils.graph.functions import FUNCTIONS
from jaxrmils.lowering.native import build, kernels
from jaxrmils.lowering.native.kernels import (
    Epilogue,
    batched_dot,
    conv,
    correction,
    depthwise,
    dot,
    pack_conv,
    pack_depthwise,
    pack_dot,
)
from jaxrmils.lowering.sites import LoweringError
from jaxrmils.numerics import QuantParams, quantize

REASON = kernels.available()
needs_kernels = pytest.mark.skipif(REASON is not None, reason=str(REASON))


def random_codes(rng, shape, extreme=False, bits=8):
    """int8 codes, half of them at the ends of their range if `extreme`."""
    low, high = code_range(bits)
    codes = rng.integers(low, high + 1, shape)
    ends = np.where(codes < 0, low, high)
    return np.where(rng.random(shape) < 0.5 * extreme, ends, codes).astype(np.int8)


EIGHT = (8, (8, "int8"))
"""Widths of activations and weights, and how these are held."""


def random_epilogue(rng, shape, *, residual, clamp, codes, spread):
    """An epilogue for sums of about `spread`, whose codes use their range."""
    channels = shape[-1]
    values = {
        "scale": (rng.uniform(0.5, 2, channels) / spread).astype(np.float32),
        "offset": rng.normal(size=channels).astype(np.float32),
        "correction": rng.integers(-spread, spread + 1, channels).astype(np.int32),
    }
    if residual == "float32":
        values["residual"] = rng.normal(size=shape).astype(np.float32)
    elif residual == "codes":
        values["residual"] = random_codes(rng, shape)
        values["residual_grid"] = (np.float32(0.013), np.int32(-7))
    if codes:
        values["grid"] = (np.float32(rng.uniform(0.01, 0.05)), np.int32(rng.integers(-128, 128)))
    low, high = {"none": (-math.inf, math.inf), "relu": (0.0, math.inf), "both": (-0.5, 1.0)}[clamp]
    return Epilogue(**jax.tree.map(jnp.asarray, values), low=low, high=high)


def with_weights(epilogue, w):
    """The epilogue as kernels want it, for a correction of the sums of x w."""
    sums = jnp.asarray(w.astype(np.int64).sum(axis=tuple(range(w.ndim - 1))), jnp.int32)
    total = epilogue.correction + correction(sums, jnp.int32(0))
    return dataclasses.replace(epilogue, correction=total)


def finished(sums, epilogue):
    """What an epilogue makes of int64 sums, in numpy."""
    e = jax.tree.map(np.asarray, epilogue)
    total = sums + e.correction
    assert np.abs(total).max(initial=0) < 2**31
    y = total.astype(np.int32).astype(np.float32) * e.scale + e.offset
    if e.residual is not None:
        r = e.residual
        if e.residual_grid is not None:
            r = e.residual_grid[0] * (r.astype(np.int32) - e.residual_grid[1]).astype(np.float32)
        y = y + r
    y = np.minimum(np.maximum(y, np.float32(e.low)), np.float32(e.high))
    assert y.dtype == np.float32
    if e.grid is None:
        return y
    codes = np.rint(y / e.grid[0]) + e.grid[1].astype(np.float32)
    return np.clip(codes, -128, 127).astype(np.int8)


def conv_sums(x, w, x_zero, strides, padding, dilation):
    """out[n, i, j, o] = sum over taps and channels of the padded input times the weights."""
    (top, bottom), (left, right) = padding
    wide = np.pad(
        x.astype(np.int64),
        ((0, 0), (max(top, 0), max(bottom, 0)), (max(left, 0), max(right, 0)), (0, 0)),
        constant_values=x_zero,
    )
    wide = wide[:, max(-top, 0) : wide.shape[1] - max(-bottom, 0)]
    wide = wide[:, :, max(-left, 0) : wide.shape[2] - max(-right, 0)]
    oh, ow = (
        max(0, (n - (t - 1) * d - 1) // s + 1)
        for n, t, s, d in zip(wide.shape[1:3], w.shape[:2], strides, dilation, strict=True)
    )
    depthwise = w.shape[2] == 1 and w.shape[3] == x.shape[3]
    out = np.zeros((x.shape[0], oh, ow, w.shape[3]), np.int64)
    if out.size == 0:
        return out
    for kh in range(w.shape[0]):
        for kw in range(w.shape[1]):
            rows = slice(kh * dilation[0], kh * dilation[0] + (oh - 1) * strides[0] + 1, strides[0])
            cols = slice(kw * dilation[1], kw * dilation[1] + (ow - 1) * strides[1] + 1, strides[1])
            part, taps = wide[:, rows, cols], w[kh, kw].astype(np.int64)
            out += part * taps[0] if depthwise else np.einsum("nijc,co->nijo", part, taps)
    return out


def assert_same(actual, expected):
    assert actual.dtype == expected.dtype
    np.testing.assert_array_equal(np.asarray(actual), expected)


epilogues = st.fixed_dictionaries(
    {
        "residual": st.sampled_from(["none", "float32", "codes"]),
        "clamp": st.sampled_from(["none", "relu", "both"]),
        "codes": st.booleans(),
    }
)
seeds = st.integers(0, 2**32 - 1)
widths = st.tuples(WIDTHS, WEIGHTS)
paddings = st.tuples(*[st.tuples(st.integers(-1, 3), st.integers(-1, 3))] * 2)
small = st.tuples(st.integers(1, 3), st.integers(1, 3))
windows = st.fixed_dictionaries({"strides": small, "padding": paddings, "dilation": small})
sizes = st.tuples(st.integers(1, 2), st.integers(1, 12), st.integers(1, 12))


def held(w, weight):
    """Codes of a weight out of the tensor that holds them, as int8."""
    return jax.jit(operand)(hold(jnp.asarray(w), *weight)).astype(jnp.int8)


def spread_of(products, *bits):
    """About how large sums of so many products of codes are."""
    return math.isqrt(products) * 5000 >> sum(8 - each for each in bits)


def check_dot(m, k, n, seed, extreme, choices, widths=EIGHT):
    rng = np.random.default_rng(seed)
    bits, weight = widths
    x = random_codes(rng, (m, k), extreme, bits)
    w = random_codes(rng, (k, n), extreme, weight[0])
    spread = spread_of(k, bits, weight[0])
    epilogue = random_epilogue(rng, (m, n), spread=spread, **choices)
    packed = pack_dot(held(w, weight))
    actual = jax.jit(dot)(jnp.asarray(x), packed, with_weights(epilogue, w))
    assert_same(actual, finished(x.astype(np.int64) @ w.astype(np.int64), epilogue))


def laid_out(rng, x):
    """An array [*batch, free, contracted] with its dims in another order, and where they went."""
    order = rng.permutation(x.ndim)
    where = np.argsort(order)
    return jnp.asarray(x.transpose(order)), (
        (int(where[-1]),),
        tuple(int(d) for d in where[:-2]),
    )


def check_batched_dot(batch, m, k, n, seed, extreme, choices, bits=8):
    rng = np.random.default_rng(seed)
    x, w = (random_codes(rng, (*batch, rows, k), extreme, bits) for rows in (m, n))
    zeros = [clipped(z, bits) for z in rng.choice([-128, 0, 127, 5], 2)]
    (lhs, left), (rhs, right) = laid_out(rng, x), laid_out(rng, w)
    spread = 2 * spread_of(k, bits, bits)
    epilogue = random_epilogue(rng, (*batch, m, n), spread=spread, **choices)

    @jax.jit
    def run(lhs, rhs, e, a, b):
        numbers = tuple(zip(left, right, strict=True))
        return batched_dot(lhs, rhs, e, lhs_zero=a, rhs_zero=b, dimension_numbers=numbers)

    actual = run(lhs, rhs, epilogue, *map(jnp.int32, zeros))
    sums = np.einsum("...mk,...nk->...mn", x.astype(np.int64) - zeros[0], w.astype(int) - zeros[1])
    assert_same(actual, finished(sums, epilogue))


def check_conv(shape, kernel, features, window, seed, extreme, choices, widths=EIGHT):
    """`features` None: depthwise."""
    rng = np.random.default_rng(seed)
    c = shape[-1]
    bits, weight = widths
    x = random_codes(rng, shape, extreme, bits)
    w = random_codes(
        rng, (*kernel, 1 if features is None else c, features or c), extreme, weight[0]
    )
    x_zero = clipped(rng.integers(-128, 128), bits)
    sums = conv_sums(x, w, x_zero, **window)
    products = math.prod(kernel) * (1 if features is None else c)
    spread = spread_of(products, bits, weight[0])
    epilogue = random_epilogue(rng, sums.shape, spread=spread, **choices)
    run, pack = (depthwise, pack_depthwise) if features is None else (conv, pack_conv)
    function = jax.jit(lambda x, w, e, z: run(x, w, e, x_zero=z, **window))
    packed, e = pack(held(w, weight)), with_weights(epilogue, w)
    actual = function(jnp.asarray(x), packed, e, jnp.int32(x_zero))
    assert_same(actual, finished(sums, epilogue))


EXACT = {
    "gelu": special.ndtr,
    "gelu_tanh": lambda x: special.expit(np.sqrt(8 / np.pi) * (x + 0.044715 * x**3)),
    "silu": special.expit,
}


def check_function(name, shape, kernel, features, seed, residual="none"):
    """A kernel's function of its own linear results, and the codes of that."""
    rng = np.random.default_rng(seed)
    x = jnp.asarray(random_codes(rng, shape))
    inputs = shape[-1] if features else 1
    w = random_codes(rng, (*kernel, inputs, features or shape[-1]))
    run, pack = (conv, pack_conv) if features else (depthwise, pack_depthwise)
    packed = pack(jnp.asarray(w))
    function = jax.jit(lambda e: run(x, packed, e, x_zero=jnp.int32(3), **SAME))
    out = (*shape[:-1], w.shape[-1])
    linear = random_epilogue(
        rng, out, residual=residual, clamp="none", codes=False, spread=2000 * w[..., 0].size
    )
    linear = dataclasses.replace(linear, scale=linear.scale * 20)
    before = np.asarray(function(linear), np.float64)
    assert before.min() < -6 and before.max() > 6  # beyond both ends
    after = function(dataclasses.replace(linear, function=name))
    expected = before * EXACT[name](before)
    error = np.abs(np.asarray(after, np.float64) - expected)
    assert np.all(error <= 1.2e-7 * np.maximum(1, np.abs(expected)))
    for scale, zero in ((0.05, -100), (1e-9, 3)):  # the second may not fit in int32
        grid = (jnp.float32(scale), jnp.int32(zero))
        codes = function(dataclasses.replace(linear, function=name, grid=grid))
        assert_same(codes, np.asarray(quantize(after, QuantParams(*grid, 8, False))))
    clamped = function(dataclasses.replace(linear, function=name, low=0.5, high=2.0))
    assert_same(clamped, np.clip(np.asarray(after), np.float32(0.5), np.float32(2.0)))


@needs_kernels
@pytest.mark.parametrize("name", EXACT)
@pytest.mark.parametrize(
    ("features", "residual"), [(21, "none"), (None, "none"), (21, "codes"), (None, "float32")]
)
def test_functions_equal_numpy(name, features, residual):
    check_function(name, (2, 9, 8, 35), (3, 3), features, 0, residual)


def test_functions_are_known_by_name():
    x, w, e = dot_arguments()
    with pytest.raises(ValueError, match="function 'tanh'; kernels know gelu, gelu_tanh, silu"):
        dot(x, w, dataclasses.replace(e, function="tanh"))
    assert set(EXACT) == set(FUNCTIONS)


@needs_kernels
@settings(max_examples=25, deadline=None)
@given(st.integers(1, 40), st.integers(1, 70), st.integers(1, 150), seeds, st.booleans(), epilogues,
       widths)  # fmt: skip
def test_dots_equal_numpy(m, k, n, seed, extreme, choices, widths):
    check_dot(m, k, n, seed, extreme, choices, widths)


@needs_kernels
@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 3), max_size=2), st.integers(1, 40), st.integers(1, 150),
       st.integers(1, 40), seeds, st.booleans(), epilogues, WIDTHS)  # fmt: skip
def test_products_of_activations_equal_numpy(batch, m, k, n, seed, extreme, choices, bits):
    check_batched_dot(batch, m, k, n, seed, extreme, choices, bits)


# Several tasks for a product, several chunks of rows, and the deepest sums there may be.
@needs_kernels
@pytest.mark.parametrize(
    ("batch", "m", "k", "n"),
    [((2, 12), 128, 64, 128), ((1,), 300, 128, 64), ((), 70, 9000, 40), ((), 3, 33_025, 17)],
)
def test_large_products_of_activations_equal_numpy(batch, m, k, n):
    for seed in range(3):
        check_batched_dot(batch, m, k, n, seed, seed == 1, PLAIN)


@needs_kernels
def test_products_of_activations_under_vmap():
    rng = np.random.default_rng(0)
    lhs, rhs = (jnp.asarray(random_codes(rng, (3, 2, 5, n))) for n in (8, 9))
    e = random_epilogue(rng, (2, 8, 9), residual="codes", clamp="both", codes=True, spread=9000)

    def run(lhs, rhs, e):
        numbers = (((1,), (1,)), ((0,), (0,)))
        zeros = {"lhs_zero": jnp.int32(-3), "rhs_zero": jnp.int32(90)}
        return batched_dot(lhs, rhs, e, **zeros, dimension_numbers=numbers)

    expected = np.stack([run(a, b, e) for a, b in zip(lhs, rhs, strict=True)])
    both = jax.jit(jax.vmap(run, (0, 0, None)))
    assert_same(both(lhs, rhs, e), expected)
    assert "while" not in str(jax.make_jaxpr(both)(lhs, rhs, e))
    one = jax.vmap(run, (None, 0, None))(lhs[0], rhs, e)
    assert_same(one, np.stack([run(lhs[0], each, e) for each in rhs]))
    several = jax.tree.map(lambda leaf: jnp.stack([leaf] * 3), e)
    assert_same(jax.vmap(run)(lhs, rhs, several), expected)


def test_operands_of_products_of_activations_are_checked():
    _, _, e = dot_arguments()
    x, w = jnp.zeros((2, 4, 5), jnp.int8), jnp.zeros((2, 3, 5), jnp.int8)
    zeros = {"lhs_zero": jnp.int32(0), "rhs_zero": jnp.int32(0)}
    numbers = (((2,), (2,)), ((0,), (0,)))
    with pytest.raises(ValueError, match=r"lhs of shape \(2, 4, 5\) must have one contracted"):
        batched_dot(x, w, e, **zeros, dimension_numbers=(((2,), (2,)), ((), ())))
    with pytest.raises(ValueError, match="do not fit"):
        batched_dot(x, w[..., :4], e, **zeros, dimension_numbers=numbers)
    with pytest.raises(TypeError, match="rhs must be int8, found float32"):
        batched_dot(x, w.astype(jnp.float32), e, **zeros, dimension_numbers=numbers)
    with pytest.raises(ValueError, match=r"epilogue\.scale must have shape \(4,\)"):
        batched_dot(w, x, e, **zeros, dimension_numbers=numbers)
    deep = jnp.zeros((1, 1, 40_000), jnp.int8)
    with pytest.raises(ValueError, match="can overflow int32"):
        batched_dot(deep, deep, e, **zeros, dimension_numbers=numbers)
    if REASON is None:
        empty = batched_dot(x[:0], w[:0], e, **zeros, dimension_numbers=numbers)
        assert empty.shape == (0, 4, 3) and empty.dtype == jnp.float32


@needs_kernels
@settings(max_examples=30, deadline=None)
@given(sizes, st.integers(1, 40), small, st.integers(1, 70), windows, seeds, st.booleans(),
       epilogues, widths)  # fmt: skip
def test_convolutions_equal_numpy(size, c, kernel, o, window, seed, extreme, choices, widths):
    check_conv((*size, c), kernel, o, window, seed, extreme, choices, widths)


@needs_kernels
@settings(max_examples=30, deadline=None)
@given(sizes, st.integers(2, 150), st.tuples(st.integers(1, 5), st.integers(1, 5)), windows, seeds,
       st.booleans(), epilogues, widths)  # fmt: skip
def test_depthwise_convolutions_equal_numpy(
    size, c, kernel, window, seed, extreme, choices, widths
):
    check_conv((*size, c), kernel, None, window, seed, extreme, choices, widths)


PLAIN = {"residual": "none", "clamp": "none", "codes": True}
SAME = {"strides": (1, 1), "padding": ((1, 1), (1, 1)), "dilation": (1, 1)}
HALVED = {"strides": (2, 2), "padding": ((0, 1), (0, 1)), "dilation": (1, 1)}
POINTWISE = {"strides": (1, 1), "padding": ((0, 0), (0, 0)), "dilation": (1, 1)}
STEM = {"strides": (2, 2), "padding": ((3, 3), (3, 3)), "dilation": (1, 1)}


# Large enough for several threads, and for more than one chunk of rows or group of channels.
@needs_kernels
@pytest.mark.parametrize(
    ("shape", "kernel", "features", "window"),
    [
        ((1, 56, 56, 64), (3, 3), 64, SAME),
        ((1, 7, 7, 512), (3, 3), 512, SAME),
        ((2, 112, 112, 3), (7, 7), 64, STEM),
        ((1, 56, 56, 24), (1, 1), 144, POINTWISE),
        ((1, 7, 7, 320), (1, 1), 1280, POINTWISE),
        ((1, 112, 112, 96), (3, 3), None, HALVED),
        ((2, 56, 56, 144), (3, 3), None, SAME),
        ((1, 7, 7, 960), (3, 3), None, SAME),
    ],
)
@pytest.mark.parametrize("residual", ["none", "codes"])
def test_large_convolutions_equal_numpy(shape, kernel, features, window, residual):
    check_conv(shape, kernel, features, window, 0, False, {**PLAIN, "residual": residual})


@needs_kernels
@pytest.mark.parametrize(
    ("m", "k", "n"), [(1, 4096, 1000), (3, 1024, 4096), (128, 768, 3072), (200, 3072, 768)]
)
def test_large_dots_equal_numpy(m, k, n):
    check_dot(m, k, n, 0, False, PLAIN)


@needs_kernels
def test_calls_at_once_share_the_pool():
    rng = np.random.default_rng(0)
    x = jnp.asarray(random_codes(rng, (4, 300, 200)))
    w = pack_dot(jnp.asarray(random_codes(rng, (200, 300))))
    e = random_epilogue(rng, (300, 300), residual="none", clamp="relu", codes=True, spread=70_000)
    run = jax.jit(lambda x: dot(x, w, e))
    expected = [np.asarray(run(each)) for each in x]
    with ThreadPoolExecutor(4) as threads:
        for _ in range(20):
            for actual, each in zip(threads.map(run, x), expected, strict=True):
                assert_same(actual, each)


@needs_kernels
def test_codes_are_those_of_quantize_at_ties():
    """Sums that land on halves of steps, and quotients next to them."""
    k, n = 1, 4096
    x, w = np.ones((1, k), np.int8), np.zeros((k, n), np.int8)
    for scale in (0.5, 0.1, 0.3, 1 / 3, 0.0123, 9e-19, 7.7e-20, 1e18, 3.3e22):
        scale = np.float32(scale)
        halves = (np.arange(n) % 512 - 255.5).astype(np.float32) * scale
        steps = np.arange(n) // 512 - 4  # units in the last place off
        offset = halves + steps.astype(np.float32) * np.spacing(halves)
        for zero_point in (-128, 3, 127):
            grid = (jnp.float32(scale), jnp.int32(zero_point))
            ones, none = jnp.ones(n, jnp.float32), jnp.zeros(n, jnp.int32)
            epilogue = Epilogue(ones, jnp.asarray(offset), none, grid=grid)
            actual = dot(jnp.asarray(x), pack_dot(jnp.asarray(w)), epilogue)[0]
            params = QuantParams(*grid, bits=8, symmetric=False)
            assert_same(actual, np.asarray(quantize(jnp.asarray(offset), params)))


@needs_kernels
def test_quotients_by_a_reciprocal_round_like_divisions(tmp_path):
    """One in 64 significands; `python tests/lowering/test_native.py` tries all 8,388,608."""
    if kernels.instructions() != "avx512_vnni":
        pytest.skip("kernels divide")
    done = run_exact_division(tmp_path, 64)
    assert done.stdout == f"{2**17 * 256 * 9} compared, 0 different\n", done.stderr


def run_exact_division(folder, stride):
    flags = [flag for flag in build.FLAGS if flag not in ("-shared", "-fPIC")]
    include, program = Path(build.__file__).parent, folder / "exact_division"
    source = Path(__file__).with_name("exact_division.cc")
    command = [*build.find_compiler(), *flags, "-I", include, source, "-o", program]
    subprocess.run(command, check=True)
    return subprocess.run([program, str(stride)], capture_output=True, text=True)


@needs_kernels
@pytest.mark.parametrize("value", [3e38, -3e38, 1e20, -1e20, 0.0, -0.0, 1e-38])
@pytest.mark.parametrize("scale", [1e-30, 1e-3, 1.0, 1e30, 1.2e-38, 3e38])
def test_codes_saturate(value, scale):
    grid = (jnp.float32(scale), jnp.int32(5))
    offset = jnp.full(20, value, jnp.float32)
    epilogue = Epilogue(jnp.ones(20), offset, jnp.zeros(20, jnp.int32), grid=grid)
    actual = dot(jnp.zeros((1, 4), jnp.int8), pack_dot(jnp.zeros((4, 20), jnp.int8)), epilogue)[0]
    params = QuantParams(*grid, bits=8, symmetric=False)
    assert_same(actual, np.asarray(quantize(offset, params)))


@needs_kernels
@pytest.mark.parametrize("residual", ["none", "codes"])
def test_a_batch_is_one_longer_input(residual):
    rng = np.random.default_rng(0)
    x = jnp.asarray(random_codes(rng, (3, 2, 5, 5, 8)))
    w = pack_conv(jnp.asarray(random_codes(rng, (3, 3, 8, 20))))
    e = random_epilogue(
        rng, (2, 5, 5, 20), residual=residual, clamp="both", codes=True, spread=9000
    )
    run = lambda x, e: conv(x, w, e, x_zero=jnp.int32(3), **SAME)  # noqa: E731
    batched = jax.jit(jax.vmap(run, (0, None)))
    assert_same(batched(x, e), np.stack([run(each, e) for each in x]))
    assert "while" not in str(jax.make_jaxpr(batched)(x, e))
    if residual == "codes":
        more = jnp.asarray(random_codes(rng, (3, 2, 5, 5, 20)))
        both = lambda x, r: run(x, dataclasses.replace(e, residual=r))  # noqa: E731
        expected = np.stack([both(*each) for each in zip(x, more, strict=True)])
        assert_same(jax.vmap(both)(x, more), expected)
        assert_same(jax.vmap(both, (None, 0))(x[0], more)[0], expected[0])


@needs_kernels
def test_batches_of_other_operands_run_one_by_one():
    rng = np.random.default_rng(0)
    x = jnp.asarray(random_codes(rng, (3, 4, 9)))
    w = jax.vmap(pack_dot)(jnp.asarray(random_codes(rng, (3, 9, 20))))
    e = random_epilogue(rng, (4, 20), residual="none", clamp="none", codes=False, spread=9000)
    actual = jax.vmap(lambda x, w: dot(x, w, e))(x, w)
    each = [dot(x[i], jax.tree.map(lambda leaf: leaf[i], w), e) for i in range(3)]  # noqa: B023
    assert_same(actual, np.stack(each))


@needs_kernels
def test_results_without_elements():
    e = Epilogue(jnp.ones(3), jnp.ones(3), jnp.zeros(3, jnp.int32))
    assert dot(jnp.zeros((0, 4), jnp.int8), pack_dot(jnp.ones((4, 3), jnp.int8)), e).shape == (0, 3)
    w = pack_conv(jnp.ones((3, 3, 2, 3), jnp.int8))
    out = conv(jnp.zeros((1, 2, 2, 2), jnp.int8), w, e, x_zero=jnp.int32(0), **POINTWISE)
    assert out.shape == (1, 0, 0, 3)


def dot_arguments():
    e = Epilogue(jnp.ones(3), jnp.ones(3), jnp.zeros(3, jnp.int32))
    return jnp.zeros((2, 4), jnp.int8), pack_dot(jnp.ones((4, 3), jnp.int8)), e


def test_operands_are_checked():
    x, w, e = dot_arguments()
    with pytest.raises(ValueError, match=r"x must be \[m, 4\]"):
        dot(x[:, :3], w, e)
    with pytest.raises(TypeError, match="x must be int8, found int32"):
        dot(x.astype(jnp.int32), w, e)
    with pytest.raises(ValueError, match=r"epilogue\.scale must have shape \(3,\), found \(2,\)"):
        dot(x, w, dataclasses.replace(e, scale=jnp.ones(2)))
    with pytest.raises(TypeError, match=r"epilogue\.correction must be int32"):
        dot(x, w, dataclasses.replace(e, correction=jnp.ones(3)))
    with pytest.raises(TypeError, match=r"epilogue\.residual must be float32, found int8"):
        dot(x, w, dataclasses.replace(e, residual=jnp.zeros((2, 3), jnp.int8)))
    with pytest.raises(ValueError, match="can overflow int32"):
        dot(jnp.zeros((1, 70_000), jnp.int8), pack_dot(jnp.zeros((70_000, 3), jnp.int8)), e)
    with pytest.raises(TypeError, match="weight codes must be int8"):
        pack_dot(jnp.ones((4, 3)))
    with pytest.raises(ValueError, match="depthwise weights"):
        pack_depthwise(jnp.ones((3, 3, 2, 4), jnp.int8))
    with pytest.raises(ValueError, match="must have two entries"):
        conv(
            jnp.zeros((1, 4, 4, 2), jnp.int8),
            pack_conv(jnp.ones((1, 1, 2, 3), jnp.int8)),
            e,
            x_zero=jnp.int32(0),
            strides=(1,),
            padding=((0, 0), (0, 0)),
        )


def test_without_a_compiler(monkeypatch, tmp_path):
    monkeypatch.setenv("JAXRMILS_CACHE", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(LoweringError, match=r"none of c\+\+, g\+\+, clang\+\+ is on the PATH"):
        build.compile_library()
    monkeypatch.setenv("CXX", "no-such-compiler -m64")
    with pytest.raises(LoweringError, match="CXX='no-such-compiler -m64' is not found"):
        build.compile_library()


def test_with_a_compiler_that_fails(monkeypatch, tmp_path):
    script = tmp_path / "broken"
    script.write_text('#!/bin/sh\n[ "$2" = --version ] && exit 0\necho "bad: $#" >&2\nexit 3\n')
    script.chmod(0o755)
    monkeypatch.setenv("JAXRMILS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("CXX", f"{script} -x")
    with pytest.raises(LoweringError, match=r"(?s)ended with 3:\nbad: .*Set CXX to a compiler"):
        build.compile_library()
    assert not list((tmp_path / "cache").iterdir())


def test_a_cache_that_cannot_be_written(monkeypatch, tmp_path):
    if REASON is not None:
        pytest.skip(REASON)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("JAXRMILS_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(LoweringError, match="set JAXRMILS_CACHE"):
        build.compile_library()


PORTABLE = """
import numpy as np, test_native as t
assert t.REASON is None, t.REASON
assert t.kernels.instructions() == "portable"
for seed in range(4):
    choices = {"residual": ("none", "float32", "codes", "none")[seed], "clamp": "both",
               "codes": seed < 3}
    t.check_dot(5, 37, 50, seed, True, choices)
    t.check_conv((2, 9, 8, 5), (3, 2), 20, t.HALVED, seed, True, choices)
    t.check_conv((2, 9, 8, 35), (3, 3), None, t.SAME, seed, True, choices)
    t.check_batched_dot((2,), 20, 37, 19, seed, True, choices)
    t.check_batched_dot((), 33, 16, 32, seed + 9, False, choices)
for name in t.EXACT:
    t.check_function(name, (2, 9, 8, 35), (3, 3), 21, 0)
"""


@needs_kernels
def test_kernels_without_vector_instructions():
    """In a process of their own: a target is registered once."""
    env = {**os.environ, "CXXFLAGS": "-DJAXRMILS_PORTABLE -O1", "JAX_PLATFORMS": "cpu"}
    env["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    done = subprocess.run([sys.executable, "-c", PORTABLE], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        print(run_exact_division(Path(folder), 1).stdout, end="")
