"""Weight codes in the order in which the kernels read them.

Four codes of each of 16 output channels make one vector: [o / 16, k / 4, 16, 4], filled up with
zeros. k runs over the rows of the kernel, their columns and the input channels; in a depthwise
convolution the four are neighbours in a column of the kernel.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int8, Int32

LANES, QUAD = 16, 4


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["values", "sums"], meta_fields=["shape"]
)
@dataclasses.dataclass(frozen=True, eq=False)
class PackedConv:
    """Weights of a dense convolution.

    Attributes:
        values: the codes, [o / 16, kh kw c / 4, 16, 4].
        sums: of the codes that meet in each output channel.
        shape: (kh, kw, c, o), static.
    """

    values: Int8[Array, "panels quads 16 4"]
    sums: Int32[Array, " o"]
    shape: tuple[int, int, int, int]


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["values", "sums"], meta_fields=["shape"]
)
@dataclasses.dataclass(frozen=True, eq=False)
class PackedDepthwise:
    """Weights of a depthwise convolution, one output channel per input channel.

    Attributes:
        values: the codes, [c / 16, shifts, kh / 4, kw, 16, 4]; with shift r the kernel's first row
            is the r-th of its rows, which are filled up with zeros.
        sums: of every channel's codes.
        shape: (kh, kw, c), static.
    """

    values: Int8[Array, "groups shifts quads kw 16 4"]
    sums: Int32[Array, " c"]
    shape: tuple[int, int, int]


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["values", "sums"], meta_fields=["shape"]
)
@dataclasses.dataclass(frozen=True, eq=False)
class PackedDot:
    """Weights of a dot.

    Attributes:
        values: the codes, [n / 16, k / 4, 16, 4].
        sums: of every column's codes.
        shape: (k, n), static.
    """

    values: Int8[Array, "panels quads 16 4"]
    sums: Int32[Array, " n"]
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
    return PackedConv(*_packed(codes.reshape(kh * kw * c, o)), (kh, kw, c, o))


def pack_depthwise(codes: Int8[Array, "kh kw 1 c"]) -> PackedDepthwise:
    """Packs the weights of a depthwise convolution.

    Args:
        codes: int8.

    Raises:
        TypeError: if the codes are not int8.
        ValueError: if they have not four dims, or more than one input per output channel.

    Example:
        >>> pack_depthwise(jnp.ones((3, 3, 1, 20), jnp.int8)).values.shape
        (2, 2, 1, 3, 16, 4)
    """
    _check(codes, "kh kw 1 c")
    kh, kw, inputs, c = codes.shape
    if inputs != 1:
        raise ValueError(f"depthwise weights must be [kh, kw, 1, c], found shape {codes.shape}")
    rows = -kh % QUAD  # besides the kernel's own
    shifted = [
        jnp.pad(codes[:, :, 0], ((shift, rows - shift), (0, 0), (0, -c % LANES)))
        for shift in range(rows + 1)
    ]
    values = jnp.stack(shifted).reshape(rows + 1, (kh + rows) // QUAD, QUAD, kw, -1, LANES)
    sums = jnp.sum(codes, axis=(0, 1, 2), dtype=jnp.int32)
    return PackedDepthwise(values.transpose(4, 0, 1, 3, 5, 2), sums, (kh, kw, c))


def pack_dot(codes: Int8[Array, "k n"]) -> PackedDot:
    """Packs the weights of a dot.

    Args:
        codes: int8.

    Raises:
        TypeError: if the codes are not int8.
        ValueError: if they have not two dims.

    Example:
        >>> packed = pack_dot(jnp.ones((5, 3), jnp.int8))
        >>> packed.values.shape, packed.sums.tolist()
        ((1, 2, 16, 4), [5, 5, 5])
    """
    _check(codes, "k n")
    k, n = codes.shape
    return PackedDot(*_packed(codes), (k, n))


def _packed(codes: Array) -> tuple[Array, Array]:
    """[k, o] as panels, and the sums over k."""
    k, o = codes.shape
    filled = jnp.pad(codes, ((0, -k % QUAD), (0, -o % LANES)))
    values = filled.reshape(filled.shape[0] // QUAD, QUAD, filled.shape[1] // LANES, LANES)
    return values.transpose(2, 0, 3, 1), jnp.sum(codes, axis=0, dtype=jnp.int32)


def _check(codes: Array, dims: str) -> None:
    if codes.dtype != jnp.int8:
        raise TypeError(f"weight codes must be int8, found {codes.dtype}")
    if codes.ndim != len(dims.split()):
        raise ValueError(f"weight codes must be [{dims}], found shape {codes.shape}")
