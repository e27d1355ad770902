"""Depthwise convolutions as sums of shifted products, which XLA's CPU backend runs far faster.

XLA compiles a convolution with as many groups as channels to scalar loops on CPU, and its gradients
to worse. With one output channel for each input channel a convolution is

    y[i, j, c] = sum over taps (u, v) of x[s i + u, s j + v, c] * w[u, v, c],

a handful of elementwise products that fuse into one vectorised loop. The float32 sums differ from
the convolution's in the order of their additions.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxrmils.graph import compat

# Beyond this many taps the fused loop grows too long to compile quickly.
MAX_TAPS = 81


def is_depthwise(eqn: compat.JaxprEqn) -> bool:
    """True for a float convolution that `shifted_products` can run in place of XLA's."""
    if eqn.primitive.name != "conv_general_dilated" or eqn.params["batch_group_count"] != 1:
        return False
    inputs, kernel = (compat.abstract(var) for var in eqn.invars)
    spec = eqn.params["dimension_numbers"]
    return (
        eqn.params["feature_group_count"] == inputs.shape[spec.lhs_spec[1]] > 1
        and math.prod(kernel.shape[axis] for axis in spec.rhs_spec[2:]) <= MAX_TAPS
        and all(jnp.issubdtype(operand.dtype, jnp.floating) for operand in (inputs, kernel))
    )


def bind_depthwise(eqn: compat.JaxprEqn, operands: Sequence[Any]) -> Any:
    """Runs a depthwise convolution: in shifted products on CPU, as it stands elsewhere.

    Args:
      eqn: a `conv_general_dilated` for which `is_depthwise` holds.
      operands: inputs and kernel, of any float dtype.

    Returns:
      What the equation returns, accumulated in float32 or wider.
    """
    return lax.platform_dependent(
        *operands,
        cpu=lambda *operands: shifted_products(eqn, *operands),
        default=lambda *operands: compat.bind(eqn, operands)[0],
    )


def shifted_products(eqn: compat.JaxprEqn, inputs: Any, kernel: Any) -> Any:
    """The convolution as a sum over its taps; see the module.

    Args:
      eqn: strides, padding, dilations and the layout of the operands.
      inputs: as the equation takes them, `channels` in all.
      kernel: with `channels * multiplier` output channels.

    Returns:
      The output in the equation's layout; its dtype is that of the equation for operands of the
      given dtype. Differentiable in reverse, and forward over reverse.
    """
    params, spec = eqn.params, eqn.params["dimension_numbers"]
    dtype = params["preferred_element_type"] or inputs.dtype
    wide = jnp.float64 if dtype == jnp.float64 else jnp.float32
    inputs = inputs.transpose(spec.lhs_spec[0], *spec.lhs_spec[2:], spec.lhs_spec[1]).astype(wide)
    kernel = kernel.transpose(*spec.rhs_spec[2:], *spec.rhs_spec[1::-1]).astype(wide)[..., 0, :]
    multiplier = kernel.shape[-1] // inputs.shape[-1]
    if multiplier > 1:
        inputs = jnp.repeat(inputs, multiplier, axis=-1)
    geometry = tuple(
        _Axis(*axis)
        for axis in zip(
            params["window_strides"],
            *zip(*params["padding"], strict=True),
            params["lhs_dilation"],
            params["rhs_dilation"],
            strict=True,
        )
    )
    result = _shifted(inputs, kernel, geometry)
    order = (spec.out_spec[0], *spec.out_spec[2:], spec.out_spec[1])
    return result.transpose([order.index(axis) for axis in range(len(order))]).astype(dtype)


class _Axis(NamedTuple):
    """How a spatial axis is convolved."""

    stride: int
    low: int
    high: int
    input_dilation: int
    kernel_dilation: int

    def transposed(self, size: int, taps: int, result: int) -> _Axis:
        """The geometry that takes the `result` positions' cotangent back to `size` inputs."""
        reach = (taps - 1) * self.kernel_dilation
        low = reach - self.low
        spread = (result - 1) * self.stride + 1
        high = (size - 1) * self.input_dilation + reach + 1 - spread - low
        return _Axis(self.input_dilation, low, high, self.stride, self.kernel_dilation)


# A rule of its own: the transposes of the slices would be one padded array for every tap. In the
# gradient with respect to the inputs the taps are gathered as well.
@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _shifted(inputs: Any, kernel: Any, geometry: tuple[_Axis, ...]) -> Any:
    """[batch, *space, channels] by [*taps, channels]."""
    return _sum_of_taps(inputs, kernel, geometry)


def _forward(inputs: Any, kernel: Any, geometry: tuple[_Axis, ...]) -> tuple[Any, Any]:
    return _sum_of_taps(inputs, kernel, geometry), (inputs, kernel)


def _backward(geometry: tuple[_Axis, ...], operands: tuple[Any, Any], cotangent: Any) -> Any:
    inputs, kernel = operands
    transposed = tuple(
        axis.transposed(size, taps, result)
        for axis, size, taps, result in zip(
            geometry, inputs.shape[1:-1], kernel.shape[:-1], cotangent.shape[1:-1], strict=True
        )
    )
    flipped = jnp.flip(kernel, tuple(range(kernel.ndim - 1)))
    to_inputs = _sum_of_taps(cotangent, flipped, transposed)
    axes = tuple(range(inputs.ndim - 1))
    products = [jnp.sum(tap * cotangent, axes) for tap in _taps(inputs, kernel, geometry)]
    return to_inputs, jnp.stack(products).reshape(kernel.shape)


_shifted.defvjp(_forward, _backward)


def _sum_of_taps(inputs: Any, kernel: Any, geometry: tuple[_Axis, ...]) -> Any:
    weights = kernel.reshape(-1, kernel.shape[-1])
    products = (tap * w for tap, w in zip(_taps(inputs, kernel, geometry), weights, strict=True))
    return functools.reduce(jnp.add, products)


def _taps(inputs: Any, kernel: Any, geometry: tuple[_Axis, ...]) -> Iterator[Any]:
    """What every tap of the kernel is multiplied with, [batch, *space, channels]."""
    edges = [(axis.low, axis.high, axis.input_dilation - 1) for axis in geometry]
    padded = lax.pad(inputs, jnp.zeros((), inputs.dtype), [(0, 0, 0), *edges, (0, 0, 0)])
    strides = (1, *(axis.stride for axis in geometry), 1)
    reach = [
        size - (taps - 1) * axis.kernel_dilation
        for axis, size, taps in zip(geometry, padded.shape[1:-1], kernel.shape[:-1], strict=True)
    ]
    for tap in np.ndindex(*kernel.shape[:-1]):
        starts = [int(t) * axis.kernel_dilation for t, axis in zip(tap, geometry, strict=True)]
        ends = [start + length for start, length in zip(starts, reach, strict=True)]
        yield lax.slice(
            padded,
            (0, *starts, 0),
            (padded.shape[0], *ends, padded.shape[-1]),
            strides,
        )
