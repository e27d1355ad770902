"""Convolutions of a few input channels, written so that XLA's int8 kernels on CPU run well.

The kernels multiply four int8 at a time along the channels; images have three. A strided
convolution takes its blocks of pixels as channels instead (space to depth), another gets channels
of zeros. Both sum the same products, and zeros: they are exact in any integer type.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int, Int32

_CHANNELS = 4
"""What the kernels multiply at a time."""


def few_channels_conv(
    lhs: Int[Array, "*lhs"],
    rhs: Int[Array, "*rhs"],
    strides: Sequence[int],
    dimension_numbers: lax.ConvDimensionNumbers,
) -> Int32[Array, "*out"]:
    """A convolution without padding, dilation or groups, of few channels.

    With stride s > 1, pixel s i + b of the input becomes channel b of pixel i, and the same happens
    to the kernel, filled up with zeros to a multiple of s:

        out[i] = sum_t lhs[s i + t] rhs[t] = sum_u sum_b lhs'[i + u, b] rhs'[u, b], t = s u + b.

    Args:
        lhs: int8 input, padding written out.
        rhs: int8 kernel.
        strides: per spatial dim.
        dimension_numbers: the layouts.

    Returns:
        int32 in the output layout.

    >>> layouts = lax.conv_dimension_numbers((1, 5, 1), (3, 1, 1), ("NHC", "HIO", "NHC"))
    >>> lhs, rhs = jnp.arange(5, dtype=jnp.int8).reshape(1, 5, 1), jnp.ones((3, 1, 1), jnp.int8)
    >>> few_channels_conv(lhs, rhs, (2,), layouts).ravel().tolist()
    [3, 9]
    """
    lhs_spec, rhs_spec, out_spec = dimension_numbers
    lhs = lhs.transpose(lhs_spec[0], *lhs_spec[2:], lhs_spec[1])
    rhs = rhs.transpose(*rhs_spec[2:], rhs_spec[1], rhs_spec[0])
    fits = all(n >= t for n, t in zip(lhs.shape[1:-1], rhs.shape[:-2], strict=True))
    if fits and any(stride > 1 for stride in strides):
        lhs, rhs = _space_to_depth(lhs, rhs, strides)
        strides = (1,) * len(strides)
    missing = -rhs.shape[-2] % _CHANNELS
    lhs = jnp.pad(lhs, [(0, 0)] * (lhs.ndim - 1) + [(0, missing)])
    rhs = jnp.pad(rhs, [(0, 0)] * (rhs.ndim - 2) + [(0, missing), (0, 0)])
    ndim = lhs.ndim
    inner = lax.ConvDimensionNumbers(
        (0, ndim - 1, *range(1, ndim - 1)),
        (ndim - 1, ndim - 2, *range(ndim - 2)),
        (0, ndim - 1, *range(1, ndim - 1)),
    )
    out = lax.conv_general_dilated(
        lhs,
        rhs,
        window_strides=strides,
        padding="VALID",
        dimension_numbers=inner,
        preferred_element_type=jnp.int32,
    )
    position = {out_spec[0]: 0, out_spec[1]: ndim - 1}
    position |= {d: i + 1 for i, d in enumerate(out_spec[2:])}
    return out.transpose(*(position[d] for d in range(ndim)))


def _space_to_depth(lhs: Array, rhs: Array, strides: Sequence[int]) -> tuple[Array, Array]:
    """`[batch, spatial..., channels]` and `[spatial..., channels, features]`, stride 1."""
    sizes, taps = lhs.shape[1:-1], rhs.shape[:-2]
    blocks = [-(-t // s) for t, s in zip(taps, strides, strict=True)]
    outs = [(n - t) // s + 1 for n, t, s in zip(sizes, taps, strides, strict=True)]
    rows = [o - 1 + b for o, b in zip(outs, blocks, strict=True)]
    # What lies beyond the last block that is read is cropped, or added: the kernel is zero there.
    ends = [r * s - n for r, s, n in zip(rows, strides, sizes, strict=True)]
    lhs = lax.pad(lhs, jnp.zeros((), lhs.dtype), [(0, 0, 0), *((0, e, 0) for e in ends), (0, 0, 0)])
    lhs = _blocks_to_channels(lhs, rows, strides, first=1)
    ends = [b * s - t for b, s, t in zip(blocks, strides, taps, strict=True)]
    rhs = jnp.pad(rhs, [*((0, e) for e in ends), (0, 0), (0, 0)])
    return lhs, _blocks_to_channels(rhs, blocks, strides, first=0)


def _blocks_to_channels(
    array: Array, blocks: Sequence[int], strides: Sequence[int], first: int
) -> Array:
    """Every spatial dim, `first` and on, split into (block, place); places join the channels."""
    dims = len(blocks)
    head, (channels, *tail) = array.shape[:first], array.shape[first + dims :]
    split = itertools.chain.from_iterable(zip(blocks, strides, strict=True))
    array = array.reshape(*head, *split, channels, *tail)
    outer = [first + 2 * i for i in range(dims)]
    inner = [first + 2 * i + 1 for i in range(dims)]
    rest = range(first + 2 * dims, array.ndim)
    array = array.transpose(*range(first), *outer, *inner, *rest)
    return array.reshape(*head, *blocks, -1, *tail)
