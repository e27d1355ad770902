"""Weight codes in the order in which the kernels read them.

Four codes of each of 16 output channels make one vector: [o / 16, k / 4, 16, 4], filled up with
zeros. k runs over the rows of the kernel, their columns and the input channels; in a depthwise
convolution the four are neighbours in a column of the kernel.

Nothing but the codes is kept. Kernels sum (x + 128) w, since their instructions take one operand
without a sign; what that and the input's zero point add is `correction`, one number per channel.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, Int8, Int32

LANES, QUAD = 16, 4


@functools.partial(jax.tree_util.register_dataclass, data_fields=["values"], meta_fields=["shape"])
@dataclasses.dataclass(frozen=True, eq=False)
class PackedConv:
    """Weights of a dense convolution.

    Attributes:
        values: the codes, [o / 16, kh kw c / 4, 16, 4].
        shape: (kh, kw, c, o), static.
    """

    values: Int8[Array, "panels quads 16 4"]
    shape: tuple[int, int, int, int]


@functools.partial(jax.tree_util.register_dataclass, data_fields=["values"], meta_fields=["shape"])
@dataclasses.dataclass(frozen=True, eq=False)
class PackedDepthwise:
    """Weights of a depthwise convolution, one output channel per input channel.

    Attributes:
        values: the codes, [c / 16, kh / 4, kw, 16, 4].
        shape: (kh, kw, c), static.
    """

    values: Int8[Array, "groups quads kw 16 4"]
    shape: tuple[int, int, int]


@functools.partial(jax.tree_util.register_dataclass, data_fields=["values"], meta_fields=["shape"])
@dataclasses.dataclass(frozen=True, eq=False)
class PackedDot:
    """Weights of a dot.

    Attributes:
        values: the codes, [n / 16, k / 4, 16, 4].
        shape: (k, n), static.
    """

    values: Int8[Array, "panels quads 16 4"]
    shape: tuple[int, int]


def pack_conv(codes: Int8[Array, "kh kw c o"]) -> PackedConv:
    """Packs the weights of a dense convolution.

    Args:
        codes: int8.

    Raises:
        TypeError: if the codes are not int8.
        ValueError: if they have not four dims.

    Example:
        >>> pack_conv(jnp.ones((3, 3, 3, 20), jnp.int8)).values.shape
        (2, 7, 16, 4)
    """
    _check(codes, "kh kw c o")
    kh, kw, c, o = codes.shape
    return PackedConv(_packed(codes.reshape(kh * kw * c, o)), (kh, kw, c, o))


def pack_depthwise(codes: Int8[Array, "kh kw 1 c"]) -> PackedDepthwise:
    """Packs the weights of a depthwise convolution.

    Args:
        codes: int8.

    Raises:
        TypeError: if the codes are not int8.
        ValueError: if they have not four dims, or more than one input per output channel.

    Example:
        >>> pack_depthwise(jnp.ones((3, 3, 1, 20), jnp.int8)).values.shape
        (2, 1, 3, 16, 4)
    """
    _check(codes, "kh kw 1 c")
    kh, kw, inputs, c = codes.shape
    if inputs != 1:
        raise ValueError(f"depthwise weights must be [kh, kw, 1, c], found shape {codes.shape}")
    filled = jnp.pad(codes[:, :, 0], ((0, -kh % QUAD), (0, 0), (0, -c % LANES)))
    values = filled.reshape(-1, QUAD, kw, filled.shape[2] // LANES, LANES)
    return PackedDepthwise(values.transpose(3, 0, 2, 4, 1), (kh, kw, c))


def pack_dot(codes: Int8[Array, "k n"]) -> PackedDot:
    """Packs the weights of a dot.

    Args:
        codes: int8.

    Raises:
        TypeError: if the codes are not int8.
        ValueError: if they have not two dims.

    Example:
        >>> pack_dot(jnp.ones((5, 3), jnp.int8)).values.shape
        (1, 2, 16, 4)
    """
    _check(codes, "k n")
    k, n = codes.shape
    return PackedDot(_packed(codes), (k, n))


def correction(
    sums: Int[Array, " o"], x_zero: Int32[Array, ""] | Int32[Array, " o"]
) -> Int32[Array, " o"]:
    """What is to be added to a kernel's sums so that they become those of (x - x_zero) w.

    Args:
        sums: of the weight codes that meet in every output channel, int32 or int16.
        x_zero: zero point of the input, int32; 0 for the sums of x w.

    Returns:
        -(x_zero + 128) sums, int32.

    Example:
        >>> correction(jnp.array([3, -1]), jnp.int32(-128)).tolist()
        [0, 0]
    """
    return -(x_zero + jnp.int32(128)) * sums.astype(jnp.int32)


def _packed(codes: Array) -> Array:
    """[k, o] as panels."""
    k, o = codes.shape
    filled = jnp.pad(codes, ((0, -k % QUAD), (0, -o % LANES)))
    values = filled.reshape(filled.shape[0] // QUAD, QUAD, filled.shape[1] // LANES, LANES)
    return values.transpose(2, 0, 3, 1)


def _check(codes: Array, dims: str) -> None:
    if codes.dtype != jnp.int8:
        raise TypeError(f"weight codes must be int8, found {codes.dtype}")
    if codes.ndim != len(dims.split()):
        raise ValueError(f"weight codes must be [{dims}], found shape {codes.shape}")
