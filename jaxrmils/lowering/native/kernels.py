"""Integer products with what follows them, in one pass over memory.

A product of codes gives int32 sums, which are rescaled, added to, clamped and made codes again.
XLA:CPU writes the sums and reads them back; these kernels finish a few rows at a time, while
their sums are in registers. With S the sums of (x + 128) w over taps and channels, and output
channel o,

    y = f(float32(S + correction[o]) * scale[o] + offset[o] + residual), between low and high,

every operation rounded to float32 on its own, in this order; f is nothing, or a function of
`functions`, which is within 1e-7 of its value where that is below 1. The result is y, or its codes

    clip(round(y / grid_scale) + grid_zero_point, -128, 127)

with half rounded to even, as `jaxrmils.numerics.quantize` makes them. Sums are exact.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int8, Int32

from jaxrmils.lowering.integer_dot import check_accumulator, code_bound
from jaxrmils.lowering.native import build
from jaxrmils.lowering.native.batched_dot import batched_dot
from jaxrmils.lowering.native.batching import one_by_one
from jaxrmils.lowering.native.epilogue import Epilogue, check
from jaxrmils.lowering.native.packing import (
    PackedConv,
    PackedDepthwise,
    PackedDot,
    correction,
    pack_conv,
    pack_depthwise,
    pack_dot,
)
from jaxrmils.lowering.sites import LoweringError

__all__ = [
    "Epilogue",
    "PackedConv",
    "PackedDepthwise",
    "PackedDot",
    "available",
    "batched_dot",
    "conv",
    "correction",
    "depthwise",
    "dot",
    "instructions",
    "pack_conv",
    "pack_depthwise",
    "pack_dot",
]

# Operands between the input and the residual: weights and the epilogue's vectors.
_BEFORE_RESIDUAL = 4


def available() -> str | None:
    """None if the kernels can be used here, else why not.

    Compiles them if this was not done yet, which takes several seconds.
    """
    if jax.default_backend() != "cpu":
        return f"native kernels run on CPU, and the default backend is {jax.default_backend()}"
    try:
        build.load()
    except LoweringError as error:
        return str(error)
    return None


def instructions() -> str:
    """What the kernels were compiled for: "avx512_vnni", or "portable", which is slower.

    Raises:
        LoweringError: if they cannot be compiled.
    """
    name = build.load().jaxrmils_instructions
    name.restype = ctypes.c_char_p
    return name().decode()


def conv(
    x: Int8[Array, "n h w c"],
    packed: PackedConv,
    epilogue: Epilogue,
    *,
    x_zero: Int32[Array, ""],
    strides: Sequence[int],
    padding: Sequence[tuple[int, int]],
    dilation: Sequence[int] = (1, 1),
) -> Array:
    """A dense two-dimensional convolution and what follows it.

    Args:
        x: codes of the input.
        packed: the weights, from `pack_conv`.
        epilogue: what follows; its vectors have one value per output channel.
        x_zero: zero point of the input, which padding holds; int32.
        strides: along height and width.
        padding: (low, high) along height and width; negative values crop.
        dilation: of the kernel, along height and width.

    Returns:
        [n, oh, ow, o]: int8 codes if the epilogue has a grid, else float32.

    Raises:
        LoweringError: if the kernels cannot be compiled.
        TypeError: if a dtype is not what it should be.
        ValueError: if shapes do not fit, or sums could overflow int32.
    """
    kh, kw, c, o = packed.shape
    shape = _output_shape(x, (kh, kw, c), strides, padding, dilation)
    check_accumulator(kh * kw * c, code_bound(8, zero_point=True), code_bound(8, zero_point=False))
    window = _window((kh, kw), strides, padding, dilation)
    return _call("jaxrmils_conv", x, packed, epilogue, (*shape, o), x_zero, window)


def depthwise(
    x: Int8[Array, "n h w c"],
    packed: PackedDepthwise,
    epilogue: Epilogue,
    *,
    x_zero: Int32[Array, ""],
    strides: Sequence[int],
    padding: Sequence[tuple[int, int]],
    dilation: Sequence[int] = (1, 1),
) -> Array:
    """A depthwise two-dimensional convolution, multiplier 1, and what follows it.

    Args:
        x: codes of the input.
        packed: the weights, from `pack_depthwise`.
        epilogue: what follows; its vectors have one value per channel.
        x_zero: zero point of the input, which padding holds; int32.
        strides: along height and width.
        padding: (low, high) along height and width; negative values crop.
        dilation: of the kernel, along height and width.

    Returns:
        [n, oh, ow, c]: int8 codes if the epilogue has a grid, else float32.

    Raises:
        LoweringError: if the kernels cannot be compiled.
        TypeError: if a dtype is not what it should be.
        ValueError: if shapes do not fit, or sums could overflow int32.
    """
    kh, kw, c = packed.shape
    shape = _output_shape(x, (kh, kw, c), strides, padding, dilation)
    check_accumulator(kh * kw, code_bound(8, zero_point=True), code_bound(8, zero_point=False))
    window = _window((kh, kw), strides, padding, dilation)
    return _call("jaxrmils_depthwise", x, packed, epilogue, (*shape, c), x_zero, window)


def dot(x: Int8[Array, "m k"], packed: PackedDot, epilogue: Epilogue) -> Array:
    """Rows of codes times a matrix of weights, and what follows.

    Args:
        x: codes of the rows.
        packed: the weights, from `pack_dot`.
        epilogue: what follows; its vectors have one value per column.

    Returns:
        [m, n]: int8 codes if the epilogue has a grid, else float32.

    Raises:
        LoweringError: if the kernels cannot be compiled.
        TypeError: if a dtype is not what it should be.
        ValueError: if shapes do not fit, or sums could overflow int32.
    """
    k, n = packed.shape
    if x.ndim != 2 or x.shape[1] != k:
        raise ValueError(f"x must be [m, {k}] for weights of shape {packed.shape}, got {x.shape}")
    check_accumulator(k, code_bound(8, zero_point=True), code_bound(8, zero_point=False))
    return _call("jaxrmils_dot", x, packed, epilogue, (x.shape[0], n), None, {})


def _output_shape(
    x: Array,
    kernel: tuple[int, int, int],
    strides: Sequence[int],
    padding: Sequence[tuple[int, int]],
    dilation: Sequence[int],
) -> tuple[int, int, int]:
    """Batch, height and width of a convolution's result."""
    *taps, channels = kernel
    if x.ndim != 4 or x.shape[3] != channels:
        raise ValueError(f"x must be [n, h, w, {channels}] for its weights, found shape {x.shape}")
    if not len(strides) == len(padding) == len(dilation) == 2:
        raise ValueError(
            "strides, padding and dilation must have two entries, found "
            f"{tuple(strides)}, {tuple(padding)} and {tuple(dilation)}"
        )
    if min(*strides, *dilation) < 1:
        raise ValueError(
            f"strides {tuple(strides)} and dilation {tuple(dilation)} must be at least 1"
        )
    sizes = [
        max(0, (size + low + high - (t - 1) * d - 1) // stride + 1)
        for size, t, stride, (low, high), d in zip(
            x.shape[1:3], taps, strides, padding, dilation, strict=True
        )
    ]
    return x.shape[0], sizes[0], sizes[1]


def _window(
    kernel: tuple[int, int],
    strides: Sequence[int],
    padding: Sequence[tuple[int, int]],
    dilation: Sequence[int],
) -> dict[str, np.ndarray]:
    """A convolution's geometry as the kernels read it; the output's shape says the rest."""
    low = [low for low, _ in padding]
    values = {"kernel": kernel, "strides": strides, "low_padding": low, "dilation": dilation}
    return {name: np.asarray(value, np.int64) for name, value in values.items()}


def _call(
    target: str,
    x: Array,
    packed: PackedConv | PackedDepthwise | PackedDot,
    epilogue: Epilogue,
    shape: tuple[int, ...],
    x_zero: Array | None,
    window: dict[str, Any],
) -> Array:
    """Checks the operands that all kernels share, and calls one."""
    check("x", x, jnp.int8, x.shape)
    vectors, residual, rest = epilogue.operands(shape)
    operands = [packed.values, *vectors, *rest]
    if x_zero is not None:
        x_zero = jnp.asarray(x_zero, jnp.int32)
        check("x_zero", x_zero, jnp.int32, ())
        operands.append(x_zero)
    result = epilogue.result(shape)
    if 0 in shape:
        return jnp.zeros(result.shape, result.dtype)
    build.load()
    attributes = epilogue.attributes() | window
    return _batched(target, result, attributes)(x, residual, *operands)


def _batched(
    target: str, result: jax.ShapeDtypeStruct, attributes: dict[str, Any]
) -> Callable[..., Array]:
    """The kernel as a function of the input, the residual and its other operands.

    Under `vmap` a batch of inputs is one longer input; where other operands have a batch too, they
    are run one by one.
    """

    @jax.custom_batching.custom_vmap
    def run(x: Array, residual: Array, *others: Array) -> Array:
        out = jax.ShapeDtypeStruct((x.shape[0], *result.shape[1:]), result.dtype)
        operands = (x, *others[:_BEFORE_RESIDUAL], residual, *others[_BEFORE_RESIDUAL:])
        return jax.ffi.ffi_call(target, out)(*operands, **attributes)

    @run.def_vmap
    def batch(size: int, batched: Sequence[bool], *operands: Array) -> tuple[Array, bool]:
        if any(batched[2:]):
            return one_by_one(run, operands, batched), True
        x, residual, *others = operands
        if not batched[0]:
            x = jnp.broadcast_to(x, (size, *x.shape))
        if residual.size and not batched[1]:
            residual = jnp.broadcast_to(residual, (size, *residual.shape))
        if residual.size:
            residual = residual.reshape(-1, *residual.shape[2:])
        out = run(x.reshape(-1, *x.shape[2:]), residual, *others)
        return out.reshape(size, -1, *out.shape[1:]), True

    return run
