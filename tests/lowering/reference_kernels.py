"""The native kernels' interface in XLA's own operations, for tests of what surrounds them."""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax

from jaxrmils.graph.functions import FUNCTIONS
from jaxrmils.lowering.integer_conv import conv_int32
from jaxrmils.lowering.integer_dot import dot_int32
from jaxrmils.lowering.native.kernels import Epilogue
from jaxrmils.lowering.native.packing import correction  # noqa: F401
from jaxrmils.numerics import QuantParams, quantize


def available():
    return None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Packed:
    codes: jax.Array


pack_conv = pack_depthwise = pack_dot = Packed


def finished(total, codes, e: Epilogue):
    """`total` are the sums of x w; kernels count those of (x + 128) w."""
    total += 128 * codes.sum(axis=range(codes.ndim - 1), dtype=jnp.int32)
    return _finished(total, e)


def _finished(total, e: Epilogue):
    y = (total + e.correction).astype(jnp.float32) * e.scale + e.offset
    if e.residual is not None:
        r = e.residual
        if e.residual_grid is not None:
            scale, zero = e.residual_grid
            r = scale * (r.astype(jnp.int32) - zero).astype(jnp.float32)
        assert r.shape == y.shape
        y = y + r
    if e.function is not None:
        y = FUNCTIONS[e.function](y)
    y = jnp.clip(y, e.low, e.high)
    return y if e.grid is None else quantize(y, QuantParams(*e.grid, 8, False))


def _conv(x, packed, e, groups, x_zero, strides, padding, dilation):
    edges = [(0, 0, 0), *((*p, 0) for p in padding), (0, 0, 0)]
    total = conv_int32(
        lax.pad(x, x_zero.astype(jnp.int8), edges),
        packed.codes,
        window_strides=strides,
        padding=[(0, 0)] * 2,
        lhs_dilation=(1, 1),
        rhs_dilation=dilation,
        dimension_numbers=lax.conv_dimension_numbers(
            x.shape, packed.codes.shape, ("NHWC", "HWIO", "NHWC")
        ),
        feature_group_count=groups,
    )
    return finished(total, packed.codes, e)


def conv(x, packed, epilogue, *, x_zero, strides, padding, dilation):
    return _conv(x, packed, epilogue, 1, x_zero, strides, padding, dilation)


def depthwise(x, packed, epilogue, *, x_zero, strides, padding, dilation):
    return _conv(x, packed, epilogue, x.shape[-1], x_zero, strides, padding, dilation)


def dot(x, packed, epilogue):
    total = dot_int32(x, packed.codes, (((1,), (0,)), ((), ())))
    return finished(total, packed.codes, epilogue)


def batched_dot(lhs, rhs, epilogue, *, lhs_zero, rhs_zero, dimension_numbers):
    total = dot_int32(lhs, rhs, dimension_numbers, lhs_zero_point=lhs_zero, rhs_zero_point=rhs_zero)
    return _finished(total, epilogue)
