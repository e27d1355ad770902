"""int4 at rest: two codes per byte along the last axis."""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int8, UInt8

BITCASTS = jax.__version_info__ >= (0, 12)
"""Whether int4 is unpacked by a bitcast on CPU: jaxlib 0.10 folds that of a constant wrongly."""


def pack_int4(codes: Int8[Array, "*lead n"]) -> UInt8[Array, "*lead bytes"]:
    """Packs pairs of int4 codes into bytes, the first of each pair in the low four bits.

    Args:
        codes: int8 codes from -8 to 7 (only the low four bits are kept).

    Returns:
        uint8 with a last axis of `ceil(n / 2)`; an odd length is padded with a zero.

    Raises:
        ValueError: `codes` has no axis.

    Example:
        >>> import jax.numpy as jnp
        >>> print(pack_int4(jnp.array([1, -1, 7], jnp.int8)))
        [241   7]
    """
    if codes.ndim == 0:
        raise ValueError("codes has shape (); packing needs a last axis to pack along")
    if codes.shape[-1] % 2:
        codes = jnp.pad(codes, [(0, 0)] * (codes.ndim - 1) + [(0, 1)])
    nibbles = lax.bitcast_convert_type(codes, jnp.uint8) & jnp.uint8(15)
    return nibbles[..., 0::2] | (nibbles[..., 1::2] << jnp.uint8(4))


def unpack_int4(packed: UInt8[Array, "*lead bytes"], last_dim: int) -> Int8[Array, "*lead n"]:
    """Undoes `pack_int4`; safe inside `jit`.

    Args:
        packed: uint8 of `pack_int4`.
        last_dim: the length `n` of the last axis before packing.

    Returns:
        int8 codes from -8 to 7 with a last axis of `last_dim`.

    Raises:
        ValueError: `packed` has no axis, or its last axis does not hold `last_dim` codes.

    Example:
        >>> import jax.numpy as jnp
        >>> print(unpack_int4(jnp.array([241, 7], jnp.uint8), last_dim=3))
        [ 1 -1  7]
    """
    if packed.ndim == 0 or packed.shape[-1] != (last_dim + 1) // 2:
        raise ValueError(
            f"packed has shape {packed.shape}; {last_dim} codes take a last axis of "
            f"{(last_dim + 1) // 2} bytes"
        )
    # StableHLO can't refine the shape of a bitcast that adds a dim to unknown ones.
    if BITCASTS and all(isinstance(dim, int) for dim in packed.shape):
        pairs = lax.platform_dependent(packed, cpu=_by_bitcast, default=_by_shifts)
    else:
        pairs = _by_shifts(packed)
    return pairs.reshape(*packed.shape[:-1], 2 * packed.shape[-1])[..., :last_dim]


def _by_bitcast(packed: UInt8[Array, "*lead bytes"]) -> Int8[Array, "*lead bytes 2"]:
    # XLA:CPU vectorises this, unless it fuses the reshape. Nor may it be fused into the loops of a
    # convolution, where it would run again for every pixel: hence the barrier.
    codes = lax.bitcast_convert_type(packed, jnp.int4)
    return lax.optimization_barrier(lax.convert_element_type(codes, jnp.int8))


def _by_shifts(packed: UInt8[Array, "*lead bytes"]) -> Int8[Array, "*lead bytes 2"]:
    # An arithmetic shift to the right repeats the sign bit. What a bitcast to int4 makes first of
    # the two halves is up to the backend.
    shift = lax.full_like(packed, 4)
    pairs = lax.concatenate(
        [lax.expand_dims(half, (packed.ndim,)) for half in (lax.shift_left(packed, shift), packed)],
        packed.ndim,
    )
    codes = lax.bitcast_convert_type(pairs, jnp.int8)
    return lax.shift_right_arithmetic(codes, lax.full_like(codes, 4))
