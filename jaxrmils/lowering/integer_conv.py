"""Convolutions of integer codes, accumulated exactly in int32.

Two facts shape this file. In affine codes zero is the zero point, so the padding and the holes
of a dilated input must hold it, not the code 0. And XLA:CPU has no fast depthwise convolution:
summing shifted inputs, one kernel tap at a time, is over ten times faster, and exact in int32.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float32, Int, Int32

from jaxrmils.lowering.few_channels import few_channels_conv
from jaxrmils.lowering.integer_dot import (
    Backend,
    check_accumulator,
    code_bits,
    code_bound,
    kernel_operands,
    scalar_zero_point,
)
from jaxrmils.lowering.table import Formulation, conv_operation, row_of


def conv_int32(
    lhs: Int[Array, "*lhs"],
    rhs: Int[Array, "*rhs"],
    *,
    window_strides: Sequence[int],
    padding: Sequence[tuple[int, int]],
    lhs_dilation: Sequence[int],
    rhs_dilation: Sequence[int],
    dimension_numbers: lax.ConvDimensionNumbers,
    feature_group_count: int = 1,
    batch_group_count: int = 1,
    lhs_zero_point: Int32[Array, ""] | None = None,
    kernel_sum: Int[Array, " features"] | None = None,
    lhs_bits: int = 8,
    rhs_bits: int = 8,
    backend: Backend = "cpu",
) -> Int32[Array, "*out"] | Float32[Array, "*out"]:
    """The exact int32 convolution of codes, the input's zero point subtracted.

    out = conv(lhs - z, rhs) = conv(padded lhs, rhs) - z * kernel_sum,

    where padding and the holes of a dilated input hold z. Weights are symmetric.

    Args:
        lhs: int8 (or int4) codes of the input.
        rhs: int8 (or int4) codes of the weights.
        window_strides: per spatial dim, as the five that follow in `lax.conv_general_dilated`.
        padding: (low, high) per spatial dim; negative values crop.
        lhs_dilation: per spatial dim.
        rhs_dilation: per spatial dim.
        dimension_numbers: the layouts, from `lax.conv_dimension_numbers`.
        feature_group_count: groups of input channels.
        batch_group_count: groups of the batch.
        lhs_zero_point: int32 scalar in the range of the codes, or None for symmetric codes.
        kernel_sum: `kernel_sum(rhs, dimension_numbers)` if known, in any integer dtype that holds
            it, else computed at run time; read only if there is a zero point.
        lhs_bits: width of the codes of `lhs` where they are held as int8; static.
        rhs_bits: width of the codes of `rhs` where they are held as int8; static.
        backend: where the program will run; static. It changes the formulation (see `table.py`),
            not the result; on "cuda" that is float32, exact while sums stay below 2^24 and off by
            at most 2^-24 (|S| + |C| + |S - C|) beyond that, S being the sum of products of codes
            and C the zero point's correction.

    Returns:
        int32 (or float32) in the output layout of `dimension_numbers`.

    Raises:
        ValueError: if the result could overflow int32, or the zero point is not a scalar.
        TypeError: if an operand is neither int8 nor int4.

    >>> layouts = lax.conv_dimension_numbers((1, 4, 1), (3, 1, 1), ("NHC", "HIO", "NHC"))
    >>> conv_int32(
    ...     jnp.array([1, 2, 3, 4], jnp.int8).reshape(1, 4, 1),
    ...     jnp.ones((3, 1, 1), jnp.int8),
    ...     window_strides=(1,),
    ...     padding=((1, 1),),
    ...     lhs_dilation=(1,),
    ...     rhs_dilation=(1,),
    ...     dimension_numbers=layouts,
    ...     lhs_zero_point=jnp.int32(1),
    ... ).ravel().tolist()
    [1, 3, 6, 5]
    """
    output_features, *reduced = (rhs.shape[d] for d in dimension_numbers.rhs_spec)
    lhs_bits, rhs_bits = code_bits(lhs, lhs_bits), code_bits(rhs, rhs_bits)
    check_accumulator(
        math.prod(reduced),
        code_bound(lhs_bits, zero_point=lhs_zero_point is not None),
        code_bound(rhs_bits, zero_point=False),
    )
    lhs, rhs = kernel_operands(lhs, rhs, backend)
    correction = None
    if lhs_zero_point is not None:
        zero_point = scalar_zero_point(lhs_zero_point, "lhs")
        lhs = _pad(lhs, zero_point.astype(lhs.dtype), padding, lhs_dilation, dimension_numbers)
        padding, lhs_dilation = ((0, 0),) * len(padding), (1,) * len(padding)
        sums = _kernel_sum(rhs, dimension_numbers) if kernel_sum is None else kernel_sum
        sums = sums.astype(jnp.int32)
        correction = zero_point * _to_output_features(sums, output_features, dimension_numbers)
    operation = conv_operation(
        lhs.shape[dimension_numbers.lhs_spec[1]],
        output_features,
        feature_group_count,
        batch_groups=batch_group_count,
        dilated=any(d > 1 for d in rhs_dilation),
    )
    formulation = row_of(backend, operation, f"w{rhs_bits}a{lhs_bits}").formulation
    out = _formulated(
        lhs,
        rhs,
        formulation,
        window_strides=window_strides,
        padding=padding,
        lhs_dilation=lhs_dilation,
        rhs_dilation=rhs_dilation,
        dimension_numbers=dimension_numbers,
        feature_group_count=feature_group_count,
        batch_group_count=batch_group_count,
    )
    if formulation == "s8 conv in float32":
        out = out.astype(jnp.float32)
        correction = None if correction is None else correction.astype(jnp.float32)
    return out if correction is None else out - correction


def _formulated(lhs: Array, rhs: Array, formulation: Formulation, **conv: Any) -> Array:
    """The int32 convolution in one of the ways of `table.py`.

    `conv` has the arguments of `lax.conv_general_dilated`.
    """
    numbers, strides = conv["dimension_numbers"], conv["window_strides"]
    if formulation in ("shifted products", "s8 conv, pixels as channels"):
        lhs = _pad(lhs, jnp.int8(0), conv["padding"], conv["lhs_dilation"], numbers)
    if formulation == "shifted products":
        return _depthwise(lhs, rhs, strides, conv["rhs_dilation"], numbers)
    if formulation == "s8 conv, pixels as channels":
        return few_channels_conv(lhs, rhs, strides, numbers)
    if formulation == "s8 conv, block-diagonal":
        rhs = _block_diagonal(rhs, conv["feature_group_count"], numbers)
        conv = {**conv, "feature_group_count": 1}
    return lax.conv_general_dilated(lhs, rhs, **conv, preferred_element_type=jnp.int32)


def kernel_sum(
    codes: Int[Array, "*codes"], dimension_numbers: lax.ConvDimensionNumbers
) -> Int32[Array, " features"]:
    """The sum of the weight codes that meet in each output feature.

    Args:
        codes: int8 or int4 weight codes.
        dimension_numbers: of the convolution the weights will enter.

    Returns:
        int32, one sum over the spatial and input feature dims per output feature.

    >>> layouts = lax.conv_dimension_numbers((1, 9, 2), (3, 2, 4), ("NHC", "HIO", "NHC"))
    >>> kernel_sum(jnp.ones((3, 2, 4), jnp.int8), layouts).tolist()
    [6, 6, 6, 6]
    """
    return jnp.sum(codes, axis=dimension_numbers.rhs_spec[1:], dtype=jnp.int32)


# The name that `conv_int32` reaches the function by: its own argument hides the public one.
_kernel_sum = kernel_sum


def conv_output_scale(
    act_scale: Float32[Array, "*act_scale"],
    weight_scale: Float32[Array, "*weight_scale"],
    dimension_numbers: lax.ConvDimensionNumbers,
) -> Float32[Array, "*out"]:
    """The scale of a convolution's int32 output: input scale times weight scale.

    Args:
        act_scale: float32, one value (shape () or all dims of size 1).
        weight_scale: float32, shape () or the weights' with size 1 on all but the output feature
            dim.
        dimension_numbers: of the convolution.

    Returns:
        float32, broadcastable against the output.

    Raises:
        ValueError: if a scale varies along a dim that the convolution sums over.

    >>> layouts = lax.conv_dimension_numbers((1, 9, 2), (3, 2, 4), ("NHC", "HIO", "NCH"))
    >>> conv_output_scale(jnp.float32(0.5), jnp.ones((1, 1, 4)), layouts).shape
    (1, 4, 1)
    """
    act_scale = jnp.asarray(act_scale, jnp.float32)
    weight_scale = jnp.asarray(weight_scale, jnp.float32)
    if act_scale.size != 1:
        raise ValueError(f"input scale must be one value, found shape {act_scale.shape}")
    act_scale = act_scale.reshape(())
    if weight_scale.ndim == 0:
        return act_scale * weight_scale
    rhs_spec = dimension_numbers.rhs_spec
    if weight_scale.ndim != len(rhs_spec) or any(weight_scale.shape[d] != 1 for d in rhs_spec[1:]):
        raise ValueError(
            f"weight scale of shape {weight_scale.shape} must be a scalar or have "
            f"{len(rhs_spec)} dims, of size 1 on all but the output feature dim {rhs_spec[0]}"
        )
    return act_scale * _to_output_features(weight_scale.ravel(), None, dimension_numbers)


def _to_output_features(
    values: Array, features: int | None, dimension_numbers: lax.ConvDimensionNumbers
) -> Array:
    """Values per output feature, reshaped to broadcast against the output."""
    if features is not None and values.shape != (features,):
        raise ValueError(f"kernel_sum must have shape ({features},), found {values.shape}")
    shape = [1] * len(dimension_numbers.out_spec)
    shape[dimension_numbers.out_spec[1]] = values.shape[0]
    return values.reshape(shape)


def _pad(
    lhs: Array,
    value: Array,
    padding: Sequence[tuple[int, int]],
    lhs_dilation: Sequence[int],
    dimension_numbers: lax.ConvDimensionNumbers,
) -> Array:
    """The input with its padding and the holes of its dilation written out."""
    config = [(0, 0, 0)] * lhs.ndim
    spatial = dimension_numbers.lhs_spec[2:]
    for d, (low, high), dilation in zip(spatial, padding, lhs_dilation, strict=True):
        config[d] = (low, high, dilation - 1)
    return lhs if not any(map(any, config)) else lax.pad(lhs, value, config)


def _block_diagonal(rhs: Array, groups: int, dimension_numbers: lax.ConvDimensionNumbers) -> Array:
    """The kernel of a grouped convolution as a dense one: zero between the groups."""
    features_dim, inputs_dim = dimension_numbers.rhs_spec[:2]
    features, inputs = rhs.shape[features_dim], rhs.shape[inputs_dim]
    dense = jnp.concatenate([rhs] * groups, axis=inputs_dim)
    of_input = lax.broadcasted_iota(jnp.int32, dense.shape, inputs_dim) // inputs
    of_feature = lax.broadcasted_iota(jnp.int32, dense.shape, features_dim) // (features // groups)
    return jnp.where(of_input == of_feature, dense, jnp.zeros((), dense.dtype))


def _depthwise(
    lhs: Array,
    rhs: Array,
    window_strides: Sequence[int],
    rhs_dilation: Sequence[int],
    dimension_numbers: lax.ConvDimensionNumbers,
) -> Array:
    """A depthwise convolution without padding: one shifted, strided multiply-add per tap.

    out[n, s, f] = sum_tap lhs[n, s * stride + tap * dilation, f // multiplier] rhs[tap, f]. XLA
    fuses the sum into one loop.
    """
    lhs_spec, rhs_spec, out_spec = dimension_numbers
    lhs = lhs.transpose(lhs_spec[0], *lhs_spec[2:], lhs_spec[1])
    batch, *sizes, channels = lhs.shape
    taps = [rhs.shape[d] for d in rhs_spec[2:]]
    features = rhs.shape[rhs_spec[0]]
    # Feature f reads channel f // multiplier: channels are repeated, so that the inner loop runs
    # over all features. The barrier keeps the repetition out of that loop, which is three times
    # faster without its index arithmetic.
    if channels == 1:
        lhs = jnp.broadcast_to(lhs, (*lhs.shape[:-1], features))
    elif channels < features:
        lhs = lax.optimization_barrier(jnp.repeat(lhs, features // channels, axis=-1))
    weights = rhs.transpose(*rhs_spec[2:], rhs_spec[1], rhs_spec[0])
    weights = weights.reshape(math.prod(taps), features).astype(jnp.int32)
    spans = [(t - 1) * dilation + 1 for t, dilation in zip(taps, rhs_dilation, strict=True)]
    outs = [
        max(0, (size - span) // stride + 1)
        for size, span, stride in zip(sizes, spans, window_strides, strict=True)
    ]
    out = jnp.zeros((batch, *outs, features), jnp.int32)
    # In `lax`, for there may be many taps: jax.numpy takes longer to trace.
    for number, tap in enumerate(itertools.product(*map(range, taps)) if out.size else ()):
        starts = [t * dilation for t, dilation in zip(tap, rhs_dilation, strict=True)]
        ends = [
            start + (n - 1) * stride + 1
            for start, n, stride in zip(starts, outs, window_strides, strict=True)
        ]
        shifted = lax.slice(
            lhs,
            (0, *starts, 0),
            (batch, *ends, lhs.shape[-1]),
            (1, *window_strides, 1),
        )
        weight = lax.squeeze(lax.slice(weights, (number, 0), (number + 1, features)), (0,))
        weight = lax.broadcast_in_dim(weight, out.shape, (out.ndim - 1,))
        out = lax.add(out, lax.mul(lax.convert_element_type(shifted, jnp.int32), weight))
    # From (batch, spatial..., feature) to the layout asked for.
    position = {out_spec[0]: 0, out_spec[1]: out.ndim - 1}
    position |= {d: i + 1 for i, d in enumerate(out_spec[2:])}
    return out.transpose(*(position[d] for d in range(out.ndim)))
