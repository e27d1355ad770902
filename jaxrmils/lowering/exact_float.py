"""Integer results from float32 arithmetic alone, bit for bit.

float32 holds every integer up to 2^24, so a sum of products of integers is exact in it, in any
order of summation, while no partial sum can pass that. Longer or larger sums are taken apart:
codes are split into digits of base 16, each pair of digits is summed exactly, and the pieces meet
in int32. This is what simulates integer execution on any float backend, and what checks it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float32, Int, Int32

from jaxrmils.lowering.integer_dot import FLOAT32_EXACT, check_accumulator

BASE = 16


class _Part(NamedTuple):
    """Codes or one of their digits: the integer is the sum of `weight * values` over parts."""

    values: Float32[Array, "*shape"]
    weight: int


def exact_bilinear(
    op: Callable[[Float32[Array, "*lhs"], Float32[Array, "*rhs"]], Float32[Array, "*out"]],
    lhs_codes: Int[Array, "*lhs"] | Float32[Array, "*lhs"],
    rhs_codes: Int[Array, "*rhs"] | Float32[Array, "*rhs"],
    k: int,
    lhs_bound: int,
    rhs_bound: int,
) -> Int32[Array, "*out"]:
    """A bilinear operation on integers, computed in float32, exact in int32.

    op(lhs, rhs) with w = 16 high + low is 16 op(lhs, high) + op(lhs, low), and so for both.

    Args:
        op: bilinear, float32 x float32 to float32, summing at most k products per output, each
            product itself: a dot or a convolution at `precision=HIGHEST`, not a Winograd or FFT
            algorithm.
        lhs_codes: integers in any integer dtype or in float32, any zero point already subtracted.
        rhs_codes: the same for the right operand.
        k: products per output element.
        lhs_bound: largest absolute value of `lhs_codes` (128 for int8 codes, 255 for int8 codes
            with a zero point subtracted).
        rhs_bound: largest absolute value of `rhs_codes`.

    Returns:
        int32 of the shape that `op` returns. One call of `op` where
        `k * lhs_bound * rhs_bound <= 2^24`, else two or four.

    Raises:
        ValueError: if the result could overflow int32, or if k is too long even for digits.

    >>> codes = jnp.full((1, 40_000), 127, jnp.int8)
    >>> exact_bilinear(lambda x, y: x @ y.T, codes, codes, 40_000, 127, 127).tolist()
    [[645160000]]
    """
    check_accumulator(k, lhs_bound, rhs_bound)
    split_lhs, split_rhs = _splits(k, lhs_bound, rhs_bound)
    total = None
    for lhs in _parts(lhs_codes, split_lhs):
        for rhs in _parts(rhs_codes, split_rhs):
            piece = op(lhs.values, rhs.values).astype(jnp.int32)
            if lhs.weight * rhs.weight != 1:
                # May wrap; the sum of the pieces is exact modulo 2^32, and it fits.
                piece *= jnp.int32(lhs.weight * rhs.weight)
            total = piece if total is None else total + piece
    assert total is not None
    return total


def _splits(k: int, lhs_bound: int, rhs_bound: int) -> tuple[bool, bool]:
    """Which operands to split, with the fewest calls: none, one of them, or both."""
    longest = 0
    for split_lhs, split_rhs in ((False, False), (False, True), (True, False), (True, True)):
        product = _part_bound(lhs_bound, split_lhs) * _part_bound(rhs_bound, split_rhs)
        if k * product <= FLOAT32_EXACT:
            return split_lhs, split_rhs
        longest = max(longest, FLOAT32_EXACT // product)
    raise ValueError(
        f"K = {k} products of at most {lhs_bound} * {rhs_bound} are not exact in float32, even "
        f"in digits of base {BASE}: the limit is K = {longest}. Split the contraction."
    )


def _part_bound(bound: int, split: bool) -> int:
    """The largest absolute value of a part: low digits reach 15, high ones bound / 16 rounded up.

    The high digit is rounded down, so of negative codes it is -ceil(bound / 16).
    """
    return max(BASE - 1, -(-bound // BASE)) if split else bound


def _parts(codes: Array, split: bool) -> list[_Part]:
    values = codes.astype(jnp.float32)
    if not split:
        return [_Part(values, 1)]
    high = jnp.floor(values * jnp.float32(1 / BASE))
    return [_Part(high, BASE), _Part(values - BASE * high, 1)]
