"""Sizes in bits, and their human form."""

import math
from collections.abc import Sequence

import jax.numpy as jnp
from jax.typing import DTypeLike


def size_bits_float(shape: Sequence[int], dtype: DTypeLike) -> int:
    """The size in bits of an array kept in its own dtype.

    Args:
        shape: the array's shape.
        dtype: its dtype.

    Returns:
        Bits per element times the number of elements.

    Example:
        >>> import jax.numpy as jnp
        >>> size_bits_float((3, 5), jnp.bfloat16)
        240
    """
    return math.prod(shape) * jnp.dtype(dtype).itemsize * 8


def format_size(bits: float) -> str:
    """A size in decimal units, as papers print it (1 MB = 1e6 bytes).

    Args:
        bits: the size in bits.

    Returns:
        Bytes in B, kB, MB or GB.

    Example:
        >>> format_size(8 * 12_270_000), format_size(8 * 999), format_size(8 * 25_000)
        ('12.27 MB', '999 B', '25.00 kB')
    """
    size = bits / 8
    for factor, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if size >= factor:
            return f"{size / factor:.2f} {unit}"
    return f"{size:.0f} B"
