"""Dots of integer codes, accumulated exactly in int32, and where sums and scales go in them.

A dot of affine codes needs one integer dot and two sums. With K products per output, and a zero
point for the whole operand or one for every row of it (every index of its dims that stay),

    sum_k (l - z_l)(r - z_r) = sum_k l r - z_l sum_k r - z_r sum_k l + K z_l z_r.

The sum of weight codes is a constant, so a zero point of the activations costs no second dot.
Intermediate int32 values may wrap; the result is exact whenever it fits, since wrapping is
arithmetic modulo 2^32. That it fits is checked from the shapes, before anything runs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, get_args

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float32, Int, Int32

from jaxrmils.lowering.table import Formulation, Operation, dot_operation, row_of

Backend = Literal["cpu", "cuda", "tpu"]
BACKENDS: tuple[Backend, ...] = get_args(Backend)
Side = Literal["lhs", "rhs"]
# ((lhs contracting, rhs contracting), (lhs batch, rhs batch)), as in `lax.dot_general`.
DotDimensionNumbers = lax.DotDimensionNumbers

INT32_MAX = 2**31 - 1
FLOAT32_EXACT = 2**24
"""float32 holds every integer up to this."""


def code_bound(bits: int, *, zero_point: bool) -> int:
    """The largest |code - zero_point| of a signed code: 2^(bits-1), or 2^bits - 1.

    Args:
        bits: width of the codes; they and their zero point lie in [-2^(bits-1), 2^(bits-1) - 1].
        zero_point: whether a zero point is subtracted.

    >>> code_bound(8, zero_point=False), code_bound(8, zero_point=True)
    (128, 255)
    """
    return 2**bits - 1 if zero_point else 2 ** (bits - 1)


def check_accumulator(k: int, lhs_bound: int, rhs_bound: int) -> None:
    """Makes sure that K products of bounded factors cannot overflow int32.

    Args:
        k: products per output element.
        lhs_bound: largest absolute value of a left factor, zero point subtracted.
        rhs_bound: the same for the right factor.

    Raises:
        ValueError: if `k * lhs_bound * rhs_bound > 2^31 - 1`; it names K and its limit.

    >>> check_accumulator(33_025, 255, 255)
    >>> check_accumulator(33_026, 255, 255)
    Traceback (most recent call last):
    ...
    ValueError: K = 33026 products of at most 255 * 255 can overflow int32: ...
    """
    limit = INT32_MAX // (lhs_bound * rhs_bound)
    if k > limit:
        raise ValueError(
            f"K = {k} products of at most {lhs_bound} * {rhs_bound} can overflow int32: "
            f"the limit is K = {limit}. Use fewer bits or symmetric operands, split the "
            "contraction, or keep this operation in float."
        )


def code_bits(codes: Array, bits: int) -> int:
    """The width of codes: 4 if the array's dtype is int4, else the given width.

    Raises:
        TypeError: if the codes are neither int8 nor int4.
    """
    if codes.dtype == jnp.int4:
        return 4
    if codes.dtype != jnp.int8:
        raise TypeError(f"codes must be int8 or int4, found {codes.dtype}; quantize them first")
    return bits


def kernel_operands(
    lhs: Int[Array, "*lhs"], rhs: Int[Array, "*rhs"], backend: Backend
) -> tuple[Int[Array, "*lhs"], Int[Array, "*rhs"]]:
    """Both operands in the one dtype the backend multiplies natively, int8 or int4.

    int4 x int4 is native on TPU only. Mixed operands never reach an operation: JAX would promote
    both to int32, and a convolution refuses them.

    >>> lhs, rhs = kernel_operands(jnp.ones(2, jnp.int4), jnp.ones(2, jnp.int8), "tpu")
    >>> lhs.dtype, rhs.dtype
    (dtype('int8'), dtype('int8'))
    """
    if backend == "tpu" and lhs.dtype == jnp.int4 and rhs.dtype == jnp.int4:
        return lhs, rhs
    return lhs.astype(jnp.int8), rhs.astype(jnp.int8)


def dot_int32(
    lhs: Int[Array, "*lhs"],
    rhs: Int[Array, "*rhs"],
    dimension_numbers: DotDimensionNumbers,
    *,
    lhs_zero_point: Int32[Array, "*lhs_zero"] | None = None,
    rhs_zero_point: Int32[Array, "*rhs_zero"] | None = None,
    lhs_sum: Int[Array, "*lhs_sum"] | None = None,
    rhs_sum: Int[Array, "*rhs_sum"] | None = None,
    lhs_bits: int = 8,
    rhs_bits: int = 8,
    backend: Backend = "cpu",
) -> Int32[Array, "*out"]:
    """The exact int32 dot of codes with their zero points subtracted.

    out = sum_k (lhs - z_l)(rhs - z_r)
        = sum_k lhs rhs - z_l sum_k rhs - z_r sum_k lhs + K z_l z_r.

    Args:
        lhs: int8 (or int4) codes of any shape.
        rhs: int8 (or int4) codes of any shape.
        dimension_numbers: as in `lax.dot_general`.
        lhs_zero_point: int32, None for symmetric codes; a scalar, or one for every row in the shape
            of lhs, with size 1 on its contracting dims.
        rhs_zero_point: the same for rhs.
        lhs_sum: `operand_sum(lhs, dimension_numbers, "lhs")` if known, in any integer dtype that
            holds it; read only if there is a `rhs_zero_point`, computed at run time if missing.
        rhs_sum: `operand_sum(rhs, dimension_numbers, "rhs")`, for `lhs_zero_point`.
        lhs_bits: width of the codes of `lhs` where they are held as int8; static.
        rhs_bits: width of the codes of `rhs` where they are held as int8; static.
        backend: where the program will run; static. It changes the formulation, not the result.

    Returns:
        int32 in the layout of `lax.dot_general`: batch, free dims of lhs, free dims of rhs.

    Raises:
        ValueError: if the result could overflow int32, or a zero point or sum has a wrong shape.
        TypeError: if an operand is neither int8 nor int4.

    >>> lhs = jnp.array([[1, 2, 3]], jnp.int8)
    >>> rhs = jnp.array([[1], [0], [-1]], jnp.int8)
    >>> dot_int32(lhs, rhs, (((1,), (0,)), ((), ())), rhs_zero_point=jnp.int32(1)).tolist()
    [[-8]]
    """
    (lhs_contracting, _), _ = dimension_numbers
    k = math.prod(lhs.shape[d] for d in lhs_contracting)
    lhs_bits, rhs_bits = code_bits(lhs, lhs_bits), code_bits(rhs, rhs_bits)
    zero_points = (lhs_zero_point, rhs_zero_point)
    bounds = [
        code_bound(bits, zero_point=zero is not None)
        for bits, zero in zip((lhs_bits, rhs_bits), zero_points, strict=True)
    ]
    check_accumulator(k, *bounds)
    sums = (rhs_sum, lhs_sum)
    needs_sums = any(z is not None and s is None for z, s in zip(zero_points, sums, strict=True))
    is_short = needs_sums and 1 < k <= FLOAT32_EXACT // math.prod(bounds)
    operation = _operation(lhs, rhs, dimension_numbers, is_short)
    by_row = [zero is not None and jnp.ndim(zero) > 0 for zero in zero_points]
    weight, activation = (lhs_bits, rhs_bits) if by_row == [False, True] else (rhs_bits, lhs_bits)
    name = f"w{weight}a{activation}" + "d" * any(by_row)
    formulation = row_of(backend, operation, name).formulation
    layout = (dimension_numbers, lhs.ndim, rhs.ndim)
    lhs_zero, rhs_zero = (
        None if zero is None else _zero_to_output(zero, *layout, side)
        for zero, side in zip(zero_points, get_args(Side), strict=True)
    )
    if formulation == "float32 dot of codes":
        return _float_dot(lhs, rhs, dimension_numbers, zero_points)
    if formulation == "s4 dot":
        lhs, rhs = lhs.astype(jnp.int4), rhs.astype(jnp.int4)
    lhs, rhs = kernel_operands(lhs, rhs, backend)
    out = _formulated(lhs, rhs, dimension_numbers, formulation)
    if lhs_zero is not None:
        if rhs_sum is None:
            rhs_sum = operand_sum(rhs, dimension_numbers, "rhs")
        out -= lhs_zero * sum_to_output(rhs_sum.astype(jnp.int32), *layout, "rhs")
    if rhs_zero is not None:
        if lhs_sum is None:
            lhs_sum = operand_sum(lhs, dimension_numbers, "lhs")
        out -= rhs_zero * sum_to_output(lhs_sum.astype(jnp.int32), *layout, "lhs")
        if lhs_zero is not None:
            out += lhs_zero * rhs_zero * jnp.int32(k)
    return out


def _zero_to_output(
    zero_point: Array,
    dimension_numbers: DotDimensionNumbers,
    lhs_ndim: int,
    rhs_ndim: int,
    side: Side,
) -> Array:
    """A zero point, or those of an operand's rows, to broadcast against the dot's output."""
    if not jnp.ndim(zero_point):
        return scalar_zero_point(zero_point, side)
    if not jnp.issubdtype(zero_point.dtype, jnp.integer):
        raise TypeError(f"{side} zero points must be integers, found {zero_point.dtype}")
    layout = (dimension_numbers, lhs_ndim, rhs_ndim)
    return _rows_to_output(zero_point.astype(jnp.int32), *layout, side, "zero point")


def _float_dot(
    lhs: Array,
    rhs: Array,
    dimension_numbers: DotDimensionNumbers,
    zero_points: tuple[Array | None, Array | None],
) -> Int32[Array, "*out"]:
    """The dot of codes less their zero points, no sum of which can pass 2^24, in float32."""

    def shifted(codes: Array, zero_point: Array | None) -> Array:
        values = codes.astype(jnp.float32)
        return values if zero_point is None else values - jnp.asarray(zero_point, jnp.float32)

    total = lax.dot_general(
        shifted(lhs, zero_points[0]),
        shifted(rhs, zero_points[1]),
        dimension_numbers,
        precision=lax.Precision.HIGHEST,
    )
    return total.astype(jnp.int32)


def _operation(
    lhs: Array, rhs: Array, dimension_numbers: DotDimensionNumbers, is_short: bool
) -> Operation:
    (lhs_contracting, rhs_contracting), (lhs_batch, rhs_batch) = dimension_numbers
    rows = math.prod(lhs.shape[d] for d in _free(lhs.ndim, lhs_contracting, lhs_batch))
    columns = math.prod(rhs.shape[d] for d in _free(rhs.ndim, rhs_contracting, rhs_batch))
    return dot_operation(rows, columns, len(lhs_batch), is_short=is_short)


def scalar_zero_point(zero_point: Int32[Array, ""], name: str) -> Int32[Array, ""]:
    """The zero point as an int32 scalar; ValueError if it is not a scalar, TypeError if float."""
    zero_point = jnp.asarray(zero_point)
    if not jnp.issubdtype(zero_point.dtype, jnp.integer):
        raise TypeError(f"{name} zero point must be an integer, found {zero_point.dtype}")
    if zero_point.ndim:
        raise ValueError(
            f"{name} zero point must be a scalar, found shape {zero_point.shape}: only scales "
            "may differ between channels"
        )
    return zero_point.astype(jnp.int32)


def _formulated(
    lhs: Array, rhs: Array, dimension_numbers: DotDimensionNumbers, formulation: Formulation
) -> Array:
    """`lax.dot_general` to int32; a single row or column gets a second one, of zeros.

    Rows that come one at a time under `vmap` are padded each.
    """
    (lhs_contracting, rhs_contracting), _ = dimension_numbers

    def dot(lhs: Array, rhs: Array, shifts: tuple[int, int]) -> Array:
        contracting = (
            tuple(d + shifts[0] for d in lhs_contracting),
            tuple(d + shifts[1] for d in rhs_contracting),
        )
        numbers = (contracting, dimension_numbers[1])
        return lax.dot_general(lhs, rhs, numbers, preferred_element_type=jnp.int32)

    # A new leading axis works alike whether or not there are free dims of size 1.
    if formulation == "s8 dot, two rows":
        return dot(_twofold(lhs), rhs, (1, 0))[0]
    if formulation == "s8 dot, two columns":
        free = lhs.ndim - len(lhs_contracting)
        return jnp.take(dot(lhs, _twofold(rhs), (0, 1)), 0, axis=free)
    return dot(lhs, rhs, (0, 0))


def _twofold(codes: Array) -> Array:
    return lax.pad(codes[None], jnp.zeros((), codes.dtype), [(0, 1, 0), *[(0, 0, 0)] * codes.ndim])


def operand_sum(
    codes: Int[Array, "*codes"], dimension_numbers: DotDimensionNumbers, side: Side
) -> Int32[Array, "*out"]:
    """The sum of an operand's codes over its contracting dims.

    Args:
        codes: int8 or int4 codes of any shape.
        dimension_numbers: of the dot the codes will enter.
        side: "lhs" or "rhs", the operand these codes are.

    Returns:
        int32, the operand's batch dims (in the order of `dimension_numbers`), then its free dims.

    >>> operand_sum(jnp.ones((3, 2), jnp.int8), (((1,), (0,)), ((), ())), "rhs").tolist()
    [3, 3]
    """
    contracting, batch = _side_dims(dimension_numbers, side)
    free = _free(codes.ndim, contracting, batch)
    ordered = codes.transpose(*batch, *free, *contracting)
    axes = tuple(range(len(batch) + len(free), codes.ndim))
    return jnp.sum(ordered, axis=axes, dtype=jnp.int32)


def sum_to_output(
    values: Array,
    dimension_numbers: DotDimensionNumbers,
    lhs_ndim: int,
    rhs_ndim: int,
    side: Side,
) -> Array:
    """Per-channel values of one operand, reshaped to broadcast against the dot's output.

    Args:
        values: the operand's batch dims, then its free dims, as `operand_sum` returns.
        dimension_numbers: of the dot.
        lhs_ndim: number of dims of the left operand.
        rhs_ndim: number of dims of the right operand.
        side: the operand that the values belong to.

    Returns:
        The values with a dim of size 1 for each free dim of the other operand.

    Raises:
        ValueError: if the number of dims of `values` is not that of the batch and free dims.

    >>> sum_to_output(jnp.zeros(5), (((1,), (0,)), ((), ())), 3, 2, "rhs").shape
    (1, 1, 5)
    """
    (lhs_contracting, rhs_contracting), (batch, _) = dimension_numbers
    ndim = {"lhs": lhs_ndim - len(lhs_contracting), "rhs": rhs_ndim - len(rhs_contracting)}
    if values.ndim != ndim[side]:
        raise ValueError(
            f"{side} values of shape {values.shape} must have {ndim[side]} dims: "
            "the operand's batch dims, then its free dims"
        )
    batch_shape, free_shape = values.shape[: len(batch)], values.shape[len(batch) :]
    if side == "lhs":
        return values.reshape(*batch_shape, *free_shape, *(1,) * (ndim["rhs"] - len(batch)))
    return values.reshape(*batch_shape, *(1,) * (ndim["lhs"] - len(batch)), *free_shape)


def output_scale(
    lhs_scale: Float32[Array, "*lhs_scale"],
    rhs_scale: Float32[Array, "*rhs_scale"],
    dimension_numbers: DotDimensionNumbers,
    lhs_ndim: int,
    rhs_ndim: int,
) -> Float32[Array, "*out"]:
    """The scale of a dot's int32 output: the product of its operands' scales.

    Args:
        lhs_scale: float32, shape () or the operand's with size 1 where the scale is shared.
        rhs_scale: the same for the right operand.
        dimension_numbers: of the dot.
        lhs_ndim: number of dims of the left operand.
        rhs_ndim: number of dims of the right operand.

    Returns:
        float32, broadcastable against the output of the dot.

    Raises:
        ValueError: if a scale varies along a contracting dim, or has a wrong number of dims.

    >>> weight_scale = jnp.ones((1, 10))  # of [K, N] weights
    >>> output_scale(jnp.float32(0.5), weight_scale, (((1,), (0,)), ((), ())), 2, 2).shape
    (1, 10)
    """
    layout = (dimension_numbers, lhs_ndim, rhs_ndim)
    return _scale_to_output(lhs_scale, *layout, "lhs") * _scale_to_output(rhs_scale, *layout, "rhs")


def _scale_to_output(
    scale: Array,
    dimension_numbers: DotDimensionNumbers,
    lhs_ndim: int,
    rhs_ndim: int,
    side: Side,
) -> Array:
    scale = jnp.asarray(scale, jnp.float32)
    if scale.ndim == 0:
        return scale
    return _rows_to_output(scale, dimension_numbers, lhs_ndim, rhs_ndim, side, "scale")


def _rows_to_output(
    values: Array,
    dimension_numbers: DotDimensionNumbers,
    lhs_ndim: int,
    rhs_ndim: int,
    side: Side,
    what: str,
) -> Array:
    """Values of an operand's rows, of size 1 on its contracting dims, to broadcast likewise."""
    contracting, batch = _side_dims(dimension_numbers, side)
    expected = lhs_ndim if side == "lhs" else rhs_ndim
    if values.ndim != expected or any(values.shape[d] != 1 for d in contracting):
        raise ValueError(
            f"{side} {what} of shape {values.shape} must be a scalar or have {expected} dims, of "
            f"size 1 on the contracting dims {tuple(contracting)}"
        )
    free = _free(values.ndim, contracting, batch)
    kept = values.transpose(*batch, *free, *contracting)
    kept = kept.reshape(kept.shape[: len(batch) + len(free)])
    return sum_to_output(kept, dimension_numbers, lhs_ndim, rhs_ndim, side)


def _side_dims(
    dimension_numbers: DotDimensionNumbers, side: Side
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The contracting and the batch dims of one operand."""
    contracting, batch = dimension_numbers
    index = 0 if side == "lhs" else 1
    return tuple(contracting[index]), tuple(batch[index])


def _free(ndim: int, *taken: Sequence[int]) -> tuple[int, ...]:
    """The dims not taken, ascending, as `lax.dot_general` orders them in its output."""
    used = {d for dims in taken for d in dims}
    return tuple(d for d in range(ndim) if d not in used)
